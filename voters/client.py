"""The client of the metadata service: this module alone turns its verbs into commands and reads.

``async with connect(cluster) as client`` for programs on an event loop, ``with
connect_blocking(cluster) as client`` for those with threads. Every result carries the slot it was
done in; every call takes a deadline in seconds and raises a :class:`~voters.driver.TrexError` that
says whether asking again is safe. Reads are linearizable unless said otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Concatenate, Generic, ParamSpec, TypeVar

import anyio.from_thread
import msgspec

from trex_core.cluster import ClusterConfig
from trex_core.messages import Outcome, Status
from trex_core.metadata import commands as rows
from trex_core.metadata.commands import (
    Command,
    ConfigCas,
    ConfigDelete,
    ConfigEntry,
    ConfigGet,
    ConfigList,
    ConfigPage,
    ConfigPut,
    Done,
    Lease,
    LeaseGet,
    LeaseGrant,
    LeaseList,
    LeasePage,
    LeaseRevoke,
    Member,
    MemberGet,
    MemberJoin,
    MemberLeave,
    MemberList,
    MemberPage,
    MemberUpdate,
    Placement,
    Question,
    RingOwner,
    Unreadable,
    decode_reply,
    decode_result,
    encode_command,
    encode_question,
)
from voters.config import ADMIN, credentials_folder, read_cluster
from voters.driver import (
    DEADLINE_S,
    IN_FLIGHT_MAX,
    Compacted,
    Driver,
    Failed,
    Fenced,
    NoQuorum,
    OutcomeUnknown,
    Rejected,
    Ticket,
    TooLarge,
    TrexError,
    Unauthorized,
    Unavailable,
    open_driver,
)
from voters.keeper import HeldLease, LeaseKeeper, clock_s

__all__ = [
    "BlockingClient",
    "Client",
    "Compacted",
    "Driver",
    "Failed",
    "Fenced",
    "HeldLease",
    "NoQuorum",
    "OutcomeUnknown",
    "Rejected",
    "Rows",
    "Ticket",
    "TooLarge",
    "TrexError",
    "Unauthorized",
    "Unavailable",
    "connect",
    "connect_blocking",
    "open_driver",
]

P = ParamSpec("P")
T = TypeVar("T")


class Rows(msgspec.Struct, Generic[T], frozen=True):
    """The rows of a list as of ``slot``; a list longer than a page is read page by page, and
    ``slot`` is the one of the last."""

    slot: int
    rows: tuple[T, ...]

    def __iter__(self) -> Iterator[T]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def done(outcome: Outcome) -> Done:
    """What the metadata service made of a command. Raises :class:`Rejected`."""
    match decode_result(outcome.body):
        case Done() as result:
            return result
        case rows.Rejected(reason=reason, detail=detail, slot=slot):
            raise Rejected(reason, detail, slot)


class Client:
    """The verbs of the metadata service. Made by :func:`connect`.

    Raises, for any verb: Unavailable, NoQuorum (both: surely not done), Rejected (with the reason
    of the service), for writes also OutcomeUnknown (see :meth:`resolve`) and TooLarge.
    """

    def __init__(self, driver: Driver, keeper: LeaseKeeper) -> None:
        self.driver = driver
        self._keeper = keeper

    # --- configuration ----------------------------------------------------------------------

    async def put(self, key: str, value: str, *, deadline_s: float | None = None) -> Done:
        """Write ``value`` at ``key``."""
        return await self.execute(ConfigPut(key, value), deadline_s=deadline_s)

    async def get(
        self, key: str, *, linearizable: bool = True, deadline_s: float | None = None
    ) -> ConfigEntry | None:
        """The entry of ``key`` (its ``slot`` is its version), or None."""
        reply, _ = await self._ask(ConfigGet(key), linearizable, deadline_s)
        assert reply is None or isinstance(reply, ConfigEntry), _odd(reply)
        return reply

    async def delete(self, key: str, *, deadline_s: float | None = None) -> Done:
        """Remove ``key``. Rejected: not_found."""
        return await self.execute(ConfigDelete(key), deadline_s=deadline_s)

    async def cas(
        self, key: str, expected_slot: int, value: str | None, *, deadline_s: float | None = None
    ) -> Done:
        """Write ``value`` (None: remove the key) if the version of ``key`` is ``expected_slot`` (0:
        if it is absent). Rejected: cas_failed, whose ``slot`` is the version found; not_found if it
        is to be removed and is absent as expected."""
        return await self.execute(ConfigCas(key, expected_slot, value), deadline_s=deadline_s)

    async def list(
        self, prefix: str = "", *, linearizable: bool = True, deadline_s: float | None = None
    ) -> Rows[ConfigEntry]:
        """All entries whose key begins with ``prefix``, by key."""
        found: list[ConfigEntry] = []
        after = ""
        while True:
            page, slot = await self._ask(ConfigList(prefix, after), linearizable, deadline_s)
            assert isinstance(page, ConfigPage), _odd(page)
            found.extend(page.entries)
            if not page.more:
                return Rows(slot, tuple(found))
            after = page.entries[-1].key

    # --- members and ring -------------------------------------------------------------------

    async def join(
        self,
        member: str,
        *,
        address: str | None = None,
        zone: str | None = None,
        weight: int = 1,
        state: str = "up",
        attributes: Mapping[str, str] | None = None,
        tokens: tuple[int, ...] | None = None,
        lease: int = 0,
        deadline_s: float | None = None,
    ) -> Done:
        """A member joins; with ``lease`` it leaves when that ends. Rejected: exists,
        lease_not_found."""
        command = MemberJoin(
            member, address, zone, weight, state, dict(attributes or {}), tokens, lease
        )
        return await self.execute(command, deadline_s=deadline_s)

    async def update(
        self,
        member: str,
        *,
        address: str | None = None,
        zone: str | None = None,
        weight: int | None = None,
        state: str | None = None,
        attributes: Mapping[str, str] | None = None,
        tokens: tuple[int, ...] | None = None,
        lease: int | None = None,
        deadline_s: float | None = None,
    ) -> Done:
        """Change what is not None of a member; ``attributes`` replaces all of them, an empty
        ``address`` or ``zone`` removes it. Rejected: not_found, lease_not_found."""
        given = None if attributes is None else dict(attributes)
        command = MemberUpdate(member, address, zone, weight, state, given, tokens, lease)
        return await self.execute(command, deadline_s=deadline_s)

    async def leave(self, member: str, *, deadline_s: float | None = None) -> Done:
        """A member leaves. Rejected: not_found."""
        return await self.execute(MemberLeave(member), deadline_s=deadline_s)

    async def member(
        self, member: str, *, linearizable: bool = True, deadline_s: float | None = None
    ) -> Member | None:
        """One member, or None."""
        reply, _ = await self._ask(MemberGet(member), linearizable, deadline_s)
        assert reply is None or isinstance(reply, Member), _odd(reply)
        return reply

    async def members(
        self, *, linearizable: bool = True, deadline_s: float | None = None
    ) -> Rows[Member]:
        """All members, by id."""
        found: list[Member] = []
        after = ""
        while True:
            page, slot = await self._ask(MemberList(after), linearizable, deadline_s)
            assert isinstance(page, MemberPage), _odd(page)
            found.extend(page.members)
            if not page.more:
                return Rows(slot, tuple(found))
            after = page.members[-1].id

    async def owner(
        self, key: str, *, linearizable: bool = True, deadline_s: float | None = None
    ) -> Placement:
        """Who holds ``key`` on the ring: its token and its replicas, the owner first."""
        reply, _ = await self._ask(RingOwner(key), linearizable, deadline_s)
        assert isinstance(reply, Placement), _odd(reply)
        return reply

    # --- leases -----------------------------------------------------------------------------

    async def grant(self, ttl_ms: int, *, deadline_s: float | None = None) -> Done:
        """Grant a lease; the slot of the result names it. Nobody renews it by itself: see
        :meth:`lease`."""
        return await self.execute(LeaseGrant(ttl_ms), deadline_s=deadline_s)

    async def revoke(self, lease: int, *, deadline_s: float | None = None) -> Done:
        """End a lease now; its members leave. Rejected: lease_not_found."""
        return await self.execute(LeaseRevoke(lease), deadline_s=deadline_s)

    async def renew(
        self, leases: tuple[int, ...], *, deadline_s: float | None = None
    ) -> tuple[int, ...]:
        """Renew leases once; returns those that are alive."""
        return await self.driver.renew(leases, deadline_s)

    async def lease_info(self, lease: int, *, deadline_s: float | None = None) -> Lease | None:
        """One lease, or None."""
        reply, _ = await self._ask(LeaseGet(lease), True, deadline_s)
        assert reply is None or isinstance(reply, Lease), _odd(reply)
        return reply

    async def leases(self, *, deadline_s: float | None = None) -> Rows[Lease]:
        """All leases, by name."""
        found: list[Lease] = []
        after = 0
        while True:
            page, slot = await self._ask(LeaseList(after), True, deadline_s)
            assert isinstance(page, LeasePage), _odd(page)
            found.extend(page.leases)
            if not page.more:
                return Rows(slot, tuple(found))
            after = page.leases[-1].id

    @asynccontextmanager
    async def lease(
        self, ttl_ms: int, *, deadline_s: float | None = None
    ) -> AsyncIterator[HeldLease]:
        """Hold a lease for the block: granted, renewed beside it, revoked at its end (as far as
        that can be done at once; it expires anyhow). Watch ``lost`` of what it gives."""
        self._keeper.check_ttl(ttl_ms)
        sent_s = clock_s()
        granted = await self.grant(ttl_ms, deadline_s=deadline_s)
        async with self.keep_alive(granted.slot, ttl_ms, sent_s) as held:
            yield held
        if not held.lost.is_set():
            try:
                await self.revoke(held.id, deadline_s=deadline_s)
            except TrexError:
                return

    @asynccontextmanager
    async def keep_alive(
        self, lease: int, ttl_ms: int, sent_s: float | None = None
    ) -> AsyncIterator[HeldLease]:
        """Renew an existing lease for the block. ``sent_s`` is ``keeper.clock_s()`` just before it
        was granted; without it, it is renewed now. Raises Fenced if it is gone."""
        if sent_s is None:
            sent_s = clock_s()
            if lease not in await self.driver.renew((lease,)):
                raise Fenced(f"lease {lease} does not exist any more; grant a new one")
        async with self._keeper.keep(lease, ttl_ms, sent_s) as held:
            yield held

    # --- anything ---------------------------------------------------------------------------

    async def execute(self, command: Command, *, deadline_s: float | None = None) -> Done:
        """Replicate any command of the metadata service."""
        return done(await self.driver.submit(encode_command(command), deadline_s))

    async def resolve(self, error: OutcomeUnknown, *, deadline_s: float | None = None) -> Done:
        """The one result of a command whose outcome was unknown; ``error`` again if it still is."""
        return done(await self.driver.resolve(error, deadline_s))

    async def status(self, voter: int, *, deadline_s: float | None = None) -> Status:
        """What one voter thinks."""
        return await self.driver.status(voter, deadline_s)

    async def hand_over(self, to: int = 0, *, deadline_s: float | None = None) -> int:
        """Have leadership handed to voter ``to`` (0: the most up to date); returns who leads."""
        return await self.driver.hand_over(to, deadline_s)

    async def _ask(
        self, question: Question, linearizable: bool, deadline_s: float | None
    ) -> tuple[rows.Reply, int]:
        answer = await self.driver.query(encode_question(question), linearizable, deadline_s)
        reply = decode_reply(answer.body)
        if isinstance(reply, Unreadable):
            raise Rejected("malformed", reply.detail)
        return reply, answer.slot


def _odd(reply: object) -> str:
    return f"an answer of another kind was expected, not a {type(reply).__name__}"


@asynccontextmanager
async def connect(
    cluster: ClusterConfig | Path | str | None = None,
    credentials: Path | None = None,
    *,
    deadline_s: float = DEADLINE_S,
    in_flight_max: int = IN_FLIGHT_MAX,
) -> AsyncIterator[Client]:
    """A client of ``cluster``: a configuration, the path of a cluster file, or None for the one
    that TREX_CONFIG names. ``credentials`` is the folder of its certificate; without it, the one
    that TREX_CREDENTIALS names, or ``credentials/admin`` beside the cluster file. Raises
    ConfigError; a cluster that is down is noticed at the first call.
    """
    base = Path()
    if not isinstance(cluster, ClusterConfig):
        cluster, base = read_cluster(None if cluster is None else Path(cluster))
    folder = credentials_folder(base, credentials, ADMIN)
    driver = Driver(cluster, folder, deadline_s, in_flight_max)
    keeper = LeaseKeeper(driver)
    async with driver.opened(keeper.run):
        yield Client(driver, keeper)


def _blocking(
    method: Callable[Concatenate[Client, P], Awaitable[T]],
) -> Callable[Concatenate[BlockingClient, P], T]:
    @functools.wraps(method)
    def call(self: BlockingClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(functools.partial(method, self.client, *args, **kwargs))

    return call


class BlockingClient:
    """The verbs of :class:`Client` for programs with threads; any thread may call them. Made by
    :func:`connect_blocking`."""

    def __init__(self, client: Client, portal: anyio.from_thread.BlockingPortal) -> None:
        self.client = client
        self._portal = portal

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run ``work`` on the client's event loop and wait for its result."""
        return self._portal.call(work)

    put = _blocking(Client.put)
    get = _blocking(Client.get)
    delete = _blocking(Client.delete)
    cas = _blocking(Client.cas)
    list = _blocking(Client.list)
    join = _blocking(Client.join)
    update = _blocking(Client.update)
    leave = _blocking(Client.leave)
    member = _blocking(Client.member)
    members = _blocking(Client.members)
    owner = _blocking(Client.owner)
    grant = _blocking(Client.grant)
    revoke = _blocking(Client.revoke)
    renew = _blocking(Client.renew)
    lease_info = _blocking(Client.lease_info)
    leases = _blocking(Client.leases)
    execute = _blocking(Client.execute)
    resolve = _blocking(Client.resolve)
    status = _blocking(Client.status)
    hand_over = _blocking(Client.hand_over)

    def lease(
        self, ttl_ms: int, *, deadline_s: float | None = None
    ) -> AbstractContextManager[HeldLease]:
        """Hold a lease for the block; ask ``held`` or ``ensure()`` of what it gives."""
        return self._portal.wrap_async_context_manager(
            self.client.lease(ttl_ms, deadline_s=deadline_s)
        )


@contextmanager
def connect_blocking(
    cluster: ClusterConfig | Path | str | None = None,
    credentials: Path | None = None,
    *,
    deadline_s: float = DEADLINE_S,
    in_flight_max: int = IN_FLIGHT_MAX,
) -> Iterator[BlockingClient]:
    """As :func:`connect`, with an event loop in a thread of its own that ends with the block."""
    options = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
    with anyio.from_thread.start_blocking_portal("asyncio", options, name="trex-client") as portal:
        connecting = connect(
            cluster, credentials, deadline_s=deadline_s, in_flight_max=in_flight_max
        )
        with portal.wrap_async_context_manager(connecting) as client:
            yield BlockingClient(client, portal)
