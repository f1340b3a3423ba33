"""Commands for listener tests, and what they must lead to: one plain fold over the log."""

from __future__ import annotations

import random

from tests.listeners.backbone import BALLOT, Backbone
from trex_core.messages import Kind, Value, decode_value
from trex_core.metadata.commands import (
    ConfigDelete,
    ConfigPut,
    LeaseGrant,
    LeaseRevoke,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    encode_command,
)
from trex_core.metadata.state import EMPTY, MetadataState, apply, state_chunks
from trex_core.sessions import NO_SESSIONS, deliver


def engine(command) -> Value:
    return Value(Kind.ENGINE, BALLOT, 1_700_000_000_000, command=encode_command(command))


def put(key: str, value: str) -> Value:
    return engine(ConfigPut(key, value))


def workload(draw: random.Random, count: int) -> list[Value]:
    """All kinds of commands, some of them rejected, with no-ops between them."""
    values: list[Value] = []
    for n in range(count):
        member = f"m{draw.randrange(40)}"
        values.append(
            draw.choice(
                (
                    Value(Kind.NOOP, BALLOT),
                    put(f"k{draw.randrange(50)}", "v" * draw.randrange(300)),
                    put(f"k{draw.randrange(50)}", str(n)),
                    engine(ConfigDelete(f"k{draw.randrange(50)}")),
                    engine(MemberJoin(member, zone=f"z{draw.randrange(3)}")),
                    engine(MemberJoin(member)),
                    engine(MemberUpdate(member, state=draw.choice(("up", "draining")))),
                    engine(MemberLeave(member)),
                    engine(LeaseGrant(1000)),
                    engine(LeaseRevoke(draw.randrange(1, n + 2))),
                    Value(Kind.OPEN, BALLOT),
                )
            )
        )
    return values


def replayed(backbone: Backbone, last: int | None = None):
    """(state, sessions, {slot: changes}) of the log, by the same functions in one plain fold."""
    state, sessions, changed = EMPTY, NO_SESSIONS, {}

    def applied(slot: int, command: bytes) -> tuple[int, bytes]:
        nonlocal state
        state, result, changes = apply(state, slot, command)
        if changes:
            changed[slot] = changes
        return 0, result

    for slot, data in enumerate(backbone.log[:last], 1):
        sessions, _ = deliver(sessions, slot, decode_value(data), applied)
    return state, sessions, changed


def same(one: MetadataState, other: MetadataState) -> bool:
    return b"".join(state_chunks(one)) == b"".join(state_chunks(other))
