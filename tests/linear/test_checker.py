"""The checker is checked: histories made by hand, planted bugs, and a dumb twin."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.linear import brute
from tests.linear.checker import (
    NotLinearizable,
    Undecided,
    blind,
    judge,
    slots,
    with_slots_met,
)
from tests.linear.history import History, Op
from tests.linear.planted import BUGS, simulate

MODELS = pytest.mark.parametrize("model", [blind, slots], ids=["values", "slots"])
SEEDS = 40


def put(began, ended, value, slot, client="a"):
    return _op(client, "put", began, ended, value=value, slot=slot)


def get(began, ended, read, slot, client="b"):
    return Op(client, "get", "k", began, ended=ended, outcome="done", read=read, slot=slot)


def cas(began, ended, expected, value, slot, client="c", *, refused=False):
    op = _op(client, "cas", began, ended, value=value, slot=slot)
    op.expected = expected
    if refused:
        op.outcome = "refused"
    return op


def delete(began, ended, slot, client="d", *, refused=False):
    op = _op(client, "delete", began, ended, slot=slot)
    if refused:
        op.outcome = "refused"
    return op


def _op(client, kind, began, ended, *, value=None, slot=-1):
    outcome = "pending" if ended is None else "done"
    return Op(client, kind, "k", began, value, ended=ended, outcome=outcome, slot=slot)


GOOD = {
    "empty": [],
    "absent at first": [get(0, 1, None, 0)],
    "a read beside a write sees either": [
        put(0, 10, "x", 5),
        get(1, 2, None, 0),
        get(3, 4, "x", 5),
    ],
    "what may have happened happens late": [
        put(0, None, "x", -1),
        get(1, 2, None, 0),
        put(3, 4, "y", 7),
        get(5, 6, "y", 7),
        get(7, 8, "x", 9),
    ],
    "what may have happened never does": [put(0, None, "x", -1), get(1, 2, None, 0)],
    "a compare-and-set after a lost answer": [
        put(0, 1, "x", 2),
        cas(2, None, ("x", 2), "y", -1),
        cas(3, 4, ("y", 3), "z", 4),
        get(5, 6, "z", 4),
    ],
    "a refusal beside the write that causes it": [
        put(0, 9, "x", 3),
        cas(1, 8, (None, 0), "y", 3, refused=True),
    ],
    "deleted and made again": [
        put(0, 1, "x", 2),
        delete(2, 3, 3),
        delete(4, 5, 0, refused=True),
        cas(6, 7, (None, 0), "y", 6),
        cas(8, 9, ("y", 6), None, 7),
        get(10, 11, None, 0),
    ],
    "what touches overlaps": [put(0, 5, "x", 2), get(5, 6, None, 0)],
}

BAD = {
    "stale read": [put(0, 1, "x", 2), get(2, 3, None, 0)],
    "lost write": [put(0, 1, "x", 2), put(2, 3, "y", 3), get(4, 5, "x", 2)],
    "one compare-and-set of two fits": [
        put(0, 1, "x", 2),
        cas(2, 5, ("x", 2), "y", 3, "c"),
        cas(2, 5, ("x", 2), "z", 4, "d"),
    ],
    "applied twice": [
        put(0, 1, "x", 2),
        cas(2, 3, ("x", 2), "y", 3),
        put(4, 5, "x2", 4),
        get(6, 7, "x2", 4),
        get(8, 9, "y", 3),
    ],
    "a refused write is read": [
        put(0, 1, "x", 2),
        cas(2, 5, (None, 0), "y", 2, refused=True),
        get(3, 4, "y", 3),
    ],
    "reordered reads": [
        put(0, 9, "x", 2),
        get(1, 2, "x", 2),
        get(3, 4, None, 0),
    ],
    "two readers disagree on the order": [
        put(0, 10, "x", 2, "a"),
        put(0, 10, "y", 3, "e"),
        get(11, 12, "x", 2, "b"),
        get(13, 14, "y", 3, "b"),
    ],
    "from the future": [get(0, 1, "x", 5), put(2, 3, "x", 5)],
    "a delete that was not": [put(0, 1, "x", 2), delete(2, 3, 3), get(4, 5, "x", 2)],
    "a delete of nothing": [delete(0, 1, 2)],
    "refused with the version it asked for": [
        put(0, 1, "x", 2),
        cas(2, 3, ("x", 2), "y", 2, refused=True),
    ],
    "not found, and it was there": [put(0, 1, "x", 2), delete(2, 3, 0, refused=True)],
    "what may have happened happens twice": [
        put(0, None, "x", -1),
        get(1, 2, "x", 4),
        put(3, 4, "y", 7),
        get(5, 6, "y", 7),
        get(7, 8, "x", 4),
    ],
}

BAD_BY_SLOTS = {
    "a slot of an older write": [put(0, 1, "x", 5), put(2, 3, "y", 4)],
    "a version nobody wrote": [put(0, 1, "x", 2), get(2, 3, "x", 3)],
    "a refusal with a version nobody wrote": [
        put(0, 1, "x", 2),
        cas(2, 3, (None, 0), "y", 7, refused=True),
    ],
    "done at a version that is not there": [put(0, 1, "x", 2), cas(2, 3, ("x", 1), "y", 3)],
    "two writes of one slot": [put(0, 5, "x", 2), put(0, 5, "y", 2, "e")],
}


def ops(history):
    """Copies: the checker may note slots in them."""
    return [Op(*(getattr(op, name) for name in Op.__slots__)) for op in history]


@MODELS
@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD)
def test_good_histories_pass(history, model):
    found = judge(with_slots_met(ops(history)), model)
    assert len(found.order) >= sum(op.outcome != "pending" for op in history)
    assert brute.linearizable(with_slots_met(ops(history)), model is slots)


@MODELS
@pytest.mark.parametrize("history", BAD.values(), ids=BAD)
def test_bad_histories_are_told_in_words(history, model):
    with pytest.raises(NotLinearizable, match="no order explains key k"):
        judge(with_slots_met(ops(history)), model)
    assert not brute.linearizable(with_slots_met(ops(history)), model is slots)


@pytest.mark.parametrize("history", BAD_BY_SLOTS.values(), ids=BAD_BY_SLOTS)
def test_slots_show_what_values_hide(history):
    judge(ops(history), blind)
    with pytest.raises(NotLinearizable):
        judge(ops(history), slots)
    assert brute.linearizable(ops(history), False)
    assert not brute.linearizable(ops(history), True)


def test_a_value_under_two_slots_is_a_finding_by_itself():
    with pytest.raises(NotLinearizable, match="met under two slots"):
        with_slots_met([put(0, 1, "x", 2), get(2, 3, "x", 3)])


def test_too_wide_a_history_is_undecided_and_never_passes():
    wide = [put(0, 100, f"v{n}", -1, f"c{n}") for n in range(14)]
    wide.append(get(101, 102, "nobody wrote this", -1))
    with pytest.raises(Undecided, match="15 operations"):
        judge(wide, blind, steps_max=500)


@MODELS
def test_a_register_without_a_bug_passes_whatever_the_schedule(model):
    for seed in range(SEEDS):
        judge(with_slots_met(simulate(seed)), model)


@MODELS
@pytest.mark.parametrize("bug", BUGS)
def test_each_planted_bug_is_caught(bug, model):
    caught = 0
    for seed in range(SEEDS):
        try:
            judge(with_slots_met(simulate(seed, bug)), model)
        except NotLinearizable:
            caught += 1
    print(f"{bug}: caught in {caught} of {SEEDS} histories")
    assert caught > SEEDS // 4


def test_thousands_of_operations_of_a_key_take_seconds():
    history = with_slots_met(simulate(7, ops_max=3000, clients=6, lost=0.01))
    assert len(history) > 2500
    for model in (slots, blind):
        began = time.process_time()
        found = judge(history, model)
        took_s = time.process_time() - began
        print(f"{model.__name__}: {len(history)} operations, {found.steps} states, {took_s:.2f} s")
        assert took_s < 5


# --- against the dumb twin ---------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32), lost=st.sampled_from((0.0, 0.2)))
def test_histories_made_from_a_sequential_run_pass(seed, lost):
    history = with_slots_met(simulate(seed, ops_max=25, lost=lost))
    judge(history, slots)
    judge(history, blind)


@st.composite
def small_histories(draw):
    """A few operations with answers at random: mostly wrong ones, of every sort."""
    count = draw(st.integers(1, 5))
    known = [(None, 0)]
    found = []
    for number in range(count):
        kind = draw(st.sampled_from(("put", "cas", "delete", "get", "get")))
        began = draw(st.integers(0, 6))
        ended = began + draw(st.integers(0, 4))
        outcome = draw(st.sampled_from(("done", "done", "done", "refused", "pending")))
        if kind in ("put", "get"):
            outcome = "done" if outcome == "refused" or kind == "get" else outcome
        value = f"v{number}" if kind in ("put", "cas") else None
        slot = draw(st.integers(1, 6))
        if value is not None and outcome != "refused":
            known.append((value, slot))
        found.append((number, kind, began, ended, outcome, value, slot))
    ops = []
    for number, kind, began, ended, outcome, value, drawn in found:
        slot = drawn
        expected = draw(st.sampled_from(known)) if kind == "cas" else (None, 0)
        read = None
        if kind == "get":
            read, slot = draw(st.sampled_from(known))
        elif outcome == "refused":
            slot = draw(st.sampled_from(known))[1] if kind == "cas" else 0
        ops.append(
            Op(
                f"c{number}",
                kind,
                "k",
                began,
                value,
                expected,
                None if outcome == "pending" else ended,
                outcome,
                -1 if outcome == "pending" else slot,
                read,
            )
        )
    return ops


def verdict(history, model):
    try:
        judge(history, model)
    except NotLinearizable:
        return False
    return True


@settings(max_examples=500, deadline=None)
@given(small_histories(), st.booleans())
def test_any_small_history_is_judged_as_by_the_dumb_twin(history, by_slots):
    mine = verdict(history, slots if by_slots else blind)
    assert mine == brute.linearizable(history, by_slots), "\n".join(map(str, history))


def mutated(seed):
    """A small history with one answer, or one moment, changed."""
    draw = random.Random(seed)
    history = simulate(seed, ops_max=6, clients=3, lost=0.1)
    for op in draw.sample(history, len(history)):
        if op.kind == "get":
            other = draw.choice(history)
            op.read, op.slot = (other.value, max(other.slot, 0)) if other.value else (None, 0)
            break
        if op.kind in ("cas", "delete") and op.outcome != "pending":
            op.outcome = "done" if op.outcome == "refused" else "refused"
            break
        if op.ended is not None and draw.random() < 0.5:
            op.ended = op.began
            break
    return history


@MODELS
def test_mutated_histories_are_judged_as_by_the_dumb_twin(model):
    verdicts: Counter[bool] = Counter()
    for seed in range(200):
        history = mutated(seed)
        mine = verdict(history, model)
        assert mine == brute.linearizable(history, model is slots), "\n".join(map(str, history))
        verdicts[mine] += 1
    assert min(verdicts[True], verdicts[False]) > 40, f"both verdicts are due: {verdicts}"


# --- notes -------------------------------------------------------------------------------------


def test_a_history_keeps_for_the_register_what_it_must_explain():
    history = History()
    done = history.begin("a", "put", "k", "1")
    history.end(done, "done", 5)
    refused = history.begin("a", "delete", "k2")
    history.end(refused, "refused", 0)
    never = history.begin("a", "put", "k", "2")
    history.end(never, "not_done")
    history.begin("a", "get", "k")
    local = history.begin("a", "get", "k", level="local")
    history.end(local, "done", 5, read="1", at=9)
    lost = history.begin("a", "put", "k", "3")
    assert history.register() == {"k": [done, lost], "k2": [refused]}
    assert done.ended is not None and done.began <= done.ended
    assert "a put k 1: done @5" in str(done)
