"""Views as they are in a few telling situations, made by folding hand-made events with ``reduce``.

:class:`World` is a small cluster told in events: its voters say their tips when they would, and a
test says who leads, who is down, who lags.  Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from dashboard.view import (
    Clock,
    Event,
    Fixed,
    Followed,
    MemberMoved,
    Opened,
    PastLed,
    Reported,
    SlotSeen,
    Tipped,
    View,
    reduce,
)
from trex_core.messages import (
    NO_BALLOT,
    Ballot,
    ListenerDigest,
    ListenerReport,
    ListenerSeen,
    StreamTip,
    Transition,
    VoterDigest,
)

START_MS = 1_795_469_400_000
"""When the stories begin: a fixed moment, so that pictures of them are equal."""
ELECTION_MS = 1_000
STEP_MS = 20
KINDS = ("config.put", "lease.grant", "member.join", "lock.acquire", "config.put", "noop")


def fold(view: View, events: Iterable[Event]) -> View:
    for event in events:
        view = reduce(view, event)
    return view


class Peer:
    """One voter of a :class:`World`: what it would say of itself."""

    def __init__(self, voter: int, born_ms: int) -> None:
        self.voter = voter
        self.boot = 1
        self.born_ms = born_ms
        self.role = "follower"
        self.ballot = NO_BALLOT
        """The leader's ballot it knows."""
        self.promised = NO_BALLOT
        self.running = True
        self.lag = 0
        self.has_room = True
        self.free_bytes = 38 << 30
        self.fsync_us = 900 + 40 * voter
        self.version = "0.1.0"
        self.skew_ms = 0
        self.snapshot_slot = 0
        self.quorum_age_ms: int | None = None
        self.stuck = 0
        """Slots proposed and not fixed, at a leader."""
        self.number = 0
        self.transitions: list[tuple[int, Transition]] = []
        self.next_tip_ms = born_ms + 40 * voter

    def turn(self, at_ms: int, role: str, ballot: Ballot, leader: int, fixed: int, why: str):
        """Change role now; told at once."""
        self.number += 1
        self.role = role
        change = Transition(self.number, 0, role, ballot, leader, fixed, why)
        self.transitions = [*self.transitions, (at_ms, change)][-8:]
        self.next_tip_ms = at_ms


class World:
    """Five voters (or as many as ``voters`` says) and their listeners; time goes on by :meth:`run`,
    which keeps the events in ``events`` and folds them into ``view``."""

    def __init__(self, voters: int = 5, *, rate: int = 400, listeners: int = 6) -> None:
        self.now_ms = START_MS
        self.rate = rate
        self.slot = 12_486
        self.applied = self.slot
        self.peers = {each: Peer(each, START_MS - 3_600_000) for each in range(1, voters + 1)}
        self.deaf: set[tuple[int, int]] = set()
        """(a, b): a does not hear b."""
        self.lost: set[int] = set()
        """Voters whose multicast does not reach us."""
        self.heard: dict[tuple[int, int], int] = {}
        self.quorum_ms = START_MS
        self.events: list[Event] = []
        self.listeners = {f"cache-{each:02d}": 0 for each in range(1, listeners + 1)}
        """By name: how many slots it lacks."""
        self.view = View()
        ids = tuple(self.peers)
        self.tell(Opened(self.now_ms, "demo", ids, ELECTION_MS, "live"))

    def tell(self, event: Event) -> None:
        self.events.append(event)
        self.view = reduce(self.view, event)

    @property
    def majority(self) -> int:
        return len(self.peers) // 2 + 1

    @property
    def leader(self) -> Peer | None:
        leading = [each for each in self.peers.values() if each.running and each.role == "leader"]
        return max(leading, key=lambda each: each.ballot) if leading else None

    def lead(self, voter: int, round_: int, why: str = "a quorum promised") -> None:
        """``voter`` leads from now on, and all that run and hear it follow."""
        ballot = Ballot(0, round_, voter)
        for peer in self.peers.values():
            hears = (peer.voter, voter) not in self.deaf
            if not peer.running or not hears:
                continue
            peer.promised = peer.ballot = ballot
            if peer.voter == voter:
                peer.turn(self.now_ms, "leader", ballot, voter, self.slot, why)
            else:
                words = f"voter {voter} leads"
                peer.turn(self.now_ms, "follower", ballot, voter, self.slot, words)
            self.heard[voter, peer.voter] = self.heard[peer.voter, voter] = self.now_ms
        self.quorum_ms = self.now_ms

    def poll(self, voter: int) -> None:
        peer = self.peers[voter]
        peer.ballot = NO_BALLOT
        why = "no leader heard for an election timeout"
        peer.turn(self.now_ms, "polling", peer.promised, 0, self.slot, why)

    def stand(self, voter: int, round_: int) -> None:
        peer = self.peers[voter]
        peer.ballot, peer.promised = NO_BALLOT, Ballot(0, round_, voter)
        why = "no other voter hears a leader"
        peer.turn(self.now_ms, "candidate", peer.promised, 0, self.slot, why)

    def kill(self, *voters: int) -> None:
        for voter in voters:
            self.peers[voter].running = False

    def restart(self, voter: int) -> None:
        peer = self.peers[voter]
        peer.running, peer.boot, peer.born_ms = True, peer.boot + 1, self.now_ms
        peer.role, peer.number, peer.transitions = "follower", 0, []
        peer.ballot = NO_BALLOT
        peer.next_tip_ms = self.now_ms
        leader = self.leader
        if leader is not None:
            peer.ballot = peer.promised = leader.ballot
            words = f"voter {leader.voter} leads"
            at_ms = self.now_ms
            peer.turn(at_ms, "follower", leader.ballot, leader.voter, self.slot, words)

    def run(self, ms: int) -> View:
        """Let ``ms`` milliseconds pass."""
        until_ms = self.now_ms + ms
        while self.now_ms < until_ms:
            self.now_ms += STEP_MS
            self._step()
        return self.view

    def _step(self) -> None:
        leader = self.leader
        if leader is not None:
            self._beat(leader)
        for peer in self.peers.values():
            if peer.running and self.now_ms >= peer.next_tip_ms:
                peer.next_tip_ms = self.now_ms + (80 if peer.role == "leader" else 900)
                if peer.voter not in self.lost:
                    self.tell(Tipped(self.now_ms, peer.voter, self.tip(peer)))
        elapsed_ms = self.now_ms - START_MS
        if elapsed_ms % 100 == 0 and self.slot > self.applied:
            self._deliver()
        if elapsed_ms % 2_000 == 1_000:
            for name in self.listeners:
                self.tell(Reported(self.now_ms, self.report(name)))
        if elapsed_ms % 240 == 0:
            at_ms, slot = self.now_ms, self.applied
            self.tell(Followed(at_ms, slot, slot - 40, self.slot, True, 24, {"stream.runs": slot}))
            self.tell(Clock(at_ms))

    def _beat(self, leader: Peer) -> None:
        acks = 1
        for peer in self.peers.values():
            there = peer.running and peer is not leader
            if there and (peer.voter, leader.voter) not in self.deaf:
                self.heard[peer.voter, leader.voter] = self.now_ms - 10
                if (leader.voter, peer.voter) not in self.deaf:
                    acks += 1
            if there and (leader.voter, peer.voter) not in self.deaf:
                self.heard[leader.voter, peer.voter] = self.now_ms - 20
        if acks >= self.majority:
            self.quorum_ms = self.now_ms
            if not leader.stuck:
                self.slot += self.rate * STEP_MS // 1_000

    def tip(self, peer: Peer) -> StreamTip:
        """What ``peer`` says now."""
        now_ms, leads = self.now_ms, peer.role == "leader"
        fixed = self.slot - peer.lag
        heard = tuple(
            0
            if each == peer.voter
            else now_ms - self.heard[peer.voter, each]
            if (peer.voter, each) in self.heard
            else -1
            for each in self.peers
        )
        if peer.quorum_age_ms is not None:
            quorum_age_ms = peer.quorum_age_ms
        elif leads:
            quorum_age_ms = now_ms - self.quorum_ms
        elif peer.ballot.voter:
            quorum_age_ms = now_ms - self.heard.get((peer.voter, peer.ballot.voter), now_ms)
        else:
            quorum_age_ms = -1
        digest = VoterDigest(
            role=peer.role,
            promised=peer.promised,
            last_accepted=fixed + (12 if self.rate and leads else 0),
            fixed=fixed,
            applied=fixed,
            journal_bytes=(412 << 20) + peer.voter * 70_001,
            free_bytes=peer.free_bytes,
            fsync_us=peer.fsync_us,
            version=peer.version,
            boot=peer.boot,
            uptime_s=(now_ms - peer.born_ms) // 1_000,
            time_ms=now_ms + peer.skew_ms,
            proposed=fixed + (12 if self.rate else 0) + peer.stuck if leads else 0,
            quorum_age_ms=quorum_age_ms,
            has_room=peer.has_room,
            snapshot_slot=peer.snapshot_slot,
            fsync_p50_us=peer.fsync_us,
            fsync_p99_us=peer.fsync_us * 2 + (now_ms // 1_000 * 37 + peer.voter) % 400,
            commit_p50_us=1_650 if leads else 0,
            commit_p99_us=3_900 + (now_ms // 1_000 * 53) % 700 if leads else 0,
            heard_ms=heard,
            transitions=tuple(
                msgspec.structs.replace(each, age_ms=now_ms - at_ms)
                for at_ms, each in peer.transitions
            ),
            listeners=self._listener_digest(),
        )
        return StreamTip(peer.ballot, leads, fixed, bytes(32), digest)

    def _listener_digest(self) -> ListenerDigest:
        names = list(self.listeners)
        if not names:
            return ListenerDigest()
        begin = self.now_ms // 100 % len(names)
        rows = tuple(
            ListenerSeen((self.now_ms - START_MS - 1_000) % 2_000, self.report(name))
            for name in (names[begin:] + names[:begin])[:3]
            if self.now_ms >= START_MS + 1_000
        )
        lags = list(self.listeners.values())
        behind = sum(lag > 1_000 for lag in lags)
        return ListenerDigest(len(names), behind, 0, max(lags), rows)

    def report(self, name: str) -> ListenerReport:
        """What the listener ``name`` said at its newest report."""
        lag = self.listeners[name]
        said_ms = self.now_ms - (self.now_ms - START_MS - 1_000) % 2_000
        applied = max(0, self.slot - lag)
        return ListenerReport(
            name=name,
            instance=sum(name.encode()) * 7_919,
            applied=applied,
            stored=max(0, applied - 64),
            tip=self.slot,
            behind_ms=lag * 2,
            ready=lag < 1_000,
            gaps=lag // 500,
            repairs=lag // 400,
            catchups=lag // 4_000,
            resets=0,
            uptime_s=(said_ms - START_MS) // 1_000 + 600,
            version="0.1.0",
        )

    def _deliver(self) -> None:
        first, last = self.applied + 1, self.slot
        self.applied = last
        leader = self.leader
        ballot = leader.ballot if leader is not None else NO_BALLOT
        newest = tuple(
            SlotSeen(
                slot,
                KINDS[slot % len(KINDS)],
                "" if KINDS[slot % len(KINDS)] == "noop" else f"app/{slot % 97:02d}/limits",
                60 + slot * 31 % 500,
                ballot,
            )
            for slot in range(max(first, last - 127), last + 1)
        )
        self.tell(Fixed(self.now_ms, first, last, newest))


def healthy_world(voters: int = 5, *, rate: int = 400, listeners: int = 6) -> World:
    world = World(voters, rate=rate, listeners=listeners)
    world.lead(min(3, voters), 17)
    first = Ballot(0, 16, 1)
    world.tell(PastLed(START_MS, first, 1, 12_486, START_MS - 3_500_000, START_MS - 900_000))
    world.run(15_000)
    joined = MemberMoved(world.now_ms, world.slot, "cache-07", "joined in zone b (up)")
    world.tell(joined)
    world.run(15_000)
    return world


def healthy() -> View:
    """Voter 3 leads five voters, six listeners follow, 400 slots a second."""
    return healthy_world().view


def election() -> View:
    """Voter 3, which led, was killed 1.1 s ago; voter 2 stands, voter 5 asks the others."""
    world = healthy_world()
    world.kill(3)
    world.run(800)
    world.poll(2)
    world.poll(5)
    world.run(200)
    world.stand(2, 18)
    world.run(100)
    return world.view


def two_down() -> View:
    """Voters 1 and 4 are gone for 12 s; voter 3 leads what is left, and can lose no more."""
    world = healthy_world()
    world.kill(1, 4)
    world.run(12_000)
    return world.view


def no_quorum() -> View:
    """Voters 1, 3 (the leader) and 4 are gone for 20 s; voters 2 and 5 ask and stand in vain."""
    world = healthy_world()
    world.kill(1, 3, 4)
    world.run(900)
    world.poll(2)
    world.run(300)
    world.poll(5)
    world.run(18_800)
    return world.view


def lagging() -> View:
    """All voters are well; of forty listeners one is 12,000 slots behind, some a little."""
    world = healthy_world(listeners=40)
    world.run(4_000)
    world.listeners["cache-17"] = 12_000
    world.listeners |= {"cache-21": 2_300, "cache-33": 900, "cache-34": 140}
    world.run(8_000)
    return world.view
