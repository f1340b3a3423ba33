# ruff: noqa: E501 - the edits are lines of the sources
"""Broken variants of the core, to test the tests: each must be caught by what it names.

This module alone loads other versions of ``paxos`` and ``learner``: with a defect planted by editing
the source, or with small limits, so that parts, windows and chain checks that take thousands of slots
in production happen within a few. An edit whose text is not found exactly once fails loudly: a
mutant that no longer changes anything would be a hole that looks like a proof.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final

import msgspec

from trex_core import paxos

SMALL_LIMITS: Final = {
    "CHAIN_CHECK_SLOTS": 4,
    "PROMISE_PAIRS_MAX": 2,
    "RUN_SLOTS_MAX": 3,
    "WINDOW_SLOTS_MAX": 24,
    "FLIGHTS_MAX": 6,
    "RESEND_FLIGHTS_MAX": 2,
}
"""Limits under which everything that is cut into parts is cut within a few slots."""

Edit = tuple[str, str]


def load(
    module: ModuleType,
    name: str,
    edits: tuple[Edit, ...] = (),
    limits: dict[str, int] | None = None,
) -> ModuleType:
    """``module`` under another module object, edited."""
    path = Path(str(module.__file__))
    source = path.read_text()
    for old, new in edits:
        if source.count(old) != 1:
            raise LookupError(
                f"mutant {name}: in {path.name} {source.count(old)} times, not once:\n{old}"
            )
        source = source.replace(old, new)
    edited = ModuleType(f"{module.__name__}_{name}")
    exec(compile(source, f"{path.name} ({name})", "exec", dont_inherit=True), edited.__dict__)
    for limit, value in (limits or {}).items():
        if not hasattr(edited, limit):
            raise LookupError(f"{path.name} has no limit {limit}")
        setattr(edited, limit, value)
    return edited


@cache
def small_core() -> ModuleType:
    """The real core with :data:`SMALL_LIMITS`."""
    return load(paxos, "small", limits=SMALL_LIMITS)


class Mutant(msgspec.Struct, frozen=True):
    """A defect. The schedule ``schedule`` must catch it, and the swarm within ``seeds`` seeds; each
    if named. ``small``: under :data:`SMALL_LIMITS`."""

    name: str
    defect: str
    edits: tuple[Edit, ...]
    schedule: str = ""
    seeds: int = 0
    small: bool = False


MUTANTS: Final = (
    Mutant(
        "D1",
        "a leader told of a higher ballot raises its own without phase 1",
        (
            (
                "        if isinstance(role, Leader):\n            # At once,",
                (
                    "        if isinstance(role, Leader):\n"
                    "            ballot = Ballot(0, message.promised.round + 1, self.config.voter)\n"
                    "            self.promise(ballot)\n"
                    "            self.records.append(PromiseRecord(ballot))\n"
                    "            runs = tuple(Run(r.first, ballot, r.values)"
                    " for r in self.state.accepted)\n"
                    "            for r in runs:\n"
                    "                self.records.append(AcceptRecord(ballot, r.first, r.values))\n"
                    "            flights = tuple(_replace(f, votes=(), sent_tick=-99)"
                    " for f in role.flights)\n"
                    "            role = _replace(role, ballot=ballot, flights=flights,"
                    " counted=self.state.fixed + 1)\n"
                    "            self.set(role=role, accepted=runs)\n"
                    "            return\n"
                    "            # At once,"
                ),
            ),
        ),
        schedule="m1_no_ballot_is_raised_without_phase_one",
    ),
    Mutant(
        "D2",
        "a promise to an earlier attempt is counted",
        (
            (
                (
                    "        if not isinstance(role, Candidate) or message.ballot != role.ballot:\n"
                    "            return\n        last = message.last or None"
                ),
                (
                    "        if not isinstance(role, Candidate):\n"
                    "            return\n        last = message.last or None"
                ),
            ),
        ),
        schedule="stale_promise_is_not_counted",
    ),
    Mutant(
        "D3",
        "what a new leader proposes again never gets its own vote",
        (
            (
                "            self.send(self.config.voter, Accepted(role.ballot, first, last))\n\n",
                (
                    "            if role.beat:\n"
                    "                self.send(self.config.voter, Accepted(role.ballot, first, last))\n\n"
                ),
            ),
            (
                (
                    "                if voter == self.config.voter:\n"
                    "                    self.send(voter, Accepted("
                ),
                (
                    "                if voter == self.config.voter:\n"
                    "                    repr(Accepted("
                ),
            ),
        ),
        schedule="m8_leader_dies_leaving_unfixed_slots",
    ),
    Mutant(
        "D4",
        "a leader that yields to a higher Prepare keeps its promise to itself",
        (
            (
                (
                    "            self.yield_to(ballot)\n"
                    "            if isinstance(self.state.role, Polling):"
                ),
                (
                    "            self.yield_to(ballot)\n"
                    "            if isinstance(state.role, Leader | Candidate):\n"
                    "                return\n"
                    "            if isinstance(self.state.role, Polling):"
                ),
            ),
        ),
        schedule="leader_yields_with_a_promise",
    ),
    Mutant(
        "D5",
        "a candidate asks again for a slot that is fixed, is refused, and gives up",
        (
            (
                "self.send(voter, Prepare(role_now.ballot, missing))",
                "self.send(voter, Prepare(role_now.ballot, self.state.fixed or 1))",
            ),
            (
                "        if message.promised <= role.ballot:\n            return\n",
                (
                    "        if message.promised <= role.ballot:\n"
                    "            if isinstance(role, Candidate):\n"
                    "                self.follow(self.state.attempt + 1)\n"
                    "            return\n"
                ),
            ),
        ),
        schedule="lost_prepares_are_asked_again",
    ),
    Mutant(
        "D6",
        "a leader counts its own vote at once, before it is on its disk",
        (
            (
                "            self.send(self.config.voter, Accepted(role.ballot, first, last))\n\n",
                (
                    "            self.on_accepted("
                    "self.config.voter, Accepted(role.ballot, first, last))\n\n"
                ),
            ),
        ),
        seeds=20,
    ),
    Mutant(
        "accept-quorum-of-one",
        "one vote fixes a slot",
        (
            (
                "if self.config.quorums.accept(flight.votes) is not Tally.WIN:",
                "if not flight.votes:",
            ),
        ),
        schedule="m2_isolated_leader_rejoins",
        seeds=20,
    ),
    Mutant(
        "promise-quorum-of-one",
        "one promise makes a leader",
        (
            (
                "            complete = self.config.quorums.promise(voters) is Tally.WIN\n",
                "            complete = bool(voters)\n",
            ),
        ),
        schedule="one_promise_is_no_quorum",
    ),
    Mutant(
        "forgotten-promise",
        "a promise is not journalled",
        (
            (
                "            self.promise(ballot)\n            self.yield_to(ballot)\n",
                "            self.set(promised=ballot)\n            self.yield_to(ballot)\n",
            ),
        ),
        seeds=20,
    ),
    Mutant(
        "forgotten-accept",
        "an accept is not journalled",
        (
            (
                (
                    "            self.records.append(AcceptRecord(ballot, first, values))\n"
                    "            self.set(accepted=overlay(state.accepted, Run(first, ballot, values)))"
                ),
                "            self.set(accepted=overlay(state.accepted, Run(first, ballot, values)))",
            ),
        ),
        seeds=20,
    ),
    Mutant(
        "promise-does-not-bind",
        "an Accept below the promise is accepted",
        (
            (
                (
                    "        if ballot < self.state.promised:\n"
                    "            self.refuse(sender, ballot)\n"
                    "            return\n"
                    "        self.yield_to(ballot)\n"
                    "        self.hear(ballot, 0)"
                ),
                "        self.yield_to(ballot)\n        self.hear(ballot, 0)",
            ),
        ),
        seeds=60,
    ),
    Mutant(
        "leader-does-not-yield",
        "who promised a higher ballot leads on",
        (
            (
                (
                    "            self.yield_to(ballot)\n"
                    "            if isinstance(self.state.role, Polling):"
                ),
                "            if isinstance(self.state.role, Polling):",
            ),
        ),
        schedule="leader_yields_with_a_promise",
    ),
    Mutant(
        "fix-without-matching-ballot",
        "an announced slot is learned with whatever is held there",
        (
            (
                "exact = contiguous(state.accepted, first, tip.fixed, ballot)",
                "exact = contiguous(state.accepted, first, tip.fixed)",
            ),
        ),
        schedule="announcement_needs_the_very_ballot",
    ),
    Mutant(
        "fix-without-matching-chain",
        "an announced run is learned although its chain differs",
        (("            if chains[-1] == tip.chain:\n", "            if chains:\n"),),
        schedule="announcement_needs_the_very_ballot",
    ),
    Mutant(
        "lowest-ballot-value",
        "the value of the lowest ballot named is proposed again",
        (("        ballot = max(named)\n", "        ballot = min(named)\n"),),
        schedule="highest_ballot_wins",
    ),
    Mutant(
        "ignored-promised-value",
        "what the promises name is not proposed again",
        (("        plan = highest_named(done, first)\n", "        plan = ()\n"),),
        schedule="m8_leader_dies_leaving_unfixed_slots",
        seeds=20,
    ),
    Mutant(
        "empty-promise",
        "a Prepare at or below the fixed slot is promised, which hides what is fixed",
        (
            (
                "        if ballot < state.promised or state.fixed >= first:\n",
                "        if ballot < state.promised:\n",
            ),
        ),
        seeds=20,
    ),
    Mutant(
        "hidden-accepts",
        "a promise names nothing",
        (
            (
                "promise_parts(ballot, first, self.state.accepted)",
                "promise_parts(ballot, first, ())",
            ),
        ),
        seeds=20,
    ),
    Mutant(
        "ballot-used-twice",
        "the ballot is not journalled before its Prepare leaves",
        (
            (
                "        self.promise(ballot)\n        self.set(\n",
                "        self.set(promised=ballot)\n        self.set(\n",
            ),
        ),
        seeds=20,
    ),
    Mutant(
        "leader-never-steps-down",
        "a leader without a quorum leads on",
        (
            (
                "        if tick - role.quorum_tick > config.election_ticks_min:\n",
                "        if tick < role.quorum_tick:\n",
            ),
        ),
        schedule="cut_off_leader_steps_down",
    ),
    Mutant(
        "no-pre-vote",
        "who hears a leader says it does not",
        (
            (
                "        return state.leader != NO_BALLOT and fresh\n",
                "        return False\n",
            ),
        ),
        schedule="m3_isolated_voter_does_not_disturb",
    ),
    Mutant(
        "foreign-incarnation-counts",
        "a voter that was formatted again votes like any other",
        (
            (
                "        if expected is not None and event.incarnation != expected:\n",
                "        if False:\n",
            ),
        ),
        schedule="amnesia_is_fenced",
    ),
    Mutant(
        "old-boot-counts",
        "a voter whose disk was rolled back votes like any other",
        (("        if event.boot < known:\n", "        if False:\n"),),
        schedule="rolled_back_disk_is_fenced",
    ),
    Mutant(
        "first-election-by-majority",
        "the first election does not need every voter",
        (
            (
                "            complete = set(voters) == set(self.config.voters)\n",
                "            complete = self.config.quorums.promise(voters) is Tally.WIN\n",
            ),
            ("told[voter] for voter", "told.get(voter, 0) for voter"),
        ),
        schedule="amnesia_before_genesis",
    ),
    Mutant(
        "silent-holder-is-waited-for",
        "a candidate waits for ever for the value of a silent voter",
        (
            (
                (
                    "            if role.plan is not None and tick - role.fetch_tick >= "
                    "2 * self.config.retry_ticks:\n"
                ),
                "            if role.plan is not None and tick < role.fetch_tick:\n",
            ),
        ),
        schedule="silent_fetch_finds_another_quorum",
    ),
    Mutant(
        "counted-from-one",
        "a leader announces as its own count what it learned",
        (("                counted=first,\n", "                counted=1,\n"),),
        seeds=20,
    ),
    Mutant(
        "learned-becomes-accepted",
        "what is learned is journalled as if it had been accepted",
        (
            (
                "        self.records.append(LearnedRecord(state.fixed + 1, values, chains[-1]))\n",
                (
                    "        self.records.append("
                    "AcceptRecord(state.promised, state.fixed + 1, values))\n"
                    "        self.records.append(FixedRecord(state.fixed + len(values), chains[-1]))\n"
                ),
            ),
        ),
        seeds=20,
    ),
    Mutant(
        "part-counts-as-whole",
        "a promise of which a part is missing is counted",
        (
            (
                "    return any(a <= first and b == 0 for a, b in covered)\n",
                "    return bool(covered)\n",
            ),
        ),
        schedule="promise_in_parts",
        small=True,
    ),
    Mutant(
        "window-without-end",
        "a leader proposes beyond its window",
        (
            (
                "    return (slots, size) if slots > 0 and size > 0 else (0, 0)\n",
                "    return 1000, 1000\n",
            ),
        ),
        schedule="window_is_bounded",
        small=True,
    ),
    Mutant(
        "flights-without-end",
        "a leader has any number of runs in flight",
        (
            (
                "        or len(role.flights) >= FLIGHTS_MAX\n",
                "        or len(role.flights) < 0\n",
            ),
        ),
        schedule="window_is_bounded",
        small=True,
    ),
    Mutant(
        "different-chain-goes-on",
        "a voter whose chain differs from a majority's goes on",
        (
            (
                "                if len(voters) > len(self.config.voters) // 2:\n",
                "                if len(voters) > len(self.config.voters):\n",
            ),
        ),
        schedule="different_chain_stops",
        small=True,
    ),
    Mutant(
        "catch-up-asks-once",
        "a catch-up that failed is not tried elsewhere",
        (
            (
                "        if chase is not None and chase.asked == voter:\n            wait =",
                "        if False:\n            wait =",
            ),
        ),
        schedule="failed_catch_up_is_tried_elsewhere",
    ),
)

LEARNER_MUTANTS: Final = (
    Mutant(
        "gap-is-not-repaired",
        "a listener that lacks a slot waits for it to come by itself",
        (("        self.tend_gap()\n", "        pass\n"),),
        seeds=40,
    ),
    Mutant(
        "tip-is-not-heeded",
        "a listener does not notice that the last datagram was lost",
        (
            (
                (
                    "            tip=max(self.state.tip, message.tip_slot),\n        )\n"
                    "        if isinstance(message, StreamRun):"
                ),
                (
                    "            tip=self.state.tip,\n        )\n"
                    "        if isinstance(message, StreamRun):"
                ),
            ),
        ),
        seeds=40,
    ),
    Mutant(
        "repeat-is-delivered-again",
        "a listener hands on what it handed on before",
        (
            (
                "run = FixedRun(self.state.slot + 1, self.state.chain, values[skip:], chains[skip:])",
                "run = FixedRun(first, chain_before, values, chains)",
            ),
        ),
        seeds=40,
    ),
    Mutant(
        "early-runs-wait-after-a-snapshot",
        "what came early stays kept when a snapshot reaches up to it, and nothing is asked for",
        (
            (
                "            self.set(heard_ms=self.now)\n            self.take_kept()\n",
                "            self.set(heard_ms=self.now)\n",
            ),
        ),
        seeds=10,
    ),
)
