"""A thousand worlds, each with its own faults: nothing is ever violated, and they did go through
what they were made for."""

from __future__ import annotations

import time

import pytest

from tests.simulator.swarm import run_seeds, summary

SEEDS = 1_000
EVENTS = 2_000
AT_LEAST = {
    "events": SEEDS * EVENTS,
    "elections": 3_000,
    "leaders_stepped_down": 1_000,
    "crashes": 8_000,
    "boundary_crashes": 1_500,
    "fault_one_way": 2_000,
    "fault_isolate_leader": 2_000,
    "fault_pause": 2_000,
    "unsynced_writes_lost": 1_500,
    "sync_failures": 1_500,
    "journals_refused": 150,
    "slots_fixed": 60_000,
    "commands_answered": 20_000,
    "client_retries": 10_000,
    "reads_answered": 5_000,
    "catch_ups": 2_000,
    "snapshots_installed": 100,
    "learner_gap_closed_by_repair": 1_000,
    "learner_gap_closed_by_catchup": 300,
    "over_tcp": 1_000,
    "dropped_checksum": 500,
}
"""About half of what the seeds from 0 go through."""


SLICES = 8
"""Tests the seeds are cut into, so that all workers have a share of them."""


@pytest.mark.parametrize("part", range(SLICES))
def test_swarm(request, capsys, part):
    runs = (request.config.getoption("--runs") or SEEDS) // SLICES
    first = request.config.getoption("--seed") + part * runs
    began = time.monotonic()
    totals, failures = run_seeds(first, runs, EVENTS)
    with capsys.disabled():
        print(f"\n{summary(totals, time.monotonic() - began)}")
    assert not failures, f"{len(failures)} of {runs} seeds; the first:\n{failures[0]}"
    for name, number in AT_LEAST.items():
        assert totals[name] >= number * runs // SEEDS, f"the worlds were too calm: {name}"
