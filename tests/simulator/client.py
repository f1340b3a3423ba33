"""A simulated client: opens a session, keeps commands in flight, retries under the same id.

This module alone knows what the user was told. Its retries are what exactly-once is checked with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulator.replica import NEWER_LEVEL, at_level
from trex_core.messages import Answer, Kind, Outcome, OutcomeStatus, Refusal, RefusalReason, Submit
from trex_core.metadata.commands import (
    Command,
    ConfigCas,
    ConfigDelete,
    ConfigPut,
    LeaseGrant,
    MemberJoin,
    MemberLeave,
    encode_command,
)
from trex_core.wire import Channel, FrameBuffer, Identity, decode_reply, encode_body, frame

if TYPE_CHECKING:
    from tests.simulator.world import World

RETRY_TICKS = 12
OPEN_ID = 0


class Client:
    """One session; sequences start at 1 and are applied in order."""

    def __init__(self, world: World, address: int, tick_us: int) -> None:
        self.world = world
        self.address = address
        self.tick_us = tick_us
        self.up = True
        self.paused_until = 0
        self.session = 0
        self.next = 1
        self.unanswered: dict[int, bytes] = {}
        self.sent_us: dict[int, int] = {}
        self.answered = 0
        self.target = world.voter_ids[address % len(world.voter_ids)]
        self.stopping = False
        self.heard_us = 0
        self.identity = Identity(world.cluster_id)
        world.push(int(world.random() * tick_us), self, self.on_time, None, None)

    def __str__(self) -> str:
        return f"client {self.address}"

    @property
    def idle(self) -> bool:
        """Nothing is in flight."""
        return self.session > 0 and not self.unanswered

    def on_time(self, _: object, __: object) -> None:
        """Send new commands, and again what was not answered in time."""
        world = self.world
        options = world.options
        world.push(options.submit_every_us, self, self.on_time, None, None)
        if self.session and not self.stopping:
            for _ in range(1 + int(world.random() * options.burst)):
                if len(self.unanswered) < options.in_flight:
                    command = self._next_command()
                    if command is None:
                        break
                    self.unanswered[self.next] = command
                    self.next += 1
        self._send()
        if world.random() < options.reads:
            ids = world.voter_ids
            voter = world.voters[ids[int(world.random() * len(ids))]]
            world.network.connection(self.address, voter, b"read", voter.on_read)

    def _send(self) -> None:
        world = self.world
        before = world.now - RETRY_TICKS * self.tick_us
        if self.heard_us < before:
            self._try_another(0)
        if not self.session:
            if self.sent_us.get(OPEN_ID, -1) <= before:
                self.sent_us[OPEN_ID] = world.now
                self._submit([Submit(OPEN_ID, Kind.OPEN, 0, 0, 0, b"")])
            return
        due = [n for n in self.unanswered if self.sent_us.get(n, -1) <= before]
        if not due:
            return
        if any(n in self.sent_us for n in due):
            world.counts["client_retries"] += 1
        first = min(self.unanswered)
        submits = []
        for n in sorted(due):
            self.sent_us[n] = world.now
            submits.append(Submit(n, Kind.COMMAND, self.session, n, first, self.unanswered[n]))
        self._submit(submits)

    def _submit(self, submits: list[Submit]) -> None:
        identity = self.identity
        data = b"".join(frame(identity, Channel.CLIENT, encode_body(s)) for s in submits)
        target = self.world.voters[self.target]
        self.world.network.connection(
            self.address, target, data, lambda arrived, _: target.on_requests(arrived, self)
        )

    def _try_another(self, hint: int) -> None:
        ids = self.world.voter_ids
        self.heard_us = self.world.now
        if hint in ids:
            self.target = hint
        else:
            self.target = ids[(ids.index(self.target) + 1) % len(ids)]

    def on_reply(self, data: bytes, _: object) -> None:
        """A reply of a voter."""
        world = self.world
        self.heard_us = world.now
        for part in FrameBuffer(world.cluster_id, Channel.CLIENT).feed(data):
            reply = decode_reply(part.body)
            match reply:
                case Outcome(id=number, slot=slot, status=status, body=body):
                    self._outcome(number, slot, status, body)
                case Answer():
                    self._answered(reply)
                case Refusal(id=number, reason=reason, leader=leader):
                    world.counts["client_refusals"] += 1
                    if number in self.unanswered or (number == OPEN_ID and not self.session):
                        self.sent_us[number] = world.now - (RETRY_TICKS - 2) * self.tick_us
                    if reason == RefusalReason.NOT_LEADER:
                        self._try_another(leader)
                    elif reason == RefusalReason.MALFORMED:  # too new for it, not for others
                        self._try_another(0)

    def _outcome(self, number: int, slot: int, status: int, body: bytes) -> None:
        world = self.world
        if number == OPEN_ID:
            if not self.session:
                self.session = slot
            return
        command = self.unanswered.get(number)
        if command is None:
            return
        if status == OutcomeStatus.APPLIED:
            world.observer.on_answer(self, command, slot, body)
            self._applied(number, command, slot, body)
            del self.unanswered[number]
            self.answered += 1
            world.counts["commands_answered"] += 1
        elif status == OutcomeStatus.GAP:
            world.counts["client_gaps"] += 1
            self.sent_us[number] = world.now - (RETRY_TICKS - 2) * self.tick_us
        else:
            world.fail(f"{self} got status {status} for sequence {number}")

    def _applied(self, number: int, command: bytes, slot: int, body: bytes) -> None:
        """What was told of a command that was applied."""

    def _answered(self, answer: Answer) -> None:
        self.world.fail(f"{self} asked for no {answer}")

    def _next_command(self) -> bytes | None:
        """The next command; None: not now."""
        world = self.world
        command = self._command()
        levels = world.options.levels
        if levels and world.newer_voters() > len(world.voters) // 2 and world.random() < levels:
            world.counts["commands_of_the_newer_level"] += 1
            command = at_level(command, NEWER_LEVEL)
        return command

    def _command(self) -> bytes:
        """A command unlike any other in this world, so that each application can be told."""
        world = self.world
        random = world.random
        world.commands += 1
        name = f"{self.address}.{world.commands}"
        if world.options.large and random() < world.options.large:
            name += "x" * int(random() * world.options.large_bytes)
        key = f"k{int(random() * 12)}"
        kind = int(random() * 8)
        command: Command
        if kind < 4:
            command = ConfigPut(key, name)
        elif kind == 4:
            command = ConfigCas(key, int(random() * 20), name)
        elif kind == 5:
            command = MemberJoin(key, name[:60], "z", 1, "up", {"op": name}, None, 0)
        elif kind == 6:
            command = LeaseGrant(1_000_000 + world.commands)
        elif random() < 0.5:
            command = ConfigDelete(f"{key}.{name[:40]}")
        else:
            command = MemberLeave(f"{key}.{name[:40]}")
        return encode_command(command)
