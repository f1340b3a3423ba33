"""The archive over real sockets, reading a real journal while it is written."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.credentials import folder, issue, papers
from tests.voters.test_journal import BALLOT, CLUSTER, SEGMENT_BYTES, VOTER, Writer, value
from trex_core.access import Grant, voter_name
from trex_core.cluster import ClusterConfig, StreamConfig, VoterEntry
from trex_core.messages import (
    RUN_SLOTS_MAX,
    AskOther,
    Ballot,
    CatchupEntries,
    CatchupMessage,
    CatchupRequest,
    Genesis,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
)
from trex_core.seal import Signer, Verifier
from trex_core.sessions import NO_SESSIONS
from trex_core.snapshot import encode_snapshot
from trex_core.state import (
    AcceptRecord,
    CatchUpFailed,
    FixedRecord,
    InstallRecord,
    Learn,
    LearnedRecord,
    PromiseRecord,
    State,
    chain_run,
    chain_start,
)
from trex_core.wire import (
    HEADER_BYTES,
    Channel,
    FrameError,
    Identity,
    body_bytes,
    decode_catchup,
    encode_body,
    frame,
    unframe,
)
from voters import archive as archive_module
from voters.archive import Archive, ArchiveServer
from voters.catchup import CatchUpClient
from voters.config import StartError, VoterPaths
from voters.credentials import other_end
from voters.journal import Journal, format_journal, segment_name
from voters.snapshots import Snapshots

WHO = Identity(CLUSTER)
CONFIG = ClusterConfig(
    name="test",
    cluster_id=CLUSTER.hex(),
    voters=tuple(VoterEntry(n, "127.0.0.1", n, 10 + n, 20 + n, ".") for n in (1, 2, 3)),
    stream=StreamConfig("239.255.9.9", 4000),
)
GENESIS = Genesis((1, 2, 3), (7, 8, 9))
HELD = papers(CONFIG, voter_name(VOTER))
SIGNER = Signer(HELD.keys.signing, CLUSTER, VOTER)
VERIFIER = Verifier(HELD.keys.public, CLUSTER)


class Voter:
    """A voter's directory and its writer; remembers what was fixed."""

    def __init__(self, base: Path) -> None:
        self.paths = VoterPaths(base, base / "journal", base / "snapshots")
        format_journal(self.paths.journal, CLUSTER, VOTER)
        self.snapshots = Snapshots(self.paths.snapshots)
        journal = Journal.open(
            self.paths.journal, CLUSTER, VOTER, segment_bytes=SEGMENT_BYTES, retain_bytes=0
        )
        self.writer = Writer(journal)
        self.values: dict[int, bytes] = {}
        self.chains: dict[int, bytes] = {0: chain_start(CLUSTER)}

    @property
    def tip(self) -> int:
        return self.writer.state.fixed

    def fix(self, slots: int = 1, size: int = 20) -> None:
        records = self.writer.records(slots, size)
        accept = records[0]
        assert isinstance(accept, AcceptRecord)
        self.note(accept.first, accept.values)
        self.writer.commit(*records)

    def note(self, first: int, values: tuple[bytes, ...]) -> None:
        chains = chain_run(self.chains[first - 1], first, values)
        for slot, (held, chain) in enumerate(zip(values, chains, strict=True), first):
            self.values[slot], self.chains[slot] = held, chain

    def fix_segments(self, segments: int, size: int = 400) -> None:
        while self.writer.journal.segments < segments:
            self.fix(random.Random(self.tip).randint(1, 30), size)

    def snapshot(self, slot: int, size: int = 600_000) -> bytes:
        pieces = encode_snapshot(slot, self.chains[slot], GENESIS, NO_SESSIONS, [b"s" * size])
        data = b"".join(pieces)
        self.snapshots.save(slot, [data])
        return data

    async def delete_below(self, slot: int) -> None:
        journal, done = self.writer.journal, asyncio.Event()
        loop = asyncio.get_running_loop()
        before = journal.segments
        journal.delete_below(slot)

        def deleted() -> None:
            loop.call_soon_threadsafe(done.set)

        journal._chores.put(deleted)
        await done.wait()
        assert journal.segments < before

    def close(self) -> None:
        self.writer.journal.close()


class Follower:
    """One connection to an archive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, message: CatchupMessage) -> CatchupMessage:
        self.writer.write(frame(WHO, Channel.CATCHUP, encode_body(message)))
        return await self.receive()

    async def receive(self) -> CatchupMessage:
        async with asyncio.timeout(20):
            header = await self.reader.readexactly(HEADER_BYTES)
            body = await self.reader.readexactly(body_bytes(header, CLUSTER))
        found = unframe(header + body, CLUSTER, Channel.CATCHUP)
        assert found.sender == VOTER
        return decode_catchup(found.body)

    async def entries(self, first: int, bytes_max: int = 1 << 20) -> CatchupEntries:
        answer = await self.ask(CatchupRequest("test", first, bytes_max))
        assert isinstance(answer, CatchupEntries), answer
        assert answer.first == first
        return answer

    async def follow(self, voter: Voter, first: int, bytes_max: int = 1 << 20) -> int:
        """Fetch all from ``first`` to the tip, comparing with what was fixed; chunks needed."""
        chunks = 0
        while True:
            answer = await self.entries(first, bytes_max)
            last = first + len(answer.values) - 1
            assert answer.end.slot == (last if answer.values else answer.tip.slot)
            assert answer.tip.chain == voter.chains[answer.tip.slot]
            assert answer.end.chain == voter.chains[answer.end.slot]
            for tip in (answer.end, answer.tip):
                assert tip.voter == VOTER
                assert VERIFIER.tip(VOTER, tip.ballot, tip.slot, tip.chain, tip.signature)
            if not answer.values:
                assert first == answer.tip.slot + 1
                return chunks
            chunks += 1
            assert answer.chain_before == voter.chains[first - 1]
            for slot, held in enumerate(answer.values, first):
                assert held == voter.values[slot], f"slot {slot}"
            first += len(answer.values)

    async def closed(self) -> bool:
        async with asyncio.timeout(20):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


def linked(
    port: int, name: str = "listener"
) -> Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return asyncio.open_connection("127.0.0.1", port, ssl=papers(CONFIG, name).client)


class Scene:
    def __init__(self, voter: Voter, server: ArchiveServer, port: int) -> None:
        self.voter, self.server, self.port = voter, server, port

    async def follower(self, name: str = "listener") -> Follower:
        follower = Follower(*await linked(self.port, name))
        self.followers.append(follower)
        return follower

    followers: list[Follower]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def scene(base: Path, **options: int) -> AsyncIterator[Scene]:
    voter = Voter(base)
    server = ArchiveServer(Archive(voter.paths, CLUSTER, SIGNER, **options), CLUSTER, HELD)
    port = free_port()
    await server.listen("127.0.0.1", port)
    stage = Scene(voter, server, port)
    stage.followers = []
    try:
        yield stage
    finally:
        for follower in stage.followers:
            follower.writer.transport.abort()
        await server.aclose()
        voter.close()


def play(story: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await story

    asyncio.run(limited())


# --- entries --------------------------------------------------------------------------------


def test_follows_a_journal_that_is_being_written(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            empty = await follower.entries(1)
            assert (empty.values, empty.tip.slot) == ((), 0)
            first = 1
            for step in range(40):
                voter.fix(1 + step % 7, 30 + 97 * (step % 5))
                await follower.follow(voter, first)
                first = voter.tip + 1
            assert voter.writer.journal.segments >= 2
            beyond = await follower.entries(voter.tip + 50)
            assert (beyond.values, beyond.tip.slot) == ((), voter.tip)

    play(story())


def test_only_what_is_fixed_is_served(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix(3)
            old = value(1000)
            voter.writer.commit(AcceptRecord(BALLOT, 4, (old, old, old)))
            assert len((await follower.entries(1)).values) == 3
            assert (await follower.entries(4)).values == ()
            # Another leader overwrites slots 4 and 5; only then are they fixed.
            new = (value(2000), value(2001))
            voter.note(4, new)
            voter.writer.commit(AcceptRecord(BALLOT, 4, new), FixedRecord(4, voter.chains[4]))
            assert (await follower.entries(4)).values == new[:1]
            voter.writer.commit(PromiseRecord(BALLOT), FixedRecord(5, voter.chains[5]))
            learned = (value(3000),)
            voter.note(6, learned)
            voter.writer.commit(LearnedRecord(6, learned, voter.chains[6]))
            await follower.follow(voter, 1)
            assert (await follower.entries(5)).values == (new[1], learned[0])

    play(story())


def test_chunks_are_bounded_and_hold_at_least_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix(RUN_SLOTS_MAX + 100)
            assert len((await follower.entries(1)).values) == RUN_SLOTS_MAX
            for bytes_max in (-5, 0, 1):
                assert len((await follower.entries(7, bytes_max)).values) == 1
            limited = await follower.entries(7, 1000)
            assert sum(map(len, limited.values)) <= 1000
            assert len(limited.values) > 1
            from_the_start = await follower.ask(CatchupRequest("test", -3))
            assert isinstance(from_the_start, CatchupEntries)
            assert from_the_start.first == 1
            voter.fix(3, 900_000)
            large = await follower.entries(voter.tip - 2, 1 << 62)
            assert len(large.values) == 1
            assert await follower.follow(voter, 1) == 4

    play(story())


def test_seeks_anywhere_across_segments(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix_segments(8)
            draw = random.Random(5)
            for _ in range(60):
                first = draw.randint(1, voter.tip)
                answer = await follower.entries(first, draw.choice((1, 5000, 1 << 20)))
                assert answer.chain_before == voter.chains[first - 1]
                last = first + len(answer.values)
                assert answer.values == tuple(voter.values[slot] for slot in range(first, last))
            assert await follower.follow(voter, 1, 20_000) > 5

    play(story())


def test_values_accepted_long_before_they_are_fixed(tmp_path: Path) -> None:
    """The accepts of a slot stand one or more segments before the record that it is fixed."""

    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            for _ in range(14):
                first = voter.tip + 1
                values = tuple(value(slot, 900) for slot in range(first, first + 150))
                voter.note(first, values)
                for at in range(0, 150, 30):
                    accept = AcceptRecord(BALLOT, first + at, values[at : at + 30])
                    voter.writer.commit(accept)
                for last in range(first + 3, first + 150, 7):
                    voter.writer.commit(FixedRecord(last, voter.chains[last]))
                last = first + 149
                voter.writer.commit(FixedRecord(last, voter.chains[last]))
                await follower.follow(voter, first, 5000)
            assert voter.writer.journal.segments > 15
            cold = await stage.follower()
            await cold.follow(voter, 1, 30_000)
            for first in random.Random(2).sample(range(1, voter.tip), 80):
                answer = await cold.entries(first, 2000)
                assert answer.chain_before == voter.chains[first - 1]
                assert answer.values[0] == voter.values[first]
            fresh = Archive(voter.paths, CLUSTER, SIGNER)
            for first in random.Random(3).sample(range(1, voter.tip), 40):
                found, _ = await fresh.answer(CatchupRequest("test", first, 2000), None)
                assert isinstance(found, CatchupEntries), f"slot {first}: {found}"
                assert found.values[0] == voter.values[first]

    play(story())


def test_half_written_entry_is_not_there_yet(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix(2)
            voter.writer.journal.abandon()
            path = voter.paths.journal / segment_name(2)
            whole = path.read_bytes()
            voter.writer = Writer(Journal.open(voter.paths.journal, CLUSTER, VOTER))
            voter.fix(2)
            held = (voter.paths.journal / segment_name(3)).read_bytes()
            end = len(held.rstrip(b"\0"))
            assert len(whole) > end
            for cut in range(1, 60, 7):
                half = held[: end - cut].ljust(len(held), b"\0")
                (voter.paths.journal / segment_name(3)).write_bytes(half)
                answer = await follower.entries(1)
                assert (len(answer.values), answer.tip.slot) == (2, 2)
            (voter.paths.journal / segment_name(3)).write_bytes(held)
            await follower.follow(voter, 3)

    play(story())


# --- snapshots and deletion -----------------------------------------------------------------


async def fetch(follower: Follower, offer: SnapshotOffer) -> bytes:
    data = b""
    while len(data) < offer.size_bytes:
        chunk = await follower.ask(SnapshotRequest(offer.slot, len(data)))
        assert isinstance(chunk, SnapshotChunk)
        assert (chunk.slot, chunk.offset) == (offer.slot, len(data))
        assert chunk.data
        data += chunk.data
    return data


def test_a_snapshot_where_the_log_does_not_reach_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower, slow = stage.voter, await stage.follower(), await stage.follower()
            voter.fix_segments(6)
            await slow.entries(1, 1)
            slot = voter.tip // 2
            data = voter.snapshot(slot)
            await voter.delete_below(slot)
            offer = await follower.ask(CatchupRequest("test", 1))
            assert isinstance(offer, SnapshotOffer)
            digest = hashlib.blake2b(data, digest_size=32).digest()
            assert offer == SIGNER.offer(SnapshotOffer(slot, voter.chains[slot], len(data), digest))
            assert VERIFIER.offer(offer)
            assert await fetch(follower, offer) == data
            end = await follower.ask(SnapshotRequest(slot, len(data)))
            assert end == SnapshotChunk(slot, len(data), b"")
            await follower.follow(voter, slot + 1)
            # One that was in the middle of the deleted log is told the same.
            assert isinstance(await slow.ask(CatchupRequest("slow", 1)), SnapshotOffer)
            # Each slot from the oldest that is left on is served: -1, 0, +1 of the seam.
            for first in (slot, slot + 1, slot + 2):
                answer = await follower.ask(CatchupRequest("test", first))
                if isinstance(answer, SnapshotOffer):
                    assert first <= answer.slot == slot
                else:
                    assert isinstance(answer, CatchupEntries)
                    assert answer.values[0] == voter.values[first]

    play(story())


def test_a_snapshot_is_read_once_however_many_ask_for_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine, reads, go = archive_module._examine, [], threading.Event()

    def slow(path: Path, slot: int) -> SnapshotOffer | None:
        reads.append(slot)
        assert go.wait(20)
        if len(reads) == 1:
            raise OSError(5, "Input/output error")
        return examine(path, slot)

    monkeypatch.setattr(archive_module, "_examine", slow)

    async def story() -> None:
        async with scene(tmp_path, far_behind_slots=10) as stage:
            stage.voter.fix(40)
            stage.voter.snapshot(40)
            followers = [await stage.follower() for _ in range(5)]
            request = CatchupRequest("test", 1)
            # Nobody waits for long, and who gave up leaves the reading to the others.
            monkeypatch.setattr(archive_module, "OFFER_S", 0.05)
            answers = [await follower.ask(request) for follower in followers]
            go.set()
            assert {type(each) for each in answers} == {AskOther}
            assert reads == [40]
            monkeypatch.setattr(archive_module, "OFFER_S", 20.0)
            (reading,) = stage.server.archive._offers.values()
            await asyncio.wait([reading])
            # A disk that failed is tried again, by one of them.
            asked = [asyncio.create_task(follower.ask(request)) for follower in followers]
            offers = await asyncio.gather(*asked)
            assert reads == [40, 40]
            assert {(type(each), each.slot) for each in offers} == {(SnapshotOffer, 40)}

    play(story())


def test_followers_converge_while_segments_come_and_go(tmp_path: Path) -> None:
    """Four followers, one of them cold at each round, while the voter fixes, cuts and deletes."""

    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter = stage.voter
            done = asyncio.Event()
            outcomes: list[str] = []

            async def write() -> None:
                for step in range(120):
                    voter.fix(20, 300)
                    if step % 10 == 9:
                        voter.snapshot(voter.tip, 1000)
                        oldest = voter.snapshots.keep(2)
                        voter.writer.journal.delete_below(oldest)
                    await asyncio.sleep(0)
                done.set()

            async def follow(bytes_max: int) -> None:
                follower, first = await stage.follower(), 1
                while not (done.is_set() and first > voter.tip):
                    answer = await follower.ask(CatchupRequest("test", first, bytes_max))
                    outcomes.append(type(answer).__name__)
                    if isinstance(answer, CatchupEntries):
                        assert answer.chain_before == voter.chains[first - 1] or not answer.values
                        for slot, held in enumerate(answer.values, first):
                            assert held == voter.values[slot]
                        first += len(answer.values)
                    elif isinstance(answer, SnapshotOffer):
                        assert first <= answer.slot
                        assert answer.chain == voter.chains[answer.slot]
                        first = answer.slot + 1

            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                for bytes_max in (1000, 20_000, 200_000, 1 << 20):
                    group.create_task(follow(bytes_max))
            assert voter.writer.journal.segments < 40
            assert {"CatchupEntries", "SnapshotOffer"} <= set(outcomes)
            assert outcomes.count("AskOther") < len(outcomes) / 10

    play(story())


def test_no_snapshot_no_log_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix_segments(6)
            data = voter.snapshot(voter.tip // 2)
            await voter.delete_below(voter.tip // 2)
            path = voter.paths.snapshots / f"{voter.tip // 2:016d}.snapshot"
            path.write_bytes(data[:-50] + b"damaged" + data[-43:])
            answer = await follower.ask(CatchupRequest("test", 1))
            assert isinstance(answer, AskOther)
            assert "reaches slot 1" in answer.reason
            gone = await follower.ask(SnapshotRequest(12345, 0))
            assert isinstance(gone, AskOther)
            assert "12345" in gone.reason

    play(story())


def test_a_snapshot_for_one_that_is_far_behind(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path, far_behind_slots=500) as stage:
            voter, follower = stage.voter, await stage.follower()
            for _ in range(10):
                voter.fix(100)
            await follower.entries(1)
            voter.snapshot(300)
            await follower.entries(1)  # it would not bring the follower near the tip
            voter.snapshot(900)
            offer = await follower.ask(CatchupRequest("test", 1))
            assert isinstance(offer, SnapshotOffer)
            assert offer.slot == 900
            await follower.follow(voter, 501)

    play(story())


def test_a_snapshot_is_offered_only_if_it_reaches_what_is_asked_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path, far_behind_slots=500) as stage:
            voter, follower = stage.voter, await stage.follower()
            for _ in range(10):
                voter.fix(100)
            voter.snapshot(499)
            await follower.entries(1)  # with it the follower would lack more than 500 slots yet
            voter.snapshot(500)
            offer = await follower.ask(CatchupRequest("test", 1))
            assert isinstance(offer, SnapshotOffer)
            assert offer.slot == 500
            archive = Archive(voter.paths, CLUSTER, SIGNER)
            await archive.tip()
            assert await archive._offer(500) == offer
            assert await archive._offer(501) is None, "it holds nothing of slot 501"

    play(story())


def test_a_base_has_every_value_above_it_behind_it(tmp_path: Path) -> None:
    """The next slot's value stands in the segment before the one whose header names the fixed
    slot: replaying must not begin at that header."""

    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter = stage.voter
            voter.fix_segments(3)
            slot = voter.tip + 1
            late = value(slot)
            voter.note(slot, (late,))
            voter.writer.commit(AcceptRecord(BALLOT, slot, (late,)))
            before = voter.writer.journal.segments
            promises = [PromiseRecord(Ballot(0, 2, VOTER))] * (SEGMENT_BYTES // 4)
            voter.writer.commit(*promises)
            assert voter.writer.journal.segments == before + 1
            voter.writer.commit(FixedRecord(slot, voter.chains[slot]))
            for first in (slot - 1, slot):
                fresh = Archive(voter.paths, CLUSTER, SIGNER)
                found, _ = await fresh.answer(CatchupRequest("test", first, 2000), None)
                assert isinstance(found, CatchupEntries), f"slot {first}: {found}"
                assert found.values == tuple(voter.values[n] for n in range(first, slot + 1))

    play(story())


def test_a_hole_left_by_an_installed_snapshot(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix(5)
            voter.chains[50] = bytes(32)
            voter.snapshot(50)
            journal = voter.writer.journal
            journal.append((InstallRecord(50, voter.chains[50], GENESIS),))
            installed = State(BALLOT, 50, voter.chains[50], (), GENESIS)
            journal.submit(installed)
            voter.writer.state = installed
            voter.fix(3)
            assert len((await follower.entries(3)).values) == 3
            offer = await follower.ask(CatchupRequest("test", 6))
            assert isinstance(offer, SnapshotOffer)
            assert offer.slot == 50
            assert len((await follower.entries(51)).values) == 3

    play(story())


# --- damage and strangers -------------------------------------------------------------------


def test_damage_is_told_and_never_served(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix_segments(4)
            path = voter.paths.journal / segment_name(3)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            answers = []
            for first in range(1, voter.tip, 40):
                answer = await follower.ask(CatchupRequest("test", first))
                answers.append(type(answer))
                if isinstance(answer, CatchupEntries):
                    for slot, held in enumerate(answer.values, first):
                        assert held == voter.values[slot]
                else:
                    assert isinstance(answer, AskOther)
                    assert segment_name(3) in answer.reason
            assert set(answers) == {CatchupEntries, AskOther}

    play(story())


def test_damage_is_logged_now_and_then_however_often_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(archive_module, "LOG_S", 3600.0)
    monkeypatch.setattr(archive_module, "log", lambda _level, event, **_fields: told.append(event))

    async def story() -> None:
        async with scene(tmp_path) as stage:
            voter, follower = stage.voter, await stage.follower()
            voter.fix_segments(4)
            path = voter.paths.journal / segment_name(3)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            for _ in range(5):
                answers = [
                    await follower.ask(CatchupRequest("test", first))
                    for first in range(1, voter.tip, 40)
                ]
                assert AskOther in map(type, answers)
        assert told == ["archive.journal.damaged"]

    play(story())


@pytest.mark.parametrize(
    ("data", "counter"),
    [
        (b"GET / HTTP/1.1\r\n" + bytes(100), "garbage.magic"),
        (frame(Identity(bytes(16)), Channel.CATCHUP, b"x"), "garbage.cluster"),
        (frame(WHO, Channel.CLIENT, encode_body(CatchupRequest("x", 1))), "garbage.channel"),
        (frame(WHO, Channel.CATCHUP, b"\xc1" * 9), "garbage.body"),
        (frame(WHO, Channel.CATCHUP, encode_body(AskOther(1, "you"))), "garbage.body"),
        (frame(WHO, Channel.CATCHUP, bytes(5000)), "garbage.length"),
        (frame(WHO, Channel.CATCHUP, encode_body(SnapshotRequest(1, -1))), "garbage.body"),
    ],
)
def test_garbage_closes_its_connection_and_is_counted(
    tmp_path: Path, data: bytes, counter: str
) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            good, bad = await stage.follower(), await stage.follower()
            stage.voter.fix(1)
            bad.writer.write(data)
            assert await bad.closed()
            assert stage.server.counters[counter] == 1
            await good.follow(stage.voter, 1)

    play(story())


def test_random_bytes_never_hurt(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            draw = random.Random(3)
            good = frame(WHO, Channel.CATCHUP, encode_body(CatchupRequest("x", 1)))
            for _ in range(40):
                data = bytearray(good)
                for _ in range(draw.randint(1, 4)):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                follower = await stage.follower()
                follower.writer.write(bytes(data))
                follower.writer.close()
                await follower.closed()
            await (await stage.follower()).entries(1)

    play(story())


def test_strangers_and_idlers_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(archive_module, "IDLE_S", 0.3)

    async def story() -> None:
        async with scene(tmp_path) as stage:
            stage.voter.fix(1)
            stranger, known, second = [await stage.follower() for _ in range(3)]
            await known.entries(1)
            await second.entries(1)
            third = await stage.follower()
            await third.entries(1)
            assert await stranger.closed()
            assert stage.server.counters["stranger"] == 1
            refused = await stage.follower()
            answer = await refused.receive()
            assert isinstance(answer, AskOther)
            assert await refused.closed()
            assert await known.closed(), "idle for longer than IDLE_S"
            await (await stage.follower()).entries(1)

    play(story())


def test_no_certificate_keeps_all_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All listeners share one, whoever stole it too: a voter that is behind must get in."""
    monkeypatch.setattr(archive_module, "CONNECTIONS_MAX", 4)

    async def story() -> None:
        async with scene(tmp_path) as stage:
            stage.voter.fix(1)

            async def asking(name: str) -> Follower:
                follower = await stage.follower(name)
                await follower.entries(1)
                return follower

            flood = [await asking("listener") for _ in range(4)]
            second, third = await asking("voter-2"), await asking("voter-3")
            assert await flood[0].closed() and await flood[1].closed()
            assert stage.server.counters["most_of_one_holder"] == 2
            for name in ("listener", "voter-2", "voter-3"):
                refused = await stage.follower(name)
                assert isinstance(await refused.receive(), AskOther), "it would have the most"
            for each in (*flood[2:], second, third):
                await each.entries(1)

    play(story())


def test_a_slow_reader_is_dropped_and_holds_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "WRITE_S", 0.3)

    async def story() -> None:
        async with scene(tmp_path) as stage:
            stage.voter.fix(1, 1 << 20)
            answers = 0
            archive = stage.server.archive
            answer = archive.answer

            async def counted(*arguments: Any) -> Any:
                nonlocal answers
                answers += 1
                return await answer(*arguments)

            monkeypatch.setattr(archive, "answer", counted)
            dropped = asyncio.Event()
            monkeypatch.setattr(
                archive_module, "log", lambda *_args, **_fields: dropped.set(), raising=True
            )
            slow = await stage.follower()
            request = frame(WHO, Channel.CATCHUP, encode_body(CatchupRequest("slow", 1)))
            for _ in range(100):
                slow.writer.write(request)
            await dropped.wait()
            assert stage.server.counters["too_slow"] == 1
            assert answers < 30, "it must stop answering who does not read"
            await (await stage.follower()).entries(1)

    play(story())


def test_a_voter_learns_nothing_from_who_was_revoked(tmp_path: Path) -> None:
    """Whoever is behind asks all voters in turn, and believes an archive for its certificate."""

    async def story() -> None:
        async with scene(tmp_path) as stage:
            stage.voter.fix(5)
            entries = (
                replace(each, archive_port=stage.port) if each.id == VOTER else each
                for each in CONFIG.voters
            )
            me = next(each for each in CONFIG.voter_ids if each != VOTER)
            heard: asyncio.Queue[object] = asyncio.Queue()
            client = CatchUpClient(
                replace(CONFIG, voters=tuple(entries)),
                Identity(CLUSTER, me, 5, 1),
                papers(CONFIG, voter_name(me)),
                Snapshots(tmp_path / "mine"),
                heard.put_nowait,
                heard.put_nowait,
            )
            running = asyncio.create_task(client.run())
            client.ask(VOTER, 1)
            learned = await heard.get()
            assert isinstance(learned, Learn) and len(learned.values) == 5
            # in the middle of an answer, ...
            answer, asked, go = stage.server.archive.answer, asyncio.Event(), asyncio.Event()

            async def slow(*arguments: Any) -> Any:
                asked.set()
                await go.wait()
                return await answer(*arguments)

            stage.server.archive.answer = slow  # type: ignore[method-assign]
            client.ask(VOTER, 1)
            await asked.wait()
            client.revoke(frozenset({HELD.holder.serial}))
            go.set()
            assert await heard.get() == CatchUpFailed(VOTER)
            # ... and when asked again
            client.ask(VOTER, 1)
            assert await heard.get() == CatchUpFailed(VOTER)
            client.revoke(frozenset())
            client.ask(VOTER, 1)
            assert isinstance(await heard.get(), Learn)
            running.cancel()
            await asyncio.wait([running])

    play(story())


def test_port_in_use(tmp_path: Path) -> None:
    async def story() -> None:
        async with scene(tmp_path) as stage:
            other = ArchiveServer(stage.server.archive, CLUSTER, papers(CONFIG, voter_name(VOTER)))
            with pytest.raises(StartError, match=r"archive_port.*in use"):
                await other.listen("127.0.0.1", stage.port)

    play(story())


# --- the process ----------------------------------------------------------------------------


def cluster_file(base: Path, archive_port: int) -> Path:
    voters = "".join(
        f"""
        [[voters]]
        id = {number}
        host = "127.0.0.1"
        peer_port = {1000 + number}
        client_port = {2000 + number}
        archive_port = {archive_port if number == VOTER else 3000 + number}
        directory = "."
        """
        for number in (1, 2, 3)
    )
    path = base / "cluster.toml"
    path.write_text(
        f'name = "test"\ncluster_id = "{CLUSTER.hex()}"\n{voters}\n'
        '[stream]\ngroup = "239.255.9.9"\nport = 4000\n'
    )
    return path


def start_process(config: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "voters.archive", "--config", config, "--id", str(VOTER)),
            *("--credentials", folder(CONFIG, f"voter-{VOTER}")),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.e2e
def test_the_process_serves_and_ends_with_its_parent(tmp_path: Path) -> None:
    voter = Voter(tmp_path)
    voter.fix(40)
    port = free_port()
    process = start_process(cluster_file(tmp_path, port))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        async def story() -> None:
            follower = Follower(*await linked(port))
            await follower.follow(voter, 1)
            voter.fix_segments(3)
            await follower.follow(voter, 1)
            follower.writer.close()
            await follower.writer.wait_closed()

        play(story())
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        voter.close()


@pytest.mark.e2e
def test_the_process_takes_up_a_renewed_certificate(tmp_path: Path) -> None:
    voter = Voter(tmp_path)
    voter.fix(4)
    port = free_port()
    process = start_process(cluster_file(tmp_path, port))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        async def shown() -> str:
            follower = Follower(*await linked(port))
            await follower.follow(voter, 1)
            serial = other_end(follower.writer.get_extra_info("ssl_object"), CLUSTER).serial
            follower.writer.close()
            await follower.writer.wait_closed()
            return serial

        async def story() -> None:
            before = papers(CONFIG, voter_name(VOTER)).holder.serial
            assert await shown() == before
            issue(CONFIG, Grant(voter_name(VOTER), "voter"))
            while (serial := await shown()) == before:
                await asyncio.sleep(0.1)
            assert serial == papers(CONFIG, voter_name(VOTER)).holder.serial

        play(story())
        _, err = process.communicate(timeout=20)
        assert b"archive.credentials.read" in err
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        voter.close()


@pytest.mark.e2e
def test_the_process_says_why_it_cannot_start(tmp_path: Path) -> None:
    voter = Voter(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start_process(cluster_file(tmp_path, taken.getsockname()[1]))
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, b"")
    assert b"archive_port" in err
    assert b"in use" in err
    assert b"Traceback" not in err
    voter.close()


def test_a_request_of_garbage_is_a_frame_error() -> None:
    with pytest.raises(FrameError):
        decode_catchup(os.urandom(3) + b"\xc1")
