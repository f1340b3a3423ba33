"""The cluster under trial: real processes, on hosts of their own and by clocks of their own if so
wished. This module alone knows which process is where."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import dashboard.authority
from dashboard.local import Child, LocalCluster
from tests.linear.clock import WallClock
from tests.linear.hosts import CLIENT, Hosts

ROOT = Path(__file__).parent.parent.parent
JOURNAL = {"segment_bytes": 1 << 20}
"""Each start fills two segments of a voter's journal: no trial needs large ones."""

CUT_JOURNAL = {
    "segment_bytes": 1 << 16,
    "retain_bytes": 0,
    "snapshot_slots": 40,
    "snapshots_kept": 3,
}
CUT_VALUE_CHARS = 1000
"""With values of this length some hundred slots fill a segment."""


class Machines(LocalCluster):
    """A :class:`LocalCluster`; with ``apart``, in a network of namespaces, the calling thread being
    on the client's host for the block; with ``clocks``, every process has a wall clock to set; with
    ``cut``, logs are cut as soon as may be, so that who was away for some hundred slots finds a
    snapshot instead; ``planted`` is a defect of every voter, of ``planted_voter``."""

    def __init__(
        self,
        directory: Path,
        voters: int = 5,
        *,
        listeners: tuple[str, ...] = ("one", "two"),
        apart: bool = False,
        clocks: bool = False,
        cut: bool = False,
        planted: str = "",
        timing: Mapping[str, int] | None = None,
    ) -> None:
        self.listeners = listeners
        self.cut = cut
        self.value_chars = CUT_VALUE_CHARS if cut else 0
        self.boots: dict[str, int] = {}
        self.net: Hosts | None = None
        self.clock: WallClock | None = None
        self._clocks = clocks
        self._planted = planted
        addresses: list[str] = []
        if apart:
            names = [f"voter-{voter + 1}" for voter in range(voters)]
            self.net = Hosts([*names, *listeners])
            addresses = [self.net.address[name] for name in names]
        journal = CUT_JOURNAL if cut else JOURNAL
        super().__init__(directory, voters, timing=timing, journal=journal, hosts=addresses)
        self._held = ExitStack()

    def __enter__(self) -> Self:
        try:
            if self.net is not None:
                self._held.enter_context(self.net)
                self._held.enter_context(self.net.inside(CLIENT))
            slack = dashboard.authority.CLOCK_SLACK
            if self._clocks:  # certificates are the one thing a wall clock decides: out of the way
                dashboard.authority.CLOCK_SLACK = 3 * dashboard.authority.DAY  # type: ignore[misc]
            try:
                super().__enter__()
            finally:
                dashboard.authority.CLOCK_SLACK = slack  # type: ignore[misc]
            if self._clocks:
                self.clock = WallClock(self.directory)
        except BaseException:
            self.close()
            self._held.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._held.close()

    def start(
        self, name: str, *arguments: str | Path, extra: Mapping[str, str] | None = None
    ) -> Child:
        """As ``LocalCluster``, on its host and by its clock."""
        self.boots[name] = self.boots.get(name, 0) + 1
        more = dict(extra or {})
        if self.clock is not None:
            more |= self.clock.environment(name)
        if self._planted and arguments[0] == "voters":
            arguments = ("tests.linear.planted_voter", self._planted, *arguments[1:])
            more["PYTHONPATH"] = str(ROOT)
        with ExitStack() as stack:
            if self.net is not None:
                stack.enter_context(self.net.inside(name))
            return super().start(name, *arguments, extra=more)

    def start_listeners(self, drop_percent: int = 2) -> None:
        """Start the listener processes and wait until they follow."""
        for name in self.listeners:
            if name not in self.children or not self.children[name].running:
                self.start_listener(name, drop_percent=drop_percent)
        for name in self.listeners:
            self.children[name].wait_for_line("listener.started", 30)

    def where(self, voter: int) -> str:
        """A voter by its name and boot: what it said is compared with what the same one says."""
        name = f"voter-{voter}"
        return f"{name}/{self.boots.get(name, 0)}"
