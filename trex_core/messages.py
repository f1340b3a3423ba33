"""The vocabulary of TRex: every value that crosses a wire or a disk, and every limit.

This module alone says what may be sent. It holds no rule of the protocol (``paxos``), no
bytes (``wire``) and no state (``state``).  All types are frozen ``msgspec.Struct``s encoded as
MessagePack arrays; a type evolves only by appending fields with defaults.

Message tree::

    PeerMessage      voter  -> voter      UDP, TCP when larger than PEER_DATAGRAMS_MAX datagrams
    StreamMessage    voter  -> listeners  multicast; repairs also by listeners that help
    RepairRequest    listener -> helpers  multicast: voters, and listeners that help
    ListenerReport   listener -> all      multicast; more listeners are not more reports a second
    CatchupMessage   anybody <-> archive  TCP; and listener <-> listener that helps
    ClientRequest    client -> voter      TCP
    ClientReply      voter  -> client     TCP
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

# --- limits ---------------------------------------------------------------------------------

COMMAND_BYTES_MAX: Final = 1 << 20
"""Largest command a client may submit, in bytes."""
VALUE_BYTES_MAX: Final = COMMAND_BYTES_MAX + 128
"""Largest encoded :class:`Value`, in bytes: a command and its envelope."""
DATAGRAM_BYTES_MAX: Final = 1400
"""Largest UDP payload sent, in bytes: below every common path MTU."""
PEER_DATAGRAMS_MAX: Final = 8
"""A voter-to-voter message that needs more datagrams than this travels over TCP."""
RUN_SLOTS_MAX: Final = 512
"""Most slots in one Accept, journal record or catch-up chunk."""
RUN_BYTES_MAX: Final = 1 << 20
"""A run is closed when its values reach this many bytes (one larger value may stand alone)."""
WINDOW_SLOTS_MAX: Final = 4096
"""Most slots a leader may have proposed and not yet fixed."""
WINDOW_BYTES_MAX: Final = 8 << 20
"""Most bytes of values a leader may have proposed and not yet fixed."""
PROMISE_PAIRS_MAX: Final = 40
"""Most (first, last, ballot) runs named by one part of a promise: a part fits one datagram."""
CHAIN_BYTES: Final = 32
"""Bytes of a chain value: BLAKE2b-256."""
CHAIN_CHECK_SLOTS: Final = 1024
"""Voters compare their chains at multiples of this many slots."""
SNAPSHOT_SLOTS: Final = 16384
"""Default distance between snapshots, in slots."""
SESSIONS_MAX: Final = 10_000
"""Most open sessions; opening one more expires the one unused for the most slots."""
SESSION_RESULTS_MAX: Final = 1024
"""Most unanswered commands of one session whose results are kept."""
RENEW_LEASES_MAX: Final = 1024
"""Most leases of one :class:`Renew`; the client asks for more of them in several."""
TCP_BODY_BYTES_MAX: Final = 8 << 20
"""Largest frame body accepted over TCP, in bytes."""

assert VALUE_BYTES_MAX * 2 < TCP_BODY_BYTES_MAX, "two values must fit one TCP frame"
assert VALUE_BYTES_MAX <= WINDOW_BYTES_MAX, "one value must fit the window"
assert RUN_SLOTS_MAX <= WINDOW_SLOTS_MAX, "one run must fit the window"

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]
"""A slot, a count, an age: decoding refuses what eight bytes of a store could not hold. Negative
only where the field says that -1 means none."""


# --- values ---------------------------------------------------------------------------------


class Ballot(msgspec.Struct, frozen=True, order=True, array_like=True, gc=False):
    """A ballot: era, round, voter; ordered so. Era is 0 until reconfiguration exists.

    Source: PMS §2.2 (proposal numbers); uniqueness from the voter id.
    """

    era: Number = 0
    round: Number = 0
    voter: Number = 0

    def __str__(self) -> str:
        return f"{self.era}.{self.round}.{self.voter}"


NO_BALLOT: Final = Ballot()
"""Below every ballot a voter can stand under; promised by a voter that promised nothing."""


class Kind:
    """What a slot holds. The engine itself handles all kinds but ``COMMAND``."""

    NOOP: Final = 0
    """Fills a hole; never delivered to a state machine."""
    COMMAND: Final = 1
    """A command of a session for the state machine."""
    OPEN: Final = 2
    """Opens a session; its slot becomes the session's name."""
    CLOSE: Final = 3
    """Closes the session ``Value.session``."""
    GENESIS: Final = 4
    """Slot 1: the incarnations of all voters (``command`` = encoded :class:`Genesis`)."""
    SKIP: Final = 5
    """Uses up a sequence of a session whose command was surely never proposed."""
    ENGINE: Final = 6
    """A command for the state machine by the leader itself (lease expiry). ``session`` is the
    leader's own (``sessions.LEADER``), without which it has no effect; 0 for none."""


class Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one slot holds; re-proposals repeat it byte for byte.

    ``ballot`` is the ballot first proposed under (its voter is the proposer), ``time_ms`` that
    proposer's wall clock in milliseconds since 1970 (informational only: nothing may be decided
    by it), ``session``/``sequence``/``unanswered`` name the command for exactly-once, ``command``
    is at most COMMAND_BYTES_MAX bytes.
    """

    kind: int
    ballot: Ballot
    time_ms: int = 0
    session: int = 0
    sequence: int = 0
    unanswered: int = 0
    command: bytes = b""


class Genesis(msgspec.Struct, frozen=True, array_like=True):
    """The value of slot 1: ``incarnations[i]`` belongs to ``voters[i]``."""

    voters: tuple[int, ...]
    incarnations: tuple[int, ...]


_encoder = msgspec.msgpack.Encoder()
_value_decoder = msgspec.msgpack.Decoder(Value)


def encode_value(value: Value) -> bytes:
    """Encode a value. The second byte of the result is its kind (see :func:`value_kind`)."""
    return _encoder.encode(value)


def decode_value(data: bytes) -> Value:
    """Decode a value. Raises ``msgspec.DecodeError`` if ``data`` is not one."""
    return _value_decoder.decode(data)


def value_kind(data: bytes) -> int:
    """Kind of an encoded value without decoding it (array header, then a small integer). -1 if it
    is none."""
    return data[1] if len(data) > 1 else -1


def message_tag(body: bytes) -> int:
    """Tag of an encoded message without decoding it (its first 4 bytes are enough): an array
    header of one or three bytes, then a small integer. -1 if it is none."""
    at = 3 if body[:1] == b"\xdc" else 1
    return body[at] if len(body) > at and body[at] < 0x80 else -1


class Pairs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Slots ``first``..``last`` (inclusive) held as accepted at ``ballot``; no values."""

    first: Number
    last: Number
    ballot: Ballot


class Tip(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a leader announces: all slots up to ``fixed`` are fixed, the chain there is ``chain``,
    and it counted ``counted``..``fixed`` at its own ballot (empty if counted > fixed)."""

    fixed: Number
    chain: bytes
    counted: Number


# --- voter to voter -------------------------------------------------------------------------


class Poll(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Pre-vote: "do you hear a leader?" ``attempt`` is echoed. Changes nothing durable."""

    attempt: Number
    fixed: Number


class PollAnswer(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Answer to a :class:`Poll`: whether a leader is heard, highest promise, fixed slot."""

    attempt: Number
    hears: bool
    promised: Ballot
    fixed: Number


class Prepare(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Phase 1(a) for all slots from ``first``. Source: PMS §2.2, §3."""

    ballot: Ballot
    first: Number


class Promise(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """Phase 1(b): one part. It covers slots ``first``..``last``, or all from ``first`` if
    ``last`` is 0; ``accepted`` names what is held there, in order, without values."""

    ballot: Ballot
    first: Number
    last: Number
    accepted: tuple[Pairs, ...]


class Accept(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Phase 2(a) for the run of slots from ``first``, with the leader's tip."""

    ballot: Ballot
    first: Number
    values: tuple[bytes, ...]
    tip: Tip


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Phase 2(b): the sender accepted ``first``..``last`` at ``ballot``, durably."""

    ballot: Ballot
    first: Number
    last: Number


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """No to a Prepare, Accept or Fetch of ``ballot``: the sender promised ``promised`` and has
    fixed up to ``fixed``; the reader sees from the two which of them was the reason."""

    ballot: Ballot
    promised: Ballot
    fixed: Number


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """The leader lives. ``beat`` counts heartbeat rounds of this ballot; ``quorum_age_ticks`` is
    the age of the last answer of an accept quorum, in ticks."""

    ballot: Ballot
    beat: Number
    tip: Tip
    quorum_age_ticks: Number


class HeartbeatAck(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    """Answer to a heartbeat: fixed slot, highest accepted slot, whether the disk has room."""

    ballot: Ballot
    beat: Number
    fixed: Number
    last_accepted: Number
    has_room: bool = True


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=10, gc=False):
    """A candidate asks for the values of exactly these (slots, ballot) pairs. TCP."""

    ballot: Ballot
    wanted: tuple[Pairs, ...]


class Fetched(msgspec.Struct, frozen=True, array_like=True, tag=11, gc=False):
    """Values of exactly (``first``.., ``accepted_at``), for the candidate of ``ballot``. TCP."""

    ballot: Ballot
    first: Number
    accepted_at: Ballot
    values: tuple[bytes, ...]


class HandOver(msgspec.Struct, frozen=True, array_like=True, tag=12, gc=False):
    """The leader of ``ballot`` asks the receiver to stand at once, without a poll."""

    ballot: Ballot


class ChainReport(msgspec.Struct, frozen=True, array_like=True, tag=13, gc=False):
    """The sender's chain at ``slot``, a multiple of CHAIN_CHECK_SLOTS."""

    slot: Number
    chain: bytes


class Fenced(msgspec.Struct, frozen=True, array_like=True, tag=14, gc=False):
    """The receiver of this must stop: its journal is not the one the cluster knows.
    ``reason``: 1 foreign incarnation, 2 boot number below the one known (rolled-back disk)."""

    reason: Number
    expected: Number


class SealTold(msgspec.Struct, frozen=True, array_like=True, tag=16, gc=False):
    """What a voter tells another first on each of their TLS links: its datagrams are sealed with
    the voter key of ``epoch`` and ``secret`` (``trex_core.seal``), the next of them is number
    ``counter``. It is for the other's shell; ``step`` never sees it."""

    epoch: Number
    secret: bytes
    counter: Number

    def __repr__(self) -> str:
        return f"SealTold(epoch={self.epoch}, secret=..., counter={self.counter})"


class CatchUp(msgspec.Struct, frozen=True, array_like=True, tag=15, gc=False):
    """An instruction to the sender's own shell: catch up from ``first`` at voter ``Send.to``
    over TCP. It never crosses the wire."""

    first: Number


PeerMessage: TypeAlias = (
    Poll
    | PollAnswer
    | Prepare
    | Promise
    | Accept
    | Accepted
    | Refused
    | Heartbeat
    | HeartbeatAck
    | Fetch
    | Fetched
    | HandOver
    | ChainReport
    | Fenced
    | CatchUp
)

Vote: TypeAlias = Prepare | Promise | Accepted
"""The messages that wait for the sync of the records before them (PMS §2.5). No others do."""
VOTES: Final = (Prepare, Promise, Accepted)


# --- stream ---------------------------------------------------------------------------------

VOTER_ID_MAX: Final = 0xFFFF
"""Largest id of a voter. Where a *helper* is named, larger numbers are instances of listeners."""


class SignedTip(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Voter ``voter`` says, with ``signature``, that ``slot`` is fixed and that the chain there is
    ``chain``. ``ballot`` names the leader then (NO_BALLOT: it was not asked)."""

    slot: Number
    chain: bytes
    ballot: Ballot
    voter: Number
    signature: bytes


class StreamRun(msgspec.Struct, frozen=True, array_like=True, tag=40, gc=False):
    """Fixed slots from ``first``; ``chain_before`` is the chain at ``first - 1``; ``tip_slot`` and
    ``tip_chain`` are a newest fixed slot, which voter ``signer`` signed with ``signature`` (under
    ``ballot``). ``repair`` marks an answer to a request, which a listener may send too."""

    ballot: Ballot
    first: Number
    chain_before: bytes
    values: tuple[bytes, ...]
    tip_slot: Number
    tip_chain: bytes
    repair: bool = False
    signer: Number = 0
    signature: bytes = b""


LISTENER_REPORT_TAG: Final = 43


class ListenerReport(
    msgspec.Struct, frozen=True, array_like=True, tag=LISTENER_REPORT_TAG, gc=False
):
    """What a listener says of itself on the repair group, now and then (``roster`` says when).

    ``instance`` (0 to 2**63 - 1) is drawn at each start, so that two listeners of one name are
    told apart; one that helps others (``helps``: the ``address:port`` where it serves catch-up)
    draws it above VOTER_ID_MAX;
    ``stored`` is -1 without a store; ``behind_ms`` is for how long it has not been at its tip
    (0: it is there).  ``gaps``, ``repairs`` (requests sent), ``catchups`` and ``resets`` count
    since its start; ``leaving`` marks the last report of one that stops in order.
    """

    name: str
    instance: Number
    applied: Number
    stored: Number
    tip: Number
    behind_ms: Number
    ready: bool
    gaps: Number
    repairs: Number
    catchups: Number
    resets: Number
    uptime_s: Number
    version: str
    leaving: bool = False
    helps: str = ""


class ListenerSeen(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A report as a voter remembers it: heard ``age_ms`` milliseconds before the digest."""

    age_ms: Number
    report: ListenerReport


class ListenerDigest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The listeners as one voter knows them: how many, how many of them are behind or silent, the
    largest lag in slots, and a few rows; successive digests show all of them in turn."""

    known: Number = 0
    behind: Number = 0
    silent: Number = 0
    lag_max: Number = 0
    rows: tuple[ListenerSeen, ...] = ()


class Transition(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One change of a voter's role: the ``number``-th since its boot, ``age_ms`` before the digest
    that tells it.  ``ballot`` is the one stood or led under, or followed; ``leader`` is the voter
    followed then (0: none), ``why`` says the reason in words."""

    number: Number
    age_ms: Number
    role: str
    ballot: Ballot
    leader: Number
    fixed: Number
    why: str


class VoterDigest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a voter says of itself in its stream heartbeat. ``role`` is one of "follower",
    "polling", "candidate", "leader"; slots are numbers, ``fsync_us`` the last sync time.

    ``time_ms`` is its wall clock (informational), ``proposed`` the highest slot a leader proposed
    (0 at others), ``quorum_age_ms`` the age of the newest answer of an accept quorum at a leader,
    of the newest word of its leader at others (-1: none), ``commit_*_us`` the time from proposal
    to fixed over the leader's newest slots (0: unknown).  ``heard_ms`` says how long ago each
    voter, ascending by id, was heard (0 for itself, -1 never).  ``transitions`` are its newest
    changes of role, oldest first.
    """

    role: str
    promised: Ballot
    last_accepted: Number
    fixed: Number
    applied: Number
    journal_bytes: Number
    free_bytes: Number
    fsync_us: Number
    version: str
    boot: Number = 0
    uptime_s: Number = 0
    time_ms: int = 0
    proposed: Number = 0
    quorum_age_ms: Number = -1
    has_room: bool = True
    snapshot_slot: Number = 0
    fsync_p50_us: Number = 0
    fsync_p99_us: Number = 0
    commit_p50_us: Number = 0
    commit_p99_us: Number = 0
    heard_ms: tuple[int, ...] = ()
    transitions: tuple[Transition, ...] = ()
    listeners: ListenerDigest = ListenerDigest()


class StreamTip(msgspec.Struct, frozen=True, array_like=True, tag=41, gc=False):
    """Heartbeat of the stream, at least each 100 ms from the leader (``leading``) and each second
    from any other voter. ``ballot`` names the leader's ballot (NO_BALLOT when none is known).
    ``signature`` is voter ``signer``'s of the tip, ``words`` of all that stands before it in the
    encoded message, so it is to stay the last field."""

    ballot: Ballot
    leading: bool
    tip_slot: Number
    tip_chain: bytes
    digest: VoterDigest
    signer: Number = 0
    signature: bytes = b""
    words: bytes = b""


WORDS_BYTES: Final = 66
"""Length of an encoded ``StreamTip.words``: the end of the message, which it does not sign."""


class RepairRequest(msgspec.Struct, frozen=True, array_like=True, tag=42, gc=False):
    """A listener lacks ``first``..``last``; helper ``responder`` (a voter, or above VOTER_ID_MAX a
    listener) is asked to multicast them."""

    listener: str
    responder: Number
    first: Number
    last: Number


StreamMessage: TypeAlias = StreamRun | StreamTip | RepairRequest | ListenerReport
"""Voters send the first two to the stream's port; listeners the others to the repair port."""


# --- catch-up (archive, TCP) ----------------------------------------------------------------


class CatchupRequest(msgspec.Struct, frozen=True, array_like=True, tag=60):
    """Fixed entries from ``first`` please, at most ``bytes_max`` bytes of them (the answer holds
    at least one). ``follower`` names who asks, for logs. Always answered: by CatchupEntries
    (empty ``values`` = nothing newer here), SnapshotOffer or AskOther."""

    follower: str
    first: int
    bytes_max: int = RUN_BYTES_MAX


class CatchupEntries(msgspec.Struct, frozen=True, array_like=True, tag=61):
    """Fixed entries from ``first``; chain at ``first - 1``; ``end`` proves them: it is signed, and
    its slot is that of the last of them. ``tip`` is the newest fixed slot known there, signed too.
    Empty ``values``: nothing at or above ``first`` is known there yet, and ``end`` is the tip."""

    first: Number
    chain_before: bytes
    values: tuple[bytes, ...]
    end: SignedTip
    tip: SignedTip


class SnapshotOffer(msgspec.Struct, frozen=True, array_like=True, tag=62):
    """The log no longer reaches back to the slot asked for; this snapshot exists: state at
    ``slot``, ``size_bytes`` bytes with BLAKE2b-256 ``digest``, chain at ``slot``. Voter ``signer``
    says so with ``signature``."""

    slot: Number
    chain: bytes
    size_bytes: Number
    digest: bytes
    signer: Number = 0
    signature: bytes = b""


class SnapshotRequest(msgspec.Struct, frozen=True, array_like=True, tag=63):
    """Bytes of the snapshot at ``slot`` from ``offset``; resumes at any voter."""

    slot: Number
    offset: Number


class SnapshotChunk(msgspec.Struct, frozen=True, array_like=True, tag=64):
    """``data`` of the snapshot at ``slot`` from ``offset``; empty at the end."""

    slot: Number
    offset: Number
    data: bytes


class AskOther(msgspec.Struct, frozen=True, array_like=True, tag=65):
    """This archive cannot serve the request (``reason`` says why); ask ``voter`` (0: any other)."""

    voter: int
    reason: str


CatchupMessage: TypeAlias = (
    CatchupRequest | CatchupEntries | SnapshotOffer | SnapshotRequest | SnapshotChunk | AskOther
)


# --- clients --------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=80, gc=False):
    """Propose a command. ``kind`` is COMMAND, SKIP, OPEN or CLOSE; ``id`` pairs the reply with
    the request on this connection; ``unanswered`` is the lowest sequence without an answer."""

    id: int
    kind: int
    session: int
    sequence: int
    unanswered: int
    command: bytes


class Query(msgspec.Struct, frozen=True, array_like=True, tag=81):
    """Ask the state machine (``query``: its own encoding). ``linearizable``: the leader confirms
    itself with an accept quorum first; otherwise answered by any voter at its applied slot."""

    id: int
    query: bytes
    linearizable: bool


class SessionQuery(msgspec.Struct, frozen=True, array_like=True, tag=82):
    """Linearizable: which sequence does ``session`` expect next? Reply: Answer with an encoded
    integer, 0 when the session is not open."""

    id: int
    session: int


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=83):
    """Renew these leases; answered once a heartbeat round begun later is acknowledged by an
    accept quorum. The reply's body is the encoded tuple of the leases that are alive, each once."""

    id: int
    leases: Annotated[tuple[int, ...], msgspec.Meta(max_length=RENEW_LEASES_MAX)]


class StatusRequest(msgspec.Struct, frozen=True, array_like=True, tag=84):
    """What does this voter think? Answered by any voter at once with :class:`Status`."""

    id: int


class HandOverRequest(msgspec.Struct, frozen=True, array_like=True, tag=85):
    """Hand leadership to voter ``to`` (0: the most up to date). Answered when it is done or
    failed: Answer or Refusal."""

    id: int
    to: int


class SnapshotNow(msgspec.Struct, frozen=True, array_like=True, tag=86):
    """Cut a snapshot at the applied slot of this voter now. Answered when it is durable."""

    id: int


ClientRequest: TypeAlias = (
    Submit | Query | SessionQuery | Renew | StatusRequest | HandOverRequest | SnapshotNow
)


class Outcome(msgspec.Struct, frozen=True, array_like=True, tag=100, gc=False):
    """A submitted command is fixed in ``slot`` and applied; ``status`` says how:
    0 applied (``body`` = result of the state machine), 1 failed (``body`` = name of the class the
    state machine raised; state as before), 2 session expired (not applied), 3 gap: an earlier
    sequence of the session is not applied yet (not applied; send again in order), 4 a duplicate
    whose result was already acknowledged and dropped."""

    id: int
    slot: int
    status: int
    body: bytes


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=101):
    """Answer to a read or an administrative request, as of ``slot``."""

    id: int
    slot: int
    body: bytes


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag=102, gc=False):
    """Not done. ``reason``: 1 not the leader (``leader``: who is, 0 unknown; surely not proposed),
    2 busy (window or inbox full; surely not proposed), 3 no quorum (surely not proposed),
    4 too large (surely not proposed), 5 leadership lost after proposing: outcome unknown,
    6 malformed or refused request, ``detail`` says why, 7 disks full (surely not proposed)."""

    id: int
    reason: int
    leader: int
    detail: str


class PeerView(msgspec.Struct, frozen=True, array_like=True):
    """How a voter sees another: last heard (ms, -1 never), its fixed and accepted slots."""

    voter: int
    heard_ms: int
    fixed: int
    last_accepted: int
    boot: int


class Status(msgspec.Struct, frozen=True, array_like=True, tag=103):
    """One voter's own view, for ``trex status``. ``time_ms`` is its wall clock, in milliseconds
    since 1970 (informational; 0: it did not say); ``certificate_until_s`` is when its certificate
    expires, in seconds since then."""

    id: int
    voter: int
    role: str
    leader: int
    ballot: Ballot
    promised: Ballot
    first_slot: int
    last_accepted: int
    fixed: int
    applied: int
    chain: bytes
    boot: int
    incarnation: int
    journal_bytes: int
    segments: int
    snapshot_slot: int
    free_bytes: int
    fsync_p50_us: int
    fsync_p99_us: int
    quorum_age_ms: int
    counters: dict[str, int]
    peers: tuple[PeerView, ...]
    version: str
    uptime_s: int
    time_ms: int = 0
    certificate_until_s: int = 0


ClientReply: TypeAlias = Outcome | Answer | Refusal | Status


class RefusalReason:
    """Numbers of ``Refusal.reason``."""

    NOT_LEADER: Final = 1
    BUSY: Final = 2
    NO_QUORUM: Final = 3
    TOO_LARGE: Final = 4
    LEADERSHIP_LOST: Final = 5
    MALFORMED: Final = 6
    DISK_FULL: Final = 7
    UNAUTHORIZED: Final = 8


class OutcomeStatus:
    """Numbers of ``Outcome.status``."""

    APPLIED: Final = 0
    FAILED: Final = 1
    SESSION_EXPIRED: Final = 2
    GAP: Final = 3
    FORGOTTEN: Final = 4
