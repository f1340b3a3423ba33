"""Sessions: each command once, in order, with its first result for every retry."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trex_core import sessions as module
from trex_core.machine import TooOld
from trex_core.messages import NO_BALLOT, Ballot, Kind, OutcomeStatus, Value
from trex_core.sessions import (
    LEADER,
    NO_SESSIONS,
    Delivered,
    Session,
    decode_session,
    deliver,
    encode_session,
    next_sequence,
    sessions_of,
    why_not_owner,
)

APPLIED, FAILED = OutcomeStatus.APPLIED, OutcomeStatus.FAILED
EXPIRED, GAP, FORGOTTEN = (
    OutcomeStatus.SESSION_EXPIRED,
    OutcomeStatus.GAP,
    OutcomeStatus.FORGOTTEN,
)


class Log:
    """Applies commands by writing them down; ``b"bad"`` fails."""

    def __init__(self):
        self.sessions = NO_SESSIONS
        self.slot = 0
        self.applied = []

    def apply(self, slot, command):
        if command == b"bad":
            return FAILED, b"ValueError"
        self.applied.append((slot, command))
        return APPLIED, b"r:" + command

    def fix(self, kind, session=0, sequence=0, command=b"", unanswered=0):
        self.slot += 1
        value = Value(kind, Ballot(0, 1, 1), 0, session, sequence, unanswered, command)
        self.sessions, delivered = deliver(self.sessions, self.slot, value, self.apply)
        return delivered

    def open(self, owner=b""):
        return self.fix(Kind.OPEN, command=owner).slot

    def command(self, session, sequence, command=b"x", unanswered=0):
        return self.fix(Kind.COMMAND, session, sequence, command, unanswered)


def test_a_session_is_named_by_its_slot_and_its_commands_are_applied_in_order():
    log = Log()
    log.fix(Kind.NOOP)
    session = log.open()
    assert session == 2 and next_sequence(log.sessions, session) == 1
    assert log.command(session, 1, b"a") == Delivered(3, APPLIED, b"r:a")
    assert log.command(session, 2, b"b") == Delivered(4, APPLIED, b"r:b")
    assert log.applied == [(3, b"a"), (4, b"b")] and next_sequence(log.sessions, session) == 3


def test_noop_and_genesis_deliver_nothing():
    log = Log()
    assert log.fix(Kind.GENESIS) is None and log.fix(Kind.NOOP) is None


def test_a_retry_gets_the_first_result_and_slot_and_is_not_applied():
    log = Log()
    session = log.open()
    first = log.command(session, 1, b"a")
    log.command(session, 2, b"b")
    assert log.command(session, 1, b"something else") == first
    assert [command for _, command in log.applied] == [b"a", b"b"]


def test_a_failed_command_is_a_result_like_any_other():
    log = Log()
    session = log.open()
    assert log.command(session, 1, b"bad") == Delivered(2, FAILED, b"ValueError")
    assert log.command(session, 1, b"bad") == Delivered(2, FAILED, b"ValueError")
    assert next_sequence(log.sessions, session) == 2


def test_a_later_command_is_a_gap_and_waits_for_the_earlier_ones():
    log = Log()
    session = log.open()
    assert log.command(session, 2, b"b") == Delivered(2, GAP, b"")
    assert log.applied == []
    log.command(session, 1, b"a")
    assert log.command(session, 2, b"b").status == APPLIED


@pytest.mark.parametrize("sequence", [0, -3])
def test_a_sequence_below_the_first_is_never_applied(sequence):
    log = Log()
    assert log.command(log.open(), sequence).status == FORGOTTEN and log.applied == []


def test_what_the_client_acknowledged_is_forgotten():
    log = Log()
    session = log.open()
    for sequence in (1, 2, 3):
        log.command(session, sequence)
    log.command(session, 4, unanswered=3)
    assert [log.command(session, n).status for n in (1, 2, 3, 4)] == [
        FORGOTTEN, FORGOTTEN, APPLIED, APPLIED,
    ]  # fmt: skip


def test_an_old_retry_does_not_take_an_acknowledgement_back_nor_one_of_the_future_count():
    log = Log()
    session = log.open()
    for sequence in (1, 2, 3):
        log.command(session, sequence)
    log.command(session, 1, unanswered=3)
    log.command(session, 1, unanswered=1)
    assert log.sessions.open[session].unanswered == 3
    log.command(session, 4, unanswered=1 << 60)
    assert log.sessions.open[session].unanswered == 4
    assert log.command(session, 4).status == APPLIED


def test_skip_uses_up_a_sequence_or_says_what_became_of_it():
    log = Log()
    session = log.open()
    assert log.fix(Kind.SKIP, session, 1) == Delivered(2, APPLIED, b"")
    assert log.command(session, 1, b"late") == Delivered(2, APPLIED, b"")
    done = log.command(session, 2, b"done")
    assert log.fix(Kind.SKIP, session, 2) == done
    assert [command for _, command in log.applied] == [b"done"]


def test_unknown_and_closed_sessions_apply_nothing():
    log = Log()
    session = log.open()
    assert log.fix(Kind.CLOSE, session).status == APPLIED
    assert next_sequence(log.sessions, session) == 0
    for kind in (Kind.COMMAND, Kind.SKIP, Kind.CLOSE):
        assert log.fix(kind, session, 1, b"x").status == EXPIRED
    assert log.applied == []


def test_the_engine_needs_no_session():
    log = Log()
    assert log.fix(Kind.ENGINE, command=b"expire") == Delivered(1, APPLIED, b"r:expire")
    assert log.sessions == NO_SESSIONS


def test_a_later_leader_ends_what_an_earlier_one_proposed(monkeypatch):
    """What an earlier leader proposed may be recovered long after a later one led."""
    log = Log()
    anna = log.open(b"anna")
    earlier = log.open(LEADER)
    assert log.fix(Kind.ENGINE, earlier, command=b"in time").status == APPLIED
    later = log.open(LEADER)
    assert log.fix(Kind.ENGINE, earlier, command=b"recovered").status == EXPIRED
    assert log.fix(Kind.ENGINE, anna, command=b"of no leader").status == EXPIRED
    monkeypatch.setattr(module, "SESSIONS_MAX", 2)
    for name in range(3):  # others end each other's, never the leader's
        log.open(b"%d" % name)
    assert log.fix(Kind.ENGINE, later, command=b"now").status == APPLIED
    assert [command for _, command in log.applied] == [b"in time", b"now"]


def test_a_kind_of_the_future_stops_the_replica():
    with pytest.raises(TooOld, match="kind 99"):
        Log().fix(99)


def test_results_kept_are_limited_in_number_and_bytes(monkeypatch):
    monkeypatch.setattr(module, "SESSION_RESULTS_MAX", 3)
    monkeypatch.setattr(module, "SESSION_RESULT_BYTES_MAX", 100)
    log = Log()
    session = log.open()
    for sequence in range(1, 6):
        log.command(session, sequence)
    assert [log.command(session, n).status for n in range(1, 6)] == [
        FORGOTTEN, FORGOTTEN, APPLIED, APPLIED, APPLIED,
    ]  # fmt: skip
    log.command(session, 6, b"y" * 90)
    assert [len(r[2]) for r in log.sessions.open[session].results] == [3, 3, 92]
    huge = log.command(session, 7, b"z" * 500)
    assert log.command(session, 7) == huge, "the newest result stays, however large"
    assert len(log.sessions.open[session].results) == 1
    assert log.sessions.open[session].result_bytes == 502


def test_opening_beyond_a_limit_expires_the_session_unused_for_longest(monkeypatch):
    """Of the same owner, if it is at its own limit; else of all. What is counted for each owner
    follows from the sessions."""
    monkeypatch.setattr(module, "SESSIONS_MAX", 7)
    monkeypatch.setattr(module, "OWNER_SESSIONS_MAX", 3)
    monkeypatch.setattr(module, "EVICTION_BATCH", 3)
    chance = random.Random(7)
    log = Log()
    used: dict[int, tuple[int, bytes]] = {}
    ended = {"own": 0, "any": 0}
    for _ in range(4000):
        if chance.random() < 0.4:
            owner = chance.choice((b"a", b"b", b"c", b"d"))
            session = log.open(owner)
            own = [name for name, (_, whose) in used.items() if whose == owner]
            if len(own) == 3:
                del used[min(own, key=used.__getitem__)]
                ended["own"] += 1
            elif len(used) == 7:
                del used[min(used, key=used.__getitem__)]
                ended["any"] += 1
            used[session] = log.slot, owner
        elif chance.random() < 0.1 and used:
            gone = chance.choice(sorted(used))
            log.fix(Kind.CLOSE, gone)
            del used[gone]
        elif used:
            session = chance.choice(sorted(used))
            following = next_sequence(log.sessions, session)
            log.command(session, chance.choice([0, 1, following, 99]), unanswered=following - 2)
            used[session] = log.slot, used[session][1]
        assert set(log.sessions.open) == set(used)
        anew = sessions_of(log.sessions.open.items())
        assert counts(anew) == counts(log.sessions)
        if chance.random() < 0.05:  # a replica that came back from a snapshot has no cache
            log.sessions = anew
    assert min(ended.values()) > 100


def counts(sessions):
    return {
        owner: (owned.sessions, owned.results, owned.result_bytes)
        for owner, owned in sessions.owners.items()
    }


def test_nobody_opens_away_the_sessions_of_others(monkeypatch):
    monkeypatch.setattr(module, "SESSIONS_MAX", 8)
    monkeypatch.setattr(module, "OWNER_SESSIONS_MAX", 2)
    log = Log()
    alice = [log.open(b"alice"), log.open(b"alice")]
    for name in alice:
        log.command(name, 1)
    opened = [log.open(b"mallory") for _ in range(50)]
    assert set(log.sessions.open) == {*alice, *opened[-2:]}
    assert [log.command(name, 2).status for name in alice] == [APPLIED, APPLIED]


def test_results_of_all_sessions_of_an_owner_are_limited_together(monkeypatch):
    monkeypatch.setattr(module, "OWNER_RESULTS_MAX", 10)
    monkeypatch.setattr(module, "OWNER_RESULT_BYTES_MAX", 300)
    log = Log()
    alice, *mallory = log.open(b"alice"), *(log.open(b"mallory") for _ in range(4))
    for sequence in range(1, 9):
        assert log.command(alice, sequence).status == APPLIED
    for sequence in range(1, 6):
        for name in mallory:
            assert log.command(name, sequence, bytes(18)).status == APPLIED
    assert log.sessions.owners[b"mallory"].results <= 10
    assert [len(log.sessions.open[name].results) for name in mallory] == [3, 3, 2, 2]
    assert [log.command(mallory[3], n).status for n in (3, 4)] == [FORGOTTEN, APPLIED]
    assert [log.command(alice, n).status for n in range(1, 9)] == [APPLIED] * 8, "her own are kept"
    log.command(mallory[0], 6, bytes(200))
    log.command(mallory[1], 6, bytes(200))
    kept = [[len(body) for _, _, body in log.sessions.open[name].results] for name in mallory]
    assert kept[1] == [202] and sum(map(sum, kept)) <= 300 + 202


def test_a_session_survives_its_bytes():
    session = Session(4, 2, ((7, 0, b"a"), (9, 1, b"KeyError")), 11, 9)
    assert decode_session(encode_session(session)) == session


# --- against a twin that remembers everything


steps = st.lists(
    st.tuples(
        st.sampled_from([Kind.COMMAND, Kind.COMMAND, Kind.COMMAND, Kind.SKIP, Kind.NOOP]),
        st.integers(1, 2),
        st.integers(-1, 8),
        st.integers(0, 9),
        st.sampled_from([b"x", b"y", b"bad"]),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_every_history_is_applied_once_in_order(history):
    log = Log()
    names = {1: log.open(), 2: log.open()}
    firsts: dict[int, list[Delivered]] = {1: [], 2: []}
    for kind, which, sequence, unanswered, command in history:
        count = len(log.applied)
        delivered = log.fix(kind, names[which], sequence, command, unanswered)
        known = firsts[which]
        if kind == Kind.NOOP:
            assert delivered is None
            continue
        if sequence == len(known) + 1:
            assert delivered.slot == log.slot
            applies = kind == Kind.COMMAND and command != b"bad"
            assert len(log.applied) == count + applies
            known.append(delivered)
            continue
        assert len(log.applied) == count
        if sequence > len(known):
            assert delivered.status == GAP
        elif sequence < 1 or delivered.status == FORGOTTEN:
            session = log.sessions.open[names[which]]
            assert sequence < max(1, session.unanswered)
        else:
            assert delivered == known[sequence - 1]
    for which, name in names.items():
        session = log.sessions.open[name]
        assert session.next == len(firsts[which]) + 1
        assert len(session.results) == session.next - session.unanswered
        assert session.result_bytes == sum(len(body) for _, _, body in session.results)


def applied(_slot, _command):
    return OutcomeStatus.APPLIED, b"done"


def test_a_session_is_its_openers_whatever_is_done_in_it():
    sessions, _ = deliver(NO_SESSIONS, 7, Value(Kind.OPEN, NO_BALLOT, command=b"alice"), applied)
    for sequence in (1, 2, 1, 9):
        command = Value(Kind.COMMAND, NO_BALLOT, 0, 7, sequence, sequence, b"x")
        sessions, _ = deliver(sessions, 10 + sequence, command, applied)
        assert why_not_owner(sessions, 7, b"alice") == ""
        assert "session 7" in why_not_owner(sessions, 7, b"mallory")
        assert "session 7" in why_not_owner(sessions, 7, b"")
    assert decode_session(encode_session(sessions.open[7])).owner == b"alice"
    assert why_not_owner(sessions, 8, b"mallory") == "", "not open: it expired, and says so itself"
