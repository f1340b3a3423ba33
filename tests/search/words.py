"""A schedule of the search in words, one line an action.

This module alone turns the actions of ``model`` into sentences a person can follow.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.search.model import Action, Local, Model, World, held, value_name
from trex_core.messages import (
    Accept,
    Accepted,
    Fetch,
    Fetched,
    Heartbeat,
    PeerMessage,
    Prepare,
    Promise,
)
from trex_core.state import Candidate, Leader


def tell(
    model: Model,
    start: World,
    way: Iterable[tuple[Action, int]],
) -> tuple[str, ...]:
    """The actions from ``start``, and the one the model was doing when it raised."""
    lines = []
    locals_ = list(start.locals)
    for action, number in way:
        index = model.locals.things[number].voter - 1
        before = model.locals.things[locals_[index]]
        after = model.locals.things[number]
        locals_[index] = number
        lines.append(f"{_doing(model, action)}; {_change(model, before, after)}")
    last = _doing(model, model.doing)
    if model.outcome is not None:
        after = model.locals.things[model.outcome.local]
        before = model.locals.things[locals_[after.voter - 1]]
        last = f"{last}; {_change(model, before, after)}"
    lines.append(last)
    return tuple(lines)


def _doing(model: Model, action: Action) -> str:
    kind, voter, detail = action
    match kind:
        case "crash":
            return f"voter {voter} crashes and restarts from its disk"
        case "stand":
            return f"voter {voter} stands under {detail}"
        case "drop":
            return f"voter {voter} waits no longer for who holds what it fetches"
        case "propose" if detail:
            return f"voter {voter} proposes {', '.join(map(value_name, detail))}"
        case "learn":
            return f"voter {voter} catches up to slot {detail}"
        case "install":
            return f"voter {voter} installs a snapshot at slot {detail}"
        case "ask":
            return f"voter {voter} asks voter {detail} again, which answers"
        case "count":
            letters = "; ".join(_letter(model, n) for n in detail)
            return f"voter {voter} receives {letters}"
        case "receive":
            return f"voter {voter} receives {_letter(model, detail)}"
    return f"voter {voter}: {kind}"


def _letter(model: Model, number: int) -> str:
    sender, _, message = model.letters.things[number]
    return f"{message_name(message)} of voter {sender}"


def message_name(message: PeerMessage) -> str:
    """A message in words."""
    match message:
        case Prepare(ballot=ballot, first=first):
            return f"Prepare {ballot} from slot {first}"
        case Promise(ballot=ballot, accepted=accepted):
            named = ", ".join(f"slot {p.first}..{p.last} at {p.ballot}" for p in accepted)
            return f"Promise {ballot} ({named or 'nothing held'})"
        case Accept(ballot=ballot, first=first, values=values, tip=tip):
            names = ", ".join(value_name(value) for value in values)
            return f"Accept {ballot} slot {first}: {names} (tip {tip.fixed})"
        case Accepted(ballot=ballot, first=first, last=last):
            return f"Accepted {ballot} slot {first}..{last}"
        case Heartbeat(ballot=ballot, tip=tip):
            return f"Heartbeat {ballot} (tip {tip.fixed}, counted from {tip.counted})"
        case Fetch(ballot=ballot):
            return f"Fetch {ballot}"
        case Fetched(ballot=ballot, first=first, accepted_at=at):
            return f"Fetched {ballot}: slot {first} at {at}"
    return type(message).__name__


def _change(model: Model, before: Local, after: Local) -> str:
    """What became of the voter."""
    old, new = before.memory, after.memory
    out = []
    if old.promised != new.promised:
        out.append(f"promised {new.promised}")
    if type(old.role) is not type(new.role) or getattr(old.role, "ballot", None) != getattr(
        new.role, "ballot", None
    ):
        role = new.role
        ballot = f" of {role.ballot}" if isinstance(role, Candidate | Leader) else ""
        out.append(f"{type(role).__name__.lower()}{ballot}")
    for slot in range(new.fixed + 1, model.last + 1):
        ballot, value = held(new, slot)
        if value and (ballot, value) != held(old, slot):
            out.append(f"holds {value_name(value)} in slot {slot} at {ballot}")
        elif not value and held(old, slot)[1]:
            out.append(f"holds nothing in slot {slot}")
    if old.fixed != new.fixed:
        out.append(f"fixed {new.fixed}")
    if after.lost and not before.lost:
        out.append("what it writes from here on never gets to its disk")
    return ", ".join(out) or "no change but its letters"
