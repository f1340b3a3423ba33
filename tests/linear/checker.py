"""The checker: this module alone decides whether a history of one key is linearizable.

The search of Wing and Gong with Lowe's memory: take the operations in some order that real time
allows, keep the (operations taken, state) seen, go back where an answer does not fit. Keys are
independent, so each is judged alone. What may have happened may be taken at any later point, or
never.

Two models. ``BLIND`` knows values only: a value is written once, so it names its version. ``SLOTS``
also believes the slots of the answers: writes take effect in ascending slots, a read or a refusal
names the slot of the write it saw. What passes SLOTS passes BLIND; SLOTS sees more, and sooner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from tests.linear.history import ABSENT, Op

STEPS_MAX: Final = 1_000_000
"""Most states looked at for one key before it counts as undecided."""
UNKNOWN: Final = -1
"""The slot of a write whose answer did not come and whose value nobody met."""


class NotLinearizable(AssertionError):  # noqa: N818 - a finding, not an error of the program
    """No order that real time allows explains the answers; the message shows where it sticks."""


class Undecided(AssertionError):  # noqa: N818 - as above
    """The history of one key is too long or too wide to be judged within STEPS_MAX states."""


class Register(NamedTuple):
    """A key: its value (None: absent), the slot that wrote it (UNKNOWN: not told), and the highest
    slot that was told so far."""

    value: str | None = None
    slot: int = ABSENT
    floor: int = 0


class Model(Protocol):
    """What an operation makes of a register: None when its answer cannot be given there."""

    def __call__(self, now: Register, op: Op) -> Register | None: ...


def blind(now: Register, op: Op) -> Register | None:
    """Values only."""
    value = now.value
    if op.kind == "get":
        return now if value == op.read else None
    if op.kind == "put":
        return Register(op.value)
    fits = value is not None if op.kind == "delete" else value == op.expected[0]
    if op.outcome == "refused":
        return None if fits else now
    return Register(op.value) if fits else None


def _met(now: Register, slot: int) -> Register | None:
    """``slot`` was told as the version of what is there."""
    if (now.value is None) != (slot == ABSENT):
        return None
    if now.slot == UNKNOWN:
        return Register(now.value, slot, slot) if slot > now.floor else None
    return now if now.slot == slot else None


def slots(now: Register, op: Op) -> Register | None:
    """Values and slots."""
    after = blind(now, op)
    if after is None:
        return None
    if op.kind == "get" or (op.kind == "cas" and op.outcome == "refused"):
        return _met(now, op.slot)
    if op.outcome == "refused":
        return now  # a delete: the key is absent, which blind saw
    if op.kind == "cas":
        met = _met(now, op.expected[1])
        if met is None:
            return None
        now = met
    if op.slot == UNKNOWN:
        return Register(op.value, ABSENT if op.value is None else UNKNOWN, now.floor)
    if op.slot <= now.floor:
        return None
    return Register(op.value, ABSENT if op.value is None else op.slot, op.slot)


@dataclass(slots=True, eq=False)
class _Entry:
    """The beginning or the end of an operation, in a list ordered by time."""

    op: Op
    bit: int
    end: _Entry | None = None
    """For a beginning: its end, if its answer came."""
    is_end: bool = False
    before: _Entry | None = None
    after: _Entry | None = None

    def lift(self) -> None:
        """Take it, and its end, out of the list."""
        _cut(self)
        if self.end is not None:
            _cut(self.end)

    def unlift(self) -> None:
        """Put both back where they were."""
        if self.end is not None:
            _join(self.end)
        _join(self)


def _cut(entry: _Entry) -> None:
    assert entry.before is not None, "the head is never taken"
    entry.before.after = entry.after
    if entry.after is not None:
        entry.after.before = entry.before


def _join(entry: _Entry) -> None:
    assert entry.before is not None, "the head is never taken"
    entry.before.after = entry
    if entry.after is not None:
        entry.after.before = entry


def _listed(ops: list[Op]) -> tuple[_Entry, int]:
    """The head of the list, and how many operations must be explained. Beginnings come before ends
    at the same time: what touches, overlaps."""
    marks: list[tuple[float, int, int, _Entry]] = []
    for number, op in enumerate(ops):
        begin = _Entry(op, 1 << number)
        marks.append((op.began, 0, number, begin))
        if op.ended is not None and op.outcome != "pending":
            begin.end = _Entry(op, 1 << number, is_end=True)
            marks.append((op.ended, 1, number, begin.end))
    head = last = _Entry(ops[0], 0)
    for *_, entry in sorted(marks, key=lambda mark: mark[:3]):
        last.after, entry.before = entry, last
        last = entry
    return head, sum(1 for op in ops if op.outcome != "pending")


class Judged(NamedTuple):
    """An order that explains all (what may have happened and is not in it did not), and how many
    states were looked at."""

    order: tuple[Op, ...]
    steps: int


def judge(ops: Iterable[Op], model: Model = slots, steps_max: int = STEPS_MAX) -> Judged:
    """Find an order for the operations of one key. Raises :class:`NotLinearizable`, or
    :class:`Undecided` after ``steps_max`` states."""
    ops = list(ops)
    if not ops:
        return Judged((), 0)
    head, left = _listed(ops)
    state, taken = Register(), 0
    stack: list[tuple[_Entry, Register]] = []
    seen: set[tuple[int, Register, bool]] = set()
    deepest: list[Op] = []
    stuck = ops[0]
    entry = head.after
    steps = 0
    while left:
        assert entry is not None, "an operation left to explain has its end in the list"
        if not entry.is_end:
            after = _after(state, entry, stack, model)
            if after is not None:
                key = (taken | entry.bit, after, entry.end is None)
                if key not in seen:
                    steps += 1
                    if steps > steps_max:
                        raise Undecided(f"{ops[0].key}: {len(ops)} operations, {steps} states")
                    seen.add(key)
                    stack.append((entry, state))
                    state, taken = after, taken | entry.bit
                    left -= entry.end is not None
                    entry.lift()
                    entry = head.after
                    continue
            entry = entry.after
            continue
        if len(stack) >= len(deepest):
            deepest, stuck = [done.op for done, _ in stack], entry.op
        if not stack:
            raise NotLinearizable(_words(ops, deepest, stuck))
        entry, state = stack.pop()
        taken &= ~entry.bit
        left += entry.end is not None
        entry.unlift()
        entry = entry.after
    return Judged(tuple(done.op for done, _ in stack), steps)


def _after(
    state: Register, entry: _Entry, stack: list[tuple[_Entry, Register]], model: Model
) -> Register | None:
    """The register after ``entry``, if it may be taken now.

    A write that may have happened and that a put hides at once need not be taken: without it all
    that follows fits as well."""
    if entry.op.kind == "put" and stack and stack[-1][0].end is None:
        return None
    return model(state, entry.op)


def _words(ops: list[Op], taken: list[Op], stuck: Op) -> str:
    told = [f"no order explains key {stuck.key} ({len(ops)} operations); the longest beginning is"]
    told += [f"    {op}" for op in taken[-12:]]
    told += ["  and then nothing lets this be answered as it was:", f"    {stuck}"]
    still = [op for op in ops if op not in taken and op is not stuck]
    told += ["  not placed:", *(f"    {op}" for op in still[:12])] if still else []
    return "\n".join(told)


def with_slots_met(ops: list[Op]) -> list[Op]:
    """Where the value of a write without an answer was met by another operation, that tells its
    slot. Raises :class:`NotLinearizable` when one value was met under two slots."""
    met: dict[str, tuple[int, Op]] = {}
    for op in ops:
        told: list[tuple[str | None, int]] = []
        if op.kind == "get":
            told.append((op.read, op.slot))
        elif op.kind == "cas":
            told.append(op.expected)
            if op.outcome == "done":
                told.append((op.value, op.slot))
        elif op.kind == "put" and op.outcome == "done":
            told.append((op.value, op.slot))
        for value, slot in told:
            if value is None:
                continue
            before = met.setdefault(value, (slot, op))
            if before[0] != slot:
                raise NotLinearizable(
                    f"value {value} of {op.key} was met under two slots:\n  {before[1]}\n  {op}"
                )
    for op in ops:
        if op.outcome == "pending" and op.slot == UNKNOWN and op.value in met:
            op.slot = met[op.value][0]
    return ops
