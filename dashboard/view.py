"""What an operator sees, as one immutable value: ``reduce(view, event)`` alone moves it on.

Pure: no Textual, no socket, no clock.  Time is ``at_ms`` of the events: wall-clock milliseconds of
whoever watches, advanced by a monotonic clock, so that it never goes back.  Everything is bounded,
whatever comes in, in whatever order.  What it means and what to do is ``advice``'s.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, TypeAlias

import immutables
import msgspec

from dashboard import words
from trex_core.messages import (
    NO_BALLOT,
    Ballot,
    ListenerReport,
    StreamTip,
    Transition,
    VoterDigest,
)
from trex_core.roster import BEHIND_MS, SILENT_INTERVALS, mean_interval_ms

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
FSYNCS_MAX: Final = 120
"""So many newest seconds of a voter's sync times are kept."""
BOOTS_MAX: Final = 8
"""So many newest restarts of a voter are kept."""
CHARS_MAX: Final = 200
"""Texts from outside are cut to so many characters."""

LEADER_SILENT_MS: Final = 600
"""A leader tells its tip at least each 100 ms: unheard for so long, six in a row were lost, or it
does not lead any more."""
VOTER_SILENT_MS: Final = 3_000
"""Any other voter tells its tip at least each second: unheard for so long, three in a row were
lost, or it is gone."""
BEHIND_SLOTS: Final = 1_000
"""A voter or listener that lacks more slots than this, and than were fixed in the last second, is
behind."""
REPAIR_WINDOW_S: Final = 8
"""A listener's requests are counted over so many seconds of its own at least."""
FORGET_MS: Final = 600_000
"""A listener unheard for so long is forgotten, in milliseconds."""
LEFT_MS: Final = 120_000
"""For so long what others still tell of a listener that left is not believed."""
TOPIC_LINES_MAX: Final[dict[str, int]] = {"voter": 120, "listener": 20, "member": 60}
"""Most lines a minute of the event log about one kind of subject: a flood drives nothing out."""
SNAPSHOT_LINE_MS: Final = 60_000
"""At a high rate snapshots follow each other fast: one line of the log in this time is enough."""
PAST_WHY: Final = "told by the slots it proposed"
"""Reason of a leadership of before we watched."""


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
    ``fsync_p99s_us`` is one value a second, the newest last (0: nothing heard in that second).

    ``silent``: it was not heard for its bound (:func:`silent_after_ms`). ``lag`` is how many slots
    it lacked of the tip known when it spoke last, ``lags`` whether that is called behind.
    ``stuck_ms`` is since when, leading, it has proposed slots and fixed none. ``boots_ms`` are its
    newest restarts as seen; ``rolled_ms`` is when it last spoke with a boot number below ``boot``.
    """

    voter: int
    heard_ms: int | None = None
    tip: StreamTip | None = None
    boot: int = 0
    told: int = 0
    fsync_p99s_us: tuple[int, ...] = ()
    fsync_s: int = 0
    """The second of the newest of them."""
    silent: bool = False
    lag: int = 0
    lags: bool = False
    stuck_ms: int | None = None
    boots_ms: tuple[int, ...] = ()
    rolled_ms: int | None = None
    polled: bool = False
    """It looked for a leader since it last had one, and the log says so."""
    stood: bool = False
    """The same for standing."""

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
    """A listener as last heard of, itself (``direct``) or through a voter's digest. ``lags`` and
    ``silent``: the log calls it behind, or unheard for several of its intervals."""

    report: ListenerReport
    heard_ms: int
    direct: bool
    lags: bool = False
    silent: bool = False
    counted: tuple[int, int] = (0, 0)
    """Its uptime in seconds, and its requests up to then, when they were counted last."""
    asks_per_min: int = 0
    """Repairs and catch-ups it asked for, a minute, over REPAIR_WINDOW_S or longer."""


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
    led: Ballot = NO_BALLOT
    """The highest ballot known to have led."""
    counted: int | None = None
    """Slots up to here are in ``seconds``, or were fixed before we watched."""
    left: immutables.Map[tuple[str, int], int] = immutables.Map()
    """Listeners that said they leave, and when."""
    swept_s: int = 0
    """In which second listeners were last looked through."""
    snapshot_slot: int = 0
    """The newest snapshot any voter told of."""
    snapshot_ms: int | None = None
    """When the log last said so."""
    lines: immutables.Map[str, tuple[int, int]] = immutables.Map()
    """By kind of subject: the minute, and how many lines of the log it has had in it."""

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


_with: Final = msgspec.structs.replace


def silent_after_ms(voter: VoterView) -> int:
    """Unheard for so many milliseconds, ``voter`` is silent."""
    leads = voter.tip is not None and voter.tip.leading
    return LEADER_SILENT_MS if leads else VOTER_SILENT_MS


def behind_slots(view: View) -> int:
    """Who lacks more slots than this is behind: at a high rate many are on their way."""
    return BEHIND_SLOTS + (view.seconds[-2].commits if len(view.seconds) > 1 else 0)


def reduce(view: View, event: Event) -> View:
    """The view after ``event``. Total: nothing that comes raises, and an event that is older than
    what is known already changes nothing."""
    if event.at_ms > view.now_ms:
        view = _with(view, now_ms=event.at_ms)
    match event:
        case Tipped():
            return _tipped(view, event)
        case Clock():
            return _clock(view)
        case Fixed():
            return _fixed(view, event)
        case Reported():
            return _reported(view, event.report, event.at_ms, direct=True)
        case Followed():
            return _followed(view, event)
        case Opened():
            return _opened(view, event)
        case Jumped():
            about = f"{words.count(event.from_slot + 1)} to {words.count(event.to_slot)}"
            text = f"took slots {about} from a snapshot: their details are not known here"
            return _log(view, event.at_ms, "info", "dashboard", text)
        case MemberMoved():
            who = f"member {_cut(event.member)}"
            text = f"{_cut(event.words)} (slot {words.count(event.slot)})"
            return _log(view, event.at_ms, "info", who, text)
        case PastLed():
            return _past_led(view, event)
        case Trouble():
            return _trouble(view, event)
        case Did():
            level = "good" if event.good else "bad"
            return _log(view, event.at_ms, level, "dashboard", _cut(event.words))


def _cut(text: str) -> str:
    return text if len(text) <= CHARS_MAX else text[: CHARS_MAX - 1] + "…"


def _opened(view: View, event: Opened) -> View:
    known = {each.voter: each for each in view.voters}
    again = known.keys() == set(event.voters) and view.cluster == event.cluster
    voters = tuple(known.get(each) or VoterView(each) for each in sorted(set(event.voters)))
    return _with(
        view,
        since_ms=view.since_ms if again else event.at_ms,
        cluster=event.cluster,
        source=event.source,
        election_ms=max(1, event.election_ms),
        voters=voters,
    )


def _followed(view: View, event: Followed) -> View:
    before = view.followed
    if before is not None and event.at_ms < before.at_ms:
        return view
    view = _with(view, followed=event)
    if before is None or before.ready == event.ready:
        return view
    if event.ready:
        return _log(view, event.at_ms, "good", "dashboard", "its own listener is at the tip")
    lag = words.plural(max(0, event.tip - event.applied), "slot")
    text = f"its own listener is behind by {lag}"
    return _log(view, event.at_ms, "warn", "dashboard", text)


def _trouble(view: View, event: Trouble) -> View:
    text = _cut(event.text)
    if text == view.trouble:
        return view
    view = _with(view, trouble=text)
    if text:
        return _log(view, event.at_ms, "bad", "dashboard", text)
    return _log(view, event.at_ms, "good", "dashboard", "what was in the way is gone")


# --- the event log ----------------------------------------------------------------------------


def _log(view: View, at_ms: int, level: str, subject: str, text: str) -> View:
    """Add a line where its time puts it, unless its kind of subject had its share this minute."""
    kind, _, _ = subject.partition(" ")
    lines = view.lines
    if (most := TOPIC_LINES_MAX.get(kind)) is not None:
        minute, had = lines.get(kind, (0, 0))
        had = had + 1 if minute == view.now_ms // 60_000 else 1
        lines = lines.set(kind, (view.now_ms // 60_000, had))
        if had > most + 1:
            return _with(view, lines=lines)
        if had > most:
            level, subject = "info", "dashboard"
            text = f"more happens to {kind}s than this log can hold: see their own tab"
    at = len(view.log)
    while at and view.log[at - 1].at_ms > at_ms:
        at -= 1
    log = (*view.log[:at], LogLine(at_ms, level, subject, text), *view.log[at:])
    return _with(view, log=log[-LOG_MAX:], lines=lines)


# --- voters -----------------------------------------------------------------------------------


def _set(view: View, voter: VoterView) -> View:
    return _with(
        view,
        voters=tuple(voter if each.voter == voter.voter else each for each in view.voters),
    )


def _is_old(known: VoterView, digest: VoterDigest) -> bool:
    """Did the sender say this before what we know, or is it the same again?"""
    before = known.digest
    if before is None:
        return False
    if digest.boot != known.boot:
        return digest.boot < known.boot
    if digest.uptime_s != before.uptime_s:
        return digest.uptime_s < before.uptime_s
    if not digest.time_ms:
        return False
    # Within one second of its life; its wall clock may have been set back by more.
    return 0 <= before.time_ms - digest.time_ms < 2_000


def _tipped(view: View, event: Tipped) -> View:
    known = view.voter(event.voter)
    if known is None:
        return view
    tip, digest, name = event.tip, event.tip.digest, f"voter {event.voter}"
    if _is_old(known, digest):
        return _rolled_back(view, known, event)
    at_ms = event.at_ms if known.heard_ms is None else max(event.at_ms, known.heard_ms)
    if known.heard_ms is not None and at_ms - known.heard_ms > silent_after_ms(known):
        view = _fall_silent(view, known, at_ms)
        known = view.voter(event.voter) or known
    first = known.tip is None
    if not first and digest.boot > known.boot:
        view = _restarted(view, known, digest, at_ms)
        known = view.voter(event.voter) or known
    elif known.silent:
        away_ms = at_ms - (view.since_ms if known.heard_ms is None else known.heard_ms)
        text = "is heard for the first time" if first else f"is back after {words.age(away_ms)}"
        view = _log(view, at_ms, "good", name, text)
    if not first:
        view = _noted(view, known, digest, at_ms)

    lag = max(0, max(view.tip_slot, tip.tip_slot) - max(digest.fixed, 0))
    bound = behind_slots(view)
    lags = lag > (bound // 4 if known.lags else bound)
    if lags != known.lags:
        text = f"is behind by {words.plural(lag, 'slot')}" if lags else "has caught up"
        view = _log(view, at_ms, "warn" if lags else "good", name, text)
    stuck_ms = None
    if tip.leading and digest.proposed > digest.fixed:
        same = known.digest is not None and known.digest.fixed == digest.fixed
        stuck_ms = known.stuck_ms if same and known.stuck_ms is not None else at_ms
    second = at_ms // 1_000
    fsyncs = known.fsync_p99s_us
    if second > known.fsync_s:
        holes = min(FSYNCS_MAX, second - known.fsync_s - 1) if known.fsync_s else 0
        fsyncs = (*fsyncs, *(0,) * holes, digest.fsync_p99_us)[-FSYNCS_MAX:]
    newest = max((each.number for each in digest.transitions), default=0)
    view = _set(
        view,
        _with(
            known,
            heard_ms=at_ms,
            tip=tip,
            boot=digest.boot,
            told=max(known.told, newest),
            fsync_p99s_us=fsyncs,
            fsync_s=max(second, known.fsync_s),
            silent=False,
            lag=lag,
            lags=lags,
            stuck_ms=stuck_ms,
        ),
    )
    if view.counted is None:
        view = _with(view, counted=tip.tip_slot)
    view = _told(view, known, digest, at_ms)
    view = _settled(view, event.voter, tip, at_ms)
    for row in digest.listeners.rows:
        view = _reported(view, row.report, at_ms - max(0, row.age_ms), direct=False)
    return view


def _rolled_back(view: View, known: VoterView, event: Tipped) -> View:
    """An old tip is dropped. But a low boot number in a *new* one means an older copy of its disk:
    that voter must not run, and what it says is not believed."""
    before, digest = known.digest, event.tip.digest
    if before is None or digest.boot >= known.boot or digest.time_ms <= before.time_ms + 1_000:
        return view
    said = known.rolled_ms is not None
    view = _set(view, _with(known, rolled_ms=max(event.at_ms, known.rolled_ms or 0)))
    if said:
        return view
    text = (
        f"speaks with boot number {digest.boot}, and {known.boot} was heard before: its disk was "
        "restored from an older copy"
    )
    return _log(view, event.at_ms, "bad", f"voter {known.voter}", text)


def _restarted(view: View, known: VoterView, digest: VoterDigest, at_ms: int) -> View:
    """It runs anew: its transitions are counted anew, and it was down from when it was heard last
    until then."""
    times = min(BOOTS_MAX, digest.boot - known.boot)
    boots_ms = (*known.boots_ms, *(at_ms,) * times)[-BOOTS_MAX:]
    if not known.silent and known.heard_ms is not None:
        began_ms = _clamp(at_ms - max(0, digest.uptime_s) * 1_000, known.heard_ms, at_ms)
        gap = Span(known.voter, "down", NO_BALLOT, known.heard_ms, began_ms, "restarted")
        view = _begin(view, gap)
    known = _with(
        known, told=0, boots_ms=boots_ms, rolled_ms=None, polled=False, stood=False, lags=False
    )
    view = _set(view, known)
    text = f"restarted (boot {digest.boot})"
    if known.silent and known.heard_ms is not None:
        text += f" and is back after {words.age(at_ms - known.heard_ms)}"
    return _log(view, at_ms, "warn", f"voter {known.voter}", text)


def _noted(view: View, known: VoterView, digest: VoterDigest, at_ms: int) -> View:
    """Lines of the log about what changed between two tips of a voter."""
    before, name = known.digest, f"voter {known.voter}"
    if before is None:
        return view
    if before.has_room and not digest.has_room:
        text = f"its disk is full ({words.size(digest.free_bytes)} free): it accepts nothing more"
        view = _log(view, at_ms, "bad", name, text)
    elif digest.has_room and not before.has_room:
        view = _log(view, at_ms, "good", name, "its disk has room again: it accepts")
    if before.version != digest.version:
        text = f"runs version {_cut(digest.version)} now, before {_cut(before.version)}"
        view = _log(view, at_ms, "info", name, text)
    if digest.snapshot_slot > view.snapshot_slot:
        said_ms = view.snapshot_ms
        if said_ms is None or at_ms - said_ms >= SNAPSHOT_LINE_MS:
            text = f"has written a snapshot at slot {words.count(digest.snapshot_slot)}"
            view = _with(_log(view, at_ms, "info", name, text), snapshot_ms=at_ms)
        view = _with(view, snapshot_slot=digest.snapshot_slot)
    return view


def _fall_silent(view: View, voter: VoterView, now_ms: int) -> View:
    """Begin its span "down" with the moment it was heard last."""
    if voter.silent:
        return view
    name = f"voter {voter.voter}"
    if voter.heard_ms is None:
        from_ms, why = view.since_ms, "never heard since watching began"
        text = f"not heard since watching began {words.age(now_ms - from_ms)} ago"
    else:
        from_ms, why = voter.heard_ms, "not heard"
        text = f"not heard for {words.age(now_ms - from_ms)}"
    view = _begin(view, Span(voter.voter, "down", NO_BALLOT, from_ms, None, why))
    view = _set(view, _with(voter, silent=True))
    return _log(view, now_ms, "bad", name, text)


# --- the ballot timeline ----------------------------------------------------------------------


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def _order(span: Span) -> tuple[int, int]:
    return (span.from_ms, span.voter)


def _begin(view: View, span: Span) -> View:
    """Put ``span`` at the end of its voter's lane: what lasted there ends where it begins, so that
    spans of a lane never overlap. Beyond SPANS_MAX the oldest that have ended go."""
    kept = list(view.spans)
    at = next((at for at in reversed(range(len(kept))) if kept[at].voter == span.voter), None)
    if at is not None:
        last = kept[at]
        if span.from_ms < last.from_ms:
            span = _with(span, from_ms=last.from_ms)
        if last.to_ms is None or last.to_ms > span.from_ms:
            kept[at] = _with(last, to_ms=span.from_ms)
    if span.to_ms is not None and span.to_ms < span.from_ms:
        span = _with(span, to_ms=span.from_ms)
    kept.insert(bisect_right(kept, _order(span), key=_order), span)
    return _with(view, spans=_at_most(kept))


def _at_most(spans: list[Span]) -> tuple[Span, ...]:
    if len(spans) > SPANS_MAX:
        surplus = len(spans) - SPANS_MAX + SPANS_MAX // 16
        ended = [at for at, span in enumerate(spans) if span.to_ms is not None][:surplus]
        for at in reversed(ended):
            del spans[at]
    return tuple(spans)


def _lasting(view: View, voter: int) -> Span | None:
    """What lasts in the lane of ``voter``: at most one span does, and it is the newest."""
    newest = next((span for span in reversed(view.spans) if span.voter == voter), None)
    return newest if newest is not None and newest.to_ms is None else None


def _told(view: View, known: VoterView, digest: VoterDigest, at_ms: int) -> View:
    """Merge what the voter tells of its changes of role into its lane, each once."""
    fresh = sorted(
        (each for each in digest.transitions if each.number > known.told),
        key=lambda each: each.number,
    )
    restarted = known.tip is not None and digest.boot > known.boot
    for change in fresh:
        view = _changed(view, known, change, at_ms, begun=known.tip is None or restarted)
    return view


def _changed(view: View, known: VoterView, change: Transition, at_ms: int, *, begun: bool) -> View:
    voter = known.voter
    from_ms = at_ms - max(0, change.age_ms)
    view = _drop_past(view, voter, from_ms)
    was = _lasting(view, voter)  # "down" as often as not: what it did while unheard is known now
    span = Span(voter, change.role, change.ballot, from_ms, None, _cut(change.why))
    if change.role == "leader":
        view = _superseded(view, change.ballot, from_ms)
        if change.ballot < view.led:
            span = _with(span, to_ms=_led_since(view, change.ballot, at_ms))
        view = _with(view, led=max(view.led, change.ballot))
    view = _begin(view, span)
    return _log_change(view, voter, change, span, was, begun=begun)


def _log_change(
    view: View, voter: int, change: Transition, span: Span, was: Span | None, *, begun: bool
) -> View:
    """Say what an operator must know of a change of role, each once: a voter that asks and stands
    over and over again is two lines."""
    known = view.voter(voter)
    if known is None:
        return view
    past = begun and span.from_ms < view.since_ms
    name, reason = f"voter {voter}", f": {span.why}" if span.why else ""
    level = text = ""
    polled, stood = known.polled, known.stood
    if change.role == "leader":
        polled = stood = False
        since = f" since {words.age(view.since_ms - span.from_ms)} ago" if past else ""
        level, text = "good", f"leads under ballot {change.ballot}{since}{reason}"
    elif change.role == "candidate":
        if not stood and not past:
            level, text = "warn", f"stands for leader under ballot {change.ballot}{reason}"
        stood = True
    elif change.role == "polling":
        if not polled and not past:
            level, text = "warn", "heard no leader for an election timeout and asks the others"
        polled = True
    else:
        if change.leader:
            polled = stood = False
        if was is not None and was.role == "leader":
            level, text = "warn", f"leads no longer{reason}"
    view = _set(view, _with(known, polled=polled, stood=stood))
    return _log(view, max(span.from_ms, view.since_ms), level, name, text) if text else view


def _settled(view: View, voter: int, tip: StreamTip, at_ms: int) -> View:
    """Make the lane agree with what the voter is now, and end leaderships that are over."""
    digest = tip.digest
    if (tip.leading or digest.role == "follower") and tip.ballot > view.led:
        view = _superseded(view, tip.ballot, at_ms)
        view = _with(view, led=tip.ballot)
    now = _lasting(view, voter)
    if now is not None and now.role == digest.role:
        return view
    if digest.role == "leader" and tip.ballot < view.led:
        return view  # it has not noticed that its leadership is over
    ballot = digest.promised if digest.role in ("candidate", "polling") else tip.ballot
    why = "heard again" if now is not None and now.role == "down" else ""
    return _begin(view, Span(voter, digest.role, ballot, at_ms, None, why))


def _superseded(view: View, ballot: Ballot, at_ms: int) -> View:
    """``ballot`` leads since ``at_ms``: leaderships under lower ones ended by then."""
    spans = view.spans
    for at in range(len(spans) - 1, -1, -1):
        span = spans[at]
        if span.role != "leader" or span.ballot >= ballot:
            continue
        if span.to_ms is not None and span.to_ms <= at_ms:
            break  # it superseded all before it
        ended = _with(span, to_ms=max(span.from_ms, at_ms))
        view = _with(view, spans=(*view.spans[:at], ended, *view.spans[at + 1 :]))
    return view


def _led_since(view: View, ballot: Ballot, at_ms: int) -> int:
    """When a ballot above ``ballot`` is known to have begun to lead."""
    begun = (span.from_ms for span in view.spans if span.role == "leader" and span.ballot > ballot)
    return min(begun, default=at_ms)


def _drop_past(view: View, voter: int, from_ms: int) -> View:
    """The voter itself tells what it did since ``from_ms``: what its slots told is not needed."""
    if not any(span.why == PAST_WHY and span.voter == voter for span in view.spans):
        return view
    spans = []
    for span in view.spans:
        if span.why == PAST_WHY and span.voter == voter and (span.to_ms or 0) > from_ms:
            if span.from_ms >= from_ms:
                continue
            spans.append(_with(span, to_ms=from_ms))
        else:
            spans.append(span)
    return _with(view, spans=tuple(spans))


def _past_led(view: View, event: PastLed) -> View:
    """A leadership of the past goes where nothing better is known of that time."""
    ballot, voter = event.ballot, event.ballot.voter
    lane = [span for span in view.spans if span.voter == voter]
    if view.voter(voter) is None or any(
        span.role == "leader" and span.ballot == ballot for span in lane
    ):
        return view
    from_ms, to_ms = event.from_ms, min(event.to_ms, view.since_ms)
    for span in lane:
        if span.from_ms > from_ms:
            to_ms = min(to_ms, span.from_ms)
        else:
            from_ms = max(from_ms, view.now_ms if span.to_ms is None else span.to_ms)
    if from_ms >= to_ms:
        return view
    span = Span(voter, "leader", ballot, from_ms, to_ms, PAST_WHY)
    spans = list(view.spans)
    spans.insert(bisect_right(spans, _order(span), key=_order), span)
    return _with(view, spans=_at_most(spans), led=max(view.led, ballot))


# --- slots and time ---------------------------------------------------------------------------


def _fixed(view: View, event: Fixed) -> View:
    last = view.slots[-1].slot if view.slots else 0
    fresh = {each.slot: each for each in event.newest if each.slot > last}
    newest = [fresh[slot] for slot in sorted(fresh)]
    slots = (*view.slots, *newest)[-SLOTS_MAX:] if newest else view.slots
    counted = event.first - 1 if view.counted is None else view.counted
    commits = max(0, event.last - max(counted, event.first - 1))
    view = _with(
        view,
        slots=slots,
        fixed_ms=max(event.at_ms, view.fixed_ms or 0),
        counted=max(counted, event.last),
    )
    return _count(view, event.at_ms // 1_000, commits)


def _count(view: View, at_s: int, commits: int) -> View:
    """Count ``commits`` to a second; begin it, and those between, if it is new."""
    seconds = view.seconds
    if not seconds or at_s > seconds[-1].at_s:
        begin = seconds[-1].at_s + 1 if seconds else at_s
        begin = max(begin, at_s - SECONDS_MAX + 1)
        new = (Second(each, 0, 0, 0) for each in range(begin, at_s + 1))
        seconds = (*seconds, *new)[-SECONDS_MAX:]
    at = len(seconds) - 1 - (seconds[-1].at_s - at_s)
    if at < 0:
        return view
    second = seconds[at]
    p50_us, p99_us = second.p50_us, second.p99_us
    if at == len(seconds) - 1 and (digest := _leader_digest(view)) is not None:
        p50_us, p99_us = max(0, digest.commit_p50_us), max(0, digest.commit_p99_us)
    new_second = Second(at_s, second.commits + commits, p50_us, p99_us)
    if new_second != second or seconds is not view.seconds:
        view = _with(view, seconds=(*seconds[:at], new_second, *seconds[at + 1 :]))
    return view


def _leader_digest(view: View) -> VoterDigest | None:
    """What the leader says of itself, if it was heard lately."""
    leading = [
        each
        for each in view.voters
        if each.tip is not None and each.tip.leading and not each.silent
    ]
    return max(leading, key=_ballot_of).digest if leading else None


def _ballot_of(voter: VoterView) -> Ballot:
    return NO_BALLOT if voter.tip is None else voter.tip.ballot


def _clock(view: View) -> View:
    now_ms = view.now_ms
    for voter in view.voters:
        since_ms = view.since_ms if voter.heard_ms is None else voter.heard_ms
        if not voter.silent and now_ms - since_ms > silent_after_ms(voter):
            view = _fall_silent(view, voter, now_ms)
    view = _count(view, now_ms // 1_000, 0)
    if now_ms // 1_000 > view.swept_s:
        view = _swept(_with(view, swept_s=now_ms // 1_000))
    return view


# --- listeners --------------------------------------------------------------------------------


def listener_silent_ms(view: View) -> int:
    """Unheard for so many milliseconds, a listener is silent: with many, each reports seldom."""
    return SILENT_INTERVALS * mean_interval_ms(len(view.listeners))


def listener_lags(view: View, report: ListenerReport) -> bool:
    """Is a listener behind, by its own word?"""
    return report.behind_ms >= BEHIND_MS or report.tip - report.applied > behind_slots(view)


def _reported(view: View, report: ListenerReport, heard_ms: int, *, direct: bool) -> View:
    key = (report.name, report.instance)
    known = view.listeners.get(key)
    if known is not None:
        older = heard_ms <= known.heard_ms or report.uptime_s < known.report.uptime_s
        if older or (not direct and report == known.report):
            return view
    elif view.left or len(view.listeners) >= LISTENERS_MAX or heard_ms < view.now_ms - FORGET_MS:
        left_ms = view.left.get(key)
        too_many = len(view.listeners) >= LISTENERS_MAX
        if left_ms is not None or too_many or heard_ms < view.now_ms - FORGET_MS:
            return view
    name = f"listener {_cut(report.name)}"
    if report.leaving:
        view = _with(view, left=_room_for(view.left).set(key, heard_ms))
        if known is None:
            return view
        view = _with(view, listeners=view.listeners.delete(key))
        return _log(view, heard_ms, "info", name, "left in order")
    lags = listener_lags(view, report)
    if known is not None:
        if known.lags and not lags:
            lags = report.behind_ms > 0 and report.applied < report.tip
        if lags != known.lags:
            lag = words.plural(max(0, report.tip - report.applied), "slot")
            text = f"is behind by {lag}" if lags else "reached the tip again"
            view = _log(view, heard_ms, "warn" if lags else "good", name, text)
        elif known.silent:
            text = f"is heard again after {words.age(heard_ms - known.heard_ms)}"
            view = _log(view, heard_ms, "good", name, text)
        if report.resets > known.report.resets:
            text = "was too far behind and began anew from a snapshot"
            view = _log(view, heard_ms, "warn", name, text)
    elif lags:
        lag = words.plural(max(0, report.tip - report.applied), "slot")
        view = _log(view, heard_ms, "warn", name, f"is behind by {lag}")
    counted, asks = _asked(known, report)
    heard = ListenerView(report, heard_ms, direct, lags, counted=counted, asks_per_min=asks)
    return _with(view, listeners=view.listeners.set(key, heard))


def _asked(known: ListenerView | None, report: ListenerReport) -> tuple[tuple[int, int], int]:
    """When its requests were counted last, and how many a minute they were then."""
    now = (report.uptime_s, report.repairs + report.catchups)
    if known is not None:
        before, asks = known.counted, known.asks_per_min
    else:
        before, asks = ((0, 0) if report.uptime_s <= 60 else now), 0
    passed_s = now[0] - before[0]
    if passed_s < REPAIR_WINDOW_S:
        return before, asks
    return now, max(0, now[1] - before[1]) * 60 // passed_s


def _room_for(
    left: immutables.Map[tuple[str, int], int],
) -> immutables.Map[tuple[str, int], int]:
    return left if len(left) < LISTENERS_MAX else immutables.Map()


def _swept(view: View) -> View:
    """Once a second: who fell silent, and whom to forget."""
    now_ms, bound_ms = view.now_ms, listener_silent_ms(view)
    late = [
        (key, each) for key, each in view.listeners.items() if now_ms - each.heard_ms > bound_ms
    ]
    if late:
        with view.listeners.mutate() as changed:
            forgotten = []
            for key, each in late:
                if now_ms - each.heard_ms > FORGET_MS:
                    del changed[key]
                elif not each.silent:
                    changed[key] = _with(each, silent=True)
                    forgotten.append((key[0], now_ms - each.heard_ms))
            listeners = changed.finish()
        if listeners is not view.listeners:
            view = _with(view, listeners=listeners)
        for name, silent_ms in sorted(forgotten):
            text = f"not heard for {words.age(silent_ms)}"
            view = _log(view, now_ms, "warn", f"listener {_cut(name)}", text)
    over = [key for key, left_ms in view.left.items() if now_ms - left_ms > LEFT_MS]
    if over:
        with view.left.mutate() as left:
            for key in over:
                del left[key]
            view = _with(view, left=left.finish())
    return view
