"""What is wrong is said, in time and as long as it is so: dashboard and doctor against real faults.

A slice of the matrix that ``benchmarks/faults.py`` measures whole.
"""

from __future__ import annotations

import pytest

from benchmarks.faults import FAULTS, measure, stage_in

SLICE = (
    "leader killed",
    "follower killed",
    "three followers killed: no quorum",
    "listener stopped (SIGSTOP)",
    "the dashboard's machine cut off from the stream",
)
EXITS = {
    "leader killed": {1, 4},  # 4 as long as nobody leads yet
    "follower killed": {1},
    "three followers killed: no quorum": {4},
    "listener stopped (SIGSTOP)": {1},
    "the dashboard's machine cut off from the stream": {1},
}


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_each_fault_is_said_in_time_never_hidden_and_over_when_healed(tmp_path):
    faults = {each.name: each for each in FAULTS}
    async with stage_in(tmp_path, listener_count=1) as stage:
        for name in SLICE:
            row = await measure(stage, faults[name], hold_s=1.0, whole=False)
            print(row)
            assert row.said_s is not None, f"{name}: never said; {row}"
            assert row.said_s <= row.bound_s, f"{name}: said late; {row}"
            assert row.looks > 0 and row.falsely_healthy == 0, f"{name}: hidden; {row}"
            assert row.well_s is not None, f"{name}: healed, but not well; {row}"
            assert row.doctor["exit"] in EXITS[name], f"{name}: the doctor says otherwise; {row}"
            assert row.doctor["wrong"], row
