"""What cannot be is refused: one clear line, and the exit code that says of what kind it is."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dashboard.authority import make_authority
from tests.e2e.harness import LocalCluster, all_config, config_of, put
from trex_core.messages import COMMAND_BYTES_MAX
from voters.driver import TooLarge, open_driver

REFUSED, USAGE, BROKEN, NO_QUORUM = 1, 2, 3, 4
TREX = Path(sys.executable).with_name("trex")


def told(command, cluster, timeout_s=60, **environment) -> tuple[int, str]:
    """Exit code and all that a command said, on one line."""
    result = subprocess.run(
        [str(each) for each in command],
        env={**os.environ, **cluster.environment, **environment},
        capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def run_voter(cluster: LocalCluster, voter: int) -> tuple[int, str]:
    return told([sys.executable, "-m", "voters", "run", "--id", voter], cluster)


@pytest.fixture
def idle(tmp_path):
    """A formatted cluster of three of which nothing runs yet."""
    with LocalCluster(tmp_path / "cluster", 3) as cluster:
        yield cluster


def segment(cluster: LocalCluster, voter: int, holding: bytes = b"") -> Path:
    """The first journal segment of a voter that holds these bytes."""
    journal = cluster.directory / f"voter-{voter}" / "journal"
    return next(path for path in sorted(journal.glob("*.journal")) if holding in path.read_bytes())


def test_a_missing_journal(idle):
    shutil.rmtree(idle.directory / "voter-1" / "journal")
    code, words = run_voter(idle, 1)
    assert code == BROKEN
    assert "format" in words
    assert "voter-1" in words


def test_a_journal_of_another_voter(idle):
    shutil.rmtree(idle.directory / "voter-1")
    shutil.copytree(idle.directory / "voter-2", idle.directory / "voter-1")
    code, words = run_voter(idle, 1)
    assert code == BROKEN
    assert "voter 2" in words


def test_a_journal_of_another_cluster(idle):
    text = idle.config_path.read_text()
    ours = config_of(idle).cluster_id
    other = "0123456789abcdef" * 2
    idle.config_path.write_text(text.replace(ours, other))
    code, words = run_voter(idle, 1)
    assert code == REFUSED
    assert "certificate is of another cluster" in words
    for made in (idle.credentials().parent, idle.authority.folder):
        shutil.rmtree(made)
    make_authority(idle.directory, config_of(idle))
    code, words = run_voter(idle, 1)
    assert code == BROKEN
    assert "cluster" in words


def test_format_never_overwrites(idle):
    before = segment(idle, 1).read_bytes()
    code, words = told([sys.executable, "-m", "voters", "format", "--id", 1], idle)
    assert code == BROKEN
    assert "voter-1" in words
    assert segment(idle, 1).read_bytes() == before


@pytest.mark.parametrize("port", ["peer_port", "client_port", "archive_port"])
def test_a_port_in_use(idle, port):
    number = getattr(config_of(idle).voter(1), port)
    kinds = [socket.SOCK_STREAM] if port != "peer_port" else [socket.SOCK_STREAM, socket.SOCK_DGRAM]
    for kind in kinds:
        with socket.socket(type=kind) as taken:
            taken.bind(("127.0.0.1", number))
            if kind == socket.SOCK_STREAM:
                taken.listen()
            code, words = run_voter(idle, 1)
        assert code == REFUSED, words
        assert str(number) in words


@pytest.mark.parametrize("program", ["voter", "listener", "client"])
def test_an_unknown_configuration_key(idle, program, tmp_path):
    text = idle.config_path.read_text()
    idle.config_path.write_text(text.replace("[timing]", "[timing]\nhartbeat_ticks = 3"))
    command = {
        "voter": [sys.executable, "-m", "voters", "run", "--id", 1],
        "listener": [sys.executable, "-m", "listeners", "run", "--name", "x", "--dir", tmp_path],
        "client": [TREX, "config", "get", "key"],
    }[program]
    code, words = told(command, idle)
    assert code == REFUSED, words
    assert "hartbeat_ticks" in words
    assert "timing" in words
    assert "cluster.toml" in words


def test_a_voter_that_is_not_in_the_file(idle):
    code, words = run_voter(idle, 9)
    assert code == REFUSED
    assert "1, 2, 3" in words


def test_a_cluster_that_is_down(idle):
    code, words = told([TREX, "config", "put", "a", "b", "--deadline", "1"], idle)
    assert code == NO_QUORUM
    assert "voter" in words


def test_a_verb_that_does_not_exist(idle):
    code, words = told([TREX, "confg", "put"], idle)
    assert code == USAGE
    assert "confg" in words


async def test_a_damaged_journal_and_a_command_over_the_limit(tmp_path):
    with LocalCluster(tmp_path, 3) as cluster:
        cluster.start_voters()
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=30) as driver:
            for count in range(20):
                await put(driver, f"key/{count}", "value " * 50)
            with pytest.raises(TooLarge, match=str(COMMAND_BYTES_MAX)):
                await put(driver, "vast", "v" * COMMAND_BYTES_MAX)
            await put(driver, "large", "v" * (COMMAND_BYTES_MAX - 32))

            voter = 3 if (await driver.find_leader()).voter != 3 else 2
            cluster.voter(voter).kill()
            journal = segment(cluster, voter, b"key/3")
            data = bytearray(journal.read_bytes())
            at = bytes(data).index(b"key/3") + 2
            data[at] ^= 1
            journal.write_bytes(bytes(data))
            code, words = run_voter(cluster, voter)
            assert code == BROKEN
            assert journal.name in words
            assert "at byte" in words
            await put(driver, "the others", "go on")


async def test_a_journal_formatted_again_counts_nowhere(tmp_path):
    with LocalCluster(tmp_path, 3) as cluster:
        cluster.start_voters()
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=30) as driver:
            await put(driver, "a", "b")
            leader = (await driver.find_leader()).voter
            forgetful, other = (voter for voter in cluster.voter_ids if voter != leader)
            cluster.voter(forgetful).kill()
            shutil.rmtree(cluster.directory / f"voter-{forgetful}")
            told([sys.executable, "-m", "voters", "format", "--id", forgetful], cluster)
            code, words = run_voter(cluster, forgetful)
            assert code == BROKEN, words
            assert "incarnation" in words
            assert await put(driver, "c", "d")
            assert cluster.voter(other).running


async def test_a_journal_rolled_back_is_refused_by_its_peers(tmp_path):
    with LocalCluster(tmp_path, 3) as cluster:
        cluster.start_voters()
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=30) as driver:
            await put(driver, "a", "b")
            leader = (await driver.find_leader()).voter
            voter = next(each for each in cluster.voter_ids if each != leader)
            mine = cluster.directory / f"voter-{voter}"
            cluster.voter(voter).terminate()
            shutil.copytree(mine, tmp_path / "older copy")
            for boot in (2, 3):
                again = cluster.start_voter(voter)
                again.wait_for_line(f'"boot": {boot}', 30)
                slot = await put(driver, f"boot/{boot}", "seen")
                while (await driver.status(voter)).fixed < slot:
                    await put(driver, "tick", "tock")
                again.terminate()
            shutil.rmtree(mine)
            shutil.copytree(tmp_path / "older copy", mine)
            code, words = run_voter(cluster, voter)
            assert code == BROKEN, words
            assert "boot" in words
            assert "boot/3" in await all_config(driver)
