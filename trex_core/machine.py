"""The contract between the log and the state machine it replicates, and its guard.

This module alone says what a replicated state machine must offer (:class:`Machine`) and what
becomes of one that raises (:class:`GuardedMachine`): its failure is a replicated result with the
state as before, at every replica alike, and never a dead cluster.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from trex_core.messages import OutcomeStatus

RESULT_BYTES_MAX: Final = 1 << 20
"""Largest result of one command, in bytes; a larger one fails the command (ResultTooLarge)."""
UNDO_BYTES_MIN: Final = 1 << 20
"""A guard renews its base no earlier than after this many bytes of commands."""
UNDO_COMMANDS_MAX: Final = 16_384
"""Most commands a guard keeps since its base, and so replays after a failure."""


class TooOld(Exception):  # noqa: N818 - the word of the design
    """A fixed slot holds something of a newer feature level than this program knows.

    The replica must stop and be upgraded: to reject would be to diverge from the newer ones.
    It is the one exception that passes through ``apply`` of the built-in machine and of the guard.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: this replica is too old; upgrade it, its journal stays valid")


class QueryFailed(Exception):  # noqa: N818 - a report, not a mistake here
    """A user's ``query`` raised; the text is the name of the class it raised."""


class Machine(Protocol):
    """A deterministic state machine: same commands in the same slots give the same results and
    the same snapshot bytes, whatever the host, the time, or the hash seed."""

    def apply(self, slot: int, command: bytes) -> bytes:
        """Apply one command of at most COMMAND_BYTES_MAX bytes; return at most RESULT_BYTES_MAX
        bytes. Slots ascend, with holes. May raise: see :class:`GuardedMachine`."""
        ...

    def query(self, query: bytes) -> bytes:
        """Answer a read; must not change the state."""
        ...

    def snapshot(self) -> Iterable[bytes]:
        """The state, in pieces. It is captured by the call; the pieces are taken later, possibly
        in another thread while ``apply`` goes on, so each should be made quickly."""
        ...

    def restore(self, data: bytes) -> None:
        """Replace the state by that of the joined pieces of a snapshot."""
        ...


class GuardedMachine:
    """A machine whose ``apply`` never raises: an exception becomes (FAILED, class name), and the
    state is put back to what it was before the command.

    To put it back, the guard keeps a *base* (a snapshot) and the commands applied since, and on
    failure restores the one and replays the others.  The base is renewed after a failure, and
    when the commands outweigh it, so the cost of renewing stays proportional to the work done.
    ``total=True`` promises that ``apply`` raises nothing but :class:`TooOld` (the built-in machine
    does): then nothing is kept.

    ``MemoryError`` passes through: it tells of this host, not of the command, and a replica that
    turned it into a result would diverge.  Whatever ``snapshot`` or ``restore`` raise passes too.
    """

    def __init__(self, machine: Machine, *, total: bool = False) -> None:
        self.machine: Final = machine
        self._total = total
        self._base = b""
        self._since: list[tuple[int, bytes]] = []
        self._since_bytes = 0
        if not total:
            self._renew(b"".join(machine.snapshot()))

    def apply(self, slot: int, command: bytes) -> tuple[int, bytes]:
        """Apply; return (``OutcomeStatus.APPLIED``, result) or (``FAILED``, class name)."""
        if self._total:
            return OutcomeStatus.APPLIED, self.machine.apply(slot, command)
        try:
            result = self.machine.apply(slot, command)
            failure = _refused_result(result)
        except (TooOld, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            failure = type(error).__name__
        if failure:
            self._undo()
            return OutcomeStatus.FAILED, failure.encode("utf-8", "replace")
        self._since.append((slot, command))
        self._since_bytes += len(command)
        if len(self._since) >= UNDO_COMMANDS_MAX or self._since_bytes >= max(
            UNDO_BYTES_MIN, 2 * len(self._base)
        ):
            self._renew(b"".join(self.machine.snapshot()))
        return OutcomeStatus.APPLIED, result

    def query(self, query: bytes) -> bytes:
        """Answer a read. Raises :class:`QueryFailed` with the class name if the machine raises."""
        try:
            return self.machine.query(query)
        except Exception as error:
            raise QueryFailed(type(error).__name__) from error

    def snapshot(self) -> Iterable[bytes]:
        """The machine's snapshot, captured now."""
        return self.machine.snapshot()

    def restore(self, data: bytes) -> None:
        """Replace the state."""
        self.machine.restore(data)
        if not self._total:
            self._renew(data)

    def _undo(self) -> None:
        self.machine.restore(self._base)
        for slot, command in self._since:
            self.machine.apply(slot, command)
        if self._since:
            self._renew(b"".join(self.machine.snapshot()))

    def _renew(self, base: bytes) -> None:
        self._base = base
        self._since = []
        self._since_bytes = 0


def _refused_result(result: object) -> str:
    """Name of what is wrong with a result; empty if nothing is."""
    if not isinstance(result, bytes):
        return "TypeError"
    if len(result) > RESULT_BYTES_MAX:
        return "ResultTooLarge"
    return ""
