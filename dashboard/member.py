"""A member of the demo's ring: an engine's node, reduced to what TRex does for it.

This module alone is that process.  It embeds a listener without a store, joins the ring on a lease
that it keeps alive, and tells its parent what it does and sees, a JSON object a line: ``joined``
(id, slot, lease) each time it joined, ``members`` (slot, members) each time they changed.  SIGTERM
ends it; its lease is then given back, so that it leaves at once.
"""

from __future__ import annotations

import argparse
import json
import signal

import anyio

from listeners.changes import Lagged, Progress, Reset, SlotChanges
from listeners.listener import Listener, open_listener
from trex_core.credentials import FOLDER
from voters.client import Client, Rejected, connect
from voters.config import read_cluster

ZONE = "demo"
"""The zone of all members of the demo."""
WRITER = "members"
"""Whose credentials they change the ring with."""
LISTENER = "listener"
"""And follow it with."""
PREFIX = "member-"
"""How their ids begin."""
DEADLINE_S = 30.0
"""How long a command of a member may take, in seconds: longer than any change of leader."""


def tell(event: str, **fields: object) -> None:
    """Tell the parent."""
    print(json.dumps({"event": event, **fields}), flush=True)


async def first_of(*events: anyio.Event) -> None:
    """Wait until one of ``events`` is set."""

    async def end_with(event: anyio.Event) -> None:
        await event.wait()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for event in events:
            group.start_soon(end_with, event)


async def be_member(client: Client, name: str, lease_ms: int, stop: anyio.Event) -> None:
    """Be a member of the ring until ``stop``. A lost lease is replaced by a new one; should
    the old one still be there, the member moves over to the new one."""
    while not stop.is_set():
        async with client.lease(lease_ms) as held:
            try:
                done = await client.join(name, zone=ZONE, lease=held.id)
            except Rejected as error:
                if error.reason != "exists":
                    raise
                done = await client.update(name, lease=held.id)
            tell("joined", id=name, slot=done.slot, lease=held.id)
            await first_of(held.lost, stop)


async def watch_members(listener: Listener) -> None:
    """Tell who the demo's members are, whenever one comes or goes."""
    known: set[str] = set()
    async for delivery in listener.changes(since=0, kind="member", prefix=PREFIX):
        match delivery:
            case SlotChanges() | Reset():
                before = set(known)
                for change in delivery.changes:
                    (known.discard if change.new is None else known.add)(change.key)
                if known != before:
                    tell("members", slot=listener.applied, members=sorted(known))
            case Lagged() | Progress():
                pass


async def end_on_signal(stop: anyio.Event) -> None:
    """Set ``stop`` at SIGTERM or Ctrl-C."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            stop.set()


async def run(name: str, lease_ms: int) -> None:
    """Run the member until SIGTERM."""
    cluster, base = read_cluster(None)
    stop = anyio.Event()
    async with (
        open_listener(cluster, base / FOLDER / LISTENER, name=name) as listener,
        connect(cluster, base / FOLDER / WRITER, deadline_s=DEADLINE_S) as client,
        anyio.create_task_group() as group,
    ):
        group.start_soon(watch_members, listener)
        group.start_soon(end_on_signal, stop)
        await be_member(client, name, lease_ms, stop)
        group.cancel_scope.cancel()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="dashboard.member", description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--lease-ms", required=True, type=int)
    given = parser.parse_args()
    anyio.run(run, given.name, given.lease_ms)


if __name__ == "__main__":
    main()
