"""Every message, against every role: the full product of the relations that decide what follows.

Each test is one message (or event). Its dimensions are the relations that matter: the ballot to the
promise (era, round, voter), the slot to ``fixed`` and to ``first_slot``, the sender, the
incarnation and boot, what the journal holds, the kind of value, the quorum system. Each case is one
``paxos.step``, compared with the dumb twin (``tests/core/twin.py``) in every field of the state and
every effect, with the invariants checked. A test also says which effects its product must have
produced, so that no product is about nothing.

``TREX_WIDE=1`` makes the products several times larger (``just soak``). ``pytest -s`` prints how
many cases there were.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pytest

from tests.core.twin import Quorum, chain_over, differences, majority
from trex_core import messages as m
from trex_core import state as st
from trex_core.messages import NO_BALLOT, Ballot, Genesis, Kind, Pairs, Tip, Value, encode_value
from trex_core.state import Ack, Candidate, Config, Flight, Follower, Leader, Part, Polling, Run

WIDE = os.environ.get("TREX_WIDE", "") == "1"
"""The larger products."""

ME = 2
VOTERS = (1, 2, 3)
FIXED = 10
TICK = 100
CHAIN = bytes(range(32))
GENESIS = Genesis(VOTERS, (101, 102, 103))
OWN = Ballot(1, 5, ME)
"""What who stands or leads has promised. Round 5 of era 1: there is room below and above."""
THEIRS = Ballot(1, 5, 3)
"""What another follows: of the same round, so that the voter decides which is higher."""
BEFORE = Ballot(1, 4, 3)
"""An older leader's."""
OLDER = Ballot(0, 9, 1)
"""One of an older era, with a higher round."""
OTHERS = (Ballot(1, 4, ME), Ballot(1, 6, ME), Ballot(0, 5, ME), Ballot(1, 5, 1))
"""Not ``OWN``: its round below and above, another era, another voter's."""

MAJORITY = majority(1, 2, 3)
QUORUMS = (
    MAJORITY,
    Quorum("heavy one", ((1, 2), (2, 1), (3, 1)), 3, 2),
    Quorum("heavy self", ((1, 1), (2, 3), (3, 1)), 3, 3),
    Quorum("read one, write all", ((1, 1), (2, 1), (3, 1)), 1, 3),
    Quorum("read all, write one", ((1, 1), (2, 1), (3, 1)), 3, 1),
    Quorum("one weighs nothing", ((1, 1), (2, 1), (3, 0)), 2, 1),
)


def some(narrow: Iterable[Any], wide: Iterable[Any]) -> tuple[Any, ...]:
    """A dimension: what matters, and with TREX_WIDE also the rest."""
    return (*narrow, *wide) if WIDE else tuple(narrow)


# --- values, journals -----------------------------------------------------------------------


def value(name: str, kind: int = Kind.COMMAND) -> bytes:
    if kind == Kind.GENESIS:
        return encode_value(Value(kind, OLDER, command=msgspec.msgpack.encode(GENESIS)))
    return encode_value(Value(kind, OLDER, command=name.encode()))


def chain_of(values: Iterable[bytes], before: bytes = CHAIN, fixed: int = FIXED) -> bytes:
    for slot, each in enumerate(values, fixed + 1):
        before = chain_over(before, slot, each)
    return before


Journal = tuple[tuple[int, Ballot, str], ...]
"""(slot, ballot, name of the value) above ``fixed``."""


def journals(promised: Ballot) -> dict[str, Journal]:
    """What may be held above ``fixed``; nothing above the promise."""
    held: dict[str, Journal] = {
        "empty": (),
        "same": ((11, promised, "a"),),
        "lower": ((11, BEFORE, "a"),),
        "two": ((11, promised, "a"), (12, promised, "b")),
        "mixed": ((11, BEFORE, "a"), (12, OLDER, "b"), (13, BEFORE, "c")),
        "hole": ((12, BEFORE, "b"),),
    }
    if WIDE:
        held["hole, same"] = ((12, promised, "b"), (13, promised, "c"))
        held["lower, same"] = ((11, OLDER, "a"), (12, promised, "b"))
        held["other value"] = ((11, BEFORE, "z"), (12, BEFORE, "b"))
    return held


def runs(journal: Journal, fixed: int = FIXED) -> tuple[Run, ...]:
    """Runs as long as one ballot goes on."""
    out: list[Run] = []
    for slot, ballot, name in journal:
        first = slot + fixed - FIXED
        if out and out[-1].ballot == ballot and out[-1].last == first - 1:
            out[-1] = Run(out[-1].first, ballot, (*out[-1].values, value(name)))
        else:
            out.append(Run(first, ballot, (value(name),)))
    return tuple(out)


# --- roles ----------------------------------------------------------------------------------


def part(voter: int, *named: tuple[int, int, Ballot], first: int = 11, last: int = 0) -> Part:
    return Part(voter, 100 + voter, ((first, last),), named)


def candidate(*parts: Part, fixed: int = FIXED, **fields: Any) -> Candidate:
    given: dict[str, Any] = {
        "ballot": OWN,
        "first": fixed + 1,
        "since_tick": 92,
        "parts": parts,
        "silent": (),
        "plan": None,
        "fetched": (),
        "fetch_tick": 92,
    }
    return Candidate(**{**given, **fields})


def leader(*flights: Flight, fixed: int = FIXED, **fields: Any) -> Leader:
    given: dict[str, Any] = {
        "ballot": OWN,
        "first": fixed + 1,
        "next_slot": flights[-1].last + 1 if flights else fixed + 1,
        "counted": fixed + 1,
        "flights": flights,
        "beat": 7,
        "beat_ticks": ((5, 93), (6, 95), (7, 98)),
        "acks": (Ack(1, 5, 10, 10, True, 92), Ack(3, 4, 9, 9, True, 88)),
        "beat_acked": 5,
        "quorum_tick": 93,
        "since_tick": 50,
        "announced": fixed,
        "handover": None,
    }
    return Leader(**{**given, **fields})


def flight(first: int, last: int, *votes: int, sent: int = 95) -> Flight:
    return Flight(first, last, votes, sent, 10)


RoleCase = tuple[str, st.Role, dict[str, Any], Journal | None]
"""Name, role, other fields of the state, and the journal it needs (None: any)."""

IN_FLIGHT: Journal = ((11, OWN, "p"), (12, OWN, "q"), (13, OWN, "r"))

FOLLOWERS: tuple[RoleCase, ...] = (
    ("follower", Follower(), {}, None),
    ("follower, heard", Follower(), {"leader": Ballot(1, 5, 1), "heard_tick": 97}, None),
    ("follower, silence", Follower(), {"leader": BEFORE, "heard_tick": 75, "attempt": 2}, None),
    (
        "catching up",
        Follower(),
        {"chase": st.Chase(3, 3, 12, 1, 500), "leader": BEFORE, "heard_tick": 76},
        None,
    ),
    ("polling", Polling(90, ((2, False),), BEFORE), {"attempt": 1}, None),
    ("polling, answered", Polling(90, ((1, True), (2, False)), Ballot(2, 1, 1)), {}, None),
    ("no room", Follower(), {"has_room": False}, None),
    ("no room, polling", Polling(90, ((2, False),), BEFORE), {"has_room": False}, None),
)
CANDIDATES: tuple[RoleCase, ...] = (
    ("candidate", candidate(), {}, None),
    ("candidate, one promise", candidate(part(1, (11, 11, BEFORE))), {"attempt": 1}, None),
    (
        "candidate, lacks a value",
        candidate(part(1, (11, 12, BEFORE)), part(3), plan=((11, 12, BEFORE),)),
        {"chase": st.Chase(0, 1, 12, 0, 102)},
        ((12, OLDER, "b"),),
    ),
    ("candidate, silent holder", candidate(part(3), silent=(1,)), {}, None),
)
LEADERS: tuple[RoleCase, ...] = (
    ("leader", leader(), {"leader": OWN}, ()),
    (
        "leader, in flight",
        leader(flight(11, 12, 1), flight(13, 13, 2)),
        {"leader": OWN},
        IN_FLIGHT,
    ),
    (
        "leader, vote open above",
        leader(flight(11, 11), flight(12, 13, 1, 3), quorum_tick=99, since_tick=98),
        {"leader": OWN},
        (*IN_FLIGHT, (15, BEFORE, "z")),
    ),
    (
        "draining",
        leader(flight(11, 11, 2), handover=(3, 120)),
        {"leader": OWN},
        IN_FLIGHT[:1],
    ),
    (
        "drained",
        leader(handover=(1, 120), announced=9, quorum_tick=95),
        {"leader": OWN, "chase": st.Chase(1, 1, 11, 1, 300)},
        (),
    ),
    ("leader without room", leader(flight(11, 11)), {"has_room": False}, IN_FLIGHT[:1]),
    ("leader, new", leader(since_tick=96, quorum_tick=96), {}, ((12, BEFORE, "b"),)),
)
ROLES = (*FOLLOWERS, *CANDIDATES, *LEADERS)


def state(role: RoleCase, promised: Ballot = OWN, journal: Journal = (), **fields: Any) -> st.State:
    _, its, more, needed = role
    held = journal if needed is None else needed
    given: dict[str, Any] = {
        "promised": OWN if isinstance(its, Candidate | Leader) else promised,
        "fixed": FIXED,
        "chain": CHAIN,
        "accepted": runs(held, fields.get("fixed", FIXED)),
        "genesis": GENESIS,
        "role": its,
        "tick": TICK,
        "deadline": 130,
        "boots": ((1, 4), (3, 4)),
    }
    return st.State(**{**given, **more, **fields})


def worlds(
    roles: Iterable[RoleCase] = ROLES, promises: Iterable[Ballot] = ()
) -> Iterator[st.State]:
    """Each role with each journal it may have, and for who may have promised anybody, each of
    ``promises``."""
    everybody = tuple(promises) or some([THEIRS], [OWN, Ballot(1, 5, 1)])
    for role in roles:
        bound = isinstance(role[1], Candidate | Leader)
        for promised in (OWN,) if bound else everybody:
            for journal in journals(promised).values() if role[3] is None else (role[3],):
                yield state(role, promised, journal)


def ballots(promised: Ballot, voter: int) -> tuple[Ballot, ...]:
    """One of each relation to the promise, all of ``voter``: era below and above whatever the
    round, round below, equal (the voter decides then), and above."""
    era, round_ = promised.era, promised.round
    relations = some(
        [(era - 1, round_ + 4), (era, round_ - 1), (era, round_), (era, round_ + 1), (era + 1, 1)],
        [(era - 1, round_), (era + 1, round_), (era, round_ + 50)],
    )
    return tuple(Ballot(e, r, voter) for e, r in relations)


# --- the run --------------------------------------------------------------------------------


class Product:
    """Plays cases and keeps count: of the cases, and of what followed."""

    def __init__(self, quorum: Quorum = MAJORITY, voters: tuple[int, ...] = VOTERS) -> None:
        self.seen: Counter[str] = Counter()
        self.cases = 0
        self.use(quorum, voters)

    def use(self, quorum: Quorum, voters: tuple[int, ...] = VOTERS) -> None:
        self.quorum = quorum
        me = ME if ME in voters else voters[0]
        self.config = Config(me, voters, 100 + me, 4, quorum=quorum.product())

    def play(self, before: st.State, event: st.Event) -> tuple[st.State, st.Effects]:
        self.cases += 1
        wrong, after, effects = differences(self.config, self.quorum, before, event)
        if wrong:
            text = "\n".join(wrong)
            pytest.fail(f"{self.quorum.name}\nbefore {before}\nevent {event}\n{text}")
        seen = self.seen
        kinds = {type(record).__name__ for record in effects.records}
        kinds |= {type(send.message).__name__ for send in effects.sends}
        kinds.add(type(after.role).__name__)
        if type(after.role) is not type(before.role):
            kinds.add(f"{type(before.role).__name__}->{type(after.role).__name__}")
        if effects.fixed:
            kinds.add("fixed")
        if after.halted:
            kinds.add("halted")
        if after.chase != before.chase:
            kinds.add("chase")
        if after is before:
            kinds.add("nothing")
        seen.update(kinds)
        return after, effects

    def receive(
        self, before: st.State, sender: int, message: m.PeerMessage
    ) -> tuple[st.State, st.Effects]:
        return self.play(before, st.Receive(sender, 100 + sender, 4, message))

    def report(self, name: str, at_least: int, *wanted: str) -> None:
        print(f"\n{name}: {self.cases:,} cases", end="")
        missing = [word for word in wanted if not self.seen[word]]
        assert not missing, f"no case of {missing}; seen {dict(self.seen)}"
        assert self.cases >= at_least, "the product has shrunk"


# --- who is heard (R10) ---------------------------------------------------------------------

EVERY_MESSAGE: tuple[m.PeerMessage, ...] = (
    m.Poll(90, 10),
    m.PollAnswer(90, False, BEFORE, 10),
    m.Prepare(Ballot(1, 6, 3), 11),
    m.Promise(OWN, 11, 0, ()),
    m.Accept(Ballot(1, 6, 3), 11, (value("a"),), Tip(10, CHAIN, 11)),
    m.Accepted(OWN, 11, 13),
    m.Refused(OWN, Ballot(1, 7, 3), 12),
    m.Heartbeat(Ballot(1, 6, 3), 3, Tip(10, CHAIN, 11), 0),
    m.HeartbeatAck(OWN, 7, 11, 14, True),
    m.Fetch(Ballot(1, 5, 3), (Pairs(11, 11, BEFORE),)),
    m.Fetched(OWN, 11, BEFORE, (value("a"), value("b"))),
    m.HandOver(Ballot(1, 6, 3)),
    m.ChainReport(1024, CHAIN),
    m.Fenced(2, 5),
    m.CatchUp(11),
)


def test_admission():
    """Strangers, foreign incarnations and older boots: no message of theirs has any effect."""
    assert {type(each) for each in EVERY_MESSAGE} == set(m.PeerMessage.__args__)
    product = Product()
    for role, message, genesis in itertools.product(ROLES, EVERY_MESSAGE, (GENESIS, None)):
        before = state(role, journal=((11, BEFORE, "a"),), genesis=genesis)
        for sender, wrong, boot in itertools.product((1, 2, 3, 9), (0, 7), (0, 3, 4, 5)):
            event = st.Receive(sender, 100 + sender + wrong, boot, message)
            after, effects = product.play(before, event)
            strange = sender == 9 or (sender == ME and (wrong or boot != 4))
            if strange:
                assert after is before and effects == st.Effects()
            elif sender != ME and ((wrong and genesis) or boot < 4):
                assert after is before
                assert [type(each.message) for each in effects.sends] == [m.Fenced]
                assert effects.sends[0].to == sender and not effects.records and not effects.fixed
    product.report("Admission", 18_000, "Fenced", "nothing", "halted")


def test_a_halted_voter_takes_nothing():
    product = Product()
    for role, message in itertools.product(ROLES, EVERY_MESSAGE):
        before = state(role, halted="stopped")
        for sender in VOTERS:
            after, effects = product.receive(before, sender, message)
            assert after is before and effects == st.Effects()
        for event in (st.Tick(), st.Beat(), st.Propose((value("a"),)), st.StartHandOver(0)):
            after, effects = product.play(before, event)
            assert after is before and effects == st.Effects()
    product.report("Halted", 1_900, "nothing")


def test_fenced():
    product = Product()
    for before, genesis in itertools.product(
        worlds(), (GENESIS, None, Genesis(VOTERS, (101, 777, 103)))
    ):
        world = msgspec.structs.replace(before, genesis=genesis)
        for sender, reason, expected in itertools.product(
            (1, 3), (0, 1, 2, 3), (0, 3, 4, 5, 102, 777)
        ):
            product.receive(world, sender, m.Fenced(reason, expected))
    product.report("Fenced", 10_000, "nothing", "halted")


# --- pre-vote (R9) --------------------------------------------------------------------------


def test_poll():
    product = Product()
    for before, sender, attempt, fixed in itertools.product(worlds(), VOTERS, (0, 90), (9, 10, 11)):
        _, effects = product.receive(before, sender, m.Poll(attempt, fixed))
        assert not effects.records, "a poll changes nothing durable"
    product.report("Poll", 1_300, "PollAnswer")


def test_poll_answer():
    product = Product()
    for quorum in QUORUMS:
        product.use(quorum)
        for before in worlds(ROLES if quorum is MAJORITY else FOLLOWERS[4:6]):
            for sender, attempt, hears, highest, fixed in itertools.product(
                (1, 3),
                (89, 90, 91),
                (True, False),
                (NO_BALLOT, Ballot(1, 5, 3), Ballot(1, 8, 1), Ballot(2, 1, 3), OLDER),
                (9, 10, 12),
            ):
                message = m.PollAnswer(attempt, hears, highest, fixed)
                after, effects = product.receive(before, sender, message)
                if any(isinstance(each.message, m.Prepare) for each in effects.sends):
                    assert after.promised > highest, "R1: above all heard of, whatever the era"
    product.report(
        "PollAnswer", 24_000, "Polling->Candidate", "Prepare", "PromiseRecord", "nothing", "chase"
    )


# --- phase 1 (R2, R3) -----------------------------------------------------------------------


def test_prepare():
    product = Product()
    for before in worlds(promises=(OWN, Ballot(1, 5, 1), THEIRS)):
        for voter in VOTERS:
            for ballot, first, mismatch in itertools.product(
                ballots(before.promised, voter), some((9, 10, 11, 12, 14), (1, 13)), (False, True)
            ):
                sender = voter % 3 + 1 if mismatch else voter
                after, effects = product.receive(before, sender, m.Prepare(ballot, first))
                promised = any(isinstance(each.message, m.Promise) for each in effects.sends)
                may = not mismatch and ballot >= before.promised and first > before.fixed
                assert promised == may
                assert after.promised == (max(ballot, before.promised) if may else before.promised)
    every_other = tuple(
        Run(slot, (BEFORE, OLDER)[slot % 2], (value("a"),)) for slot in range(11, 111)
    )
    for first, top in itertools.product((9, 11, 12, 50, 51, 70, 71, 111), (50, 51, 90, 91, 110)):
        before = state(FOLLOWERS[0], accepted=up_to(every_other, top))
        product.receive(before, 3, m.Prepare(Ballot(1, 6, 3), first))
    product.report(
        "Prepare",
        25_000,
        "Promise",
        "Refused",
        "PromiseRecord",
        "Leader->Follower",
        "Candidate->Follower",
        "Polling->Follower",
        "nothing",
    )


def up_to(held: tuple[Run, ...], top: int) -> tuple[Run, ...]:
    return tuple(run for run in held if run.last <= top)


def promises(first: int) -> Iterator[tuple[int, int, tuple[Pairs, ...]]]:
    """(first, last, pairs): whole, in part, malformed."""
    high = Ballot(1, 4, 9)
    for named in some(
        (
            (),
            (Pairs(11, 11, BEFORE),),
            (Pairs(11, 12, OLDER), Pairs(13, 13, BEFORE)),
            (Pairs(12, 13, high),),
            (Pairs(11, 11, OLDER), Pairs(13, 13, BEFORE)),
        ),
        ((Pairs(11, 13, high),), (Pairs(11, 11, OLDER),), (Pairs(13, 13, BEFORE),)),
    ):
        above = tuple(pair for pair in named if pair.first >= first)
        yield first, 0, above
        yield first, 13, above
    yield 12, 0, (Pairs(12, 12, BEFORE),)
    yield 14, 0, ()
    yield 11, 0, (Pairs(12, 11, BEFORE),)  # ends before it begins
    yield 12, 0, (Pairs(11, 12, BEFORE),)  # begins below what it covers
    yield 11, 12, (Pairs(12, 13, BEFORE),)  # ends above what it covers


STANDING: tuple[RoleCase, ...] = (
    *CANDIDATES,
    ("two parts missing the top", candidate(part(1, last=12), part(3, first=13)), {}, None),
    (
        "a value fetched",
        candidate(
            part(1, (11, 12, BEFORE)),
            plan=((11, 12, BEFORE),),
            fetched=(Run(11, BEFORE, (value("a"),)),),
        ),
        {},
        None,
    ),
    ("own promise first", candidate(part(2, (11, 11, BEFORE))), {}, ((11, BEFORE, "a"),)),
    (
        "another life of its sender",
        candidate(Part(3, 999, ((11, 0),), ((11, 11, BEFORE),))),
        {},
        None,
    ),
)


def test_promise():
    product = Product()
    for quorum in QUORUMS:
        product.use(quorum)
        for before in worlds((*STANDING, FOLLOWERS[0], FOLLOWERS[4], LEADERS[1])):
            for sender, (first, last, named) in itertools.product(VOTERS, promises(11)):
                message = m.Promise(OWN, first, last, named)
                product.receive(before, sender, message)
        product.use(MAJORITY)
    for before in worlds():
        for sender, ballot in itertools.product(VOTERS, OTHERS):
            message = m.Promise(ballot, 11, 0, (Pairs(11, 11, BEFORE),))
            after, effects = product.receive(before, sender, message)
            assert after is before and effects == st.Effects(), "D2: only of this very ballot"
    product.report(
        "Promise",
        12_000,
        "Candidate->Leader",
        "Fetch",
        "Accept",
        "Accepted",
        "AcceptRecord",
        "Heartbeat",
        "nothing",
    )


def test_promise_of_the_first_election():
    """R10: slot 1 needs every voter, whatever the quorums are, and records all incarnations."""
    product = Product()
    low = Ballot(0, 3, 1)
    for quorum in QUORUMS:
        product.use(quorum)
        for known in itertools.product((None, (), ((1, 1, low),), ((2, 2, low),)), repeat=3):
            parts = tuple(
                part(voter, *named, first=1)
                for voter, named in zip(VOTERS, known, strict=True)
                if named is not None
            )
            role: RoleCase = ("first", candidate(*parts, fixed=0), {}, None)
            before = state(role, fixed=0, chain=bytes(32), genesis=None)
            for sender, incarnation, named in itertools.product(
                VOTERS, (0, 50), ((), (Pairs(1, 1, low),))
            ):
                if sender == ME and incarnation:
                    continue
                event = st.Receive(
                    sender, 100 + sender + incarnation, 4, m.Promise(OWN, 1, 0, named)
                )
                after, _ = product.play(before, event)
                told = {p.voter for p in parts} | {sender}
                if isinstance(after.role, Leader):
                    assert told == set(VOTERS)
                    assert after.accepted[0].first == 1
    product.report("Promise, slot 1", 3_800, "Candidate->Leader", "Fetch", "AcceptRecord")


def test_refused():
    product = Product()
    for before in worlds():
        for sender, ballot, promised, fixed in itertools.product(
            VOTERS,
            (OWN, *OTHERS),
            (NO_BALLOT, BEFORE, OWN, Ballot(1, 5, 3), Ballot(1, 9, 1), Ballot(2, 1, 1)),
            (9, 10, 11, 13),
        ):
            after, _ = product.receive(before, sender, m.Refused(ballot, promised, fixed))
            if isinstance(after.role, Candidate) and isinstance(before.role, Leader):
                assert after.promised > promised, "R1: above all heard of, whatever the era"
    product.report(
        "Refused",
        26_000,
        "Leader->Follower",
        "Leader->Candidate",
        "Candidate->Follower",
        "chase",
        "nothing",
    )


def test_fetch():
    product = Product()
    wants = some(
        (
            (Pairs(11, 11, BEFORE),),
            (Pairs(11, 13, BEFORE),),
            (Pairs(12, 12, OLDER), Pairs(13, 13, BEFORE)),
            (Pairs(10, 11, BEFORE),),
            (Pairs(11, 11, BEFORE), Pairs(9, 9, BEFORE)),
            (Pairs(11, 12, OWN),),
            (),
        ),
        ((Pairs(11, 11, OLDER),), (Pairs(14, 20, BEFORE),)),
    )
    for before in worlds(promises=(OWN, THEIRS)):
        for voter in VOTERS:
            for ballot, mismatch, wanted in itertools.product(
                ballots(before.promised, voter), (False, True), wants
            ):
                sender = voter % 3 + 1 if mismatch else voter
                after, effects = product.receive(before, sender, m.Fetch(ballot, wanted))
                assert not effects.records and not effects.fixed
                assert after is before, "to be asked changes nothing"
    product.report("Fetch", 25_000, "Fetched", "Refused", "nothing")


def test_fetched():
    product = Product()
    lacking: tuple[RoleCase, ...] = (
        (
            "lacks two",
            candidate(part(1, (11, 12, BEFORE)), part(3), plan=((11, 12, BEFORE),)),
            {},
            None,
        ),
        (
            "lacks one above a hole",
            candidate(part(1, (13, 13, OLDER)), part(3), plan=((13, 13, OLDER),)),
            {},
            None,
        ),
        (
            "lacks of two ballots",
            candidate(
                part(1, (11, 11, BEFORE), (12, 12, OLDER)),
                part(3),
                plan=((11, 11, BEFORE), (12, 12, OLDER)),
                fetched=(Run(12, OLDER, (value("o"),)),),
            ),
            {},
            None,
        ),
    )
    for before in worlds((*ROLES, *lacking)):
        for sender, ballot, first, at, count in itertools.product(
            (1, 3),
            (OWN, Ballot(1, 4, ME), Ballot(0, 5, ME)),
            (10, 11, 12, 13),
            (BEFORE, OLDER, OWN),
            some((0, 1, 2), (3,)),
        ):
            # (slot, ballot) names one value: what comes is what the journals hold there
            values = tuple(value("zabcde"[slot - FIXED]) for slot in range(first, first + count))
            product.receive(before, sender, m.Fetched(ballot, first, at, values))
    product.report("Fetched", 19_000, "Candidate->Leader", "AcceptRecord", "nothing")


# --- phase 2 (R4, R6) -----------------------------------------------------------------------


def tips(before: st.State, fixed: int = FIXED) -> tuple[Tip, ...]:
    """Below, at and above ``fixed``; with the chain of what is held and with another; counted by
    the leader itself, or not."""
    held = st.contiguous(before.accepted, fixed + 1, fixed + 3)
    out = [Tip(fixed - 1, b"\1" * 32, 5), Tip(fixed, before.chain, fixed + 1)]
    for count in some((1, 3), (2,)):
        slot = fixed + count
        good = chain_of(held[:count], before.chain, fixed) if len(held) >= count else b"\2" * 32
        out.extend(Tip(slot, chain, fixed + n) for chain in {good, b"\3" * 32} for n in (1, 2))
    return tuple(out)


def test_accept():
    product = Product()
    for before in worlds():
        held = {
            (run.first + n, run.ballot): each
            for run in before.accepted
            for n, each in enumerate(run.values)
        }
        announced = tips(before)
        for voter in VOTERS:
            for ballot, (first, count), tip in itertools.product(
                ballots(before.promised, voter),
                some(((9, 2), (10, 3), (11, 1), (11, 2), (12, 1)), ((11, 3), (14, 1), (10, 1))),
                announced,
            ):
                if voter == ME and not ballot < OWN:
                    continue  # it sends itself none, and nobody else has its ballots
                kind = (Kind.COMMAND, Kind.NOOP)[(first + count) % 2]
                values = tuple(
                    held.get((slot, ballot), value(f"new{slot}", kind))
                    for slot in range(first, first + count)
                )
                after, effects = product.receive(
                    before, voter, m.Accept(ballot, first, values, tip)
                )
                assert ballot >= before.promised or not effects.records
                assert after.promised >= before.promised
        for sender in (1, 3):  # not the ballot's voter, or nothing in it
            for ballot, values in (
                (Ballot(1, 6, 4 - sender), (value("a"),)),
                (Ballot(1, 6, sender), ()),
            ):
                message = m.Accept(ballot, 11, values, Tip(11, b"\3" * 32, 11))
                after, effects = product.receive(before, sender, message)
                assert after is before and effects == st.Effects()
    product.report(
        "Accept",
        44_000,
        "AcceptRecord",
        "PromiseRecord",
        "FixedRecord",
        "Accepted",
        "Refused",
        "fixed",
        "chase",
        "Leader->Follower",
        "Candidate->Follower",
        "Polling->Follower",
        "nothing",
    )


@pytest.mark.parametrize("kind", [Kind.GENESIS, Kind.COMMAND, Kind.NOOP])
def test_accept_of_slot_1(kind):
    """The first slots of a cluster: the genesis is learned when slot 1 is fixed, by any way."""
    product = Product()
    first = value("g", kind)
    for accepted, ballot, tip_fixed, slot in itertools.product(
        ((), (Run(1, BEFORE, (first,)),), (Run(1, Ballot(1, 5, 3), (first,)),)),
        (Ballot(1, 5, 3), Ballot(1, 6, 1)),
        (0, 1, 2),
        (1, 2),
    ):
        before = st.State(
            promised=Ballot(1, 5, 3),
            fixed=0,
            chain=bytes(32),
            accepted=accepted,
            genesis=None,
            tick=TICK,
            deadline=130,
        )
        chain = chain_of((first, first)[:tip_fixed], bytes(32), 0)
        for tip in (Tip(tip_fixed, chain, 1), Tip(tip_fixed, b"\5" * 32, 1)):
            message = m.Accept(ballot, slot, (first,), tip)
            after, _ = product.receive(before, ballot.voter, message)
            if after.fixed and kind == Kind.GENESIS:
                assert after.genesis == GENESIS
    product.report(f"Accept of slot 1, kind {kind}", 72, "fixed", "AcceptRecord")


COUNTING: tuple[RoleCase, ...] = (
    *LEADERS,
    (
        "three runs",
        leader(flight(11, 11, 2), flight(12, 12), flight(13, 13, 1, 2)),
        {"leader": OWN},
        IN_FLIGHT,
    ),
    ("one run of three", leader(flight(11, 13)), {"leader": OWN}, IN_FLIGHT),
)


def test_accepted():
    product = Product()
    for quorum in QUORUMS:
        product.use(quorum)
        for before in worlds((*COUNTING, CANDIDATES[1], FOLLOWERS[0], FOLLOWERS[4])):
            flights = before.role.flights if isinstance(before.role, Leader) else ()
            if flights and quorum.accepted_by(flights[0].votes):
                continue  # it would be fixed
            for sender, ballot, first, last in itertools.product(
                VOTERS,
                (OWN, *(OTHERS if quorum is MAJORITY else ())),
                (9, 11, 12, 13),
                (10, 11, 12, 13, 15),
            ):
                after, effects = product.receive(before, sender, m.Accepted(ballot, first, last))
                assert ballot == OWN or (after is before and effects == st.Effects())
    product.report("Accepted", 15_000, "FixedRecord", "fixed", "nothing")


def many_runs(count: int) -> st.State:
    """A leader with ``count`` slots in flight, each a run of its own, sent one tick after another
    and all due again."""
    held = tuple((slot, OWN, "a") for slot in range(11, 11 + count))
    flights = (flight(slot, slot, 1, sent=slot - 11) for slot in range(11, 11 + count))
    return state(("many runs", leader(*flights, quorum_tick=95), {}, held))


def test_propose():
    product = Product()
    a = value("a")
    full = leader(
        Flight(11, 10 + m.WINDOW_SLOTS_MAX - 2, (), 95, 10), next_slot=11 + m.WINDOW_SLOTS_MAX - 2
    )
    for quorum in QUORUMS[:3]:
        product.use(quorum)
        for before in worlds():
            for values in ((), (a,), (a, value("n", Kind.NOOP)), (a,) * (m.RUN_SLOTS_MAX + 1)):
                product.play(before, st.Propose(values))
    many = tuple(a for _ in range(m.WINDOW_SLOTS_MAX - 2))
    before = st.State(OWN, FIXED, CHAIN, (Run(11, OWN, many),), GENESIS, full, TICK)
    for count, taken in ((0, False), (1, True), (2, True), (3, False)):
        _, effects = product.play(before, st.Propose((a,) * count))
        assert bool(effects.records) == taken, "all of them or none, within the window"
    for count in (62, 63, 64, 65):
        _, effects = product.play(many_runs(count), st.Propose((a,)))
        assert bool(effects.records) == (count < 64), "runs in flight are bounded"
    large = bytes(m.RUN_BYTES_MAX // 2)
    for sizes in ((1, 1, 1), (1, 2, 1), (3, 1), (1, 1), (2,), (2, 2)):
        values = tuple(a + large * size for size in sizes)
        _, effects = product.play(state(LEADERS[0]), st.Propose(values))
        for record in effects.records:
            assert isinstance(record, st.AcceptRecord)
            size = sum(map(len, record.values))
            assert size <= m.RUN_BYTES_MAX or len(record.values) == 1, "a run is bounded"
    product.report("Propose", 800, "AcceptRecord", "Accept", "Accepted", "nothing")


# --- leader and followers (R7, R9) ----------------------------------------------------------


def test_heartbeat():
    product = Product()
    for before in worlds():
        announced = tips(before)
        for voter in VOTERS:
            for ballot, tip, age in itertools.product(
                ballots(before.promised, voter), announced, some((0, 24, 25), (90,))
            ):
                if voter == ME and not ballot < OWN:
                    continue
                _, effects = product.receive(before, voter, m.Heartbeat(ballot, 4, tip, age))
                kinds = {type(record) for record in effects.records}
                assert kinds <= {st.FixedRecord}, "a heartbeat is no promise and no accept"
        message = m.Heartbeat(Ballot(1, 6, 1), 4, announced[-1], 0)
        after, effects = product.receive(before, 3, message)
        assert after is before and effects == st.Effects(), "not the ballot's voter"
    product.report(
        "Heartbeat",
        26_000,
        "HeartbeatAck",
        "Refused",
        "FixedRecord",
        "fixed",
        "chase",
        "Leader->Follower",
        "Candidate->Follower",
        "Polling->Follower",
        "nothing",
    )


def test_heartbeat_ack():
    product = Product()
    for quorum in QUORUMS:
        product.use(quorum)
        for before in worlds((*COUNTING, CANDIDATES[1], FOLLOWERS[0], FOLLOWERS[4])):
            for sender, ballot, beat, fixed, last, has_room in itertools.product(
                (1, 3),
                (OWN, *(OTHERS if quorum is MAJORITY else ())),
                (4, 5, 6, 7, 8),
                (9, 10, 12),
                (10, 13, 16),
                some((True,), (False,)),
            ):
                message = m.HeartbeatAck(ballot, beat, fixed, last, has_room)
                product.receive(before, sender, message)
    product.report(
        "HeartbeatAck", 24_000, "AcceptRecord", "HandOver", "Heartbeat", "chase", "nothing"
    )


def test_beat():
    product = Product()
    for quorum in QUORUMS:
        product.use(quorum)
        for before in worlds():
            product.play(before, st.Beat())
    product.report("Beat", 400, "Heartbeat", "nothing")


# --- handover -------------------------------------------------------------------------------


def test_hand_over():
    product = Product()
    for before in worlds(promises=(OWN, Ballot(1, 5, 1), THEIRS)):
        for voter in VOTERS:
            for ballot, mismatch in itertools.product(
                ballots(before.promised, voter), (False, True)
            ):
                sender = voter % 3 + 1 if mismatch else voter
                after, effects = product.receive(before, sender, m.HandOver(ballot))
                if effects.sends:
                    assert after.promised > ballot and after.promised > before.promised
    product.report(
        "HandOver", 5_000, "Follower->Candidate", "Polling->Candidate", "Prepare", "nothing"
    )


def test_start_hand_over():
    product = Product()
    acks = [
        (Ack(1, 7, fixed_1, last_1, room_1, tick_1), Ack(3, 7, 10, last_3, room_3, 95))
        for fixed_1, last_1, room_1, tick_1, last_3, room_3 in itertools.product(
            (9, 10), (10, 12), (True, False), (91, 92, 99), (10, 12), (True, False)
        )
    ]
    idle: list[RoleCase] = [
        ("acks", leader(*flights, acks=pair, announced=announced), {}, journal)
        for pair in [(), *acks]
        for announced in (9, 10)
        for flights, journal in (((), ()), ((flight(11, 11, 2),), IN_FLIGHT[:1]))
    ]
    for before, to in itertools.product(worlds((*ROLES, *idle)), (0, 1, 2, 3, 9)):
        product.play(before, st.StartHandOver(to))
    for before, has_room in itertools.product(worlds((*ROLES, *idle)), (True, False)):
        product.play(before, st.DiskRoom(has_room))
    product.report("StartHandOver, DiskRoom", 3_000, "HandOver", "Heartbeat", "nothing")


# --- catch-up (R8) --------------------------------------------------------------------------

CHASES = (
    None,
    st.Chase(0, 1, 12, 0, 101),
    st.Chase(1, 1, 12, 1, 400),
    st.Chase(3, 1, 14, 2, 400),
    st.Chase(3, 3, 11, 5, 400),
)


def with_chases(roles: Iterable[RoleCase] = ROLES) -> Iterator[st.State]:
    for before, chase in itertools.product(worlds(roles), CHASES):
        yield msgspec.structs.replace(before, chase=chase)


LEARNERS: tuple[RoleCase, ...] = (
    *ROLES,
    (
        "leader, open above what is learned",
        leader(flight(11, 12), flight(13, 13, 1, 3)),
        {},
        IN_FLIGHT,
    ),
)


def test_learn():
    product = Product()
    own = {name: value(name) for name in "abc"}
    old = value("old")
    before_10 = b"\7" * 32
    chain_10 = chain_over(before_10, 10, old)
    for world in with_chases(LEARNERS):
        before = msgspec.structs.replace(world, chain=chain_10)
        held = st.contiguous(before.accepted, 11, 13)
        fresh = held if isinstance(before.role, Leader) and held else tuple(own.values())
        for voter, (first, chain, values), tip in itertools.product(
            (1, 3),
            (
                (11, chain_10, ()),
                (11, chain_10, fresh[:1]),
                (11, chain_10, fresh),
                (11, b"\4" * 32, fresh),
                (10, before_10, (old,)),
                (10, before_10, (old, *fresh[:2])),
                (10, before_10, (own["a"], *fresh[:2])),
                (12, chain_10, fresh[:1]),
                (0, bytes(32), (old,) * 12),
            ),
            (11, 20),
        ):
            after, effects = product.play(before, st.Learn(voter, first, chain, values, tip))
            accepts = [r for r in effects.records if isinstance(r, st.AcceptRecord)]
            assert not accepts, "R8: what is learned is no accept"
            assert after.promised == before.promised, "R8: nothing reads a ballot from it"
    product.report(
        "Learn", 13_000, "LearnedRecord", "fixed", "CatchUp", "Prepare", "chase", "nothing"
    )


def test_install():
    product = Product()
    foreign = Genesis(VOTERS, (101, 777, 103))
    others = Genesis((2, 3, 4), (102, 103, 104))
    for quorum in QUORUMS[::3]:
        product.use(quorum)
        for before, slot, genesis in itertools.product(
            with_chases(LEARNERS), (9, 10, 11, 12, 13, 20), (GENESIS, foreign, others)
        ):
            product.play(before, st.Install(slot, b"\6" * 32, genesis))
    product.report(
        "Install", 13_000, "InstallRecord", "CatchUp", "Prepare", "halted", "FixedRecord", "nothing"
    )


def test_catch_up_failed():
    product = Product()
    for before, voter in itertools.product(with_chases(), (0, 1, 3)):
        product.play(before, st.CatchUpFailed(voter))
    product.report("CatchUpFailed", 1_000, "chase", "nothing")


# --- chain check ----------------------------------------------------------------------------


def test_chain_report():
    product = Product()
    mine, other, third = b"\1" * 32, b"\2" * 32, b"\3" * 32
    told = [
        tuple((voter, *each) for voter, each in zip((1, 3), pair, strict=True) if each)
        for pair in itertools.product((None, (1024, mine), (1024, other), (2048, other)), repeat=2)
    ]
    for role, marks, reports in itertools.product(
        ROLES, ((), ((1024, mine),), ((1024, mine), (2048, mine))), told
    ):
        before = state(role, chain_marks=marks, chain_reports=reports)
        for sender, slot, chain in itertools.product(
            (1, 3), (1024, 2048, 3072), (mine, other, third)
        ):
            product.receive(before, sender, m.ChainReport(slot, chain))
    product.report("ChainReport", 16_000, "halted")


def test_the_chain_is_told_at_its_marks():
    """A fixed slot at a multiple of CHAIN_CHECK_SLOTS, by each way a slot is fixed."""
    product = Product()
    fixed = m.CHAIN_CHECK_SLOTS - 2
    values = tuple(value(name) for name in "pqr")
    marks = tuple((n * m.CHAIN_CHECK_SLOTS * -1, b"\1" * 32) for n in (4, 3, 2, 1))
    last = chain_of(values, CHAIN, fixed)
    for count, reports, old in itertools.product(
        (1, 2, 3),
        ((), ((1, fixed + 2, b"\2" * 32), (3, fixed + 2, b"\2" * 32))),
        ((), marks),
    ):
        follower = st.State(
            OWN, fixed, CHAIN, (Run(fixed + 1, OWN, values),), GENESIS, tick=TICK, deadline=130
        )
        leading = msgspec.structs.replace(
            follower, role=leader(flight(fixed + 1, fixed + 3, 2), fixed=fixed)
        )
        for world, event in (
            (leading, st.Receive(1, 101, 4, m.Accepted(OWN, fixed + 1, fixed + count))),
            (follower, st.Learn(1, fixed + 1, CHAIN, values[:count], fixed + 9)),
            (
                follower,
                st.Receive(
                    3,
                    103,
                    4,
                    m.Heartbeat(Ballot(1, 7, 3), 1, Tip(fixed + 3, last, fixed + 1), 0),
                ),
            ),
        ):
            before = msgspec.structs.replace(world, chain_reports=reports, chain_marks=old)
            product.play(before, event)
    product.report("Chain marks", 36, "ChainReport", "fixed", "halted")


# --- time (R9) ------------------------------------------------------------------------------


def test_tick():
    product = Product()
    waiting: list[RoleCase] = [
        (
            "candidate",
            candidate(
                *parts,
                since_tick=TICK + 1 - waited,
                plan=plan,
                fetch_tick=TICK + 1 - fetching,
                silent=silent,
            ),
            {"attempt": attempt},
            None,
        )
        for waited, attempt, fetching, silent in itertools.product(
            (4, 5, 8, 24, 25, 49, 50, 199, 200), (0, 1, 5), (4, 8), ((), (3,))
        )
        for parts, plan in (
            ((), None),
            ((part(1, last=12), part(3)), None),
            ((part(1, (11, 12, BEFORE)), part(3)), ((11, 12, BEFORE),)),
            ((part(1, (11, 12, BEFORE)), part(2), part(3)), ((11, 12, BEFORE),)),
        )
        if not (silent and plan)
    ]
    leading: list[RoleCase] = [
        (
            "leader",
            leader(
                *flights,
                quorum_tick=quorum_tick,
                beat_ticks=beat_ticks,
                beat=7,
                beat_acked=5 if beat_ticks else 7,
                announced=announced,
                handover=handover,
            ),
            {"has_room": has_room},
            journal,
        )
        for quorum_tick, beat_ticks, announced, handover, has_room in itertools.product(
            (75, 76, 95),
            ((), ((6, 93), (7, 96)), ((6, 97), (7, 98))),
            (9, 10),
            (None, (1, 101), (1, 102), (3, 150)),
            (True, False),
        )
        for flights, journal in (
            ((), ()),
            ((flight(11, 12, 2, sent=97), flight(13, 13, 1, sent=98)), IN_FLIGHT),
        )
    ]
    for quorum in QUORUMS[: 6 if WIDE else 4]:
        product.use(quorum)
        for before in worlds((*ROLES, *waiting, *leading)):
            product.play(before, st.Tick())
        for before in worlds(FOLLOWERS):
            product.play(msgspec.structs.replace(before, deadline=TICK), st.Tick())
    product.use(MAJORITY)
    for count in (1, 7, 8, 9, 70):
        product.play(many_runs(count), st.Tick())
    for before, deadline, tick in itertools.product(
        with_chases(ROLES), (0, 100, 101, 102, 51, 52), (TICK, 199, 399, 400)
    ):
        product.play(msgspec.structs.replace(before, deadline=deadline, tick=tick), st.Tick())
    acks = (Ack(1, 7, 10, 10, True, 198), Ack(3, 7, 10, 10, False, 198))
    for quorum_tick, has_room, tick in itertools.product((190, 198), (True, False), (198, 199)):
        role: RoleCase = (
            "leader",
            leader(quorum_tick=quorum_tick, beat_ticks=((7, 198),), acks=acks),
            {"has_room": has_room, "tick": tick},
            (),
        )
        after, _ = product.play(state(role), st.Tick())
        assert isinstance(after.role, Leader)
        asked = after.role.handover is not None
        assert asked == (not has_room and tick == 199), "who has no room tries again, now and then"
    product.report(
        "Tick",
        18_000,
        "Follower->Polling",
        "Follower->Candidate",
        "Candidate->Follower",
        "Candidate->Leader",
        "Leader->Follower",
        "Prepare",
        "Poll",
        "Accept",
        "Accepted",
        "Heartbeat",
        "HandOver",
        "CatchUp",
    )


# --- other sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quorum",
    [
        majority(2),
        majority(1, 2),
        majority(1, 2, 3, 4),
        Quorum("even, flexible", ((1, 1), (2, 1), (3, 1), (4, 1)), 3, 2),
        majority(1, 2, 3, 4, 5),
        Quorum("five, weighted", ((1, 3), (2, 1), (3, 1), (4, 1), (5, 1)), 4, 4),
        majority(*range(1, 7)),
        Quorum("even, flexible", tuple((v, 1) for v in range(1, 7)), 4, 3),
        majority(*range(1, 8)),
        Quorum("seven, flexible", tuple((v, 1) for v in range(1, 8)), 5, 3),
    ],
    ids=lambda quorum: f"{len(quorum.weights)} {quorum.name}",
)
def test_votes_of_other_sizes(quorum):
    """Who answered before, each subset, and who answers now: the poll, the promises, the accepts
    and the heartbeat rounds of clusters of 1, 2 and 4 to 7 (3 are the rest of this file)."""
    voters = tuple(voter for voter, _ in quorum.weights)
    genesis = Genesis(voters, tuple(100 + voter for voter in voters))
    product = Product()
    product.use(quorum, voters)
    others = [voter for voter in voters if voter != ME]
    base = st.State(OWN, FIXED, CHAIN, (), genesis, tick=TICK, deadline=130)
    held = (Run(11, OWN, (value("p"), value("q"))),)

    def with_role(role: st.Role, accepted: tuple[Run, ...] = ()) -> st.State:
        return msgspec.structs.replace(base, role=role, accepted=accepted)

    for size in range(len(voters) + 1):
        for before in itertools.combinations(voters, size):
            polled = Polling(90, ((ME, False), *((v, False) for v in before if v > ME)), OWN)
            standing = candidate(*(part(v) for v in before))
            leading = leader(flight(11, 12, *before))
            beating = leader(
                acks=tuple(Ack(v, 6, 10, 10, True, 95) for v in before if v != ME), beat_acked=5
            )
            for sender in voters:
                done = [with_role(standing), m.Promise(OWN, 11, 0, ())]
                after, _ = product.receive(done[0], sender, done[1])
                if quorum.promised_by(before):  # would have been complete before
                    continue
                assert isinstance(after.role, Leader) == quorum.promised_by({*before, sender})
                if sender not in before and not quorum.accepted_by(before):
                    after, _ = product.receive(
                        with_role(leading, held), sender, m.Accepted(OWN, 11, 12)
                    )
                    assert (after.fixed == 12) == quorum.accepted_by({*before, sender})
                if sender != ME:
                    product.receive(with_role(polled), sender, m.PollAnswer(90, False, OWN, 10))
                    product.receive(
                        with_role(beating), sender, m.HeartbeatAck(OWN, 7, 10, 10, True)
                    )
    product.play(msgspec.structs.replace(base, deadline=101), st.Tick())
    product.play(with_role(leader()), st.Beat())
    product.play(msgspec.structs.replace(base, chase=st.Chase(0, 9, 12, 0, 101)), st.Tick())
    product.report(f"{quorum.name} of {len(voters)}", 5 if others else 3, "Candidate->Leader")
