"""SQL for users: one SELECT at a time that can hurt neither the listener nor its store.

This module alone runs SQL that somebody else wrote, and serves it on a local socket.  What holds,
each claim with a test:

==========================  ======================================================================
a write in any disguise     ``BEGIN TRANSACTION READ ONLY``: the engine refuses it (a CTE with
                            DELETE … RETURNING has statement type SELECT, so looking is not enough)
a text that never parses    its length and its open brackets are bounded before the engine sees it
any other statement         exactly one statement, of type SELECT, is let through to the engine
files, network, extensions  ``enable_external_access=false``, no autoload; set by the store
settings                    ``lock_configuration=true``; set by the store
state between requests      each query has a connection of its own, closed after it
a query that never ends     interrupted at its deadline
a query that wants memory   the store's ``memory_limit``, no spilling to disk.  DuckDB counts sorts,
                            joins, aggregates, but not a single vast string or list
                            (``repeat('x', 4000000000)``): :func:`contain_memory` stops those
a huge result               rows and bytes are counted while they are fetched, not after
a value deep in values      refused over the socket above NESTING_MAX levels
a hostile neighbour         directory 0700, socket 0600, the peer's uid checked
==========================  ======================================================================

On the socket a message is 4 bytes length (big-endian), then a MessagePack array: a client sends
:class:`Request`, the server answers each with one :class:`Rows` or :class:`Failure`, in order.
``duckdb`` is imported where a query is run, not by a client of the socket.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import resource
import socket
import stat
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import anyio.abc
import msgspec

from listeners.workers import Workers, tell

if TYPE_CHECKING:
    import duckdb

SQL_BYTES_MAX: Final = 1 << 16
"""Longest query text, in bytes of UTF-8. DuckDB parses with Python's lock held, so that the loop
waits meanwhile, and cannot be interrupted at it; on some texts the time grows with their square."""
BRACKETS_MAX: Final = 64
"""Most brackets, ``( [ {``, open at once in a query: a thousand unclosed parentheses take DuckDB's
parser seconds, and four thousand a minute, growing with the cube; and its binder cannot be
interrupted at a list of lists, which it takes a gigabyte and seconds for."""
ROWS_MAX: Final = 200_000
"""Most rows of one result."""
RESULT_BYTES_MAX: Final = 32 << 20
"""Largest result, in encoded bytes."""
NESTING_MAX: Final = 64
"""Most levels of lists, structs and maps of a value that is sent over the socket."""
DEADLINE_MS: Final = 10_000
"""Deadline of a query that names none, in milliseconds."""
DEADLINE_MS_MAX: Final = 600_000
"""Longest deadline a query may ask for, in milliseconds."""
QUERIES_MAX: Final = 4
"""Most queries running at once; one more waits, within its deadline."""
ENCODERS: Final = 2
"""Threads that encode answers: the largest takes a second, in which the loop goes on."""
CONNECTIONS_MAX: Final = 32
"""Most connections to the socket; one more is told so and closed."""
IDLE_S: Final = 60.0
"""A connection without a request for this many seconds is closed."""
REQUEST_S: Final = 5.0
"""A request must arrive whole within this many seconds of its first byte, and its answer be taken
within as many of being sent."""
RELIEVE_S: Final = 2.0
"""How long a store that lacks memory waits for interrupted queries, in seconds."""
CLOSE_S: Final = 2.0
"""How long closing waits for interrupted queries, in seconds."""
HEADROOM_BYTES_MIN: Final = 256 << 20
"""While others run, no query begins in a contained process that can map less than this."""
ADDRESS_SPACE_MARGIN_BYTES: Final = 1 << 30
"""What :func:`contain_memory` leaves above what is mapped at its call, unless told otherwise."""

_ALLOCATOR_SETTINGS: Final = "DUCKDB_JE_MALLOC_CONF"
_ARENAS_MAX_PARAMETER: Final = -8  # M_ARENA_MAX of <malloc.h>
_ARENAS_MAX: Final = 2
_FETCH_ROWS: Final = 2048
_TAKEN: Final = "queries that run hold what memory there is; try again"
_TOO_DEEP: Final = "a value of the result is nested too deeply; select a part of it"
_REQUEST_MARGIN_BYTES: Final = 64
_INTERRUPT_AGAIN_S: Final = 0.05
_LENGTH: Final = struct.Struct(">I")
_PEER: Final = struct.Struct("3i")
_SOCKET_PATH_BYTES_MAX: Final = 107


# --- errors ---------------------------------------------------------------------------------


class SqlError(Exception):
    """A query was not answered. The class says why, the text what to do; nothing was changed."""


class SqlRefusedError(SqlError):
    """Not one SELECT, or it wants what a reader may not: writes, files, extensions, settings."""


class SqlInvalidError(SqlError):
    """The engine does not accept it: syntax, unknown name, wrong type, failed conversion."""


class SqlDeadlineError(SqlError):
    """Not done by its deadline (or, with ``at_least_slot``, the store did not get there)."""


class SqlTooLargeError(SqlError):
    """The text, or the result, is over its limit. Add a LIMIT or aggregate."""


class SqlMemoryError(SqlError):
    """It needs more memory than the store's limit, or the store needed that memory itself."""


class SqlBusyError(SqlError):
    """Too many connections, or queries, at once. Try again later."""


class SqlUnavailableError(SqlError):
    """No listener answers here, it is stopping, or it hung up in the middle."""


_ERRORS: Final[dict[str, type[SqlError]]] = {
    error.__name__: error
    for error in (
        SqlRefusedError,
        SqlInvalidError,
        SqlDeadlineError,
        SqlTooLargeError,
        SqlMemoryError,
        SqlBusyError,
        SqlUnavailableError,
    )
}


# --- what is asked and answered ----------------------------------------------------------------


class QueryResult(msgspec.Struct, frozen=True):
    """``rows`` of a SELECT as of ``slot`` (stored), ``lag`` slots behind the tip heard last.
    ``types`` are DuckDB's names of the columns' types."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    slot: int
    lag: int


class Request(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Run ``sql``, within ``deadline_ms``, once slot ``at_least_slot`` is stored (None: now)."""

    sql: str
    deadline_ms: int = DEADLINE_MS
    at_least_slot: int | None = None


class Rows(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The answer. Values are plain: texts, numbers, booleans, None, lists and maps; dates,
    decimals and integers over 64 bits are texts."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    slot: int
    lag: int


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """No answer: ``error`` is the name of a class of the tree above, ``message`` its text."""

    error: str
    message: str


Response: TypeAlias = Rows | Failure
RunQuery: TypeAlias = Callable[[Request], Awaitable[QueryResult]]
"""What the listener gives to :func:`serve_sql`; it raises :class:`SqlError`."""

_encoder: Final = msgspec.msgpack.Encoder(decimal_format="string")
_request: Final[msgspec.msgpack.Decoder[Request]] = msgspec.msgpack.Decoder(Request)
_response: Final[msgspec.msgpack.Decoder[Response]] = msgspec.msgpack.Decoder(Response)


def _plain(value: object, levels: int = NESTING_MAX) -> object:
    """``value`` as MessagePack has it. Raises :class:`SqlTooLargeError` for one nested deeper."""
    match value:
        case None | bool() | float() | str() | bytes():
            return value
        case int():
            return value if -(1 << 63) <= value < 1 << 64 else str(value)
        case list() | tuple() | dict() if levels == 0:
            raise SqlTooLargeError(_TOO_DEEP)
        case list() | tuple():
            return [_plain(item, levels - 1) for item in value]
        case dict():
            return {str(key): _plain(item, levels - 1) for key, item in value.items()}
        case _:
            return str(value)


def _encoded_answer(result: QueryResult) -> bytes:
    """The message that answers with ``result``. Raises :class:`SqlError`."""
    try:
        rows = tuple(tuple(_plain(value) for value in row) for row in result.rows)
        return _framed(Rows(result.columns, result.types, rows, result.slot, result.lag))
    except MemoryError as error:
        raise SqlMemoryError("the result needs more memory than there is; select less") from error


# --- one query ------------------------------------------------------------------------------


def run_select(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    *,
    rows_max: int = ROWS_MAX,
    bytes_max: int = RESULT_BYTES_MAX,
) -> QueryResult:
    """Run one SELECT on ``connection``, a cursor of the store that nobody else uses; blocking.

    Its transaction is read only, sees one stored slot whole, and is rolled back. ``interrupt()``
    on the connection from another thread ends it as :class:`SqlDeadlineError`.
    Raises :class:`SqlError`.
    """
    import duckdb

    try:
        if len(sql.encode()) > SQL_BYTES_MAX:
            raise SqlTooLargeError(f"the query is longer than {SQL_BYTES_MAX} bytes")
        if _brackets(sql) > BRACKETS_MAX:
            raise SqlTooLargeError(f"more than {BRACKETS_MAX} brackets are open at once")
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
            raise SqlRefusedError(f"exactly one SELECT is run here, this is: {kinds}")
        connection.execute("BEGIN TRANSACTION READ ONLY")
        # The first read pins what the transaction sees, so that `slot` belongs to the rows.
        here = connection.execute("SELECT stored, lag FROM main.listener").fetchone()
        assert here is not None
        connection.execute(statements[0])
        described = connection.description or []
        for column, kind, *_ in described:
            if "WITH TIME ZONE" in str(kind):  # DuckDB needs another package to bring it here
                raise SqlRefusedError(f"column {column!r} has a time zone; cast it to TIMESTAMP")
        rows: list[tuple[Any, ...]] = []
        size_bytes = 0
        while chunk := connection.fetchmany(_FETCH_ROWS):
            rows.extend(chunk)
            size_bytes += sum(map(_size_bytes, chunk))
            if len(rows) > rows_max:
                raise SqlTooLargeError(f"the result has more than {rows_max} rows; add a LIMIT")
            if size_bytes > bytes_max:
                raise SqlTooLargeError(f"the result is larger than {bytes_max} bytes; select less")
        connection.rollback()
    except (duckdb.Error, MemoryError, RecursionError, ValueError, OverflowError) as error:
        raise _translated(error) from error
    columns = tuple(str(column[0]) for column in described)
    types = tuple(str(column[1]) for column in described)
    return QueryResult(columns, types, tuple(rows), int(here[0]), int(here[1]))


def _brackets(sql: str) -> int:
    """How many brackets are open at once at most; told by DuckDB's own tokenizer, so that none in
    a text or a comment counts."""
    count = sum(map(sql.count, "([{"))
    if count <= BRACKETS_MAX:
        return count
    import duckdb

    text = sql.encode()
    held = most = 0
    for offset, _ in duckdb.tokenize(sql):
        token = text[offset : offset + 1]
        if token in (b"(", b"[", b"{"):
            held += 1
            most = max(most, held)
        elif token in (b")", b"]", b"}"):
            held -= 1
    return most


def _size_bytes(value: object) -> int:
    """About the encoded size of a value; exact enough to bound a result."""
    match value:
        case str() | bytes():
            return 5 + len(value)
        case list() | tuple():
            return 5 + sum(map(_size_bytes, value))
        case dict():
            return 5 + sum(_size_bytes(key) + _size_bytes(item) for key, item in value.items())
        case _:
            return 9


def _translated(error: Exception) -> SqlError:
    import duckdb

    # DuckDB's texts show the query with the place marked: keep them, less what is about settings.
    text = str(error).split("\n\nPossible solutions")[0].strip() or type(error).__name__
    match error:
        case duckdb.InterruptException():
            return SqlDeadlineError(
                "the query was interrupted: at its deadline, or for the store's sake"
            )
        case RecursionError():
            return SqlTooLargeError(_TOO_DEEP)
        case duckdb.OutOfMemoryException() | MemoryError():
            return SqlMemoryError(
                f"the query needs more memory than it may have ({text.splitlines()[0]})"
            )
        case duckdb.PermissionException() | duckdb.TransactionException():
            return SqlRefusedError(text)
        case duckdb.FatalException() | duckdb.ConnectionException():
            return SqlUnavailableError(text)
        case _:
            return SqlInvalidError(text)


class Queries:
    """Runs users' queries: each in a thread and on a connection of its own, never in the way of
    the writer, whose thread and connection are others. The threads are there from the start, for
    the reason that ``workers`` tells.

    ``connect`` lends a fresh cursor of the store; ``tip`` the newest slot known to be fixed, from
    which the lag is told. At most ``queries_max`` run at once.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]],
        *,
        tip: Callable[[], int] = lambda: 0,
        queries_max: int = QUERIES_MAX,
    ) -> None:
        self.connect: Final = connect
        self._tip = tip
        self._places = anyio.Semaphore(queries_max)
        self._running: set[_Running] = set()
        self._closed = False
        self.runners: Final = Workers("trex-query", queries_max)
        self.interrupters: Final = Workers("trex-interrupt", queries_max)

    @property
    def running(self) -> int:
        """Queries running now, those given up but not yet stopped included."""
        return len(self._running)

    async def run(
        self,
        sql: str,
        *,
        deadline_ms: int = DEADLINE_MS,
        rows_max: int = ROWS_MAX,
        bytes_max: int = RESULT_BYTES_MAX,
    ) -> QueryResult:
        """The answer to one SELECT. Raises :class:`SqlError`. Cancelling it interrupts the query.

        It returns at its deadline even if the engine is inside one call that cannot be interrupted;
        that query keeps its place until it stops.
        """
        self._check_open()
        deadline_ms = max(1, min(deadline_ms, DEADLINE_MS_MAX))
        running: _Running | None = None
        try:
            with anyio.move_on_after(deadline_ms / 1000):
                await self._places.acquire()
                running = self._started(sql, rows_max, bytes_max)
                await running.done.wait()
            if running is None:
                raise SqlBusyError(f"other queries held all places for {deadline_ms} ms")
            if not running.done.is_set():
                running.interrupt()
                raise SqlDeadlineError(
                    f"the query was not done in {deadline_ms} ms and was interrupted"
                )
        except anyio.get_cancelled_exc_class():
            if running is not None:
                running.interrupt()
                with anyio.move_on_after(CLOSE_S, shield=True):
                    await running.done.wait()
            raise
        if running.error is not None:
            raise running.error
        result = running.result
        if result is None:  # memory was short even for saying why
            raise SqlMemoryError(_TAKEN)
        return msgspec.structs.replace(result, lag=max(result.lag, self._tip() - result.slot))

    def relieve(self) -> None:
        """Interrupt every running query, because the store needs their memory, and wait until they
        let go of it (RELIEVE_S at most). For ``Store.relieve``: called in the store's thread."""
        running = tuple(self._running)
        for query in running:
            query.interrupt(for_the_store=True)
        deadline = time.monotonic() + RELIEVE_S
        for query in running:
            query.wait_finished(max(0.0, deadline - time.monotonic()))

    async def close(self) -> None:
        """Interrupt what runs, refuse what comes, and wait until all are through, CLOSE_S at most;
        to be called before the store is closed."""
        self._closed = True
        with anyio.move_on_after(CLOSE_S, shield=True):
            for query in tuple(self._running):
                query.interrupt()
            for query in tuple(self._running):
                await query.done.wait()
        self.runners.close()
        self.interrupters.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SqlUnavailableError("the store is closed")

    def _started(self, sql: str, rows_max: int, bytes_max: int) -> _Running:
        """A query in the place just taken, which it gives back when it ends."""
        try:
            self._check_open()
            if self._running:  # else what is mapped is the allocators' own, for this one to use
                _check_headroom()
            running = _Running(self, sql, rows_max, bytes_max)
            self.runners.submit(running.run)
        except BaseException:
            self._places.release()
            raise
        self._running.add(running)
        return running

    def ended(self, running: _Running) -> None:
        """``running`` is through: its place is free."""
        self._running.discard(running)
        self._places.release()
        running.done.set()


class _Running:
    """One query, run in one thread and interrupted from another."""

    def __init__(self, queries: Queries, sql: str, rows_max: int, bytes_max: int) -> None:
        self.done = anyio.Event()
        self.result: QueryResult | None = None
        self.error: SqlError | None = None
        self._queries = queries
        self._select = functools.partial(
            run_select, sql=sql, rows_max=rows_max, bytes_max=bytes_max
        )
        self._loop = asyncio.get_running_loop()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._interrupted = threading.Event()
        self._for_the_store = False
        self._finished = threading.Event()

    def interrupt(self, *, for_the_store: bool = False) -> None:
        """End it soon. DuckDB forgets an interrupt that comes between two statements, so it is
        repeated until the query's thread is through."""
        self._for_the_store = self._for_the_store or for_the_store
        if not self._interrupted.is_set():
            self._interrupted.set()
            self._queries.interrupters.submit(self._insist)

    def wait_finished(self, timeout_s: float) -> None:
        """Wait until its thread is through; any thread but the loop's may."""
        self._finished.wait(timeout_s)

    def _insist(self) -> None:
        while not self._finished.is_set():
            connection = self._connection
            if connection is not None:
                with suppress(Exception):  # it may be closed by now
                    connection.interrupt()
            self._finished.wait(_INTERRUPT_AGAIN_S)

    def run(self) -> None:
        """Run it, in this thread. Raises nothing."""
        try:
            with self._queries.connect() as connection:
                self._connection = connection
                try:
                    if self._interrupted.is_set():
                        raise SqlDeadlineError("interrupted before it began")
                    self.result = self._select(connection)
                    if self._for_the_store:  # a failed transaction may have shown through
                        raise SqlDeadlineError("interrupted at its end")
                finally:
                    self._finished.set()
        except (SqlError, MemoryError) as error:
            self.error = error if isinstance(error, SqlError) else SqlMemoryError(str(error))
            if self._for_the_store:
                self.error = SqlMemoryError("interrupted: the store needed its memory; try again")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is an answer to one query
            self.error = SqlUnavailableError(f"{type(error).__name__}: {error}")
        finally:
            self._finished.set()
            tell(self._loop, functools.partial(self._queries.ended, self))


def use_frugal_allocators() -> None:
    """Have both allocators of this process give address space back, as :func:`contain_memory` needs
    it; to be called before anything imports duckdb.

    DuckDB's own, jemalloc, keeps what it once mapped: after a few queries that wanted much no
    thread could be started any more, though hardly any memory was in use. The C library's reserves
    64 MiB for nearly each thread, which counts as mapped.
    """
    assert "duckdb" not in sys.modules, "too late: duckdb read its settings when it was imported"
    settings = (os.environ.get(_ALLOCATOR_SETTINGS), "retain:false")
    os.environ[_ALLOCATOR_SETTINGS] = ",".join(filter(None, settings))
    with suppress(AttributeError):  # another C library: it reserves nothing
        ctypes.CDLL(None).mallopt(_ARENAS_MAX_PARAMETER, _ARENAS_MAX)


def _check_headroom() -> None:
    """Raise :class:`SqlMemoryError` where this process is contained and near its bound: one more
    query could take what its loop needs."""
    bound, _ = resource.getrlimit(resource.RLIMIT_AS)
    if bound != resource.RLIM_INFINITY and bound - _mapped_bytes() < HEADROOM_BYTES_MIN:
        raise SqlMemoryError(_TAKEN)


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def contain_memory(margin_bytes: int = ADDRESS_SPACE_MARGIN_BYTES) -> int:
    """Bound this process's address space to what is mapped now and ``margin_bytes`` more, so that
    a query that asks for gigabytes in one value fails alone. Returns the bound, in bytes.

    For a process that is a listener (``trex-listener``), which began with
    :func:`use_frugal_allocators`; an embedding program decides for itself. Without it such a query
    may take the machine's memory and cannot be interrupted meanwhile.
    """
    bound = _mapped_bytes() + margin_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        bound = min(bound, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    return bound


# --- the socket: server ------------------------------------------------------------------------


async def serve_sql(
    path: Path,
    run_query: RunQuery,
    *,
    counters: Counter[str] | None = None,
    task_status: anyio.abc.TaskStatus[Path] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve queries on the unix socket ``path`` until cancelled; then the file is removed.

    The directory is made 0700 if missing, and must be the caller's own and closed to others: else
    :class:`SqlUnavailableError`, also for a path too long for a socket. ``counters`` counts
    "sql_requests", "sql_failures", "sql_malformed", "sql_slow", "sql_foreign", "sql_over_limit".
    """
    counts: Counter[str] = Counter() if counters is None else counters
    _check_place(path)
    # asyncio's streams: those of anyio 4.16 on a unix socket log an error when a receive is
    # cancelled in the turn in which data arrives, and here every answered query cancels one.
    encoders = Workers("trex-answer", ENCODERS)
    async with anyio.create_task_group() as tasks:
        connections: set[_Connection] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = _Connection(reader, writer, run_query, encoders, counts, connections)
            tasks.start_soon(connection.serve)

        server = await asyncio.start_unix_server(connected, path, limit=SQL_BYTES_MAX)
        mine = _private(path)
        try:
            task_status.started(path)
            await anyio.sleep_forever()
        finally:
            server.close()
            _remove(path, mine)
            encoders.close()
            tasks.cancel_scope.cancel()


class _Connection:
    """One client's connection, which asks one thing after the other."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        run_query: RunQuery,
        encoders: Workers,
        counts: Counter[str],
        connections: set[_Connection],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._run_query = run_query
        self._encoders = encoders
        self._counts = counts
        self._connections = connections
        # Awaiting `drain` then means that the kernel has taken all of an answer.
        writer.transport.set_write_buffer_limits(high=0)

    async def serve(self) -> None:
        """Answer requests until the client goes or misbehaves."""
        try:
            if _peer_uid(self._writer) not in (os.geteuid(), 0):
                self._counts["sql_foreign"] += 1
            elif len(self._connections) >= CONNECTIONS_MAX:
                self._counts["sql_over_limit"] += 1
                await self._answer(
                    Failure("SqlBusyError", f"{CONNECTIONS_MAX} connections are open already")
                )
            else:
                self._connections.add(self)
                while await self._serve_one():
                    pass
        except OSError:
            pass  # it hung up
        except MemoryError:
            self._counts["sql_failures"] += 1
            with suppress(OSError, MemoryError):
                await self._answer(Failure("SqlMemoryError", _TAKEN))
        finally:
            self._connections.discard(self)
            self._writer.close()

    async def _serve_one(self) -> bool:
        """Answer one request; whether the connection goes on."""
        try:
            request = await self._next_request()
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self._counts["sql_malformed"] += 1
            await self._answer(Failure("SqlInvalidError", f"no request: {error}"))
            return False
        if request is None:
            return False
        self._counts["sql_requests"] += 1
        message = await self._message_to(request)
        return message is not None and await self._send(message)

    async def _next_request(self) -> Request | None:
        """The next request; None if the client went or was too slow. Raises
        ``msgspec.DecodeError`` and its like."""
        head = b""
        with anyio.move_on_after(IDLE_S):
            head = await self._reader.read(1)
        if not head:
            return None
        try:
            with anyio.fail_after(REQUEST_S):
                head += await self._reader.readexactly(_LENGTH.size - 1)
                (length,) = _LENGTH.unpack(head)
                if length > SQL_BYTES_MAX + _REQUEST_MARGIN_BYTES:
                    raise msgspec.DecodeError(f"a request of {length} bytes is over the limit")
                return _request.decode(await self._reader.readexactly(length))
        except TimeoutError:
            self._counts["sql_slow"] += 1
            return None
        except asyncio.IncompleteReadError:
            return None

    async def _message_to(self, request: Request) -> bytes | None:
        """The answer, encoded; None if the client hung up meanwhile, which ends the query, or asked
        for something else before this was answered."""
        message: bytes | None = None

        async def answer() -> None:
            nonlocal message
            try:
                result = await self._run_query(request)
                # In a thread: a large result would hold up the loop, which follows the stream.
                message = await self._encoders.run(_encoded_answer, result)
            except (SqlError, MemoryError) as error:
                self._counts["sql_failures"] += 1
                if isinstance(error, MemoryError):
                    error = SqlMemoryError(_TAKEN)
                message = _framed(Failure(type(error).__name__, str(error)))
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            await self._reader.read(1)
            tasks.cancel_scope.cancel()
        return message

    async def _answer(self, failure: Failure) -> bool:
        return await self._send(_framed(failure))

    async def _send(self, message: bytes) -> bool:
        """Send an answer; whether the client took it in time."""
        try:
            with anyio.fail_after(REQUEST_S):
                self._writer.write(message)
                await self._writer.drain()
            return True
        except TimeoutError:
            self._counts["sql_slow"] += 1
            self._writer.transport.abort()
            return False


def _check_place(path: Path) -> None:
    directory = path.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise SqlUnavailableError(
            f"{directory} must belong to the user that runs the listener, with mode 0700; "
            f"do: chmod 700 {directory}"
        )
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
        raise SqlUnavailableError(
            f"{path} is longer than the {_SOCKET_PATH_BYTES_MAX} bytes a socket's path may have; "
            "use a shorter directory"
        )


def _inode(path: Path) -> int:
    return path.stat().st_ino


def _private(path: Path) -> int:
    """Close our socket file to others (its directory is already); its inode."""
    path.chmod(0o600)
    return _inode(path)


def _remove(path: Path, inode: int) -> None:
    """Remove our socket file, not one that another listener put there since."""
    with suppress(OSError):
        if _inode(path) == inode:
            path.unlink()


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    """The user at the other end, on the kernel's word."""
    peer = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, _ = _PEER.unpack(credentials)
    return int(uid)


def _framed(message: Request | Response) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


# --- the socket: client ------------------------------------------------------------------------


def query_socket(
    path: Path,
    sql: str,
    *,
    deadline_ms: int = DEADLINE_MS,
    at_least_slot: int | None = None,
) -> QueryResult:
    """Ask the listener whose socket is ``path``; blocking. Raises :class:`SqlError`.

    The listener keeps the deadline; should it be stopped or hang, this gives up 2 s later.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(deadline_ms / 1000 + 2)
        try:
            client.connect(os.fspath(path))
            client.sendall(_framed(Request(sql, deadline_ms, at_least_slot)))
            (length,) = _LENGTH.unpack(_receive_exactly(client, _LENGTH.size))
            body = _receive_exactly(client, length)
        except TimeoutError as error:
            raise SqlDeadlineError(f"no answer at {path} within {deadline_ms} ms") from error
        except OSError as error:
            raise _nobody(path, error) from error
    return _result_of(body)


def _receive_exactly(client: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = client.recv(min(1 << 20, size - len(parts)))
        if not part:
            raise ConnectionResetError("it hung up before its answer was complete")
        parts += part
    return bytes(parts)


async def query_socket_async(
    path: Path,
    sql: str,
    *,
    deadline_ms: int = DEADLINE_MS,
    at_least_slot: int | None = None,
) -> QueryResult:
    """As :func:`query_socket`, for async programs; cancelling it interrupts the query."""
    writer: asyncio.StreamWriter | None = None
    try:
        with anyio.fail_after(deadline_ms / 1000 + 2):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(_framed(Request(sql, deadline_ms, at_least_slot)))
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            body = await reader.readexactly(length)
    except TimeoutError as error:
        raise SqlDeadlineError(f"no answer at {path} within {deadline_ms} ms") from error
    except (OSError, asyncio.IncompleteReadError) as error:
        raise _nobody(path, error) from error
    finally:
        if writer is not None:
            writer.transport.abort()
    return _result_of(body)


def _nobody(path: Path, error: Exception) -> SqlUnavailableError:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return SqlUnavailableError(
        f"no listener answers at {path} ({why}); "
        "is `trex-listener run` running with this directory?"
    )


def _result_of(body: bytes) -> QueryResult:
    try:
        response = _response.decode(body)
    except (ValueError, RecursionError) as error:
        raise SqlUnavailableError(
            f"what answers there is no listener of this version: {error}"
        ) from error
    match response:
        case Rows(columns=columns, types=types, rows=rows, slot=slot, lag=lag):
            return QueryResult(columns, types, rows, slot, lag)
        case Failure(error=name, message=message):
            raise _ERRORS.get(name, SqlError)(message)
