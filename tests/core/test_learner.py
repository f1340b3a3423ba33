"""The learner alone: order, uniqueness, repair, suppression, catch-up, and no wait for ever."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from trex_core import learner
from trex_core.learner import (
    REPAIR_ROUNDS_MAX,
    CatchupFailed,
    CatchupIn,
    Clock,
    HelperHeard,
    Installed,
    LearnerConfig,
    RepairHeard,
    StreamIn,
    learn,
)
from trex_core.messages import (
    NO_BALLOT,
    VOTER_ID_MAX,
    AskOther,
    CatchupEntries,
    RepairRequest,
    SignedTip,
    StreamRun,
    StreamTip,
    VoterDigest,
)
from trex_core.state import chain_run, chain_start

CLUSTER = b"c" * 16
CONFIG = LearnerConfig(name="one", voters=(1, 2, 3))
VALUES = tuple(b"\x97\x01value-%d" % n for n in range(1, 3001))
CHAINS = (chain_start(CLUSTER), *chain_run(chain_start(CLUSTER), 1, VALUES))
DIGEST = VoterDigest("leader", NO_BALLOT, 0, 0, 0, 0, 0, 0, "1")


def run(first: int, last: int, *, repair: bool = False, tip: int | None = None) -> StreamRun:
    tip = last if tip is None else tip
    values = VALUES[first - 1 : last]
    return StreamRun(NO_BALLOT, first, CHAINS[first - 1], values, tip, CHAINS[tip], repair)


def tip(slot: int, *, leading: bool = True) -> StreamTip:
    return StreamTip(NO_BALLOT, leading, slot, CHAINS[slot], DIGEST)


def entries(first: int, last: int, tip_slot: int) -> CatchupEntries:
    values = VALUES[first - 1 : last]
    return CatchupEntries(first, CHAINS[first - 1], values, signed(last), signed(tip_slot))


def signed(slot: int) -> SignedTip:
    return SignedTip(slot, CHAINS[slot], NO_BALLOT, 1, b"")


class Driven:
    """A learner driven by hand; remembers what it delivered, asked and counted."""

    def __init__(self, config: LearnerConfig = CONFIG, slot: int = 0) -> None:
        self.config = config
        self.state = learner.first_state(CLUSTER, slot, CHAINS[slot])
        self.start = slot
        self.delivered: list[bytes] = []
        self.requests: list[RepairRequest] = []
        self.catchup: list[learner.CatchUpFrom] = []
        self.counters: dict[str, int] = {}
        self.wake_ms: int | None = None

    def take(self, event: learner.LearnerEvent) -> learner.LearnEffects:
        self.state, effects = learn(self.config, self.state, event)
        for piece in effects.deliver:
            assert piece.first == self.start + len(self.delivered) + 1, "in order, without a gap"
            self.delivered.extend(piece.values)
        self.requests.extend(effects.requests)
        self.catchup.extend(effects.catchup)
        for name in effects.counters:
            self.counters[name] = self.counters.get(name, 0) + 1
        self.wake_ms = effects.wake_ms
        return effects


def test_runs_in_order_are_delivered_at_once() -> None:
    one = Driven()
    one.take(StreamIn(1, run(1, 5), 0))
    one.take(StreamIn(1, run(6, 6), 1))
    assert tuple(one.delivered) == VALUES[:6]
    assert not one.requests and not one.catchup


def test_a_repeat_or_overlap_is_delivered_once() -> None:
    one = Driven()
    for first, last in ((1, 5), (1, 5), (3, 8), (8, 8)):
        one.take(StreamIn(1, run(first, last), 0))
    assert tuple(one.delivered) == VALUES[:8]
    assert one.counters["duplicate"] == 2


def test_an_early_run_waits_and_follows_the_one_it_needs() -> None:
    one = Driven()
    one.take(StreamIn(1, run(4, 6), 0))
    one.take(StreamIn(1, run(9, 9), 0))
    assert not one.delivered
    one.take(StreamIn(1, run(1, 3), 0))
    assert tuple(one.delivered) == VALUES[:6]
    one.take(StreamIn(1, run(7, 8), 0))
    assert tuple(one.delivered) == VALUES[:9]


def test_a_gap_asks_a_voter_that_does_not_lead_then_another_then_tcp() -> None:
    one = Driven()
    now = 0
    one.take(StreamIn(1, run(1, 1), now))
    for voter in (2, 3):
        one.take(StreamIn(voter, tip(5, leading=False), now))
    one.take(StreamIn(1, run(4, 5), now))
    while not one.catchup:
        assert one.wake_ms is not None and one.wake_ms > now and now < 500
        now = one.wake_ms
        one.take(Clock(now))
    assert [(r.first, r.last) for r in one.requests] == [(2, 3), (2, 3)]
    assert {r.responder for r in one.requests} == {2, 3}
    assert one.catchup[0].first == 2


def test_a_repair_closes_the_gap_and_is_counted_as_one() -> None:
    one = Driven()
    one.take(StreamIn(1, run(3, 4), 0))
    one.take(StreamIn(2, run(1, 2, repair=True, tip=4), 5))
    assert tuple(one.delivered) == VALUES[:4]
    assert one.counters["gap_opened"] == one.counters["gap_closed_by_repair"] == 1


def test_a_lost_last_datagram_is_noticed_by_the_heartbeat() -> None:
    one = Driven()
    one.take(StreamIn(1, run(1, 1), 0))
    one.take(StreamIn(1, tip(2), 100))
    one.take(Clock(100 + CONFIG.backoff_ms_max))
    assert [(r.first, r.last) for r in one.requests] == [(2, 2)]


def test_hearing_anothers_request_suppresses_ones_own() -> None:
    one = Driven()
    one.take(StreamIn(1, run(3, 3), 0))
    one.take(RepairHeard(RepairRequest("two", 2, 1, 2), 1))
    one.take(Clock(CONFIG.backoff_ms_max + 1))
    assert not one.requests
    assert one.counters["repair_suppressed"] == 1
    one.take(StreamIn(2, run(1, 2, repair=True), 12))
    assert tuple(one.delivered) == VALUES[:3]


def test_who_asks_again_and_again_puts_the_catch_up_off_by_two_rounds_only() -> None:
    one = Driven()
    one.take(StreamIn(1, run(3, 3), 0))
    for now in range(1, 1000):  # one every millisecond, of a listener that wants no repair
        one.take(RepairHeard(RepairRequest("two", 2, 1, 2), now))
        one.take(StreamIn(1, tip(3), now))  # the stream is not silent
        if one.catchup:
            break
    assert one.catchup and now <= 2 * CONFIG.repair_wait_ms + CONFIG.backoff_ms_max
    assert one.counters["repair_suppressed"] == REPAIR_ROUNDS_MAX


def test_far_behind_or_cold_goes_to_tcp_in_chunks_and_back_to_the_stream() -> None:
    one = Driven()
    one.take(StreamIn(1, tip(2900), 0))
    assert [asked.first for asked in one.catchup] == [1]
    voter = one.catchup[0].helper
    one.take(StreamIn(1, run(2901, 2902), 1))
    one.take(CatchupIn(voter, entries(1, 1500, 2902), 2))
    assert one.catchup[-1] == learner.CatchUpFrom(voter, 1501)
    one.take(CatchupIn(voter, entries(1501, 2900, 2902), 3))
    assert tuple(one.delivered) == VALUES[:2902]
    assert one.state.catching is None
    one.take(StreamIn(1, run(2903, 2903), 4))
    assert len(one.delivered) == 2903


@pytest.mark.parametrize("answer", ["failed", "ask other", "nothing newer"])
def test_whatever_a_voter_answers_another_is_asked(answer: str) -> None:
    one = Driven()
    one.take(StreamIn(1, tip(2900), 0))
    asked = [one.catchup[0].helper]
    now = 0
    while len(set(asked)) < 3:
        match answer:
            case "failed":
                one.take(CatchupFailed(asked[-1], now))
            case "ask other":
                one.take(CatchupIn(asked[-1], AskOther(0, "no"), now))
            case _:
                one.take(CatchupIn(asked[-1], entries(1, 0, 0), now))
        assert one.wake_ms is not None
        assert len(asked) < 9, "one that knows no more is asked for ever"
        now = one.wake_ms
        one.take(Clock(now))
        assert len(one.catchup) == len(asked) + 1, "asks again when it said it would"
        asked.append(one.catchup[-1].helper)


def test_a_silent_stream_is_replaced_by_tcp() -> None:
    one = Driven()
    one.take(Clock(0))
    assert one.wake_ms == CONFIG.silence_ms
    one.take(Clock(CONFIG.silence_ms))
    assert len(one.catchup) == 1
    one.take(CatchupIn(one.catchup[0].helper, entries(1, 0, 0), CONFIG.silence_ms + 5))
    assert one.state.catching is None
    one.take(Clock(2 * CONFIG.silence_ms + 5))
    assert len(one.catchup) == 2


def test_heartbeats_recorded_before_a_voter_restarted_do_not_hide_a_silence() -> None:
    one = Driven()
    old, new = (replace(tip(1), digest=replace(DIGEST, boot=boot)) for boot in (1, 2))
    one.take(StreamIn(1, run(1, 1), 0))
    one.take(StreamIn(1, new, 0))
    for now in range(0, 2 * CONFIG.silence_ms, 50):
        one.take(StreamIn(1, old, now))
    assert one.catchup and one.catchup[0].first == 2
    assert one.counters["earlier_boot"] == 40


def test_a_snapshot_jump_continues_where_it_ends() -> None:
    one = Driven()
    one.take(StreamIn(1, tip(2900), 0))
    voter = one.catchup[0].helper
    state, effects = learn(one.config, one.state, Installed(2500, CHAINS[2500], 9))
    assert effects.catchup == (learner.CatchUpFrom(voter, 2501),)
    assert state.slot == 2500


def test_what_came_early_is_delivered_when_a_snapshot_brings_the_slots_before_it() -> None:
    one = Driven()
    for first in (2491, 2501, 2511):
        one.take(StreamIn(1, run(first, first + 9), 0))
    assert not one.delivered
    state, effects = learn(one.config, one.state, Installed(2495, CHAINS[2495], 9))
    slots = [(piece.first, piece.last) for piece in effects.deliver]
    assert slots == [(2496, 2500), (2501, 2510), (2511, 2520)]
    assert (state.slot, state.chain, state.buffer) == (2520, CHAINS[2520], ())
    assert state.catching is None
    assert not effects.catchup, "nobody is asked for what is here"


def test_a_run_that_does_not_continue_the_chain_is_dropped_and_counted() -> None:
    one = Driven()
    one.take(StreamIn(1, run(1, 2), 0))
    forged = StreamRun(NO_BALLOT, 3, b"x" * 32, (b"\x97\x01evil",), 3, CHAINS[3])
    one.take(StreamIn(2, forged, 1))
    assert tuple(one.delivered) == VALUES[:2]
    assert one.counters["chain_mismatch"] == 1
    one.take(StreamIn(1, run(3, 3), 2))
    assert tuple(one.delivered) == VALUES[:3]


def test_the_buffer_is_bounded() -> None:
    config = LearnerConfig(name="small", voters=(1, 2, 3), buffer_slots_max=10)
    one = Driven(config)
    for first in range(3, 60, 2):
        one.take(StreamIn(1, run(first, first), 0))
    assert one.counters.get("buffer_full", 0) > 0
    assert sum(len(p.values) for p in one.state.buffer) <= 10


def test_a_stranger_is_not_listened_to() -> None:
    one = Driven()
    before = one.state
    one.take(StreamIn(9, run(1, 2), 0))
    assert one.counters == {"stranger": 1} and not one.delivered
    assert one.state.slot == before.slot and one.state.heard == before.heard


def test_a_tip_of_another_chain_is_counted() -> None:
    one = Driven()
    one.take(StreamIn(1, run(1, 2), 0))
    one.take(StreamIn(2, StreamTip(NO_BALLOT, False, 2, b"x" * 32, DIGEST), 1))
    assert one.counters["chain_mismatch"] == 1 and one.state.chain == CHAINS[2]


@pytest.mark.parametrize(
    ("first", "last", "suppressed"), [(1, 9, 1), (2, 2, 1), (3, 9, 0), (2, 1, 0)]
)
def test_only_a_request_for_all_of_ones_gap_suppresses_ones_own(first, last, suppressed) -> None:
    one = Driven()
    one.take(RepairHeard(RepairRequest("two", 2, 1, 2), 0))  # no gap yet
    one.take(StreamIn(1, run(1, 1), 0))
    one.take(StreamIn(1, run(3, 3), 0))
    one.take(RepairHeard(RepairRequest(CONFIG.name, 2, 2, 2), 1))  # its own
    assert "repair_suppressed" not in one.counters
    one.take(RepairHeard(RepairRequest("two", 2, first, last), 1))
    assert one.counters.get("repair_suppressed", 0) == suppressed


def test_only_the_voter_asked_is_heard_in_a_catch_up() -> None:
    one = Driven()
    one.take(CatchupIn(1, entries(1, 2, 2), 0))  # nobody was asked
    one.take(StreamIn(1, tip(2900), 0))
    asked = one.catchup[0].helper
    other = next(voter for voter in CONFIG.voters if voter != asked)
    before = one.state
    one.take(CatchupIn(other, entries(1, 1500, 2900), 1))
    one.take(CatchupFailed(other, 2))
    assert not one.delivered and one.state.catching == before.catching


def test_a_catch_up_of_another_chain_is_asked_for_elsewhere() -> None:
    one = Driven()
    one.take(StreamIn(1, tip(2900), 0))
    asked = one.catchup[0].helper
    forged = CatchupEntries(1, b"x" * 32, VALUES[:5], signed(5), signed(2900))
    one.take(CatchupIn(asked, forged, 1))
    assert not one.delivered and one.state.catching.helper == 0
    assert one.wake_ms is not None
    one.take(Clock(one.wake_ms))
    assert one.catchup[-1].helper != asked


def test_a_snapshot_of_what_is_known_changes_nothing() -> None:
    one = Driven(slot=10)
    one.take(StreamIn(1, tip(10), 0))
    one.take(Installed(7, CHAINS[7], 1))
    assert (one.state.slot, one.state.chain) == (10, CHAINS[10])
    one.take(StreamIn(1, tip(20), 2))
    one.take(Installed(12, CHAINS[12], 3))
    assert one.state.slot == 12 and not one.catchup, "it caught up with nobody"


def test_a_stream_that_speaks_again_ends_a_catch_up_that_waits() -> None:
    one = Driven()
    one.take(Clock(0))
    one.take(Clock(CONFIG.silence_ms))
    asked = one.catchup[0].helper
    one.take(StreamIn(1, run(1, 1), CONFIG.silence_ms + 1))
    assert one.state.catching.helper == asked, "who was asked will answer"
    one.take(CatchupFailed(asked, CONFIG.silence_ms + 2))
    assert one.state.catching is None and len(one.catchup) == 1


def test_backoff_is_short_for_few_of_many() -> None:
    """RFC 5401: of 1,000 listeners that miss the same datagram only a few ask in the first ms."""
    waits = [
        learner.repair_backoff_ms(LearnerConfig(name=f"n{i}", voters=(1,)), 7, 0)
        for i in range(1000)
    ]
    early = sum(wait <= min(waits) + 1 for wait in waits)
    assert max(waits) <= CONFIG.backoff_ms_max
    assert 1 <= early <= 12


@pytest.mark.parametrize("seed", range(40))
def test_random_loss_duplication_and_reorder_converge(seed: int) -> None:
    """Streams, repairs and TCP answers are lost; nothing is delivered twice, early or never."""
    chance = random.Random(seed)
    one = Driven(LearnerConfig(name=f"r{seed}", voters=(1, 2, 3), seed=seed))
    loss = chance.choice((0.05, 0.3, 0.7))
    pending: list[tuple[int, StreamRun | StreamTip]] = []
    sent, asked = 0, 0
    for now in range(6000):
        if sent < 600:
            last = min(600, sent + chance.randint(1, 4))
            pending.append((1, run(sent + 1, last)))
            sent = last
        elif chance.random() < 0.2:
            pending.append((1, tip(sent)))
        if pending and chance.random() < 0.8:
            sender, message = pending.pop(chance.randrange(min(4, len(pending))))
            if chance.random() >= loss:
                one.take(StreamIn(sender, message, now))
            if chance.random() < 0.1:
                pending.append((sender, message))
        for request in one.requests:
            assert request.responder != 1 or not one.state.heard, "the leader is not asked"
            if chance.random() >= loss:
                last = min(request.last, sent)
                repair = run(request.first, last, repair=True, tip=sent)
                pending.append((request.responder, repair))
        one.requests.clear()
        if len(one.catchup) > asked:
            asked = len(one.catchup)
            ask = one.catchup[-1]
            if chance.random() < 0.3:
                one.take(CatchupFailed(ask.helper, now))
            else:
                one.take(
                    CatchupIn(ask.helper, entries(ask.first, min(sent, ask.first + 40), sent), now)
                )
        if one.wake_ms is not None and now >= one.wake_ms:
            one.take(Clock(now))
        if len(one.delivered) == 600:
            break
    assert tuple(one.delivered) == VALUES[:600]


@pytest.mark.parametrize("first", [-3, 0, 2**64 - 1])
def test_slots_that_cannot_be_are_dropped_and_counted(first: int) -> None:
    """Bytes from outside that decode: nothing is delivered, nothing raises."""
    config = learner.LearnerConfig("one", (1, 2, 3))
    before = learner.first_state(bytes(16))
    run = StreamRun(NO_BALLOT, first, bytes(32), (b"v",) * 9, 3, bytes(32))
    after, effects = learner.learn(config, before, learner.StreamIn(1, run, 1))
    assert (after.slot, effects.deliver) == (0, ())
    assert effects.counters == (("malformed",) if first < 1 else ())


# --- listeners that help ----------------------------------------------------------------------

KIND = tuple(VOTER_ID_MAX + n for n in range(1, 20))


def test_the_second_request_for_a_repair_names_a_listener_that_helps() -> None:
    one = Driven()
    one.take(StreamIn(2, tip(1, leading=False), 0))
    one.take(HelperHeard(KIND[0], True, 0))
    one.take(StreamIn(1, run(3, 3), 0))
    now = 0
    while len(one.requests) < 2:
        assert one.wake_ms is not None and not one.catchup
        now = one.wake_ms
        one.take(Clock(now))
    first, second = one.requests
    assert first.responder in CONFIG.voters and second.responder == KIND[0]
    one.take(StreamIn(0, run(1, 2, repair=True), now))
    assert tuple(one.delivered) == VALUES[:3]
    assert one.counters["gap_closed_by_repair"] == 1


@pytest.mark.parametrize("why", ["never heard", "not able any more", "silent for long"])
def test_without_a_helper_another_voter_is_named(why: str) -> None:
    one = Driven()
    if why != "never heard":
        one.take(HelperHeard(KIND[0], True, 0))
    if why == "not able any more":
        one.take(HelperHeard(KIND[0], False, 1))
    now = learner.HELPER_MS if why == "silent for long" else 1
    one.take(StreamIn(1, run(3, 3), now))
    while len(one.requests) < 2:
        assert one.wake_ms is not None and not one.catchup
        now = one.wake_ms
        one.take(Clock(now))
    assert {r.responder for r in one.requests} <= set(CONFIG.voters)


def test_helpers_remembered_are_few_and_the_newest() -> None:
    one = Driven()
    for now, instance in enumerate((*KIND, KIND[3])):
        one.take(HelperHeard(instance, True, now))
    held = [helper.instance for helper in one.state.helpers]
    assert len(held) == learner.HELPERS_MAX == len(set(held)) and held[-1] == KIND[3]


def test_catch_up_asks_all_voters_first_and_then_listeners_in_between() -> None:
    one = Driven()
    one.take(HelperHeard(KIND[0], True, 0))
    one.take(StreamIn(1, tip(2900), 0))
    now = 0
    while len(one.catchup) < 9:
        one.take(CatchupFailed(one.catchup[-1].helper, now))
        assert one.wake_ms is not None
        now = one.wake_ms
        one.take(HelperHeard(KIND[0], True, now))
        one.take(Clock(now))
    asked = [ask.helper for ask in one.catchup]
    assert set(asked[:3]) == {1, 2, 3}
    assert asked[3::2] == [KIND[0]] * 3 and set(asked[4::2]) == {1, 2, 3}


def test_a_listener_gives_one_answer_and_then_it_is_a_voters_turn() -> None:
    """However little it gives, and however slowly: no listener can hold another up."""
    one = Driven()
    one.take(HelperHeard(KIND[0], True, 0))
    one.take(StreamIn(1, tip(2900), 0))
    now = 0
    while one.catchup[-1].helper != KIND[0]:
        one.take(CatchupFailed(one.catchup[-1].helper, now))
        assert one.wake_ms is not None
        now = one.wake_ms
        one.take(Clock(now))
    one.take(CatchupIn(KIND[0], entries(1, 1, 2900), now))
    assert one.catchup[-1].helper in CONFIG.voters and one.catchup[-1].first == 2
    one.take(CatchupIn(one.catchup[-1].helper, entries(2, 500, 2900), now))
    assert one.catchup[-1].helper == one.catchup[-2].helper, "a voter goes on"


def test_a_listener_says_nothing_of_who_lives_and_leads() -> None:
    one = Driven()
    one.take(StreamIn(1, tip(1), 0))
    before = one.state
    one.take(StreamIn(0, run(1, 1, repair=True), 500))
    assert tuple(one.delivered) == VALUES[:1]
    assert (one.state.heard, one.state.heard_ms) == (before.heard, before.heard_ms)
    one.take(StreamIn(0, run(2, 2), 500))
    assert one.counters["stranger"] == 1 and len(one.delivered) == 1


def test_a_snapshot_offered_by_a_listener_is_one_answer_too() -> None:
    one = Driven()
    one.take(HelperHeard(KIND[0], True, 0))
    one.take(StreamIn(1, tip(2900), 0))
    now = 0
    while one.catchup[-1].helper != KIND[0]:
        one.take(CatchupFailed(one.catchup[-1].helper, now))
        assert one.wake_ms is not None
        now = one.wake_ms
        one.take(Clock(now))
    one.take(Installed(100, CHAINS[100], now))
    assert one.catchup[-1].helper in CONFIG.voters and one.catchup[-1].first == 101
