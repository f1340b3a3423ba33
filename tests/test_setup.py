"""The README's two commands do all set-up, each alone, in a bare clone. (CI runs them whole.)"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.readme import run_block, shell_blocks

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "*.egg-info", "build")


@pytest.fixture
def clone(tmp_path):
    """The sources as a fresh clone would hold them, with nothing set up."""
    return Path(shutil.copytree(ROOT, tmp_path / "clone", ignore=LEFT_OUT))


def test_the_test_command_sets_up_a_bare_clone(clone):
    """The second block, in a clone without .venv; of the tests themselves only the list is made."""
    output = run_block(shell_blocks()[1], clone, PYTEST_ADDOPTS="--collect-only -q -n 0")
    assert "test_setup.py" in output
    assert (clone / ".venv" / "bin" / "trex").exists()


def test_the_demo_command_sets_up_a_bare_clone():
    """The first block differs from the second one in two words only: what it installs (less) and
    what it then runs (``trex demo``, see test_demo.py)."""
    demo, tests = shell_blocks()[:2]
    assert tests.replace("-e '.[dev]'", "-e .").replace("just test", "trex demo") == demo
