"""Histories: this module alone knows what a client notes about an operation, and when.

An operation begins before its request leaves and ends after its answer came, on one monotonic
clock. One whose answer did not come *may have happened*, then or at any later time; one that surely
was not proposed (``NOT_DONE``) never may. Every value written is written once in a history, so a
value names its write.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final, Literal

Kind = Literal["put", "cas", "delete", "get"]
Outcome = Literal["pending", "done", "refused", "not_done"]

READS: Final = frozenset({"get"})
ABSENT: Final = 0
"""The slot of a key that is not there."""


@dataclass(slots=True, eq=False)
class Op:
    """One operation of ``client`` on ``key``.

    ``value`` is what it writes (None: it removes the key), ``expected`` what a compare-and-set
    takes for there: the value (None: absent) and its slot. ``slot`` is that of a write done, the
    version a refusal found, or the version a read found; ``read`` is the value a read found.
    ``level`` is the read level, ``at`` the slot its answer is as of, ``least`` the slot it asked to
    be at least at.
    """

    client: str
    kind: Kind
    key: str
    began: float
    value: str | None = None
    expected: tuple[str | None, int] = (None, ABSENT)
    ended: float | None = None
    outcome: Outcome = "pending"
    slot: int = -1
    read: str | None = None
    level: str = "linearizable"
    at: int = -1
    least: int = 0

    def __str__(self) -> str:
        what = f"{self.client} {self.kind} {self.key}"
        if self.kind == "cas":
            what += f" {self.expected[0]}@{self.expected[1]} ->"
        if self.kind in ("put", "cas"):
            what += f" {self.value}"
        if self.kind == "get":
            what += f" = {self.read}"
            what += f" ({self.level} at {self.at})" if self.at >= 0 else ""
        end = "for ever" if self.ended is None else f"{self.ended:.6f}"
        return f"[{self.began:.6f} .. {end}] {what}: {self.outcome} @{self.slot}"


@dataclass
class History:
    """The operations of one run, in the order they began."""

    ops: list[Op] = field(default_factory=list)

    def begin(
        self,
        client: str,
        kind: Kind,
        key: str,
        value: str | None = None,
        *,
        expected: tuple[str | None, int] = (None, ABSENT),
        level: str = "linearizable",
        least: int = 0,
    ) -> Op:
        """Note that an operation is about to be sent."""
        op = Op(
            client,
            kind,
            key,
            time.monotonic(),
            value,
            expected,
            level=level,
            least=least,
        )
        self.ops.append(op)
        return op

    @staticmethod
    def end(
        op: Op, outcome: Outcome, slot: int = -1, *, read: str | None = None, at: int = -1
    ) -> None:
        """Note its answer."""
        op.ended, op.outcome, op.slot, op.read, op.at = time.monotonic(), outcome, slot, read, at

    def register(self) -> dict[str, list[Op]]:
        """By key, what a register must explain: all but reads of weaker levels, reads without an
        answer, and what surely was not done."""
        keys: dict[str, list[Op]] = {}
        for op in self.ops:
            if op.outcome == "not_done" or op.level != "linearizable":
                continue
            if op.kind == "get" and op.outcome == "pending":
                continue
            keys.setdefault(op.key, []).append(op)
        return keys
