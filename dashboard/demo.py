"""``trex demo``: a real cluster on this machine, in front of a person's eyes, then put to the test.

This module alone tells that story: voters, a listener and members start, each a process of its
own; clients write; the leader and a member are killed; at the end, what a listener's SQL says is
compared, whole, with what was acknowledged to the clients and nothing else.  Everything happens on
loopback, in one directory, and ends with this process, however it ends.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from subprocess import CalledProcessError, TimeoutExpired
from typing import TYPE_CHECKING, Final

import anyio
import anyio.abc
import anyio.to_thread
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from dashboard.importer import (
    REMOVE,
    ImportRefusedError,
    ImportStoppedError,
    examine,
    import_file,
)
from dashboard.local import Child, LocalCluster
from dashboard.member import PREFIX, WRITER, ZONE
from dashboard.view import Did, Event, Trouble
from listeners.listener import SOCKET_FILE
from listeners.sql import QueryResult, SqlError, query_socket_async
from trex_core.access import Grant
from trex_core.cluster import ClusterConfig, parse_cluster
from trex_core.credentials import FOLDER
from trex_core.messages import Status
from voters.client import Client, OutcomeUnknown, TrexError, connect
from voters.config import ADMIN

if TYPE_CHECKING:
    from dashboard.feed import Feed

WRITERS: Final = 8
"""Clients that write at the same time, each one write after another."""
KEYS_EACH: Final = 25
"""Keys that each of them writes, over and over."""
WRITES_BEFORE: Final = 1_000
"""Acknowledged writes before the leader is killed, and as many again after it."""
VOTER_CHOICES: Final = (3, 5, 7)
MEMBERS_MIN: Final = 2
LEASE_MS: Final = 5_000
"""Lease of a member, in milliseconds: longer than any change of leader here."""
START_S: Final = 30.0
"""Patience with anything that starts, elects or catches up, in seconds."""
IMPORT_ROWS_BEFORE: Final = 5_000
"""Rows of a trace that are imported before the leader is killed."""
IMPORT_IN_FLIGHT: Final = 256
"""Rows of a trace under way at a time."""
REFRESH_S: Final = 0.1
"""How often the line that lives is written anew, in seconds."""
OBSERVER: Final = "observer"
"""Name of the demo's listener."""
SOCKET_PATH_BYTES_MAX: Final = 107
"""Longest path of a unix socket that Linux takes, in bytes."""
LOG_FILE: Final = "demo.log"
"""What the demo tells, where the dashboard has the terminal: in its directory."""
TOLD_LINES: Final = 20
"""Its last lines, printed should it fail."""
DONE, HARM = "✓", "✗"
"""How lines of the story begin."""
STARTED: Final = "voters started"
JOINED: Final = '"event": "joined"'
LISTENING: Final = "listener.started"
WITHOUT: Final = r'"event": "members".*"members": \[(?!.*"{}")'
"""Lines of the children that the story waits for."""


class DemoFailedError(Exception):
    """The demo could not go on, or its end state was wrong; the text says where to look."""


@dataclass
class Acknowledged:
    """What clients were told is done: the table that SQL must equal at the end."""

    config: dict[str, tuple[str, int]] = field(default_factory=dict)
    writes: int = 0
    slot: int = 0
    took_ms: list[float] = field(default_factory=list)

    def note(self, key: str, value: str, slot: int, took_ms: float) -> None:
        """``key`` was written in ``slot``. Of two writes, the one in the higher slot stays."""
        if slot > self.config.get(key, ("", 0))[1]:
            self.config[key] = (value, slot)
        self.writes += 1
        self.slot = max(self.slot, slot)
        self.took_ms.append(took_ms)


def demo(
    voters: int = 5,
    members: int = 3,
    trace: Path | None = None,
    keep: bool = False,
    directory: Path | None = None,
) -> int:
    """Run the demo; its exit code. ``directory`` is kept afterwards, a temporary one is not."""
    console = Console(highlight=False)
    if voters not in VOTER_CHOICES or members < MEMBERS_MIN:
        return _refused(
            2,
            "the demo kills a voter and a member, so it needs 3, 5 or 7 --voters and at least "
            f"{MEMBERS_MIN} --members",
        )
    if trace is not None and not trace.is_file():
        return _refused(1, f"there is no file {trace} to import")
    with tempfile.TemporaryDirectory(prefix="trex-demo-") as scratch:
        place = (directory if directory is not None else Path(scratch)).absolute()
        try:
            place.mkdir(parents=True, exist_ok=True)
            empty = not any(each.name != LOG_FILE for each in place.iterdir())
        except OSError as error:
            return _refused(1, f"{place} cannot be used: {error.strerror}; name another --dir")
        if not empty:
            return _refused(1, f"{place} is not empty; name a new directory with --dir")
        if len(bytes(place / OBSERVER / SOCKET_FILE)) > SOCKET_PATH_BYTES_MAX:
            return _refused(
                1,
                f"{place} is too deep a place: the path of a socket in it would be over "
                f"{SOCKET_PATH_BYTES_MAX} bytes; name a shorter one with --dir",
            )
        try:
            return anyio.run(_Story(console, place, voters, members, trace, keep).tell)
        except DemoFailedError as error:
            console.print(f"[red]✗ {escape(str(error))}[/]")
            return 1


def demo_on_screen(
    voters: int = 5,
    members: int = 3,
    trace: Path | None = None,
    directory: Path | None = None,
) -> int:
    """Run the demo as a child process and show the dashboard on it, here in this terminal, until
    the operator leaves it; then everything ends. The exit code."""
    from dashboard import dash
    from listeners.sql import use_frugal_allocators

    use_frugal_allocators()
    why = dash.no_terminal()
    if why:
        return _refused(dash.USAGE, f"--dash: {why}")
    with tempfile.TemporaryDirectory(prefix="trex-demo-", ignore_cleanup_errors=True) as scratch:
        place = (directory if directory is not None else Path(scratch)).absolute()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return _refused(1, f"{place} cannot be used: {error.strerror}; name another --dir")
        imported = () if trace is None else ("--import", trace)
        told = Child(
            "demo",
            [
                *(sys.executable, "-m", "dashboard.cli", "demo", "--keep", "--dir", place),
                *("--voters", str(voters), "--members", str(members), *imported),
            ],
            place / LOG_FILE,
            {"PYTHONUNBUFFERED": "1", "COLUMNS": "200", "TREX_DASH": ""},
        )
        code, failed = 0, False
        try:
            _aside("the demo starts its voters …")
            told.wait_for_line(STARTED, START_S)
            cluster = parse_cluster((place / "cluster.toml").read_text())
            name = dash.default_name(kept=False)
            admin = place / FOLDER / ADMIN
            dash.show(
                lambda: _on_demo(told, cluster, admin, name, Path(scratch) / "dash"),
                act=dash.performer(admin),
            )
        except ChildProcessError:
            failed = True  # it closed its output, so it is ending
            with suppress(TimeoutExpired):
                told.wait(START_S)
        except TimeoutError as error:
            code = 1
            _aside(f"trex: {error}\n")
        except Exception as error:  # noqa: BLE001 - told in one line, or raised again as it is
            code, words = dash.told(error)
            print(f"trex: {words}", file=sys.stderr)
        finally:
            failed = failed or not told.running
            _aside("every process stops …")
            told.terminate(START_S)
            _aside("")
        if failed:
            code = max(1, told.process.returncode)
            print("\n".join(told.output.splitlines()[-TOLD_LINES:]), file=sys.stderr)
        return code


def _aside(text: str) -> None:
    """A line at the terminal that the next one replaces."""
    print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


class _ToldFeed:
    """The feed of a demo's cluster, and beside it what the demo does and how it ends."""

    def __init__(self, feed: Feed, told: Child) -> None:
        self.cluster = feed.cluster
        self.source = feed.source
        self.listener = feed.listener
        self._feed = feed
        self._told = told
        self._lines = 0
        self._ended = False

    @property
    def speed(self) -> float:
        """Of the feed."""
        return self._feed.speed

    @speed.setter
    def speed(self, value: float) -> None:
        self._feed.speed = value

    @property
    def progress(self) -> tuple[int, int] | None:
        """Of the feed."""
        return self._feed.progress

    def take(self) -> tuple[Event, ...]:
        """What the feed heard and the demo told."""
        *events, clock = self._feed.take()
        if self._told.line_count != self._lines:
            lines, self._lines = (
                self._told.output.splitlines()[self._lines :],
                self._told.line_count,
            )
            for line in lines:
                if line[:1] in (DONE, HARM):
                    events.append(Did(clock.at_ms, line[0] == DONE, f"demo: {line[1:].strip()}"))
        if not self._ended and not self._told.running:
            self._ended = True
            last = (self._told.output.splitlines() or ["nothing was said"])[-1]
            events.append(
                Trouble(clock.at_ms, f"the demo has ended, and its voters with it: {last}")
            )
        return (*events, clock)


@asynccontextmanager
async def _on_demo(
    told: Child, cluster: ClusterConfig, credentials: Path, name: str, directory: Path
) -> AsyncIterator[Feed]:
    from dashboard.feed import open_feed

    async with open_feed(cluster, credentials, name=name, directory=directory) as feed:
        yield _ToldFeed(feed, told)


def _refused(code: int, why: str) -> int:
    """Say on stderr why there is no demo; the exit code."""
    print(f"trex: {why}", file=sys.stderr)
    return code


def recorded_members(path: Path) -> tuple[tuple[str, str, str, str], ...]:
    """What a trace of machine events leaves: id, platform, cpus and memory of each machine, as
    texts, by number. Read here by itself: nothing of the import is used."""
    alive: dict[str, tuple[str, str, str, str]] = {}
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="ascii", newline="") as lines:
        for _, machine, event, platform, cpus, memory in csv.reader(lines):
            if event == REMOVE:
                del alive[machine]
            else:
                alive[machine] = (machine, platform, cpus, memory)
    return tuple(alive[machine] for machine in sorted(alive, key=int))


class _Story:
    """One telling. Scenes are methods, told in the order of :meth:`_scenes`."""

    def __init__(
        self,
        console: Console,
        directory: Path,
        voters: int,
        members: int,
        trace: Path | None,
        keep: bool,
    ) -> None:
        self._console = console
        self._trace = trace
        self._names = [f"{PREFIX}{number}" for number in range(1, members + 1)]
        self._keep = keep
        self._cluster = LocalCluster(directory, voters, name="demo")
        self._known = Acknowledged()
        self._imported = ""
        self._live = console.status("starting")
        self._began_s = time.monotonic()

    async def tell(self) -> int:
        """Tell it all; the exit code."""
        cluster = self._cluster
        voters = len(cluster.voter_ids)
        self._console.print(
            Panel(
                f"[bold]TRex[/]: {voters} voters, {len(self._names)} members and a listener, each a"
                f" process of its own,\non loopback only, in {escape(str(cluster.directory))}",
                expand=False,
            )
        )
        interrupted = anyio.Event()
        code = 1
        try:
            with self._live, cluster:
                async with anyio.create_task_group() as group:
                    group.start_soon(_on_signal, interrupted, group.cancel_scope)
                    code = await self._scenes()
                    if self._keep:
                        await self._stay()
                    group.cancel_scope.cancel()
                self._live.update("every process stops")
                await anyio.to_thread.run_sync(cluster.stop)
        except* _TROUBLE as group_of_errors:
            raise DemoFailedError(self._explained(group_of_errors)) from group_of_errors
        if interrupted.is_set() and not self._keep:
            self._console.print("Interrupted. Nothing was left running.")
            return 130
        return code

    async def _scenes(self) -> int:
        await self._start_voters()
        config = parse_cluster(self._cluster.config_path.read_text())
        admin = self._cluster.credentials()
        async with connect(config, admin, deadline_s=START_S) as client:
            await self._first_leader(client)
            await self._start_followers()
            async with self._writing(client), anyio.create_task_group() as importing:
                await self._write_more(WRITES_BEFORE)
                self._say_rate()
                if self._trace is not None:
                    await importing.start(self._import, config, self._trace)
                killed = await self._kill_leader(client)
                await self._write_more(WRITES_BEFORE)
            await self._restart(client, killed)
            await self._kill_member()
            return await self._compare()

    # --- scenes -----------------------------------------------------------------------------

    async def _start_voters(self) -> None:
        self._cluster.start_voters()
        count = len(self._cluster.voter_ids)
        self._done(f"{count} {STARTED}, each with a journal of its own", self._began_s)

    async def _first_leader(self, client: Client) -> None:
        began_s = time.monotonic()
        self._live.update("waiting for the first election: it needs every voter")
        leader = await client.driver.find_leader(START_S)
        self._done(f"voter {leader.voter} leads, elected under ballot {leader.ballot}", began_s)

    async def _start_followers(self) -> None:
        began_s = time.monotonic()
        self._live.update("the listener and the members start")
        observer = self._cluster.start_listener(OBSERVER)
        self._cluster.authority.issue(Grant(WRITER, "writer"), self._cluster.credentials(WRITER))
        members = [
            self._cluster.start(
                name, "dashboard.member", "--name", name, "--lease-ms", str(LEASE_MS)
            )
            for name in self._names
        ]
        for member in members:
            await _line(member, JOINED)
        await _line(observer, LISTENING)
        self._done(
            f"{len(members)} members joined, on leases of {LEASE_MS / 1000:g} s; a listener follows"
            " into DuckDB",
            began_s,
        )

    @asynccontextmanager
    async def _writing(self, client: Client) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            stop = anyio.Event()
            for writer in range(WRITERS):
                group.start_soon(self._write, client, writer, stop)
            yield
            stop.set()

    async def _write(self, client: Client, writer: int, stop: anyio.Event) -> None:
        for count in itertools.count(1):
            if stop.is_set():
                return
            key, value = f"demo/{writer}/{count % KEYS_EACH:02}", f"write {count}"
            began_s = time.monotonic()
            try:
                done = await client.put(key, value)
            except OutcomeUnknown as error:
                done = await client.resolve(error)
            self._known.note(key, value, done.slot, (time.monotonic() - began_s) * 1000)

    async def _write_more(self, count: int) -> None:
        goal = self._known.writes + count
        while self._known.writes < goal:
            self._live.update(
                f"{self._known.writes:,} writes acknowledged by {WRITERS} writers{self._imported}"
            )
            await anyio.sleep(REFRESH_S)

    async def _import(
        self,
        config: ClusterConfig,
        path: Path,
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Import a recorded trace beside the writers; started once rows are acknowledged."""
        source = await anyio.to_thread.run_sync(examine, path)
        began_s = time.monotonic()
        started = False

        def told(row: int, rows: int) -> None:
            nonlocal started
            self._imported = f"; row {row:,} of {rows:,} imported"
            if row >= IMPORT_ROWS_BEFORE and not started:
                started = True
                task_status.started()

        imported = await import_file(
            config,
            self._cluster.credentials(),
            source,
            in_flight_max=IMPORT_IN_FLIGHT,
            deadline_s=START_S,
            told=told,
        )
        if not started:
            task_status.started()
        took_s = time.monotonic() - began_s
        self._known.slot = max(self._known.slot, imported.last_slot)
        self._say(
            f"{imported.rows:,} recorded rows imported through all this, one slot each:"
            f" {imported.rows / took_s:,.0f}/s"
        )

    def _say_rate(self) -> None:
        took_ms = self._known.took_ms
        seconds = sum(took_ms) / WRITERS / 1000
        self._say(
            f"{len(took_ms):,} writes acknowledged, each on a majority's disks:"
            f" {len(took_ms) / seconds:,.0f}/s, median {median(took_ms):.1f} ms"
        )

    async def _kill_leader(self, client: Client) -> int:
        leader = (await client.driver.find_leader(START_S)).voter
        self._cluster.voter(leader).kill()
        began_s = time.monotonic()
        self._harm(f"voter {leader}, the leader, killed (SIGKILL) while they write")
        self._live.update("the other voters elect a new leader")
        key = "demo/after the leader was killed"
        done = await client.put(key, "still here")
        took_s = time.monotonic() - began_s
        self._known.note(key, "still here", done.slot, took_s * 1000)
        now = await client.driver.find_leader(START_S)
        self._say(
            f"failover took [bold]{took_s:.2f} s[/]: voter {now.voter} leads, and the next write is"
            " acknowledged"
        )
        return leader

    async def _restart(self, client: Client, voter: int) -> None:
        began_s = time.monotonic()
        self._cluster.start_voter(voter)
        self._live.update(f"voter {voter} reads its journal and catches up")
        goal = self._known.slot
        with anyio.fail_after(START_S):
            while True:
                statuses = await client.driver.statuses(1.0)
                status = statuses[voter]
                if isinstance(status, Status) and status.fixed >= goal:
                    break
                await anyio.sleep(REFRESH_S)
        self._done(f"voter {voter} started again and caught up to slot {goal:,}", began_s)

    async def _kill_member(self) -> None:
        victim, *others = self._names
        witnesses = [self._cluster.children[name] for name in others]
        seen = [witness.line_count for witness in witnesses]
        self._cluster.children[victim].kill()
        began_s = time.monotonic()
        self._harm(f"{victim} killed (SIGKILL): nobody renews its lease now")
        self._live.update(f"the lease of {victim} runs out")
        for witness, since in zip(witnesses, seen, strict=True):
            left = await _line(witness, WITHOUT.format(re.escape(victim)), since)
            self._known.slot = max(self._known.slot, json.loads(left.string)["slot"])
        self._done("its lease lapsed; the others saw it leave the ring", began_s)

    async def _compare(self) -> int:
        self._live.update("asking the listener in SQL")
        known = self._known
        config = await self._sql(
            "SELECT key, value, slot FROM config WHERE starts_with(key, 'demo/') ORDER BY key"
        )
        members = await self._sql(
            "SELECT id, zone, state, lease, updated_slot FROM members WHERE zone = 'demo'"
            " ORDER BY id"
        )
        recorded = await self._sql(
            "SELECT id, attributes->>'platform', attributes->>'cpus', attributes->>'memory'"
            " FROM members WHERE zone IS NULL ORDER BY CAST(id AS BIGINT)"
        )
        ring = await self._sql("SELECT DISTINCT unnest(replicas) AS id FROM ring ORDER BY id")
        commits = await self._sql("SELECT count(*), min(slot), max(slot) FROM commits")
        wanted = tuple((key, *known.config[key]) for key in sorted(known.config))
        alive = self._joined()
        self._console.print(_shown(members, "SELECT … FROM members, as the listener has it"))
        count, first, last = commits.rows[0]
        checks = {
            f"all {len(wanted)} rows of config are as acknowledged, values and slots": (
                config.rows == wanted
            ),
            f"members are the {len(alive)} that live, under the leases they were granted": (
                members.rows == alive
            ),
            "the ring is theirs alone": (
                {row[0] for row in ring.rows} == {row[0] for row in (*members.rows, *recorded.rows)}
            ),
            f"commits has every slot from {first} to {last:,}, without a gap": (
                (first, count) == (1, last) and last >= known.slot
            ),
        }
        if self._trace is not None:
            machines = recorded_members(self._trace)
            checks[
                f"the {len(machines):,} machines that the trace leaves are members, no other"
            ] = recorded.rows == machines
        for text, holds in checks.items():
            if holds:
                self._say(text)
            else:
                self._harm(f"[red bold]NOT SO:[/] {text}")
        if not all(checks.values()):
            raise DemoFailedError("the end state is not what was acknowledged")
        self._console.print(
            f"[bold green]{known.writes:,} acknowledged writes, a leader and a member killed,"
            f" nothing lost[/] [dim]({time.monotonic() - self._began_s:.0f} s)[/]"
        )
        return 0

    async def _stay(self) -> None:
        cluster = self._cluster
        self._console.print(
            "\nEverything still runs. In another terminal:\n\n"
            f"  export TREX_CONFIG={cluster.config_path}\n"
            "  trex status --watch\n"
            f"  trex sql --listener {OBSERVER} 'SELECT * FROM members'\n\n"
            "Ctrl-C ends it all.",
            soft_wrap=True,
        )
        self._live.update("running until Ctrl-C or SIGTERM")
        await anyio.sleep_forever()

    # --- small verbs ------------------------------------------------------------------------

    async def _sql(self, sql: str) -> QueryResult:
        path = self._cluster.directory / OBSERVER / SOCKET_FILE
        return await query_socket_async(path, sql, at_least_slot=self._known.slot)

    def _joined(self) -> tuple[tuple[str, str, str, int, int], ...]:
        """What the members that live were acknowledged last: id, zone, state, lease, slot."""
        rows = []
        for name in self._names[1:]:
            lines = self._cluster.children[name].output.splitlines()
            last = [json.loads(line) for line in lines if JOINED in line][-1]
            rows.append((name, ZONE, "up", last["lease"], last["slot"]))
        return tuple(sorted(rows))

    def _done(self, text: str, began_s: float) -> None:
        self._say(f"{text} [dim]({time.monotonic() - began_s:.1f} s)[/]")

    def _say(self, text: str) -> None:
        self._console.print(f"[green]{DONE}[/] {text}")

    def _harm(self, text: str) -> None:
        self._console.print(f"[red]{HARM}[/] {text}")

    def _explained(self, errors: BaseExceptionGroup[BaseException]) -> str:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        why = str(error) or type(error).__name__
        return f"{why}\n(what each process said is in {self._cluster.directory / 'logs'})"


_TROUBLE: Final = (
    TrexError,
    SqlError,
    ImportRefusedError,
    ImportStoppedError,
    TimeoutError,
    ChildProcessError,
    CalledProcessError,
    OSError,
    DemoFailedError,
)


async def _line(child: Child, pattern: str, since: int = 0) -> re.Match[str]:
    """Wait for a line of a child, in a thread of its own."""
    return await anyio.to_thread.run_sync(
        child.wait_for_line, pattern, START_S, since, abandon_on_cancel=True
    )


async def _on_signal(interrupted: anyio.Event, scope: anyio.CancelScope) -> None:
    """Ctrl-C and SIGTERM end the story where it is."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            interrupted.set()
            scope.cancel()


def _shown(result: QueryResult, title: str) -> Table:
    table = Table(*result.columns, title=title, title_justify="left")
    for row in result.rows:
        table.add_row(*(str(value) for value in row))
    return table
