"""The network of the embedded listener, with a cable to pull: this module alone cuts it off, whole.

It hears no datagram and gets no answer while ``out``, and says so to nobody; the listener itself,
its subscribers and its state go on. Needs no privileges, as a network namespace would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from listeners.catchup import CatchupAnswer, CatchupClient, CatchupError
from listeners.credentials import Credentials
from listeners.relay import Revoked
from listeners.source import Sockets, Source, drop_share
from trex_core.cluster import ClusterConfig
from trex_core.messages import VOTER_ID_MAX, SnapshotOffer


class Cable:
    """A ``listeners.source.Network``: real sockets that lose ``share`` (0..1) of the datagrams, and
    all there is while the cable is ``out``. ``alone``: no other listener answers it, ever."""

    def __init__(
        self, config: ClusterConfig, folder: Path, name: str, share: float, *, alone: bool
    ) -> None:
        self.out = False
        self.alone = alone
        kept = drop_share(share, name)
        held = Credentials(folder, config.cluster_id_bytes)

        def keep(data: bytes) -> bool:
            return kept(data) and not self.out

        self._sockets = Sockets(config, held, name, None, keep, helps=True)

    def stream(self, counters: Counter[str]) -> Source:
        """As ``Network``."""
        return self._sockets.stream(counters)

    def archives(self, counters: Counter[str], revoked: Revoked) -> Unanswered:
        """As ``Network``."""
        return Unanswered(self, self._sockets.archives(counters, revoked))

    async def help(self, revoked: Revoked) -> None:
        """As ``Network``."""
        await self._sockets.help(revoked)


class Unanswered:
    """Archives that are not heard while the cable is out, even if they were asked before."""

    def __init__(self, cable: Cable, client: CatchupClient) -> None:
        self._cable = cable
        self._client = client

    def _heard(self, helper: int) -> None:
        if self._cable.out or (self._cable.alone and helper > VOTER_ID_MAX):
            raise CatchupError(helper, "the cable is out")

    async def entries(self, helper: int, first: int) -> CatchupAnswer:
        """As ``listeners.source.Archives``."""
        self._heard(helper)
        answer = await self._client.entries(helper, first)
        self._heard(helper)
        return answer

    async def snapshot(self, offer: SnapshotOffer, voters: Sequence[int]) -> bytes:
        """As above."""
        data = await self._client.snapshot(offer, voters)
        self._heard(voters[0])
        return data

    async def aclose(self) -> None:
        """As above."""
        await self._client.aclose()
