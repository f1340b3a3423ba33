"""Quorum systems: which sets of voters may promise, and which may accept.

This module alone counts votes. A system is constructed only if each promise quorum meets each
accept quorum. Source: PMS §2.2 (P2c); flexible quorums: Howard, Malkhi, Spiegelman 2016.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import TypeAlias


class Tally(Enum):
    """Result of a vote so far."""

    WIN = "win"
    LOSE = "lose"
    WAIT = "wait"


def tally(
    weights: Mapping[int, int], needed: int, yes: Collection[int], no: Collection[int]
) -> Tally:
    """Weigh votes: WIN at ``needed`` weight of yes; LOSE once yes can no longer reach it (so also
    when all voted and the vote is split); WAIT otherwise. Voters unknown to ``weights`` count 0."""
    for_it = sum(weights.get(v, 0) for v in set(yes))
    if for_it >= needed:
        return Tally.WIN
    undecided = sum(w for v, w in weights.items() if v not in yes and v not in no)
    return Tally.WAIT if for_it + undecided >= needed else Tally.LOSE


class Weighted:
    """Weighted flexible quorums: a promise quorum has at least ``promise_weight``, an accept quorum
    at least ``accept_weight``. Raises ``ValueError`` unless the two always intersect."""

    def __init__(self, weights: Mapping[int, int], promise_weight: int, accept_weight: int) -> None:
        total = sum(weights.values())
        if not weights or any(w < 0 for w in weights.values()) or total == 0:
            raise ValueError("a quorum system needs voters with weights of 0 or more, some above 0")
        if promise_weight + accept_weight <= total:
            raise ValueError(
                f"promise weight {promise_weight} + accept weight {accept_weight} must exceed the "
                f"total weight {total}: quorums must intersect"
            )
        if not (0 < promise_weight <= total and 0 < accept_weight <= total):
            raise ValueError("quorum weights must lie between 1 and the total weight")
        self.weights = dict(weights)
        self.promise_weight = promise_weight
        self.accept_weight = accept_weight

    def promise(self, yes: Collection[int], no: Collection[int] = ()) -> Tally:
        """Is ``yes`` a promise quorum?"""
        return tally(self.weights, self.promise_weight, yes, no)

    def accept(self, yes: Collection[int], no: Collection[int] = ()) -> Tally:
        """Is ``yes`` an accept quorum?"""
        return tally(self.weights, self.accept_weight, yes, no)


class Majority(Weighted):
    """Each voter weighs one; more than half promise and more than half accept."""

    def __init__(self, voters: Collection[int]) -> None:
        needed = len(voters) // 2 + 1
        super().__init__(dict.fromkeys(voters, 1), needed, needed)


class EvenFlexible(Weighted):
    """The even-node rule of FPaxos: of N voters N/2 + 1 promise, and N/2 accept when N is even
    (a majority when it is odd)."""

    def __init__(self, voters: Collection[int]) -> None:
        n = len(voters)
        super().__init__(dict.fromkeys(voters, 1), n // 2 + 1, (n + 1) // 2)


QuorumSystem: TypeAlias = Weighted
