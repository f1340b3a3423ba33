"""Each case of ``tests/scenarios/*.json``: one step, and exactly what follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.core.scenarios import play

FOLDER = Path(__file__).parent.parent / "scenarios"
CASES = [
    pytest.param(case, id=case["name"].split(":")[0])
    for path in sorted(FOLDER.glob("*.json"))
    for case in json.loads(path.read_text()).get("cases", ())
]


@pytest.mark.parametrize("case", CASES)
def test_scenario(case: dict[str, Any]) -> None:
    got = play(case)
    assert got["records"] == case.get("records", []), case["name"]
    assert got["sends"] == sorted(case.get("sends", []), key=repr), case["name"]
    assert got["fixed"] == case.get("fixed", []), case["name"]
    assert got["then"] == case["then"], case["name"]


def test_each_case_has_a_name_of_its_own_and_names_what_follows() -> None:
    names = [param.id for param in CASES]
    assert len(set(names)) == len(names)
    assert len(names) >= 65
    for param in CASES:
        (case,) = param.values
        assert set(case) <= {"name", "given", "when", "records", "sends", "fixed", "then"}
        assert case["then"], f"{case['name']}: name at least one field of the state afterwards"
