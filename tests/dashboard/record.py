"""Record short, telling runs of real clusters, for the tests and pictures of the dashboard.

    .venv/bin/python -m tests.dashboard.record [NAME ...]     (`just recordings`)

Each starts voters as processes of this machine, harms them as its name says, and leaves
``recordings/NAME.trexrec.gz``.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from dashboard.feed import open_feed
from dashboard.local import Child, LocalCluster
from trex_core.cluster import parse_cluster
from trex_core.messages import Status
from voters.client import Client, OutcomeUnknown, TrexError, connect

HERE = Path(__file__).parent / "recordings"
LEASE_MS = 4_000
START_S = 30.0
WRITES_PER_S = 25


async def line(child: Child, pattern: str) -> None:
    await anyio.to_thread.run_sync(child.wait_for_line, pattern, START_S, abandon_on_cancel=True)


class Stage:
    """A cluster of five voters that is watched and written to."""

    def __init__(self, cluster: LocalCluster, client: Client) -> None:
        self.cluster = cluster
        self.client = client
        self.told = 0

    async def leader(self) -> int:
        return (await self.client.driver.find_leader(START_S)).voter

    async def members(self, *zones: str) -> list[Child]:
        """Start a member in each of ``zones``, and wait until all joined."""
        children = [
            self.cluster.start(
                f"member-{at}",
                *("dashboard.member", "--name", f"member-{at}", "--lease-ms", str(LEASE_MS)),
            )
            for at in range(1, len(zones) + 1)
        ]
        for at, (child, zone) in enumerate(zip(children, zones, strict=True), 1):
            await line(child, '"event": "joined"')
            await self.client.update(f"member-{at}", zone=zone)
        return children

    async def caught_up(self, *voters: int) -> None:
        """Wait until ``voters`` are where the leader is now."""
        with anyio.fail_after(START_S):
            goal = (await self.client.driver.find_leader(START_S)).fixed
            while True:
                found = await self.client.driver.statuses(1.0)
                each = [found[voter] for voter in voters]
                if all(isinstance(one, Status) and one.fixed >= goal for one in each):
                    return
                await anyio.sleep(0.1)

    async def writing(self) -> None:
        """Write, some times a second, whatever happens."""
        count = 0
        while True:
            count += 1
            try:
                await self.client.put(f"app/{count % 40:02}", f"value {count}")
            except OutcomeUnknown as error:
                await self.client.resolve(error)
            except TrexError:
                pass
            await anyio.sleep(1 / WRITES_PER_S)


@asynccontextmanager
async def stage(recording: Path) -> AsyncIterator[Stage]:
    """A cluster that leads, watched and recorded."""
    with (
        tempfile.TemporaryDirectory(prefix="trex-record-") as folder,
        LocalCluster(Path(folder), name="harbour") as cluster,
    ):
        config = parse_cluster(cluster.config_path.read_text())
        cluster.start_voters()
        store = Path(folder) / "dash"
        async with (
            open_feed(
                config, cluster.credentials(), name="dash", directory=store, record=recording
            ) as feed,
            connect(config, cluster.credentials(), deadline_s=START_S) as client,
            anyio.create_task_group() as tasks,
        ):
            made = Stage(cluster, client)

            async def look() -> None:
                while True:
                    feed.take()
                    await anyio.sleep(0.25)

            tasks.start_soon(look)
            await made.leader()
            tasks.start_soon(made.writing)
            yield made
            tasks.cancel_scope.cancel()
        cluster.stop()


async def failover(recording: Path) -> None:
    """Five healthy voters and three members; the leader is killed and started again; a member is
    killed."""
    async with stage(recording) as here:
        first, _, _ = await here.members("amber", "birch", "cedar")
        await anyio.sleep(5)
        killed = await here.leader()
        here.cluster.voter(killed).kill()
        await here.leader()
        await anyio.sleep(5)
        here.cluster.start_voter(killed)
        await here.caught_up(killed)
        await anyio.sleep(2)
        first.kill()
        await anyio.sleep(LEASE_MS / 1000 + 3)


async def quorum(recording: Path) -> None:
    """Two of five voters are killed, the leader among them; then a third: no quorum; then all are
    started again."""
    async with stage(recording) as here:
        await anyio.sleep(4)
        leader = await here.leader()
        others = [voter for voter in here.cluster.voter_ids if voter != leader]
        for voter in (leader, others[0]):
            here.cluster.voter(voter).kill()
        await here.leader()
        await anyio.sleep(5)
        here.cluster.voter(others[1]).kill()
        await anyio.sleep(7)
        here.cluster.start_voters()
        await here.caught_up(*here.cluster.voter_ids)
        await anyio.sleep(3)


async def lagging(recording: Path) -> None:
    """Six listeners: one stands still for a while, one loses 40 % of the stream."""
    async with stage(recording) as here:
        listeners = [
            here.cluster.start_listener(f"cache-{at}", drop_percent=40 if at == 5 else 0)
            for at in range(1, 7)
        ]
        for each in listeners:
            await line(each, "listener.started")
        await anyio.sleep(5)
        listeners[2].pause()
        await anyio.sleep(14)
        listeners[2].resume()
        await anyio.sleep(5)


RUNS: dict[str, Callable[[Path], Awaitable[None]]] = {
    "failover": failover,
    "quorum": quorum,
    "lagging": lagging,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(RUNS), metavar="NAME", help=str([*RUNS]))
    for name in parser.parse_args().names:
        HERE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="trex-record-") as folder:
            plain = Path(folder) / f"{name}.trexrec"
            anyio.run(RUNS[name], plain)
            packed = HERE / f"{name}.trexrec.gz"
            packed.write_bytes(gzip.compress(plain.read_bytes(), 9, mtime=0))
            print(f"{packed.name}: {packed.stat().st_size:,} bytes, {plain.stat().st_size:,} plain")


if __name__ == "__main__":
    main()
