"""The checker's dumb twin: every order there is, judged by a dictionary. For small histories."""

from __future__ import annotations

from itertools import permutations

from tests.linear.history import Op


def explains(order: tuple[Op, ...], by_slots: bool) -> bool:
    """Whether the answers are those of a sequential register that takes ``order``. A write that was
    told no slot may have had any that its neighbours leave."""
    held: tuple[str, int] | None = None
    floor = 0
    for op in order:
        value, slot = held or (None, 0)
        if by_slots and held is not None and slot < 0:
            told = None
            if op.kind == "get" or (op.kind == "cas" and op.outcome == "refused"):
                told = op.slot
            elif op.kind == "cas":
                told = op.expected[1]
            if told is not None and told > floor:
                slot = floor = told
                held = (value, slot)
        same = value == op.expected[0] and (not by_slots or slot == op.expected[1])
        match op.kind, op.outcome:
            case "get", _:
                if value != op.read or (by_slots and slot != op.slot):
                    return False
                continue
            case "cas", "refused":
                if value == op.expected[0] or (by_slots and slot != op.slot):
                    return False
                continue
            case "delete", "refused":
                if held is not None:
                    return False
                continue
            case "cas", _:
                if not same:
                    return False
            case "delete", _:
                if held is None:
                    return False
        if by_slots and op.slot >= 0:
            if op.slot <= floor:
                return False
            floor = op.slot
        held = None if op.value is None else (op.value, op.slot)
    return True


def linearizable(ops: list[Op], by_slots: bool) -> bool:
    """Whether any order that real time allows explains them, with any of the pending ones."""
    answered = [op for op in ops if op.outcome != "pending"]
    pending = [op for op in ops if op.outcome == "pending"]
    for mask in range(1 << len(pending)):
        chosen = answered + [op for bit, op in enumerate(pending) if mask >> bit & 1]
        for order in permutations(chosen):
            late = any(
                after.ended is not None and after.outcome != "pending" and after.ended < op.began
                for index, op in enumerate(order)
                for after in order[index + 1 :]
            )
            if not late and explains(order, by_slots):
                return True
    return False
