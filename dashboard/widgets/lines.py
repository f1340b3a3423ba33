"""Text drawn line by line, cheaply: this module alone turns styled words into Textual strips.

A picture is a tuple of lines, a line a tuple of pieces, a piece words and the name of a style
("" is plain; "lead cursor" is two at once).  Pictures are values made by plain functions, so they
are tested without a screen, and only lines that differ from those shown are drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Final, TypeAlias

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.strip import Strip
from textual.widget import Widget

Piece: TypeAlias = tuple[str, str]
Line: TypeAlias = tuple[Piece, ...]
Picture: TypeAlias = tuple[Line, ...]

OWNERS: Final = 8
"""So many colours of owners there are, told apart by everybody."""
STYLES: Final = (
    "ok",
    "note",
    "warn",
    "bad",
    "dim",
    "head",
    "strong",
    "key",
    "tab",
    "lead",
    "stand",
    "poll",
    "follow",
    "down",
    "chart",
    "cursor",
    *(f"owner-{at}" for at in range(OWNERS)),
)
"""The names of styles; ``trex.tcss`` says what they look like, by level, by role and by use."""


def width_of(line: Iterable[Piece]) -> int:
    """Columns a line takes."""
    return sum(cell_len(words) for words, _ in line)


def cut(words: str, width: int) -> str:
    """``words`` in at most ``width`` columns, "…" for what is cut off."""
    if cell_len(words) <= width:
        return words
    return set_cell_size(words, width - 1).rstrip() + "…" if width > 0 else ""


def spread(left: Line, right: Line, width: int) -> Line:
    """``left`` at the left and ``right`` at the right end of ``width`` columns; at least one column
    apart, else the right one alone gives way."""
    gap = width - width_of(left) - width_of(right)
    return (*left, (" " * gap, ""), *right) if gap > 0 else left


def wrap(words: str, width: int, lines_max: int) -> tuple[str, ...]:
    """``words`` broken at spaces into at most ``lines_max`` lines of at most ``width`` columns."""
    lines: list[str] = []
    line = ""
    for word in words.split():
        longer = f"{line} {word}" if line else word
        if cell_len(longer) <= width or not line:
            line = longer
            continue
        lines.append(line)
        line = word
    lines.append(line)
    if len(lines) > lines_max:
        lines[lines_max - 1 :] = [" ".join(lines[lines_max - 1 :])]
    return tuple(cut(each, width) for each in lines)


class Lines(Widget):
    """A widget that shows a picture. Subclasses make one and :meth:`put` it."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in STYLES}

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002
        self._picture: Picture = ()
        self._looks: dict[str, Style] = {}
        """Styles by name, as the theme has them."""
        super().__init__(id=id, classes=classes)

    @property
    def picture(self) -> Picture:
        """What is shown."""
        return self._picture

    def put(self, picture: Sequence[Line]) -> None:
        """Show ``picture``; what did not change is not drawn again."""
        before, self._picture = self._picture, tuple(picture)
        if len(before) != len(self._picture):
            self.refresh(layout=self.styles.auto_dimensions)
            return
        changed = [
            Region(0, y, self.size.width, 1)
            for y, (old, new) in enumerate(zip(before, self._picture, strict=True))
            if old != new
        ]
        if changed:
            self.refresh(*changed)

    def text(self) -> str:
        """The picture without its styles."""
        return "\n".join("".join(words for words, _ in line) for line in self._picture)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many lines as the picture has, where the height is left to the widget."""
        del container, viewport, width
        return max(1, len(self._picture))

    def render_line(self, y: int) -> Strip:
        """Line ``y`` of the picture, in the colours of the theme."""
        plain = self._style("")
        if not 0 <= y < len(self._picture):
            return Strip.blank(self.size.width, plain)
        segments = [Segment(words, self._style(name)) for words, name in self._picture[y] if words]
        return Strip(segments).adjust_cell_length(self.size.width, plain)

    def _style(self, name: str) -> Style:
        style = self._looks.get(name)
        if style is None:
            classes = [f"lines--{each}" for each in name.split()]
            style = self.get_component_rich_style(*classes) if classes else self.rich_style
            self._looks[name] = style
        return style

    def notify_style_update(self) -> None:
        """Another theme, or the focus: the styles are looked up again."""
        super().notify_style_update()
        self._looks = {}
