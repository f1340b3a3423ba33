"""The algorithm: ``step(config, state, event) -> (state, effects)``, and nothing else.

This module alone decides what a voter does.  It is multi-Paxos with one Prepare for a suffix of
slots.  The rules, each cited where it is followed:

R1  A ballot is promised on disk before its Prepare leaves, so no ballot is used twice (I7).
R2  A Prepare at or above the promise, for slots above ``fixed``, is promised and answered with the
    (slot, ballot) pairs held; below the promise, or at or below ``fixed``, refused. PMS §2.2 1(b).
R3  A candidate leads once a promise quorum answered *this* ballot for *every* slot from its first;
    it re-proposes, slot by slot, the value of the highest ballot named, and only where nobody
    named one is it free: a no-op below the last slot named, commands above. PMS §2.2 2(a), §3.
R4  An Accept at or above the promise, for slots above ``fixed``, is accepted and is itself a
    promise (I6); otherwise refused. PMS §2.2 2(b).
R5  Votes (Prepare, Promise, Accepted) leave after the records before them are synced, one's own
    too; Accepts need no local disk. PMS §2.5.
R6  A slot is fixed when an accept quorum accepted one ballot there; a leader announces in slot
    order and only what it counted at its own ballot (I8). PMS §2.3.
R7  A follower learns a slot from an announcement only if it holds exactly that (slot, ballot), or
    if the chain over what it holds equals the announced chain. Otherwise it catches up.
R8  What is learned from a peer is fixed, never an accept; nothing reads a ballot from it.
R9  Who hears no leader asks first whether others do (pre-vote); a leader that hears no accept
    quorum for an election timeout steps down (check-quorum).
R10 Until slot 1 is fixed every voter must promise; slot 1 records all incarnations; messages of
    any other incarnation, or of an older boot than one heard of, count for nothing.

A leader's ballot never changes: to raise it is to stand again with a fresh phase 1 (defect D1).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from trex_core.messages import (
    CHAIN_CHECK_SLOTS,
    NO_BALLOT,
    PROMISE_PAIRS_MAX,
    RUN_BYTES_MAX,
    RUN_SLOTS_MAX,
    WINDOW_BYTES_MAX,
    WINDOW_SLOTS_MAX,
    Accept,
    Accepted,
    Ballot,
    CatchUp,
    ChainReport,
    Fenced,
    Fetch,
    Fetched,
    Genesis,
    HandOver,
    Heartbeat,
    HeartbeatAck,
    Kind,
    Pairs,
    PeerMessage,
    Poll,
    PollAnswer,
    Prepare,
    Promise,
    Refused,
    Tip,
    Value,
    encode_value,
)
from trex_core.quorum import Tally
from trex_core.state import (
    AcceptRecord,
    Ack,
    Beat,
    Candidate,
    CatchUpFailed,
    Chase,
    Config,
    DiskRoom,
    Effects,
    Event,
    FixedRecord,
    FixedRun,
    Flight,
    Follower,
    Install,
    InstallRecord,
    Leader,
    Learn,
    LearnedRecord,
    Part,
    Polling,
    PromiseRecord,
    Propose,
    Receive,
    Record,
    Run,
    Send,
    StartHandOver,
    State,
    Tick,
    above,
    chain_run,
    contiguous,
    genesis_of,
    overlay,
)

FLIGHTS_MAX: Final = 64
"""Most runs proposed and not yet fixed: beyond it proposals gather into larger runs."""
RESEND_FLIGHTS_MAX: Final = 8
"""Most flights re-sent in one tick."""
CHASE_PATIENCE_TICKS: Final = 2
"""How long a follower waits for accepts still under way before it catches up over TCP."""
CHASE_ROUNDS_MAX: Final = 20
"""A catch-up that reports nothing for this many longest election timeouts is asked elsewhere."""
BACKOFF_DOUBLINGS_MAX: Final = 3
CHAIN_MARKS_MAX: Final = 4

_replace = msgspec.structs.replace


def step(config: Config, state: State, event: Event) -> tuple[State, Effects]:
    """Take one event: return the next state and what the shell must do (see ``Effects``).

    Pure and total: any event in any state is allowed; what is stale or foreign changes nothing.
    """
    if state.halted:
        return state, Effects()
    turn = _Turn(config, state)
    match event:
        case Tick():
            turn.on_tick()
        case Receive(sender=sender, message=message):
            if turn.admit(event):
                turn.on_message(sender, event.incarnation, message)
        case Propose(values=values):
            turn.on_propose(values)
        case Beat():
            turn.on_beat()
        case Learn():
            turn.on_learn(event)
        case CatchUpFailed(voter=voter):
            turn.on_catch_up_failed(voter)
        case Install():
            turn.on_install(event)
        case StartHandOver(to=to):
            turn.on_start_hand_over(to)
        case DiskRoom(has_room=has_room):  # pragma: no branch - there is no other event
            turn.on_disk_room(has_room)
    return turn.state, Effects(tuple(turn.records), tuple(turn.sends), tuple(turn.fixed))


def room(state: State) -> tuple[int, int]:
    """How many slots and bytes of values a Propose may carry now; (0, 0) unless leading, not
    draining, and with window to spare."""
    role = state.role
    if (
        not isinstance(role, Leader)
        or role.handover is not None
        or len(role.flights) >= FLIGHTS_MAX
    ):
        return 0, 0
    slots = WINDOW_SLOTS_MAX - (role.next_slot - 1 - state.fixed)
    size = WINDOW_BYTES_MAX - sum(flight.size_bytes for flight in role.flights)
    return (slots, size) if slots > 0 and size > 0 else (0, 0)


def backoff_ticks(config: Config, attempt: int) -> int:
    """An election timeout: drawn from ``election_ticks_min``..``max`` by a pure hash of (seed,
    voter, attempt); the spread doubles with each failed attempt up to BACKOFF_DOUBLINGS_MAX."""
    low = config.election_ticks_min
    spread = (config.election_ticks_max - low) << min(attempt, BACKOFF_DOUBLINGS_MAX)
    return low + draw(config, attempt) % (spread + 1)


def draw(config: Config, attempt: int) -> int:
    """64 pseudo-random bits: a pure hash of (seed, voter, attempt)."""
    return _draw(config.seed, config.voter, attempt)


@functools.lru_cache(maxsize=64)
def _draw(seed: int, voter: int, attempt: int) -> int:
    text = f"{seed}:{voter}:{attempt}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class _Turn:
    """One step under way: the state so far and the effects so far. Dies with the step."""

    __slots__ = ("config", "fixed", "records", "sends", "state")

    def __init__(self, config: Config, state: State) -> None:
        self.config = config
        self.state = state
        self.records: list[Record] = []
        self.sends: list[Send] = []
        self.fixed: list[FixedRun] = []

    # --- small verbs ------------------------------------------------------------------------

    def set(self, **changes: Any) -> None:  # noqa: ANN401 - fields of the state
        self.state = _replace(self.state, **changes)

    def send(self, to: int, message: PeerMessage) -> None:
        self.sends.append(Send(to, message))

    def tell_peers(self, message: PeerMessage) -> None:
        for voter in self.config.voters:
            if voter != self.config.voter:
                self.sends.append(Send(voter, message))

    def refuse(self, to: int, ballot: Ballot) -> None:
        self.send(to, Refused(ballot, self.state.promised, self.state.fixed))

    def follow(self, attempt: int) -> None:
        """Give up any role; stand or poll again after an election timeout."""
        self.set(
            role=Follower(),
            attempt=attempt,
            deadline=self.state.tick + backoff_ticks(self.config, attempt),
        )

    def hear(self, ballot: Ballot, age_ticks: int) -> None:
        """A leader under ``ballot`` lives: its last quorum answer is ``age_ticks`` old."""
        state = self.state
        deadline = state.tick - age_ticks + backoff_ticks(self.config, 0)
        role = Follower() if isinstance(state.role, Polling) else state.role
        self.set(
            leader=ballot,
            heard_tick=state.tick - age_ticks,
            attempt=0,
            role=role,
            deadline=max(state.deadline, deadline)
            if isinstance(role, Follower)
            else state.deadline,
        )

    def yield_to(self, ballot: Ballot) -> None:
        """Whoever led or stood below ``ballot`` follows."""
        role = self.state.role
        if isinstance(role, Leader | Candidate) and role.ballot < ballot:
            self.follow(self.state.attempt)

    def promise(self, ballot: Ballot) -> None:
        """A higher ballot than any before is promised, in memory and on disk."""
        self.set(promised=ballot)
        self.records.append(PromiseRecord(ballot))

    def hears_leader(self) -> bool:
        state = self.state
        if isinstance(state.role, Leader):
            return True
        fresh = state.tick - state.heard_tick < self.config.election_ticks_min
        return state.leader != NO_BALLOT and fresh

    # --- admission (R10) --------------------------------------------------------------------

    def admit(self, event: Receive) -> bool:
        """Is this sender who the cluster knows? If not it is told so, and nothing else happens."""
        sender = event.sender
        config = self.config
        if sender == config.voter:
            return event.incarnation == config.incarnation and event.boot == config.boot
        if sender not in config.voters:
            return False
        expected = self.known_incarnation(sender)
        if expected is not None and event.incarnation != expected:
            self.send(sender, Fenced(1, expected))
            return False
        known = 0
        for voter, boot in self.state.boots:
            if voter == sender:
                known = boot
        if event.boot < known:
            self.send(sender, Fenced(2, known))
            return False
        if event.boot > known:
            kept = tuple(pair for pair in self.state.boots if pair[0] != sender)
            self.set(boots=tuple(sorted((*kept, (sender, event.boot)))))
        return True

    def known_incarnation(self, voter: int) -> int | None:
        """The incarnation of ``voter`` that slot 1 records; None until it is fixed here."""
        genesis = self.state.genesis
        return None if genesis is None else genesis.incarnations[genesis.voters.index(voter)]

    def on_message(self, sender: int, incarnation: int, message: PeerMessage) -> None:
        match message:
            case Accept():
                self.on_accept(sender, message)
            case Accepted():
                self.on_accepted(sender, message)
            case Heartbeat():
                self.on_heartbeat(sender, message)
            case HeartbeatAck():
                self.on_heartbeat_ack(sender, message)
            case Poll():
                self.send(
                    sender,
                    PollAnswer(
                        message.attempt,
                        self.hears_leader(),
                        self.state.promised,
                        self.state.fixed,
                    ),
                )
            case PollAnswer():
                self.on_poll_answer(sender, message)
            case Prepare():
                self.on_prepare(sender, message)
            case Promise():
                self.on_promise(sender, incarnation, message)
            case Refused():
                self.on_refused(sender, message)
            case Fetch():
                self.on_fetch(sender, message)
            case Fetched():
                self.on_fetched(message)
            case HandOver():
                self.on_hand_over(sender, message)
            case ChainReport():
                self.on_chain_report(sender, message)
            case Fenced():
                self.on_fenced(message)
            case CatchUp():  # pragma: no branch - there is no other message
                pass  # an instruction to one's own shell; from outside it means nothing

    def on_fenced(self, message: Fenced) -> None:
        if message.reason == 2 and message.expected > self.config.boot:
            self.set(
                halted=f"the cluster knows boot {message.expected} of this voter, but its journal "
                f"says {self.config.boot}: the disk was rolled back"
            )
        elif (
            message.reason == 1
            and message.expected != self.config.incarnation
            and self.known_incarnation(self.config.voter) != self.config.incarnation
        ):
            self.set(halted=_foreign(message.expected))

    # --- time -------------------------------------------------------------------------------

    def on_tick(self) -> None:
        self.set(tick=self.state.tick + 1)
        state = self.state
        match state.role:
            case Follower():
                if state.deadline == 0:  # just started: spread the first polls
                    spread = self.config.election_ticks_max - self.config.election_ticks_min
                    self.set(deadline=state.tick + draw(self.config, 0) % (spread + 1))
                elif state.tick >= state.deadline + self.room_wait():
                    self.poll()
            case Polling():
                if state.tick >= state.deadline:
                    self.poll()
            case Candidate():
                self.tick_candidate(state.role)
            case Leader():  # pragma: no branch - there is no other role
                self.tick_leader(state.role)
        self.tick_chase()

    def tick_candidate(self, role: Candidate) -> None:
        """Ask again what is missing; give up after an election timeout, with more back-off.

        An election is two syncs and a round trip. Patience grows with the attempts as the back-off
        does, or disks slower than half an election timeout would never elect anybody."""
        tick = self.state.tick
        doublings = min(self.state.attempt, BACKOFF_DOUBLINGS_MAX)
        if tick - role.since_tick >= self.config.election_ticks_min << doublings:
            self.follow(self.state.attempt + 1)
        elif (tick - role.since_tick) % self.config.retry_ticks == 0:
            if role.plan is not None and tick - role.fetch_tick >= 2 * self.config.retry_ticks:
                self.drop_silent_holders(role)
            role_now = self.state.role
            if isinstance(role_now, Candidate) and role_now.plan is None:
                for voter in self.config.voters:
                    missing = first_missing(role_now, voter)
                    if missing is not None:
                        self.send(voter, Prepare(role_now.ballot, missing))

    def tick_leader(self, role: Leader) -> None:
        config, tick = self.config, self.state.tick
        if tick - role.quorum_tick > config.election_ticks_min:
            self.set(leader=NO_BALLOT)
            self.follow(self.state.attempt)  # R9: check-quorum; falls silent
            return
        if role.handover is not None and tick >= role.handover[1]:
            role = _replace(role, handover=None)
            self.set(role=role)
        if not self.state.has_room and tick % (4 * config.election_ticks_max) == 0:
            self.on_start_hand_over(0)
        self.resend(self.leading())
        role = self.leading()
        newest = role.beat_ticks[-1][1] if role.beat_ticks else -config.heartbeat_ticks
        if tick - newest >= config.heartbeat_ticks or self.state.fixed > role.announced:
            self.on_beat()
        self.try_hand_over()

    def room_wait(self) -> int:
        """Who has no room on its disk lets the others poll first; if none has room somebody must
        lead all the same: reads need a leader, and proposals are refused by the shell."""
        return 0 if self.state.has_room else self.config.election_ticks_max

    def on_disk_room(self, has_room: bool) -> None:
        self.set(has_room=has_room)
        if not has_room:
            self.on_start_hand_over(0)  # its own proposals would fill its disk to the end

    def leading(self) -> Leader:
        role = self.state.role
        assert isinstance(role, Leader)
        return role

    def resend(self, role: Leader) -> None:
        """Send again what is not accepted by all yet, oldest first: loss costs time, not safety."""
        tick, due = self.state.tick, self.config.retry_ticks
        again = [f for f in role.flights if tick - f.sent_tick >= due][:RESEND_FLIGHTS_MAX]
        if not again:
            return
        flights = tuple(_replace(f, sent_tick=tick) if f in again else f for f in role.flights)
        self.set(role=_replace(role, flights=flights))
        for flight in again:
            values = contiguous(self.state.accepted, flight.first, flight.last, role.ballot)
            message = Accept(role.ballot, flight.first, values, self.tip())
            for voter in self.config.voters:
                if voter in flight.votes:
                    continue
                if voter == self.config.voter:
                    self.send(voter, Accepted(role.ballot, flight.first, flight.last))
                else:
                    self.send(voter, message)

    # --- pre-vote (R9) ----------------------------------------------------------------------

    def poll(self) -> None:
        state, config = self.state, self.config
        wait = config.election_ticks_min // 2 + draw(config, state.tick) % config.election_ticks_min
        self.set(
            role=Polling(state.tick, ((config.voter, False),), state.promised),
            deadline=state.tick + wait,
            leader=NO_BALLOT,
        )
        self.tell_peers(Poll(state.tick, state.fixed))
        self.count_poll()

    def on_poll_answer(self, sender: int, message: PollAnswer) -> None:
        role = self.state.role
        if message.fixed > self.state.fixed:
            self.chase(message.fixed, sender)
        if not isinstance(role, Polling) or message.attempt != role.attempt:
            return
        if message.fixed > self.state.fixed:
            return  # behind: catch up first; to stand now would only be refused
        answers = tuple(pair for pair in role.answers if pair[0] != sender)
        self.set(
            role=_replace(
                role,
                answers=tuple(sorted((*answers, (sender, message.hears)))),
                highest=max(role.highest, message.promised),
            )
        )
        self.count_poll()

    def count_poll(self) -> None:
        role = self.state.role
        assert isinstance(role, Polling)
        silent = [voter for voter, hears in role.answers if not hears]
        if self.config.quorums.promise(silent) is Tally.WIN:
            self.stand(role.highest)

    # --- phase 1 ----------------------------------------------------------------------------

    def stand(self, highest: Ballot) -> None:
        """R1: a fresh ballot above all promises heard of, promised on disk before it is used."""
        state, config = self.state, self.config
        top = max(state.promised, highest)
        ballot = Ballot(top.era, top.round + 1, config.voter)
        self.promise(ballot)
        self.set(
            role=Candidate(
                ballot=ballot,
                first=state.fixed + 1,
                since_tick=state.tick,
                parts=(),
                silent=(),
                plan=None,
                fetched=(),
                fetch_tick=state.tick,
            ),
            leader=NO_BALLOT,
        )
        for voter in config.voters:  # oneself too: the own promise is a vote like any other (R5)
            self.send(voter, Prepare(ballot, state.fixed + 1))

    def on_prepare(self, sender: int, message: Prepare) -> None:
        """R2."""
        ballot, first = message.ballot, message.first
        if ballot.voter != sender:
            return
        state = self.state
        if ballot < state.promised or state.fixed >= first:
            self.refuse(sender, ballot)
            return
        if ballot > state.promised:
            self.promise(ballot)
            self.yield_to(ballot)
            if isinstance(self.state.role, Polling):
                self.follow(self.state.attempt)
            self.set(leader=NO_BALLOT)
            wait = backoff_ticks(self.config, self.state.attempt)
            self.set(deadline=max(self.state.deadline, self.state.tick + wait))
        self.sends.extend(
            Send(sender, part) for part in promise_parts(ballot, first, self.state.accepted)
        )

    def on_promise(self, sender: int, incarnation: int, message: Promise) -> None:
        """R3: only of this very ballot (defect D2), merged by the slots it covers."""
        role = self.state.role
        if not isinstance(role, Candidate) or message.ballot != role.ballot:
            return
        last = message.last or None
        runs = tuple((pair.first, pair.last, pair.ballot) for pair in message.accepted)
        if any(a > b or a < message.first or (last and b > last) for a, b, _ in runs):
            return
        held = next((p for p in role.parts if p.voter == sender), None)
        if held is None or held.incarnation != incarnation:
            held = Part(sender, incarnation, (), ())
        part = merge_part(held, message.first, message.last, runs)
        others = tuple(p for p in role.parts if p.voter != sender)
        parts = tuple(sorted((*others, part), key=lambda p: p.voter))
        silent = tuple(v for v in role.silent if v != sender)
        self.set(role=_replace(role, parts=parts, silent=silent))
        self.count_promises()

    def count_promises(self) -> None:
        """R3, R10: a quorum complete? Then make the plan, and fetch the values that lack."""
        role = self.state.role
        assert isinstance(role, Candidate)
        first = max(role.first, self.state.fixed + 1)
        done = [
            part
            for part in role.parts
            if part.voter not in role.silent and covers(part.covered, first)
        ]
        voters = [part.voter for part in done]
        if first == 1:
            complete = set(voters) == set(self.config.voters)
        else:
            complete = self.config.quorums.promise(voters) is Tally.WIN
        if not complete:
            if role.plan is not None:
                self.set(role=_replace(role, plan=None))
            return
        plan = highest_named(done, first)
        if role.plan != plan:
            role = _replace(role, plan=plan, fetch_tick=self.state.tick)
            self.set(role=role)
            self.fetch(role, done)
        self.try_to_lead()

    def lacking(self, role: Candidate) -> tuple[tuple[int, int, Ballot], ...]:
        """The pairs of the plan whose values are neither held nor fetched."""
        lack: list[tuple[int, int, Ballot]] = []
        for first, last, ballot in role.plan or ():
            slot = max(first, self.state.fixed + 1)
            while slot <= last:
                held = contiguous(self.state.accepted, slot, last, ballot)
                if not held:
                    held = contiguous(role.fetched, slot, last, ballot)
                if held:
                    slot += len(held)
                elif lack and lack[-1][1] == slot - 1 and lack[-1][2] == ballot:
                    lack[-1] = (lack[-1][0], slot, ballot)
                    slot += 1
                else:
                    lack.append((slot, slot, ballot))
                    slot += 1
        return tuple(lack)

    def fetch(self, role: Candidate, done: Iterable[Part]) -> None:
        """Ask, for each pair that lacks, the first voter that named exactly it."""
        asked: dict[int, list[Pairs]] = {}
        for first, last, ballot in self.lacking(role):
            slot = first
            while slot <= last:
                end, holder = last, 0
                for part in done:
                    for a, b, held in part.runs:
                        if held == ballot and a <= slot <= b and part.voter != self.config.voter:
                            holder, end = part.voter, min(last, b)
                            break
                    if holder:
                        break
                if holder:
                    asked.setdefault(holder, []).append(Pairs(slot, end, ballot))
                    slot = end
                slot += 1
        for voter, wanted in sorted(asked.items()):
            self.send(voter, Fetch(role.ballot, tuple(wanted)))

    def drop_silent_holders(self, role: Candidate) -> None:
        """Who named what lacks and does not answer: its promise is dropped; another quorum will do.
        A later promise of it (each retry asks for one) brings it back."""
        lack = self.lacking(role)
        holders = {
            part.voter
            for part in role.parts
            if part.voter != self.config.voter
            and any(
                ballot == held and a <= last and first <= b
                for first, last, ballot in lack
                for a, b, held in part.runs
            )
        }
        parts = tuple(p for p in role.parts if p.voter not in holders)
        silent = tuple(sorted({*role.silent, *holders}))
        self.set(role=_replace(role, silent=silent, parts=parts, plan=None))
        self.count_promises()

    def on_fetch(self, sender: int, message: Fetch) -> None:
        """Answer with exactly the pairs asked for, or say why not: promised higher, or fixed."""
        state = self.state
        if message.ballot.voter != sender:
            return
        if message.ballot != state.promised:
            self.refuse(sender, message.ballot)
            return
        for pair in message.wanted:
            slot = pair.first
            if slot <= state.fixed:
                self.refuse(sender, message.ballot)
                return
            while slot <= pair.last:
                values = clip(contiguous(state.accepted, slot, pair.last, pair.ballot))
                if not values:
                    break
                self.send(sender, Fetched(message.ballot, slot, pair.ballot, values))
                slot += len(values)

    def on_fetched(self, message: Fetched) -> None:
        role = self.state.role
        if not isinstance(role, Candidate) or message.ballot != role.ballot or not message.values:
            return
        run = Run(message.first, message.accepted_at, message.values)
        named = any(
            ballot == run.ballot and first <= run.last and run.first <= last
            for first, last, ballot in role.plan or ()
        )
        if named:
            self.set(
                role=_replace(role, fetched=overlay(role.fetched, run), fetch_tick=self.state.tick)
            )
            self.try_to_lead()

    def try_to_lead(self) -> None:
        """R3: with every value of the plan at hand, lead and re-propose it."""
        role = self.state.role
        if not isinstance(role, Candidate) or role.plan is None or self.lacking(role):
            return
        state = self.state
        assert state.promised == role.ballot, "a candidate yields to any higher promise"
        first = state.fixed + 1
        last = role.plan[-1][1] if role.plan else state.fixed
        values: list[bytes] = []
        for a, b, ballot in role.plan:
            slot = max(a, first)
            while len(values) < slot - first:
                values.append(self.filler(first + len(values), role))
            while slot <= b:
                held = contiguous(state.accepted, slot, b, ballot) or contiguous(
                    role.fetched, slot, b, ballot
                )
                values.extend(held)
                slot += len(held)
        assert len(values) == max(0, last - state.fixed), "the plan covers every slot once"
        if first == 1 and not values:
            values.append(self.filler(1, role))
        self.set(
            role=Leader(
                ballot=role.ballot,
                first=first,
                next_slot=first,
                counted=first,
                flights=(),
                beat=0,
                beat_ticks=(),
                acks=(),
                beat_acked=0,
                quorum_tick=state.tick,
                since_tick=state.tick,
                announced=state.fixed,
            ),
            leader=role.ballot,
            heard_tick=state.tick,
            attempt=0,
        )
        self.propose(values)
        self.on_beat()

    def filler(self, slot: int, role: Candidate) -> bytes:
        """What a free slot of the plan gets: a no-op; slot 1 the incarnations of all (R10)."""
        if slot == 1:
            genesis = Genesis(self.config.voters, self.incarnations())
            command = msgspec.msgpack.encode(genesis)
            return encode_value(Value(Kind.GENESIS, role.ballot, command=command))
        return encode_value(Value(Kind.NOOP, role.ballot))

    def incarnations(self) -> tuple[int, ...]:
        """Of all voters, in order: as their promises said."""
        role = self.state.role
        assert isinstance(role, Candidate)
        told = {part.voter: part.incarnation for part in role.parts}
        return tuple(told[voter] for voter in self.config.voters)

    # --- phase 2 ----------------------------------------------------------------------------

    def on_propose(self, values: tuple[bytes, ...]) -> None:
        slots, size = room(self.state)
        if values and len(values) <= slots and size > 0:
            self.propose(values)

    def propose(self, values: Iterable[bytes]) -> None:
        """Send Accepts for the next slots, in runs; they need no sync of one's own (R5)."""
        rest = tuple(values)
        while rest:
            run = clip(rest)
            rest = rest[len(run) :]
            role = self.leading()
            first, last = role.next_slot, role.next_slot + len(run) - 1
            self.records.append(AcceptRecord(role.ballot, first, run))
            flight = Flight(first, last, (), self.state.tick, sum(map(len, run)))
            self.set(
                accepted=overlay(self.state.accepted, Run(first, role.ballot, run)),
                role=_replace(role, next_slot=last + 1, flights=(*role.flights, flight)),
            )
            self.tell_peers(Accept(role.ballot, first, run, self.tip()))
            self.send(self.config.voter, Accepted(role.ballot, first, last))

    def on_accept(self, sender: int, message: Accept) -> None:
        """R4."""
        ballot = message.ballot
        if ballot.voter != sender or not message.values:
            return
        if ballot < self.state.promised:
            self.refuse(sender, ballot)
            return
        self.yield_to(ballot)
        self.hear(ballot, 0)
        if not self.state.has_room:
            self.learn_tip(sender, ballot, message.tip)
            return
        if ballot > self.state.promised:
            self.promise(ballot)
        self.learn_tip(sender, ballot, message.tip)
        state = self.state
        first, values = message.first, message.values
        if first <= state.fixed:
            self.refuse(sender, ballot)
            values = values[state.fixed + 1 - first :]
            first = state.fixed + 1
        if not values:
            return
        last = first + len(values) - 1
        if len(contiguous(state.accepted, first, last, ballot)) < len(values):
            self.records.append(AcceptRecord(ballot, first, values))
            self.set(accepted=overlay(state.accepted, Run(first, ballot, values)))
            self.learn_tip(sender, ballot, message.tip)
        self.send(sender, Accepted(ballot, first, last))

    def on_accepted(self, sender: int, message: Accepted) -> None:
        """R6: count, and fix in slot order."""
        role = self.state.role
        if not isinstance(role, Leader) or message.ballot != role.ballot:
            return
        flights = count_votes(role.flights, message.first, message.last, sender)
        if flights == role.flights:
            return
        self.set(role=_replace(role, flights=flights))
        self.fix_counted()

    def fix_counted(self) -> None:
        role = self.leading()
        won = 0
        for flight in role.flights:
            if self.config.quorums.accept(flight.votes) is not Tally.WIN:
                break
            won += 1
        if not won:
            return
        first, last = self.state.fixed + 1, role.flights[won - 1].last
        values = contiguous(self.state.accepted, first, last, role.ballot)
        assert len(values) == last - first + 1, "a leader holds what it proposed (I7)"
        self.set(role=_replace(role, flights=role.flights[won:]))
        self.fix(values, chain_run(self.state.chain, first, values))

    # --- fixing -----------------------------------------------------------------------------

    def tip(self) -> Tip:
        return Tip(self.state.fixed, self.state.chain, self.leading().counted)

    def fix(self, values: tuple[bytes, ...], chains: tuple[bytes, ...]) -> None:
        """The slots after ``fixed`` are fixed with what is held there."""
        last = self.state.fixed + len(values)
        self.records.append(FixedRecord(last, chains[-1]))
        self.advance(values, chains)

    def advance(self, values: tuple[bytes, ...], chains: tuple[bytes, ...]) -> None:
        state = self.state
        first, last = state.fixed + 1, state.fixed + len(values)
        self.fixed.append(FixedRun(first, state.chain, values, chains))
        marks = state.chain_marks
        for slot in range(
            -(-first // CHAIN_CHECK_SLOTS) * CHAIN_CHECK_SLOTS, last + 1, CHAIN_CHECK_SLOTS
        ):
            chain = chains[slot - first]
            marks = (*marks, (slot, chain))[-CHAIN_MARKS_MAX:]
            self.tell_peers(ChainReport(slot, chain))
        self.set(
            fixed=last,
            chain=chains[-1],
            accepted=above(state.accepted, last),
            genesis=genesis_of(first, values, state.genesis),
            chain_marks=marks,
        )
        self.after_fixed()
        if marks is not state.chain_marks:
            self.compare_chains()

    def after_fixed(self) -> None:
        """What follows from a higher ``fixed``, however it came about."""
        state = self.state
        genesis = state.genesis
        if genesis is not None and genesis.voters != self.config.voters:
            self.set(halted=other_voters(genesis.voters, self.config.voters))
        elif genesis is not None:
            known = genesis.incarnations[genesis.voters.index(self.config.voter)]
            if known != self.config.incarnation:
                self.set(halted=_foreign(known))
        if state.chase is not None and state.fixed >= state.chase.goal:
            self.set(chase=None)

    def learn_tip(self, sender: int, ballot: Ballot, tip: Tip) -> None:
        """R7: from an announcement of the leader of ``ballot``."""
        state = self.state
        if tip.fixed <= state.fixed:
            return
        first = state.fixed + 1
        values = contiguous(state.accepted, first, tip.fixed)
        if len(values) == tip.fixed - state.fixed:
            chains = chain_run(state.chain, first, values)
            if chains[-1] == tip.chain:
                self.fix(values, chains)
                return
        if tip.counted <= first:
            exact = contiguous(state.accepted, first, tip.fixed, ballot)
            if exact and len(exact) < tip.fixed - state.fixed:
                self.fix(exact, chain_run(state.chain, first, exact))
        self.chase(tip.fixed, sender)

    # --- leader and followers ---------------------------------------------------------------

    def on_beat(self) -> None:
        """Start a heartbeat round. A lone voter is its own quorum."""
        role = self.state.role
        if not isinstance(role, Leader):
            return
        tick = self.state.tick
        role = _replace(
            role,
            beat=role.beat + 1,
            beat_ticks=(*role.beat_ticks, (role.beat + 1, tick)),
            announced=self.state.fixed,
        )
        self.set(role=role)
        self.tell_peers(Heartbeat(role.ballot, role.beat, self.tip(), tick - role.quorum_tick))
        self.count_acks()

    def count_acks(self) -> None:
        """Date the newest heartbeat round that an accept quorum acknowledged (R9)."""
        role = self.leading()
        beats = sorted({role.beat, *(ack.beat for ack in role.acks)}, reverse=True)
        for beat in beats:
            if beat <= role.beat_acked:
                return
            voters = [self.config.voter, *(ack.voter for ack in role.acks if ack.beat >= beat)]
            if self.config.quorums.accept(voters) is Tally.WIN:
                sent = next(tick for number, tick in role.beat_ticks if number == beat)
                kept = tuple(pair for pair in role.beat_ticks if pair[0] >= beat)
                self.set(role=_replace(role, beat_acked=beat, quorum_tick=sent, beat_ticks=kept))
                return

    def on_heartbeat(self, sender: int, message: Heartbeat) -> None:
        ballot = message.ballot
        if ballot.voter != sender:
            return
        if ballot < self.state.promised:
            self.refuse(sender, ballot)
            return
        self.yield_to(ballot)
        if message.quorum_age_ticks < self.config.election_ticks_min:
            self.hear(ballot, message.quorum_age_ticks)
        self.learn_tip(sender, ballot, message.tip)
        state = self.state
        self.send(
            sender,
            HeartbeatAck(ballot, message.beat, state.fixed, state.last_accepted, state.has_room),
        )

    def on_heartbeat_ack(self, sender: int, message: HeartbeatAck) -> None:
        role = self.state.role
        if not isinstance(role, Leader) or message.ballot != role.ballot:
            return
        if message.beat > role.beat:
            return
        held = next((ack for ack in role.acks if ack.voter == sender), None)
        if held is not None and held.beat > message.beat:
            return
        ack = Ack(
            sender,
            message.beat,
            message.fixed,
            message.last_accepted,
            message.has_room,
            self.state.tick,
        )
        others = (a for a in role.acks if a.voter != sender)
        acks = tuple(sorted((*others, ack), key=lambda a: a.voter))
        self.set(role=_replace(role, acks=acks))
        self.count_acks()
        self.chase(message.fixed, sender)
        self.fill_up(message.last_accepted)
        self.try_hand_over()

    def fill_up(self, last_accepted: int) -> None:
        """Somebody holds an accept above one's last slot: fix all up to there, with no-ops."""
        role = self.leading()
        slots, _ = room(self.state)
        count = min(last_accepted - role.next_slot + 1, slots, RUN_SLOTS_MAX)
        if count > 0:
            self.propose((encode_value(Value(Kind.NOOP, role.ballot)),) * count)

    def on_refused(self, sender: int, message: Refused) -> None:
        role = self.state.role
        if not isinstance(role, Leader | Candidate) or message.ballot != role.ballot:
            return
        self.chase(message.fixed, sender)
        if message.promised <= role.ballot:
            return
        # Somebody promised higher. The ballot is never raised in place (defect D1): stand anew.
        if isinstance(role, Leader):
            # At once, if it led for long and is heard: a peer that stood in vain must be won
            # back, and nobody else passes the poll. A fresh leader waits: no duels.
            tick, config = self.state.tick, self.config
            heard = tick - role.quorum_tick <= 2 * config.heartbeat_ticks
            settled = tick - role.since_tick >= config.election_ticks_min
            self.set(leader=NO_BALLOT)
            self.follow(self.state.attempt)
            if heard and settled and role.handover is None and self.state.has_room:
                self.stand(message.promised)
        else:
            self.follow(self.state.attempt + 1)

    # --- handover ---------------------------------------------------------------------------

    def on_start_hand_over(self, to: int) -> None:
        role = self.state.role
        if not isinstance(role, Leader) or role.handover is not None:
            return
        if to == 0:
            fresh = [
                ack
                for ack in role.acks
                if self.state.tick - ack.tick <= 2 * self.config.heartbeat_ticks and ack.has_room
            ]
            if not fresh:
                return
            to = max(fresh, key=lambda ack: (ack.last_accepted, ack.fixed, -ack.voter)).voter
        if to == self.config.voter or to not in self.config.voters:
            return
        until = self.state.tick + self.config.election_ticks_max
        self.set(role=_replace(role, handover=(to, until)))
        self.try_hand_over()

    def try_hand_over(self) -> None:
        """Drained and the heir up to date? Then tell it to stand; it skips the poll."""
        role = self.state.role
        if not isinstance(role, Leader) or role.handover is None or role.flights:
            return
        to = role.handover[0]
        if any(ack.voter == to and ack.fixed >= self.state.fixed for ack in role.acks):
            self.send(to, HandOver(role.ballot))
        elif role.announced < self.state.fixed:
            self.on_beat()

    def on_hand_over(self, sender: int, message: HandOver) -> None:
        ballot = message.ballot
        if ballot.voter != sender or ballot < self.state.promised or not self.state.has_room:
            return
        if isinstance(self.state.role, Follower | Polling):
            self.stand(ballot)

    # --- catch-up (R8) ----------------------------------------------------------------------

    def chase(self, goal: int, hint: int) -> None:
        """Slot ``goal`` is fixed, ``hint`` says so; get there, if it is not reached."""
        chase = self.state.chase
        if goal <= self.state.fixed:
            return
        if chase is None:
            due = self.state.tick + CHASE_PATIENCE_TICKS
            self.set(chase=Chase(0, hint, goal, 0, due))
        elif goal > chase.goal:
            self.set(chase=_replace(chase, goal=goal))

    def tick_chase(self) -> None:
        chase = self.state.chase
        if chase is not None and self.state.tick >= chase.until_tick:
            self.ask(chase)

    def ask(self, chase: Chase) -> None:
        """Ask the next voter in turn: first who told, then the others. A follower without room on
        its disk waits for room: what it learned would be journalled as what it accepts is."""
        if not self.state.has_room and not isinstance(self.state.role, Leader):
            self.set(chase=_replace(chase, asked=0, until_tick=self.state.tick))
            return
        peers = [voter for voter in self.config.voters if voter != self.config.voter]
        if not peers:
            return
        start = peers.index(chase.hint) if chase.hint in peers else 0
        voter = peers[(start + chase.attempt) % len(peers)]
        until = self.state.tick + CHASE_ROUNDS_MAX * self.config.election_ticks_max
        self.set(chase=_replace(chase, asked=voter, attempt=chase.attempt + 1, until_tick=until))
        self.send(voter, CatchUp(self.state.fixed + 1))

    def on_catch_up_failed(self, voter: int) -> None:
        chase = self.state.chase
        if chase is not None and chase.asked == voter:
            wait = self.config.retry_ticks << min(chase.attempt, BACKOFF_DOUBLINGS_MAX)
            self.set(chase=_replace(chase, asked=0, until_tick=self.state.tick + wait))

    def on_learn(self, event: Learn) -> None:
        """R8: entries that are fixed elsewhere; taken only if they continue one's own chain."""
        state = self.state
        skip = state.fixed + 1 - event.first
        if skip < 0 or not event.values or event.first < 1:
            self.on_catch_up_failed(event.voter)
            return
        if skip >= len(event.values):
            self.ask_more(event.voter)
            return
        chains = chain_run(event.chain_before, event.first, event.values)
        if (chains[skip - 1] if skip else event.chain_before) != state.chain:
            self.on_catch_up_failed(event.voter)
            return
        values, chains = event.values[skip:], chains[skip:]
        self.records.append(LearnedRecord(state.fixed + 1, values, chains[-1]))
        self.advance(values, chains)
        self.jump()
        chase = self.state.chase
        if chase is not None and event.tip_slot > chase.goal:
            self.set(chase=_replace(chase, goal=event.tip_slot))
        self.ask_more(event.voter)

    def ask_more(self, voter: int) -> None:
        chase = self.state.chase
        if chase is not None and chase.asked == voter:
            self.ask(_replace(chase, hint=voter, attempt=0))

    def on_install(self, event: Install) -> None:
        """A snapshot replaces all slots up to its own."""
        state = self.state
        if event.slot <= state.fixed:  # overtaken while it came: what is missing still is
            if state.chase is not None:
                self.ask_more(state.chase.asked)
            return
        self.records.append(InstallRecord(event.slot, event.chain, event.genesis))
        self.set(
            fixed=event.slot,
            chain=event.chain,
            genesis=event.genesis,
            accepted=above(state.accepted, event.slot),
            chain_marks=(),
        )
        self.after_fixed()
        self.jump()
        if state.chase is not None:
            self.ask_more(state.chase.asked)

    def jump(self) -> None:
        """``fixed`` moved by learning: a leader counted none of it (R6); a candidate whose first
        slot is fixed stands again under the same ballot, under which it proposed nothing."""
        state = self.state
        role = state.role
        if isinstance(role, Leader):
            flights = tuple(
                _replace(f, first=max(f.first, state.fixed + 1))
                for f in role.flights
                if f.last > state.fixed
            )
            self.set(
                role=_replace(
                    role,
                    counted=state.fixed + 1,
                    next_slot=max(role.next_slot, state.fixed + 1),
                    flights=flights,
                )
            )
            self.fix_counted()
        elif isinstance(role, Candidate) and state.fixed >= role.first:
            # R10: while it stood for slot 1 it could not tell a disk that was formatted again.
            # (Whoever met other voters in slot 1 has halted.)
            parts = role.parts
            if not state.halted:
                parts = tuple(
                    p for p in parts if self.known_incarnation(p.voter) in (None, p.incarnation)
                )
            self.set(
                role=_replace(
                    role,
                    first=state.fixed + 1,
                    parts=parts,
                    plan=None,
                    since_tick=state.tick,
                    silent=(),
                )
            )
            for voter in self.config.voters:
                self.send(voter, Prepare(role.ballot, state.fixed + 1))

    # --- chain check ------------------------------------------------------------------------

    def on_chain_report(self, sender: int, message: ChainReport) -> None:
        others = tuple(r for r in self.state.chain_reports if r[0] != sender)
        report = (sender, message.slot, message.chain)
        self.set(chain_reports=tuple(sorted((*others, report))))
        self.compare_chains()

    def compare_chains(self) -> None:
        """Who differs from a majority at a slot stops (DESIGN §4); without one: only an alarm."""
        for slot, chain in self.state.chain_marks:
            told: dict[bytes, set[int]] = {}
            for voter, at, other in self.state.chain_reports:
                if at == slot and other != chain:
                    told.setdefault(other, set()).add(voter)
            for voters in told.values():
                if len(voters) > len(self.config.voters) // 2:
                    self.set(
                        halted=f"the chain at slot {slot} differs from that of voters "
                        f"{sorted(voters)}: this journal or memory is damaged"
                    )


def other_voters(formed: tuple[int, ...], configured: tuple[int, ...]) -> str:
    """Why a voter must not run: quorums of two sets of voters need not meet (R3, R10)."""
    return (
        f"the cluster was formed by voters {list(formed)} (slot 1), its cluster file names "
        f"{list(configured)}: correct the file; the set of voters cannot be changed"
    )


def _foreign(expected: int) -> str:
    return (
        f"the cluster knows this voter as incarnation {expected:016x}, its journal is another: it "
        "was formatted again, and a new disk is a reconfiguration, never a format"
    )


# --- values of runs -------------------------------------------------------------------------


def clip(values: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The longest prefix that fits one run: RUN_SLOTS_MAX slots, RUN_BYTES_MAX bytes; at least one
    value if there is any."""
    values = values[:RUN_SLOTS_MAX]
    size = 0
    for index, value in enumerate(values):
        size += len(value)
        if size > RUN_BYTES_MAX and index > 0:
            return values[:index]
    return values


# --- promises -------------------------------------------------------------------------------


def promise_parts(ballot: Ballot, first: int, accepted: tuple[Run, ...]) -> tuple[Promise, ...]:
    """The answer to a Prepare: what is held from ``first``, in parts of PROMISE_PAIRS_MAX runs.
    Each part names the range it covers; the last covers every slot above its first."""
    pairs: list[Pairs] = []
    for run in accepted:
        if run.last < first:
            continue
        start = max(run.first, first)
        if pairs and pairs[-1].last == start - 1 and pairs[-1].ballot == run.ballot:
            pairs[-1] = Pairs(pairs[-1].first, run.last, run.ballot)
        else:
            pairs.append(Pairs(start, run.last, run.ballot))
    parts = []
    while len(pairs) > PROMISE_PAIRS_MAX:
        part, pairs = pairs[:PROMISE_PAIRS_MAX], pairs[PROMISE_PAIRS_MAX:]
        parts.append(Promise(ballot, first, part[-1].last, tuple(part)))
        first = part[-1].last + 1
    parts.append(Promise(ballot, first, 0, tuple(pairs)))
    return tuple(parts)


def merge_part(
    part: Part, first: int, last: int, runs: tuple[tuple[int, int, Ballot], ...]
) -> Part:
    """``part`` with one more promise of the same voter and ballot. What the two say of the same
    slot is the same (a promise under one ballot is stable until that ballot proposes)."""
    ranges = sorted((*part.covered, (first, last)))
    covered: list[tuple[int, int]] = []
    for a, b in ranges:
        if covered and (covered[-1][1] == 0 or a <= covered[-1][1] + 1):
            top = covered[-1][1]
            covered[-1] = (covered[-1][0], 0 if top == 0 or b == 0 else max(top, b))
        else:
            covered.append((a, b))
    return _replace(part, covered=tuple(covered), runs=tuple(sorted({*part.runs, *runs})))


def covers(covered: tuple[tuple[int, int], ...], first: int) -> bool:
    """Are all slots from ``first`` covered?"""
    return any(a <= first and b == 0 for a, b in covered)


def first_missing(role: Candidate, voter: int) -> int | None:
    """The first slot from which ``voter`` has not answered the candidate; None if it has."""
    for part in role.parts:
        if part.voter == voter:
            slot = role.first
            for a, b in part.covered:
                if a <= slot:
                    if b == 0:
                        return None
                    slot = max(slot, b + 1)
            return slot
    return role.first


def highest_named(parts: Iterable[Part], first: int) -> tuple[tuple[int, int, Ballot], ...]:
    """Slot by slot from ``first`` the highest ballot that any part names, as disjoint runs.

    Source: PMS §2.2 phase 2(a): the value of the highest-numbered proposal among the responses.
    """
    runs = [
        (max(a, first), b, ballot) for part in parts for a, b, ballot in part.runs if b >= first
    ]
    edges = sorted({edge for a, b, _ in runs for edge in (a, b + 1)})
    plan: list[tuple[int, int, Ballot]] = []
    for start, end in itertools.pairwise(edges):
        named = [ballot for a, b, ballot in runs if a <= start <= b]
        if not named:
            continue
        ballot = max(named)
        if plan and plan[-1][1] == start - 1 and plan[-1][2] == ballot:
            plan[-1] = (plan[-1][0], end - 1, ballot)
        else:
            plan.append((start, end - 1, ballot))
    return tuple(plan)


# --- votes ----------------------------------------------------------------------------------


def count_votes(
    flights: tuple[Flight, ...], first: int, last: int, voter: int
) -> tuple[Flight, ...]:
    """``flights`` with one voter's Accepted for ``first``..``last``; a flight that it covers only
    in part is split, so that votes are always for all slots of a flight."""
    if not flights or last < flights[0].first or first > min(last, flights[-1].last):
        return flights
    out: list[Flight] = []
    for flight in flights:
        if flight.last < first or flight.first > last or voter in flight.votes:
            out.append(flight)
            continue
        low, high = max(flight.first, first), min(flight.last, last)
        votes = tuple(sorted((*flight.votes, voter)))
        size = flight.size_bytes  # of a split flight: all at its first piece, until that is fixed
        if flight.first < low:
            out.append(_replace(flight, last=low - 1))
            size = 0
        out.append(_replace(flight, first=low, last=high, votes=votes, size_bytes=size))
        if high < flight.last:
            out.append(_replace(flight, first=high + 1, size_bytes=0))
    return tuple(out)
