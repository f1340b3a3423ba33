"""The command ``trex-dash``: the dashboard at a terminal, live or of a recording.

This module alone is that process: its options, its terminal, its exit codes.

Exit codes: 0 done, 1 refused (configuration, name, group, recording), 2 usage, or no terminal,
3 disk, store, or a slot of a newer feature level.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from trex_core.cluster import ClusterConfig, ConfigError
from voters.config import ADMIN, credentials_folder, read_cluster

if TYPE_CHECKING:
    from dashboard.actions import Act
    from dashboard.feed import Feed

REFUSED: Final = 1
USAGE: Final = 2
BROKEN: Final = 3
MEMORY_MARGIN_BYTES: Final = 2 << 30
"""What the process may map beyond what it has at the start, in bytes: screen, state, queries."""
GC_OBJECTS: Final = 50_000
"""Young objects between two collections of garbage. What lives long is frozen at the start."""
HOST_CHARS_MAX: Final = 64
DRIVER_VARIABLE: Final = "TEXTUAL_DRIVER"
"""Set where something else than a terminal shows the screen: a browser (``textual-serve``)."""
DEFAULT_THEME: Final = "textual-dark"

app = typer.Typer(
    help="Ballots and leadership of a TRex cluster at a glance.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"trex-dash {version('trex-paxos')}")
        raise typer.Exit


@app.command()
def dash(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", envvar="TREX_CONFIG", help="The cluster file (default: cluster.toml)."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            envvar="TREX_DASH_NAME",
            help="Its name as a listener (default: dash-HOST-PID; with --dir: dash-HOST).",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            envvar="TREX_DASH_DIR",
            help="Keep its store here (default: a temporary place, removed at the end).",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record", envvar="TREX_DASH_RECORD", help="Write all that is heard to this new file."
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", envvar="TREX_DASH_REPLAY", help="Show this recording instead."),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            "--speed",
            envvar="TREX_DASH_SPEED",
            min=0,
            max=1000,
            help="Of a replay, times real time; 0: paused (default: 1).",
        ),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(
            "--at",
            envvar="TREX_DASH_AT",
            min=0,
            help="Begin a replay so many seconds after its start.",
        ),
    ] = None,
    credentials: Annotated[
        Path | None,
        typer.Option(
            "--credentials",
            envvar="TREX_CREDENTIALS",
            help="Folder of your certificate and keys (default: credentials/admin beside the "
            "cluster file).",
        ),
    ] = None,
    admin: Annotated[
        bool,
        typer.Option(
            "--admin",
            envvar="TREX_DASH_ADMIN",
            help="Allow actions: hand leadership over, take a snapshot.",
        ),
    ] = False,
    theme: Annotated[
        str,
        typer.Option(
            "--theme", envvar="TREX_DASH_THEME", help="Colours, such as textual-light or nord."
        ),
    ] = DEFAULT_THEME,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Show the cluster, as a listener that the voters do not notice, until q is pressed."""
    del version
    if replay is None and not (speed is None and at is None):
        _end(USAGE, "--speed and --at are of a replay: name a recording with --replay")
    if replay is not None and record is not None:
        _end(USAGE, "--record and --replay: a replay is recorded already")
    if replay is not None and admin:
        _end(USAGE, "--admin and --replay: nothing can be done in what is past")
    known = themes()
    if theme not in known:
        _end(USAGE, f"--theme {theme}: there are {', '.join(known)}")
    why = no_terminal()
    if why:
        _end(USAGE, why)
    from listeners.sql import use_frugal_allocators

    use_frugal_allocators()
    try:
        with _place(directory) as place:
            act: Act | None = None
            if replay is not None:
                opened = _replayed(replay, place, 1.0 if speed is None else speed, at or 0.0)
            else:
                cluster, base = read_cluster(config)
                folder = credentials_folder(base, credentials, ADMIN)
                called = name or default_name(kept=directory is not None)
                opened = _live(cluster, folder, called, place, record)
                act = performer(folder) if admin else None
            show(opened, act=act, theme=theme)
    except Exception as error:  # noqa: BLE001 - told in one line, or raised again as it is
        _end(*told(error))


# --- what the demo uses too -------------------------------------------------------------------


def no_terminal() -> str:
    """Why the dashboard cannot be shown here; "" if it can."""
    if os.environ.get(DRIVER_VARIABLE):
        return ""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return (
            "the dashboard needs a terminal for its keys (stdin) and its screen (stderr); without "
            "one, `trex doctor` and `trex status` tell the same in lines"
        )
    if os.environ.get("TERM", "dumb") == "dumb":
        return (
            f"the terminal says it can do nothing (TERM={os.environ.get('TERM', '')}): set TERM, "
            "or use `trex doctor` and `trex status`"
        )
    return ""


def themes() -> tuple[str, ...]:
    """The names that ``--theme`` takes."""
    from textual.theme import BUILTIN_THEMES

    return tuple(BUILTIN_THEMES)


def default_name(*, kept: bool) -> str:
    """The name of a dashboard as a listener: of this process, or one that a ``kept`` store can go
    by at the next start."""
    host = "".join(each for each in socket.gethostname() if each.isascii() and each.isprintable())
    name = f"dash-{host[:HOST_CHARS_MAX] or 'here'}"
    return name if kept else f"{name}-{os.getpid()}"


def show(
    opened: Callable[[], AbstractAsyncContextManager[Feed]],
    *,
    act: Act | None = None,
    theme: str = DEFAULT_THEME,
) -> None:
    """Show what ``opened`` feeds until the operator leaves. Raises what opening it raised.

    For a process that began with ``use_frugal_allocators``.
    """
    from dashboard.app import run

    # Nothing but the dashboard writes to its screen.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        run(lambda: _frugal(opened()), admin=act is not None, act=act, theme=theme)
    finally:
        gc.unfreeze()  # else DuckDB's objects outlive its module, and it complains


@asynccontextmanager
async def _frugal(opened: AbstractAsyncContextManager[Feed]) -> AsyncIterator[Feed]:
    """A feed in a process of its own: memory is bounded, garbage is rare."""
    from listeners.sql import contain_memory

    async with opened as feed:
        contain_memory(MEMORY_MARGIN_BYTES)
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_OBJECTS, 20, 50)
        yield feed


def told(error: BaseException) -> tuple[int, str]:
    """Exit code and line for what ended the dashboard; raises ``error`` if it is a bug."""
    from dashboard.recording import RecordingError
    from listeners.source import SourceError
    from listeners.store import StoreError
    from trex_core.machine import TooOld
    from trex_core.proof import ContradictionError

    match error:
        case ConfigError() | SourceError() | RecordingError():
            return REFUSED, (isinstance(error, OSError) and error.strerror) or str(error)
        case StoreError() | TooOld() | ContradictionError() | OSError():
            return BROKEN, str(error)
        case _:
            raise error


# --- which feed -------------------------------------------------------------------------------


def performer(credentials: Path) -> Act:
    """Performs an admin's actions with ``credentials``."""
    from dashboard.actions import perform

    return functools.partial(perform, credentials)


def _live(
    cluster: ClusterConfig, credentials: Path, name: str, place: Path, record: Path | None
) -> Callable[[], AbstractAsyncContextManager[Feed]]:
    from dashboard.feed import open_feed

    return lambda: open_feed(cluster, credentials, name=name, directory=place, record=record)


def _replayed(
    recording: Path, place: Path, speed: float, at_s: float
) -> Callable[[], AbstractAsyncContextManager[Feed]]:
    from dashboard.feed import open_replay

    at_ms = round(min(at_s, 1e12) * 1000)
    return lambda: open_replay(recording, directory=place, speed=speed, at_ms=at_ms)


@contextmanager
def _place(directory: Path | None) -> Iterator[Path]:
    """Where the store lies."""
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="trex-dash-", ignore_cleanup_errors=True) as place:
        yield Path(place)


def _end(code: int, text: str) -> NoReturn:
    typer.echo(f"trex-dash: {text}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    if sys.flags.optimize:
        sys.exit("trex-dash: refuses to run under python -O: its assertions are part of it")
    app(prog_name="trex-dash")
