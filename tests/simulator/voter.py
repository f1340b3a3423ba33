"""The simulated shell of one voter: the real ``step`` between a simulated disk and network.

This module alone carries out effects, by the contract of :class:`trex_core.state.Effects`: votes
leave after the sync of all records before them, everything else at once. Between any two of these
acts the voter may crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tests.simulator.disk import DamagedError, Disk, NoSpaceError
from tests.simulator.observer import Violation
from tests.simulator.replica import NEWER_LEVEL, Replica
from trex_core.invariants import InvariantViolation
from trex_core.machine import TooOld
from trex_core.messages import (
    NO_BALLOT,
    RUN_BYTES_MAX,
    VOTES,
    Answer,
    AskOther,
    CatchUp,
    CatchupEntries,
    CatchupRequest,
    Fetch,
    Fetched,
    Kind,
    Outcome,
    PeerMessage,
    Refusal,
    RefusalReason,
    Renew,
    RepairRequest,
    SignedTip,
    SnapshotChunk,
    SnapshotOffer,
    SnapshotRequest,
    StreamRun,
    StreamTip,
    Submit,
    Value,
    VoterDigest,
    encode_value,
)
from trex_core.metadata.commands import LeaseExpire, encode_command, why_inadmissible
from trex_core.quorum import Tally
from trex_core.sessions import LEADER
from trex_core.state import (
    Beat,
    CatchUpFailed,
    Config,
    DiskRoom,
    Effects,
    Event,
    FixedRecord,
    FixedRun,
    Install,
    Leader,
    Learn,
    LearnedRecord,
    Propose,
    Receive,
    Record,
    Send,
    State,
    Tick,
)
from trex_core.wire import (
    PEER_UDP_BODY_BYTES_MAX,
    Channel,
    FrameBuffer,
    FrameError,
    Identity,
    Reassembler,
    decode_catchup,
    decode_peer,
    decode_request,
    decode_stream,
    encode_body,
    fragments,
    frame,
    unframe,
)
from voters.leases import LeaseClock

if TYPE_CHECKING:
    from tests.simulator.client import Client
    from tests.simulator.tenant import Tenant
    from tests.simulator.world import World

STREAM_BYTES_MAX = 1_200
"""Values in one datagram of the stream, in bytes; a larger value is left to catch-up."""
SNAPSHOT_CHUNK_BYTES = 2_000
ROOM_ACK_HEARTBEATS = 3
"""A voter whose newest answer is older than this many heartbeats is not counted as having room."""
EXPIRIES_PER_TURN = 8


class Read(NamedTuple):
    """A read, or a renewal, that waits for a heartbeat round after ``after_beat`` and for ``slot``,
    and must see ``must_see``."""

    after_beat: int
    slot: int
    must_see: int
    renewal: tuple[Tenant, Renew] | None = None


class Voter:
    """One voter process, its machine's disk, and its archive process (up when the machine is)."""

    disk_type = Disk
    replica_type = Replica

    def __init__(self, world: World, address: int, tick_us: int) -> None:
        self.world = world
        self.address = address
        self.tick_us = tick_us
        self.up = False
        self.dead = False
        """For good: its disk is gone."""
        self.replaced = ""
        """How its disk was replaced: "wiped" or "rolled back". The cluster must stop it."""
        self.level = 1
        """The feature level its program knows; an upgrade comes with a restart."""
        self.rate = world.clock_rate()
        self.paused_until = 0
        self.sync_fails = False
        """The next sync will fail."""
        self.genesis_durable = False
        self.incarnation = world.rng.getrandbits(63) | 1
        self.disk = self._new_disk()
        self.state: State
        self.config: Config
        self.boot = 0
        self.life = 0
        """Starts so far: what an earlier one set going must not reach a later one."""
        self._forget()

    def __str__(self) -> str:
        return f"voter {self.address}"

    def _new_disk(self) -> Disk:
        world = self.world
        who = Identity(world.cluster_id, self.address, self.incarnation, 0)
        return self.disk_type(who, world.options.segment_bytes)

    def _forget(self) -> None:
        world = self.world
        self.reassembler = Reassembler()
        self.replica = self.replica_type(self, world.observer, self.level)
        self.pending_records: list[Record] = []
        self.pending_votes: list[Send] = []
        self.syncing_votes: list[Send] | None = None
        self.holding = False
        """Whether :meth:`on_due` is to come."""
        self.log: list[bytes] = []
        self.log_before = 0
        """``log[i]`` is the value of slot ``log_before + 1 + i``."""
        self.written_slot = 0
        """What the archive serves: what is fixed, as far as the journal's files tell of it."""
        self.chains: list[bytes] = []
        """``chains[i]`` is the chain at slot ``log_before + i``."""
        self.waiting: dict[int, tuple[Client, Submit]] = {}
        self.reads: list[Read] = []
        self.leases: LeaseClock | None = None
        self.lease_round = 0
        self.lease_session = 0
        self.renewals: list[Read] = []
        self.barrier = 0
        """The last slot proposed when this voter became leader: reads wait for it."""
        self.counter = 0
        self.conversation = 0
        self.last_body: tuple[PeerMessage, list[bytes] | bytes] | None = None

    # --- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Recover from the disk and run."""
        if self.dead:
            return
        world = self.world
        self._forget()
        try:
            found = self.disk.recover()
        except NoSpaceError:
            world.counts["starts_without_room"] += 1
            world.restart_later(self)
            return
        except DamagedError:
            world.counts["journals_refused"] += 1
            if not self.disk.flipped:
                raise Violation(f"{self}: its undamaged journal was refused") from None
            self.dead = True
            return
        self.boot = found.boot
        self.life += 1
        self.identity = Identity(world.cluster_id, self.address, self.incarnation, self.boot)
        self.config = Config(
            voter=self.address,
            voters=world.voter_ids,
            incarnation=self.incarnation,
            boot=self.boot,
            seed=world.seed,
            heartbeat_ticks=world.options.heartbeat_ticks,
            election_ticks_min=world.options.election_ticks_min,
            election_ticks_max=world.options.election_ticks_max,
            retry_ticks=world.options.retry_ticks,
        )
        self.state = found.state
        self.written_slot = found.state.fixed
        self.chains = [world.observer.chains[0]]
        if found.snapshot is not None:
            slot, chain, _ = self.replica.restore(found.snapshot)
            self.log_before, self.chains = slot, [chain]
        slot = self.replica.slot
        for run in found.fixed:
            world.observer.on_fixed(self, slot, run)
            slot = run.last
        world.observer.on_recovered(self.address, found.state)
        try:
            for run in found.fixed:
                self._apply(run)
        except TooOld:
            world.stop_too_old(self)
            return
        self.up = True
        self.paused_until = 0
        if self.boot > 1:
            world.counts["restarts"] += 1
        world.on_started(self)
        world.push(int(world.random() * self.tick_us), self, self.on_tick, self.life, None)

    def crash(self) -> None:
        """The machine loses power."""
        if not self.up:
            return
        self.up = False
        world = self.world
        world.counts["crashes"] += 1
        lost = self.disk.crash(world.rng, world.options.torn)
        if lost or self.pending_records:
            world.counts["unsynced_writes_lost"] += 1
        self.waiting.clear()
        if self.replaced == "rolled back" and not self.dead:
            world.counts["rolled_back_and_taken_away"] += 1
            self.dead = True  # each start makes a later boot, in the end one nobody has heard of
        world.restart_later(self)

    def wipe(self) -> None:
        """Its disk is replaced by a fresh one and formatted anew: a new incarnation."""
        self.crash()
        self.replaced = "wiped"
        self.incarnation = self.world.rng.getrandbits(63) | 1
        self.disk = self._new_disk()
        self.world.observer.forget(self.address)
        self.start()

    def roll_back(self, copy: Disk) -> None:
        """An old copy of its disk is put back."""
        self.crash()
        self.replaced = "rolled back"
        self.disk = copy
        self.world.observer.forget(self.address)
        self.start()

    def leave_for_good(self) -> None:
        """An operator takes it away."""
        self.dead = True
        self.crash()

    # --- events -----------------------------------------------------------------------------

    def on_tick(self, life: int, _: object) -> None:
        """One tick of this voter's own clock."""
        if life != self.life or not self.up:
            return
        self.world.push(self.tick_us, self, self.on_tick, life, None)
        if self.disk.has_room != self.state.has_room:
            self.step(DiskRoom(self.disk.has_room))
        if self.up:
            self.step(Tick())
        if self.up and isinstance(self.state.role, Leader):
            self._expire_leases(self.state.role)
        if self.up and self.state.tick % 4 == 0 and self.world.listeners:
            self._stream_tip()

    def on_datagram(self, data: bytes, _: object) -> None:
        """A datagram on the peer port."""
        if not self.up:
            return
        try:
            part = unframe(data, self.world.cluster_id, Channel.PEER)
            body = self.reassembler.add(part)
            if body is None:
                return
            message = decode_peer(body)
        except FrameError as error:
            self.world.counts[f"dropped_{error.reason}"] += 1
            return
        self.step(Receive(part.sender, part.incarnation, part.boot, message))

    def on_stream_bytes(self, data: bytes, _: object) -> None:
        """Bytes on a TCP connection of a peer."""
        if not self.up:
            return
        buffer = FrameBuffer(self.world.cluster_id, Channel.PEER)
        middle = len(data) // 2
        for part in (*buffer.feed(data[:middle]), *buffer.feed(data[middle:])):
            message = decode_peer(part.body)
            self.step(Receive(part.sender, part.incarnation, part.boot, message))

    def on_self(self, life: int, message: PeerMessage) -> None:
        """A message to oneself."""
        if life == self.life and self.up:
            self.step(Receive(self.address, self.incarnation, self.boot, message))

    # --- one step and its effects -----------------------------------------------------------

    def step(self, event: Event) -> None:
        """Run the core once and carry out what it asks for."""
        world = self.world
        before = self.state
        try:
            after, effects = world.core.step(self.config, before, event)
            world.check_step(self.config, before, event, after, effects)
        except InvariantViolation as error:
            raise Violation(f"invariant at {self}: {error}") from error
        self.state = after
        if after.role is not before.role:
            self._role_changed(before, after)
        if after.halted:
            self._halted(after.halted)
            return
        if effects.records or effects.sends or effects.fixed:
            world.effects_seen += 1
            if world.crash_here(self):
                self._crash_amid(effects)
            else:
                self._carry_out(effects)
        if (self.reads or self.renewals) and self.up and isinstance(self.state.role, Leader):
            self._answer_reads()

    def _halted(self, why: str) -> None:
        # Who does not know slot 1 yet cannot tell a disk that is new from one that is old.
        words = {"wiped": ("formatted again", "rolled back"), "rolled back": ("rolled back",)}
        if not any(cause in why for cause in words.get(self.replaced, ())):
            raise Violation(f"{self} halts without a cause: {why}")
        self.world.counts[f"stopped_because_{self.replaced.replace(' ', '_')}"] += 1
        self.leave_for_good()

    def _carry_out(self, effects: Effects) -> None:
        if effects.records:
            self.pending_records.extend(effects.records)
        if effects.sends:
            self._send_all(effects.sends)
        for run in effects.fixed:
            if self.up:
                self._fixed(run)
        self._flush()

    def _crash_amid(self, effects: Effects) -> None:
        """Carry out only a part of the effects, then crash."""
        random = self.world.random
        self.world.counts["boundary_crashes"] += 1
        point = self.world.crash_at
        if random() < 0.2 if point is None else point.boundary == "step":
            self.crash()
            return
        if random() < 0.3:  # the sync of what came before may have been under way
            self._flush()
        self.pending_records.extend(effects.records)
        self._send_all(effects.sends[: int(random() * (len(effects.sends) + 1))])
        if self.up and random() < 0.5:
            for run in effects.fixed:
                if self.up:
                    self._fixed(run)
        if random() < 0.5:
            self._flush()
        self.crash()

    def _role_changed(self, before: State, after: State) -> None:
        world = self.world
        if isinstance(after.role, Leader):
            if not isinstance(before.role, Leader) or after.role.ballot != before.role.ballot:
                world.counts["elections"] += 1
                self.barrier = after.role.next_slot - 1
        elif isinstance(before.role, Leader):
            world.counts["leaders_stepped_down"] += 1
            for client, submit in self.waiting.values():
                self._reply(client, Refusal(submit.id, RefusalReason.LEADERSHIP_LOST, 0, ""))
            self.waiting.clear()
            self.reads.clear()
            self.renewals.clear()
            self.leases, self.lease_round, self.lease_session = None, 0, 0

    def _send_all(self, sends: tuple[Send, ...]) -> None:
        for send in sends:
            if isinstance(send.message, VOTES):
                if self.pending_records:
                    self.pending_votes.append(send)
                elif self.syncing_votes is not None:
                    self.syncing_votes.append(send)
                else:
                    self._send(send)
            else:
                self._send(send)

    def _send(self, send: Send) -> None:
        """Now it leaves."""
        world, message, to = self.world, send.message, send.to
        if not self.up or world.crash_at_point(self, "send"):
            self.crash()
            return
        if isinstance(message, CatchUp):
            self._catch_up(to, message.first)
            return
        last = self.last_body
        if last is None or last[0] is not message:
            world.observer.on_send(self.address, self.boot, message)
        if to == self.address:
            world.push(0, self, self.on_self, self.life, message)
            return
        if last is None or last[0] is not message:
            body = encode_body(message)
            if isinstance(message, Fetch | Fetched) or len(body) > PEER_UDP_BODY_BYTES_MAX:
                self.last_body = last = (message, frame(self.identity, Channel.PEER, body))
            else:
                parts = fragments(self.identity, Channel.PEER, body, self.counter)
                self.counter += len(parts)
                self.last_body = last = (message, parts)
        target = world.voters[to]
        if isinstance(last[1], bytes):
            world.network.connection(self.address, target, last[1], target.on_stream_bytes)
            world.counts["over_tcp"] += 1
        else:
            for data in last[1]:
                world.network.datagram(self.address, target, data, target.on_datagram)

    # --- the disk ---------------------------------------------------------------------------

    def _flush(self, *, due: bool = False) -> None:
        if not self.up or self.syncing_votes is not None or not self.pending_records:
            return
        world = self.world
        held_us = world.options.fixed_held_us
        if (
            held_us
            and not due
            and not self.pending_votes
            and all(isinstance(record, FixedRecord) for record in self.pending_records)
        ):
            if not self.holding:
                self.holding = True
                world.push(held_us, self, self.on_due, self.life, None)
            return
        records = tuple(self.pending_records)
        self.syncing_votes = self.pending_votes
        self.pending_records, self.pending_votes = [], []
        try:
            self.disk.write(records, self.state)
            self.written_slot = self.state.fixed
        except NoSpaceError:
            world.counts["writes_without_room"] += 1
            self.crash()
            return
        if world.crash_at_point(self, "record", len(records)):
            self.crash()
            return
        options = world.options
        delay = options.sync_min_us + int(world.random() * options.sync_span_us)
        world.push(delay, self, self.on_synced, self.life, records)

    def on_due(self, life: int, _: None) -> None:
        """Records have been held back for long enough."""
        if life == self.life:
            self.holding = False
            self._flush(due=True)

    def on_synced(self, life: int, records: tuple[Record, ...]) -> None:
        """The sync of ``records`` returned."""
        if life != self.life or not self.up:
            return
        world = self.world
        if world.fail_sync(self):
            self.crash()
            return
        self.disk.sync()
        if not self.genesis_durable:
            self.genesis_durable = any(
                isinstance(record, FixedRecord | LearnedRecord) for record in records
            )
        world.observer.on_durable(self.address, records)
        votes = self.syncing_votes or []
        self.syncing_votes = None
        if world.crash_at_sync(self, len(records)):
            point = world.crash_at
            sent = int(world.random() * (len(votes) + 1))
            if point is not None:
                sent = 0 if point.boundary == "synced" else (len(votes) + 1) // 2
            for send in votes[:sent]:
                self._send(send)
            world.counts["boundary_crashes"] += 1
            self.crash()
            return
        for send in votes:
            self._send(send)
        self._flush()

    # --- what is fixed ----------------------------------------------------------------------

    def _fixed(self, run: FixedRun) -> None:
        world = self.world
        if world.crash_at_point(self, "fixed"):
            self.crash()
            return
        world.observer.on_fixed(self, self.replica.slot, run)
        try:
            self._apply(run)
        except TooOld:
            world.stop_too_old(self)
            return
        if world.listeners and isinstance(self.state.role, Leader):
            self._stream(run.first, run.last, self.state.role.ballot, repair=False)

    def _apply(self, run: FixedRun) -> None:
        replica = self.replica
        self.log.extend(run.values)
        self.chains.extend(run.chains)
        every = self.world.options.snapshot_slots
        for slot, value in enumerate(run.values, run.first):
            delivered = replica.apply(slot, value)
            waiting = self.waiting.pop(slot, None)
            if waiting is not None and delivered is not None:
                client, submit = waiting
                self._reply(
                    client,
                    Outcome(submit.id, delivered.slot, delivered.status, delivered.body),
                )
            if every and slot % every == 0:
                self._cut_snapshot(self.chains[slot - self.log_before])

    def _cut_snapshot(self, chain: bytes) -> None:
        genesis = self.state.genesis
        assert genesis is not None, f"{self} applied slots without a genesis"
        data = self.replica.snapshot(chain, genesis)
        world = self.world
        world.observer.on_snapshot(self, self.replica.slot, data)
        world.push(3_000, self, self.on_snapshot_durable, self.life, (self.replica.slot, data))

    def on_snapshot_durable(self, life: int, snapshot: tuple[int, bytes]) -> None:
        """A snapshot was written, synced and renamed: the log below the oldest kept may go."""
        if life != self.life or not self.up:
            return
        slot, data = snapshot
        if not self._keep_snapshot(slot, data):
            return
        self.world.counts["snapshots"] += 1
        gone = min(self.disk.forgettable, self.replica.slot) - self.log_before
        if gone > 0:
            del self.log[:gone]
            del self.chains[:gone]
            self.log_before += gone

    def _keep_snapshot(self, slot: int, data: bytes) -> bool:
        """Each act on the disk, unless a crash comes between: False."""
        world = self.world
        for boundary in self.disk.keep_snapshot(slot, data):
            if boundary == "delete":
                world.counts["segments_deleted"] += 1
            if world.crash_at_act(self, boundary):
                world.counts[f"crashes_amid_{boundary}"] += 1
                self.crash()
                return False
        return True

    # --- clients ----------------------------------------------------------------------------

    def _reply(self, client: Client, reply: Outcome | Refusal | Answer) -> None:
        self.world.network.connection(
            self.address,
            client,
            frame(self.identity, Channel.CLIENT, encode_body(reply)),
            client.on_reply,
        )

    def on_requests(self, data: bytes, client: Client) -> None:
        """A burst of commands of one client."""
        if not self.up:
            return
        frames = FrameBuffer(self.world.cluster_id, Channel.CLIENT).feed(data)
        submits = [decode_request(request.body) for request in frames]
        submits = [submit for submit in submits if not self._refused_for_its_level(client, submit)]
        role = self.state.role
        if not isinstance(role, Leader) or role.handover is not None:
            leader = self.state.leader.voter
            for submit in submits:
                refusal = Refusal(submit.id, RefusalReason.NOT_LEADER, leader, "")
                self._reply(client, refusal)
            return
        if not self._quorum_has_room(role):
            for submit in submits:
                self.world.counts["refused_for_full_disks"] += 1
                self._reply(client, Refusal(submit.id, RefusalReason.DISK_FULL, 0, ""))
            return
        values = tuple(
            encode_value(
                Value(
                    submit.kind,
                    role.ballot,
                    self.world.now // 1000,
                    submit.session,
                    submit.sequence,
                    submit.unanswered,
                    submit.command,
                )
            )
            for submit in submits
        )
        first = role.next_slot
        for slot, submit in enumerate(submits, first):
            self.waiting[slot] = (client, submit)
        self.step(Propose(values))
        role = self.state.role
        after = role.next_slot if isinstance(role, Leader) else first
        for slot in range(after, first + len(submits)):
            refused = self.waiting.pop(slot, None)
            if refused is not None and self.up:
                self._reply(client, Refusal(refused[1].id, RefusalReason.BUSY, 0, ""))

    def on_read(self, _: object, __: object) -> None:
        """A linearizable read: answered once a heartbeat round begun later is acknowledged."""
        self._take_read(None)

    def on_renew(self, data: bytes, tenant: Tenant) -> None:
        """A renewal of leases: as a read, and it counts from its arrival."""
        if not self.up:
            return
        (part,) = FrameBuffer(self.world.cluster_id, Channel.CLIENT).feed(data)
        request = decode_request(part.body)
        assert isinstance(request, Renew)
        if isinstance(self.state.role, Leader):
            self._renew(request)
            self._take_read((tenant, request))
        else:
            leader = self.state.leader.voter
            self._reply(tenant, Refusal(request.id, RefusalReason.NOT_LEADER, leader, ""))

    def _take_read(self, renewal: tuple[Tenant, Renew] | None) -> None:
        role = self.state.role if self.up else None
        if not isinstance(role, Leader):
            return
        slot = max(self.state.fixed, self.barrier)
        self.reads.append(Read(role.beat, slot, self.world.observer.acknowledged_slot, renewal))
        self.step(Beat())

    def _answer_reads(self) -> None:
        role = self.state.role
        assert isinstance(role, Leader)
        counts = self.leases is not None or not self._lease_times_ms()
        if counts:
            self.reads[:0] = self.renewals
            self.renewals.clear()
        while self.reads and self._may_answer(role, *self.reads[0][:2]):
            read = self.reads.pop(0)
            _, _, must_see, renewal = read
            if renewal is not None and not counts:
                self.renewals.append(read)
                continue
            if renewal is not None:
                tenant, request = renewal
                body = encode_body(self._renew(request))
                self._reply(tenant, Answer(request.id, self.replica.slot, body))
                continue
            self.world.counts["reads_answered"] += 1
            if self.replica.slot < must_see:
                raise Violation(
                    f"stale read: {self} answers at slot {self.replica.slot}, but some client was "
                    f"told of slot {must_see} before the read came"
                )

    def _may_answer(self, role: Leader, after_beat: int, slot: int) -> bool:
        return role.beat_acked > after_beat and self.replica.slot >= slot

    # --- leases: as the server does ---------------------------------------------------------

    def clock_ms(self) -> int:
        """This machine's clock."""
        return int(self.world.now * self.rate / 1000)

    def _lease_times_ms(self) -> dict[int, int]:
        return {name: lease.ttl_ms for name, lease in self.replica.machine.leases.items()}

    def _renew(self, request: Renew) -> tuple[int, ...]:
        times_ms = self._lease_times_ms()
        if self.leases is None:
            return tuple(lease for lease in request.leases if lease in times_ms)
        return self.leases.renew(request.leases, times_ms, self.clock_ms())

    def _expire_leases(self, role: Leader) -> None:
        if not self.world.options.tenants:
            return
        self._open_lease_session(role)
        if not self.up or not isinstance(role := self.state.role, Leader):
            return
        if role.beat_acked == self.lease_round:
            return
        if self.leases is None and not role.counted <= self.lease_session <= self.replica.slot:
            return
        times_ms, now_ms = self._lease_times_ms(), self.clock_ms()
        if self.leases is None:
            self.leases = self._lease_clock(times_ms, now_ms)
        else:
            self.leases.reconcile(times_ms, now_ms)
        self.lease_round = role.beat_acked
        self.leases.advance(now_ms, role.beat_acked)
        expired = self.leases.expire(EXPIRIES_PER_TURN)
        if not expired:
            return
        slots, _ = self.world.core.room(self.state)
        if not self._quorum_has_room(role) or slots < len(expired):
            self.leases.give_up(expired)
            return
        self.world.counts["leases_expired"] += len(expired)
        values = tuple(
            encode_value(
                Value(
                    Kind.ENGINE,
                    role.ballot,
                    self.world.now // 1000,
                    self.lease_session,
                    command=encode_command(LeaseExpire(lease)),
                )
            )
            for lease in expired
        )
        self.step(Propose(values))

    def _open_lease_session(self, role: Leader) -> None:
        if (
            self.leases is not None
            or self.lease_session >= role.counted
            or self.replica.slot < self.barrier
            or not self._lease_times_ms()
            or self.world.core.room(self.state)[0] == 0
            or not self._quorum_has_room(role)
        ):
            return
        self.lease_session = role.next_slot
        value = Value(Kind.OPEN, role.ballot, self.world.now // 1000, command=LEADER)
        self.step(Propose((encode_value(value),)))

    def _lease_clock(self, times_ms: dict[int, int], now_ms: int) -> LeaseClock:
        heartbeat_ms = max(1, self.config.heartbeat_ticks * self.tick_us // 1000)
        return LeaseClock(heartbeat_ms, times_ms, now_ms)

    # --- what is refused --------------------------------------------------------------------

    def _quorum_has_room(self, role: Leader) -> bool:
        state, config = self.state, self.config
        if state.has_room and all(ack.has_room for ack in role.acks):
            return True
        fresh = state.tick - ROOM_ACK_HEARTBEATS * config.heartbeat_ticks
        yes = [ack.voter for ack in role.acks if ack.has_room and ack.tick >= fresh]
        if state.has_room:
            yes.append(self.address)
        return config.quorums.accept(yes) is Tally.WIN

    def _refused_for_its_level(self, client: Client, submit: Submit) -> bool:
        """A gateway proposes nothing that its own program does not know."""
        if self.level >= NEWER_LEVEL or not why_inadmissible(submit.command):
            return False
        self.world.counts["refused_for_their_level"] += 1
        self._reply(client, Refusal(submit.id, RefusalReason.MALFORMED, 0, ""))
        return True

    # --- the stream -------------------------------------------------------------------------

    def _stream(self, first: int, last: int, ballot: object, *, repair: bool) -> None:
        """Multicast fixed slots, as many as fit in each datagram."""
        before = self.log_before
        values: list[bytes] = []
        size = 0
        for slot in range(max(first, before + 1), last + 1):
            value = self.log[slot - before - 1]
            if values and size + len(value) > STREAM_BYTES_MAX:
                self._stream_run(slot - len(values), values, ballot, repair=repair)
                values, size = [], 0
            if len(value) <= STREAM_BYTES_MAX:
                values.append(value)
                size += len(value)
        if values:
            self._stream_run(last + 1 - len(values), values, ballot, repair=repair)

    def _stream_run(self, first: int, values: list[bytes], ballot: object, *, repair: bool) -> None:
        chains, before = self.chains, self.log_before
        self._multicast(
            StreamRun(
                ballot,
                first,
                chains[first - 1 - before],
                tuple(values),
                self.replica.slot,
                chains[-1],
                repair,
            )
        )

    def _stream_tip(self) -> None:
        state = self.state
        leading = isinstance(state.role, Leader)
        if not leading and state.tick % 16:
            return
        role = type(state.role).__name__.lower()
        digest = VoterDigest(
            role, state.promised, state.last_accepted, state.fixed, self.replica.slot, 0, 0, 0, ""
        )
        ballot = state.role.ballot if isinstance(state.role, Leader) else state.leader
        self._multicast(StreamTip(ballot, leading, self.replica.slot, self.chains[-1], digest))

    def _multicast(self, message: StreamRun | StreamTip) -> None:
        world = self.world
        data = frame(self.identity, Channel.STREAM, encode_body(message))
        for listener in world.listeners:
            world.network.datagram(
                self.address, listener, data, listener.on_stream, world.network.stream_loss
            )

    def on_repair(self, data: bytes, _: object) -> None:
        """A listener's repair request."""
        if not self.up:
            return
        try:
            request = decode_stream(unframe(data, self.world.cluster_id, Channel.STREAM).body)
        except FrameError as error:
            self.world.counts[f"dropped_{error.reason}"] += 1
            return
        assert isinstance(request, RepairRequest)
        last = min(request.last, self.replica.slot)
        if request.responder == self.address and request.first <= last:
            self.world.counts["repairs"] += 1
            self._stream(request.first, last, self.state.leader or NO_BALLOT, repair=True)

    # --- catching up ------------------------------------------------------------------------

    def _catch_up(self, to: int, first: int) -> None:
        self.world.counts["catch_ups"] += 1
        self.conversation += 1
        self._ask(to, CatchupRequest(str(self), first), self.conversation)

    def _ask(self, to: int, request: CatchupRequest | SnapshotRequest, talk: int) -> None:
        self.world.call(
            self,
            self.world.voters[to],
            frame(self.identity, Channel.CATCHUP, encode_body(request)),
            lambda reply, _: self._on_catch_up(to, talk, reply),
            lambda _, __: self._on_catch_up_failed(to),
            self.life,
        )

    def _on_catch_up_failed(self, to: int) -> None:
        self.world.counts["catch_ups_failed"] += 1
        self.step(CatchUpFailed(to))

    def _on_catch_up(self, to: int, talk: int, reply: bytes) -> None:
        (part,) = FrameBuffer(self.world.cluster_id, Channel.CATCHUP).feed(reply)
        match decode_catchup(part.body):
            case CatchupEntries() as entries:
                self.step(
                    Learn(to, entries.first, entries.chain_before, entries.values, entries.tip.slot)
                )
            case SnapshotOffer(slot=slot):
                self.download = (talk, b"")
                self._ask(to, SnapshotRequest(slot, 0), talk)
            case SnapshotChunk(slot=slot, data=data):
                if self.download[0] != talk:
                    return
                held = self.download[1] + data
                self.download = (talk, held)
                if data:
                    self._ask(to, SnapshotRequest(slot, len(held)), talk)
                else:
                    self._install(slot, held)
            case AskOther():
                self._on_catch_up_failed(to)
            case other:
                raise Violation(f"{self} got {other} in answer to a catch-up request")

    def _install(self, slot: int, data: bytes) -> None:
        if slot <= self.state.fixed:
            self.world.counts["snapshots_too_late"] += 1
            return
        self.world.observer.on_snapshot(self, slot, data)
        if not self._keep_snapshot(slot, data):
            return
        replica = self.replica_type(self, self.world.observer, self.level)
        slot, chain, genesis = replica.restore(data)
        self.replica = replica
        self.log, self.log_before, self.chains = [], slot, [chain]
        self.waiting.clear()
        self.world.counts["snapshots_installed"] += 1
        self.step(Install(slot, chain, genesis))

    # --- the archive process ----------------------------------------------------------------

    def serve(self, data: bytes) -> bytes | None:
        """What this voter's archive answers to a catch-up request; None: it is down."""
        if self.world.archives_down_until > self.world.now:
            return None
        try:
            (part,) = FrameBuffer(self.world.cluster_id, Channel.CATCHUP).feed(data)
            request = decode_catchup(part.body)
        except (FrameError, ValueError):
            return None
        answer: CatchupEntries | SnapshotOffer | SnapshotChunk | AskOther
        match request:
            case CatchupRequest(first=first):
                answer = self._serve_entries(first)
            case SnapshotRequest(slot=slot, offset=offset):
                held = self.disk.snapshots.get(slot)
                if held is None:
                    answer = AskOther(0, "that snapshot is gone")
                else:
                    chunk = held[offset : offset + SNAPSHOT_CHUNK_BYTES]
                    answer = SnapshotChunk(slot, offset, chunk)
            case _:
                return None
        return frame(self.identity, Channel.CATCHUP, encode_body(answer))

    def _serve_entries(self, first: int) -> CatchupEntries | SnapshotOffer | AskOther:
        before = self.log_before
        tip = max(before, min(self.replica.slot, self.written_slot))
        if first <= before:
            if not self.disk.snapshots:
                return AskOther(0, "nothing so old here")
            slot = max(self.disk.snapshots)
            data = self.disk.snapshots[slot]
            return SnapshotOffer(slot, b"", len(data), b"")
        values: list[bytes] = []
        size = 0
        for value in self.log[first - before - 1 : tip - before]:
            if values and size + len(value) > min(RUN_BYTES_MAX, 20_000):
                break
            values.append(value)
            size += len(value)
        chain = self.chains[first - 1 - before] if first - 1 <= tip else b""
        newest = SignedTip(tip, self.chains[tip - before], NO_BALLOT, self.identity.sender, b"")
        last = first + len(values) - 1
        end = newest
        if values and last < tip:
            end = SignedTip(last, self.chains[last - before], NO_BALLOT, newest.voter, b"")
        return CatchupEntries(first, chain, tuple(values), end, newest)
