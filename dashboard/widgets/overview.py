"""The tab Overview: this module alone lays out the voters, what they are at and what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from textual.app import ComposeResult

from dashboard import advice
from dashboard.advice import LEVELS, SIGNS, Level
from dashboard.feed import Feed
from dashboard.view import View, VoterView, silent_after_ms
from dashboard.widgets.eventlog import EventLog
from dashboard.widgets.header import NOW_MS, whole_age
from dashboard.widgets.pane import Pane, Subject
from dashboard.widgets.rows import Cell, Column, RowTable
from dashboard.widgets.slots import SlotLane, Sparks
from dashboard.widgets.timeline import Timeline
from dashboard.words import age, count, micros, size

COLUMNS: Final = (
    Column("sign", "", 1),
    Column("voter", "id", 2, grows=1, right=True),
    Column("role", "role", 9),
    Column("promised", "promised", 9, grows=2),
    Column("accepted", "accepted", 10, rank=3, right=True),
    Column("fixed", "fixed", 10, right=True),
    Column("applied", "applied", 10, rank=2, right=True),
    Column("journal", "journal", 9, rank=4, right=True),
    Column("p50", "fsync p50", 9, rank=5, right=True),
    Column("p99", "fsync p99", 9, rank=1, right=True),
    Column("heard", "last heard", 10, grows=2, right=True),
    Column("version", "version", 8, rank=6, grows=4, right=True),
    Column("snapshot", "snapshot", 10, rank=7, right=True),
    Column("free", "disk free", 9, rank=8, right=True),
    Column("up", "up for", 7, rank=9, right=True),
)
"""Of the voters' table; the highest rank goes first where there is no room."""
ROLE_STYLES: Final = {"leader": "lead", "candidate": "stand", "polling": "poll"}
LOG_LINES_MIN: Final = 3
"""With less room for the log than this, the rest is told tersely."""
LOG_LINES_ROOMY: Final = 12
"""With more room for the log than this, the parts stand apart."""


def is_silent(view: View, voter: VoterView) -> bool:
    """Whether nothing was heard of ``voter`` for too long."""
    return voter.heard_ms is None or view.now_ms - voter.heard_ms > silent_after_ms(voter)


def voter_cells(view: View, voter: VoterView, level: Level) -> tuple[Cell, ...]:
    """The row of ``voter``, a cell for each of COLUMNS. What a silent one said is dimmed."""
    silent, digest = is_silent(view, voter), voter.digest
    tone = "dim" if silent else ""
    sign: Cell = (SIGNS[level], level)
    name: Cell = (str(voter.voter), tone)
    if voter.heard_ms is None or digest is None:
        blank: Cell = ("", tone)
        heard: Cell = ("never", "warn")
        said = {"sign": sign, "voter": name, "role": ("?", "dim"), "heard": heard}
        return tuple(said.get(column.name, blank) for column in COLUMNS)
    ago_ms = view.now_ms - voter.heard_ms
    heard_words = f"{whole_age(ago_ms)} ago" if silent or ago_ms >= NOW_MS else "now"
    role = "silent" if silent else digest.role
    behind = digest.fixed < view.tip_slot and not silent
    plain: tuple[tuple[str, str], ...] = (
        ("promised", str(digest.promised)),
        ("accepted", count(digest.last_accepted)),
        ("applied", count(digest.applied)),
        ("journal", size(digest.journal_bytes)),
        ("p50", micros(digest.fsync_p50_us or digest.fsync_us)),
        ("p99", micros(digest.fsync_p99_us)),
        ("version", digest.version),
        ("snapshot", count(digest.snapshot_slot) if digest.snapshot_slot else "-"),
        ("free", size(digest.free_bytes)),
        ("up", age(digest.uptime_s * 1000)),
    )
    cells: dict[str, Cell] = {name: (words, tone) for name, words in plain}
    cells["sign"], cells["voter"] = sign, name
    cells["role"] = (role, "warn" if silent else ROLE_STYLES.get(digest.role, ""))
    cells["fixed"] = (count(digest.fixed), tone or ("note" if behind else ""))
    cells["heard"] = (heard_words, "warn" if silent else "")
    if not digest.has_room:
        cells["free"] = (f"FULL {size(digest.free_bytes)}", "bad")
    return tuple(cells[column.name] for column in COLUMNS)


def voter_levels(view: View) -> Mapping[int, Level]:
    """How each voter is: the worst of what is found about it."""
    levels: dict[int, Level] = {each.voter: "ok" for each in view.voters}
    for finding in advice.findings(view):
        kind, _, name = finding.subject.partition(" ")
        if kind == "voter" and name.isdigit() and int(name) in levels:
            worst = max(levels[int(name)], finding.level, key=LEVELS.index)
            levels[int(name)] = worst
    return levels


class VotersTable(RowTable[int]):
    """A row per voter."""

    def action_move(self, by: int) -> None:
        """By so many rows; beyond the last the keys go to the next part."""
        at = self._cursor + by
        if at >= self.row_count:
            self.screen.focus_next()
        else:
            super().action_move(by)


class Overview(Pane):
    """Voters, ballots, slots, rates and events."""

    TITLE: ClassVar[str] = "Overview"
    HELP: ClassVar[str] = """\
**The voters.** One row each. *promised* is the highest ballot it will listen to: lower ones it
refuses. *accepted* is the highest slot it holds on its disk, *fixed* the highest it knows to be
decided for ever, *applied* how far its state is. *fsync* is how long its disk takes to make a vote
durable: commits wait for the quickest majority of these. *last heard* over a second and a half is
unusual: every voter speaks each 900 ms, the leader each 80.

**The ballot timeline.** A lane per voter, now at the right. `━ 0.17.3` leads under that ballot,
`▒` stands, `░` asks whether others hear a leader, `·` follows, `╳` was not heard. With the keys in
it (tab): ← → move, **p** and **n** go to the previous and next change, **[** and **]** show more or
less time, home and end the oldest and now. The line below says who, when and why.

**The slots.** The newest ones: `○` proposed, `◔ ◑ ◕` accepted by few, half, most voters, `●` fixed.
In a healthy cluster nearly all are fixed. ← → choose one.

**Rates.** Slots fixed a second, and how long from proposal to fixed (p99 drawn), by the second.

**Events.** The newest at the bottom. ↑ ↓ go through them, end follows again.
"""

    def compose(self) -> ComposeResult:
        """From the top: who, when, what, how fast, and what happened."""
        yield VotersTable(COLUMNS, id="voters")
        yield Timeline(id="timeline")
        yield SlotLane(id="slots")
        yield Sparks(id="sparks")
        yield EventLog(id="log")

    def on_mount(self) -> None:
        """The keys go to the voters first."""
        self._voters = 0
        self.query_one(VotersTable).focus()

    def on_resize(self) -> None:
        """What there is room for is laid out anew."""
        self._lay_out()

    def show(self, view: View, feed: Feed) -> None:
        """Draw ``view``. Cheap when nothing changed."""
        del feed
        if len(view.voters) != self._voters:
            self._voters = len(view.voters)
            self._lay_out()
        levels = voter_levels(view)
        by_id = {each.voter: each for each in view.voters}
        self.query_one(VotersTable).show(
            tuple(by_id), lambda voter: voter_cells(view, by_id[voter], levels[voter])
        )
        self.query_one(Timeline).show(view)
        self.query_one(SlotLane).show(view)
        self.query_one(Sparks).show(view)
        self.query_one(EventLog).show(view)

    def subject(self) -> Subject | None:
        """What is selected in the part that has the keys."""
        for part in (self.query_one(Timeline), self.query_one(SlotLane), self.query_one(EventLog)):
            if part.has_focus:
                return part.subject()
        voter = self.query_one(VotersTable).selected
        return None if voter is None else Subject("voter", str(voter))

    def _lay_out(self) -> None:
        voters, height = self._voters, self.size.height
        if not height:
            return
        table, timeline, rates = (
            self.query_one(VotersTable),
            self.query_one(Timeline),
            self.query_one(Sparks),
        )
        table.styles.height = voters + 1
        left = height - (voters + 1) - (voters + 2) - 2 - 2
        terse = left < LOG_LINES_MIN
        self.set_class(left >= LOG_LINES_ROOMY, "-roomy")
        timeline.terse = rates.terse = terse
        timeline.draw()
        rates.draw()
