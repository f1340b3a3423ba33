"""What subscribers are told: the recent changes, kept once for all of them.

This module alone knows what a subscriber sees, and in what order.  There is no queue per
subscriber: a :class:`Window` keeps the newest changes, a :class:`Subscription` is a place in it. So
a thousand subscribers cost no more memory than one, telling them never blocks, and one that falls
out of the window is told so once (:class:`Lagged`) and goes on with what there is.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from typing import Final, TypeAlias

import anyio.lowlevel
import msgspec

from trex_core.metadata.commands import Change

CHANGES_KEPT_MAX: Final = 65_536
"""Most changes kept for subscribers that are behind."""
CHANGES_BYTES_MAX: Final = 32 << 20
"""Most bytes of the slots whose changes are kept."""
_STEPS_PER_TURN: Final = 256


class SlotChanges(msgspec.Struct, frozen=True):
    """All that slot ``slot`` changed (of what was asked for), in the order it did."""

    slot: int
    changes: tuple[Change, ...]


class Reset(msgspec.Struct, frozen=True):
    """A jump: the exact difference between the states at ``from_slot`` and ``to_slot``, at once,
    without the steps between. It stands for the slots ``from_slot + 1`` .. ``to_slot``."""

    from_slot: int
    to_slot: int
    changes: tuple[Change, ...]


class Lagged(msgspec.Struct, frozen=True):
    """The subscriber was too slow: what the slots ``from_slot`` .. ``to_slot`` changed is not kept
    any more. What follows continues after ``to_slot``; for the state itself take
    ``listener.state``, or subscribe again with ``since=0``."""

    from_slot: int
    to_slot: int


class Progress(msgspec.Struct, frozen=True):
    """A bookmark: everything up to ``slot``, the newest slot known to be fixed, was delivered."""

    slot: int


Delivery: TypeAlias = SlotChanges | Reset | Lagged | Progress


class CompactedError(LookupError):
    """Changes since the slot asked for are not kept any more; they are from ``first_slot`` on."""

    def __init__(self, since: int, first_slot: int) -> None:
        super().__init__(
            f"changes since slot {since} are not kept; the first slot available is {first_slot}. "
            f"Take listener.state and subscribe since its slot, or subscribe with since=0"
        )
        self.first_slot = first_slot


class Window:
    """The newest changes. Written by the listener's task, read by subscriptions on its loop."""

    def __init__(
        self,
        slot: int,
        *,
        changes_max: int = CHANGES_KEPT_MAX,
        bytes_max: int = CHANGES_BYTES_MAX,
    ) -> None:
        self.applied = slot
        self.tip = slot
        self.first_slot = slot + 1
        """Everything from this slot on is kept."""
        self.base = 0
        """How many entries were dropped: the number of the oldest one kept."""
        self.entries: deque[tuple[SlotChanges | Reset, int]] = deque()
        self.closed = False
        self.failure: Exception | None = None
        self._changes_max = changes_max
        self._bytes_max = bytes_max
        self._changes = 0
        self._bytes = 0
        self._waiting: dict[asyncio.Future[None], None] = {}

    def add(self, entry: SlotChanges | Reset, size_bytes: int) -> None:
        """Keep ``entry``; the oldest go when there are too many, the newest stays always."""
        self.entries.append((entry, size_bytes))
        self._changes += len(entry.changes)
        self._bytes += size_bytes
        while (self._changes > self._changes_max or self._bytes > self._bytes_max) and len(
            self.entries
        ) > 1:
            oldest, oldest_bytes = self.entries.popleft()
            self._changes -= len(oldest.changes)
            self._bytes -= oldest_bytes
            self.base += 1
            self.first_slot = slot_of(oldest) + 1

    def advance(self, applied: int, tip: int) -> None:
        """All up to ``applied`` was added; wake whoever waits."""
        self.applied = applied
        self.tip = max(tip, applied)
        for each in self._waiting:
            if not each.done():
                each.set_result(None)

    def close(self, failure: Exception | None) -> None:
        """End all subscriptions: with ``failure``, or quietly once they have read what is kept."""
        if not self.closed:
            self.closed, self.failure = True, failure
            self.advance(self.applied, self.tip)

    async def moved(self) -> None:
        """Wait for the next :meth:`advance`."""
        moved = asyncio.get_running_loop().create_future()
        self._waiting[moved] = None
        try:
            await moved
        finally:
            del self._waiting[moved]

    def number_after(self, slot: int) -> int:
        """The number of the first entry above ``slot``."""
        return self.base + bisect_right(self.entries, slot, key=lambda held: slot_of(held[0]))


def slot_of(entry: SlotChanges | Reset) -> int:
    """The slot an entry brings its reader to."""
    return entry.slot if isinstance(entry, SlotChanges) else entry.to_slot


class Subscription:
    """An endless async iterator of deliveries after slot ``slot``. It holds no resource: stop
    iterating and it is gone. ``slot`` moves on as it is read, and is where to resume."""

    def __init__(
        self,
        window: Window,
        since: int,
        *,
        kind: str | None,
        prefix: str,
        progress: bool,
        first: Reset | None = None,
    ) -> None:
        self.slot = since
        self._window = window
        self._kind = kind
        self._prefix = prefix
        self._progress = progress
        self._first = first
        self._number = window.number_after(since)
        self._marked = -1
        self._steps = 0

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Delivery:
        while True:
            delivery = self.take()
            if delivery is not None:
                # A subscriber with much to read must not keep the loop to itself.
                self._steps += 1
                if self._steps % _STEPS_PER_TURN == 0:
                    await anyio.lowlevel.checkpoint()
                return delivery
            window = self._window
            if window.closed:
                if window.failure is not None:
                    raise window.failure
                raise StopAsyncIteration
            await window.moved()

    def take(self) -> Delivery | None:
        """The next delivery that is there already, without waiting; None when there is none now.
        For who looks now and then instead of being woken at each slot."""
        window = self._window
        if self._first is not None:
            first, self._first = self._first, None
            return self._filtered(first)
        if self._number < window.base:
            missed = Lagged(self.slot + 1, window.first_slot - 1)
            self._number = window.base
            self.slot = max(self.slot, missed.to_slot)
            if missed.from_slot <= missed.to_slot:
                return missed
        while self._number < window.base + len(window.entries):
            entry, _ = window.entries[self._number - window.base]
            self._number += 1
            before, to_slot = self.slot, slot_of(entry)
            if to_slot <= before:
                continue
            self.slot = to_slot
            if isinstance(entry, Reset) and entry.from_slot < before:
                # It resumed inside the jump: the difference is not to its state.
                return Lagged(before + 1, to_slot)
            delivery = self._filtered(entry)
            if delivery is not None:
                return delivery
        self.slot = max(self.slot, window.applied)
        if self._progress and window.tip <= window.applied == self.slot != self._marked:
            self._marked = self.slot
            return Progress(self.slot)
        return None

    def _filtered(self, entry: SlotChanges | Reset) -> SlotChanges | Reset | None:
        """What of ``entry`` was asked for; a jump is told even if nothing of it was."""
        kind, prefix = self._kind, self._prefix
        if kind is None and not prefix:
            return entry
        changes = tuple(
            change
            for change in entry.changes
            if (kind is None or change.kind == kind) and change.key.startswith(prefix)
        )
        if isinstance(entry, Reset):
            return Reset(entry.from_slot, entry.to_slot, changes)
        return SlotChanges(entry.slot, changes) if changes else None
