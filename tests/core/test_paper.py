"""The rules of Paxos Made Simple that the code claims to follow, and the plan's own: one test each.

A test is a state, one or a few steps, and what must follow; its docstring says the rule and ends
with where it is written. A voter's single step is in the notation of ``tests/core/scenarios.py``
(voter 2 of 1, 2, 3, fixed up to slot 10, promised 5.1, unless it says otherwise); a history is
played around the table of ``tests/simulator``.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import trex_core
from tests.core.scenarios import play
from tests.simulator.schedules import begin
from tests.simulator.table import Table, of
from trex_core.messages import (
    WINDOW_SLOTS_MAX,
    Accept,
    Accepted,
    Ballot,
    Fetch,
    Genesis,
    HandOver,
    HeartbeatAck,
    Kind,
    Pairs,
    Poll,
    Prepare,
    Promise,
    Refused,
    Value,
    encode_value,
    value_kind,
)
from trex_core.paxos import highest_named, room, step
from trex_core.quorum import Majority, Tally
from trex_core.state import (
    AcceptRecord,
    Candidate,
    Config,
    Event,
    Follower,
    Learn,
    Part,
    Receive,
    first_state,
)


def one_step(given: dict[str, Any], when: dict[str, Any], *fields: str) -> SimpleNamespace:
    """What follows from one step, in the notation of the scenarios."""
    case = {"given": given, "when": when, "then": dict.fromkeys(fields)}
    return SimpleNamespace(**play(case))


def leading(**more: Any) -> dict[str, Any]:
    """Voter 2 leads under 6.2 and has proposed slots 11 and 12."""
    role = {"ballot": "6.2", "next_slot": 13, "flights": [[11, 11, []], [12, 12, []]], **more}
    return {"promised": "6.2", "accepted": [[11, "6.2", ["a", "b"]]], "role": {"leader": role}}


def standing(**more: Any) -> dict[str, Any]:
    """Voter 2 stands under 6.2 for all slots from 11."""
    return {"promised": "6.2", "role": {"candidate": {"ballot": "6.2", "first": 11, **more}}}


def kinds(sends: list[list[Any]]) -> set[str]:
    return {send[1] for send in sends}


# --- what an acceptor may do ----------------------------------------------------------------


def test_p1_the_first_proposal_received_is_accepted():
    """An acceptor must accept the first proposal that it receives. PMS §2.2 (P1)."""
    got = one_step(
        {"promised": "0.0"}, {"from": 1, "Accept": ["1.1", 11, ["a"], [10, "@10", 11]]}, "accepted"
    )
    assert got.then["accepted"] == [[11, "1.1", ["a"]]]
    assert got.sends == [[1, "Accepted", "1.1", 11, 11]]


@pytest.mark.parametrize(
    ("promised", "proposal", "accepts"),
    [
        ("5.1", "4.1", False),
        ("5.1", "4.3", False),
        ("5.1", "5.1", True),
        ("5.1", "5.3", True),
        ("5.3", "5.1", False),
        ("5.1", "6.1", True),
        ("1:5.1", "9.1", False),
        ("5.1", "1:1.1", True),
    ],
)
def test_p1a_accepted_unless_a_higher_prepare_was_answered(promised, proposal, accepts):
    """An acceptor can accept a proposal numbered n if and only if it has not responded to a prepare
    request having a number greater than n. PMS §2.2 (P1a)."""
    sender = int(proposal[-1])
    when = {"from": sender, "Accept": [proposal, 11, ["a"], [10, "@10", 11]]}
    got = one_step({"promised": promised}, when, "promised", "accepted")
    assert bool(got.records) == accepts
    assert kinds(got.sends) == ({"Accepted"} if accepts else {"Refused"})
    assert got.then["promised"] == (proposal if accepts else promised)


def test_p2b_a_chosen_value_is_proposed_by_every_higher_ballot():
    """If a proposal with value v is chosen, every higher-numbered proposal issued by any proposer
    has value v: the leader that got it chosen is gone and whoever leads next proposes it, in each
    cluster of 3 and with each pair that chose it. PMS §2.2 (P2b)."""
    for other, heir in itertools.permutations((2, 3)):
        table = begin()
        table.propose(1, "x")
        table.deliver(of(Accept, target=other))
        table.deliver(of(Accepted, target=1))
        assert table.names() == ["x"], "chosen"
        table.crash(1)
        table.elect(heir, among=(2, 3))
        again = [run for run in (table.seats[heir].disk) if isinstance(run, AcceptRecord)]
        table.settle(among=(2, 3))
        table.propose(heir, "y")
        table.settle(among=(2, 3))
        assert table.names()[0] == "x"
        assert [v for v in table.names() if v != "-"] == ["x", "y"]
        assert again[-1].ballot.voter == heir, "proposed anew, under the heir's ballot"


def test_p2c_the_highest_numbered_among_a_quorum():
    """There is a majority S such that v is the value of the highest-numbered proposal among all
    proposals numbered less than n accepted by S, or no acceptor in S has accepted any. Each slot by
    itself. PMS §2.2 (P2c)."""
    possible = (None, Ballot(0, 4, 1), Ballot(0, 4, 3), Ballot(0, 5, 1), Ballot(1, 1, 1))
    for held in itertools.product(possible, repeat=4):  # two voters, two slots
        parts = tuple(
            Part(
                voter,
                0,
                ((11, 0),),
                tuple(
                    (slot, slot, b) for slot, b in zip((11, 12), two, strict=True) if b is not None
                ),
            )
            for voter, two in ((1, held[:2]), (3, held[2:]))
        )
        plan = {
            slot: ballot
            for first, last, ballot in highest_named(parts, 11)
            for slot in range(first, last + 1)
        }
        for slot, named in ((11, held[0::2]), (12, held[1::2])):
            told = [ballot for ballot in named if ballot is not None]
            assert plan.get(slot) == (max(told) if told else None)


# --- phase 1 --------------------------------------------------------------------------------


def test_phase_1a_a_new_number_to_the_acceptors():
    """A proposer selects a proposal number n and sends a prepare request with number n to the
    acceptors; above every number it promised or heard of. PMS §2.2 phase 1(a)."""
    polling = {"polling": {"attempt": 100, "answers": [[2, False]], "highest": "7.3"}}
    got = one_step(
        {"role": polling}, {"from": 1, "PollAnswer": [100, False, "6.1", 10]}, "promised", "role"
    )
    assert got.then == {"promised": "8.2", "role": "candidate"}
    assert got.sends == [[voter, "Prepare", "8.2", 11] for voter in (1, 2, 3)]


def test_phase_1b_a_promise_with_the_highest_accepted():
    """If n is greater than that of any prepare request to which it has responded, it responds with
    a promise not to accept any more proposals numbered less than n and with the highest-numbered
    proposal that it has accepted. PMS §2.2 phase 1(b)."""
    held = [[11, "4.3", ["a"]], [12, "3.1", ["b"]]]
    got = one_step({"accepted": held}, {"from": 3, "Prepare": ["6.3", 11]}, "promised")
    assert got.records == [["PromiseRecord", "6.3"]]
    assert got.sends == [[3, "Promise", "6.3", 11, 0, [[11, 11, "4.3"], [12, 12, "3.1"]]]]
    assert got.then["promised"] == "6.3"


def test_phase_1b_a_lower_number_is_told_so():
    """An acceptor that ignores a prepare or accept request because it already received a prepare
    request with a higher number should inform the proposer. PMS §2.2 phase 1(b), §2.2 end."""
    for message in (["4.3", 11], ["4.3", 11, ["a"], [10, "@10", 11]]):
        kind = "Prepare" if len(message) == 2 else "Accept"
        got = one_step({}, {"from": 3, kind: message}, "promised", "accepted")
        assert got.sends == [[3, "Refused", "4.3", "5.1", 10]]
        assert not got.records and got.then == {"promised": "5.1", "accepted": []}


# --- phase 2 --------------------------------------------------------------------------------


def test_phase_2a_the_value_of_the_highest_numbered_answer():
    """If the proposer receives a response from a majority it sends an accept request with the value
    of the highest-numbered proposal among the responses. PMS §2.2 phase 2(a)."""
    given = {
        **standing(parts=[[1, [[11, 0]], [[11, 11, "3.1"]]]]),
        "accepted": [[11, "4.3", ["b"]]],
    }
    got = one_step(given, {"from": 2, "Promise": ["6.2", 11, 0, [[11, 11, "4.3"]]]}, "role")
    assert got.then["role"] == "leader"
    assert got.records == [["AcceptRecord", "6.2", 11, ["b"]]]
    assert [1, "Accept", "6.2", 11, ["b"], [10, "@10", 11]] in got.sends


def test_phase_2a_free_where_no_answer_names_a_value():
    """…or is any value if the responses reported no proposals. PMS §2.2 phase 2(a)."""
    got = one_step(
        standing(parts=[[1, [[11, 0]], []]]),
        {"from": 2, "Promise": ["6.2", 11, 0, []]},
        "role",
        "role.next_slot",
    )
    assert got.then == {"role": "leader", "role.next_slot": 11}
    assert not got.records, "slot 11 is free for a command"


def test_phase_2a_only_answers_to_this_very_number():
    """A response counts for the prepare request that it answers, and for no other. PMS §2.2 phase
    2(a) (defect D2)."""
    for ballot in ("5.2", "7.2", "1:6.2"):
        when = {"from": 3, "Promise": [ballot, 11, 0, []]}
        got = one_step(standing(parts=[[2, [[11, 0]], []]]), when, "role")
        assert got.then["role"] == "candidate" and not got.sends


def test_phase_2b_accepted_unless_promised_higher():
    """If an acceptor receives an accept request numbered n, it accepts the proposal unless it has
    already responded to a prepare request having a number greater than n. PMS §2.2 phase 2(b)."""
    accept = {"from": 1, "Accept": ["5.1", 11, ["a"], [10, "@10", 11]]}
    assert one_step({"promised": "5.1"}, accept).sends == [[1, "Accepted", "5.1", 11, 11]]
    assert one_step({"promised": "5.3"}, accept).sends == [[1, "Refused", "5.1", "5.3", 10]]


def test_only_the_highest_accepted_need_be_remembered():
    """An acceptor needs to remember only the highest-numbered proposal that it has ever accepted
    and the number of the highest-numbered prepare request. PMS §2.2 end."""
    accept = {"from": 3, "Accept": ["6.3", 11, ["b"], [10, "@10", 11]]}
    got = one_step({"accepted": [[11, "5.1", ["a"]]]}, accept, "accepted", "promised")
    assert got.then == {"accepted": [[11, "6.3", ["b"]]], "promised": "6.3"}


def test_a_proposal_is_abandoned_and_its_number_never_used_again():
    """A proposer can abandon a proposal at any time, as long as it never tries to issue another
    with the same number: told of a higher one it does. PMS §2.2 end."""
    given = leading(since_tick=95)
    got = one_step(given, {"from": 1, "Refused": ["6.2", "7.3", 10]}, "role", "promised")
    assert got.then["role"] == "follower" and not got.sends
    got = one_step(
        leading(since_tick=10), {"from": 1, "Refused": ["6.2", "7.3", 10]}, "role", "promised"
    )
    assert got.then == {"role": "candidate", "promised": "8.2"}, "anew, from phase 1 (not D1)"
    assert kinds(got.sends) == {"Prepare"}


# --- learning -------------------------------------------------------------------------------


def test_chosen_when_a_majority_accepted_one_proposal():
    """A value is chosen when a single proposal with that value has been accepted by a majority:
    votes for different numbers do not add up. PMS §2.2, §2.3."""
    given = leading(flights=[[11, 11, [2]], [12, 12, [2]]])
    for ballot, fixed in (("6.2", 11), ("5.2", 10), ("7.2", 10), ("1:6.2", 10)):
        got = one_step(given, {"from": 3, "Accepted": [ballot, 11, 11]}, "fixed")
        assert got.then["fixed"] == fixed
        assert got.fixed == ([[11, ["a"]]] if fixed == 11 else [])
    again = one_step(given, {"from": 2, "Accepted": ["6.2", 11, 11]}, "fixed")
    assert again.then["fixed"] == 10, "twice from one voter is one vote"


def test_a_learner_never_learns_what_is_not_chosen():
    """A process never learns that a value has been chosen unless it actually has been: an
    announcement of another ballot, without the chain, fixes nothing. PMS §2.1, §2.3."""
    heartbeat = {"from": 1, "Heartbeat": ["5.1", 3, [12, "@10+a+b", 11], 0]}
    for accepted in ([[11, "4.3", ["a"]]], [[11, "4.3", ["b"]], [12, "5.1", ["b"]]]):
        got = one_step({"accepted": accepted}, heartbeat, "fixed", "chase")
        assert got.then["fixed"] == 10 and got.then["chase"] is not None


def test_what_was_missed_is_asked_for():
    """Because of message loss a value could be chosen with no learner ever finding out; the learner
    could ask the acceptors. PMS §2.3."""
    got = one_step({"chase": [0, 1, 12, 0, 101]}, {"Tick": []}, "chase")
    assert got.sends == [[1, "CatchUp", 11]]


# --- progress -------------------------------------------------------------------------------


def test_progress_with_one_distinguished_proposer():
    """If enough of the system works, liveness is achieved by electing a single distinguished
    proposer, which selects a number greater than any already used. PMS §2.4."""
    table = Table(3)
    table.settle(ticks=60)
    assert len(table.leaders) == 1
    (leader,) = table.leaders
    table.propose(leader, "x")
    table.settle()
    assert table.names() == ["x"]
    promised = {seat.state.promised for seat in table.seats.values()}
    assert promised == {table.seats[leader].state.promised}


def test_a_proposer_that_hears_of_a_higher_number_waits_longer():
    """Two proposers could each keep issuing proposals with increasing numbers, none of which is
    ever chosen: who is refused waits, and longer each time. PMS §2.4."""
    refused = {"from": 1, "Refused": ["6.2", "7.3", 10]}
    got = one_step({**standing(), "attempt": 1}, refused, "role", "attempt", "deadline")
    assert got.then["role"] == "follower" and got.then["attempt"] == 2
    assert got.then["deadline"] >= 100 + 25


# --- stable storage -------------------------------------------------------------------------


def test_an_acceptor_records_its_response_before_it_sends_it():
    """An acceptor records its intended response in stable storage before actually sending the
    response: no vote has left a disk that is not synced. PMS §2.5."""
    table = begin()
    table.autosync = False
    table.propose(1, "x")
    table.deliver(of(Accept))
    assert not [x for x in table.letters if isinstance(x.message, Accepted)]
    assert [r for r in table.seats[2].unsynced if isinstance(r, AcceptRecord)]
    table.sync(2)
    (letter,) = [x for x in table.letters if isinstance(x.message, Accepted)]
    assert letter.source == 2


def test_what_was_promised_and_accepted_survives_a_crash():
    """Stable storage, preserved during failures, is used to maintain the information that the
    acceptor must remember. PMS §2.5."""
    table = begin()
    table.propose(1, "x")
    table.deliver(of(Accept, target=2))
    before = table.seats[2].state
    assert before.accepted
    table.restart(2)
    after = table.seats[2].state
    names = ("promised", "fixed", "chain", "accepted", "genesis")
    assert all(getattr(before, name) == getattr(after, name) for name in names)
    assert isinstance(after.role, Follower)


def test_what_was_not_recorded_was_not_sent():
    """…and so what a crash forgets was told to nobody. PMS §2.5."""
    table = begin()
    table.autosync = False
    table.propose(1, "x")
    table.deliver(of(Accept, target=2))
    table.restart(2)
    assert not table.seats[2].state.accepted
    assert not [x for x in table.letters if isinstance(x.message, Accepted)]


def test_different_proposers_choose_from_disjoint_sets_of_numbers():
    """No two proposals are ever issued with the same number: different proposers choose their
    numbers from disjoint sets. PMS §2.5."""
    texts = ("0.0.1", "0.0.2", "0.1.1", "0.1.2", "0.2.1", "1.0.1", "1.0.2", "1.1.1")
    ballots = [Ballot(*map(int, text.split("."))) for text in texts]
    assert ballots == sorted(ballots), "era, then round, then voter"
    assert len(set(ballots)) == len(ballots)
    assert [str(ballot) for ballot in ballots] == list(texts)
    used = set()
    for voter in (1, 2, 3):
        table = Table(3)
        table.elect(voter)
        used.add(table.seats[voter].state.promised)
    assert {ballot.voter for ballot in used} == {1, 2, 3}


def test_a_proposer_remembers_the_highest_number_it_tried():
    """Each proposer remembers in stable storage the highest-numbered proposal it has tried to issue
    and begins phase 1 with a higher number: also when it crashed at once. PMS §2.5 (R1)."""
    table = begin()
    table.crash(1)
    tried = []
    for _ in range(4):
        for _ in range(60):
            table.tick(2, 3)
            table.deliver(of(Poll))
            table.deliver(lambda letter: letter.target == 2 and letter.source == 3)
            if isinstance(table.seats[2].state.role, Candidate):
                break
        tried.append(table.seats[2].state.role.ballot)
        table.drop()
        table.restart(2)
    assert tried == sorted(set(tried)), "each above the one before"


# --- a sequence of instances ----------------------------------------------------------------


def test_one_prepare_for_all_instances():
    """A newly chosen leader executes phase 1 for infinitely many instances, using the same proposal
    number, by sending a single reasonably short message. PMS §3."""
    given = {"role": {"polling": {"attempt": 100, "answers": [[2, False]], "highest": "5.1"}}}
    got = one_step(given, {"from": 3, "PollAnswer": [100, False, "5.1", 10]})
    assert [send for send in got.sends if send[0] == 1] == [[1, "Prepare", "6.2", 11]]


def test_a_simple_ok_where_nothing_was_accepted():
    """In phase 1 an acceptor responds with more than a simple OK only if it has already received a
    phase 2 message from some proposer. PMS §3."""
    got = one_step({}, {"from": 3, "Prepare": ["6.3", 11]})
    assert got.sends == [[3, "Promise", "6.3", 11, 0, []]]


def test_gaps_are_filled_with_no_ops():
    """The leader fills the gap by proposing a special no-op command that leaves the state
    unchanged. PMS §3."""
    given = {
        **standing(parts=[[1, [[11, 0]], []]]),
        "accepted": [[13, "4.3", ["c"]]],
    }
    got = one_step(given, {"from": 2, "Promise": ["6.2", 11, 0, [[13, 13, "4.3"]]]}, "role")
    assert got.records == [["AcceptRecord", "6.2", 11, ["noop", "noop", "c"]]]


def test_in_steady_state_only_phase_2():
    """The effective cost of executing a state machine command is the cost of executing only phase 2
    of the consensus algorithm. PMS §3."""
    table = begin()
    table.settle()
    table.drop()
    table.propose(1, "x")
    assert {type(letter.message) for letter in table.letters} == {Accept, Accepted}
    table.deliver(of(Accept))
    table.deliver(of(Accepted))
    assert table.seats[1].fixed == 2, "one round trip"


def test_the_leader_may_run_ahead_within_a_window():
    """A leader can get a number of commands ahead: it can propose commands i + 1 through i + alpha
    after commands 1 through i are chosen. PMS §3."""
    given = leading()
    free = WINDOW_SLOTS_MAX - 2
    got = one_step(given, {"Propose": [["c"]]}, "role.next_slot", "fixed")
    assert got.then == {"role.next_slot": 14, "fixed": 10}, "before 11 and 12 are chosen"
    table = begin()
    table.propose(1, "x", "y")
    assert room(table.seats[1].state)[0] == free, "and no further"


def test_commands_are_executed_in_order():
    """A command chosen above a gap waits until all before it are chosen. PMS §3."""
    got = one_step(
        leading(flights=[[11, 11, [2]], [12, 12, [2]]]),
        {"from": 3, "Accepted": ["6.2", 12, 12]},
        "fixed",
    )
    assert got.then["fixed"] == 10 and not got.fixed
    got = one_step(
        leading(flights=[[11, 11, [2]], [12, 12, [2, 3]]]),
        {"from": 1, "Accepted": ["6.2", 11, 11]},
        "fixed",
    )
    assert got.fixed == [[11, ["a", "b"]]], "then both, in order"


# --- the plan's own rules -------------------------------------------------------------------


def test_early_accept_needs_no_local_disk():
    """Only votes wait for the sync; an Accept needs no local disk, so leader and peers write in
    parallel; the leader's own vote waits like any other. DESIGN §3, R5."""
    table = begin()
    table.drop()
    table.autosync = False
    table.propose(1, "x")
    assert {letter.target for letter in table.letters if isinstance(letter.message, Accept)} == {
        2,
        3,
    }
    assert not [x for x in table.letters if isinstance(x.message, Accepted)], "nor to itself"
    table.sync(1)
    assert [x.target for x in table.letters if isinstance(x.message, Accepted)] == [1]


def test_a_promise_to_oneself_waits_for_the_sync():
    """A vote for oneself travels as an ordinary message after the sync. DESIGN §3, R5."""
    table = begin()
    table.drop()
    table.autosync = False
    table.step(2, Receive(1, 1001, 1, HandOver(table.seats[1].state.promised)))
    assert isinstance(table.seats[2].state.role, Candidate)
    assert not table.letters, "the ballot is not on its disk yet"
    table.sync(2)
    assert {(x.target, type(x.message)) for x in table.letters} == {
        (1, Prepare),
        (2, Prepare),
        (3, Prepare),
    }
    table.deliver(of(Prepare, target=2))
    table.drop(of(Prepare))
    assert not table.letters, "nor is its own promise, for all it knows"
    table.sync(2)
    assert [(x.target, type(x.message)) for x in table.letters] == [(2, Promise)]


def test_a_prepare_at_or_below_fixed_is_refused_with_that_slot():
    """A voter whose fixed slot is at or above first_slot refuses with that slot. DESIGN §3, R2."""
    for first in (9, 10):
        got = one_step({}, {"from": 3, "Prepare": ["6.3", first]}, "promised")
        assert got.sends == [[3, "Refused", "6.3", "5.1", 10]]
        assert got.then["promised"] == "5.1" and not got.records


def test_a_candidate_that_was_behind_stands_again_under_its_ballot():
    """The candidate catches up and stands again, under the same ballot with a higher first_slot as
    long as it proposed nothing under it. DESIGN §3."""
    got = one_step(standing(), {"from": 1, "Refused": ["6.2", "5.1", 11]}, "role", "chase")
    assert got.then == {"role": "candidate", "chase": ["Chase", 0, 1, 11, 0, 102]}
    given = {**standing(), "chase": [1, 1, 11, 1, 999]}
    got = one_step(given, {"Learn": [1, 11, "@10", ["a"], 11]}, "role.first", "role.ballot")
    assert got.then == {"role.first": 12, "role.ballot": "6.2"}
    assert got.sends == [[voter, "Prepare", "6.2", 12] for voter in (1, 2, 3)]


def test_a_promise_in_parts_counts_when_complete():
    """A part names the range it covers, the last part every slot above it; missing ranges are asked
    for again. DESIGN §3, R3."""
    given = standing(parts=[[2, [[11, 0]], []], [3, [[14, 0]], []]], since_tick=97)
    got = one_step(given, {"Tick": []}, "role")
    assert [3, "Prepare", "6.2", 11] in got.sends and [2, "Prepare", "6.2", 11] not in got.sends
    got = one_step(given, {"from": 3, "Promise": ["6.2", 11, 12, []]}, "role")
    assert got.then["role"] == "candidate", "13 is missing"
    got = one_step(given, {"from": 3, "Promise": ["6.2", 11, 13, []]}, "role")
    assert got.then["role"] == "leader"


def test_values_are_fetched_of_exactly_the_pair():
    """The candidate fetches only the values it lacks; a voter that named the pair answers the value
    of exactly that (slot, ballot), or "promised higher", or that it is fixed. DESIGN §3."""
    given = standing(parts=[[2, [[11, 0]], []]])
    got = one_step(given, {"from": 3, "Promise": ["6.2", 11, 0, [[11, 11, "4.3"]]]}, "role")
    assert got.then["role"] == "candidate"
    assert got.sends == [[3, "Fetch", "6.2", [[11, 11, "4.3"]]]]
    held = {"promised": "6.3", "accepted": [[11, "4.3", ["a"]], [12, "4.1", ["b"]]]}
    answers = {
        (("6.3", ((11, 11, "4.3"),))): [[3, "Fetched", "6.3", 11, "4.3", ["a"]]],
        (("6.3", ((12, 12, "4.3"),))): [],
        (("6.3", ((10, 11, "4.3"),))): [[3, "Refused", "6.3", "6.3", 10]],
        (("5.3", ((11, 11, "4.3"),))): [[3, "Refused", "5.3", "6.3", 10]],
    }
    for (ballot, wanted), sends in answers.items():
        asked = {"from": 3, "Fetch": [ballot, [list(pair) for pair in wanted]]}
        assert one_step(held, asked).sends == sends


def test_the_promise_of_a_silent_holder_is_dropped():
    """From a silent one its promise is dropped: another promise quorum, or a new ballot.
    DESIGN §3."""
    given = standing(
        parts=[[1, [[11, 0]], [[11, 11, "4.3"]]], [2, [[11, 0]], []]],
        plan=[[11, 11, "4.3"]],
        since_tick=93,
        fetch_tick=93,
    )
    got = one_step(given, {"Tick": []}, "role.silent", "role.plan")
    assert got.then == {"role.silent": [1], "role.plan": None}
    also = standing(
        parts=[
            [1, [[11, 0]], [[11, 11, "4.3"]]],
            [2, [[11, 0]], []],
            [3, [[11, 0]], []],
        ],
        plan=[[11, 11, "4.3"]],
        since_tick=93,
        fetch_tick=93,
    )
    assert one_step(also, {"Tick": []}, "role").then["role"] == "leader", "another quorum"


def test_pre_vote_nobody_stands_while_others_hear_a_leader():
    """A follower that hears nothing first polls; peers that still hear a leader say so; one behind
    gets catch-up instead. DESIGN §3, R9."""
    got = one_step({"deadline": 101}, {"Tick": []}, "role", "promised")
    assert got.then == {"role": "polling", "promised": "5.1"}
    assert got.sends == [[1, "Poll", 101, 10], [3, "Poll", 101, 10]] and not got.records
    polling = {"role": {"polling": {"attempt": 100, "answers": [[2, False]], "highest": "5.1"}}}
    for hears, fixed, role in (
        (True, 10, "polling"),
        (False, 11, "polling"),
        (False, 10, "candidate"),
    ):
        when = {"from": 1, "PollAnswer": [100, hears, "5.1", fixed]}
        got = one_step(polling, when, "role", "chase")
        assert got.then["role"] == role
        assert (got.then["chase"] is not None) == (fixed > 10)


def test_check_quorum_a_leader_without_answers_steps_down_and_is_silent():
    """A leader that hears no accept quorum for an election timeout steps down and falls silent; its
    heartbeats carry the age of the last quorum answer. DESIGN §3, R9."""
    got = one_step(leading(quorum_tick=76), {"Tick": []}, "role")
    assert got.then["role"] == "leader"
    got = one_step(leading(quorum_tick=75), {"Tick": []}, "role", "leader")
    assert got.then == {"role": "follower", "leader": "0.0"} and not got.sends
    beat = one_step(leading(quorum_tick=90), {"Beat": []}).sends
    assert {send[5] for send in beat} == {10}, "the age"


def test_one_that_hears_only_an_old_quorum_hears_no_leader():
    """…so a leader that a quorum has left does not keep a follower waiting. DESIGN §3, R9."""
    for age, leader in ((24, "5.1"), (25, "0.0")):
        when = {"from": 1, "Heartbeat": ["5.1", 3, [10, "@10", 11], age]}
        assert one_step({}, when, "leader").then["leader"] == leader


def test_what_is_learned_is_journalled_as_fixed_never_as_an_accept():
    """A learned entry is journalled as fixed in one record, never as an accept; no step reads a
    ballot from a fixed record. DESIGN §3, R8."""
    got = one_step({}, {"Learn": [1, 11, "@10", ["a", "b"], 12]}, "promised", "accepted", "fixed")
    assert got.records == [["LearnedRecord", 11, ["a", "b"], "@10+a+b"]]
    assert got.then == {"promised": "5.1", "accepted": [], "fixed": 12}
    asked = {"from": 3, "Prepare": ["6.3", 11]}
    assert one_step({}, asked).sends == [[3, "Promise", "6.3", 11, 0, []]]


def test_an_accept_at_or_below_fixed_is_refused_and_the_leader_catches_up():
    """An Accept at or below a voter's fixed slot is refused with that slot; the leader catches up
    and stays leader. DESIGN §3, R4."""
    got = one_step({}, {"from": 1, "Accept": ["5.1", 10, ["b"], [9, "@9", 9]]}, "fixed", "accepted")
    assert got.sends == [[1, "Refused", "5.1", "5.1", 10]] and not got.records
    got = one_step(leading(), {"from": 1, "Refused": ["6.2", "6.2", 12]}, "role", "chase")
    assert got.then == {"role": "leader", "chase": ["Chase", 0, 1, 12, 0, 102]}
    given = {**leading(), "chase": [1, 1, 12, 1, 999]}
    got = one_step(
        given, {"Learn": [1, 11, "@10", ["a", "b"], 12]}, "role", "fixed", "role.counted"
    )
    assert got.then == {"role": "leader", "fixed": 12, "role.counted": 13}


def test_a_tip_fixes_the_very_pair_or_by_chain():
    """Fixed is learned where the voter holds exactly the announced (slot, ballot), or by tip where
    the chain over the values it holds equals the tip's. DESIGN §3, R7."""
    told = {"from": 1, "Heartbeat": ["5.1", 3, [12, "@10+a+b", 11], 0]}
    by_ballot = one_step({"accepted": [[11, "5.1", ["a"]]]}, told, "fixed")
    assert by_ballot.then["fixed"] == 11 and by_ballot.records == [["FixedRecord", 11, "@10+a"]]
    by_chain = one_step({"accepted": [[11, "4.3", ["a"]], [12, "3.1", ["b"]]]}, told, "fixed")
    assert by_chain.then["fixed"] == 12


def test_a_leader_announces_only_what_it_counted():
    """A leader announces under its ballot only what it counted at that ballot: below ``counted``
    the ballot proves nothing. DESIGN §3, R6 (I8)."""
    told = {"from": 1, "Heartbeat": ["5.1", 3, [12, "@10+c+b", 12], 0]}
    got = one_step({"accepted": [[11, "5.1", ["a"]]]}, told, "fixed", "chase")
    assert got.then["fixed"] == 10 and got.then["chase"] is not None


def test_told_of_an_accept_above_its_last_a_leader_fills_up():
    """A new leader, or one told of an accepted slot above its last, fills up with no-ops.
    DESIGN §3."""
    given = leading()
    got = one_step(given, {"from": 3, "HeartbeatAck": ["6.2", 1, 10, 14, True]}, "role.next_slot")
    assert got.records == [["AcceptRecord", "6.2", 13, ["noop", "noop"]]]
    assert got.then["role.next_slot"] == 15


def test_handover_drains_and_the_heir_skips_the_poll():
    """Handover: drain, stop proposing, the most up-to-date peer skips the poll. DESIGN §3."""
    acks = [[1, 1, 10, 10], [3, 1, 10, 12]]
    got = one_step(leading(acks=acks), {"StartHandOver": [0]}, "role.handover")
    assert got.then["role.handover"][0] == 3, "it holds the most"
    assert not got.sends, "not drained yet"
    draining = leading(acks=acks, handover=[3, 150])
    assert not one_step(draining, {"Propose": [["c"]]}).records, "nothing new meanwhile"
    idle = {
        "promised": "6.2",
        "role": {"leader": {"ballot": "6.2", "next_slot": 11, "acks": acks}},
    }
    assert one_step(idle, {"StartHandOver": [3]}).sends == [[3, "HandOver", "6.2"]]
    got = one_step({"promised": "5.1"}, {"from": 1, "HandOver": ["5.1"]}, "role", "promised")
    assert got.then == {"role": "candidate", "promised": "6.2"}
    assert kinds(got.sends) == {"Prepare"}


def test_an_old_leader_resumes_if_nobody_takes_over():
    """If no higher ballot appears within an election timeout the old leader resumes. DESIGN §3."""
    for until, handover in ((101, None), (102, [1, 102])):
        given = leading(handover=[1, until])
        assert one_step(given, {"Tick": []}, "role.handover").then["role.handover"] == handover


def test_a_split_vote_is_lost():
    """WIN, LOSE, WAIT; a split vote is a LOSE. DESIGN §3."""
    four = Majority((1, 2, 3, 4))
    assert four.promise({1, 2}, {3, 4}) is Tally.LOSE
    assert four.promise({1, 2}, {3}) is Tally.WAIT
    assert four.promise({1, 2, 3}) is Tally.WIN


def test_the_first_election_needs_every_voter():
    """Until slot 1 is fixed every voter must promise; slot 1 records all incarnations. DESIGN §4,
    R10."""
    given = {
        "fixed": 0,
        "promised": "6.2",
        "role": {"candidate": {"ballot": "6.2", "first": 1, "parts": [[1, [[1, 0]], []]]}},
    }
    got = one_step(given, {"from": 2, "Promise": ["6.2", 1, 0, []]}, "role")
    assert got.then["role"] == "candidate", "a majority is not enough"
    given["role"]["candidate"]["parts"].append([2, [[1, 0]], []])
    got = one_step(given, {"from": 3, "Promise": ["6.2", 1, 0, []]}, "role")
    assert got.records == [["AcceptRecord", "6.2", 1, ["genesis"]]]


def test_a_foreign_incarnation_counts_for_nothing():
    """The votes of any other incarnation are counted by nobody and its sender stops. DESIGN §4,
    R10."""
    given = leading(flights=[[11, 12, [2]]])
    when = {"from": 3, "incarnation": 999, "Accepted": ["6.2", 11, 12]}
    got = one_step(given, when, "fixed")
    assert got.then["fixed"] == 10 and got.sends == [[3, "Fenced", 1, 103]]
    got = one_step({"fixed": 0}, {"from": 1, "Fenced": [1, 777]}, "halted")
    assert got.then["halted"]


def test_a_promise_of_a_disk_that_slot_1_does_not_know_counts_no_more():
    """Slots 1 and 2 are fixed by voters 1 and 2; then 2 is formatted again, and voter 3, which
    knows of nothing yet, has its promise. Once it learns slot 1, and with it who 2 was, that
    promise says nothing of slot 2: it does not lead before voter 1 told of it. DESIGN §4, R10."""
    config = Config(voter=3, voters=(1, 2, 3), incarnation=103, boot=1)
    state = first_state(bytes(16))
    genesis = msgspec.msgpack.encode(Genesis((1, 2, 3), (101, 102, 103)))
    old = Ballot(0, 1, 1)
    ballot = Ballot(0, 2, 3)
    slot_1 = encode_value(Value(Kind.GENESIS, old, command=genesis))
    before: list[Event] = [
        Receive(1, 101, 1, HandOver(old)),
        Receive(2, 999, 1, Promise(ballot, 1, 0, ())),
        Receive(1, 101, 1, Refused(ballot, old, 1)),
        Learn(1, 1, state.chain, (slot_1,), 1),
        Receive(3, 103, 1, Promise(ballot, 2, 0, ())),
    ]
    for event in before:
        state, _ = step(config, state, event)
    assert state.fixed == 1
    assert isinstance(state.role, Candidate)
    assert state.role.ballot == ballot
    named = Promise(ballot, 2, 0, (Pairs(2, 2, old),))
    state, effects = step(config, state, Receive(1, 101, 1, named))
    assert [send.message for send in effects.sends] == [Fetch(ballot, (Pairs(2, 2, old),))]


def test_a_no_op_is_its_own_kind():
    """A no-op is its own kind, never delivered to the state machine: the kind can be told without
    decoding. DESIGN §3."""
    table = begin()
    table.propose(1, "x")
    table.drop()
    table.crash(1)
    table.elect(2, among=(2, 3))
    table.step(2, Receive(3, 1003, 1, HeartbeatAck(table.seats[2].state.promised, 1, 1, 2, True)))
    runs = [r for r in table.seats[2].disk if isinstance(r, AcceptRecord)]
    assert [value_kind(value) for value in runs[-1].values] == [Kind.NOOP]


# --- nothing is left out --------------------------------------------------------------------


def test_every_section_and_rule_that_the_code_cites_has_its_test():
    """What trex_core says it follows is what is tested here."""
    tests = "\n".join(
        inspect.getdoc(each) or ""
        for name, each in vars(sys.modules[__name__]).items()
        if name.startswith("test_")
    )
    flat = re.sub(r"\s+", " ", tests)
    folder = Path(trex_core.__file__).parent
    code = "\n".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    sections = set(re.findall(r"PMS §(\d(?:\.\d)?)", code)) | {"3"}
    assert sections >= {"2.2", "2.3", "2.5", "3"}
    assert not {s for s in sections if f"PMS §{s}" not in flat}
    phases = set(re.findall(r"PMS §2\.2 (?:phase )?(\d\([ab]\))", code))
    assert {f"phase {phase}" for phase in phases} <= set(re.findall(r"phase \d\([ab]\)", flat))
    rules = set(re.findall(r"^(R\d+) ", code, re.MULTILINE))
    assert rules == {f"R{n}" for n in range(1, 11)}
    assert rules <= set(re.findall(r"R\d+", flat))
