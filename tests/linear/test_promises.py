"""Each check of ``promises`` passes what is kept and says in words what is broken."""

from __future__ import annotations

from contextlib import asynccontextmanager

import msgspec
import pytest

from listeners import Lagged, Progress, Reset, SlotChanges
from tests.linear import promises
from tests.linear.history import Op
from tests.linear.log import Log, LogReader
from tests.linear.promises import Broken, Heard
from tests.linear.trial import check_locks
from tests.linear.workload import Held
from trex_core.messages import (
    Ballot,
    CatchupEntries,
    Genesis,
    Kind,
    SignedTip,
    SnapshotOffer,
    Value,
    encode_value,
)
from trex_core.metadata.commands import (
    Change,
    ConfigDelete,
    ConfigPut,
    LeaseGrant,
    LeaseRevoke,
    MemberJoin,
    encode_command,
)
from trex_core.snapshot import decode_snapshot
from trex_core.state import FixedRun, chain_start

BALLOT = Ballot(0, 1, 1)
GENESIS = Genesis((1, 2), (101, 102))


@pytest.fixture
def log():
    """1: genesis, 2: a session, 3: x = 1, 4: y = 1, 5: x = 2, 6: a lease, 7 and 8: two members on
    it, 9: it ends, and both go; 10: y goes; 11: a no-op; 12: z = 1."""
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
    genesis = msgspec.msgpack.encode(GENESIS)
    made.add(encode_value(Value(Kind.GENESIS, BALLOT, command=genesis)))
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


def difference(log, first, last):
    """By other means than the check's: of the states, not of the steps."""
    before, after = log.states[first][0].config, log.states[last][0].config
    return tuple(
        Change("config", key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    )


def test_a_jump_is_the_exact_difference(log):
    rows = difference(log, 0, 5)
    assert [row.key for row in rows] == ["x", "y"]
    rest = told(log, 5)
    first = told(log)[:1]
    for good in (
        [Reset(0, 5, rows), *rest],
        [*first, Reset(3, 5, difference(log, 3, 5)), *rest],
        [Reset(0, 5, rows), Reset(5, 12, difference(log, 5, 12))],
        [*told(log)[:-1], Reset(11, 12, difference(log, 11, 12))],  # 11 changed nothing
        [*told(log)[:-1], Reset(10, 11, ()), *told(log)[-1:]],
    ):
        heard = Heard("h", 0, good)
        assert promises.check_deliveries(heard, log) == 12
    for lie, broken, words in (
        ("its end: too late", [Reset(0, 6, rows), *told(log, 6)], "is not the difference"),
        ("its end: too soon", [Reset(0, 4, rows), *told(log, 4)], "is not the difference"),
        ("its end: beyond the log", [Reset(0, 13, difference(log, 0, 12))], "log ends at 12"),
        ("a key is lost", [Reset(0, 5, rows[:1]), *rest], "is not the difference"),
        ("a key too many", [Reset(0, 5, (*rows, *difference(log, 11, 12)))], "not the difference"),
        ("a key twice", [Reset(0, 5, (*rows, rows[0])), *rest], "is not the difference"),
        ("a slot again after it", [Reset(0, 5, rows), *told(log, 4)], "slot 5 after 5"),
        ("a slot again in it", [*told(log)[:3], Reset(4, 6, ())], "from 4, standing at 5"),
        ("all again", [*told(log)[:3], Reset(0, 5, rows), *rest], "from 0, standing at 5"),
        ("a slot left out before it", [*first, Reset(4, 5, rows[:1])], "from 4, standing at 3"),
        ("it goes nowhere", [*told(log)[:3], Reset(5, 5, ()), *rest], "from 5 to 5"),
        ("it goes back", [*told(log)[:3], Reset(5, 4, ()), *rest], "from 5 to 4"),
    ):
        with pytest.raises(Broken, match=words):
            promises.check_deliveries(Heard(lie, 0, broken), log)


def test_after_a_jump_the_listener_holds_what_the_log_makes(log):
    def jumped(*jumps, captured=None, resets=None):
        heard = Heard("h")
        for first, last in jumps:
            heard.capture = lambda last=last: captured or log.capture(last)
            heard.jumped(first, last)
            heard.deliveries.append(Reset(first, last, difference(log, first, last)))
        if resets is not None:
            heard.deliveries = [Reset(first, last, ()) for first, last in resets]
        return heard

    assert decode_snapshot(log.capture(12)).slot == 12
    promises.check_jumps(jumped((0, 5), (9, 11)), log)
    for broken, words in (
        (jumped((0, 5), captured=log.capture(4)), "another state"),
        (jumped((0, 10), captured=log.capture(11)), "another state"),  # but for the chain, the same
        (jumped((0, 10), resets=[(0, 11)]), "it jumped .*, and told"),
        (jumped((0, 10), resets=[]), "it jumped .*, and told"),
        (jumped((0, 10), resets=[(0, 10), (0, 10)]), "it jumped .*, and told"),
        (jumped(resets=[(0, 10)]), "it jumped .*, and told"),
        (jumped((7, 7)), "from 7 to 7"),
        (jumped((7, 5)), "from 7 to 5"),
    ):
        with pytest.raises(Broken, match=words):
            promises.check_jumps(broken, log)


class Archive(LogReader):
    """What it asks one voter, that keeps ``log`` after slot ``cut`` only and may lie, answers."""

    def __init__(self, log, cut, *, snapshot=b"", chain=b"", value=b""):
        self.log = Log(log.chains[:1])
        for data in log.raw:
            self.log.add(data)
        self.kept, self.cut, self.lies = log, cut, (snapshot, chain, value)

    @asynccontextmanager
    async def _asking(self):
        yield self

    async def entries(self, voter, first):
        _, chain, value = self.lies
        log, tip = self.kept, SignedTip(12, self.kept.chains[12], BALLOT, voter, b"")
        if first <= self.cut:
            return SnapshotOffer(self.cut, log.chains[self.cut], 1, b"", voter, b"")
        values = tuple(log.raw[first - 1 :])
        values = (*values[:-1], value or values[-1])
        return CatchupEntries(first, chain or log.chains[first - 1], values, tip, tip)

    async def snapshot(self, offer, _voters):
        return self.lies[0] or self.kept.capture(offer.slot)


async def test_voters_keep_the_same_log_as_far_as_it_reaches(log):
    assert await Archive(log, 0).compare((1, 2), 12) == 0
    assert await Archive(log, 7).compare((1, 2), 12) == 2
    for broken, words in (
        (Archive(log, 7, snapshot=log.capture(6)), "its snapshot at 7 is not the log's"),
        (Archive(log, 7, chain=bytes(32)), "slot 8"),
        (Archive(log, 7, value=log.raw[4]), "differs at slot 12"),
    ):
        with pytest.raises(AssertionError, match=words):
            await broken.compare((1, 2), 12)


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
