from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise

import anyio
import duckdb
import msgspec
import pytest

import listeners.store
from listeners.store import Store, StoreBatch, StoreError, StoreWriter
from tests.conftest import ROOT
from tests.listeners.feed import AWKWARD, BALLOT, CLUSTER_ID, GENESIS, Feed
from trex_core.messages import Kind, Value, decode_value
from trex_core.metadata.commands import (
    ConfigDelete,
    ConfigPut,
    LeaseGrant,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
)
from trex_core.metadata.state import ring_of, state_chunks
from trex_core.sessions import NO_SESSIONS

open_store = partial(Store.open, cluster_id=CLUSTER_ID, name="one")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.duckdb"


def rows(store: Store, sql: str) -> list[tuple]:
    with store.connect() as connection:
        return connection.execute(sql).fetchall()


def reopened(store: Store) -> Store:
    store.close()
    return open_store(store.path)


def assert_holds(store: Store, feed: Feed) -> None:
    """Every table, and what a restart would load, is exactly the state of ``feed``."""
    metadata = feed.metadata
    assert rows(store, "SELECT stored, applied FROM listener") == [(feed.slot, feed.slot)]
    assert rows(store, "SELECT key, value, slot FROM config ORDER BY key") == [
        (entry.key, entry.value, entry.slot) for _, entry in sorted(metadata.config.items())
    ]
    assert rows(store, "SELECT lease, ttl_ms, granted_slot FROM leases ORDER BY 1") == [
        (name, lease.ttl_ms, name) for name, lease in sorted(metadata.leases.items())
    ]
    found = rows(
        store,
        "SELECT id, address, zone, weight, state, attributes, tokens, lease, joined_slot,"
        " updated_slot FROM members ORDER BY id",
    )
    assert [(*row[:5], msgspec.json.decode(row[5]), *row[6:]) for row in found] == [
        (
            m.id, m.address, m.zone, m.weight, m.state, m.attributes,
            None if m.tokens is None else list(m.tokens), m.lease or None,
            m.joined_slot, m.updated_slot,
        )
        for _, m in sorted(metadata.members.items())
    ]  # fmt: skip
    assert rows(store, "SELECT start_token, end_token, replicas FROM ring ORDER BY 1") == [
        (row.start, row.end, list(row.replicas)) for row in ring_of(metadata).ranges()
    ]
    again = reopened(store)
    loaded = again.load()
    assert loaded is not None
    assert (loaded.slot, loaded.chain, loaded.genesis) == (feed.slot, feed.chain, GENESIS)
    assert loaded.sessions.open == feed.sessions.open
    assert loaded.metadata.slot == metadata.slot
    assert b"".join(state_chunks(loaded.metadata)) == b"".join(state_chunks(metadata))
    assert loaded.metadata.row_bytes == metadata.row_bytes
    assert dict(loaded.metadata.held) == dict(metadata.held)
    again.close()


def test_a_new_store_is_at_slot_0_and_loads_nothing(path):
    store = open_store(path)
    assert (store.slot, store.history_from_slot, store.load()) == (0, 1, None)
    assert rows(store, "SELECT * FROM listener") == [("one", 0, 0, 0, 0, 1)]
    assert rows(store, "SELECT start_token, end_token, replicas FROM ring") == [(0, 2**64 - 1, [])]
    assert reopened(store).load() is None


@pytest.mark.parametrize("seed", range(6))
def test_any_batches_of_anything_are_stored_exactly(path, seed):
    feed = Feed(seed)
    store = open_store(path)
    slots = feed.start()
    store.write(feed.batch(slots))
    for _ in range(12):
        batch = [feed.some() for _ in range(feed.random.choice((1, 2, 7, 60)))]
        store.write(feed.batch(batch))
        slots += batch
    commits = rows(store, "SELECT slot, chain, bytes, voter, ballot FROM commits ORDER BY slot")
    assert commits == [
        (slot.slot, slot.chain, len(decode_value(slot.value).command), 2, "0.7.2") for slot in slots
    ]
    history = rows(store, "SELECT slot, kind, key, old, new FROM history ORDER BY slot")
    expected = [(slot.slot, change) for slot in slots for change in slot.changes]
    assert sorted(row[:3] for row in history) == sorted(
        (slot, change.kind, change.key) for slot, change in expected
    )
    assert_holds(store, feed)


def test_history_shows_old_and_new_and_what_was_done(path):
    feed, store = Feed(), open_store(path)
    store.write(
        feed.batch(
            [
                *feed.start(),
                feed.command(ConfigPut("k", "1")),
                feed.command(ConfigPut("k", "2")),
                feed.command(ConfigDelete("k")),
                feed.command(MemberJoin("m", zone="z", attributes={"b": "2", "a": "1"})),
            ]
        )
    )
    found = rows(store, "SELECT slot, kind, key, old, new, op FROM history ORDER BY slot")
    first, second = '{"key":"k","value":"1","slot":3}', '{"key":"k","value":"2","slot":4}'
    assert found[:3] == [
        (3, "config", "k", None, first, "insert"),
        (4, "config", "k", first, second, "update"),
        (5, "config", "k", second, None, "delete"),
    ]
    assert msgspec.json.decode(found[3][4]) == {
        "id": "m", "address": None, "zone": "z", "weight": 1, "state": "up",
        "attributes": {"a": "1", "b": "2"}, "tokens": None, "joined_slot": 6, "updated_slot": 6,
        "lease": None,
    }  # fmt: skip
    assert rows(store, "SELECT attributes->>'b' FROM members") == [("2",)]
    assert rows(store, "SELECT count(*) FROM config") == [(0,)]


def test_commits_holds_every_slot_with_its_kind(path):
    feed, store = Feed(), open_store(path)
    slots = [
        *feed.start(),
        feed.noop(),
        feed.command(MemberJoin("m")),
        feed.command(MemberJoin("m")),
        feed.value(Value(Kind.ENGINE, BALLOT, 2**63, command=b"no command")),
        feed.value(Value(Kind.SKIP, BALLOT, session=2, sequence=3, unanswered=3)),
        feed.value(Value(Kind.CLOSE, BALLOT, session=2)),
    ]
    store.write(feed.batch(slots))
    assert rows(store, "SELECT slot, kind, key FROM commits ORDER BY slot") == [
        (1, "genesis", None),
        (2, "open", None),
        (3, "noop", None),
        (4, "member_join", "m"),
        (5, "member_join", "m"),
        (6, "malformed", None),
        (7, "skip", "2"),
        (8, "close", "2"),
    ]
    times = rows(store, "SELECT epoch_ms(time) FROM commits WHERE slot IN (1, 2, 6) ORDER BY slot")
    assert times == [(None,), (1_700_000_000_000,), (listeners.store.TIME_MS_MAX,)]
    assert rows(store, "SELECT count(*) FROM history") == [(1,)]  # the second join was rejected


def test_only_changed_ranges_are_written(path):
    feed, store = Feed(), open_store(path)
    store.write(feed.batch(feed.start()))
    store.write(feed.batch([feed.command(MemberJoin(f"m{n}")) for n in range(100)]))
    before = set(rows(store, "SELECT rowid, end_token FROM ring"))
    store.write(feed.batch([feed.command(MemberJoin("new"))]))
    kept = before & set(rows(store, "SELECT rowid, end_token FROM ring"))
    assert 801 - 50 < len(kept) < 801
    store.write(feed.batch([feed.command(MemberUpdate("new", attributes={"a": "1"}))]))
    assert kept < set(rows(store, "SELECT rowid, end_token FROM ring"))
    store.write(feed.batch([feed.command(MemberLeave("new"))]))
    assert_holds(store, feed)


def test_a_gap_or_a_repeat_is_refused(path):
    feed, store = Feed(), open_store(path)
    slots = [*feed.start(), feed.noop(), feed.noop()]
    with pytest.raises(ValueError, match="slot 1 must be stored next, not 2"):
        store.write(feed.batch(slots[1:]))
    with pytest.raises(ValueError, match="slot 3 must be stored next, not 4"):
        store.write(feed.batch([*slots[:2], slots[3]]))
    store.write(feed.batch(slots))
    with pytest.raises(ValueError, match="slot 5 must be stored next, not 4"):
        store.write(feed.batch(slots[3:]))
    assert rows(store, "SELECT slot FROM commits ORDER BY slot") == [(1,), (2,), (3,), (4,)]


def test_a_batch_without_slots_notes_the_tip(path):
    feed, store = Feed(), open_store(path)
    store.write(feed.batch(feed.start()))
    store.write(StoreBatch((), feed.sessions, feed.metadata, applied=5, tip=9))
    assert rows(store, "SELECT applied, stored, tip, lag FROM listener") == [(5, 2, 9, 7)]


def test_an_expired_session_leaves_the_store(path, monkeypatch):
    monkeypatch.setattr("trex_core.sessions.SESSIONS_MAX", 3)
    feed, store = Feed(), open_store(path)
    store.write(feed.batch(feed.start()))
    for _ in range(5):
        store.write(feed.batch([feed.open(), feed.command(ConfigPut("k", "v"))]))
    assert len(feed.sessions.open) == 3
    assert_holds(store, feed)


def test_reset_replaces_everything_and_history_claims_nothing_below(path):
    feed, store = Feed(1), open_store(path)
    store.write(feed.batch([*feed.start(), *(feed.some() for _ in range(50))]))
    jump = [feed.some() for _ in range(200)]
    store.reset(feed.slot, feed.chain, GENESIS, feed.sessions, feed.metadata, tip=feed.slot + 3)
    assert store.history_from_slot == jump[-1].slot + 1
    assert rows(store, "SELECT count(*) FROM commits") == [(0,)]
    assert rows(store, "SELECT count(*) FROM history") == [(0,)]
    assert rows(store, "SELECT stored, tip, lag, history_from_slot FROM listener") == [
        (252, 255, 3, 253)
    ]
    after = [feed.some() for _ in range(30)]
    store.write(feed.batch(after))
    assert rows(store, "SELECT min(slot), max(slot), count(*) FROM commits") == [(253, 282, 30)]
    assert_holds(store, feed)
    again = open_store(path)
    assert again.history_from_slot == 253
    with pytest.raises(ValueError, match="slot 282 is stored already"):
        again.reset(252, feed.chain, GENESIS, feed.sessions, feed.metadata)


def test_a_failed_transaction_leaves_all_as_it_was(path, monkeypatch):
    feed, store = Feed(), open_store(path)
    store.write(feed.batch(feed.start()))
    batch = feed.batch([feed.command(MemberJoin("m")), feed.command(ConfigPut("k", "v"))])
    with monkeypatch.context() as patch:
        patch.setattr(
            listeners.store, "_MOVE_CURSOR", "UPDATE missing SET a = $1 + $2 + $3 + $4 + $5"
        )
        with pytest.raises(StoreError, match="missing"):
            store.write(batch)
    with pytest.raises(MemoryError, match="try again"):
        rows(store, "SELECT 1")
    store = reopened(store)
    assert rows(store, "SELECT stored FROM listener") == [(2,)]
    for table in ("members", "config", "history"):
        assert rows(store, f"SELECT count(*) FROM {table}") == [(0,)]
    assert rows(store, "SELECT count(*) FROM ring") == [(1,)]
    store.write(batch)
    assert_holds(store, feed)


def test_a_transaction_that_lacks_memory_is_tried_again_after_relief(path, monkeypatch):
    feed, store = Feed(), open_store(path)
    commit = "Failed to commit: {} of size 512 bytes (46.3 MiB/48.0 MiB used)"
    failures = [
        duckdb.OutOfMemoryException("no"),
        MemoryError(),
        duckdb.TransactionException(commit.format("could not allocate block")),
    ]
    relieved = []
    store.relieve = lambda: relieved.append(store.slot)
    inner = store._transact

    def transact(statements):
        if failures:
            raise failures.pop()
        inner(statements)

    monkeypatch.setattr(store, "_transact", transact)
    store.write(feed.batch(feed.start()))
    assert (store.slot, relieved) == (2, [0, 0, 0])
    failures[:] = [duckdb.TransactionException(commit.format("failed to allocate data"))]
    store.write(feed.batch([feed.noop()]))
    assert (store.slot, len(relieved)) == (3, 4)
    failures[:] = [MemoryError()] * 9
    with pytest.raises(StoreError, match="no memory for a transaction, 4 times"):
        store.write(feed.batch([feed.noop()]))
    assert store.slot == 3


def test_a_commit_that_failed_but_is_in_the_file_is_not_written_twice(path, monkeypatch):
    feed, store = Feed(), open_store(path)
    inner = store._transact
    failures = [duckdb.OutOfMemoryException("after the commit")]

    def transact(statements):
        inner(statements)
        if failures:
            store._failed = True
            raise failures.pop()

    monkeypatch.setattr(store, "_transact", transact)
    store.write(feed.batch(feed.start()))
    assert store.slot == 2
    assert rows(store, "SELECT slot FROM commits ORDER BY slot") == [(1,), (2,)]
    store.write(feed.batch([feed.noop()]))
    assert_holds(store, feed)


def test_what_a_failed_transaction_left_in_memory_is_not_believed(path, monkeypatch):
    """Seen with DuckDB 2.0: rows of a commit that lacked memory stayed, and the retry doubled
    them."""
    feed, store = Feed(), open_store(path)
    store.write(feed.batch(feed.start()))
    root, inner = store._root, store._transact
    failures = [duckdb.OutOfMemoryException("and no rollback")]

    def transact(statements):
        if failures:
            store._failed = True
            raise failures.pop()
        inner(statements)

    batch = feed.batch([feed.noop()])
    with store.connect() as held:
        monkeypatch.setattr(store, "_transact", transact)
        monkeypatch.setattr(listeners.store, "LET_GO_S", 0.01)
        monkeypatch.setattr(listeners.store, "MEMORY_ATTEMPTS", 2)
        with pytest.raises(StoreError, match="no memory for a transaction, 2 times"):
            store.write(batch)  # while somebody holds on to what is not true
        assert store._root is root
        held.execute("SELECT 1")
    store.write(batch)
    assert store._root is not root
    assert_holds(store, feed)


def test_what_does_not_fit_the_memory_limit_fails_clearly_and_changes_nothing(path):
    feed = Feed()
    store = Store.open(path, CLUSTER_ID, "one", memory_bytes=24 << 20)
    store.write(feed.batch(feed.start()))
    big = feed.batch([feed.command(ConfigPut(f"k{n}", "v" * (1 << 20))) for n in range(40)])
    relieved = []
    store.relieve = lambda: relieved.append(1)
    with pytest.raises(StoreError, match="memory"):
        store.write(big)
    assert relieved
    again = reopened(store)
    assert again.slot == 2
    again.write(big)
    assert_holds(again, feed)


def test_history_far_larger_than_the_memory_limit_is_no_trouble(path):
    feed = Feed(1)
    store = Store.open(path, CLUSTER_ID, "one", memory_bytes=96 << 20)
    store.write(feed.batch(feed.start()))
    for _ in range(30):  # 59 MiB of values, each of them in history twice
        values = [feed.random.randbytes(2048).hex() for _ in range(500)]
        commands = [ConfigPut(f"k{n % 50}", value) for n, value in enumerate(values)]
        store.write(feed.batch([feed.command(each) for each in commands]))
    again = reopened(store)
    assert again.slot == feed.slot
    with again.connect() as connection:
        assert connection.execute("SELECT count(*) FROM history").fetchone()[0] >= 30 * 500


# --- opening ----------------------------------------------------------------------------------


def test_a_store_of_another_cluster_or_listener_or_a_newer_format_is_refused(path):
    open_store(path).close()
    with pytest.raises(StoreError, match=f"belongs to cluster {CLUSTER_ID.hex()}, not to 78787"):
        Store.open(path, b"x" * 16, "one")
    with pytest.raises(StoreError, match="belongs to listener 'one', not to 'two'"):
        Store.open(path, CLUSTER_ID, "two")
    with duckdb.connect(path) as connection:
        connection.execute("UPDATE internal.identity SET format = 2")
    with pytest.raises(StoreError, match="format 2, this program knows up to 1: upgrade"):
        open_store(path)


def test_a_foreign_or_damaged_file_is_refused_with_what_to_do(path):
    with duckdb.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (a INTEGER)")
    with pytest.raises(StoreError, match="no listener's store; move it away"):
        open_store(path)
    path.write_bytes(b"hello " * 10_000)
    with pytest.raises(StoreError, match=r"damaged or no store .* move it away"):
        open_store(path)
    path.unlink()
    open_store(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="move it away"):
        open_store(path)
    damaged = bytearray(whole)
    for at in range(12_288, len(damaged), 4096):
        damaged[at + 64] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match="move it away"):
        open_store(path)


def test_a_log_left_by_a_file_that_was_moved_away_is_not_replayed(path):
    feed, store = Feed(), open_store(path)
    store.write(feed.batch(feed.start()))
    log = path.with_name(path.name + ".wal")
    left = log.read_bytes()
    assert left
    store.close()
    path.unlink()
    log.write_bytes(left)
    assert open_store(path).slot == 0


def test_a_store_in_use_is_refused(path):
    store = open_store(path)
    with pytest.raises(StoreError, match="in use by this process"):
        open_store(path)
    code = (
        "import sys; from pathlib import Path; from listeners.store import Store\n"
        f"Store.open(Path(sys.argv[1]), {CLUSTER_ID!r}, 'one')"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert "is in use by another process: stop it first" in other.stderr
    reopened(store).close()


CHILD = """
import sys
from pathlib import Path
from listeners.store import Store
from tests.listeners.feed import CLUSTER_ID, Feed
store = Store.open(Path(sys.argv[1]), CLUSTER_ID, "one")
feed = Feed(5)
slots = feed.start()
while feed.slot < store.slot:
    feed.some()
print("at", store.slot, flush=True)
if not store.slot:
    store.write(feed.batch(slots))
while True:
    store.write(feed.batch([feed.some() for _ in range(40)]))
    print("at", store.slot, flush=True)
"""


@pytest.mark.e2e
def test_kill_9_at_any_moment_keeps_whole_transactions(path):
    stored = 0
    for lines in (1, 2, 3, 5, 8):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        try:
            for _ in range(lines):
                told = int(child.stdout.readline().split()[1])
            assert told >= stored
            # The next transaction is under way.
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
        store = open_store(path)
        assert store.slot >= told, "what was told to be stored is stored"
        assert store.slot in (0, 2) or (store.slot - 2) % 40 == 0, "whole batches only"
        stored = store.slot
        feed = Feed(5)
        if stored:
            feed.start()
        while feed.slot < stored:
            feed.some()
        assert rows(store, "SELECT count(*), coalesce(max(slot), 0) FROM commits") == [
            (stored, stored)
        ]
        if stored:
            assert_holds(store, feed)
        else:
            store.close()
    assert stored > 2 + 40 * 8


# --- behind a listener -------------------------------------------------------------------------


async def test_batches_grow_with_the_backlog(path, monkeypatch):
    feed, store = Feed(), open_store(path)
    sizes = []
    write = store.write

    def counted(batch):
        sizes.append(len(batch.slots))
        write(batch)

    monkeypatch.setattr(store, "write", counted)
    writer = StoreWriter(store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        writer.add(feed.batch(feed.start()))
        await writer.wait_stored(1)
        for _ in range(900):
            writer.add(feed.batch([feed.command(ConfigPut("k", "v")), feed.noop()]))
        await writer.wait_stored(feed.slot)
        assert writer.backlog_slots == 0
        tasks.cancel_scope.cancel()
    assert sum(sizes) == feed.slot == 1802
    assert len(sizes) <= 3
    assert writer.transactions == len(sizes)
    assert_holds(store, feed)


async def test_batches_are_bounded_in_slots_and_bytes(path, monkeypatch):
    monkeypatch.setattr(listeners.store, "BATCH_SLOTS_MAX", 10)
    monkeypatch.setattr(listeners.store, "BATCH_BYTES_MAX", 50_000)
    feed, store = Feed(), open_store(path)
    taken = []
    write = store.write
    monkeypatch.setattr(store, "write", lambda batch: (taken.append(batch.slots), write(batch)))
    writer = StoreWriter(store)
    writer.add(feed.batch(feed.start()))
    for _ in range(9):
        writer.add(feed.batch([feed.noop() for _ in range(4)]))
    for _ in range(4):
        writer.add(feed.batch([feed.command(ConfigPut("k", "v" * 30_000))]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        await writer.wait_stored(feed.slot)
        tasks.cancel_scope.cancel()
    assert [len(slots) for slots in taken] == [10, 8, 8, 8, 5, 1, 1, 1]
    assert_holds(store, feed)


async def test_a_listener_far_ahead_of_its_store_is_told_to_wait(path, monkeypatch):
    monkeypatch.setattr(listeners.store, "PENDING_SLOTS_MAX", 5)
    feed, store = Feed(), open_store(path)
    writer = StoreWriter(store)
    writer.add(feed.batch([*feed.start(), *(feed.noop() for _ in range(10))]))
    with pytest.raises(TimeoutError), anyio.fail_after(0):
        await writer.room()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        with anyio.fail_after(20):
            await writer.room()
        assert writer.stored == feed.slot
        tasks.cancel_scope.cancel()


async def test_small_transactions_rest_but_not_while_somebody_waits(path, monkeypatch):
    monkeypatch.setattr(listeners.store, "REST_RATIO", 1e9)
    monkeypatch.setattr(listeners.store, "REST_S_MAX", 3600.0)
    feed, store = Feed(), open_store(path)
    writer = StoreWriter(store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        writer.add(feed.batch(feed.start()))
        await writer.wait_stored(2)
        for _ in range(3):
            writer.add(feed.batch([feed.noop()]))
            await anyio.lowlevel.checkpoint()
        assert (writer.stored, writer.backlog_slots) == (2, 3)
        with anyio.fail_after(20):
            await writer.wait_stored(5)
        writer.add(feed.batch([feed.noop() for _ in range(listeners.store.REST_SLOTS_MAX)]))
        with anyio.fail_after(20):
            while writer.backlog_slots:
                await writer._moved.wait()
        tasks.cancel_scope.cancel()


async def test_a_tip_alone_is_noted_once(path, monkeypatch):
    monkeypatch.setattr(listeners.store, "NOTE_S", 0.0)
    feed, store = Feed(), open_store(path)
    writer = StoreWriter(store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        writer.add(feed.batch(feed.start()))
        await writer.wait_stored(2)
        for _ in range(3):
            writer.add(StoreBatch((), feed.sessions, feed.metadata, applied=2, tip=7))
        with anyio.fail_after(20):
            while writer.transactions < 2:
                await writer._moved.wait()
        writer.add(StoreBatch((), feed.sessions, feed.metadata, applied=2, tip=7))
        writer.add(feed.batch([feed.noop()], tip=7))
        await writer.wait_stored(3)
        tasks.cancel_scope.cancel()
    assert writer.transactions == 3
    assert rows(store, "SELECT stored, tip, lag FROM listener") == [(3, 7, 4)]


async def test_a_failed_store_fails_whoever_waits(path, monkeypatch):
    feed, store = Feed(), open_store(path)

    def write(_):
        raise StoreError("disk full")

    monkeypatch.setattr(store, "write", write)
    writer = StoreWriter(store)
    failed = []

    async def wait():
        with pytest.raises(StoreError, match="disk full"):
            await writer.wait_stored(2)
        failed.append("waiter")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        writer.add(feed.batch(feed.start()))
        with pytest.raises(StoreError, match="disk full"):
            await writer.run()
    assert failed == ["waiter"]
    with pytest.raises(StoreError, match="disk full"):
        await writer.wait_stored(2)


async def test_a_jump_drops_what_was_not_stored_yet(path):
    feed, store = Feed(3), open_store(path)
    writer = StoreWriter(store)
    async with anyio.create_task_group() as tasks:
        writer.add(feed.batch([*feed.start(), *(feed.some() for _ in range(100))]))
        tasks.start_soon(writer.run)
        jump = [feed.some() for _ in range(50)]
        await writer.reset(feed.slot, feed.chain, GENESIS, feed.sessions, feed.metadata)
        assert writer.stored == jump[-1].slot
        assert writer.backlog_slots == 0
        writer.add(feed.batch([feed.some()]))
        await writer.wait_stored(feed.slot)
        tasks.cancel_scope.cancel()
    slots = [slot for (slot,) in rows(store, "SELECT slot FROM commits ORDER BY slot")]
    assert slots == [feed.slot]
    assert store.history_from_slot == feed.slot
    assert_holds(store, feed)


def test_slots_are_contiguous_in_commits_over_many_batches(path):
    feed, store = Feed(9), open_store(path)
    store.write(feed.batch(feed.start()))
    for size in (1, 500, 3, 40):
        store.write(feed.batch([feed.some() for _ in range(size)]))
    slots = [slot for (slot,) in rows(store, "SELECT slot FROM commits ORDER BY slot")]
    assert slots[0] == 1
    assert all(a + 1 == b for a, b in pairwise(slots))


def test_awkward_texts_survive(path):
    feed, store = Feed(), open_store(path)
    store.write(feed.batch(feed.start()))
    members = [
        feed.command(MemberJoin(text, text, text, attributes={text: text})) for text in AWKWARD
    ]
    store.write(feed.batch(members))
    # Found again by their keys: removed and replaced, not doubled.
    store.write(feed.batch([feed.command(MemberUpdate(text, address="x")) for text in AWKWARD[:4]]))
    store.write(feed.batch([feed.command(MemberLeave(text)) for text in AWKWARD[4:]]))
    store.write(feed.batch([feed.command(LeaseGrant(1000)), feed.noop()]))
    assert_holds(store, feed)


def test_an_empty_state_can_be_reset_to(path):
    store = open_store(path)
    feed = Feed()
    store.reset(7, bytes(32), GENESIS, NO_SESSIONS, feed.metadata)
    loaded = reopened(store).load()
    assert loaded is not None
    assert (loaded.slot, loaded.chain, dict(loaded.metadata.members)) == (7, bytes(32), {})


def test_the_benchmark_runs():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store", "--members", "40", "--batches", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = [msgspec.json.decode(line) for line in done.stdout.splitlines()]
    assert len(lines) == 11, done.stderr
    assert all(line["ratio"] > 0 for line in lines[1:-1])
