"""The ring against a twin that is too dumb to be wrong: built whole, walked entry by entry."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trex_core.metadata import ordered, ring
from trex_core.metadata.commands import Change, ConfigEntry, Member
from trex_core.metadata.ordered import NOTHING, Ordered
from trex_core.metadata.ring import (
    EMPTY_RING,
    TOKEN_MAX,
    Move,
    Range,
    Ring,
    derived_tokens,
    key_token,
    member_tokens,
    moves,
)


def member(name, zone=None, weight=1, state="up", tokens=None, slot=1):
    return Member(name, None, zone, weight, state, {}, tokens, 0, slot, slot)


def change(old, new):
    return Change("member", (new or old).id, old, new)


def setting(key, value):
    return Change("config", key, None, None if value is None else ConfigEntry(key, value, 9))


# --- the dumb twin


def dumb_replicas(members, token, factor, spread, per_weight):
    entries = sorted(
        (t, m.id, m.zone)
        for m in members
        if m.state in ("up", "down")
        for t in member_tokens(m, per_weight)
    )
    start = next((i for i, e in enumerate(entries) if e[0] >= token), 0)
    walk = entries[start:] + entries[:start]
    zone_of = {name: (zone if zone is not None else ("alone", name)) for _, name, zone in entries}
    members_wanted = min(factor, len(zone_of))
    zones_wanted = min(factor, len(set(zone_of.values()))) if spread == "zone" else 0
    names, looked = [], 0
    while len(names) < members_wanted or (
        len({zone_of[n] for n in names}) < zones_wanted and looked < ring.SPREAD_TOKENS_MAX
    ):
        if walk[looked][1] not in names:
            names.append(walk[looked][1])
        looked += 1
    if spread != "zone":
        return tuple(names[:members_wanted])
    firsts = [n for i, n in enumerate(names) if zone_of[n] not in {zone_of[m] for m in names[:i]}]
    others = [n for n in names if n not in firsts]
    return tuple((firsts + others)[:members_wanted])


def dumb_ranges(members, factor=3, spread="zone", per_weight=8):
    ends = sorted(
        {t for m in members if m.state in ("up", "down") for t in member_tokens(m, per_weight)}
        | {TOKEN_MAX}
    )
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        Range(start, end, dumb_replicas(members, end, factor, spread, per_weight))
        for start, end in zip(starts, ends, strict=True)
    ]


def dumb_moves(before, after):
    """Cell by cell between all boundaries of both."""
    bounds = sorted({r.start for r in before} | {r.start for r in after})
    found = []
    for start, following in zip(bounds, [*bounds[1:], TOKEN_MAX + 1], strict=True):
        old = next(r.replicas for r in before if r.start <= start <= r.end)
        new = next(r.replicas for r in after if r.start <= start <= r.end)
        if set(old) == set(new):
            continue
        if found and (found[-1].end + 1, found[-1].before, found[-1].after) == (start, old, new):
            found[-1] = Move(found[-1].start, following - 1, old, new)
        else:
            found.append(Move(start, following - 1, old, new))
    return found


# --- tokens


def test_known_answers_of_token_derivation():
    assert derived_tokens("node-1", 10) == (
        8765792066685279409,
        10922733630215222372,
        16145414609086691524,
        8720089508777368572,
        5198255947037878832,
        9204341982094476920,
        9644250348001475091,
        3770506647800240163,
        1263336388223658289,
        5862304062419812650,
    )
    assert derived_tokens("ü", 1) == (3135022784825507222,)
    assert key_token("users/42") == key_token(b"users/42") == 1838210493429604300


def test_weight_only_adds_tokens():
    light, heavy = (member_tokens(member("a", weight=w)) for w in (1, 3))
    assert len(light) == 8 and len(heavy) == 24 and heavy[:8] == light


# --- reading


def test_an_empty_ring_is_one_range_held_by_nobody():
    assert list(EMPTY_RING.ranges()) == [Range(0, TOKEN_MAX, ())]
    assert EMPTY_RING.owner("k") is None and EMPTY_RING.replicas("k") == ()


def test_joining_and_draining_own_nothing_up_and_down_do():
    states = ("joining", "up", "draining", "down")
    held = Ring.of(member(state, state=state) for state in states)
    assert {name for row in held.ranges() for name in row.replicas} == {"up", "down"}


def test_a_key_belongs_to_the_first_token_at_or_above_its_own_and_wraps():
    held = Ring.of([member("a", tokens=(100,)), member("b", tokens=(200,))], 1)
    assert [held.replicas_at(t) for t in (0, 100, 101, 200, 201, TOKEN_MAX)] == [
        ("a",), ("a",), ("b",), ("b",), ("a",), ("a",),
    ]  # fmt: skip
    assert list(held.ranges()) == [
        Range(0, 100, ("a",)), Range(101, 200, ("b",)), Range(201, TOKEN_MAX, ("a",)),
    ]  # fmt: skip


def test_replicas_lie_in_different_zones_and_fill_up_from_the_same_when_there_are_too_few():
    members = [
        member("a1", "a", tokens=(10,)), member("a2", "a", tokens=(20,)),
        member("a3", "a", tokens=(30,)), member("b1", "b", tokens=(40,)),
    ]  # fmt: skip
    assert Ring.of(members, 2).replicas_at(0) == ("a1", "b1")
    assert Ring.of(members, 3).replicas_at(0) == ("a1", "b1", "a2")
    assert Ring.of(members, 3, "none").replicas_at(0) == ("a1", "a2", "a3")


def test_a_zone_far_away_is_not_looked_for_beyond_the_limit():
    near = [member("a1", "a", tokens=tuple(range(200))), member("a2", "a", tokens=(300,))]
    far = member("b", "b", tokens=(1000,))
    held = Ring.of([*near, far], 2)
    assert held.replicas_at(0) == ("a1", "a2")
    assert held.replicas_at(100) == ("a1", "b")


@pytest.mark.parametrize(
    "bad", [{"replication_factor": 0}, {"replication_factor": 17}, {"spread": "x"},
            {"tokens_per_weight": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        Ring.of([], **bad)


# --- changing


def test_a_change_that_moves_nothing_writes_nothing():
    one = member("a")
    held = Ring.of([one])
    after, delta = held.updated(
        [change(one, msgspec.structs.replace(one, attributes={"x": "y"}, updated_slot=7))]
    )
    assert delta == ring.NO_DELTA and list(after.ranges()) == list(held.ranges())


@pytest.mark.parametrize("members", [0, 1, 3, 200])
def test_each_range_is_found_by_its_end_and_by_its_tokens(members):
    held = Ring.of([member(f"n{n}") for n in range(members)])
    rows = list(held.ranges())
    ends = {row.end for row in rows}
    for row in rows:
        assert held.range_ending(row.end) == row
        assert held.range_end(row.start) == held.range_end(row.end) == row.end
        if row.start not in ends:
            assert held.range_ending(row.start) is None


def test_what_is_no_change_of_the_ring_changes_nothing():
    held = Ring.of([member("a")])
    others = [
        change(member("b"), None),  # it was never there
        Change("config", "app/x", None, ConfigEntry("app/x", "1", 9)),
        Change("lease", "7", None, None),
    ]
    assert held.updated(others) == (held, ring.NO_DELTA)


def test_a_key_that_is_no_setting_changes_none():
    default, entry = ring.DEFAULT_SETTINGS, ConfigEntry("k", "9", 9)
    for key in ("app/x", "ring/unknown", "ring/"):
        assert ring.with_setting(default, key, entry) is default
    assert ring.with_setting(default, "ring/replication_factor", entry).replication_factor == 9


def test_the_default_settings_come_back_when_a_setting_is_deleted():
    members = [member(name) for name in "abcd"]
    one, _ = Ring.of(members).updated([setting("ring/replication_factor", "1")])
    assert len(one.replicas("k")) == 1
    back, _ = one.updated([setting("ring/replication_factor", None)])
    assert list(back.ranges()) == list(Ring.of(members).ranges())


zones = st.sampled_from([None, "a", "b", "c"])
small_tokens = st.one_of(
    st.integers(0, 12), st.sampled_from([TOKEN_MAX, TOKEN_MAX - 1]), st.integers(0, TOKEN_MAX)
)
tokens = st.one_of(
    st.none(), st.sets(small_tokens, min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))
)
members_drawn = st.builds(
    member,
    name=st.sampled_from("abcdefghij"),
    zone=zones,
    weight=st.integers(1, 2),
    state=st.sampled_from(["up", "up", "up", "down", "joining", "draining"]),
    tokens=tokens,
)
edits = st.one_of(
    members_drawn,
    members_drawn,
    members_drawn,
    st.sampled_from("abcdefghij"),
    st.tuples(st.just("ring/replication_factor"), st.sampled_from(["1", "2", "3", "5", None])),
    st.tuples(st.just("ring/spread"), st.sampled_from(["zone", "none", None])),
    st.tuples(st.just("ring/tokens_per_weight"), st.sampled_from(["1", "2", None])),
)
DEFAULTS = {"replication_factor": "3", "spread": "zone", "tokens_per_weight": "8"}


@pytest.mark.parametrize("share", [0, 8])
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(edits, min_size=1, max_size=3), max_size=8))
@example(
    [[member(n, tokens=(at,)) for at, n in enumerate("abcd")], [member("e", tokens=(3,))], ["d"]]
)
@example(
    [
        [
            ("ring/replication_factor", "5"),
            *(member(n, tokens=(at,)) for at, n in enumerate("abcd")),
        ],
        [member("b", tokens=(9,))],
    ]
)
@example(
    [[member("a")], [("ring/spread", "none")], [("ring/tokens_per_weight", "1")], ["a"], ["a"]]
)
def test_incremental_ring_equals_the_dumb_twin(monkeypatch, share, batches):
    monkeypatch.setattr(ring, "TOUCHED_SHARE", share)  # 0: never compare the whole ring for size
    live: dict[str, Member] = {}
    knobs = dict(DEFAULTS)
    held = EMPTY_RING
    rows = {TOKEN_MAX: Range(0, TOKEN_MAX, ())}
    for batch in batches:
        changes = []
        for edit in batch:
            match edit:
                case Member():
                    changes.append(change(live.get(edit.id), edit))
                    live[edit.id] = edit
                case str():
                    if edit in live:
                        changes.append(change(live.pop(edit), None))
                case (key, value):
                    changes.append(setting(key, value))
                    name = key.removeprefix("ring/")
                    knobs[name] = DEFAULTS[name] if value is None else value
        before_rows = [rows[end] for end in sorted(rows)]
        before = held
        held, delta = held.updated(changes)
        for end in delta.removed:
            del rows[end]
        assert all(rows.get(row.end) != row for row in delta.put), "an equal row was written"
        rows.update({row.end: row for row in delta.put})
        expected = dumb_ranges(
            live.values(),
            int(knobs["replication_factor"]),
            knobs["spread"],
            int(knobs["tokens_per_weight"]),
        )
        assert [rows[end] for end in sorted(rows)] == expected
        assert list(held.ranges()) == expected
        assert list(before.with_changes(changes).ranges()) == expected
        found = moves(before, held, delta.put)
        assert list(found) == dumb_moves(before_rows, expected)
        assert found == moves(before, held)
        for row in expected:
            assert held.replicas_at(row.start) == held.replicas_at(row.end) == row.replicas
        assert held.members == sum(m.state in ("up", "down") for m in live.values())


@pytest.mark.parametrize("zone_count", [0, 1, 2, 5])
def test_incremental_equals_built_whole_in_a_ring_of_many_chunks(zone_count):
    chance = random.Random(zone_count)
    live = {}

    def one(n):
        return member(f"m{n}", f"z{chance.randrange(zone_count)}" if zone_count else None)

    for n in range(300):
        live[f"m{n}"] = one(n)
    held = Ring.of(live.values())
    rows = {row.end: row for row in held.ranges()}
    assert len(rows) == 2401
    for n in range(300, 340):
        leaver = chance.choice(sorted(live))
        joiner = one(n)
        changes = [change(live.pop(leaver), None), change(None, joiner)][:: chance.choice([1, -1])]
        live[joiner.id] = joiner
        held, delta = held.updated(changes[:1] if n % 2 else changes)
        if n % 2:
            rows = {e: r for e, r in rows.items() if e not in delta.removed}
            rows.update((row.end, row) for row in delta.put)
            held, delta = held.updated(changes[1:])
        rows = {e: r for e, r in rows.items() if e not in delta.removed}
        rows.update((row.end, row) for row in delta.put)
        assert len(delta.put) < 2000
    whole = Ring.of(live.values())
    assert [rows[end] for end in sorted(rows)] == list(whole.ranges()) == list(held.ranges())


def test_a_join_moves_only_to_the_joiner_and_a_leave_only_from_the_leaver():
    members = [member(f"m{n}") for n in range(50)]
    before = Ring.of(members)
    joiner = member("new")
    after, delta = before.updated([change(None, joiner)])
    moved = moves(before, after, delta.put)
    assert moved and all(m.gained == ("new",) and len(m.lost) == 1 for m in moved)
    back, delta = after.updated([change(joiner, None)])
    assert all(m.lost == ("new",) for m in moves(after, back, delta.put))
    assert list(back.ranges()) == list(before.ranges())


# --- the persistent sequence under it


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 60), max_size=20)), max_size=20))
def test_ordered_equals_a_sorted_set(steps):
    small, fill = ordered.CHUNK_MAX, ordered.CHUNK_FILL
    ordered.CHUNK_MAX, ordered.CHUNK_FILL = 4, 3
    try:
        held: Ordered[int] = NOTHING
        twin: set[int] = set()
        for adding, items in steps:
            before, was = held, sorted(twin)
            if adding:
                held = held.edited((), items - twin)
                twin |= items
            else:
                held = held.edited(items & twin, ())
                twin -= items
            assert list(held) == sorted(twin) == list(Ordered.of(sorted(twin)))
            assert len(held) == len(twin) and all(0 < len(c) <= 4 for c in held.chunks)
            assert list(before) == was, "an old sequence was changed"
            for item in (0, 30, 60):
                assert list(held.since(item)) == [i for i in sorted(twin) if i >= item]
    finally:
        ordered.CHUNK_MAX, ordered.CHUNK_FILL = small, fill


def test_ordered_refuses_to_remove_what_is_missing_or_add_what_is_there():
    held = Ordered.of([1, 2])
    with pytest.raises(KeyError):
        held.edited((3,), ())
    with pytest.raises(KeyError):
        held.edited((), (2,))
