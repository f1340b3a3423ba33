"""The slot of the past that is looked at: this widget alone chooses it, by key, mouse or number."""

from __future__ import annotations

from time import localtime, strftime
from typing import ClassVar, Final

import msgspec
from rich.cells import cell_len
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from dashboard.widgets.lines import Line, Lines, cut
from dashboard.words import age, count

PAGE_SLOTS: Final = 100
"""PgUp and PgDn move the slider so far."""


class Moment(msgspec.Struct, frozen=True):
    """What the store says of a slot: when it was proposed (milliseconds; None: it does not say),
    under which ballot, and what it is."""

    slot: int
    time_ms: int | None
    ballot: str
    what: str


class SlotSlider(Lines, can_focus=True):
    """A slot of the past, or "now", which follows: the slider, and below it which slot that is."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "A slot back", show=False),
        Binding("right", "move(1)", "A slot on", show=False),
        Binding("shift+left", "move_share(-1)", "1 % back", show=False),
        Binding("shift+right", "move_share(1)", "1 % on", show=False),
        Binding("pageup", f"move(-{PAGE_SLOTS})", "100 slots back", show=False),
        Binding("pagedown", f"move({PAGE_SLOTS})", "100 slots on", show=False),
        Binding("home", "oldest", "The oldest slot", show=False),
        Binding("end", "now", "Now", show=False),
        Binding("g", "type", "Type a slot", show=False),
    ]

    class Moved(Message):
        """Another slot is shown, or now."""

    def __init__(self) -> None:
        super().__init__(id="sql-slot")
        self._low = 0
        self._high = 0
        self._slot: int | None = None
        self._now_ms = 0
        self._moment: Moment | None = None
        self._typing: str | None = None
        self._dragged = False

    # --- what it shows

    @property
    def slot(self) -> int | None:
        """The slot of the past that is shown; None: now."""
        return self._slot

    @property
    def typing(self) -> bool:
        """Whether a slot is being typed."""
        return self._typing is not None

    def show(self, low: int, high: int, now_ms: int) -> None:
        """The slots there are to go to, and the time."""
        self._low, self._high, self._now_ms = min(low, high), high, now_ms
        if self._slot is not None and not self._low <= self._slot < self._high:
            self._to(self._slot)
        self._draw()

    def tell(self, moment: Moment | None) -> None:
        """What is known of the slot shown."""
        self._moment = moment
        self._draw()

    def _draw(self) -> None:
        width = self.scrollable_content_region.width
        if width <= 0:
            return
        self.put((self._bar(width), self._words(width)))

    def _bar(self, width: int) -> Line:
        left, right = f" {count(self._low)} ", f" {count(self._high)} now "
        room = max(3, width - len(left) - len(right))
        at = self._column_of(room)
        knob = "◆" if self._slot is not None else "●"
        tone = "cursor" if self.has_focus else "strong"
        bar: Line = (("━" * at, "chart"), (knob, tone), ("─" * (room - 1 - at), "dim"))
        return ((left, "dim"), *bar, (right, "dim" if self._slot is not None else "strong"))

    def _words(self, width: int) -> Line:
        if self._typing is not None:
            words = f" go to slot: {self._typing}▏   "
            return ((words, "strong"), (cut("Enter goes, Esc does not", width - 20), "dim"))
        if self._slot is None:
            told = f" now: $slot is the newest stored slot, {count(self._high)}"
            keys = "   ← → PgUp PgDn g move it" if self.has_focus else "   Esc, then [ ] move it"
            if self._high == 0:
                told, keys = " nothing is stored yet", ": there is no past to go to"
            return ((cut(told, width), "strong"), (cut(keys, width - cell_len(told)), "dim"))
        head = f" $slot {count(self._slot)}"
        moment = self._moment
        if moment is None or moment.slot != self._slot:
            return ((head, "strong"), (" …", "dim"))
        told = self._when(moment) + (f" under {moment.ballot}" if moment.ballot else "")
        return (
            (head, "strong"),
            (cut(f"  {told}", width - cell_len(head)), ""),
            (cut(f"  {moment.what}", width - cell_len(head) - 2 - cell_len(told)), "dim"),
        )

    def _when(self, moment: Moment) -> str:
        if moment.time_ms is None:
            return "" if moment.ballot else "before the first slot kept here"
        ago_ms = self._now_ms - moment.time_ms
        shape = "%H:%M:%S" if abs(ago_ms) < 20 * 3_600_000 else "%Y-%m-%d %H:%M:%S"
        told = strftime(shape, localtime(moment.time_ms / 1000))
        return f"{told}, {age(ago_ms)} ago" if ago_ms > 0 else told

    def _column_of(self, room: int) -> int:
        if self._slot is None or self._high <= self._low:
            return room - 1
        share = (self._slot - self._low) / (self._high - self._low)
        return max(0, min(room - 2, round(share * (room - 1))))

    # --- moving it

    def _to(self, slot: int | None) -> None:
        """Go to ``slot``, as near as there is one; the newest is now."""
        if slot is not None:
            slot = max(self._low, slot)
            if slot >= self._high:
                slot = None
        if slot != self._slot:
            self._slot = slot
            self._draw()
            self.post_message(self.Moved())

    def action_move(self, slots: int) -> None:
        """Move by so many slots."""
        self._to((self._high if self._slot is None else self._slot) + slots)

    def action_move_share(self, percent: int) -> None:
        """Move by so many hundredths of what there is, one slot at least."""
        self.action_move(percent * max(1, (self._high - self._low) // 100))

    def action_oldest(self) -> None:
        """To the oldest state there is."""
        self._to(self._low)

    def action_now(self) -> None:
        """To the newest, and follow it."""
        self._to(None)

    def action_type(self) -> None:
        """Type the slot to go to."""
        self._typing = ""
        self._draw()

    def on_key(self, event: events.Key) -> None:
        """Digits of a slot that is being typed."""
        if self._typing is None:
            return
        typed = event.character or ""
        if event.key in ("enter", "escape"):
            slot, self._typing = self._typing, None
            if event.key == "enter" and slot:
                self._to(int(slot))
        elif event.key == "backspace":
            self._typing = self._typing[:-1]
        elif typed in set("0123456789"):
            self._typing = (self._typing + typed)[:18]
        elif typed not in (",", "_", " "):
            self._typing = None
            self._draw()
            return
        event.stop()
        event.prevent_default()
        self._draw()

    def _pointed(self, event: events.MouseEvent) -> None:
        width = self.scrollable_content_region.width
        left, right = len(f" {count(self._low)} "), len(f" {count(self._high)} now ")
        room = max(3, width - left - right)
        x = event.get_content_offset_capture(self).x - left
        if x >= room - 1:
            self._to(None)
        else:
            self._to(self._low + round(max(0, x) / (room - 1) * (self._high - self._low)))

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """The knob goes where was clicked, and with the mouse."""
        offset = event.get_content_offset(self)
        if offset is not None and offset.y == 0:
            self._dragged = True
            self.capture_mouse()
            self._pointed(event)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """The knob follows."""
        if self._dragged:
            self._pointed(event)

    def on_mouse_up(self) -> None:
        """The knob stays."""
        if self._dragged:
            self._dragged = False
            self.release_mouse()

    def on_resize(self) -> None:
        """The slider is as wide as there is room."""
        self._draw()

    def watch_has_focus(self, focused: bool) -> None:
        """The knob is bright where the keys go."""
        super().watch_has_focus(focused)
        if not focused:
            self._typing = None
        self._draw()
