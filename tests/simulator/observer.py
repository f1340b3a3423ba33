"""The checkers: what must hold of all nodes together, watched from outside.

This module alone knows what is true in a simulated world. It never looks into a voter's state to
decide; it compares what was sent, what reached a disk, what was handed to a state machine and what
clients were told. Every broken rule raises :class:`Violation` in words.
"""

from __future__ import annotations

from tests.simulator.replica import NEWER_LEVEL, Replica
from trex_core.messages import (
    NO_BALLOT,
    Accept,
    Accepted,
    Ballot,
    Fetched,
    Heartbeat,
    PeerMessage,
    Prepare,
    Promise,
    Tip,
)
from trex_core.metadata.commands import LeaseExpire, encode_command
from trex_core.state import (
    AcceptRecord,
    FixedRun,
    PromiseRecord,
    Record,
    State,
    chain_next,
    genesis_of,
)

FIRST_DISKS = (1 << 16) - 1
"""The bits of voters on the disks they were first formatted on."""
_LEASE_EXPIRE = encode_command(LeaseExpire(0))[1:4]
"""How the one command begins that no client sends: every leader may propose it anew."""


class Violation(AssertionError):  # noqa: N818 - a finding, not an error of the program
    """A promise of the system was broken in a simulated world."""


class Observer:
    """Agreement, one value per (slot, ballot), quorum behind each fixed slot, votes backed by the
    disk and never contradicted, one chain, exactly-once, order without gap, snapshots equal to a
    replay of the log, no vote of a replaced disk counted, no lease held twice."""

    def __init__(self, chain_start: bytes, accept_quorum: int) -> None:
        self.accept_quorum = accept_quorum
        self.log: list[bytes] = []
        """The fixed values: slot n is ``log[n - 1]``."""
        self.chains: list[bytes] = [chain_start]
        """``chains[n]`` is the chain at slot n."""
        self.sent: dict[Ballot, dict[int, bytes]] = {}
        """What was ever proposed: ballot -> slot -> value."""
        self.holders: dict[int, dict[Ballot, int]] = {}
        """Slot -> ballot -> bits of the voters that ever held this accept durably."""
        self.bits: dict[int, int] = {}
        """The bits of voters whose disk was replaced: above ``FIRST_DISKS``, they never count."""
        self.durable_promise: dict[int, Ballot] = {}
        self.told_promise: dict[int, Ballot] = {}
        self.told_accepts: dict[int, dict[int, Ballot]] = {}
        self.stood: dict[Ballot, int] = {}
        """Ballot -> boot of the voter that sent Prepare under it."""
        self.counted: dict[Ballot, int] = {}
        self.applied: dict[bytes, tuple[int, bytes]] = {}
        """Command -> (slot, result) of its one application."""
        self.snapshots: dict[int, bytes] = {}
        self.replayed = Replica("the replay", None, NEWER_LEVEL)
        """The log so far, applied once in order by nobody's process: what replicas must equal."""
        self.holding: dict[str, dict[str, int]] = {}
        """Name -> who -> until when it is sure to hold the name, in true time."""
        self.acknowledged: dict[bytes, int] = {}
        """Command -> slot that a client was told."""
        self.acknowledged_slot = 0
        """The highest of them."""

    # --- what is fixed ----------------------------------------------------------------------

    def on_fixed(self, node: object, before: int, run: FixedRun) -> None:
        """``node``, which had fixed up to ``before``, fixes ``run``."""
        if run.first != before + 1 or not run.values or len(run.values) != len(run.chains):
            raise Violation(f"{node} fixed up to {before} now hands on {run.first}..{run.last}")
        if run.first > len(self.log) + 1:
            raise Violation(f"{node} fixes slot {run.first}: {len(self.log) + 1} is not fixed yet")
        if run.chain_before != self.chains[run.first - 1]:
            raise Violation(f"{node}: chain before slot {run.first} differs")
        log, chains, slot = self.log, self.chains, run.first
        for value, chain in zip(run.values, run.chains, strict=True):
            if slot > len(log):
                self._first_fixed(node, slot, value)
            elif log[slot - 1] != value:
                raise Violation(f"agreement: {node} fixes another value in slot {slot}")
            if chains[slot] != chain:
                raise Violation(f"{node}: chain at slot {slot} differs")
            slot += 1

    def _first_fixed(self, node: object, slot: int, value: bytes) -> None:
        for ballot, voters in self.holders.get(slot, {}).items():
            if (voters & FIRST_DISKS).bit_count() >= self.accept_quorum and self.sent[ballot][
                slot
            ] == value:
                break
        else:
            raise Violation(f"{node} fixes slot {slot}: no accept quorum holds that value durably")
        self.log.append(value)
        self.chains.append(chain_next(self.chains[-1], slot, value))

    # --- what reaches a disk ----------------------------------------------------------------

    def on_durable(self, voter: int, records: tuple[Record, ...]) -> None:
        """``records`` of ``voter`` are synced."""
        for record in records:
            match record:
                case PromiseRecord(ballot=ballot):
                    self._promised(voter, ballot)
                case AcceptRecord(ballot=ballot, first=first, values=values):
                    self._promised(voter, ballot)
                    self._accepted(voter, ballot, first, values)
                case _:
                    pass

    def _promised(self, voter: int, ballot: Ballot) -> None:
        if ballot > self.durable_promise.get(voter, NO_BALLOT):
            self.durable_promise[voter] = ballot

    def _accepted(self, voter: int, ballot: Ballot, first: int, values: tuple[bytes, ...]) -> None:
        sent = self.sent.setdefault(ballot, {})
        bit = self.bits.get(voter, 1 << voter)
        holders = self.holders
        own = ballot.voter == voter
        for slot, value in enumerate(values, first):
            if (sent.setdefault(slot, value) if own else sent.get(slot)) != value:
                raise Violation(f"voter {voter} accepts at {ballot} what slot {slot} never was")
            held = holders.get(slot)
            if held is None:
                held = holders[slot] = {}
            held[ballot] = held.get(ballot, 0) | bit

    def on_recovered(self, voter: int, state: State) -> None:
        """``voter`` restarted with ``state`` read from its disk."""
        told = self.told_promise.get(voter, NO_BALLOT)
        if state.promised < max(told, self.durable_promise.get(voter, NO_BALLOT)):
            raise Violation(f"voter {voter} recovers {state.promised}, it had promised {told}")
        if state.fixed > len(self.log) or state.chain != self.chains[state.fixed]:
            raise Violation(f"voter {voter} recovers a fixed slot {state.fixed} that never was")
        held = {}
        for run in state.accepted:
            self._accepted(voter, run.ballot, run.first, run.values)
            for slot in range(run.first, run.last + 1):
                held[slot] = run.ballot
        for slot, ballot in self.told_accepts.get(voter, {}).items():
            if slot > state.fixed and held.get(slot, NO_BALLOT) < ballot:
                raise Violation(f"voter {voter} forgot that it accepted slot {slot} at {ballot}")
        self._promised(voter, state.promised)

    # --- what is told -----------------------------------------------------------------------

    def on_send(self, voter: int, boot: int, message: PeerMessage) -> None:
        """``voter`` sends ``message``: this is the moment at which it leaves."""
        match message:
            case Accept(ballot=ballot, first=first, values=values, tip=tip):
                if ballot.voter != voter:
                    raise Violation(f"voter {voter} proposes under {ballot}, not its own")
                sent = self.sent.setdefault(ballot, {})
                for slot, value in enumerate(values, first):
                    if sent.setdefault(slot, value) != value:
                        raise Violation(f"two values of slot {slot} were sent at {ballot}")
                self._tip(voter, ballot, tip)
            case Accepted(ballot=ballot, first=first, last=last):
                if ballot < self.told_promise.get(voter, NO_BALLOT):
                    raise Violation(f"voter {voter} accepts at {ballot} below its promise")
                told = self.told_accepts.setdefault(voter, {})
                bit = self.bits.get(voter, 1 << voter)
                for slot in range(first, last + 1):
                    if not self.holders.get(slot, {}).get(ballot, 0) & bit:
                        raise Violation(f"voter {voter} tells an accept of {slot} not on its disk")
                    told[slot] = ballot
            case Promise(ballot=ballot):
                self._promise(voter, message)
            case Prepare(ballot=ballot):
                if ballot.voter != voter:
                    raise Violation(f"voter {voter} stands under {ballot}, not its own")
                if self.stood.setdefault(ballot, boot) != boot:
                    raise Violation(f"ballot {ballot} is used again after a restart")
                if self.durable_promise.get(voter, NO_BALLOT) < ballot:
                    raise Violation(f"voter {voter} stands under {ballot} before it is on disk")
            case Heartbeat(ballot=ballot, tip=tip):
                self._tip(voter, ballot, tip)
            case Fetched(first=first, accepted_at=ballot, values=values):
                for slot, value in enumerate(values, first):
                    if self.sent.get(ballot, {}).get(slot) != value:
                        raise Violation(f"voter {voter} serves a wrong value of {slot} at {ballot}")
            case _:
                pass

    def _promise(self, voter: int, part: Promise) -> None:
        if self.durable_promise.get(voter, NO_BALLOT) < part.ballot:
            raise Violation(f"voter {voter} tells promise {part.ballot} before it is on its disk")
        if part.ballot < self.told_promise.get(voter, NO_BALLOT):
            raise Violation(f"voter {voter} promises {part.ballot} below its promise")
        self.told_promise[voter] = part.ballot
        named: dict[int, Ballot] = {}
        bit = self.bits.get(voter, 1 << voter)
        for pairs in part.accepted:
            for slot in range(pairs.first, pairs.last + 1):
                named[slot] = pairs.ballot
                if not self.holders.get(slot, {}).get(pairs.ballot, 0) & bit:
                    raise Violation(f"voter {voter} names an accept of {slot} it never made")
        for slot, ballot in self.told_accepts.get(voter, {}).items():
            inside = slot >= part.first and (slot <= part.last or part.last == 0)
            if inside and named.get(slot, NO_BALLOT) < ballot:
                raise Violation(f"voter {voter} hides its accept of {slot} at {ballot}")

    def _tip(self, voter: int, ballot: Ballot, tip: Tip) -> None:
        if tip.fixed >= len(self.chains) or self.chains[tip.fixed] != tip.chain:
            raise Violation(f"voter {voter} announces slot {tip.fixed}, which is not fixed so")
        done = self.counted.get(ballot, 0)
        if tip.fixed <= done:
            return
        for slot in range(max(tip.counted, done + 1), tip.fixed + 1):
            held = self.holders.get(slot, {}).get(ballot, 0) & FIRST_DISKS
            if held.bit_count() < self.accept_quorum:
                raise Violation(f"voter {voter} says it counted {slot} at {ballot}, it did not")
        self.counted[ballot] = tip.fixed

    # --- state machines and clients ---------------------------------------------------------

    def on_applied(self, node: object, slot: int, command: bytes, result: bytes) -> None:
        """``node`` applied ``command``, which is unique in this world, in ``slot``."""
        if command[1:4] == _LEASE_EXPIRE:
            command += slot.to_bytes(8, "big")
        first = self.applied.setdefault(command, (slot, result))
        if first[0] != slot:
            raise Violation(f"exactly-once: {node} applies in slot {slot} a command of {first[0]}")
        if first[1] != result:
            raise Violation(f"{node}: slot {slot} has another result than elsewhere")

    def on_answer(self, client: object, command: bytes, slot: int, body: bytes) -> None:
        """``client`` is told that ``command`` is done in ``slot``."""
        first = self.applied.get(command)
        if first is None:
            raise Violation(f"{client} is told slot {slot} for a command nobody applied")
        if first != (slot, body):
            raise Violation(f"{client} is told slot {slot}, the command was applied in {first[0]}")
        self.acknowledged[command] = slot
        self.acknowledged_slot = max(self.acknowledged_slot, slot)

    def on_snapshot(self, node: object, slot: int, data: bytes) -> None:
        """``node`` cut, or took over, a snapshot at ``slot``."""
        expected = self.snapshots.get(slot)
        if expected is None:
            expected = self.snapshots[slot] = self.replay(slot)
        if expected != data:
            raise Violation(f"{node}: its snapshot at slot {slot} is not what a replay gives")

    def replay(self, slot: int) -> bytes:
        """The snapshot at ``slot``, from all slots up to it and from nothing else."""
        replayed = self.replayed
        if slot < replayed.slot:  # seldom: the first snapshot here comes after one further on
            self.replayed = replayed = Replica("the replay", None, NEWER_LEVEL)
        while replayed.slot < slot:
            replayed.apply(replayed.slot + 1, self.log[replayed.slot])
        genesis = genesis_of(1, (self.log[0],), None)
        if genesis is None:
            raise Violation("slot 1 holds no genesis")
        return replayed.snapshot(self.chains[slot], genesis)

    # --- leases -----------------------------------------------------------------------------

    def on_hold(self, who: object, name: str, now: int, until: int) -> None:
        """From ``now`` to ``until`` (true times) ``who`` is sure that it alone holds ``name``."""
        held = self.holding.setdefault(name, {})
        for other, end in held.items():
            if other != str(who) and end > now:
                raise Violation(f"{name} is granted twice: {who} has it and {other} until {end}")
        held[str(who)] = until

    def on_release(self, who: object, name: str) -> None:
        """``who`` no longer counts on ``name``."""
        self.holding.get(name, {}).pop(str(who), None)

    def forget(self, voter: int) -> None:
        """The disk of ``voter`` was replaced: nothing it said is on it. What it told others counts
        still; what it says from now on must be counted by nobody."""
        self.bits[voter] = 1 << (voter + 16)
        self.durable_promise.pop(voter, None)
        self.told_promise.pop(voter, None)
        self.told_accepts.pop(voter, None)
        self.stood = {b: boot for b, boot in self.stood.items() if b.voter != voter}

    def fail(self, words: str) -> None:
        """A checker elsewhere found a broken rule."""
        raise Violation(words)
