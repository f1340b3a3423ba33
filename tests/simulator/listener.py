"""A simulated listener: the real ``learn`` between a lossy stream and a store.

This module alone carries out the learner's effects: it delivers, asks for repair by multicast,
and catches up over TCP.  With the real ``shelf`` it helps others, and tells them so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulator.observer import Violation
from tests.simulator.replica import Replica
from trex_core import learner
from trex_core.machine import TooOld
from trex_core.messages import (
    NO_BALLOT,
    RUN_BYTES_MAX,
    VOTER_ID_MAX,
    AskOther,
    CatchupEntries,
    CatchupRequest,
    ListenerReport,
    RepairRequest,
    SignedTip,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
    StreamRun,
    StreamTip,
)
from trex_core.shelf import Piece, Shelf
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
    from tests.simulator.voter import Voter
    from tests.simulator.world import World

STORE_EVERY_SLOTS = 5
REPORT_EVERY_SLOTS = 8
REPORT_TICKS = 30
SHELF_SLOTS_MAX = 64
"""Few, so that helpers have to send others away."""
ENTRIES_MAX = 16


class Listener:
    """One listener process and its store."""

    def __init__(self, world: World, address: int, tick_us: int) -> None:
        self.world = world
        self.address = address
        self.tick_us = tick_us
        self.up = True
        self.paused_until = 0
        self.life = 0
        self.name = f"listener-{address}"
        self.instance = VOTER_ID_MAX + 1 + address
        self.identity = Identity(world.cluster_id, incarnation=self.instance)
        options = world.options
        self.config = learner.LearnerConfig(
            name=self.name,
            seed=address,
            voters=world.voter_ids,
            silence_ms=options.silence_ms,
            retry_ms=options.retry_ms,
        )
        self.level = 1
        """The feature level its program knows; an upgrade comes with a restart."""
        self.replica = Replica(self, world.observer)
        self.stored = Replica(self, world.observer)
        self.stored_chain = chain_start(world.cluster_id)
        self.chain = self.stored_chain

    def __str__(self) -> str:
        return f"listener {self.address}"

    def start(self) -> None:
        """Run from what is stored."""
        self.life += 1
        self.up = True
        self.replica = Replica(self, self.world.observer, self.level)
        self.replica.copy_from(self.stored)
        self.chain = self.stored_chain
        self.state = learner.first_state(self.world.cluster_id, self.replica.slot, self.chain)
        self.shelf = Shelf(self._count, 1 << 20, slots_max=SHELF_SLOTS_MAX, bytes_max=RUN_BYTES_MAX)
        self.shelf.reset(self.replica.slot, self.chain)
        self.download = b""
        self.wake_at: int | None = None
        self._take(learner.Clock(self._now_ms()))
        self.world.push(REPORT_TICKS * self.tick_us, self, self.on_report, self.life, None)

    def restart(self) -> None:
        """Killed, and started again: what was not stored is delivered again."""
        self.world.counts["listener_restarts"] += 1
        self.start()

    def _count(self, name: str) -> None:
        self.world.counts[f"helper_{name}"] += 1

    def _now_ms(self) -> int:
        return self.world.now * 10 // self.tick_us  # its own clock: skewed like its tick

    # --- events -----------------------------------------------------------------------------

    def on_report(self, life: int, _: object) -> None:
        """Time to tell the others how this one is."""
        if life == self.life and self.up:
            self._report()
            self.world.push(REPORT_TICKS * self.tick_us, self, self.on_report, life, None)

    def on_stream(self, data: bytes, _: object) -> None:
        """A datagram of the stream."""
        world = self.world
        if not self.up:
            return
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
                if message.responder == self.instance:
                    self.shelf.request(message.first, message.last)
                    self.shelf.repair(world.now / 1e6, self._tell)
            case ListenerReport():
                able = message.ready and not message.leaving
                self._take(learner.HelperHeard(message.instance, able, self._now_ms()))

    def on_wake(self, life: int, due: int) -> None:
        """The time the learner asked for."""
        if life == self.life and self.up and self.wake_at == due:
            self.wake_at = None
            self._take(learner.Clock(self._now_ms()))

    def _take(self, event: learner.LearnerEvent) -> None:
        world = self.world
        self.state, effects = world.learner.learn(self.config, self.state, event)
        for name in effects.counters:
            world.counts[f"learner_{name}"] += 1
        for run in effects.deliver:
            world.observer.on_fixed(self, self.replica.slot, run)
            try:
                for slot, value in enumerate(run.values, run.first):
                    self.replica.apply(slot, value)
            except TooOld:
                world.stop_too_old(self)
                return
            self.chain = run.chains[-1]
            if self.shelf.last != run.first - 1:
                self.shelf.reset(run.first - 1, run.chain_before)
            self.shelf.add(run)
            if run.last // REPORT_EVERY_SLOTS != (run.first - 1) // REPORT_EVERY_SLOTS:
                self._report()
            if self.replica.slot >= self.stored.slot + STORE_EVERY_SLOTS:
                self._store()
        for request in effects.requests:
            self._multicast(request)
        for ask in effects.catchup:
            self._ask(ask.helper, CatchupRequest(self.name, ask.first))
        if effects.wake_ms is not None:
            due = max(effects.wake_ms * self.tick_us // 10, world.now + 500)
            if self.wake_at is None or due < self.wake_at or self.wake_at <= world.now:
                self.wake_at = due
                world.push(due - world.now, self, self.on_wake, self.life, due)

    def _store(self) -> None:
        self.stored.copy_from(self.replica)
        self.stored_chain = self.chain

    def _multicast(self, message: RepairRequest | ListenerReport | StreamRun) -> None:
        world = self.world
        data = frame(self.identity, Channel.STREAM, encode_body(message))
        if isinstance(message, RepairRequest):
            for voter in world.voters.values():
                world.network.datagram(self.address, voter, data, voter.on_repair)
        for other in world.listeners:
            if other is not self:
                world.network.datagram(self.address, other, data, other.on_stream)

    # --- helping others ---------------------------------------------------------------------

    def _report(self) -> None:
        """Tell the others where this one is, and that it helps."""
        slot, tip = self.replica.slot, self.state.tip
        numbers = (slot, self.stored.slot, tip, 0)
        report = ListenerReport(
            self.name, self.instance, *numbers, slot == tip, 0, 0, 0, 0, 0, "1", helps="127.0.0.1:1"
        )
        self._multicast(report)

    def _tell(self, piece: Piece) -> int:
        if not piece.values:
            return 0
        self.world.counts["repairs_by_listeners"] += 1
        slots = (piece.first, piece.chain_before, piece.values)
        tip = (self.replica.slot, self.chain)
        self._multicast(StreamRun(NO_BALLOT, *slots, *tip, repair=True))
        return sum(map(len, piece.values))

    def serve(self, data: bytes) -> bytes | None:
        """Answer a catch-up request from what is kept; None: garbage, or not now."""
        if self.paused_until > self.world.now:
            return None
        try:
            (part,) = FrameBuffer(self.world.cluster_id, Channel.CATCHUP).feed(data)
            request = decode_catchup(part.body)
        except FrameError:
            return None
        if not isinstance(request, CatchupRequest):
            return None
        return frame(self.identity, Channel.CATCHUP, encode_body(self._answer(request.first)))

    def _answer(self, first: int) -> CatchupEntries | AskOther:
        shelf = self.shelf
        if not shelf.first <= first <= shelf.last:
            return AskOther(0, "not held here")
        last = shelf.last_within(first, ENTRIES_MAX, RUN_BYTES_MAX)
        piece = shelf.run(first, last)
        assert piece is not None
        after = shelf.run(last + 1, last + 1)
        chain = after.chain_before if after is not None else shelf.chain
        end = SignedTip(last, chain, NO_BALLOT, 0, b"")
        tip = SignedTip(shelf.last, shelf.chain, NO_BALLOT, 0, b"")
        self.world.counts["catch_ups_by_listeners"] += 1
        return CatchupEntries(first, piece.chain_before, piece.values, end, tip)

    # --- catching up ------------------------------------------------------------------------

    def _ask(self, to: int, request: CatchupRequest | SnapshotRequest) -> None:
        world = self.world
        world.counts["listener_catch_ups"] += 1
        helpers: dict[int, Voter | Listener] = {each.instance: each for each in world.listeners}
        helper = helpers[to] if to > VOTER_ID_MAX else world.voters[to]
        world.call(
            self,
            helper,
            frame(self.identity, Channel.CATCHUP, encode_body(request)),
            lambda reply, _: self._on_catch_up(to, reply),
            lambda _, __: self._take(learner.CatchupFailed(to, self._now_ms())),
            self.life,
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
