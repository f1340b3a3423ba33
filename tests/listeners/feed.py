"""Applied slots without a cluster: what a listener hands to its store, made by the real core."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from listeners.store import AppliedSlot, StoreBatch
from trex_core.messages import Ballot, Genesis, Kind, Value, encode_value
from trex_core.metadata.commands import (
    Change,
    Command,
    ConfigCas,
    ConfigDelete,
    ConfigPut,
    LeaseGrant,
    LeaseRevoke,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    encode_command,
)
from trex_core.metadata.state import EMPTY, apply
from trex_core.sessions import NO_SESSIONS, deliver
from trex_core.state import chain_next, chain_start

CLUSTER_ID = bytes(range(16))
GENESIS = Genesis((1, 2, 3), (11, 12, 13))
BALLOT = Ballot(0, 7, 2)
AWKWARD = ("a\x00b", "quo'te\"s", "é\u2028😀", "line\nfeed\r\t", "\\", "[]{},:", "\x1e\x1d", " ")


class Feed:
    """Fixes and applies slots in order; ``sessions`` and ``metadata`` are the state after them."""

    def __init__(self, seed: int = 0) -> None:
        self.slot = 0
        self.chain = chain_start(CLUSTER_ID)
        self.sessions = NO_SESSIONS
        self.metadata = EMPTY
        self.session = 0
        self.sequence = 0
        self.random = random.Random(seed)

    def value(self, value: Value) -> AppliedSlot:
        """Fix ``value`` in the next slot."""
        self.slot += 1
        data = encode_value(value)
        self.chain = chain_next(self.chain, self.slot, data)
        changes: tuple[Change, ...] = ()

        def applied(slot: int, command: bytes) -> tuple[int, bytes]:
            nonlocal changes
            self.metadata, result, changes = apply(self.metadata, slot, command)
            return 0, result

        self.sessions, _ = deliver(self.sessions, self.slot, value, applied)
        return AppliedSlot(self.slot, data, self.chain, changes)

    def start(self) -> list[AppliedSlot]:
        """Genesis, and a session opened for :meth:`command`."""
        first = self.value(Value(Kind.GENESIS, BALLOT, command=msgspec.msgpack.encode(GENESIS)))
        return [first, self.open()]

    def open(self) -> AppliedSlot:
        """Open a session and use it from now on."""
        slot = self.value(Value(Kind.OPEN, BALLOT, 1_700_000_000_000))
        self.session, self.sequence = self.slot, 0
        return slot

    def noop(self) -> AppliedSlot:
        """A hole filled."""
        return self.value(Value(Kind.NOOP, BALLOT))

    def command(self, command: Command) -> AppliedSlot:
        """A command of the current session, in order; up to three answers are still unheard."""
        self.sequence += 1
        return self.value(
            Value(
                Kind.COMMAND,
                BALLOT,
                1_700_000_000_000 + self.slot,
                self.session,
                self.sequence,
                max(1, self.sequence - 3),
                encode_command(command),
            )
        )

    def some(self) -> AppliedSlot:
        """Something or other; keys repeat often, some commands are rejected."""
        draw = self.random
        member = f"m{draw.randrange(12)}{draw.choice(('', *AWKWARD))}"
        key = f"k{draw.randrange(6)}{draw.choice(('', *AWKWARD))}"
        lease = draw.choice([0, 0, *self.metadata.leases])
        attributes = {draw.choice(AWKWARD): draw.choice(AWKWARD) for _ in range(draw.randrange(3))}
        tokens = draw.choice([None, (0, 2**63, 2**64 - 1), (draw.getrandbits(64),)])
        match draw.randrange(12):
            case 0:
                return self.noop()
            case 1:
                return self.open()
            case 2:
                return self.value(Value(Kind.CLOSE, BALLOT, session=self.session))
            case 3:
                return self.command(LeaseGrant(1000))
            case 4:
                return self.command(LeaseRevoke(lease))
            case 5:
                return self.command(MemberLeave(member))
            case 6:
                return self.command(MemberUpdate(member, state="draining", attributes=attributes))
            case 7 | 8 | 9:
                zone = draw.choice((None, "a", "b"))
                return self.command(
                    MemberJoin(
                        member, "host:1", zone, 2, "up", attributes, tokens=tokens, lease=lease
                    )
                )
            case 10:
                return self.command(ConfigPut(key, draw.choice(AWKWARD) * 3))
            case _:
                return self.command(draw.choice((ConfigDelete(key), ConfigCas(key, 0, "new"))))

    def batch(self, slots: Sequence[AppliedSlot], tip: int = 0) -> StoreBatch:
        """``slots``, the last ones fixed, as a batch for the store."""
        return StoreBatch(tuple(slots), self.sessions, self.metadata, self.slot, tip)
