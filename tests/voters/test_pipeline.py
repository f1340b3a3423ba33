"""Which command is sent, again, and when; what may be claimed of it. Rules of voters.pipeline."""

from __future__ import annotations

import random

import pytest

from trex_core.messages import (
    Ballot,
    Kind,
    Outcome,
    OutcomeStatus,
    Refusal,
    RefusalReason,
    Submit,
    Value,
)
from trex_core.sessions import NO_SESSIONS, deliver
from voters.pipeline import FINAL, SURELY_NOT_PROPOSED, Call, Pipeline

MUCH = 1 << 30


def applied(submit: Submit, slot: int = 9, status: int = OutcomeStatus.APPLIED) -> Outcome:
    return Outcome(submit.id, slot, status, submit.command)


def refused(submit: Submit, reason: int) -> Refusal:
    return Refusal(submit.id, reason, 0, "")


def opened(count: int) -> tuple[Pipeline, list[Call], list[Submit]]:
    """A pipeline with an open session 7 and ``count`` commands just sent."""
    pipeline = Pipeline()
    calls = [Call(Kind.COMMAND, b"%d" % number) for number in range(1, count + 1)]
    for call in calls:
        pipeline.add(call)
    (open_it,) = pipeline.outgoing(MUCH)
    assert open_it.kind == Kind.OPEN
    assert pipeline.heard(Outcome(open_it.id, 7, OutcomeStatus.APPLIED, b""))
    return pipeline, calls, pipeline.outgoing(MUCH)


def sequences(submits: list[Submit]) -> list[int]:
    return [submit.sequence for submit in submits]


def test_a_session_is_opened_first_and_commands_follow_in_order():
    pipeline, calls, sent = opened(3)
    assert [(s.session, s.sequence, s.command) for s in sent] == [
        (7, 1, b"1"), (7, 2, b"2"), (7, 3, b"3"),
    ]  # fmt: skip
    assert [s.unanswered for s in sent] == [1, 1, 1]
    pipeline.heard(applied(sent[0]))
    assert calls[0].end == applied(sent[0])
    late = Call(Kind.COMMAND, b"4")
    pipeline.add(late)
    (fourth,) = pipeline.outgoing(MUCH)
    assert (fourth.sequence, fourth.unanswered) == (4, 2)


@pytest.mark.parametrize("reason", sorted(SURELY_NOT_PROPOSED - FINAL))
def test_a_bounced_copy_stops_all_behind_it_which_go_again_in_order(reason):
    pipeline, calls, sent = opened(3)
    assert not pipeline.heard(refused(sent[0], reason))
    assert pipeline.outgoing(MUCH) == [], "later copies are still out: they will fall in the gap"
    pipeline.heard(applied(sent[1], status=OutcomeStatus.GAP))
    pipeline.heard(applied(sent[2], status=OutcomeStatus.GAP))
    assert [call.copies for call in calls] == [0, 0, 0]
    first = pipeline.outgoing(MUCH)
    assert sequences(first) == [1], "one alone first"
    pipeline.heard(applied(first[0]))
    assert sequences(pipeline.outgoing(MUCH)) == [2, 3]
    assert calls[0].end is not None and calls[1].end is None


def test_after_a_cut_everything_unanswered_goes_again_under_the_same_sequence():
    pipeline, calls, sent = opened(3)
    pipeline.heard(applied(sent[0]))
    pipeline.cut()
    again = pipeline.outgoing(MUCH)
    assert [(s.session, s.sequence) for s in again] == [(7, 2), (7, 3)]
    assert not {s.id for s in again} & {s.id for s in sent}
    assert [call.copies for call in calls] == [1, 2, 2]
    pipeline.heard(applied(sent[1]))
    assert calls[1].end is None, "an id of an earlier connection answers nothing"
    pipeline.heard(applied(again[0]))
    assert calls[1].end is not None


def test_giving_up_what_was_never_sent_uses_no_sequence():
    pipeline, _, sent = opened(1)
    never = Call(Kind.COMMAND, b"never")
    pipeline.add(never)
    assert pipeline.give_up(never)
    later = Call(Kind.COMMAND, b"later")
    pipeline.add(later)
    (only,) = pipeline.outgoing(MUCH)
    assert (only.sequence, only.command) == (2, b"later")
    del sent


def test_giving_up_what_was_refused_fills_its_sequence_with_a_skip():
    pipeline, calls, sent = opened(2)
    pipeline.heard(refused(sent[0], RefusalReason.BUSY))
    pipeline.heard(applied(sent[1], status=OutcomeStatus.GAP))
    assert pipeline.give_up(calls[0]), "its only copy was refused"
    (skip,) = pipeline.outgoing(MUCH)
    assert (skip.kind, skip.sequence, skip.command) == (Kind.SKIP, 1, b"")
    pipeline.heard(applied(skip))
    assert sequences(pipeline.outgoing(MUCH)) == [2]
    assert calls[0].end is None


def test_giving_up_what_may_be_proposed_keeps_it_going():
    pipeline, calls, sent = opened(1)
    assert not pipeline.give_up(calls[0])
    pipeline.cut()
    (again,) = pipeline.outgoing(MUCH)
    assert (again.kind, again.sequence, again.command) == (Kind.COMMAND, 1, b"1")
    pipeline.heard(applied(again))
    assert calls[0].end == applied(again)
    assert not pipeline.busy
    del sent


def test_lost_leadership_leaves_a_copy_that_may_be_applied():
    pipeline, calls, sent = opened(1)
    assert not pipeline.heard(refused(sent[0], RefusalReason.LEADERSHIP_LOST))
    assert calls[0].copies == 1
    assert not pipeline.give_up(calls[0])


def test_a_command_refused_for_good_ends_and_is_filled():
    pipeline, calls, sent = opened(2)
    pipeline.heard(refused(sent[0], RefusalReason.MALFORMED))
    assert isinstance(calls[0].end, Refusal)
    pipeline.heard(applied(sent[1], status=OutcomeStatus.GAP))
    again = pipeline.outgoing(MUCH)
    assert [(s.kind, s.sequence) for s in again] == [(Kind.SKIP, 1), (Kind.COMMAND, 2)]


def test_a_fresh_command_moves_to_a_new_session_when_its_own_expired():
    pipeline, calls, sent = opened(2)
    pipeline.heard(applied(sent[0], status=OutcomeStatus.SESSION_EXPIRED))
    pipeline.heard(applied(sent[1], status=OutcomeStatus.SESSION_EXPIRED))
    (open_it,) = pipeline.outgoing(MUCH)
    assert open_it.kind == Kind.OPEN
    pipeline.heard(Outcome(open_it.id, 40, OutcomeStatus.APPLIED, b""))
    again = pipeline.outgoing(MUCH)
    assert [(s.session, s.sequence, s.command) for s in again] == [(40, 1, b"1"), (40, 2, b"2")]
    pipeline.heard(applied(again[0]))
    pipeline.heard(applied(again[1]))
    assert all(call.end is not None for call in calls)


def test_a_retried_command_ends_as_unknown_when_its_session_expired():
    pipeline, calls, _ = opened(1)
    pipeline.cut()
    (again,) = pipeline.outgoing(MUCH)
    pipeline.heard(applied(again, status=OutcomeStatus.SESSION_EXPIRED))
    assert isinstance(calls[0].end, Outcome) and calls[0].copies == 1
    assert not pipeline.busy


def test_a_pinned_session_never_skips_nor_moves():
    pipeline = Pipeline(session=7, next_sequence=5)
    call = Call(Kind.COMMAND, b"row 5")
    pipeline.add(call)
    (sent,) = pipeline.outgoing(MUCH)
    assert (sent.session, sent.sequence) == (7, 5)
    pipeline.heard(refused(sent, RefusalReason.BUSY))
    assert not pipeline.give_up(call), "its sequence stays its own"
    (again,) = pipeline.outgoing(MUCH)
    assert (again.kind, again.command) == (Kind.COMMAND, b"row 5")
    pipeline.heard(applied(again, status=OutcomeStatus.SESSION_EXPIRED))
    assert call.end is not None and pipeline.outgoing(MUCH) == []


@pytest.mark.parametrize("seed", range(200))
def test_any_weather_each_command_is_applied_once_and_in_order(seed):
    """A leader that refuses, forgets to answer, changes and loses sessions at random; the claims
    made of each command are compared with what really was applied."""
    rng = random.Random(seed)
    pipeline = Pipeline()
    calls: list[Call] = []
    sure: set[bytes] = set()
    done: list[bytes] = []
    sessions, slot = NO_SESSIONS, 0
    limbo: list[Submit] = []  # with an old leader: may still be proposed, in order
    expiries = seed % 2

    def fix(submit: Submit) -> Outcome:
        nonlocal sessions, slot
        slot += 1
        value = Value(
            submit.kind, Ballot(), 0, submit.session, submit.sequence, submit.unanswered,
            submit.command,
        )  # fmt: skip

        def apply(_: int, command: bytes) -> tuple[int, bytes]:
            done.append(command)
            return OutcomeStatus.APPLIED, command

        sessions, delivered = deliver(sessions, slot, value, apply)
        assert delivered is not None
        return Outcome(submit.id, delivered.slot, delivered.status, delivered.body)

    wire: list[Submit] = []
    for step in range(3000):
        healing = step > 2000
        dice = rng.random()
        if len(calls) < 60 and not healing:
            call = Call(Kind.COMMAND, b"%d" % len(calls))
            calls.append(call)
            pipeline.add(call)
        if not healing and dice < 0.05:
            open_calls = [c for c in calls if c.end is None and not c.given_up]
            if open_calls:
                victim = rng.choice(open_calls)
                if pipeline.give_up(victim):
                    sure.add(victim.command)
        elif not healing and dice < 0.10:  # the connection ends; the old leader may still propose
            limbo.extend(wire)
            wire.clear()
            pipeline.cut()
        elif not healing and dice < 0.15 and limbo:
            fix(limbo.pop(0))
        elif expiries and not healing and dice < 0.155:
            sessions = NO_SESSIONS
        elif wire and dice < 0.8:
            submit = wire.pop(0)
            if not healing and rng.random() < 0.1:
                pipeline.heard(refused(submit, rng.choice([1, 2, 3, 7])))
            elif not healing and rng.random() < 0.05:
                limbo.append(submit)
                pipeline.heard(refused(submit, RefusalReason.LEADERSHIP_LOST))
            else:
                pipeline.heard(fix(submit))
        else:
            wire.extend(pipeline.outgoing(rng.choice([1, 100, MUCH])))
        if healing and not wire and not pipeline.busy:
            break
    else:
        pytest.fail("not everything was answered")
    while limbo:
        fix(limbo.pop(0))

    assert len(done) == len(set(done)), "applied twice"
    assert not set(done) & sure, "applied although surely never proposed"
    answered = {
        call.command
        for call in calls
        if isinstance(call.end, Outcome) and call.end.status == OutcomeStatus.APPLIED
    }
    assert answered <= set(done), "answered but not applied"
    for call in calls:
        ended = call.end is not None or call.command in sure
        assert ended, f"{call.command!r} was never settled"
    if not expiries:
        assert done == sorted(done, key=int), "out of order"


def test_a_session_refused_for_good_ends_all_that_waits_for_it():
    pipeline = Pipeline()
    calls = [Call(Kind.COMMAND, b"%d" % n) for n in range(3)]
    for call in calls:
        pipeline.add(call)
    (opening,) = pipeline.outgoing(MUCH)
    no = refused(opening, RefusalReason.UNAUTHORIZED)
    assert pipeline.heard(no)
    assert [call.end for call in calls] == [no] * 3
    assert not pipeline.busy and not pipeline.outgoing(MUCH)


def test_a_skip_refused_for_good_is_not_said_again():
    """Its certificate was revoked: nothing of this client will be heard any more."""
    pipeline, calls, sent = opened(1)
    pipeline.heard(refused(sent[0], RefusalReason.UNAUTHORIZED))
    assert calls[0].end is not None
    (skip,) = pipeline.outgoing(MUCH)
    assert skip.kind == Kind.SKIP
    pipeline.heard(refused(skip, RefusalReason.UNAUTHORIZED))
    assert not pipeline.outgoing(MUCH) and not pipeline.busy
