"""Who holds the stream key but is no voter, and who replays what was recorded: nothing comes of it.

Whatever is said here is said by real processes to real processes. How long the attack lasts, in
seconds, is TREX_TEST_ATTACK_S (a longer one is part of ``just soak``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from statistics import median

import anyio
import pytest
from msgspec.structs import replace

from listeners.__main__ import BROKEN, REFUSED
from listeners.sql import query_socket
from tests.e2e.adversary import FORGED_KEY, group_socket, mouth
from tests.e2e.harness import (
    Child,
    Ledger,
    LocalCluster,
    all_config,
    config_of,
    kill_all,
    put,
    write_for_ever,
)
from tests.e2e.tap import Datagram, Replay, Tap, can_tap
from trex_core.access import voter_name
from trex_core.cluster import ClusterConfig
from trex_core.credentials import KEYS_FILE, parse_keys
from trex_core.messages import (
    CHAIN_BYTES,
    DATAGRAM_BYTES_MAX,
    WORDS_BYTES,
    Ballot,
    Status,
    StreamRun,
    StreamTip,
    VoterDigest,
)
from trex_core.seal import SIGNATURE_BYTES, Sealer, Signer, StreamOpener, Verifier
from trex_core.wire import Channel, FrameError, Identity, decode_stream, encode_body
from voters.driver import Driver, open_driver

pytestmark = pytest.mark.anyio

ATTACK_S = float(os.environ.get("TREX_TEST_ATTACK_S", "6"))
ATTACK_PER_S = 1500
REPAIR_BYTES_PER_S = 100_000
WRITERS = 4
LOSS_PERCENT = 5
RSS_GROWTH_MAX = 96 << 20
"""Of a listener under attack: what waits for a proof, what the store holds more, and slack."""


def knob(cluster: LocalCluster, name: str, value: int) -> None:
    """Set a knob that stands in the cluster file as its default, in a comment."""
    text = cluster.config_path.read_text()
    changed, count = re.subn(rf"^# {name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
    assert count == 1
    cluster.config_path.write_text(changed)


def rss_bytes(child: Child) -> int:
    """Its resident memory."""
    status = Path(f"/proc/{child.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def sql(cluster: LocalCluster, name: str, text: str, at_least: int) -> list[tuple]:
    """What a listener's store answers once it is at slot ``at_least``."""
    socket = cluster.directory / name / "sql.sock"
    return query_socket(socket, text, deadline_ms=30_000, at_least_slot=at_least).rows


async def statuses(driver: Driver) -> dict[int, Status]:
    """Each voter's, all of them."""
    found = await driver.statuses()
    assert all(isinstance(each, Status) for each in found.values()), found
    return found


def reigns(found: dict[int, Status]) -> set[tuple]:
    """Who leads under which ballot, and what was promised, as each voter sees it."""
    return {(each.leader, each.ballot, each.promised) for each in found.values()}


async def until_agreed(driver: Driver) -> dict[int, Status]:
    """The statuses, once all voters answer and have fixed the same slots."""
    with anyio.fail_after(40):
        while True:
            found = await driver.statuses()
            if not all(isinstance(each, Status) for each in found.values()):
                continue
            if len({(each.fixed, each.applied, each.chain) for each in found.values()}) == 1:
                return found


def check_same(cluster: LocalCluster, names: list[str], found: dict, at: Status) -> None:
    """Each listener shows exactly ``found`` and the log of voter ``at``, chain for chain."""
    chains = set()
    for name in names:
        rows = sql(cluster, name, "SELECT * FROM config", at.fixed)
        assert {key: (value, slot) for key, value, slot in rows} == found, name
        every = sql(
            cluster,
            name,
            f"SELECT slot, chain FROM commits WHERE slot <= {at.fixed} ORDER BY slot",
            at.fixed,
        )
        assert [slot for slot, _ in every] == list(range(1, at.fixed + 1)), "no gap, no repeat"
        chains.add(tuple(bytes(chain) for _, chain in every))
    assert len(chains) == 1, "the same log everywhere"
    assert chains.pop()[-1] == at.chain


class Meter:
    """Repairs on the wire, by the port they came from."""

    def __init__(self, config: ClusterConfig, folder: Path) -> None:
        ring = parse_keys((folder / KEYS_FILE).read_text()).stream
        assert ring is not None
        self._opener = StreamOpener(config.cluster_id_bytes, ring)
        self._ear = group_socket(config, config.stream.port)
        self.repair_bytes: Counter[int] = Counter()

    def hear(self) -> None:
        for _ in range(256):
            try:
                data, (_, port) = self._ear.recvfrom(DATAGRAM_BYTES_MAX + 1)
                message = decode_stream(self._opener.open(data).body)
            except BlockingIOError:
                return
            except FrameError:
                continue
            if isinstance(message, StreamRun) and message.repair:
                self.repair_bytes[port] += len(data)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Meter]:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._ear, self.hear)
        try:
            yield self
        finally:
            loop.remove_reader(self._ear)
            self._ear.close()


async def line_of(child: Child, pattern: str) -> re.Match[str]:
    return await anyio.to_thread.run_sync(child.wait_for_line, pattern, 40)


async def test_who_stole_the_stream_key_has_nothing_applied_and_nobody_unseated(tmp_path):
    names = ["one", "two", "lossy"]
    with LocalCluster(tmp_path, 3) as cluster:
        knob(cluster, "repair_bytes_per_s_max", REPAIR_BYTES_PER_S)
        cluster.start_voters()
        for name in names:
            cluster.start_listener(name, drop_percent=LOSS_PERCENT * (name == "lossy"))
        for name in names:
            cluster.children[name].wait_for_line("listener.started", 30)
        config, stolen = config_of(cluster), cluster.credentials("listener")
        ledger = Ledger()
        async with open_driver(config, cluster.credentials(), deadline_s=60) as driver:
            await put(driver, "first", "yes")
            async with anyio.create_task_group() as group, Meter(config, stolen).running() as meter:
                for writer in range(WRITERS):
                    group.start_soon(write_for_ever, driver, ledger, f"w{writer}", 300)
                await ledger.more(150)  # so that there is something to ask for
                quiet = await paced(ledger, ATTACK_S / 3)
                before = await statuses(driver)
                rss = {name: rss_bytes(cluster.children[name]) for name in names}

                adversary = cluster.start(
                    "adversary", "tests.e2e.adversary",
                    cluster.config_path, stolen, str(ATTACK_PER_S), "7",
                )  # fmt: skip
                port = int((await line_of(adversary, r"adversary\.begun (\d+)"))[1])
                meter.repair_bytes.clear()
                began_s = time.monotonic()
                noisy = await paced(ledger, ATTACK_S)
                attack_s = time.monotonic() - began_s
                repaired = dict(meter.repair_bytes)
                during = await statuses(driver)
                grown = {name: rss_bytes(cluster.children[name]) - rss[name] for name in names}
                assert adversary.running
                assert await anyio.to_thread.run_sync(adversary.terminate) == 0
                ended = await line_of(adversary, r"adversary\.ended (\S+) (.*)")
                group.cancel_scope.cancel()

            # At once all is well again.
            slot = await put(driver, "after", "yes")
            with anyio.fail_after(5):
                for name in names:
                    await anyio.to_thread.run_sync(
                        sql, cluster, name, "SELECT stored FROM listener", slot
                    )
            after = await until_agreed(driver)
            found = await all_config(driver)
        said = json.loads(ended[2])
        repaired.pop(port, None)
        dropped = {
            voter: {
                counter: number - before[voter].counters.get(counter, 0)
                for counter, number in sorted(after[voter].counters.items())
                if "drop" in counter or counter.startswith(("repair.", "report."))
            }
            for voter in after
        }
        print(f"said in {ended[1]} s: {said}")
        print(f"writes: quiet {quiet}, under attack {noisy}")
        print(f"repairs, bytes/s: {[int(each / attack_s) for each in repaired.values()]}")
        print(f"listeners grew by MiB: { {name: grown[name] >> 20 for name in names} }")
        print(f"voters counted: {dropped}")

        assert min(said.values()) > 10 * ATTACK_S, "it was attacked"
        expected = {**ledger.acknowledged}
        assert {key: found.get(key) for key in expected} == expected
        extra = {key for key in found if key not in expected}
        assert not [key for key in extra if key.startswith(FORGED_KEY)]
        await anyio.to_thread.run_sync(check_same, cluster, names, found, after[1])
        ballots = {each for name in names for each in sql(
            cluster, name, "SELECT ballot, voter FROM ballots", slot)}  # fmt: skip
        assert len(ballots) == 1, "as many as there was leaders"
        assert reigns(before) == reigns(during) == reigns(after), "no election was disturbed"
        for voter in after:
            assert not dropped[voter].get("peer_udp.dropped.replay"), "no window was moved"
            refused = sum(dropped[voter][f"peer_udp.dropped.{why}"] for why in ("tag", "channel"))
            assert refused > said["peer"] / 5, "each third of them is for this voter"
            assert dropped[voter]["repair.dropped.body"] > said["part_of_nothing"] / 4
        leader = after[1].leader
        repairing = [voter for voter in dropped if dropped[voter].get("repair.sent")]
        assert len(repairing) == 2 and leader not in repairing, "the two that do not lead"
        assert len(repaired) <= 2 + len(names), "and listeners, a little"
        assert dropped[leader]["repair.left_to_others"] > said["request"] / 5
        assert all(
            each <= REPAIR_BYTES_PER_S * (attack_s + 0.1) + 2 * DATAGRAM_BYTES_MAX
            for each in repaired.values()
        ), "within the cap"
        assert max(repaired.values()) > REPAIR_BYTES_PER_S * attack_s / 2, "the cap was reached"
        assert noisy["per_s"] > quiet["per_s"] / 10, "commits go on"
        assert max(grown.values()) < RSS_GROWTH_MAX, grown
        for name in names:
            assert cluster.children[name].terminate() == 0
            counted = json.loads((cluster.directory / name / "status.json").read_text())["counters"]
            print(f"{name}: {counted}")
            forged = counted["dropped_signature"] + counted.get("dropped_signature_flood", 0)
            assert forged > said["tip_forged"] / 2, name
            assert counted["dropped_replay"] > said["tip_replayed"] / 2, name


async def paced(ledger: Ledger, seconds: float) -> dict[str, float]:
    """What the writers reached in the next ``seconds``: commits a second, the median time between
    two, and the longest."""
    start = len(ledger.times)
    began_s = time.monotonic()
    while time.monotonic() < began_s + seconds:
        await ledger.more(10)
    times = ledger.times[start:]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {
        "per_s": round(len(times) / (time.monotonic() - began_s)),
        "median_ms": round(median(gaps) * 1000, 1),
        "longest_ms": round(max(gaps) * 1000),
    }


# --- what was recorded ------------------------------------------------------------------------


def refusals(status: Status) -> Counter[str]:
    """The datagrams of peers that a voter dropped, by reason."""
    prefix = "peer_udp.dropped."
    counters = status.counters.items()
    return Counter({name.removeprefix(prefix): n for name, n in counters if prefix in name})


async def until_back(driver: Driver, voter: int, boot: int) -> Status:
    """The status of ``voter`` once it runs with ``boot`` and knows who leads."""
    with anyio.fail_after(30):
        while True:
            status = (await driver.statuses(1.0))[voter]
            if isinstance(status, Status) and status.boot == boot and status.leader:
                return status


def ballot_of(text: str) -> Ballot:
    """A ballot as it is printed."""
    return Ballot(*map(int, text.split(".")))


def logged(output: str, event: str) -> list[dict]:
    """The lines of that event in a voter's log."""
    lines = [json.loads(line) for line in output.splitlines() if f'"{event}"' in line]
    return [line for line in lines if line["event"] == event]


def election_s(outputs: list[str]) -> float:
    """Seconds from when a quorum of three was ready until the first of them led."""
    ready = sorted(logged(output, "voter.ready")[0]["time"] for output in outputs)
    led = min(
        change["time"]
        for output in outputs
        for change in logged(output, "voter.role.changed")
        if change["role"] == "leader"
    )
    return (datetime.fromisoformat(led) - datetime.fromisoformat(ready[1])).total_seconds()


async def quiet_replay(
    driver: Driver, recording: list[Datagram], for_voter: Counter[int], reasons: set[str]
) -> None:
    """Replay all of it at voters that have nothing else to do: each datagram is dropped, for one of
    ``reasons``, and nothing else happens."""
    before = await until_agreed(driver)
    await anyio.to_thread.run_sync(Replay(recording).once)
    after = await until_agreed(driver)
    assert reigns(after) == reigns(before)
    for voter, now in after.items():
        then = before[voter]
        assert (now.fixed, now.chain, now.boot) == (then.fixed, then.chain, then.boot)
        counted = refusals(now) - refusals(then)
        print(f"voter {voter}: {dict(counted)} of {for_voter[voter]} that were replayed")
        assert set(counted) <= reasons
        assert for_voter[voter] * 3 / 4 < counted.total() <= for_voter[voter]


@pytest.mark.skipif(not can_tap(), reason="a wire-tap needs CAP_NET_RAW")
async def test_what_was_recorded_has_no_effect_on_who_restarted_nor_on_anybody_else(tmp_path):
    with LocalCluster(tmp_path, 3) as cluster:
        cluster.start_voters()
        names = ["one", "two"]
        for name in names:
            cluster.start_listener(name).wait_for_line("listener.started", 30)
        config, ledger = config_of(cluster), Ledger()
        ports = {voter.peer_port: voter.id for voter in config.voters}
        async with open_driver(config, cluster.credentials(), deadline_s=60) as driver:
            with Tap(config) as tap:
                await put(driver, "first", "yes")
                async with anyio.create_task_group() as group:
                    group.start_soon(write_for_ever, driver, ledger, "w")
                    await ledger.more(40)
                    deposed = await driver.find_leader()
                    await driver.hand_over()
                    await ledger.more(40)
                    group.cancel_scope.cancel()
            # In its session it comes after the write that was cancelled, which may be under way.
            await put(driver, "last", "yes")
            recording = tap.recording
            for_voter = Counter(ports[each.port] for each in recording if each.port in ports)
            streamed = sum(each.port == config.stream.port for each in recording)
            print(f"recorded: {dict(for_voter)} for voters, {streamed} of the stream")
            assert min(for_voter.values()) > 50 and streamed > 80

            # To those who sent and heard it themselves: not one is taken twice.
            await quiet_replay(driver, recording, for_voter, {"replay"})

            # One after another restarts; what the others tell it is new, and the old opens nothing.
            for voter in cluster.voter_ids:
                boot = (await statuses(driver))[voter].boot + 1
                cluster.voter(voter).kill()
                cluster.start_voter(voter)
                await until_back(driver, voter, boot)
                await put(driver, f"restarted/{voter}", "yes")
                await quiet_replay(driver, recording, for_voter, {"epoch", "replay", "tag"})

            # All at once, and while they start somebody says what the deposed leader said.
            old = await until_agreed(driver)
            kill_all([cluster.voter(voter) for voter in cluster.voter_ids])
            with Replay(recording) as replay:
                cluster.start_voters()
                late = cluster.start_listener("late")
                leader = await driver.find_leader()
                slot = await put(driver, "elected", "yes")
                await line_of(late, "listener.ready")
                whole = replay.rounds + 2  # one of them heard by everybody from its beginning
                with anyio.fail_after(60):
                    while replay.rounds < whole:
                        await put(driver, "replayed", str(replay.rounds))
            now = await until_agreed(driver)
            elected_s = election_s([cluster.voter(voter).output for voter in cluster.voter_ids])
            print(f"elected in {elected_s:.2f} s: {leader.ballot}, deposed was {deposed.ballot}")
            assert elected_s < 15, "whoever took the deposed one's word would never stand"
            assert len({(each.leader, each.ballot) for each in now.values()}) == 1
            highest = max(each.promised for each in old.values())
            assert leader.ballot > highest
            for voter in cluster.voter_ids:
                changes = logged(cluster.voter(voter).output, "voter.role.changed")
                followed = [ballot_of(line["ballot"]) for line in changes if line["leader"]]
                assert followed, f"voter {voter} followed nobody"
                assert min(followed) > highest, "nobody followed who was deposed"
                assert refusals(now[voter]).total() > for_voter[voter] / 2
            assert slot > max(each.fixed for each in old.values())
            found = await all_config(driver)
            assert {key: found.get(key) for key in ledger.acknowledged} == ledger.acknowledged
            await anyio.to_thread.run_sync(check_same, cluster, [*names, "late"], found, now[1])
        for name in (*names, "late"):
            assert cluster.children[name].terminate() == 0
            counted = json.loads((cluster.directory / name / "status.json").read_text())["counters"]
            print(f"{name}: {counted}")
            assert counted["duplicate"] > 50
            assert counted.get("dropped_replay", 0) + counted.get("earlier_boot", 0) > 5
            assert not counted.get("chain_mismatch")


# --- voters that contradict each other --------------------------------------------------------


def heartbeat(cluster: LocalCluster, voter: int, ballot: Ballot, slot: int, chain: bytes) -> bytes:
    """The datagram that says so, signed and sealed with all that lies in the voter's folder."""
    config = config_of(cluster)
    keys = parse_keys((cluster.credentials(voter_name(voter)) / KEYS_FILE).read_text())
    assert keys.stream is not None
    signer = Signer(keys.signing, config.cluster_id_bytes, voter)
    boot = 1 << 20  # newer than what the voter itself says
    digest = VoterDigest("follower", ballot, slot, slot, slot, 0, 0, 0, "0", boot)
    signed = signer.tip(ballot, slot, chain)
    tip = StreamTip(ballot, False, slot, chain, digest, voter, signed, bytes(SIGNATURE_BYTES))
    tip = replace(tip, words=signer.words(encode_body(tip)[:-WORDS_BYTES]))
    identity = Identity(config.cluster_id_bytes, voter, 1, boot)
    (data,) = Sealer(Channel.STREAM, identity, keys.stream.first, b"salt").datagrams(
        encode_body(tip)
    )
    return data


async def test_two_voters_tips_that_contradict_stop_a_listener_and_the_evidence_is_kept(tmp_path):
    with LocalCluster(tmp_path, 3) as cluster:
        cluster.start_voters()
        listener = cluster.start_listener("watch")
        listener.wait_for_line("listener.started", 30)
        config, place = config_of(cluster), cluster.directory / "watch"
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            slot = await put(driver, "before", "yes")
            await anyio.to_thread.run_sync(sql, cluster, "watch", "SELECT 1", slot)
            ballot = (await driver.find_leader()).ballot
            lie = slot + 100
            chains = {1: b"\x11" * CHAIN_BYTES, 2: b"\x22" * CHAIN_BYTES}
            with mouth() as sender:
                for voter, chain in chains.items():
                    data = heartbeat(cluster, voter, ballot, lie, chain)
                    sender.sendto(data, (config.stream.group, config.stream.port))
            assert await anyio.to_thread.run_sync(listener.wait, 20) == BROKEN
            slot = await put(driver, "after", "yes")

            def ends_in(output: str) -> str:
                told = [line for line in output.splitlines() if line.startswith("trex-listener: ")]
                assert len(told) == 1 and "Traceback" not in output, output
                return told[0]

            await anyio.to_thread.run_sync(listener.wait_for_line, "^trex-listener: ", 10)
            line = ends_in(listener.output)
            assert f"for slot {lie}" in line and "contradicts itself" in line
            assert chains[1].hex() in line and chains[2].hex() in line

            evidence = place / "contradiction.json"
            told = json.loads(evidence.read_text())
            tips = told["tips"]
            assert told["slot"] == lie
            public = parse_keys((cluster.credentials("listener") / KEYS_FILE).read_text()).public
            verifier = Verifier(public, config.cluster_id_bytes)
            assert {tip["voter"]: bytes.fromhex(tip["chain"]) for tip in tips} == chains
            for tip in tips:
                assert tip["slot"] == lie
                said = (
                    tip["voter"],
                    ballot_of(tip["ballot"]),
                    tip["slot"],
                    bytes.fromhex(tip["chain"]),
                )
                assert verifier.tip(*said, bytes.fromhex(tip["signature"]))
                assert not verifier.tip(3, *said[1:], bytes.fromhex(tip["signature"]))

            for _ in range(2):  # not by trying again either
                again = cluster.start_listener("watch")
                assert await anyio.to_thread.run_sync(again.wait, 30) == REFUSED
                await anyio.to_thread.run_sync(again.wait_for_line, "^trex-listener: ", 10)
                assert str(evidence) in ends_in(again.output)
                assert json.loads(evidence.read_text()) == told
            evidence.unlink()
            for store in place.glob("store.duckdb*"):
                store.unlink()
            cluster.start_listener("watch")
            await line_of(cluster.children["watch"], "listener.started")
            rows = await anyio.to_thread.run_sync(
                sql, cluster, "watch", "SELECT key FROM config ORDER BY slot", slot
            )
            assert [key for (key,) in rows] == ["before", "after"]
            assert cluster.children["watch"].terminate() == 0
