"""What the doctor says of what was found out: no socket and no disk, only evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import anyio
import msgspec
import pytest

from dashboard import advice, doctor, probes
from dashboard.authority import make_authority
from dashboard.cluster_init import cluster_file
from dashboard.doctor import ALL_WELL, NO_LEADER, WRONG, Evidence, Here, Place, Reply
from dashboard.ports import PortBlock
from dashboard.view import Clock, Opened, Reported, Tipped, View, reduce
from tests.credentials import folder
from trex_core.cluster import parse_cluster
from trex_core.messages import (
    CHAIN_BYTES,
    NO_BALLOT,
    Ballot,
    ListenerDigest,
    ListenerReport,
    PeerView,
    Status,
    StreamTip,
    VoterDigest,
)

CLUSTER = parse_cluster(cluster_file("here", ["127.0.0.1"] * 5, tuple(range(20_001, 20_030))))
VOTERS = CLUSTER.voter_ids
BALLOT = Ballot(0, 4, 2)
LEADER = 2
NOW_MS = 1_700_000_000_000
GIB = 1 << 30


def status(voter, **changes):
    leads = voter == LEADER
    peers = tuple(PeerView(each, 20, 900, 900, 1) for each in VOTERS if each != voter)
    told = Status(
        id=1, voter=voter, role="leader" if leads else "follower", leader=LEADER, ballot=BALLOT,
        promised=BALLOT, first_slot=1, last_accepted=900, fixed=900, applied=900,
        chain=bytes(CHAIN_BYTES), boot=1, incarnation=voter, journal_bytes=32 << 20, segments=2,
        snapshot_slot=0, free_bytes=90 * GIB, fsync_p50_us=200, fsync_p99_us=2_000,
        quorum_age_ms=20, counters={}, peers=peers, version="1.0", uptime_s=500, time_ms=NOW_MS,
    )  # fmt: skip
    return msgspec.structs.replace(told, **changes)


def tip(voter, *, leading=None, ballot=BALLOT, **changes):
    leads = voter == LEADER if leading is None else leading
    digest = VoterDigest(
        role="leader" if leads else "follower", promised=ballot, last_accepted=900, fixed=900,
        applied=900, journal_bytes=32 << 20, free_bytes=90 * GIB, fsync_us=200, version="1.0",
        boot=1, uptime_s=500, time_ms=NOW_MS, proposed=900 if leads else 0, quorum_age_ms=20,
        fsync_p50_us=200, fsync_p99_us=2_000,
        heard_ms=tuple(0 if each == voter else 20 for each in VOTERS),
    )  # fmt: skip
    told = msgspec.structs.replace(digest, **changes)
    return StreamTip(ballot, leads, 900, bytes(CHAIN_BYTES), told)


def view(tips, *, watched_ms=2_500, reports=(), after=None):
    """What was heard of these voters, each to the last; ``after`` is what was seen before."""
    shown = after or reduce(View(), Opened(NOW_MS, "here", VOTERS, 1_000, "live"))
    at_ms = NOW_MS
    while at_ms < NOW_MS + watched_ms:
        at_ms += 80
        for voter, each in tips.items():
            now = msgspec.structs.replace(each.digest, time_ms=at_ms, uptime_s=500 + at_ms // 1000)
            fresh = msgspec.structs.replace(each, digest=now)
            shown = reduce(shown, Tipped(at_ms, voter, fresh))
    for each in reports:
        at_ms += 1
        shown = reduce(shown, Reported(at_ms, each))
    return reduce(shown, Clock(at_ms + 20))


def replies(*, without=(), **changes):
    """What each voter answers over TCP; those ``without`` refuse."""
    return tuple(
        Reply(voter, None, 1, "Connection refused")
        if voter in without
        else Reply(voter, status(voter, **changes), 3)
        for voter in VOTERS
    )


HERE = Here(
    version="1.0", looped=True, drops=0, buffer_bytes=8 << 20, buffer_wanted=8 << 20,
    synchronised=True, files_max=65_536,
)  # fmt: skip


def evidence(**changes):
    """All well, but for ``changes``."""
    found = Evidence(
        cluster=CLUSTER,
        source="cluster.toml",
        view=view({voter: tip(voter) for voter in VOTERS}),
        listened_ms=2_500,
        replies=replies(),
        offsets_ms=dict.fromkeys(VOTERS, 1),
        places=(Place("here", "/data", 90 * GIB, 150, 900),),
        here=HERE,
    )
    return msgspec.structs.replace(found, **changes)


def said(found, check):
    """The lines of a check, and the exit code."""
    diagnosis = doctor.examine(found)
    return [each for each in diagnosis.checks if each.check == check], diagnosis.exit_code


ORDER = [
    "cluster file", "voters", "archives", "multicast stream", "multicast repair",
    "receive buffer", "quorum", "leader", "elections", "lag of voters", "disk room", "disk speed",
    "snapshots", "listeners", "versions", "certificates", "clock", "this machine", "verdict",
]  # fmt: skip


def test_all_well_is_said_of_every_check_in_order_and_exits_0():
    diagnosis = doctor.examine(evidence())
    assert [each.check for each in diagnosis.checks] == ORDER
    assert {each.level for each in diagnosis.checks} == {"ok"}, diagnosis.checks
    assert diagnosis.exit_code == ALL_WELL
    assert "can lose 2" in diagnosis.checks[-1].words


def test_notes_do_not_spoil_the_exit_code():
    here = msgspec.structs.replace(HERE, synchronised=False, buffer_bytes=1 << 20, files_max=256)
    found = evidence(here=here)
    assert said(found, "clock")[0][0].level == "note"
    (buffer,), code = said(found, "receive buffer")
    assert buffer.level == "note" and "net.core.rmem_max=8388608" in buffer.advice
    assert said(found, "this machine")[0][0].level == "note"
    assert code == ALL_WELL


def test_a_dead_voter_is_named_with_how_to_start_it():
    tips = {voter: tip(voter) for voter in VOTERS if voter != 4}
    (line,), code = said(evidence(view=view(tips), replies=replies(without={4})), "voters")
    assert (line.level, line.subject, code) == ("warn", "voter 4", WRONG)
    assert "Connection refused" in line.words and "trex-voter run --id 4" in line.advice


def test_without_quorum_the_exit_code_is_4_though_two_voters_answer():
    tips = {
        voter: tip(voter, leading=False, ballot=NO_BALLOT, role="polling", quorum_age_ms=-1)
        for voter in (1, 3)
    }
    answers = tuple(
        Reply(v, status(v, role="polling", leader=0) if v in (1, 3) else None, 2, "refused")
        for v in VOTERS
    )
    found = evidence(view=view(tips, watched_ms=6_000), replies=answers)
    (quorum,), code = said(found, "quorum")
    assert quorum.level == "bad" and "2 of 5 voters live, 3 needed" in quorum.words
    (leader,), _ = said(found, "leader")
    assert leader.level == "bad" and code == NO_LEADER
    assert doctor.examine(found).checks[-1].level == "bad"


def test_nobody_there_at_all_is_said_and_exits_4():
    found = evidence(view=view({}), replies=replies(without=set(VOTERS)), offsets_ms={})
    diagnosis = doctor.examine(found)
    assert {each.check for each in diagnosis.checks} == set(ORDER)
    assert diagnosis.exit_code == NO_LEADER
    lines, _ = said(found, "voters")
    assert lines[0].level == "bad" and "no voter answers and none is heard" in lines[0].words
    assert len(lines) == 6


def test_multicast_is_blamed_where_tcp_answers_and_the_stream_is_silent():
    found = evidence(view=view({}))
    (line,), code = said(found, "multicast stream")
    assert line.level == "bad" and "multicast does not reach this machine" in line.words
    assert "ttl" in line.advice and "IGMP" in line.advice
    assert code == WRONG, "a leader is known over TCP"
    verdict = doctor.examine(found).checks[-1]
    assert "Over TCP: Voter 2 leads" in verdict.words


def test_one_voter_whose_multicast_does_not_come_is_named():
    tips = {voter: tip(voter) for voter in VOTERS if voter != 5}
    (line,), code = said(evidence(view=view(tips)), "multicast stream")
    assert (line.level, line.subject, code) == ("warn", "voter 5", WRONG)


def test_voters_are_not_blamed_where_only_their_client_port_is_shut():
    (line,), code = said(evidence(replies=replies(without={3})), "voters")
    assert line.subject == "voter 3" and "heartbeats are heard" in line.words
    assert "firewall" in line.advice and code == WRONG


def test_a_group_that_cannot_be_joined_is_said_in_the_words_of_the_error():
    here = msgspec.structs.replace(HERE, trouble="cannot join multicast group")
    found = evidence(here=here, view=view({}))
    (line,), _ = said(found, "multicast stream")
    assert line.level == "bad" and line.words == "cannot join multicast group"


def test_a_machine_that_does_not_hear_itself_is_told_from_a_dead_cluster():
    (line,), code = said(
        evidence(here=msgspec.structs.replace(HERE, looped=False)), "multicast repair"
    )
    assert line.level == "warn" and "did not come back" in line.words and code == WRONG


def test_dropped_datagrams_of_this_machine_are_counted():
    (line,), _ = said(evidence(here=msgspec.structs.replace(HERE, drops=1234)), "multicast stream")
    assert line.level == "warn" and "1,234 datagrams" in line.words


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"fixed": 900 + 50_000}, "lag of voters", "behind"),
        ({"free_bytes": 1 << 20}, "disk room", "less than free_bytes_min"),
        ({"free_bytes": 128 << 20}, "disk room", "below 64.0 MiB a voter stops accepting"),
        ({"fsync_p99_us": 80_000}, "disk speed", "80 ms"),
        ({"journal_bytes": 80 * GIB}, "snapshots", "its journal has 80.0 GiB"),
        ({"applied": 10**7, "fixed": 10**7}, "snapshots", "10,000,000 slots old"),
    ],
)
def test_what_a_voter_tells_of_itself_is_judged(changes, check, words):
    answers = tuple(
        Reply(voter, status(voter, **(changes if voter == 3 else {})), 3) for voter in VOTERS
    )
    tips = {voter: tip(voter, **(changes if voter == 3 else {})) for voter in VOTERS}
    lines, code = said(evidence(replies=answers, view=view(tips)), check)
    assert any(words in each.words for each in lines), lines
    assert lines[0].level in ("warn", "bad") and code == WRONG


def test_archives_that_do_not_answer_are_named():
    answers = (*replies()[:4], msgspec.structs.replace(replies()[4], archive="no answer in 1.5 s"))
    (line,), code = said(evidence(replies=answers), "archives")
    assert (line.level, line.subject, code) == ("warn", "voter 5", WRONG)
    assert "no answer in 1.5 s" in line.words


def test_the_clock_that_differs_is_named_and_not_the_others():
    (line,), code = said(evidence(offsets_ms={1: 0, 2: 3, 3: -1, 4: 90_000, 5: 2}), "clock")
    assert (line.level, line.subject, code) == ("note", "voter 4", ALL_WELL)
    assert "89 s ahead" in line.words
    (line,), _ = said(evidence(offsets_ms=dict.fromkeys(VOTERS, 5_000)), "clock")
    assert line.subject == "here" and "5.0 s behind" in line.words


def test_what_the_dashboard_finds_is_on_the_list_too():
    heard_ms = tuple({2: 0, 4: 5_000}.get(each, 20) for each in VOTERS)
    tips = {voter: tip(voter) for voter in VOTERS}
    tips[LEADER] = tip(LEADER, heard_ms=heard_ms)
    found = evidence(view=view(tips))
    codes = {each.code for each in advice.findings(found.view)}
    assert codes, "the leader does not hear voter 4"
    lines, code = said(found, "voters")
    assert [(each.level, each.subject) for each in lines] == [("warn", "voter 4")] and code == WRONG


def test_a_listener_that_was_started_again_is_not_silent_as_what_it_was_before():
    def report(instance):
        return ListenerReport("cache-1", instance, 900, 900, 900, 0, True, 0, 0, 0, 0, 50, "1.0")

    tips = {voter: tip(voter) for voter in VOTERS}
    shown = reduce(View(), Opened(NOW_MS - 60_000, "here", VOTERS, 1_000, "live"))
    shown = reduce(shown, Reported(NOW_MS - 60_000, report(1)))
    shown = view(tips, after=shown)
    (line,), code = said(evidence(view=shown), "listeners")
    assert (line.level, line.subject, code) == ("warn", "listener cache-1", WRONG)
    shown = reduce(shown, Reported(shown.now_ms, report(2)))
    (line,), code = said(evidence(view=shown), "listeners")
    assert (line.level, code) == ("ok", ALL_WELL)


def test_a_listener_that_repairs_much_is_named_and_one_that_did_long_ago_is_not():
    def report(uptime_s, repairs):
        return ListenerReport(
            "cache-1", 1, 900, 900, 900, 0, True, 0, repairs, 0, 0, uptime_s, "1.0"
        )

    tips = {voter: tip(voter) for voter in VOTERS}
    shown = view(tips, reports=[report(2, 9), report(11, 40)])
    (line,), code = said(evidence(view=shown), "listeners")
    assert (line.level, line.subject, code) == ("note", "listener cache-1", ALL_WELL)
    assert "218 times a minute" in line.words
    shown = reduce(shown, Reported(shown.now_ms + 1, report(3_000, 40)))
    (line,), _ = said(evidence(view=shown), "listeners")
    assert line.level == "ok"


def test_more_listeners_than_were_heard_are_counted_by_a_voter():
    digest = ListenerDigest(known=400, behind=2, silent=1, lag_max=5_000)
    tips = {voter: tip(voter, listeners=digest) for voter in VOTERS}
    (line,), code = said(evidence(view=view(tips)), "listeners")
    assert (line.level, code) == ("warn", WRONG)
    assert "400 listeners known, 2 behind, 1 silent" in line.words


def test_versions_that_differ_are_a_note_with_who_has_which():
    report = ListenerReport("cache-1", 7, 900, 900, 900, 0, True, 0, 0, 0, 0, 50, "0.9")
    tips = {voter: tip(voter) for voter in VOTERS}
    (line,), code = said(evidence(view=view(tips, reports=[report])), "versions")
    assert line.level == "note" and "0.9: listener cache-1" in line.words and code == ALL_WELL


def test_a_disk_that_hangs_here_is_a_warning():
    place = Place("here", "/data", trouble="the disk did not answer in 2 s")
    (line,), code = said(evidence(places=(place,)), "disk speed")
    assert line.level == "warn" and "did not answer" in line.words and code == WRONG


def test_the_list_fits_the_columns_and_hides_no_control_character():
    long = Place("here", "/data/\x1b[31mred", trouble="word " * 60)
    diagnosis = doctor.examine(evidence(places=(long,), replies=replies(without={1, 2})))
    shown = [line.plain for line in doctor.lines(diagnosis, 80)]
    assert max(map(len, shown)) <= 80
    assert not any("\x1b" in line for line in shown)
    assert [line[0] for line in shown if not line.startswith(" ")].count("✓") > 5


def test_a_file_that_cannot_be_read_is_a_diagnosis_too():
    diagnosis = doctor.no_cluster("cannot read the cluster file x")
    assert diagnosis.exit_code == WRONG and diagnosis.checks[0].words.startswith("cannot read")


async def test_work_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(probes, "PROBE_S", 0.05)
    never = anyio.Event()

    def hang():
        anyio.from_thread.run(never.wait, token=token)

    token = anyio.lowlevel.current_token()
    assert await probes._apart(hang, "otherwise") == "otherwise"
    never.set()


async def test_a_name_service_that_hangs_is_not_waited_for(monkeypatch, nobody):
    never = threading.Event()
    monkeypatch.setattr(probes, "PROBE_S", 0.2)
    monkeypatch.setattr(probes.socket, "getaddrinfo", lambda *_args, **_more: never.wait())
    text = nobody.read_text().replace('host = "127.0.0.1"', 'host = "voter.example"')
    cluster = parse_cluster(text)
    assert {each.host for each in cluster.voters} == {"voter.example"}
    with anyio.fail_after(3):
        found = await probes.gather(cluster, folder(cluster), "x", nobody.parent, None, 0.3)
    never.set()
    (line, *_), code = said(found, "voters")
    assert code == NO_LEADER and len(said(found, "voters")[0]) == 4 and line.level == "bad"
    assert all("voter.example is not known here" in each.why for each in found.replies)


async def test_the_disk_probe_leaves_nothing_behind(tmp_path):
    place = await anyio.to_thread.run_sync(probes._place, "here", tmp_path)
    assert place.trouble == "" and 0 < place.sync_p50_us <= place.sync_p99_us
    assert place.free_bytes > 0 and list(tmp_path.iterdir()) == []
    gone = probes._place("here", tmp_path / "gone")
    assert gone.free_bytes is None and "No such file" in gone.trouble


# --- the command ----------------------------------------------------------------------------------


def run_doctor(*arguments, **environment):
    """The real command; its process and how long it took, in seconds."""
    began_s = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", "dashboard.cli", "doctor", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    return ran, time.monotonic() - began_s


@pytest.fixture
def nobody(tmp_path):
    """The cluster file of a cluster of which nothing runs."""
    block = PortBlock()
    path = tmp_path / "cluster.toml"
    path.write_text(cluster_file("nobody", ["127.0.0.1"] * 3, block.ports))
    make_authority(tmp_path, parse_cluster(path.read_text()))
    yield path
    block.close()


def test_the_command_says_that_nobody_is_there_within_its_time(nobody):
    ran, took_s = run_doctor("--config", nobody, "--seconds", "1.2", "--json")
    assert ran.returncode == NO_LEADER, ran
    rows = json.loads(ran.stdout)
    assert [*dict.fromkeys(row["check"] for row in rows)] == ORDER
    assert all(row.keys() == {"check", "level", "subject", "words", "advice"} for row in rows)
    assert rows[-1]["level"] == "bad" and ran.stderr == ""
    assert took_s < 1.2 + 3 + 3, "three seconds more than it listens, and the start of Python"


def test_the_command_prints_a_list_for_people(nobody, tmp_path):
    ran, _ = run_doctor(
        "--seconds", "1.2", "--dir", tmp_path, TREX_CONFIG=str(nobody), COLUMNS="80"
    )
    lines = ran.stdout.splitlines()
    assert ran.returncode == NO_LEADER and max(map(len, lines)) <= 80, ran.stdout
    assert lines[0].startswith("✓ cluster file") and any("verdict" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot read the cluster file"), ("voters = 3", "cluster.toml"), ("\x00", "cluster")],
)
def test_a_bad_cluster_file_is_told_in_words_and_as_json(tmp_path, text, words):
    path = tmp_path / "cluster.toml"
    if text is not None:
        path.write_text(text)
    ran, _ = run_doctor("--config", path, "--json")
    first, verdict = json.loads(ran.stdout)
    assert ran.returncode == WRONG and words in first["words"] and verdict["level"] == "bad"
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_bad_usage_exits_2(seconds):
    ran, _ = run_doctor("--seconds", seconds)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
