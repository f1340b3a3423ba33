"""Leases held by this client: this module alone knows until when it may count on them.

One renewal covers all leases of a client and leaves when a third of the shortest time to live is
over. A holder counts from the *sending* of what was answered, less the cluster's
``lease_drift_ms``, on a clock that goes on while the machine sleeps: the lease runs out here
before it can run out at the voters, whose clock starts later. Nothing but an answer prolongs it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio

from voters.driver import Driver, Fenced, TrexError

RENEW_AT: Final = 1 / 3
"""The part of its time to live after which a lease is renewed."""
RETRY_AT: Final = 1 / 12
"""The part of its time to live after which a failed renewal is tried again."""
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock_s() -> float:
    """Seconds since some moment, the time the machine slept included."""
    return time.clock_gettime(_CLOCK)


class HeldLease:
    """A lease this client keeps alive. ``id`` is the slot of its grant and its fencing token;
    ``lost`` is set as soon as the client cannot be sure of it any more."""

    def __init__(self, lease: int, ttl_ms: int, sure_until_s: float) -> None:
        self.id: Final = lease
        self.ttl_ms: Final = ttl_ms
        self.lost: Final = anyio.Event()
        self.sure_until_s = sure_until_s
        self.renew_at_s = 0.0

    @property
    def held(self) -> bool:
        """Whether the lease surely exists now."""
        return not self.lost.is_set() and clock_s() < self.sure_until_s

    def ensure(self) -> int:
        """The fencing token, if the lease surely exists now. Raises :class:`Fenced`."""
        if not self.held:
            raise Fenced(
                f"lease {self.id} may have expired; stop what it protects, grant a new one"
            )
        return self.id


class LeaseKeeper:
    """Renews the leases of one client. Its :meth:`run` is the one task that does it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._margin_s = driver.cluster.timing.lease_drift_ms / 1000
        self._held: dict[int, HeldLease] = {}
        self._wake = anyio.Event()

    def check_ttl(self, ttl_ms: int) -> None:
        """Raises ``ValueError`` for a time to live that the drift margin would eat up."""
        if ttl_ms / 1000 <= self._margin_s:
            raise ValueError(
                f"a lease of {ttl_ms} ms could never be relied on: the cluster's lease_drift_ms "
                f"is {self._margin_s * 1000:.0f}; ask for more"
            )

    @asynccontextmanager
    async def keep(self, lease: int, ttl_ms: int, sent_s: float) -> AsyncIterator[HeldLease]:
        """Keep ``lease`` alive for the block. ``sent_s`` is the :func:`clock_s` just before its
        grant, or its last renewal, was asked for."""
        self.check_ttl(ttl_ms)
        held = HeldLease(lease, ttl_ms, sent_s + ttl_ms / 1000 - self._margin_s)
        held.renew_at_s = sent_s + ttl_ms / 1000 * RENEW_AT
        self._held[lease] = held
        self._wake.set()
        try:
            yield held
        finally:
            self._held.pop(lease, None)

    async def run(self) -> None:
        """Renew and watch, for ever."""
        while True:
            now_s = clock_s()
            for lease in list(self._held.values()):
                if now_s >= lease.sure_until_s:
                    self._lose(lease)
            if not self._held:
                await self._wake.wait()
                self._wake = anyio.Event()
                continue
            leases = self._held.values()
            due_s = min(min(each.renew_at_s, each.sure_until_s) for each in leases)
            if due_s > now_s:
                with anyio.move_on_after(due_s - now_s):
                    await self._wake.wait()
                    self._wake = anyio.Event()
                continue
            await self._renew(now_s)

    async def _renew(self, now_s: float) -> None:
        asked = list(self._held.values())
        patience_s = min(
            min(each.sure_until_s - now_s, each.ttl_ms / 1000 * RENEW_AT) for each in asked
        )
        try:
            ids = tuple(each.id for each in asked)
            alive = frozenset(await self._driver.renew(ids, max(0.0, patience_s)))
        except TrexError:
            for lease in asked:
                lease.renew_at_s = clock_s() + lease.ttl_ms / 1000 * RETRY_AT
            return
        for lease in asked:
            if lease.id not in alive:
                self._lose(lease)
                continue
            lease.sure_until_s = now_s + lease.ttl_ms / 1000 - self._margin_s
            lease.renew_at_s = now_s + lease.ttl_ms / 1000 * RENEW_AT

    def _lose(self, lease: HeldLease) -> None:
        self._held.pop(lease.id, None)
        lease.lost.set()
