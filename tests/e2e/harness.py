"""Real processes for end-to-end tests: start, kill, pause, and wait for what they say or do.

Nothing here waits by sleeping: it waits for a line, for the end of a process, or for an answer.
"""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

from dashboard.local import Child, LocalCluster

__all__ = ["Child", "LocalCluster", "marked_processes", "wait_until_gone"]

MARK = "TREX_TEST_MARK"
"""Environment variable by which a test knows the processes it is the cause of."""


def marked_processes(mark: str) -> dict[int, str]:
    """Every living process, by id, whose environment holds ``mark``, with its command line."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(entry.name)] = command
        except OSError:
            continue  # it ended while we looked
    return found


def wait_until_gone(pids: list[int], timeout_s: float) -> list[int]:
    """Wait until these processes have ended; those that have not after ``timeout_s`` seconds."""
    poll = select.poll()
    handles = {}
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        handles[handle] = pid
        poll.register(handle, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while handles and (left_s := deadline - time.monotonic()) > 0:
        for handle, _ in poll.poll(left_s * 1000):
            poll.unregister(handle)
            os.close(handle)
            del handles[handle]
    for handle in handles:
        os.close(handle)
    return sorted(handles.values())


def kill_all(children: list[Child]) -> None:
    """SIGKILL to all of them at one moment: none sees another go first."""
    for child in children:
        child.send(signal.SIGKILL)
    for child in children:
        child.process.wait()
