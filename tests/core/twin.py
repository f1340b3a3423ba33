"""A dumb twin of ``paxos.step``: what must follow from one event, straight from its rules R1..R10.

Slow and plain on purpose: a dictionary with one entry per slot where the product keeps runs, sums
where it keeps tallies, nothing cached, and no line shared with ``trex_core.paxos``. Two programs
that were written apart agree by being right more often than by chance.

:func:`differences` takes a step with both and says, in words, where they part: every field of the
state, the records in order, the sends as a multiset, the fixed slots in order. Runs are compared
slot by slot, for how slots are cut into runs is not a rule of the protocol.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgspec

from trex_core import messages as m
from trex_core import state as st
from trex_core.invariants import check_step
from trex_core.messages import NO_BALLOT, Ballot, Genesis, Kind, Pairs, Tip, Value, encode_value
from trex_core.paxos import step
from trex_core.quorum import EvenFlexible, QuorumSystem, Weighted

HORIZON = 16
"""How many slots above ``fixed`` the twin looks at where the product says "all above"."""


class Quorum(msgspec.Struct, frozen=True):
    """Quorums as the twin counts them, and how to make the product's of them."""

    name: str
    weights: tuple[tuple[int, int], ...]
    promise: int
    accept: int

    def product(self) -> QuorumSystem | None:
        """What the product is told; None is its default, a majority."""
        if self.name == "majority":
            return None
        if self.name == "even, flexible":
            return EvenFlexible([voter for voter, _ in self.weights])
        return Weighted(dict(self.weights), self.promise, self.accept)

    def weigh(self, voters: Any) -> int:
        weight = 0
        for voter, each in self.weights:
            if voter in list(voters):
                weight += each
        return weight

    def promised_by(self, voters: Any) -> bool:
        return self.weigh(voters) >= self.promise

    def accepted_by(self, voters: Any) -> bool:
        return self.weigh(voters) >= self.accept


def majority(*voters: int) -> Quorum:
    needed = next(n for n in range(100) if 2 * n > len(voters))
    return Quorum("majority", tuple((voter, 1) for voter in voters), needed, needed)


def chain_over(before: bytes, slot: int, value: bytes) -> bytes:
    """The chain one slot on, as DESIGN §3 writes it."""
    kind = bytes([msgspec.msgpack.decode(value)[0]])
    return hashlib.blake2b(before + slot.to_bytes(8, "big") + kind + value, digest_size=32).digest()


# --- the state, slot by slot ----------------------------------------------------------------


def by_slot(runs: tuple[st.Run, ...]) -> dict[int, tuple[Ballot, bytes]]:
    """What runs hold; no slot twice, ascending, no run empty."""
    held: dict[int, tuple[Ballot, bytes]] = {}
    last = 0
    for run in runs:
        assert run.values, "a run holds something"
        assert run.first > last, "runs are ascending and disjoint"
        for offset, value in enumerate(run.values):
            held[run.first + offset] = (run.ballot, value)
        last = run.first + len(run.values) - 1
    return held


def ranges(pairs: Any, fixed: int) -> set[tuple[int, Ballot]]:
    return {
        (slot, ballot)
        for first, last, ballot in pairs
        for slot in range(first, min(last, fixed + HORIZON) + 1)
    }


def plain_role(role: st.Role, fixed: int) -> SimpleNamespace:
    match role:
        case st.Follower():
            return SimpleNamespace(kind="follower")
        case st.Polling():
            return SimpleNamespace(
                kind="polling",
                attempt=role.attempt,
                answers=dict(role.answers),
                highest=role.highest,
            )
        case st.Candidate():
            parts = {}
            for part in role.parts:
                slots = {
                    slot
                    for slot in range(1, fixed + HORIZON + 1)
                    for first, last in part.covered
                    if first <= slot and (slot <= last or last == 0)
                }
                parts[part.voter] = SimpleNamespace(
                    incarnation=part.incarnation,
                    covered=slots,
                    named=ranges(part.runs, fixed),
                )
            plan = None if role.plan is None else dict(ranges(role.plan, fixed))
            return SimpleNamespace(
                kind="candidate",
                ballot=role.ballot,
                first=role.first,
                since=role.since_tick,
                parts=parts,
                silent=set(role.silent),
                plan=plan,
                fetched=by_slot(role.fetched),
                fetch_tick=role.fetch_tick,
            )
        case st.Leader():
            votes: dict[int, set[int]] = {}
            sent = {}
            for flight in role.flights:
                for slot in range(flight.first, flight.last + 1):
                    assert slot not in votes, "a slot is in one flight"
                    votes[slot] = set(flight.votes)
                    sent[slot] = flight.sent_tick
            return SimpleNamespace(
                kind="leader",
                ballot=role.ballot,
                first=role.first,
                next_slot=role.next_slot,
                counted=role.counted,
                votes=votes,
                sent=sent,
                beat=role.beat,
                beat_ticks=dict(role.beat_ticks),
                acks={a.voter: a for a in role.acks},
                beat_acked=role.beat_acked,
                quorum_tick=role.quorum_tick,
                since=role.since_tick,
                announced=role.announced,
                handover=role.handover,
            )


def plain(state: st.State) -> SimpleNamespace:
    """A state without runs."""
    return SimpleNamespace(
        promised=state.promised,
        fixed=state.fixed,
        chain=state.chain,
        held=by_slot(state.accepted),
        genesis=state.genesis,
        role=plain_role(state.role, state.fixed),
        tick=state.tick,
        leader=state.leader,
        heard=state.heard_tick,
        deadline=state.deadline,
        attempt=state.attempt,
        boots=dict(state.boots),
        chase=None
        if state.chase is None
        else SimpleNamespace(
            asked=state.chase.asked,
            hint=state.chase.hint,
            goal=state.chase.goal,
            attempt=state.chase.attempt,
            until=state.chase.until_tick,
        ),
        has_room=state.has_room,
        halted=bool(state.halted),
        marks=dict(state.chain_marks),
        reports={voter: (slot, chain) for voter, slot, chain in state.chain_reports},
    )


# --- the effects, slot by slot --------------------------------------------------------------


def plain_records(records: tuple[st.Record, ...]) -> list[Any]:
    out: list[Any] = []
    for record in records:
        match record:
            case st.PromiseRecord(ballot=ballot):
                out.append(("promise", ballot))
            case st.AcceptRecord(ballot=ballot, first=first, values=values):
                assert values, "a record says something"
                out.extend(("accept", ballot, first + n, v) for n, v in enumerate(values))
            case st.FixedRecord(last=last, chain=chain):
                out.append(("fixed", last, chain))
            case st.LearnedRecord(first=first, values=values, chain=chain):
                out.extend(("learned", first + n, v) for n, v in enumerate(values))
                out.append(("chain", chain))
            case st.InstallRecord(slot=slot, chain=chain, genesis=genesis):
                out.append(("install", slot, chain, genesis))
    return out


def plain_sends(sends: tuple[st.Send, ...]) -> Counter[Any]:
    """Sends as a multiset. Of a Fetch only the pairs: whom to ask is checked in the twin."""
    out: Counter[Any] = Counter()
    for send in sends:
        match send.message:
            case m.Fetch(ballot=ballot, wanted=wanted):
                for pair in wanted:
                    for slot in range(pair.first, pair.last + 1):
                        out[("fetch", ballot, slot, pair.ballot)] += 1
            case m.Fetched(ballot=ballot, first=first, accepted_at=at, values=values):
                for n, value in enumerate(values):
                    out[(send.to, "fetched", ballot, first + n, at, value)] += 1
            case m.Accepted(ballot=ballot, first=first, last=last):
                for slot in range(first, last + 1):
                    out[(send.to, "accepted", ballot, slot)] += 1
            case m.Accept(ballot=ballot, first=first, values=values, tip=tip):
                for n, value in enumerate(values):
                    out[(send.to, "accept", ballot, first + n, value, tip)] += 1
            case _:
                out[(send.to, send.message)] += 1
    return out


def plain_fixed(runs: tuple[st.FixedRun, ...]) -> list[Any]:
    return [
        (run.first + n, value, chain)
        for run in runs
        for n, (value, chain) in enumerate(zip(run.values, run.chains, strict=True))
    ]


# --- the twin -------------------------------------------------------------------------------


class Twin:
    """One step of one voter, by the rules."""

    def __init__(self, config: st.Config, quorum: Quorum, before: st.State) -> None:
        self.config = config
        self.quorum = quorum
        self.me = config.voter
        self.s = plain(before)
        self.runs = [range(f.first, f.last + 1) for f in getattr(before.role, "flights", ())]
        """The runs proposed before: how many may be open, and be sent again at once, is bounded."""
        self.records: list[Any] = []
        self.sends: Counter[Any] = Counter()
        self.fixed: list[Any] = []

    # small verbs

    def send(self, to: int, message: m.PeerMessage) -> None:
        self.sends.update(plain_sends((st.Send(to, message),)))

    def tell_others(self, message: m.PeerMessage) -> None:
        for voter in self.config.voters:
            if voter != self.me:
                self.send(voter, message)

    def refuse(self, to: int, ballot: Ballot) -> None:
        self.send(to, m.Refused(ballot, self.s.promised, self.s.fixed))

    def draw(self, number: int) -> int:
        text = f"{self.config.seed}:{self.me}:{number}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")

    def patience(self, attempt: int) -> int:
        """An election timeout: from min to max, the spread doubled with each attempt up to 8."""
        low, high = self.config.election_ticks_min, self.config.election_ticks_max
        spread = (high - low) * [1, 2, 4, 8][min(attempt, 3)]
        return low + self.draw(attempt) % (spread + 1)

    def become_follower(self) -> None:
        self.s.role = SimpleNamespace(kind="follower")
        self.s.deadline = self.s.tick + self.patience(self.s.attempt)

    @property
    def leads(self) -> bool:
        return bool(self.s.role.kind == "leader")

    @property
    def stands(self) -> bool:
        return bool(self.s.role.kind == "candidate")

    def tip(self) -> Tip:
        return Tip(self.s.fixed, self.s.chain, self.s.role.counted)

    # the events

    def take(self, event: st.Event) -> None:
        if self.s.halted:
            return
        match event:
            case st.Receive():
                self.receive(event)
            case st.Tick():
                self.tick()
            case st.Propose(values=values):
                self.client(values)
            case st.Beat():
                if self.leads:
                    self.beat()
            case st.Learn():
                self.learn(event)
            case st.CatchUpFailed(voter=voter):
                self.catch_up_failed(voter)
            case st.Install():
                self.install(event)
            case st.StartHandOver(to=to):
                self.start_hand_over(to)
            case st.DiskRoom(has_room=has_room):
                self.s.has_room = has_room
                if not has_room:
                    self.start_hand_over(0)

    def receive(self, event: st.Receive) -> None:
        """R10: who is heard at all."""
        sender, config = event.sender, self.config
        if sender == self.me:
            if (event.incarnation, event.boot) != (config.incarnation, config.boot):
                return
        elif sender not in config.voters:
            return
        else:
            if self.s.genesis is not None:
                known = dict(zip(self.s.genesis.voters, self.s.genesis.incarnations, strict=True))
                if event.incarnation != known[sender]:
                    self.send(sender, m.Fenced(1, known[sender]))
                    return
            newest = self.s.boots.get(sender, 0)
            if event.boot < newest:
                self.send(sender, m.Fenced(2, newest))
                return
            if event.boot > newest:
                self.s.boots[sender] = event.boot
        name = type(event.message).__name__
        if name != "CatchUp":
            getattr(self, f"on_{name.lower()}")(sender, event.message, event.incarnation)

    # asking before standing: rule R9

    def on_poll(self, sender: int, message: m.Poll, _: int) -> None:
        heard = self.s.leader != NO_BALLOT
        lately = self.s.tick < self.s.heard + self.config.election_ticks_min
        hears = self.leads or (heard and lately)
        self.send(sender, m.PollAnswer(message.attempt, hears, self.s.promised, self.s.fixed))

    def on_pollanswer(self, sender: int, message: m.PollAnswer, _: int) -> None:
        if message.fixed > self.s.fixed:
            self.chase(message.fixed, sender)
            return
        role = self.s.role
        if role.kind == "polling" and role.attempt == message.attempt:
            role.answers[sender] = message.hears
            role.highest = max(role.highest, message.promised)
            self.maybe_stand()

    def poll(self) -> None:
        low = self.config.election_ticks_min
        self.s.role = SimpleNamespace(
            kind="polling",
            attempt=self.s.tick,
            answers={self.me: False},
            highest=self.s.promised,
        )
        self.s.deadline = self.s.tick + low // 2 + self.draw(self.s.tick) % low
        self.s.leader = NO_BALLOT
        self.tell_others(m.Poll(self.s.tick, self.s.fixed))
        self.maybe_stand()

    def maybe_stand(self) -> None:
        deaf = [voter for voter, hears in self.s.role.answers.items() if not hears]
        if self.quorum.promised_by(deaf):
            self.stand(self.s.role.highest)

    # phase 1

    def stand(self, heard_of: Ballot) -> None:
        """R1."""
        top = max(self.s.promised, heard_of)
        ballot = Ballot(top.era, top.round + 1, self.me)
        self.s.promised = ballot
        self.records.append(("promise", ballot))
        self.s.leader = NO_BALLOT
        self.s.role = SimpleNamespace(
            kind="candidate",
            ballot=ballot,
            first=self.s.fixed + 1,
            since=self.s.tick,
            parts={},
            silent=set(),
            plan=None,
            fetched={},
            fetch_tick=self.s.tick,
        )
        self.prepare_all()

    def prepare_all(self) -> None:
        for voter in self.config.voters:
            self.send(voter, m.Prepare(self.s.role.ballot, self.s.role.first))

    def on_prepare(self, sender: int, message: m.Prepare, _: int) -> None:
        """R2."""
        ballot, first = message.ballot, message.first
        if ballot.voter != sender:
            return
        if ballot < self.s.promised or first <= self.s.fixed:
            self.refuse(sender, ballot)
            return
        if ballot > self.s.promised:
            self.s.promised = ballot
            self.records.append(("promise", ballot))
            if self.s.role.kind != "follower":
                self.become_follower()
            self.s.leader = NO_BALLOT
            self.s.deadline = max(self.s.deadline, self.s.tick + self.patience(self.s.attempt))
        pairs: list[Pairs] = []
        for slot in sorted(s for s in self.s.held if s >= first):
            at = self.s.held[slot][0]
            if pairs and pairs[-1].last == slot - 1 and pairs[-1].ballot == at:
                pairs[-1] = Pairs(pairs[-1].first, slot, at)
            else:
                pairs.append(Pairs(slot, slot, at))
        while len(pairs) > m.PROMISE_PAIRS_MAX:
            part, pairs = pairs[: m.PROMISE_PAIRS_MAX], pairs[m.PROMISE_PAIRS_MAX :]
            self.send(sender, m.Promise(ballot, first, part[-1].last, tuple(part)))
            first = part[-1].last + 1
        self.send(sender, m.Promise(ballot, first, 0, tuple(pairs)))

    def on_promise(self, sender: int, message: m.Promise, incarnation: int) -> None:
        """R3."""
        role = self.s.role
        if not self.stands or role.ballot != message.ballot:
            return
        for pair in message.accepted:
            outside = pair.first < message.first or 0 < message.last < pair.last
            if outside or pair.first > pair.last:
                return
        part = role.parts.get(sender)
        if part is None or part.incarnation != incarnation:
            part = SimpleNamespace(incarnation=incarnation, covered=set(), named=set())
            role.parts[sender] = part
        top = message.last or self.s.fixed + HORIZON
        part.covered |= set(range(message.first, top + 1))
        part.named |= ranges(((p.first, p.last, p.ballot) for p in message.accepted), self.s.fixed)
        role.silent.discard(sender)
        self.count_promises()

    def whole(self, part: SimpleNamespace) -> bool:
        top = self.s.fixed + HORIZON
        return set(range(self.s.role.first, top + 1)) <= part.covered

    def count_promises(self) -> None:
        role = self.s.role
        done = sorted(
            v for v, part in role.parts.items() if v not in role.silent and self.whole(part)
        )
        if role.first == 1:
            complete = done == list(self.config.voters)  # R10
        else:
            complete = self.quorum.promised_by(done)
        if not complete:
            role.plan = None
            return
        plan: dict[int, Ballot] = {}
        for voter in done:
            for slot, ballot in role.parts[voter].named:
                if slot >= role.first:
                    plan[slot] = max(plan.get(slot, NO_BALLOT), ballot)
        if plan != role.plan:
            role.plan = plan
            role.fetch_tick = self.s.tick
            for slot in self.lacking():
                holders = [v for v in done if (slot, plan[slot]) in role.parts[v].named]
                if set(holders) - {self.me}:
                    self.sends[("fetch", role.ballot, slot, plan[slot])] += 1
        self.maybe_lead()

    def lacking(self) -> list[int]:
        role = self.s.role
        return [
            slot
            for slot, ballot in sorted((role.plan or {}).items())
            if self.s.held.get(slot, (None,))[0] != ballot
            and role.fetched.get(slot, (None,))[0] != ballot
        ]

    def maybe_lead(self) -> None:
        role = self.s.role
        if role.plan is None or self.lacking():
            return
        values = []
        for slot in range(role.first, max(role.plan, default=role.first - 1) + 1):
            at = role.plan.get(slot)
            if at is None:
                values.append(self.free(slot))
            elif self.s.held.get(slot, (None,))[0] == at:
                values.append(self.s.held[slot][1])
            else:
                values.append(role.fetched[slot][1])
        if role.first == 1 and not values:
            values.append(self.free(1))
        self.s.role = SimpleNamespace(
            kind="leader",
            ballot=role.ballot,
            first=self.s.fixed + 1,
            next_slot=self.s.fixed + 1,
            counted=self.s.fixed + 1,
            votes={},
            sent={},
            beat=0,
            beat_ticks={},
            acks={},
            beat_acked=0,
            quorum_tick=self.s.tick,
            since=self.s.tick,
            announced=self.s.fixed,
            handover=None,
        )
        self.s.leader = role.ballot
        self.s.heard = self.s.tick
        self.s.attempt = 0
        self.propose(values)
        self.beat()

    def free(self, slot: int) -> bytes:
        role = self.s.role
        if slot > 1:
            return encode_value(Value(Kind.NOOP, role.ballot))
        all_of_them = tuple(role.parts[v].incarnation for v in self.config.voters)
        genesis = msgspec.msgpack.encode(Genesis(self.config.voters, all_of_them))
        return encode_value(Value(Kind.GENESIS, role.ballot, command=genesis))

    def on_fetch(self, sender: int, message: m.Fetch, _: int) -> None:
        if message.ballot.voter != sender:
            return
        if message.ballot != self.s.promised:
            self.refuse(sender, message.ballot)
            return
        for pair in message.wanted:
            if pair.first <= self.s.fixed:
                self.refuse(sender, message.ballot)
                return
            for slot in range(pair.first, pair.last + 1):
                at, value = self.s.held.get(slot, (None, b""))
                if at != pair.ballot:
                    break
                self.sends[(sender, "fetched", message.ballot, slot, at, value)] += 1

    def on_fetched(self, _sender: int, message: m.Fetched, _: int) -> None:
        role = self.s.role
        if not self.stands or role.ballot != message.ballot or role.plan is None:
            return
        got = {message.first + n: value for n, value in enumerate(message.values)}
        if not any(role.plan.get(slot) == message.accepted_at for slot in got):
            return
        for slot, value in got.items():
            role.fetched[slot] = (message.accepted_at, value)
        role.fetch_tick = self.s.tick
        self.maybe_lead()

    # phase 2

    def window(self) -> int:
        """How many slots may be proposed now."""
        role = self.s.role
        if not self.leads or role.handover is not None or len(self.runs) >= 64:
            return 0
        return m.WINDOW_SLOTS_MAX - len(role.votes)

    def client(self, values: tuple[bytes, ...]) -> None:
        if self.leads and len(values) <= self.window():
            self.propose(list(values))

    def propose(self, values: list[bytes]) -> None:
        role = self.s.role
        for value in values:
            slot = role.next_slot
            self.records.append(("accept", role.ballot, slot, value))
            self.s.held[slot] = (role.ballot, value)
            role.votes[slot] = set()
            role.sent[slot] = self.s.tick
            role.next_slot = slot + 1
            self.tell_others(m.Accept(role.ballot, slot, (value,), self.tip()))
            self.send(self.me, m.Accepted(role.ballot, slot, slot))

    def yield_to(self, ballot: Ballot) -> None:
        if (self.leads or self.stands) and self.s.role.ballot < ballot:
            self.become_follower()

    def hear(self, ballot: Ballot, age: int) -> None:
        self.s.leader = ballot
        self.s.heard = self.s.tick - age
        self.s.attempt = 0
        if self.s.role.kind == "polling":
            self.s.role = SimpleNamespace(kind="follower")
        if self.s.role.kind == "follower":
            self.s.deadline = max(self.s.deadline, self.s.tick - age + self.patience(0))

    def on_accept(self, sender: int, message: m.Accept, _: int) -> None:
        """R4."""
        ballot = message.ballot
        if ballot.voter != sender or not message.values:
            return
        if ballot < self.s.promised:
            self.refuse(sender, ballot)
            return
        self.yield_to(ballot)
        self.hear(ballot, 0)
        if self.s.has_room and ballot > self.s.promised:
            self.s.promised = ballot
            self.records.append(("promise", ballot))
        self.learn_tip(sender, ballot, message.tip)
        if not self.s.has_room:
            return
        new = {message.first + n: v for n, v in enumerate(message.values)}
        if min(new) <= self.s.fixed:
            self.refuse(sender, ballot)
        new = {slot: value for slot, value in new.items() if slot > self.s.fixed}
        if not new:
            return
        if any(self.s.held.get(slot, (None,))[0] != ballot for slot in new):
            for slot, value in sorted(new.items()):
                self.records.append(("accept", ballot, slot, value))
                self.s.held[slot] = (ballot, value)
            self.learn_tip(sender, ballot, message.tip)
        self.send(sender, m.Accepted(ballot, min(new), max(new)))

    def on_accepted(self, sender: int, message: m.Accepted, _: int) -> None:
        """R6."""
        role = self.s.role
        if not self.leads or role.ballot != message.ballot:
            return
        for slot in range(message.first, message.last + 1):
            if slot in role.votes:
                role.votes[slot].add(sender)
        self.fix_counted()

    def fix_counted(self) -> None:
        role = self.s.role
        last = self.s.fixed
        while self.quorum.accepted_by(role.votes.get(last + 1, ())):
            last += 1
        for slot in range(self.s.fixed + 1, last + 1):
            del role.votes[slot], role.sent[slot]
        self.fix_up_to(last)

    # fixing

    def fix_up_to(self, last: int) -> None:
        """What is held up to ``last`` is fixed."""
        if last > self.s.fixed:
            values = [self.s.held[slot][1] for slot in range(self.s.fixed + 1, last + 1)]
            self.records.append(("fixed", last, self.chain_after(values)))
            self.advance(values)

    def chain_after(self, values: list[bytes]) -> bytes:
        chain = self.s.chain
        for n, value in enumerate(values):
            chain = chain_over(chain, self.s.fixed + 1 + n, value)
        return bytes(chain)

    def advance(self, values: list[bytes]) -> None:
        for value in values:
            slot = self.s.fixed + 1
            self.s.fixed = slot
            self.s.chain = chain_over(self.s.chain, slot, value)
            self.fixed.append((slot, value, self.s.chain))
            self.s.held.pop(slot, None)
            if slot == 1 and msgspec.msgpack.decode(value)[0] == Kind.GENESIS:
                command = msgspec.msgpack.decode(value, type=Value).command
                self.s.genesis = msgspec.msgpack.decode(command, type=Genesis)
            if slot % m.CHAIN_CHECK_SLOTS == 0:
                self.s.marks[slot] = self.s.chain
                if len(self.s.marks) > 4:
                    del self.s.marks[min(self.s.marks)]
                self.tell_others(m.ChainReport(slot, self.s.chain))
        self.after_fixed()
        self.compare_chains()

    def after_fixed(self) -> None:
        genesis, config = self.s.genesis, self.config
        if genesis is not None and (
            genesis.voters != config.voters
            or dict(zip(genesis.voters, genesis.incarnations, strict=True))[self.me]
            != config.incarnation
        ):
            self.s.halted = True
        if self.s.chase is not None and self.s.fixed >= self.s.chase.goal:
            self.s.chase = None

    def learn_tip(self, sender: int, ballot: Ballot, tip: Tip) -> None:
        """R7."""
        slots = range(self.s.fixed + 1, tip.fixed + 1)
        if not slots:
            return
        if all(slot in self.s.held for slot in slots):
            values = [self.s.held[slot][1] for slot in slots]
            if self.chain_after(values) == tip.chain:
                self.fix_up_to(tip.fixed)
                return
        exact = self.s.fixed
        while exact < tip.fixed and self.s.held.get(exact + 1, (None,))[0] == ballot:
            exact += 1
        counted_all = tip.counted <= self.s.fixed + 1
        if counted_all and exact < tip.fixed:  # all of it exact, and another chain: believe none
            self.fix_up_to(exact)
        self.chase(tip.fixed, sender)

    # leader and followers

    def beat(self) -> None:
        role = self.s.role
        role.beat += 1
        role.beat_ticks[role.beat] = self.s.tick
        role.announced = self.s.fixed
        age = self.s.tick - role.quorum_tick
        self.tell_others(m.Heartbeat(role.ballot, role.beat, self.tip(), age))
        self.count_acks()

    def count_acks(self) -> None:
        """R9: the newest round that an accept quorum answered."""
        role = self.s.role
        for beat in range(role.beat_acked + 1, role.beat + 1):
            those = [self.me, *(v for v, ack in role.acks.items() if ack.beat >= beat)]
            if self.quorum.accepted_by(those):
                role.beat_acked = beat
                role.quorum_tick = role.beat_ticks[beat]
                role.beat_ticks = {b: t for b, t in role.beat_ticks.items() if b >= beat}

    def on_heartbeat(self, sender: int, message: m.Heartbeat, _: int) -> None:
        ballot = message.ballot
        if ballot.voter != sender:
            return
        if ballot < self.s.promised:
            self.refuse(sender, ballot)
            return
        self.yield_to(ballot)
        if message.quorum_age_ticks < self.config.election_ticks_min:
            self.hear(ballot, message.quorum_age_ticks)
        self.learn_tip(sender, ballot, message.tip)
        last = max([self.s.fixed, *self.s.held])
        self.send(sender, m.HeartbeatAck(ballot, message.beat, self.s.fixed, last, self.s.has_room))

    def on_heartbeatack(self, sender: int, message: m.HeartbeatAck, _: int) -> None:
        role = self.s.role
        if not self.leads or role.ballot != message.ballot or message.beat > role.beat:
            return
        if sender in role.acks and role.acks[sender].beat > message.beat:
            return
        role.acks[sender] = st.Ack(
            sender,
            message.beat,
            message.fixed,
            message.last_accepted,
            message.has_room,
            self.s.tick,
        )
        self.count_acks()
        self.chase(message.fixed, sender)
        count = min(message.last_accepted + 1 - role.next_slot, self.window(), m.RUN_SLOTS_MAX)
        self.propose([encode_value(Value(Kind.NOOP, role.ballot))] * count)
        self.try_hand_over()

    def on_refused(self, sender: int, message: m.Refused, _: int) -> None:
        role, s = self.s.role, self.s
        if not (self.leads or self.stands) or role.ballot != message.ballot:
            return
        self.chase(message.fixed, sender)
        if message.promised <= role.ballot:
            return
        if self.stands:
            s.attempt += 1
            self.become_follower()
            return
        s.leader = NO_BALLOT
        self.become_follower()
        heard = s.tick <= role.quorum_tick + 2 * self.config.heartbeat_ticks
        settled = s.tick >= role.since + self.config.election_ticks_min
        if heard and settled and role.handover is None and s.has_room:
            self.stand(message.promised)

    # handover

    def start_hand_over(self, to: int) -> None:
        role = self.s.role
        if not self.leads or role.handover is not None:
            return
        if to == 0:
            fresh = [
                ack
                for ack in role.acks.values()
                if ack.has_room and self.s.tick <= ack.tick + 2 * self.config.heartbeat_ticks
            ]
            fresh.sort(key=lambda ack: (-ack.last_accepted, -ack.fixed, ack.voter))
            to = fresh[0].voter if fresh else self.me
        if to != self.me and to in self.config.voters:
            role.handover = (to, self.s.tick + self.config.election_ticks_max)
            self.try_hand_over()

    def try_hand_over(self) -> None:
        role = self.s.role
        if role.handover is None or role.votes:
            return
        to = role.handover[0]
        if to in role.acks and role.acks[to].fixed >= self.s.fixed:
            self.send(to, m.HandOver(role.ballot))
        elif role.announced < self.s.fixed:
            self.beat()

    def on_handover(self, sender: int, message: m.HandOver, _: int) -> None:
        meant = message.ballot.voter == sender and message.ballot >= self.s.promised
        if meant and self.s.has_room and self.s.role.kind in ("follower", "polling"):
            self.stand(message.ballot)

    # learning from another: rule R8

    def chase(self, goal: int, hint: int) -> None:
        if goal <= self.s.fixed:
            return
        if self.s.chase is None:
            self.s.chase = SimpleNamespace(
                asked=0, hint=hint, goal=goal, attempt=0, until=self.s.tick + 2
            )
        self.s.chase.goal = max(self.s.chase.goal, goal)

    def ask(self) -> None:
        chase = self.s.chase
        if not self.s.has_room and not self.leads:
            chase.asked, chase.until = 0, self.s.tick
            return
        others = [voter for voter in self.config.voters if voter != self.me]
        if not others:
            return
        while others[0] != chase.hint and chase.hint in others:
            others.append(others.pop(0))
        chase.asked = others[chase.attempt % len(others)]
        chase.attempt += 1
        chase.until = self.s.tick + 20 * self.config.election_ticks_max
        self.send(chase.asked, m.CatchUp(self.s.fixed + 1))

    def ask_again(self, voter: int) -> None:
        """The conversation with ``voter`` goes on."""
        chase = self.s.chase
        if chase is not None and chase.asked == voter:
            chase.hint, chase.attempt = voter, 0
            self.ask()

    def catch_up_failed(self, voter: int) -> None:
        chase = self.s.chase
        if chase is not None and chase.asked == voter:
            chase.asked = 0
            chase.until = (
                self.s.tick + self.config.retry_ticks * [1, 2, 4, 8][min(chase.attempt, 3)]
            )

    def learn(self, event: st.Learn) -> None:
        told = {event.first + n: value for n, value in enumerate(event.values)}
        if not told or event.first < 1 or event.first > self.s.fixed + 1:
            self.catch_up_failed(event.voter)
            return
        if max(told) <= self.s.fixed:
            self.ask_again(event.voter)
            return
        chain = event.chain_before
        for slot in range(event.first, self.s.fixed + 1):
            chain = chain_over(chain, slot, told[slot])
        if chain != self.s.chain:
            self.catch_up_failed(event.voter)
            return
        new = sorted(slot for slot in told if slot > self.s.fixed)
        values = [told[slot] for slot in new]
        self.records.extend(("learned", slot, told[slot]) for slot in new)
        self.records.append(("chain", self.chain_after(values)))
        self.advance(values)
        self.jumped()
        if self.s.chase is not None:
            self.s.chase.goal = max(self.s.chase.goal, event.tip_slot)
        self.ask_again(event.voter)

    def install(self, event: st.Install) -> None:
        if event.slot > self.s.fixed:
            self.records.append(("install", event.slot, event.chain, event.genesis))
            self.s.fixed, self.s.chain, self.s.genesis = event.slot, event.chain, event.genesis
            self.s.held = {n: v for n, v in self.s.held.items() if n > event.slot}
            self.s.marks = {}
            self.after_fixed()
            self.jumped()
        if self.s.chase is not None:
            self.ask_again(self.s.chase.asked)

    def jumped(self) -> None:
        role = self.s.role
        if self.leads:
            role.counted = self.s.fixed + 1
            role.next_slot = max(role.next_slot, self.s.fixed + 1)
            role.votes = {n: v for n, v in role.votes.items() if n > self.s.fixed}
            role.sent = {n: t for n, t in role.sent.items() if n > self.s.fixed}
            self.fix_counted()
        elif self.stands and role.first <= self.s.fixed:
            role.first = self.s.fixed + 1
            role.plan, role.since, role.silent = None, self.s.tick, set()
            genesis = self.s.genesis
            if not self.s.halted and genesis is not None:
                known = dict(zip(genesis.voters, genesis.incarnations, strict=True))
                for voter in [v for v, p in role.parts.items() if p.incarnation != known[v]]:
                    del role.parts[voter]
            self.prepare_all()

    # chain check, fencing

    def on_chainreport(self, sender: int, message: m.ChainReport, _: int) -> None:
        self.s.reports[sender] = (message.slot, message.chain)
        self.compare_chains()

    def compare_chains(self) -> None:
        for slot, mine in self.s.marks.items():
            others = [c for at, c in self.s.reports.values() if at == slot and c != mine]
            if any(2 * others.count(c) > len(self.config.voters) for c in others):
                self.s.halted = True

    def on_fenced(self, _sender: int, message: m.Fenced, _: int) -> None:
        config = self.config
        if message.reason == 2 and message.expected > config.boot:
            self.s.halted = True
        if message.reason == 1 and message.expected != config.incarnation:
            genesis = self.s.genesis
            mine = (
                genesis is not None
                and (dict(zip(genesis.voters, genesis.incarnations, strict=True))[self.me])
            )
            if mine is False or mine != config.incarnation:
                self.s.halted = True

    # time

    def tick(self) -> None:
        self.s.tick += 1
        s, config, role = self.s, self.config, self.s.role
        if role.kind == "follower" and s.deadline == 0:
            spread = config.election_ticks_max - config.election_ticks_min
            s.deadline = s.tick + self.draw(0) % (spread + 1)
        elif role.kind in ("follower", "polling"):
            waits = config.election_ticks_max if role.kind == "follower" and not s.has_room else 0
            if s.tick >= s.deadline + waits:
                self.poll()
        elif role.kind == "candidate":
            self.tick_candidate()
        else:
            self.tick_leader()
        if s.chase is not None and s.tick >= s.chase.until:
            self.ask()

    def tick_candidate(self) -> None:
        s, config, role = self.s, self.config, self.s.role
        waited = s.tick - role.since
        if waited >= config.election_ticks_min * [1, 2, 4, 8][min(s.attempt, 3)]:
            s.attempt += 1
            self.become_follower()
            return
        if waited % config.retry_ticks:
            return
        if role.plan is not None and s.tick - role.fetch_tick >= 2 * config.retry_ticks:
            lacking = {(slot, role.plan[slot]) for slot in self.lacking()}
            for voter, part in list(role.parts.items()):
                if voter != self.me and lacking & part.named:
                    role.silent.add(voter)
                    del role.parts[voter]
            role.plan = None
            self.count_promises()
        if self.stands and role.plan is None:
            for voter in config.voters:
                part = role.parts.get(voter)
                covered = part.covered if part is not None else set()
                missing = next(
                    (n for n in range(role.first, s.fixed + HORIZON) if n not in covered), None
                )
                if missing is not None:
                    self.send(voter, m.Prepare(role.ballot, missing))

    def tick_leader(self) -> None:
        s, config, role = self.s, self.config, self.s.role
        if s.tick > role.quorum_tick + config.election_ticks_min:
            s.leader = NO_BALLOT
            self.become_follower()
            return
        if role.handover is not None and s.tick >= role.handover[1]:
            role.handover = None
        if not s.has_room and s.tick % (4 * config.election_ticks_max) == 0:
            self.start_hand_over(0)
        due = [run for run in self.runs if s.tick - role.sent[run[0]] >= config.retry_ticks]
        oldest = {slot for run in due[:8] for slot in run}
        for slot, votes in sorted(role.votes.items()):
            if slot not in oldest:
                continue
            role.sent[slot] = s.tick
            for voter in config.voters:
                if voter in votes:
                    continue
                if voter == self.me:
                    self.send(voter, m.Accepted(role.ballot, slot, slot))
                else:
                    value = s.held[slot][1]
                    self.send(voter, m.Accept(role.ballot, slot, (value,), self.tip()))
        newest = max(role.beat_ticks.values(), default=None)
        if newest is None or s.tick >= newest + config.heartbeat_ticks or s.fixed > role.announced:
            self.beat()
        self.try_hand_over()


# --- both -----------------------------------------------------------------------------------


def differences(
    config: st.Config, quorum: Quorum, before: st.State, event: st.Event
) -> tuple[list[str], st.State, st.Effects]:
    """Take the step with the product and with the twin: where they part, in words, and what the
    product did. The invariants are checked on the way."""
    after, effects = step(config, before, event)
    check_step(config, before, event, after, effects)
    twin = Twin(config, quorum, before)
    twin.take(event)
    wrong = []
    for what, got, expected in (
        ("records", plain_records(effects.records), twin.records),
        ("sends", plain_sends(effects.sends), twin.sends),
        ("fixed", plain_fixed(effects.fixed), twin.fixed),
    ):
        if got != expected:
            wrong.append(f"{what}:\n  step {got}\n  twin {expected}")
    expected_state = vars(twin.s)
    if twin.s.role.kind == "candidate":  # what lies beyond the old horizon is of no interest
        top = min(before.fixed, after.fixed) + HORIZON
        trim(twin.s.role, top)
    got_state = vars(plain(after))
    if got_state["role"].kind == "candidate":
        trim(got_state["role"], min(before.fixed, after.fixed) + HORIZON)
    wrong.extend(
        f"{name}:\n  step {got_state[name]}\n  twin {expected_state[name]}"
        for name in got_state
        if got_state[name] != expected_state[name]
    )
    for send in effects.sends:
        if isinstance(send.message, m.Fetch):
            wrong.extend(strangers(before, event, after, send))
    return wrong, after, effects


def trim(role: SimpleNamespace, top: int) -> None:
    for part in role.parts.values():
        part.covered = {slot for slot in part.covered if slot <= top}
        part.named = {pair for pair in part.named if pair[0] <= top}


def strangers(before: st.State, event: st.Event, after: st.State, send: st.Send) -> list[str]:
    """Is each pair fetched from a voter that named it?"""
    assert isinstance(send.message, m.Fetch)
    named: set[tuple[int, Ballot]] = set()
    for state in (before, after):
        if isinstance(state.role, st.Candidate):
            for part in state.role.parts:
                if part.voter == send.to:
                    named |= ranges(part.runs, state.fixed)
    if isinstance(event, st.Receive) and event.sender == send.to:
        assert isinstance(event.message, m.Promise), "only a promise completes a plan"
        pairs = ((p.first, p.last, p.ballot) for p in event.message.accepted)
        named |= ranges(pairs, before.fixed)
    wanted = ranges(((p.first, p.last, p.ballot) for p in send.message.wanted), before.fixed)
    return [f"asks {send.to} for {wanted - named}, which it never named"] if wanted - named else []
