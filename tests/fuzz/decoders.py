"""Every decoder that is given bytes from outside or from a disk, and all that may leave it.

This module alone lists them: :data:`DECODERS` by name, each with the exceptions its documentation
allows, how a case is made, and what decodes it.  A decoder that raises anything else, takes longer
than CASE_CPU_S_MAX or (see ``__main__``) more memory than its process may have has failed.
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import hashlib
import itertools
import os
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dashboard import importer, recording
from dashboard.sqltext import _query_of
from listeners.catchup import values_good
from listeners.relay import answer_to
from listeners.source import Source, _sane
from listeners.sql import Failure, QueryResult, Request, Rows, SqlError, _Connection, _result_of
from listeners.trust import Trust
from listeners.workers import Workers
from tests.credentials import folder, held, on_stream, papers, stream_ring
from tests.fuzz.mutate import good, message, spoilt
from tests.listeners.backbone import make_cluster
from tests.voters.test_journal import CLUSTER as JOURNAL_CLUSTER
from tests.voters.test_journal import VOTER, small_journal
from trex_core import access, snapshot, wire
from trex_core.cluster import ConfigError, parse_cluster
from trex_core.credentials import KEYS_FILE, parse_keys
from trex_core.machine import TooOld
from trex_core.messages import (
    CHAIN_BYTES,
    Ballot,
    CatchupEntries,
    CatchupMessage,
    ClientReply,
    ClientRequest,
    Genesis,
    Kind,
    PeerMessage,
    SealTold,
    SnapshotOffer,
    StreamMessage,
    StreamRun,
    Value,
    decode_value,
    encode_value,
    message_tag,
    value_kind,
)
from trex_core.metadata import commands
from trex_core.metadata.state import EMPTY, MetadataMachine, StateError, state_from
from trex_core.proof import ContradictionError, Proof, tip_of
from trex_core.seal import KEY_BYTES, PeerOpener, Sealer, StreamOpener
from trex_core.sessions import Session, decode_session
from trex_core.state import FixedRecord, Record, ReplayError, chain_run, first_state, replay
from trex_core.wire import Channel, FrameError, Identity
from voters import journal
from voters.archive import ArchiveServer
from voters.config import Setup, decode_setup
from voters.gateway import Client, Gateway

CASE_CPU_S_MAX: Final = 2.0
"""Processor time that one case may take, in seconds."""
WHO: Final = Identity(b"cluster-cluster!", 3, 77, 5)
CLUSTER: Final = WHO.cluster_id
CONFIG: Final = make_cluster()
LOOP: Final = asyncio.new_event_loop()
"""Runs what can only be made, or be fed, in one."""


class Decoder(NamedTuple):
    """``decode`` takes what ``case`` makes, and raises nothing but ``may``."""

    may: tuple[type[BaseException], ...]
    case: Callable[[Random], Any]
    decode: Callable[[Any], object]


class BrokenWordError(AssertionError):
    """A decoder broke its word; the text says which, at which case, and how to see it again."""


def outcome(name: str, number: int) -> str:
    """What case ``number`` of the decoder ``name`` came to: "taken", or the exception it is allowed
    to raise, with its reason. Raises :class:`BrokenWordError`."""
    decoder = DECODERS[name]
    case = decoder.case(Random(f"{name} {number}"))
    since = time.thread_time()
    try:
        decoder.decode(case)
        came_to = "taken"
    except decoder.may as error:
        reason = getattr(error, "reason", "")
        came_to = f"{type(error).__name__}{reason and f' {reason}'}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BrokenWordError(
            _words(name, number, case, f"{type(error).__name__}: {error}")
        ) from error
    took_s = time.thread_time() - since
    if took_s > CASE_CPU_S_MAX:
        raise BrokenWordError(
            _words(name, number, case, f"it took {took_s:.1f} s of processor time")
        )
    return came_to


def outcomes(name: str, numbers: Iterable[int]) -> Counter[str]:
    """The outcomes of these cases. Raises :class:`BrokenWordError`."""
    return Counter(outcome(name, number) for number in numbers)


def _words(name: str, number: int, case: object, what: str) -> str:
    return (
        f"{name}: {what}; see it again with `python -m tests.fuzz --only {name} --case {number}`; "
        f"the case begins {case!r:.300}"
    )


def _require(true: bool, claim: str) -> None:
    if not true:
        raise AssertionError(claim)


# --- frames -----------------------------------------------------------------------------------

_CHANNELS: Final = (Channel.PEER, Channel.STREAM, Channel.CLIENT, Channel.CATCHUP, Channel.JOURNAL)


def _checked(data: bytes) -> bytes:
    """The same with a right checksum: what is behind it is decoded too."""
    if len(data) < wire.HEADER_BYTES:
        return data
    crc = zlib.crc32(data[64:], zlib.crc32(bytes(4), zlib.crc32(data[:60])))
    return data[:60] + crc.to_bytes(4, "big") + data[64:]


def _framed(chance: Random, channel: int, body: bytes, who: Identity = WHO) -> bytes:
    data = wire.frame(who, channel, body, counter=chance.randrange(100))
    kind = chance.random()
    if kind < 0.6:
        return data
    data = spoilt(data, chance, ())
    return _checked(data) if kind < 0.8 else data


def _any_frame(chance: Random) -> bytes:
    return _framed(chance, chance.choice(_CHANNELS), chance.randbytes(chance.randrange(90)))


def _unframe(data: bytes) -> object:
    return [wire.body_bytes(data, CLUSTER), wire.unframe(data, CLUSTER, Channel.PEER)]


def _sealed_head(data: bytes) -> object:
    return wire.sealed_head(data, CLUSTER, Channel.STREAM)


class _Cuts(NamedTuple):
    stream: bytes
    pieces: tuple[bytes, ...]


def _in_pieces(stream: bytes, chance: Random) -> tuple[bytes, ...]:
    if chance.random() < 0.1:
        return tuple(stream[at : at + 1] for at in range(len(stream)))
    cuts = sorted(chance.randrange(len(stream) + 1) for _ in range(chance.randrange(6)))
    bounds = [0, *cuts, len(stream)]
    return tuple(stream[a:b] for a, b in itertools.pairwise(bounds))


def _stream_case(chance: Random) -> _Cuts:
    sizes = [chance.choice((0, 1, 30, 200, 1001)) for _ in range(chance.randrange(1, 4))]
    stream = b"".join(_framed(chance, Channel.CLIENT, chance.randbytes(size)) for size in sizes)
    return _Cuts(stream, _in_pieces(stream, chance))


def _fed(pieces: Iterable[bytes]) -> list[wire.Frame] | str:
    buffer = wire.FrameBuffer(CLUSTER, Channel.CLIENT, 1000)
    found: list[wire.Frame] = []
    try:
        for piece in pieces:
            found += buffer.feed(piece)
            _require(len(buffer._data) <= wire.HEADER_BYTES + 1000, "it holds one frame at most")
    except FrameError as error:
        return error.reason
    return found


def _frame_buffer(case: _Cuts) -> object:
    whole = _fed([case.stream])
    _require(_fed(case.pieces) == whole, "how a stream is cut must not matter")
    if isinstance(whole, str):
        raise FrameError(whole)
    return whole


def _parts_case(chance: Random) -> list[wire.Frame]:
    def part() -> wire.Frame:
        parts = chance.choice((1, 2, 3, 8, 9)) if chance.random() < 0.1 else 2
        at = chance.randrange(parts)
        counter = chance.choice((0, 1, 2, 3, (1 << 64) - 1))
        body = chance.randbytes(chance.randrange(4))
        return wire.Frame(1, chance.randrange(4), 0, 0, 0, counter, at, parts, body)

    return [part() for _ in range(chance.randrange(1, 100))]


def _reassemble(parts: list[wire.Frame]) -> object:
    together = wire.Reassembler(messages_max=8)
    refused: FrameError | None = None
    for part in parts:
        try:
            together.add(part)
        except FrameError as error:
            refused = error
        _require(len(together._open) <= 8, "unfinished messages are bounded")
    if refused is not None:
        raise refused
    return None


# --- seals ------------------------------------------------------------------------------------

_RING: Final = stream_ring(CONFIG)
_STREAM_SEALER: Final = Sealer(Channel.STREAM, WHO, _RING.first, b"salt")
_PEER_SEALER: Final = Sealer(Channel.PEER, WHO, _RING.first, bytes(KEY_BYTES))
_STREAM_OPENER: Final = StreamOpener(CLUSTER, _RING)


def _sealed(sealer: Sealer, of: object, chance: Random) -> bytes:
    data = chance.choice(sealer.datagrams(message(of, chance)[:5000]))
    return data if chance.random() < 0.4 else spoilt(data, chance, ())


def _open_stream(data: bytes) -> object:
    found = _STREAM_OPENER.open(data)
    return _heard(wire.decode_stream(found.body)) if found.parts == 1 else found


def _heard(said: StreamMessage) -> object:
    return _sane(said)


def _open_peer(data: bytes) -> object:
    opener = PeerOpener(CLUSTER, _RING)
    opener.told(WHO, _RING.first.epoch, bytes(KEY_BYTES), 1)
    found = opener.open(data)
    try:
        opener.open(data)
    except FrameError as error:
        _require(error.reason == "replay", "none is taken twice")
    else:
        raise AssertionError("taken twice")
    return wire.decode_peer(found.body) if found.parts == 1 else found


def _told(body: bytes) -> object:
    told = wire.decode_link(body)
    if isinstance(told, SealTold):
        PeerOpener(CLUSTER, _RING).told(WHO, told.epoch, told.secret, told.counter)
    return told


# --- voters: what connections and files bring ---------------------------------------------------


class _NoWire:
    """A transport that takes all and says nothing."""

    def get_extra_info(self, _name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return True

    def write(self, _data: bytes) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_write_buffer_limits(self, **_limits: int) -> None: ...


async def _made_gateway() -> Gateway:
    entry = CONFIG.voter(1)
    names = commands.what_changes
    return Gateway(WHO, entry, papers(CONFIG, "voter-1"), names, lambda _: None, lambda: None)


_gateway: Final = functools.cache(lambda: LOOP.run_until_complete(_made_gateway()))
_HOLDER: Final = access.Holder(access.Grant("x", "writer", ("app/",)), "1", 0, 1 << 40)


def _requests_case(chance: Random) -> tuple[bytes, ...]:
    bodies = [message(ClientRequest, chance) for _ in range(chance.randrange(1, 3))]
    stream = b"".join(_framed(chance, Channel.CLIENT, body) for body in bodies)
    return _in_pieces(stream, chance)


def _gateway_takes(pieces: tuple[bytes, ...]) -> object:
    gateway = _gateway()
    client = Client(gateway)
    client.transport, client.holder, client.open = _NoWire(), _HOLDER, True  # type: ignore[assignment]
    for piece in pieces:
        client.data_received(piece)
    for _, submit in gateway.take_all_submits():
        denied = access.why_denied(_HOLDER.grant, submit, commands.what_changes)
        _require(not denied, "only what may be done is queued")
    client.connection_lost(None)
    _require(gateway.unfinished_bytes == 0, "what was not whole is forgotten with its connection")
    gateway.others.take_all()
    gateway.flush()
    gateway.held.clear()
    return None


def _catchup_case(chance: Random) -> bytes:
    return _framed(chance, Channel.CATCHUP, message(CatchupMessage, chance))


async def _received(data: bytes) -> object:
    server = ArchiveServer.__new__(ArchiveServer)
    server._cluster_id = CLUSTER
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await server._receive(reader)


def _entry_bytes(chance: Random, who: Identity, number: int, offset: int, of: object) -> bytes:
    data = message(of, chance)
    guard = (len(data) + 5) ^ 0xFFFFFFFF
    body = guard.to_bytes(4, "big") + data + b"\xff"
    made = wire.frame(who, Channel.JOURNAL, body, salt=number, counter=offset)
    return made if chance.random() < 0.7 else spoilt(made, chance, ())


def _header_case(chance: Random) -> bytes:
    return _entry_bytes(chance, WHO, 1, 0, chance.choice((journal.SegmentHeader, journal.Entry)))


_FILES: Final = {number: bytes(data) for number, data in small_journal()[0]}
_JOURNAL_WHO: Final = Identity(JOURNAL_CLUSTER, VOTER, 77, 1)


def _journal_case(chance: Random) -> dict[int, bytes]:
    """A journal of two segments: spoilt; or with drawn entries, right by their checksum, behind
    those of its last segment."""
    files = dict(_FILES)
    number = chance.choice((1, 2))
    if chance.random() < 0.5:
        files[number] = spoilt(files[number], chance, tuple(files.values()))
        return files
    end = journal.survey([1, 2], _FILES.__getitem__, JOURNAL_CLUSTER, VOTER).last.end
    data = files[2][:end]
    for _ in range(chance.randrange(1, 3)):
        entry = _entry_bytes(chance, _JOURNAL_WHO, 2, len(data), journal.Batch)
        data += entry
    files[2] = (data + bytes(100)).ljust(len(files[2]), b"\0")  # no shorter than it was made
    return files


def _recover(files: dict[int, bytes]) -> object:
    found = journal.survey(sorted(files), files.__getitem__, JOURNAL_CLUSTER, VOTER)
    state = first_state(JOURNAL_CLUSTER)
    for _, _, record in journal.records_of(found, files.__getitem__, 0):
        state, _ = replay(state, record)
    return state


def _replay_case(chance: Random) -> bytes:
    return message(tuple[Record, ...], chance)


def _replay(body: bytes) -> object:
    state = first_state(CLUSTER)
    for record in wire.decode_records(body):
        if isinstance(record, FixedRecord) and record.last > 1 << 20:
            continue  # no journal that long is read here
        state, _ = replay(state, record)
    return state


# --- snapshots and the metadata in them -----------------------------------------------------------


def _rows_case(chance: Random) -> bytes:
    pieces = [good(tuple[int, int], chance) if chance.random() < 0.3 else b"\x92\x01\x05"]
    pieces += [message(tuple[commands.Row, ...], chance) for _ in range(chance.randrange(3))]
    data = b"".join(len(piece).to_bytes(4, "big") + piece for piece in pieces)
    return data if chance.random() < 0.7 else spoilt(data, chance, ())


def _snapshot_case(chance: Random) -> bytes:
    def block(kind: int, data: bytes) -> bytes:
        return bytes((kind,)) + len(data).to_bytes(4, "big") + data

    head = snapshot.MAGIC + (1).to_bytes(2, "big") + chance.randbytes(8) + bytes(32)
    blocks = [block(1, message(Genesis, chance))]
    blocks += [
        block(2, message(tuple[tuple[int, Session], ...], chance))
        for _ in range(chance.randrange(3))
    ]
    blocks += [block(3, _rows_case(chance)) for _ in range(chance.randrange(2))]
    if chance.random() < 0.2:
        chance.shuffle(blocks)
    body = head + b"".join(blocks)
    if chance.random() < 0.3:
        body = spoilt(body, chance, ())
    data = body + block(0, hashlib.blake2b(body, digest_size=32).digest())
    return data if chance.random() < 0.8 else spoilt(data, chance, ())


def _snapshot(data: bytes) -> object:
    snapshot.read_header(data)
    snapshot.snapshot_digest(data)
    return state_from(snapshot.decode_snapshot(data).machine)


def _command_case(chance: Random) -> bytes:
    head = b"\xc1\x01" if chance.random() < 0.9 else chance.randbytes(2)
    return head + message(commands.Command, chance)


def _apply(data: bytes) -> object:
    """All that is done with a command: each total, but for ``TooOld``."""
    commands.describe_command(data)
    commands.what_changes(data)
    commands.why_inadmissible(data)
    machine = MetadataMachine(EMPTY)
    result = commands.decode_result(machine.apply(1, data))
    commands.decode_command(data)
    return result


def _ask(data: bytes) -> object:
    machine = MetadataMachine(EMPTY)
    commands.decode_reply(machine.query(data))
    return commands.decode_question(data)


def _value(data: bytes) -> object:
    value_kind(data)
    message_tag(data)
    return decode_value(data)


# --- listeners --------------------------------------------------------------------------------


async def _made_source() -> Source:
    return Source(CONFIG, held(CONFIG), Counter())


_source: Final = functools.cache(lambda: LOOP.run_until_complete(_made_source()))


def _datagrams_case(chance: Random) -> list[tuple[bool, bytes]]:
    who = Identity(CONFIG.cluster_id_bytes, chance.choice((0, 1, 1, 2, 9)), 5, 6)
    bodies = [message(StreamMessage, chance)[:4000] for _ in range(chance.randrange(1, 4))]
    return [
        (chance.random() < 0.5, datagram if chance.random() < 0.9 else spoilt(datagram, chance, ()))
        for body in bodies
        for datagram in on_stream(CONFIG, who, body)
    ]


def _hear(datagrams: list[tuple[bool, bytes]]) -> object:
    source = _source()
    source._reports_second = 0
    source._inbox.extend(datagrams)
    source._take_inbox()
    source._believed.clear()
    return None


@functools.cache
def _trusting() -> Trust:
    """A belief that any signature convinces: what is asked is whether anything can hurt it."""
    trust = Trust(CONFIG, held(CONFIG), Counter())
    trust.proof._verify = lambda *_: True  # type: ignore[method-assign]
    return trust


def _answers_case(chance: Random) -> CatchupMessage:
    drawn = msgspec.msgpack.decode(good(CatchupMessage, chance), type=CatchupMessage)
    if isinstance(drawn, CatchupEntries) and chance.random() < 0.8:
        values = (encode_value(Value(Kind.NOOP, Ballot())),) * chance.randrange(5)
        last = drawn.first + len(values) - 1
        before = bytes(CHAIN_BYTES)
        chain = chain_run(before, drawn.first, values)[-1] if values else before
        end = msgspec.structs.replace(drawn.end, slot=max(0, last), chain=chain)
        return msgspec.structs.replace(drawn, chain_before=before, values=values, end=end)
    return drawn


def _answered(message: CatchupMessage) -> object:
    """As a listener takes it for an answer, and as one that helps takes it for a request."""
    trust = _trusting()
    if isinstance(message, CatchupEntries) and values_good(message.values):
        return trust.entries(message)
    if isinstance(message, SnapshotOffer):
        return trust.offer(message)
    return answer_to(message, trust)


def _runs_case(chance: Random) -> list[StreamRun]:
    drawn = (
        msgspec.msgpack.decode(good(StreamRun, chance), type=StreamRun)
        for _ in range(chance.randrange(1, 6))
    )
    chains = (bytes(32), b"c" * 32)
    runs = [
        msgspec.structs.replace(
            run, chain_before=chance.choice(chains), tip_chain=chance.choice(chains)
        )
        for run in drawn
    ]
    return [run for run in runs if run.first >= 1 and run.values]


def _prove(runs: list[StreamRun]) -> object:
    proof = Proof(lambda *_: True, lambda _: None)
    for run in runs:
        proof.proven([(1, run)], [])
        if proof.tip(tip_of(run)):
            proof.proven([], [(run.tip_slot, run.tip_chain)])
        proof.done(run.first - 1)
    return None


def _sql_case(chance: Random) -> bytes:
    body = message(Request, chance)
    data = len(body).to_bytes(4, "big") + body
    return data if chance.random() < 0.7 else spoilt(data, chance, ())


_ENCODERS = Workers("fuzz")


async def _no_rows(_request: Request) -> QueryResult:
    return QueryResult((), (), (), 0, 0)


async def _served(data: bytes) -> object:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    writer = asyncio.StreamWriter(_NoWire(), _Drained(), None, LOOP)  # type: ignore[arg-type]
    return await _Connection(reader, writer, _no_rows, _ENCODERS, Counter(), set())._serve_one()


class _Drained:
    async def _drain_helper(self) -> None: ...


# --- text that people and programs write ----------------------------------------------------------

_CLUSTER_TEXT: Final = f"""
name = "test"
cluster_id = "{CONFIG.cluster_id}"
[[voters]]
id = 1
host = "127.0.0.1"
peer_port = 7101
client_port = 7201
archive_port = 7301
directory = "voter-1"
[stream]
group = "239.255.1.1"
port = 7401
[timing]
tick_ms = 20
"""
_KEYS_TEXT: Final = (folder(CONFIG, "voter-1") / KEYS_FILE).read_text()
_PEM: Final = (folder(CONFIG, "voter-1") / "node.pem").read_bytes()
_DER: Final = x509.load_pem_x509_certificate(_PEM).public_bytes(Encoding.DER)
_TOML_PARTS: Final = (
    "[" * 2000, "{a=" * 2000, "9" * 5000, "[" + ".".join("a" * 3000) + "]", "1e9999", "nan", "-inf",
    "9999-12-31T23:59:60Z", '"\\ud800"', '"""', "\ufeff", "\x00", "true", "[[voters]]", "\ud800",
    "[voters]", "a=1\na=1\n", "1979-05-27", "0x" + "f" * 40, "'" * 3,
)  # fmt: skip


def _text_case(text: str) -> Callable[[Random], str]:
    def case(chance: Random) -> str:
        if chance.random() < 0.5:
            at = chance.randrange(len(text) + 1)
            to = chance.choice((at, min(at + chance.randrange(20), len(text))))
            return text[:at] + chance.choice(_TOML_PARTS) + text[to:]
        return spoilt(text.encode(), chance, ()).decode(errors="surrogateescape")

    return case


def _uris_case(chance: Random) -> list[str]:
    role = chance.choice((*access.ROLES, "boss", ""))
    name = quote(chance.choice(("x", "a b", "é", "\0", "x" * 200, "")), safe="")
    query = chance.choice(("", "?prefix=a", "?prefix=%ff", "?" + "&".join(["prefix=a"] * 40), "?x"))
    uri = f"trex://{CLUSTER.hex()}/{role}/{name}{query}"
    if chance.random() < 0.6:
        uri = spoilt(uri.encode(), chance, (b"trex://[::1/", b"http://")).decode(errors="replace")
    return [uri] * chance.choice((1, 1, 1, 2)) + ["http://x"] * chance.choice((0, 1))


def _certificate_case(chance: Random) -> bytes:
    return spoilt(chance.choice((_PEM, _DER, _DER, _DER)), chance, (_DER,))


def _serials_case(chance: Random) -> str:
    text = b'["1f", "abcdef0123456789", "\\ud83e\\udd96"]'
    parts = (b"[" * 5000, b'{"a":' * 2000, b"1e999", b'"\\ud800"', b"NaN", b"\xff", b"null")
    if chance.random() < 0.4:
        at = chance.randrange(len(text))
        return (text[:at] + chance.choice(parts) + text[at:]).decode(errors="surrogateescape")
    return spoilt(text, chance, ()).decode(errors="surrogateescape")


_SETUP: Final = Setup(CONFIG, 1, "a", "b", "c", "d").encode()


# --- recordings and traces ----------------------------------------------------------------------

_PLACE: Final = Path(tempfile.mkdtemp(prefix="trex-fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _PLACE / f"{name}-{os.getpid()}"
    path.write_bytes(data)
    return path


def _recording_case(chance: Random) -> bytes:
    def framed(body: bytes) -> bytes:
        length = len(body).to_bytes(4, "big")
        crcs = zlib.crc32(length).to_bytes(4, "big") + zlib.crc32(body).to_bytes(4, "big")
        return length + crcs + body

    header = recording.Header("1", CONFIG, "x", 1)
    first = msgspec.msgpack.encode(header)
    if chance.random() < 0.3:
        first = message(recording.Header, chance)
    data = recording.MAGIC + (1).to_bytes(2, "big") + framed(first)
    data += b"".join(framed(message(recording.Frame, chance)) for _ in range(chance.randrange(4)))
    if chance.random() < 0.2:
        data = gzip.compress(data, 1)
    return data if chance.random() < 0.6 else spoilt(data, chance, ())


def _replayed(data: bytes) -> object:
    return list(recording.Recording(_file("recording", data)).frames())


_ROWS: Final = b"0,5,0,HofLGzk1Or/8Ildj2,0.5,0.2493\n1,5,2,a,0.5,\n2,5,1,a,,\n"


def _trace_case(chance: Random) -> bytes:
    data = spoilt(_ROWS, chance, (_ROWS,)) if chance.random() < 0.8 else _ROWS
    if chance.random() < 0.5:
        data = gzip.compress(data, 1)
        data = spoilt(data, chance, ()) if chance.random() < 0.8 else data
    return data


def _imported(data: bytes) -> object:
    source = importer.examine(_file("trace", data))
    return list(importer.commands(source, 1))


def _decoding(of: object) -> Callable[[Random], bytes]:
    return functools.partial(message, of)


_NOT_READ: Final = (asyncio.IncompleteReadError,)
DECODERS: Final[dict[str, Decoder]] = {
    "wire.unframe": Decoder((FrameError,), _any_frame, _unframe),
    "wire.sealed_head": Decoder(
        (FrameError,), lambda chance: _sealed(_STREAM_SEALER, StreamMessage, chance), _sealed_head
    ),
    "wire.FrameBuffer": Decoder((FrameError,), _stream_case, _frame_buffer),
    "wire.Reassembler": Decoder((FrameError,), _parts_case, _reassemble),
    "wire.decode_peer": Decoder((FrameError,), _decoding(PeerMessage), wire.decode_peer),
    "wire.decode_link": Decoder((FrameError,), _decoding(PeerMessage | SealTold), _told),
    "wire.decode_stream": Decoder(
        (FrameError,), _decoding(StreamMessage), lambda body: _heard(wire.decode_stream(body))
    ),
    "wire.decode_request": Decoder((FrameError,), _decoding(ClientRequest), wire.decode_request),
    "wire.decode_reply": Decoder((FrameError,), _decoding(ClientReply), wire.decode_reply),
    "wire.decode_catchup": Decoder((FrameError,), _decoding(CatchupMessage), wire.decode_catchup),
    "wire.decode_records": Decoder((FrameError, ReplayError, ValueError), _replay_case, _replay),
    "seal.StreamOpener": Decoder(
        (FrameError,), lambda chance: _sealed(_STREAM_SEALER, StreamMessage, chance), _open_stream
    ),
    "seal.PeerOpener": Decoder(
        (FrameError,), lambda chance: _sealed(_PEER_SEALER, PeerMessage, chance), _open_peer
    ),
    "messages.decode_value": Decoder((msgspec.DecodeError,), _decoding(Value), _value),
    "sessions.decode_session": Decoder((msgspec.DecodeError,), _decoding(Session), decode_session),
    "snapshot.decode_snapshot": Decoder(
        (snapshot.SnapshotError, StateError), _snapshot_case, _snapshot
    ),
    "metadata.state_from": Decoder((StateError,), _rows_case, state_from),
    "metadata.decode_command": Decoder((commands.CommandError, TooOld), _command_case, _apply),
    "metadata.decode_question": Decoder(
        (commands.CommandError,), _decoding(commands.Question), _ask
    ),
    "metadata.decode_result": Decoder(
        (commands.CommandError,), _decoding(commands.Outcome), commands.decode_result
    ),
    "metadata.decode_reply": Decoder(
        (commands.CommandError,), _decoding(commands.Reply), commands.decode_reply
    ),
    "metadata.decode_row": Decoder(
        (commands.CommandError,), _decoding(commands.Row), commands.decode_row
    ),
    "access.grant_of": Decoder(
        (ConfigError,), _uris_case, lambda uris: access.grant_of(uris, CLUSTER)
    ),
    "access.holder_of": Decoder(
        (ConfigError,),
        _certificate_case,
        lambda data: access.holder_of(data, CONFIG.cluster_id_bytes),
    ),
    "access.revoked_serials": Decoder((ConfigError,), _serials_case, access.revoked_serials),
    "credentials.parse_keys": Decoder((ConfigError,), _text_case(_KEYS_TEXT), parse_keys),
    "cluster.parse_cluster": Decoder((ConfigError,), _text_case(_CLUSTER_TEXT), parse_cluster),
    "voters.decode_setup": Decoder((ConfigError,), _text_case(_SETUP), decode_setup),
    "voters.gateway": Decoder((), _requests_case, _gateway_takes),
    "voters.archive": Decoder(
        (FrameError, *_NOT_READ),
        _catchup_case,
        lambda data: LOOP.run_until_complete(_received(data)),
    ),
    "journal.read_header": Decoder(
        (FrameError, journal.UnreadableError),
        _header_case,
        lambda data: journal.read_header(data, 1),
    ),
    "journal.survey": Decoder(
        (journal.JournalError, ReplayError, ValueError), _journal_case, _recover
    ),
    "listeners.source": Decoder((ContradictionError,), _datagrams_case, _hear),
    "listeners.trust": Decoder((ContradictionError, FrameError), _answers_case, _answered),
    "proof.Proof": Decoder((ContradictionError,), _runs_case, _prove),
    "sql.request": Decoder((), _sql_case, lambda data: LOOP.run_until_complete(_served(data))),
    "sql.response": Decoder((SqlError,), _decoding(Rows | Failure), _result_of),
    "dashboard.recording": Decoder((recording.RecordingError,), _recording_case, _replayed),
    "dashboard.importer": Decoder((importer.ImportRefusedError,), _trace_case, _imported),
    "dashboard.sqltext": Decoder(
        (), lambda chance: _serials_case(chance).encode(errors="surrogateescape"), _query_of
    ),
}
