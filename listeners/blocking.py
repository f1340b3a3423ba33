"""A listener for threaded programs.

This module alone crosses from threads into the listener's event loop.  The loop runs in a daemon
thread of its own, the state is read without crossing (it is immutable), and everything that waits
takes a deadline.  Nothing keeps the program open: when the main thread ends, the listener is
closed, and the program ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import anyio
from anyio.from_thread import start_blocking_portal

from listeners.changes import Delivery, Subscription
from listeners.listener import (
    DEFAULT_OPTIONS,
    Listener,
    ListenerOptions,
    ListenerStatus,
    open_listener,
)
from trex_core.cluster import ClusterConfig
from trex_core.metadata.ring import Ring
from trex_core.metadata.state import MetadataState

if TYPE_CHECKING:
    from listeners.sql import QueryResult

_T = TypeVar("_T")


def has_uvloop() -> bool:
    """Whether the faster event loop is installed."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True


class _Closing:
    """What is to be closed, once; afterwards it holds on to nothing."""

    def __init__(self, stack: ExitStack) -> None:
        self._lock = threading.Lock()
        self._stack: ExitStack | None = stack

    def now(self) -> None:
        with self._lock:
            stack, self._stack = self._stack, None
            if stack is not None:
                stack.close()

    def at_end(self) -> None:
        threading.main_thread().join()
        self.now()


class BlockingListener:
    """Follow ``cluster`` as ``name`` from a threaded program: a context manager.

    Arguments and errors are those of :func:`listeners.listener.open_listener`. Any thread may use
    it. Ctrl-C ends a wait in the main thread as usual.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Path,
        *,
        name: str,
        directory: Path | None = None,
        seed: int | None = None,
        options: ListenerOptions = DEFAULT_OPTIONS,
    ) -> None:
        with ExitStack() as stack:
            self._portal = stack.enter_context(
                start_blocking_portal("asyncio", {"use_uvloop": has_uvloop()}, name="trex-listener")
            )
            self._listener: Listener = stack.enter_context(
                self._portal.wrap_async_context_manager(
                    open_listener(
                        cluster,
                        credentials,
                        name=name,
                        directory=directory,
                        seed=seed,
                        options=options,
                    )
                )
            )
            self._closing: Final = _Closing(stack.pop_all())
        # When the main thread has ended, the interpreter waits for this one and only then for
        # nobody: were it a daemon, the loop's thread could be torn down inside native code, which
        # aborts the process.
        threading.Thread(target=self._closing.at_end, name="trex-listener-end").start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the listener, storing what is applied. Again: does nothing. Raises what stopped the
        listener, if something did."""
        self._closing.now()

    @property
    def state(self) -> MetadataState:
        """As :attr:`Listener.state`."""
        return self._listener.state

    @property
    def applied(self) -> int:
        """As :attr:`Listener.applied`."""
        return self._listener.applied

    @property
    def stored(self) -> int | None:
        """As :attr:`Listener.stored`."""
        return self._listener.stored

    @property
    def tip(self) -> int:
        """As :attr:`Listener.tip`."""
        return self._listener.tip

    @property
    def lag(self) -> int:
        """As :attr:`Listener.lag`."""
        return self._listener.lag

    @property
    def ring(self) -> Ring:
        """As :attr:`Listener.ring`."""
        return self._call(self._ring)

    @property
    def status(self) -> ListenerStatus:
        """As :attr:`Listener.status`."""
        return self._call(self._status)

    async def _ring(self) -> Ring:
        return self._listener.ring

    async def _status(self) -> ListenerStatus:
        return self._listener.status

    def wait_applied(self, slot: int, deadline_s: float) -> None:
        """As :meth:`Listener.wait_applied`."""
        self._call(lambda: self._listener.wait_applied(slot, deadline_s))

    def wait_stored(self, slot: int, deadline_s: float) -> None:
        """As :meth:`Listener.wait_stored`."""
        self._call(lambda: self._listener.wait_stored(slot, deadline_s))

    def wait_ready(self, deadline_s: float) -> None:
        """As :meth:`Listener.wait_ready`."""
        self._call(lambda: self._listener.wait_ready(deadline_s))

    def sql(
        self, text: str, *, at_least: int | None = None, deadline_s: float = 10.0
    ) -> QueryResult:
        """As :meth:`Listener.sql`."""
        return self._call(
            lambda: self._listener.sql(text, at_least=at_least, deadline_s=deadline_s)
        )

    def changes(
        self,
        since: int | None = None,
        *,
        kind: str | None = None,
        prefix: str = "",
        progress: bool = False,
        deadline_s: float | None = None,
    ) -> Iterator[Delivery]:
        """As :meth:`Listener.changes`; it ends when nothing came for ``deadline_s`` seconds (None:
        it waits for ever)."""

        async def subscribe() -> Subscription:
            return self._listener.changes(since, kind=kind, prefix=prefix, progress=progress)

        async def following(subscription: Subscription) -> Delivery | None:
            with anyio.move_on_after(deadline_s):
                return await anext(subscription, None)
            return None

        subscription = self._call(subscribe)

        def deliveries() -> Iterator[Delivery]:
            while (delivery := self._call(lambda: following(subscription))) is not None:
                yield delivery

        return deliveries()

    def _call(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run ``work`` on the loop and wait for it; it is cancelled if the wait is broken off."""
        waiting = self._portal.start_task_soon(work)
        try:
            result: _T = waiting.result()
        except BaseException:
            waiting.cancel()
            raise
        return result
