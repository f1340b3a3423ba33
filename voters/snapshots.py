"""The snapshot files of one voter: written so that a file under its name is always whole.

This module alone writes ``<16 digits of the slot>.snapshot``. The bytes are those of
:mod:`trex_core.snapshot`. A file is written beside (``.writing``, ``.download``), synced, renamed,
and its directory synced; what a crash left unfinished is deleted at the start. A file whose bytes
were changed since is set aside (``.damaged``), never used and never deleted, and the one before it
is taken: the journal still reaches back to it.

All methods block on the disk: call them in a thread (``*_in_thread`` does) while a loop runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import anyio.to_thread

from trex_core.messages import SnapshotOffer
from trex_core.snapshot import DIGEST_BYTES, Snapshot, SnapshotError, decode_snapshot
from voters.journal import Disk, write_all

SUFFIX: Final = ".snapshot"
_WRITING: Final = ".writing"
_DOWNLOAD: Final = ".download"
_DAMAGED: Final = ".damaged"


def snapshot_name(slot: int) -> str:
    """File name of the snapshot at ``slot``."""
    return f"{slot:016d}{SUFFIX}"


def snapshot_slots(names: Iterable[str]) -> list[int]:
    """Slots of the snapshots among file names, ascending."""
    return sorted(
        int(name[:16])
        for name in names
        if len(name) == 16 + len(SUFFIX) and name.endswith(SUFFIX) and name[:16].isdecimal()
    )


class Snapshots:
    """The snapshot directory of a running voter, its one writer. Makes it if it is missing and
    deletes what a crash left unfinished. Methods raise ``OSError`` when the disk fails."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self.directory = directory
        self._disk = disk or Disk()
        directory.mkdir(parents=True, exist_ok=True)
        for name in self._disk.names(directory):
            if name.endswith((_WRITING, _DOWNLOAD)):
                self._disk.unlink(directory / name)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of the snapshots that are kept, ascending."""
        return tuple(snapshot_slots(self._disk.names(self.directory)))

    def newest(self) -> tuple[Snapshot | None, tuple[str, ...]]:
        """The newest snapshot that is intact (None: there is none), and for each newer one that was
        not, and was set aside, what is wrong with it."""
        damaged = []
        for slot in reversed(self.slots):
            path = self.directory / snapshot_name(slot)
            try:
                snapshot = decode_snapshot(self._disk.read(path))
                if snapshot.slot != slot:
                    raise SnapshotError(f"holds slot {snapshot.slot}")
            except SnapshotError as error:
                self._disk.rename(path, path.with_suffix(_DAMAGED))
                self._disk.sync_directory(self.directory)
                damaged.append(f"{path}: {error}; set aside as {path.stem}{_DAMAGED}")
            else:
                return snapshot, tuple(damaged)
        return None, tuple(damaged)

    def save(self, slot: int, pieces: Iterable[bytes]) -> int:
        """Write the snapshot at ``slot``; it is durable when this returns its size in bytes.
        Nothing is left of it when this raises."""
        path = self.directory / f"{slot:016d}{_WRITING}"
        with _Writing(path, self._disk) as writing:
            for piece in pieces:
                writing.add(piece)
            writing.publish(self.directory / snapshot_name(slot))
        return writing.size_bytes

    async def save_in_thread(self, slot: int, pieces: Iterable[bytes]) -> int:
        """:meth:`save`, in a thread; ``pieces`` are made there too."""
        return await anyio.to_thread.run_sync(self.save, slot, pieces)

    def keep(self, count: int) -> int:
        """Delete all but the newest ``count`` (at least one). Returns the oldest slot kept, 0 for
        none: journal segments may be deleted below it."""
        slots = self.slots
        kept = slots[-max(1, count) :]
        for slot in slots[: -len(kept)] if kept else ():
            self._disk.unlink(self.directory / snapshot_name(slot))
        if len(kept) < len(slots):
            self._disk.sync_directory(self.directory)
        return kept[0] if kept else 0

    async def keep_in_thread(self, count: int) -> int:
        """:meth:`keep`, in a thread."""
        return await anyio.to_thread.run_sync(self.keep, count)

    def download(self, offer: SnapshotOffer) -> Download:
        """Begin to receive the snapshot that an archive offered."""
        path = self.directory / f"{offer.slot:016d}{_DOWNLOAD}"
        if path.exists():
            self._disk.unlink(path)
        return Download(self.directory, path, self._disk, offer)


class Download:
    """A snapshot on its way here: ``add`` chunks in order, from any voter that offers the same
    (slot, digest), until ``offset`` is the offered size; then ``finish``, or ``abort``."""

    def __init__(self, directory: Path, path: Path, disk: Disk, offer: SnapshotOffer) -> None:
        self.offer = offer
        self._directory = directory
        self._disk = disk
        self._path = path
        self._writing = _Writing(path, disk)
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    @property
    def offset(self) -> int:
        """Bytes held: ask for the chunk from here."""
        return self._writing.size_bytes

    def add(self, data: bytes) -> None:
        """Take the chunk at ``offset``. Raises :class:`SnapshotError` when it is too long."""
        if self.offset + len(data) > self.offer.size_bytes:
            self.abort()
            raise SnapshotError("more bytes than were offered")
        self._writing.add(data)
        self._digest.update(data)

    def finish(self) -> Snapshot:
        """Verify the whole; it is durable under its name when this returns it. Raises
        :class:`SnapshotError`, and the download is gone, when it is not what was offered."""
        try:
            if self._digest.digest() != self.offer.digest:
                raise SnapshotError("the bytes received are not those that were offered")
            snapshot = decode_snapshot(self._disk.read(self._path))
            if (snapshot.slot, snapshot.chain) != (self.offer.slot, self.offer.chain):
                raise SnapshotError("it is of another slot or chain than was offered")
            self._writing.publish(self._directory / snapshot_name(snapshot.slot))
        finally:
            self.abort()
        return snapshot

    def abort(self) -> None:
        """Give up what was received. Allowed at any time, also twice."""
        self._writing.close()


class _Writing:
    """A file that is written beside and gets its name when whole."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.size_bytes = 0
        self._path = path
        self._disk = disk
        self._fd = disk.create(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, data: bytes) -> None:
        write_all(self._disk, self._fd, data, self.size_bytes)
        self.size_bytes += len(data)

    def publish(self, path: Path) -> None:
        self._disk.fsync(self._fd)
        self._disk.rename(self._path, path)
        self._disk.close(self._fd)
        self._fd = -1
        self._disk.sync_directory(path.parent)

    def close(self) -> None:
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1
            with suppress(FileNotFoundError):  # a rename may have worked and yet said it failed
                self._disk.unlink(self._path)
