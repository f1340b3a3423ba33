"""Seals and signatures: this module alone knows keys, sub-keys, replay windows and what is signed.

Datagrams are sealed with AES-256-GCM, the first 64 bytes of the frame as associated data, under a
*sub-key* that one sender uses during one run of its process only: BLAKE2b of a *key* that all of a
group share and of who sends (:func:`_sub_key`).  The nonce is the number of the datagram, so that
none is used twice under a sub-key.  Two groups, two keys (DESIGN §5):

==========  =========================  ==========================================================
key         who has it                 what it opens
==========  =========================  ==========================================================
voter key   voters                     datagrams between voters.  A sub-key comes from a secret
                                       that its sender draws at each start and tells over TLS,
                                       with the number of its next datagram: what was recorded
                                       before is behind the replay window of whoever hears it.
stream key  voters and listeners       stream, repair requests, reports.  A sub-key comes from the
                                       header alone, so that any holder opens what it hears first.
                                       No replay window: slots and tips are idempotent.
==========  =========================  ==========================================================

Holding the stream key is no proof of origin, so a voter signs its tips with Ed25519
(:class:`Signer`): what a listener applies is covered by a signature, back through the chain.

Values in, values out: whoever calls draws the random numbers and reads the files.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec.structs import replace
from nacl.bindings import crypto_sign, crypto_sign_open, crypto_sign_seed_keypair
from nacl.exceptions import BadSignatureError

from trex_core.messages import CHAIN_BYTES, NO_BALLOT, Ballot, SignedTip, SnapshotOffer
from trex_core.wire import (
    DATAGRAM_BODY_BYTES_MAX,
    Channel,
    Frame,
    FrameError,
    Identity,
    sealed_frame,
    sealed_head,
    sealed_prefix,
    unsealed,
)

KEY_BYTES: Final = 32
STREAM_SALT_BYTES: Final = 4
"""Drawn at each start of whoever speaks on the stream, so that no nonce is used twice."""
EPOCH_MAX: Final = 0xFFFF
KEYS_MAX: Final = 4
"""Most keys of a ring: the one in use, and those of a rotation on its way."""
WINDOW_DATAGRAMS: Final = 4096
"""Datagrams that may come out of order before they count as replayed."""
SUB_KEYS_MAX: Final = 4096
"""Most sub-keys of the stream that are remembered; the oldest is worked out again."""
SIGNATURE_BYTES: Final = 64
TOLD_PER_SENDER_MAX: Final = 2
"""Sub-keys kept of one voter: that of the epoch in use and that of the one before or after."""
WINDOWS_PER_SENDER_MAX: Final = 16
"""Most replay windows remembered of one voter: one of each epoch of each run that it told of."""
_WINDOW_MASK: Final = (1 << WINDOW_DATAGRAMS) - 1
_PEER: Final = b"trex voter"
_STREAM: Final = b"trex stream"
_TIP_PURPOSE: Final = b"trex tip 1"
_WORDS_PURPOSE: Final = b"trex words 1"
_SNAPSHOT_PURPOSE: Final = b"trex snapshot 1"
_RUN: Final = struct.Struct(">HQQ")
_TIP: Final = struct.Struct(">HQQQQ")
_SNAPSHOT: Final = struct.Struct(">HQQ")


class Key(msgspec.Struct, frozen=True):
    """A secret of KEY_BYTES bytes that a group shares; ``epoch`` names it in each frame."""

    epoch: Annotated[int, msgspec.Meta(ge=1, le=EPOCH_MAX)]
    secret: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]

    def __repr__(self) -> str:
        return f"Key(epoch={self.epoch}, secret=...)"

    __str__ = __repr__


class KeyRing(msgspec.Struct, frozen=True):
    """The keys of one group: the first seals, each opens. To rotate: add the new one last on every
    node, then put it first on every node, then take the old one away."""

    keys: tuple[Key, ...]

    def __post_init__(self) -> None:
        epochs = [key.epoch for key in self.keys]
        if not 1 <= len(epochs) <= KEYS_MAX:
            raise ValueError(f"a key ring holds 1 to {KEYS_MAX} keys, not {len(epochs)}")
        if len(set(epochs)) != len(epochs):
            raise ValueError("a key ring holds each epoch once only")

    @property
    def first(self) -> Key:
        """The key that seals."""
        return self.keys[0]

    def secret(self, epoch: int) -> bytes | None:
        """The secret of ``epoch``; None if it is not held."""
        for key in self.keys:
            if key.epoch == epoch:
                return key.secret
        return None


def _sub_key(purpose: bytes, secret: bytes, cluster_id: bytes, run: Frame, salt: bytes) -> AESGCM:
    """The cipher of one sender during one run: nobody else's, and nothing of another run's.
    ``purpose`` has at most 16 bytes."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES, key=secret, person=purpose)
    digest.update(cluster_id)
    digest.update(_RUN.pack(run.sender, run.incarnation, run.boot))
    digest.update(salt)
    return AESGCM(digest.digest())


def _head_of(identity: Identity) -> Frame:
    return Frame(0, identity.sender, identity.incarnation, identity.boot, 0, 0, 0, 1, b"")


def _opened(data: bytes, head: Frame, cipher: AESGCM) -> Frame:
    try:
        return unsealed(data, head, cipher.decrypt)
    except InvalidTag:
        raise FrameError("tag") from None


class Sealer:
    """What one sender says on one channel: each datagram under the next number.

    ``salt`` are 4 bytes for the stream, and for voters the KEY_BYTES that :meth:`PeerOpener.told`
    is told; either is drawn at random at each start of a process."""

    _salt: bytes

    def __init__(self, channel: int, identity: Identity, key: Key, salt: bytes) -> None:
        self._channel = channel
        self._identity = identity
        self.counter = 1
        """The number of the next datagram."""
        self.use(key, salt)

    def use(self, key: Key, salt: bytes | None = None) -> None:
        """Seal with ``key`` from now on, and with ``salt`` if it is drawn anew. The numbers go
        on."""
        if salt is not None:
            self._salt = salt
        purpose = _PEER if self._channel == Channel.PEER else _STREAM
        head = _head_of(self._identity)
        cipher = _sub_key(purpose, key.secret, self._identity.cluster_id, head, self._salt)
        self._encrypt = cipher.encrypt
        word = int.from_bytes(self._salt[:4], "big") if purpose is _STREAM else 0
        self._prefix = sealed_prefix(self._identity, self._channel, key.epoch, word)

    def datagrams(self, body: bytes, receiver: int = 0) -> list[bytes]:
        """``body`` sealed as datagrams of at most DATAGRAM_BYTES_MAX bytes, for voter ``receiver``
        (0: for whoever hears it). Requires that it needs at most 255 of them."""
        size = DATAGRAM_BODY_BYTES_MAX
        if len(body) <= size:
            return [self._seal(body, 0, 1, receiver)]
        parts = (len(body) + size - 1) // size
        return [
            self._seal(body[part * size : (part + 1) * size], part, parts, receiver)
            for part in range(parts)
        ]

    def _seal(self, body: bytes, part: int, parts: int, receiver: int) -> bytes:
        counter = self.counter
        self.counter = counter + 1
        return sealed_frame(self._prefix, counter, part, parts, receiver, body, self._encrypt)


class StreamOpener:
    """Opens what holders of the stream key say: repairs, requests, reports and the stream."""

    def __init__(self, cluster_id: bytes, ring: KeyRing) -> None:
        self._cluster_id = cluster_id
        self._ciphers: dict[tuple[int, int, int, int, int], AESGCM] = {}
        self._ring = ring

    def use(self, ring: KeyRing) -> None:
        """Open with the keys of ``ring`` from now on."""
        self._ring = ring
        self._ciphers.clear()

    def open(self, data: bytes) -> Frame:
        """The frame that ``data`` is. Raises :class:`FrameError` and nothing else."""
        head = sealed_head(data, self._cluster_id, Channel.STREAM)
        run = (head.epoch, head.sender, head.incarnation, head.boot, head.salt)
        cipher = self._ciphers.get(run)
        if cipher is not None:
            return _opened(data, head, cipher)
        secret = self._ring.secret(head.epoch)
        if secret is None:
            raise FrameError("epoch")
        salt = head.salt.to_bytes(4, "big")
        cipher = _sub_key(_STREAM, secret, self._cluster_id, head, salt)
        frame = _opened(data, head, cipher)
        # Only now: what a stranger makes up must not push out what is in use.
        if len(self._ciphers) >= SUB_KEYS_MAX:
            del self._ciphers[next(iter(self._ciphers))]
        self._ciphers[run] = cipher
        return frame


class ReplayWindow:
    """Which numbers of one sender were taken: none twice, none below ``floor``, none more than
    WINDOW_DATAGRAMS behind the highest."""

    __slots__ = ("_floor", "_taken", "_top")

    def __init__(self, floor: int) -> None:
        self._floor = floor
        self._top = floor - 1
        self._taken = 0
        """Bit n: number ``top - n`` was taken."""

    def fresh(self, number: int) -> bool:
        """May ``number`` still be taken?"""
        behind = self._top - number
        if behind < 0:
            return True
        return (
            number >= self._floor and behind < WINDOW_DATAGRAMS and not (self._taken >> behind) & 1
        )

    def take(self, number: int) -> None:
        """``number`` was taken. Requires that it is fresh."""
        ahead = number - self._top
        if ahead <= 0:
            self._taken |= 1 << -ahead
            return
        self._top = number
        if ahead >= WINDOW_DATAGRAMS:
            self._taken = 1
        else:
            self._taken = ((self._taken << ahead) | 1) & _WINDOW_MASK


class _Told:
    """One run of one voter, as it told us itself; ``serial`` is of the certificate it showed."""

    __slots__ = ("boot", "cipher", "incarnation", "secret", "serial", "window")

    def __init__(
        self, run: Frame, secret: bytes, cipher: AESGCM, window: ReplayWindow, serial: str
    ) -> None:
        self.incarnation, self.boot = run.incarnation, run.boot
        self.secret = secret
        self.cipher = cipher
        self.window = window
        self.serial = serial


class PeerOpener:
    """Opens what other voters say by datagram, once they told their secrets over TLS."""

    def __init__(self, cluster_id: bytes, ring: KeyRing) -> None:
        self._cluster_id = cluster_id
        self._ring = ring
        self._told: dict[int, dict[int, _Told]] = {}
        self._windows: dict[int, dict[tuple[int, int, int, bytes], ReplayWindow]] = {}
        """Of each voter (epoch, incarnation, boot, secret): what was taken stays taken, whatever
        is told in between."""

    def use(self, ring: KeyRing) -> None:
        """Know the keys of ``ring`` from now on. What is open stays open as long as its epoch is
        in the ring; voters tell of new epochs themselves."""
        self._ring = ring
        for told in self._told.values():
            for epoch in [each for each in told if ring.secret(each) is None]:
                del told[epoch]

    def told(
        self, identity: Identity, epoch: int, secret: bytes, counter: int, serial: str = ""
    ) -> bool:
        """The voter ``identity`` says (over a channel that proves it, with the certificate
        ``serial``) that it seals with the key of ``epoch`` and ``secret`` (KEY_BYTES), and that
        its next datagram has number ``counter``. Told again of the same run, its window goes on.
        Returns whether what was told of another run ended by it. Raises :class:`FrameError`
        "epoch" when that key is not held here, "body" when the secret is none, "replay" when a
        later boot told before: bytes held back on the way must not bring an earlier one back."""
        if len(secret) != KEY_BYTES or counter < 1:
            raise FrameError("body")
        key = self._ring.secret(epoch)
        if key is None:
            raise FrameError("epoch")
        run = _head_of(identity)
        windows = self._windows.setdefault(run.sender, {})
        if any(of == run.incarnation and boot > run.boot for _, of, boot, _ in windows):
            raise FrameError("replay")
        known = self._told.setdefault(run.sender, {})
        mine = (run.incarnation, run.boot, secret)
        others = [
            each for each, of in known.items() if (of.incarnation, of.boot, of.secret) != mine
        ]
        for other in others:
            del known[other]
        known.pop(epoch, None)
        while len(known) >= TOLD_PER_SENDER_MAX:
            del known[next(iter(known))]
        name = (epoch, *mine)
        window = windows.pop(name, None) or ReplayWindow(counter)
        while len(windows) >= WINDOWS_PER_SENDER_MAX:
            del windows[next(iter(windows))]
        windows[name] = window
        cipher = _sub_key(_PEER, key, self._cluster_id, run, secret)
        known[epoch] = _Told(run, secret, cipher, window, serial)
        return bool(others)

    def revoke(self, serials: frozenset[str]) -> None:
        """Forget what was told under these certificates. Told again under another, it opens."""
        for known in self._told.values():
            for epoch in [each for each, told in known.items() if told.serial in serials]:
                del known[epoch]

    def open(self, data: bytes) -> Frame:
        """The frame that ``data`` is, taken once. Raises :class:`FrameError` and nothing else."""
        head = sealed_head(data, self._cluster_id, Channel.PEER)
        told = self._told.get(head.sender, {}).get(head.epoch)
        if told is None:
            raise FrameError("epoch")
        if head.boot != told.boot or head.incarnation != told.incarnation:
            raise FrameError("tag")
        if not told.window.fresh(head.counter):
            raise FrameError("replay")
        frame = _opened(data, head, told.cipher)
        told.window.take(head.counter)
        return frame


# --- signatures -------------------------------------------------------------------------------


def _tip_words(cluster_id: bytes, voter: int, ballot: Ballot, slot: int, chain: bytes) -> bytes:
    if len(chain) != CHAIN_BYTES:
        return b""
    try:
        numbers = _TIP.pack(voter, ballot.era, ballot.round, ballot.voter, slot)
    except struct.error:
        return b""
    return b"".join((_TIP_PURPOSE, cluster_id, numbers, chain))


def _snapshot_words(cluster_id: bytes, voter: int, offer: SnapshotOffer) -> bytes:
    if len(offer.chain) != CHAIN_BYTES or len(offer.digest) != CHAIN_BYTES:
        return b""
    try:
        numbers = _SNAPSHOT.pack(voter, offer.slot, offer.size_bytes)
    except struct.error:
        return b""
    return b"".join((_SNAPSHOT_PURPOSE, cluster_id, numbers, offer.chain, offer.digest))


class Signer:
    """Signs as one voter. ``private`` are the KEY_BYTES of its Ed25519 key."""

    def __init__(self, private: bytes, cluster_id: bytes, voter: int) -> None:
        self.public, self._key = crypto_sign_seed_keypair(private)
        """``public`` are the KEY_BYTES by which others know it."""
        self._cluster_id = cluster_id
        self._voter = voter

    def tip(self, ballot: Ballot, slot: int, chain: bytes) -> bytes:
        """The signature of "``slot`` is fixed and its chain is ``chain``"; ``ballot`` names the
        leader."""
        return self._sign(_tip_words(self._cluster_id, self._voter, ballot, slot, chain))

    def signed_tip(self, slot: int, chain: bytes) -> SignedTip:
        """The same, whoever leads."""
        signature = self.tip(NO_BALLOT, slot, chain)
        return SignedTip(slot, chain, NO_BALLOT, self._voter, signature)

    def offer(self, offer: SnapshotOffer) -> SnapshotOffer:
        """``offer``, signed."""
        words = _snapshot_words(self._cluster_id, self._voter, offer)
        return replace(offer, signer=self._voter, signature=self._sign(words))

    def words(self, data: bytes) -> bytes:
        """The signature of anything else that a voter says of itself."""
        return self._sign(_words(self._cluster_id, self._voter, data))

    def _sign(self, words: bytes) -> bytes:
        return crypto_sign(words, self._key)[:SIGNATURE_BYTES]


def _words(cluster_id: bytes, voter: int, data: bytes) -> bytes:
    return b"".join((_WORDS_PURPOSE, cluster_id, voter.to_bytes(2, "big"), data))


class Verifier:
    """Knows the voters' public keys. The newest tip of each voter that was found good is not
    verified again: all datagrams of one flush carry the same."""

    def __init__(self, public: Mapping[int, bytes], cluster_id: bytes) -> None:
        self._keys: Final = dict(public)
        if any(len(key) != KEY_BYTES for key in self._keys.values()):
            raise ValueError(f"a public key has {KEY_BYTES} bytes")
        self._cluster_id = cluster_id
        self._good: dict[int, tuple[bytes, bytes]] = {}

    def tip(self, voter: int, ballot: Ballot, slot: int, chain: bytes, signature: bytes) -> bool:
        """Did ``voter`` sign this tip?"""
        words = _tip_words(self._cluster_id, voter, ballot, slot, chain)
        if not words:
            return False
        if self._good.get(voter) == (words, signature):
            return True
        if not self._verify(voter, signature, words):
            return False
        self._good[voter] = (words, signature)
        return True

    def offer(self, offer: SnapshotOffer) -> bool:
        """Did a voter sign this offer of a snapshot?"""
        words = _snapshot_words(self._cluster_id, offer.signer, offer)
        return bool(words) and self._verify(offer.signer, offer.signature, words)

    def words(self, voter: int, data: bytes, signature: bytes) -> bool:
        """Did ``voter`` say ``data``?"""
        return self._verify(voter, signature, _words(self._cluster_id, voter, data))

    def _verify(self, voter: int, signature: bytes, words: bytes) -> bool:
        key = self._keys.get(voter)
        if key is None or len(signature) != SIGNATURE_BYTES:
            return False
        try:
            crypto_sign_open(signature + words, key)
        except BadSignatureError:
            return False
        return True
