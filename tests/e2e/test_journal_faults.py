"""A disk that fails under a real voter: code 3, the reason in one line, and a restart that works.

strace makes the n-th call of each thread fail, below Python and below the C library.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.harness import LocalCluster, all_config, config_of, put
from voters.driver import TrexError, open_driver

SOON_S = 60.0
JOURNAL = {"segment_bytes": 1 << 20, "retain_bytes": 1 << 20, "free_bytes_min": 1 << 20}
FAULTS = [
    ("fdatasync", "error=EIO", 1),
    ("fdatasync", "error=EIO", 9),
    ("pwrite64", "error=EIO", 1),
    ("pwrite64", "error=ENOSPC", 4),
    ("pwrite64", "retval=1", 3),
    ("fsync", "error=EIO", 1),
]


@pytest.fixture(scope="module")
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed (Debian: apt-get install strace)")
    tried = subprocess.run(
        [found, "-f", "-o", os.devnull, sys.executable, "-c", "pass"],
        capture_output=True, text=True, timeout=SOON_S,
    )  # fmt: skip
    if tried.returncode != 0:
        pytest.skip(f"processes may not be traced here: {tried.stderr.strip()[-200:]}")
    return found


@pytest.mark.parametrize(("call", "fault", "when"), FAULTS)
async def test_a_failed_call_ends_the_voter_in_one_line_and_loses_nothing(
    tmp_path, strace, call, fault, when
):
    with LocalCluster(tmp_path, 1, journal=JOURNAL) as cluster:
        cluster.start_voters()
        config = config_of(cluster)
        acknowledged = {}
        async with open_driver(config, cluster.credentials(), deadline_s=SOON_S) as driver:
            for count in range(3):
                acknowledged[f"before/{count}"] = await put(driver, f"before/{count}", "x")
        cluster.voter(1).kill()

        log = tmp_path / "traced.log"
        traced = _traced(cluster, log, [strace, "-f", "-qq", "-o", os.devnull,
                                        "-e", f"trace={call}",
                                        "-e", f"inject={call}:{fault}:when={when}"])  # fmt: skip
        try:
            deadline = time.monotonic() + SOON_S
            async with open_driver(config, cluster.credentials()) as driver:
                count = 0
                while traced.poll() is None and time.monotonic() < deadline:
                    key, count = f"while/{count}", count + 1
                    try:
                        acknowledged[key] = await put(driver, key, "y", 1.0)
                    except TrexError:
                        continue  # not acknowledged: it may be there or not
            assert traced.poll() == 3, log.read_text()
        finally:
            if traced.poll() is None:
                os.killpg(traced.pid, signal.SIGKILL)
                traced.wait()
        told = [line for line in log.read_text().splitlines() if not _is_json(line)]
        assert len(told) == 1, told
        assert told[0].startswith("trex-voter: ")
        assert str(cluster.directory / "voter-1" / "journal") in told[0]
        reason = {"error=EIO": "Input/output error", "error=ENOSPC": "No space left"}
        assert reason.get(fault, "short write: 1 of") in told[0]

        cluster.start_voters()
        async with open_driver(config, cluster.credentials(), deadline_s=SOON_S) as driver:
            found = await all_config(driver)
        kept = {key: slot for key, (_, slot) in found.items() if key in acknowledged}
        assert kept == acknowledged


def _traced(cluster, log, strace):
    with log.open("wb") as output:
        return subprocess.Popen(
            [*strace, sys.executable, "-m", "voters", "run", "--id", "1"],
            env={**os.environ, **cluster.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
