"""Every block of the README does what it says. (The first two, whole, are also what CI runs.)"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import Child, LocalCluster, config_of, put
from tests.readme import API, blocks, shell_blocks
from voters.driver import open_driver

ROOT = Path(__file__).parents[2]
VENV = Path(sys.executable).parent.parent
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "*.egg-info", "build")


@pytest.fixture
def clone(tmp_path):
    """The sources as a fresh clone would hold them, with nothing set up."""
    return Path(shutil.copytree(ROOT, tmp_path / "clone", ignore=LEFT_OUT))


def run_block(block: str, cwd: Path, **environment: str) -> str:
    """Run a block as a person would type it; its output. Fails with it."""
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=240)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.communicate()
    assert shell.returncode == 0, output
    return output


def test_no_block_is_left_out():
    assert len(shell_blocks()) == 3
    assert len(blocks("python")) == 1


def test_the_test_command_sets_up_a_bare_clone(clone):
    """The second block, in a clone without .venv; of the tests themselves only the list is made."""
    output = run_block(shell_blocks()[1], clone, PYTEST_ADDOPTS="--collect-only -q -n 0")
    assert "test_readme.py::test_no_block_is_left_out" in output
    assert (clone / ".venv" / "bin" / "trex").exists()


def test_a_cluster_of_your_own(tmp_path):
    (tmp_path / ".venv").symlink_to(VENV)
    output = run_block(shell_blocks()[2], tmp_path)
    assert output.count("colour") >= 3
    assert output.count("green") >= 3
    assert "node-1" in output
    assert "leads" in output


async def test_the_embedded_listener(tmp_path):
    with LocalCluster(tmp_path / "rex", 3) as cluster:
        cluster.start_voters()
        async with open_driver(config_of(cluster), deadline_s=30) as driver:
            slot = await put(driver, "any", "thing")
        script = tmp_path / "engine.py"
        script.write_text(blocks("python")[0].replace("rex/", f"{tmp_path}/rex/"))
        engine = Child("engine", [sys.executable, "-u", script], tmp_path / "engine.log", {})
        try:
            found = engine.wait_for_line(r"None as of slot (\d+)", 30)
            assert int(found.group(1)) >= slot
        finally:
            engine.kill()


def test_the_demo_command_sets_up_a_bare_clone():
    """The first block differs from the second one in two words only: what it installs (less) and
    what it then runs (``trex demo``, see test_demo.py)."""
    demo, tests = shell_blocks()[:2]
    assert tests.replace("-e '.[dev]'", "-e .").replace("just test", "trex demo") == demo


def test_each_program_of_the_api_runs(tmp_path):
    with LocalCluster(tmp_path / "rex", 3) as cluster:
        cluster.start_voters()
        programs = blocks("python", API)
        assert len(programs) == 3
        for number, program in enumerate(programs):
            script = tmp_path / f"program-{number}.py"
            script.write_text(program)
            ran = subprocess.run(
                [sys.executable, "-W", "error", script],
                env={**os.environ, **cluster.environment},
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert ran.returncode == 0, ran.stdout + ran.stderr
            assert ran.stdout
