"""The bytes of a snapshot: the same at every replica that is at the same slot.

This module alone knows the snapshot file.  Equal (slot, chain, genesis, sessions, machine bytes)
give equal files, whoever writes them, so their digests are compared like the chain.

Format, big endian::

    header   6 magic "TxSnap", 2 format version (1), 8 slot, 32 chain at that slot
    blocks   1 kind, 4 length of the data, data (at most BLOCK_BYTES_MAX bytes)
             kind 1: genesis, MessagePack; exactly one, first
             kind 2: a MessagePack array of at most SESSIONS_PER_BLOCK (name, session) pairs, names
                     ascending over all blocks; a block may be larger if its sessions are
             kind 3: the machine's bytes; each block but the last is BLOCK_BYTES_MAX long
    end      1 kind 0, 4 length 32, BLAKE2b-256 of all bytes before this block
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from trex_core.messages import CHAIN_BYTES, Genesis
from trex_core.sessions import Session, Sessions, sessions_of

MAGIC: Final = b"TxSnap"
FORMAT_VERSION: Final = 1
BLOCK_BYTES_MAX: Final = 64 << 10
"""Most machine bytes in one block; also about how much is made at once."""
SESSIONS_PER_BLOCK: Final = 64
DIGEST_BYTES: Final = 32

_HEADER: Final = struct.Struct(">6sHQ32s")
_BLOCK: Final = struct.Struct(">BI")
HEADER_BYTES: Final = _HEADER.size
"""As many first bytes of a snapshot does :func:`read_header` need."""
_END, _GENESIS, _SESSIONS, _MACHINE = 0, 1, 2, 3

_encoder: Final = msgspec.msgpack.Encoder()
_genesis: Final = msgspec.msgpack.Decoder(Genesis)
_sessions: Final = msgspec.msgpack.Decoder(tuple[tuple[int, Session], ...])


class SnapshotError(ValueError):
    """Bytes that are no whole, intact snapshot of a format known here; the text says why."""


class Snapshot(msgspec.Struct, frozen=True):
    """A decoded snapshot: the state after ``slot``. ``machine`` is what the state machine's
    ``restore`` takes."""

    slot: int
    chain: bytes
    genesis: Genesis
    sessions: Sessions
    machine: bytes


def encode_snapshot(
    slot: int, chain: bytes, genesis: Genesis, sessions: Sessions, machine: Iterable[bytes]
) -> Iterator[bytes]:
    """The bytes of a snapshot in pieces of about BLOCK_BYTES_MAX.

    All arguments are immutable (``machine`` captured its state when it was made), so the pieces
    may be taken in another thread; each takes about a millisecond to make. How ``machine`` is cut
    into pieces does not matter. Raises ``ValueError`` if ``chain`` is not CHAIN_BYTES long.
    """
    if len(chain) != CHAIN_BYTES:
        raise ValueError(f"a chain has {CHAIN_BYTES} bytes, not {len(chain)}")
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in _pieces(slot, chain, genesis, sessions, machine):
        digest.update(piece)
        yield piece
    yield _block(_END, digest.digest())


def _pieces(
    slot: int, chain: bytes, genesis: Genesis, sessions: Sessions, machine: Iterable[bytes]
) -> Iterator[bytes]:
    yield _HEADER.pack(MAGIC, FORMAT_VERSION, slot, chain) + _block(
        _GENESIS, _encoder.encode(genesis)
    )
    names = sorted(sessions.open)
    for first in range(0, len(names), SESSIONS_PER_BLOCK):
        part = names[first : first + SESSIONS_PER_BLOCK]
        yield _block(_SESSIONS, _encoder.encode([(name, sessions.open[name]) for name in part]))
    held = bytearray()
    for piece in machine:
        view = memoryview(piece)
        while view:
            taken = view[: BLOCK_BYTES_MAX - len(held)]
            held += taken
            view = view[len(taken) :]
            if len(held) == BLOCK_BYTES_MAX:
                yield _block(_MACHINE, bytes(held))
                held.clear()
    if held:
        yield _block(_MACHINE, bytes(held))


def _block(kind: int, data: bytes) -> bytes:
    return _BLOCK.pack(kind, len(data)) + data


def read_header(data: bytes) -> tuple[int, bytes]:
    """(slot, chain) of a snapshot from its first HEADER_BYTES bytes, unverified.
    Raises :class:`SnapshotError`."""
    if len(data) < HEADER_BYTES:
        raise SnapshotError(f"truncated: {len(data)} bytes are no snapshot header")
    magic, version, slot, chain = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise SnapshotError("magic: this is no TRex snapshot")
    if version != FORMAT_VERSION:
        raise SnapshotError(f"version: format {version} is unknown here, only {FORMAT_VERSION} is")
    return slot, chain


def snapshot_digest(data: bytes) -> bytes:
    """The digest that a snapshot ends with, unverified (:func:`decode_snapshot` verifies it).
    Replicas compare it at equal slots. Raises :class:`SnapshotError` if there is none."""
    if len(data) < HEADER_BYTES + _BLOCK.size + DIGEST_BYTES:
        raise SnapshotError("truncated: no digest")
    return bytes(data[-DIGEST_BYTES:])


def decode_snapshot(data: bytes) -> Snapshot:
    """Decode a whole snapshot. Total: raises :class:`SnapshotError` naming what is wrong
    (truncated, magic, version, digest, or the block at fault) and nothing else."""
    slot, chain = read_header(data)
    at = HEADER_BYTES
    genesis: Genesis | None = None
    pairs: list[tuple[int, Session]] = []
    machine: list[memoryview] = []
    for kind, at, block in _blocks(data):
        if genesis is None and kind != _GENESIS:
            raise SnapshotError(f"block at {at}: genesis must come first")
        try:
            if kind == _GENESIS and genesis is None:
                genesis = _genesis.decode(block)
            elif kind == _SESSIONS:
                pairs.extend(_sessions.decode(block))
            elif kind == _MACHINE:
                machine.append(block)
            else:
                raise SnapshotError(f"block at {at}: kind {kind} has no place there")
        except (msgspec.DecodeError, RecursionError, OverflowError, UnicodeDecodeError) as error:
            raise SnapshotError(f"block at {at}: cannot be decoded") from error
    if genesis is None:
        raise SnapshotError("truncated: no genesis")
    names = [name for name, _ in pairs]
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise SnapshotError("sessions are out of order")
    return Snapshot(slot, chain, genesis, sessions_of(pairs), b"".join(machine))


def _blocks(data: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """(kind, offset, data) of all blocks before the end, whose digest is verified first."""
    view = memoryview(data)
    end = len(data) - _BLOCK.size - DIGEST_BYTES
    if end < HEADER_BYTES:
        raise SnapshotError("truncated: no digest")
    if bytes(view[end : end + _BLOCK.size]) != _BLOCK.pack(_END, DIGEST_BYTES):
        raise SnapshotError("truncated: it does not end with a digest")
    if hashlib.blake2b(view[:end], digest_size=DIGEST_BYTES).digest() != view[-DIGEST_BYTES:]:
        raise SnapshotError("digest: the bytes were changed")
    at = HEADER_BYTES
    while at < end:
        if at + _BLOCK.size > end:
            raise SnapshotError(f"block at {at}: cut off")
        kind, length = _BLOCK.unpack_from(view, at)
        first = at + _BLOCK.size
        if first + length > end:
            raise SnapshotError(f"block at {at}: cut off")
        yield kind, at, view[first : first + length]
        at = first + length
