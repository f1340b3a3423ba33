"""A trial: load and harm on a real cluster, then the verdict. This module alone runs one whole."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio

from listeners import Listener, open_listener
from listeners.sql import SqlError, query_socket_async
from tests.e2e.harness import config_of
from tests.linear import promises
from tests.linear.cable import Cable
from tests.linear.checker import blind, judge, slots, with_slots_met
from tests.linear.log import Log, LogReader
from tests.linear.machines import Machines
from tests.linear.nemesis import Field, Harm
from tests.linear.promises import Broken, Heard
from tests.linear.workload import Held, Load
from trex_core.messages import Status
from voters.driver import open_driver

CLIENTS = 6
CONTENDERS = 2
SETTLE_S = 60.0
BLIND_STEPS_MAX = 200_000
RESUME_AFTER = 40
"""One subscriber drops out after so many deliveries, and resumes where it was."""

RESET_LINE = r'"?listener\.reset"?.*?to_slot"?[=:] ?(\d+)'


@dataclass
class Figures:
    """What a trial came to."""

    seconds: float = 0.0
    operations: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    trouble: Counter[str] = field(default_factory=Counter)
    old_leaders: Counter[str] = field(default_factory=Counter)
    keys: int = 0
    slots: int = 0
    deliveries: int = 0
    bookmarks: int = 0
    resumed: int = 0
    resets: int = 0
    """How often the embedded listener jumped by a snapshot."""
    resets_stored: int = 0
    """So many listener processes have a store that begins with a snapshot."""
    installed: int = 0
    """Snapshots that voters installed."""
    holds: int = 0
    lost_leases: int = 0
    checker_s: float = 0.0
    steps: int = 0
    unavailable_s: float = 0.0
    started_s: float = 0.0
    harms_s: dict[str, float] = field(default_factory=dict)
    """How long each harm took, the last time."""
    served_s: dict[str, float] = field(default_factory=dict)
    """By harm, the longest that it took to be answered again."""
    changed_together: int = 0

    def __str__(self) -> str:
        def told(counts: Counter[str]) -> str:
            return ", ".join(f"{what} {count}" for what, count in counts.most_common()) or "none"

        served = ", ".join(f"{what} {took_s:.1f} s" for what, took_s in self.served_s.items())
        took = ", ".join(f"{what} {took_s:.1f}" for what, took_s in self.harms_s.items())
        return f"""\
{sum(self.operations.values())} operations in {self.seconds:.1f} s on {self.keys} keys, \
{self.slots} slots: {told(self.operations)}
  answered by level: {told(self.levels)}; troubles: {told(self.trouble)}
  faults: {told(self.faults)}; reads asked of deposed leaders: {told(self.old_leaders)}
  longest without an answer: {self.unavailable_s:.2f} s; 25 answers came after: {served or "-"}
  the lock was held {self.holds} times, lost {self.lost_leases}; \
slots of several changes {self.changed_together}
  deliveries {self.deliveries}, bookmarks {self.bookmarks}, resumed {self.resumed}, \
resets {self.resets} and {self.resets_stored} stored, snapshots installed by voters \
{self.installed}
  seconds: started in {self.started_s:.1f}, {took}
  checker: {self.checker_s:.2f} s of CPU, {self.steps} states"""


async def run_trial(
    machines: Machines,
    harms: Sequence[Harm],
    *,
    operations: int,
    seed: int = 0,
    until_s: float = 0.0,
) -> Figures:
    """Start everything, do all ``harms`` at least once (over and over until the monotonic
    ``until_s``) under load, and at least ``operations`` operations; then judge. ``machines`` is
    entered already. Fails with the first promise found broken."""
    began = time.monotonic()
    machines.start_voters()
    machines.start_listeners()
    config = config_of(machines)
    reader = LogReader(config, machines.credentials("listener"))
    follower = Heard("embedded")
    resuming = Heard("resuming")
    figures = Figures()
    async with AsyncExitStack() as stack:
        folder = machines.credentials("listener")
        cable = Cable(config, folder, follower.name, 0.03, alone=machines.cut)
        listener = await stack.enter_async_context(
            open_listener(config, None, name=follower.name, network=cable, observer=follower)
        )
        follower.capture = listener.capture
        driver = await stack.enter_async_context(
            open_driver(config, machines.credentials(), deadline_s=30)
        )
        load = Load(machines, config, listener, random.Random(seed), reader)
        grounds = Field(machines, load, driver, cable)
        async with anyio.create_task_group() as reading:
            if machines.cut:
                reading.start_soon(reader.follow)
            async with anyio.create_task_group() as ears:
                ears.start_soon(_subscribe, listener, follower)
                ears.start_soon(_resume, listener, resuming, figures)
                async with anyio.create_task_group() as group:
                    for number in range(CLIENTS):
                        group.start_soon(load.client, f"c{number}")
                    for number in range(CONTENDERS):
                        group.start_soon(load.contender, f"l{number}")
                    await load.more(50)
                    figures.started_s = time.monotonic() - began
                    while True:
                        for harm in harms:
                            grounds.harm = harm.__name__
                            since_s = time.monotonic()
                            await harm(grounds)
                            figures.harms_s[harm.__name__] = time.monotonic() - since_s
                        if time.monotonic() >= until_s:
                            break
                    if len(load.history.ops) < operations:
                        await load.more((operations - len(load.history.ops)) // 2)
                    load.stop.set()
                machines.start_listeners()  # each is there, or is on its way
                await grounds.write("the end")
                last = load.history.ops[-1].slot
                await listener.wait_applied(last, SETTLE_S)
                with anyio.fail_after(SETTLE_S):
                    known = reader.log if machines.cut else None
                    while min(_at(follower), _at(resuming), known.last if known else last) < last:
                        await anyio.sleep(0.01)
                ears.cancel_scope.cancel()
            seconds = time.monotonic() - began
            log = await _whole_log(machines, load, reader, last)
            reading.cancel_scope.cancel()
        figures.resets_stored = await _check_stores(machines, log, last)
        figures.resets = listener.counters["resets"]
        figures.installed = grounds.installed
    _judge(figures, load, grounds, log, [follower, resuming])
    figures.seconds = seconds
    return figures


# --- listeners ---------------------------------------------------------------------------------


async def _subscribe(listener: Listener, heard: Heard) -> None:
    async for delivery in listener.changes(since=0, progress=True):
        heard.deliveries.append(delivery)


async def _resume(listener: Listener, heard: Heard, figures: Figures) -> None:
    """A subscriber that drops out and resumes, again and again."""
    since = 0
    while True:
        subscription = listener.changes(since=since, progress=True)
        count = 0
        async for delivery in subscription:
            heard.deliveries.append(delivery)
            count += 1
            if count == RESUME_AFTER:
                break
        since = subscription.slot
        figures.resumed += 1


def _at(heard: Heard) -> int:
    """The slot the newest delivery brought its reader to."""
    newest: Any = heard.deliveries[-1] if heard.deliveries else None
    return getattr(newest, "slot", getattr(newest, "to_slot", 0))


async def _whole_log(machines: Machines, load: Load, reader: LogReader, last: int) -> Log:
    """The log, alike at every voter; the chain each voter is at is the log's."""
    statuses: list[Status] = []
    async with open_driver(load.config, load.folder, deadline_s=SETTLE_S) as driver:
        with anyio.fail_after(SETTLE_S):
            while len(statuses) < len(machines.voter_ids):
                told = await driver.statuses(1)  # one that was restarted last may still be starting
                statuses = [
                    status
                    for status in told.values()
                    if isinstance(status, Status) and status.applied >= last
                ]
                await anyio.sleep(0.02)
    cut, log = await reader.compare(machines.voter_ids, last), reader.log
    wanted = len(machines.voter_ids) if machines.cut else 0
    assert cut == wanted, f"{cut} voters keep their log in part only, not {wanted}"
    for status in statuses:
        if status.fixed <= log.last and status.chain != log.chains[status.fixed]:
            raise Broken(f"voter {status.voter} is at another chain at slot {status.fixed}")
    return log


async def _check_stores(machines: Machines, log: Log, last: int) -> int:
    """The stores of the listener processes: every slot from ``history_from_slot`` on one row, with
    the voters' chain; the rows of the state and of the history are the log's, and nothing is told
    of what was before. The history begins with the log, or after a jump that the listener spoke
    of. Returns how many began after a jump."""
    jumped = 0
    for name in machines.listeners:
        socket = machines.directory / name / "sql.sock"

        async def ask(sql: str, socket: Path = socket) -> list[tuple[Any, ...]]:
            result = await query_socket_async(socket, sql, deadline_ms=60_000, at_least_slot=last)
            return [tuple(row) for row in result.rows]

        ((first,),) = await ask("SELECT history_from_slot FROM listener")
        said = (machines.directory / "logs" / f"{name}.log").read_text()
        begins = {1, *(int(slot) + 1 for slot in re.findall(RESET_LINE, said))}
        if first not in begins:
            raise Broken(f"listener {name}: its history is from {first} on, not one of {begins}")
        jumped += first > 1
        rows = await ask(f"SELECT slot, chain FROM commits WHERE slot <= {last} ORDER BY slot")
        if [slot for slot, _ in rows] != list(range(first, last + 1)):
            raise Broken(f"listener {name}: a slot is missing, or there twice, or before {first}")
        for slot, chain in rows:
            there = bytes.fromhex(chain) if isinstance(chain, str) else bytes(chain)
            if there != log.chains[slot]:
                raise Broken(f"listener {name}: another chain at slot {slot}")
        history = await ask(
            f"SELECT slot, kind, key FROM history WHERE slot <= {last} ORDER BY slot, kind, key"
        )
        due = sorted(
            (slot, change.kind, change.key)
            for slot, changes in log.changes.items()
            for change in changes
            if first <= slot <= last
        )
        if history != due:
            odd = sorted(set(history) ^ set(due))[:5]
            raise Broken(f"listener {name}: its history is not the log's: {odd}")
        for slot in {first - 1, last}:
            config = await ask(f"SELECT key, value, slot FROM config_at({slot})")
            entries = log.states[slot][0].config.items()
            if sorted(config) != sorted((key, each.value, each.slot) for key, each in entries):
                raise Broken(f"listener {name}: its config at {slot} is not the log's")
        if first > 1:
            try:
                told: object = await ask(f"FROM config_at({first - 2})")
            except SqlError as error:
                told = error
            if f"history begins at slot {first} " not in str(told):
                raise Broken(f"listener {name}: of slot {first - 2} it tells {told}")
    return jumped


# --- the verdict -------------------------------------------------------------------------------


def check_locks(locks: Sequence[Held]) -> None:
    """No two held the lock at one moment, and tokens ascend."""
    held = sorted(locks, key=lambda each: each.since_s)
    for before, after in pairwise(held):
        if after.since_s < before.until_s:
            raise Broken(f"two held the lock at once:\n  {before}\n  {after}")
        if after.token <= before.token:
            raise Broken(f"the fencing token went back:\n  {before}\n  {after}")


def _judge(
    figures: Figures, load: Load, grounds: Field, log: Log, accounts: Sequence[Heard]
) -> None:
    ops = load.history.ops
    began = time.process_time()
    promises.check_exactly_once(ops, log)
    promises.check_prefixes(ops, log)
    promises.check_real_time(ops)
    promises.check_sessions(ops, log)
    promises.check_monotonic(ops)
    register = load.history.register()
    for key_ops in register.values():
        with_slots_met(key_ops)
        figures.steps += judge(key_ops, slots).steps
        figures.steps += judge(key_ops, blind, BLIND_STEPS_MAX).steps
    for heard in accounts:
        promises.check_deliveries(heard, log)
    promises.check_runs(accounts[0], log)
    promises.check_jumps(accounts[0], log)
    promises.check_same(accounts)
    check_locks(load.locks)
    if load.early:
        raise Broken(f"leases ended before their time: {load.early}")
    figures.checker_s = time.process_time() - began
    figures.keys, figures.slots = len(register), log.last
    for op in ops:
        figures.operations[f"{op.kind} {op.outcome}"] += 1
        if op.kind == "get" and op.outcome == "done":
            figures.levels["local at a voter" if "voter-" in op.level else op.level] += 1
        if op.least and op.outcome == "done":
            figures.levels["at_least"] += 1
    figures.faults, figures.old_leaders = grounds.faults, grounds.stale
    figures.trouble, figures.served_s = load.trouble, grounds.served_s
    figures.deliveries = sum(len(heard.deliveries) for heard in accounts)
    figures.bookmarks = sum(
        type(each).__name__ == "Progress" for heard in accounts for each in heard.deliveries
    )
    figures.holds, figures.lost_leases = len(load.locks), load.lost_leases
    figures.changed_together = sum(len(changes) > 1 for changes in log.changes.values())
    answers = sorted(
        op.ended
        for op in ops
        if op.level == "linearizable" and op.outcome in ("done", "refused") and op.ended
    )
    figures.unavailable_s = max(b - a for a, b in pairwise(answers))
