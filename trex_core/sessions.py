"""Exactly once: which commands of which client session were applied, and with what result.

This module alone decides whether the command in a fixed slot is applied, answered again, or
refused.  It is replicated state: every replica folds the same values in the same order with
:func:`deliver` and holds the same sessions, whatever happened to clients or leaders meanwhile.

Rules (source: Raft dissertation §6.3, made FIFO):

- A session is named by the slot of its OPEN; its commands are numbered 1, 2, 3 ...
- It belongs to whoever opened it: the leader writes their name into the OPEN, and asks
  :func:`why_not_owner` before it proposes anything in a session.
- A command is applied only if its number is exactly the next one.  A lower one gets the first
  result again (or FORGOTTEN once the client acknowledged it); a higher one gets GAP.
- SKIP uses up a number without a command; if the command was applied after all, it gets the
  first result: so a client learns what became of a command whose outcome is unknown.
- The leader too has a session (LEADER), for what it proposes by itself: one at a time, so to open
  it ends that of every leader before, and what one of them proposed, that nobody saw fixed until
  then, is never applied. Nothing else ends it.
- No clock: opening beyond SESSIONS_MAX expires the session unused for the most slots; opening
  beyond OWNER_SESSIONS_MAX that of the same owner, so that nobody opens away those of others.
- What is kept is bounded for each session, and for all sessions of one owner together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import msgspec
from immutables import Map

from trex_core.machine import TooOld
from trex_core.messages import (
    SESSION_RESULTS_MAX,
    SESSIONS_MAX,
    Kind,
    OutcomeStatus,
    Value,
)

SESSION_RESULT_BYTES_MAX: Final = 256 << 10
"""Most bytes of results kept for one session; beyond it the oldest go (the newest always stays).
A retry of one that went gets FORGOTTEN."""
OWNER_SESSIONS_MAX: Final = SESSIONS_MAX // 4
"""Most open sessions of one owner."""
LEADER: Final = b"leader\n"
"""Who owns the leader's session. No certificate has this name: names are printable."""
OWNER_RESULTS_MAX: Final = 1 << 16
"""Most results kept for all sessions of one owner. Beyond it a session that is used keeps fewer of
its own; its newest always stays."""
OWNER_RESULT_BYTES_MAX: Final = 64 << 20
"""The same in bytes of results."""
EVICTION_BATCH: Final = 1024
"""How many of the sessions unused for longest are looked up at once."""

Result: TypeAlias = tuple[int, int, bytes]
"""(slot of the first application, status, body)"""


class Delivered(msgspec.Struct, frozen=True, gc=False):
    """What became of the command in a slot: ``status`` is a ``messages.OutcomeStatus``; ``slot``
    is where it was *first* applied (for a session that was opened: its name)."""

    slot: int
    status: int
    body: bytes


class Session(msgspec.Struct, frozen=True, array_like=True):
    """One open session: the sequence expected ``next``, the lowest one the client has no answer
    to, the results of the sequences ``next - len(results)`` .. ``next - 1``, the last slot that
    used the session, the bytes of the results kept, and the name of who opened it (UTF-8)."""

    next: int
    unanswered: int
    results: tuple[Result, ...]
    used_slot: int
    result_bytes: int = 0
    owner: bytes = b""


Unused: TypeAlias = tuple[tuple[int, int], ...]
"""A cache for eviction: (used slot, session) of those that were unused for longest when it was
made, some of which may have been used since. No part of the state."""


class Owned(msgspec.Struct, frozen=True):
    """What the open sessions of one owner come to."""

    sessions: int = 0
    results: int = 0
    result_bytes: int = 0
    oldest: Unused = ()


class Sessions(msgspec.Struct, frozen=True):
    """All open sessions by name; ``owners`` counts them, and follows from them."""

    open: Map[int, Session]
    owners: Map[bytes, Owned] = Map()
    oldest: Unused = ()


NO_SESSIONS: Final = Sessions(Map())
_NOTHING: Final = Owned()

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Session)

Apply: TypeAlias = Callable[[int, bytes], tuple[int, bytes]]
"""(slot, command) -> (status, body); ``GuardedMachine.apply`` is one."""


def encode_session(session: Session) -> bytes:
    """Encode one session, for a store that keeps them row by row."""
    return _encoder.encode(session)


def decode_session(data: bytes) -> Session:
    """Decode one session. Raises ``msgspec.DecodeError`` if ``data`` is not one."""
    return _decoder.decode(data)


def sessions_of(items: Iterable[tuple[int, Session]]) -> Sessions:
    """Sessions from (name, session) pairs."""
    opened = Map(items)
    owners: dict[bytes, Owned] = {}
    for session in opened.values():
        owned = owners.get(session.owner, _NOTHING)
        owners[session.owner] = _counted(owned, None, session)
    return Sessions(opened, Map(owners))


def next_sequence(sessions: Sessions, session_id: int) -> int:
    """The sequence that ``session_id`` expects next; 0 if it is not open."""
    session = sessions.open.get(session_id)
    return session.next if session is not None else 0


def why_not_owner(sessions: Sessions, session_id: int, owner: bytes) -> str:
    """Why ``owner`` may do nothing in that session; "" if it may, or the session is not open."""
    session = sessions.open.get(session_id)
    if session is None or session.owner == owner:
        return ""
    return f"session {session_id} was opened by somebody else"


def deliver(
    sessions: Sessions, slot: int, value: Value, apply: Apply
) -> tuple[Sessions, Delivered | None]:
    """Take the fixed ``value`` of ``slot``; call ``apply`` if it is a command to be applied now.

    Returns the sessions after it and what to tell whoever waits for the slot (None: nobody may).
    Pure but for ``apply``. Raises :class:`TooOld` for a kind this program does not know, and
    nothing else but what ``apply`` raises.
    """
    match value.kind:
        case Kind.COMMAND | Kind.SKIP:
            return _in_session(sessions, slot, value, apply)
        case Kind.NOOP | Kind.GENESIS:
            return sessions, None
        case Kind.ENGINE:
            if value.session and not _is_leaders(sessions.open.get(value.session)):
                return sessions, Delivered(slot, OutcomeStatus.SESSION_EXPIRED, b"")
            status, body = apply(slot, value.command)
            return sessions, Delivered(slot, status, body)
        case Kind.OPEN:
            return _opened(sessions, slot, value.command), Delivered(
                slot, OutcomeStatus.APPLIED, b""
            )
        case Kind.CLOSE:
            if value.session not in sessions.open:
                return sessions, Delivered(slot, OutcomeStatus.SESSION_EXPIRED, b"")
            return _ended(sessions, value.session), Delivered(slot, OutcomeStatus.APPLIED, b"")
        case unknown:
            raise TooOld(f"slot {slot} holds a value of unknown kind {unknown}")


def _is_leaders(session: Session | None) -> bool:
    return session is not None and session.owner == LEADER


def _in_session(
    sessions: Sessions, slot: int, value: Value, apply: Apply
) -> tuple[Sessions, Delivered]:
    session = sessions.open.get(value.session)
    if session is None:
        return sessions, Delivered(slot, OutcomeStatus.SESSION_EXPIRED, b"")
    expected = session.next
    owned = sessions.owners[session.owner]
    if value.sequence == expected:
        if value.kind == Kind.COMMAND:
            status, body = apply(slot, value.command)
        else:
            status, body = OutcomeStatus.APPLIED, b""
        results = (*session.results, (slot, status, body))
        size = session.result_bytes + len(body)
        after = _trimmed(expected + 1, value.unanswered, session, results, size, slot, owned)
        delivered = Delivered(slot, status, body)
    else:
        delivered = _again(session, slot, value.sequence)
        after = _trimmed(
            expected,
            value.unanswered,
            session,
            session.results,
            session.result_bytes,
            slot,
            owned,
        )
    owners = sessions.owners.set(session.owner, _counted(owned, session, after))
    opened = sessions.open.set(value.session, after)
    return Sessions(opened, owners, sessions.oldest), delivered


def _again(session: Session, slot: int, sequence: int) -> Delivered:
    """The answer to a sequence that is not the next one."""
    if sequence > session.next:
        return Delivered(slot, OutcomeStatus.GAP, b"")
    index = sequence - (session.next - len(session.results))
    if index < 0:
        return Delivered(slot, OutcomeStatus.FORGOTTEN, b"")
    return Delivered(*session.results[index])


def _trimmed(
    expected: int,
    unanswered: int,
    before: Session,
    results: tuple[Result, ...],
    result_bytes: int,
    slot: int,
    owned: Owned,
) -> Session:
    """The session used at ``slot``, without the results that the client acknowledged or that are
    over the limits. No command acknowledges itself."""
    elsewhere = owned.results - len(before.results)
    most = min(SESSION_RESULTS_MAX, max(1, OWNER_RESULTS_MAX - elsewhere))
    bytes_elsewhere = owned.result_bytes - before.result_bytes
    most_bytes = min(SESSION_RESULT_BYTES_MAX, OWNER_RESULT_BYTES_MAX - bytes_elsewhere)
    unanswered = max(before.unanswered, min(unanswered, before.next))
    drop = max(0, unanswered - (expected - len(results)), len(results) - most)
    for _, _, body in results[:drop]:
        result_bytes -= len(body)
    while result_bytes > most_bytes and drop < len(results) - 1:
        result_bytes -= len(results[drop][2])
        drop += 1
    kept = results[drop:] if drop else results
    return Session(expected, unanswered, kept, slot, result_bytes, before.owner)


def _opened(sessions: Sessions, slot: int, owner: bytes) -> Sessions:
    owned = sessions.owners.get(owner, _NOTHING)
    if owned.sessions >= (1 if owner == LEADER else OWNER_SESSIONS_MAX):
        victim, oldest = _unused_longest(sessions, owned.oldest, owner)
        sessions = _ended(sessions, victim)
        owned = msgspec.structs.replace(sessions.owners.get(owner, _NOTHING), oldest=oldest)
    elif len(sessions.open) >= SESSIONS_MAX:
        victim, oldest = _unused_longest(sessions, sessions.oldest, None)
        sessions = msgspec.structs.replace(_ended(sessions, victim), oldest=oldest)
        owned = sessions.owners.get(owner, _NOTHING)
    session = Session(1, 1, (), slot, 0, owner)
    owners = sessions.owners.set(owner, _counted(owned, None, session))
    return Sessions(sessions.open.set(slot, session), owners, sessions.oldest)


def _ended(sessions: Sessions, name: int) -> Sessions:
    """Without session ``name``, which is open."""
    session = sessions.open[name]
    owned = _counted(sessions.owners[session.owner], session, None)
    owners = sessions.owners
    owners = owners.set(session.owner, owned) if owned.sessions else owners.delete(session.owner)
    return Sessions(sessions.open.delete(name), owners, sessions.oldest)


def _counted(owned: Owned, before: Session | None, after: Session | None) -> Owned:
    """What an owner's sessions come to once ``before`` became ``after``; None: is not open."""
    sessions, results, result_bytes = owned.sessions, owned.results, owned.result_bytes
    if before is not None:
        sessions -= 1
        results -= len(before.results)
        result_bytes -= before.result_bytes
    if after is not None:
        sessions += 1
        results += len(after.results)
        result_bytes += after.result_bytes
    return Owned(sessions, results, result_bytes, owned.oldest)


def _unused_longest(sessions: Sessions, oldest: Unused, owner: bytes | None) -> tuple[int, Unused]:
    """The session unused for the most slots (of ``owner``; None: of all but the leader), and the
    cache after it.

    What the cache holds was the oldest when it was made; anything used since is younger than all
    of it; so its first entry that is still true is the oldest of all.
    """
    for index, (used_slot, name) in enumerate(oldest):
        session = sessions.open.get(name)
        if session is not None and session.used_slot == used_slot:
            return name, oldest[index + 1 :]
    by_use = sorted(
        (session.used_slot, name)
        for name, session in sessions.open.items()
        if (session.owner != LEADER if owner is None else session.owner == owner)
    )
    return by_use[0][1], tuple(by_use[1:EVICTION_BATCH])
