"""The tab Listeners: this module alone draws how the followers of the stream are doing.

A table by lag for a few, a heat map of one character each for hundreds.  What is shown of each is
what it last said of itself, directly or through a voter, and how long ago that was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, TypeAlias

import msgspec
from rich.segment import Segment
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input

from dashboard.feed import Feed
from dashboard.view import ListenerView, View
from dashboard.widgets.ask import Ask
from dashboard.widgets.lines import STYLES, Line, Lines, Piece, cut, wrap
from dashboard.widgets.pane import Pane, Subject
from dashboard.widgets.rows import GUTTER, Cell, Column, RowTable, cursor_style, line_of
from dashboard.words import age, count, plural
from trex_core.roster import BEHIND_MS, SILENT_INTERVALS, mean_interval_ms

Key: TypeAlias = tuple[str, int]
"""A listener: (name, instance)."""

MAP_LISTENERS: Final = 40
"""From so many listeners on, the heat map is shown unless the operator chose."""
BEHIND_BAD_MS: Final = 10_000
"""Behind for longer does not mend itself by repair."""
STARTING_S: Final = 10
"""Not ready in its first seconds is starting, not behind."""
STALE_INTERVALS: Final = 2
"""What is older than so many mean times between two reports is shown as stale."""


class Standing(msgspec.Struct, frozen=True, gc=False):
    """How a listener is doing: ``rank`` ascends with severity, ``mark`` is its one character on
    the map, ``stale`` says that what is known is old."""

    rank: int
    mark: str
    sign: str
    word: str
    tone: str
    stale: bool


LEGEND: Final = (
    ("·", "ok", "at tip"),
    ("◦", "dim", "starting"),
    ("+", "note", "behind"),
    ("#", "warn", "over 3 s"),
    ("@", "bad", "over 10 s"),
    ("×", "bad", "silent"),
    ("-", "dim", "left"),
)
"""The characters of the map, the mildest first: (mark, tone, meaning)."""


def silent_ms(known: int) -> int:
    """After how many milliseconds without word one of ``known`` listeners counts as silent."""
    return SILENT_INTERVALS * mean_interval_ms(known)


def standing(listener: ListenerView, now_ms: int, limit_ms: int) -> Standing:
    """How ``listener`` is doing at ``now_ms``; silent after ``limit_ms`` without word."""
    report = listener.report
    unheard_ms = now_ms - listener.heard_ms
    stale = unheard_ms * SILENT_INTERVALS > limit_ms * STALE_INTERVALS
    if report.leaving:
        return Standing(0, "-", "-", "left", "dim", stale)
    if unheard_ms > limit_ms:
        return Standing(6, "×", "✗", f"silent {age(unheard_ms)}", "bad", True)
    if not report.ready and report.uptime_s < STARTING_S:
        return Standing(2, "◦", "◦", "starting", "dim", stale)
    behind_ms = report.behind_ms
    if behind_ms > BEHIND_BAD_MS:
        return Standing(5, "@", "✗", f"behind {age(behind_ms)}", "bad", stale)
    if behind_ms >= BEHIND_MS:
        return Standing(4, "#", "!", f"behind {age(behind_ms)}", "warn", stale)
    if behind_ms > 0 or not report.ready:
        return Standing(3, "+", "·", f"behind {age(behind_ms)}", "note", stale)
    return Standing(1, "·", "✓", "at tip", "ok", stale)


def lag_slots(listener: ListenerView) -> int:
    """How many slots it lacked when it said so."""
    return max(0, listener.report.tip - listener.report.applied)


COLUMNS: Final = (
    Column("state", "state", 15),
    Column("name", "name", 12, grows=18),
    Column("lag", "lag", 7, right=True),
    Column("applied", "applied", 9, rank=1, right=True, grows=4),
    Column("heard", "heard", 9, right=True),
    Column("repairs", "repairs", 8, rank=2, right=True),
    Column("gaps", "gaps", 5, rank=5, right=True),
    Column("catchups", "catch-ups", 9, rank=4, right=True),
    Column("resets", "resets", 6, rank=6, right=True),
    Column("version", "version", 8, rank=3, grows=8),
    Column("uptime", "up for", 7, rank=7, right=True),
    Column("stored", "stored", 9, rank=8, right=True, grows=4),
)

ORDERS: Final = ("lag", "name", "repairs", "version", "heard")
"""What ``o`` goes through."""
_ASCENDING: Final = ("name", "version")


def ordered(
    listeners: Mapping[Key, ListenerView],
    standings: Mapping[Key, Standing],
    order: str,
    *,
    reverse: bool = False,
) -> list[Key]:
    """The keys of ``standings``, by ``order``, one of ORDERS: the worst, the most or the longest
    first, names and versions from A to Z; ``reverse`` turns it round."""

    def rank(key: Key) -> tuple[Any, ...]:
        listener = listeners[key]
        report = listener.report
        match order:
            case "lag":
                return (-standings[key].rank, -report.behind_ms, -lag_slots(listener), key)
            case "repairs":
                return (-report.repairs, key)
            case "version":
                return (report.version, key)
            case "heard":
                return (listener.heard_ms, key)
            case _:
                return key

    return sorted(standings, key=rank, reverse=reverse)


class HeatMap(ScrollView, can_focus=True):
    """One character for each listener, by name, so that each keeps its place."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in STYLES}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1, 0)", "Left", show=False),
        Binding("right", "move(1, 0)", "Right", show=False),
        Binding("up", "move(0, -1)", "Up", show=False),
        Binding("down", "move(0, 1)", "Down", show=False),
        Binding("home", "edge(0)", "First", show=False),
        Binding("end", "edge(1)", "Last", show=False),
    ]

    class Moved(Message):
        """The cursor is on another listener."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: Sequence[Key] = ()
        self._marks: tuple[tuple[str, str], ...] = ()
        self._cursor = 0
        self._across = 1
        self._pitch = 1

    def show(self, keys: Sequence[Key], standings: Mapping[Key, Standing]) -> None:
        """Show ``keys``; only lines that changed are drawn."""
        key = self.selected
        marks = tuple((standings[each].mark, standings[each].tone) for each in keys)
        before, self._marks = self._marks, marks
        moved = keys != self._keys
        self._keys = keys
        if moved:
            self._cursor = keys.index(key) if key in keys else 0
            if self.selected != key:
                self.post_message(self.Moved())
        if self._lay_out() or len(before) != len(marks):
            self.refresh()
            return
        across = self._across
        for y in range(self.scroll_offset.y, self.scroll_offset.y + self.size.height):
            part = slice(y * across, (y + 1) * across)
            if before[part] != marks[part]:
                self._redraw(y)

    @property
    def selected(self) -> Key | None:
        """The listener under the cursor."""
        return self._keys[self._cursor] if self._cursor < len(self._keys) else None

    def select(self, key: Key) -> None:
        """Put the cursor on ``key``, if it is there."""
        if key in self._keys:
            self._go(self._keys.index(key))

    def _lay_out(self) -> bool:
        width = max(1, self.size.width)
        pitch = 2 if len(self._keys) * 2 <= width * max(1, self.size.height) else 1
        across = max(1, width // pitch)
        lines = -(-len(self._keys) // across)
        if (across, pitch, lines) == (self._across, self._pitch, self.virtual_size.height):
            return False
        self._across, self._pitch = across, pitch
        self.virtual_size = Size(0, lines)
        return True

    def _redraw(self, line: int) -> None:
        y = line - self.scroll_offset.y
        if 0 <= y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    def _go(self, at: int) -> None:
        if not 0 <= at < len(self._keys) or at == self._cursor:
            return
        self._redraw(self._cursor // self._across)
        self._cursor = at
        line = at // self._across
        self._redraw(line)
        top, height = self.scroll_offset.y, max(1, self.size.height)
        if not top <= line < top + height:
            self.scroll_to(y=line if line < top else line - height + 1, animate=False, force=True)
        self.post_message(self.Moved())

    def action_move(self, by: int, lines: int) -> None:
        """Move the cursor by cells and lines."""
        at = self._cursor + by + lines * self._across
        self._go(min(at, len(self._keys) - 1) if lines > 0 else at)

    def action_edge(self, end: int) -> None:
        """Move the cursor to the first or the last listener."""
        self._go(len(self._keys) - 1 if end else 0)

    def on_click(self, event: events.Click) -> None:
        """The cursor goes where was clicked."""
        offset = event.get_content_offset(self)
        if offset is not None:
            line = offset.y + self.scroll_offset.y
            self._go(line * self._across + min(self._across - 1, offset.x // self._pitch))

    def on_resize(self) -> None:
        """More or fewer fit into a line now."""
        self._lay_out()
        self.refresh()

    def watch_has_focus(self, focused: bool) -> None:
        """The cursor is bright where the keys go."""
        super().watch_has_focus(focused)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """One line of cells: runs of one tone, and the one under the cursor."""
        width = self.size.width
        base = self.rich_style
        first = (y + self.scroll_offset.y) * self._across
        marks = self._marks[first : first + self._across]
        if not marks:
            return Strip.blank(width, base)
        gap = " " * (self._pitch - 1)
        styles = {
            tone: self.get_component_rich_style(f"lines--{tone}")
            for tone in {tone for _, tone in marks}
        }
        segments: list[Segment] = []
        run, running = "", ""
        for at, (mark, tone) in enumerate(marks, first):
            here = at == self._cursor
            if run and (here or tone != running):
                segments.append(Segment(run, styles[running]))
                run = ""
            if here:
                segments.append(Segment(mark, cursor_style(self)))
                segments.append(Segment(gap, base))
            else:
                run, running = run + mark + gap, tone
        if run:
            segments.append(Segment(run, styles[running]))
        return Strip(segments).adjust_cell_length(width, base)


class ListenersPane(Pane):
    """How every follower of the stream is doing."""

    TITLE = "Listeners"
    HELP = """\
A **listener** follows the stream of fixed slots. It never votes, and it can never slow a commit:
what it misses, it repairs by itself. This tab shows what each one last said of itself.

## Reading a row
| State | |
|---|---|
| `✓ at tip` | it has applied every slot that it knows to be fixed |
| `· behind 80 ms` | something is missing since 80 ms: usually one lost datagram, being repaired |
| `! behind 3.2 s` | over three seconds: it repairs much, or its machine is busy |
| `✗ behind 12 s` | over ten seconds: repair does not help; look at its network and disk |
| `✗ silent 48 s` | nothing was heard of it: it is stopped, or cut off |
| `◦ starting` | in its first seconds, not yet ready |

**lag** is how many slots it lacked when it last spoke; **heard** how long ago that was (`via`:
a voter told it). Listeners share one small rate of reports, however many there are, so each speaks
more seldom the more there are. What is old is written `~` and dimmed: it may no longer be so.

## Its counters, since it started
- **gaps**: how often a slot was missing when a later one came. A few are normal.
- **repairs**: requests it multicast for missing slots; a voter or another listener multicasts the
  answer once, for all. Rising everywhere: the network loses datagrams. At one only: that machine.
- **catch-ups**: it was too far behind for repair, or cold, and fetched from an archive over TCP.
- **resets**: it was so far behind that the log no longer reached back: it took a whole snapshot
  and jumped. Its subscribers saw one `Reset` with the exact difference.
- **stored**: the newest slot in its DuckDB; what SQL there can see.

`≠` marks a version that most others do not run. `twice` marks one name used by two processes:
give each listener its own name. `here` marks this dashboard, which is a listener too.

## Keys
`o` sort by the next column, `r` reverse, `/` only names that begin so (`escape`: all again),
`m` map or table, `enter` or `e` explain the one selected. A click on a heading sorts by it.

## The map
One character for each listener, in order of name, so that each keeps its place:
`·` at tip, `◦` starting, `+` behind, `#` over 3 s, `@` over 10 s, `×` silent, `-` left.
"""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "map", "Map/table", tooltip="One character each, or a row each"),
        Binding("o", "sort", "Order", tooltip="Sort by the next column"),
        Binding("r", "reverse", "Reverse", show=False, tooltip="Turn the order round"),
        Binding("slash", "filter", "Filter", key_display="/", tooltip="Only names that begin so"),
        Binding("escape", "unfilter", "All", show=False, tooltip="All names again"),
    ]

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._table: Final[RowTable[Key]] = RowTable(COLUMNS)
        self._map: Final = HeatMap()
        self._filter: Final = Ask("names that begin with…")
        self._summary: Final = Lines(classes="summary")
        self._detail: Final = Lines(classes="detail")
        self._view = View()
        self._standings: dict[Key, Standing] = {}
        self._twice: frozenset[str] = frozenset()
        self._here = ""
        """The name of the dashboard's own."""
        self._version = ""
        """What most run."""
        self._order = "lag"
        self._reverse = False
        self._chosen: bool | None = None
        """Whether the operator wants the map; None: by their number."""
        self._mapped = False
        self._seen: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """Summary, filter, table or map, details."""
        yield self._summary
        yield self._filter
        yield self._table
        yield self._map
        yield self._detail

    def on_mount(self) -> None:
        """Begin with the table."""
        self._map.display = False

    def on_resize(self) -> None:
        """Other words fit now."""
        if self._seen:
            self.call_after_refresh(self._draw)

    # --- what is shown

    def show(self, view: View, feed: Feed) -> None:
        """Draw ``view``; nothing is done in a second in which nothing was heard."""
        seen = (view.listeners, view.voters, view.now_ms // 1000)
        unchanged = (
            len(self._seen) == len(seen)
            and self._seen[0] is seen[0]
            and self._seen[1] is seen[1]
            and self._seen[2] == seen[2]
        )
        if unchanged:
            return
        self._seen = seen
        self._view = view
        self._here = feed.listener.name
        self._draw()

    def _draw(self) -> None:
        view = self._view
        limit_ms = silent_ms(len(view.listeners))
        now_ms = view.now_ms
        everyone = {
            key: standing(listener, now_ms, limit_ms) for key, listener in view.listeners.items()
        }
        live = Counter(name for (name, _), each in everyone.items() if each.rank)
        self._twice = frozenset(name for name, times in live.items() if times > 1)
        versions = Counter(each.report.version for each in view.listeners.values())
        self._version = max(versions, key=lambda each: (versions[each], each), default="")
        prefix = self._filter.value
        self._standings = (
            {key: each for key, each in everyone.items() if key[0].startswith(prefix)}
            if prefix
            else everyone
        )
        self._tell_summary(everyone, versions)
        mapped = len(everyone) > MAP_LISTENERS if self._chosen is None else self._chosen
        if mapped != self._mapped:
            self._swap(mapped=mapped)
        if mapped:
            self._map.show(sorted(self._standings), self._standings)
        else:
            order = ordered(view.listeners, self._standings, self._order, reverse=self._reverse)
            descending = (self._order not in _ASCENDING) != self._reverse
            self._table.show(order, self._cells, order=(self._order, descending))
        self._tell_detail()

    def _swap(self, *, mapped: bool) -> None:
        selected = self._selected
        focused = self._table.has_focus or self._map.has_focus
        self._mapped = mapped
        self._map.display = mapped
        self._table.display = not mapped
        if mapped:
            self._map.show(sorted(self._standings), self._standings)
            if selected is not None:
                self._map.select(selected)
        elif selected is not None:
            order = ordered(self._view.listeners, self._standings, self._order)
            self._table.show(order, self._cells)
            self._table.select(selected)
        if focused:
            (self._map if mapped else self._table).focus()

    @property
    def _selected(self) -> Key | None:
        return self._map.selected if self._mapped else self._table.selected

    def _cells(self, key: Key) -> tuple[Cell, ...]:
        listener = self._view.listeners.get(key)
        how = self._standings.get(key)
        if listener is None or how is None:
            return tuple(("", "") for _ in COLUMNS)
        report = listener.report
        old = "dim" if how.stale else ""
        name = f"{key[0]} (twice)" if key[0] in self._twice else key[0]
        version = report.version if report.version == self._version else f"≠{report.version}"
        state = f"{'~' if how.stale and how.rank < 6 else how.sign} {how.word}"
        return (
            (state, how.tone if not how.stale or how.rank == 6 else "dim"),
            (name, "warn" if key[0] in self._twice else old),
            (count(lag_slots(listener)), old or ("warn" if lag_slots(listener) else "")),
            (count(report.applied), old),
            ("here" if key[0] == self._here else self._heard(listener), old),
            (count(report.repairs), old),
            (count(report.gaps), old),
            (count(report.catchups), old),
            (count(report.resets), old),
            (version, "warn" if version.startswith("≠") else old),
            (age(report.uptime_s * 1000), old),
            ("-" if report.stored < 0 else count(report.stored), old),
        )

    def _heard(self, listener: ListenerView) -> str:
        seconds = max(0, self._view.now_ms - listener.heard_ms) // 1000
        told = "now" if not seconds else f"{seconds} s" if seconds < 120 else age(seconds * 1000)
        return told if listener.direct else f"{told} via"

    def _tell_summary(self, everyone: Mapping[Key, Standing], versions: Mapping[str, int]) -> None:
        width = max(20, self.size.width)
        self._summary.put(
            (
                ((cut(self._counts(everyone), width), "strong"),),
                ((cut(self._oddities(versions), width), ""),),
            )
        )

    def _counts(self, everyone: Mapping[Key, Standing]) -> str:
        if not everyone:
            return "no listener was heard of yet" + self._told_by_voters(0)
        ranks = Counter(each.rank for each in everyone.values())
        text = f"{plural(len(everyone), 'listener')}: {count(ranks[1])} at tip"
        text += f", {count(ranks[3] + ranks[4] + ranks[5])} behind"
        if ranks[4] + ranks[5]:
            text += f" ({count(ranks[4] + ranks[5])} over {BEHIND_MS // 1000} s)"
        text += f", {count(ranks[6])} silent"
        if ranks[2]:
            text += f", {count(ranks[2])} starting"
        text += self._told_by_voters(len(everyone))
        listeners = self._view.listeners
        worst = max(everyone, key=lambda key: lag_slots(listeners[key]))
        if lag_slots(listeners[worst]):
            lag = plural(lag_slots(listeners[worst]), "slot")
            text += f"; largest lag {lag}, {line_of(worst[0])}"
        return text

    def _told_by_voters(self, here: int) -> str:
        """What voters know beyond what was heard here: their digests show a few at a time."""
        told = [voter.digest.listeners for voter in self._view.voters if voter.digest is not None]
        known = max((digest.known for digest in told), default=0)
        if known <= here:
            return ""
        behind = max(digest.behind for digest in told)
        silent = max(digest.silent for digest in told)
        return f"; voters know {count(known)}, {count(behind)} behind, {count(silent)} silent"

    def _oddities(self, versions: Mapping[str, int]) -> str:
        words = []
        if len(versions) > 1:
            most = sorted(versions, key=lambda each: (-versions[each], each))[:4]
            mixed = ", ".join(f"{line_of(each) or '?'}: {versions[each]}" for each in most)
            words.append(f"! mixed versions: {mixed}")
        elif self._version:
            words.append(f"all run {line_of(self._version)}")
        if self._twice:
            names = ", ".join(line_of(name) for name in sorted(self._twice)[:3])
            words.append(f"! same name twice: {names}")
        if self._filter.value:
            words.append(self._filter.told(len(self._standings), "name begins", "names begin"))
        return "   ".join(words)

    def _tell_detail(self) -> None:
        width = max(20, self.size.width)
        lines: list[Line] = []
        if self._mapped:
            line: list[Piece] = []
            for mark, tone, meaning in LEGEND:
                line += [(mark, tone), (f" {meaning}  ", "")]
            lines.append(tuple(line))
        key = self._selected
        listener = None if key is None else self._view.listeners.get(key)
        how = None if key is None else self._standings.get(key)
        if key is None or listener is None or how is None:
            if self._view.listeners:
                lines.append((("no name begins so: escape shows all again", "dim"),))
        else:
            lines.append(self._headline(key, listener, how))
            words = _numbers(key, listener)
            if key[0] in self._twice:
                words += "; ! another process uses this name too"
            lines += [((text, ""),) for text in wrap(words, width, 3)]
        self._detail.put(lines)

    def _headline(self, key: Key, listener: ListenerView, how: Standing) -> Line:
        heard = self._heard(listener).removesuffix(" via")
        words = "heard itself" if listener.direct else "heard through a voter"
        words += " just now" if heard == "now" else f" {heard} ago"
        name = cut(line_of(key[0]), max(20, self.size.width) // 2)
        return (
            (f"{GUTTER} {name}", "strong"),
            (f"  {how.sign} {how.word}", how.tone),
            (f", {words}{', stale' if how.stale else ''}", ""),
        )

    # --- what is selected

    def subject(self) -> Subject | None:
        """The listener under the cursor."""
        key = self._selected
        return None if key is None else Subject("listener", key[0], key[1])

    @on(RowTable.Moved)
    @on(HeatMap.Moved)
    def _moved(self) -> None:
        self._tell_detail()

    @on(RowTable.HeaderClicked)
    def _header_clicked(self, event: RowTable.HeaderClicked) -> None:
        name = "lag" if event.name == "state" else event.name
        if name == self._order:
            self._reverse = not self._reverse
        elif name in ORDERS:
            self._order, self._reverse = name, False
        self._draw()

    def action_map(self) -> None:
        """Map instead of table, or back."""
        self._chosen = not self._mapped
        self._draw()

    def action_sort(self) -> None:
        """Sort by the next of ORDERS."""
        self._order = ORDERS[(ORDERS.index(self._order) + 1) % len(ORDERS)]
        self._reverse = False
        self._draw()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self._reverse = not self._reverse
        self._draw()

    def action_filter(self) -> None:
        """Ask for the beginning of names."""
        self._filter.ask()

    def action_unfilter(self) -> None:
        """All names again."""
        self._filter.forget()
        self._focus_list()
        self._draw()

    @on(Input.Changed)
    def _filter_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._draw()

    @on(Input.Submitted)
    def _filter_done(self, event: Input.Submitted) -> None:
        event.stop()
        self._filter.settle()
        self._focus_list()

    def _focus_list(self) -> None:
        (self._map if self._mapped else self._table).focus()


def _numbers(key: Key, listener: ListenerView) -> str:
    report = listener.report
    stored = "no store" if report.stored < 0 else f"stored {count(report.stored)}"
    return (
        f"applied {count(report.applied)} of {count(report.tip)}, {stored}; "
        f"{plural(report.gaps, 'gap')}, {plural(report.repairs, 'repair')}, "
        f"{plural(report.catchups, 'catch-up')}, {plural(report.resets, 'reset')} in "
        f"{age(report.uptime_s * 1000)}; version {line_of(report.version) or '?'}, "
        f"instance {key[1]:x}"
    )
