"""What is proven by a signed tip: everything it covers, in any order, and nothing a forger says."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from trex_core import proof
from trex_core.messages import NO_BALLOT, StreamRun, StreamTip, VoterDigest
from trex_core.proof import ContradictionError, Proof, tip_of
from trex_core.state import FixedRun, chain_run, chain_start

VALUES = tuple(b"\x97value %d" % slot for slot in range(1, 101))
CHAINS = (chain_start(bytes(16)), *chain_run(chain_start(bytes(16)), 1, VALUES))
DIGEST = VoterDigest("leader", NO_BALLOT, 0, 0, 0, 0, 0, 0, "test")


def signature(voter, slot, chain):
    return b"%d signed %d " % (voter, slot) + chain


class Believer:
    """A proof whose signatures anybody can check by eye."""

    def __init__(self):
        self.counted = Counter()
        self.verified = 0
        self.proof = Proof(self.verify, lambda name: self.counted.update([name]))

    def verify(self, voter, _ballot, slot, chain, given):
        self.verified += 1
        return given == signature(voter, slot, chain)

    def hear(self, *runs, tips=()):
        for slot in tips:
            assert self.proof.tip(tip_of(tip(slot)))
        anchors = [(slot, CHAINS[slot]) for slot in tips]
        return self.proof.proven([(1, run) for run in runs], anchors)


def tip(slot, voter=1, chain=None):
    chain = CHAINS[slot] if chain is None else chain
    return StreamTip(NO_BALLOT, True, slot, chain, DIGEST, voter, signature(voter, slot, chain))


def run(first, last, tip_slot=None, *, chain_before=None, values=None):
    tip_slot = last if tip_slot is None else tip_slot
    before = CHAINS[first - 1] if chain_before is None else chain_before
    signed = signature(1, tip_slot, CHAINS[tip_slot])
    said = VALUES[first - 1 : last] if values is None else values
    return StreamRun(NO_BALLOT, first, before, said, tip_slot, CHAINS[tip_slot], False, 1, signed)


def slots(believed):
    found = {}
    for _, each in believed:
        found |= dict(enumerate(each.values, each.first))
        after = chain_run(each.chain_before, each.first, each.values)
        assert each.chain_before == CHAINS[each.first - 1]
        assert after[-1] == CHAINS[each.first + len(each.values) - 1]
        assert each.tip_slot >= each.first + len(each.values) - 1
        assert each.tip_chain == CHAINS[each.tip_slot], "a tip that was verified"
    return found


def test_nothing_is_believed_before_a_tip_covers_it():
    one = Believer()
    assert one.hear(run(1, 5)) == []
    assert slots(one.hear(tips=[5])) == dict(enumerate(VALUES[:5], 1))


def test_a_tip_proves_backwards_through_every_datagram():
    one = Believer()
    assert one.hear(run(1, 3, 9), run(4, 6, 9)) == []
    believed = one.hear(run(7, 9, 9), tips=[9])
    assert [each.first for _, each in believed] == [1, 4, 7]
    assert one.verified == 1, "one signature for all of it"


def test_what_is_above_the_tip_waits_for_the_next_one():
    one = Believer()
    believed = one.hear(run(1, 10, 10), tips=[4])
    assert sorted(slots(believed)) == [1, 2, 3, 4]
    assert sorted(slots(one.hear(tips=[10]))) == [5, 6, 7, 8, 9, 10]


def test_a_hole_stops_the_proof_and_its_repair_goes_on_with_it():
    one = Believer()
    assert sorted(slots(one.hear(run(1, 3, 9), run(7, 9), tips=[9]))) == [7, 8, 9]
    assert sorted(slots(one.hear(run(4, 6, 9)))) == [1, 2, 3, 4, 5, 6]
    other = Believer()
    other.hear(run(7, 9), tips=[9])
    assert sorted(slots(other.hear(run(2, 6, 9)))) == [2, 3, 4, 5, 6], "cut in another way"


@pytest.mark.parametrize("seed", range(200))
def test_in_any_order_cut_in_any_way_among_forgeries(seed):
    draw = random.Random(seed)
    genuine = []
    for _ in range(3):  # the stream, and repairs cut otherwise
        first = 1
        while first <= 60:
            last = min(60, first + draw.randrange(1, 9))
            genuine.append(run(first, last, 60))
            first = last + 1
    forged = []
    for _ in range(draw.randrange(60)):
        first = draw.randrange(1, 70)
        values = tuple(draw.randbytes(4) for _ in range(draw.randrange(1, 9)))
        before = draw.choice([CHAINS[first - 1], draw.randbytes(32)])
        forged.append(run(first, 100, 100, chain_before=before, values=values))
    everything = genuine + forged
    draw.shuffle(everything)
    one, found = Believer(), {}
    while everything:
        batch = [everything.pop() for _ in range(min(len(everything), draw.randrange(1, 9)))]
        tips = [draw.randrange(1, 61)] if draw.random() < 0.3 else []
        found |= slots(one.hear(*batch, tips=tips))
    found |= slots(one.hear(tips=[60]))
    assert found == dict(enumerate(VALUES[:60], 1))


def heard_one(one, heard, *, alone):
    """What a follower believes of one datagram; ``alone``: by the short way, where there is one."""
    if alone and (found := one.proof.alone(1, heard)) is not None:
        return found
    found = one.proof.proven([(1, heard)], [])
    if one.proof.waits(heard) and one.proof.tip(tip_of(heard)):
        found += one.proof.proven([], [(heard.tip_slot, heard.tip_chain)])
    return found


def _delivered(one, believed, slot):
    """Deliver what continues slot ``slot``, as a follower does."""
    for _, each in sorted(believed, key=lambda item: item[1].first):
        if each.first == slot + 1:
            values = each.values
            chains = chain_run(each.chain_before, each.first, values)
            one.proof.delivered(FixedRun(each.first, values, each.chain_before, chains))
            slot += len(values)
    one.proof.done(slot)
    return slot


@pytest.mark.parametrize("seed", range(300))
def test_a_datagram_alone_is_believed_as_any_other(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(proof, "ANCHORS_MAX", draw.choice((3, 100)))
    short, long = Believer(), Believer()
    reached = {short: 0, long: 0}
    kinds = Counter()
    first = 1
    while first <= 90:
        last = first + draw.choice((0, 0, 0, 1, 2, 5))
        ends = last if draw.random() < 0.8 else min(100, last + draw.randrange(4))
        heard = run(first, last, ends)
        kind = draw.choice(("genuine",) * 12 + ("lost", "again", "signature", "values", "before"))
        match kind:
            case "signature":
                heard = replace(heard, signature=b"forged")
            case "values":
                heard = replace(heard, values=tuple(b"other" for _ in heard.values))
            case "before":
                heard = replace(heard, chain_before=draw.randbytes(32))
            case "again":
                again = draw.randrange(1, first + 1)
                heard = run(again, again + draw.randrange(3))
        contradicting = seed % 10 == 0 and first > 60
        if contradicting:  # voters signed two things, or one disk lies
            said = (b"evil %d" % first,)
            chain = chain_run(CHAINS[first - 2], first - 1, (b"evil", *said))[0]
            after = chain_run(chain, first, said)[0]
            heard = StreamRun(
                NO_BALLOT, first, chain, said, first, after, False, 1, signature(1, first, after)
            )
        if kind != "lost":
            outcome = []
            for one in (short, long):
                try:
                    found = heard_one(one, heard, alone=one is short)
                    reached[one] = _delivered(one, found, reached[one])
                    outcome.append((found, one.proof._anchors, set(one.proof._waiting)))
                except ContradictionError as error:
                    outcome.append((error.slot, error.chains))
            assert outcome[0] == outcome[1], (kind, first)
            assert short.counted == long.counted
            assert reached[short] == reached[long]
            kinds[kind] += 1
            if contradicting:
                return
        if kind == "genuine" or draw.random() < 0.5:
            first = last + 1
    assert kinds["genuine"] > 5
    assert short.verified <= long.verified


def test_a_forged_tip_proves_nothing():
    one = Believer()
    evil = b"e" * 32
    said = StreamTip(NO_BALLOT, True, 9, evil, DIGEST, 1, b"9 signed it, really")
    assert not one.proof.tip(tip_of(said))
    assert not one.proof.tip(tip_of(replace(tip(9), signer=2)))
    assert one.counted == {"dropped_signature": 2}


@pytest.mark.parametrize("voter", [1, 2])
def test_tips_that_contradict_are_evidence(voter):
    one = Believer()
    evil = b"e" * 32
    assert one.proof.tip(tip_of(tip(9)))
    assert one.proof.tip(tip_of(tip(9, 3))), "another voter's of the same chain is none"
    with pytest.raises(ContradictionError, match="slot 9") as caught:
        one.proof.tip(tip_of(tip(9, voter, evil)))
    assert {each.chain for each in caught.value.tips} == {CHAINS[9], evil}
    assert all(each.signature == signature(each.voter, 9, each.chain) for each in caught.value.tips)


def test_a_tip_once_verified_is_not_verified_again():
    one = Believer()
    for _ in range(10):
        assert one.proof.tip(tip_of(tip(9)))
    assert one.verified == 1


def test_what_waits_is_bounded_in_slots_and_bytes(monkeypatch):
    monkeypatch.setattr(proof, "PENDING_SLOTS_MAX", 50)
    monkeypatch.setattr(proof, "PENDING_BYTES_MAX", 10_000)
    one = Believer()
    for number in range(100):
        one.hear(run(5, 100, 100, values=(b"%d" % number,) * 10))
    assert one.proof._slots <= 50 and one.counted["dropped_unproven"] == 95
    one.hear(run(5, 100, 100, values=(bytes(9_000),)))
    one.hear(run(6, 100, 100, values=(bytes(9_000),)))
    assert one.proof._bytes <= 10_000
    assert sorted(slots(one.hear(run(1, 5), tips=[5]))) == [1, 2, 3, 4, 5]


def test_memory_of_tips_and_anchors_is_bounded(monkeypatch):
    monkeypatch.setattr(proof, "TIPS_MAX", 5)
    monkeypatch.setattr(proof, "ANCHORS_MAX", 7)
    one = Believer()
    for slot in range(1, 101):
        one.hear(run(slot, slot), tips=[slot])
    assert len(one.proof._tips) <= 5 and len(one.proof._anchors) <= 7


def test_what_was_proven_on_the_way_may_be_forgotten_on_the_way(monkeypatch):
    monkeypatch.setattr(proof, "ANCHORS_MAX", 1)
    one = Believer()
    waiting = run(10, 12)
    assert sorted(slots(one.hear(run(1, 5), run(6, 9), waiting, tips=[5, 9]))) == list(range(1, 10))
    assert one.proof.waits(waiting) and not one.proof.waits(run(6, 9))


def test_what_was_delivered_needs_no_proof():
    one = Believer()
    one.hear(run(1, 5), run(6, 9))
    one.proof.done(5)
    assert one.hear(run(2, 4)) == []
    assert one.counted == {"duplicate": 1}
    assert sorted(slots(one.hear(tips=[9]))) == [6, 7, 8, 9]


@pytest.mark.parametrize("others", [0, 3])
def test_what_waits_under_a_bad_tip_is_proven_by_the_same_under_a_good_one(others):
    """Who tells a run again beside the voter must not have the voter's own pass for a repeat."""
    one = Believer()
    one.hear(run(40, 41))
    forged = replace(run(1, 5), signature=b"forged")
    same = [run(1, 5, values=(b"%d" % each, *VALUES[1:5])) for each in range(others)]
    for each in (forged, *same):
        assert heard_one(one, replace(each, signature=b"forged"), alone=True) == []
    assert slots(heard_one(one, run(1, 5), alone=True)) == dict(enumerate(VALUES[:5], 1))
    assert not one.proof.waits(run(1, 5))
    assert one.counted["dropped_forged"] == others


def test_what_waits_of_a_run_that_a_tip_within_it_proved_in_part_is_proven_by_its_own():
    one = Believer()
    one.hear(tips=[4])
    assert slots(heard_one(one, run(1, 10), alone=True)) == dict(enumerate(VALUES[:10], 1))
    assert not one.proof._waiting


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_whatever_waits_up_to_what_was_delivered_is_let_go(step):
    one = Believer()
    for first in range(1, 91):
        one.hear(run(first, first + first % 10, 100))
    for slot in range(step, 100 + step, step):
        one.proof.done(slot)
        assert all(each.last > slot for each in one.proof._waiting.values())
    assert not one.proof._waiting and not one.proof._covering and not one.proof._slots


@pytest.mark.parametrize("steps", [(7,), range(1, 8), (3, 7), (0, 7, 7)], ids=str)
def test_what_was_delivered_is_forgotten_and_nothing_else(steps):
    """However far at a time, by slots or in a jump."""
    one = Believer()
    one.hear(run(1, 5), run(6, 9), run(2, 3), run(7, 7), run(8, 9), run(4, 30))
    for slot in steps:
        one.proof.done(slot)
    assert sorted((each.run.first, each.last) for each in one.proof._waiting.values()) == [
        (4, 30), (6, 9), (8, 9),
    ]  # fmt: skip
    assert one.proof._slots == 27 + 4 + 2


# --- what is remembered -----------------------------------------------------------------------


def delivered(first, last):
    return FixedRun(first, CHAINS[first - 1], VALUES[first - 1 : last], CHAINS[first : last + 1])


def test_a_tip_that_contradicts_what_was_delivered_is_evidence_too():
    one = Believer()
    one.hear(run(1, 20, 20), tips=[20])
    one.proof.delivered(delivered(1, 20))
    with pytest.raises(ContradictionError, match="slot 7") as caught:
        one.proof.tip(tip_of(tip(7, 2, b"e" * 32)))
    assert [each.slot for each in caught.value.tips] == [20, 7]
    assert (caught.value.slot, caught.value.chains) == (7, (CHAINS[7], b"e" * 32))


def test_without_a_tip_above_it_what_is_held_itself_is_the_evidence():
    one = Believer()
    one.proof.delivered(delivered(1, 20))
    with pytest.raises(ContradictionError) as caught:
        one.proof.tip(tip_of(tip(7, 2, b"e" * 32)))
    assert caught.value.tips == (tip_of(tip(7, 2, b"e" * 32)),)
    assert caught.value.chains == (CHAINS[7], b"e" * 32)


def test_a_signed_past_that_is_another_than_the_one_held_is_noticed_through_the_chain():
    one = Believer()
    one.proof.begin(4, b"e" * 32)
    with pytest.raises(ContradictionError, match="slot 4") as caught:
        one.hear(run(5, 9), tips=[9])
    assert caught.value.chains == (b"e" * 32, CHAINS[4])
    assert caught.value.tips == (tip_of(tip(9)),)
    same = Believer()
    same.proof.begin(4, CHAINS[4])
    assert sorted(slots(same.hear(run(5, 9), tips=[9]))) == [5, 6, 7, 8, 9]


def test_the_highest_tip_within_a_range_is_found_and_the_newest_is_known():
    one = Believer()
    assert one.proof.newest is None and one.proof.tip_within(1, 100) is None
    for slot in (30, 50, 40):
        assert one.proof.tip(tip_of(tip(slot)))
    assert one.proof.newest == tip_of(tip(50))
    assert one.proof.tip_within(31, 49) == tip_of(tip(40))
    assert one.proof.tip_within(1, 100) == tip_of(tip(50))
    assert one.proof.tip_within(51, 100) is None


def test_tips_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(proof, "TIPS_MAX", 5)
    one = Believer()
    for slot in range(1, 20):
        assert one.proof.tip(tip_of(tip(slot)))
    assert sorted(one.proof._tips) == [15, 16, 17, 18, 19]
