"""Recorded clusters replayed as real commands: this module alone turns a trace into them.

Exactly once, whatever is interrupted when: the rows of a file are the commands of one session, and
**the row number is the sequence**. Which session it is stands in the configuration key
``import/<first 16 hex digits of the sha256 of the uncompressed file>``, written by compare-and-set,
so that two starts at once agree. So progress *is* the session's next sequence, replicated:

======================================  ============================================================
interrupted ...                         and started again
======================================  ============================================================
after the session was opened, before    another session is opened; the first one, unused, expires
its key was written
with rows in flight                     the session says which row it expects next; those in flight
                                        that arrive later, or again, get their first result
after the last row                      the key says ``done``, and the session is closed
======================================  ============================================================

A session can expire, but only when SESSIONS_MAX others were used after it; then nobody knows the
progress any more, and the import refuses to guess. Source of the format: ``ClusterData2011_2``.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BufferedReader
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from trex_core.cluster import ClusterConfig
from trex_core.metadata.commands import (
    Command,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    encode_command,
)
from voters.client import Client, connect, done
from voters.driver import (
    Compacted,
    Driver,
    OutcomeUnknown,
    Rejected,
    Ticket,
    TrexError,
    open_driver,
)

FORMATS: Final = ("google-machine-events",)
LINE_BYTES_MAX: Final = 4096
"""A longer line is malformed."""
COLUMNS: Final = 6
ADD, REMOVE, UPDATE = "0", "1", "2"
DONE: Final = "done"

_NUMBER: Final = re.compile(r"(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_MACHINE: Final = re.compile(r"[0-9]{1,20}")

Told: TypeAlias = Callable[[int, int], None]
"""Told of progress: (rows acknowledged, rows of the file)."""


class ImportRefusedError(Exception):
    """The import stopped and will stop there again; the message names the line and the reason."""


class ImportStoppedError(Exception):
    """The import stopped for want of a quorum; started again, it goes on where it was."""


class Imported(msgspec.Struct, frozen=True):
    """What came of an import: rows of the file, the first row sent by this run, a slot by which
    all of them are applied, and the session's key."""

    rows: int
    first_row: int
    last_slot: int
    key: str


class Source(msgspec.Struct, frozen=True):
    """A trace file: its path, the sha256 of its uncompressed bytes, and how many rows it has."""

    path: Path
    sha256: str
    rows: int

    @property
    def key(self) -> str:
        """The configuration key of its import."""
        return f"import/{self.sha256[:16]}"


def _opened(path: Path) -> BufferedReader | gzip.GzipFile:
    """The uncompressed bytes of ``path``, whatever its name ends with."""
    file = path.open("rb")
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        return file
    file.close()
    return gzip.open(path, "rb")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, LINE_BYTES_MAX + 1 bytes of them at most. Raises ImportRefusedError."""
    number = 0
    try:
        with closing(_opened(path)) as file:
            while line := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ImportRefusedError(f"{path}: damaged after line {number}: {error}") from error
    except OSError as error:
        raise ImportRefusedError(f"{path}: cannot be read: {error.strerror or error}") from error


def examine(path: Path) -> Source:
    """Read a file once, for its digest and its number of rows. Raises ImportRefusedError."""
    digest, rows, line = hashlib.sha256(), 0, b""
    for line in _lines(path):
        digest.update(line)
        rows += line.endswith(b"\n")
    if line and not line.endswith(b"\n"):
        rows += 1
    return Source(path, digest.hexdigest(), rows)


def row_command(line: bytes) -> Command:
    """The command that one line stands for. Raises ``ValueError`` saying what is wrong with it."""
    if len(line) > LINE_BYTES_MAX:
        raise ValueError(f"longer than {LINE_BYTES_MAX} bytes")
    text = line.decode("ascii").removesuffix("\n").removesuffix("\r")
    fields = text.split(",")
    if len(fields) != COLUMNS:
        raise ValueError(f"{len(fields)} columns instead of {COLUMNS}")
    time, machine, event, platform, cpus, memory = fields
    if not time.isdigit():
        raise ValueError(f"time {time!r} is no number of microseconds")
    if not _MACHINE.fullmatch(machine):
        raise ValueError(f"machine id {machine!r} is no number")
    for name, value in (("cpus", cpus), ("memory", memory)):
        if value and not _NUMBER.fullmatch(value):
            raise ValueError(f"{name} {value!r} is no number")
    attributes = {"platform": platform, "cpus": cpus, "memory": memory}
    match event:
        case "0":
            return MemberJoin(machine, attributes=attributes)
        case "1":
            return MemberLeave(machine)
        case "2":
            return MemberUpdate(machine, attributes=attributes)
        case _:
            raise ValueError(f"event type {event!r} is none of 0 (ADD), 1 (REMOVE), 2 (UPDATE)")


def commands(source: Source, first_row: int) -> Iterator[tuple[int, bytes]]:
    """(row, encoded command) from ``first_row`` on. Raises ImportRefusedError naming the line."""
    for row, line in enumerate(_lines(source.path), 1):
        if row >= first_row:
            try:
                command = row_command(line)
            except ValueError as error:
                why = "not ASCII text" if isinstance(error, UnicodeDecodeError) else error
                raise ImportRefusedError(
                    f"{source.path}, line {row}: {why}; the {row - 1} rows before it are imported, "
                    "none after it"
                ) from error
            yield row, encode_command(command)


async def _settle(driver: Driver, row: int, ticket: Ticket) -> int:
    """Wait until a row is acknowledged; its slot, 0 if another import of the file knows it."""
    try:
        return done(await driver.finish(ticket)).slot
    except Compacted:
        return 0
    except Rejected as error:
        raise ImportRefusedError(
            f"row {row} was rejected by the cluster: {error}; rows in flight behind it are "
            "imported, and the same command goes on after them"
        ) from error


async def _session(client: Client, source: Source) -> tuple[int, int, int]:
    """(session, slot of the key that names it, next row); session 0: all is done."""
    while True:
        entry = await client.get(source.key)
        if entry is None:
            session = await client.driver.open_session()
            try:
                await client.cas(source.key, 0, str(session))
            except Rejected as error:
                await client.driver.close_session(session)
                if error.reason != "cas_failed":
                    raise
            except OutcomeUnknown as error:
                await client.resolve(error)
            continue
        if entry.value.startswith(DONE):
            return 0, entry.slot, source.rows + 1
        if not entry.value.isdigit():
            raise ImportRefusedError(
                f"the key {source.key} does not hold a session but {entry.value[:40]!r}; "
                "if no import of this file matters, `trex config delete` it"
            )
        session = int(entry.value)
        row = await client.driver.next_sequence(session)
        if row:
            return session, entry.slot, row
        again = await client.get(source.key)
        if again is not None and again.slot == entry.slot:
            raise ImportRefusedError(
                f"the session {session} of this import has expired, so its progress is unknown; "
                f"to begin at row 1, remove its members and `trex config delete {source.key}`"
            )


async def import_file(
    cluster: ClusterConfig,
    credentials: Path,
    source: Source,
    *,
    in_flight_max: int,
    deadline_s: float,
    told: Told,
) -> Imported:
    """Import what is not imported yet of ``source``, ``in_flight_max`` rows at a time.

    ``deadline_s`` is how long a row may go unacknowledged. Raises ImportRefusedError for a
    malformed or rejected row (the rows before it are imported) and ImportStoppedError.
    """
    row = 0
    try:
        async with connect(cluster, credentials, deadline_s=deadline_s) as client:
            session, key_slot, first_row = await _session(client, source)
            if session == 0:
                told(source.rows, source.rows)
                return Imported(source.rows, first_row, key_slot, source.key)
            row = first_row - 1
            last_slot = 0

            def acknowledged(slot: int) -> None:
                nonlocal row, last_slot
                row += 1
                last_slot = max(last_slot, slot)
                told(row, source.rows)

            told(row, source.rows)
            async with open_driver(
                cluster,
                credentials,
                deadline_s=deadline_s,
                in_flight_max=in_flight_max,
                session=session,
                next_sequence=first_row,
            ) as driver:
                flying: deque[tuple[int, Ticket]] = deque()
                failure: ImportRefusedError | None = None
                try:
                    for number, command in commands(source, first_row):
                        flying.append((number, await driver.begin(command)))
                        while flying and flying[0][1].done.is_set():
                            acknowledged(await _settle(driver, *flying.popleft()))
                except ImportRefusedError as error:
                    failure = error
                while flying:
                    try:
                        acknowledged(await _settle(driver, *flying.popleft()))
                    except ImportRefusedError as error:
                        failure = failure or error
                if failure is not None:
                    raise failure
            try:
                last_slot = (await client.cas(source.key, key_slot, f"{DONE} {source.rows}")).slot
            except Rejected as error:
                if error.reason != "cas_failed":  # another import of the file was first
                    raise
            await client.driver.close_session(session)
            return Imported(source.rows, first_row, last_slot, source.key)
    except TrexError as error:
        raise ImportStoppedError(
            f"stopped with {row} of {source.rows} rows acknowledged: {error}. The same command "
            "goes on from there, without repeating or losing a row"
        ) from error
