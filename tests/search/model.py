"""A cluster as a value, and everything that can happen to it next: the shipped ``step`` of every
voter between a network that is a set of letters and disks that a crash leaves behind.

This module alone says what a state of the search is, which actions lead out of it, which states
count as the same, and what is checked on each. ``explore`` only walks.

**A state** is, per voter, (memory, disk, lost); the log of what anybody ever fixed; the letters
that were sent and can still matter; and two books that are checked but are not part of the
state's name: which accepts were ever durable where, and which values were ever proposed. Memory
and disk are both :class:`trex_core.state.State`; disk is ``replay`` of the durable records.
``step`` is pure: it runs once for each distinct (memory, event) and its outcome, checked by
``check_step``, is remembered.

**The network** loses, delays, reorders and repeats: a letter stays in the set and may be received
any number of times at any later time, or never.

**The disk.** Nobody sees a record before its sync, save through what needs no sync (Accept,
Heartbeat, Fetch, Fetched, HeartbeatAck, Refused, and slots that were fixed). So a record that is
synced late is one synced at once whose votes travel longer, and what remains are the records that
never get to the disk. Hence each step that writes n records branches n + 1 times: all are synced
and the votes leave; or only the first j < n are (the write is torn, or the sync still under way,
when the machine stops), no vote leaves, and the voter is *lost*: it goes on in memory, speaks
without votes, writes nothing more, until it crashes. With ``lag="all"`` anybody may be lost,
which is the contract of ``Effects`` without any reduction. With ``lag="leader"`` only leaders:
what a lost voter says otherwise is that a slot is fixed (the log offers it to all anyway), that
it promised (which only forbids), the value of a pair (which the pair determines), or that it
holds an accept (for which a leader fills a free slot with a no-op instead of a command: one value
is as free as another). So it may as well not have taken the step, or, if part of what it wrote
got to the disk, crash there and then; a test compares what is reached either way. A crash is
possible at any time, any number of times; restart is part of it, and a voter that stays down is
one that takes no step.

**Time** is left out: the tick is the same in all states, and what a timer would do is an action
that is always possible, made of real ``Tick``s and answers with the timer fields set so that it
is due:

* *stands*: gives up its role, polls, and the poll wins, whatever the peers hear. A voter may
  stand at any time under any ballot of its own above its promise. Pre-vote, back-off, hand-over
  and "refused, stands at once" only choose times; they are the same step.
* *drops silent holders*: the candidate's fetch has waited too long.
* a leader beats whenever its tip changes (a letter more forbids nothing); nothing is re-sent,
  since letters stay. The rounds of beats and ages of answers are blanked: they decide times only.

So the search covers more behaviours than any clock allows. Left out altogether: ``has_room`` (a
full disk only refuses), ``boots`` and incarnations (fencing only refuses: here letters of earlier
lives still count), chain reports (every 1,024 slots), and the pace of catch-up: a voter may learn
any prefix of the log, or install a snapshot of it, at any time.

**Ballots.** What matters is their order and whose each is. Ballot k is (round k, its owner), and
a run is told the owners in order; orders that are the same but for the names of voters are
searched once (:func:`orders`): every rule treats voters alike, except that a candidate fetches
from the first holder; here any holder may answer. This is how symmetric states are folded.

**Values.** A leader's command in a slot is named after (ballot, slot). ``step`` never looks into
values but for equality, and a stored value carries the ballot that proposed it, so commands of
different ballots always differ, and a second choice of command under one ballot is a renaming.

**Folded steps**, each of which commutes with whatever anybody else does:

* a voter receives its own Prepare and its own Accepted as soon as they are synced (the promise to
  itself is a letter like any other: whether it is counted decides the quorum);
* a candidate receives promises only so many at once that something comes of it, in every choice
  of voters and letters: promises received earlier change nothing outside its own role;
* answers that only matter at once are received at once: a refusal of, or the answer to, a beat or
  Prepare that a leader or candidate sends again now ("asks");
* who answers a Prepare or Fetch without any change of its own answers at once (a letter more
  forbids nothing), and a promise is cut to the slots its candidate still asks for, which is what
  the voter would answer to that (two promises of a voter under one ballot tell the same).

**Letters that no longer matter** are dropped, so that states that differ in them alone are one: a
Prepare, Fetch or Fetched whose candidate no longer stands (to receive it could only forbid);
otherwise a letter that every voter it is for, in memory and as it would recover, is past: the
ballot is below its promise, the slots are fixed or held at that ballot and the tip is old news;
and only if ``step``, when asked, agrees that the letter changes nothing. The last clause keeps
the search honest about a broken core, which may take what it should be past.

**Heartbeats** are kept and received like all letters, but are a third book: states that differ in
them alone are one. What a beat teaches (slots up to n are fixed, with what is held there) catch-up
to n teaches as well, with the same state after it; otherwise a beat only ends roles. The same view
was taken when the protocol was checked in TLA+.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final, NamedTuple

import msgspec

from trex_core import paxos
from trex_core.invariants import InvariantViolation, check_step
from trex_core.messages import (
    NO_BALLOT,
    VOTES,
    Accept,
    Accepted,
    Ballot,
    Fetch,
    Fetched,
    Heartbeat,
    HeartbeatAck,
    Kind,
    PeerMessage,
    PollAnswer,
    Prepare,
    Promise,
    Refused,
    Tip,
    Value,
    decode_value,
    encode_value,
)
from trex_core.state import (
    AcceptRecord,
    Beat,
    Candidate,
    Config,
    Effects,
    Event,
    Follower,
    Install,
    Leader,
    Learn,
    Polling,
    Propose,
    Receive,
    Record,
    ReplayError,
    State,
    Tick,
    above,
    chain_next,
    contiguous,
    first_state,
    genesis_of,
    replay,
)

CLUSTER_ID: Final = b"explicit-search!"
INCARNATION: Final = 7
"""Of every voter: the same, so that slot 1 is the same whatever the voters are called."""
TICK: Final = 1_000
LONG_AGO: Final = TICK - 900
NEVER: Final = TICK + 900
VOTERS: Final = (1, 2, 3)

_replace = msgspec.structs.replace


class Violation(AssertionError):  # noqa: N818 - a finding, not an error of the program
    """Something that must hold in every reachable state does not."""


class Bounds(msgspec.Struct, frozen=True):
    """How far a search goes. ``owners``: whose ballot 1, 2, ... is. ``slots``: how many are
    decided.

    ``formed``: slot 1 is fixed everywhere, the owner of ballot 1 leads, and the slots are 2, 3 and
    so on; otherwise all disks are blank, and for slot 1, the first, every voter must promise.
    ``lag``: who may run ahead of its disk, "leader" or "all" (see above). ``pairs``: a leader may
    also propose two commands as one run. ``commands``: leaders of the ballots up to this one
    propose commands of their own; those above re-propose and fill up (0: all propose).
    """

    owners: tuple[int, ...] = (1, 2, 3)
    slots: int = 2
    formed: bool = True
    lag: str = "leader"
    pairs: bool = False
    commands: int = 0

    def __str__(self) -> str:
        start = "formed" if self.formed else "blank"
        names = "".join("ABC"[owner - 1] for owner in self.owners)
        pairs = ", runs of two" if self.pairs else ""
        commands = f", commands up to ballot {self.commands}" if self.commands else ""
        return f"ballots {names}, {self.slots} slots, {start}, lag {self.lag}{pairs}{commands}"


def orders(ballots: int) -> tuple[tuple[int, ...], ...]:
    """Whose ballots 1, 2, ... may be, one order for each set that differs in names alone: the
    voters are called 1, 2, 3 in the order in which they first own one."""
    found = []
    for owners in itertools.product(VOTERS, repeat=ballots):
        seen = tuple(dict.fromkeys(owners))
        if seen == VOTERS[: len(seen)]:
            found.append(owners)
    return tuple(found)


class Letter(NamedTuple):
    """A message under way; ``to`` 0 is everybody but the sender."""

    sender: int
    to: int
    message: PeerMessage


class Local(NamedTuple):
    """One voter. ``lost``: what it does no longer gets to its disk."""

    voter: int
    memory: State
    disk: State
    lost: bool


class Outcome(NamedTuple):
    """What one voter's turn leads to."""

    local: int
    letters: int
    """bits of the letters sent"""
    fixed: tuple[tuple[int, tuple[bytes, ...]], ...]
    durable: int
    """bits of (voter, (ballot, slot, value)) that became durable"""
    proposed: int
    """bits of (ballot, slot, value) that were proposed"""
    tips: tuple[tuple[Ballot, Tip], ...]
    labels: int


class World(NamedTuple):
    """A state. ``durable`` and ``proposed`` are the books."""

    locals: tuple[int, int, int]
    log: int
    letters: int
    durable: int
    proposed: int


class Action(NamedTuple):
    """``kind`` names it, ``voter`` does it, ``detail`` says with what."""

    kind: str
    voter: int
    detail: Any = None


class _Acc(NamedTuple):
    """What a turn under way has led to so far."""

    letters: int = 0
    fixed: tuple[tuple[int, tuple[bytes, ...]], ...] = ()
    durable: int = 0
    proposed: int = 0
    tips: tuple[tuple[Ballot, Tip], ...] = ()
    labels: int = 0


class Names:
    """Small numbers for things, in order of appearance."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.things: list[Any] = []

    def __len__(self) -> int:
        return len(self.things)

    def number(self, thing: Any) -> int:
        """That of ``thing``, a new one if it has none."""
        number = self.numbers.get(thing)
        if number is None:
            number = self.numbers[thing] = len(self.things)
            self.things.append(thing)
        return number


class Model:
    """The state space of ``bounds`` over ``core.step``.

    ``check_steps``: ``check_step`` and what can be said of one voter alone are checked too, not
    only what holds of all together. ``hasty``: the shell is broken, votes leave before the sync.
    """

    def __init__(
        self,
        bounds: Bounds,
        core: ModuleType = paxos,
        *,
        check_steps: bool = True,
        hasty: bool = False,
    ) -> None:
        self.bounds = bounds
        self.core = core
        self.check_steps = check_steps
        self.hasty = hasty
        self.first = 2 if bounds.formed else 1
        self.last = self.first + bounds.slots - 1
        self.ballots = tuple(Ballot(0, k, o) for k, o in enumerate(bounds.owners, 1))
        self.configs = {v: Config(v, VOTERS, INCARNATION, 1) for v in VOTERS}
        self.quorum = 2
        self.locals = Names()
        self.letters = Names()
        self.logs = Names()
        self.labels = Names()
        self.durable_bits = Names()
        self.proposed_bits = Names()
        self.holders: dict[tuple[Ballot, int, bytes], int] = {}
        """(ballot, slot, value) -> bits of the voters that may have it on disk"""
        self.addressed = [0, 0, 0, 0]
        """voter -> bits of the letters it may receive one by one"""
        self.promises = [0, 0, 0, 0]
        """voter -> bits of the promises to it"""
        self.questions = 0
        """bits of the letters that ask for a letter: Prepare and Fetch"""
        self.beats = 0
        """bits of the heartbeats: a book (see above)"""
        self.known: list[int] = []
        self.live: list[int] = []
        """local -> letters judged, and of those the ones that matter because of it"""
        self.idle: list[int] = []
        """local -> letters that change nothing when it receives them"""
        self.mute: list[int] = []
        """local -> questions it does not answer, or changes by answering"""
        self.answers: dict[tuple[int, int], int] = {}
        self.own: list[tuple[tuple[Action, tuple[Outcome, ...]], ...] | None] = []
        self.received: dict[tuple[int, int], tuple[Outcome, ...]] = {}
        self.counted: dict[tuple[int, tuple[int, ...]], tuple[bool, tuple[Outcome, ...]]] = {}
        self.others: dict[Any, Any] = {}
        self.steps = 0
        self.same_slot: dict[tuple[Ballot, int], int] = {}
        """(ballot, slot) -> bits of all values proposed there"""
        self.taking: list[list[Action]] = [[], [], [], []]
        """voter -> letter -> the action of receiving it"""
        self.disk_before = first_state(CLUSTER_ID)
        """The disk at the start of the turn under way"""
        self.doing = Action("starts", 0)
        self.outcome: Outcome | None = None
        self.sure: set[Any] = set()

    # --- one step ---------------------------------------------------------------------------

    def step(self, voter: int, before: State, event: Event) -> tuple[State, Effects]:
        """The shipped step, checked."""
        self.steps += 1
        config = self.configs[voter]
        try:
            after, effects = self.core.step(config, before, event)
            if self.check_steps:
                check_step(config, before, event, after, effects)
        except InvariantViolation as error:
            raise Violation(f"invariant at voter {voter}: {error}") from error
        except (AssertionError, LookupError, ValueError, StopIteration) as error:
            raise Violation(f"step of voter {voter} fails: {error!r}") from error
        if after.halted:
            raise Violation(f"voter {voter} halts without a cause: {after.halted}")
        return after, effects

    def plain(self, state: State) -> State:
        """``state`` without time and without what only decides times."""
        role = state.role
        match role:
            case Leader():
                role = _replace(
                    role,
                    first=1,
                    flights=tuple(_replace(f, sent_tick=TICK) for f in role.flights),
                    beat=1,
                    beat_ticks=((1, TICK),),
                    acks=(),
                    beat_acked=0,
                    quorum_tick=TICK,
                    since_tick=TICK,
                    announced=state.fixed,
                )
            case Candidate():
                role = _replace(role, since_tick=TICK, fetch_tick=TICK)
            case Polling() | Follower():
                role = Follower()
        return _replace(
            state,
            role=role,
            tick=TICK,
            leader=NO_BALLOT,
            heard_tick=LONG_AGO,
            deadline=NEVER,
            attempt=0,
            boots=(),
            chase=None,
        )

    def replayed(self, voter: int, disk: State, records: tuple[Record, ...]) -> State:
        """The disk with ``records`` on it as well."""
        try:
            for record in records:
                if getattr(record, "slot", 0) > disk.fixed:  # a snapshot: on disk before its record
                    disk = _replace(
                        disk,
                        fixed=record.slot,
                        chain=record.chain,
                        genesis=record.genesis,
                        accepted=above(disk.accepted, record.slot),
                    )
                disk, _ = replay(disk, record)
        except ReplayError as error:
            raise Violation(f"the journal of voter {voter} is refused: {error}") from error
        return disk

    def label(self, text: str) -> int:
        """The bit of a thing that should be seen at least once."""
        return 1 << self.labels.number(text)

    # --- a turn of one voter ----------------------------------------------------------------

    def turn(self, local: Local, *events: Event, label: int = 0) -> tuple[Outcome, ...]:
        """``local`` takes ``events``, its own votes, and beats if its tip moved: every way it may
        end, by what gets to the disk."""
        out: list[Outcome] = []
        tip = self.tip_of(local.memory)
        self.disk_before = local.disk
        self._run(local, tip, events, _Acc(labels=label), out)
        return tuple(dict.fromkeys(out))

    def tip_of(self, state: State) -> tuple[Ballot, Tip] | None:
        """What a leader would announce."""
        role = state.role
        if not isinstance(role, Leader):
            return None
        return role.ballot, Tip(state.fixed, state.chain, role.counted)

    def _run(
        self,
        local: Local,
        told: tuple[Ballot, Tip] | None,
        events: tuple[Event, ...],
        acc: _Acc,
        out: list[Outcome],
    ) -> None:
        voter, memory, disk, lost = local
        if not events:
            tip = self.tip_of(memory)
            if tip is None or tip == told:
                local = Local(voter, self.plain(memory), disk, lost)
                if lost and tip is None and self.bounds.lag == "leader":
                    if disk == self.disk_before:
                        return  # as if the step had not been taken
                    local = Local(voter, self.plain(disk), disk, False)  # torn: it crashes here
                out.append(self._outcome(local, acc))
                return
            events = (Beat(),)
            memory = self.plain(memory)
            memory = _replace(memory, role=_replace(memory.role, beat=0, beat_ticks=()))
        event, rest = events[0], events[1:]
        after, effects = self.step(voter, memory, event)
        acc = self._note(memory, event, after, effects, acc)
        votes, others = [], []
        for send in effects.sends:
            (votes if isinstance(send.message, VOTES) else others).append(send)
        for send in others:
            acc, told = self._post(voter, send.to, send.message, acc, told)
        records = effects.records
        if not lost:
            for kept in range(len(records)):  # torn, or never synced: from here on it is lost
                part = records[:kept]
                went = acc._replace(durable=acc.durable | self._durable(voter, part))
                if self.hasty:
                    for send in votes:
                        if send.to != voter or isinstance(send.message, Promise):
                            went, _ = self._post(voter, send.to, send.message, went, told)
                torn = Local(voter, after, self.replayed(voter, disk, part), True)
                self._run(torn, told, rest, went, out)
            disk = self.replayed(voter, disk, records)
            acc = acc._replace(durable=acc.durable | self._durable(voter, records))
            mine: list[Event] = []
            for send in votes:
                self._backed(voter, disk, send.message)
                if send.to == voter and not isinstance(send.message, Promise):
                    mine.append(Receive(voter, INCARNATION, 1, send.message))
                else:
                    acc, told = self._post(voter, send.to, send.message, acc, told)
            rest = (*mine, *rest)
            if self.check_steps:
                self._recoverable(voter, after, disk)
        self._run(Local(voter, after, disk, lost), told, rest, acc, out)

    def _outcome(self, local: Local, acc: _Acc) -> Outcome:
        return Outcome(self.local(local), *acc)

    def local(self, local: Local) -> int:
        """Its number."""
        number = self.locals.number(local)
        if number == len(self.known):
            self.known.append(0)
            self.live.append(0)
            self.idle.append(0)
            self.mute.append(0)
            self.own.append(None)
        return number

    def _durable(self, voter: int, records: tuple[Record, ...]) -> int:
        bits = 0
        for record in records:
            if isinstance(record, AcceptRecord):
                for slot, value in enumerate(record.values, record.first):
                    entry = (record.ballot, slot, value)
                    bit = 1 << self.durable_bits.number((voter, entry))
                    self.holders[entry] = self.holders.get(entry, 0) | bit
                    bits |= bit
        return bits

    def _proposed(self, ballot: Ballot, first: int, values: tuple[bytes, ...]) -> int:
        bits = 0
        for slot, value in enumerate(values, first):
            number = self.proposed_bits.number((ballot, slot, value))
            bits |= 1 << number
            pair = (ballot, slot)
            self.same_slot[pair] = self.same_slot.get(pair, 0) | 1 << number
        return bits

    def _post(
        self,
        voter: int,
        to: int,
        message: PeerMessage,
        acc: _Acc,
        told: tuple[Ballot, Tip] | None,
    ) -> tuple[_Acc, tuple[Ballot, Tip] | None]:
        match message:
            case Accept(ballot=ballot, first=first, values=values, tip=tip):
                acc = acc._replace(
                    proposed=acc.proposed | self._proposed(ballot, first, values),
                    tips=(*acc.tips, (ballot, tip)),
                )
                letter = Letter(voter, 0, message)
            case Heartbeat(ballot=ballot, tip=tip):
                told = (ballot, tip)
                acc = acc._replace(tips=(*acc.tips, (ballot, tip)))
                letter = Letter(voter, 0, message)
            case Prepare() | Fetch():
                letter = Letter(voter, 0, message)
            case Fetched():  # who sends it does not matter
                letter = Letter(VOTERS[to % len(VOTERS)], to, message)
            case Promise() | Accepted():
                letter = Letter(voter, to, message)
            case _:  # a refusal or an answer to a beat: see `ask`; polls and catch-up are actions
                return acc, told
        return acc._replace(letters=acc.letters | 1 << self.letter(letter)), told

    def letter(self, letter: Letter) -> int:
        """Its number."""
        number = self.letters.numbers.get(letter)
        if number is None:
            number = self.letters.number(letter)
            match letter.message:
                case Promise():
                    self.promises[letter.to] |= 1 << number
                case Prepare() | Fetch():
                    self.questions |= 1 << number
                case Heartbeat():
                    self.beats |= 1 << number
            for voter in VOTERS:
                self.taking[voter].append(Action("receive", voter, number))
                if letter.to == voter or (letter.to == 0 and letter.sender != voter):
                    self.addressed[voter] |= 1 << number
        return number

    # --- what can be said of one voter alone -------------------------------------------------

    def _recoverable(self, voter: int, memory: State, disk: State) -> None:
        for name in ("promised", "fixed", "chain", "genesis"):
            if getattr(memory, name) != getattr(disk, name):
                raise Violation(f"voter {voter} would recover another {name} than it has")
        for slot in range(memory.fixed + 1, self.last + 1):
            if held(memory, slot) != held(disk, slot):
                raise Violation(f"voter {voter} would recover another accept of slot {slot}")

    def _backed(self, voter: int, disk: State, message: PeerMessage) -> None:
        """A vote leaves: it is on the disk, and hides nothing that is."""
        if not self.check_steps:
            return
        match message:
            case Prepare(ballot=ballot) | Promise(ballot=ballot) | Accepted(ballot=ballot):
                if disk.promised < ballot:
                    raise Violation(f"voter {voter} votes at {ballot}, its disk does not know it")
        if isinstance(message, Promise):
            named = {
                slot: pair.ballot
                for pair in message.accepted
                for slot in range(pair.first, pair.last + 1)
            }
            for run in disk.accepted:
                for slot in range(max(run.first, message.first), run.last + 1):
                    if named.get(slot) != run.ballot:
                        raise Violation(f"voter {voter} hides its accept of slot {slot}")
        if isinstance(message, Accepted):
            for slot in range(max(message.first, disk.fixed + 1), message.last + 1):
                if held(disk, slot)[0] != message.ballot:
                    raise Violation(f"voter {voter} tells an accept of slot {slot} not on its disk")

    def _forward(self, before: Local, after: Local) -> None:
        """What is on disk is never taken back."""
        old, new = before.disk, after.disk
        if new.promised < old.promised or new.fixed < old.fixed:
            raise Violation(f"voter {before.voter}: promise or fixed slot on disk goes back")
        for slot in range(new.fixed + 1, self.last + 1):
            if held(new, slot)[0] < held(old, slot)[0]:
                raise Violation(f"voter {before.voter} forgets its accept of slot {slot} on disk")

    # --- what was seen ------------------------------------------------------------------------

    def _note(
        self,
        before: State,
        event: Event,
        after: State,
        effects: Effects,
        acc: _Acc,
    ) -> _Acc:
        labels = acc.labels
        fixed = acc.fixed + tuple((run.first, run.values) for run in effects.fixed)
        role = after.role
        message = event.message if isinstance(event, Receive) else None
        if isinstance(role, Leader) and not isinstance(before.role, Leader):
            labels |= self.label(f"ballot {role.ballot.round} leads")
            if isinstance(message, Fetched):
                labels |= self.label("leads with a fetched value")
        if isinstance(role, Leader):
            for record in effects.records:
                if not isinstance(record, AcceptRecord):
                    continue
                for value in record.values:
                    decoded = decode_value(value)
                    if decoded.ballot != role.ballot:
                        labels |= self.label("a value is proposed again")
                    elif decoded.kind == Kind.NOOP:
                        labels |= self.label("a hole is filled with a no-op")
        for run in effects.fixed:
            if isinstance(event, Learn):
                labels |= self.label(f"learned by catch-up, {type(before.role).__name__.lower()}")
            elif isinstance(message, Accepted):
                assert isinstance(role, Leader)
                for slot in range(run.first, run.last + 1):
                    labels |= self.label(
                        f"slot {slot} fixed by count at ballot {role.ballot.round}"
                    )
            elif isinstance(message, Accept | Heartbeat):
                held = contiguous(before.accepted, run.first, run.last, message.ballot)
                if run.last < message.tip.fixed:
                    labels |= self.label("learned by the announced pair")
                elif len(held) == len(run.values) or isinstance(message, Accept):
                    labels |= self.label("learned by the tip")
                else:
                    labels |= self.label("learned by the chain over other ballots")
        if isinstance(event, Install) and after.fixed > before.fixed:
            labels |= self.label("a snapshot is installed")
        old = before.role
        if (
            isinstance(old, Candidate)
            and isinstance(role, Candidate)
            and old.ballot == role.ballot
            and old.first < role.first
        ):
            labels |= self.label("asks again under the same ballot")
        accepts = any(isinstance(record, AcceptRecord) for record in effects.records)
        if accepts and isinstance(message, Accept) and message.first <= before.fixed:
            labels |= self.label("an Accept is taken above the fixed slot only")
        return acc._replace(fixed=fixed, labels=labels)

    # --- moves of one voter that need no letter ----------------------------------------------

    def moves(self, number: int) -> tuple[tuple[Action, tuple[Outcome, ...]], ...]:
        """Crash, stand, drop silent holders: of this local alone."""
        found = self.own[number]
        if found is None:
            local = self.locals.things[number]
            found = self.own[number] = tuple(
                (action, outcomes) for action, outcomes in self._moves(local) if outcomes
            )
        return found

    def _moves(self, local: Local) -> Iterator[tuple[Action, tuple[Outcome, ...]]]:
        voter, memory, disk, lost = local
        recovered = Local(voter, self.plain(disk), disk, False)
        if recovered != local:
            labels = 0
            if lost and disk.fixed < memory.fixed:
                labels |= self.label("a crash forgets what was fixed")
            if lost and isinstance(memory.role, Leader) and memory.accepted != disk.accepted:
                labels |= self.label("a leader's crash forgets its own accept")
            yield Action("crash", voter), (self._outcome(recovered, _Acc(labels=labels)),)
        if lost and self.bounds.lag == "leader" and not self.hasty:
            return
        if memory.fixed < self.last:
            for ballot in self.ballots:
                if ballot.voter == voter and ballot.round > memory.promised.round:
                    yield Action("stand", voter, ballot), self._stand(local, ballot)
        role = memory.role
        if isinstance(role, Candidate) and role.plan is not None:
            retry = self.configs[voter].retry_ticks
            late = _replace(role, since_tick=TICK + 1 - retry, fetch_tick=LONG_AGO)
            label = self.label("silent holders are dropped")
            yield (
                Action("drop", voter),
                self.turn(local._replace(memory=_replace(memory, role=late)), Tick(), label=label),
            )

    def _stand(self, local: Local, ballot: Ballot) -> tuple[Outcome, ...]:
        voter, state = local.voter, local.memory
        role = state.role
        if isinstance(role, Leader):
            state = _replace(state, role=_replace(role, quorum_tick=LONG_AGO))
        elif isinstance(role, Candidate):
            state = _replace(state, role=_replace(role, since_tick=LONG_AGO))
        if not isinstance(role, Follower):
            state, _ = self.step(voter, state, Tick())
        state, _ = self.step(voter, _replace(state, deadline=LONG_AGO), Tick())
        assert isinstance(state.role, Polling), "the poll is due"
        peer = VOTERS[voter % len(VOTERS)]
        answer = PollAnswer(state.role.attempt, False, Ballot(0, ballot.round - 1, peer), 0)
        return self.turn(local._replace(memory=state), Receive(peer, INCARNATION, 1, answer))

    def propose(self, number: int, choice: int) -> tuple[tuple[Action, tuple[Outcome, ...]], ...]:
        """A client's command, or two, at a leader: the ``choice``-th for this ballot and slot."""
        key = ("propose", number, choice)
        found = self.others.get(key)
        if found is None:
            local = self.locals.things[number]
            role = local.memory.role
            values = tuple(
                encode_value(
                    Value(
                        Kind.COMMAND, role.ballot, command=f"{role.ballot}@{slot}/{choice}".encode()
                    )
                )
                for slot in range(role.next_slot, self.last + 1)
            )
            sizes = (1, 2) if self.bounds.pairs else (1,)
            found = self.others[key] = tuple(
                (Action("propose", local.voter, values[:n]), self.turn(local, Propose(values[:n])))
                for n in sizes
                if n <= len(values)
            )
        return found

    def catch_up(self, number: int, log: int) -> tuple[tuple[Action, tuple[Outcome, ...]], ...]:
        """Entries of the log, or a snapshot, from anybody."""
        key = ("catch-up", number, log)
        found = self.others.get(key)
        if found is None:
            moves = []
            local = self.locals.things[number]
            values, chains, genesis = self.logs.things[log]
            fixed = local.memory.fixed
            peer = VOTERS[local.voter % len(VOTERS)]
            for last in range(fixed + 1, self.first + len(values)):
                n = last - self.first + 1
                event: Event = Learn(peer, self.first, chains[0], values[:n], last)
                moves.append((Action("learn", local.voter, last), self.turn(local, event)))
                if genesis is not None:
                    event = Install(last, chains[n], genesis)
                    moves.append((Action("install", local.voter, last), self.turn(local, event)))
            found = self.others[key] = tuple((a, o) for a, o in moves if o)
        return found

    # --- letters ------------------------------------------------------------------------------

    def receive(self, number: int, letter: int) -> tuple[Outcome, ...]:
        """One letter; () if it changes nothing."""
        key = (number, letter)
        found = self.received.get(key)
        if found is None:
            local = self.locals.things[number]
            sender, _, message = self.letters.things[letter]
            event = Receive(sender, INCARNATION, 1, message)
            found = tuple(
                o for o in self.turn(local, event) if o.local != number or o.letters or o.fixed
            )
            self.received[key] = found
            if not found:
                self.idle[number] |= 1 << letter
        return found

    def count(self, number: int, letters: tuple[int, ...]) -> tuple[bool, tuple[Outcome, ...]]:
        """A candidate receives promises; (whether nothing came of it yet, else the outcomes)."""
        key = (number, letters)
        found = self.counted.get(key)
        if found is None:
            local = self.locals.things[number]
            events = tuple(
                Receive(sender, INCARNATION, 1, message)
                for sender, _, message in map(self.letters.things.__getitem__, letters)
            )
            outcomes = self.turn(local, *events)
            waiting = True
            for outcome in outcomes:
                role = self.locals.things[outcome.local].memory.role
                if not isinstance(role, Candidate) or role.plan is not None:
                    waiting = False
            found = self.counted[key] = (waiting, () if waiting else outcomes)
        return found

    def elections(
        self, number: int, promises: int
    ) -> tuple[tuple[Action, tuple[Outcome, ...]], ...]:
        """Every choice of ``promises``, as few as bring something about."""
        key = ("elections", number, promises)
        found = self.others.get(key)
        if found is None:
            letters = _bits(promises)
            voter = self.locals.things[number].voter
            found = ()
            waiting: list[tuple[int, ...]] = [()]
            while waiting:
                chosen = waiting.pop()
                for letter in letters:
                    if chosen and letter <= chosen[-1]:
                        continue
                    now = (*chosen, letter)
                    self.doing = Action("count", voter, now)
                    waits, outcomes = self.count(number, now)
                    if waits and len(now) < len(VOTERS):
                        waiting.append(now)
                    elif outcomes:
                        found += ((self.doing, outcomes),)
            self.others[key] = found
        return found

    def ask(self, number: int, other: int) -> tuple[tuple[Action, bool, tuple[Outcome, ...]], ...]:
        """A leader or candidate sends its beat or Prepare again and ``other`` answers: what becomes
        of the asker (True), or of the asked (False) where the beat moves it."""
        key = ("ask", number, other)
        found = self.others.get(key)
        if found is None:
            found = self.others[key] = tuple(self._ask(number, other))
        return found

    def _ask(self, number: int, other: int) -> Iterator[tuple[Action, bool, tuple[Outcome, ...]]]:
        asker, asked = self.locals.things[number], self.locals.things[other]
        action = Action("ask", asker.voter, asked.voter)
        role = asker.memory.role
        message: PeerMessage = Prepare(role.ballot, role.first)
        tip = self.tip_of(asker.memory)
        if tip is not None:
            message = Heartbeat(role.ballot, 1, tip[1], 0)
        event = Receive(asker.voter, INCARNATION, 1, message)
        after, effects = self.step(asked.voter, asked.memory, event)
        if tip is not None and self.plain(after) != asked.memory:
            yield action, False, self.turn(asked, event)
            return
        for send in effects.sends:
            if not isinstance(send.message, Refused | HeartbeatAck):
                continue
            if isinstance(send.message, Refused):
                label = self.label("a refusal ends a role")
            else:
                label = self.label("a leader is told of an accept above its own")
            answer = Receive(asked.voter, INCARNATION, 1, send.message)
            yield (
                action,
                True,
                tuple(
                    outcome._replace(labels=outcome.labels | label)
                    for outcome in self.turn(asker, answer)
                    if outcome.local != number or outcome.letters
                ),
            )

    # --- letters that matter ------------------------------------------------------------------

    def judge(self, number: int, letters: int) -> None:
        """Which of ``letters`` matter because of this local?"""
        local = self.locals.things[number]
        bits = letters & ~self.known[number]
        self.known[number] |= bits
        while bits:
            low = bits & -bits
            bits ^= low
            if self._matters(local, self.letters.things[low.bit_length() - 1]):
                self.live[number] |= low

    def _matters(self, local: Local, letter: Letter) -> bool:
        voter, memory, disk, _ = local
        sender, to, message = letter
        role = memory.role
        ballot = message.ballot
        stands = isinstance(role, Candidate) and role.ballot == ballot
        match message:
            case Prepare(first=first):
                return voter == sender and stands and role.first == first
            case Fetch():
                return voter == sender and stands and role.plan is not None
            case Promise() | Fetched():
                return voter == to and (stands or self._moved(voter, memory, letter))
            case Accepted(last=last):
                if voter != to:
                    return False
                leads = isinstance(role, Leader) and role.ballot == ballot and memory.fixed < last
                return (
                    leads and not all(sender in f.votes for f in role.flights if f.first <= last)
                ) or self._moved(voter, memory, letter)
        if voter == sender:
            return False
        if ballot >= disk.promised:
            if message.tip.fixed > disk.fixed:
                return True
            if isinstance(message, Accept):
                for slot in range(
                    max(message.first, disk.fixed + 1), message.first + len(message.values)
                ):
                    if held(disk, slot)[0] != ballot:
                        return True
        if self._moved(voter, memory, letter):
            return True
        return disk is not memory and self._moved(voter, self.plain(disk), letter)

    def _moved(self, voter: int, memory: State, letter: Letter) -> bool:
        """Does step change anything when it gets this letter?"""
        event = Receive(letter.sender, INCARNATION, 1, letter.message)
        try:
            after, _ = self.step(voter, memory, event)
        except Violation:
            return True  # as above
        return self.plain(after) != memory

    # --- states -------------------------------------------------------------------------------

    def start(self) -> World:
        """The first state."""
        blank = self.plain(first_state(CLUSTER_ID))
        memories = dict.fromkeys(VOTERS, blank)
        disks = dict.fromkeys(VOTERS, blank)
        if self.bounds.formed:
            memories = self._form(blank)
            disks = {v: self.plain(_replace(m, role=Follower())) for v, m in memories.items()}
        numbers = [self.local(Local(v, memories[v], disks[v], False)) for v in VOTERS]
        log = self.logs.number(((), (memories[1].chain,), memories[1].genesis))
        return World((numbers[0], numbers[1], numbers[2]), log, 0, 0, 0)

    def _form(self, blank: State) -> dict[int, State]:
        """Voter 1 stands under ballot 1, all promise, slot 1 is fixed everywhere: no fault."""
        states = dict.fromkeys(VOTERS, blank)
        queue: list[tuple[int, Event]] = []
        local = Local(1, blank, blank, False)
        state = _replace(blank, deadline=LONG_AGO)
        state, _ = self.step(1, state, Tick())
        assert isinstance(state.role, Polling)
        answer = PollAnswer(state.role.attempt, False, NO_BALLOT, 0)
        states[local.voter] = state
        queue.append((1, Receive(2, INCARNATION, 1, answer)))
        for beat in range(2):
            if beat:
                queue.append((1, Beat()))
            while queue:
                voter, event = queue.pop(0)
                states[voter], effects = self.step(voter, states[voter], event)
                queue.extend(
                    (s.to, Receive(voter, INCARNATION, 1, s.message)) for s in effects.sends
                )
        assert all(state.fixed == 1 for state in states.values()), "slot 1 is fixed everywhere"
        assert isinstance(states[1].role, Leader)
        return {voter: self.plain(state) for voter, state in states.items()}

    def successors(self, world: World) -> list[tuple[Action, Outcome, World]]:
        """Every state that one action leads to. A :class:`Violation` it raises is of the action
        ``doing``, and of ``outcome`` if it got that far."""
        out: list[tuple[Action, Outcome, World]] = []
        after = self.after
        letters = world.letters
        for index, number in enumerate(world.locals):
            local = self.locals.things[number]
            voter = local.voter
            role = local.memory.role
            moves = self.own[number]
            if moves is None:
                self.doing, self.outcome = Action("acts", voter), None
                moves = self.moves(number)
            if isinstance(role, Leader) and self.may_propose(role):
                self.doing, self.outcome = Action("propose", voter), None
                moves += self.propose(number, self.choice(world, role))
            if world.log:
                self.doing, self.outcome = Action("learn", voter), None
                moves += self.catch_up(number, world.log)
            bits = letters & self.addressed[voter] & ~self.idle[number]
            if isinstance(role, Candidate) and role.plan is None:
                promises = bits & self.promises[voter]
                bits ^= promises
                if promises:
                    moves += self.elections(number, promises)
            for action, outcomes in moves:
                self.doing = action
                for self.outcome in outcomes:
                    out.append((action, self.outcome, after(world, index, self.outcome)))
            while bits:
                low = bits & -bits
                bits ^= low
                letter = low.bit_length() - 1
                self.doing, self.outcome = self.taking[voter][letter], None
                outcomes = self.received.get((number, letter))
                if outcomes is None:
                    outcomes = self.receive(number, letter)
                for self.outcome in outcomes:
                    if self.outcome.local != number or self.outcome.letters & ~letters:
                        out.append((self.doing, self.outcome, after(world, index, self.outcome)))
            if isinstance(role, Follower):
                continue
            for other, asked in enumerate(world.locals):
                if other == index:
                    continue
                self.doing, self.outcome = Action("ask", voter, other + 1), None
                for action, asks, outcomes in self.ask(number, asked):
                    for self.outcome in outcomes:
                        moved = index if asks else other
                        out.append((action, self.outcome, after(world, moved, self.outcome)))
        return out

    def may_propose(self, role: Leader) -> bool:
        """Is there a slot left for a command of this leader's own?"""
        commands = self.bounds.commands
        return role.next_slot <= self.last and (commands == 0 or role.ballot.round <= commands)

    def choice(self, world: World, role: Leader) -> int:
        """How many values this leader's ballot has proposed in its next slot: none, unless the core
        is broken and uses a ballot twice. Then another value must be tried."""
        pairs = self.same_slot.get((role.ballot, role.next_slot), 0)
        return (world.proposed & pairs).bit_count()

    def after(self, world: World, index: int, outcome: Outcome) -> World:
        """The checks that no voter can make alone are made here."""
        numbers = world.locals
        number = outcome.local
        old = numbers[index]
        a, b, c = numbers
        if index == 0:
            a = number
        elif index == 1:
            b = number
        else:
            c = number
        letters = world.letters | outcome.letters
        durable = world.durable | outcome.durable
        proposed, log = world.proposed, world.log
        if outcome.proposed:
            proposed |= outcome.proposed
            for n in _bits(outcome.proposed):
                ballot, slot, _ = self.proposed_bits.things[n]
                if (proposed & self.same_slot[ballot, slot]).bit_count() > 1:
                    raise Violation(f"two values of slot {slot} are proposed at {ballot}")
        if outcome.durable & ~world.durable:
            for n in _bits(outcome.durable & ~world.durable):
                who, entry = self.durable_bits.things[n]
                if entry[0].voter == who:
                    continue
                pair = self.proposed_bits.numbers.get(entry)
                if pair is None or not proposed >> pair & 1:
                    raise Violation(
                        f"voter {who} has an accept of slot {entry[1]} at {entry[0]} on disk that "
                        "nobody proposed"
                    )
        if self.check_steps and (old, number) not in self.sure:
            self._forward(self.locals.things[old], self.locals.things[number])
            self.sure.add((old, number))
        if outcome.fixed:
            log = self._fix(log, outcome.fixed, durable, index + 1)
        if outcome.tips:
            self._tips(outcome.tips, log, durable)
        if letters & self.questions:
            letters = self.answered((a, b, c), letters)
        state = self.locals.things[number]
        role = state.memory.role
        if isinstance(role, Candidate) and letters & self.promises[state.voter]:
            letters = self.renewed(letters, state.voter, role)
        for n in (a, b, c):
            if letters & ~self.known[n]:
                self.judge(n, letters)
        live = self.live
        letters &= live[a] | live[b] | live[c]
        if state.memory.fixed >= self.first and (number, log, "chain") not in self.sure:
            self._chain(state, log)
            self.sure.add((number, log, "chain"))
        return World((a, b, c), log, letters, durable, proposed)

    def answered(self, numbers: tuple[int, int, int], letters: int) -> int:
        """``letters`` with every answer that costs the one who answers nothing."""
        for number in numbers:
            asked = letters & self.questions & ~self.mute[number]
            while asked:
                low = asked & -asked
                asked ^= low
                letters |= self.answer(number, low.bit_length() - 1)
        return letters

    def answer(self, number: int, letter: int) -> int:
        """The letters this local answers with, if it does not change by it."""
        key = (number, letter)
        found = self.answers.get(key)
        if found is None:
            found = 0
            if self.addressed[self.locals.things[number].voter] >> letter & 1:
                try:
                    outcomes = self.receive(number, letter)
                except Violation:
                    return 0  # it is raised again, with its schedule, when the letter is received
                if len(outcomes) == 1 and outcomes[0].local == number:
                    found = outcomes[0].letters
            self.answers[key] = found
            if not found:
                self.mute[number] |= 1 << letter
        return found

    def renewed(self, letters: int, voter: int, role: Candidate) -> int:
        """``letters`` with each promise cut to the slots the candidate still asks for."""
        for letter in _bits(letters & self.promises[voter]):
            sender, to, message = self.letters.things[letter]
            if message.ballot == role.ballot and message.first < role.first and not message.last:
                pairs = tuple(
                    _replace(pair, first=max(pair.first, role.first))
                    for pair in message.accepted
                    if pair.last >= role.first
                )
                message = _replace(message, first=role.first, accepted=pairs)
                letters ^= 1 << letter
                letters |= 1 << self.letter(Letter(sender, to, message))
        return letters

    def _fix(self, log: int, fixed: Any, durable: int, voter: int) -> int:
        values, chains, genesis = self.logs.things[log]
        for first, run in fixed:
            for slot, value in enumerate(run, first):
                at = slot - self.first
                if at < len(values):
                    if values[at] != value:
                        raise Violation(
                            f"agreement: voter {voter} fixes {value_name(value)} in slot {slot}, "
                            f"where {value_name(values[at])} was fixed"
                        )
                    continue
                if at > len(values):
                    raise Violation(f"voter {voter} fixes slot {slot}, {slot - 1} is not fixed yet")
                if not self._chosen(slot, value, durable):
                    raise Violation(
                        f"voter {voter} fixes {value_name(value)} in slot {slot}: no accept quorum "
                        "ever had it on disk under one ballot"
                    )
                values = (*values, value)
                before = chains[-1]
                chains = (*chains, chain_next(before, slot, value))
                if genesis is None:
                    genesis = genesis_of(slot, (value,), None)
        return self.logs.number((values, chains, genesis))

    def _chosen(self, slot: int, value: bytes, durable: int) -> bool:
        return any(
            (durable & self.holders.get((ballot, slot, value), 0)).bit_count() >= self.quorum
            for ballot in self.ballots
        )

    def _tips(self, tips: Any, log: int, durable: int) -> None:
        values, chains, _ = self.logs.things[log]
        for ballot, tip in tips:
            at = tip.fixed - self.first + 1
            if at < 0:
                continue
            if at > len(values) or chains[at] != tip.chain:
                raise Violation(f"the leader of {ballot} announces slot {tip.fixed}, not fixed so")
            for slot in range(max(tip.counted, self.first), tip.fixed + 1):
                entry = (ballot, slot, values[slot - self.first])
                if (durable & self.holders.get(entry, 0)).bit_count() < self.quorum:
                    raise Violation(f"{ballot} is said to be counted in slot {slot}, it was not")

    def _chain(self, local: Local, log: int) -> None:
        _, chains, _ = self.logs.things[log]
        for state in (local.memory, local.disk):
            at = state.fixed - self.first + 1
            if at >= len(chains) or (at >= 0 and chains[at] != state.chain):
                raise Violation(f"voter {local.voter}: its chain at slot {state.fixed} differs")


# --- small things ---------------------------------------------------------------------------


def _bits(mask: int) -> list[int]:
    out = []
    while mask:
        low = mask & -mask
        out.append(low.bit_length() - 1)
        mask ^= low
    return out


def held(state: State, slot: int) -> tuple[Ballot, bytes]:
    """What ``state`` holds as accepted in ``slot``."""
    for run in state.accepted:
        if run.first <= slot <= run.last:
            return run.ballot, run.values[slot - run.first]
    return NO_BALLOT, b""


def value_name(value: bytes) -> str:
    """In words."""
    decoded = decode_value(value)
    match decoded.kind:
        case Kind.NOOP:
            return f"no-op of {decoded.ballot}"
        case Kind.GENESIS:
            return f"genesis of {decoded.ballot}"
    return f"command {decoded.command.decode()}"
