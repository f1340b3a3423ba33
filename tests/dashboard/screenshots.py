"""The pictures of README and docs: screens of recorded runs of real clusters, as SVG.

``just screenshots`` makes them anew in ``docs/screenshots``.
"""

import os
import tempfile
import time
from pathlib import Path

import anyio

from dashboard.app import DashApp
from dashboard.feed import open_replay

HERE = Path(__file__).parent
PLACE = HERE.parent.parent / "docs" / "screenshots"
SCREENS = (
    ("overview", "failover", 12_000, (120, 34), ()),
    ("election", "failover", 8_300, (120, 34), ()),
    ("no-quorum", "quorum", 17_000, (120, 34), ()),
    ("explain", "failover", 12_000, (120, 34), ("down", "down", "down", "down", "e")),
    ("listeners", "lagging", 24_000, (120, 26), ("2",)),
    ("members", "failover", 20_000, (120, 34), ("3",)),
    ("sql", "failover", 20_000, (120, 30), ("4", "f2", "enter")),
)
"""(name, recording, milliseconds into it, size, keys pressed)"""


async def screen(
    name: str, run: str, at_ms: int, size: tuple[int, int], keys: tuple[str, ...], theme: str
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        recording = HERE / "recordings" / f"{run}.trexrec.gz"
        app = DashApp(
            lambda: open_replay(recording, directory=Path(scratch), speed=0, at_ms=at_ms),
            theme=theme,
        )
        async with app.run_test(size=size) as pilot:
            with anyio.fail_after(60):
                while not app.view.voters or app.view.followed is None:
                    await pilot.pause()
            app.fold()
            await pilot.press(*keys)
            for _ in range(20):  # an answer, a ring: worked out beside
                await pilot.pause(0.05)
            app.fold()
            await pilot.pause()
            PLACE.mkdir(parents=True, exist_ok=True)
            (PLACE / f"{name}.svg").write_text(app.export_screenshot(title="trex-dash"))
            print(PLACE / f"{name}.svg")


async def main() -> None:
    for name, run, at_ms, size, keys in SCREENS:
        await screen(name, run, at_ms, size, keys, "textual-dark")
    await screen("overview-light", "failover", 12_000, (80, 24), (), "textual-light")


if __name__ == "__main__":
    os.environ["TZ"] = "UTC"
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()
    time.tzset()
    anyio.run(main)
