"""Asking others for what was missed: this module alone holds a listener's catch-up conversation.

Over TCP, with the archive of a voter or a listener that helps: entries, or a snapshot if the log no
longer reaches back.  What comes of it is signed by voters (``trust``), whoever it came from.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Final, TypeAlias

import anyio
import msgspec
from anyio.streams.tls import TLSAttribute, TLSStream

from listeners.credentials import Credentials, other_end, tls_trouble
from listeners.relay import HELPED_ROLES, Revoked
from listeners.trust import Trust
from listeners.workers import Workers
from trex_core.access import Holder, why_not_voter
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.messages import (
    VOTER_ID_MAX,
    AskOther,
    CatchupEntries,
    CatchupMessage,
    CatchupRequest,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
    decode_value,
)
from trex_core.wire import (
    Channel,
    Frame,
    FrameBuffer,
    FrameError,
    Identity,
    decode_catchup,
    encode_body,
    frame,
)

CONNECT_DEADLINE_S: Final = 2.0
"""Longest wait for a TCP connection, in seconds."""
ANSWER_DEADLINE_S: Final = 5.0
"""Longest wait for the whole answer to one request, in seconds."""
SNAPSHOT_BYTES_MAX: Final = 1 << 32
"""Largest snapshot a listener downloads, in bytes."""
_READ_BYTES: Final = 1 << 18

CatchupAnswer: TypeAlias = CatchupEntries | SnapshotOffer | AskOther


class CatchupError(Exception):
    """One catch-up conversation failed (``reason``); ask another."""

    def __init__(self, helper: int, reason: str) -> None:
        who = "voter" if helper <= VOTER_ID_MAX else "listener"
        super().__init__(f"{who} {helper}: {reason}")
        self.helper = helper
        self.reason = reason


def values_good(values: tuple[bytes, ...]) -> bool:
    """Whether each of them can be decoded."""
    try:
        for value in values:
            decode_value(value)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


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
    """The TCP conversation with voters' archives and other listeners: one request, one answer, one
    at a time.

    The connection is kept for the next request to the same helper.  Each step has its deadline.
    ``addresses`` says where listeners help, ``revoked`` which certificates are no longer good.
    ``counters`` counts ``catchup_requests``, ``catchup_bytes`` and ``snapshot_chunks``.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Credentials,
        name: str,
        counters: Counter[str],
        directory: Path | None,
        trust: Trust,
        *,
        addresses: Mapping[int, tuple[str, int]] = MappingProxyType({}),
        revoked: Revoked = frozenset,
    ) -> None:
        self._trust = trust
        self._addresses = addresses
        self._revoked = revoked
        self._cluster = cluster
        self._credentials = credentials
        self._name = name
        self._counters = counters
        self._directory = directory
        self._identity = Identity(cluster.cluster_id_bytes)
        self._stream: TLSStream | None = None
        self._helper = 0
        self._buffer = FrameBuffer(cluster.cluster_id_bytes, Channel.CATCHUP)
        self._download: _Download | None = None
        self._thread = Workers("trex-catchup")

    async def aclose(self) -> None:
        """Close the connection and forget an unfinished download."""
        self._thread.close()
        await self._hang_up()
        self._drop_download()

    async def entries(self, helper: int, first: int) -> CatchupAnswer:
        """Ask ``helper`` (a voter, or above VOTER_ID_MAX a listener) for fixed entries from slot
        ``first``; what it answers is signed by voters.

        Raises :class:`CatchupError` when it cannot be reached, is silent beyond the deadline, or
        answers something else than was asked; ``ContradictionError`` when what it answers and what
        is proven cannot both be.
        """
        answer = await self._ask(helper, CatchupRequest(self._name, first))
        match answer:
            case CatchupEntries():
                good = answer.first == first and values_good(answer.values)
                signed = good and self._trust.entries(answer)
            case SnapshotOffer():
                good = answer.slot >= first and 0 < answer.size_bytes <= SNAPSHOT_BYTES_MAX
                signed = good and self._trust.offer(answer)
            case AskOther():
                return answer
            case _:
                good = signed = False
        if signed and isinstance(answer, CatchupEntries | SnapshotOffer):
            return answer
        await self._hang_up()
        if good:
            self._counters["dropped_unsigned"] += 1
            raise CatchupError(helper, f"no voter signed the {type(answer).__name__} it sent")
        raise CatchupError(helper, f"answered with a wrong {type(answer).__name__}")

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
            await self._thread.run(held.add, data)
            self._counters["snapshot_chunks"] += 1
        good = held.digest.digest() == offer.digest
        try:
            if not good:
                voter = voters[turn % len(voters)]
                raise CatchupError(voter, f"snapshot {offer.slot} does not match its digest")
            return await self._thread.run(held.read)
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

    async def _ask(self, helper: int, request: CatchupMessage) -> CatchupMessage:
        self._counters["catchup_requests"] += 1
        try:
            stream = await self._connected(helper)
            with anyio.fail_after(ANSWER_DEADLINE_S):
                await stream.send(frame(self._identity, Channel.CATCHUP, encode_body(request)))
                answer = await self._next_frame(stream)
            return decode_catchup(answer.body)
        except TimeoutError as error:
            await self._hang_up()
            raise CatchupError(helper, "no answer within the deadline") from error
        except FrameError as error:
            await self._hang_up()
            self._counters[f"dropped_{error.reason}"] += 1
            raise CatchupError(helper, f"sent a bad frame ({error.reason})") from error
        except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, ConfigError) as error:
            await self._hang_up()
            why = tls_trouble(error.__cause__ or error) or str(error) or type(error).__name__
            raise CatchupError(helper, why) from error
        except BaseException:
            # Cancelled in the middle of an answer: the connection cannot be used again.
            await self._hang_up()
            raise

    async def _connected(self, helper: int) -> TLSStream:
        if self._stream is not None and self._helper == helper:
            return self._stream
        await self._hang_up()
        if helper <= VOTER_ID_MAX:
            entry = self._cluster.voter(helper)
            host, port = entry.host, entry.archive_port
        elif helper in self._addresses:
            host, port = self._addresses[helper]
        else:
            raise ConfigError("it does not say any more where it helps")
        with anyio.fail_after(CONNECT_DEADLINE_S):
            stream = await anyio.connect_tcp(
                host,
                port,
                ssl_context=self._credentials.client,
                tls_standard_compatible=False,
            )
        session = stream.extra(TLSAttribute.ssl_object)  # noqa: S610 - not SQL
        try:
            why = self._why_not(helper, other_end(session, self._cluster.cluster_id_bytes))
            if why:
                raise ConfigError(why)
        except ConfigError:
            await anyio.aclose_forcefully(stream)
            raise
        self._stream, self._helper = stream, helper
        self._buffer = FrameBuffer(self._cluster.cluster_id_bytes, Channel.CATCHUP)
        return stream

    def _why_not(self, helper: int, holder: Holder) -> str:
        """Why not to ask whoever holds that certificate; "" if it may be."""
        if holder.serial in self._revoked():
            return f"the certificate of {holder.grant.name!r} was revoked"
        if helper <= VOTER_ID_MAX:
            return why_not_voter(holder.grant, helper)
        if holder.grant.role not in HELPED_ROLES:
            return f"a {holder.grant.role} is no listener"
        return ""

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
        stream, self._stream, self._helper = self._stream, None, 0
        if stream is not None:
            with anyio.CancelScope(shield=True), suppress(OSError):
                await anyio.aclose_forcefully(stream)

    def _drop_download(self) -> None:
        held, self._download = self._download, None
        if held is not None:
            held.file.close()
