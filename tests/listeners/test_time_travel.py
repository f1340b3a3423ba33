"""Time travel in SQL: every slot's state as the macros tell it, against the states themselves."""

from __future__ import annotations

import gzip
from functools import partial
from itertools import pairwise

import msgspec
import pytest

from dashboard.importer import row_command
from listeners.sql import SqlInvalidError, run_select
from listeners.store import _MACROS, Store
from tests.listeners.feed import BALLOT, CLUSTER_ID, GENESIS, Feed
from trex_core.messages import Ballot, Kind, Value
from trex_core.metadata.commands import (
    ConfigDelete,
    ConfigEntry,
    ConfigPut,
    Lease,
    LeaseGrant,
    LeaseRevoke,
    Member,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    encode_command,
)
from trex_core.metadata.state import EMPTY, MetadataState

open_store = partial(Store.open, cluster_id=CLUSTER_ID, name="one")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.duckdb"


def select(store: Store, sql: str) -> tuple[tuple, ...]:
    """The answer as a user gets it: one SELECT, read only, on a connection of its own."""
    with store.connect() as connection:
        return run_select(connection, sql).rows


def columns(store: Store, sql: str) -> list[tuple[str, str]]:
    with store.connect() as connection:
        result = run_select(connection, sql)
    return list(zip(result.columns, result.types, strict=True))


def refused(store: Store, sql: str) -> str:
    with pytest.raises(SqlInvalidError) as caught:
        select(store, sql)
    return str(caught.value)


# --- what must come out, from the states alone --------------------------------------------------


def shown(row: Member | ConfigEntry | Lease | None) -> dict | None:
    """A row as ``history`` and ``diff`` show it."""
    match row:
        case None:
            return None
        case Lease():
            return {
                "lease": row.granted_slot,
                "ttl_ms": row.ttl_ms,
                "granted_slot": row.granted_slot,
            }
        case Member():
            tokens = None if row.tokens is None else list(row.tokens)
            return msgspec.to_builtins(
                msgspec.structs.asdict(row) | {"tokens": tokens, "lease": row.lease or None}
            )
        case ConfigEntry():
            return msgspec.structs.asdict(row)


def members(state: MetadataState) -> list[dict]:
    return [shown(row) for _, row in sorted(state.members.items())]


def config(state: MetadataState) -> list[dict]:
    return [shown(row) for _, row in sorted(state.config.items())]


def rows_of(state: MetadataState) -> dict[tuple[str, str], Member | ConfigEntry | Lease]:
    return {
        **{("config", key): row for key, row in state.config.items()},
        **{("lease", str(key)): row for key, row in state.leases.items()},
        **{("member", key): row for key, row in state.members.items()},
    }


def content(row: dict | None) -> dict | None:
    """Less what only says which slot wrote it last."""
    if row is None:
        return None
    return {name: value for name, value in row.items() if name not in ("slot", "updated_slot")}


def difference(a: MetadataState, b: MetadataState) -> list[tuple]:
    before, after = rows_of(a), rows_of(b)
    pairs = ((key, shown(before.get(key)), shown(after.get(key))) for key in {*before, *after})
    return sorted(
        ((*key, old, new) for key, old, new in pairs if content(old) != content(new)),
        key=lambda row: row[:2],
    )


# --- what comes out ------------------------------------------------------------------------------


def members_at(store: Store, slot: object) -> list[dict]:
    """``members_at`` in order, each row by its columns."""
    with store.connect() as connection:
        result = run_select(connection, f"SELECT * FROM members_at({slot}) ORDER BY id")
    found = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
    return [row | {"attributes": msgspec.json.decode(row["attributes"])} for row in found]


def config_at(store: Store, slot: object) -> list[dict]:
    found = select(store, f"SELECT key, value, slot FROM config_at({slot}) ORDER BY key")
    return [{"key": key, "value": value, "slot": at} for key, value, at in found]


def diff(store: Store, a: int, b: int) -> list[tuple]:
    return [
        (kind, key, *(None if side is None else msgspec.json.decode(side) for side in (old, new)))
        for kind, key, old, new in select(store, f"SELECT * FROM diff({a}, {b})")
    ]


class Past(Feed):
    """A feed that remembers the state after each slot."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.states = {0: EMPTY}

    def value(self, value: Value):
        slot = super().value(value)
        self.states[self.slot] = self.metadata
        return slot

    def some(self):
        """As a feed's, with members on leases ended more often, and members that come back."""
        draw, leases = self.random.random(), sorted(self.metadata.leases)
        if draw < 0.1 and leases:
            return self.command(LeaseRevoke(self.random.choice(leases)))
        if draw < 0.2:
            if leases:
                name = f"m{self.random.randrange(12)}"
                return self.command(MemberJoin(name, lease=self.random.choice(leases)))
            return self.command(LeaseGrant(1000))
        if draw < 0.25 and self.metadata.members:
            return self.command(MemberLeave(self.random.choice(sorted(self.metadata.members))))
        return super().some()


def assert_tells_the_past(store: Store, past: Past, first: int, *, pairs: int = 30) -> None:
    for slot in range(first, past.slot + 1):
        state = past.states[slot]
        assert members_at(store, slot) == members(state), f"members at {slot}"
        assert config_at(store, slot) == config(state), f"config at {slot}"
    draw = past.random
    for _ in range(pairs):
        a, b = draw.randint(first, past.slot), draw.randint(first, past.slot)
        assert diff(store, a, b) == difference(past.states[a], past.states[b]), f"{a} to {b}"


@pytest.mark.parametrize("seed", range(2))
def test_every_slot_is_told_as_it_was_also_after_a_restart_and_a_reset(path, seed):
    past, store = Past(seed), open_store(path)
    store.write(past.batch(past.start()))
    for _ in range(8):
        store.write(past.batch([past.some() for _ in range(past.random.choice((7, 20, 30)))]))
    assert_tells_the_past(store, past, 0)
    gone = select(
        store,
        "SELECT count(*) FROM history WHERE kind = 'member' AND op = 'delete' AND slot IN"
        " (SELECT slot FROM history WHERE kind = 'lease' AND op = 'delete')",
    )
    assert gone > ((3,),), "leases that ended took members along, else this shows too little"

    store.close()
    store = open_store(path)
    store.write(past.batch([past.some() for _ in range(20)]))
    assert_tells_the_past(store, past, past.slot - 40, pairs=20)

    for _ in range(50):
        past.some()
    jump = past.slot
    store.reset(jump, past.chain, GENESIS, past.sessions, past.metadata)
    assert_tells_the_past(store, past, jump, pairs=1)
    for slot in (0, jump - 1):
        assert f"history begins at slot {jump + 1} here: {jump} is" in refused(
            store, f"SELECT * FROM members_at({slot})"
        )
    store.write(past.batch([past.some() for _ in range(60)]))
    assert_tells_the_past(store, past, jump)
    store.close()


def test_the_tables_and_the_macros_show_the_very_same_rows(path):
    past, store = Past(9), open_store(path)
    store.write(past.batch(past.start()))
    seen = {}
    for _ in range(6):
        store.write(past.batch([past.some() for _ in range(40)]))
        seen[past.slot] = [
            select(store, f"SELECT * FROM {table} ORDER BY 1") for table in ("members", "config")
        ]
    for slot, tables in seen.items():
        assert tables == [
            select(store, f"SELECT * FROM {table}_at({slot}) ORDER BY 1")
            for table in ("members", "config")
        ]
    for table in ("members", "config"):
        at = f"{table}_at({past.slot - 1})"
        assert columns(store, f"SELECT * FROM {at}") == columns(store, f"SELECT * FROM {table}")
    store.close()


def test_one_key_through_all_that_can_happen_to_it(path):
    past, store = Past(), open_store(path)
    store.write(
        past.batch(
            [
                *past.start(),
                past.command(MemberJoin("m", zone="a")),
                past.command(MemberUpdate("m", zone="b")),
                past.command(MemberLeave("m")),
                past.command(LeaseGrant(1000)),
                past.command(MemberJoin("m", zone="c", lease=6)),
                past.command(LeaseRevoke(6)),
                past.command(MemberJoin("m", zone="d")),
            ]
        )
    )
    zones = [[row["zone"] for row in members_at(store, slot)] for slot in range(past.slot + 1)]
    assert zones == [[], [], [], ["a"], ["b"], [], [], ["c"], [], ["d"]]
    store.close()


def test_what_was_changed_back_is_no_difference(path):
    past, store = Past(), open_store(path)
    store.write(
        past.batch(
            [
                *past.start(),
                past.command(ConfigPut("k", "1")),
                past.command(ConfigPut("other", "x")),
                past.command(ConfigPut("k", "2")),
                past.command(ConfigPut("k", "1")),
                past.command(ConfigPut("passing", "x")),
                past.command(ConfigDelete("passing")),
                past.command(MemberJoin("m")),
                past.command(MemberUpdate("m", state="draining")),
                past.command(MemberUpdate("m", state="up")),
            ]
        )
    )
    assert diff(store, 3, 8) == [
        ("config", "other", None, {"key": "other", "value": "x", "slot": 4})
    ]
    assert diff(store, 9, 11) == []
    assert [row[1] for row in diff(store, 9, 10)] == ["m"]
    assert diff(store, 5, 5) == []
    forward, backward = diff(store, 3, 5), diff(store, 5, 3)
    assert backward == [(kind, key, new, old) for kind, key, old, new in forward] != []
    store.close()


def test_a_slot_that_is_not_there_is_an_error_also_where_all_is_empty(path):
    past, store = Past(), open_store(path)
    for filled in (False, True):
        if filled:
            store.write(past.batch([*past.start(), past.command(ConfigPut("k", "1"))]))
        end = past.slot
        for wanted in ("members_at({})", "config_at({})", "diff(0, {})", "diff({}, 0)"):
            for shape in ("SELECT * FROM {} LIMIT 1", "SELECT count(*) FROM {}"):
                sql = shape.format(wanted)
                select(store, sql.format(0))
                select(store, sql.format(end))
                assert "history begins at slot 1 here: 0 is" in refused(store, sql.format(-1))
                assert f"stored is slot {end} so far, not {end + 1}" in refused(
                    store, sql.format(end + 1)
                )
                assert "which slot? it is NULL" in refused(store, sql.format("NULL"))
                assert "convert" in refused(store, sql.format("'x'"))
                assert '"slot" was not found' in refused(store, sql.format("slot"))
    store.close()


def test_the_slot_may_be_computed_and_the_macros_are_in_nobodys_way(path):
    past, store = Past(2), open_store(path)
    store.write(past.batch(past.start()))
    store.write(past.batch([past.some() for _ in range(100)]))
    middle = past.states[50]
    # Names that the macros use inside mean nothing else to who uses them.
    assert select(
        store,
        "WITH moment AS (SELECT 50 AS slot), changed AS (SELECT 1), history AS (SELECT 2),"
        " members AS (SELECT 3) SELECT count(*) FROM members_at((SELECT slot FROM moment))",
    ) == ((len(middle.members),),)
    counts = select(
        store,
        "SELECT asked, n FROM (VALUES (3), (50), (102)) AS slots(asked),"
        " LATERAL (SELECT count(*) AS n FROM config_at(asked)) ORDER BY asked",
    )
    assert counts == tuple((slot, len(past.states[slot].config)) for slot in (3, 50, 102))
    joined = select(
        store,
        "SELECT count(*) FROM members_at(50) AS old JOIN members_at((SELECT max(slot) FROM"
        " commits)) AS new USING (id)",
    )
    assert joined == ((len({*middle.members} & {*past.metadata.members}),),)
    store.close()


def test_a_store_of_before_gets_them_when_it_is_opened(path):
    past, store = Past(4), open_store(path)
    store.write(past.batch(past.start()))
    store.write(past.batch([past.some() for _ in range(40)]))
    with store.connect() as connection:
        for sql in _MACROS:
            name = sql.split("(")[0].split()[4]
            kind = "VIEW" if " VIEW " in sql else "MACRO TABLE" if "AS TABLE" in sql else "MACRO"
            connection.execute(f"DROP {kind} {name}")
    assert "does not exist" in refused(store, "SELECT * FROM members_at(3)")
    store.close()
    store = open_store(path)
    assert_tells_the_past(store, past, 30, pairs=5)
    assert len(select(store, "SELECT * FROM ballots")) == 1
    store.close()


def test_a_recorded_cluster_is_told_as_it_was(path, google_trace):
    """An eighth of the machines, with everything that happened to them."""
    past, store = Past(), open_store(path)
    with gzip.open(google_trace) as lines:
        rows = [line for line in lines if int(line.split(b",")[1]) % 8 == 0]
    assert len(rows) > 3000
    slots = past.start()
    for row in rows:
        slots.append(past.command(row_command(row)))
        if len(slots) == 500:
            store.write(past.batch(slots))
            slots = []
    store.write(past.batch(slots))
    wanted = [*range(0, past.slot, 331), past.slot]
    for slot in wanted:
        assert members_at(store, slot) == members(past.states[slot]), f"members at {slot}"
    for a, b in pairwise(wanted):
        assert diff(store, a, b) == difference(past.states[a], past.states[b]), f"{a} to {b}"
    store.close()


# --- leadership -----------------------------------------------------------------------------------


def test_ballots_show_who_led_when_as_the_log_has_it(path):
    feed, store = Feed(), open_store(path)

    def fixed(ballot: Ballot, time_ms: int):
        command = encode_command(ConfigPut("k", str(time_ms)))
        return feed.value(Value(Kind.ENGINE, ballot, time_ms, command=command))

    nine, ten = Ballot(0, 9, 3), Ballot(0, 10, 1)
    store.write(
        feed.batch(
            [
                feed.value(
                    Value(Kind.GENESIS, BALLOT, 1_000, command=msgspec.msgpack.encode(GENESIS))
                ),
                fixed(nine, 2_000),
                fixed(nine, 3_000),
                feed.value(Value(Kind.NOOP, ten, 9_000)),
                fixed(nine, 4_000),  # taken over by the leader of 0.10.1, still of 0.9.3
                fixed(ten, 10_000),
                fixed(ten, 12_000),
            ]
        )
    )
    found = select(
        store,
        "SELECT ballot, voter, first_slot, last_slot, slots, epoch_ms(first_time),"
        " epoch_ms(last_time) FROM ballots",
    )
    assert found == (
        ("0.7.2", 2, 1, 1, 1, 1_000, 1_000),
        ("0.9.3", 3, 2, 5, 3, 2_000, 4_000),
        ("0.10.1", 1, 4, 7, 3, 9_000, 12_000),
    ), "by first slot: 0.9.3 before 0.10.1, which as text would be the other way round"
    assert columns(store, "SELECT * FROM ballots") == [
        ("ballot", "VARCHAR"),
        ("voter", "BIGINT"),
        ("first_slot", "BIGINT"),
        ("last_slot", "BIGINT"),
        ("slots", "BIGINT"),
        ("first_time", "TIMESTAMP"),
        ("last_time", "TIMESTAMP"),
    ]
    store.close()
