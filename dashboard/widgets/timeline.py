"""Who led when: this module alone draws the lanes of the ballot timeline.

A lane per voter, time from left to right, a column a fixed stretch of it.  A column shows the most
telling thing that happened in it: that somebody stood is never hidden by what followed.  Roles have
characters of their own; colour only repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from textual import events
from textual.binding import Binding, BindingType

from dashboard.tables import visible
from dashboard.view import Span, View
from dashboard.widgets.lines import Line, Lines, Picture, Piece, cut, spread
from dashboard.widgets.pane import Subject
from dashboard.words import age, moment

ZOOMS_MS: Final = (
    100,
    250,
    500,
    1_000,
    2_000,
    5_000,
    10_000,
    30_000,
    60_000,
    300_000,
    1_200_000,
)
"""Milliseconds a column."""
ZOOM: Final = 3
"""At first: a second a column."""
RANKS: Final = {"follower": 0, "down": 1, "leader": 2, "polling": 3, "candidate": 4}
"""What is drawn where several fall into one column."""
GLYPHS: Final = {"follower": "·", "down": " ", "leader": "━", "polling": "░", "candidate": "▒"}
STYLES: Final = {
    "follower": "follow",
    "down": "down",
    "leader": "lead",
    "polling": "poll",
    "candidate": "stand",
}
DID: Final = {
    "follower": "followed",
    "down": "was not heard",
    "leader": "led",
    "polling": "asked whether others hear a leader",
    "candidate": "stood for leadership",
}
DOES: Final = {
    "follower": "follows",
    "down": "is not heard",
    "leader": "leads",
    "polling": "asks whether others hear a leader",
    "candidate": "stands for leadership",
}
TICK_COLUMNS_MIN: Final = 12
"""Between two times of the axis."""
TICKS_MS: Final = (
    *(1_000, 2_000, 5_000, 10_000, 15_000, 30_000, 60_000, 120_000, 300_000, 600_000, 900_000),
    *(1_800_000, 3_600_000, 7_200_000, 14_400_000, 43_200_000, 86_400_000),
)
"""What is between them: whole moments of the day."""


def lane(
    spans: Sequence[Span], first: int, columns: int, now: int, column_ms: int
) -> list[Span | None]:
    """What each of ``columns`` columns from absolute column ``first`` shows of one voter's
    ``spans``; what lasts goes on to column ``now``."""
    cells: list[Span | None] = [None] * columns
    for span in spans:
        left = max(0, span.from_ms // column_ms - first)
        last = now if span.to_ms is None else max(span.from_ms, span.to_ms - 1) // column_ms
        rank = RANKS.get(span.role, 0)
        for at in range(left, min(columns - 1, last - first) + 1):
            there = cells[at]
            if there is None or rank >= RANKS.get(there.role, 0):
                cells[at] = span
    return cells


def lane_pieces(cells: Sequence[Span | None], cursor: int | None) -> Line:
    """A lane as characters; what a stretch is, is written into it where there is room. Column
    ``cursor`` is marked."""
    pieces: list[Piece] = []
    at = 0
    while at < len(cells):
        span, end = cells[at], at
        while end < len(cells) and cells[end] is span:
            end += 1
        text, style = _stretch(span, end - at), "" if span is None else STYLES.get(span.role, "")
        if cursor is not None and at <= cursor < end:
            middle = cursor - at
            pieces += [
                (text[:middle], style),
                (text[middle], f"{style} cursor".strip()),
                (text[middle + 1 :], style),
            ]
        else:
            pieces.append((text, style))
        at = end
    return tuple(piece for piece in pieces if piece[0])


def _stretch(span: Span | None, columns: int) -> str:
    if span is None:
        return " " * columns
    glyph = GLYPHS.get(span.role, "?")
    label = ""
    match span.role:
        case "leader":
            label = f"━ {span.ballot} "
        case "candidate":
            label = f"▒ stands {span.ballot} "
        case "polling":
            label = "░ asks "
        case "down":
            label = "╳ silent" if columns > len("╳ silent") else "╳"
        case _:
            pass
    if len(label) > columns:
        label = ""
    return label + glyph * (columns - len(label))


def axis(first: int, columns: int, column_ms: int) -> str:
    """The times below the lanes."""
    tick_ms = next(
        (each for each in TICKS_MS if each >= TICK_COLUMNS_MIN * column_ms), TICKS_MS[-1]
    )
    step = max(1, tick_ms // column_ms)
    line = [" "] * columns
    at = -first % step
    while at < columns:
        label = f"╵{moment((first + at) * column_ms)}"
        if at + len(label) <= columns:
            line[at : at + len(label)] = label
        at += step
    return "".join(line)


def span_words(span: Span, now_ms: int) -> str:
    """Who did what, when, under which ballot and why."""
    lasts = span.to_ms is None
    verb = (DOES if lasts else DID).get(span.role, span.role)
    under = "" if span.role in ("down", "polling") or not span.ballot.round else f" {span.ballot}"
    if under and span.role in ("leader", "candidate"):
        under = f" under{under}"
    to_ms = now_ms if span.to_ms is None else span.to_ms
    when = f"since {moment(span.from_ms)}" if lasts else f"{moment(span.from_ms, millis=True)}"
    long = age(to_ms - span.from_ms)
    why = f": {visible(span.why)}" if span.why else ""
    return f"voter {span.voter} {verb}{under} {when} for {long}{why}"


class Timeline(Lines, can_focus=True):
    """The lanes, their axis, and a line of words about what is under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Earlier", show=False),
        Binding("right", "move(1)", "Later", show=False),
        Binding("pageup", "page(-1)", "Half a screen earlier", show=False),
        Binding("pagedown", "page(1)", "Half a screen later", show=False),
        Binding("p", "change(-1)", "Previous change", show=False),
        Binding("n", "change(1)", "Next change", show=False),
        Binding("home", "oldest", "Oldest", show=False),
        Binding("end", "newest", "Now", show=False),
        Binding("up", "lane(-1)", "Lane above", show=False),
        Binding("down", "lane(1)", "Lane below", show=False),
        Binding("left_square_bracket", "zoom(1)", "More time", show=False),
        Binding("right_square_bracket", "zoom(-1)", "Less time", show=False),
    ]

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.terse = False
        """Whether the line of words is spared unless the keys go here."""
        self._view = View()
        self._zoom = ZOOM
        self._lane = 0
        self._cursor: int | None = None
        """The absolute column of the cursor; None: now."""
        self._end: int | None = None
        """The absolute column at the right edge; None: now."""
        self._lanes: dict[int, list[Span | None]] = {}
        self._drawn: tuple[object, ...] = ()

    # --- what is shown --------------------------------------------------------------------------

    def show(self, view: View) -> None:
        """Draw ``view``, if anything that is visible changed."""
        if view.source != self._view.source or view.since_ms != self._view.since_ms:
            self._cursor = self._end = None
        self._view = view
        self._lane = max(0, min(self._lane, len(view.voters) - 1))
        self.draw()

    def draw(self) -> None:
        """Draw what is known; cheap if nothing changed."""
        width, view = self.size.width, self._view
        if not width:
            return
        focused, worded = self.has_focus, self.has_focus or not self.terse
        ages_s = view.now_ms // 1000 if worded else 0
        frame = (self._zoom, self._first, self._columns, self._cursor, self._lane, focused, width)
        state = (id(view.spans), len(view.voters), self._now, worded, ages_s, *frame)
        if state == self._drawn:
            return
        self._drawn = state
        self._spans = view.spans  # as long as it is held, its id is its own
        self._lanes = self._lanes_of(view.spans)
        self.put(self._make(focused=focused, worded=worded))

    def _lanes_of(self, spans: Sequence[Span]) -> dict[int, list[Span | None]]:
        by_voter: dict[int, list[Span]] = {each.voter: [] for each in self._view.voters}
        from_ms = self._first * self._column_ms
        to_ms = from_ms + self._columns * self._column_ms
        for span in spans:
            seen = span.from_ms < to_ms and (span.to_ms is None or span.to_ms >= from_ms)
            if seen and span.voter in by_voter:
                by_voter[span.voter].append(span)
        return {
            voter: lane(of_it, self._first, self._columns, self._now, self._column_ms)
            for voter, of_it in by_voter.items()
        }

    def _make(self, *, focused: bool, worded: bool) -> Picture:
        view, gutter = self._view, self._gutter
        at = self._cursor_at - self._first
        lines: list[Line] = []
        for index, voter in enumerate(view.voters):
            here = focused and index == self._lane
            label = f"{'▸' if here else ' '}{voter.voter:>{gutter - 2}} "
            cells = self._lanes[voter.voter]
            told = lane_pieces(cells, at if here else None)
            lines.append(((label, "strong" if here else ""), *told))
        times = axis(self._first, self._columns, self._column_ms)
        lines.append(((" " * gutter, ""), (times, "dim")))
        if worded:
            lines.append(self._words_line())
        return tuple(lines)

    def _words_line(self) -> Line:
        span = self.span if self.has_focus else self._leading
        width = self.size.width
        words = "nothing is known of this moment"
        style = "dim"
        if span is not None:
            words, style = span_words(span, self._view.now_ms), STYLES.get(span.role, "")
        elif not self.has_focus:
            words = "nobody is known to lead"
        scale = f"[ {age(self._column_ms)} a column ] "
        left: Line = ((" " * self._gutter, ""), (cut(words, width - self._gutter - 1), style))
        return spread(left, ((scale, "dim"),), width)

    @property
    def _leading(self) -> Span | None:
        """The newest leadership that lasts."""
        for span in reversed(self._view.spans):
            if span.role == "leader" and span.to_ms is None:
                return span
        return None

    # --- where it is ----------------------------------------------------------------------------

    @property
    def _column_ms(self) -> int:
        return ZOOMS_MS[self._zoom]

    @property
    def _now(self) -> int:
        return self._view.now_ms // self._column_ms

    @property
    def _gutter(self) -> int:
        return 2 + max((len(str(each.voter)) for each in self._view.voters), default=1)

    @property
    def _columns(self) -> int:
        return max(1, self.size.width - self._gutter)

    @property
    def _first(self) -> int:
        return (self._now if self._end is None else self._end) - self._columns + 1

    @property
    def _cursor_at(self) -> int:
        return self._now if self._cursor is None else self._cursor

    @property
    def _oldest(self) -> int:
        spans = self._view.spans
        from_ms = min(spans[0].from_ms, self._view.since_ms) if spans else self._view.since_ms
        return from_ms // self._column_ms

    @property
    def span(self) -> Span | None:
        """What is under the cursor."""
        voters = self._view.voters
        if not voters:
            return None
        cells = self._lanes.get(voters[self._lane].voter, [])
        at = self._cursor_at - self._first
        return cells[at] if 0 <= at < len(cells) else None

    def subject(self) -> Subject | None:
        """The ballot under the cursor, else the voter of the lane."""
        span = self.span
        if span is not None and span.ballot.round and span.role != "down":
            return Subject("ballot", str(span.ballot))
        voters = self._view.voters
        return Subject("voter", str(voters[self._lane].voter)) if voters else None

    # --- moving ---------------------------------------------------------------------------------

    def _go(self, column: int) -> None:
        """The cursor to an absolute column; the window follows."""
        column = max(min(self._oldest, self._now), column)
        if column >= self._now:
            self._cursor = self._end = None
        else:
            self._cursor = column
            end = self._now if self._end is None else self._end
            end = max(end, column)
            if column <= end - self._columns:
                end = column + self._columns - 1
            self._end = None if end >= self._now else end
        if self._cursor is not None and self._end is None:
            self._end = self._now  # what is looked at does not run away
        self.draw()

    def action_move(self, by: int) -> None:
        """The cursor by so many columns."""
        self._go(self._cursor_at + by)

    def action_page(self, by: int) -> None:
        """The cursor by so many half screens."""
        self._go(self._cursor_at + by * max(1, self._columns // 2))

    def action_change(self, by: int) -> None:
        """To the previous or next change of any voter, in its lane."""
        at_ms = self._cursor_at * self._column_ms
        voters = [each.voter for each in self._view.voters]
        spans = [span for span in self._view.spans if span.voter in voters]
        if by < 0:
            found = [span for span in spans if span.from_ms < at_ms][-1:]
        else:
            found = [span for span in spans if span.from_ms >= at_ms + self._column_ms][:1]
        for span in found:
            self._lane = voters.index(span.voter)
            self._go(span.from_ms // self._column_ms)
        if not found and by > 0:
            self.action_newest()

    def action_oldest(self) -> None:
        """To the oldest that is known."""
        self._go(self._oldest)

    def action_newest(self) -> None:
        """To now, and on with it."""
        self._cursor = self._end = None
        self.draw()

    def action_lane(self, by: int) -> None:
        """To another lane; beyond the last or first the keys go to the next part."""
        at = self._lane + by
        if 0 <= at < len(self._view.voters):
            self._lane = at
            self.draw()
        elif by < 0:
            self.screen.focus_previous()
        else:
            self.screen.focus_next()

    def action_zoom(self, by: int) -> None:
        """More or less time a column; the cursor stays where it is in time."""
        at_ms = self._cursor_at * self._column_ms
        follows = self._cursor is None
        self._zoom = max(0, min(len(ZOOMS_MS) - 1, self._zoom + by))
        self._end = None
        if follows:
            self.draw()
            return
        column = at_ms // self._column_ms
        self._end = min(self._now, column + self._columns // 2)
        self._go(column)

    def on_click(self, event: events.Click) -> None:
        """The cursor goes where was clicked."""
        if 0 <= event.y < len(self._view.voters) and event.x >= self._gutter:
            self._lane = event.y
            self._go(self._first + event.x - self._gutter)

    def on_mouse_scroll_up(self) -> None:
        """Into the past."""
        self.action_move(-5)

    def on_mouse_scroll_down(self) -> None:
        """Towards now."""
        self.action_move(5)

    def on_resize(self) -> None:
        """As many columns as there are now."""
        self.draw()

    def watch_has_focus(self, focused: bool) -> None:
        """The cursor is there where the keys go."""
        super().watch_has_focus(focused)
        self.draw()
