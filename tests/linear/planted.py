"""A register with planted bugs and clients that race for it, in one thread: histories to judge.

``simulate`` runs a few clients against a server whose only time is a step counter; a seed decides
who moves. Without a bug every history is linearizable; with one, some are not, and the checker has
to say so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.linear.history import Op

BUGS = (
    "stale read",
    "lost write",
    "written twice",
    "compared twice",
    "dirty read of a refused write",
    "reordered reads",
    "value from the future",
    "compare ignored",
    "delete undone",
)


@dataclass
class Server:
    """One key. ``versions`` are all it ever had, each as (value, slot)."""

    bug: str
    draw: random.Random
    versions: list[tuple[str | None, int]] = field(default_factory=lambda: [(None, 0)])
    slot: int = 0
    refused: tuple[str | None, int] | None = None
    again: list[Op] = field(default_factory=list)

    def hit(self, share: float = 0.15) -> bool:
        return self.draw.random() < share

    def read(self) -> tuple[str | None, int]:
        if self.bug == "stale read" and self.hit(0.2) and len(self.versions) > 1:
            return self.versions[-self.draw.randint(2, min(4, len(self.versions)))]
        if self.bug == "dirty read of a refused write" and self.refused and self.hit(0.4):
            return self.refused
        return self.versions[-1]

    def write(self, value: str | None) -> int:
        self.slot += 1
        self.versions.append((value, self.slot if value is not None else 0))
        return self.slot

    def take(self, op: Op) -> None:
        """The one moment at which ``op`` takes effect, and its answer."""
        value, slot = self.versions[-1]
        if self.again and self.hit(0.3):  # a copy that was kept by mistake comes again
            copy = self.again.pop()
            if copy.kind == "put" or copy.expected[0] != value:
                self.write(copy.value)
        match op.kind:
            case "get":
                op.read, op.slot = self.read()
                op.outcome = "done"
                return
            case "put":
                fits = True
            case "delete":
                fits = value is not None
            case _:
                fits = (value, slot) == op.expected
                if self.bug == "compare ignored" and self.hit():
                    fits = True
        if not fits:
            op.outcome = "refused"
            op.slot = slot if op.kind == "cas" else 0
            self.refused = (op.value, self.slot + 1) if op.value is not None else self.refused
            return
        op.outcome = "done"
        if self.bug == "lost write" and self.hit():
            self.slot += 1
            op.slot = self.slot
            return
        op.slot = self.write(op.value)
        if self.bug == "delete undone" and op.kind == "delete" and self.hit(0.5):
            self.versions.append((value, slot))
        if (self.bug == "written twice" and op.kind == "put") or (
            self.bug == "compared twice" and op.kind == "cas" and op.value is not None
        ):
            self.again.append(op)


def simulate(
    seed: int, bug: str = "", *, ops_max: int = 40, clients: int = 4, lost: float = 0.05
) -> list[Op]:
    """The history of one key. ``lost`` is the share of answers that never come; half of those
    requests come late or never."""
    draw = random.Random(seed)
    server = Server(bug, draw)
    ops: list[Op] = []
    known: dict[int, tuple[str | None, int]] = {}
    busy: dict[int, tuple[Op, bool]] = {}
    late: list[Op] = []
    now = 0
    while len(ops) < ops_max or busy:
        now += 1
        if late and draw.random() < 0.05:
            ghost = late.pop()
            server.take(ghost)
            ghost.outcome, ghost.slot = "pending", -1
        client = draw.randrange(clients)
        if client not in busy:
            if len(ops) >= ops_max:
                continue
            value = f"{client}/{now}"
            kind = draw.choice(("put", "cas", "cas", "delete", "get", "get", "get"))
            expected = known.get(client, (None, 0))
            if kind == "cas":
                value = None if draw.random() < 0.1 else value
                op = Op(f"c{client}", "cas", "key", now, value, expected)
            else:
                op = Op(f"c{client}", kind, "key", now, value if kind == "put" else None)
            ops.append(op)
            busy[client] = (op, False)
            continue
        op, taken = busy[client]
        if op.outcome == "pending" and not taken and draw.random() < lost:
            if draw.random() < 0.5 and op.kind != "get":
                late.append(op)
            del busy[client]
            continue
        if not taken:
            if op.outcome == "pending":
                server.take(op)
            busy[client] = (op, True)
            continue
        del busy[client]
        op.ended = now
        if op.kind == "get":
            known[client] = (op.read, op.slot)
        elif op.outcome == "done" and op.value is not None:
            known[client] = (op.value, op.slot)
        else:
            known.pop(client, None)
        if draw.random() < lost and op.kind != "get":  # done, and the answer lost
            op.outcome, op.ended, op.slot = "pending", None, -1
    if bug == "value from the future":
        _foretell(ops, draw)
    if bug == "reordered reads":
        _swap(ops)
    return [op for op in ops if op.kind != "get" or op.ended is not None]


def _foretell(ops: list[Op], draw: random.Random) -> None:
    """Some reads find what is written only after they ended."""
    for index, op in enumerate(ops):
        if op.kind != "get" or op.ended is None or draw.random() > 0.2:
            continue
        for later in ops[index + 1 :]:
            if later.began > op.ended and later.kind == "put" and later.outcome == "done":
                op.read, op.slot = later.value, later.slot
                break


def _swap(ops: list[Op]) -> None:
    """A client gets the answers to two of its reads in the wrong order."""
    before: dict[str, Op] = {}
    for op in ops:
        if op.kind != "get" or op.ended is None:
            continue
        first = before.pop(op.client, None)
        if first is None:
            before[op.client] = op
        else:
            first.read, first.slot, op.read, op.slot = op.read, op.slot, first.read, first.slot
