"""One pane on a screen of its own: for tests of a pane that need no frame around it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import cast

from textual.app import App
from textual.pilot import Pilot
from textual.widgets import Footer

import dashboard
from dashboard.feed import Feed
from dashboard.view import View
from dashboard.widgets.pane import Pane
from tests.dashboard.fakes import FakeFeed, FakeListener
from trex_core.metadata.state import EMPTY, MetadataState


class Stage(App):
    """Shows ``pane`` what the test sets: ``view`` and the state of the listener."""

    CSS_PATH = Path(dashboard.__file__).parent / "trex.tcss"

    def __init__(self, pane: Pane, view: View | None = None, state: MetadataState = EMPTY):
        super().__init__()
        self.pane = pane
        self.view = View() if view is None else view
        self.listener = FakeListener(state)
        self.feed = cast(Feed, FakeFeed(listener=self.listener))

    def compose(self):
        yield self.pane
        yield Footer()

    def draw(self) -> None:
        """As the application does some four times a second."""
        self.pane.show(self.view, self.feed)

    def lines(self) -> list[str]:
        """What is on the screen."""
        return [strip.text for strip in self.screen._compositor.render_strips()]

    def text(self) -> str:
        return "\n".join(self.lines())


@contextlib.asynccontextmanager
async def on_stage(pane, view=None, state=EMPTY, size=(80, 24), focus="RowTable"):
    """The pane, shown and focused: yields (stage, pilot)."""
    stage = Stage(pane, view, state)
    async with stage.run_test(size=size) as pilot:
        await shown(stage, pilot)
        if focus:
            stage.query_one(focus).focus()
            await pilot.pause()
        yield stage, pilot


async def shown(stage: Stage, pilot: Pilot) -> None:
    """Show what is set now, and wait until all of it is drawn."""
    stage.draw()
    await stage.workers.wait_for_complete()
    await pilot.pause()
    stage.draw()
    await pilot.pause()
