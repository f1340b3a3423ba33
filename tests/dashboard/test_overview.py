"""The Overview: every part drawn from views, its keys, and what it costs."""

import time
from statistics import median

import msgspec
import pytest

from dashboard.view import LogLine, Second, SlotSeen, Span, View, VoterView
from dashboard.widgets.eventlog import EventLog, event_lines, log_picture
from dashboard.widgets.lines import cut, spread, width_of, wrap
from dashboard.widgets.overview import COLUMNS, Overview, VotersTable, voter_cells
from dashboard.widgets.pane import Subject
from dashboard.widgets.slots import (
    SlotLane,
    Sparks,
    accepted_by,
    bars,
    slot_lane,
    slot_sign,
    slot_words,
    spark_line,
    sparks,
)
from dashboard.widgets.timeline import Timeline, axis, lane, lane_pieces, span_words
from tests.dashboard import samples
from tests.dashboard.stage import on_stage
from trex_core.messages import NO_BALLOT, Ballot, StreamTip, VoterDigest

B = Ballot(0, 17, 3)
S = 1_000
NOW_MS = 1_795_469_400_000


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    """Times of day are those of UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def words(line):
    return "".join(text for text, _ in line)


def drawn(spans, columns=10, now=None, column_ms=S):
    last = columns - 1 if now is None else now
    return words(lane_pieces(lane(spans, 0, columns, last, column_ms), None))


def span(role, from_ms, to_ms, ballot=B, voter=3, why="because"):
    return Span(voter, role, ballot, from_ms, to_ms, why)


def voter(number, *, fixed=100, accepted=None, proposed=0, leading=False, **told):
    digest = VoterDigest(
        role="leader" if leading else "follower",
        promised=B,
        last_accepted=fixed if accepted is None else accepted,
        fixed=fixed,
        applied=fixed,
        journal_bytes=16 << 20,
        free_bytes=40 << 30,
        fsync_us=850,
        version="0.1.0",
        proposed=proposed,
        **told,
    )
    return VoterView(number, NOW_MS, StreamTip(B, leading, fixed, b"", digest))


def seen(*voters, **more):
    return View(now_ms=NOW_MS, voters=voters, **more)


# --- lines ----------------------------------------------------------------------------------------


def test_lines_are_cut_spread_and_wrapped():
    assert cut("leadership", 10) == "leadership"
    assert cut("leadership", 7) == "leader…"
    assert cut("漢字漢字", 5) == "漢字…"
    assert cut("x", 0) == ""
    assert words(spread((("ab", ""),), (("yz", ""),), 8)) == "ab    yz"
    assert words(spread((("abcd", ""),), (("yz", ""),), 6)) == "abcd"
    assert wrap("one two three", 7, 3) == ("one two", "three")
    assert wrap("one two three four", 7, 2) == ("one two", "three…")
    assert wrap("unbreakable", 5, 2) == ("unbr…",)
    assert wrap("", 5, 2) == ("",)


# --- the timeline ---------------------------------------------------------------------------------


def test_each_role_has_a_character_of_its_own():
    roles = ("leader", "candidate", "polling", "follower", "down")
    assert len({drawn([span(role, 0, None)], 3) for role in roles}) == len(roles)


def test_a_leader_has_its_ballot_written_in_where_it_fits():
    assert drawn([span("leader", 0, None)], 12) == "━ 0.17.3 ━━━"
    assert drawn([span("leader", 0, None)], 6) == "━━━━━━"


def test_a_short_candidacy_is_not_hidden_by_what_followed():
    spans = [
        span("follower", 0, 4_100),
        span("polling", 4_100, 5_300),
        span("candidate", 5_300, 5_400),
        span("leader", 5_400, None),
    ]
    assert drawn(spans) == "····░▒━━━━"


def test_what_is_not_known_is_blank_and_what_is_over_ends():
    assert drawn([span("follower", 2_000, 5_000)]) == "  ···     "
    assert drawn([span("down", 5_000, None)]) == "     ╳    "
    assert drawn([span("leader", 20_000, None)]) == " " * 10
    assert drawn([span("follower", 0, None)], now=6) == "·······   "


def test_a_column_is_as_wide_as_the_zoom_says():
    spans = [span("follower", 0, 50_000), span("leader", 50_000, None)]
    assert drawn(spans, column_ms=10_000) == "·····━━━━━"


def test_the_cursor_marks_one_column():
    pieces = lane_pieces(lane([span("leader", 0, None)], 0, 12, 11, S), 3)
    assert words(pieces) == "━ 0.17.3 ━━━"
    assert [text for text, style in pieces if "cursor" in style] == ["."]
    assert width_of(pieces) == 12


def test_the_axis_tells_whole_moments():
    first = NOW_MS // S
    told = axis(first, 40, S)
    assert len(told) == 40
    assert "╵21:30:00" in told
    assert told.index("╵21:30:15") - told.index("╵21:30:00") == 15
    assert axis(first // 60, 40, 60_000).count(":00") >= 2


def test_a_span_is_told_in_words():
    led = span("leader", NOW_MS, NOW_MS + 72_000, why="a quorum promised")
    assert span_words(led, NOW_MS + 90_000) == (
        "voter 3 led under 0.17.3 21:30:00.000 for 72 s: a quorum promised"
    )
    leads = span("leader", NOW_MS, None, why="")
    assert (
        span_words(leads, NOW_MS + 5_000) == "voter 3 leads under 0.17.3 since 21:30:00 for 5.0 s"
    )
    down = span("down", NOW_MS, None, why="\x1b[2J")
    assert span_words(down, NOW_MS + 5_000) == (
        "voter 3 is not heard since 21:30:00 for 5.0 s: \\x1b[2J"
    )
    polls = span("polling", NOW_MS, NOW_MS + 900, ballot=NO_BALLOT)
    assert "asked whether others hear a leader" in span_words(polls, NOW_MS)


async def test_the_keys_of_the_timeline():
    async with on_stage(Overview(), samples.election(), focus="Timeline") as (stage, pilot):
        part = stage.query_one(Timeline)
        rows = len(stage.view.voters)

        def cursor():
            return part._cursor_at * part._column_ms

        assert part.picture[0][0][0].startswith("▸")
        await pilot.press("down", "down")
        assert part.picture[2][0][0].startswith("▸")
        now = cursor()
        await pilot.press("left", "left")
        assert cursor() == now - 2_000
        assert part.subject() == Subject("ballot", "0.17.3")
        assert "voter 3 led under 0.17.3" in words(part.picture[rows + 1])
        await pilot.press("right", "right")
        assert part._cursor is None, "at now it follows"
        await pilot.press("p")
        assert part.span is not None
        newest = max(each.from_ms for each in stage.view.spans if each.from_ms < now)
        assert cursor() <= newest < cursor() + part._column_ms
        await pilot.press("pageup")
        assert cursor() < newest - 10 * S
        await pilot.press("home")
        oldest = min(stage.view.spans[0].from_ms, stage.view.since_ms)
        assert cursor() // S == oldest // S
        before = part._column_ms
        await pilot.press("left_square_bracket")
        assert part._column_ms > before
        assert cursor() // part._column_ms == oldest // part._column_ms
        await pilot.press("right_square_bracket", "right_square_bracket")
        assert part._column_ms < before
        await pilot.press("end")
        assert part._cursor is None
        await pilot.press("n")
        assert part._cursor is None, "nothing comes after now"


async def test_what_is_looked_at_does_not_run_away():
    async with on_stage(Overview(), samples.election(), focus="Timeline") as (stage, pilot):
        part = stage.query_one(Timeline)
        await pilot.press("left")
        lines = part.text().splitlines()[:5]
        stage.view = msgspec.structs.replace(stage.view, now_ms=stage.view.now_ms + 20_000)
        stage.draw()
        await pilot.pause()
        unchanged = [line.split("─")[0] for line in part.text().splitlines()[:5]]
        assert [each[:60] for each in unchanged] == [each[:60] for each in lines]
        await pilot.press("end")
        assert part.text().splitlines()[:5] != lines


async def test_a_click_chooses_lane_and_moment():
    async with on_stage(Overview(), samples.election(), focus="") as (stage, pilot):
        part = stage.query_one(Timeline)
        await pilot.click(Timeline, offset=(60, 2))
        assert part.has_focus
        assert part.span is not None
        assert part.span.voter == 3


async def test_without_spans_it_says_so():
    view = View(now_ms=NOW_MS, since_ms=NOW_MS, voters=(VoterView(1), VoterView(2), VoterView(3)))
    async with on_stage(Overview(), view, focus="Timeline") as (stage, pilot):
        assert "nothing is known of this moment" in stage.text()
        await pilot.press("left", "p", "n", "home", "pageup", "left_square_bracket", "tab")
        assert "nobody is known to lead" in stage.text()


# --- the slots ------------------------------------------------------------------------------------


def test_the_sign_of_a_slot_says_how_many_accepted_it():
    voters = [voter(1, accepted=103), voter(2, accepted=102), voter(3, accepted=101), voter(4)]
    view = seen(*voters, voter(5, accepted=104, proposed=105, leading=True))
    assert [slot_sign(view, slot) for slot in range(100, 106)] == list("●◕◕◑◔○")
    assert accepted_by(view, 103) == (1, 5)
    assert slot_words(view, 103) == "accepted by 2 of 5: voters 1, 5; not known to be fixed"
    assert slot_words(view, 104) == "accepted by 1 of 5: voter 5; not known to be fixed"
    assert "not known to be accepted by anybody" in slot_words(view, 105)


def test_a_fixed_slot_is_told():
    slots = tuple(SlotSeen(slot, "config.put", "a/\x1b\n", 12, B) for slot in range(90, 101))
    view = seen(voter(1), slots=slots)
    assert slot_words(view, 95) == "config.put a/\\x1b\\n, 12 B, first proposed under 0.17.3"
    assert slot_words(view, 80) == "fixed; its value did not pass here"


def test_the_lane_ends_at_the_newest_proposed():
    view = seen(voter(1, proposed=12_492, fixed=12_486, accepted=12_488, leading=True), voter(2))
    (line, told), first = slot_lane(view, 80, None)
    assert words(line).endswith("●◑◑○○○○ 12,492")
    assert words(line).startswith(f"  slots {first:,} ●")
    assert width_of(line) <= 80
    assert "12,486" in words(told)
    (line, told), _ = slot_lane(view, 80, 12_490)
    assert "12,490 proposed" in words(told)
    assert [text for text, style in line if "cursor" in style] == ["○"]


def test_the_lane_of_a_new_cluster():
    assert "none is known yet" in words(slot_lane(seen(voter(1, fixed=0)), 80, None)[0][0])
    (line, _), first = slot_lane(seen(voter(1, fixed=3)), 80, None)
    assert (words(line), first) == ("  slots 1 ●●● 3", 1)


def test_silence_is_told_at_the_slots():
    view = seen(voter(1), fixed_ms=NOW_MS - 42_300)
    assert words(slot_lane(view, 120, None)[0][1]).endswith("; nothing new for 42 s")


async def test_the_keys_of_the_slots():
    async with on_stage(Overview(), samples.healthy(), focus="SlotLane") as (stage, pilot):
        part = stage.query_one(SlotLane)
        newest = part.selected
        assert newest == stage.view.slots[-1].slot
        await pilot.press("left", "left")
        assert part.subject() == Subject("slot", str(newest - 2))
        assert f"{newest - 2:,} " in part.text().splitlines()[1]
        await pilot.press("pageup", "right")
        assert part.selected == newest - 11
        await pilot.press(*["pageup"] * 20)
        assert part.selected == stage.view.slots[0].slot
        await pilot.press("end")
        assert part.selected == newest
        await pilot.click(SlotLane, offset=(30, 0))
        assert part._cursor == part._first + 30 - len(f"  slots {part._first:,} ")


# --- rates ----------------------------------------------------------------------------------------


def test_bars():
    assert bars([0, 1, 4, 8], 8) == "·▁▄█"
    assert bars([0, 0], 0) == "··"
    assert bars([], 0) == ""
    assert set(bars([7] * 3, 7)) == {"█"}


def test_a_spark_line_fills_its_width_and_gives_way():
    for width in (20, 30, 50, 80, 300):
        line = spark_line("commits", "1,024/s", list(range(600)), lambda each: f"{each}/s", width)
        assert width_of(line) == max(width, len("  commits 1,024/s ") + 1)
        assert ("max" in words(line)) is (width >= 50)


def test_the_second_under_way_is_not_drawn():
    seconds = (Second(1, 100, 900, 2_000), Second(2, 200, 1_000, 3_000), Second(3, 7, 0, 0))
    commits, latency = sparks(View(seconds=seconds), 80, one_line=False)
    assert words(commits).startswith("  commits 200/s ")
    assert "max 200/s" in words(commits)
    assert words(latency).startswith("  latency p50 1.00 ms p99 3.00 ms ")
    (both,) = sparks(View(seconds=seconds), 80, one_line=True)
    assert width_of(both) == 80
    assert "commits 200/s" in words(both)
    assert "latency p99 3.00 ms" in words(both)


def test_nothing_committed_has_no_latency():
    seconds = (Second(1, 100, 900, 2_000), Second(2, 0, 900, 2_000), Second(3, 0, 0, 0))
    _, latency = sparks(View(seconds=seconds), 80, one_line=False)
    assert "█·" in words(latency)
    commits, latency = sparks(View(), 80, one_line=False)
    assert "-/s" in words(commits)
    assert words(latency).startswith("  latency - ")


# --- events ---------------------------------------------------------------------------------------


def line(at, text="it happened", level="info", subject="voter 3"):
    return LogLine(NOW_MS + at * S, level, subject, text)


def test_an_event_has_time_sign_subject_and_words():
    (told,) = event_lines(line(0, "is back", "good"), 80, chosen=False)
    assert words(told) == " 21:30:00 ✓ voter 3: is back"
    signs = {
        words(event_lines(line(0, level=each), 80, chosen=False)[0])[10]
        for each in ("info", "good", "warn", "bad")
    }
    assert len(signs) == 4
    long = event_lines(line(0, "word " * 100), 40, chosen=False)
    assert len(long) == 4
    assert all(width_of(each) <= 40 for each in long)
    hostile = event_lines(line(0, "a\x1b[2J[b]\nc", subject="member \x07"), 80, chosen=False)
    assert words(hostile[0]) == " 21:30:00 · member \\x07: a\\x1b[2J[b] c"


def test_the_newest_event_is_at_the_bottom():
    log = [line(at, f"event {at}") for at in range(20)]
    told = [words(each) for each in log_picture(log, 19, 80, 3, chosen=False)]
    assert [each[-8:] for each in told] == ["event 17", "event 18", "event 19"]
    told = [words(each) for each in log_picture(log, 0, 80, 3, chosen=False)]
    assert [each[-7:] for each in told] == ["event 0", "event 1", "event 2"]
    assert len(log_picture(log[:1], 0, 80, 5, chosen=False)) == 5
    assert "nothing happened yet" in words(log_picture([], -1, 80, 3, chosen=False)[0])


async def test_the_keys_of_the_log():
    log = tuple(line(at, f"event {at}", subject=f"voter {at % 5 + 1}") for at in range(50))
    view = msgspec.structs.replace(samples.healthy(), log=log)
    async with on_stage(Overview(), view, focus="EventLog") as (stage, pilot):
        part = stage.query_one(EventLog)

        def bottom():
            return [each for each in part.text().splitlines() if each.strip()][-1]

        assert bottom().endswith("event 49")
        await pilot.press("up", "up")
        assert bottom().endswith("event 47")
        assert part.subject() == Subject("voter", str(47 % 5 + 1))
        more = (*log[1:], line(50, "event 50"))
        stage.view = msgspec.structs.replace(view, log=more)
        stage.draw()
        assert bottom().endswith("event 47"), "what is read stays, whatever comes"
        await pilot.press("end")
        assert bottom().endswith("event 50")
        await pilot.press("pageup", "home")
        assert part.text().splitlines()[0].endswith("event 1")
        stage.view = msgspec.structs.replace(view, log=more[30:])
        stage.draw()
        assert part.text().splitlines()[0].endswith("event 31"), "the chosen one is no longer kept"


# --- the voters -----------------------------------------------------------------------------------


def cells(view, number, level="ok"):
    row = voter_cells(view, view.voter(number), level)
    return {column.name: cell for column, cell in zip(COLUMNS, row, strict=True)}


def test_a_row_tells_what_a_voter_said():
    view = seen(voter(3, leading=True, fsync_p50_us=900, fsync_p99_us=2_300, uptime_s=4_000))
    told = {name: text for name, (text, _) in cells(view, 3).items()}
    assert told == {
        "sign": "✓",
        "voter": "3",
        "role": "leader",
        "promised": "0.17.3",
        "accepted": "100",
        "fixed": "100",
        "applied": "100",
        "journal": "16.0 MiB",
        "p50": "900 µs",
        "p99": "2.30 ms",
        "heard": "now",
        "version": "0.1.0",
        "snapshot": "-",
        "free": "40.0 GiB",
        "up": "66 min",
    }


def test_a_silent_voter_does_not_look_as_if_it_led():
    view = seen(voter(3, leading=True))
    view = msgspec.structs.replace(view, now_ms=NOW_MS + 8_400)
    told = cells(view, 3, "bad")
    assert told["role"] == ("silent", "warn")
    assert told["heard"] == ("8 s ago", "warn")
    assert told["sign"] == ("✗", "bad")
    assert {style for name, (_, style) in told.items() if name == "fixed"} == {"dim"}


def test_a_voter_never_heard_claims_nothing():
    told = cells(seen(VoterView(4)), 4)
    assert told["heard"] == ("never", "warn")
    assert told["role"][0] == "?"
    assert {
        text for name, (text, _) in told.items() if name not in ("sign", "voter", "role", "heard")
    } == {""}


def test_a_full_disk_is_said():
    assert cells(seen(voter(1, has_room=False)), 1)["free"][0].startswith("FULL")


async def test_at_80_columns_the_least_telling_go_and_none_is_cut():
    async with on_stage(Overview(), samples.two_down()) as (stage, pilot):
        heading, *rows = stage.lines()[:6]
        for column in (
            "role",
            "promised",
            "accepted",
            "fixed",
            "applied",
            "fsync p99",
            "last heard",
        ):
            assert column in heading
        assert "version" not in heading
        assert not any("…" in row for row in rows)
        assert sum("silent" in row for row in rows) == 2
        await pilot.resize_terminal(160, 30)
        await pilot.pause()
        stage.draw()
        await pilot.pause()
        for column in ("journal", "fsync p50", "version", "snapshot", "disk free", "up for"):
            assert column in stage.lines()[0]


async def test_the_keys_of_the_voters_go_on_to_the_next_part():
    async with on_stage(Overview(), samples.healthy(), focus="VotersTable") as (stage, pilot):
        pane = stage.pane
        assert pane.subject() == Subject("voter", "1")
        await pilot.press("down", "down")
        assert pane.subject() == Subject("voter", "3")
        await pilot.click(VotersTable, offset=(10, 5))
        assert pane.subject() == Subject("voter", "5")
        await pilot.press("down")
        assert stage.query_one(Timeline).has_focus
        await pilot.press("up")
        assert stage.query_one(VotersTable).has_focus
        for part in (Timeline, SlotLane, EventLog):
            await pilot.press("tab")
            assert stage.query_one(part).has_focus


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("voters", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(80, 24), (100, 30), (160, 50), (300, 80)])
async def test_every_part_is_on_the_screen_at_every_size(voters, size):
    view = samples.healthy_world(voters).view
    async with on_stage(Overview(), view, size=(size[0], size[1] - 2)) as (stage, _):
        text = stage.text()
        leader = f"voter {min(3, voters)}"
        for part in ("promised", "━ 0.17.", "╵", "slots ", "commits ", "latency "):
            assert part in text, f"{part} is not on the screen"
        assert stage.query_one(EventLog).size.height >= 1
        assert leader in text
        for part in stage.pane.children:
            assert part.region.bottom <= size[1] - 2 - 1


async def test_nothing_is_drawn_again_if_nothing_changed():
    async with on_stage(Overview(), samples.healthy(), size=(120, 40)) as (stage, pilot):
        refreshed = []
        for part in stage.pane.children:
            part.refresh = lambda *_, it=part, **__: refreshed.append(it)
        stage.draw()
        await pilot.pause()
        assert refreshed == []
        stage.view = msgspec.structs.replace(stage.view, now_ms=stage.view.now_ms + 10)
        stage.draw()
        assert refreshed == []


async def test_what_a_view_costs():
    world = samples.healthy_world()
    async with on_stage(Overview(), world.view, size=(120, 40)) as (stage, pilot):
        took = []
        for _ in range(12):
            world.run(250)
            stage.view = world.view
            began = time.thread_time()
            stage.draw()
            await pilot.pause()
            took.append(time.thread_time() - began)
        assert median(took) < 0.05, "four of these a second are a fifth of a core"
        assert stage.query_one(Sparks).picture
