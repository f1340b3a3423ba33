"""The applied side of a voter: this module alone holds sessions and state machine at one slot.

It applies fixed runs in order, answers reads of the applied state, captures it for snapshots, and
is put back to a snapshot.  It knows no peers, clients, disk or clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec

from trex_core.machine import GuardedMachine, Machine
from trex_core.messages import Genesis, decode_value
from trex_core.metadata.commands import why_inadmissible
from trex_core.metadata.state import MetadataMachine
from trex_core.sessions import (
    NO_SESSIONS,
    Delivered,
    Sessions,
    deliver,
    next_sequence,
    why_not_owner,
)
from trex_core.snapshot import Snapshot, encode_snapshot
from trex_core.state import FixedRun

_encoder: Final = msgspec.msgpack.Encoder()


class Capture(msgspec.Struct, frozen=True):
    """The state at ``slot``, captured for a snapshot; its bytes are made later, elsewhere."""

    slot: int
    chain: bytes
    genesis: Genesis
    sessions: Sessions
    machine: Iterable[bytes]

    def encode(self) -> Iterator[bytes]:
        """The bytes of the snapshot, in pieces. Takes its time: not for the loop's thread."""
        return encode_snapshot(self.slot, self.chain, self.genesis, self.sessions, self.machine)


class Replica:
    """Sessions and machine, applied up to ``applied``; the chain there is ``chain``."""

    def __init__(self, machine: Machine, chain: bytes) -> None:
        self.machine: Final = machine
        self._guard = GuardedMachine(machine, total=isinstance(machine, MetadataMachine))
        self.sessions: Sessions = NO_SESSIONS
        self.applied = 0
        self.chain = chain
        self._leases: object = None
        self._lease_times: dict[int, int] = {}

    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back to a snapshot."""
        self._guard.restore(snapshot.machine)
        self.sessions = snapshot.sessions
        self.applied = snapshot.slot
        self.chain = snapshot.chain

    def apply(self, run: FixedRun) -> Iterator[tuple[int, bytes, Delivered | None]]:
        """Apply the slots of a run one after the other; after each, (slot, value, what to tell
        whoever waits for it). Raises ``TooOld`` when this program must be upgraded."""
        assert run.first == self.applied + 1, "slots are applied in order, without a gap"
        apply = self._guard.apply
        for slot, value in enumerate(run.values, run.first):
            self.sessions, delivered = deliver(self.sessions, slot, decode_value(value), apply)
            self.applied = slot
            self.chain = run.chains[slot - run.first]
            yield slot, value, delivered

    def capture(self, genesis: Genesis) -> Capture:
        """The state now, for a snapshot."""
        return Capture(self.applied, self.chain, genesis, self.sessions, self._guard.snapshot())

    def why_inadmissible(self, command: bytes) -> str:
        """Why this command must not be proposed; empty if it may. A command of a feature level
        that no replica knows would stop them all, and again at each start."""
        return why_inadmissible(command) if isinstance(self.machine, MetadataMachine) else ""

    def query(self, query: bytes) -> bytes:
        """Ask the machine. Raises ``QueryFailed``."""
        return self._guard.query(query)

    def why_not_owner(self, session: int, owner: bytes) -> str:
        """Why ``owner`` may do nothing in ``session``; "" if it may."""
        return why_not_owner(self.sessions, session, owner)

    def next_sequence(self, session: int) -> bytes:
        """The encoded number of the sequence that ``session`` expects next, 0 if not open."""
        return _encoder.encode(next_sequence(self.sessions, session))

    def lease_times_ms(self) -> Mapping[int, int] | None:
        """Time to live of each lease; None when the machine has no leases. The same mapping as
        before unless a lease was granted or ended."""
        machine = self.machine
        if not isinstance(machine, MetadataMachine):
            return None
        leases = machine.state.leases
        if leases is not self._leases:
            self._leases = leases
            self._lease_times = {name: lease.ttl_ms for name, lease in leases.items()}
        return self._lease_times
