"""What a view means, and what to do: this module alone holds the dashboard's knowledge.

The verdict line, the Explain screen and ``trex doctor`` all say what is here, so they never differ.
Pure: everything is derived from a :class:`~dashboard.view.View`, whose ``now_ms`` is the time.
The one rule above all: never "healthy" unless it is known to be so now.

Three sources must agree before a voter counts as good: we hear it, the leader hears it (the
leader's heartbeat, at most 100 ms apart, says whom: a dead follower is seen through its eyes before
its own heartbeat is missing), and it says itself that it has room and is not behind.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Final, Literal, TypeAlias

import msgspec

from dashboard import words
from dashboard.view import (
    PAST_WHY,
    ListenerView,
    Span,
    View,
    VoterView,
    behind_slots,
    silent_after_ms,
)
from trex_core.messages import NO_BALLOT, Ballot, VoterDigest

Level: TypeAlias = Literal["ok", "note", "warn", "bad"]
LEVELS: Final[tuple[Level, ...]] = ("ok", "note", "warn", "bad")
"""Ascending. "note": worth knowing; "warn": less is left to lose; "bad": it does not work."""
SIGNS: Final[dict[Level, str]] = {"ok": "✓", "note": "·", "warn": "!", "bad": "✗"}
"""Beside each level's colour: no colour is needed for meaning."""

HERE_SILENT_MS: Final = 1_500
"""Nobody heard for so long: every voter speaks once a second, so it is we who are cut off, or all
voters are down."""
PEER_SILENT_MS: Final = 500
"""A leader that has not heard a voter for so long misses it: each heartbeat (80 ms) is answered."""
SPEAKS_MS: Final = 1_000
"""Every voter speaks on the stream more often than that."""
QUORUM_LATE_MS: Final = 400
"""A leader's answer of a quorum that is older than this is late: five heartbeats went without."""
STUCK_MS: Final = 1_000
"""Slots proposed for so long and not fixed: far more than any commit takes."""
FSYNC_SLOW_US: Final = 50_000
"""A disk whose p99 is this slow holds up commits whenever a quorum needs it."""
FSYNC_ODD_US: Final = 20_000
"""… and from here on if it is also FSYNC_ODD_TIMES slower than the median of the others."""
FSYNC_ODD_TIMES: Final = 10
CLOCK_APART_MS: Final = 1_000
"""Wall clocks further apart than this are told: they decide nothing, but logs are hard to read."""
FREE_BYTES_LOW: Final = 256 << 20
"""A disk with less free is worth knowing of."""
OFTEN_MS: Final = 60_000
BOOTS_OFTEN: Final = 3
"""So many restarts within OFTEN_MS are a loop."""
LEADERS_OFTEN: Final = 4
"""So many leaderships within OFTEN_MS are too many: one is an event, two a failed start."""
ASKS_MANY: Final = 20
"""A listener that asks so many times a minute for what it missed has a lossy network."""
NAMED_MAX: Final = 5
"""Of more listeners than this in one state only the number is told, and the worst."""

SAME_MAX: Final = 32
"""Of listeners of one name so many are looked at."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is so. ``code`` is a stable name ("voter_silent", "quorum_late", …),
    ``subject`` whom it is about ("cluster", "voter 3", "listener cache-17", "here"), ``words`` what
    is so, ``advice`` what to do ("" if nothing)."""

    level: Level
    code: str
    subject: str
    words: str
    advice: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """The first line of the screen: "healthy: voter 3 leads since ballot 0.17.3, can lose 2 more".
    ``state`` is "healthy", "degraded", "no leader", "no quorum" or "unknown" (nothing fresh is
    heard here); ``leader`` 0 when none is known now."""

    level: Level
    state: str
    words: str
    leader: int
    can_lose: int


# --- who is well ------------------------------------------------------------------------------


def majority_of(view: View) -> int:
    """The smallest number of voters that is more than half of them (PMS §2.1)."""
    return len(view.voters) // 2 + 1


def heard_now(view: View, voter: VoterView) -> bool:
    """Was it heard within its bound?"""
    return voter.heard_ms is not None and view.now_ms - voter.heard_ms <= silent_after_ms(voter)


def leader_of(view: View) -> VoterView | None:
    """Who leads as far as is known now: of those that say so and are heard, the highest ballot."""
    return max(_claimants(view), key=_ballot, default=None)


def _claimants(view: View) -> list[VoterView]:
    return [each for each in view.voters if each.tip and each.tip.leading and heard_now(view, each)]


def _ballot(voter: VoterView) -> Ballot:
    return NO_BALLOT if voter.tip is None else voter.tip.ballot


def _newest_ms(view: View) -> int | None:
    return max((each.heard_ms for each in view.voters if each.heard_ms is not None), default=None)


def missed_ms(view: View, leader: VoterView, voter: VoterView) -> int | None:
    """For how long ``leader`` has not heard ``voter``, as of now; -1: never; None: it does not say,
    or it hears it."""
    digest = leader.digest
    if digest is None or not digest.heard_ms or leader is voter:
        return None
    if len(digest.heard_ms) != len(view.voters):
        return -1  # it knows other voters than the cluster file here does
    at = next(i for i, each in enumerate(view.voters) if each.voter == voter.voter)
    ms = digest.heard_ms[at]
    return ms if ms < 0 or ms > PEER_SILENT_MS else None


def _is_good(view: View, leader: VoterView | None, voter: VoterView) -> bool:
    digest = voter.digest
    return (
        digest is not None
        and heard_now(view, voter)
        and digest.has_room
        and not voter.lags
        and voter.rolled_ms is None
        and (leader is None or missed_ms(view, leader, voter) is None)
        and _hindrance(view, leader, voter) is None
    )


def _late_ms(view: View, leader: VoterView) -> int:
    """For how long ``leader`` was not heard, if that is too long to call anything healthy."""
    late_ms = view.now_ms - (leader.heard_ms or 0)
    return late_ms if late_ms > QUORUM_LATE_MS else 0


def _hindrance(view: View, leader: VoterView | None, voter: VoterView) -> Finding | None:
    """Why ``voter``, which the leader hears, accepts nothing from it; None: nothing is in the way,
    or what it said last is from before this leadership."""
    digest, name = voter.digest, f"voter {voter.voter}"
    if leader is None or leader is voter or digest is None or voter.heard_ms is None:
        return None
    if digest.promised > _ballot(leader):
        return Finding(
            "warn",
            "promised_higher",
            name,
            f"has promised ballot {digest.promised} and accepts nothing under "
            f"{_ballot(leader)}, which is lower",
            "A matter of a second: the leader hears of it and stands again above it, or another "
            "leads. If it lasts, the two do not hear each other: check the network between them.",
        )
    if voter.heard_ms < _led_since_ms(view, leader) + PEER_SILENT_MS:
        return None
    if digest.role in ("polling", "candidate"):
        span = _open_span(view, voter.voter)
        for_ms = 0 if span is None else view.now_ms - span.from_ms
        return Finding(
            "warn",
            "voter_alone",
            name,
            f"looks for a leader for {words.age(for_ms)} while voter {leader.voter} leads",
            "It does not hear the leader: check its network, its firewall and its peer_port (UDP). "
            "It disturbs nobody: it first asks the others, and they hear the leader.",
        )
    if digest.quorum_age_ms > PEER_SILENT_MS and voter.tip and voter.tip.ballot == _ballot(leader):
        return Finding(
            "warn",
            "one_way",
            name,
            f"does not hear the leader for {words.age(digest.quorum_age_ms)}, and the leader "
            "hears it",
            "Its network lets packets out and none in: check firewall and routes there.",
        )
    return None


def _led_since_ms(view: View, leader: VoterView) -> int:
    """When its leadership began, as far as known."""
    for span in reversed(view.spans):
        if span.role == "leader" and span.ballot == _ballot(leader):
            return span.from_ms
    return view.since_ms


def _quorum_age_ms(view: View, leader: VoterView) -> int | None:
    """How old the newest answer of a quorum was when ``leader`` spoke last; None: it had none. What
    came since is not known: that its word is late is told as such."""
    digest = leader.digest
    if digest is None or leader.heard_ms is None:
        return None
    if majority_of(view) == 1:
        return 0
    if digest.quorum_age_ms < 0:
        return None
    return digest.quorum_age_ms


def _no_quorum_words(quorum_ms: int | None) -> str:
    """ "" if its quorum answers the leader."""
    if quorum_ms is None:
        return "has had no answer from a quorum yet"
    return (
        f"has had no answer from a quorum for {words.age(quorum_ms)}"
        if quorum_ms > QUORUM_LATE_MS
        else ""
    )


def _led_unheard(view: View) -> tuple[Ballot, list[VoterView]] | None:
    """The leader that is not heard here although it lives, and who hears it: they say so in what
    they said after it ought to have been heard here."""
    found: dict[Ballot, list[VoterView]] = {}
    for each in view.voters:
        tip = each.tip
        if tip is None or tip.digest.role != "follower" or not heard_now(view, each):
            continue
        leader = view.voter(tip.ballot.voter)
        if leader is None or leader is each or each.heard_ms is None:
            continue
        quiet_ms = each.heard_ms - (view.since_ms if leader.heard_ms is None else leader.heard_ms)
        lately = view.now_ms - each.heard_ms <= HERE_SILENT_MS
        if (
            lately
            and quiet_ms > silent_after_ms(leader)
            and 0 <= tip.digest.quorum_age_ms < PEER_SILENT_MS
        ):
            found.setdefault(tip.ballot, []).append(each)
    return max(found.items(), key=lambda each: each[0]) if found else None


def _ids(voters: Sequence[VoterView]) -> str:
    """ "voter 3", "voters 1, 2 and 4"."""
    names = [str(each.voter) for each in voters]
    if len(names) == 1:
        return f"voter {names[0]}"
    return f"voters {', '.join(names[:-1])} and {names[-1]}" if names else "no voter"


def _lost(view: View, voter: VoterView) -> bool:
    """There is no leader; the last one does not hear ``voter``, which it asked for its vote or had
    an answer of ten times a second, and it missed its own heartbeat here. Both together are known
    before it is silent for long enough to be called so by its silence here alone."""
    last = max(
        (each for each in view.spans if each.role == "leader" and each.to_ms is not None),
        key=lambda each: each.to_ms or 0,
        default=None,
    )
    witness = None if last is None else view.voter(last.voter)
    if witness is None or witness is voter or not heard_now(view, witness):
        return False
    ms = missed_ms(view, witness, voter)
    late_ms = view.now_ms - (view.since_ms if voter.heard_ms is None else voter.heard_ms)
    return ms is not None and late_ms > SPEAKS_MS


def _leaderless_ms(view: View) -> int:
    """For how long there has been no leader."""
    ended = [each.heard_ms for each in view.voters if each.tip and each.tip.leading]
    ended += [each.to_ms for each in view.spans if each.role == "leader"]
    known = [each for each in ended if each is not None and each <= view.now_ms]
    return view.now_ms - max(max(known, default=view.since_ms), view.since_ms)


# --- the verdict ------------------------------------------------------------------------------


def verdict(view: View) -> Verdict:
    """The one line."""
    newest_ms = _newest_ms(view)
    if newest_ms is None or view.now_ms - newest_ms > HERE_SILENT_MS:
        return _unknown(view, newest_ms)
    leader = leader_of(view)
    if leader is None:
        return _leaderless(view)
    return _led(view, leader)


def _led(view: View, leader: VoterView) -> Verdict:
    good = [each for each in view.voters if _is_good(view, leader, each)]
    can_lose = max(0, len(good) - majority_of(view))
    quorum_ms = _quorum_age_ms(view, leader)
    if late := _no_quorum_words(quorum_ms):
        text = f"voter {leader.voter} leads but {late}: nothing is committed"
        return Verdict("bad", "no quorum", f"no quorum: {text}", leader.voter, 0)
    rest = [each for each in view.voters if each not in good]
    if len(good) < majority_of(view):
        text = (
            f"voter {leader.voter} leads but only {len(good)} of {len(view.voters)} voters are well"
            f"; {majority_of(view)} are needed: {_ids(rest)} missing, behind or full"
        )
        return Verdict("bad", "no quorum", f"no quorum: {text}", leader.voter, 0)
    leads = f"voter {leader.voter} leads since ballot {_ballot(leader)}"
    spare = f"can lose {can_lose} more" if can_lose else "can lose no more"
    everything = findings(view)
    found = [each for each in everything if each.level in ("warn", "bad")]
    ours = [
        each
        for each in found
        # A feed in trouble may hide what is wrong: nothing it shows is called healthy.
        if each.subject.partition(" ")[0] in ("cluster", "voter") or each.code == "feed"
    ]
    if rest or ours:
        first = next((f"{each.subject} {each.words}" for each in ours), f"{_ids(rest)} not well")
        more = f" (and {words.plural(len(ours) - 1, 'more finding')})" if len(ours) > 1 else ""
        level: Level = "warn" if can_lose or len(view.voters) == 1 else "bad"
        text = f"degraded: {leads}, {spare}; {first}{more}"
        return Verdict(level, "degraded", text, leader.voter, can_lose)
    if mixed := [each for each in everything if each.code == "versions"]:
        text = f"degraded: {leads}, {spare}; {mixed[0].words}"
        return Verdict("note", "degraded", text, leader.voter, can_lose)
    if found:
        warned = words.plural(len(found), "warning")
        text = f"healthy: {leads}, {spare}; {warned}: {found[0].subject} {found[0].words}"
        return Verdict("note", "healthy", text, leader.voter, can_lose)
    return Verdict("ok", "healthy", f"healthy: {leads}, {spare}", leader.voter, can_lose)


def _unknown(view: View, newest_ms: int | None) -> Verdict:
    if newest_ms is None:
        waited_ms = view.now_ms - view.since_ms
        level: Level = "note" if waited_ms <= HERE_SILENT_MS else "bad"
        text = f"unknown: no voter was heard yet, in {words.age(waited_ms)} of listening"
        return Verdict(level, "unknown", text, 0, 0)
    text = (
        f"unknown: no voter is heard for {words.age(view.now_ms - newest_ms)}: either all are down "
        "or this machine is cut off; all that is shown is that old"
    )
    return Verdict("bad", "unknown", text, 0, 0)


def _leaderless(view: View) -> Verdict:
    if (unheard := _led_unheard(view)) is not None:
        ballot, told = unheard
        good = [each for each in view.voters if _is_good(view, None, each)]
        can_lose = max(0, len(good) - majority_of(view))
        text = (
            f"degraded: voter {ballot.voter} leads since ballot {ballot} by the word of "
            f"{_ids(told)}, but it is not heard here"
        )
        return Verdict("warn", "degraded", text, ballot.voter, can_lose)
    heard = [each for each in view.voters if heard_now(view, each) and not _lost(view, each)]
    missing = [each for each in view.voters if each not in heard]
    need = majority_of(view)
    if len(heard) < need:
        text = (
            f"only {len(heard)} of {len(view.voters)} voters are heard and {need} are needed: "
            f"{_ids(missing)} missing; nothing can be committed, nothing is lost"
        )
        return Verdict("bad", "no quorum", f"no quorum: {text}", 0, 0)
    doing = []
    for each in heard:
        digest = each.digest
        if digest is not None and digest.role == "candidate":
            doing.append(f"voter {each.voter} stands under ballot {digest.promised}")
        elif digest is not None and digest.role == "polling":
            doing.append(f"voter {each.voter} asks the others")
    led = [each for each in view.voters if each.tip and each.tip.leading]
    gone = [each for each in led if not heard_now(view, each)]
    doing += [f"voter {each.voter}, which led, is silent" for each in gone]
    text = f"for {words.age(_leaderless_ms(view))}" + (f": {', '.join(doing)}" if doing else "")
    if missing and not led:
        text += f"; {_ids(missing)} missing"
    return Verdict("bad", "no leader", f"no leader {text}", 0, 0)


# --- findings ---------------------------------------------------------------------------------


class _ById:
    """A view as a key of a cache: equal only to itself, since views are immutable."""

    __slots__ = ("view",)

    def __init__(self, view: View) -> None:
        self.view = view

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.view is self.view

    def __hash__(self) -> int:
        return id(self.view)


@functools.lru_cache(maxsize=2)
def _cached(view: _ById) -> tuple[Finding, ...]:
    found = [*_about_here(view.view), *_about_cluster(view.view), *_about_voters(view.view)]
    found += _about_listeners(view.view)
    found.sort(key=lambda each: -LEVELS.index(each.level))
    return tuple(found)


def findings(view: View) -> tuple[Finding, ...]:
    """Everything worth saying, the worst first."""
    return _cached(_ById(view))


def _about_here(view: View) -> Iterator[Finding]:
    newest_ms = _newest_ms(view)
    if view.trouble:
        yield Finding("bad", "feed", "here", view.trouble, "What is shown may be old.")
    silent_ms = view.now_ms - (view.since_ms if newest_ms is None else newest_ms)
    if silent_ms > HERE_SILENT_MS:
        yield Finding(
            "bad",
            "cut_off",
            "here",
            f"no voter is heard for {words.age(silent_ms)}",
            "Ask the voters themselves: `trex status`. If they answer, multicast does not reach "
            "this machine: check [stream] group, port, interface and ttl of the cluster file, IGMP "
            "snooping and the firewall (`trex doctor` looks). If not, they are down.",
        )
    own = view.followed
    if own is not None and newest_ms is not None and silent_ms <= HERE_SILENT_MS:
        lag = own.tip - own.applied
        if lag > behind_slots(view):
            yield Finding(
                "warn",
                "here_behind",
                "here",
                f"the dashboard's own listener is {words.plural(lag, 'slot')} behind",
                "Members, ring and SQL here are as of an older slot; voters are shown as they are.",
            )
        elif not own.ready:
            yield Finding("note", "here_starting", "here", "its own listener is not at the tip yet")


def _about_cluster(view: View) -> Iterator[Finding]:
    claimants = _claimants(view)
    leader = leader_of(view)
    if len(claimants) > 1 and leader is not None:
        old = [each for each in claimants if each is not leader]
        yield Finding(
            "warn",
            "two_leaders",
            "cluster",
            f"{_ids(old)} still claims to lead, under a lower ballot than voter {leader.voter}",
            "Nothing can be fixed under the lower ballot. If it lasts over a second, that voter is "
            "cut off from the others: check its network.",
        )
    if leader is not None:
        if late := _no_quorum_words(_quorum_age_ms(view, leader)):
            yield Finding(
                "bad",
                "quorum_late",
                "cluster",
                f"voter {leader.voter} leads but {late}",
                "It steps down after an election timeout; if no other voter takes over, too few "
                "voters hear each other: start the missing ones or mend the network.",
            )
        if leader.stuck_ms is not None and view.now_ms - leader.stuck_ms > STUCK_MS:
            yield Finding(
                "bad",
                "stuck",
                "cluster",
                f"slots are proposed and not fixed for {words.age(view.now_ms - leader.stuck_ms)}",
                "A majority does not accept: look at disks and network of the other voters.",
            )
    elif _newest_ms(view) is not None and view.now_ms - (_newest_ms(view) or 0) <= HERE_SILENT_MS:
        seen = _leaderless(view)
        told = seen.words.removeprefix("degraded: ")
        code = seen.state.replace(" ", "_")
        if seen.state == "no quorum":
            advice = "Start the missing voters: nothing is lost, and they go on where they were."
        elif seen.state == "no leader":
            advice = "An election takes about a second. If it lasts, too few hear each other."
        else:
            code = "leader_unheard"
            advice = (
                "Its multicast does not reach this machine, and that of the others does: check its "
                "[stream] interface and ttl, and the switches between."
            )
        yield Finding(seen.level, code, "cluster", told, advice)
    begun = [
        each
        for each in view.spans
        if each.role == "leader" and each.why != PAST_WHY and view.now_ms - each.from_ms < OFTEN_MS
    ]
    if len(begun) >= LEADERS_OFTEN:
        yield Finding(
            "warn",
            "elections",
            "cluster",
            f"the leader changed {len(begun)} times within a minute",
            "Look at the timeline for why. Pauses longer than an election timeout (a slow disk, a "
            "starved machine) are the usual cause; [timing] election_ticks_min bounds them.",
        )
    versions = Counter(each.digest.version for each in view.voters if each.digest is not None)
    if len(versions) > 1:
        told = ", ".join(f"{version} ({number})" for version, number in versions.most_common())
        yield Finding(
            "note",
            "versions",
            "cluster",
            f"voters run different versions: {told}",
            "Fine while you upgrade one after another; finish it.",
        )


def _about_voters(view: View) -> Iterator[Finding]:
    leader = leader_of(view)
    for voter in view.voters:
        name = f"voter {voter.voter}"
        if not heard_now(view, voter):
            if voter.heard_ms is None and view.now_ms - view.since_ms <= silent_after_ms(voter):
                continue  # it had no time to speak yet
            if voter.heard_ms is None:
                said = "was never heard here"
            else:
                said = f"is not heard for {words.age(view.now_ms - voter.heard_ms)}"
            yield Finding("warn", "voter_silent", name, said, _look_after(view, voter))
        elif leader is not None and (ms := missed_ms(view, leader, voter)) is not None:
            since = "has not been heard" if ms < 0 else f"is not heard for {words.age(ms)}"
            yield Finding(
                "warn", "voter_missed", name, f"{since} by the leader", _look_after(view, voter)
            )
        if voter.digest is not None:
            yield from _about_voter(view, leader, voter, voter.digest)


def _look_after(view: View, voter: VoterView) -> str:
    return (
        f"Check that its process runs (`systemctl status trex-voter@{voter.voter}`), its disk and "
        f"its network. {_what_is_left(view)}"
    )


def _what_is_left(view: View) -> str:
    leader = leader_of(view)
    good = sum(_is_good(view, leader, each) for each in view.voters)
    left = good - majority_of(view)
    if left > 0:
        return f"Nothing is lost, and the cluster can lose {left} more."
    if left == 0:
        return "Nothing is lost, but the cluster can lose no more: mend this first."
    return "Nothing is lost, but nothing can be committed until more voters are well."


def _about_voter(
    view: View, leader: VoterView | None, voter: VoterView, digest: VoterDigest
) -> Iterator[Finding]:
    name, heard = f"voter {voter.voter}", heard_now(view, voter)
    if voter.rolled_ms is not None and view.now_ms - voter.rolled_ms < OFTEN_MS:
        yield Finding(
            "bad",
            "rolled_back",
            name,
            "speaks with an old boot number: its disk was restored from an older copy",
            "It must not vote. Put its newest journal back, or replace it as a voter.",
        )
    recent = [each for each in voter.boots_ms if view.now_ms - each < OFTEN_MS]
    if len(recent) >= BOOTS_OFTEN:
        yield Finding(
            "warn",
            "boot_loop",
            name,
            f"restarted {len(recent)} times within a minute",
            f"Its log says why it ends: `journalctl -u trex-voter@{voter.voter}`.",
        )
    if not heard:
        return
    if not digest.has_room:
        yield Finding(
            "bad",
            "disk_full",
            name,
            f"accepts nothing: its disk has {words.size(digest.free_bytes)} free",
            f"Free space there; it goes on by itself. {_what_is_left(view)}",
        )
    elif 0 < digest.free_bytes < FREE_BYTES_LOW:
        yield Finding(
            "note", "disk_low", name, f"has {words.size(digest.free_bytes)} free on its disk"
        )
    if voter.lags:
        yield Finding(
            "warn",
            "voter_behind",
            name,
            f"is {words.plural(voter.lag, 'slot')} behind and catches up",
            "It cannot help a quorum until it is there; watch `fixed` move.",
        )
    others = [
        each.digest.fsync_p99_us
        for each in view.voters
        if each is not voter and each.digest is not None and each.digest.fsync_p99_us
    ]
    p99_us = digest.fsync_p99_us
    odd = bool(others) and p99_us >= FSYNC_ODD_TIMES * median(others) and p99_us >= FSYNC_ODD_US
    if p99_us >= FSYNC_SLOW_US or odd:
        usual = f", the others {words.micros(int(median(others)))}" if others else ""
        yield Finding(
            "warn",
            "slow_disk",
            name,
            f"takes {words.micros(p99_us)} (p99) to sync its disk{usual}",
            "Commits wait for it whenever it is needed for a majority. Is something else writing "
            "there? A disk of its own for the journal helps: `journal_directory`.",
        )
    if leader is voter and (late_ms := _late_ms(view, voter)):
        yield Finding(
            "warn",
            "leader_late",
            name,
            f"leads and is not heard for {words.age(late_ms)}",
            "It speaks ten times a second. It died just now, or this machine misses what it sends.",
        )
    if leader is not None and missed_ms(view, leader, voter) is None:
        hindrance = _hindrance(view, leader, voter)
        if hindrance is not None:
            yield hindrance
    if digest.time_ms and voter.heard_ms is not None:
        apart_ms = digest.time_ms - voter.heard_ms
        if abs(apart_ms) > CLOCK_APART_MS:
            way = "ahead of" if apart_ms > 0 else "behind"
            yield Finding(
                "note",
                "clock",
                name,
                f"its clock is {words.age(abs(apart_ms))} {way} the one here",
                "No decision depends on it; logs and commit times do. Run a time service.",
            )


def _open_span(view: View, voter: int) -> Span | None:
    return next(
        (each for each in reversed(view.spans) if each.voter == voter and each.to_ms is None), None
    )


def _about_listeners(view: View) -> Iterator[Finding]:
    heard = {name for (name, _), each in view.listeners.items() if not each.silent}
    silent = [  # one that was started again is silent only as what it was before
        each for (name, _), each in view.listeners.items() if each.silent and name not in heard
    ]
    behind = [each for each in view.listeners.values() if each.lags and not each.silent]
    yield from _listeners(
        sorted(silent, key=lambda each: each.heard_ms),
        "listener_silent",
        "silent",
        lambda each: f"is not heard for {words.age(view.now_ms - each.heard_ms)}",
        "Is its process alive and its machine reachable? No commit waits for it.",
    )
    yield from _listeners(
        sorted(behind, key=lambda each: each.report.applied - each.report.tip),
        "listener_behind",
        "behind",
        lambda each: (
            f"is {words.plural(max(0, each.report.tip - each.report.applied), 'slot')} behind, for "
            f"{words.age(each.report.behind_ms)}"
        ),
        "Its machine is too busy or loses packets: look at its repairs and catch-ups, its CPU, and "
        "net.core.rmem_max. It catches up by itself; no commit waits for it.",
    )
    lossy = [
        each
        for each in view.listeners.values()
        if each.asks_per_min >= ASKS_MANY and not each.silent and not each.lags
    ]
    for each in sorted(lossy, key=lambda each: -each.asks_per_min)[:NAMED_MAX]:
        yield Finding(
            "note",
            "listener_lossy",
            f"listener {each.report.name}",
            f"misses much: it asked {words.count(each.asks_per_min)} times a minute for what did "
            "not come",
            "It keeps up by repairs. Its network loses packets, or its machine drops them: `trex "
            "doctor` there tells; net.core.rmem_max may be too small.",
        )
    names: dict[str, list[ListenerView]] = {}
    for (name, _), each in view.listeners.items():
        if not each.silent:
            names.setdefault(name, []).append(each)
    for name in sorted(name for name, same in names.items() if len(same) > 1):
        number = _at_once(names[name])
        if number > 1:
            yield Finding(
                "warn",
                "listener_twice",
                f"listener {name}",
                f"is the name of {number} listeners at once",
                "Give each its own name, or its rows in SQL and here cannot be told apart.",
            )


def _at_once(same: Sequence[ListenerView]) -> int:
    """How many of these, of one name, ran at the same time: each was heard after another began. One
    that was killed and started again did not."""
    live = same[:SAME_MAX]
    begun = {
        each.report.instance: each.heard_ms - max(0, each.report.uptime_s) * 1_000 for each in live
    }
    return sum(
        any(
            one is not other
            and one.heard_ms > begun[other.report.instance]
            and other.heard_ms > begun[one.report.instance]
            for other in live
        )
        for one in live
    )


def _listeners(
    which: Sequence[ListenerView],
    code: str,
    state: str,
    say: Callable[[ListenerView], str],
    advice: str,
) -> Iterator[Finding]:
    if len(which) > NAMED_MAX:
        worst = which[0]
        yield Finding(
            "warn",
            code,
            "listeners",
            f"{words.count(len(which))} are {state}; the worst, {worst.report.name}, {say(worst)}",
            advice,
        )
        return
    for each in which:
        yield Finding("warn", code, f"listener {each.report.name}", say(each), advice)


# --- explaining -------------------------------------------------------------------------------

_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&])")


def _plain(text: str) -> str:
    """Text from outside as Markdown that shows it and does nothing else."""
    return _MARKDOWN.sub(r"\\\1", "".join(each if each.isprintable() else "�" for each in text))


def _list(found: Sequence[Finding]) -> str:
    if not found:
        return "**Nothing is wrong here, and there is nothing to do.**"
    return "\n\n".join(
        f"**{SIGNS[each.level]} {_plain(each.subject)}** {_plain(each.words)}.\n\n"
        f"{_plain(each.advice)}".rstrip()
        for each in found
    )


_ROLES: Final = {
    "leader": "It **leads**: it alone proposes, each command in the next free slot, and counts a "
    "slot as *fixed* once a majority has it on disk.",
    "candidate": "It **stands** for leader: it asks a majority to promise that they will listen to "
    "no lower ballot, and to name what they accepted already, so that nothing fixed is lost.",
    "polling": "It **asks** whether the others still hear a leader. Only if a majority does not "
    "will it stand: a voter that is merely cut off disturbs nobody.",
    "follower": "It **follows**: it writes what the leader proposes to its disk and says so. Its "
    "answer counts towards the majority.",
}


def explain_voter(view: View, voter: int) -> str:
    """What this voter is doing, what its numbers mean and what to do, as Markdown."""
    known = view.voter(voter)
    if known is None:
        return f"# Voter {voter}\n\nThe cluster file names no such voter."
    lines = [f"# Voter {voter}"]
    digest = known.digest
    if digest is None or known.heard_ms is None:
        lines.append(
            "It was never heard since we listen. The other voters need no word from it as long as "
            f"{majority_of(view)} of {len(view.voters)} hear each other."
        )
    else:
        ago = words.age(view.now_ms - known.heard_ms)
        if heard_now(view, known):
            lines.append(_ROLES.get(digest.role, "It runs.") + f" Heard {ago} ago.")
        else:
            lines.append(f"It is **silent**: last heard {ago} ago. What follows is that old.")
        leader = leader_of(view)
        to_tip = view.tip_slot - digest.fixed
        lines.append(
            f"- **promised {digest.promised}**: it refuses every ballot below this one, for ever, "
            "even across a restart. That is what makes two leaders harmless.\n"
            f"- **accepted {words.count(digest.last_accepted)}**: the highest slot on its disk; "
            "accepted by a majority, a slot is fixed.\n"
            f"- **fixed {words.count(digest.fixed)}**: up to here it knows that nothing can change "
            f"any more; {words.plural(to_tip, 'slot')} behind the newest.\n"
            f"- **applied {words.count(digest.applied)}**: its state is as of this slot.\n"
            f"- **journal {words.size(digest.journal_bytes)}**, {words.size(digest.free_bytes)} "
            f"free; the newest snapshot is at slot {words.count(digest.snapshot_slot)}.\n"
            f"- **sync {words.micros(digest.fsync_p50_us)} / {words.micros(digest.fsync_p99_us)}** "
            "(median, p99): how long its disk takes to make a vote durable.\n"
            f"- **boot {digest.boot}**, up {words.age(digest.uptime_s * 1_000)}, version "
            f"{_plain(digest.version)}."
        )
        if leader is known:
            quorum_ms = _quorum_age_ms(view, known)
            since = "has not answered it yet"
            if quorum_ms is not None:
                since = f"answered it {words.age(quorum_ms)} ago"
            lines.append(
                f"A quorum {since}; a commit takes {words.micros(digest.commit_p50_us)} (median), "
                f"{words.micros(digest.commit_p99_us)} (p99)."
            )
    span = _open_span(view, voter)
    if span is not None and span.why:
        so_long = words.age(view.now_ms - span.from_ms)
        lines.append(f"In this role for {so_long}, because: {_plain(span.why)}.")
    lines.append(_list([each for each in findings(view) if each.subject == f"voter {voter}"]))
    lines.append(_reboot_words(view, known))
    return "\n\n".join(lines)


def _reboot_words(view: View, voter: VoterView) -> str:
    """Is it safe to stop this one now?"""
    leader = leader_of(view)
    if leader is None:
        return "**Safe to restart?** No: there is no leader now."
    good = [each for each in view.voters if each is not voter and _is_good(view, leader, each)]
    if len(good) < majority_of(view):
        return (
            f"**Safe to restart?** No: without it only {len(good)} voters are well, and "
            f"{majority_of(view)} are needed."
        )
    if leader is voter:
        return (
            "**Safe to restart?** Yes, but hand leadership over first (`trex leader handover`): "
            "then no write waits for an election."
        )
    return f"**Safe to restart?** Yes: {len(good)} others are well, {majority_of(view)} are needed."


def explain_ballot(view: View, ballot: str) -> str:
    """What this ballot ("era.round.voter") is, who led under it and when, as Markdown."""
    lines = [
        f"# Ballot {_plain(ballot)}",
        (
            "A ballot is the number a voter stands under: era, round, voter. Higher beats lower, "
            "and "
            "no two voters ever use the same. Who is promised a majority under its ballot leads, "
            "until "
            "a higher ballot is promised somewhere."
        ),
    ]
    spans = [each for each in view.spans if str(each.ballot) == ballot]
    story = []
    for span in spans:
        if span.role not in ("candidate", "leader"):
            continue
        verb = "led" if span.role == "leader" else "stood"
        until = "until now" if span.to_ms is None else f"to {words.moment(span.to_ms, millis=True)}"
        length = words.age((view.now_ms if span.to_ms is None else span.to_ms) - span.from_ms)
        why = f": {_plain(span.why)}" if span.why else ""
        story.append(
            f"- voter {span.voter} {verb} from {words.moment(span.from_ms, millis=True)} {until} "
            f"({length}){why}"
        )
    lines.append("\n".join(story) or "Nobody was seen to stand or lead under it.")
    bound = [each for each in view.voters if each.digest and str(each.digest.promised) == ballot]
    if bound:
        lines.append(f"Promised by {_ids(bound)}: they refuse every lower ballot.")
    if str(view.ballot) == ballot:
        lines.append("It is the **highest** that anybody tells of.")
    elif spans and max(each.ballot for each in spans) < view.ballot:
        lines.append(f"Ballot {view.ballot} is higher: nothing is fixed under this one any more.")
    slots = [each.slot for each in view.slots if str(each.ballot) == ballot]
    if slots:
        lines.append(
            f"Of the newest slots, {words.count(slots[0])} to {words.count(slots[-1])} were first "
            "proposed under it."
        )
    return "\n\n".join(lines)


def explain_slot(view: View, slot: int) -> str:
    """What this slot holds, who has accepted it, whether it is fixed, as Markdown."""
    lines = [
        f"# Slot {words.count(slot)}",
        (
            "A slot holds one command, in the one order that all see. It goes *proposed* (by the "
            "leader) → *accepted* (on a voter's disk) → *fixed* (on a majority's disks: it can "
            "never "
            "change, and only then is the client told)."
        ),
    ]
    held = [each for each in view.voters if each.digest and each.digest.last_accepted >= slot]
    if slot <= view.tip_slot:
        lines.append(f"**● It is fixed.** {len(held)} of {len(view.voters)} voters hold it.")
    elif held:
        lines.append(
            f"**It is accepted by {_ids(held)}**; {majority_of(view)} of {len(view.voters)} make "
            "it fixed."
        )
    elif any(each.digest and each.digest.proposed >= slot for each in view.voters):
        lines.append("**○ It is proposed** and on its way to the disks.")
    else:
        lines.append(f"It is still empty: the newest fixed slot is {words.count(view.tip_slot)}.")
    seen = next((each for each in view.slots if each.slot == slot), None)
    if seen is not None:
        about = f" of `{_plain(seen.key)}`" if seen.key else ""
        lines.append(
            f"It holds **{_plain(seen.kind)}**{about}, {words.size(seen.size_bytes)}, first "
            f"proposed under ballot {seen.ballot} by voter {seen.ballot.voter}."
        )
        if seen.kind == "noop":
            lines.append("A no-op fills a hole after a change of leader; it changes nothing.")
    elif slot <= view.tip_slot:
        lines.append(f"More of it in SQL: `SELECT * FROM commits WHERE slot = {slot}`.")
    return "\n\n".join(lines)


def explain_listener(view: View, name: str, instance: int) -> str:
    """How this listener is doing and what to do, as Markdown."""
    lines = [
        f"# Listener {_plain(name)}",
        (
            "A listener follows the stream of fixed slots and never votes: however it fares, no "
            "commit "
            "waits for it. What it misses it asks for again (*repair*); far behind, it fetches a "
            "range "
            "(*catch-up*) or begins anew from a snapshot (*reset*)."
        ),
    ]
    known = view.listeners.get((name, instance))
    if known is None:
        lines.append("It is not heard of any more: it left, or was silent for long.")
        return "\n\n".join(lines)
    report = known.report
    lag = max(0, report.tip - report.applied)
    ago = words.age(view.now_ms - known.heard_ms)
    through = "itself" if known.direct else "through a voter"
    stored = "no store" if report.stored < 0 else f"stored {words.count(report.stored)}"
    behind = f", for {words.age(report.behind_ms)}" if lag and report.behind_ms else ""
    lines.append(
        f"- heard {ago} ago, {through}; up {words.age(report.uptime_s * 1_000)}, version "
        f"{_plain(report.version)}\n"
        f"- applied **{words.count(report.applied)}**, {stored}; "
        f"**{words.plural(lag, 'slot')}** behind{behind}\n"
        f"- {words.plural(report.gaps, 'gap')}, {words.plural(report.repairs, 'repair request')}, "
        f"{words.plural(report.catchups, 'catch-up')}, {words.plural(report.resets, 'reset')} "
        "since it started"
    )
    lines.append(_list([each for each in findings(view) if each.subject == f"listener {name}"]))
    if report.gaps * 100 > report.applied > 0 or report.resets > 1:
        lines.append(
            "Many gaps for what it applied: its receive buffer is too small (`net.core.rmem_max`), "
            "its machine too busy, or the network loses packets."
        )
    return "\n\n".join(lines)
