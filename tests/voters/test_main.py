"""The command ``trex-voter``: what it prints, and with which code it ends."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dashboard.local import LocalCluster
from trex_core.cluster import parse_cluster

SOON_S = 30.0


@pytest.fixture
def cluster(tmp_path):
    with LocalCluster(tmp_path / "c", voters=1) as local:
        yield local


def voter(cluster, *arguments, flags=()):
    return subprocess.run(
        [sys.executable, *flags, "-m", "voters", *arguments],
        env={**os.environ, "TREX_CONFIG": str(cluster.config_path)},
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )


def children_of(pid):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(process.name))
    return found


def test_a_journal_is_formatted_once_in_its_life(cluster):
    again = voter(cluster, "format", "--id", "1")
    assert again.returncode == 3
    assert "formatted once" in again.stderr
    sound = voter(cluster, "verify", "--id", "1")
    assert (sound.returncode, "sound" in sound.stdout) == (0, True)
    told = voter(cluster, "inspect", "--id", "1")
    assert (told.returncode, "segment 1" in told.stdout) == (0, True)


def test_a_missing_journal_is_refused(cluster):
    journal = cluster.directory / "voter-1" / "journal"
    for path in journal.iterdir():
        path.unlink()
    journal.rmdir()
    for verb in ("run", "verify", "inspect"):
        ended = voter(cluster, verb, "--id", "1")
        assert ended.returncode == 3, ended
        assert "format" in ended.stderr


def test_a_damaged_journal_is_refused_with_file_and_offset(cluster):
    (segment,) = (cluster.directory / "voter-1" / "journal").iterdir()
    data = bytearray(segment.read_bytes())
    data[100] ^= 0xFF
    segment.write_bytes(data)
    for verb in ("verify", "run"):
        ended = voter(cluster, verb, "--id", "1")
        assert ended.returncode == 3, ended
        assert f"{segment} at byte" in ended.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [("hartbeat_ms = 5", "hartbeat_ms"), ("[stream]\nport = 'x'", "TOML"), (None, "trex init")],
    ids=["unknown key", "no TOML", "no file"],
)
def test_a_cluster_file_that_cannot_be_used_is_refused(cluster, text, told):
    if text is None:
        cluster.config_path.unlink()
    else:
        cluster.config_path.write_text(f"{text}\n" + cluster.config_path.read_text())
    for verb in ("run", "format", "verify"):
        ended = voter(cluster, verb, "--id", "1")
        assert ended.returncode == 1, ended
        assert told.lower() in ended.stderr.lower() or "cluster.toml" in ended.stderr


def test_an_unknown_voter_and_a_wrong_option_are_refused(cluster):
    unknown = voter(cluster, "run", "--id", "7")
    assert (unknown.returncode, "no voter 7" in unknown.stderr) == (1, True)
    assert voter(cluster, "run", "--id", "x").returncode == 2
    assert voter(cluster, "run").returncode == 2


def test_a_port_in_use_is_named(cluster):
    port = parse_cluster(cluster.config_path.read_text()).voter(1).client_port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        ended = voter(cluster, "run", "--id", "1")
    assert ended.returncode == 1
    assert f"client_port of voter 1 = {port}" in ended.stderr
    assert "is in use" in ended.stderr


def test_without_assertions_it_does_not_run(cluster):
    ended = voter(cluster, "run", "--id", "1", flags=("-O",))
    assert ended.returncode == 1
    assert "-O" in ended.stderr


def test_it_tells_in_json_lines_what_it_does_and_ends_in_order(cluster):
    child = cluster.start_voter(1)
    child.wait_for_line('"voter.ready"', SOON_S)
    child.wait_for_line('"role": "leader"', SOON_S)
    child.wait_for_line('"voter.archive.ready"', SOON_S)
    assert child.terminate(SOON_S) == 0
    events = [json.loads(line) for line in child.log.read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.index("voter.ready") < names.index("voter.stop.asked") < len(names) - 1
    assert names[-1] == "voter.stopped"
    assert all({"time", "level", "event"} <= event.keys() for event in events)
    roles = [event for event in events if event["event"] == "voter.role.changed"]
    assert [role["role"] for role in roles][-1] == "leader"
    assert all(role["why"] for role in roles)


def test_a_voter_takes_as_many_files_as_it_may(cluster):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    run = (sys.executable, "-m", "voters", "run", "--id", "1")
    process = subprocess.Popen(
        ["sh", "-c", 'ulimit -S -n 256; exec "$@"', "sh", *run],
        env={**os.environ, "TREX_CONFIG": str(cluster.config_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        archive = _event(process, "voter.archive.ready")["pid"]
        for each in (process.pid, archive):
            assert resource.prlimit(each, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        process.terminate()
        process.wait(SOON_S)
        process.stderr.close()


def test_a_second_run_of_the_same_voter_is_refused(cluster):
    cluster.start_voter(1).wait_for_line('"voter.ready"', SOON_S)
    ended = voter(cluster, "run", "--id", "1")
    assert ended.returncode == 3
    assert "another process uses this journal" in ended.stderr


def test_the_archive_process_dies_with_a_killed_voter_and_is_started_again_alone(cluster):
    process = subprocess.Popen(
        [sys.executable, "-m", "voters", "run", "--id", "1"],
        env={**os.environ, "TREX_CONFIG": str(cluster.config_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first = _event(process, "voter.archive.ready")["pid"]
        os.kill(first, signal.SIGKILL)
        _event(process, "voter.archive.ended")
        second = _event(process, "voter.archive.ready")["pid"]
        assert children_of(process.pid) == [second]
        gone = os.pidfd_open(second)
        process.kill()
        process.wait()
        readable, _, _ = select.select([gone], [], [], SOON_S)
        assert readable, "the archive ends when its voter was killed"
        os.close(gone)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _event(process, name):
    deadline = time.monotonic() + SOON_S
    for line in process.stderr:
        event = json.loads(line)
        if event["event"] == name:
            return event
        assert time.monotonic() < deadline, f"no {name}"
    raise AssertionError(f"it ended without {name}")
