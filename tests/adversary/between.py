"""A man in the middle of real voters: this module alone stands between processes.

Each voter gets a cluster file in which the others' peer ports are ours.  What comes there is passed
on, TLS byte by byte and datagrams whole; datagrams are recorded, and a share of them never arrives.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import anyio
import anyio.to_thread

from dashboard.local import LocalCluster
from tests.adversary.hostile import Recording, Said, door_of
from tests.e2e.harness import config_of
from trex_core.cluster import VoterEntry
from trex_core.wire import HEADER_BYTES

KEEP_BACK_EVERY = 16
CHUNK_BYTES = 1 << 16


class _Passing(asyncio.DatagramProtocol):
    """Passes datagrams on to one voter."""

    def __init__(self, recording: Recording, voter: VoterEntry) -> None:
        self._recording = recording
        self._door = door_of(voter.id)
        self._address = (voter.host, voter.peer_port)
        self._count = 0
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, _from: tuple[str, int]) -> None:
        self._count += 1
        arrives = self._count % KEEP_BACK_EVERY != 0
        # What it says is sealed; another cluster's words may as well be these.
        self._recording.note(self._door, Said(data, data[HEADER_BYTES:]), arrived=arrives)
        if arrives:
            self._transport.sendto(data, self._address)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _joined(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, voter: VoterEntry
) -> None:
    try:
        there, to_there = await asyncio.open_connection(voter.host, voter.peer_port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_pass_on(reader, to_there), _pass_on(there, writer))


@asynccontextmanager
async def between(cluster: LocalCluster, recording: Recording) -> AsyncIterator[None]:
    """Start the voters of ``cluster`` with us between them; when the block ends, stop all that runs
    of it."""
    loop = asyncio.get_running_loop()
    config, text = config_of(cluster), cluster.config_path.read_text()
    ours = dict(zip(cluster.voter_ids, reversed(cluster._block.ports), strict=False))
    connections: list[asyncio.Task[None]] = []
    async with AsyncExitStack() as held:
        for voter in config.voters:
            endpoint, _ = await loop.create_datagram_endpoint(
                lambda voter=voter: _Passing(recording, voter), (voter.host, ours[voter.id])
            )
            held.callback(endpoint.close)

            def joined(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                voter: VoterEntry = voter,
            ) -> None:
                connections.append(asyncio.create_task(_joined(reader, writer, voter)))

            server = await asyncio.start_server(joined, voter.host, ours[voter.id])
            held.callback(server.close)
        for voter in config.voters:
            seen = text
            for other in config.voters:
                if other is not voter:
                    line = rf"^peer_port = {other.peer_port}$"
                    seen = re.sub(line, f"peer_port = {ours[other.id]}", seen, flags=re.MULTILINE)
            path = cluster.directory / f"seen-by-{voter.id}.toml"
            path.write_text(seen)
            cluster.start(
                f"voter-{voter.id}",
                *("voters", "run", "--id", str(voter.id)),
                extra={"TREX_CONFIG": str(path)},
            )
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):  # in a thread: they talk through us until the end
                await anyio.to_thread.run_sync(cluster.stop)
                await asyncio.gather(*connections)
