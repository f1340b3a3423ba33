"""A replicated state machine as every simulated node holds it: real sessions, real metadata.

This module alone applies fixed values in a simulated world and cuts snapshots of the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trex_core.messages import CHAIN_BYTES, Genesis, decode_value
from trex_core.metadata.state import EMPTY, MetadataState, apply, state_chunks, state_from
from trex_core.sessions import NO_SESSIONS, Delivered, Sessions, deliver
from trex_core.snapshot import decode_snapshot, encode_snapshot

NEWER_LEVEL = 2
"""A feature level that only newer programs know; what its commands do is what level 1 says."""

if TYPE_CHECKING:
    from tests.simulator.observer import Observer


class Replica:
    """Sessions and metadata as of ``slot``. Both are immutable, so keeping a state is free.

    ``level`` is the feature level its program knows; without an ``observer`` nobody is told."""

    def __init__(self, owner: object, observer: Observer | None, level: int = 1) -> None:
        self.owner = owner
        self.observer = observer
        self.level = level
        self.slot = 0
        self.sessions: Sessions = NO_SESSIONS
        self.machine: MetadataState = EMPTY

    def apply(self, slot: int, value: bytes) -> Delivered | None:
        """Apply the next fixed value. Raises ``TooOld``."""
        assert slot == self.slot + 1, f"{self.owner} applies {slot} after {self.slot}"
        self.slot = slot
        self.sessions, delivered = deliver(self.sessions, slot, decode_value(value), self._command)
        return delivered

    def _command(self, slot: int, command: bytes) -> tuple[int, bytes]:
        plain = command
        if self.level >= NEWER_LEVEL and command[1] == NEWER_LEVEL:
            plain = at_level(command, 1)
        self.machine, result = self._apply(slot, plain)
        if self.observer is not None:
            if command[1] > self.level:
                self.observer.fail(f"{self.owner} goes on past slot {slot}: it is too old for it")
            self.observer.on_applied(self.owner, slot, command, result)
        return 0, result

    def _apply(self, slot: int, command: bytes) -> tuple[MetadataState, bytes]:
        machine, result, _ = apply(self.machine, slot, command)
        return machine, result

    def snapshot(self, chain: bytes, genesis: Genesis) -> bytes:
        """The bytes of a snapshot here."""
        chunks = encode_snapshot(
            self.slot, chain, genesis, self.sessions, state_chunks(self.machine)
        )
        return b"".join(chunks)

    def restore(self, data: bytes) -> tuple[int, bytes, Genesis]:
        """Take the state of a snapshot; returns its slot, chain and genesis."""
        snapshot = decode_snapshot(data)
        self.slot = snapshot.slot
        self.sessions = snapshot.sessions
        self.machine = state_from(snapshot.machine)
        return snapshot.slot, snapshot.chain, snapshot.genesis

    def copy_from(self, other: Replica) -> None:
        """Take the state of another replica of the same node (its store)."""
        self.slot, self.sessions, self.machine = other.slot, other.sessions, other.machine

    def machine_bytes(self) -> bytes:
        """The whole state as bytes, to compare replicas."""
        return self.snapshot(bytes(CHAIN_BYTES), Genesis((), ()))


def at_level(command: bytes, level: int) -> bytes:
    """The same command at another feature level."""
    return bytes((command[0], level)) + command[2:]
