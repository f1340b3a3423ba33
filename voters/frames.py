"""TCP servers that speak frames: this module alone decides how long a stranger may stay.

Voters' links and clients' connections are bytes from outside, so both sides of the voter listen
through :class:`FrameServer`: each connection is cut into frames as it comes, garbage is counted by
reason and its connection closed, and nothing raises past it.  Who has no certificate of the
cluster gets no further than :class:`Greeter`, which TLS handshakes cannot occupy for long.  Bounds:
at most ``connections_max`` connections, a quarter of them under one certificate (the oldest that
never sent what it may makes room for a new one, or else one that was idle for IDLE_S_MIN),
STRANGER_S_MAX seconds for the first such frame, FRAME_S_MAX for finishing one, UNFINISHED_BYTES_MAX
unfinished in all, ``write_bytes_max`` waiting to be read by the other end.  A peer that vanished
without a word is found by TCP keep-alive.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from trex_core.access import Holder
from trex_core.cluster import ConfigError
from trex_core.wire import Frame, FrameBuffer, FrameError
from voters.config import StartError
from voters.credentials import other_end

STRANGER_S_MAX: Final = 10.0
"""A connection that did not send one whole frame that it may send within this many seconds is
closed."""
FRAME_S_MAX: Final = 30.0
"""A connection whose frame is unfinished for this many seconds is closed."""
IDLE_S_MIN: Final = 300.0
"""A connection on which nothing came for this many seconds may make room for a new one."""
HOLDER_SHARE: Final = 4
"""Under one certificate at most one in so many of all connections are held."""
UNFINISHED_BYTES_MAX: Final = 64 << 20
"""Most bytes of unfinished frames of all connections of a server; above it, of the certificate
under which the most are held, the connection with the most is closed."""
GREETINGS_MAX: Final = 64
"""Most connections in the middle of their handshake; the oldest makes room for a new one."""
GREETING_S_MAX: Final = 5.0
"""Seconds that a handshake may take."""
GOODBYE_S_MAX: Final = 0.5
"""Seconds that the other end has for saying goodbye when a connection is closed."""
GREETINGS_PER_S: Final = 200
"""Most handshakes begun in a second, after a burst of GREETINGS_MAX: each costs the loop some
1.5 ms, and anybody can ask for one."""
ACCEPT_AGAIN_S: Final = 0.1
"""When the process has no file descriptor left, accepting is tried again after this time."""
PORT_S_MAX: Final = 3.0
"""How long a port in use is waited for, in seconds, where that may help."""
PORT_AGAIN_S: Final = 0.05
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


def listening_socket(host: str, port: int, key: str) -> socket.socket:
    """A bound TCP socket that accepts. Raises :class:`StartError` naming ``key`` when the port is
    taken."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(512)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise bind_error(error, host, port, key) from error
    return sock


async def port_in_time(host: str, port: int, key: str) -> socket.socket:
    """As :func:`listening_socket`, but a port in use is waited for, up to PORT_S_MAX seconds: who
    held it may have been killed a moment ago and be ending still."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + PORT_S_MAX
    while True:
        try:
            return listening_socket(host, port, key)
        except StartError:
            if loop.time() >= deadline_s:
                raise
        await asyncio.sleep(PORT_AGAIN_S)


class Greeter:
    """Accepts connections on ``sock`` and has them prove who they are by TLS; each that can gets a
    protocol from ``factory``.  What fails is counted under ``name``."""

    def __init__(
        self,
        name: str,
        sock: socket.socket,
        context: ssl.SSLContext,
        factory: Callable[[], asyncio.BaseProtocol],
        count: Count,
    ) -> None:
        self._name = name
        self._socket = sock
        self._context = context
        self._factory = factory
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._greetings: dict[asyncio.Task[None], None] = {}
        self._accepting = self._loop.create_task(self._accept())

    async def _accept(self) -> None:
        left, since_s = float(GREETINGS_MAX), self._loop.time()
        while True:
            try:
                sock, _ = await self._loop.sock_accept(self._socket)
            except OSError:
                self._count(f"{self._name}.accept_failed")
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            if len(self._greetings) >= GREETINGS_MAX:
                next(iter(self._greetings)).cancel()
                self._count(f"{self._name}.too_many_greetings")
            task = self._loop.create_task(self._greet(sock))
            self._greetings[task] = None
            task.add_done_callback(lambda done: self._greetings.pop(done, None))
            now_s = self._loop.time()
            left = min(GREETINGS_MAX, left + (now_s - since_s) * GREETINGS_PER_S) - 1
            since_s = now_s
            if left < 0:
                await asyncio.sleep(-left / GREETINGS_PER_S)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(GREETING_S_MAX):
                await self._loop.connect_accepted_socket(
                    self._factory,
                    sock,
                    ssl=self._context,
                    ssl_handshake_timeout=GREETING_S_MAX,
                    ssl_shutdown_timeout=GOODBYE_S_MAX,
                )
        except ssl.SSLError:
            self._count(f"{self._name}.tls_refused")
        except (OSError, TimeoutError):
            self._count(f"{self._name}.tls_unfinished")

    async def aclose(self) -> None:
        """Accept no more; handshakes under way are given up."""
        tasks = [self._accepting, *self._greetings]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()


class FrameConnection(asyncio.Protocol):
    """One accepted connection. Subclasses say what a frame means in :meth:`on_frame`."""

    transport: asyncio.Transport
    holder: Holder
    """Who is at the other end."""

    def __init__(self, server: FrameServer) -> None:
        self.server = server
        self.open = False
        self.known = False
        """Whether a whole frame came that this holder may send: set by :meth:`on_frame`."""
        self.since = 0.0
        """Loop time at which the frame now awaited or unfinished began to be awaited; until it is
        known, that of the beginning."""
        self.unfinished = 0
        """Bytes of a frame that is not whole yet."""
        self._buffer = FrameBuffer(server.cluster_id, server.channel, server.body_bytes_max)

    def on_frame(self, frame: Frame) -> None:
        """Take one frame; ``known`` is to be set if it was admitted. Raises :class:`FrameError`
        if the connection is to be closed."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register, or be turned away."""
        self.transport = transport  # type: ignore[assignment]  # uvloop's has its own class
        self.since = self.server.loop.time()
        self.open = True
        keep_alive(transport)
        try:
            session = transport.get_extra_info("ssl_object")
            self.holder = other_end(session, self.server.cluster_id)
        except ConfigError:
            self.close("denied")
            return
        if self.server.why_denied(self.holder):
            self.close("denied")
            return
        self.server.admit(self)

    def data_received(self, data: bytes) -> None:
        """Cut into frames and take each."""
        if not self.open:
            return
        try:
            frames = self._buffer.feed(data)
            if self.known and (frames or not self.unfinished):
                self.since = self.server.loop.time()
            self._count_unfinished(self._buffer.unfinished)
            for frame in frames:
                if self.open:
                    self.on_frame(frame)
        except FrameError as error:
            self.close(f"dropped.{error.reason}")
        else:
            self.server.bound_unfinished()

    def _count_unfinished(self, count: int) -> None:
        self.server.unfinished_bytes += count - self.unfinished
        self.unfinished = count

    def eof_received(self) -> bool:
        """The other end said all: close."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget the connection."""
        self.open = False
        self._count_unfinished(0)
        self.server.connections.pop(self, None)
        self.server.changed.set()

    def write(self, data: bytes) -> None:
        """Send; the connection of a reader that is too slow is dropped and counted."""
        if not self.open:
            return
        self.transport.write(data)
        if self.transport.get_write_buffer_size() > self.server.write_bytes_max:
            self.close("slow_reader")

    def close(self, reason: str) -> None:
        """Count ``reason`` and drop the connection at once."""
        if self._end(reason):
            self.transport.abort()

    def dismiss(self, reason: str) -> None:
        """The same, but what was written is sent if that can be done at once."""
        if self._end(reason):
            self.transport.close()

    def _end(self, reason: str) -> bool:
        if not self.open:
            return False
        self.open = False
        self._count_unfinished(0)
        self.server.count(f"{self.server.name}.{reason}")
        return True

    def overdue(self, now: float) -> str | None:
        """Why this connection has been idle for too long; None if it has not."""
        if not self.known and now - self.since > STRANGER_S_MAX:
            return "stranger_closed"
        if self.unfinished and now - self.since > FRAME_S_MAX:
            return "unfinished_closed"
        return None


class FrameServer:
    """A listening TCP socket whose connections carry frames of one channel, in TLS."""

    def __init__(
        self,
        name: str,
        cluster_id: bytes,
        channel: int,
        context: ssl.SSLContext,
        count: Count,
        *,
        connections_max: int,
        body_bytes_max: int,
        write_bytes_max: int,
    ) -> None:
        self.name = name
        self.cluster_id = cluster_id
        self.channel = channel
        self.context = context
        self.count = count
        self.connections_max = connections_max
        self.holder_connections_max = max(1, connections_max // HOLDER_SHARE)
        self.body_bytes_max = body_bytes_max
        self.write_bytes_max = write_bytes_max
        self.loop = asyncio.get_running_loop()
        self.connections: dict[FrameConnection, None] = {}
        self.revoked: frozenset[str] = frozenset()
        """Serials of certificates that are no longer good."""
        self.unfinished_bytes = 0
        """Of all connections."""
        self.changed = asyncio.Event()
        """Set whenever a connection ended."""
        self._greeter: Greeter | None = None

    def connection(self) -> FrameConnection:
        """A new connection object. To be overridden."""
        raise NotImplementedError

    async def listen(self, host: str, port: int, key: str) -> None:
        """Begin to accept. Raises :class:`StartError` naming ``key`` when the port is taken."""
        sock = listening_socket(host, port, key)
        self._greeter = Greeter(self.name, sock, self.context, self.connection, self.count)

    def why_denied(self, holder: Holder) -> str:
        """Why ``holder`` may not connect here at all; "" if it may."""
        return "revoked" if holder.serial in self.revoked else ""

    def revoke(self, serials: frozenset[str]) -> None:
        """These certificates are no longer good: their connections end."""
        self.revoked = serials
        for connection in list(self.connections):
            if self.why_denied(connection.holder):
                connection.close("revoked")

    def admit(self, connection: FrameConnection) -> None:
        """Register a connection; over a limit another makes room, or the new one goes."""
        serial = connection.holder.serial
        same = [held for held in self.connections if held.holder.serial == serial]
        if len(same) >= self.holder_connections_max:
            among, reason = same, "too_many_of_one_holder"
        elif len(self.connections) >= self.connections_max:
            among, reason = list(self.connections), "too_many_connections"
        else:
            self.connections[connection] = None
            return
        victim = (serial not in self.revoked and self._least_missed(among)) or connection
        self.connections.pop(victim, None)
        victim.close(reason)
        if victim is not connection:
            self.connections[connection] = None

    def _least_missed(self, among: list[FrameConnection]) -> FrameConnection | None:
        """The oldest stranger, or else who was idle the longest, and long enough. (Whoever comes
        back is let in again.)"""
        for held in among:
            if not held.known:
                return held
        idle = min(among, key=lambda held: held.since)
        return idle if self.loop.time() - idle.since >= IDLE_S_MIN else None

    def bound_unfinished(self) -> None:
        """Have no more than UNFINISHED_BYTES_MAX bytes of frames wait for their end."""
        while self.unfinished_bytes > UNFINISHED_BYTES_MAX:
            held: Counter[str] = Counter()
            for each in self.connections:
                held[each.holder.serial] += each.unfinished
            most = max(
                self.connections, key=lambda each: (held[each.holder.serial], each.unfinished)
            )
            most.close("too_much_unfinished")

    def sweep(self) -> None:
        """Close connections that are overdue. To be called about once a second."""
        now = self.loop.time()
        for connection in list(self.connections):
            reason = connection.overdue(now)
            if reason is not None:
                connection.close(reason)

    async def aclose(self) -> None:
        """Stop listening; what was written to open connections is sent if it can be at once."""
        greeter, self._greeter = self._greeter, None
        if greeter is not None:
            await greeter.aclose()
        for connection in list(self.connections):
            connection.open = False
            connection.transport.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S_MAX):
                while self.connections:
                    self.changed.clear()
                    await self.changed.wait()
        for connection in list(self.connections):
            connection.transport.abort()
