"""The simulated network: datagrams that are lost, repeated, reordered, damaged; connections that
break; links that are cut, also one way.

This module alone decides whether and when bytes arrive. It carries real bytes: what it damages the
real frame check must refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tests.simulator.world import World


class Node(Protocol):
    """Anything that has an address and may be down or paused."""

    address: int
    up: bool
    paused_until: int


class Network:
    """Links between addresses. A link is cut by naming it in ``cut``."""

    def __init__(self, world: World) -> None:
        self.world = world
        options = world.options
        self.loss = options.loss
        self.stream_loss = options.stream_loss
        self.duplication = options.duplication
        self.corruption = options.corruption
        self.connection_failure = options.connection_failure
        self.slow = options.slow
        self.delay_min_us = options.delay_min_us
        self.delay_span_us = options.delay_span_us
        self.cut: set[tuple[int, int]] = set()
        self.clogged: dict[tuple[int, int], int] = {}
        """Links that hold back all that is sent until this time, then let it through at once."""
        self.lossy: dict[tuple[int, int], float] = {}
        """Links that lose this share, whatever the others do."""
        self._stream_end: dict[tuple[int, int], int] = {}

    def heal(self) -> None:
        """From now on nothing is damaged or late, and no more lost than the options say."""
        self.duplication = self.corruption = self.slow = 0.0
        self.loss = self.stream_loss = self.world.options.loss_after
        self.connection_failure = 0.0
        self.delay_span_us = min(self.delay_span_us, 2_000)
        self.cut.clear()
        self.clogged.clear()

    def _held_back(self, link: tuple[int, int]) -> int:
        """How long ``link`` still holds back what is sent now."""
        until = self.clogged.get(link, 0)
        if until <= self.world.now:
            return 0
        self.world.counts["held_back_by_a_clogged_path"] += 1
        return until - self.world.now

    def _delay(self) -> int:
        return self.delay_min_us + int(self.world.random() * self.delay_span_us)

    def datagram(
        self,
        source: int,
        target: Node,
        data: bytes,
        handler: Callable[[bytes, object], None],
        loss: float | None = None,
    ) -> None:
        """Send one datagram: ``handler(data, None)`` is called if and when it arrives."""
        world = self.world
        random = world.random
        if self.cut and (source, target.address) in self.cut:
            return
        loss = self.loss if loss is None else loss
        if self.lossy:
            loss = max(loss, self.lossy.get((source, target.address), 0.0))
        if loss and random() < loss:
            world.counts["datagrams_lost"] += 1
            return
        delay = self.delay_min_us + int(random() * self.delay_span_us)
        if self.clogged:
            delay += self._held_back((source, target.address))
        if self.slow and random() < self.slow:
            delay += int(random() * world.options.slow_us)
            world.counts["datagrams_late"] += 1
        if self.corruption and random() < self.corruption:
            place = int(random() * len(data))
            flipped = data[place] ^ (1 << int(random() * 8))
            data = data[:place] + bytes((flipped,)) + data[place + 1 :]
            world.counts["datagrams_damaged"] += 1
        world.push(delay, target, handler, data, None)
        if self.duplication and random() < self.duplication:
            world.counts["datagrams_repeated"] += 1
            world.push(delay + self._delay(), target, handler, data, None)

    def connection(
        self, source: int, target: Node, data: bytes, handler: Callable[[bytes, object], None]
    ) -> bool:
        """Send bytes over a connection: in order and whole, or not at all (answer: whether they
        are under way; the sender does not learn it)."""
        world = self.world
        if (source, target.address) in self.cut or (target.address, source) in self.cut:
            return False
        if self.connection_failure and world.random() < self.connection_failure:
            world.counts["connections_broken"] += 1
            return False
        link = (source, target.address)
        held = self._held_back(link) if self.clogged else 0
        arrival = world.now + held + self._delay() + len(data) // 50
        arrival = max(arrival, self._stream_end.get(link, 0))
        self._stream_end[link] = arrival
        world.push(arrival - world.now, target, handler, data, None)
        return True
