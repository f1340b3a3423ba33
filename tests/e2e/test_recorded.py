"""A recorded cluster, in part: through a killed leader and a killed listener, to the same tables
on every listener, the one that starts cold at the end too."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import anyio
import pytest

from dashboard.demo import recorded_members
from listeners.sql import query_socket
from tests.e2e.harness import Child, LocalCluster, config_of, put
from trex_core.metadata.commands import ConfigGet, encode_question
from voters.driver import open_driver

TREX = Path(sys.executable).with_name("trex")
ROWS = 6_000
"""Rows of the slice: the first ones, and the last of the file (which remove and update)."""


@pytest.fixture(scope="module")
def trace(google_trace, tmp_path_factory) -> Path:
    """A part of the recorded trace that makes sense by itself: every event of a sixth of the
    machines."""
    path = tmp_path_factory.mktemp("trace") / "slice.csv.gz"
    with gzip.open(google_trace, "rt") as rows, gzip.open(path, "wt") as out:
        out.writelines(row for row in rows if int(row.split(",")[1]) % 6 == 1)
    return path


def row_count(trace: Path) -> int:
    with gzip.open(trace, "rt") as rows:
        return sum(1 for _ in rows)


def digest(rows) -> str:
    """As ``data/README.md`` says: lines of id,platform,cpus,memory by number, sha256."""
    return hashlib.sha256("\n".join(",".join(row) for row in rows).encode()).hexdigest()


MEMBERS = """SELECT id, attributes->>'platform', attributes->>'cpus', attributes->>'memory'
    FROM members ORDER BY CAST(id AS BIGINT)"""
ANYTHING = encode_question(ConfigGet("anything"))


class Asked:
    """A listener's tables, once it stored ``slot``."""

    def __init__(self, cluster: LocalCluster, name: str, slot: int) -> None:
        path = cluster.directory / name / "sql.sock"

        def ask(sql):
            return query_socket(path, sql, deadline_ms=60_000, at_least_slot=slot).rows

        self.members = ask(MEMBERS)
        ((self.rows, self.slots),) = ask(
            "SELECT count(*), count(DISTINCT slot) FROM history WHERE kind = 'member'"
        )
        self.gaps = ask(
            "SELECT slot FROM (SELECT slot, lag(slot) OVER (ORDER BY slot) AS before FROM commits)"
            " WHERE slot <> before + 1"
        )
        ((self.first, self.last),) = ask("SELECT min(slot), max(slot) FROM commits")
        ((self.from_slot,),) = ask("SELECT history_from_slot FROM listener")
        ((self.oldest,),) = ask("SELECT coalesce(min(slot), 0) FROM history")
        self.updated = ask("SELECT key, max(slot) FROM history WHERE kind='member' GROUP BY key")
        self.updated_slots = ask("SELECT id, updated_slot FROM members")


def run_import(cluster: LocalCluster, trace: Path) -> Child:
    return Child(
        "import",
        [TREX, "import", "--format", "google-machine-events", trace],
        cluster.directory / "logs" / "import.log",
        cluster.environment,
    )


async def finished(child: Child) -> None:
    code = await anyio.to_thread.run_sync(child.wait, 240)
    assert code == 0, child.output


async def test_a_slice_through_killed_leader_and_listener(trace, tmp_path):
    wanted = recorded_members(trace)
    rows = row_count(trace)
    assert rows > ROWS
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_voters()
        names = ["one", "two", "three"]
        for name in names:
            cluster.start_listener(name).wait_for_line("listener.started", 30)
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=30) as driver:
            await driver.find_leader()
            importing = run_import(cluster, trace)
            await until_slot(driver, rows // 6)
            leader = (await driver.find_leader()).voter
            cluster.voter(leader).kill()
            cluster.children["two"].kill()
            await until_slot(driver, rows // 3)
            importing.kill()  # resumes where it was
            importing = run_import(cluster, trace)
            cluster.start_voter(leader)
            await until_slot(driver, rows // 2)
            cluster.start_listener("two").wait_for_line("listener.started", 30)
            await finished(importing)
            slot = (await driver.find_leader()).fixed
        cluster.start_listener("cold").wait_for_line("listener.started", 30)
        for name in [*names, "cold"]:
            asked = Asked(cluster, name, slot)
            assert digest(asked.members) == digest(wanted), name
            assert asked.members == wanted
            assert (asked.rows, asked.slots) == (rows, rows), name
            assert asked.gaps == ()
            assert (asked.first, asked.last >= slot) == (1, True)
            newest = dict(asked.updated)
            assert all(newest[member] == slot for member, slot in asked.updated_slots)
        await finished(run_import(cluster, trace))  # again, and there is nothing to do
        assert Asked(cluster, "one", slot).rows == rows


async def until_slot(driver, slot: int) -> None:
    """Until this slot is fixed: asked of the leader over and over, each an answer from a quorum."""
    with anyio.fail_after(120):
        while (await driver.query(ANYTHING)).slot < slot:
            pass


async def test_with_tiny_segments_and_snapshots_all_start_cold_from_a_snapshot(trace, tmp_path):
    wanted = recorded_members(trace)
    rows = row_count(trace)
    tiny = {"segment_bytes": 1 << 17, "retain_bytes": 0, "snapshot_slots": rows // 12}
    with LocalCluster(tmp_path / "cluster", 3, journal=tiny) as cluster:
        cluster.start_voters()
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=60) as driver:
            leader = await driver.find_leader()
            late = next(voter for voter in cluster.voter_ids if voter != leader.voter)
            await put(driver, "ready", "yes")
            cluster.voter(late).kill()
            await finished(run_import(cluster, trace))
            slot = (await driver.find_leader()).fixed
            cut = max(status.snapshot_slot for status in (await alive(driver)).values())
            assert cut >= 10 * (rows // 12)
            cluster.start_voter(late)
            cluster.start_listener("cold").wait_for_line("listener.started", 30)
            asked = Asked(cluster, "cold", slot)
            assert asked.members == wanted
            assert asked.from_slot > 1
            assert asked.oldest >= asked.from_slot
            assert asked.first >= asked.from_slot
            assert asked.gaps == ()
            with anyio.fail_after(60):
                while (await driver.status(late)).applied < slot:
                    pass
            caught_up = await driver.status(late)
            assert caught_up.snapshot_slot >= 10 * (rows // 12)
            kept = sorted((cluster.directory / f"voter-{late}" / "snapshots").glob("*.snapshot"))
            others = cluster.directory / f"voter-{leader.voter}" / "snapshots"
            for snapshot in kept:
                other = others / snapshot.name
                if other.exists():  # equal bytes everywhere
                    assert other.read_bytes() == snapshot.read_bytes()


async def alive(driver):
    statuses = await driver.statuses()
    return {voter: status for voter, status in statuses.items() if hasattr(status, "snapshot_slot")}
