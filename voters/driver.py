"""The driver: this module alone holds a client's one connection, to whoever leads, and deadlines.

It replicates commands to any state machine; what a command means is its caller's business
(``client`` speaks the metadata service on top of it).  Which command is sent, again, and in which
order, is ``pipeline``'s.

Finding the leader: each voter is asked for its status on connecting; one that does not lead names
who does, and is left. A connection that is refused, cut, or silent for ``silence_s`` while an
answer is owed (half way a status is asked for, so a slow leader is told from a dead one) makes the
driver go round the voters, and hints at the lost voter count for nothing for that long.

No task outlives ``open_driver``; no call outlives its deadline.
"""

from __future__ import annotations

# ruff: noqa: N818 - the names of the error tree are the plan's
import asyncio
import os
import random
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import anyio
import msgspec

from trex_core.access import why_not_voter
from trex_core.cluster import ClusterConfig, ConfigError, VoterEntry
from trex_core.messages import (
    COMMAND_BYTES_MAX,
    RENEW_LEASES_MAX,
    Answer,
    ClientReply,
    ClientRequest,
    HandOverRequest,
    Kind,
    Outcome,
    OutcomeStatus,
    Query,
    Refusal,
    RefusalReason,
    Renew,
    SessionQuery,
    SnapshotNow,
    Status,
    StatusRequest,
    Submit,
)
from trex_core.wire import (
    Channel,
    FrameBuffer,
    FrameError,
    Identity,
    decode_reply,
    encode_body,
    frame,
)
from voters.credentials import Credentials, other_end, tls_trouble
from voters.pipeline import FINAL, Call, Pipeline

DEADLINE_S: Final = 5.0
"""Default deadline of a call, in seconds."""
IN_FLIGHT_MAX: Final = 256
"""Default for the most commands of one driver under way; a further one waits for room."""
BATCH_BYTES: Final = 256 << 10
"""About so many bytes of commands are written at once."""
NEVER_S: Final = 86_400.0
"""Longer than any deadline."""
PAUSE_S_MIN: Final = 0.01
"""First pause after a refusal or a fruitless look for the leader; doubles up to PAUSE_S_MAX."""
PAUSE_S_MAX: Final = 0.2
DRAIN_S: Final = 0.25
"""So long a voter that stopped leading may still answer what it was sent."""
CLOSE_S: Final = 0.5
"""So long leaving a driver may wait for its session to be closed; it expires anyhow."""

_random = random.SystemRandom()

LEADS_NO_MORE: Final = frozenset(
    {RefusalReason.NOT_LEADER, RefusalReason.LEADERSHIP_LOST, RefusalReason.NO_QUORUM}
)
"""Reasons of a refusal after which somebody else is to be asked."""


class TrexError(Exception):
    """Something asked of the cluster was not done, or not surely. ``retry_safe``: whether asking
    again cannot do it twice."""

    retry_safe: ClassVar[bool] = False


class Unavailable(TrexError):
    """No voter could be reached by the deadline. Nothing was proposed."""

    retry_safe = True


class NoQuorum(TrexError):
    """Voters answered, but none could lead or take the command by the deadline. It surely was
    not proposed and never will be."""

    retry_safe = True


class Rejected(TrexError):
    """The cluster refused the request for good. ``reason`` is one word of a fixed vocabulary,
    ``detail`` says more, ``slot`` is the version it was refused at (0: does not apply)."""

    def __init__(self, reason: str, detail: str = "", slot: int = 0) -> None:
        found = f" (slot {slot})" if slot else ""
        super().__init__((f"{reason}: {detail}" if detail else reason) + found)
        self.reason = reason
        self.detail = detail
        self.slot = slot


class Failed(Rejected):
    """The state machine raised an exception of class ``detail``; its state is as before."""


class TooLarge(TrexError):
    """The command has more than COMMAND_BYTES_MAX bytes; split it. Nothing was proposed."""


class Unauthorized(TrexError):
    """The certificate in use does not allow it; the message names what is missing. Nothing was
    proposed."""


class Compacted(TrexError):
    """The command was applied, but its result was acknowledged before and is no longer kept."""


class Fenced(TrexError):
    """The lease can no longer be relied on: somebody else may hold it. Stop, then begin anew."""


class OutcomeUnknown(TrexError):
    """The command was sent and may be applied, now or later. Asking anew could do it twice;
    ``await driver.resolve(error)`` waits for the one result under the same id."""

    def __init__(self, message: str, token: Ticket) -> None:
        super().__init__(message)
        self.token = token


class _LinkLost(Exception):
    """The connection is of no more use; the message says why."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A command under way: what :meth:`Driver.begin` gives and :meth:`Driver.finish` takes."""

    call: Call
    done: anyio.Event
    since: float
    closed: bool = False


@dataclass(slots=True, eq=False)
class _Ask:
    """A request that may be sent any number of times: a read, a renewal, a question."""

    make: Callable[[int], ClientRequest]
    done: anyio.Event = field(default_factory=anyio.Event)
    id: int = 0
    given_up: bool = False
    reply: ClientReply | None = None


class _Link(asyncio.Protocol):
    """One connection to one voter: requests out, replies in. Raises :class:`_LinkLost` only.

    The event loop's own TLS: a stream of coroutines around it costs more than all else here. What
    came and was not taken yet is no more than one turn of the loop brought."""

    def __init__(self, cluster_id: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._identity = Identity(cluster_id)
        self._buffer = FrameBuffer(cluster_id, Channel.CLIENT)
        self._replies: list[ClientReply] = []
        self._lost = ""
        """Why it can be used no more."""
        self._reader: asyncio.Future[bool] | None = None
        self._drained = asyncio.Event()
        self._drained.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's own

    def data_received(self, data: bytes) -> None:
        try:
            self._replies += [decode_reply(each.body) for each in self._buffer.feed(data)]
        except FrameError as error:
            self._lost = f"it does not speak for this cluster ({error.reason})"
            self._transport.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        trouble = "" if exc is None else tls_trouble(exc)
        self._lost = self._lost or trouble or "it closed the connection"
        self._drained.set()
        self._wake()

    def pause_writing(self) -> None:
        self._drained.clear()

    def resume_writing(self) -> None:
        self._drained.set()

    def _wake(self, something: bool = True) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(something)

    @property
    def session(self) -> ssl.SSLObject:
        """The TLS session."""
        session: ssl.SSLObject = self._transport.get_extra_info("ssl_object")
        return session

    async def send(self, requests: list[ClientRequest]) -> None:
        """Write ``requests``, as soon as those before them left."""
        await self._drained.wait()
        if self._lost:
            raise _LinkLost(self._lost)
        data = [frame(self._identity, Channel.CLIENT, encode_body(each)) for each in requests]
        self._transport.write(data[0] if len(data) == 1 else b"".join(data))

    async def receive(self, timeout_s: float = NEVER_S) -> list[ClientReply] | None:
        """The replies that came since the last call, maybe none yet whole; None when not a byte
        comes in time."""
        if not self._replies and not self._lost:
            self._reader = self._loop.create_future()
            timer = self._loop.call_later(max(0.0, timeout_s), self._wake, False)
            try:
                if not await self._reader:
                    return None
            finally:
                timer.cancel()
        if self._lost and not self._replies:
            raise _LinkLost(self._lost)
        replies, self._replies = self._replies, []
        return replies

    async def ask(self, request: ClientRequest) -> ClientReply:
        """Send one request on a connection with no other and wait for its reply."""
        await self.send([request])
        while True:
            for reply in await self.receive() or ():
                if reply.id in (request.id, 0):
                    return reply

    def close(self) -> None:
        """Hang up at once."""
        self._transport.abort()


@asynccontextmanager
async def _linked(
    entry: VoterEntry, cluster_id: bytes, credentials: Credentials, timeout_s: float
) -> AsyncIterator[_Link]:
    link = _Link(cluster_id)
    try:
        with anyio.fail_after(timeout_s):
            await asyncio.get_running_loop().create_connection(
                lambda: link,
                entry.host,
                entry.client_port,
                family=socket.AF_INET,
                ssl=credentials.client,
            )
    except TimeoutError as error:
        raise _LinkLost(f"no connection in {timeout_s:g} s") from error
    except OSError as error:
        known = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise _LinkLost(tls_trouble(error) or known or str(error) or "it hung up") from error
    try:
        try:
            who = other_end(link.session, cluster_id)
            why = why_not_voter(who.grant, entry.id)
        except ConfigError as error:
            why = str(error)
        if why:
            raise _LinkLost(why)
        yield link
    finally:
        link.close()


async def ask_voter(
    cluster: ClusterConfig,
    credentials: Credentials,
    voter: int,
    request: ClientRequest,
    deadline_s: float,
) -> Answer | Status | Outcome:
    """Ask one voter, whoever leads. Raises :class:`Unavailable`, or what its refusal means."""
    entry = cluster.voter(voter)
    try:
        with anyio.fail_after(deadline_s):
            async with _linked(entry, cluster.cluster_id_bytes, credentials, deadline_s) as link:
                reply = await link.ask(request)
    except (_LinkLost, TimeoutError) as error:
        why = str(error) or f"no answer in {deadline_s:g} s"
        raise Unavailable(
            f"voter {voter} at {entry.host}:{entry.client_port} cannot be reached: {why}; "
            "check that it runs (`trex-voter run`)"
        ) from error
    if isinstance(reply, Refusal):
        raise _refused(reply)
    return reply


def _refused(refusal: Refusal) -> TrexError:
    """What a refusal that is not tried again means to the caller."""
    match refusal.reason:
        case RefusalReason.TOO_LARGE:
            return TooLarge(refusal.detail)
        case RefusalReason.UNAUTHORIZED:
            return Unauthorized(refusal.detail)
        case RefusalReason.MALFORMED:
            return Rejected("refused", refusal.detail)
        case RefusalReason.NOT_LEADER:
            who = f"voter {refusal.leader} leads" if refusal.leader else "no leader is known to it"
            return NoQuorum(f"the voter does not lead; {who}; {refusal.detail}".rstrip("; "))
        case _:
            return NoQuorum(refusal.detail or f"refused (reason {refusal.reason})")


class Driver:
    """Commands and queries for the state machine of one cluster. Made by :func:`open_driver`.

    Commands begun one after another are applied in that order, each exactly once. Each call takes
    ``deadline_s`` (seconds; the driver's own by default) and raises a :class:`TrexError` at it.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        credentials: Path,
        deadline_s: float = DEADLINE_S,
        in_flight_max: int = IN_FLIGHT_MAX,
        session: int = 0,
        next_sequence: int = 1,
    ) -> None:
        self.cluster = cluster
        self._credentials = Credentials(credentials, cluster.cluster_id_bytes)
        self.deadline_s = deadline_s
        timing = cluster.timing
        self._silence_s = max(0.5, timing.election_ticks_max * timing.tick_ms / 1000)
        self._pipeline = Pipeline(session, next_sequence)
        self._in_flight_max = in_flight_max
        self._room = anyio.Semaphore(in_flight_max, fast_acquire=True)
        self._ask_room = anyio.Semaphore(in_flight_max, fast_acquire=True)
        self._asks: deque[_Ask] = deque()
        self._asked: dict[int, _Ask] = {}
        self._live: set[Ticket] = set()
        self._wake = anyio.Event()
        self._closed = False
        self._pause_s = 0.0
        self._backoff_s = PAUSE_S_MIN
        self._serving = self._leaving = False
        self._ping = 0
        self._pinged = False
        self._unanswered = False
        """Whether somebody gave up waiting for an answer since the last sign: were it owed no more,
        short deadlines would keep a client with a mute voter for ever."""
        self._last_sign = 0.0
        self._reached = -1.0
        self._trouble = "not connected yet"
        self._shunned: dict[int, float] = {}
        self.leader = 0
        """The voter that last answered as the leader; 0 when none did."""

    # --- commands ---------------------------------------------------------------------------

    async def submit(self, command: bytes, deadline_s: float | None = None) -> Outcome:
        """Replicate ``command``; the outcome's ``slot`` and ``body`` are those of its first and
        only application.

        Raises: Unavailable, NoQuorum (surely not proposed), OutcomeUnknown, TooLarge, Failed (the
        state machine raised), Rejected.
        """
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        ends = anyio.current_time() + deadline_s
        ticket = await self.begin(command, deadline_s)
        return await self.finish(ticket, ends - anyio.current_time())

    async def begin(self, command: bytes, deadline_s: float | None = None) -> Ticket:
        """Wait for room, and queue ``command`` behind all begun before it. Every ticket is to be
        given to :meth:`finish`. Raises TooLarge; Unavailable or NoQuorum when there is no room."""
        size = len(command)
        if size > COMMAND_BYTES_MAX:
            raise TooLarge(
                f"the command has {size} bytes; the limit is {COMMAND_BYTES_MAX}: split it"
            )
        since = anyio.current_time()
        await self._acquire(self._room, deadline_s, since)
        ticket = Ticket(Call(Kind.COMMAND, command), anyio.Event(), since)

        def on_end(_: Call) -> None:
            self._live.discard(ticket)
            ticket.done.set()
            self._room.release()

        ticket.call.on_end = on_end
        self._live.add(ticket)
        self._pipeline.add(ticket.call)
        self._wake.set()
        return ticket

    async def finish(self, ticket: Ticket, deadline_s: float | None = None) -> Outcome:
        """Wait for the outcome of a command begun. Raises as :meth:`submit`. Cancelled or at its
        deadline, a command that may have been proposed goes on without its caller."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        sure = False
        try:
            with anyio.move_on_after(max(0.0, deadline_s)):
                await ticket.done.wait()
        finally:
            if ticket.call.end is None and not ticket.closed:
                sure = self._give_up(ticket)
        if ticket.call.end is None and sure:
            raise self._nobody_took_it(ticket.since)
        return self._settled(ticket, anyio.current_time() - ticket.since)

    async def resolve(self, error: OutcomeUnknown, deadline_s: float | None = None) -> Outcome:
        """The one result of a command whose outcome was unknown. Raises as :meth:`submit`;
        ``error`` again when it is still unknown at the deadline or can never be known."""
        ticket = error.token
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        with anyio.move_on_after(max(0.0, deadline_s)):
            await ticket.done.wait()
        return self._settled(ticket, anyio.current_time() - ticket.since)

    def _give_up(self, ticket: Ticket) -> bool:
        call = ticket.call
        sure = self._pipeline.give_up(call)
        if sure:
            self._live.discard(ticket)
            self._room.release()
            self._wake.set()  # a SKIP may be to be sent
        return sure

    def _settled(self, ticket: Ticket, waited_s: float) -> Outcome:
        call = ticket.call
        match call.end:
            case None:
                raise OutcomeUnknown(
                    f"no answer after {waited_s:.1f} s ({self._trouble}): the command may have "
                    "been applied, or may be later; resolve() waits for its result",
                    ticket,
                )
            case Refusal() as refusal:
                raise _refused(refusal)
            case Outcome(status=OutcomeStatus.APPLIED) as outcome:
                return outcome
            case Outcome(status=OutcomeStatus.FAILED) as outcome:
                name = outcome.body.decode(errors="replace")
                raise Failed("failed", name, outcome.slot)
            case Outcome(status=OutcomeStatus.FORGOTTEN) as outcome:
                raise Compacted(
                    f"sequence {call.sequence} of session {call.session} was applied and "
                    "acknowledged before; its result is no longer kept"
                )
            case Outcome() if call.copies:
                raise OutcomeUnknown(
                    f"session {call.session} expired before this command was answered: whether "
                    "it was applied can no longer be told; look at the state",
                    ticket,
                )
            case Outcome() if self._pipeline.pinned:
                raise Rejected("session_expired", f"session {call.session} is no longer open")
            case Outcome():
                raise NoQuorum("the session expired; the command surely was not applied")

    # --- all other requests -----------------------------------------------------------------

    async def query(
        self, question: bytes, linearizable: bool = True, deadline_s: float | None = None
    ) -> Answer:
        """Ask the state machine. ``linearizable``: as of now, confirmed by a quorum; otherwise
        any voter that can be reached answers as of the slot it has applied.

        Raises: Unavailable, NoQuorum, Rejected.
        """
        if not linearizable:
            return await self._query_any(question, deadline_s)
        reply = await self._ask(lambda number: Query(number, question, True), deadline_s)
        assert isinstance(reply, Answer), f"an Answer was expected, not {type(reply)}"
        return reply

    async def _query_any(self, question: bytes, deadline_s: float | None) -> Answer:
        order = [self.leader] if self.leader else []
        order += [voter for voter in self.cluster.voter_ids if voter not in order]
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        error: TrexError = Unavailable("the cluster file names no voter")
        for voter in order:
            try:
                query = Query(self._pipeline.new_id(), question, False)
                reply = await ask_voter(
                    self.cluster, self._credentials, voter, query, deadline_s / len(order)
                )
                assert isinstance(reply, Answer), f"an Answer was expected, not {type(reply)}"
                return reply
            except (Unavailable, NoQuorum) as failure:
                error = failure
        raise error

    async def next_sequence(self, session: int, deadline_s: float | None = None) -> int:
        """The sequence ``session`` expects next, as of now; 0 when it is not open."""
        reply = await self._ask(lambda number: SessionQuery(number, session), deadline_s)
        assert isinstance(reply, Answer), f"an Answer was expected, not {type(reply)}"
        return msgspec.msgpack.decode(reply.body, type=int)

    async def open_session(self, deadline_s: float | None = None) -> int:
        """Open a further session, not this driver's own, and return its id. On failure one may
        have been opened that nobody uses; it expires."""
        reply = await self._ask(lambda number: Submit(number, Kind.OPEN, 0, 0, 0, b""), deadline_s)
        return _slot(reply)

    async def close_session(self, session: int, deadline_s: float | None = None) -> None:
        """Close a session. Closing one that is not open does nothing."""
        await self._ask(lambda number: Submit(number, Kind.CLOSE, session, 0, 0, b""), deadline_s)

    async def renew(
        self, leases: tuple[int, ...], deadline_s: float | None = None
    ) -> tuple[int, ...]:
        """Renew these leases, in requests of RENEW_LEASES_MAX each; returns those that are alive,
        each once. On failure some may have been renewed."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        ends = anyio.current_time() + deadline_s
        wanted = tuple(dict.fromkeys(leases))
        alive: list[int] = []
        for first in range(0, len(wanted) or 1, RENEW_LEASES_MAX):
            some = wanted[first : first + RENEW_LEASES_MAX]
            reply = await self._ask(
                lambda number, some=some: Renew(number, some),  # type: ignore[misc]
                ends - anyio.current_time(),
            )
            assert isinstance(reply, Answer), f"an Answer was expected, not {type(reply)}"
            alive += msgspec.msgpack.decode(reply.body, type=tuple[int, ...])
        return tuple(alive)

    async def status(self, voter: int, deadline_s: float | None = None) -> Status:
        """What one voter thinks. Raises Unavailable."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        reply = await ask_voter(
            self.cluster, self._credentials, voter, StatusRequest(1), deadline_s
        )
        assert isinstance(reply, Status), f"a status request is answered by one, not {type(reply)}"
        return reply

    async def statuses(self, deadline_s: float | None = None) -> dict[int, Status | Unavailable]:
        """What each voter thinks, or why it cannot be reached; in the order of their ids."""
        found: dict[int, Status | Unavailable] = {}

        async def ask(voter: int) -> None:
            try:
                found[voter] = await self.status(voter, deadline_s)
            except Unavailable as error:
                found[voter] = error
            except TrexError as error:
                found[voter] = Unavailable(f"voter {voter} refused to answer: {error}")

        async with anyio.create_task_group() as group:
            for voter in self.cluster.voter_ids:
                group.start_soon(ask, voter)
        return {voter: found[voter] for voter in self.cluster.voter_ids}

    async def find_leader(self, deadline_s: float | None = None) -> Status:
        """The status of the leader. Raises NoQuorum or Unavailable when none is found."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        since = anyio.current_time()
        pause_s = PAUSE_S_MIN
        with anyio.move_on_after(deadline_s):
            while True:
                answers = (await self.statuses(min(1.0, deadline_s))).values()
                known = [answer for answer in answers if isinstance(answer, Status)]
                if known:
                    self._reached = anyio.current_time()
                    self._trouble = "no voter leads"
                leaders = [status for status in known if status.role == "leader"]
                if leaders:
                    return max(leaders, key=lambda status: status.ballot)
                await anyio.sleep(pause_s)
                pause_s = min(PAUSE_S_MAX, pause_s * 2)
        raise self._nobody_took_it(since)

    async def hand_over(self, to: int = 0, deadline_s: float | None = None) -> int:
        """Have the leader hand leadership to voter ``to`` (0: the most up to date); returns who
        leads then. Does nothing if ``to`` leads already. Raises NoQuorum, Unavailable."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        ends = anyio.current_time() + deadline_s
        if to:
            self.cluster.voter(to)
        before = await self.find_leader(deadline_s)
        if before.voter == to:
            return to
        request = HandOverRequest(1, to)
        left_s = ends - anyio.current_time()
        await ask_voter(self.cluster, self._credentials, before.voter, request, left_s)
        while True:
            after = await self.find_leader(max(0.0, ends - anyio.current_time()))
            if after.ballot > before.ballot:
                return after.voter

    async def snapshot_now(self, voter: int, deadline_s: float | None = None) -> int:
        """Have ``voter`` cut a snapshot now; returns its slot when it is durable."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        reply = await ask_voter(self.cluster, self._credentials, voter, SnapshotNow(1), deadline_s)
        assert isinstance(reply, Answer), f"a snapshot is answered by an Answer, not {type(reply)}"
        return int(msgspec.msgpack.decode(reply.body, type=str))

    async def _ask(
        self, make: Callable[[int], ClientRequest], deadline_s: float | None
    ) -> ClientReply:
        """Ask the leader, again and again until the deadline."""
        since = anyio.current_time()
        await self._acquire(self._ask_room, deadline_s, since)
        ask = _Ask(make)
        self._asks.append(ask)
        self._wake.set()
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        try:
            with anyio.move_on_after(since + deadline_s - anyio.current_time()):
                await ask.done.wait()
        finally:
            self._ask_room.release()
            ask.given_up = True
            if self._asked.pop(ask.id, None) is not None:
                self._unanswered = True
        if ask.reply is None:
            raise self._nobody_took_it(since)
        if isinstance(ask.reply, Refusal):
            raise _refused(ask.reply)
        return ask.reply

    async def _acquire(self, room: anyio.Semaphore, deadline_s: float | None, since: float) -> None:
        if self._closed:
            raise Unavailable("the driver is closed; use it inside its `async with`")
        try:
            room.acquire_nowait()  # most often there is room; a deadline costs more than all else
            return
        except anyio.WouldBlock:
            pass
        with anyio.move_on_after(self.deadline_s if deadline_s is None else deadline_s) as scope:
            await room.acquire()
        if scope.cancelled_caught:
            self._trouble = f"{self._in_flight_max} requests are under way and not answered"
            raise self._nobody_took_it(since)

    def _nobody_took_it(self, since: float) -> TrexError:
        waited_s = anyio.current_time() - since
        if self._closed:
            return Unavailable("the driver was closed before this was sent")
        if self._serving or self._reached >= since:
            return NoQuorum(
                f"not done in {waited_s:.1f} s: {self._trouble}; it surely was not proposed, so "
                "try again once a majority of the voters runs (see `trex status`)"
            )
        return Unavailable(
            f"no voter could be reached in {waited_s:.1f} s: {self._trouble}; check that the "
            "voters run and that `host`, `client_port` and `cluster_id` in the cluster file are "
            "theirs"
        )

    # --- the connection ---------------------------------------------------------------------

    async def _run(self) -> None:
        """Visit one voter after another, for ever."""
        voters = self.cluster.voter_ids
        voter = _random.choice(voters)
        pause_s = PAUSE_S_MIN
        while True:
            while not self._is_wanted():
                await self._woken()
            hint = 0
            entry = self.cluster.voter(voter)
            try:
                async with _linked(
                    entry, self.cluster.cluster_id_bytes, self._credentials, self._silence_s
                ) as link:
                    status = await self._hello(link)
                    if status.role == "leader":
                        pause_s = PAUSE_S_MIN
                        self.leader = voter
                        hint = await self._serve(link, voter)
                    else:
                        hint = status.leader
                        self._trouble = f"voter {voter} ({status.role}) knows no leader"
            except _LinkLost as lost:
                self._lost(voter, str(lost))
            now = anyio.current_time()
            if hint and hint != voter and hint in voters and self._shunned.get(hint, now) <= now:
                voter = hint
                continue
            voter = voters[(voters.index(voter) + 1) % len(voters)]
            await anyio.sleep(pause_s * _random.uniform(0.5, 1.0))
            pause_s = min(PAUSE_S_MAX, pause_s * 1.5)

    def _is_wanted(self) -> bool:
        """Whether anybody waits for a voter; what nobody waits for any more is forgotten."""
        self._asks = deque(ask for ask in self._asks if not ask.given_up)
        return bool(self._asks) or self._pipeline.busy

    async def _hello(self, link: _Link) -> Status:
        with anyio.move_on_after(self._silence_s):
            reply = await link.ask(StatusRequest(self._pipeline.new_id()))
            if not isinstance(reply, Status):
                why = reply.detail if isinstance(reply, Refusal) else type(reply).__name__
                raise _LinkLost(f"it refuses to tell its status: {why}")
            self._reached = anyio.current_time()
            return reply
        raise _LinkLost("it does not answer")

    def _lost(self, voter: int, why: str) -> None:
        self._shunned[voter] = anyio.current_time() + self._silence_s
        self._trouble = f"voter {voter}: {why}"

    async def _serve(self, link: _Link, voter: int) -> int:
        """Work with the leader until it is one no more or lost; returns who else may lead."""
        self._leaving = self._pinged = self._unanswered = False
        self._pause_s, self._backoff_s = 0.0, PAUSE_S_MIN
        self._ping = 0
        self._last_sign = anyio.current_time()
        self._serving = True
        async with anyio.create_task_group() as group:
            group.start_soon(self._write, link)
            try:
                hint = await self._read(link)
            except _LinkLost as lost:
                self._lost(voter, str(lost))
                hint = 0
            group.cancel_scope.cancel()
        self._serving = False
        self._pipeline.cut()
        self._asks.extendleft(reversed(self._asked.values()))
        self._asked.clear()
        return hint

    async def _woken(self) -> None:
        await self._wake.wait()
        self._wake = anyio.Event()

    @property
    def _owed(self) -> bool:
        return bool(self._pipeline.in_flight or self._asked or self._unanswered)

    async def _write(self, link: _Link) -> None:
        while not self._leaving:
            if self._pause_s:
                await anyio.sleep(self._pause_s)
                self._pause_s = 0.0  # what was refused meanwhile was sent before
                continue
            if not self._owed:
                self._last_sign = anyio.current_time()
            batch = self._gather()
            if batch:
                try:
                    await link.send(batch)
                except _LinkLost:
                    return  # the reader finds out
            else:
                await self._woken()

    def _gather(self) -> list[ClientRequest]:
        batch: list[ClientRequest] = []
        if self._ping:
            batch.append(StatusRequest(self._ping))
            self._ping = 0
        while self._asks:
            ask = self._asks.popleft()
            if not ask.given_up:
                ask.id = self._pipeline.new_id()
                self._asked[ask.id] = ask
                batch.append(ask.make(ask.id))
        batch.extend(self._pipeline.outgoing(BATCH_BYTES))
        return batch

    async def _read(self, link: _Link) -> int:
        hint = 0
        leave_at = float("inf")
        while True:
            now = anyio.current_time()
            if self._leaving and (not self._owed or now >= leave_at):
                return hint
            replies = await link.receive(min(self._silence_s / 2, leave_at - now))
            now = anyio.current_time()
            if replies is None:
                silent_s = now - self._last_sign
                if self._leaving or not self._owed:
                    continue
                if silent_s >= self._silence_s / 2 and not self._pinged:
                    # Asked first, however long it was silent: if this process stood still, what
                    # was said meanwhile is not read yet.
                    self._pinged = True
                    self._ping = self._pipeline.new_id()
                    self._wake.set()
                elif silent_s >= self._silence_s:
                    raise _LinkLost(f"it says nothing for {silent_s:.1f} s")
                continue
            self._last_sign = self._reached = now
            self._pinged = self._unanswered = False
            for reply in replies:
                away = self._take(reply)
                if away is not None:
                    hint = away or hint
                    if not self._leaving:
                        self._leaving = True
                        leave_at = now + DRAIN_S
            if self._pipeline.unsent or self._asks:
                self._wake.set()

    def _take(self, reply: ClientReply) -> int | None:
        """Take one reply. Returns None to stay with this voter, else who is said to lead (0:
        unknown)."""
        if isinstance(reply, Status):
            return None if reply.role == "leader" else reply.leader
        ask = self._asked.pop(reply.id, None)
        if ask is not None:
            if isinstance(reply, Refusal) and reply.reason not in FINAL:
                self._asks.append(ask)
                return self._bounced(reply)
            self._backoff_s = PAUSE_S_MIN
            ask.reply = reply
            ask.done.set()
            return None
        if isinstance(reply, Answer):
            return None  # to somebody who gave up
        if self._pipeline.heard(reply):
            self._backoff_s = PAUSE_S_MIN
            return None
        if isinstance(reply, Refusal):
            return self._bounced(reply)
        self._pause()
        return None

    def _bounced(self, refusal: Refusal) -> int | None:
        self._trouble = refusal.detail or f"refused (reason {refusal.reason})"
        if refusal.reason in LEADS_NO_MORE:
            return refusal.leader
        self._pause()
        return None

    def _pause(self) -> None:
        if not self._pause_s:
            self._pause_s = self._backoff_s * _random.uniform(0.5, 1.0)
            self._backoff_s = min(PAUSE_S_MAX, self._backoff_s * 2)

    # --- beginning and end ------------------------------------------------------------------

    @asynccontextmanager
    async def opened(
        self, beside: Callable[[], Coroutine[Any, Any, None]] | None = None
    ) -> AsyncIterator[Driver]:
        """Work until the block ends, with ``beside`` as a further task. What the block raises
        leaves it as it is, in no group."""
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._run)
                if beside is not None:
                    group.start_soon(beside)
                try:
                    yield self
                except Exception as error:  # noqa: BLE001 - raised again below
                    failure = error
                await self._close_own_session()
                group.cancel_scope.cancel()
        finally:
            self._end()
        if failure is not None:
            raise failure

    async def _close_own_session(self) -> None:
        session = self._pipeline.session
        if session and not self._pipeline.pinned and not self._pipeline.busy:
            try:
                await self.close_session(session, min(CLOSE_S, self.deadline_s))
            except TrexError:
                return  # it expires by itself

    def _end(self) -> None:
        """Let everybody who still waits find out."""
        self._closed = True
        for ticket in list(self._live):
            ticket.closed = True
            ticket.done.set()
        for ask in (*self._asks, *self._asked.values()):
            ask.done.set()


def _slot(reply: ClientReply) -> int:
    assert isinstance(reply, Outcome | Answer), f"an answer with a slot, not {type(reply)}"
    return reply.slot


def open_driver(
    cluster: ClusterConfig,
    credentials: Path,
    *,
    deadline_s: float = DEADLINE_S,
    in_flight_max: int = IN_FLIGHT_MAX,
    session: int = 0,
    next_sequence: int = 1,
) -> AbstractAsyncContextManager[Driver]:
    """A driver for ``cluster``; it connects when first used, and its tasks end with the block.
    ``credentials`` is the folder of its certificate. Raises ``ConfigError`` if that is of no use.

    With ``session`` it is pinned to that open session, its first command being
    ``next_sequence`` of it: see rule 6 of ``pipeline``. Such a session is not closed at the end.
    """
    return Driver(cluster, credentials, deadline_s, in_flight_max, session, next_sequence).opened()
