"""The metadata machine: total, deterministic, within its limits."""

from __future__ import annotations

import contextlib
import gzip
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trex_core.machine import TooOld
from trex_core.metadata import commands, state
from trex_core.metadata.commands import (
    LEVEL,
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
    Reason,
    Rejected,
    RingOwner,
    Unreadable,
    decode_command,
    decode_reply,
    decode_result,
    decode_row,
    describe_command,
    encode_command,
    encode_question,
    encode_row,
    row_bytes,
    why_inadmissible,
)
from trex_core.metadata.ring import TOKENS_PER_WEIGHT_KEY, Ring, key_token
from trex_core.metadata.state import (
    EMPTY,
    MetadataMachine,
    StateError,
    answer,
    apply,
    ring_of,
    state_chunks,
    state_from,
    state_of,
)


class Log:
    """Applies commands in ascending slots; keeps the newest changes."""

    def __init__(self):
        self.state = EMPTY
        self.changes = ()

    def do(self, command):
        self.state, result, self.changes = apply(
            self.state, self.state.slot + 1, encode_command(command)
        )
        return decode_result(result)

    def reason(self, command):
        before = self.state
        result = self.do(command)
        assert isinstance(result, Rejected) and self.changes == ()
        assert msgspec.structs.replace(self.state, slot=before.slot) == before
        return result.reason

    def ask(self, question):
        return decode_reply(answer(self.state, encode_question(question)))


# --- configuration


def test_put_get_delete():
    log = Log()
    assert log.do(ConfigPut("k", "v")) == Done(1)
    assert log.changes == (Change("config", "k", None, ConfigEntry("k", "v", 1)),)
    assert log.do(ConfigPut("k", "v")) == Done(2), "the same value again is a new version"
    assert log.changes == (
        Change("config", "k", ConfigEntry("k", "v", 1), ConfigEntry("k", "v", 2)),
    )
    assert log.ask(ConfigGet("k")) == ConfigEntry("k", "v", 2)
    assert log.do(ConfigDelete("k")) == Done(3)
    assert log.ask(ConfigGet("k")) is None
    assert log.reason(ConfigDelete("k")) == Reason.NOT_FOUND


def test_compare_and_set():
    log = Log()
    assert log.do(ConfigCas("k", 5, "v")) == Rejected(
        Reason.CAS_FAILED, "the key was written by another slot", 0
    )
    assert log.do(ConfigCas("k", 0, "one")) == Done(2)
    failed = log.do(ConfigCas("k", 0, "two"))
    assert isinstance(failed, Rejected) and (failed.reason, failed.slot) == ("cas_failed", 2)
    assert log.do(ConfigCas("k", 2, "two")) == Done(4)
    assert log.do(ConfigCas("k", 4, None)) == Done(5)
    assert log.state.config.get("k") is None
    assert log.reason(ConfigCas("k", 0, None)) == Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("key", "value", "fine"),
    [
        ("ring/replication_factor", "5", True),
        ("ring/replication_factor", "16", True),
        ("ring/replication_factor", "17", False),
        ("ring/replication_factor", "0", False),
        ("ring/replication_factor", "", False),
        ("ring/replication_factor", "03", False),
        ("ring/replication_factor", "-1", False),
        ("ring/replication_factor", "٣", False),
        ("ring/replication_factor", "9" * 5000, False),
        ("ring/tokens_per_weight", "64", True),
        ("ring/tokens_per_weight", "65", False),
        ("ring/spread", "none", True),
        ("ring/spread", "rack", False),
        ("ring/replicationfactor", "3", False),
    ],
)
def test_ring_settings_are_checked(key, value, fine):
    log = Log()
    if fine:
        assert log.do(ConfigPut(key, value)) == Done(1)
        assert ring_of(log.state).settings != Ring.of().settings
    else:
        assert log.reason(ConfigPut(key, value)) == Reason.INVALID
        assert log.reason(ConfigCas(key, 0, value)) == Reason.INVALID


# --- members


def test_join_update_leave():
    log = Log()
    assert log.do(MemberJoin("m", "a:1", "z", 2, "up", {"b": "2", "a": "1"}, (9, 3))) == Done(1)
    joined = Member("m", "a:1", "z", 2, "up", {"a": "1", "b": "2"}, (3, 9), 0, 1, 1)
    assert log.state.members["m"] == joined
    assert list(log.state.members["m"].attributes) == ["a", "b"]
    assert log.do(MemberUpdate("m", state="draining")) == Done(2)
    drained = msgspec.structs.replace(joined, state="draining", updated_slot=2)
    assert log.changes == (Change("member", "m", joined, drained),)
    assert log.do(MemberLeave("m")) == Done(3)
    assert log.changes == (Change("member", "m", drained, None),)
    assert log.state == msgspec.structs.replace(EMPTY, slot=3, ids=log.state.ids)
    assert len(log.state.ids) == 0


def test_an_update_of_nothing_is_a_change_with_a_new_updated_slot():
    log = Log()
    log.do(MemberJoin("m"))
    assert log.do(MemberUpdate("m")) == Done(2)
    (change,) = log.changes
    assert change.new == msgspec.structs.replace(change.old, updated_slot=2)


def test_update_sets_and_clears_each_field():
    log = Log()
    log.do(LeaseGrant(1000))
    log.do(MemberJoin("m"))
    log.do(MemberUpdate("m", "a:2", "z2", 3, "down", {"x": "y"}, (7,), 1))
    assert log.state.members["m"] == Member("m", "a:2", "z2", 3, "down", {"x": "y"}, (7,), 1, 2, 3)
    log.do(MemberUpdate("m", address="", zone="", attributes={}, tokens=(), lease=0))
    assert log.state.members["m"] == Member("m", None, None, 3, "down", {}, None, 0, 2, 4)
    assert log.state.held == EMPTY.held


def test_members_are_refused_with_a_reason():
    log = Log()
    log.do(MemberJoin("m"))
    again = log.do(MemberJoin("m"))
    assert again == Rejected(Reason.EXISTS, "a member with this id is there", 1)
    assert log.reason(MemberUpdate("x")) == Reason.NOT_FOUND
    assert log.reason(MemberLeave("x")) == Reason.NOT_FOUND
    for bad in (
        MemberJoin(""),
        MemberJoin("n", address=""),
        MemberJoin("n", zone=""),
        MemberJoin("n", weight=0),
        MemberJoin("n", weight=commands.WEIGHT_MAX + 1),
        MemberJoin("n", state="gone"),
        MemberJoin("n", tokens=()),
        MemberJoin("n", tokens=(1, 1)),
        MemberJoin("n", tokens=(-1,)),
        MemberUpdate("m", state=""),
        MemberUpdate("m", weight=-5),
        MemberUpdate("m", tokens=(2, 2)),
    ):
        assert log.reason(bad) == Reason.INVALID, bad
    for bad in (MemberJoin("n", lease=9), MemberUpdate("m", lease=9), MemberJoin("n", lease=-1)):
        assert log.reason(bad) == Reason.LEASE_NOT_FOUND, bad


# --- leases


@pytest.mark.parametrize("end", [LeaseRevoke, LeaseExpire])
def test_a_lease_takes_its_members_along_in_one_slot(end):
    log = Log()
    assert log.do(LeaseGrant(5000)) == Done(1)
    assert log.state.leases[1] == Lease(5000, 1)
    for name in ("b", "a", "c"):
        log.do(MemberJoin(name, lease=1))
    log.do(MemberLeave("c"))
    log.do(MemberJoin("free"))
    assert log.do(end(1)) == Done(7)
    assert [(c.kind, c.key, c.new) for c in log.changes] == [
        ("member", "a", None), ("member", "b", None), ("lease", "1", None),
    ]  # fmt: skip
    assert sorted(log.state.members) == ["free"]
    assert log.reason(end(1)) == Reason.LEASE_NOT_FOUND
    assert log.state.held == EMPTY.held


def test_a_member_moves_between_leases():
    log = Log()
    log.do(LeaseGrant(1000))
    log.do(LeaseGrant(1000))
    log.do(MemberJoin("m", lease=1))
    log.do(MemberUpdate("m", lease=2))
    assert log.do(LeaseExpire(1)) == Done(5) and "m" in log.state.members
    assert log.do(LeaseExpire(2)) == Done(6) and "m" not in log.state.members


@pytest.mark.parametrize("ttl", [0, -1, 99, commands.LEASE_TTL_MS_MAX + 1])
def test_a_lease_has_bounds(ttl):
    assert Log().reason(LeaseGrant(ttl)) == Reason.INVALID


# --- quotas


def limited(monkeypatch, **limits):
    for name, value in limits.items():
        monkeypatch.setattr(commands, name, value)


def test_texts_have_limits_in_bytes_not_characters():
    log = Log()
    long = "ü" * (commands.NAME_BYTES_MAX // 2)
    assert log.do(MemberJoin(long, long, long)) == Done(1)
    assert log.reason(MemberJoin(long + "x")) == Reason.QUOTA
    assert log.reason(MemberJoin("m", address=long + "x")) == Reason.QUOTA
    assert log.reason(MemberUpdate(long, zone=long + "x")) == Reason.QUOTA
    key = "k" * commands.KEY_BYTES_MAX
    assert log.reason(ConfigPut(key + "k", "")) == Reason.QUOTA
    assert log.reason(ConfigPut("", "")) == Reason.INVALID
    assert isinstance(log.do(ConfigPut(key, "")), Done)
    assert isinstance(log.do(ConfigPut("k", "x" * (1 << 20))), Done)
    assert log.reason(ConfigPut("k", "x" * ((1 << 20) + 1))) == Reason.QUOTA


def test_attributes_and_tokens_have_limits():
    log = Log()
    many = {str(n): "" for n in range(commands.ATTRIBUTES_MAX)}
    assert log.do(MemberJoin("m", attributes=many)) == Done(1)
    assert log.reason(MemberUpdate("m", attributes={**many, "x": ""})) == Reason.QUOTA
    wide = {"k": "v" * commands.ATTRIBUTE_BYTES_MAX}
    assert log.reason(MemberUpdate("m", attributes=wide)) == Reason.QUOTA
    tokens = tuple(range(commands.MEMBER_TOKENS_MAX + 1))
    assert log.reason(MemberUpdate("m", tokens=tokens)) == Reason.QUOTA


def test_rows_are_limited_and_deletes_always_pass(monkeypatch):
    limited(monkeypatch, CONFIG_KEYS_MAX=1, MEMBERS_MAX=1, LEASES_MAX=1)
    log = Log()
    log.do(ConfigPut("k", "v"))
    log.do(MemberJoin("m"))
    log.do(LeaseGrant(1000))
    assert log.reason(ConfigPut("l", "")) == Reason.QUOTA
    assert log.reason(ConfigCas("l", 0, "")) == Reason.QUOTA
    assert log.reason(MemberJoin("n")) == Reason.QUOTA
    assert log.reason(LeaseGrant(1000)) == Reason.QUOTA
    assert isinstance(log.do(ConfigPut("k", "again")), Done)
    for delete in (ConfigDelete("k"), MemberLeave("m"), LeaseRevoke(3)):
        assert isinstance(log.do(delete), Done)
    assert log.state.row_bytes == 0


def test_bytes_are_limited_what_shrinks_passes(monkeypatch):
    log = Log()
    log.do(ConfigPut("k", "x" * 1000))
    log.do(MemberJoin("m", attributes={"a": "b" * 1000}))
    full = log.state.row_bytes
    limited(monkeypatch, STATE_BYTES_MAX=full - 500)
    for bad in (ConfigPut("k", "x" * 1001), ConfigPut("l", ""), MemberJoin("n"), LeaseGrant(1000)):
        assert log.reason(bad) == Reason.QUOTA
    assert isinstance(log.do(ConfigPut("k", "x" * 999)), Done)
    assert isinstance(log.do(MemberUpdate("m", attributes={"a": ""})), Done)
    assert isinstance(log.do(MemberUpdate("m", state="down")), Done)
    assert isinstance(log.do(ConfigDelete("k")), Done)


def test_tokens_are_limited_over_all_members(monkeypatch):
    limited(monkeypatch, TOKENS_MAX=40)
    log = Log()
    log.do(MemberJoin("a", weight=3))
    log.do(MemberJoin("b", tokens=tuple(range(10))))
    assert log.reason(MemberJoin("c")) == Reason.QUOTA
    assert log.reason(ConfigPut("ring/tokens_per_weight", "11")) == Reason.QUOTA
    assert isinstance(log.do(ConfigPut("ring/tokens_per_weight", "10")), Done)
    assert log.reason(MemberUpdate("a", weight=4)) == Reason.QUOTA
    limited(monkeypatch, TOKENS_MAX=5)
    assert isinstance(log.do(MemberUpdate("a", weight=2)), Done), "what shrinks passes"
    assert isinstance(log.do(ConfigPut("ring/tokens_per_weight", "1")), Done)
    assert log.reason(ConfigDelete("ring/tokens_per_weight")) == Reason.QUOTA, "8 is more than 1"


def test_members_on_one_lease_are_limited(monkeypatch):
    limited(monkeypatch, LEASE_MEMBERS_MAX=2)
    log = Log()
    log.do(LeaseGrant(1000))
    log.do(MemberJoin("a", lease=1))
    log.do(MemberJoin("b", lease=1))
    assert log.reason(MemberJoin("c", lease=1)) == Reason.QUOTA
    assert isinstance(log.do(MemberUpdate("a", lease=1)), Done), "it is on it already"


# --- bytes


ALL = [
    ConfigPut("k", "v"), ConfigDelete("k"), ConfigCas("k", 3, None), ConfigCas("k", 3, "v"),
    MemberJoin("m"), MemberJoin("m", "a", "z", 2, "down", {"x": "y"}, (1, 2), 3),
    MemberUpdate("m"), MemberUpdate("m", "", "z", 2, "up", {}, (), 0),
    MemberLeave("m"), LeaseGrant(1), LeaseRevoke(1), LeaseExpire(1),
]  # fmt: skip


GOLDEN = [
    "c1019301a16ba176",
    "c1019202a16b",
    "c1019403a16b03c0",
    "c1019403a16b03a176",
    "c1019904a16dc0c001a2757080c000",
    "c1019904a16da161a17a02a4646f776e81a178a17992010203",
    "c1019905a16dc0c0c0c0c0c0c0",
    "c1019905a16da0a17a02a27570809000",
    "c1019206a16d",
    "c101920701",
    "c101920801",
    "c101920901",
]


def test_the_bytes_of_commands_never_change():
    """A frozen encoding: journals of years ago must mean the same."""
    assert [encode_command(command).hex() for command in ALL] == GOLDEN


@pytest.mark.parametrize("command", ALL)
def test_commands_survive_their_bytes_and_every_cut_is_malformed(command):
    data = encode_command(command)
    assert decode_command(data) == command and why_inadmissible(data) == ""
    for length in range(len(data)):
        with pytest.raises(CommandError):
            decode_command(data[:length])


def test_there_is_one_encoding_of_a_command():
    """Otherwise what one version skips another may read: replicas would diverge."""
    array = msgspec.msgpack.encode
    for body in (
        array((1, "k", "v", "more")),
        array((4, "m")),
        b"\xdc\x00\x03" + array((1, "k", "v"))[1:],
        b"\x93\xcc\x01" + array((1, "k", "v"))[2:],
        array((1, "k", "v")) + b"\0",
        array((1, "k", "v", [[]])),
        b"\x94\x01\xa1k\xa1v" + b"\x91" * 100_000 + b"\x90",
        array((99, "k")),
        array((1, "k", 5)),
        array((1, "k", b"\xff")),
        b"\x93\x01\xa1k\xa1\xff",
    ):
        data = bytes((0xC1, LEVEL)) + body
        assert why_inadmissible(data) == "", "it is rejected in its slot"
        _, result, changes = apply(EMPTY, 1, data)
        result = decode_result(result)
        assert result.reason == Reason.MALFORMED and changes == ()
        assert result.detail == "no command of a level up to 1", "texts of libraries may differ"


def test_a_command_of_a_newer_level_stops_the_replica_and_no_gateway_admits_it():
    newer = bytes((0xC1, LEVEL + 1)) + b"whatever"
    with pytest.raises(TooOld, match="upgrade"):
        apply(EMPTY, 1, newer)
    assert "too old" in why_inadmissible(newer)
    assert describe_command(newer) == ("malformed", None)


def test_every_command_is_described():
    assert [describe_command(encode_command(command)) for command in ALL] == [
        ("config_put", "k"), ("config_delete", "k"), ("config_cas", "k"), ("config_cas", "k"),
        ("member_join", "m"), ("member_join", "m"), ("member_update", "m"), ("member_update", "m"),
        ("member_leave", "m"), ("lease_grant", None), ("lease_revoke", "1"), ("lease_expire", "1"),
    ]  # fmt: skip
    assert describe_command(b"garbage") == ("malformed", None)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 20), st.booleans())
def test_any_bytes_in_any_slot_change_nothing_or_are_commands(tail, tag, framed):
    data = bytes((0xC1, LEVEL, 0x90 + tag % 16, tag)) + tail if framed else tail
    if data[:1] == b"\xc1" and data[1:2] > bytes((LEVEL,)):
        return
    after, result, changes = apply(EMPTY, 1, data)
    if isinstance(decode_result(result), Rejected):
        assert changes == () and after == msgspec.structs.replace(EMPTY, slot=1)
    assert isinstance(answer(EMPTY, data), bytes)
    answer(EMPTY, data[2:])


def test_mutated_commands_never_raise():
    chance = random.Random(3)
    log = Log()
    for _ in range(5000):
        data = bytearray(encode_command(chance.choice(ALL)))
        for _ in range(chance.randrange(3)):
            data[chance.randrange(2, len(data))] = chance.randrange(256)
        log.state, result, _ = apply(log.state, log.state.slot + 1, bytes(data))
        decode_result(result)
        answer(log.state, bytes(data[2:]))
    check(log.state)


# --- against the state's own definition


def check(held):
    """Everything derived equals what the rows say; the bytes give the state back."""
    rows = [*held.leases.values(), *held.members.values(), *held.config.values()]
    assert list(held.keys) == sorted(held.config) and list(held.ids) == sorted(held.members)
    assert held.row_bytes == sum(map(row_bytes, rows)) <= commands.STATE_BYTES_MAX
    derived = [m for m in held.members.values() if m.tokens is None]
    assert held.weights == sum(m.weight for m in derived)
    assert held.given_tokens == sum(
        len(m.tokens) for m in held.members.values() if m.tokens is not None
    )
    on = {}
    for name in sorted(held.members):
        lease = held.members[name].lease
        if lease:
            assert lease in held.leases
            on.setdefault(lease, []).append(name)
    assert dict(held.held) == {lease: tuple(names) for lease, names in on.items()}
    data = b"".join(state_chunks(held))
    back = state_from(data)
    assert b"".join(state_chunks(back)) == data
    for field in ("slot", "config", "members", "leases", "held", "row_bytes", "weights"):
        assert getattr(back, field) == getattr(held, field), field
    again = state_of(held.slot, [decode_row(encode_row(row)) for row in rows])
    assert b"".join(state_chunks(again)) == data


names = st.sampled_from(["a", "b", "c", "ü", ""])
some_tokens = st.none() | st.sets(st.integers(0, 5), max_size=3).map(tuple)
some_attributes = st.dictionaries(st.sampled_from("xyz"), st.text(max_size=3), max_size=3)
leases = st.integers(-1, 12)
drawn_commands = st.one_of(
    st.builds(ConfigPut, names, st.text(max_size=5)),
    st.builds(ConfigDelete, names),
    st.builds(ConfigCas, names, st.integers(0, 12), st.none() | st.text(max_size=5)),
    st.builds(
        MemberJoin, names, st.none() | names, st.none() | names, st.integers(0, 3),
        st.sampled_from(["up", "down", "x"]), some_attributes, some_tokens, st.just(0) | leases,
    ),
    st.builds(
        MemberUpdate, names, st.none() | names, st.none() | names, st.none() | st.integers(0, 3),
        st.sampled_from([None, "up", "draining"]), st.none() | some_attributes, some_tokens,
        st.none() | leases,
    ),
    st.builds(MemberLeave, names),
    st.builds(LeaseGrant, st.sampled_from([50, 1000])),
    st.builds(LeaseRevoke, leases),
    st.builds(LeaseExpire, leases),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(drawn_commands, max_size=25))
def test_any_history_keeps_the_state_whole_and_its_changes_tell_all(history):
    log = Log()
    machine = MetadataMachine()
    tables = {"config": {}, "member": {}, "lease": {}}
    for command in history:
        result = log.do(command)
        assert decode_result(machine.apply(log.state.slot, encode_command(command))) == result
        assert machine.changes == log.changes
        assert bool(log.changes) == isinstance(result, Done)
        for change in log.changes:
            table = tables[change.kind]
            assert table.get(change.key) == change.old
            if change.new is None:
                del table[change.key]
            else:
                table[change.key] = change.new
        assert tables["config"] == dict(log.state.config)
        assert tables["member"] == dict(log.state.members)
        assert tables["lease"] == {str(name): row for name, row in log.state.leases.items()}
        if machine.state.members:
            assert list(machine.ring.ranges()) == list(ring_of(log.state).ranges())
    check(log.state)


# --- the whole state as bytes


def test_the_state_of_many_rows_survives_its_bytes_in_small_pieces():
    log = Log()
    for n in range(700):
        log.do(MemberJoin(f"m{n}"))
        log.do(ConfigPut(f"k{n}", "v" * 300))
    log.do(ConfigPut("large", "x" * 500_000))
    pieces = list(state_chunks(log.state))
    assert len(pieces) > 5 and sorted(map(len, pieces))[-2] < state.CHUNK_BYTES + 500
    check(log.state)


def test_damaged_state_bytes_raise_the_one_error():
    log = Log()
    log.do(LeaseGrant(1000))
    log.do(MemberJoin("m", lease=1))
    log.do(ConfigPut("k", "v"))
    data = b"".join(state_chunks(log.state))
    chance = random.Random(1)
    for length in range(len(data)):
        with_less = data[:length]
        try:
            state_from(with_less)
        except StateError:
            continue
        assert length in _seams(data), (
            "only whole pieces may be missing; the snapshot's digest tells"
        )
    for _ in range(3000):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(StateError):
            state_from(bytes(damaged))
    with pytest.raises(StateError, match="version 2"):
        state_from(b"\0\0\0\x03\x92\x02\x00")
    rows = list(log.state.members.values())
    with pytest.raises(StateError, match="twice"):
        state_of(1, [ConfigEntry("k", "v", 1)] * 2)
    with pytest.raises(StateError, match="lease 1"):
        state_of(1, rows)


def _seams(data):
    seams, at = set(), 0
    while at < len(data):
        at += 4 + int.from_bytes(data[at : at + 4], "big")
        seams.add(at)
    return seams


# --- questions


def test_lists_come_in_pages_in_order():
    log = Log()
    for n in range(25):
        log.do(ConfigPut(f"a/{n:02}", str(n)))
        log.do(MemberJoin(f"m{n:02}"))
        log.do(LeaseGrant(1000))
    log.do(ConfigPut("b", ""))
    log.do(ConfigPut("a", ""))
    got, after, pages = [], "", 0
    while True:
        page = log.ask(ConfigList("a/", after, 10))
        assert isinstance(page, ConfigPage)
        got += [entry.key for entry in page.entries]
        pages += 1
        if not page.more:
            break
        after = got[-1]
    assert got == [f"a/{n:02}" for n in range(25)] and pages == 3
    assert [e.key for e in log.ask(ConfigList()).entries][:2] == ["a", "a/00"]
    assert log.ask(ConfigList("zzz")) == ConfigPage((), False)
    members = log.ask(MemberList("m20", 3))
    assert isinstance(members, MemberPage) and members.more
    assert [member.id for member in members.members] == ["m21", "m22", "m23"]
    held = log.ask(LeaseList(70, 100))
    assert held == LeasePage((Lease(1000, 72), Lease(1000, 75)), False)
    assert len(log.ask(MemberList("", 0)).members) == 1, "a page is never empty while there is more"
    assert len(log.ask(MemberList("", 10**9)).members) == 25


def test_a_page_is_closed_by_bytes(monkeypatch):
    log = Log()
    for key in "abc":
        log.do(ConfigPut(key, "x" * 1000))
    limited(monkeypatch, PAGE_BYTES_MAX=1500)
    page = log.ask(ConfigList())
    assert [entry.key for entry in page.entries] == ["a"] and page.more


def test_single_rows_are_answered_or_none():
    log = Log()
    log.do(LeaseGrant(1000))
    log.do(MemberJoin("m"))
    assert log.ask(LeaseGet(1)) == Lease(1000, 1) and log.ask(LeaseGet(2)) is None
    assert log.ask(MemberGet("m")).id == "m" and log.ask(MemberGet("x")) is None
    assert log.ask(RingOwner("key")) == Placement("key", key_token("key"), ("m",))


def test_what_is_no_question_is_told_so():
    assert isinstance(decode_reply(answer(EMPTY, b"\xff")), Unreadable)


def test_the_machine_keeps_its_ring_up_to_date_and_drops_it_at_a_restore():
    machine = MetadataMachine()
    ask = encode_question(RingOwner("key"))
    assert decode_reply(machine.query(ask)).replicas == ()
    machine.apply(1, encode_command(MemberJoin("m")))
    assert decode_reply(machine.query(ask)).replicas == ("m",)
    machine.restore(b"".join(MetadataMachine().snapshot()))
    assert decode_reply(machine.query(ask)).replicas == ()
    with pytest.raises(StateError):
        machine.restore(b"nonsense")


def test_no_change_and_no_way_to_ask_derives_a_ring_that_need_not_be(monkeypatch):
    """A voter's loop applies and answers: of a large ring each derivation would stall it."""
    derived = []
    real_of, real_changes = state.ring_of, Ring.with_changes
    monkeypatch.setattr(state, "ring_of", lambda of: derived.append("whole") or real_of(of))
    monkeypatch.setattr(
        Ring,
        "with_changes",
        lambda self, changes: derived.append("changes") or real_changes(self, changes),
    )
    machine = MetadataMachine()
    machine.apply(1, encode_command(MemberJoin("m")))
    ask = encode_question(RingOwner("key"))
    machine.query(ask)
    assert derived == ["whole"]
    for slot in range(2, 12):
        machine.apply(slot, encode_command(ConfigPut(TOKENS_PER_WEIGHT_KEY, str(slot))))
        machine.apply(slot, encode_command(MemberUpdate("m", weight=slot)))
    machine.apply(12, encode_command(ConfigPut("app/key", "no business of the ring")))
    machine.query(encode_question(ConfigGet("k")))
    assert derived == ["whole"], "nobody asked for it since"
    otherwise = b"\xdc\x00" + bytes([ask[0] & 0x0F]) + ask[1:]  # the same, encoded at more length
    for each in (ask, otherwise, ask):
        assert decode_reply(machine.query(each)).replicas == ("m",)
    assert derived == ["whole", "changes"]
    machine.apply(12, encode_command(ConfigPut("app/key", "again")))
    machine.query(ask)
    assert derived == ["whole", "changes"], "it is as it was"
    for slot in range(12, 14 + state.RING_CHANGES_MAX):
        machine.apply(slot, encode_command(MemberUpdate("m", weight=slot % 3 + 1)))
    assert list(machine.ring.ranges()) == list(real_of(machine.state).ranges())
    assert derived == ["whole", "changes", "whole"]


# --- the recorded cluster


def test_the_recorded_cluster_applies_whole(google_trace):
    log = Log()
    changed = 0
    with gzip.open(google_trace, "rt") as file:
        for line in file:
            _, name, event, platform, cpus, memory = line.rstrip("\n").split(",")
            attributes = {"platform": platform, "cpus": cpus, "memory": memory}
            match event:
                case "0":
                    result = log.do(MemberJoin(name, attributes=attributes))
                case "1":
                    result = log.do(MemberLeave(name))
                case _:
                    result = log.do(MemberUpdate(name, attributes=attributes))
            assert isinstance(result, Done)
            changed += len(log.changes)
    assert (changed, len(log.state.members), log.state.slot) == (37_780, 12_486, 37_780)
    check(log.state)
