"""The guard: a machine that raises costs its command, never its state or the cluster."""

from __future__ import annotations

import pytest

from trex_core import machine as module
from trex_core.machine import GuardedMachine, QueryFailed, TooOld
from trex_core.messages import OutcomeStatus

APPLIED, FAILED = OutcomeStatus.APPLIED, OutcomeStatus.FAILED


class Tape:
    """A user's machine: keeps commands; breaks halfway through on some."""

    def __init__(self):
        self.tape = []
        self.snapshots = 0

    def apply(self, slot, command):
        self.tape.append((slot, command))
        match command:
            case b"raise":
                raise KeyError("after the change")
            case b"old":
                raise TooOld("future")
            case b"memory":
                raise MemoryError
            case b"recurse":
                return self.apply(slot, command)
            case b"text":
                return "no bytes"
            case b"large":
                return bytes(module.RESULT_BYTES_MAX + 1)
            case b"exit":
                raise SystemExit
        return b"%d" % len(self.tape)

    def query(self, query):
        if query == b"raise":
            raise LookupError
        return repr(self.tape).encode()

    def snapshot(self):
        self.snapshots += 1
        return iter([b"%d %s\n" % entry for entry in self.tape])

    def restore(self, data):
        self.tape = [
            (int(slot), command)
            for slot, command in (line.split(b" ", 1) for line in data.splitlines())
        ]


def test_a_good_command_gives_its_result():
    assert GuardedMachine(Tape()).apply(3, b"a") == (APPLIED, b"1")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (b"raise", b"KeyError"),
        (b"recurse", b"RecursionError"),
        (b"text", b"TypeError"),
        (b"large", b"ResultTooLarge"),
    ],
)
def test_a_failure_is_a_result_and_the_state_is_as_before(command, name):
    tape = Tape()
    guard = GuardedMachine(tape)
    guard.apply(1, b"a")
    guard.apply(2, b"b")
    assert guard.apply(3, command) == (FAILED, name)
    assert tape.tape == [(1, b"a"), (2, b"b")]
    assert guard.apply(4, command) == (FAILED, name)
    assert guard.apply(5, b"c") == (APPLIED, b"3")
    assert guard.apply(6, command) == (FAILED, name)
    assert tape.tape == [(1, b"a"), (2, b"b"), (5, b"c")]


@pytest.mark.parametrize(
    ("command", "error"), [(b"old", TooOld), (b"memory", MemoryError), (b"exit", SystemExit)]
)
def test_what_is_no_property_of_the_command_stops_this_replica(command, error):
    with pytest.raises(error):
        GuardedMachine(Tape()).apply(1, command)


def test_repeated_failures_do_not_take_new_snapshots():
    tape = Tape()
    guard = GuardedMachine(tape)
    guard.apply(1, b"a")
    for slot in range(2, 50):
        guard.apply(slot, b"raise")
    assert tape.snapshots == 2


def test_the_base_is_renewed_by_count_and_by_bytes(monkeypatch):
    monkeypatch.setattr(module, "UNDO_COMMANDS_MAX", 10)
    tape = Tape()
    guard = GuardedMachine(tape)
    for slot in range(1, 10):
        guard.apply(slot, b"a")
    assert tape.snapshots == 1
    guard.apply(10, b"a")
    assert tape.snapshots == 2
    monkeypatch.setattr(module, "UNDO_BYTES_MIN", 100)
    guard.apply(11, b"a" * 200)
    assert tape.snapshots == 3
    assert guard.apply(12, b"raise")[0] == FAILED and len(tape.tape) == 11


def test_restore_is_the_new_base():
    tape = Tape()
    guard = GuardedMachine(tape)
    guard.apply(1, b"a")
    guard.restore(b"7 x\n8 y\n")
    assert guard.apply(9, b"raise") == (FAILED, b"KeyError")
    assert tape.tape == [(7, b"x"), (8, b"y")]
    assert b"".join(guard.snapshot()) == b"7 x\n8 y\n"


def test_a_query_that_raises_is_named():
    guard = GuardedMachine(Tape())
    assert guard.query(b"") == b"[]"
    with pytest.raises(QueryFailed, match=r"^LookupError$"):
        guard.query(b"raise")


def test_a_total_machine_is_passed_through_and_never_snapshotted():
    tape = Tape()
    guard = GuardedMachine(tape, total=True)
    assert guard.apply(1, b"a") == (APPLIED, b"1")
    guard.restore(b"")
    assert tape.snapshots == 0
    with pytest.raises(TooOld):
        guard.apply(2, b"old")
