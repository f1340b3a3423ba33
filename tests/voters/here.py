"""Voters that live in the test's own event loop: real sockets, journals and archive processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from dashboard.cluster_init import cluster_file
from dashboard.ports import PortBlock
from tests.credentials import folder
from trex_core.access import voter_name
from trex_core.cluster import ClusterConfig, parse_cluster
from trex_core.machine import Machine
from trex_core.metadata.state import MetadataMachine
from trex_core.state import Leader
from voters.server import Voter, format_voter, open_voter

TIMING = {"tick_ms": 10}
SOON_S = 20.0
"""How long a test waits for what must happen."""


@contextmanager
def some_cluster(
    voters: int = 3,
    timing: Mapping[str, int] | None = None,
    journal: Mapping[str, int] | None = None,
) -> Iterator[ClusterConfig]:
    """A cluster file with free ports, which are held while the block lasts."""
    block = PortBlock()
    try:
        text = cluster_file(
            "test",
            ["127.0.0.1"] * voters,
            block.ports,
            timing={**TIMING, **(timing or {})},
            journal=journal or {},
        )
        yield parse_cluster(text)
    finally:
        block.close()


class Here:
    """``cluster``'s voters in this event loop, each with its own machine."""

    def __init__(
        self,
        cluster: ClusterConfig,
        directory: Path,
        machine: Callable[[], Machine] = MetadataMachine,
    ) -> None:
        self.cluster = cluster
        self.directory = directory
        self.running: dict[int, Voter] = {}
        self._machine = machine
        self._tasks: dict[int, tuple[asyncio.Task[None], asyncio.Event]] = {}

    async def __aenter__(self) -> Self:
        for voter in self.cluster.voter_ids:
            format_voter(self.cluster, voter, self.path(voter))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task, _ in self._tasks.values():
            task.cancel()  # no handover: nobody is left to lead
        await asyncio.gather(*(task for task, _ in self._tasks.values()), return_exceptions=True)

    def path(self, voter: int) -> Path:
        return self.directory / f"voter-{voter}"

    async def start(self, *voters: int) -> None:
        """Start these voters, or all that do not run. Raises what ``open_voter`` raises."""
        for voter in voters or [v for v in self.cluster.voter_ids if v not in self.running]:
            started: asyncio.Future[Voter] = asyncio.get_running_loop().create_future()
            over = asyncio.Event()
            task = asyncio.create_task(self._hold(voter, started, over))
            await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
            if not started.done():
                await task
            self.running[voter] = started.result()
            self._tasks[voter] = (task, over)

    async def _hold(self, voter: int, started: asyncio.Future[Voter], over: asyncio.Event) -> None:
        opened = open_voter(
            self.cluster,
            voter,
            self.path(voter),
            self._machine(),
            credentials=folder(self.cluster, voter_name(voter)),
        )
        async with opened as running:
            started.set_result(running)
            await over.wait()

    async def stop(self, voter: int) -> None:
        """End a voter in order. Raises what ended it if it had ended by itself."""
        del self.running[voter]
        task, over = self._tasks.pop(voter)
        over.set()
        await task

    def leading(self) -> Voter | None:
        """The leader that all running voters follow, if they agree."""
        leaders = [v for v in self.running.values() if isinstance(v.state.role, Leader)]
        if len(leaders) != 1:
            return None
        ballot = leaders[0].state.leader
        return leaders[0] if all(v.state.leader == ballot for v in self.running.values()) else None

    async def leader(self) -> Voter:
        """Wait until all running voters follow one leader, and slot 1 is fixed."""
        await self.until(lambda: (led := self.leading()) is not None and led.state.fixed > 0)
        found = self.leading()
        assert found is not None
        return found

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds after a turn of each running voter."""
        while not holds():
            for voter in list(self.running.values()):
                tick = voter.state.tick
                await voter.until(lambda v=voter, t=tick: holds() or v.state.tick > t, SOON_S)
