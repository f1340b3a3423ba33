"""All mutants of the real source, each against the test that must notice it; a table of them.

``python -m tests.mutants`` plays all, ``--only WORD ...`` those whose name or file holds one.
Exit code 0: each was killed. 1: one was not, or its test fails without it. 2: an edit does not fit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.catalogue import MUTANTS
from tests.mutants.tree import ROOT, EditError, Mutant, Tree, Verdict, mutated


def main() -> int:
    """Play, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="whose name or file holds one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    args = parser.parse_args()
    chosen = [
        each
        for each in MUTANTS
        if any(word in each.name or word in each.file for word in args.only)
    ]
    try:
        for mutant in chosen:
            mutated((ROOT / mutant.file).read_text(), mutant)
    except EditError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name:<47}{mutant.file:<28}{mutant.rule}")
        return 0
    return play(chosen, max(1, args.jobs))


def play(mutants: Sequence[Mutant], jobs: int) -> int:
    """Try each mutant out, ``jobs`` at a time; the exit code."""
    with tempfile.TemporaryDirectory(prefix="trex-mutants-") as folder:
        trees: SimpleQueue[Tree] = SimpleQueue()
        for job in range(jobs):
            trees.put(Tree(Path(folder) / str(job)))

        def pristine(tests: list[str]) -> dict[str, str]:
            tree = trees.get()
            try:
                return tree.pristine(tests)
            finally:
                trees.put(tree)

        def try_out(mutant: Mutant) -> Verdict:
            tree = trees.get()
            try:
                return tree.try_out(mutant)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            tests = sorted({mutant.test for mutant in mutants})
            print(f"{len(tests)} tests, first without any mutant", file=sys.stderr, flush=True)
            shares = [tests[job::jobs] for job in range(jobs)]
            wrong: dict[str, str] = {}
            for told in pool.map(pristine, [share for share in shares if share]):
                wrong.update(told)
            for test, why in sorted(wrong.items()):
                print(f"without any mutant: {test}: {why}", file=sys.stderr)
            if wrong:
                return 1
            print(f"{'mutant':<47}{'file':<28}{'outcome':<10}{'seconds':>8}  killed by")
            killed = 0
            for mutant, verdict in zip(mutants, pool.map(try_out, mutants), strict=True):
                killed += verdict.killed
                print(
                    f"{mutant.name:<47}{mutant.file:<28}{verdict.outcome:<10}"
                    f"{verdict.seconds:>8.1f}  {mutant.test}",
                    flush=True,
                )
                if not verdict.killed:
                    print(f"    it breaks: {mutant.rule}\n    {verdict.words}", flush=True)
    survived = len(mutants) - killed
    print(f"{len(mutants)} mutants, {killed} killed, {survived} survived")
    return 1 if survived or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
