"""Who owns what of the ring, and what moves: this module alone works that out for the screen.

Pure.  A ring of a hundred thousand tokens takes about a second to look at whole, a change of one
member about a millisecond: :func:`place` follows the change where it is told what was before.

``joining`` and ``draining`` members own nothing yet or any more, so the moves in progress are: what
each draining one has to hand over (it would hold it, were it up), and what each joining one will
take once it is up.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
from immutables import Map

from dashboard.tables import visible
from dashboard.words import count, plural
from trex_core.metadata.commands import Change, ConfigEntry, Member, Row
from trex_core.metadata.ring import (
    EMPTY_RING,
    REPLICATION_FACTOR_KEY,
    SPREAD_KEY,
    TOKENS_PER_WEIGHT_KEY,
    Move,
    Range,
    Ring,
    RingDelta,
    member_tokens,
    moves,
    settings_of,
)
from trex_core.metadata.state import EMPTY, MetadataState

SPACE: Final = 1 << 64
"""How many tokens there are."""
WHO_MAX: Final = 4
"""So many of those who made a change are named."""
STEP_MEMBERS: Final = 64
"""So many members are put into a new ring at once."""
FLOWS_MAX: Final = 200
"""Most flows that are kept of one move."""
WHOLE_SHARE: Final = 4
"""If a change touches more than one in so many ranges, all are looked at: it is cheaper."""


class Holding(msgspec.Struct, frozen=True, gc=False):
    """What a member has of the ring, in tokens of SPACE: ``owned`` as the first of the replicas, in
    ``ranges`` ranges; ``held`` as any of them."""

    owned: int = 0
    ranges: int = 0
    held: int = 0


NOTHING_HELD: Final = Holding()


class Flow(msgspec.Struct, frozen=True, gc=False):
    """``tokens`` in ``ranges`` ranges pass from member ``giver`` to member ``taker`` ("" if nobody
    takes or gives them). If nobody loses them, ``giver`` is the owner that they are copied from."""

    giver: str
    taker: str
    tokens: int
    ranges: int


class Passing(msgspec.Struct, frozen=True):
    """What a change of the ring moves: ``tokens`` have to be copied, in ``ranges`` ranges; the
    largest ``flows`` first, FLOWS_MAX at most of ``pairs`` pairs of members."""

    tokens: int = 0
    ranges: int = 0
    pairs: int = 0
    flows: tuple[Flow, ...] = ()


NOTHING_PASSES: Final = Passing()


class RingChange(msgspec.Struct, frozen=True):
    """A change of the ring that was seen: made in slots ``first``..``last``, by ``who``
    (``members`` members and settings in all)."""

    first: int
    last: int
    who: tuple[str, ...]
    members: int
    passing: Passing


class Placement(msgspec.Struct, frozen=True):
    """The ring of ``state``, and what of it a person wants to know."""

    state: MetadataState
    ring: Ring
    holdings: Mapping[str, Holding]
    """By member; those that hold nothing are missing."""
    zones: Mapping[str, int]
    """Tokens owned in each zone; "" for members without one."""
    leaving: Passing
    """What draining members have to hand over."""
    joining: Passing
    """What joining members will take."""
    newest: RingChange | None
    """The last change of the ring that was seen; None: none since we look."""
    by_share: tuple[str, ...]
    """All members, those that own most first."""
    states: Mapping[str, int]
    """How many members there are in each state."""

    def of(self, member: str) -> Holding:
        """What ``member`` has."""
        return self.holdings.get(member, NOTHING_HELD)


NOWHERE: Final = Placement(
    EMPTY, EMPTY_RING, Map(), Map(), NOTHING_PASSES, NOTHING_PASSES, None, (), Map()
)
"""The placement of a state with nothing in it."""


def current(placement: Placement, state: MetadataState) -> bool:
    """Whether ``placement`` is that of ``state``, as far as the ring and its members go. Cheap."""
    before = placement.state
    if before.members is not state.members:
        return False
    return before.config is state.config or settings_of(before.config) == settings_of(state.config)


def place(state: MetadataState, before: Placement | None = None) -> Placement:
    """The placement of ``state``; follows the difference to ``before``, if that is given."""
    if before is None:
        ring = _ring_in_steps(state)
        return _placed(state, ring, _tally(ring.ranges()), None)
    changes = _changes(before.state, state)
    ring, delta = before.ring.updated(changes)
    touched = delta.put or delta.removed
    newest = _newest(before, state, ring, delta, changes) if touched else before.newest
    if (len(delta.put) + len(delta.removed)) * WHOLE_SHARE > ring.tokens:
        holdings = _tally(ring.ranges())
    else:
        holdings = dict(before.holdings)
        ends = [row.end for row in delta.put] + list(delta.removed)
        gone = (row for row in map(before.ring.range_ending, ends) if row is not None)
        _tally(gone, holdings, -1)
        _tally(delta.put, holdings)
    return _placed(state, ring, holdings, newest)


def _ring_in_steps(state: MetadataState) -> Ring:
    """The ring of ``state``, made in steps short enough to let other threads have their turn: at
    once, its tokens are sorted in one go."""
    settings = settings_of(state.config)
    ring = Ring.of((), settings.replication_factor, settings.spread, settings.tokens_per_weight)
    members = iter(state.members.items())
    while step := list(itertools.islice(members, STEP_MEMBERS)):
        ring = ring.with_changes(Change("member", name, None, member) for name, member in step)
    return ring


def _placed(
    state: MetadataState, ring: Ring, holdings: Mapping[str, Holding], newest: RingChange | None
) -> Placement:
    zones: dict[str, int] = {}
    for name, holding in holdings.items():
        member = state.members.get(name)
        zone = (member.zone if member else None) or ""
        zones[zone] = zones.get(zone, 0) + holding.owned
    leaving, joining = _in_progress(state.members.values(), ring)
    owned = {name: holding.owned for name, holding in holdings.items()}
    ids = (name for chunk in state.ids.chunks for name in chunk)
    by_share = tuple(sorted(ids, key=lambda name: -owned.get(name, 0)))
    states = Counter(member.state for member in state.members.values())
    return Placement(state, ring, holdings, zones, leaving, joining, newest, by_share, states)


def _tally(
    rows: Iterable[Range], into: dict[str, Holding] | None = None, sign: int = 1
) -> dict[str, Holding]:
    holdings = {} if into is None else into
    sums: dict[str, list[int]] = {}
    for row in rows:
        tokens = sign * (row.end - row.start + 1)
        for at, name in enumerate(row.replicas):
            held = sums.get(name)
            if held is None:
                held = sums[name] = [0, 0, 0]
            held[2] += tokens
            if at == 0:
                held[0] += tokens
                held[1] += sign
    for name, (owned, ranges, held_all) in sums.items():
        old = holdings.get(name, NOTHING_HELD)
        new = Holding(old.owned + owned, old.ranges + ranges, old.held + held_all)
        if new == NOTHING_HELD:
            holdings.pop(name, None)
        else:
            holdings[name] = new
    return holdings


def _changes(before: MetadataState, after: MetadataState) -> list[Change]:
    """What of members and ring settings differs."""
    old, new = before.members, after.members
    changes = []
    if old is not new:
        for name, member in new.items():
            was = old.get(name)
            if was is not member and was != member:  # after a jump, equal ones are other objects
                changes.append(Change("member", name, was, member))
        if len(old) + sum(change.old is None for change in changes) > len(new):
            changes += [
                Change("member", name, was, None) for name, was in old.items() if name not in new
            ]
    if before.config is not after.config:
        for key in (REPLICATION_FACTOR_KEY, SPREAD_KEY, TOKENS_PER_WEIGHT_KEY):
            entry_before, entry = before.config.get(key), after.config.get(key)
            if entry_before != entry:
                changes.append(Change("config", key, entry_before, entry))
    return changes


def _newest(
    before: Placement, state: MetadataState, ring: Ring, delta: RingDelta, changes: list[Change]
) -> RingChange:
    slots = []
    who = []
    for change in changes:
        match change.new:
            case Member(updated_slot=slot) if _laid(change.old) != _laid(change.new):
                slots.append(slot)
            case ConfigEntry(slot=slot):
                slots.append(slot)
            case None:
                slots.extend((before.state.slot + 1, state.slot))
            case _:
                continue
        who.append(change.key)
    passing = passing_of(moves(before.ring, ring, delta.put))
    return RingChange(min(slots), max(slots), tuple(who[:WHO_MAX]), len(who), passing)


def _laid(row: Row | None) -> object:
    """What of a member the ring depends on; None if it owns nothing."""
    if not isinstance(row, Member) or row.state not in ("up", "down"):
        return None
    return row.zone, row.weight, row.tokens


def passing_of(moved: Iterable[Move]) -> Passing:
    """Who gives how much to whom in ``moved``."""
    sums: dict[tuple[str, str], list[int]] = {}
    tokens = ranges = 0
    for move in moved:
        size = move.end - move.start + 1
        lost, gained = move.lost, move.gained
        ranges += 1
        tokens += size * len(gained)
        for at in range(max(len(lost), len(gained))):
            taker = gained[at] if at < len(gained) else ""
            giver = lost[at] if at < len(lost) else (move.before[0] if move.before else "")
            held = sums.setdefault((giver, taker), [0, 0])
            held[0] += size
            held[1] += 1
    flows = sorted(
        (Flow(giver, taker, size, times) for (giver, taker), (size, times) in sums.items()),
        key=lambda flow: (-flow.tokens, flow.giver, flow.taker),
    )
    return Passing(tokens, ranges, len(flows), tuple(flows[:FLOWS_MAX]))


def _in_progress(members: Iterable[Member], ring: Ring) -> tuple[Passing, Passing]:
    draining, joining = [], []
    for member in members:
        if member.state == "draining":
            draining.append(member)
        elif member.state == "joining":
            joining.append(member)
    leaving = coming = NOTHING_PASSES
    if draining:
        with_them, _ = ring.updated(_as_up(draining))
        without, delta = with_them.updated(
            [Change("member", member.id, None, member) for member in draining]
        )
        leaving = passing_of(moves(with_them, without, delta.put))
    if joining:
        with_them, delta = ring.updated(_as_up(joining))
        coming = passing_of(moves(ring, with_them, delta.put))
    return leaving, coming


def _as_up(members: Iterable[Member]) -> list[Change]:
    return [
        Change("member", member.id, member, msgspec.structs.replace(member, state="up"))
        for member in members
    ]


# --- in words ----------------------------------------------------------------------------------


def share(tokens: int) -> str:
    """So many tokens as a part of the ring: "17.20 %", "0.008 %", "-" for none; copies in several
    places may be more than 100 %."""
    percent = tokens * 100 / SPACE
    if not tokens:
        return "-"
    if percent >= 99.995:
        return f"{percent:.0f} %"
    if percent >= 1:
        return f"{percent:.2f} %"
    return f"{percent:.3f} %" if percent >= 0.0005 else "<.001 %"


def token_text(token: int) -> str:
    """A token as 16 hexadecimal digits."""
    return f"{token:016x}"


def ranges_of(member: Member, ring: Ring) -> tuple[Range, ...]:
    """The ranges that ``member`` owns, ascending. Cost follows its tokens, not the ring."""
    rows = []
    for token in sorted(member_tokens(member, ring.settings.tokens_per_weight)):
        row = ring.range_ending(token)
        if row is not None and row.replicas[:1] == (member.id,):
            rows.append(row)
    if rows and rows[0].start == 0:  # what is above the highest token wraps to the lowest
        row = ring.range_ending(SPACE - 1)
        if row is not None and row != rows[-1] and row.replicas[:1] == (member.id,):
            rows.append(row)
    return tuple(rows)


MEANING: Final = {
    "up": "It owns ranges of the ring and holds copies of others.",
    "down": "It is known not to work, but **still owns its ranges**: the ring does not move for a "
    "short outage. If it will not come back, let it leave, so that others take over.",
    "joining": "It owns nothing yet. Once it says that it is up, it takes its ranges; what it will "
    "take is under *moves in progress*.",
    "draining": "It owns nothing any more: others took its ranges. What it still has to hand over "
    "is under *moves in progress*; when that is copied, it can leave.",
}
"""What each state of a member means, as Markdown."""
_ESCAPED: Final = str.maketrans({each: f"\\{each}" for each in "\\`*_{}[]<>()#+-.!|~&:@/=$^\"'"})


def explain_member(state: MetadataState, ring: Ring, member_id: str) -> str:
    """Who this member is, what it owns, what its state means and what to do, as Markdown."""
    member = state.members.get(member_id)
    name = _plain(member_id)
    if member is None:
        return (
            f"# member {name}\n\nThere is no such member now: it left, or never joined. "
            "The SQL tab knows its past: `SELECT * FROM history WHERE key = …`."
        )
    lines = [f"# member {name}: {member.state}", MEANING.get(member.state, ""), "## What it owns"]
    rows = ranges_of(member, ring)
    owned = sum(row.end - row.start + 1 for row in rows)
    tokens = len(member_tokens(member, ring.settings.tokens_per_weight))
    how = (
        "given by hand"
        if member.tokens is not None
        else f"derived from its id and weight {member.weight}"
    )
    lines.append(
        f"{plural(tokens, 'token')}, {how}. It owns {share(owned)} of the ring in "
        f"{plural(len(rows), 'range')}; an equal share among {count(ring.members)} "
        f"would be {share(SPACE // ring.members) if ring.members else '-'}."
    )
    if ring.members and owned > 2 * SPACE // ring.members and member.weight == 1:
        lines.append(
            "That is more than twice an equal share. Chance does that with few tokens; a higher "
            "`ring/tokens_per_weight` evens it out (and moves much data once)."
        )
    partners: dict[str, int] = {}
    for row in rows:
        for other in row.replicas[1:]:
            partners[other] = partners.get(other, 0) + row.end - row.start + 1
    if partners:
        best = sorted(partners.items(), key=lambda each: (-each[1], each[0]))[:6]
        told = ", ".join(f"{_plain(other)} ({share(size)})" for other, size in best)
        lines.append(f"Copies of what it owns are at: {told}.")
    elif rows:
        lines.append("**There is no other copy of what it owns.**")
    lines.append("## Its life")
    lines.append(
        f"It joined in slot {count(member.joined_slot)} and changed last in slot "
        f"{count(member.updated_slot)}. "
        + (
            f"It lives on lease {member.lease}: if that expires, it leaves by itself."
            if member.lease
            else "It lives on no lease: it stays until somebody lets it leave."
        )
    )
    if member.state == "down":
        lines.append(f"To let it leave: `trex members leave` with its id ({name}).")
    return "\n\n".join(line for line in lines if line)


def _plain(text: str) -> str:
    return visible(text).replace("\n", "\\n").translate(_ESCAPED)
