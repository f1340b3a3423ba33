"""Before something is done to the cluster: this module alone asks the operator whether to do it.

It says what will happen in words; nothing is done without Confirm, and Cancel is the default.
"""

from __future__ import annotations

from typing import ClassVar, Final, TypeAlias

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, Label

from dashboard.actions import Action, HandOver, TakeSnapshot
from dashboard.view import View, VoterView, silent_after_ms
from dashboard.widgets.header import whole_age
from dashboard.widgets.lines import Lines

Offer: TypeAlias = tuple[str, str, Action]
"""(label, what will happen, what to do)."""


class Options(Lines, can_focus=True):
    """One of several: ● is the chosen one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "choose(-1)", show=False),
        Binding("down", "choose(1)", show=False),
        Binding("enter", "app.focus_next", show=False),
    ]

    class Chosen(Message):
        """Another one was chosen."""

        def __init__(self, at: int) -> None:
            super().__init__()
            self.at: Final = at

    def __init__(self, labels: tuple[str, ...], *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self._labels = labels
        self.at = 0

    def on_mount(self) -> None:
        """The first is chosen."""
        self._draw()

    def _draw(self) -> None:
        chosen = "cursor" if self.has_focus else "strong"
        self.put(
            [
                ((f" {'●' if at == self.at else '○'} {label} ", chosen if at == self.at else ""),)
                for at, label in enumerate(self._labels)
            ]
        )

    def _choose(self, at: int) -> None:
        self.at = max(0, min(len(self._labels) - 1, at))
        self._draw()
        self.post_message(self.Chosen(self.at))

    def action_choose(self, by: int) -> None:
        """The next, or the one before."""
        self._choose(self.at + by)

    def on_click(self, event: events.Click) -> None:
        """The one that was clicked."""
        if 0 <= event.y < len(self._labels):
            self._choose(event.y)

    def watch_has_focus(self, focused: bool) -> None:
        """The chosen one is bright where the keys go."""
        super().watch_has_focus(focused)
        self._draw()


class Choice(ModalScreen[Action | None]):
    """Asks which of ``offers`` to do, if any."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Cancel"),
        Binding("up,down", "choose", "Choose", key_display="↑↓"),
        Binding("left,right", "other", show=False),
    ]

    def __init__(self, title: str, offers: tuple[Offer, ...]) -> None:
        super().__init__()
        self._title = title
        self._offers = offers

    def compose(self) -> ComposeResult:
        """A title, the choices, what the chosen one does, and two buttons."""
        with Vertical(id="choice"):
            yield Label(self._title, id="choice-title", markup=False)
            yield Options(tuple(label for label, _, _ in self._offers), id="choices")
            yield Label(self._offers[0][1], id="choice-words", markup=False)
            with Horizontal(id="choice-buttons"):
                yield Button("Cancel", id="cancel")
                yield Button("Confirm", id="confirm", variant="warning")

    def on_mount(self) -> None:
        """Enter, pressed in haste, does nothing."""
        self.query_one("#cancel", Button).focus()

    def on_options_chosen(self, event: Options.Chosen) -> None:
        """Say what this choice would do."""
        self.query_one("#choice-words", Label).update(self._offers[event.at][1])

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Leave with the choice, or with nothing."""
        chosen = self._offers[self.query_one(Options).at][2]
        self.dismiss(chosen if event.button.id == "confirm" else None)

    def action_choose(self) -> None:
        """From the buttons to the choices."""
        self.query_one(Options).focus()

    def action_other(self) -> None:
        """To the other button."""
        confirm, cancel = self.query_one("#confirm", Button), self.query_one("#cancel", Button)
        (cancel if self.focused is confirm else confirm).focus()


def hand_over(view: View) -> Choice:
    """To whom leadership may go."""
    calm = "The leader stops proposing, the new one stands at once; writes wait, none fails."
    best = f"The voter that is most up to date is to lead. {calm}"
    offers: list[Offer] = [("the most up to date", best, HandOver())]
    for voter in view.voters:
        words = f"Voter {voter.voter} is to lead. {calm}"
        if voter.tip is not None and voter.tip.leading:
            words = f"Voter {voter.voter} leads already, as far as is known here: nothing happens."
        label = f"voter {voter.voter}: {_state(view, voter)}"
        offers.append((label, words, HandOver(voter.voter)))
    return Choice("Hand over leadership to …", tuple(offers))


def take_snapshot(view: View) -> Choice:
    """Of which voters a snapshot may be taken."""
    what = "cut a snapshot of the applied state now and keep serving meanwhile"
    everybody = tuple(voter.voter for voter in view.voters)
    offers: list[Offer] = [
        ("all voters, one after the other", f"All voters {what}.", TakeSnapshot(everybody))
    ]
    for voter in view.voters:
        label = f"voter {voter.voter}: {_state(view, voter)}"
        words = f"Voter {voter.voter} is to {what}."
        offers.append((label, words, TakeSnapshot((voter.voter,))))
    return Choice("Take a snapshot of …", tuple(offers))


def _state(view: View, voter: VoterView) -> str:
    if voter.heard_ms is None or voter.digest is None:
        return "never heard"
    ago_ms = view.now_ms - voter.heard_ms
    if ago_ms > silent_after_ms(voter):
        return f"silent for {whole_age(ago_ms)}"
    return voter.digest.role
