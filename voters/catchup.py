"""A voter that fell behind asks the archive of another: this module alone holds that conversation.

One at a time: ``paxos`` says whom to ask and from which slot (:meth:`CatchUpClient.ask`); the
answer comes back as an event (``Learn``, or ``CatchUpFailed`` when the voter is silent, sends us
away or talks nonsense) or as a verified snapshot that is durable on disk.  A download that was cut
off goes on at whichever voter is asked next, if that one offers the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from trex_core.access import why_not_voter
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.messages import (
    AskOther,
    CatchupEntries,
    CatchupMessage,
    CatchupRequest,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
)
from trex_core.snapshot import Snapshot, SnapshotError
from trex_core.state import CatchUpFailed, Event, Learn
from trex_core.wire import (
    Channel,
    FrameBuffer,
    FrameError,
    Identity,
    decode_catchup,
    encode_body,
    frame,
)
from voters.credentials import Credentials, other_end, tls_trouble
from voters.logs import log
from voters.snapshots import Download, Snapshots

ANSWER_S_MAX: Final = 5.0
"""An archive that does not answer for this many seconds has failed."""
CONNECT_S_MAX: Final = 2.0
WARN_AGAIN_S: Final = 30.0
RECEIVE_BYTES: Final = 1 << 18


class _Archive:
    """A connection to the archive of one voter, which showed the certificate ``serial``."""

    def __init__(
        self,
        voter: int,
        serial: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        me: Identity,
    ) -> None:
        self.voter = voter
        self.serial = serial
        self._left = False
        self._reader = reader
        self._writer = writer
        self._me = me
        self._buffer = FrameBuffer(me.cluster_id, Channel.CATCHUP)

    async def ask(self, request: CatchupRequest | SnapshotRequest) -> CatchupMessage:
        """One request, one answer. Raises ``OSError``, ``TimeoutError`` or :class:`FrameError`."""
        async with asyncio.timeout(ANSWER_S_MAX):
            self._writer.write(frame(self._me, Channel.CATCHUP, encode_body(request)))
            await self._writer.drain()
            while True:
                data = await self._reader.read(RECEIVE_BYTES)
                if not data or self._left:  # what had come before we left is not taken either
                    raise ConnectionResetError("the archive closed the connection")
                for answer in self._buffer.feed(data):
                    return decode_catchup(answer.body)

    def close(self) -> None:
        self._left = True
        self._writer.transport.abort()  # nothing is left to say
        self._writer.close()


class CatchUpClient:
    """Carries out what ``paxos`` asks for. ``learn`` and ``install`` take what came of it."""

    def __init__(
        self,
        cluster: ClusterConfig,
        identity: Identity,
        credentials: Credentials,
        snapshots: Snapshots,
        learn: Callable[[Event], None],
        install: Callable[[Snapshot], None],
    ) -> None:
        self._cluster = cluster
        self._identity = identity
        self._credentials = credentials
        self._snapshots = snapshots
        self._learn = learn
        self._install = install
        self._wanted: tuple[int, int] | None = None
        self._asked = asyncio.Event()
        self._archive: _Archive | None = None
        self._download: Download | None = None
        self._warned: dict[int, tuple[str, float]] = {}
        self.revoked: frozenset[str] = frozenset()
        """Serials of certificates that are no longer good."""

    def ask(self, voter: int, first: int) -> None:
        """Ask ``voter`` for entries from ``first``, once the question under way is answered."""
        self._wanted = (voter, first)
        self._asked.set()

    def revoke(self, serials: frozenset[str]) -> None:
        """Nothing is learned from who shows one of these certificates: what an archive says is
        believed for its certificate alone."""
        self.revoked = serials
        if self._archive is not None and self._archive.serial in serials:
            self._hang_up()

    async def run(self) -> None:
        """Converse until cancelled."""
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                wanted, self._wanted = self._wanted, None
                if wanted is not None:
                    await self._converse(*wanted)
        finally:
            self._hang_up()
            if self._download is not None:
                self._download.abort()

    def _hang_up(self) -> None:
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    async def _converse(self, voter: int, first: int) -> None:
        try:
            archive = await self._connect(voter)
            answer = await archive.ask(CatchupRequest(f"voter {self._identity.sender}", first))
            match answer:
                case CatchupEntries():
                    self._learn(
                        Learn(
                            voter,
                            answer.first,
                            answer.chain_before,
                            answer.values,
                            answer.tip.slot,
                        )
                    )
                case SnapshotOffer():
                    snapshot = await self._fetch(archive, answer)
                    self._install(snapshot)
                case AskOther(reason=reason):
                    raise SnapshotError(f"sent away: {reason}")
                case _:
                    raise FrameError("body")
        except (OSError, TimeoutError, FrameError, SnapshotError, ConfigError) as error:
            self._hang_up()
            self._warn(voter, first, tls_trouble(error) or str(error) or type(error).__name__)
            self._learn(CatchUpFailed(voter))

    def _warn(self, voter: int, first: int, why: str) -> None:
        """The same trouble is told once in WARN_AGAIN_S seconds."""
        now_s = asyncio.get_running_loop().time()
        told_why, told_s = self._warned.get(voter, ("", 0.0))
        if why != told_why or now_s - told_s >= WARN_AGAIN_S:
            self._warned[voter] = (why, now_s)
            log(logging.WARNING, "voter.catchup.failed", peer=voter, first=first, why=why)

    async def _connect(self, voter: int) -> _Archive:
        if self._archive is not None and self._archive.voter == voter:
            return self._archive
        self._hang_up()
        entry = self._cluster.voter(voter)
        async with asyncio.timeout(CONNECT_S_MAX):
            reader, writer = await asyncio.open_connection(
                entry.host, entry.archive_port, ssl=self._credentials.client
            )
        try:
            session = writer.get_extra_info("ssl_object")
            holder = other_end(session, self._identity.cluster_id)
            why = why_not_voter(holder.grant, voter)
            if holder.serial in self.revoked:
                why = f"the certificate of {holder.grant.name!r} was revoked"
            if why:
                raise ConfigError(why)
        except ConfigError:
            writer.transport.abort()
            raise
        self._archive = _Archive(voter, holder.serial, reader, writer, self._identity)
        return self._archive

    async def _fetch(self, archive: _Archive, offer: SnapshotOffer) -> Snapshot:
        """Download the snapshot offered, going on where an earlier download of it stopped."""
        download = self._download
        if download is None or download.offer != offer:
            if download is not None:
                download.abort()
            log(
                logging.INFO,
                "voter.snapshot.offered",
                peer=archive.voter,
                slot=offer.slot,
                size_bytes=offer.size_bytes,
            )
            download = self._download = self._snapshots.download(offer)
        while download.offset < offer.size_bytes:
            chunk = await archive.ask(SnapshotRequest(offer.slot, download.offset))
            if not isinstance(chunk, SnapshotChunk):
                raise SnapshotError("the archive does not hold the snapshot any more")
            if (chunk.slot, chunk.offset) != (offer.slot, download.offset) or not chunk.data:
                raise SnapshotError("the archive sent another piece than was asked for")
            try:
                await asyncio.to_thread(download.add, chunk.data)
            except SnapshotError:
                self._download = None
                raise
        self._download = None
        return await asyncio.to_thread(download.finish)
