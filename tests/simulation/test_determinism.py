"""The same seed is the same history, whatever Python's hash seed is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def digests(hash_seed: str) -> str:
    command = [sys.executable, "-m", "tests.simulator", "--digest", "--seed", "3", "--seeds", "8"]
    done = subprocess.run(
        [*command, "--events", "1200"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_same_history_under_two_hash_seeds():
    first = digests("1")
    assert len(first.splitlines()) == 8
    assert len({line.split()[1] for line in first.splitlines()}) == 8, "seeds are alike"
    assert digests("2") == first


def test_a_violation_prints_the_command_that_replays_it():
    from tests.simulator.mutants import MUTANTS, load
    from tests.simulator.observer import Violation
    from tests.simulator.options import draw
    from tests.simulator.world import World
    from trex_core import paxos

    mutant = next(m for m in MUTANTS if m.name == "forgotten-promise")
    words = []
    for _ in range(2):
        try:
            World(0, draw(0), core=load(paxos, "again", mutant.edits), check_steps=False).run()
        except Violation as violation:
            words.append(str(violation))
    assert len(words) == 2 and words[0] == words[1]
    assert ".venv/bin/python -m tests.simulator --seed 0 --trace" in words[0]


def test_trace_shows_one_line_per_event(capsys):
    from tests.simulator.options import Options
    from tests.simulator.world import World

    world = World(1, Options(events=300), trace=True).run()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == world.events
    assert any("Prepare" in line for line in lines)


def test_many_seeds_end_in_a_progress_line_and_totals(capsys, monkeypatch):
    from tests.simulator.__main__ import main

    command = ["simulator", "--seed", "5", "--seeds", "3", "--jobs", "1", "--events", "300"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    shown = capsys.readouterr()
    assert "3 of 3 seeds (100 %)" in shown.err
    assert "slots_fixed" in shown.out
    assert "0 of 3 seeds failed" in shown.out
