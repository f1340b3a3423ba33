"""What an operator sees, as one immutable value: ``reduce(view, event)`` alone moves it on.

Pure: no Textual, no socket, no clock.  Time is ``at_ms`` of the events: wall-clock milliseconds of
whoever watches, advanced by a monotonic clock, so that it never goes back.  Everything is bounded,
whatever comes in, in whatever order.  What it means and what to do is ``advice``'s.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import immutables
import msgspec

from trex_core.messages import NO_BALLOT, Ballot, ListenerReport, StreamTip, VoterDigest

SPANS_MAX: Final = 4_000
"""Most spans of the ballot timeline that are kept."""
SLOTS_MAX: Final = 128
"""Most newest slots that are kept."""
SECONDS_MAX: Final = 600
"""So many newest seconds of rates and latencies are kept."""
LOG_MAX: Final = 2_000
"""Most lines of the event log that are kept."""
LISTENERS_MAX: Final = 4_096
"""Most listeners that are kept."""


# --- events -----------------------------------------------------------------------------------


class Opened(msgspec.Struct, frozen=True, tag=True):
    """The first event: which cluster this is, and since when it is watched. ``source`` is "live"
    or the name of the recording."""

    at_ms: int
    cluster: str
    voters: tuple[int, ...]
    election_ms: int
    """The longest election timeout, in milliseconds."""
    source: str


class Tipped(msgspec.Struct, frozen=True, tag=True):
    """The stream heartbeat of ``voter``."""

    at_ms: int
    voter: int
    tip: StreamTip


class SlotSeen(msgspec.Struct, frozen=True):
    """A fixed slot, decoded as far as a line of the screen needs it. ``kind`` as in ``commits``."""

    slot: int
    kind: str
    key: str
    size_bytes: int
    ballot: Ballot
    """First proposed under it."""


class Fixed(msgspec.Struct, frozen=True, tag=True):
    """Slots ``first``..``last`` were delivered since the last such event; ``newest`` are details
    of at most SLOTS_MAX of them, ascending, the last ones."""

    at_ms: int
    first: int
    last: int
    newest: tuple[SlotSeen, ...]


class Reported(msgspec.Struct, frozen=True, tag=True):
    """A listener's report was heard on the repair group."""

    at_ms: int
    report: ListenerReport


class Followed(msgspec.Struct, frozen=True, tag=True):
    """Where the dashboard's own listener is. ``stored`` is -1 without a store."""

    at_ms: int
    applied: int
    stored: int
    tip: int
    ready: bool
    members: int
    counters: dict[str, int]


class Jumped(msgspec.Struct, frozen=True, tag=True):
    """The own listener jumped over slots by a snapshot: their details are not known."""

    at_ms: int
    from_slot: int
    to_slot: int


class MemberMoved(msgspec.Struct, frozen=True, tag=True):
    """A member joined, changed or left in ``slot``; ``words`` says how."""

    at_ms: int
    slot: int
    member: str
    words: str


class PastLed(msgspec.Struct, frozen=True, tag=True):
    """From the store's ``ballots``, once after start: a leadership of before we watched. Times are
    of the proposers' clocks."""

    at_ms: int
    ballot: Ballot
    first_slot: int
    last_slot: int
    from_ms: int
    to_ms: int


class Clock(msgspec.Struct, frozen=True, tag=True):
    """Time passed. Comes some four times a second, whatever else comes."""

    at_ms: int


class Trouble(msgspec.Struct, frozen=True, tag=True):
    """The feed itself is in trouble (``text``), or no longer (empty)."""

    at_ms: int
    text: str


class Did(msgspec.Struct, frozen=True, tag=True):
    """The operator did something here; ``words`` says what, and how it ended."""

    at_ms: int
    good: bool
    words: str


Event: TypeAlias = (
    Opened
    | Tipped
    | Fixed
    | Reported
    | Followed
    | Jumped
    | MemberMoved
    | PastLed
    | Clock
    | Trouble
    | Did
)


# --- the view ---------------------------------------------------------------------------------


class VoterView(msgspec.Struct, frozen=True):
    """A voter as last heard: ``heard_ms`` is when (None: never), ``tip`` what it said. ``told`` is
    the highest number of its transitions that is in ``spans`` already (of boot ``boot``).
    ``fsync_p99s_us`` is one value a second, the newest last."""

    voter: int
    heard_ms: int | None = None
    tip: StreamTip | None = None
    boot: int = 0
    told: int = 0
    fsync_p99s_us: tuple[int, ...] = ()

    @property
    def digest(self) -> VoterDigest | None:
        """What it said of itself."""
        return None if self.tip is None else self.tip.digest


class Span(msgspec.Struct, frozen=True):
    """A stretch of one voter's lane in the ballot timeline. ``role`` is "polling" (asks whether
    others hear a leader), "candidate" (stands), "leader", "follower" or "down" (was not heard).
    ``to_ms`` is None while it lasts."""

    voter: int
    role: str
    ballot: Ballot
    from_ms: int
    to_ms: int | None
    why: str


class Second(msgspec.Struct, frozen=True):
    """One second: slots fixed in it, and the newest commit latencies its leader told (µs, 0
    unknown)."""

    at_s: int
    commits: int
    p50_us: int
    p99_us: int


class LogLine(msgspec.Struct, frozen=True):
    """A line of the event log. ``level`` is "info", "good", "warn" or "bad"; ``subject`` says whom
    it is about: "voter 3", "listener cache-17", "member …", "dashboard"."""

    at_ms: int
    level: str
    subject: str
    words: str


class ListenerView(msgspec.Struct, frozen=True):
    """A listener as last heard of, itself (``direct``) or through a voter's digest."""

    report: ListenerReport
    heard_ms: int
    direct: bool


class View(msgspec.Struct, frozen=True):
    """All that is shown. Begin with ``View()`` and the event :class:`Opened`."""

    now_ms: int = 0
    since_ms: int = 0
    """When watching began."""
    cluster: str = ""
    source: str = ""
    election_ms: int = 1000
    voters: tuple[VoterView, ...] = ()
    """Ascending by id; all of the cluster file."""
    spans: tuple[Span, ...] = ()
    """Ascending by (from_ms, voter)."""
    slots: tuple[SlotSeen, ...] = ()
    """The newest delivered, ascending."""
    fixed_ms: int | None = None
    """When a slot was delivered last."""
    seconds: tuple[Second, ...] = ()
    """Ascending, without holes; the last is the second under way."""
    listeners: immutables.Map[tuple[str, int], ListenerView] = immutables.Map()
    """By (name, instance)."""
    log: tuple[LogLine, ...] = ()
    """The oldest first."""
    followed: Followed | None = None
    trouble: str = ""

    def voter(self, voter: int) -> VoterView | None:
        """The voter of that id."""
        return next((each for each in self.voters if each.voter == voter), None)

    @property
    def ballot(self) -> Ballot:
        """The highest ballot anybody told of as led or followed."""
        return max((each.tip.ballot for each in self.voters if each.tip), default=NO_BALLOT)

    @property
    def tip_slot(self) -> int:
        """The highest slot anybody told of as fixed."""
        return max((each.tip.tip_slot for each in self.voters if each.tip), default=0)


def reduce(view: View, event: Event) -> View:
    """The view after ``event``. Total: nothing that comes raises."""
    match event:
        case Opened():
            return msgspec.structs.replace(
                view,
                now_ms=event.at_ms,
                since_ms=event.at_ms,
                cluster=event.cluster,
                source=event.source,
                election_ms=event.election_ms,
                voters=tuple(VoterView(voter) for voter in event.voters),
            )
        case _:
            return msgspec.structs.replace(view, now_ms=max(view.now_ms, event.at_ms))
