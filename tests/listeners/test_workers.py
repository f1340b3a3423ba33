"""Threads that are there from the start: what they return, raise and outlive; and that nothing a
listener does later begins another."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import anyio
import pytest

from listeners import workers
from listeners.listener import open_listener
from listeners.sql import SqlDeadlineError, query_socket_async
from listeners.workers import Workers, tell
from tests.credentials import folder
from tests.listeners.backbone import Backbone, make_cluster
from tests.listeners.test_listener import cut_snapshot
from tests.listeners.workload import put

NAP_S = 20


@pytest.fixture
def pool():
    made = Workers("test", 2)
    yield made
    made.close()


async def test_what_a_job_returns_or_raises_comes_back(pool):
    assert await pool.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 7, 0)
    assert await pool.run(threading.get_ident) != threading.get_ident()


async def test_one_thread_runs_jobs_in_the_order_given():
    one, seen = Workers("test"), []
    async with anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(one.run, seen.append, number)
    assert seen == list(range(50))
    one.close()


async def test_a_cancelled_wait_lasts_until_the_job_is_through(pool):
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def job():
        begun.set()
        go_on.wait(NAP_S)
        ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.run, job)
        await pool.run(begun.wait, NAP_S)
        tasks.cancel_scope.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
    assert ended.is_set()


async def test_a_wait_may_be_abandoned(pool):
    go_on = threading.Event()
    with anyio.move_on_after(0.05) as patience:
        await pool.run(go_on.wait, NAP_S, abandon_on_cancel=True)
    assert patience.cancelled_caught
    go_on.set()
    assert await pool.run(divmod, 1, 1) == (1, 0)


async def test_closed_it_does_what_it_was_told_before_and_takes_nothing_more():
    one, seen, ended = Workers("test"), [], threading.Event()
    one.submit(lambda: seen.append(1))
    one.submit(ended.set)
    one.close()
    one.close()
    assert ended.wait(NAP_S)
    assert seen == [1]
    with pytest.raises(RuntimeError, match="told to end"):
        one.submit(ended.set)
    with pytest.raises(RuntimeError, match="told to end"):
        await one.run(divmod, 1, 1)


async def test_a_job_that_is_done_is_not_held(pool):
    class Large:
        pass

    large = Large()
    held = weakref.ref(large)
    await pool.run(id, large)
    del large
    await pool.run(divmod, 1, 1)
    await pool.run(divmod, 1, 1)
    gc.collect()
    assert held() is None


async def test_a_job_that_lacks_memory_ends_no_thread():
    def lacking():
        raise MemoryError

    one = Workers("test")
    one.submit(lacking)
    with anyio.fail_after(NAP_S):
        assert await one.run(divmod, 7, 2) == (3, 1)
    one.close()


def test_a_word_is_sent_again_when_there_was_no_memory_for_it(monkeypatch):
    monkeypatch.setattr(workers, "TELL_AGAIN_S", 0)

    class Loop:
        def __init__(self, failures):
            self.failures = failures
            self.called = []

        def call_soon_threadsafe(self, callback):
            if self.failures:
                raise self.failures.pop()
            self.called.append(callback)

    short = Loop([MemoryError()] * 3)
    tell(short, print)
    assert short.called == [print]
    gone = Loop([RuntimeError("closed")])
    tell(gone, print)
    assert gone.called == []


async def test_an_open_listener_begins_no_thread(tmp_path, monkeypatch):
    """While a query takes all memory, a new thread may end before it says that it began, and who
    started it, the loop, waited for that word for ever."""
    backbone = Backbone(make_cluster())
    papers = folder(backbone.cluster, "listener")
    backbone.append(*(put(f"k{n}", "v") for n in range(20)))
    async with (
        backbone.serving(heartbeat_s=0.05),
        open_listener(backbone.cluster, papers, name="x", directory=tmp_path / "x") as listener,
        anyio.create_task_group() as tasks,
    ):
        path = await tasks.start(listener.serve_sql)
        with monkeypatch.context() as patch, anyio.fail_after(NAP_S):

            def refuse(thread):
                raise AssertionError(f"{thread.name} is begun")

            patch.setattr(threading.Thread, "start", refuse)
            count = "SELECT count(*) FROM config"
            for round_ in range(3):
                last = backbone.append(put(f"more/{round_}", "v"))
                backbone.stream(last, last)
                assert (await listener.sql(count, at_least=last)).rows == ((21 + round_,),)
                assert (await query_socket_async(path, count)).rows == ((21 + round_,),)
                with pytest.raises(SqlDeadlineError):
                    await query_socket_async(
                        path, "SELECT sum(range) FROM range(100_000_000_000_000)", deadline_ms=50
                    )
            backbone.append(*(put(f"late/{n}", "v") for n in range(5)))
            cut_snapshot(backbone)
            backbone.heartbeat()
            result = await listener.sql(count, at_least=backbone.tip)
            assert result.rows == ((28,),)
            assert listener.counters["resets"] == 1
        tasks.cancel_scope.cancel()
    backbone.close()
