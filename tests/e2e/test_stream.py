"""The stream under loss, with real voters and real listeners: all converge, repair does the work,
the leader none of it."""

from __future__ import annotations

import json
import signal

import anyio

from listeners.sql import query_socket
from tests.e2e.harness import Ledger, LocalCluster, config_of, put, write_for_ever
from voters.driver import open_driver

LOSS_PERCENT = 5
WRITES = 2500
LARGEST = 1 << 20
KEY = "large"
ENVELOPE_BYTES = 64
"""More than a put adds to its value."""


async def test_at_5_percent_loss_gaps_are_closed_by_repair_and_never_by_the_leader(tmp_path):
    ledger = Ledger()
    names = ["one", "two", "three"]
    with LocalCluster(tmp_path) as cluster:
        cluster.start_voters()
        for name in names:
            child = cluster.start_listener(name, drop_percent=LOSS_PERCENT)
            child.wait_for_line("listener.started", 30)
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=60) as driver:
            await put(driver, "first", "yes")
            async with anyio.create_task_group() as group:
                for writer in range(8):
                    group.start_soon(write_for_ever, driver, ledger, f"w{writer}", 200)
                await ledger.more(WRITES, 120)
                group.cancel_scope.cancel()
            value = "x" * (LARGEST - ENVELOPE_BYTES)
            slot = await put(driver, KEY, value)
            leader = (await driver.find_leader()).voter
            statuses = [await driver.status(voter) for voter in cluster.voter_ids]

        for name in names:
            socket = cluster.directory / name / "sql.sock"

            def ask(sql, socket=socket):
                return query_socket(socket, sql, deadline_ms=60_000, at_least_slot=slot).rows

            config = {key: (value, at) for key, value, at in ask("SELECT * FROM config")}
            assert {k: config.get(k) for k in ledger.acknowledged} == ledger.acknowledged, name
            assert config[KEY] == (value, slot), "1 MiB arrives"
            ((low, high, count),) = ask("SELECT min(slot), max(slot), count(*) FROM commits")
            assert (low, high - low + 1) == (1, count), "no gap and no repeat"

        total: dict[str, int] = {}
        for name in names:
            assert cluster.children[name].terminate() == 0
            status = json.loads((cluster.directory / name / "status.json").read_text())
            for counter, number in status["counters"].items():
                total[counter] = total.get(counter, 0) + number
        repaired = total.get("gap_closed_by_repair", 0)
        caught_up = total.get("gap_closed_by_catchup", 0)
        by_voter = {status.voter: status.counters.get("repair.sent", 0) for status in statuses}
        print(f"listeners: {total}; datagrams of repair by voter: {by_voter}, leader {leader}")
        assert repaired + caught_up > 20, "5 % of the stream were lost"
        assert repaired / (repaired + caught_up) >= 0.9
        assert by_voter[leader] == 0, "the leader repairs nothing"
        assert sum(by_voter.values()) > 0


async def test_when_every_voter_is_gone_a_new_listener_still_learns_all_from_another(tmp_path):
    """Ordered to the last voter: nobody is left who could sign anything new, and what listeners
    keep is signed already."""
    with LocalCluster(tmp_path, 3) as cluster:
        cluster.start_voters()
        cluster.start_listener("old").wait_for_line("listener.ready", 30)
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=60) as driver:
            written = {f"k{n}": str(n) for n in range(50)}
            for key, value in written.items():
                slot = await put(driver, key, value)
        old = cluster.directory / "old" / "sql.sock"
        query_socket(old, "SELECT 1", deadline_ms=60_000, at_least_slot=slot)
        for voter in cluster.voter_ids:
            cluster.voter(voter).send(signal.SIGKILL)
            cluster.voter(voter).process.wait()
        cluster.start_listener("new").wait_for_line("listener.ready", 60)
        ask = "SELECT key, value FROM config ORDER BY key"
        new = cluster.directory / "new" / "sql.sock"
        found = query_socket(new, ask, deadline_ms=60_000, at_least_slot=slot).rows
        assert dict(found) == written
        chains = "SELECT slot, chain FROM commits ORDER BY slot"
        there = query_socket(new, chains, deadline_ms=60_000).rows
        assert there == query_socket(old, chains, deadline_ms=60_000).rows
