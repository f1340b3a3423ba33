"""Run simulated worlds from a shell: one seed with a trace, or many without.

``python -m tests.simulator --seed 7 --trace`` replays one history, one line per event.
``python -m tests.simulator --seeds 100000`` runs many, in as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.simulator.observer import Violation
from tests.simulator.options import draw
from tests.simulator.swarm import run_seeds, summary
from tests.simulator.world import World


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
    totals, failures = run_seeds(args.seed, args.seeds, args.events, args.jobs)
    print(summary(totals, time.monotonic() - began))
    for failure in failures[:3]:
        print(failure)
    print(f"{len(failures)} of {args.seeds} seeds failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
