"""The tool that tests the tests: its edits fit the source, and it tells a kill from all else.

A sample of what ``python -m tests.mutants`` plays in minutes; which mutants there are, and what
must notice each, stands in ``tests/mutants/catalogue.py``.
"""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache

import pytest
from msgspec.structs import replace

from tests.mutants.__main__ import play
from tests.mutants.catalogue import MUTANTS
from tests.mutants.tree import ROOT, EditError, Mutant, Tree, mutated

SAMPLE = ("D1", "retry-is-applied-again", "fsync-skipped", "end-is-not-verified")
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
KILLED = BY_NAME["quorum-one-too-small"]
WEIGHS = "        self.weights = dict(weights)\n"


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, kinds))


def test_every_edit_fits_and_every_test_named_is_there():
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text()
        for old, _ in mutant.edits:
            assert source.count(old) == 1, f"{mutant.name}: bring its edit up to {mutant.file}"
        file, _, test = mutant.test.partition("::")
        assert test.partition("[")[0] in functions(file), f"{mutant.name}: {mutant.test} is gone"
        assert mutant.rule


def test_there_are_many_each_with_a_name_of_its_own():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    assert len(MUTANTS) >= 200
    defects = {mutant.name.partition("-")[0] for mutant in MUTANTS}
    assert {f"D{number}" for number in range(1, 10)} <= defects


def test_a_sample_is_killed(tmp_path):
    tree = Tree(tmp_path)
    for name in SAMPLE:
        verdict = tree.try_out(BY_NAME[name])
        assert verdict.killed, f"{name}: {verdict.outcome}, {verdict.words}"
    for mutant in map(BY_NAME.get, SAMPLE):
        assert (tmp_path / mutant.file).read_bytes() == (ROOT / mutant.file).read_bytes()


def test_only_a_claim_kills(capsys):
    """A mutant that changes nothing a test could see, one that merely breaks the program, and one
    whose test is about another file have not been noticed; the exit code says so."""
    same = ((WEIGHS, "        self.weights = {**weights}\n"),)
    broken = ((WEIGHS, "        self.weights = weigths\n"),)
    mutants = [
        KILLED,
        replace(KILLED, name="unseen", edits=same),
        replace(KILLED, name="misspelt", edits=broken),
    ]
    assert play(mutants, 1) == 1
    lines = capsys.readouterr().out.splitlines()
    outcomes = [line.split()[2] for line in lines[1:-1] if not line.startswith("    ")]
    assert outcomes == ["killed", "survived", "broken"]
    assert "NameError" in "\n".join(lines)
    assert lines[-1] == "3 mutants, 1 killed, 2 survived"


def test_a_test_that_fails_or_is_missing_without_a_mutant_proves_nothing(capsys):
    missing = replace(KILLED, test="tests/core/test_quorum.py::test_that_nobody_wrote")
    assert play([missing], 1) == 1
    assert "without any mutant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ((("no such text", ""),), "0 times, not once"),
        ((("self", "this"),), r"\d+ times, not once"),
        (((WEIGHS, WEIGHS + "        # another word\n"),), "changes nothing but words"),
        (((WEIGHS, "        self.weights = (\n"),), "does not compile"),
    ],
)
def test_an_edit_that_does_not_fit_fails_loudly(edits, words):
    mutant = Mutant("misfit", "none", KILLED.file, edits, KILLED.test)
    with pytest.raises(EditError, match=words):
        mutated((ROOT / KILLED.file).read_text(), mutant)
