"""The listener's DuckDB file: every stored slot whole, or not at all.

This module alone writes it and knows its tables; nothing else imports ``duckdb`` but ``sql``,
which only reads.  What it keeps:

1. One transaction per micro-batch holds the rows, the whole replicated state (sessions too) and
   the stored slot with its chain.  After kill -9 at any moment the file is at the last of them.
2. Within a batch the last write to a key wins in ``members``, ``config``, ``leases`` and ``ring``;
   ``commits`` and ``history`` keep every one.  Slots are contiguous: a gap is a bug, and raises.
3. A restart needs nobody: :meth:`Store.load` returns the state as it was at the stored slot.
4. A jump by snapshot (:meth:`Store.reset`) is one transaction too.  ``commits`` and ``history``
   then begin at ``listener.history_from_slot``, the slot after the snapshot: rows from before the
   gap are deleted, so that what is there has no hole.

Tables::

    members   id, address, zone, weight, state, attributes JSON, tokens (NULL: derived from id),
              joined_slot, updated_slot, lease (NULL: none)
    ring      start_token, end_token (inclusive; they part 0 .. 2**64 - 1), replicas, owner first
    config    key, value, slot
    leases    lease, ttl_ms, granted_slot
    commits   slot, ballot ("era.round.voter" first proposed under), voter, time (the proposer's
              clock, UTC, informational), kind, key, bytes (of the command), chain
    history   slot, kind ("member", "config", "lease"), key, old JSON, new JSON, op
    listener  one row: name, applied, stored, tip, lag (slots behind the tip), history_from_slot;
              applied and tip are as of the last transaction
    ballots   leadership as the log shows it, ordered by first_slot: ballot, voter, first_slot,
              last_slot, slots (how many were first proposed under it; what a later leader took
              over keeps its ballot), first_time, last_time (the proposer's clock)
    internal.*  the rest of the state; no promise to users

Time travel, by walking back from the present through ``history``::

    members_at(slot)  the rows of ``members`` as they were at ``slot``, with the very same columns
    config_at(slot)   as members_at, of ``config``
    diff(a, b)        kind, key, old, new (JSON): the rows that differ between the states at slot a
                      (``old``) and at slot b (``new``); a may be the later one. A row that was
                      only written again, or changed and changed back, does not differ: config's
                      ``slot`` and a member's ``updated_slot`` are not compared.

A slot is a number, or a scalar subquery, from ``history_from_slot - 1`` up to ``stored``; any other
is an error that says so.

A statement costs 1 to 3 ms of planning whatever it does and a bound Python object 0.4 µs with the
interpreter locked, so rows go in as JSON lines: one text for a table, made by ``msgspec``, taken
apart with ``unnest`` by DuckDB outside the lock (32,000 ranges: 45 ms; as bound lists 200, by its
appender 155, row by row minutes).  There are no indexes: a delete by keys is one scan and a hash
join, uniqueness comes from the state, and a primary key costs every batch more than it saves.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain as joined
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
import duckdb
import msgspec

from listeners.workers import Workers
from trex_core.messages import Genesis, Kind, Value, decode_value
from trex_core.metadata.commands import (
    Change,
    ConfigEntry,
    Lease,
    Member,
    Row,
    describe_command,
)
from trex_core.metadata.ring import EMPTY_RING, Range
from trex_core.metadata.state import MetadataState, ring_of, state_of
from trex_core.sessions import (
    Sessions,
    decode_session,
    encode_session,
    sessions_of,
)

FORMAT: Final = 1
"""Version of the tables; a file of a newer one is refused."""
MEMORY_BYTES: Final = 256 << 20
"""DuckDB's memory limit, the store's and the users' queries together, in bytes."""
ROW_GROUP_ROWS: Final = 2048
"""Rows of a table that are written together, the least DuckDB knows. A checkpoint holds the last
group of each table in memory, whole: with its own 122,880 rows, ``history`` of values of 4 KiB
would outgrow MEMORY_BYTES, and the store would be lost for this process."""
BATCH_SLOTS_MAX: Final = 2048
"""Most slots in one transaction."""
BATCH_BYTES_MAX: Final = 8 << 20
"""A batch is closed when its values reach this many bytes (one larger value may stand alone)."""
PENDING_SLOTS_MAX: Final = 4 * BATCH_SLOTS_MAX
"""Above this many slots not yet stored, :meth:`StoreWriter.room` waits."""
PENDING_BYTES_MAX: Final = 4 * BATCH_BYTES_MAX
"""As PENDING_SLOTS_MAX, in bytes of values."""
STATEMENT_BYTES_MAX: Final = 4 << 20
"""Rows are cut into statements of about this many bytes of text."""
LITERAL_CHARS_MAX: Final = 16 << 10
"""Rows up to this many characters go through a prepared statement."""
LET_GO_S: Final = 2.0
"""How long opening anew waits for users' connections to be closed, in seconds."""
MEMORY_ATTEMPTS: Final = 4
"""How often a transaction that ran out of memory is tried, user queries interrupted in between."""
NOTE_S: Final = 1.0
"""A tip that came without slots is written after this many seconds."""
REST_RATIO: Final = 5.0
"""After a small transaction the writer rests this many times as long as it took, unless somebody
waits for a slot: even a slow stream of slots then costs a listener a sixth of a core at most."""
REST_S_MAX: Final = 0.1
"""Longest such rest, in seconds: how late a slot may be in SQL that nobody waits for."""
REST_SLOTS_MAX: Final = 256
"""A backlog of this many slots ends the rest: a large transaction costs little for each slot."""
TIME_MS_MAX: Final = 253_402_300_799_999
"""Latest proposer's clock that ``commits.time`` shows: the end of the year 9999."""


class StoreError(Exception):
    """The store cannot be used, or no longer; the text says which file, why, and what to do.
    What was stored before is intact unless the text says that the file is damaged."""


class AppliedSlot(msgspec.Struct, frozen=True, gc=False):
    """One applied slot: its encoded value, the chain at it, and what it changed."""

    slot: int
    value: bytes
    chain: bytes
    changes: tuple[Change, ...] = ()


class StoreBatch(msgspec.Struct, frozen=True):
    """Contiguous ``slots`` to store, ``sessions`` and ``metadata`` after the last of them.
    ``applied`` and ``tip`` are what the listener has in memory and the newest slot it knows to be
    fixed. No slots: only these two are noted."""

    slots: tuple[AppliedSlot, ...]
    sessions: Sessions
    metadata: MetadataState
    applied: int = 0
    tip: int = 0


class Stored(NamedTuple):
    """What a restart begins with: everything as of ``slot``."""

    slot: int
    chain: bytes
    genesis: Genesis
    sessions: Sessions
    metadata: MetadataState


# --- tables -----------------------------------------------------------------------------------


class _Column(NamedTuple):
    name: str
    sql_type: str
    json_type: object
    """As ``from_json`` wants it."""
    take: str = "r.{}"
    """From the parsed line ``r`` to the column."""


class _Table:
    """One table and the statements that fill it from JSON lines; the first column is the key."""

    def __init__(self, name: str, *columns: _Column) -> None:
        described = ", ".join(f'"{column.name}" {column.sql_type}' for column in columns)
        taken = ", ".join(column.take.format(f'"{column.name}"') for column in columns)
        shape = msgspec.json.encode({column.name: column.json_type for column in columns}).decode()
        key = columns[0]
        self.empty: Final = ", ".join(f'NULL::{c.sql_type} AS "{c.name}"' for c in columns)
        """The select list of no row."""
        self.past: Final = (
            f'SELECT * FROM {name} WHERE "{key.name}" NOT IN (SELECT key FROM changed)'  # noqa: S608
            f" UNION ALL SELECT {taken} FROM (SELECT from_json(old, '{shape}') AS r"
            " FROM changed WHERE old IS NOT NULL)"
        )
        """The rows as they were before ``changed`` (key, old), oldest of each key."""
        self.create: Final = f"CREATE TABLE {name} ({described})"
        self.insert: Final = (
            f"INSERT INTO {name} SELECT {taken} FROM (SELECT from_json(line, '{shape}') AS r"  # noqa: S608
            " FROM (SELECT unnest(string_split($1, chr(10))) AS line))"
        )
        self.delete: Final = (
            f'DELETE FROM {name} WHERE "{key.name}" IN'  # noqa: S608 - names of our own
            f" (SELECT unnest(from_json($1, '[\"{key.json_type}\"]')))"
        )
        self.clear: Final = f"DELETE FROM {name}"  # noqa: S608
        prepared = "put_" + name.replace(".", "_")
        self.prepare: Final = f"PREPARE {prepared} AS {self.insert}"
        self.execute: Final = f"EXECUTE {prepared}"


def _column(name: str, sql_type: str, json_type: object = None, take: str = "r.{}") -> _Column:
    return _Column(name, sql_type, sql_type if json_type is None else json_type, take)


_BYTES: Final = "from_base64(r.{})"

_MEMBERS: Final = _Table(
    "main.members",
    _column("id", "VARCHAR"),
    _column("address", "VARCHAR"),
    _column("zone", "VARCHAR"),
    _column("weight", "BIGINT"),
    _column("state", "VARCHAR"),
    _column("attributes", "JSON"),
    _column("tokens", "UBIGINT[]", ["UBIGINT"]),
    _column("joined_slot", "BIGINT"),
    _column("updated_slot", "BIGINT"),
    _column("lease", "BIGINT"),
)
_RING: Final = _Table(
    "main.ring",
    _column("end_token", "UBIGINT"),
    _column("start_token", "UBIGINT"),
    _column("replicas", "VARCHAR[]", ["VARCHAR"]),
)
_CONFIG: Final = _Table(
    "main.config",
    _column("key", "VARCHAR"),
    _column("value", "VARCHAR"),
    _column("slot", "BIGINT"),
)
_LEASES: Final = _Table(
    "main.leases",
    _column("lease", "BIGINT"),
    _column("ttl_ms", "BIGINT"),
    _column("granted_slot", "BIGINT"),
)
_COMMITS: Final = _Table(
    "main.commits",
    _column("slot", "BIGINT"),
    _column("ballot", "VARCHAR"),
    _column("voter", "BIGINT"),
    _column("time", "TIMESTAMP", "BIGINT", "epoch_ms(r.{})"),
    _column("kind", "VARCHAR"),
    _column("key", "VARCHAR"),
    _column("bytes", "BIGINT"),
    _column("chain", "BLOB", "VARCHAR", _BYTES),
)
_HISTORY: Final = _Table(
    "main.history",
    _column("slot", "BIGINT"),
    _column("kind", "VARCHAR"),
    _column("key", "VARCHAR"),
    _column("old", "JSON"),
    _column("new", "JSON"),
    _column("op", "VARCHAR"),
)
_SESSIONS: Final = _Table(
    "internal.sessions",
    _column("session", "BIGINT"),
    _column("state", "BLOB", "VARCHAR", _BYTES),
)
_STATE_TABLES: Final = (_MEMBERS, _RING, _CONFIG, _LEASES, _SESSIONS)
_LOG_TABLES: Final = (_COMMITS, _HISTORY)

_CREATE: Final = (
    "CREATE SCHEMA internal",
    "CREATE TABLE internal.identity (format BIGINT, cluster_id BLOB, name VARCHAR)",
    """CREATE TABLE internal.cursor (slot BIGINT, chain BLOB, metadata_slot BIGINT,
    applied BIGINT, tip BIGINT, genesis BLOB, history_from_slot BIGINT)""",
    *(table.create for table in (*_STATE_TABLES, *_LOG_TABLES)),
    """CREATE VIEW main.listener AS SELECT name, applied, slot AS stored, tip,
    greatest(tip - slot, 0) AS lag, history_from_slot FROM internal.identity, internal.cursor""",
)
_MOVE_CURSOR: Final = (
    "UPDATE internal.cursor SET slot = $1, chain = $2, metadata_slot = $3, applied = $4, tip = $5"
)
_SET_GENESIS: Final = "UPDATE internal.cursor SET genesis = $1"
_SET_HISTORY: Final = "UPDATE internal.cursor SET history_from_slot = $1"


# --- time travel ------------------------------------------------------------------------------


def _at(name: str, table: _Table, kind: str) -> str:
    """The macro ``name``: ``table`` at a slot. What did not change since is as it is now; what did
    is as the first change after the slot found it. The first branch has no rows; it is what makes
    a bad slot an error even where all else is empty."""
    return f"""CREATE OR REPLACE MACRO main.{name}(at_slot) AS TABLE
    WITH moment AS (SELECT slot FROM internal.known_slot(at_slot)),
    changed AS (
        SELECT key, arg_min_null(old, slot) AS old FROM main.history
        WHERE kind = '{kind}' AND slot > (SELECT slot FROM moment) GROUP BY key
    )
    SELECT {table.empty} FROM moment WHERE slot IS NULL UNION ALL {table.past}"""  # noqa: S608


_MACROS: Final = (
    # The argument is bound where no column is in sight, so that a name in it is an error.
    """CREATE OR REPLACE MACRO internal.known_slot(asked) AS TABLE
    SELECT CASE
        WHEN asked_slot IS NULL THEN error('which slot? it is NULL')
        WHEN asked_slot < history_from_slot - 1 THEN error(
            'history begins at slot ' || history_from_slot || ' here: ' || history_from_slot - 1
            || ' is the first slot to ask for, not ' || asked_slot)
        WHEN asked_slot > slot THEN error(
            'stored is slot ' || slot || ' so far, not ' || asked_slot)
        ELSE asked_slot END AS slot
    FROM (SELECT CAST(asked AS BIGINT) AS asked_slot), internal.cursor""",
    _at("members_at", _MEMBERS, "member"),
    _at("config_at", _CONFIG, "config"),
    """CREATE OR REPLACE MACRO internal.content(line) AS
    json_merge_patch(line, '{"slot": null, "updated_slot": null}')""",
    """CREATE OR REPLACE MACRO main.diff(slot_a, slot_b) AS TABLE
    WITH moment_a AS (SELECT slot FROM internal.known_slot(slot_a)),
    moment_b AS (SELECT slot FROM internal.known_slot(slot_b)),
    moments AS (SELECT moment_a.slot AS a, moment_b.slot AS b FROM moment_a, moment_b),
    changed AS (
        SELECT kind, key, arg_min_null(old, slot) AS earlier, arg_max_null(new, slot) AS later
        FROM main.history
        WHERE slot > (SELECT least(a, b) FROM moments)
            AND slot <= (SELECT greatest(a, b) FROM moments)
        GROUP BY kind, key
    )
    SELECT NULL::VARCHAR AS kind, NULL::VARCHAR AS key, NULL::JSON AS old, NULL::JSON AS new
    FROM moments WHERE a IS NULL OR b IS NULL
    UNION ALL SELECT kind, key, if(a <= b, earlier, later), if(a <= b, later, earlier)
    FROM changed, moments WHERE internal.content(earlier) IS DISTINCT FROM internal.content(later)
    ORDER BY kind, key""",
    """CREATE OR REPLACE VIEW main.ballots AS
    SELECT ballot, any_value(voter) AS voter, min(slot) AS first_slot, max(slot) AS last_slot,
        count(*) AS slots, min(time) AS first_time, max(time) AS last_time
    FROM main.commits GROUP BY ballot ORDER BY first_slot""",
)
"""Made anew whenever a store is opened: they hold nothing, and an older file gets them too."""


# --- rows as JSON lines -----------------------------------------------------------------------


class _MemberRow(msgspec.Struct, frozen=True, gc=False):
    id: str
    address: str | None
    zone: str | None
    weight: int
    state: str
    attributes: dict[str, str]
    tokens: tuple[int, ...] | None
    joined_slot: int
    updated_slot: int
    lease: int | None


class _ConfigRow(msgspec.Struct, frozen=True, gc=False):
    key: str
    value: str
    slot: int


class _LeaseRow(msgspec.Struct, frozen=True, gc=False):
    lease: int
    ttl_ms: int
    granted_slot: int


class _RingRow(msgspec.Struct, frozen=True, gc=False):
    end_token: int
    start_token: int
    replicas: tuple[str, ...]


class _CommitRow(msgspec.Struct, frozen=True, gc=False):
    slot: int
    ballot: str
    voter: int
    time: int | None
    kind: str
    key: str | None
    chain: bytes
    bytes: int


class _HistoryRow(msgspec.Struct, frozen=True, gc=False):
    slot: int
    kind: str
    key: str
    old: msgspec.Raw | None
    new: msgspec.Raw | None
    op: str


class _SessionRow(msgspec.Struct, frozen=True, gc=False):
    session: int
    state: bytes


_json: Final = msgspec.json.Encoder()
_genesis_decoder: Final = msgspec.msgpack.Decoder(Genesis)
_attributes_decoder: Final = msgspec.json.Decoder(dict[str, str])
_KIND_NAMES: Final = {
    Kind.NOOP: "noop",
    Kind.OPEN: "open",
    Kind.CLOSE: "close",
    Kind.GENESIS: "genesis",
    Kind.SKIP: "skip",
}


def _row_json(row: Row) -> bytes:
    """A row of the state as the JSON object that its table and ``history`` show."""
    match row:
        case Member():
            return _json.encode(
                _MemberRow(
                    row.id,
                    row.address,
                    row.zone,
                    row.weight,
                    row.state,
                    row.attributes,
                    row.tokens,
                    row.joined_slot,
                    row.updated_slot,
                    row.lease or None,
                )
            )
        case ConfigEntry(key=key, value=value, slot=slot):
            return _json.encode(_ConfigRow(key, value, slot))
        case Lease(ttl_ms=ttl_ms, granted_slot=granted_slot):
            return _json.encode(_LeaseRow(granted_slot, ttl_ms, granted_slot))


def _ring_json(row: Range) -> bytes:
    return _json.encode(_RingRow(row.end, row.start, row.replicas))


def describe_value(value: Value) -> tuple[str, str | None]:
    """(kind, key) of what a slot holds, as in ``commits``."""
    kind = _KIND_NAMES.get(value.kind)
    if kind is None:
        return describe_command(value.command)
    return kind, str(value.session) if value.kind in (Kind.CLOSE, Kind.SKIP) else None


def _commit_json(slot: AppliedSlot, value: Value) -> bytes:
    kind, key = describe_value(value)
    time_ms = min(value.time_ms, TIME_MS_MAX) if value.time_ms > 0 else None
    return _json.encode(
        _CommitRow(
            slot.slot,
            str(value.ballot),
            value.ballot.voter,
            time_ms,
            kind,
            key,
            slot.chain,
            len(value.command),
        )
    )


class _Statement(NamedTuple):
    sql: str
    parameters: tuple[object, ...]


def _insert(table: _Table, lines: list[bytes]) -> _Statement:
    """DuckDB takes no parameter for a prepared statement, only a literal: cheaper while short."""
    text = b"\n".join(lines).decode()
    if len(text) > LITERAL_CHARS_MAX:
        return _Statement(table.insert, (text,))
    literal = text.replace("'", "''")
    return _Statement(f"{table.execute}('{literal}')", ())


def _inserts(table: _Table, lines: Iterable[bytes]) -> Iterator[_Statement]:
    part: list[bytes] = []
    size_bytes = 0
    for line in lines:
        part.append(line)
        size_bytes += len(line)
        if size_bytes >= STATEMENT_BYTES_MAX:
            yield _insert(table, part)
            part, size_bytes = [], 0
    if part:
        yield _insert(table, part)


def _deletes(table: _Table, keys: Sequence[str] | Sequence[int]) -> Iterator[_Statement]:
    if keys:
        yield _Statement(table.delete, (_json.encode(keys).decode(),))


class _Edits:
    """The last write to each key of one table within a batch."""

    def __init__(self) -> None:
        self._lines: dict[str | int, bytes | None] = {}
        self._existed: list[str | int] = []

    def note(self, key: str | int, existed: bool, line: bytes | None) -> None:
        """``key`` becomes ``line`` (None: it goes); ``existed``: it was there before this."""
        if key not in self._lines and existed:
            self._existed.append(key)
        self._lines[key] = line

    def statements(self, table: _Table) -> Iterator[_Statement]:
        """Remove what was there before the batch, write what is there after it."""
        yield from _deletes(table, self._existed)  # type: ignore[arg-type]
        yield from _inserts(table, (line for line in self._lines.values() if line is not None))


# --- the store ------------------------------------------------------------------------------


class Store:
    """One open store file. Its methods block and are called by one thread at a time, but for
    :meth:`connect`, which any thread may call. Errors are :class:`StoreError`.

    What DuckDB holds in memory is not believed after a transaction that failed: seen were rows of
    a failed commit that stayed, and rollbacks that never ended. What is in the file is: so the
    file is opened anew before the transaction is tried again.
    """

    def __init__(self, path: Path, attach: Callable[[], duckdb.DuckDBPyConnection]) -> None:
        self.path: Final = path
        self.relieve: Callable[[], None] = lambda: None
        """Called when a transaction lacks memory, before it is tried again: interrupt user
        queries and return when they let go."""
        self._attach = attach
        self._root = attach()
        self._writer = self._cursor()
        self._gate = threading.Condition()
        """Guards the next two, and opening."""
        self._failed = False
        """A transaction failed and the file was not opened anew since."""
        self._lent = 0
        """Connections that users of :meth:`connect` hold."""
        self._slot = 0
        self._chain = b""
        self._history_from_slot = 1
        self._ring = EMPTY_RING
        self._session_names: frozenset[int] | set[int] = frozenset()
        self._loaded: Stored | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        cluster_id: bytes,
        name: str,
        *,
        memory_bytes: int = MEMORY_BYTES,
        threads: int = 1,
    ) -> Store:
        """Open the store at ``path``, or make it, for listener ``name`` of the cluster
        ``cluster_id``. ``threads``: how many cores one statement may use.

        Raises :class:`StoreError` if it belongs to another cluster or listener, has a newer
        format, is in use, is damaged, or is no store at all.
        """
        path = path.absolute()
        with _taken(path):
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not path.exists():
                    _make(path, cluster_id, name)
                store = cls(path, partial(_attached, path, memory_bytes, threads))
            except (duckdb.Error, OSError) as error:
                raise _not_opened(path, error) from error
            try:
                with _named(path):
                    store._identify(cluster_id, name)
                    store._define()
                    store._prepare()
                    store._read()
            except BaseException:
                store._root.close()
                raise
        return store

    @property
    def slot(self) -> int:
        """The stored slot; 0 in a new store."""
        return self._slot

    @property
    def history_from_slot(self) -> int:
        """``commits`` and ``history`` are complete from this slot on."""
        return self._history_from_slot

    def load(self) -> Stored | None:
        """What was stored when the store was opened; None if it was new. Only the first call
        answers, so that the store does not hold on to it."""
        loaded, self._loaded = self._loaded, None
        return loaded

    def write(self, batch: StoreBatch) -> None:
        """Store a batch: all of it, or (on :class:`StoreError`) nothing.

        Raises ``ValueError`` if its first slot is not the one after the stored slot or it has a
        gap. If DuckDB lacks memory, :attr:`relieve` is called and the transaction tried again.
        """
        first = self._slot + 1
        for at, entry in enumerate(batch.slots, first):
            if entry.slot != at:
                raise ValueError(f"slot {at} must be stored next, not {entry.slot}")
        last = batch.slots[-1] if batch.slots else None
        statements: list[_Statement] = []
        names = self._session_names
        ring = self._ring
        if last is not None:
            values = [decode_value(slot.value) for slot in batch.slots]
            statements.extend(_logged(batch.slots, values))
            names, session_statements = self._sessions_after(batch, values)
            statements.extend(session_statements)
            changes = [change for slot in batch.slots for change in slot.changes]
            statements.extend(_state_after(changes))
            ring, delta = self._ring.updated(changes)
            ends = [*delta.removed, *(row.end for row in delta.put)]
            statements.extend(_deletes(_RING, ends))
            statements.extend(_inserts(_RING, map(_ring_json, delta.put)))
            if first == 1 and values[0].kind == Kind.GENESIS:
                statements.append(_Statement(_SET_GENESIS, (values[0].command,)))
        slot = last.slot if last is not None else self._slot
        chain = last.chain if last is not None else self._chain
        applied = max(batch.applied, slot)
        cursor = (slot, chain, batch.metadata.slot, applied, max(batch.tip, applied))
        statements.append(_Statement(_MOVE_CURSOR, cursor))
        self._commit(statements, slot)
        self._slot, self._chain, self._ring, self._session_names = slot, chain, ring, names

    def reset(
        self,
        slot: int,
        chain: bytes,
        genesis: Genesis,
        sessions: Sessions,
        metadata: MetadataState,
        *,
        tip: int = 0,
    ) -> None:
        """Replace everything by the state of a snapshot at ``slot``, in one transaction.

        Afterwards ``history_from_slot`` is ``slot + 1`` and ``commits`` and ``history`` are empty:
        they claim nothing below. Raises ``ValueError`` if ``slot`` is below the stored one.
        """
        if slot < self._slot:
            raise ValueError(f"slot {self._slot} is stored already; a snapshot at {slot} is older")
        ring = ring_of(metadata)
        statements = joined(
            (_Statement(table.clear, ()) for table in (*_STATE_TABLES, *_LOG_TABLES)),
            _inserts(_MEMBERS, map(_row_json, metadata.members.values())),
            _inserts(_CONFIG, map(_row_json, metadata.config.values())),
            _inserts(_LEASES, map(_row_json, metadata.leases.values())),
            _inserts(_RING, map(_ring_json, ring.ranges())),
            _inserts(_SESSIONS, map(_session_json, sessions.open.items())),
            (
                _Statement(_SET_GENESIS, (msgspec.msgpack.encode(genesis),)),
                _Statement(_SET_HISTORY, (slot + 1,)),
                _Statement(_MOVE_CURSOR, (slot, chain, metadata.slot, slot, max(tip, slot))),
            ),
        )
        self._commit(list(statements), slot)
        self._slot, self._chain, self._ring = slot, chain, ring
        self._session_names = frozenset(sessions.open)
        self._history_from_slot = slot + 1

    @contextmanager
    def connect(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for one user query, closed at the end. Any thread may call this.

        Raises ``MemoryError`` while the store recovers from a lack of memory: try again.
        """
        with self._gate:
            if self._failed:
                raise MemoryError("the store needs its memory itself; try again")
            connection = self._cursor()
            self._lent += 1
        try:
            yield connection
        finally:
            connection.close()
            with self._gate:
                self._lent -= 1
                self._gate.notify_all()

    def close(self) -> None:
        """Close the file. No query may be running (``sql.Queries.close`` first)."""
        with self._gate, suppress(duckdb.Error):
            if not self._failed:
                self._writer.execute("CHECKPOINT")
        with self._gate, suppress(duckdb.Error):
            self._root.close()
        _in_use.discard(self.path)

    # --- opening

    def _identify(self, cluster_id: bytes, name: str) -> None:
        """Refuse a file that is not ours."""
        found = self._rows("SELECT schema_name, table_name FROM duckdb_tables()")
        if ("internal", "identity") not in found:
            raise StoreError(f"{self.path} is a DuckDB file, but no listener's store; {_AWAY}")
        rows = self._rows("SELECT format, cluster_id, name FROM internal.identity")
        if len(rows) != 1:
            raise StoreError(f"{self.path} is damaged: it does not say whose it is; {_AWAY}")
        row = rows[0]
        if row[0] > FORMAT:
            raise StoreError(
                f"{self.path} has format {row[0]}, this program knows up to {FORMAT}: "
                "upgrade this listener, or give it another directory"
            )
        if row[1] != cluster_id:
            raise StoreError(
                f"{self.path} belongs to cluster {bytes(row[1]).hex()}, not to "
                f"{cluster_id.hex()}: give this listener another directory"
            )
        if row[2] != name:
            raise StoreError(
                f"{self.path} belongs to listener {row[2]!r}, not to {name!r}: "
                "use that name, or another directory"
            )

    def _define(self) -> None:
        """Bring views and macros to this version's."""
        self._writer.begin()
        for sql in _MACROS:
            self._writer.execute(sql)
        self._writer.commit()

    def _prepare(self) -> None:
        for table in (*_STATE_TABLES, *_LOG_TABLES):
            self._writer.execute(table.prepare)

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        cursor = self._root.cursor()
        cursor.execute("USE store")
        return cursor

    def _read(self) -> None:
        """Read the state back."""
        cursor = self._rows(
            "SELECT slot, chain, genesis, metadata_slot, history_from_slot FROM internal.cursor"
        )
        if len(cursor) != 1:
            raise StoreError(f"{self.path} is damaged: it does not say where it is; {_AWAY}")
        slot, chain, genesis, metadata_slot, history_from_slot = cursor[0]
        if slot == 0:
            return
        members = tuple(
            Member(
                row[0],
                row[1],
                row[2],
                row[3],
                row[4],
                dict(sorted(_attributes_decoder.decode(row[5]).items())),
                None if row[6] is None else tuple(row[6]),
                row[9] or 0,
                row[7],
                row[8],
            )
            for row in self._rows(
                "SELECT id, address, zone, weight, state, attributes, tokens, joined_slot,"
                " updated_slot, lease FROM main.members"
            )
        )
        config = tuple(
            ConfigEntry(*row) for row in self._rows("SELECT key, value, slot FROM main.config")
        )
        leases = tuple(
            Lease(*row) for row in self._rows("SELECT ttl_ms, granted_slot FROM main.leases")
        )
        sessions = sessions_of(
            (name, decode_session(state))
            for name, state in self._rows("SELECT session, state FROM internal.sessions")
        )
        metadata = state_of(metadata_slot, (*config, *members, *leases))
        self._slot, self._chain, self._history_from_slot = slot, bytes(chain), history_from_slot
        self._ring = ring_of(metadata)
        self._session_names = frozenset(sessions.open)
        self._loaded = Stored(
            slot, self._chain, _genesis_decoder.decode(genesis), sessions, metadata
        )

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self._writer.execute(sql).fetchall()

    # --- writing

    def _sessions_after(
        self, batch: StoreBatch, values: Sequence[Value]
    ) -> tuple[frozenset[int] | set[int], list[_Statement]]:
        """The names of the open sessions after a batch, and what to write of them."""
        opened = batch.sessions.open
        names = self._session_names
        touched: set[int] = set()
        expired: set[int] = set()
        for slot, value in zip(batch.slots, values, strict=True):
            match value.kind:
                case Kind.OPEN:
                    touched.add(slot.slot)
                case Kind.COMMAND | Kind.SKIP | Kind.CLOSE:
                    touched.add(value.session)
                case _:
                    pass
        if any(value.kind in (Kind.OPEN, Kind.CLOSE) for value in values):
            # Opening one session may expire another, which no value names.
            after = set(opened)
            expired = set(names) - after
            names = after
        present = [name for name in touched if name in opened]
        gone = [name for name in joined(expired, present) if name in self._session_names]
        return names, [
            *_deletes(_SESSIONS, gone),
            *_inserts(_SESSIONS, (_session_json((name, opened[name])) for name in present)),
        ]

    def _commit(self, statements: Sequence[_Statement], slot: int) -> None:
        """Run ``statements``, which store up to ``slot``, in one transaction; again after a lack
        of memory."""
        for attempt in range(1, MEMORY_ATTEMPTS + 1):
            try:
                with _named(self.path):
                    if self._failed:
                        self._open_anew()
                        [(stored,)] = self._rows("SELECT slot FROM internal.cursor")
                        if stored != self._slot:
                            if stored != slot:
                                raise StoreError(
                                    f"{self.path} is damaged: it is at slot {stored}, and at "
                                    f"{self._slot} or {slot} it should be; {_AWAY}"
                                )
                            return  # what failed was in the file by then
                    self._transact(statements)
                return
            except (duckdb.OutOfMemoryException, MemoryError) as error:
                if attempt == MEMORY_ATTEMPTS:
                    raise StoreError(
                        f"{self.path}: no memory for a transaction, {attempt} times; give the "
                        "store a higher memory limit"
                    ) from error
                self.relieve()

    def _transact(self, statements: Sequence[_Statement]) -> None:
        try:
            self._writer.begin()
            for statement in statements:
                self._writer.execute(statement.sql, statement.parameters)
            self._writer.commit()
        except BaseException:
            with self._gate:
                self._failed = True
            raise

    def _open_anew(self) -> None:
        """Believe the file, nothing else. Raises ``MemoryError`` if a query does not let go."""
        with self._gate:
            if not self._gate.wait_for(lambda: self._lent == 0, LET_GO_S):
                raise MemoryError("a query does not let go of its memory")
            self._root.close()
            self._root = self._attach()
            self._writer = self._cursor()
            self._prepare()
            self._failed = False


_in_use: Final[set[Path]] = set()
"""Files open in this process: DuckDB's own lock only keeps other processes away."""


@contextmanager
def _taken(path: Path) -> Iterator[None]:
    """Mark ``path`` as in use, unless opening it fails."""
    if path in _in_use:
        raise StoreError(f"{path} is in use by this process already: close it first")
    _in_use.add(path)
    try:
        yield
    except BaseException:
        _in_use.discard(path)
        raise


def _attached(path: Path, memory_bytes: int, threads: int) -> duckdb.DuckDBPyConnection:
    """A database in memory to which the file is attached, and to which nothing else can be."""
    root = duckdb.connect(
        ":memory:",
        config={
            "threads": threads,
            "memory_limit": f"{memory_bytes}B",
            "temp_directory": "",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "allow_persistent_secrets": "false",
            "python_enable_replacements": "false",
        },
    )
    try:
        # Closing after a failed transaction must not write what is in memory to the file.
        root.execute("PRAGMA disable_checkpoint_on_shutdown")
        quoted = str(path).replace("'", "''")
        root.execute(f"ATTACH '{quoted}' AS store (ROW_GROUP_SIZE {ROW_GROUP_ROWS})")
        root.execute("SET enable_external_access = false")
        root.execute("SET lock_configuration = true")
    except BaseException:
        root.close()
        raise
    return root


def _make(path: Path, cluster_id: bytes, name: str) -> None:
    """Make a new store: beside, then renamed, so that a crash leaves all of it or none."""
    beside = path.with_name(path.name + ".new")
    # A log without its file is of one that was moved away: it must not be replayed into this one.
    for leftover in (
        beside,
        path.with_name(path.name + ".new.wal"),
        path.with_name(path.name + ".wal"),
    ):
        leftover.unlink(missing_ok=True)
    with duckdb.connect(str(beside)) as connection:
        connection.begin()
        for sql in _CREATE:
            connection.execute(sql)
        connection.execute(
            "INSERT INTO internal.identity VALUES ($1, $2, $3)", (FORMAT, cluster_id, name)
        )
        connection.execute("INSERT INTO internal.cursor VALUES (0, ''::BLOB, 0, 0, 0, ''::BLOB, 1)")
        for line in map(_ring_json, EMPTY_RING.ranges()):
            connection.execute(_RING.insert, (line.decode(),))
        connection.commit()
        connection.execute("CHECKPOINT")
    beside.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _logged(slots: Sequence[AppliedSlot], values: Sequence[Value]) -> Iterator[_Statement]:
    yield from _inserts(_COMMITS, map(_commit_json, slots, values))
    yield from _inserts(
        _HISTORY, (_history_json(slot.slot, change) for slot in slots for change in slot.changes)
    )


def _history_json(slot: int, change: Change) -> bytes:
    old = msgspec.Raw(_row_json(change.old)) if change.old is not None else None
    new = msgspec.Raw(_row_json(change.new)) if change.new is not None else None
    op = "insert" if old is None else "delete" if new is None else "update"
    return _json.encode(_HistoryRow(slot, change.kind, change.key, old, new, op))


def _state_after(changes: Iterable[Change]) -> Iterator[_Statement]:
    members, config, leases = _Edits(), _Edits(), _Edits()
    for change in changes:
        line = _row_json(change.new) if change.new is not None else None
        existed = change.old is not None
        match change.kind:
            case "member":
                members.note(change.key, existed, line)
            case "config":
                config.note(change.key, existed, line)
            case "lease":
                leases.note(int(change.key), existed, line)
    yield from members.statements(_MEMBERS)
    yield from config.statements(_CONFIG)
    yield from leases.statements(_LEASES)


def _session_json(item: tuple[int, Any]) -> bytes:
    return _json.encode(_SessionRow(item[0], encode_session(item[1])))


# --- errors -----------------------------------------------------------------------------------

_AWAY: Final = "move it away and start again: everything in it is fetched from the cluster"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """DuckDB's errors as :class:`StoreError`, but for lack of memory, which may pass."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        # What a commit says when it lacks memory: for a block, or for data, or to pin a block.
        lacks = ("could not allocate", "failed to allocate", "failed to pin")
        if any(words in str(error) for words in lacks):
            raise duckdb.OutOfMemoryException(str(error)) from error
        raise StoreError(f"{path}: {_first_line(error)}; if it is damaged, {_AWAY}") from error


def _not_opened(path: Path, error: Exception) -> StoreError:
    text = _first_line(error)
    if "Could not set lock" in text:
        return StoreError(f"{path} is in use by another process: stop it first ({text})")
    if isinstance(error, OSError) or "Permission" in text:
        return StoreError(f"{path} cannot be opened: {text}")
    return StoreError(f"{path} is damaged or no store ({text}); {_AWAY}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- storing behind a listener ------------------------------------------------------------------


class StoreWriter:
    """Stores what a listener has applied, behind it: one transaction at a time in one thread, each
    taking all that gathered during the last, so batches grow with the backlog.

    :meth:`add` never waits; the listener awaits :meth:`room` before it applies more. When
    :meth:`run` ends with an error, so does every wait.
    """

    def __init__(self, store: Store) -> None:
        self._store: Final = store
        self._thread: Final = Workers("trex-store")
        self._pending: deque[StoreBatch] = deque()
        self._pending_slots = 0
        self._pending_bytes = 0
        self._note: StoreBatch | None = None
        self._tip = store.slot
        self._waiters = 0
        self._resting = False
        self._wake = anyio.Event()
        self._moved = anyio.Event()
        self._failure: StoreError | None = None
        self.transactions = 0
        """Transactions so far."""

    @property
    def stored(self) -> int:
        """The stored slot."""
        return self._store.slot

    @property
    def backlog_slots(self) -> int:
        """Slots added and not yet in a finished transaction."""
        return self._pending_slots

    def add(self, batch: StoreBatch) -> None:
        """``batch`` was applied. One without slots only tells a new tip, which is written with the
        next slots, or within NOTE_S."""
        if batch.slots:
            self._pending.append(batch)
            self._pending_slots += len(batch.slots)
            self._pending_bytes += _value_bytes(batch)
        elif batch.tip <= self._tip:
            return
        self._tip = max(self._tip, batch.tip)
        self._note = batch
        if not self._resting or self._pending_slots >= REST_SLOTS_MAX:
            self._wake.set()

    async def run(self) -> None:
        """Store until cancelled; a transaction under way is finished first. Raises
        :class:`StoreError` when one fails."""
        try:
            while True:
                await self._work()
                batch = self._taken()
                began = time.monotonic()
                await self._thread.run(self._store.write, batch)
                self.transactions += 1
                self._pending_slots -= len(batch.slots)
                self._pending_bytes -= _value_bytes(batch)
                self._tell()
                await self._rest(time.monotonic() - began)
        except StoreError as error:
            self._failure = error
            raise
        finally:
            if self._failure is None:
                self._failure = StoreError(f"{self._store.path}: the listener has stopped")
            self._thread.close()
            self._tell()

    async def room(self) -> None:
        """Wait until the backlog is below PENDING_SLOTS_MAX and PENDING_BYTES_MAX.
        Raises :class:`StoreError` if the store failed."""
        while self._pending_slots >= PENDING_SLOTS_MAX or self._pending_bytes >= PENDING_BYTES_MAX:
            await self._change()

    async def wait_stored(self, slot: int) -> None:
        """Wait until ``slot`` is stored. Raises :class:`StoreError` if the store failed."""
        if self._store.slot >= slot:
            return
        self._waiters += 1
        self._wake.set()
        try:
            while self._store.slot < slot:
                await self._change()
        finally:
            self._waiters -= 1

    async def reset(
        self,
        slot: int,
        chain: bytes,
        genesis: Genesis,
        sessions: Sessions,
        metadata: MetadataState,
        *,
        tip: int = 0,
    ) -> None:
        """:meth:`Store.reset` in the store's thread. What is not stored yet is dropped: the
        snapshot holds it. Nothing may be added meanwhile. Raises :class:`StoreError`."""
        for batch in self._pending:
            self._pending_slots -= len(batch.slots)
            self._pending_bytes -= _value_bytes(batch)
        self._pending.clear()
        self._note = None
        self._tip = max(self._tip, tip, slot)
        replace = partial(
            self._store.reset, slot, chain, genesis, sessions, metadata, tip=self._tip
        )
        if self._failure is not None:
            raise self._failure
        await self._thread.run(replace)
        self.transactions += 1
        self._tell()

    async def _work(self) -> None:
        """Wait for slots, or for NOTE_S with a tip to note."""
        while not self._pending:
            noted = self._note is None
            with anyio.move_on_after(math.inf if noted else NOTE_S) as patience:
                self._wake = anyio.Event()
                await self._wake.wait()
            if patience.cancelled_caught and self._note is not None:
                return

    async def _rest(self, took_s: float) -> None:
        """Let small transactions gather into a larger one, while nobody waits."""
        self._resting = True
        with anyio.move_on_after(min(REST_RATIO * took_s, REST_S_MAX)):
            while not self._waiters and self._pending_slots < REST_SLOTS_MAX:
                self._wake = anyio.Event()
                await self._wake.wait()
        self._resting = False

    def _taken(self) -> StoreBatch:
        """The next batch: as many of the pending ones, whole, as fit one transaction."""
        last = self._note
        slots: list[AppliedSlot] = []
        size_bytes = 0
        while self._pending:
            batch = self._pending[0]
            size_bytes += _value_bytes(batch)
            if slots and (
                len(slots) + len(batch.slots) > BATCH_SLOTS_MAX or size_bytes > BATCH_BYTES_MAX
            ):
                break
            slots.extend(batch.slots)
            last = self._pending.popleft()
        assert last is not None, "something is pending"
        self._note = None
        return StoreBatch(tuple(slots), last.sessions, last.metadata, last.applied, self._tip)

    async def _change(self) -> None:
        if self._failure is not None:
            raise self._failure
        await self._moved.wait()

    def _tell(self) -> None:
        moved, self._moved = self._moved, anyio.Event()
        moved.set()


def _value_bytes(batch: StoreBatch) -> int:
    return sum(len(slot.value) for slot in batch.slots)
