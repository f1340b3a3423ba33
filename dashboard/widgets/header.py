"""What stands above every tab: this module alone draws the verdict, the tabs and the age of it all.

The verdict is never cut: it takes a second and a third line where the words are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from textual import events
from textual.message import Message

from dashboard.advice import SIGNS, Level, Verdict
from dashboard.tables import visible
from dashboard.widgets.lines import Line, Lines, Picture, Piece, cut, spread, width_of, wrap
from dashboard.words import age

LINES_MAX: Final = 3
"""Most lines of a verdict."""
NOW_MS: Final = 1_500
"""What is younger is called live: voters other than the leader speak each 900 ms."""


def whole_age(ms: int) -> str:
    """An age in whole seconds, or more: "8 s", "12 min"; it changes once a second at most."""
    if ms < 1_000:
        return "<1 s"
    return age(ms) if ms >= 10_000 else f"{ms // 1000} s"


def verdict_picture(verdict: Verdict, width: int) -> Picture:
    """Sign and words, in as many lines as they need."""
    return told_picture(verdict.level, verdict.words, width)


def told_picture(level: Level, words: str, width: int) -> Picture:
    """``words`` behind the sign of ``level``, wrapped."""
    first, *rest = wrap(words, width - 3, LINES_MAX)
    return (
        ((f" {SIGNS[level]} ", level), (first, level)),
        *(((f"   {line}", level),) for line in rest),
    )


def right_sides(
    cluster: str, age_ms: int | None, *, stale: bool, replay: tuple[str, ...] = ()
) -> tuple[Line, ...]:
    """The cluster's name, and how old what is shown is: "live", "2 s old" or "STALE 8 s"; of a
    replay where it is. Each shorter than the one before."""
    if age_ms is None:
        old: Piece = ("nothing heard yet ", "warn")
    elif stale:
        old = (f"STALE {whole_age(age_ms)} ", "bad")
    elif age_ms >= NOW_MS:
        old = (f"{whole_age(age_ms)} old ", "warn")
    else:
        old = ("" if replay else "live ", "dim")
    name: Piece = (f"{cut(cluster, 24)}  ", "strong")
    lines: list[Line] = [
        (name, (f"{words} ", "key"), (" " if old[0] else "", ""), old) for words in replay
    ]
    return (*lines, (name, old), (old,))


def replay_words(name: str, progress: tuple[int, int], speed: float) -> tuple[str, ...]:
    """ "REPLAY file 00:12/00:31 ×2", or "paused"; and without the name."""
    played, whole = (f"{ms // 60_000:02}:{ms // 1000 % 60:02}" for ms in progress)
    rate = "paused" if speed <= 0 else f"×{speed:g}"
    where = f"{played}/{whole} {rate}"
    return (f"REPLAY {cut(visible(name), 24)} {where}", f"REPLAY {where}")


class Top(Lines):
    """The verdict."""


class Trouble(Lines):
    """What is wrong with the feed itself; hidden while nothing is."""


class Tabs(Lines):
    """One line: the tabs at the left, whose and how old it all is at the right."""

    class Chosen(Message):
        """The operator clicked on tab ``at``."""

        def __init__(self, at: int) -> None:
            super().__init__()
            self.at: Final = at

    def __init__(self, titles: tuple[str, ...], *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self._titles = titles
        self.active = 0
        self._rights: tuple[Line, ...] = ()

    def show(self, rights: Sequence[Line]) -> None:
        """Draw the tabs, and beside them the longest of ``rights`` that there is room for; where
        there is none, the other tabs are but their numbers."""
        self._rights = tuple(rights)
        labels: list[Piece] = []
        for at, title in enumerate(self._titles):
            labels.append((f" {at + 1} {title} ", "tab" if at == self.active else ""))
        width = self.size.width
        for tabs in (labels, self._short(labels)):
            for right in self._rights:
                if width_of(tabs) + width_of(right) < width:
                    self.put((spread(tuple(tabs), right, width),))
                    return
        self.put((tuple(labels),))

    def _short(self, labels: Sequence[Piece]) -> list[Piece]:
        return [
            each if at == self.active else (f" {at + 1} ", "") for at, each in enumerate(labels)
        ]

    def on_resize(self) -> None:
        """The right side belongs to the right."""
        self.show(self._rights)

    def on_click(self, event: events.Click) -> None:
        """A tab is chosen."""
        left = 0
        for at, (words, _) in enumerate(self.picture[0][: len(self._titles)]):
            if left <= event.x < left + len(words):
                self.post_message(self.Chosen(at))
                return
            left += len(words)
