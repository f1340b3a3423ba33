"""A slice of the flood; all of it is ``python -m tests.adversary --datagrams 1000000``."""

from __future__ import annotations

from tests.adversary.arena import open_arena
from tests.adversary.hostile import KINDS

DATAGRAMS = 20_000


async def test_of_a_flood_nothing_is_taken_and_each_datagram_is_counted(tmp_path):
    async with open_arena(tmp_path, 1) as arena:
        before = len(arena.acknowledged)
        await arena.flood(DATAGRAMS)
        assert len(arena.acknowledged) > before, "commits go on"
    assert arena.sent.keys() == KINDS.keys()
    assert arena.sent.total() == DATAGRAMS
    print(arena.totals, len(arena.acknowledged) - before)
