"""For each fault, after how many seconds the dashboard says so, and that it never calls it healthy.

    .venv/bin/python benchmarks/faults.py [FAULT ...]

A real cluster of five voters and three listeners on this machine is under a light load and watched
as `trex-dash` does it: the same feed, the same view, the same verdict, ten looks a second.  One
fault after the other is done to it and healed again.  For some, the real `trex doctor --json` runs
meanwhile.  Each row tells when it was said first, how, when all was well again after healing, and
how many looks were *falsely healthy*: while the fault was in force and its bound over, neither the
verdict nor any warning told of it.  JSON lines, then a table, then one line that sums up; exit code
1 if a fault was not said within its bound, or a look was falsely healthy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from dashboard import advice
from dashboard.feed import Feed, open_feed
from dashboard.local import LocalCluster
from dashboard.view import View, reduce
from trex_core.cluster import ClusterConfig, parse_cluster
from voters.client import Client, TrexError, connect

ROOT = Path(__file__).resolve().parents[1]
LOOK_S = 0.1
HOLD_S = 3.0
"""A fault stays in force for so long after its bound."""
HEAL_S = 90.0
"""By then all must be well again."""
START_S = 60.0
NOTHING_GOES = ("no leader", "no quorum", "unknown")
"""The verdicts that call nothing well."""
AFTERMATH = ("elections", "boot_loop", "slow_disk")
"""Findings that count what happened within a minute, or over the last so many syncs."""
JOURNAL = {"segment_bytes": 4 << 20, "free_bytes_min": 16 << 20}
DISK_BYTES = 128 << 20
SMALL_DISK_VOTER = 5

SHIM = '''
"""Harms the voter it is loaded into while a file says so; put in its way by faults.py."""
import importlib.metadata, os, socket, time
_dir = os.environ["TREX_SHIM"]
def _told(name):
    try:
        with open(os.path.join(_dir, name)) as file:
            return file.read()
    except OSError:
        return ""
_sync, _send, _version = os.fdatasync, socket.socket.sendto, importlib.metadata.version
def fdatasync(fd):
    slow_ms = _told("slow_ms")
    if slow_ms:
        time.sleep(int(slow_ms) / 1000)
    return _sync(fd)
def sendto(self, data, *where):
    if str(where[-1][1]) in _told("mute").split():
        return len(data)
    return _send(self, data, *where)
def version(name):
    return _told("version") or _version(name)
os.fdatasync, socket.socket.sendto, importlib.metadata.version = fdatasync, sendto, version
'''


class Look(msgspec.Struct, frozen=True):
    """What a glance at the dashboard shows."""

    at_s: float
    view: View
    verdict: advice.Verdict
    findings: tuple[advice.Finding, ...]

    def warns(self, subject: str) -> bool:
        """Whether a warning tells of ``subject``."""
        return any(
            each.subject == subject and each.level in ("warn", "bad") for each in self.findings
        )

    @property
    def well(self) -> bool:
        """Whether all is said to be well."""
        return self.verdict.state == "healthy" and not any(
            each.level in ("warn", "bad") for each in self.findings
        )

    @property
    def over(self) -> bool:
        """The same, but for what tells of the last minute and so outlasts its cause."""
        return not any(
            each.level in ("warn", "bad") and each.code not in AFTERMATH for each in self.findings
        ) and self.verdict.state in ("healthy", "degraded")

    @property
    def words(self) -> str:
        """What it comes down to."""
        wrong = [each for each in self.findings if each.level != "note"]
        told = [f"{each.code} ({each.subject})" for each in wrong or self.findings]
        return f"{self.verdict.state}: {', '.join(told) or 'nothing'}"


Said = Callable[[Look], bool]


class Watch:
    """The dashboard without its screen. ``deaf``: the stream does not reach it."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._view = View()
        self._looked = anyio.Event()
        self.looks: list[Look] = []

    async def run(self) -> None:
        """Look, ten times a second, for ever."""
        while True:
            for event in self._feed.take():
                self._view = reduce(self._view, event)
            view = self._view
            look = Look(time.monotonic(), view, advice.verdict(view), advice.findings(view))
            self.looks.append(look)
            self._looked.set()
            self._looked = anyio.Event()
            await anyio.sleep(LOOK_S)

    async def until(self, said: Said, timeout_s: float) -> Look | None:
        """The first look from now on of which that is so; None if none is in that time."""
        with anyio.move_on_after(timeout_s):
            while True:
                await self._looked.wait()
                if said(self.looks[-1]):
                    return self.looks[-1]
        return None


class Ears:
    """The datagrams of the stream reach the dashboard, or do not."""

    def __init__(self) -> None:
        self.open = True

    def keep(self, data: bytes) -> bool:
        """The seam of ``listeners.source``."""
        del data
        return self.open


@dataclass
class Stage:
    """The cluster, who watches it, and what can be done to it."""

    cluster: LocalCluster
    config: ClusterConfig
    client: Client
    watch: Watch
    ears: Ears
    tasks: anyio.abc.TaskGroup

    def shim(self, voter: int, name: str, text: str | None) -> None:
        """Have the shim in ``voter`` do harm of that name (None: no more)."""
        path = self.cluster.directory / f"shim-{voter}" / name
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(text)

    def start_voter(self, voter: int) -> None:
        """Start a voter with the shim in its way."""
        folder = self.cluster.directory / f"shim-{voter}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(SHIM)
        self.cluster.start(
            f"voter-{voter}",
            *("voters", "run", "--id", str(voter)),
            extra={"PYTHONPATH": str(folder), "TREX_SHIM": str(folder)},
        )

    def start_listener(self, name: str, drop_percent: int = 0) -> None:
        """Start a listener."""
        self.cluster.start_listener(name, drop_percent=drop_percent)

    async def leader(self) -> int:
        """Who leads now."""
        return (await self.client.driver.find_leader(START_S)).voter

    async def followers(self) -> list[int]:
        """The others."""
        leader = await self.leader()
        return [voter for voter in self.config.voter_ids if voter != leader]

    async def load(self) -> None:
        """Write, some times a second, whatever happens."""
        count = 0
        while True:
            count += 1
            with suppress(TrexError):
                await self.client.put(f"load/{count % 50}", f"value {count}")
            await anyio.sleep(0.05)

    async def doctor(self) -> dict[str, Any]:
        """What the real ``trex doctor`` says now."""
        began_s = time.monotonic()
        command = [sys.executable, "-m", "dashboard.cli", "doctor", "--json"]
        environment = {**os.environ, **self.cluster.environment}
        if not self.ears.open:
            environment["TREX_TEST_DROP_PERCENT"] = "100"
        ran = await anyio.run_process(command, check=False, env=environment, cwd=ROOT)
        rows = json.loads(ran.stdout)
        return {
            "exit": ran.returncode,
            "took_s": round(time.monotonic() - began_s, 1),
            "verdict": rows[-1]["words"],
            "wrong": [
                f"{row['check']} ({row['subject']})"
                for row in rows[:-1]
                if row["level"] in ("warn", "bad")
            ],
        }


Heal = Callable[[], Awaitable[None]]


@dataclass
class Harm:
    """A fault in force: when it counts as told, how it is healed, and what must be told all the
    time after that (None: the same)."""

    said: Said
    heal: Heal
    kept: Said | None = None


@dataclass
class Fault:
    """A kind of fault; ``bound_s``: by then the dashboard must tell of it."""

    name: str
    bound_s: float
    strike: Callable[[Stage], Awaitable[Harm]]
    doctor: bool = False


@dataclass
class Row:
    """What was measured of a fault."""

    fault: str
    bound_s: float
    said_s: float | None = None
    said: str = ""
    falsely_healthy: int = 0
    looks: int = 0
    well_s: float | None = None
    left: str = ""
    doctor: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether it was told in time, never hidden, and over when healed."""
        in_time = self.said_s is not None and self.said_s <= self.bound_s
        return in_time and not self.falsely_healthy and self.well_s is not None and not self.left


async def measure(stage: Stage, fault: Fault, *, hold_s: float = HOLD_S, whole: bool = True) -> Row:
    """Do the fault, look, heal, look. It stays in force until ``hold_s`` after its bound, or if
    not ``whole``, after it was told; from then on it must be told all the time. ``whole`` also
    waits before until nothing is told of the last minute."""
    row = Row(fault.name, fault.bound_s)
    watch = stage.watch
    before = await watch.until(lambda look: look.well if whole else look.over, HEAL_S)
    if before is None:
        row.left = f"not well before it: {watch.looks[-1].words}"
        return row
    harm = await fault.strike(stage)
    if harm.said(before):
        row.left = f"told before it was done: {before.words}"
    began_s = time.monotonic()
    first = len(watch.looks)
    look = await watch.until(harm.said, fault.bound_s + hold_s)
    since_s = began_s + fault.bound_s
    if look is not None:
        since_s = since_s if whole else look.at_s
        row.said_s, row.said = round(look.at_s - began_s, 2), look.words
    if fault.doctor:
        row.doctor = await stage.doctor()
    await watch.until(lambda each: each.at_s >= since_s + hold_s, HEAL_S)
    during = [each for each in watch.looks[first:] if each.at_s > since_s]
    row.looks = len(during)
    kept = harm.kept or harm.said
    row.falsely_healthy = sum(not kept(each) for each in during)
    await harm.heal()
    healed_s = time.monotonic()
    look = await watch.until(lambda each: each.over and not harm.said(each), HEAL_S)
    if look is not None:
        row.well_s = round(look.at_s - healed_s, 2)
    else:
        row.left = watch.looks[-1].words
    return row


# --- the faults ---------------------------------------------------------------------------------


def ill(*subjects: str) -> Said:
    """Told if the verdict is not healthy, and once a leader is there, each subject is warned of."""

    def said(look: Look) -> bool:
        if look.verdict.state in NOTHING_GOES:
            return True
        return look.verdict.state != "healthy" and all(map(look.warns, subjects))

    return said


def in_state(*states: str) -> Said:
    """Told if the verdict is one of these."""
    return lambda look: look.verdict.state in states


def kill(*, leader: bool = False, count: int = 1) -> Callable[[Stage], Awaitable[Harm]]:
    """Kill -9 the leader or so many followers; all with count 5."""

    async def strike(stage: Stage) -> Harm:
        voters = stage.config.voter_ids
        majority = len(voters) // 2 + 1
        if count == len(voters):
            victims = list(voters)
        else:
            victims = [await stage.leader()] if leader else (await stage.followers())[:count]
        children = [stage.cluster.voter(voter) for voter in victims]
        for child in children:
            child.send(signal.SIGKILL)
        for child in children:
            child.process.wait()

        async def heal() -> None:
            for voter in victims:
                stage.start_voter(voter)

        if len(voters) - len(victims) < majority:
            # Until the dead are missed by everybody, those left may seem to be in an election.
            return Harm(in_state("no quorum", "unknown"), heal, in_state(*NOTHING_GOES))
        return Harm(ill(*(f"voter {voter}" for voter in victims)), heal)

    return strike


def pause(*, leader: bool) -> Callable[[Stage], Awaitable[Harm]]:
    """SIGSTOP the leader or a follower."""

    async def strike(stage: Stage) -> Harm:
        voter = await stage.leader() if leader else (await stage.followers())[0]
        child = stage.cluster.voter(voter)
        child.pause()

        async def heal() -> None:
            child.resume()

        return Harm(ill(f"voter {voter}"), heal)

    return strike


async def listener_paused(stage: Stage) -> Harm:
    """SIGSTOP a listener."""
    child = stage.cluster.children["listener-1"]
    child.pause()

    async def heal() -> None:
        child.resume()

    return Harm(lambda look: look.warns("listener listener-1"), heal)


async def listener_killed(stage: Stage) -> Harm:
    """Kill -9 a listener."""
    stage.cluster.children["listener-1"].kill()

    async def heal() -> None:
        stage.start_listener("listener-1")

    return Harm(lambda look: look.warns("listener listener-1"), heal)


async def listener_lossy(stage: Stage) -> Harm:
    """A listener that loses 60 % of the stream from its start on."""
    stage.start_listener("lossy", 60)

    async def heal() -> None:
        await anyio.to_thread.run_sync(stage.cluster.children["lossy"].terminate)

    return Harm(lambda look: any(each.subject == "listener lossy" for each in look.findings), heal)


async def cut_off(stage: Stage) -> Harm:
    """The stream does not reach the dashboard's machine."""
    stage.ears.open = False

    async def heal() -> None:
        stage.ears.open = True

    return Harm(in_state("unknown"), heal)


async def slow_disk(stage: Stage) -> Harm:
    """Every sync of a follower takes 250 ms longer."""
    voter = (await stage.followers())[0]
    stage.shim(voter, "slow_ms", "250")

    async def heal() -> None:
        stage.shim(voter, "slow_ms", None)

    return Harm(lambda look: look.warns(f"voter {voter}"), heal)


async def full_disk(stage: Stage) -> Harm:
    """The disk of a voter fills up, below its mark."""
    voter = SMALL_DISK_VOTER
    place = stage.cluster.directory / f"voter-{voter}"
    filler = place / "filler"
    left_bytes = stage.config.journal.free_bytes_min // 2
    with filler.open("wb") as file:
        while (free := shutil.disk_usage(place).free) > left_bytes:
            file.write(bytes(min(free - left_bytes, 1 << 20)))
            file.flush()

    async def heal() -> None:
        filler.unlink()

    return Harm(lambda look: look.warns(f"voter {voter}"), heal)


async def restart_loop(stage: Stage) -> Harm:
    """A follower dies two seconds after each start."""
    voter = (await stage.followers())[0]
    stop = anyio.Event()
    stopped = anyio.Event()

    async def loop() -> None:
        while not stop.is_set():
            stage.cluster.voter(voter).kill()
            stage.start_voter(voter)
            with anyio.move_on_after(2.0):
                await stop.wait()
        stopped.set()

    stage.tasks.start_soon(loop)

    async def heal() -> None:
        stop.set()
        await stopped.wait()

    return Harm(lambda look: look.warns(f"voter {voter}"), heal)


async def mute(stage: Stage, speaker: int, deaf: int) -> Harm:
    """Datagrams of voter ``speaker`` do not reach voter ``deaf``; those the other way do."""
    stage.shim(speaker, "mute", str(stage.config.voter(deaf).peer_port))

    async def heal() -> None:
        stage.shim(speaker, "mute", None)

    def said(look: Look) -> bool:
        if look.verdict.state in ("no leader", "no quorum"):
            return True
        return look.warns(f"voter {speaker}") or look.warns(f"voter {deaf}")

    return Harm(said, heal)


async def leader_not_heard(stage: Stage) -> Harm:
    """One way: a follower does not hear the leader, which hears it."""
    return await mute(stage, await stage.leader(), (await stage.followers())[0])


async def follower_not_heard(stage: Stage) -> Harm:
    """One way: the leader does not hear a follower, which hears it."""
    return await mute(stage, (await stage.followers())[0], await stage.leader())


async def mixed_versions(stage: Stage) -> Harm:
    """A follower is started again as another version."""
    voter = (await stage.followers())[0]
    stage.cluster.voter(voter).terminate()
    stage.shim(voter, "version", "0.2.0")
    stage.start_voter(voter)

    async def heal() -> None:
        stage.cluster.voter(voter).terminate()
        stage.shim(voter, "version", None)
        stage.start_voter(voter)

    return Harm(
        lambda look: (
            look.verdict.state != "healthy" or any("version" in each.code for each in look.findings)
        ),
        heal,
    )


FAULTS = (
    Fault("leader killed", 2.0, kill(leader=True), doctor=True),
    Fault("leader stopped (SIGSTOP)", 2.0, pause(leader=True)),
    Fault("follower killed", 2.5, kill(), doctor=True),
    Fault("follower stopped (SIGSTOP)", 2.5, pause(leader=False), doctor=True),
    Fault("two followers killed", 2.5, kill(count=2)),
    Fault("three followers killed: no quorum", 2.5, kill(count=3), doctor=True),
    Fault("all five killed", 2.5, kill(count=5), doctor=True),
    Fault("the dashboard's machine cut off from the stream", 3.0, cut_off, doctor=True),
    Fault("listener stopped (SIGSTOP)", 12.0, listener_paused, doctor=True),
    Fault("listener killed", 12.0, listener_killed),
    Fault("listener loses 60 % of the stream", 18.0, listener_lossy),
    Fault("leader does not reach a follower (one way)", 2.5, leader_not_heard, doctor=True),
    Fault("follower does not reach the leader (one way)", 2.5, follower_not_heard),
    Fault("slow disk of a follower (+250 ms a sync)", 8.0, slow_disk, doctor=True),
    Fault("full disk of a voter", 3.0, full_disk, doctor=True),
    Fault("voter that restarts again and again", 8.0, restart_loop),
    Fault("voter of another version", 5.0, mixed_versions, doctor=True),
)


@asynccontextmanager
async def stage_in(
    directory: Path, voters: int = 5, listener_count: int = 3
) -> AsyncIterator[Stage]:
    """A cluster that runs in ``directory``, is written to and watched, and is well."""
    ears = Ears()
    with LocalCluster(directory, voters, journal=JOURNAL) as cluster:
        config = parse_cluster(cluster.config_path.read_text(), str(cluster.config_path))
        async with (
            connect(config, cluster.credentials(), deadline_s=3.0) as client,
            anyio.create_task_group() as group,
        ):
            opened = open_feed(
                config,
                cluster.credentials(),
                name="dashboard",
                directory=directory / "dashboard",
                keep=ears.keep,
            )
            async with opened as feed:
                watch = Watch(feed)
                stage = Stage(cluster, config, client, watch, ears, group)
                for voter in config.voter_ids:
                    stage.start_voter(voter)
                for number in range(1, listener_count + 1):
                    stage.start_listener(f"listener-{number}")
                group.start_soon(watch.run)
                group.start_soon(stage.load)
                if await watch.until(lambda look: look.well, START_S) is None:
                    raise TimeoutError(f"never well: {watch.looks[-1].words}")
                yield stage
                group.cancel_scope.cancel()


def small_disk(directory: Path) -> bool:
    """Give one voter a small disk of its own, if that is permitted here."""
    place = directory / f"voter-{SMALL_DISK_VOTER}"
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def table(rows: list[Row]) -> None:
    """Print what was measured, for the documents too."""
    print("\n| fault | bound | said after | as | well again after | falsely healthy |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        said = "never" if row.said_s is None else f"{row.said_s:.1f} s"
        well = "never" if row.well_s is None else f"{row.well_s:.1f} s"
        print(
            f"| {row.fault} | {row.bound_s:g} s | {said} | {row.said} | {well} "
            f"| {row.falsely_healthy} of {row.looks} |"
        )


async def play(directory: Path, faults: list[Fault]) -> list[Row]:
    """Do one after the other."""
    rows: list[Row] = []
    async with stage_in(directory) as stage:
        for fault in faults:
            row = await measure(stage, fault)
            rows.append(row)
            print(json.dumps(asdict(row), ensure_ascii=False), flush=True)
    return rows


def main(names: list[str]) -> int:
    """Do the faults whose names contain one of ``names`` (none: all); the exit code."""
    chosen = [each for each in FAULTS if not names or any(name in each.name for name in names)]
    directory = Path(tempfile.mkdtemp(prefix="trex-faults-"))
    mounted = small_disk(directory)
    if not mounted:
        chosen = [each for each in chosen if each.strike is not full_disk]
        print(json.dumps({"fault": "full disk of a voter", "left_out": "mount is not permitted"}))
    try:
        rows = anyio.run(play, directory, chosen)
    finally:
        if mounted:
            place = directory / f"voter-{SMALL_DISK_VOTER}"
            subprocess.run(["umount", "--lazy", str(place)], check=False)
        shutil.rmtree(directory, ignore_errors=True)
    table(rows)
    worst = max((row.said_s or float("inf") for row in rows), default=0.0)
    hidden = sum(row.falsely_healthy for row in rows)
    bad = [row.fault for row in rows if not row.good]
    print(
        json.dumps(
            {
                "faults": len(rows),
                "worst_said_s": worst,
                "falsely_healthy": hidden,
                "looks": sum(row.looks for row in rows),
                "failed": bad,
            },
            ensure_ascii=False,
        )
    )
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("faults", nargs="*", help="parts of names (default: all)")
    sys.exit(main(parser.parse_args().faults))
