"""The code blocks of the documents, as the tests and CI run them."""

from __future__ import annotations

import re
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
