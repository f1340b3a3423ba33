"""The load: this module alone knows how clients behave during a trial, and what they note.

Each client has one driver and does one thing after another: write, compare-and-set, delete, read at
every level. A value is written once ever. A key is used for so many operations, then the next one:
histories of a key stay short, and quick to judge. Contenders for a lock on a lease note when they
held it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import anyio

from listeners import Listener
from listeners.sql import SqlError, query_socket_async
from tests.linear.history import ABSENT, History, Op
from tests.linear.log import LogReader
from tests.linear.machines import Machines
from trex_core.cluster import ClusterConfig
from trex_core.messages import Answer, Outcome, Query, StatusRequest
from trex_core.metadata.commands import (
    Command,
    ConfigCas,
    ConfigDelete,
    ConfigEntry,
    ConfigGet,
    ConfigPut,
    Done,
    Reason,
    Rejected,
    decode_reply,
    decode_result,
    encode_command,
    encode_question,
)
from voters.client import connect
from voters.credentials import Credentials
from voters.driver import (
    Driver,
    NoQuorum,
    OutcomeUnknown,
    TrexError,
    Unavailable,
    ask_voter,
    open_driver,
)
from voters.driver import Rejected as RejectedError
from voters.keeper import HeldLease, clock_s

KEYS_AT_ONCE = 8
KEY_OPS = 40
"""So many operations of a key, then another takes its place."""
DEADLINE_S = 1.5
RESOLVE_S = 20.0
LOCAL_DEADLINE_S = 0.5
SQL_DEADLINE_MS = 1000
LEASE_MS = 3000
HOLD_S = 0.4
LOCK = "lock"
SHADOW = "lock's shadow"


@dataclass
class Held:
    """A contender surely held the lock from ``since_s`` to ``until_s`` (of the keeper's clock)."""

    who: str
    token: int
    since_s: float
    until_s: float


@dataclass
class Load:
    """The clients of one trial and what they noted."""

    machines: Machines
    config: ClusterConfig
    follower: Listener
    draw: random.Random
    reader: LogReader
    history: History = field(default_factory=History)
    known: dict[str, tuple[str | None, int]] = field(default_factory=dict)
    locks: list[Held] = field(default_factory=list)
    lost_leases: int = 0
    early: list[str] = field(default_factory=list)
    """Leases that the voters said were gone while their holder could still be sure of them."""
    trouble: Counter[str] = field(default_factory=Counter)
    stop: anyio.Event = field(default_factory=anyio.Event)
    answered: int = 0
    _waiting: list[tuple[int, anyio.Event]] = field(default_factory=list)
    _keys: list[tuple[str, int]] = field(default_factory=list)
    _made: int = 0
    _values: int = 0

    def __post_init__(self) -> None:
        folder = self.machines.credentials()
        self.folder = folder
        self.credentials = Credentials(folder, self.config.cluster_id_bytes)

    # --- progress ---------------------------------------------------------------------------

    def note_answer(self) -> None:
        """A linearizable operation was answered."""
        self.answered += 1
        for count, event in self._waiting:
            if self.answered >= count:
                event.set()

    async def more(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait for ``count`` more answers than there are now. Fails with where everybody is."""
        event = anyio.Event()
        wanted = self.answered + count
        self._waiting.append((wanted, event))
        with anyio.move_on_after(timeout_s):
            await event.wait()
        assert event.is_set(), (
            f"{self.answered} answers after {timeout_s} s, not {wanted}; {self.reader}; "
            f"{await self._where()}; {[str(op) for op in self.history.ops[-6:]]}"
        )

    async def _where(self) -> dict[int, object]:
        """What each voter says of itself."""
        told: dict[int, object] = {}
        for voter in self.config.voter_ids:
            try:
                told[voter] = await ask_voter(
                    self.config, self.credentials, voter, StatusRequest(1), LOCAL_DEADLINE_S
                )
            except TrexError as error:
                told[voter] = error
        return told

    # --- what to do next --------------------------------------------------------------------

    def key(self) -> str:
        """A key to use."""
        while len(self._keys) < KEYS_AT_ONCE:
            self._made += 1
            self._keys.append((f"k/{self._made}", 0))
        place = self.draw.randrange(KEYS_AT_ONCE)
        key, used = self._keys[place]
        if used + 1 < KEY_OPS:
            self._keys[place] = (key, used + 1)
        else:
            self._made += 1
            self._keys[place] = (f"k/{self._made}", 0)
        return key

    def value(self, client: str) -> str:
        """A value never used before."""
        self._values += 1
        return f"{client}/{self._values}".ljust(self.machines.value_chars, ".")

    # --- clients ----------------------------------------------------------------------------

    async def client(self, name: str) -> None:
        """Work until ``stop``; then find out what became of what is not known yet."""
        unknown: list[tuple[Op, OutcomeUnknown]] = []
        async with open_driver(self.config, self.folder, deadline_s=DEADLINE_S) as driver:
            while not self.stop.is_set():
                dice = self.draw.random()
                if dice < 0.52:
                    await self.write(driver, name, unknown)
                elif dice < 0.82:
                    await self.read(driver, name, self.key())
                elif dice < 0.86:
                    await self.read_at_voter(self.draw.choice(self.config.voter_ids), self.key())
                elif dice < 0.94 or not self.machines.listeners:
                    self.read_here(self.key())
                else:
                    await self.read_sql(self.draw.choice(self.machines.listeners), self.key())
            for op, error in unknown:
                await self._resolve(driver, op, error)

    async def write(
        self, driver: Driver, name: str, unknown: list[tuple[Op, OutcomeUnknown]]
    ) -> None:
        """One write of a sort drawn at random."""
        key, dice = self.key(), self.draw.random()
        history = self.history
        if dice < 0.45:
            op = history.begin(name, "put", key, self.value(name))
            command: Command = ConfigPut(key, str(op.value))
        elif dice < 0.90:
            expected = self.known.get(key, (None, ABSENT))
            removes = expected[1] != ABSENT and self.draw.random() < 0.1
            value = None if removes else self.value(name)
            op = history.begin(name, "cas", key, value, expected=expected)
            command = ConfigCas(key, expected[1], value)
        else:
            op = history.begin(name, "delete", key)
            command = ConfigDelete(key)
        try:
            self._settle(op, await driver.submit(encode_command(command)))
            if self.machines.cut:
                await self.reader.near(op.slot)
        except OutcomeUnknown as error:
            self.trouble["unknown"] += 1
            if self.draw.random() < 0.5:
                await self._resolve(driver, op, error)
            else:
                unknown.append((op, error))
        except (Unavailable, NoQuorum):
            history.end(op, "not_done")
            self.trouble["not done"] += 1

    async def _resolve(self, driver: Driver, op: Op, error: OutcomeUnknown) -> None:
        try:
            self._settle(op, await driver.resolve(error, RESOLVE_S))
            self.trouble["resolved"] += 1
        except OutcomeUnknown:
            self.trouble["unknown for ever"] += 1
        except NoQuorum:
            self.history.end(op, "not_done")

    def _settle(self, op: Op, outcome: Outcome) -> None:
        match decode_result(outcome.body):
            case Done(slot=slot):
                assert slot == outcome.slot, f"{op}: {outcome}"
                self.history.end(op, "done", slot)
                if op.value is None:
                    self.known[op.key] = (None, ABSENT)
                else:
                    self.known[op.key] = (op.value, slot)
            case Rejected(reason=Reason.CAS_FAILED | Reason.NOT_FOUND, slot=slot):
                self.history.end(op, "refused", slot)
                self.known.pop(op.key, None)
                if slot == ABSENT:
                    self.known[op.key] = (None, ABSENT)
            case other:
                raise AssertionError(f"{op}: {other}")
        self.note_answer()

    async def read(self, driver: Driver, name: str, key: str) -> None:
        """A linearizable read."""
        op = self.history.begin(name, "get", key)
        try:
            answer = await driver.query(encode_question(ConfigGet(key)))
        except TrexError:
            self.trouble["read without an answer"] += 1
            return
        self._answered(op, answer)
        self.known[key] = (op.read, op.slot)
        self.note_answer()

    async def read_at_voter(self, voter: int, key: str) -> None:
        """A local read at one voter."""
        where = self.machines.where(voter)
        op = self.history.begin("local", "get", key, level=where)
        query = Query(1, encode_question(ConfigGet(key)), False)
        try:
            answer = await ask_voter(self.config, self.credentials, voter, query, LOCAL_DEADLINE_S)
        except TrexError:
            self.trouble["local read without an answer"] += 1
            return
        assert isinstance(answer, Answer), answer
        if self.machines.where(voter) != where:
            op.level = f"{where} or later"
        self._answered(op, answer)

    def _answered(self, op: Op, answer: Answer) -> None:
        reply = decode_reply(answer.body)
        assert reply is None or isinstance(reply, ConfigEntry), reply
        value, slot = (None, ABSENT) if reply is None else (reply.value, reply.slot)
        self.history.end(op, "done", slot, read=value, at=answer.slot)

    def read_here(self, key: str) -> None:
        """A read of the state that the embedded listener holds."""
        op = self.history.begin("here", "get", key, level=self.follower.name)
        entry = self.follower.state.config.get(key)
        value, slot = (None, ABSENT) if entry is None else (entry.value, entry.slot)
        self.history.end(op, "done", slot, read=value, at=self.follower.applied)

    async def read_sql(self, listener: str, key: str) -> None:
        """A read of a listener's store: local, or at least at a slot that somebody knows of."""
        least = self.known.get(key, (None, 0))[1] if self.draw.random() < 0.5 else 0
        level = f"{listener}/{self.machines.boots.get(listener, 0)}"
        op = self.history.begin("sql", "get", key, level=level, least=least)
        try:
            result = await query_socket_async(
                self.machines.directory / listener / "sql.sock",
                f"SELECT value, slot FROM config WHERE key = '{key}'",
                deadline_ms=SQL_DEADLINE_MS,
                at_least_slot=least or None,
            )
        except SqlError:
            self.trouble["SQL without an answer"] += 1
            return
        value, slot = result.rows[0] if result.rows else (None, ABSENT)
        self.history.end(op, "done", slot, read=value, at=result.slot)

    # --- a lock on a lease ------------------------------------------------------------------

    async def contender(self, name: str) -> None:
        """Take the lock, hold it for a while, give it back, until ``stop``. Two members live on its
        lease, so that slots of two changes come by."""
        async with connect(self.config, self.folder, deadline_s=DEADLINE_S) as client:
            while not self.stop.is_set():
                try:
                    async with client.lease(LEASE_MS) as held:
                        await client.join(LOCK, lease=held.id)
                        mine = self._hold_begins(name, held)
                        await client.join(SHADOW, lease=held.id)
                        with anyio.move_on_after(HOLD_S):
                            await held.lost.wait()
                        self._hold_ends(mine, held)
                except RejectedError:
                    await self._lock_moved()
                except TrexError as error:
                    self.trouble[f"lock: {type(error).__name__}"] += 1

    def _hold_begins(self, name: str, held: HeldLease) -> Held:
        now_s = clock_s()
        mine = Held(name, held.id, now_s, now_s)
        if held.held:
            self.locks.append(mine)
        return mine

    def _hold_ends(self, mine: Held, held: HeldLease) -> None:
        mine.until_s = max(mine.since_s, min(clock_s(), held.sure_until_s))
        if held.lost.is_set():
            self.lost_leases += 1
            if clock_s() < held.sure_until_s:
                self.early.append(f"{mine.who}'s lease {held.id}, sure until {held.sure_until_s}")

    async def _lock_moved(self) -> None:
        with anyio.move_on_after(HOLD_S):
            async for _ in self.follower.changes(kind="member", prefix=LOCK):
                return
