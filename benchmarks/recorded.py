"""The recorded cluster, whole: every machine event of one real cluster through a real cluster.

Five voters and three listeners, each a process; all 37,780 rows imported while the leader is killed
(and started again) and a listener is killed (and started again); one more listener starts cold at
the end, and in the second part, with tiny segments and snapshots, a voter too.  Then every listener
is asked by SQL, and what it says is compared with what the trace says.

    .venv/bin/python benchmarks/recorded.py [FILE]     (default: $TREX_DATA_DIR, ../shared/data)

Prints a line per fact; exit code 1 if any of them is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import anyio

from dashboard.importer import examine, import_file
from dashboard.local import LocalCluster
from listeners.sql import query_socket
from trex_core.cluster import ClusterConfig, parse_cluster
from voters.driver import open_driver

ROWS = 37_780
ALIVE = 12_486
END_STATE = "98a485ac9e372585814ec2989e850718ab2e36279c5c2ec345d89e3a54a81ea1"
CATCH_UP_S = 180
TINY = {"segment_bytes": 1 << 18, "snapshot_slots": 2000, "retain_bytes": 0, "snapshots_kept": 2}

wrong = 0


def fact(what: str, got: object, wanted: object) -> None:
    """Print one fact and remember whether it is as it must be."""
    global wrong  # noqa: PLW0603  a script's tally
    good = got == wanted
    wrong += not good
    print(f"{'ok   ' if good else 'WRONG'} {what}: {got}" + ("" if good else f" (not {wanted})"))


def sql(cluster: LocalCluster, name: str, text: str, at_least: int = 0) -> list[tuple[object, ...]]:
    """Ask a listener's SQL socket."""
    socket = cluster.directory / name / "sql.sock"
    found = query_socket(
        socket, text, deadline_ms=CATCH_UP_S * 1000, at_least_slot=at_least or None
    )
    return [tuple(row) for row in found.rows]


def check(cluster: LocalCluster, name: str, slot: int, *, history_from: int | None = None) -> None:
    """All that must be true of a listener that has stored ``slot``."""
    rows = sql(
        cluster,
        name,
        "SELECT id, attributes->>'platform', attributes->>'cpus', attributes->>'memory' "
        "FROM members ORDER BY CAST(id AS UBIGINT)",
        slot,
    )
    text = "\n".join(",".join(map(str, row)) for row in rows)
    fact(f"{name}: members", len(rows), ALIVE)
    fact(f"{name}: end state sha256", hashlib.sha256(text.encode()).hexdigest(), END_STATE)
    ((first,),) = sql(cluster, name, "SELECT history_from_slot FROM listener")
    ((low, high, count),) = sql(cluster, name, "SELECT min(slot), max(slot), count(*) FROM commits")
    if history_from is None:
        fact(f"{name}: history reaches back to slot", first, 1)
        ((imported,),) = sql(cluster, name, "SELECT count(*) FROM history WHERE kind = 'member'")
        fact(f"{name}: history rows of the import", imported, ROWS)
    else:
        print(f"      {name}: history_from_slot {first}")
        fact(f"{name}: came from a snapshot", int(str(first)) > history_from, True)
        ((below,),) = sql(cluster, name, f"SELECT count(*) FROM history WHERE slot < {first}")
        fact(f"{name}: history claims below it", below, 0)
    fact(f"{name}: commits begin at", low, first)
    fact(
        f"{name}: no gap in commits",
        int(str(high)) - int(str(low)) + 1,
        count,
    )


async def import_all(
    cluster: LocalCluster, config: ClusterConfig, source: Path, *, disturb: bool
) -> None:
    """Import the whole file; kill and restart the leader and a listener on the way."""
    done = 0
    halfway, two_thirds = anyio.Event(), anyio.Event()

    def told(row: int, _rows: int) -> None:
        nonlocal done
        done = row
        if row > ROWS // 3:
            halfway.set()
        if row > 2 * ROWS // 3:
            two_thirds.set()

    async def nemesis() -> None:
        await halfway.wait()
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            leader = (await driver.find_leader()).voter
        cluster.voter(leader).kill()
        cluster.children["listener-1"].kill()
        print(f"      row {done}: leader {leader} and listener-1 killed (SIGKILL)")
        await two_thirds.wait()
        cluster.start_voter(leader)
        cluster.start_listener("listener-1")
        print(f"      row {done}: both started again")

    began = time.monotonic()
    async with anyio.create_task_group() as group:
        if disturb:
            group.start_soon(nemesis)
        await import_file(
            config,
            cluster.credentials(),
            examine(source),
            in_flight_max=256,
            deadline_s=30,
            told=told,
        )
        took = time.monotonic() - began
    print(f"      {ROWS} rows in {took:.1f} s: {ROWS / took:.0f} rows/s")
    fact("at least 500 rows/s", ROWS / took >= 500, True)


async def newest_slot(cluster: LocalCluster, config: ClusterConfig) -> int:
    """The slot that is applied at the leader now."""
    async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
        return (await driver.find_leader()).applied


def started(directory: Path, journal: dict[str, int]) -> LocalCluster:
    """A running cluster of five voters and three listeners."""
    cluster = LocalCluster(directory, journal=journal)
    cluster.__enter__()
    cluster.start_voters()
    for number in range(3):
        cluster.start_listener(f"listener-{number}")
    return cluster


async def whole(source: Path, directory: Path) -> None:
    """Part one: default sizes."""
    print("== the whole trace, leader and listener killed, one listener cold at the end")
    cluster = started(directory, {})
    try:
        config = parse_cluster(cluster.config_path.read_text())
        await import_all(cluster, config, source, disturb=True)
        cluster.start_listener("cold").wait_for_line("listener.ready", CATCH_UP_S)
        slot = await newest_slot(cluster, config)
        for name in ("listener-0", "listener-1", "listener-2", "cold"):
            await anyio.to_thread.run_sync(check, cluster, name, slot)
    finally:
        cluster.close()


async def tiny(source: Path, directory: Path) -> None:
    """Part two: tiny segments and snapshot interval; a voter and a listener from a snapshot."""
    print("== again with tiny segments and a snapshot every 2,000 slots")
    cluster = started(directory, TINY)
    try:
        config = parse_cluster(cluster.config_path.read_text())
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            leader = (await driver.find_leader()).voter
        away = next(v for v in cluster.voter_ids if v != leader)
        cluster.voter(away).kill()
        await import_all(cluster, config, source, disturb=False)
        snapshots = sum(
            cluster.voter(v).output.count("voter.snapshot.written")
            for v in cluster.voter_ids
            if v != away
        )
        fact("at least 10 snapshots a voter", snapshots >= 10 * (len(cluster.voter_ids) - 1), True)
        child = cluster.start_voter(away)
        child.wait_for_line("voter.snapshot.installed", CATCH_UP_S)
        slot = await newest_slot(cluster, config)
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            with anyio.fail_after(CATCH_UP_S):
                while (await driver.status(away)).applied < slot:
                    await anyio.sleep(0.1)
            print(f"      voter {away} caught up to slot {slot} from a snapshot")
        cluster.start_listener("cold").wait_for_line("listener.ready", CATCH_UP_S)
        slot = await newest_slot(cluster, config)
        for name in ("listener-0", "listener-1", "listener-2"):
            await anyio.to_thread.run_sync(check, cluster, name, slot)
        await anyio.to_thread.run_sync(lambda: check(cluster, "cold", slot, history_from=1))
    finally:
        cluster.close()


def main() -> int:
    """Run both parts; 1 if a fact is wrong."""
    data = Path(os.environ.get("TREX_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__)
    default = data / "google2011_machine_events.csv.gz"
    parser.add_argument("file", type=Path, nargs="?", default=default)
    parser.add_argument("--part", choices=("whole", "tiny", "both"), default="both")
    options = parser.parse_args()
    for name, part in (("whole", whole), ("tiny", tiny)):
        if options.part in (name, "both"):
            directory = Path(tempfile.mkdtemp(prefix=f"trex-recorded-{name}-"))
            anyio.run(part, options.file, directory)
            if not wrong:
                shutil.rmtree(directory)
            else:
                print(f"kept: {directory}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
