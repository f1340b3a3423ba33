"""The log as it is: this module alone asks every voter for it, and compares what they say.

It comes from the voters' archives over TCP, never from the stream. The chain over the values is
computed anew here; each voter's must be the same, and so must each snapshot a voter offers instead
of slots that it keeps no more: the state that the log makes, to the byte.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec

from listeners.catchup import CatchupAnswer, CatchupClient, CatchupError
from listeners.credentials import Credentials
from listeners.trust import Trust
from trex_core.cluster import ClusterConfig
from trex_core.messages import (
    CatchupEntries,
    Genesis,
    Kind,
    OutcomeStatus,
    SnapshotOffer,
    Value,
    decode_value,
)
from trex_core.metadata.commands import Change
from trex_core.metadata.state import EMPTY, MetadataState, apply, state_chunks
from trex_core.sessions import NO_SESSIONS, Sessions, deliver
from trex_core.snapshot import encode_snapshot
from trex_core.state import chain_next, chain_start

PATIENCE_S = 60.0
"""So long a voter's archive may take until it answers."""
FOLLOW_S = 0.05
"""So often a log that is cut short as it grows is read on."""
FOLLOWER_PATIENCE_S = 20.0
"""So long nobody may know of a slot that was written; less than a harm waits for answers."""
LEAD_SLOTS = 30
"""So far may those that write be ahead of the reader: every voter keeps twice that, and more."""
STALE_ANSWERS = 2
"""So often one voter may have nothing new while others have: it may be stopped."""


@dataclass
class Log:
    """All slots from 1: ``values[n - 1]`` and ``chains[n]`` belong to slot n (``chains[0]`` is the
    beginning), ``changes`` is what a slot changed, if anything."""

    chains: list[bytes]
    raw: list[bytes] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    changes: dict[int, tuple[Change, ...]] = field(default_factory=dict)
    states: list[tuple[MetadataState, Sessions]] = field(
        default_factory=lambda: [(EMPTY, NO_SESSIONS)]
    )
    """``states[n]``: what the slots up to n make. They share what did not change."""
    _keys: dict[str, list[tuple[int, str | None]]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last slot."""
        return len(self.values)

    def add(self, data: bytes) -> None:
        """Take the value of the next slot."""
        slot, value = self.last + 1, decode_value(data)
        changed: tuple[Change, ...] = ()
        state, sessions = self.states[-1]

        def on_command(at: int, command: bytes) -> tuple[int, bytes]:
            nonlocal state, changed
            state, result, changed = apply(state, at, command)
            return OutcomeStatus.APPLIED, result

        sessions, _ = deliver(sessions, slot, value, on_command)
        self.states.append((state, sessions))
        self.raw.append(data)
        self.values.append(value)
        self.chains.append(chain_next(self.chains[-1], slot, data))
        if changed:
            self.changes[slot] = changed
        for change in changed:
            if change.kind == "config":
                new = None if change.new is None else change.new.value
                self._keys.setdefault(change.key, []).append((slot, new))

    def capture(self, slot: int) -> bytes:
        """What a snapshot at ``slot`` must be, to the byte."""
        first = self.values[0]
        assert first.kind == Kind.GENESIS, first
        genesis = msgspec.msgpack.decode(first.command, type=Genesis)
        state, sessions = self.states[slot]
        pieces = encode_snapshot(slot, self.chains[slot], genesis, sessions, state_chunks(state))
        return b"".join(pieces)

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


class LogReader:
    """Reads the log of the cluster, and asks single voters what they keep of it."""

    def __init__(self, config: ClusterConfig, folder: Path) -> None:
        self.log = Log([chain_start(config.cluster_id_bytes)])
        self._config = config
        self._credentials = Credentials(folder, config.cluster_id_bytes)
        self._told = 0
        self._moved = anyio.Event()

    def __str__(self) -> str:
        return f"the log is read to {self.log.last}, written to {self._told} at least"

    async def near(self, slot: int) -> None:
        """``slot`` was written. Wait until :meth:`follow` is not far behind it."""
        self._told = max(self._told, slot)
        while self.log.last < slot - LEAD_SLOTS:
            await self._moved.wait()

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[CatchupClient]:
        counters: Counter[str] = Counter()
        trust = Trust(self._config, self._credentials, counters)
        client = CatchupClient(self._config, self._credentials, "log reader", counters, None, trust)
        try:
            yield client
        finally:
            await client.aclose()

    async def follow(self) -> None:
        """Read on while the log grows, for ever: what is read here may be deleted there. Fails when
        it was deleted sooner, everywhere."""
        voters = self._config.voter_ids
        turn = stale = 0
        until_s, offers = time.monotonic() + FOLLOWER_PATIENCE_S, set[int]()
        async with self._asking() as client:
            while True:
                voter, answer = voters[turn % len(voters)], None
                with suppress(CatchupError):  # it is down just now
                    answer = await client.entries(voter, self.log.last + 1)
                if isinstance(answer, CatchupEntries) and answer.values:
                    self._take(voter, answer)
                    until_s, offers, stale = time.monotonic() + FOLLOWER_PATIENCE_S, set(), 0
                    self._moved.set()
                    self._moved = anyio.Event()
                    continue
                if isinstance(answer, SnapshotOffer):
                    offers.add(voter)
                assert len(offers) < len(voters), f"cut above slot {self.log.last}: {answer}"
                late = self._told > self.log.last
                assert not late or time.monotonic() < until_s, (
                    f"{self._told} told, {self.log.last} read: {answer}, {offers}"
                )
                stale += late
                if not isinstance(answer, CatchupEntries) or stale >= STALE_ANSWERS:
                    turn, stale = turn + 1, 0
                await anyio.sleep(FOLLOW_S)

    def _take(self, voter: int, answer: CatchupEntries) -> None:
        """Compare with what was read before; the rest is new."""
        log, first = self.log, answer.first
        assert answer.chain_before == log.chains[first - 1], f"voter {voter}, slot {first}"
        for slot, data in enumerate(answer.values, first):
            if slot > log.last:
                log.add(data)
            assert log.raw[slot - 1] == data, f"voter {voter} differs at slot {slot}"

    async def compare(self, voters: tuple[int, ...], last: int) -> int:
        """Read the log of every one of ``voters`` up to ``last``, from the first slot each keeps.
        Fails when one differs from what is known here, in a value, in the chain or in a snapshot.
        Returns how many of them keep the log in part only. Needs :meth:`follow` meanwhile if any
        does: sessions end and leases expire after ``last``, and a voter cuts there."""
        cut = set()
        for voter in voters:
            async with self._asking() as client:
                first = 1
                while first <= last:
                    answer = await self._answer(client, voter, first)
                    if isinstance(answer, CatchupEntries):
                        self._take(voter, answer)
                        first += len(answer.values)
                        continue
                    cut.add(voter)
                    with anyio.move_on_after(PATIENCE_S):
                        while self.log.last < answer.slot:
                            await self._moved.wait()
                    known = self.log.last >= answer.slot
                    assert known, f"voter {voter}: cut at {answer.slot}, read to {self.log.last}"
                    told = await client.snapshot(answer, (voter,))
                    same = told == self.log.capture(answer.slot)
                    assert same, f"voter {voter}: its snapshot at {answer.slot} is not the log's"
                    first = answer.slot + 1
        return len(cut)

    async def kept(self, voter: int, slot: int) -> bool:
        """Whether ``voter``'s log still reaches back to ``slot``."""
        async with self._asking() as client:
            return isinstance(await self._answer(client, voter, slot), CatchupEntries)

    async def _answer(
        self, client: CatchupClient, voter: int, first: int
    ) -> CatchupEntries | SnapshotOffer:
        """Entries that are there, or a snapshot instead. Its archive may still be starting, or be
        reading."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            answer: CatchupAnswer | CatchupError
            try:
                answer = await client.entries(voter, first)
            except CatchupError as error:
                answer = error
            if isinstance(answer, SnapshotOffer):
                return answer
            if isinstance(answer, CatchupEntries) and answer.values:
                return answer
            assert time.monotonic() < until_s, f"voter {voter}, slot {first}: {answer}"
            await anyio.sleep(0.05)
