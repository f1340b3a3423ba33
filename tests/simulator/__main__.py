"""Run simulated worlds from a shell: one seed with a trace, or many without.

``python -m tests.simulator --seed 7 --trace`` replays one history, one line per event.
``python -m tests.simulator --seeds 100000`` runs many, in as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

from tests.simulator.observer import Violation
from tests.simulator.options import draw
from tests.simulator.swarm import run_seeds, summary
from tests.simulator.world import World

LINE_EVERY_S = 5.0
"""How often the progress line is written where it is not a terminal."""


class Progress:
    """One line on how far a long run is: overwritten on a terminal, now and then elsewhere."""

    def __init__(self, seeds: int, began: float) -> None:
        self.seeds = seeds
        self.began = began
        self.told = 0
        self.terminal = sys.stderr.isatty()
        self.every_s = 0.5 if self.terminal else LINE_EVERY_S
        self.due = began + self.every_s

    def __call__(self, totals: Counter[str], failures: list[str]) -> None:
        """``totals`` so far, and what was violated: told at once."""
        now, done = time.monotonic(), totals["seeds"]
        for failure in failures[self.told :]:
            print(failure, file=sys.stderr, flush=True)
        self.told = len(failures)
        if now < self.due and done < self.seeds:
            return
        self.due = now + self.every_s
        spent_s = now - self.began
        left_s = spent_s / done * (self.seeds - done)
        print(
            f"{done:,} of {self.seeds:,} seeds ({100 * done // self.seeds} %), "
            f"{totals['events']:,} events ({totals['events'] / spent_s:,.0f}/s), "
            f"{totals['slots_fixed']:,} slots, {self.told} failed, {left_s:,.0f} s to go",
            end="\r" if self.terminal and done < self.seeds else "\n",
            file=sys.stderr,
            flush=True,
        )


def main() -> int:
    """Exit code 0: nothing was violated. 1: something was; the seed is printed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the seed, or the first of them")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--events", type=int, default=2_000, help="events of the safety phase")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--trace", action="store_true", help="one line per event (one seed)")
    parser.add_argument("--digest", action="store_true", help="print the digest of each history")
    args = parser.parse_args()
    if args.seeds == 1 or args.digest:
        for seed in range(args.seed, args.seed + args.seeds):
            try:
                world = World(seed, draw(seed, args.events), trace=args.trace).run()
            except Violation as violation:
                print(violation)
                return 1
            print(seed, world.result(), "" if args.digest else json.dumps(world.counts))
        return 0
    began = time.monotonic()
    progress = Progress(args.seeds, began)
    totals, failures = run_seeds(args.seed, args.seeds, args.events, args.jobs, progress)
    print(summary(totals, time.monotonic() - began))
    print(f"{len(failures)} of {args.seeds} seeds failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
