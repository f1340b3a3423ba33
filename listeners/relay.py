"""What a listener does for other listeners: this module alone serves catch-up from memory.

Entries that stand on the listener's shelf are served over TCP (TLS, to holders of the cluster's
certificates), each answer ending at a tip that a voter signed, so that nobody need believe this
listener.  What is older, and snapshots, are the voters' business: "ask another".  Every request is
answered.

Whatever others ask costs this listener little: at most CONNECTIONS_MAX connections, one request of
each at a time, HANDSHAKES_PER_S handshakes a second, and all answers together leave at most
BYTES_PER_S.  Repairs by multicast have the shelf's own cap.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from listeners.credentials import Credentials, other_end
from listeners.trust import Trust
from trex_core.access import Holder
from trex_core.cluster import ClusterConfig, ConfigError, StreamConfig
from trex_core.messages import (
    RUN_BYTES_MAX,
    RUN_SLOTS_MAX,
    AskOther,
    CatchupEntries,
    CatchupMessage,
    CatchupRequest,
    SnapshotRequest,
)
from trex_core.wire import (
    HEADER_BYTES,
    Channel,
    FrameError,
    Identity,
    body_bytes,
    decode_catchup,
    encode_body,
    frame,
    unframe,
)

CONNECTIONS_MAX: Final = 8
"""Most others served at a time; further ones are sent elsewhere. Who has not proven who he is, or
is nobody to be helped, takes no place: HANDSHAKE_S and DENIED_S times HANDSHAKES_PER_S bound how
many of them there are."""
HANDSHAKES_PER_S: Final = 50
"""Most TLS handshakes begun in a second: each costs some 1.5 ms, and anybody can ask for one."""
HANDSHAKE_S: Final = 5.0
"""Seconds that a handshake may take."""
GOODBYE_S: Final = 0.5
IDLE_S: Final = 10.0
"""Seconds within which the next request must have come."""
DENIED_S: Final = 1.0
"""The same for who is nobody to be helped, and is told so then."""
WRITE_S: Final = 10.0
"""Seconds within which an answer must have been taken."""
BYTES_PER_S: Final = 16 << 20
"""Most bytes a second of all answers together."""
ANSWER_S: Final = 0.002
"""Least time between two answers: to find what to say costs some of it."""
REQUEST_BYTES_MAX: Final = 4096
"""Largest body of a request, in bytes."""
ACCEPT_AGAIN_S: Final = 0.1
"""When the process has no file descriptor left, accepting is tried again after this time."""
ANY_INTERFACE: Final = "0.0.0.0"
"""As ``stream.interface``: the kernel chooses."""
HELPED_ROLES: Final = ("listener", "voter", "admin")
LOG: Final = logging.getLogger("trex.listener")

Revoked = Callable[[], frozenset[str]]
"""The serials of certificates that are no longer good."""


def answer_to(message: CatchupMessage, trust: Trust) -> CatchupMessage:
    """What the listener answers. Raises :class:`FrameError` if ``message`` is no request."""
    match message:
        case SnapshotRequest():
            return AskOther(0, "a listener serves no snapshots")
        case CatchupRequest(first=first):
            pass
        case _:
            raise FrameError("body")
    shelf, tip = trust.shelf, trust.proof.newest
    if tip is None or not shelf.chain:
        return AskOther(0, "this listener knows nothing yet")
    first = max(1, first)
    if first > tip.slot:
        return CatchupEntries(first, tip.chain, (), tip, tip)
    if first > shelf.last:
        return AskOther(0, f"this listener is at slot {shelf.last} itself")
    if first < shelf.first:
        return AskOther(0, f"this listener keeps no slot before {shelf.first}")
    bytes_max = min(max(1, message.bytes_max), RUN_BYTES_MAX)
    end = trust.proof.tip_within(first, shelf.last_within(first, RUN_SLOTS_MAX, bytes_max))
    piece = shelf.run(first, end.slot) if end is not None else None
    if end is None or piece is None:
        return AskOther(0, f"no tip is known here that would prove slot {first}")
    return CatchupEntries(first, piece.chain_before, piece.values, end, tip)


def _helped(holder: Holder, revoked: Revoked) -> bool:
    return holder.grant.role in HELPED_ROLES and holder.serial not in revoked()


def own_address(stream: StreamConfig) -> str:
    """The address of the stream's interface; where the kernel chooses that (0.0.0.0), the one it
    sends to the group from. Raises ``OSError`` when there is no way to the group."""
    if stream.interface != ANY_INTERFACE:
        return stream.interface
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((stream.group, stream.port))  # sends nothing
        return str(probe.getsockname()[0])


class Relay:
    """Serves what ``trust`` keeps, on a port of its own of the stream's interface."""

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Credentials,
        trust: Trust,
        counters: Counter[str],
    ) -> None:
        """Bind. Raises ``OSError`` when that is not possible."""
        self._cluster_id = cluster.cluster_id_bytes
        self._identity = Identity(self._cluster_id)
        self._credentials = credentials
        self._trust = trust
        self._counters = counters
        self._pace = asyncio.Lock()
        self._served = 0
        self._socket = socket.create_server((own_address(cluster.stream), 0), backlog=64)
        self._socket.setblocking(False)
        host, port = self._socket.getsockname()
        self.address: Final = f"{host}:{port}"
        """As reports tell it."""

    def close(self) -> None:
        """Accept nobody from now on. Again: does nothing."""
        self._socket.close()

    async def serve(self, revoked: Revoked) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._socket)
                except OSError:
                    self._counters["relay_accept_failed"] += 1
                    await asyncio.sleep(ACCEPT_AGAIN_S)
                    continue
                tasks.create_task(self._serve(sock, revoked))
                await asyncio.sleep(1 / HANDSHAKES_PER_S)

    async def _serve(self, sock: socket.socket, revoked: Revoked) -> None:
        reader = asyncio.StreamReader(limit=HEADER_BYTES + REQUEST_BYTES_MAX)
        protocol = asyncio.StreamReaderProtocol(reader)
        loop = asyncio.get_running_loop()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(HANDSHAKE_S):
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    sock,
                    ssl=self._credentials.server,
                    ssl_handshake_timeout=HANDSHAKE_S,
                    ssl_shutdown_timeout=GOODBYE_S,
                )
        except (OSError, TimeoutError):
            self._counters["relay_tls_refused"] += 1
            sock.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        helped = False
        try:
            holder = other_end(writer.get_extra_info("ssl_object"), self._cluster_id)
            helped = _helped(holder, revoked)
            self._served += helped
            if self._served > CONNECTIONS_MAX and helped:
                self._counters["relay_too_many"] += 1
                await self._send(writer, AskOther(0, "too many others are served here"))
                return
            await self._converse(reader, writer, holder, revoked)
        except ConfigError:
            self._counters["relay_denied"] += 1
        except FrameError as error:
            self._counters[f"relay_dropped_{error.reason}"] += 1
        except TimeoutError:
            self._counters["relay_too_slow"] += 1
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            self._counters["relay_broken"] += 1
        finally:
            self._served -= helped
            transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    async def _converse(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        holder: Holder,
        revoked: Revoked,
    ) -> None:
        # No answer waits in memory behind another: drain() returns when all was taken.
        writer.transport.set_write_buffer_limits(high=1, low=0)
        while True:
            async with asyncio.timeout(IDLE_S if _helped(holder, revoked) else DENIED_S):
                message = await self._receive(reader)
            if message is None:
                return
            if not _helped(holder, revoked):
                self._counters["relay_denied"] += 1
                why = f"a {holder.grant.role} has no business here"
                await self._send(writer, AskOther(0, why))
                return
            answer = answer_to(message, self._trust)
            self._counters["relay_answers"] += 1
            if isinstance(answer, CatchupEntries):
                self._counters["relay_slots"] += len(answer.values)
            await self._send(writer, answer)

    async def _send(self, writer: asyncio.StreamWriter, answer: CatchupMessage) -> None:
        data = frame(self._identity, Channel.CATCHUP, encode_body(answer))
        async with self._pace:
            await asyncio.sleep(len(data) / BYTES_PER_S + ANSWER_S)
        writer.write(data)
        async with asyncio.timeout(WRITE_S):
            await writer.drain()

    async def _receive(self, reader: asyncio.StreamReader) -> CatchupMessage | None:
        try:
            header = await reader.readexactly(HEADER_BYTES)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise
        size = body_bytes(header, self._cluster_id, REQUEST_BYTES_MAX)
        body = await reader.readexactly(size)
        return decode_catchup(unframe(header + body, self._cluster_id, Channel.CATCHUP).body)
