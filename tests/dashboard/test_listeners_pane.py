"""The tab Listeners: each key, each state, from none to a thousand listeners."""

import time
from statistics import median

import immutables
import msgspec
import pytest

from dashboard.view import ListenerView, View, VoterView
from dashboard.widgets.listeners import (
    MAP_LISTENERS,
    HeatMap,
    ListenersPane,
    silent_ms,
    standing,
)
from dashboard.widgets.pane import Subject
from dashboard.widgets.rows import RowTable
from tests.dashboard.stage import on_stage, shown
from trex_core.messages import (
    NO_BALLOT,
    ListenerDigest,
    ListenerReport,
    StreamTip,
    VoterDigest,
)

NOW_MS = 1_000_000


def report(name="cache-1", instance=1, **told):
    given = {
        "applied": 5_000,
        "stored": 4_990,
        "tip": 5_000,
        "behind_ms": 0,
        "ready": True,
        "gaps": 0,
        "repairs": 0,
        "catchups": 0,
        "resets": 0,
        "uptime_s": 600,
        "version": "0.1.0",
    }
    return ListenerReport(name=name, instance=instance, **{**given, **told})


def heard(reports, ages_ms=(), direct=True):
    ages = [*ages_ms, *[500] * len(reports)]
    return immutables.Map(
        {
            (each.name, each.instance): ListenerView(each, NOW_MS - age_ms, direct)
            for each, age_ms in zip(reports, ages, strict=False)
        }
    )


def seen(reports, ages_ms=(), direct=True):
    return View(now_ms=NOW_MS, listeners=heard(reports, ages_ms, direct))


def many(count):
    """``count`` listeners; each tenth is behind, further and further."""
    return [
        report(f"cache-{at:04}", at, behind_ms=at * 10 if at % 10 == 0 else 0, applied=5_000 - at)
        for at in range(count)
    ]


def names(stage):
    """The names in the table, from above."""
    table = stage.query_one(RowTable)
    return [name for name, _ in table._rows]


# --- how a listener is doing


@pytest.mark.parametrize(
    ("told", "age_ms", "word", "mark"),
    [
        ({}, 0, "at tip", "·"),
        ({"behind_ms": 80}, 0, "behind 80 ms", "+"),
        ({"behind_ms": 3_200}, 0, "behind 3.2 s", "#"),
        ({"behind_ms": 12_000}, 0, "behind 12 s", "@"),
        ({"ready": False}, 0, "behind 0 ms", "+"),
        ({"ready": False, "uptime_s": 2}, 0, "starting", "◦"),
        ({}, 7_000, "silent 7.0 s", "×"),
        ({"behind_ms": 12_000}, 48_000, "silent 48 s", "×"),
        ({"leaving": True}, 48_000, "left", "-"),
    ],
)
def test_a_listener_has_a_sign_and_a_word(told, age_ms, word, mark):
    listener = ListenerView(report(**told), NOW_MS - age_ms, True)
    how = standing(listener, NOW_MS, silent_ms(3))
    assert (how.word, how.mark) == (word, mark)
    assert how.sign.strip()


def test_each_is_heard_more_seldom_the_more_there_are_so_silent_comes_later():
    listener = ListenerView(report(), NOW_MS - 20_000, True)
    assert standing(listener, NOW_MS, silent_ms(10)).word == "silent 20 s"
    assert standing(listener, NOW_MS, silent_ms(1_000)).word == "at tip"


def test_what_is_old_is_stale_before_it_is_silent():
    limit_ms = silent_ms(3)
    fresh, old = (
        standing(ListenerView(report(), NOW_MS - age_ms, True), NOW_MS, limit_ms)
        for age_ms in (limit_ms // 2, limit_ms - 100)
    )
    assert (fresh.stale, old.stale) == (False, True)


# --- the table


async def test_nobody_was_heard_of_yet():
    async with on_stage(ListenersPane()) as (stage, _):
        assert "no listener was heard of yet" in stage.text()
        assert stage.pane.subject() is None


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
async def test_the_worst_is_first_and_every_row_tells_its_age(size):
    told = [
        report("cache-1", 1),
        report("cache-2", 2, behind_ms=3_200, applied=4_400, repairs=7),
        report("cache-3", 3, ready=False, uptime_s=1),
        report("cache-4", 4),
        report("cache-5", 5),
    ]
    view = seen(told, [500, 2_000, 500, 48_000, 4_500])
    async with on_stage(ListenersPane(), view, size=size) as (stage, _):
        assert names(stage) == ["cache-4", "cache-2", "cache-3", "cache-1", "cache-5"]
        rows = {line.split("cache-")[1][0]: line for line in stage.lines()[3:8]}
        assert "✗ silent 48 s" in rows["4"]
        assert "! behind 3.2 s" in rows["2"]
        assert "600" in rows["2"] and " 2 s " in rows["2"]
        assert "◦ starting" in rows["3"]
        assert "✓ at tip" in rows["1"] and "now" in rows["1"]
        assert "~ at tip" in rows["5"], "what is old is marked"
        summary = stage.lines()[0]
        assert "5 listeners: 2 at tip, 1 behind (1 over 3 s), 1 silent, 1 starting" in summary


async def test_a_wide_screen_shows_every_column():
    async with on_stage(ListenersPane(), seen([report()]), size=(160, 50)) as (stage, _):
        heading = stage.lines()[2]
        for word in ("state", "name", "lag", "applied", "heard", "repairs", "gaps", "catch-ups"):
            assert word in heading
        for word in ("resets", "version", "up for", "stored"):
            assert word in heading


async def test_through_a_voter_is_said():
    async with on_stage(ListenersPane(), seen([report()], direct=False)) as (stage, _):
        assert "now via" in stage.text()
        assert "heard through a voter just now" in stage.text()


async def test_the_dashboard_itself_is_marked():
    async with on_stage(ListenersPane(), seen([report("dash"), report("cache")])) as (stage, _):
        for line in stage.lines()[3:5]:
            assert (" here " in line) == (" dash " in line)
        assert " dash " in stage.text()


async def test_o_goes_through_the_orders_and_r_turns_them_round():
    told = [
        report("a", 1, repairs=1, version="0.3"),
        report("b", 2, repairs=9, version="0.1", behind_ms=100, applied=4_999),
        report("c", 3, repairs=5, version="0.2"),
    ]
    async with on_stage(ListenersPane(), seen(told, [100, 200, 900])) as (stage, pilot):
        found = []
        for _ in range(5):
            found.append("".join(names(stage)))
            await pilot.press("o")
        assert found == ["bac", "abc", "bca", "bca", "cba"]
        assert names(stage) == ["b", "a", "c"], "by lag again"
        await pilot.press("r")
        assert names(stage) == ["c", "a", "b"]


async def test_a_click_on_a_heading_sorts_by_it_and_again_reverses():
    told = [report("a", 1, repairs=1), report("b", 2, repairs=9), report("c", 3, repairs=5)]
    async with on_stage(ListenersPane(), seen(told)) as (stage, pilot):
        heading = stage.lines()[2]
        await pilot.click(RowTable, offset=(heading.index("repairs") + 1, 0))
        assert names(stage) == ["b", "c", "a"]
        assert "repairs▾" in stage.lines()[2]
        await pilot.click(RowTable, offset=(heading.index("repairs") + 1, 0))
        assert names(stage) == ["a", "c", "b"]
        assert "repairs▴" in stage.lines()[2]


async def test_the_cursor_stays_on_its_listener_while_rows_move():
    told = [report(f"cache-{at}", at) for at in range(5)]
    async with on_stage(ListenersPane(), seen(told)) as (stage, pilot):
        assert stage.pane.subject() == Subject("listener", "cache-0", 0)
        await pilot.press("down", "down")
        assert stage.pane.subject() == Subject("listener", "cache-2", 2)
        worse = [*told[:3], report("cache-3", 3, behind_ms=900), report("cache-4", 4, behind_ms=90)]
        stage.view = seen(worse)
        await shown(stage, pilot)
        assert names(stage)[:2] == ["cache-3", "cache-4"]
        assert stage.pane.subject() == Subject("listener", "cache-2", 2)
        await pilot.press("home")
        assert stage.pane.subject() == Subject("listener", "cache-3", 3)
        stage.view = seen(told)
        await shown(stage, pilot)
        assert stage.pane.subject() == Subject("listener", "cache-0", 0), "at the top: the worst"
        await pilot.press("end", "up", "pagedown", "pageup", "down")
        assert stage.pane.subject() == Subject("listener", "cache-1", 1)


async def test_a_click_selects_a_row():
    async with on_stage(ListenersPane(), seen([report("a", 1), report("b", 2)])) as (stage, pilot):
        await pilot.click(RowTable, offset=(5, 2))
        assert stage.pane.subject() == Subject("listener", "b", 2)


async def test_slash_keeps_names_that_begin_so_and_escape_shows_all():
    told = [report("cache-1", 1), report("cache-2", 2), report("queue-1", 3)]
    async with on_stage(ListenersPane(), seen(told)) as (stage, pilot):
        await pilot.press("slash", *"cac")
        assert names(stage) == ["cache-1", "cache-2"]
        assert "2 names begin with 'cac'" in stage.text()
        await pilot.press("enter", "down")
        assert stage.pane.subject() == Subject("listener", "cache-2", 2)
        await pilot.press("escape")
        assert len(names(stage)) == 3
        await pilot.press("slash", "x")
        assert names(stage) == []
        assert "escape shows all again" in stage.text()
        assert stage.pane.subject() is None


async def test_mixed_versions_and_a_name_used_twice_are_told():
    told = [
        report("cache-1", 1),
        report("cache-1", 2),
        report("cache-2", 3),
        report("cache-3", 4, version="0.0.9"),
    ]
    async with on_stage(ListenersPane(), seen(told)) as (stage, _):
        text = stage.text()
        assert "! mixed versions: 0.1.0: 3, 0.0.9: 1" in text
        assert "≠0.0.9" in text and "≠0.1.0" not in text
        assert "! same name twice: cache-1" in text
        assert text.count("cache-1 (twice)") == 2
        assert "another process uses this name too" in text


async def test_what_voters_know_beyond_what_was_heard_is_told():
    digest = VoterDigest(
        "leader", NO_BALLOT, 0, 0, 0, 0, 0, 0, "", listeners=ListenerDigest(500, 3, 2, 70)
    )
    tip = StreamTip(NO_BALLOT, True, 0, b"", digest)
    view = msgspec.structs.replace(
        seen([report()]), voters=(VoterView(1, NOW_MS, tip), VoterView(2))
    )
    async with on_stage(ListenersPane(), view) as (stage, _):
        assert "voters know 500, 3 behind, 2 silent" in stage.lines()[0]


async def test_names_from_outside_are_shown_as_they_are():
    name = "[red]x[/] \x1b[2J\n"
    async with on_stage(ListenersPane(), seen([report(name, 1)])) as (stage, _):
        assert "[red]x[/] \\x1b[2J\\n" in stage.text()


# --- the map


async def test_hundreds_are_a_map_and_m_changes_that():
    async with on_stage(ListenersPane(), seen(many(500)), focus="HeatMap") as (stage, pilot):
        cells = "".join(stage.lines()[2:15]).replace(" ", "")
        assert len(cells) == 500
        assert cells[:11] == "··········+"
        assert cells[300] == "#" and cells[301] == "·"
        assert "at tip  ◦ starting  + behind" in stage.text()
        await pilot.press("m")
        assert not stage.query_one(HeatMap).display
        assert stage.query_one(RowTable).has_focus
        assert names(stage)[0] == "cache-0490"
        await pilot.press("m")
        assert stage.query_one(HeatMap).has_focus


async def test_few_are_a_table_until_the_operator_wants_a_map():
    async with on_stage(ListenersPane(), seen(many(MAP_LISTENERS))) as (stage, pilot):
        assert stage.query_one(RowTable).display
        await pilot.press("down", "m")
        assert stage.query_one(HeatMap).display
        selected = stage.pane.subject()
        await pilot.press("m")
        assert stage.pane.subject() == selected, "the one selected stays selected"


async def test_arrows_move_over_the_map_and_tell_who_is_there():
    async with on_stage(ListenersPane(), seen(many(500)), focus="HeatMap") as (stage, pilot):
        assert stage.pane.subject() == Subject("listener", "cache-0000", 0)
        await pilot.press("right", "right", "down", "left")
        assert stage.pane.subject() == Subject("listener", "cache-0041", 41)
        assert "cache-0041" in stage.text()
        await pilot.press("up", "up", "end")
        assert stage.pane.subject() == Subject("listener", "cache-0499", 499)
        await pilot.press("right", "down")
        assert stage.pane.subject() == Subject("listener", "cache-0499", 499)
        await pilot.press("home", "left")
        assert stage.pane.subject() == Subject("listener", "cache-0000", 0)
        await pilot.click(HeatMap, offset=(6, 1))
        assert stage.pane.subject() == Subject("listener", "cache-0043", 43)


async def test_more_than_fit_are_scrolled():
    async with on_stage(ListenersPane(), seen(many(4_000)), focus="HeatMap") as (stage, pilot):
        await pilot.press("end")
        await pilot.pause()
        assert stage.pane.subject() == Subject("listener", "cache-3999", 3_999)
        assert stage.query_one(HeatMap).scroll_offset.y > 0
        assert "cache-3999" in stage.text()


async def test_the_map_keeps_its_places_while_listeners_come_and_go():
    async with on_stage(ListenersPane(), seen(many(100)), focus="HeatMap") as (stage, pilot):
        await pilot.press("right", "right")
        stage.view = seen([report("another", 1_000), *many(100)])
        await shown(stage, pilot)
        assert stage.pane.subject() == Subject("listener", "cache-0002", 2)


async def test_the_map_follows_the_filter():
    async with on_stage(ListenersPane(), seen(many(500)), focus="HeatMap") as (stage, pilot):
        await pilot.press("slash", *"cache-001", "enter")
        cells = stage.lines()[3].replace(" ", "")
        assert cells == "+·········"
        assert stage.query_one(HeatMap).has_focus


# --- what it costs


async def test_nothing_is_drawn_when_nothing_changed():
    async with on_stage(ListenersPane(), seen(many(20))) as (stage, _):
        drawn = []
        stage.query_one(RowTable).refresh = lambda *regions, **_: drawn.append(regions)
        stage.draw()
        stage.view = msgspec.structs.replace(stage.view, now_ms=NOW_MS + 100)
        stage.draw()
        assert drawn == []
        stage.view = msgspec.structs.replace(
            stage.view,
            listeners=stage.view.listeners.set(
                ("cache-0003", 3), ListenerView(report("cache-0003", 3, gaps=1), NOW_MS, True)
            ),
        )
        stage.draw()
        assert len(drawn) <= 3, "one row, and those whose seconds passed"


@pytest.mark.parametrize("as_map", [True, False])
async def test_a_thousand_listeners_are_cheap(as_map):
    focus = "HeatMap" if as_map else None
    view = seen(many(1_000))
    async with on_stage(ListenersPane(), view, size=(160, 50), focus=focus) as (stage, pilot):
        if not as_map:
            await pilot.press("m")
        took_ms = []
        for at in range(40):
            listeners = stage.view.listeners
            for each in range(12):  # 50 reports a second are shared by all
                number = (at * 12 + each) % 1_000
                told = report(f"cache-{number:04}", number, applied=6_000 + at)
                view = ListenerView(told, NOW_MS + at * 250, True)
                listeners = listeners.set((told.name, number), view)
            stage.view = msgspec.structs.replace(
                stage.view, listeners=listeners, now_ms=NOW_MS + at * 250
            )
            began = time.thread_time()
            stage.draw()
            took_ms.append((time.thread_time() - began) * 1000)
            await pilot.pause()
        began = time.thread_time()
        for _ in range(100):
            stage.draw()
        unchanged_ms = (time.thread_time() - began) * 10
        print(f"update {median(took_ms):.2f} ms, unchanged {unchanged_ms:.4f} ms")
        assert median(took_ms) < 20, f"10 ms are wanted: {sorted(took_ms)}"
        assert unchanged_ms < 1
