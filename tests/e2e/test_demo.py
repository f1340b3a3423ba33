"""``trex demo``: twice at once, with somebody attached, killed half way: nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from tests.e2e.harness import MARK, Child, marked_processes, wait_until_gone

ROOT = Path(__file__).parents[2]
TREX = Path(sys.executable).with_name("trex")
DEMO_S_MAX = 60.0


@pytest.fixture
def place():
    """A directory near the root: paths of sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="trex-test-") as directory:
        yield Path(directory)


@pytest.fixture
def start_demo(place, tmp_path):
    """Start demos whose processes, all of them, can be told by a mark."""
    started: list[Child] = []

    def start(name: str, *arguments: str | Path) -> tuple[Child, str]:
        mark = uuid.uuid4().hex
        environment = {MARK: mark, "TMPDIR": str(place), "COLUMNS": "200"}
        child = Child(name, [TREX, "demo", *arguments], tmp_path / f"{name}.log", environment)
        started.append(child)
        return child, mark

    yield start
    for child in started:
        child.kill()


def test_two_demos_at_once_both_tell_the_truth_and_one_can_be_attached_to(start_demo, place):
    plain, plain_mark = start_demo("plain", "--voters", "3")
    few = ("--voters", "3", "--members", "2")
    kept, kept_mark = start_demo("kept", "--keep", "--dir", place / "kept", *few)

    attach = kept.wait_for_line(r"export (TREX_CONFIG)=(\S+)", 2 * DEMO_S_MAX)
    kept.wait_for_line("Ctrl-C ends it all", 10)
    environment = {**os.environ, attach.group(1): attach.group(2)}
    status = subprocess.run(
        [TREX, "status", "--json"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert status.returncode == 0, status.stderr
    counted = subprocess.run(
        [TREX, "sql", "--listener", "observer", "--json", "SELECT count(*) AS n FROM members"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert counted.returncode == 0, counted.stderr
    assert '"n": 1' in counted.stdout or '"n":1' in counted.stdout

    assert plain.wait(2 * DEMO_S_MAX) == 0, plain.output
    took = plain.wait_for_line(r"nothing lost \((\d+) s\)", 1)
    print(f"two demos at once: {took.group(1)} s")
    assert int(took.group(1)) < 2 * DEMO_S_MAX
    assert "failover took" in plain.output
    assert wait_until_gone(list(marked_processes(plain_mark)), 10) == []

    assert kept.running
    kept.send(signal.SIGTERM)
    assert kept.wait(40) == 0, kept.output
    assert wait_until_gone(list(marked_processes(kept_mark)), 10) == []
    assert (place / "kept" / "cluster.toml").exists()
    assert list(place.glob("trex-demo-*")) == []


def test_nothing_is_left_running_when_the_demo_is_killed(start_demo):
    demo, mark = start_demo("killed")
    demo.wait_for_line("writes acknowledged, each", DEMO_S_MAX)
    running = marked_processes(mark)
    assert sum("voters run" in command for command in running.values()) >= 4
    assert any("voters.archive" in command for command in running.values())
    assert any("listeners run" in command for command in running.values())
    assert any("dashboard.member" in command for command in running.values())
    demo.kill()
    left = wait_until_gone(list(running), 10)
    assert left == [], {pid: running[pid] for pid in left}
    assert marked_processes(mark) == {}


def test_a_demo_that_cannot_be_is_refused_in_words(tmp_path):
    for arguments, words in (
        (["--voters", "4"], "3, 5 or 7"),
        (["--members", "1"], "at least 2"),
        (["--import", "no-such-file"], "no-such-file"),
        (["--dir", str(tmp_path / ("deep" * 30))], "too deep"),
        (["--dir", __file__], "cannot be used"),
        (["--dir", str(ROOT)], "not empty"),
    ):
        told = subprocess.run(
            [TREX, "demo", *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert told.returncode in (1, 2), told.stdout + told.stderr
        assert (told.stdout, told.stderr.count("\n")) == ("", 1), told
        assert words in told.stderr
