"""A flood at real processes, by somebody who stands between the voters: each datagram is counted
under its reason, commits go on, and nobody believes or ends anything."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack

import anyio

from listeners.sql import query_socket_async
from tests.adversary.arena import WINDOW_DATAGRAMS, overhear
from tests.adversary.between import between
from tests.adversary.hostile import (
    OUTSIDE,
    REPAIR,
    REPLAYED,
    STREAM,
    Adversary,
    Recording,
    allowed,
    door_of,
)
from tests.e2e.harness import (
    Ledger,
    LocalCluster,
    all_config,
    config_of,
    missing,
    put,
    write_for_ever,
)
from voters.driver import open_driver
from voters.transport import multicast_sender

DATAGRAMS = 3_000
REPAIR_WINDOW_DATAGRAMS = 24
"""The voters' buffer for repair requests is small on purpose."""
WRITERS = 4
SOON_S = 30.0
LOOK_S = 0.02
"""Another process is asked so often, in seconds."""


class Flood:
    """Sends windows at one cluster; each is counted by everybody who hears it before the next."""

    def __init__(self, cluster, driver, recording, sender):
        config = config_of(cluster)
        self.adversary = Adversary(3, config.cluster_id_bytes, recording)
        self.sent = Counter()
        self.reasons = Counter()
        self._driver = driver
        self._status = cluster.directory / "one" / "status.json"
        self._sender = sender
        group = config.stream.group
        self._addresses = {
            STREAM: (group, config.stream.port),
            REPAIR: (group, config.stream.repair_port),
            **{door_of(v.id): (v.host, v.peer_port) for v in config.voters},
        }
        self._hearing = {door_of(v.id): [v.id] for v in config.voters}
        self._hearing |= {STREAM: ["one"], REPAIR: ["one", *config.voter_ids]}

    async def dropped(self, who, door):
        """What that node dropped at that door, by reason."""
        if who == "one":
            counters, prefixes = json.loads(self._status.read_text())["counters"], ["dropped_"]
        else:
            counters = (await self._driver.status(who)).counters
            at_repair = ["repair.dropped.", "report.dropped."]
            prefixes = at_repair if door == REPAIR else ["peer_udp.dropped."]
        return +Counter({r: sum(counters.get(p + r, 0) for p in prefixes) for r in OUTSIDE})

    async def send(self):
        """One window."""
        door = self.adversary.chance.choice(list(self._addresses))
        size = REPAIR_WINDOW_DATAGRAMS if door == REPAIR else WINDOW_DATAGRAMS
        window = self.adversary.window(door, size)
        if window is None or (window.kind == REPLAYED and door in (STREAM, REPAIR)):
            return  # taken again: that it changes nothing is seen in one process
        kind, _, datagrams = window
        before = {who: await self.dropped(who, door) for who in self._hearing[door]}
        for data in datagrams:
            self._sender.sendto(data, self._addresses[door])
        for who, earlier in before.items():
            late_s = time.monotonic() + SOON_S
            while (now := await self.dropped(who, door) - earlier).total() < len(datagrams):
                assert time.monotonic() < late_s, f"{who} of {len(datagrams)} {kind}: {now}"
                await anyio.sleep(LOOK_S)
            assert now.total() == len(datagrams), (kind, who, now)
            assert allowed(kind) >= now.keys(), (kind, who, now)
            self.reasons += now
        self.sent[door] += len(datagrams)


async def test_real_processes_take_nothing_of_a_flood_and_go_on_committing(tmp_path):
    ledger, recording = Ledger(), Recording()
    with LocalCluster(tmp_path, 3) as cluster, ExitStack() as held:
        config = config_of(cluster)
        async with (
            between(cluster, recording),
            open_driver(config, cluster.credentials(), deadline_s=SOON_S) as driver,
        ):
            sender = held.enter_context(multicast_sender(config.stream))
            listener = cluster.start(
                "one",
                *("listeners", "run", "--name", "one", "--dir", cluster.directory / "one"),
                extra={"TREX_LISTENER_STATUS_INTERVAL": "0.05"},
            )
            async with anyio.create_task_group() as writing:
                for writer in range(WRITERS):
                    writing.start_soon(write_for_ever, driver, ledger, f"w{writer}", 300)
                await overhear(config, cluster.credentials("listener"), recording, 3)
                await ledger.more(100, SOON_S)
                listener.wait_for_line("listener.ready", SOON_S)
                pids = {name: child.pid for name, child in cluster.children.items()}
                flood = Flood(cluster, driver, recording, sender)
                written = len(ledger.acknowledged)
                while flood.sent.total() < DATAGRAMS:
                    await flood.send()
                written = len(ledger.acknowledged) - written
                assert written > 0, "commits go on"
                await ledger.more(10, SOON_S)
                writing.cancel_scope.cancel()
            last = await put(driver, "last", "yes")
            fixed = await all_config(driver)
            assert missing(ledger, fixed) == {}
            assert len(fixed) <= len(ledger.acknowledged) + 1 + WRITERS, "some on their way"
            answer = await query_socket_async(
                cluster.directory / "one" / "sql.sock",
                "SELECT key, value, slot FROM config",
                at_least_slot=last,
                deadline_ms=int(SOON_S * 1000),
            )
            assert {key: (value, slot) for key, value, slot in answer.rows} == fixed
            assert {name: child.pid for name, child in cluster.children.items()} == pids
            assert all(child.running for child in cluster.children.values())
    print(f"{written} writes; sent {dict(flood.sent)}; dropped {dict(flood.reasons)}")
