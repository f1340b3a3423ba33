"""What "settled" means to a pilot here: nothing queued, nothing left to lay out or to draw.

Textual's own pilot takes a process that uses no CPU for 20 ms for one that has nothing to do; on
a loaded machine it may merely not have been given a core, and a test then looks at a screen that
is half laid out.
"""

import asyncio

import pytest
from textual.pilot import Pilot

PASSES_MAX = 1000
PASS_S = 0.005


def _settled(app) -> bool:
    screen = app.screen
    if (
        screen._layout_required
        or screen._scroll_required
        or screen._repaint_required
        or screen._recompose_required
        or screen._dirty_widgets
        or screen._callbacks
    ):
        return False
    pumps = [app, *screen.walk_children(with_self=True)]
    return all(
        not pump._next_callbacks and (pump._message_queue is None or pump._message_queue.empty())
        for pump in pumps
    )


@pytest.fixture(autouse=True)
def pilots_wait_until_settled(monkeypatch):
    """``Pilot.pause``, ``press`` and ``click`` end when the screen shows what they led to."""
    wait_for_messages = Pilot._wait_for_screen

    async def wait(pilot, timeout=30.0):
        done = await wait_for_messages(pilot, timeout)
        for _ in range(PASSES_MAX):
            if pilot.app._exit or not pilot.app.screen_stack or _settled(pilot.app):
                break
            await asyncio.sleep(PASS_S)
            done = await wait_for_messages(pilot, timeout)
        return done

    monkeypatch.setattr(Pilot, "_wait_for_screen", wait)
