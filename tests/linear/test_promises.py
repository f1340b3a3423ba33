"""Each check of ``promises`` passes what is kept and says in words what is broken."""

from __future__ import annotations

import pytest

from listeners import Lagged, Progress, Reset, SlotChanges
from tests.linear import promises
from tests.linear.history import Op
from tests.linear.log import Log
from tests.linear.promises import Broken, Heard
from tests.linear.trial import check_locks
from tests.linear.workload import Held
from trex_core.messages import Ballot, Kind, Value, encode_value
from trex_core.metadata.commands import (
    Change,
    ConfigDelete,
    ConfigPut,
    LeaseGrant,
    LeaseRevoke,
    MemberJoin,
    encode_command,
)
from trex_core.state import FixedRun, chain_start

BALLOT = Ballot(0, 1, 1)


@pytest.fixture
def log():
    """2: a session, 3: x = 1, 4: y = 1, 5: x = 2, 6: a lease, 7 and 8: two members on it, 9: it
    ends, and both go; 10: y goes; 11: a no-op; 12: z = 1."""
    made = Log([chain_start(bytes(16))])
    commands = [
        ConfigPut("x", "1"),
        ConfigPut("y", "1"),
        ConfigPut("x", "2"),
        LeaseGrant(1000),
        MemberJoin("m", lease=6),
        MemberJoin("n", lease=6),
        LeaseRevoke(6),
        ConfigDelete("y"),
        None,
        ConfigPut("z", "1"),
    ]
    made.add(encode_value(Value(Kind.NOOP, BALLOT)))
    made.add(encode_value(Value(Kind.OPEN, BALLOT)))
    sequence = 0
    for command in commands:
        if command is None:
            made.add(encode_value(Value(Kind.NOOP, BALLOT)))
            continue
        sequence += 1
        body = encode_command(command)
        made.add(encode_value(Value(Kind.COMMAND, BALLOT, 0, 2, sequence, sequence, body)))
    return made


def put(key, value, slot, began=0.0, ended=1.0, outcome="done", client="a"):
    ended = None if outcome == "pending" else ended
    return Op(client, "put", key, began, value, ended=ended, outcome=outcome, slot=slot)


def get(key, read, slot, at, began=0.0, ended=1.0, level="linearizable", least=0):
    return Op(
        "g", "get", key, began, ended=ended, outcome="done", slot=slot, read=read,
        level=level, at=at, least=least,
    )  # fmt: skip


def test_the_log_is_what_its_values_make(log):
    assert log.last == 12
    assert sorted(log.changes) == [3, 4, 5, 6, 7, 8, 9, 10, 12]
    assert sorted(change.key for change in log.changes[9]) == ["6", "m", "n"]
    assert [log.at("x", slot) for slot in (2, 3, 5, 12)] == [
        (None, 0), ("1", 3), ("2", 5), ("2", 5),
    ]  # fmt: skip
    assert log.at("y", 9) == ("1", 4) and log.at("y", 10) == (None, 0)


# --- operations --------------------------------------------------------------------------------


def test_what_was_acknowledged_is_there_once(log):
    kept = [put("x", "1", 3), put("x", "2", 5), put("x", "3", -1, outcome="pending")]
    kept.append(Op("a", "delete", "y", 0, ended=1, outcome="done", slot=10))
    kept.append(put("x", "9", 5, outcome="refused"))
    promises.check_exactly_once(kept, log)
    for broken, words in (
        (put("x", "1", 4), "done, but slot 4"),
        (put("x", "7", 12), "done, but slot 12"),
        (put("x", "1", 99), "the log ends at 12"),
        (put("x", "1", 3, outcome="refused"), "in the log at 3 all the same"),
        (put("x", "1", -1, outcome="not_done"), "in the log at 3 all the same"),
        (Op("a", "delete", "x", 0, ended=1, outcome="done", slot=10), "done, but slot 10"),
    ):
        with pytest.raises(Broken, match=words):
            promises.check_exactly_once([broken], log)


def test_what_was_applied_twice_is_told(log):
    body = encode_command(ConfigPut("z", "1"))
    log.add(encode_value(Value(Kind.COMMAND, BALLOT, 0, 2, 10, 10, body)))
    assert log.changes[13]
    with pytest.raises(Broken, match="applied 2 times"):
        promises.check_exactly_once([put("z", "1", 12)], log)


def test_every_read_is_a_prefix(log):
    promises.check_prefixes([get("x", "1", 3, 4, level="local"), get("y", None, 0, 11)], log)
    for broken in (get("x", "2", 5, 4), get("x", "1", 4, 4), get("y", "1", 4, 10)):
        with pytest.raises(Broken, match="of the log there is"):
            promises.check_prefixes([broken], log)


def test_real_time_holds_across_keys():
    first = put("x", "1", 5, 0, 1)
    promises.check_real_time([first, put("y", "1", 6, 2, 3), get("z", None, 0, 6, 4, 5)])
    promises.check_real_time([first, get("z", None, 0, 3, 2, 3, "local")])
    with pytest.raises(Broken, match="written at or below"):
        promises.check_real_time([first, put("y", "1", 4, 2, 3)])
    with pytest.raises(Broken, match="written at or below"):
        promises.check_real_time([get("x", None, 0, 9, 0, 1, "local"), put("y", "1", 9, 2, 3)])
    with pytest.raises(Broken, match="read of the past"):
        promises.check_real_time([first, get("z", None, 0, 4, 2, 3)])
    with pytest.raises(Broken, match="below the slot it asked for"):
        promises.check_real_time([get("z", None, 0, 4, 2, 3, "one", 5)])


def test_a_clients_writes_keep_their_order(log):
    unknown = put("x", "1", -1, 0, 1, "pending")
    promises.check_sessions(
        [unknown, put("y", "1", 4, 2, 3), put("x", "2", 5, 0, 9, client="b")], log
    )
    with pytest.raises(Broken, match="changed places"):
        promises.check_sessions([put("y", "1", 4, 0, 1), unknown], log)
    with pytest.raises(Broken, match="changed places"):
        promises.check_sessions([put("x", "2", 5, 0, 1), put("y", "1", 4, 2, 3)], log)


def test_a_listener_never_goes_back():
    reads = [get("x", None, 0, at, n, n + 0.5, "one") for n, at in enumerate((3, 3, 7))]
    other = get("x", None, 0, 2, 9, 10, "two")
    promises.check_monotonic([*reads, other])
    with pytest.raises(Broken, match="one went back"):
        promises.check_monotonic([*reads, get("x", None, 0, 6, 9, 10, "one")])
    promises.check_monotonic([*reads, get("x", None, 0, 6, 2.2, 10, "one")])  # they overlap


def test_two_never_hold_the_lock():
    check_locks([Held("a", 3, 0, 1), Held("b", 5, 1, 2)])
    with pytest.raises(Broken, match="at once"):
        check_locks([Held("a", 3, 0, 1.1), Held("b", 5, 1, 2)])
    with pytest.raises(Broken, match="went back"):
        check_locks([Held("a", 5, 0, 1), Held("b", 3, 1, 2)])


# --- deliveries --------------------------------------------------------------------------------


def told(log, since=0):
    return [SlotChanges(slot, log.changes[slot]) for slot in sorted(log.changes) if slot > since]


def test_whole_deliveries_pass_from_any_slot(log):
    for since in (0, 4, 11):
        deliveries = [*told(log, since), Progress(12)]
        assert promises.check_deliveries(Heard("h", since, deliveries), log) == 12


def test_broken_deliveries_are_told(log):
    whole = told(log)
    for name, deliveries, words in (
        ("Ordered", [whole[1], whole[0]], "slot 4 came when 3 was due"),
        ("Unique", [*whole[:2], whole[1]], "out of order, or twice"),
        ("Reliable", [whole[0], *whole[2:]], "slot 5 came when 4 was due"),
        ("nothing more", [*whole, SlotChanges(13, whole[0].changes)], "nothing was due"),
        ("Atomic", [*whole[:6], SlotChanges(9, whole[6].changes[:1])], "in part"),
        ("torn in two", [*whole[:6], *[SlotChanges(9, (c,)) for c in whole[6].changes]], "in part"),
        ("Bookmarkable", [*whole[:2], Progress(5)], "a bookmark at 5 before slot 5 came"),
        ("a bookmark goes back", [*whole, Progress(11)], "a bookmark at 11 after slot 12"),
        ("Lagged", [Lagged(1, 3)], "lagged"),
    ):
        with pytest.raises(Broken, match=words):
            promises.check_deliveries(Heard(name, 0, deliveries), log)


def test_a_jump_is_the_exact_difference(log):
    def change(key, value, slot, old=None):
        entry = next(
            each.new for each in log.changes[slot] if each.new is not None and each.key == key
        )
        assert entry.value == value
        return Change("config", key, old, entry)

    rows = (change("x", "2", 5), change("y", "1", 4))
    jump = Reset(0, 5, rows)
    rest = told(log, 5)
    assert promises.check_deliveries(Heard("h", 0, [jump, *rest]), log) == 12
    for broken in (
        [Reset(0, 5, rows[:1]), *rest],
        [Reset(0, 5, (*rows, change("z", "1", 12))), *rest],
        [*told(log)[:2], Reset(3, 5, rows), *rest],
    ):
        with pytest.raises(Broken, match="jump"):
            promises.check_deliveries(Heard("h", 0, broken), log)


def test_runs_have_the_voters_chain_and_no_gap(log):
    def run(first, last, chains=None):
        return FixedRun(first, log.chains[first - 1], (b"",) * (last - first + 1),
                        tuple(chains or log.chains[first : last + 1]))  # fmt: skip

    def heard(*runs, jumps=()):
        one = Heard("h")
        for each in runs:
            one.delivered(each)
        one.jumps += jumps
        return one

    promises.check_runs(heard(run(1, 3), run(4, 12)), log)
    promises.check_runs(heard(run(1, 3), run(8, 12), jumps=[(3, 7)]), log)
    with pytest.raises(Broken, match="after slot 3 came 5"):
        promises.check_runs(heard(run(1, 3), run(5, 12)), log)
    with pytest.raises(Broken, match="after slot 4 came 4"):
        promises.check_runs(heard(run(1, 4), run(4, 12)), log)
    with pytest.raises(Broken, match="out of order"):
        promises.check_runs(heard(run(4, 12), run(1, 3)), log)
    with pytest.raises(Broken, match="another chain at slot 2"):
        promises.check_runs(heard(run(1, 3, [log.chains[1], bytes(32), log.chains[3]])), log)


def test_listeners_agree(log):
    whole = told(log)
    promises.check_same([Heard("a", 0, whole), Heard("b", 4, told(log, 4))])
    with pytest.raises(Broken, match="b and a differ at slot 3"):
        promises.check_same(
            [Heard("a", 0, whole), Heard("b", 0, [SlotChanges(3, whole[1].changes)])]
        )
