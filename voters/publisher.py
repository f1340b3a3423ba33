"""The stream as a voter speaks it: this module alone decides what is multicast, and when.

Fixed runs are cut into datagrams that each carry the chain before their first slot; a value too
large for one is left out, and the tip announces it.  Newest fixed slots are kept in memory within
bounds so that repair requests naming this voter are answered without a disk.  A request costs the
loop the reading of one datagram and a note of the range; what it asked for leaves under a cap of
bytes per second (a token bucket that the commits' own datagrams never share), slots repaired within
REPAIR_LINGER_S are not repeated, and at most REPAIR_RANGES_MAX ranges wait.

No sockets and no clock: ``send`` takes an encoded datagram body, every call is given the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from trex_core.messages import (
    NO_BALLOT,
    WORDS_BYTES,
    Ballot,
    ListenerDigest,
    RepairRequest,
    StreamRun,
    StreamTip,
    VoterDigest,
)
from trex_core.roster import DIGEST_BYTES
from trex_core.seal import SIGNATURE_BYTES, Signer
from trex_core.state import FixedRun
from trex_core.wire import DATAGRAM_BODY_BYTES_MAX, encode_body

RECENT_BYTES_MAX: Final = 32 << 20
"""Most bytes of fixed values kept for repair."""
RECENT_SLOTS_MAX: Final = 65_536
"""Most fixed slots kept for repair."""
REPAIR_LINGER_S: Final = 0.010
"""A slot is not repaired again within this time: everybody hears a repair."""
REPAIR_RANGES_MAX: Final = 64
"""Most ranges that wait to be repaired; further requests are dropped and counted."""
REPAIR_SLOTS_MAX: Final = 1024
"""Most slots of one request that are looked at; the asker will ask again for the rest."""
REPAIR_DATAGRAMS_PER_PUMP: Final = 8
"""Most repairs sent in one turn of the loop."""
RUN_OVERHEAD_BYTES: Final = 232
"""More than an encoded StreamRun needs beside its values."""
VALUE_OVERHEAD_BYTES: Final = 5
RUN_VALUES_BYTES_MAX: Final = DATAGRAM_BODY_BYTES_MAX - RUN_OVERHEAD_BYTES
"""Most bytes of values, each with its length, in one datagram."""


class _Recent:
    """One fixed slot kept for repair."""

    __slots__ = ("chain_before", "repaired_s", "value")

    def __init__(self, value: bytes, chain_before: bytes) -> None:
        self.value = value
        self.chain_before = chain_before
        self.repaired_s = float("-inf")


class Publisher:
    """What one voter multicasts, signed by it. ``repair_bytes_per_s`` caps repairs,
    ``burst_datagrams`` is the most that :meth:`pump` sends of the stream at once."""

    def __init__(
        self,
        send: Callable[[bytes], None],
        count: Callable[[str], None],
        repair_bytes_per_s: int,
        burst_datagrams: int,
        signer: Signer,
        voter: int,
    ) -> None:
        self._signer = signer
        self._voter = voter
        self._signed: tuple[Ballot, int, bytes] = (NO_BALLOT, -1, b"")
        self._signature = b""
        self._send = send
        self._count = count
        self._rate = repair_bytes_per_s
        self._burst_bytes = max(repair_bytes_per_s // 10, 2 * DATAGRAM_BODY_BYTES_MAX)
        self._tokens = float(self._burst_bytes)
        self._tokens_s = 0.0
        self._burst_datagrams = burst_datagrams
        self._recent: dict[int, _Recent] = {}
        self._recent_first = 1
        self._recent_bytes = 0
        self._queue: deque[bytes] = deque()
        self._ranges: deque[tuple[int, int]] = deque()
        self._fixed = 0
        self._chain = b""
        self._ballot = NO_BALLOT
        self.announce = False
        """Whether the tip should be multicast now: a value was left out of the stream."""

    # --- what is fixed ----------------------------------------------------------------------

    def reset(self, fixed: int, chain: bytes) -> None:
        """Start after slot ``fixed``: at boot, or after a snapshot was installed."""
        self._recent.clear()
        self._recent_first = fixed + 1
        self._recent_bytes = 0
        self._ranges.clear()
        self._fixed, self._chain = fixed, chain

    def fixed(self, run: FixedRun, ballot: Ballot, leading: bool) -> None:
        """Take a newly fixed run; the leader queues it for the stream."""
        before = run.chain_before
        recent = self._recent
        for slot, (value, chain) in enumerate(zip(run.values, run.chains, strict=True), run.first):
            recent[slot] = _Recent(value, before)
            self._recent_bytes += len(value)
            before = chain
        self._fixed, self._chain, self._ballot = run.last, before, ballot
        while self._recent_bytes > RECENT_BYTES_MAX or len(recent) > RECENT_SLOTS_MAX:
            self._recent_bytes -= len(recent.pop(self._recent_first).value)
            self._recent_first += 1
        if leading:
            slot = run.first
            while slot <= run.last:
                slot = self._enqueue(slot, run.last)

    def _enqueue(self, first: int, last: int) -> int:
        """Queue one datagram from ``first``; returns the first slot that is not in it."""
        if first not in self._recent:
            return first + 1  # larger than the whole buffer: catch-up serves it
        body, after = self._datagram(first, last, repair=False)
        if body is not None:
            self._queue.append(body)
        return after

    def _datagram(self, first: int, last: int, *, repair: bool) -> tuple[bytes | None, int]:
        """The datagram of as many slots from ``first`` as fit; None when the first does not."""
        head = self._recent[first]
        values: list[bytes] = []
        size = 0
        slot = first
        while slot <= last and (held := self._recent.get(slot)) is not None:
            size += len(held.value) + VALUE_OVERHEAD_BYTES
            if size > RUN_VALUES_BYTES_MAX:
                break
            values.append(held.value)
            slot += 1
        if not values:
            self._count("stream.too_large")
            self.announce = True
            return None, first + 1
        run = StreamRun(
            self._ballot,
            first,
            head.chain_before,
            tuple(values),
            self._fixed,
            self._chain,
            repair,
            self._voter,
            self._tip_signature(self._ballot),
        )
        return encode_body(run), slot

    def _tip_signature(self, ballot: Ballot) -> bytes:
        """Of the tip as it is now; made once for all datagrams of a flush."""
        tip = (ballot, self._fixed, self._chain)
        if tip != self._signed:
            self._signed = tip
            self._signature = self._signer.tip(*tip)
        return self._signature

    # --- sending ----------------------------------------------------------------------------

    def tip(
        self,
        ballot: Ballot,
        leading: bool,
        digest: VoterDigest,
        listeners: Callable[[int], ListenerDigest] | None = None,
    ) -> None:
        """Multicast the heartbeat of the stream, which is one datagram: ``listeners(bytes_max)``
        are told in the space that ``digest`` leaves, which loses its oldest transitions if it
        leaves too little."""
        self.announce = False
        tip = StreamTip(
            ballot,
            leading,
            self._fixed,
            self._chain,
            digest,
            self._voter,
            self._tip_signature(ballot),
            bytes(SIGNATURE_BYTES),
        )
        body = encode_body(tip)
        room = DATAGRAM_BODY_BYTES_MAX - DIGEST_BYTES
        while len(body) > room and digest.transitions:
            digest = replace(digest, transitions=digest.transitions[1:])
            body = encode_body(replace(tip, digest=digest))
        if listeners is not None:
            left = DATAGRAM_BODY_BYTES_MAX - len(body)
            digest = replace(digest, listeners=listeners(left))
            body = encode_body(replace(tip, digest=digest))
        said = body[:-WORDS_BYTES]
        words = self._signer.words(said)
        self._send(b"".join((said, body[-WORDS_BYTES:-SIGNATURE_BYTES], words)))

    def request(self, request: RepairRequest) -> None:
        """Note a repair request that names this voter; it is served by :meth:`pump`."""
        first = max(request.first, self._recent_first)
        last = min(request.last, request.first + REPAIR_SLOTS_MAX - 1, self._fixed)
        if first > last:
            self._count("repair.not_held")
        elif len(self._ranges) >= REPAIR_RANGES_MAX:
            self._count("repair.queue_full")
        elif (first, last) in self._ranges:
            self._count("repair.repeated")
        else:
            self._count("repair.taken")
            self._ranges.append((first, last))

    @property
    def waiting(self) -> bool:
        """Is there something that :meth:`pump` has not sent yet?"""
        return bool(self._queue or self._ranges)

    def pump(self, now_s: float) -> bool:
        """Send a burst of the stream, and then repairs as far as their cap allows. True if
        something is left for another time."""
        queue = self._queue
        for _ in range(min(self._burst_datagrams, len(queue))):
            self._send(queue.popleft())
        if self._ranges:
            self._repair(now_s)
        return self.waiting

    def _repair(self, now_s: float) -> None:
        self._tokens = min(
            float(self._burst_bytes), self._tokens + (now_s - self._tokens_s) * self._rate
        )
        self._tokens_s = now_s
        for _ in range(REPAIR_DATAGRAMS_PER_PUMP):
            while self._ranges and not self._skip_repaired(now_s):
                self._ranges.popleft()
            if not self._ranges:
                return
            if self._tokens < DATAGRAM_BODY_BYTES_MAX:
                self._count("repair.capped")
                return
            first, last = self._ranges[0]
            body, after = self._datagram(first, last, repair=True)
            for slot in range(first, after):
                self._recent[slot].repaired_s = now_s
            self._ranges[0] = (after, last)
            if body is not None:
                self._tokens -= len(body)
                self._send(body)
                self._count("repair.sent")

    def _skip_repaired(self, now_s: float) -> bool:
        """Move the oldest range past what was repaired a moment ago; False when it is done."""
        first, last = self._ranges[0]
        slot = max(first, self._recent_first)
        while slot <= last:
            if now_s - self._recent[slot].repaired_s > REPAIR_LINGER_S:
                self._ranges[0] = (slot, last)
                return True
            slot += 1
        return False
