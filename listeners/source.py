"""Where a listener's bytes come from: this module alone joins the multicast group.

It drains datagrams, decodes them totally (what is not for us is counted by reason and dropped),
multicasts repair requests, reports, and the repairs that others ask of this listener.  TCP is
``catchup``'s and ``relay``'s, what to believe ``trust``'s; order and state are
``trex_core.learner``'s and ``listener``'s.

A listener needs no more of it than :class:`Network` says: :class:`Sockets` is the real one, and a
recording can be played to a listener by another.

:class:`Source` uses ``add_reader`` of the running asyncio loop and a drain loop.  Measured with
600-byte datagrams, CPU per datagram, asyncio / uvloop: one at a time at 5,000/s 37 / 30 µs, with
``anyio.wait_readable`` 67 / 53 µs; under backlog 1.5 µs, either way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeAlias

from listeners.catchup import CatchupAnswer, CatchupClient, values_good
from listeners.credentials import Credentials
from listeners.relay import Relay, Revoked
from listeners.trust import Trust
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.messages import (
    CHAIN_BYTES,
    DATAGRAM_BYTES_MAX,
    LISTENER_REPORT_TAG,
    VOTER_ID_MAX,
    WORDS_BYTES,
    ListenerReport,
    RepairRequest,
    SnapshotOffer,
    StreamMessage,
    StreamRun,
    StreamTip,
    message_tag,
)
from trex_core.proof import tip_of
from trex_core.roster import REPORTS_PER_S_MAX, helper_address, sane
from trex_core.seal import STREAM_SALT_BYTES, Sealer, StreamOpener
from trex_core.shelf import Piece
from trex_core.silence import Silence
from trex_core.state import FixedRun
from trex_core.wire import (
    HEADER_BYTES,
    Channel,
    FrameError,
    Identity,
    Reassembler,
    decode_stream,
    encode_body,
)

RECEIVE_BUFFER_BYTES: Final = 8 << 20
"""Socket receive buffer asked for; the kernel may grant less (``net.core.rmem_max``)."""
TURN_DATAGRAMS_MAX: Final = 128
"""Most datagrams taken from one socket per turn of the loop, so that the loop stays fair."""
INBOX_DATAGRAMS_MAX: Final = 512
"""Most datagrams held undecoded; above it they wait in the kernel's buffer."""
REPORTS_HEARD_PER_S: Final = 4 * REPORTS_PER_S_MAX
"""Most listeners' reports taken in one second; what a flood brings beyond is dropped unread."""
ADDRESSES_MAX: Final = 1024
"""Most listeners whose address is remembered; the one heard last is forgotten last."""
REPAIR_AGAIN_S: Final = 0.005
"""What a repair could not say at once for its cap is tried again after so long."""
TIPS_TRIED_MAX: Final = 8
"""Of the tips in one batch of datagrams so many are looked at, newest first, as long as something
there is unproven."""
REFRESH_S: Final = 1.0
"""Whether credentials were written anew is looked at so often, in seconds."""
LOG: Final = logging.getLogger("trex.listener")
DROP_VARIABLE: Final = "TREX_TEST_DROP_PERCENT"
SEED_VARIABLE: Final = "TREX_TEST_DROP_SEED"
_SO_RCVBUFFORCE: Final = 33
"""Linux: ``SO_RCVBUF`` beyond ``rmem_max`` for a process that may (CAP_NET_ADMIN)."""

Keep: TypeAlias = Callable[[bytes], bool]
"""Test seam: called with each stream datagram as received; False drops it, as the network may."""


class SourceError(OSError):
    """The multicast group cannot be joined; the message says what to check."""


def drop_from_environment(name: str) -> Keep | None:
    """The test seam for processes: ``TREX_TEST_DROP_PERCENT=5`` drops that share of the received
    stream datagrams, drawn from ``TREX_TEST_DROP_SEED`` (default 0) and the listener's name.

    For tests only; nothing is dropped without it. Raises :class:`ConfigError` when it is no number
    from 0 to 100.
    """
    text = os.environ.get(DROP_VARIABLE, "")
    if not text:
        return None
    try:
        percent = float(text)
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise ConfigError(f"{DROP_VARIABLE} must be a number from 0 to 100, not {text!r}")
    return drop_share(percent / 100, f"{os.environ.get(SEED_VARIABLE, '0')}/{name}")


def drop_share(share: float, seed: str) -> Keep:
    """A filter that drops ``share`` (0..1) of all datagrams, reproducibly from ``seed``."""
    draw = random.Random(seed).random  # noqa: S311 - a test seam, not cryptography
    return lambda _data: draw() >= share


# --- what a listener needs of a network -----------------------------------------------------

Heard: TypeAlias = tuple[int, StreamMessage]
"""(voter id of the sender, 0 for a listener's repair request or report; the message)"""


class Stream(Protocol):
    """What is multicast, heard and said; used from one task: ``await wait(...)``, then ``take()``
    until it has no more. What it yields is decoded, sane and, of fixed slots and heartbeats, a
    voter's word; requests and reports are anybody's."""

    @property
    def instance(self) -> int:
        """By which others know this listener, until it ends; above VOTER_ID_MAX."""
        ...

    @property
    def helps(self) -> str:
        """The ``address:port`` where it serves catch-up to others; "" if it does not."""
        ...

    async def wait(self, until_s: float | None) -> None:
        """Wait until there is something to take, :meth:`wake` was called, or the loop's clock
        shows ``until_s``. Gives way to the loop once at least."""
        ...

    def take(self) -> Heard | None:
        """The next message; None when there is none now."""
        ...

    def wake(self) -> None:
        """End the current or the next :meth:`wait`."""
        ...

    def done(self, slot: int) -> None:
        """Everything up to ``slot`` was delivered; a hint, to forget what is no longer needed."""
        ...

    def begin(self, slot: int, chain: bytes) -> None:
        """All up to ``slot``, where the chain is ``chain``, is held already; a hint, to notice
        what contradicts it."""
        ...

    def delivered(self, run: FixedRun) -> None:
        """``run`` was delivered; a hint, to help others with it."""
        ...

    def request(self, wanted: RepairRequest) -> None:
        """Ask the group for a repair. Best effort; never raises."""
        ...

    def report(self, report: ListenerReport) -> None:
        """Tell the group. Best effort; never raises. One's own reports are not taken."""
        ...

    def close(self) -> None:
        """Neither hear nor say anything from now on. Again: does nothing."""
        ...


class Archives(Protocol):
    """Whoever serves catch-up, asked one thing at a time. Errors are :class:`CatchupError`; an
    answer that contradicts what is proven raises ``ContradictionError``."""

    async def entries(self, helper: int, first: int) -> CatchupAnswer:
        """Ask ``helper`` (the archive of a voter, or above VOTER_ID_MAX a listener) for fixed
        entries from slot ``first``."""
        ...

    async def snapshot(self, offer: SnapshotOffer, voters: Sequence[int]) -> bytes:
        """The offered snapshot, whole, from whichever of ``voters`` has it."""
        ...

    async def aclose(self) -> None:
        """End the conversation."""
        ...


class Network(Protocol):
    """Where a listener's bytes come from. Each method is called once, on the listener's loop, in
    this order; ``counters`` are the listener's, to count in, ``revoked`` says which certificates
    are no longer good."""

    def stream(self, counters: Counter[str]) -> Stream:
        """Raises :class:`SourceError`."""
        ...

    def archives(self, counters: Counter[str], revoked: Revoked) -> Archives:
        """The other half."""
        ...

    async def help(self, revoked: Revoked) -> None:
        """Serve other listeners until cancelled, or not at all."""
        ...


class Sockets:
    """The real network of ``cluster`` for listener ``name``; unfinished downloads lie in
    ``directory`` (None: where temporary files do). With ``helps`` it serves other listeners."""

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Credentials,
        name: str,
        directory: Path | None,
        keep: Keep | None,
        *,
        helps: bool,
    ) -> None:
        self._cluster = cluster
        self._credentials = credentials
        self._name = name
        self._directory = directory
        self._keep = keep
        self._helps = helps
        self._source: Source | None = None

    def stream(self, counters: Counter[str]) -> Source:
        """Joins the group. Raises :class:`SourceError`."""
        self._source = Source(
            self._cluster, self._credentials, counters, keep=self._keep, helps=self._helps
        )
        return self._source

    def archives(self, counters: Counter[str], revoked: Revoked) -> CatchupClient:
        """Connects when asked something."""
        assert self._source is not None, "stream() comes first"
        return CatchupClient(
            self._cluster,
            self._credentials,
            self._name,
            counters,
            self._directory,
            self._source.trust,
            addresses=self._source.addresses,
            revoked=revoked,
        )

    async def help(self, revoked: Revoked) -> None:
        """Serve until cancelled; at once over when this listener does not help."""
        assert self._source is not None, "stream() comes first"
        if self._source.relay is not None:
            await self._source.relay.serve(revoked)


# --- multicast ------------------------------------------------------------------------------


def _group_socket(cluster: ClusterConfig, port: int) -> socket.socket:
    """A socket bound to the cluster's group at ``port``, which hears it and sends to it."""
    stream = cluster.stream
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except OSError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        opened.bind((stream.group, port))
        group, interface = socket.inet_aton(stream.group), socket.inet_aton(stream.interface)
        opened.setsockopt(
            socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, struct.pack("4s4s", group, interface)
        )
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, stream.ttl)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    except OSError as error:
        opened.close()
        raise SourceError(
            error.errno,
            f"cannot join multicast group {stream.group}:{port} on interface {stream.interface}: "
            f"{error.strerror or error}; check [stream] group, port and interface in the cluster "
            "file",
        ) from error
    return opened


def _sane(message: StreamMessage) -> bool:
    """Whether the numbers and values of a decoded message can be worked with at all."""
    match message:
        case StreamRun():
            return (
                message.first >= 1
                and len(message.values) > 0
                and len(message.chain_before) == len(message.tip_chain) == CHAIN_BYTES
                and message.tip_slot >= message.first + len(message.values) - 1
                and values_good(message.values)
            )
        case StreamTip():
            return message.tip_slot >= 0 and len(message.tip_chain) == CHAIN_BYTES
        case RepairRequest():
            return 1 <= message.first <= message.last
        case ListenerReport():
            return sane(message)


class _Newest(NamedTuple):
    """The newest second of a voter's life of which it told in heartbeats; their signatures."""

    boot: int
    second: int
    words: set[bytes]


_NEVER: Final = _Newest(-1, -1, set())


class Source:
    """The listener's two multicast sockets and its wake-up.

    Use it from one task of an asyncio loop: ``await wait(...)``, then ``take()``.  ``counters``
    counts ``datagrams`` (received on the stream), ``dropped_<reason>``, ``repairs_sent``,
    ``reports_sent``, and of helping others ``repair.*`` and ``relay_*``.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Credentials,
        counters: Counter[str],
        *,
        keep: Keep | None = None,
        helps: bool = False,
    ) -> None:
        self.counters = counters
        self.trust = Trust(cluster, credentials, counters)
        self.addresses: dict[int, tuple[str, int]] = {}
        """Where listeners serve catch-up, by instance: what reports say."""
        self.relay: Relay | None = None
        self._cluster_id = cluster.cluster_id_bytes
        self._voters = frozenset(cluster.voter_ids)
        self._stream_address = (cluster.stream.group, cluster.stream.port)
        self._repair_address = (cluster.stream.group, cluster.stream.repair_port)
        self._keep = keep
        self._reassembler = Reassembler()
        self._inbox: deque[tuple[bool, bytes]] = deque()
        # The random incarnation marks what we say ourselves, which the group sends back to us.
        self.instance = VOTER_ID_MAX + 1 + secrets.randbelow((1 << 63) - VOTER_ID_MAX - 1)
        self._identity = Identity(self._cluster_id, incarnation=self.instance)
        ring = credentials.keys.stream
        if ring is None:
            raise ConfigError(f"{credentials.folder}: keys.toml holds no stream key")
        salt = secrets.token_bytes(STREAM_SALT_BYTES)
        self._sealer = Sealer(Channel.STREAM, self._identity, ring.first, salt)
        self._opener = StreamOpener(self._cluster_id, ring)
        self._believed: deque[Heard] = deque()
        self._newest: dict[int, _Newest] = {}
        self._credentials = credentials
        self._reports_left = REPORTS_HEARD_PER_S
        self._reports_second = 0
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False
        self._reading = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._refresh_s = 0.0
        self._stream_silence = Silence()
        self._repair_silence = Silence()
        self._stream = _group_socket(cluster, cluster.stream.port)
        try:
            self._repair = _group_socket(cluster, cluster.stream.repair_port)
        except SourceError:
            self._stream.close()
            raise
        self._pump: asyncio.Handle | None = None
        if helps:
            try:
                self.relay = Relay(cluster, credentials, self.trust, counters)
            except OSError as error:  # following is what matters
                fields = {"trex_fields": {"why": error.strerror or str(error)}}
                LOG.warning("listener.relay.unavailable", extra=fields)
        self._resume()

    @property
    def helps(self) -> str:
        """The ``address:port`` where it serves catch-up to others; "" if it does not."""
        return self.relay.address if self.relay is not None else ""

    # -- receiving --

    def _resume(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._stream.fileno(), self._drain, self._stream, False)
            self._loop.add_reader(self._repair.fileno(), self._drain, self._repair, True)

    def _pause(self) -> None:
        """Stop reading: datagrams wait in the kernel's buffer, and are lost when it is full."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._stream.fileno())
            self._loop.remove_reader(self._repair.fileno())

    def close(self) -> None:
        """Leave the group and close the sockets. Again: does nothing."""
        self._closed = True
        self._pause()
        if self._pump is not None:
            self._pump.cancel()
        if self.relay is not None:
            self.relay.close()
        self._stream.close()
        self._repair.close()

    def _drain(self, readable: socket.socket, is_repair: bool) -> None:
        inbox, keep = self._inbox, self._keep
        silence = self._repair_silence if is_repair else self._stream_silence
        most = min(TURN_DATAGRAMS_MAX, INBOX_DATAGRAMS_MAX - len(inbox))
        taken = 0
        try:
            for _ in range(silence.room(self._loop.time(), most)):
                # One byte more than allowed, so that an oversized datagram fails its length check.
                data = readable.recv(DATAGRAM_BYTES_MAX + 1)
                taken += 1
                if not is_repair:
                    self.counters["datagrams"] += 1
                    if keep is not None and not keep(data):
                        self.counters["dropped_by_test"] += 1
                        continue
                inbox.append((is_repair, data))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.counters["receive_errors"] += 1
        silence.taken(taken)
        if len(inbox) >= INBOX_DATAGRAMS_MAX:
            self._pause()
        if inbox:
            self.wake()

    def _report_too_many(self, body: bytes) -> bool:
        """Whether this is one report more than is taken in a second."""
        if message_tag(body[:4]) != LISTENER_REPORT_TAG:
            return False
        second = int(self._loop.time())
        if second != self._reports_second:
            self._reports_second, self._reports_left = second, REPORTS_HEARD_PER_S
        self._reports_left -= 1
        return self._reports_left < 0

    def _refresh(self) -> None:
        """Take up keys that were rotated and a certificate that was renewed."""
        self._refresh_s = self._loop.time() + REFRESH_S
        try:
            if not self._credentials.refresh():
                return
        except ConfigError as error:
            fields = {"trex_fields": {"why": str(error)}}
            LOG.error("listener.credentials.refused", extra=fields)  # noqa: TRY400 - says it all
            return
        ring = self._credentials.keys.stream
        if ring is not None:
            self._opener.use(ring)
            self._sealer.use(ring.first)
        LOG.info("listener.credentials.read")

    def wake(self) -> None:
        """End the current or the next :meth:`wait`."""
        self._woken = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self, until_s: float | None) -> None:
        """Wait until something was received, :meth:`wake` was called, or the loop's clock shows
        ``until_s``. When something is left to take it gives way for one turn of the loop only."""
        if self._loop.time() >= self._refresh_s:
            self._refresh()
        if not self._reading and not self._closed and len(self._inbox) < INBOX_DATAGRAMS_MAX // 2:
            self._resume()
        if self._woken or self._inbox or self._believed:
            await asyncio.sleep(0)
        else:
            waiter = self._waiter = self._loop.create_future()
            timer = None if until_s is None else self._loop.call_at(until_s, self.wake)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        self._woken = False

    def take(self) -> Heard | None:
        """The next message, decoded and checked; None when there is none now. What is said of fixed
        slots is proven by a voter's signature. Raises ``ContradictionError``."""
        if not self._believed and self._inbox:
            self._take_inbox()
        return self._believed.popleft() if self._believed else None

    def done(self, slot: int) -> None:
        """Everything up to ``slot`` was delivered."""
        self.trust.proof.done(slot)

    def begin(self, slot: int, chain: bytes) -> None:
        """All up to ``slot`` is held already."""
        self.trust.proof.begin(slot, chain)

    def delivered(self, run: FixedRun) -> None:
        """``run`` was delivered."""
        self.trust.delivered(run)

    def _take_inbox(self) -> None:
        """Open and decode all that came, and let what is proven by it be taken."""
        inbox, believed = self._inbox, self._believed
        runs: list[tuple[int, StreamRun]] = []
        proven: list[tuple[int, StreamRun]] = []
        tips: list[Heard] = []
        anchors: list[tuple[int, bytes]] = []
        while inbox:
            is_repair, data = inbox.popleft()
            try:
                heard = self._decode(data, is_repair)
            except FrameError as error:
                self._count(f"dropped_{error.reason}")
                continue
            if heard is None:
                continue
            sender, message = heard
            if isinstance(message, StreamRun):
                runs.append((sender, message))
            elif isinstance(message, StreamTip):
                tips.append(heard)
                anchors.append((message.tip_slot, message.tip_chain))
            else:
                believed.append(heard)
        proof = self.trust.proof
        drawn: bool | None = None  # of a run alone, which is drawn once as any other
        if len(runs) == 1 and not anchors:
            drawn = self.trust.may_verify()
            alone = proof.alone(*runs[0]) if drawn else None
            if alone is not None:
                believed.extend(alone)
                return
        if runs or anchors:
            proven += proof.proven(runs, anchors)
        # The newest tip proves all runs before it, up to the first that was lost; the newest
        # before that proves what is before, and so on. Where there is more than is looked at, it
        # is drawn: a forger would claim the highest.
        if len(runs) > TIPS_TRIED_MAX:
            random.shuffle(runs)
        else:
            runs.sort(key=lambda each: each[1].tip_slot, reverse=True)
        unproven = (
            run
            for _, run in runs
            if proof.waits(run) and (self.trust.may_verify() if drawn is None else drawn)
        )
        for run in islice(unproven, TIPS_TRIED_MAX):
            if proof.tip(tip_of(run)):
                tip = (run.tip_slot, run.tip_chain)
                proven += proof.proven([], [tip])
        proven.sort(key=lambda each: each[1].first)  # a hole is to be seen as it is, not larger
        believed.extend(proven)
        believed.extend(tips)

    def _count(self, name: str) -> None:
        self.counters[name] += 1

    def _decode(self, data: bytes, is_repair: bool) -> Heard | None:
        whole = self._opener.open(data)
        if is_repair:
            if whole.sender == 0 and whole.incarnation == self.instance:
                return None
            if self._report_too_many(whole.body):
                raise FrameError("report_flood")
        elif whole.sender == 0:
            if whole.incarnation == self.instance:
                return None
        elif whole.sender not in self._voters:
            raise FrameError("sender")
        body = self._reassembler.add(whole)
        if body is None:
            return None
        message = decode_stream(body)
        from_listener = isinstance(message, RepairRequest | ListenerReport)
        if from_listener is not is_repair or not _sane(message):
            raise FrameError("body")
        again = isinstance(message, StreamRun) and message.repair
        if not is_repair and whole.sender == 0 and not again:
            raise FrameError("sender")  # a listener tells again, and that is all
        match message:
            case StreamTip():
                self._check_words(whole.sender, message, body)
            case ListenerReport():
                self._note_address(message)
            case RepairRequest(responder=responder) if responder == self.instance:
                self._repair_later(message)
            case _:
                pass
        return whole.sender, message

    def _note_address(self, report: ListenerReport) -> None:
        """Where that listener helps, if it does."""
        self.addresses.pop(report.instance, None)
        address = helper_address(report.helps)
        if address is not None and not report.leaving:
            self.addresses[report.instance] = address
            if len(self.addresses) > ADDRESSES_MAX:
                del self.addresses[next(iter(self.addresses))]

    def _check_words(self, sender: int, message: StreamTip, body: bytes) -> None:
        """A heartbeat says much of its voter, all of it signed. None is taken twice, or after one
        of a later second: recorded ones must neither hide that the stream fell silent, nor cost a
        look at their signatures each time. One of an earlier boot is told on, for it may be that a
        disk was rolled back, but no more of them than of forgeries."""
        boot, second = message.digest.boot, message.digest.uptime_s
        newest = self._newest.get(sender, _NEVER)
        if boot == newest.boot and (second < newest.second or message.words in newest.words):
            raise FrameError("replay")
        if not self.trust.may_verify():
            raise FrameError("signature_flood")
        said = body[:-WORDS_BYTES]
        if message.signer != sender or not self.trust.words(sender, said, message.words):
            raise FrameError("signature")
        if not self.trust.proof.tip(tip_of(message)):
            raise FrameError("signature")
        if boot < newest.boot:
            self.trust.spend()
        elif (boot, second) > (newest.boot, newest.second):
            self._newest[sender] = _Newest(boot, second, {message.words})
        else:
            newest.words.add(message.words)

    # -- sending --

    def request(self, wanted: RepairRequest) -> None:
        """Multicast a repair request. Best effort: what the network refuses is counted."""
        self._say(wanted, "repairs_sent")

    def report(self, report: ListenerReport) -> None:
        """Multicast a report. Best effort: what the network refuses is counted."""
        self._say(report, "reports_sent")

    def _say(self, message: RepairRequest | ListenerReport, counter: str) -> None:
        self._send(encode_body(message), self._repair_address, counter)

    def _send(self, body: bytes, address: tuple[str, int], counter: str) -> None:
        (data,) = self._sealer.datagrams(body)
        try:
            self._stream.sendto(data, address)
            self.counters[counter] += 1
        except OSError:
            self.counters["send_errors"] += 1

    # -- helping others --

    def _repair_later(self, wanted: RepairRequest) -> None:
        """Somebody asks this listener to repair."""
        if self.relay is None:
            return
        self.trust.shelf.request(wanted.first, wanted.last)
        if self._pump is None:
            self._pump = self._loop.call_soon(self._repair_now)

    def _repair_now(self) -> None:
        """Say again what was asked for, as fast as the cap allows."""
        self._pump = None
        if self._closed:
            return
        shelf = self.trust.shelf
        shelf.repair(self._loop.time(), self._tell)
        if shelf.waiting:
            self._pump = self._loop.call_later(REPAIR_AGAIN_S, self._repair_now)

    def _tell(self, piece: Piece) -> int:
        tip = self.trust.proof.newest
        if tip is None or not piece.values:
            return 0
        run = StreamRun(
            tip.ballot, piece.first, piece.chain_before, piece.values,
            tip.slot, tip.chain, True, tip.voter, tip.signature,
        )  # fmt: skip
        body = encode_body(run)
        self._send(body, self._stream_address, "repairs_told")
        return HEADER_BYTES + len(body)
