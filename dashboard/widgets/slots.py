"""What is being decided, and how fast: this module alone draws the slot lane and the sparklines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from textual import events
from textual.binding import Binding, BindingType

from dashboard.tables import visible
from dashboard.view import SlotSeen, View
from dashboard.widgets.header import whole_age
from dashboard.widgets.lines import Line, Lines, Picture, cut, width_of
from dashboard.widgets.pane import Subject
from dashboard.words import count, micros, size

PROPOSED: Final = "○"
FEW: Final = "◔"
HALF: Final = "◑"
MOST: Final = "◕"
FIXED: Final = "●"
QUIET_MS: Final = 2_000
"""If nothing was fixed for so long, it is said."""
BARS: Final = "▁▂▃▄▅▆▇█"
BARS_MIN: Final = 10
"""Fewer bars tell less than what the highest is."""
SECONDS_SHOWN: Final = 300
"""Most seconds that are drawn, and whose highest is told."""
NOTHING: Final = "·"
"""In place of a bar: a second in which nothing was fixed."""


class Lane(Lines, can_focus=True):
    """What the slot lane and its like share: a cursor along one line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Older", show=False),
        Binding("right", "move(1)", "Newer", show=False),
        Binding("pageup", "move(-10)", "Ten older", show=False),
        Binding("pagedown", "move(10)", "Ten newer", show=False),
        Binding("end,home", "newest", "The newest", show=False),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]


def accepted_by(view: View, slot: int) -> tuple[int, ...]:
    """The voters that told of having accepted ``slot``."""
    return tuple(
        each.voter
        for each in view.voters
        if each.digest is not None and each.digest.last_accepted >= slot
    )


def fixed_to(view: View) -> int:
    """The highest slot known to be fixed."""
    return max(view.tip_slot, view.slots[-1].slot if view.slots else 0)


def proposed_to(view: View) -> int:
    """The highest slot that anybody told of."""
    digests = [each.digest for each in view.voters if each.digest is not None]
    return max((max(each.proposed, each.last_accepted) for each in digests), default=0)


def slot_sign(view: View, slot: int) -> str:
    """How far ``slot`` is: ○ proposed, ◔ ◑ ◕ accepted by few, half, most voters, ● fixed."""
    if slot <= fixed_to(view):
        return FIXED
    accepted, voters = len(accepted_by(view, slot)), len(view.voters)
    if not accepted:
        return PROPOSED
    if accepted * 2 > voters:
        return MOST
    return FEW if accepted * 4 <= voters else HALF


def slot_words(view: View, slot: int) -> str:
    """What is known of ``slot``, in one line."""
    if slot > fixed_to(view):
        voters = accepted_by(view, slot)
        if not voters:
            return "proposed, not known to be accepted by anybody yet"
        names = ", ".join(map(str, voters))
        who = f"voter{'s' if len(voters) > 1 else ''} {names}"
        return f"accepted by {len(voters)} of {len(view.voters)}: {who}; not known to be fixed"
    seen = _seen(view.slots, slot)
    if seen is None:
        return "fixed; its value did not pass here"
    told = [seen.kind, visible(seen.key).replace("\n", "\\n") if seen.key else ""]
    what = " ".join(filter(None, told))
    return f"{what}, {size(seen.size_bytes)}, first proposed under {seen.ballot}"


def _seen(slots: Sequence[SlotSeen], slot: int) -> SlotSeen | None:
    at = slot - slots[-1].slot - 1 if slots else 0
    if slots and -len(slots) <= at < 0 and slots[at].slot == slot:
        return slots[at]
    return next((each for each in slots if each.slot == slot), None)


def slot_lane(view: View, width: int, cursor: int | None) -> tuple[Picture, int]:
    """The lane and the line of words below it, and the first slot of the lane. ``cursor`` is the
    slot that is selected."""
    newest = max(proposed_to(view), fixed_to(view))
    if not newest:
        nothing: Picture = ((("  slots  none is known yet", "dim"),), ())
        return nothing, 0
    right = f" {count(newest)} "
    room = max(1, width - len("  slots ") - 2 * len(right))
    first = max(1, newest - room + 1)
    if cursor is not None and cursor < first:
        first = max(1, cursor)
    last = min(newest, first + room - 1)
    kinds = {each.slot: each.kind for each in view.slots}
    fixed = fixed_to(view)
    pieces: list[tuple[str, str]] = []
    for slot in range(first, last + 1):
        sign = FIXED if slot <= fixed else slot_sign(view, slot)
        style = "stand" if slot > fixed else "dim" if kinds.get(slot) == "noop" else "lead"
        if slot == cursor:
            pieces.append((sign, f"{style} cursor"))
        elif pieces and pieces[-1][1] == style:
            pieces[-1] = (pieces[-1][0] + sign, style)
        else:
            pieces.append((sign, style))
    lane: Line = (
        ("  slots ", ""),
        (f"{count(first)} ", "dim"),
        *pieces,
        (f" {count(last)}", "dim"),
    )
    told = fixed or newest
    chosen = told if cursor is None else cursor
    words = slot_words(view, chosen)
    line = f"    {slot_sign(view, chosen)} {count(chosen)} {words}"
    quiet_ms = 0 if view.fixed_ms is None else view.now_ms - view.fixed_ms
    if cursor is None and quiet_ms >= QUIET_MS:
        line += f"; nothing new for {whole_age(quiet_ms)}"
    return (lane, ((cut(line, width), "dim" if cursor is None else ""),)), first


class SlotLane(Lane):
    """The newest slots and how far each is."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._view = View()
        self._cursor: int | None = None
        self._first = 0

    def show(self, view: View) -> None:
        """Draw ``view``."""
        self._view = view
        self.draw()

    def draw(self) -> None:
        """Draw what is known."""
        if self.size.width:
            cursor = self.selected if self.has_focus else None
            picture, self._first = slot_lane(self._view, self.size.width, cursor)
            self.put(picture)

    @property
    def selected(self) -> int:
        """The slot under the cursor; at first the newest fixed."""
        newest = max(proposed_to(self._view), fixed_to(self._view))
        if self._cursor is None:
            return fixed_to(self._view) or newest
        oldest = self._view.slots[0].slot if self._view.slots else newest
        return max(min(oldest, newest), min(self._cursor, newest))

    def subject(self) -> Subject | None:
        """The slot under the cursor."""
        return Subject("slot", str(self.selected)) if self.selected else None

    def action_move(self, by: int) -> None:
        """The cursor by so many slots."""
        self._cursor = self.selected + by
        self._cursor = self.selected
        self.draw()

    def action_newest(self) -> None:
        """To the newest fixed, and on with it."""
        self._cursor = None
        self.draw()

    def on_click(self, event: events.Click) -> None:
        """The slot that was clicked."""
        left = width_of(self.picture[0][:2]) if self.picture else 0
        if event.y == 0 and event.x >= left and self._first:
            self._cursor = self._first + event.x - left
            self._cursor = self.selected
            self.draw()

    def on_resize(self) -> None:
        """As many slots as there is room for now."""
        self.draw()

    def watch_has_focus(self, focused: bool) -> None:
        """The cursor is there where the keys go."""
        super().watch_has_focus(focused)
        self.draw()


def bars(values: Sequence[int], highest: int) -> str:
    """A bar for each value, the highest full; 0 is no bar at all."""
    if highest <= 0:
        return NOTHING * len(values)
    return "".join(
        BARS[min(len(BARS) - 1, value * len(BARS) // (highest + 1))] if value > 0 else NOTHING
        for value in values
    )


def spark_line(
    label: str, now: str, values: Sequence[int], figure: Callable[[int], str], width: int
) -> Line:
    """``label`` and what is so ``now``, bars that end at now, and what their highest is, if there
    is room to say it."""
    left: Line = ((f"  {label} ", ""), (f"{now} ", "strong"))
    room = width - width_of(left) - 1
    top = f" max {figure(max(values))}" if any(values) else ""
    if room - len(top) < BARS_MIN:
        top = ""
    shown = list(values)[-(room - len(top)) :] if room > len(top) else []
    chart = bars(shown, max(shown, default=0)).rjust(max(0, room - len(top)))
    return (*left, (chart, "chart"), (top, "dim"), (" ", ""))


def sparks(view: View, width: int, *, one_line: bool) -> Picture:
    """Commit rate and latency by the second, the newest at the right."""
    whole = view.seconds[-SECONDS_SHOWN - 1 : -1]
    half = width // 2 if one_line else width
    commits = [each.commits for each in whole]
    rate = f"{count(commits[-1]) if commits else '-'}/s"
    first = spark_line("commits", rate, commits, lambda each: f"{count(each)}/s", half)
    newest = next((each for each in reversed(whole) if each.commits and each.p50_us), None)
    slow = "-" if newest is None else f"p99 {micros(newest.p99_us)}"
    if newest is not None and not one_line:
        slow = f"p50 {micros(newest.p50_us)} {slow}"
    p99s = [each.p99_us if each.commits else 0 for each in whole]
    second = spark_line("latency", slow, p99s, micros, width - half or half)
    if one_line:
        return ((*first, *second),)
    return (first, second)


class Sparks(Lines):
    """Commit rate and latency."""

    terse = False
    """Whether both share one line."""
    _view = View()
    _drawn: tuple[object, ...] = ()

    def show(self, view: View) -> None:
        """Draw ``view``, if a second passed."""
        self._view = view
        self.draw()

    def draw(self) -> None:
        """Draw what is known; cheap if nothing changed."""
        whole = self._view.seconds[:-1]
        state = (len(whole), whole[-1:], self.size.width, self.terse)
        if self.size.width and state != self._drawn:
            self._drawn = state
            self.put(sparks(self._view, self.size.width, one_line=self.terse))

    def on_resize(self) -> None:
        """As many seconds as there is room for now."""
        self.draw()
