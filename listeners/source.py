"""Where a listener's bytes come from: the multicast group, and the voters' archives over TCP.

This module alone touches the listener's sockets.  It joins the group, drains datagrams, decodes
them totally (what is not for us is counted by reason and dropped), multicasts repair requests and
reports, and holds the catch-up conversation.  It knows no order and no state: those are
``trex_core.learner``'s and ``listener``'s.

A listener needs no more of it than :class:`Network` says: :class:`Sockets` is the real one, and a
recording can be played to a listener by another.

:class:`Source` uses ``add_reader`` of the running asyncio loop and a drain loop.  Measured with
600-byte datagrams, CPU per datagram, asyncio / uvloop: one at a time at 5,000/s 37 / 30 µs, with
``anyio.wait_readable`` 67 / 53 µs; under backlog 1.5 µs, either way.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import secrets
import socket
import struct
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Final, Protocol, TypeAlias

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from anyio.streams.tls import TLSAttribute, TLSStream

from listeners.credentials import Credentials, other_end, tls_trouble
from trex_core.access import why_not_voter
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.messages import (
    CHAIN_BYTES,
    DATAGRAM_BYTES_MAX,
    LISTENER_REPORT_TAG,
    WORDS_BYTES,
    AskOther,
    Ballot,
    CatchupEntries,
    CatchupMessage,
    CatchupRequest,
    ListenerReport,
    RepairRequest,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
    StreamMessage,
    StreamRun,
    StreamTip,
    decode_value,
    message_tag,
)
from trex_core.proof import Proof
from trex_core.roster import REPORTS_PER_S_MAX, sane
from trex_core.seal import SIGNATURE_BYTES, STREAM_SALT_BYTES, Sealer, StreamOpener, Verifier
from trex_core.wire import (
    Channel,
    Frame,
    FrameBuffer,
    FrameError,
    Identity,
    Reassembler,
    decode_catchup,
    decode_stream,
    encode_body,
    frame,
)

RECEIVE_BUFFER_BYTES: Final = 8 << 20
"""Socket receive buffer asked for; the kernel may grant less (``net.core.rmem_max``)."""
TURN_DATAGRAMS_MAX: Final = 128
"""Most datagrams taken from one socket per turn of the loop, so that the loop stays fair."""
INBOX_DATAGRAMS_MAX: Final = 512
"""Most datagrams held undecoded; above it they wait in the kernel's buffer."""
CONNECT_DEADLINE_S: Final = 2.0
"""Longest wait for a TCP connection to an archive, in seconds."""
ANSWER_DEADLINE_S: Final = 5.0
"""Longest wait for the whole answer to one catch-up request, in seconds."""
SNAPSHOT_BYTES_MAX: Final = 1 << 32
"""Largest snapshot a listener downloads, in bytes."""
REPORTS_HEARD_PER_S: Final = 4 * REPORTS_PER_S_MAX
"""Most listeners' reports taken in one second; what a flood brings beyond is dropped unread."""
FAILURES_PER_S: Final = 200
"""Most signatures found wrong in a second; further ones are not looked at before the next."""
TIPS_TRIED_MAX: Final = 8
"""Of the tips in one batch of datagrams so many are looked at, newest first, as long as something
there is unproven."""
REFRESH_S: Final = 1.0
"""Whether credentials were written anew is looked at so often, in seconds."""
LOG: Final = logging.getLogger("trex.listener")
DROP_VARIABLE: Final = "TREX_TEST_DROP_PERCENT"
SEED_VARIABLE: Final = "TREX_TEST_DROP_SEED"
_READ_BYTES: Final = 1 << 18
_SO_RCVBUFFORCE: Final = 33
"""Linux: ``SO_RCVBUF`` beyond ``rmem_max`` for a process that may (CAP_NET_ADMIN)."""

Keep: TypeAlias = Callable[[bytes], bool]
"""Test seam: called with each stream datagram as received; False drops it, as the network may."""


class SourceError(OSError):
    """The multicast group cannot be joined; the message says what to check."""


class CatchupError(Exception):
    """One catch-up conversation failed (``reason``); ask another voter."""

    def __init__(self, voter: int, reason: str) -> None:
        super().__init__(f"voter {voter}: {reason}")
        self.voter = voter
        self.reason = reason


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
CatchupAnswer: TypeAlias = CatchupEntries | SnapshotOffer | AskOther


class Stream(Protocol):
    """What is multicast, heard and said; used from one task: ``await wait(...)``, then ``take()``
    until it has no more. What it yields is decoded, sane and, of fixed slots and heartbeats, a
    voter's word; requests and reports are anybody's."""

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
    """The voters' archives, asked one thing at a time. Errors are :class:`CatchupError`."""

    async def entries(self, voter: int, first: int) -> CatchupAnswer:
        """Ask ``voter`` for fixed entries from slot ``first``."""
        ...

    async def snapshot(self, offer: SnapshotOffer, voters: Sequence[int]) -> bytes:
        """The offered snapshot, whole, from whichever of ``voters`` has it."""
        ...

    async def aclose(self) -> None:
        """End the conversation."""
        ...


class Network(Protocol):
    """Where a listener's bytes come from. Each method is called once, on the listener's loop;
    ``counters`` are the listener's, to count in."""

    def stream(self, counters: Counter[str]) -> Stream:
        """Raises :class:`SourceError`."""
        ...

    def archives(self, counters: Counter[str]) -> Archives:
        """The other half."""
        ...


class Sockets:
    """The real network of ``cluster`` for listener ``name``; unfinished downloads lie in
    ``directory`` (None: where temporary files do)."""

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Credentials,
        name: str,
        directory: Path | None,
        keep: Keep | None,
    ) -> None:
        self._cluster = cluster
        self._credentials = credentials
        self._name = name
        self._directory = directory
        self._keep = keep

    def stream(self, counters: Counter[str]) -> Source:
        """Joins the group. Raises :class:`SourceError`."""
        return Source(self._cluster, self._credentials, counters, keep=self._keep)

    def archives(self, counters: Counter[str]) -> CatchupClient:
        """Connects when asked something."""
        return CatchupClient(
            self._cluster, self._credentials, self._name, counters, self._directory
        )


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


def _values_good(values: tuple[bytes, ...]) -> bool:
    try:
        for value in values:
            decode_value(value)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


def _sane(message: StreamMessage) -> bool:
    """Whether the numbers and values of a decoded message can be worked with at all."""
    match message:
        case StreamRun():
            return (
                message.first >= 1
                and len(message.values) > 0
                and len(message.chain_before) == len(message.tip_chain) == CHAIN_BYTES
                and message.tip_slot >= message.first + len(message.values) - 1
                and _values_good(message.values)
            )
        case StreamTip():
            return message.tip_slot >= 0 and len(message.tip_chain) == CHAIN_BYTES
        case RepairRequest():
            return 1 <= message.first <= message.last
        case ListenerReport():
            return sane(message)


class Source:
    """The listener's two multicast sockets and its wake-up.

    Use it from one task of an asyncio loop: ``await wait(...)``, then ``take()``.  ``counters``
    counts ``datagrams`` (received on the stream), ``dropped_<reason>``, ``repairs_sent`` and
    ``reports_sent``.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Credentials,
        counters: Counter[str],
        *,
        keep: Keep | None = None,
    ) -> None:
        self.counters = counters
        self._cluster_id = cluster.cluster_id_bytes
        self._voters = frozenset(cluster.voter_ids)
        self._repair_address = (cluster.stream.group, cluster.stream.repair_port)
        self._keep = keep
        self._reassembler = Reassembler()
        self._inbox: deque[tuple[bool, bytes]] = deque()
        # The random incarnation marks what we say ourselves, which the group sends back to us.
        self._identity = Identity(self._cluster_id, incarnation=secrets.randbits(63) + 1)
        ring = credentials.keys.stream
        if ring is None:
            raise ConfigError(f"{credentials.folder}: keys.toml holds no stream key")
        salt = secrets.token_bytes(STREAM_SALT_BYTES)
        self._sealer = Sealer(Channel.STREAM, self._identity, ring.first, salt)
        self._opener = StreamOpener(self._cluster_id, ring)
        public = credentials.keys.public
        self._verifier = Verifier(public, self._cluster_id)
        self._proof = Proof(self._verify_tip, self._count)
        self._believed: deque[Heard] = deque()
        self._failures_left = FAILURES_PER_S
        self._failures_second = 0
        self._credentials = credentials
        self._reports_left = REPORTS_HEARD_PER_S
        self._reports_second = 0
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False
        self._reading = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._refresh_s = 0.0
        self._stream = _group_socket(cluster, cluster.stream.port)
        try:
            self._repair = _group_socket(cluster, cluster.stream.repair_port)
        except SourceError:
            self._stream.close()
            raise
        self._resume()

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
        self._stream.close()
        self._repair.close()

    def _drain(self, readable: socket.socket, is_repair: bool) -> None:
        inbox, keep = self._inbox, self._keep
        room = min(TURN_DATAGRAMS_MAX, INBOX_DATAGRAMS_MAX - len(inbox))
        try:
            for _ in range(room):
                # One byte more than allowed, so that an oversized datagram fails its length check.
                data = readable.recv(DATAGRAM_BYTES_MAX + 1)
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
        self._proof.done(slot)

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
        if runs or anchors:
            proven += self._proof.proven(runs, anchors)
        # The newest tip proves all runs before it, up to the first that was lost; the newest
        # before that proves what is before, and so on.
        runs.sort(key=lambda each: each[1].tip_slot, reverse=True)
        unproven = (run for _, run in runs if self._proof.waits(run))
        for run in islice(unproven, TIPS_TRIED_MAX):
            if self._may_verify() and self._proof.tip(run):
                tip = (run.tip_slot, run.tip_chain)
                proven += self._proof.proven([], [tip])
        proven.sort(key=lambda each: each[1].first)  # a hole is to be seen as it is, not larger
        believed.extend(proven)
        believed.extend(tips)

    def _count(self, name: str) -> None:
        self.counters[name] += 1

    def _verify_tip(
        self, voter: int, ballot: Ballot, slot: int, chain: bytes, signature: bytes
    ) -> bool:
        good = self._verifier.tip(voter, ballot, slot, chain, signature)
        self._failures_left -= not good
        return good

    def _may_verify(self) -> bool:
        """Whether a signature may be looked at: forgeries cost only so much a second."""
        second = int(self._loop.time())
        if second != self._failures_second:
            self._failures_second, self._failures_left = second, FAILURES_PER_S
        return self._failures_left > 0

    def _decode(self, data: bytes, is_repair: bool) -> Heard | None:
        whole = self._opener.open(data)
        if is_repair:
            if whole.sender == 0 and whole.incarnation == self._identity.incarnation:
                return None
            if self._report_too_many(whole.body):
                raise FrameError("report_flood")
        elif whole.sender not in self._voters:
            raise FrameError("sender")
        body = self._reassembler.add(whole)
        if body is None:
            return None
        message = decode_stream(body)
        from_listener = isinstance(message, RepairRequest | ListenerReport)
        if from_listener is not is_repair or not _sane(message):
            raise FrameError("body")
        if isinstance(message, StreamTip):
            self._check_words(whole.sender, message, body)
        return whole.sender, message

    def _check_words(self, sender: int, message: StreamTip, body: bytes) -> None:
        """A heartbeat says much of its voter, all of it signed."""
        if not self._may_verify():
            raise FrameError("signature_flood")
        said = body[:-WORDS_BYTES]
        good = message.signer == sender and len(message.words) == SIGNATURE_BYTES
        if not good or not self._verifier.words(sender, said, message.words):
            self._failures_left -= 1
            raise FrameError("signature")
        if not self._proof.tip(message):
            raise FrameError("signature")

    # -- sending --

    def request(self, wanted: RepairRequest) -> None:
        """Multicast a repair request. Best effort: what the network refuses is counted."""
        self._say(wanted, "repairs_sent")

    def report(self, report: ListenerReport) -> None:
        """Multicast a report. Best effort: what the network refuses is counted."""
        self._say(report, "reports_sent")

    def _say(self, message: RepairRequest | ListenerReport, counter: str) -> None:
        (data,) = self._sealer.datagrams(encode_body(message))
        try:
            self._stream.sendto(data, self._repair_address)
            self.counters[counter] += 1
        except OSError:
            self.counters["send_errors"] += 1


# --- catch-up over TCP ----------------------------------------------------------------------


class _Download:
    """A snapshot on its way: the bytes so far in an unnamed temporary file, and their digest."""

    def __init__(self, offer: SnapshotOffer, directory: Path | None) -> None:
        self.offer = offer
        self.offset = 0
        self.digest = hashlib.blake2b(digest_size=32)
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - kept open

    def add(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)

    def read(self) -> bytes:
        self.file.seek(0)
        return self.file.read()


class CatchupClient:
    """The TCP conversation with the voters' archives: one request, one answer, one at a time.

    The connection is kept for the next request to the same voter.  Each step has its deadline.
    ``counters`` counts ``catchup_requests``, ``catchup_bytes`` and ``snapshot_chunks``.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Credentials,
        name: str,
        counters: Counter[str],
        directory: Path | None,
    ) -> None:
        self._cluster = cluster
        self._credentials = credentials
        self._name = name
        self._counters = counters
        self._directory = directory
        self._identity = Identity(cluster.cluster_id_bytes)
        self._stream: TLSStream | None = None
        self._voter = 0
        self._buffer = FrameBuffer(cluster.cluster_id_bytes, Channel.CATCHUP)
        self._download: _Download | None = None

    async def aclose(self) -> None:
        """Close the connection and forget an unfinished download."""
        await self._hang_up()
        self._drop_download()

    async def entries(self, voter: int, first: int) -> CatchupAnswer:
        """Ask ``voter`` for fixed entries from slot ``first``.

        Raises :class:`CatchupError` when it cannot be reached, is silent beyond the deadline, or
        answers something else than was asked.
        """
        answer = await self._ask(voter, CatchupRequest(self._name, first))
        match answer:
            case CatchupEntries():
                good = (
                    answer.first == first
                    and len(answer.chain_before) == len(answer.tip_chain) == CHAIN_BYTES
                    and _values_good(answer.values)
                )
            case SnapshotOffer():
                good = (
                    answer.slot >= first
                    and len(answer.chain) == CHAIN_BYTES
                    and 0 < answer.size_bytes <= SNAPSHOT_BYTES_MAX
                )
            case AskOther():
                good = True
            case _:
                good = False
        if not good or not isinstance(answer, CatchupEntries | SnapshotOffer | AskOther):
            await self._hang_up()
            raise CatchupError(voter, f"answered with a wrong {type(answer).__name__}")
        return answer

    async def snapshot(self, offer: SnapshotOffer, voters: Sequence[int]) -> bytes:
        """Download the offered snapshot and return its bytes, verified by the offer's digest.

        ``voters`` are asked in turn: whoever fails is followed by the next at the offset reached,
        and it gives up when all failed in a row. An unfinished download is kept, and goes on when
        the same snapshot is offered again.  Raises :class:`CatchupError`.
        """
        held = self._download
        if held is None or held.offer.slot != offer.slot or held.offer.digest != offer.digest:
            self._drop_download()
            held = self._download = _Download(offer, self._directory)
        failed: CatchupError | None = None
        turn = failures = 0
        while held.offset < offer.size_bytes:
            voter = voters[turn % len(voters)]
            try:
                data = await self._chunk(voter, offer, held.offset)
            except CatchupError as error:
                failed = error
                failures += 1
                turn += 1
                if failures == len(voters):
                    raise CatchupError(voter, f"snapshot {offer.slot}: {failed.reason}") from failed
                self._counters["snapshot_resumed"] += 1
                continue
            failures = 0
            await anyio.to_thread.run_sync(held.add, data)
            self._counters["snapshot_chunks"] += 1
        good = held.digest.digest() == offer.digest
        try:
            if not good:
                voter = voters[turn % len(voters)]
                raise CatchupError(voter, f"snapshot {offer.slot} does not match its digest")
            return await anyio.to_thread.run_sync(held.read)
        finally:
            self._drop_download()

    async def _chunk(self, voter: int, offer: SnapshotOffer, offset: int) -> bytes:
        answer = await self._ask(voter, SnapshotRequest(offer.slot, offset))
        match answer:
            case SnapshotChunk(slot=offer.slot, offset=at, data=data) if at == offset and data:
                if offset + len(data) <= offer.size_bytes:
                    return data
                reason = "sent more than the snapshot offered"
            case SnapshotChunk():
                reason = "sent a chunk that was not asked for"
            case AskOther():
                raise CatchupError(voter, answer.reason)
            case _:
                reason = f"answered with a wrong {type(answer).__name__}"
        await self._hang_up()
        raise CatchupError(voter, reason)

    async def _ask(self, voter: int, request: CatchupMessage) -> CatchupMessage:
        self._counters["catchup_requests"] += 1
        try:
            stream = await self._connected(voter)
            with anyio.fail_after(ANSWER_DEADLINE_S):
                await stream.send(frame(self._identity, Channel.CATCHUP, encode_body(request)))
                answer = await self._next_frame(stream)
            return decode_catchup(answer.body)
        except TimeoutError as error:
            await self._hang_up()
            raise CatchupError(voter, "no answer within the deadline") from error
        except FrameError as error:
            await self._hang_up()
            self._counters[f"dropped_{error.reason}"] += 1
            raise CatchupError(voter, f"sent a bad frame ({error.reason})") from error
        except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, ConfigError) as error:
            await self._hang_up()
            why = tls_trouble(error.__cause__ or error) or str(error) or type(error).__name__
            raise CatchupError(voter, why) from error
        except BaseException:
            # Cancelled in the middle of an answer: the connection cannot be used again.
            await self._hang_up()
            raise

    async def _connected(self, voter: int) -> TLSStream:
        if self._stream is not None and self._voter == voter:
            return self._stream
        await self._hang_up()
        entry = self._cluster.voter(voter)
        with anyio.fail_after(CONNECT_DEADLINE_S):
            stream = await anyio.connect_tcp(
                entry.host,
                entry.archive_port,
                ssl_context=self._credentials.client,
                tls_standard_compatible=False,
            )
        session = stream.extra(TLSAttribute.ssl_object)  # noqa: S610 - not SQL
        try:
            holder = other_end(session, self._cluster.cluster_id_bytes)
            if why := why_not_voter(holder.grant, voter):
                raise ConfigError(why)
        except ConfigError:
            await anyio.aclose_forcefully(stream)
            raise
        self._stream, self._voter = stream, voter
        self._buffer = FrameBuffer(self._cluster.cluster_id_bytes, Channel.CATCHUP)
        return stream

    async def _next_frame(self, stream: TLSStream) -> Frame:
        while True:
            data = await stream.receive(_READ_BYTES)
            self._counters["catchup_bytes"] += len(data)
            frames = self._buffer.feed(data)
            if len(frames) > 1:
                raise FrameError("length")
            if frames:
                return frames[0]

    async def _hang_up(self) -> None:
        stream, self._stream, self._voter = self._stream, None, 0
        if stream is not None:
            with anyio.CancelScope(shield=True), suppress(OSError):
                await anyio.aclose_forcefully(stream)

    def _drop_download(self) -> None:
        held, self._download = self._download, None
        if held is not None:
            held.file.close()
