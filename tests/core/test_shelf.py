"""The shelf alone: what is kept, how it is cut, and how little a request may cost."""

from __future__ import annotations

from collections import Counter

import pytest

from trex_core import shelf
from trex_core.shelf import RUN_VALUES_BYTES_MAX, Piece, Shelf
from trex_core.state import FixedRun, chain_run, chain_start

START = chain_start(bytes(16))


class Filled:
    """A shelf and what it was filled with, slot by slot."""

    def __init__(self, *sizes: int, rate: int = 1 << 20, slots_max=1000, bytes_max=1 << 20):
        self.counted: Counter[str] = Counter()
        self.shelf = Shelf(
            lambda name: self.counted.update([name]), rate, slots_max=slots_max, bytes_max=bytes_max
        )
        self.values: list[bytes] = []
        self.chains = [START]
        self.told: list[Piece] = []
        self.shelf.reset(0, START)
        self.add(*sizes)

    def add(self, *sizes: int) -> None:
        first = len(self.values) + 1
        values = tuple(bytes([(first + n) % 251]) * size for n, size in enumerate(sizes))
        if values:
            chains = chain_run(self.chains[-1], first, values)
            self.shelf.add(FixedRun(first, self.chains[-1], values, chains))
            self.values += values
            self.chains += chains

    def tell(self, piece: Piece) -> int:
        self.told.append(piece)
        return sum(map(len, piece.values))

    def right(self, piece: Piece | None) -> Piece:
        """``piece``, once it was compared with what was put there."""
        assert piece is not None
        first, count = piece.first, len(piece.values)
        assert piece.chain_before == self.chains[first - 1]
        assert piece.values == tuple(self.values[first - 1 : first - 1 + count])
        return piece


def test_what_is_put_on_it_is_found_again_whole_and_in_pieces():
    one = Filled(*[100] * 30)
    piece = one.right(one.shelf.cut(1, 30))
    assert sum(len(v) + 5 for v in piece.values) <= RUN_VALUES_BYTES_MAX
    assert sum(len(v) + 5 for v in piece.values) + 105 > RUN_VALUES_BYTES_MAX
    assert piece.after == len(piece.values) + 1
    assert len(one.right(one.shelf.cut(3, 4)).values) == 2
    assert len(one.right(one.shelf.cut(29, 99)).values) == 2, "no further than it holds"
    assert len(one.right(one.shelf.run(2, 30)).values) == 29
    assert one.shelf.chain == one.chains[30]


@pytest.mark.parametrize(("first", "last"), [(0, 3), (4, 3), (1, 31), (31, 31), (-1, -1)])
def test_what_it_does_not_hold_it_does_not_give(first, last):
    one = Filled(*[100] * 30)
    assert one.shelf.run(first, last) is None
    if not 1 <= first <= 30:
        assert one.shelf.cut(first, last) is None


def test_a_value_too_large_for_a_datagram_is_a_piece_without_values():
    one = Filled(10, 5000, 10)
    assert one.shelf.cut(2, 3) == Piece(2, one.chains[1], ())
    assert Piece(2, b"", ()).after == 3
    assert len(one.right(one.shelf.run(1, 3)).values) == 3, "but of a run, which is for TCP"


def test_the_oldest_go_by_bytes_and_by_slots():
    few = Filled(*[10] * 50, slots_max=20)
    assert (few.shelf.first, few.shelf.last) == (31, 50)
    assert few.shelf.cut(30, 31) is None and few.shelf.cut(31, 31) is not None
    small = Filled(*[10] * 50, bytes_max=105)
    assert (small.shelf.first, small.shelf.last) == (41, 50)
    none = Filled(200, bytes_max=100)
    assert (none.shelf.first, none.shelf.last) == (2, 1)
    none.add(10)
    none.right(none.shelf.run(2, 2))


def test_after_a_reset_it_begins_anew():
    one = Filled(*[10] * 5)
    one.shelf.request(1, 5)
    one.shelf.reset(100, b"c" * 32)
    assert (one.shelf.first, one.shelf.last, one.shelf.chain) == (101, 100, b"c" * 32)
    assert not one.shelf.waiting and one.shelf.cut(5, 5) is None


def test_how_far_a_chunk_reaches():
    one = Filled(100, 200, 300, 400)
    reach = one.shelf.last_within
    assert [reach(1, 10, limit) for limit in (1, 299, 300, 599, 600, 5000)] == [1, 1, 2, 2, 3, 4]
    assert [reach(1, slots, 5000) for slots in (1, 2, 3, 9)] == [1, 2, 3, 4]
    assert reach(4, 10, 5000) == 4


def test_a_repair_says_all_that_was_asked_for_once():
    one = Filled(*[500] * 10)
    one.shelf.request(3, 6)
    one.shelf.repair(1.0, one.tell)
    assert [n for piece in one.told for n in range(piece.first, piece.after)] == [3, 4, 5, 6]
    for piece in one.told:
        one.right(piece)
    assert not one.shelf.waiting
    one.told.clear()
    one.shelf.request(5, 8)
    one.shelf.repair(1.0 + shelf.REPAIR_LINGER_S / 2, one.tell)
    assert [n for piece in one.told for n in range(piece.first, piece.after)] == [7, 8]
    one.told.clear()
    one.shelf.request(5, 5)
    one.shelf.repair(2.0, one.tell)
    assert [piece.first for piece in one.told] == [5]
    one.shelf.repair(3.0, one.tell)
    assert len(one.told) == 1, "nothing waits"


def test_what_may_wait_and_what_one_request_may_ask_is_bounded(monkeypatch):
    monkeypatch.setattr(shelf, "REPAIR_RANGES_MAX", 3)
    monkeypatch.setattr(shelf, "REPAIR_SLOTS_MAX", 4)
    one = Filled(*[10] * 50)
    for first, last in ((1, 50), (1, 50), (10, 11), (20, 21), (30, 31), (60, 70), (9, 8)):
        one.shelf.request(first, last)
    assert one.counted == {
        "repair.taken": 3, "repair.repeated": 1, "repair.queue_full": 1, "repair.not_held": 2,
    }  # fmt: skip
    one.shelf.repair(1.0, one.tell)
    assert {n for p in one.told for n in range(p.first, p.after)} == {1, 2, 3, 4, 10, 11, 20, 21}


def test_the_cap_is_kept_and_made_up_for_with_time():
    one = Filled(*[1000] * 200, rate=10_000)
    one.shelf.request(1, 200)
    now = 100.0
    one.shelf.repair(now, one.tell)
    first = len(one.told)
    assert one.counted["repair.capped"] == 1 and first < shelf.REPAIR_DATAGRAMS_PER_TURN
    for _ in range(200):
        now += 0.05
        one.shelf.repair(now, one.tell)
    told = sum(len(v) for p in one.told for v in p.values)
    assert 0.8 * 100_000 < told <= 100_000 + 2 * 1400


def test_what_a_value_too_large_costs_is_nothing_of_the_cap():
    one = Filled(*[5000] * 30, rate=1)
    one.shelf.request(1, 30)
    for turn in range(5):
        one.shelf.repair(1.0 + turn, one.tell)
    assert len(one.told) == 30 and one.counted["repair.sent"] == 0


def test_a_range_that_went_while_it_waited_is_let_go():
    one = Filled(*[10] * 5, slots_max=5)
    one.shelf.request(1, 5)
    one.add(*[10] * 3)
    one.shelf.repair(1.0, one.tell)
    assert [n for p in one.told for n in range(p.first, p.after)] == [4, 5]
