"""What a signed tip proves: this module alone decides which slots of the stream to believe.

Whoever holds the stream key can multicast anything, but not sign as a voter: a tip is a slot and
the chain there, signed.  Each run of slots carries the chain before its first slot, so a tip that
was verified proves the run that ends there, the chain before it proves the run before, and so on:
backwards, datagram by datagram, in whichever order they come and however they were cut (DESIGN §5).
A forgery proves nothing and spoils nothing: it falls alone.  What nothing proves yet waits, within
bounds; its slots are asked for again like lost ones.

No I/O and no clock.  Signatures are verified elsewhere (``seal``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from trex_core.messages import Ballot, SignedTip, StreamRun, StreamTip
from trex_core.state import FixedRun, chain_run

PENDING_SLOTS_MAX: Final = 8192
"""Most slots that wait for a proof; the oldest runs go first."""
PENDING_BYTES_MAX: Final = 8 << 20
"""The same in bytes of values."""
ANCHORS_MAX: Final = 8192
"""Most proven chains that are remembered; the oldest go first."""
TIPS_MAX: Final = 8192
"""Most verified tips that are remembered, to be compared with later ones and shown to others."""

Verify = Callable[[int, Ballot, int, bytes, bytes], bool]
"""Did (voter) sign (ballot, slot, chain) with (signature)?"""


class ContradictionError(Exception):
    """What voters signed cannot all be, or not beside what is held: ``slot`` would have both
    ``chains``, the one held first. ``tips`` are the evidence: they are at that slot, or the chain
    to them leads through it. What is applied may be wrong; nothing more can be believed."""

    def __init__(self, slot: int, chains: tuple[bytes, bytes], tips: tuple[SignedTip, ...]) -> None:
        signed = ", ".join(f"voter {tip.voter} for slot {tip.slot}" for tip in tips)
        super().__init__(
            f"slot {slot} has chain {chains[0].hex()} and chain {chains[1].hex()}, by what was "
            f"signed by {signed}: the cluster contradicts itself, or what is stored here"
        )
        self.slot = slot
        self.chains = chains
        self.tips = tips


def tip_of(message: StreamRun | StreamTip) -> SignedTip:
    """The tip that ``message`` tells."""
    return SignedTip(
        message.tip_slot, message.tip_chain, message.ballot, message.signer, message.signature
    )


class _Waiting:
    __slots__ = ("bytes", "chains", "last", "run", "sender")

    def __init__(self, sender: int, run: StreamRun, chains: tuple[bytes, ...]) -> None:
        self.sender = sender
        self.run = run
        self.chains = chains
        self.last = run.first + len(run.values) - 1
        self.bytes = sum(map(len, run.values))


class Proof:
    """The state of one follower's belief. ``verify`` checks a signature, which is dear; ``count``
    counts what happens by name."""

    def __init__(self, verify: Verify, count: Callable[[str], None]) -> None:
        self._verify = verify
        self._count = count
        self._anchors: dict[int, bytes] = {}
        """Slot -> the chain there, proven."""
        self._tips: dict[int, SignedTip] = {}
        self.newest: SignedTip | None = None
        """The highest tip that was verified."""
        self._waiting: dict[tuple[int, bytes, bytes], _Waiting] = {}
        self._covering: dict[int, dict[tuple[int, bytes, bytes], None]] = {}
        """Slot -> the runs that wait and have it."""
        self._slots = self._bytes = 0
        self._done = 0

    def done(self, slot: int) -> None:
        """Everything up to ``slot`` was delivered: nothing of it needs a proof any more."""
        news, self._done = range(self._done + 1, slot + 1), slot
        # Called often, and what waits may all be forged: never look through all of that.
        covering = self._covering
        slots = news if len(news) < len(covering) else [each for each in covering if each in news]
        for last in slots:
            for key in [key for key in covering.get(last, ()) if self._waiting[key].last <= slot]:
                self._drop(key)

    def begin(self, slot: int, chain: bytes) -> None:
        """All up to ``slot``, where the chain is ``chain``, is held already: from a store or a
        snapshot. What voters sign must agree with it."""
        self._anchor(slot, chain)

    def delivered(self, run: FixedRun) -> None:
        """``run`` was delivered: proven, so its chains are what every later tip must agree with."""
        for slot, chain in enumerate(run.chains, run.first):
            self._anchor(slot, chain)

    def tip(self, tip: SignedTip) -> bool:
        """Verify ``tip`` and remember it. Raises :class:`ContradictionError`."""
        known = self._tips.get(tip.slot)
        if known is not None and (known.chain, known.signature) == (tip.chain, tip.signature):
            return True
        if not self._verify(tip.voter, tip.ballot, tip.slot, tip.chain, tip.signature):
            self._count("dropped_signature")
            return False
        if known is not None and known.chain != tip.chain:
            raise ContradictionError(tip.slot, (known.chain, tip.chain), (known, tip))
        self.compare(tip.slot, tip.chain, tip)
        if known is None:
            if len(self._tips) >= TIPS_MAX:
                del self._tips[next(iter(self._tips))]
            self._tips[tip.slot] = tip
            if self.newest is None or tip.slot > self.newest.slot:
                self.newest = tip
        return True

    def compare(self, slot: int, chain: bytes, tip: SignedTip) -> None:
        """Verified ``tip`` says, of itself or through the chain to it, that ``slot`` has ``chain``.
        Raises :class:`ContradictionError` if something else is proven there."""
        held = self._anchors.get(slot)
        if held is None or held == chain:
            return
        other = self._tip_from(slot)
        tips = (tip,) if other is None or other == tip else (other, tip)
        raise ContradictionError(slot, (held, chain), tips)

    def _tip_from(self, slot: int) -> SignedTip | None:
        above = min((each for each in self._tips if each >= slot), default=None)
        return self._tips[above] if above is not None else None

    def tip_within(self, first: int, last: int) -> SignedTip | None:
        """The highest verified tip for a slot from ``first`` to ``last``; None: there is none."""
        slot = max((each for each in self._tips if first <= each <= last), default=None)
        return self._tips[slot] if slot is not None else None

    def waits(self, run: StreamRun) -> bool:
        """Whether the last slot of ``run`` waits for a proof: then the tip told with it is worth a
        look, though what waits be a part of it only, or the same told under another tip."""
        return run.first + len(run.values) - 1 in self._covering

    def alone(self, sender: int, run: StreamRun) -> list[tuple[int, StreamRun]] | None:
        """As :meth:`proven` for one run that ends at its own tip, not verified yet, while nothing
        else waits: all that a follower hears who misses nothing. None: it is no such run."""
        last = run.first + len(run.values) - 1
        if self._waiting or run.tip_slot != last or last <= self._done:
            return None
        if any(slot in self._anchors for slot in range(run.first, last + 1)):
            return None
        if chain_run(run.chain_before, run.first, run.values)[-1] != run.tip_chain:
            return None
        if not self.tip(tip_of(run)):
            self._wait(sender, run)
            return []
        self._anchor(last, run.tip_chain)
        self._anchor(run.first - 1, run.chain_before)
        return [(sender, run)]

    def proven(
        self, heard: list[tuple[int, StreamRun]], tips: list[tuple[int, bytes]]
    ) -> list[tuple[int, StreamRun]]:
        """What can be believed now, by slot: of ``heard`` and of what waited, given that ``tips``
        (slot, chain) were verified. The tip told in each is proven too."""
        out: list[tuple[int, StreamRun]] = []
        for sender, run in heard:
            self._wait(sender, run)
        work = [slot for slot, chain in tips if self._anchor(slot, chain)]
        for _, run in heard:
            slots = range(run.first, run.first + len(run.values))
            work += [slot for slot in slots if slot in self._anchors]
        while work:
            slot = work.pop()
            chain = self._anchors.get(slot)
            if chain is None:
                continue
            for key in list(self._covering.get(slot, ())):
                waiting = self._waiting[key]  # the rest of another takes no more than it left
                run = waiting.run
                place = slot - run.first
                self._drop(key)
                if waiting.chains[place] != chain:
                    self._count("dropped_forged")
                    continue
                out.append((waiting.sender, self._told(waiting, place + 1)))
                if place + 1 < len(run.values):
                    rest = replace(
                        run, first=slot + 1, chain_before=chain, values=run.values[place + 1 :]
                    )
                    self._wait(waiting.sender, rest, waiting.chains[place + 1 :])
                if self._anchor(run.first - 1, run.chain_before):
                    work.append(run.first - 1)
        out.sort(key=lambda each: each[1].first)
        return out

    def _told(self, waiting: _Waiting, count: int) -> StreamRun:
        """The first ``count`` slots of a run that waited. If its tip is not one that was verified,
        the last of these slots is told as the tip: that much is proven, and a newer tip would have
        what follows in the same batch taken for lost."""
        run = waiting.run
        known = self._tips.get(run.tip_slot)
        if count == len(run.values) and known is not None and known.chain == run.tip_chain:
            return run
        return replace(
            run,
            values=run.values[:count],
            tip_slot=run.first + count - 1,
            tip_chain=waiting.chains[count - 1],
            signer=0,
            signature=b"",
        )

    def _anchor(self, slot: int, chain: bytes) -> bool:
        """Remember that the chain at ``slot`` is ``chain``; whether that is news."""
        held = self._anchors.get(slot)
        if held is not None:
            if held != chain:  # both are proven
                tip = self._tip_from(slot)
                raise ContradictionError(slot, (held, chain), (tip,) if tip is not None else ())
            return False
        if len(self._anchors) >= ANCHORS_MAX:
            del self._anchors[next(iter(self._anchors))]
        self._anchors[slot] = chain
        return True

    def _wait(self, sender: int, run: StreamRun, chains: tuple[bytes, ...] = ()) -> None:
        if run.first + len(run.values) - 1 <= self._done:
            self._count("duplicate")
            return
        chains = chains or chain_run(run.chain_before, run.first, run.values)
        key = (run.first, run.chain_before, chains[-1])
        if key in self._waiting:
            self._count("duplicate")
            return
        waiting = _Waiting(sender, run, chains)
        self._waiting[key] = waiting
        for slot in range(run.first, waiting.last + 1):
            self._covering.setdefault(slot, {})[key] = None
        self._slots += len(run.values)
        self._bytes += waiting.bytes
        while self._slots > PENDING_SLOTS_MAX or self._bytes > PENDING_BYTES_MAX:
            self._drop(next(iter(self._waiting)))
            self._count("dropped_unproven")

    def _drop(self, key: tuple[int, bytes, bytes]) -> None:
        waiting = self._waiting.pop(key)
        for slot in range(waiting.run.first, waiting.last + 1):
            covering = self._covering[slot]
            del covering[key]
            if not covering:
                del self._covering[slot]
        self._slots -= len(waiting.run.values)
        self._bytes -= waiting.bytes
