"""The archive: the process that answers catch-up, so that no follower can occupy the voting loop.

It only *reads* the voter's journal and snapshot files, and serves what they say is fixed over TCP
(channel CATCHUP). Nothing is told to it: at each request it looks for what the voter has written
since. Every request is answered, with entries, a snapshot offer, a chunk of one, or "ask another".

How a slot is found. The archive holds no values, only *bases*: places in the journal from which
``state.replay`` can begin, each a (fixed slot, chain, segment, offset) such that every value above
that slot stands behind it. A segment's header is one, a snapshot another, and more are noted while
reading, BASE_SLOTS apart. A :class:`Cursor` replays from a base, which checks the hash chain of
all that is served; it stays with its connection, so that the next chunk goes on where the last one
ended. What is read may be unsynced, or half written: a slot is fixed whether or not this disk
remembers it, and half an entry does not pass its checksum and counts as "not there yet".

Bounds: CONNECTIONS_MAX connections, one request and one answer of each in memory, CURSORS_MAX
cursors, IDLE_S for the next request, WRITE_S for taking an answer. Garbage closes its connection
and is counted.

Run as ``python -m voters.archive --config cluster.toml --id N``. It prints ``ready`` and ends when
its standard input ends: with the voter that started it, however that died.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import logging
import os
import signal
import ssl
import sys
import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import msgspec

from trex_core.access import Holder, revoked_serials, voter_name
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.messages import (
    NO_BALLOT,
    RUN_BYTES_MAX,
    RUN_SLOTS_MAX,
    SNAPSHOT_SLOTS,
    AskOther,
    CatchupEntries,
    CatchupMessage,
    CatchupRequest,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
)
from trex_core.seal import Signer
from trex_core.snapshot import DIGEST_BYTES, HEADER_BYTES, SnapshotError, decode_snapshot
from trex_core.snapshot import read_header as read_snapshot_header
from trex_core.state import (
    AcceptRecord,
    FixedRecord,
    FixedRun,
    InstallRecord,
    Record,
    State,
    above,
    replay,
)
from trex_core.wire import (
    HEADER_BYTES as FRAME_HEADER_BYTES,
)
from trex_core.wire import (
    Channel,
    FrameError,
    Identity,
    body_bytes,
    decode_catchup,
    encode_body,
    frame,
    unframe,
)
from voters.config import (
    StartError,
    VoterPaths,
    credentials_folder,
    decode_setup,
    read_cluster,
    voter_paths,
)
from voters.credentials import Credentials, other_end
from voters.frames import Greeter, keep_alive, port_in_time
from voters.journal import (
    SECTOR_BYTES,
    Batch,
    Entry,
    SegmentHeader,
    UnreadableError,
    read_entry,
    read_header,
    segment_name,
    segment_numbers,
)
from voters.logs import LOG, JsonLines, log
from voters.snapshots import snapshot_name, snapshot_slots

CONNECTIONS_MAX: Final = 128
"""Most followers at a time; one more takes the place of the oldest that never asked anything, or
of one of whoever has the most, or is told to ask another."""
CURSORS_MAX: Final = 16
"""Most connections whose place in the journal is kept open; the others seek theirs again."""
STRANGER_S: Final = 10.0
"""Seconds within which a new connection must have sent its first request."""
IDLE_S: Final = 60.0
"""Seconds within which the next request must have come."""
WRITE_S: Final = 30.0
"""Seconds within which a follower must have taken an answer."""
CLOSE_S: Final = 1.0
"""Seconds that connections are given to end when the archive does."""
REQUEST_BYTES_MAX: Final = 4096
"""Largest body of a request, in bytes."""
OFFER_S: Final = 3.0
"""Seconds that a follower waits for the first reading of a whole snapshot; then it is told to ask
again, or another. Less than followers wait for an answer."""
SNAPSHOT_CHUNK_BYTES: Final = 1 << 18
"""Bytes of one SnapshotChunk."""
FAR_BEHIND_SLOTS: Final = 64 * SNAPSHOT_SLOTS
"""A follower that lacks more slots than this is offered a snapshot though the log reaches back:
replaying would take it minutes."""
BASE_SLOTS: Final = 256
BASE_BYTES: Final = 1 << 20
"""While reading, a base is noted each so many slots or bytes: what a seek reads in vain."""
READ_BYTES: Final = 1 << 17
"""Bytes read from a segment at a time, at least."""
SLICE_ENTRIES: Final = 64
"""Journal entries read before other connections get a turn."""
FOLLOWERS: Final = ("voter", "listener", "admin")
"""Whose certificates may ask for what was fixed."""
REFRESH_S: Final = 1.0
"""Seconds between two looks whether the credentials were written anew."""
LOG_S: Final = 1.0
"""Dropped connections are logged at most once in so many seconds, with their counts; so is each
trouble with a disk, for whoever asks can ask again at once."""

assert BASE_SLOTS <= SNAPSHOT_SLOTS < FAR_BEHIND_SLOTS, "bases are finer than snapshots"


class DamagedError(Exception):
    """The journal cannot be read where it must be readable; the voter will say so at its start."""


class Head(msgspec.Struct, frozen=True):
    """The start of a segment: whose it is, its header, and where its first batch begins."""

    number: int
    identity: Identity
    header: SegmentHeader
    end: int


class Base(msgspec.Struct, frozen=True):
    """Replaying can begin at ``offset`` of segment ``number``: all values above slot ``fixed``,
    where the chain is ``chain``, stand there or later."""

    fixed: int
    chain: bytes
    number: int
    offset: int


class Files:
    """What stands in the journal and snapshot directories: read-only, and looked at anew by
    :meth:`refresh` only. All methods raise ``FileNotFoundError`` when a file was deleted since."""

    def __init__(self, paths: VoterPaths, cluster_id: bytes) -> None:
        self.paths = paths
        self.cluster_id = cluster_id
        self.heads: list[Head] = []
        self.snapshots: list[tuple[int, bytes]] = []
        """(slot, chain) of the snapshots, ascending."""
        self._noted: list[Base] = []

    def refresh(self) -> None:
        """Look which segments and snapshots came and went."""
        numbers = segment_numbers(_names(self.paths.journal))
        present = set(numbers)
        self.heads = [head for head in self.heads if head.number in present]
        newest = self.heads[-1].number if self.heads else 0
        for number in numbers:
            if number > newest:
                head = self._head(number)
                if head is None:
                    break
                self.heads.append(head)
        if self.heads and self._noted and self._noted[0].number < self.heads[0].number:
            oldest = self.heads[0].number
            self._noted = [base for base in self._noted if base.number >= oldest]
        try:
            slots = snapshot_slots(_names(self.paths.snapshots))
        except FileNotFoundError:
            slots = []
        known = dict(self.snapshots)
        self.snapshots = [
            (slot, chain)
            for slot in slots
            if (chain := known.get(slot) or self._snapshot_chain(slot)) is not None
        ]

    def _head(self, number: int) -> Head | None:
        try:
            data = self.read(number, 0, 8 * SECTOR_BYTES)
            identity, header, end = read_header(data, number)
        except (FileNotFoundError, UnreadableError, FrameError):
            return None
        return Head(number, identity, header, end) if self._is_ours(identity) else None

    def _is_ours(self, identity: Identity) -> bool:
        return identity.cluster_id == self.cluster_id

    def _snapshot_chain(self, slot: int) -> bytes | None:
        with suppress(FileNotFoundError, SnapshotError):
            found, chain = read_snapshot_header(self.read_snapshot(slot, 0, HEADER_BYTES))
            if found == slot:
                return chain
        return None

    def read(self, number: int, offset: int, size_bytes: int) -> bytes:
        """Bytes of a segment; fewer at its end."""
        return _read(self.paths.journal / segment_name(number), offset, size_bytes)

    def read_snapshot(self, slot: int, offset: int, size_bytes: int) -> bytes:
        """Bytes of a snapshot; fewer at its end."""
        return _read(self.paths.snapshots / snapshot_name(slot), offset, size_bytes)

    def head(self, number: int) -> Head | None:
        """The start of a segment; None when it is not (or no longer) there."""
        index = number - self.heads[0].number if self.heads else -1
        if not 0 <= index < len(self.heads) or self.heads[index].number != number:
            return None
        return self.heads[index]

    def note(self, base: Base) -> None:
        """Remember a place to begin, if there is none near it."""
        index = bisect_right(self._noted, base.fixed, key=lambda held: held.fixed)
        if index:
            before = self._noted[index - 1]
            near_slots = base.fixed - before.fixed < BASE_SLOTS
            if near_slots and before.number == base.number:
                if base.offset - before.offset < BASE_BYTES:
                    return
            elif base.fixed == before.fixed:
                return
        self._noted.insert(index, base)

    def base_below(self, first: int) -> Base | None:
        """The place nearest to slot ``first`` from which it can be reached; None: there is none."""
        best = -1
        found: Base | None = None
        index = bisect_right(self._noted, first - 1, key=lambda held: held.fixed)
        if index:
            found = self._noted[index - 1]
            best = found.fixed
        marks = [(head.header.fixed, head.header.chain) for head in self.heads]
        for fixed, chain in (*reversed(marks), *reversed(self.snapshots)):
            if best < fixed < first:
                start = self._first_with_all_above(fixed)
                if start is not None:
                    best = fixed
                    found = Base(fixed, chain, start.number, start.end)
        return found

    def _first_with_all_above(self, fixed: int) -> Head | None:
        for head in reversed(self.heads):
            if head.header.last_slot <= fixed:
                return head
        return None


def _names(directory: Path) -> list[str]:
    with os.scandir(directory) as found:
        return [entry.name for entry in found]


def _read(path: Path, offset: int, size_bytes: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, size_bytes, offset)
    finally:
        os.close(fd)


class Cursor:
    """Replays the journal from a base on, entry by entry; ``take`` hands out what is fixed."""

    def __init__(self, files: Files, base: Base) -> None:
        self._files = files
        self._number = base.number
        self._offset = base.offset
        self._state = State(NO_BALLOT, base.fixed, base.chain, (), None)
        self._window: deque[tuple[int, int, int]] = deque()
        """(last slot, segment, offset) of the accepts that may hold slots above the fixed one"""
        self._data = b""
        self._data_at = 0
        self._entry_at = 0
        self._ready: deque[FixedRun] = deque()
        self.ready_slots = 0
        self.ready_bytes = 0
        """What ``take`` can give."""
        self.keeps_runs = True
        """Whether fixed runs are kept for ``take``; the cursor at the tip keeps none."""

    @property
    def tip(self) -> tuple[int, bytes]:
        """The newest fixed slot read so far, and the chain there."""
        return self._state.fixed, self._state.chain

    @property
    def next_slot(self) -> int:
        """The slot that ``take`` gives next."""
        return self._ready[0].first if self._ready else self._state.fixed + 1

    def skip_below(self, first: int) -> None:
        """Forget the fixed slots below ``first``."""
        while self._ready and self._ready[0].first < first:
            run = self._pop()
            if run.last >= first:
                self._push(_from(run, first))

    def advance(self) -> bool:
        """Read one entry; False when there is no further one yet. Raises :class:`DamagedError`,
        and ``FileNotFoundError`` when the segment was deleted."""
        entry = self._next_entry()
        if entry is None:
            return False
        match entry:
            case SegmentHeader(fixed=fixed, chain=chain):
                self._fold(FixedRecord(fixed, chain))
            case Batch(records=records):
                for record in records:
                    self._fold(record)
                self._note()
            case _:
                pass
        return True

    def _fold(self, record: Record) -> None:
        state = self._state
        match record:
            case InstallRecord(slot=slot, chain=chain) if slot > state.fixed:
                # The values in between never were in this journal: it goes on above them.
                self._state = State(NO_BALLOT, slot, chain, above(state.accepted, slot), None)
                return
            case AcceptRecord(first=first, values=values):
                last = first + len(values) - 1
                if last > state.fixed:
                    self._window.append((last, self._number, self._entry_at))
            case _:
                pass
        try:
            self._state, runs = replay(state, record)
        except ValueError as error:
            raise DamagedError(f"{segment_name(self._number)}: {error}") from error
        if self.keeps_runs:
            self._ready.extend(runs)
            for run in runs:
                self.ready_slots += len(run.values)
                self.ready_bytes += sum(map(len, run.values))

    def _note(self) -> None:
        fixed, chain = self.tip
        while self._window and self._window[0][0] <= fixed:
            self._window.popleft()
        number, offset = self._window[0][1:] if self._window else (self._number, self._offset)
        self._files.note(Base(fixed, chain, number, offset))

    def _next_entry(self) -> Entry | None:
        while True:
            self._entry_at = self._offset
            head = self._files.head(self._number)
            if head is None:
                raise FileNotFoundError(segment_name(self._number))
            found = self._read_entry(head.identity)
            if found is not None:
                entry, self._offset = found
                return entry
            following = self._files.head(self._number + 1)
            if following is None:
                return None
            if self._offset < following.header.previous_end:
                # It was written before the next segment was, so now it must be readable.
                self._data = b""
                found = self._read_entry(head.identity)
                if found is None:
                    raise DamagedError(f"{segment_name(self._number)} at byte {self._offset}")
                entry, self._offset = found
                return entry
            self._number, self._offset = following.number, following.end
            self._data = b""
            return following.header

    def _read_entry(self, identity: Identity) -> tuple[Entry, int] | None:
        """The entry at the offset and where it ends; None when it cannot be read (yet)."""
        size_bytes = 0
        while True:
            at = self._offset - self._data_at
            try:
                if not 0 <= at < len(self._data):
                    raise UnreadableError("not read yet")
                entry, end = read_entry(self._data, at, self._number, identity, self._data_at)
            except UnreadableError as error:
                if error.end_at is None:
                    wanted = READ_BYTES
                elif error.end_at > len(self._data):
                    wanted = max(READ_BYTES, error.end_at - at)
                else:
                    wanted = max(READ_BYTES, len(self._data))
                if wanted <= size_bytes:
                    self._data = b""
                    return None
                size_bytes = wanted
                self._data = self._files.read(self._number, self._offset, size_bytes)
                self._data_at = self._offset
            else:
                return entry, self._data_at + end

    def take(self, bytes_max: int) -> tuple[int, bytes, tuple[bytes, ...], bytes] | None:
        """Fixed entries that were read: first slot, chain before it, values, chain at the last of
        them; at least one, at most RUN_SLOTS_MAX and, beyond the first, ``bytes_max`` bytes. None:
        nothing was read."""
        if not self._ready:
            return None
        first, chain_before = self._ready[0].first, self._ready[0].chain_before
        chain = chain_before
        values: list[bytes] = []
        size = 0
        while self._ready and self._ready[0].first == first + len(values):
            run = self._pop()
            for index, value in enumerate(run.values):
                size += len(value)
                if values and (size > bytes_max or len(values) == RUN_SLOTS_MAX):
                    self._push(_from(run, run.first + index))
                    return first, chain_before, tuple(values), chain
                values.append(value)
                chain = run.chains[index]
        return first, chain_before, tuple(values), chain

    def _pop(self) -> FixedRun:
        run = self._ready.popleft()
        self.ready_slots -= len(run.values)
        self.ready_bytes -= sum(map(len, run.values))
        return run

    def _push(self, run: FixedRun) -> None:
        self._ready.appendleft(run)
        self.ready_slots += len(run.values)
        self.ready_bytes += sum(map(len, run.values))


def _from(run: FixedRun, first: int) -> FixedRun:
    """The part of a run from slot ``first`` on."""
    skip = first - run.first
    if skip == 0:
        return run
    return FixedRun(first, run.chains[skip - 1], run.values[skip:], run.chains[skip:])


class Archive:
    """Answers requests from the files of one voter. What it says of fixed slots and snapshots, it
    signs as that voter."""

    def __init__(
        self,
        paths: VoterPaths,
        cluster_id: bytes,
        signer: Signer,
        *,
        far_behind_slots: int = FAR_BEHIND_SLOTS,
    ) -> None:
        self._signer = signer
        self.files = Files(paths, cluster_id)
        self._tip_cursor: Cursor | None = None
        self._far_behind_slots = far_behind_slots
        self._tip_lock = asyncio.Lock()
        self._told_s: dict[str, float] = {}
        self._offers: dict[int, asyncio.Task[SnapshotOffer | None]] = {}

    @property
    def identity(self) -> Identity:
        """Whose journal it is, at its newest boot."""
        if self.files.heads:
            return self.files.heads[-1].identity
        return Identity(self.files.cluster_id)

    async def tip(self) -> tuple[int, bytes]:
        """The newest fixed slot in the journal now, and the chain there."""
        async with self._tip_lock:
            self.files.refresh()
            for _ in range(2):
                cursor = self._tip_cursor
                if cursor is None:
                    base = self.files.base_below(1 << 63)
                    if base is None:
                        raise DamagedError("no place in the journal to begin at")
                    cursor = Cursor(self.files, base)
                    cursor.keeps_runs = False
                try:
                    await _read_until(cursor, _to_the_end)
                except FileNotFoundError:
                    self._tip_cursor = None  # it was left behind by deletion: begin anew
                    self.files.refresh()
                    continue
                self._tip_cursor = cursor
                return cursor.tip
            raise DamagedError("the journal is deleted faster than it is read")

    def tell(self, event: str, why: str) -> None:
        """Log a trouble, now and then."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._told_s.get(event, 0.0):
            self._told_s[event] = now_s + LOG_S
            log(logging.ERROR, event, why=why)

    async def answer(
        self, message: CatchupMessage, cursor: Cursor | None
    ) -> tuple[CatchupMessage, Cursor | None]:
        """The answer to a request; ``cursor`` is that of the connection, and the one to keep."""
        for _ in range(2):
            try:
                match message:
                    case CatchupRequest():
                        return await self._entries(message, cursor)
                    case SnapshotRequest(slot=slot, offset=offset):
                        return self._chunk(slot, offset), cursor
                    case _:
                        raise FrameError("body")
            except DamagedError as error:
                self.tell("archive.journal.damaged", str(error))
                return AskOther(0, f"this voter's journal cannot be read: {error}"), None
            except TimeoutError:
                return AskOther(0, "a snapshot is being read here for the first time"), None
            except FileNotFoundError:
                cursor = None  # the voter deleted a segment while it was read: look again
        return AskOther(0, "deleted here while it was read: ask again"), None

    async def _entries(
        self, request: CatchupRequest, cursor: Cursor | None
    ) -> tuple[CatchupMessage, Cursor | None]:
        first = max(1, request.first)
        tip_slot, tip_chain = await self.tip()
        if first > tip_slot:
            tip = self._signer.signed_tip(tip_slot, tip_chain)
            return CatchupEntries(first, tip_chain, (), tip, tip), cursor
        if tip_slot - first >= self._far_behind_slots:
            offer = await self._offer(max(first, tip_slot - self._far_behind_slots))
            if offer is not None:
                return offer, None
        if cursor is None or cursor.next_slot != first:
            base = self.files.base_below(first)
            cursor = Cursor(self.files, base) if base is not None else None
        if cursor is not None:
            bytes_max = min(max(1, request.bytes_max), RUN_BYTES_MAX)
            taken = await _take(cursor, first, bytes_max)
            if taken is not None:
                chain_before, values, chain = taken
                end = self._signer.signed_tip(first + len(values) - 1, chain)
                tip = end
                if tip_slot > end.slot:
                    tip = self._signer.signed_tip(tip_slot, tip_chain)
                return CatchupEntries(first, chain_before, values, end, tip), cursor
        offer = await self._offer(first)
        if offer is not None:
            return offer, None
        return AskOther(0, f"neither log nor snapshot here reaches slot {first}"), None

    async def _offer(self, first: int) -> SnapshotOffer | None:
        """The newest intact snapshot at or above slot ``first``. Raises ``TimeoutError``."""
        slots = [slot for slot, _ in self.files.snapshots]
        for slot in set(self._offers) - set(slots):
            del self._offers[slot]
        for slot in reversed(slots):
            if slot < first:
                return None
            reading = self._offers.get(slot)
            if reading is None or (reading.done() and reading.exception() is not None):
                reading = self._offers[slot] = asyncio.create_task(self._examined(slot))
            async with asyncio.timeout(OFFER_S):
                # Read once, whoever asks meanwhile and however soon they give up.
                offer = await asyncio.shield(reading)
            if offer is not None:
                return offer
        return None

    async def _examined(self, slot: int) -> SnapshotOffer | None:
        path = self.files.paths.snapshots / snapshot_name(slot)
        found = await asyncio.to_thread(_examine, path, slot)
        return self._signer.offer(found) if found is not None else None

    def _chunk(self, slot: int, offset: int) -> CatchupMessage:
        if slot < 1 or offset < 0:
            raise FrameError("body")
        try:
            data = self.files.read_snapshot(slot, min(offset, 1 << 62), SNAPSHOT_CHUNK_BYTES)
        except FileNotFoundError:
            return AskOther(0, f"the snapshot at slot {slot} is not here")
        return SnapshotChunk(slot, offset, data)


def _examine(path: Path, slot: int) -> SnapshotOffer | None:
    """Read a whole snapshot; its offer, or None when it is damaged or gone."""
    try:
        data = path.read_bytes()
        snapshot = decode_snapshot(data)
    except FileNotFoundError:
        return None
    except SnapshotError as error:
        log(logging.ERROR, "archive.snapshot.damaged", path=str(path), why=str(error))
        return None
    digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
    return SnapshotOffer(slot, snapshot.chain, len(data), digest)


def _to_the_end() -> bool:
    return False


async def _read_until(cursor: Cursor, done: Callable[[], bool]) -> None:
    """Advance until ``done`` or there is nothing more, a slice at a time."""
    while True:
        for _ in range(SLICE_ENTRIES):
            if done() or not cursor.advance():
                return
        await asyncio.sleep(0)  # other connections' turn


async def _take(
    cursor: Cursor, first: int, bytes_max: int
) -> tuple[bytes, tuple[bytes, ...], bytes] | None:
    """Chain before ``first``, values from it on, and the chain at the last of them; None when the
    cursor cannot give them."""

    def enough() -> bool:
        cursor.skip_below(first)
        return cursor.ready_slots >= RUN_SLOTS_MAX or cursor.ready_bytes >= bytes_max

    try:
        await _read_until(cursor, enough)
    except (DamagedError, FileNotFoundError):
        if cursor.next_slot != first or not cursor.ready_slots:
            raise  # else what was read before it is good
    if cursor.next_slot != first:
        return None
    taken = cursor.take(bytes_max)
    return taken[1:] if taken is not None else None


# --- the server -----------------------------------------------------------------------------


class ArchiveServer:
    """The TCP side: connections, their limits, and what is counted."""

    def __init__(self, archive: Archive, cluster_id: bytes, credentials: Credentials) -> None:
        self.archive = archive
        self.counters: Counter[str] = Counter()
        self._credentials = credentials
        self._cluster_id = cluster_id
        self._open: dict[asyncio.StreamWriter, bool] = {}
        """Connections, oldest first, and whether each has asked something."""
        self._cursors: dict[asyncio.StreamWriter, Cursor] = {}
        """Of the connections that asked last."""
        self._tasks: set[asyncio.Task[None] | None] = set()
        self._holders: dict[asyncio.StreamWriter, Holder] = {}
        self._revoked: frozenset[str] = frozenset()
        self._greeter: Greeter | None = None
        self._logged_at = 0.0

    async def listen(self, host: str, port: int) -> None:
        """Begin to accept. Raises :class:`StartError` when the port stays taken: the archive of a
        voter that was killed, which had only begun, may bind it once more before it ends."""
        sock = await port_in_time(host, port, "archive_port")
        self._greeter = Greeter("tcp", sock, self._credentials.server, self._protocol, self.count)

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=FRAME_HEADER_BYTES + REQUEST_BYTES_MAX)
        return asyncio.StreamReaderProtocol(reader, self._serve)

    async def aclose(self) -> None:
        """Close all connections and stop listening."""
        if self._greeter is not None:
            await self._greeter.aclose()
        for writer in list(self._open):
            writer.transport.abort()
        tasks = [task for task in self._tasks if task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)

    def revoke(self, serials: frozenset[str]) -> None:
        """These certificates are no longer good: their connections end."""
        self._revoked = serials
        for writer, holder in list(self._holders.items()):
            if holder.serial in serials:
                self.count("revoked")
                writer.transport.abort()

    def count(self, name: str) -> None:
        """Count a drop, and log the counts now and then."""
        self.counters[name] += 1
        now = asyncio.get_running_loop().time()
        if now - self._logged_at >= LOG_S:
            self._logged_at = now
            log(logging.WARNING, "archive.connection.dropped", **self.counters)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            keep_alive(writer.transport)
            holder = other_end(writer.get_extra_info("ssl_object"), self._cluster_id)
            role = holder.grant.role
            if role not in FOLLOWERS or holder.serial in self._revoked:
                self.count("denied")
                await self._send(writer, AskOther(0, f"a {role} has no business here"))
                return
            self._holders[writer] = holder
            # No answer waits in memory behind another: drain() returns when all was taken.
            # (High is 1: TLS of asyncio pauses at that size already, not above it.)
            writer.transport.set_write_buffer_limits(high=1, low=0)
            if not self._admit(writer, holder.serial):
                self.count("too_many")
                await self._send(writer, AskOther(0, "too many followers here"))
                return
            await self._converse(reader, writer)
        except ConfigError:
            self.count("denied")
        except FrameError as error:
            self.count(f"garbage.{error.reason}")
        except TimeoutError:
            self.count("too_slow")
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            self.count("broken")
        except OSError as error:
            self.count("disk")
            self.archive.tell("archive.disk.failed", str(error))
        finally:
            self._open.pop(writer, None)
            self._holders.pop(writer, None)
            self._cursors.pop(writer, None)
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()
            else:
                writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            self._tasks.discard(task)

    def _admit(self, writer: asyncio.StreamWriter, serial: str) -> bool:
        if len(self._open) >= CONNECTIONS_MAX:
            victim, reason = self._least_missed(serial)
            if victim is None:
                return False
            self.count(reason)
            del self._open[victim]
            victim.transport.abort()
        self._open[writer] = False
        return True

    def _least_missed(self, serial: str) -> tuple[asyncio.StreamWriter | None, str]:
        """Who makes room for one more of certificate ``serial``, and why: the oldest stranger, or
        the oldest of the certificate that has the most, if that is more than ``serial`` will have:
        listeners share theirs, and however many they are, a voter that is behind gets in."""
        for held, asked in self._open.items():
            if not asked:
                return held, "stranger"
        serials = {held: self._holders[held].serial for held in self._open}
        counts = Counter(serials.values())
        most = max(counts, key=counts.__getitem__)
        if counts[most] <= counts[serial] + 1:
            return None, ""
        return next(held for held in self._open if serials[held] == most), "most_of_one_holder"

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        deadline_s = STRANGER_S
        while True:
            async with asyncio.timeout(deadline_s):
                message = await self._receive(reader)
            if message is None:
                return
            if writer in self._open:
                self._open[writer] = True
            deadline_s = IDLE_S
            answer, cursor = await self.archive.answer(message, self._cursors.pop(writer, None))
            if cursor is not None:
                self._cursors[writer] = cursor
                if len(self._cursors) > CURSORS_MAX:
                    del self._cursors[next(iter(self._cursors))]
            await self._send(writer, answer)
            del answer, message

    async def _receive(self, reader: asyncio.StreamReader) -> CatchupMessage | None:
        try:
            header = await reader.readexactly(FRAME_HEADER_BYTES)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise
        size = body_bytes(header, self._cluster_id, REQUEST_BYTES_MAX)
        body = await reader.readexactly(size)
        return decode_catchup(unframe(header + body, self._cluster_id, Channel.CATCHUP).body)

    async def _send(self, writer: asyncio.StreamWriter, answer: CatchupMessage) -> None:
        writer.write(frame(self.archive.identity, Channel.CATCHUP, encode_body(answer)))
        async with asyncio.timeout(WRITE_S):
            await writer.drain()


# --- the process ----------------------------------------------------------------------------


def _watch_stdin(told: Callable[[bytes], None], stop: Callable[[], None]) -> None:
    """Call ``told`` with each line of standard input, and ``stop`` once it ends. In a thread: it
    may be any kind of file."""

    def watch() -> None:
        rest = b""
        with suppress(OSError):
            while data := os.read(0, 1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    told(line)
        stop()

    threading.Thread(target=watch, name="archive-stdin", daemon=True).start()


async def _take_up(credentials: Credentials, voter_id: int) -> None:
    """Read the credentials again whenever they were written anew, until cancelled."""
    while True:
        await asyncio.sleep(REFRESH_S)
        try:
            if credentials.refresh():
                log(logging.INFO, "archive.credentials.read", voter=voter_id)
        except ConfigError as error:
            log(logging.ERROR, "archive.credentials.refused", voter=voter_id, why=str(error))


async def _run(
    cluster: ClusterConfig, voter_id: int, paths: VoterPaths, credentials: Credentials
) -> None:
    entry = cluster.voter(voter_id)
    cluster_id = cluster.cluster_id_bytes
    signer = Signer(credentials.keys.signing, cluster_id, voter_id)
    server = ArchiveServer(Archive(paths, cluster_id, signer), cluster_id, credentials)
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def told(line: bytes) -> None:
        with suppress(RuntimeError, ConfigError):
            serials = revoked_serials(line.decode(errors="replace"))
            loop.call_soon_threadsafe(server.revoke, serials)

    def stop() -> None:
        with suppress(RuntimeError):  # the loop ended meanwhile
            loop.call_soon_threadsafe(over.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    _watch_stdin(told, stop)  # first: the voter may be gone already
    await server.listen(entry.host, entry.archive_port)
    print("ready", flush=True)  # noqa: T201 - the parent waits for this line
    async with asyncio.TaskGroup() as group:
        taking_up = group.create_task(_take_up(credentials, voter_id))
        await over.wait()
        taking_up.cancel()
    await server.aclose()
    log(logging.INFO, "archive.process.ended", **server.counters)


def main(arguments: list[str] | None = None) -> int:
    """Run the archive of one voter until standard input ends. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m voters.archive", description=__doc__)
    parser.add_argument("--config", type=Path, default=None, help="cluster.toml")
    parser.add_argument("--id", type=int, default=0, help="id of the voter it reads for")
    parser.add_argument("--credentials", type=Path, default=None, help="the voter's folder of them")
    parser.add_argument("--setup", default="", help="instead of both: config.Setup as JSON")
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        if options.setup:
            setup = decode_setup(options.setup)
            cluster, voter_id, paths = setup.cluster, setup.voter, setup.paths
            folder = Path(setup.credentials)
        else:
            cluster, base = read_cluster(options.config)
            voter_id, paths = options.id, voter_paths(cluster, options.id, base)
            folder = credentials_folder(base, options.credentials, voter_name(voter_id))
        if not paths.journal.is_dir():
            raise StartError(f"{paths.journal}: there is no journal here; start the voter first")
        credentials = Credentials(folder, cluster.cluster_id_bytes)
        options_of_loop = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
        anyio.run(_run, cluster, voter_id, paths, credentials, backend_options=options_of_loop)
    except (ConfigError, StartError) as error:
        print(f"trex-voter archive: {error}", file=sys.stderr)  # noqa: T201 - for a person
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
