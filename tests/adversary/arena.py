"""A cluster under attack, in one loop: this module alone accounts for each hostile datagram.

Three real voters with journals and archives, a real listener, a client that writes, and an
:class:`Adversary` between them, which takes a share of the voters' datagrams away and sends windows
of hostile ones over real sockets.  Windows are small enough for the kernel to hold, and the next
one is sent when the last one was accounted for: each of its datagrams was received by everybody
who hears that door, and was dropped there for a reason that is right for its kind.  What is taken
again (a replay on the stream) is counted too, and changes nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from listeners import Lagged, Listener, Reset, open_listener
from listeners.credentials import Credentials
from listeners.source import Source, drop_share
from tests.adversary.hostile import (
    OUTSIDE,
    REPAIR,
    REPLAYED,
    STREAM,
    Adversary,
    Recording,
    Said,
    Window,
    allowed,
    channel_of,
    door_of,
)
from tests.credentials import folder
from tests.e2e.harness import all_config, put
from tests.voters.here import SOON_S, Here, some_cluster
from trex_core.cluster import ClusterConfig
from trex_core.messages import DATAGRAM_BYTES_MAX
from trex_core.seal import StreamOpener
from trex_core.wire import HEADER_BYTES, Channel, encode_body
from voters.driver import Driver, open_driver
from voters.server import Voter
from voters.transport import multicast_receiver, multicast_sender

WINDOW_DATAGRAMS = 64
"""Most datagrams of a window, if not told otherwise."""
KERNEL_BYTES = 4096
"""More than the kernel takes of a socket's buffer for a datagram of the largest size."""
KEEP_BACK_EVERY = 16
"""Of the voters' datagrams each such one never arrives."""
RECORDED_MIN = {STREAM: 100, REPAIR: 20}
PEER_RECORDED_MIN = 100
"""What is recorded of each door before the flood begins."""
RECORD_S = 60.0
"""Longest that may take, or a write."""
PROMISED_BYTES = (10, 100, 700, 3_000)
"""Sizes of the values written: of one slot a datagram, of many, of several datagrams."""


class Violation(AssertionError):  # noqa: N818 - a finding, not an error of the program
    """Something that must never be: what, and where to look."""


class Tap:
    """A socket of a node, with an ear on it: the adversary may keep back what it sends, and what
    it receives of the present window is counted."""

    def __init__(self, arena: Arena, sock: socket.socket) -> None:
        self._arena = arena
        self._sock = sock
        self.keep_back: Callable[[bytes, tuple[str, int]], bool] = lambda _data, _address: False
        self.received = 0

    def sendto(self, data: bytes, address: tuple[str, int]) -> int:
        if self.keep_back(data, address):
            return len(data)
        return self._sock.sendto(data, address)

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(size)
        if data[:DATAGRAM_BYTES_MAX] in self._arena.awaited:
            self.received += 1
            if self.received == self._arena.window_size:
                # Later, when what is done with this last one was counted.
                asyncio.get_running_loop().call_soon(self._arena.stirred.set)
        return data

    def __getattr__(self, name):
        return getattr(self._sock, name)


class Ear:
    """Who hears a door: the socket, and the reasons for which it dropped something there."""

    def __init__(
        self, name: str, tap: Tap, counters: Callable[[], dict[str, int]], *prefixes: str
    ) -> None:
        self.name = name
        self.tap = tap
        self._counters = counters
        self._prefixes = prefixes
        self.room = tap.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // KERNEL_BYTES

    def dropped(self) -> Counter[str]:
        """By reason, of those that need no key."""
        counters = self._counters()
        found = Counter(
            {
                reason: sum(counters.get(prefix + reason, 0) for prefix in self._prefixes)
                for reason in OUTSIDE
            }
        )
        return +found


class Arena:
    """Made by :func:`open_arena`."""

    def __init__(self, cluster: ClusterConfig, here: Here, seed: int) -> None:
        self.cluster = cluster
        self.here = here
        self.seed = seed
        self.recording = Recording()
        self.adversary = Adversary(seed, cluster.cluster_id_bytes, self.recording)
        self.totals: Counter[tuple[str, str, str]] = Counter()
        """(kind, voters or stream or repair, reason or "taken again") -> how often, by anybody"""
        self.sent: Counter[str] = Counter()
        """By kind."""
        self.acknowledged: dict[str, tuple[str, int]] = {}
        self.stirred = asyncio.Event()
        self.awaited: frozenset[bytes] = frozenset()
        self.window_size = 0
        self.listener: Listener
        self.driver: Driver
        self._ears: dict[str, list[Ear]] = {STREAM: [], REPAIR: []}
        self._said: Counter[tuple[int, int, object]] = Counter()
        self._wrong: list[str] = []
        self._changed: dict[str, int] = {}
        self._count = 0
        self._enough = False
        self._sender = multicast_sender(cluster.stream)
        stream = cluster.stream
        self._addresses = {
            STREAM: (stream.group, stream.port),
            REPAIR: (stream.group, stream.repair_port),
            **{door_of(v.id): (v.host, v.peer_port) for v in cluster.voters},
        }

    # --- ears -------------------------------------------------------------------------------

    def listen_at(self, voter: Voter, number: int) -> None:
        """Put an ear on a voter: its two sockets, and what its core says."""
        transport = voter._transport
        peer, repair = Tap(self, transport._udp), Tap(self, transport._repairs)
        transport._udp, transport._repairs = peer, repair
        door = {self._addresses[door_of(v)]: door_of(v) for v in self.cluster.voter_ids}
        count = itertools.count(1)

        def keep_back(data: bytes, address: tuple[str, int]) -> bool:
            lost = next(count) % KEEP_BACK_EVERY == 0
            said = Said(data, encode_body(transport._last_message))
            self.recording.note(door[address], said, arrived=not lost)
            return lost

        peer.keep_back = keep_back
        send = transport.send

        def sending(to: int, message: object) -> None:
            self._said[number, to, message] += 1
            send(to, message)

        transport.send = sending
        self._ears[door_of(number)] = [
            Ear(door_of(number), peer, lambda: voter.counters, "peer_udp.dropped.")
        ]
        self._ears[REPAIR].append(
            Ear(
                door_of(number), repair, lambda: voter.counters, "repair.dropped.",
                "report.dropped.",
            )
        )  # fmt: skip

    def compare(self, voter: Voter, number: int) -> None:
        """From now on whatever a voter's core is told must have been said by who is named, to this
        voter, so often."""
        drain = voter._transport.drain

        def drained(datagrams_max: int) -> list:
            heard = drain(datagrams_max)
            for each in heard:
                key = each.sender, number, each.message
                self._said[key] -= 1
                if self._said[key] < 0:
                    self._wrong.append(
                        f"voter {number} heard what {each.sender} never said: {each}"
                    )
                if not self._said[key]:
                    del self._said[key]
            return heard

        voter._transport.drain = drained

    def listen_to(self, listener: Listener) -> None:
        """Put an ear on the listener."""
        self.listener = listener
        source = listener._source
        assert isinstance(source, Source)
        source._pause()
        source._stream, source._repair = Tap(self, source._stream), Tap(self, source._repair)
        source._resume()
        for door, tap in ((STREAM, source._stream), (REPAIR, source._repair)):
            ear = Ear("listener", tap, lambda: listener.counters, "dropped_")
            self._ears[door].append(ear)

    # --- genuine traffic --------------------------------------------------------------------

    async def write(self) -> None:
        """Write one key after another until :meth:`quiet`."""
        for number in itertools.count(1):
            if self._enough:
                return
            size = PROMISED_BYTES[number % len(PROMISED_BYTES)]
            key, value = f"key/{number}", f"{number} ".ljust(size, ".")
            self.acknowledged[key] = (value, await put(self.driver, key, value))
            self.stirred.set()

    async def follow(self) -> None:
        """Note every change that the listener tells of."""
        async for delivery in self.listener.changes(since=0, prefix="key/"):
            if isinstance(delivery, Lagged | Reset):
                self._wrong.append(f"the listener tells {delivery}")
                continue
            for change in delivery.changes:
                if change.key in self._changed:
                    self._wrong.append(f"the listener tells {change.key} twice")
                self._changed[change.key] = delivery.slot

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds, asked whenever something was received or acknowledged."""
        async with asyncio.timeout(SOON_S):
            while not holds():
                self.stirred.clear()
                await self.stirred.wait()

    # --- the flood --------------------------------------------------------------------------

    def send(self, door: str, datagrams: list[bytes]) -> None:
        """Send, and account for nothing."""
        for data in datagrams:
            self._sender.sendto(data, self._addresses[door])

    def room(self, door: str) -> int:
        """How many datagrams the kernel holds for everybody who hears ``door``."""
        return min(ear.room for ear in self._ears[door])

    async def flood(
        self,
        datagrams: int,
        window_datagrams: int = WINDOW_DATAGRAMS,
        tell: Callable[[int], None] = lambda _sent: None,
    ) -> None:
        """Send that many hostile datagrams, in windows. Raises :class:`Violation`."""
        end = self.sent.total() + datagrams
        while (left := end - self.sent.total()) > 0:
            door = self.adversary.chance.choice(list(self._addresses))
            window = self.adversary.window(door, min(left, window_datagrams, self.room(door)))
            if window is not None:
                await self.feed(window)
                tell(self.sent.total())

    async def feed(self, window: Window) -> None:
        """Send a window, of which there is :meth:`room`, and account for it. Raises
        :class:`Violation`."""
        kind, door, datagrams = window
        self._count += 1
        ears, size = self._ears[door], len(datagrams)
        before = [ear.dropped() for ear in ears]
        for ear in ears:
            ear.tap.received = 0
        self.window_size = size
        self.awaited = frozenset(data[:DATAGRAM_BYTES_MAX] for data in datagrams)
        self.send(door, datagrams)
        inbox = self.listener._source._inbox
        try:
            await self.until(lambda: all(ear.tap.received >= size for ear in ears))
            async with asyncio.timeout(SOON_S):
                while inbox:
                    await asyncio.sleep(0)  # a turn of the loop: the listener is about to decode it
        except TimeoutError:
            heard = {ear.name: ear.tap.received for ear in ears}
            raise self._violation(window, f"received by {heard} after {SOON_S} s") from None
        taken_again = kind == REPLAYED and channel_of(door) == Channel.STREAM
        for ear, earlier in zip(ears, before, strict=True):
            dropped = ear.dropped() - earlier
            fewest = 0 if taken_again else size
            if not fewest <= dropped.total() <= size:
                raise self._violation(window, f"{ear.name} dropped {dict(dropped)}")
            if not allowed(kind) >= dropped.keys():
                raise self._violation(window, f"{ear.name}: wrong reasons in {dict(dropped)}")
            where = door if channel_of(door) == Channel.STREAM else "voters"
            for reason, number in dropped.items():
                self.totals[kind, where, reason] += number
            if taken_again:
                self.totals[kind, where, "taken again"] += size - dropped.total()
        self.sent[kind] += size
        if self._wrong:
            raise self._violation(window, "; ".join(self._wrong[:3]))
        for number, voter in self.here.running.items():
            if voter.failure is not None:
                raise self._violation(window, f"voter {number} failed: {voter.failure}")

    def _violation(self, window: Window, what: str) -> Violation:
        return Violation(
            f"seed {self.seed}, window {self._count}: {len(window.datagrams)} datagrams of kind "
            f"{window.kind!r} to {window.door}: {what}; the first begins "
            f"{window.datagrams[0][:HEADER_BYTES].hex()}"
        )

    async def quiet(self, writing: asyncio.Task[None]) -> None:
        """End the writing and look at everything. Raises :class:`Violation`."""
        self._enough = True
        async with asyncio.timeout(SOON_S):
            await writing
        last = await put(self.driver, "last", "yes")
        await self.listener.wait_applied(last, SOON_S)
        await self.here.until(
            lambda: all(voter.state.fixed >= last for voter in self.here.running.values())
        )
        await self.until_told()
        config = await all_config(self.driver)
        fixed = {key: row for key, row in config.items() if key.startswith("key/")}
        held = {
            key: (entry.value, entry.slot)
            for key, entry in self.listener.state.config.items()
            if key.startswith("key/")
        }
        chains = {voter.state.chain for voter in self.here.running.values()}
        counters = self.listener.counters
        for wrong, what in (
            (fixed != self.acknowledged, "the voters hold something else than was acknowledged"),
            (held != self.acknowledged, "the listener holds something else than was acknowledged"),
            (
                self._changed != {key: slot for key, (_, slot) in self.acknowledged.items()},
                "the listener told of something else than was acknowledged",
            ),
            (self.listener.applied == last and chains != {self.listener._chain}, "chains differ"),
            (self.listener.applied != last, "somebody else wrote"),
            (counters["chain_mismatch"] or counters["resets"], "the listener lost its way"),
            (self._wrong, "; ".join(self._wrong[:3])),
        ):
            if wrong:
                raise Violation(f"seed {self.seed}, after {self.sent.total()} datagrams: {what}")

    async def until_told(self) -> None:
        """Wait until each acknowledged write was told by the listener, too."""
        async with asyncio.timeout(SOON_S):
            while len(self._changed) < len(self.acknowledged) and not self._wrong:
                await asyncio.sleep(0)  # turns of the loop: it is applied, and told next


async def overhear(
    cluster: ClusterConfig, keys: Path, recording: Recording, seed: int, *, peers: bool = True
) -> None:
    """Record the stream, with a listener that misses a share of it and so asks for repairs, until
    there is enough of it and (``peers``) of what others record between voters. ``keys`` is the
    folder of a listener's credentials."""
    loop, stream, heard = asyncio.get_running_loop(), cluster.stream, asyncio.Event()
    ring = Credentials(keys, cluster.cluster_id_bytes).keys.stream
    assert ring is not None
    opener = StreamOpener(cluster.cluster_id_bytes, ring)
    wanted = dict(RECORDED_MIN)
    if peers:
        wanted |= {door_of(voter): PEER_RECORDED_MIN for voter in cluster.voter_ids}
    ears = {
        STREAM: multicast_receiver(stream, stream.port, 1 << 20),
        REPAIR: multicast_receiver(stream, stream.repair_port, 1 << 20),
    }

    def hear(door: str) -> None:
        data = ears[door].recv(2 * DATAGRAM_BYTES_MAX)
        recording.note(door, Said(data, opener.open(data).body))
        heard.set()

    try:
        for door, ear in ears.items():
            loop.add_reader(ear, hear, door)
        keep = drop_share(0.3, str(seed))
        async with (
            asyncio.timeout(RECORD_S),
            open_listener(cluster, keys, name="lossy", seed=seed, keep=keep),
        ):
            while any(len(recording.taken.get(d, ())) < n for d, n in wanted.items()):
                heard.clear()
                await heard.wait()
    finally:
        for ear in ears.values():
            loop.remove_reader(ear)
            ear.close()


@asynccontextmanager
async def open_arena(directory: Path, seed: int) -> AsyncIterator[Arena]:
    """A cluster that has begun to commit, with enough recorded. When the block ends all is looked
    at: raises :class:`Violation`, or what ended a node."""
    async with AsyncExitStack() as held:
        cluster = held.enter_context(some_cluster())
        here = await held.enter_async_context(Here(cluster, directory))
        await here.start()
        await here.leader()
        arena = Arena(cluster, here, seed)
        held.callback(arena._sender.close)
        others = len(here.running) - 1
        await here.until(
            lambda: all(
                len(voter._transport._opener._told) == others for voter in here.running.values()
            )
        )
        for number, voter in here.running.items():
            arena.listen_at(voter, number)
        ticks = {voter: voter.state.tick for voter in here.running.values()}
        await here.until(lambda: all(voter.state.tick > tick + 1 for voter, tick in ticks.items()))
        for number, voter in here.running.items():  # what was said before has arrived
            arena.compare(voter, number)
        keys = folder(cluster, "listener")
        arena.listen_to(
            await held.enter_async_context(open_listener(cluster, keys, name="target", seed=seed))
        )
        arena.driver = await held.enter_async_context(
            open_driver(cluster, folder(cluster), deadline_s=RECORD_S)
        )
        following = asyncio.create_task(arena.follow())
        writing = asyncio.create_task(arena.write())
        try:
            await overhear(cluster, keys, arena.recording, seed)
            yield arena
            await arena.quiet(writing)
        finally:
            for task in (following, writing):
                task.cancel()
            await asyncio.gather(following, writing, return_exceptions=True)
