"""The README's shell blocks, as the tests and CI run them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def shell_blocks() -> list[str]:
    """The text of each ``sh`` block, in order."""
    return [
        block.strip()
        for block in re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    ]
