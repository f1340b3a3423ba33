"""How long a batch takes in the journal, against the bare write and sync of the same bytes.

    .venv/bin/python -m benchmarks.journal [--directory DIR] [--batches N]

Both are measured alternately in the same run on the same disk, one batch at a time as a lone
writer would see them: journal = append, submit, encode, one write, one fdatasync, wakeup through
the eventfd; floor = pwrite and fdatasync in the same thread. Prints JSON lines, microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trex_core.messages import Ballot, Kind, Value, encode_value
from trex_core.state import AcceptRecord, FixedRecord, Record, State, first_state
from trex_core.wire import Identity
from voters.journal import Journal, encode_batch, format_journal

CLUSTER = bytes(16)
BALLOT = Ballot(0, 1, 1)
IDENTITY = Identity(CLUSTER, 1, 1, 1)


def batch_of(slots: int, size: int) -> tuple[Record, ...]:
    """One accept of ``slots`` values of ``size`` bytes, and the fixed slot before it."""
    value = encode_value(Value(Kind.COMMAND, BALLOT, 1, 2, 3, 3, os.urandom(size)))
    return (FixedRecord(1 << 20, bytes(32)), AcceptRecord(BALLOT, (1 << 20) + 1, (value,) * slots))


def journal_batch(journal: Journal, records: tuple[Record, ...], state: State) -> None:
    """One batch, as the loop does it."""
    journal.append(records)
    batch = journal.submit(state)
    while journal.completed() < batch:
        select.select([journal.wakeup_fd], [], [])


def percentiles(samples: list[int]) -> dict[str, float]:
    """Median and 99th percentile of nanoseconds, in microseconds."""
    ranked = sorted(samples)
    return {
        "p50_us": round(ranked[len(ranked) // 2] / 1000, 1),
        "p99_us": round(ranked[len(ranked) * 99 // 100] / 1000, 1),
    }


def timed(samples: list[int], work: Callable[[], object]) -> None:
    """Append how long ``work`` took."""
    started = time.perf_counter_ns()
    work()
    samples.append(time.perf_counter_ns() - started)


def measure(directory: Path, slots: int, size: int, batches: int) -> dict[str, object]:
    """One line of results for batches of ``slots`` values of ``size`` bytes."""
    records = batch_of(slots, size)
    data = encode_batch(IDENTITY, 1, 0, 0, records)
    name = f"{slots}x{size}"
    format_journal(directory / name, CLUSTER, 1)
    journal = Journal.open(directory / name, CLUSTER, 1)
    state = first_state(CLUSTER)
    for _ in journal.replay(state):
        pass
    journal.start(state)
    room = len(data) * (batches + 1)
    fd = os.open(directory / f"{name}.floor", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, room)
    for offset in range(0, room, 1 << 20):
        os.pwrite(fd, bytes(min(1 << 20, room - offset)), offset)
    os.fsync(fd)
    floor: list[int] = []
    ours: list[int] = []
    encoding: list[int] = []

    def bare(offset: int) -> None:
        os.pwrite(fd, data, offset)
        os.fdatasync(fd)

    for index in range(batches):
        timed(floor, lambda: bare(index * len(data)))  # noqa: B023 - called at once
        timed(ours, lambda: journal_batch(journal, records, state))
        timed(encoding, lambda: encode_batch(IDENTITY, 1, 0, 0, records))
    rotations = journal.segments - 2
    journal.close()
    os.close(fd)
    result: dict[str, object] = {
        "slots": slots,
        "value_bytes": size,
        "batch_bytes": len(data),
        "batches": batches,
        "rotations": rotations,
        "journal": percentiles(ours),
        "floor": percentiles(floor),
        "encode": percentiles(encoding),
    }
    result["ratio_p50"] = round(sorted(ours)[batches // 2] / sorted(floor)[batches // 2], 2)
    return result


def main() -> None:
    """Measure small, middling and large batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=None, help="a directory on the disk")
    parser.add_argument("--batches", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for slots, size, share in ((1, 256, 1), (16, 256, 1), (256, 256, 2), (16, 1 << 16, 20)):
            batches = max(10, options.batches // share)
            print(json.dumps(measure(Path(directory), slots, size, batches)), flush=True)


if __name__ == "__main__":
    main()
