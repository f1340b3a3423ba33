"""What a flood of hostile datagrams costs who hears it, as JSON lines.

    python benchmarks/flood.py [--datagrams 40000] [--rate 5000] [--seconds 5] [--clients 8]

First the receive paths of a voter and of a listener, each over its real socket: processor time for
each datagram, from the kernel to the counter that says why it was dropped. The *floor* is a bare
non-blocking socket drained by ``recv``, which hears the same windows in turn with it; ``ratio`` is
datagrams a second by those of the floor. Then commits a second of three voters, in turns without
and with ``--rate`` hostile datagrams a second at each voter's peer port and at both ports of the
stream, from another process; ``ratio`` is with by without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parent.parent))

from dashboard.local import LocalCluster
from listeners.source import Source
from tests.adversary.arena import open_arena, overhear
from tests.adversary.hostile import KINDS, REPAIR, STREAM, Adversary, Recording, Said, door_of
from tests.credentials import held
from trex_core.cluster import ClusterConfig, parse_cluster
from trex_core.messages import DATAGRAM_BYTES_MAX
from trex_core.metadata.commands import ConfigPut, encode_command
from trex_core.wire import Channel
from voters import Driver, open_driver
from voters.server import Voter
from voters.transport import Transport, multicast_sender, udp_socket

START_S = 60.0
WINDOW_DATAGRAMS = 64
SAMPLES = ("noise", "replayed", "body flipped")
"""Kinds that are measured alone: what is dropped at a look, by the window of numbers, and by the
seal (at a voter, as far as the number is still good)."""
CORPUS_DATAGRAMS = 4_000
TURNS = 3
BURST = 20
"""Datagrams sent without a pause between them."""
VALUE = "x" * 256
KEYS = 1000

Address = tuple[str, int]


def line(what: str, **fields: object) -> None:
    """Print one figure."""
    print(json.dumps({"benchmark": "flood", "what": what, **fields}), flush=True)


# --- receive paths ----------------------------------------------------------------------------


def made(adversary: Adversary, door: str, kinds: list[str], count: int) -> list[list[bytes]]:
    """Windows of ``kinds`` for ``door``, ``count`` datagrams or a few more."""
    windows: list[list[bytes]] = []
    adversary.kinds = kinds
    left = count
    for _ in range(10 * count):
        if left <= 0:
            break
        window = adversary.window(door, WINDOW_DATAGRAMS)
        if window is not None and not (door == STREAM and window.kind == "replayed"):
            windows.append(window.datagrams)
            left -= len(window.datagrams)
    return windows


def drained(sock: socket.socket) -> None:
    """The floor: take all there is."""
    receive = sock.recv
    try:
        while True:
            receive(2048)
    except BlockingIOError:
        pass


def us_each(
    windows: list[list[bytes]],
    sender: socket.socket,
    ways: tuple[tuple[Address, Callable[[], None]], ...],
) -> list[float]:
    """Processor time of each of ``ways`` (where to send, how to take) for a datagram, in µs. They
    hear each window in turn."""
    spent_s = [0.0 for _ in ways]
    for window in windows:
        for index, (address, take) in enumerate(ways):
            for data in window:
                sender.sendto(data, address)
            began_s = time.thread_time()
            take()
            spent_s[index] += time.thread_time() - began_s
    count = sum(map(len, windows))
    return [1e6 * each / count for each in spent_s]


def compare(
    who: str, kinds: str, windows: list[list[bytes]], dropped: int, found: list[float]
) -> None:
    """Print a path against its floor, and that it dropped what was sent."""
    us, floor_us = found
    line(
        who, kinds=kinds, datagrams=sum(map(len, windows)), dropped=dropped, us=round(us, 2),
        per_s=round(1e6 / us), floor_us=round(floor_us, 2), floor_per_s=round(1e6 / floor_us),
        ratio=round(floor_us / us, 2),
    )  # fmt: skip


def voter_path(
    adversary: Adversary, config: ClusterConfig, voter: Voter, number: int, count: int
) -> None:
    """A voter's peer port. Its loop stands still meanwhile: nothing here waits."""
    transport, entry = voter._transport, config.voter(number)  # noqa: SLF001 - the path alone
    tapped, transport._udp = transport._udp, transport._udp._sock  # type: ignore[attr-defined]  # noqa: SLF001

    def take() -> None:
        transport._udp_ready = True  # noqa: SLF001
        Transport.drain(transport, 2 * WINDOW_DATAGRAMS)

    def dropped() -> int:
        return sum(n for name, n in voter.counters.items() if ".dropped." in name)

    with udp_socket() as bare, multicast_sender(config.stream) as sender:
        bare.bind(("127.0.0.1", 0))
        ways = (
            ((entry.host, entry.peer_port), take),
            (bare.getsockname(), lambda: drained(bare)),
        )
        for kinds in (tuple(KINDS), *((kind,) for kind in SAMPLES)):
            windows = made(adversary, door_of(number), list(kinds), count)
            before = dropped()
            found = us_each(windows, sender, ways)
            name = kinds[0] if len(kinds) == 1 else "all"
            compare("voter", name, windows, dropped() - before, found)
    transport._udp = tapped  # noqa: SLF001


def listener_path(adversary: Adversary, config: ClusterConfig, count: int) -> None:
    """A listener's port of the stream: a listener's sockets, and nobody behind them."""
    counters: Counter[str] = Counter()
    source = Source(config, held(config), counters)
    stream = config.stream

    def take() -> None:
        source._drain(source._stream, False)  # noqa: SLF001 - the path alone
        while source.take() is not None:
            pass

    def dropped() -> int:
        return sum(n for name, n in counters.items() if name.startswith("dropped_"))

    with udp_socket() as bare, multicast_sender(stream) as sender:
        bare.bind(("127.0.0.1", 0))
        ways = (
            ((stream.group, stream.port), take),
            (bare.getsockname(), lambda: drained(bare)),
        )
        for kinds in (tuple(KINDS), *((kind,) for kind in SAMPLES if kind != "replayed")):
            windows = made(adversary, STREAM, list(kinds), count)
            before = dropped()
            found = us_each(windows, sender, ways)
            name = kinds[0] if len(kinds) == 1 else "all"
            compare("listener", name, windows, dropped() - before, found)
    source.close()


async def paths(count: int) -> None:
    """Both receive paths, with what a real cluster said."""
    with tempfile.TemporaryDirectory(prefix="trex-flood-") as scratch:
        async with open_arena(Path(scratch), 0) as arena:
            number, voter = next(iter(arena.here.running.items()))
            voter_path(arena.adversary, arena.cluster, voter, number, count)
            await asyncio.sleep(0)
            listener_path(arena.adversary, arena.cluster, count)


# --- commits ----------------------------------------------------------------------------------


def attack(
    corpus: list[tuple[bytes, Address]], rate: float, seconds: float, go: Event, over: Event
) -> None:
    """Send ``corpus`` again and again at ``rate`` datagrams a second, for ``seconds`` each time
    ``go`` is set, until ``over``."""
    with udp_socket() as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
        while go.wait(START_S) and not over.is_set():
            began_s, sent = time.monotonic(), 0
            while sent < rate * seconds and time.monotonic() - began_s < 2 * seconds:
                for _ in range(BURST):
                    data, address = corpus[sent % len(corpus)]
                    sock.sendto(data, address)
                    sent += 1
                time.sleep(max(0.0, began_s + sent / rate - time.monotonic()))
            go.clear()


def corpus_of(config: ClusterConfig, recording: Recording) -> list[tuple[bytes, Address]]:
    """Hostile datagrams for each port. What goes to the voters' is made of the stream's, which
    bear the same names."""
    stream = config.stream
    addresses = {STREAM: (stream.group, stream.port), REPAIR: (stream.group, stream.repair_port)}
    for voter in config.voters:
        addresses[door_of(voter.id)] = (voter.host, voter.peer_port)
        for said in recording.taken[STREAM]:
            data = said.data[:3] + bytes([Channel.PEER]) + said.data[4:]
            recording.note(door_of(voter.id), Said(data, said.body))
    adversary = Adversary(0, config.cluster_id_bytes, recording)
    corpus = []
    for door, address in addresses.items():
        for window in made(adversary, door, list(KINDS), CORPUS_DATAGRAMS):
            corpus += [(data[:DATAGRAM_BYTES_MAX], address) for data in window]
    adversary.chance.shuffle(corpus)
    return corpus


async def commits(cluster: LocalCluster, asked: argparse.Namespace) -> None:
    """Commits a second in turns without and with the flood."""
    config = parse_cluster(cluster.config_path.read_text())
    recording = Recording()
    spawn = multiprocessing.get_context("spawn")
    go, over = spawn.Event(), spawn.Event()
    async with open_driver(config, cluster.credentials(), deadline_s=START_S) as driver:
        await driver.submit(encode_command(ConfigPut("ready", "yes")))
        done: list[float] = []
        ends_s = time.monotonic() + START_S

        async def write(driver: Driver, number: int) -> None:
            count = 0
            while time.monotonic() < ends_s:
                count += 1
                await driver.submit(encode_command(ConfigPut(f"{number}/{count % KEYS}", VALUE)))
                done.append(time.monotonic())

        async def writing() -> None:
            done.clear()
            async with anyio.create_task_group() as group:
                for number in range(asked.clients):
                    group.start_soon(write, driver, number)

        async with anyio.create_task_group() as group:
            group.start_soon(writing)
            await overhear(config, cluster.credentials("listener"), recording, 0, peers=False)
            ends_s = 0.0
        rate = asked.rate * (len(config.voters) + 2)
        attacker = spawn.Process(
            target=attack, args=(corpus_of(config, recording), rate, asked.seconds, go, over)
        )
        attacker.start()
        try:
            found: dict[str, list[float]] = {"quiet": [], "flooded": []}
            before = await dropped(driver)
            for _ in range(TURNS):
                for state, rates in found.items():
                    if state == "flooded":
                        go.set()
                    ends_s = time.monotonic() + asked.seconds
                    await writing()
                    rates.append(len(done) / asked.seconds)
            counted = await dropped(driver) - before
        finally:
            over.set()
            go.set()
            attacker.join(START_S)
            attacker.kill()
    quiet, flooded = (statistics.median(rates) for rates in found.values())
    line(
        "commits", voters=len(config.voters), clients=asked.clients,
        flood_per_s_each_port=asked.rate, dropped_by_voters=counted,
        quiet_per_s=round(quiet), flooded_per_s=round(flooded), ratio=round(flooded / quiet, 2),
    )  # fmt: skip


async def dropped(driver: Driver) -> int:
    """How many datagrams all voters dropped so far."""
    total = 0
    for status in (await driver.statuses()).values():
        counters = getattr(status, "counters", {})
        total += sum(n for name, n in counters.items() if ".dropped." in name)
    return total


def main() -> None:
    """Measure, and print one JSON object a line."""
    parser = argparse.ArgumentParser(description="What a flood of hostile datagrams costs.")
    parser.add_argument("--datagrams", type=int, default=40_000)
    parser.add_argument("--rate", type=float, default=5_000.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8)
    asked = parser.parse_args()
    anyio.run(paths, asked.datagrams, backend_options={"use_uvloop": True})
    with (
        tempfile.TemporaryDirectory(prefix="trex-flood-") as scratch,
        ExitStack() as stack,
    ):
        cluster = stack.enter_context(LocalCluster(Path(scratch), 3))
        cluster.start_voters()
        anyio.run(commits, cluster, asked, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
