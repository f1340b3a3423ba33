"""The client side before real voters: the example, the benchmark, the verbs that need a stream."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from dashboard.importer import commands, examine, import_file
from dashboard.local import LocalCluster
from listeners import open_listener
from trex_core.metadata.commands import MemberJoin, MemberLeave, decode_command
from voters import OutcomeUnknown, connect, read_cluster

ROOT = Path(__file__).parent.parent.parent
START_S = 60.0


@pytest.fixture
def cluster(tmp_path):
    with LocalCluster(tmp_path / "cluster", voters=3) as here:
        here.start_voters()
        yield here


def run(*arguments, timeout_s=120.0, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout_s, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_the_replicated_stack_tells_its_story():
    ran = run("examples/replicated_stack.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    said = [line for line in lines if not line.startswith("voter ")]
    assert said[:-1] == [
        "push bottom: height 1",
        "push middle: height 2",
        "push top: height 3",
        "pop: top",
        "peek: middle, height 2",
        "all voters were killed; they start again",
        "pop: middle",
        "pop: bottom",
    ]
    assert said[-1].startswith("pop: IndexError")
    assert any("the leader, was killed" in line for line in lines)


@pytest.mark.slow
def test_the_benchmark_measures():
    ran = run("benchmarks/commit.py", "--clients", "1", "4", "--seconds", "0.5", "--voters", "3")
    assert ran.returncode == 0, ran.stderr
    floor, one, four = map(json.loads, ran.stdout.splitlines())
    assert (floor["what"], one["clients"], four["clients"]) == ("floor", 1, 4)
    for line in (floor, one, four):
        assert line["commits_per_s"] > 0 and 0 < line["p50_ms"] <= line["p99_ms"]
    assert one["ratio"] == pytest.approx(one["commits_per_s"] / floor["commits_per_s"], abs=0.01)


def test_watch_prints_each_change_as_it_is_fixed(cluster):
    watching = cluster.start("watch", "dashboard.cli", "watch", "--json", "--count", "2")
    watching.wait_for_line("following here from slot", START_S)
    for value in ("1", "2"):
        put = run("-m", "dashboard.cli", "config", "put", "k", value, **cluster.environment)
        assert put.returncode == 0, put.stderr
    assert watching.wait(START_S) == 0
    rows = [json.loads(line) for line in watching.output.splitlines() if line.startswith("{")]
    assert [(row["key"], row["new"]["value"]) for row in rows] == [("k", "1"), ("k", "2")]
    assert rows[1]["old"] == rows[0]["new"] and rows[0]["slot"] < rows[1]["slot"]
    again = run(
        "-m", "dashboard.cli", "watch", "--since", "0", "--count", "2", **cluster.environment
    )
    assert "config k: - -> '1'" in again.stdout and "config k: '1' -> '2'" in again.stdout


def test_a_kept_lease_holds_its_member_until_its_holder_is_killed(cluster):
    arguments = ("dashboard.cli", "lease", "grant", "5", "--keep", "--json")
    keeping = cluster.start("keeper", *arguments)
    lease = int(keeping.wait_for_line(r'"lease":(\d+)', START_S)[1])

    async def watch_it() -> None:
        config, _ = read_cluster(cluster.config_path)
        async with (
            connect(config, cluster.credentials(), deadline_s=START_S) as client,
            open_listener(config, cluster.credentials("listener"), name="witness") as listener,
        ):
            changes = listener.changes(since=0, kind="member")

            async def gone() -> str:
                """The next member that leaves."""
                with anyio.fail_after(START_S):
                    async for delivery in changes:
                        for change in getattr(delivery, "changes", ()):
                            if change.new is None:
                                return change.key
                raise AssertionError("the listener ended")

            await client.join("kept", lease=lease)
            unkept = await client.grant(5000)
            await client.join("unkept", lease=unkept.slot)
            assert await gone() == "unkept", "granted later, renewed by nobody"
            assert await client.member("kept") is not None
            keeping.kill()
            assert await gone() == "kept"

    anyio.run(watch_it)


@pytest.mark.slow
def test_an_import_goes_on_through_killed_leaders(cluster, google_trace, tmp_path):
    with gzip.open(google_trace) as rows:
        lines = [line for line in rows if line.split(b",")[1].endswith(b"7")]
    trace = tmp_path / "trace.csv"
    trace.write_bytes(b"".join(lines))
    source = examine(trace)
    alive: dict[str, object] = {}
    for _, command in commands(source, 1):
        decoded = decode_command(command)
        if isinstance(decoded, MemberLeave):
            del alive[decoded.id]
        elif isinstance(decoded, MemberJoin):
            alive[decoded.id] = decoded.attributes
        else:
            alive[decoded.id] = decoded.attributes

    async def work() -> None:
        config, _ = read_cluster(cluster.config_path)
        async with connect(config, cluster.credentials(), deadline_s=START_S) as client:
            before = (await client.put("before", "")).slot
            killed: list[int] = []
            harm = {source.rows // 4, source.rows // 2}

            def told(done: int, _rows: int) -> None:
                if done in harm:
                    harm.discard(done)
                    for voter in killed:
                        cluster.start_voter(voter)
                    killed[:] = [client.driver.leader]
                    cluster.voter(client.driver.leader).kill()

            found = await client.driver.find_leader(START_S)
            assert found.voter == client.driver.leader
            imported = await import_file(
                config,
                cluster.credentials(),
                source,
                in_flight_max=64,
                deadline_s=START_S,
                told=told,
            )
            assert (imported.first_row, imported.rows) == (1, source.rows) and not harm
            members = {m.id: m for m in await client.members()}
            assert {name: m.attributes for name, m in members.items()} == alive
            slots = [m.updated_slot for m in members.values()]
            assert len(set(slots)) == len(slots) and min(slots) > before

    anyio.run(work)


def test_interrupted_by_ctrl_c_a_blocking_client_ends_at_once(cluster, tmp_path):
    """A thread waits in the client while no majority runs; Ctrl-C must not wait for it."""
    script = tmp_path / "blocking.py"
    script.write_text(
        "from voters import connect_blocking\n"
        "with connect_blocking(deadline_s=600) as client:\n"
        "    print(client.put('a', 'b'), flush=True)\n"
        "    input()\n"
        "    print('waiting', flush=True)\n"
        "    client.put('a', 'c')\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **cluster.environment},
    )  # fmt: skip
    with process:
        assert "Done" in process.stdout.readline()
        for voter in (1, 2):
            cluster.voter(voter).kill()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(START_S) != 0


async def _unknown_resolved(cluster) -> None:
    async with connect(cluster.config_path, deadline_s=START_S) as client:
        await client.put("n", "0")
        leader = client.driver.leader
        cluster.voter(leader).pause()
        try:
            await client.put("n", "1", deadline_s=0.2)
        except OutcomeUnknown as error:
            done = await client.resolve(error, deadline_s=START_S)
        else:
            pytest.fail("a paused leader answered")
        entry = await client.get("n")
        assert entry is not None and (entry.value, entry.slot) == ("1", done.slot)
        cluster.voter(leader).resume()
        assert (await client.cas("n", done.slot, "2")).slot > done.slot


def test_an_unknown_outcome_is_resolved_under_the_next_leader(cluster):
    anyio.run(_unknown_resolved, cluster)
