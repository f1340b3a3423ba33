"""The embeddable voter and the client of a cluster: what a program may use of this package.

``open_voter`` runs one voter inside an asyncio program, replicating any deterministic state
machine (``trex_core.machine.Machine``); ``format_voter`` makes its journal first, once.
``connect`` is the client of the metadata service, ``open_driver`` the one of any other machine.

Rooms are imported when something of theirs is first used, so a client does not pay for a voter.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voters.client import BlockingClient, Client, Rows, connect, connect_blocking
    from voters.config import StartError, VoterFailedError, read_cluster
    from voters.driver import (
        Compacted,
        Driver,
        Failed,
        Fenced,
        NoQuorum,
        OutcomeUnknown,
        Rejected,
        TooLarge,
        TrexError,
        Unauthorized,
        Unavailable,
        open_driver,
    )
    from voters.journal import JournalError
    from voters.keeper import HeldLease
    from voters.server import Voter, format_voter, open_voter

__all__ = [
    "BlockingClient",
    "Client",
    "Compacted",
    "Driver",
    "Failed",
    "Fenced",
    "HeldLease",
    "JournalError",
    "NoQuorum",
    "OutcomeUnknown",
    "Rejected",
    "Rows",
    "StartError",
    "TooLarge",
    "TrexError",
    "Unauthorized",
    "Unavailable",
    "Voter",
    "VoterFailedError",
    "connect",
    "connect_blocking",
    "format_voter",
    "open_driver",
    "open_voter",
    "read_cluster",
]

_ROOMS = ("config", "driver", "keeper", "client", "journal", "server")


def __getattr__(name: str) -> object:
    if name in __all__:
        for room in _ROOMS:
            found = getattr(import_module(f"voters.{room}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
