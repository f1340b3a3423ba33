"""A pretend backbone for listener tests: real frames over real sockets, no consensus behind them.

It keeps one log of fixed slots, multicasts runs and tips of it as voters do, answers repair
requests as the voter they name, and serves catch-up as every voter's archive, with the knobs the
tests turn: retention, snapshots, silence, breaking off.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

from msgspec.structs import replace

from dashboard.ports import PortBlock
from tests.credentials import on_stream, papers, stream_opener
from trex_core.access import voter_name
from trex_core.cluster import ClusterConfig, StreamConfig, VoterEntry
from trex_core.messages import (
    WORDS_BYTES,
    AskOther,
    Ballot,
    CatchupEntries,
    CatchupMessage,
    CatchupRequest,
    Genesis,
    Kind,
    ListenerReport,
    RepairRequest,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
    StreamMessage,
    StreamRun,
    StreamTip,
    Value,
    VoterDigest,
    encode_value,
)
from trex_core.seal import SIGNATURE_BYTES, Signer
from trex_core.state import chain_next, chain_start
from trex_core.wire import (
    DATAGRAM_BODY_BYTES_MAX,
    Channel,
    FrameBuffer,
    FrameError,
    Identity,
    decode_catchup,
    decode_stream,
    encode_body,
    frame,
)

BALLOT = Ballot(0, 1, 1)
DIGEST = VoterDigest("leader", BALLOT, 0, 0, 0, 0, 0, 0, "test")
CHUNK_BYTES = 1000


BLOCKS_HELD: Final = 32
_blocks: deque[PortBlock] = deque()


def free_ports() -> tuple[int, ...]:
    """Ports that nobody else takes, if they are bound or not: no other test, and not the kernel for
    whoever sends or connects. Held for the newest BLOCKS_HELD that asked; a test needs one or two.
    """
    _blocks.append(PortBlock())
    if len(_blocks) > BLOCKS_HELD:
        _blocks.popleft().close()
    return _blocks[-1].ports


def make_cluster(voters: int = 3) -> ClusterConfig:
    """A cluster file's contents, with a group and ports of its own."""
    draw = random.SystemRandom()
    stream_port, _repair_port, *ports = free_ports()
    return ClusterConfig(
        name="test",
        cluster_id=f"{draw.getrandbits(128):032x}",
        voters=tuple(
            VoterEntry(v + 1, "127.0.0.1", *ports[v * 3 : v * 3 + 3], directory=f"voter{v + 1}")
            for v in range(voters)
        ),
        stream=StreamConfig(
            group=f"239.255.{draw.randrange(1, 255)}.{draw.randrange(1, 255)}",
            port=stream_port,
        ),
    )


class Backbone:
    """The pretend voters of ``cluster``. ``log[n - 1]`` is the value of slot n."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.identity = Identity(cluster.cluster_id_bytes)
        self.log: list[bytes] = []
        self.chains = [chain_start(cluster.cluster_id_bytes)]
        self.counted: Counter[str] = Counter()
        self.heartbeats = 0
        self.requests: list[RepairRequest] = []
        self.reports: list[ListenerReport] = []
        self.asked: list[tuple[int, CatchupMessage]] = []
        # knobs
        self.repairs = True
        self.mute = False  # nothing is multicast: as if all leaders were gone
        self.retained_from = 1
        self.snapshot: tuple[int, bytes] | None = None
        self.silent: set[int] = set()
        self.down: set[int] = set()
        self.break_at: dict[int, int] = {}  # voter -> offset of a snapshot where it hangs up
        self.entries_max = 512
        self._stirred = asyncio.Event()
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._signers: dict[int, Signer] = {}
        self._opener = stream_opener(cluster)
        self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sender.setsockopt(
            socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1")
        )
        self.sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
        genesis = Genesis(cluster.voter_ids, tuple(v * 7 for v in cluster.voter_ids))
        self.genesis = genesis
        self.append(Value(Kind.GENESIS, BALLOT, command=encode_body(genesis)))

    def close(self) -> None:
        self.sender.close()

    # -- the log --

    @property
    def tip(self) -> int:
        return len(self.log)

    def append(self, *values: Value) -> int:
        """Fix ``values`` in the next slots; nothing is sent. Returns the last slot."""
        for value in values:
            data = encode_value(value)
            self.log.append(data)
            self.chains.append(chain_next(self.chains[-1], len(self.log), data))
        return len(self.log)

    # -- the stream --

    def send_raw(self, data: bytes, *, repair_port: bool = False) -> None:
        stream = self.cluster.stream
        self.sender.sendto(data, (stream.group, stream.repair_port if repair_port else stream.port))

    def send(self, message: StreamMessage, sender: int = 1) -> None:
        identity = Identity(self.identity.cluster_id, sender, 7, 1)
        for part in self.sealed(identity, encode_body(message)):
            self.send_raw(part)

    def sealed(self, identity: Identity, body: bytes) -> list[bytes]:
        """``body`` as datagrams of the stream, by ``identity``."""
        return on_stream(self.cluster, identity, body)

    def run(self, first: int, last: int, *, repair: bool = False) -> StreamRun:
        return StreamRun(
            BALLOT,
            first,
            self.chains[first - 1],
            tuple(self.log[first - 1 : last]),
            self.tip,
            self.chains[self.tip],
            repair,
            1,
            self.signer(1).tip(BALLOT, self.tip, self.chains[self.tip]),
        )

    def signer(self, voter: int) -> Signer:
        """Signs as ``voter``."""
        if voter not in self._signers:
            own = papers(self.cluster, voter_name(voter)).keys.signing
            self._signers[voter] = Signer(own, self.cluster.cluster_id_bytes, voter)
        return self._signers[voter]

    def signed(self, tip: StreamTip, voter: int) -> StreamTip:
        """``tip`` as ``voter`` signs it."""
        signer = self.signer(voter)
        signature = signer.tip(tip.ballot, tip.tip_slot, tip.tip_chain)
        tip = replace(tip, signer=voter, signature=signature, words=bytes(SIGNATURE_BYTES))
        return replace(tip, words=signer.words(encode_body(tip)[:-WORDS_BYTES]))

    def stream(self, first: int, last: int, *, sender: int = 1, repair: bool = False) -> None:
        """Multicast slots ``first``..``last``, as many to a datagram as fit."""
        start = first
        while start <= last:
            end, size = start, 200 + len(self.log[start - 1])
            while end < last and size + len(self.log[end]) + 5 <= DATAGRAM_BODY_BYTES_MAX:
                size += len(self.log[end]) + 5
                end += 1
            if size <= DATAGRAM_BODY_BYTES_MAX:
                self.send(self.run(start, end, repair=repair), sender)
            start = end + 1

    def heartbeat(self, sender: int = 1) -> None:
        self.heartbeats += 1
        digest = replace(DIGEST, time_ms=self.heartbeats)  # no two are alike
        tip = StreamTip(BALLOT, sender == 1, self.tip, self.chains[-1], digest)
        self.send(self.signed(tip, sender), sender)

    # -- the voters' ears --

    @asynccontextmanager
    async def serving(self, heartbeat_s: float = 0.1) -> AsyncIterator[Backbone]:
        """Hear repair requests, serve catch-up, and heartbeat, until the block ends."""
        loop = asyncio.get_running_loop()
        stream = self.cluster.stream
        ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ears.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ears.bind((stream.group, stream.repair_port))
        ears.setsockopt(
            socket.IPPROTO_IP,
            socket.IP_ADD_MEMBERSHIP,
            socket.inet_aton(stream.group) + socket.inet_aton("127.0.0.1"),
        )
        ears.setblocking(False)
        loop.add_reader(ears.fileno(), self._hear, ears)
        servers = [
            await asyncio.start_server(
                lambda r, w, voter=entry.id: self._archive(voter, r, w),
                "127.0.0.1",
                entry.archive_port,
                ssl=papers(self.cluster, voter_name(entry.id)).server,
            )
            for entry in self.cluster.voters
        ]
        beating: asyncio.TimerHandle | None = None

        def beat() -> None:
            nonlocal beating
            self.heartbeat()
            self._stirred.set()
            beating = loop.call_later(heartbeat_s, beat)

        if heartbeat_s:
            beat()
        try:
            yield self
        finally:
            if beating is not None:
                beating.cancel()
            loop.remove_reader(ears.fileno())
            ears.close()
            for writer in list(self._open):
                writer.close()
            for server in servers:
                server.close()
                await server.wait_closed()
            while self._open:
                await asyncio.wait(list(self._open.values()), timeout=5)

    async def until(self, condition: Callable[[], bool], deadline_s: float = 20) -> None:
        """Wait until ``condition()``, looked at after each heartbeat and each answer."""
        async with asyncio.timeout(deadline_s):
            while not condition():
                self._stirred.clear()
                await self._stirred.wait()

    def _hear(self, ears: socket.socket) -> None:
        while True:
            try:
                data = ears.recv(2048)
            except BlockingIOError:
                return
            try:
                whole = self._opener.open(data)
                message = decode_stream(whole.body)
            except FrameError:
                continue
            if isinstance(message, ListenerReport):
                self.reports.append(message)
                self._stirred.set()
            if isinstance(message, RepairRequest):
                self.requests.append(message)
                held = message.first >= self.retained_from
                if self.repairs and held and message.responder not in self.down:
                    last = min(message.last, self.tip, message.first + 255)
                    self.counted[f"repaired_by_{message.responder}"] += 1
                    self.stream(message.first, last, sender=message.responder, repair=True)

    async def _archive(
        self, voter: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[writer] = task
        identity = Identity(self.identity.cluster_id, voter)
        buffer = FrameBuffer(self.identity.cluster_id, Channel.CATCHUP)
        try:
            while voter not in self.down and (data := await reader.read(1 << 16)):
                for whole in buffer.feed(data):
                    request = decode_catchup(whole.body)
                    self.asked.append((voter, request))
                    self._stirred.set()
                    answer = self.answer(voter, request)
                    if answer is None:
                        return
                    if voter in self.silent:
                        continue
                    writer.write(frame(identity, Channel.CATCHUP, encode_body(answer)))
                    await writer.drain()
        except (ConnectionError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            del self._open[writer]

    def entries(self, voter: int, first: int, last: int) -> CatchupEntries:
        """Slots ``first``..``last`` as the archive of ``voter`` tells them."""
        tip = self.signer(voter).signed_tip(self.tip, self.chains[self.tip])
        if first > last:
            return CatchupEntries(first, self.chains[last], (), tip, tip)
        end = self.signer(voter).signed_tip(last, self.chains[last])
        values = tuple(self.log[first - 1 : last])
        return CatchupEntries(first, self.chains[first - 1], values, end, tip)

    def answer(self, voter: int, request: CatchupMessage) -> CatchupMessage | None:
        """What ``voter`` answers; None: it hangs up."""
        if voter in self.down:
            return None
        match request:
            case CatchupRequest(first=first) if first > self.tip:
                return self.entries(voter, first, self.tip)
            case CatchupRequest(first=first) if first < self.retained_from:
                if self.snapshot is None:
                    return AskOther(0, "my log begins later and I have no snapshot")
                slot, data = self.snapshot
                digest = hashlib.blake2b(data, digest_size=32).digest()
                offer = SnapshotOffer(slot, self.chains[slot], len(data), digest)
                return self.signer(voter).offer(offer)
            case CatchupRequest(first=first):
                return self.entries(voter, first, min(self.tip, first + self.entries_max - 1))
            case SnapshotRequest(slot=slot, offset=offset):
                if self.snapshot is None or self.snapshot[0] != slot:
                    return AskOther(0, f"I have no snapshot at {slot}")
                if offset >= self.break_at.get(voter, 1 << 60):
                    return None
                return SnapshotChunk(slot, offset, self.snapshot[1][offset : offset + CHUNK_BYTES])
            case _:
                return AskOther(0, "that is no request")


def commands(*bodies: bytes, session: int, first_sequence: int) -> Iterable[Value]:
    """Values of consecutive commands of one session."""
    return (
        Value(Kind.COMMAND, BALLOT, 1_700_000_000_000, session, first_sequence + n, 1, body)
        for n, body in enumerate(bodies)
    )
