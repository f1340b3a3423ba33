"""The tests are tested: each planted defect is caught by what is said to catch it.

The outside checkers must do it alone, so ``invariants.check_step`` is off; the schedules are played
with it on as well. That the unbroken core passes the same schedules and seeds is said elsewhere.
"""

from __future__ import annotations

import pytest

from tests.simulator.disk import Disk
from tests.simulator.mutants import LEARNER_MUTANTS, MUTANTS, SMALL_LIMITS, load
from tests.simulator.observer import Violation
from tests.simulator.options import Options, draw
from tests.simulator.schedules import SCHEDULES
from tests.simulator.voter import Voter
from tests.simulator.world import World
from trex_core import learner, paxos
from trex_core.invariants import InvariantViolation

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def caught_by_swarm(seeds: int, **broken: object) -> int | None:
    """The first seed whose world is found broken."""
    for seed in range(seeds):
        try:
            World(seed, draw(seed), check_steps=False, **broken).run()
        except Violation:
            return seed
    return None


def core_of(mutant):
    return load(paxos, mutant.name, mutant.edits, SMALL_LIMITS if mutant.small else None)


@pytest.mark.parametrize("check_steps", [False, True], ids=["outside", "with-invariants"])
@pytest.mark.parametrize("name", [m.name for m in MUTANTS if m.schedule])
def test_caught_by_schedule(name, check_steps):
    with pytest.raises((Violation, InvariantViolation, AssertionError)):
        SCHEDULES[BY_NAME[name].schedule](core_of(BY_NAME[name]), check_steps=check_steps)


@pytest.mark.parametrize("name", [m.name for m in MUTANTS if m.seeds])
def test_caught_by_swarm(name):
    mutant = BY_NAME[name]
    assert caught_by_swarm(mutant.seeds, core=core_of(mutant)) is not None, mutant.defect


@pytest.mark.parametrize("mutant", LEARNER_MUTANTS, ids=lambda mutant: mutant.name)
def test_learner_caught_by_swarm(mutant):
    broken = load(learner, mutant.name, mutant.edits)
    assert caught_by_swarm(mutant.seeds, learner=broken) is not None, mutant.defect


def test_every_mutant_has_its_catcher():
    assert all(mutant.schedule or mutant.seeds for mutant in (*MUTANTS, *LEARNER_MUTANTS))
    assert {"D1", "D2", "D3", "D4", "D5", "D6"} <= set(BY_NAME)


# --- mutants of the shell -------------------------------------------------------------------


class HastyVoter(Voter):
    """Its votes leave before the sync."""

    def _send_all(self, sends):
        for send in sends:
            self._send(send)


class LyingDisk(Disk):
    """A sync returns, but at a crash what was synced last is gone."""

    _last = None

    def crash(self, rng, torn):
        written = self._last
        if written is not None:
            end = written.offset + len(written.data)
            self._files[written.number][written.offset : end] = bytes(len(written.data))
        return super().crash(rng, torn)

    def sync(self):
        self._last = self._under_way[0]
        super().sync()


class LyingVoter(Voter):
    disk_type = LyingDisk


class TrustingVoter(Voter):
    """It reads without asking a quorum whether it still leads."""

    def _may_answer(self, role, after_beat, slot):  # noqa: ARG002
        return self.replica.slot >= slot


class ForgetfulLeader(Voter):
    """It asks, but does not wait for what earlier leaders may have fixed."""

    def _may_answer(self, role, after_beat, slot):  # noqa: ARG002
        return role.beat_acked > after_beat


PAUSES = Options(
    clients=3, reads=0.5, faults=("pause",), fault_every_us=20_000, skew=0.4, calm_us=60_000
)
"""A leader that was stopped and goes on believes it leads, until its clock ticks."""


CRASHES = Options(
    clients=3,
    reads=1.0,
    submit_every_us=3_000,
    faults=("crash",),
    fault_every_us=60_000,
    calm_us=60_000,
    sync_min_us=8_000,
    sync_span_us=10_000,
)
"""A new leader's heartbeat is answered before what it proposes again is on any disk."""


@pytest.mark.parametrize("voter_type", [HastyVoter, LyingVoter])
def test_broken_shell_is_caught(voter_type):
    assert caught_by_swarm(20, voter_type=voter_type) is not None


@pytest.mark.parametrize(
    ("voter_type", "options"), [(TrustingVoter, PAUSES), (ForgetfulLeader, CRASHES)]
)
def test_stale_read_is_caught(voter_type, options):
    World(0, options).run()
    with pytest.raises(Violation, match="stale read"):
        run_worlds(options, voter_type)


def run_worlds(options, voter_type):
    for seed in range(60):
        World(seed, options, voter_type=voter_type).run()


def test_hasty_votes_are_caught_in_calm_weather():
    with pytest.raises(Violation, match="before it is on"):
        World(0, Options(), voter_type=HastyVoter, check_steps=False).run()
