"""How fast a listener follows: slots a second from the multicast stream, with and without a store.

A child process multicasts real frames as fast as the listener takes them (it keeps a window of
unapplied slots, so nothing is lost and the figure is the listener's alone). Prints one JSON line
for each case: slots a second until applied (and stored), CPU of the listener per slot.

    .venv/bin/python benchmarks/listener.py [--slots 40000] [--per-datagram 1 8]
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parent.parent))

from listeners import open_listener
from listeners.blocking import has_uvloop
from tests.credentials import folder
from tests.listeners.backbone import BALLOT, Backbone, make_cluster
from trex_core.messages import Kind, Value
from trex_core.metadata.commands import ConfigPut, MemberJoin, MemberUpdate, encode_command
from trex_core.wire import Identity, encode_body

WINDOW_SLOTS = 600
MEMBERS = 1000


def values(kind: str, count: int) -> list[Value]:
    """``count`` commands of one session: writes to 1,000 keys, or joins and updates of members."""
    if kind == "config":
        commands = [
            ConfigPut(f"key/{n % 1000}", f"value {n} ".ljust(100, "x")) for n in range(count)
        ]
    else:
        commands = [
            MemberJoin(f"member-{n}", zone=f"z{n % 5}")
            if n < MEMBERS
            else MemberUpdate(f"member-{n % MEMBERS}", attributes={"load": str(n)})
            for n in range(count)
        ]
    opened = Value(Kind.OPEN, BALLOT)
    return [
        opened,
        *(
            Value(Kind.COMMAND, BALLOT, 1_700_000_000_000, 2, n, n, encode_command(command))
            for n, command in enumerate(commands, 1)
        ),
    ]


def datagrams(backbone: Backbone, per_datagram: int) -> list[tuple[int, bytes]]:
    """(last slot, frame) of the whole log."""
    identity = Identity(backbone.cluster.cluster_id_bytes, 1, 7, 1)
    out = []
    for first in range(1, backbone.tip + 1, per_datagram):
        last = min(first + per_datagram - 1, backbone.tip)
        (data,) = backbone.sealed(identity, encode_body(backbone.run(first, last)))
        out.append((last, data))
    return out


def send(backbone: Backbone, frames: list[tuple[int, bytes]], applied: Synchronized[int]) -> None:
    """Multicast ``frames``, at most WINDOW_SLOTS ahead of ``applied``."""
    sender: socket.socket = backbone.sender
    address = (backbone.cluster.stream.group, backbone.cluster.stream.port)
    for last, data in frames:
        while last - applied.value > WINDOW_SLOTS:
            time.sleep(0.0002)
        sender.sendto(data, address)


async def measure(kind: str, slots: int, per_datagram: int, directory: Path | None) -> None:
    """Follow one stream and print the figures."""
    backbone = Backbone(make_cluster())
    backbone.append(*values(kind, slots))
    frames = datagrams(backbone, per_datagram)
    applied: Synchronized[int] = multiprocessing.Value("q", 0)
    async with open_listener(
        backbone.cluster, folder(backbone.cluster, "listener"), name="bench", directory=directory
    ) as listener:
        gc.collect()
        gc.freeze()
        child = multiprocessing.Process(target=send, args=(backbone, frames, applied))
        cpu, start = time.process_time(), time.monotonic()
        child.start()
        while listener.applied < backbone.tip:
            await listener.wait_applied(min(listener.applied + 100, backbone.tip), 60)
            applied.value = listener.applied
        seconds = time.monotonic() - start
        if directory is not None:
            await listener.wait_stored(backbone.tip, 60)
        stored_seconds = time.monotonic() - start
        cpu = time.process_time() - cpu
        print(
            json.dumps(
                {
                    "commands": kind,
                    "slots": backbone.tip,
                    "slots_per_datagram": per_datagram,
                    "store": directory is not None,
                    "loop": "uvloop" if has_uvloop() else "asyncio",
                    "applied_slots_per_s": round(backbone.tip / seconds),
                    "stored_slots_per_s": round(backbone.tip / stored_seconds)
                    if directory
                    else None,
                    "cpu_us_per_slot": round(cpu / backbone.tip * 1e6, 1),
                    "gaps": listener.counters["gap_opened"],
                }
            ),
            flush=True,
        )
        child.join()
        gc.unfreeze()
    backbone.close()


def main() -> None:
    """All cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=40_000)
    parser.add_argument("--per-datagram", type=int, nargs="+", default=[1, 6])
    arguments = parser.parse_args()
    multiprocessing.set_start_method("fork")
    for kind in ("config", "member"):
        for per_datagram in arguments.per_datagram:
            for store in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    anyio.run(
                        measure,
                        kind,
                        arguments.slots,
                        per_datagram,
                        Path(folder) if store else None,
                        backend_options={"use_uvloop": has_uvloop()},
                    )


if __name__ == "__main__":
    main()
