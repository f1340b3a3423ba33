"""The whole flood from a shell: ``python -m tests.adversary --datagrams 1000000``.

Prints a line of progress every few seconds, and at the end how often each kind was dropped, where
and why. Exit code 1 if anything was taken, not counted, or counted under a wrong reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import anyio

from tests.adversary.arena import Violation, open_arena
from tests.adversary.hostile import KINDS

PROGRESS_S = 5.0
WINDOW_DATAGRAMS = 256
"""As many as the kernel holds for most doors, so that the time goes into them."""


async def flood(seed: int, datagrams: int) -> None:
    """Flood, and print. Raises :class:`Violation`."""
    with tempfile.TemporaryDirectory(prefix="trex-adversary-") as scratch:
        async with open_arena(Path(scratch), seed) as arena:
            began_s = told_s = time.monotonic()
            committed = len(arena.acknowledged)

            def tell(sent: int) -> None:
                nonlocal told_s
                now_s = time.monotonic()
                if now_s - told_s >= PROGRESS_S:
                    told_s = now_s
                    writes = len(arena.acknowledged) - committed
                    print(f"{sent:>9,} datagrams, {writes:,} writes, {now_s - began_s:.0f} s")

            await arena.flood(datagrams, WINDOW_DATAGRAMS, tell)
            took_s = time.monotonic() - began_s
            committed = len(arena.acknowledged) - committed
        if not committed:
            raise Violation(f"seed {seed}: nothing was committed meanwhile")
        for kind in KINDS:
            print(f"{kind}: {arena.sent[kind]:,} sent")
            for (name, where, reason), number in sorted(arena.totals.items()):
                if name == kind:
                    print(f"    {where:<7} {reason:<12} {number:>9,}")
        reasons: Counter[str] = Counter()
        for (_, _, reason), number in arena.totals.items():
            reasons[reason] += number
        print("by reason:", ", ".join(f"{name} {n:,}" for name, n in reasons.most_common()))
        print(
            f"{arena.sent.total():,} datagrams in {took_s:.0f} s, heard {reasons.total():,} times: "
            f"none believed, each counted; {committed:,} writes meanwhile, each as acknowledged"
        )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversary", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="what is tried depends on it")
    parser.add_argument("--datagrams", type=int, default=1_000_000, help="how many are sent")
    asked = parser.parse_args()
    try:
        anyio.run(flood, asked.seed, asked.datagrams, backend_options={"use_uvloop": True})
    except Violation as violation:
        print(violation)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
