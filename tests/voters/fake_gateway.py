"""Voters that are only a gateway: real TCP, real frames, the real session rules, one shared log.

What they do with each command is scripted, so that refusals, lost answers, cut connections and
silence happen exactly where a test wants them. No clock, no quorum, no disk.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Self

import msgspec

from tests.credentials import papers
from trex_core.access import voter_name
from trex_core.cluster import ClusterConfig, parse_cluster
from trex_core.messages import (
    Answer,
    Ballot,
    HandOverRequest,
    Kind,
    Outcome,
    Query,
    Refusal,
    RefusalReason,
    Renew,
    SessionQuery,
    SnapshotNow,
    Status,
    StatusRequest,
    Submit,
    Value,
)
from trex_core.metadata.state import MetadataMachine
from trex_core.sessions import NO_SESSIONS, deliver, next_sequence
from trex_core.wire import Channel, FrameBuffer, Identity, decode_request, encode_body, frame

CLUSTER_ID = bytes(range(16))


class Do:
    """What a scripted voter does with one command."""

    APPLY = "apply"
    APPLY_MUTE = "apply, say nothing"
    APPLY_CUT = "apply, cut the connection"
    CUT = "cut the connection"
    MUTE = "say nothing"


class FakeCluster:
    """``voters`` fake voters on free ports; ``leader`` is the one that leads (0: none).

    ``script(voter, submit)`` returns a :class:`Do`, or a number: a reason to refuse for.
    """

    def __init__(self, voters: int = 3) -> None:
        self.voters = voters
        self.leader = 1
        self.script: Callable[[int, Submit], str | int] = lambda _voter, _submit: Do.APPLY
        self.machine = MetadataMachine()
        self.sessions = NO_SESSIONS
        self.slot = 0
        self.log: list[Submit] = []
        """Every command that got a slot, in order."""
        self.seen: list[tuple[int, Submit]] = []
        """Every command that arrived, and where."""
        self.applied: list[bytes] = []
        """Every command that was applied, in order."""
        self.renewals: list[tuple[int, ...]] = []
        self.alive: Callable[[tuple[int, ...]], tuple[int, ...] | None] = lambda leases: leases
        self.refuse_reads = 0
        self.silent: set[int] = set()
        self.changed = asyncio.Condition()
        self._servers: dict[int, asyncio.Server] = {}
        self._writers: dict[int, set[asyncio.StreamWriter]] = {}
        self._ports: dict[int, int] = {}

    async def __aenter__(self) -> Self:
        for voter in range(1, self.voters + 1):
            await self.start(voter)
        return self

    async def __aexit__(self, *_: object) -> None:
        for voter in list(self._servers):
            await self.stop(voter)

    async def start(self, voter: int) -> None:
        self._writers[voter] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._converse(voter, reader, writer)

        server = await asyncio.start_server(
            accept, "127.0.0.1", self._ports.get(voter, 0), ssl=self._context(voter)
        )
        self._servers[voter] = server
        self._ports[voter] = server.sockets[0].getsockname()[1]

    def _context(self, voter: int) -> ssl.SSLContext:
        lines = self._lines({each: each for each in range(1, self.voters + 1)})
        return papers(parse_cluster(lines), voter_name(voter)).server

    async def stop(self, voter: int) -> None:
        """As kill -9: every connection is cut, the port is closed."""
        server = self._servers.pop(voter, None)
        if server is not None:
            server.close()
            for writer in list(self._writers[voter]):
                writer.transport.abort()
            await server.wait_closed()

    def cut(self, voter: int) -> None:
        """Cut the connections of one voter, which goes on."""
        for writer in list(self._writers[voter]):
            writer.transport.abort()

    @property
    def config(self) -> ClusterConfig:
        return parse_cluster(self.text)

    @property
    def text(self) -> str:
        """The cluster file."""
        return self._lines(self._ports)

    def _lines(self, ports: dict[int, int]) -> str:
        lines = [
            'name = "fake"',
            f'cluster_id = "{CLUSTER_ID.hex()}"',
            "[stream]",
            'group = "239.255.0.1"',
            "port = 9",
            "[timing]",
            "tick_ms = 10",
        ]
        for voter, port in ports.items():
            lines += [
                "[[voters]]",
                f"id = {voter}",
                'host = "127.0.0.1"',
                f"peer_port = {200 + voter}",
                f"client_port = {port}",
                f"archive_port = {100 + voter}",
                f'directory = "{voter}"',
            ]
        return "\n".join(lines)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that came makes ``condition`` true."""
        async with self.changed:
            await self.changed.wait_for(condition)

    async def _converse(
        self, voter: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers[voter].add(writer)
        buffer = FrameBuffer(CLUSTER_ID, Channel.CLIENT)
        identity = Identity(CLUSTER_ID, sender=voter)
        try:
            while data := await reader.read(65536):
                for each in buffer.feed(data):
                    request = decode_request(each.body)
                    reply = None if voter in self.silent else self._answer(voter, request)
                    async with self.changed:
                        self.changed.notify_all()
                    if reply == Do.CUT:
                        return
                    if reply is not None:
                        body = encode_body(reply)
                        writer.write(frame(identity, Channel.CLIENT, body))
        except ConnectionError:
            return
        finally:
            self._writers[voter].discard(writer)
            writer.transport.abort()

    def _answer(self, voter: int, request: object) -> object:
        match request:
            case StatusRequest(id=number):
                return self.status(voter, number)
            case Submit():
                self.seen.append((voter, request))
                if voter != self.leader:
                    return self._refusal(request.id, RefusalReason.NOT_LEADER)
                action = self.script(voter, request)
                if isinstance(action, int):
                    return self._refusal(request.id, action)
                if action == Do.CUT:
                    return Do.CUT
                if action == Do.MUTE:
                    return None
                outcome = self.apply(request)
                return {Do.APPLY_CUT: Do.CUT, Do.APPLY_MUTE: None}.get(action, outcome)
            case Query(id=number, linearizable=False):
                return Answer(number, self.slot, self.machine.query(request.query))
            case Query() | SessionQuery() | Renew() if voter != self.leader or self.refuse_reads:
                return self._refusal(request.id, self.refuse_reads or RefusalReason.NOT_LEADER)
            case Query(id=number):
                return Answer(number, self.slot, self.machine.query(request.query))
            case SessionQuery(id=number, session=session):
                return Answer(number, self.slot, encode_body(next_sequence(self.sessions, session)))
            case Renew(id=number, leases=leases):
                self.renewals.append(leases)
                alive = self.alive(leases)
                return None if alive is None else Answer(number, self.slot, encode_body(alive))
            case HandOverRequest(id=number, to=to):
                self.leader = to or self.leader % self.voters + 1
                return Answer(number, self.slot, encode_body(str(self.leader)))
            case SnapshotNow(id=number):
                return Answer(number, self.slot, encode_body(str(self.slot)))
            case _:
                raise AssertionError(request)

    def _refusal(self, number: int, reason: int) -> Refusal:
        return Refusal(number, reason, self.leader, "scripted")

    def apply(self, submit: Submit) -> Outcome:
        """Give a command its slot, as a leader would."""
        self.slot += 1
        self.log.append(submit)
        value = Value(
            submit.kind, Ballot(), 0, submit.session, submit.sequence, submit.unanswered,
            submit.command,
        )  # fmt: skip

        def apply(slot: int, command: bytes) -> tuple[int, bytes]:
            self.applied.append(command)
            return 0, self.machine.apply(slot, command)

        self.sessions, delivered = deliver(self.sessions, self.slot, value, apply)
        assert delivered is not None
        return Outcome(submit.id, delivered.slot, delivered.status, delivered.body)

    def expire_sessions(self) -> None:
        """As if ten thousand others had opened one."""
        self.sessions = NO_SESSIONS

    def commands(self) -> list[Submit]:
        """The commands that got a slot."""
        return [submit for submit in self.log if submit.kind == Kind.COMMAND]

    def status(self, voter: int, number: int) -> Status:
        role = "leader" if voter == self.leader else "follower"
        ballot = Ballot(0, self.leader, self.leader)
        fields = msgspec.structs.fields(Status)
        values = {field.name: 0 for field in fields} | {
            "id": number, "voter": voter, "role": role, "leader": self.leader, "ballot": ballot,
            "promised": ballot, "fixed": self.slot, "applied": self.slot, "chain": b"",
            "counters": {}, "peers": (), "version": "fake",
        }  # fmt: skip
        return Status(**values)
