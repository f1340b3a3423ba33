"""A voter crashes at each boundary by enumeration, not by chance, and restarts at once from its
journal: at every point of a small run on a calm network, at the first points of runs on one that
loses 40 %. Random crashes do not find what this finds."""

from __future__ import annotations

import msgspec
import pytest

from tests.simulator.options import Options
from tests.simulator.world import CrashPoint, World

SMALL = Options(
    voters=3,
    listeners=1,
    clients=1,
    events=250,
    loss=0.1,
    downtime_us=1,
    submit_every_us=4_000,
    burst=1,
    calm_us=0,
    election_ticks_max=6,
    snapshot_slots=2,
    segment_bytes=1_200,
)
"""A run in which each voter is elected, accepts, fixes, cuts snapshots and deletes segments or sees
it done, as small as may be."""
NOWHERE = CrashPoint(0, "", 0)
SMALL_SEED = 1
POINTS_AT_LEAST = {
    "step": 50,
    "written": 50,
    "record": 30,
    "synced": 30,
    "half_sent": 30,
    "send": 60,
    "fixed": 12,
    "snapshot": 8,
    "delete": 4,
}

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


@pytest.mark.parametrize("boundary", POINTS_AT_LEAST)
def test_every_point_of_a_small_run(boundary, capsys):
    """For all voters and all k: the k-th time it gets there."""
    whole = World(SMALL_SEED, SMALL, crash_at=NOWHERE).run()
    assert whole.counts["crashes"] == 0
    points = 0
    for voter in whole.voter_ids:
        for k in range(1, whole.passed[voter, boundary] + 1):
            world = World(SMALL_SEED, SMALL, crash_at=CrashPoint(voter, boundary, k)).run()
            assert world.counts["crashes"] == 1, f"voter {voter} at {boundary} {k}"
            assert world.voters[voter].boot == 2
            points += 1
    with capsys.disabled():
        print(f"\n{points} points: {boundary}")
    assert points >= POINTS_AT_LEAST[boundary], "the run is too small"


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
