"""The tests are tested: each planted defect is caught by what is said to catch it.

The outside checkers must do it alone, so ``invariants.check_step`` is off; the schedules are played
with it on as well. That the unbroken core passes the same schedules and seeds is said elsewhere.
"""

from __future__ import annotations

import msgspec
import pytest

from tests.simulator.disk import Disk
from tests.simulator.mutants import LEARNER_MUTANTS, MUTANTS, SMALL_LIMITS, load
from tests.simulator.observer import Violation
from tests.simulator.options import Options, draw
from tests.simulator.replica import Replica
from tests.simulator.schedules import SCHEDULES
from tests.simulator.voter import Voter
from tests.simulator.world import CrashPoint, World
from trex_core import learner, paxos
from trex_core.invariants import InvariantViolation
from trex_core.machine import TooOld
from trex_core.metadata.commands import Reason, Rejected, encode_result
from trex_core.sessions import NO_SESSIONS

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


def run_worlds(options, voter_type=Voter, **broken):
    for seed in range(60):
        World(seed, options, voter_type=voter_type, **broken).run()


def test_hasty_votes_are_caught_in_calm_weather():
    with pytest.raises(Violation, match="before it is on"):
        World(0, Options(), voter_type=HastyVoter, check_steps=False).run()


# --- mutants for the checkers of the swarm --------------------------------------------------


class SessionlessReplica(Replica):
    """Its snapshots lack the sessions: the same bytes at all voters, and none of them right."""

    def snapshot(self, chain, genesis):
        sessions, self.sessions = self.sessions, NO_SESSIONS
        data = super().snapshot(chain, genesis)
        self.sessions = sessions
        return data


class SessionlessVoter(Voter):
    replica_type = SessionlessReplica


class RejectingReplica(Replica):
    """It rejects what its program is too old for, instead of stopping."""

    def _apply(self, slot, command):
        try:
            return super()._apply(slot, command)
        except TooOld:
            return self.machine, encode_result(Rejected(Reason.MALFORMED, "never heard of"))


class RejectingVoter(Voter):
    replica_type = RejectingReplica


class ImpatientVoter(Voter):
    """Its leases end when a quarter of their time is over."""

    def _lease_times_ms(self):
        return {lease: time_ms // 4 for lease, time_ms in super()._lease_times_ms().items()}


class StrictVoter(Voter):
    """As a new leader it gives leases no time again: it has seen no renewal, so they are over."""

    def _lease_clock(self, times_ms, now_ms):
        return super()._lease_clock(dict.fromkeys(times_ms, 1), now_ms)


class HastyDisk(Disk):
    """It deletes segments before the snapshot that replaces them has its name."""

    def keep_snapshot(self, slot, data):
        oldest = max(self.snapshots, default=0)
        for number in sorted(self._files)[:-1]:
            if oldest and self._last_slot_before.get(number + 1, slot + 1) <= slot:
                del self._files[number]
        yield from super().keep_snapshot(slot, data)


class HastyDiskVoter(Voter):
    disk_type = HastyDisk


SNAPSHOTS = Options(snapshot_slots=8)
LEVELS = Options(levels=0.5, faults=("upgrade",), fault_every_us=50_000)
TENANTS = Options(tenants=3, voters=3, faults=("hand_over",), fault_every_us=120_000)
"""Leaders change, nobody is lost."""


@pytest.mark.parametrize(
    ("voter_type", "options", "words"),
    [
        (SessionlessVoter, SNAPSHOTS, "not what a replay gives"),
        (RejectingVoter, LEVELS, "too old for it"),
        (ImpatientVoter, TENANTS, "granted twice"),
        (StrictVoter, TENANTS, "granted twice"),
    ],
)
def test_broken_promise_is_caught(voter_type, options, words):
    World(0, options).run()
    with pytest.raises(Violation, match=words):
        run_worlds(options, voter_type)


def test_segments_deleted_too_early_are_caught():
    """Only by a crash just then: at the first, second, ... act of the first snapshots."""
    with pytest.raises(Violation, match="undamaged journal was refused"):
        crash_at_each_act_of_a_snapshot()


def crash_at_each_act_of_a_snapshot():
    options = Options(events=600, snapshot_slots=4, segment_bytes=1_200, downtime_us=1)
    for k in range(1, 12):
        point = CrashPoint(1, "snapshot", k)
        World(0, options, voter_type=HastyDiskVoter, crash_at=point).run()


REPLACED = Options(
    voters=3,
    faults=("wipe", "roll_back", "crash", "isolate_leader"),
    fault_every_us=30_000,
    events=1_500,
)


@pytest.mark.parametrize("name", ["foreign-incarnation-counts", "old-boot-counts"])
def test_a_replaced_disk_that_counts_is_caught(name):
    with pytest.raises(Violation, match=r"no accept quorum holds|says it counted"):
        run_worlds(REPLACED, core=core_of(BY_NAME[name]), check_steps=False)


BROKEN_REST = Options(voters=3, listeners=0, heal_all=False, events=600)


def test_a_core_without_a_leader_is_caught():
    """A leader that is left deaf, and never notices, keeps the healed ones from electing."""
    World(0, BROKEN_REST).run()
    core = core_of(BY_NAME["leader-never-steps-down"])
    with pytest.raises(Violation, match="no leader after healing"):
        run_worlds(BROKEN_REST, core=core, check_steps=False)


def test_a_core_that_waits_for_the_broken_is_caught():
    """With a leader, but one that waits for everybody."""
    quorum = "if self.config.quorums.accept(flight.votes) is not Tally.WIN:"
    everybody = "if len(flight.votes) < len(self.config.voters):"
    core = load(paxos, "waits-for-everybody", ((quorum, everybody),))
    World(0, msgspec.structs.replace(BROKEN_REST, heal_all=True), core=core).run()
    with pytest.raises(Violation, match="the core commits nothing in"):
        run_worlds(BROKEN_REST, core=core)
