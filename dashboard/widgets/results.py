"""A table of any size of which only the visible lines are ever drawn: this widget alone shows the
result of a query.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, ClassVar, Final

from rich.cells import cell_len
from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from dashboard.sqltext import one_line
from dashboard.widgets.lines import STYLES
from dashboard.widgets.rows import cursor_style, fitted
from listeners.sql import QueryResult

CELL_COLUMNS: Final = 40
"""Where a table does not fit, none of its columns is wider than this."""
CELL_COLUMNS_MAX: Final = 200
"""No column is ever wider."""
WIDTH_ROWS: Final = 400
"""The widths of columns come from so many rows, spread over the result."""


class ResultTable(ScrollView, can_focus=True):
    """A result of any size, with a cursor on one of its cells."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in STYLES}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1, 0)", "Up", show=False),
        Binding("down,j", "move(1, 0)", "Down", show=False),
        Binding("left", "move(0, -1)", "Left", show=False),
        Binding("right", "move(0, 1)", "Right", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "edge(0)", "First column", show=False),
        Binding("end", "edge(1)", "Last column", show=False),
        Binding("ctrl+home", "corner(0)", "First row", show=False),
        Binding("ctrl+end", "corner(1)", "Last row", show=False),
    ]

    class Moved(Message):
        """Another cell is selected."""

    def __init__(self) -> None:
        super().__init__(id="sql-rows")
        self._result = QueryResult((), (), (), 0, 0)
        self._titles: tuple[str, ...] = ()
        self._right: tuple[bool, ...] = ()
        self._longest: tuple[int, ...] = ()
        self._widths: tuple[int, ...] = ()
        self._starts: tuple[int, ...] = ()
        """Where each column begins; one more: where the last ends."""
        self._row = 0
        self._column = 0

    def show(self, result: QueryResult) -> None:
        """Show ``result``. The cursor stays where it is if the columns are those of before."""
        if result.columns != self._result.columns:
            self._row = self._column = 0
            self.scroll_to(0, 0, animate=False, force=True)
        self._result = result
        self._row = max(0, min(self._row, len(result.rows) - 1))
        self._titles = tuple(one_line(name) for name in result.columns)
        self._right = tuple(_is_number(sql_type) for sql_type in result.types)
        self._longest = self._measured(result)
        self._lay_out()
        self.refresh()
        self.post_message(self.Moved())

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self._result.rows)

    @property
    def cursor(self) -> tuple[int, int]:
        """The selected cell: (row, column), from 0."""
        return self._row, self._column

    @property
    def selected(self) -> tuple[str, str, Any] | None:
        """(column, type, value) of the selected cell; None if there is no row."""
        result = self._result
        if not result.rows or not result.columns:
            return None
        at = self._column
        return result.columns[at], result.types[at], result.rows[self._row][at]

    # --- where things are

    def _measured(self, result: QueryResult) -> tuple[int, ...]:
        """The columns that the longest of the rows looked at needs."""
        step = max(1, len(result.rows) // WIDTH_ROWS)
        looked = result.rows[::step]
        return tuple(
            min(
                CELL_COLUMNS_MAX,
                max(
                    cell_len(title),
                    max((cell_len(one_line(row[at], sql_type)) for row in looked), default=0),
                ),
            )
            for at, (title, sql_type) in enumerate(zip(self._titles, result.types, strict=True))
        )

    def _lay_out(self) -> None:
        room = self.scrollable_content_region.width
        cap = CELL_COLUMNS_MAX
        while cap > CELL_COLUMNS and sum(min(each, cap) + 1 for each in self._longest) > room:
            cap -= 1
        self._widths = tuple(max(1, min(each, cap)) for each in self._longest)
        self._starts = tuple(accumulate((width + 1 for width in self._widths), initial=0))
        self.virtual_size = Size(self._starts[-1], len(self._result.rows) + 1)

    def on_resize(self) -> None:
        """Columns may be wider now."""
        self._lay_out()
        self._reveal()
        self.refresh()

    # --- moving

    def _go(self, row: int, column: int) -> None:
        rows, columns = len(self._result.rows), len(self._result.columns)
        if not rows or not columns:
            return
        before = self.cursor
        self._redraw()
        self._row, self._column = max(0, min(row, rows - 1)), max(0, min(column, columns - 1))
        self._redraw()
        self._reveal()
        if self.cursor != before:
            self.post_message(self.Moved())

    def _redraw(self) -> None:
        y = self._row - self.scroll_offset.y + 1
        if 0 < y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    def _reveal(self) -> None:
        """Scroll so that the selected cell is to be seen."""
        if not self._widths:
            return
        x, y = self.scroll_offset
        region = self.scrollable_content_region
        page = max(1, region.height - 1)
        start, end = self._starts[self._column], self._starts[self._column + 1] - 1
        if end > x + region.width:
            x = end - region.width
        x = min(x, start)
        y = max(min(y, self._row), self._row - page + 1)
        if (x, y) != self.scroll_offset:
            self.scroll_to(x, y, animate=False, force=True)

    def action_move(self, rows: int, columns: int) -> None:
        """Move the cursor by cells."""
        self._go(self._row + rows, self._column + columns)

    def action_page(self, by: int) -> None:
        """Move the cursor by screens."""
        page = max(1, self.scrollable_content_region.height - 2)
        self._go(self._row + by * page, self._column)

    def action_edge(self, end: int) -> None:
        """To the first or the last column."""
        self._go(self._row, len(self._result.columns) - 1 if end else 0)

    def action_corner(self, end: int) -> None:
        """To the first or the last row."""
        self._go(len(self._result.rows) - 1 if end else 0, self._column)

    def on_click(self, event: events.Click) -> None:
        """The cursor goes where was clicked."""
        offset = event.get_content_offset(self)
        if offset is None or not self._widths:
            return
        row = offset.y + self.scroll_offset.y - 1 if offset.y else self._row
        column = bisect_right(self._starts, offset.x + self.scroll_offset.x) - 1
        if row < len(self._result.rows):
            self._go(row, column)

    def watch_has_focus(self, focused: bool) -> None:
        """The cursor is bright where the keys go."""
        super().watch_has_focus(focused)
        self.refresh()

    # --- drawing

    def render_line(self, y: int) -> Strip:
        """The heading, or a row: what of it is to be seen."""
        width = self.scrollable_content_region.width
        x = self.scroll_offset.x
        base = self.rich_style
        row = self.scroll_offset.y + y - 1
        if not self._widths or (y and row >= len(self._result.rows)):
            return Strip.blank(width, base)
        head = self.get_component_rich_style("lines--head")
        values = None if y == 0 else self._result.rows[row]
        first = max(0, bisect_right(self._starts, x) - 1)
        segments: list[Segment] = []
        shown = 0
        for at in range(first, len(self._widths)):
            if self._starts[at] >= x + width:
                break
            room, right = self._widths[at], self._right[at]
            if values is None:
                text, style = fitted(self._titles[at], room, right=right), head
            else:
                value = values[at]
                text = fitted(one_line(value, self._result.types[at]), room, right=right)
                style = base
                if row == self._row and at == self._column:
                    style = cursor_style(self)
                elif value is None:
                    style = self.get_component_rich_style("lines--dim")
                elif row == self._row:
                    style = base + self.get_component_rich_style("lines--strong", partial=True)
            segments += [Segment(text, style), Segment(" ", head if values is None else base)]
            shown += room + 1
        start = x - self._starts[first]
        fill = head if values is None else base
        return Strip(segments, shown).crop_extend(start, start + width, fill)


def _is_number(sql_type: str) -> bool:
    return sql_type.startswith(("DECIMAL", "DOUBLE", "FLOAT")) or (
        sql_type.endswith(("INT", "INTEGER")) and "[" not in sql_type
    )
