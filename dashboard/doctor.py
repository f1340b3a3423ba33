"""``trex doctor``: this module alone turns what was found out into the check list, and its words.

Pure: it judges an :class:`Evidence`, which ``probes`` gathers.  What concerns the cluster is what
``advice`` says of the same view, so that doctor and dashboard never differ; what only the doctor
sees is added: who answers over TCP, this machine's sockets, clock, disks and versions.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from dashboard import advice, tables
from dashboard.advice import LEVELS, SIGNS, Level
from dashboard.view import View
from dashboard.words import age, count, micros, plural, size
from trex_core.cluster import ClusterConfig
from trex_core.messages import Status, VoterDigest
from voters.driver import Unavailable

if TYPE_CHECKING:
    from rich.text import Text

ALL_WELL: Final = 0
"""Exit code: nothing is wrong; notes there may be."""
WRONG: Final = 1
"""Exit code: something is "warn" or "bad"."""
NO_LEADER: Final = 4
"""Exit code: no voter leads, or none is known to: writes fail."""

CLOCK_MS_MAX: Final = 1_000
"""A wall clock further off than this is worth a note: logs and ``commits.time`` mislead."""
SYNC_US_MAX: Final = 50_000
"""A disk whose 99th percentile of a sync is slower than this is called slow."""
PROBED_US_MAX: Final = 20_000
"""The same for the median of the few syncs tried here."""
TCP_MS_MAX: Final = 300
"""A voter that takes longer to tell its status is called slow to answer."""
FILES_MIN: Final = 1_024
"""A process here should be allowed so many open files."""
SNAPSHOT_STEPS: Final = 3
"""A newest snapshot older than so many times ``snapshot_slots`` is too old."""
JOURNAL_TIMES: Final = 3
"""A journal larger than so many times what is to be kept is too large."""
ROOM_TIMES: Final = 4
"""A disk with less than so many times ``free_bytes_min`` free is nearly full."""
ELECTIONS_MS: Final = 600_000
ELECTIONS_MAX: Final = 3
"""More changes of leader than that in ELECTIONS_MS are too many."""
FRESH_MS: Final = 2_000
"""A voter unheard for longer is not counted as alive: one sends a heartbeat every second."""
NAMES_SHOWN: Final = 5


# --- what was found out -----------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True):
    """What a voter answered over TCP after ``took_ms``; without ``status``, ``why`` not.
    ``archive``: why its archive did not answer ("": it did, or was not asked)."""

    voter: int
    status: Status | None
    took_ms: int
    why: str = ""
    archive: str = ""


class Place(msgspec.Struct, frozen=True):
    """A directory of this machine; ``subject`` is "here" or the voter whose it is. ``sync_*_us``
    are of a few syncs of 512 bytes there (0: not measured, ``trouble`` says why)."""

    subject: str
    directory: str
    free_bytes: int | None = None
    sync_p50_us: int = 0
    sync_p99_us: int = 0
    trouble: str = ""


class Here(msgspec.Struct, frozen=True):
    """This machine and process. ``trouble``: why the group could not be joined. ``looped``: whether
    a datagram of our own to the group came back. ``drops``: datagrams that this machine dropped for
    full buffers while we listened. None: it cannot be told here."""

    version: str
    trouble: str = ""
    looped: bool | None = None
    drops: int | None = None
    buffer_bytes: int = 0
    buffer_wanted: int = 0
    synchronised: bool | None = None
    files_max: int = 0
    optimized: bool = False


class Evidence(msgspec.Struct, frozen=True):
    """All that is judged. ``view`` is what was heard in ``listened_ms``; ``offsets_ms`` tells how
    far each voter's wall clock is ahead of the one here, at the least delayed heartbeat."""

    cluster: ClusterConfig
    source: str
    view: View
    listened_ms: int
    replies: tuple[Reply, ...]
    offsets_ms: Mapping[int, int]
    places: tuple[Place, ...]
    here: Here
    now_s: int = 0
    """The time here, in seconds since 1970."""
    certificate_until_s: int = 0
    """When the certificate used here expires; 0: not known."""

    @property
    def statuses(self) -> dict[int, Status]:
        """Of the voters that answered over TCP."""
        return {each.voter: each.status for each in self.replies if each.status is not None}

    @property
    def heard(self) -> tuple[int, ...]:
        """The voters whose heartbeats were heard."""
        return tuple(each.voter for each in self.view.voters if each.heard_ms is not None)

    @property
    def heard_now(self) -> tuple[int, ...]:
        """Those of them that were heard to the last."""
        since_ms = self.view.now_ms - FRESH_MS
        return tuple(
            each.voter
            for each in self.view.voters
            if each.heard_ms is not None and each.heard_ms >= since_ms
        )


# --- what is said of it -----------------------------------------------------------------------


class Check(msgspec.Struct, frozen=True):
    """A line of the list. ``subject``: whom it is about; ``advice``: what to do ("": nothing)."""

    check: str
    level: Level
    subject: str
    words: str
    advice: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """The list, in its fixed order, the verdict last; and the exit code."""

    checks: tuple[Check, ...]
    exit_code: int


_Judge: TypeAlias = Callable[[Evidence], Iterable[Check]]


def examine(evidence: Evidence) -> Diagnosis:
    """Judge. Every check is in the list at least once, whatever is missing."""
    checks = [
        Check(
            "cluster file", "ok", "here",
            f"{evidence.source}: cluster {evidence.cluster.name}, "
            f"{plural(len(evidence.cluster.voters), 'voter')}",
        )
    ]  # fmt: skip
    said: dict[str, list[Check]] = {}
    for judge in _JUDGES:
        for each in judge(evidence):
            said.setdefault(each.check, []).append(each)
    _with_findings(evidence, said)
    for lines_of in said.values():
        worse = [each for each in lines_of if each.level != "ok"]
        checks += sorted(worse, key=lambda each: -LEVELS.index(each.level)) or lines_of
    last, code = _verdict(evidence, checks)
    return Diagnosis((*checks, last), code)


def no_cluster(words: str) -> Diagnosis:
    """The diagnosis when the cluster file cannot be read: ``words`` say why."""
    return Diagnosis(
        (
            Check("cluster file", "bad", "here", words),
            Check("verdict", "bad", "here", "nothing can be examined without a cluster file"),
        ),
        WRONG,
    )


def _worst(checks: Iterable[Check]) -> Level:
    return max((each.level for each in checks), key=LEVELS.index, default="ok")


def _verdict(evidence: Evidence, checks: list[Check]) -> tuple[Check, int]:
    """The last line. The dashboard's, unless it hears too little to know what TCP tells."""
    seen = advice.verdict(evidence.view)
    level, words = seen.level, seen.words
    leads = seen.leader != 0
    if seen.state == "unknown":
        told = _told(evidence)
        leads = told.leader != 0
        words = f"{words}. Over TCP: {told.words}"
    worst = _worst(checks)
    if LEVELS.index(worst) > LEVELS.index(level):
        level = worst
    wrong = sum(each.level in ("warn", "bad") for each in checks)
    if wrong:
        words = f"{words} ({plural(wrong, 'thing')} to look at)"
    code = NO_LEADER
    if leads:
        code = WRONG if level in ("warn", "bad") else ALL_WELL
    return Check("verdict", level, "cluster", words), code


def _told(evidence: Evidence) -> tables.Verdict:
    """What the statuses told over TCP mean."""
    found = {each.voter: each.status or Unavailable(each.why) for each in evidence.replies}
    return tables.judge(evidence.cluster, found)


_TOPICS: Final = {
    "feed": "multicast stream",
    "cut_off": "multicast stream",
    "no_quorum": "quorum",
    "quorum_late": "quorum",
    "elections": "elections",
    "voter_behind": "lag of voters",
    "disk_full": "disk room",
    "disk_low": "disk room",
    "slow_disk": "disk speed",
    "versions": "versions",
    "clock": "clock",
}
"""By the code of a finding: the check it belongs to."""
_SUBJECTS: Final = {"voter": "voters", "cluster": "leader", "here": "this machine"}
"""The same for all others, by the first word of whom they are about; the rest are of listeners."""


def _with_findings(evidence: Evidence, said: dict[str, list[Check]]) -> None:
    """Add what the dashboard finds in the same view to ``said``, the lines by check. Where a check
    tells of the same subject already, the worse of the two stays: the doctor's if they are equal,
    which knows what TCP tells."""
    unheard = {f"voter {voter}" for voter in evidence.cluster.voter_ids} - {
        f"voter {voter}" for voter in evidence.heard
    }
    for each in advice.findings(evidence.view):
        if each.code == "voter_silent" and each.subject in unheard:
            continue  # it is down, or its multicast does not come: told above, with what TCP tells
        kind = each.subject.partition(" ")[0]
        check = _TOPICS.get(each.code) or _SUBJECTS.get(kind, "listeners")
        line = Check(check, each.level, each.subject, each.words, each.advice)
        lines = said.setdefault(check, [])
        same = [known for known in lines if known.subject == line.subject and known.level != "ok"]
        if any(LEVELS.index(known.level) >= LEVELS.index(line.level) for known in same):
            continue
        said[check] = [known for known in lines if known not in same] + [line]


def _listed(voters: Iterable[int]) -> str:
    numbers = sorted(voters)
    noun = "voter" if len(numbers) == 1 else "voters"
    return f"{noun} {', '.join(map(str, numbers))}"


# --- the voters, over TCP and over the stream ---------------------------------------------------


def _voters(evidence: Evidence) -> Iterator[Check]:
    heard = set(evidence.heard)
    for reply in evidence.replies:
        entry = evidence.cluster.voter(reply.voter)
        where = f"{entry.host}:{entry.client_port}"
        subject = f"voter {reply.voter}"
        if reply.status is not None:
            if reply.took_ms > TCP_MS_MAX:
                yield Check(
                    "voters", "warn", subject,
                    f"takes {age(reply.took_ms)} to answer at {where}",
                    "It is overloaded, its disk is slow, or the way to it is: see its load.",
                )  # fmt: skip
        elif reply.voter in heard:
            yield Check(
                "voters", "warn", subject,
                f"its heartbeats are heard, but it does not answer at {where}: {reply.why}",
                "It died just now, or clients are kept from that port: look at the firewall and at "
                "client_port in the cluster file.",
            )  # fmt: skip
        else:
            yield Check(
                "voters", "warn", subject,
                f"neither answers at {where} ({reply.why}) nor is heard",
                f"Is its machine up, and its process? `trex-voter run --id {reply.voter}` starts "
                "it; the end of its log says why it stopped.",
            )  # fmt: skip
    answered = evidence.statuses
    if len(answered) == len(evidence.replies):
        slowest = max((each.took_ms for each in evidence.replies), default=0)
        yield Check(
            "voters", "ok", "cluster",
            f"{plural(len(answered), 'voter')} of {len(evidence.replies)} answer over TCP, the "
            f"slowest after {age(slowest)}",
        )  # fmt: skip
    elif not answered and not heard:
        yield Check(
            "voters", "bad", "cluster",
            "no voter answers and none is heard",
            "Either all of them are down, or this machine is cut off from them: try from another.",
        )  # fmt: skip


def _archives(evidence: Evidence) -> Iterator[Check]:
    for reply in evidence.replies:
        if reply.archive:
            entry = evidence.cluster.voter(reply.voter)
            yield Check(
                "archives", "warn", f"voter {reply.voter}",
                f"its archive does not answer at {entry.host}:{entry.archive_port}: "
                f"{reply.archive}",
                "Who is behind catches up there, from any voter. Look at the firewall and at "
                "archive_port; the voter starts its archive process again by itself.",
            )  # fmt: skip
    answered = sum(not each.archive for each in evidence.replies if each.status is not None)
    if answered:
        yield Check("archives", "ok", "cluster", f"{plural(answered, 'archive')} answered")
    elif not evidence.statuses:
        yield Check("archives", "note", "cluster", "not asked: no voter answers")


def _stream(evidence: Evidence) -> Iterator[Check]:
    """Whether the group reaches this machine; who is to blame if not shows against TCP."""
    name = "multicast stream"
    stream = evidence.cluster.stream
    group = f"{stream.group}:{stream.port}"
    heard, answered = set(evidence.heard), set(evidence.statuses)
    if evidence.here.trouble:
        yield Check(name, "bad", "here", evidence.here.trouble)
        return
    mute = answered - heard
    listened = age(evidence.listened_ms)
    check = (
        f"check [stream] interface ({stream.interface}) and ttl ({stream.ttl}) in the cluster file "
        "of both sides, and that the switches between forward the group (IGMP snooping needs a "
        "querier)"
    )
    if not heard and not answered:
        yield Check(
            name, "bad", "here", f"nothing heard in {listened} on {group}; nor does a voter answer"
        )
    elif not heard:
        yield Check(
            name, "bad", "here",
            f"nothing heard in {listened} on {group}, though {_listed(answered)} answer over TCP: "
            "multicast does not reach this machine",
            f"Listeners here follow late, by catch-up alone. {check[0].upper()}{check[1:]}.",
        )  # fmt: skip
    else:
        for voter in sorted(mute):
            yield Check(
                name, "warn", f"voter {voter}",
                f"answers over TCP, but no heartbeat of it came in {listened} on {group}",
                f"If it leads, listeners here get nothing: {check}.",
            )  # fmt: skip
    if heard:
        words = f"{_listed(heard)} heard on {group}"
        yield Check(name, "ok", "cluster", words)
    if evidence.here.drops:
        yield Check(
            name, "warn", "here",
            f"this machine dropped {count(evidence.here.drops)} datagrams for full buffers while "
            "we listened",
            "A process here reads too slowly, or buffers are too small: raise net.core.rmem_max.",
        )  # fmt: skip


def _repair(evidence: Evidence) -> Iterator[Check]:
    name = "multicast repair"
    stream = evidence.cluster.stream
    here = evidence.here
    direct = [each for each in evidence.view.listeners.values() if each.direct]
    if here.trouble:
        yield Check(name, "bad", "here", "the group cannot be joined")
        return
    if here.looped is False:
        yield Check(
            name, "warn", "here",
            f"a datagram of our own to {stream.group} did not come back",
            f"This machine does not multicast on {stream.interface}: is that the address of an "
            "interface which is up, and does a firewall drop what goes to the group?",
        )  # fmt: skip
        return
    own = "our own datagrams come back" if here.looped else "not tested"
    others = (
        f"; {plural(len(direct), 'listener')} heard directly"
        if direct
        else "; no other listener heard in that time"
    )
    yield Check(name, "ok", "here", own + others)


def _buffers(evidence: Evidence) -> Iterator[Check]:
    here = evidence.here
    if not here.buffer_wanted:
        yield Check("receive buffer", "note", "here", "not measured: the socket was refused")
    elif here.buffer_bytes < here.buffer_wanted:
        yield Check(
            "receive buffer", "note", "here",
            f"the kernel grants {size(here.buffer_bytes)} of the {size(here.buffer_wanted)} asked "
            "for",
            f"`sysctl -w net.core.rmem_max={here.buffer_wanted}`: a listener that pauses loses "
            "less.",
        )  # fmt: skip
    else:
        yield Check("receive buffer", "ok", "here", f"{size(here.buffer_bytes)} granted")


# --- the cluster --------------------------------------------------------------------------------


def _known(evidence: Evidence) -> dict[int, VoterDigest | Status]:
    """What each voter told last: over TCP, or else in its heartbeat."""
    known: dict[int, VoterDigest | Status] = {}
    for each in evidence.view.voters:
        if each.digest is not None:
            known[each.voter] = each.digest
    known.update(evidence.statuses)
    return dict(sorted(known.items()))


def _quorum(evidence: Evidence) -> Iterator[Check]:
    voters = len(evidence.cluster.voters)
    majority = voters // 2 + 1
    alive = len({*evidence.heard_now, *evidence.statuses})
    words = f"{alive} of {plural(voters, 'voter')} live, {majority} needed"
    if alive < majority:
        yield Check(
            "quorum", "bad", "cluster", words, "Writes fail; nothing is lost. Start the others."
        )
    elif alive == majority and voters > 1:
        yield Check(
            "quorum", "warn", "cluster", f"{words}: none may be lost",
            "Stop none of them; start the missing ones first.",
        )  # fmt: skip
    else:
        yield Check("quorum", "ok", "cluster", f"{words}: can lose {alive - majority} more")


def _leader(evidence: Evidence) -> Iterator[Check]:
    leader = advice.verdict(evidence.view).leader or _told(evidence).leader
    if leader:
        ballots = [each.ballot for each in evidence.statuses.values()]
        ballot = max(evidence.view.ballot, *ballots) if ballots else evidence.view.ballot
        yield Check("leader", "ok", f"voter {leader}", f"leads, ballot {ballot}")
        return
    waiting = [
        f"voter {voter} is {each.role}"
        for voter, each in evidence.statuses.items()
        if each.role != "follower"
    ]
    yield Check(
        "leader", "bad", "cluster",
        "no voter is known to lead: writes fail" + (f"; {', '.join(waiting)}" if waiting else ""),
        "With a quorum alive one is elected within seconds. If not: do they hear each other on "
        "their peer_port (UDP), and was every voter up once since `trex-voter format`?",
    )  # fmt: skip


def _elections(evidence: Evidence) -> Iterator[Check]:
    now_ms = evidence.view.now_ms
    led = {
        span.ballot
        for span in evidence.view.spans
        if span.role == "leader" and span.from_ms >= now_ms - ELECTIONS_MS
    }
    words = f"{plural(len(led), 'change')} of leader in the last {age(ELECTIONS_MS)}"
    if len(led) > ELECTIONS_MAX:
        yield Check(
            "elections", "warn", "cluster", words,
            'Voters lose their leader too often: see their logs for why ("role changed"), and '
            "the speed of their disks; [timing] election_ticks_min must outlast their pauses.",
        )  # fmt: skip
    else:
        yield Check("elections", "ok", "cluster", words)


def _lag(evidence: Evidence) -> Iterator[Check]:
    known = _known(evidence)
    if not known:
        yield Check("lag of voters", "note", "cluster", "not known: no voter told anything")
        return
    newest = max(each.fixed for each in known.values())
    worst = 0
    for voter, each in known.items():
        lacks = newest - each.fixed
        worst = max(worst, lacks)
        if lacks > tables.BEHIND_SLOTS:
            yield Check(
                "lag of voters", "warn", f"voter {voter}",
                f"fixed up to {count(each.fixed)}, {plural(lacks, 'slot')} behind",
                "It catches up by itself; until then it is no help if another is lost. If it does "
                "not get nearer: see the speed of its disk and its archive_port.",
            )  # fmt: skip
        elif each.fixed - each.applied > tables.BEHIND_SLOTS:
            yield Check(
                "lag of voters", "warn", f"voter {voter}",
                f"applied {count(each.applied)} of {count(each.fixed)} fixed slots",
                "Its processor is overloaded.",
            )  # fmt: skip
    yield Check(
        "lag of voters", "ok", "cluster",
        f"fixed up to slot {count(newest)}; the last voter lacks {plural(worst, 'slot')}",
    )  # fmt: skip


def _room(evidence: Evidence) -> Iterator[Check]:
    least = evidence.cluster.journal.free_bytes_min
    known = {f"voter {voter}": each.free_bytes for voter, each in _known(evidence).items()}
    rooms = [(subject, free, "") for subject, free in known.items()]
    rooms += [
        (each.subject, each.free_bytes, f" in {each.directory}")
        for each in evidence.places
        if each.free_bytes is not None and each.subject not in known
    ]
    for subject, free, where in rooms:
        if free < least:
            yield Check(
                "disk room", "bad", subject,
                f"{size(free)} free{where}, less than free_bytes_min ({size(least)})",
                "It accepts nothing until there is room; then it goes on by itself. Delete what is "
                "not TRex's, or grow the disk.",
            )  # fmt: skip
        elif free < ROOM_TIMES * least:
            yield Check(
                "disk room", "warn", subject,
                f"{size(free)} free{where}; below {size(least)} a voter stops accepting",
                "Make room soon, or keep less: [journal] retain_bytes, snapshots_kept.",
            )  # fmt: skip
    if rooms:
        scarcest = min(free for _, free, _ in rooms)
        yield Check("disk room", "ok", "cluster", f"at least {size(scarcest)} free at each")
    else:
        yield Check("disk room", "note", "cluster", "not known: no voter told it")


def _speed(evidence: Evidence) -> Iterator[Check]:
    slowest = 0
    for voter, each in _known(evidence).items():
        slowest = max(slowest, each.fsync_p99_us)
        if each.fsync_p99_us > SYNC_US_MAX:
            yield Check(
                "disk speed", "warn", f"voter {voter}",
                f"its syncs take {micros(each.fsync_p50_us)}, one in a hundred "
                f"{micros(each.fsync_p99_us)}",
                "Every vote of it waits for one. Is another program writing to that disk? Put the "
                "journal on its own: journal_directory.",
            )  # fmt: skip
    for place in evidence.places:
        if place.trouble:
            yield Check(
                "disk speed", "note" if place.free_bytes is not None else "warn", place.subject,
                f"{place.directory}: {place.trouble}",
            )  # fmt: skip
            continue
        slowest = max(slowest, place.sync_p99_us)
        if place.sync_p50_us > PROBED_US_MAX:
            yield Check(
                "disk speed", "warn", place.subject,
                f"a sync in {place.directory} takes {micros(place.sync_p50_us)}, the slowest of a "
                f"few {micros(place.sync_p99_us)}",
                "Measured from here just now. Is another program writing to that disk?",
            )  # fmt: skip
    if slowest:
        yield Check(
            "disk speed", "ok", "cluster", f"the slowest syncs take {micros(slowest)} (p99)"
        )
    else:
        yield Check("disk speed", "note", "cluster", "not known: no voter told it")


def _journal(evidence: Evidence) -> Iterator[Check]:
    knobs = evidence.cluster.journal
    most = JOURNAL_TIMES * (knobs.retain_bytes + 2 * knobs.segment_bytes)
    step = knobs.snapshot_slots
    largest = oldest = 0
    known = _known(evidence)
    for voter, each in known.items():
        largest = max(largest, each.journal_bytes)
        age_slots = max(0, each.applied - each.snapshot_slot)
        oldest = max(oldest, age_slots)
        if age_slots > SNAPSHOT_STEPS * step:
            yield Check(
                "snapshots", "warn", f"voter {voter}",
                f"its newest snapshot is {plural(age_slots, 'slot')} old; one is due every "
                f"{count(step)}",
                f"`trex snapshot --voter {voter}` cuts one now; see its log for why it cannot.",
            )  # fmt: skip
        if each.journal_bytes > most:
            yield Check(
                "snapshots", "warn", f"voter {voter}",
                f"its journal has {size(each.journal_bytes)}, {size(knobs.retain_bytes)} are to be "
                "kept",
                "Segments go once snapshots cover them: see whether it writes snapshots.",
            )  # fmt: skip
    if known:
        yield Check(
            "snapshots", "ok", "cluster",
            f"at most {plural(oldest, 'slot')} since the newest; the largest journal has "
            f"{size(largest)}",
        )  # fmt: skip
    else:
        yield Check("snapshots", "note", "cluster", "not known: no voter told it")


# --- who follows, versions, clocks, this process ------------------------------------------------


def _listeners(evidence: Evidence) -> Iterator[Check]:
    digests = [each.digest.listeners for each in evidence.view.voters if each.digest is not None]
    if not digests:
        yield Check("listeners", "note", "cluster", "not known: no voter is heard")
        return
    seen = len(evidence.view.listeners)
    most = max(digests, key=lambda each: each.known)
    if most.known <= seen:
        yield Check("listeners", "ok", "cluster", f"{plural(seen, 'listener')} known")
        return
    # More than could be told of, one by one, in that time: a voter's count of all of them.
    words = f"{plural(most.known, 'listener')} known, {most.behind} behind, {most.silent} silent"
    level: Level = "warn" if most.behind else "note" if most.silent else "ok"
    yield Check("listeners", level, "cluster", words, "`trex-dash`, key 2, names them.")


def _versions(evidence: Evidence) -> Iterator[Check]:
    found: dict[str, list[str]] = {}
    found.setdefault(evidence.here.version, []).append("here")
    for voter, each in _known(evidence).items():
        found.setdefault(each.version, []).append(f"voter {voter}")
    for listener in evidence.view.listeners.values():
        report = listener.report
        found.setdefault(report.version, []).append(f"listener {report.name}")
    if len(found) == 1:
        yield Check("versions", "ok", "cluster", f"{evidence.here.version} everywhere")
        return
    listed = "; ".join(f"{version}: {_few(who)}" for version, who in sorted(found.items()))
    yield Check(
        "versions", "note", "cluster", listed,
        "Fine while they are being replaced one by one; finish it.",
    )  # fmt: skip


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _certificates(evidence: Evidence) -> Iterator[Check]:
    ends = {
        f"voter {voter}": each.certificate_until_s
        for voter, each in evidence.statuses.items()
        if each.certificate_until_s
    }
    if evidence.certificate_until_s:
        ends["here"] = evidence.certificate_until_s
    if not ends or not evidence.now_s:
        yield Check("certificates", "ok", "cluster", "no voter told when its certificate expires")
        return
    for who, until_s in ends.items():
        left_days = (until_s - evidence.now_s) // 86400
        if left_days < tables.CERTIFICATE_WARN_S // 86400:
            ended = until_s <= evidence.now_s
            yield Check(
                "certificates", "bad" if ended else "warn", who,
                "its certificate has expired" if ended
                else f"its certificate expires in {plural(left_days, 'day')}",
                "Issue a new one with `trex cert issue`; a running process takes it up by itself.",
            )  # fmt: skip
    soonest = min(ends.values()) - evidence.now_s
    yield Check("certificates", "ok", "cluster", f"good for {plural(soonest // 86400, 'day')}")


def _clock(evidence: Evidence) -> Iterator[Check]:
    if evidence.here.synchronised is False:
        yield Check(
            "clock", "note", "here",
            "the kernel says that nothing keeps the clock of this machine right",
            "Run chrony, ntpd or systemd-timesyncd; a virtual machine may get it from its host.",
        )  # fmt: skip
    offsets = evidence.offsets_ms
    if not offsets:
        yield Check("clock", "note", "cluster", "not compared: no voter told its time")
        return
    usual = statistics.median_low(sorted(offsets.values()))
    if abs(usual) > CLOCK_MS_MAX:
        yield Check(
            "clock", "note", "here",
            f"the clock here is {age(abs(usual))} {'behind' if usual > 0 else 'ahead of'} the "
            "voters'",
            "No decision of the cluster rests on it, but times in logs and tables do not agree.",
        )  # fmt: skip
    for voter, offset in sorted(offsets.items()):
        off = offset - usual
        if abs(off) > CLOCK_MS_MAX:
            yield Check(
                "clock", "note", f"voter {voter}",
                f"its clock is {age(abs(off))} {'ahead of' if off > 0 else 'behind'} the others'",
                "No decision of the cluster rests on it, but the times of what it proposes mislead "
                "(commits.time). Synchronise it.",
            )  # fmt: skip
    worst = max(abs(each) for each in offsets.values())
    yield Check(
        "clock", "ok", "cluster",
        f"{plural(len(offsets), 'clock')} of voters within {age(worst)} of the one here",
    )  # fmt: skip


def _process(evidence: Evidence) -> Iterator[Check]:
    here = evidence.here
    if 0 < here.files_max < FILES_MIN:
        yield Check(
            "this machine", "note", "here",
            f"a process here may open {count(here.files_max)} files",
            f"A voter needs one for each client and segment: `ulimit -n {FILES_MIN}` or more.",
        )  # fmt: skip
    running = "; python -O: assertions are off, what guards data is not" if here.optimized else ""
    files = f"{count(here.files_max)} files may be open" if here.files_max else "not looked at"
    yield Check("this machine", "ok", "here", files + running)


_JUDGES: Final[tuple[_Judge, ...]] = (
    _voters,
    _archives,
    _stream,
    _repair,
    _buffers,
    _quorum,
    _leader,
    _elections,
    _lag,
    _room,
    _speed,
    _journal,
    _listeners,
    _versions,
    _certificates,
    _clock,
    _process,
)
"""In the order of the list."""


# --- how it is shown ----------------------------------------------------------------------------

_STYLES: Final[Mapping[Level, str]] = {
    "ok": "blue",
    "note": "",
    "warn": "bold yellow",
    "bad": "bold red",
}


def lines(diagnosis: Diagnosis, columns_max: int) -> Iterator[Text]:
    """The list for a person, in lines of at most so many columns: a check each, advice beneath."""
    from rich.text import Text

    names = max(len(each.check) for each in diagnosis.checks)
    indent = " " * (names + 4)
    room = max(40, columns_max - len(indent))
    for each in diagnosis.checks:
        about = "" if each.subject in ("cluster", "here") else f"{each.subject}: "
        first, *more = textwrap.wrap(tables.visible(f"{about}{each.words}"), room) or [""]
        line = Text()
        line.append(f"{SIGNS[each.level]} ", _STYLES[each.level])
        line.append(f"{each.check:<{names}}  ", "bold")
        line.append(first)
        yield line
        for rest in more:
            yield Text(f"{indent}{rest}")
        for rest in textwrap.wrap(tables.visible(each.advice), room - 2):
            yield Text(f"{indent}  {rest}", "dim")
