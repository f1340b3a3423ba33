"""Many worlds in several processes, and what they went through in sum."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from functools import partial

from tests.simulator.observer import Violation
from tests.simulator.options import draw
from tests.simulator.world import World

CHUNK_SEEDS = 10


def run_one(seed: int, events: int) -> tuple[Counter[str], str]:
    """The counts of one history, and what was violated ("" for nothing)."""
    world = World(seed, draw(seed, events))
    try:
        world.run()
    except Violation as violation:
        return world.counts, str(violation)
    counts = world.counts
    counts["worst_elections_to_leader"] = round(world.elections_to_leader)
    counts["worst_elections_to_well"] = round(world.elections_to_well)
    return counts, ""


def run_seeds(first: int, count: int, events: int, jobs: int = 2) -> tuple[Counter[str], list[str]]:
    """Sums over all seeds (maxima for names with "worst"), and the violations."""
    totals: Counter[str] = Counter()
    failures = []
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        seeds = range(first, first + count)
        for counts, failure in pool.imap_unordered(
            partial(run_one, events=events), seeds, CHUNK_SEEDS
        ):
            for name, number in counts.items():
                if name.startswith("worst"):
                    totals[name] = max(totals[name], number)
                else:
                    totals[name] += number
            totals["seeds"] += 1
            if failure:
                failures.append(failure)
    return totals, failures


def summary(totals: Counter[str], seconds: float) -> str:
    """The totals as text."""
    lines = [f"{name:>32} {number:>12,}" for name, number in sorted(totals.items())]
    rate = totals["events"] / seconds
    lines.append(f"{totals['seeds']} seeds in {seconds:.1f} s: {rate:,.0f} events/s")
    return "\n".join(lines)
