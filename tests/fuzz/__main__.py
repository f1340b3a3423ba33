"""Fuzz every decoder from a shell, and print what its cases came to.

``python -m tests.fuzz --cases 1000000`` gives each so many; ``--only NAME --case N`` is one again.
The process may take MEMORY_BYTES_MAX more memory than it has at its start: a decoder that believes
a length it was told fails there.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import Counter

from listeners.sql import contain_memory
from tests.fuzz.decoders import DECODERS, BrokenWordError, outcome

MEMORY_BYTES_MAX = 256 << 20


def main() -> int:
    """Exit code 0: every decoder kept its word. 1: one did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="cases of each decoder")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", default="", help="the decoders whose name holds this")
    parser.add_argument("--case", type=int, default=None, help="this case alone")
    args = parser.parse_args()
    first, count = (args.first, args.cases) if args.case is None else (args.case, 1)
    failures = total = 0
    contain_memory(MEMORY_BYTES_MAX)
    print(f"{'decoder':<26}{'cases':>9}{'µs each':>9}{'slowest ms':>11}  outcomes")
    for name in DECODERS:
        if args.only not in name:
            continue
        counts: Counter[str] = Counter()
        since, slowest_s = time.process_time(), 0.0
        for number in range(first, first + count):
            began = time.process_time()
            try:
                counts[outcome(name, number)] += 1
            except BrokenWordError as failed:
                counts["FAILED"] += 1
                failures += 1
                if counts["FAILED"] <= 3:
                    print(failed, file=sys.stderr)
            slowest_s = max(slowest_s, time.process_time() - began)
        each_us = (time.process_time() - since) / max(1, count) * 1e6
        told = ", ".join(f"{what} {times}" for what, times in counts.most_common())
        print(f"{name:<26}{count:>9}{each_us:>9.0f}{slowest_s * 1e3:>11.1f}  {told}", flush=True)
        total += count
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{total} cases, {failures} failures, at most {peak_mb} MB of memory")
    return 1 if failures or not total else 0


if __name__ == "__main__":
    sys.exit(main())
