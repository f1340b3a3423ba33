"""A simulated listener: the real ``learn`` between a lossy stream and a store.

This module alone carries out the learner's effects: it delivers, asks for repair by multicast,
and catches up over TCP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulator.observer import Violation
from tests.simulator.replica import Replica
from trex_core import learner
from trex_core.messages import (
    AskOther,
    CatchupEntries,
    CatchupRequest,
    ListenerReport,
    RepairRequest,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
    StreamRun,
    StreamTip,
)
from trex_core.state import chain_start
from trex_core.wire import (
    Channel,
    FrameBuffer,
    FrameError,
    Identity,
    decode_catchup,
    decode_stream,
    encode_body,
    frame,
    unframe,
)

if TYPE_CHECKING:
    from tests.simulator.world import World

STORE_EVERY_SLOTS = 5


class Listener:
    """One listener process and its store."""

    def __init__(self, world: World, address: int, tick_us: int) -> None:
        self.world = world
        self.address = address
        self.tick_us = tick_us
        self.up = True
        self.paused_until = 0
        self.boot = 0
        self.name = f"listener-{address}"
        self.identity = Identity(world.cluster_id)
        self.config = learner.LearnerConfig(name=self.name, seed=address, voters=world.voter_ids)
        self.replica = Replica(self, world.observer)
        self.stored = Replica(self, world.observer)
        self.stored_chain = chain_start(world.cluster_id)
        self.chain = self.stored_chain

    def __str__(self) -> str:
        return f"listener {self.address}"

    def start(self) -> None:
        """Run from what is stored."""
        self.boot += 1
        self.replica.copy_from(self.stored)
        self.chain = self.stored_chain
        self.state = learner.first_state(self.world.cluster_id, self.replica.slot, self.chain)
        self.download = b""
        self.wake_at: int | None = None
        self._take(learner.Clock(self._now_ms()))

    def restart(self) -> None:
        """Killed, and started again: what was not stored is delivered again."""
        self.world.counts["listener_restarts"] += 1
        self.start()

    def _now_ms(self) -> int:
        return self.world.now * 10 // self.tick_us  # its own clock: skewed like its tick

    # --- events -----------------------------------------------------------------------------

    def on_stream(self, data: bytes, _: object) -> None:
        """A datagram of the stream."""
        world = self.world
        try:
            part = unframe(data, world.cluster_id, Channel.STREAM)
            message = decode_stream(part.body)
        except FrameError as error:
            world.counts[f"dropped_{error.reason}"] += 1
            return
        match message:
            case StreamRun() | StreamTip():
                self._take(learner.StreamIn(part.sender, message, self._now_ms()))
            case RepairRequest():
                self._take(learner.RepairHeard(message, self._now_ms()))
            case ListenerReport():
                raise AssertionError("nobody reports here")

    def on_wake(self, boot: int, due: int) -> None:
        """The time the learner asked for."""
        if boot == self.boot and self.wake_at == due:
            self.wake_at = None
            self._take(learner.Clock(self._now_ms()))

    def _take(self, event: learner.LearnerEvent) -> None:
        world = self.world
        self.state, effects = world.learner.learn(self.config, self.state, event)
        for name in effects.counters:
            world.counts[f"learner_{name}"] += 1
        for run in effects.deliver:
            world.observer.on_fixed(self, self.replica.slot, run)
            for slot, value in enumerate(run.values, run.first):
                self.replica.apply(slot, value)
            self.chain = run.chains[-1]
            if self.replica.slot >= self.stored.slot + STORE_EVERY_SLOTS:
                self._store()
        for request in effects.requests:
            self._multicast(request)
        for ask in effects.catchup:
            self._ask(ask.voter, CatchupRequest(self.name, ask.first))
        if effects.wake_ms is not None:
            due = max(effects.wake_ms * self.tick_us // 10, world.now + 500)
            if self.wake_at is None or due < self.wake_at or self.wake_at <= world.now:
                self.wake_at = due
                world.push(due - world.now, self, self.on_wake, self.boot, due)

    def _store(self) -> None:
        self.stored.copy_from(self.replica)
        self.stored_chain = self.chain

    def _multicast(self, request: RepairRequest) -> None:
        world = self.world
        data = frame(self.identity, Channel.STREAM, encode_body(request))
        for voter in world.voters.values():
            world.network.datagram(self.address, voter, data, voter.on_repair)
        for other in world.listeners:
            if other is not self:
                world.network.datagram(self.address, other, data, other.on_stream)

    # --- catching up ------------------------------------------------------------------------

    def _ask(self, to: int, request: CatchupRequest | SnapshotRequest) -> None:
        world = self.world
        world.counts["listener_catch_ups"] += 1
        world.call(
            self,
            world.voters[to],
            frame(self.identity, Channel.CATCHUP, encode_body(request)),
            lambda reply, _: self._on_catch_up(to, reply),
            lambda _, __: self._take(learner.CatchupFailed(to, self._now_ms())),
            self.boot,
        )

    def _on_catch_up(self, to: int, reply: bytes) -> None:
        (part,) = FrameBuffer(self.world.cluster_id, Channel.CATCHUP).feed(reply)
        match decode_catchup(part.body):
            case CatchupEntries() | AskOther() as answer:
                self._take(learner.CatchupIn(to, answer, self._now_ms()))
            case SnapshotOffer(slot=slot):
                self.download = b""
                self._ask(to, SnapshotRequest(slot, 0))
            case SnapshotChunk(slot=slot, data=data):
                self.download += data
                if data:
                    self._ask(to, SnapshotRequest(slot, len(self.download)))
                else:
                    self._install(slot)
            case other:
                raise Violation(f"{self} got {other} in answer to a catch-up request")

    def _install(self, slot: int) -> None:
        """A jump by snapshot is atomic, and never back."""
        world = self.world
        world.observer.on_snapshot(self, slot, self.download)
        if slot > self.replica.slot:
            slot, self.chain, _ = self.replica.restore(self.download)
            self._store()
            world.counts["listener_snapshots_installed"] += 1
        self._take(learner.Installed(slot, world.observer.chains[slot], self._now_ms()))
