"""Recorded clusters: each row once, in order, whatever is interrupted when."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import subprocess
import sys

import anyio
import pytest

from dashboard import importer
from dashboard.importer import (
    ImportRefusedError,
    ImportStoppedError,
    commands,
    examine,
    import_file,
    row_command,
)
from tests.credentials import folder
from tests.voters.fake_gateway import Do, FakeCluster
from trex_core.messages import Kind, RefusalReason
from trex_core.metadata.commands import (
    ConfigPut,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    decode_command,
    encode_command,
)

pytestmark = pytest.mark.anyio

FLAPPING = (b"4246147567", b"567616", b"6201459631")
"""The machines that come and go most often in the recorded trace."""


@pytest.fixture(scope="session")
def few(google_trace, tmp_path_factory):
    """All rows of three machines, 753 of them, compressed."""
    with gzip.open(google_trace) as rows:
        lines = [line for line in rows if line.split(b",")[1] in FLAPPING]
    path = tmp_path_factory.mktemp("trace") / "few.csv.gz"
    path.write_bytes(gzip.compress(b"".join(lines)))
    return path


def expected(path) -> list[bytes]:
    return [command for _, command in commands(examine(path), 1)]


def members_only(fake: FakeCluster) -> list[bytes]:
    member = (MemberJoin, MemberLeave, MemberUpdate)
    return [each for each in fake.applied if isinstance(decode_command(each), member)]


async def run_import(fake: FakeCluster, path, *, in_flight=64, deadline_s=5.0):
    told: list[tuple[int, int]] = []
    imported = await import_file(
        fake.config,
        folder(fake.config),
        examine(path),
        in_flight_max=in_flight,
        deadline_s=deadline_s,
        told=lambda done, rows: told.append((done, rows)),
    )
    return imported, told


# --- rows -----------------------------------------------------------------------------------


def test_rows_become_commands_as_the_file_says():
    assert row_command(b"0,5,0,HofL=,0.5,0.2493\n") == MemberJoin(
        "5", attributes={"platform": "HofL=", "cpus": "0.5", "memory": "0.2493"}
    )
    assert row_command(b"9,7,0,x,,\r\n") == MemberJoin(
        "7", attributes={"platform": "x", "cpus": "", "memory": ""}
    )
    assert row_command(b"9,6457070948,1,x,1,.25") == MemberLeave("6457070948")
    assert row_command(b"9,5,2,x,1,0.25\n") == MemberUpdate(
        "5", attributes={"platform": "x", "cpus": "1", "memory": "0.25"}
    )


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\n", "1 columns"),
        (b"0,5,0,x,0.5\n", "5 columns"),
        (b"0,5,0,x,0.5,1,\n", "7 columns"),
        (b"x,5,0,x,0.5,1\n", "time 'x'"),
        (b"0,,0,x,0.5,1\n", "machine id ''"),
        (b"0,-5,0,x,0.5,1\n", "machine id '-5'"),
        (b"0,5,3,x,0.5,1\n", "event type '3'"),
        (b"0,5,0,x,half,1\n", "cpus 'half'"),
        (b"0,5,0,x,1,1 \n", "memory '1 '"),
        (b"0,5,0," + b"x" * 5000 + b",1,1\n", "longer than"),
        (b"0,5,0,\xff,1,1\n", "ascii"),
    ],
)
def test_a_malformed_row_is_refused_with_the_reason(line, why):
    with pytest.raises(ValueError, match=why):
        row_command(line)


def test_the_recorded_trace_is_read_whole(google_trace, tmp_path):
    source = examine(google_trace)
    assert source.rows == 37_780
    assert source.sha256 == "16cfec99fd35336c955ade9ea0b6da3e781660d6cabd6c33409af2c10a4e27f3"
    assert source.key == "import/16cfec99fd35336c"
    plain = tmp_path / "plain.csv"
    plain.write_bytes(gzip.decompress(google_trace.read_bytes()))
    assert examine(plain).sha256 == source.sha256, "compressed or not, it is one import"

    alive: dict[str, str] = {}
    for _, command in commands(source, 1):
        match decode_command(command):
            case (
                MemberJoin(id=machine, attributes=given)
                | MemberUpdate(id=machine, attributes=given)
            ):
                assert given is not None
                alive[machine] = f"{machine},{given['platform']},{given['cpus']},{given['memory']}"
            case MemberLeave(id=machine):
                del alive[machine]
    text = "\n".join(alive[machine] for machine in sorted(alive, key=int))
    assert len(alive) == 12_486
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "98a485ac9e372585814ec2989e850718ab2e36279c5c2ec345d89e3a54a81ea1"
    )


def test_a_last_line_without_an_end_counts(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"0,5,0,x,1,1\n0,6,0,x,1,1")
    assert examine(path).rows == 2 == len(expected(path))
    path.write_bytes(b"")
    assert examine(path).rows == 0


@pytest.mark.parametrize("what", ["missing", "cut", "garbage"])
def test_an_unreadable_file_is_refused_by_name(what, tmp_path):
    path = tmp_path / "x.csv.gz"
    if what != "missing":
        whole = gzip.compress(b"0,5,0,x,1,1\n" * 1000)
        path.write_bytes(whole[:-9] if what == "cut" else whole[:20] + b"garbage" + whole[27:])
    with pytest.raises(ImportRefusedError, match=r"x\.csv\.gz"):
        examine(path)


# --- importing ------------------------------------------------------------------------------


async def test_each_row_once_and_in_order(few):
    async with FakeCluster() as fake:
        imported, told = await run_import(fake, few)
        assert members_only(fake) == expected(few)
        assert (imported.rows, imported.first_row) == (len(expected(few)), 1)
        assert told[0][0] == 0 and told[-1] == (imported.rows, imported.rows)
        assert [row for row, _ in told] == list(range(imported.rows + 1))
        entry = fake.machine.state.config[imported.key]
        assert entry.value == f"done {imported.rows}"
        assert len(fake.sessions.open) == 0, "its session and the client's own are closed"

        again, told = await run_import(fake, few)
        assert again.last_slot == imported.last_slot, "a listener asked for it has all rows"
        assert told == [(imported.rows, imported.rows)]
        assert members_only(fake) == expected(few)


@pytest.mark.parametrize("point", [*range(1, 14), 40, 100, 300, 700, 752, 753, 754, 756, 757])
async def test_interrupted_at_any_point_it_goes_on_where_it_was(few, point):
    """``point`` commands arrive, the last of them is applied unanswered or not at all, and the
    importer is gone; what it had in flight may arrive before the next one begins."""
    async with FakeCluster() as fake:
        interrupt = anyio.Event()
        swallowed = point % 3 == 0

        def script(_voter: int, _submit) -> str:
            if len(fake.seen) >= point:
                interrupt.set()
                return Do.MUTE if swallowed else Do.APPLY_MUTE
            return Do.APPLY

        fake.script = script
        async with anyio.create_task_group() as group:
            group.start_soon(run_import, fake, few)
            await interrupt.wait()
            group.cancel_scope.cancel()
        fake.script = lambda _voter, _submit: Do.APPLY
        await run_import(fake, few)
        assert members_only(fake) == expected(few)


async def test_in_bad_weather_it_still_does_each_row_once(few):
    async with FakeCluster() as fake:

        def script(_voter: int, _submit) -> str | int:
            number = len(fake.seen)
            if number % 97 == 0:
                fake.leader = fake.leader % 3 + 1
                return Do.APPLY_CUT if number % 2 else Do.CUT
            if number % 31 == 0:
                return RefusalReason.BUSY
            if number % 43 == 0:
                return RefusalReason.LEADERSHIP_LOST
            return Do.APPLY

        fake.script = script
        await run_import(fake, few, deadline_s=30.0)
        assert members_only(fake) == expected(few)


async def test_two_imports_at_once_are_one(few):
    async with FakeCluster() as fake:
        async with anyio.create_task_group() as group:
            group.start_soon(run_import, fake, few)
            group.start_soon(run_import, fake, few)
        assert members_only(fake) == expected(few)


async def test_a_malformed_row_is_named_and_all_before_it_are_imported(few, tmp_path):
    lines = gzip.decompress(few.read_bytes()).splitlines(keepends=True)
    path = tmp_path / "bad.csv"
    path.write_bytes(b"".join([*lines[:200], b"what is this\n", *lines[200:]]))
    async with FakeCluster() as fake:
        for _ in range(2):
            with pytest.raises(ImportRefusedError, match=r"bad\.csv, line 201: 1 columns"):
                await run_import(fake, path)
            assert members_only(fake) == expected(few)[:200]


async def test_a_rejected_row_is_named(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_bytes(b"0,5,0,x,1,1\n0,5,0,x,1,1\n")
    async with FakeCluster() as fake:
        with pytest.raises(ImportRefusedError, match="row 2 was rejected by the cluster: exists"):
            await run_import(fake, path)


async def test_an_expired_session_is_told_not_guessed(few):
    async with FakeCluster() as fake:
        source = examine(few)
        fake.script = lambda _, s: Do.MUTE if s.sequence == 50 else Do.APPLY
        with pytest.raises(ImportStoppedError, match="49 of 753 rows"):
            await run_import(fake, few, deadline_s=0.3)
        fake.script = lambda _voter, _submit: Do.APPLY
        fake.expire_sessions()
        with pytest.raises(ImportRefusedError, match="expired"):
            await run_import(fake, few)
        fake.machine.apply(fake.slot + 1, encode_command(ConfigPut(source.key, "mine")))
        with pytest.raises(ImportRefusedError, match="does not hold a session"):
            await run_import(fake, few)


async def test_nothing_is_ever_skipped_in_an_import(few):
    """A driver fills the sequence of a command it gave up; an import must not: a row is a row."""
    async with FakeCluster() as fake:
        fake.script = lambda _, s: RefusalReason.BUSY if s.sequence >= 10 else Do.APPLY
        with pytest.raises(ImportStoppedError, match="9 of 753 rows"):
            await run_import(fake, few, deadline_s=0.3)
        fake.script = lambda _voter, _submit: Do.APPLY
        await run_import(fake, few)
        assert members_only(fake) == expected(few)
        assert not [submit for submit in fake.log if submit.kind == Kind.SKIP]


async def test_killed_with_9_again_and_again_it_ends_right(few, tmp_path):
    """The real command, killed at a few real moments."""
    async with FakeCluster() as fake:
        config = tmp_path / "cluster.toml"
        config.write_text(fake.text)
        arguments = ["import", "--format", importer.FORMATS[0], str(few), "--in-flight", "32"]
        command = [sys.executable, "-m", "dashboard.cli", *arguments, "--config", str(config)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["TREX_CREDENTIALS"] = str(folder(fake.config))
        for victim in (1, 3, 60, 200, 450):
            before = len(fake.seen)

            def arrived(before=before, victim=victim) -> bool:
                return len(fake.seen) >= before + victim

            process = await anyio.open_process(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
            async with process, anyio.create_task_group() as group:

                async def killer(process=process, arrived=arrived) -> None:
                    await fake.until(arrived)
                    process.send_signal(signal.SIGKILL)

                group.start_soon(killer)
                assert await process.wait() in (-signal.SIGKILL, 0), "0: it was too fast for us"
                group.cancel_scope.cancel()
        done = await anyio.run_process(command, env=environment)
        assert members_only(fake) == expected(few), done.stderr.decode()
