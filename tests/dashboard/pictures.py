"""Screens kept as SVG: a test compares, and says in lines of text where they differ.

``TREX_PICTURES=update`` writes them anew; look at each before it is kept.
"""

from __future__ import annotations

import difflib
import html
import os
import re
from pathlib import Path

from textual.app import App

FOLDER = Path(__file__).parent / "pictures"


def screen_text(app: App[object]) -> str:
    """What is on the screen, without colours."""
    strips = app.screen._compositor.render_strips()
    return "\n".join(strip.text.rstrip() for strip in strips)


def words_of(svg: str) -> list[str]:
    """The words of a picture, line by line, and the colours of each."""
    found = re.findall(r'<text class="[^"]*-(r\d+)"[^>]*>([^<]*)</text>', svg)
    return [f"{style} {html.unescape(text).rstrip()}" for style, text in found]


def assert_picture(app: App[object], name: str) -> None:
    """Requires that the screen is as kept in ``pictures/{name}.svg``."""
    kept = FOLDER / f"{name}.svg"
    svg = app.export_screenshot(title="trex-dash")
    svg = "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
    if os.environ.get("TREX_PICTURES") == "update":
        FOLDER.mkdir(exist_ok=True)
        kept.write_text(svg, encoding="utf-8")
        return
    assert kept.is_file(), f"no picture {name} is kept: TREX_PICTURES=update makes it"
    before = kept.read_text(encoding="utf-8")
    if svg == before:
        return
    lines = difflib.unified_diff(words_of(before), words_of(svg), "kept", "now", lineterm="", n=0)
    told = "\n".join(lines) or "the words are the same, the colours or places differ"
    raise AssertionError(f"the screen is not as in {kept.name}:\n{told}\n\n{screen_text(app)}")
