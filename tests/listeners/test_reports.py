"""Reports between real listeners: who hears whom, what they say, how often in all."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from importlib.metadata import version

import anyio
import msgspec
import pytest

from listeners import ListenerOptions, open_listener
from listeners.listener import _Lateness
from listeners.source import Source
from tests.credentials import folder, held
from tests.listeners.backbone import BALLOT, Backbone, make_cluster
from tests.listeners.workload import put, workload
from trex_core import roster
from trex_core.learner import LearnerConfig
from trex_core.machine import TooOld
from trex_core.messages import Kind, ListenerReport, Value
from trex_core.metadata.commands import LEVEL

DEADLINE_S = 20
QUICK = ListenerOptions(learner=LearnerConfig("", (), silence_ms=150, retry_ms=5))


@pytest.fixture
async def backbone(monkeypatch):
    monkeypatch.setattr(roster, "REPORT_MS_MIN", 60)
    made = Backbone(make_cluster())
    try:
        async with made.serving(heartbeat_s=0.02):
            yield made
    finally:
        made.close()


def following(backbone: Backbone, name: str, seed: int = 1, **arguments):
    return open_listener(
        backbone.cluster,
        folder(backbone.cluster, "listener"),
        name=name,
        seed=seed,
        options=QUICK,
        **arguments,
    )


async def reported(backbone: Backbone, condition) -> ListenerReport:
    """The first report from now on that ``condition`` holds for."""
    seen = len(backbone.reports)
    await backbone.until(lambda: any(map(condition, backbone.reports[seen:])))
    return next(filter(condition, backbone.reports[seen:]))


async def test_each_hears_the_others_and_when_one_leaves(backbone):
    async with AsyncExitStack() as stack:
        many = [await stack.enter_async_context(following(backbone, f"n{n}", n)) for n in range(4)]
        async with following(backbone, "n0", 9) as twin:  # of the same name
            everybody = [*many, twin]
            await backbone.until(
                lambda: all(each.status.listeners_known == 5 for each in everybody)
            )
            heard = len(backbone.reports)
            await backbone.until(lambda: len(backbone.reports) >= heard + 20)
            assert all(each.status.listeners_known == 5 for each in everybody), (
                "nobody counts twice"
            )
        await backbone.until(lambda: all(each.status.listeners_known == 4 for each in many))
    await backbone.until(lambda: sum(report.leaving for report in backbone.reports) == 5)
    leaving = [report for report in backbone.reports if report.leaving]
    assert sorted(report.name for report in leaving) == ["n0", "n0", "n1", "n2", "n3"]
    assert len({report.instance for report in leaving}) == 5


async def test_one_alone_does_not_hear_itself(backbone):
    async with following(backbone, "lonely") as listener:
        await backbone.until(lambda: len(backbone.reports) >= 3)
        assert listener.status.listeners_known == 1
        assert listener.counters["reports_sent"] >= 3
        assert listener.counters["reports_heard"] == 0


async def test_a_report_says_where_the_listener_is(backbone, tmp_path):
    async with (
        following(backbone, "kept", directory=tmp_path) as kept,
        following(backbone, "light") as light,
    ):
        last = backbone.append(*workload(random.Random(1), 50))
        await kept.wait_stored(last, DEADLINE_S)
        await light.wait_applied(last, DEADLINE_S)
        told = await reported(backbone, lambda r: r.name == "kept" and r.stored == last)
        assert told == ListenerReport(
            name="kept",
            helps=kept._source.helps,
            instance=told.instance,
            applied=last,
            stored=last,
            tip=last,
            behind_ms=0,
            ready=True,
            gaps=kept.counters["gap_opened"],
            repairs=kept.counters["repair_requested"],
            catchups=kept.counters["catchups"],
            resets=0,
            uptime_s=told.uptime_s,
            version=version("trex-paxos"),
        )
        assert (await reported(backbone, lambda r: r.name == "light")).stored == -1
        # Nobody can bring what comes now: it is behind, and for ever longer.
        backbone.down = {1, 2, 3}
        backbone.repairs = False
        ahead = backbone.append(put("a", "1"))
        first = await reported(backbone, lambda r: r.name == "kept" and r.behind_ms > 0)
        assert (first.applied, first.tip) == (last, ahead)
        later = await reported(
            backbone, lambda r: r.name == "kept" and r.behind_ms > first.behind_ms + 200
        )
        assert later.catchups > 0
        backbone.down, backbone.repairs = set(), True
        caught_up = await reported(backbone, lambda r: r.name == "kept" and r.applied == ahead)
        assert (caught_up.behind_ms, caught_up.ready) == (0, True)


async def test_one_that_fails_does_not_say_that_it_leaves(backbone):
    with pytest.raises(TooOld):  # noqa: PT012
        async with following(backbone, "broken"):
            await reported(backbone, lambda r: r.name == "broken")
            backbone.append(Value(Kind.ENGINE, BALLOT, command=bytes((0xC1, LEVEL + 1, 0x90))))
            with anyio.fail_after(DEADLINE_S):
                await anyio.sleep_forever()
    after = Source(backbone.cluster, held(backbone.cluster), Counter())
    after.report(msgspec.structs.replace(backbone.reports[-1], name="after"))
    await backbone.until(lambda: backbone.reports[-1].name == "after")
    after.close()
    assert not any(report.leaving for report in backbone.reports)


async def test_one_that_is_cancelled_says_that_it_leaves(backbone):
    async def follow():
        async with following(backbone, "cancelled"):
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await reported(backbone, lambda r: r.name == "cancelled")
        tasks.cancel_scope.cancel()
    await backbone.until(lambda: backbone.reports[-1].leaving)


@pytest.mark.parametrize("count", [5, 20])
async def test_all_together_report_no_more_often_the_more_they_are(backbone, monkeypatch, count):
    monkeypatch.setattr(roster, "REPORTS_PER_S_MAX", 100)
    async with AsyncExitStack() as stack:
        many = [
            await stack.enter_async_context(following(backbone, f"n{n}", n)) for n in range(count)
        ]
        await backbone.until(lambda: all(each.status.listeners_known == count for each in many))
        loop = asyncio.get_running_loop()
        seen, began_s = len(backbone.reports), loop.time()
        await backbone.until(lambda: len(backbone.reports) >= seen + 100)
        per_s = 100 / (loop.time() - began_s)
        assert per_s <= 100 * 1.5
        assert {report.name for report in backbone.reports[seen:]} == {each.name for each in many}


async def test_an_observer_is_told_of_the_reports_of_others(backbone):
    class Ears:
        def __init__(self):
            self.reports = []

        def heard(self, voter, message):
            pass

        def delivered(self, run):
            pass

        def jumped(self, from_slot, to_slot):
            pass

        def reported(self, report):
            self.reports.append(report)

    ears = Ears()
    async with following(backbone, "ears", observer=ears):
        async with following(backbone, "mouth", 2):
            await backbone.until(lambda: ears.reports)
        await backbone.until(lambda: ears.reports[-1].leaving)
    assert {report.name for report in ears.reports} == {"mouth"}


def test_lateness_is_the_age_of_the_oldest_tip_not_reached():
    late, clock = _Lateness(), 0

    def moved(applied: int, tip: int) -> int:
        late.moved(applied, tip, lambda: clock)
        return late.ms(clock)

    assert moved(0, 0) == 0
    clock = 1000
    assert moved(10, 12) == 0
    clock = 1500
    assert moved(11, 20) == 500
    clock = 1600
    assert moved(12, 30) == 0, "it is where it should have been: what is left came since"
    for clock in range(2000, 60_000, 100):  # in the flow, never quite there
        assert moved(clock, clock + 50) <= 100
    assert moved(99_999, 99_999) == 0
