"""The recording file: this module alone knows its format.

What a listener heard and delivered, so that another can live through it again.  Big endian::

    file     6 magic "TxReco", 2 format version (1), frames
    frame    4 length of the body, 4 CRC-32 of these four bytes, 4 CRC-32 of the body, body: one
             MessagePack value; the first is a :class:`Header`, the others are a :data:`Frame`, the
             last is :class:`EndFrame`

A file without its end was cut off: what is whole before it counts.  Any other damage is an error
that names the offset.  A recording may be compressed with gzip, and is read all the same.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import anyio
import anyio.to_thread
import msgspec

from dashboard.view import Followed, PastLed
from trex_core.cluster import ClusterConfig
from trex_core.messages import ListenerReport, StreamTip

MAGIC: Final = b"TxReco"
FORMAT_VERSION: Final = 1
FRAME_BYTES_MAX: Final = 1 << 30
"""Longest body of a frame: far above the largest state."""
WAITING_BYTES_MAX: Final = 64 << 20
"""Recording stops when the disk is so many bytes late; one snapshot may come on top."""
WRITE_S: Final = 1.0
"""So often what was recorded is written, in seconds."""

_HEAD: Final = struct.Struct(">6sH")
_LENGTH: Final = struct.Struct(">I")
_FRAME: Final = struct.Struct(">III")
_Bodies: TypeAlias = Generator[tuple[int, bytes], None, None]
_GZIP: Final = b"\x1f\x8b"


class RecordingError(Exception):
    """A recording that cannot be written or read; the text says which file, why, and what to do."""


class Header(msgspec.Struct, frozen=True):
    """What a recording begins with: who made it, of which cluster, as which listener, and when
    (wall clock, milliseconds since 1970). The times of all frames count from there."""

    version: str
    cluster: ClusterConfig
    listener: str
    started_ms: int


class SnapshotFrame(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The whole state after ``slot`` (``trex_core.snapshot``): the listener began with it
    (``from_slot`` -1) or jumped to it from ``from_slot``."""

    at_ms: int
    from_slot: int
    slot: int
    data: bytes


class RunFrame(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Slots from ``first`` were delivered; ``chain_before`` is the chain at ``first - 1``."""

    at_ms: int
    first: int
    chain_before: bytes
    values: tuple[bytes, ...]


class TipFrame(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """``voter``'s heartbeat was heard."""

    at_ms: int
    voter: int
    tip: StreamTip


class ReportFrame(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A listener's report was heard."""

    at_ms: int
    report: ListenerReport


class EventFrame(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """What cannot be found again from the rest."""

    at_ms: int
    event: Followed | PastLed


class EndFrame(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The recording was ended in order."""

    at_ms: int


Frame: TypeAlias = SnapshotFrame | RunFrame | TipFrame | ReportFrame | EventFrame | EndFrame

_encoder: Final = msgspec.msgpack.Encoder()
_headers: Final = msgspec.msgpack.Decoder(Header)
_UNDECODABLE: Final = (ValueError, RecursionError, OverflowError)
_frames: Final[msgspec.msgpack.Decoder[Frame]] = msgspec.msgpack.Decoder(Frame)


def _framed(value: Header | Frame) -> bytes:
    body = _encoder.encode(value)
    length = len(body)
    return _FRAME.pack(length, zlib.crc32(_LENGTH.pack(length)), zlib.crc32(body)) + body


# --- writing ----------------------------------------------------------------------------------


class Recorder:
    """A recording under way. :meth:`add` neither waits nor raises; the writing is done by
    :meth:`run`, in a thread. ``trouble`` says why it stopped before its end ("": it did not):
    what was written until then can be played."""

    def __init__(self, path: Path, header: Header) -> None:
        """Make the file. Raises :class:`RecordingError` if it is there already or cannot be
        made."""
        self.path: Final = path
        self.trouble = ""
        self._ended = anyio.Event()
        self._waiting: list[bytes] = [_HEAD.pack(MAGIC, FORMAT_VERSION), _framed(header)]
        self._waiting_bytes = 0
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise RecordingError(
                f"{path} is there already and is not overwritten: name another file to record to"
            ) from error
        except (OSError, ValueError) as error:
            raise RecordingError(f"cannot record to {path}: {_why(error)}") from error
        self._file: Final = open(handle, "wb", buffering=0)  # noqa: SIM115, PTH123 - run()

    def add(self, frame: Frame) -> None:
        """Record ``frame``, at the next write."""
        if self.trouble or self._ended.is_set():
            return
        if self._waiting_bytes > WAITING_BYTES_MAX:
            self._give_up("the disk does not keep up")
            return
        data = _framed(frame)
        self._waiting.append(data)
        self._waiting_bytes += len(data)

    def end(self, at_ms: int) -> None:
        """Record nothing more: the recording is complete. :meth:`run` then writes the rest."""
        self.add(EndFrame(at_ms))
        self._ended.set()

    def _give_up(self, why: str) -> None:
        self.trouble = f"recording to {self.path} stopped: {why}"
        self._waiting, self._waiting_bytes = [], 0

    async def run(self) -> None:
        """Write each WRITE_S what was added, until the end or cancelled; write the rest, close."""
        try:
            while not self._ended.is_set():
                with anyio.move_on_after(WRITE_S):
                    await self._ended.wait()
                await self._write()
        finally:
            with anyio.CancelScope(shield=True):
                await self._write()
                await anyio.to_thread.run_sync(self._file.close)

    async def _write(self) -> None:
        if self.trouble or not self._waiting:
            return
        data = b"".join(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        try:
            await anyio.to_thread.run_sync(_write_all, self._file, data)
        except OSError as error:
            self._give_up(_why(error))


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# --- reading ----------------------------------------------------------------------------------


class Recording:
    """A recording that was read through and found whole: ``duration_ms`` long, or ``cut_off`` (by
    the death of who recorded it) after so long."""

    def __init__(self, path: Path) -> None:
        """Read all of it: a second for some 100 MB. Raises :class:`RecordingError`."""
        self.path: Final = path
        self.cut_off = True
        self.duration_ms = 0
        self._count = 0
        with closing(_bodies(path)) as bodies:
            first = next(bodies, None)
            if first is None:
                raise RecordingError(f"{path} was cut off before anything was recorded")
            try:
                self.header: Final = _headers.decode(first[1])
            except _UNDECODABLE as error:
                raise RecordingError(
                    f"{path}: its header cannot be understood ({error}); it was made by another "
                    "version of TRex: replay it with that"
                ) from error
            for offset, body in bodies:
                frame = _decoded(path, offset, body)
                self._count += 1
                self.duration_ms = max(self.duration_ms, frame.at_ms)
                if isinstance(frame, EndFrame):
                    self.cut_off = False
                    if next(bodies, None) is not None:
                        raise RecordingError(f"{path} is damaged: frames follow its end")
                    break

    def frames(self) -> Generator[Frame, None, None]:
        """All frames, in order. Raises :class:`RecordingError` if the file changed since."""
        with closing(_bodies(self.path)) as bodies:
            next(bodies, None)
            for _ in range(self._count):
                found = next(bodies, None)
                if found is None:
                    raise RecordingError(f"{self.path} changed while it was replayed")
                yield _decoded(self.path, *found)


def _decoded(path: Path, offset: int, body: bytes) -> Frame:
    try:
        return _frames.decode(body)
    except _UNDECODABLE as error:
        raise RecordingError(
            f"{path} is damaged: the frame at offset {offset} cannot be decoded ({error})"
        ) from error


def _bodies(path: Path) -> _Bodies:
    """(offset, body) of each whole frame, checked; ends where the file was cut off."""
    try:
        with path.open("rb") as plain:
            start = plain.read(len(_GZIP))
            plain.seek(0)
            if start == _GZIP:
                with gzip.GzipFile(fileobj=plain) as unpacked:
                    yield from _bodies_of(path, unpacked)
            else:
                yield from _bodies_of(path, plain)
    except OSError as error:  # a bad gzip header is one too
        raise RecordingError(f"cannot read {path}: {_why(error)}") from error


def _bodies_of(path: Path, file: BinaryIO | gzip.GzipFile) -> _Bodies:
    head = _read(path, file, _HEAD.size)
    if not head or head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise RecordingError(f"{path} is no recording of trex-dash")
    if len(head) < _HEAD.size:
        return
    _, version = _HEAD.unpack(head)
    if version != FORMAT_VERSION:
        raise RecordingError(
            f"{path} has format {version}, this program knows format {FORMAT_VERSION}: replay it "
            "with the version of TRex that recorded it"
        )
    offset = _HEAD.size
    while True:
        head = _read(path, file, _FRAME.size)
        if len(head) < _FRAME.size:
            return
        length, length_checksum, checksum = _FRAME.unpack(head)
        if zlib.crc32(_LENGTH.pack(length)) != length_checksum or length > FRAME_BYTES_MAX:
            raise RecordingError(
                f"{path} is damaged: the length of the frame at offset {offset} is wrong"
            )
        body = _read(path, file, length)
        if len(body) < length:
            return
        if zlib.crc32(body) != checksum:
            raise RecordingError(
                f"{path} is damaged: the frame at offset {offset} fails its checksum"
            )
        yield offset, body
        offset += _FRAME.size + length


def _read(path: Path, file: BinaryIO | gzip.GzipFile, size: int) -> bytes:
    """``size`` bytes, or fewer where the file ends."""
    try:
        return file.read(size)
    except EOFError:  # gzip, cut off
        return b""
    except zlib.error as error:
        raise RecordingError(f"{path} is damaged: it cannot be unpacked ({error})") from error
