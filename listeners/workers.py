"""Threads that are there before they are needed.

This module alone starts the threads a listener works with, all when it is opened. One started later
would be started by the loop; and when memory is short, as a query can make it, a new thread may end
before it could say that it began: ``threading.Thread.start`` waits for that word without any bound,
and the loop with it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Final, Generic, TypeVar, TypeVarTuple, cast

import anyio

TELL_ATTEMPTS: Final = 400
TELL_AGAIN_S: Final = 0.05

_R = TypeVar("_R")
_Args = TypeVarTuple("_Args")


class Workers:
    """``count`` threads, begun here, which take the jobs given to them in order. They are daemons:
    what cannot be interrupted holds no program open."""

    def __init__(self, name: str, count: int = 1) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._count: Final = count
        self._closed = False
        for number in range(1, count + 1):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def submit(self, job: Callable[[], None]) -> None:
        """Have ``job`` run by the next free thread. It raises nothing. Any thread may call this;
        RuntimeError once closed."""
        if self._closed:
            raise RuntimeError("these threads were told to end")
        self._jobs.put(job)

    async def run(
        self,
        function: Callable[[*_Args], _R],
        *args: *_Args,
        abandon_on_cancel: bool = False,
    ) -> _R:
        """What ``function(*args)`` returns, or raises, in one of the threads; on asyncio.

        When cancelled it still waits for the end, unless it may ``abandon_on_cancel``.
        """
        job = _Job(function, args)
        self.submit(job)
        with anyio.CancelScope(shield=not abandon_on_cancel):
            await job.done.wait()
        if job.error is not None:
            raise job.error
        return cast("_R", job.result)

    def close(self) -> None:
        """Have each thread end after what was submitted before."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self._count):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with suppress(MemoryError):  # where it was short even for telling so
                job()
            del job  # it may hold much, and the next one may be long in coming


class _Job(Generic[_R, *_Args]):
    """A call and what came of it; ``done`` is set in the loop that made it."""

    def __init__(self, function: Callable[[*_Args], _R], args: tuple[*_Args]) -> None:
        self.done: Final = asyncio.Event()
        self.result: _R | None = None
        self.error: BaseException | None = None
        self._function = function
        self._args = args
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> None:
        try:
            self.result = self._function(*self._args)
        except BaseException as error:  # noqa: BLE001 - raised again in the loop
            self.error = error
        finally:
            tell(self._loop, self.done.set)


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have ``loop`` call ``callback`` soon; from another thread. Where memory is too short even for
    that it is tried again, for some 20 s; a loop that is gone need not know."""
    for _ in range(TELL_ATTEMPTS):
        try:
            loop.call_soon_threadsafe(callback)
        except MemoryError:
            time.sleep(TELL_AGAIN_S)
        except RuntimeError:
            return
        else:
            return
