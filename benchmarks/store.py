"""How long a batch takes in the listener's store, against the bare engine.

    .venv/bin/python -m benchmarks.store [--directory DIR] [--members N] [--batches N]

A ring of N members is loaded, then batches of 1, 100 and 1,000 slots are stored: ``join`` (a row
of members, about 30 ranges of the ring, history, commits, the session), ``update`` (as the
recorded trace: a member's row, no range) and ``config``.  The floor, measured alternately in the
same run on the same disk, is one transaction that inserts as many integers into one table of a
bare DuckDB file.  Prints JSON lines: milliseconds of wall time (medians), milliseconds of CPU,
slots per second of CPU, and the ratio to the floor; then what a restart and a query cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb

from listeners.sql import run_select
from listeners.store import AppliedSlot, Store
from tests.listeners.feed import CLUSTER_ID, Feed
from trex_core.metadata.commands import Command, ConfigPut, MemberJoin, MemberUpdate

ATTRIBUTES = {"platform": "HofLGzk1Or/8Ildj2+Lqv0UGGvY82NLoni8+J/Yy0RU=", "cpus": "0.5"}
CHANGED = ATTRIBUTES | {"cpus": "0.25"}


class Load:
    """Commands against a growing ring."""

    def __init__(self) -> None:
        self.feed = Feed(7)
        self.members = 0

    def join(self) -> Command:
        """A new member, with the attributes of the recorded trace."""
        self.members += 1
        return MemberJoin(str(self.members * 7919), attributes=ATTRIBUTES)

    def update(self) -> Command:
        """A member's attributes change: its ranges do not."""
        member = self.feed.random.randrange(1, self.members)
        return MemberUpdate(str(member * 7919), attributes=CHANGED)

    def config(self) -> Command:
        """One of 1,000 keys."""
        return ConfigPut(f"key-{self.feed.random.randrange(1000)}", "v" * 256)

    def slots(self, command: Callable[[], Command], count: int) -> list[AppliedSlot]:
        """``count`` of them, fixed and applied."""
        return [self.feed.command(command()) for _ in range(count)]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) in milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def bare(connection: duckdb.DuckDBPyConnection, count: int) -> None:
    """The floor: one transaction, one statement, one column."""
    connection.begin()
    connection.execute("INSERT INTO floor SELECT unnest($1::BIGINT[])", (list(range(count)),))
    connection.commit()


def measure(
    store: Store, floor: duckdb.DuckDBPyConnection, load: Load, name: str, size: int, batches: int
) -> None:
    """Print the cost of one kind and size of batch."""
    ours: list[tuple[float, float]] = []
    theirs: list[float] = []
    for _ in range(batches):
        batch = load.feed.batch(load.slots(getattr(load, name), size))
        ours.append(timed(lambda batch=batch: store.write(batch)))  # type: ignore[misc]
        theirs.append(timed(lambda: bare(floor, size))[0])
    wall = statistics.median(wall for wall, _ in ours)
    cpu = statistics.median(cpu for _, cpu in ours)
    below = statistics.median(theirs)
    print(
        json.dumps(
            {
                "batch": name,
                "slots": size,
                "wall_ms": round(wall, 1),
                "worst_ms": round(max(wall for wall, _ in ours), 1),
                "cpu_ms": round(cpu, 1),
                "slots_per_cpu_s": round(size / cpu * 1e3),
                "floor_ms": round(below, 1),
                "ratio": round(wall / below, 1),
            }
        ),
        flush=True,
    )


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--members", type=int, default=12_000)
    parser.add_argument("--batches", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        path = Path(directory) / "store.duckdb"
        store, load = Store.open(path, CLUSTER_ID, "bench"), Load()
        store.write(load.feed.batch(load.feed.start()))
        wall = cpu = 0.0
        while load.members < options.members:
            batch = load.feed.batch(load.slots(load.join, min(1000, options.members)))
            took = timed(lambda batch=batch: store.write(batch))  # type: ignore[misc]
            wall, cpu = wall + took[0], cpu + took[1]
        print(json.dumps({"loaded": load.members, "wall_ms": round(wall), "cpu_ms": round(cpu)}))
        with duckdb.connect(str(Path(directory) / "floor.duckdb"), config={"threads": 1}) as floor:
            floor.execute("CREATE TABLE floor (a BIGINT)")
            for name in ("join", "update", "config"):
                for size in (1, 100, 1000):
                    count = options.batches if size < 1000 else max(1, options.batches // 3)
                    measure(store, floor, load, name, size, count)
        query = "SELECT state, count(*) FROM members GROUP BY state"
        with store.connect() as connection:
            asked, _ = timed(lambda: run_select(connection, query))
        store.close()
        size_bytes = path.stat().st_size
        opened, _ = timed(lambda: Store.open(path, CLUSTER_ID, "bench"))
        print(
            json.dumps(
                {
                    "members": load.members,
                    "file_mb": round(size_bytes / 1e6, 1),
                    "restart_ms": round(opened),
                    "query_ms": round(asked, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
