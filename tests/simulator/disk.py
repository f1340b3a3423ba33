"""The simulated disk of one voter: what was synced survives, what was not may be lost or torn.

This module alone decides which bytes a crash leaves. The bytes are those of the real journal
(:func:`voters.journal.place`) and it is the real recovery that judges them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import msgspec

from trex_core.snapshot import decode_snapshot
from trex_core.state import FixedRun, Record, State, first_state, replay
from trex_core.wire import Identity
from voters.journal import (
    SECTOR_BYTES,
    JournalError,
    Stop,
    Tail,
    Write,
    encode_entry,
    open_segment,
    place,
    recover,
)

SNAPSHOTS_KEPT = 2
FREE_BYTES_MIN = 6_000
"""Below this mark a disk counts as full; what is left is for promises and what is fixed."""
HEADER_BYTES = 400
"""More than the header of a segment needs: a disk with less room starts no voter."""


class DamagedError(Exception):
    """The journal was refused at a restart."""


class NoSpaceError(Exception):
    """The write does not fit the disk: nothing of it is there."""


class Recovered(msgspec.Struct, frozen=True):
    """What a restart reads: the state, what is to be applied again, and the snapshot below it."""

    state: State
    fixed: tuple[FixedRun, ...]
    snapshot: bytes | None
    boot: int


class Disk:
    """Segments of the journal, preallocated with zeros, and snapshot files."""

    def __init__(self, identity: Identity, segment_bytes: int) -> None:
        self.identity = identity
        self.segment_bytes = segment_bytes
        self.flipped = False
        """A durable bit flipped: the journal must be refused at the next start."""
        self.free_bytes: int | None = None
        """What is left when the disk is nearly full; None: plenty."""
        self.deleted = 0
        """Segments deleted so far."""
        self.snapshots: dict[int, bytes] = {}
        self._files: dict[int, bytearray] = {}
        self._last_slot_before: dict[int, int] = {}
        self._under_way: tuple[Write, Tail, State] | None = None
        self._before = first_state(identity.cluster_id)
        self._format()

    def _format(self) -> None:
        write, tail = open_segment(self.identity, 1, self._before, 0, 0)
        stop = encode_entry(self.identity, 1, tail.offset, Stop(0))
        self._files[1] = bytearray(write.data + stop)
        self._last_slot_before[1] = 0

    # --- writing ----------------------------------------------------------------------------

    def write(self, records: tuple[Record, ...], after: State) -> None:
        """Hand one batch to the disk; ``after`` is the state after it. Nothing is durable yet.
        Raises :class:`NoSpaceError`."""
        assert self._under_way is None, "one write at a time"
        write, tail = place(self.identity, self._tail, records, self._before, self.segment_bytes)
        if self.free_bytes is not None:
            if len(write.data) > self.free_bytes:
                raise NoSpaceError
            self.free_bytes -= len(write.data)
        self._under_way = (write, tail, after)

    def sync(self) -> None:
        """What was written is durable."""
        assert self._under_way is not None, "a sync belongs to a write"
        write, tail, after = self._under_way
        self._under_way = None
        if write.offset == 0:
            self._last_slot_before[write.number] = self._tail.last_slot
        self._put(write, write.data)
        self._tail, self._before = tail, after

    def _put(self, write: Write, data: bytes) -> None:
        file = self._files.get(write.number)
        if file is None:
            file = self._files[write.number] = bytearray(self.segment_bytes)
        file[write.offset : write.offset + len(data)] = data

    def keep_snapshot(self, slot: int, data: bytes) -> Iterator[str]:
        """Make a snapshot durable, then delete old ones, and segments that all slots are older in.
        One act at a time: before each its name is told, and the crash that comes then finds what
        was done so far. What is written beside leaves nothing under a snapshot's name."""
        yield "snapshot"  # written beside, not renamed yet
        self.snapshots[slot] = data
        for old in sorted(self.snapshots)[:-SNAPSHOTS_KEPT]:
            yield "snapshot"  # renamed, an old one not deleted yet
            del self.snapshots[old]
        while len(self._files) > 1:
            first, second = sorted(self._files)[:2]
            if self._last_slot_before.get(second, self.forgettable + 1) > self.forgettable:
                break
            yield "delete"
            del self._files[first]
            self.deleted += 1

    @property
    def forgettable(self) -> int:
        """The slot up to which the log may be forgotten (0: nothing)."""
        return min(self.snapshots) if len(self.snapshots) >= SNAPSHOTS_KEPT else 0

    # --- faults -----------------------------------------------------------------------------

    def crash(self, rng: Random, torn: float) -> bool:
        """Power is gone. Returns whether something was written that is not all there."""
        if self._under_way is None:
            return False
        write, self._under_way = self._under_way[0], None
        if rng.random() >= torn:
            if rng.random() < 0.5:
                self._files.setdefault(write.number, bytearray(self.segment_bytes))
            return True
        # A part of the sectors reached the disk: the first ones, or any.
        keep = rng.random() if rng.random() < 0.5 else 1.0
        scattered = rng.random() < 0.3
        end = write.offset + len(write.data)
        first = write.offset // SECTOR_BYTES
        sectors = (end - 1) // SECTOR_BYTES + 1 - first
        whole = True
        for index in range(sectors):
            if rng.random() < keep if scattered else index < keep * sectors:
                start = max(write.offset, (first + index) * SECTOR_BYTES)
                stop = min(end, (first + index + 1) * SECTOR_BYTES)
                piece = write.data[start - write.offset : stop - write.offset]
                self._put(Write(write.number, start, b""), piece)
            else:
                whole = False
        return not whole

    def flip_bit(self, rng: Random) -> bool:
        """Flip one bit of what is durable."""
        number = rng.choice(sorted(self._files))
        file = self._files[number]
        end = self._tail.offset if number == self._tail.number else len(file.rstrip(b"\0"))
        if not end:
            return False
        self.flipped = True
        file[rng.randrange(end)] ^= 1 << rng.randrange(8)
        return True

    @property
    def has_room(self) -> bool:
        """Whether there is room above the mark."""
        return self.free_bytes is None or self.free_bytes >= FREE_BYTES_MIN

    @property
    def boot(self) -> int:
        """The boot number of the run under way, or of the last one."""
        return self.identity.boot

    def copy(self) -> Disk:
        """What somebody copies of a voter's directory: all that is durable now."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._files = {number: bytearray(data) for number, data in self._files.items()}
        copy._last_slot_before = dict(self._last_slot_before)
        copy.snapshots = dict(self.snapshots)
        copy._under_way = None
        return copy

    # --- reading ----------------------------------------------------------------------------

    def recover(self) -> Recovered:
        """Read all back as the real voter does, and open a segment under the next boot number.
        Raises :class:`DamagedError`, :class:`NoSpaceError`."""
        if self.free_bytes is not None and self.free_bytes < HEADER_BYTES:
            raise NoSpaceError
        state = first_state(self.identity.cluster_id)
        base = None
        if self.snapshots:
            base = self.snapshots[max(self.snapshots)]
            snapshot = decode_snapshot(base)
            state = msgspec.structs.replace(
                state, fixed=snapshot.slot, chain=snapshot.chain, genesis=snapshot.genesis
            )
        segments = [(number, bytes(data)) for number, data in self._files.items()]
        who = self.identity
        try:
            found, records = recover(segments, who.cluster_id, who.sender, state.fixed)
        except JournalError as error:
            raise DamagedError(str(error)) from error
        fixed: list[FixedRun] = []
        for record in records:
            state, runs = replay(state, record)
            fixed.extend(runs)
        self._open(found.last.number, found.last.end, found.last.last_slot, found.identity, state)
        return Recovered(state, tuple(fixed), base, self.identity.boot)

    def _open(self, number: int, end: int, last_slot: int, who: Identity, state: State) -> None:
        """As ``Journal.start``: cut what is torn, then the next segment, durable at once."""
        for later in [n for n in self._files if n > number]:
            del self._files[later]
        del self._files[number][end:]
        self.identity = Identity(who.cluster_id, who.sender, who.incarnation, who.boot + 1)
        write, self._tail = open_segment(
            self.identity, number + 1, state, last_slot, end, self.segment_bytes
        )
        self._put(write, write.data)
        self._last_slot_before[number + 1] = last_slot
        self._before = state
