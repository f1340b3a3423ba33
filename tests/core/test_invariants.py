"""Each invariant fires: a good step, spoiled in one way at a time, is refused in its own words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trex_core import messages as m
from trex_core import state as st
from trex_core.invariants import InvariantViolation, check_step
from trex_core.messages import Ballot, Genesis, Kind, Pairs, Tip, Value, encode_value
from trex_core.paxos import step
from trex_core.state import Config, Effects, Run, Send, State

CONFIG = Config(2, (1, 2, 3), 102, 4)
OWN, OLD, NEW, FOREIGN = Ballot(0, 5, 2), Ballot(0, 4, 3), Ballot(0, 6, 3), Ballot(0, 6, 1)
CHAIN = bytes(range(32))
GENESIS = Genesis((1, 2, 3), (101, 102, 103))
A, B = (encode_value(Value(Kind.COMMAND, OLD, command=name)) for name in (b"a", b"b"))
CHAINS = st.chain_run(CHAIN, 11, (A, B))
TIP = Tip(10, CHAIN, 11)

FOLLOWER = State(OWN, 10, CHAIN, (Run(11, OLD, (A, B)),), GENESIS, tick=100, boots=((1, 4), (3, 4)))
CANDIDATE = msgspec.structs.replace(FOLLOWER, role=st.Candidate(OWN, 11, 95, (), (), None, (), 95))
LEADER = msgspec.structs.replace(
    FOLLOWER,
    accepted=(Run(11, OWN, (A, B)),),
    role=st.Leader(
        OWN, 11, 13, 11, (st.Flight(11, 12, (2,), 95, 9),), 3, ((3, 98),), (), 2, 97, 50, 10
    ),
)


def received(sender: int, message: m.PeerMessage) -> st.Receive:
    return st.Receive(sender, 100 + sender, 4, message)


ACCEPT = (FOLLOWER, received(3, m.Accept(NEW, 11, (A,), TIP)))
PREPARE = (FOLLOWER, received(3, m.Prepare(NEW, 11)))
ACCEPTED = (LEADER, received(3, m.Accepted(OWN, 11, 12)))
LEARN = (FOLLOWER, st.Learn(1, 11, CHAIN, (A, B), 12))
INSTALL = (FOLLOWER, st.Install(20, b"\1" * 32, GENESIS))
PROPOSE = (LEADER, st.Propose((B,)))
HAND_OVER = (FOLLOWER, received(1, m.HandOver(FOREIGN)))
BEAT = (LEADER, st.Beat())
FETCH = (FOLLOWER, received(1, m.Poll(1, 10)))
GOOD = (ACCEPT, PREPARE, ACCEPTED, LEARN, INSTALL, PROPOSE, HAND_OVER, BEAT, FETCH)


def state(**changes: Any) -> Any:
    """The state after, with these fields instead."""
    return lambda before, after, effects: (
        before,
        msgspec.structs.replace(after, **changes),
        effects,
    )


def role(**changes: Any) -> Any:
    """The role after, with these fields instead."""

    def spoil(before: State, after: State, effects: Effects) -> tuple[State, State, Effects]:
        changed = msgspec.structs.replace(after.role, **changes)
        return before, msgspec.structs.replace(after, role=changed), effects

    return spoil


def effect(**changes: Any) -> Any:
    """The effects, with these instead."""
    return lambda before, after, effects: (
        before,
        after,
        msgspec.structs.replace(effects, **changes),
    )


def also(message: m.PeerMessage) -> Any:
    """One message more."""
    return lambda before, after, effects: (
        before,
        after,
        msgspec.structs.replace(effects, sends=(*effects.sends, Send(1, message))),
    )


def first_run(**changes: Any) -> Any:
    """The first fixed run, with these fields instead."""

    def spoil(before: State, after: State, effects: Effects) -> tuple[State, State, Effects]:
        head = msgspec.structs.replace(effects.fixed[0], **changes)
        return before, after, msgspec.structs.replace(effects, fixed=(head, *effects.fixed[1:]))

    return spoil


def unchanged(before: State, _after: State, effects: Effects) -> tuple[State, State, Effects]:
    return before, before, effects


def was(**changes: Any) -> Any:
    """The state before, with these fields instead."""
    return lambda before, after, effects: (
        msgspec.structs.replace(before, **changes),
        after,
        effects,
    )


Spoiled = tuple[tuple[State, st.Event], Any, str]

SPOILED: tuple[Spoiled, ...] = (
    (ACCEPT, unchanged, "a step without change"),
    (PREPARE, state(promised=OLD), "I2: the promise never decreases"),
    (ACCEPT, state(promised=Ballot(0, 7, 3)), "I3: only Prepare"),
    (BEAT, state(promised=Ballot(0, 7, 2)), "I3: only Prepare"),
    (
        (FOLLOWER, received(1, m.Prepare(NEW, 11))),
        state(promised=NEW),
        "I3: only Prepare",
    ),
    (PREPARE, effect(records=()), "I10: a promise is journalled"),
    (HAND_OVER, effect(records=()), "I10: a promise is journalled"),
    (FETCH, effect(fixed=(st.FixedRun(11, CHAIN, (A,), CHAINS[:1]),)), "a step without change"),
    (
        ACCEPT,
        effect(fixed=(st.FixedRun(11, CHAIN, (A,), CHAINS[:1]),)),
        "I5: nothing is delivered",
    ),
    (ACCEPT, state(chain=b"\2" * 32), "the chain moves with fixed only"),
    (ACCEPT, state(fixed=9), "I1: the fixed slot never goes back"),
    (INSTALL, effect(records=()), "I10: an installed snapshot is journalled"),
    (LEARN, first_run(first=12), "I1: fixed slots are delivered in order"),
    (LEARN, first_run(chain_before=b"\2" * 32), "the chain continues"),
    (LEARN, first_run(values=(A,)), "each fixed slot has its chain"),
    (LEARN, first_run(values=(), chains=()), "each fixed slot has its chain"),
    (LEARN, first_run(values=(A,), chains=CHAINS[:1]), "I5: the last delivered slot"),
    (LEARN, effect(fixed=()), "I5: the last delivered slot"),
    (LEARN, state(chain=b"\2" * 32), "the chain at the fixed slot"),
    (LEARN, effect(records=()), "I10: what is fixed is journalled"),
    (ACCEPTED, effect(records=()), "I10: what is fixed is journalled"),
    (ACCEPTED, effect(records=(st.FixedRecord(11, CHAINS[0]),)), "I10: what is fixed"),
    (ACCEPT, state(accepted=(Run(11, OLD, ()),)), "no run is empty"),
    (ACCEPT, state(accepted=(Run(10, OLD, (A,)),)), "accepted runs are above fixed"),
    (
        ACCEPT,
        state(accepted=(Run(12, OLD, (A,)), Run(12, OLD, (B,)))),
        "accepted runs are above fixed, ascending",
    ),
    (ACCEPT, state(accepted=(Run(11, Ballot(0, 7, 3), (A,)),)), "I6: an accept is a promise"),
    (ACCEPT, effect(records=(st.PromiseRecord(NEW),)), "I10: what is held"),
    (ACCEPT, state(accepted=(Run(11, NEW, (A,)),)), "I10: what is held"),
    (ACCEPT, state(accepted=FOLLOWER.accepted), "I10: what is held"),
    (PROPOSE, effect(records=()), "I10: what is held"),
    (LEARN, state(accepted=(Run(13, OLD, (A,)),)), "I10: what is held"),
    (PREPARE, state(accepted=()), "I10: what is held"),
    (PREPARE, state(role=LEADER.role), "who stands or leads has promised no higher"),
    (
        PREPARE,
        state(role=msgspec.structs.replace(CANDIDATE.role, ballot=NEW)),
        "I7: a ballot is used by its voter only",
    ),
    (PROPOSE, was(role=msgspec.structs.replace(LEADER.role, ballot=OLD)), "D1: a leader never"),
    (PROPOSE, was(role=st.Follower()), "a leader was candidate"),
    (
        PROPOSE,
        was(role=msgspec.structs.replace(CANDIDATE.role, ballot=Ballot(0, 4, 2))),
        "a leader was candidate",
    ),
    (PROPOSE, role(flights=(st.Flight(12, 13, (), 95, 9),)), "flights continue fixed"),
    (PROPOSE, role(next_slot=15), "flights end at the last proposed"),
    (FETCH, also(m.Accept(OLD, 11, (A,), TIP)), "only a leader sends Accept"),
    (BEAT, also(m.Accept(OLD, 11, (A,), TIP)), "only a leader sends Accept"),
    (BEAT, also(m.Accept(OWN, 11, (B,), TIP)), "a leader holds what it proposes"),
    (FETCH, also(m.Prepare(OWN, 11)), "R1: a Prepare's ballot is promised first"),
    (HAND_OVER, also(m.Prepare(Ballot(0, 9, 2), 11)), "R1: a Prepare's ballot"),
    (HAND_OVER, also(m.Prepare(Ballot(0, 7, 2), 0)), "slots start at 1"),
    (PREPARE, also(m.Promise(OWN, 11, 0, ())), "R2: a promise is of the promised"),
    (PREPARE, also(m.Promise(NEW, 11, 0, (Pairs(11, 13, OLD),))), "R2: a promise names exactly"),
    (PREPARE, also(m.Promise(NEW, 11, 0, (Pairs(11, 11, OWN),))), "R2: a promise names exactly"),
    (PREPARE, also(m.Promise(NEW, 11, 0, ())), "R2: a promise hides nothing"),
    (PREPARE, also(m.Promise(NEW, 11, 0, (Pairs(11, 11, OLD),))), "R2: a promise hides nothing"),
    (PREPARE, also(m.Promise(NEW, 11, 12, (Pairs(12, 12, OLD),))), "R2: a promise hides nothing"),
    (PREPARE, also(m.Accepted(Ballot(0, 7, 3), 11, 11)), "I6: nothing is accepted above"),
    (PREPARE, also(m.Accepted(OWN, 11, 11)), "R4: what is voted for is held"),
    (PREPARE, also(m.Accepted(OLD, 11, 13)), "R4: what is voted for is held"),
    (FETCH, also(m.Heartbeat(OWN, 1, TIP, 0)), "only who leads or stands speaks"),
    (BEAT, also(m.Fetch(OLD, ())), "only who leads or stands speaks"),
)


@pytest.mark.parametrize("case", GOOD)
def test_a_good_step_passes(case):
    before, event = case
    after, effects = step(CONFIG, before, event)
    check_step(CONFIG, before, event, after, effects)


@pytest.mark.parametrize(("case", "spoil", "words"), SPOILED)
def test_a_spoiled_step_is_refused(case, spoil, words):
    before, event = case
    after, effects = step(CONFIG, before, event)
    check_step(CONFIG, before, event, after, effects)
    before, after, effects = spoil(before, after, effects)
    with pytest.raises(InvariantViolation) as caught:
        check_step(CONFIG, before, event, after, effects)
    assert str(caught.value).startswith(words)


def test_what_is_already_fixed_may_be_proposed_again_and_voted_for():
    """Votes and Accepts for slots that were fixed meanwhile are no violation."""
    before, event = BEAT
    after, effects = step(CONFIG, before, event)
    for message in (m.Accept(OWN, 10, (A,), TIP), m.Accepted(OWN, 9, 10), m.Accepted(OWN, 9, 11)):
        more = msgspec.structs.replace(effects, sends=(*effects.sends, Send(1, message)))
        check_step(CONFIG, before, event, after, more)


def test_every_invariant_has_its_spoiled_step():
    """The words of ``invariants.py`` are those above: none is checked in vain."""
    import inspect
    import re

    from trex_core import invariants

    source = inspect.getsource(invariants)
    said = {
        "".join(words)
        for words in re.findall(r'_require\((?:[^"]|"(?=\b))*?"([^"]+)"', source, re.DOTALL)
    }
    assert len(said) >= 25
    unsaid = {each for each in said if not any(each.startswith(w) for _, _, w in SPOILED)}
    assert not unsaid
