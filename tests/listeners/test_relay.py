"""Listeners that help each other: what they serve, to whom, and that nobody need believe them."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections import Counter
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import anyio
import msgspec
import pytest
from msgspec.structs import replace

import listeners.relay
import listeners.trust
from listeners import ListenerOptions, open_listener
from listeners.catchup import CatchupClient, CatchupError
from listeners.relay import Relay, answer_to, own_address
from listeners.source import drop_share
from listeners.trust import Trust
from tests.credentials import folder, held, issue
from tests.listeners.backbone import BALLOT, Backbone, make_cluster
from tests.listeners.workload import put, replayed, same, workload
from trex_core.access import REVOKED_KEY, Grant, holder_of
from trex_core.cluster import StreamConfig
from trex_core.learner import LearnerConfig
from trex_core.messages import (
    RUN_SLOTS_MAX,
    VOTER_ID_MAX,
    AskOther,
    CatchupEntries,
    CatchupRequest,
    Kind,
    SnapshotRequest,
    StreamRun,
    Value,
    encode_value,
)
from trex_core.proof import ContradictionError, tip_of
from trex_core.state import FixedRun, chain_next
from trex_core.wire import Channel, FrameError, Identity, encode_body, frame

DEADLINE_S = 20
QUICK = ListenerOptions(learner=LearnerConfig("", (), silence_ms=1000, retry_ms=5))
HELPER = VOTER_ID_MAX + 1


@pytest.fixture
async def backbone():
    made = Backbone(make_cluster())
    try:
        yield made
    finally:
        made.close()


def test_where_it_helps_is_an_address_that_others_can_reach():
    assert own_address(StreamConfig("239.255.0.1", 9, "127.0.0.3")) == "127.0.0.3"
    # As a way to the group is looked up; to a group there may be none here.
    assert own_address(StreamConfig("127.0.0.1", 9, "0.0.0.0")) == "127.0.0.1"


def following(backbone, name, **arguments):
    keys = folder(backbone.cluster, "listener")
    return open_listener(
        backbone.cluster, keys, name=name, seed=1, **{"options": QUICK} | arguments
    )


def fixed(backbone, first, last):
    """Slots ``first``..``last`` as a learner delivers them."""
    values = tuple(backbone.log[first - 1 : last])
    return FixedRun(
        first, backbone.chains[first - 1], values, tuple(backbone.chains[first : last + 1])
    )


def trusting(backbone, *, tips=(), delivered=()):
    """A belief that verified the tips at those slots and had those runs delivered."""
    trust = Trust(backbone.cluster, held(backbone.cluster), Counter())
    for slot in tips:
        assert trust.proof.tip(backbone.signer(1).signed_tip(slot, backbone.chains[slot]))
    for first, last in delivered:
        trust.delivered(fixed(backbone, first, last))
    return trust


# --- what is answered -------------------------------------------------------------------------


async def test_an_answer_ends_at_a_signed_tip_and_is_believed_by_whoever_hears_it(backbone):
    backbone.append(*workload(random.Random(1), 99))
    trust = trusting(backbone, tips=(40, 90, 100), delivered=[(1, 60), (61, 100)])
    got = 0
    while got < 100:
        answer = answer_to(CatchupRequest("x", got + 1), trust)
        assert isinstance(answer, CatchupEntries) and answer.end.slot == 100
        assert trusting(backbone).entries(answer)
        got = answer.end.slot
    small = answer_to(CatchupRequest("x", 1, bytes_max=sum(map(len, backbone.log[:50]))), trust)
    assert isinstance(small, CatchupEntries) and small.end.slot == 40, "the tip that fits"
    assert trusting(backbone).entries(small), "and nothing beyond it"
    none = answer_to(CatchupRequest("x", 41, bytes_max=1), trust)
    assert none == AskOther(0, "no tip is known here that would prove slot 41")


async def test_what_it_does_not_hold_it_sends_elsewhere(backbone):
    backbone.append(*workload(random.Random(1), 99))
    assert isinstance(answer_to(CatchupRequest("x", 1), trusting(backbone)), AskOther)
    trust = trusting(backbone, tips=(100,), delivered=[(31, 90)])
    for first in (1, 30, 91):
        assert isinstance(answer_to(CatchupRequest("x", first), trust), AskOther), first
    assert isinstance(answer_to(SnapshotRequest(16, 0), trust), AskOther)
    caught_up = answer_to(CatchupRequest("x", 101), trust)
    assert isinstance(caught_up, CatchupEntries) and caught_up.values == ()
    assert trusting(backbone).entries(caught_up)
    with pytest.raises(FrameError):
        answer_to(AskOther(0, ""), trust)


async def test_its_memory_is_bounded_and_chunks_are_too(backbone, monkeypatch):
    monkeypatch.setattr("listeners.trust.SHELF_SLOTS_MAX", 1000)
    backbone.append(*(Value(Kind.NOOP, BALLOT) for _ in range(1999)))
    trust = trusting(backbone, tips=range(100, 2001, 100), delivered=[(1, 2000)])
    assert len(trust.shelf._held) == 1000
    answer = answer_to(CatchupRequest("x", 1001), trust)
    assert isinstance(answer, CatchupEntries)
    assert answer.end.slot == 1500 and len(answer.values) <= RUN_SLOTS_MAX


# --- who is believed --------------------------------------------------------------------------


async def test_nothing_in_an_answer_can_be_changed(backbone):
    backbone.append(*workload(random.Random(2), 30))
    good = backbone.entries(1, 5, 20)
    assert trusting(backbone).entries(good)
    other = Backbone(backbone.cluster)
    other.append(*workload(random.Random(3), 30))
    other.close()
    forged = other.signer(1).signed_tip(20, backbone.chains[20])
    for wrong in (
        replace(good, first=6),
        replace(good, chain_before=backbone.chains[5]),
        replace(good, chain_before=b""),
        replace(good, values=good.values[:-1]),
        replace(good, values=(*good.values, backbone.log[20])),
        replace(good, values=(other.log[4], *good.values[1:])),
        replace(good, values=()),
        replace(good, end=good.tip),
        replace(good, end=replace(good.end, signature=bytes(64))),
        replace(good, end=replace(good.end, voter=2)),
        replace(good, end=replace(good.end, slot=21)),
        replace(good, tip=replace(good.tip, slot=1 << 40)),
        replace(good, tip=replace(good.tip, signature=b"")),
        replace(good, tip=replace(forged, slot=19)),
    ):
        assert not trusting(backbone).entries(wrong), wrong


async def test_forged_tips_use_up_what_may_be_looked_at(backbone, monkeypatch):
    """A second's worth of them, and no more is verified until time passes; good ones are free."""
    backbone.append(*workload(random.Random(2), 30))
    now_s = [1000.0]
    monkeypatch.setattr(listeners.trust, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    monkeypatch.setattr(listeners.trust.random, "random", lambda: 0.0)
    trust = trusting(backbone)
    signer = backbone.signer(1)
    good = signer.signed_tip(20, backbone.chains[20])
    for number in range(listeners.trust.FAILURES_PER_S):
        assert trust.may_verify()
        assert not trust.proof.tip(replace(good, signature=number.to_bytes(64, "big")))
        assert trust.proof.tip(signer.signed_tip(1 + number % 30, backbone.chains[1 + number % 30]))
    assert not trust.may_verify()
    assert trust.proof.tip(good)
    now_s[0] += 0.1
    assert trust.may_verify()


async def test_a_few_forgeries_cost_nothing_genuine(backbone, monkeypatch):
    """However the draw falls: nothing is passed over until FORGED_FREE were forged of late."""
    monkeypatch.setattr(
        listeners.trust, "time", SimpleNamespace(monotonic=lambda: 1000.0)
    )  # nothing is earned back
    drawn = 0.999
    monkeypatch.setattr(listeners.trust.random, "random", lambda: drawn)
    trust = trusting(backbone)
    free = listeners.trust.FORGED_FREE
    for _ in range(free):
        assert trust.may_verify()
        trust.spend()
    assert trust.may_verify()
    trust.spend()
    assert not trust.may_verify(), "from here on it is drawn"
    drawn = 0.98
    assert trust.may_verify()
    for _ in range(free // 2):
        trust.spend()
    assert not trust.may_verify(), "and the chance is that of each of so many"
    drawn = 0.48
    assert trust.may_verify()


@pytest.mark.parametrize("forged", [24, 240, 800])
async def test_a_burst_before_each_heartbeat_leaves_it_its_chance(backbone, monkeypatch, forged):
    """When a heartbeat comes is no secret. To forge just before each, rather than evenly, hides not
    many more of them; and no more is looked at, in however short a time that many come."""
    now_s = 1000.0
    monkeypatch.setattr(listeners.trust, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(listeners.trust.random, "random", random.Random(11).random)
    trust = trusting(backbone)
    seen, looked, beats, beat_s = 0, 0, 1000, 0.08
    for _ in range(beats):
        for _ in range(forged):
            if trust.may_verify():
                trust.spend()
                looked += 1
        seen += trust.may_verify()
        now_s += beat_s
    a_second = listeners.trust.FAILURES_PER_S
    assert looked <= a_second * (1 + beats * beat_s)
    share = a_second / (forged / beat_s)  # if what comes were drawn, and nobody knew when
    assert seen >= 0.7 * share * beats


async def test_what_contradicts_what_is_proven_stops_it(backbone):
    backbone.append(*workload(random.Random(2), 30))
    trust = trusting(backbone, tips=(30,), delivered=[(1, 30)])
    lie = b"e" * 32
    with pytest.raises(ContradictionError, match="slot 17") as told:
        trust.proof.tip(backbone.signer(2).signed_tip(17, lie))
    assert [tip.slot for tip in told.value.tips] == [30, 17]
    assert told.value.chains == (backbone.chains[17], lie)
    # A history of another past, rightly signed, is one too: though no slot of it is known here.
    value = backbone.log[0]
    end = backbone.signer(3).signed_tip(31, chain_next(lie, 31, value))
    with pytest.raises(ContradictionError, match="slot 30"):
        trust.entries(CatchupEntries(31, lie, (value,), end, end))
    offer = backbone.answer(1, CatchupRequest("x", 1))
    assert isinstance(offer, CatchupEntries)


async def test_a_snapshot_is_only_believed_as_a_voter_offers_it(backbone):
    backbone.append(*workload(random.Random(2), 30))
    backbone.snapshot, backbone.retained_from = (20, b"state"), 21
    offer = backbone.answer(2, CatchupRequest("x", 1))
    assert trusting(backbone).offer(offer)
    for wrong in (
        replace(offer, slot=21),
        replace(offer, chain=backbone.chains[21]),
        replace(offer, digest=bytes(32)),
        replace(offer, size_bytes=offer.size_bytes + 1),
        replace(offer, signer=1),
        replace(offer, signer=0),
        replace(offer, signature=b""),
        replace(offer, digest=b"short"),
    ):
        assert not trusting(backbone).offer(wrong), wrong
    with pytest.raises(ContradictionError):
        trusting(backbone, tips=(30,), delivered=[(1, 30)]).offer(
            backbone.signer(3).offer(replace(offer, chain=b"e" * 32))
        )


# --- over sockets -----------------------------------------------------------------------------


@asynccontextmanager
async def relaying(backbone, trust, counters, *, revoked=frozenset):
    """A relay that serves what ``trust`` holds."""
    relay = Relay(backbone.cluster, held(backbone.cluster), trust, counters)
    task = asyncio.create_task(relay.serve(revoked))
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        relay.close()


def client_of(backbone, relay, *, papers=None, trust=None, revoked=frozenset):
    host, _, port = relay.address.rpartition(":")
    return CatchupClient(
        backbone.cluster,
        papers or held(backbone.cluster),
        "me",
        Counter(),
        None,
        trust or trusting(backbone),
        addresses={HELPER: (host, int(port))},
        revoked=revoked,
    )


async def test_a_reader_and_a_revoked_certificate_are_turned_away_on_both_sides(backbone):
    backbone.append(*workload(random.Random(1), 29))
    trust = trusting(backbone, tips=(30,), delivered=[(1, 30)])
    counters: Counter[str] = Counter()
    serial = holder_of(
        (folder(backbone.cluster, "listener") / "node.pem").read_bytes(),
        backbone.cluster.cluster_id_bytes,
    ).serial
    reader = issue(backbone.cluster, Grant("eyes", "reader"))
    lost: set[str] = set()
    async with relaying(backbone, trust, counters, revoked=lambda: frozenset(lost)) as relay:
        client = client_of(backbone, relay)
        assert isinstance(await client.entries(HELPER, 1), CatchupEntries)
        from listeners.credentials import Credentials

        eyes = Credentials(reader, backbone.cluster.cluster_id_bytes)
        looker = client_of(backbone, relay, papers=eyes)
        answer = await looker.entries(HELPER, 1)
        await looker.aclose()
        assert answer == AskOther(0, "a reader has no business here")
        lost.add(serial)  # on the connection that is open already
        assert isinstance(await client.entries(HELPER, 1), AskOther)
        wary = client_of(backbone, relay, revoked=lambda: frozenset({serial}))
        with pytest.raises(CatchupError, match="was revoked"):
            await wary.entries(HELPER, 1)
        with pytest.raises(CatchupError, match="does not say any more where it helps"):
            await client.entries(HELPER + 1, 1)
        await client.aclose()
    assert counters["relay_denied"] == 2


async def test_who_is_nobody_to_be_helped_takes_no_place(backbone, monkeypatch):
    monkeypatch.setattr(listeners.relay, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(listeners.relay, "HANDSHAKES_PER_S", 1000)
    backbone.append(*workload(random.Random(1), 29))
    trust = trusting(backbone, tips=(30,), delivered=[(1, 30)])
    counters: Counter[str] = Counter()
    issue(backbone.cluster, Grant("eyes", "reader"))
    context = held(backbone.cluster, "eyes").client
    async with relaying(backbone, trust, counters) as relay:
        host, _, port = relay.address.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port), ssl=context) for _ in range(4)]
        clients = [client_of(backbone, relay) for _ in range(3)]
        for client in clients[:2]:
            assert isinstance(await client.entries(HELPER, 1), CatchupEntries)
        assert isinstance(await clients[2].entries(HELPER, 1), AskOther), "that is all there are"
        for client in clients:
            await client.aclose()
        for reader, writer in silent:
            with anyio.fail_after(DEADLINE_S), suppress(ConnectionError, ssl.SSLError):
                assert await reader.read() == b""
            writer.transport.abort()
    assert counters["relay_too_slow"] == 4, "none of them was heard for long"


async def test_strangers_and_garbage_cost_a_counter(backbone, monkeypatch):
    monkeypatch.setattr(listeners.relay, "IDLE_S", 0.2)
    monkeypatch.setattr(listeners.relay, "HANDSHAKE_S", 0.2)
    backbone.append(*workload(random.Random(1), 29))
    counters: Counter[str] = Counter()
    trust = trusting(backbone, tips=(30,), delivered=[(1, 30)])
    async with relaying(backbone, trust, counters) as relay:
        host, _, port = relay.address.rpartition(":")
        address = host, int(port)
        strangers = [socket.create_connection(address) for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.0\r\n\r\n")
        strangers[1].close()
        identity = Identity(backbone.cluster.cluster_id_bytes)
        context = held(backbone.cluster).client
        for data in (
            b"x" * 100,
            frame(identity, Channel.CLIENT, encode_body(CatchupRequest("x", 1))),
            frame(identity, Channel.CATCHUP, b"\xc1"),
            frame(identity, Channel.CATCHUP, encode_body(AskOther(0, ""))),
            frame(identity, Channel.CATCHUP, bytes(5000)),
            b"Tx",
        ):
            reader, writer = await asyncio.open_connection(*address, ssl=context)
            writer.write(data)
            async with asyncio.timeout(DEADLINE_S):
                try:
                    assert await reader.read() == b""
                except (ConnectionError, ssl.SSLError):
                    pass
            writer.transport.abort()
        client = client_of(backbone, relay)
        assert isinstance(await client.entries(HELPER, 1), CatchupEntries), "others are served"
        await client.aclose()
        for stranger in strangers:
            stranger.close()
    assert counters["relay_tls_refused"] >= 2
    assert counters["relay_dropped_magic"] == counters["relay_dropped_channel"] == 1
    assert counters["relay_dropped_body"] == 2 and counters["relay_dropped_length"] == 1
    assert counters["relay_too_slow"] >= 1


async def test_without_any_archive_one_that_was_away_catches_up_from_another(backbone):
    """All archives are gone and no voter repairs: what the helper holds is all there is."""
    async with backbone.serving(heartbeat_s=0.05), following(backbone, "helper") as helper:
        last = backbone.append(*workload(random.Random(4), 300))
        await helper.wait_applied(last, DEADLINE_S)
        backbone.down, backbone.repairs = {1, 2, 3}, False
        async with following(backbone, "late") as late:
            await late.wait_applied(last, DEADLINE_S)
            assert same(late.state, replayed(backbone)[0])
        assert helper.counters["relay_slots"] >= last
        assert late.counters["dropped_unsigned"] == 0


async def test_a_gap_is_repaired_by_a_listener_when_voters_are_silent(backbone):
    async with (
        backbone.serving(heartbeat_s=0.05),
        following(backbone, "helper") as helper,
        following(backbone, "lossy", keep=drop_share(0.3, "x")) as lossy,
    ):
        await helper.wait_ready(DEADLINE_S)
        await lossy.wait_ready(DEADLINE_S)
        backbone.repairs, backbone.down = False, {1, 2, 3}
        await backbone.until(lambda: bool(lossy._learned.helpers))  # the helper has reported
        with anyio.fail_after(2 * DEADLINE_S):
            while not helper.counters["repairs_told"]:
                last = backbone.append(*workload(random.Random(backbone.tip), 3))
                backbone.stream(last - 2, last)
                await helper.wait_applied(last, DEADLINE_S)
                await lossy.wait_applied(last, DEADLINE_S)
        assert same(lossy.state, replayed(backbone)[0])
        assert helper.counters["repair.taken"] > 0


async def test_a_listener_that_lies_is_believed_nothing_and_harms_nobody(backbone, monkeypatch):
    """It answers with a forged history, then with nothing but silence: voters are asked next."""
    evil = Backbone(backbone.cluster)
    evil.append(*(put(f"k{n}", "forged") for n in range(200)))
    evil.close()

    def lie(message, trust):
        if isinstance(message, CatchupRequest) and message.first <= evil.tip:
            return replace(
                evil.entries(1, message.first, evil.tip),
                end=replace(trust.proof.newest, slot=evil.tip),
            )
        return AskOther(0, "no")

    async with backbone.serving(heartbeat_s=0.05), following(backbone, "liar") as liar:
        last = backbone.append(*workload(random.Random(4), 200))
        await liar.wait_applied(last, DEADLINE_S)
        monkeypatch.setattr(listeners.relay, "answer_to", lie)
        backbone.down, backbone.repairs = {1, 2, 3}, False
        async with following(backbone, "honest") as honest:
            await backbone.until(lambda: honest.counters["dropped_unsigned"] > 0)
            assert honest.applied == 0
            backbone.down = set()
            await honest.wait_applied(last, DEADLINE_S)
            assert same(honest.state, replayed(backbone)[0])


async def test_what_a_listener_multicasts_is_a_repair_or_nothing(backbone):
    """Under the stream key but in no voter's name: fixed slots only when marked as a repair."""
    async with backbone.serving(heartbeat_s=0.05), following(backbone, "one") as listener:
        await listener.wait_ready(DEADLINE_S)
        last = backbone.append(put("a", "1"))
        backbone.send(backbone.run(last, last), 0)
        await backbone.until(
            lambda: listener.counters["dropped_sender"] > 0 or listener.applied >= last
        )
        assert listener.counters["dropped_sender"] == 1
        tip = backbone.signer(1).signed_tip(last, backbone.chains[last])
        run = StreamRun(
            tip.ballot, last, backbone.chains[last - 1], (backbone.log[last - 1],),
            tip.slot, tip.chain, True, tip.voter, tip.signature,
        )  # fmt: skip
        assert tip_of(run) == tip
        backbone.send(run, 0)
        await listener.wait_applied(last, DEADLINE_S)


async def test_a_voter_whose_certificate_was_revoked_is_not_asked(backbone):
    serial = holder_of(
        (folder(backbone.cluster, "voter-2") / "node.pem").read_bytes(),
        backbone.cluster.cluster_id_bytes,
    ).serial
    async with backbone.serving(heartbeat_s=0.05), following(backbone, "one") as listener:
        last = backbone.append(put(REVOKED_KEY, f'["{serial}"]'))
        backbone.stream(last, last)
        await listener.wait_applied(last, DEADLINE_S)
        archives = listener._archives
        assert isinstance(await archives.entries(1, 1), CatchupEntries)
        with pytest.raises(CatchupError, match="'voter-2' was revoked"):
            await archives.entries(2, 1)


async def test_one_that_does_not_help_says_so_and_listens_nowhere(backbone):
    async with backbone.serving(heartbeat_s=0.05):
        options = replace(QUICK, helps=False)
        async with following(backbone, "quiet", options=options) as listener:
            await listener.wait_ready(DEADLINE_S)
            await backbone.until(lambda: bool(backbone.reports))
            assert backbone.reports[-1].helps == ""
        async with following(backbone, "kind") as listener:
            await listener.wait_ready(DEADLINE_S)
            await backbone.until(lambda: backbone.reports[-1].name == "kind")
            report = backbone.reports[-1]
            assert report.helps.startswith("127.0.0.1:") and report.instance > VOTER_ID_MAX


async def test_one_whose_store_is_of_another_past_stops_and_says_so(backbone, tmp_path):
    """A voter's disk was made anew, with the same cluster file: what is stored never was."""
    async with backbone.serving(heartbeat_s=0.05):
        async with following(backbone, "one", directory=tmp_path) as listener:
            last = backbone.append(put("colour", "green"))
            backbone.stream(last, last)
            await listener.wait_stored(last, DEADLINE_S)
        backbone.log[-1] = encode_value(put("colour", "red"))
        backbone.chains[-1] = chain_next(backbone.chains[-2], last, backbone.log[-1])
        with pytest.raises(ContradictionError, match=f"slot {last}"):  # noqa: PT012
            async with following(backbone, "one", directory=tmp_path) as listener:
                backbone.append(put("colour", "blue"))
                await listener.wait_applied(last + 1, DEADLINE_S)
    told = msgspec.json.decode((tmp_path / "contradiction.json").read_bytes())
    assert told["slot"] == last and told["chain_signed"] == backbone.chains[last].hex()
    assert told["chain_held"] != told["chain_signed"]
    assert all(tip["voter"] in (1, 2, 3) and tip["slot"] >= last for tip in told["tips"])
    assert told["tips"]
