"""Hostile datagrams out of recorded ones: this module alone knows what an adversary tries.

It sees all datagrams, keeps some from arriving, and sends what it likes to any port; it holds no
key of the cluster.  Each kind of attempt is a function of chance and of what was recorded, with the
reasons for which it must be dropped: those of *after* the seal was opened ("body", "sender") are in
none of them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from trex_core.messages import DATAGRAM_BYTES_MAX
from trex_core.seal import KEY_BYTES, Key, Sealer
from trex_core.wire import (
    DATAGRAM_BODY_BYTES_MAX,
    HEADER_BYTES,
    TAG_BYTES,
    Channel,
    Identity,
    frame,
)

STREAM: Final = "stream"
REPAIR: Final = "repair"
"""Doors beside those of the voters, which are named ``voter-1``, ...: where datagrams are taken."""
TAKEN_MAX: Final = 1024
KEPT_BACK_MAX: Final = 128
"""Datagrams of each door that are remembered, the newest. What was kept back long ago would be no
more in the receiver's window."""
SETTLED: Final = 64
"""The newest of each door are not replayed yet: they may still be on their way."""
TAG_AT: Final = HEADER_BYTES - TAG_BYTES
FIELDS: Final = {
    "channel": (3, 1), "cluster": (4, 16), "sender": (20, 2), "epoch": (22, 2),
    "incarnation": (24, 8), "boot": (32, 8), "salt": (40, 4), "counter": (44, 8), "part": (52, 1),
    "parts": (53, 1), "receiver": (54, 2), "length": (56, 4), "checksum": (60, 4),
}  # fmt: skip
"""Offset and size of each field of the frame's header, as ``trex_core.wire`` documents them."""


def door_of(voter: int) -> str:
    """The peer port of ``voter``."""
    return f"voter-{voter}"


class Said(NamedTuple):
    """A datagram of a node of the cluster, and its body as it was before it was sealed (as far as
    whoever recorded it knows it: another cluster may have said the same)."""

    data: bytes
    body: bytes


@dataclass
class Recording:
    """Real traffic by the door it was meant for: what was taken there, and what was kept back."""

    taken: dict[str, deque[Said]] = field(default_factory=dict)
    kept_back: dict[str, deque[Said]] = field(default_factory=dict)

    def note(self, door: str, said: Said, *, arrived: bool = True) -> None:
        """One more datagram."""
        kept = self.taken if arrived else self.kept_back
        kept.setdefault(door, deque(maxlen=TAKEN_MAX if arrived else KEPT_BACK_MAX)).append(said)


class Window(NamedTuple):
    """Datagrams of one kind for one door."""

    kind: str
    door: str
    datagrams: list[bytes]


class Kind(NamedTuple):
    """One kind of attempt. ``make`` gives a datagram for a door, or None if nothing recorded so far
    is of use; it must be dropped for one of ``reasons``."""

    make: Callable[[Adversary, str], bytes | None]
    reasons: frozenset[str]


class Adversary:
    """Draws attempts, reproducibly from ``seed`` and what was recorded."""

    def __init__(self, seed: int, cluster_id: bytes, recording: Recording) -> None:
        self.chance = random.Random(seed)
        self.cluster_id = cluster_id
        self.recording = recording
        draw = self.chance.randbytes
        self.other_cluster = draw(16)
        self.key = Key(1, draw(KEY_BYTES))
        """Of the other cluster, the first as everywhere."""
        self.secret = draw(KEY_BYTES)
        self.kinds = list(KINDS)

    def window(self, door: str, size: int) -> Window | None:
        """At most ``size`` datagrams of one kind for ``door``; None if there are none of the kind
        that was drawn."""
        kind = self.chance.choice(self.kinds)
        drawn = [KINDS[kind].make(self, door) for _ in range(size)]
        datagrams = [data for data in drawn if data is not None]
        return Window(kind, door, datagrams) if datagrams else None

    def some(self, door: str) -> Said:
        """A datagram that was meant for ``door``; most were never heard there, so that only their
        seal can tell them from good ones."""
        kept_back = self.recording.kept_back.get(door)
        if kept_back and self.chance.random() < 0.7:
            return self.chance.choice(kept_back)
        return self.chance.choice(self.recording.taken[door])

    def sealed(self, cluster_id: bytes, said: Said, channel: int) -> bytes:
        """What was ``said`` as the other cluster would seal it, in the name of ``cluster_id``."""
        sender, incarnation, boot = (
            int.from_bytes(said.data[at : at + size], "big")
            for at, size in (FIELDS["sender"], FIELDS["incarnation"], FIELDS["boot"])
        )
        salt = self.secret if channel == Channel.PEER else said.data[40:44]
        sealer = Sealer(channel, Identity(cluster_id, sender, incarnation, boot), self.key, salt)
        sealer.counter = int.from_bytes(said.data[44:52], "big")
        return sealer.datagrams(said.body)[0]

    def number(self, size: int) -> int:
        """A number of ``size`` bytes: small, at an end, or any."""
        top = (1 << 8 * size) - 1
        return self.chance.choice((self.chance.randrange(4), top, self.chance.randint(0, top)))


# --- what it tries ----------------------------------------------------------------------------


def channel_of(door: str) -> int:
    """The channel of what is said at ``door``."""
    return Channel.STREAM if door in (STREAM, REPAIR) else Channel.PEER


def _flipped(first: int, last: int | None) -> Callable[[Adversary, str], bytes | None]:
    def make(self: Adversary, door: str) -> bytes | None:
        data = bytearray(self.some(door).data)
        end = len(data) if last is None else last
        if first >= end:
            return None
        bits = self.chance.sample(range(8 * first, 8 * end), self.chance.randint(1, 4))
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
        return bytes(data)

    return make


def _cut(self: Adversary, door: str) -> bytes:
    data = self.some(door).data
    return data[: self.chance.randrange(len(data))]


def _extended(self: Adversary, door: str) -> bytes:
    return self.some(door).data + self.chance.randbytes(self.chance.randint(1, 64))


def _field(self: Adversary, door: str) -> bytes:
    """One field says something else: any number, one more or less, or what another says there."""
    data = self.some(door).data
    offset, size = FIELDS[self.chance.choice(list(FIELDS))]
    old = data[offset : offset + size]
    number = int.from_bytes(old, "big")
    new = old
    while new == old:
        chosen = self.chance.choice((number + 1, number - 1, self.number(size)))
        new = (chosen % (1 << 8 * size)).to_bytes(size, "big")
        if self.chance.random() < 0.3:
            other = self.some(door).data[offset : offset + size]
            new = other if other != old else new
    return data[:offset] + new + data[offset + size :]


def _length_made_right(self: Adversary, door: str) -> bytes:
    """Cut or extended, and the header says so: only the seal knows."""
    whole = self.some(door).data
    size = self.chance.randint(0, DATAGRAM_BYTES_MAX - HEADER_BYTES)
    body = (whole[HEADER_BYTES:] + self.chance.randbytes(64))[:size]
    if len(body) == len(whole) - HEADER_BYTES:
        body = body[:-1] or b"!"  # never longer than a datagram may be: that is a kind of its own
    return whole[:56] + len(body).to_bytes(4, "big") + whole[60:HEADER_BYTES] + body


def _too_long(self: Adversary, door: str) -> bytes:
    """Longer than any datagram, and the header says so."""
    whole = self.some(door).data
    body = whole[HEADER_BYTES:] + self.chance.randbytes(DATAGRAM_BODY_BYTES_MAX + 64)
    body = body[: DATAGRAM_BODY_BYTES_MAX + self.chance.randint(1, 64)]
    return whole[:56] + len(body).to_bytes(4, "big") + whole[60:HEADER_BYTES] + body


def _spliced(self: Adversary, door: str) -> bytes | None:
    """The beginning of one with the rest of another: at a border of the frame, or anywhere."""
    one, two = self.some(door).data, self.some(door).data
    at = self.chance.choice((20, 44, TAG_AT, HEADER_BYTES, self.chance.randrange(1, len(one))))
    data = one[:at] + two[at:]
    return None if data in (one, two) else data


def _replayed(self: Adversary, door: str) -> bytes | None:
    taken = self.recording.taken[door]
    settled = len(taken) - (SETTLED if channel_of(door) == Channel.PEER else 0)
    return taken[self.chance.randrange(settled)].data if settled > 0 else None


def _misdirected(self: Adversary, door: str) -> bytes | None:
    """What was said to one voter alone, shown to another."""
    others = [d for d in self.recording.taken if d != door and channel_of(d) == Channel.PEER]
    if channel_of(door) != Channel.PEER or not others:
        return None
    data = self.some(self.chance.choice(others)).data
    offset, size = FIELDS["receiver"]
    return data if any(data[offset : offset + size]) else None


def _wrong_door(self: Adversary, door: str) -> bytes | None:
    """What was said between voters on the stream, and the other way round."""
    others = [d for d in self.recording.taken if channel_of(d) != channel_of(door)]
    return self.some(self.chance.choice(others)).data if others else None


def _other_cluster(self: Adversary, door: str) -> bytes:
    return self.sealed(self.other_cluster, self.some(door), channel_of(door))


def _other_cluster_readdressed(self: Adversary, door: str) -> bytes:
    data = self.sealed(self.other_cluster, self.some(door), channel_of(door))
    return data[:4] + self.cluster_id + data[20:]


def _wrong_key(self: Adversary, door: str) -> bytes:
    return self.sealed(self.cluster_id, self.some(door), channel_of(door))


def _stranger(self: Adversary, door: str) -> bytes:
    """Somebody never heard of, with good manners and no key."""
    who = Identity(self.cluster_id, self.number(2), self.number(8), self.number(8))
    key = Key(self.chance.randint(1, 3), self.key.secret)
    sealer = Sealer(channel_of(door), who, key, self.secret[:4])
    sealer.counter = self.number(7)
    return sealer.datagrams(self.some(door).body)[0]


def _unsealed(self: Adversary, door: str) -> bytes:
    """A good frame, as a journal has it: without a seal."""
    who = Identity(self.cluster_id, self.chance.randint(0, 3), 1, 1)
    return frame(who, channel_of(door), self.some(door).body[:DATAGRAM_BODY_BYTES_MAX])


def _noise(self: Adversary, _door: str) -> bytes:
    return self.chance.randbytes(self.chance.randrange(DATAGRAM_BYTES_MAX + 20))


def _noise_with_a_head(self: Adversary, door: str) -> bytes:
    """Everything a stranger can know is right: magic, version, channel, cluster and length."""
    body = self.chance.randbytes(self.chance.randrange(DATAGRAM_BYTES_MAX - HEADER_BYTES))
    head = b"Tx\x01" + bytes([channel_of(door)]) + self.cluster_id + self.chance.randbytes(36)
    return head + len(body).to_bytes(4, "big") + self.chance.randbytes(4 + TAG_BYTES) + body


_HEAD: Final = frozenset({"short", "magic", "version", "cluster", "length", "channel"})
_SEAL: Final = frozenset({"sealed", "part", "epoch", "tag", "replay"})
KINDS: Final[dict[str, Kind]] = {
    "head flipped": Kind(_flipped(0, TAG_AT), _HEAD | _SEAL),
    "tag flipped": Kind(_flipped(TAG_AT, HEADER_BYTES), frozenset({"tag", "replay"})),
    "body flipped": Kind(_flipped(HEADER_BYTES, None), frozenset({"tag", "replay"})),
    "cut": Kind(_cut, frozenset({"short", "length"})),
    "extended": Kind(_extended, frozenset({"length"})),
    "length made right": Kind(_length_made_right, frozenset({"tag", "replay"})),
    "too long": Kind(_too_long, frozenset({"length"})),
    "field changed": Kind(_field, _HEAD | _SEAL),
    "spliced": Kind(_spliced, _HEAD | _SEAL),
    "replayed": Kind(_replayed, frozenset({"replay"})),
    "misdirected": Kind(_misdirected, frozenset({"receiver", "replay", "epoch"})),
    "wrong door": Kind(_wrong_door, frozenset({"channel"})),
    "other cluster": Kind(_other_cluster, frozenset({"cluster"})),
    "other cluster, readdressed": Kind(_other_cluster_readdressed, frozenset({"tag", "replay"})),
    "wrong key": Kind(_wrong_key, frozenset({"tag", "replay"})),
    "stranger": Kind(_stranger, frozenset({"tag", "epoch"})),
    "unsealed": Kind(_unsealed, frozenset({"sealed"})),
    "noise": Kind(_noise, frozenset({"short", "magic", "version", "cluster"})),
    "noise with a head": Kind(_noise_with_a_head, frozenset({"sealed", "part", "epoch", "tag"})),
}
REPLAYED: Final = "replayed"
"""The one kind that the stream's doors may take again, since slots, requests and reports are
idempotent: there it is opened, and must change nothing. Heartbeats are taken once there too."""
DRAWN: Final = "drawn"
"""Of what a test draws itself nothing is known but that no node said it."""
OUTSIDE: Final = _HEAD | _SEAL | {"receiver"}
"""Reasons that need no key."""


def allowed(kind: str) -> frozenset[str]:
    """For which reasons what is of ``kind`` may be dropped."""
    return KINDS[kind].reasons if kind in KINDS else _HEAD | _SEAL
