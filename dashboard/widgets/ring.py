"""The picture of the ring: this module alone draws who owns which part of the token space.

Tokens run clockwise from the top.  Where there is room to tell the ranges apart, each cell of the
outer band is the letter, in the colour, of the member that owns the token at its angle; the band
inside it is the zone's digit; innermost are marks where the selected member holds the data.  Where
there is no room, the band shows shares instead: of members, or of zones, the largest first.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

import msgspec
from rich.segment import Segment
from textual import events
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from dashboard.placement import NOWHERE, SPACE, Placement, share
from dashboard.widgets.lines import OWNERS, STYLES, cut
from dashboard.widgets.rows import line_of
from dashboard.words import count, plural

LETTERS: Final = string.ascii_uppercase + string.ascii_lowercase
"""So many members are told apart by a letter."""
NO_LETTER: Final = "·"
OTHERS: Final = "…"
"""The letter of all that have no own arc."""
CROWDED: Final = 2
"""With more ranges than so many for each cell of the band, shares are drawn instead."""
GROUPS_MAX: Final = 12
"""Most members or zones whose shares are drawn one by one."""
ROWS_MIN: Final = 5
"""A circle of fewer lines is none: the largest shares are told in words."""
WIDE_BAND_ROWS: Final = 13
"""From so many lines on the outer band is two cells thick."""

Painted = tuple[str, str]
"""(one character, its style)"""


class _Spot(msgspec.Struct, frozen=True, gc=False):
    """A cell of a band: ``depth`` lines inside the circle, at ``turn`` of a full turn from the top,
    clockwise."""

    x: int
    y: int
    depth: int
    turn: float


@functools.lru_cache(maxsize=8)
def spots(width: int, height: int) -> tuple[_Spot, ...]:
    """The cells of the four outermost bands of the largest circle in so many cells. A cell is
    taken to be twice as high as wide."""
    radius = min(height / 2, width / 4)
    found = []
    for y in range(height):
        for x in range(width):
            right, down = (x + 0.5 - width / 2) / 2, y + 0.5 - height / 2
            inside = radius - math.hypot(right, down)
            if 0 <= inside < 4:
                turn = math.atan2(right, -down) / math.tau % 1.0
                found.append(_Spot(x, y, int(inside), turn))
    return tuple(found)


class Letters:
    """A letter for each member that owns something, as long as there are letters. A member keeps
    its letter."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def give(self, members: Iterable[str]) -> None:
        """Letters for ``members``; those of others are free again."""
        wanted = sorted(members)
        kept = set(wanted)
        self._of = {name: letter for name, letter in self._of.items() if name in kept}
        if len(wanted) > len(LETTERS):
            self._of = {}
            return
        taken = set(self._of.values())
        free = (letter for letter in LETTERS if letter not in taken)
        for name in wanted:
            if name not in self._of:
                self._of[name] = next(free)

    def of(self, member: str) -> str:
        """The letter of ``member``."""
        return self._of.get(member, NO_LETTER)

    def colour(self, member: str) -> str:
        """The style of ``member``."""
        letter = self._of.get(member)
        return "dim" if letter is None else colour(LETTERS.index(letter))


def colour(index: int) -> str:
    """The style of the so-manieth owner."""
    return f"owner-{index % OWNERS}"


class Group(msgspec.Struct, frozen=True):
    """An arc of shares: ``letter`` and ``style`` on the picture, ``name`` in words. ``kind`` is
    "member", "zone" or "rest"."""

    kind: str
    letter: str
    style: str
    name: str
    tokens: int


def crowded(placement: Placement, width: int, height: int) -> bool:
    """Whether the ranges cannot be told apart on a circle of that size."""
    cells = sum(spot.depth == 0 for spot in spots(width, height))
    return placement.ring.members > len(LETTERS) or placement.ring.tokens > CROWDED * cells


def groups(placement: Placement, letters: Letters) -> tuple[Group, ...]:
    """Shares to be drawn: of each member while they are few, else of zones, else of the members
    that own most; then one for the others."""
    owners = len(placement.holdings)
    if owners <= GROUPS_MAX:
        return tuple(
            Group("member", letters.of(name), letters.colour(name), name, placement.of(name).owned)
            for name in placement.by_share[:owners]
        )
    zones = placement.zones
    by_zone = len(zones) > 1
    if by_zone:
        largest: Sequence[str] = sorted(zones, key=lambda name: (-zones[name], name))[:GROUPS_MAX]
    else:
        largest = placement.by_share[:GROUPS_MAX]
    digits = zone_digits(placement)
    found = [
        Group(
            "zone" if by_zone else "member",
            digits.get(name, "0") if by_zone else LETTERS[at],
            colour(at),
            name,
            zones[name] if by_zone else placement.of(name).owned,
        )
        for at, name in enumerate(largest)
    ]
    rest = SPACE - sum(group.tokens for group in found)
    more = (len(zones) if by_zone else owners) - len(found)
    if rest and more:
        words = f"{count(more)} more {'zones' if by_zone else 'members'}"
        found.append(Group("rest", OTHERS, "dim", words, rest))
    return tuple(found)


def zone_digits(placement: Placement) -> dict[str, str]:
    """A digit for each zone, in order of name; "+" for those after the ninth."""
    names = sorted(name for name in placement.zones if name)
    return {name: str(at) if at < 10 else "+" for at, name in enumerate(names, 1)}


def paint(
    placement: Placement, letters: Letters, selected: str | None, width: int, height: int
) -> tuple[tuple[Painted, ...], ...]:
    """The picture: ``height`` lines of ``width`` cells."""
    blank: Painted = (" ", "")
    field: list[list[Painted]] = [[blank] * width for _ in range(height)]
    ring = placement.ring
    if not ring.members:
        _write(field, ["the ring is empty", "no member is up"])
        return tuple(map(tuple, field))
    if height < ROWS_MIN or width < 2 * ROWS_MIN:
        return tuple(map(tuple, field))
    thick = 2 if height >= WIDE_BAND_ROWS else 1
    if crowded(placement, width, height):
        shares = groups(placement, letters)
        for spot in spots(width, height):
            if spot.depth < thick:
                group = _group_at(shares, int(spot.turn * SPACE))
                field[spot.y][spot.x] = (group.letter, group.style)
        _write(field, _words(placement, len(shares)), "dim")
        return tuple(map(tuple, field))
    digits = zone_digits(placement)
    zone_of = functools.cache(lambda name: _zone(placement, digits, name))
    for spot in spots(width, height):
        replicas = ring.replicas_at(min(SPACE - 1, int(spot.turn * SPACE)))
        owner = replicas[0]
        if spot.depth < thick:
            style = letters.colour(owner)
            field[spot.y][spot.x] = (letters.of(owner), style)
        elif spot.depth == thick and digits:
            field[spot.y][spot.x] = (zone_of(owner), "dim")
        elif spot.depth == thick + bool(digits) and selected in replicas:
            field[spot.y][spot.x] = ("●", "strong") if owner == selected else ("○", "dim")
    _write(field, _words(placement, 0), "dim")
    return tuple(map(tuple, field))


def _zone(placement: Placement, digits: dict[str, str], name: str) -> str:
    member = placement.state.members.get(name)
    return digits.get(member.zone or "", " ") if member else " "


def _group_at(shares: Sequence[Group], token: int) -> Group:
    for group in shares:
        token -= group.tokens
        if token < 0:
            return group
    return shares[-1]


def _words(placement: Placement, shares: int) -> list[str]:
    ring = placement.ring
    named = sum(1 for name in placement.zones if name)
    words = [
        plural(ring.members, "member"),
        plural(named, "zone") if named else "no zones",
        plural(ring.tokens, "token"),
        plural(min(ring.settings.replication_factor, ring.members), "copy", "copies"),
    ]
    return [*words, "", "shares"] if shares else words


def _write(field: list[list[Painted]], words: Sequence[str], style: str = "") -> None:
    """Put ``words`` into the middle where nothing is drawn; as many lines as fit."""
    height, width = len(field), len(field[0]) if field else 0
    while words and not all(
        _clear(field, *place, word) for place, word in _places(words, width, height)
    ):
        words = words[:-1]
    for (y, x), word in _places(words, width, height):
        for at, letter in enumerate(word):
            field[y][x + at] = (letter, style)


def _places(words: Sequence[str], width: int, height: int) -> list[tuple[tuple[int, int], str]]:
    top = (height - len(words)) // 2
    return [((top + at, (width - len(word)) // 2), word) for at, word in enumerate(words)]


def _clear(field: list[list[Painted]], y: int, x: int, word: str) -> bool:
    if not 0 <= y < len(field) or x < 0:
        return False
    around = field[y][max(0, x - 1) : x + len(word) + 1]
    return len(around) >= len(word) and all(letter == " " for letter, _ in around)


def legend(
    placement: Placement, letters: Letters, width: int, height: int, lines_max: int, columns: int
) -> tuple[tuple[tuple[str, str], ...], ...]:
    """What the letters or digits of the picture stand for, in at most ``lines_max`` lines of
    ``columns``, as a picture of ``lines``."""
    if not placement.ring.members:
        return ()
    if crowded(placement, width, height):
        entries = [
            (
                group.letter,
                group.style,
                f" {line_of(group.name) or 'no zone'} {share(group.tokens)}",
            )
            for group in groups(placement, letters)
        ]
    else:
        digits = zone_digits(placement)
        tokens = placement.zones
        entries = [
            (digit, "dim", f" {line_of(name)} {share(tokens[name])}")
            for name, digit in digits.items()
        ]
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0
    for letter, style, words in entries:
        told = cut(words, columns - 3) + "  "
        if used + 1 + len(told) > columns + 2 and lines[-1]:
            if len(lines) == lines_max:
                break
            lines.append([])
            used = 0
        lines[-1] += [(letter, style), (told, "")]
        used += 1 + len(told)
    return tuple(tuple(line) for line in lines if line)


class RingPicture(Widget):
    """The picture, as large as its room. A click on the band selects an owner."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in STYLES}

    class Picked(Message):
        """The arc of ``member`` was clicked."""

        def __init__(self, member: str) -> None:
            super().__init__()
            self.member: Final = member

    def __init__(self) -> None:
        super().__init__()
        self.letters: Final = Letters()
        self._placement = NOWHERE
        self._selected: str | None = None
        self._lines: tuple[tuple[Painted, ...], ...] = ()
        self._painted: Placement | None = None
        self._drawn: tuple[object, ...] = ()
        self._shares: dict[tuple[str, str], Painted] = {}
        """Where shares are drawn: how, by kind and name."""

    def show(self, placement: Placement, selected: str | None) -> None:
        """Show ``placement``, whose members were given letters; mark what ``selected`` holds. Only
        lines that changed are drawn."""
        self._placement = placement
        self._selected = selected
        before = self._lines
        self._paint()
        if len(before) != len(self._lines):
            self.refresh()
            return
        for y, (old, new) in enumerate(zip(before, self._lines, strict=True)):
            if old != new:
                self.refresh(Region(0, y, self.size.width, 1))

    def _paint(self) -> None:
        drawn = (self._selected, self.size)
        if self._painted is not self._placement or drawn != self._drawn:
            self._painted, self._drawn = self._placement, drawn
            self._shares = {}
            if crowded(self._placement, self.size.width, self.size.height):
                self._shares = {
                    (group.kind, group.name): (group.letter, group.style)
                    for group in groups(self._placement, self.letters)
                }
            self._lines = paint(
                self._placement, self.letters, self._selected, self.size.width, self.size.height
            )

    def on_resize(self) -> None:
        """A larger or smaller circle."""
        self._paint()
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """Whose arc it is."""
        offset = event.get_content_offset(self)
        size = self.size
        if offset is None or crowded(self._placement, size.width, size.height):
            return
        for spot in spots(size.width, size.height):
            if (spot.x, spot.y) == (offset.x, offset.y):
                replicas = self._placement.ring.replicas_at(int(spot.turn * SPACE))
                if replicas:
                    self.post_message(self.Picked(replicas[0]))

    def mark(self, member: str) -> Painted:
        """How the picture draws what ``member`` owns."""
        if not self._shares:
            return self.letters.of(member), self.letters.colour(member)
        row = self._placement.state.members.get(member)
        zone = (row.zone if row is not None else None) or ""
        own = self._shares.get(("member", member)) or self._shares.get(("zone", zone))
        return own or (OTHERS, "dim")

    def text(self) -> str:
        """The picture without its styles."""
        return "\n".join("".join(letter for letter, _ in line) for line in self._lines)

    def render_line(self, y: int) -> Strip:
        """Line ``y``, in runs of one style."""
        base = self.rich_style
        if y >= len(self._lines):
            return Strip.blank(self.size.width, base)
        segments: list[Segment] = []
        run, running = "", ""
        for letter, style in (*self._lines[y], ("", "end")):
            if style != running and run:
                told = self.get_component_rich_style(f"lines--{running}") if running else base
                segments.append(Segment(run, told))
                run = ""
            run, running = run + letter, style
        return Strip(segments).adjust_cell_length(self.size.width, base)
