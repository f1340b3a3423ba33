"""A whole cluster in a box: ``World(seed).run()`` is one deterministic history.

This module alone owns time, order and fate: one heap of events keyed (time, sequence), the faults
of the seed, the safety phase, the healing and what must then come true. The nodes in it run the
real core, wire and journal code. Same seed, same history, on any machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable
from random import Random
from types import ModuleType
from typing import Any, NamedTuple

from tests.simulator.client import Client
from tests.simulator.disk import FREE_BYTES_MIN, Disk
from tests.simulator.listener import Listener
from tests.simulator.mutants import small_core
from tests.simulator.network import Network, Node
from tests.simulator.observer import Observer, Violation
from tests.simulator.options import TICK_US, Options, draw
from tests.simulator.replica import NEWER_LEVEL
from tests.simulator.tenant import Tenant
from tests.simulator.voter import Voter
from trex_core import invariants, learner, paxos
from trex_core.messages import Ballot
from trex_core.quorum import Majority
from trex_core.state import Leader, StartHandOver, chain_start
from trex_core.wire import (
    Channel,
    FrameError,
    body_bytes,
    decode_catchup,
    decode_peer,
    decode_stream,
)

LISTENERS_FROM = 100
CLIENTS_FROM = 200
TENANTS_FROM = 300
CORE_COMMIT_TICKS = 250
"""Where only a quorum was healed and the rest stays broken, it must have answered a new command
within this many nominal ticks."""
LEADER_PATIENCE = 16
"""After healing somebody must lead within this many longest election timeouts ..."""
PATIENCE = 32
"""... and everything must be well within this many, and ..."""
BACK_OFF_US = 4_000_000
"""... this time: listeners pause up to 1.6 s of their clock between catch-ups that fail, clients
ask again after 12 ticks."""
LISTENER_CUT_TICKS = 120
"""Long enough to take the stream for dead, ask each voter in vain, and then a listener."""
CALL_TIMEOUT_US = 4 * TICK_US
CLOCK_DRIFT = 0.02
"""Clocks that leases are counted on run this much too fast or too slow, at most."""
FOR_EVER_US = 1 << 60
BROKEN = ("down", "paused", "cut", "deaf", "mute", "lossy", "storm", "full")
"""What a voter may be that is not healed."""
BROKEN_LOSS = 0.7


class CrashPoint(NamedTuple):
    """Voter ``voter`` crashes at the ``k``-th time it gets to a boundary: "step" (before any effect
    of a step that has some), "written" (records handed to the disk, some letters sent), "record"
    (the k-th record is handed to the disk, not synced), "synced" (the k-th record is durable, no
    vote has left), "half_sent" (some have), "send" (before the k-th letter), "fixed" (before the
    k-th fixed run is delivered), "snapshot" or "delete" (before the k-th act that makes a snapshot
    durable, or that deletes a segment)."""

    voter: int
    boundary: str
    k: int


class World:
    """One simulated cluster. ``core`` is the module whose ``step`` is used, ``learner`` the one
    whose ``learn``, ``voter_type`` the shell around the core: mutants are others."""

    def __init__(
        self,
        seed: int,
        options: Options | None = None,
        *,
        core: ModuleType | None = None,
        learner: ModuleType = learner,
        voter_type: type[Voter] = Voter,
        check_steps: bool = True,
        crash_at: CrashPoint | None = None,
        trace: bool = False,
    ) -> None:
        self.seed = seed
        self.options = options if options is not None else draw(seed)
        if core is None:
            core = small_core() if self.options.small_limits else paxos
        self.core = core
        self.learner = learner
        self.check_step: Callable[..., None] = (
            invariants.check_step if check_steps else lambda *_: None
        )
        self.crash_at = crash_at
        self.passed: Counter[tuple[int, str]] = Counter()
        """How often each voter got to each boundary."""
        self.archives_down_until = 0
        self.well: list[Voter] = []
        """The voters that were healed, and must make progress."""
        self.storming: set[int] = set()
        """Voters that crash again and again after the healing."""
        self.upgrading = False
        self.tenancies = 0
        self.trace = trace
        self.rng = Random(f"world {seed}")
        self.random = self.rng.random
        self.now = 0
        self.sequence = 0
        self.digest = 0
        self.events = 0
        self.effects_seen = 0
        self.commands = 0
        self.healed = False
        self.chaos = False
        self.heap: list[tuple[int, int, Node | None, Callable[[Any, Any], None], Any, Any]] = []
        self.counts: Counter[str] = Counter()
        self.cluster_id = self.rng.randbytes(16)
        self.voter_ids = tuple(range(1, self.options.voters + 1))
        quorums = Majority(self.voter_ids)
        self.observer = Observer(chain_start(self.cluster_id), quorums.accept_weight)
        self.network = Network(self)
        self.voters = {n: voter_type(self, n, self._tick()) for n in self.voter_ids}
        self.listeners = [
            Listener(self, LISTENERS_FROM + n, self._tick()) for n in range(self.options.listeners)
        ]
        self.clients = [
            Client(self, CLIENTS_FROM + n, self._tick()) for n in range(self.options.clients)
        ]
        self.clients.extend(
            Tenant(self, TENANTS_FROM + n, self._tick()) for n in range(self.options.tenants)
        )
        for voter in self.voters.values():
            voter.start()
        for listener in self.listeners:
            listener.start()
        if self.options.faults:
            self.push(self.options.calm_us, None, self.on_fault, None, None)
        if self.options.calm_us:
            self.push(self.options.calm_us, None, self.on_chaos, None, None)
        else:
            self.chaos = True

    def _tick(self) -> int:
        skew = self.options.skew
        return int(TICK_US * (1 - skew + 2 * skew * self.random()))

    def clock_rate(self) -> float:
        """How fast the clock of a machine runs that counts leases."""
        return 1 + CLOCK_DRIFT * (2 * self.random() - 1) if self.options.tenants else 1.0

    # --- the heap ---------------------------------------------------------------------------

    def push(
        self,
        delay_us: int,
        node: Node | None,
        handler: Callable[[Any, Any], None],
        a: object,
        b: object,
    ) -> None:
        """``handler(a, b)`` is due after ``delay_us``, later if ``node`` is paused then."""
        self.sequence += 1
        heapq.heappush(self.heap, (self.now + delay_us, self.sequence, node, handler, a, b))

    def turn(self) -> None:
        """One event."""
        self.now, sequence, node, handler, a, b = heapq.heappop(self.heap)
        if node is not None and node.paused_until > self.now:
            self.sequence += 1
            entry = (node.paused_until, self.sequence, node, handler, a, b)
            heapq.heappush(self.heap, entry)
            return
        self.events += 1
        self.digest = (self.digest * 1_000_003 + self.now * 31 + sequence) & 0xFFFFFFFFFFFFFFFF
        handler(a, b)
        if self.trace:
            self._show(node, handler, a)

    # --- running ----------------------------------------------------------------------------

    def run(self) -> World:
        """The safety phase, then the liveness phase. Raises :class:`Violation`, saying how to see
        it again."""
        try:
            self.run_safety()
            self.heal()
            self.run_liveness()
            self.check_end()
        except Exception as error:
            if self.trace:
                print(f"!!! {error}")
            raise Violation(f"{type(error).__name__}: {error}\n{self.replay_hint()}") from error
        return self

    def replay_hint(self) -> str:
        """The one command that shows this history."""
        return (
            f"seed {self.seed}, event {self.events}, {self.options}\n"
            f"replay: .venv/bin/python -m tests.simulator --seed {self.seed} --trace"
        )

    def run_safety(self) -> None:
        """Faults and load, for as many events as the options say."""
        while self.events < self.options.events:
            self.turn()

    def heal(self) -> None:
        """No faults any more: all links and disks are well, and everybody, or a quorum, is up."""
        self.healed = True
        self.chaos = False
        self.network.heal()
        self.archives_down_until = 0
        newer = self.newer_voters() > 0  # or what a client asks for may be refused for ever
        nodes = (*self.voters.values(), *self.listeners)
        for voter in self.voters.values():
            voter.disk.free_bytes = None
            voter.sync_fails = False
        for node in nodes:
            node.paused_until = 0
            if newer:
                self._upgrade(node)
            if not node.up:
                node.start()
        everybody = self.options.heal_all or not self._genesis_everywhere()
        self.well = [v for v in self.voters.values() if not v.dead and not v.replaced]
        if not everybody:
            core = self.rng.sample(self.well, len(self.voters) // 2 + 1)
            self.well = [v for v in self.well if v in core]
            for voter in self.voters.values():
                if voter not in self.well and not voter.dead:
                    self._break(voter)
        for client in self.clients:
            client.answered = 0
        self.core_only = not everybody
        self.counts["healed_all" if everybody else "healed_core_only"] += 1

    def _break(self, voter: Voter) -> None:
        """It stays broken to the end, in one way or another."""
        way = self.rng.choice(BROKEN)
        self.counts[f"broken_{way}"] += 1
        me, others = voter.address, [a for a in self._addresses() if a != voter.address]
        if way in ("cut", "deaf"):
            self.network.cut |= {(other, me) for other in others}
        if way in ("cut", "mute"):
            self.network.cut |= {(me, other) for other in others}
        if way == "lossy":
            for other in others:
                self.network.lossy[me, other] = self.network.lossy[other, me] = BROKEN_LOSS
        if way == "full":
            voter.disk.free_bytes = int(self.random() * FREE_BYTES_MIN)
        if way == "down":
            voter.crash()
        if way == "paused":
            voter.paused_until = FOR_EVER_US
        if way == "storm":
            self.storming.add(me)
            self.on_storm(voter, FOR_EVER_US)

    def _genesis_everywhere(self) -> bool:
        """Is slot 1 fixed on each disk, so that any quorum can go on without the others (R10)?"""
        return all(v.genesis_durable for v in self.voters.values())

    def run_liveness(self) -> None:
        """From healing on: a leader, a new command of each client fixed, everybody up to date."""
        options = self.options
        start = self.now
        longest_us = options.election_ticks_max * int(TICK_US * (1 + options.skew))
        led_before = self._ballots_led()
        self.leader_after_us = -1
        self.commit_after_ticks = -1
        while True:
            for _ in range(25):
                self.turn()
            # One of those that are not well may win an election too, if it is up long enough; but
            # one that led before, and leads nobody since, is no leader.
            if self.leader_after_us < 0 and (
                any(isinstance(v.state.role, Leader) for v in self.well if v.up)
                or self._ballots_led() - led_before
            ):
                self.leader_after_us = self.now - start
            for client in self.clients:
                client.stopping = client.answered > 0
            ticks = (self.now - start) // TICK_US
            if self.commit_after_ticks < 0 and any(c.stopping for c in self.clients):
                self.commit_after_ticks = ticks
            if self.core_only and self.commit_after_ticks < 0 and ticks > CORE_COMMIT_TICKS:
                raise Violation(f"the core commits nothing in {ticks} ticks: {self.describe()}")
            if all(c.stopping and c.idle for c in self.clients) and self._converged():
                break
            if self.leader_after_us < 0 and self.now - start > LEADER_PATIENCE * longest_us:
                raise Violation(f"no leader after healing: {self.describe()}")
            if self.now - start > PATIENCE * longest_us + BACK_OFF_US:
                raise Violation(f"no progress after healing: {self.describe()}")
        self.elections_to_leader = self.leader_after_us / longest_us
        self.elections_to_well = (self.now - start) / longest_us
        self.well_after_us = self.now - start

    def _ballots_led(self) -> set[Ballot]:
        return {
            voter.state.role.ballot
            for voter in self.voters.values()
            if voter.up and isinstance(voter.state.role, Leader)
        }

    def _converged(self) -> bool:
        slot = len(self.observer.log)
        return all(v.up and v.replica.slot == slot for v in self.well) and all(
            listener.replica.slot == slot for listener in self.listeners
        )

    def check_end(self) -> None:
        """All replicas hold the same state, and whatever was acknowledged is in it."""
        slot = len(self.observer.log)
        self.observer.replay(slot)
        expected = self.observer.replayed.machine_bytes()
        for node in (*self.well, *self.listeners):
            if node.replica.machine_bytes() != expected:
                raise Violation(f"{node}: its state at slot {slot} is not what a replay gives")
        for command, told in self.observer.acknowledged.items():
            if self.observer.applied[command][0] != told or told > slot:
                raise Violation(f"an acknowledged command of slot {told} is lost")
        self.counts["slots_fixed"] = slot
        self.counts["events"] = self.events

    def fail(self, words: str) -> None:
        """A checker of a node found a broken rule."""
        raise Violation(words)

    def result(self) -> str:
        """A digest of the whole history."""
        parts = [self.digest, self.events, self.now, sorted(self.counts.items())]
        parts.append(self.observer.chains[-1].hex())
        parts.extend((v.address, v.boot, str(v.state.promised)) for v in self.voters.values())
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    # --- conversations over TCP -------------------------------------------------------------

    def call(
        self,
        caller: Node,
        helper: Voter | Listener,
        request: bytes,
        on_reply: Callable[[Any, Any], None],
        on_failure: Callable[[Any, Any], None],
        life: int,
    ) -> None:
        """Ask ``helper`` for catch-up: exactly one of the two handlers is called, unless the caller
        crashed meanwhile."""

        def alive() -> bool:
            return caller.up and caller.life == life

        def fail(_: object, __: object) -> None:
            if alive():
                on_failure(None, None)

        def answered(reply: bytes, _: object) -> None:
            if alive():
                on_reply(reply, None)

        def arrived(data: bytes, _: object) -> None:
            reply = helper.serve(data) if helper.up else None
            back = self.network.connection
            if reply is None or not back(helper.address, caller, reply, answered):
                self.push(CALL_TIMEOUT_US, caller, fail, None, None)

        node = _Machine(helper.address)
        if not self.network.connection(caller.address, node, request, arrived):
            self.push(CALL_TIMEOUT_US, caller, fail, None, None)

    # --- faults -----------------------------------------------------------------------------

    def on_chaos(self, _: object, __: object) -> None:
        """From now on voters crash at effect boundaries."""
        self.chaos = not self.healed

    def crash_here(self, voter: Voter) -> bool:
        """Does ``voter`` crash while it carries out the effects of this step?"""
        if self.crash_at_point(voter, "step") | self.crash_at_point(voter, "written"):
            return True
        rate = self.options.boundary_crash
        return rate > 0 and self.chaos and self.random() < rate

    def crash_at_sync(self, voter: Voter, records: int) -> bool:
        """Does ``voter`` crash between a sync and the votes that waited for it?"""
        synced = self.crash_at_point(voter, "synced", records)
        if synced | self.crash_at_point(voter, "half_sent", records):
            return True
        rate = self.options.boundary_crash
        return rate > 0 and self.chaos and self.random() < rate

    def crash_at_act(self, voter: Voter, boundary: str) -> bool:
        """Does ``voter`` crash between two acts of its snapshots and segments?"""
        if self.crash_at_point(voter, boundary):
            return True
        rate = 3 * self.options.boundary_crash  # there are fewer of them
        return rate > 0 and self.chaos and self.random() < rate

    def crash_at_point(self, voter: Voter, boundary: str, count: int = 1) -> bool:
        """Does ``voter`` crash now that it gets to ``boundary``, ``count`` times at once?"""
        point = self.crash_at
        if point is None:
            return False
        who = (voter.address, boundary)
        before = self.passed[who]
        self.passed[who] += count
        return who == (point.voter, point.boundary) and before < point.k <= self.passed[who]

    def fail_sync(self, voter: Voter) -> bool:
        """Does this sync of ``voter`` fail?"""
        if voter.sync_fails and self.chaos:
            voter.sync_fails = False
            self.counts["sync_failures"] += 1
            return True
        return False

    def restart_later(self, voter: Voter) -> None:
        """``voter`` crashed; somebody starts it again."""
        if self._restarts(voter):
            downtime = int(self.random() * self.options.downtime_us)
            self.push(downtime, None, self.on_restart, voter, None)

    def _restarts(self, voter: Voter) -> bool:
        """Is somebody there who starts it again? After the healing the well restart, and those that
        are broken in that they restart."""
        if not self.healed or self.crash_at is not None:
            return True
        return voter in self.well or voter.address in self.storming

    def on_restart(self, voter: Voter, _: object) -> None:
        """Start it unless it runs."""
        if not voter.up and not voter.dead and self._restarts(voter):
            voter.start()

    def on_started(self, voter: Voter) -> None:
        """A voter started, and forgot which boots of others it has heard of. So a voter whose disk
        was rolled back might be counted by it: its operator takes that one away first."""
        for other in self.voters.values():
            if other.replaced == "rolled back" and other is not voter and not other.dead:
                self.counts["rolled_back_and_taken_away"] += 1
                other.leave_for_good()

    def stop_too_old(self, node: Voter | Listener) -> None:
        """A slot holds what the program of ``node`` does not know: it stops, never goes on without;
        the program is replaced, or first started again as it is."""
        self.counts["stopped_too_old"] += 1
        if isinstance(node, Voter):
            node.crash()
        node.up = False
        if self.healed or self.random() < 0.7:
            self.counts["upgrades"] += 1
            node.level = NEWER_LEVEL
        if isinstance(node, Voter):
            self.push(int(self.random() * TICK_US), None, self.on_restart, node, None)
        else:
            self.push(int(self.random() * TICK_US), None, self.on_restart_listener, node, None)

    def on_restart_listener(self, listener: Listener, _: object) -> None:
        """Start it unless it runs."""
        if not listener.up:
            listener.start()

    def newer_voters(self) -> int:
        """How many voters run the newer program."""
        return sum(voter.level >= NEWER_LEVEL for voter in self.voters.values())

    def on_fault(self, _: object, __: object) -> None:
        """One fault of those the seed has, and the time of the next."""
        if self.healed:
            return
        delay = int(2 * self.random() * self.options.fault_every_us)
        self.push(delay, None, self.on_fault, None, None)
        name = self.rng.choice(self.options.faults)
        self.counts[f"fault_{name}"] += 1
        getattr(self, f"fault_{name}")()

    def _somebody(self) -> Voter:
        return self.voters[self.rng.choice(self.voter_ids)]

    def leader(self) -> Voter | None:
        """A voter that believes it leads."""
        for voter in self.voters.values():
            if voter.up and isinstance(voter.state.role, Leader):
                return voter
        return None

    def fault_crash(self) -> None:
        """One voter, rather the leader."""
        leader = self.leader()
        (leader if leader is not None and self.random() < 0.4 else self._somebody()).crash()

    def fault_crash_all(self) -> None:
        """A power cut."""
        if self.random() < 0.3:
            for voter in self.voters.values():
                voter.crash()

    def fault_pause(self) -> None:
        """One process stops, as by SIGSTOP, and goes on later."""
        nodes = (*self.voters.values(), *self.listeners)
        node = nodes[int(self.random() * len(nodes))]
        node.paused_until = self.now + int(self.random() * 30 * TICK_US)

    def _cut(self, links: set[tuple[int, int]], ticks: int = 40) -> None:
        """Cut ``links`` for a while, at most ``ticks``."""
        self.network.cut |= links
        self.push(int(self.random() * ticks * TICK_US), None, self.on_links_well, links, None)

    def on_links_well(self, links: set[tuple[int, int]], _: object) -> None:
        """These links carry again."""
        if not self.healed:
            self.network.cut -= links

    def fault_split(self) -> None:
        """Two sides that do not hear each other."""
        side = {n: self.random() < 0.5 for n in self._addresses()}
        self._cut({(a, b) for a in side for b in side if side[a] != side[b]})

    def fault_one_way(self) -> None:
        """Some links carry in one direction only."""
        ids = self.voter_ids
        self._cut({(a, b) for a in ids for b in ids if a != b and self.random() < 0.3})

    def fault_isolate_leader(self) -> None:
        """The leader is cut off from voters, or from all: wholly, or it is not heard."""
        self._cut_off_leader(True, self.random() < 0.5)

    def fault_deaf_leader(self) -> None:
        """The leader hears nobody, but all hear it."""
        self._cut_off_leader(False, True)

    def _cut_off_leader(self, from_it: bool, to_it: bool) -> None:
        leader = self.leader()
        if leader is None:
            return
        links = set()
        for other in self._addresses() if self.random() < 0.5 else self.voter_ids:
            if from_it:
                links.add((leader.address, other))
            if to_it:
                links.add((other, leader.address))
        self.counts["leaders_cut_off"] += from_it
        self.counts["leaders_deafened"] += not from_it
        self._cut(links)

    def fault_hub_only(self) -> None:
        """Voters hear each other through one of them only, which passes nothing on."""
        ids, hub = self.voter_ids, self._somebody().address
        self._cut({(a, b) for a in ids for b in ids if hub not in (a, b)})

    def fault_clog(self) -> None:
        """Some paths hold everything back for a while, then let it through at once."""
        until = self.now + int(self.random() * 30 * TICK_US)
        for a in self._addresses():
            for b in self._addresses():
                if a != b and self.random() < 0.3:
                    self.network.clogged[a, b] = until

    def fault_cut_listener(self) -> None:
        """A listener hears other listeners only."""
        if self.listeners:
            me, ids = self.rng.choice(self.listeners).address, self.voter_ids
            links = {(me, voter) for voter in ids} | {(voter, me) for voter in ids}
            self._cut(links, LISTENER_CUT_TICKS)

    def fault_archives_down(self) -> None:
        """For a while no voter's archive answers."""
        self.archives_down_until = self.now + int(self.random() * 80 * TICK_US)

    def _addresses(self) -> list[int]:
        return [*self.voter_ids, *(node.address for node in (*self.listeners, *self.clients))]

    def fault_heal_links(self) -> None:
        """All links are well again."""
        self.network.cut.clear()

    def fault_hand_over(self) -> None:
        """An operator asks the leader to hand over."""
        leader = self.leader()
        if leader is not None and leader.paused_until <= self.now:
            leader.step(StartHandOver(self.rng.choice((0, *self.voter_ids))))

    def fault_full_disk(self) -> None:
        """A disk, or each, is filled by others, below its mark or nearly, and emptied later."""
        voters = list(self.voters.values()) if self.random() < 0.2 else [self._somebody()]
        for voter in voters:
            voter.disk.free_bytes = int(self.random() * 1.3 * FREE_BYTES_MIN)
        self.push(int(self.random() * 60 * TICK_US), None, self.on_disks_emptied, voters, None)

    def on_disks_emptied(self, voters: list[Voter], _: object) -> None:
        """There is plenty of room again."""
        if not self.healed:
            for voter in voters:
                voter.disk.free_bytes = None

    def fault_restart_storm(self) -> None:
        """Some voters crash again and again."""
        for voter in self.voters.values():
            if self.random() < 0.5:
                self.on_storm(voter, 1 + int(self.random() * 6))

    def on_storm(self, voter: Voter, left: int) -> None:
        """One crash of a storm, and the time of the next."""
        if voter.dead or (self.healed and voter.address not in self.storming):
            return
        self.counts["storm_crashes"] += voter.up
        voter.crash()
        back = int(self.random() * 2 * TICK_US)
        self.push(back, None, self.on_restart, voter, None)
        if left > 1:
            again = back + int(self.random() * 10 * TICK_US)
            self.push(again, None, self.on_storm, voter, left - 1)

    def fault_upgrade(self) -> None:
        """One node after the other is restarted with the newer program."""
        if self.options.levels and not self.upgrading:
            self.upgrading = True
            self.on_upgrade(None, None)

    def on_upgrade(self, _: object, __: object) -> None:
        """The next node of a rolling upgrade: soon a majority of the voters, later the others, so
        that these meet what they do not know."""
        old = [n for n in (*self.voters.values(), *self.listeners) if n.level < NEWER_LEVEL]
        ticks = 120
        if self.newer_voters() <= len(self.voters) // 2:
            old, ticks = [node for node in old if isinstance(node, Voter)], 8
        if old and not self.healed:
            self._upgrade(self.rng.choice(old))
            self.push(int(self.random() * ticks * TICK_US), None, self.on_upgrade, None, None)

    def _upgrade(self, node: Voter | Listener) -> None:
        if node.level < NEWER_LEVEL:
            self.counts["upgrades"] += 1
            node.level = NEWER_LEVEL
            if isinstance(node, Voter):
                node.crash()
            else:
                node.restart()

    def _may_lose_a_disk(self) -> bool:
        """Fewer than half of the voters ever lose what they promised, and none before all know who
        is a member."""
        lost = sum(v.disk.flipped or bool(v.replaced) for v in self.voters.values())
        return lost < (len(self.voters) - 1) // 2 and self._genesis_everywhere()

    def fault_wipe(self) -> None:
        """A disk breaks, and somebody formats the new one, which must not be done."""
        voter = self._somebody()
        if self._may_lose_a_disk() and not voter.dead and self.random() < 0.3:
            self.counts["wiped"] += 1
            voter.wipe()

    def fault_roll_back(self) -> None:
        """Somebody copies a voter's disk, and later puts the copy back, which must not be done."""
        voter = self._somebody()
        if voter.genesis_durable and not voter.disk.flipped and not voter.replaced:
            self.on_roll_back((voter, voter.disk.copy()), 20)

    def on_roll_back(self, what: tuple[Voter, Disk], tries: int) -> None:
        """Put the copy back when it is two boots old and the others have heard of a later one: only
        then is it found out (docs/limits.md)."""
        voter, copy = what
        if self.healed or voter.dead or voter.disk.flipped or voter.replaced or not tries:
            return
        boot = copy.boot + 1
        peers = [v for v in self.voters.values() if v is not voter and not v.dead]
        if voter.boot <= boot:
            voter.crash()
        elif self._may_lose_a_disk() and all(
            peer.up and dict(peer.state.boots).get(voter.address, 0) > boot for peer in peers
        ):
            self.counts["rolled_back"] += 1
            voter.roll_back(copy)
            return
        self.push(int(self.random() * 10 * TICK_US), None, self.on_roll_back, what, tries - 1)

    def fault_sync_failure(self) -> None:
        """The next sync of one voter fails."""
        self._somebody().sync_fails = True

    def fault_bit_flip(self) -> None:
        """A bit of a durable record flips, at fewer than half of the voters ever."""
        voter = self._somebody()
        if not self._may_lose_a_disk() or voter.dead or self.random() < 0.5:
            return
        if voter.disk.flip_bit(self.rng):
            voter.crash()

    def fault_restart_listener(self) -> None:
        """A listener is killed and restarts from its store."""
        if self.listeners:
            self.rng.choice(self.listeners).restart()

    def fault_loss_burst(self) -> None:
        """For a while much is lost."""
        self.network.loss = 0.5
        self.push(int(self.random() * 10 * TICK_US), None, self.on_loss_burst_end, None, None)

    def on_loss_burst_end(self, _: object, __: object) -> None:
        """As before."""
        self.network.loss = self.options.loss_after if self.healed else self.options.loss

    # --- showing ----------------------------------------------------------------------------

    def describe(self) -> str:
        """All voters and listeners in a line."""
        parts = []
        for voter in self.voters.values():
            if voter.dead:
                parts.append(f"{voter.address}:dead")
            elif not voter.up:
                parts.append(f"{voter.address}:down")
            else:
                state = voter.state
                role = type(state.role).__name__[0]
                paused = "z" if voter.paused_until > self.now else ""
                parts.append(
                    f"{voter.address}{paused}:{role}{state.promised}"
                    f" {state.fixed}/{state.last_accepted}"
                )
        parts.extend(f"L{node.address}:{node.replica.slot}" for node in self.listeners)
        parts.extend(f"C{node.address}:{len(node.unanswered)}" for node in self.clients)
        return " | ".join(parts)

    def _show(self, node: Node | None, handler: Callable[..., None], a: object) -> None:
        what = getattr(handler, "__name__", "?")
        print(
            f"{self.now:>9} #{self.events} {node or 'world'} {what} {_detail(a)}"
            f" || {self.describe()}"
        )


def _detail(a: object) -> str:
    """An argument of an event in words: of bytes, the message in them."""
    if not isinstance(a, bytes):
        return str(a)[:160]
    try:
        length = body_bytes(a, a[4:20])
        return f"from {int.from_bytes(a[20:22], 'big')} {_MESSAGES[a[3]](a[80 : 80 + length])}"[
            :300
        ]
    except (FrameError, KeyError, IndexError):
        return f"{len(a)} bytes"


_MESSAGES: dict[int, Callable[[bytes], object]] = {
    Channel.PEER: decode_peer,
    Channel.STREAM: decode_stream,
    Channel.CATCHUP: decode_catchup,
}


class _Machine:
    """The network's end of a voter's archive process: it answers also while the voter is paused."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.up = True
        self.paused_until = 0
