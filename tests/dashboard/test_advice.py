"""The dashboard's knowledge: what is said of each state, and that "healthy" is never false."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dashboard import advice
from dashboard.advice import LEVELS, Verdict, findings, verdict
from dashboard.feed import open_replay
from dashboard.view import (
    LEADER_SILENT_MS,
    VOTER_SILENT_MS,
    Clock,
    Followed,
    Opened,
    Reported,
    Trouble,
    View,
    reduce,
)
from tests.dashboard import samples
from tests.dashboard.samples import ELECTION_MS, World, healthy_world
from trex_core.messages import NO_BALLOT, Ballot, ListenerReport

RUNS = Path(__file__).parent / "recordings"
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def codes(view: View, *levels: str) -> set[str]:
    return {each.code for each in findings(view) if not levels or each.level in levels}


def about(view: View, subject: str) -> list[str]:
    return [each.words for each in findings(view) if each.subject == subject]


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("voters", [1, 3, 5, 7])
def test_healthy_says_who_leads_since_when_and_what_can_be_lost(voters):
    view = healthy_world(voters).view
    said = verdict(view)
    leader, spare = min(3, voters), voters // 2
    assert (said.level, said.state, said.leader, said.can_lose) == ("ok", "healthy", leader, spare)
    assert said.words.startswith(f"healthy: voter {leader} leads since ballot 0.17.{leader}, can ")
    assert ("can lose no more" in said.words) == (voters == 1)
    assert not findings(view)


def quiet(world: World) -> None:
    """Nobody's multicast reaches us."""
    world.lost = set(world.peers)
    world.run(VOTER_SILENT_MS + 1_000)


def kill(*voters: int) -> Callable[[World], None]:
    def harm(world: World) -> None:
        world.kill(*voters)
        world.run(VOTER_SILENT_MS + 1_000)

    return harm


def dead_leader(world: World) -> None:
    world.kill(3)
    world.run(1_000)


def cut_off_leader(world: World) -> None:
    others = [each for each in world.peers if each != 3]
    world.deaf = {(3, each) for each in others} | {(each, 3) for each in others}
    world.run(800)


def deposed(world: World) -> None:
    cut_off_leader(world)
    world.lead(2, 18)
    world.run(400)


def full_disk(*voters: int) -> Callable[[World], None]:
    def harm(world: World) -> None:
        for voter in voters:
            world.peers[voter].has_room, world.peers[voter].free_bytes = False, 60 << 20
        world.run(1_000)

    return harm


def lagging_voter(world: World) -> None:
    world.peers[2].lag = 30_000
    world.run(1_000)


def deaf_voter(world: World) -> None:
    """Voter 2 does not hear the leader, which hears it."""
    world.deaf = {(2, 3)}
    world.run(2_000)
    world.poll(2)
    world.run(4_000)


def unheard_by_leader(world: World) -> None:
    world.deaf = {(3, 2)}
    world.run(900)


def hanging(world: World) -> None:
    world.peers[3].stuck = 70
    world.run(2_500)


def no_answer_yet(world: World) -> None:
    """A leader that has had no answer of any quorum says -1."""
    world.peers[3].quorum_age_ms = -1
    world.run(400)


def higher_promise(world: World) -> None:
    """Three voters have promised a ballot that the leader knows nothing of yet."""
    for voter in (1, 2, 4):
        world.peers[voter].promised = Ballot(0, 40, 2)
    world.run(1_000)


def silent_matrix(world: World) -> None:
    """The leader does not say whom it hears."""
    world.heard = {}
    world.deaf = {(3, each) for each in (1, 2, 4, 5)}
    world.run(900)


def in_trouble(world: World) -> None:
    world.tell(Trouble(world.now_ms, "two signed tips contradict each other"))


def restored_disk(world: World) -> None:
    world.peers[4].boot = 6
    world.run(1_000)
    world.peers[4].boot = 2
    world.run(2_000)


def one_unheard_here(world: World) -> None:
    world.lost = {2}
    world.run(VOTER_SILENT_MS + 1_000)


@pytest.mark.parametrize(
    ("harm", "states", "leader", "can_lose"),
    [
        (quiet, {"unknown"}, 0, 0),
        (dead_leader, {"no leader"}, 0, None),
        (kill(1), {"degraded"}, 3, 1),
        (kill(1, 4), {"degraded"}, 3, 0),
        (kill(1, 2, 4), {"no quorum"}, None, 0),
        (kill(1, 2, 3), {"no quorum"}, 0, 0),
        (kill(1, 2, 3, 4, 5), {"unknown"}, 0, 0),
        (cut_off_leader, {"no quorum", "degraded"}, None, 0),
        (deposed, {"degraded"}, 2, 1),
        (full_disk(2), {"degraded"}, 3, 1),
        (full_disk(1, 2, 4), {"degraded", "no quorum"}, 3, 0),
        (lagging_voter, {"degraded"}, 3, 1),
        (deaf_voter, {"degraded"}, 3, 1),
        (unheard_by_leader, {"degraded"}, 3, 1),
        (hanging, {"degraded"}, 3, None),
        (no_answer_yet, {"degraded", "no quorum"}, None, None),
        (higher_promise, {"degraded", "no quorum"}, None, 0),
        (silent_matrix, {"degraded", "no quorum"}, None, 0),
        (in_trouble, {"degraded"}, 3, None),
        (restored_disk, {"degraded"}, 3, 1),
        (one_unheard_here, {"degraded"}, 3, 1),
    ],
    ids=lambda each: getattr(each, "__qualname__", None),
)
def test_each_fault_is_told(harm, states, leader, can_lose):
    world = healthy_world()
    harm(world)
    said = verdict(world.view)
    assert said.state in states, said
    assert said.words.startswith(f"{said.state}: ") or said.words.startswith(f"{said.state} ")
    assert said.level in ("warn", "bad")
    assert leader is None or said.leader == leader
    assert can_lose is None or said.can_lose == can_lose
    worst = findings(world.view)[0]
    assert worst.level in ("warn", "bad") and worst.words


def test_a_dead_follower_is_seen_through_the_leaders_eyes_before_its_own_tip_is_late():
    world = healthy_world()
    world.kill(4)
    while verdict(world.run(20)).state == "healthy":
        assert world.now_ms - samples.START_MS < 32_000
    after_ms = world.now_ms - samples.START_MS - 30_000
    assert ELECTION_MS // 4 <= after_ms <= 800
    assert not world.view.voter(4).silent


def test_a_dead_leader_is_told_within_its_bound():
    world = healthy_world()
    world.kill(3)
    while verdict(world.run(20)).state == "healthy":
        assert world.now_ms - samples.START_MS < 32_000
    assert world.now_ms - samples.START_MS - 30_000 <= LEADER_SILENT_MS + 300


def test_while_we_have_listened_for_a_moment_only_nothing_is_called_healthy_or_dead():
    for lost, wanted in ((set(), {"unknown", "no leader"}), ({1, 2, 3, 4, 5}, {"unknown"})):
        world = World()
        world.lost = lost
        view = world.run(60)
        assert verdict(view).state in wanted
        assert verdict(view).state != "healthy"
    assert verdict(View()).state == "unknown"
    opened = reduce(View(), Opened(5, "demo", (1, 2, 3), 1_000, "live"))
    assert verdict(opened).state == "unknown" and verdict(opened).level != "ok"


def test_that_we_hear_nothing_is_not_said_of_the_quorum():
    world = healthy_world()
    world.lost = set(world.peers)
    states = {verdict(world.run(20)).state for _ in range(25)}
    assert states == {"healthy", "degraded"}  # half a second: its word is late, no more is known
    assert "voter 3 leads and is not heard for" in verdict(world.view).words


def test_the_longer_nobody_is_heard_the_older_it_says_it_is():
    world = healthy_world()
    quiet(world)
    one = verdict(world.view)
    two = verdict(world.run(20_000))
    assert one.state == two.state == "unknown" and one.words != two.words
    assert "23 s" in two.words or "24 s" in two.words


def test_an_election_says_who_asks_and_who_stands_and_since_when():
    said = verdict(samples.election())
    assert said.state == "no leader" and said.leader == 0
    assert "voter 2 stands under ballot 0.18.2" in said.words and "voter 5 asks" in said.words
    assert "1.1 s" in said.words or "1.2 s" in said.words


def test_no_quorum_says_who_is_missing_and_that_nothing_is_lost():
    view = samples.no_quorum()
    said = verdict(view)
    assert said.state == "no quorum" and "voters 1, 3 and 4" in said.words
    assert "othing is lost" in said.words + findings(view)[0].advice


def test_two_that_claim_to_lead_are_told_and_the_higher_ballot_counts():
    world = healthy_world()
    deposed(world)
    assert verdict(world.view).leader == 2
    (words,) = [each.words for each in findings(world.view) if each.code == "two_leaders"]
    assert "voter 3" in words


def test_a_leader_that_only_the_others_hear_is_no_election():
    world = healthy_world()
    world.lost = {3}
    view = world.run(5_000)
    said = verdict(view)
    assert (said.state, said.leader, said.can_lose) == ("degraded", 3, 1)
    assert "not heard here" in said.words
    assert {"leader_unheard", "voter_silent"} == codes(view)
    world.kill(3)  # what the followers said of it before is no word of its life now
    view = world.run(1_600)
    assert verdict(view).state == "no leader"


def test_what_followers_said_before_their_leader_was_missed_is_no_word_of_its_life():
    for phase_ms in range(0, 900, 60):
        world = healthy_world()
        world.run(phase_ms)
        world.kill(3)
        said = verdict(world.run(1_000))
        assert said.state == "no leader", (phase_ms, said)


def test_an_isolated_leader_says_since_when_no_quorum_answers():
    world = healthy_world()
    cut_off_leader(world)
    said = verdict(world.view)
    assert "no answer from a quorum" in said.words and "ms" in said.words


# --- what is worth knowing, and no more than that -----------------------------------------------


def test_what_is_worth_a_note_leaves_the_verdict_healthy():
    world = healthy_world()
    world.peers[2].skew_ms = 5_000
    world.run(2_000)
    assert verdict(world.view).state == "healthy"
    assert [each.level for each in findings(world.view)] == ["note"]
    assert "5.0 s" in about(world.view, "voter 2")[0]


def test_versions_that_differ_are_not_healthy_and_no_more_than_a_note():
    world = healthy_world()
    world.peers[2].version = "0.2.0"
    said = verdict(world.run(1_500))
    assert (said.level, said.state, said.can_lose) == ("note", "degraded", 2)
    assert "0.2.0" in said.words and codes(world.view) == {"versions"}


@pytest.mark.parametrize(
    ("harm", "subject", "words"),
    [
        (lambda world: setattr(world.peers[2], "free_bytes", 200 << 20), "voter 2", "200.0 MiB"),
        (lambda world: setattr(world.peers[2], "fsync_us", 60_000), "voter 2", "120 ms"),
        (lambda world: setattr(world.peers[2], "fsync_us", 15_000), "voter 2", "30 ms"),
    ],
)
def test_disks_that_are_nearly_full_or_slow_are_named(harm, subject, words):
    world = healthy_world()
    harm(world)
    world.run(2_000)
    assert any(words in each for each in about(world.view, subject)), findings(world.view)


def test_disks_alike_are_not_called_slow():
    world = healthy_world()
    for peer in world.peers.values():
        peer.fsync_us = 9_000
    world.run(2_000)
    assert not findings(world.view)


def test_a_loop_of_restarts_and_leaders_that_come_and_go_are_told():
    world = healthy_world()
    for round_ in range(18, 23):
        world.kill(5)
        world.run(300)
        world.restart(5)
        world.run(1_700)
        world.lead(1 + round_ % 4, round_)
        world.run(2_000)
    told = codes(world.view, "warn", "bad")
    assert {"boot_loop", "elections"} <= told
    world.run(70_000)
    assert not findings(world.view) and verdict(world.view).state == "healthy"


def test_listeners_that_lag_are_named_the_worst_first_and_the_cluster_is_healthy():
    view = samples.lagging()
    said = [each for each in findings(view) if each.code == "listener_behind"]
    assert said[0].subject == "listener cache-17" and "12,000 slots" in said[0].words
    assert verdict(view).state == "healthy" and verdict(view).leader == 3


def test_hundreds_of_listeners_that_lag_are_few_findings():
    world = healthy_world(listeners=300)
    for name in world.listeners:
        world.listeners[name] = 50_000
    world.run(4_000)
    assert len([each for each in findings(world.view) if "listener" in each.code]) <= 12
    assert verdict(world.view).state == "healthy"


REPORT = ListenerReport("twin", 7, 900, 880, 900, 0, True, 0, 0, 0, 0, 50, "0.1.0")


def test_one_name_twice_is_told_and_a_restart_is_not():
    world = healthy_world()
    again = msgspec.structs.replace(REPORT, instance=8)
    world.tell(Reported(world.now_ms, REPORT))
    world.run(1_000)
    world.tell(Reported(world.now_ms, again))
    assert "listener_twice" in codes(world.view)
    world = healthy_world()
    world.tell(Reported(world.now_ms, REPORT))
    world.run(3_000)  # it was killed, and is up again for a moment
    world.tell(Reported(world.now_ms, msgspec.structs.replace(again, uptime_s=0)))
    assert "listener_twice" not in codes(world.view)


def test_the_own_listener_that_is_behind_is_told_of_here_and_not_of_the_cluster():
    world = healthy_world()
    at_ms = world.now_ms
    world.tell(Followed(at_ms, 5, 5, world.slot, False, 0, {}))
    assert verdict(world.view).state == "healthy"
    (found,) = [each for each in findings(world.view) if each.subject == "here"]
    assert found.code == "here_behind" and "behind" in found.words


def test_findings_come_the_worst_first():
    world = healthy_world()
    cut_off_leader(world)
    world.peers[2].version = "0.2"
    world.run(1_000)
    ranks = [LEVELS.index(each.level) for each in findings(world.view)]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == LEVELS.index("bad")


# --- never falsely healthy ------------------------------------------------------------------------


def truly_well(world: World) -> bool:
    """Is a majority reachable by a leader and by us, as the world knows, not as anybody says?"""
    return well_for(world) > 0


def well_for(world: World) -> int:
    leader = world.leader
    if leader is None or leader.voter in world.lost:
        return 0
    good = [
        peer
        for peer in world.peers.values()
        if peer.running
        and (peer.voter, leader.voter) not in world.deaf
        and (leader.voter, peer.voter) not in world.deaf
    ]
    return max(0, len(good) - world.majority + 1)


@SLOW
@given(seed=st.integers(0, 10**6))
def test_never_healthy_without_a_leader_and_a_majority_that_are_heard_now(seed):
    """The world breaks at random. Whatever it was for longer than the bounds, healthy it is not
    unless it was well, and everybody is heard."""
    chance = random.Random(seed)
    world = healthy_world(chance.choice((3, 5, 7)), listeners=0)
    ids, round_, ill_since = list(world.peers), 18, None
    dead: dict[int, int] = {}
    for _ in range(chance.randint(3, 10)):
        voter, other = chance.sample(ids, 2)
        match chance.randrange(9):
            case 0 | 1:
                world.kill(voter)
                dead.setdefault(voter, world.now_ms)
            case 2 if not world.peers[voter].running:
                world.restart(voter)
                del dead[voter]
            case 3 if world.peers[voter].running:
                world.lead(voter, round_)
                round_ += 1
            case 4:
                world.deaf |= {(voter, other)}
            case 5:
                world.deaf |= {(voter, each) for each in ids} | {(each, voter) for each in ids}
            case 6:
                world.lost |= {voter}
            case 7:
                world.lost, world.deaf = set(), set()
            case _:
                world.lost = set(ids)
        for _ in range(chance.choice((3, 12, 60))):
            world.run(100)
            view = world.view
            said = verdict(view)
            assert said.state in ("healthy", "degraded", "no leader", "no quorum", "unknown")
            if truly_well(world):
                ill_since = None
            elif ill_since is None:
                ill_since = world.now_ms
            ages = {
                each.voter: view.now_ms - each.heard_ms
                for each in view.voters
                if each.heard_ms is not None
            }
            fresh = [each for each, ms in ages.items() if ms <= VOTER_SILENT_MS]
            leads = [
                each
                for each in view.voters
                if each.tip and each.tip.leading and ages[each.voter] <= LEADER_SILENT_MS
            ]
            if len(fresh) < world.majority or not leads:
                assert said.state != "healthy", said
            if ill_since is not None and world.now_ms - ill_since > 1_200:
                assert said.state != "healthy", (said, world.deaf, world.lost)
            if said.state == "healthy":
                assert len(fresh) == len(ids) and said.leader and said.level in ("ok", "note")
                for each, at_ms in dead.items():
                    assert world.now_ms - at_ms <= 800, (each, said)


@SLOW
@given(seed=st.integers(0, 10**6), gap_ms=st.integers(0, 20_000))
def test_time_alone_makes_nothing_healthy(seed, gap_ms):
    """If nothing more is heard, what was healthy is not for longer than the bound of a leader."""
    world = healthy_world(random.Random(seed).choice((3, 5, 7)), listeners=0)
    view = reduce(world.view, Clock(world.now_ms + gap_ms))
    if gap_ms > LEADER_SILENT_MS + 100:
        assert verdict(view).state != "healthy"
    if gap_ms > VOTER_SILENT_MS:
        assert verdict(view).state == "unknown"


@SLOW
@given(seed=st.integers(0, 10**6))
def test_whatever_a_view_holds_all_that_is_said_can_be_said(seed):
    """No state makes the words fail."""
    chance = random.Random(seed)
    world = healthy_world(chance.choice((1, 3, 5)), listeners=3)
    for peer in world.peers.values():
        if chance.random() < 0.5:
            peer.running = chance.random() < 0.7
            peer.ballot = chance.choice((NO_BALLOT, Ballot(3, 1, 9), peer.ballot))
            peer.role = chance.choice(("leader", "polling", "candidate", "follower", "emperor", ""))
            peer.version = chance.choice(("", "[red]x", "\x1b[2J", "v" * 300))
            peer.lag = chance.choice((0, -5, 10**12))
            peer.fsync_us = chance.choice((0, -1, 10**9))
            peer.quorum_age_ms = chance.choice((None, -1, 10**9))
    world.heard = {key: ms for key, ms in world.heard.items() if chance.random() < 0.6}
    view = world.run(chance.choice((100, 4_000)))
    assert isinstance(verdict(view), Verdict)
    for each in findings(view):
        assert each.words and each.level in LEVELS
    explain_all(view)


# --- explain ------------------------------------------------------------------------------------


def explain_all(view: View) -> list[str]:
    texts = [advice.explain_voter(view, each) for each in range(8)]
    texts += [
        advice.explain_ballot(view, each) for each in ("0.17.3", "0.0.0", "9.9.9", "", "a`b[c](d)")
    ]
    texts += [
        advice.explain_slot(view, each)
        for each in (-1, 0, 1, view.tip_slot - 3, view.tip_slot, view.tip_slot + 5, 10**12)
    ]
    texts += [advice.explain_listener(view, *key) for key in view.listeners]
    texts.append(advice.explain_listener(view, "no such", 1))
    assert all(each.startswith("# ") and "\n\n" in each for each in texts)
    return texts


@pytest.mark.parametrize(
    "view", [samples.healthy(), samples.election(), samples.two_down(), samples.no_quorum(), View()]
)
def test_everything_can_be_explained_in_every_state(view):
    explain_all(view)


def test_a_voter_that_is_gone_says_so_first_and_what_to_do_and_what_is_left():
    text = advice.explain_voter(samples.two_down(), 4)
    assert "13 s ago" in text or "12 s ago" in text
    assert "`systemctl status trex-voter@4`" in text.replace("\\", "")
    assert "othing is lost" in text and "can lose no more" in text


def test_a_voter_explains_what_promised_accepted_and_fixed_mean():
    text = advice.explain_voter(samples.healthy(), 3)
    for word in ("leads", "promised", "accepted", "fixed", "applied", "majority", "sync"):
        assert word in text
    assert "restart" in text


def test_a_ballot_says_who_stood_and_led_under_it_and_whether_it_is_the_highest():
    view = samples.election()
    assert "voter 3 led" in advice.explain_ballot(view, "0.17.3")
    assert "voter 2 stood" in advice.explain_ballot(view, "0.18.2")
    assert "highest" in advice.explain_ballot(samples.healthy(), "0.17.3")
    assert "voter 1 led" in advice.explain_ballot(samples.healthy(), "0.16.1")


def test_a_slot_says_what_it_holds_and_that_it_is_fixed():
    view = samples.healthy()
    seen = view.slots[-2]
    text = advice.explain_slot(view, seen.slot).replace("\\", "")
    assert "fixed" in text and seen.kind in text and f"{seen.slot:,}" in text
    assert "proposed" in advice.explain_slot(view, view.tip_slot + 5)
    assert "empty" in advice.explain_slot(view, view.tip_slot + 5_000)


@pytest.mark.parametrize(
    "name",
    [
        "[x](javascript:alert)",
        "`code`",
        "**bold**",
        "<script>",
        "# head",
        "a\nb",
        "\x1b[2J",
        "$(x)",
    ],
)
def test_names_from_outside_steer_neither_markdown_nor_the_terminal(name):
    from markdown_it import MarkdownIt

    world = healthy_world()
    report = msgspec.structs.replace(REPORT, name=name, version=name, tip=90_000)
    world.tell(Reported(world.now_ms, report))
    text = advice.explain_listener(world.view, name, REPORT.instance)
    assert all(each.isprintable() or each == "\n" for each in text)
    tokens = MarkdownIt("gfm-like").parse(text)
    inner = [child for each in tokens for child in each.children or ()]
    assert not [each for each in inner if each.type in ("link_open", "image", "html_inline")]
    assert not [each for each in tokens if each.type == "html_block"]
    assert sum(each.type == "heading_open" for each in tokens) == 1


# --- real runs -----------------------------------------------------------------------------------


async def replayed(name: str, directory: Path) -> list[tuple[int, Verdict, View]]:
    """The verdict after each event of a recorded run, with its time since the run began."""
    told: list[tuple[int, Verdict, View]] = []
    view = View()
    recording = RUNS / f"{name}.trexrec.gz"
    async with open_replay(recording, directory=directory, speed=60.0) as feed:
        with anyio.fail_after(60):
            while feed.progress is None or feed.progress[0] < feed.progress[1]:
                for event in feed.take():
                    view = reduce(view, event)
                    told.append((view.now_ms - view.since_ms, verdict(view), view))
                await anyio.sleep(0.01)
        for event in feed.take():
            view = reduce(view, event)
            told.append((view.now_ms - view.since_ms, verdict(view), view))
    return told


def falsely_healthy(told: list[tuple[int, Verdict, View]]) -> list[int]:
    """Moments at which a voter or the leader was unheard for longer than its bound."""
    found = []
    for at_ms, said, view in told:
        silent = [
            each
            for each in view.voters
            if each.heard_ms is None
            or view.now_ms - each.heard_ms > views_bound(each.tip is not None and each.tip.leading)
        ]
        if said.state == "healthy" and silent:
            found.append(at_ms)
    return found


def views_bound(leads: bool) -> int:
    return LEADER_SILENT_MS if leads else VOTER_SILENT_MS


async def test_a_recorded_failover_is_told_as_it_was(tmp_path):
    told = await replayed("failover", tmp_path)
    view = told[-1][2]
    (down,) = [each for each in view.spans if each.role == "down"]
    died_ms = down.from_ms - view.since_ms
    after = [(at_ms, said) for at_ms, said, _ in told if at_ms > died_ms]
    unwell_ms = next(at_ms for at_ms, said in after if said.state != "healthy")
    assert unwell_ms - died_ms <= 1_500
    leads = [each for each in view.spans if each.role == "leader"]
    assert [each.voter for each in leads] == [down.voter, leads[1].voter]
    assert leads[0].to_ms == down.from_ms and leads[1].from_ms > down.from_ms
    assert leads[1].ballot > leads[0].ballot and leads[1].to_ms is None
    words = [f"{each.subject} {each.words}" for each in view.log]
    assert (
        f"voter {leads[1].voter} leads under ballot {leads[1].ballot}: a quorum promised" in words
    )
    assert any(each.startswith(f"voter {down.voter} restarted (boot 2)") for each in words)
    last = told[-1][1]
    assert (last.state, last.leader, last.can_lose) == ("healthy", leads[1].voter, 2)
    assert not falsely_healthy(told)


async def test_a_recorded_loss_of_the_majority_is_told_as_it_was(tmp_path):
    told = await replayed("quorum", tmp_path)
    states = [said.state for _, said, _ in told]
    assert "no quorum" in states and states[-1] == "healthy"
    view = told[-1][2]
    third_ms = sorted(each.from_ms - view.since_ms for each in view.spans if each.role == "down")[2]
    again_ms = max(each.from_ms - view.since_ms for each in view.spans if each.role == "leader")
    during = [said for at_ms, said, _ in told if third_ms + 1_500 < at_ms < again_ms]
    assert during and {each.state for each in during} <= {"no quorum", "no leader"}
    assert all(each.can_lose == 0 for each in during)
    assert not falsely_healthy(told)


async def test_a_recorded_listener_that_lags_is_named_and_the_cluster_is_healthy(tmp_path):
    told = await replayed("lagging", tmp_path)
    named = {
        each.subject
        for _, _, view in told[::20]
        for each in findings(view)
        if "listener" in each.code
    }
    assert "listener cache-3" in named
    began = next(at for at, (_, said, _) in enumerate(told) if said.state == "healthy")
    assert {said.state for _, said, _ in told[began:]} <= {"healthy", "degraded"}
    assert not falsely_healthy(told)
