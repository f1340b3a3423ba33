"""The one-line question of a list, alone: hidden until asked, then the beginning of names or a key.

It is shown as long as something is asked; Enter gives the focus back and keeps what was typed,
the pane's Escape forgets it.
"""

from __future__ import annotations

from textual.widgets import Input

from dashboard.widgets.rows import line_of
from dashboard.words import plural


class Ask(Input):
    """An ``Input`` of one line above a list, hidden while it holds nothing and is not typed in."""

    def __init__(self, placeholder: str) -> None:
        super().__init__(placeholder=placeholder, compact=True)
        self.display = False

    def ask(self) -> None:
        """Show the line and type in it."""
        self.display = True
        self.focus()

    def settle(self) -> None:
        """What was typed holds; an empty line is hidden again."""
        self.display = bool(self.value)

    def forget(self) -> None:
        """Empty and hidden again."""
        self.value = ""
        self.display = False

    def told(self, shown: int, one: str, many: str) -> str:
        """``3 names begin with 'a'``: how many of a list are left by what is asked."""
        return f"{plural(shown, one, many)} with {line_of(self.value)!r}"
