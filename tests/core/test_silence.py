"""One datagram is read alone where there is one, and never while more come than are read."""

from __future__ import annotations

import random

import pytest

from trex_core.silence import ALONE_MAX, ALONE_S, Silence

ROOM = 64


class Socket:
    """What waits in the kernel, and how it is read."""

    def __init__(self):
        self.waiting = self.asked_in_vain = self.reads = 0
        self.now_s = 100.0
        self._silence = Silence()

    def turn(self, came, took_s):
        """``came`` datagrams arrived in the ``took_s`` since the last turn."""
        self.waiting += came
        self.now_s += took_s
        if not self.waiting:
            return  # the poll says nothing
        self.reads += 1
        room = self._silence.room(self.now_s, ROOM)
        assert room in (1, ROOM)
        taken = min(self.waiting, room)
        self.waiting -= taken
        self.asked_in_vain += taken < room
        self._silence.taken(taken)


def test_in_a_quiet_cluster_few_datagrams_cost_a_second_look():
    sock = Socket()
    for _ in range(1000):
        sock.turn(1, 2 * ALONE_S)
    assert sock.reads == 1000
    assert sock.asked_in_vain <= 1000 // ALONE_MAX


def test_in_a_burst_all_that_waits_is_read_at_once():
    sock = Socket()
    sock.turn(20, 1.0)
    assert sock.waiting == 19, "the first, after a silence"
    sock.turn(0, ALONE_S / 10)
    assert sock.waiting == 0


@pytest.mark.parametrize("seed", range(20))
def test_in_turns_that_take_long_nothing_is_left_behind_for_long(seed):
    draw = random.Random(seed)
    sock = Socket()
    load = 1
    behind = 0
    for turn in range(2000):
        if turn % 50 == 0:
            load = draw.choice((0, 1, 2, 10, 40))
        sock.turn(draw.randrange(load + 1), draw.choice((2, 5, 50)) * ALONE_S)
        behind = behind + 1 if sock.waiting else 0
        assert behind <= ALONE_MAX + 1 + ALONE_MAX * 40 // (ROOM - 40), turn
    assert sock.reads > 500


def test_a_read_that_was_cut_short_is_not_taken_for_silence():
    silence = Silence()
    now_s = 100.0
    for _ in range(ALONE_MAX):
        assert silence.room(now_s, ROOM) == 1
        silence.taken(1)
        now_s += 1.0
    assert silence.room(now_s, 2) == 2, "it is asked whether there is another"
    silence.taken(2)
    assert silence.room(now_s + 1.0, ROOM) == ROOM
    silence.taken(1)
    assert silence.room(now_s + 2.0, ROOM) == 1
