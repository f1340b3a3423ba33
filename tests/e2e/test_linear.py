"""Real processes under harm: what clients were answered is linearizable, and every listener is
told what the voters' log says. `python -m tests.linear --minutes N` is the long form, with five
voters too."""

from __future__ import annotations

import shutil

import pytest

from listeners.sql import query_socket
from tests.e2e.harness import config_of, kill_all, put
from tests.linear import clock, hosts, nemesis
from tests.linear.machines import Machines
from tests.linear.promises import Broken
from tests.linear.trial import run_trial
from voters.driver import open_driver

SLOW_ELECTIONS = {"election_ticks_min": 150, "election_ticks_max": 250}
"""Where no election is allowed to happen, a busy machine must not cause one."""


async def test_killed_and_stopped_processes(tmp_path):
    """Logs are cut so soon that a killed leader, a killed listener and the subscribers of one whose
    cable was pulled go on from a snapshot."""
    with Machines(tmp_path, 3, cut=True) as machines:
        known = {nemesis.kill_listener}  # and it does so twice
        harms = [nemesis.outlive_leader, *(h for h in nemesis.PROCESSES if h not in known)]
        figures = await run_trial(machines, harms, operations=1200)
    print(figures)
    assert set(figures.faults) == {
        "kill -9 of the leader, until its log was gone",
        "kill -9 of a listener after a reset",
        "kill -9 of the leader",
        "kill -9 of a follower",
        "kill -9 of all",
        "SIGSTOP of the leader",
        "SIGSTOP of a follower",
        "SIGSTOP of a listener",
    }
    assert figures.resets and figures.resets_stored and figures.installed == 1
    assert sum(figures.old_leaders.values()) == 1
    _checked_enough(figures)


async def test_a_network_that_falls_apart(tmp_path):
    if why := hosts.why_not():
        pytest.skip(why)
    with Machines(tmp_path, 3, apart=True) as machines:
        figures = await run_trial(machines, nemesis.NETWORKS, operations=1000)
        await _one_listener_helps_another(machines)
    print(figures)
    assert set(figures.faults) == {
        "isolated leader",
        "deaf leader",
        "mute leader",
        "leader in the minority",
        "minority without the leader",
        "multicast lost",
    }
    assert figures.old_leaders["answered"] >= 4, "while they led"
    assert figures.old_leaders["refused"] + figures.old_leaders["hung up"] >= 8, "and then"
    _checked_enough(figures)


async def test_a_leader_that_asks_no_quorum_is_found(tmp_path):
    """The trial is tried: planted in real voters, a stale read is found in what clients noted."""
    if why := hosts.why_not():
        pytest.skip(why)
    defect, harms = "a leader for ever", [nemesis.isolate_a_leader_for_ever]
    with (
        Machines(tmp_path, 3, listeners=(), apart=True, planted=defect) as machines,
        pytest.raises(Broken, match="a linearizable read of the past"),
    ):
        await run_trial(machines, harms, operations=0)


async def test_wall_clocks_that_jump_decide_nothing(tmp_path):
    if why := clock.why_not():
        pytest.skip(why)
    with Machines(tmp_path, 3, listeners=("one",), clocks=True, timing=SLOW_ELECTIONS) as machines:
        figures = await run_trial(machines, nemesis.CLOCKS, operations=500)
    print(figures)
    assert figures.faults["wall clock stepped"] == 4
    assert figures.lost_leases == 0
    _checked_enough(figures)


async def _one_listener_helps_another(machines):
    """Every voter is gone: what the one listener holds, the other, whose store is lost, can only
    have from its host."""
    machines.children["two"].kill()
    shutil.rmtree(machines.directory / "two")
    async with open_driver(config_of(machines), machines.credentials(), deadline_s=60) as driver:
        slot = await put(driver, "the very last", "yes")
    one, two = (machines.directory / name / "sql.sock" for name in machines.listeners)
    held = "SELECT key, value, slot FROM config ORDER BY slot"
    rows = query_socket(one, held, deadline_ms=60_000, at_least_slot=slot).rows
    kill_all([machines.voter(voter) for voter in machines.voter_ids])
    machines.start_listener("two").wait_for_line("listener.ready", 60)
    assert query_socket(two, held, deadline_ms=60_000, at_least_slot=slot).rows == rows
    told = query_socket(two, "SELECT history_from_slot FROM listener", deadline_ms=60_000)
    assert told.rows == ((1,),), "slot by slot"


def _checked_enough(figures):
    """A trial that looked at little has proven little."""
    assert figures.operations["get done"] > 100
    assert figures.operations["put done"] > 50 and figures.operations["cas done"] > 20
    assert figures.operations["cas refused"] and figures.operations["delete done"]
    read = figures.levels
    assert read["linearizable"] and read["local at a voter"] and read["embedded"]
    assert read["at_least"] > 5
    assert figures.bookmarks > 10 and figures.resumed > 2 and figures.changed_together > 1
    assert figures.holds > 2
