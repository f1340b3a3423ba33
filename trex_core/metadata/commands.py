"""The vocabulary of the metadata service: its commands, results, questions, replies and rows.

This module alone knows their bytes and their limits.  What a command *does* is in ``state``.

A command is 2 bytes, then a MessagePack array (tag, fields in order)::

    0xC1 (never used by MessagePack)   feature level (1 ..)   [tag, field, field ...]

Levels keep replicas of different versions from diverging: the set of commands, fields and limits
of a level is frozen for ever, so any program that knows a level judges its commands alike; a
replica that meets a higher level than LEVEL stops with ``TooOld``.  For the same reason there is
exactly one encoding of a command (the shortest forms, all fields): anything else is malformed,
and texts in results are written here, never by a library.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, TypeVar

import msgspec

from trex_core.machine import TooOld
from trex_core.messages import COMMAND_BYTES_MAX

LEVEL: Final = 1
"""The highest feature level this program knows."""

# --- limits of level 1 ----------------------------------------------------------------------

CONFIG_KEYS_MAX: Final = 200_000
"""Most configuration keys."""
KEY_BYTES_MAX: Final = 1024
"""Longest configuration key, in bytes of UTF-8."""
CONFIG_VALUE_BYTES_MAX: Final = COMMAND_BYTES_MAX
"""Longest configuration value, in bytes of UTF-8 (the command around it must fit too)."""
MEMBERS_MAX: Final = 100_000
"""Most members."""
NAME_BYTES_MAX: Final = 256
"""Longest member id, address or zone, in bytes of UTF-8."""
ATTRIBUTES_MAX: Final = 64
"""Most attributes of a member."""
ATTRIBUTE_BYTES_MAX: Final = 16 << 10
"""Most bytes of UTF-8 in all attribute names and values of a member."""
WEIGHT_MAX: Final = 128
"""Largest weight of a member; the smallest is 1."""
MEMBER_TOKENS_MAX: Final = 1024
"""Most tokens given for one member."""
TOKENS_MAX: Final = 1_000_000
"""Most tokens of all members together."""
LEASES_MAX: Final = 20_000
"""Most leases."""
LEASE_MEMBERS_MAX: Final = 1024
"""Most members on one lease: they all leave in one slot when it ends."""
LEASE_TTL_MS_MIN: Final = 100
"""Shortest lease, in milliseconds."""
LEASE_TTL_MS_MAX: Final = 24 * 3600 * 1000
"""Longest lease, in milliseconds: a day."""
STATE_BYTES_MAX: Final = 256 << 20
"""Most bytes of all rows together, as counted by ``row_bytes``."""
ROW_BYTES: Final = 64
"""What a row is counted for, in bytes, beside its texts and tokens."""

PAGE_ROWS_MAX: Final = 1000
"""Most rows in one page of a list (not replicated: a reply, no result)."""
PAGE_BYTES_MAX: Final = 2 << 20
"""A page is closed when its rows reach this many bytes."""

# --- rows: what the state is made of -----------------------------------------------------------

MemberState: TypeAlias = Literal["joining", "up", "draining", "down"]
MEMBER_STATES: Final = ("joining", "up", "draining", "down")
"""``up`` and ``down`` members own ranges of the ring; ``joining`` and ``draining`` do not."""


class ConfigEntry(msgspec.Struct, frozen=True, array_like=True, tag=40, gc=False):
    """A configuration key, its value, and the slot that wrote it last: its version."""

    key: str
    value: str
    slot: int


class Member(msgspec.Struct, frozen=True, array_like=True, tag=41):
    """A member. ``tokens`` are the ones given, ascending, or None: derived from id and weight
    (``ring.derived_tokens``). ``attributes`` are sorted by name; do not change them. ``lease`` is
    the lease it lives on, 0 for none."""

    id: str
    address: str | None
    zone: str | None
    weight: int
    state: str
    attributes: dict[str, str]
    tokens: tuple[int, ...] | None
    lease: int
    joined_slot: int
    updated_slot: int


class Lease(msgspec.Struct, frozen=True, array_like=True, tag=42, gc=False):
    """A lease of ``ttl_ms`` milliseconds. It is named by ``granted_slot``, its fencing token."""

    ttl_ms: int
    granted_slot: int

    @property
    def id(self) -> int:
        """The name of the lease."""
        return self.granted_slot


Row: TypeAlias = ConfigEntry | Member | Lease


class Change(msgspec.Struct, frozen=True):
    """One row changed by a slot: ``kind`` is "config", "member" or "lease", ``key`` its key, member
    id or lease as text; ``old`` is None if it is new, ``new`` is None if it is gone. A command
    that rewrites what is there is still a change (its slot is new)."""

    kind: Literal["config", "member", "lease"]
    key: str
    old: Row | None
    new: Row | None


# --- commands ----------------------------------------------------------------------------------


class ConfigPut(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Write ``value`` at ``key``."""

    key: str
    value: str


class ConfigDelete(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Remove ``key``. Rejected: not_found."""

    key: str


class ConfigCas(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Write ``value`` (None: remove the key) only if the key was written last by
    ``expected_slot`` (0: only if it is absent). Rejected: cas_failed with the slot found,
    not_found if it is to be removed and, as expected, is absent."""

    key: str
    expected_slot: int
    value: str | None


class MemberJoin(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A member joins. ``address`` and ``zone`` may be None, not empty. ``tokens`` None: derived.
    ``lease`` 0: it stays until it leaves. Rejected: exists, lease_not_found."""

    id: str
    address: str | None = None
    zone: str | None = None
    weight: int = 1
    state: str = "up"
    attributes: dict[str, str] = {}
    tokens: tuple[int, ...] | None = None
    lease: int = 0


class MemberUpdate(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Change what is not None. An empty ``address`` or ``zone`` removes it, empty ``tokens`` go
    back to derived ones, ``lease`` 0 detaches; ``attributes`` replace all there were.
    Rejected: not_found, lease_not_found."""

    id: str
    address: str | None = None
    zone: str | None = None
    weight: int | None = None
    state: str | None = None
    attributes: dict[str, str] | None = None
    tokens: tuple[int, ...] | None = None
    lease: int | None = None


class MemberLeave(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """A member leaves. Rejected: not_found."""

    id: str


class LeaseGrant(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """Grant a lease of ``ttl_ms`` milliseconds; the slot of the grant (``Done.slot``) names it."""

    ttl_ms: int


class LeaseRevoke(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """Its holder gives the lease back; its members leave. Rejected: lease_not_found."""

    lease: int


class LeaseExpire(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    """The leader saw no renewal in time: as :class:`LeaseRevoke`."""

    lease: int


Command: TypeAlias = (
    ConfigPut
    | ConfigDelete
    | ConfigCas
    | MemberJoin
    | MemberUpdate
    | MemberLeave
    | LeaseGrant
    | LeaseRevoke
    | LeaseExpire
)


# --- results -----------------------------------------------------------------------------------


class Reason:
    """Why a command was rejected: ``Rejected.reason``. None of them changed anything."""

    MALFORMED: Final = "malformed"
    """The bytes are no command of their level."""
    INVALID: Final = "invalid"
    """A field is out of its range; the detail names it."""
    NOT_FOUND: Final = "not_found"
    EXISTS: Final = "exists"
    CAS_FAILED: Final = "cas_failed"
    LEASE_NOT_FOUND: Final = "lease_not_found"
    QUOTA: Final = "quota"
    """A limit of this module would be passed; the detail names it. Deletes always pass (but for
    that of a ring setting whose default makes more tokens)."""


class Done(msgspec.Struct, frozen=True, array_like=True, tag=60, gc=False):
    """Done in ``slot``: the version of all it changed, and the name of a lease it granted."""

    slot: int


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag=61, gc=False):
    """Nothing was changed. ``reason`` is one of :class:`Reason`, ``detail`` is for people, ``slot``
    is the version found where there is one (of the key, or of the member that exists), else 0."""

    reason: str
    detail: str
    slot: int = 0


Outcome: TypeAlias = Done | Rejected


# --- questions and replies ---------------------------------------------------------------------


class ConfigGet(msgspec.Struct, frozen=True, array_like=True, tag=80, gc=False):
    """Reply: :class:`ConfigEntry` or None."""

    key: str


class ConfigList(msgspec.Struct, frozen=True, array_like=True, tag=81, gc=False):
    """Keys with ``prefix`` after ``after`` in order, at most ``limit``. Reply: ConfigPage."""

    prefix: str = ""
    after: str = ""
    limit: int = PAGE_ROWS_MAX


class MemberGet(msgspec.Struct, frozen=True, array_like=True, tag=82, gc=False):
    """Reply: :class:`Member` or None."""

    id: str


class MemberList(msgspec.Struct, frozen=True, array_like=True, tag=83, gc=False):
    """Members with an id after ``after`` in order, at most ``limit``. Reply: MemberPage."""

    after: str = ""
    limit: int = PAGE_ROWS_MAX


class LeaseGet(msgspec.Struct, frozen=True, array_like=True, tag=84, gc=False):
    """Reply: :class:`Lease` or None."""

    lease: int


class LeaseList(msgspec.Struct, frozen=True, array_like=True, tag=85, gc=False):
    """Leases with a name after ``after`` in order, at most ``limit``. Reply: LeasePage."""

    after: int = 0
    limit: int = PAGE_ROWS_MAX


class RingOwner(msgspec.Struct, frozen=True, array_like=True, tag=86, gc=False):
    """Who holds ``key``? Reply: :class:`Placement`."""

    key: str


Question: TypeAlias = (
    ConfigGet | ConfigList | MemberGet | MemberList | LeaseGet | LeaseList | RingOwner
)


class ConfigPage(msgspec.Struct, frozen=True, array_like=True, tag=100):
    """A page; ``more``: ask again after its last key."""

    entries: tuple[ConfigEntry, ...]
    more: bool


class MemberPage(msgspec.Struct, frozen=True, array_like=True, tag=101):
    """A page; ``more``: ask again after its last id."""

    members: tuple[Member, ...]
    more: bool


class LeasePage(msgspec.Struct, frozen=True, array_like=True, tag=102):
    """A page; ``more``: ask again after its last lease."""

    leases: tuple[Lease, ...]
    more: bool


class Placement(msgspec.Struct, frozen=True, array_like=True, tag=103):
    """``key`` hashes to ``token`` and is held by ``replicas``, the owner first; empty: the ring
    has no member."""

    key: str
    token: int
    replicas: tuple[str, ...]


class Unreadable(msgspec.Struct, frozen=True, array_like=True, tag=104, gc=False):
    """The question's bytes are none; ``detail`` says what was expected."""

    detail: str


Reply: TypeAlias = (
    ConfigEntry
    | ConfigPage
    | Member
    | MemberPage
    | Lease
    | LeasePage
    | Placement
    | Unreadable
    | None
)


# --- bytes -------------------------------------------------------------------------------------

_T = TypeVar("_T")
_MARK: Final = 0xC1
_HEAD: Final = bytes((_MARK, LEVEL))
_encoder: Final = msgspec.msgpack.Encoder()
_command: Final[msgspec.msgpack.Decoder[Command]] = msgspec.msgpack.Decoder(Command)
_outcome: Final[msgspec.msgpack.Decoder[Outcome]] = msgspec.msgpack.Decoder(Outcome)
_question: Final[msgspec.msgpack.Decoder[Question]] = msgspec.msgpack.Decoder(Question)
_reply: Final[msgspec.msgpack.Decoder[Reply]] = msgspec.msgpack.Decoder(Reply)
_row: Final[msgspec.msgpack.Decoder[Row]] = msgspec.msgpack.Decoder(Row)
_UNDECODABLE: Final = (ValueError, RecursionError, OverflowError)


class CommandError(ValueError):
    """Bytes that are no command of a level known here, or no result, question, reply or row; the
    text says why, for people only."""


def _decoded(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    try:
        return decoder.decode(data)
    except _UNDECODABLE as error:
        raise CommandError(str(error)) from error


_TABLES: Final[tuple[Literal["config", "member", "lease"], ...]] = ("config", "member", "lease")


def encode_command(command: Command) -> bytes:
    """The one encoding of a command. Raises ``UnicodeEncodeError`` (a ``ValueError``) for text
    that is not Unicode (a lone surrogate) and ``OverflowError`` for integers over 64 bits."""
    return _HEAD + _encoder.encode(command)


def decode_command(data: bytes) -> Command:
    """Decode a command. Raises :class:`CommandError`, or :class:`TooOld` for a higher level."""
    if len(data) < 3 or data[0] != _MARK or data[1] == 0:
        raise CommandError("no metadata command")
    if data[1] > LEVEL:
        raise TooOld(f"a command of feature level {data[1]}, known are 1..{LEVEL}")
    body = data[2:]
    try:
        command = _command.decode(body)
    except _UNDECODABLE as error:
        raise CommandError(str(error)) from error
    if _encoder.encode(command) != body:
        raise CommandError("not the one encoding of this command")
    return command


def why_inadmissible(data: bytes) -> str:
    """Why a gateway must not propose these bytes as a command; empty if it may.

    A gateway must ask: replicas stop at a command of a level they do not know, so proposing one
    for a stranger would stop the cluster. What is merely malformed is rejected in its slot, like
    any other bad command."""
    if len(data) >= 3 and data[0] == _MARK and data[1] > LEVEL:
        return f"a command of feature level {data[1]}: this cluster is too old, it knows 1..{LEVEL}"
    return ""


def describe_command(data: bytes) -> tuple[str, str | None]:
    """(kind, key) of a command for the table ``commits``: the kind in snake case, such as
    "member_join", and the key, id or lease it names. Total: ("malformed", None) otherwise."""
    try:
        command = decode_command(data)
    except (CommandError, TooOld):
        return "malformed", None
    match command:
        case ConfigPut(key=key):
            return "config_put", key
        case ConfigDelete(key=key):
            return "config_delete", key
        case ConfigCas(key=key):
            return "config_cas", key
        case MemberJoin(id=name):
            return "member_join", name
        case MemberUpdate(id=name):
            return "member_update", name
        case MemberLeave(id=name):
            return "member_leave", name
        case LeaseGrant():
            return "lease_grant", None
        case LeaseRevoke(lease=lease):
            return "lease_revoke", str(lease)
        case LeaseExpire(lease=lease):  # pragma: no branch - there is no other command
            return "lease_expire", str(lease)


def what_changes(data: bytes) -> tuple[Literal["config", "member", "lease", ""], str]:
    """The table and the row that a command would change, for ``access``: ("lease", "") for one to
    be granted, ("", "") for what is no command."""
    kind, name = describe_command(data)
    for table in _TABLES:
        if kind.startswith(table):
            return table, name or ""
    return "", ""


def encode_result(result: Outcome) -> bytes:
    """Encode a result."""
    return _encoder.encode(result)


def decode_result(data: bytes) -> Outcome:
    """Decode a result. Raises :class:`CommandError`."""
    return _decoded(_outcome, data)


def encode_question(question: Question) -> bytes:
    """Encode a question."""
    return _encoder.encode(question)


def decode_question(data: bytes) -> Question:
    """Decode a question. Raises :class:`CommandError`."""
    return _decoded(_question, data)


def encode_reply(reply: Reply) -> bytes:
    """Encode a reply."""
    return _encoder.encode(reply)


def decode_reply(data: bytes) -> Reply:
    """Decode a reply. Raises :class:`CommandError`."""
    return _decoded(_reply, data)


def encode_row(row: Row) -> bytes:
    """Encode one row, for a store that keeps them one by one."""
    return _encoder.encode(row)


def decode_row(data: bytes) -> Row:
    """Decode one row. Raises :class:`CommandError`."""
    return _decoded(_row, data)


def text_bytes(text: str) -> int:
    """Bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def row_bytes(row: Row) -> int:
    """What a row counts for against STATE_BYTES_MAX, in bytes."""
    match row:
        case ConfigEntry(key=key, value=value):
            return ROW_BYTES + text_bytes(key) + text_bytes(value)
        case Member():
            texts = text_bytes(row.id) + text_bytes(row.address or "") + text_bytes(row.zone or "")
            for name, value in row.attributes.items():
                texts += text_bytes(name) + text_bytes(value)
            return ROW_BYTES + texts + 8 * len(row.tokens or ())
        case Lease():  # pragma: no branch - there is no other row
            return ROW_BYTES
