"""Quorum systems: the table, and a dumb twin that tries every subset."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from trex_core.quorum import EvenFlexible, Majority, Tally, Weighted

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
