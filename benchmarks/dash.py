"""What the dashboard costs: trex-dash at a terminal of 120 x 40 beside a plain trex-listener.

Five voters, one paced client; both follow the same stream at the same time. Printed are the share
of a core that each takes, several times, and the difference: at 1,000 commits a second it may be
5 % of a core. With --commits the client writes as fast as it may instead, and what both hold in
memory is printed each 100,000 commits; the ratio of the last to the first after warming up says
whether it is flat.

    .venv/bin/python benchmarks/dash.py [--rate 1000] [--seconds 20] [--rounds 5] [--key 1]
    .venv/bin/python benchmarks/dash.py --commits 1000000
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from dashboard.local import LocalCluster
from listeners.listener import SOCKET_FILE
from listeners.sql import query_socket_async
from trex_core.cluster import parse_cluster
from trex_core.metadata.commands import ConfigPut, encode_command
from voters.driver import Driver, open_driver

WIDTH, HEIGHT = 120, 40
VALUE = "v" * 128
KEYS = 1000
IN_FLIGHT = 128
MEMORY_STEP = 100_000
WARM_STEPS = 2
"""So many steps of memory are warming up: caches of the database, the timeline, the log."""
LIMIT_PERCENT = 5.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Dash:
    """trex-dash in a pty whose output is read and thrown away; counted in bytes."""

    def __init__(self, config: Path) -> None:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        self._ours = ours
        self.bytes = 0
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("trex-dash"), "--config", config],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(theirs)
        self.drawn = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError):
            while data := os.read(self._ours, 1 << 16):
                self.bytes += len(data)
                self.drawn.set()

    def press(self, key: str) -> None:
        """Press ``key``."""
        os.write(self._ours, key.encode())

    def close(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


def cpu_s(pid: int) -> float:
    """Seconds of processor time that ``pid`` and its threads have taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def rss_mib(pid: int) -> float:
    """Resident memory of ``pid``, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


async def paced(driver: Driver, rate: float, seconds: float) -> int:
    """Commit ``rate`` times a second for so long; how many were started."""
    count = round(rate * seconds)
    limiter = anyio.CapacityLimiter(512)

    async def one(index: int) -> None:
        async with limiter:
            await driver.submit(encode_command(ConfigPut(f"bench/{index % KEYS}", VALUE)))

    began = time.monotonic()
    async with anyio.create_task_group() as group:
        for index in range(count):
            delay_s = began + index / rate - time.monotonic()
            if delay_s > 0:
                await anyio.sleep(delay_s)
            group.start_soon(one, index)
    return count


async def flat_out(driver: Driver, count: int) -> None:
    """Commit ``count`` times, as fast as it goes."""
    left = count

    async def some() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await driver.submit(encode_command(ConfigPut(f"bench/{left % KEYS}", VALUE)))

    async with anyio.create_task_group() as group:
        for _ in range(IN_FLIGHT):
            group.start_soon(some)


def say(**figures: object) -> None:
    """Print one JSON line."""
    print(json.dumps(figures), flush=True)


async def measure_cpu(
    driver: Driver, pids: dict[str, int], rate: float, seconds: float, rounds: int
) -> None:
    """Shares of a core, round by round."""
    await paced(driver, rate, 5)  # warm up
    differences = []
    for round_ in range(rounds):
        before, began = {name: cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
        count = await paced(driver, rate, seconds)
        took_s = time.monotonic() - began
        percent = {
            name: round((cpu_s(pid) - before[name]) / took_s * 100, 2) for name, pid in pids.items()
        }
        differences.append(percent["dash"] - percent["listener"])
        say(
            round=round_,
            commits_per_s=round(count / took_s),
            listener_core_percent=percent["listener"],
            dash_core_percent=percent["dash"],
            difference=round(differences[-1], 2),
            listener_rss_mib=round(rss_mib(pids["listener"]), 1),
            dash_rss_mib=round(rss_mib(pids["dash"]), 1),
        )
    median = statistics.median(differences)
    say(
        difference_core_percent=round(median, 2),
        limit=LIMIT_PERCENT,
        within=median <= LIMIT_PERCENT,
    )


async def database_mib(directory: Path) -> float:
    """What the database of the listener in ``directory`` holds in memory, in MiB: its cache of the
    tables, which grows with them up to its limit."""
    asked = "SELECT sum(memory_usage_bytes) FROM duckdb_memory()"
    found = await query_socket_async(directory / SOCKET_FILE, asked)
    return float(found.rows[0][0]) / (1 << 20)


async def measure_memory(
    driver: Driver, pids: dict[str, int], commits: int, directory: Path
) -> None:
    """Resident memory each MEMORY_STEP commits; what of it is the database's cache; what the
    dashboard holds beyond a plain listener."""
    seen: dict[str, list[float]] = {}
    began = time.monotonic()
    for done in range(MEMORY_STEP, commits + 1, MEMORY_STEP):
        await flat_out(driver, MEMORY_STEP)
        listener, dash = rss_mib(pids["listener"]), rss_mib(pids["dash"])
        database = await database_mib(directory)
        figures = {
            "listener_rss_mib": listener,
            "dash_rss_mib": dash,
            "database_mib": database,
            "listener_beyond_database_mib": listener - database,
            "dash_beyond_listener_mib": dash - listener,
        }
        for name, figure in figures.items():
            seen.setdefault(name, []).append(figure)
        rounded = {name: round(figure, 1) for name, figure in figures.items()}
        say(commits=done, seconds=round(time.monotonic() - began), **rounded)
    for name, each in seen.items():
        warm = each[min(WARM_STEPS, len(each)) - 1]
        say(memory=name, warm_mib=round(warm, 1), last_mib=round(each[-1], 1),
            ratio=round(each[-1] / warm, 3))  # fmt: skip


async def main(options: argparse.Namespace) -> None:
    """Run and print JSON lines, the verdict last."""
    with (
        tempfile.TemporaryDirectory(prefix="trex-bench-dash-") as folder,
        LocalCluster(Path(folder)) as cluster,
    ):
        cluster.start_voters()
        config = parse_cluster(cluster.config_path.read_text())
        async with open_driver(config, cluster.credentials(), deadline_s=60) as driver:
            await paced(driver, 100, 1)
            listener = cluster.start_listener("plain")
            dash = Dash(cluster.config_path)
            try:
                await anyio.to_thread.run_sync(listener.wait_for_line, "listener.ready", 60)
                await anyio.to_thread.run_sync(dash.drawn.wait, 30)
                await paced(driver, 100, 3)
                dash.press(options.key)
                pids = {"listener": listener.pid, "dash": dash.process.pid}
                if options.commits:
                    await measure_memory(driver, pids, options.commits, cluster.directory / "plain")
                else:
                    await measure_cpu(driver, pids, options.rate, options.seconds, options.rounds)
                if dash.process.poll() is not None:
                    sys.exit("trex-dash ended on the way")
            finally:
                dash.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commits", type=int, default=0)
    parser.add_argument("--key", default="1", help="the tab that is shown: 1, 2, 3 or 4")
    anyio.run(main, parser.parse_args())
