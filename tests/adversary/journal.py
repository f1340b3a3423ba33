"""Every byte of a real journal, hurt in every way, before an oracle that never reads a frame.

``python -m tests.adversary.journal`` runs the whole product and prints what its cases came to; the
suite runs a part of it (tests/voters/test_journal_adversary.py).

The journals are what the real writer left in real files. The oracle knows what was written where,
and in which write; from that and the bytes that differ it says what recovery owes, by DESIGN §4.
This module alone holds that second reading of the rules.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec

from tests.voters.test_journal import BALLOT, CLUSTER, VOTER, Writer, value, wait_for_spare
from trex_core.messages import Ballot, Genesis, Kind, Value, encode_value
from trex_core.state import (
    AcceptRecord,
    FixedRecord,
    InstallRecord,
    LearnedRecord,
    PromiseRecord,
    Record,
    State,
    above,
    chain_run,
    first_state,
)
from trex_core.wire import HEADER_BYTES
from voters.journal import (
    SECTOR_BYTES,
    Cut,
    Disk,
    Journal,
    JournalError,
    format_journal,
    recover,
    segment_name,
    segment_numbers,
)

SEGMENT_BYTES: Final = 4096
INCARNATION: Final = 77
KNOWN_BYTES: Final = HEADER_BYTES + 4
"""If these first bytes of a frame are whole, its length is known."""
HEAD_BYTES: Final = HEADER_BYTES + 5
"""All that is known of a frame whose first bytes are not whole: it is no shorter than this."""
INSTALLED: Final = 40
OTHER_CLUSTER: Final = bytes(range(101, 117))

Held = dict[int, bytes]


# --- what was written -----------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One entry as it was written: where, in the how manieth write, all below ``synced`` of its
    segment being durable before; and the records that recovery gives for it."""

    number: int
    start: int
    end: int
    write: int
    synced: int
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Image:
    """The files of a journal as a crash or a stop left them. ``files`` has also what was prepared
    but not used, in segment ``spare`` (0: none)."""

    name: str
    files: Held
    frames: tuple[Frame, ...]
    stopped: bool
    spare: int = 0

    @property
    def last(self) -> int:
        return self.frames[-1].number

    @property
    def used_bytes(self) -> int:
        return sum(frame.end - frame.start for frame in self.frames)

    def of(self, number: int) -> list[Frame]:
        return [frame for frame in self.frames if frame.number == number]

    def before(self, frame: Frame) -> tuple[Record, ...]:
        """What is recovered of all entries before ``frame``."""
        return self._upto[self.frames.index(frame)]

    @property
    def whole(self) -> tuple[Record, ...]:
        """What is recovered of all entries."""
        return self._upto[-1]

    @cached_property
    def _upto(self) -> list[tuple[Record, ...]]:
        return [recovered(self.frames[:count]) for count in range(len(self.frames) + 1)]


def recovered(frames: Sequence[Frame]) -> tuple[Record, ...]:
    """The records of these entries, from the newest segment on before which no slot was named."""
    first, named = 0, False
    for index, frame in enumerate(frames):
        if frame.start == 0 and not named:
            first = index
        named = named or any(
            not isinstance(record, PromiseRecord) and record != frames[0].records[1]
            for record in frame.records
        )
    return tuple(record for frame in frames[first:] for record in frame.records)


class Noting(Disk):
    """The real disk; keeps what was written behind the filling with zeros, one write a batch."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, bytes]] = []
        self._numbers: dict[int, int] = {}

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._numbers[fd] = int(path.name[:10]) if path.name[:10].isdecimal() else 1
        return fd

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if data.strip(b"\0"):
            self.writes.append((self._numbers[fd], offset, data))
        return super().pwrite(fd, data, offset)


class Life(Writer):
    """A voter that writes records of every kind, and notes what each write means."""

    def __init__(self, directory: Path, disk: Noting, cluster_id: bytes, voter: int) -> None:
        self.disk = disk
        self.frames: list[Frame] = []
        self._seen = 0
        super().__init__(
            Journal.open(directory, cluster_id, voter, segment_bytes=SEGMENT_BYTES, disk=disk)
        )
        self._note(self.state, ())

    def submit(self, *records: Record) -> int:
        match records:
            case (InstallRecord(slot=slot, chain=chain, genesis=genesis),):
                self.state = msgspec.structs.replace(
                    self.state, fixed=slot, chain=chain, genesis=genesis,
                    accepted=above(self.state.accepted, slot),
                )  # fmt: skip
                self.journal.append(records)
                return self.journal.submit(self.state)
            case _:
                return super().submit(*records)

    def commit(self, *records: Record) -> None:
        before = self.state
        super().commit(*records)
        self._note(before, records)

    def end(self, *, in_order: bool) -> None:
        """Stop or be killed. A clean stop writes one entry more."""
        wait_for_spare(self.journal)
        if not in_order:
            self.journal.abandon()
            return
        self.journal.close()
        self._note(self.state, ())

    def _note(self, before: State, records: tuple[Record, ...]) -> None:
        """Make frames of the writes since: of each, the header of a segment, then one batch."""
        for write, (number, start, data) in enumerate(self.disk.writes[self._seen :], self._seen):
            end, synced, at = start + len(data), start, start
            if start == 0:
                at = HEADER_BYTES + int.from_bytes(data[56:60], "big")
                header = (
                    PromiseRecord(before.promised),
                    FixedRecord(before.fixed, before.chain),
                )
                self.frames.append(Frame(number, 0, at, write, 0, header))
                synced = 0
            if at < end:
                self.frames.append(Frame(number, at, end, write, synced, records))
        self._seen = len(self.disk.writes)

    # --- what it writes

    def first_boot(self) -> None:
        told = msgspec.msgpack.encode(Genesis((VOTER,), (INCARNATION,)))
        genesis = encode_value(Value(Kind.GENESIS, BALLOT, command=told))
        self.commit(PromiseRecord(BALLOT))
        self.commit(
            AcceptRecord(BALLOT, 1, (genesis,)),
            FixedRecord(1, chain_run(self.state.chain, 1, (genesis,))[-1]),
        )
        self.fix(3)
        self.fix(1, 700)
        self.commit(AcceptRecord(BALLOT, self.state.fixed + 1, (value(9, 40), hollow(9))))
        chain = self.state.chain
        values = (value(9, 40), hollow(9))
        first = self.state.fixed + 1
        self.commit(FixedRecord(first + 1, chain_run(chain, first, values)[-1]))
        self.commit(PromiseRecord(Ballot(0, 4, 1)))
        learned = (value(20, 30), value(21, 300))
        first = self.state.fixed + 1
        self.commit(LearnedRecord(first, learned, chain_run(self.state.chain, first, learned)[-1]))
        self.fix(2, 600)

    def second_boot(self) -> None:
        assert self.state.genesis is not None
        self.commit(InstallRecord(INSTALLED, bytes(range(32)), self.state.genesis))
        self.fix(1)
        self.fix(4, 500)
        self.commit(PromiseRecord(Ballot(0, 5, 2)))


def hollow(number: int) -> bytes:
    """A value in which, wherever it comes to stand, a whole aligned sector is zeros."""
    return encode_value(
        Value(Kind.COMMAND, BALLOT, 0, 1, number, number, b"<" + bytes(2 * SECTOR_BYTES) + b">")
    )


def _formatted(directory: Path, cluster_id: bytes, voter: int, incarnation: int) -> list[Frame]:
    disk = Noting()
    format_journal(directory, cluster_id, voter, incarnation, disk)
    ((number, _, data),) = disk.writes
    state = first_state(cluster_id)
    header = (PromiseRecord(state.promised), FixedRecord(state.fixed, state.chain))
    at = HEADER_BYTES + int.from_bytes(data[56:60], "big")
    return [
        Frame(number, 0, at, -1, 0, header),
        Frame(number, at, len(data.rstrip(b"\0")), -1, 0, ()),
    ]


def _image(
    name: str,
    directory: Path,
    last: Callable[[Life], None] | None,
    cluster_id: bytes = CLUSTER,
    voter: int = VOTER,
    incarnation: int = INCARNATION,
) -> Image:
    """Live twice, end (``last`` None: in order; otherwise killed after it), and take the files."""
    frames = _formatted(directory, cluster_id, voter, incarnation)
    life = Life(directory, Noting(), cluster_id, voter)
    life.first_boot()
    life.end(in_order=last is None)
    frames += life.frames
    life = Life(directory, Noting(), cluster_id, voter)
    if last is not _nothing:
        life.second_boot()
    if last is not None:
        last(life)
    life.end(in_order=last is None)
    first = frames[-1].write + 1
    frames += [replace(frame, write=frame.write + first) for frame in life.frames]
    files = {
        number: (directory / segment_name(number)).read_bytes()
        for number in segment_numbers([path.name for path in directory.iterdir()])
    }
    spare = max(files)
    assert not files[spare].strip(b"\0"), "the next segment was prepared"
    return Image(name, files, tuple(frames), stopped=last is None, spare=spare)


def _nothing(_: Life) -> None:
    pass


def _two(life: Life) -> None:
    life.fix(2, 500)


def _many(life: Life) -> None:
    life.fix(9, 500)


def _hollow(life: Life) -> None:
    life.commit(AcceptRecord(BALLOT, life.state.fixed + 1, (value(60, 90), hollow(60))))


def _rotate(life: Life) -> None:
    segments = life.journal.segments
    for _ in range(9):
        life.fix(1, 600)
        if life.journal.segments > segments:
            return
    raise AssertionError("it never came to the next segment")


def _without_spare(image: Image) -> Image:
    files = {number: data for number, data in image.files.items() if number != image.spare}
    return replace(image, name=f"{image.name}, none prepared", files=files, spare=0)


def _unshortened(image: Image) -> Image:
    """As a start has it before its header is durable."""
    before = {image.last - 1: image.files[image.last - 1].ljust(SEGMENT_BYTES, b"\0")}
    return replace(image, name="killed in its start", files={**image.files, **before})


def images(scratch: Path) -> list[Image]:
    """Journals at several moments: stopped in order, and killed when the last write was a batch of
    several sectors, one larger than a segment, a value with an aligned sector of zeros, the header
    and first batch of a new segment, or a header alone; the last also before the next segment was
    prepared."""
    many = _image("killed, larger than a segment", scratch / "many", _many)
    rotated = _image("killed, new segment", scratch / "rotated", _rotate)
    opened = _image("killed at its start", scratch / "opened", _nothing)
    return [
        _image("stopped", scratch / "stopped", None),
        _image("killed", scratch / "killed", _two),
        _image("killed, value of zeros", scratch / "hollow", _hollow),
        _without_spare(many),
        rotated,
        _without_spare(rotated),
        opened,
        _without_spare(opened),
        _unshortened(_without_spare(opened)),
    ]


def foreigners(scratch: Path) -> list[Image]:
    """Journals of the same shape that another voter, cluster or incarnation wrote."""
    return [
        _image("of another voter", scratch / "voter", _two, voter=VOTER + 1),
        _image("of another cluster", scratch / "cluster", _two, cluster_id=OTHER_CLUSTER),
        _image("of another incarnation", scratch / "incarnation", _two, incarnation=5),
    ]


# --- how it is hurt -------------------------------------------------------------------------

Case = tuple[str, int, bytes]
"""What was done, to which segment, and what its bytes are now."""


def byte_cases(data: bytes, number: int, positions: Iterable[int], bits: int) -> Iterator[Case]:
    """Cut at each byte, zeros from each byte on, and each byte changed: ``bits`` of its bits one
    by one, and the whole to 0x00 and 0xff. With one bit only, also less of the others."""
    end = len(data.rstrip(b"\0"))
    for at in positions:
        yield "cut", number, data[:at]
        if at < end and (bits > 1 or at % 4 == 0):
            yield "zeros from here", number, data[:at].ljust(len(data), b"\0")
        byte = data[at]
        changed = [("bit", byte ^ 1 << (at + bit) % 8) for bit in range(bits)]
        wholes = [("0x00", 0), ("0xff", 255)]
        for name, new in (*changed, *(wholes if bits > 1 else wholes[at % 2 :: 2])):
            if new != byte:
                yield name, number, b"".join((data[:at], bytes((new,)), data[at + 1 :]))


def positions_of(
    image: Image, *, is_first: bool, thorough: bool
) -> Iterator[tuple[int, list[int]]]:
    """Segments to hurt, and at which bytes. The first image everywhere, another where it is like
    no other: in its last segment and what was prepared. If not ``thorough``, of these only each
    byte of its last write, every fifth if it is long; and of what was not written one byte in 64.
    """
    for number, data in sorted(image.files.items()):
        if not is_first and number < image.last:
            continue
        written = range(image.of(number)[-1].end if number <= image.last else 0)
        room = range(len(written), len(data))
        if thorough:
            yield number, [*written, *room]
        elif is_first or number > image.last:
            yield number, [*written, *room[::64]]
        else:
            first = min(f.start for f in image.frames if f.write == image.frames[-1].write)
            last = written[first:]
            yield number, [*(last if len(last) < 2000 else last[::5]), *room[::64]]


def sector_cases(data: bytes, number: int, strangers: list[bytes]) -> Iterator[Case]:
    """Runs of sectors zero, two sectors exchanged, one written over another, and one from another
    file at its place (a write that went astray, or one that never came)."""
    sectors = [data[at : at + SECTOR_BYTES] for at in range(0, len(data), SECTOR_BYTES)]
    count = len(sectors)

    def with_(**new: bytes) -> bytes:
        return b"".join(new.get(f"s{index}", sector) for index, sector in enumerate(sectors))

    for first in range(count):
        for last in range(first, count):
            zeros = {f"s{at}": bytes(len(sectors[at])) for at in range(first, last + 1)}
            yield "sectors zeroed", number, with_(**zeros)
        for other in range(count):
            if len(sectors[first]) == len(sectors[other]) and first != other:
                over = {f"s{other}": sectors[first]}
                yield "sector astray", number, with_(**over)
                if first < other:
                    swapped = {f"s{first}": sectors[other], **over}
                    yield "sectors swapped", number, with_(**swapped)
        for stranger in strangers:
            strange = stranger[first * SECTOR_BYTES : (first + 1) * SECTOR_BYTES]
            if len(strange) == len(sectors[first]) < len(data):  # a whole file: see file_cases
                yield "stranger's sector", number, with_(**{f"s{first}": strange})


# --- what may come of it --------------------------------------------------------------------


@dataclass(frozen=True)
class Owed:
    """What recovery may do. ``refused_at``: the offsets that a refusal may name, in segment
    ``number``; ``records``: what it may recover instead, None: nothing; ``cut_at``: the offset
    that it must then report as cut, None: nothing is cut. ``kind``: how this case is counted."""

    kind: str
    number: int
    refused_at: tuple[int, ...] = ()
    records: tuple[Record, ...] | None = None
    cut_at: int | None = None
    cut_end: int = 0


def owed(image: Image, number: int, data: bytes) -> Owed | None:
    """What is owed when segment ``number`` now has these bytes; None: nothing was changed."""
    original = image.files[number]
    if data == original:
        return None
    frames = image.of(number)
    hurt = next((f for f in frames if data[f.start : f.end] != original[f.start : f.end]), None)
    if hurt is None:
        return _owed_behind(image, number, data, frames[-1].end if frames else 0)
    is_short = len(data) < min(len(original), SEGMENT_BYTES) and not _was_cut(original)
    proven = (
        number != image.last
        or (hurt.start == 0 and image.spare)
        or any(
            data[f.start : f.end] == original[f.start : f.end] and f.synced > hurt.start
            for f in frames
        )
    )
    before = image.files.get(number - 1, original)
    unread = not data.strip(b"\0") or is_torn(data, 0, min(HEAD_BYTES, hurt.end))
    if number == image.last and hurt.start == 0 and unread and len(before) < SEGMENT_BYTES:
        # There was a segment when the one before was shortened.
        if image.spare or data.strip(b"\0"):
            return Owed("durable: refused", number, (0,))
        return Owed("durable: refused", number - 1, (len(before),))
    if proven:
        return Owed("durable: refused", number, (hurt.start, *([len(data)] if is_short else [])))
    if hurt.start == 0 and not data.strip(b"\0"):
        # Like a segment that was prepared and not used.
        return Owed(_lost(image, hurt, data), number, (), image.before(hurt))
    if is_short:
        return Owed("shortened: refused", number, (hurt.start, len(data)))
    if not data[hurt.start :].strip(b"\0") and hurt.start <= len(data):
        return Owed(_lost(image, hurt, data), number, (), image.before(hurt))
    known = (
        data[hurt.start : hurt.start + KNOWN_BYTES]
        == (original[hurt.start : hurt.start + KNOWN_BYTES])
    )
    head_end = min(hurt.start + HEAD_BYTES, hurt.end)
    if not is_torn(data, hurt.start, hurt.end):
        return Owed("not torn: refused", number, (hurt.start,))
    return Owed(
        _lost(image, hurt, data),
        number,
        () if known or is_torn(data, hurt.start, head_end) else (hurt.start,),
        image.before(hurt),
        hurt.start,
        len(data.rstrip(b"\0")),
    )


def _owed_behind(image: Image, number: int, data: bytes, end: int) -> Owed:
    """No entry was hurt: there is something behind the last one, or less room."""
    whole = image.whole
    if not data[end:].strip(b"\0"):
        if number == image.last and len(data) < SEGMENT_BYTES:
            return Owed("shortened: refused", number, (len(data),))
        return Owed("room hurt: all recovered", number, (), whole)
    if number < image.last or (number == image.last and image.stopped):
        return Owed("room hurt: refused", number, (end,))
    if not is_torn(data, end, end + HEAD_BYTES):
        return Owed("room hurt: refused", number, (end,))
    return Owed("room hurt: cut", number, (), whole, end, len(data.rstrip(b"\0")))


def _was_cut(original: bytes) -> bool:
    """The segments of earlier boots are as long as what is in them."""
    return len(original) < SEGMENT_BYTES


def is_torn(data: bytes, start: int, end: int) -> bool:
    """DESIGN §4: cut off, or one of its sectors is still zero."""
    if end > len(data):
        return start > 0
    edges = [start, *range((start // SECTOR_BYTES + 1) * SECTOR_BYTES, end, SECTOR_BYTES)]
    return any(
        not data[edge : (edge // SECTOR_BYTES + 1) * SECTOR_BYTES].strip(b"\0") for edge in edges
    )


def _lost(image: Image, hurt: Frame, data: bytes) -> str:
    """How the loss of ``hurt`` and all behind it is counted: a torn last write, as a crash leaves
    it, or not to be told from one."""
    if image.stopped or hurt.write != image.frames[-1].write:
        return "not told apart: synced, looks unwritten"
    original = image.files[hurt.number]
    start = next(f.start for f in image.frames if f.write == hurt.write)
    if len(data) < len(original):
        return "last write torn: cut"
    for edge in range(start // SECTOR_BYTES * SECTOR_BYTES, len(original), SECTOR_BYTES):
        begin, stop = max(edge, start), edge + SECTOR_BYTES
        if data[begin:stop] != original[begin:stop] and data[begin:stop].strip(b"\0"):
            return "not told apart: damage, looks torn"
    return "last write torn: cut"


class WrongError(Exception):
    """Recovery did what it must not."""


def judge(image: Image, case: Case) -> str:
    """Recover, and compare with what is owed. How the case is counted; ``""``: nothing was
    changed. Raises :class:`WrongError`."""
    name, number, data = case
    due = owed(image, number, data)
    if due is None:
        return ""
    refused_at = due.refused_at
    if name == "stranger's sector":
        # Its entries are whole and fit each other: the seam is what is noticed.
        starts = [frame.start for frame in image.of(number)]
        refused_at = (*refused_at, *starts, image.frames[-1].end)
    held = {**image.files, number: data}
    try:
        found, records = recover(sorted(held.items()), CLUSTER, VOTER)
    except JournalError as error:
        told = str(error)
        if (
            error.path.name == segment_name(due.number)
            and error.offset in refused_at
            and f"{segment_name(due.number)} at byte {error.offset}: " in told
            and ("Do not repair" in told or "check --id" in told or "check the cluster" in told)
        ):
            return due.kind if due.records is None else "torn, its length lost: refused"
        raise WrongError(_told(image, case, due, told)) from error
    except Exception as error:
        raise WrongError(_told(image, case, due, repr(error))) from error
    cut = None
    if due.cut_at is not None:
        cut = Cut(due.number, due.cut_at, due.cut_end - due.cut_at)
    if due.records is None or records != due.records or found.cut != cut:
        same = records == due.records
        raise WrongError(
            _told(image, case, due, f"{len(records)} records, same {same}, {found.cut}")
        )
    return due.kind


def _told(image: Image, case: Case, due: Owed, what: str) -> str:
    name, number, data = case
    original = image.files[number]
    pairs = zip(data, original, strict=False)
    at = next((i for i, (new, old) in enumerate(pairs) if new != old), len(data))
    where = [(f.start, f.end) for f in image.of(number)]
    return (
        f"{image.name}: {name} at byte {at} of segment {number} {where}: owed {due.kind}, "
        f"refusal at {due.refused_at}, cut at {due.cut_at}; came: {what}"
    )


# --- whole files ----------------------------------------------------------------------------


def file_cases(image: Image, strangers: list[Image]) -> Iterator[tuple[str, int, Held]]:
    """Segments missing, doubled, renamed, exchanged, foreign: (what, which segment, the files)."""
    numbers = sorted(image.files)
    free = [numbers[-1] + 1, numbers[-1] + 2, 99]
    for number in numbers:
        rest = {n: data for n, data in image.files.items() if n != number}
        yield "missing", number, rest
        for other in (*numbers, *free):
            if other == number:
                continue
            yield "renamed", number, {**rest, other: image.files[number]}
            yield "doubled", number, {**image.files, other: image.files[number]}
            if other > number and other in image.files:
                pair = {number: image.files[other], other: image.files[number]}
                yield "exchanged", number, {**image.files, **pair}
        for stranger in strangers:
            if number in stranger.files:
                yield f"{stranger.name}", number, {**image.files, number: stranger.files[number]}
    for stranger in strangers:
        yield f"all {stranger.name}", 0, stranger.files


def judge_files(image: Image, name: str, number: int, held: Held) -> str:
    """As :func:`judge`. Whatever was done to whole files, what comes back is all that was written,
    or refused with the file; but for the newest files gone with all behind them."""
    if held == image.files:
        return ""
    try:
        found, records = recover(sorted(held.items()), CLUSTER, VOTER)
    except JournalError as error:
        if len(str(error)) < 40 or ("check" not in str(error) and "Do not" not in str(error)):
            raise WrongError(f"{image.name}: {name} {number}: {error}") from error
        return "files: refused"
    except Exception as error:
        raise WrongError(f"{image.name}: {name} {number}: {error!r}") from error
    if name == "all of another incarnation":
        return "not told apart: a whole journal of another incarnation"
    used = {f.number for f in image.frames}
    left = {n for n in used if held.get(n) == image.files[n]}
    kept = recovered([frame for frame in image.frames if frame.number in left])
    if records != kept or found.cut is not None:
        raise WrongError(f"{image.name}: {name} {number}: {len(records)} of {len(kept)} records")
    if left == used:
        return "files: all recovered"
    if used - left == {min(used)} and image.of(min(left))[0].records[1].last == 0:
        return "files: all recovered"  # the first one said nothing yet
    if used - left == {image.last} and max(held, default=0) <= image.last:
        return "not told apart: newest segment gone"
    raise WrongError(f"{image.name}: {name} {number}: segments {used - left} lost in silence")


# --- the product ----------------------------------------------------------------------------


@dataclass
class Tally:
    """How many cases came to what, and the slowest way to run all of them again."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, name: str, kind: str) -> None:
        if kind:
            self.counts[name, kind] += 1

    @property
    def by_kind(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (_, kind), count in self.counts.items():
            found[kind] += count
        return found

    def lines(self) -> Iterator[str]:
        """A table: each outcome, and by what it came about."""
        for kind, total in sorted(self.by_kind.items()):
            ways = Counter({n: c for (n, k), c in self.counts.items() if k == kind})
            told = ", ".join(f"{name} {count:,}" for name, count in ways.most_common())
            yield f"{total:>9,}  {kind:<42} {told}"


def run(all_images: list[Image], strangers: list[Image], *, bits: int, thorough: bool) -> Tally:
    """Every case of every image. Raises :class:`WrongError` for the first that went wrong."""
    tally = Tally()
    for index, image in enumerate(all_images):
        assert recover(sorted(image.files.items()), CLUSTER, VOTER)[1] == image.whole, image.name
        for number, positions in positions_of(image, is_first=index == 0, thorough=thorough):
            data = image.files[number]
            others = [stranger.files[number] for stranger in strangers if number in stranger.files]
            for case in byte_cases(data, number, positions, bits):
                tally.note(case[0], judge(image, case))
            for case in sector_cases(data, number, others):
                tally.note(case[0], judge(image, case))
        for name, number, held in file_cases(image, strangers):
            tally.note(name, judge_files(image, name, number, held))
    return tally


def main() -> int:
    """Exit code 0: every case came to what is owed. 1: one did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversary.journal", description=__doc__)
    parser.add_argument("--bits", type=int, default=8, help="bits of each byte flipped in turn")
    parser.add_argument("--part", action="store_true", help="only what the suite runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trex-journal-") as scratch:
        held = images(Path(scratch))
        strangers = foreigners(Path(scratch))
    began_s = time.process_time()
    try:
        tally = run(held, strangers, bits=args.bits, thorough=not args.part)
    except WrongError as error:
        print(error, file=sys.stderr)
        return 1
    took_s = time.process_time() - began_s
    for line in tally.lines():
        print(line)
    total = tally.counts.total()
    written = sum(image.used_bytes for image in held)
    print(
        f"{total:,} cases of {len(held)} journals with {written:,} bytes written, "
        f"{took_s / max(1, total) * 1e6:.0f} µs each, {took_s:.0f} s: each as owed"
    )
    return 0 if total else 1


if __name__ == "__main__":
    sys.exit(main())
