"""The tab SQL: this module alone asks the listener's own store, and travels through its past.

The prompt takes one SELECT; the answer is a table of which only the visible lines are ever drawn.
The slider names a slot of the past: ``$slot`` in a query is that number, and a query that used it
is asked again while the slider moves.  A query never holds the screen up and never outlives its
deadline; who is impatient cancels it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import ClassVar, Final

import msgspec
from rich.cells import cell_len
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Label, OptionList, Static
from textual.widgets.option_list import Option
from textual.worker import Worker

from dashboard.feed import Feed
from dashboard.sqltext import (
    History,
    Schema,
    filled,
    history_path,
    one_line,
    uses_slot,
    whole,
)
from dashboard.tables import visible
from dashboard.view import View
from dashboard.widgets.lines import Line, Lines, cut, width_of, wrap
from dashboard.widgets.pane import Pane, Subject
from dashboard.widgets.prompt import Prompt
from dashboard.widgets.results import ResultTable
from dashboard.widgets.slider import PAGE_SLOTS, Moment, SlotSlider
from dashboard.words import age, count, plural
from listeners.listener import Listener, ListenerStoppedError, NoStoreError
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
from listeners.workers import Workers

DEADLINE_S: Final = 10.0
"""A query not done by then is interrupted, in seconds."""
SCRUB_S: Final = 0.1
"""Soonest after a move of the slider its query is asked again, in seconds."""
TICK_S: Final = 0.1
"""So often the time a running query has taken is told anew, in seconds."""
DETAIL_LINES: Final = 2
"""The value of the selected cell is told in so many lines below the table."""
SCHEMA_FUNCTIONS: Final = 2_000
"""Most functions that are completed to."""


class Question(msgspec.Struct, frozen=True):
    """A ready-made query."""

    title: str
    sql: str


QUESTIONS: Final = (
    Question(
        "who owns what",
        "SELECT replicas[1] AS owner, count(*) AS ranges,\n"
        "  round(100 * sum(end_token::HUGEINT - start_token + 1) / 2::DOUBLE ** 64, 2) AS percent\n"
        "FROM ring GROUP BY owner ORDER BY percent DESC, owner",
    ),
    Question(
        "members by zone",
        "SELECT zone, state, count(*) AS members, sum(weight)::BIGINT AS weight\n"
        "FROM members_at($slot) GROUP BY ALL ORDER BY ALL",
    ),
    Question("members at the slot of the slider", "FROM members_at($slot) ORDER BY id"),
    Question("config at the slot of the slider", "FROM config_at($slot) ORDER BY key"),
    Question(
        "what changed in the last 100 slots",
        "SELECT slot, kind, op, key, old, new FROM history\n"
        "WHERE slot BETWEEN $slot - 99 AND $slot ORDER BY slot DESC",
    ),
    Question("what differs between the slot of the slider and now", "FROM diff($slot, $now)"),
    Question("leadership so far", "FROM ballots ORDER BY first_slot DESC"),
    Question(
        "largest commits",
        "SELECT slot, bytes, kind, key, ballot, time FROM commits\n"
        "ORDER BY bytes DESC, slot DESC LIMIT 20",
    ),
    Question(
        "commits by the minute",
        "SELECT date_trunc('minute', time) AS minute, count(*) AS commits,\n"
        "  sum(bytes)::BIGINT AS bytes\n"
        "FROM commits WHERE time IS NOT NULL GROUP BY minute ORDER BY minute DESC LIMIT 120",
    ),
    Question("where this listener is", "FROM listener"),
)
"""What F2 offers, each a query of its own."""

_SCHEMA_COLUMNS: Final = (
    "SELECT table_name, column_name FROM duckdb_columns()"
    " WHERE schema_name = 'main' AND NOT internal ORDER BY table_name, column_index"
)
_SCHEMA_MACROS: Final = (
    "SELECT function_name, parameters FROM duckdb_functions()"
    " WHERE schema_name = 'main' AND NOT internal AND function_type = 'table_macro'"
)
_SCHEMA_FUNCTIONS: Final = (
    "SELECT DISTINCT function_name FROM duckdb_functions()"
    " WHERE function_type IN ('scalar', 'aggregate', 'macro')"
    " AND regexp_full_match(function_name, '[a-z][a-z0-9_]+')"
    f" ORDER BY length(function_name), function_name LIMIT {SCHEMA_FUNCTIONS}"
)
_OLDEST: Final = "SELECT history_from_slot FROM listener"
_MOMENT: Final = "SELECT slot, time, ballot, kind, key FROM commits WHERE slot = $slot"

_FAILURES: Final = (SqlError, NoStoreError, ListenerStoppedError, TimeoutError)
"""What asking the listener raises."""


def advice_on(error: Exception) -> str:
    """What to do about a query that failed."""
    match error:
        case SqlRefusedError():
            return (
                "One SELECT at a time is run here, and it can only read what the listener stores. "
                "Changes are made with `trex config`, `trex members`, `trex lock`."
            )
        case SqlInvalidError():
            return "Tab completes names of tables and columns, F2 has ready-made questions."
        case SqlDeadlineError():
            return "Narrow it down: a range of slots in WHERE, fewer columns, a LIMIT."
        case SqlTooLargeError():
            return "Add a LIMIT, or count and sum instead of listing."
        case SqlMemoryError():
            return "Ask for less at once: fewer columns, a range of slots, no sort of everything."
        case SqlBusyError():
            return "Other queries run at the same time: try again in a moment."
        case SqlUnavailableError() | ListenerStoppedError():
            return "The dashboard's own listener is stopping; start the dashboard again."
        case NoStoreError():
            return "Start the dashboard with a directory for its store to use SQL."
        case _:
            return ""


# --- ready-made questions -----------------------------------------------------------------------


class Questions(ModalScreen[Question | None]):
    """Ready-made questions, one of which is asked."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f2,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        """The questions, and the SQL of the one chosen."""
        with Vertical(id="sql-questions"):
            yield OptionList(*(Option(each.title) for each in QUESTIONS), markup=False)
            yield Static(id="sql-question", markup=False)
        yield Label("Enter asks   ↑ ↓ choose   Esc closes", id="sql-questions-keys")

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show what would be asked."""
        self.query_one("#sql-question", Static).update(QUESTIONS[event.option_index].sql)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Leave with what was chosen."""
        self.dismiss(QUESTIONS[event.option_index])


# --- the tab ----------------------------------------------------------------------------------


class _Asked(msgspec.Struct, frozen=True):
    """A query as it was typed, and the slots it was asked for."""

    sql: str
    slot: int
    now: int


class SqlPane(Pane):
    """SQL over what the dashboard's own listener stored."""

    TITLE = "SQL"
    HELP = """
Ask the store of the dashboard's own listener: it holds everything the voters fixed, and asking it
costs them nothing. One SELECT at a time; it can only read, and is interrupted after 10 s.

- as of the newest stored slot: `members`, `config`, `leases`, `ring`
- the past: `commits` (every slot one row), `history` (every change, old and new row), `ballots`
  (who led when)
- `listener`: where this listener is
- time travel: `members_at(slot)`, `config_at(slot)`, `diff(a, b)`

In a query `$slot` is the slot of the slider and `$now` the newest stored one. Moving the slider
asks a query with `$slot` again.

    SELECT id, zone, state FROM members WHERE zone = 'a'
    FROM config_at($slot) WHERE key LIKE 'limits/%'
    SELECT key, old, new FROM diff($slot, $now)

Times are UTC in the tables, local beside the slider; they are the proposers' clocks.

| Key | |
|---|---|
| Enter, Ctrl+J | run; a new line |
| Tab, → | complete the word; Tab again: the next possibility |
| ↑ ↓ | older and newer queries |
| F2 | ready-made questions (outside the prompt `a` too) |
| Esc | cancel the query that runs; else leave the prompt |
| i or / | back into the prompt |
| r | ask again |
| [ ], { } | move the slider by 1 slot, 100 slots, from wherever you are |
| arrows, PgUp, PgDn, Home, End | in the table: move |
| ← →, PgUp, PgDn, Home, End | on the slider: 1 slot, 100 slots, oldest, now |
| Shift+← → | on the slider: 1 % |
| g | on the slider: type a slot |
| v, y | in the table: the whole value; copy it |
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f2", "questions", "Questions"),
        Binding("a", "questions", show=False),
        Binding("escape", "leave", "Stop, leave"),
        Binding("i,slash", "prompt", "Prompt", key_display="/"),
        Binding("left_square_bracket", "slide(-1)", "Slide", key_display="[ ]"),
        Binding("right_square_bracket", "slide(1)", show=False),
        Binding("left_curly_bracket", f"slide(-{PAGE_SLOTS})", show=False),
        Binding("right_curly_bracket", f"slide({PAGE_SLOTS})", show=False),
        Binding("r", "again", "Again"),
        Binding("v", "value", "Whole"),
        Binding("y", "copy", "Copy"),
    ]

    def __init__(self, past: History | None = None) -> None:
        super().__init__()
        self._past = History(history_path()) if past is None else past
        self._thread = Workers("trex-history")
        self._listener: Listener | None = None
        self._oldest = 1
        self._resets = 0
        self._last: str | None = None
        """The query asked last, as typed."""
        self._work: Worker[None] | None = None
        """The query that runs."""
        self._begun_s = 0.0
        self._ticking: Timer | None = None
        self._scrubbing: Timer | None = None
        self._moved = False
        """The slider moved, and nobody has looked yet."""
        self._told: Line = ()
        self._hints: Line = ()
        self._error = ""
        self._answered = False
        self._expanded = False

    def compose(self) -> ComposeResult:
        """From above: the prompt, the slider, the status, the answer, the selected cell."""
        yield Prompt(self._past)
        yield SlotSlider()
        yield Lines(id="sql-status")
        yield ResultTable()
        yield Lines(id="sql-words")
        yield Lines(id="sql-cell")

    def on_mount(self) -> None:
        """Remember what was asked before."""
        self._prompt = self.query_one(Prompt)
        self._slider = self.query_one(SlotSlider)
        self._rows = self.query_one(ResultTable)
        self._rows.display = False
        self.run_worker(self._remember_past(), group="history")
        self._tell()

    def on_unmount(self) -> None:
        """Its thread is not needed any more."""
        self._thread.close()

    async def _remember_past(self) -> None:
        await self._thread.run(self._past.load)
        self._tell()

    # --- the contract of a pane

    def show(self, view: View, feed: Feed) -> None:
        """Follow the newest stored slot; nothing is asked for it."""
        listener = feed.listener
        resets = listener.counters.get("resets", 0)
        if listener is not self._listener or resets != self._resets:
            if listener is not self._listener and self._listener is not None:
                self._slider.action_now()
            self._listener, self._resets = listener, resets
            self.run_worker(
                self._learn(listener), group="schema", exclusive=True, exit_on_error=False
            )
        self._slider.show(self._oldest - 1, listener.stored or 0, view.now_ms)
        if not self._answered and not self._error:
            self._draw_words()

    def subject(self) -> Subject | None:
        """The slot, ballot, voter or member that the selected cell names."""
        chosen = self._rows.selected if self._rows.display else None
        if chosen is None or chosen[2] is None:
            return None
        column, _, value = chosen
        match column:
            case "slot" | "first_slot" | "last_slot" | "joined_slot" | "updated_slot":
                kind = "slot"
            case "ballot" | "voter":
                kind = column
            case "id" | "owner" if isinstance(value, str):
                kind = "member"
            case _:
                return None
        return Subject(kind, str(value)) if isinstance(value, (int, str)) else None

    # --- what is known of the store

    async def _learn(self, listener: Listener) -> None:
        """Ask once what there is to ask for, and how far back it goes."""
        with suppress(*_FAILURES):
            found = await listener.sql(_OLDEST, deadline_s=DEADLINE_S)
            if found.rows and isinstance(found.rows[0][0], int):
                self._oldest = found.rows[0][0]
            self._prompt.schema = await _schema_of(listener)
            self._tell()

    # --- asking

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        self.ask(event.sql)

    def ask(self, sql: str) -> None:
        """Run ``sql`` now, instead of whatever runs; what comes of it is shown."""
        if not sql.strip():
            return
        if self._past.add(sql):
            self.run_worker(self._keep(sql), group="history")
        self._last = sql
        self._run(sql)

    async def _keep(self, sql: str) -> None:
        await self._thread.run(self._past.save, sql)
        if self._past.trouble:
            self._tell()

    def _run(self, sql: str) -> None:
        self._stop()
        listener = self._listener
        if listener is None:
            self._fail("the stream of the voters is not joined yet", "Try again in a moment.")
            return
        self._begun_s = monotonic()
        self._ticking = self.set_interval(TICK_S, self._tell)
        self._work = self.run_worker(self._answer(listener, sql), group="sql")
        self._tell()

    async def _answer(self, listener: Listener, sql: str) -> None:
        now = listener.stored or 0
        slot = self._slider.slot
        asked = _Asked(sql, now if slot is None else min(slot, now), now)
        try:
            result = await listener.sql(filled(sql, asked.slot, asked.now), deadline_s=DEADLINE_S)
        except _FAILURES as error:
            self._ended()
            self._fail(str(error), advice_on(error))
        else:
            took_s = monotonic() - self._begun_s
            self._ended()
            self._show_result(asked, result, took_s)
        self._look_again()

    def _show_result(self, asked: _Asked, result: QueryResult, took_s: float) -> None:
        self._answered, self._error = True, ""
        self._rows.display = True
        self._rows.show(result)
        self._draw_words()
        rows = plural(len(result.rows), "row") if result.rows else "no rows"
        told: list[tuple[str, str]] = [
            (f" {rows}", "strong"),
            (f" in {_took(took_s)}, as of slot {count(result.slot)}", ""),
        ]
        if uses_slot(asked.sql):
            told.append((f", $slot {count(asked.slot)}", "strong"))
            if not result.rows and asked.slot == asked.now:
                told.append((" (now): move the slider into the past", "dim"))
        if result.lag > 0:
            told.append((f", {plural(result.lag, 'slot')} behind the tip", "dim"))
        self._told = tuple(told)
        self._tell()

    def _fail(self, text: str, advice: str) -> None:
        self._error = f"{visible(text)}\n\n→ {advice}" if advice else visible(text)
        self._told = ((" ✗ not answered", "bad"),)
        self._rows.display = False
        self._draw_words()
        self._tell()

    def _ended(self) -> None:
        self._work = None
        if self._ticking is not None:
            self._ticking.stop()
            self._ticking = None

    def _stop(self) -> bool:
        """Cancel the query that runs, if any: its engine is interrupted at once."""
        work = self._work
        if work is None:
            return False
        self._ended()
        work.cancel()
        return True

    # --- the slider

    @on(SlotSlider.Moved)
    def _slid(self) -> None:
        self._moved = True
        self._look_again()

    def _look_again(self) -> None:
        """If the slider moved, ask again soon, once for all moves until then; not before what runs
        is through."""
        if self._moved and self._scrubbing is None and self._work is None:
            self._scrubbing = self.set_timer(SCRUB_S, self._scrub)

    def _scrub(self) -> None:
        self._scrubbing = None
        if self._work is not None or self._listener is None:
            return  # when that is through, it looks again
        self._moved = False
        self.run_worker(self._ask_moment(self._listener), group="moment", exclusive=True)
        if self._last is not None and uses_slot(self._last):
            self._run(self._last)

    async def _ask_moment(self, listener: Listener) -> None:
        slot = self._slider.slot
        if slot is None:
            self._slider.tell(None)
            return
        with suppress(*_FAILURES):
            found = await listener.sql(filled(_MOMENT, slot, slot), deadline_s=DEADLINE_S)
            self._slider.tell(_moment_of(slot, found))

    # --- words

    def _tell(self) -> None:
        """The status line."""
        status = self.query_one("#sql-status", Lines)
        if self._work is not None:
            took_ms = int((monotonic() - self._begun_s) * 1000)
            status.put((((" running ", "strong"), (age(took_ms), ""), ("   Esc cancels", "dim")),))
        elif self._hints:
            status.put((self._hints,))
        else:
            trouble = self._past.trouble
            status.put(((*self._told, (f"   {visible(trouble)}" if trouble else "", "dim")),))
        self.refresh_bindings()

    def _draw_words(self) -> None:
        """What stands where the answer would: what went wrong, or what can be asked."""
        words = self.query_one("#sql-words", Lines)
        words.display = not self._rows.display
        if self._rows.display:
            words.put(())
            return
        width = max(20, self.size.width - 2)
        if self._error:
            words.put(_error_picture(self._error, width))
        else:
            words.put(self._introduction(width))

    def _introduction(self, width: int) -> tuple[Line, ...]:
        listener = self._listener
        if listener is not None and listener.stored is None:
            return (((" this listener keeps no store: there is nothing to ask", "warn"),),)
        lines: list[Line] = []
        if listener is not None and not listener.stored:
            lines += [
                ((" nothing is stored yet: no slot was heard of since the start", "warn"),),
                (),
            ]
        sources = ", ".join(
            f"{each}…)" if each.endswith("(") else each for each in self._prompt.schema.sources
        )
        lines += [((f" {line}", ""),) for line in wrap(f"Ask of: {sources or '…'}", width, 4)]
        examples = ("SELECT * FROM members", "FROM config_at($slot)", "FROM diff($slot, $now)")
        lines += [(), *(((f"   {each}", "key"),) for each in examples), ()]
        lines.append(((cut(" F2: ready-made questions   ?: help", width), "dim"),))
        return tuple(lines)

    @on(Prompt.Hinted)
    def _hinted(self, event: Prompt.Hinted) -> None:
        self._hints = _hints_picture(event.candidates, event.chosen, self.size.width)
        self._tell()

    @on(ResultTable.Moved)
    def _cell_chosen(self) -> None:
        self._draw_cell()

    def _draw_cell(self) -> None:
        cell = self.query_one("#sql-cell", Lines)
        chosen = self._rows.selected if self._rows.display else None
        cell.display = chosen is not None
        if chosen is None:
            return
        column, sql_type, value = chosen
        width = max(20, self.size.width)
        most = max(3, self.size.height // 2) if self._expanded else DETAIL_LINES
        row, _ = self._rows.cursor
        head = f" {count(row + 1)}/{count(self._rows.row_count)} {one_line(column)} "
        text, beyond = whole(value, sql_type)
        cell.put(_cell_picture(head, text, beyond, width, most))

    def on_resize(self) -> None:
        """Words are broken anew."""
        if self.is_mounted:
            self._draw_words()
            self._draw_cell()

    # --- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Only what can be done now is offered."""
        if not self.is_mounted:
            return True
        match action:
            case "leave":
                return self._work is not None or self.screen.focused is self._prompt
            case "copy" | "value":
                return self._rows.display and self._rows.selected is not None
            case "again":
                return self._last is not None
            case "prompt" | "slide":
                return self.screen.focused is not self._prompt
            case _:
                return super().check_action(action, parameters)

    def action_leave(self) -> None:
        """Cancel the query that runs; else leave the prompt."""
        took_s = monotonic() - self._begun_s
        if self._stop():
            self._moved = False
            self._told = ((f" cancelled after {_took(took_s)}", "warn"),)
            self._tell()
        elif self._rows.display:
            self._rows.focus()
        else:
            self._slider.focus()

    def action_prompt(self) -> None:
        """Back into the prompt."""
        self._prompt.focus()

    def action_slide(self, slots: int) -> None:
        """Move the slider from wherever the keys go."""
        self._slider.action_move(slots)

    def action_again(self) -> None:
        """Ask the last query again."""
        if self._last is not None:
            self._run(self._last)

    def action_questions(self) -> None:
        """Choose a ready-made question, and ask it."""

        def chosen(question: Question | None) -> None:
            if question is not None:
                self._prompt.put(question.sql)
                self.ask(question.sql)

        self.app.push_screen(Questions(), chosen)

    def action_value(self) -> None:
        """The whole value of the cell, or its beginning again."""
        self._expanded = not self._expanded
        self._draw_cell()

    def action_copy(self) -> None:
        """Copy the value of the cell, what would steer a terminal spelled out."""
        chosen = self._rows.selected
        if chosen is not None:
            text, beyond = whole(chosen[2], chosen[1])
            text = text.replace("\n", "\\n")
            self.app.copy_to_clipboard(text)
            told = "the first " if beyond else ""
            self.notify(f"copied {told}{plural(len(text), 'character')}", timeout=2)


async def _schema_of(listener: Listener) -> Schema:
    """What there is to ask for. Raises what asking raises."""
    columns: dict[str, tuple[str, ...]] = {}
    found = await listener.sql(_SCHEMA_COLUMNS, deadline_s=DEADLINE_S)
    for table, column in found.rows:
        columns[str(table)] = (*columns.get(str(table), ()), str(column))
    macros: dict[str, tuple[str, ...]] = {}
    found = await listener.sql(_SCHEMA_MACROS, deadline_s=DEADLINE_S)
    now = str(listener.stored or 0)
    for name, parameters in found.rows:
        macros[str(name)] = tuple(map(str, parameters))
        columns[str(name)] = ()
        with suppress(SqlError):  # one that is not about slots
            slots = ", ".join(now for _ in parameters)
            told = await listener.sql(f"FROM {name}({slots}) LIMIT 0", deadline_s=DEADLINE_S)
            columns[str(name)] = told.columns
    found = await listener.sql(_SCHEMA_FUNCTIONS, deadline_s=DEADLINE_S)
    return Schema(columns, macros, tuple(str(row[0]) for row in found.rows))


def _moment_of(slot: int, found: QueryResult) -> Moment:
    if not found.rows:
        return Moment(slot, None, "", "")
    _, time, ballot, kind, key = found.rows[0]
    time_ms = None
    if isinstance(time, datetime):
        time_ms = int(time.replace(tzinfo=UTC).timestamp() * 1000)
    what = one_line(kind) if key is None else f"{one_line(kind)} {one_line(key)}"
    return Moment(slot, time_ms, one_line(ballot), what)


def _took(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    return f"{seconds:.1f} s"


def _hints_picture(candidates: tuple[str, ...], chosen: int, width: int) -> Line:
    """The completions, in one line of ``width`` columns; the one that is or will be inserted
    stands out."""
    pieces: list[tuple[str, str]] = []
    first = max(0, chosen - 2)
    for at, each in enumerate(candidates[first:], first):
        tone = "cursor" if at == chosen else "key" if at == 0 and chosen < 0 else "dim"
        if width_of((*pieces, (each, tone))) > width - 6:
            pieces.append(("  …", "dim"))
            break
        pieces += [("  " if pieces else " Tab ", "dim"), (each, tone)]
    return tuple(pieces)


def _error_picture(error: str, width: int) -> tuple[Line, ...]:
    """The error as it came, its lines kept so that marks stay under what they mark."""
    lines: list[Line] = []
    for number, line in enumerate(error.split("\n")):
        if line.startswith("→"):
            lines += [((f" {part}", "strong"),) for part in wrap(line, width - 1, 4)]
        elif number == 0:
            lines += [((f" {part}", "bad"),) for part in wrap(f"✗ {line}", width - 1, 6)]
        else:
            lines.append(((cut(f" {line}", width), ""),))
    return tuple(lines)


def _cell_picture(head: str, text: str, beyond: int, width: int, lines_max: int) -> Sequence[Line]:
    """A value, of which ``beyond`` characters are left out already, in at most ``lines_max`` lines;
    what is left out is said."""
    room = max(10, width - 1 - cell_len(head))
    parts: list[str] = []
    at = 0
    while at < len(text) and len(parts) <= lines_max:
        end = text.find("\n", at, at + room)
        end = min(len(text), at + room) if end < 0 else end
        while cell_len(text[at:end]) > room:
            end -= 1
        parts.append(text[at:end])
        at = end + 1 if text[end : end + 1] == "\n" else end
    shown = parts[:lines_max]
    if beyond or len(parts) > lines_max:
        left = len(text) - sum(map(len, shown)) + beyond
        note = f"… {count(left)} more (v: all, y: copy)"
        shown[-1] = cut(shown[-1], max(1, room - len(note))).rstrip("…") + note
    indent = " " * cell_len(head)
    return tuple(
        ((head if number == 0 else indent, "dim"), (part, ""))
        for number, part in enumerate(shown or [""])
    )
