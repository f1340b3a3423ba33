"""Seen from the kernel: a vote leaves a voter only after the disk has what it says."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from tests.e2e.harness import Child, LocalCluster, config_of, put
from trex_core.messages import Accepted, Ballot, Prepare, Promise, SealTold
from trex_core.seal import PeerOpener
from trex_core.state import AcceptRecord, PromiseRecord, Record
from trex_core.wire import (
    HEADER_BYTES,
    Channel,
    Identity,
    body_bytes,
    decode_link,
    decode_peer,
    unframe,
)
from voters.credentials import Credentials
from voters.driver import open_driver

GUARD_BYTES = 4
"""Before and after the entry in a journal frame: see the format in ``voters.journal``."""
BATCH = 2
CALL = re.compile(r"^(\d+) +(\w+)\((\d+)")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>")
RESULT = re.compile(r"= (-?\d+)\b[^=]*$")
BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def data_of(line: str) -> bytes:
    found = BYTES.search(line)
    return bytes.fromhex(found.group(1).replace("\\x", "")) if found else b""


def records_in(data: bytes, cluster_id: bytes) -> list[Record]:
    """The records of the batches in one write of the journal."""
    found: list[Record] = []
    while data:
        size = HEADER_BYTES + body_bytes(data, cluster_id)
        body = unframe(data[:size], cluster_id, Channel.JOURNAL).body[GUARD_BYTES:-1]
        entry = msgspec.msgpack.decode(body)
        if entry[0] == BATCH:
            found += msgspec.convert(entry[2], list[Record])
        data = data[size:]
    return found


class Disk:
    """What the kernel told the process is on its disk: promises, and (slot, ballot) accepted."""

    def __init__(self, cluster_id: bytes) -> None:
        self.cluster_id = cluster_id
        self.written: list[tuple[int, Record]] = []
        self.promised: set[Ballot] = set()
        self.accepted: set[tuple[int, Ballot]] = set()

    def sync(self, descriptor: int, count: int) -> None:
        """The first ``count`` records written to ``descriptor`` are durable."""
        for _, record in [each for each in self.written if each[0] == descriptor][:count]:
            match record:
                case PromiseRecord(ballot=ballot):
                    self.promised.add(ballot)
                case AcceptRecord(ballot=ballot, first=first, values=values):
                    slots = range(first, first + len(values))
                    self.accepted |= {(slot, ballot) for slot in slots}
                case _:
                    pass

    def check(self, vote: object) -> bool:
        """Whether all that ``vote`` says is durable; what is no vote says nothing."""
        match vote:
            case Prepare(ballot=ballot) | Promise(ballot=ballot):
                return ballot in self.promised
            case Accepted(ballot=ballot, first=first, last=last):
                return {(slot, ballot) for slot in range(first, last + 1)} <= self.accepted
            case _:
                return True


async def told_by(voter: int, cluster: LocalCluster, listening: int) -> PeerOpener:
    """Stand where voter ``listening`` was killed, with its certificate, until ``voter`` connects
    and tells what it seals its datagrams with. What was overheard can then be opened."""
    config = config_of(cluster)
    cluster_id = config.cluster_id_bytes
    held = Credentials(cluster.credentials(f"voter-{listening}"), cluster_id)
    heard: asyncio.Future[PeerOpener] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header = await reader.readexactly(HEADER_BYTES)
        data = header + await reader.readexactly(body_bytes(header, cluster_id))
        found = unframe(data, cluster_id, Channel.PEER)
        told = decode_link(found.body)
        if found.sender == voter and isinstance(told, SealTold) and not heard.done():
            ring = held.keys.voter
            assert ring is not None
            opener = PeerOpener(cluster_id, ring)
            who = Identity(cluster_id, found.sender, found.incarnation, found.boot)
            opener.told(who, told.epoch, told.secret, 1)
            heard.set_result(opener)
        writer.close()

    entry = config.voter(listening)
    server = await asyncio.start_server(serve, entry.host, entry.peer_port, ssl=held.server)
    async with server, asyncio.timeout(20):
        return await heard


def checked_votes(trace: Path, cluster_id: bytes, opener: PeerOpener) -> Counter[str]:
    """Go through the trace in the kernel's order and check each vote as it enters ``sendto``."""
    disk = Disk(cluster_id)
    votes: Counter[str] = Counter()
    opened: dict[bytes, object] = {}
    open_calls: dict[str, tuple[int, bytes, int]] = {}

    def returned(name: str, call: tuple[int, bytes, int], line: str) -> None:
        descriptor, data, count = call
        result = RESULT.search(line)
        if result is None:
            return  # killed inside the call
        if name == "pwrite64" and data[3:4] == bytes([Channel.JOURNAL]):
            assert int(result.group(1)) == len(data)
            disk.written += [(descriptor, record) for record in records_in(data, cluster_id)]
        if name == "fdatasync":
            assert int(result.group(1)) == 0
            disk.sync(descriptor, count)

    for line in trace.read_text().splitlines():
        if entered := CALL.match(line):
            thread, name, descriptor = entered.group(1), entered.group(2), int(entered.group(3))
            data = data_of(line)
            count = sum(1 for each in disk.written if each[0] == descriptor)
            if name == "sendto" and data[3:4] == bytes([Channel.PEER]):
                if data not in opened:  # one datagram may go to several peers
                    opened[data] = decode_peer(opener.open(data).body)
                vote = opened[data]
                assert disk.check(vote), f"{vote} left before its record was synced"
                votes[type(vote).__name__] += 1
                if isinstance(vote, Accepted):
                    votes["slots accepted"] += vote.last - vote.first + 1
            if line.endswith("<unfinished ...>"):
                open_calls[thread] = (descriptor, data, count)
            else:
                returned(name, (descriptor, data, count), line)
        elif back := RESUMED.match(line):
            returned(back.group(2), open_calls.pop(back.group(1)), line)
    return votes


async def test_every_vote_of_a_real_voter_leaves_after_its_fdatasync_returned(tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    traced = 1
    with LocalCluster(tmp_path, 3, journal={"segment_bytes": 1 << 18}) as cluster:
        config = config_of(cluster)
        voter = cluster.start_voter(traced)
        voter.wait_for_line("voter.ready", 30)
        tracer = Child(
            "strace",
            [strace, "-f", "-xx", "-s", "2000000", "-o", tmp_path / "trace",
             "-e", "trace=pwrite64,fdatasync,sendto", "-p", str(voter.pid)],
            tmp_path / "strace.log", {},
        )  # fmt: skip
        try:
            tracer.wait_for_line("attached", 20)
        except ChildProcessError as error:
            if "Operation not permitted" in str(error):
                pytest.skip(f"strace is not permitted here: {error}")
            raise
        cluster.start_voters()  # the first election needs the traced one: it is seen from the start
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            # The third voter stands still while another leads: no write without the traced vote.
            await driver.hand_over(2)  # so that the traced one promises and accepts
            cluster.voter(3).pause()
            for count in range(30):
                await put(driver, f"one/{count}", "value")
            cluster.voter(3).resume()
            await driver.hand_over(traced)  # so that it stands, prepares and proposes
            for count in range(30):
                await put(driver, f"two/{count}", "value " * 100)
            await driver.hand_over(3)
            cluster.voter(2).pause()
            for count in range(30):
                await put(driver, f"three/{count}", "value " * 100)
            cluster.voter(2).resume()
        cluster.voter(3).kill()
        opener = await told_by(traced, cluster, 3)
        voter.kill()
        tracer.wait(20)
    votes = checked_votes(tmp_path / "trace", config.cluster_id_bytes, opener)
    print(dict(votes))
    assert votes["slots accepted"] >= 60, "a vote may cover several slots"
    assert votes["Promise"] >= 2
    assert votes["Prepare"] >= 1
