"""Where the dashboard's truth comes from: the live stream, or a recording of it.

This module alone turns what a listener hears into the events of ``view``.  A replay is a real
listener whose network is a recording: its state, its ring and its SQL are as they were.  The file
itself is ``recording``'s.

A feed outlives its listener: should that fail (a full disk, a slot of a newer feature level), what
it knew stays to be seen, and a ``Trouble`` says what happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Protocol

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from dashboard.recording import (
    EndFrame,
    EventFrame,
    Frame,
    Header,
    Recorder,
    Recording,
    RecordingError,
    ReportFrame,
    RunFrame,
    SnapshotFrame,
    TipFrame,
)
from dashboard.view import (
    SLOTS_MAX,
    Clock,
    Did,
    Event,
    Fixed,
    Followed,
    Jumped,
    MemberMoved,
    Opened,
    PastLed,
    Reported,
    SlotSeen,
    Tipped,
    Trouble,
)
from listeners.catchup import CatchupAnswer
from listeners.changes import Lagged, Progress, Reset, SlotChanges, Subscription
from listeners.listener import (
    STORE_FILE,
    Listener,
    ListenerOptions,
    ListenerStoppedError,
    open_listener,
)
from listeners.relay import Revoked
from listeners.source import Heard, Keep
from listeners.sql import SqlError
from listeners.store import Store, StoreError, describe_value
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.learner import LearnerConfig
from trex_core.messages import (
    CHAIN_BYTES,
    NO_BALLOT,
    VOTER_ID_MAX,
    Ballot,
    ListenerReport,
    RepairRequest,
    SnapshotOffer,
    StreamRun,
    StreamTip,
    decode_value,
)
from trex_core.metadata.commands import Change, Member
from trex_core.metadata.state import state_from
from trex_core.snapshot import SnapshotError, decode_snapshot, read_header
from trex_core.state import FixedRun

PENDING_MAX: Final = 8_192
"""Most events kept until they are taken; above it every second one of a kind is forgotten."""
PENDING_BYTES_MAX: Final = 8 << 20
"""Most bytes of slots kept to tell their details when they are taken."""
MOVES_MAX: Final = 50
"""Most changes of members told one by one at a time; more are one line."""
FOLLOWED_MS: Final = 1_000
"""So often is told where the own listener is."""
PAST_MAX: Final = 500
"""Most leaderships of before that are told."""
GRID_MS: Final = 250
"""What a replay delivers is told as of multiples of so many recorded milliseconds."""
TICK_S: Final = 0.05
"""So often a replay that runs moves on, in seconds."""
STEP_S_MAX: Final = 0.5
"""A replay that cannot keep up becomes slower instead of jumping further than this."""
FRAMES_MAX: Final = 512
"""Most frames handed to the replaying listener at once."""
JUMP_DEADLINE_S: Final = 120.0
"""Longest a recorded snapshot may take to be installed, in seconds."""
SPEED_MAX: Final = 1_000.0


class Feed(Protocol):
    """What the application draws from. All calls on one event loop."""

    cluster: ClusterConfig
    source: str
    """"live", or the name of the recording."""
    listener: Listener
    """State, ring and SQL."""

    def take(self) -> tuple[Event, ...]:
        """The events since the last call, in order, a ``Clock`` last. Neither waits nor raises."""
        ...

    # A replay only (live: ``speed`` is 1 and setting it does nothing):
    speed: float
    """Times real time; 0 is paused."""

    @property
    def progress(self) -> tuple[int, int] | None:
        """(milliseconds played, milliseconds in the recording); None when live."""
        ...


# --- what was heard, until it is taken --------------------------------------------------------


class _Inbox:
    """An observer that keeps what it is told as events, within bounds, until they are taken.
    ``now_ms`` is the feed's clock."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._events: list[Event] = []
        self._first = self._last = 0
        """Slots delivered and not yet an event; none while ``_first`` is 0."""
        self._runs: deque[FixedRun] = deque()
        """The newest delivered: enough for the details of SLOTS_MAX slots."""
        self._slots = self._bytes = 0
        self._changes: Subscription | None = None
        self._troubles: dict[str, str] = {}

    def add(self, event: Event) -> None:
        """Keep ``event``."""
        self._events.append(event)
        if len(self._events) > PENDING_MAX:
            self._events = _thinned(self._events)

    def trouble(self, who: str, text: str) -> None:
        """``who`` is in trouble (or no longer: ``text`` is empty)."""
        if self._troubles.get(who, "") != text:
            self._troubles[who] = text
            self.add(Trouble(self._now_ms(), "; ".join(filter(None, self._troubles.values()))))

    def heard(self, voter: int, message: StreamTip) -> None:
        """A heartbeat."""
        self.add(Tipped(self._now_ms(), voter, message))

    def reported(self, report: ListenerReport) -> None:
        """A listener's report."""
        self.add(Reported(self._now_ms(), report))

    def delivered(self, run: FixedRun) -> None:
        """Slots were applied. They become one event when somebody looks."""
        if not self._first:
            self._first = run.first
        self._last = run.last
        runs = self._runs
        runs.append(run)
        self._slots += len(run.values)
        self._bytes += sum(map(len, run.values))
        while len(runs) > 1 and (
            self._slots - len(runs[0].values) >= SLOTS_MAX or self._bytes > PENDING_BYTES_MAX
        ):
            oldest = runs.popleft()
            self._slots -= len(oldest.values)
            self._bytes -= sum(map(len, oldest.values))

    def jumped(self, from_slot: int, to_slot: int) -> None:
        """The own listener jumped."""
        self._close_slots()
        self.add(Jumped(self._now_ms(), from_slot, to_slot))

    def look(self, listener: Listener) -> None:
        """Make events of what was delivered and of what it changed up to now."""
        self._close_slots()
        for moved in self._moves(listener):
            self.add(moved)

    def take(self) -> tuple[Event, ...]:
        """All events, the details of the newest slots filled in. What is kept begins anew."""
        self._close_slots()
        events, self._events = self._events, []
        seen = [_seen(slot, data) for slot, data in self._newest()]
        self._runs.clear()
        self._slots = self._bytes = 0
        for at in range(len(events) - 1, -1, -1):
            event = events[at]
            if isinstance(event, Fixed):
                if not seen or seen[-1].slot < event.first:
                    break
                mine = tuple(one for one in seen if event.first <= one.slot <= event.last)
                events[at] = msgspec.structs.replace(event, newest=mine)
                seen = [one for one in seen if one.slot < event.first]
        return tuple(events)

    def _newest(self) -> list[tuple[int, bytes]]:
        """The newest slots, at most SLOTS_MAX, ascending."""
        newest: list[tuple[int, bytes]] = []
        for run in self._runs:
            newest.extend(
                enumerate(run.values[-SLOTS_MAX:], max(run.first, run.last - SLOTS_MAX + 1))
            )
        return newest[-SLOTS_MAX:]

    def _close_slots(self) -> None:
        if self._first:
            self.add(Fixed(self._now_ms(), self._first, self._last, ()))
            self._first = 0

    def _moves(self, listener: Listener) -> Iterable[MemberMoved]:
        """What changed of members since the last look; from when the listener was up to date."""
        if self._changes is None:
            if listener.ready:
                self._changes = listener.changes()
            return ()
        now_ms = self._now_ms()
        moves: list[MemberMoved] = []
        count = slot = 0
        while (delivery := self._changes.take()) is not None:
            match delivery:
                case SlotChanges(slot=slot, changes=changes) | Reset(to_slot=slot, changes=changes):
                    lapsed = any(each.kind == "lease" and each.new is None for each in changes)
                    for change in changes:
                        if change.kind == "member":
                            count += 1
                            if count <= MOVES_MAX:
                                words = _moved(change, lapsed=lapsed)
                                moves.append(MemberMoved(now_ms, slot, change.key, words))
                case Lagged(from_slot=first, to_slot=slot):
                    words = f"what happened to members in slots {first:,} to {slot:,} was not seen"
                    moves.append(MemberMoved(now_ms, slot, "", words))
                case Progress():
                    pass
        if count > MOVES_MAX:
            return (MemberMoved(now_ms, slot, "", f"{count:,} members changed"),)
        return moves


def _thinned(events: Sequence[Event]) -> list[Event]:
    """Every second event of each kind, the newest of it always; slots delivered are all told, two
    events of them as one."""
    kept: list[Event] = []
    kinds: dict[Hashable, bool] = {}
    joinable: int | None = None
    for event in reversed(events):
        if isinstance(event, Fixed):
            newer = None if joinable is None else kept[joinable]
            if joinable is not None and isinstance(newer, Fixed) and newer.first == event.last + 1:
                kept[joinable] = Fixed(newer.at_ms, event.first, newer.last, newer.newest)
                joinable = None
                continue
            joinable = len(kept)
        else:
            kind = (type(event), event.voter) if isinstance(event, Tipped) else type(event)
            if kinds.get(kind, False):
                kinds[kind] = False
                continue
            kinds[kind] = True
        kept.append(event)
    kept.reverse()
    return kept


def _seen(slot: int, data: bytes) -> SlotSeen:
    """What a line of the screen needs of a fixed slot: kind and key as in ``commits``."""
    value = decode_value(data)
    kind, key = describe_value(value)
    return SlotSeen(slot, kind, key or "", len(value.command), value.ballot)


def _moved(change: Change, *, lapsed: bool) -> str:
    """How a member changed, in words; ``lapsed``: a lease ended in the same slot."""
    old, new = change.old, change.new
    if not isinstance(new, Member):
        return "left: its lease ended" if lapsed else "left"
    if not isinstance(old, Member):
        zone = f" in zone {new.zone}" if new.zone else ""
        return f"joined{zone}, {new.state}, weight {new.weight}"
    words = [
        f"{name} {_told(before)} → {_told(after)}"
        for name, before, after in (
            ("state", old.state, new.state),
            ("zone", old.zone, new.zone),
            ("weight", old.weight, new.weight),
            ("address", old.address, new.address),
        )
        if before != after
    ]
    words += [
        what
        for what, before, after in (
            ("attributes changed", old.attributes, new.attributes),
            ("tokens changed", old.tokens, new.tokens),
            ("on another lease", old.lease, new.lease),
        )
        if before != after
    ]
    return ", ".join(words) or "written again"


def _told(value: object) -> str:
    return "none" if value is None else str(value)


# --- the listener beside it -------------------------------------------------------------------


@asynccontextmanager
async def _following(
    opened: AbstractAsyncContextManager[Listener], inbox: _Inbox
) -> AsyncIterator[tuple[Listener, anyio.abc.TaskGroup]]:
    """The listener, run in a task of its own, so that its failure is a trouble of the feed and not
    its end; and the group of tasks that end with the feed. Raises what opening it raises."""
    stop, stopped = anyio.Event(), anyio.Event()
    raised: Exception | None = None

    async def follow(*, task_status: anyio.abc.TaskStatus[Listener]) -> None:
        is_open = False
        try:
            async with opened as listener:
                is_open = True
                task_status.started(listener)
                await stop.wait()
        except Exception as error:
            if not is_open:
                raise
            why = str(error) or type(error).__name__
            inbox.trouble("listener", f"nothing new is taken in: {why}")
        finally:
            stopped.set()

    async with anyio.create_task_group() as tasks:
        try:
            yield await tasks.start(follow), tasks
        except Exception as error:  # noqa: BLE001 - raised below, not in a group
            raised = error
        stop.set()
        await stopped.wait()
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised


def _opened(at_ms: int, cluster: ClusterConfig, source: str) -> Opened:
    timing = cluster.timing
    election_ms = timing.tick_ms * timing.election_ticks_max
    return Opened(at_ms, cluster.name, cluster.voter_ids, election_ms, source)


# --- live -------------------------------------------------------------------------------------


class _WallClock:
    """Wall-clock milliseconds at the start, moved on by the monotonic clock."""

    def __init__(self) -> None:
        self.start_ms: Final = time.time_ns() // 1_000_000
        self._start_ns = time.monotonic_ns()

    def now_ms(self) -> int:
        """Now."""
        return self.start_ms + self.passed_ms()

    def passed_ms(self) -> int:
        """Since the start."""
        return (time.monotonic_ns() - self._start_ns) // 1_000_000


class _Tap:
    """An observer that records what it is told, and tells the inbox. It records from
    :meth:`begin` on, so that what is applied by then is in the snapshot it begins with."""

    def __init__(self, inbox: _Inbox, clock: _WallClock) -> None:
        self._inbox = inbox
        self._clock = clock
        self._recorder: Recorder | None = None
        self._listener: Listener | None = None

    def begin(self, recorder: Recorder, listener: Listener) -> None:
        """Record from now on."""
        self._recorder, self._listener = recorder, listener
        if listener.applied:
            self._snapshot(-1)

    def heard(self, voter: int, message: StreamTip) -> None:
        """A heartbeat."""
        if self._recorder is not None:
            self._recorder.add(TipFrame(self._clock.passed_ms(), voter, message))
        self._inbox.heard(voter, message)

    def reported(self, report: ListenerReport) -> None:
        """A listener's report."""
        if self._recorder is not None:
            self._recorder.add(ReportFrame(self._clock.passed_ms(), report))
        self._inbox.reported(report)

    def delivered(self, run: FixedRun) -> None:
        """Slots were applied."""
        if self._recorder is not None:
            frame = RunFrame(self._clock.passed_ms(), run.first, run.chain_before, run.values)
            self._recorder.add(frame)
        self._inbox.delivered(run)

    def jumped(self, from_slot: int, to_slot: int) -> None:
        """The listener jumped: where to is recorded whole."""
        self._snapshot(from_slot)
        self._inbox.jumped(from_slot, to_slot)

    def _snapshot(self, from_slot: int) -> None:
        if self._recorder is None or self._listener is None:
            return
        data = self._listener.capture()
        if data is not None:
            applied = self._listener.applied
            self._recorder.add(SnapshotFrame(self._clock.passed_ms(), from_slot, applied, data))


class _Live:
    """The stream, as it comes."""

    source = "live"
    progress = None

    def __init__(
        self,
        cluster: ClusterConfig,
        listener: Listener,
        inbox: _Inbox,
        clock: _WallClock,
        recorder: Recorder | None,
    ) -> None:
        self.cluster = cluster
        self.listener = listener
        self._inbox = inbox
        self._clock = clock
        self._recorder = recorder
        self._follow_ms = clock.start_ms

    @property
    def speed(self) -> float:
        """Always 1."""
        return 1.0

    @speed.setter
    def speed(self, value: float) -> None:
        del value  # nobody hurries the present

    def take(self) -> tuple[Event, ...]:
        """The events since the last call."""
        self._inbox.look(self.listener)
        now_ms = self._clock.now_ms()
        if now_ms >= self._follow_ms:
            self._follow_ms = now_ms + FOLLOWED_MS
            self._note(_followed(now_ms, self.listener))
        if self._recorder is not None and self._recorder.trouble:
            self._inbox.trouble("recorder", self._recorder.trouble)
        return (*self._inbox.take(), Clock(self._clock.now_ms()))

    def _note(self, event: Followed | PastLed) -> None:
        self._inbox.add(event)
        if self._recorder is not None:
            self._recorder.add(EventFrame(self._clock.passed_ms(), event))

    async def tell_past(self) -> None:
        """Once it is up to date: who led before it was watched, out of the store."""
        try:
            await self.listener.wait_ready(float("inf"))
            result = await self.listener.sql(
                "SELECT ballot, first_slot, last_slot, epoch_ms(first_time), epoch_ms(last_time)"
                f" FROM ballots WHERE epoch_ms(first_time) < {self._clock.start_ms}"
                f" ORDER BY first_slot DESC LIMIT {PAST_MAX}",
                at_least=self.listener.applied,
                deadline_s=60.0,
            )
        except (SqlError, ListenerStoppedError, StoreError):
            return  # of the listener's trouble another tells, and without the past it goes as well
        now_ms = self._clock.now_ms()
        for ballot, first, last, from_ms, to_ms in reversed(result.rows):
            era, round_, voter = map(int, ballot.split("."))
            self._note(PastLed(now_ms, Ballot(era, round_, voter), first, last, from_ms, to_ms))


def _followed(now_ms: int, listener: Listener) -> Followed:
    status = listener.status
    return Followed(
        now_ms,
        status.applied,
        -1 if status.stored is None else status.stored,
        status.tip,
        status.ready,
        len(listener.state.members),
        status.counters,
    )


@asynccontextmanager
async def open_feed(
    cluster: ClusterConfig,
    credentials: Path,
    *,
    name: str,
    directory: Path,
    record: Path | None = None,
    keep: Keep | None = None,
) -> AsyncIterator[Feed]:
    """Follow ``cluster`` live as listener ``name``; its store is in ``directory``, its certificate
    and keys in ``credentials``. With ``record``, everything heard is written there too. ``keep`` is
    the test seam of ``listeners.source``.

    It opens at once, whether anybody is heard or not. Raises ``ConfigError`` for a bad name,
    ``SourceError`` if the group cannot be joined, ``StoreError`` if the directory cannot be used
    and :class:`~dashboard.recording.RecordingError` if ``record`` cannot be made. What goes wrong
    later is told as ``Trouble``.
    """
    clock = _WallClock()
    inbox = _Inbox(clock.now_ms)
    inbox.add(_opened(clock.start_ms, cluster, "live"))
    tap = None if record is None else _Tap(inbox, clock)
    opened = open_listener(
        cluster,
        credentials,
        name=name,
        directory=directory,
        keep=keep,
        observer=tap or inbox,
        options=ListenerOptions(helps=False),
    )
    async with _following(opened, inbox) as (listener, tasks):
        recorder: Recorder | None = None
        if tap is not None and record is not None:
            header = Header(_product_version(), cluster, name, clock.start_ms)
            recorder = await anyio.to_thread.run_sync(Recorder, record, header)
            tap.begin(recorder, listener)
            tasks.start_soon(recorder.run)
        feed = _Live(cluster, listener, inbox, clock, recorder)
        tasks.start_soon(feed.tell_past)
        try:
            yield feed
        finally:
            if recorder is not None:
                recorder.end(clock.passed_ms())


def _product_version() -> str:
    try:
        return version("trex-paxos")
    except PackageNotFoundError:
        return "unknown"


# --- replay -----------------------------------------------------------------------------------


class _Tape:
    """A network that is a recording: the listener takes from it what the player puts there.
    ``now_ms`` is the time of what was taken last."""

    def __init__(self, inbox: Callable[[Event], None], now_ms: int) -> None:
        self.now_ms = now_ms
        self.closed = False
        self._tell = inbox
        self._queue: deque[tuple[int, Heard | Event]] = deque()
        self._idle = anyio.Event()
        self._woken = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._offer: tuple[SnapshotOffer, bytes] | None = None
        self._offered = anyio.Event()

    # -- the player's side --

    def put(self, at_ms: int, what: Heard | Event) -> None:
        """Something that came at ``at_ms``."""
        self._queue.append((at_ms, what))

    async def settle(self, at_ms: int) -> None:
        """Wait until all that was put is taken and applied; it is ``at_ms`` then. Raises
        :class:`ListenerStoppedError` if the listener does not take any more."""
        if not self.closed and self._queue:
            self._idle = anyio.Event()
            self.wake()
            await self._idle.wait()
        if self.closed:
            raise ListenerStoppedError("the listener of the replay has stopped")
        self.now_ms = max(self.now_ms, at_ms)

    def offer(self, slot: int, chain: bytes, data: bytes) -> None:
        """Answer the next question for entries with this snapshot, and have it asked."""
        digest = hashlib.blake2b(data, digest_size=32).digest()
        self._offer = SnapshotOffer(slot, chain, len(data), digest), data
        self._offered.set()
        # A piece from beyond the gap: it is never delivered, but makes the listener catch up.
        piece = StreamRun(NO_BALLOT, slot, bytes(CHAIN_BYTES), (b"",), slot, chain)
        self.put(self.now_ms, (self.voter, piece))

    voter = 1
    """Any voter of the cluster."""
    instance = VOTER_ID_MAX + 1
    helps = ""

    def withdraw(self) -> None:
        """The snapshot is installed."""
        self._offer = None
        self._offered = anyio.Event()

    # -- the listener's side: Network, Stream, Archives --

    def stream(self, counters: Counter[str]) -> _Tape:
        """Itself."""
        del counters
        return self

    def archives(self, counters: Counter[str], revoked: Revoked) -> _Tape:
        """Itself."""
        del counters, revoked
        return self

    async def help(self, revoked: Revoked) -> None:
        """Nobody is there to be helped."""

    async def wait(self, until_s: float | None) -> None:
        """Wait until something is put, or woken, or ``until_s``."""
        if self._woken or self._queue:
            await asyncio.sleep(0)
        else:
            self._idle.set()
            waiter = self._waiter = self._loop.create_future()
            timer = None if until_s is None else self._loop.call_at(until_s, self.wake)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        self._woken = False

    def take(self) -> Heard | None:
        """The next message; what else was recorded on the way goes to the inbox."""
        while self._queue:
            at_ms, what = self._queue.popleft()
            self.now_ms = max(self.now_ms, at_ms)
            if isinstance(what, tuple):
                return what
            self._tell(what)
        return None

    def wake(self) -> None:
        """End the current or the next wait."""
        self._woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def done(self, slot: int) -> None:
        """A recording holds only what was proven."""

    def begin(self, slot: int, chain: bytes) -> None:
        """A recording does not contradict itself."""

    def delivered(self, run: FixedRun) -> None:
        """Nobody is there to be helped."""

    def request(self, wanted: RepairRequest) -> None:
        """Nobody is there to ask: what was repaired is in the recording."""

    def report(self, report: ListenerReport) -> None:
        """Nobody is there to hear."""

    def close(self) -> None:
        """The listener ends."""
        self.closed = True
        self._idle.set()

    async def entries(self, helper: int, first: int) -> CatchupAnswer:
        """Entries come of themselves; a snapshot, once it was recorded."""
        del helper
        while self._offer is None or self._offer[0].slot < first:
            await self._offered.wait()
        return self._offer[0]

    async def snapshot(self, offer: SnapshotOffer, voters: Sequence[int]) -> bytes:
        """The recorded snapshot."""
        del offer, voters
        assert self._offer is not None
        return self._offer[1]

    async def aclose(self) -> None:
        """Nothing to close."""


class _Replay:
    """A recording, at the speed asked for."""

    def __init__(
        self,
        recording: Recording,
        frames: Iterator[Frame],
        listener: Listener,
        tape: _Tape,
        inbox: _Inbox,
    ) -> None:
        self.cluster = recording.header.cluster
        self.source = recording.path.name
        self.listener = listener
        self._recording = recording
        self._tape = tape
        self._inbox = inbox
        self._frames = frames
        self._next = next(frames, None)
        self._reached_ms = 0
        self._delivered = listener.applied
        self._speed = 0.0
        self._over = False
        self._turned = anyio.Event()
        self._since_s = 0.0

    @property
    def speed(self) -> float:
        """Times real time."""
        return self._speed

    @speed.setter
    def speed(self, value: float) -> None:
        if not self._over:
            self._speed = min(max(0.0, value), SPEED_MAX)
            self._turned.set()

    @property
    def progress(self) -> tuple[int, int]:
        """(played, whole), in milliseconds."""
        return self._reached_ms, self._recording.duration_ms

    def take(self) -> tuple[Event, ...]:
        """The events since the last call."""
        self._inbox.look(self.listener)
        return (*self._inbox.take(), Clock(self._tape.now_ms))

    async def run(self) -> None:
        """Play on, as fast as :attr:`speed` says."""
        self._since_s = anyio.current_time()
        try:
            while not self._over:
                if self._speed <= 0:
                    await self._turn()
                    self._since_s = anyio.current_time()
                    continue
                with anyio.move_on_after(TICK_S):
                    await self._turn()
                now_s = anyio.current_time()
                step_ms = min(now_s - self._since_s, STEP_S_MAX) * 1000 * self._speed
                self._since_s = now_s
                await self.play(self._reached_ms + max(1, round(step_ms)))
        except (RecordingError, SnapshotError, ListenerStoppedError, TimeoutError) as error:
            self._over, self._speed = True, 0.0
            self._inbox.trouble("replay", str(error))

    async def _turn(self) -> None:
        """Wait until the speed is turned."""
        await self._turned.wait()
        self._turned = anyio.Event()

    async def play(self, to_ms: int) -> None:
        """Play on to ``to_ms`` at once: when it returns, all of it is applied.

        Raises :class:`RecordingError` if the recording does not fit together.
        """
        to_ms = min(to_ms, self._recording.duration_ms)
        grid_ms = (self._reached_ms // GRID_MS + 1) * GRID_MS
        waiting = 0
        while self._next is not None and self._next.at_ms <= to_ms:
            frame = self._next
            while frame.at_ms >= grid_ms:
                await self._settle(grid_ms)
                grid_ms += GRID_MS
                waiting = 0
            await self._put(frame)
            self._next = next(self._frames, None)
            waiting += 1
            if waiting >= FRAMES_MAX:
                await self._tape.settle(self._start_ms + frame.at_ms)
                waiting = 0
        await self._settle(to_ms)
        if to_ms >= self._recording.duration_ms and not self._over:
            self._over, self._speed = True, 0.0
            words = "the recording ends here"
            if self._recording.cut_off:
                words += ": it was cut off while it was recorded"
            self._inbox.add(Did(self._tape.now_ms, not self._recording.cut_off, words))

    @property
    def _start_ms(self) -> int:
        return self._recording.header.started_ms

    async def _settle(self, at_ms: int) -> None:
        """All before ``at_ms`` is applied and made events."""
        await self._tape.settle(self._start_ms + at_ms)
        if self.listener.applied < self._delivered:
            raise RecordingError(
                f"{self._recording.path} does not fit together: slot {self.listener.applied + 1}"
                " does not follow from the one before"
            )
        self._inbox.look(self.listener)
        self._inbox.add(Clock(self._tape.now_ms))  # what silence means is told when it was so
        self._reached_ms = at_ms

    async def _put(self, frame: Frame) -> None:
        at_ms = self._start_ms + frame.at_ms
        tape = self._tape
        match frame:
            case RunFrame(first=first, chain_before=chain, values=values):
                # Only what was delivered is known: it is its own tip.
                last = first + len(values) - 1
                tape.put(at_ms, (tape.voter, StreamRun(NO_BALLOT, first, chain, values, last, b"")))
                self._delivered = max(self._delivered, last)
            case TipFrame(voter=voter, tip=tip):
                tape.put(at_ms, (voter, tip))
            case ReportFrame(report=report):
                tape.put(at_ms, (0, report))
            case EventFrame(event=event):
                # At the frame's time, as all else: that is later than the event's own, and a grid
                # of times may lie between.
                tape.put(at_ms, msgspec.structs.replace(event, at_ms=at_ms))
            case SnapshotFrame(from_slot=from_slot, slot=slot, data=data):
                if from_slot >= 0:
                    await tape.settle(at_ms)
                    _, chain = read_header(data)
                    tape.offer(slot, chain, data)
                    tape.wake()
                    await self.listener.wait_applied(slot, JUMP_DEADLINE_S)
                    tape.withdraw()
                    self._delivered = slot
            case EndFrame():
                pass


@asynccontextmanager
async def open_replay(
    recording: Path, *, directory: Path, speed: float = 1.0, at_ms: int = 0
) -> AsyncIterator[Feed]:
    """Play a recording: up to ``at_ms`` (milliseconds from its start) at once, all of it applied
    and stored when this opens; then on at ``speed``. ``directory`` must not hold a store yet.

    Raises :class:`~dashboard.recording.RecordingError` if it cannot be read, ``ConfigError`` and
    ``StoreError`` as :func:`open_feed`.
    """
    read = await anyio.to_thread.run_sync(Recording, recording)
    header = read.header
    if (directory / STORE_FILE).exists():
        raise ConfigError(
            f"{directory} holds the store of a listener: a replay needs a directory of its own"
        )
    await anyio.to_thread.run_sync(_prepare, read, directory)
    tape: _Tape
    inbox = _Inbox(lambda: tape.now_ms)
    tape = _Tape(inbox.add, header.started_ms)
    tape.voter = header.cluster.voter_ids[0]
    inbox.add(_opened(header.started_ms, header.cluster, recording.name))
    opened = open_listener(
        header.cluster,
        None,
        name=header.listener,
        directory=directory,
        seed=0,
        network=tape,
        observer=inbox,
        options=ListenerOptions(learner=LearnerConfig("", (), far_behind_slots=0)),
    )
    with closing(read.frames()) as frames:
        async with _following(opened, inbox) as (listener, tasks):
            feed = _Replay(read, frames, listener, tape, inbox)
            try:
                await feed.play(at_ms)
            except (SnapshotError, ListenerStoppedError, TimeoutError) as error:
                raise RecordingError(f"{recording} cannot be played: {error}") from error
            if listener.applied:
                await listener.wait_stored(listener.applied, JUMP_DEADLINE_S)
            feed.speed = speed
            tasks.start_soon(feed.run)
            yield feed


def _prepare(recording: Recording, directory: Path) -> None:
    """Make the store that the recorded listener began with. Raises :class:`RecordingError`."""
    with closing(recording.frames()) as frames:
        first = next((each for each in frames if isinstance(each, SnapshotFrame | RunFrame)), None)
    if not isinstance(first, SnapshotFrame) or first.from_slot >= 0:
        return
    header = recording.header
    try:
        held = decode_snapshot(first.data)
        metadata = state_from(held.machine)
    except (SnapshotError, ValueError, msgspec.MsgspecError) as error:
        raise RecordingError(f"{recording.path} is damaged: its first state: {error}") from error
    store = Store.open(directory / STORE_FILE, header.cluster.cluster_id_bytes, header.listener)
    try:
        store.reset(held.slot, held.chain, held.genesis, held.sessions, metadata)
    finally:
        store.close()
