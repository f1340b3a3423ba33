"""Long tables, drawn line by line: this module alone knows how rows become lines of the screen.

Only what is visible is ever worked out, and only lines that changed are drawn again, so a table of
ten thousand rows costs what the screen costs.  Texts from outside are made visible and cut; a tone
is a component class beside a sign or a word, never the only bearer of a meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar

import msgspec
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from dashboard.tables import visible
from dashboard.widgets.lines import STYLES

K = TypeVar("K", bound=Hashable)

Cell: TypeAlias = tuple[str, str]
"""(text, the name of a style of ``lines``)"""
GUTTER: Final = "▸"
"""Before the row under the cursor."""
GAP_COLUMNS: Final = 1
"""Between two columns."""


class Column(msgspec.Struct, frozen=True):
    """A column at least ``width`` cells wide. Where all do not fit, those of the highest ``rank``
    go first; what room is left is given to columns up to ``grows`` more cells, in order."""

    name: str
    title: str
    width: int
    rank: int = 0
    right: bool = False
    grows: int = 0


def line_of(text: str) -> str:
    """``text`` on one line, with nothing in it that steers a terminal."""
    return text if text.isprintable() else visible(text).replace("\n", "\\n")


def fitted(text: str, width: int, *, right: bool = False) -> str:
    """``text`` in exactly ``width`` cells, cut with an ellipsis where it is longer."""
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…" if width else ""
    return " " * (width - length) + text if right else text + " " * (width - length)


def arranged(columns: Sequence[Column], width: int) -> tuple[tuple[int, int], ...]:
    """Which of ``columns`` (by index) fit into ``width`` cells, and how wide each is."""
    shown = list(range(len(columns)))
    while len(shown) > 1:
        needed = sum(columns[at].width + GAP_COLUMNS for at in shown)
        if needed <= width or not any(columns[at].rank for at in shown):
            break
        shown.remove(max(shown, key=lambda at: (columns[at].rank, at)))
    room = width - sum(columns[at].width + GAP_COLUMNS for at in shown)
    widths = []
    for at in shown:
        more = max(0, min(columns[at].grows, room))
        room -= more
        widths.append((at, columns[at].width + more))
    return tuple(widths)


def cursor_style(widget: Widget) -> Style:
    """Under the cursor: bright where the keys go. ``widget`` has the styles of ``lines``."""
    return widget.get_component_rich_style("lines--cursor" if widget.has_focus else "lines--strong")


class RowTable(ScrollView, Generic[K], can_focus=True):
    """A table of rows named by keys. The cursor stays on its key while rows are sorted anew; on
    the first row it stays on the first row."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in STYLES}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Up", show=False),
        Binding("down", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "edge(0)", "First", show=False),
        Binding("end", "edge(1)", "Last", show=False),
    ]

    class Moved(Message):
        """Another row is the selected one: the cursor moved, or other rows are shown."""

        def __init__(self, table: RowTable[Any]) -> None:
            super().__init__()
            self.table: Final = table

        @property
        def control(self) -> RowTable[Any]:
            """The table."""
            return self.table

    class HeaderClicked(Message):
        """The heading of column ``name`` was clicked."""

        def __init__(self, table: RowTable[Any], name: str) -> None:
            super().__init__()
            self.table: Final = table
            self.name: Final = name

        @property
        def control(self) -> RowTable[Any]:
            """The table."""
            return self.table

    def __init__(self, columns: Sequence[Column], *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._columns: Final = tuple(columns)
        self._rows: Sequence[K] = ()
        self._cells: Callable[[K], Sequence[Cell]] = lambda _: ()
        self._lines: dict[int, Sequence[Cell]] = {}
        """Cells of the rows drawn last, by index."""
        self._arranged: tuple[tuple[int, int], ...] = ()
        self._arranged_for = -1
        self._plain: Style | None = None
        self._cursor = 0
        self._key: K | None = None
        """What the cursor is on; None: whatever is first."""
        self._sorted = ("", False)

    # --- what is shown

    def show(
        self,
        rows: Sequence[K],
        cells: Callable[[K], Sequence[Cell]],
        *,
        order: tuple[str, bool] = ("", False),
    ) -> None:
        """Show ``rows``, each as ``cells(key)`` says, one cell for each column. ``order`` names the
        column they are sorted by, and whether descending."""
        before = self.selected
        if rows is not self._rows:
            counted = len(rows) != len(self._rows)
            self._rows = rows
            if counted:
                self.virtual_size = Size(0, len(rows) + 1)
        self._cells = cells
        self._place_cursor()
        if self.selected != before:
            self.post_message(self.Moved(self))
        if order != self._sorted:
            self._sorted = order
            self._redraw(0)
        drawn, self._lines = self._lines, {}
        top = self.scroll_offset.y
        for at in range(top, min(len(rows), top + self.size.height - 1)):
            self._lines[at] = told = cells(rows[at])
            if drawn.get(at) != told:
                self._redraw(at - top + 1)
        for at in drawn:
            if at >= len(rows):
                self._redraw(at - top + 1)

    @property
    def selected(self) -> K | None:
        """The row under the cursor; None if there is no row."""
        return self._rows[self._cursor] if self._cursor < len(self._rows) else None

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def select(self, key: K) -> None:
        """Put the cursor on ``key``, if it is there."""
        if key in self._rows:
            self._go(self._rows.index(key))

    def _place_cursor(self) -> None:
        before = self._cursor
        last = max(0, len(self._rows) - 1)
        if self._key is None or not self._rows:
            self._cursor = 0
        elif self._cursor > last or self._rows[self._cursor] != self._key:
            try:
                self._cursor = self._rows.index(self._key)
            except ValueError:
                self._cursor = min(self._cursor, last)
        if self._cursor != before:
            for at in (before, self._cursor):
                self._redraw(at - self.scroll_offset.y + 1)

    # --- moving

    def _go(self, at: int) -> None:
        at = max(0, min(at, len(self._rows) - 1))
        if not self._rows:
            return
        top = self.scroll_offset.y
        self._redraw(self._cursor - top + 1)
        self._redraw(at - top + 1)
        moved, self._cursor = at != self._cursor, at
        self._key = self._rows[at] if at else None
        page = max(1, self.size.height - 1)
        if at < top:
            self.scroll_to(y=at, animate=False, force=True)
        elif at >= top + page:
            self.scroll_to(y=at - page + 1, animate=False, force=True)
        if moved:
            self.post_message(self.Moved(self))

    def action_move(self, by: int) -> None:
        """Move the cursor by so many rows."""
        self._go(self._cursor + by)

    def action_page(self, by: int) -> None:
        """Move the cursor by so many screens."""
        self._go(self._cursor + by * max(1, self.size.height - 2))

    def action_edge(self, end: int) -> None:
        """Move the cursor to the first or the last row."""
        self._go(len(self._rows) - 1 if end else 0)

    def on_click(self, event: events.Click) -> None:
        """The cursor goes where was clicked; a heading says so."""
        offset = event.get_content_offset(self)
        if offset is None:
            return
        if offset.y:
            at = self.scroll_offset.y + offset.y - 1
            if at < len(self._rows):
                self._go(at)
            return
        x = len(GUTTER)
        for at, width in self._arranged:
            if x <= offset.x < x + width + GAP_COLUMNS:
                self.post_message(self.HeaderClicked(self, self._columns[at].name))
            x += width + GAP_COLUMNS

    # --- drawing

    def _redraw(self, y: int) -> None:
        if 0 <= y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    def on_resize(self) -> None:
        """Other columns may fit now."""
        self.virtual_size = Size(0, len(self._rows) + 1)
        self._go(self._cursor)
        self.refresh()

    def watch_has_focus(self, focused: bool) -> None:
        """The cursor is bright where the keys go."""
        super().watch_has_focus(focused)
        self.refresh()

    def notify_style_update(self) -> None:
        """Another theme, or the focus: the styles are looked up again."""
        super().notify_style_update()
        self._plain = None

    def render_line(self, y: int) -> Strip:
        """The heading, or one row."""
        width = self.scrollable_content_region.width
        if width != self._arranged_for:
            self._arranged_for = width
            self._arranged = arranged(self._columns, width - len(GUTTER))
        if y == 0:
            return self._heading(width)
        if self._plain is None:
            self._plain = self.rich_style
        at = self.scroll_offset.y + y - 1
        if at >= len(self._rows):
            return Strip.blank(width, self._plain)
        cells = self._lines.get(at)
        if cells is None:
            cells = self._lines[at] = self._cells(self._rows[at])
        columns = self._columns
        told = [
            (fitted(line_of(cells[index][0]), room, right=columns[index].right), cells[index][1])
            for index, room in self._arranged
        ]
        if at == self._cursor:
            return _strip([(GUTTER, ""), *told], width, lambda _: cursor_style(self))
        return _strip([(" ", ""), *told], width, self._toned)

    def _toned(self, tone: str) -> Style:
        if not tone:
            return self._plain or self.rich_style
        return self.get_component_rich_style(f"lines--{tone}")

    def _heading(self, width: int) -> Strip:
        name, descending = self._sorted
        told = [(" ", "head")]
        for index, room in self._arranged:
            column = self._columns[index]
            title, style = column.title, "head"
            if column.name == name:
                title, style = title + ("▾" if descending else "▴"), "head lines--strong"
            told.append((fitted(title, room, right=column.right), style))
        return _strip(told, width, self._headed)

    def _headed(self, style: str) -> Style:
        return self.get_component_rich_style(*f"lines--{style}".split())


def _strip(told: Sequence[Cell], width: int, style_of: Callable[[str], Style]) -> Strip:
    """The gutter and fitted cells as one line of ``width``: one segment for each run of a tone."""
    segments: list[Segment] = []
    run, running = told[0]
    used = len(run)
    for text, tone in told[1:]:
        if tone != running:
            segments.append(Segment(run, style_of(running)))
            run, running = "", tone
        run += text + " " * GAP_COLUMNS
        used += cell_len(text) + GAP_COLUMNS
    segments.append(Segment(run, style_of(running)))
    return Strip(segments, used).adjust_cell_length(width, style_of(told[0][1]))
