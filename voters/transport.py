"""Sockets between voters and out to the stream: this module alone moves voters' bytes.

Four paths, all non-blocking, none with an ``await`` per datagram:

========================  ===================================================================
voter -> voter, small     UDP on ``peer_port``, in at most PEER_DATAGRAMS_MAX datagrams, sealed
voter -> voter, large     a TLS connection per direction to ``peer_port``, always open: for
                          messages over PEER_UDP_BODY_BYTES_MAX bytes, for Fetch and Fetched, and
                          first of all for telling what the datagrams are sealed with
voter -> listeners        multicast of one datagram at a time to ``stream.group:port``, sealed
listeners -> voters       repair requests and reports, multicast to ``stream.group:port + 1``,
                          sealed
========================  ===================================================================

What a voter hears by datagram before its sender told it the secret of this start is dropped: that
is what makes anything recorded before worthless.  A message that cannot be sent now is dropped and
counted: the algorithm repeats itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from trex_core.access import Holder, voter_of, why_not_voter
from trex_core.cluster import ClusterConfig, ConfigError, StreamConfig
from trex_core.credentials import Keys
from trex_core.messages import (
    LISTENER_REPORT_TAG,
    Accept,
    CatchUp,
    ChainReport,
    Fetch,
    Fetched,
    Heartbeat,
    ListenerReport,
    PeerMessage,
    Poll,
    Prepare,
    RepairRequest,
    SealTold,
    message_tag,
)
from trex_core.roster import sane
from trex_core.seal import KEY_BYTES, STREAM_SALT_BYTES, PeerOpener, Sealer, StreamOpener
from trex_core.silence import Silence
from trex_core.state import Receive
from trex_core.wire import (
    DATAGRAM_BODY_BYTES_MAX,
    PEER_UDP_BODY_BYTES_MAX,
    Channel,
    Frame,
    FrameError,
    Identity,
    Reassembler,
    decode_link,
    decode_peer,
    decode_stream,
    encode_body,
    frame,
)
from voters.config import StartError
from voters.credentials import Credentials, other_end, tls_trouble
from voters.frames import Count, FrameConnection, FrameServer, bind_error, keep_alive

LINK_QUEUE_BYTES_MAX: Final = 16 << 20
"""Most bytes waiting for one peer's TCP link; the oldest messages go first."""
LINK_CONNECTIONS_MAX: Final = 64
"""Most accepted TCP connections on the peer port."""
CONNECT_S_MAX: Final = 2.0
BACKOFF_S_MIN: Final = 0.05
BACKOFF_S_MAX: Final = 1.0
RESOLVE_S: Final = 5.0
"""Host names (not addresses) of peers are looked up anew this often, in seconds."""
SOCKET_BUFFER_BYTES: Final = 4 << 20
REPAIR_BUFFER_BYTES: Final = 64 << 10
"""A storm of repair requests overflows this small buffer in the kernel, not in the loop."""
TO_ALL: Final = Poll | Prepare | Accept | Heartbeat | ChainReport
"""What says the same to every voter. Anything else is for one, and its seal says for whom: who
records it cannot have another voter believe that it was told so (to stop, say)."""
RECEIVE_BYTES: Final = 2048
"""More than any datagram we send."""

Address = tuple[str, int]


def udp_socket() -> socket.socket:
    """A non-blocking UDP socket with large buffers."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return sock


def multicast_sender(stream: StreamConfig) -> socket.socket:
    """A socket that multicasts on the stream's interface with its TTL."""
    sock = udp_socket()
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(stream.interface))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, stream.ttl)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    return sock


def multicast_receiver(stream: StreamConfig, port: int, buffer_bytes: int) -> socket.socket:
    """A socket bound to the group, so that it hears nothing else, shared with other processes."""
    sock = udp_socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    sock.bind((stream.group, port))
    member = struct.pack("4s4s", socket.inet_aton(stream.group), socket.inet_aton(stream.interface))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
    return sock


class _Inbound(FrameConnection):
    """A peer's TCP link to us."""

    server: _LinkServer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.open:
            self.server.connected(voter_of(self.holder.grant))

    def on_frame(self, frame: Frame) -> None:
        if frame.sender != voter_of(self.holder.grant):
            raise FrameError("sender")
        self.server.deliver(self, frame)
        self.known = True


class _LinkServer(FrameServer):
    def __init__(
        self, owner: Transport, cluster_id: bytes, credentials: Credentials, count: Count
    ) -> None:
        super().__init__(
            "peer_tcp",
            cluster_id,
            Channel.PEER,
            credentials.server,
            count,
            connections_max=LINK_CONNECTIONS_MAX,
            body_bytes_max=8 << 20,
            write_bytes_max=1 << 16,
        )
        self._owner = owner

    def connection(self) -> FrameConnection:
        return _Inbound(self)

    def why_denied(self, holder: Holder) -> str:
        return super().why_denied(holder) or ("" if voter_of(holder.grant) else "no voter")

    def connected(self, voter: int) -> None:
        self._owner.poke(voter)

    def deliver(self, link: _Inbound, whole: Frame) -> None:
        if whole.parts != 1:
            raise FrameError("part")
        if self._owner.deliver_tcp(whole, whole.body, link.holder.serial):
            for other in [each for each in self.connections if each is not link]:
                if voter_of(other.holder.grant) == whole.sender:
                    other.close("earlier_run")


class _Link(asyncio.Protocol):
    """Our TLS link to one peer: a bounded queue and whatever connection there is now. Each
    connection begins with what ``greeting`` gives for who is at the other end."""

    def __init__(
        self,
        peer: int,
        cluster_id: bytes,
        credentials: Credentials,
        address: Callable[[], Address | None],
        greeting: Callable[[Holder], bytes],
        count: Count,
    ) -> None:
        self._greeting = greeting
        self._holder: Holder | None = None
        """Who is at the other end; None while nobody is who may be."""
        self._revoked: frozenset[str] = frozenset()
        self._peer = peer
        self._cluster_id = cluster_id
        self._credentials = credentials
        self._address = address
        self._count = count
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._poked = asyncio.Event()
        self._lost = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._writable = False

    def send(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)
        while self._queued_bytes > LINK_QUEUE_BYTES_MAX:
            self._queued_bytes -= len(self._queue.popleft())
            self._count("peer_tcp.queue_full")
        self._flush()

    def greet(self) -> None:
        """Say the greeting again, before what waits."""
        if self._transport is not None and self._holder is not None:
            self._transport.write(self._greeting(self._holder))

    def revoke(self, serials: frozenset[str]) -> None:
        """Who shows one of these certificates is told nothing, and left if it is connected."""
        self._revoked = serials
        if self._holder is not None and self._holder.serial in serials:
            self._leave("peer_tcp.revoked")

    def _leave(self, why: str) -> None:
        self._count(why)
        self._holder = None
        self._writable = False
        self._forget()
        self.close()

    def poke(self) -> None:
        """The peer was just seen to be there: connect now, if not connected."""
        self._poked.set()

    def _flush(self) -> None:
        while self._queue and self._writable and self._transport is not None:
            data = self._queue.popleft()
            self._queued_bytes -= len(data)
            self._transport.write(data)

    def _forget(self) -> None:
        self._queue.clear()
        self._queued_bytes = 0

    async def run(self) -> None:
        """Keep the link up. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_S_MIN
        while True:
            self._poked.clear()
            address = self._address()
            try:
                if address is None:
                    raise OSError("the host name is not known")
                self._lost.clear()
                async with asyncio.timeout(CONNECT_S_MAX):
                    await loop.create_connection(
                        lambda: self, *address, ssl=self._credentials.client
                    )
            except (OSError, TimeoutError) as error:
                trouble = tls_trouble(error)
                self._count("peer_tcp.tls_refused" if trouble else "peer_tcp.connect_failed")
                self._forget()  # what waited is old when the peer is back: it is sent anew
            else:
                since_s = loop.time()
                await self._lost.wait()
                if loop.time() - since_s > BACKOFF_S_MAX:
                    backoff_s = BACKOFF_S_MIN
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._poked.wait()
            backoff_s = min(BACKOFF_S_MAX, 2 * backoff_s)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's has its own class
        try:
            holder = other_end(transport.get_extra_info("ssl_object"), self._cluster_id)
        except ConfigError:
            self._leave("peer_tcp.wrong_voter")
            return
        if why_not_voter(holder.grant, self._peer):
            self._leave("peer_tcp.wrong_voter")
            return
        if holder.serial in self._revoked:
            self._leave("peer_tcp.revoked")
            return
        self._holder = holder
        self._writable = True
        keep_alive(transport)
        self.greet()
        self._flush()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Nothing is ever said on this side."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = self._holder = None
        self._writable = False
        self._lost.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Transport:
    """The sockets of one voter, but its clients'. Made by :meth:`open`."""

    def __init__(
        self,
        identity: Identity,
        cluster: ClusterConfig,
        credentials: Credentials,
        count: Count,
        on_input: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._cluster = cluster
        self._count = count
        self._on_input = on_input
        self._loop = asyncio.get_running_loop()
        self._me = cluster.voter(identity.sender)
        self._peers = frozenset(v for v in cluster.voter_ids if v != identity.sender)
        self._addresses: dict[int, Address] = {}
        self._inbox: list[Receive] = []
        self._udp_ready = False
        self._udp_silence = Silence()
        self.repairs_ready = False
        """Whether :meth:`drain_repairs` may have something."""
        self._reassembler = Reassembler()
        keys = credentials.keys
        if keys.voter is None or keys.stream is None:
            raise StartError(f"{credentials.folder}: keys.toml holds no voter key")
        self._keys = keys
        self._secret = secrets.token_bytes(KEY_BYTES)
        self._secret_told: set[str] = set()
        """Serials of the certificates of those who know it."""
        self._voter_key = keys.voter.first
        self._sealer = Sealer(Channel.PEER, identity, keys.voter.first, self._secret)
        self._opener = PeerOpener(identity.cluster_id, keys.voter)
        salt = secrets.token_bytes(STREAM_SALT_BYTES)
        self._stream_sealer = Sealer(Channel.STREAM, identity, keys.stream.first, salt)
        self._stream_opener = StreamOpener(identity.cluster_id, keys.stream)
        self._stream_address = (cluster.stream.group, cluster.stream.port)
        self._last_message: PeerMessage | None = None
        self._last_receiver = 0
        self._last_datagrams: list[bytes] | None = None
        self._last_frame = b""
        self._links = {
            peer: _Link(
                peer,
                identity.cluster_id,
                credentials,
                lambda peer=peer: self._addresses.get(peer),  # type: ignore[misc]
                self._told,
                count,
            )
            for peer in self._peers
        }
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[socket.socket] = []
        self._server = _LinkServer(self, identity.cluster_id, credentials, count)

    @classmethod
    async def open(
        cls,
        identity: Identity,
        cluster: ClusterConfig,
        credentials: Credentials,
        count: Count,
        on_input: Callable[[], None],
    ) -> Transport:
        """Bind all sockets; ``on_input`` is called whenever there is something to drain.
        Raises :class:`StartError` naming the port and its key."""
        self = cls(identity, cluster, credentials, count, on_input)
        try:
            await self._open()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def _open(self) -> None:
        loop, me, stream = self._loop, self._me, self._cluster.stream
        await self._resolve()
        self._udp = udp_socket()
        self._sockets.append(self._udp)
        key = f"voters: peer_port of voter {me.id}"
        try:
            self._udp.bind((me.host, me.peer_port))
        except OSError as error:
            raise bind_error(error, me.host, me.peer_port, key) from error
        try:
            self._multicast = multicast_sender(stream)
            self._sockets.append(self._multicast)
            self._repairs = multicast_receiver(stream, stream.repair_port, REPAIR_BUFFER_BYTES)
            self._sockets.append(self._repairs)
        except OSError as error:
            raise StartError(
                f"stream: cannot use group {stream.group} port {stream.repair_port} (stream.port "
                f"+ 1) on interface {stream.interface}: {error.strerror or error}"
            ) from error
        await self._server.listen(me.host, me.peer_port, key)
        loop.add_reader(self._udp, self._on_udp)
        loop.add_reader(self._repairs, self._on_repairs)
        self._tasks = [loop.create_task(link.run()) for link in self._links.values()]
        self._tasks.append(loop.create_task(self._resolve_for_ever()))

    def _on_udp(self) -> None:
        self._udp_ready = True
        self._on_input()

    def _on_repairs(self) -> None:
        self.repairs_ready = True
        self._on_input()

    # --- keys -------------------------------------------------------------------------------

    def _told(self, holder: Holder) -> bytes:
        """What each link says first."""
        self._secret_told.add(holder.serial)
        told = SealTold(self._voter_key.epoch, self._secret, self._sealer.counter)
        return frame(self._identity, Channel.PEER, encode_body(told))

    def use(self, keys: Keys) -> None:
        """Open with the keys of ``keys`` from now on, and seal with the first ones; with a new
        voter key from the next call on, so that peers have been told before it is used. To be
        called about once a second."""
        self._sealer.use(self._voter_key)
        if keys is self._keys or keys.voter is None or keys.stream is None:
            return
        self._keys = keys
        self._opener.use(keys.voter)
        self._stream_sealer.use(keys.stream.first)
        self._stream_opener.use(keys.stream)
        if keys.voter.first != self._voter_key:
            self._voter_key = keys.voter.first
            for link in self._links.values():
                link.greet()

    def revoke(self, serials: frozenset[str]) -> None:
        """These certificates are no longer good: nothing is taken from who holds one, and nothing
        that it was told seals any more. To be called whenever the list changed."""
        self._server.revoke(serials)
        self._opener.revoke(serials)
        for link in self._links.values():
            link.revoke(serials)
        if self._secret_told & serials:
            self._secret_told.clear()
            self._secret = secrets.token_bytes(KEY_BYTES)
            self._sealer.use(self._voter_key, self._secret)
            self._last_message = None
            for link in self._links.values():
                link.greet()

    def poke(self, voter: int) -> None:
        """Voter ``voter`` just connected to us: connect to it too, if we are not connected."""
        link = self._links.get(voter)
        if link is not None:
            link.poke()

    # --- between voters ---------------------------------------------------------------------

    def send(self, to: int, message: PeerMessage) -> None:
        """Send ``message`` to voter ``to``. The same message for several peers is encoded once if
        sent in succession."""
        if message is not self._last_message or self._last_receiver not in (0, to):
            self._encode(message, 0 if isinstance(message, TO_ALL) else to)
        if self._last_datagrams is None:
            self._links[to].send(self._last_frame)
            return
        address = self._addresses.get(to)
        if address is None:
            self._count("peer_udp.host_unknown")
            return
        try:
            for datagram in self._last_datagrams:
                self._udp.sendto(datagram, address)
        except BlockingIOError:
            self._count("peer_udp.send_buffer_full")
        except OSError:
            self._count("peer_udp.send_failed")

    def _encode(self, message: PeerMessage, receiver: int) -> None:
        body = encode_body(message)
        self._last_message = message
        self._last_receiver = receiver
        if len(body) > PEER_UDP_BODY_BYTES_MAX or isinstance(message, Fetch | Fetched):
            self._last_datagrams = None
            self._last_frame = frame(self._identity, Channel.PEER, body)
        else:
            self._last_datagrams = self._sealer.datagrams(body, receiver)

    def drain(self, datagrams_max: int) -> list[Receive]:
        """What came from peers since the last call: all of TCP, and at most ``datagrams_max``
        datagrams. Whatever is not a message of a peer is counted and dropped."""
        heard = self._inbox
        self._inbox = []
        if not self._udp_ready:
            return heard
        self._udp_ready = False
        receive = self._udp.recv
        taken = 0
        for _ in range(self._udp_silence.room(self._loop.time(), datagrams_max)):
            try:
                data = receive(RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                self._count("peer_udp.receive_failed")
                break
            taken += 1
            try:
                part = self._opener.open(data)
                if part.sender not in self._peers:
                    raise FrameError("sender")
                if part.receiver not in (0, self._me.id):
                    raise FrameError("receiver")
                body = self._reassembler.add(part)
                if body is not None:
                    heard.append(self._received(part, decode_peer(body)))
            except FrameError as error:
                self._count(f"peer_udp.dropped.{error.reason}")
        self._udp_silence.taken(taken)
        return heard

    def deliver_tcp(self, whole: Frame, body: bytes, serial: str) -> bool:
        """Take a message from a link whose other end showed the certificate ``serial``. Returns
        whether an earlier run of that voter ended by it, and so its links. Raises
        :class:`FrameError` if it is none of a peer."""
        if whole.sender not in self._peers:
            raise FrameError("sender")
        message = decode_link(body)
        if isinstance(message, SealTold):
            who = Identity(self._identity.cluster_id, whole.sender, whole.incarnation, whole.boot)
            try:
                ended = self._opener.told(
                    who, message.epoch, message.secret, message.counter, serial
                )
            except FrameError as error:
                if error.reason == "replay":
                    # Its disk may have been rolled back, and then it is to be told: the core does
                    # that to whoever speaks with an earlier boot. Nobody else minds.
                    self._inbox.append(self._received(whole, Poll(0, 0)))
                    self._on_input()
                raise
            self._on_input()
            return ended
        self._inbox.append(self._received(whole, message))
        self._on_input()
        return False

    def _received(self, part: Frame, message: PeerMessage) -> Receive:
        if isinstance(message, CatchUp):
            raise FrameError("body")
        return Receive(part.sender, part.incarnation, part.boot, message)

    # --- the stream -------------------------------------------------------------------------

    def publish(self, body: bytes) -> None:
        """Multicast one encoded stream message of at most DATAGRAM_BODY_BYTES_MAX bytes."""
        assert len(body) <= DATAGRAM_BODY_BYTES_MAX, "the stream's unit is the datagram"
        (data,) = self._stream_sealer.datagrams(body)
        try:
            self._multicast.sendto(data, self._stream_address)
        except BlockingIOError:
            self._count("stream.send_buffer_full")
        except OSError:
            self._count("stream.send_failed")

    def drain_repairs(
        self, datagrams_max: int, reports_max: int
    ) -> tuple[list[RepairRequest], list[ListenerReport]]:
        """Repair requests that name this voter, and reports of listeners; at most
        ``datagrams_max`` datagrams are taken, and of them ``reports_max`` reports looked at:
        further ones are dropped undecoded."""
        wanted: list[RepairRequest] = []
        reports: list[ListenerReport] = []
        self.repairs_ready = False
        for _ in range(datagrams_max):
            try:
                data = self._repairs.recv(RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                self._count("repair.receive_failed")
                break
            is_report = False
            try:
                body = self._stream_opener.open(data).body
                is_report = message_tag(body[:4]) == LISTENER_REPORT_TAG
                if is_report and reports_max <= 0:
                    self._count("report.too_many")
                    continue
                reports_max -= is_report
                message = decode_stream(body)
                if isinstance(message, RepairRequest):
                    if message.responder == self._me.id:
                        wanted.append(message)
                elif isinstance(message, ListenerReport) and sane(message):
                    reports.append(message)
                else:
                    raise FrameError("body")
            except FrameError as error:
                self._count(f"{'report' if is_report else 'repair'}.dropped.{error.reason}")
        return wanted, reports

    # --- the rest ---------------------------------------------------------------------------

    def sweep(self) -> None:
        """Close connections that are overdue. To be called about once a second."""
        self._server.sweep()

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        for peer in self._peers:
            entry = self._cluster.voter(peer)
            try:
                found = await loop.getaddrinfo(
                    entry.host, entry.peer_port, family=socket.AF_INET, type=socket.SOCK_DGRAM
                )
                self._addresses[peer] = (str(found[0][4][0]), entry.peer_port)
            except OSError:
                self._count("peer_udp.host_unknown")

    async def _resolve_for_ever(self) -> None:
        names = [self._cluster.voter(peer).host for peer in self._peers]
        if all(_is_address(name) for name in names):
            return
        while True:
            await asyncio.sleep(RESOLVE_S)
            await self._resolve()

    async def aclose(self) -> None:
        """Close all sockets. What waits in a link's queue is dropped."""
        loop = asyncio.get_running_loop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links.values():
            link.close()
        await self._server.aclose()
        for sock in self._sockets:
            loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
