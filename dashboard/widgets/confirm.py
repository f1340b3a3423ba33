"""Before something is done to the cluster: this module alone asks the operator whether to do it.

It says what will happen in words; nothing is done without Confirm, and Cancel is the default.
"""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Label, RadioButton, RadioSet

from dashboard.actions import Action, HandOver, TakeSnapshot
from dashboard.view import View, VoterView, silent_after_ms
from dashboard.widgets.header import whole_age


class Choice(ModalScreen[Action | None]):
    """Asks which of ``actions`` to do, if any. Each is (label, what will happen, action)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Cancel"),
        Binding("left,right", "other", show=False),
    ]

    def __init__(self, title: str, actions: tuple[tuple[str, str, Action], ...]) -> None:
        super().__init__()
        self._title = title
        self._actions = actions
        self._chosen = 0

    def compose(self) -> ComposeResult:
        """A title, the choices, what the chosen one does, and two buttons."""
        with Vertical(id="choice"):
            yield Label(self._title, id="choice-title", markup=False)
            with RadioSet(id="choices", compact=True):
                for at, (label, _, _) in enumerate(self._actions):
                    yield RadioButton(label, value=at == 0)
            yield Label(self._actions[0][1], id="choice-words", markup=False)
            with Horizontal(id="choice-buttons"):
                yield Button("Cancel", id="cancel")
                yield Button("Confirm", id="confirm", variant="warning")

    def on_mount(self) -> None:
        """Enter, pressed in haste, does nothing."""
        self.query_one("#cancel", Button).focus()

    def on_radio_set_changed(self, event: RadioSet.Changed) -> None:
        """Say what this choice would do."""
        self._chosen = event.index
        self.query_one("#choice-words", Label).update(self._actions[self._chosen][1])

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Leave with the choice, or with nothing."""
        self.dismiss(self._actions[self._chosen][2] if event.button.id == "confirm" else None)

    def action_other(self) -> None:
        """To the other button."""
        buttons = self.query_one("#confirm", Button), self.query_one("#cancel", Button)
        buttons[self.focused is buttons[0]].focus()


def hand_over(view: View) -> Choice:
    """To whom leadership may go."""
    calm = "The leader stops proposing, the new one stands at once; writes wait, none fails."
    best = f"The voter that is most up to date is to lead. {calm}"
    actions: list[tuple[str, str, Action]] = [("the most up to date", best, HandOver())]
    for voter in view.voters:
        words = f"Voter {voter.voter} is to lead. {calm}"
        if _leads(voter):
            words = f"Voter {voter.voter} leads already: nothing will happen."
        actions.append(
            (f"voter {voter.voter}: {_state(view, voter)}", words, HandOver(voter.voter))
        )
    return Choice("Hand over leadership to …", tuple(actions))


def take_snapshot(view: View) -> Choice:
    """Of which voters a snapshot may be taken."""
    what = "cut a snapshot of the applied state now and keep serving meanwhile"
    everybody = tuple(voter.voter for voter in view.voters)
    actions: list[tuple[str, str, Action]] = [
        ("all voters, one after the other", f"All voters {what}.", TakeSnapshot(everybody))
    ]
    actions += (
        (
            f"voter {voter.voter}: {_state(view, voter)}",
            f"Voter {voter.voter} is to {what}.",
            TakeSnapshot((voter.voter,)),
        )
        for voter in view.voters
    )
    return Choice("Take a snapshot of …", tuple(actions))


def _leads(voter: VoterView) -> bool:
    return voter.tip is not None and voter.tip.leading


def _state(view: View, voter: VoterView) -> str:
    if voter.heard_ms is None or voter.digest is None:
        return "never heard"
    ago_ms = view.now_ms - voter.heard_ms
    if ago_ms > silent_after_ms(voter):
        return f"silent for {whole_age(ago_ms)}"
    return voter.digest.role
