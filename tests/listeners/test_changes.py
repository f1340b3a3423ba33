"""The window of recent changes: who waits is woken, and who goes leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest

from listeners.changes import Progress, Window
from listeners.changes import Subscription as Subscribed
from tests.voters.here import SOON_S

pytestmark = pytest.mark.anyio


def bookmarks(window):
    return Subscribed(window, window.applied, kind=None, prefix="", progress=True)


async def waiting(window, count):
    """Tasks of ``count`` subscribers that have read all there is."""
    tasks = []
    for _ in range(count):
        subscription = bookmarks(window)
        assert await anext(subscription) == Progress(window.applied)
        tasks.append(asyncio.ensure_future(anext(subscription)))
    async with asyncio.timeout(SOON_S):
        while len(window._waiting) < count:
            await asyncio.sleep(0)
    return tasks


async def test_all_who_wait_are_woken_by_one_advance():
    window = Window(5)
    tasks = await waiting(window, 10)
    window.advance(6, 6)
    window.advance(7, 7)  # before any of them ran
    async with asyncio.timeout(SOON_S):
        assert await asyncio.gather(*tasks) == [Progress(7)] * 10
    assert not window._waiting


async def test_who_is_cancelled_leaves_nothing_and_disturbs_nobody():
    window = Window(5)
    gone, woken, stays = await waiting(window, 3)
    gone.cancel()
    window.advance(6, 6)  # while it is being cancelled
    woken.cancel()  # and one when it was woken already
    async with asyncio.timeout(SOON_S):
        assert await stays == Progress(6)
        for task in (gone, woken):
            with pytest.raises(asyncio.CancelledError):
                await task
    assert not window._waiting
    (again,) = await waiting(window, 1)
    window.advance(7, 7)
    async with asyncio.timeout(SOON_S):
        assert await again == Progress(7)


@pytest.mark.parametrize("failure", [None, OSError("gone")], ids=["closed", "failed"])
async def test_who_waits_when_it_ends_is_told(failure):
    window = Window(5)
    tasks = await waiting(window, 3)
    window.close(failure)
    window.close(None)  # again: nothing
    async with asyncio.timeout(SOON_S):
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(end is failure or isinstance(end, StopAsyncIteration) for end in ends)
    assert not window._waiting
