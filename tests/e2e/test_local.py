"""Children of a local cluster end with their owner, whatever ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from dashboard.local import Child
from dashboard.ports import PortBlock
from tests.e2e.harness import MARK, marked_processes, wait_until_gone

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, pathlib
from dashboard.local import Child
code = "import time; print('up', flush=True); time.sleep(600)"
child = Child("one", [sys.executable, "-c", code],
              pathlib.Path(sys.argv[1]), {})
child.wait_for_line("up", 20)
print("ready", flush=True)
child.wait(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_owner(tmp_path, number):
    mark = uuid.uuid4().hex
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path / "log"],
        cwd=ROOT,
        env={MARK: mark},
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    pids = list(marked_processes(mark))
    assert len(pids) == 2
    owner.send_signal(number)
    owner.wait(10)
    owner.stdout.close()
    assert wait_until_gone(pids, 10) == []


def test_waiting_for_a_line_that_never_comes_says_what_was_printed(tmp_path):
    child = Child("one", [sys.executable, "-c", "print('no such luck')"], tmp_path / "log", {})
    with pytest.raises(ChildProcessError, match="no such luck"):
        child.wait_for_line("luck at last", 20)
    assert child.wait(10) == 0
    assert (tmp_path / "log").read_text() == "no such luck\n"


def test_two_port_blocks_never_share_a_port():
    blocks = [PortBlock() for _ in range(8)]
    try:
        ports = [port for block in blocks for port in block.ports]
        assert len(set(ports)) == len(ports)
    finally:
        for block in blocks:
            block.close()
