"""Histories of several voters, played letter by letter, with the limits as they are and with small
ones."""

from __future__ import annotations

import pytest

from tests.simulator.mutants import small_core
from tests.simulator.schedules import SCHEDULES
from trex_core import paxos


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    SCHEDULES[name](paxos)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_with_small_limits(name):
    SCHEDULES[name](small_core())
