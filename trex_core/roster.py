"""Who listens, as reports tell it, and when the next report is due: this module alone says both.

Listeners multicast a :class:`ListenerReport` now and then, to everybody.  As in RTCP (RFC 3550
§6.2-6.3) the time between two of one listener grows with the number of listeners it has heard, so
that all of them together send about REPORTS_PER_S_MAX a second, however many they are; and a
listener whose report is due looks again at how many it knows *then* and waits on if that became
more ("timer reconsideration"), so that hundreds that start at once do not flood.  Beyond RTCP:
where some are new, more are to be expected, so a newcomer counts for several while it is new.

Pure: the time (any clock in milliseconds that does not go back) and the draws are given.  Bounded
whatever is heard; what a report costs does not depend on how many are known.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from trex_core.messages import VOTER_ID_MAX, ListenerDigest, ListenerReport, ListenerSeen
from trex_core.wire import encode_body

REPORT_MS_MIN: Final = 2_000
"""Mean time between two reports of a listener when they are few, in milliseconds."""
REPORTS_PER_S_MAX: Final = 50
"""Reports a second of all listeners together: the mean stays below it (it is about 0.8 of it),
in any one second there may be half as many more, or twice as many when thousands start at once."""
LISTENERS_MAX: Final = 4096
"""Most listeners remembered. One more takes the place of the one unheard for longest if that is
silent, and is ignored otherwise: who floods the group with names cannot drive out who is known."""
SILENT_INTERVALS: Final = 3
"""A listener unheard for so many of its mean intervals is silent: two reports in a row were lost,
or it died."""
FORGET_INTERVALS: Final = 10
"""Unheard for so many of its mean intervals, and FORGET_MS_MIN, it is forgotten."""
FORGET_MS_MIN: Final = 60_000
BEHIND_MS: Final = 3_000
"""A listener that says it was not at its tip for so long counts as behind, in milliseconds."""
NAME_BYTES_MAX: Final = 128
"""Longest name of a listener, in bytes."""
VERSION_BYTES_MAX: Final = 64
"""Longest version a report may tell, in bytes."""
HELPS_CHARS_MAX: Final = 21
"""Longest ``address:port`` of a report."""
DIGEST_BYTES: Final = 24
"""More than an encoded ListenerDigest needs beside its rows."""

_NEW_MS: Final = 2_000
"""For so long after its first report a listener is new."""
_NEW_COUNTS: Final = 5
"""One that is new counts as so many in :meth:`Roster.expected`."""
_SURVEY_MS: Final = 1_000
"""The whole roster is looked through at most this often."""
_NUMBER_MAX: Final = (1 << 63) - 1
_ROW_BYTES: Final = 10
"""More than an encoded ListenerSeen needs beside its report."""
_ROWS_TRIED: Final = 32
"""Most rows looked at for one digest."""


def mean_interval_ms(known: int) -> int:
    """Mean time between two reports of one listener among ``known``, in milliseconds."""
    return max(REPORT_MS_MIN, known * 1000 // REPORTS_PER_S_MAX)


def report_interval_ms(known: int, draw: float) -> int:
    """A random time between two reports of one listener among ``known``: half to one and a half
    times the mean. ``draw`` is uniform in 0..1."""
    return int(mean_interval_ms(known) * (0.5 + draw))


def sane(report: ListenerReport) -> bool:
    """Could a listener have sent this? Whoever hears reports drops all others."""
    return (
        0 < len(report.name.encode(errors="replace")) <= NAME_BYTES_MAX
        and len(report.version.encode(errors="replace")) <= VERSION_BYTES_MAX
        and (not report.helps or _could_help(report))
        and report.stored >= -1
        and min(_numbers(report)) >= 0
        and max(report.stored, *_numbers(report)) <= _NUMBER_MAX
    )


def helper_address(text: str) -> tuple[str, int] | None:
    """(IPv4 address, port) of ``ListenerReport.helps``; None if it is none."""
    if len(text) > HELPS_CHARS_MAX or not text.isascii():
        return None
    host, _, port = text.rpartition(":")
    parts = host.split(".")
    good = len(parts) == 4 and all(p.isdigit() and len(p) <= 3 and int(p) < 256 for p in parts)
    if not good or not port.isdigit() or not 0 < int(port) < 65536:
        return None
    return host, int(port)


def _could_help(report: ListenerReport) -> bool:
    return report.instance > VOTER_ID_MAX and helper_address(report.helps) is not None


def _numbers(report: ListenerReport) -> tuple[int, ...]:
    return (
        report.instance,
        report.applied,
        report.tip,
        report.behind_ms,
        report.gaps,
        report.repairs,
        report.catchups,
        report.resets,
        report.uptime_s,
    )


class Reporter:
    """When one listener reports. Ask :meth:`due` at ``next_ms``, or whenever convenient."""

    def __init__(self, now_ms: int) -> None:
        self._last_ms = now_ms
        self.next_ms = now_ms + report_interval_ms(1, 0.0)
        """Nothing is due before."""

    def due(self, now_ms: int, known: int, draw: float) -> bool:
        """Whether to report now; true counts as reported. ``known`` is how many listeners are to
        be expected (:meth:`Roster.expected`), this one included; ``draw`` is fresh, uniform in
        0..1. A last report, on leaving, needs no permission."""
        if now_ms < self.next_ms:
            return False
        due_ms = self._last_ms + report_interval_ms(known, draw)
        if due_ms > now_ms:  # more are known than when it was set, or only the shortest is over
            self.next_ms = due_ms
            return False
        self._last_ms = now_ms
        self.next_ms = now_ms + report_interval_ms(known, 0.0)
        return True


class _Entry:
    """A listener that is known. ``interval_ms`` is its mean interval as of its newest report: it is
    not silent sooner because there are fewer since, nor (``mean_ms``, as of now) because there are
    more and it waits its turn."""

    __slots__ = (
        "behind",
        "gone",
        "heard_ms",
        "interval_ms",
        "lag",
        "report",
        "row_bytes",
        "until_ms",
    )

    def __init__(self) -> None:
        self.gone = False

    def take(self, report: ListenerReport, now_ms: int, mean_ms: int) -> None:
        self.report = report
        self.heard_ms = now_ms
        self.interval_ms = mean_ms
        self.until_ms = now_ms + SILENT_INTERVALS * mean_ms  # surely not silent before
        self.behind = report.behind_ms >= BEHIND_MS
        self.lag = report.tip - report.applied
        self.row_bytes = len(encode_body(report)) + _ROW_BYTES

    def silent(self, now_ms: int, mean_ms: int) -> bool:
        return now_ms - self.heard_ms > SILENT_INTERVALS * max(self.interval_ms, mean_ms)

    def forgotten(self, now_ms: int, mean_ms: int) -> bool:
        intervals_ms = FORGET_INTERVALS * max(self.interval_ms, mean_ms)
        return now_ms - self.heard_ms > max(FORGET_MS_MIN, intervals_ms)

    def seen(self, now_ms: int) -> ListenerSeen:
        return ListenerSeen(max(0, now_ms - self.heard_ms), self.report)


class Roster:
    """The listeners that are heard. Not a member of itself: who reports hears its own report too,
    or counts itself."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], _Entry] = {}
        """The one unheard for longest first."""
        self._newcomers_ms: deque[int] = deque(maxlen=LISTENERS_MAX // _NEW_COUNTS)
        """When those were heard that are new."""
        self._turns: deque[_Entry] = deque()
        """Whose row is shown next; some may be gone."""
        self._surveyed_ms: int | None = None
        self._counts = ListenerDigest()

    def heard(self, report: ListenerReport, now_ms: int) -> bool:
        """Take a :func:`sane` report. False if it was ignored: there are too many listeners."""
        key = (report.name, report.instance)
        entry = self._entries.pop(key, None)
        if report.leaving:
            if entry is not None:
                entry.gone = True
            return True
        if entry is None:
            if len(self._entries) >= LISTENERS_MAX and not self._make_room(now_ms):
                return False
            entry = _Entry()
            self._newcomers_ms.append(now_ms)
            self._turns.append(entry)
            if len(self._turns) > 2 * LISTENERS_MAX:
                self._turns = deque(each for each in self._turns if not each.gone)
        self._entries[key] = entry
        entry.take(report, now_ms, self._mean_ms(now_ms))
        return True

    def _make_room(self, now_ms: int) -> bool:
        key, oldest = next(iter(self._entries.items()))
        if not oldest.silent(now_ms, self._mean_ms(now_ms)):
            return False
        oldest.gone = True
        del self._entries[key]
        return True

    def size(self, now_ms: int) -> int:
        """How many listeners are known, the silent ones included."""
        self._survey(now_ms)
        return len(self._entries)

    def expected(self, now_ms: int) -> int:
        """How many listeners a report must reckon with: those known, and those that are still to
        be heard where newcomers are heard now. At most LISTENERS_MAX."""
        self._survey(now_ms)
        return self._expected(now_ms)

    def _expected(self, now_ms: int) -> int:
        newcomers_ms = self._newcomers_ms
        while newcomers_ms and newcomers_ms[0] <= now_ms - _NEW_MS:
            newcomers_ms.popleft()
        more = (_NEW_COUNTS - 1) * len(newcomers_ms)
        return min(len(self._entries) + more, LISTENERS_MAX)

    def _mean_ms(self, now_ms: int) -> int:
        return mean_interval_ms(self._expected(now_ms))

    def entries(self, now_ms: int) -> tuple[ListenerSeen, ...]:
        """All of them, the one unheard for longest first."""
        self._survey(now_ms)
        return tuple(entry.seen(now_ms) for entry in self._entries.values())

    def digest(self, now_ms: int, bytes_max: int) -> ListenerDigest:
        """The counts, at most a second old, and as many of the next rows as fit ``bytes_max``
        encoded bytes in all: successive digests show every listener."""
        self._survey(now_ms)
        counts = self._counts
        left = bytes_max - DIGEST_BYTES
        rows: list[ListenerSeen] = []
        turns = self._turns
        for _ in range(min(_ROWS_TRIED, len(turns))):
            entry = turns[0]
            if not entry.gone:
                if entry.row_bytes <= left:
                    left -= entry.row_bytes
                    rows.append(entry.seen(now_ms))
                elif rows:
                    break  # it is the first of the next digest, which may have more room
                turns.append(entry)
            turns.popleft()
        return ListenerDigest(
            len(self._entries), counts.behind, counts.silent, counts.lag_max, tuple(rows)
        )

    def _survey(self, now_ms: int) -> None:
        """Forget who is to be forgotten and count the others, if that was not done lately."""
        if self._surveyed_ms is not None and now_ms - self._surveyed_ms < _SURVEY_MS:
            return
        self._surveyed_ms = now_ms
        behind = silent = lag_max = 0
        forgotten = []
        mean_ms = self._mean_ms(now_ms)
        for key, entry in self._entries.items():
            if now_ms <= entry.until_ms or not entry.silent(now_ms, mean_ms):
                if entry.behind:
                    behind += 1
                if entry.lag > lag_max:  # noqa: PLR1730 - half the time of max()
                    lag_max = entry.lag
            elif entry.forgotten(now_ms, mean_ms):
                forgotten.append(key)
            else:
                silent += 1
        for key in forgotten:
            self._entries.pop(key).gone = True
        self._counts = ListenerDigest(0, behind, silent, lag_max)
