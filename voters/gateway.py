"""Clients' TCP connections: this module alone holds what clients asked and is not yet taken up.

It decodes requests into two inboxes (commands to be proposed, and all others), slows down readers
instead of refusing while one is full, and writes the replies of one turn of the voter in one go per
connection.  Certificates take turns in each: whoever asks for much waits behind itself.  Each
request is checked against the certificate of who asks (``access``); what it means is ``server``'s
business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from trex_core.access import Holder, Names, why_denied
from trex_core.cluster import VoterEntry
from trex_core.messages import (
    COMMAND_BYTES_MAX,
    VALUE_BYTES_MAX,
    ClientReply,
    ClientRequest,
    Query,
    Refusal,
    RefusalReason,
    Renew,
    Submit,
)
from trex_core.wire import (
    Channel,
    Frame,
    FrameError,
    Identity,
    decode_request,
    encode_body,
    frame,
)
from voters.credentials import Credentials
from voters.frames import Count, FrameConnection, FrameServer

CONNECTIONS_MAX: Final = 2048
"""Most client connections of one voter."""
REQUEST_BODY_BYTES_MAX: Final = 2 * VALUE_BYTES_MAX
"""A larger request closes its connection; one above COMMAND_BYTES_MAX is refused in words."""
INBOX_REQUESTS_MAX: Final = 8192
"""With more requests of one certificate waiting in an inbox, no more is read from the connections
that bring them."""
INBOX_BYTES_MAX: Final = 16 << 20
"""The same in bytes of what those of all certificates carry."""
INBOX_REQUESTS_BUSY: Final = 8 * INBOX_REQUESTS_MAX
"""Above this many waiting requests of one certificate further ones are refused as busy. (Reading
stops far below; what arrives in between was already in the buffers of many connections.)"""
INBOX_REQUESTS_ALL: Final = 4 * INBOX_REQUESTS_BUSY
"""The same, of all certificates."""
WRITE_BYTES_MAX: Final = 8 << 20
"""A connection with more bytes of replies unread is dropped."""


def bytes_of(request: ClientRequest) -> int:
    """How many bytes, about, wait with a request; beside those that any request takes."""
    match request:
        case Submit(command=command):
            return len(command)
        case Query(query=query):
            return len(query)
        case Renew(leases=leases):
            return 8 * len(leases)
        case _:
            return 0


R = TypeVar("R", bound=ClientRequest)


class Inbox(Generic[R]):
    """Requests that wait: of each certificate in the order they came, one of each in turn."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[tuple[Client, R]]] = {}
        """By serial; whose turn is next comes first."""
        self._count = 0
        self.bytes = 0
        """What those that wait carry, about."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Client, R]]:
        for queue in self._queues.values():
            yield from queue

    def waiting(self, client: Client) -> int:
        """How many wait under the certificate of ``client``."""
        return len(self._queues.get(client.holder.serial, ()))

    def add(self, client: Client, request: R) -> None:
        """Have a request wait."""
        serial = client.holder.serial
        queue = self._queues.get(serial)
        if queue is None:
            queue = self._queues[serial] = deque()
        queue.append((client, request))
        self._count += 1
        self.bytes += bytes_of(request)

    def first(self) -> R:
        """What :meth:`take` gives next. Requires that there is something."""
        return next(iter(self._queues.values()))[0][1]

    def take(self) -> tuple[Client, R]:
        """The next request. Requires that there is one."""
        queues = self._queues
        serial, queue = next(iter(queues.items()))
        client, request = queue.popleft()
        if not queue:
            del queues[serial]
        elif len(queues) > 1:
            del queues[serial]
            queues[serial] = queue
        self._count -= 1
        self.bytes -= bytes_of(request)
        return client, request

    def take_all(self) -> list[tuple[Client, R]]:
        """All that wait."""
        taken = list(self)
        self._queues.clear()
        self._count = self.bytes = 0
        return taken

    def roomy(self, client: Client) -> bool:
        """Whether a client that was held is to be read again."""
        few = self.waiting(client) < INBOX_REQUESTS_MAX // 2
        return few and self.bytes < INBOX_BYTES_MAX // 2


class Client(FrameConnection):
    """One client's connection."""

    server: Gateway

    def __init__(self, server: Gateway) -> None:
        super().__init__(server)
        self._replies: list[bytes] = []
        self.held_by: Inbox[Any] | None = None
        """The inbox that was full when this client was held; None: it is read."""

    def on_frame(self, frame: Frame) -> None:
        """Take one request."""
        if frame.parts != 1:
            raise FrameError("part")
        try:
            request = decode_request(frame.body)
        except FrameError:
            self.reply(
                Refusal(0, RefusalReason.MALFORMED, 0, "not a request this voter understands")
            )
            self.flush()
            raise
        self.server.take_in(self, request)

    def reply(self, message: ClientReply) -> None:
        """Queue a reply; it leaves at the gateway's next flush."""
        if not self.open:
            return
        if not self._replies:
            self.server.dirty.append(self)
        reply = frame(self.server.identity, Channel.CLIENT, encode_body(message))
        self._replies.append(reply)
        self.server.reply_bytes += len(reply)

    def flush(self) -> None:
        """Write what was queued."""
        if not self._replies:
            return
        data = self._replies[0] if len(self._replies) == 1 else b"".join(self._replies)
        self._replies.clear()
        self.write(data)

    def turn_away(self, request_id: int) -> None:
        """Say that the certificate was revoked, and hang up."""
        holder = self.holder
        why = f"the certificate {holder.serial} of {holder.grant.name!r} was revoked"
        self.reply(Refusal(request_id, RefusalReason.UNAUTHORIZED, 0, why))
        self.flush()
        self.dismiss("revoked")

    def hold(self, inbox: Inbox[Any]) -> None:
        """Read no more from this client until ``inbox`` has room."""
        if self.held_by is None and self.open:
            self.held_by = inbox
            self.transport.pause_reading()
            self.server.held.append(self)

    def release(self) -> None:
        """Read again."""
        self.held_by = None
        if self.open:
            self.transport.resume_reading()


class Gateway(FrameServer):
    """The server of clients' connections. ``on_input`` is called when a request came."""

    def __init__(
        self,
        identity: Identity,
        entry: VoterEntry,
        credentials: Credentials,
        names: Names,
        count: Count,
        on_input: Callable[[], None],
    ) -> None:
        super().__init__(
            "client",
            identity.cluster_id,
            Channel.CLIENT,
            credentials.server,
            count,
            connections_max=CONNECTIONS_MAX,
            body_bytes_max=REQUEST_BODY_BYTES_MAX,
            write_bytes_max=WRITE_BYTES_MAX,
        )
        self.identity = identity
        self.submits: Inbox[Submit] = Inbox()
        """Commands to be proposed."""
        self.others: Inbox[ClientRequest] = Inbox()
        """All other requests; the server takes them from here."""
        self.dirty: list[Client] = []
        self.reply_bytes = 0
        """Of all replies since the last flush."""
        self.held: list[Client] = []
        self._entry = entry
        self._names = names
        self._on_input = on_input
        self._revoked_before: frozenset[str] = frozenset()

    @classmethod
    async def open(
        cls,
        identity: Identity,
        entry: VoterEntry,
        credentials: Credentials,
        names: Names,
        count: Count,
        on_input: Callable[[], None],
    ) -> Gateway:
        """Bind and listen; ``names`` says of a command what it would change. Raises
        ``StartError`` naming the port and its key."""
        self = cls(identity, entry, credentials, names, count, on_input)
        key = f"voters: client_port of voter {entry.id}"
        await self.listen(entry.host, entry.client_port, key)
        return self

    def connection(self) -> FrameConnection:
        """A new client."""
        return Client(self)

    def why_denied(self, holder: Holder) -> str:  # noqa: ARG002 - the first request is told why
        """Nobody of the cluster is turned away unsaid."""
        return ""

    def sweep(self) -> None:
        """Close connections that are overdue, and those of certificates that were revoked before
        the last sweep: there was time to ask, and be told."""
        for connection in list(self.connections):
            if isinstance(connection, Client) and connection.holder.serial in self._revoked_before:
                connection.turn_away(0)
        self._revoked_before = self.revoked
        super().sweep()

    def take_in(self, client: Client, request: ClientRequest) -> None:
        """Queue a request, or answer it here if it can never be proposed."""
        if client.holder.serial in self.revoked:
            client.turn_away(request.id)
            return
        inbox: Inbox[Any] = self.submits if isinstance(request, Submit) else self.others
        waiting = inbox.waiting(client)
        if waiting >= INBOX_REQUESTS_BUSY or len(inbox) >= INBOX_REQUESTS_ALL:
            self.count("client.busy")
            client.reply(Refusal(request.id, RefusalReason.BUSY, 0, "too many requests wait here"))
        elif why := why_denied(client.holder.grant, request, self._names):
            self.count("client.unauthorized")
            client.reply(Refusal(request.id, RefusalReason.UNAUTHORIZED, 0, why))
        else:
            client.known = True
            size = len(request.command) if isinstance(request, Submit) else 0
            if size > COMMAND_BYTES_MAX:
                self.count("client.too_large")
                detail = f"the command has {size} bytes; the limit is {COMMAND_BYTES_MAX}"
                client.reply(Refusal(request.id, RefusalReason.TOO_LARGE, 0, detail))
            else:
                inbox.add(client, request)
        if waiting >= INBOX_REQUESTS_MAX or inbox.bytes >= INBOX_BYTES_MAX:
            client.hold(inbox)
        self._on_input()

    def take_submits(self, slots_max: int, bytes_max: int) -> list[tuple[Client, Submit]]:
        """The next waiting commands, as many as fit both bounds."""
        taken: list[tuple[Client, Submit]] = []
        submits = self.submits
        while submits and len(taken) < slots_max:
            bytes_max -= len(submits.first().command)
            if bytes_max < 0:
                break
            taken.append(submits.take())
        return taken

    def take_all_submits(self) -> list[tuple[Client, Submit]]:
        """All waiting commands, to be refused."""
        return self.submits.take_all()

    def flush(self) -> None:
        """Write all queued replies, and let held clients speak again once there is room."""
        self.reply_bytes = 0
        if self.dirty:
            dirty, self.dirty = self.dirty, []
            for client in dirty:
                client.flush()
        if self.held:
            held, self.held = self.held, []
            for client in held:
                if client.held_by is None or client.held_by.roomy(client):
                    client.release()
                else:
                    self.held.append(client)
