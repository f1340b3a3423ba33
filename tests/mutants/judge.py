"""A plugin of pytest that says of each failed test whether it failed by a claim of its own.

This module alone tells a test that noticed a mutant from a program that merely broke. It runs in
the pytest that ``tree`` starts, and writes one line of JSON for each phase of each test.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.tree import REPORT, SUSPECT

CLAIMS = frozenset({"AssertionError", "Failed", "InvariantViolation", "Violation"})
"""Errors that say "this must not be": of tests, of the invariants, of the simulator's observer."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group, or the one."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


def is_claim(error: BaseException) -> bool:
    """Whether the test said so, rather than that something broke or never ended."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & CLAIMS) and not str(error).startswith("Timeout ")


def elsewhere() -> str:
    """The file that was tested instead of the mutant; "" if none was."""
    wanted = os.environ[SUSPECT]
    if not wanted:
        return ""
    path = Path(wanted)
    ours = [
        module
        for name, module in list(sys.modules.items())
        if name.endswith(f"{path.parent.name}.{path.stem}")
    ]
    files = {str(getattr(module, "__file__", "")) for module in ours}
    return "" if not files or wanted in files else min(files)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Note what became of it."""
    report = yield
    error = call.excinfo.value if call.excinfo is not None else None
    if isinstance(error, pytest.skip.Exception):
        error = None
    found = list(leaves(error)) if error is not None else []
    told = next((each for each in found if is_claim(each)), error)
    with Path(os.environ[REPORT]).open("a") as file:
        line = {
            "test": item.nodeid,
            "phase": "skipped" if report.skipped else call.when,
            "error": type(told).__name__ if told is not None else "",
            "words": " ".join(str(told).split())[:160] if told is not None else "",
            "claim": call.when == "call" and told is not None and is_claim(told),
            "elsewhere": elsewhere(),
        }
        file.write(json.dumps(line) + "\n")
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A test that cannot even be read has noticed nothing."""
    if report.failed:
        line = {
            "test": report.nodeid,
            "phase": "collect",
            "error": "CollectError",
            "words": str(report.longrepr).strip().splitlines()[-1][:160],
            "claim": False,
            "elsewhere": "",
        }
        with Path(os.environ[REPORT]).open("a") as file:
            file.write(json.dumps(line) + "\n")
