"""How soon a write is in the memory of listeners: fan-out latency, as JSON lines.

Five voters, ``--listeners`` listeners without stores in this process, one client that writes at a
paced rate. Printed are, in milliseconds, p50 and p99 from the start of a write to its
acknowledgment and to its being applied at each listener, and the ratio of the two medians: what a
follower waits for beyond what the writer waits for.

    python benchmarks/fanout.py [--listeners 2] [--commits 1500] [--rate 300] [--bytes 256]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import quantiles

import anyio

from dashboard.local import LocalCluster
from listeners import Listener, open_listener
from trex_core.cluster import parse_cluster
from trex_core.metadata.commands import ConfigPut, encode_command
from voters.driver import open_driver

START_S = 60.0
PREFIX = "bench/"


def figures(took_s: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    cuts = quantiles(took_s, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1000, 3), "p99_ms": round(cuts[98] * 1000, 3)}


async def measure(cluster: LocalCluster, asked: argparse.Namespace) -> None:
    """Write, follow, print."""
    config = parse_cluster(cluster.config_path.read_text())
    keys = cluster.credentials("listener")
    began: dict[str, float] = {}
    acknowledged: list[float] = []
    applied: list[float] = []
    value = "x" * asked.bytes

    async with AsyncExitStack() as held:
        driver = await held.enter_async_context(
            open_driver(config, cluster.credentials(), deadline_s=START_S)
        )
        await driver.submit(encode_command(ConfigPut("ready", "yes")))
        listeners = [
            await held.enter_async_context(open_listener(config, keys, name=f"bench-{number}"))
            for number in range(asked.listeners)
        ]
        for listener in listeners:
            await listener.wait_ready(START_S)

        async def follow(listener: Listener) -> None:
            left = asked.commits
            async for change in listener.changes(kind="config", prefix=PREFIX):
                now = time.perf_counter()
                for each in change.changes:  # type: ignore[union-attr]  # nobody is slow here
                    applied.append(now - began[each.key])
                    left -= 1
                if left <= 0:
                    return

        async def write(number: int) -> None:
            key = f"{PREFIX}{number}"
            began[key] = time.perf_counter()
            await driver.submit(encode_command(ConfigPut(key, value)))
            acknowledged.append(time.perf_counter() - began[key])

        with anyio.fail_after(START_S + asked.commits / asked.rate):
            async with anyio.create_task_group() as group:
                for listener in listeners:
                    group.start_soon(follow, listener)
                first = time.monotonic()
                for number in range(asked.commits):
                    await anyio.sleep(max(0.0, first + number / asked.rate - time.monotonic()))
                    group.start_soon(write, number)

    common = {"benchmark": "fanout", "listeners": asked.listeners, "rate": asked.rate}
    rows = {"acknowledged": figures(acknowledged), "applied": figures(applied)}
    ratio = round(rows["applied"]["p50_ms"] / rows["acknowledged"]["p50_ms"], 2)
    print(json.dumps(common | {"what": "acknowledged"} | rows["acknowledged"]), flush=True)
    print(json.dumps(common | {"what": "applied"} | rows["applied"] | {"ratio": ratio}), flush=True)


def main() -> None:
    """Measure, and print one JSON object a line."""
    parser = argparse.ArgumentParser(description="How soon a write is at the listeners.")
    parser.add_argument("--listeners", type=int, default=2)
    parser.add_argument("--commits", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=300.0)
    parser.add_argument("--bytes", type=int, default=256)
    asked = parser.parse_args()
    uvloop = importlib.util.find_spec("uvloop") is not None
    with (
        tempfile.TemporaryDirectory(prefix="trex-fanout-") as scratch,
        LocalCluster(Path(scratch)) as cluster,
    ):
        cluster.start_voters()
        anyio.run(measure, cluster, asked, backend_options={"use_uvloop": uvloop})


if __name__ == "__main__":
    main()
