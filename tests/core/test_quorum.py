"""Quorum systems: the table, and a dumb twin that tries every subset."""

from __future__ import annotations

import itertools
import random

import pytest

from trex_core.quorum import EvenFlexible, Majority, Tally, Weighted

TABLE = [  # voters, promise quorum, accept quorum
    (Majority, 1, 1, 1),
    (Majority, 3, 2, 2),
    (Majority, 5, 3, 3),
    (Majority, 7, 4, 4),
    (EvenFlexible, 2, 2, 1),
    (EvenFlexible, 3, 2, 2),
    (EvenFlexible, 4, 3, 2),
    (EvenFlexible, 6, 4, 3),
]


@pytest.mark.parametrize(("system", "voters", "promise", "accept"), TABLE)
def test_table(system: type[Majority], voters: int, promise: int, accept: int) -> None:
    quorums = system(range(1, voters + 1))
    for count in range(voters + 1):
        yes = range(1, count + 1)
        assert (quorums.promise(yes) is Tally.WIN) == (count >= promise)
        assert (quorums.accept(yes) is Tally.WIN) == (count >= accept)


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


@pytest.mark.parametrize(
    ("weights", "promise", "accept"),
    [({1: 1, 2: 1, 3: 1}, 1, 2), ({1: 2, 2: 2}, 2, 2), ({}, 1, 1), ({1: 0}, 1, 1), ({1: -1}, 1, 1)],
)
def test_quorums_that_might_not_meet_are_refused(
    weights: dict[int, int], promise: int, accept: int
) -> None:
    with pytest.raises(ValueError, match="weight"):
        Weighted(weights, promise, accept)


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
