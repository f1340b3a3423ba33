"""A voter crashes at each boundary by enumeration, not by chance, and restarts at once from its
journal, on a network that loses 40 %. Random crashes do not find what this finds."""

from __future__ import annotations

import msgspec
import pytest

from tests.simulator.options import Options
from tests.simulator.world import CrashPoint, World

OPTIONS = Options(
    voters=3,
    listeners=1,
    clients=1,
    loss=0.4,
    duplication=0.1,
    downtime_us=1,
    snapshot_slots=8,
    segment_bytes=2_000,
    sync_span_us=8_000,
)


@pytest.mark.parametrize("boundary", ["step", "written", "synced", "half_sent"])
@pytest.mark.parametrize("k", range(1, 13))
def test_crash(boundary, k):
    options = msgspec.structs.replace(OPTIONS, events=200 + 40 * k)
    crashed = 0
    for seed in range(3):
        for voter in (1, 2, 3):
            world = World(seed, options, crash_at=CrashPoint(voter, boundary, k)).run()
            crashed += world.counts["crashes"]
    assert crashed == 9, "each world has its one crash"


@pytest.mark.parametrize("k", range(1, 13))
def test_crash_of_a_lone_voter(k):
    for boundary in ("step", "written", "synced", "half_sent"):
        options = Options(voters=1, clients=2, events=300, downtime_us=1, snapshot_slots=4)
        world = World(k, options, crash_at=CrashPoint(1, boundary, k)).run()
        assert world.counts["crashes"] == 1
