"""What an operator may do from the dashboard: this module alone asks voters for anything there.

Everything else the dashboard shows it overhears; these are its only questions, asked on the
operator's word.  Each ends in words, or raises what ``voters.driver`` raises.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from trex_core.cluster import ClusterConfig
from voters.client import connect

HAND_OVER_S: Final = 10.0
"""So long a handover may take, in seconds."""
SNAPSHOT_S: Final = 30.0
"""So long one voter may take for a snapshot, in seconds."""


class HandOver(msgspec.Struct, frozen=True):
    """Have leadership handed to voter ``to``; 0: the most up to date."""

    to: int = 0


class TakeSnapshot(msgspec.Struct, frozen=True):
    """Have each of ``voters`` cut a snapshot now, one after the other."""

    voters: tuple[int, ...]


Action: TypeAlias = HandOver | TakeSnapshot
Act: TypeAlias = Callable[[ClusterConfig, Action], Awaitable[str]]
"""Performs an action and says how it ended; raises TrexError, ConfigError or OSError."""


def title(action: Action) -> str:
    """What it is, in few words."""
    match action:
        case HandOver(to=0):
            return "handing over leadership"
        case HandOver(to=to):
            return f"handing leadership to voter {to}"
        case TakeSnapshot(voters=(voter,)):
            return f"a snapshot of voter {voter}"
        case TakeSnapshot():
            return "snapshots of all voters"


async def perform(credentials: Path, cluster: ClusterConfig, action: Action) -> str:
    """Do it, over the voters' client ports, with the admin's ``credentials``. Raises TrexError,
    OSError."""
    match action:
        case HandOver(to=to):
            async with connect(cluster, credentials, deadline_s=HAND_OVER_S) as client:
                return f"leadership handed over: voter {await client.hand_over(to)} leads"
        case TakeSnapshot(voters=voters):
            taken = []
            async with connect(cluster, credentials, deadline_s=SNAPSHOT_S) as client:
                for voter in voters:
                    slot = await client.driver.snapshot_now(voter)
                    taken.append(f"voter {voter} at slot {slot:,}")
            return f"snapshot taken: {', '.join(taken)}"
