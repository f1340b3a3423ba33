"""The process ``trex-listener``: SQL, signals, kill -9, and errors that say what to do."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
from anyio.streams.text import TextReceiveStream

from listeners import open_listener
from listeners.sql import query_socket_async
from tests.credentials import folder as folder_of
from tests.listeners.backbone import Backbone, make_cluster
from tests.listeners.workload import put, replayed, same, workload

pytestmark = pytest.mark.e2e
DEADLINE_S = 20
VOTER_NUMBERS = ("id", "peer_port", "client_port", "archive_port")


@pytest.fixture
async def backbone():
    made = Backbone(make_cluster())
    async with made.serving(heartbeat_s=0.03):
        yield made
    made.close()


def _cluster_file(backbone: Backbone, folder: Path) -> Path:
    file = folder / "cluster.toml"
    config = backbone.cluster
    stream = config.stream
    lines = [f'name = "{config.name}"', f'cluster_id = "{config.cluster_id}"']
    lines += ["[stream]", f'group = "{stream.group}"', f"port = {stream.port}"]
    for voter in config.voters:
        lines += ["[[voters]]", f'directory = "{voter.directory}"', f'host = "{voter.host}"']
        lines += [f"{key} = {getattr(voter, key)}" for key in VOTER_NUMBERS]
    file.write_text("\n".join(lines))
    return file


def credentials(backbone: Backbone) -> dict[str, str]:
    """What its environment must say for a listener to find its credentials."""
    return {"TREX_CREDENTIALS": str(folder_of(backbone.cluster, "listener"))}


@asynccontextmanager
async def _process(backbone: Backbone, folder: Path, **environment: str):
    """A ``trex-listener`` process that was ready, and a way to await its next log event."""
    file = _cluster_file(backbone, folder)
    process = await anyio.open_process(
        [sys.executable, "-m", "listeners", "run", "--name", "p", "--dir", str(folder / "p")],
        env={**os.environ, "TREX_CONFIG": str(file), **credentials(backbone), **environment},
        stderr=subprocess.PIPE,
    )
    lines = TextReceiveStream(process.stderr)
    held = ""

    async def until(event: str) -> dict:
        nonlocal held
        with anyio.fail_after(DEADLINE_S):
            while True:
                while "\n" in held:
                    line, held = held.split("\n", 1)
                    entry = json.loads(line)
                    if entry["event"] == event:
                        return entry
                held += await lines.receive()

    try:
        await until("listener.ready")
        yield process, until
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.aclose()


def _socket(folder: Path) -> Path:
    return folder / "p" / "sql.sock"


async def test_the_process_serves_sql_and_stops_clean(backbone, tmp_path):
    last = backbone.append(*(put(f"k{n}", "x") for n in range(50)))
    async with _process(backbone, tmp_path) as (process, until):
        result = await query_socket_async(
            _socket(tmp_path), "SELECT count(*) FROM config", at_least_slot=last
        )
        assert result.rows == ((50,),)
        process.send_signal(signal.SIGTERM)
        stopped = await until("listener.stopped")
        assert (stopped["applied"], stopped["stored"]) == (last, last)
        rest = b"".join([part async for part in process.stderr])
        assert rest == b"", "nothing is said after that"
        assert await process.wait() == 0
        status = json.loads((tmp_path / "p" / "status.json").read_text())
        assert status["stored"] == last and status["counters"]["datagrams"] > 0


async def test_killed_at_any_moment_it_goes_on_without_gap_or_repeat(backbone, tmp_path):
    draw = random.Random(1)
    last = 0
    for turn in range(4):
        async with _process(backbone, tmp_path, TREX_TEST_DROP_PERCENT="10") as (process, _):
            for value in workload(draw, 300):
                last = backbone.append(value)
                backbone.stream(last, last)
                if last % 20 == 0:
                    await asyncio.sleep(0)
            if turn == 3:
                commits = await query_socket_async(
                    _socket(tmp_path),
                    "SELECT count(*), min(slot), max(slot), count(DISTINCT slot) FROM commits",
                    at_least_slot=last,
                )
                assert commits.rows == ((last, 1, last, last),)
            process.kill()
    state = replayed(backbone)[0]
    async with open_listener(
        backbone.cluster,
        folder_of(backbone.cluster, "listener"),
        name="p",
        directory=tmp_path / "p",
    ) as listener:
        await listener.wait_applied(last, DEADLINE_S)
        assert same(listener.state, state)


async def test_stopped_by_sigstop_and_continued_it_catches_up(backbone, tmp_path):
    async with _process(backbone, tmp_path) as (process, _):
        process.send_signal(signal.SIGSTOP)
        last = 0
        for _ in range(30):
            first = backbone.tip + 1
            last = backbone.append(*(put(f"k{n}", "y" * 200) for n in range(300)))
            backbone.stream(first, last)
            await asyncio.sleep(0)
        process.send_signal(signal.SIGCONT)
        result = await query_socket_async(
            _socket(tmp_path), "SELECT count(*), max(slot) FROM commits", at_least_slot=last
        )
        assert result.rows == ((last, last),)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "--name", "x"], 2, "--dir"),
        (["run", "--name", "x", "--dir", "{d}/x", "--config", "{d}/none.toml"], 1, "trex init"),
        (["run", "--name", "x", "--dir", "{d}/x", "--config", "{d}/wrong.toml"], 1, "hartbeat"),
        (["run", "--name", "", "--dir", "{d}/x"], 1, "printable"),
        (["run", "--name", "x", "--dir", "{d}/open"], 1, "chmod 700"),
        (["run", "--name", "x", "--dir", "{d}/junk"], 3, "no store"),
        (["run", "--name", "x", "--dir", "{d}/x", "--config", "{d}/group.toml"], 1, "[stream]"),
    ],
)
async def test_what_is_wrong_is_told_in_one_line_with_its_exit_code(
    backbone, tmp_path, arguments, code, says
):
    file = _cluster_file(backbone, tmp_path)
    text = file.read_text()
    (tmp_path / "wrong.toml").write_text("hartbeat = 1\n" + text)
    (tmp_path / "group.toml").write_text(text.replace("239.255.", "10.255."))
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "junk").mkdir(mode=0o700)
    (tmp_path / "junk" / "store.duckdb").write_bytes(b"junk" * 5000)
    with anyio.fail_after(DEADLINE_S):
        done = await anyio.run_process(
            [sys.executable, "-m", "listeners", *(a.format(d=tmp_path) for a in arguments)],
            env={**os.environ, "TREX_CONFIG": str(file), **credentials(backbone), "NO_COLOR": "1"},
            check=False,
        )
    said = done.stderr.decode()
    assert (done.returncode, says in said, "Traceback" in said) == (code, True, False), said
