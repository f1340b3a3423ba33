"""The learner: puts a lossy stream of fixed slots in order, and decides what to ask of whom.

This module alone orders, buffers and repairs.  It is pure: time is ``now_ms`` in events, chance a
hash of (seed, name, ...).  Guarantees towards whoever it delivers to: Ordered, Unique, Reliable (no
gap); each delivered run continues the hash chain of the one before.

Repair, after RFC 5401: a gap waits a truncated exponential back-off for an assumed large group;
who hears another ask for it stays silent; a request names one *helper*: a voter, never the leader
while there is another, and the next time a listener that is up to date. After REPAIR_ROUNDS_MAX
rounds without an answer, when far behind, or when the stream is silent, it catches up over TCP, one
voter after the other, for as long as it takes.  Once all of them failed, listeners are asked in
between, one answer each: a voter is trusted to be quick, a listener only not to lie (what it says
is signed by voters).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final, TypeAlias

import msgspec

from trex_core.messages import (
    VOTER_ID_MAX,
    AskOther,
    CatchupEntries,
    RepairRequest,
    StreamRun,
    StreamTip,
)
from trex_core.state import FixedRun, chain_run, chain_start

REPAIR_ROUNDS_MAX: Final = 2
"""Rounds of multicast repair for one gap before TCP; a suppressed round counts."""
REPAIR_SLOTS_MAX: Final = 256
"""Most slots one repair request names."""
CATCHUP_BACKOFF_DOUBLINGS_MAX: Final = 5
HELPERS_MAX: Final = 8
"""Most listeners remembered as helpers: those heard last."""
HELPER_MS: Final = 10_000
"""A listener is asked for help so long after it was heard, in milliseconds."""

_replace = msgspec.structs.replace


class LearnerConfig(msgspec.Struct, frozen=True):
    """``name`` and ``seed`` feed the pure hash of the back-off. ``backoff_ms_max`` is T and
    ``group_size`` the assumed group of RFC 5401 (too large is safe, too small is not).
    ``repair_wait_ms`` is how long an answer is awaited; ``silence_ms`` after how long a silent
    stream is replaced by TCP; ``retry_ms`` the first pause after a failed catch-up (it doubles)."""

    name: str
    voters: tuple[int, ...]
    seed: int = 0
    backoff_ms_max: int = 10
    group_size: int = 1000
    repair_wait_ms: int = 40
    silence_ms: int = 1000
    retry_ms: int = 50
    buffer_slots_max: int = 8192
    buffer_bytes_max: int = 8 << 20
    far_behind_slots: int = 2000


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A run that came too early: slots from ``first``, the chain before it."""

    first: int
    chain_before: bytes
    values: tuple[bytes, ...]

    @property
    def last(self) -> int:
        """The last slot of the piece."""
        return self.first + len(self.values) - 1


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Slots up to ``last`` are missing. At ``due_ms`` the next step is taken; ``rounds`` were asked
    or suppressed so far."""

    last: int
    due_ms: int
    rounds: int


class CatchingUp(msgspec.Struct, frozen=True, gc=False):
    """A TCP conversation: ``helper`` was asked (0: nobody yet, at ``due_ms`` somebody is)."""

    helper: int
    due_ms: int
    attempt: int


class Heard(msgspec.Struct, frozen=True, gc=False):
    """When voter ``voter`` was heard last on the stream, and as what; ``boot`` is the highest boot
    number it told."""

    voter: int
    at_ms: int
    leading: bool
    tip: int
    boot: int = 0


class Helper(msgspec.Struct, frozen=True, gc=False):
    """When the listener ``instance`` last said that it is up to date and helps."""

    instance: int
    at_ms: int


class LearnerState(msgspec.Struct, frozen=True):
    """Delivered up to ``slot``, where the chain is ``chain``; ``tip`` is the highest slot known to
    be fixed."""

    slot: int
    chain: bytes
    tip: int = 0
    buffer: tuple[Piece, ...] = ()
    gap: Gap | None = None
    catching: CatchingUp | None = None
    heard: tuple[Heard, ...] = ()
    heard_ms: int = -1
    """When anything was heard last (of the stream, or by a catch-up answer); -1: never asked."""
    helpers: tuple[Helper, ...] = ()
    """Listeners that help, the one heard last at the end."""


class StreamIn(msgspec.Struct, frozen=True, gc=False):
    """A stream message of voter ``sender``; 0: a repair by a listener."""

    sender: int
    message: StreamRun | StreamTip
    now_ms: int


class RepairHeard(msgspec.Struct, frozen=True, gc=False):
    """Another listener asked for a repair."""

    request: RepairRequest
    now_ms: int


class HelperHeard(msgspec.Struct, frozen=True, gc=False):
    """The listener ``instance`` says that it helps and is up to date, or (``able`` is False) that
    it does not or is not."""

    instance: int
    able: bool
    now_ms: int


class CatchupIn(msgspec.Struct, frozen=True, gc=False):
    """``helper`` answered: the archive of a voter, or a listener."""

    helper: int
    message: CatchupEntries | AskOther
    now_ms: int


class CatchupFailed(msgspec.Struct, frozen=True, gc=False):
    """The conversation with ``helper`` failed or timed out."""

    helper: int
    now_ms: int


class Installed(msgspec.Struct, frozen=True, gc=False):
    """A snapshot at ``slot`` replaced the state; ``chain`` is the chain there."""

    slot: int
    chain: bytes
    now_ms: int


class Clock(msgspec.Struct, frozen=True, gc=False):
    """It is ``now_ms``; a wake-up asked for, or the start."""

    now_ms: int


LearnerEvent: TypeAlias = (
    StreamIn | RepairHeard | HelperHeard | CatchupIn | CatchupFailed | Installed | Clock
)


class CatchUpFrom(msgspec.Struct, frozen=True, gc=False):
    """Ask ``helper`` (the archive of a voter, or above VOTER_ID_MAX a listener) for entries from
    ``first``; report CatchupIn, CatchupFailed or Installed, always. At most one is outstanding."""

    helper: int
    first: int


class LearnEffects(msgspec.Struct, frozen=True, gc=False):
    """``deliver`` in this order; multicast ``requests``; start ``catchup``; send Clock at
    ``wake_ms`` (None: not needed); add one to each of ``counters``."""

    deliver: tuple[FixedRun, ...] = ()
    requests: tuple[RepairRequest, ...] = ()
    catchup: tuple[CatchUpFrom, ...] = ()
    wake_ms: int | None = None
    counters: tuple[str, ...] = ()


def first_state(cluster_id: bytes, slot: int = 0, chain: bytes | None = None) -> LearnerState:
    """The state of a learner that has delivered up to ``slot``, by default nothing."""
    return LearnerState(slot=slot, chain=chain if chain is not None else chain_start(cluster_id))


def learn(
    config: LearnerConfig, state: LearnerState, event: LearnerEvent
) -> tuple[LearnerState, LearnEffects]:
    """Take one event; return the next state and what the shell must do. Pure and total."""
    turn = _Turn(config, state, event.now_ms)
    match event:
        case StreamIn(sender=sender, message=message):
            turn.on_stream(sender, message)
        case RepairHeard(request=request):
            turn.on_repair_heard(request)
        case HelperHeard(instance=instance, able=able):
            turn.on_helper_heard(instance, able)
        case CatchupIn(helper=helper, message=message):
            turn.on_catchup(helper, message)
        case CatchupFailed(helper=helper):
            turn.on_catchup_failed(helper)
        case Installed(slot=slot, chain=chain):
            turn.on_installed(slot, chain)
        case Clock():  # pragma: no branch - there is no other event
            pass
    turn.after()
    return turn.state, LearnEffects(
        tuple(turn.deliver),
        tuple(turn.requests),
        tuple(turn.catchup),
        turn.wake_ms(),
        tuple(turn.counters),
    )


def repair_backoff_ms(config: LearnerConfig, *what: object) -> int:
    """The random wait before a request, RFC 5401 §3.2.2: truncated exponential over 0..T for a
    group of R: ``T / L * ln(1 + u * (e^L - 1))`` with ``L = ln(R) + 1``."""
    spread = math.log(config.group_size) + 1.0
    uniform = _hash(config, *what) / 2**64
    wait = config.backoff_ms_max / spread * math.log1p(uniform * math.expm1(spread))
    return int(wait)


def _hash(config: LearnerConfig, *what: object) -> int:
    text = ":".join(map(str, (config.seed, config.name, *what))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class _Turn:
    """One event under way. Dies with it."""

    __slots__ = ("catchup", "config", "counters", "deliver", "now", "requests", "source", "state")

    def __init__(self, config: LearnerConfig, state: LearnerState, now_ms: int) -> None:
        self.config = config
        self.state = state
        self.now = now_ms
        self.source = "stream"
        self.deliver: list[FixedRun] = []
        self.requests: list[RepairRequest] = []
        self.catchup: list[CatchUpFrom] = []
        self.counters: list[str] = []

    def set(self, **changes: Any) -> None:  # noqa: ANN401 - fields of the state
        self.state = _replace(self.state, **changes)

    # --- input ------------------------------------------------------------------------------

    def on_stream(self, sender: int, message: StreamRun | StreamTip) -> None:
        if sender == 0 and isinstance(message, StreamRun) and message.repair:
            # Of a listener: worth what it proves, and no word of who lives and who leads.
            self.source = "repair"
            self.set(tip=max(self.state.tip, message.tip_slot))
            self.take(message.first, message.chain_before, message.values)
            return
        if sender not in self.config.voters:
            self.counters.append("stranger")
            return
        known = next((h for h in self.state.heard if h.voter == sender), None)
        boot = known.boot if known is not None else 0
        if isinstance(message, StreamTip):
            if message.digest.boot < boot:
                self.counters.append("earlier_boot")  # recorded: it must not hide a silence
                return
            leading, boot = message.leading, message.digest.boot
        elif message.repair:  # says nothing of who leads
            leading = known is not None and known.leading
        else:
            leading = True
        heard = Heard(sender, self.now, leading, message.tip_slot, boot)
        if leading:
            others = tuple(
                _replace(h, leading=False) if h.leading else h
                for h in self.state.heard
                if h.voter != sender
            )
        else:
            others = tuple(h for h in self.state.heard if h.voter != sender)
        self.set(
            heard=tuple(sorted((*others, heard), key=lambda h: h.voter)),
            heard_ms=self.now,
            tip=max(self.state.tip, message.tip_slot),
        )
        if isinstance(message, StreamRun):
            if message.repair:
                self.source = "repair"
            self.take(message.first, message.chain_before, message.values)
        elif message.tip_slot == self.state.slot and message.tip_chain != self.state.chain:
            self.counters.append("chain_mismatch")

    def take(self, first: int, chain_before: bytes, values: tuple[bytes, ...]) -> bool:
        """Deliver what continues the chain, keep what is early. False on a chain mismatch."""
        if not values:
            return True
        if first < 1:  # slots start at 1: no voter says this
            self.counters.append("malformed")
            return False
        last = first + len(values) - 1
        if last <= self.state.slot:
            self.counters.append("duplicate")
            return True
        if first > self.state.slot + 1:
            self.keep(Piece(first, chain_before, values))
            return True
        if not self.extend(first, chain_before, values):
            return False
        self.take_kept()
        return True

    def take_kept(self) -> None:
        """Deliver what came early and continues the chain now."""
        while self.state.buffer and self.state.buffer[0].first <= self.state.slot + 1:
            piece, rest = self.state.buffer[0], self.state.buffer[1:]
            self.set(buffer=rest)
            if piece.last > self.state.slot:
                self.extend(piece.first, piece.chain_before, piece.values)

    def extend(self, first: int, chain_before: bytes, values: tuple[bytes, ...]) -> bool:
        chains = chain_run(chain_before, first, values)
        skip = self.state.slot + 1 - first
        if (chains[skip - 1] if skip else chain_before) != self.state.chain:
            self.counters.append("chain_mismatch")
            return False
        run = FixedRun(self.state.slot + 1, self.state.chain, values[skip:], chains[skip:])
        self.deliver.append(run)
        self.set(slot=run.last, chain=run.chains[-1], tip=max(self.state.tip, run.last))
        return True

    def keep(self, piece: Piece) -> None:
        held = self.state.buffer
        if any(p.first <= piece.first and piece.last <= p.last for p in held):
            self.counters.append("duplicate")
            return
        slots = sum(len(p.values) for p in held) + len(piece.values)
        size = sum(len(v) for p in (*held, piece) for v in p.values) if len(held) > 64 else 0
        if slots > self.config.buffer_slots_max or size > self.config.buffer_bytes_max:
            self.counters.append("buffer_full")
            return
        self.set(buffer=tuple(sorted((*held, piece), key=lambda p: (p.first, p.last))))

    def on_repair_heard(self, request: RepairRequest) -> None:
        gap = self.state.gap
        if gap is None or request.listener == self.config.name:
            return
        if gap.rounds >= REPAIR_ROUNDS_MAX:
            return  # TCP is next: who asks again and again must not put that off for ever
        if (
            request.first <= self.state.slot + 1
            and min(gap.last, self.asked_last()) <= request.last
        ):
            self.count_round(gap)
            self.counters.append("repair_suppressed")
            due = self.now + self.config.repair_wait_ms
            self.set(gap=_replace(gap, due_ms=due, rounds=gap.rounds + 1))

    def on_helper_heard(self, instance: int, able: bool) -> None:
        others = tuple(h for h in self.state.helpers if h.instance != instance)
        if able:
            others = (*others[-(HELPERS_MAX - 1) :], Helper(instance, self.now))
        self.set(helpers=others)

    def on_catchup(self, helper: int, message: CatchupEntries | AskOther) -> None:
        catching = self.state.catching
        if catching is None or catching.helper != helper:
            return
        if isinstance(message, AskOther):
            self.on_catchup_failed(helper)
            return
        self.source = "catchup"
        before = self.state.slot
        self.set(heard_ms=self.now, tip=max(self.state.tip, message.tip.slot))
        if not self.take(message.first, message.chain_before, message.values):
            self.on_catchup_failed(helper)
        elif self.state.slot >= self.state.tip:
            self.set(catching=None)
        elif self.state.slot == before:
            self.on_catchup_failed(helper)  # it knows no more than we do
        elif helper <= VOTER_ID_MAX:
            self.ask(helper, 0)
        else:
            self.voters_turn()

    def voters_turn(self) -> None:
        """After one answer of a listener, for it may be slow on purpose."""
        attempt = self.state.catching.attempt if self.state.catching else 0
        self.set(catching=CatchingUp(0, self.now, attempt + 1))

    def on_catchup_failed(self, helper: int) -> None:
        catching = self.state.catching
        if catching is None or catching.helper != helper:
            return
        wait = self.config.retry_ms << min(catching.attempt, CATCHUP_BACKOFF_DOUBLINGS_MAX)
        self.set(catching=CatchingUp(0, self.now + wait, catching.attempt + 1))

    def on_installed(self, slot: int, chain: bytes) -> None:
        self.source = "catchup"
        helper = self.state.catching.helper if self.state.catching else 0
        if slot > self.state.slot:
            kept = tuple(p for p in self.state.buffer if p.last > slot)
            self.set(slot=slot, chain=chain, tip=max(self.state.tip, slot), buffer=kept)
            self.set(heard_ms=self.now)
            self.take_kept()
        if self.state.slot >= self.state.tip:
            self.set(catching=None)
        elif 0 < helper <= VOTER_ID_MAX:
            self.ask(helper, 0)
        elif helper:
            self.voters_turn()

    # --- what is missing --------------------------------------------------------------------

    def after(self) -> None:
        """Close, open or move on the gap and the catch-up."""
        state = self.state
        if state.heard_ms < 0:
            self.set(heard_ms=self.now)
        gap = state.gap
        if gap is not None and state.slot >= gap.last:
            if gap.rounds or self.source != "stream":  # else it was only a datagram under way
                if not gap.rounds:
                    self.counters.append("gap_opened")
                self.counters.append(f"gap_closed_by_{self.source}")
            self.set(gap=None)
        catching = self.state.catching
        if catching is not None:
            if self.state.slot >= self.state.tip and self.silent_for() < self.config.silence_ms:
                if catching.helper == 0:
                    self.set(catching=None)
            elif catching.helper == 0 and self.now >= catching.due_ms:
                self.ask(self.next_helper(catching.attempt), catching.attempt)
            return
        if self.silent_for() >= self.config.silence_ms or self.far_behind():
            self.ask(self.next_helper(0), 0)
            return
        self.tend_gap()

    def silent_for(self) -> int:
        return self.now - self.state.heard_ms

    def far_behind(self) -> bool:
        return self.state.tip - self.state.slot > self.config.far_behind_slots

    def tend_gap(self) -> None:
        state, config = self.state, self.config
        if state.slot >= state.tip:
            return
        last = state.buffer[0].first - 1 if state.buffer else state.tip
        gap = state.gap
        if gap is None:
            wait = repair_backoff_ms(config, state.slot, 0)
            self.set(gap=Gap(last, self.now + wait, 0))
            return
        if self.now < gap.due_ms:
            return
        if gap.rounds >= REPAIR_ROUNDS_MAX:
            self.ask(self.next_helper(0), 0)
            return
        self.requests.append(
            RepairRequest(
                config.name, self.responder(gap.rounds), state.slot + 1, self.asked_last()
            )
        )
        self.count_round(gap)
        self.counters.append("repair_requested")
        wait = config.repair_wait_ms + repair_backoff_ms(config, state.slot, gap.rounds + 1)
        self.set(gap=_replace(gap, due_ms=self.now + wait, rounds=gap.rounds + 1))

    def count_round(self, gap: Gap) -> None:
        """A gap counts as one once its back-off is over or somebody asks for it."""
        if not gap.rounds:
            self.counters.append("gap_opened")

    def asked_last(self) -> int:
        """The last slot worth asking for: the end of the hole, within one request's limit."""
        state = self.state
        hole = state.buffer[0].first - 1 if state.buffer else state.tip
        return min(hole, state.slot + REPAIR_SLOTS_MAX)

    def responder(self, round_: int) -> int:
        """A voter heard lately that has the slots and does not lead; the next round a listener, or
        another voter."""
        state, config = self.state, self.config
        helper = self.helper(round_) if round_ % 2 else 0
        if helper:
            return helper
        leaders = {h.voter for h in state.heard if h.leading}
        fresh = [
            h.voter
            for h in state.heard
            if not h.leading and self.now - h.at_ms < 3 * config.silence_ms and h.tip > state.slot
        ]
        choices = fresh or [v for v in config.voters if v not in leaders] or list(config.voters)
        return choices[(_hash(config, state.slot) + round_) % len(choices)]

    def helper(self, turn: int) -> int:
        """A listener that was heard to help lately; 0: none."""
        fresh = [h.instance for h in self.state.helpers if self.now - h.at_ms < HELPER_MS]
        if not fresh:
            return 0
        return fresh[(_hash(self.config, self.state.slot) + turn) % len(fresh)]

    def next_helper(self, attempt: int) -> int:
        """Each voter in turn; once each was tried, a listener before each of them."""
        voters = self.config.voters
        more = attempt - len(voters)
        helper = self.helper(more) if more >= 0 and more % 2 == 0 else 0
        return helper or voters[(_hash(self.config, "catchup") + attempt) % len(voters)]

    def ask(self, helper: int, attempt: int) -> None:
        self.set(catching=CatchingUp(helper, 0, attempt))
        self.catchup.append(CatchUpFrom(helper, self.state.slot + 1))

    def wake_ms(self) -> int:
        """When to look again: the nearest of the gap, the catch-up and the silence."""
        state = self.state
        if state.catching is not None:
            if state.catching.helper == 0:
                return max(self.now + 1, state.catching.due_ms)
            return self.now + self.config.silence_ms
        wake = state.heard_ms + self.config.silence_ms
        if state.gap is not None:
            wake = min(wake, state.gap.due_ms)
        return max(self.now + 1, wake)
