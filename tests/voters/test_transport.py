"""Sockets between voters: what is sent arrives, and what is not ours is counted and harmless."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from tests.credentials import issue, on_stream, papers, stream_opener
from tests.slow import SlowTurns
from tests.voters.here import SOON_S, some_cluster
from trex_core.access import Grant, voter_name
from trex_core.messages import (
    NO_BALLOT,
    Accept,
    Accepted,
    Ballot,
    CatchUp,
    Fenced,
    Fetch,
    Heartbeat,
    ListenerReport,
    Pairs,
    RepairRequest,
    SealTold,
    StreamTip,
    Tip,
    VoterDigest,
)
from trex_core.seal import Sealer
from trex_core.silence import ALONE_MAX
from trex_core.state import Receive
from trex_core.wire import (
    DATAGRAM_BODY_BYTES_MAX,
    Channel,
    Identity,
    decode_stream,
    encode_body,
    frame,
)
from voters import StartError, frames, transport
from voters.frames import FRAME_S_MAX, STRANGER_S_MAX
from voters.transport import Transport, multicast_receiver, multicast_sender

pytestmark = pytest.mark.anyio

BALLOT = Ballot(0, 3, 1)
BEAT = Heartbeat(BALLOT, 1, Tip(7, bytes(32), 1), 0)


def accept(size):
    return Accept(BALLOT, 8, (bytes(size),), Tip(7, bytes(32), 1))


class Peer:
    """A transport, what it heard, and what it counted."""

    def __init__(self):
        self.heard = []
        self.repairs = []
        self.reports = []
        self.reports_max = 8
        self.counted = Counter()
        self.changed = asyncio.Event()
        self.transport = None

    def on_input(self):
        self.heard += self.transport.drain(64)
        repairs, reports = self.transport.drain_repairs(16, self.reports_max)
        self.repairs += repairs
        self.reports += reports
        self.reports_max -= len(reports)
        self.changed.set()

    def count(self, name):
        self.counted[name] += 1
        self.changed.set()

    async def until(self, holds):
        async with asyncio.timeout(SOON_S):
            while not holds():
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def peers():
    """Opens transports of a cluster of three; ``peers(2)`` opens that of voter 2."""
    async with AsyncExitStack() as stack:
        cluster = stack.enter_context(some_cluster())

        async def opened(voter, holder=0):
            peer = Peer()
            peer.voter = voter
            identity = Identity(cluster.cluster_id_bytes, voter, 100 + voter, voter)
            peer.transport = await Transport.open(
                identity,
                cluster,
                papers(cluster, voter_name(holder or voter)),
                peer.count,
                peer.on_input,
            )
            stack.push_async_callback(peer.transport.aclose)
            return peer

        opened.cluster = cluster
        yield opened


async def linked(cluster, entry, name="voter-2"):
    """A connection to a voter's peer port by who holds those credentials."""
    return await asyncio.open_connection(
        entry.host, entry.peer_port, ssl=papers(cluster, name).client
    )


async def met(*peers):
    """Wait until each of ``peers`` was told by all others what they seal with."""
    voters = {peer.voter for peer in peers}
    for peer in peers:
        await peer.until(lambda peer=peer: voters <= {peer.voter, *peer.transport._opener._told})


def spoken(peer, cluster, identity, *, counter=1):
    """Seals bodies as ``identity``, which told ``peer`` how: what a voter does at its start."""
    ring = papers(cluster, "voter-1").keys.voter
    secret = bytes(range(32))
    sealer = Sealer(Channel.PEER, identity, ring.first, secret)
    sealer.counter = counter
    peer.transport._opener.told(identity, ring.first.epoch, secret, counter)
    return sealer.datagrams


def udp_to(cluster, voter, *datagrams):
    entry = cluster.voter(voter)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        for data in datagrams:
            sock.sendto(data, (entry.host, entry.peer_port))


@pytest.mark.parametrize(
    "message",
    [BEAT, accept(100), accept(DATAGRAM_BODY_BYTES_MAX), accept(9_000)],
    ids=["small", "one datagram", "two datagrams", "seven datagrams"],
)
async def test_a_message_travels_by_datagram_with_its_senders_identity(peers, message):
    one, two = await peers(1), await peers(2)
    await met(one, two)
    one.transport.send(2, message)
    await two.until(lambda: two.heard)
    assert two.heard == [Receive(1, 101, 1, message)]


@pytest.mark.parametrize(
    "message",
    [accept(20_000), accept(1 << 20), Fetch(BALLOT, (Pairs(1, 2, BALLOT),))],
    ids=["20 KB", "1 MiB", "fetch"],
)
async def test_a_large_message_and_a_fetch_travel_by_tcp(peers, message):
    one, two = await peers(1), await peers(2)
    await met(one, two)
    one.transport.send(2, message)
    one.transport.send(2, BEAT)
    await two.until(lambda: len(two.heard) == 2)
    assert Receive(1, 101, 1, message) in two.heard
    assert one.transport._links[2]._transport


async def test_one_message_to_several_is_encoded_once(peers, monkeypatch):
    one, two, three = await peers(1), await peers(2), await peers(3)
    await met(one, two, three)
    encoded = []
    real = transport.encode_body
    monkeypatch.setattr(transport, "encode_body", lambda m: encoded.append(m) or real(m))
    for voter in (2, 3):
        one.transport.send(voter, BEAT)
    await two.until(lambda: two.heard)
    await three.until(lambda: three.heard)
    assert len(encoded) == 1


async def test_interleaved_senders_are_put_together_each_for_itself(peers):
    one, two, three = await peers(1), await peers(2), await peers(3)
    await met(one, two, three)
    for _ in range(5):
        one.transport.send(3, accept(9_000))
        two.transport.send(3, accept(8_000))
    await three.until(lambda: len(three.heard) == 10)
    sizes = Counter((r.sender, len(r.message.values[0])) for r in three.heard)
    assert sizes == {(1, 9_000): 5, (2, 8_000): 5}


async def test_a_voter_with_slow_turns_does_not_read_one_datagram_in_each(peers, monkeypatch):
    one = await peers(1)
    datagrams = spoken(one, peers.cluster, Identity(peers.cluster.cluster_id_bytes, 2, 102, 2))
    monkeypatch.setattr(one.transport, "_loop", SlowTurns())
    turns = 0
    monkeypatch.setattr(one.transport, "_on_input", lambda: None)  # the turns are those here
    heard = 0
    for burst in range(1, 4):
        udp_to(peers.cluster, 1, *(datagrams(encode_body(BEAT))[0] for _ in range(50)))
        while heard < burst * 50:
            await asyncio.sleep(0)  # a turn of the loop, not time
            heard += len(one.transport.drain(64))
            turns += 1
            assert turns < burst * (ALONE_MAX + 5), heard


async def test_a_lost_part_loses_its_message_only(peers):
    two = await peers(2)
    cluster = peers.cluster
    identity = Identity(cluster.cluster_id_bytes, 1, 101, 1)
    say = spoken(two, cluster, identity)
    torn = say(encode_body(accept(5_000)))
    whole = say(encode_body(accept(6_000)))
    udp_to(cluster, 2, *torn[1:], *reversed(whole))
    await two.until(lambda: two.heard)
    assert [len(r.message.values[0]) for r in two.heard] == [6_000]


async def test_the_link_is_made_again_when_the_peer_is_back(peers):
    one, two = await peers(1), await peers(2)
    one.transport.send(2, accept(20_000))
    await two.until(lambda: two.heard)
    await two.transport.aclose()
    await one.until(lambda: one.transport._links[2]._transport is None)
    again = await peers(2)
    await one.until(lambda: one.transport._links[2]._transport is not None)
    one.transport.send(2, accept(30_000))
    await again.until(lambda: again.heard)
    assert again.heard[0].message == accept(30_000)


async def test_for_a_peer_that_is_away_nothing_is_hoarded(peers, monkeypatch):
    one = await peers(1)
    monkeypatch.setattr(transport, "LINK_QUEUE_BYTES_MAX", 100_000)
    for _ in range(10):
        one.transport.send(2, accept(30_000))
    assert one.counted["peer_tcp.queue_full"] == 7
    await one.until(lambda: one.counted["peer_tcp.connect_failed"])
    assert one.transport._links[2]._queued_bytes == 0


async def test_what_is_no_message_of_a_peer_is_counted_by_reason(peers):
    two = await peers(2)
    cluster = peers.cluster
    mine = Identity(cluster.cluster_id_bytes, 1, 101, 1)
    say = spoken(two, cluster, mine)
    body = encode_body(BEAT)
    good, again = say(body)[0], say(body)[0]
    key = papers(cluster, "voter-1").keys.stream.first
    on_stream = Sealer(Channel.STREAM, mine, key, b"salt").datagrams(body)[0]
    foreign = Sealer(Channel.PEER, Identity(bytes(16), 1, 101, 1), key, bytes(32))
    bad = {
        "short": b"x",
        "magic": b"GET / HTTP/1.1" + bytes(80),
        "version": good[:2] + b"\x09" + good[3:],
        "cluster": foreign.datagrams(body)[0],
        "length": good + b"!",
        "tag": again[:-1] + bytes([again[-1] ^ 1]),
        "channel": on_stream,
        "sealed": frame(mine, Channel.PEER, body),
        "sender": spoken(two, cluster, Identity(cluster.cluster_id_bytes, 9, 1, 1))(body)[0],
        "epoch": foreign_key(cluster, Identity(cluster.cluster_id_bytes, 3, 103, 3), body),
        "body": say(b"\x93\x01")[0],
        "part": say(bytes(200 * DATAGRAM_BODY_BYTES_MAX))[7],
        "replay": good,
        "receiver": say(body, receiver=3)[0],
    }
    catch_up = say(encode_body(CatchUp(1)))[0]
    told = say(encode_body(SealTold(1, bytes(32), 1)))[0]
    udp_to(cluster, 2, good, *bad.values(), catch_up, told, again)
    await two.until(lambda: len(two.heard) == 2)
    assert two.heard == [Receive(1, 101, 1, BEAT)] * 2
    expected = {f"peer_udp.dropped.{reason}": 1 for reason in bad}
    expected["peer_udp.dropped.body"] += 2
    assert dict(udp(two)) == expected


def foreign_key(cluster, identity, body):
    """A datagram of a voter that told nobody anything."""
    ring = papers(cluster, "voter-1").keys.voter
    return Sealer(Channel.PEER, identity, ring.first, bytes(32)).datagrams(body)[0]


def udp(peer):
    return {name: n for name, n in peer.counted.items() if name.startswith("peer_udp")}


async def test_a_voter_takes_nothing_from_itself(peers):
    two = await peers(2)
    me = Identity(peers.cluster.cluster_id_bytes, 2, 102, 2)
    udp_to(peers.cluster, 2, *spoken(two, peers.cluster, me)(encode_body(BEAT)))
    await two.until(lambda: udp(two))
    assert udp(two) == {"peer_udp.dropped.sender": 1}


async def test_what_was_recorded_before_a_restart_opens_nothing_after_it(peers):
    one, two = await peers(1), await peers(2)
    await met(one, two)
    recorded = []
    one.transport._udp = Recorded(one.transport._udp, recorded)
    one.transport.send(2, BEAT)
    await two.until(lambda: two.heard)
    await one.transport.aclose()
    await two.transport.aclose()
    for boots in ((1, 2), (1, 3)):  # both are new, then only who is replayed
        again = await peers(boots[0])
        fresh = await peers(2)
        await met(again, fresh)
        again.transport.send(2, BEAT)
        await fresh.until(lambda fresh=fresh: fresh.heard)
        udp_to(peers.cluster, 2, *recorded * 3)
        await fresh.until(lambda fresh=fresh: sum(udp(fresh).values()) >= 3 * len(recorded))
        assert fresh.heard == [Receive(1, 101, 1, BEAT)]
        await again.transport.aclose()
        await fresh.transport.aclose()


async def test_who_answers_with_another_voters_certificate_is_told_nothing(peers):
    """Whoever sits at a voter's address must prove to be that voter before it learns a secret."""
    one, impostor = await peers(1), await peers(2, holder=3)
    told = impostor.transport._opener._told
    noticed = [
        asyncio.create_task(one.until(lambda: one.counted["peer_tcp.wrong_voter"])),
        asyncio.create_task(impostor.until(lambda: 1 in told)),
    ]
    await asyncio.wait(noticed, timeout=SOON_S, return_when=asyncio.FIRST_COMPLETED)
    for task in noticed:
        task.cancel()
    await asyncio.gather(*noticed, return_exceptions=True)
    assert one.counted["peer_tcp.wrong_voter"] and 1 not in told


async def test_what_is_said_to_one_voter_is_nothing_to_another(peers):
    """Who records that one voter is told to stop must not stop the others with it."""
    one, two, three = await peers(1), await peers(2), await peers(3)
    await met(one, two, three)
    recorded = []
    one.transport._udp = Recorded(one.transport._udp, recorded)
    one.transport.send(3, Fenced(2, 9))
    one.transport.send(3, BEAT)
    await three.until(lambda: len(three.heard) == 2)
    udp_to(peers.cluster, 2, *recorded)
    await two.until(lambda: len(two.heard) + len(udp(two)) > 1)
    assert two.heard == [Receive(1, 101, 1, BEAT)], "a heartbeat is for everybody"
    assert udp(two) == {"peer_udp.dropped.receiver": 1}
    again = Fenced(2, 9)  # the same object to two: sealed for each
    for voter in (2, 3):
        one.transport.send(voter, again)
    await two.until(lambda: len(two.heard) == 2)
    await three.until(lambda: len(three.heard) == 3)


async def test_a_later_boot_closes_the_links_of_the_earlier_one_and_it_is_not_heard_again(peers):
    two = await peers(2)
    cluster = peers.cluster
    ring = papers(cluster, "voter-1").keys.voter

    def greeting(boot):
        told = SealTold(ring.first.epoch, bytes([boot]) * 32, 1)
        who = Identity(cluster.cluster_id_bytes, 1, 101, boot)
        return frame(who, Channel.PEER, encode_body(told))

    links = {
        name: await linked(cluster, cluster.voter(2), name.partition(" ")[0])
        for name in ("voter-1 of boot 5", "voter-3", "voter-1 of boot 6")
    }
    (old, old_writer), (other, other_writer), (_, new_writer) = links.values()
    old_writer.write(greeting(5))
    await two.until(lambda: two.transport._opener._told)
    new_writer.write(greeting(6))
    assert await asyncio.wait_for(old.read(), SOON_S) == b""
    assert two.counted["peer_tcp.earlier_run"] == 1
    late, late_writer = await linked(cluster, cluster.voter(2), "voter-1")
    late_writer.write(greeting(5))
    assert await asyncio.wait_for(late.read(), SOON_S) == b""
    assert two.counted["peer_tcp.dropped.replay"] == 1
    alive = sorted(each.holder.grant.name for each in two.transport._server.connections)
    assert alive == ["voter-1", "voter-3"] and not other.at_eof()
    for writer in (old_writer, other_writer, new_writer, late_writer):
        writer.transport.abort()
        writer.close()


async def test_a_revoked_voter_is_neither_heard_nor_told_anything(peers):
    one, two, three = await peers(1), await peers(2), await peers(3)
    await met(one, two, three)
    serial = papers(peers.cluster, "voter-1").holder.serial
    known_to_one = two.transport._secret
    two.transport.revoke(frozenset({serial}))
    one.transport.send(2, BEAT)
    await two.until(lambda: two.counted["peer_udp.dropped.epoch"])
    await two.until(lambda: two.counted["peer_tcp.denied"])
    await two.until(lambda: two.counted["peer_tcp.revoked"] >= 3)  # both closed, one not made again
    assert two.heard == []
    assert two.transport._links[1]._holder is None
    # What it was told before seals nothing any more, and the others know better.
    assert two.transport._secret != known_to_one
    assert one.transport._opener._told[2][1].secret == known_to_one
    await three.until(lambda: three.transport._opener._told[2][1].secret == two.transport._secret)
    two.transport.send(3, BEAT)
    three.transport.send(2, BEAT)
    await three.until(lambda: three.heard)
    await two.until(lambda: two.heard)
    # With a new certificate it is a voter again, by itself.
    issue(peers.cluster, Grant("voter-1", "voter"))
    assert one.transport._links[2]._credentials.refresh()
    one.transport.use(one.transport._keys)
    await two.until(lambda: two.transport._opener._told[1])
    await one.until(lambda: one.transport._opener._told[2][1].secret == two.transport._secret)
    one.transport.send(2, BEAT)
    await two.until(lambda: len(two.heard) == 2)
    assert two.heard[1] == Receive(1, 101, 1, BEAT)


class Recorded:
    """A socket that keeps what it sends."""

    def __init__(self, sock, sent):
        self._sock = sock
        self._sent = sent

    def sendto(self, data, address):
        self._sent.append(data)
        return self._sock.sendto(data, address)

    def __getattr__(self, name):
        return getattr(self._sock, name)


async def test_garbage_on_the_link_port_closes_that_connection_only(peers):
    one, two = await peers(1), await peers(2)
    entry = peers.cluster.voter(2)
    reader, writer = await linked(peers.cluster, entry, "voter-1")
    writer.write(b"\x16\x03\x01 hello, is this TLS?" + bytes(100))
    assert await asyncio.wait_for(reader.read(), SOON_S) == b""
    writer.transport.abort()
    writer.close()
    assert two.counted["peer_tcp.dropped.magic"] == 1
    one.transport.send(2, accept(20_000))
    await two.until(lambda: two.heard)


async def test_half_open_and_half_told_connections_are_closed_in_time(peers, monkeypatch):
    one, two = await peers(1), await peers(2)
    entry = peers.cluster.voter(2)
    one.transport.send(2, accept(20_000))
    await two.until(lambda: two.heard)
    _silent, silent_writer = await linked(peers.cluster, entry, "voter-1")
    _slow, slow_writer = await linked(peers.cluster, entry, "voter-1")
    mine = Identity(peers.cluster.cluster_id_bytes, 1, 101, 1)
    data = frame(mine, Channel.PEER, encode_body(accept(20_000)))
    slow_writer.write(data + data[:-1])
    await two.until(lambda: len(two.heard) == 2)
    server = two.transport._server
    held = list(server.connections)
    assert len(held) == 3
    now = server.loop.time()
    assert [c.overdue(now) for c in held] == [None] * 3
    assert sorted(str(c.overdue(now + STRANGER_S_MAX + 1)) for c in held) == [
        "None",
        "None",
        "stranger_closed",
    ]
    assert sorted(str(c.overdue(now + FRAME_S_MAX + 1)) for c in held) == [
        "None",
        "stranger_closed",
        "unfinished_closed",
    ]
    monkeypatch.setattr(frames, "STRANGER_S_MAX", -1.0)
    monkeypatch.setattr(frames, "FRAME_S_MAX", -1.0)
    two.transport.sweep()
    assert two.counted["peer_tcp.stranger_closed"] == 1
    assert two.counted["peer_tcp.unfinished_closed"] == 1
    for writer in (silent_writer, slow_writer):
        writer.transport.abort()
        writer.close()
    one.transport.send(2, accept(40_000))
    await two.until(lambda: len(two.heard) == 3)


async def test_strangers_cannot_keep_peers_out(peers, monkeypatch):
    monkeypatch.setattr(transport, "LINK_CONNECTIONS_MAX", 2 * frames.HOLDER_SHARE)
    one, two = await peers(1), await peers(2)
    entry = peers.cluster.voter(2)
    opened = [await linked(peers.cluster, entry, "voter-1") for _ in range(6)]
    one.transport.send(2, accept(20_000))
    await two.until(lambda: two.heard)
    await two.until(lambda: two.counted["peer_tcp.too_many_of_one_holder"] >= 4)
    assert len(two.transport._server.connections) <= 2
    for _, writer in opened:
        writer.transport.abort()
        writer.close()


async def test_the_stream_reaches_whoever_joined_the_group(peers):
    one = await peers(1)
    stream = peers.cluster.stream
    listener = multicast_receiver(stream, stream.port, 1 << 16)
    try:
        digest = VoterDigest("leader", BALLOT, 7, 7, 7, 1, 1, 1, "0")
        tip = StreamTip(NO_BALLOT, True, 7, bytes(32), digest)
        for _ in range(2):
            one.transport.publish(encode_body(tip))
        loop = asyncio.get_running_loop()
        got = [
            stream_opener(peers.cluster).open(await loop.sock_recv(listener, 2048))
            for _ in range(2)
        ]
        assert [decode_stream(f.body) for f in got] == [tip, tip]
        assert [f.sender for f in got] == [1, 1]
        assert got[0].counter + 1 == got[1].counter
    finally:
        listener.close()


async def test_only_repair_requests_that_name_the_voter_are_taken(peers):
    two = await peers(2)
    cluster = peers.cluster
    anybody = Identity(cluster.cluster_id_bytes)
    with multicast_sender(cluster.stream) as sock:
        address = (cluster.stream.group, cluster.stream.repair_port)
        for data in (
            b"noise",
            *on_stream(cluster, anybody, encode_body(BEAT)),
            *on_stream(cluster, anybody, encode_body(RepairRequest("x", 1, 5, 9))),
            *on_stream(cluster, anybody, encode_body(RepairRequest("x", 2, 5, 9))),
        ):
            sock.sendto(data, address)
    await two.until(lambda: two.repairs)
    assert two.repairs == [RepairRequest("x", 2, 5, 9)]
    assert two.counted == {"repair.dropped.short": 1, "repair.dropped.body": 1}


def report(name, instance=1):
    return ListenerReport(name, instance, 5, 4, 5, 0, True, 0, 0, 0, 0, 1, "1")


async def test_reports_are_taken_by_every_voter_and_bad_ones_are_counted(peers):
    one, two = await peers(1), await peers(2)
    cluster = peers.cluster
    identity = Identity(cluster.cluster_id_bytes)
    (whole,) = on_stream(cluster, identity, encode_body(report("a")))
    with multicast_sender(cluster.stream) as sock:
        address = (cluster.stream.group, cluster.stream.repair_port)
        for data in (
            *on_stream(cluster, identity, encode_body(report("x" * 129))),
            *on_stream(cluster, identity, encode_body(report("x", -1))),
            *on_stream(cluster, identity, encode_body(report(17))),
            *on_stream(cluster, identity, encode_body(report("x"))[:-1]),
            whole[:-1] + bytes([whole[-1] ^ 1]),
            whole,
        ):
            sock.sendto(data, address)
    for peer in (one, two):
        await peer.until(lambda peer=peer: peer.reports)
        assert peer.reports == [report("a")]
        dropped = {name: n for name, n in peer.counted.items() if ".dropped" in name}
        assert dropped == {"report.dropped.body": 4, "repair.dropped.tag": 1}


async def test_reports_beyond_what_is_allowed_cost_a_request_nothing(peers):
    two = await peers(2)
    two.reports_max = 3
    cluster = peers.cluster
    identity = Identity(cluster.cluster_id_bytes)
    with multicast_sender(cluster.stream) as sock:
        address = (cluster.stream.group, cluster.stream.repair_port)
        for index in range(10):
            (data,) = on_stream(cluster, identity, encode_body(report("a", index)))
            sock.sendto(data, address)
        wanted = RepairRequest("x", 2, 5, 9)
        sock.sendto(on_stream(cluster, identity, encode_body(wanted))[0], address)
    await two.until(lambda: two.repairs)
    assert two.repairs == [wanted]
    assert two.reports == [report("a", index) for index in range(3)]
    assert two.counted == {"report.too_many": 7}


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["udp", "tcp"])
async def test_a_taken_port_is_named_with_its_key(peers, kind):
    entry = peers.cluster.voter(1)
    with socket.socket(type=kind) as taken:
        taken.bind((entry.host, entry.peer_port))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        text = rf"peer_port of voter 1 = {entry.peer_port}: 127.0.0.1:{entry.peer_port} is in use"
        with pytest.raises(StartError, match=text):
            await peers(1)
    assert await peers(1), "nothing is left bound"


async def test_votes_are_as_good_as_any_message(peers):
    one, two = await peers(1), await peers(2)
    await met(one, two)
    for slot in range(1, 101):
        one.transport.send(2, Accepted(BALLOT, slot, slot))
    await two.until(lambda: len(two.heard) == 100)
    assert [r.message.first for r in two.heard] == list(range(1, 101))
