"""A listener can never slow a commit: the figure behind the sentence.

Five voters, one paced client; interleaved, in the same run: no listener at all, three healthy ones,
and three of which one stands still (SIGSTOP) and one loses 30 % of the stream.  Printed are p50 and
p99 of a commit for each, and the ratios.  Listeners on the same two cores take processor time from
the voters; what the disturbed ones may not do is take more than the healthy.

    .venv/bin/python benchmarks/never_slow.py [--rounds 5] [--commits 1500] [--rate 200]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import anyio

from dashboard.local import LocalCluster
from trex_core.cluster import parse_cluster
from trex_core.metadata.commands import ConfigPut, encode_command
from voters.driver import Driver, open_driver

VALUE = "v" * 256


async def commits(driver: Driver, count: int, rate: float) -> list[float]:
    """Milliseconds of ``count`` commits started at ``rate`` per second, whatever the last took."""
    took_ms: list[float] = []

    async def one(index: int) -> None:
        began = time.perf_counter()
        await driver.submit(encode_command(ConfigPut(f"bench/{index % 100}", VALUE)))
        took_ms.append((time.perf_counter() - began) * 1000)

    began = time.monotonic()
    async with anyio.create_task_group() as group:
        for index in range(count):
            await anyio.sleep(max(0.0, began + index / rate - time.monotonic()))
            group.start_soon(one, index)
    return took_ms


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def main(rounds: int, count: int, rate: float) -> None:
    """Run and print JSON lines, the ratios last."""
    p99: dict[str, list[float]] = {"none": [], "healthy": [], "disturbed": []}
    with (
        tempfile.TemporaryDirectory(prefix="trex-never-slow-") as folder,
        LocalCluster(Path(folder)) as cluster,
    ):
        cluster.start_voters()
        config = parse_cluster(cluster.config_path.read_text())
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            await commits(driver, count, rate)  # warm up
            for round_ in range(rounds):
                for state, figures_p99 in p99.items():
                    listeners = []
                    if state != "none":
                        listeners = [
                            cluster.start_listener(
                                f"listener-{n}",
                                drop_percent=30 if state == "disturbed" and n == 1 else 0,
                            )
                            for n in range(3)
                        ]
                        for child in listeners:
                            child.wait_for_line("listener.ready", 60)
                        if state == "disturbed":
                            listeners[0].pause()
                    took_ms = await commits(driver, count, rate)
                    for child in listeners:
                        child.resume()
                        child.terminate()
                    figures_p99.append(percentile(took_ms, 0.99))
                    figures = {
                        "round": round_,
                        "listeners": state,
                        "p50_ms": round(percentile(took_ms, 0.5), 3),
                        "p99_ms": round(figures_p99[-1], 3),
                    }
                    print(json.dumps(figures), flush=True)
    for state, base in (("disturbed", "healthy"), ("disturbed", "none"), ("healthy", "none")):
        ratios = [a / b for a, b in zip(p99[state], p99[base], strict=True)]
        print(
            json.dumps(
                {
                    "p99": f"{state} / {base}",
                    "median_ratio": round(statistics.median(ratios), 3),
                    "ratios": [round(r, 3) for r in ratios],
                }
            )
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commits", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=200)
    options = parser.parse_args()
    anyio.run(main, options.rounds, options.commits, options.rate)
