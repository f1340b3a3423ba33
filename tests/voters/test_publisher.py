"""The stream of one voter: cut to datagrams, announced by tips, repaired under a cap."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from msgspec.structs import replace

from trex_core import shelf
from trex_core.messages import (
    DATAGRAM_BYTES_MAX,
    WORDS_BYTES,
    Ballot,
    Kind,
    ListenerReport,
    RepairRequest,
    StreamRun,
    StreamTip,
    Transition,
    Value,
    VoterDigest,
    encode_value,
)
from trex_core.roster import NAME_BYTES_MAX, VERSION_BYTES_MAX, Roster
from trex_core.seal import Signer, Verifier
from trex_core.shelf import REPAIR_LINGER_S
from trex_core.state import FixedRun, chain_run, chain_start
from trex_core.wire import DATAGRAM_BODY_BYTES_MAX, HEADER_BYTES, decode_stream
from voters import publisher
from voters.publisher import Publisher
from voters.server import WHY_CHARS_MAX

BALLOT = Ballot(0, 3, 1)
GENESIS = chain_start(bytes(16))
DIGEST = VoterDigest("leader", BALLOT, 1, 1, 1, 1, 1, 1, "0")


SIGNER = Signer(bytes(32), bytes(16), 1)
VERIFIER = Verifier({1: SIGNER.public}, bytes(16))


def unsigned(message, body):
    """``message`` without its signatures, which are good."""
    tip = (message.ballot, message.tip_slot, message.tip_chain)
    assert VERIFIER.tip(message.signer, *tip, message.signature)
    if isinstance(message, StreamTip):
        assert VERIFIER.words(1, body[:-WORDS_BYTES], message.words)
        message = replace(message, words=b"")
    return replace(message, signer=0, signature=b"")


class Stream:
    """A publisher and the messages it sent."""

    def __init__(self, bytes_per_s=1 << 24, burst=64):
        self.bodies = []
        self.counted = Counter()
        self.publisher = Publisher(self.bodies.append, self.count, bytes_per_s, burst, SIGNER, 1)
        self.publisher.reset(0, GENESIS)
        self.last, self.chain = 0, GENESIS

    def count(self, name):
        self.counted[name] += 1

    def fix(self, *sizes, leading=True):
        values = tuple(
            encode_value(Value(Kind.COMMAND, BALLOT, command=bytes([n % 256]) * size))
            for n, size in enumerate(sizes)
        )
        chains = chain_run(self.chain, self.last + 1, values)
        run = FixedRun(self.last + 1, self.chain, values, chains)
        self.publisher.fixed(run, BALLOT, leading)
        self.last, self.chain = run.last, chains[-1]
        return run

    def ask(self, first, last):
        self.publisher.request(RepairRequest("a listener", 1, first, last))

    def sent(self):
        messages = [unsigned(decode_stream(body), body) for body in self.bodies]
        assert all(len(body) <= DATAGRAM_BODY_BYTES_MAX for body in self.bodies)
        self.bodies.clear()
        return messages


def drain(stream, now_s=1.0):
    while stream.publisher.pump(now_s):
        now_s += 1.0
    return stream.sent()


def test_a_small_run_is_one_datagram_with_the_chain_before_it_and_the_tip():
    stream = Stream()
    run = stream.fix(20, 30)
    assert drain(stream) == [StreamRun(BALLOT, 1, GENESIS, run.values, 2, run.chains[-1])]


@pytest.mark.parametrize("size", [1, 100, 500, 900, 1050])
def test_a_run_is_cut_so_that_each_datagram_stands_alone(size):
    stream = Stream()
    run = stream.fix(*[size] * 40)
    sent = drain(stream)
    assert [m for m in sent if m.repair] == []
    values, before, first = (), GENESIS, 1
    for message in sent:
        assert (message.first, message.chain_before) == (first, before)
        assert (message.tip_slot, message.tip_chain) == (40, run.chains[-1])
        before = chain_run(before, first, message.values)[-1]
        first += len(message.values)
        values += message.values
    assert values == run.values
    for one, two in itertools.pairwise(sent):
        both = sum(len(value) + 5 for value in (*one.values, two.values[0]))
        assert both > shelf.RUN_VALUES_BYTES_MAX, "datagrams are filled"


def test_a_value_too_large_is_left_out_and_the_tip_announces_it():
    stream = Stream()
    run = stream.fix(10, 5000, 10)
    sent = drain(stream)
    assert [(m.first, len(m.values)) for m in sent] == [(1, 1), (3, 1)]
    assert sent[1].chain_before == run.chains[1]
    assert stream.publisher.announce
    stream.publisher.tip(BALLOT, True, DIGEST)
    assert stream.sent() == [StreamTip(BALLOT, True, 3, run.chains[-1], DIGEST)]
    assert not stream.publisher.announce


def test_all_that_one_turn_fixes_is_cut_and_signed_once(monkeypatch):
    signed = []
    sign = Signer.tip
    monkeypatch.setattr(Signer, "tip", lambda *of: signed.append(of[2]) or sign(*of))
    stream = Stream()
    runs = [stream.fix(300), stream.fix(300, 300), stream.fix(300)]
    assert signed == [], "who waits for a reply does not wait for a signature"
    sent = drain(stream)
    assert [(m.first, len(m.values)) for m in sent] == [(1, 3), (4, 1)]
    assert {(m.tip_slot, m.tip_chain) for m in sent} == {(4, runs[-1].chains[-1])}
    assert signed == [4]


def test_what_waits_when_a_snapshot_is_installed_is_not_streamed():
    stream = Stream()
    stream.fix(10, 10)
    stream.publisher.reset(1000, bytes(32))
    assert not stream.publisher.waiting
    assert drain(stream) == []


MOST = (1 << 63) - 1
WORST_BALLOT = Ballot(MOST, MOST, MOST)


def worst_digest(transitions=8):
    """What no voter of seven could exceed."""
    numbers = [MOST] * 2
    return VoterDigest(
        "candidate", WORST_BALLOT, MOST, MOST, MOST, MOST, MOST, MOST, "v" * 64,
        MOST, MOST, MOST, MOST, MOST, False, MOST, *numbers, *numbers, (MOST,) * 7,
        tuple(
            Transition(number, MOST, "candidate", WORST_BALLOT, MOST, MOST, "y" * WHY_CHARS_MAX)
            for number in range(1, transitions + 1)
        ),
    )  # fmt: skip


def some_roster():
    roster = Roster()
    for index in range(40):
        roster.heard(
            ListenerReport(
                "n" * NAME_BYTES_MAX, index, *[MOST] * 4, True, *[MOST] * 5, "v" * VERSION_BYTES_MAX
            ),
            0,
        )
    for index in range(40):
        roster.heard(ListenerReport(f"l-{index}", index, 7, 7, 7, 0, True, 0, 0, 0, 0, 9, "1.0"), 0)
    return roster


@pytest.mark.parametrize("transitions", range(9))
def test_a_tip_is_one_datagram_whatever_is_to_be_told(transitions):
    stream, roster = Stream(), some_roster()
    for _ in range(40):
        digest = worst_digest(transitions)
        stream.publisher.tip(WORST_BALLOT, True, digest, lambda most: roster.digest(0, most))
        (tip,) = stream.sent()
        told = tip.digest
        assert (told.listeners.known, told.listeners.lag_max) == (80, 0)
        assert replace(told, transitions=(), listeners=DIGEST.listeners) == worst_digest(0)
        newest = digest.transitions[transitions - len(told.transitions) :]
        assert told.transitions == newest, "the oldest go first"
        assert len(told.transitions) >= min(transitions, 3)


def test_listeners_get_the_space_that_is_left_and_take_turns():
    stream, roster = Stream(), some_roster()
    shown = set()
    for _ in range(60):
        stream.publisher.tip(BALLOT, True, DIGEST, lambda most: roster.digest(0, most))
        (tip,) = stream.sent()
        assert len(tip.digest.listeners.rows) >= 3
        shown |= {(seen.report.name, seen.report.instance) for seen in tip.digest.listeners.rows}
    assert len(shown) == 80


def test_who_does_not_lead_streams_nothing_but_can_repair():
    stream = Stream()
    run = stream.fix(10, 10, leading=False)
    assert drain(stream) == []
    stream.ask(2, 2)
    (repair,) = drain(stream)
    assert repair == StreamRun(
        BALLOT, 2, run.chains[0], run.values[1:], 2, run.chains[-1], repair=True
    )


def test_a_burst_is_paced():
    stream = Stream(burst=5)
    stream.fix(*[1000] * 12)
    counts = []
    while True:
        more = stream.publisher.pump(1.0)
        counts.append(len(stream.sent()))
        if not more:
            break
    assert counts == [5, 5, 2]


def test_a_range_is_repaired_in_as_few_datagrams_as_it_fills():
    stream = Stream()
    run = stream.fix(*[300] * 30)
    drain(stream)
    stream.ask(5, 24)
    repairs = drain(stream)
    assert sum((m.values for m in repairs), ()) == run.values[4:24]
    assert all(m.repair for m in repairs)
    assert len(repairs) == 7


def test_everybody_hears_a_repair_so_it_is_not_repeated_at_once():
    stream = Stream()
    stream.fix(*[300] * 9)
    drain(stream)
    stream.ask(1, 9)
    stream.publisher.pump(10.0)
    assert len(stream.sent()) == 3
    stream.ask(2, 9)
    stream.publisher.pump(10.0 + REPAIR_LINGER_S / 2)
    assert stream.sent() == []
    stream.ask(2, 9)
    stream.publisher.pump(10.0 + REPAIR_LINGER_S * 2)
    assert len(stream.sent()) == 3


def test_the_same_range_asked_by_many_waits_once():
    stream = Stream()
    stream.fix(*[300] * 9)
    for _ in range(1000):
        stream.ask(1, 9)
    assert stream.counted["repair.taken"] == 1
    assert stream.counted["repair.repeated"] == 999


def test_repairs_have_a_cap_of_their_own_and_commits_do_not_share_it():
    stream = Stream(bytes_per_s=20_000)
    stream.fix(*[1000] * 100)
    drain(stream)
    sent = repaired = 0
    now_s = 100.0
    for _ in range(200):  # two seconds of listeners that lose everything, and of commits
        now_s += 0.01
        stream.fix(10)
        stream.ask(1, 100)
        stream.publisher.pump(now_s)
        for message in stream.sent():
            if message.repair:
                repaired += 1000
            else:
                sent += 1
    assert sent == 200, "each commit left at once"
    assert repaired <= 2 * 20_000 + 4_000
    assert repaired >= 20_000
    assert stream.counted["repair.capped"] > 0


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_the_cap_counts_whole_datagrams_however_small(size):
    stream = Stream(bytes_per_s=20_000)
    stream.fix(*[size] * 500)
    drain(stream)
    sent = 0
    for turn in range(1000):
        first = 1 + turn % 500  # one slot at a time, so that most of each datagram is its frame
        stream.ask(first, first)
        stream.publisher.pump(100.0 + turn / 100)
        sent += sum(HEADER_BYTES + len(body) for body in stream.bodies)
        stream.bodies.clear()
    assert 150_000 < sent <= 10 * 20_000 + 2 * DATAGRAM_BYTES_MAX


def test_who_asks_for_a_value_too_large_has_no_tip_multicast():
    stream = Stream()
    stream.fix(10, 5000, 10)
    drain(stream)
    stream.publisher.tip(BALLOT, True, DIGEST)
    stream.ask(2, 2)
    stream.publisher.pump(100.0)
    assert not stream.publisher.announce, "a tip leaves beside the cap"


def test_requests_beyond_what_may_wait_are_dropped():
    stream = Stream()
    stream.fix(*[10] * 500)
    drain(stream)
    for first in range(1, 300):
        stream.ask(first, first)
    assert stream.counted["repair.queue_full"] == 299 - shelf.REPAIR_RANGES_MAX


def test_one_request_is_looked_at_up_to_a_limit():
    stream = Stream()
    stream.fix(*[1] * 3000)
    drain(stream)
    stream.ask(1, 1 << 60)
    assert sum(len(m.values) for m in drain(stream)) == shelf.REPAIR_SLOTS_MAX


@pytest.mark.parametrize(("first", "last"), [(11, 20), (9, 3), (-5, 0), (0, 0), (1 << 62, 1 << 63)])
def test_what_is_not_held_is_not_repaired(first, last):
    stream = Stream()
    stream.fix(*[10] * 10)
    drain(stream)
    stream.ask(first, last)
    assert drain(stream) == []
    assert stream.counted == {"repair.not_held": 1}


def test_memory_is_bounded_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(publisher, "RECENT_BYTES_MAX", 100_000)
    stream = Stream()
    for _ in range(300):
        stream.fix(1000)
        drain(stream)
    assert stream.publisher._shelf._bytes <= 100_000
    assert len(stream.publisher._shelf._held) < 100
    stream.ask(1, 300)
    assert {m.first for m in drain(stream)} == set(range(stream.publisher._shelf.first, 301))


def test_a_run_larger_than_all_memory_harms_nobody(monkeypatch):
    monkeypatch.setattr(publisher, "RECENT_BYTES_MAX", 5_000)
    stream = Stream()
    stream.fix(*[1000] * 20)
    assert [m.first for m in drain(stream)] == [17, 18, 19, 20]
    stream.ask(1, 3)
    assert drain(stream) == []


def test_a_range_that_went_while_it_waited_is_let_go(monkeypatch):
    stream = Stream()
    stream.fix(*[100] * 10)
    drain(stream)
    stream.ask(1, 10)
    monkeypatch.setattr(stream.publisher._shelf, "_slots_max", 5)
    stream.fix(*[100] * 10)
    assert [m.first for m in drain(stream) if m.repair] == []


def test_after_an_installed_snapshot_the_stream_begins_anew():
    stream = Stream()
    stream.fix(*[10] * 5)
    drain(stream)
    stream.publisher.reset(1000, bytes(32))
    stream.last, stream.chain = 1000, bytes(32)
    run = stream.fix(10)
    assert drain(stream) == [StreamRun(BALLOT, 1001, bytes(32), run.values, 1001, run.chains[-1])]
    stream.ask(1, 2000)
    assert [m.first for m in drain(stream)] == [1001]
