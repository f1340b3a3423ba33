"""Commits a second and their latency, with 1, 16 and 64 clients on five voters, as JSON lines.

    python benchmarks/commit.py [--clients 1 16 64] [--seconds 5] [--voters 5] [--bytes 256]

Each client is a connection of its own that writes one value after another, waiting for each: a
closed loop. All of them run in this process, on the machine that the voters run on, so what it
costs to ask is in the figures too.

The *floor* is measured in the same run, before: the same number of processes, each of which writes
a record of that size to a preallocated file, syncs it with fdatasync, and answers by UDP; a commit
is done when a majority answered. No order, no checks, no state, one commit at a time: no replicated
log on this machine is faster with one client. ``ratio`` is commits a second by those of the floor;
with many clients it passes 1, since many commits share a sync.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import quantiles

import anyio

from dashboard.local import LocalCluster
from trex_core.cluster import ClusterConfig
from trex_core.metadata.commands import ConfigPut, encode_command
from voters import Driver, open_driver, read_cluster

START_S = 60.0
WARM_UP_S = 1.0
FLOOR_FILE_BYTES = 16 << 20
FLOOR_ENVELOPE_BYTES = 200
"""About what frames and records add to a value."""
KEYS = 1000


def floor_voter(path: Path, port: int, size: int, ready: Event) -> None:
    """One voter of the floor: receive, write, sync, answer; until it is killed."""
    with path.open("wb") as file, socket.socket(type=socket.SOCK_DGRAM) as sock:
        file.write(bytes(FLOOR_FILE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        sock.bind(("127.0.0.1", port))
        ready.set()
        offset = 0
        while True:
            data, sender = sock.recvfrom(1 << 16)
            os.pwrite(file.fileno(), data, offset)
            os.fdatasync(file.fileno())
            offset = (offset + size) % (FLOOR_FILE_BYTES - size)
            sock.sendto(data[:8], sender)


def measure_floor(directory: Path, voters: int, size: int, seconds: float) -> list[float]:
    """The time of each commit of the floor, in seconds."""
    size += FLOOR_ENVELOPE_BYTES
    spawn = multiprocessing.get_context("spawn")
    ports = []
    for _ in range(voters):
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    readies = [spawn.Event() for _ in ports]
    processes = [
        spawn.Process(target=floor_voter, args=(directory / f"floor-{port}", port, size, ready))
        for port, ready in zip(ports, readies, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        for ready in readies:
            if not ready.wait(START_S):
                raise TimeoutError("the floor does not start")
        return _floor_commits(ports, size, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _floor_commits(ports: Sequence[int], size: int, seconds: float) -> list[float]:
    took = []
    majority = len(ports) // 2 + 1
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.settimeout(START_S)
        ends = time.perf_counter() + seconds
        number = 0
        while (began := time.perf_counter()) < ends:
            number += 1
            name = number.to_bytes(8, "big")
            data = name + bytes(size - 8)
            for port in ports:
                sock.sendto(data, ("127.0.0.1", port))
            answers = 0
            while answers < majority:
                answers += sock.recv(64) == name
            took.append(time.perf_counter() - began)
    return took


async def client_loop(
    driver: Driver, number: int, size: int, warm_s: float, ends_s: float, took: list[float]
) -> None:
    """Write one value after another until ``ends_s``; note each that began after ``warm_s``."""
    value = "x" * size
    count = 0
    while (began := time.perf_counter()) < ends_s:
        count += 1
        await driver.submit(encode_command(ConfigPut(f"{number}/{count % KEYS}", value)))
        if began >= warm_s:
            took.append(time.perf_counter() - began)


async def measure(
    config: ClusterConfig, credentials: Path, clients: int, size: int, seconds: float
) -> list[float]:
    """The time of each acknowledged write, in seconds."""
    took: list[float] = []
    async with anyio.create_task_group() as group:
        begin = anyio.Event()
        ready = anyio.Semaphore(0)

        async def client(number: int) -> None:
            async with open_driver(config, credentials, deadline_s=START_S) as driver:
                await driver.submit(encode_command(ConfigPut(f"{number}/0", "x" * size)))
                ready.release()
                await begin.wait()
                warm = time.perf_counter() + WARM_UP_S
                await client_loop(driver, number, size, warm, warm + seconds, took)

        for number in range(clients):
            group.start_soon(client, number)
        for _ in range(clients):
            await ready.acquire()
        begin.set()
    return took


def figures(took: list[float], seconds: float) -> dict[str, float]:
    """Commits a second, and latencies in milliseconds."""
    cuts = quantiles(took, n=100, method="inclusive")
    return {
        "commits_per_s": round(len(took) / seconds, 1),
        "p50_ms": round(cuts[49] * 1000, 3),
        "p99_ms": round(cuts[98] * 1000, 3),
    }


def main() -> None:
    """Measure, and print one JSON object a line."""
    parser = argparse.ArgumentParser(description="Commits a second of a TRex cluster.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--voters", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--dir", type=Path, help="where journals go (default: the temp directory)")
    asked = parser.parse_args()
    common = {"benchmark": "commit", "voters": asked.voters, "value_bytes": asked.bytes}
    uvloop = importlib.util.find_spec("uvloop") is not None
    with tempfile.TemporaryDirectory(dir=asked.dir) as scratch:
        directory = Path(scratch)
        floor = figures(
            measure_floor(directory, asked.voters, asked.bytes, asked.seconds), asked.seconds
        )
        print(json.dumps(common | {"what": "floor", "clients": 1} | floor), flush=True)
        with LocalCluster(directory, asked.voters, name="benchmark") as cluster:
            config, _ = read_cluster(cluster.config_path)
            cluster.start_voters()
            for clients in asked.clients:
                took = anyio.run(
                    measure, config, cluster.credentials(), clients, asked.bytes, asked.seconds,
                    backend_options={"use_uvloop": uvloop},
                )  # fmt: skip
                found = figures(took, asked.seconds)
                ratio = round(found["commits_per_s"] / floor["commits_per_s"], 2)
                line = common | {"what": "trex", "clients": clients} | found | {"ratio": ratio}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
