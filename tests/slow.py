"""A loop that has more to do than what is tested."""

from __future__ import annotations

import asyncio

TURN_S = 0.05


class SlowTurns:
    """The running loop, but each time it is asked what time it is, TURN_S went by: to what it
    calls, each of its turns seems to take at least so long."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._now_s = self._loop.time()

    def time(self):
        self._now_s += TURN_S
        return self._now_s

    def __getattr__(self, name):
        return getattr(self._loop, name)
