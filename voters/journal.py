"""The journal: makes promises, accepts and fixed slots outlive a crash. It alone writes segments.

Format
======
A journal is a directory of segment files ``<10 digits>.journal``, numbered without a hole. A
segment is filled with zeros before its first use (so that a sync writes data only, no metadata)
and is never used twice. It is a row of frames of :mod:`trex_core.wire` (channel JOURNAL, salt =
segment number, counter = offset of the frame in its segment, sender/incarnation/boot = the
voter's), one behind the other without padding, then zeros. A frame's body is ::

    offset size field
    0      4    length of the body with all bits inverted: the length is known to be right
                before the checksum is looked at
    4      ..   MessagePack of one entry
    last   1    0xff: the last sector of a frame is never all zero

An entry is one of

* :class:`SegmentHeader`, first in each segment and only there: the promise, fixed slot, chain and
  genesis *before* the batch behind it, the highest slot named in any earlier segment, the end of
  the segment before, and the size that this file was filled to. Deleting a segment therefore
  forgets nothing: everything that holds for good stands in the next header.
* :class:`Batch`: records, and the offset below which this segment was synced before the batch was
  written (everything in earlier segments was). One write is one or more Batch frames, preceded by
  the header when it opens a segment, followed by one ``fdatasync``.
* :class:`Stop`: the voter ended in order; nothing follows in this segment.

Reading
=======
Only the last write can be unfinished, since the next waits for its sync. So at the first
unreadable frame, at offset o of segment n, the reader decides:

1. Everything from o on is zero, or the file ends at o: the end.
2. n is not the last segment, or a readable frame behind o names a synced offset above o, or a Stop
   is among the entries before: synced data was lost. Refused.
3. The frame is cut off by the end of the file, or one of its 512-byte sectors is still zero: a torn
   write that nobody was told about (etcd's rule). Cut, and reported.
4. Anything else is damage. Refused.

Files missing or too short are damage too: a file is filled, and its name and size are durable,
before its first use, and a start shortens it only when the header of the next one is durable. So
the last segment must be as long as its header says (only a batch larger than that can be cut off by
the end of the file): else its end is lost, or all that was written after it. And a segment that was
prepared proves that the one before it is there and was given its header.

What cannot be told apart: in the very last write only, damage that turns a sector to zeros, or any
damage in a frame whose values hold an aligned sector of zeros, looks like a torn write. And a last
segment whose bytes are zeros from the start of some entry on, or which is gone together with what
was prepared behind it, looks as if no more had been written.

Threads
=======
One loop calls ``append`` and ``submit``; the sync thread alone writes; the keeper thread prepares
the next segment and deletes old ones. The loop is woken through an eventfd. A failed or short
write or sync is never tried again: the journal is failed for good and the voter must end, because
after a failed sync nobody knows what is on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from trex_core.messages import NO_BALLOT, TCP_BODY_BYTES_MAX, Ballot, Genesis
from trex_core.state import (
    AcceptRecord,
    FixedRecord,
    FixedRun,
    InstallRecord,
    LearnedRecord,
    PromiseRecord,
    Record,
    ReplayError,
    State,
    chain_start,
    replay,
)
from trex_core.wire import (
    CLUSTER_ID_BYTES,
    HEADER_BYTES,
    Channel,
    Frame,
    FrameError,
    Identity,
    body_bytes,
    frame,
    unframe,
)

SEGMENT_SUFFIX: Final = ".journal"
SEGMENT_BYTES: Final = 16 << 20
"""Default size of a segment, in bytes."""
RETAIN_BYTES: Final = 1 << 30
"""Default of what is kept of segments that snapshots have made superfluous, in bytes."""
SECTOR_BYTES: Final = 512
"""What a disk writes whole or not at all, in bytes."""
FILL_BYTES: Final = 1 << 18
"""A coming segment is filled this many bytes at a time, each synced, so that a batch never waits
for more than one such piece."""
SYNC_SAMPLES: Final = 1024
"""The newest syncs of which percentiles are told."""

_GUARD_BYTES: Final = 4
_END: Final = b"\xff"
_OVERHEAD_BYTES: Final = _GUARD_BYTES + len(_END)
_LENGTH_AT: Final = 56  # offset of the length in a frame's header: the table in wire
_SAME_BYTES: Final = 20  # magic, version, channel and cluster id: the same in all our frames
_ALL_ONES: Final = 0xFFFFFFFF
_FORMAT_NAME: Final = "format.tmp"
_KEEP: Final = (
    "Do not repair, delete or format it: keep the files, leave this voter stopped (the others go "
    "on without it) and replace its disk."
)

assert HEADER_BYTES + _OVERHEAD_BYTES < SECTOR_BYTES, "a frame's header spans two sectors at most"


class JournalError(Exception):
    """The journal cannot be used. The message says which file, where, and what to do.

    ``path`` is the file or directory, ``offset`` the byte in it (None: the whole).
    """

    def __init__(self, path: str | Path, why: str, offset: int | None = None) -> None:
        where = str(path) if offset is None else f"{path} at byte {offset}"
        super().__init__(f"{where}: {why}")
        self.path = Path(path)
        self.offset = offset


class JournalFailedError(Exception):
    """A write or sync failed while running. Final: the voter must end."""


# --- entries --------------------------------------------------------------------------------


class SegmentHeader(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First entry of a segment. ``last_slot`` is the highest slot named by any record of an
    earlier segment, ``previous_end`` the end of the segment before, ``size_bytes`` what this file
    was filled to before its first use (0: it was not), both in bytes."""

    promised: Ballot
    fixed: int
    chain: bytes
    genesis: Genesis | None
    last_slot: int
    previous_end: int
    size_bytes: int = 0


class Batch(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Records, and the offset below which the segment was synced before they were written."""

    synced: int
    records: tuple[Record, ...]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The voter ended in order; all below ``synced`` was synced."""

    synced: int


Entry: TypeAlias = SegmentHeader | Batch | Stop

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def segment_name(number: int) -> str:
    """File name of a segment."""
    return f"{number:010d}{SEGMENT_SUFFIX}"


def segment_numbers(names: Sequence[str]) -> list[int]:
    """The numbers of the segments among file names, ascending."""
    return sorted(
        int(name[:10])
        for name in names
        if len(name) == 10 + len(SEGMENT_SUFFIX)
        and name.endswith(SEGMENT_SUFFIX)
        and name[:10].isdecimal()
    )


# --- writing, purely ------------------------------------------------------------------------


class Tail(msgspec.Struct, frozen=True):
    """Where the next batch goes: ``offset`` in segment ``number``. ``last_slot`` is the highest
    slot named in the journal; ``fresh``: the segment holds nothing but its header."""

    number: int
    offset: int
    last_slot: int
    fresh: bool = True


class Write(msgspec.Struct, frozen=True):
    """``data`` for ``offset`` of segment ``number``; offset 0 opens that segment."""

    number: int
    offset: int
    data: bytes


def highest_slot(records: Sequence[Record]) -> int:
    """The highest slot that any of the records names; 0 when none does."""
    highest = 0
    for record in records:
        match record:
            case (
                AcceptRecord(first=first, values=values) | LearnedRecord(first=first, values=values)
            ):
                slot = first + len(values) - 1
            case FixedRecord(last=slot) | InstallRecord(slot=slot):
                pass
            case PromiseRecord():
                continue
        highest = max(highest, slot)
    return highest


def encode_entry(identity: Identity, number: int, offset: int, entry: Entry) -> bytes:
    """The frame of one entry at ``offset`` of segment ``number``."""
    data = _encoder.encode(entry)
    guard = (len(data) + _OVERHEAD_BYTES) ^ _ALL_ONES
    body = b"".join((guard.to_bytes(_GUARD_BYTES, "big"), data, _END))
    return frame(identity, Channel.JOURNAL, body, salt=number, counter=offset)


def encode_batch(
    identity: Identity, number: int, offset: int, synced: int, records: tuple[Record, ...]
) -> bytes:
    """The bytes of one batch for ``offset`` of segment ``number``, of which all below ``synced``
    is on the disk: one frame, or several when one would exceed TCP_BODY_BYTES_MAX."""
    data = encode_entry(identity, number, offset, Batch(synced, records))
    if len(data) - HEADER_BYTES <= TCP_BODY_BYTES_MAX:
        return data
    if len(records) == 1:
        raise ValueError(f"one record of {len(data)} bytes exceeds the limit of a frame")
    half = len(records) // 2
    before = encode_batch(identity, number, offset, synced, records[:half])
    return before + encode_batch(identity, number, offset + len(before), synced, records[half:])


def open_segment(
    identity: Identity,
    number: int,
    state: State,
    last_slot: int,
    previous_end: int,
    size_bytes: int = 0,
) -> tuple[Write, Tail]:
    """The header of a new segment, with what holds in ``state`` (whose records all are synced)."""
    header = SegmentHeader(
        state.promised, state.fixed, state.chain, state.genesis, last_slot, previous_end, size_bytes
    )
    data = encode_entry(identity, number, 0, header)
    return Write(number, 0, data), Tail(number, len(data), last_slot)


def place(
    identity: Identity, tail: Tail, records: tuple[Record, ...], before: State, segment_bytes: int
) -> tuple[Write, Tail]:
    """The one write that adds a batch behind ``tail``, and the tail after it.

    A batch that does not fit opens the next segment, whose header tells of ``before``, the state
    before these records; a batch larger than a segment makes that segment larger.
    """
    last_slot = max(tail.last_slot, highest_slot(records))
    data = encode_batch(identity, tail.number, tail.offset, tail.offset, records)
    end = tail.offset + len(data)
    if tail.fresh or end <= segment_bytes:
        return Write(tail.number, tail.offset, data), Tail(tail.number, end, last_slot, False)
    header, fresh = open_segment(
        identity, tail.number + 1, before, tail.last_slot, tail.offset, segment_bytes
    )
    data = encode_batch(identity, fresh.number, fresh.offset, 0, records)
    write = Write(fresh.number, 0, header.data + data)
    return write, Tail(fresh.number, len(write.data), last_slot, False)


# --- reading, purely ------------------------------------------------------------------------


class UnreadableError(Exception):
    """No entry can be read here. ``end_at``: where the frame ends, if its length is certain."""

    def __init__(self, why: str, end_at: int | None = None) -> None:
        super().__init__(why)
        self.end_at = end_at


def read_header(data: bytes, number: int) -> tuple[Identity, SegmentHeader, int]:
    """The header of a segment from its first bytes: whose it is, the header, its end.
    Raises :class:`UnreadableError`, or :class:`FrameError` for a format version we do not know."""
    cluster_id = data[4:_SAME_BYTES]
    try:
        length = body_bytes(data[:HEADER_BYTES], cluster_id)
    except FrameError as error:
        if error.reason == "version" and unframed_version(data):
            raise
        raise UnreadableError(error.reason) from error
    end = HEADER_BYTES + length
    if not _is_length_certain(data, 0):
        raise UnreadableError("the length is not certain")
    found, entry = _open(data, 0, end, cluster_id)
    if not isinstance(entry, SegmentHeader) or found.salt != number or found.counter != 0:
        raise UnreadableError("not the header of this segment")
    return Identity(cluster_id, found.sender, found.incarnation, found.boot), entry, end


def unframed_version(data: bytes) -> bool:
    """Whether the bytes are a journal frame of another format version with a right checksum."""
    length = int.from_bytes(data[_LENGTH_AT : _LENGTH_AT + 4], "big")
    whole = data[: HEADER_BYTES + length]
    crc = zlib.crc32(whole[64:], zlib.crc32(bytes(4), zlib.crc32(whole[:60])))
    return len(whole) == HEADER_BYTES + length and whole[60:64] == crc.to_bytes(4, "big")


def read_entry(
    data: bytes, at: int, number: int, identity: Identity, base: int = 0
) -> tuple[Entry, int]:
    """The entry at ``data[at:]``, where ``data`` begins at byte ``base`` of segment ``number`` of
    that voter and boot; and where it ends in ``data``. Raises :class:`UnreadableError`."""
    expected = frame(identity, Channel.JOURNAL, b"", salt=number, counter=base + at)
    if data[at : at + _LENGTH_AT] != expected[:_LENGTH_AT]:
        raise UnreadableError("not the header of a frame")
    if not _is_length_certain(data, at):
        raise UnreadableError("the length is not certain")
    end = at + HEADER_BYTES + int.from_bytes(data[at + _LENGTH_AT : at + _LENGTH_AT + 4], "big")
    _, entry = _open(data, at, end, identity.cluster_id)
    return entry, end


def _is_length_certain(data: bytes, at: int) -> bool:
    length = int.from_bytes(data[at + _LENGTH_AT : at + _LENGTH_AT + 4], "big")
    guard = data[at + HEADER_BYTES : at + HEADER_BYTES + _GUARD_BYTES]
    return guard == (length ^ _ALL_ONES).to_bytes(_GUARD_BYTES, "big")


def _open(data: bytes, at: int, end: int, cluster_id: bytes) -> tuple[Frame, Entry]:
    if end > len(data):
        raise UnreadableError("cut off by the end of the file", end)
    try:
        found = unframe(data[at:end], cluster_id, Channel.JOURNAL)
        return found, _decoder.decode(memoryview(found.body)[_GUARD_BYTES:-1])
    except FrameError as error:
        raise UnreadableError(f"bad {error.reason}", end) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise UnreadableError(f"bad body ({error})", end) from error


def _is_zero(data: bytes, start: int, end: int) -> bool:
    part = data[start:end]
    return part == bytes(len(part))


def _is_torn(data: bytes, at: int, end: int | None) -> bool:
    """Whether the frame at ``at`` is cut off by the end of the file or has a sector that is still
    zero. ``end``: its end, None when its header cannot be trusted."""
    if end is None:
        end = at + HEADER_BYTES + _OVERHEAD_BYTES
    if end > len(data):
        return at > 0  # a segment's header always fits: the file was filled before
    start = at
    while start < end:
        sector_end = (start // SECTOR_BYTES + 1) * SECTOR_BYTES
        if _is_zero(data, start, sector_end):
            return True
        start = sector_end
    return False


def _proof_of_sync(data: bytes, at: int, number: int, cluster_id: bytes) -> int | None:
    """Offset of a readable frame behind ``at`` that says ``at`` had been synced. Whatever its boot
    number: the header that tells it may be what is damaged."""
    same = frame(Identity(cluster_id), Channel.JOURNAL, b"")[:_SAME_BYTES]
    found = data.find(same, at + 1)
    while found >= 0:
        length = int.from_bytes(data[found + _LENGTH_AT : found + _LENGTH_AT + 4], "big")
        try:
            held, entry = _open(data, found, found + HEADER_BYTES + length, cluster_id)
        except UnreadableError:
            pass
        else:
            here = held.salt == number and held.counter == found
            if here and isinstance(entry, Batch | Stop) and entry.synced > at:
                return found
        found = data.find(same, found + 1)
    return None


class Segment(msgspec.Struct, frozen=True):
    """One segment as found: whose, its header, the end of its last entry, the size of the file,
    the highest slot named in it or earlier, and whether it ends with a Stop."""

    number: int
    identity: Identity
    header: SegmentHeader
    end: int
    size_bytes: int
    last_slot: int
    stopped: bool


class Cut(msgspec.Struct, frozen=True):
    """A torn write that was cut: ``size_bytes`` from ``offset`` of segment ``number`` on (0: the
    whole segment, it had no header yet)."""

    number: int
    offset: int
    size_bytes: int


class Survey(msgspec.Struct, frozen=True):
    """What a journal holds: its segments, the torn write to be cut (None: none), and the segment
    that was prepared but not used (0: none)."""

    segments: tuple[Segment, ...]
    cut: Cut | None
    unused: int

    @property
    def identity(self) -> Identity:
        """Cluster, voter, incarnation, and the newest boot number."""
        return self.segments[-1].identity

    @property
    def last(self) -> Segment:
        """The newest segment that was used."""
        return self.segments[-1]


def entries(
    number: int, data: bytes, cluster_id: bytes, is_last: bool, path: str | Path = ""
) -> Iterator[tuple[int, Entry, Identity, int]]:
    """The entries of a segment: (offset, entry, whose, end). Returns at the end; raises
    :class:`JournalError` for damage, :class:`UnreadableError` for a torn write (last segment)."""
    path = path or segment_name(number)
    try:
        identity, header, at = read_header(data, number)
    except FrameError as error:
        raise JournalError(
            path, "written by another version of TRex: use that version, or a newer one", 0
        ) from error
    except UnreadableError as error:
        _judge(data, 0, number, cluster_id, error, is_last, False, path)
        raise
    yield 0, header, identity, at
    stopped = False
    while at < len(data) and (data[at] or not _is_zero(data, at, len(data))):
        try:
            entry, end = read_entry(data, at, number, identity)
        except UnreadableError as error:
            _judge(data, at, number, cluster_id, error, is_last, stopped, path)
            raise
        if stopped or isinstance(entry, SegmentHeader) or entry.synced > at:
            raise JournalError(path, f"an entry that cannot stand here. {_KEEP}", at)
        stopped = isinstance(entry, Stop)
        yield at, entry, identity, end
        at = end


def _judge(
    data: bytes,
    at: int,
    number: int,
    cluster_id: bytes,
    error: UnreadableError,
    is_last: bool,
    stopped: bool,
    path: str | Path,
) -> None:
    """Return if the unreadable frame is a torn write; raise :class:`JournalError` if not."""
    if not is_last:
        raise JournalError(path, f"damaged ({error}), and later segments exist. {_KEEP}", at)
    if stopped:
        raise JournalError(path, f"data behind the record of an orderly stop. {_KEEP}", at)
    proof = _proof_of_sync(data, at, number, cluster_id)
    if proof is not None:
        raise JournalError(
            path, f"damaged ({error}); the entry at byte {proof} proves it was synced. {_KEEP}", at
        )
    if not _is_torn(data, at, error.end_at):
        raise JournalError(path, f"damaged ({error}): not a torn write. {_KEEP}", at)


def survey(
    numbers: Sequence[int],
    read: Callable[[int], bytes],
    cluster_id: bytes,
    voter: int,
    directory: str | Path = "journal",
) -> Survey:
    """Read a whole journal and judge it, by the rules in this module's docstring. Pure but for
    ``read``, which gives the bytes of a segment. Raises :class:`JournalError`."""
    directory = Path(directory)
    if not numbers:
        raise JournalError(
            directory,
            "there is no journal here. If this voter is new, format it: "
            f"`trex-voter format --id {voter}`. If it ran before, its promises are lost with the "
            "journal: do not format it, put the old disk back",
        )
    found: list[Segment] = []
    cut: Cut | None = None
    unused = 0
    newest = read(numbers[-1])
    if len(numbers) > 1 and _is_zero(newest, 0, len(newest)):
        unused, numbers = numbers[-1], numbers[:-1]
        if unused != numbers[-1] + 1:
            raise JournalError(
                directory / segment_name(unused - 1), f"this segment is missing. {_KEEP}"
            )
    for number in numbers:
        path = directory / segment_name(number)
        is_last = number == numbers[-1]
        if found and number != found[-1].number + 1:
            raise JournalError(
                directory / segment_name(found[-1].number + 1), f"this segment is missing. {_KEEP}"
            )
        data = read(number)
        try:
            segment = _survey_segment(number, data, cluster_id, is_last, path)
        except _TornError as torn:
            cut = Cut(number, torn.offset, len(data.rstrip(b"\0")) - torn.offset)
            if torn.segment is None:
                if unused or not found or found[-1].size_bytes < found[-1].header.size_bytes:
                    raise JournalError(
                        path,
                        "the header is lost, and it was synced: the next segment was prepared, or "
                        f"the one before it is shortened or gone. {_KEEP}",
                        0,
                    ) from torn
                break
            segment = torn.segment
        _check_order(found, segment, cluster_id, voter, path)
        found.append(segment)
    return Survey(tuple(found), cut, unused)


class _TornError(Exception):
    def __init__(self, offset: int, segment: Segment | None) -> None:
        super().__init__(offset)
        self.offset = offset
        self.segment = segment


def _survey_segment(
    number: int, data: bytes, cluster_id: bytes, is_last: bool, path: Path
) -> Segment:
    segment: Segment | None = None
    end = filled_bytes = 0
    try:
        for _, entry, identity, end in entries(number, data, cluster_id, is_last, path):
            match entry:
                case SegmentHeader():
                    segment = Segment(
                        number, identity, entry, end, len(data), entry.last_slot, False
                    )
                    last_slot, stopped = entry.last_slot, False
                    filled_bytes = entry.size_bytes if is_last else 0
                case Batch(records=records):
                    last_slot = max(last_slot, highest_slot(records))
                case Stop():
                    stopped = True
    except UnreadableError as error:
        _check_size(data, filled_bytes, path)
        if segment is not None:
            segment = msgspec.structs.replace(segment, end=end, last_slot=last_slot)
        raise _TornError(end, segment) from error
    assert segment is not None, "entries() gives a header first or raises"
    _check_size(data, filled_bytes, path)
    return msgspec.structs.replace(segment, end=end, last_slot=last_slot, stopped=stopped)


def _check_size(data: bytes, filled_bytes: int, path: Path) -> None:
    if len(data) < filled_bytes:
        raise JournalError(
            path,
            f"the file ends here, but it was filled up to byte {filled_bytes} before its first "
            f"use: its end, or the segment that came after it, is lost. {_KEEP}",
            len(data),
        )


def _check_order(
    found: list[Segment], segment: Segment, cluster_id: bytes, voter: int, path: Path
) -> None:
    who = segment.identity
    if who.cluster_id != cluster_id:
        raise JournalError(
            path,
            f"this journal belongs to cluster {who.cluster_id.hex()}, not to {cluster_id.hex()}: "
            "check the cluster file and the voter's directory",
            0,
        )
    if who.sender != voter:
        raise JournalError(
            path,
            f"this journal belongs to voter {who.sender}, not to voter {voter}: "
            "check --id and the voter's directory",
            0,
        )
    if not found:
        return
    before = found[-1]
    if who.incarnation != before.identity.incarnation or who.boot < before.identity.boot:
        raise JournalError(path, f"not the successor of the segment before it. {_KEEP}", 0)
    if segment.header.previous_end != before.end or segment.header.last_slot != before.last_slot:
        raise JournalError(
            path.with_name(segment_name(before.number)),
            f"ends at byte {before.end}, but the next segment says it was synced up to byte "
            f"{segment.header.previous_end}. {_KEEP}",
            before.end,
        )


def first_needed(found: Survey, base_slot: int, directory: str | Path = "journal") -> int:
    """Index of the segment from which a journal is replayed onto a snapshot at ``base_slot`` (0:
    none). Raises :class:`JournalError` when slots above the snapshot were in deleted segments."""
    for index in range(len(found.segments) - 1, -1, -1):
        if found.segments[index].header.last_slot <= base_slot:
            return index
    raise JournalError(
        directory,
        f"begins above slot {found.segments[0].header.last_slot}, but the newest good snapshot is "
        f"at slot {base_slot}. Put the newer snapshot back beside it. {_KEEP}",
    )


def records_of(
    found: Survey, read: Callable[[int], bytes], base_slot: int, directory: str | Path = "journal"
) -> Iterator[tuple[int, int, Record]]:
    """The records to fold with ``state.replay`` onto the state at ``base_slot``, each with its
    segment and offset. A segment's header counts as a promise and a fixed slot."""
    for segment in found.segments[first_needed(found, base_slot, directory) :]:
        data = read(segment.number)[: segment.end]
        for offset, entry, _, _ in entries(segment.number, data, segment.identity.cluster_id, True):
            match entry:
                case SegmentHeader(promised=promised, fixed=fixed, chain=chain):
                    yield segment.number, offset, PromiseRecord(promised)
                    yield segment.number, offset, FixedRecord(fixed, chain)
                case Batch(records=records):
                    for record in records:
                        yield segment.number, offset, record
                case Stop():
                    pass


def recover(
    segments: Sequence[tuple[int, bytes]], cluster_id: bytes, voter: int, base_slot: int = 0
) -> tuple[Survey, tuple[Record, ...]]:
    """Survey and records of a journal that is held in memory (the simulator's disk). The next
    boot opens segment ``survey.last.number + 1`` with ``open_segment``. Pure.
    Raises :class:`JournalError`."""
    held = dict(segments)
    found = survey(sorted(held), held.__getitem__, cluster_id, voter)
    return found, tuple(r for _, _, r in records_of(found, held.__getitem__, base_slot))


# --- the disk -------------------------------------------------------------------------------


class Disk:
    """Every call to the operating system that the journal and the snapshots make.

    The one seam for faults: tests put in a subclass. All methods raise ``OSError``.
    """

    def lock(self, directory: Path) -> int:
        """Lock a directory for this process until the descriptor is closed."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def names(self, directory: Path) -> list[str]:
        """Names of the files in a directory."""
        return [path.name for path in directory.iterdir()]

    def read(self, path: Path) -> bytes:
        """The whole file."""
        return path.read_bytes()

    def create(self, path: Path) -> int:
        """Create a file that must not exist yet, for reading and writing by its owner."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def reserve(self, fd: int, size_bytes: int) -> None:
        """Reserve disk blocks; ENOSPC if there are not enough."""
        os.posix_fallocate(fd, 0, size_bytes)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write; returns how many bytes were written."""
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        """Wait until the data (and the size) of the file is on the disk."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Wait until the file is on the disk with all its metadata."""
        os.fsync(fd)

    def sync_directory(self, directory: Path) -> None:
        """Wait until the names in the directory are on the disk."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def truncate(self, path: Path, size_bytes: int) -> None:
        """Cut a file to a size and wait until that is on the disk."""
        fd = os.open(path, os.O_RDWR)
        try:
            os.ftruncate(fd, size_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)

    def overwrite(self, path: Path, data: bytes, offset: int) -> None:
        """Write into a file that exists and wait until all of it is on the disk."""
        fd = os.open(path, os.O_RDWR)
        try:
            write_all(self, fd, data, offset)
            self.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Rename, replacing what was there."""
        old.rename(new)

    def unlink(self, path: Path) -> None:
        """Delete a file."""
        path.unlink()

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def free_bytes(self, directory: Path) -> int:
        """Bytes that this user may still write on the file system."""
        found = os.statvfs(directory)
        return found.f_bavail * found.f_frsize


def write_all(disk: Disk, fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``; a short write is an ``OSError`` like any other failure."""
    written = disk.pwrite(fd, data, offset)
    if written != len(data):
        raise OSError(errno.EIO, f"short write: {written} of {len(data)} bytes")


def _lock(disk: Disk, directory: Path) -> int:
    try:
        return disk.lock(directory)
    except BlockingIOError as error:
        raise JournalError(
            directory, "another process uses this journal: stop that voter first"
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise JournalError(
            directory,
            "there is no journal here: check the voter's directory in the cluster file; a new "
            "voter is formatted first (`trex-voter format`)",
        ) from error


def format_journal(
    directory: Path, cluster_id: bytes, voter: int, incarnation: int = 0, disk: Disk | None = None
) -> int:
    """Make the first journal of a new voter and return its incarnation (drawn at random unless
    given). Refuses with :class:`JournalError` if anything is there. Source: DESIGN §4, amnesia."""
    if len(cluster_id) != CLUSTER_ID_BYTES:
        raise ValueError(f"a cluster id has {CLUSTER_ID_BYTES} bytes, not {len(cluster_id)}")
    disk = disk or Disk()
    directory.mkdir(parents=True, exist_ok=True)
    lock = _lock(disk, directory)
    try:
        names = [name for name in disk.names(directory) if name != "lost+found"]
        if _FORMAT_NAME in names:
            disk.unlink(directory / _FORMAT_NAME)
            names.remove(_FORMAT_NAME)
        if names:
            raise JournalError(
                directory,
                f"not empty ({min(names)} is there): a journal is formatted once in its "
                "life. To run the voter that is here, run it; otherwise choose another directory",
            )
        incarnation = incarnation or secrets.randbits(63) or 1
        identity = Identity(cluster_id, voter, incarnation, 0)
        nothing = State(NO_BALLOT, 0, chain_start(cluster_id), (), None)
        # Longer than what is in it, as all segments are until there is a next one.
        write, tail = open_segment(identity, 1, nothing, 0, 0, SECTOR_BYTES)
        stop = encode_entry(identity, 1, tail.offset, Stop(0))
        data = (write.data + stop).ljust(SECTOR_BYTES, b"\0")
        fd = disk.create(directory / _FORMAT_NAME)
        try:
            write_all(disk, fd, data, 0)
            disk.fsync(fd)
        finally:
            disk.close(fd)
        disk.rename(directory / _FORMAT_NAME, directory / segment_name(1))
        disk.sync_directory(directory)
        disk.sync_directory(directory.parent)
    finally:
        disk.close(lock)
    return incarnation


# --- the journal ----------------------------------------------------------------------------


class _Kept(msgspec.Struct, frozen=True):
    """A segment on the disk; ``last_slot_before`` is its header's ``last_slot``."""

    number: int
    size_bytes: int
    last_slot_before: int


class _Job(msgspec.Struct, frozen=True):
    batch: int
    records: tuple[Record, ...]
    after: State


class Journal:
    """The journal of one running voter. Order of use::

        journal = Journal.open(directory, cluster_id, voter)     # locks, reads, judges
        for state, runs in journal.replay(state): ...            # state: first_state or a snapshot
        identity = journal.start(state)                          # cuts, new segment, boot + 1
        loop.add_reader(journal.wakeup_fd, on_wakeup)
        journal.append(effects.records); batch = journal.submit(state)
        def on_wakeup(): done = journal.completed()              # all batches <= done are synced
        journal.close()                                          # orderly stop

    All methods belong to one thread, the loop's.
    """

    def __init__(self, directory: Path, disk: Disk, lock: int, found: Survey) -> None:
        """Use :meth:`open`."""
        self.directory = directory
        self.survey = found
        self.wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._disk = disk
        self._lock_fd = lock
        self._segment_bytes = SEGMENT_BYTES
        self._retain_bytes = RETAIN_BYTES
        self._identity = found.identity
        self._tail: Tail | None = None
        self._fd = -1
        self._closed = False
        self._stop_in_order = True
        # between loop and sync thread
        self._collected: list[Record] = []
        self._waiting: _Job | None = None
        self._handed = 0
        self._done = 0
        self._failure: JournalFailedError | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._sync_us: list[int] = []
        self._syncs = 0
        self._before: State | None = None
        # between all and the keeper thread
        self._changed = threading.Condition()
        self._kept: tuple[_Kept, ...] = ()
        self._next_fd = -1
        self._next_error: OSError | None = None
        self._chores: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @classmethod
    def open(
        cls,
        directory: Path,
        cluster_id: bytes,
        voter: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        retain_bytes: int = RETAIN_BYTES,
        disk: Disk | None = None,
    ) -> Journal:
        """Lock and read the journal; nothing is changed yet. ``survey`` says what was found.
        Raises :class:`JournalError` when it is missing, in use, foreign or damaged."""
        disk = disk or Disk()
        lock = _lock(disk, directory)
        try:
            numbers = segment_numbers(disk.names(directory))
            read = _reader(disk, directory)
            journal = cls(
                directory, disk, lock, survey(numbers, read, cluster_id, voter, directory)
            )
        except BaseException:
            disk.close(lock)
            raise
        journal._segment_bytes = segment_bytes
        journal._retain_bytes = retain_bytes
        return journal

    def replay(self, state: State) -> Iterator[tuple[State, tuple[FixedRun, ...]]]:
        """Fold the journal onto ``state`` (``first_state``, or the slot, chain and genesis of a
        snapshot): each step gives the state so far and the slots newly fixed, to be applied.
        Raises :class:`JournalError` when the records contradict each other or the snapshot."""
        read = _reader(self._disk, self.directory)
        genesis = self.survey.last.header.genesis
        for number, offset, record in records_of(self.survey, read, state.fixed, self.directory):
            try:
                state, runs = replay(state, record)
            except (ReplayError, ValueError) as error:
                path = self.directory / segment_name(number)
                raise JournalError(path, f"{error}. {_KEEP}", offset) from error
            yield state, runs
        if genesis is not None and state.genesis != genesis:
            raise JournalError(
                self.directory,
                "the snapshot and the journal tell of different first slots: they are not of the "
                f"same cluster life. {_KEEP}",
            )

    def start(self, state: State) -> Identity:
        """Cut what is torn, open a new segment under the next boot number, and start the threads.
        ``state`` is the recovered one. When this returns, the boot number is durable.
        Returns the identity to be told to peers. Raises ``OSError``, which names a place."""
        assert self._tail is None, "start once"
        try:
            tail = self._open_next(state)
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self.directory)) from error
        found = self.survey
        self._before, self._tail = state, tail
        sizes = [(s.number, s.size_bytes, s.header.last_slot) for s in found.segments[:-1]]
        sizes.append((found.last.number, found.last.end, found.last.header.last_slot))
        sizes.append((tail.number, self._segment_bytes, found.last.last_slot))
        self._kept = tuple(_Kept(*size) for size in sizes)
        self._spawn("journal-sync", self._sync_thread)
        self._spawn("journal-keeper", self._keeper_thread)
        self._chores.put(self._prepare_next)
        return self._identity

    def _open_next(self, state: State) -> Tail:
        found, disk = self.survey, self._disk
        last = self.directory / segment_name(found.last.number)
        torn_bytes = 0
        if found.unused:
            disk.unlink(self.directory / segment_name(found.unused))
        if found.cut is not None:
            if found.cut.number == found.last.number:
                torn_bytes = found.cut.size_bytes
            else:
                disk.unlink(self.directory / segment_name(found.cut.number))
        # What was read may still be unsynced: it must be durable before anybody acts on it.
        disk.overwrite(last, bytes(torn_bytes), found.last.end)
        disk.sync_directory(self.directory)
        who = found.identity
        self._identity = Identity(who.cluster_id, who.sender, who.incarnation, who.boot + 1)
        write, tail = open_segment(
            self._identity,
            found.last.number + 1,
            state,
            found.last.last_slot,
            found.last.end,
            self._segment_bytes,
        )
        self._fd = self._allocate(write.number, paced=False)
        write_all(disk, self._fd, write.data, 0)
        disk.fsync(self._fd)
        disk.truncate(last, found.last.end)  # only now: a shorter last segment is refused
        return tail

    def _spawn(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    # --- the loop's side

    def append(self, records: Sequence[Record]) -> None:
        """Collect records for the next batch."""
        self._collected.extend(records)

    def submit(self, after: State) -> int:
        """Hand everything appended to the sync thread, now or as soon as the batch under way is
        done. ``after`` is the state after all that was appended. Returns the number of the batch
        which, once ``completed`` reaches it, means all appended so far is durable.
        Raises :class:`JournalFailedError`."""
        if self._failure is not None:
            raise self._failure
        if self._collected:
            records = tuple(self._collected)
            self._collected.clear()
            if self._waiting is not None:
                records = self._waiting.records + records
            self._waiting = _Job(self._handed + 1, records, after)
        self._hand()
        return self._handed + (self._waiting is not None)

    def _hand(self) -> None:
        if self._waiting is not None and self._done == self._handed:
            self._handed += 1
            job, self._waiting = self._waiting, None
            self._jobs.put(job)

    def completed(self) -> int:
        """Take the wakeup and return the newest durable batch; hands the next one to the sync
        thread. Call it whenever ``wakeup_fd`` is readable. Raises :class:`JournalFailedError`,
        then and for ever, when a write or sync failed: the voter must end."""
        try:
            os.eventfd_read(self.wakeup_fd)
        except BlockingIOError:
            pass
        if self._failure is not None:
            raise self._failure
        done = self._done
        self._hand()
        return done

    @property
    def is_idle(self) -> bool:
        """Whether all that was submitted is durable."""
        return self._waiting is None and self._done == self._handed

    @property
    def identity(self) -> Identity:
        """Cluster, voter, incarnation and boot number."""
        return self._identity

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments on the disk, without the prepared one."""
        return sum(kept.size_bytes for kept in self._kept)

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return len(self._kept)

    @property
    def syncs(self) -> int:
        """How many batches were synced since the start."""
        return self._syncs

    @property
    def last_sync_us(self) -> int:
        """How long the newest write and sync took, in microseconds; 0 before the first."""
        return self._sync_us[(self._syncs - 1) % SYNC_SAMPLES] if self._sync_us else 0

    def sync_percentiles_us(self) -> tuple[int, int]:
        """Median and 99th percentile of the newest SYNC_SAMPLES syncs, in microseconds."""
        ranked = sorted(self._sync_us)
        if not ranked:
            return 0, 0
        return ranked[len(ranked) // 2], ranked[len(ranked) * 99 // 100]

    def free_bytes(self) -> int:
        """Bytes free on the journal's disk, not counting the prepared next segment, which is kept
        for promises. 0 when that segment could not be prepared; it is tried again from here."""
        free = self._disk.free_bytes(self.directory)
        with self._changed:
            if self._next_error is None:
                return free
            if free >= self._segment_bytes:
                self._next_error = None
                self._chores.put(self._prepare_next)
        return 0

    def delete_below(self, slot: int) -> None:
        """Delete, in the background, the oldest segments while more than ``retain_bytes`` are kept
        and all slots in them are at or below ``slot``, that of the oldest kept snapshot."""
        self._chores.put(lambda: self._delete_below(slot))

    def close(self) -> None:
        """End in order: wait for what was submitted, write the stop record, unlock; what was only
        appended is dropped, as nobody was told of it. Blocks for at most three syncs.
        Raises :class:`JournalFailedError` when that did not work."""
        if self._closed:
            return
        self._closed = True
        if self._tail is not None:
            if self._waiting is not None:
                self._jobs.put(self._waiting)
                self._waiting = None
            self._jobs.put(None)
            self._chores.put(None)
            for thread in self._threads:
                thread.join()
        for fd in (self._fd, self._next_fd):
            if fd >= 0:
                self._disk.close(fd)
        os.close(self.wakeup_fd)
        self._disk.close(self._lock_fd)
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """End as a crash would, for tests and for a voter that must stop at once: what was handed
        to the sync thread is written, nothing else, and no stop record."""
        self._waiting = None
        self._stop_in_order = False
        try:
            self.close()
        except JournalFailedError:
            pass

    # --- the sync thread

    def _sync_thread(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                started = time.perf_counter_ns()
                self._write_batch(job.records)
                self._before = job.after
                took = (time.perf_counter_ns() - started) // 1000
                if len(self._sync_us) < SYNC_SAMPLES:
                    self._sync_us.append(took)
                else:
                    self._sync_us[self._syncs % SYNC_SAMPLES] = took
                self._syncs += 1
                self._done = job.batch
                os.eventfd_write(self.wakeup_fd, 1)
            if not self._stop_in_order:
                return
            tail = self._tail
            assert tail is not None
            stop = encode_entry(self._identity, tail.number, tail.offset, Stop(tail.offset))
            write_all(self._disk, self._fd, stop, tail.offset)
            self._disk.fdatasync(self._fd)
        except BaseException as error:  # noqa: BLE001 - the loop raises it; no thread dies in silence
            self._fail(error)

    def _write_batch(self, records: tuple[Record, ...]) -> None:
        assert self._tail is not None
        assert self._before is not None
        write, tail = place(self._identity, self._tail, records, self._before, self._segment_bytes)
        opened = write.number != self._tail.number
        if opened:
            following = self._take_next(write.number)
            self._disk.close(self._fd)
            self._fd = following
        write_all(self._disk, self._fd, write.data, write.offset)
        self._disk.fdatasync(self._fd)
        if opened or tail.offset > self._segment_bytes:
            with self._changed:
                kept = self._kept[:-1] if not opened else self._kept
                before = self._tail.last_slot if opened else self._kept[-1].last_slot_before
                size = max(tail.offset, self._segment_bytes)
                self._kept = (*kept, _Kept(write.number, size, before))
        self._tail = tail
        if opened:
            self._chores.put(self._prepare_next)

    def _take_next(self, number: int) -> int:
        with self._changed:
            while self._next_fd < 0 and self._next_error is None:
                self._changed.wait()
            fd, self._next_fd = self._next_fd, -1
            self._next_error = None
        return fd if fd >= 0 else self._allocate(number, paced=False)

    def _fail(self, error: BaseException) -> None:
        failure = JournalFailedError(f"the journal in {self.directory} failed: {error!r}")
        failure.__cause__ = error
        with self._changed:
            if self._failure is None:
                self._failure = failure
            if self._next_error is None:
                self._next_error = OSError(errno.EIO, "the journal failed")
            self._changed.notify_all()
        os.eventfd_write(self.wakeup_fd, 1)

    # --- the keeper thread

    def _keeper_thread(self) -> None:
        try:
            while (chore := self._chores.get()) is not None:
                chore()
        except BaseException as error:  # noqa: BLE001 - as above
            self._fail(error)

    def _prepare_next(self) -> None:
        assert self._tail is not None
        try:
            fd, error = self._allocate(self._kept[-1].number + 1, paced=True), None
        except OSError as caught:
            if caught.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            fd, error = -1, caught
        with self._changed:
            self._next_fd, self._next_error = fd, error
            self._changed.notify_all()

    def _allocate(self, number: int, *, paced: bool) -> int:
        """Create segment ``number`` full of zeros, with its name durable. ``paced``: piece by
        piece, so that batches need not wait for all of it."""
        disk, path = self._disk, self.directory / segment_name(number)
        fd = disk.create(path)
        try:
            disk.reserve(fd, self._segment_bytes)
            for offset in range(0, self._segment_bytes, FILL_BYTES):
                piece = bytes(min(FILL_BYTES, self._segment_bytes - offset))
                write_all(disk, fd, piece, offset)
                if paced:
                    disk.fdatasync(fd)
            disk.fsync(fd)
            disk.sync_directory(self.directory)
        except BaseException:
            disk.close(fd)
            disk.unlink(path)
            raise
        return fd

    def _delete_below(self, slot: int) -> None:
        while True:
            with self._changed:
                kept = self._kept
                if (
                    len(kept) < 2
                    or self.size_bytes <= self._retain_bytes
                    or kept[1].last_slot_before > slot
                ):
                    return
                self._kept = kept[1:]
            # One at a time, oldest first: a crash in between leaves no hole.
            self._disk.unlink(self.directory / segment_name(kept[0].number))
            self._disk.sync_directory(self.directory)


def _reader(disk: Disk, directory: Path) -> Callable[[int], bytes]:
    def read(number: int) -> bytes:
        path = directory / segment_name(number)
        try:
            return disk.read(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JournalError(path, f"cannot be read ({error.strerror}). {_KEEP}") from error

    return read


def verify(directory: Path, cluster_id: bytes, voter: int) -> Survey:
    """Read and judge a journal without locking or changing it (``trex-voter verify``).
    Raises :class:`JournalError`."""
    disk = Disk()
    numbers = segment_numbers(disk.names(directory)) if directory.is_dir() else []
    return survey(numbers, _reader(disk, directory), cluster_id, voter, directory)
