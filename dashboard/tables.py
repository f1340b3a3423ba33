"""What the command line prints: this module alone knows Rich, JSON and the words of a status.

Data goes to stdout: a table for people, or with ``--json`` one array of objects for programs. Rich
is imported only where a table is drawn, so a command that prints a line starts fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from trex_core.cluster import ClusterConfig
from trex_core.messages import Status
from voters.driver import Unavailable

if TYPE_CHECKING:
    from rich.table import Table

Row: TypeAlias = Mapping[str, object]
BEHIND_SLOTS: Final = 1000
"""A voter that lacks more slots than this is called behind."""
PIPE_COLUMNS: Final = 1000
"""Width of a table where no terminal says its own: no line is wrapped."""


def show(rows: Sequence[Row], as_json: bool, empty: str = "nothing there") -> None:
    """Print rows: one JSON array of objects, or a table with the keys of the first as columns."""
    if as_json:
        show_json(list(rows))
    elif not rows:
        print(empty, file=sys.stderr)
    else:
        table = _table(list(rows[0]))
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        _print(table)


def show_json(value: object) -> None:
    """Print one JSON value on one line."""
    print(msgspec.json.encode(value, enc_hook=str).decode())


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case Mapping():
            return " ".join(f"{key}={inner}" for key, inner in value.items()) or "-"
        case list() | tuple():
            return ", ".join(str(inner) for inner in value) or "-"
        case _:
            return str(value)


def _table(columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.replace("_", " ")), overflow="fold")
    return table


def _print(renderable: object) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_COLUMNS
    console.print(renderable)


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


def status_table(rows: Sequence[Row], verdict: Verdict) -> object:
    """The status as something Rich can draw."""
    from rich.console import Group
    from rich.text import Text

    table = _table(list(rows[0]))
    for row in rows:
        style = {"leader": "bold green", "silent": "red"}.get(str(row["role"]), "")
        table.add_row(*(_cell(value) for value in row.values()), style=style)
    return Group(table, Text(verdict.words, style="green" if verdict.healthy else "bold red"))


def show_status(rows: Sequence[Row], verdict: Verdict) -> None:
    """Print the status once."""
    _print(status_table(rows, verdict))


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
