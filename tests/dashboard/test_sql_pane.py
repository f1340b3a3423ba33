"""The tab SQL against a real listener: its keys, its slider, its errors, and what it does not do:
hold the screen up, or let a value steer the terminal."""

from __future__ import annotations

import random
import stat
import time
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from rich.cells import cell_len
from textual import events
from textual.app import App
from textual.widgets import OptionList

from dashboard import advice, sqltext
from dashboard.app import DashApp
from dashboard.feed import open_replay
from dashboard.sqltext import History, Schema, complete, filled, history_path, tokens, uses_slot
from dashboard.view import View
from dashboard.widgets import results
from dashboard.widgets import sql as pane_module
from dashboard.widgets.lines import Lines
from dashboard.widgets.pane import Subject
from dashboard.widgets.prompt import Prompt
from dashboard.widgets.results import ResultTable
from dashboard.widgets.slider import SlotSlider
from dashboard.widgets.sql import QUESTIONS, Questions, SqlPane, advice_on
from listeners import NoStoreError, open_listener
from listeners.sql import (
    QueryResult,
    SqlBusyError,
    SqlDeadlineError,
    SqlError,
    SqlInvalidError,
    SqlMemoryError,
    SqlRefusedError,
    SqlTooLargeError,
    SqlUnavailableError,
)
from tests.credentials import folder
from tests.dashboard.fakes import FakeFeed, FakeListener, opens
from tests.listeners.backbone import Backbone, make_cluster
from tests.listeners.test_listener import QUICK
from tests.listeners.workload import engine, put, workload
from trex_core.metadata.commands import MemberJoin

DEADLINE_S = 20
SIZES = ((80, 24), (160, 50))
ENDLESS = "SELECT sum(range) FROM range(100_000_000_000_000_000)"
SHEET = Path(pane_module.__file__).parent.parent / "trex.tcss"


class Tiny(App[None]):
    """The pane alone, shown four times a second."""

    CSS_PATH = SHEET

    def __init__(self, feed: FakeFeed, past: History) -> None:
        super().__init__()
        self.feed = feed
        self.sql = SqlPane(past)
        self.now_ms = lambda: int(time.time() * 1000)

    def compose(self):
        yield self.sql

    def tick(self):
        self.sql.show(View(now_ms=self.now_ms()), self.feed)


class Driver:
    """A pane on a screen, and what is to be seen of it."""

    def __init__(self, app: Tiny, pilot) -> None:
        self.app = app
        self.pane = app.sql
        self.pilot = pilot
        self.prompt = app.query_one(Prompt)
        self.slider = app.query_one(SlotSlider)
        self.rows = app.query_one(ResultTable)

    async def until(self, condition, what: str):
        """Wait until ``condition()``; it is asked again and again (a pilot would wait until nothing
        runs, queries too)."""
        try:
            with anyio.fail_after(DEADLINE_S):
                while not condition():
                    await anyio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"never {what}; on the screen:\n{self.screen}") from None

    async def settled(self):
        """Nothing runs and nothing is due."""
        await self.until(
            lambda: (
                self.pane._work is None
                and self.pane._scrubbing is None
                and not self.pane._moved
                and all(each.is_finished for each in self.app.workers)
            ),
            "settled",
        )
        await self.pilot.pause()

    async def press(self, *keys: str):
        await self.pilot.press(*keys)
        await self.settled()

    async def type(self, text: str):
        names = {" ": "space", ",": "comma", ".": "full_stop", "(": "left_parenthesis"}
        names |= {"$": "dollar_sign", "_": "underscore", "'": "apostrophe", "=": "equals_sign"}
        await self.pilot.press(*(names.get(each, each) for each in text))
        await self.pilot.pause()

    async def ask(self, sql: str):
        """Put ``sql`` into the prompt and press Enter."""
        self.prompt.focus()
        self.prompt.put(sql)
        await self.press("enter")

    @property
    def screen(self) -> str:
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(part.text for part in line).rstrip() for line in strips)

    @property
    def status(self) -> str:
        return self.app.query_one("#sql-status", Lines).text().strip()

    @property
    def words(self) -> str:
        return self.app.query_one("#sql-words", Lines).text()

    @property
    def cell(self) -> str:
        return self.app.query_one("#sql-cell", Lines).text()

    def values(self, column: int = 0) -> list:
        return [row[column] for row in self.rows._result.rows]


@asynccontextmanager
async def on_screen(listener, *, size=(80, 24), past: History | None = None):
    app = Tiny(FakeFeed(listener=listener), past or History())
    async with app.run_test(size=size) as pilot:
        app.tick()
        driver = Driver(app, pilot)
        await driver.settled()
        app.tick()
        await pilot.pause()
        yield driver


@asynccontextmanager
async def stored(tmp_path, *values):
    """A listener that has stored ``values`` in slots 2 and up, and its backbone."""
    backbone = Backbone(make_cluster())
    try:
        async with (
            backbone.serving(heartbeat_s=0.05),
            open_listener(
                backbone.cluster,
                folder(backbone.cluster, "listener"),
                name="dash",
                directory=tmp_path,
                seed=1,
                options=QUICK,
            ) as listener,
        ):
            last = backbone.append(*values)
            backbone.heartbeat()
            await listener.wait_stored(last, DEADLINE_S)
            yield listener, backbone
    finally:
        backbone.close()


@asynccontextmanager
async def running(tmp_path, *values, size=(80, 24), past: History | None = None):
    """The pane over such a listener."""
    async with (
        stored(tmp_path, *values) as (listener, _),
        on_screen(listener, size=size, past=past) as driver,
    ):
        yield driver


CONFIGS = tuple(put("speed", str(n)) for n in range(1, 301))


# --- asking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_a_query_is_typed_and_answered(tmp_path, size):
    async with running(
        tmp_path, engine(MemberJoin("m1", zone="z")), put("a", "b"), size=size
    ) as at:
        assert "members_at(…)" in at.words, "before the first query it says what there is"
        await at.type("from members")
        await at.press("enter")
        assert at.values() == ["m1"]
        assert "1 row in " in at.status
        assert "as of slot 3" in at.status
        assert "joined_slot" in at.screen
        assert "1/1 id m1" in at.cell
        width, height = size
        assert all(len(line) <= width for line in at.screen.split("\n"))
        assert len(at.screen.split("\n")) == height


async def test_each_ready_made_question_is_answered(tmp_path):
    async with running(tmp_path, *workload(random.Random(3), 200)) as at:
        at.slider.focus()
        await at.press("pageup")
        for number, question in enumerate(QUESTIONS):
            at.prompt.focus()
            await at.press("f2", *["down"] * number)
            assert question.sql[:40] in at.screen
            await at.press("enter")
            assert not isinstance(at.app.screen, Questions)
            assert at.prompt.text == question.sql
            assert at.rows.display, at.words
            assert at.rows.row_count, f"{question.title}: {at.status}"


async def test_a_question_is_chosen_with_the_mouse_and_the_list_is_left_with_escape(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.press("f2", "escape")
        assert at.prompt.text == ""
        await at.press("escape", "a")
        assert isinstance(at.app.screen, Questions)
        await at.pilot.click(OptionList, offset=(3, 6))
        await at.settled()
        assert at.prompt.text == QUESTIONS[6].sql


async def test_a_query_of_several_lines(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.type("SELECT key")
        await at.press("ctrl+j")
        await at.type("FROM config")
        assert at.prompt.text == "SELECT key\nFROM config"
        assert at.prompt.size.height == 2
        await at.press("enter")
        assert at.values() == ["a"]


async def test_ten_thousand_rows_do_not_hold_the_screen_up(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        wide = ", ".join(
            f"repeat(chr((65 + ({n} + range) % 26)::INTEGER), 30) AS c{n}" for n in range(6)
        )
        await at.ask(f"SELECT range AS n, {wide} FROM range(10_000)")
        assert at.rows.row_count == 10_000
        assert "10,000 rows" in at.status
        result = at.rows._result
        begun_s = time.process_time()
        at.rows.show(result)
        await at.pilot.pause()
        assert time.process_time() - begun_s < 0.25, "a screen costs what is on it"
        await at.press("escape", "ctrl+end", "end")
        assert at.rows.cursor == (9_999, 6)
        assert "10,000/10,000 c5" in at.cell
        assert "9999" not in at.screen.split("\n")[5], "scrolled to the right"
        await at.press("pageup", "home", "up", "down", "left", "right", "right", "left")
        row, column = at.rows.cursor
        assert (9_950 < row < 9_999) and column == 1
        assert str(row) in at.screen
        await at.press("ctrl+home")
        assert at.rows.cursor == (0, 1)


async def test_nothing_is_drawn_beyond_the_rows_to_be_seen(tmp_path, monkeypatch):
    async with running(tmp_path, put("a", "b")) as at:
        await at.ask("SELECT range AS n FROM range(10_000)")
        drawn = []
        real = results.one_line
        monkeypatch.setattr(
            results, "one_line", lambda value, kind="": drawn.append(value) or real(value, kind)
        )
        await at.press("escape", "pagedown")
        at.app.tick()
        await at.pilot.pause()
        assert 0 < len(drawn) < 100


async def test_a_click_chooses_a_cell(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.ask("SELECT range AS n, range * 2 AS twice FROM range(50)")
        await at.pilot.click(ResultTable, offset=(4, 5))
        assert at.rows.cursor == (4, 1)
        assert "5/50 twice 8" in at.cell


# --- values ------------------------------------------------------------------------------------

HOSTILE = (
    "chr(27) || '[31m' || chr(27) || ']0;title' || chr(7)",
    "chr(13) || chr(10) || chr(8)",
    "chr(8238) || 'abc' || chr(8203)",
    "'[bold red]x[/] [link=http://a]b[/link] :smile:'",
    "repeat('x', 1_000_000)",
    "repeat('漢字', 10_000)",
    "'👩' || chr(8205) || '🚀'",
    '\'{"a": 1, "b": "\' || chr(92) || \'u001b[2J"}\'',
    "'\\x1b'::BLOB",
)


@pytest.mark.parametrize("size", SIZES)
async def test_no_value_steers_the_terminal(tmp_path, size):
    async with running(tmp_path, put("a", "b"), size=size) as at:
        for value in HOSTILE:
            await at.ask(f'SELECT {value} AS "v[bold]", {value} AS w')
            assert at.rows.row_count == 1, at.words
            at.rows.focus()
            await at.press("home", "v", "right", "v", "y")
            assert all(each.isprintable() or each == "\n" for each in at.screen), value
            assert all(each.isprintable() for each in at.app.clipboard), value
            assert all(cell_len(line) <= size[0] for line in at.screen.split("\n")), value
            if "[bold red]" in value:
                assert "[bold red]x[/]" in at.screen
                assert "v[bold]" in at.screen


async def test_values_look_like_what_they_are(tmp_path):
    async with running(tmp_path, put("a", "b"), size=(160, 50)) as at:
        await at.ask(
            "SELECT NULL AS nothing, '' AS empty, true AS yes, x'00ff' AS bytes, 1.5 AS real,"
            " '{ \"a\" : [1, 2] }'::JSON AS json, [1, NULL] AS list, {'k': 'v'} AS struct,"
            " TIMESTAMP '2026-01-02 03:04:05' AS moment, 170141183460469231731687::HUGEINT AS huge"
        )
        line = next(line for line in at.screen.split("\n") if "0x00ff" in line)
        assert line.split() == [
            "NULL", "true", "0x00ff", "1.5", '{"a":[1,2]}', "[1,null]", '{"k":"v"}',
            "2026-01-02", "03:04:05", "170141183460469231731687",
        ]  # fmt: skip


async def test_a_long_value_is_whole_below_the_table_and_in_the_clipboard(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.ask("SELECT 1 AS n, string_agg(range, ' ') AS text FROM range(100)")
        assert at.rows.row_count == 1, at.words
        await at.press("escape", "right")
        assert "more (v: all, y: copy)" in at.cell
        await at.press("v")
        assert "".join(at.cell.split()).endswith("979899")
        await at.press("v", "y")
        assert at.app.clipboard == " ".join(map(str, range(100)))


async def test_of_an_endless_value_the_beginning_is_shown_and_copied(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.ask("SELECT repeat('x' || chr(27), 2_000_000) AS text")
        begun_s = time.perf_counter()
        await at.press("escape", "v", "y")
        assert time.perf_counter() - begun_s < 2
        assert "more (v: all, y: copy)" in at.cell
        assert 0 < len(at.app.clipboard) < 1_000_000


SUBJECTS = (
    ("SELECT slot FROM commits WHERE slot = 2", Subject("slot", "2")),
    ("SELECT ballot FROM commits WHERE slot = 2", Subject("ballot", "0.1.1")),
    ("SELECT voter FROM commits WHERE slot = 2", Subject("voter", "1")),
    ("SELECT id FROM members", Subject("member", "m1")),
    ("SELECT lease AS slot FROM members", None),
    ("SELECT zone FROM members", None),
    ("SELECT id FROM members WHERE false", None),
    ("nonsense", None),
)


async def test_the_selected_cell_is_what_explain_explains(tmp_path):
    async with running(tmp_path, engine(MemberJoin("m1", zone="z"))) as at:
        assert at.pane.subject() is None
        for sql, subject in SUBJECTS:
            await at.ask(sql)
            assert at.pane.subject() == subject, sql


# --- what goes wrong ---------------------------------------------------------------------------


MISTAKES = (
    ("DELETE FROM members", "exactly one SELECT is run here, this is: DELETE", "`trex config`"),
    ("SELECT 1; SELECT 2", "exactly one SELECT", "One SELECT at a time"),
    ("SELECT * FROM membres", "Did you mean", "Tab completes"),
    ("SELECT FROM", "syntax error", "F2"),
    ("FROM members_at(99)", "stored is slot 2", "Tab completes"),
    ("FROM read_csv('/etc/passwd')", "disabled", "only read"),
    ("SELECT range FROM range(300_000)", "more than 200000 rows", "Add a LIMIT"),
    ("SELECT list(range) FROM range(30_000_000)", "memory", "Ask for less"),
    ("SELECT '[bold]' || chr(27) || nope", "nope", "Tab completes"),
)


async def test_an_error_says_what_is_wrong_and_what_to_do(tmp_path):
    async with running(tmp_path, put("a", "b"), size=(160, 50)) as at:
        for sql, told, advised in MISTAKES:
            await at.ask(sql)
            assert "not answered" in at.status
            assert not at.rows.display
            words = " ".join(at.words.split())
            assert told.lower() in words.lower()
            assert advised in words
            assert all(each.isprintable() or each == "\n" for each in at.screen), sql
        await at.ask("SELECT 1")
        assert at.values() == [1], "the next one is answered"
        assert at.words == ""


async def test_the_place_of_a_mistake_is_marked(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.ask("SELECT key, valeu FROM config")
        lines = at.words.split("\n")
        marked = next(n for n, line in enumerate(lines) if "^" in line)
        assert lines[marked - 1][lines[marked].index("^") :].startswith("valeu")


ERRORS = (
    SqlRefusedError("x"),
    SqlInvalidError("x"),
    SqlDeadlineError("x"),
    SqlTooLargeError("x"),
    SqlMemoryError("x"),
    SqlBusyError("x"),
    SqlUnavailableError("x"),
    NoStoreError("x"),
)


async def test_each_error_has_advice():
    error: Exception = SqlError("x")

    async def answer(_: str):
        raise error

    async with on_screen(FakeListener(applied=5, answer=answer), size=(100, 30)) as at:
        for error in ERRORS:
            await at.ask("SELECT 1")
            assert "✗ x" in at.words
            assert advice_on(error)
            assert advice_on(error) in " ".join(at.words.split())


async def test_nothing_stored_yet_and_no_store_at_all_are_said():
    async def answer(_: str):
        return QueryResult((), (), (), 0, 0)

    async with on_screen(FakeListener(applied=0, answer=answer)) as at:
        assert "nothing is stored yet" in at.words
        assert "nothing is stored yet" in at.slider.text()
        at.slider.focus()
        await at.press("left", "home", "pageup")
        assert at.slider.slot is None
    without = FakeListener(applied=5, answer=answer)
    without.stored = None
    async with on_screen(without) as at:
        assert "keeps no store" in at.words


# --- a query that runs -------------------------------------------------------------------------


async def test_a_running_query_is_told_and_cancelled_at_once(tmp_path):
    async with stored(tmp_path, *CONFIGS) as (listener, _), on_screen(listener) as at:
        at.prompt.put(ENDLESS)
        await at.pilot.press("enter")
        await at.until(lambda: "running" in at.status, "running")
        before = at.status
        await at.until(lambda: at.status != before, "telling for how long")
        assert "Esc cancels" in at.status
        await at.pilot.press("x")
        assert at.prompt.text.endswith("x"), "the screen is not held up"
        begun_s = time.perf_counter()
        await at.pilot.press("escape")
        await at.until(lambda: "cancelled after" in at.status, "cancelled")
        assert time.perf_counter() - begun_s < 1
        queries = listener._keeper.queries
        await at.until(lambda: queries.running == 0, "interrupted in the engine")
        await at.ask("SELECT 1")
        assert at.values() == [1]


async def test_a_query_ends_at_its_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(pane_module, "DEADLINE_S", 0.3)
    async with running(tmp_path, put("a", "b")) as at:
        await at.ask(ENDLESS)
        assert "not done in 300 ms" in " ".join(at.words.split())
        assert "Narrow it down" in " ".join(at.words.split())


async def test_another_query_takes_the_place_of_the_one_that_runs(tmp_path):
    async with stored(tmp_path, *CONFIGS) as (listener, _), on_screen(listener) as at:
        at.prompt.put(ENDLESS)
        await at.pilot.press("enter")
        await at.until(lambda: "running" in at.status, "running")
        await at.ask("SELECT 42")
        assert at.values() == [42]
        queries = listener._keeper.queries
        await at.until(lambda: queries.running == 0, "interrupted in the engine")


async def test_leaving_the_screen_interrupts_the_query(tmp_path):
    async with stored(tmp_path, put("a", "b")) as (listener, _):
        async with on_screen(listener) as at:
            at.prompt.put(ENDLESS)
            await at.pilot.press("enter")
            await at.until(lambda: listener._keeper.queries.running == 1, "running")
        with anyio.fail_after(DEADLINE_S):
            while listener._keeper.queries.running:
                await anyio.sleep(0.01)


async def test_again_asks_again(tmp_path):
    async with stored(tmp_path, put("a", "1")) as (listener, backbone), on_screen(listener) as at:
        await at.ask("SELECT value FROM config")
        assert at.values() == ["1"]
        last = backbone.append(put("a", "2"))
        backbone.heartbeat()
        await listener.wait_stored(last, DEADLINE_S)
        at.app.tick()
        await at.pilot.pause()
        assert at.values() == ["1"], "nobody asked"
        await at.press("escape", "r")
        assert at.values() == ["2"]
        assert "as of slot 3" in at.status


# --- the slider --------------------------------------------------------------------------------


async def test_the_slider_scrubs_through_time(tmp_path):
    async with running(tmp_path, *CONFIGS) as at:
        await at.ask("SELECT value FROM config_at($slot)")
        assert at.values() == ["300"], "slot 301: now"
        await at.press("shift+tab")
        at.slider.focus()
        for key, slot, value in (
            ("left", 300, "299"),
            ("left", 299, "298"),
            ("right", 300, "299"),
            ("pageup", 200, "199"),
            ("shift+left", 197, "196"),
            ("shift+right", 200, "199"),
            ("pagedown", 300, "299"),
            ("right", None, "300"),
            ("home", 0, None),
            ("right", 1, None),
            ("right", 2, "1"),
            ("end", None, "300"),
        ):
            await at.press(key)
            assert at.slider.slot == slot, key
            assert at.values() == ([] if value is None else [value]), key
            if slot is not None:
                assert f"$slot {slot}" in at.status
                assert f"$slot {slot}" in at.slider.text()


async def test_the_slider_moves_from_the_table_too(tmp_path):
    async with running(tmp_path, *CONFIGS) as at:
        await at.ask("SELECT $slot")
        await at.press("left_square_bracket")
        assert at.prompt.text == "SELECT $slot[", "in the prompt it is typed"
        await at.press("escape", "left_square_bracket", "left_curly_bracket")
        assert at.app.focused is at.rows
        assert at.values() == [200]
        await at.press("right_square_bracket", "right_curly_bracket")
        assert at.values() == [301]
        assert at.slider.slot is None


async def test_beside_the_slider_stands_what_the_slot_is(tmp_path):
    async with running(tmp_path, *CONFIGS, size=(160, 50)) as at:
        at.slider.focus()
        assert "now: $slot is the newest stored slot, 301" in at.slider.text()
        await at.press("left")
        told = at.slider.text()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1_700_000_000))
        assert when in told
        assert "under 0.1.1" in told
        assert "config_put speed" in told or "put speed" in told
        await at.press("home")
        assert "before the first slot kept here" in at.slider.text()


async def test_a_slot_is_typed(tmp_path):
    async with running(tmp_path, *CONFIGS) as at:
        await at.ask("SELECT $slot")
        at.slider.focus()
        await at.press("g", "1", "2", "9", "backspace")
        assert "go to slot: 12" in at.slider.text()
        await at.press("enter")
        assert at.slider.slot == 12
        assert at.values() == [12]
        await at.press("g", "7", "escape")
        assert at.slider.slot == 12
        await at.press("g", "9", "9", "9", "9", "enter")
        assert at.slider.slot is None, "beyond the newest is now"
        await at.press("g", "enter")
        assert at.slider.slot is None


async def test_the_slider_follows_the_mouse(tmp_path):
    async with running(tmp_path, *CONFIGS) as at:
        await at.ask("SELECT $slot")
        await at.pilot.mouse_down(SlotSlider, offset=(3, 0))
        assert at.slider.slot == 0
        await at.pilot.hover(SlotSlider, offset=(40, 0))
        middle = at.slider.slot
        assert 100 < middle < 200
        await at.pilot.mouse_up(SlotSlider, offset=(40, 0))
        await at.pilot.hover(SlotSlider, offset=(10, 0))
        assert at.slider.slot == middle, "let go"
        await at.settled()
        assert at.values() == [middle]
        await at.pilot.click(SlotSlider, offset=(79, 0))
        assert at.slider.slot is None


async def test_now_follows_and_a_slot_of_the_past_stays(tmp_path):
    async with stored(tmp_path, *CONFIGS) as (listener, backbone), on_screen(listener) as at:
        at.slider.focus()
        await at.press("left", "right")
        assert at.slider.slot is None

        async def more(value: str) -> None:
            last = backbone.append(put("speed", value))
            backbone.heartbeat()
            await listener.wait_stored(last, DEADLINE_S)
            at.app.tick()
            await at.pilot.pause()

        await more("x")
        assert "newest stored slot, 302" in at.slider.text()
        await at.press("left")
        assert at.slider.slot == 301
        await more("y")
        assert at.slider.slot == 301


async def test_moves_are_gathered_and_the_last_one_wins(tmp_path):
    async with stored(tmp_path, *CONFIGS) as (listener, _), on_screen(listener) as at:
        await at.ask("SELECT value FROM config_at($slot)")
        asked = []
        real = listener.sql

        async def counting(text: str, **arguments):
            asked.append(text)
            return await real(text, **arguments)

        listener.sql = counting
        at.slider.focus()
        await at.press(*["left"] * 20)
        assert at.slider.slot == 281
        assert at.values() == ["280"]
        assert len([text for text in asked if "config_at" in text]) < 20


async def test_only_a_query_that_used_the_slot_is_asked_again(tmp_path):
    async with running(tmp_path, *CONFIGS) as at:
        await at.ask("SELECT value, '$slot' FROM config -- $slot")
        shown = at.rows._result
        at.slider.focus()
        await at.press("left")
        assert at.rows._result is shown


async def test_history_that_begins_late_bounds_the_slider():
    async def answer(text: str):
        rows = ((100,),) if "history_from_slot" in text else ()
        return QueryResult(("n",), ("BIGINT",), rows, 500, 0)

    async with on_screen(FakeListener(applied=500, answer=answer)) as at:
        at.slider.focus()
        await at.press("home")
        assert at.slider.slot == 99


# --- the prompt: history, completion -------------------------------------------------------------


async def test_older_and_newer_queries(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.ask("SELECT 1")
        await at.ask("SELECT 2\nAS two")
        await at.ask("SELECT 2\nAS two")
        at.prompt.put("draft")
        await at.press("up")
        assert at.prompt.text == "SELECT 2\nAS two", "the same twice is kept once"
        await at.press("up")
        assert at.prompt.cursor_location[0] == 0, "within a query up is a line up"
        await at.press("up")
        assert at.prompt.text == "SELECT 1"
        await at.press("up")
        assert at.prompt.text == "SELECT 1"
        await at.press("down", "down")
        assert at.prompt.text == "draft"
        await at.press("down")
        assert at.prompt.text == "draft"


async def test_queries_are_remembered_on_disk(tmp_path):
    path = tmp_path / "state" / "trex" / "sql_history"
    async with running(tmp_path / "one", put("a", "b"), past=History(path)) as at:
        await at.ask("SELECT 'a\nb'")
        await at.ask("SELECT 2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    async with running(tmp_path / "two", put("a", "b"), past=History(path)) as at:
        await at.press("up")
        assert at.prompt.text == "SELECT 2"
        await at.press("up")
        assert at.prompt.text == "SELECT 'a\nb'"


async def test_history_that_cannot_be_read_is_ignored_with_a_note(tmp_path):
    path = tmp_path / "sql_history"
    path.mkdir()
    async with running(tmp_path / "one", put("a", "b"), past=History(path), size=(160, 50)) as at:
        assert "history is kept until you leave only" in at.status
        await at.ask("SELECT 1")
        assert at.values() == [1]


def test_history_is_bounded_and_passes_over_rubbish(tmp_path, monkeypatch):
    monkeypatch.setattr(sqltext, "HISTORY_MAX", 10)
    path = tmp_path / "sql_history"
    past = History(path)
    for n in range(30):
        past.add(f"SELECT {n}")
        past.save(f"SELECT {n}")
    with path.open("ab") as file:
        file.write(b'\xff\xfe\n{"no": 1}\n"SELECT \\u001b[2J30"\n"half')
    again = History(path)
    again.load()
    assert not again.trouble
    assert again.entries == (*(f"SELECT {n}" for n in range(21, 30)), "SELECT [2J30")
    assert len(path.read_bytes().splitlines()) == 10, "a long file is cut"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_history_follows_no_link_and_asks_no_pipe(tmp_path):
    import os

    target = tmp_path / "target"
    target.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(target)
    past = History(link)
    past.load()
    assert past.trouble
    past.save("SELECT 1")
    assert target.read_text() == "precious"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    past = History(pipe)
    past.load()  # returns
    past.save("SELECT 1")
    assert past.trouble


def test_where_history_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "trex" / "sql_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local/state/trex/sql_history"


async def test_tab_completes_after_the_real_schema(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.type("select k from con")
        assert "config" in at.status
        await at.press("tab")
        assert at.prompt.text == "select k from config"
        await at.press("tab")
        assert at.prompt.text == "select k from config_at(", "again: the next"
        await at.press("tab")
        assert at.prompt.text == "select k from config"
        await at.type(" c where c.va")
        assert at.prompt.suggestion == "lue"
        await at.press("right")
        assert at.prompt.text.endswith("c.value")
        await at.press("enter")
        assert "not answered" in at.status, "there is no column k"
        at.prompt.put("FROM members_at($")
        await at.type("s")
        await at.press("tab")
        assert at.prompt.text == "FROM members_at($slot"


async def test_tab_leaves_the_prompt_where_nothing_is_to_complete(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        await at.press("tab")
        assert at.app.focused is at.slider
        await at.press("slash")
        assert at.app.focused is at.prompt
        await at.ask("SELECT 1")
        await at.press("escape")
        assert at.app.focused is at.rows
        await at.press("i")
        assert at.app.focused is at.prompt


SCHEMA = Schema(
    {
        "members": ("id", "zone"),
        "config": ("key", "value", "slot"),
        "members_at": ("id", "zone"),
        "diff": ("kind", "key", "old", "new"),
    },
    {"members_at": ("at_slot",), "diff": ("slot_a", "slot_b")},
    ("max", "zip_code"),
)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("FROM ", ("config", "members", "diff(", "members_at(")),
        ("FROM mem", ("members", "members_at(")),
        ("from members", ()),
        ("SELECT 1 FROM config, mem", ("members", "members_at(")),
        ("SELECT id, mem", ()),
        ("SELECT zo| FROM members_at(3)", ("zone",)),
        ("SELECT d.o| FROM diff(1, 2) AS d", ("old",)),
        ("SELECT m.| FROM members m", ("id", "zone")),
        ("SELECT x.| FROM members m", ()),
        ("SELECT zi", ("zip_code(",)),
        ("SELECT zone AS z", ()),
        ("sel", ("select",)),
        ("SEL", ("SELECT",)),
        ("FROM members_at($n", ("$now",)),
        ("FROM members_at($", ("$slot", "$now")),
        ("SELECT 'fro", ()),
        ("SELECT 1 -- fro", ()),
        ("SELECT /* fro", ()),
        ("SELECT $$ fro", ()),
        ("SELECT 'a' fro", ("from",)),
        ("", ()),
        ("SELECT ", ()),
        (".", ()),
        ("))) FROM", ()),
        ('SELECT "config".v| FROM "config"', ("value",)),
    ],
)
def test_completion(sql, expected):
    text, _, rest = sql.partition("|")
    assert complete(SCHEMA, text + rest, len(text)).candidates == expected


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("FROM diff($slot, $now)", "FROM diff(3, 9)"),
        ("FROM diff($SLOT-1,$Now)", "FROM diff(3-1,9)"),
        ("SELECT '$slot', \"$slot\" -- $slot", None),
        ("SELECT /* $slot */ $slots, $1", None),
        ("SELECT E'it\\'s $slot', $$ $slot $$, $slot$ it's $now $slot$", None),
        ("SELECT 'it''s', $slot", "SELECT 'it''s', 3"),
        ("SELECT 'open $slot", None),
    ],
)
def test_the_slot_is_put_in_where_sql_takes_a_number(sql, expected):
    assert filled(sql, 3, 9) == (sql if expected is None else expected)
    assert uses_slot(sql) == (expected is not None)


def test_taking_a_query_apart_is_total():
    draw = random.Random(7)
    for _ in range(500):
        text = "".join(draw.choices("ab$'\"-/*\n eE\\;.,()1é\x00漢", k=draw.randrange(30)))
        pieces = list(tokens(text))
        rest = text
        for piece in reversed(pieces):
            assert text[piece.start : piece.end] == piece.text
            rest = rest[: piece.start] + rest[piece.end :]
        assert not rest.strip(), "only space is left out"
        for at in range(len(text) + 1):
            complete(SCHEMA, text, at)
        filled(text, 1, 2)


async def test_what_is_pasted_steers_nothing(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        at.prompt.focus()
        at.app.post_message(events.Paste("SELECT\t1\r\n\x1b[31m, 2"))
        await at.settled()
        assert at.prompt.text == "SELECT    1\n[31m, 2"


async def test_keys_of_one_burst_take_effect_in_order(tmp_path):
    async with running(tmp_path, put("a", "b")) as at:
        at.prompt.focus()
        at.prompt.put("SELECT 1")
        burst = [("ctrl+u", None), *((each, each) for each in "fromcon"), ("backspace", "\x08")]
        for key, character in [*burst, ("n", "n"), ("enter", "\r"), ("x", "x")]:
            at.app.post_message(events.Key(key, character))
        await at.settled()
        assert at.prompt.text == "fromconx"
        assert at.pane._last == "fromcon"


# --- in a replay ---------------------------------------------------------------------------------


async def test_in_a_replay_everything_is_asked_as_it_was_then(tmp_path):
    recording = Path(__file__).parent / "recordings" / "failover.trexrec.gz"
    async with open_replay(recording, directory=tmp_path / "own", speed=0, at_ms=10**9) as feed:
        app = Tiny(feed, History())
        app.now_ms = lambda: feed.take()[-1].at_ms
        async with app.run_test(size=(120, 30)) as pilot:
            app.tick()
            at = Driver(app, pilot)
            await at.settled()
            app.tick()
            await at.press("f2", *["down"] * 6, "enter")
            assert at.prompt.text.startswith("FROM ballots")
            assert at.rows.row_count >= 2, "who led before and after the failover"
            begins = at.values(at.rows._result.columns.index("first_slot"))[0]
            await at.ask("SELECT count(*) FROM commits WHERE slot <= $slot")
            assert at.values() == [feed.listener.stored]
            await at.press("escape", "left_curly_bracket")
            assert at.values() == [feed.listener.stored - 100]
            assert " ago under " in at.slider.text()
            at.slider.focus()
            await at.press("g", *str(begins), "enter")
            assert f"$slot {begins:,}" in at.slider.text()


# --- in the dashboard ----------------------------------------------------------------------------


async def test_in_the_dashboard_what_is_typed_is_no_key(tmp_path, monkeypatch):
    verdict = advice.Verdict("ok", "healthy", "healthy", 1, 2)
    monkeypatch.setattr(advice, "verdict", lambda _: verdict)
    monkeypatch.setattr(advice, "findings", lambda _: ())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    async with stored(tmp_path, put("a", "b")) as (listener, _):
        feed = FakeFeed(listener=listener)
        app = DashApp(opens(feed))
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            await pilot.press("4")
            await pilot.pause()
            pane = app.pane
            assert isinstance(pane, SqlPane)
            prompt = app.query_one(Prompt)
            assert app.focused is prompt
            await pilot.press(*"select", "space", *"1234", "space", *"as", "space", *"q")
            assert prompt.text == "select 1234 as q"
            await pilot.press("enter")
            rows = app.query_one(ResultTable)
            with anyio.fail_after(DEADLINE_S):
                while rows.row_count == 0:
                    await pilot.pause(0.01)
            await pilot.press("escape", "2")
            assert app.pane is not pane
            await pilot.press("4", "escape", "question_mark")
            assert app.screen is not app.screen_stack[0], "help"
