"""Quorum systems: the table, and a dumb twin that tries every subset."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from trex_core.quorum import EvenFlexible, Majority, Tally, Weighted
from trex_core.state import Config

PATH = Path(__file__).parent.parent / "scenarios" / "quorum.json"
CASES = json.loads(PATH.read_text())["quorums"]
SYSTEMS = {"Majority": Majority, "EvenFlexible": EvenFlexible}


def named(cases):
    return [pytest.param(case, id=case["name"].split(":")[0]) for case in cases]


@pytest.mark.parametrize("case", named(case for case in CASES if "system" in case))
def test_table(case):
    voters = case["voters"]
    quorums = SYSTEMS[case["system"]](range(1, voters + 1))
    for count in range(voters + 1):
        yes = range(1, count + 1)
        assert (quorums.promise(yes) is Tally.WIN) == (count >= case["promise"]), case["name"]
        assert (quorums.accept(yes) is Tally.WIN) == (count >= case["accept"]), case["name"]


@pytest.mark.parametrize("case", named(case for case in CASES if "weights" in case))
def test_quorums_that_might_not_meet_are_refused(case):
    weights = dict(enumerate(case["weights"], 1))
    if case["refused"]:
        with pytest.raises(ValueError, match="weight"):
            Weighted(weights, case["promise"], case["accept"])
    else:
        Weighted(weights, case["promise"], case["accept"])


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 6, 7])
def test_all_weights_up_to_2_of_all_memberships_up_to_7(voters):
    """Each pair of quorum weights: refused, or each promise quorum meets each accept quorum, for no
    accept quorum is among those that a promise quorum leaves out. Counted by a dumb twin too."""
    subsets = [s for n in range(voters + 1) for s in itertools.combinations(range(voters), n)]
    built = 0
    for weights in itertools.combinations_with_replacement((0, 1, 2), voters):
        total = sum(weights)
        weigh = dict(enumerate(weights))
        for promise, accept in itertools.product(range(-1, total + 2), repeat=2):
            if promise + accept <= total or not (0 < promise <= total and 0 < accept <= total):
                with pytest.raises(ValueError, match="weight"):
                    Weighted(weigh, promise, accept)
                continue
            if promise + accept > total + 1:
                continue  # fewer quorums of either kind than a pair that just exceeds the total
            quorums = Weighted(weigh, promise, accept)
            built += 1
            for subset in subsets:
                rest = [voter for voter in range(voters) if voter not in subset]
                promised = quorums.promise(subset) is Tally.WIN
                assert promised == (sum(weights[voter] for voter in subset) >= promise)
                accepted = quorums.accept(rest) is Tally.WIN
                assert accepted == (sum(weights[voter] for voter in rest) >= accept)
                assert not (promised and accepted), (weights, promise, accept, subset)
    assert built >= voters


def test_the_algorithm_is_told_its_quorums():
    assert isinstance(Config(2, (1, 2, 3), 102, 1).quorums, Majority)
    heavy = Weighted({1: 2, 2: 1, 3: 0}, 2, 2)
    assert Config(2, (1, 2, 3), 102, 1, quorum=heavy).quorums is heavy
    for strange in (Weighted({1: 1, 2: 1}, 2, 1), Majority((1, 2, 3, 4)), Majority((2, 3, 4))):
        with pytest.raises(ValueError, match="exactly the voters"):
            Config(2, (1, 2, 3), 102, 1, quorum=strange)


@pytest.mark.parametrize(
    "fields",
    [
        {"voters": (1, 3)},
        {"voters": (3, 2, 1)},
        {"voters": (1, 2, 2)},
        {"heartbeat_ticks": 0},
        {"heartbeat_ticks": 9},
        {"election_ticks_min": 50},
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(fields):
    good = {"voter": 2, "voters": (1, 2, 3), "incarnation": 102, "boot": 1}
    Config(**good)
    with pytest.raises(ValueError, match=r"voters must be|need 3"):
        Config(**{**good, **fields})


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("system", [Majority, EvenFlexible])
def test_every_promise_quorum_meets_every_accept_quorum(
    system: type[Majority], voters: int
) -> None:
    quorums = system(range(voters))
    subsets = [set(s) for n in range(voters + 1) for s in itertools.combinations(range(voters), n)]
    promises = [s for s in subsets if quorums.promise(s) is Tally.WIN]
    accepts = [s for s in subsets if quorums.accept(s) is Tally.WIN]
    assert promises and accepts
    assert all(p & a for p in promises for a in accepts)


def test_a_split_vote_loses_and_an_open_one_waits() -> None:
    quorums = Majority((1, 2, 3, 4))
    assert quorums.accept({1, 2}, {3, 4}) is Tally.LOSE
    assert quorums.accept({1, 2}, {3}) is Tally.WAIT
    assert quorums.accept({1, 2, 3}, {4}) is Tally.WIN
    assert quorums.promise({1, 2, 99}, ()) is Tally.WAIT, "a stranger weighs nothing"


def test_a_voter_named_twice_counts_once() -> None:
    """Whoever counts answers may hand in a list of them: a repeated one is one voter's."""
    quorums = Weighted({1: 2, 2: 1, 3: 2}, 3, 3)
    assert quorums.accept([1, 1]) is Tally.WAIT
    assert quorums.promise([2, 2, 2, 2]) is Tally.WAIT
    assert quorums.accept([1, 1], [3, 3]) is Tally.WAIT
    assert quorums.accept([1, 2, 1]) is Tally.WIN


@pytest.mark.parametrize("seed", range(200))
def test_the_tally_agrees_with_trying_every_outcome(seed: int) -> None:
    """WIN: won whatever the rest votes; LOSE: lost whatever; WAIT: it depends."""
    chance = random.Random(seed)
    voters = list(range(chance.randint(1, 6)))
    weights = {v: chance.randint(0, 3) for v in voters}
    total = sum(weights.values())
    if total == 0:
        return
    promise = chance.randint(1, total)
    quorums = Weighted(weights, promise, total - promise + 1)
    yes = {v for v in voters if chance.random() < 0.4}
    no = {v for v in voters if v not in yes and chance.random() < 0.4}
    rest = [v for v in voters if v not in yes | no]
    won = [
        sum(weights[v] for v in yes | set(more)) >= promise
        for n in range(len(rest) + 1)
        for more in itertools.combinations(rest, n)
    ]
    # A vote already given weighs; only WIN is decided before the rest votes.
    now = sum(weights[v] for v in yes) >= promise
    expected = Tally.WIN if now else Tally.WAIT if any(won) else Tally.LOSE
    assert quorums.promise(yes, no) is expected
