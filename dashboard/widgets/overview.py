"""The tab Overview: this module alone draws the voters, what they are at and what happened."""

from __future__ import annotations

from typing import ClassVar

from dashboard.feed import Feed
from dashboard.view import View
from dashboard.widgets.pane import Pane


class Overview(Pane):
    """Voters, ballots, slots, rates and events."""

    TITLE: ClassVar[str] = "Overview"
    HELP: ClassVar[str] = ""

    def show(self, view: View, feed: Feed) -> None:
        """Draw ``view``."""
