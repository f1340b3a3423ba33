"""The voter: one loop that alone owns the :class:`State` and does what ``paxos.step`` asks for.

A *turn* is synchronous and is run whenever something came: datagrams, a finished sync, clients'
requests, a tick.  It drains what came (within bounds), folds ``step`` over it, each step checked
by ``invariants.check_step`` before any of its effects leave, and then, in this order:

1. what needs no disk is sent at once;
2. fixed runs are applied, answered to the clients that wait, and published to the stream: by who
   does not lead and owes votes only in its next turn, first thing after those that are synced left;
3. records are handed to the journal's thread (by a leader before 2, if anything is fixed). Votes
   wait for the sync, while this loop goes on; a vote for oneself becomes an event of the turn that
   sees it done.

A linearizable read, or a lease renewal, is answered once a heartbeat round begun after its arrival
is acknowledged by an accept quorum, everything recovered by this leadership is fixed, and what was
fixed at its arrival is applied.

Nothing here decides anything of the protocol.  What must never be swallowed (a broken invariant, a
failed disk, a fenced journal, a newer feature level) ends the voter with :class:`VoterFailedError`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, TypeAlias

import anyio
import msgspec

from trex_core.access import REVOKED_KEY, nothing_named, revoked_serials, why_not_voter
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.invariants import InvariantViolation, check_step
from trex_core.machine import Machine, QueryFailed, TooOld
from trex_core.messages import (
    NO_BALLOT,
    VOTES,
    Accepted,
    Answer,
    Ballot,
    CatchUp,
    HandOverRequest,
    Kind,
    Outcome,
    PeerView,
    Query,
    Refusal,
    RefusalReason,
    Renew,
    SessionQuery,
    SnapshotNow,
    Status,
    StatusRequest,
    Submit,
    Transition,
    Value,
    VoterDigest,
    encode_value,
)
from trex_core.metadata.commands import LeaseExpire, encode_command, what_changes
from trex_core.metadata.state import MetadataMachine
from trex_core.paxos import CHASE_PATIENCE_TICKS, other_voters, room, step
from trex_core.quorum import Tally
from trex_core.roster import REPORTS_PER_S_MAX, Roster
from trex_core.seal import Signer
from trex_core.sessions import LEADER
from trex_core.snapshot import Snapshot
from trex_core.state import (
    Beat,
    Candidate,
    Config,
    DiskRoom,
    Event,
    FixedRecord,
    FixedRun,
    Install,
    Leader,
    Polling,
    Propose,
    Receive,
    Record,
    Role,
    Send,
    StartHandOver,
    State,
    Tick,
    first_state,
)
from trex_core.wire import encode_body
from voters.catchup import CatchUpClient
from voters.child import ArchiveChild, check_port
from voters.config import Setup, StartError, VoterFailedError, VoterPaths
from voters.credentials import Credentials
from voters.gateway import Client, Gateway, bytes_of
from voters.journal import Journal, JournalError, JournalFailedError, format_journal
from voters.leases import LeaseClock
from voters.logs import LOG, log
from voters.publisher import Publisher
from voters.replica import Capture, Replica
from voters.snapshots import Snapshots
from voters.transport import Transport

_NEVER_TICK: Final = 1 << 63
FIXED_HELD_TICKS: Final = CHASE_PATIENCE_TICKS
"""Longest that records of what is fixed are held back, so that the sync of a vote takes them along:
one of their own would be in the way of the next vote's. What is fixed is on disk at a majority
already, as accepted; a voter that crashes meanwhile hears of it again. But archives read of it in
the journal: it is to be there when a voter that missed it asks. Anything else waits a tick."""
DATAGRAMS_PER_TURN: Final = 512
"""Most datagrams of peers taken in one turn."""
REPAIRS_PER_TURN: Final = 16
"""Most datagrams of listeners looked at in one turn."""
REPORTS_PER_TURN: Final = 4
"""Most of them that may be reports: requests for repair go first."""
REPORTS_HEARD_PER_S: Final = 4 * REPORTS_PER_S_MAX
"""Most reports of listeners looked at in one second; what a flood brings beyond is dropped."""
READS_MAX: Final = 8192
"""Most reads and renewals waiting for a heartbeat round; further ones are refused as busy."""
READS_BYTES_MAX: Final = 16 << 20
"""The same in bytes of what they ask."""
ROUNDS_IN_FLIGHT_MAX: Final = 2
"""Most heartbeat rounds begun for reads and not yet acknowledged; later reads share the next."""
ANSWERS_S_PER_TURN: Final = 0.005
"""After so many seconds of one turn spent on requests, or on reads, the others wait for the next:
pages of megabytes asked for in a row must not stall the votes."""
ANSWERS_BYTES_PER_TURN: Final = 4 << 20
"""The same in bytes of replies: those of one turn are held at once."""
EXPIRIES_PER_TURN: Final = 64
"""Most leases proposed for expiry at once."""
ROOM_ACK_HEARTBEATS: Final = 4
"""A voter whose newest answer is older than this many heartbeats is not counted as having room."""
LEADER_TIP_MS: Final = 80
"""How often a leader multicasts its tip, in milliseconds (guaranteed: 100)."""
VOTER_TIP_MS: Final = 900
"""How often any other voter does (guaranteed: 1000)."""
CHANGE_TIP_MS: Final = 100
"""A voter whose role changed tells so at once, but not within this time of its tip before."""
TRANSITIONS_TOLD: Final = 8
"""So many newest changes of role are in each tip."""
WHY_CHARS_MAX: Final = 96
"""Longest reason told with one, in (ASCII) characters."""
COMMIT_SAMPLES: Final = 512
"""The newest proposals (each of one slot or more) of which commit times are told."""
QUIET_TICKS: Final = 2
"""When the stream falls quiet for this long the leader repeats its tip at once, so that a listener
notices soon that the last datagram was lost."""
PUMP_AGAIN_S: Final = 0.001
"""When a burst of the stream, or capped repairs, is continued."""
HAND_OVER_S: Final = 2.0
"""How long a stopping leader waits for its successor, in seconds."""
NO_QUORUM_TIMEOUTS: Final = 2
"""A voter that knows no leader for this many longest election timeouts says "no quorum" rather
than "not the leader"."""
CAPTURES_MAX: Final = 4
"""Most captured states waiting to be written as snapshots; the oldest are skipped."""
FENCED_FILE: Final = "FENCED"
"""In a voter's directory: why it must not run again."""
RECOVERY_PAUSE_S: Final = 0.05
"""While recovering, other tasks of the loop get their turn this often."""

Reply: TypeAlias = Callable[[bool, str], None]


def product_version() -> str:
    """The version of this distribution."""
    try:
        return version("trex-paxos")
    except PackageNotFoundError:
        return "unknown"


def _time_ms() -> int:
    return time.time_ns() // 1_000_000


class HaltedError(Exception):
    """The algorithm says that this voter must stop (``State.halted``); ``for_good`` unless its
    cluster file alone is wrong."""

    def __init__(self, why: str, for_good: bool) -> None:
        super().__init__(why)
        self.for_good = for_good


class _Read(msgspec.Struct):
    """A request that waits for a heartbeat round begun after ``after_beat`` and for ``applied``."""

    client: Client
    request: Query | SessionQuery | Renew
    after_beat: int
    applied: int


def role_name(state: State) -> str:
    """The role in one word, as in ``VoterDigest.role``."""
    return type(state.role).__name__.lower()


def _own_ballot(role: Role) -> Ballot:
    return role.ballot if isinstance(role, Leader | Candidate) else NO_BALLOT


class RoleChange(msgspec.Struct, frozen=True):
    """What an operator must know of a change of role, or of leader: ``ballot`` is the one stood or
    led under, or followed."""

    role: str
    was: str
    ballot: Ballot
    leader: int
    fixed: int
    why: str


def difference(before: State, after: State) -> RoleChange | None:
    """How the role or the leader changed from one state to another, and why; None if neither
    did."""
    role, was = after.role, before.role
    if role is was and after.leader is before.leader:
        return None
    same_role = type(role) is type(was) and _own_ballot(role) == _own_ballot(was)
    if same_role and after.leader == before.leader:
        return None
    match role:
        case Leader(ballot=ballot):
            why = "a quorum promised"
        case Candidate(ballot=ballot):
            why = "no other voter hears a leader"
        case Polling():
            ballot, why = after.promised, "no leader heard for an election timeout"
        case _:
            ballot = after.leader
            if isinstance(was, Leader) and after.promised <= was.ballot:
                why = "no accept quorum heard for an election timeout"
            elif isinstance(was, Leader | Candidate) and after.promised > was.ballot:
                why = f"ballot {after.promised} is higher"
            elif after.leader != NO_BALLOT:
                why = f"voter {after.leader.voter} leads"
            else:
                why = f"promised ballot {after.promised}"
    return RoleChange(
        role_name(after), role_name(before), ballot, after.leader.voter, after.fixed, why
    )


def percentiles_us(samples: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Median and 99th percentile of (value, weight); 0 of nothing."""
    ranked = sorted(samples)
    total = sum(weight for _, weight in ranked)
    found = [0, 0]
    for index, wanted in enumerate((total // 2, total * 99 // 100)):
        below = 0
        for value, weight in ranked:
            below += weight
            if below > wanted:
                found[index] = value
                break
    return found[0], found[1]


class Voter:
    """A running voter. Made by :func:`open_voter`; everything happens on its event loop."""

    def __init__(
        self,
        cluster: ClusterConfig,
        config: Config,
        state: State,
        journal: Journal,
        replica: Replica,
        snapshots: Snapshots,
        snapshot_slot: int,
        credentials: Credentials,
    ) -> None:
        self._credentials = credentials
        self._revoked = "[]"
        self.cluster: Final = cluster
        self.config: Final = config
        self.identity: Final = journal.identity
        self.state: State = state
        self.replica: Final = replica
        self.counters: dict[str, int] = {}
        self.failure: VoterFailedError | None = None
        self._on_failure: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._journal = journal
        self._snapshots = snapshots
        self._me = config.voter
        self._timing = cluster.timing
        self._tick_s = cluster.timing.tick_ms / 1000
        self._started_s = time.monotonic()
        self._version = product_version()
        # one turn
        self._running = False
        self._scheduled = False
        self._synced_ready = False
        self._tick_due = False
        self._events: deque[Event] = deque()
        self._records: list[Record] = []
        self._fixed: list[FixedRun] = []
        self._votes: list[Send] = []
        # across turns
        self._held: deque[tuple[int, list[Send]]] = deque()
        self._synced = 0
        self._due_tick = _NEVER_TICK
        self._pending: dict[int, tuple[Client, int, bytes]] = {}
        self._leading: Ballot = NO_BALLOT
        self._barrier = 0
        self._reads: deque[_Read] = deque()
        self._reads_bytes = 0
        self._leases: LeaseClock | None = None
        self._lease_round = 0
        self._lease_session = 0
        self._renewals: list[_Read] = []
        self._reconcile_ms = 0
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._handovers: list[Reply] = []
        self._handover_until = 0
        self._changes: list[RoleChange] = []
        self._transitions: deque[tuple[int, float, RoleChange]] = deque(maxlen=TRANSITIONS_TOLD)
        self._changed = 0
        self._leaderless_tick: int | None = state.tick
        self._installed: deque[Snapshot] = deque()
        self._captures: deque[tuple[Capture, list[Reply]]] = deque()
        self._snapshot_now: list[Reply] = []
        self._snapshot_slot = snapshot_slot
        self._snapshotting = False
        self._free_bytes = 0
        self._heard_s: dict[int, float] = {}
        self._tick_timer: asyncio.TimerHandle | None = None
        self._pump_timer: asyncio.TimerHandle | None = None
        self._next_tick_s = 0.0
        self._next_second_s = 0.0
        self._next_tip_s = 0.0
        self._last_tip_s = 0.0
        self._streamed_tick: int | None = None
        self._roster = Roster()
        self._reports_left = 0
        # the commit times of this leadership, and what is told of them until the next second
        self._proposed: deque[tuple[int, int, int]] = deque()
        self._commits_us: deque[tuple[int, int]] = deque(maxlen=COMMIT_SAMPLES)
        self._commit_figures_us = (0, 0)
        self._sync_figures_us = (0, 0)
        self._note(
            RoleChange(role_name(state), "", NO_BALLOT, 0, state.fixed, "started"), self._started_s
        )
        self._tasks: list[asyncio.Task[None]] = []

    # --- life -------------------------------------------------------------------------------

    async def bind(self) -> None:
        """Bind all ports. Raises ``StartError`` naming the port and its key."""
        stream = self.cluster.stream
        entry = self.cluster.voter(self._me)
        await check_port(entry)
        self._catchup = CatchUpClient(
            self.cluster,
            self.identity,
            self._credentials,
            self._snapshots,
            self.inject,
            self.install,
        )
        self._transport = await Transport.open(
            self.identity, self.cluster, self._credentials, self.count, self._schedule
        )
        self._publisher = Publisher(
            self._transport.publish,
            self.count,
            stream.repair_bytes_per_s_max,
            stream.burst_datagrams,
            Signer(self._credentials.keys.signing, self.identity.cluster_id, self._me),
            self._me,
        )
        self._publisher.reset(self.state.fixed, self.state.chain)
        # Of another machine's commands nobody here knows what they change.
        names = what_changes if isinstance(self.replica.machine, MetadataMachine) else nothing_named
        self._gateway = await Gateway.open(
            self.identity, entry, self._credentials, names, self.count, self._schedule
        )

    def start(self, archive: ArchiveChild, on_failure: Callable[[], None]) -> None:
        """Begin to take part. ``archive`` runs beside; ``on_failure`` is called if the voter must
        stop itself, with ``failure`` set."""
        self._on_failure = on_failure
        self._tasks.append(self._loop.create_task(archive.run()))
        self._archive = archive
        self._revoke()  # what is known already: nobody is heard for a second first
        self._loop.add_reader(self._journal.wakeup_fd, self._on_synced)
        self._tasks.append(self._loop.create_task(self._catchup.run()))
        self._running = True
        self._next_tick_s = self._loop.time()
        self._on_tick()

    async def aclose(self) -> None:
        """Stop: replies are flushed, the journal gets its stop record, all sockets are closed."""
        self._running = False
        for timer in (self._tick_timer, self._pump_timer):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_gateway"):
            self._gateway.flush()
            await self._gateway.aclose()
        if hasattr(self, "_transport"):
            await self._transport.aclose()
        self._loop.remove_reader(self._journal.wakeup_fd)
        try:
            if self.failure is None:
                self._journal.append(self._records)
                self._journal.submit(self.state)
            await asyncio.to_thread(self._journal.close)
        except JournalFailedError as error:
            if self.failure is None:
                self.failure = VoterFailedError(str(error))

    def _fail(self, why: str, error: BaseException | None = None) -> None:
        """End this voter: nothing more is sent, written, or answered."""
        if self.failure is not None:
            return
        self._running = False
        self.failure = VoterFailedError(why)
        self.failure.__cause__ = error
        log(logging.ERROR, "voter.run.failed", voter=self._me, why=why)
        for _, seen in self._watchers:
            if not seen.done():
                seen.set_exception(self.failure)
        if self._on_failure is not None:
            self._on_failure()

    def count(self, name: str) -> None:
        """Count one occurrence of a named thing (see ``Status.counters``)."""
        self.counters[name] = self.counters.get(name, 0) + 1

    # --- what wakes the loop ----------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.turn)

    def _on_synced(self) -> None:
        self._synced_ready = True
        self._schedule()

    def _on_tick(self) -> None:
        now = self._loop.time()
        self._next_tick_s += self._tick_s
        if self._next_tick_s <= now:  # time that was slept through does not count
            self._next_tick_s = now + self._tick_s
            self.count("loop.late_tick")
        self._tick_timer = self._loop.call_at(self._next_tick_s, self._on_tick)
        self._tick_due = True
        self._schedule()

    def inject(self, event: Event) -> None:
        """Hand in an event from a task of this loop."""
        self._events.append(event)
        self._schedule()

    def install(self, snapshot: Snapshot) -> None:
        """Hand in a snapshot that is durable on disk and verified."""
        self._installed.append(snapshot)
        self._schedule()

    # --- the turn ---------------------------------------------------------------------------

    def turn(self) -> None:
        """Drain, fold, act. Ends the voter when something must not be survived."""
        self._scheduled = False
        if not self._running:
            return
        try:
            self._turn()
        except InvariantViolation as error:
            self._fail(f"a rule of the protocol was broken: {error}", error)
        except (JournalFailedError, TooOld, HaltedError) as error:
            self._fail(str(error), error)
        except Exception as error:  # noqa: BLE001 - a state nobody foresaw must not go on
            LOG.exception("voter.turn.raised")
            self._fail(f"unexpected {type(error).__name__}: {error}", error)

    def _turn(self) -> None:
        now_s = self._loop.time()
        if self._synced_ready:
            self._synced_ready = False
            self._release(self._journal.completed())
        self._apply()  # what the last turn put off
        for event in self._transport.drain(DATAGRAMS_PER_TURN):
            self._heard_s[event.sender] = now_s
            self._events.append(event)
        if self._tick_due:
            self._tick_due = False
            self._events.append(Tick())
        self._fold_all()
        if self._installed:
            self._install_all()
        self._note_leadership()
        if self._gateway.others:
            self._take_requests()
        if self._reads:
            self._begin_round()
        self._propose(now_s)
        if self._fixed and self._leading != NO_BALLOT:
            # To apply it, to answer and to tell of it takes a leader longer: sync meanwhile.
            self._write()
        if not self._votes:  # a follower's are waited for: it applies at its next turn
            self._apply()
        self._note_leadership()
        if self._reads or self._renewals:
            self._answer_reads()
        if self._handovers:
            self._answer_handovers()
        if self._captures or self._snapshot_now:
            self._start_snapshot()
        self._gateway.flush()  # who waits is answered before the stream is fed
        if self._changes:
            self._report()
        self._publish(now_s)
        # Else last: the sync thread wakes when this loop is about to wait, and lets go of the GIL.
        self._write()
        if now_s >= self._next_second_s:
            self._next_second_s = now_s + 1.0
            self._each_second()
        if self._watchers:
            self._tell_watchers()
        if self._events:
            self._schedule()

    async def until(self, holds: Callable[[], bool], deadline_s: float) -> None:
        """Wait until ``holds()``, which is asked now and after each turn. Raises ``TimeoutError``
        at the deadline, or the failure of this voter if it ends meanwhile."""
        if self.failure is not None:
            raise self.failure
        if holds():
            return
        seen: asyncio.Future[None] = self._loop.create_future()
        self._watchers.append((holds, seen))
        async with asyncio.timeout(deadline_s):
            await seen

    def _tell_watchers(self) -> None:
        waiting, self._watchers = self._watchers, []
        for holds, seen in waiting:
            if not seen.done():
                if holds():
                    seen.set_result(None)
                else:
                    self._watchers.append((holds, seen))

    def _fold_all(self) -> None:
        while self._events:
            self._fold(self._events.popleft())

    def _fold(self, event: Event) -> None:
        before = self.state
        after, effects = step(self.config, before, event)
        check_step(self.config, before, event, after, effects)
        if after.halted:
            raise HaltedError(
                after.halted, after.genesis is None or after.genesis.voters == self.config.voters
            )
        self.state = after
        if after.role is not before.role or after.leader is not before.leader:
            changed = difference(before, after)
            if changed is not None:
                self._changes.append(changed)
        if effects.records:
            self._records.extend(effects.records)
        if effects.fixed:
            self._fixed.extend(effects.fixed)
        for send in effects.sends:
            message = send.message
            if isinstance(message, VOTES):
                self._hold(send)
            elif isinstance(message, CatchUp):
                self._catchup.ask(send.to, message.first)
            elif send.to == self._me:
                self._events.append(self._to_myself(send))
            else:
                self._transport.send(send.to, message)

    def _to_myself(self, send: Send) -> Receive:
        return Receive(self._me, self.identity.incarnation, self.identity.boot, send.message)

    def _hold(self, send: Send) -> None:
        """Keep a vote until its records are synced. Votes for adjacent runs become one."""
        message = send.message
        if self._votes and isinstance(message, Accepted):
            last = self._votes[-1]
            held = last.message
            if (
                last.to == send.to
                and isinstance(held, Accepted)
                and held.ballot == message.ballot
                and held.last + 1 == message.first
            ):
                merged = Accepted(held.ballot, held.first, message.last)
                self._votes[-1] = Send(send.to, merged)
                return
        self._votes.append(send)

    def _write(self) -> None:
        """Hand records to the journal if a vote waits for them, or if they are due."""
        if self._records:
            self._journal.append(self._records)
            if not self._votes:
                patient = all(isinstance(each, FixedRecord) for each in self._records)
                due = self.state.tick + (FIXED_HELD_TICKS if patient else 1)
                self._due_tick = min(self._due_tick, due)
            self._records = []
        if not self._votes and self.state.tick < self._due_tick:
            return
        batch = self._journal.submit(self.state)
        self._due_tick = _NEVER_TICK
        if self._votes:
            self._held.append((batch, self._votes))
            self._votes = []
            if batch <= self._synced:
                self._release(self._synced)

    def _release(self, synced: int) -> None:
        """All batches up to ``synced`` are on disk: their votes may leave."""
        self._synced = synced
        while self._held and self._held[0][0] <= synced:
            for send in self._held.popleft()[1]:
                if send.to == self._me:
                    self._events.append(self._to_myself(send))
                else:
                    self._transport.send(send.to, send.message)

    # --- what is fixed ----------------------------------------------------------------------

    def _apply(self) -> None:
        """Apply what was fixed, answer who waits for it, hand it to the publisher."""
        if not self._fixed:
            return
        runs, self._fixed = self._fixed, []
        pending = self._pending
        every = self.cluster.journal.snapshot_slots
        leading = isinstance(self.state.role, Leader)
        ballot = self.state.role.ballot if isinstance(self.state.role, Leader) else NO_BALLOT
        for run in runs:
            for slot, value, delivered in self.replica.apply(run):
                if pending and (waiting := pending.pop(slot, None)) is not None:
                    client, request_id, mine = waiting
                    if delivered is not None and mine == value:
                        client.reply(
                            Outcome(request_id, delivered.slot, delivered.status, delivered.body)
                        )
                    else:
                        self._refuse(client, request_id, RefusalReason.LEADERSHIP_LOST)
                if slot % every == 0 and self.state.genesis is not None:
                    self._captures.append((self.replica.capture(self.state.genesis), []))
            self._publisher.fixed(run, ballot, leading)
        if leading:
            self._streamed_tick = self.state.tick
        proposed, fixed = self._proposed, self.state.fixed
        if proposed and proposed[0][0] <= fixed:
            now_ns = time.perf_counter_ns()
            while proposed and proposed[0][0] <= fixed:
                _, slots, at_ns = proposed.popleft()
                self._commits_us.append(((now_ns - at_ns) // 1000, slots))

    def _install_all(self) -> None:
        """Replace the applied state by a downloaded snapshot, if it is still ahead."""
        self._apply()
        while self._installed:
            snapshot = self._installed.popleft()
            overtaken = snapshot.slot <= self.state.fixed
            self._fold(Install(snapshot.slot, snapshot.chain, snapshot.genesis))
            if overtaken:
                continue
            self.replica.restore(snapshot)
            self._publisher.reset(snapshot.slot, snapshot.chain)
            self._snapshot_slot = max(self._snapshot_slot, snapshot.slot)
            log(logging.INFO, "voter.snapshot.installed", voter=self._me, slot=snapshot.slot)
            self._fold_all()

    # --- leadership -------------------------------------------------------------------------

    def _note_leadership(self) -> None:
        role = self.state.role
        ballot = role.ballot if isinstance(role, Leader) else NO_BALLOT
        if ballot == self._leading:
            return
        if self._leading != NO_BALLOT:
            self._apply()
            for client, request_id, _ in self._pending.values():
                self._refuse(client, request_id, RefusalReason.LEADERSHIP_LOST)
            self._pending.clear()
            for read in (*self._renewals, *self._reads):
                self._refuse(read.client, read.request.id, RefusalReason.NOT_LEADER)
            self._renewals.clear()
            self._reads.clear()
            self._reads_bytes = 0
            self._leases = None
            self._lease_round = 0
            self._lease_session = 0
            self._proposed.clear()
            self._commits_us.clear()
            self._commit_figures_us = (0, 0)
        self._leading = ballot
        if isinstance(role, Leader):
            # What this leadership recovered must be fixed before it may answer a read.
            self._barrier = role.next_slot - 1

    def _refuse(self, client: Client, request_id: int, reason: int, detail: str = "") -> None:
        leader = self.state.leader.voter
        if not detail and leader and leader != self._me:
            entry = self.cluster.voter(leader)
            detail = f"{entry.host}:{entry.client_port}"
        client.reply(Refusal(request_id, reason, leader, detail))

    def _propose(self, now_s: float) -> None:
        """Propose what clients submitted, and the expiry of leases, as the window allows."""
        role = self.state.role
        gateway = self._gateway
        if not isinstance(role, Leader):
            if gateway.submits:
                patience = NO_QUORUM_TIMEOUTS * self.config.election_ticks_max
                lost = self._leaderless_tick
                if lost is not None and self.state.tick - lost > patience:
                    self._refuse_submits(
                        RefusalReason.NO_QUORUM, "too few voters hear each other to elect a leader"
                    )
                else:
                    self._refuse_submits(RefusalReason.NOT_LEADER)
            return
        role = self._open_lease_session(role)
        expired = self._expired_leases(role, now_s)
        if not gateway.submits and not expired:
            return
        slots, size = room(self.state)
        if not self._quorum_has_room(role):
            self._refuse_submits(RefusalReason.DISK_FULL, "too few voters have room on their disks")
            slots = 0
        if slots == 0:
            if expired and self._leases is not None:
                self._leases.give_up(expired)
            return
        values: list[bytes] = []
        waiting: list[tuple[Client, int]] = []
        time_ms = _time_ms()
        expired_now = expired[:slots]
        for lease in expired_now:
            command = encode_command(LeaseExpire(lease))
            value = Value(Kind.ENGINE, role.ballot, time_ms, self._lease_session, command=command)
            values.append(encode_value(value))
        for client, submit in gateway.take_submits(slots - len(values), size):
            if not client.open:
                continue  # never proposed: who asked is gone, and will ask again elsewhere
            if submit.kind not in (Kind.COMMAND, Kind.SKIP, Kind.OPEN, Kind.CLOSE):
                detail = f"kind {submit.kind} cannot be submitted"
                self._refuse(client, submit.id, RefusalReason.MALFORMED, detail)
                continue
            owner = client.holder.grant.name.encode()
            if submit.kind != Kind.OPEN:
                # An OPEN that is under way is nobody's yet; one that is not proposed expires.
                if self.replica.applied < submit.session < role.next_slot + len(values):
                    detail = f"slot {submit.session}, which would open it, is not applied here yet"
                    self._refuse(client, submit.id, RefusalReason.BUSY, detail)
                    continue
                if why := self.replica.why_not_owner(submit.session, owner):
                    self._refuse(client, submit.id, RefusalReason.UNAUTHORIZED, why)
                    continue
            if submit.kind == Kind.COMMAND and (
                detail := self.replica.why_inadmissible(submit.command)
            ):
                self._refuse(client, submit.id, RefusalReason.MALFORMED, detail)
                continue
            value = Value(
                submit.kind,
                role.ballot,
                time_ms,
                submit.session,
                submit.sequence,
                submit.unanswered,
                owner if submit.kind == Kind.OPEN else submit.command,
            )
            values.append(encode_value(value))
            waiting.append((client, submit.id))
        if not values:
            return
        proposed_ns = time.perf_counter_ns()
        self._fold(Propose(tuple(values)))
        after = self.state.role
        assert isinstance(after, Leader)
        assert after.next_slot == role.next_slot + len(values), "a leader with room proposes"
        self._proposed.append((after.next_slot - 1, len(values), proposed_ns))
        first = after.next_slot - len(waiting)
        for slot, (client, request_id) in enumerate(waiting, first):
            self._pending[slot] = (client, request_id, values[slot - role.next_slot])
        if expired_now != expired and self._leases is not None:
            self._leases.give_up(expired[len(expired_now) :])

    def _refuse_submits(self, reason: int, detail: str = "") -> None:
        for client, submit in self._gateway.take_all_submits():
            self._refuse(client, submit.id, reason, detail)

    def _quorum_has_room(self, role: Leader) -> bool:
        if self.state.has_room and all(ack.has_room for ack in role.acks):
            return True
        fresh = self.state.tick - ROOM_ACK_HEARTBEATS * self.config.heartbeat_ticks
        yes = [ack.voter for ack in role.acks if ack.has_room and ack.tick >= fresh]
        if self.state.has_room:
            yes.append(self._me)
        return self.config.quorums.accept(yes) is Tally.WIN

    # --- reads and leases -------------------------------------------------------------------

    def _take_requests(self) -> None:
        others = self._gateway.others
        enough = self._enough_answered()
        while others:
            client, request = others.take()
            if not client.open:
                continue
            match request:
                case StatusRequest():
                    client.reply(self.status(request.id))
                case Query(linearizable=False):
                    self._answer_query(client, request)
                case Query() | SessionQuery() | Renew():
                    self._take_read(client, request)
                case HandOverRequest():
                    self._take_hand_over(client, request)
                case SnapshotNow():
                    self._snapshot_now.append(self._answering(client, request.id))
                case Submit():
                    raise AssertionError("commands have their own queue")
            if enough():
                self._schedule()
                return

    def _enough_answered(self) -> Callable[[], bool]:
        """Asked after each answer: whether those since now were enough for one turn."""
        until_s = time.monotonic() + ANSWERS_S_PER_TURN
        bytes_max = self._gateway.reply_bytes + ANSWERS_BYTES_PER_TURN
        return lambda: time.monotonic() >= until_s or self._gateway.reply_bytes >= bytes_max

    def _take_read(self, client: Client, request: Query | SessionQuery | Renew) -> None:
        role = self.state.role
        if not isinstance(role, Leader):
            self._refuse(client, request.id, RefusalReason.NOT_LEADER)
            return
        size = bytes_of(request)
        waiting = len(self._reads) + len(self._renewals)
        if waiting >= READS_MAX or self._reads_bytes + size > READS_BYTES_MAX:
            self._refuse(client, request.id, RefusalReason.BUSY, "too many reads wait here")
            return
        if isinstance(request, Renew):
            if self.replica.lease_times_ms() is None:
                self._refuse(
                    client, request.id, RefusalReason.MALFORMED, "this machine has no leases"
                )
                return
            self._renew(request)
        self._reads.append(_Read(client, request, role.beat, max(self.state.fixed, self._barrier)))
        self._reads_bytes += size

    def _renew(self, request: Renew) -> tuple[int, ...]:
        """Give leases their full time; those that are alive. At a renewal's arrival, and again when
        it is answered: meanwhile what was recovered of an earlier leader may have granted or ended
        some. A new leader gives all their full time once its clock starts, later than this."""
        times_ms = self.replica.lease_times_ms() or {}
        if self._leases is None:
            return tuple(lease for lease in dict.fromkeys(request.leases) if lease in times_ms)
        return self._leases.renew(request.leases, times_ms, int(self._loop.time() * 1000))

    def _begin_round(self) -> None:
        """Start a heartbeat round if some read came after the newest one began."""
        role = self.state.role
        if (
            isinstance(role, Leader)
            and self._reads[-1].after_beat == role.beat
            and role.beat - role.beat_acked < ROUNDS_IN_FLIGHT_MAX
        ):
            self._fold(Beat())
            self._fold_all()

    def _answer_reads(self) -> None:
        role = self.state.role
        if not isinstance(role, Leader):
            return
        enough = self._enough_answered()
        counts = self._leases is not None or not self.replica.lease_times_ms()
        if counts:  # those that waited for that came first
            self._reads.extendleft(reversed(self._renewals))
            self._renewals.clear()
        while self._reads:
            read = self._reads[0]
            if role.beat_acked <= read.after_beat or self.replica.applied < read.applied:
                return
            self._reads.popleft()
            if isinstance(read.request, Renew) and not counts:
                self._renewals.append(read)
                continue
            self._reads_bytes -= bytes_of(read.request)
            if not read.client.open:
                continue
            match read.request:
                case Query():
                    self._answer_query(read.client, read.request)
                case SessionQuery(id=request_id, session=session):
                    owner = read.client.holder.grant.name.encode()
                    if why := self.replica.why_not_owner(session, owner):
                        self._refuse(read.client, request_id, RefusalReason.UNAUTHORIZED, why)
                        continue
                    body = self.replica.next_sequence(session)
                    read.client.reply(Answer(request_id, self.replica.applied, body))
                case Renew(id=request_id):
                    body = encode_body(self._renew(read.request))
                    read.client.reply(Answer(request_id, self.replica.applied, body))
            if enough():
                self._schedule()
                return

    def _answer_query(self, client: Client, request: Query) -> None:
        try:
            body = self.replica.query(request.query)
        except QueryFailed as error:
            detail = f"the state machine raised {error}"
            self._refuse(client, request.id, RefusalReason.MALFORMED, detail)
            return
        client.reply(Answer(request.id, self.replica.applied, body))

    def _open_lease_session(self, role: Leader) -> Leader:
        """Once for each leadership, before it counts or renews leases: to open the leader's session
        ends that of the one before, whose expiries may still lie unfixed with a voter that took no
        part in this election. The next may recover them, after this one renewed the lease."""
        if (
            self._leases is not None
            or self._lease_session >= role.counted  # under way; what was learned is another's
            or self.replica.applied < self._barrier
            or not self.replica.lease_times_ms()
            or room(self.state)[0] == 0
            or not self._quorum_has_room(role)
        ):
            return role
        self._lease_session = role.next_slot
        value = Value(Kind.OPEN, role.ballot, _time_ms(), command=LEADER)
        self._fold(Propose((encode_value(value),)))
        after = self.state.role
        assert isinstance(after, Leader)
        assert after.next_slot > self._lease_session, "a leader with room proposes"
        return after

    def _expired_leases(self, role: Leader, now_s: float) -> tuple[int, ...]:
        """Advance the lease clock; the leases that are to be expired now."""
        if role.beat_acked == self._lease_round:
            return ()
        if self._leases is None and not (
            role.counted <= self._lease_session <= self.replica.applied
        ):
            return ()
        times_ms = self.replica.lease_times_ms()
        if times_ms is None:
            return ()
        now_ms = int(now_s * 1000)
        heartbeat_ms = self._timing.heartbeat_ticks * self._timing.tick_ms
        if self._leases is None:
            self._leases = LeaseClock(heartbeat_ms, times_ms, now_ms)
            self._reconcile_ms = now_ms
        elif now_ms - self._reconcile_ms >= heartbeat_ms:  # later is longer, hence safe
            self._leases.reconcile(times_ms, now_ms)
            self._reconcile_ms = now_ms
        self._lease_round = role.beat_acked
        self._leases.advance(now_ms, role.beat_acked)
        return self._leases.expire(EXPIRIES_PER_TURN)

    # --- administration ---------------------------------------------------------------------

    def _answering(self, client: Client, request_id: int) -> Reply:
        def reply(done: bool, detail: str) -> None:
            if done:
                body = encode_body(detail)
                client.reply(Answer(request_id, self.replica.applied, body))
            else:
                self._refuse(client, request_id, RefusalReason.MALFORMED, detail)

        return reply

    def _take_hand_over(self, client: Client, request: HandOverRequest) -> None:
        if not isinstance(self.state.role, Leader):
            self._refuse(client, request.id, RefusalReason.NOT_LEADER)
            return
        if request.to and (request.to == self._me or request.to not in self.config.voters):
            detail = f"voter {request.to} cannot take over from voter {self._me}"
            self._refuse(client, request.id, RefusalReason.MALFORMED, detail)
            return
        self._start_hand_over(request.to, self._answering(client, request.id))

    def _start_hand_over(self, to: int, reply: Reply) -> None:
        self._fold(StartHandOver(to))
        self._fold_all()
        self._handover_until = self.state.tick + 2 * self.config.election_ticks_max
        self._handovers.append(reply)

    def _answer_handovers(self) -> None:
        role = self.state.role
        if isinstance(role, Leader) and role.handover is not None:
            return
        gone = not isinstance(role, Leader)
        if gone and self.state.leader == NO_BALLOT and self.state.tick < self._handover_until:
            return  # somebody is standing: tell who leads, once that is known
        waiting, self._handovers = self._handovers, []
        leader = self.state.leader.voter
        for reply in waiting:
            if gone:
                reply(True, str(leader))
            else:
                reply(False, "no other voter took over within an election timeout")

    async def hand_over(self, deadline_s: float = HAND_OVER_S) -> bool:
        """Hand leadership to the most up to date voter. True when this voter does not lead any
        more, or never did; False when nobody took over in time."""
        if not self._running or not isinstance(self.state.role, Leader):
            return True
        if len(self.config.voters) == 1:
            return False
        answered: asyncio.Future[bool] = self._loop.create_future()

        def reply(done: bool, _detail: str) -> None:
            if not answered.done():
                answered.set_result(done)

        self._start_hand_over(0, reply)
        self._schedule()
        try:
            async with asyncio.timeout(deadline_s):
                return await answered
        except TimeoutError:
            return False

    def _start_snapshot(self) -> None:
        """Write the oldest captured state in a thread; one at a time."""
        if self._snapshot_now:
            waiting, self._snapshot_now = self._snapshot_now, []
            self._apply()  # of all that is fixed, what was put off for votes too
            genesis = self.state.genesis
            if genesis is None:
                for reply in waiting:
                    reply(False, "nothing is fixed yet")
            elif self.replica.applied == self._snapshot_slot:
                for reply in waiting:
                    reply(True, str(self._snapshot_slot))
            elif self._captures and self._captures[-1][0].slot == self.replica.applied:
                self._captures[-1][1].extend(waiting)
            else:
                self._captures.append((self.replica.capture(genesis), waiting))
        while len(self._captures) > CAPTURES_MAX and not self._captures[0][1]:
            self._captures.popleft()
            self.count("snapshot.skipped")
        if self._captures and not self._snapshotting:
            self._snapshotting = True
            self._tasks.append(self._loop.create_task(self._write_snapshot()))

    async def _write_snapshot(self) -> None:
        try:
            while self._captures:
                capture, waiting = self._captures.popleft()
                started_s = time.monotonic()
                try:
                    oldest = await asyncio.to_thread(self._save, capture)
                except OSError as error:  # nothing is left of it; the log goes on until the next
                    self.count("snapshot.failed")
                    log(
                        logging.ERROR,
                        "voter.snapshot.failed",
                        voter=self._me,
                        slot=capture.slot,
                        why=str(error),
                    )
                    for reply in waiting:
                        reply(False, f"the snapshot could not be written: {error}")
                    self._schedule()
                    continue
                self._snapshot_slot = max(self._snapshot_slot, capture.slot)
                if oldest:
                    self._journal.delete_below(oldest)
                took_ms = int((time.monotonic() - started_s) * 1000)
                log(
                    logging.INFO,
                    "voter.snapshot.written",
                    voter=self._me,
                    slot=capture.slot,
                    took_ms=took_ms,
                )
                for reply in waiting:
                    reply(True, str(capture.slot))
                self._schedule()
        finally:
            self._snapshotting = False

    def _save(self, capture: Capture) -> int:
        """Make a snapshot durable; the slot of the oldest one kept. Runs in a thread."""
        self._snapshots.save(capture.slot, capture.encode())
        return self._snapshots.keep(self.cluster.journal.snapshots_kept)

    # --- the stream -------------------------------------------------------------------------

    def _publish(self, now_s: float) -> None:
        publisher = self._publisher
        if self._transport.repairs_ready:
            self._hear_listeners(now_s)
        if publisher.waiting and publisher.pump(now_s) and self._pump_timer is None:
            self._pump_timer = self._loop.call_later(PUMP_AGAIN_S, self._pump_again)
        state = self.state
        silent = self._streamed_tick is not None and state.tick - self._streamed_tick >= QUIET_TICKS
        if now_s >= self._next_tip_s or publisher.announce or silent:
            self._streamed_tick = None
            leading = isinstance(state.role, Leader)
            self._last_tip_s = now_s
            self._next_tip_s = now_s + (LEADER_TIP_MS if leading else VOTER_TIP_MS) / 1000
            now_ms = int(now_s * 1000)
            publisher.tip(
                state.leader,
                leading,
                self._digest(now_s),
                lambda bytes_max: self._roster.digest(now_ms, bytes_max),
            )

    def _hear_listeners(self, now_s: float) -> None:
        """Note what they want repaired, and what they report."""
        others = isinstance(self.state.role, Leader) and len(self.config.voters) > 1
        requests, reports = self._transport.drain_repairs(
            REPAIRS_PER_TURN, min(REPORTS_PER_TURN, self._reports_left)
        )
        for request in requests:
            if others:  # a leader has better things to do; the asker names another next
                self.count("repair.left_to_others")
            else:
                self._publisher.request(request)
        self._reports_left -= len(reports)
        for report in reports:
            if not self._roster.heard(report, int(now_s * 1000)):
                self.count("report.listeners_max")

    def _pump_again(self) -> None:
        self._pump_timer = None
        self._schedule()

    def _digest(self, now_s: float) -> VoterDigest:
        state, journal, role = self.state, self._journal, self.state.role
        sync_us, commit_us = self._sync_figures_us, self._commit_figures_us
        since_s = time.monotonic()
        return VoterDigest(
            role=role_name(state),
            promised=state.promised,
            last_accepted=state.last_accepted,
            fixed=state.fixed,
            applied=self.replica.applied,
            journal_bytes=journal.size_bytes,
            free_bytes=self._free_bytes,
            fsync_us=journal.last_sync_us,
            version=self._version,
            boot=self.identity.boot,
            uptime_s=int(since_s - self._started_s),
            time_ms=_time_ms(),
            proposed=role.next_slot - 1 if isinstance(role, Leader) else 0,
            quorum_age_ms=self._quorum_age_ms() if state.leader != NO_BALLOT else -1,
            has_room=state.has_room,
            snapshot_slot=self._snapshot_slot,
            fsync_p50_us=sync_us[0],
            fsync_p99_us=sync_us[1],
            commit_p50_us=commit_us[0],
            commit_p99_us=commit_us[1],
            heard_ms=tuple(
                0 if voter == self._me else self._heard_ms(voter, now_s)
                for voter in self.config.voters
            ),
            transitions=tuple(
                Transition(
                    number,
                    int((since_s - at_s) * 1000),
                    change.role,
                    change.ballot,
                    change.leader,
                    change.fixed,
                    change.why[:WHY_CHARS_MAX],
                )
                for number, at_s, change in self._transitions
            ),
        )

    def _heard_ms(self, voter: int, now_s: float) -> int:
        """How long ago another voter was heard, in milliseconds; -1: never."""
        heard_s = self._heard_s.get(voter)
        return -1 if heard_s is None else int((now_s - heard_s) * 1000)

    def _quorum_age_ms(self) -> int:
        """How long ago a leader had the answer of an accept quorum, and any other voter the word
        of a leader that had."""
        role = self.state.role
        heard_tick = role.quorum_tick if isinstance(role, Leader) else self.state.heard_tick
        return (self.state.tick - heard_tick) * self._timing.tick_ms

    # --- now and then -----------------------------------------------------------------------

    def _each_second(self) -> None:
        try:
            if self._credentials.refresh():
                log(logging.INFO, "voter.credentials.read", voter=self._me)
        except ConfigError as error:
            log(logging.ERROR, "voter.credentials.refused", voter=self._me, why=str(error))
        self._transport.use(self._credentials.keys)
        self._revoke()
        self._transport.sweep()
        self._gateway.sweep()
        self._free_bytes = self._journal.free_bytes()
        has_room = self._free_bytes >= self.cluster.journal.free_bytes_min
        if has_room != self.state.has_room:
            self._events.append(DiskRoom(has_room))
            log(
                logging.INFO if has_room else logging.ERROR,
                "voter.disk.has_room" if has_room else "voter.disk.full",
                voter=self._me,
                free_bytes=self._free_bytes,
                free_bytes_min=self.cluster.journal.free_bytes_min,
            )
        self._tasks = [task for task in self._tasks if not task.done()]
        self._reports_left = REPORTS_HEARD_PER_S
        self._sync_figures_us = self._journal.sync_percentiles_us()
        self._commit_figures_us = percentiles_us(self._commits_us)

    def _revoke(self) -> None:
        """Turn away who holds a certificate that the replicated list says is no longer good."""
        machine = self.replica.machine
        entry = (
            machine.state.config.get(REVOKED_KEY) if isinstance(machine, MetadataMachine) else None
        )
        text = "[]" if entry is None else entry.value
        if text == self._revoked:
            return
        self._revoked = text
        try:
            serials = revoked_serials(text)
        except ConfigError as error:
            log(logging.ERROR, "voter.revocation.unreadable", voter=self._me, why=str(error))
            return  # what was revoked stays so
        for each in (self._gateway, self._transport, self._archive, self._catchup):
            each.revoke(serials)
        log(logging.INFO, "voter.revocation.read", voter=self._me, certificates=len(serials))

    def _report(self) -> None:
        """Log the changes of role since the last turn, and let the stream tell them soon."""
        at_s = time.monotonic()
        for change in self._changes:
            self._note(change, at_s)
            log(
                logging.INFO,
                "voter.role.changed",
                voter=self._me,
                role=change.role,
                was=change.was,
                ballot=str(change.ballot),
                leader=change.leader,
                fixed=change.fixed,
                why=change.why,
            )
        self._changes.clear()
        self._next_tip_s = min(self._next_tip_s, self._last_tip_s + CHANGE_TIP_MS / 1000)
        if self.state.leader != NO_BALLOT:
            self._leaderless_tick = None
        elif self._leaderless_tick is None:
            self._leaderless_tick = self.state.tick

    def _note(self, change: RoleChange, at_s: float) -> None:
        self._changed += 1
        self._transitions.append((self._changed, at_s, change))

    def status(self, request_id: int = 0) -> Status:
        """What this voter thinks, for ``trex status``."""
        state, journal, role = self.state, self._journal, self.state.role
        now_s = self._loop.time()
        acks = {ack.voter: ack for ack in role.acks} if isinstance(role, Leader) else {}
        boots = dict(state.boots)
        p50, p99 = journal.sync_percentiles_us()
        peers = []
        for voter in self.config.voters:
            if voter == self._me:
                continue
            ack = acks.get(voter)
            peers.append(
                PeerView(
                    voter,
                    self._heard_ms(voter, now_s),
                    ack.fixed if ack else 0,
                    ack.last_accepted if ack else 0,
                    boots.get(voter, 0),
                )
            )
        return Status(
            id=request_id,
            voter=self._me,
            role=role_name(state),
            leader=state.leader.voter,
            ballot=role.ballot if isinstance(role, Leader | Candidate) else state.leader,
            promised=state.promised,
            first_slot=role.first if isinstance(role, Leader | Candidate) else 0,
            last_accepted=state.last_accepted,
            fixed=state.fixed,
            applied=self.replica.applied,
            chain=state.chain,
            boot=self.identity.boot,
            incarnation=self.identity.incarnation,
            journal_bytes=journal.size_bytes,
            segments=journal.segments,
            snapshot_slot=self._snapshot_slot,
            free_bytes=self._free_bytes,
            fsync_p50_us=p50,
            fsync_p99_us=p99,
            quorum_age_ms=self._quorum_age_ms(),
            counters=dict(sorted(self.counters.items())),
            peers=tuple(peers),
            version=self._version,
            uptime_s=int(time.monotonic() - self._started_s),
            time_ms=_time_ms(),
            certificate_until_s=self._credentials.holder.not_after_s,
        )


# --- starting -------------------------------------------------------------------------------


async def recover(
    journal: Journal, snapshots: Snapshots, machine: Machine, cluster_id: bytes
) -> tuple[State, Replica, int]:
    """Newest intact snapshot, then the journal: the state as it was, the applied replica, and the
    slot of that snapshot (0: none). Raises :class:`JournalError`, or what the machine raises."""
    state = first_state(cluster_id)
    replica = Replica(machine, state.chain)
    snapshot, damaged = snapshots.newest()
    for text in damaged:
        log(logging.ERROR, "voter.snapshot.damaged", why=text)
    if snapshot is not None:
        replica.restore(snapshot)
        state = msgspec.structs.replace(
            state, fixed=snapshot.slot, chain=snapshot.chain, genesis=snapshot.genesis
        )
    pause_s = time.monotonic() + RECOVERY_PAUSE_S
    for recovered, runs in journal.replay(state):
        state = recovered
        for run in runs:
            for _ in replica.apply(run):
                pass
        if time.monotonic() >= pause_s:
            await asyncio.sleep(0)
            pause_s = time.monotonic() + RECOVERY_PAUSE_S
    return state, replica, snapshot.slot if snapshot is not None else 0


def directories(directory: Path, journal_directory: Path | None = None) -> VoterPaths:
    """Where a voter with the data directory ``directory`` keeps its files."""
    return VoterPaths(
        directory, journal_directory or directory / "journal", directory / "snapshots"
    )


def format_voter(
    cluster: ClusterConfig,
    voter_id: int,
    directory: Path,
    *,
    journal_directory: Path | None = None,
) -> int:
    """Make the first journal of a new voter; returns its incarnation. Once in a voter's life.
    Raises ``JournalError`` if there is a journal, and ``ConfigError`` for an unknown voter."""
    cluster.voter(voter_id)
    paths = directories(directory, journal_directory)
    return format_journal(paths.journal, cluster.cluster_id_bytes, voter_id)


def fence(directory: Path, why: str) -> None:
    """Leave a mark that this voter must not run again: it was told that its journal is not the
    one the cluster knows. Without it a rolled-back voter would get in by starting often enough,
    since each start raises its boot number."""
    try:
        with (directory / FENCED_FILE).open("w") as file:
            file.write(why + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log(logging.ERROR, "voter.fence.failed", why=str(error))


def refuse_fenced(directory: Path) -> None:
    """Raises :class:`JournalError` when :func:`fence` was called here before."""
    mark = directory / FENCED_FILE
    if mark.exists():
        why = mark.read_text(errors="replace").strip()
        raise JournalError(
            mark,
            f"this voter was told to stop for good: {why}. Replacing its disk is a "
            "reconfiguration; restore the newest journal if it still exists elsewhere, and only "
            "then remove this file",
        )


@asynccontextmanager
async def open_voter(
    cluster: ClusterConfig,
    voter_id: int,
    directory: Path,
    machine: Machine | None = None,
    *,
    credentials: Path,
    journal_directory: Path | None = None,
) -> AsyncIterator[Voter]:
    """Run voter ``voter_id`` of ``cluster`` in ``directory`` while the context is open.

    ``machine`` is the deterministic state machine to replicate (see ``trex_core.machine``); the
    metadata service unless given.  The journal must have been made by :func:`format_voter` and is
    in ``directory/journal`` unless ``journal_directory`` says otherwise.  ``credentials`` is the
    folder of this voter's certificate and keys, as ``trex init`` wrote it.  When the context is
    entered the voter has recovered, listens, and takes part; its archive process is starting.  On
    leaving it hands leadership over, if it leads, for up to HAND_OVER_S seconds, and ends its
    journal in order.  Needs an asyncio event loop.

    Raises ``ConfigError`` (no such voter, or credentials of no use), ``StartError`` (a port is
    taken, or the cluster was formed by other voters than the file names), ``JournalError``
    (missing, foreign, in use or damaged journal); ``VoterFailedError`` out of the context, whose
    body is cancelled, when the voter had to stop itself.
    """
    if sys.flags.optimize:
        raise StartError("a voter refuses to run under python -O: its assertions are part of it")
    entry = cluster.voter(voter_id)
    limits = cluster.journal
    started_s = time.monotonic()
    paths = directories(directory, journal_directory)
    refuse_fenced(paths.directory)
    held = Credentials(credentials, cluster.cluster_id_bytes)
    if why := why_not_voter(held.grant, voter_id):
        raise StartError(f"{credentials}: {why}")
    if not held.keys.signing:
        raise StartError(f"{credentials}: keys.toml holds no key to sign with")
    journal = Journal.open(
        paths.journal,
        cluster.cluster_id_bytes,
        voter_id,
        segment_bytes=limits.segment_bytes,
        retain_bytes=limits.retain_bytes,
    )
    voter: Voter | None = None
    scope = anyio.CancelScope()
    try:
        if journal.survey.cut is not None:
            log(logging.WARNING, "voter.journal.cut", voter=voter_id, cut=str(journal.survey.cut))
        snapshots = Snapshots(paths.snapshots)
        state, replica, snapshot_slot = await recover(
            journal,
            snapshots,
            MetadataMachine() if machine is None else machine,
            cluster.cluster_id_bytes,
        )
        if state.genesis is not None and state.genesis.voters != cluster.voter_ids:
            raise StartError(other_voters(state.genesis.voters, cluster.voter_ids))
        identity = journal.start(state)
        timing = cluster.timing
        config = Config(
            voter=voter_id,
            voters=cluster.voter_ids,
            incarnation=identity.incarnation,
            boot=identity.boot,
            seed=identity.incarnation ^ identity.boot,
            heartbeat_ticks=timing.heartbeat_ticks,
            election_ticks_min=timing.election_ticks_min,
            election_ticks_max=timing.election_ticks_max,
        )
        voter = Voter(cluster, config, state, journal, replica, snapshots, snapshot_slot, held)
        await voter.bind()
        setup = Setup(
            cluster,
            voter_id,
            str(paths.directory),
            str(paths.journal),
            str(paths.snapshots),
            str(held.folder),
        )
        voter.start(ArchiveChild(setup), scope.cancel)
        log(
            logging.INFO,
            "voter.ready",
            voter=voter_id,
            client=f"{entry.host}:{entry.client_port}",
            boot=identity.boot,
            promised=str(state.promised),
            fixed=state.fixed,
            snapshot=snapshot_slot,
            took_ms=int((time.monotonic() - started_s) * 1000),
        )
        with scope:
            yield voter
            await voter.hand_over()
    finally:
        with anyio.CancelScope(shield=True):
            if voter is not None:
                await voter.aclose()
            else:
                journal.close()
    if voter.failure is not None:
        cause = voter.failure.__cause__
        if isinstance(cause, HaltedError) and cause.for_good:
            fence(paths.directory, str(voter.failure))
        raise voter.failure
    log(logging.INFO, "voter.stopped", voter=voter_id, fixed=voter.state.fixed)
