"""The command ``trex-listener``: follows a cluster into a store, and answers SQL on it.

This module alone is that process: it reads the cluster file, turns signals into a clean stop, logs,
and writes ``status.json`` beside the store.

Exit codes: 0 done, 1 refused (configuration, name, directory, group), 2 usage, 3 store, or a slot
of a newer feature level.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import anyio
import msgspec
import typer

from listeners.blocking import has_uvloop
from listeners.listener import Listener, open_listener
from listeners.source import SourceError
from listeners.sql import SqlError, contain_memory, use_frugal_allocators
from trex_core.cluster import ClusterConfig, ConfigError, parse_cluster
from trex_core.credentials import FOLDER
from trex_core.machine import TooOld
from trex_core.proof import ContradictionError

REFUSED: Final = 1
BROKEN: Final = 3
ROLE: Final = "listener"
"""Whose credentials it has if no others are named."""
STATUS_FILE: Final = "status.json"
MEMORY_MARGIN_BYTES: Final = 2 << 30
"""What the process may map beyond what it has at the start, in bytes: state, store and queries."""
GC_OBJECTS: Final = 50_000
"""Young objects between two collections of garbage. What lives long is frozen at the start."""

_log = logging.getLogger("trex.listener")

app = typer.Typer(
    help="A listener of a TRex cluster.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _callback() -> None:
    """Keeps ``run`` a command of its own while it is the only one."""


@app.command()
def run(
    name: Annotated[
        str,
        typer.Option("--name", envvar="TREX_LISTENER_NAME", help="Its name; the store keeps it."),
    ],
    directory: Annotated[
        Path,
        typer.Option(
            "--dir",
            envvar="TREX_LISTENER_DIR",
            help="Its directory: store, SQL socket and status; made if missing, mode 0700.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", envvar="TREX_CONFIG", help="The cluster file (default: cluster.toml)."
        ),
    ] = None,
    credentials: Annotated[
        Path | None,
        typer.Option(
            "--credentials",
            envvar="TREX_CREDENTIALS",
            help="Folder of its certificate and keys (default: credentials/listener beside the "
            "cluster file).",
        ),
    ] = None,
    status_interval: Annotated[
        float,
        typer.Option(
            "--status-interval",
            envvar="TREX_LISTENER_STATUS_INTERVAL",
            min=0,
            help="Seconds between two writes of status.json; 0: only at the end.",
        ),
    ] = 1.0,
) -> None:
    """Follow the cluster until SIGTERM or Ctrl-C; what is applied by then is stored."""
    _log_to_stderr()
    use_frugal_allocators()
    try:
        cluster, base = _read_cluster(config)
        anyio.run(
            _run,
            cluster,
            credentials or base / FOLDER / ROLE,
            name,
            directory,
            status_interval,
            backend_options={"use_uvloop": has_uvloop()},
        )
    except BaseExceptionGroup as group:
        _end(_only(group))
    except Exception as error:  # noqa: BLE001 - told in one line, or raised again as it is
        _end(error)


def _end(error: BaseException) -> NoReturn:
    """End the process with one clear line and the exit code of ``error``."""
    from listeners.store import StoreError  # not before it is known which allocator duckdb gets

    match error:
        case ConfigError() | SourceError() | SqlError():
            code = REFUSED
        case StoreError() | TooOld() | ContradictionError() | OSError():
            code = BROKEN
        case _:
            raise error
    typer.echo(f"trex-listener: {error}", err=True)
    raise typer.Exit(code)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception in a group, or the group if there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _read_cluster(path: Path | None) -> tuple[ClusterConfig, Path]:
    file = path or Path("cluster.toml")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the cluster file {file}: {error.strerror}; name it with --config or "
            "TREX_CONFIG, or make one with `trex init`"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8") from error
    return parse_cluster(text, str(file)), file.resolve().parent


async def _run(
    cluster: ClusterConfig, credentials: Path, name: str, directory: Path, status_interval_s: float
) -> None:
    try:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with open_listener(
                cluster, credentials, name=name, directory=directory
            ) as listener:
                contain_memory(MEMORY_MARGIN_BYTES)
                gc.collect()
                gc.freeze()
                gc.set_threshold(GC_OBJECTS, 20, 50)
                async with anyio.create_task_group() as tasks:
                    socket = await tasks.start(listener.serve_sql)
                    _say("listener.started", name=name, applied=listener.applied, sql=str(socket))
                    if status_interval_s:
                        tasks.start_soon(_tell_status, listener, directory, status_interval_s)
                    async for number in signals:
                        _say("listener.stop.asked", name=name, signal=number.name)
                        break
                    tasks.cancel_scope.cancel()
            _write_status(listener, directory)
            _say("listener.stopped", **msgspec.to_builtins(listener.status))
    finally:
        gc.unfreeze()  # else DuckDB's objects outlive its module, and it complains


async def _tell_status(listener: Listener, directory: Path, interval_s: float) -> None:
    while True:
        _write_status(listener, directory)
        await anyio.sleep(interval_s)


def _write_status(listener: Listener, directory: Path) -> None:
    """Replace ``status.json`` by where the listener is now. It is a courtesy, so a full disk is
    the store's to complain about."""
    beside = directory / f"{STATUS_FILE}.new"
    try:
        beside.write_bytes(msgspec.json.encode(listener.status) + b"\n")
        beside.replace(directory / STATUS_FILE)
    except OSError as error:
        _log.warning("listener.status.failed", extra={"trex_fields": {"reason": str(error)}})


# --- logging --------------------------------------------------------------------------------


def _say(event: str, **fields: object) -> None:
    _log.info(event, extra={"trex_fields": fields})


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "trex_fields", {})
    return fields if isinstance(fields, dict) else {}


class _JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _TextLines(logging.Formatter):
    """``event key=value ...`` for people."""

    def format(self, record: logging.LogRecord) -> str:
        words = [record.getMessage()]
        words += [f"{key}={value}" for key, value in _fields(record).items()]
        return " ".join(words)


def _log_to_stderr() -> None:
    """JSON lines, or Rich when somebody watches."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(_TextLines())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonLines())
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False


def main() -> None:
    """Entry point of the console script."""
    if sys.flags.optimize:
        sys.exit("trex-listener: refuses to run under python -O: its assertions are part of it")
    app(prog_name="trex-listener")


if __name__ == "__main__":
    main()
