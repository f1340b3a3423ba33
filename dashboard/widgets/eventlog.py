"""What happened: this module alone draws the event log, the newest line at the bottom.

It follows what happens until a line is chosen; then it stays there, whatever comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from textual import events
from textual.binding import Binding, BindingType

from dashboard.tables import visible
from dashboard.view import LogLine, View
from dashboard.widgets.lines import Line, Lines, Picture, cut, wrap
from dashboard.widgets.pane import Subject
from dashboard.words import moment

SIGNS: Final = {"info": "·", "good": "✓", "warn": "!", "bad": "✗"}
STYLES: Final = {"info": "note", "good": "ok", "warn": "warn", "bad": "bad"}
TIME_COLUMNS: Final = 12
"""Before the words of a line: a gap, the time of day, the sign."""
WRAP_LINES_MAX: Final = 4
"""Most screen lines of one event."""


def event_lines(event: LogLine, width: int, *, chosen: bool) -> Picture:
    """One event: when, how good or bad, whom it is about, and what."""
    style = STYLES.get(event.level, "note")
    room = max(10, width - TIME_COLUMNS - 1)
    subject = visible(event.subject).replace("\n", "\\n")
    told = visible(event.words).replace("\n", " ")
    words = told if told.startswith(subject) else f"{subject}: {told}"
    first, *rest = wrap(words, room, WRAP_LINES_MAX)
    mark = " cursor" if chosen else ""
    head: Line = (
        (f" {moment(event.at_ms)} ", "dim"),
        (f"{SIGNS.get(event.level, '·')} ", style),
        (first, f"{style}{mark}"),
    )
    return (head, *(((" " * TIME_COLUMNS, ""), (line, style)) for line in rest))


def log_picture(
    log: Sequence[LogLine], last: int, width: int, height: int, *, chosen: bool
) -> Picture:
    """The ``height`` lines that end with event ``last``, which is marked if ``chosen``."""
    lines: list[Line] = []
    at = last
    while at >= 0 and len(lines) < height:
        lines[:0] = event_lines(log[at], width, chosen=chosen and at == last)
        at -= 1
    if len(lines) > height:
        lines = lines[len(lines) - height :]
    at = last + 1
    while at < len(log) and len(lines) < height:
        more = event_lines(log[at], width, chosen=False)
        lines += more[: height - len(lines)]
        at += 1
    if not log:
        lines = [((cut("  nothing happened yet since this was opened", width), "dim"),)]
    return tuple(lines) + ((),) * (height - len(lines))


class EventLog(Lines, can_focus=True):
    """The log of events; arrows, page keys and the wheel go through it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Older", show=False),
        Binding("down", "move(1)", "Newer", show=False),
        Binding("pageup", "page(-1)", "A page older", show=False),
        Binding("pagedown", "page(1)", "A page newer", show=False),
        Binding("home", "oldest", "The oldest", show=False),
        Binding("end", "newest", "The newest, and follow", show=False),
    ]

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._log: Sequence[LogLine] = ()
        self._chosen: LogLine | None = None
        """What is at the bottom; None: the newest."""
        self._drawn: tuple[object, ...] = ()

    def show(self, view: View) -> None:
        """Draw the log of ``view``, if it changed."""
        self._log = view.log
        self.draw()

    def draw(self) -> None:
        """Draw what is known; cheap if nothing changed."""
        size = self.size
        state = (id(self._log), id(self._chosen), size, self.has_focus)
        if not size.width or state == self._drawn:
            return
        self._drawn = state
        self._held = self._log  # as long as it is held, its id is its own
        chosen = self._chosen is not None and self.has_focus
        self.put(log_picture(self._log, self._last, size.width, size.height, chosen=chosen))

    @property
    def _last(self) -> int:
        """The event at the bottom; the oldest, if the chosen one is no longer kept."""
        if self._chosen is None:
            return len(self._log) - 1
        for at in range(len(self._log) - 1, -1, -1):
            if self._log[at] is self._chosen:
                return at
        return 0

    def subject(self) -> Subject | None:
        """Whom the line at the bottom is about."""
        if not self._log:
            return None
        kind, _, name = self._log[self._last].subject.partition(" ")
        return Subject(kind, name) if name and kind in ("voter", "member") else None

    def action_move(self, by: int) -> None:
        """By so many events."""
        at = max(0, self._last + by)
        self._chosen = self._log[at] if at < len(self._log) - 1 else None
        self.draw()

    def action_page(self, by: int) -> None:
        """By so many screens."""
        self.action_move(by * max(1, self.size.height - 1))

    def action_oldest(self) -> None:
        """To the oldest that is kept."""
        self.action_move(-len(self._log))

    def action_newest(self) -> None:
        """To the newest, and follow."""
        self._chosen = None
        self.draw()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Older."""
        event.stop()
        self.action_move(-3)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Newer."""
        event.stop()
        self.action_move(3)

    def on_resize(self) -> None:
        """As many lines as there is room for now."""
        self.draw()

    def watch_has_focus(self, focused: bool) -> None:
        """The chosen line is marked where the keys go."""
        super().watch_has_focus(focused)
        self.draw()
