"""What the command line prints: this module alone knows Rich, JSON and the words of a status.

Data goes to stdout: a table for people, or with ``--json`` one array of objects for programs. Rich
is imported only where a table is drawn, so a command that prints a line starts fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from trex_core.cluster import ClusterConfig
from trex_core.messages import Status
from voters.driver import Unavailable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

Row: TypeAlias = Mapping[str, object]
CERTIFICATE_WARN_S: Final = 30 * 86400
"""A certificate that ends within so many seconds is spoken of."""
BEHIND_SLOTS: Final = 1000
"""A voter that lacks more slots than this is called behind."""
PIPE_COLUMNS: Final = 1000
"""Width of a table where no terminal says its own: no line is wrapped."""
UNBROKEN_COLUMNS: Final = 20
"""A value up to so long is never broken to make a table fit: that of a 64-bit number."""
GAP_COLUMNS: Final = 2
"""Between two columns of a table."""
_EMPTY: Final[tuple[object, ...]] = (None, "", {}, [], ())
STATUS_SPARED: Final = ("address", "journal", "applied", "accepted")
"""Columns of the status that go first, in this order, where the terminal is too narrow."""


def show(
    rows: Sequence[Row], as_json: bool, empty: str = "nothing there", *, verbatim: bool = False
) -> None:
    """Print rows: one JSON array of objects, or a table with the keys of the first as columns,
    spelled as they are if ``verbatim``. What is too wide for a table is a list of names and values.
    """
    if as_json:
        show_json(list(rows))
        return
    if not rows:
        print(empty, file=sys.stderr)
        return
    console = _console()
    shown = list(rows[0])
    if not verbatim and not _fits(shown, rows, console.width):
        told = [name for name in shown if any(row[name] not in _EMPTY for row in rows)]
        shown = told or shown
    if _fits(shown, rows, console.width):
        console.print(_table(shown, rows, console.width, verbatim=verbatim))
    else:
        console.print(_records(rows, verbatim=verbatim), end="", soft_wrap=True)


def show_json(value: object) -> None:
    """Print one JSON value on one line."""
    print(msgspec.json.encode(value, enc_hook=str).decode(), flush=True)


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case Mapping():
            return " ".join(f"{key}={inner}" for key, inner in value.items()) or "-"
        case list() | tuple():
            return ", ".join(str(inner) for inner in value) or "-"
        case bool():
            return "yes" if value else "no"
        case bytes():
            return value.hex()
        case _:
            return str(value)


def visible(text: str) -> str:
    """``text`` with what would steer a terminal spelled out; lines remain lines."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text
    )


def _heading(column: str, *, verbatim: bool = False) -> str:
    return visible(column) if verbatim else column.replace("_", " ")


def _widths(shown: Sequence[str], rows: Sequence[Row], *, verbatim: bool) -> list[tuple[int, int]]:
    """For each column the width it needs at least, and the one at which nothing is broken. Words
    of a heading and short values are never broken, long ones in three at most."""
    from rich.cells import cell_len

    widths = []
    for column in shown:
        heading = _heading(column, verbatim=verbatim)
        word = max(map(cell_len, heading.split()), default=0)
        lines = (line for row in rows for line in visible(_cell(row[column])).split("\n"))
        longest = max(map(cell_len, lines), default=0)
        least = max(word, min(longest, max(UNBROKEN_COLUMNS, -(-longest // 3))))
        widths.append((least, max(longest, cell_len(heading))))
    return widths


def _fits(
    shown: Sequence[str], rows: Sequence[Row], columns_max: int, *, verbatim: bool = False
) -> bool:
    least = sum(least for least, _ in _widths(shown, rows, verbatim=verbatim))
    return least + GAP_COLUMNS * (len(shown) - 1) <= columns_max


def _table(
    shown: Sequence[str],
    rows: Sequence[Row],
    columns_max: int,
    *,
    verbatim: bool = False,
    styles: Sequence[str] = (),
) -> Table:
    """The columns ``shown`` of ``rows`` as a table at most so wide; numbers stand to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    widths = _widths(shown, rows, verbatim=verbatim)
    spare = columns_max - sum(least for least, _ in widths) - GAP_COLUMNS * (len(shown) - 1)
    for column, (least, whole) in zip(shown, widths, strict=True):
        more = max(0, min(spare, whole - least))
        spare -= more
        table.add_column(
            Text(_heading(column, verbatim=verbatim)),
            overflow="fold",
            justify="right" if all(_is_number(row[column]) for row in rows) else "left",
            width=least + more,
        )
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*(Text(visible(_cell(row[column]))) for column in shown), style=style)
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _records(rows: Sequence[Row], *, verbatim: bool) -> Text:
    """Rows one below the other, a line for each value."""
    from rich.text import Text

    widest = max(len(_heading(name, verbatim=verbatim)) for name in rows[0])
    text = Text()
    for number, row in enumerate(rows, 1):
        text.append(f"── {number} ──\n", "bold")
        for name, value in row.items():
            text.append(f"{_heading(name, verbatim=verbatim):<{widest}}  ", "dim")
            text.append(visible(_cell(value)).replace("\n", "\n" + " " * (widest + 2)) + "\n")
    return text


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_COLUMNS
    return console


# --- the state of the cluster -----------------------------------------------------------------


class Verdict(msgspec.Struct, frozen=True):
    """What the statuses mean, in words, and whether writes can go on."""

    words: str
    healthy: bool
    leader: int
    may_stop: frozenset[int]
    """Voters without any of which a majority is still up to date."""


def judge(config: ClusterConfig, found: Mapping[int, Status | Unavailable]) -> Verdict:
    """Put the statuses of all voters in words: who leads, who lags, which one may be stopped."""
    known = {voter: each for voter, each in found.items() if isinstance(each, Status)}
    silent = [voter for voter in found if voter not in known]
    majority = len(config.voters) // 2 + 1
    leaders = [each for each in known.values() if each.role == "leader"]
    missing = f" Not answering: {_listed(silent)}." if silent else ""
    missing += _expiring(known)
    if not leaders:
        if len(known) < majority:
            why = f"{len(known)} of {len(found)} voters answer and {majority} are needed"
        else:
            why = "an election is under way, or its voters do not hear each other"
        return Verdict(f"No leader: {why}. Writes fail.{missing}", False, 0, frozenset())
    leader = max(leaders, key=lambda each: each.ballot)
    fresh = {voter for voter, each in known.items() if each.fixed + BEHIND_SLOTS >= leader.fixed}
    behind = [voter for voter in known if voter not in fresh]
    may_stop = frozenset(voter for voter in found if len(fresh - {voter}) >= majority)
    words = f"Voter {leader.voter} leads since ballot {leader.ballot}, fixed up to {leader.fixed}."
    if behind:
        lacks = ", ".join(f"{voter} by {leader.fixed - known[voter].fixed}" for voter in behind)
        words += f" Behind: {lacks} slots."
    words += missing
    if len(fresh) < majority:
        words += " Fewer than a majority are up to date: stop none."
    elif not may_stop & fresh:
        words += " Stop none of those that answer: the majority would be lost."
    else:
        words += " Any one voter may be stopped; the leader hands over first."
    return Verdict(words, len(fresh) >= majority, leader.voter, may_stop)


def _expiring(known: Mapping[int, Status]) -> str:
    """Whose certificates end soon, by the clock of each voter itself."""
    words = ""
    for voter, each in known.items():
        left_s = each.certificate_until_s - each.time_ms // 1000
        if each.certificate_until_s and left_s < CERTIFICATE_WARN_S:
            when = "has expired" if left_s <= 0 else f"expires in {left_s // 86400} days"
            words += f" The certificate of voter {voter} {when}: `trex cert issue` makes a new one."
    return words


def _listed(voters: Sequence[int]) -> str:
    return ", ".join(map(str, voters))


def status_rows(
    config: ClusterConfig, found: Mapping[int, Status | Unavailable], verdict: Verdict
) -> list[dict[str, object]]:
    """One row for each voter, as shown in the table."""
    heard = _heard(found, verdict.leader)
    rows: list[dict[str, object]] = []
    for voter, each in found.items():
        entry = config.voter(voter)
        row: dict[str, object] = {"voter": voter, "address": f"{entry.host}:{entry.client_port}"}
        if isinstance(each, Status):
            row |= {
                "role": each.role,
                "promised": str(each.promised),
                "accepted": each.last_accepted,
                "fixed": each.fixed,
                "applied": each.applied,
                "journal": _size(each.journal_bytes),
                "fsync p50/p99": f"{each.fsync_p50_us}/{each.fsync_p99_us} µs",
            }
        else:
            row |= {"role": "silent"} | dict.fromkeys(
                ("promised", "accepted", "fixed", "applied", "journal", "fsync p50/p99")
            )
        age = "now" if voter == verdict.leader else heard.get(voter)
        row |= {"last heard": age, "may stop": "yes" if voter in verdict.may_stop else "no"}
        rows.append(row)
    return rows


def status_json(found: Mapping[int, Status | Unavailable], verdict: Verdict) -> list[object]:
    """One object for each voter with all it says; ``error`` for one that does not answer."""
    objects: list[object] = []
    for voter, each in found.items():
        common = {"leads": voter == verdict.leader, "may_stop": voter in verdict.may_stop}
        if isinstance(each, Status):
            fields = msgspec.structs.asdict(each)
            del fields["id"]
            fields |= {
                "chain": each.chain.hex(),
                "incarnation": f"{each.incarnation:016x}",
                "ballot": str(each.ballot),
                "promised": str(each.promised),
                "peers": [msgspec.structs.asdict(peer) for peer in each.peers],
            }
            objects.append(fields | common)
        else:
            objects.append({"voter": voter, "role": "silent", "error": str(each)} | common)
    return objects


def status_table(rows: Sequence[Row], verdict: Verdict, columns_max: int) -> RenderableType:
    """The status as something Rich can draw, in ``columns_max`` columns of a terminal."""
    from rich.console import Group
    from rich.text import Text

    shown = list(rows[0])
    for spared in STATUS_SPARED:
        if _fits(shown, rows, columns_max):
            break
        shown.remove(spared)
    styles = [{"leader": "bold green", "silent": "red"}.get(str(row["role"]), "") for row in rows]
    table = _table(shown, rows, columns_max, styles=styles)
    words = Text(verdict.words, style="green" if verdict.healthy else "bold red")
    return Group(table, Text(), words)


def show_status(rows: Sequence[Row], verdict: Verdict) -> None:
    """Print the status once."""
    console = _console()
    console.print(status_table(rows, verdict, console.width))


def show_lines(lines: Callable[[int], Iterable[Text]]) -> None:
    """Print the lines that ``lines`` makes for so many columns."""
    console = _console()
    for line in lines(console.width):
        console.print(line, soft_wrap=True)


def _heard(found: Mapping[int, Status | Unavailable], leader: int) -> dict[int, str]:
    """When each voter was heard last by the leader, or without one, by any other."""
    ages: dict[int, int] = {}
    for voter, each in found.items():
        if isinstance(each, Status) and leader in (0, voter):
            for peer in each.peers:
                if peer.heard_ms >= 0:
                    ages[peer.voter] = min(ages.get(peer.voter, peer.heard_ms), peer.heard_ms)
    return {voter: _age(age_ms) for voter, age_ms in ages.items()}


def _age(age_ms: int) -> str:
    return f"{age_ms} ms" if age_ms < 1000 else f"{age_ms / 1000:.1f} s"


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count //= 1024
    return f"{count} GiB"
