"""Telling screens of recorded runs, kept as pictures: healthy, an election, voters lost, a lagging
listener; dark and light, small and large.

The replay is paused and times are UTC, so a run's picture is always the same.  What a view means is
told here, not by ``advice``: its words have tests of their own.
"""

import time
from pathlib import Path

import anyio
import pytest

from dashboard import advice
from dashboard.advice import Finding, Verdict
from dashboard.app import DashApp
from dashboard.feed import open_replay
from tests.dashboard.pictures import assert_picture

RECORDINGS = Path(__file__).parent / "recordings"
HEALTHY = Verdict(
    "ok", "healthy", "healthy: voter 5 leads since ballot 0.1.5, can lose 2 more", 5, 2
)
ELECTION = Verdict("bad", "no leader", "no leader: voter 5 is silent, voter 2 asks who leads", 0, 1)
LOST = Verdict(
    "warn", "degraded", "degraded: voter 3 leads since ballot 0.2.3, can lose no more", 3, 0
)
NO_QUORUM = Verdict(
    "bad", "no quorum", "no quorum: 3 of 5 voters are silent; nothing can be written", 0, 0
)
DEAD = (1, 2, 4)


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    """Times of day are those of UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("name", "run", "at_ms", "size", "theme", "keys", "verdict", "silent"),
    [
        ("healthy", "failover", 7_500, (120, 36), "textual-dark", (), HEALTHY, ()),
        ("healthy-80-light", "failover", 7_500, (80, 24), "textual-light", (), HEALTHY, ()),
        ("election", "failover", 8_250, (100, 30), "textual-dark", (), ELECTION, (5,)),
        ("two-lost-80", "quorum", 9_000, (80, 24), "textual-dark", (), LOST, (1, 4)),
        (
            "no-quorum",
            "quorum",
            17_000,
            (120, 36),
            "textual-dark",
            ("tab", "p"),
            NO_QUORUM,
            DEAD,
        ),
        ("lagging", "lagging", 24_000, (120, 30), "textual-dark", ("2",), HEALTHY, ()),
    ],
)
async def test_a_recorded_moment_looks_as_kept(
    monkeypatch, tmp_path, name, run, at_ms, size, theme, keys, verdict, silent
):
    found = tuple(Finding("warn", "voter_silent", f"voter {each}", "is silent") for each in silent)
    monkeypatch.setattr(advice, "verdict", lambda _: verdict)
    monkeypatch.setattr(advice, "findings", lambda _: found)
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
