"""The state of one voter, the events it takes, the effects it asks for, and its journal records.

This module alone says what a voter remembers.  ``paxos.step`` moves a :class:`State` to the next;
:func:`replay` folds journal records back into one after a restart.  All values are immutable;
small maps are tuples of pairs sorted by key, so states can be compared and hashed.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Final, TypeAlias

import msgspec

from trex_core.messages import (
    CHAIN_BYTES,
    NO_BALLOT,
    Ballot,
    Genesis,
    Kind,
    PeerMessage,
    decode_value,
    value_kind,
)
from trex_core.quorum import Majority, QuorumSystem

# --- configuration --------------------------------------------------------------------------


class Config(msgspec.Struct, frozen=True):
    """What one voter's algorithm is told once. Times are in ticks (the shell says how long one is).

    ``voters`` are all voter ids ascending, ``voter`` is one's own.  ``seed`` feeds the pure hash
    from which election back-off is drawn.  An election timeout is drawn from
    ``election_ticks_min``..``election_ticks_max``; advice: min >= 5 * ``heartbeat_ticks``.
    ``quorum`` counts promises, polls, accepts and heartbeat rounds; None is a majority of voters.
    Raises ``ValueError`` when the fields contradict each other.
    """

    voter: int
    voters: tuple[int, ...]
    incarnation: int
    boot: int
    seed: int = 0
    heartbeat_ticks: int = 4
    election_ticks_min: int = 25
    election_ticks_max: int = 50
    retry_ticks: int = 4
    quorum: QuorumSystem | None = None

    def __post_init__(self) -> None:
        if tuple(sorted(set(self.voters))) != self.voters or self.voter not in self.voters:
            raise ValueError("voters must be ascending, distinct, and contain the voter itself")
        if not 0 < self.heartbeat_ticks * 3 <= self.election_ticks_min < self.election_ticks_max:
            raise ValueError("need 3 * heartbeat_ticks <= election_ticks_min < election_ticks_max")
        if self.quorum is not None and set(self.quorum.weights) != set(self.voters):
            raise ValueError("the quorum system must weigh exactly the voters; 0 is a weight")

    @property
    def quorums(self) -> QuorumSystem:
        """The quorum system: majority unless another was given."""
        return self.quorum if self.quorum is not None else _majority(self.voters)


@functools.lru_cache(maxsize=16)
def _majority(voters: tuple[int, ...]) -> Majority:
    return Majority(voters)


# --- what is remembered ---------------------------------------------------------------------


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Values accepted at ``ballot`` for the slots from ``first``, one each; never empty."""

    first: int
    ballot: Ballot
    values: tuple[bytes, ...]

    @property
    def last(self) -> int:
        """The last slot of the run."""
        return self.first + len(self.values) - 1


class Part(msgspec.Struct, frozen=True):
    """What one voter promised a candidate so far, merged: ``runs`` names (first, last, ballot) of
    what it holds within the covered ranges ``covered`` ((first, last), last 0 = no upper bound)."""

    voter: int
    incarnation: int
    covered: tuple[tuple[int, int], ...]
    runs: tuple[tuple[int, int, Ballot], ...]


class Flight(msgspec.Struct, frozen=True):
    """Slots ``first``..``last`` proposed by the leader; ``votes`` accepted all of them."""

    first: int
    last: int
    votes: tuple[int, ...]
    sent_tick: int
    size_bytes: int


class Follower(msgspec.Struct, frozen=True):
    """Follows whatever leader it hears (``State.leader``)."""


class Polling(msgspec.Struct, frozen=True):
    """Heard no leader for an election timeout and asks whether others do (pre-vote)."""

    attempt: int
    answers: tuple[tuple[int, bool], ...]
    """(voter, does it hear a leader); one's own answer is among them"""
    highest: Ballot
    """The highest ballot promised by anybody who answered."""


class Candidate(msgspec.Struct, frozen=True):
    """Stands under ``ballot`` for all slots from ``first``. ``plan`` is what must be re-proposed
    once a promise quorum is complete; ``fetched`` are values got for it so far."""

    ballot: Ballot
    first: int
    since_tick: int
    parts: tuple[Part, ...]
    silent: tuple[int, ...]
    plan: tuple[tuple[int, int, Ballot], ...] | None
    fetched: tuple[Run, ...]
    fetch_tick: int


class Ack(msgspec.Struct, frozen=True, gc=False):
    """The newest heartbeat answer of ``voter``: the round, its slots, whether its disk has room."""

    voter: int
    beat: int
    fixed: int
    last_accepted: int
    has_room: bool
    tick: int


class Leader(msgspec.Struct, frozen=True):
    """Leads under ``ballot`` since slot ``first``: proposes at ``next_slot``; ``flights`` are the
    proposed slots not yet fixed; slots ``counted``..fixed it counted itself at this ballot."""

    ballot: Ballot
    first: int
    next_slot: int
    counted: int
    flights: tuple[Flight, ...]
    beat: int
    beat_ticks: tuple[tuple[int, int], ...]
    """(beat, tick at which it was sent) of the newest heartbeats, to date answers."""
    acks: tuple[Ack, ...]
    """The newest answer of each other voter, sorted by voter."""
    beat_acked: int
    """The newest heartbeat round that an accept quorum acknowledged."""
    quorum_tick: int
    """When the newest round acknowledged by an accept quorum was *sent*."""
    since_tick: int
    """When this leadership began."""
    announced: int
    """The fixed slot told to followers last."""
    handover: tuple[int, int] | None = None
    """(voter that is to lead, tick at which to give up waiting), while draining."""


Role: TypeAlias = Follower | Polling | Candidate | Leader


class Chase(msgspec.Struct, frozen=True):
    """A catch-up under way. ``goal`` is a slot known to be fixed; ``hint`` is who told. Until
    somebody is asked ``asked`` is 0; at ``until_tick`` the next voter is asked."""

    asked: int
    hint: int
    goal: int
    attempt: int
    until_tick: int


class State(msgspec.Struct, frozen=True):
    """All that one voter knows. Durable: ``promised``, ``fixed``, ``chain``, ``accepted``,
    ``genesis``. The rest dies with the process.

    ``accepted`` holds only slots above ``fixed``: ascending, disjoint runs.
    """

    promised: Ballot
    fixed: int
    chain: bytes
    accepted: tuple[Run, ...]
    genesis: Genesis | None
    role: Role = Follower()
    tick: int = 0
    leader: Ballot = NO_BALLOT
    """Ballot of the leader heard last; NO_BALLOT when there is none."""
    heard_tick: int = 0
    """When that leader was heard last (younger than its own quorum age)."""
    deadline: int = 0
    """Tick at which a follower polls, or a poller or candidate tries again."""
    attempt: int = 0
    """Elections tried since a leader was heard; grows the back-off."""
    boots: tuple[tuple[int, int], ...] = ()
    """(voter, highest boot number heard)"""
    chase: Chase | None = None
    has_room: bool = True
    """Whether the own journal disk has room for accepts."""
    halted: str = ""
    """Why this voter must stop, in words; once set, no event changes anything any more."""
    chain_marks: tuple[tuple[int, bytes], ...] = ()
    """(slot, own chain) at the newest multiples of CHAIN_CHECK_SLOTS"""
    chain_reports: tuple[tuple[int, int, bytes], ...] = ()
    """(voter, slot, its chain) as reported"""

    @property
    def last_accepted(self) -> int:
        """The highest slot accepted or fixed."""
        return self.accepted[-1].last if self.accepted else self.fixed


def first_state(cluster_id: bytes) -> State:
    """The state of a freshly formatted voter: nothing promised, ``chain[0]`` = cluster id padded
    or hashed to CHAIN_BYTES."""
    return State(
        promised=NO_BALLOT, fixed=0, chain=chain_start(cluster_id), accepted=(), genesis=None
    )


# --- the hash chain -------------------------------------------------------------------------


def chain_start(cluster_id: bytes) -> bytes:
    """``chain[0]``: the 16-byte cluster id, zero-padded to 32 bytes."""
    return cluster_id.ljust(CHAIN_BYTES, b"\0")


def chain_next(before: bytes, slot: int, value: bytes) -> bytes:
    """``chain[n] = BLAKE2b-256(chain[n-1], n as 8 bytes, kind as 1 byte, value)``."""
    return hashlib.blake2b(
        b"".join((before, slot.to_bytes(8, "big"), value[1:2], value)), digest_size=32
    ).digest()


def chain_run(before: bytes, first: int, values: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The chain at each slot of a run that starts at ``first``."""
    chains = []
    for slot, value in enumerate(values, first):
        before = chain_next(before, slot, value)
        chains.append(before)
    return tuple(chains)


# --- events ---------------------------------------------------------------------------------


class Tick(msgspec.Struct, frozen=True, gc=False):
    """One tick of time passed."""


class Receive(msgspec.Struct, frozen=True, gc=False):
    """A message came from ``sender`` (or from oneself), with the incarnation and boot number its
    frame carried."""

    sender: int
    incarnation: int
    boot: int
    message: PeerMessage


class Propose(msgspec.Struct, frozen=True, gc=False):
    """Propose these encoded values in the next slots, in order. Ignored unless leading (and not
    draining): the shell looks at ``Leader.next_slot`` before and after."""

    values: tuple[bytes, ...]


class Learn(msgspec.Struct, frozen=True, gc=False):
    """Fixed entries from catch-up at ``voter``: ``values`` from ``first``; ``tip_slot`` is the
    newest fixed slot there. Empty ``values``: it has nothing newer yet."""

    voter: int
    first: int
    chain_before: bytes
    values: tuple[bytes, ...]
    tip_slot: int


class CatchUpFailed(msgspec.Struct, frozen=True, gc=False):
    """The catch-up conversation with ``voter`` failed or was sent away: try another."""

    voter: int


class Install(msgspec.Struct, frozen=True, gc=False):
    """A snapshot at ``slot`` was downloaded, verified and is durable on disk."""

    slot: int
    chain: bytes
    genesis: Genesis


class StartHandOver(msgspec.Struct, frozen=True, gc=False):
    """Hand leadership to ``to`` (0: the most up to date peer)."""

    to: int


class DiskRoom(msgspec.Struct, frozen=True, gc=False):
    """The journal disk has room for accepts, or has not."""

    has_room: bool


class Beat(msgspec.Struct, frozen=True, gc=False):
    """Start a heartbeat round at once (a read or a lease renewal waits for its quorum)."""


Event: TypeAlias = (
    Tick | Receive | Propose | Learn | CatchUpFailed | Install | StartHandOver | DiskRoom | Beat
)


# --- effects --------------------------------------------------------------------------------


class PromiseRecord(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """``ballot`` is promised."""

    ballot: Ballot


class AcceptRecord(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """``values`` are accepted at ``ballot`` (which is thereby promised) from slot ``first``."""

    ballot: Ballot
    first: int
    values: tuple[bytes, ...]


class FixedRecord(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """What is accepted up to slot ``last`` is fixed; the chain at ``last`` is ``chain``."""

    last: int
    chain: bytes


class LearnedRecord(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """``values`` are fixed from slot ``first``, learned from another voter; ``chain`` at the last.
    No accept of anybody is claimed by it and it has no ballot."""

    first: int
    values: tuple[bytes, ...]
    chain: bytes


class InstallRecord(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """The snapshot at ``slot`` replaces all up to there."""

    slot: int
    chain: bytes
    genesis: Genesis


Record: TypeAlias = PromiseRecord | AcceptRecord | FixedRecord | LearnedRecord | InstallRecord


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send ``message`` to voter ``to`` (oneself allowed: deliver it as a ``Receive``)."""

    to: int
    message: PeerMessage


class FixedRun(msgspec.Struct, frozen=True, gc=False):
    """Newly fixed slots from ``first``, with the chain at each; to be applied in this order."""

    first: int
    chain_before: bytes
    values: tuple[bytes, ...]
    chains: tuple[bytes, ...]

    @property
    def last(self) -> int:
        """The last slot of the run."""
        return self.first + len(self.values) - 1


class Effects(msgspec.Struct, frozen=True, gc=False):
    """What the shell must do after a step, in this contract:

    1. ``records``: append to the journal, in order.
    2. ``sends``: a *vote* (Prepare, Promise, Accepted; ``messages.VOTES``) leaves, or is delivered
       to oneself, only after all records of this and earlier steps are synced. Everything else
       may leave at once.
    3. ``fixed``: apply to the state machine, publish, answer clients: at once, in order.

    Effects of successive steps concatenate field by field. Source: PMS §2.5; etcd-io/raft Ready.
    """

    records: tuple[Record, ...] = ()
    sends: tuple[Send, ...] = ()
    fixed: tuple[FixedRun, ...] = ()


NO_EFFECTS: Final = Effects()


# --- accepted runs --------------------------------------------------------------------------


def overlay(runs: tuple[Run, ...], new: Run) -> tuple[Run, ...]:
    """``runs`` with the slots of ``new`` replaced by it; still ascending and disjoint."""
    if not runs or runs[-1].last < new.first:
        return (*runs, new)
    out: list[Run] = []
    placed = False
    for run in runs:
        if run.last < new.first:
            out.append(run)
            continue
        if run.first < new.first:
            out.append(Run(run.first, run.ballot, run.values[: new.first - run.first]))
        if not placed:
            out.append(new)
            placed = True
        if run.last > new.last:
            first = max(run.first, new.last + 1)
            out.append(Run(first, run.ballot, run.values[first - run.first :]))
    return tuple(out)


def above(runs: tuple[Run, ...], slot: int) -> tuple[Run, ...]:
    """``runs`` without the slots up to ``slot``."""
    if not runs or runs[0].first > slot:
        return runs
    out = []
    for run in runs:
        if run.first > slot:
            out.append(run)
        elif run.last > slot:
            out.append(Run(slot + 1, run.ballot, run.values[slot + 1 - run.first :]))
    return tuple(out)


def contiguous(
    runs: tuple[Run, ...], first: int, last: int, ballot: Ballot | None = None
) -> tuple[bytes, ...]:
    """The values held from ``first`` without a gap, up to ``last`` at most; with ``ballot`` only
    as long as they are held at exactly that ballot."""
    if len(runs) == 1 and runs[0].first == first and runs[0].last <= last:
        return runs[0].values if ballot is None or runs[0].ballot == ballot else ()
    values: list[bytes] = []
    slot = first
    for run in runs:
        if run.last < slot:
            continue
        if run.first > slot or slot > last or (ballot is not None and run.ballot != ballot):
            break
        values.extend(run.values[slot - run.first : last + 1 - run.first])
        slot = run.last + 1
    return tuple(values)


# --- recovery -------------------------------------------------------------------------------


def genesis_of(first: int, values: tuple[bytes, ...], known: Genesis | None) -> Genesis | None:
    """The genesis after a run was fixed: decoded from slot 1 if it is among them."""
    if known is None and first == 1 and values and value_kind(values[0]) == Kind.GENESIS:
        return msgspec.msgpack.decode(decode_value(values[0]).command, type=Genesis)
    return known


class ReplayError(ValueError):
    """The journal's records contradict each other: it must be refused, not repaired."""


def replay(state: State, record: Record) -> tuple[State, tuple[FixedRun, ...]]:
    """Fold one journal record into the state of a restarting voter.

    The fold starts from :func:`first_state` or from a snapshot's (slot, chain, genesis) with the
    promise of the oldest journal header; what a record says about slots at or below ``fixed`` is
    skipped. Returns the state and the newly fixed runs, to be applied in order.
    Raises :class:`ReplayError` when a fixed slot has no value or the chain does not match.
    """
    match record:
        case PromiseRecord(ballot=ballot):
            return msgspec.structs.replace(state, promised=max(state.promised, ballot)), ()
        case AcceptRecord(ballot=ballot, first=first, values=values):
            promised = max(state.promised, ballot)
            last = first + len(values) - 1
            if last <= state.fixed:
                return msgspec.structs.replace(state, promised=promised), ()
            skip = max(0, state.fixed + 1 - first)
            run = Run(first + skip, ballot, values[skip:])
            return (
                msgspec.structs.replace(
                    state, promised=promised, accepted=overlay(state.accepted, run)
                ),
                (),
            )
        case FixedRecord(last=last, chain=chain):
            if last <= state.fixed:
                return state, ()
            values = contiguous(state.accepted, state.fixed + 1, last)
            if state.fixed + len(values) != last:
                raise ReplayError(f"slot {state.fixed + len(values) + 1} is fixed but has no value")
            return _replay_fixed(state, state.fixed + 1, values, chain)
        case LearnedRecord(first=first, values=values, chain=chain):
            skip = state.fixed + 1 - first
            if skip >= len(values):
                return state, ()
            if skip < 0:
                raise ReplayError(f"slots {state.fixed + 1}..{first - 1} are missing")
            return _replay_fixed(state, state.fixed + 1, values[skip:], chain)
        case InstallRecord(slot=slot):  # pragma: no branch - there is no other record
            if slot <= state.fixed:
                return state, ()
            raise ReplayError(f"the snapshot at slot {slot} that the journal names is missing")


def _replay_fixed(
    state: State, first: int, values: tuple[bytes, ...], chain: bytes
) -> tuple[State, tuple[FixedRun, ...]]:
    chains = chain_run(state.chain, first, values)
    if chains[-1] != chain:
        raise ReplayError(f"chain mismatch at slot {first + len(values) - 1}")
    last = first + len(values) - 1
    run = FixedRun(first, state.chain, values, chains)
    after = msgspec.structs.replace(
        state,
        fixed=last,
        chain=chain,
        accepted=above(state.accepted, last),
        genesis=genesis_of(first, values, state.genesis),
    )
    return after, (run,)
