"""The listener over real sockets: its guarantees under loss, jumps, restarts, and slow readers."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest

from listeners import (
    BlockingListener,
    CompactedError,
    DeadlineError,
    Lagged,
    ListenerOptions,
    ListenerStoppedError,
    NoStoreError,
    Progress,
    Reset,
    SlotChanges,
    open_listener,
)
from listeners.source import drop_share
from listeners.sql import SqlDeadlineError, SqlInvalidError
from listeners.store import StoreError
from tests.credentials import folder
from tests.listeners.backbone import BALLOT, DIGEST, Backbone, make_cluster
from tests.listeners.workload import engine, put, replayed, same, workload
from trex_core.cluster import ConfigError
from trex_core.learner import LearnerConfig
from trex_core.machine import TooOld
from trex_core.messages import (
    CatchupRequest,
    Kind,
    SnapshotRequest,
    StreamRun,
    StreamTip,
    Value,
)
from trex_core.metadata.commands import (
    LEVEL,
    LeaseGrant,
    LeaseRevoke,
    MemberJoin,
)
from trex_core.metadata.state import EMPTY, MetadataState, ring_of, state_chunks
from trex_core.proof import ContradictionError
from trex_core.snapshot import encode_snapshot
from trex_core.state import chain_next

DEADLINE_S = 20
QUICK = ListenerOptions(learner=LearnerConfig("", (), silence_ms=150, retry_ms=5))


def cut_snapshot(backbone: Backbone) -> None:
    """The voters keep a snapshot of now, and no slot at or below it."""
    state, sessions, _ = replayed(backbone)
    data = b"".join(
        encode_snapshot(
            backbone.tip, backbone.chains[-1], backbone.genesis, sessions, state_chunks(state)
        )
    )
    backbone.snapshot = (backbone.tip, data)
    backbone.retained_from = backbone.tip + 1


@asynccontextmanager
async def cluster(**serving):
    backbone = Backbone(make_cluster())
    try:
        async with backbone.serving(**serving):
            yield backbone
    finally:
        backbone.close()


@pytest.fixture
async def backbone():
    async with cluster(heartbeat_s=0.03) as made:
        yield made


def following(backbone: Backbone, name: str = "one", **arguments):
    return open_listener(
        backbone.cluster,
        folder(backbone.cluster, "listener"),
        name=name,
        seed=1,
        **{"options": QUICK} | arguments,
    )


async def take(subscription, count: int) -> list:
    with anyio.fail_after(DEADLINE_S):
        return [await anext(subscription) for _ in range(count)]


async def take_until(subscription, slot: int) -> list:
    """All deliveries until the bookmark at ``slot``."""
    got = []
    with anyio.fail_after(DEADLINE_S):
        async for delivery in subscription:
            got.append(delivery)
            if isinstance(delivery, Progress) and delivery.slot >= slot:
                break
    return got


# --- following ------------------------------------------------------------------------------


async def test_each_slot_is_applied_told_and_shown(backbone):
    async with following(backbone) as listener:
        await listener.wait_ready(DEADLINE_S)
        subscription = listener.changes()
        slot = backbone.append(put("a", "1"), engine(MemberJoin("m1", zone="z")))
        backbone.stream(slot - 1, slot)
        await listener.wait_applied(slot, DEADLINE_S)
        first, second = await take(subscription, 2)
        assert (first.slot, first.changes[0].key) == (2, "a")
        assert (second.slot, second.changes[0].key) == (3, "m1")
        assert listener.state.config["a"].value == "1"
        assert listener.ring.owner("x") == "m1"
        assert (listener.applied, listener.tip, listener.lag, listener.stored) == (3, 3, 0, None)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
async def test_under_loss_nothing_is_missed_repeated_or_out_of_order(backbone, share):
    draw = random.Random(7)
    async with following(backbone, keep=drop_share(share, "x")) as listener:
        subscription = listener.changes(since=0, progress=True)
        last = 0
        for value in workload(draw, 1500):
            last = backbone.append(value)
            backbone.stream(last, last)
            if last % 20 == 0:
                await listener.wait_applied(last - 60, DEADLINE_S)
        await listener.wait_applied(last, DEADLINE_S)
        state, _, changed = replayed(backbone)
        got = await take_until(subscription, last)
        assert not [d for d in got if isinstance(d, Lagged | Reset)]
        delivered = {d.slot: d.changes for d in got if isinstance(d, SlotChanges)}
        slots = [d.slot for d in got if isinstance(d, SlotChanges)]
        assert slots == sorted(set(slots)), "ordered, unique"
        assert delivered == changed, "reliable, atomic"
        assert same(listener.state, state)
        assert list(listener.ring.ranges()) == list(ring_of(state).ranges())
        if share:
            assert listener.counters["dropped_by_test"] > 0
            assert listener.counters["gap_opened"] > 0
            assert not any(request.responder == 1 for request in backbone.requests), "the leader"
        if share == 0.05:
            repaired = listener.counters["gap_closed_by_repair"]
            assert repaired >= 0.9 * (repaired + listener.counters["gap_closed_by_catchup"])


async def test_a_stream_that_arrives_shuffled_and_twice_is_put_in_order(backbone):
    draw = random.Random(3)
    backbone.repairs = False
    backbone.down = {1, 2, 3}  # nobody helps: order must come from the buffer alone
    async with following(backbone) as listener:
        subscription = listener.changes(since=0)
        first = backbone.tip + 1
        last = backbone.append(*(put(f"k{n}", str(n)) for n in range(300)))
        runs = [(slot, min(slot + 2, last)) for slot in range(1, last + 1, 3)] * 2
        draw.shuffle(runs)
        for start, end in runs:
            backbone.stream(start, end)
        await listener.wait_applied(last, DEADLINE_S)
        got = await take(subscription, 300)
        assert [d.slot for d in got] == list(range(first, last + 1))


async def test_a_lost_last_datagram_is_noticed_by_the_heartbeat(backbone):
    async with following(backbone) as listener:
        await listener.wait_ready(DEADLINE_S)
        last = backbone.append(put("a", "1"))  # never multicast
        await listener.wait_applied(last, DEADLINE_S)
        assert listener.counters["gap_closed_by_repair"] >= 1


async def test_a_value_too_large_for_the_stream_comes_by_catch_up(backbone):
    async with following(backbone) as listener:
        await listener.wait_ready(DEADLINE_S)
        last = backbone.append(put("big", "x" * 900_000))
        backbone.stream(last, last)  # does not fit: nothing is sent
        await listener.wait_applied(last, DEADLINE_S)
        assert listener.counters["gap_closed_by_catchup"] == 1
        assert len(listener.state.config["big"].value) == 900_000


async def test_cold_and_far_behind_it_catches_up_over_tcp_from_whoever_answers(backbone):
    backbone.append(*workload(random.Random(1), 6000))
    backbone.down = {1, 3}
    async with following(backbone) as listener:
        await listener.wait_applied(backbone.tip, DEADLINE_S)
        assert same(listener.state, replayed(backbone)[0])
        assert {voter for voter, _ in backbone.asked} == {2}


async def test_with_the_stream_silent_it_catches_up_over_tcp():
    async with cluster(heartbeat_s=0) as backbone:
        last = backbone.append(put("a", "1"))
        async with following(backbone) as listener:
            await listener.wait_ready(DEADLINE_S)
            await listener.wait_applied(last, DEADLINE_S)


async def test_it_waits_for_voters_that_are_not_there_yet():
    backbone = Backbone(make_cluster())
    last = backbone.append(put("a", "1"))
    try:
        async with following(backbone) as listener:
            with pytest.raises(DeadlineError, match="no tip was heard"):
                await listener.wait_ready(0.3)
            async with backbone.serving(heartbeat_s=0.05):
                await listener.wait_ready(DEADLINE_S)
                await listener.wait_applied(last, DEADLINE_S)
    finally:
        backbone.close()


async def test_a_run_of_another_history_is_counted_and_never_applied(backbone):
    async with following(backbone) as listener:
        await listener.wait_ready(DEADLINE_S)
        forged = [put("a", "forged")]
        data = Backbone(backbone.cluster)
        data.close()
        data.append(*forged)
        wrong = bytes(32)
        message = StreamRun(BALLOT, 2, wrong, (data.log[1],), 2, chain_next(wrong, 2, data.log[1]))
        backbone.send(message)
        last = backbone.append(put("a", "true"))
        backbone.stream(last, last)
        with anyio.fail_after(DEADLINE_S):
            while listener.state.config.get("a") is None:
                await listener.wait_applied(last, DEADLINE_S)
        assert listener.state.config["a"].value == "true"
        assert listener.counters["dropped_signature"] >= 1


async def test_garbage_on_both_ports_is_counted_and_harmless(backbone):
    draw = random.Random(9)
    async with following(backbone) as listener:
        for _ in range(200):
            backbone.send_raw(draw.randbytes(draw.randrange(1400)), repair_port=draw.random() < 0.5)
        last = backbone.append(put("a", "1"))
        backbone.stream(last, last)
        await listener.wait_applied(last, DEADLINE_S)
        assert sum(n for k, n in listener.counters.items() if k.startswith("dropped_")) == 200


async def test_two_listeners_at_one_slot_hold_the_same_bytes(backbone):
    async with (
        following(backbone, "one", keep=drop_share(0.1, "1")) as one,
        following(backbone, "two", keep=drop_share(0.1, "2")) as two,
    ):
        last = 0
        for value in workload(random.Random(4), 500):
            last = backbone.append(value)
            backbone.stream(last, last)
            if last % 20 == 0:
                await asyncio.sleep(0)
        await one.wait_applied(last, DEADLINE_S)
        await two.wait_applied(last, DEADLINE_S)
        assert same(one.state, two.state)
        assert list(one.ring.ranges()) == list(two.ring.ranges())


async def test_the_ring_is_kept_up_with_changes(backbone):
    async with following(backbone) as listener:
        last = 0
        for n in range(40):
            last = backbone.append(engine(MemberJoin(f"m{n}", zone=f"z{n % 4}")))
            backbone.stream(last, last)
            await listener.wait_applied(last, DEADLINE_S)
            ring = listener.ring
            assert ring is listener.ring, "cached while nothing changes"
            assert list(ring.ranges()) == list(ring_of(listener.state).ranges())
        last = backbone.append(put("ring/replication_factor", "2"))
        backbone.stream(last, last)
        await listener.wait_applied(last, DEADLINE_S)
        assert len(listener.ring.replicas("x")) == 2


async def test_a_command_of_a_newer_level_stops_it_with_a_clear_error(backbone, tmp_path):
    with pytest.raises(TooOld, match="upgrade"):  # noqa: PT012
        async with following(backbone, directory=tmp_path) as listener:
            good = backbone.append(put("a", "1"))
            newer = bytes((0xC1, LEVEL + 1, 0x90))
            last = backbone.append(Value(Kind.ENGINE, BALLOT, command=newer))
            backbone.stream(good, last)
            await listener.wait_applied(last, DEADLINE_S)


async def test_a_failed_listener_cancels_its_block(backbone):
    reached = False
    with pytest.raises(TooOld):  # noqa: PT012
        async with following(backbone):
            backbone.append(Value(Kind.ENGINE, BALLOT, command=bytes((0xC1, LEVEL + 1, 0x90))))
            backbone.stream(1, backbone.tip)
            with anyio.fail_after(DEADLINE_S):
                await anyio.sleep_forever()
            reached = True
    assert not reached


async def test_an_error_of_the_block_leaves_as_it_is(backbone):
    with pytest.raises(KeyError):
        async with following(backbone):
            raise KeyError("mine")


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 129])
async def test_a_bad_name_is_refused(backbone, name):
    with pytest.raises(ConfigError, match="1 to 128 printable"):
        async with following(backbone, name):
            pass


# --- snapshots ------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [False, True])
async def test_a_jump_by_snapshot_is_one_exact_reset(backbone, store, tmp_path):
    draw = random.Random(11)
    directory = tmp_path if store else None
    async with following(backbone, directory=directory) as listener:
        subscription = listener.changes(since=0, progress=True)
        early = backbone.append(*workload(draw, 200))
        await listener.wait_applied(early, DEADLINE_S)
        before = listener.state
        got = await take_until(subscription, early)
        # Everybody goes silent; when they are back they have forgotten what was fixed meanwhile.
        backbone.mute = True
        backbone.append(*workload(draw, 300))
        cut_snapshot(backbone)
        jump = backbone.tip
        last = backbone.append(*workload(draw, 50))
        backbone.mute = False
        await listener.wait_applied(last, DEADLINE_S)
        got = await take_until(subscription, last)
        resets = [d for d in got if isinstance(d, Reset)]
        assert [(r.from_slot, r.to_slot) for r in resets] == [(early, jump)]
        after = replayed(backbone, jump)[0]
        assert _patched(before, resets[0].changes) == _rows(after)
        _, _, changed = replayed(backbone)
        assert {d.slot: d.changes for d in got if isinstance(d, SlotChanges)} == {
            slot: changes for slot, changes in changed.items() if slot > jump
        }
        assert same(listener.state, replayed(backbone)[0])
        if store:
            result = await listener.sql(
                "SELECT history_from_slot, (SELECT min(slot) FROM commits),"
                " (SELECT count(*) FROM commits) FROM listener",
                at_least=last,
            )
            assert result.rows == ((jump + 1, jump + 1, 50),)


async def test_a_cold_listener_starts_from_a_snapshot(backbone, tmp_path):
    backbone.append(*workload(random.Random(2), 400))
    cut_snapshot(backbone)
    last = backbone.append(put("after", "1"))
    async with following(backbone, directory=tmp_path) as listener:
        await listener.wait_stored(last, DEADLINE_S)
        assert listener.counters["resets"] == 1
        assert same(listener.state, replayed(backbone)[0])
    asked = len(backbone.asked)
    async with following(backbone, directory=tmp_path) as listener:
        assert same(listener.state, replayed(backbone)[0])
        await listener.wait_ready(DEADLINE_S)
        assert not any(isinstance(r, SnapshotRequest) for _, r in backbone.asked[asked:])


async def test_a_damaged_snapshot_is_not_taken_and_another_voter_is_asked(backbone):
    backbone.append(*workload(random.Random(2), 400))
    cut_snapshot(backbone)
    slot, data = backbone.snapshot
    backbone.snapshot = (slot, data[:200] + bytes(50) + data[250:])
    async with following(backbone) as listener:
        await backbone.until(lambda: listener.counters["catchup_failed"] >= 2)
        assert listener.applied == 0
        backbone.snapshot = (slot, data)
        await listener.wait_applied(slot, DEADLINE_S)
        assert same(listener.state, replayed(backbone)[0])


def _rows(state: MetadataState) -> dict:
    return {
        **{("config", key): row for key, row in state.config.items()},
        **{("member", key): row for key, row in state.members.items()},
        **{("lease", str(key)): row for key, row in state.leases.items()},
    }


def _patched(state: MetadataState, changes) -> dict:
    """The rows of ``state`` after ``changes``, each of which must fit what is there."""
    rows = _rows(state)
    for change in changes:
        assert rows.pop((change.kind, change.key), None) == change.old
        if change.new is not None:
            rows[change.kind, change.key] = change.new
    return rows


# --- subscribers ----------------------------------------------------------------------------


async def test_changes_can_be_chosen_by_kind_and_prefix(backbone):
    async with following(backbone) as listener:
        config = listener.changes(0, kind="config", prefix="a/", progress=True)
        members = listener.changes(0, kind="member", progress=True)
        last = backbone.append(
            put("a/1", "x"), put("b/1", "x"), engine(MemberJoin("a/m")), put("a/2", "x")
        )
        backbone.stream(1, last)
        await listener.wait_applied(last, DEADLINE_S)
        seen = [d for d in await take_until(config, last) if isinstance(d, SlotChanges)]
        assert [(d.slot, d.changes[0].key) for d in seen] == [(2, "a/1"), (5, "a/2")]
        seen = [d for d in await take_until(members, last) if isinstance(d, SlotChanges)]
        assert [(d.slot, d.changes[0].key) for d in seen] == [(4, "a/m")]


async def test_a_lease_that_ends_takes_its_members_in_one_slot(backbone):
    async with following(backbone) as listener:
        subscription = listener.changes(0, progress=True)
        lease = backbone.append(engine(LeaseGrant(1000)))
        backbone.append(*(engine(MemberJoin(f"m{n}", lease=lease)) for n in range(3)))
        last = backbone.append(engine(LeaseRevoke(lease)))
        backbone.stream(1, last)
        await listener.wait_applied(last, DEADLINE_S)
        final = [d for d in await take_until(subscription, last) if isinstance(d, SlotChanges)][-1]
        assert final.slot == last
        assert sorted(c.key for c in final.changes if c.kind == "member") == ["m0", "m1", "m2"]


async def test_a_subscription_resumes_at_the_next_slot(backbone):
    async with following(backbone) as listener:
        last = backbone.append(*(put(f"k{n}", "x") for n in range(20)))
        backbone.stream(1, last)
        await listener.wait_applied(last, DEADLINE_S)
        first = listener.changes(0)
        seen = await take(first, 8)
        again = listener.changes(since=first.slot)
        seen += await take(again, 12)
        assert [d.slot for d in seen] == list(range(2, 22))


async def test_a_slow_subscriber_is_told_once_what_it_missed_and_goes_on(backbone):
    options = ListenerOptions(changes_kept_max=10, learner=QUICK.learner)
    async with following(backbone, options=options) as listener:
        slow, quick = listener.changes(0), listener.changes(0)
        last, seen = backbone.tip, []
        for n in range(30):
            last = backbone.append(put(f"k{n}", "x"))
            backbone.stream(last, last)
            seen += await take(quick, 1)
        assert [d.slot for d in seen] == list(range(2, 32))
        got = await take(slow, 11)
        assert got[0] == Lagged(1, 21)
        assert [d.slot for d in got[1:]] == list(range(22, 32))


async def test_what_is_kept_is_bounded_in_bytes(backbone):
    options = ListenerOptions(changes_bytes_max=10_000, learner=QUICK.learner)
    async with following(backbone, options=options) as listener:
        last = backbone.append(*(put("k", "x" * 1000) for _ in range(50)))
        backbone.stream(1, last)
        await listener.wait_applied(last, DEADLINE_S)
        with pytest.raises(CompactedError) as compacted:
            listener.changes(since=1)
        assert last - 10 < compacted.value.first_slot <= last
        listener.changes(since=compacted.value.first_slot - 1)


async def test_since_zero_brings_the_whole_state_when_the_first_slots_are_gone(backbone):
    options = ListenerOptions(changes_kept_max=10, learner=QUICK.learner)
    async with following(backbone, options=options) as listener:
        last = backbone.append(*workload(random.Random(5), 300))
        backbone.stream(1, last)
        await listener.wait_applied(last, DEADLINE_S)
        (reset,) = await take(listener.changes(0), 1)
        assert (reset.from_slot, reset.to_slot) == (0, last)
        assert _patched(EMPTY, reset.changes) == _rows(listener.state)


async def test_a_subscription_from_the_future_waits_for_it(backbone):
    async with following(backbone) as listener:
        subscription = listener.changes(since=5)
        last = backbone.append(*(put(f"k{n}", "x") for n in range(8)))
        backbone.stream(1, last)
        assert [d.slot for d in await take(subscription, 4)] == [6, 7, 8, 9]


async def test_noops_move_the_bookmark_and_yield_no_change(backbone):
    async with following(backbone) as listener:
        await listener.wait_ready(DEADLINE_S)
        subscription = listener.changes(progress=True)
        assert await take(subscription, 1) == [Progress(1)]
        last = backbone.append(*[Value(Kind.NOOP, BALLOT)] * 5)
        backbone.stream(2, last)
        assert await take(subscription, 1) == [Progress(6)]


async def test_a_thousand_subscribers_cost_the_stream_nothing_they_do_not_read(backbone):
    async with following(backbone) as listener:
        idle = [listener.changes(0) for _ in range(1000)]
        last = backbone.append(*(put(f"k{n}", "x") for n in range(200)))
        backbone.stream(1, last)
        await listener.wait_applied(last, DEADLINE_S)
        assert [d.slot for d in await take(idle[500], 200)] == list(range(2, 202))


async def test_subscriptions_end_with_the_listener(backbone):
    async with following(backbone) as listener:
        subscription = listener.changes()
    with anyio.fail_after(DEADLINE_S):
        assert [d async for d in subscription] == []


@pytest.mark.parametrize("what", ["applied", "stored"])
async def test_who_waits_elsewhere_is_told_when_it_is_closed(backbone, tmp_path, what):
    told: list[str] = []

    async def wait(listener) -> None:
        try:
            await getattr(listener, f"wait_{what}")(99, DEADLINE_S)
        except ListenerStoppedError as error:
            told.append(str(error))

    async with (
        anyio.create_task_group() as tasks,
        following(backbone, directory=tmp_path) as listener,
    ):
        tasks.start_soon(wait, listener)
        await listener.wait_ready(DEADLINE_S)
    assert told == ["listener one was closed"]


async def test_waits_keep_their_deadlines_and_say_where_it_is(backbone, tmp_path):
    async with following(backbone, directory=tmp_path) as listener:
        await listener.wait_ready(DEADLINE_S)
        with pytest.raises(
            DeadlineError, match="slot 99 was not applied; it is at 1, the tip at 1"
        ):
            await listener.wait_applied(99, 0.02)
        with pytest.raises(DeadlineError, match="slot 99 was not stored"):
            await listener.wait_stored(99, 0.02)
        assert not listener._applied_waiters._waiting
        with pytest.raises(SqlDeadlineError):
            await listener.sql("SELECT 1", at_least=99, deadline_s=0.02)


# --- the store ------------------------------------------------------------------------------


async def test_without_a_directory_no_database_is_imported(backbone):
    code = (
        "import sys, anyio\n"
        "from pathlib import Path\n"
        "import msgspec\n"
        "from listeners import open_listener\n"
        "from trex_core.cluster import ClusterConfig\n"
        "cluster = msgspec.json.decode(sys.argv[1].encode(), type=ClusterConfig)\n"
        "async def main():\n"
        "    async with open_listener(cluster, Path(sys.argv[2]), name='x') as listener:\n"
        "        await listener.wait_ready(10)\n"
        "        listener.ring\n"
        "        assert 'duckdb' not in sys.modules\n"
        "anyio.run(main)\n"
    )
    text = _as_json(backbone.cluster)
    with anyio.fail_after(DEADLINE_S):
        await anyio.run_process(
            [sys.executable, "-c", code, text, str(folder(backbone.cluster, "listener"))]
        )


async def test_without_a_store_sql_says_so(backbone):
    async with following(backbone) as listener:
        with pytest.raises(NoStoreError, match="open it with a directory"):
            await listener.sql("SELECT 1")
        with pytest.raises(NoStoreError):
            await listener.wait_stored(1, 1)


async def test_reads_local_and_at_least(backbone, tmp_path):
    async with following(backbone, directory=tmp_path) as listener:
        last = backbone.append(put("a", "1"))
        backbone.stream(1, last)
        result = await listener.sql("SELECT value, slot FROM config", at_least=last)
        assert (result.rows, result.slot, result.lag) == ((("1", last),), last, 0)
        local = await listener.sql("SELECT stored FROM listener")
        assert local.rows == ((last,),)
        with pytest.raises(SqlInvalidError):
            await listener.sql("SELECT nonsense")


async def test_a_restart_goes_on_from_the_store_without_anybodys_help(backbone, tmp_path):
    last = backbone.append(*workload(random.Random(6), 300))
    async with following(backbone, directory=tmp_path) as listener:
        await listener.wait_applied(last, DEADLINE_S)
    asked = len(backbone.asked)
    backbone.mute = True
    backbone.down = {1, 2, 3}
    async with following(backbone, directory=tmp_path) as listener:
        assert (listener.applied, listener.stored) == (last, last)
        assert same(listener.state, replayed(backbone)[0])
        rows = (await listener.sql("SELECT count(*) FROM commits")).rows
        assert rows == ((last,),)
        backbone.mute, backbone.down = False, set()
        last = backbone.append(*workload(random.Random(8), 100))
        await listener.wait_stored(last, DEADLINE_S)
        assert same(listener.state, replayed(backbone)[0])
        assert all(
            request.first > 300
            for _, request in backbone.asked[asked:]
            if isinstance(request, CatchupRequest)
        )
        gaps = await listener.sql(
            "SELECT count(*), min(slot), max(slot), count(DISTINCT slot) FROM commits"
        )
        assert gaps.rows == ((last, 1, last, last),)


async def test_a_stop_stores_what_is_applied(backbone, tmp_path):
    async with following(backbone, directory=tmp_path) as listener:
        last = backbone.append(*(put(f"k{n}", "x") for n in range(500)))
        backbone.stream(1, last)
        await listener.wait_applied(last, DEADLINE_S)
    async with following(backbone, directory=tmp_path) as listener:
        assert listener.stored == last


async def test_the_store_of_another_cluster_or_name_is_refused(backbone, tmp_path):
    async with following(backbone, directory=tmp_path) as listener:
        await listener.wait_ready(DEADLINE_S)
    other = make_cluster()
    with pytest.raises(StoreError, match="belongs to cluster"):
        async with open_listener(other, folder(other, "listener"), name="one", directory=tmp_path):
            pass
    with pytest.raises(StoreError, match="belongs to listener"):
        async with following(backbone, "two", directory=tmp_path):
            pass


async def test_a_store_that_fails_stops_the_listener(backbone, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="disk on fire"):  # noqa: PT012
        async with following(backbone, directory=tmp_path) as listener:

            def burn(_batch):
                raise StoreError("disk on fire")

            monkeypatch.setattr(listener._keeper.store, "write", burn)
            last = backbone.append(put("a", "1"))
            backbone.stream(1, last)
            await listener.wait_stored(last, DEADLINE_S)


async def test_a_store_far_behind_pauses_it_and_memory_stays_bounded(
    backbone, tmp_path, monkeypatch
):
    monkeypatch.setattr("listeners.store.PENDING_SLOTS_MAX", 600)
    monkeypatch.setattr("listeners.store.BATCH_SLOTS_MAX", 300)
    async with following(backbone, directory=tmp_path) as listener:
        writer, most = listener._keeper.writer, 0
        add = writer.add

        def watched(batch):
            nonlocal most
            add(batch)
            most = max(most, writer.backlog_slots)

        monkeypatch.setattr(writer, "add", watched)
        last = backbone.append(*(put(f"k{n % 50}", str(n)) for n in range(8000)))
        await listener.wait_stored(last, DEADLINE_S)
        assert 600 <= most < 600 + 2 * 512 + 256
        assert same(listener.state, replayed(backbone)[0])


# --- threads --------------------------------------------------------------------------------


def in_thread(work):
    return anyio.to_thread.run_sync(work)


async def test_the_blocking_listener_does_the_same(backbone, tmp_path):
    last = backbone.append(*(put(f"k{n}", "x") for n in range(5)))

    def use():
        with BlockingListener(
            backbone.cluster,
            folder(backbone.cluster, "listener"),
            name="b",
            directory=tmp_path,
            options=QUICK,
        ) as listener:
            listener.wait_ready(DEADLINE_S)
            listener.wait_stored(last, DEADLINE_S)
            assert listener.state.config["k4"].value == "x"
            assert listener.ring.owner("x") is None
            assert listener.sql("SELECT count(*) FROM config", at_least=last).rows == ((5,),)
            got = list(listener.changes(0, deadline_s=0.1))
            assert [d.slot for d in got] == [2, 3, 4, 5, 6]
            with pytest.raises(DeadlineError):
                listener.wait_applied(99, 0.02)
            assert listener.status.ready and listener.lag == 0
        listener.close()

    await in_thread(use)


async def test_an_error_at_opening_leaves_the_blocking_listener_as_it_is(backbone):
    def use():
        with pytest.raises(ConfigError):
            BlockingListener(backbone.cluster, folder(backbone.cluster, "listener"), name="")

    await in_thread(use)


PROGRAM = """
import sys, msgspec
from pathlib import Path
from listeners import BlockingListener
from trex_core.cluster import ClusterConfig
cluster = msgspec.json.decode(sys.argv[1].encode(), type=ClusterConfig)
listener = BlockingListener(cluster, Path(sys.argv[4]), name="b", directory=Path(sys.argv[2]))
listener.wait_stored(1, 10)
listener.sql("SELECT 1")
print("there", flush=True)
if sys.argv[3] == "wait":
    listener.wait_applied(10**9, 60)
"""


def _as_json(cluster_config) -> str:
    return msgspec.json.encode(cluster_config).decode()


async def _program(backbone, tmp_path, how: str) -> anyio.abc.Process:
    process = await anyio.open_process(
        [
            sys.executable,
            "-c",
            PROGRAM,
            _as_json(backbone.cluster),
            str(tmp_path),
            how,
            str(folder(backbone.cluster, "listener")),
        ],
        stderr=subprocess.PIPE,
    )
    said = b""
    while b"\n" not in said:
        said += await process.stdout.receive()
    assert said == b"there\n"
    return process


async def test_no_thread_keeps_a_program_open_that_forgot_to_close(backbone, tmp_path):
    with anyio.fail_after(DEADLINE_S):
        async with await _program(backbone, tmp_path, "end") as process:
            assert await process.wait() == 0


async def test_ctrl_c_ends_a_wait_in_a_threaded_program(backbone, tmp_path):
    with anyio.fail_after(DEADLINE_S):
        async with await _program(backbone, tmp_path, "wait") as process:
            process.send_signal(signal.SIGINT)
            assert await process.wait() != 0
            assert b"KeyboardInterrupt" in await process.stderr.receive()


# --- who says so ----------------------------------------------------------------------------


async def test_a_hostile_holder_of_the_stream_key_is_believed_nothing(backbone):
    """It forges tips, values, repairs, whole histories and heartbeats, as every voter."""
    draw = random.Random(5)
    evil = Backbone(backbone.cluster)
    evil.append(*(put(f"k{n}", "forged") for n in range(40)))
    evil.close()
    async with following(backbone) as listener:
        await listener.wait_ready(DEADLINE_S)
        for number in range(30):
            last = backbone.append(put(f"k{number}", "true"))
            for voter in (1, 2, 3):
                first = draw.randrange(2, last + 1)
                run = evil.run(first, min(first + 3, evil.tip), repair=draw.random() < 0.5)
                genuine = backbone.run(last, last)
                for forged in (
                    msgspec.structs.replace(run, signature=draw.randbytes(64)),
                    msgspec.structs.replace(run, signature=genuine.signature),
                    msgspec.structs.replace(genuine, values=(evil.log[1],)),
                    msgspec.structs.replace(genuine, values=(*genuine.values, evil.log[1])),
                ):
                    backbone.send(msgspec.structs.replace(forged, signer=voter), voter)
                tip = StreamTip(BALLOT, True, 1 << 40, bytes(32), DIGEST)
                backbone.send(tip, voter)
                signed = backbone.signed(StreamTip(BALLOT, True, 1, evil.chains[1], DIGEST), voter)
                backbone.send(msgspec.structs.replace(signed, tip_slot=1 << 40), voter)
            backbone.stream(last, last)
            await listener.wait_applied(last, DEADLINE_S)
        assert {entry.value for entry in listener.state.config.values()} == {"true"}
        assert len(listener.state.config) == 30
        assert listener.tip == backbone.tip
        assert listener.counters["dropped_signature"] > 0
        assert same(listener.state, replayed(backbone)[0])


async def test_voters_that_contradict_each_other_stop_it_and_the_evidence_is_kept(
    backbone, tmp_path
):
    with pytest.raises(ContradictionError, match="contradicts itself"):  # noqa: PT012
        async with following(backbone, directory=tmp_path) as listener:
            last = backbone.append(put("a", "1"))
            backbone.stream(last, last)
            await listener.wait_stored(last, DEADLINE_S)
            lie = StreamTip(BALLOT, False, last, b"e" * 32, DIGEST)
            backbone.send(backbone.signed(lie, 2), 2)
            await listener.wait_applied(last + 1, DEADLINE_S)
    tips = msgspec.json.decode((tmp_path / "contradiction.json").read_bytes())["tips"]
    assert {tip["chain"] for tip in tips} == {(b"e" * 32).hex(), backbone.chains[last].hex()}
    with pytest.raises(ConfigError, match=r"contradiction\.json"):
        async with following(backbone, directory=tmp_path):
            pass
