"""A feed without a cluster: events handed in, a listener that holds what it is given."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import anyio

from dashboard.feed import Feed
from dashboard.view import Clock, Event
from listeners.listener import Listener, ListenerStatus
from trex_core.cluster import ClusterConfig, StreamConfig, VoterEntry
from trex_core.metadata.ring import Ring
from trex_core.metadata.state import EMPTY, MetadataState, ring_of

CLUSTER = ClusterConfig(
    name="orion",
    cluster_id="00" * 16,
    voters=tuple(
        VoterEntry(
            id=each,
            host="127.0.0.1",
            peer_port=7000 + each,
            client_port=7100 + each,
            archive_port=7200 + each,
            directory=f"voter-{each}",
        )
        for each in range(1, 6)
    ),
    stream=StreamConfig(group="239.255.1.1", port=7300),
)


class FakeListener:
    """As much of a Listener as panes need. ``answer`` gives what ``sql`` returns or raises."""

    def __init__(
        self,
        state: MetadataState = EMPTY,
        applied: int = 0,
        answer: Callable[[str], Awaitable[Any]] | None = None,
    ) -> None:
        self.name = "dash"
        self.state = state
        self.applied = self.stored = self.tip = applied
        self.lag = 0
        self.ready = True
        self.counters: dict[str, int] = {}
        self.asked: list[str] = []
        """Every text given to ``sql``."""
        self._answer = answer

    @property
    def ring(self) -> Ring:
        return ring_of(self.state)

    @property
    def status(self) -> ListenerStatus:
        return ListenerStatus(
            self.name, self.applied, self.stored, self.tip, self.lag, self.ready, self.counters
        )

    async def sql(self, text: str, **_: Any) -> Any:
        self.asked.append(text)
        assert self._answer is not None, "this listener was given no answers"
        return await self._answer(text)


class FakeFeed:
    """Hands out ``batches``, one a call of :meth:`take`; afterwards only what :meth:`push` gave.
    ``whole_ms`` makes it a replay of that length."""

    def __init__(
        self,
        batches: Iterable[Iterable[Event]] = (),
        *,
        cluster: ClusterConfig = CLUSTER,
        listener: FakeListener | None = None,
        source: str = "live",
        whole_ms: int | None = None,
    ) -> None:
        self.cluster = cluster
        self.source = source
        self.listener = cast(Listener, listener or FakeListener())
        self.speed = 1.0
        self.played_ms = 0
        self.taken = 0
        self.closed = False
        self._whole_ms = whole_ms
        self._batches = deque(tuple(batch) for batch in batches)

    def push(self, *events: Event) -> None:
        """The next call of ``take`` has these too."""
        self._batches.append(events)

    def clock(self, at_ms: int) -> None:
        """Time passes up to ``at_ms``."""
        self.push(Clock(at_ms))

    def take(self) -> tuple[Event, ...]:
        self.taken += 1
        return self._batches.popleft() if self._batches else ()

    @property
    def progress(self) -> tuple[int, int] | None:
        return None if self._whole_ms is None else (self.played_ms, self._whole_ms)


def opens(
    feed: FakeFeed, *, gate: anyio.Event | None = None, error: Exception | None = None
) -> Callable[[], AbstractAsyncContextManager[Feed]]:
    """What ``DashApp`` is given: opens ``feed``, once ``gate`` is set; or fails with ``error``."""

    @asynccontextmanager
    async def open_it() -> AsyncIterator[Feed]:
        if gate is not None:
            await gate.wait()
        if error is not None:
            raise error
        try:
            yield cast(Feed, feed)
        finally:
            feed.closed = True

    return open_it
