"""What a voter remembers: runs of accepted slots against a dictionary, and journal replay."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from trex_core.messages import Ballot, Genesis, Kind, Value, encode_value
from trex_core.state import (
    AcceptRecord,
    FixedRecord,
    InstallRecord,
    LearnedRecord,
    PromiseRecord,
    ReplayError,
    Run,
    State,
    above,
    chain_run,
    contiguous,
    first_state,
    overlay,
    replay,
)

A, B, C = Ballot(0, 1, 1), Ballot(0, 2, 2), Ballot(1, 1, 3)
GENESIS = Genesis((1, 2, 3), (11, 12, 13))


def value(slot: int, ballot: Ballot = A) -> bytes:
    return encode_value(Value(Kind.COMMAND, ballot, command=bytes([slot])))


def genesis_value(kind: int = Kind.GENESIS) -> bytes:
    return encode_value(Value(kind, A, command=msgspec.msgpack.encode(GENESIS)))


def slots(runs: tuple[Run, ...]) -> dict[int, tuple[Ballot, bytes]]:
    held: dict[int, tuple[Ballot, bytes]] = {}
    for run in runs:
        assert run.values and run.first > max(held, default=0), "ascending, disjoint, none empty"
        for n, each in enumerate(run.values):
            held[run.first + n] = (run.ballot, each)
    return held


def run(first: int, last: int, ballot: Ballot) -> Run:
    return Run(first, ballot, tuple(value(slot, ballot) for slot in range(first, last + 1)))


def test_runs_are_a_dictionary_of_slots():
    """Every pair of runs in five slots, with every third one laid over them, cut and looked up."""
    spans = [(first, last) for first in range(1, 6) for last in range(first, 6)]
    pairs: list[tuple[Run, ...]] = [(), *((run(a, b, A),) for a, b in spans)]
    pairs += [
        (run(a, b, A), run(c, d, B)) for (a, b), (c, d) in itertools.product(spans, spans) if b < c
    ]
    cases = 0
    for held, (first, last), ballot in itertools.product(pairs, spans, (A, C)):
        laid = overlay(held, run(first, last, ballot))
        expected = {**slots(held), **slots((run(first, last, ballot),))}
        assert slots(laid) == expected
        cases += 1
    for held, slot in itertools.product(pairs, range(7)):
        expected = {at: each for at, each in slots(held).items() if at > slot}
        assert slots(above(held, slot)) == expected
        cases += 1
    for held, (first, last), ballot in itertools.product(pairs, spans, (None, A, B)):
        known, found = slots(held), []
        for slot in range(first, last + 1):
            if slot not in known or ballot not in (None, known[slot][0]):
                break
            found.append(known[slot][1])
        assert list(contiguous(held, first, last, ballot)) == found
        cases += 1
    print(f"\nruns: {cases:,} cases", end="")
    assert cases > 3_000


# --- replay ---------------------------------------------------------------------------------


def held_state(*runs: Run, fixed: int = 0, promised: Ballot = A) -> State:
    start = first_state(b"replay-a-cluster")
    return msgspec.structs.replace(start, accepted=runs, fixed=fixed, promised=promised)


@pytest.mark.parametrize(("before", "record"), list(itertools.product((A, B, C), repeat=2)))
def test_a_promise_is_replayed_and_never_goes_back(before, record):
    for each in (PromiseRecord(record), AcceptRecord(record, 1, (value(1),))):
        for fixed in (0, 1):  # an accept of a slot that is fixed since is a promise all the same
            state, runs = replay(held_state(promised=before, fixed=fixed), each)
            assert state.promised == max(before, record) and not runs


def test_an_accept_is_replayed_above_fixed_only():
    for fixed, first, last in itertools.product(range(4), range(1, 5), range(1, 6)):
        if last < first:
            continue
        new = run(first, last, B)
        state, runs = replay(held_state(fixed=fixed), AcceptRecord(B, first, new.values))
        expected = {at: each for at, each in slots((new,)).items() if at > fixed}
        assert slots(state.accepted) == expected and state.fixed == fixed and not runs


def test_what_is_fixed_is_replayed_in_order_with_its_chain():
    values = (genesis_value(), value(2), value(3))
    before = held_state(Run(1, A, values))
    chains = chain_run(before.chain, 1, values)
    state, runs = replay(before, FixedRecord(2, chains[1]))
    assert (state.fixed, state.chain, state.genesis) == (2, chains[1], GENESIS)
    assert slots(state.accepted) == {3: (A, values[2])}
    assert [(r.first, r.last, r.values, r.chains) for r in runs] == [(1, 2, values[:2], chains[:2])]
    assert runs[0].chain_before == before.chain
    again, none = replay(state, FixedRecord(2, chains[1]))
    assert again is state and none == (), "what is known already is skipped"


def test_what_was_learned_is_replayed_from_where_it_continues():
    values = (genesis_value(), value(2), value(3))
    before = held_state()
    chains = chain_run(before.chain, 1, values)
    state, runs = replay(before, LearnedRecord(1, values[:2], chains[1]))
    assert (state.fixed, state.genesis, runs[0].values) == (2, GENESIS, values[:2])
    more, runs = replay(state, LearnedRecord(1, values, chains[2]))
    assert (more.fixed, more.chain, runs[0].first, runs[0].values) == (3, chains[2], 3, values[2:])
    assert replay(more, LearnedRecord(1, values, chains[2])) == (more, ())


@pytest.mark.parametrize("kind", [Kind.NOOP, Kind.COMMAND])
def test_slot_1_is_a_genesis_only_if_it_says_so(kind):
    before = held_state()
    values = (genesis_value(kind),)
    (chain,) = chain_run(before.chain, 1, values)
    state, _ = replay(before, LearnedRecord(1, values, chain))
    assert state.fixed == 1 and state.genesis is None


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (FixedRecord(3, bytes(32)), "slot 2 is fixed but has no value"),
        (FixedRecord(1, bytes(32)), "chain mismatch at slot 1"),
        (LearnedRecord(3, (value(3),), bytes(32)), "slots 1..2 are missing"),
        (LearnedRecord(1, (value(1), value(2)), bytes(32)), "chain mismatch at slot 2"),
        (InstallRecord(5, bytes(32), GENESIS), "the snapshot at slot 5 .* is missing"),
    ],
)
def test_records_that_contradict_are_refused(record, words):
    before = held_state(run(1, 1, A), run(3, 3, A))
    with pytest.raises(ReplayError, match=words):
        replay(before, record)


def test_a_snapshot_that_is_there_explains_its_record():
    before = held_state(fixed=5)
    assert replay(before, InstallRecord(5, bytes(32), GENESIS)) == (before, ())
