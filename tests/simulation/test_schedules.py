"""Histories of several voters, played letter by letter."""

from __future__ import annotations

import pytest

from tests.simulator.schedules import SCHEDULES
from trex_core import paxos


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    SCHEDULES[name](paxos)
