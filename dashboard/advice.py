"""What a view means, and what to do: this module alone holds the dashboard's knowledge.

The verdict line, the Explain screen and ``trex doctor`` all say what is here, so they never differ.
Pure: everything is derived from a :class:`~dashboard.view.View`, whose ``now_ms`` is the time.
The one rule above all: never "healthy" unless it is known to be so now.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

from dashboard.view import View

Level: TypeAlias = Literal["ok", "note", "warn", "bad"]
LEVELS: Final[tuple[Level, ...]] = ("ok", "note", "warn", "bad")
"""Ascending. "note": worth knowing; "warn": less is left to lose; "bad": it does not work."""
SIGNS: Final[dict[Level, str]] = {"ok": "✓", "note": "·", "warn": "!", "bad": "✗"}
"""Beside each level's colour: no colour is needed for meaning."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is so. ``code`` is a stable name ("quorum", "voter_silent", …), ``subject``
    whom it is about ("cluster", "voter 3", "listener cache-17", "here"), ``words`` what is so,
    ``advice`` what to do ("" if nothing)."""

    level: Level
    code: str
    subject: str
    words: str
    advice: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """The first line of the screen: "healthy: voter 3 leads since ballot 0.17.3, can lose 2 more".
    ``state`` is "healthy", "degraded", "no leader", "no quorum" or "unknown" (nothing fresh is
    heard here); ``leader`` 0 when none is known now."""

    level: Level
    state: str
    words: str
    leader: int
    can_lose: int


def findings(view: View) -> tuple[Finding, ...]:
    """Everything worth saying, the worst first."""
    raise NotImplementedError


def verdict(view: View) -> Verdict:
    """The one line."""
    raise NotImplementedError


def explain_voter(view: View, voter: int) -> str:
    """What this voter is doing, what its numbers mean and what to do, as Markdown."""
    raise NotImplementedError


def explain_ballot(view: View, ballot: str) -> str:
    """What this ballot ("era.round.voter") is, who led under it and when, as Markdown."""
    raise NotImplementedError


def explain_slot(view: View, slot: int) -> str:
    """What this slot holds, who has accepted it, whether it is fixed, as Markdown."""
    raise NotImplementedError


def explain_listener(view: View, name: str, instance: int) -> str:
    """How this listener is doing and what to do, as Markdown."""
    raise NotImplementedError
