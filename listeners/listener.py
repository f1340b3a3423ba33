"""The listener: follows the stream of fixed slots and holds the state that they make.

This module alone wires source, learner, state and store together.  One task owns all of it: it
takes datagrams and catch-up answers, lets the learner put them in order, applies each slot to the
in-memory state at once, tells subscribers, and leaves storing to the store's thread.  Nothing that
a subscriber or a query does can hold it up.  Only a store that is far behind can: memory is
bounded, so the listener stops reading until there is room again, and then catches up.

Guarantees towards subscribers (:meth:`Listener.changes`), in etcd's words:

- Ordered: slots ascend.  Unique: no slot twice.  Reliable: no slot is left out unsaid.
- Atomic: all changes of a slot come in one :class:`SlotChanges`; a jump by snapshot is one
  :class:`Reset` with the exact difference.
- Resumable: from slot n + 1, as far back as changes are kept; else an error names the first slot.
- Bookmarkable: :class:`Progress` at n means that everything up to n was delivered.

It runs on asyncio under anyio, with uvloop or without; ``blocking`` is for threaded programs.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

import anyio
import anyio.abc
import immutables
import msgspec

from listeners.catchup import CatchupError
from listeners.changes import (
    CHANGES_BYTES_MAX,
    CHANGES_KEPT_MAX,
    CompactedError,
    Reset,
    SlotChanges,
    Subscription,
    Window,
)
from listeners.credentials import Credentials
from listeners.source import (
    Keep,
    Network,
    Sockets,
    drop_from_environment,
)
from listeners.workers import Workers
from trex_core.access import REVOKED_KEY, revoked_serials
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.learner import (
    CatchupFailed,
    CatchUpFrom,
    CatchupIn,
    Clock,
    HelperHeard,
    Installed,
    LearnerConfig,
    LearnerEvent,
    RepairHeard,
    StreamIn,
    first_state,
    learn,
)
from trex_core.messages import (
    AskOther,
    CatchupEntries,
    Genesis,
    Kind,
    ListenerReport,
    OutcomeStatus,
    RepairRequest,
    SnapshotOffer,
    StreamRun,
    StreamTip,
    Value,
    decode_value,
)
from trex_core.metadata.commands import Change, ConfigEntry, Lease, Member
from trex_core.metadata.ring import Ring
from trex_core.metadata.state import (
    EMPTY,
    KeptRing,
    MetadataState,
    apply,
    state_chunks,
    state_from,
)
from trex_core.proof import ContradictionError
from trex_core.roster import NAME_BYTES_MAX, Reporter, Roster
from trex_core.sessions import NO_SESSIONS, Sessions, deliver
from trex_core.snapshot import SnapshotError, decode_snapshot, encode_snapshot
from trex_core.state import FixedRun

if TYPE_CHECKING:
    from listeners.sql import Queries, QueryResult, Request
    from listeners.store import AppliedSlot, Store, StoreWriter

TURN_SLOTS_MAX: Final = 256
"""After this many slots in one turn the owner lets the rest of the loop have its turn."""
STOP_DEADLINE_S: Final = 5.0
"""How long a stop waits for what is applied to be stored; the rest is fetched again."""
EVIDENCE_FILE: Final = "contradiction.json"
"""In the directory of a listener that stopped because voters contradicted each other."""
STORE_FILE: Final = "store.duckdb"
SOCKET_FILE: Final = "sql.sock"

_log = logging.getLogger("trex.listener")
_R = TypeVar("_R", ConfigEntry, Lease, Member)
_NO_CHANGES: Final[tuple[Change, ...]] = ()


def _say(level: int, event: str, **fields: object) -> None:
    """Log ``event`` (part.noun.verb) with its fields."""
    if _log.isEnabledFor(level):
        _log.log(level, event, extra={"trex_fields": fields})


class DeadlineError(TimeoutError):
    """The listener did not get there within the deadline; the message says where it is."""


class NoStoreError(RuntimeError):
    """This listener was opened without a directory: it keeps no store and answers no SQL."""


class ListenerStoppedError(RuntimeError):
    """The listener was closed while something waited for it."""


class Observer(Protocol):
    """Who looks over a listener's shoulder: a dashboard, a recorder.

    It is called in the middle of the listener's own turn, so it must be quick (tens of
    microseconds) and must not wait: what it costs, the listener pays. An exception out of it ends
    the listener like any other failure: raised where the block of :func:`open_listener` ends.
    What is to live on beside a faulty observer subscribes to :meth:`Listener.changes` instead.
    """

    def heard(self, voter: int, message: StreamTip) -> None:
        """``voter``'s heartbeat came. Taken as it came: late, twice, or old ones too."""
        ...

    def reported(self, report: ListenerReport) -> None:
        """Another listener's report came."""
        ...

    def delivered(self, run: FixedRun) -> None:
        """``run`` was applied: ascending, no slot twice, none left out but by :meth:`jumped`."""
        ...

    def jumped(self, from_slot: int, to_slot: int) -> None:
        """A snapshot brought the state from ``from_slot`` to ``to_slot``; what comes next is
        ``to_slot + 1``."""
        ...


class ListenerOptions(msgspec.Struct, frozen=True):
    """What an embedding program may tune. ``changes_kept_max`` and ``changes_bytes_max`` bound what
    is kept for subscribers that are behind; ``learner`` replaces the learner's configuration (its
    name and voters are filled in). With ``helps`` it serves repairs and catch-up to other listeners
    from what it holds in memory, on a TCP port of its own of the stream's interface."""

    changes_kept_max: int = CHANGES_KEPT_MAX
    changes_bytes_max: int = CHANGES_BYTES_MAX
    learner: LearnerConfig = LearnerConfig("", ())
    helps: bool = True


DEFAULT_OPTIONS: Final = ListenerOptions()


class ListenerStatus(msgspec.Struct, frozen=True):
    """Where a listener is. ``stored`` is None without a store; ``lag`` in slots, applied behind
    tip. ``counters`` count since the start. ``listeners_known`` are heard reporting (the silent
    ones included until they are forgotten), this one included."""

    name: str
    applied: int
    stored: int | None
    tip: int
    lag: int
    ready: bool
    counters: dict[str, int]
    listeners_known: int = 1


class _Jump(msgspec.Struct, frozen=True):
    """A snapshot downloaded, verified and decoded by the catch-up task."""

    slot: int
    chain: bytes
    genesis: Genesis
    sessions: Sessions
    state: MetadataState
    base: MetadataState
    """The state that ``changes`` is the difference to."""
    changes: tuple[Change, ...]


class _SlotWaiters:
    """Who waits for which slot."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, anyio.Event]] = []
        self._count = 0

    async def wait(self, slot: int) -> None:
        self._count += 1
        event = anyio.Event()
        heapq.heappush(self._waiting, (slot, self._count, event))
        try:
            await event.wait()
        finally:
            if not event.is_set():  # given up
                self._waiting = [held for held in self._waiting if held[2] is not event]
                heapq.heapify(self._waiting)

    def reached(self, slot: int) -> None:
        while self._waiting and self._waiting[0][0] <= slot:
            heapq.heappop(self._waiting)[2].set()

    def release(self) -> None:
        for _, _, event in self._waiting:
            event.set()
        self._waiting = []


class _Lateness:
    """For how long a listener has not been where it should be.

    Not "since it was at its tip last": one that follows a busy stream closely need never be exactly
    there.  It is told by the oldest tip it has not reached, so it is 0 when it is there, and small
    while it keeps up.
    """

    def __init__(self) -> None:
        self._target = 0
        self._since_ms: int | None = None

    def moved(self, applied: int, tip: int, now_ms: Callable[[], int]) -> None:
        """It is at ``applied`` and knows of ``tip``."""
        if self._since_ms is not None and applied < self._target:
            return
        self._target = tip
        self._since_ms = now_ms() if applied < tip else None

    def ms(self, now_ms: int) -> int:
        """So many milliseconds."""
        return 0 if self._since_ms is None else max(0, now_ms - self._since_ms)


class _Keeper:
    """The store of a listener, its writer, and the queries on it. Only what is opened with a
    directory has one: this is where duckdb is imported."""

    def __init__(self, store: Store, tip: Callable[[], int]) -> None:
        from listeners.sql import Queries
        from listeners.store import AppliedSlot, StoreBatch, StoreWriter

        self.store: Final = store
        self.writer: Final[StoreWriter] = StoreWriter(store)
        self.queries: Final[Queries] = Queries(store.connect, tip=tip)
        self.row: Final = AppliedSlot
        self.batch: Final = StoreBatch
        self.rows: list[AppliedSlot] = []
        """Applied in this turn."""
        self.jump: _Jump | None = None
        """A snapshot that replaced the state in memory, and must replace it here."""
        store.relieve = self.queries.relieve


class Listener:
    """A follower of one cluster; made by :func:`open_listener`. Use it on its own event loop.

    All it shows is of one moment between two awaits: ``state``, ``ring`` and ``applied`` agree.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        name: str,
        directory: Path | None,
        store: Store | None,
        *,
        seed: int,
        network: Network,
        options: ListenerOptions,
        observer: Observer | None,
        workers: Workers,
    ) -> None:
        self.name: Final = name
        self.directory: Final = directory
        self.counters: Final[Counter[str]] = Counter()
        """What happened since the start, by name."""
        self._cluster = cluster
        self._observer = observer
        self._workers = workers
        self._learner = msgspec.structs.replace(
            options.learner, name=name, voters=cluster.voter_ids, seed=seed
        )
        self._sessions = NO_SESSIONS
        self._state = EMPTY
        self._genesis: Genesis | None = None
        self._learned = first_state(cluster.cluster_id_bytes)
        self._keeper: _Keeper | None = None
        if store is not None:
            self._keeper = _Keeper(store, lambda: self.tip)
            stored = store.load()
            if stored is not None:
                self._state, self._sessions = stored.metadata, stored.sessions
                self._genesis = stored.genesis
                self._learned = first_state(cluster.cluster_id_bytes, stored.slot, stored.chain)
        self._chain = self._learned.chain
        self._window = Window(
            self._learned.slot,
            changes_max=options.changes_kept_max,
            bytes_max=options.changes_bytes_max,
        )
        self._applied_waiters = _SlotWaiters()
        self._ring = KeptRing()
        self._slot_changes = _NO_CHANGES
        self._first_tip: int | None = None
        self._ready = anyio.Event()
        self._wake_ms: int | None = None
        self._arrived: deque[LearnerEvent | _Jump] = deque()
        self._wanted: CatchUpFrom | None = None
        self._wanted_event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._started_ms = self._now_ms()
        self._lateness = _Lateness()
        self._roster = Roster()
        self._reporter = Reporter(self._started_ms)
        self._reported = False
        """Whether anybody was ever told of this one."""
        self._draw = random.Random(seed).random  # noqa: S311 - spreads reports, hides nothing
        self._network = network
        self._source = network.stream(self.counters)
        self._archives = network.archives(self.counters, self._revoked)
        self._source.begin(self._learned.slot, self._chain)

    # --- what it shows ----------------------------------------------------------------------

    @property
    def state(self) -> MetadataState:
        """The metadata after slot :attr:`applied`. Immutable: keep it as long as you like."""
        return self._state

    @property
    def ring(self) -> Ring:
        """The ring after slot :attr:`applied`: derived when asked for, then kept up with changes
        (about 10 µs each), equal at every listener that is at the same slot."""
        return self._ring.of(self._state)

    @property
    def applied(self) -> int:
        """The newest slot in memory."""
        return self._window.applied

    @property
    def stored(self) -> int | None:
        """The newest slot in the store; None without one."""
        return self._keeper.writer.stored if self._keeper is not None else None

    @property
    def tip(self) -> int:
        """The newest slot known to be fixed."""
        return self._window.tip

    @property
    def lag(self) -> int:
        """How many slots :attr:`applied` is behind :attr:`tip`."""
        return self.tip - self.applied

    @property
    def ready(self) -> bool:
        """Whether it has reached the first tip that it heard."""
        return self._ready.is_set()

    @property
    def status(self) -> ListenerStatus:
        """Where it is now."""
        return ListenerStatus(
            self.name,
            self.applied,
            self.stored,
            self.tip,
            self.lag,
            self.ready,
            dict(sorted(self.counters.items())),
            self._listeners_known(self._now_ms()),
        )

    def capture(self) -> bytes | None:
        """All that is applied, as the bytes of a snapshot (``trex_core.snapshot``) at slot
        :attr:`applied`, equal to a voter's at that slot; None while nothing is applied.

        Call it on the listener's loop. It takes about 1 ms per 64 KiB.
        """
        if self._genesis is None:
            return None
        return b"".join(
            encode_snapshot(
                self.applied,
                self._chain,
                self._genesis,
                self._sessions,
                state_chunks(self._state),
            )
        )

    def changes(
        self,
        since: int | None = None,
        *,
        kind: str | None = None,
        prefix: str = "",
        progress: bool = False,
    ) -> Subscription:
        """What changes after slot ``since`` (None: from now on), for ever: an async iterator of
        :class:`SlotChanges`, :class:`Reset`, :class:`Lagged` and, with ``progress``, of
        :class:`Progress` each time all is delivered up to the tip.

        ``kind`` ("member", "config", "lease") and ``prefix`` (of the key) choose changes. Slots
        that change nothing of it are passed over. ``since=0`` always works: if the first slots are
        no longer kept, one Reset from 0 brings the whole state. Otherwise it raises
        :class:`CompactedError` if slot ``since + 1`` is no longer kept.  The iterator ends when the
        listener is closed, and raises what stopped it.
        """
        window = self._window
        first = None
        if since is None:
            since = window.applied
        elif since + 1 < window.first_slot:
            if since != 0:
                raise CompactedError(since, window.first_slot)
            since = window.applied
            first = Reset(0, since, _difference(EMPTY, self._state))
        return Subscription(window, since, kind=kind, prefix=prefix, progress=progress, first=first)

    async def wait_applied(self, slot: int, deadline_s: float) -> None:
        """Wait until ``slot`` is in memory. Raises :class:`DeadlineError`, or what stopped the
        listener."""
        await self._within(
            lambda: self.applied >= slot,
            lambda: self._applied_waiters.wait(slot),
            deadline_s,
            lambda: f"slot {slot} was not applied; it is at {self.applied}, the tip at {self.tip}",
        )

    async def wait_stored(self, slot: int, deadline_s: float) -> None:
        """Wait until ``slot`` is in the store. Raises :class:`NoStoreError`,
        :class:`DeadlineError`, or what stopped the listener."""
        writer = self._keeping().writer
        await self._within(
            lambda: writer.stored >= slot,
            lambda: writer.wait_stored(slot),
            deadline_s,
            lambda: (
                f"slot {slot} was not stored; stored is {writer.stored}, applied {self.applied}"
            ),
        )

    async def wait_ready(self, deadline_s: float) -> None:
        """Wait until it has reached the first tip it heard. Raises :class:`DeadlineError`."""
        await self._within(
            self._ready.is_set,
            self._ready.wait,
            deadline_s,
            lambda: (
                "no tip was heard: does any voter run, and is this its multicast group?"
                if self._first_tip is None
                else f"it is at slot {self.applied} of {self._first_tip}"
            ),
        )

    async def sql(
        self, text: str, *, at_least: int | None = None, deadline_s: float = 10.0
    ) -> QueryResult:
        """The answer of the store to one SELECT, as of the slot it names.

        Read level ``local`` by default; with ``at_least`` it waits until that slot is stored: read
        your writes. Raises :class:`listeners.sql.SqlError`, or :class:`NoStoreError`.
        """
        from listeners.sql import Request

        return await self._answer(Request(text, max(1, int(deadline_s * 1000)), at_least))

    def _keeping(self) -> _Keeper:
        if self._keeper is None:
            raise NoStoreError(
                f"listener {self.name} keeps no store; open it with a directory to use SQL"
            )
        return self._keeper

    async def _within(
        self,
        there: Callable[[], bool],
        wait: Callable[[], Awaitable[None]],
        deadline_s: float,
        where: Callable[[], str],
    ) -> None:
        with anyio.move_on_after(deadline_s):
            while not there() and not self._window.closed:
                try:
                    await wait()
                except Exception:
                    if not self._window.closed:
                        raise  # what follows says why it was closed
        if there():
            return
        if self._window.failure is not None:
            raise self._window.failure
        if self._window.closed:
            raise ListenerStoppedError(f"listener {self.name} was closed")
        raise DeadlineError(f"listener {self.name}: after {deadline_s:g} s {where()}")

    async def _answer(self, request: Request) -> QueryResult:
        from listeners.sql import DEADLINE_MS_MAX, SqlDeadlineError, SqlUnavailableError

        keeper = self._keeping()
        start_s = self._loop.time()
        deadline_ms = min(request.deadline_ms, DEADLINE_MS_MAX)
        if request.at_least_slot is not None:
            try:
                await self.wait_stored(request.at_least_slot, deadline_ms / 1000)
            except DeadlineError as error:
                raise SqlDeadlineError(str(error)) from error
            except ListenerStoppedError as error:
                raise SqlUnavailableError(str(error)) from error
        spent_ms = int((self._loop.time() - start_s) * 1000)
        return await keeper.queries.run(request.sql, deadline_ms=max(1, deadline_ms - spent_ms))

    async def serve_sql(
        self,
        path: Path | None = None,
        *,
        task_status: anyio.abc.TaskStatus[Path] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve SQL on a unix socket (by default ``sql.sock`` in the listener's directory) until
        cancelled. Raises :class:`NoStoreError`, or :class:`listeners.sql.SqlUnavailableError`."""
        from listeners.sql import serve_sql

        self._keeping()
        assert self.directory is not None
        await serve_sql(
            path if path is not None else self.directory / SOCKET_FILE,
            self._answer,
            counters=self.counters,
            task_status=task_status,
        )

    # --- the owner --------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    async def _own(self) -> None:
        """The one task that changes anything."""
        source = self._source
        self._learn(Clock(self._now_ms()))
        while True:
            wake_ms = self._reporter.next_ms
            if self._wake_ms is not None:
                wake_ms = min(wake_ms, self._wake_ms)
            # Half a millisecond more, so that the clock truly shows the millisecond asked for.
            await source.wait((wake_ms + 0.5) / 1000)
            self._turn()
            if self._keeper is not None:
                await self._keep(self._keeper)

    async def _keep(self, keeper: _Keeper) -> None:
        """Bring a jump into the store; wait while it is too far behind. Meanwhile datagrams wait
        in the kernel, and what is lost there is caught up."""
        jump = keeper.jump
        if jump is not None:
            await keeper.writer.reset(
                jump.slot,
                jump.chain,
                jump.genesis,
                jump.sessions,
                jump.state,
                tip=self._window.tip,
            )
            keeper.jump = None
            self._tell()  # what was applied after the snapshot meanwhile
        await keeper.writer.room()

    def _turn(self) -> None:
        """Take what arrived, up to a bound, then tell everybody."""
        self._source.done(self._learned.slot)
        enough = self._learned.slot + TURN_SLOTS_MAX
        arrived, source = self._arrived, self._source
        try:
            while arrived and self._learned.slot < enough:
                event = arrived.popleft()
                if isinstance(event, _Jump):
                    self._install(event)
                    source.wake()
                    return  # the store must take it before anything after it
                self._learn(event)
            while self._learned.slot < enough:
                heard = source.take()
                if heard is None:
                    break
                sender, message = heard
                match message:
                    case RepairRequest():
                        self._learn(RepairHeard(message, self._now_ms()))
                    case ListenerReport():
                        self._hear_report(message)
                    case StreamRun() | StreamTip():
                        self._learn(StreamIn(sender, message, self._now_ms()))
                        if self._first_tip is None:
                            self._first_tip = message.tip_slot
                        if self._observer is not None and isinstance(message, StreamTip):
                            self._observer.heard(sender, message)
            now_ms = self._now_ms()
            if self._wake_ms is not None and now_ms >= self._wake_ms:
                self._learn(Clock(now_ms))
            if now_ms >= self._reporter.next_ms:
                self._report_if_due(now_ms)
            if arrived:
                source.wake()
        finally:
            self._tell()

    def _learn(self, event: LearnerEvent) -> None:
        catching = self._learned.catching is not None
        self._learned, effects = learn(self._learner, self._learned, event)
        if not catching and self._learned.catching is not None:
            self.counters["catchups"] += 1
        for name in effects.counters:
            self.counters[name] += 1
            if name == "chain_mismatch":
                _say(logging.WARNING, "listener.chain.mismatch", slot=self._learned.slot)
        for run in effects.deliver:
            self._apply(run)
            self._source.delivered(run)
        for request in effects.requests:
            self._source.request(request)
        for wanted in effects.catchup:
            self._wanted = wanted
            self._wanted_event.set()
        self._wake_ms = effects.wake_ms

    def _apply(self, run: FixedRun) -> None:
        sessions = self._sessions
        keeper = self._keeper
        slot = run.first - 1
        for data, chain in zip(run.values, run.chains, strict=True):
            slot += 1
            self._slot_changes = _NO_CHANGES
            value = decode_value(data)
            sessions, _ = deliver(sessions, slot, value, self._apply_command)
            self._sessions, self._chain = sessions, chain
            if slot == 1:
                self._genesis = _genesis_of(value)
            changes = self._slot_changes
            if changes:
                self._window.add(SlotChanges(slot, changes), len(data))
                self._ring.note(changes)
            if keeper is not None:
                keeper.rows.append(keeper.row(slot, data, chain, changes))
            self._window.applied = slot
        if self._observer is not None:
            self._observer.delivered(run)

    def _apply_command(self, slot: int, command: bytes) -> tuple[int, bytes]:
        self._state, result, self._slot_changes = apply(self._state, slot, command)
        return OutcomeStatus.APPLIED, result

    def _tell(self) -> None:
        """Hand on what this turn applied: to the store, to who waits, to subscribers."""
        applied, tip = self._window.applied, max(self._learned.tip, self._window.applied)
        keeper = self._keeper
        if keeper is not None and keeper.jump is None and (keeper.rows or tip > self._window.tip):
            rows, keeper.rows = tuple(keeper.rows), []
            keeper.writer.add(keeper.batch(rows, self._sessions, self._state, applied, tip))
        self._applied_waiters.reached(applied)
        self._window.advance(applied, tip)
        self._lateness.moved(applied, tip, self._now_ms)
        if self._first_tip is not None and applied >= self._first_tip and not self.ready:
            self._ready.set()
            _say(logging.INFO, "listener.ready", name=self.name, applied=applied, tip=tip)

    def _install(self, jump: _Jump) -> None:
        """Take a snapshot for the state, at once, unless the stream was faster."""
        now_ms = self._now_ms()
        before = self._window.applied
        if jump.slot > before:
            changes = jump.changes
            if jump.base is not self._state:
                changes = _difference(self._state, jump.state)
            self._state, self._sessions = jump.state, jump.sessions
            self._genesis, self._chain = jump.genesis, jump.chain
            self._source.begin(jump.slot, jump.chain)
            self._ring.forget()
            self._window.add(Reset(before, jump.slot, changes), 0)
            self._window.applied = jump.slot
            self.counters["resets"] += 1
            _say(logging.INFO, "listener.reset", from_slot=before, to_slot=jump.slot)
            if self._keeper is not None:
                self._keeper.jump, self._keeper.rows = jump, []
            if self._observer is not None:
                self._observer.jumped(before, jump.slot)
        self._learn(Installed(jump.slot, jump.chain, now_ms))

    # --- reports ----------------------------------------------------------------------------

    def _listeners_known(self, now_ms: int) -> int:
        return self._roster.expected(now_ms) + 1

    def _hear_report(self, report: ListenerReport) -> None:
        self.counters["reports_heard"] += 1
        if not self._roster.heard(report, self._now_ms()):
            self.counters["reports_ignored"] += 1
        if report.helps:
            able = report.ready and not report.behind_ms and not report.leaving
            self._learn(HelperHeard(report.instance, able, self._now_ms()))
        if self._observer is not None:
            self._observer.reported(report)

    def _revoked(self) -> frozenset[str]:
        """The serials of certificates that are no longer good, as of what is applied."""
        entry = self._state.config.get(REVOKED_KEY)
        if entry is None:
            return frozenset()
        try:
            return revoked_serials(entry.value)
        except ConfigError:
            return frozenset()  # voters say so in their logs

    def _report_if_due(self, now_ms: int) -> None:
        if self._reporter.due(now_ms, self._listeners_known(now_ms), self._draw()):
            self._report(now_ms)

    def _report(self, now_ms: int, *, leaving: bool = False) -> None:
        """Tell voters and listeners where this one is."""
        counters = self.counters
        stored = self.stored
        self._source.report(
            ListenerReport(
                name=self.name,
                instance=self._source.instance,
                applied=self.applied,
                stored=-1 if stored is None else stored,
                tip=self.tip,
                behind_ms=self._lateness.ms(now_ms),
                ready=self.ready,
                gaps=counters["gap_opened"],
                repairs=counters["repair_requested"],
                catchups=counters["catchups"],
                resets=counters["resets"],
                uptime_s=(now_ms - self._started_ms) // 1000,
                version=_version(),
                leaving=leaving,
                helps=self._source.helps,
            )
        )
        self._reported = True

    # --- catch-up ---------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        """Hold the catch-up conversation that the learner wants, one at a time, each answered."""
        while True:
            await self._wanted_event.wait()
            self._wanted_event.clear()
            wanted, self._wanted = self._wanted, None
            assert wanted is not None
            try:
                event = await self._converse(wanted.helper, wanted.first)
            except (CatchupError, SnapshotError) as error:
                self.counters["catchup_failed"] += 1
                _say(
                    logging.INFO,
                    "listener.catchup.failed",
                    helper=wanted.helper,
                    first=wanted.first,
                    reason=str(error),
                )
                event = CatchupFailed(wanted.helper, self._now_ms())
            self._arrived.append(event)
            self._source.wake()

    async def _help(self) -> None:
        """Serve other listeners."""
        await self._network.help(self._revoked)

    async def _converse(self, helper: int, first: int) -> LearnerEvent | _Jump:
        answer = await self._archives.entries(helper, first)
        match answer:
            case CatchupEntries() | AskOther():
                if isinstance(answer, CatchupEntries) and self._first_tip is None:
                    self._first_tip = answer.tip.slot
                return CatchupIn(helper, answer, self._now_ms())
            case SnapshotOffer():
                _say(
                    logging.INFO,
                    "listener.snapshot.offered",
                    helper=helper,
                    slot=answer.slot,
                    size_bytes=answer.size_bytes,
                )
                ids = self._cluster.voter_ids
                at = ids.index(helper) if helper in ids else 0
                data = await self._archives.snapshot(answer, (*ids[at:], *ids[:at]))
                return await self._workers.run(_decode_jump, answer, data, self._state)

    # --- its life ---------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the listener's tasks around a block; then stop them, storing what is applied."""
        failure: Exception | None = None
        raised: Exception | None = None

        async def guarded(
            work: Callable[[], Coroutine[Any, Any, None]], scope: anyio.CancelScope
        ) -> None:
            nonlocal failure
            try:
                with scope:
                    await work()
            except Exception as error:  # noqa: BLE001 - raised below, where the block ends
                if isinstance(error, ContradictionError):
                    with anyio.CancelScope(shield=True):
                        await self._workers.run(keep_evidence, self.directory, error)
                failure = failure or error
                self._end(failure)
                tasks.cancel_scope.cancel()

        keeper, scopes = self._keeper, tuple(anyio.CancelScope() for _ in range(3))
        try:
            async with anyio.create_task_group() as tasks:
                if keeper is not None:
                    tasks.start_soon(guarded, keeper.writer.run, anyio.CancelScope())
                tasks.start_soon(guarded, self._own, scopes[0])
                tasks.start_soon(guarded, self._catch_up, scopes[1])
                tasks.start_soon(guarded, self._help, scopes[2])
                try:
                    yield
                except Exception as error:  # noqa: BLE001 - raised below, not in a group
                    raised = error
                except BaseException:
                    self._end(failure)
                    raise
                for scope in scopes:
                    scope.cancel()
                if keeper is not None and keeper.jump is None and failure is None:
                    with anyio.move_on_after(STOP_DEADLINE_S):
                        await keeper.writer.wait_stored(self.applied)
                self._end(failure)
                tasks.cancel_scope.cancel()
        finally:
            self._end(failure)
            if self._reported and failure is None:
                self._report(self._now_ms(), leaving=True)
            self._source.close()
            with anyio.CancelScope(shield=True):
                await self._archives.aclose()
                if keeper is not None:
                    await keeper.queries.close()
        if raised is not None:
            raise raised
        if failure is not None:
            raise failure

    def _end(self, failure: Exception | None) -> None:
        self._window.close(failure)
        self._applied_waiters.release()


@asynccontextmanager
async def open_listener(
    cluster: ClusterConfig,
    credentials: Path | None,
    *,
    name: str,
    directory: Path | None = None,
    seed: int | None = None,
    keep: Keep | None = None,
    network: Network | None = None,
    observer: Observer | None = None,
    options: ListenerOptions = DEFAULT_OPTIONS,
) -> AsyncIterator[Listener]:
    """Follow ``cluster`` as ``name`` until the block ends.

    ``credentials`` is the folder of its certificate and keys; None only together with ``network``.
    With a ``directory`` it keeps a store there (``store.duckdb``) and goes on from it at the next
    start, without anybody's help; without one it keeps nothing and imports no database. ``seed``
    feeds the back-off of repairs (default: random), ``keep`` is the test seam of ``source``.
    ``network`` is where all bytes come from (default: the sockets of ``cluster``), ``observer`` is
    told what comes and what is done with it.

    Should the listener fail (its store, its observer, or a fixed slot of a newer feature level),
    the block is cancelled and the error raised from here: :class:`listeners.store.StoreError`,
    :class:`trex_core.machine.TooOld`. Raises :class:`ConfigError` for a bad name or credentials
    that are of no use, ``SourceError``
    if the group cannot be joined; :class:`trex_core.proof.ContradictionError` out of the block when
    voters signed contradicting tips, which are kept as EVIDENCE_FILE in ``directory``.
    """
    if not name.isprintable() or not 0 < len(name.encode(errors="replace")) <= NAME_BYTES_MAX:
        raise ConfigError(f"a listener's name has 1 to {NAME_BYTES_MAX} printable bytes")
    if network is None:
        if keep is None:
            keep = drop_from_environment(name)
        if credentials is None:
            raise ConfigError("a listener needs credentials: `trex cert issue --role listener`")
        held = Credentials(credentials, cluster.cluster_id_bytes)
        network = Sockets(cluster, held, name, directory, keep, helps=options.helps)
    if seed is None:
        seed = random.SystemRandom().getrandbits(63)
    store: Store | None = None
    workers = Workers("trex-listener")
    try:
        if directory is not None:
            from listeners.store import Store

            if (directory / EVIDENCE_FILE).exists():
                raise ConfigError(
                    f"{directory / EVIDENCE_FILE}: this listener stopped because voters signed "
                    "contradicting tips; find out which disk or voter is wrong, and only then "
                    "remove the file, and the store with it"
                )
            store = await workers.run(
                Store.open, directory / STORE_FILE, cluster.cluster_id_bytes, name
            )
        listener = Listener(
            cluster,
            name,
            directory,
            store,
            seed=seed,
            network=network,
            options=options,
            observer=observer,
            workers=workers,
        )
        async with listener.running():
            yield listener
    finally:
        if store is not None:
            await workers.run(store.close)
        workers.close()


def keep_evidence(directory: Path | None, error: ContradictionError) -> None:
    """Write the slot, its two chains and the tips that were signed where the listener keeps its
    store, for whoever must find out."""
    tips = [
        {
            "voter": tip.voter,
            "ballot": str(tip.ballot),
            "slot": tip.slot,
            "chain": tip.chain.hex(),
            "signature": tip.signature.hex(),
        }
        for tip in error.tips
    ]
    evidence = {
        "slot": error.slot,
        "chain_held": error.chains[0].hex(),
        "chain_signed": error.chains[1].hex(),
        "tips": tips,
    }
    _log.error("listener.contradiction", extra={"trex_fields": {"why": str(error), **evidence}})
    if directory is None:
        return
    draft = directory / f".{EVIDENCE_FILE}"
    with draft.open("wb") as file:
        file.write(msgspec.json.encode(evidence) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(directory / EVIDENCE_FILE)


@cache
def _version() -> str:
    """Of the distribution this is part of."""
    try:
        return distribution_version("trex-paxos")
    except PackageNotFoundError:
        return "unknown"


def _genesis_of(value: Value) -> Genesis | None:
    """What slot 1 holds; None if no genesis is in it, which no voter fixes there."""
    if value.kind != Kind.GENESIS:
        return None
    try:
        return msgspec.msgpack.decode(value.command, type=Genesis)
    except msgspec.MsgspecError:
        return None


def _decode_jump(offer: SnapshotOffer, data: bytes, base: MetadataState) -> _Jump:
    """Decode a snapshot, in a thread. Raises :class:`SnapshotError`."""
    snapshot = decode_snapshot(data)
    if (snapshot.slot, snapshot.chain) != (offer.slot, offer.chain):
        raise SnapshotError(f"it is at slot {snapshot.slot}, offered was {offer.slot}")
    try:
        state = state_from(snapshot.machine)
    except (ValueError, msgspec.MsgspecError) as error:
        raise SnapshotError(f"the metadata in it cannot be decoded: {error}") from error
    return _Jump(
        snapshot.slot,
        snapshot.chain,
        snapshot.genesis,
        snapshot.sessions,
        state,
        base,
        _difference(base, state),
    )


def _difference(before: MetadataState, after: MetadataState) -> tuple[Change, ...]:
    """The rows that differ: config, leases, members; of each ascending by key."""
    return (
        *_rows_changed("config", before.config, after.config),
        *_rows_changed("lease", before.leases, after.leases),
        *_rows_changed("member", before.members, after.members),
    )


def _rows_changed(
    kind: Literal["config", "lease", "member"],
    before: immutables.Map[Any, _R],
    after: immutables.Map[Any, _R],
) -> Iterator[Change]:
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old != new:
            yield Change(kind, str(key), old, new)
