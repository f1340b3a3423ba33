"""The nemesis: this module alone does harm, one thing after another, and undoes it.

Each harm is a coroutine of a :class:`Field` that ends when the cluster serves again. It waits for
what it causes (another leader, further answers), never for time to pass. Where a deposed leader
must not answer, it is asked on a connection made before, and what it says goes into the history.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from listeners.sql import query_socket_async
from tests.linear.cable import Cable
from tests.linear.history import ABSENT
from tests.linear.machines import Machines
from tests.linear.workload import Load
from trex_core.messages import Answer, Kind, Outcome, Query, Status, StatusRequest, Submit
from trex_core.metadata.commands import (
    ConfigEntry,
    ConfigGet,
    ConfigPut,
    Done,
    decode_reply,
    decode_result,
    encode_command,
    encode_question,
)
from voters.client import connect
from voters.driver import Driver, OutcomeUnknown, TrexError, ask_voter
from voters.driver import _Link as Link
from voters.driver import _linked as linked
from voters.driver import _LinkLost as LinkLost

WAIT_S = 60.0
ASK_S = 0.5
HOUR_S = 3600
MAYFLY_MS = 300
ASKS_PER_S = 100
MAYFLY_S_MAX = 20.0


@dataclass
class Field:
    """What the nemesis works on. ``faults`` counts what it did."""

    machines: Machines
    load: Load
    driver: Driver
    cable: Cable
    """Of the embedded listener."""
    installed: int = 0
    """Snapshots that voters installed."""
    faults: Counter[str] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)
    """What deposed leaders said to a linearizable read."""
    harm: str = ""
    served_s: dict[str, float] = field(default_factory=dict)
    """By harm, the longest it took until the next answers came."""

    @property
    def voters(self) -> tuple[int, ...]:
        return self.machines.voter_ids

    async def leader(self, among: tuple[int, ...] = (), but: int = 0) -> int:
        """Who leads, other than ``but``, asked of ``among`` (nobody named: all)."""
        with anyio.fail_after(WAIT_S):
            while True:
                best: Status | None = None
                for voter in among or self.voters:
                    with suppress(TrexError):
                        status = await ask_voter(
                            self.load.config, self.load.credentials, voter, StatusRequest(1), ASK_S
                        )
                        assert isinstance(status, Status)
                        leads = status.role == "leader" and voter != but
                        if leads and (best is None or status.ballot > best.ballot):
                            best = status
                if best is not None:
                    return best.voter
                await anyio.sleep(0.02)

    def others(self, *voters: int) -> tuple[int, ...]:
        """All voters but these."""
        return tuple(voter for voter in self.voters if voter not in voters)

    async def serves(self) -> None:
        """Wait until the cluster answers again."""
        began = time.monotonic()
        await self.load.more(25, WAIT_S)
        took_s = time.monotonic() - began
        self.served_s[self.harm] = max(took_s, self.served_s.get(self.harm, 0.0))

    async def write(self, key: str, leader: int = 0) -> int:
        """Write ``key``, and note it: at ``leader`` and on a connection of its own (somebody else
        may still be believed to lead), or at whoever leads. Its slot; 0 if nobody knows."""
        history = self.load.history
        op = history.begin("nemesis", "put", key, self.load.value("nemesis"))
        command = encode_command(ConfigPut(key, str(op.value)))
        try:
            if leader:
                outcome = await self._submit_at(leader, command)
            else:
                outcome = await self.driver.submit(command, WAIT_S)
        except OutcomeUnknown as error:
            outcome = await self.driver.resolve(error, WAIT_S)
        if outcome is None:
            return 0  # that one led no longer: it may have happened
        result = decode_result(outcome.body)
        assert isinstance(result, Done), result
        history.end(op, "done", result.slot)
        return result.slot

    async def _submit_at(self, leader: int, command: bytes) -> Outcome | None:
        load = self.load
        with suppress(LinkLost):
            entry, cluster = load.config.voter(leader), load.config.cluster_id_bytes
            async with linked(entry, cluster, load.credentials, WAIT_S) as link:
                opened = await link.ask(Submit(1, Kind.OPEN, 0, 0, 0, b""))
                if isinstance(opened, Outcome):
                    request = Submit(2, Kind.COMMAND, opened.slot, 1, 1, command)
                    done = await link.ask(request)
                    return done if isinstance(done, Outcome) else None
        return None

    @asynccontextmanager
    async def linked(self, voter: int) -> AsyncIterator[OldLink]:
        """A connection to ``voter``, made now."""
        config = self.load.config
        entry = config.voter(voter)
        async with linked(entry, config.cluster_id_bytes, self.load.credentials, WAIT_S) as link:
            yield OldLink(self, voter, link)


@dataclass
class OldLink:
    """A connection to a voter that led when it was made. Reads on it are linearizable ones, and in
    the history like any other; ``Field.stale`` counts what became of them."""

    field: Field
    voter: int
    link: Link
    over: bool = False
    """It hung up."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _moved: anyio.Event = field(default_factory=anyio.Event)

    async def ask(self, key: str, sent: anyio.Event | None = None) -> str:
        """Read ``key``; ``sent`` is set when the request has left. What became of it."""
        history = self.field.load.history
        query = Query(next(self._numbers), encode_question(ConfigGet(key)), True)
        op = history.begin(f"held by {self.voter}", "get", key)
        said = "silence"
        try:
            await self.link.send([query])
            if sent is not None:
                sent.set()
            with anyio.move_on_after(WAIT_S):
                while said == "silence":
                    for reply in await self.link.receive() or ():
                        if reply.id == query.id:
                            said = "answered" if isinstance(reply, Answer) else "refused"
                            break
        except LinkLost:
            said = "hung up"
        if said == "answered":
            assert isinstance(reply, Answer)
            found = decode_reply(reply.body)
            assert found is None or isinstance(found, ConfigEntry)
            value, slot = (None, ABSENT) if found is None else (found.value, found.slot)
            history.end(op, "done", slot, read=value, at=reply.slot)
        self.field.stale[said] += 1
        return said

    async def ask_on(self) -> None:
        """Read what the load uses, one after another, ASKS_PER_S times a second at most, until it
        hangs up."""
        while not self.over:
            self.over = await self.ask(self.field.load.key()) == "hung up"
            moved, self._moved = self._moved, anyio.Event()
            moved.set()
            await anyio.sleep(1 / ASKS_PER_S)

    async def asked_again(self, times: int) -> None:
        """Wait until it was asked so often again, or hung up."""
        with anyio.fail_after(WAIT_S):
            for _ in range(times):
                if not self.over:
                    await self._moved.wait()


Harm = Callable[[Field], Awaitable[None]]


# --- processes ---------------------------------------------------------------------------------


async def kill_leader(f: Field) -> None:
    leader = await f.leader()
    f.machines.voter(leader).kill()
    f.faults["kill -9 of the leader"] += 1
    await f.serves()
    f.machines.start_voter(leader)
    await f.serves()


async def kill_followers(f: Field) -> None:
    leader = await f.leader()
    some = f.others(leader)[: (len(f.voters) - 1) // 2]
    for voter in some:
        f.machines.voter(voter).kill()
        f.faults["kill -9 of a follower"] += 1
    await f.serves()
    for voter in some:
        f.machines.start_voter(voter)
    await f.serves()


async def kill_all(f: Field) -> None:
    for voter in f.voters:
        f.machines.voter(voter).send(signal.SIGKILL)
    for voter in f.voters:
        f.machines.voter(voter).process.wait()
    f.faults["kill -9 of all"] += 1
    f.machines.start_voters()
    await f.serves()


async def kill_listener(f: Field) -> None:
    name = f.machines.listeners[0]
    f.machines.children[name].kill()
    f.faults["kill -9 of a listener"] += 1
    await f.serves()
    f.machines.start_listeners()


async def stop_leader(f: Field) -> None:
    """SIGSTOP until another leads and has written; then the old one wakes with a read to answer."""
    leader = await f.leader()
    key = f.load.key()
    async with f.linked(leader) as old, anyio.create_task_group() as group:
        f.machines.voter(leader).pause()
        f.faults["SIGSTOP of the leader"] += 1
        try:
            await f.write(key, await f.leader(f.others(leader), but=leader))
            await f.serves()
            sent = anyio.Event()
            group.start_soon(old.ask, key, sent)
            await sent.wait()
        finally:
            f.machines.voter(leader).resume()
    await f.serves()


async def stop_follower(f: Field) -> None:
    leader = await f.leader()
    follower = f.others(leader)[-1]
    f.machines.voter(follower).pause()
    f.faults["SIGSTOP of a follower"] += 1
    try:
        await f.load.more(100)
    finally:
        f.machines.voter(follower).resume()
    await f.serves()


async def stop_listener(f: Field) -> None:
    name = f.machines.listeners[-1]
    f.machines.children[name].pause()
    f.faults["SIGSTOP of a listener"] += 1
    try:
        await f.load.more(100)
    finally:
        f.machines.children[name].resume()
    await f.serves()


PROCESSES: tuple[Harm, ...] = (
    kill_leader,
    stop_leader,
    kill_followers,
    stop_listener,
    kill_all,
    stop_follower,
    kill_listener,
)


# --- networks ----------------------------------------------------------------------------------


def _name(voter: int) -> str:
    return f"voter-{voter}"


async def isolate_leader(f: Field) -> None:
    """The leader alone, a client beside it."""
    leader = await f.leader()
    await _cut_off(f, leader, (leader,), "isolated leader")


async def isolate_a_leader_for_ever(f: Field) -> None:
    """The same where the leader will not give way: its clients wait until it is over."""
    net = f.machines.net
    assert net is not None
    leader = await f.leader()
    others = f.others(leader)
    name = _name(leader)
    await _deposed(f, leader, others, "isolated leader", lambda: net.split([name]), served=False)


async def minority(f: Field) -> None:
    """The leader and as many followers as make no majority, and a listener, are cut off."""
    leader = await f.leader()
    size = (len(f.voters) - 1) // 2
    with_it = (leader, *f.others(leader)[: size - 1])
    await _cut_off(f, leader, with_it, "leader in the minority", f.machines.listeners[-1:])


async def _cut_off(
    f: Field, leader: int, right: tuple[int, ...], what: str, also: tuple[str, ...] = ()
) -> None:
    net = f.machines.net
    assert net is not None
    await _deposed(
        f, leader, f.others(*right), what, lambda: net.split([*map(_name, right), *also])
    )


async def _deposed(
    f: Field,
    leader: int,
    others: tuple[int, ...],
    what: str,
    harm: Callable[[], None],
    *,
    served: bool = True,
) -> None:
    """Do ``harm`` to ``leader`` until one of ``others`` leads, has written and (``served``) serves
    the load. The deposed one is asked on an old connection all the while."""
    net = f.machines.net
    assert net is not None
    async with f.linked(leader) as old, anyio.create_task_group() as group:
        group.start_soon(old.ask_on)
        await old.asked_again(2)
        harm()
        f.faults[what] += 1
        try:
            await f.write(f.load.key(), await f.leader(others, but=leader))
            await old.asked_again(3)
            if served:
                await f.serves()
        finally:
            net.heal()
            group.cancel_scope.cancel()
    await f.serves()


async def follower_cut_off(f: Field) -> None:
    net = f.machines.net
    assert net is not None
    leader = await f.leader()
    net.split([_name(f.others(leader)[0])])
    f.faults["minority without the leader"] += 1
    try:
        await f.load.more(100)
    finally:
        net.heal()
    await f.serves()


async def deaf_leader(f: Field) -> None:
    """The leader's heartbeats arrive, and no answer to it: it must give way."""
    await _one_way(f, True)


async def mute_leader(f: Field) -> None:
    """The leader hears everybody, and nobody hears it."""
    await _one_way(f, False)


async def _one_way(f: Field, deaf: bool) -> None:
    net = f.machines.net
    assert net is not None
    leader = await f.leader()
    others = f.others(leader)

    def harm() -> None:
        for other in others:
            pair = (_name(other), _name(leader))
            net.lose(*(pair if deaf else pair[::-1]))

    await _deposed(f, leader, others, "deaf leader" if deaf else "mute leader", harm)


async def no_multicast(f: Field) -> None:
    """No datagram of the stream arrives at any listener for a while."""
    net = f.machines.net
    assert net is not None
    net.deafen(["client", *f.machines.listeners])
    f.faults["multicast lost"] += 1
    try:
        await f.load.more(150)
    finally:
        net.heal()
    await f.serves()


NETWORKS: tuple[Harm, ...] = (
    isolate_leader,
    deaf_leader,
    minority,
    no_multicast,
    mute_leader,
    follower_cut_off,
)


# --- away for longer than logs reach -----------------------------------------------------------


async def outlive_leader(f: Field) -> None:
    """Kill -9 of the leader. What it had accepted last may be decided otherwise meanwhile."""
    leader = await f.leader()
    await _outlive(f, (leader,), "kill -9 of the leader, until its log was gone")


async def outlive_followers(f: Field) -> None:
    """Kill -9 of as many followers as may be."""
    leader = await f.leader()
    some = f.others(leader)[: (len(f.voters) - 1) // 2]
    await _outlive(f, some, "kill -9 of a follower, until its log was gone")


async def _outlive(f: Field, some: tuple[int, ...], what: str) -> None:
    """(A voter that is stopped instead finds what it missed in its socket's buffer.)"""
    for voter in some:
        f.machines.voter(voter).kill()
        f.faults[what] += 1
    slot = await _listeners_away(f, some)
    for voter in some:
        f.machines.start_voter(voter)
    await _listeners_back(f, slot)
    for voter in some:  # each is back, and can only have a snapshot
        wait = f.machines.voter(voter).wait_for_line
        line = r"voter\.snapshot\.installed"
        await anyio.to_thread.run_sync(wait, line, WAIT_S)
        f.installed += 1
    await f.serves()


async def _listeners_away(f: Field, away: tuple[int, ...]) -> int:
    """Kill a listener process and pull the cable of the embedded one, until nobody's log reaches
    back to a slot that both have missed, and the voters ``away`` too: that slot.

    The embedded one also has to ask archives in vain before it is heard again: one that was deaf
    for a moment asks for repairs by multicast, for which voters keep much more in memory."""
    counters = f.load.follower.counters
    in_vain = counters["catchup_failed"]
    f.machines.children[f.machines.listeners[0]].kill()
    f.cable.out = True
    slot = await f.write(f.load.key())
    with anyio.fail_after(WAIT_S):
        for voter in f.others(*away):
            while await f.load.reader.kept(voter, slot):
                await f.load.more(20)
        while counters["catchup_failed"] == in_vain:
            await f.load.more(5)
    return slot


async def _listeners_back(f: Field, slot: int) -> None:
    """Both must jump over ``slot``. Voters and listeners still have it in memory for repairs, so
    the process is deaf to multicast until it did; then it is killed again, and hears."""
    name, follower = f.machines.listeners[0], f.load.follower
    deaf = f.machines.start_listener(name, drop_percent=100)
    before = follower.counters["resets"]
    f.cable.out = False
    await follower.wait_applied(slot, WAIT_S)
    assert follower.counters["resets"] > before, "slot by slot, of a log that was gone"
    await anyio.to_thread.run_sync(deaf.wait_for_line, r"listener\.reset", WAIT_S)
    stored = await query_socket_async(
        f.machines.directory / name / "sql.sock",
        "SELECT history_from_slot FROM listener",
        deadline_ms=int(1000 * WAIT_S),
        at_least_slot=slot,
    )
    assert stored.rows[0][0] > slot, "it tells of what it cannot know"
    deaf.kill()
    f.faults["kill -9 of a listener after a reset"] += 1
    f.machines.start_listener(name, drop_percent=2)


RESETS: tuple[Harm, ...] = (outlive_leader, outlive_followers)


# --- clocks ------------------------------------------------------------------------------------


async def step_clocks(f: Field) -> None:
    """Wall clocks jump hours forth and back, each process's by itself, and to where they were. A
    lease that nobody renews ends in its time, by the clock that does not jump."""
    clock = f.machines.clock
    assert clock is not None
    names = [*map(_name, f.voters), *f.machines.listeners]
    leader = await f.leader()
    before = await f.driver.status(leader)
    chief = _name(leader)
    for shift in ({chief: 5}, {chief: -7}, {name: 9 - 4 * n for n, name in enumerate(names)}, {}):
        async with connect(f.load.config, f.load.folder, deadline_s=WAIT_S) as client:
            sent_s = time.monotonic()
            lease = await client.grant(MAYFLY_MS)
            watch = f.load.follower.changes(since=lease.slot - 1, kind="lease")
            for name in names:
                clock.set(name, shift.get(name, 0) * HOUR_S)
            f.faults["wall clock stepped"] += 1
            told = await f.driver.status(leader)
            off_s = told.time_ms / 1000 - time.time()
            assert abs(off_s - shift.get(chief, 0) * HOUR_S) < 60, "the leader's clock did step"
            with anyio.fail_after(WAIT_S):
                async for delivery in watch:
                    gone = [c for c in delivery.changes if c.key == str(lease.slot) and not c.new]
                    if gone:
                        break
            lived_s = time.monotonic() - sent_s
            assert MAYFLY_MS / 1000 <= lived_s < MAYFLY_S_MAX, f"a lease lived {lived_s} s"
        await f.serves()
    after = await f.driver.status(leader)
    assert (after.role, after.ballot) == ("leader", before.ballot), "no election for a wall clock"


CLOCKS: tuple[Harm, ...] = (step_clocks,)
