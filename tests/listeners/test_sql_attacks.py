"""The SQL socket of a real listener, attacked: each attack is answered by an error with a name or
by rows within bounds, and the listener goes on following, storing and answering the next query."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

import listeners.sql
from listeners.sql import (
    CONNECTIONS_MAX,
    DEADLINE_MS_MAX,
    NESTING_MAX,
    RESULT_BYTES_MAX,
    ROWS_MAX,
    SQL_BYTES_MAX,
    QueryResult,
    Request,
    SqlBusyError,
    SqlDeadlineError,
    SqlError,
    SqlInvalidError,
    SqlMemoryError,
    SqlRefusedError,
    SqlTooLargeError,
    SqlUnavailableError,
    query_socket_async,
)
from tests.conftest import ROOT
from tests.listeners.backbone import Backbone, make_cluster
from tests.listeners.test_main import _process, _socket
from tests.listeners.test_sql import Service
from tests.listeners.workload import put

NAP_S = 30
LET_GO_S = 120
"""How long a query that was given up may keep what it took: a call of the engine that cannot be
interrupted has seconds of processor time, of a machine that the whole suite shares."""
ATTACK_MS = 400
NOBODY = 65_534
ENDLESS = "SELECT sum(range) FROM range(100_000_000_000_000_000)"

REFUSED = SqlRefusedError
UNKNOWN = SqlInvalidError
NO = (SqlRefusedError, SqlInvalidError)
LARGE = (SqlTooLargeError, SqlMemoryError, SqlDeadlineError, SqlInvalidError)
"""Which bound ends it depends on how fast the machine is."""

EITHER = "either"
"""An answer will do as well, if it is there in time."""

OUTSIDE = (
    "SELECT * FROM read_csv('{f}')", "SELECT * FROM read_csv_auto('{f}')",
    "SELECT * FROM read_text('{f}')", "SELECT * FROM read_blob('{f}')",
    "SELECT * FROM read_json('{f}')", "SELECT * FROM read_json_auto('{f}')",
    "SELECT * FROM read_ndjson_objects('{f}')", "SELECT * FROM read_parquet('{f}')",
    "SELECT * FROM parquet_scan('{f}')", "SELECT * FROM parquet_schema('{f}')",
    "SELECT * FROM read_duckdb('{f}')", "SELECT * FROM sniff_csv('{f}')",
    "SELECT * FROM glob('{d}/*')", "SELECT * FROM '{f}'", "SELECT * FROM '{d}/p/store.duckdb'",
    "SELECT * FROM read_csv('https://127.0.0.1/x.csv')",
    "SELECT * FROM 'https://127.0.0.1/x.parquet'", "SELECT * FROM read_text('s3://bucket/x')",
    "WITH t AS (SELECT * FROM read_text('{f}')) SELECT content FROM t",
    "SELECT (SELECT content FROM read_text('{f}'))",
    "SELECT * FROM query('SELECT * FROM read_text(''{f}'')')",
    "SELECT * FROM query_table('{f}')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{f}'')'))",
    "SELECT * FROM sqlite_scan('{f}', 't')", "SELECT * FROM postgres_scan('', '', '')",
    "SELECT * FROM load_aws_credentials()", "SELECT getenv('HOME')",
    "CREATE VIEW v AS SELECT * FROM read_text('{f}')",
    "CREATE TEMP VIEW v AS SELECT * FROM read_text('{f}')",
    "CREATE TEMP MACRO m() AS TABLE SELECT * FROM read_text('{f}')",
    "COPY members TO '{d}/made'", "COPY (SELECT 1) TO '{d}/made' (FORMAT parquet)",
    "COPY config FROM '{f}'", "EXPORT DATABASE '{d}/made'", "IMPORT DATABASE '{d}'",
    "ATTACH '{d}/made' AS other", "ATTACH '{d}/p/store.duckdb' AS again", "ATTACH ':memory:' AS o",
    "INSTALL httpfs", "LOAD httpfs", "LOAD '{f}'", "FORCE INSTALL json", "UPDATE EXTENSIONS",
    "CREATE SECRET s (TYPE s3, KEY_ID 'x', SECRET 'y')",
)  # fmt: skip
WRITES = (
    "WITH x AS (DELETE FROM config RETURNING *) SELECT * FROM x",
    "WITH x AS (INSERT INTO config VALUES ('x', 'y', 1) RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE config SET value = 'gone' RETURNING *) SELECT * FROM x",
    "WITH RECURSIVE x AS (DELETE FROM config RETURNING *) SELECT * FROM x",
    "WITH x AS MATERIALIZED (DELETE FROM commits RETURNING *) SELECT count(*) FROM x",
    "SELECT * FROM query('DELETE FROM config RETURNING *')",
    "SELECT 1; DELETE FROM config", "DELETE FROM config; SELECT 1", "SELECT 1; SELECT 2",
    "SELECT 1; SET threads = 1", "SELECT 1; PRAGMA enable_profiling", "SELECT 1; COMMIT",
    "COMMIT; DELETE FROM config", "ROLLBACK", "BEGIN", "ABORT", "TRUNCATE config",
    "DROP TABLE config", "ALTER TABLE config ADD COLUMN x INTEGER", "CREATE TABLE t (a INTEGER)",
    "CREATE TEMP TABLE t AS SELECT 1", "CREATE SEQUENCE s", "CREATE TYPE e AS ENUM ('a')",
    "CREATE INDEX i ON config (value)", "COMMENT ON TABLE config IS 'x'",
    "CALL force_checkpoint()", "CALL pragma_version()", "CHECKPOINT", "VACUUM", "ANALYZE",
    "PREPARE p AS SELECT 1", "EXECUTE p", "DEALLOCATE p", "SELECT $1", "SELECT ?",
    "USE memory", "DETACH store", "SET memory_limit = '9GB'", "SET GLOBAL threads = 64",
    "SET enable_external_access = true", "RESET memory_limit", "RESET lock_configuration",
    "SET VARIABLE x = 1", "PRAGMA memory_limit = '9GB'", "PRAGMA database_list",
    "PRAGMA enable_profiling", "SELECT * FROM enable_profiling()",
    "SELECT * FROM enable_logging(storage = 'file')", "SELECT nextval('s')",
    "EXPLAIN ANALYZE DELETE FROM config",
    "MERGE INTO config USING (SELECT 1) ON true WHEN MATCHED THEN DELETE",
)  # fmt: skip
FACTS = (
    ("SELECT count(*) FROM duckdb_secrets()", ((0,),)),
    ("SELECT current_setting('temp_directory')", (("",),)),
    ("SELECT current_setting('enable_external_access')", ((False,),)),
    ("SELECT current_setting('lock_configuration')", ((True,),)),
    ("SELECT current_setting('autoload_known_extensions')", ((False,),)),
    ("SELECT current_setting('allow_unsigned_extensions')", ((False,),)),
    ("SELECT current_setting('home_directory') || current_setting('secret_directory')", None),
    ("SELECT count(*) FROM duckdb_temporary_files()", ((0,),)),
)
"""What a query may see of the settings; the path of the store itself is no secret to who owns
it."""
BOMBS = (
    ("SELECT repeat('x', 4_000_000_000)", LARGE),
    ("SELECT repeat(repeat('x', 1_000_000), 1_000_000)", LARGE),
    ("SELECT length(repeat('x', 3_000_000_000))", LARGE),
    ("SELECT rpad('', 2_000_000_000, 'x')", LARGE),
    ("SELECT range(1_000_000_000)", LARGE),
    ("SELECT list(range) FROM range(1e9::BIGINT)", LARGE),
    ("SELECT string_agg(repeat('x', 1000)) FROM range(1e8::BIGINT)", LARGE),
    ("FROM range(1e9::BIGINT) ORDER BY random()", LARGE),
    ("SELECT count(DISTINCT hash(range)) FROM range(1e10::BIGINT)", LARGE),
    ("SELECT repeat('x', 10_000_000) FROM range(100_000)", LARGE),
    ("SELECT repeat('x', 20_000) FROM range(1e9::BIGINT)", LARGE),
    ("FROM range(1e12::BIGINT)", LARGE),
    ("SELECT * FROM range(1e6::BIGINT) a, range(1e6::BIGINT) b, range(1e6::BIGINT) c", LARGE),
    ("SELECT count(*) FROM range(1e7::BIGINT) a, range(1e7::BIGINT) b WHERE a.range < b.range",
     LARGE),
    ("WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t", LARGE),
    ("WITH RECURSIVE t(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM t) SELECT count(s) FROM t",
     LARGE),
    (ENDLESS, SqlDeadlineError),
    ("SELECT sleep_ms(3_600_000)", (SqlDeadlineError, SqlInvalidError)),
    ("SELECT regexp_matches('x', repeat('(a?){1,900}', 900))", LARGE),
    ("SELECT regexp_extract_all(repeat('ab', 20_000_000), 'a')", LARGE),
    ("SELECT length(regexp_replace(repeat('a', 100_000_000), '(a|aa)+$', 'b', 'g'))", LARGE),
    ("SELECT levenshtein(repeat('a', 100_000), repeat('b', 100_000))", LARGE),
    ("SELECT '" + "x" * SQL_BYTES_MAX + "'", SqlTooLargeError),
    ("SELECT " + "1 + " * 16_000 + "1", (SqlInvalidError, SqlDeadlineError)),
    ("SELECT " + "(" * 64_000, SqlTooLargeError),
    ("SELECT " + "(" * 1000, SqlTooLargeError),
    ("SELECT " + "(" * 65 + "1" + ")" * 65, SqlTooLargeError),
    ("SELECT ')))', \"))\", $$))$$ /* )) */ --)))\n, " + "(" * 1000, SqlTooLargeError),
    ("SELECT " + "(1), " * 50 + "(" * 1000, SqlTooLargeError),
    ("SELECT " + "(" * 64, SqlInvalidError),
    ("SELECT " + "[" * 900 + "1" + "]" * 900, SqlTooLargeError),
    ("SELECT " + "[" * 600 + "1" + "]" * 600, SqlTooLargeError),
    ("SELECT " + "[" * (NESTING_MAX + 1) + "1" + "]" * (NESTING_MAX + 1), SqlTooLargeError),
    ("SELECT " + "{'a': " * 300 + "1" + "}" * 300, SqlTooLargeError),
    ("SELECT ('" + "[" * 1500 + "]" * 1500 + "'::JSON)::VARIANT", LARGE),
    ("SELECT " + ", ".join(["repeat('x', 1_000_000)"] * 5000), LARGE),
    ("SELECT 1 AS c, " + "2, " * 20_000 + "3", EITHER),
    ("SELECT * FROM config " + "JOIN config USING (key) " * 2500, LARGE),
    (" UNION ALL ".join(["SELECT 1"] * 3000), LARGE),
    ("WITH " + ",".join(f"a{n} AS (SELECT 1)" for n in range(2800)) + " SELECT x FROM a1", LARGE),
    ("FROM " + ("(" * 64 + "a" + " JOIN a USING (x))" * 64 + ",") * 50, LARGE),
    ("SELECT a" + ".a" * 30_000, LARGE),
    ("SELECT error(repeat('x', 50_000_000))", (SqlInvalidError, SqlMemoryError, SqlDeadlineError)),
)  # fmt: skip


@pytest.fixture
async def backbone():
    made = Backbone(make_cluster())
    async with made.serving(heartbeat_s=0.05):
        yield made
    made.close()


class Prey:
    """A ``trex-listener`` process under attack."""

    def __init__(self, backbone: Backbone, process, folder: Path) -> None:
        self.backbone = backbone
        self.process = process
        self.path = _socket(folder)
        self.attacks = 0
        self.refused = 0

    async def attack(self, sql: str, named, deadline_ms: int = ATTACK_MS):
        """``sql`` ends in one of the errors ``named`` (None: an answer), within its deadline."""
        self.attacks += 1
        expected = LARGE if named is EITHER else named or ()
        if SqlDeadlineError not in (expected if isinstance(expected, tuple) else (expected,)):
            deadline_ms = NAP_S * 1000  # what is refused is told so, however slow the machine
        try:
            result = await self._ask(sql, deadline_ms, expected)
        except expected as error:
            return error
        except SqlError as error:
            raise AssertionError(f"{sql[:200]}: {error!r:.300}") from error
        assert named in (None, EITHER), f"{sql[:200]} was answered: {result!r:.300}"
        return result

    async def goes_on(self) -> None:
        """What is fixed now is followed, stored, and found by the next query."""
        slot = self.backbone.append(put(f"key/{self.attacks}", "value"))
        self.backbone.stream(slot, slot)
        found = "SELECT count(*), max(slot), count(DISTINCT slot) FROM commits"
        result = await self._ask(found, NAP_S * 1000, (), at_least_slot=slot)
        assert result.rows == ((slot, slot, slot),)
        assert self.process.returncode is None

    async def _ask(self, sql: str, deadline_ms: int, expected, **how) -> QueryResult:
        """Asked again while what was thrown before has not let go of its memory yet."""
        with anyio.fail_after(LET_GO_S):
            while True:
                try:
                    return await query_socket_async(self.path, sql, deadline_ms=deadline_ms, **how)
                except expected:
                    raise
                except SqlMemoryError:
                    self.refused += 1
                    await anyio.sleep(0.02)

    def peak_mb(self) -> int:
        """The most memory that the process held at once."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) >> 10


@pytest.fixture
async def prey(backbone, tmp_path):
    backbone.append(put("config/one", "first"))
    async with _process(backbone, tmp_path, HOME=str(tmp_path)) as (process, _):
        yield Prey(backbone, process, tmp_path)


async def test_nothing_outside_is_reached(prey, tmp_path):
    file = tmp_path / "secret.csv"
    file.write_text("a,b\nMARKER-OUTSIDE,2\n")
    before = sorted(str(path) for path in tmp_path.rglob("*") if "status" not in path.name)
    for sql in OUTSIDE:
        error = await prey.attack(sql.format(f=file, d=tmp_path), NO)
        assert "MARKER-OUTSIDE" not in str(error)
    await prey.goes_on()
    after = sorted(str(path) for path in tmp_path.rglob("*") if "status" not in path.name)
    assert after == before


async def test_nothing_is_written_and_no_setting_changes(prey):
    tables = "SELECT * FROM duckdb_tables() ORDER BY ALL"
    settings = "SELECT name, value FROM duckdb_settings() ORDER BY name"
    await prey.goes_on()
    before = [(await prey.attack(sql, None)).rows for sql in ("FROM config", tables, settings)]
    for sql in WRITES:
        await prey.attack(sql, NO)
    after = [(await prey.attack(sql, None)).rows for sql in ("FROM config", tables, settings)]
    assert after == before
    for sql, rows in FACTS:
        found = await prey.attack(sql, None)
        assert rows is None or found.rows == rows, sql
    await prey.goes_on()


async def test_every_bomb_ends_and_the_listener_goes_on(prey):
    for sql, named in BOMBS:
        await prey.attack(sql, named)
        await prey.goes_on()
    print(
        f"{len(BOMBS)} bombs, at most {prey.peak_mb()} MB of memory, {prey.refused} refused after"
    )
    assert prey.peak_mb() < 3000


async def test_bombs_at_once(prey):
    """All places are taken by bombs: others are told so or wait, and following needs no place."""
    bombs = [sql for sql, named in BOMBS if named is LARGE][:12]

    async def throw(sql: str) -> None:
        for _ in range(2):
            with pytest.raises(SqlError):
                await query_socket_async(prey.path, sql, deadline_ms=ATTACK_MS)

    with anyio.fail_after(NAP_S * 2):
        async with anyio.create_task_group() as tasks:
            for sql in bombs:
                tasks.start_soon(throw, sql)
            for _ in range(20):
                slot = prey.backbone.append(put(f"k{prey.backbone.tip}", "v"))
                prey.backbone.stream(slot, slot)
                await anyio.lowlevel.checkpoint()
    await prey.goes_on()
    print(f"at most {prey.peak_mb()} MB of memory")


async def test_clients_that_misbehave(prey):
    """More than there is room for, half requests, garbage, no reading, going in mid answer."""
    large = listeners.sql._framed(Request("SELECT repeat('x', 1000) FROM range(25_000)"))
    one = listeners.sql._framed(Request("SELECT 1"))
    streams = []
    for number in range(CONNECTIONS_MAX * 3):
        stream = await anyio.connect_unix(prey.path)
        streams.append(stream)
        try:
            match number % 6:
                case 0:
                    await stream.send(one[:3])
                case 1:
                    await stream.send(struct.pack(">I", SQL_BYTES_MAX) + b"half")
                case 2:
                    await stream.send(large)
                case 3:
                    await stream.send(b"\xff" * 4096)
                case 4:
                    await stream.send(one + one)
                case _:
                    pass
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # it was over the limit
    reader = await anyio.connect_unix(prey.path)
    try:
        with anyio.fail_after(NAP_S):
            (failure,) = [part async for part in reader][:1] or [b""]
    except anyio.BrokenResourceError:
        failure = b""
    assert b"SqlBusyError" in failure or not failure
    for stream in streams:
        with anyio.move_on_after(0):
            await stream.receive(10)  # of a large answer, if it is there
        await stream.aclose()
    await reader.aclose()
    with anyio.fail_after(NAP_S):
        while True:
            try:
                await prey.goes_on()
                break
            except (SqlBusyError, SqlUnavailableError):
                assert prey.process.returncode is None


async def test_a_deadline_beyond_all_bounds_is_cut(prey):
    """Of waiting for a slot too: a client may not hold a connection for a century."""
    for deadline_ms in (-(1 << 62), -1, 0, 1):
        message = listeners.sql._framed(Request("SELECT 1", deadline_ms, 1 << 62))
        async with await anyio.connect_unix(prey.path) as stream:
            await stream.send(message)
            with anyio.fail_after(NAP_S):
                assert b"SqlDeadlineError" in await stream.receive()
    async with await anyio.connect_unix(prey.path) as stream:
        await stream.send(listeners.sql._framed(Request("SELECT 1", (1 << 63) - 1, 1)))
        with anyio.fail_after(NAP_S):
            assert await stream.receive()
    await prey.goes_on()


async def test_the_wait_for_a_slot_is_bounded_like_the_query(backbone, monkeypatch, tmp_path):
    from listeners import listener as room
    from tests.credentials import folder

    asked = []

    async def wait_stored(_self, _slot, deadline_s):
        asked.append(deadline_s)
        raise room.DeadlineError("not there")

    monkeypatch.setattr(room.Listener, "wait_stored", wait_stored)
    own = tmp_path / "own"
    async with room.open_listener(
        backbone.cluster, folder(backbone.cluster, "listener"), name="x", directory=own
    ) as listener:
        with pytest.raises(SqlDeadlineError):
            await listener._answer(Request("SELECT 1", 1 << 62, 5))
    assert asked == [DEADLINE_MS_MAX / 1000]


# --- other users of the machine ---------------------------------------------------------------

CLIENT = """
import os, socket, sys
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(10)
    try:
        client.connect(sys.argv[1])
        client.sendall(bytes.fromhex(sys.argv[2]))
        print(client.recv(100))
    except OSError as error:
        print(type(error).__name__)
"""


def as_nobody(path: Path) -> str:
    """What a client of another user gets."""
    request = listeners.sql._framed(Request("SELECT 1")).hex()
    done = subprocess.run(
        [sys.executable, "-c", CLIENT.format(uid=NOBODY), str(path), request],
        capture_output=True, text=True, cwd=ROOT, timeout=NAP_S,
    )  # fmt: skip
    return done.stdout.strip() + done.stderr


@pytest.fixture
def reachable():
    """A directory that other users may go through, as the temporary ones of tests are not."""
    with tempfile.TemporaryDirectory(prefix="trex-test-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_kept_out_by_the_directory_the_socket_and_the_uid(reachable):
    async def answer(_request: Request) -> QueryResult:
        return QueryResult(("n",), ("INTEGER",), ((1,),), 1, 0)

    async with Service(reachable, answer) as service:
        ask = partial(anyio.to_thread.run_sync, as_nobody, service.path)
        assert await ask() == "PermissionError", "by the directory"
        service.path.parent.chmod(0o711)
        assert await ask() == "PermissionError", "by the socket's own mode"
        service.path.chmod(0o666)
        before = service.counters["sql_foreign"]
        # by the kernel's word on who it is
        assert await ask() in ("b''", "ConnectionResetError", "BrokenPipeError")
        assert service.counters["sql_foreign"] == before + 1
        assert service.requests == []
        assert (await query_socket_async(service.path, "SELECT 1")).rows == ((1,),)


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o704, 0o770, 0o777])
async def test_a_looser_directory_is_refused_at_the_start(tmp_path, mode):
    async def answer(request):
        raise AssertionError(request)

    place = tmp_path / "listener"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(SqlUnavailableError, match="chmod 700"):
        async with Service(tmp_path, answer):
            pass
    assert not (place / "sql.sock").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
async def test_a_directory_of_another_user_is_refused(tmp_path):
    async def answer(request):
        raise AssertionError(request)

    place = tmp_path / "listener"
    place.mkdir(mode=0o700)
    os.chown(place, NOBODY, NOBODY)
    with pytest.raises(SqlUnavailableError, match="must belong to the user"):
        async with Service(tmp_path, answer):
            pass


async def test_a_slow_reader_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(listeners.sql, "REQUEST_S", 0.2)

    async def answer(_request: Request) -> QueryResult:
        return QueryResult(("x",), ("VARCHAR",), (("x" * 10_000_000,),), 1, 0)

    async with Service(tmp_path, answer) as service:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(service.path))
            client.sendall(listeners.sql._framed(Request("SELECT 1")))
            with anyio.fail_after(NAP_S):
                while not service.counters["sql_slow"]:
                    await anyio.sleep(0.01)
        assert (await query_socket_async(service.path, "SELECT 1")).rows


async def test_a_client_that_goes_in_mid_answer_harms_nobody(tmp_path):
    async def answer(_request: Request) -> QueryResult:
        return QueryResult(("x",), ("VARCHAR",), (("x" * RESULT_BYTES_MAX,),), 1, 0)

    async with Service(tmp_path, answer) as service:
        for _ in range(5):
            async with await anyio.connect_unix(service.path) as stream:
                await stream.send(listeners.sql._framed(Request("SELECT 1")))
                assert await stream.receive(100)
        result = await query_socket_async(service.path, "SELECT 1")
        assert len(result.rows[0][0]) == RESULT_BYTES_MAX


async def test_the_largest_result_is_encoded_beside_the_loop(tmp_path):
    """Encoding it takes a second: so long nobody would follow the stream."""
    threads: list[int] = []

    async def answer(_request: Request) -> QueryResult:
        threads.append(threading.get_ident())
        return QueryResult(("x",), ("INTEGER",), ((_Seen(threads),),) * ROWS_MAX, 1, 0)

    async with Service(tmp_path, answer) as service:
        await query_socket_async(service.path, "SELECT 1")
    assert len(set(threads)) == 2, "the loop's, and that of the encoding"


class _Seen:
    """A value that notes in which thread it was made plain."""

    def __init__(self, threads: list[int]) -> None:
        self._threads = threads

    def __str__(self) -> str:
        if len(self._threads) < 2:
            self._threads.append(threading.get_ident())
        return "seen"
