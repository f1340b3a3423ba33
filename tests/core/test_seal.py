"""Seals and signatures: what was not sealed or signed so is not taken, and never twice."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from msgspec.structs import replace

from trex_core import wire
from trex_core.messages import DATAGRAM_BYTES_MAX, NO_BALLOT, Ballot, SnapshotOffer
from trex_core.seal import (
    KEY_BYTES,
    KEYS_MAX,
    SUB_KEYS_MAX,
    WINDOW_DATAGRAMS,
    WINDOWS_PER_SENDER_MAX,
    Key,
    KeyRing,
    PeerOpener,
    ReplayWindow,
    Sealer,
    Signer,
    StreamOpener,
    Verifier,
)
from trex_core.wire import Channel, FrameError, Identity

CLUSTER, OTHER_CLUSTER = b"cluster-cluster!", b"cluster-another!"
ONE = Key(1, b"1" * KEY_BYTES)
TWO = Key(2, b"2" * KEY_BYTES)
SECRET, LATER_SECRET = b"s" * KEY_BYTES, b"t" * KEY_BYTES
VOTER = Identity(CLUSTER, 3, 77, 5)
LISTENER = Identity(CLUSTER, 0, 1234567, 0)


def stream_pair(ring=None, identity=VOTER):
    ring = ring or KeyRing((ONE,))
    return Sealer(Channel.STREAM, identity, ring.first, b"salt"), StreamOpener(CLUSTER, ring)


def peer_pair(identity=VOTER, secret=SECRET):
    sealer = Sealer(Channel.PEER, identity, ONE, secret)
    opener = PeerOpener(CLUSTER, KeyRing((ONE,)))
    opener.told(identity, 1, secret, sealer.counter)
    return sealer, opener


@pytest.mark.parametrize("pair", [stream_pair, peer_pair])
@pytest.mark.parametrize("size", [0, 1, 1320, 1321, 10_000])
def test_what_is_sealed_opens_in_datagrams_that_fit(pair, size):
    sealer, opener = pair()
    body = random.Random(size).randbytes(size)
    together, got = wire.Reassembler(), None
    for data in sealer.datagrams(body):
        assert len(data) <= DATAGRAM_BYTES_MAX
        got = together.add(opener.open(data))
    assert got == body


@pytest.mark.parametrize("pair", [stream_pair, peer_pair])
def test_nothing_of_the_body_can_be_read(pair):
    sealer, _ = pair()
    body = b"who owns what in this ring"
    (data,) = sealer.datagrams(body)
    assert not any(body[at : at + 4] in data for at in range(len(body) - 4))


@pytest.mark.parametrize("pair", [stream_pair, peer_pair])
def test_every_flipped_bit_and_every_cut_is_refused(pair):
    sealer, opener = pair()
    (data,) = sealer.datagrams(b"body")
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            opener.open(bytes(bad))
    for length in range(len(data)):
        with pytest.raises(FrameError):
            opener.open(data[:length])
    with pytest.raises(FrameError, match="length"):
        opener.open(data + b"x")
    assert opener.open(data).body == b"body", "what was refused left nothing behind"


def test_what_is_longer_than_a_datagram_may_be_is_refused_though_its_seal_is_right(monkeypatch):
    sealer, opener = stream_pair()
    size = wire.DATAGRAM_BODY_BYTES_MAX
    (longest,) = sealer.datagrams(bytes(size))
    monkeypatch.setattr("trex_core.seal.DATAGRAM_BODY_BYTES_MAX", size + 1)
    (longer,) = sealer.datagrams(bytes(size + 1))
    assert (len(longest), len(longer)) == (DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MAX + 1)
    assert opener.open(longest).body == bytes(size)
    with pytest.raises(FrameError, match="length"):
        opener.open(longer)


def test_the_other_channel_the_other_cluster_and_the_other_key_do_not_open_it():
    stream, _ = stream_pair()
    peer, opener = peer_pair()
    (said,), (whispered,) = stream.datagrams(b"a"), peer.datagrams(b"b")
    for data, where, reason in (
        (said, opener, "channel"),
        (whispered, StreamOpener(CLUSTER, KeyRing((ONE,))), "channel"),
        (said, StreamOpener(OTHER_CLUSTER, KeyRing((ONE,))), "cluster"),
        (said, StreamOpener(CLUSTER, KeyRing((Key(1, b"x" * KEY_BYTES),))), "tag"),
        (said, StreamOpener(CLUSTER, KeyRing((TWO,))), "epoch"),
        (whispered, PeerOpener(CLUSTER, KeyRing((ONE,))), "epoch"),
    ):
        with pytest.raises(FrameError, match=reason):
            where.open(data)


def test_a_frame_of_another_cluster_with_our_id_written_over_it_does_not_open():
    theirs = Sealer(Channel.STREAM, Identity(OTHER_CLUSTER, 3, 77, 5), ONE, b"salt")
    (data,) = theirs.datagrams(b"a")
    with pytest.raises(FrameError, match="tag"):
        StreamOpener(CLUSTER, KeyRing((ONE,))).open(data.replace(OTHER_CLUSTER, CLUSTER))


def test_the_stream_key_does_not_make_a_voter_although_the_secrets_were_equal():
    """Sub-keys are separate by purpose: whoever holds one key twice by mistake mixes nothing up."""
    stream, _ = stream_pair()
    _, opener = peer_pair()
    (data,) = stream.datagrams(b"a")
    forged = bytearray(data)
    forged[3] = Channel.PEER
    with pytest.raises(FrameError, match="tag"):
        opener.open(bytes(forged))
    # Everything the same but the purpose: the same number under the same cipher would tell both.
    zeros = bytes(64)
    said = {
        Sealer(channel, VOTER, ONE, SECRET).datagrams(zeros)[0][80:]
        for channel in (Channel.PEER, Channel.STREAM)
    }
    assert len(said) == 2


def test_plain_frames_do_not_pass_as_sealed_nor_sealed_ones_as_plain():
    sealer, opener = stream_pair()
    plain = wire.frame(VOTER, Channel.STREAM, b"body")
    with pytest.raises(FrameError, match="sealed"):
        opener.open(plain)
    (data,) = sealer.datagrams(b"body")
    with pytest.raises(FrameError):
        wire.unframe(data, CLUSTER, Channel.STREAM)


@given(some.binary(max_size=200), some.integers(0, 99))
@settings(max_examples=500, deadline=None)
def test_random_bytes_raise_nothing_but_frame_error(tail, seed):
    rnd = random.Random(seed)
    sealer, opener = peer_pair()
    whole = bytearray(sealer.datagrams(b"some body")[0])
    for _ in range(rnd.randrange(1, 6)):
        whole[rnd.randrange(len(whole))] = rnd.randrange(256)
    for data in (tail, bytes(whole[:80]) + tail, bytes(whole)):
        with contextlib.suppress(FrameError):
            opener.open(data)
        with contextlib.suppress(FrameError):
            StreamOpener(CLUSTER, KeyRing((ONE,))).open(data)


# --- replay -----------------------------------------------------------------------------------


def test_a_datagram_between_voters_is_taken_once():
    sealer, opener = peer_pair()
    data = [sealer.datagrams(bytes([n]))[0] for n in range(50)]
    order = list(range(50))
    random.Random(1).shuffle(order)
    assert [opener.open(data[n]).body for n in order] == [bytes([n]) for n in order]
    for each in data:
        with pytest.raises(FrameError, match="replay"):
            opener.open(each)


def test_a_recording_does_not_open_at_a_voter_that_restarted():
    sealer, before = peer_pair()
    recorded = [sealer.datagrams(bytes([n]))[0] for n in range(20)]
    assert before.open(recorded[0]).body == b"\0"
    after = PeerOpener(CLUSTER, KeyRing((ONE,)))
    with pytest.raises(FrameError, match="epoch"):
        after.open(recorded[5])
    after.told(VOTER, 1, SECRET, sealer.counter)
    for data in recorded:
        with pytest.raises(FrameError, match="replay"):
            after.open(data)
    assert after.open(sealer.datagrams(b"new")[0]).body == b"new"


@pytest.mark.parametrize("boot", [5, 6], ids=["disk rolled back", "next boot"])
def test_a_recording_of_a_voters_earlier_run_does_not_open(boot):
    old, opener = peer_pair()
    recorded = [old.datagrams(bytes([n]))[0] for n in range(20)]
    again = Identity(CLUSTER, 3, 77, boot)
    new = Sealer(Channel.PEER, again, ONE, LATER_SECRET)
    opener.told(again, 1, LATER_SECRET, new.counter)
    for data in recorded:
        with pytest.raises(FrameError, match="tag"):
            opener.open(data)
    assert opener.open(new.datagrams(b"new")[0]).body == b"new"


def test_told_again_over_a_new_connection_the_window_goes_on():
    sealer, opener = peer_pair()
    flying, taken = sealer.datagrams(b"a")[0], sealer.datagrams(b"b")[0]
    opener.open(taken)
    opener.told(VOTER, 1, SECRET, sealer.counter)
    assert opener.open(flying).body == b"a"
    with pytest.raises(FrameError, match="replay"):
        opener.open(taken)


def test_a_greeting_of_an_earlier_boot_that_was_held_back_brings_nothing_back():
    old, opener = peer_pair()
    recorded = [old.datagrams(bytes([n]))[0] for n in range(5)]
    assert opener.open(recorded[0]).body == b"\0"
    later = Identity(CLUSTER, 3, 77, 6)
    new = Sealer(Channel.PEER, later, ONE, LATER_SECRET)
    assert opener.told(later, 1, LATER_SECRET, 1), "it ends the earlier run"
    with pytest.raises(FrameError, match="replay"):
        opener.told(VOTER, 1, SECRET, 1)
    for data in recorded:
        with pytest.raises(FrameError, match="tag"):
            opener.open(data)
    assert opener.open(new.datagrams(b"alive")[0]).body == b"alive"
    assert not opener.told(later, 1, LATER_SECRET, 1), "its next connection ends nothing"
    opener.use(KeyRing((TWO,)))  # nor when nothing of the later one is open any more
    with pytest.raises(FrameError, match="replay"):
        opener.told(VOTER, 2, SECRET, 1)


@pytest.mark.parametrize("between", ["rolled back", "another epoch", "another ring", "revoked"])
def test_what_was_taken_stays_taken_whatever_is_told_in_between(between):
    three = Key(3, b"3" * KEY_BYTES)
    sealer = Sealer(Channel.PEER, VOTER, ONE, SECRET)
    opener = PeerOpener(CLUSTER, KeyRing((ONE, TWO, three)))
    opener.told(VOTER, 1, SECRET, 1, "a serial")
    taken, flying = sealer.datagrams(b"a")[0], sealer.datagrams(b"b")[0]
    opener.open(taken)
    if between == "rolled back":  # a start with the same boot
        opener.told(VOTER, 1, LATER_SECRET, 1)
    elif between == "another epoch":
        opener.told(VOTER, 2, SECRET, 1)
        opener.told(VOTER, 3, SECRET, 1)
    elif between == "another ring":
        opener.use(KeyRing((TWO,)))
        opener.use(KeyRing((ONE,)))
    else:
        opener.revoke(frozenset({"a serial"}))
    with pytest.raises(FrameError):
        opener.open(flying)
    opener.told(VOTER, 1, SECRET, 1)
    with pytest.raises(FrameError, match="replay"):
        opener.open(taken)
    assert opener.open(flying).body == b"b"


def test_windows_of_runs_of_old_are_forgotten():
    opener = PeerOpener(CLUSTER, KeyRing((ONE,)))
    for boot in range(1, 3 * WINDOWS_PER_SENDER_MAX):
        opener.told(Identity(CLUSTER, 3, 77, boot), 1, SECRET, 1)
    assert len(opener._windows[3]) == WINDOWS_PER_SENDER_MAX
    assert len(opener._told[3]) == 1


def test_of_a_revoked_certificate_nothing_opens_until_it_is_told_under_another():
    sealer, opener = Sealer(Channel.PEER, VOTER, ONE, SECRET), PeerOpener(CLUSTER, KeyRing((ONE,)))
    opener.told(VOTER, 1, SECRET, 1, "old")
    opener.revoke(frozenset({"of another"}))
    assert opener.open(sealer.datagrams(b"a")[0]).body == b"a"
    opener.told(VOTER, 1, SECRET, 1, "new")
    opener.revoke(frozenset({"old"}))
    assert opener.open(sealer.datagrams(b"b")[0]).body == b"b", "it was renewed before"
    opener.revoke(frozenset({"old", "new"}))
    with pytest.raises(FrameError, match="epoch"):
        opener.open(sealer.datagrams(b"c")[0])


def test_with_a_new_secret_the_numbers_go_on_and_the_old_one_opens_nothing():
    sealer, opener = peer_pair()
    assert opener.open(sealer.datagrams(b"a")[0]).body == b"a"
    sealer.use(ONE, LATER_SECRET)
    (data,) = sealer.datagrams(b"b")
    with pytest.raises(FrameError, match="tag"):
        opener.open(data)
    opener.told(VOTER, 1, LATER_SECRET, sealer.counter - 1)
    assert opener.open(data).body == b"b"


def test_a_forged_number_moves_no_window():
    sealer, opener = peer_pair()
    (data,) = sealer.datagrams(b"a")
    far = bytearray(data)
    far[44:52] = (1 << 60).to_bytes(8, "big")
    with pytest.raises(FrameError, match="tag"):
        opener.open(bytes(far))
    assert opener.open(data).body == b"a"


@dataclass
class Twin:
    """The window as a set: slow and plain."""

    floor: int
    top: int = 0
    taken: set[int] = field(default_factory=set)

    def fresh(self, number):
        old = number <= self.top - WINDOW_DATAGRAMS
        return number >= self.floor and not old and number not in self.taken


@given(
    some.integers(1, 10_000),
    some.lists(
        some.one_of(some.integers(-5, 40), some.integers(-5000, 9000), some.integers(0, 1 << 62)),
        max_size=60,
    ),
)
@settings(max_examples=400, deadline=None)
def test_the_window_is_as_a_set_would_have_it(floor, steps):
    window, twin = ReplayWindow(floor), Twin(floor, floor - 1)
    for step in steps:
        number = twin.top + step if step < 1 << 40 else step
        if number < 1:
            continue
        assert window.fresh(number) == twin.fresh(number)
        if window.fresh(number):
            window.take(number)
            twin.taken.add(number)
            twin.top = max(twin.top, number)


def test_a_number_too_far_behind_counts_as_replayed_though_it_was_never_taken():
    window = ReplayWindow(1)
    top = 3 * WINDOW_DATAGRAMS
    window.take(top)
    assert window.fresh(top - WINDOW_DATAGRAMS + 1)
    for number in (top - WINDOW_DATAGRAMS, top - WINDOW_DATAGRAMS - 1, 1):
        assert not window.fresh(number)


@pytest.mark.parametrize(
    ("secret", "counter", "epoch", "reason"),
    [(b"short", 1, 1, "body"), (SECRET, 0, 1, "body"), (SECRET, 1, 9, "epoch")],
)
def test_what_a_voter_tells_must_make_sense(secret, counter, epoch, reason):
    opener = PeerOpener(CLUSTER, KeyRing((ONE,)))
    with pytest.raises(FrameError, match=reason):
        opener.told(VOTER, epoch, secret, counter)


# --- rotation ---------------------------------------------------------------------------------


def test_of_the_epochs_a_voter_told_the_newest_two_open():
    keys = tuple(Key(epoch, bytes([epoch]) * KEY_BYTES) for epoch in (1, 2, 3))
    opener = PeerOpener(CLUSTER, KeyRing(keys))
    sealers = [Sealer(Channel.PEER, VOTER, key, SECRET) for key in keys]
    for key, sealer in zip(keys, sealers, strict=True):
        opener.told(VOTER, key.epoch, SECRET, sealer.counter)
    said = [sealer.datagrams(b"hello")[0] for sealer in sealers]
    assert [opener.open(data).body for data in said[1:]] == [b"hello", b"hello"]
    with pytest.raises(FrameError):
        opener.open(said[0])


def test_the_stream_key_rotates_without_a_datagram_lost():
    """Added everywhere, then put first everywhere, then the old one taken away: in any order of
    nodes within a step, each opens what each seals."""
    rings = [KeyRing((ONE,)), KeyRing((ONE, TWO)), KeyRing((TWO, ONE)), KeyRing((TWO,))]
    for before, after in itertools.pairwise(rings):
        sealer, opener = stream_pair(before)
        for theirs in (before, after):
            sealer.use(theirs.first)
            for ours in (before, after, before):
                opener.use(ours)
                assert opener.open(sealer.datagrams(b"a")[0]).body == b"a"


def test_the_voter_key_rotates_and_the_old_one_opens_no_more():
    sealer, opener = peer_pair()
    early = sealer.datagrams(b"early")[0]
    opener.use(KeyRing((ONE, TWO)))
    opener.told(VOTER, 2, SECRET, sealer.counter)
    sealer.use(TWO)
    assert opener.open(sealer.datagrams(b"a")[0]).body == b"a"
    assert opener.open(early).body == b"early", "in flight while it rotated"
    opener.use(KeyRing((TWO,)))
    with pytest.raises(FrameError, match="epoch"):
        opener.open(early)
    assert opener.open(sealer.datagrams(b"b")[0]).body == b"b"


def test_the_stream_key_rotates_and_the_old_one_opens_no_more():
    """Not even for a sender that was heard under it, whose sub-key is remembered."""
    sealer, opener = stream_pair()
    early = [sealer.datagrams(b"early")[0] for _ in range(2)]
    assert opener.open(early[0]).body == b"early"
    opener.use(KeyRing((TWO,)))
    for data in early:
        with pytest.raises(FrameError, match="epoch"):
            opener.open(data)


def test_a_voter_that_restarted_while_the_key_rotates_is_heard_in_its_last_run_only():
    """Its earlier run sealed under the key before, its last one under the next: both are in the
    ring, and the earlier run is over all the same."""
    old = Sealer(Channel.PEER, VOTER, ONE, SECRET)
    opener = PeerOpener(CLUSTER, KeyRing((ONE, TWO)))
    opener.told(VOTER, 1, SECRET, old.counter)
    recorded = [old.datagrams(b"early")[0] for _ in range(2)]
    assert opener.open(recorded[0]).body == b"early"
    again = Identity(CLUSTER, 3, 77, 6)
    new = Sealer(Channel.PEER, again, TWO, LATER_SECRET)
    opener.told(again, 2, LATER_SECRET, new.counter)
    with pytest.raises(FrameError, match="epoch"):
        opener.open(recorded[1])
    assert opener.open(new.datagrams(b"new")[0]).body == b"new"


@pytest.mark.parametrize("keys", [(), (ONE, Key(1, b"y" * KEY_BYTES)), (ONE, TWO) * KEYS_MAX])
def test_a_ring_that_is_none_is_refused(keys):
    with pytest.raises(ValueError, match="key ring"):
        KeyRing(keys)


def test_keys_are_never_shown():
    ring = KeyRing((ONE, TWO))
    for text in (repr(ring), str(ring), f"{ONE}", repr([ONE])):
        assert "111" not in text
        assert "222" not in text
        assert "epoch=1" in text


# --- strangers --------------------------------------------------------------------------------


def test_strangers_push_out_nothing_and_cost_no_memory():
    sealer, opener = stream_pair()
    opener.open(sealer.datagrams(b"a")[0])
    for number in range(2 * SUB_KEYS_MAX):
        stranger = Sealer(Channel.STREAM, Identity(CLUSTER, 3, number, 5), TWO, b"salt")
        data = bytearray(stranger.datagrams(b"x")[0])
        data[22:24] = (1).to_bytes(2, "big")
        with pytest.raises(FrameError, match="tag"):
            opener.open(bytes(data))
    assert len(opener._ciphers) == 1


def test_more_holders_of_the_key_than_are_remembered_are_all_heard():
    _, opener = stream_pair()
    for number in range(SUB_KEYS_MAX + 50):
        sealer = Sealer(Channel.STREAM, Identity(CLUSTER, 0, number, 0), ONE, b"salt")
        assert opener.open(sealer.datagrams(b"x")[0]).body == b"x"
    assert len(opener._ciphers) == SUB_KEYS_MAX


def test_no_two_runs_share_a_sub_key():
    """The same number, another run: were the sub-key the same, the nonce would be used twice."""
    runs = [
        (Identity(CLUSTER, 3, 77, 5), ONE, b"salt"),
        (Identity(CLUSTER, 3, 77, 5), ONE, b"tlas"),
        (Identity(CLUSTER, 3, 77, 6), ONE, b"salt"),
        (Identity(CLUSTER, 3, 78, 5), ONE, b"salt"),
        (Identity(CLUSTER, 4, 77, 5), ONE, b"salt"),
        (Identity(CLUSTER, 3, 77, 5), Key(1, b"z" * KEY_BYTES), b"salt"),
        (Identity(OTHER_CLUSTER, 3, 77, 5), ONE, b"salt"),
    ]
    zeros = bytes(64)
    streams = {
        Sealer(Channel.STREAM, who, key, salt).datagrams(zeros)[0][80:] for who, key, salt in runs
    }
    assert len(streams) == len(runs)


# --- signatures -------------------------------------------------------------------------------

BALLOT, CHAIN = Ballot(0, 17, 3), b"c" * 32
SIGNER = Signer(b"p" * KEY_BYTES, CLUSTER, 3)
OTHER = Signer(b"q" * KEY_BYTES, CLUSTER, 4)
PUBLIC = {3: SIGNER.public, 4: OTHER.public}


def test_a_tip_is_taken_from_who_signed_it_and_as_it_was_signed():
    known = Verifier(PUBLIC, CLUSTER)
    signature = SIGNER.tip(BALLOT, 9, CHAIN)
    for _ in range(2):  # the second time from memory
        assert known.tip(3, BALLOT, 9, CHAIN, signature)
        assert not known.tip(4, BALLOT, 9, CHAIN, signature)
        assert not known.tip(5, BALLOT, 9, CHAIN, signature)
        assert not known.tip(3, Ballot(0, 17, 4), 9, CHAIN, signature)
        assert not known.tip(3, Ballot(1, 17, 3), 9, CHAIN, signature)
        assert not known.tip(3, BALLOT, 10, CHAIN, signature)
        assert not known.tip(3, BALLOT, 9, b"d" * 32, signature)
        assert not known.tip(3, BALLOT, 9, CHAIN, OTHER.tip(BALLOT, 9, CHAIN))
        assert not Verifier(PUBLIC, OTHER_CLUSTER).tip(3, BALLOT, 9, CHAIN, signature)


@pytest.mark.parametrize(
    ("ballot", "slot", "chain", "signature"),
    [
        (Ballot(0, -1, 3), 9, CHAIN, bytes(64)),
        (BALLOT, -1, CHAIN, bytes(64)),
        (BALLOT, 1 << 64, CHAIN, bytes(64)),
        (BALLOT, 9, b"", bytes(64)),
        (BALLOT, 9, CHAIN + b"x", bytes(64)),
        (BALLOT, 9, CHAIN, b""),
        (BALLOT, 9, CHAIN, bytes(65)),
    ],
)
def test_nonsense_is_no_tip(ballot, slot, chain, signature):
    assert not Verifier(PUBLIC, CLUSTER).tip(3, ballot, slot, chain, signature)


def test_every_flipped_bit_of_a_signature_is_refused():
    known = Verifier(PUBLIC, CLUSTER)
    signature = SIGNER.tip(BALLOT, 9, CHAIN)
    for bit in range(8 * len(signature)):
        bad = bytearray(signature)
        bad[bit // 8] ^= 1 << bit % 8
        assert not known.tip(3, BALLOT, 9, CHAIN, bytes(bad))


def test_words_are_no_tip_and_a_tip_no_words():
    known = Verifier(PUBLIC, CLUSTER)
    signature = SIGNER.words(b"I lead")
    assert known.words(3, b"I lead", signature)
    assert not known.words(3, b"I follow", signature)
    assert not known.words(4, b"I lead", signature)
    assert not known.tip(3, BALLOT, 9, CHAIN, signature)


def test_an_offer_of_a_snapshot_is_signed_whole():
    signer = Signer(bytes(range(32)), CLUSTER, 3)
    verifier = Verifier({3: signer.public, 4: Signer(bytes(32), CLUSTER, 4).public}, CLUSTER)
    offer = signer.offer(SnapshotOffer(7, b"c" * 32, 100, b"d" * 32))
    assert verifier.offer(offer)
    for wrong in (
        replace(offer, slot=8),
        replace(offer, chain=b"e" * 32),
        replace(offer, size_bytes=101),
        replace(offer, digest=b"e" * 32),
        replace(offer, signer=4),
        replace(offer, signer=9),
        replace(offer, signature=bytes(64)),
        replace(offer, chain=b"short"),
        replace(offer, digest=b""),
        replace(offer, slot=-1),
    ):
        assert not verifier.offer(wrong), wrong


def test_a_tip_signed_for_catch_up_names_no_leader():
    signer = Signer(bytes(range(32)), CLUSTER, 3)
    tip = signer.signed_tip(7, b"c" * 32)
    assert (tip.voter, tip.ballot) == (3, NO_BALLOT)
    assert Verifier({3: signer.public}, CLUSTER).tip(3, NO_BALLOT, 7, b"c" * 32, tip.signature)


def test_what_is_signed_for_one_purpose_is_nothing_for_another():
    """Words are any bytes: also those that a tip or an offer is made of."""
    known = Verifier(PUBLIC, CLUSTER)
    as_tip = struct.pack(">QQQQ", BALLOT.era, BALLOT.round, BALLOT.voter, 9) + CHAIN
    assert not known.tip(3, BALLOT, 9, CHAIN, SIGNER.words(as_tip))
    assert not known.words(3, as_tip, SIGNER.tip(BALLOT, 9, CHAIN))
    offer = SIGNER.offer(SnapshotOffer(9, CHAIN, 70, b"d" * 32))
    as_offer = struct.pack(">QQ", 9, 70) + CHAIN + b"d" * 32
    assert known.offer(offer)
    assert not known.offer(replace(offer, signature=SIGNER.words(as_offer)))
    assert not known.words(3, as_offer, offer.signature)


def test_keys_of_another_length_are_none():
    with pytest.raises(ValueError, match="32 bytes"):
        Verifier({1: bytes(31)}, CLUSTER)
    with pytest.raises(ValueError, match="seed"):
        Signer(bytes(31), CLUSTER, 1)
