"""``trex-dash`` at a real terminal: live, recording, of a recording, and how it ends."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dashboard.dash import app
from dashboard.local import LocalCluster
from tests.e2e.harness import MARK, marked_processes, wait_until_gone
from tests.e2e.terminal import Terminal

BIN = Path(sys.executable).parent
DASH = BIN / "trex-dash"
RUNS = Path(__file__).parents[1] / "dashboard" / "recordings"
FAILOVER = RUNS / "failover.trexrec.gz"


@pytest.fixture
def place():
    """A directory near the root, where temporary things lie too: paths of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="trex-test-") as directory:
        yield Path(directory)


def dash(place: Path, *arguments: str | Path, **size: int) -> Terminal:
    scratch = place / "tmp"
    scratch.mkdir(exist_ok=True)
    return Terminal([DASH, *arguments], {"TMPDIR": str(scratch)}, **size)


def test_a_cluster_is_watched_recorded_and_replayed(place):
    record = place / "run.trexrec"
    with LocalCluster(place / "cluster", 3, name="harbour") as cluster:
        live = ("--config", cluster.config_path, "--record", record)
        with dash(place, *live) as watched:
            watched.wait_for("harbour +nothing heard yet")  # before any voter runs
            cluster.start_voters()
            first = int(watched.wait_for(r"voter (\d): leads under ballot").group(1))
            # Until slot 1 is fixed a leader needs every voter: the others must know of it first.
            watched.wait_for(r"(?s)(follower +[\d.]+ +\d+ +[1-9].*){2}")
            cluster.voter(first).kill()
            watched.wait_for(rf"voter {first}: (is )?not heard")
            second = int(watched.wait_for(rf"voter ([^\D{first}]): leads under ballot").group(1))
            watched.press("4")
            watched.press("\x11")  # ctrl+q: in the SQL prompt, q is a letter
            assert watched.wait() == 0
            assert watched.restored
        assert cluster.voter(second).running
    assert list((place / "tmp").iterdir()) == []

    with dash(place, "--replay", record, "--speed", "50") as replayed:
        replayed.wait_for(r"REPLAY run\.trexrec .* (paused|ended)")
        for words in (
            rf"voter {first}: leads under ballot",
            rf"voter {first}: (is )?not heard",
            rf"voter {second}: leads under ballot",
            "the recording ends here",
        ):
            replayed.wait_for(words)
        replayed.press("q")
        assert replayed.wait() == 0
    assert list((place / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_the_terminal_as_it_was(place, number):
    with dash(place, "--replay", FAILOVER, "--speed", "0", "--at", "5") as shown:
        shown.wait_for(r"REPLAY failover\.trexrec\.gz 00:05")
        shown.send(number)
        assert shown.wait() == 0
        assert shown.restored
    assert list((place / "tmp").iterdir()) == []


def test_it_fits_the_smallest_terminal(place):
    with dash(place, "--replay", FAILOVER, "--speed", "0", "--at", "12", width=80, height=24) as it:
        it.wait_for(r"REPLAY")
        it.wait_for(r"leads under ballot")
        it.press("q")
        assert it.wait() == 0


def damaged() -> bytes:
    data = bytearray(gzip.decompress(FAILOVER.read_bytes()))
    data[len(data) // 2] ^= 1
    return bytes(data)


def test_what_cannot_be_shown_is_one_line_and_an_exit_code(place):
    (place / "text").write_text("no recording")
    (place / "damaged").write_bytes(damaged())
    (place / "bad.toml").write_text("name = 7")
    (place / "taken").mkdir()
    (place / "taken" / "store.duckdb").write_text("no database")
    for code, words, arguments in (
        (1, "text is no recording", ("--replay", place / "text")),
        (1, r"damaged is damaged: the \w+.* at offset \d+", ("--replay", place / "damaged")),
        (1, "No such file", ("--replay", place / "nothing")),
        (1, "a directory of its own", ("--replay", FAILOVER, "--dir", place / "taken")),
        (1, "cannot read the cluster file", ("--config", place / "none.toml")),
        (1, "bad.toml", ("--config", place / "bad.toml")),
    ):
        with dash(place, *arguments, width=300) as refused:
            assert refused.wait() == code, (arguments, refused.screen.text)
            lines = [each for each in refused.screen.text.splitlines() if "trex-dash: " in each]
            assert len(lines) == 1, refused.screen.text
            refused.wait_for(words, 1)
            assert "Traceback" not in refused.screen.text
    assert list((place / "tmp").iterdir()) == []


def test_a_cluster_that_cannot_be_followed_is_one_line(place):
    with LocalCluster(place / "cluster", 3) as cluster:
        text = cluster.config_path.read_text()
        away = cluster.directory / "away.toml"
        away.write_text(text.replace("[stream]\n", '[stream]\ninterface = "203.0.113.9"\n'))
        (place / "broken").mkdir()
        (place / "broken" / "store.duckdb").write_text("no database")
        for code, words, arguments in (
            (1, r"cannot join multicast group", ("--config", away)),
            (3, r"store\.duckdb", ("--config", cluster.config_path, "--dir", place / "broken")),
            (1, "not overwritten", ("--config", cluster.config_path, "--record", away)),
        ):
            with dash(place, *arguments, width=300) as refused:
                assert refused.wait() == code, refused.screen.text
                refused.wait_for(rf"trex-dash: .*{words}", 1)
                assert "Traceback" not in refused.screen.text


def test_options_that_contradict_each_other_are_one_line():
    for words, arguments in (
        ("name a recording with --replay", ["--speed", "2"]),
        ("name a recording with --replay", ["--at", "2"]),
        ("recorded already", ["--replay", str(FAILOVER), "--record", "x"]),
        ("what is past", ["--replay", str(FAILOVER), "--admin"]),
        ("there are textual-dark", ["--replay", str(FAILOVER), "--theme", "pink"]),
    ):
        told = CliRunner().invoke(app, arguments)
        assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
        assert words in told.stderr


def test_without_a_terminal_it_says_what_else_there_is():
    for command in ([DASH, "--replay", FAILOVER], [BIN / "trex", "demo", "--dash"]):
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert told.returncode == 2
        assert told.stderr.count("\n") == 1 and "trex status" in told.stderr


def test_the_environment_names_every_option(place):
    with Terminal(
        [DASH],
        {
            "TMPDIR": str(place),
            "TREX_DASH_REPLAY": str(FAILOVER),
            "TREX_DASH_SPEED": "0",
            "TREX_DASH_AT": "7.5",
            "TREX_DASH_THEME": "textual-light",
        },
    ) as shown:
        shown.wait_for(r"REPLAY failover\.trexrec\.gz 00:07")
        shown.press("q")
        assert shown.wait() == 0


# --- on the demo ------------------------------------------------------------------------------


def demo(place: Path, *arguments: str) -> tuple[Terminal, str]:
    mark = uuid.uuid4().hex
    environment = {"TMPDIR": str(place), MARK: mark}
    return Terminal([BIN / "trex", "demo", "--dash", *arguments], environment), mark


def test_a_demo_is_watched_and_ends_with_the_dashboard(place):
    shown, mark = demo(place, "--voters", "3", "--members", "2")
    with shown:
        shown.wait_for(r"demo +live", 60)
        shown.wait_for(r"demo: voter \d, the leader, killed", 90)
        shown.wait_for(r"voter \d: leads under ballot 0\.[2-9]")
        shown.press("q")
        assert shown.wait(60) == 0
        assert shown.restored
    assert wait_until_gone(list(marked_processes(mark)), 10) == []
    assert list(place.iterdir()) == []


def test_nothing_is_left_running_when_it_is_killed(place):
    shown, mark = demo(place, "--voters", "3", "--members", "2")
    with shown:
        shown.wait_for(r"leads under ballot", 60)
        running = list(marked_processes(mark))
        assert len(running) > 4
        shown.send(signal.SIGKILL)
        shown.wait()
    assert wait_until_gone(running, 10) == []
    assert marked_processes(mark) == {}


def test_a_demo_that_fails_says_so(place):
    (place / "full").mkdir()
    (place / "full" / "mine").write_text("precious")
    shown, _ = demo(place, "--dir", str(place / "full"))
    with shown:
        assert shown.wait(60) == 1
        shown.wait_for("is not empty", 1)


def test_a_demo_whose_voters_die_is_told_on_the_screen(place):
    shown, mark = demo(place, "--voters", "3", "--members", "2")
    with shown:
        shown.wait_for(r"leads under ballot", 60)
        (child,) = (
            pid
            for pid, command in marked_processes(mark).items()
            if "dashboard.cli demo" in command
        )
        os.kill(child, signal.SIGKILL)
        shown.wait_for("the demo has ended", 30)
        shown.press("q")
        assert shown.wait(60) == 1
    assert wait_until_gone(list(marked_processes(mark)), 10) == []
