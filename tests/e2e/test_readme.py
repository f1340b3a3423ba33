"""Every block of the README and of the API document does what it says.

The two set-up commands: see tests/test_house.py, and `.ci/run`, which runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import Child, LocalCluster, config_of, put
from tests.readme import API, blocks, run_block, shell_blocks
from voters.driver import open_driver

VENV = Path(sys.executable).parent.parent


def test_no_block_is_left_out():
    assert len(shell_blocks()) == 3
    assert len(blocks("python")) == 1


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
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=30) as driver:
            slot = await put(driver, "any", "thing")
        script = tmp_path / "engine.py"
        script.write_text(blocks("python")[0].replace("rex/", f"{tmp_path}/rex/"))
        engine = Child("engine", [sys.executable, "-u", script], tmp_path / "engine.log", {})
        try:
            found = engine.wait_for_line(r"None as of slot (\d+)", 30)
            assert int(found.group(1)) >= slot
        finally:
            engine.kill()


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
