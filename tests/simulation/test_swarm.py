"""Hundreds of worlds, each with its own faults: nothing is ever violated, and they did go through
what they were made for. Ten thousand of them are ``just soak``."""

from __future__ import annotations

import time

import pytest

from tests.simulator.options import FAULTS, SWITCHES
from tests.simulator.swarm import run_seeds, summary
from tests.simulator.world import BROKEN

SEEDS = 400
EVENTS = 2_000
SLICES = 4
"""Tests the seeds are cut into, so that all workers have a share of them."""
FAULT_AT_LEAST = 80
"""How often each fault strikes."""
ON_AT_LEAST = 60
"""In how many worlds each fault and option is on ..."""
OFF_AT_LEAST = 60
"""... and in how many it is off."""
AT_LEAST = {
    "events": SEEDS * EVENTS,
    # what voters went through
    "elections": 800,
    "leaders_stepped_down": 250,
    "leaders_cut_off": 70,
    "leaders_deafened": 60,
    "crashes": 2_200,
    "boundary_crashes": 450,
    "crashes_amid_snapshot": 12,
    "crashes_amid_delete": 8,
    "storm_crashes": 700,
    "restarts": 2_200,
    "unsynced_writes_lost": 320,
    "sync_failures": 120,
    "journals_refused": 20,
    "segments_deleted": 1_500,
    "snapshots": 1_600,
    "snapshots_installed": 50,
    "catch_ups": 1_000,
    "catch_ups_failed": 200,
    "over_tcp": 250,
    "wiped": 16,
    "stopped_because_wiped": 16,
    "rolled_back": 16,
    "stopped_because_rolled_back": 16,
    "starts_without_room": 8,
    "writes_without_room": 4,
    "upgrades": 200,
    "stopped_too_old": 4,
    # what the network did
    "datagrams_lost": 15_000,
    "datagrams_repeated": 15_000,
    "datagrams_late": 2_400,
    "datagrams_damaged": 250,
    "dropped_checksum": 200,
    "connections_broken": 3_000,
    "held_back_by_a_clogged_path": 2_400,
    # what came of it
    "slots_fixed": 14_000,
    "commands_answered": 8_000,
    "commands_of_the_newer_level": 80,
    "client_retries": 7_000,
    "refused_for_full_disks": 600,
    "reads_answered": 2_600,
    "leases_renewed": 500,
    "leases_expired": 180,
    "names_taken": 90,
    "names_taken_by_others": 64,
    "names_given_back": 48,
    "names_lost": 20,
    "learner_gap_closed_by_repair": 500,
    "learner_gap_closed_by_catchup": 120,
    "listener_restarts": 180,
    "listener_snapshots_installed": 36,
    "repairs_by_listeners": 76,
    "catch_ups_by_listeners": 8,
    # and how it was healed
    "healed_all": 100,
    "healed_core_only": 64,
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
    at_least["broken"] = 60
    totals["broken"] = sum(totals[f"broken_{way}"] for way in BROKEN)
    for name, number in at_least.items():
        assert totals[name] >= number * runs // SEEDS, f"the worlds were too calm: {name}"
    for switch in (*(f"on_fault_{fault}" for fault in FAULTS), *(f"on_{o}" for o in SWITCHES)):
        off = runs - totals[switch]
        assert off >= OFF_AT_LEAST * runs // SEEDS, f"one fault masks others: {switch}"
    if runs >= SEEDS // SLICES:
        missing = [way for way in BROKEN if not totals[f"broken_{way}"]]
        assert not missing, f"no voter was left broken so: {missing}"
