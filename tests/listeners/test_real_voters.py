"""The listener behind real voters: loss, a killed leader, a paused and a killed listener."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import anyio
import pytest

from dashboard.local import LocalCluster
from listeners import Lagged, Listener, Reset, SlotChanges, open_listener
from listeners.credentials import Credentials
from listeners.source import Source, drop_share
from listeners.sql import query_socket_async
from tests.e2e.harness import Ledger, config_of, missing, write_for_ever
from trex_core.messages import ListenerReport, RepairRequest, StreamTip
from trex_core.state import FixedRun
from voters.driver import Driver

pytestmark = pytest.mark.e2e
DEADLINE_S = 60


async def sniff(source: Source, requests: list[tuple[int, int]]) -> None:
    """Note each repair request as (responder asked, leader at that time)."""
    leader = 0
    while True:
        await source.wait(None)
        while (heard := source.take()) is not None:
            sender, message = heard
            if isinstance(message, StreamTip) and message.leading:
                leader = sender
            elif isinstance(message, RepairRequest):
                requests.append((message.responder, leader))


def leader_of(listener: Listener) -> int:
    return next(heard.voter for heard in listener._learned.heard if heard.leading)


async def disturbed(
    cluster: LocalCluster, ledger: Ledger, lossy: Listener, requests: list[tuple[int, int]]
) -> None:
    """A leader is killed and comes back, a listener is paused, killed and comes back, while
    writes go on."""
    process = cluster.start_listener("process")
    process.wait_for_line("listener.ready", DEADLINE_S)
    await ledger.more(300, DEADLINE_S)
    # Just after a change a listener may not know who leads now; before it, it must.
    assert not [pair for pair in requests if pair[0] == pair[1]], "never by the leader"
    leader = leader_of(lossy)
    cluster.voter(leader).kill()
    await ledger.more(100, DEADLINE_S)
    process.pause()
    await ledger.more(300, DEADLINE_S)
    cluster.start_voter(leader)
    process.resume()
    await ledger.more(100, DEADLINE_S)
    process.kill()
    process.wait(DEADLINE_S)
    await ledger.more(100, DEADLINE_S)
    process = cluster.start_listener("process")
    process.wait_for_line("listener.ready", DEADLINE_S)
    await ledger.more(100, DEADLINE_S)


@asynccontextmanager
async def meanwhile(*work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Do ``work`` beside the block, and no longer."""
    async with anyio.create_task_group() as tasks:
        for one in work:
            tasks.start_soon(one)
        yield
        tasks.cancel_scope.cancel()


async def test_all_converge_without_gap_or_repeat_whatever_happens(tmp_path: Path):
    requests: list[tuple[int, int]] = []
    seen: list = []
    ledger = Ledger()
    contiguous = "SELECT count(*) = max(slot) AND min(slot) = 1 FROM commits"
    with LocalCluster(tmp_path / "c", voters=3) as cluster:
        config = config_of(cluster)
        cluster.start_voters()
        source = Source(
            config, Credentials(cluster.credentials("listener"), config.cluster_id_bytes), Counter()
        )
        driver = Driver(config, cluster.credentials(), 30)
        async with (
            open_listener(
                config,
                cluster.credentials("listener"),
                name="lossy",
                directory=tmp_path / "l",
                keep=drop_share(0.05, "l"),
            ) as lossy,
            open_listener(
                config, cluster.credentials("listener"), name="worse", keep=drop_share(0.3, "w")
            ) as worse,
            driver.opened(),
            meanwhile(partial(sniff, source, requests)),
        ):
            following = lossy.changes(since=0, progress=True)
            writing = [partial(write_for_ever, driver, ledger, f"w{n}") for n in range(8)]
            async with meanwhile(*writing):
                await disturbed(cluster, ledger, lossy, requests)
            slot = ledger.slot
            await lossy.wait_stored(slot, DEADLINE_S)
            await worse.wait_applied(slot, DEADLINE_S)
            with anyio.fail_after(DEADLINE_S):
                async for delivery in following:
                    seen.append(delivery)
                    if following.slot >= slot:
                        break
            for listener in (lossy, worse):
                held = listener.state.config
                rows = {key: (entry.value, entry.slot) for key, entry in held.items()}
                assert missing(ledger, rows) == {}
            assert (await lossy.sql(contiguous, at_least=slot)).rows == ((True,),)
            answer = await query_socket_async(
                cluster.directory / "process" / "sql.sock",
                contiguous,
                at_least_slot=slot,
                deadline_ms=DEADLINE_S * 1000,
            )
            assert answer.rows == ((True,),)
            print(dict(lossy.counters), dict(worse.counters))
        source.close()
    changes = [delivery for delivery in seen if isinstance(delivery, SlotChanges)]
    assert not [d for d in seen if isinstance(d, Lagged | Reset)]
    slots = [delivery.slot for delivery in changes]
    assert slots == sorted(set(slots)), "ordered, unique"
    assert set(ledger.acknowledged) <= {c.key for d in changes for c in d.changes}, "reliable"
    assert requests, "something was repaired by multicast"


async def test_a_cold_listener_starts_from_a_snapshot_of_real_voters(tmp_path: Path):
    ledger = Ledger()
    journal = {"snapshot_slots": 100, "segment_bytes": 1 << 16, "retain_bytes": 0}
    with LocalCluster(tmp_path / "c", voters=3, journal=journal) as cluster:
        config = config_of(cluster)
        cluster.start_voters()
        driver = Driver(config, cluster.credentials(), 30)
        async with driver.opened():
            writing = [partial(write_for_ever, driver, ledger, f"w{n}", size=500) for n in range(8)]
            async with meanwhile(*writing):
                await ledger.more(1200, DEADLINE_S)
                async with open_listener(
                    config, cluster.credentials("listener"), name="cold", directory=tmp_path / "l"
                ) as cold:
                    await ledger.more(100, DEADLINE_S)
                    await cold.wait_stored(ledger.slot, DEADLINE_S)
                    assert cold.counters["resets"] == 1
            slot = ledger.slot
            async with open_listener(
                config, cluster.credentials("listener"), name="cold", directory=tmp_path / "l"
            ) as cold:
                await cold.wait_stored(slot, DEADLINE_S)
                rows = {k: (entry.value, entry.slot) for k, entry in cold.state.config.items()}
                assert missing(ledger, rows) == {}
                answer = await cold.sql(
                    "SELECT history_from_slot, (SELECT min(slot) FROM commits),"
                    " (SELECT count(*) = max(slot) - min(slot) + 1 FROM commits),"
                    " (SELECT min(slot) >= history_from_slot FROM history) FROM listener",
                    at_least=slot,
                )
                ((from_slot, first_commit, contiguous, honest),) = answer.rows
                assert from_slot > 100 and from_slot % 100 == 1
                assert (first_commit, contiguous, honest) == (from_slot, True, True)


class Ears:
    """An observer that keeps the newest of what it hears."""

    def __init__(self) -> None:
        self.told: dict[str, ListenerReport] = {}
        """By name, from the voters' digests."""
        self.reports: dict[str, ListenerReport] = {}
        self.voters: set[int] = set()
        self.stirred = anyio.Event()

    def heard(self, voter: int, message: StreamTip) -> None:
        """A voter's heartbeat."""
        self.voters.add(voter)
        for row in message.digest.listeners.rows:
            self.told[row.report.name] = row.report
        self.stirred.set()

    def reported(self, report: ListenerReport) -> None:
        """Another listener's report."""
        self.reports[report.name] = report
        self.stirred.set()

    def delivered(self, run: FixedRun) -> None:
        """Nothing of interest here."""

    def jumped(self, from_slot: int, to_slot: int) -> None:
        """Nothing of interest here."""

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what was heard is so."""
        with anyio.fail_after(DEADLINE_S):
            while not condition():
                self.stirred = anyio.Event()
                await self.stirred.wait()


async def test_real_voters_tell_of_listeners_and_a_capture_is_their_snapshot(tmp_path: Path):
    ledger, ears = Ledger(), Ears()
    with LocalCluster(tmp_path / "c", voters=3) as cluster:
        config = config_of(cluster)
        cluster.start_voters()
        driver = Driver(config, cluster.credentials(), 30)
        async with (
            driver.opened(),
            open_listener(
                config, cluster.credentials("listener"), name="ears", observer=ears
            ) as listener,
        ):
            async with meanwhile(partial(write_for_ever, driver, ledger, "w")):
                await ledger.more(200, DEADLINE_S)
            process = cluster.start_listener("process")
            process.wait_for_line("listener.ready", DEADLINE_S)
            done = await driver.snapshot_now(1, DEADLINE_S)
            await listener.wait_applied(done, DEADLINE_S)
            assert listener.applied == done, "nobody writes now"
            (kept,) = (cluster.directory / "voter-1" / "snapshots").glob(f"*{done}.snapshot")
            assert listener.capture() == kept.read_bytes()

            def says_all() -> bool:
                told = ears.told.get("process")
                return told is not None and told.stored == done

            await ears.until(says_all)
            assert ears.told["process"].version == version("trex-paxos")
            await ears.until(lambda: "ears" in ears.told and ears.voters == {1, 2, 3})
            await ears.until(lambda: "process" in ears.reports)
            assert "ears" not in ears.reports, "it does not hear itself but in the voters' words"
            process.terminate(DEADLINE_S)
            await ears.until(lambda: ears.reports["process"].leaving)
