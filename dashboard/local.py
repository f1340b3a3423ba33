"""A real cluster on this machine: its directory, cluster file and child processes.

This module alone knows how the parts of a cluster are started side by side on loopback, for the
demo, the benchmarks and the end-to-end tests.  Each child is an ordinary ``python -m voters`` or
``python -m listeners``; what is added is that none of them outlives this process, however it
ends: the kernel kills them with it (Linux, ``PR_SET_PDEATHSIG``), so they must be started from a
thread that lives as long as the process, the main one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dashboard.authority import make_authority
from dashboard.cluster_init import cluster_file, format_voters
from dashboard.ports import PortBlock
from trex_core.cluster import parse_cluster
from trex_core.credentials import FOLDER
from voters.config import ADMIN

LINES_KEPT: Final = 20_000
"""Most lines of a child's output kept in memory; its log file keeps them all."""
TERMINATE_S: Final = 10.0
"""Seconds a child gets to stop after SIGTERM before it is killed."""


_LIFELINE: Final = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(parent):
    sys.exit(0)
os.execv(command[0], command)
"""
"""Runs in the child before the real program: ask to be killed with the parent, then become it."""


class Child:
    """One running program of the cluster. Its output goes to ``log`` and can be waited for."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        self._lines: list[str] = []
        self._dropped = 0
        self._ended = False
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _LIFELINE, str(os.getpid()), *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        threading.Thread(target=self._read, name=f"log of {name}", daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("ab") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                with self._changed:
                    self._lines.append(line.decode(errors="replace").rstrip("\n"))
                    if len(self._lines) > LINES_KEPT:
                        del self._lines[: LINES_KEPT // 2]
                        self._dropped += LINES_KEPT // 2
                    self._changed.notify_all()
        self.process.stdout.close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    @property
    def output(self) -> str:
        """What it printed lately."""
        with self._changed:
            return "\n".join(self._lines)

    @property
    def line_count(self) -> int:
        """How many lines it printed so far; a place to look on from in :meth:`wait_for_line`."""
        with self._changed:
            return self._dropped + len(self._lines)

    def wait_for_line(self, pattern: str, timeout_s: float, since: int = 0) -> re.Match[str]:
        """Wait until it prints a line that ``pattern`` is found in, looking from line ``since`` on.

        Raises ``TimeoutError`` after ``timeout_s`` seconds and ``ChildProcessError`` when it ends
        without such a line; both carry the end of its output.
        """
        wanted = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self._lines[max(0, since - self._dropped) :]:
                    if found := wanted.search(line):
                        return found
                since = self._dropped + len(self._lines)
                tail = "\n".join(self._lines[-20:])
                if self._ended:
                    raise ChildProcessError(f"{self.name} ended without {pattern!r}:\n{tail}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"{self.name}: no {pattern!r} in {timeout_s} s:\n{tail}")
                self._changed.wait(left_s)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.running:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone: sockets closed, files as they are."""
        self.send(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP: it stands still until :meth:`resume`."""
        self.send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.send(signal.SIGCONT)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; its exit code. Raises ``subprocess.TimeoutExpired``."""
        return self.process.wait(timeout_s)

    def terminate(self, timeout_s: float = TERMINATE_S) -> int:
        """SIGTERM, and wait; SIGKILL if it takes longer than ``timeout_s``. Its exit code."""
        self.resume()
        self.send(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode


class LocalCluster:
    """A cluster whose processes all run here, in ``directory``; a context manager that ends them.

    ``timing`` and ``journal`` are keys of those tables of the cluster file that differ from their
    defaults; ``hosts`` are the voters' addresses, if they are not all 127.0.0.1. Entering it writes
    the cluster file and formats each voter; nothing runs yet.
    """

    def __init__(
        self,
        directory: Path,
        voters: int = 5,
        *,
        name: str = "here",
        timing: Mapping[str, int] | None = None,
        journal: Mapping[str, int] | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.directory = directory.absolute()
        self.voter_ids = tuple(range(1, voters + 1))
        self.config_path = self.directory / "cluster.toml"
        self.children: dict[str, Child] = {}
        self._name = name
        self._timing = dict(timing or {})
        self._journal = dict(journal or {})
        self._hosts = list(hosts) or ["127.0.0.1"] * voters
        self._block: PortBlock | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "logs").mkdir(exist_ok=True)
        self._block = PortBlock()
        self.config_path.write_text(
            cluster_file(
                self._name,
                self._hosts,
                self._block.ports,
                timing=self._timing,
                journal=self._journal,
            )
        )
        config = parse_cluster(self.config_path.read_text(), str(self.config_path))
        self.authority = make_authority(self.directory, config)
        format_voters(self.config_path, config)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def stop(self) -> None:
        """End every child in order with SIGTERM: first who needs the voters (members give their
        leases back), then the voters. Who takes longer than TERMINATE_S is killed."""
        names = {f"voter-{voter}" for voter in self.voter_ids}
        everybody = [child for child in self.children.values() if child.running]
        for round_of in (
            [child for child in everybody if child.name not in names],
            [child for child in everybody if child.name in names],
        ):
            for child in round_of:
                child.resume()
                child.send(signal.SIGTERM)
            deadline = time.monotonic() + TERMINATE_S
            for child in round_of:
                child.terminate(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        """Kill every child that still runs, and free the ports."""
        running = [child for child in self.children.values() if child.running]
        for child in running:
            child.send(signal.SIGKILL)
        for child in running:
            child.process.wait()
        if self._block is not None:
            self._block.close()
            self._block = None

    def credentials(self, name: str = ADMIN) -> Path:
        """The folder of somebody's credentials: "admin", "listener", "voter-1", ..."""
        return self.directory / FOLDER / name

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to find this cluster."""
        return {"TREX_CONFIG": str(self.config_path), "PYTHONUNBUFFERED": "1"}

    def start(
        self, name: str, *arguments: str | Path, extra: Mapping[str, str] | None = None
    ) -> Child:
        """Start ``python -m`` with ``arguments`` as the child ``name``; ``extra`` is added to its
        environment."""
        known = self.children.get(name)
        assert known is None or not known.running, f"{name} runs already"
        child = Child(
            name,
            [sys.executable, "-m", *arguments],
            self.directory / "logs" / f"{name}.log",
            {**self.environment, **(extra or {})},
        )
        self.children[name] = child
        return child

    def start_voter(self, voter: int) -> Child:
        """Start voter ``voter``, the first time or again."""
        return self.start(f"voter-{voter}", "voters", "run", "--id", str(voter))

    def start_voters(self) -> None:
        """Start every voter that does not run."""
        for voter in self.voter_ids:
            child = self.children.get(f"voter-{voter}")
            if child is None or not child.running:
                self.start_voter(voter)

    def voter(self, voter: int) -> Child:
        """The process of voter ``voter``."""
        return self.children[f"voter-{voter}"]

    def start_listener(self, name: str, *, drop_percent: int = 0) -> Child:
        """Start a ``trex-listener`` that stores in ``directory/name``; it loses ``drop_percent`` of
        the stream's datagrams."""
        return self.start(
            name,
            *("listeners", "run", "--name", name, "--dir", self.directory / name),
            extra={"TREX_TEST_DROP_PERCENT": str(drop_percent)} if drop_percent else None,
        )
