"""Who listens: reports do not flood however many there are, and what is remembered is bounded."""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left

import pytest

from trex_core.messages import ListenerReport
from trex_core.roster import (
    BEHIND_MS,
    DIGEST_BYTES,
    FORGET_INTERVALS,
    FORGET_MS_MIN,
    LISTENERS_MAX,
    NAME_BYTES_MAX,
    REPORT_MS_MIN,
    REPORTS_PER_S_MAX,
    SILENT_INTERVALS,
    VERSION_BYTES_MAX,
    Reporter,
    Roster,
    helper_address,
    mean_interval_ms,
    report_interval_ms,
    sane,
)
from trex_core.wire import encode_body

SILENT_MS = SILENT_INTERVALS * REPORT_MS_MIN
FORGOTTEN_MS = max(FORGET_MS_MIN, FORGET_INTERVALS * REPORT_MS_MIN)


def report(
    name="cache", instance=1, *, applied=10, tip=10, behind_ms=0, leaving=False, version="1"
):
    return ListenerReport(
        name, instance, applied, applied, tip, behind_ms, True, 0, 0, 0, 0, 1, version, leaving
    )


class Reports:
    """``count`` listeners that start at ``starts_ms`` and hear each other; ``loses(listener)`` says
    who does not hear a report."""

    def __init__(self, starts_ms, seconds, seed=1):
        draw = random.Random(seed).random
        self.roster = Roster()
        self.sent_ms = []
        self.by = [[] for _ in starts_ms]
        self.silent_max = 0
        reporters = [Reporter(start) for start in starts_ms]
        due = [(reporter.next_ms, index) for index, reporter in enumerate(reporters)]
        heapq.heapify(due)
        looks = 0
        while due[0][0] <= seconds * 1000:
            now_ms, index = heapq.heappop(due)
            looks += 1
            heard = bool(self.by[index])
            if reporters[index].due(now_ms, self.roster.expected(now_ms) + (not heard), draw()):
                self.sent_ms.append(now_ms)
                self.by[index].append(now_ms)
                assert self.roster.heard(report(f"listener-{index}"), now_ms)
            assert reporters[index].next_ms > now_ms, "time goes on"
            heapq.heappush(due, (reporters[index].next_ms, index))
            self.silent_max = max(self.silent_max, self.roster.digest(now_ms, 100).silent)
        self.looks = looks

    def most_in_a_second(self, from_ms=0):
        """Most reports in any window of one second that begins at ``from_ms`` or later."""
        first = bisect_left(self.sent_ms, from_ms)
        return max(
            bisect_left(self.sent_ms, at_ms + 1000) - index
            for index, at_ms in enumerate(self.sent_ms[first:], first)
        )


@pytest.mark.parametrize("over_ms", [0, 1_000, 10_000])
@pytest.mark.parametrize("count", [1, 10, 100, 300, 1000])
def test_however_many_start_at_once_they_never_flood_and_each_is_heard(count, over_ms):
    draws = random.Random(count)
    seconds = 120
    seen = Reports([draws.randrange(over_ms + 1) for _ in range(count)], seconds)
    assert all(seen.by), "each reports in time"
    assert seen.most_in_a_second() <= 1.5 * REPORTS_PER_S_MAX
    mean = bisect_left(seen.sent_ms, seconds * 1000) / seconds
    assert mean <= REPORTS_PER_S_MAX
    if count >= 100:
        assert mean >= REPORTS_PER_S_MAX / 2, "nor is the allowed rate left unused"
    assert seen.silent_max == 0, "nobody is called silent for waiting its turn"
    assert seen.looks <= 12 * len(seen.sent_ms) + 12 * count, "to reconsider costs little"


def test_thousands_at_once_stay_within_twice_the_rate():
    seen = Reports([0] * 4000, 60)
    assert seen.most_in_a_second() <= 2 * REPORTS_PER_S_MAX
    assert seen.most_in_a_second(30_000) <= 1.5 * REPORTS_PER_S_MAX


def test_two_that_start_together_do_not_report_together_for_ever():
    seen = Reports([0, 0], 120)
    together = set(seen.by[0]) & set(seen.by[1])
    assert len(together) < 3


@pytest.mark.parametrize("known", [0, 1, 100, 101, 1000, LISTENERS_MAX])
def test_the_interval_grows_with_the_number_and_is_random(known):
    mean = max(REPORT_MS_MIN, known * 1000 / REPORTS_PER_S_MAX)
    assert mean_interval_ms(known) == int(mean)
    assert report_interval_ms(known, 0.0) == int(mean_interval_ms(known) * 0.5)
    assert report_interval_ms(known, 1.0) == int(mean_interval_ms(known) * 1.5)


def test_a_lone_listener_is_heard_soon():
    reporter = Reporter(0)
    assert not reporter.due(REPORT_MS_MIN // 2 - 1, 1, 0.0)
    assert reporter.due(REPORT_MS_MIN * 3 // 2, 1, 1.0)


def test_a_report_that_is_due_waits_on_when_many_more_are_known_by_then():
    reporter = Reporter(0)
    assert not reporter.due(2_000, 1000, 0.5)
    assert reporter.next_ms == 20_000
    assert not reporter.due(19_999, 1, 0.0), "not looked at again before"
    assert reporter.due(20_000, 1000, 0.5)


def test_who_is_heard_no_more_is_silent_and_then_forgotten():
    roster = Roster()
    roster.heard(report("a"), 0)
    roster.heard(report("b"), SILENT_MS)
    digest = roster.digest(SILENT_MS + 1, 1000)
    assert (digest.known, digest.silent) == (2, 1)
    assert [(seen.report.name, seen.age_ms) for seen in roster.entries(SILENT_MS + 1)] == [
        ("a", SILENT_MS + 1),
        ("b", 1),
    ]
    assert roster.size(FORGOTTEN_MS) == 2
    assert roster.size(FORGOTTEN_MS + 1001) == 1
    assert roster.size(SILENT_MS + FORGOTTEN_MS + 2002) == 0
    assert roster.digest(SILENT_MS + FORGOTTEN_MS + 2002, 1000).rows == ()


def test_a_listener_that_leaves_is_gone_at_once_and_may_come_back():
    roster = Roster()
    roster.heard(report("a", 1), 0)
    roster.heard(report("a", 2), 0)
    roster.heard(report("b"), 0)
    roster.heard(report("a", 1, leaving=True), 1)
    roster.heard(report("stranger", leaving=True), 1)
    assert roster.size(1) == 2
    names = [(seen.report.name, seen.report.instance) for seen in roster.digest(1, 1000).rows]
    assert names == [("a", 2), ("b", 1)]
    roster.heard(report("a", 1), 2)
    assert len(roster.digest(2, 1000).rows) == 3


def test_who_is_fewer_than_before_is_not_called_silent_for_its_long_interval():
    roster = Roster()
    for index in range(1000):
        roster.heard(report(str(index)), 0)
    for index in range(999):
        roster.heard(report(str(index), leaving=True), 1_000)
    assert roster.size(3_000) == 1
    assert roster.digest(mean_interval_ms(1000), 1000).silent == 0, "it reports each 20 s or so"
    assert roster.digest(SILENT_INTERVALS * mean_interval_ms(5000), 1000).silent == 1


def test_behind_and_lag_are_of_those_that_are_heard():
    roster = Roster()
    roster.heard(report("dead", applied=1, tip=999, behind_ms=BEHIND_MS), 0)
    now_ms = SILENT_MS + 1
    roster.heard(report("behind", applied=5, tip=25, behind_ms=BEHIND_MS), now_ms)
    roster.heard(report("nearly", applied=24, tip=25, behind_ms=BEHIND_MS - 1), now_ms)
    digest = roster.digest(now_ms, 0)
    assert (digest.known, digest.behind, digest.silent, digest.lag_max) == (3, 1, 1, 20)
    assert digest.rows == ()


@pytest.mark.parametrize("bytes_max", [140, 500, 1000])
def test_successive_digests_show_every_listener_in_turn_and_fit(bytes_max):
    roster = Roster()
    names = {f"listener-{'x' * (index % 60)}-{index}" for index in range(200)}
    for name in names:
        roster.heard(report(name), 0)
    shown = []
    while len(shown) < len(names):
        digest = roster.digest(20_000, bytes_max)
        assert len(encode_body(digest)) <= bytes_max
        assert digest.rows
        shown += [seen.report.name for seen in digest.rows]
    assert set(shown[: len(names)]) == names, "none twice before each was shown once"


def test_one_row_too_long_for_a_digest_does_not_stop_the_others():
    roster = Roster()
    roster.heard(report("x" * NAME_BYTES_MAX), 0)
    roster.heard(report("a"), 0)
    for _ in range(3):
        assert [seen.report.name for seen in roster.digest(0, 80).rows] == ["a"]


def test_the_largest_of_everything_fits_what_its_row_is_counted_for():
    worst = ListenerReport(
        "n" * NAME_BYTES_MAX, *[(1 << 63) - 1] * 5, True, *[(1 << 63) - 1] * 5, "v" * 64
    )
    assert sane(worst)
    roster = Roster()
    roster.heard(worst, 0)
    row_bytes = len(encode_body(roster.digest(1 << 31, 10_000)))
    for bytes_max in range(DIGEST_BYTES, row_bytes + 40):
        assert len(encode_body(roster.digest(1 << 31, bytes_max))) <= bytes_max


def test_a_flood_of_names_drives_nobody_out_and_is_forgotten():
    roster = Roster()
    for index in range(50):
        roster.heard(report(f"real-{index}"), 0)
    refused = sum(not roster.heard(report("fake", index), 1) for index in range(3 * LISTENERS_MAX))
    assert refused == 2 * LISTENERS_MAX + 50
    assert roster.size(1) == LISTENERS_MAX
    silent_ms = SILENT_INTERVALS * mean_interval_ms(LISTENERS_MAX) + 2
    for index in range(50):
        assert roster.heard(report(f"real-{index}"), silent_ms)
    assert roster.heard(report("new"), silent_ms + 1), "the silent make room"
    names = {seen.report.name for seen in roster.entries(silent_ms + 1)}
    assert {"new", *(f"real-{index}" for index in range(50))} <= names
    forgotten_ms = FORGET_INTERVALS * mean_interval_ms(LISTENERS_MAX) + 2
    assert roster.size(forgotten_ms) == 51


def test_coming_and_going_over_and_over_holds_no_memory():
    roster = Roster()
    for index in range(5 * LISTENERS_MAX):
        roster.heard(report("a", index), index)
        roster.heard(report("a", index, leaving=True), index)
    assert roster.size(5 * LISTENERS_MAX) == 0
    assert len(roster._turns) <= 2 * LISTENERS_MAX
    assert roster.expected(5 * LISTENERS_MAX) <= LISTENERS_MAX


def test_newcomers_count_for_more_while_they_are_new():
    roster = Roster()
    for index in range(40):
        roster.heard(report(str(index)), 0)
    assert roster.expected(1) == 200
    assert roster.expected(2_000) == roster.size(2_000) == 40


def bad(**changes):
    import msgspec

    return msgspec.structs.replace(report(), **changes)


@pytest.mark.parametrize(
    "wrong",
    [
        bad(name=""),
        bad(name="x" * (NAME_BYTES_MAX + 1)),
        bad(name="ä" * NAME_BYTES_MAX),
        bad(version="1" * (VERSION_BYTES_MAX + 1)),
        bad(stored=-2),
        *[
            bad(**{field: value})
            for value in (-1, 1 << 63)
            for field in (
                "instance", "applied", "tip", "behind_ms",
                "gaps", "repairs", "catchups", "resets", "uptime_s",
            )
        ],
    ],
    ids=str,
)  # fmt: skip
def test_what_no_listener_sends_is_told_apart(wrong):
    assert sane(report())
    assert sane(bad(stored=-1))
    assert not sane(wrong)


@pytest.mark.parametrize(
    "text", ["", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3:5", "1.2.3.256:5", "a.b.c.d:5",
             "1.2.3.4:", ":5", "1.2.3.4:+5", "\u0661.2.3.4:5", "1.2.3.4:5 ",
             "0001.2.3.4:5", "x" * 30]
)  # fmt: skip
def test_where_nobody_can_help_is_no_address(text):
    assert helper_address(text) is None


def test_where_a_listener_helps():
    assert helper_address("127.0.0.1:65535") == ("127.0.0.1", 65535)
    assert helper_address("255.255.255.255:1") == ("255.255.255.255", 1)


def test_a_helper_has_a_name_that_no_voter_has():
    fields = dict.fromkeys(("applied", "stored", "tip", "behind_ms"), 0)
    for instance, good in ((0, False), (65535, False), (65536, True)):
        report = ListenerReport(
            "a", instance, **fields, ready=True, gaps=0, repairs=0, catchups=0, resets=0,
            uptime_s=0, version="1", helps="127.0.0.1:9",
        )  # fmt: skip
        assert sane(report) is good
