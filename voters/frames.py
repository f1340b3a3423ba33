"""TCP servers that speak frames: this module alone decides how long a stranger may stay.

Voters' links and clients' connections are bytes from outside, so both sides of the voter listen
through :class:`FrameServer`: each connection is cut into frames as it comes, garbage is counted by
reason and its connection closed, and nothing raises past it.  Bounds: at most
``connections_max`` connections (the oldest that never sent a whole frame makes room for a new
one), STRANGER_S_MAX seconds for the first frame, FRAME_S_MAX for finishing one, ``write_bytes_max``
waiting to be read by the other end.  A peer that vanished without a word is found by TCP
keep-alive.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Final

from trex_core.wire import HEADER_BYTES, Frame, FrameBuffer, FrameError
from voters.config import StartError

STRANGER_S_MAX: Final = 10.0
"""A connection that did not send one whole frame within this many seconds is closed."""
FRAME_S_MAX: Final = 30.0
"""A connection whose frame is unfinished for this many seconds is closed."""
KEEPALIVE_IDLE_S: Final = 15
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_PROBES: Final = 3

Count = Callable[[str], None]
"""Counts one occurrence of a named thing."""


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Have the kernel probe a silent connection and send small frames at once."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, number in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), number)


def bind_error(error: OSError, host: str, port: int, key: str) -> StartError:
    """What to tell the operator when a port of the cluster file cannot be bound."""
    if error.errno == errno.EADDRINUSE:
        why = "is in use: stop the program that holds it, or change the key in the cluster file"
    elif error.errno == errno.EADDRNOTAVAIL:
        why = "is not an address of this machine: correct `host` in the cluster file"
    else:
        why = f"cannot be bound: {error.strerror or error}"
    return StartError(f"{key} = {port}: {host}:{port} {why}")


class FrameConnection(asyncio.Protocol):
    """One accepted connection. Subclasses say what a frame means in :meth:`on_frame`."""

    transport: asyncio.Transport

    def __init__(self, server: FrameServer) -> None:
        self.server = server
        self.open = False
        self.known = False
        """Whether a whole frame came."""
        self.since = 0.0
        """Loop time at which the frame now awaited or unfinished began to be awaited."""
        self._unfinished = 0
        self._buffer = FrameBuffer(server.cluster_id, server.channel, server.body_bytes_max)

    def on_frame(self, frame: Frame) -> None:
        """Take one frame. Raises :class:`FrameError` if the connection is to be closed."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register, or be turned away."""
        self.transport = transport  # type: ignore[assignment]  # uvloop's has its own class
        self.since = self.server.loop.time()
        self.open = True
        keep_alive(transport)
        self.server.admit(self)

    def data_received(self, data: bytes) -> None:
        """Cut into frames and take each."""
        try:
            frames = self._buffer.feed(data)
            done = sum(HEADER_BYTES + len(frame.body) for frame in frames)
            if frames or not self._unfinished:
                self.since = self.server.loop.time()
            self._unfinished += len(data) - done
            for frame in frames:
                self.on_frame(frame)
                self.known = True
        except FrameError as error:
            self.close(f"dropped.{error.reason}")

    def eof_received(self) -> bool:
        """The other end said all: close."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget the connection."""
        self.open = False
        self.server.connections.pop(self, None)

    def write(self, data: bytes) -> None:
        """Send; the connection of a reader that is too slow is dropped and counted."""
        if not self.open:
            return
        self.transport.write(data)
        if self.transport.get_write_buffer_size() > self.server.write_bytes_max:
            self.close("slow_reader")

    def close(self, reason: str) -> None:
        """Count ``reason`` and drop the connection at once."""
        if self.open:
            self.open = False
            self.server.count(f"{self.server.name}.{reason}")
            self.transport.abort()

    def overdue(self, now: float) -> str | None:
        """Why this connection has been idle for too long; None if it has not."""
        if not self.known and now - self.since > STRANGER_S_MAX:
            return "stranger_closed"
        if self._unfinished and now - self.since > FRAME_S_MAX:
            return "unfinished_closed"
        return None


class FrameServer:
    """A listening TCP socket whose connections carry frames of one channel."""

    def __init__(
        self,
        name: str,
        cluster_id: bytes,
        channel: int,
        count: Count,
        *,
        connections_max: int,
        body_bytes_max: int,
        write_bytes_max: int,
    ) -> None:
        self.name = name
        self.cluster_id = cluster_id
        self.channel = channel
        self.count = count
        self.connections_max = connections_max
        self.body_bytes_max = body_bytes_max
        self.write_bytes_max = write_bytes_max
        self.loop = asyncio.get_running_loop()
        self.connections: dict[FrameConnection, None] = {}
        self._server: asyncio.Server | None = None

    def connection(self) -> FrameConnection:
        """A new connection object. To be overridden."""
        raise NotImplementedError

    async def listen(self, host: str, port: int, key: str) -> None:
        """Begin to accept. Raises :class:`StartError` naming ``key`` when the port is taken."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.setblocking(False)
            self._server = await self.loop.create_server(self.connection, sock=sock, backlog=512)
        except OSError as error:
            sock.close()
            raise bind_error(error, host, port, key) from error

    def admit(self, connection: FrameConnection) -> None:
        """Register a connection; over the limit the oldest stranger goes, or the new one."""
        if len(self.connections) >= self.connections_max:
            strangers = (held for held in self.connections if not held.known)
            victim = next(strangers, connection)
            self.connections.pop(victim, None)
            victim.close("too_many_connections")
            if victim is connection:
                return
        self.connections[connection] = None

    def sweep(self) -> None:
        """Close connections that are overdue. To be called about once a second."""
        now = self.loop.time()
        for connection in list(self.connections):
            reason = connection.overdue(now)
            if reason is not None:
                connection.close(reason)

    def stop_listening(self) -> None:
        """Accept no further connection; those that are open stay."""
        if self._server is not None:
            self._server.close()

    async def aclose(self) -> None:
        """Stop listening; what was written to open connections is sent if it can be at once."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self.connections):
            connection.open = False
            connection.transport.close()
        self._server = None
