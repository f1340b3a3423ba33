"""What is wrong is said, in time and as long as it is so: dashboard and doctor against real faults.

A slice of the matrix that ``benchmarks/faults.py`` measures whole.
"""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.faults import FAULTS, measure, stage_in

SLICE = (
    "leader killed",
    "three followers killed: no quorum",
    "listener stopped (SIGSTOP)",
    "the dashboard's machine cut off from the stream",
)
EXITS = {
    "three followers killed: no quorum": 4,
    "the dashboard's machine cut off from the stream": 1,
}
"""What the doctor ends with, where it is asked too."""


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_each_fault_is_said_in_time_never_hidden_and_over_when_healed(tmp_path):
    faults = {each.name: each for each in FAULTS}
    async with stage_in(tmp_path, listener_count=1) as stage:
        for name in SLICE:
            fault = dataclasses.replace(faults[name], doctor=name in EXITS)
            row = await measure(stage, fault, hold_s=1.0, whole=False)
            print(row)
            assert row.said_s is not None, f"{name}: never said; {row}"
            assert row.said_s <= row.bound_s, f"{name}: said late; {row}"
            assert row.looks > 0 and row.falsely_healthy == 0, f"{name}: hidden; {row}"
            assert row.well_s is not None, f"{name}: healed, but not well; {row}"
            assert not row.left, row
            if fault.doctor:
                assert row.doctor["exit"] == EXITS[name], f"{name}: the doctor differs; {row}"
                assert row.doctor["wrong"], row
