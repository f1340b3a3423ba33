"""Clients' connections: queues, backpressure, refusals, and what strangers can do (nothing)."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from tests.credentials import issue, papers
from tests.voters.here import SOON_S, some_cluster
from trex_core.access import Grant, holder_of
from trex_core.credentials import CERTIFICATE_FILE
from trex_core.messages import (
    COMMAND_BYTES_MAX,
    RENEW_LEASES_MAX,
    Answer,
    HandOverRequest,
    Kind,
    Query,
    Refusal,
    RefusalReason,
    Renew,
    StatusRequest,
    Submit,
)
from trex_core.metadata.commands import ConfigPut, encode_command, what_changes
from trex_core.wire import Channel, FrameBuffer, Identity, decode_reply, encode_body, frame
from voters import StartError, frames, gateway
from voters.frames import IDLE_S_MIN, STRANGER_S_MAX
from voters.gateway import CONNECTIONS_MAX, REQUEST_BODY_BYTES_MAX, Gateway

pytestmark = pytest.mark.anyio


def submit(number, size=10):
    return Submit(number, Kind.COMMAND, 1, number, 1, bytes(size))


class Client:
    """A client's end of a connection."""

    def __init__(self, cluster, reader, writer):
        self.cluster_id = cluster.cluster_id_bytes
        self.reader = reader
        self.writer = writer
        self.buffer = FrameBuffer(self.cluster_id, Channel.CLIENT)
        self.replies = []

    def send(self, *messages):
        me = Identity(self.cluster_id)
        self.writer.write(
            b"".join(frame(me, Channel.CLIENT, encode_body(message)) for message in messages)
        )

    async def receive(self, count=1):
        async with asyncio.timeout(SOON_S):
            while len(self.replies) < count:
                data = await self.reader.read(1 << 18)
                if not data:
                    raise EOFError
                self.replies += [decode_reply(f.body) for f in self.buffer.feed(data)]
        taken, self.replies = self.replies[:count], self.replies[count:]
        return taken

    async def closed(self):
        async with asyncio.timeout(SOON_S):
            try:
                while await self.reader.read(1 << 18):
                    pass
            except ConnectionError:
                pass
        return True


class Desk:
    """A gateway, what it counted, and a way to wait for its input."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.counted = Counter()
        self.changed = asyncio.Event()

    def count(self, name):
        self.counted[name] += 1
        self.changed.set()

    async def until(self, holds):
        async with asyncio.timeout(SOON_S):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    async def until_gone(self):
        async with asyncio.timeout(SOON_S):
            while self.gateway.connections:
                self.gateway.changed.clear()
                await self.gateway.changed.wait()

    async def connect(self, name="admin"):
        entry = self.cluster.voter(1)
        client = Client(
            self.cluster,
            *await asyncio.open_connection(
                entry.host, entry.client_port, ssl=papers(self.cluster, name).client
            ),
        )
        self.stack.callback(client.writer.close)
        self.stack.callback(client.writer.transport.abort)  # first, or the close waits for us
        return client


@pytest.fixture
async def desk():
    async with AsyncExitStack() as stack:
        cluster = stack.enter_context(some_cluster())
        held = Desk(cluster)
        held.stack = stack
        held.gateway = await Gateway.open(
            Identity(cluster.cluster_id_bytes, 1, 5, 6),
            cluster.voter(1),
            papers(cluster, "voter-1"),
            what_changes,
            held.count,
            held.changed.set,
        )
        stack.push_async_callback(held.gateway.aclose)
        admit = held.gateway.admit
        held.gateway.admit = lambda connection: (admit(connection), held.changed.set())
        yield held


async def test_requests_are_queued_by_kind_and_replies_reach_who_asked(desk):
    one, two = await desk.connect(), await desk.connect()
    one.send(submit(1), Query(2, b"?", True), submit(3))
    two.send(submit(1))
    held = desk.gateway
    await desk.until(lambda: (len(held.submits), len(held.others)) == (3, 1))
    asked = [(client, message.id) for client, message in held.take_submits(10, 1 << 20)]
    for client, number in asked:
        client.reply(Answer(number, 7, b"%d" % number))
    for client, request in held.others:
        client.reply(Answer(request.id, 7, b"read"))
    held.flush()
    assert sorted(reply.id for reply in await one.receive(3)) == [1, 2, 3]
    assert [reply.body for reply in await two.receive(1)] == [b"1"]


async def test_what_a_certificate_does_not_allow_is_refused_and_never_queued(desk):
    bob = issue(desk.cluster, Grant("bob", "writer", ("app/",)))
    client = await desk.connect("bob")

    def put(number, key):
        command = encode_command(ConfigPut(key, "v"))
        return Submit(number, Kind.COMMAND, 1, number, 1, command)

    held = desk.gateway
    client.send(put(1, "app/a"), put(2, "other"), HandOverRequest(3, 0), Query(4, b"?", True))
    await desk.until(lambda: len(held.others) == 1 or len(held.submits) == 2)
    held.flush()
    assert [message.id for _, message in held.submits] == [1]
    assert [(each.id, each.reason) for each in await client.receive(2)] == [
        (number, RefusalReason.UNAUTHORIZED) for number in (2, 3)
    ]
    certificate = (bob / CERTIFICATE_FILE).read_bytes()
    held.revoke(frozenset({holder_of(certificate, desk.cluster.cluster_id_bytes).serial}))

    def queued():
        return len(held.submits) + len(held.others)

    asked = queued()
    client.send(put(5, "app/a"))
    await desk.until(lambda: desk.counted["client.revoked"] or queued() > asked)
    assert queued() == asked
    (told,) = await client.receive(1)
    assert told.reason == RefusalReason.UNAUTHORIZED and "was revoked" in told.detail


async def test_as_many_commands_are_taken_as_fit_slots_and_bytes(desk):
    client = await desk.connect()
    client.send(*(submit(number, 100) for number in range(1, 11)))
    held = desk.gateway
    await desk.until(lambda: len(held.submits) == 10)
    assert [m.id for _, m in held.take_submits(3, 10_000)] == [1, 2, 3]
    assert [m.id for _, m in held.take_submits(10, 250)] == [4, 5]
    assert held.take_submits(0, 10_000) == []
    assert [m.id for _, m in held.take_all_submits()] == [6, 7, 8, 9, 10]
    assert held.submits.bytes == 0


async def test_the_replies_of_a_turn_leave_in_one_write(desk, monkeypatch):
    client = await desk.connect()
    client.send(*(submit(number) for number in range(1, 51)))
    held = desk.gateway
    await desk.until(lambda: len(held.submits) == 50)
    writes = []
    real = gateway.Client.write
    monkeypatch.setattr(
        gateway.Client, "write", lambda self, data: writes.append(data) or real(self, data)
    )
    for connection, message in held.take_submits(50, 1 << 20):
        connection.reply(Answer(message.id, 1, b""))
    held.flush()
    assert len(await client.receive(50)) == 50
    assert len(writes) == 1


async def test_who_asks_for_much_waits_behind_itself_alone(desk, monkeypatch):
    """A reader's certificate must not keep others out, by however many requests."""
    monkeypatch.setattr(gateway, "INBOX_REQUESTS_MAX", 20)
    monkeypatch.setattr(gateway, "INBOX_REQUESTS_BUSY", 30)
    issue(desk.cluster, Grant("eyes", "reader"))
    flood, admin = await desk.connect("eyes"), await desk.connect()
    held = desk.gateway
    flood.send(*(Query(number, b"?", False) for number in range(100)))
    await desk.until(lambda: desk.counted["client.busy"] == 70)
    assert held.held
    admin.send(Query(1, b"!", True), submit(2), submit(3), Query(4, b"!", True))
    await desk.until(lambda: len(held.submits) == 2 and len(held.others) == 32)
    assert len(held.held) == 1, "and who asks for little is read"
    assert [request.query for _, request in (held.others.take() for _ in range(5))] == [
        b"?", b"!", b"?", b"!", b"?",
    ]  # fmt: skip
    assert [request.id for _, request in held.submits] == [2, 3]
    held.flush()
    assert held.held
    while held.others:
        held.others.take()
    held.flush()
    assert not held.held
    assert desk.counted == {"client.busy": 70}


async def test_who_was_held_is_read_again_when_all_commands_were_refused(desk, monkeypatch):
    monkeypatch.setattr(gateway, "INBOX_REQUESTS_MAX", 2)
    client = await desk.connect()
    held = desk.gateway
    client.send(submit(1), submit(2), submit(3))
    await desk.until(lambda: held.held)
    assert [message.id for _, message in held.take_all_submits()] == [1, 2, 3]
    held.flush()
    assert not held.held and held.submits.bytes == 0
    client.send(submit(4))
    await desk.until(lambda: held.submits)


async def test_a_command_over_the_limit_is_refused_and_the_connection_stays(desk):
    client = await desk.connect()
    client.send(submit(1, COMMAND_BYTES_MAX + 1))
    await desk.until(lambda: desk.gateway.dirty)
    desk.gateway.flush()
    (reply,) = await client.receive()
    assert (reply.id, reply.reason) == (1, RefusalReason.TOO_LARGE)
    assert str(COMMAND_BYTES_MAX) in reply.detail
    client.send(submit(2, COMMAND_BYTES_MAX))
    await desk.until(lambda: desk.gateway.submits)


async def test_a_frame_beyond_all_bounds_closes_at_its_header(desk):
    client = await desk.connect()
    me = Identity(desk.cluster.cluster_id_bytes)
    whole = frame(me, Channel.CLIENT, bytes(REQUEST_BODY_BYTES_MAX + 1))
    client.writer.write(whole[:100])
    assert await client.closed()
    assert desk.counted == {"client.dropped.length": 1}


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"GET / HTTP/1.1\r\n\r\n" + bytes(80), "magic"), (None, "checksum"), (bytes(200), "magic")],
    ids=["http", "flipped bit", "zeros"],
)
async def test_garbage_is_counted_and_its_connection_closed(desk, data, reason):
    client, other = await desk.connect(), await desk.connect()
    me = Identity(desk.cluster.cluster_id_bytes)
    good = frame(me, Channel.CLIENT, encode_body(submit(1)))
    client.writer.write(good[:-1] + b"\xff" if data is None else data)
    assert await client.closed()
    assert desk.counted == {f"client.dropped.{reason}": 1}
    other.send(submit(1))
    await desk.until(lambda: len(desk.gateway.submits) == 1)


async def test_another_cluster_is_turned_away(desk):
    client = await desk.connect()
    stranger = Identity(bytes(16))
    client.writer.write(frame(stranger, Channel.CLIENT, encode_body(submit(1))))
    assert await client.closed()
    assert desk.counted == {"client.dropped.cluster": 1}


async def test_a_request_nobody_understands_is_answered_before_the_end(desk):
    client = await desk.connect()
    me = Identity(desk.cluster.cluster_id_bytes)
    client.writer.write(frame(me, Channel.CLIENT, b"\x92\xcc\xff\x01"))
    (reply,) = await client.receive()
    assert (reply.id, reply.reason) == (0, RefusalReason.MALFORMED)
    assert await client.closed()
    assert desk.counted == {"client.dropped.body": 1}


async def test_a_renewal_of_too_many_leases_is_refused_before_it_is_read(desk):
    client = await desk.connect()
    client.send(Renew(1, tuple(range(RENEW_LEASES_MAX))))
    await desk.until(lambda: desk.gateway.others)
    client.send(Renew(2, (7,) * 2_000_000))
    (reply,) = await client.receive()
    assert (reply.id, reply.reason) == (0, RefusalReason.MALFORMED)
    assert await client.closed()
    assert desk.counted == {"client.dropped.body": 1}
    assert len(desk.gateway.others) == 1


async def test_with_a_full_inbox_clients_are_slowed_down_and_none_is_refused(desk, monkeypatch):
    monkeypatch.setattr(gateway, "INBOX_REQUESTS_MAX", 20)
    client = await desk.connect()
    held = desk.gateway
    size = 30_000
    for number in range(1, 401):
        client.send(submit(number, size))
    await desk.until(lambda: held.held)
    waiting = len(held.submits)
    assert 20 <= waiting < 400, "the rest stays in the sockets' buffers"
    taken = []
    while len(taken) < 400:
        await desk.until(lambda: held.submits)
        taken += [message.id for _, message in held.take_submits(15, 1 << 30)]
        held.flush()
    assert taken == list(range(1, 401))
    assert desk.counted == {}


async def test_bytes_slow_clients_down_too(desk, monkeypatch):
    monkeypatch.setattr(gateway, "INBOX_BYTES_MAX", 100_000)
    client = await desk.connect()
    client.send(*(submit(number, 60_000) for number in range(1, 21)))
    held = desk.gateway
    await desk.until(lambda: held.held)
    while len(held.submits) > 1:
        held.take_submits(1, 1 << 30)
    held.flush()
    assert held.held, "one command is still more than half of the bytes"
    assert held.take_all_submits()
    held.flush()
    assert not held.held
    await desk.until(lambda: held.submits)


@pytest.mark.parametrize(
    "large", [Query(1, bytes(60_000), True), Renew(1, tuple(range(1000)))], ids=["query", "renewal"]
)
async def test_bytes_of_what_is_no_command_slow_clients_down_too(desk, monkeypatch, large):
    monkeypatch.setattr(gateway, "INBOX_BYTES_MAX", 100_000)
    client = await desk.connect()
    client.send(*[large] * 20)
    held = desk.gateway
    await desk.until(lambda: held.held)
    assert held.others.bytes >= 100_000
    while held.others:
        assert held.others.take()[1] == large
    assert held.others.bytes == 0
    held.flush()
    assert not held.held


async def test_far_above_the_limit_requests_are_refused_as_busy(desk, monkeypatch):
    monkeypatch.setattr(gateway, "INBOX_REQUESTS_BUSY", 5)
    client = await desk.connect()
    client.send(*(submit(number) for number in range(1, 8)))
    held = desk.gateway
    await desk.until(lambda: desk.counted["client.busy"] == 2)
    held.flush()
    refused = await client.receive(2)
    assert [(reply.id, reply.reason) for reply in refused] == [(6, 2), (7, 2)]
    assert len(held.submits) == 5


async def test_a_reader_that_reads_nothing_is_dropped(desk):
    client, good = await desk.connect(), await desk.connect()
    client.send(StatusRequest(1))
    good.send(StatusRequest(1))
    held = desk.gateway
    await desk.until(lambda: len(held.others) == 2)
    asked = list(held.others)
    held.write_bytes_max = 1 << 20
    slow = next(c for c, _ in asked if c.transport.get_extra_info("peername")[1] == _port(client))
    other = next(c for c, _ in asked if c is not slow)
    client.writer.transport.pause_reading()
    for number in range(1000):
        slow.reply(Answer(number, 1, bytes(100_000)))
        held.flush()
        if not slow.open:
            break
    assert desk.counted == {"client.slow_reader": 1}
    other.reply(Refusal(1, 1, 0, ""))
    held.flush()
    assert await good.receive()
    slow.reply(Answer(1, 1, b"nobody is there any more"))
    held.flush()


def _port(client):
    return client.writer.get_extra_info("sockname")[1]


async def test_over_the_limit_the_oldest_stranger_makes_room(desk):
    held = desk.gateway
    held.connections_max = 3
    known = await desk.connect()
    known.send(StatusRequest(1))
    await desk.until(lambda: held.others)
    stranger = await desk.connect()
    newer = await desk.connect()
    newest = await desk.connect()
    assert await stranger.closed()
    assert desk.counted == {"client.too_many_connections": 1}
    for number, client in enumerate((known, newer, newest), 2):
        client.send(StatusRequest(number))
    await desk.until(lambda: len(held.others) == 4)
    refused = await desk.connect()
    assert await refused.closed(), "all others are known: the new one must go"


async def test_idle_connections_make_room_when_all_are_known(desk):
    held = desk.gateway
    held.connections_max = 2
    clients = [await desk.connect(), await desk.connect()]
    for number, client in enumerate(clients):
        client.send(StatusRequest(number))
    await desk.until(lambda: len(held.others) == 2)
    first, second = held.connections
    assert await (await desk.connect()).closed(), "none was idle for long"
    second.since -= IDLE_S_MIN + 2
    first.since -= IDLE_S_MIN + 1
    newer = await desk.connect()
    assert await clients[1].closed(), "it was idle the longest"
    newer.send(StatusRequest(3))
    clients[0].send(StatusRequest(4))
    await desk.until(lambda: len(held.others) == 4)
    assert desk.counted == {"client.too_many_connections": 2}


async def test_one_certificate_holds_its_share_of_the_connections_and_no_more(desk):
    held = desk.gateway
    assert held.holder_connections_max == CONNECTIONS_MAX // 4
    held.holder_connections_max = 2
    clients = [await desk.connect("listener") for _ in range(2)]
    for client in clients:
        client.send(StatusRequest(1))
    await desk.until(lambda: len(held.others) == 2)
    assert await (await desk.connect("listener")).closed()
    assert desk.counted == {"client.too_many_of_one_holder": 1}
    for client in (await desk.connect(), *clients):
        client.send(StatusRequest(2))
    await desk.until(lambda: len(held.others) == 5)


async def test_who_asks_only_for_what_is_denied_stays_a_stranger(desk):
    client = await desk.connect("listener")
    client.send(submit(1))
    await desk.until(lambda: desk.counted["client.unauthorized"])
    (connection,) = desk.gateway.connections
    connection.since -= STRANGER_S_MAX + 1
    client.send(submit(2))
    await desk.until(lambda: desk.counted["client.unauthorized"] == 2)
    desk.gateway.sweep()
    assert await client.closed()
    assert desk.counted["client.stranger_closed"] == 1


async def test_who_was_revoked_is_told_once_and_its_connections_end(desk):
    held = desk.gateway
    serial = papers(desk.cluster, "listener").holder.serial
    asking, idle = await desk.connect("listener"), await desk.connect("listener")
    other = await desk.connect()
    for client in (asking, idle, other):
        client.send(StatusRequest(1))
    await desk.until(lambda: len(held.others) == 3)
    held.revoke(frozenset({serial}))
    held.sweep()  # as the voter does, each second
    asking.send(StatusRequest(7), StatusRequest(8))
    (told,) = await asking.receive()
    assert (told.id, told.reason) == (7, RefusalReason.UNAUTHORIZED)
    assert serial in told.detail and "was revoked" in told.detail
    assert await asking.closed()
    assert asking.replies == [], "told once"
    held.sweep()
    (told,) = await idle.receive()
    assert (told.id, told.reason) == (0, RefusalReason.UNAUTHORIZED)
    assert await idle.closed()
    new = await desk.connect("listener")
    new.send(StatusRequest(9))
    assert [reply.id for reply in await new.receive()] == [9]
    assert await new.closed()
    silent = await desk.connect("listener")
    await desk.until(lambda: len(held.connections) == 2)
    held.sweep()
    assert await silent.closed()
    assert desk.counted == {"client.revoked": 4}
    other.send(StatusRequest(2))
    await desk.until(lambda: len(held.others) == 4)


async def test_who_was_revoked_pushes_nobody_out(desk):
    held = desk.gateway
    held.connections_max = 1
    stranger = await desk.connect()
    await desk.until(lambda: held.connections)
    held.revoke(frozenset({papers(desk.cluster, "listener").holder.serial}))
    assert await (await desk.connect("listener")).closed()
    stranger.send(StatusRequest(1))
    await desk.until(lambda: held.others)


async def test_of_unfinished_frames_so_many_bytes_are_held_and_who_holds_most_goes(
    desk, monkeypatch
):
    monkeypatch.setattr(frames, "UNFINISHED_BYTES_MAX", 1_000_000)
    held = desk.gateway
    me = Identity(desk.cluster.cluster_id_bytes)
    part = frame(me, Channel.CLIENT, encode_body(submit(1, 500_000)))
    good = await desk.connect()
    good.writer.write(part[:400_000])
    hogs = [await desk.connect("listener") for _ in range(5)]
    for hog, size in zip(hogs, (150_000, 149_000, 148_000, 147_000, 20_000), strict=True):
        hog.writer.write(part[:size])
        await hog.writer.drain()
    assert await hogs[0].closed(), "its certificate holds the most, and it the most of that"
    await desk.until(
        lambda: held.unfinished_bytes == 400_000 + 149_000 + 148_000 + 147_000 + 20_000
    )
    assert desk.counted == {"client.too_much_unfinished": 1}
    good.writer.write(part[400_000:])
    await desk.until(lambda: held.submits)
    for client in (good, *hogs):
        client.writer.transport.abort()
    await desk.until_gone()
    assert held.unfinished_bytes == 0


async def test_a_port_in_use_is_named_with_its_key():
    with some_cluster() as cluster, socket.socket() as taken:
        port = cluster.voter(2).client_port
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(StartError, match=rf"client_port of voter 2 = {port}: .*in use"):
            await Gateway.open(
                Identity(bytes(16)),
                cluster.voter(2),
                papers(cluster, "voter-2"),
                what_changes,
                lambda _: None,
                lambda: None,
            )
