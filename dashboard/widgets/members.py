"""The tab Members: this module alone shows who is a member, who owns what and what moves.

The ring is worked out in a thread, from the immutable state, so that a hundred thousand tokens
never hold up the screen; only what a change touches is worked out again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar, Final

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Input

from dashboard.feed import Feed
from dashboard.placement import (
    NOWHERE,
    Passing,
    Placement,
    current,
    explain_member,
    place,
    ranges_of,
    share,
    token_text,
)
from dashboard.view import View
from dashboard.widgets.ask import Ask
from dashboard.widgets.lines import Line, Lines, Piece, cut, width_of, wrap
from dashboard.widgets.pane import Pane, Subject
from dashboard.widgets.ring import RingPicture, legend
from dashboard.widgets.rows import GUTTER, Cell, Column, RowTable, line_of
from dashboard.words import count, plural
from listeners.workers import Workers
from trex_core.metadata.ring import key_token, member_tokens
from trex_core.metadata.state import EMPTY, MetadataState

PAUSE_SHARE: Final = 20
"""After working out a placement, so many times as long passes before the next."""
PAUSE_S_MAX: Final = 5.0
"""But never longer, in seconds."""
FLOWS_SHOWN: Final = 3
"""Largest flows told of each move."""
RANGES_SHOWN: Final = 3
LEGEND_LINES: Final = 3
DETAIL_LINES: Final = 7
ROOMY_COLUMNS: Final = 110
"""From so many columns on the picture takes nearly half of them."""

SIGNS: Final = {"up": "●", "joining": "◌", "draining": "◐", "down": "✗"}
STYLES_OF_STATES: Final = {"up": "ok", "joining": "note", "draining": "warn", "down": "bad"}
STATES: Final = ("down", "draining", "joining", "up")
"""The one to look at first is first."""

COLUMNS: Final = (
    Column("letter", "", 1),
    Column("state", "state", 10),
    Column("id", "id", 10, grows=14),
    Column("zone", "zone", 6, rank=2, grows=6),
    Column("share", "share", 7, right=True),
    Column("ranges", "ranges", 6, rank=4, right=True),
    Column("held", "copies", 7, rank=5, right=True),
    Column("weight", "weight", 6, rank=6, right=True),
    Column("lease", "lease", 7, rank=7, right=True),
    Column("address", "address", 15, rank=3, grows=12),
    Column("since", "since slot", 10, rank=8, right=True),
)
ORDERS: Final = ("share", "id", "state")
"""What ``o`` goes through."""


def ordered(placement: Placement, order: str, prefix: str, *, reverse: bool) -> Sequence[str]:
    """The ids of the members that begin with ``prefix``, by ``order``, one of ORDERS: the largest
    share first, ids from A to Z, what is not up first; ``reverse`` turns it round."""
    members = placement.state.members
    ids: Sequence[str] = placement.by_share
    if order != "share":
        ids = [name for chunk in placement.state.ids.chunks for name in chunk]
    if prefix:
        ids = [name for name in ids if name.startswith(prefix)]
    if order == "state":
        ranks = {state: at for at, state in enumerate(STATES)}
        ids = sorted(ids, key=lambda name: ranks.get(members[name].state, len(ranks)))
    return ids[::-1] if reverse else ids


class MembersPane(Pane):
    """Members, the ring that they make, and what moves on it."""

    TITLE = "Members"
    HELP = """\
A **member** is a node that the cluster's metadata knows: an id, perhaps an address and a zone, a
weight, a state. The **ring** says which member keeps which data. Every listener derives the same
ring from the same members, so nobody has to be asked.

## How the ring works
A key is hashed to a **token**, a number from 0 to 2^64 - 1. Each member has some tokens too, more
with a higher weight. A key belongs to the first member's token at or above its own, and wraps
round at the end: that member is the **owner**. Going on upward, members of other zones follow
until there are `ring/replication_factor` **replicas**, the copies.

So a member that comes or goes only moves the ranges next to its tokens.

## The picture
Tokens run clockwise from the top. The letter on the band is the owner (the first column of the
table), the digit inside it the owner's zone; `●` marks what the selected member owns and `○` what
it keeps a copy of. Where there are more ranges than can be told apart, the band shows **shares**
instead: of each member, of each zone, or of the largest owners.

## States
| State | |
|---|---|
| `● up` | owns ranges |
| `✗ down` | does not work, **but still owns its ranges**: a short outage moves nothing |
| `◌ joining` | owns nothing yet; it takes its ranges when it says that it is up |
| `◐ draining` | owns nothing any more; it hands over what it had, then leaves |

## Moves in progress
What every draining member has to hand over, and what every joining member will take once it is
up: from whom, to whom, how much of the ring (a part that two members must copy counts twice; to
`nobody`: there are fewer copies than before). *Last change* is the last time that ranges passed
from members to others while you looked. TRex says who must copy what; copying is the members' task.

## The table
**share** of the ring owned, in so many **ranges**; **copies** counts all it keeps, so it adds up to
the replication factor. **lease**: the member leaves by itself if that lease expires.

## Keys
`o` sort by share, id or state, `r` reverse, `/` only ids that begin so, `k` who owns a key,
`p` with or without the picture, `escape` back, `enter` or `e` explain the one selected. A click on
the band selects its owner.
"""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "sort", "Order", tooltip="By share, id or state"),
        Binding("r", "reverse", "Reverse", show=False, tooltip="Turn the order round"),
        Binding("slash", "filter", "Filter", key_display="/", tooltip="Only ids that begin so"),
        Binding("k", "key", "Key", tooltip="Who owns a key"),
        Binding("p", "picture", "Picture", tooltip="With or without the picture of the ring"),
        Binding("escape", "back", "Back", show=False, tooltip="All ids again, no key"),
    ]

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._table: Final[RowTable[str]] = RowTable(COLUMNS)
        self._picture: Final = RingPicture()
        self._legend: Final = Lines(classes="legend")
        self._moves: Final = Lines(classes="moves")
        self._summary: Final = Lines(classes="summary")
        self._detail: Final = Lines(classes="detail")
        self._filter: Final = Ask("ids that begin with…")
        self._key: Final = Ask("a key: who owns it?")
        self._left: Final = Vertical(
            self._picture, self._legend, self._moves, classes="members-left"
        )
        self._view = View()
        self._state: MetadataState = EMPTY
        self._placement: Placement = NOWHERE
        self._working = False
        self._thread: Final = Workers("trex-placement")
        self._next_s = 0.0
        """Monotonic: not before is another placement worked out."""
        self._order = "share"
        self._reverse = False
        self._rows: Sequence[str] = ()
        self._ordered_of: Placement | None = None
        self._ordered_as: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """The picture and what moves; the table and the one selected."""
        with Horizontal():
            yield self._left
            with Vertical(classes="members-right"):
                yield self._summary
                yield self._filter
                yield self._table
                yield self._key
                yield self._detail

    # --- what is shown

    def on_unmount(self) -> None:
        """Its thread is not needed any more."""
        self._thread.close()

    def show(self, view: View, feed: Feed) -> None:
        """Draw the members and the ring of the newest state, as soon as that is worked out."""
        self._view = view
        if feed.listener.state is not self._state:
            self._state = feed.listener.state
            self._tell_summary()
        self._work()

    @property
    def placement(self) -> Placement:
        """The newest that was worked out; see :func:`dashboard.placement.current`."""
        return self._placement

    def _work(self) -> None:
        """Work out the placement of the newest state in a thread, if it is another one."""
        if self._working or current(self._placement, self._state):
            return
        if time.monotonic() < self._next_s:
            return
        self._working = True
        self.run_worker(self._place(self._state), group="placement", exit_on_error=True)

    async def _place(self, state: MetadataState) -> None:
        before = None if self._placement is NOWHERE else self._placement
        began_s = time.monotonic()
        try:
            self._placement = await self._thread.run(place, state, before, abandon_on_cancel=True)
        finally:
            took_s = time.monotonic() - began_s
            self._next_s = began_s + took_s + min(PAUSE_S_MAX, PAUSE_SHARE * took_s)
            self._working = False
        self._picture.letters.give(self._placement.holdings)
        self._draw()

    def _draw(self) -> None:
        if not self.is_mounted:
            return
        self._draw_picture()
        self._fill_table()
        self._tell_summary()
        self._tell_moves()
        self._tell_detail()

    def _fill_table(self) -> None:
        wanted = (self._order, self._reverse, self._filter.value)
        if self._ordered_of is not self._placement or wanted != self._ordered_as:
            self._ordered_of, self._ordered_as = self._placement, wanted
            self._rows = ordered(
                self._placement, self._order, self._filter.value, reverse=self._reverse
            )
        descending = (self._order == "share") != self._reverse
        self._table.show(self._rows, self._cells, order=(self._order, descending))

    def _cells(self, name: str) -> tuple[Cell, ...]:
        member = self._placement.state.members.get(name)
        if member is None:
            return tuple(("", "") for _ in COLUMNS)
        held = self._placement.of(name)
        style = STYLES_OF_STATES.get(member.state, "")
        return (
            self._picture.mark(name) if held.owned else ("", ""),
            (f"{SIGNS.get(member.state, '?')} {member.state}", style),
            (name, ""),
            (member.zone or "-", ""),
            (share(held.owned), ""),
            (count(held.ranges), ""),
            (share(held.held), ""),
            (str(member.weight), ""),
            (str(member.lease) if member.lease else "-", ""),
            (member.address or "-", ""),
            (count(member.joined_slot), ""),
        )

    def _draw_picture(self) -> None:
        if not self._left.display:
            return
        self._picture.show(self._placement, self._table.selected)
        size = self._picture.size
        columns = max(10, self._legend.size.width or self._left.size.width)
        self._legend.put(
            legend(
                self._placement,
                self._picture.letters,
                size.width,
                size.height,
                LEGEND_LINES,
                columns,
            )
        )

    def _tell_summary(self) -> None:
        placement = self._placement
        known = plural(len(self._state.members), "member")
        states = [
            (f"{SIGNS[state]} {count(placement.states[state])} {state}", STYLES_OF_STATES[state])
            for state in STATES
            if placement.states.get(state)
        ]
        if width_of(((known, ""), *states)) + 2 * len(states) > self._right_width:
            states = [(words.rpartition(" ")[0], style) for words, style in states]
        line: list[Piece] = [(known, "strong")]
        for piece in states:
            line += [("  ", ""), piece]
        self._summary.put((tuple(line), ((cut(self._ring_words(), self._right_width), "dim"),)))

    def _ring_words(self) -> str:
        placement = self._placement
        if not current(placement, self._state):
            if placement is NOWHERE:
                return "working out the ring…"
            return f"shown as of slot {count(placement.state.slot)}; working out the newest…"
        if self._filter.value:
            return self._filter.told(len(self._rows), "id begins", "ids begin")
        ring = placement.ring
        zones = plural(sum(1 for zone in placement.zones if zone), "zone")
        copies = plural(ring.settings.replication_factor, "copy", "copies")
        spread = "over zones" if ring.settings.spread == "zone" else "in any zone"
        return f"{plural(ring.tokens, 'token')}, {zones}, {copies}, {spread}"

    @property
    def _right_width(self) -> int:
        return max(20, self._detail.size.width or self.size.width // 2)

    # --- what moves

    def _tell_moves(self) -> None:
        if not self._left.display:
            return
        width = max(20, self._moves.size.width or self._left.size.width)
        placement = self._placement
        lines: list[Line] = []
        for passing, word in ((placement.leaving, "draining"), (placement.joining, "joining")):
            if passing.ranges:
                lines += _flow_lines(passing, f"{word}: {_to_copy(passing)}", width)
        if not lines:
            lines.append((("moves in progress: none", "dim"),))
        newest = placement.newest
        if newest is not None:
            slots = f"slot {count(newest.last)}"
            if newest.first != newest.last:
                slots = f"slots {count(newest.first)}-{count(newest.last)}"
            who = ", ".join(line_of(name) for name in newest.who)
            more = newest.members - len(newest.who)
            who += f" and {count(more)} more" if more else ""
            head = f"last change, {slots}: {who}; {_to_copy(newest.passing)}"
            lines += [((text, ""),) for text in wrap(head, width, 2)]
            lines += _flow_lines(newest.passing, "", width)
        self._moves.put(lines[: self._moves_max()])

    def _moves_max(self) -> int:
        return max(2, self.size.height // 3)

    # --- the one selected, or a key

    def _tell_detail(self) -> None:
        width = self._right_width
        lines = self._key_lines(width) if self._key.display else self._member_lines(width)
        self._detail.put(tuple(((text, style),) for text, style in lines[:DETAIL_LINES]))

    def _key_lines(self, width: int) -> list[tuple[str, str]]:
        key = self._key.value
        if not key:
            return [("type a key: who owns it and who keeps copies", "dim")]
        replicas = self._placement.ring.replicas(key)
        lines = [(f"token {token_text(key_token(key))}", "")]
        if not replicas:
            return [*lines, ("nobody: the ring is empty", "warn")]
        for at, name in enumerate(replicas):
            member = self._placement.state.members.get(name)
            zone = f" in {line_of(member.zone)}" if member and member.zone else ""
            state = f" {SIGNS.get(member.state, '?')} {member.state}" if member else " left"
            letter, _ = self._picture.mark(name)
            words = f"{'owner  ' if at == 0 else 'replica'} {letter} {line_of(name)}{zone}{state}"
            lines.append((cut(words, width), "strong" if at == 0 else ""))
        return lines

    def _member_lines(self, width: int) -> list[tuple[str, str]]:
        name = self._table.selected
        placement = self._placement
        member = None if name is None else placement.state.members.get(name)
        if member is None:
            if self._filter.value:
                return [("no id begins so: escape shows all again", "dim")]
            return [] if self._state.members else [("no member has joined yet", "dim")]
        held = placement.of(member.id)
        tokens = len(member_tokens(member, placement.ring.settings.tokens_per_weight))
        how = "given" if member.tokens is not None else "derived"
        head = f"{GUTTER} {line_of(member.id)}  {SIGNS.get(member.state, '?')} {member.state}"
        zone, address = line_of(member.zone or "no zone"), line_of(member.address or "no address")
        lease = f"lease {member.lease}" if member.lease else "no lease"
        words = (
            f"owns {share(held.owned)} in {plural(held.ranges, 'range')}, keeps "
            f"{share(held.held)}; {plural(tokens, 'token')} {how}, "
            f"weight {member.weight}, {lease}; {zone}, {address}; "
            f"since slot {count(member.joined_slot)}, changed in "
            f"{count(member.updated_slot)}"
        )
        lines = [(cut(head, width), "strong"), *((text, "") for text in wrap(words, width, 4))]
        rows = ranges_of(member, placement.ring)
        if rows:
            told = ", ".join(
                f"{token_text(row.start)[:6]}…-{token_text(row.end)[:6]}…"
                for row in rows[:RANGES_SHOWN]
            )
            lines.append((cut(f"first ranges {told}", width), "dim"))
        if member.attributes:
            told = ", ".join(f"{line_of(a)}={line_of(b)}" for a, b in member.attributes.items())
            lines.append((cut(told, width), "dim"))
        moved = [line for line in self._view.log if line.subject == f"member {member.id}"]
        if moved:
            lines.append((cut(f"last: {line_of(moved[-1].words)}", width), "dim"))
        return lines

    # --- what is selected

    def subject(self) -> Subject | None:
        """The member under the cursor."""
        name = self._table.selected
        return None if name is None else Subject("member", name)

    def explain(self, subject: Subject, view: View, feed: Feed) -> str | None:  # noqa: ARG002
        """A member; from the state, not from the view."""
        if subject.kind != "member":
            return None
        return explain_member(feed.listener.state, self._placement.ring, subject.name)

    @on(RowTable.Moved)
    def _moved(self) -> None:
        self._draw_picture()
        self._tell_detail()

    @on(RowTable.HeaderClicked)
    def _header_clicked(self, event: RowTable.HeaderClicked) -> None:
        if event.name == self._order:
            self._reverse = not self._reverse
        elif event.name in ORDERS:
            self._order, self._reverse = event.name, False
        self._draw()

    @on(RingPicture.Picked)
    def _picked(self, event: RingPicture.Picked) -> None:
        self._table.select(event.member)

    def on_resize(self) -> None:
        """Other words fit now."""
        self.set_class(self.size.width >= ROOMY_COLUMNS, "-roomy")
        self.call_after_refresh(self._draw)

    def action_sort(self) -> None:
        """Sort by the next of ORDERS."""
        self._order = ORDERS[(ORDERS.index(self._order) + 1) % len(ORDERS)]
        self._reverse = False
        self._draw()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self._reverse = not self._reverse
        self._draw()

    def action_filter(self) -> None:
        """Ask for the beginning of ids."""
        self._filter.ask()

    def action_key(self) -> None:
        """Ask for a key."""
        self._key.ask()
        self._tell_detail()

    def action_picture(self) -> None:
        """With or without the picture."""
        self._left.display = not self._left.display
        self.call_after_refresh(self._draw)

    def action_back(self) -> None:
        """Leave what is asked: first the key, then the filter."""
        if self._key.display:
            self._key.forget()
        else:
            self._filter.forget()
        self._table.focus()
        self._draw()

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        if event.input is self._key:
            self._tell_detail()
        else:
            self._draw()

    @on(Input.Submitted)
    def _typed_all(self, event: Input.Submitted) -> None:
        event.stop()
        if event.input is self._filter:
            self._filter.settle()
        self._table.focus()


def _to_copy(passing: Passing) -> str:
    return f"{share(passing.tokens)} to copy" if passing.tokens else "nothing to copy"


def _flow_lines(passing: Passing, head: str, width: int) -> Sequence[Line]:
    lines: list[Line] = []
    if head:
        more = f", {plural(passing.ranges, 'range')}"
        lines.append(((cut(head + more, width), "strong"),))
    for flow in passing.flows[:FLOWS_SHOWN]:
        giver = line_of(flow.giver) if flow.giver else "nobody"
        taker = line_of(flow.taker) if flow.taker else "nobody"
        lines.append(((cut(f"  {giver} → {taker} {share(flow.tokens)}", width), ""),))
    if passing.pairs > FLOWS_SHOWN:
        lines.append(((f"  and {plural(passing.pairs - FLOWS_SHOWN, 'pair')} more", "dim"),))
    return lines
