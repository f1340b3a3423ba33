"""What is selected, explained: this module alone shows long words over the panes.

One screen serves the Explain of the panes, the help and what is asked for by name: Markdown that is
made anew each second while it is open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Markdown

from dashboard import advice
from dashboard.tables import visible
from dashboard.view import View
from dashboard.widgets.pane import Subject

NEW_WORDS_S: Final = 1.0
"""So often open words are made anew, in seconds."""


def explain(view: View, subject: Subject | None) -> str:
    """What ``subject`` does, what it means and what to do, as Markdown; of None: the cluster."""
    if subject is None or subject.kind == "verdict":
        return _explain_all(view)
    name = subject.name
    if subject.kind == "voter" and name.isascii() and name.isdigit():
        return advice.explain_voter(view, int(name))
    if subject.kind == "ballot":
        return advice.explain_ballot(view, name)
    if subject.kind == "slot" and name.isascii() and name.isdigit():
        return advice.explain_slot(view, int(name))
    if subject.kind == "listener":
        return advice.explain_listener(view, name, subject.instance)
    return f"# {plain(subject.kind)} {plain(name)}\n\nNothing more is known of it here."


def plain(text: str) -> str:
    """``text`` from outside as Markdown that shows it as it is."""
    return "".join(
        f"\\{each}" if each.isascii() and not each.isalnum() and each not in " \n" else each
        for each in visible(text)
    )


def _explain_all(view: View) -> str:
    verdict = advice.verdict(view)
    parts = [f"# {advice.SIGNS[verdict.level]} {verdict.state}", plain(verdict.words)]
    for finding in advice.findings(view):
        words = (
            f"**{advice.SIGNS[finding.level]} {plain(finding.subject)}**: {plain(finding.words)}"
        )
        parts.append(f"{words}\n\n→ {plain(finding.advice)}" if finding.advice else words)
    return "\n\n".join(parts)


def subject_of(words: str) -> Subject | None:
    """What an operator means by "0.17.3" (a ballot), "12486" (a slot) or "voter 3"; None if it
    cannot be told."""
    kind, _, name = words.strip().replace(",", "").lower().rpartition(" ")
    if not (name.isascii() and name.replace(".", "").isdigit()):
        return None
    parts = name.split(".")
    if all(parts) and len(parts) == 3 and kind in ("", "ballot"):
        return Subject("ballot", ".".join(str(int(part)) for part in parts))
    if len(parts) == 1 and kind in ("", "slot", "voter"):
        return Subject(kind or "slot", str(int(name)))
    return None


class Words(ModalScreen[None]):
    """Markdown over the panes; Esc closes, the arrows scroll."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,e,enter,question_mark", "dismiss", "Close"),
        Binding("up,k", "scroll(-1)", show=False),
        Binding("down,j", "scroll(1)", show=False),
        Binding("pageup", "scroll(-10)", show=False),
        Binding("pagedown,space", "scroll(10)", show=False),
        Binding("home", "scroll(-9999)", show=False),
        Binding("end", "scroll(9999)", show=False),
    ]

    def __init__(self, make: Callable[[], str]) -> None:
        super().__init__()
        self._make = make
        self._text = make()

    def compose(self) -> ComposeResult:
        """One box that scrolls."""
        with VerticalScroll(id="words", can_focus=False):
            yield Markdown(self._text, open_links=False)
        yield Label("Esc closes   ↑ ↓ scroll", id="words-keys")

    def on_mount(self) -> None:
        """Keep the words true while they are read."""
        self.set_interval(NEW_WORDS_S, self._renew)

    async def _renew(self) -> None:
        text = self._make()
        if text != self._text:
            self._text = text
            await self.query_one(Markdown).update(text)

    def action_scroll(self, lines: int) -> None:
        """Scroll by so many lines."""
        self.query_one("#words", VerticalScroll).scroll_relative(y=lines, animate=False)


class GoTo(ModalScreen[Subject | None]):
    """Asks for a ballot, slot or voter by name."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "Cancel")]

    def compose(self) -> ComposeResult:
        """One line to type in."""
        with Vertical(id="goto"):
            yield Label("Explain which ballot (0.17.3), slot (12486) or voter (voter 3)?")
            yield Input(placeholder="0.17.3 or 12486 or voter 3")
            yield Label("", id="goto-wrong")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Leave with what was asked for, or say what was not understood."""
        found = subject_of(event.value)
        if found is not None:
            self.dismiss(found)
            return
        words = "not understood: give a ballot as 0.17.3, a slot as 12486, or a voter as voter 3"
        self.query_one("#goto-wrong", Label).update(words)
