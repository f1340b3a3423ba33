"""The code blocks of the documents, as the tests and CI run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
API = README.parent / "docs" / "api.md"


def blocks(language: str, document: Path = README) -> list[str]:
    """The text of each block in ``language``, in order."""
    pattern = rf"^```{language}\n(.*?)^```"
    found = re.findall(pattern, document.read_text(), re.MULTILINE | re.DOTALL)
    return [block.strip() for block in found]


def shell_blocks() -> list[str]:
    """The text of each ``sh`` block, in order."""
    return blocks("sh")


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
