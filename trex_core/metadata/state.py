"""The metadata state machine: what each command does to the replicated state.

This module alone changes metadata.  :func:`apply` is total and deterministic: any bytes in any
slot give a state, a result and the rows changed, the same at every replica; a bad command gives
``Rejected`` and changes nothing; the only exception is ``TooOld`` for a command of a newer level.
The state is immutable and shares what did not change, so keeping an old one is free, and a
snapshot is captured by keeping it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

import msgspec
from immutables import Map

from trex_core.metadata import commands as limits
from trex_core.metadata.commands import (
    Change,
    CommandError,
    ConfigCas,
    ConfigDelete,
    ConfigEntry,
    ConfigGet,
    ConfigList,
    ConfigPage,
    ConfigPut,
    Done,
    Lease,
    LeaseExpire,
    LeaseGet,
    LeaseGrant,
    LeaseList,
    LeasePage,
    LeaseRevoke,
    Member,
    MemberGet,
    MemberJoin,
    MemberLeave,
    MemberList,
    MemberPage,
    MemberUpdate,
    Placement,
    Question,
    Reason,
    Rejected,
    Reply,
    RingOwner,
    Row,
    Unreadable,
    decode_command,
    decode_question,
    encode_reply,
    encode_result,
    row_bytes,
    text_bytes,
)
from trex_core.metadata.ordered import NOTHING, Ordered
from trex_core.metadata.ring import (
    SETTING_PREFIX,
    TOKEN_MAX,
    TOKENS_PER_WEIGHT_KEY,
    Ring,
    key_token,
    setting_fault,
    settings_of,
)

STATE_VERSION: Final = 1
"""Version of the machine's bytes in a snapshot."""
RING_CHANGES_MAX: Final = 4096
"""Above this many changes since the ring was asked for last it is built anew."""
CHUNK_BYTES: Final = 64 << 10
"""A piece of the state's bytes is closed when its rows reach this many bytes, encoded."""
CHUNK_ROWS: Final = 256
"""Most rows in a piece."""


class MetadataState(msgspec.Struct, frozen=True):
    """All metadata after ``slot`` (the newest slot that held a command; 0: none yet).

    ``config`` by key, ``members`` by id, ``leases`` by name are the state; what follows is derived
    from it: the members on each lease, ascending; keys and ids in order; what the quotas count.
    """

    slot: int
    config: Map[str, ConfigEntry]
    members: Map[str, Member]
    leases: Map[int, Lease]
    held: Map[int, tuple[str, ...]]
    keys: Ordered[str]
    ids: Ordered[str]
    row_bytes: int
    weights: int
    """Sum of the weights of all members with derived tokens."""
    given_tokens: int
    """Number of tokens given."""


EMPTY: Final = MetadataState(0, Map(), Map(), Map(), Map(), NOTHING, NOTHING, 0, 0, 0)

_Applied = tuple[MetadataState, tuple[Change, ...]]


class _Rejection(Exception):  # noqa: N818 - never an error of the program
    """Leaves the judgement of one command; never this module."""

    def __init__(self, reason: str, detail: str, slot: int = 0) -> None:
        self.result: Final = Rejected(reason, detail, slot)


def apply(
    state: MetadataState, slot: int, command: bytes
) -> tuple[MetadataState, bytes, tuple[Change, ...]]:
    """Apply the command in ``slot``: the state after it, the encoded result, the rows changed.

    Total and deterministic. Raises only :class:`trex_core.machine.TooOld`: then stop.
    """
    before = msgspec.structs.replace(state, slot=slot)
    try:
        decoded = decode_command(command)
    except CommandError:
        result = Rejected(Reason.MALFORMED, f"no command of a level up to {limits.LEVEL}")
        return before, encode_result(result), ()
    try:
        match decoded:
            case ConfigPut(key=key, value=value):
                after, changes = _config_put(before, key, value)
            case ConfigDelete(key=key):
                after, changes = _config_delete(before, key)
            case ConfigCas():
                after, changes = _config_cas(before, decoded)
            case MemberJoin():
                after, changes = _member_join(before, decoded)
            case MemberUpdate():
                after, changes = _member_update(before, decoded)
            case MemberLeave(id=name):
                after, changes = _member_leave(before, name)
            case LeaseGrant(ttl_ms=ttl_ms):
                after, changes = _lease_grant(before, ttl_ms)
            case (
                LeaseRevoke(lease=lease) | LeaseExpire(lease=lease)
            ):  # pragma: no branch - no other
                after, changes = _lease_end(before, lease)
    except _Rejection as rejection:
        return before, encode_result(rejection.result), ()
    return after, encode_result(Done(slot)), changes


# --- configuration -----------------------------------------------------------------------------


def _config_put(state: MetadataState, key: str, value: str) -> _Applied:
    _check_text("key", key, limits.KEY_BYTES_MAX)
    if text_bytes(value) > limits.CONFIG_VALUE_BYTES_MAX:
        raise _Rejection(Reason.QUOTA, f"value: over {limits.CONFIG_VALUE_BYTES_MAX} bytes")
    if key.startswith(SETTING_PREFIX):
        fault = setting_fault(key, value)
        if fault:
            raise _Rejection(Reason.INVALID, f"{key}: {fault}")
    old = state.config.get(key)
    new = ConfigEntry(key, value, state.slot)
    keys = state.keys
    if old is None:
        if len(state.config) >= limits.CONFIG_KEYS_MAX:
            raise _Rejection(Reason.QUOTA, f"over {limits.CONFIG_KEYS_MAX} configuration keys")
        keys = keys.edited((), (key,))
    after = msgspec.structs.replace(
        state,
        config=state.config.set(key, new),
        keys=keys,
        row_bytes=_bytes_after(state, old, new),
    )
    if key == TOKENS_PER_WEIGHT_KEY:
        _check_tokens(state, after)
    return after, (Change("config", key, old, new),)


def _config_delete(state: MetadataState, key: str) -> _Applied:
    old = state.config.get(key)
    if old is None:
        raise _Rejection(Reason.NOT_FOUND, "no such key")
    after = msgspec.structs.replace(
        state,
        config=state.config.delete(key),
        keys=state.keys.edited((key,), ()),
        row_bytes=state.row_bytes - row_bytes(old),
    )
    if key == TOKENS_PER_WEIGHT_KEY:
        _check_tokens(state, after)
    return after, (Change("config", key, old, None),)


def _config_cas(state: MetadataState, command: ConfigCas) -> _Applied:
    entry = state.config.get(command.key)
    found = entry.slot if entry is not None else 0
    if found != command.expected_slot:
        raise _Rejection(Reason.CAS_FAILED, "the key was written by another slot", found)
    if command.value is not None:
        return _config_put(state, command.key, command.value)
    return _config_delete(state, command.key)


# --- members -----------------------------------------------------------------------------------


def _member_join(state: MetadataState, command: MemberJoin) -> _Applied:
    _check_text("id", command.id, limits.NAME_BYTES_MAX)
    old = state.members.get(command.id)
    if old is not None:
        raise _Rejection(Reason.EXISTS, "a member with this id is there", old.updated_slot)
    if len(state.members) >= limits.MEMBERS_MAX:
        raise _Rejection(Reason.QUOTA, f"over {limits.MEMBERS_MAX} members")
    if command.address is not None:
        _check_text("address", command.address, limits.NAME_BYTES_MAX)
    if command.zone is not None:
        _check_text("zone", command.zone, limits.NAME_BYTES_MAX)
    new = Member(
        id=command.id,
        address=command.address,
        zone=command.zone,
        weight=command.weight,
        state=command.state,
        attributes=_checked_attributes(command.attributes),
        tokens=None if command.tokens is None else _checked_tokens(command.tokens),
        lease=command.lease,
        joined_slot=state.slot,
        updated_slot=state.slot,
    )
    return _member_written(state, None, new)


def _member_update(state: MetadataState, command: MemberUpdate) -> _Applied:
    old = state.members.get(command.id)
    if old is None:
        raise _Rejection(Reason.NOT_FOUND, "no such member")
    address, zone, tokens = old.address, old.zone, old.tokens
    if command.address is not None:
        address = command.address or None
        _check_text("address", address or "-", limits.NAME_BYTES_MAX)
    if command.zone is not None:
        zone = command.zone or None
        _check_text("zone", zone or "-", limits.NAME_BYTES_MAX)
    if command.tokens is not None:
        tokens = _checked_tokens(command.tokens) if command.tokens else None
    new = Member(
        id=old.id,
        address=address,
        zone=zone,
        weight=old.weight if command.weight is None else command.weight,
        state=old.state if command.state is None else command.state,
        attributes=(
            old.attributes
            if command.attributes is None
            else _checked_attributes(command.attributes)
        ),
        tokens=tokens,
        lease=old.lease if command.lease is None else command.lease,
        joined_slot=old.joined_slot,
        updated_slot=state.slot,
    )
    return _member_written(state, old, new)


def _member_written(state: MetadataState, old: Member | None, new: Member) -> _Applied:
    if not 1 <= new.weight <= limits.WEIGHT_MAX:
        raise _Rejection(Reason.INVALID, f"weight: must be 1 to {limits.WEIGHT_MAX}")
    if new.state not in limits.MEMBER_STATES:
        raise _Rejection(Reason.INVALID, f"state: must be one of {', '.join(limits.MEMBER_STATES)}")
    held = state.held
    old_lease = old.lease if old is not None else 0
    if new.lease != old_lease:
        if new.lease:
            if new.lease not in state.leases:
                raise _Rejection(Reason.LEASE_NOT_FOUND, "no such lease")
            on_it = held.get(new.lease, ())
            if len(on_it) >= limits.LEASE_MEMBERS_MAX:
                raise _Rejection(
                    Reason.QUOTA, f"over {limits.LEASE_MEMBERS_MAX} members on one lease"
                )
            held = held.set(new.lease, tuple(sorted((*on_it, new.id))))
        held = _let_go(held, old_lease, new.id)
    weights, given = _token_counts(new)
    old_weights, old_given = _token_counts(old)
    after = msgspec.structs.replace(
        state,
        members=state.members.set(new.id, new),
        held=held,
        ids=state.ids if old is not None else state.ids.edited((), (new.id,)),
        row_bytes=_bytes_after(state, old, new),
        weights=state.weights + weights - old_weights,
        given_tokens=state.given_tokens + given - old_given,
    )
    _check_tokens(state, after)
    return after, (Change("member", new.id, old, new),)


def _member_leave(state: MetadataState, name: str) -> _Applied:
    old = state.members.get(name)
    if old is None:
        raise _Rejection(Reason.NOT_FOUND, "no such member")
    after = _without_members(state, (old,))
    after = msgspec.structs.replace(after, held=_let_go(state.held, old.lease, name))
    return after, (Change("member", name, old, None),)


def _without_members(state: MetadataState, gone: tuple[Member, ...]) -> MetadataState:
    """``state`` without these members; ``held`` is left to the caller."""
    members, bytes_, weights, given = (
        state.members,
        state.row_bytes,
        state.weights,
        state.given_tokens,
    )
    for member in gone:
        members = members.delete(member.id)
        bytes_ -= row_bytes(member)
        member_weights, member_given = _token_counts(member)
        weights -= member_weights
        given -= member_given
    return msgspec.structs.replace(
        state,
        members=members,
        ids=state.ids.edited([member.id for member in gone], ()),
        row_bytes=bytes_,
        weights=weights,
        given_tokens=given,
    )


def _let_go(held: Map[int, tuple[str, ...]], lease: int, name: str) -> Map[int, tuple[str, ...]]:
    if not lease:
        return held
    rest = tuple(other for other in held[lease] if other != name)
    return held.set(lease, rest) if rest else held.delete(lease)


def _token_counts(member: Member | None) -> tuple[int, int]:
    """(weight that tokens are derived from, tokens given)"""
    if member is None:
        return 0, 0
    return (member.weight, 0) if member.tokens is None else (0, len(member.tokens))


# --- leases ------------------------------------------------------------------------------------


def _lease_grant(state: MetadataState, ttl_ms: int) -> _Applied:
    if not limits.LEASE_TTL_MS_MIN <= ttl_ms <= limits.LEASE_TTL_MS_MAX:
        raise _Rejection(
            Reason.INVALID,
            f"ttl_ms: must be {limits.LEASE_TTL_MS_MIN} to {limits.LEASE_TTL_MS_MAX}",
        )
    if len(state.leases) >= limits.LEASES_MAX:
        raise _Rejection(Reason.QUOTA, f"over {limits.LEASES_MAX} leases")
    new = Lease(ttl_ms, state.slot)
    after = msgspec.structs.replace(
        state,
        leases=state.leases.set(new.id, new),
        row_bytes=_bytes_after(state, None, new),
    )
    return after, (Change("lease", str(new.id), None, new),)


def _lease_end(state: MetadataState, lease: int) -> _Applied:
    old = state.leases.get(lease)
    if old is None:
        raise _Rejection(Reason.LEASE_NOT_FOUND, "no such lease")
    gone = tuple(state.members[name] for name in state.held.get(lease, ()))
    after = _without_members(state, gone)
    after = msgspec.structs.replace(
        after,
        leases=state.leases.delete(lease),
        held=state.held.delete(lease) if gone else state.held,
        row_bytes=after.row_bytes - row_bytes(old),
    )
    changes = [Change("member", member.id, member, None) for member in gone]
    return after, (*changes, Change("lease", str(lease), old, None))


# --- checks ------------------------------------------------------------------------------------


def _check_text(name: str, text: str, bytes_max: int) -> None:
    if not text:
        raise _Rejection(Reason.INVALID, f"{name}: must not be empty")
    if text_bytes(text) > bytes_max:
        raise _Rejection(Reason.QUOTA, f"{name}: over {bytes_max} bytes")


def _checked_attributes(attributes: dict[str, str]) -> dict[str, str]:
    if len(attributes) > limits.ATTRIBUTES_MAX:
        raise _Rejection(Reason.QUOTA, f"attributes: over {limits.ATTRIBUTES_MAX}")
    size = sum(text_bytes(name) + text_bytes(value) for name, value in attributes.items())
    if size > limits.ATTRIBUTE_BYTES_MAX:
        raise _Rejection(Reason.QUOTA, f"attributes: over {limits.ATTRIBUTE_BYTES_MAX} bytes")
    return dict(sorted(attributes.items()))


def _checked_tokens(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not tokens:
        raise _Rejection(Reason.INVALID, "tokens: must not be empty; leave them out to derive them")
    if len(tokens) > limits.MEMBER_TOKENS_MAX:
        raise _Rejection(Reason.QUOTA, f"tokens: over {limits.MEMBER_TOKENS_MAX}")
    ascending = tuple(sorted(set(tokens)))
    if len(ascending) != len(tokens):
        raise _Rejection(Reason.INVALID, "tokens: must be distinct")
    if ascending[0] < 0 or ascending[-1] > TOKEN_MAX:
        raise _Rejection(Reason.INVALID, "tokens: must be unsigned 64-bit numbers")
    return ascending


def _check_tokens(before: MetadataState, after: MetadataState) -> None:
    count = _tokens(after)
    if count > limits.TOKENS_MAX and count > _tokens(before):
        raise _Rejection(Reason.QUOTA, f"over {limits.TOKENS_MAX} tokens of all members")


def _tokens(state: MetadataState) -> int:
    """How many tokens all members have."""
    return state.weights * settings_of(state.config).tokens_per_weight + state.given_tokens


def _bytes_after(state: MetadataState, old: Row | None, new: Row) -> int:
    """Bytes of all rows once ``new`` replaced ``old``; what shrinks always passes."""
    grown = row_bytes(new) - (row_bytes(old) if old is not None else 0)
    if grown > 0 and state.row_bytes + grown > limits.STATE_BYTES_MAX:
        raise _Rejection(Reason.QUOTA, f"over {limits.STATE_BYTES_MAX} bytes of state")
    return state.row_bytes + grown


# --- questions ---------------------------------------------------------------------------------


def ring_of(state: MetadataState) -> Ring:
    """The ring of a state, built whole (about 1 µs for each token)."""
    settings = settings_of(state.config)
    return Ring.of(
        state.members.values(),
        settings.replication_factor,
        settings.spread,
        settings.tokens_per_weight,
    )


class KeptRing:
    """The ring of a state that goes on changing: derived when asked for, then kept up with what
    changed since (about 10 µs each), and built whole again where that is cheaper. What changes
    while nobody asks costs next to nothing: a ring of many tokens takes long to derive anew."""

    def __init__(self) -> None:
        self._ring: Ring | None = None
        self._changes: list[Change] = []

    def note(self, changes: Iterable[Change]) -> None:
        """The state changed so."""
        if self._ring is None:
            return
        for change in changes:
            if change.kind == "member" or (
                change.kind == "config" and change.key.startswith(SETTING_PREFIX)
            ):
                self._changes.append(change)
        if len(self._changes) > RING_CHANGES_MAX:
            self.forget()

    def forget(self) -> None:
        """The state is another one."""
        self._ring = None
        self._changes = []

    def of(self, state: MetadataState) -> Ring:
        """The ring of ``state``. Requires that all changes up to it were noted."""
        if self._ring is None:
            self._ring = ring_of(state)
        elif self._changes:
            self._ring = self._ring.with_changes(self._changes)
        self._changes = []
        return self._ring


def answer(state: MetadataState, question: bytes, ring: KeptRing | None = None) -> bytes:
    """Answer a question with an encoded reply; total (:class:`Unreadable` for other bytes).
    ``ring``: that of this very state, if the caller keeps it."""
    try:
        decoded = decode_question(question)
    except CommandError as error:
        return encode_reply(Unreadable(str(error)))
    return encode_reply(_reply(state, decoded, ring))


def _reply(state: MetadataState, question: Question, ring: KeptRing | None) -> Reply:
    match question:
        case ConfigGet(key=key):
            return state.config.get(key)
        case ConfigList(prefix=prefix, after=after, limit=limit):
            keys = _after(state.keys, max(prefix, after), after)
            entries, more = _page(_prefixed(state, keys, prefix), limit)
            return ConfigPage(entries, more)
        case MemberGet(id=name):
            return state.members.get(name)
        case MemberList(after=after, limit=limit):
            ids = _after(state.ids, after, after)
            members, more = _page((state.members[name] for name in ids), limit)
            return MemberPage(members, more)
        case LeaseGet(lease=lease):
            return state.leases.get(lease)
        case LeaseList(after=after_lease, limit=limit):
            names = sorted(name for name in state.leases if name > after_lease)
            leases, more = _page((state.leases[name] for name in names), limit)
            return LeasePage(leases, more)
        case RingOwner(key=key):  # pragma: no branch - there is no other question
            replicas = (ring or KeptRing()).of(state).replicas(key)
            return Placement(key, key_token(key), replicas)


def _after(names: Ordered[str], first: str, after: str) -> Iterator[str]:
    return (name for name in names.since(first) if name != after or not after)


def _prefixed(state: MetadataState, keys: Iterator[str], prefix: str) -> Iterator[ConfigEntry]:
    for key in keys:
        if not key.startswith(prefix):
            return
        yield state.config[key]


_R = TypeVar("_R", ConfigEntry, Member, Lease)


def _page(rows: Iterator[_R], limit: int) -> tuple[tuple[_R, ...], bool]:
    """At most ``limit`` of ``rows`` (1 .. PAGE_ROWS_MAX), and whether there are more."""
    limit = max(1, min(limit, limits.PAGE_ROWS_MAX))
    page: list[_R] = []
    size = 0
    for row in rows:
        size += row_bytes(row)
        if page and (len(page) == limit or size > limits.PAGE_BYTES_MAX):
            return tuple(page), True
        page.append(row)
    return tuple(page), False


# --- bytes of the whole state ------------------------------------------------------------------

_PIECE: Final = struct.Struct(">I")
_ARRAY: Final = struct.Struct(">BI")
_ARRAY_32: Final = 0xDD
_encoder: Final = msgspec.msgpack.Encoder()
_head: Final = msgspec.msgpack.Decoder(tuple[int, int])
_rows: Final[msgspec.msgpack.Decoder[tuple[Row, ...]]] = msgspec.msgpack.Decoder(tuple[Row, ...])


class StateError(ValueError):
    """Bytes that are no metadata state; the text says where."""


def state_chunks(state: MetadataState) -> Iterator[bytes]:
    """The bytes of a state, equal at equal states: pieces of a 4-byte big-endian length and a
    MessagePack array. The first is (STATE_VERSION, slot); the others hold rows: leases by name,
    then configuration by key, then members by id. Each piece takes under 1 ms to make (one row
    alone may be larger than CHUNK_BYTES)."""
    yield _piece(_encoder.encode((STATE_VERSION, state.slot)))
    yield from _pieces(state.leases[name] for name in sorted(state.leases))
    yield from _pieces(state.config[key] for key in state.keys)
    yield from _pieces(state.members[name] for name in state.ids)


def _pieces(rows: Iterator[Row]) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for row in rows:
        body = _encoder.encode(row)
        held.append(body)
        size += len(body)
        if len(held) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield _piece(_ARRAY.pack(_ARRAY_32, len(held)), *held)
            held, size = [], 0
    if held:
        yield _piece(_ARRAY.pack(_ARRAY_32, len(held)), *held)


def _piece(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return _PIECE.pack(len(body)) + body


def state_from(data: bytes) -> MetadataState:
    """The state of joined pieces. Raises :class:`StateError` and nothing else."""
    try:
        bodies = _bodies(data)
        version, slot = _head.decode(next(bodies, b""))
        if version != STATE_VERSION:
            raise StateError(f"version {version} of the state is unknown, only {STATE_VERSION} is")
        return state_of(slot, (row for body in bodies for row in _rows.decode(body)))
    except StateError:
        raise
    except (ValueError, RecursionError, OverflowError) as error:
        raise StateError(f"no metadata state: {error}") from error


def _bodies(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    at = 0
    while at < len(view):
        if at + _PIECE.size > len(view):
            raise StateError(f"cut off at byte {at}")
        (length,) = _PIECE.unpack_from(view, at)
        at += _PIECE.size
        if at + length > len(view):
            raise StateError(f"cut off at byte {at}")
        yield view[at : at + length]
        at += length


def state_of(slot: int, rows: Iterable[Row]) -> MetadataState:
    """The state after ``slot`` made of ``rows`` in any order (a store keeps them one by one).
    Raises :class:`StateError` for a row that is there twice or a member on a missing lease."""
    config: dict[str, ConfigEntry] = {}
    members: dict[str, Member] = {}
    leases: dict[int, Lease] = {}
    held: dict[int, list[str]] = {}
    bytes_ = weights = given = count = 0
    for row in rows:
        count += 1
        bytes_ += row_bytes(row)
        match row:
            case ConfigEntry():
                config[row.key] = row
            case Lease():
                leases[row.id] = row
            case Member():  # pragma: no branch - there is no other row
                members[row.id] = row
                member_weights, member_given = _token_counts(row)
                weights += member_weights
                given += member_given
                if row.lease:
                    held.setdefault(row.lease, []).append(row.id)
    if len(config) + len(members) + len(leases) != count:
        raise StateError("a row is there twice")
    for lease in held:
        if lease not in leases:
            raise StateError(f"a member is on lease {lease}, which is missing")
    return MetadataState(
        slot,
        Map(config),
        Map(members),
        Map(leases),
        Map({lease: tuple(sorted(ids)) for lease, ids in held.items()}),
        Ordered.of(sorted(config)),
        Ordered.of(sorted(members)),
        bytes_,
        weights,
        given,
    )


# --- as a replicated machine -------------------------------------------------------------------


class MetadataMachine:
    """The metadata service as a ``Machine``; total, so its guard needs to keep nothing.

    ``state`` is the newest state and ``changes`` what the newest ``apply`` changed; both are
    immutable values, to be looked at freely.
    """

    def __init__(self, state: MetadataState = EMPTY) -> None:
        self.state = state
        self.changes: tuple[Change, ...] = ()
        self._ring = KeptRing()

    def apply(self, slot: int, command: bytes) -> bytes:
        """Apply; raises only ``TooOld``."""
        self.state, result, self.changes = apply(self.state, slot, command)
        self._ring.note(self.changes)
        return result

    @property
    def ring(self) -> Ring:
        """The ring at the newest state."""
        return self._ring.of(self.state)

    def query(self, query: bytes) -> bytes:
        """Answer an encoded question; total."""
        return answer(self.state, query, self._ring)

    def snapshot(self) -> Iterator[bytes]:
        """The state now, in pieces to be taken at leisure."""
        return state_chunks(self.state)

    def restore(self, data: bytes) -> None:
        """Replace the state. Raises :class:`StateError`, with the state as it was."""
        self.state = state_from(data)
        self.changes = ()
        self._ring.forget()
