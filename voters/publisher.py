"""The stream as a voter speaks it: this module alone decides what is multicast, and when.

Fixed runs are cut into datagrams that each carry the chain before their first slot; a value too
large for one is left out, and the tip announces it.  Newest fixed slots stand on a ``shelf``, so
that repair requests naming this voter are answered without a disk.  A request costs the loop the
reading of one datagram and a note of the range; what it asked for leaves under a cap of bytes per
second that the commits' own datagrams never share.

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
from trex_core.shelf import Piece, Shelf
from trex_core.state import FixedRun
from trex_core.wire import DATAGRAM_BODY_BYTES_MAX, HEADER_BYTES, encode_body

RECENT_BYTES_MAX: Final = 32 << 20
"""Most bytes of fixed values kept for repair."""
RECENT_SLOTS_MAX: Final = 65_536
"""Most fixed slots kept for repair."""


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
        self._burst_datagrams = burst_datagrams
        self._shelf = Shelf(
            count, repair_bytes_per_s, slots_max=RECENT_SLOTS_MAX, bytes_max=RECENT_BYTES_MAX
        )
        self._queue: deque[tuple[int, int]] = deque()
        """Runs of slots to be streamed, not adjacent."""
        self._ballot = NO_BALLOT
        self.announce = False
        """Whether the tip should be multicast now: a value was left out of the stream."""

    # --- what is fixed ----------------------------------------------------------------------

    def reset(self, fixed: int, chain: bytes) -> None:
        """Start after slot ``fixed``: at boot, or after a snapshot was installed."""
        self._shelf.reset(fixed, chain)
        self._queue.clear()

    def fixed(self, run: FixedRun, ballot: Ballot, leading: bool) -> None:
        """Take a newly fixed run; the leader queues it for the stream."""
        self._shelf.add(run)
        self._ballot = ballot
        if leading:
            # Cut and signed by pump(), once for all that one turn fixes, after who waits for a
            # reply has it.
            first = run.first
            if self._queue and self._queue[-1][1] + 1 == first:
                first, _ = self._queue.pop()
            self._queue.append((first, run.last))

    def _datagram(self, piece: Piece, *, repair: bool) -> bytes | None:
        """The datagram of a piece; None when its value is too large for one."""
        if not piece.values:
            self._count("stream.too_large")
            self.announce |= not repair  # who asks for it has the tip; and tips have no cap
            return None
        run = StreamRun(
            self._ballot,
            piece.first,
            piece.chain_before,
            piece.values,
            self._shelf.last,
            self._shelf.chain,
            repair,
            self._voter,
            self._tip_signature(self._ballot),
        )
        return encode_body(run)

    def _tip_signature(self, ballot: Ballot) -> bytes:
        """Of the tip as it is now; made once for all datagrams of a flush."""
        tip = (ballot, self._shelf.last, self._shelf.chain)
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
            self._shelf.last,
            self._shelf.chain,
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
        self._shelf.request(request.first, request.last)

    @property
    def waiting(self) -> bool:
        """Is there something that :meth:`pump` has not sent yet?"""
        return bool(self._queue) or self._shelf.waiting

    def pump(self, now_s: float) -> bool:
        """Send a burst of the stream, and then repairs as far as their cap allows. True if
        something is left for another time."""
        for _ in range(self._burst_datagrams):
            if not self._queue:
                break
            self._stream_on()
        self._shelf.repair(now_s, self._repair)
        return self.waiting

    def _stream_on(self) -> None:
        """Send one datagram of what is to be streamed."""
        first, last = self._queue.popleft()
        # What is larger than the whole shelf, catch-up serves.
        piece = self._shelf.cut(max(first, self._shelf.first), last)
        if piece is None:
            return
        if piece.after <= last:
            self._queue.appendleft((piece.after, last))
        body = self._datagram(piece, repair=False)
        if body is not None:
            self._send(body)

    def _repair(self, piece: Piece) -> int:
        body = self._datagram(piece, repair=True)
        if body is None:
            return 0
        self._send(body)
        return HEADER_BYTES + len(body)
