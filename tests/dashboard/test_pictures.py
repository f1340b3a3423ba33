"""Telling screens of recorded runs, kept as pictures: healthy, an election, voters lost, a lagging
listener; dark and light, small and large.

The replay is paused and times are UTC, so a run's picture is always the same.
"""

import time
from pathlib import Path

import anyio
import pytest

from dashboard.app import DashApp
from dashboard.feed import open_replay
from tests.dashboard.pictures import assert_picture

RECORDINGS = Path(__file__).parent / "recordings"


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    """Times of day are those of UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("name", "run", "at_ms", "size", "theme", "keys"),
    [
        ("healthy", "failover", 7_500, (120, 36), "textual-dark", ()),
        ("healthy-80-light", "failover", 7_500, (80, 24), "textual-light", ()),
        ("election", "failover", 8_250, (100, 30), "textual-dark", ()),
        ("two-lost-80", "quorum", 9_000, (80, 24), "textual-dark", ()),
        ("no-quorum", "quorum", 17_000, (120, 36), "textual-dark", ("tab", "p")),
        ("explain-80", "quorum", 17_000, (80, 24), "textual-dark", ("e",)),
        ("lagging", "lagging", 24_000, (120, 30), "textual-dark", ("2",)),
    ],
)
async def test_a_recorded_moment_looks_as_kept(tmp_path, name, run, at_ms, size, theme, keys):
    recording = RECORDINGS / f"{run}.trexrec.gz"
    app = DashApp(
        lambda: open_replay(recording, directory=tmp_path, speed=0, at_ms=at_ms), theme=theme
    )
    async with app.run_test(size=size) as pilot:
        with anyio.fail_after(30):
            while not app.view.voters or app.view.followed is None:
                await pilot.pause()
        app.fold()
        await pilot.press(*keys)
        app.fold()
        await pilot.pause()
        assert_picture(app, name)
