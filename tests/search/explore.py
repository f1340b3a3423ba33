"""Walk all states of a model, breadth first, so that what is found wrong is found in fewest steps.

This module alone keeps what was visited (16-byte digests of states), the way back from each
state, and the figures; what a state is and what may happen in it is ``model``'s.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable
from hashlib import blake2b

import msgspec

from tests.search.model import Action, Model, Names, Violation, World
from tests.search.words import tell


class Report(msgspec.Struct):
    """What a search did. ``depth`` counts actions from the first state; ``complete``: nothing was
    left unvisited. ``violation`` and ``schedule``: what was found wrong, and the way to it."""

    bounds: str
    depth_max: int = 0
    states: int = 0
    transitions: int = 0
    depth: int = 0
    steps: int = 0
    locals: int = 0
    letters: int = 0
    cpu_s: float = 0.0
    complete: bool = False
    violation: str = ""
    schedule: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()

    def __str__(self) -> str:
        end = "not all"
        if self.complete:
            within = f" within {self.depth_max} actions" if self.depth_max else ""
            end = f"all reachable states{within}"
        if self.violation:
            end = f"violated in {len(self.schedule)} actions"
        return (
            f"{self.bounds}: {end}: {self.states:,} states, {self.transitions:,} transitions, "
            f"depth {self.depth}, {self.steps:,} calls of step, {self.locals:,} states of a voter, "
            f"{self.letters:,} letters, {self.cpu_s:.1f} s of CPU"
        )

    def story(self) -> str:
        """The violation and its schedule, for a person."""
        lines = [f"{number:3d}. {line}" for number, line in enumerate(self.schedule, 1)]
        return "\n".join([str(self), *lines, f"  => {self.violation}"])


def digest(model: Model, world: World) -> bytes:
    """The name of a state; the books are not part of it."""
    (a, b, c), log, letters, _, _ = world
    letters &= ~model.beats
    number = ((letters << 24 | log) << 72) | a << 48 | b << 24 | c
    return blake2b(number.to_bytes((number.bit_length() + 7) // 8, "big"), digest_size=16).digest()


def explore(
    model: Model,
    *,
    states_max: int = 0,
    depth_max: int = 0,
    cpu_s_max: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Visit every state, or every state within ``depth_max`` actions, or until a bound is reached
    (0: none), or until something is violated. ``progress`` is told a line every few seconds."""
    began = time.process_time()
    report = Report(str(model.bounds), depth_max=depth_max)
    start = model.start()
    visited = {digest(model, start)}
    parents = array("l", [-1])
    actions = Names()
    doing = array("l", [-1])
    level = [(start, 0)]
    seen = 0
    told = began
    gc.disable()  # nothing here forms cycles, and to look for some among millions of states is slow
    try:
        while level and not (depth_max and report.depth >= depth_max):
            following: list[tuple[World, int]] = []
            for world, index in level:
                try:
                    for action, outcome, after in model.successors(world):
                        report.transitions += 1
                        seen |= outcome.labels
                        name = digest(model, after)
                        if name in visited:
                            continue
                        visited.add(name)
                        following.append((after, len(parents)))
                        parents.append(index)
                        doing.append(actions.number((action, outcome.local)))
                except Violation as violation:
                    report.violation = str(violation.args[0])
                    way: list[tuple[Action, int]] = []
                    at = index
                    while at > 0:
                        way.append(actions.things[doing[at]])
                        at = parents[at]
                    report.schedule = tell(model, start, way[::-1])
                    return report
                now = time.process_time()
                if progress is not None and now - told > 5:
                    told = now
                    progress(
                        f"depth {report.depth}, {len(visited):,} states, "
                        f"{len(level) + len(following):,} in two levels, {now - began:.0f} s"
                    )
                if (states_max and len(visited) >= states_max) or (
                    cpu_s_max and now - began > cpu_s_max
                ):
                    return report
            level = following
            report.depth += bool(following)
        report.complete = True
        return report
    finally:
        gc.enable()
        report.states = len(visited)
        report.steps = model.steps
        report.locals = len(model.locals)
        report.letters = len(model.letters)
        report.cpu_s = time.process_time() - began
        report.seen = tuple(
            sorted(text for n, text in enumerate(model.labels.things) if seen >> n & 1)
        )
