"""The feed: what a listener hears as events; recordings, whole and broken; their replay."""

from __future__ import annotations

import gzip
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio
import msgspec
import pytest

from dashboard import feed as feeds
from dashboard import recording as recordings
from dashboard.dash import default_name
from dashboard.feed import PENDING_MAX, Feed, open_feed, open_replay
from dashboard.recording import EventFrame, Header, Recorder, Recording, RecordingError
from dashboard.view import (
    SLOTS_MAX,
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
    Tipped,
    Trouble,
)
from listeners.source import SourceError
from tests.credentials import folder
from tests.listeners.backbone import BALLOT, DIGEST, Backbone, make_cluster
from tests.listeners.test_listener import cut_snapshot
from tests.listeners.workload import engine, put, workload
from trex_core.cluster import ConfigError
from trex_core.messages import Ballot, Kind, ListenerReport, StreamTip, Value, encode_value
from trex_core.metadata.commands import LEVEL, LeaseGrant, LeaseRevoke, MemberJoin, MemberUpdate
from trex_core.metadata.state import state_chunks
from trex_core.state import FixedRun
from trex_core.wire import Identity, encode_body

DEADLINE_S = 20
RUNS = Path(__file__).parent / "recordings"
E_ = TypeVar("E_", bound=Event)
NOOP = encode_value(Value(Kind.NOOP, BALLOT))
REPORT = ListenerReport("cache-1", 77, 5, 4, 9, 1500, True, 1, 2, 3, 0, 60, "0.1.0")
TABLES = ("members", "ring", "config", "leases", "commits", "history", "ballots")


@pytest.fixture
async def backbone():
    made = Backbone(make_cluster())
    async with made.serving():
        yield made
    made.close()


def following(backbone: Backbone, place: Path, record: Path | None = None):
    return open_feed(
        backbone.cluster, folder(backbone.cluster), name="dash", directory=place, record=record
    )


async def until(feed: Feed, there: Callable[[list[Event]], bool]) -> list[Event]:
    """All events until ``there`` says that they are enough."""
    events: list[Event] = []
    with anyio.fail_after(DEADLINE_S):
        while not there(events):
            events += feed.take()
            await anyio.sleep(0.02)
    return events


def of(events, kind: type[E_]) -> list[E_]:
    return [event for event in events if isinstance(event, kind)]


def stream(backbone: Backbone, *values: Value) -> int:
    """Fix ``values`` and multicast them."""
    first = backbone.tip + 1
    last = backbone.append(*values)
    backbone.stream(first, last)
    return last


def say(backbone: Backbone, report: ListenerReport) -> None:
    """Multicast ``report`` as another listener does."""
    identity = Identity(backbone.identity.cluster_id, 0, 99)
    (data,) = backbone.sealed(identity, encode_body(report))
    backbone.send_raw(data, repair_port=True)


def content(feed: Feed) -> bytes:
    """Its state, as bytes."""
    return b"".join(state_chunks(feed.listener.state))


async def tables(feed: Feed) -> dict[str, list[str]]:
    """All that its SQL tells, whole."""
    told = {}
    for table in TABLES:
        result = await feed.listener.sql(
            f"SELECT * FROM {table}", at_least=feed.listener.applied, deadline_s=DEADLINE_S
        )
        told[table] = sorted(map(repr, (result.columns, *result.rows)))
    return told


# --- live -------------------------------------------------------------------------------------


async def test_it_opens_at_once_though_nobody_is_heard(tmp_path):
    cluster = make_cluster()
    async with open_feed(cluster, folder(cluster), name="dash", directory=tmp_path) as feed:
        opened, *middle, clock = feed.take()
        assert isinstance(opened, Opened)
        assert (opened.voters, opened.source, opened.cluster) == ((1, 2, 3), "live", "test")
        assert opened.election_ms == 1000
        assert isinstance(clock, Clock) and clock.at_ms >= opened.at_ms
        assert not of(middle, Tipped) and not of(middle, Trouble)
        assert [event.ready for event in of(middle, Followed)] == [False]
        assert feed.progress is None
        feed.speed = 7.0
        assert feed.speed == 1.0


async def test_tips_slots_and_reports_become_events_in_order(backbone, tmp_path):
    async with following(backbone, tmp_path) as feed:
        say(backbone, REPORT)
        last = stream(backbone, put("a", "1"), Value(Kind.NOOP, BALLOT), put("b", "22"))
        events = await until(
            feed,
            lambda seen: feed.listener.applied == last and of(seen, Tipped) and of(seen, Reported),
        )
    times = [event.at_ms for event in events]
    assert times == sorted(times)
    assert {event.voter for event in of(events, Tipped)} == {1}
    said = of(events, Tipped)[0].tip.digest
    assert msgspec.structs.replace(said, time_ms=0) == DIGEST
    assert [event.report for event in of(events, Reported)] == [REPORT]
    fixed = of(events, Fixed)
    assert fixed[0].first == 1
    assert [each.slot for one in fixed for each in one.newest] == list(range(1, last + 1))
    seen = {each.slot: each for one in fixed for each in one.newest}
    assert (seen[1].kind, seen[2].kind, seen[3].kind) == ("genesis", "config_put", "noop")
    assert (seen[4].key, seen[4].ballot) == ("b", BALLOT)
    assert [event.tip for event in of(events, Followed)][:1] == [0] or of(events, Followed)


async def test_kind_and_key_of_a_slot_are_those_of_commits(backbone, tmp_path):
    async with following(backbone, tmp_path) as feed:
        last = stream(backbone, *workload(random.Random(3), 60))
        events = await until(feed, lambda _: feed.listener.applied == last)
        events += feed.take()
        seen = [each for one in of(events, Fixed) for each in one.newest]
        rows = await feed.listener.sql(
            "SELECT slot, kind, coalesce(key, ''), bytes, ballot FROM commits ORDER BY slot",
            at_least=last,
        )
    told = [(one.slot, one.kind, one.key, one.size_bytes, str(one.ballot)) for one in seen]
    assert told == list(rows.rows)


async def test_of_many_slots_only_the_newest_are_told_in_detail(backbone, tmp_path):
    async with following(backbone, tmp_path) as feed:
        feed.take()
        last = stream(backbone, *(put("k", str(n)) for n in range(1000)))
        await feed.listener.wait_applied(last, DEADLINE_S)
        fixed = of(feed.take(), Fixed)
    assert sum(one.last - one.first + 1 for one in fixed) == last
    assert [each.slot for one in fixed for each in one.newest] == [
        *range(last - SLOTS_MAX + 1, last + 1)
    ]


async def test_members_come_change_and_go_in_words(backbone, tmp_path):
    stream(backbone, engine(MemberJoin("old")))
    async with following(backbone, tmp_path) as feed:
        await feed.listener.wait_ready(DEADLINE_S)
        feed.take()  # what was before is no news
        lease = stream(backbone, engine(LeaseGrant(1000)))
        stream(backbone, engine(MemberJoin("m", zone="z1", weight=3, lease=lease)))
        stream(backbone, engine(MemberUpdate("m", state="draining", weight=2)))
        last = stream(backbone, engine(LeaseRevoke(lease)))
        await feed.listener.wait_applied(last, DEADLINE_S)
        moved = of(feed.take(), MemberMoved)
        assert [(each.member, each.slot - lease, each.words) for each in moved] == [
            ("m", 1, "joined in zone z1, up, weight 3"),
            ("m", 2, "state up → draining, weight 3 → 2"),
            ("m", 3, "left: its lease ended"),
        ]
        last = stream(backbone, *(engine(MemberJoin(f"n{n}")) for n in range(127)))
        await feed.listener.wait_applied(last, DEADLINE_S)
        (many,) = of(feed.take(), MemberMoved)
        assert (many.member, many.slot, many.words) == ("", last, "127 members changed")


async def test_who_led_before_is_told_once(backbone, tmp_path):
    earlier = Ballot(0, 1, 2)
    stream(backbone, Value(Kind.ENGINE, earlier, 1_600_000_000_000, command=put("a", "1").command))
    stream(backbone, put("a", "2"))
    async with following(backbone, tmp_path) as feed:
        events = await until(feed, lambda seen: len(of(seen, PastLed)) == 2)
        led = of(events, PastLed)
    assert [(one.ballot, one.first_slot, one.last_slot) for one in led] == [
        (BALLOT, 1, 3),
        (earlier, 2, 2),
    ]
    assert (led[1].from_ms, led[1].to_ms) == (1_600_000_000_000,) * 2


async def test_a_jump_is_told(backbone, tmp_path):
    last = stream(backbone, *(put(f"k{n}", "v") for n in range(20)))
    cut_snapshot(backbone)
    async with following(backbone, tmp_path) as feed:
        events = await until(feed, lambda seen: bool(of(seen, Jumped)))
        assert [(one.from_slot, one.to_slot) for one in of(events, Jumped)] == [(0, last)]
        assert len(feed.listener.state.config) == 20


async def test_a_listener_that_fails_leaves_what_it_knew(backbone, tmp_path):
    async with following(backbone, tmp_path) as feed:
        good = stream(backbone, put("a", "1"))
        await feed.listener.wait_applied(good, DEADLINE_S)
        stream(backbone, Value(Kind.ENGINE, BALLOT, command=bytes((0xC1, LEVEL + 1, 0x90))))
        events = await until(feed, lambda seen: bool(of(seen, Trouble)))
        assert "upgrade" in of(events, Trouble)[-1].text
        assert feed.listener.state.config["a"].value == "1"
        (later,) = [event for event in feed.take() if not isinstance(event, Followed)]
        assert isinstance(later, Clock)


async def test_a_group_that_cannot_be_joined_is_a_clear_error(tmp_path):
    cluster = make_cluster()
    stream_away = msgspec.structs.replace(cluster.stream, interface="203.0.113.9")
    away = msgspec.structs.replace(cluster, stream=stream_away)
    with pytest.raises(SourceError, match=r"203\.0\.113\.9.*\[stream\]"):
        async with open_feed(
            away, folder(away), name="dash", directory=tmp_path, record=tmp_path / "r"
        ):
            pytest.fail("it opened")
    assert not (tmp_path / "r").exists()


async def test_an_error_of_the_block_leaves_as_it_is(backbone, tmp_path):
    with pytest.raises(KeyError, match="mine"):
        async with following(backbone, tmp_path):
            raise KeyError("mine")


def test_what_nobody_takes_is_bounded_and_no_slot_is_lost():
    now = 0
    inbox = feeds._Inbox(lambda: now)
    slot = 0
    for now in range(60_000):
        voter = now % 5 + 1
        tip = StreamTip(BALLOT, False, slot, b"", msgspec.structs.replace(DIGEST, boot=now))
        inbox.heard(voter, tip)
        if now % 3 == 0:
            inbox.delivered(FixedRun(slot + 1, b"", (NOOP,) * 4, (b"",) * 4))
            slot += 4
            inbox._close_slots()
        if now % 7 == 0:
            inbox.reported(msgspec.structs.replace(REPORT, applied=now))
        assert len(inbox._events) <= PENDING_MAX
    events = inbox.take()
    fixed = of(events, Fixed)
    assert [one.first for one in fixed] == [1, *(one.last + 1 for one in fixed[:-1])]
    assert fixed[-1].last == slot
    assert [each.slot for one in fixed for each in one.newest] == [*range(slot - 127, slot + 1)]
    times = [event.at_ms for event in events]
    assert times == sorted(times)
    for voter in range(1, 6):
        newest = [one for one in of(events, Tipped) if one.voter == voter][-1]
        assert newest.tip.digest.boot == 60_000 - 6 + voter
    assert of(events, Reported)[-1].report.applied == 59_997
    assert inbox.take() == ()


# --- recording and replay ---------------------------------------------------------------------


async def recorded(backbone: Backbone, tmp_path: Path, name: str = "live") -> tuple[Path, dict]:
    """A recording of a short eventful life, and what SQL said at its end."""
    path = tmp_path / f"{name}.trexrec"
    stream(backbone, put("before", "1"))
    async with following(backbone, tmp_path / name, path) as feed:
        await feed.listener.wait_ready(DEADLINE_S)
        feed.take()
        draw = random.Random(5)
        for _ in range(12):
            last = stream(backbone, *workload(draw, 15))
            await feed.listener.wait_applied(last, DEADLINE_S)
            say(backbone, REPORT)
            feed.take()
            await anyio.sleep(0.1)
        await until(feed, lambda _: feed.listener.stored == last)
        told = await tables(feed)
    return path, told


async def test_a_replay_is_as_it_was(backbone, tmp_path):
    path, told = await recorded(backbone, tmp_path)
    async with open_replay(path, directory=tmp_path / "again", speed=0, at_ms=10**9) as feed:
        events = feed.take()
        assert await tables(feed) == told
        assert feed.listener.applied == backbone.tip
        assert feed.source == path.name and feed.cluster == backbone.cluster
        assert feed.progress is not None
        assert feed.progress[0] == feed.progress[1] > 1000
    opened, clock = events[0], events[-1]
    assert isinstance(opened, Opened) and opened.source == path.name
    assert isinstance(clock, Clock) and clock.at_ms == opened.at_ms + feed.progress[1]
    assert len(of(events, Reported)) == 12
    assert of(events, PastLed) and len(of(events, Followed)) >= 2
    assert of(events, MemberMoved)
    assert [(one.good, one.words) for one in of(events, Did)] == [(True, "the recording ends here")]
    assert sum(one.last - one.first + 1 for one in of(events, Fixed)) == backbone.tip
    times = [event.at_ms for event in events]
    assert times == sorted(times)


async def test_events_are_in_order_though_time_passes_while_they_are_made(
    backbone, tmp_path, monkeypatch
):
    """Live and in a replay, whose grid of times may lie between any two readings of the clock."""
    readings = itertools.count(step=90)
    monkeypatch.setattr(feeds._WallClock, "passed_ms", lambda _: next(readings))
    path = tmp_path / "r"
    async with following(backbone, tmp_path / "a", path) as feed:
        await feed.listener.wait_ready(DEADLINE_S)
        live = await until(feed, lambda seen: len(of(seen, Followed)) >= 20)
    async with open_replay(path, directory=tmp_path / "b", speed=0, at_ms=10**9) as feed:
        again = feed.take()
    assert len(of(again, Followed)) >= 20
    for events in (live, again):
        times = [event.at_ms for event in events]
        assert times == sorted(times)


async def test_an_event_that_was_written_late_is_told_when_it_was_written(tmp_path):
    """A frame is written after its event was made: the grid of times of a replay lies between."""
    path, started_ms, late_ms = tmp_path / "r", 1_000_000, 5
    recorder = Recorder(path, Header("1", make_cluster(), "dash", started_ms))
    for number in range(1, 8):
        event = Followed(started_ms + number * (feeds.GRID_MS - 1), 0, 0, 0, True, 0, {})
        recorder.add(EventFrame(event.at_ms - started_ms + late_ms, event))
    recorder.end(3_000)
    await recorder.run()
    async with open_replay(path, directory=tmp_path / "a", speed=0, at_ms=10**9) as feed:
        events = feed.take()
    assert len(of(events, Followed)) == 7
    times = [event.at_ms for event in events]
    assert times == sorted(times)


async def test_the_same_moment_gives_the_same_events(backbone, tmp_path):
    path, _ = await recorded(backbone, tmp_path)
    for at_ms in (0, 700, 1234):
        seen = []
        for number in range(2):
            place = tmp_path / f"{at_ms}-{number}"
            async with open_replay(path, directory=place, speed=0, at_ms=at_ms) as feed:
                assert feed.progress == (at_ms, Recording(path).duration_ms)
                assert feed.listener.stored == feed.listener.applied
                seen.append((feed.take(), feed.listener.applied, feed.take()))
        assert seen[0] == seen[1]
        assert seen[0][0][-1].at_ms == seen[0][0][0].at_ms + at_ms


async def test_a_replay_can_be_paused_hurried_and_ends_by_itself(backbone, tmp_path):
    path, _ = await recorded(backbone, tmp_path)
    async with open_replay(path, directory=tmp_path / "again", speed=0) as feed:
        first = feed.take()
        assert feed.take() == (first[-1],)  # paused: no time passes
        feed.speed = 4.0
        events = await until(feed, lambda _: feed.progress[0] > 300)
        feed.speed = 0.0
        held = [event.at_ms for event in events]
        assert held == sorted(held)
        feed.speed = 1e9
        assert feed.speed == feeds.SPEED_MAX
        events += await until(feed, lambda seen: bool(of(seen, Did)))
        assert feed.speed == 0 and feed.progress[0] == feed.progress[1]
        assert feed.listener.applied == backbone.tip
        feed.speed = 2.0
        assert feed.speed == 0  # nothing is left to play


async def test_a_jump_is_replayed_whole(backbone, tmp_path):
    path = tmp_path / "r"
    async with following(backbone, tmp_path / "a", path) as feed:
        await feed.listener.wait_ready(DEADLINE_S)
        backbone.repairs = False
        backbone.append(*workload(random.Random(7), 30))
        cut_snapshot(backbone)
        to_slot = backbone.tip
        await feed.listener.wait_applied(to_slot, DEADLINE_S)
        last = stream(backbone, put("after", "1"), engine(MemberJoin("m")))
        await feed.listener.wait_applied(last, DEADLINE_S)
        told, state = await tables(feed), content(feed)
    async with open_replay(path, directory=tmp_path / "b", speed=0, at_ms=10**9) as feed:
        assert [(one.from_slot, one.to_slot) for one in of(feed.take(), Jumped)] == [(1, to_slot)]
        assert content(feed) == state
        assert await tables(feed) == told


async def test_a_recording_begins_with_what_its_listener_had_stored(backbone, tmp_path):
    place, path = tmp_path / "kept", tmp_path / "r"
    first = stream(backbone, *workload(random.Random(9), 40))
    async with following(backbone, place) as feed:
        await feed.listener.wait_stored(first, DEADLINE_S)
    async with following(backbone, place, path) as feed:
        assert feed.listener.applied == first
        last = stream(backbone, put("later", "1"))
        await feed.listener.wait_applied(last, DEADLINE_S)
        state = content(feed)
        held = await feed.listener.sql("SELECT * FROM commits WHERE slot > 41", at_least=last)
    async with open_replay(path, directory=tmp_path / "b", speed=0, at_ms=0) as feed:
        assert feed.listener.applied >= first
    async with open_replay(path, directory=tmp_path / "c", speed=0, at_ms=10**9) as feed:
        assert content(feed) == state
        again = await feed.listener.sql("SELECT * FROM commits", at_least=last)
        assert again.rows == held.rows


async def test_a_replay_wants_a_directory_of_its_own(backbone, tmp_path):
    path, _ = await recorded(backbone, tmp_path)
    with pytest.raises(ConfigError, match="a directory of its own"):
        async with open_replay(path, directory=tmp_path / "live"):
            pytest.fail("it opened")


async def test_runs_that_do_not_follow_from_each_other_are_said_so(backbone, tmp_path):
    path = tmp_path / "r"
    recorder = Recorder(path, Header("0", backbone.cluster, "dash", 1000))
    stream(backbone, put("a", "1"), put("b", "2"))
    for first, chain in ((1, backbone.chains[0]), (2, bytes(32))):
        run = recordings.RunFrame(first * 10, first, chain, (backbone.log[first - 1],))
        recorder.add(run)
    recorder.end(100)
    await recorder.run()
    with pytest.raises(RecordingError, match="slot 2 does not follow"):
        async with open_replay(path, directory=tmp_path / "a", at_ms=1000):
            pytest.fail("it opened")
    async with open_replay(path, directory=tmp_path / "b", speed=100.0) as feed:
        events = await until(feed, lambda seen: bool(of(seen, Trouble)))
        assert "slot 2 does not follow" in of(events, Trouble)[0].text
        assert feed.speed == 0


# --- the file ---------------------------------------------------------------------------------


async def small_recording(path: Path) -> bytes:
    """A few frames of each kind but snapshots."""
    recorder = Recorder(path, Header("0.1.0", make_cluster(1), "dash", 1_700_000_000_000))
    recorder.add(recordings.TipFrame(0, 1, StreamTip(BALLOT, True, 1, bytes(32), DIGEST)))
    recorder.add(recordings.RunFrame(5, 1, bytes(32), (NOOP,)))
    recorder.add(recordings.ReportFrame(7, REPORT))
    recorder.add(recordings.EventFrame(9, Followed(9, 1, 1, 1, True, 0, {"a": 1})))
    recorder.end(20)
    await recorder.run()
    return path.read_bytes()  # noqa: ASYNC240


async def test_a_file_cut_off_anywhere_plays_up_to_there(tmp_path):
    whole = await small_recording(tmp_path / "whole")
    path, counts, words = tmp_path / "cut", [], set()
    assert [*Recording(tmp_path / "whole").frames()][-1] == recordings.EndFrame(20)
    assert not Recording(tmp_path / "whole").cut_off
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            read = Recording(path)
        except RecordingError as error:
            words.add("cut off before" if "cut off before" in str(error) else str(error))
            continue
        assert read.cut_off
        counts.append(len(list(read.frames())))
    assert words == {"cut off before", f"{path} is no recording of trex-dash"}
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3, 4}


async def test_any_changed_byte_is_found_and_named(tmp_path):
    whole = await small_recording(tmp_path / "whole")
    path, found = tmp_path / "changed", []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes((whole[at] ^ 0x41,)) + whole[at + 1 :])
        with pytest.raises(RecordingError) as raised:
            Recording(path)
        found.append(str(raised.value))
    assert all(str(path) in words for words in found)
    named = {int(words.split("offset ")[1].split()[0]) for words in found if "offset" in words}
    assert len(named) == 6 and min(named) == 8  # the header, four frames and the end


async def test_a_packed_file_is_read_all_the_same(tmp_path):
    whole = await small_recording(tmp_path / "whole")
    frames = list(Recording(tmp_path / "whole").frames())
    path = tmp_path / "packed"
    packed = gzip.compress(whole)
    path.write_bytes(packed)
    assert list(Recording(path).frames()) == frames
    for size in range(2, len(packed)):
        path.write_bytes(packed[:size])
        try:
            read = Recording(path)
        except RecordingError:
            continue
        assert list(read.frames()) == frames[: len(list(read.frames()))]
        assert read.cut_off or len(packed) - size <= 12  # the end is there, gzip's own is not
    path.write_bytes(packed[:60] + b"\xff\xff\xff" + packed[63:])
    with pytest.raises(RecordingError, match=r"damaged|cannot read"):
        Recording(path)


def test_what_is_no_recording_is_refused_in_words(tmp_path):
    for name, data, words in (
        ("text", b"hello, I am a text", "is no recording of trex-dash"),
        ("empty", b"", "is no recording of trex-dash"),
        ("newer", b"TxReco\x00\x09rest", "has format 9.*with the version of TRex"),
        ("short", b"TxReco\x00\x01", "cut off before"),
        ("packed", gzip.compress(b"hello"), "is no recording"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RecordingError, match=words):
            Recording(tmp_path / name)
    with pytest.raises(RecordingError, match=r"cannot read .*: Is a directory"):
        Recording(tmp_path)
    with pytest.raises(RecordingError, match=r"cannot read .*: No such file"):
        Recording(tmp_path / "nothing")


async def test_a_file_that_is_there_is_not_overwritten(backbone, tmp_path):
    (tmp_path / "r").write_text("precious")
    for path, words in (
        (tmp_path / "r", "not overwritten"),
        (tmp_path, "not overwritten|Is a directory"),
        (tmp_path / "no" / "r", "No such file or directory"),
    ):
        with pytest.raises(RecordingError, match=words):
            async with following(backbone, tmp_path / "place", path):
                pytest.fail("it opened")
    assert (tmp_path / "r").read_text() == "precious"


async def test_a_full_disk_ends_the_recording_only(backbone, tmp_path, monkeypatch):
    opened = os.open

    def full(path, *how):
        if path == tmp_path / "r":
            return opened("/dev/full", os.O_WRONLY)
        return opened(path, *how)

    monkeypatch.setattr(recordings.os, "open", full)
    async with following(backbone, tmp_path, tmp_path / "r") as feed:
        events = await until(feed, lambda seen: bool(of(seen, Trouble)))
        assert "No space left" in of(events, Trouble)[0].text
        assert str(tmp_path / "r") in of(events, Trouble)[0].text
        last = stream(backbone, put("a", "1"))
        await feed.listener.wait_applied(last, DEADLINE_S)
        assert not of(feed.take(), Trouble)


async def test_a_disk_that_does_not_keep_up_ends_the_recording_only(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "WAITING_BYTES_MAX", 1000)
    recorder = Recorder(tmp_path / "r", Header("0", make_cluster(1), "dash", 0))
    for at in range(100):
        recorder.add(recordings.RunFrame(at, 1, bytes(32), (NOOP,)))
    assert "does not keep up" in recorder.trouble
    recorder.end(100)
    await recorder.run()


async def test_killed_while_recording(backbone, tmp_path):
    """What was written within the last second may be missing, nothing else."""
    path, copied = tmp_path / "r", tmp_path / "copied"
    async with following(backbone, tmp_path / "a", path) as feed:
        last = stream(backbone, put("a", "1"))
        await feed.listener.wait_applied(last, DEADLINE_S)
        with anyio.fail_after(DEADLINE_S):
            while path.stat().st_size < 1000:
                await anyio.sleep(0.05)
        shutil.copy(path, copied)
    async with open_replay(copied, directory=tmp_path / "b", speed=0, at_ms=10**9) as feed:
        (did,) = of(feed.take(), Did)
        assert not did.good and "cut off" in did.words
        assert feed.listener.applied == last


def test_a_kept_store_can_be_opened_again_under_the_default_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "höst\n" + "x" * 300)
    assert default_name(kept=True) == "dash-hst" + "x" * 61
    assert default_name(kept=False) == f"{default_name(kept=True)}-{os.getpid()}"


# --- recorded real runs -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["failover", "quorum", "lagging"])
async def test_recorded_real_runs_play_whole(name, tmp_path):
    path = RUNS / f"{name}.trexrec.gz"
    assert path.stat().st_size < 300_000
    async with open_replay(path, directory=tmp_path, speed=0, at_ms=10**9) as feed:
        events = feed.take()
        count = await feed.listener.sql("SELECT count(*), min(slot), max(slot) FROM commits")
        assert count.rows == ((feed.listener.applied, 1, feed.listener.applied),)
        assert not of(events, Trouble)
    roles = {
        (one.voter, one.tip.digest.boot, change.number): change.role
        for one in of(events, Tipped)
        for change in one.tip.digest.transitions
    }
    leaderships = sum(role == "leader" for role in roles.values())
    boots = max(one.tip.digest.boot for one in of(events, Tipped))
    words = {one.words for one in of(events, MemberMoved)}
    names = {one.report.name for one in of(events, Reported)}
    match name:
        case "failover":
            assert (leaderships, boots) == (2, 2)
            assert "left: its lease ended" in words
        case "quorum":
            assert (leaderships, boots) == (3, 2)
        case _:
            assert (leaderships, boots) == (1, 1)
            assert names == {f"cache-{at}" for at in range(1, 7)}
