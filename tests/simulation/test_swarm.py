"""Hundreds of worlds, each with its own faults: nothing is ever violated, and they did go through
what they were made for. Ten thousand of them are ``just soak``."""

from __future__ import annotations

import time

import pytest

from tests.simulator.options import FAULTS, SWITCHES
from tests.simulator.swarm import run_seeds, summary
from tests.simulator.world import BROKEN

SEEDS = 300
EVENTS = 2_000
SLICES = 3
"""Tests the seeds are cut into, so that all workers have a share of them."""
FAULT_AT_LEAST = 60
"""How often each fault strikes."""
ON_AT_LEAST = 45
"""In how many worlds each fault and option is on ..."""
OFF_AT_LEAST = 45
"""... and in how many it is off."""
AT_LEAST = {
    "events": SEEDS * EVENTS,
    # what voters went through
    "elections": 600,
    "leaders_stepped_down": 187,
    "leaders_cut_off": 52,
    "leaders_deafened": 45,
    "crashes": 1_650,
    "boundary_crashes": 337,
    "crashes_amid_snapshot": 9,
    "crashes_amid_delete": 6,
    "storm_crashes": 525,
    "restarts": 1_650,
    "unsynced_writes_lost": 240,
    "sync_failures": 90,
    "journals_refused": 15,
    "segments_deleted": 1_125,
    "snapshots": 1_200,
    "snapshots_installed": 37,
    "catch_ups": 750,
    "catch_ups_failed": 150,
    "over_tcp": 187,
    "wiped": 12,
    "stopped_because_wiped": 12,
    "rolled_back": 12,
    "stopped_because_rolled_back": 12,
    "starts_without_room": 6,
    "writes_without_room": 3,
    "upgrades": 150,
    "stopped_too_old": 27,
    # what the network did
    "datagrams_lost": 11_250,
    "datagrams_repeated": 11_250,
    "datagrams_late": 1_800,
    "datagrams_damaged": 187,
    "dropped_checksum": 150,
    "connections_broken": 2_250,
    "held_back_by_a_clogged_path": 1_800,
    # what came of it
    "slots_fixed": 10_500,
    "commands_answered": 6_000,
    "commands_of_the_newer_level": 150,
    "client_retries": 5_250,
    "refused_for_full_disks": 450,
    "reads_answered": 1_950,
    "leases_renewed": 375,
    "leases_expired": 135,
    "names_taken": 67,
    "names_taken_by_others": 48,
    "names_given_back": 36,
    "names_lost": 15,
    "learner_gap_closed_by_repair": 375,
    "learner_gap_closed_by_catchup": 90,
    "listener_restarts": 135,
    "listener_snapshots_installed": 27,
    "repairs_by_listeners": 57,
    "catch_ups_by_listeners": 6,
    # and how it was healed
    "healed_all": 75,
    "healed_core_only": 48,
}
"""About half of what the seeds from 0 go through."""


@pytest.mark.parametrize("part", range(SLICES))
def test_swarm(request, capsys, part):
    runs = (request.config.getoption("--runs") or SEEDS) // SLICES
    first = request.config.getoption("--seed") + part * runs
    began = time.monotonic()
    totals, failures = run_seeds(first, runs, EVENTS)
    with capsys.disabled():
        print(f"\n{summary(totals, time.monotonic() - began)}")
    assert not failures, f"{len(failures)} of {runs} seeds; the first:\n{failures[0]}"
    at_least = dict(AT_LEAST)
    at_least.update((f"fault_{fault}", FAULT_AT_LEAST) for fault in FAULTS)
    at_least.update((f"on_fault_{fault}", ON_AT_LEAST) for fault in FAULTS)
    at_least.update((f"on_{option}", ON_AT_LEAST) for option in SWITCHES)
    at_least["broken"] = 45
    totals["broken"] = sum(totals[f"broken_{way}"] for way in BROKEN)
    for name, number in at_least.items():
        assert totals[name] >= number * runs // SEEDS, f"the worlds were too calm: {name}"
    for switch in (*(f"on_fault_{fault}" for fault in FAULTS), *(f"on_{o}" for o in SWITCHES)):
        off = runs - totals[switch]
        assert off >= OFF_AT_LEAST * runs // SEEDS, f"one fault masks others: {switch}"
