"""Real processes for end-to-end tests: start, kill, pause, and wait for what they say or do.

Nothing here waits by sleeping: it waits for a line, for the end of a process, or for an answer.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from dashboard.local import Child, LocalCluster
from trex_core.cluster import ClusterConfig, parse_cluster
from trex_core.metadata.commands import (
    ConfigEntry,
    ConfigGet,
    ConfigList,
    ConfigPage,
    ConfigPut,
    Done,
    decode_reply,
    decode_result,
    encode_command,
    encode_question,
)
from voters.driver import Driver, OutcomeUnknown

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


def config_of(cluster: LocalCluster) -> ClusterConfig:
    """What the cluster's file says."""
    return parse_cluster(cluster.config_path.read_text(), str(cluster.config_path))


@dataclass
class Ledger:
    """What the cluster acknowledged: key -> (value, slot), each key written once. It may be waited
    for by count, so that a test does something *during* a load."""

    acknowledged: dict[str, tuple[str, int]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    _waiters: list[tuple[int, anyio.Event]] = field(default_factory=list)

    def note(self, key: str, value: str, slot: int) -> None:
        assert key not in self.acknowledged, f"{key} is written once only"
        self.acknowledged[key] = (value, slot)
        self.times.append(time.monotonic())
        for count, event in self._waiters:
            if len(self.acknowledged) >= count:
                event.set()

    async def more(self, count: int, timeout_s: float = 30.0) -> None:
        """Wait for ``count`` more writes than there are now."""
        event = anyio.Event()
        self._waiters.append((len(self.acknowledged) + count, event))
        with anyio.fail_after(timeout_s):
            await event.wait()

    @property
    def slot(self) -> int:
        """The highest slot that was acknowledged."""
        return max((slot for _, slot in self.acknowledged.values()), default=0)


async def write_for_ever(driver: Driver, ledger: Ledger, name: str, size: int = 16) -> None:
    """Write ``name/1``, ``name/2``, … one after another, until cancelled. A write of unknown
    outcome is resolved under its own id before the next one."""
    for count in itertools.count(1):
        key, value = f"{name}/{count}", f"{name} {count} ".ljust(size, ".")
        try:
            outcome = await driver.submit(encode_command(ConfigPut(key, value)))
        except OutcomeUnknown as error:
            outcome = await driver.resolve(error, 60)
        result = decode_result(outcome.body)
        assert result == Done(outcome.slot), result
        ledger.note(key, value, outcome.slot)


async def put(driver: Driver, key: str, value: str, deadline_s: float | None = None) -> int:
    """Write one key; its slot."""
    outcome = await driver.submit(encode_command(ConfigPut(key, value)), deadline_s)
    result = decode_result(outcome.body)
    assert isinstance(result, Done), result
    return result.slot


async def get(driver: Driver, key: str) -> ConfigEntry | None:
    """Read one key, linearizably."""
    answer = await driver.query(encode_question(ConfigGet(key)))
    reply = decode_reply(answer.body)
    assert reply is None or isinstance(reply, ConfigEntry), reply
    return reply


async def all_config(driver: Driver) -> dict[str, tuple[str, int]]:
    """Every key with its value and slot, read linearizably page by page."""
    rows: dict[str, tuple[str, int]] = {}
    after, more = "", True
    while more:
        answer = await driver.query(encode_question(ConfigList(after=after)))
        page = decode_reply(answer.body)
        assert isinstance(page, ConfigPage), page
        rows.update({entry.key: (entry.value, entry.slot) for entry in page.entries})
        more = page.more
        after = page.entries[-1].key if page.entries else after
    return rows


def missing(ledger: Ledger, found: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """What was acknowledged and is not there as it was acknowledged."""
    return {key: row for key, row in ledger.acknowledged.items() if found.get(key) != row}
