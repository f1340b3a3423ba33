"""The leader's lease clock: this module alone decides when a lease has run out.

It is values in, values out: the caller says how much time passed and which heartbeat rounds an
accept quorum acknowledged.  Rules (DESIGN §7):

1. The clock advances only when a *newer* heartbeat round was acknowledged by an accept quorum, and
   then by the real time since the last advance, but never by more than one heartbeat interval.  So
   a leader that is paused or cut off prolongs leases; it never shortens one.
2. A new leader gives every lease its full time again, once its own session is open: that voids
   every expiry of an earlier leader that is not fixed yet (``sessions.LEADER``).  Until then it
   answers no renewal, or such an expiry could be recovered later and end what was renewed.
3. A renewal counts from its arrival here, which is later than its sending; it is answered once a
   round begun after its arrival is acknowledged, so a deposed leader renews nothing.
4. A lease that was proposed for expiry is not renewed any more: it is dead unless the proposal is
   given up (:meth:`LeaseClock.give_up`) before it was ever sent.

No wall clock is read and nothing here is replicated: what ends a lease is the command that the
leader proposes, and that alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Final

QUEUE_SLACK: Final = 1024
"""So many entries of leases that ended are left in the queue, beside one for each that is alive:
one of a long time to live would stay for all of it."""


class LeaseClock:
    """Remaining times of the leases of one leadership. All times are milliseconds.

    ``heartbeat_ms`` is the most that one advance may count."""

    def __init__(self, heartbeat_ms: int, leases: Mapping[int, int], now_ms: int) -> None:
        """``leases`` maps each lease that exists to its time to live; all start full (rule 2)."""
        self._heartbeat_ms = heartbeat_ms
        self._clock_ms = 0
        self._advanced_ms = now_ms
        self._round = 0
        self._ends: dict[int, int] = {}
        self._queue: list[tuple[int, int]] = []  # (end or earlier, lease)
        self._expiring: set[int] = set()
        self.reconcile(leases, now_ms)

    def reconcile(self, leases: Mapping[int, int], now_ms: int) -> None:
        """Take over what exists now: new leases start full, ended ones are forgotten."""
        for lease in self._ends.keys() - leases.keys():
            del self._ends[lease]
            self._expiring.discard(lease)
        if len(self._queue) > 2 * len(self._ends) + QUEUE_SLACK:
            alive = self._ends.items()
            self._queue = [(end, lease) for lease, end in alive if lease not in self._expiring]
            heapq.heapify(self._queue)
        for lease in leases.keys() - self._ends.keys():
            self._set(lease, leases[lease], now_ms)

    def _set(self, lease: int, time_ms: int, now_ms: int) -> None:
        # The next advance may also count what passed before now: that is not this lease's time.
        end = self._clock_ms + self._passed_ms(now_ms) + time_ms
        if lease not in self._ends:
            heapq.heappush(self._queue, (end, lease))
        self._ends[lease] = end

    def advance(self, now_ms: int, acked_round: int) -> None:
        """Count the time up to ``now_ms`` if ``acked_round`` is newer than at the last advance
        (rule 1)."""
        if acked_round <= self._round:
            return
        self._round = acked_round
        self._clock_ms += self._passed_ms(now_ms)
        self._advanced_ms = now_ms

    def _passed_ms(self, now_ms: int) -> int:
        return max(0, min(now_ms - self._advanced_ms, self._heartbeat_ms))

    def renew(
        self, leases: Iterable[int], times_ms: Mapping[int, int], now_ms: int
    ) -> tuple[int, ...]:
        """Give ``leases`` their full time (of ``times_ms``: lease -> time to live) from now.
        Returns those that are alive, each once, in the order asked."""
        alive = []
        for lease in dict.fromkeys(leases):
            time_ms = times_ms.get(lease)
            if time_ms is not None and lease not in self._expiring:
                self._set(lease, time_ms, now_ms)
                alive.append(lease)
        return tuple(alive)

    def expire(self, count_max: int) -> tuple[int, ...]:
        """At most ``count_max`` leases that have run out and are not being expired yet, the
        earliest first. They are taken as proposed for expiry (rule 4)."""
        due: list[int] = []
        queue = self._queue
        while queue and queue[0][0] <= self._clock_ms and len(due) < count_max:
            queued, lease = heapq.heappop(queue)
            end = self._ends.get(lease)
            if end is None or lease in self._expiring:
                continue
            if end != queued:  # renewed since; so there is one entry of each, however often
                heapq.heappush(queue, (end, lease))
                continue
            self._expiring.add(lease)
            due.append(lease)
        return tuple(due)

    def give_up(self, leases: Iterable[int]) -> None:
        """The expiry of ``leases`` was surely not proposed: they may live on, or expire later."""
        for lease in leases:
            if lease in self._expiring:
                self._expiring.discard(lease)
                heapq.heappush(self._queue, (self._ends[lease], lease))

    def remaining_ms(self, lease: int) -> int | None:
        """Lease-clock time left; None for an unknown lease."""
        end = self._ends.get(lease)
        return None if end is None else end - self._clock_ms
