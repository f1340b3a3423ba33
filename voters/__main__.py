"""The command ``trex-voter``: formats a voter's journal, runs it, looks into it, checks it.

Exit codes: 0 done, 1 refused (configuration, port), 2 usage, 3 disk, journal or invariant.
"""

from __future__ import annotations

import gc
import logging
import resource
import signal
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import anyio
import typer

from trex_core.access import voter_name
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.machine import TooOld
from voters.config import (
    StartError,
    VoterFailedError,
    VoterPaths,
    credentials_folder,
    read_cluster,
    voter_paths,
)
from voters.journal import (
    JournalError,
    JournalFailedError,
    Survey,
    format_journal,
    segment_name,
    verify,
)
from voters.logs import LOG, JsonLines, TextLines, log
from voters.server import open_voter

REFUSED: Final = 1
BROKEN: Final = 3
GC_OBJECTS: Final = 50_000
"""Young objects between two collections of garbage. What lives long is frozen at the start."""

app = typer.Typer(
    help="One voter of a TRex cluster.", no_args_is_help=True, pretty_exceptions_enable=False
)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", envvar="TREX_CONFIG", help="The cluster file (default: cluster.toml)."
    ),
]
Id = Annotated[
    int,
    typer.Option(
        "--id", envvar="TREX_VOTER_ID", min=1, max=65535, help="Which voter of the cluster file."
    ),
]


Credentials = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="TREX_CREDENTIALS",
        help="Folder of the voter's certificate and keys (default: credentials/voter-N beside the "
        "cluster file).",
    ),
]


def _end(code: int, text: str) -> NoReturn:
    typer.echo(f"trex-voter: {text}", err=True)
    raise typer.Exit(code)


def _found(config: Path | None, voter: int) -> tuple[ClusterConfig, VoterPaths, Path]:
    try:
        cluster, base = read_cluster(config)
        return cluster, voter_paths(cluster, voter, base), base
    except ConfigError as error:
        _end(REFUSED, str(error))


@app.command("format")
def format_(voter: Id, config: Config = None) -> None:
    """Make the first journal of a new voter. Once in its life: a replaced disk is no new voter."""
    cluster, paths, _ = _found(config, voter)
    try:
        incarnation = format_journal(paths.journal, cluster.cluster_id_bytes, voter)
        paths.snapshots.mkdir(parents=True, exist_ok=True)
    except (JournalError, OSError) as error:
        _end(BROKEN, str(error))
    typer.echo(f"voter {voter}: formatted {paths.journal}, incarnation {incarnation:016x}")


@app.command()
def run(voter: Id, config: Config = None, credentials: Credentials = None) -> None:
    """Run a voter until SIGTERM or Ctrl-C; a leader hands leadership over first."""
    cluster, paths, base = _found(config, voter)
    folder = credentials_folder(base, credentials, voter_name(voter))
    _log_to_stderr()
    _take_files()
    try:
        options = {"use_uvloop": _has_uvloop()}
        anyio.run(_run, cluster, voter, paths, folder, backend_options=options)
    except (StartError, ConfigError) as error:
        _end(REFUSED, str(error))
    except (JournalError, JournalFailedError, VoterFailedError, TooOld, OSError) as error:
        _end(BROKEN, str(error))


@app.command()
def inspect(voter: Id, config: Config = None) -> None:
    """Print what the journal of a voter holds. Changes nothing, and needs no lock."""
    cluster, paths, _ = _found(config, voter)
    try:
        found = verify(paths.journal, cluster.cluster_id_bytes, voter)
    except (JournalError, OSError) as error:
        _end(BROKEN, str(error))
    who = found.identity
    typer.echo(f"voter {who.sender}, incarnation {who.incarnation:016x}, boot {who.boot}")
    for segment in found.segments:
        header = segment.header
        typer.echo(
            f"segment {segment.number}: {segment.end} bytes used of {segment.size_bytes}, "
            f"promised {header.promised}, fixed {header.fixed}, chain {header.chain.hex()[:16]}, "
            f"slots below up to {header.last_slot}"
        )
    _tell_cut(found, paths)


@app.command("verify")
def verify_(voter: Id, config: Config = None) -> None:
    """Read the whole journal of a voter and say whether it is sound."""
    cluster, paths, _ = _found(config, voter)
    try:
        found = verify(paths.journal, cluster.cluster_id_bytes, voter)
    except (JournalError, OSError) as error:
        _end(BROKEN, str(error))
    segments = len(found.segments)
    typer.echo(f"voter {voter}: {segments} segment{'s' if segments != 1 else ''}, sound")
    _tell_cut(found, paths)


def _tell_cut(found: Survey, paths: VoterPaths) -> None:
    if found.cut is not None:
        typer.echo(
            f"{paths.journal / segment_name(found.cut.number)} at byte {found.cut.offset}: a torn "
            f"write of {found.cut.size_bytes} bytes; the next start cuts it"
        )


async def _run(cluster: ClusterConfig, voter: int, paths: VoterPaths, folder: Path) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_voter(
            cluster, voter, paths.directory, credentials=folder, journal_directory=paths.journal
        ):
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_OBJECTS, 20, 50)
            async for number in signals:
                log(logging.INFO, "voter.stop.asked", voter=voter, signal=number.name)
                break


def _take_files() -> None:
    """Have as many files open as this process may: 1,024, which is usual, are fewer than clients'
    connections alone can be, and without one the journal goes no further."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _has_uvloop() -> bool:
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True


def _log_to_stderr() -> None:
    """JSON lines, or Rich when somebody watches."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(TextLines())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def main() -> None:
    """Entry point of the console script."""
    if sys.flags.optimize:
        sys.exit("trex-voter: refuses to run under python -O: its assertions are part of it")
    app(prog_name="trex-voter")


if __name__ == "__main__":
    main()
