"""The frame: round trips, and garbage that never raises anything but FrameError."""

from __future__ import annotations

import contextlib
import random
import zlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from trex_core import wire
from trex_core.messages import (
    DATAGRAM_BYTES_MAX,
    LISTENER_REPORT_TAG,
    NO_BALLOT,
    Accept,
    Ballot,
    CatchupRequest,
    HeartbeatAck,
    ListenerReport,
    Pairs,
    Promise,
    SealTold,
    StreamRun,
    Submit,
    Tip,
    message_tag,
)
from trex_core.state import AcceptRecord, FixedRecord, PromiseRecord

CLUSTER = b"cluster-cluster!"
IDENTITY = wire.Identity(CLUSTER, 3, 77, 5)
MESSAGES = [
    (
        wire.Channel.PEER,
        wire.decode_peer,
        Accept(Ballot(0, 2, 3), 9, (b"v", b"w"), Tip(8, b"c" * 32, 1)),
    ),
    (wire.Channel.PEER, wire.decode_peer, HeartbeatAck(Ballot(1, 2, 3), 4, 5, 6, False)),
    (wire.Channel.PEER, wire.decode_peer, Promise(NO_BALLOT, 1, 0, (Pairs(1, 2, NO_BALLOT),))),
    (
        wire.Channel.STREAM,
        wire.decode_stream,
        StreamRun(NO_BALLOT, 1, b"c" * 32, (b"v",), 1, b"d" * 32),
    ),
    (wire.Channel.CLIENT, wire.decode_request, Submit(1, 1, 2, 3, 3, b"command")),
    (wire.Channel.CATCHUP, wire.decode_catchup, CatchupRequest("me", 4)),
    (
        wire.Channel.JOURNAL,
        wire.decode_records,
        (
            PromiseRecord(Ballot(0, 1, 1)),
            AcceptRecord(Ballot(0, 1, 1), 1, (b"v",)),
            FixedRecord(1, b"c" * 32),
        ),
    ),
]


@pytest.mark.parametrize(("channel", "decode", "message"), MESSAGES)
def test_round_trip(channel, decode, message) -> None:
    data = wire.frame(IDENTITY, channel, wire.encode_body(message), salt=9, counter=10)
    got = wire.unframe(data, CLUSTER, channel)
    assert decode(got.body) == message
    assert (got.sender, got.incarnation, got.boot, got.salt, got.counter) == (3, 77, 5, 9, 10)


@pytest.mark.parametrize(("channel", "decode", "message"), MESSAGES)
def test_every_flipped_bit_and_every_cut_is_refused(channel, decode, message):  # noqa: ARG001
    data = wire.frame(IDENTITY, channel, wire.encode_body(message))
    for index in range(len(data)):
        for bit in (1, 16, 128):
            bad = bytearray(data)
            bad[index] ^= bit
            with pytest.raises(wire.FrameError):
                wire.unframe(bytes(bad), CLUSTER, channel)
        with pytest.raises(wire.FrameError):
            wire.unframe(data[:index], CLUSTER, channel)
    with pytest.raises(wire.FrameError, match="length"):
        wire.unframe(data + b"x", CLUSTER, channel)


def test_each_reason_is_named() -> None:
    data = wire.frame(IDENTITY, wire.Channel.PEER, b"body")
    cases = [
        ("short", data[:79], CLUSTER, wire.Channel.PEER),
        ("magic", b"XX" + data[2:], CLUSTER, wire.Channel.PEER),
        ("version", data[:2] + b"\x09" + data[3:], CLUSTER, wire.Channel.PEER),
        ("cluster", data, b"another-cluster!", wire.Channel.PEER),
        ("channel", data, CLUSTER, wire.Channel.STREAM),
        ("checksum", data[:-1] + b"!", CLUSTER, wire.Channel.PEER),
    ]
    for reason, bad, cluster, channel in cases:
        with pytest.raises(wire.FrameError) as caught:
            wire.unframe(bad, cluster, channel)
        assert caught.value.reason == reason


def test_each_reason_of_a_sealed_frame_is_named() -> None:
    prefix = wire.sealed_prefix(IDENTITY, wire.Channel.STREAM, 7, 9)
    numbers = (1, 0, 1, 3)

    def sealed(nonce: bytes, body: bytes, head: bytes) -> bytes:
        assert (len(nonce), len(head)) == (wire.NONCE_BYTES, 64)
        return body + b"t" * wire.TAG_BYTES

    data = wire.sealed_frame(prefix, *numbers, b"body", sealed)
    head = wire.sealed_head(data, CLUSTER, wire.Channel.STREAM)
    assert head == wire.Frame(
        wire.Channel.STREAM, IDENTITY.sender, IDENTITY.incarnation, IDENTITY.boot, 9, 1, 0, 1,
        b"body" + b"t" * wire.TAG_BYTES, 7, 3,
    )  # fmt: skip
    long = bytes(wire.DATAGRAM_BODY_BYTES_MAX + 1)
    cases = [
        ("short", data[:79]),
        ("magic", b"XX" + data[2:]),
        ("version", data[:2] + b"\x09" + data[3:]),
        ("cluster", data[:4] + b"another-cluster!" + data[20:]),
        ("length", data[:-1]),
        ("length", data + b"!"),
        ("length", wire.sealed_frame(prefix, *numbers, long, sealed)),
        ("channel", data[:3] + bytes([wire.Channel.PEER]) + data[4:]),
        ("sealed", data[:22] + bytes(2) + data[24:]),
        ("part", data[:52] + b"\x01" + data[53:]),
    ]
    for reason, bad in cases:
        with pytest.raises(wire.FrameError) as caught:
            wire.sealed_head(bad, CLUSTER, wire.Channel.STREAM)
        assert caught.value.reason == reason


def test_the_length_of_a_body_is_told_by_a_good_header_only() -> None:
    data = wire.frame(IDENTITY, wire.Channel.PEER, b"body")
    assert wire.body_bytes(data[: wire.HEADER_BYTES], CLUSTER) == 4
    for reason, bad, most in (("short", data[:79], 4), ("magic", b"XX" + data[2:], 4),
                              ("length", data, 3)):  # fmt: skip
        with pytest.raises(wire.FrameError) as caught:
            wire.body_bytes(bad, CLUSTER, most)
        assert caught.value.reason == reason


def with_field(data: bytes, index: int, value: int) -> bytes:
    """A whole frame with one field of its header changed, and the checksum that is right then."""
    fields = list(wire._HEADER.unpack_from(data))
    body = data[wire.HEADER_BYTES :]
    fields[index], fields[14] = value, 0
    fields[14] = zlib.crc32(wire._HEADER.pack(*fields) + body)
    return wire._HEADER.pack(*fields) + body


def test_a_right_checksum_excuses_nothing() -> None:
    """What a frame says of itself is looked at all the same: sealed, and which part of how many."""
    data = wire.frame(IDENTITY, wire.Channel.PEER, b"body")
    assert with_field(data, 9, 0) == data, "the helper makes frames"
    for index, value, reason in ((5, 1, "sealed"), (10, 1, "part"), (11, 0, "part")):
        with pytest.raises(wire.FrameError) as caught:
            wire.unframe(with_field(data, index, value), CLUSTER, wire.Channel.PEER)
        assert caught.value.reason == reason


def test_a_message_of_too_many_parts_is_refused() -> None:
    data = wire.frame(IDENTITY, wire.Channel.PEER, b"body")
    many = with_field(data, 11, wire.PEER_DATAGRAMS_MAX + 1)
    with pytest.raises(wire.FrameError) as caught:
        wire.Reassembler().add(wire.unframe(many, CLUSTER, wire.Channel.PEER))
    assert caught.value.reason == "part"


def test_a_link_tells_its_seal_and_carries_messages() -> None:
    for message in (SealTold(1, bytes(32), 5), HeartbeatAck(Ballot(1, 2, 3), 4, 5, 6, False)):
        assert wire.decode_link(wire.encode_body(message)) == message
    with pytest.raises(wire.FrameError):
        wire.decode_peer(wire.encode_body(SealTold(1, bytes(32), 5)))
    assert "secret=..." in repr(SealTold(1, b"s" * 32, 5)), "no log shows it"


def test_the_tag_of_a_message_is_known_before_it_is_decoded() -> None:
    report = ListenerReport("name", 1, 2, 3, 4, 5, True, 6, 7, 8, 9, 10, "1.0")
    for message, tag in ((report, LISTENER_REPORT_TAG), (Ballot(), -1)):
        body = wire.encode_body(message)
        assert message_tag(body[:4]) == (tag if tag > 0 else body[1])
    assert message_tag(b"\xdc\x00\x20\x2b") == 43, "a long array"
    for short in (b"", b"\x93", b"\xdc\x00\x20", b"\x93\xcc"):
        assert message_tag(short) == -1


@pytest.mark.parametrize("number", [-2, 1 << 63, (1 << 64) - 1, -(1 << 63)])
@pytest.mark.parametrize("field", ["first", "tip_slot", "ballot"])
def test_numbers_that_no_store_can_hold_are_refused(field, number):
    """A slot of 2**64 - 1 is a number to msgpack, and once ended a listener's store."""
    run = StreamRun(NO_BALLOT, 1, b"c" * 32, (b"v",), 1, b"d" * 32)
    value = Ballot(0, number, 1) if field == "ballot" else number
    body = wire.encode_body(msgspec.structs.replace(run, **{field: value}))
    with pytest.raises(wire.FrameError):
        wire.decode_stream(body)


@given(some.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_bytes_raise_nothing_but_frame_error(data: bytes) -> None:
    decoders = (
        wire.decode_peer,
        wire.decode_stream,
        wire.decode_request,
        wire.decode_reply,
        wire.decode_catchup,
        wire.decode_records,
    )
    for decode in decoders:
        with contextlib.suppress(wire.FrameError):
            decode(data)
    with pytest.raises(wire.FrameError):
        wire.unframe(data, CLUSTER, wire.Channel.PEER)
    with contextlib.suppress(wire.FrameError):
        wire.FrameBuffer(CLUSTER, wire.Channel.CLIENT).feed(data)


def test_deep_nesting_is_a_frame_error() -> None:
    with pytest.raises(wire.FrameError):
        wire.decode_peer(b"\x91" * 100_000)


@pytest.mark.parametrize("size", [0, 1, 1320, 1321, 5000, wire.PEER_UDP_BODY_BYTES_MAX])
def test_fragments_fit_a_datagram_and_come_together_in_any_order(size: int) -> None:
    body = random.Random(size).randbytes(size)
    datagrams = wire.fragments(IDENTITY, wire.Channel.PEER, body, counter=100)
    assert all(len(d) <= DATAGRAM_BYTES_MAX for d in datagrams)
    assert len(datagrams) <= wire.PEER_DATAGRAMS_MAX
    random.Random(1).shuffle(datagrams)
    together = wire.Reassembler()
    got = [together.add(wire.unframe(d, CLUSTER, wire.Channel.PEER)) for d in datagrams]
    assert got[-1] == body and got[:-1] == [None] * (len(datagrams) - 1)


def test_unfinished_messages_are_bounded() -> None:
    together = wire.Reassembler(messages_max=4)
    for number in range(100):
        datagrams = wire.fragments(IDENTITY, wire.Channel.PEER, bytes(3000), counter=number * 10)
        assert together.add(wire.unframe(datagrams[0], CLUSTER, wire.Channel.PEER)) is None
    assert len(together._open) <= 4


@pytest.mark.parametrize("step", [1, 7, 100, 4096])
def test_a_byte_stream_is_cut_into_frames_however_it_arrives(step: int) -> None:
    bodies = [random.Random(n).randbytes(n * 37) for n in range(20)]
    stream = b"".join(wire.frame(IDENTITY, wire.Channel.CLIENT, body) for body in bodies)
    buffer = wire.FrameBuffer(CLUSTER, wire.Channel.CLIENT)
    got, done = [], 0
    for start in range(0, len(stream), step):
        piece = stream[start : start + step]
        frames = buffer.feed(piece)
        got += [frame.body for frame in frames]
        done += sum(wire.HEADER_BYTES + len(frame.body) for frame in frames)
        assert buffer.unfinished == start + len(piece) - done
    assert got == bodies
    assert buffer.unfinished == 0


def test_a_stranger_cannot_make_the_buffer_grow() -> None:
    buffer = wire.FrameBuffer(CLUSTER, wire.Channel.CLIENT, body_bytes_max=1000)
    with pytest.raises(wire.FrameError, match="length"):
        buffer.feed(wire.frame(IDENTITY, wire.Channel.CLIENT, bytes(1001))[:100])
