"""Every call to the system that a voter's files need fails once, in turn: the journal ends in clear
words, nothing is acknowledged that is not durable, and a restart has what was acknowledged."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import voters.journal
from tests.voters.test_journal import (
    BALLOT,
    CLUSTER,
    VOTER,
    Writer,
    fold,
    value,
    wait_for_spare,
)
from tests.voters.test_snapshots import pieces
from trex_core.messages import NO_BALLOT, Ballot
from trex_core.state import AcceptRecord, PromiseRecord, Record, State, first_state
from voters.journal import (
    SECTOR_BYTES,
    Disk,
    Journal,
    JournalError,
    JournalFailedError,
    format_journal,
    segment_name,
    segment_numbers,
    verify,
)
from voters.snapshots import Snapshots

SEGMENT_BYTES = 4096
SHORT = "short"
"""Stands for an error number: the write is cut in half and says so."""
FAULTS: dict[str, list[tuple[int | str, bool]]] = {
    "open": [(errno.EIO, False), (errno.EMFILE, False)],
    "pwrite": [(errno.EIO, False), (errno.ENOSPC, False), (errno.EINTR, True), (SHORT, False)],
    "fdatasync": [(errno.EIO, False), (errno.EIO, True), (errno.EINTR, False)],
    "fsync": [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False)],
    "posix_fallocate": [(errno.ENOSPC, False), (errno.EIO, True)],
    "ftruncate": [(errno.EIO, False), (errno.EIO, True)],
    "rename": [(errno.EIO, False), (errno.EIO, True)],
    "unlink": [(errno.EIO, False), (errno.EIO, True)],
    "iterdir": [(errno.EIO, False)],
    "read_bytes": [(errno.EIO, False)],
}
"""How each call fails: the error, and whether it has done its work all the same."""
FEWEST = {
    "open": 10, "pwrite": 12, "fdatasync": 9, "fsync": 10, "posix_fallocate": 4, "ftruncate": 1,
    "unlink": 2, "iterdir": 1, "read_bytes": 5,
}  # fmt: skip
"""At least so many such calls does the life have that is disturbed."""
CALLS = sorted(FEWEST)
Call = tuple[str, int, str]


class System:
    """The calls, each counted by the thread that makes it (within a thread their order is always
    the same); one of them fails. It also keeps what is durable: of each file, by inode, the bytes
    at its last sync, and the names at the last sync of the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls: list[Call] = []
        self.failing: tuple[str, int] | None = None
        self.error: int | str = 0
        self.acts_first = False
        """Whether the failing call has done its work when it says that it failed."""
        self.failed = False
        self.bytes: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._mutex = threading.Lock()

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        thread = threading.current_thread().name
        thread = thread if thread.startswith("journal-") else "loop"
        with self._mutex:
            number = self._counts[thread]
            self._counts[thread] += 1
            self.calls.append((thread, number, name))
            fails = self.failing == (thread, number)
            self.failed = self.failed or fails
        if not fails:
            result = real(*args)
            if name in ("fdatasync", "fsync"):
                self._note(args[0])
            return result
        if self.error == SHORT:
            fd, data, offset = args
            return real(fd, data[: len(data) // 2], offset)
        assert isinstance(self.error, int)
        if self.acts_first:
            result = real(*args)
            if name in ("fdatasync", "fsync"):
                self._note(args[0])
        place = () if isinstance(args[0], int) else (str(args[0]),)  # as the system has it
        raise OSError(self.error, os.strerror(self.error), *place)

    def _note(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        inode = os.fstat(fd).st_ino
        with self._mutex:
            if path.is_dir():
                if path == self.directory:
                    with os.scandir(path) as found:
                        self.names = {entry.name: entry.inode() for entry in found}
            else:
                with open(fd, "rb", closefd=False) as file:
                    self.bytes[inode] = os.pread(file.fileno(), os.fstat(fd).st_size, 0)

    def after_power_loss(self, to: Path, *, names_kept: bool) -> Path:
        """The directory as it is when all that was not synced is gone; ``names_kept``: but what was
        done to names reached the disk all the same."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        names = self.names
        if names_kept:
            with os.scandir(self.directory) as found:
                names = {entry.name: entry.inode() for entry in found}
        for name, inode in names.items():
            (to / name).write_bytes(self.bytes.get(inode, b""))
        return to


class _Os:
    """``os`` as the journal sees it."""

    def __init__(self, system: System) -> None:
        self._system = system

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in FAULTS:
            return real
        if name in ("fdatasync", "fsync"):
            real = os.fstat  # durable is what System notes: no need to wait for a real disk
        return lambda *args: self._system.call(name, real, *args)


class SystemDisk(Disk):
    """The disk's calls that are methods of a path."""

    def __init__(self, system: System) -> None:
        self._system = system

    def rename(self, old: Path, new: Path) -> None:
        self._system.call("rename", super().rename, old, new)

    def unlink(self, path: Path) -> None:
        self._system.call("unlink", super().unlink, path)

    def names(self, directory: Path) -> list[str]:
        found: list[str] = self._system.call("iterdir", super().names, directory)
        return found

    def read(self, path: Path) -> bytes:
        found: bytes = self._system.call("read_bytes", super().read, path)
        return found


class Run:
    """A small life: a start, batches, new segments, one deletion, and an orderly end."""

    def __init__(self, directory: Path, acknowledged: State) -> None:
        self.directory = directory
        self.acknowledged = acknowledged
        self.handed = self.acknowledged
        self.snapshot = self.acknowledged
        self.ended: Exception | None = None

    def __call__(self, disk: Disk, *, deletes: bool = True) -> None:
        journal: Journal | None = None
        try:
            journal = Journal.open(
                self.directory, CLUSTER, VOTER,
                segment_bytes=SEGMENT_BYTES, retain_bytes=2 * SEGMENT_BYTES, disk=disk,
            )  # fmt: skip
            writer = Writer(journal)
            self.acknowledged = self.handed = writer.state
            _settle(journal)
            self._commit(writer, PromiseRecord(Ballot(0, writer.identity.boot, 2)))
            for _ in range(3):
                self._commit(writer, *writer.records(4, 500))
                _settle(journal)
            first = writer.state.fixed + 1
            self._commit(writer, AcceptRecord(BALLOT, first, (value(first), value(first + 1))))
            if deletes:
                self.snapshot = writer.state
                journal.delete_below(first - 1)
            _settle(journal)
            journal.completed()
        except (JournalError, JournalFailedError, OSError) as error:
            self.ended = error
        if journal is not None:
            try:
                journal.close()
            except JournalFailedError as error:
                self.ended = self.ended or error

    def _commit(self, writer: Writer, *records: Record) -> None:
        self.handed = fold(writer.state, records)
        writer.commit(*records)
        self.acknowledged = self.handed


def _settle(journal: Journal) -> None:
    """Wait for the keeper, so that what each thread does is always the same."""
    with journal._changed:
        assert journal._changed.wait_for(
            lambda: journal._next_fd >= 0 or journal._next_error is not None, 20
        )
    if journal._failure is None:
        done = threading.Event()
        journal._chores.put(done.set)
        deadline = time.monotonic() + 20
        while journal._failure is None and not done.wait(0.05):
            assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A journal whose voter was killed while it wrote: with a torn write, and a segment that was
    prepared; and the state in it."""
    directory = tmp_path_factory.mktemp("lived") / "journal"
    format_journal(directory, CLUSTER, VOTER, 77)
    Run(directory, first_state(CLUSTER))(Disk(), deletes=False)
    journal = Journal.open(directory, CLUSTER, VOTER, segment_bytes=SEGMENT_BYTES)
    writer = Writer(journal)
    writer.fix(2)
    wait_for_spare(journal)
    number, at = writer.journal.survey.last.number + 1, 0
    journal.abandon()
    path = directory / segment_name(number)
    data = path.read_bytes()
    at = -(-len(data.rstrip(b"\0")) // SECTOR_BYTES) * SECTOR_BYTES
    path.write_bytes(data[:at] + b"half of a batch".ljust(SECTOR_BYTES, b".") + data[at + 512 :])
    assert verify(directory, CLUSTER, VOTER).cut is not None
    assert len(segment_numbers([path.name for path in directory.iterdir()])) == number + 1
    return directory, writer.state


def _system(
    lived: tuple[Path, State], place: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[System, SystemDisk, Run]:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(lived[0], place)
    system = System(place)
    for path in place.iterdir():
        system.bytes[path.stat().st_ino] = path.read_bytes()
        system.names[path.name] = path.stat().st_ino
    monkeypatch.setattr(voters.journal, "os", _Os(system))
    return system, SystemDisk(system), Run(place, lived[1])


def _clean_calls(
    lived: tuple[Path, State], place: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Call]:
    system, disk, run = _system(lived, place, monkeypatch)
    run(disk)
    monkeypatch.undo()
    assert run.ended is None
    assert recovered(place, run.snapshot) == run.acknowledged
    assert (
        recovered(system.after_power_loss(place / "lost", names_kept=False), run.snapshot)
        == run.acknowledged
    )
    return sorted(system.calls)


def recovered(directory: Path, snapshot: State) -> State:
    """What a restart reads, above ``snapshot`` if segments below it were deleted."""
    journal = Journal.open(directory, CLUSTER, VOTER, segment_bytes=SEGMENT_BYTES)
    try:
        state = first_state(CLUSTER)
        if journal.survey.segments[0].header.last_slot:
            state = State(NO_BALLOT, snapshot.fixed, snapshot.chain, (), None)
        for after, _ in journal.replay(state):
            state = after
    finally:
        journal.close()
    return state


@pytest.mark.parametrize("name", CALLS)
def test_each_call_fails_once_and_what_was_acknowledged_is_there(
    lived: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = [c for c in _clean_calls(lived, tmp_path / "clean", monkeypatch) if c[2] == name]
    assert len(calls) >= FEWEST[name], calls
    outcomes: Counter[str] = Counter()
    for thread, number, _ in calls:
        for error, acts_first in FAULTS[name]:
            system, disk, run = _system(lived, tmp_path / "journal", monkeypatch)
            system.failing, system.error, system.acts_first = (thread, number), error, acts_first
            run(disk)
            monkeypatch.undo()
            assert system.failed, (thread, number)
            what = f"{name} {number} of {thread}: {error} {acts_first}"
            outcomes[_judged(system, run, tmp_path / "lost", what)] += 1
    print(f"{name}: {dict(outcomes)}")
    assert outcomes["ended"] >= len(calls) // 2


def _judged(system: System, run: Run, place: Path, what: str) -> str:
    if run.ended is None:
        # The one failure that is foreseen: the next segment cannot be prepared in time, and then
        # is made when it is needed.
        assert system.error in (errno.ENOSPC, SHORT), what
        assert system.failing is not None
        assert system.failing[0] == "journal-keeper", what
    else:
        told = str(run.ended)
        assert str(run.directory) in told, f"{what}: {told}"
        assert isinstance(system.error, str) or os.strerror(system.error) in told, f"{what}: {told}"
    refused = 0
    for directory in (
        run.directory,
        system.after_power_loss(place, names_kept=False),
        system.after_power_loss(place, names_kept=True),
    ):
        try:
            state = recovered(directory, run.snapshot)
        except JournalError as error:
            # Half a batch in one sector: no disk leaves that, and no rule takes it for torn.
            if system.error != SHORT or error.offset is None or "Do not rep" not in str(error):
                raise AssertionError(what) from error
            refused += 1
            continue
        allowed = [run.acknowledged]
        if run.ended is not None:
            allowed.append(run.handed)
        assert state in allowed, f"{what}, in {directory}"
    assert refused <= 1, "after a loss of power only sectors are half written"
    return "went on" if run.ended is None else "refused" if refused else "ended"


# --- snapshots ------------------------------------------------------------------------------


def test_each_call_of_a_snapshot_fails_once_and_the_one_before_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving and deleting: a fault raises, and a restart finds the newest whole one, or the one
    before it."""

    def life(system: System) -> int:
        monkeypatch.setattr(voters.journal, "os", _Os(system))
        saved = 0
        try:
            snapshots = Snapshots(system.directory, SystemDisk(system))
            for slot in (20, 30):
                snapshots.save(slot, pieces(slot, 100_000))
                saved = slot
                snapshots.keep(2)
        finally:
            monkeypatch.undo()
        return saved

    def fresh() -> System:
        place = tmp_path / "snapshots"
        shutil.rmtree(place, ignore_errors=True)
        Snapshots(place).save(10, pieces(10, 100_000))
        (place / f"{15:016d}.writing").write_bytes(b"half")
        system = System(place)
        for path in place.iterdir():
            system.bytes[path.stat().st_ino] = path.read_bytes()
            system.names[path.name] = path.stat().st_ino
        return system

    clean = fresh()
    assert life(clean) == 30
    assert {name for _, _, name in clean.calls} >= {"open", "pwrite", "fsync", "rename", "unlink"}
    for thread, number, name in clean.calls:
        for error, acts_first in FAULTS[name]:
            system = fresh()
            system.failing, system.error, system.acts_first = (thread, number), error, acts_first
            with pytest.raises(OSError, match=r"No space|Input/output|short write|Interr|Too many"):
                life(system)
            places = [
                system.directory,
                system.after_power_loss(tmp_path / "lost", names_kept=False),
                system.after_power_loss(tmp_path / "lost, but names", names_kept=True),
            ]
            for place in places:
                found, damaged = Snapshots(place).newest()
                assert found is not None, (number, name)
                assert damaged == (), (number, name, damaged)
                assert found.slot in (10, 20, 30)
                assert found.slot >= _saved_before(clean.calls, number), (number, name)


def _saved_before(calls: list[Call], number: int) -> int:
    """The newest slot whose save was over before this call: its directory was synced."""
    renamed = [n for _, n, name in calls if name == "rename"]
    done = [min(n for _, n, name in calls if name == "fsync" and n > at) for at in renamed]
    return 10 + 10 * sum(at < number for at in done)
