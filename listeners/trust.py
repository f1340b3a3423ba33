"""What a listener believes: this module alone asks a voter's signature for what others say.

Everything that reaches the listener's state passed here, whichever way it came: the stream and its
repairs (``trex_core.proof`` finds what signed tips prove of it), catch-up, snapshots.  So it does
not matter who says something: a voter, another listener, or somebody who stole the stream key.

It also keeps what was delivered lately, on a ``shelf``, to tell it again to other listeners.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from typing import Final

from listeners.credentials import Credentials
from trex_core.cluster import ClusterConfig
from trex_core.messages import (
    CHAIN_BYTES,
    NO_BALLOT,
    Ballot,
    CatchupEntries,
    SignedTip,
    SnapshotOffer,
)
from trex_core.proof import Proof
from trex_core.seal import SIGNATURE_BYTES, Verifier
from trex_core.shelf import Shelf
from trex_core.state import FixedRun, chain_run

FAILURES_PER_S: Final = 200
"""Most signatures of datagrams found wrong in a second, and at once."""
FORGED_FREE: Final = 100
"""So many forgeries of late cost nothing genuine. When more came, each is looked at with the chance
of FORGED_FREE in as many as came: what is genuine has the same chance as each forgery, whenever it
comes. Were the chance what is left of FAILURES_PER_S, a burst just before a heartbeat would leave
none for that."""
LATE_S: Final = 0.55
"""After this time one in e counts of what came. So of a flood FORGED_FREE / LATE_S are looked at in
a second: a little less than FAILURES_PER_S, which is hardly ever used up then."""
SHELF_SLOTS_MAX: Final = 8192
"""Most slots kept to help other listeners with."""
SHELF_BYTES_MAX: Final = 8 << 20
"""The same in bytes of values."""


class Trust:
    """The belief of one listener in the voters whose public keys it holds. ``counters`` counts what
    was not believed as ``dropped_<reason>``."""

    def __init__(
        self, cluster: ClusterConfig, credentials: Credentials, counters: Counter[str]
    ) -> None:
        self._verifier = Verifier(credentials.keys.public, cluster.cluster_id_bytes)
        self._counters = counters
        self._failures_left = float(FAILURES_PER_S)
        self._forged = 0.0  # of late, and passed over
        self._forged_s = 0.0
        self.proof: Final = Proof(self._verify, self._count)
        self.shelf: Final = Shelf(
            self._count,
            cluster.stream.repair_bytes_per_s_max,
            slots_max=SHELF_SLOTS_MAX,
            bytes_max=SHELF_BYTES_MAX,
        )

    def _count(self, name: str) -> None:
        self._counters[name] += 1

    # --- datagrams, of which forgeries may come in any number ---------------------------------

    def may_verify(self) -> bool:
        """Whether a datagram's signature may be looked at: forgeries cost only so much a second."""
        if not self._forged:
            return True
        now_s = time.monotonic()
        passed_s, self._forged_s = now_s - self._forged_s, now_s
        earned = passed_s * FAILURES_PER_S
        self._failures_left = min(self._failures_left + earned, float(FAILURES_PER_S))
        self._forged *= math.exp(-passed_s / LATE_S)
        if self._forged < 1 and self._failures_left >= FAILURES_PER_S:
            self._forged = 0.0  # until the next one no clock is asked
        draw = random.random()  # noqa: S311 - gives each a chance, and hides nothing
        if self._failures_left >= 1 and draw * self._forged < FORGED_FREE:
            return True
        self._forged += 1
        return False

    def spend(self) -> None:
        """A look was taken in vain."""
        if not self._forged:
            self._forged_s = time.monotonic()
        self._forged += 1
        self._failures_left -= 1

    def _verify(
        self, voter: int, ballot: Ballot, slot: int, chain: bytes, signature: bytes
    ) -> bool:
        good = self._verifier.tip(voter, ballot, slot, chain, signature)
        if not good:
            self.spend()
        return good

    def words(self, voter: int, said: bytes, signature: bytes) -> bool:
        """Did ``voter`` say this of itself?"""
        good = len(signature) == SIGNATURE_BYTES and self._verifier.words(voter, said, signature)
        if not good:
            self.spend()
        return good

    # --- answers over TCP, which come when asked for ------------------------------------------

    def entries(self, answer: CatchupEntries) -> bool:
        """Whether voters signed what the answer says. Raises ``ContradictionError``."""
        end, tip = answer.end, answer.tip
        chain = answer.chain_before
        if len(chain) != CHAIN_BYTES or tip.slot < end.slot:
            return False
        if answer.values:
            if end.slot != answer.first + len(answer.values) - 1:
                return False
            chain = chain_run(chain, answer.first, answer.values)[-1]
        elif end.slot >= answer.first:
            return False  # it knows better
        if chain != end.chain or not (self.proof.tip(end) and self.proof.tip(tip)):
            return False
        self.proof.compare(
            answer.first - 1 if answer.values else end.slot, answer.chain_before, end
        )
        return True

    def offer(self, offer: SnapshotOffer) -> bool:
        """Whether a voter signed the offer. Raises ``ContradictionError``."""
        if not self._verifier.offer(offer):
            return False
        tip = SignedTip(offer.slot, offer.chain, NO_BALLOT, offer.signer, offer.signature)
        self.proof.compare(offer.slot, offer.chain, tip)
        return True

    # --- what was delivered -------------------------------------------------------------------

    def delivered(self, run: FixedRun) -> None:
        """``run`` was delivered. Requires that it follows what was."""
        self.proof.delivered(run)
        if self.shelf.last != run.first - 1:
            self.shelf.reset(run.first - 1, run.chain_before)
        self.shelf.add(run)
