"""The log as it is: this module alone asks every voter for it, and compares what they say.

It comes from the voters' archives over TCP, never from the stream. The chain over the values is
computed anew here; each voter's must be the same.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from listeners.catchup import CatchupClient, CatchupError
from listeners.credentials import Credentials
from listeners.trust import Trust
from trex_core.cluster import ClusterConfig
from trex_core.messages import CatchupEntries, OutcomeStatus, Value, decode_value
from trex_core.metadata.commands import Change
from trex_core.metadata.state import EMPTY, MetadataState, apply
from trex_core.sessions import NO_SESSIONS, deliver
from trex_core.state import chain_next, chain_start

PATIENCE_S = 60.0
"""So long a voter's archive may take until it answers."""


@dataclass
class Log:
    """All slots from 1: ``values[n - 1]`` and ``chains[n]`` belong to slot n (``chains[0]`` is the
    beginning), ``changes`` is what a slot changed, if anything."""

    chains: list[bytes]
    raw: list[bytes] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    changes: dict[int, tuple[Change, ...]] = field(default_factory=dict)
    state: MetadataState = EMPTY
    _sessions: object = NO_SESSIONS
    _keys: dict[str, list[tuple[int, str | None]]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last slot."""
        return len(self.values)

    def add(self, data: bytes) -> None:
        """Take the value of the next slot."""
        slot, value = self.last + 1, decode_value(data)
        changed: tuple[Change, ...] = ()

        def on_command(at: int, command: bytes) -> tuple[int, bytes]:
            nonlocal changed
            self.state, result, changed = apply(self.state, at, command)
            return OutcomeStatus.APPLIED, result

        self._sessions, _ = deliver(self._sessions, slot, value, on_command)
        self.raw.append(data)
        self.values.append(value)
        self.chains.append(chain_next(self.chains[-1], slot, data))
        if changed:
            self.changes[slot] = changed
        for change in changed:
            if change.kind == "config":
                new = None if change.new is None else change.new.value
                self._keys.setdefault(change.key, []).append((slot, new))

    def at(self, key: str, slot: int) -> tuple[str | None, int]:
        """The value of a configuration key as of ``slot``, and the slot that wrote it (absent:
        None, 0)."""
        written = self._keys.get(key, [])
        place = bisect_right(written, slot, key=lambda row: row[0])
        if not place or written[place - 1][1] is None:
            return None, 0
        wrote, value = written[place - 1]
        return value, wrote

    def writes(self) -> Counter[tuple[str, str]]:
        """How often each (key, value) was written."""
        return Counter(
            (key, value)
            for key, written in self._keys.items()
            for _, value in written
            if value is not None
        )

    def slot_of(self, key: str, value: str) -> int | None:
        """The slot that wrote ``value`` at ``key`` first."""
        return next((slot for slot, new in self._keys.get(key, []) if new == value), None)


async def read_log(config: ClusterConfig, folder: Path, voters: tuple[int, ...], last: int) -> Log:
    """The log up to ``last``, asked of every one of ``voters``. Fails when one differs from the
    first, in a value or in the chain before it."""
    held = Credentials(folder, config.cluster_id_bytes)
    log = Log([chain_start(config.cluster_id_bytes)])
    for voter in voters:
        counters: Counter[str] = Counter()
        client = CatchupClient(
            config, held, "log reader", counters, None, Trust(config, held, counters)
        )
        try:
            first, until_s = 1, time.monotonic() + PATIENCE_S
            while first <= last:
                answer = None
                with suppress(CatchupError):
                    answer = await client.entries(voter, first)
                if not isinstance(answer, CatchupEntries) or not answer.values:
                    assert time.monotonic() < until_s, f"voter {voter}, slot {first}: {answer}"
                    await anyio.sleep(0.05)  # its archive may still be starting, or reading
                    continue
                assert answer.chain_before == log.chains[first - 1], f"voter {voter}, slot {first}"
                for slot, data in enumerate(answer.values, first):
                    if slot > log.last:
                        log.add(data)
                    assert log.raw[slot - 1] == data, f"voter {voter} differs at slot {slot}"
                first += len(answer.values)
        finally:
            await client.aclose()
    return log
