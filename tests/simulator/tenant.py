"""A simulated holder of a lease: takes a name for itself alone, renews, gives it back.

This module alone says when a client may believe that it holds something: from the answer to its
join until its lease may have run out, counted from sending, on its own clock. No two may ever
believe so of one name (``Observer.on_hold``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from tests.simulator.client import RETRY_TICKS, Client
from trex_core.messages import Answer, Renew
from trex_core.metadata.commands import (
    Done,
    LeaseGrant,
    LeaseRevoke,
    MemberJoin,
    Reason,
    Rejected,
    decode_command,
    decode_result,
    encode_command,
)
from trex_core.wire import Channel, encode_body, frame

if TYPE_CHECKING:
    from tests.simulator.world import World

NAMES = 2
"""Few, so that tenants compete."""
TTL_MS = 100
"""The shortest lease; each grant asks for a little more, so that no two commands are alike."""
DRIFT_MS = 20
"""What a holder counts less: more than clocks of ``World.clock_rate`` differ in a lease."""
JOIN_PAUSE_TICKS = 4


class Tenant(Client):
    """One lease, one name, one command in flight."""

    def __init__(self, world: World, address: int, tick_us: int) -> None:
        super().__init__(world, address, tick_us)
        self.rate = world.clock_rate()
        self.first_sent_us: dict[int, int] = {}
        self.lease = 0
        self.ttl_ms = 0
        self.sure_until_us = 0
        self.holds = ""
        self.join_at_us = 0
        self.renewals: dict[int, tuple[int, int]] = {}
        """Request -> (lease, when it was sent)."""
        self.renewal = 0
        self.renew_at_us = 0

    def on_time(self, _: object, __: object) -> None:
        """Renew, and go on."""
        if self.lease and self.world.now >= self.sure_until_us:
            self._lose()
        if self.lease and self.world.now >= self.renew_at_us:
            self._renew()
        super().on_time(None, None)

    def _lose(self) -> None:
        if self.holds:
            self.world.counts["names_lost"] += 1
            self.world.observer.on_release(self, self.holds)
        self.lease, self.holds = 0, ""

    def _next_command(self) -> bytes | None:
        world = self.world
        if self.unanswered:
            return None
        self.first_sent_us[self.next] = world.now
        if not self.lease:
            world.tenancies += 1
            self.ttl_ms = TTL_MS + world.tenancies
            return encode_command(LeaseGrant(self.ttl_ms))
        if self.holds:
            if world.random() < 0.9:
                return None
            lease, self.lease = self.lease, 0
            world.observer.on_release(self, self.holds)
            self.holds = ""
            world.counts["names_given_back"] += 1
            return encode_command(LeaseRevoke(lease))
        if world.now < self.join_at_us:
            return None
        world.commands += 1
        name = f"name-{int(world.random() * NAMES)}"
        unlike = {"op": f"{self.address}.{world.commands}"}
        return encode_command(
            MemberJoin(name, None, None, 1, "up", unlike, None, self.lease),
        )

    def _sure_until(self, sent_us: int) -> int:
        return sent_us + int((self.ttl_ms - DRIFT_MS) * 1000 / self.rate)

    def _applied(self, number: int, command: bytes, _: int, body: bytes) -> None:
        world = self.world
        sent_us = self.first_sent_us.pop(number)
        match decode_command(command), decode_result(body):
            case LeaseGrant(), Done(slot=lease):
                self.lease = lease
                self._extend(sent_us)
            case MemberJoin(id=name, lease=lease), Done():
                if lease == self.lease and world.now < self.sure_until_us:
                    self.holds = name
                    world.counts["names_taken"] += 1
                    world.observer.on_hold(self, name, world.now, self.sure_until_us)
            case MemberJoin(), Rejected(reason=reason):
                self.join_at_us = world.now + JOIN_PAUSE_TICKS * self.tick_us
                if reason == Reason.EXISTS:
                    world.counts["names_taken_by_others"] += 1
                else:
                    self.lease = 0
            case LeaseRevoke(), _:
                pass
            case asked, told:
                world.fail(f"{self} asked for {asked} and is told {told}")

    def _extend(self, sent_us: int) -> None:
        world = self.world
        until = self._sure_until(sent_us)
        if until > world.now:
            self.sure_until_us = until
            self.renew_at_us = sent_us + self.ttl_ms * 1000 // 3
        if self.holds:
            world.observer.on_hold(self, self.holds, world.now, self.sure_until_us)

    def _renew(self) -> None:
        world = self.world
        self.renew_at_us = world.now + RETRY_TICKS * self.tick_us // 2
        self.renewal += 1
        self.renewals[self.renewal] = (self.lease, world.now)
        data = frame(self.identity, Channel.CLIENT, encode_body(Renew(self.renewal, (self.lease,))))
        target = world.voters[self.target]
        world.network.connection(
            self.address, target, data, lambda arrived, _: target.on_renew(arrived, self)
        )

    def _answered(self, answer: Answer) -> None:
        world = self.world
        lease, sent_us = self.renewals.pop(answer.id)
        if lease != self.lease:
            return
        if world.now >= self.sure_until_us:
            self._lose()
        elif lease in msgspec.msgpack.decode(answer.body, type=tuple[int, ...]):
            world.counts["leases_renewed"] += 1
            self._extend(sent_us)
        else:
            self._lose()
