"""What was fixed lately, kept to be told again: this module alone cuts it for datagrams and doses
repairs.

Voters and listeners that help others each have one.  The newest fixed slots stand on it, in order
and without a hole, within bounds of bytes and slots; the oldest go first.  A request for a repair
costs a note of its range; what it asked for leaves under a cap of bytes per second (a token
bucket), slots told again within REPAIR_LINGER_S are not repeated, since everybody hears a repair,
and at most REPAIR_RANGES_MAX ranges wait.

No sockets and no clock: every call is given the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from trex_core.messages import DATAGRAM_BYTES_MAX
from trex_core.state import FixedRun
from trex_core.wire import DATAGRAM_BODY_BYTES_MAX

REPAIR_LINGER_S: Final = 0.010
"""A slot is not told again within this time."""
REPAIR_RANGES_MAX: Final = 64
"""Most ranges that wait to be repaired; further requests are dropped and counted."""
REPAIR_SLOTS_MAX: Final = 1024
"""Most slots of one request that are looked at; the asker will ask again for the rest."""
REPAIR_DATAGRAMS_PER_TURN: Final = 8
"""Most repairs told in one turn of the loop."""
RUN_OVERHEAD_BYTES: Final = 232
"""More than an encoded StreamRun needs beside its values."""
VALUE_OVERHEAD_BYTES: Final = 5
RUN_VALUES_BYTES_MAX: Final = DATAGRAM_BODY_BYTES_MAX - RUN_OVERHEAD_BYTES
"""Most bytes of values, each with its length, in one datagram."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Slots from ``first`` and the chain before it. No ``values``: that slot's value is too large
    for a datagram."""

    first: int
    chain_before: bytes
    values: tuple[bytes, ...]

    @property
    def after(self) -> int:
        """The first slot that is not in it, nor too large to be."""
        return self.first + max(1, len(self.values))


Tell: TypeAlias = Callable[[Piece], int]
"""Says a piece again; returns how many bytes left for that."""


class _Held:
    """One fixed slot."""

    __slots__ = ("chain_before", "repaired_s", "value")

    def __init__(self, value: bytes, chain_before: bytes) -> None:
        self.value = value
        self.chain_before = chain_before
        self.repaired_s = float("-inf")


class Shelf:
    """At most ``slots_max`` slots and ``bytes_max`` bytes of values. ``repair_bytes_per_s`` caps
    repairs, ``count`` counts by name what happens to requests."""

    def __init__(
        self,
        count: Callable[[str], None],
        repair_bytes_per_s: int,
        *,
        slots_max: int,
        bytes_max: int,
    ) -> None:
        self._count = count
        self._slots_max = slots_max
        self._bytes_max = bytes_max
        self._rate = repair_bytes_per_s
        self._burst_bytes = max(repair_bytes_per_s // 10, 2 * DATAGRAM_BYTES_MAX)
        self._tokens = float(self._burst_bytes)
        self._tokens_s = 0.0
        self._held: dict[int, _Held] = {}
        self._bytes = 0
        self._ranges: deque[tuple[int, int]] = deque()
        self.first = 1
        """The oldest slot held; ``last + 1`` when none is."""
        self.last = 0
        """The newest fixed slot."""
        self.chain = b""
        """The chain at ``last``."""

    def reset(self, last: int, chain: bytes) -> None:
        """Start after slot ``last``: at boot, or after a snapshot was installed."""
        self._held.clear()
        self._bytes = 0
        self._ranges.clear()
        self.first, self.last, self.chain = last + 1, last, chain

    def add(self, run: FixedRun) -> None:
        """Take a newly fixed run. Requires that it follows ``last``."""
        held, before = self._held, run.chain_before
        for slot, (value, chain) in enumerate(zip(run.values, run.chains, strict=True), run.first):
            held[slot] = _Held(value, before)
            self._bytes += len(value)
            before = chain
        self.last, self.chain = run.last, before
        while self._bytes > self._bytes_max or len(held) > self._slots_max:
            self._bytes -= len(held.pop(self.first).value)
            self.first += 1

    def cut(self, first: int, last: int) -> Piece | None:
        """As many slots from ``first`` to ``last`` as fit one datagram; None if ``first`` is not
        held."""
        head = self._held.get(first)
        if head is None:
            return None
        values: list[bytes] = []
        size = 0
        slot = first
        while slot <= last and (held := self._held.get(slot)) is not None:
            size += len(held.value) + VALUE_OVERHEAD_BYTES
            if size > RUN_VALUES_BYTES_MAX:
                break
            values.append(held.value)
            slot += 1
        return Piece(first, head.chain_before, tuple(values))

    def run(self, first: int, last: int) -> Piece | None:
        """Slots ``first`` to ``last``, whatever their size; None if not all are held."""
        if not self.first <= first <= last <= self.last:
            return None
        values = tuple(self._held[slot].value for slot in range(first, last + 1))
        return Piece(first, self._held[first].chain_before, values)

    def last_within(self, first: int, slots_max: int, bytes_max: int) -> int:
        """The last slot such that from ``first`` to it are at most ``slots_max`` slots and beyond
        the first at most ``bytes_max`` bytes. Requires that ``first`` is held."""
        size = len(self._held[first].value)
        slot = first
        while slot < self.last and slot - first + 1 < slots_max:
            size += len(self._held[slot + 1].value)
            if size > bytes_max:
                break
            slot += 1
        return slot

    # --- repairs ----------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Is there a repair that :meth:`repair` has not told yet?"""
        return bool(self._ranges)

    def request(self, first: int, last: int) -> None:
        """Note a request for slots ``first`` to ``last``; :meth:`repair` serves it."""
        first = max(first, self.first)
        last = min(last, first + REPAIR_SLOTS_MAX - 1, self.last)
        if first > last:
            self._count("repair.not_held")
        elif len(self._ranges) >= REPAIR_RANGES_MAX:
            self._count("repair.queue_full")
        elif (first, last) in self._ranges:
            self._count("repair.repeated")
        else:
            self._count("repair.taken")
            self._ranges.append((first, last))

    def repair(self, now_s: float, tell: Tell) -> None:
        """Have ``tell`` say again what was asked for, as far as the cap allows."""
        if not self._ranges:
            return
        self._tokens = min(
            float(self._burst_bytes), self._tokens + (now_s - self._tokens_s) * self._rate
        )
        self._tokens_s = now_s
        for _ in range(REPAIR_DATAGRAMS_PER_TURN):
            while self._ranges and not self._skip_repaired(now_s):
                self._ranges.popleft()
            if not self._ranges:
                return
            if self._tokens < DATAGRAM_BYTES_MAX:
                self._count("repair.capped")
                return
            first, last = self._ranges[0]
            piece = self.cut(first, last)
            assert piece is not None, "what was skipped to is held"
            for slot in range(first, piece.after):
                self._held[slot].repaired_s = now_s
            self._ranges[0] = (piece.after, last)
            size = tell(piece)
            if size:
                self._tokens -= size
                self._count("repair.sent")

    def _skip_repaired(self, now_s: float) -> bool:
        """Move the oldest range past what was repaired a moment ago; False when it is done."""
        first, last = self._ranges[0]
        slot = max(first, self.first)
        while slot <= last:
            if now_s - self._held[slot].repaired_s > REPAIR_LINGER_S:
                self._ranges[0] = (slot, last)
                return True
            slot += 1
        return False
