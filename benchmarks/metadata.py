"""What the metadata machine costs: µs per applied command and ring change, ms per snapshot.

Run: ``python benchmarks/metadata.py``. Prints one JSON line for each figure: medians of processor
time, so that a busy machine blurs them less.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

from trex_core.messages import Ballot, Genesis, Kind, OutcomeStatus, Value
from trex_core.metadata.commands import (
    Change,
    Command,
    ConfigPut,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    encode_command,
)
from trex_core.metadata.state import EMPTY, MetadataState, apply, ring_of, state_chunks, state_from
from trex_core.sessions import NO_SESSIONS, deliver
from trex_core.snapshot import decode_snapshot, encode_snapshot

MEMBERS = 12_500
OPERATIONS = 2_000


def report(what: str, figure: float, unit: str) -> None:
    """Print one figure."""
    print(json.dumps({"what": what, "median": round(figure, 2), "unit": unit}), flush=True)


def timed(run: Callable[[], object], times: int = 5) -> float:
    """Median seconds of ``run``."""
    laps = []
    for _ in range(times):
        begun = time.thread_time()
        run()
        laps.append(time.thread_time() - begun)
    return statistics.median(laps)


def folded(state: MetadataState, commands: list[bytes]) -> MetadataState:
    """The state after ``commands``."""
    for slot, command in enumerate(commands, state.slot + 1):
        state, _, _ = apply(state, slot, command)
    return state


def changes_of(state: MetadataState, commands: list[bytes]) -> list[tuple[Change, ...]]:
    """The changes of each command in turn."""
    found = []
    for slot, command in enumerate(commands, state.slot + 1):
        state, _, changes = apply(state, slot, command)
        found.append(changes)
    return found


def encoded(commands: list[Command]) -> list[bytes]:
    """Commands as bytes."""
    return [encode_command(command) for command in commands]


def joins(zones: int) -> list[bytes]:
    """MEMBERS joins like those of the recorded cluster, over ``zones`` zones (0: none)."""
    attributes = {
        "platform": "70ZOvysYGtB6j9MUHMPzA2Iy7GRzWeJTdX0YCLRKGVg=",
        "cpus": "0.5",
        "memory": "0.2493",
    }
    return encoded(
        [
            MemberJoin(
                str(1_000_000 + n), zone=f"z{n % zones}" if zones else None, attributes=attributes
            )
            for n in range(MEMBERS)
        ]
    )


def bench_apply(full: MetadataState) -> None:
    """Apply commands of each sort on the full state."""
    puts = encoded([ConfigPut(f"service/{n % 500}", "x" * 256) for n in range(OPERATIONS)])
    sorts: dict[str, list[bytes]] = {
        "config put, 256 bytes": puts,
        "member update": encoded(
            [MemberUpdate(str(1_000_000 + n), attributes={"cpus": "1"}) for n in range(OPERATIONS)]
        ),
        "member join": encoded([MemberJoin(f"new{n}") for n in range(OPERATIONS)]),
        "member leave": encoded([MemberLeave(str(1_000_000 + n)) for n in range(OPERATIONS)]),
    }
    for name, commands in sorts.items():
        seconds = timed(partial(folded, full, commands))
        report(f"apply: {name}", seconds / OPERATIONS * 1e6, "us")

    values = [
        Value(Kind.COMMAND, Ballot(0, 1, 1), 0, 1, n, n, put) for n, put in enumerate(puts, 1)
    ]

    def in_session() -> None:
        state, (sessions, _) = full, deliver(NO_SESSIONS, 1, Value(Kind.OPEN, Ballot()), _never)
        for slot, value in enumerate(values, full.slot + 1):

            def one(slot: int, command: bytes) -> tuple[int, bytes]:
                nonlocal state
                state, result, _ = apply(state, slot, command)
                return OutcomeStatus.APPLIED, result

            sessions, _ = deliver(sessions, slot, value, one)

    report("deliver in a session and apply: config put", timed(in_session) / OPERATIONS * 1e6, "us")


def _never(_slot: int, _command: bytes) -> tuple[int, bytes]:
    raise AssertionError("not a command")


def bench_ring(full: MetadataState, zones: int) -> None:
    """Changes of the ring of the full state."""
    count = 300
    ring = ring_of(full)
    name = f"ring of {ring.tokens} tokens, {zones} zones"
    report(f"{name}: built whole", timed(lambda: ring_of(full), 3) * 1e3, "ms")
    sorts: dict[str, list[Command]] = {
        "join": [
            MemberJoin(f"new{n}", zone=f"z{n % zones}" if zones else None) for n in range(count)
        ],
        "leave": [MemberLeave(str(1_000_000 + n)) for n in range(count)],
        "attributes only": [MemberUpdate(str(1_000_000 + n), attributes={}) for n in range(count)],
    }
    for sort, commands in sorts.items():
        changes = changes_of(full, encoded(commands))

        def update(changes: list[tuple[Change, ...]] = changes) -> None:
            after = ring
            for change in changes:
                after, _ = after.updated(change)

        def edit(changes: list[tuple[Change, ...]] = changes) -> None:
            after = ring
            for change in changes:
                after = after.with_changes(change)

        report(f"{name}: {sort}, with changed ranges", timed(update) / count * 1e6, "us")
        report(f"{name}: {sort}, ring only", timed(edit) / count * 1e6, "us")
    keys = [f"key{n}" for n in range(count)]
    report(
        f"{name}: replicas of a key",
        timed(lambda: [ring.replicas(k) for k in keys]) / count * 1e6,
        "us",
    )


def bench_snapshot(full: MetadataState) -> None:
    """Bytes of the whole state."""
    genesis = Genesis((1, 2, 3), (4, 5, 6))

    def file() -> bytes:
        return b"".join(
            encode_snapshot(full.slot, bytes(32), genesis, NO_SESSIONS, state_chunks(full))
        )

    report(f"snapshot of {MEMBERS} members: {len(file())} bytes", timed(file) * 1e3, "ms")
    slowest = 0.0
    for _ in range(5):
        pieces = encode_snapshot(full.slot, bytes(32), genesis, NO_SESSIONS, state_chunks(full))
        while True:
            begun = time.thread_time()
            if next(pieces, None) is None:
                break
            slowest = max(slowest, time.thread_time() - begun)
    report("snapshot: slowest single piece", slowest * 1e3, "ms")
    data = file()
    report(
        "snapshot: decoded and restored",
        timed(lambda: state_from(decode_snapshot(data).machine)) * 1e3,
        "ms",
    )


def main() -> None:
    """Measure everything."""
    begun = time.thread_time()
    full = folded(EMPTY, joins(0))
    report(f"apply: first {MEMBERS} joins", (time.thread_time() - begun) / MEMBERS * 1e6, "us")
    bench_apply(full)
    bench_ring(full, 0)
    bench_ring(folded(EMPTY, joins(5)), 5)
    bench_ring(folded(EMPTY, joins(2)), 2)
    bench_snapshot(full)


if __name__ == "__main__":
    main()
