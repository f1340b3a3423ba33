"""How soon a write is in the memory of listeners: fan-out latency, as JSON lines.

Five voters, ``--listeners`` listeners without stores, each a process of its own as in an engine,
and one client that writes at a mean rate, each write at a random time in its place: paced evenly,
all would meet the voters' ticks at one phase, another one at each start. Printed are, in
milliseconds, p50 and p99 from the start of a write to its acknowledgment and to its being applied
at each listener (all processes read one monotonic clock), and the ratio of the two medians: what a
follower waits for beyond what the writer waits for.

    python benchmarks/fanout.py [--listeners 2] [--commits 1500] [--rate 100] [--bytes 256]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import random
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles

import anyio

from dashboard.local import LocalCluster
from listeners import open_listener
from trex_core.cluster import ClusterConfig, parse_cluster
from trex_core.metadata.commands import ConfigPut, encode_command
from voters.driver import open_driver

START_S = 60.0
PREFIX = "bench/"
OPTIONS = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}


def figures(took_s: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    cuts = quantiles(took_s, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1000, 3), "p99_ms": round(cuts[98] * 1000, 3)}


def follow(config: ClusterConfig, keys: Path, number: int, commits: int, tell: Connection) -> None:
    """One listener: tells when it is ready, and at the end what each write took. The value of a
    write begins with when it was begun."""

    async def main() -> list[float]:
        took: list[float] = []
        async with open_listener(config, keys, name=f"bench-{number}") as listener:
            await listener.wait_ready(START_S)
            subscription = listener.changes(kind="config", prefix=PREFIX)
            tell.send(None)
            async for change in subscription:
                now = time.monotonic()
                changes = change.changes  # type: ignore[union-attr]  # nobody is slow here
                took += [now - float(each.new.value.split()[0]) for each in changes]
                if len(took) >= commits:
                    return took
        return took

    tell.send(anyio.run(main, backend_options=OPTIONS))


async def write(cluster: LocalCluster, asked: argparse.Namespace) -> list[float]:
    """Write at the rate asked for; what each acknowledgment took."""
    config = parse_cluster(cluster.config_path.read_text())
    acknowledged: list[float] = []

    async with open_driver(config, cluster.credentials(), deadline_s=START_S) as driver:

        async def one(number: int) -> None:
            began = time.monotonic()
            value = f"{began!r} ".ljust(asked.bytes, "x")
            await driver.submit(encode_command(ConfigPut(f"{PREFIX}{number}", value)))
            acknowledged.append(time.monotonic() - began)

        first = time.monotonic()
        draw = random.Random(0).random
        async with anyio.create_task_group() as group:
            for number in range(asked.commits):
                at = first + (number + draw()) / asked.rate
                await anyio.sleep(max(0.0, at - time.monotonic()))
                group.start_soon(one, number)
    return acknowledged


async def ready(cluster: LocalCluster) -> ClusterConfig:
    """Wait until a write goes through."""
    config = parse_cluster(cluster.config_path.read_text())
    async with open_driver(config, cluster.credentials(), deadline_s=START_S) as driver:
        await driver.submit(encode_command(ConfigPut("ready", "yes")))
    return config


def heard(ear: Connection) -> list[float]:
    """What a listener tells next. Raises ``TimeoutError``."""
    if not ear.poll(START_S):
        raise TimeoutError("a listener does not answer")
    told: list[float] = ear.recv()
    return told


def measure(cluster: LocalCluster, asked: argparse.Namespace) -> None:
    """Write, follow, print."""
    cluster.start_voters()
    config = anyio.run(ready, cluster, backend_options=OPTIONS)
    spawn = multiprocessing.get_context("spawn")
    ears, children = [], []
    try:
        for number in range(asked.listeners):
            ear, mouth = spawn.Pipe(duplex=False)
            keys = cluster.credentials("listener")
            arguments = (config, keys, number, asked.commits, mouth)
            child = spawn.Process(target=follow, args=arguments, daemon=True)
            child.start()
            ears.append(ear)
            children.append(child)
        for ear in ears:
            heard(ear)
        acknowledged = figures(anyio.run(write, cluster, asked, backend_options=OPTIONS))
        applied = figures([each for ear in ears for each in heard(ear)])
    finally:
        for child in children:
            child.kill()
            child.join()
    common = {"benchmark": "fanout", "listeners": asked.listeners, "rate": asked.rate}
    print(json.dumps(common | {"what": "acknowledged"} | acknowledged), flush=True)
    ratio = round(applied["p50_ms"] / acknowledged["p50_ms"], 2)
    print(json.dumps(common | {"what": "applied"} | applied | {"ratio": ratio}), flush=True)


def main() -> None:
    """Measure, and print one JSON object a line."""
    parser = argparse.ArgumentParser(description="How soon a write is at the listeners.")
    parser.add_argument("--listeners", type=int, default=2)
    parser.add_argument("--commits", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--bytes", type=int, default=256)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="trex-fanout-") as scratch,
        LocalCluster(Path(scratch)) as cluster,
    ):
        measure(cluster, asked)


if __name__ == "__main__":
    main()
