"""What the screen tells of the ring: shares, moves in progress, words; against plain twins."""

import random

import pytest

from dashboard.importer import commands, examine
from dashboard.placement import (
    NOTHING_HELD,
    NOWHERE,
    SPACE,
    Flow,
    Holding,
    current,
    explain_member,
    place,
    ranges_of,
    share,
)
from trex_core.metadata.commands import (
    ConfigPut,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    encode_command,
)
from trex_core.metadata.ring import moves
from trex_core.metadata.state import EMPTY, apply, ring_of


def after(state, *given):
    """``state`` after these commands, in the slots that follow."""
    for command in given:
        state, _, changes = apply(state, state.slot + 1, encode_command(command))
        assert changes, f"{command} was refused"
    return state


def joined(count, zones=3, **told):
    return after(
        EMPTY,
        *(MemberJoin(f"node-{at}", zone=f"zone-{at % zones}", **told) for at in range(count)),
    )


def told_plainly(state):
    """Holdings, by looking at every range."""
    found = {}
    for row in ring_of(state).ranges():
        size = row.end - row.start + 1
        for at, name in enumerate(row.replicas):
            held = found.get(name, NOTHING_HELD)
            found[name] = Holding(
                held.owned + size * (at == 0), held.ranges + (at == 0), held.held + size
            )
    return found


# --- shares


def test_of_nobody_there_is_nothing():
    placement = place(EMPTY)
    assert dict(placement.holdings) == dict(placement.zones) == {}
    assert placement.by_share == ()
    assert place(EMPTY, NOWHERE).ring.members == 0
    assert current(NOWHERE, EMPTY)


def test_shares_add_up():
    placement = place(joined(7))
    assert sum(held.owned for held in placement.holdings.values()) == SPACE
    assert sum(held.held for held in placement.holdings.values()) == 3 * SPACE
    assert sum(placement.zones.values()) == SPACE
    owned = [placement.of(name).owned for name in placement.by_share]
    assert owned == sorted(owned, reverse=True) and len(owned) == 7


@pytest.mark.parametrize("seed", range(12))
def test_following_changes_is_looking_at_all_of_it_anew(seed):
    draw = random.Random(seed)
    state = joined(draw.randrange(0, 12), zones=draw.randrange(1, 4))
    placement = place(state)
    for _ in range(12):
        before = state
        for _ in range(draw.randrange(1, 4)):
            name = f"node-{draw.randrange(16)}"
            if name not in state.members:
                state = after(state, MemberJoin(name, zone=draw.choice([None, "zone-0", "zone-9"])))
            elif draw.random() < 0.4:
                state = after(state, MemberLeave(name))
            else:
                new = draw.choice(["up", "down", "joining", "draining"])
                state = after(state, MemberUpdate(name, state=new))
        if draw.random() < 0.2:
            state = after(state, ConfigPut("ring/replication_factor", str(draw.randrange(1, 5))))
        placement = place(state, placement)
        assert current(placement, state) and (before is state or not current(placement, before))
        assert dict(placement.holdings) == told_plainly(state)
        whole = place(state)
        assert dict(placement.zones) == dict(whole.zones)
        assert (placement.leaving, placement.joining) == (whole.leaving, whole.joining)
        assert placement.by_share == whole.by_share
        assert dict(placement.states) == dict(whole.states)


def test_other_configuration_is_no_other_placement():
    state = joined(3)
    placement = place(state)
    assert current(placement, after(state, ConfigPut("colour", "blue")))
    assert not current(placement, after(state, ConfigPut("ring/replication_factor", "2")))


# --- what moves


def test_nothing_moves_while_all_are_up():
    placement = place(joined(5))
    assert placement.leaving.ranges == placement.joining.ranges == 0
    assert placement.newest is None


def test_a_joining_member_will_take_exactly_what_moves_when_it_is_up():
    state = after(joined(5), MemberJoin("new", zone="zone-1", state="joining"))
    placement = place(state)
    assert placement.of("new") == NOTHING_HELD
    up = after(state, MemberUpdate("new", state="up"))
    moved = moves(ring_of(state), ring_of(up))
    taken = sum((move.end - move.start + 1) * len(move.gained) for move in moved)
    assert placement.joining.tokens == taken > 0
    assert placement.joining.ranges == len(moved)
    assert {flow.taker for flow in placement.joining.flows} >= {"new"}
    then = place(up, placement)
    assert then.joining.ranges == 0
    assert then.newest.passing.tokens == taken
    assert (then.newest.first, then.newest.last, then.newest.who) == (up.slot, up.slot, ("new",))


def test_a_draining_member_has_to_hand_over_what_it_held():
    state = joined(5)
    held = place(state).of("node-2").held
    draining = after(state, MemberUpdate("node-2", state="draining"))
    placement = place(draining)
    given = [flow for flow in placement.leaving.flows if flow.giver == "node-2"]
    assert sum(flow.tokens for flow in given) == held > 0
    assert placement.joining.ranges == 0
    gone = place(after(draining, MemberLeave("node-2")), placement)
    assert gone.leaving.ranges == 0, "nothing is left to hand over"
    assert gone.newest is None, "it owned nothing any more: the ring did not change"


def test_the_last_change_names_its_slots():
    state = joined(4)
    before = place(state)
    later = after(state, MemberJoin("a"), ConfigPut("k", "v"), MemberJoin("b"))
    change = place(later, before).newest
    assert (change.first, change.last) == (state.slot + 1, state.slot + 3)
    assert set(change.who) == {"a", "b"}
    gone = place(after(state, MemberLeave("node-1")), before).newest
    assert gone.who == ("node-1",) and gone.first == gone.last == state.slot + 1


def test_the_first_member_is_given_everything_by_nobody():
    change = place(joined(1), place(EMPTY)).newest
    assert change.passing.flows == (Flow("", "node-0", SPACE, 1),)
    assert change.passing.tokens == SPACE


# --- in words


def test_a_share_is_told_in_at_most_seven_characters():
    told = [share(tokens) for tokens in (0, 1, SPACE // 10**5, SPACE // 3, SPACE - 1, 3 * SPACE)]
    assert told == ["-", "<.001 %", "0.001 %", "33.33 %", "100 %", "300 %"]


def test_ranges_of_a_member_are_those_it_owns():
    state = joined(6)
    ring = ring_of(state)
    for name, member in state.members.items():
        owned = tuple(row for row in ring.ranges() if row.replicas[0] == name)
        assert ranges_of(member, ring) == owned


def test_a_member_is_explained():
    state = after(joined(3), MemberUpdate("node-1", state="down"))
    words = explain_member(state, ring_of(state), "node-1")
    assert "down" in words and "still owns its ranges" in words
    assert "8 tokens" in words and "trex members leave" in words
    assert "node\\-0" in words, "where the copies are"
    assert "no such member" in explain_member(state, ring_of(state), "nobody")


def test_a_member_whose_id_is_markup_is_explained_as_text():
    state = after(EMPTY, MemberJoin("# [x](y) `z`\n", state="draining"))
    words = explain_member(state, ring_of(state), "# [x](y) `z`\n")
    assert words.startswith("# member \\# \\[x\\]\\(y\\) \\`z\\`\\\\n: draining")


@pytest.mark.parametrize("missing", ["zone", "address"])
def test_a_member_without_everything_is_explained(missing):
    state = after(EMPTY, MemberJoin("a", **{missing: None}))
    assert "There is no other copy" in explain_member(state, ring_of(state), "a")


def test_the_recorded_cluster_is_placed(google_trace):
    """12,486 members: a whole look, and one change followed, say the same."""
    state = EMPTY
    for _, command in commands(examine(google_trace), 1):
        state, _, _ = apply(state, state.slot + 1, command)
    assert len(state.members) == 12_486
    before = place(state)
    assert before.ring.tokens == 99_888
    assert sum(held.owned for held in before.holdings.values()) == SPACE
    name = before.by_share[0]
    gone = after(state, MemberLeave(name))
    followed = place(gone, before)
    assert dict(followed.holdings) == told_plainly(gone)
    assert followed.newest.who == (name,)
    given = sum(flow.tokens for flow in followed.newest.passing.flows if flow.giver == name)
    assert given == before.of(name).held
