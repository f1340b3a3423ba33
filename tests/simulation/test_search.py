"""Every reachable state of small clusters is visited and found right, and the search can fail.

What the bounds mean and which states count as one is said in ``tests/search/model.py``; larger
bounds are ``just soak``. The mutants are caught by what holds of all voters together, without
``check_step`` and without looking into any one voter.
"""

from __future__ import annotations

import pytest

from tests.search.explore import Report, digest, explore
from tests.search.model import Bounds, Model, orders
from tests.simulator.mutants import MUTANTS, load
from trex_core import paxos
from trex_core.messages import decode_value

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
A, B, C = 1, 2, 3

COMPLETE = [
    *(Bounds(owners, slots=1) for owners in orders(3)),
    Bounds((A, B), slots=2),
    Bounds((A, B), slots=1, lag="all"),
    Bounds((A, B), slots=2, formed=False),
]
"""Walked to the end."""
WITHIN: list[tuple[Bounds, int]] = [
    (Bounds((A, B, C), slots=2), 9),
    (Bounds((A, B, A), slots=2), 8),
    (Bounds((A, B, B), slots=2), 8),
]
"""Walked to this many actions."""

SEEN = {
    "a crash forgets what was fixed",
    "a hole is filled with a no-op",
    "a leader is told of an accept above its own",
    "a leader's crash forgets its own accept",
    "a refusal ends a role",
    "a snapshot is installed",
    "a value is proposed again",
    "an Accept is taken above the fixed slot only",
    "asks again under the same ballot",
    "ballot 2 leads",
    "leads with a fetched value",
    "learned by catch-up, candidate",
    "learned by catch-up, follower",
    "learned by catch-up, leader",
    "learned by the announced pair",
    "learned by the chain over other ballots",
    "learned by the tip",
    "silent holders are dropped",
    "slot 2 fixed by count at ballot 1",
    "slot 2 fixed by count at ballot 2",
    "slot 3 fixed by count at ballot 1",
    "slot 3 fixed by count at ballot 2",
}
"""What happens in the complete search of two ballots and two slots: it is not empty talk."""
SEEN_THIRD = {"ballot 3 leads", "slot 2 fixed by count at ballot 3"}
"""... and of three ballots and one slot."""

FIGURES = {
    "ballots ABC, 1 slots, formed, lag leader": 25_384,
    "ballots AB, 2 slots, formed, lag leader": 92_192,
}
"""States of some searches: of the unbroken core there are exactly as many. Who changes what a voter
remembers or sends changes them, and says so here."""


def walk(capsys, bounds: Bounds, depth_max: int = 0) -> Report:
    report = explore(Model(bounds), depth_max=depth_max)
    with capsys.disabled():
        print(f"\n{report}", end="")
    assert not report.violation, report.story()
    return report


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bounds", COMPLETE, ids=str)
def test_all_states(capsys, bounds):
    report = walk(capsys, bounds)
    assert report.complete
    assert report.states == FIGURES.get(str(bounds), report.states)
    if bounds.owners == (A, B) and bounds.slots == 2 and bounds.formed:
        assert not SEEN - set(report.seen)
    if len(bounds.owners) == 3:
        assert not SEEN_THIRD - set(report.seen)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("bounds", "depth_max"), WITHIN, ids=str)
def test_all_states_within(capsys, bounds, depth_max):
    assert walk(capsys, bounds, depth_max).depth == depth_max


def test_orders_are_one_for_each_set_of_names():
    assert orders(3) == ((A, A, A), (A, A, B), (A, B, A), (A, B, B), (A, B, C))


def disks_and_logs(bounds: Bounds) -> set[object]:
    """What gets to the disks, and what is fixed, in all states where nobody is lost; of a value
    only who proposed it first: whether a leader fills a free slot with a command or a no-op is all
    the same.
    """
    model = Model(bounds)

    def first_proposed(values):
        return tuple(decode_value(value).ballot for value in values)

    found: set[object] = set()
    start = model.start()
    level, visited = [start], {digest(model, start)}
    while level:
        following = []
        for world in level:
            locals_ = [model.locals.things[n] for n in world.locals]
            if not any(local.lost for local in locals_):
                disks = tuple(
                    (
                        local.disk.promised,
                        local.disk.fixed,
                        tuple(
                            (run.first, run.ballot, first_proposed(run.values))
                            for run in local.disk.accepted
                        ),
                    )
                    for local in locals_
                )
                found.add((disks, first_proposed(model.logs.things[world.log][0])))
            for _, _, after in model.successors(world):
                name = digest(model, after)
                if name not in visited:
                    visited.add(name)
                    following.append(after)
        level = following
    return found


def test_only_a_leader_gains_by_running_ahead_of_its_disk():
    """The reduction ``lag="leader"``: no other disks and logs are reached without it."""
    few = disks_and_logs(Bounds((A, B), slots=1))
    assert few == disks_and_logs(Bounds((A, B), slots=1, lag="all"))
    assert len(few) > 300


# --- the search can fail ----------------------------------------------------------------------

ONE = Bounds((A, B), slots=1)
CAUGHT = {
    "accept-quorum-of-one": (ONE, "no accept quorum", 1),
    "promise-quorum-of-one": (ONE, "agreement", 8),
    "forgotten-promise": (ONE, "agreement", 10),
    "forgotten-accept": (ONE, "no accept quorum", 3),
    "promise-does-not-bind": (ONE, "a leader holds what it proposed", 8),
    "leader-does-not-yield": (ONE, "agreement", 9),
    "fix-without-matching-ballot": (Bounds((A, B), slots=2), "agreement", 10),
    "fix-without-matching-chain": (ONE, "agreement", 8),
    "lowest-ballot-value": (Bounds((A, B, C), slots=1), "agreement", 13),
    "ignored-promised-value": (ONE, "agreement", 9),
    "empty-promise": (ONE, "agreement", 9),
    "hidden-accepts": (ONE, "agreement", 9),
    "ballot-used-twice": (ONE, "two values of slot 2", 8),
    "counted-from-one": (ONE, "is said to be counted", 7),
    "learned-becomes-accepted": (ONE, "that nobody proposed", 6),
    "D1": (ONE, "no accept quorum", 5),
    "D2": (Bounds((A, B, A, B), slots=1), "agreement", 13),
    "D6": (ONE, "no accept quorum", 3),
}
"""Mutant -> the bounds within which it is caught, what is said of it, in how few actions."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CAUGHT)
def test_mutant_is_caught(capsys, name):
    bounds, words, actions = CAUGHT[name]
    core = load(paxos, name, BY_NAME[name].edits)
    report = explore(Model(bounds, core, check_steps=False))
    with capsys.disabled():
        print(f"\n{name}: {report}", end="")
    assert words in report.violation, report.story()
    assert len(report.schedule) == actions, report.story()


def test_votes_before_the_sync_are_caught():
    report = explore(Model(Bounds((A, B), slots=1, lag="all"), check_steps=False, hasty=True))
    assert "no accept quorum" in report.violation
    accept = "voter 2 receives Accept 0.1.1 slot 2: command 0.1.1@2/0 (tip 1)"
    lost = "what it writes from here on never gets to its disk"
    assert report.schedule == (
        "voter 1 proposes command 0.1.1@2/0; holds command 0.1.1@2/0 in slot 2 at 0.1.1",
        f"{accept} of voter 1; holds command 0.1.1@2/0 in slot 2 at 0.1.1, {lost}",
        f"voter 1 receives Accepted 0.1.1 slot 2..2 of voter 2; fixed 2, {lost}",
    )


def test_what_step_raises_is_told_with_its_schedule():
    hear = "        self.yield_to(ballot)\n        self.hear(ballot, 0)\n"
    raises = "        if message.first > 1:\n            raise LookupError(ballot)\n"
    report = explore(Model(ONE, load(paxos, "raises", ((hear, hear + raises),))))
    assert len(report.schedule) == 2
    assert report.story().endswith(
        "step of voter 2 fails: LookupError(Ballot(era=0, round=1, voter=1))"
    )


def test_a_journal_that_forgets_is_seen_at_once():
    """With the checks of one voter on, what takes ten actions to hurt is found when it is done."""
    name = "forgotten-promise"
    bounds = Bounds((A, B), slots=1, formed=False)
    report = explore(Model(bounds, load(paxos, name, BY_NAME[name].edits)))
    assert "a promise is journalled" in report.violation
    assert len(report.schedule) == 2
