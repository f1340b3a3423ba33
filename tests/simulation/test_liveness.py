"""After the faults end it must go on, within a bounded time."""

from __future__ import annotations

import msgspec
import pytest

from tests.simulator.options import FAULTS, SWITCHES, Options, draw
from tests.simulator.world import BROKEN, CORE_COMMIT_TICKS, World

HARSH = Options(
    voters=5,
    listeners=1,
    clients=2,
    events=1_500,
    loss=0.2,
    duplication=0.1,
    slow=0.05,
    skew=0.3,
    boundary_crash=0.01,
    fault_every_us=25_000,
    faults=FAULTS,
    snapshot_slots=8,
    segment_bytes=4_000,
)


@pytest.mark.parametrize("heal_all", [True, False], ids=["all", "quorum"])
@pytest.mark.parametrize("loss_after", [0.0, 0.2])
def test_well_soon_after_healing(heal_all, loss_after):
    options = msgspec.structs.replace(HARSH, heal_all=heal_all, loss_after=loss_after)
    worlds = [World(seed, options).run() for seed in range(15)]
    leader = sorted(world.elections_to_leader for world in worlds)
    assert leader[len(leader) // 2] < 3, f"half of the worlds lead within 3 timeouts: {leader}"


@pytest.mark.parametrize("way", BROKEN)
def test_a_healed_core_commits_while_the_rest_stays_broken(way, monkeypatch):
    """Just a quorum is well. The others are all broken in one way, for good."""
    monkeypatch.setattr("tests.simulator.world.BROKEN", (way,))
    worst = 0
    for seed in range(8):
        options = msgspec.structs.replace(HARSH, voters=(3, 5)[seed % 2], heal_all=False)
        world = World(seed, options).run()
        if world.core_only:
            assert world.counts[f"broken_{way}"] >= 1 or any(v.dead for v in world.voters.values())
            worst = max(worst, world.commit_after_ticks)
    assert 0 < worst <= CORE_COMMIT_TICKS


def test_listeners_catch_up_from_each_other_when_no_archive_answers():
    """Cut off from all voters in turn, and found by other listeners."""
    helped = 0
    for seed in range(10):
        options = Options(
            listeners=4,
            faults=("cut_listener", "archives_down"),
            fault_every_us=60_000,
            silence_ms=60,
            retry_ms=10,
            events=3_000,
        )
        helped += World(seed, options).run().counts["catch_ups_by_listeners"]
    assert helped > 10


@pytest.mark.parametrize("voters", [1, 3, 5, 7])
def test_calm_cluster_elects_once(voters):
    """Without faults there is one election and nobody ever steps down."""
    for seed in range(6):
        world = World(seed, Options(voters=voters, events=1_500, skew=0.1)).run()
        assert world.counts["elections"] == 1
        assert world.counts["leaders_stepped_down"] == 0
        assert world.counts["commands_answered"] > 20


def test_a_core_that_is_healed_alone_commits_though_those_that_are_not_well_lead():
    """Seed 1619: two voters that start again and again were elected, now one, now the other."""
    world = World(1619, draw(1619)).run()
    assert world.core_only and 0 < world.commit_after_ticks <= CORE_COMMIT_TICKS
    assert world.leader_after_us > 0


def test_slow_disks_still_elect():
    """Found by seed 300385: with syncs longer than half an election timeout a candidate that gives
    up after one timeout, each time anew, never gets its promises."""
    for voters in (3, 5):
        for seed in range(5):
            options = Options(
                voters=voters,
                election_ticks_min=3,
                election_ticks_max=9,
                sync_min_us=20_000,
                sync_span_us=15_000,
                events=1_200,
            )
            world = World(seed, options).run()
            assert world.counts["elections"] >= 1


def test_no_capacity_is_lost_to_pauses():
    """Pauses of single voters and listeners never lose a command or a slot."""
    for seed in range(10):
        options = Options(voters=3, faults=("pause",), fault_every_us=30_000, events=1_500)
        world = World(seed, options).run()
        assert world.counts["commands_answered"] > 10


def test_every_swarm_option_is_drawn():
    """The swarm switches each fault on in some seeds and off in others."""
    drawn = [draw(seed) for seed in range(200)]
    for fault in FAULTS:
        on = sum(fault in options.faults for options in drawn)
        assert 40 < on < 160, fault
    for switch in SWITCHES:
        on = sum(bool(getattr(options, switch)) for options in drawn)
        assert 40 < on < 180, switch
    assert max(options.loss for options in drawn) > 0.28
    assert max(options.duplication for options in drawn) > 0.45
    assert {options.voters for options in drawn} == {1, 3, 5, 7}
