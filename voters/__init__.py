"""The embeddable voter and the client of a cluster: what a program may use of this package.

``open_voter`` runs one voter inside an asyncio program, replicating any deterministic state
machine (``trex_core.machine.Machine``); ``format_voter`` makes its journal first, once.
"""

from voters.config import StartError, VoterFailedError
from voters.journal import JournalError
from voters.server import Voter, format_voter, open_voter

__all__ = [
    "JournalError",
    "StartError",
    "Voter",
    "VoterFailedError",
    "format_voter",
    "open_voter",
]
