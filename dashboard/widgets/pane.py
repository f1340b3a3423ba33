"""What every tab of the dashboard is: a widget that is shown a view and says what is selected."""

from __future__ import annotations

from typing import ClassVar

import msgspec
from textual.widget import Widget

from dashboard.feed import Feed
from dashboard.view import View


class Subject(msgspec.Struct, frozen=True):
    """What Explain is asked about. ``kind`` is "voter", "ballot", "slot", "listener", "member" or
    "verdict"; ``name`` its id as text; ``instance`` a listener's instance, else 0."""

    kind: str
    name: str
    instance: int = 0


class Pane(Widget):
    """One tab. The application calls :meth:`show` at most some four times a second, and only while
    the tab is visible; and at once when it becomes visible."""

    TITLE: ClassVar[str]
    """On the tab: one or two words."""
    HELP: ClassVar[str]
    """What is to be seen here and how to read it, as Markdown: shown by ``?``."""

    def show(self, view: View, feed: Feed) -> None:
        """Draw ``view``. Cheap when nothing changed: only what changed is refreshed."""
        raise NotImplementedError

    def subject(self) -> Subject | None:
        """What is selected here, for Explain; None: the verdict."""
        return None

    def explain(self, subject: Subject, view: View, feed: Feed) -> str | None:  # noqa: ARG002
        """What this tab itself knows of ``subject``, as Markdown; None: what ``advice`` says."""
        return None
