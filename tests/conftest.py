"""What all tests share: the event loop they run on and the recorded data they may read."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options: which worlds the simulation plays, and how many; the loop that coroutines run on."""
    group = parser.getgroup("simulation")
    group.addoption("--seed", type=int, default=0, help="first seed of the swarm")
    group.addoption("--runs", type=int, default=0, help="how many seeds (0: as the test says)")
    group = parser.getgroup("loop")
    group.addoption("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="event loop")


def pytest_configure() -> None:
    """A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Coroutines run on asyncio, plain or with uvloop, as the product does where there is one."""
    return "asyncio", {"use_uvloop": request.config.getoption("--loop") == "uvloop"}


def recorded_data(name: str) -> Path:
    """The recorded file ``name``. Skips only where no recorded data is kept at all: a data
    directory that lacks the file is a failure."""
    folder = Path(os.environ.get("TREX_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir() and "TREX_DATA_DIR" not in os.environ:
        pytest.skip(f"no recorded data: {folder} does not exist; set TREX_DATA_DIR")
    if not (folder / name).is_file():
        pytest.fail(f"the recorded data in {folder} lacks {name}")
    return folder / name


@pytest.fixture(scope="session")
def google_trace() -> Path:
    """Every machine event of one recorded cluster, 37,780 rows."""
    return recorded_data("google2011_machine_events.csv.gz")
