"""Where the dashboard's truth comes from: the live stream, or a recording of it.

This module alone turns what a listener hears into the events of ``view``, and writes and replays
recordings.  A replay is a real listener whose source is a file: its state, its ring and its SQL are
as they were.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from dashboard.view import Event
from listeners.listener import Listener
from trex_core.cluster import ClusterConfig
from voters.client import Client


class Feed(Protocol):
    """What the application draws from. All calls on one event loop."""

    cluster: ClusterConfig
    source: str
    """"live", or the name of the recording."""
    listener: Listener
    """State, ring and SQL."""

    def take(self) -> tuple[Event, ...]:
        """The events since the last call, in order, a ``Clock`` last. Never blocks, never raises."""
        ...

    # A replay only (live: ``speed`` is 1 and setting it does nothing):
    speed: float
    """Times real time; 0 is paused."""

    @property
    def progress(self) -> tuple[int, int] | None:
        """(milliseconds played, milliseconds in the recording); None when live."""
        ...


def open_feed(
    cluster: ClusterConfig, *, name: str, directory: Path, record: Path | None = None
) -> AbstractAsyncContextManager[Feed]:
    """Follow ``cluster`` live as listener ``name``; its store is in ``directory``. With ``record``,
    everything heard is written there too."""
    raise NotImplementedError


def open_replay(
    recording: Path, *, directory: Path, speed: float = 1.0, at_ms: int = 0
) -> AbstractAsyncContextManager[Feed]:
    """Play a recording: up to ``at_ms`` at once, then at ``speed``."""
    raise NotImplementedError
