"""Many worlds in several processes, and what they went through in sum."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

from tests.simulator.observer import Violation
from tests.simulator.options import draw, switched_on
from tests.simulator.world import World

CHUNK_SEEDS = 10


def run_one(seed: int, events: int) -> tuple[Counter[str], str]:
    """The counts of one history, and what was violated ("" for nothing)."""
    options = draw(seed, events)
    world = World(seed, options)
    world.counts.update(switched_on(options))
    try:
        world.run()
    except Violation as violation:
        return world.counts, str(violation)
    counts = world.counts
    if world.core_only:
        counts["worst_ticks_to_commit_of_a_core"] = world.commit_after_ticks
    counts["worst_elections_to_leader"] = round(world.elections_to_leader)
    counts["worst_elections_to_well"] = round(world.elections_to_well)
    return counts, ""


def run_seeds(
    first: int,
    count: int,
    events: int,
    jobs: int = 1,
    progress: Callable[[Counter[str], list[str]], None] = lambda _, __: None,
) -> tuple[Counter[str], list[str]]:
    """Sums over all seeds (maxima for names with "worst"), and the violations. After each seed
    ``progress`` is called with the sums so far and the violations.

    One job is this process. More are processes of their own, spawned: a fork of a process that has
    threads and signal handlers, as one that runs tests has, may never end.
    """
    totals: Counter[str] = Counter()
    failures = []
    seeds = range(first, first + count)
    one = partial(run_one, events=events)
    with ExitStack() as stack:
        outcomes: Iterable[tuple[Counter[str], str]] = map(one, seeds)
        if jobs > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs))
            outcomes = pool.imap_unordered(one, seeds, CHUNK_SEEDS)
        for counts, failure in outcomes:
            for name, number in counts.items():
                if name.startswith("worst"):
                    totals[name] = max(totals[name], number)
                else:
                    totals[name] += number
            totals["seeds"] += 1
            if failure:
                failures.append(failure)
            progress(totals, failures)
    return totals, failures


def summary(totals: Counter[str], seconds: float) -> str:
    """The totals as text."""
    lines = [f"{name:>34} {number:>12,}" for name, number in sorted(totals.items())]
    rate = totals["events"] / seconds
    lines.append(f"{totals['seeds']} seeds in {seconds:.1f} s: {rate:,.0f} events/s")
    return "\n".join(lines)
