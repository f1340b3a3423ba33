"""Who holds the stream key but is no voter, and who replays what was recorded: nothing comes of it.

Whatever is said here is said by real processes to real processes. How long the attack lasts, in
seconds, is TREX_TEST_ATTACK_S (a longer one is part of ``just soak``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import anyio
import pytest

from listeners.sql import query_socket
from tests.e2e.adversary import FORGED_KEY, group_socket
from tests.e2e.harness import (
    Child,
    Ledger,
    LocalCluster,
    all_config,
    config_of,
    put,
    write_for_ever,
)
from trex_core.cluster import ClusterConfig
from trex_core.credentials import KEYS_FILE, parse_keys
from trex_core.messages import DATAGRAM_BYTES_MAX, Status, StreamRun
from trex_core.seal import StreamOpener
from trex_core.wire import FrameError, decode_stream
from voters.driver import Driver, open_driver

pytestmark = pytest.mark.anyio

ATTACK_S = float(os.environ.get("TREX_TEST_ATTACK_S", "6"))
ATTACK_PER_S = 1500
REPAIR_BYTES_PER_S = 100_000
WRITERS = 4
LOSS_PERCENT = 5
RSS_GROWTH_MAX = 96 << 20
"""Of a listener under attack: what waits for a proof, what the store holds more, and slack."""


def knob(cluster: LocalCluster, name: str, value: int) -> None:
    """Set a knob that stands in the cluster file as its default, in a comment."""
    text = cluster.config_path.read_text()
    changed, count = re.subn(rf"^# {name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
    assert count == 1
    cluster.config_path.write_text(changed)


def rss_bytes(child: Child) -> int:
    """Its resident memory."""
    status = Path(f"/proc/{child.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def sql(cluster: LocalCluster, name: str, text: str, at_least: int) -> list[tuple]:
    """What a listener's store answers once it is at slot ``at_least``."""
    socket = cluster.directory / name / "sql.sock"
    return query_socket(socket, text, deadline_ms=30_000, at_least_slot=at_least).rows


async def statuses(driver: Driver) -> dict[int, Status]:
    """Each voter's, all of them."""
    found = await driver.statuses()
    assert all(isinstance(each, Status) for each in found.values()), found
    return found


def reigns(found: dict[int, Status]) -> set[tuple]:
    """Who leads under which ballot, and what was promised, as each voter sees it."""
    return {(each.leader, each.ballot, each.promised) for each in found.values()}


async def until_agreed(driver: Driver) -> dict[int, Status]:
    """The statuses, once all voters have fixed the same slots."""
    with anyio.fail_after(30):
        while True:
            found = await statuses(driver)
            if len({(each.fixed, each.applied, each.chain) for each in found.values()}) == 1:
                return found


def check_same(cluster: LocalCluster, names: list[str], found: dict, at: Status) -> None:
    """Each listener shows exactly ``found`` and the log of voter ``at``, chain for chain."""
    chains = set()
    for name in names:
        rows = sql(cluster, name, "SELECT * FROM config", at.fixed)
        assert {key: (value, slot) for key, value, slot in rows} == found, name
        every = sql(
            cluster,
            name,
            f"SELECT slot, chain FROM commits WHERE slot <= {at.fixed} ORDER BY slot",
            at.fixed,
        )
        assert [slot for slot, _ in every] == list(range(1, at.fixed + 1)), "no gap, no repeat"
        chains.add(tuple(bytes(chain) for _, chain in every))
    assert len(chains) == 1, "the same log everywhere"
    assert chains.pop()[-1] == at.chain


class Meter:
    """Repairs on the wire, by the port they came from."""

    def __init__(self, config: ClusterConfig, folder: Path) -> None:
        ring = parse_keys((folder / KEYS_FILE).read_text()).stream
        assert ring is not None
        self._opener = StreamOpener(config.cluster_id_bytes, ring)
        self._ear = group_socket(config, config.stream.port)
        self.repair_bytes: Counter[int] = Counter()

    def hear(self) -> None:
        for _ in range(256):
            try:
                data, (_, port) = self._ear.recvfrom(DATAGRAM_BYTES_MAX + 1)
                message = decode_stream(self._opener.open(data).body)
            except BlockingIOError:
                return
            except FrameError:
                continue
            if isinstance(message, StreamRun) and message.repair:
                self.repair_bytes[port] += len(data)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Meter]:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._ear, self.hear)
        try:
            yield self
        finally:
            loop.remove_reader(self._ear)
            self._ear.close()


async def line_of(child: Child, pattern: str) -> re.Match[str]:
    return await anyio.to_thread.run_sync(child.wait_for_line, pattern, 40)


async def test_who_stole_the_stream_key_has_nothing_applied_and_nobody_unseated(tmp_path):
    names = ["one", "two", "lossy"]
    with LocalCluster(tmp_path, 3) as cluster:
        knob(cluster, "repair_bytes_per_s_max", REPAIR_BYTES_PER_S)
        cluster.start_voters()
        for name in names:
            cluster.start_listener(name, drop_percent=LOSS_PERCENT * (name == "lossy"))
        for name in names:
            cluster.children[name].wait_for_line("listener.started", 30)
        config, stolen = config_of(cluster), cluster.credentials("listener")
        ledger = Ledger()
        async with open_driver(config, cluster.credentials(), deadline_s=60) as driver:
            await put(driver, "first", "yes")
            async with anyio.create_task_group() as group, Meter(config, stolen).running() as meter:
                for writer in range(WRITERS):
                    group.start_soon(write_for_ever, driver, ledger, f"w{writer}", 300)
                await ledger.more(150)  # so that there is something to ask for
                quiet = await paced(ledger, ATTACK_S / 3)
                before = await statuses(driver)
                rss = {name: rss_bytes(cluster.children[name]) for name in names}

                adversary = cluster.start(
                    "adversary", "tests.e2e.adversary",
                    cluster.config_path, stolen, str(ATTACK_PER_S), "7",
                )  # fmt: skip
                port = int((await line_of(adversary, r"adversary\.begun (\d+)"))[1])
                meter.repair_bytes.clear()
                began_s = time.monotonic()
                noisy = await paced(ledger, ATTACK_S)
                attack_s = time.monotonic() - began_s
                repaired = dict(meter.repair_bytes)
                during = await statuses(driver)
                grown = {name: rss_bytes(cluster.children[name]) - rss[name] for name in names}
                assert adversary.running
                assert await anyio.to_thread.run_sync(adversary.terminate) == 0
                ended = await line_of(adversary, r"adversary\.ended (\S+) (.*)")
                group.cancel_scope.cancel()

            # At once all is well again.
            slot = await put(driver, "after", "yes")
            with anyio.fail_after(5):
                for name in names:
                    await anyio.to_thread.run_sync(
                        sql, cluster, name, "SELECT stored FROM listener", slot
                    )
            after = await until_agreed(driver)
            found = await all_config(driver)
        said = json.loads(ended[2])
        repaired.pop(port, None)
        dropped = {
            voter: {
                counter: number - before[voter].counters.get(counter, 0)
                for counter, number in sorted(after[voter].counters.items())
                if "drop" in counter or counter.startswith(("repair.", "report."))
            }
            for voter in after
        }
        print(f"said in {ended[1]} s: {said}")
        print(f"writes: quiet {quiet}, under attack {noisy}")
        print(f"repairs, bytes/s: {[int(each / attack_s) for each in repaired.values()]}")
        print(f"listeners grew by MiB: { {name: grown[name] >> 20 for name in names} }")
        print(f"voters counted: {dropped}")

        assert min(said.values()) > 10 * ATTACK_S, "it was attacked"
        expected = {**ledger.acknowledged}
        assert {key: found.get(key) for key in expected} == expected
        extra = {key for key in found if key not in expected}
        assert not [key for key in extra if key.startswith(FORGED_KEY)]
        await anyio.to_thread.run_sync(check_same, cluster, names, found, after[1])
        ballots = {each for name in names for each in sql(
            cluster, name, "SELECT ballot, voter FROM ballots", slot)}  # fmt: skip
        assert len(ballots) == 1, "as many as there was leaders"
        assert reigns(before) == reigns(during) == reigns(after), "no election was disturbed"
        for voter in after:
            assert not dropped[voter].get("peer_udp.dropped.replay"), "no window was moved"
            refused = sum(dropped[voter][f"peer_udp.dropped.{why}"] for why in ("tag", "channel"))
            assert refused > said["peer"] / 5, "each third of them is for this voter"
            assert dropped[voter]["repair.dropped.body"] > said["part_of_nothing"] / 4
        leader = after[1].leader
        assert sorted(repaired) and len(repaired) == 2, "of the two that do not lead"
        assert dropped[leader]["repair.left_to_others"] > said["request"] / 5
        assert all(
            each <= REPAIR_BYTES_PER_S * (attack_s + 0.1) + 2 * DATAGRAM_BYTES_MAX
            for each in repaired.values()
        ), "within the cap"
        assert max(repaired.values()) > REPAIR_BYTES_PER_S * attack_s / 2, "the cap was reached"
        assert noisy["per_s"] > quiet["per_s"] / 10, "commits go on"
        assert max(grown.values()) < RSS_GROWTH_MAX, grown
        for name in names:
            assert cluster.children[name].terminate() == 0
            counted = json.loads((cluster.directory / name / "status.json").read_text())["counters"]
            print(f"{name}: {counted}")
            forged = counted["dropped_signature"] + counted["dropped_signature_flood"]
            assert forged > said["tip_forged"] / 2, name
            assert counted["dropped_replay"] > said["tip_replayed"] / 2, name


async def paced(ledger: Ledger, seconds: float) -> dict[str, float]:
    """What the writers reached in the next ``seconds``: commits a second, the median time between
    two, and the longest."""
    start = len(ledger.times)
    began_s = time.monotonic()
    while time.monotonic() < began_s + seconds:
        await ledger.more(10)
    times = ledger.times[start:]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {
        "per_s": round(len(times) / (time.monotonic() - began_s)),
        "median_ms": round(median(gaps) * 1000, 1),
        "longest_ms": round(max(gaps) * 1000),
    }
