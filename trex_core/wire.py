"""Bytes to values and back: the one frame of UDP, TCP and journal.

This module alone knows the frame.  Decoding is total: from any bytes it returns a frame or raises
:class:`FrameError` with a reason that is counted; nothing else ever escapes.

Frame, big endian (HEADER_BYTES = 80 bytes, then the body)::

    offset size field
    0      2    magic "Tx"
    2      1    format version (1)
    3      1    channel: 1 voters, 2 stream, 3 client, 4 catch-up, 5 journal
    4      16   cluster id
    20     2    sender (voter id, 0 = not a voter)
    22     2    key epoch (of sealed datagrams; 0: the frame is not sealed)
    24     8    incarnation of the sender
    32     8    boot number of the sender
    40     4    salt     (journal: segment number; sealed datagrams: drawn at each start)
    44     8    counter  (journal: offset of the frame in its segment; datagrams: number of the
                          datagram, so that part p of a message is number n + p)
    52     1    part     (0 ..)
    53     1    parts    (1 ..; above 1 only in datagrams)
    54     2    receiver (of sealed datagrams: the voter it is for, 0: whoever hears it)
    56     4    length of the body in bytes
    60     4    CRC-32 of the header with this field 0, then the body (0 where it is sealed)
    64     16   tag      (of sealed datagrams, see ``seal``: it covers bytes 0 to 63 and the body)
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

import msgspec

from trex_core.messages import (
    DATAGRAM_BYTES_MAX,
    PEER_DATAGRAMS_MAX,
    TCP_BODY_BYTES_MAX,
    CatchupMessage,
    ClientReply,
    ClientRequest,
    PeerMessage,
    SealTold,
    StreamMessage,
)
from trex_core.state import Record

MAGIC: Final = b"Tx"
FORMAT_VERSION: Final = 1
_HEADER: Final = struct.Struct(">2sBB16sHHQQIQBBHII16s")
_PREFIX: Final = struct.Struct(">2sBB16sHHQQI")
_NUMBERS: Final = struct.Struct(">QBBHII")
"""The two parts of the header, without the tag, which covers them: the first is the same in all
that one sender seals under one key."""
HEADER_BYTES: Final = _HEADER.size
CLUSTER_ID_BYTES: Final = 16
DATAGRAM_BODY_BYTES_MAX: Final = DATAGRAM_BYTES_MAX - HEADER_BYTES
PEER_UDP_BODY_BYTES_MAX: Final = DATAGRAM_BODY_BYTES_MAX * PEER_DATAGRAMS_MAX
_NO_TAG: Final = bytes(16)
_ZERO_CRC: Final = bytes(4)
TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
"""96 bits, the number of the datagram: never twice under one sub-key."""
_TAG_AT: Final = HEADER_BYTES - TAG_BYTES

Cipher: TypeAlias = Callable[[bytes, bytes, bytes], bytes]
"""(nonce of NONCE_BYTES, data, associated data) to data, with its tag of TAG_BYTES appended when it
is sealed: AES-GCM, as ``seal`` has it."""

assert HEADER_BYTES == 80, "the frame's layout is documented above"


class Channel:
    """Numbers of the frame's channel field."""

    PEER: Final = 1
    STREAM: Final = 2
    CLIENT: Final = 3
    CATCHUP: Final = 4
    JOURNAL: Final = 5


class FrameError(ValueError):
    """Bytes that are not a frame for us. ``reason`` is one of: short, magic, version, cluster,
    channel, length, checksum, body, sender, part; of sealed frames: sealed (or not, where the other
    is due), epoch (no key of that epoch here), tag, replay, receiver (it is for another)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A frame whose checksum or tag was right. ``body`` is still encoded."""

    channel: int
    sender: int
    incarnation: int
    boot: int
    salt: int
    counter: int
    part: int
    parts: int
    body: bytes
    epoch: int = 0
    receiver: int = 0


class Identity(msgspec.Struct, frozen=True):
    """Who frames: cluster id (16 bytes), voter id (0 for others), incarnation, boot number."""

    cluster_id: bytes
    sender: int = 0
    incarnation: int = 0
    boot: int = 0


T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_peer: msgspec.msgpack.Decoder[PeerMessage] = msgspec.msgpack.Decoder(PeerMessage)
_link: msgspec.msgpack.Decoder[PeerMessage | SealTold] = msgspec.msgpack.Decoder(
    PeerMessage | SealTold
)
_stream: msgspec.msgpack.Decoder[StreamMessage] = msgspec.msgpack.Decoder(StreamMessage)
_request: msgspec.msgpack.Decoder[ClientRequest] = msgspec.msgpack.Decoder(ClientRequest)
_reply: msgspec.msgpack.Decoder[ClientReply] = msgspec.msgpack.Decoder(ClientReply)
_catchup: msgspec.msgpack.Decoder[CatchupMessage] = msgspec.msgpack.Decoder(CatchupMessage)
_records: msgspec.msgpack.Decoder[tuple[Record, ...]] = msgspec.msgpack.Decoder(tuple[Record, ...])


def encode_body(message: object) -> bytes:
    """Encode any message or tuple of records."""
    return _encoder.encode(message)


def frame(
    identity: Identity,
    channel: int,
    body: bytes,
    *,
    salt: int = 0,
    counter: int = 0,
    part: int = 0,
    parts: int = 1,
) -> bytes:
    """Frame ``body``."""
    fields = (
        MAGIC, FORMAT_VERSION, channel, identity.cluster_id, identity.sender, 0,
        identity.incarnation, identity.boot, salt, counter, part, parts, 0, len(body),
    )  # fmt: skip
    head = _HEADER.pack(*fields, 0, _NO_TAG)
    crc = zlib.crc32(body, zlib.crc32(head))
    return b"".join((head[:60], crc.to_bytes(4, "big"), _NO_TAG, body))


def body_bytes(header: bytes, cluster_id: bytes, bytes_max: int = TCP_BODY_BYTES_MAX) -> int:
    """Length of the body that follows ``header`` (its first HEADER_BYTES bytes) in a byte stream.
    Raises :class:`FrameError`: short, magic, version, cluster or length."""
    length: int = _fields(header, cluster_id, bytes_max)[13]
    return length


def _fields(
    data: bytes | bytearray, cluster_id: bytes, bytes_max: int, at: int = 0
) -> tuple[Any, ...]:
    """All fields of the header that is ``at`` this byte of ``data``. Raises as
    :func:`body_bytes`."""
    if len(data) - at < HEADER_BYTES:
        raise FrameError("short")
    fields = _HEADER.unpack_from(data, at)
    if fields[0] != MAGIC:
        raise FrameError("magic")
    if fields[1] != FORMAT_VERSION:
        raise FrameError("version")
    if fields[3] != cluster_id:
        raise FrameError("cluster")
    if fields[13] > bytes_max:
        raise FrameError("length")
    return fields


def unframe(data: bytes, cluster_id: bytes, channel: int) -> Frame:
    """Check one whole frame. Raises :class:`FrameError` and nothing else."""
    fields = _fields(data, cluster_id, TCP_BODY_BYTES_MAX)
    if len(data) != HEADER_BYTES + fields[13]:
        raise FrameError("length")
    return _unframed(data, fields, channel)


def _unframed(data: bytes, fields: tuple[Any, ...], channel: int) -> Frame:
    """The frame that is ``data``, whose header has these ``fields``."""
    body = data[HEADER_BYTES:]
    crc = zlib.crc32(data[64:], zlib.crc32(_ZERO_CRC, zlib.crc32(data[:60])))
    if crc != fields[14]:
        raise FrameError("checksum")
    if fields[2] != channel:
        raise FrameError("channel")
    if fields[5]:
        raise FrameError("sealed")
    part, parts = fields[10], fields[11]
    if not part < parts:
        raise FrameError("part")
    return Frame(channel, fields[4], fields[6], fields[7], fields[8], fields[9], part, parts, body)


def sealed_prefix(identity: Identity, channel: int, epoch: int, salt: int) -> bytes:
    """What all sealed frames of one sender under one key begin with; ``epoch`` is 1 to 65,535."""
    return _PREFIX.pack(
        MAGIC, FORMAT_VERSION, channel, identity.cluster_id, identity.sender, epoch,
        identity.incarnation, identity.boot, salt,
    )  # fmt: skip


def sealed_frame(
    prefix: bytes, counter: int, part: int, parts: int, receiver: int, body: bytes, encrypt: Cipher
) -> bytes:
    """Frame ``body`` sealed by ``encrypt``; ``prefix`` is of :func:`sealed_prefix`."""
    head = prefix + _NUMBERS.pack(counter, part, parts, receiver, len(body), 0)
    sealed = encrypt(counter.to_bytes(NONCE_BYTES, "big"), body, head)
    return b"".join((head, sealed[-TAG_BYTES:], sealed[:-TAG_BYTES]))


def sealed_head(data: bytes, cluster_id: bytes, channel: int) -> Frame:
    """What a sealed frame says of itself, with its body still sealed, then its tag: *nothing of it
    is known to be true* before :func:`unsealed`. Raises :class:`FrameError` and nothing else."""
    (
        _, _, of, _, sender, epoch, incarnation, boot, salt, counter, part, parts, receiver, length,
        _, tag,
    ) = _fields(data, cluster_id, DATAGRAM_BODY_BYTES_MAX)  # fmt: skip
    if len(data) != HEADER_BYTES + length:
        raise FrameError("length")
    if of != channel:
        raise FrameError("channel")
    if not epoch:
        raise FrameError("sealed")
    if not part < parts:
        raise FrameError("part")
    sealed = data[HEADER_BYTES:] + tag
    return Frame(
        channel, sender, incarnation, boot, salt, counter, part, parts, sealed, epoch, receiver
    )


def unsealed(data: bytes, head: Frame, decrypt: Cipher) -> Frame:
    """The sealed frame ``data`` whose :func:`sealed_head` is ``head``. Raises what ``decrypt``
    raises when header, body or tag are not what was sealed."""
    counter = head.counter
    body = decrypt(counter.to_bytes(NONCE_BYTES, "big"), head.body, data[:_TAG_AT])
    return Frame(
        head.channel, head.sender, head.incarnation, head.boot, head.salt, counter, head.part,
        head.parts, body, head.epoch, head.receiver,
    )  # fmt: skip


def _decoded(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError, OverflowError) as error:
        raise FrameError("body") from error


def decode_peer(body: bytes) -> PeerMessage:
    """Decode a voter-to-voter message. Raises :class:`FrameError` ("body")."""
    return _decoded(_peer, body)


def decode_link(body: bytes) -> PeerMessage | SealTold:
    """Decode what comes over a voter's TLS link. Raises :class:`FrameError` ("body")."""
    return _decoded(_link, body)


def decode_stream(body: bytes) -> StreamMessage:
    """Decode a stream message. Raises :class:`FrameError` ("body")."""
    return _decoded(_stream, body)


def decode_request(body: bytes) -> ClientRequest:
    """Decode a client's request. Raises :class:`FrameError` ("body")."""
    return _decoded(_request, body)


def decode_reply(body: bytes) -> ClientReply:
    """Decode a reply to a client. Raises :class:`FrameError` ("body")."""
    return _decoded(_reply, body)


def decode_catchup(body: bytes) -> CatchupMessage:
    """Decode a catch-up message. Raises :class:`FrameError` ("body")."""
    return _decoded(_catchup, body)


def decode_records(body: bytes) -> tuple[Record, ...]:
    """Decode the records of one journal batch. Raises :class:`FrameError` ("body")."""
    return _decoded(_records, body)


def fragments(identity: Identity, channel: int, body: bytes, counter: int) -> list[bytes]:
    """Frame ``body`` as datagrams of at most DATAGRAM_BYTES_MAX bytes, numbered from ``counter``.
    Requires that it needs at most 255 of them."""
    if len(body) <= DATAGRAM_BODY_BYTES_MAX:
        return [frame(identity, channel, body, counter=counter)]
    size = DATAGRAM_BODY_BYTES_MAX
    parts = (len(body) + size - 1) // size
    return [
        frame(
            identity,
            channel,
            body[part * size : (part + 1) * size],
            counter=counter + part,
            part=part,
            parts=parts,
        )
        for part in range(parts)
    ]


class Reassembler:
    """Puts the parts of datagram messages together again. Bounded: at most ``messages_max``
    unfinished messages are kept, the oldest goes first. A lost part loses its message."""

    def __init__(self, messages_max: int = 64) -> None:
        self._messages_max = messages_max
        self._open: dict[tuple[int, int, int, int], dict[int, bytes]] = {}

    def add(self, part: Frame) -> bytes | None:
        """Take one frame; return the whole body when it was the last part missing."""
        if part.parts == 1:
            return part.body
        if part.parts > PEER_DATAGRAMS_MAX:
            raise FrameError("part")
        key = (part.sender, part.boot, part.counter - part.part, part.parts)
        held = self._open.setdefault(key, {})
        held[part.part] = part.body
        if len(held) == part.parts:
            del self._open[key]
            return b"".join(held[index] for index in range(part.parts))
        if len(self._open) > self._messages_max:
            del self._open[next(iter(self._open))]
        return None


class FrameBuffer:
    """Cuts a TCP byte stream into frames, without I/O: ``feed`` bytes, get whole frames.

    Holds at most one unfinished frame; a header that is wrong raises :class:`FrameError` at once,
    so a stranger cannot make it buffer."""

    def __init__(
        self, cluster_id: bytes, channel: int, body_bytes_max: int = TCP_BODY_BYTES_MAX
    ) -> None:
        self._cluster_id = cluster_id
        self._channel = channel
        self._body_bytes_max = body_bytes_max
        self._data = bytearray()

    @property
    def unfinished(self) -> int:
        """Bytes held of a frame that is not whole yet."""
        return len(self._data)

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes; return the frames completed by them. Raises :class:`FrameError`: the
        connection is to be closed, since the stream cannot be cut any more."""
        held = self._data
        if held:
            held += data
            frames, rest = self._cut(held)
            del held[:rest]
        else:  # mostly what comes is whole, and need not be copied first
            frames, rest = self._cut(data)
            held += data[rest:]
        return frames

    def _cut(self, data: bytes | bytearray) -> tuple[list[Frame], int]:
        """The whole frames in ``data``, and where what is left begins."""
        frames = []
        start, held = 0, len(data)
        while held - start >= HEADER_BYTES:
            fields = _fields(data, self._cluster_id, self._body_bytes_max, start)
            end = start + HEADER_BYTES + fields[13]
            if end > held:
                break
            frames.append(_unframed(bytes(data[start:end]), fields, self._channel))
            start = end
        return frames, start
