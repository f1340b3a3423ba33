"""The pure view: what each event changes, that nothing raises, that everything stays bounded."""

from __future__ import annotations

import itertools
import random
import time

import immutables
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dashboard import view as views
from dashboard.view import (
    FORGET_MS,
    LEADER_SILENT_MS,
    LISTENERS_MAX,
    LOG_MAX,
    PAST_WHY,
    SECONDS_MAX,
    SLOTS_MAX,
    SPANS_MAX,
    VOTER_SILENT_MS,
    Clock,
    Did,
    Event,
    Fixed,
    Followed,
    Jumped,
    MemberMoved,
    Opened,
    PastLed,
    Reported,
    SlotSeen,
    Tipped,
    Trouble,
    View,
    reduce,
)
from tests.dashboard.samples import START_MS, World, fold, healthy_world
from trex_core.messages import (
    NO_BALLOT,
    Ballot,
    ListenerDigest,
    ListenerReport,
    ListenerSeen,
    StreamTip,
    Transition,
    VoterDigest,
)

REPORT = ListenerReport("cache-1", 7, 900, 880, 900, 0, True, 0, 0, 0, 0, 50, "0.1.0")
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def lane(view: View, voter: int) -> list[tuple[str, int, int | None]]:
    """(role, from, to) in ms since the story began."""
    return [
        (each.role, each.from_ms - START_MS, each.to_ms and each.to_ms - START_MS)
        for each in view.spans
        if each.voter == voter
    ]


def said(view: View, subject: str = "") -> list[str]:
    return [each.words for each in view.log if each.subject.startswith(subject)]


def whole(view: View) -> None:
    """What holds in every view, whatever came in."""
    assert len(view.spans) <= SPANS_MAX and len(view.log) <= LOG_MAX
    assert len(view.slots) <= SLOTS_MAX and len(view.seconds) <= SECONDS_MAX
    assert len(view.listeners) <= LISTENERS_MAX and len(view.left) <= LISTENERS_MAX
    starts = [(each.from_ms, each.voter) for each in view.spans]
    assert starts == sorted(starts)
    ids = [each.voter for each in view.voters]
    assert ids == sorted(set(ids))
    for voter in {each.voter for each in view.spans}:
        assert voter in ids
        for one, other in itertools.pairwise(each for each in view.spans if each.voter == voter):
            assert one.to_ms is not None and one.from_ms <= one.to_ms <= other.from_ms
    assert all(one.at_ms <= two.at_ms for one, two in itertools.pairwise(view.log))
    assert all(two.at_s == one.at_s + 1 for one, two in itertools.pairwise(view.seconds))
    assert all(one.slot < two.slot for one, two in itertools.pairwise(view.slots))
    for each in view.voters:
        assert len(each.fsync_p99s_us) <= views.FSYNCS_MAX and len(each.boots_ms) <= views.BOOTS_MAX
        assert each.heard_ms is None or each.heard_ms <= view.now_ms
    open_leads = [each for each in view.spans if each.role == "leader" and each.to_ms is None]
    assert all(each.ballot >= view.led for each in open_leads)


# --- voters, roles, silence --------------------------------------------------------------------


def test_a_healthy_cluster_is_a_lane_for_each_voter_and_few_words():
    view = healthy_world().view
    whole(view)
    assert [lane(view, voter)[-1][0] for voter in range(1, 6)] == [
        "follower", "follower", "leader", "follower", "follower",
    ]  # fmt: skip
    assert view.ballot == view.led == Ballot(0, 17, 3)
    assert said(view, "voter") == ["leads under ballot 0.17.3: a quorum promised"]
    assert not any(each.silent or each.lags for each in view.voters)


def test_a_leader_that_dies_is_down_from_when_it_was_heard_last_and_another_leads():
    world = healthy_world()
    world.kill(3)
    world.run(900)
    world.poll(2)
    world.run(40)
    world.stand(2, 18)
    world.run(60)
    world.lead(2, 18)
    view = world.run(1_000)
    whole(view)
    heard_ms = view.voter(3).heard_ms - START_MS
    assert lane(view, 3)[-2:] == [("leader", 0, heard_ms), ("down", heard_ms, None)]
    assert [role for role, _, _ in lane(view, 2)] == ["follower", "polling", "candidate", "leader"]
    assert view.led == Ballot(0, 18, 2)
    words = said(view, "voter")
    assert words[1].startswith("not heard for ")
    assert words[2] == "heard no leader for an election timeout and asks the others"
    assert words[3] == "stands for leader under ballot 0.18.2: no other voter hears a leader"
    assert words[4] == "leads under ballot 0.18.2: a quorum promised"
    assert len(words) == 5


def test_silence_begins_after_the_bound_of_the_role_and_is_said_once():
    world = healthy_world()
    world.lost = {3, 4}
    ages = {each.voter: world.now_ms - each.heard_ms for each in world.view.voters}
    world.run(LEADER_SILENT_MS - ages[3] - 20)
    assert not world.view.voter(3).silent
    world.run(300)
    assert world.view.voter(3).silent and not world.view.voter(4).silent
    world.run(VOTER_SILENT_MS)
    assert world.view.voter(4).silent
    world.run(8_000)
    world.lost = set()
    view = world.run(2_000)
    whole(view)
    words = said(view, "voter 4")
    assert len(words) == 2 and words[0].startswith("not heard for 3.")
    assert words[1].startswith("is back after 1")
    assert [role for role, _, _ in lane(view, 4)] == ["follower", "down", "follower"]
    assert [role for role, _, _ in lane(view, 3)][-3:] == ["leader", "down", "leader"]


def test_a_voter_that_was_never_heard_is_said_once_and_down_since_watching_began():
    world = World()
    world.lost = {4}
    world.lead(3, 17)
    world.run(9_000)
    assert lane(world.view, 4) == [("down", 0, None)]
    assert len(said(world.view, "voter 4")) == 1
    world.lost = set()
    world.run(2_000)
    assert said(world.view, "voter 4")[1] == "is heard for the first time"
    whole(world.view)


def test_what_a_voter_did_while_unheard_is_known_once_it_is_heard_again():
    world = healthy_world()
    world.lost = {2}
    world.run(4_000)
    world.poll(2)
    world.run(1_000)
    world.stand(2, 18)
    world.run(1_000)
    world.lead(2, 18)
    world.run(1_000)
    world.lost = set()
    view = world.run(300)
    whole(view)
    roles = [role for role, _, _ in lane(view, 2)]
    assert roles == ["follower", "down", "polling", "candidate", "leader"]
    polling, candidate, leader = lane(view, 2)[-3:]
    assert polling[2] == candidate[1] == polling[1] + 1_000
    assert candidate[2] == leader[1] == candidate[1] + 1_000


def test_a_restart_is_seen_even_if_it_is_quick_and_transitions_count_anew():
    world = healthy_world()
    world.kill(5)
    world.run(400)
    world.restart(5)
    view = world.run(2_000)
    whole(view)
    assert [role for role, _, _ in lane(view, 5)] == ["follower", "down", "follower"]
    assert said(view, "voter 5") == ["restarted (boot 2)"]
    assert view.voter(5).boot == 2 and view.voter(5).told == 1
    assert len(view.voter(5).boots_ms) == 1


def test_a_restart_after_a_silence_is_one_line():
    world = healthy_world()
    world.kill(5)
    world.run(12_000)
    world.restart(5)
    view = world.run(2_000)
    first, second = said(view, "voter 5")
    assert first.startswith("not heard for 3.") and second.startswith("restarted (boot 2) and is ")
    assert second.endswith("back after 12 s")


def test_no_tip_that_is_older_than_the_one_known_changes_anything():
    world = healthy_world()
    view = world.view
    tips = [each for each in world.events if isinstance(each, Tipped)]
    for old in random.Random(5).sample(tips, 60):
        late = msgspec.structs.replace(old, at_ms=view.now_ms)
        after = reduce(view, late)
        assert after == view, "neither what it said nor that it was heard"


def test_a_replayed_tip_does_not_keep_a_dead_voter_alive():
    world = healthy_world()
    last = [each for each in world.events if isinstance(each, Tipped) and each.voter == 4][-1]
    world.kill(4)
    for _ in range(10):
        world.run(500)
        world.tell(msgspec.structs.replace(last, at_ms=world.now_ms))
    assert world.view.voter(4).silent and world.view.voter(4).heard_ms == last.at_ms


def test_a_wall_clock_set_back_does_not_silence_a_voter():
    world = healthy_world()
    world.peers[3].skew_ms = -3_600_000
    world.run(2_000)
    assert not world.view.voter(3).silent
    assert said(world.view, "voter 3") == ["leads under ballot 0.17.3: a quorum promised"]


def test_an_older_copy_of_a_disk_is_told_from_an_old_tip():
    world = healthy_world()
    world.peers[4].boot = 7
    world.run(2_000)
    world.peers[4].boot = 3
    world.run(3_000)
    view = world.view
    assert view.voter(4).boot == 7 and view.voter(4).rolled_ms is not None
    (words,) = [each for each in said(view, "voter 4") if "older copy" in each]
    assert words.startswith("speaks with boot number 3, and 7 was heard before")


def test_transitions_that_were_told_in_lost_tips_are_not_lost():
    told, missed = healthy_world(), healthy_world()
    for world in (told, missed):
        if world is missed:
            world.lost = {2, 5}
        for round_ in range(18, 21):
            world.poll(2)
            world.run(60)
            world.stand(2, round_)
            world.run(60)
        world.lost = set()
        world.run(2_000)
    assert lane(missed.view, 2) == lane(told.view, 2)


def test_the_same_transitions_told_again_and_again_are_in_the_timeline_once():
    world = healthy_world()
    count = len(world.view.spans)
    world.run(10_000)
    assert len(world.view.spans) == count


def test_a_leader_that_has_not_noticed_does_not_lead_in_the_timeline():
    world = healthy_world()
    world.deaf = {(3, each) for each in (1, 2, 4, 5)} | {(each, 3) for each in (1, 2, 4, 5)}
    world.run(500)
    world.lead(2, 18)
    view = world.run(1_000)  # voter 3 goes on to say that it leads
    whole(view)
    assert view.voter(3).tip.leading and view.voter(2).tip.leading
    leads = [each for each in view.spans if each.role == "leader" and each.to_ms is None]
    assert [each.voter for each in leads] == [2]


def test_a_voter_that_stands_in_vain_is_two_lines_of_the_log():
    world = healthy_world()
    world.kill(1, 3, 4)
    world.run(1_000)
    for round_ in range(18, 48):
        world.poll(2)
        world.run(400)
        world.stand(2, round_)
        world.run(400)
    assert len(said(world.view, "voter 2")) == 2
    assert len([each for each in world.view.spans if each.voter == 2]) == 61


def test_disks_versions_snapshots_and_lag_are_said_once_each():
    world = healthy_world()
    peer = world.peers[2]
    peer.has_room, peer.free_bytes, peer.version, peer.snapshot_slot = False, 60 << 20, "0.2", 16384
    world.run(3_000)
    peer.has_room, peer.free_bytes = True, 1 << 30
    world.peers[4].lag = 5_000
    world.run(3_000)
    assert len(said(world.view, "voter 4")) == 1
    world.peers[4].lag = 900  # no news yet: it must come well below the bound
    world.run(3_000)
    assert len(said(world.view, "voter 4")) == 1
    world.peers[4].lag = 0
    world.run(3_000)
    assert said(world.view, "voter 2") == [
        "its disk is full (60.0 MiB free): it accepts nothing more",
        "runs version 0.2 now, before 0.1.0",
        "has written a snapshot at slot 16,384",
        "its disk has room again: it accepts",
    ]
    assert [each.split(" by ")[0] for each in said(world.view, "voter 4")] == [
        "is behind", "has caught up",
    ]  # fmt: skip


def test_slots_that_are_proposed_and_never_fixed_are_counted_from_the_first_of_them():
    world = healthy_world()
    world.peers[3].stuck = 40
    world.run(2_000)
    stuck_ms = world.view.voter(3).stuck_ms
    assert stuck_ms is not None and 1_700 <= world.now_ms - stuck_ms <= 2_100
    world.peers[3].stuck = 0
    world.run(200)
    assert world.view.voter(3).stuck_ms in (None, world.view.voter(3).heard_ms)


def test_a_leadership_ends_when_the_next_began_and_not_when_that_was_heard():
    world = healthy_world()
    others = [each for each in world.peers if each != 3]
    world.deaf = {(3, each) for each in others} | {(each, 3) for each in others}
    world.lost = set(others)
    world.run(500)
    began_ms = world.now_ms - START_MS
    world.lead(2, 18)
    world.run(400)
    world.lost = set()
    view = world.run(1_000)
    whole(view)
    assert lane(view, 3)[-1] == ("leader", 0, began_ms)
    assert lane(view, 2)[-1] == ("leader", began_ms, None)


def test_ages_that_contradict_each_other_make_no_spans_that_overlap():
    world = World()
    world.lead(3, 17)
    peer = world.peers[3]
    later = msgspec.structs.replace(peer.transitions[0][1], number=2, role="follower")
    peer.transitions = [(START_MS, peer.transitions[0][1]), (START_MS - 9_000, later)]
    view = world.run(1_000)
    whole(view)
    assert [each.from_ms for each in view.spans if each.voter == 3][:2] == [START_MS, START_MS]


# --- the past -----------------------------------------------------------------------------------


def test_leaderships_of_the_past_go_where_nothing_better_is_known():
    world = World()
    world.lead(3, 17)
    world.run(1_000)
    hour = 3_600_000
    for round_, voter, from_ms, to_ms in [
        (15, 3, -2 * hour, -hour),
        (16, 1, -hour, 5_000),  # to beyond when we began to watch
        (17, 3, -60_000, 0),  # voter 3 itself told of that one
        (14, 9, -3 * hour, -2 * hour),  # a voter that is no more
        (13, 3, -2 * hour + 5_000, -2 * hour + 9_000),  # within what is known already
    ]:
        past = PastLed(
            START_MS, Ballot(0, round_, voter), 1, 2, START_MS + from_ms, START_MS + to_ms
        )
        world.tell(past)
    whole(world.view)
    led = [each for each in world.view.spans if each.why == PAST_WHY]
    assert [
        (each.ballot.round, each.from_ms - START_MS, each.to_ms - START_MS) for each in led
    ] == [
        (15, -2 * hour, -hour),
        (16, -hour, 0),
    ]


def test_what_a_voter_tells_itself_replaces_what_its_slots_told():
    world = World()
    world.tell(PastLed(START_MS, Ballot(0, 17, 3), 1, 2, START_MS - 60_000, START_MS))
    peer = world.peers[3]
    world.lead(3, 17)
    peer.transitions = [(START_MS - 50_000, peer.transitions[0][1])]
    world.run(500)
    assert lane(world.view, 3) == [("leader", -60_000, -50_000), ("leader", -50_000, None)]
    whole(world.view)


# --- slots and seconds --------------------------------------------------------------------------


def slots(first: int, last: int) -> tuple[SlotSeen, ...]:
    return tuple(SlotSeen(slot, "config.put", "k", 9, NO_BALLOT) for slot in range(first, last + 1))


def test_commits_are_counted_in_their_second_and_holes_are_zeros():
    view = fold(
        View(),
        [
            Opened(10_000, "demo", (1, 2, 3), 1_000, "live"),
            Fixed(10_100, 1, 5, slots(1, 5)),
            Fixed(10_900, 6, 7, slots(6, 7)),
            Fixed(14_200, 8, 8, slots(8, 8)),
            Clock(15_050),
        ],
    )
    assert [(each.at_s, each.commits) for each in view.seconds] == [
        (10, 7), (11, 0), (12, 0), (13, 0), (14, 1), (15, 0),
    ]  # fmt: skip
    again = reduce(view, Fixed(15_100, 6, 7, slots(6, 7)))
    assert again.seconds == view.seconds and again.slots == view.slots


def test_what_was_fixed_before_we_watched_is_no_rate():
    world = World(rate=0)
    world.lead(3, 17)
    world.run(200)
    first = world.slot - 5_000
    world.tell(Fixed(world.now_ms, first + 1, world.slot, slots(world.slot - 20, world.slot)))
    world.tell(Fixed(world.now_ms, world.slot + 1, world.slot + 3, ()))
    assert sum(each.commits for each in world.view.seconds) == 3
    assert len(world.view.slots) == 21


def test_a_pause_longer_than_all_seconds_kept_costs_no_more_than_they_do():
    view = reduce(View(), Opened(0, "demo", (1,), 1_000, "live"))
    view = fold(view, [Clock(1_000), Clock(10**12)])
    whole(view)
    assert len(view.seconds) == SECONDS_MAX and view.seconds[-1].at_s == 10**9


def test_latencies_are_those_the_leader_told_in_that_second():
    view = healthy_world().view
    last = view.seconds[-2]
    assert last.commits == 400 and last.p50_us == 1_650 and 3_900 <= last.p99_us < 4_600


def test_one_sync_time_a_second_and_zero_for_a_second_unheard():
    world = healthy_world()
    assert 28 <= len(world.view.voter(2).fsync_p99s_us) <= 31
    world.lost = {2}
    world.run(6_000)
    world.lost = set()
    world.run(1_000)
    assert world.view.voter(2).fsync_p99s_us[-6:].count(0) == 5


def test_a_jump_trouble_deeds_and_members_are_told():
    view = reduce(View(), Opened(0, "demo", (1,), 1_000, "live"))
    view = fold(
        view,
        [
            Jumped(10, 4, 900),
            Trouble(20, "cannot join the group"),
            Trouble(30, "cannot join the group"),
            Trouble(40, ""),
            Did(50, True, "handed leadership to voter 2"),
            Did(60, False, "no snapshot: refused"),
            MemberMoved(70, 901, "cache-1", "joined in zone a"),
            Followed(80, 5, -1, 900, False, 1, {}),
            Followed(90, 900, -1, 900, True, 1, {}),
            Followed(85, 5, -1, 900, False, 1, {}),
        ],
    )
    jumped = "took slots 5 to 900 from a snapshot: their details are not known here"
    assert [(each.level, each.subject, each.words) for each in view.log] == [
        ("info", "dashboard", jumped),
        ("bad", "dashboard", "cannot join the group"),
        ("good", "dashboard", "what was in the way is gone"),
        ("good", "dashboard", "handed leadership to voter 2"),
        ("bad", "dashboard", "no snapshot: refused"),
        ("info", "member cache-1", "joined in zone a (slot 901)"),
        ("good", "dashboard", "its own listener is at the tip"),
    ]  # fmt: skip
    assert view.followed.ready


# --- listeners ----------------------------------------------------------------------------------


def digest_of(*rows: ListenerSeen) -> Tipped:
    digest = VoterDigest(
        "follower", NO_BALLOT, 0, 0, 0, 0, 1, 0, "0", uptime_s=int(rows[0].age_ms) + 1,
        listeners=ListenerDigest(1, 0, 0, 0, rows),
    )  # fmt: skip
    return Tipped(100_000, 1, StreamTip(NO_BALLOT, False, 0, bytes(32), digest))


def opened(*events: Event) -> View:
    return fold(View(), [Opened(1_000, "demo", (1, 2, 3), 1_000, "live"), *events])


def test_the_newest_word_of_a_listener_counts_wherever_it_came_from():
    newer = msgspec.structs.replace(REPORT, applied=950, uptime_s=52)
    view = opened(Reported(98_000, REPORT), digest_of(ListenerSeen(500, newer)))
    (found,) = view.listeners.values()
    assert (found.report, found.heard_ms, found.direct) == (newer, 99_500, False)
    view = opened(Reported(99_800, newer), digest_of(ListenerSeen(500, REPORT)))
    (found,) = view.listeners.values()
    assert (found.report, found.heard_ms, found.direct) == (newer, 99_800, True)


def test_a_listener_that_left_stays_away_whatever_others_still_tell():
    leaving = msgspec.structs.replace(REPORT, leaving=True)
    view = opened(
        Reported(98_000, REPORT), Reported(99_000, leaving), digest_of(ListenerSeen(1_500, REPORT))
    )
    assert not view.listeners and said(view, "listener") == ["left in order"]
    other = msgspec.structs.replace(REPORT, instance=8)
    assert set(reduce(view, Reported(100_500, other)).listeners) == {("cache-1", 8)}


def test_a_listener_is_behind_once_and_at_the_tip_again_once():
    def report(at_ms: int, lag: int, behind_ms: int) -> Reported:
        told = msgspec.structs.replace(
            REPORT, applied=20_000 - lag, tip=20_000, behind_ms=behind_ms, uptime_s=at_ms // 1_000
        )
        return Reported(at_ms, told)

    view = opened(
        report(2_000, 0, 0),
        report(4_000, 12_000, 2_500),
        report(6_000, 500, 4_000),  # not there yet
        report(8_000, 900, 6_000),
        report(10_000, 0, 0),
        report(12_000, 3, 10),
    )
    assert said(view, "listener") == ["is behind by 12,000 slots", "reached the tip again"]


def test_silent_listeners_are_marked_and_forgotten():
    view = opened(Reported(2_000, REPORT), Clock(7_000))
    assert not view.listeners["cache-1", 7].silent
    view = reduce(view, Clock(9_000))
    assert view.listeners["cache-1", 7].silent
    assert said(view, "listener") == ["not heard for 7.0 s"]
    view = fold(view, [Clock(10_000), Clock(11_000)])
    assert len(said(view, "listener")) == 1
    view = reduce(view, Clock(2_000 + FORGET_MS + 1_000))
    assert not view.listeners


def test_hundreds_that_fall_behind_at_once_do_not_drive_the_voters_out_of_the_log():
    world = healthy_world(listeners=0)
    for each in range(3_000):
        told = msgspec.structs.replace(REPORT, name=f"c{each}", tip=90_000)
        world.tell(Reported(world.now_ms + each, told))
    assert len(said(world.view, "listener")) == views.TOPIC_LINES_MAX["listener"]
    assert "leads under ballot 0.17.3: a quorum promised" in said(world.view)
    assert any("their own tab" in each for each in said(world.view, "dashboard"))


def test_no_more_listeners_are_kept_than_there_is_room_for():
    view = opened()
    for each in range(LISTENERS_MAX + 50):
        view = reduce(view, Reported(2_000, msgspec.structs.replace(REPORT, instance=each)))
    assert len(view.listeners) == LISTENERS_MAX


# --- anything at all ----------------------------------------------------------------------------

NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 40)
TIMES = st.integers(0, 200_000) | st.integers(0, 2**50)
TEXTS = st.text(max_size=12) | st.sampled_from(["", "x" * 5_000, "\x1b[2J\n[bold]", "cache-1"])
BALLOTS = st.builds(Ballot, st.integers(0, 2), st.integers(0, 9), st.integers(0, 6))
ROLES = st.sampled_from(["follower", "polling", "candidate", "leader", "", "emperor"])
REPORTS = st.builds(
    ListenerReport,
    *(TEXTS, st.integers(0, 3)),
    *(NUMBERS,) * 4,
    st.booleans(),
    *(NUMBERS,) * 5,
    TEXTS,
    st.booleans(),
)
DIGESTS = st.builds(
    VoterDigest,
    ROLES,
    BALLOTS,
    *(NUMBERS,) * 6,
    TEXTS,
    boot=NUMBERS,
    uptime_s=NUMBERS,
    time_ms=NUMBERS,
    proposed=NUMBERS,
    quorum_age_ms=NUMBERS,
    has_room=st.booleans(),
    snapshot_slot=NUMBERS,
    fsync_p99_us=NUMBERS,
    commit_p99_us=NUMBERS,
    heard_ms=st.lists(NUMBERS, max_size=9).map(tuple),
    transitions=st.lists(
        st.builds(Transition, NUMBERS, NUMBERS, ROLES, BALLOTS, NUMBERS, NUMBERS, TEXTS), max_size=4
    ).map(tuple),
    listeners=st.builds(
        ListenerDigest,
        *(NUMBERS,) * 4,
        st.lists(st.builds(ListenerSeen, NUMBERS, REPORTS), max_size=3).map(tuple),
    ),
)
SEEN = st.builds(SlotSeen, NUMBERS, TEXTS, TEXTS, NUMBERS, BALLOTS)
ANYTHING = st.one_of(
    st.builds(Opened, TIMES, TEXTS, st.just((1, 2, 3)), NUMBERS, TEXTS),
    st.builds(
        Tipped,
        TIMES,
        st.integers(0, 5),
        st.builds(StreamTip, BALLOTS, st.booleans(), NUMBERS, st.just(b""), DIGESTS),
    ),
    st.builds(Fixed, TIMES, NUMBERS, NUMBERS, st.lists(SEEN, max_size=4).map(tuple)),
    st.builds(Reported, TIMES, REPORTS),
    st.builds(
        Followed, TIMES, NUMBERS, NUMBERS, NUMBERS, st.booleans(), NUMBERS, st.just({"a": 1})
    ),
    st.builds(Jumped, TIMES, NUMBERS, NUMBERS),
    st.builds(MemberMoved, TIMES, NUMBERS, TEXTS, TEXTS),
    st.builds(PastLed, TIMES, BALLOTS, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(Clock, TIMES),
    st.builds(Trouble, TIMES, TEXTS),
    st.builds(Did, TIMES, st.booleans(), TEXTS),
)


@SLOW
@given(events=st.lists(ANYTHING, max_size=40), opened_first=st.booleans())
def test_whatever_comes_nothing_raises_and_every_view_is_whole(events, opened_first):
    view = View()
    if opened_first:
        view = reduce(view, Opened(0, "demo", (1, 2, 3), 1_000, "live"))
    for event in events:
        before = view.now_ms
        view = reduce(view, event)
        assert view.now_ms >= before
        whole(view)


def story(seed: int) -> World:
    """Some things happen to a cluster."""
    chance = random.Random(seed)
    world = healthy_world(chance.choice((3, 5, 7)), listeners=chance.choice((0, 4)))
    round_ = 18
    for _ in range(chance.randint(2, 6)):
        voter = chance.choice(list(world.peers))
        match chance.randrange(6):
            case 0:
                world.kill(voter)
            case 1 if not world.peers[voter].running:
                world.restart(voter)
            case 2 if world.peers[voter].running:
                world.lead(voter, round_)
                round_ += 1
            case 3 if world.peers[voter].running:
                world.poll(voter)
            case 4:
                world.lost = {voter}
            case _:
                world.lost = set()
        world.run(chance.choice((100, 700, 4_000)))
    return world


def mend(world: World, round_: int = 90) -> View:
    """All is well again."""
    world.lost, world.deaf = set(), set()
    for voter, peer in world.peers.items():
        if not peer.running:
            world.restart(voter)
    world.run(200)
    world.lead(1, round_)
    return world.run(6_000)


@SLOW
@given(seed=st.integers(0, 10**6), mix=st.integers(0, 10**6))
def test_lost_late_and_repeated_events_never_break_a_view_and_it_heals(seed, mix):
    chance = random.Random(mix)
    world = story(seed)
    seen = View()
    events = list(world.events)
    first, rest = events[0], events[1:]
    mixed = [
        (at + chance.choice((0, 0, 3, 200)) * chance.random(), event)
        for at, event in enumerate(rest)
        for _ in range(chance.choice((0, 1, 1, 1, 2)))
    ]
    mixed.sort(key=lambda each: each[0])
    seen = reduce(seen, first)
    for _, event in mixed:
        seen = reduce(seen, event)
    whole(seen)
    count = len(events)
    mend(world)
    for event in world.events[count:]:
        seen = reduce(seen, event)
    whole(seen)
    now = [(each.voter, each.boot, each.silent, each.tip) for each in world.view.voters]
    assert [(each.voter, each.boot, each.silent, each.tip) for each in seen.voters] == now
    assert {each.voter: each.role for each in seen.spans if each.to_ms is None} == {
        each.voter: each.role for each in world.view.spans if each.to_ms is None
    }
    assert set(seen.listeners) == set(world.view.listeners)
    assert (seen.led, seen.tip_slot, seen.followed) == (
        world.view.led, world.view.tip_slot, world.view.followed,
    )  # fmt: skip


# --- bounds and cost ----------------------------------------------------------------------------


def storm(listeners: int, seconds: int) -> list[Event]:
    """What a feed brings in ``seconds`` seconds from five voters and many listeners."""
    world = World(rate=1_000, listeners=0)
    names = [f"cache-{each:03d}" for each in range(listeners)]
    rows = [
        ListenerSeen(300, msgspec.structs.replace(REPORT, name=each, uptime_s=0)) for each in names
    ]
    world.lead(3, 17)
    world.run(1_000 * seconds)
    events: list[Event] = []
    turn = itertools.cycle(range(max(1, listeners)))
    for event in world.events:
        if isinstance(event, Tipped) and rows:
            told = tuple(
                ListenerSeen(
                    300,
                    msgspec.structs.replace(
                        rows[next(turn)].report, uptime_s=(event.at_ms - START_MS) // 1_000
                    ),
                )
                for _ in range(4)
            )
            digest = msgspec.structs.replace(
                event.tip.digest, listeners=ListenerDigest(listeners, 0, 0, 0, told)
            )
            tip = msgspec.structs.replace(event.tip, digest=digest)
            event = msgspec.structs.replace(event, tip=tip)  # noqa: PLW2901
        events.append(event)
        if isinstance(event, Clock) and rows:
            for _ in range(12):
                report = msgspec.structs.replace(
                    rows[next(turn)].report, uptime_s=(event.at_ms - START_MS) // 1_000
                )
                events.append(Reported(event.at_ms, report))
    return events


def test_folding_a_second_of_five_voters_and_500_listeners_costs_little():
    seconds = 20
    events = storm(500, seconds)
    assert len(events) / seconds > 60
    view, best_ms = View(), 1e9
    for _ in range(3):  # the machine is shared: the least is what it costs
        began_s = time.process_time()
        view = fold(View(), events)
        best_ms = min(best_ms, (time.process_time() - began_s) * 1_000 / seconds)
    assert len(view.listeners) == 500
    print(f"{len(events) / seconds:.0f} events/s cost {best_ms:.2f} ms of CPU a second")
    assert best_ms < 5


def packed(view: View) -> int:
    return len(msgspec.msgpack.encode(view, enc_hook=_plain))


def _plain(value: object) -> object:
    if isinstance(value, immutables.Map):
        return list(value.items())
    raise TypeError(type(value))


@pytest.mark.slow
def test_a_view_of_90_000_events_is_as_large_as_one_of_half_as_many():
    """Everything goes on happening: elections, restarts, listeners that lag, members that move."""
    chance = random.Random(1)
    world = healthy_world(listeners=20)
    sizes, round_ = [], 18
    for most in (45_000, 90_000):
        while len(world.events) < most:
            world.lead(chance.choice(list(world.peers)), round_)
            round_ += 1
            for name in world.listeners:
                world.listeners[name] = chance.choice((0, 9_000))
            for each in range(10):
                world.tell(MemberMoved(world.now_ms, world.slot, f"m{each}", "changed"))
            world.run(800)
        whole(world.view)
        sizes.append(packed(world.view))
    print(f"a view of 45,000 and of 90,000 events: {sizes} bytes")
    assert sizes[1] < 1.1 * sizes[0] and sizes[1] < 2 << 20
