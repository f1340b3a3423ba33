"""Search all states of small clusters from a shell.

``python -m tests.search --ballots 3 --slots 2`` walks, one after the other, every order in which
three voters may own three ballots. Exit code 0: nothing was violated. 1: something was; its
shortest schedule is printed.
"""

from __future__ import annotations

import argparse
import sys

from tests.search.explore import explore
from tests.search.model import Bounds, Model, orders


def main() -> int:
    """Parse, search, print one line per order."""
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    parser.add_argument("--ballots", type=int, default=3, help="ballots, the first leader's too")
    parser.add_argument("--slots", type=int, default=2, help="slots that are decided")
    parser.add_argument("--order", default="", help="only this order of owners, e.g. ABC")
    parser.add_argument("--blank", action="store_true", help="start from formatted disks")
    parser.add_argument("--lag", choices=("leader", "all"), default="leader", help="see model.py")
    parser.add_argument("--pairs", action="store_true", help="leaders propose runs of two too")
    parser.add_argument("--commands", type=int, default=0, help="only ballots up to this propose")
    parser.add_argument("--depth", type=int, default=0, help="most actions in a row (0: all)")
    parser.add_argument("--cpu-s", type=float, default=0, help="most seconds of CPU for an order")
    args = parser.parse_args()
    chosen = tuple("ABC".index(name) + 1 for name in args.order)
    for owners in (chosen,) if chosen else orders(args.ballots):
        bounds = Bounds(owners, args.slots, not args.blank, args.lag, args.pairs, args.commands)
        report = explore(
            Model(bounds),
            depth_max=args.depth,
            cpu_s_max=args.cpu_s,
            progress=lambda line, bounds=bounds: print(
                f"\r\033[K{bounds}: {line}", end="", file=sys.stderr, flush=True
            ),
        )
        print("\r\033[K", end="", file=sys.stderr)
        print(report.story() if report.violation else report, flush=True)
        if report.violation:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
