"""What was promised beside linearizability: this module alone compares answers and deliveries with
the log as it is.

Order across keys and in a session, exactly once, prefixes at every read level, and the stream's
guarantees at each listener. Every broken promise raises :class:`Broken` in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from listeners import Delivery, Lagged, Progress, Reset, SlotChanges
from tests.linear.history import Op
from tests.linear.log import Log
from trex_core.metadata.commands import Change
from trex_core.state import FixedRun


class Broken(AssertionError):  # noqa: N818 - a finding, not an error of the program
    """A promise was broken."""


# --- operations --------------------------------------------------------------------------------


def check_real_time(ops: Sequence[Op]) -> None:
    """Across all keys: what began after an answer takes effect above the slot of that answer, and
    a linearizable read is as of no earlier one."""
    ends = sorted(
        (
            (op.ended, op.slot if op.kind != "get" else op.at, op)
            for op in ops
            if op.ended is not None and op.outcome == "done"
        ),
        key=lambda row: row[:2],
    )
    floor, highest, place = 0, None, 0
    for op in sorted(ops, key=lambda each: each.began):
        while place < len(ends) and ends[place][0] < op.began:
            if ends[place][1] > floor:
                _, floor, highest = ends[place]
            place += 1
        if op.outcome == "done" and op.kind != "get" and op.slot <= floor:
            raise Broken(f"written at or below what was answered before:\n  {highest}\n  {op}")
        if op.kind == "get" and op.outcome == "done":
            if op.level == "linearizable" and op.at < floor:
                raise Broken(f"a linearizable read of the past:\n  {highest}\n  {op}")
            if op.at < op.least:
                raise Broken(f"a read below the slot it asked for ({op.least}):\n  {op}")


def check_sessions(ops: Iterable[Op], log: Log) -> None:
    """The writes of a client were applied in the order it began them."""
    last: dict[str, tuple[int, Op]] = {}
    for op in ops:
        if op.kind == "get" or op.outcome in ("refused", "not_done"):
            continue
        slot = op.slot if op.outcome == "done" else -1
        if op.outcome == "pending" and op.value is not None:
            slot = log.slot_of(op.key, op.value) or -1
        if slot < 0:
            continue
        before = last.get(op.client)
        if before is not None and before[0] >= slot:
            raise Broken(f"{op.client}'s writes changed places:\n  {before[1]}\n  {op} (at {slot})")
        last[op.client] = (slot, op)


def check_exactly_once(ops: Iterable[Op], log: Log) -> None:
    """Each write done is in the log at its slot; none is there twice; what was refused, or surely
    was not proposed, is not there at all."""
    wrote = log.writes()
    for op in ops:
        if op.kind == "get":
            continue
        times = wrote[op.key, op.value] if op.value is not None else 0
        if times > 1:
            raise Broken(f"applied {times} times:\n  {op}")
        if times and op.outcome in ("refused", "not_done"):
            raise Broken(
                f"in the log at {log.slot_of(op.key, str(op.value))} all the same:\n  {op}"
            )
        if op.outcome != "done":
            continue
        found = [
            change
            for change in log.changes.get(op.slot, ())
            if change.kind == "config"
            and change.key == op.key
            and (None if change.new is None else change.new.value) == op.value
        ]
        if len(found) != 1:
            raise Broken(
                f"done, but slot {op.slot} holds {log.changes.get(op.slot)} (the log ends at "
                f"{log.last}):\n  {op}"
            )


def check_prefixes(ops: Iterable[Op], log: Log) -> None:
    """Each read, whatever its level, tells the state at the slot that it says it is as of."""
    for op in ops:
        if op.kind == "get" and op.outcome == "done":
            there = log.at(op.key, op.at)
            if there != (op.read, op.slot):
                raise Broken(f"at slot {op.at} of the log there is {there}:\n  {op}")


def check_monotonic(ops: Iterable[Op]) -> None:
    """Reads of one listener, or of one voter that was not restarted, never go back: ``level`` says
    whose they are."""
    reads = [op for op in ops if op.kind == "get" and op.outcome == "done"]
    last: dict[str, Op] = {}
    for op in sorted(reads, key=lambda each: each.began):
        if op.level == "linearizable":
            continue
        before = last.get(op.level)
        if before is None or op.at >= before.at:
            last[op.level] = op
        elif before.ended is not None and before.ended < op.began:
            raise Broken(f"{op.level} went back:\n  {before}\n  {op}")


# --- deliveries --------------------------------------------------------------------------------


@dataclass
class Heard:
    """What one embedded listener was told: an observer of it, and the deliveries of one
    subscription that began after slot ``since``."""

    name: str
    since: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
    chains: dict[int, bytes] = field(default_factory=dict)
    runs: list[tuple[int, int]] = field(default_factory=list)
    jumps: list[tuple[int, int]] = field(default_factory=list)
    capture: Callable[[], bytes | None] | None = None
    """Tells all that the listener holds, as the bytes of a snapshot."""
    captured: dict[int, bytes | None] = field(default_factory=dict)
    """What it held right after each jump, by the slot it jumped to."""

    def heard(self, voter: int, message: object) -> None:
        """Part of ``listeners.Observer``; heartbeats are of no interest here."""

    def reported(self, report: object) -> None:
        """As above."""

    def delivered(self, run: FixedRun) -> None:
        """As ``listeners.Observer``."""
        self.runs.append((run.first, run.last))
        for slot, chain in enumerate(run.chains, run.first):
            self.chains[slot] = chain

    def jumped(self, from_slot: int, to_slot: int) -> None:
        """As ``listeners.Observer``."""
        self.jumps.append((from_slot, to_slot))
        self.captured[to_slot] = self.capture() if self.capture is not None else None


def check_runs(heard: Heard, log: Log) -> None:
    """The observer's slots: ascending, none twice, none left out but by a jump; the voters' chain
    at each."""
    at = None
    for first, last in sorted([*heard.runs, *((a + 1, b) for a, b in heard.jumps)]):
        if at is not None and first != at + 1:
            raise Broken(f"{heard.name}: after slot {at} came {first}")
        at = last
    if heard.runs != sorted(heard.runs):
        raise Broken(f"{heard.name}: runs out of order")
    for slot, chain in heard.chains.items():
        if slot <= log.last and chain != log.chains[slot]:
            raise Broken(f"{heard.name}: another chain at slot {slot}")


def check_jumps(heard: Heard, log: Log) -> None:
    """A jump goes forward, and what the listener holds after it (state, sessions and chain) is what
    the log makes up to there, to the byte. A subscriber that was there from the beginning was told
    of each jump, once, and of no other."""
    for first, last in heard.jumps:
        if not first < last <= log.last:
            raise Broken(f"{heard.name}: a jump from {first} to {last}, the log ends at {log.last}")
        if heard.captured[last] != log.capture(last):
            raise Broken(f"{heard.name}: after the jump to {last} it holds another state")
    told = [(each.from_slot, each.to_slot) for each in heard.deliveries if isinstance(each, Reset)]
    if told != heard.jumps:
        raise Broken(f"{heard.name}: it jumped {heard.jumps}, and told {told}")


def check_deliveries(heard: Heard, log: Log, *, prefix: str = "") -> int:
    """Ordered, Unique, Reliable, Atomic, Bookmarkable, Resumable: the deliveries after ``since``
    are those of the log, each slot whole, each once, and a bookmark comes when all before it came.
    A jump stands for its slots: it begins where the deliveries were, and tells the difference.
    Only changes of keys with ``prefix`` are expected. Returns the last slot they account for."""
    wanted = [
        (slot, whole)
        for slot in sorted(log.changes)
        if slot > heard.since
        and (whole := tuple(each for each in log.changes[slot] if each.key.startswith(prefix)))
    ]
    place, at = 0, heard.since
    for delivery in heard.deliveries:
        match delivery:
            case SlotChanges(slot=slot, changes=changes):
                if slot <= at:
                    raise Broken(f"{heard.name}: slot {slot} after {at}: out of order, or twice")
                if place >= len(wanted) or wanted[place][0] != slot:
                    due = wanted[place][0] if place < len(wanted) else "nothing"
                    raise Broken(f"{heard.name}: slot {slot} came when {due} was due")
                if changes != wanted[place][1]:
                    raise Broken(f"{heard.name}: slot {slot} in part, or changed: {changes}")
                place, at = place + 1, slot
            case Progress(slot=slot):
                if slot < at:
                    raise Broken(f"{heard.name}: a bookmark at {slot} after slot {at}")
                if place < len(wanted) and wanted[place][0] <= slot:
                    raise Broken(
                        f"{heard.name}: a bookmark at {slot} before slot {wanted[place][0]} came"
                    )
                at = slot
            case Reset(from_slot=first, to_slot=last, changes=changes):
                if first < at or (place < len(wanted) and wanted[place][0] <= first):
                    raise Broken(f"{heard.name}: a jump from {first}, standing at {at}")
                if not first < last <= log.last:
                    raise Broken(
                        f"{heard.name}: a jump from {first} to {last}, the log ends at {log.last}"
                    )
                rows: dict[tuple[str, str], Change] = {}
                while place < len(wanted) and wanted[place][0] <= last:
                    for change in wanted[place][1]:
                        key = (change.kind, change.key)
                        old = rows[key].old if key in rows else change.old
                        rows[key] = Change(change.kind, change.key, old, change.new)
                    place += 1
                due_rows = {key: row for key, row in rows.items() if row.old != row.new}
                told = {(each.kind, each.key): each for each in changes}
                if told != due_rows or len(told) != len(changes):
                    raise Broken(f"{heard.name}: the jump {first}..{last} is not the difference")
                at = last
            case Lagged(from_slot=first, to_slot=last):
                raise Broken(f"{heard.name}: told to have lagged from {first} to {last}")
    return at


def check_same(accounts: Sequence[Heard]) -> None:
    """Whatever two listeners both delivered is the same."""
    told: dict[int, tuple[str, object]] = {}
    for heard in accounts:
        for delivery in heard.deliveries:
            if isinstance(delivery, SlotChanges):
                first = told.setdefault(delivery.slot, (heard.name, delivery.changes))
                if first[1] != delivery.changes:
                    raise Broken(f"{heard.name} and {first[0]} differ at slot {delivery.slot}")
