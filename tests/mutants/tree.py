"""Mutants of the real source: a copy of the tree, one edit in it, and the test that must notice.

This module alone changes sources, and only in a copy of its own: the working copy is never written.
A mutant is *killed* if its named test fails by a claim of its own (an assertion, ``pytest.fail``,
an invariant or a checker's violation). A test that passes, never ends, cannot be imported, or stops
at an error that claims nothing (a ``NameError``, say) has killed nobody.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

ROOT: Final = Path(__file__).parent.parent.parent
COPIED: Final = ("trex_core", "voters", "listeners", "dashboard", "tests")
PLUGINS: Final = ("anyio.pytest_plugin", "pytest_timeout", "tests.mutants.judge")
"""All that the named tests need of pytest; to load the others takes longer than most tests."""
PASS_S_MAX: Final = 60.0
"""Longest that a named test may take, in seconds, on a machine that has other things to do."""
START_S_MAX: Final = 30.0
"""Longest that it may take to be started and to end."""
REPORT: Final = "TREX_MUTANT_REPORT"
SUSPECT: Final = "TREX_MUTANT_FILE"


class EditError(ValueError):
    """An edit does not fit the source any more: it would be a mutant of nothing."""


class Mutant(msgspec.Struct, frozen=True):
    """``rule`` is what it breaks, in words; each of ``edits`` (text found exactly once in ``file``,
    its replacement) is applied; ``test`` is the pytest node that must fail then. ``dies_of`` names
    an error of the product that counts as a claim: of a test that says "this is let pass"."""

    name: str
    rule: str
    file: str
    edits: tuple[tuple[str, str], ...]
    test: str
    dies_of: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """What became of a mutant: ``outcome`` is "killed" or what else happened, ``words`` why."""

    outcome: str
    words: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether the named test noticed."""
        return self.outcome == "killed"


def mutated(source: str, mutant: Mutant) -> str:
    """``source`` with the edits of ``mutant``. Raises :class:`EditError`."""
    after = source
    for old, new in mutant.edits:
        found = after.count(old)
        if found != 1:
            raise EditError(
                f"mutant {mutant.name}: in {mutant.file} {found} times, not once:\n{old}\n"
                "Bring the edit up to the source, or take the mutant out if the rule is gone."
            )
        after = after.replace(old, new)
    try:
        changed = ast.dump(ast.parse(after)) != ast.dump(ast.parse(source))
        compile(after, mutant.file, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise EditError(f"mutant {mutant.name} does not compile: {error}") from error
    if not changed:
        raise EditError(f"mutant {mutant.name} changes nothing but words")
    return after


class Tree:
    """A copy of the sources and tests in ``folder``, in which one mutant at a time lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        for name in COPIED:
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy2(ROOT / "pyproject.toml", folder)
        self._runs = 0

    def pristine(self, tests: Sequence[str]) -> dict[str, str]:
        """Run the tests without any mutant, in the very setting in which mutants are run. What is
        wrong, by test; nothing if all pass."""
        reports, words, _ = self._run(list(tests), first_only=False)
        wrong = {
            each["test"]: f"{each['error']}: {each['words']}" for each in reports if each["error"]
        }
        for test in tests:
            ran = [
                each for each in reports if each["phase"] == "call" and _is_of(each["test"], test)
            ]
            if not ran and test not in wrong:
                wrong[test] = f"it did not run: {words}"
        return wrong

    def try_out(self, mutant: Mutant) -> Verdict:
        """Run the named test against ``mutant``. Raises :class:`EditError`."""
        path = self.folder / mutant.file
        pristine = path.read_text()
        path.write_text(mutated(pristine, mutant))
        self._forget(path)
        began = time.monotonic()
        try:
            reports, words, ended = self._run([mutant.test], suspect=mutant.file)
        finally:
            path.write_text(pristine)
            self._forget(path)
        took_s = time.monotonic() - began
        failed = next((each for each in reports if each["error"]), None)
        if failed is None:
            passed = any(each["phase"] == "call" for each in reports)
            outcome = "endless" if not ended else "survived" if passed else "not run"
            return Verdict(outcome, words, took_s)
        told = f"{failed['error']}: {failed['words']}"
        if failed["elsewhere"]:
            return Verdict("not loaded", f"{failed['elsewhere']} was tested instead", took_s)
        noticed = failed["claim"] or (failed["phase"], failed["error"]) == ("call", mutant.dies_of)
        return Verdict("killed" if noticed else "broken", told, took_s)

    @staticmethod
    def _forget(path: Path) -> None:
        """What was compiled is of the other text, and may have its size and second."""
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()

    def _run(
        self, tests: list[str], *, first_only: bool = True, suspect: str = ""
    ) -> tuple[list[dict[str, str]], str, bool]:
        """What the tests came to, in order, the last words of the run, and whether it ended."""
        timeout_s = PASS_S_MAX * len(tests) + START_S_MAX
        self._runs += 1
        report = self.folder / f"report-{self._runs}"
        report.touch()
        command = [
            sys.executable, "-m", "pytest", "-q", "--tb=no", "--assert=plain",
            "-p", "no:cacheprovider",
            *(word for plugin in PLUGINS for word in ("-p", plugin)),
            f"--timeout={PASS_S_MAX}", f"--basetemp={self.folder / 'tmp'}",
            *(["-x"] if first_only else []), *tests,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),  # also of the processes that the tests start
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            REPORT: str(report),
            SUSPECT: str(self.folder / suspect) if suspect else "",
        }
        ended = True
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as run:  # fmt: skip
            try:
                told, _ = run.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                told, ended = f"still running after {timeout_s:.0f} s", False
            finally:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
        lines = told.strip().splitlines() or ["it said nothing"]
        return [json.loads(line) for line in report.read_text().splitlines()], lines[-1], ended


def _is_of(node: str, named: str) -> bool:
    """Whether the node that ran is the one named, or one of its cases."""
    return node == named or node.startswith((f"{named}[", f"{named}::"))
