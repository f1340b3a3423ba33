"""The ring: which members hold which range of the token space, and what a change moves.

This module alone derives placement from members.  It is pure and deterministic: the same members
and settings give the same ranges at every listener, however they came about.

Tokens are unsigned 64-bit numbers, stable across versions and languages::

    token i of a member with weight w     for i in 0 .. w * tokens_per_weight - 1:
        the (i mod 8)-th big-endian 64-bit word of
        BLAKE2b-512("trex member token" 0x00, id in UTF-8, 0x00, (i div 8) as 4 bytes big-endian)
    token of a key:
        the first big-endian 64-bit word of BLAKE2b-512("trex key" 0x00, key bytes)

So a higher weight only adds tokens.  (Known answers: tests/core/test_ring.py.)

Placement: a key belongs to the first token at or above its own, wrapping at the end; that token's
member is the *owner*.  From there the walk goes upward.  It takes the next member of a zone not
taken yet until ``replication_factor`` members are found; a member without a zone is a zone of its
own.  If there are fewer zones than that, or none of a missing zone lies within the first
SPREAD_TOKENS_MAX tokens of the walk, the nearest members of zones already taken fill up.  With
spread "none" zones do not count.  Of two members with an equal token the lower id comes first.

Nothing per range is stored.  A join or leave edits the sorted tokens, and only the ranges whose
walk meets an edited token are derived again: cost follows the change, not the size of the ring.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

import msgspec
from immutables import Map

from trex_core.metadata.commands import Change, ConfigEntry, Member
from trex_core.metadata.ordered import NOTHING, Ordered

TOKEN_MAX: Final = (1 << 64) - 1
"""The largest token."""
SPREAD_TOKENS_MAX: Final = 128
"""Tokens a walk looks at for a zone it still lacks: bounds what one change can move, and keeps a
zone of a few small members from having to hold a copy of everything."""
TOUCHED_SHARE: Final = 8
"""If more than one in so many tokens is edited at once, all ranges are compared: it is cheaper."""
REPLICATION_FACTOR_MAX: Final = 16
TOKENS_PER_WEIGHT_MAX: Final = 64

REPLICATION_FACTOR_KEY: Final = "ring/replication_factor"
SPREAD_KEY: Final = "ring/spread"
TOKENS_PER_WEIGHT_KEY: Final = "ring/tokens_per_weight"
SETTING_PREFIX: Final = "ring/"
"""Configuration keys under it are settings of the ring; others than these three are refused."""
SPREADS: Final = ("zone", "none")

_OWNING_STATES: Final = ("up", "down")
_WORDS: Final = struct.Struct(">8Q")

Entry: TypeAlias = tuple[int, str, str | None]
"""(token, member, zone)"""


class RingSettings(msgspec.Struct, frozen=True):
    """How the ring is laid out; each field is a configuration key under ``ring/``."""

    replication_factor: int = 3
    spread: str = "zone"
    tokens_per_weight: int = 8


DEFAULT_SETTINGS: Final = RingSettings()


def setting_fault(key: str, value: str) -> str:
    """What is wrong with ``value`` for the ring setting ``key``; empty if nothing is."""
    match key:
        case "ring/replication_factor":
            return _integer_fault(value, REPLICATION_FACTOR_MAX)
        case "ring/tokens_per_weight":
            return _integer_fault(value, TOKENS_PER_WEIGHT_MAX)
        case "ring/spread":
            return "" if value in SPREADS else 'must be "zone" or "none"'
        case _:
            known = f"{REPLICATION_FACTOR_KEY}, {SPREAD_KEY}, {TOKENS_PER_WEIGHT_KEY}"
            return f"no such setting; there are {known}"


def _integer_fault(value: str, maximum: int) -> str:
    whole = value.isascii() and value.isdigit() and len(value) <= 3 and value[0] != "0"
    return "" if whole and int(value) <= maximum else f"must be a whole number, 1 to {maximum}"


def with_setting(settings: RingSettings, key: str, entry: ConfigEntry | None) -> RingSettings:
    """``settings`` after ``key`` was written or removed (None); other keys change nothing."""
    match key:
        case "ring/replication_factor":
            factor = int(entry.value) if entry else DEFAULT_SETTINGS.replication_factor
            return msgspec.structs.replace(settings, replication_factor=factor)
        case "ring/tokens_per_weight":
            count = int(entry.value) if entry else DEFAULT_SETTINGS.tokens_per_weight
            return msgspec.structs.replace(settings, tokens_per_weight=count)
        case "ring/spread":
            spread = entry.value if entry else DEFAULT_SETTINGS.spread
            return msgspec.structs.replace(settings, spread=spread)
        case _:
            return settings


def settings_of(config: Map[str, ConfigEntry]) -> RingSettings:
    """The settings that a configuration holds."""
    settings = DEFAULT_SETTINGS
    for key in (REPLICATION_FACTOR_KEY, SPREAD_KEY, TOKENS_PER_WEIGHT_KEY):
        settings = with_setting(settings, key, config.get(key))
    return settings


# --- tokens ------------------------------------------------------------------------------------


def derived_tokens(member_id: str, count: int) -> tuple[int, ...]:
    """The first ``count`` tokens of member ``member_id``, in order of derivation."""
    stem = hashlib.blake2b(b"trex member token\0" + member_id.encode() + b"\0")
    words: list[int] = []
    for block in range((count + 7) // 8):
        digest = stem.copy()
        digest.update(block.to_bytes(4, "big"))
        words.extend(_WORDS.unpack(digest.digest()))
    return tuple(words[:count])


def key_token(key: str | bytes) -> int:
    """The token of a key."""
    data = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.blake2b(b"trex key\0" + data).digest()[:8], "big")


def member_tokens(member: Member, tokens_per_weight: int = 8) -> tuple[int, ...]:
    """The distinct tokens a member has: the given ones, or derived ones; whether or not its state
    lets it own ranges."""
    if member.tokens is not None:
        return member.tokens
    tokens = derived_tokens(member.id, member.weight * tokens_per_weight)
    return tuple(dict.fromkeys(tokens))


# --- rows --------------------------------------------------------------------------------------


class Range(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Tokens ``start``..``end``, both inclusive, held by ``replicas``, the owner first. The ranges
    of a ring part the whole token space, without wrapping; ``end`` names a range."""

    start: int
    end: int
    replicas: tuple[str, ...]


class RingDelta(msgspec.Struct, frozen=True):
    """What a change does to the ranges: write ``put`` (by ``end``, ascending), remove the ranges
    that end at ``removed`` (ascending)."""

    put: tuple[Range, ...] = ()
    removed: tuple[int, ...] = ()


NO_DELTA: Final = RingDelta()


class Move(msgspec.Struct, frozen=True):
    """Tokens ``start``..``end``, both inclusive, were held by ``before`` and are held by ``after``,
    other members (another order alone is no move)."""

    start: int
    end: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def lost(self) -> tuple[str, ...]:
        """The members that no longer hold it."""
        return tuple(member for member in self.before if member not in self.after)

    @property
    def gained(self) -> tuple[str, ...]:
        """The members that hold it now and must fetch it from one of ``before``."""
        return tuple(member for member in self.after if member not in self.before)


# --- the ring ----------------------------------------------------------------------------------


class _Placed(msgspec.Struct, frozen=True, gc=False):
    """What of a member the ring depends on: its entries, ascending."""

    entries: tuple[Entry, ...]

    @property
    def zone(self) -> str | None:
        return self.entries[0][2]


class Ring:
    """The ring at one slot. Never changed once made: :meth:`updated` makes the next."""

    __slots__ = ("_entries", "_given", "_placed", "_want", "_want_zones", "_zones", "settings")

    def __init__(
        self,
        settings: RingSettings,
        entries: Ordered[Entry],
        placed: Map[str, _Placed],
        given: Map[str, Member],
        zones: Map[str, int],
    ) -> None:
        self.settings: Final = settings
        self._entries: Final = entries
        self._placed: Final = placed
        self._given: Final = given
        self._zones: Final = zones
        """zone -> members in it that own ranges"""
        self._want: Final = min(settings.replication_factor, len(placed))
        zoneless = len(placed) - sum(zones.values()) if len(zones) < self._want else self._want
        self._want_zones: Final = (
            min(self._want, len(zones) + zoneless) if settings.spread == "zone" else 0
        )

    @classmethod
    def of(
        cls,
        members: Iterable[Member] = (),
        replication_factor: int = DEFAULT_SETTINGS.replication_factor,
        spread: str = DEFAULT_SETTINGS.spread,
        tokens_per_weight: int = DEFAULT_SETTINGS.tokens_per_weight,
    ) -> Ring:
        """The ring of these members; only those up or down own ranges. Costs about 1 µs for each
        token: for changes use :meth:`updated`. Raises ``ValueError`` for settings out of range."""
        settings = RingSettings(replication_factor, spread, tokens_per_weight)
        if not 1 <= replication_factor <= REPLICATION_FACTOR_MAX:
            raise ValueError(f"replication_factor must be 1 to {REPLICATION_FACTOR_MAX}")
        if not 1 <= tokens_per_weight <= TOKENS_PER_WEIGHT_MAX:
            raise ValueError(f"tokens_per_weight must be 1 to {TOKENS_PER_WEIGHT_MAX}")
        if spread not in SPREADS:
            raise ValueError('spread must be "zone" or "none"')
        return _built(settings, members)

    # --- reading

    def owner(self, key: str | bytes) -> str | None:
        """The member that owns ``key``; None if the ring has no member."""
        replicas = self.replicas_at(key_token(key))
        return replicas[0] if replicas else None

    def replicas(self, key: str | bytes) -> tuple[str, ...]:
        """The members that hold ``key``, the owner first."""
        return self.replicas_at(key_token(key))

    def replicas_at(self, token: int) -> tuple[str, ...]:
        """The members that hold ``token``, the owner first."""
        return self._walk(*self._entries.find((token, "", None)))[0]

    def ranges(self) -> Iterator[Range]:
        """All ranges, ascending: one for each distinct token, and one up to TOKEN_MAX. An empty
        ring has one range with no replicas."""
        start, end = 0, -1
        for at, chunk in enumerate(self._entries.chunks):
            for index, entry in enumerate(chunk):
                if entry[0] != end:
                    end = entry[0]
                    yield Range(start, end, self._walk(at, index)[0])
                    start = end + 1
        if end != TOKEN_MAX:
            yield Range(start, TOKEN_MAX, self._walk(0, 0)[0])

    @property
    def tokens(self) -> int:
        """How many tokens the ring has."""
        return self._entries.size

    @property
    def members(self) -> int:
        """How many members own ranges."""
        return len(self._placed)

    # --- changing

    def with_changes(self, changes: Iterable[Change]) -> Ring:
        """The ring after ``changes``, without saying what became of the ranges: cheaper."""
        return self._edited(changes)[0]

    def updated(self, changes: Iterable[Change]) -> tuple[Ring, RingDelta]:
        """The ring after ``changes`` (of one or several slots, in order; those that are not of
        members or ring settings are ignored), and exactly the ranges that differ from before.

        Costs about 100 µs for a join or leave of 8 tokens, however large the ring. It is rebuilt
        whole only if a setting changes, or the number of members or zones passes the replication
        factor, since then every range may change.
        """
        after, gone, came = self._edited(changes)
        if after is self:
            return self, NO_DELTA
        touched = len(gone) + len(came)
        if self.rules != after.rules or touched * TOUCHED_SHARE > after.tokens:
            return after, self._whole_delta(after)
        old_rows: dict[int, Range | None] = {}
        new_rows: dict[int, Range | None] = {}
        for entry in gone:
            self.add_around(entry, old_rows)
        for entry in came:
            after.add_around(entry, new_rows)
        newcomers = {name for _, name, _ in came if name not in self._placed}
        put, removed = [], []
        for end in sorted(old_rows.keys() | new_rows.keys()):
            new = new_rows.get(end) or after.range_ending(end)
            if new is None:
                removed.append(end)
            elif not newcomers.isdisjoint(new.replicas) or new != (
                old_rows.get(end) or self.range_ending(end)
            ):
                put.append(new)
        return after, RingDelta(tuple(put), tuple(removed))

    def _edited(self, changes: Iterable[Change]) -> tuple[Ring, list[Entry], list[Entry]]:
        """The ring after ``changes``, and the entries that went and came."""
        settings = self.settings
        newest: dict[str, Member | None] = {}
        for change in changes:
            if change.kind == "member":
                newest[change.key] = change.new if isinstance(change.new, Member) else None
            elif change.kind == "config" and change.key.startswith(SETTING_PREFIX):
                entry = change.new if isinstance(change.new, ConfigEntry) else None
                settings = with_setting(settings, change.key, entry)
        given = self._given
        gone: list[Entry] = []
        came: list[Entry] = []
        placed, zones = self._placed, self._zones
        for name, member in newest.items():
            if member is None:
                if name in given:
                    given = given.delete(name)
            else:
                given = given.set(name, member)
            old = placed.get(name)
            new = _placed(member, settings.tokens_per_weight)
            if old == new:
                continue
            if old is not None:
                gone.extend(old.entries)
                placed = placed.delete(name)
                zones = _counted(zones, old.zone, -1)
            if new is not None:
                came.extend(new.entries)
                placed = placed.set(name, new)
                zones = _counted(zones, new.zone, 1)
        if settings.tokens_per_weight != self.settings.tokens_per_weight:
            return _built(settings, given.values()), [], []
        if not gone and not came and settings == self.settings:
            return (self if given is self._given else self._with_given(given)), [], []
        entries = self._entries.edited(gone, came)
        return Ring(settings, entries, placed, given, zones), gone, came

    def _with_given(self, given: Map[str, Member]) -> Ring:
        return Ring(self.settings, self._entries, self._placed, given, self._zones)

    def _whole_delta(self, after: Ring) -> RingDelta:
        before = {row.end: row for row in self.ranges()}
        put = tuple(row for row in after.ranges() if before.pop(row.end, None) != row)
        return RingDelta(put, tuple(before))

    @property
    def rules(self) -> tuple[int, int, int]:
        """What every range depends on beside the entries near it."""
        return self._want, self._want_zones, self.settings.tokens_per_weight

    # --- walking

    def _walk(self, at: int, index: int) -> tuple[tuple[str, ...], int]:
        """The replicas found from the entry at chunk ``at``, ``index``, and the number of entries
        looked at. That number grows by at most one when the walk begins one entry earlier."""
        chunks = self._entries.chunks
        want, want_zones = self._want, self._want_zones
        if not want:
            return (), 0
        chosen: list[str] = []
        fill: list[str] = []
        zones: list[str | None] = []
        looked = 0
        while True:
            if at == len(chunks):
                at = 0
            chunk = chunks[at]
            for here in range(index, len(chunk)):
                _, member, zone = chunk[here]
                looked += 1
                if member not in chosen and member not in fill:
                    if zone is None or not want_zones or zone not in zones:
                        chosen.append(member)
                        zones.append(zone)
                    else:
                        fill.append(member)
                if len(chosen) + len(fill) >= want and (
                    len(chosen) >= want_zones or looked >= SPREAD_TOKENS_MAX
                ):
                    if fill:
                        chosen = (chosen + fill)[:want]
                    return tuple(chosen), looked
            at += 1
            index = 0

    def add_around(self, entry: Entry, rows: dict[int, Range | None]) -> None:
        """Add to ``rows``, by their ends, all ranges that depend on ``entry``, one of this ring's:
        those whose walk looks at it, and the one that begins after it. None: not worked out."""
        chunks = self._entries.chunks
        at, index = self._entries.find(entry)
        self._add_next(at, index, rows)
        for distance in range(self._entries.size):
            replicas, looked = self._walk(at, index)
            if looked <= distance:
                return
            end = chunks[at][index][0]
            if index:
                index -= 1
            elif at:
                at -= 1
                index = len(chunks[at]) - 1
            else:
                rows[end] = Range(0, end, replicas)
                at = len(chunks) - 1
                index = len(chunks[at]) - 1
                rows.setdefault(TOKEN_MAX, None)
                continue
            before = chunks[at][index][0]
            if before != end:
                rows[end] = Range(before + 1, end, replicas)
            else:
                rows.setdefault(end, None)

    def _add_next(self, at: int, index: int, rows: dict[int, Range | None]) -> None:
        """Add to ``rows`` the range that begins after the entry at chunk ``at``, ``index``."""
        chunks = self._entries.chunks
        token = chunks[at][index][0]
        index += 1
        if index == len(chunks[at]):
            at, index = at + 1, 0
        end = chunks[at][index][0] if at < len(chunks) else TOKEN_MAX
        if end != token and end not in rows:
            rows[end] = Range(token + 1, end, self._walk(at, index)[0])

    def range_end(self, token: int) -> int:
        """The end of the range that holds ``token``."""
        at, index = self._entries.find((token, "", None))
        chunks = self._entries.chunks
        return chunks[at][index][0] if at < len(chunks) else TOKEN_MAX

    def range_ending(self, end: int) -> Range | None:
        """The range that ends at ``end``; None if none does."""
        chunks = self._entries.chunks
        at, index = self._entries.find((end, "", None))
        if end != TOKEN_MAX and (at == len(chunks) or chunks[at][index][0] != end):
            return None
        start = 0
        if index:
            start = chunks[at][index - 1][0] + 1
        elif at:
            start = chunks[at - 1][-1][0] + 1
        return Range(start, end, self._walk(at, index)[0])


def moves(before: Ring, after: Ring, changed: Iterable[Range] | None = None) -> tuple[Move, ...]:
    """The exact ranges that pass from members to others between two rings, ascending, neighbours
    with equal replicas joined. ``changed``: the ``put`` of the delta between them, where it is
    known, so that only these are looked at."""
    found: list[Move] = []
    for row in after.ranges() if changed is None else changed:
        start = row.start
        while start <= row.end:
            end = min(row.end, before.range_end(start))
            held = before.replicas_at(start)
            if set(held) != set(row.replicas):
                last = found[-1] if found else None
                if last and (last.end + 1, last.before, last.after) == (start, held, row.replicas):
                    found[-1] = Move(last.start, end, held, row.replicas)
                else:
                    found.append(Move(start, end, held, row.replicas))
            start = end + 1
    return tuple(found)


def _placed(member: Member | None, tokens_per_weight: int) -> _Placed | None:
    """A member's entries; None if it owns no ranges."""
    if member is None or member.state not in _OWNING_STATES:
        return None
    tokens = member_tokens(member, tokens_per_weight)
    return _Placed(tuple((token, member.id, member.zone) for token in tokens))


def _counted(zones: Map[str, int], zone: str | None, by: int) -> Map[str, int]:
    if zone is None:
        return zones
    count = zones.get(zone, 0) + by
    return zones.set(zone, count) if count else zones.delete(zone)


def _built(settings: RingSettings, members: Iterable[Member]) -> Ring:
    given = {member.id: member for member in members}
    entries: list[Entry] = []
    all_placed: dict[str, _Placed] = {}
    zones: dict[str, int] = {}
    for name, member in given.items():
        placed = _placed(member, settings.tokens_per_weight)
        if placed is not None:
            all_placed[name] = placed
            entries.extend(placed.entries)
            if placed.zone is not None:
                zones[placed.zone] = zones.get(placed.zone, 0) + 1
    entries.sort()
    return Ring(settings, Ordered.of(entries), Map(all_placed), Map(given), Map(zones))


EMPTY_RING: Final = Ring(DEFAULT_SETTINGS, NOTHING, Map(), Map(), Map())
