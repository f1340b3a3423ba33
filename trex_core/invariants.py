"""What must hold after every step, checked on every step, in production too.

This module alone says what can never be; it raises before any effect leaves the process and
survives ``python -O``.  Numbers are those of the ancestors' list (I1..I15), restated for early
Accepts, suffix Prepares, pre-vote and snapshot install.
"""

from __future__ import annotations

from trex_core.messages import (
    Accept,
    Accepted,
    Fetch,
    Heartbeat,
    Prepare,
    Promise,
)
from trex_core.state import (
    AcceptRecord,
    Candidate,
    Config,
    Effects,
    Event,
    FixedRecord,
    Install,
    InstallRecord,
    Leader,
    LearnedRecord,
    PromiseRecord,
    Receive,
    Run,
    State,
    above,
    contiguous,
    overlay,
)


class InvariantViolation(Exception):  # noqa: N818 - the field's own word
    """A step broke a rule of the protocol: the process must end before its effects leave."""


def check_step(config: Config, before: State, event: Event, after: State, effects: Effects) -> None:
    """Check one step. Raises :class:`InvariantViolation` naming the invariant broken."""
    if after is before:
        _require(not effects.records and not effects.fixed, "a step without change has no record")
    _check_promise(config, before, event, after, effects)
    _check_fixed(before, event, after, effects)
    if after.accepted is not before.accepted or effects.records:
        _check_accepted(before, after, effects)
    _check_role(config, before, after)
    if effects.sends:
        _check_sends(after, effects)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantViolation(what)


def _check_promise(
    config: Config, before: State, event: Event, after: State, effects: Effects
) -> None:
    if after.promised == before.promised:
        return
    _require(after.promised > before.promised, "I2: the promise never decreases")
    role = after.role
    by_message = (
        isinstance(event, Receive)
        and isinstance(event.message, Prepare | Accept)
        and event.message.ballot == after.promised
        and event.message.ballot.voter == event.sender
    )
    by_standing = (
        isinstance(role, Candidate | Leader)
        and role.ballot == after.promised
        and role.ballot.voter == config.voter
    )
    _require(by_message or by_standing, "I3: only Prepare, Accept or standing moves the promise")
    _require(
        any(
            isinstance(record, PromiseRecord | AcceptRecord) and record.ballot == after.promised
            for record in effects.records
        ),
        "I10: a promise is journalled",
    )


def _check_fixed(before: State, event: Event, after: State, effects: Effects) -> None:
    if after.fixed == before.fixed:
        _require(not effects.fixed, "I5: nothing is delivered unless fixed moves")
        _require(after.chain == before.chain, "the chain moves with fixed only")
        return
    _require(after.fixed > before.fixed, "I1: the fixed slot never goes back")
    slot, chain = before.fixed, before.chain
    if isinstance(event, Install):
        slot, chain = event.slot, event.chain
        _require(
            any(isinstance(r, InstallRecord) and r.slot == slot for r in effects.records),
            "I10: an installed snapshot is journalled",
        )
    for run in effects.fixed:
        _require(run.first == slot + 1, "I1: fixed slots are delivered in order, without a gap")
        _require(run.chain_before == chain, "the chain continues")
        _require(len(run.values) == len(run.chains) > 0, "each fixed slot has its chain")
        slot, chain = run.last, run.chains[-1]
    _require(slot == after.fixed, "I5: the last delivered slot is the fixed slot")
    _require(chain == after.chain, "the chain at the fixed slot is that of the last delivered")
    if effects.fixed:
        last = 0
        for record in effects.records:
            if isinstance(record, FixedRecord):
                last = record.last
            elif isinstance(record, LearnedRecord):
                last = record.first + len(record.values) - 1
        _require(last == after.fixed, "I10: what is fixed is journalled")


def _check_accepted(before: State, after: State, effects: Effects) -> None:
    slot = after.fixed
    for run in after.accepted:
        _require(bool(run.values), "no run is empty")
        _require(run.first > slot, "accepted runs are above fixed, ascending and disjoint")
        _require(run.ballot <= after.promised, "I6: an accept is a promise")
        slot = run.last
    held = before.accepted
    for record in effects.records:
        if isinstance(record, AcceptRecord):
            held = overlay(held, Run(record.first, record.ballot, record.values))
    _require(
        above(held, after.fixed) == after.accepted,
        "I10: what is held is what was held and what is journalled as accepted",
    )


def _check_role(config: Config, before: State, after: State) -> None:
    role = after.role
    if role is before.role and after.fixed == before.fixed and after.promised == before.promised:
        return
    if isinstance(role, Candidate | Leader):
        _require(role.ballot == after.promised, "who stands or leads has promised no higher ballot")
        _require(role.ballot.voter == config.voter, "I7: a ballot is used by its voter only")
    if isinstance(role, Leader):
        if isinstance(before.role, Leader):
            _require(role.ballot == before.role.ballot, "D1: a leader never changes its ballot")
        else:
            _require(
                isinstance(before.role, Candidate) and before.role.ballot == role.ballot,
                "a leader was candidate under the same ballot",
            )
        slot = after.fixed
        for flight in role.flights:
            _require(flight.first == slot + 1, "flights continue fixed without a gap")
            slot = flight.last
        _require(slot == role.next_slot - 1, "flights end at the last proposed slot")


def _check_sends(after: State, effects: Effects) -> None:
    role = after.role
    for send in effects.sends:
        match send.message:
            case Accept(ballot=ballot, first=first, values=values):
                _require(
                    isinstance(role, Leader) and role.ballot == ballot, "only a leader sends Accept"
                )
                _require(
                    _held(after, first, values) or first <= after.fixed,
                    "a leader holds what it proposes",
                )
            case Prepare(ballot=ballot, first=first):
                _require(
                    isinstance(role, Candidate) and role.ballot == ballot == after.promised,
                    "R1: a Prepare's ballot is promised first",
                )
                _require(first > 0, "slots start at 1")
            case Promise(ballot=ballot, first=first, last=last, accepted=accepted):
                _require(ballot == after.promised, "R2: a promise is of the promised ballot")
                for pair in accepted:
                    held = contiguous(after.accepted, pair.first, pair.last, pair.ballot)
                    _require(
                        len(held) == pair.last - pair.first + 1,
                        "R2: a promise names exactly what is held",
                    )
                named = sum(pair.last - pair.first + 1 for pair in accepted)
                _require(
                    named == _slots_held(after, first, last or after.last_accepted),
                    "R2: a promise hides nothing that is held",
                )
            case Accepted(ballot=ballot, first=first, last=last):
                _require(ballot <= after.promised, "I6: nothing is accepted above the promise")
                above_fixed = max(first, after.fixed + 1)
                held = contiguous(after.accepted, above_fixed, last, ballot)
                _require(
                    len(held) == max(0, last - above_fixed + 1),
                    "R4: what is voted for is held at that ballot",
                )
            case Heartbeat(ballot=ballot) | Fetch(ballot=ballot):
                _require(
                    isinstance(role, Leader | Candidate) and role.ballot == ballot,
                    "only who leads or stands speaks under its ballot",
                )
            case _:
                pass


def _slots_held(after: State, first: int, last: int) -> int:
    return sum(max(0, min(run.last, last) - max(run.first, first) + 1) for run in after.accepted)


def _held(after: State, first: int, values: tuple[bytes, ...]) -> bool:
    """Are exactly these values held from ``first``? The common case, one run, by identity."""
    for run in reversed(after.accepted):
        if run.first == first and run.values is values:
            return True
    return contiguous(after.accepted, first, first + len(values) - 1) == values
