"""Trials on real processes for a while, from a shell, with their figures.

``python -m tests.linear --minutes 30`` takes one sort of harm after another, with three voters and
with five, until the time is over. What is not possible here is left out, and why is said.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import anyio

from tests.linear import clock, hosts, nemesis
from tests.linear.machines import Machines
from tests.linear.nemesis import Harm
from tests.linear.trial import run_trial

SLOW_ELECTIONS = {"election_ticks_min": 150, "election_ticks_max": 250}
TRIAL_S = 120.0


async def _trial(folder: Path, name: str, voters: int, seed: int, until_s: float) -> None:
    harms: dict[str, tuple[Harm, ...]] = {
        "processes": nemesis.PROCESSES,
        "resets": nemesis.RESETS,
        "networks": nemesis.NETWORKS,
        "clocks": nemesis.CLOCKS,
    }
    clocks = name == "clocks"
    with Machines(
        folder,
        voters,
        apart=name == "networks",
        clocks=clocks,
        cut=name == "resets",
        timing=SLOW_ELECTIONS if clocks else None,
    ) as machines:
        figures = await run_trial(
            machines, harms[name], operations=1000, seed=seed, until_s=until_s
        )
    print(figures, flush=True)
    if name == "resets":
        seen = (figures.resets, figures.resets_stored, figures.installed)
        assert all(seen), f"somebody never had a snapshot: {seen}"


def main() -> int:
    """Exit code 0: every promise was kept. 1: one was not; the directory of that trial is kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.linear", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for so long, about")
    parser.add_argument("--only", default="", help="processes, resets, networks or clocks alone")
    parser.add_argument("--voters", type=int, default=0, help="so many voters alone")
    parser.add_argument("--seed", type=int, default=0, help="what the clients of the first do")
    args = parser.parse_args()
    absent = {"networks": hosts.why_not(), "clocks": clock.why_not()}
    for name, why in absent.items():
        if why:
            print(f"{name} are left out: {why}")
    sorts = [
        (name, voters)
        for name in ("processes", "resets", "networks", "clocks")
        for voters in (3, 5)
        if not absent.get(name) and args.only in ("", name) and args.voters in (0, voters)
    ]
    end_s = time.monotonic() + 60 * args.minutes
    trials = 0
    for name, voters in itertools.cycle(sorts):
        left_s = end_s - time.monotonic()
        if trials and left_s <= 0:
            break
        seed = args.seed + trials
        trials += 1
        print(f"--- {name}, {voters} voters, seed {seed}", flush=True)
        share_s = min(TRIAL_S, max(0.0, left_s / max(1, len(sorts) - trials + 1)))
        with tempfile.TemporaryDirectory(
            prefix="trex-linear-", ignore_cleanup_errors=True
        ) as scratch:
            try:
                until_s = time.monotonic() + share_s
                anyio.run(_trial, Path(scratch), name, voters, seed, until_s)
            except Exception:  # noqa: BLE001 - told, and the trial's directory kept
                traceback.print_exc()
                kept = f"{scratch}-failed"
                os.rename(scratch, kept)  # noqa: PTH104 - a whole directory
                print(f"broken; the files of the trial are in {kept}")
                return 1
    print(f"{trials} trials, every promise kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
