"""Voters around a table: real steps, no clock of their own, every letter handed over by the test.

This module alone lets a test say in which order things happen: who ticks, which letter arrives,
which is lost, when a disk is synced, who crashes. The checkers watch as in a :class:`World`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any

import msgspec

from tests.simulator.observer import Observer, Violation
from trex_core import paxos
from trex_core.invariants import check_step
from trex_core.messages import VOTES, CatchUp, Kind, PeerMessage, Value, decode_value, encode_value
from trex_core.quorum import Majority
from trex_core.state import (
    CatchUpFailed,
    Config,
    Event,
    Leader,
    Learn,
    Propose,
    Receive,
    Record,
    State,
    Tick,
    chain_start,
    first_state,
    replay,
)

CLUSTER_ID = b"around-one-table"


class Letter(msgspec.Struct, frozen=True):
    """A message under way."""

    source: int
    target: int
    incarnation: int
    boot: int
    message: PeerMessage


class Seat:
    """One voter: its state, what its disk holds, what waits for the next sync."""

    def __init__(self, voter: int) -> None:
        self.voter = voter
        self.incarnation = 1000 + voter
        self.boot = 0
        self.up = False
        self.state: State
        self.config: Config
        self.disk: list[Record] = []
        self.unsynced: list[Record] = []
        self.votes: list[tuple[int, PeerMessage]] = []
        self.fixed = 0
        self.crash_after: int | None = None
        """Crash when this many more records are durable."""

    def __str__(self) -> str:
        return f"voter {self.voter}"


Choice = Callable[[Letter], bool]


class Table:
    """``voters`` voters. With ``autosync`` a disk is synced at the end of each step."""

    def __init__(
        self,
        voters: int = 3,
        *,
        core: ModuleType = paxos,
        check_steps: bool = True,
        autosync: bool = True,
        seed: int = 0,
    ) -> None:
        self.core = core
        self.check_steps = check_steps
        self.autosync = autosync
        self.seed = seed
        self.ids = tuple(range(1, voters + 1))
        self.letters: list[Letter] = []
        self.observer = Observer(chain_start(CLUSTER_ID), Majority(self.ids).accept_weight)
        self.seats = {voter: Seat(voter) for voter in self.ids}
        for voter in self.ids:
            self.start(voter)

    # --- life -------------------------------------------------------------------------------

    def start(self, voter: int) -> None:
        """Start a voter from its disk, under the next boot number."""
        seat = self.seats[voter]
        seat.boot += 1
        seat.up = True
        seat.unsynced, seat.votes = [], []
        seat.config = Config(
            voter=voter,
            voters=self.ids,
            incarnation=seat.incarnation,
            boot=seat.boot,
            seed=self.seed,
            heartbeat_ticks=1,
            election_ticks_min=5,
            election_ticks_max=10,
            retry_ticks=2,
        )
        state = first_state(CLUSTER_ID)
        seat.fixed = 0
        for record in seat.disk:
            state, runs = replay(state, record)
            for run in runs:
                self.observer.on_fixed(seat, seat.fixed, run)
                seat.fixed = run.last
        seat.state = state
        self.observer.on_recovered(voter, state)

    def crash(self, voter: int) -> None:
        """What is not synced is gone, and with it the votes that waited."""
        self.seats[voter].up = False

    def restart(self, voter: int) -> None:
        """Crash and start."""
        self.crash(voter)
        self.start(voter)

    def wipe(self, voter: int) -> None:
        """Its disk is replaced by a fresh one, formatted anew: a new incarnation."""
        seat = self.seats[voter]
        seat.disk = []
        seat.incarnation += 1_000_000
        seat.boot = 0
        self.observer.forget(voter)
        self.start(voter)

    # --- steps ------------------------------------------------------------------------------

    def step(self, voter: int, event: Event) -> None:
        """One step; effects as a shell carries them out."""
        seat = self.seats[voter]
        if not seat.up:
            return
        before = seat.state
        after, effects = self.core.step(seat.config, before, event)
        if self.check_steps:
            check_step(seat.config, before, event, after, effects)
        seat.state = after
        if after.halted:
            seat.up = False
        seat.unsynced.extend(effects.records)
        for send in effects.sends:
            if isinstance(send.message, VOTES):
                seat.votes.append((send.to, send.message))
            else:
                self._post(seat, send.to, send.message)
        for run in effects.fixed:
            self.observer.on_fixed(seat, seat.fixed, run)
            seat.fixed = run.last
        if self.autosync:
            self.sync(voter)

    def _post(self, seat: Seat, to: int, message: PeerMessage) -> None:
        if not isinstance(message, CatchUp):
            self.observer.on_send(seat.voter, seat.boot, message)
        self.letters.append(Letter(seat.voter, to, seat.incarnation, seat.boot, message))

    def sync(self, voter: int) -> None:
        """The disk holds what was written; the votes leave."""
        seat = self.seats[voter]
        records, seat.unsynced = seat.unsynced, []
        if seat.crash_after is not None and len(records) >= seat.crash_after > 0:
            records = records[: seat.crash_after]
            seat.disk.extend(records)
            self.observer.on_durable(voter, tuple(records))
            seat.crash_after = None
            seat.votes = []
            self.crash(voter)
            return
        if seat.crash_after is not None:
            seat.crash_after -= len(records)
        seat.disk.extend(records)
        self.observer.on_durable(voter, tuple(records))
        votes, seat.votes = seat.votes, []
        for to, message in votes:
            self._post(seat, to, message)

    def tick(self, *voters: int, times: int = 1) -> None:
        """These voters' clocks tick."""
        for _ in range(times):
            for voter in voters:
                self.step(voter, Tick())

    def propose(self, voter: int, *names: str) -> None:
        """Commands, in the next slots."""
        role = self.seats[voter].state.role
        if not isinstance(role, Leader):
            raise Violation(f"voter {voter} does not lead")
        values = tuple(
            encode_value(Value(Kind.COMMAND, role.ballot, command=name.encode())) for name in names
        )
        self.step(voter, Propose(values))

    # --- letters ----------------------------------------------------------------------------

    def deliver(self, choice: Choice = lambda _: True) -> int:
        """Hand over the letters chosen among those under way now, in the order they were sent."""
        chosen = [letter for letter in self.letters if choice(letter)]
        for letter in chosen:
            self.letters.remove(letter)
            self.hand_over(letter)
        return len(chosen)

    def hand_over(self, letter: Letter) -> None:
        """One letter arrives (it must no longer be in ``letters``)."""
        message = letter.message
        if isinstance(message, CatchUp):
            self._catch_up(letter.source, letter.target, message.first)
        else:
            self.step(
                letter.target, Receive(letter.source, letter.incarnation, letter.boot, message)
            )

    def drop(self, choice: Choice = lambda _: True) -> int:
        """Lose the letters chosen. A catch-up that is lost is a connection that fails."""
        lost = [letter for letter in self.letters if choice(letter)]
        for letter in lost:
            self.letters.remove(letter)
        for letter in lost:
            self.lose(letter)
        return len(lost)

    def lose(self, letter: Letter) -> None:
        """One letter is lost (it must no longer be in ``letters``)."""
        if isinstance(letter.message, CatchUp):
            self.step(letter.source, CatchUpFailed(letter.target))

    def _catch_up(self, asker: int, served_by: int, first: int) -> None:
        seat = self.seats[served_by]
        if not seat.up:
            self.step(asker, CatchUpFailed(served_by))
            return
        values = tuple(self.observer.log[first - 1 : seat.fixed])
        chain = self.observer.chains[first - 1] if first <= seat.fixed + 1 else b""
        self.step(asker, Learn(served_by, first, chain, values, seat.fixed))

    # --- longer stretches -------------------------------------------------------------------

    def run(self, among: Collection[int] | None = None, rounds: int = 50) -> None:
        """Hand over all letters among these voters until there are none; lose all others."""
        for _ in range(rounds):
            self.drop(lambda x: not _both(x, among))
            if not self.deliver():
                return

    def settle(self, among: Collection[int] | None = None, ticks: int = 12) -> None:
        """Let time pass among these voters, on a network without faults."""
        members = sorted(among if among is not None else self.ids)
        for _ in range(ticks):
            self.tick(*members)
            self.run(members)

    def elect(self, voter: int, among: Collection[int] | None = None, ticks_max: int = 120) -> None:
        """Let time pass until ``voter`` leads: only its clock runs fast, the others hear no
        leader. Letters to others are lost."""
        members = sorted(among if among is not None else self.ids)
        others = [m for m in members if m != voter]
        self.drop()
        for other in others:
            self._deafen(other)
        for _ in range(ticks_max):
            self.tick(voter)
            self.run(members)
            if self.leads(voter):
                return
        raise Violation(f"voter {voter} does not lead after {ticks_max} ticks: {self.describe()}")

    def _deafen(self, voter: int) -> None:
        """Its clock runs until it would no longer say that it hears a leader."""
        seat = self.seats[voter]
        state = seat.state
        if state.leader.round and not isinstance(state.role, Leader):
            quiet = state.heard_tick + seat.config.election_ticks_min - state.tick
            for _ in range(quiet):
                self.tick(voter)
            self.drop(lambda x: x.source == voter)

    # --- looking ----------------------------------------------------------------------------

    def leads(self, voter: int) -> bool:
        """Does it believe it leads?"""
        seat = self.seats[voter]
        return seat.up and isinstance(seat.state.role, Leader)

    @property
    def leaders(self) -> list[int]:
        """All that believe they lead."""
        return [voter for voter in self.ids if self.leads(voter)]

    def names(self, first: int = 2) -> list[str]:
        """The commands fixed from slot ``first``; a no-op is "-"."""
        return [
            decode_value(value).command.decode()
            if decode_value(value).kind == Kind.COMMAND
            else "-"
            for value in self.observer.log[first - 1 :]
        ]

    def expect_converged(self, among: Iterable[int] | None = None) -> None:
        """All these voters have fixed all that is fixed."""
        slot = len(self.observer.log)
        for voter in among if among is not None else self.ids:
            seat = self.seats[voter]
            if not seat.up or seat.fixed != slot:
                raise Violation(f"voter {voter} is at {seat.fixed} of {slot}: {self.describe()}")

    def describe(self) -> str:
        """All voters in a line."""
        return " | ".join(
            f"{seat.voter}{'' if seat.up else ' down'} {type(seat.state.role).__name__}"
            f" {seat.state.promised} {seat.state.fixed}/{seat.state.last_accepted}"
            for seat in self.seats.values()
        )


def _both(letter: Letter, among: Collection[int] | None) -> bool:
    return among is None or (letter.source in among and letter.target in among)


def of(*kinds: type[Any], source: int | None = None, target: int | None = None) -> Choice:
    """Letters with a message of one of these kinds (any, if none is named), from and to."""

    def choice(letter: Letter) -> bool:
        return (
            (not kinds or isinstance(letter.message, kinds))
            and source in (None, letter.source)
            and target in (None, letter.target)
        )

    return choice
