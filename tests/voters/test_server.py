"""The voter with real sockets, journals and archive processes, in the test's own loop."""

from __future__ import annotations

import asyncio
import logging
import select
import shutil
import socket
import threading
import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from tests.credentials import folder, issue, on_stream, papers, stream_opener
from tests.voters.here import SOON_S, Here, some_cluster
from trex_core.access import REVOKED_KEY, Grant, revoked_text, voter_name
from trex_core.invariants import InvariantViolation
from trex_core.messages import (
    COMMAND_BYTES_MAX,
    NO_BALLOT,
    Accept,
    Accepted,
    Answer,
    Ballot,
    HandOverRequest,
    Heartbeat,
    Kind,
    ListenerReport,
    Outcome,
    OutcomeStatus,
    Query,
    Refusal,
    RefusalReason,
    Renew,
    SessionQuery,
    SnapshotNow,
    Status,
    StatusRequest,
    StreamTip,
    Submit,
    Tip,
    Value,
    encode_value,
    value_kind,
)
from trex_core.metadata.commands import (
    LEVEL,
    ConfigEntry,
    ConfigGet,
    ConfigList,
    ConfigPut,
    LeaseGrant,
    LeaseRevoke,
    decode_reply,
    encode_command,
    encode_question,
)
from trex_core.roster import BEHIND_MS
from trex_core.sessions import LEADER
from trex_core.state import (
    FixedRecord,
    Follower,
    Leader,
    Learn,
    LearnedRecord,
    Receive,
    Send,
)
from trex_core.wire import (
    Channel,
    FrameBuffer,
    Identity,
    decode_stream,
    encode_body,
    frame,
)
from trex_core.wire import decode_reply as decode_frame_reply
from voters import JournalError, StartError, VoterFailedError, server
from voters.client import NoQuorum, OutcomeUnknown, connect
from voters.frames import IDLE_S_MIN
from voters.gateway import CONNECTIONS_MAX, Client
from voters.journal import Disk, Journal
from voters.logs import fields_of
from voters.server import difference, percentiles_us
from voters.transport import multicast_receiver, multicast_sender

pytestmark = pytest.mark.anyio

VOTED = (Accept, Accepted)
"""What it takes to fix a slot."""


def opening(number):
    return Submit(number, Kind.OPEN, 0, 0, 0, b"")


class Asker:
    """A client's connection at its barest."""

    def __init__(self, cluster, voter):
        self.cluster = cluster
        self.entry = cluster.voter(voter)
        self.waiting = {}
        self.number = 0

    async def __aenter__(self):
        self.reader, self.writer = await self.connect()
        self.task = asyncio.create_task(self._read())
        return self

    async def connect(self):
        return await asyncio.open_connection(
            self.entry.host, self.entry.client_port, ssl=papers(self.cluster).client
        )

    async def __aexit__(self, *exc):
        self.task.cancel()
        self.writer.transport.abort()
        self.writer.close()

    async def _read(self):
        buffer = FrameBuffer(self.cluster.cluster_id_bytes, Channel.CLIENT)
        while data := await self.reader.read(1 << 18):
            for held in buffer.feed(data):
                reply = decode_frame_reply(held.body)
                self.waiting.pop(reply.id).set_result(reply)

    def begin(self, make):
        self.number += 1
        answered = asyncio.get_running_loop().create_future()
        self.waiting[self.number] = answered
        identity = Identity(self.cluster.cluster_id_bytes)
        self.writer.write(frame(identity, Channel.CLIENT, encode_body(make(self.number))))
        return answered

    async def ask(self, make):
        async with asyncio.timeout(SOON_S):
            return await self.begin(make)

    async def open_session(self):
        reply = await self.ask(opening)
        assert isinstance(reply, Outcome), reply
        return reply.slot

    async def put(self, session, sequence, key="k", value="v"):
        return await self.ask(put(session, sequence, key, value))

    async def get(self, key):
        reply = await self.ask(lambda i: Query(i, encode_question(ConfigGet(key)), True))
        assert isinstance(reply, Answer), reply
        return decode_reply(reply.body)


def put(session, sequence, key="k", value="v"):
    command = encode_command(ConfigPut(key, value))
    return lambda i: Submit(i, Kind.COMMAND, session, sequence, 1, command)


async def put_by_eights(client):
    """400 puts, several under way, so that an Accept tells followers what is fixed."""
    session = await client.open_session()
    for first in range(1, 400, 8):
        puts = [client.begin(put(session, first + n)) for n in range(8)]
        async with asyncio.timeout(SOON_S):
            replies = await asyncio.gather(*puts)
        assert all(reply.status == OutcomeStatus.APPLIED for reply in replies)


async def answered_or_proposed(client, leader, make):
    """Ask; return the reply to come once it is there, or the leader has proposed something."""
    held = leader.state.last_accepted
    reply = client.begin(make)
    await leader.until(lambda: reply.done() or leader.state.last_accepted > held, SOON_S)
    return reply


def held_by(voter):
    return b"".join(voter.replica.machine.snapshot())


@pytest.fixture
async def here(tmp_path, monkeypatch):
    """Three voters without archive processes, which most of these tests do not need."""

    async def no_archive(_setup):
        await asyncio.Event().wait()

    monkeypatch.setattr(server.ArchiveChild, "run", no_archive)
    with some_cluster() as cluster:
        async with Here(cluster, tmp_path) as voters:
            yield voters


@pytest.fixture
async def whole(tmp_path):
    """Three voters with their archive processes."""
    with some_cluster() as cluster:
        async with Here(cluster, tmp_path) as voters:
            yield voters


async def test_a_driver_whose_idle_connection_made_room_comes_back(here):
    await here.start()
    leader = await here.leader()
    gateway = leader._gateway
    async with connect(here.cluster, folder(here.cluster), deadline_s=SOON_S) as client:
        await client.put("a", "1")
        gateway.connections_max = len(gateway.connections)
        for connection in gateway.connections:
            connection.since -= IDLE_S_MIN + 1
        async with Asker(here.cluster, leader.config.voter) as other:
            await other.ask(StatusRequest)
            assert leader.counters["client.too_many_connections"] == 1
            gateway.connections_max = CONNECTIONS_MAX
            await client.put("a", "2")
            assert (await client.get("a")).value == "2"


async def test_a_revoked_voter_votes_no_more_until_its_certificate_is_renewed(here):
    await here.start()
    leader = (await here.leader()).config.voter
    revoked, other = (voter for voter in here.cluster.voter_ids if voter != leader)
    serial = papers(here.cluster, voter_name(revoked)).holder.serial
    async with connect(here.cluster, folder(here.cluster), deadline_s=SOON_S) as client:
        await client.put(REVOKED_KEY, revoked_text(frozenset({serial})))
        await here.until(lambda: all(v._gateway.revoked for v in here.running.values()))
        heeded = [v._catchup.revoked for n, v in here.running.items() if n != revoked]
        assert heeded == [{serial}] * 2, "nor is its archive believed"
        await client.put("a", "1")  # two are a majority
        await here.stop(other)
        with pytest.raises((NoQuorum, OutcomeUnknown)):
            await client.put("a", "2", deadline_s=2.0)
        issue(here.cluster, Grant(voter_name(revoked), "voter"))
        await client.put("a", "3")


async def test_a_leader_is_elected_and_all_fix_and_apply_the_same(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        slots = []
        for sequence in range(1, 51):
            outcome = await client.put(session, sequence, f"key-{sequence}", "x" * sequence)
            assert (outcome.status, type(outcome)) == (OutcomeStatus.APPLIED, Outcome)
            slots.append(outcome.slot)
        assert slots == sorted(set(slots))
    voters = list(here.running.values())
    await here.until(lambda: len({v.replica.chain for v in voters}) == 1)
    assert {v.replica.applied for v in voters} == {leader.state.fixed}
    assert len({held_by(v) for v in voters}) == 1


async def test_each_retry_gets_the_first_result_and_gaps_are_told(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        first = await client.put(session, 1, "k", "one")
        again = await client.put(session, 1, "k", "one")
        assert (again.slot, again.status, again.body) == (first.slot, first.status, first.body)
        gap = await client.put(session, 3, "k", "three")
        assert gap.status == OutcomeStatus.GAP
        reply = await client.ask(lambda i: SessionQuery(i, session))
        assert msgspec.msgpack.decode(reply.body) == 2
        assert (await client.put(999_999, 1)).status == OutcomeStatus.SESSION_EXPIRED


async def test_who_does_not_lead_says_who_does_and_where(here):
    await here.start()
    leader = (await here.leader()).config.voter
    other = next(v for v in here.cluster.voter_ids if v != leader)
    entry = here.cluster.voter(leader)
    async with Asker(here.cluster, other) as client:
        for make in (
            put(1, 1),
            lambda i: Query(i, encode_question(ConfigGet("k")), True),
            lambda i: SessionQuery(i, 1),
            lambda i: Renew(i, (1,)),
            lambda i: HandOverRequest(i, 0),
        ):
            reply = await client.ask(make)
            assert reply == Refusal(
                reply.id, RefusalReason.NOT_LEADER, leader, f"{entry.host}:{entry.client_port}"
            )
        anywhere = await client.ask(lambda i: Query(i, encode_question(ConfigGet("k")), False))
        assert isinstance(anywhere, Answer)


async def test_pipelined_commands_and_reads_are_answered_in_their_order(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        writes = [client.begin(put(session, n, "k", str(n))) for n in range(1, 301)]
        outcomes = [await asyncio.wait_for(write, SOON_S) for write in writes]
        assert [outcome.status for outcome in outcomes] == [OutcomeStatus.APPLIED] * 300
        slots = [outcome.slot for outcome in outcomes]
        assert slots == sorted(slots)
        entry = await client.get("k")
        assert entry == ConfigEntry("k", "300", slots[-1])


async def test_a_read_sees_every_write_acknowledged_before_it(here):
    await here.start()
    leader = await here.leader()
    me = leader.config.voter
    async with Asker(here.cluster, me) as writer, Asker(here.cluster, me) as reader:
        session = await writer.open_session()
        for sequence in range(1, 31):
            outcome = await writer.put(session, sequence, "k", str(sequence))
            entry = await reader.get("k")
            assert entry == ConfigEntry("k", str(sequence), outcome.slot)


async def test_a_leader_that_lost_its_quorum_answers_no_read_and_no_write(here):
    await here.start()
    leader = await here.leader()
    me = leader.config.voter
    async with Asker(here.cluster, me) as client:
        session = await client.open_session()
        await client.put(session, 1)
        for voter in here.cluster.voter_ids:
            if voter != me:
                await here.stop(voter)
        read = client.begin(lambda i: Query(i, encode_question(ConfigGet("k")), True))
        write = client.begin(put(session, 2, "k", "never acknowledged"))
        async with asyncio.timeout(SOON_S):
            refused_read, refused_write = await read, await write
        assert isinstance(refused_read, Refusal)
        assert refused_read.reason == RefusalReason.NOT_LEADER
        # The write was proposed before the leader stepped down, or never: it says which.
        assert isinstance(refused_write, Refusal)
        assert refused_write.reason in (RefusalReason.LEADERSHIP_LOST, RefusalReason.NOT_LEADER)
        assert not isinstance(leader.state.role, Leader)
        refused = await client.put(session, 2)
        while refused.reason != RefusalReason.NO_QUORUM:
            assert (refused.reason, refused.leader) == (RefusalReason.NOT_LEADER, 0)
            tick = leader.state.tick
            await leader.until(lambda t=tick: leader.state.tick > t, SOON_S)
            refused = await client.put(session, 2)
        assert refused.leader == 0


async def test_a_new_leader_answers_a_read_when_what_it_recovered_is_applied(here, monkeypatch):
    """The leader before may have told its client that this was written. Here the new leader's
    heartbeats are answered, but not yet its Accepts of what it recovered."""
    await here.start()
    old = await here.leader()
    others = [voter for voter in here.running.values() if voter is not old]
    is_cut, is_held = [False], [True]

    def gated(voter):
        real = voter._transport.send

        def send(to, message):
            mute = is_cut[0] if voter is old else is_held[0] and isinstance(message, VOTED)
            if not mute:
                real(to, message)

        monkeypatch.setattr(voter._transport, "send", send)

    async with Asker(here.cluster, old.config.voter) as client:
        session = await client.open_session()
        await client.put(session, 1, "k", "before")
        for voter in here.running.values():
            gated(voter)
        client.begin(put(session, 2, "k", "recovered"))
        for voter in others:
            await voter.until(lambda v=voter: v.state.last_accepted > old.state.fixed, SOON_S)
    is_cut[0] = True
    await here.until(lambda: any(isinstance(voter.state.role, Leader) for voter in others))
    new = next(voter for voter in others if isinstance(voter.state.role, Leader))
    async with Asker(here.cluster, new.config.voter) as client:
        read = client.begin(lambda i: Query(i, encode_question(ConfigGet("k")), True))
        await new.until(
            lambda: (
                read.done() or (new._reads and new.state.role.beat_acked > new._reads[0].after_beat)
            ),
            SOON_S,
        )
        assert not read.done(), "a quorum confirmed it, but it lacks a write that may be known"
        is_held[0] = False
        reply = await asyncio.wait_for(read, SOON_S)
        assert decode_reply(reply.body).value == "recovered"


async def test_who_waits_for_a_slot_is_answered_for_its_own_value_only(here):
    """Another leader may have fixed another command where one's own was proposed."""
    await here.start()
    leader = await here.leader()
    other = next(v for v in here.running.values() if v is not leader)
    told = []
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        slot = leader.state.fixed + 1
        other._pending[slot] = (SimpleNamespace(reply=told.append), 7, b"another command")
        assert (await client.put(session, 1)).slot == slot
    await here.until(lambda: other.replica.applied >= slot)
    assert [(type(reply), reply.id) for reply in told] == [(Refusal, 7)]
    assert told[0].reason == RefusalReason.LEADERSHIP_LOST


async def test_who_waits_for_a_slot_is_told_when_leadership_is_lost(tmp_path):
    # Where nobody takes over in an election timeout the leader goes on: it is long here.
    patient = {"election_ticks_min": 150, "election_ticks_max": 160}
    with some_cluster(timing=patient) as cluster:
        async with Here(cluster, tmp_path) as here:
            await here.start()
            leader = await here.leader()
            told = []
            slot = leader.state.fixed + 1000
            leader._pending[slot] = (SimpleNamespace(reply=told.append), 7, b"in flight")
            assert await leader.hand_over(SOON_S)
    assert [(reply.id, reply.reason) for reply in told] == [(7, RefusalReason.LEADERSHIP_LOST)]


async def test_a_vote_waits_for_its_own_batch(here, monkeypatch):
    """Several batches are on their way: the sync of one lets its votes go, and no later ones."""
    await here.start()
    voter = await here.leader()
    other = next(v for v in here.cluster.voter_ids if v != voter.config.voter)
    votes = [Accepted(Ballot(0, 9, other), slot, slot) for slot in (5, 6, 7)]
    sent = []
    monkeypatch.setattr(voter, "_held", deque())
    monkeypatch.setattr(voter._transport, "send", lambda _, message: sent.append(message))
    voter._held.extend(
        (batch, [Send(other, vote)]) for batch, vote in zip((3, 4, 9), votes, strict=True)
    )
    for synced, gone in ((2, 0), (3, 1), (8, 2), (9, 3)):
        voter._release(synced)
        assert sent == votes[:gone]


async def test_what_is_fixed_is_held_back_for_the_next_vote_and_not_for_ever(here, monkeypatch):
    """Nothing else is: a voter that catches up writes what it learned at its next tick."""
    await here.start()
    voter = await here.leader()
    began, chain = voter.state.tick, voter.state.chain
    appended, handed = [], []

    def submit(_):
        handed.append(tuple(appended))
        appended.clear()
        return len(handed)

    monkeypatch.setattr(voter._journal, "append", appended.extend)
    monkeypatch.setattr(voter._journal, "submit", submit)
    for name, nothing in (("_held", deque()), ("_votes", []), ("_due_tick", server._NEVER_TICK)):
        monkeypatch.setattr(voter, name, nothing)
    fixed, later = FixedRecord(9, chain), FixedRecord(10, chain)
    learned = LearnedRecord(11, (b"value",), chain)

    def write(ticks, *records):
        voter.state = msgspec.structs.replace(voter.state, tick=began + ticks)
        voter._records = list(records)
        voter._write()
        written = tuple(handed)
        handed.clear()
        return written

    held = server.FIXED_HELD_TICKS
    assert held > 1
    assert write(0, fixed) == write(held - 1, later) == ()
    assert write(held) == ((fixed, later),)  # since the first of them
    assert write(2 * held) == ()
    assert write(3 * held, fixed) == ()
    assert write(3 * held, learned) == ()
    assert write(3 * held + 1) == ((fixed, learned),)
    assert write(4 * held, fixed) == ()
    voter._votes.append(Send(voter.config.voter, Accepted(Ballot(0, 9, 1), 12, 12)))
    assert write(4 * held) == ((fixed,),)
    assert write(9 * held) == ()


async def test_a_write_goes_on_without_a_minority_and_the_missing_one_catches_up(whole):
    here = whole
    await here.start()
    leader = await here.leader()
    other = next(v for v in here.cluster.voter_ids if v != leader.config.voter)
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        await here.stop(other)
        for sequence in range(1, 41):
            assert (await client.put(session, sequence, "k", "y" * 2000)).status == 0
    fixed = leader.state.fixed
    await here.start(other)
    await here.until(lambda: here.running[other].replica.applied >= fixed)
    assert held_by(here.running[other]) == held_by(leader)


async def test_a_follower_votes_before_it_applies_and_applies_at_its_next_turn(here, monkeypatch):
    """Its votes are waited for; what it applies is not, but is never put off twice, and not done
    before synced votes leave either."""
    await here.start()
    leader = await here.leader()
    follower = next(v for v in here.running.values() if v is not leader)
    voted, put_off_before = False, False
    put_off, left, wrong = 0, 0, Counter()
    began_at = ended_at = 0  # what was applied when a turn had drained, and when one was over
    drain, submit, turn = follower._transport.drain, follower._journal.submit, follower._turn
    send = follower._transport.send

    def drained(datagrams_max):
        nonlocal began_at
        wrong["put off twice"] += len(follower._fixed)
        began_at = follower.replica.applied
        return drain(datagrams_max)

    def submitted(state):
        nonlocal voted
        voted = bool(follower._votes)
        wrong["applied first"] += voted and follower.replica.applied > began_at
        return submit(state)

    def sent(to, message):
        nonlocal left
        if isinstance(message, Accepted) and put_off_before:
            left += 1
            wrong["applied before synced votes left"] += follower.replica.applied > ended_at
        send(to, message)

    def whole_turn():
        nonlocal voted, put_off, put_off_before, ended_at
        voted, put_off_before = False, bool(follower._fixed)
        if put_off_before and put_off % 2:  # half of them: the sync is done by the next turn
            assert select.select([follower._journal.wakeup_fd], [], [], SOON_S)[0]
            follower._on_synced()
        turn()
        ended_at = follower.replica.applied
        if follower._fixed:
            put_off += 1
            wrong["put off for nothing"] += not voted

    monkeypatch.setattr(follower._transport, "drain", drained)
    monkeypatch.setattr(follower._transport, "send", sent)
    monkeypatch.setattr(follower._journal, "submit", submitted)
    monkeypatch.setattr(follower, "_turn", whole_turn)
    async with Asker(here.cluster, leader.config.voter) as client:
        await put_by_eights(client)
    assert isinstance(leader.state.role, Leader)
    assert put_off > 0
    assert left > 0
    assert not wrong.total(), wrong
    await here.until(lambda: follower.replica.applied == leader.replica.applied)
    assert held_by(follower) == held_by(leader)


async def test_votes_wait_for_the_disk_and_nothing_else_does(here, monkeypatch):
    """With its own disk standing still a leader commits through the others' disks; with theirs
    standing still it commits nothing, however long it waits for it."""
    gates = {voter: threading.Event() for voter in here.cluster.voter_ids}
    real = Disk.fdatasync

    def fdatasync(disk, fd):
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        for voter, gate in gates.items():
            if f"voter-{voter}/" in path:
                assert gate.wait(SOON_S)
        real(disk, fd)

    for gate in gates.values():
        gate.set()
    monkeypatch.setattr(Disk, "fdatasync", fdatasync)
    await here.start()
    leader = await here.leader()
    me = leader.config.voter
    try:
        async with Asker(here.cluster, me) as client:
            session = await client.open_session()
            gates[me].clear()
            outcome = await client.put(session, 1)
            assert isinstance(outcome, Outcome) and outcome.status == OutcomeStatus.APPLIED
            gates[me].set()
            others = [voter for voter in here.cluster.voter_ids if voter != me]
            for voter in others:
                gates[voter].clear()
            write = client.begin(put(session, 2))
            await leader.until(
                lambda: (
                    write.done()
                    or (
                        leader.state.role.flights
                        and leader.state.role.flights[0].votes == (me,)
                        and all(
                            ack.last_accepted > leader.state.fixed for ack in leader.state.role.acks
                        )
                    )
                ),
                SOON_S,
            )
            assert not write.done(), "both others hold the value, and their votes are not out"
            gates[others[0]].set()
            assert (await asyncio.wait_for(write, SOON_S)).status == OutcomeStatus.APPLIED
    finally:
        for gate in gates.values():
            gate.set()


async def test_everything_is_there_after_all_stopped_and_started(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        outcome = await client.put(session, 1, "k", "kept")
    before = leader.replica.machine.state
    for voter in here.cluster.voter_ids:
        await here.stop(voter)
    await here.start()
    leader = await here.leader()
    assert leader.identity.boot == 2
    async with Asker(here.cluster, leader.config.voter) as client:
        assert await client.get("k") == ConfigEntry("k", "kept", outcome.slot)
        again = await client.put(session, 1, "k", "kept")
        assert (again.slot, again.body) == (outcome.slot, outcome.body)
    assert leader.replica.machine.state.config == before.config


async def test_snapshots_are_cut_alike_and_a_voter_returns_through_one(tmp_path, caplog):
    caplog.set_level(logging.INFO, "trex.voter")
    limits = {
        "snapshot_slots": 16,
        "snapshots_kept": 2,
        "segment_bytes": 1 << 16,
        "retain_bytes": 0,
    }
    with some_cluster(journal=limits) as cluster:
        async with Here(cluster, tmp_path) as here:
            await here.start()
            leader = await here.leader()
            other = next(v for v in cluster.voter_ids if v != leader.config.voter)
            async with Asker(cluster, leader.config.voter) as client:
                session = await client.open_session()
                await client.put(session, 1)
                await here.stop(other)
                for sequence in range(2, 200):
                    await client.put(session, sequence, f"k{sequence % 7}", "z" * 3000)
            running = list(here.running.values())
            slot = leader.state.fixed // 16 * 16
            await here.until(lambda: all(v.status().snapshot_slot == slot for v in running))
            held = [tmp_path / f"voter-{v.config.voter}" / "snapshots" for v in running]
            names = [sorted(path.name for path in folder.glob("*.snapshot")) for folder in held]
            assert names[0] == names[1] == [f"{slot - 16:016d}.snapshot", f"{slot:016d}.snapshot"]
            one, two = ((folder / names[0][-1]).read_bytes() for folder in held)
            assert one == two
            # The log of the others does not reach back to where this one stopped any more.
            await here.start(other)
            back = here.running[other]
            await here.until(lambda: back.replica.applied >= leader.state.fixed)
            assert back.replica.chain == leader.replica.chain
            assert held_by(back) == held_by(leader)
            assert [r.trex_fields["slot"] for r in caplog.records if "installed" in r.message]
            # And from its own snapshot, in order, without anybody.
            applied = back.replica.applied
            await here.stop(other)
            await here.start(other)
            assert here.running[other].replica.applied >= applied


async def test_a_snapshot_now_is_durable_when_answered(here):
    await here.start()
    leader = await here.leader()
    me = leader.config.voter
    async with Asker(here.cluster, me) as client:
        session = await client.open_session()
        await client.put(session, 1)
        reply = await client.ask(SnapshotNow)
        slot = msgspec.msgpack.decode(reply.body)
        assert (here.path(me) / "snapshots" / f"{int(slot):016d}.snapshot").exists()
        assert int(slot) == leader.status().snapshot_slot


async def test_a_snapshot_now_holds_what_a_follower_put_off(here, monkeypatch):
    """Asked for in the turn that fixes slot 1, it would be of slot 0: a file that never is."""
    await here.start()
    leader = await here.leader()
    follower = next(v for v in here.running.values() if v is not leader)
    asked: list[int] = []
    told: asyncio.Future[tuple[bool, str]] = asyncio.get_running_loop().create_future()
    propose = follower._propose

    def proposed(now_s):
        propose(now_s)
        if follower._fixed and follower._votes and not asked:
            asked.append(follower.state.fixed)
            follower._snapshot_now.append(lambda done, slot: told.set_result((done, slot)))

    monkeypatch.setattr(follower, "_propose", proposed)
    async with Asker(here.cluster, leader.config.voter) as client:
        await put_by_eights(client)
    assert asked
    done, slot = await asyncio.wait_for(told, SOON_S)
    assert (done, int(slot)) == (True, asked[0])
    me = follower.config.voter
    assert (here.path(me) / "snapshots" / f"{int(slot):016d}.snapshot").exists()


async def test_a_handover_moves_the_leader_and_fails_no_write(here):
    await here.start()
    old = await here.leader()
    to = next(v for v in here.cluster.voter_ids if v != old.config.voter)
    async with Asker(here.cluster, old.config.voter) as client:
        session = await client.open_session()
        begun = [client.begin(put(session, n, "k", str(n))) for n in range(1, 101)]
        assert (await asyncio.wait_for(begun[0], SOON_S)).status == OutcomeStatus.APPLIED
        moved = client.begin(lambda i: HandOverRequest(i, to))
        begun += [client.begin(put(session, n, "k", str(n))) for n in range(101, 201)]
        async with asyncio.timeout(SOON_S):
            replies = [await reply for reply in begun]
            answer = await moved
    assert isinstance(answer, Answer)
    assert msgspec.msgpack.decode(answer.body) == str(to)
    done = [isinstance(reply, Outcome) for reply in replies]
    assert done == sorted(done, reverse=True), "what was proposed is a prefix"
    assert not all(done)
    turned_away = {reply.reason for reply in replies if isinstance(reply, Refusal)}
    assert turned_away == {RefusalReason.NOT_LEADER}, "no outcome is unknown"
    assert (await here.leader()).config.voter == to


async def test_a_stopping_leader_hands_over_first(here):
    await here.start()
    old = await here.leader()
    ballot = old.state.leader
    await here.stop(old.config.voter)
    assert isinstance(old.state.role, Follower)
    new = await here.leader()
    assert new.state.leader > ballot
    assert new.state.leader.round == ballot.round + 1, "one ballot, no election in between"


async def test_a_handover_to_a_dead_voter_is_refused_and_the_old_leader_goes_on(here):
    await here.start()
    old = await here.leader()
    dead = next(v for v in here.cluster.voter_ids if v != old.config.voter)
    await here.stop(dead)
    async with Asker(here.cluster, old.config.voter) as client:
        reply = await client.ask(lambda i: HandOverRequest(i, dead))
        assert isinstance(reply, Refusal)
        assert "took over" in reply.detail
        assert isinstance(await client.ask(lambda i: HandOverRequest(i, 99)), Refusal)
        session = await client.open_session()
        assert (await client.put(session, 1)).status == 0


class Fragile:
    """A user's machine: adds numbers, and raises for an odd one."""

    def __init__(self):
        self.total = 0

    def apply(self, _slot, command):
        self.total += int(command)
        if int(command) % 2:
            raise ArithmeticError("odd")
        return str(self.total).encode()

    def query(self, query):
        return str(self.total // int(query)).encode()

    def snapshot(self):
        return [str(self.total).encode()]

    def restore(self, data):
        self.total = int(data)


async def test_any_machine_is_replicated_and_its_exceptions_are_results(tmp_path):
    with some_cluster(voters=1) as cluster:
        async with Here(cluster, tmp_path, Fragile) as here:
            await here.start()
            voter = await here.leader()
            async with Asker(cluster, 1) as client:
                session = await client.open_session()
                replies = [
                    await client.ask(
                        lambda i, n=n: Submit(
                            i, Kind.COMMAND, session, n, 1, (b"4", b"3", b"x", b"6")[n - 1]
                        )
                    )
                    for n in range(1, 5)
                ]
                assert [(r.status, r.body) for r in replies] == [
                    (OutcomeStatus.APPLIED, b"4"),
                    (OutcomeStatus.FAILED, b"ArithmeticError"),
                    (OutcomeStatus.FAILED, b"ValueError"),
                    (OutcomeStatus.APPLIED, b"10"),
                ]
                halved = await client.ask(lambda i: Query(i, b"2", True))
                assert halved.body == b"5"
                refused = await client.ask(lambda i: Query(i, b"0", True))
                assert (refused.reason, "ZeroDivisionError" in refused.detail) == (6, True)
                renew = await client.ask(lambda i: Renew(i, (1,)))
                assert "no leases" in renew.detail
            assert voter.replica.machine.total == 10


async def test_a_lease_lives_while_it_is_renewed_and_ends_when_it_is_not(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        leases = []
        for sequence in (1, 2):
            grant = encode_command(LeaseGrant(300))
            outcome = await client.ask(
                lambda i, n=sequence, c=grant: Submit(i, Kind.COMMAND, session, n, 1, c)
            )
            leases.append(outcome.slot)
        kept, dropped = leases
        machine = leader.replica.machine
        while dropped in machine.state.leases:
            reply = await client.ask(lambda i: Renew(i, (kept, 77)))
            assert msgspec.msgpack.decode(reply.body) == [kept]
        assert kept in machine.state.leases
        reply = await client.ask(lambda i: Renew(i, (kept, dropped)))
        assert msgspec.msgpack.decode(reply.body) == [kept]
        await leader.until(lambda: kept not in machine.state.leases, SOON_S)


async def test_a_flood_of_large_reads_stalls_no_turn_and_is_not_held_at_once(here, monkeypatch):
    """Small requests for pages of a megabyte, one behind the other, from one who does not read."""
    held, flush = [], Client.flush

    def flush_noted(client):
        held.append(sum(map(len, client._replies)))
        flush(client)

    monkeypatch.setattr(Client, "flush", flush_noted)
    monkeypatch.setattr(server, "ANSWERS_S_PER_TURN", SOON_S)  # whatever the machine is worth
    await here.start()
    leader = await here.leader()
    me = leader.config.voter
    async with Asker(here.cluster, me) as client:
        session = await client.open_session()
        for sequence in range(1, 6):
            await client.put(session, sequence, f"k{sequence}", "v" * 200_000)
        page = encode_question(ConfigList("", ""))
        rude = Asker(here.cluster, me)
        _, rude.writer = await rude.connect()
        for linearizable in (True, False) * 50:
            rude.begin(lambda i, sure=linearizable: Query(i, page, sure))
        while not leader.counters.get("client.slow_reader"):
            assert (await client.put(session, sequence + 1)).status == OutcomeStatus.APPLIED
            sequence += 1
        rude.writer.close()
    one_answer = 5 * 200_000 + 1000
    most = 2 * (server.ANSWERS_BYTES_PER_TURN + one_answer)  # reads local, and linearizable
    assert max(held) < most, "replies of one turn, in bytes"


async def test_reads_that_wait_for_a_round_are_bounded_in_bytes(here, monkeypatch):
    monkeypatch.setattr(server, "READS_BYTES_MAX", 1000)
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        asked = [client.begin(lambda i: Query(i, bytes(300), True)) for _ in range(20)]
        replies = await asyncio.wait_for(asyncio.gather(*asked), SOON_S)
        refused = [each.reason for each in replies if isinstance(each, Refusal)]
        assert refused == [RefusalReason.BUSY] * 17, "all came at once"
        assert leader._reads_bytes == 0
        reply = await asyncio.wait_for(client.begin(lambda i: Query(i, bytes(1000), True)), SOON_S)
        assert not isinstance(reply, Refusal)


async def test_a_turn_that_took_its_time_leaves_the_rest_to_the_next(here, monkeypatch):
    monkeypatch.setattr(server, "ANSWERS_S_PER_TURN", 0.0)
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        question = encode_question(ConfigGet("k"))
        for sure in (True, False):
            asked = [client.begin(lambda i, s=sure: Query(i, question, s)) for _ in range(20)]
            assert len(await asyncio.wait_for(asyncio.gather(*asked), SOON_S)) == 20


@pytest.mark.parametrize("ends", [True, False])
async def test_a_renewal_tells_what_is_alive_when_it_is_answered(here, monkeypatch, ends):
    """A new leader applies what it recovered after the renewal came: the grant of a lease that is
    not to be told dead, or its end, after which it must not be told alive."""
    await here.start()
    leader = await here.leader()
    held, beats = [True], []
    real = leader._transport.send

    def send(to, message):
        if held[0] and isinstance(message, Heartbeat):
            beats.append((to, message))
        else:
            real(to, message)

    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        grant = encode_command(LeaseGrant(60_000))

        def submit(sequence, command):
            return client.begin(lambda i: Submit(i, Kind.COMMAND, session, sequence, 1, command))

        lease = (await submit(1, grant)).slot if ends else leader.state.role.next_slot
        monkeypatch.setattr(leader._transport, "send", send)
        renewed = client.begin(lambda i: Renew(i, (lease,)))
        done = (
            await submit(2, encode_command(LeaseRevoke(lease))) if ends else await submit(1, grant)
        )
        assert done.status == OutcomeStatus.APPLIED
        assert not renewed.done()
        held[0] = False
        for to, message in beats:
            real(to, message)
        reply = await asyncio.wait_for(renewed, SOON_S)
        assert msgspec.msgpack.decode(reply.body) == ([] if ends else [lease])


async def test_an_expiry_of_an_earlier_leader_does_not_end_a_renewed_lease(here, monkeypatch):
    """Nobody but the first leader has what it proposed last, the expiry of a lease. The second
    renews the lease; the third recovers the expiry, and must not follow it."""
    await here.start()
    mute, cut = set(), set()
    for voter in here.running.values():

        def send(to, message, voter=voter, real=voter._transport.send):
            if voter not in cut and not (voter in mute and isinstance(message, Accept)):
                real(to, message)

        def drain(most, voter=voter, real=voter._transport.drain):
            return [event for event in real(most) if voter not in cut]

        monkeypatch.setattr(voter._transport, "send", send)
        monkeypatch.setattr(voter._transport, "drain", drain)

    def led_by(*voters):
        return next((v for v in voters if isinstance(v.state.role, Leader)), None)

    first = await here.leader()
    others = [voter for voter in here.running.values() if voter is not first]
    grant = encode_command(LeaseGrant(400))
    async with Asker(here.cluster, first.config.voter) as client:
        session = await client.open_session()
        lease = (await client.ask(lambda i: Submit(i, Kind.COMMAND, session, 1, 1, grant))).slot
        await first.until(lambda: first._leases is not None, SOON_S)
        mute.add(first)
        lost = client.begin(lambda i: Submit(i, Kind.COMMAND, session, 2, 1, grant))

        def expires():
            held = [value for run in first.state.accepted for value in run.values]
            return len(held) == 2 and value_kind(held[1]) == Kind.ENGINE

        await first.until(expires, SOON_S)
        last = first.state.last_accepted
        cut.add(first)
        await here.until(lambda: led_by(*others) and not led_by(first))
        assert (await lost).reason == RefusalReason.LEADERSHIP_LOST
    second = led_by(*others)
    async with Asker(here.cluster, second.config.voter) as client:
        renewed = await client.ask(lambda i: Renew(i, (lease,)))
        assert msgspec.msgpack.decode(renewed.body) == [lease]
    cut.add(second)
    cut.discard(first)
    mute.clear()
    rest = [voter for voter in here.running.values() if voter is not second]
    await here.until(lambda: (led := led_by(*rest)) and led.replica.applied >= last)
    assert lease in led_by(*rest).replica.machine.state.leases


async def test_a_renewal_waits_until_the_expiries_of_earlier_leaders_are_void(here, monkeypatch):
    """The leader's session does not get fixed: renewals wait for it, other reads do not."""
    await here.start()
    leader = await here.leader()
    held, opening = [], [True]
    real = leader._transport.send

    def send(to, message):
        if not (opening[0] and isinstance(message, Accept) and LEADER in message.values[-1]):
            real(to, message)
        else:
            held.append((to, message))

    monkeypatch.setattr(leader._transport, "send", send)
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        grant = encode_command(LeaseGrant(60_000))
        lease = (await client.ask(lambda i: Submit(i, Kind.COMMAND, session, 1, 1, grant))).slot
        renewed = client.begin(lambda i: Renew(i, (lease,)))
        question = encode_question(ConfigGet("a"))
        for _ in range(3):
            assert isinstance(await client.ask(lambda i: Query(i, question, True)), Answer)
        await leader.until(lambda: len(held) >= 2, SOON_S)
        assert isinstance(await client.ask(lambda i: Query(i, question, True)), Answer)
        assert not renewed.done()
        opening[0] = False
        reply = await asyncio.wait_for(renewed, SOON_S)
        assert msgspec.msgpack.decode(reply.body) == [lease]


async def test_a_leader_whose_session_was_not_fixed_after_all_opens_another(here, monkeypatch):
    """What it learns there is another leader's: what earlier ones proposed is not void yet."""
    await here.start()
    leader = await here.leader()
    held = []
    real = leader._transport.send

    def send(to, message):
        opens = isinstance(message, Accept) and any(LEADER in each for each in message.values)
        if opens and message.first == leader._lease_session and not held:
            held.append(message.first)
        if not opens or message.first not in held:
            real(to, message)

    monkeypatch.setattr(leader._transport, "send", send)
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        grant = encode_command(LeaseGrant(60_000))
        lease = (await client.ask(lambda i: Submit(i, Kind.COMMAND, session, 1, 1, grant))).slot
        renewed = client.begin(lambda i: Renew(i, (lease,)))
        await leader.until(lambda: bool(held), SOON_S)
        state, (lost,) = leader.state, held
        assert state.fixed == lost - 1
        other = encode_value(Value(Kind.NOOP, Ballot(0, 0, 1)))
        leader.inject(Learn(leader.config.voters[0], lost, state.chain, (other,), lost))
        await leader.until(lambda: leader.replica.applied >= lost, SOON_S)
        tick = leader.state.tick
        await leader.until(lambda: leader.state.tick > tick + 1, SOON_S)
        assert leader._lease_session > lost
        reply = await asyncio.wait_for(renewed, SOON_S)
        assert msgspec.msgpack.decode(reply.body) == [lease]
        sessions = leader.replica.sessions.open.items()
        ours = [name for name, each in sessions if each.owner == LEADER]
        assert ours == [leader._lease_session]


async def test_a_cluster_file_with_other_voters_than_slot_1_names_is_refused(tmp_path):
    """Two of three are no quorum of the five that formed the cluster: both halves would commit."""
    with some_cluster(5) as cluster:
        async with Here(cluster, tmp_path) as voters:
            await voters.start()
            await voters.leader()
            await voters.until(lambda: all(v.state.fixed for v in voters.running.values()))
            for voter in cluster.voter_ids:
                await voters.stop(voter)
            fewer = msgspec.structs.replace(cluster, voters=cluster.voters[:3])
            with pytest.raises(StartError, match=r"formed by voters \[1, 2, 3, 4, 5\]"):
                async with server.open_voter(
                    fewer, 1, voters.path(1), credentials=folder(cluster, "voter-1")
                ):
                    pass
            await voters.start()  # the file put right, nothing is lost
            await voters.leader()


async def test_the_largest_command_commits_and_a_larger_one_is_refused_in_words(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        overhead = len(encode_command(ConfigPut("k", "x" * 70_000))) - 70_000
        largest = COMMAND_BYTES_MAX - overhead
        refused = await client.put(session, 1, "k", "x" * (largest + 1))
        assert (refused.reason, str(COMMAND_BYTES_MAX) in refused.detail) == (4, True)
        committed = await client.put(session, 1, "k", "x" * largest)
        assert (type(committed), committed.status) == (Outcome, OutcomeStatus.APPLIED)
        assert (await client.put(session, 2)).status == OutcomeStatus.APPLIED
    applied = leader.state.fixed
    await here.until(lambda: all(v.replica.applied >= applied for v in here.running.values()))


async def test_a_command_of_a_newer_level_is_refused_and_never_proposed(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        fixed = leader.state.fixed
        newer = bytes((0xC1, LEVEL + 1)) + b"whatever"
        asked = await answered_or_proposed(
            client, leader, lambda i: Submit(i, Kind.COMMAND, session, 1, 1, newer)
        )
        assert asked.done(), "proposed: every replica will stop at it"
        reply = asked.result()
        assert (reply.reason, "too old" in reply.detail) == (RefusalReason.MALFORMED, True)
        assert leader.state.fixed == fixed
        assert (await client.put(session, 1)).status == OutcomeStatus.APPLIED


async def test_a_kind_that_no_client_may_submit_is_refused(here):
    await here.start()
    leader = await here.leader()
    async with Asker(here.cluster, leader.config.voter) as client:
        for kind in (Kind.NOOP, Kind.GENESIS, Kind.ENGINE, 99):
            reply = await client.ask(lambda i, k=kind: Submit(i, k, 0, 0, 0, b""))
            assert (reply.reason, str(kind) in reply.detail) == (RefusalReason.MALFORMED, True)


async def test_status_tells_what_the_voter_thinks(here):
    await here.start()
    leader = await here.leader()
    await leader.until(lambda: len(leader.state.role.acks) == 2, SOON_S)
    async with Asker(here.cluster, leader.config.voter) as client:
        status = await client.ask(StatusRequest)
    assert isinstance(status, Status)
    assert (status.role, status.leader) == ("leader", leader.config.voter)
    assert status.ballot == leader.state.leader
    assert status.fixed == status.applied >= 1
    assert status.boot == 1
    assert status.incarnation == leader.identity.incarnation
    assert status.journal_bytes > 0
    assert status.free_bytes > 0
    assert status.fsync_p50_us > 0
    assert sorted(peer.voter for peer in status.peers) == sorted(
        v for v in here.cluster.voter_ids if v != leader.config.voter
    )
    assert all(0 <= peer.heard_ms < SOON_S * 1000 for peer in status.peers)


class Overheard:
    """The stream as whoever joined the group hears it: the newest tip of each voter."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.tips = {}
        self.count = Counter()
        self._sock = multicast_receiver(cluster.stream, cluster.stream.port, 1 << 20)
        self._heard = asyncio.Event()
        self._opener = stream_opener(cluster)

    def __enter__(self):
        asyncio.get_running_loop().add_reader(self._sock, self._read)
        return self

    def __exit__(self, *exc):
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def _read(self):
        held = self._opener.open(self._sock.recv(2048))
        message = decode_stream(held.body)
        if isinstance(message, StreamTip):
            self.tips[held.sender] = message
            self.count[held.sender] += 1
            self._heard.set()

    async def until(self, holds):
        async with asyncio.timeout(SOON_S):
            while not holds(self.tips):
                self._heard.clear()
                await self._heard.wait()

    async def next_tip(self, voter, holds=lambda _: True):
        del self.tips[voter]
        await self.until(lambda tips: voter in tips and holds(tips[voter].digest))
        return self.tips[voter].digest


def say(cluster, *messages):
    """Multicast on the repair group, as listeners do."""
    identity = Identity(cluster.cluster_id_bytes)
    with multicast_sender(cluster.stream) as sock:
        for message in messages:
            (data,) = on_stream(cluster, identity, encode_body(message))
            sock.sendto(data, (cluster.stream.group, cluster.stream.repair_port))


def report(name, instance=1, *, leaving=False):
    return ListenerReport(
        name, instance, 5, -1, 9, BEHIND_MS, True, 0, 0, 0, 0, 1, "1", leaving=leaving
    )


async def test_tips_tell_how_each_voter_is(here):
    with Overheard(here.cluster) as stream:
        await here.start()
        leader = await here.leader()
        me = leader.config.voter
        async with Asker(here.cluster, me) as client:
            session = await client.open_session()
            for sequence in range(1, 21):
                await client.put(session, sequence)
            status = await client.ask(StatusRequest)
        await here.until(lambda: len({v.state.fixed for v in here.running.values()}) == 1)
        await stream.until(lambda tips: len(tips) == 3)
        told = await stream.next_tip(me, lambda d: d.commit_p50_us and d.fsync_p50_us)
        others = [await stream.next_tip(v) for v in here.cluster.voter_ids if v != me]
    now_ms = time.time() * 1000
    assert told.proposed == told.fixed == leader.state.fixed
    assert 0 <= told.quorum_age_ms < leader.config.election_ticks_max * 10
    assert 0 < told.commit_p50_us <= told.commit_p99_us < SOON_S * 1e6
    assert 0 < told.fsync_p50_us <= told.fsync_p99_us < SOON_S * 1e6
    assert len(told.heard_ms) == 3
    for digest in (told, *others):
        assert digest.boot == 1
        assert digest.has_room
        assert now_ms - SOON_S * 1000 < digest.time_ms <= now_ms
        assert digest.uptime_s <= SOON_S
        assert all(-1 <= heard < SOON_S * 1000 for heard in digest.heard_ms)
        assert digest.heard_ms[me - 1] >= 0
        assert digest.transitions[0].why == "started"
    assert told.heard_ms[me - 1] == 0
    assert min(told.heard_ms) == 0, "a leader heard its followers"
    assert {(d.proposed, d.commit_p50_us) for d in others} == {(0, 0)}
    assert all(0 <= d.quorum_age_ms < SOON_S * 1000 for d in others)
    assert now_ms - SOON_S * 1000 < status.time_ms <= now_ms


async def test_who_follows_nobody_knows_no_quorum(here):
    with Overheard(here.cluster) as stream:
        await here.start(1)
        await stream.until(lambda tips: 1 in tips and tips[1].digest.role == "polling")
        digest = stream.tips[1].digest
    assert digest.quorum_age_ms == -1
    assert digest.heard_ms == (0, -1, -1)
    assert [(t.number, t.role, t.leader) for t in digest.transitions] == [
        (1, "follower", 0),
        (2, "polling", 0),
    ]


async def test_a_voter_that_comes_to_lead_tells_how(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with some_cluster(1) as cluster, Overheard(cluster) as stream:
        async with Here(cluster, tmp_path) as voters:
            await voters.start()
            ballot = (await voters.leader()).state.leader
            await stream.until(lambda tips: 1 in tips and tips[1].digest.role == "leader")
            told = stream.tips[1].digest.transitions
    assert [(t.number, t.role, t.ballot, t.leader) for t in told] == [
        (1, "follower", NO_BALLOT, 0),
        (2, "candidate", ballot, 0),
        (3, "leader", ballot, 1),
    ]
    assert [t.why for t in told][::2] == ["started", "a quorum promised"]
    ages = [t.age_ms for t in told]
    assert ages == sorted(ages, reverse=True)
    logged = [
        (fields_of(record)["role"], fields_of(record)["why"])
        for record in caplog.records
        if record.getMessage() == "voter.role.changed"
    ]
    assert logged == [(t.role, t.why) for t in told[1:]], "the log says the same"


async def test_no_change_is_lost_though_several_come_in_one_turn_and_the_newest_are_told(here):
    with Overheard(here.cluster) as stream:
        await here.start(1)
        voter = here.running[1]
        state = voter.state
        for beat in range(1, 11):
            leader = 2 + beat % 2
            ballot = Ballot(0, 1000 + beat, leader)
            tip = Tip(state.fixed, state.chain, state.fixed + 1)
            voter.inject(Receive(leader, 7 * leader, 1, Heartbeat(ballot, beat, tip, 0)))
        await stream.until(
            lambda tips: (
                1 in tips and any(t.ballot.round == 1010 for t in tips[1].digest.transitions)
            )
        )
        told = stream.tips[1].digest.transitions
    followed = [t for t in told if t.ballot.round > 1000]
    assert [t.ballot.round for t in followed] == list(range(1011 - len(followed), 1011))
    assert len(followed) >= server.TRANSITIONS_TOLD - 1
    assert [t.leader for t in followed] == [t.ballot.voter for t in followed]
    assert {t.why for t in followed} == {"voter 2 leads", "voter 3 leads"}
    assert len({t.age_ms for t in followed}) == 1


async def test_a_changed_role_is_told_at_once_and_seldom(here, monkeypatch):
    """All other tips are put off for ever: what is heard is told because of the change."""
    monkeypatch.setattr(server, "VOTER_TIP_MS", 10**9)
    monkeypatch.setattr(server, "LEADER_TIP_MS", 10**9)
    monkeypatch.setattr(server, "QUIET_TICKS", 10**9)
    with Overheard(here.cluster) as stream:
        await here.start()
        first = await here.leader()
        await stream.until(
            lambda tips: (
                sorted(t.digest.role for t in tips.values()) == ["follower", "follower", "leader"]
                and all(
                    t.digest.transitions[-1].leader == first.config.voter for t in tips.values()
                )
            )
        )
        changes = {v: tip.digest.transitions[-1].number for v, tip in stream.tips.items()}
        assert all(stream.count[v] <= number + 1 for v, number in changes.items())
        await here.stop(first.config.voter)
        await stream.until(
            lambda tips: any(
                t.digest.role == "leader" for v, t in tips.items() if v != first.config.voter
            )
        )


async def test_each_voter_tells_of_the_listeners_it_hears(here):
    with Overheard(here.cluster) as stream:
        await here.start()
        await here.leader()
        await stream.until(lambda tips: len(tips) == 3)
        say(here.cluster, report("a"), report("b"))
        await stream.until(
            lambda tips: all(
                (t.digest.listeners.known, t.digest.listeners.lag_max) == (2, 4)
                for t in tips.values()
            )
        )
        for tip in stream.tips.values():
            listeners = tip.digest.listeners
            assert sorted(row.report.name for row in listeners.rows) == ["a", "b"]
            assert (listeners.behind, listeners.silent) == (2, 0)
        say(here.cluster, report("a", leaving=True))
        await stream.until(lambda tips: all(t.digest.listeners.known == 1 for t in tips.values()))


async def test_a_flood_of_reports_is_heard_in_part_and_stops_no_write(here):
    await here.start()
    leader = await here.leader()
    started_s = time.monotonic()
    async with Asker(here.cluster, leader.config.voter) as client:
        session = await client.open_session()
        for sequence in range(1, 41):
            say(here.cluster, *(report("a", 100 * sequence + index) for index in range(100)))
            assert (await client.put(session, sequence)).status == OutcomeStatus.APPLIED
    seconds = int(time.monotonic() - started_s) + 2
    for voter in here.running.values():
        known = voter._roster.size(int(asyncio.get_running_loop().time() * 1000))
        assert 0 < known <= seconds * server.REPORTS_HEARD_PER_S
        assert voter.counters["report.too_many"] > 0


def test_percentiles_weigh_each_sample():
    assert percentiles_us([]) == (0, 0)
    assert percentiles_us([(7, 1)]) == (7, 7)
    assert percentiles_us([(10, 98), (500, 1), (3, 1)]) == (10, 500)
    assert percentiles_us([(1, 1), (9, 3)]) == (9, 9)


async def test_full_disks_refuse_proposals_and_room_lets_them_pass(here, monkeypatch):
    """A leader whose disk is full hands over to one that has room, so it may move meanwhile."""
    free = {"bytes": 0}
    moved = {RefusalReason.NOT_LEADER, RefusalReason.LEADERSHIP_LOST}

    async def put_somewhere(client_session: int | None) -> Outcome | Refusal:
        while True:
            leader = await here.leader()
            async with Asker(here.cluster, leader.config.voter) as client:
                session = client_session
                if session is None:
                    opened = await client.ask(opening)
                    if isinstance(opened, Refusal) and opened.reason in moved:
                        continue
                    session = opened.slot
                held = leader.state.last_accepted
                write = await answered_or_proposed(client, leader, put(session, 1))
                full = not free["bytes"]
                assert not full or leader.state.last_accepted == held, "proposed without room"
                reply = await asyncio.wait_for(write, SOON_S)
                if not isinstance(reply, Refusal) or reply.reason not in moved:
                    return reply

    await here.start()
    await here.leader()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "free_bytes", lambda _: free["bytes"])
        await here.until(lambda: not any(v.state.has_room for v in here.running.values()))
        reply = await put_somewhere(1)
        assert (reply.reason, "disk" in reply.detail) == (RefusalReason.DISK_FULL, True)
        free["bytes"] = 1 << 40
        await here.until(lambda: all(v.state.has_room for v in here.running.values()))
        await here.until(
            lambda: any(
                isinstance(v.state.role, Leader)
                and len(v.state.role.acks) == len(here.running) - 1
                and all(ack.has_room for ack in v.state.role.acks)
                for v in here.running.values()
            )
        )
        assert (await put_somewhere(None)).status == 0


async def test_a_broken_invariant_ends_the_voter_before_anything_leaves(here, monkeypatch):
    await here.start()
    leader = await here.leader()
    sent = []

    def broken(config, *_):
        if config.voter == leader.config.voter:
            raise InvariantViolation("I99: planted")

    monkeypatch.setattr(server, "check_step", broken)
    monkeypatch.setattr(leader._transport, "send", lambda _, message: sent.append(message))
    tick = leader.state.tick
    with pytest.raises(VoterFailedError, match="I99: planted"):
        await leader.until(lambda: leader.state.tick > tick + 9, SOON_S)
    assert sent == []
    monkeypatch.undo()
    with pytest.raises(VoterFailedError, match="I99: planted"):
        await here.stop(leader.config.voter)


async def test_a_rolled_back_disk_stops_with_the_reason(here):
    """The journal is put back to what it was two boots ago: peers know a higher boot number."""
    await here.start()
    leader = await here.leader()
    other = next(v for v in here.cluster.voter_ids if v != leader.config.voter)
    await here.stop(other)
    saved = here.directory / "saved"
    shutil.copytree(here.path(other), saved)
    for boot in (2, 3):
        await here.start(other)
        await here.until(lambda n=boot: (other, n) in leader.state.boots)
        await here.stop(other)
    shutil.rmtree(here.path(other))
    shutil.move(saved, here.path(other))
    await here.start(other)
    for stopped in (here.running[other].until(lambda: False, SOON_S), here.stop(other)):
        with pytest.raises(VoterFailedError, match="rolled back"):
            await stopped
    for _ in range(3):  # each start would raise its boot number, until it were let in
        with pytest.raises(JournalError, match="told to stop for good"):
            await here.start(other)


async def test_a_voter_formatted_again_is_told_to_stop(here):
    await here.start()
    leader = await here.leader()
    other = next(v for v in here.cluster.voter_ids if v != leader.config.voter)
    await here.stop(other)
    shutil.rmtree(here.path(other))
    server.format_voter(here.cluster, other, here.path(other))
    await here.start(other)
    with pytest.raises(VoterFailedError, match="formatted again"):
        await here.running[other].until(lambda: False, SOON_S)
    with pytest.raises(VoterFailedError, match="formatted again"):
        await here.stop(other)


async def test_a_missing_journal_and_one_in_use_are_refused(here):
    with pytest.raises(JournalError), some_cluster() as stranger:
        async with server.open_voter(
            stranger, 1, here.directory / "nothing", credentials=folder(stranger, "voter-1")
        ):
            pass
    await here.start(1)
    with pytest.raises(JournalError, match=r"in use|another"):
        async with server.open_voter(
            here.cluster, 1, here.path(1), credentials=folder(here.cluster, "voter-1")
        ):
            pass


@pytest.mark.parametrize("key", ["peer_port", "client_port", "archive_port"])
async def test_a_port_in_use_is_named_with_its_key(here, key):
    port = getattr(here.cluster.voter(1), key)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(StartError, match=rf"{key} of voter 1 = {port}: .* in use"):
            await here.start(1)
    await here.start(1)


def test_the_difference_of_two_states_has_a_reason():
    from trex_core.state import Polling, first_state

    calm = first_state(bytes(16))
    assert difference(calm, msgspec.structs.replace(calm, tick=5)) is None
    led = msgspec.structs.replace(calm, leader=Ballot(0, 3, 2))
    assert difference(calm, led).why == "voter 2 leads"
    polling = msgspec.structs.replace(calm, role=Polling(1, (), calm.promised))
    told = difference(led, polling)
    assert (told.role, told.was) == ("polling", "follower")
    assert "no leader heard" in told.why
