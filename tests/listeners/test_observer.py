"""What a listener tells an observer, what it captures, and a network that is none."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter, deque

import anyio
import pytest

from listeners import ListenerOptions, Reset, open_listener
from listeners.catchup import CatchupError
from listeners.source import drop_share
from tests.credentials import folder
from tests.listeners.backbone import BALLOT, Backbone, make_cluster
from tests.listeners.workload import put, replayed, same, workload
from trex_core.learner import LearnerConfig
from trex_core.messages import (
    NO_BALLOT,
    VOTER_ID_MAX,
    CatchupEntries,
    SignedTip,
    SnapshotOffer,
    StreamRun,
    StreamTip,
)
from trex_core.metadata.state import state_chunks, state_from
from trex_core.snapshot import decode_snapshot, encode_snapshot
from trex_core.state import FixedRun

DEADLINE_S = 20
QUICK = ListenerOptions(learner=LearnerConfig("", (), silence_ms=150, retry_ms=5))


@pytest.fixture
async def backbone():
    made = Backbone(make_cluster())
    try:
        async with made.serving(heartbeat_s=0.03):
            yield made
    finally:
        made.close()


def following(backbone: Backbone, name: str = "one", **arguments):
    return open_listener(
        backbone.cluster,
        folder(backbone.cluster, "listener"),
        name=name,
        seed=1,
        **{"options": QUICK} | arguments,
    )


def snapshot_of(backbone: Backbone, slot: int) -> bytes:
    """What a voter writes at ``slot``."""
    state, sessions, _ = replayed(backbone, slot)
    return b"".join(
        encode_snapshot(
            slot, backbone.chains[slot], backbone.genesis, sessions, state_chunks(state)
        )
    )


class Notes:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.tips: list[tuple[int, StreamTip]] = []
        self.reports = []
        self.runs: list[FixedRun] = []
        self.moves: list[tuple[int, int]] = []
        """(from, to) of runs and jumps alike, in order."""
        self.jumps: list[tuple[int, int]] = []

    def heard(self, voter, message):
        self.tips.append((voter, message))

    def reported(self, report):
        self.reports.append(report)

    def delivered(self, run):
        self.runs.append(run)
        self.moves.append((run.first - 1, run.last))

    def jumped(self, from_slot, to_slot):
        self.jumps.append((from_slot, to_slot))
        self.moves.append((from_slot, to_slot))


def assert_seamless(notes: Notes, start: int, end: int) -> None:
    at = start
    for before, after in notes.moves:
        assert before == at, "no slot twice, none left out"
        assert after > before
        at = after
    assert at == end


# --- observer --------------------------------------------------------------------------------


async def test_an_observer_sees_every_tip_and_every_slot_once_in_order(backbone):
    notes = Notes()
    async with following(backbone, observer=notes, keep=drop_share(0.2, "x")) as listener:
        last = 0
        for value in workload(random.Random(5), 600):
            last = backbone.append(value)
            backbone.stream(last, last)
            if last % 20 == 0:
                await listener.wait_applied(last - 60, DEADLINE_S)
        await listener.wait_applied(last, DEADLINE_S)
        assert_seamless(notes, 0, last)
        values = [data for run in notes.runs for data in run.values]
        chains = [chain for run in notes.runs for chain in run.chains]
        assert values == backbone.log
        assert chains == backbone.chains[1:]
        assert not notes.jumps

        def heard_of_3() -> bool:
            backbone.heartbeat(sender=3)  # again each time: a fifth of all datagrams is lost
            return any(voter == 3 for voter, _ in notes.tips)

        await backbone.until(heard_of_3)
        _, tip = next(each for each in notes.tips if each[0] == 3)
        said = StreamTip(BALLOT, False, last, backbone.chains[last], tip.digest)
        assert tip == backbone.signed(said, 3)


@pytest.mark.parametrize("store", [False, True])
async def test_an_observer_is_told_of_a_jump_in_its_place(backbone, store, tmp_path):
    draw, notes = random.Random(11), Notes()
    directory = tmp_path if store else None
    async with following(backbone, observer=notes, directory=directory) as listener:
        subscription = listener.changes(since=0)
        early = backbone.append(*workload(draw, 100))
        await listener.wait_applied(early, DEADLINE_S)
        backbone.mute = True
        jump = backbone.append(*workload(draw, 200))
        backbone.snapshot = (jump, snapshot_of(backbone, jump))
        backbone.retained_from = jump + 1
        last = backbone.append(*workload(draw, 50))
        backbone.mute = False
        await listener.wait_applied(last, DEADLINE_S)
        assert notes.jumps == [(early, jump)]
        assert_seamless(notes, 0, last)
        with anyio.fail_after(DEADLINE_S):
            async for delivery in subscription:
                if isinstance(delivery, Reset):
                    assert (delivery.from_slot, delivery.to_slot) == (early, jump)
                    break
    if store:  # a restart goes on where the store is: no jump to there
        again = Notes()
        async with following(backbone, observer=again, directory=tmp_path) as listener:
            assert listener.applied == last
            more = backbone.append(put("more", "1"))
            await listener.wait_applied(more, DEADLINE_S)
            assert_seamless(again, last, more)


class Faulty(Notes):
    def delivered(self, run):
        super().delivered(run)
        if run.last >= 3:
            raise ZeroDivisionError("in the observer")


async def test_an_error_of_the_observer_ends_the_listener_and_says_so(backbone, tmp_path):
    notes = Faulty()
    with pytest.raises(ZeroDivisionError, match="in the observer"):  # noqa: PT012
        async with following(backbone, observer=notes, directory=tmp_path):
            backbone.append(put("a", "1"), put("b", "2"))
            with anyio.fail_after(DEADLINE_S):
                await anyio.sleep_forever()
    async with following(backbone, directory=tmp_path) as listener:  # and the store is whole
        await listener.wait_stored(backbone.tip, DEADLINE_S)
        assert same(listener.state, replayed(backbone)[0])


# --- capture ---------------------------------------------------------------------------------


async def test_a_capture_is_byte_for_byte_a_voters_snapshot(backbone, tmp_path):
    draw = random.Random(2)
    backbone.mute = True
    backbone.down = {1, 2, 3}
    async with following(backbone, directory=tmp_path) as listener:
        assert listener.capture() is None, "nothing is applied, no genesis known"
        backbone.mute, backbone.down = False, set()
        middle = backbone.append(*workload(draw, 300))
        await listener.wait_applied(middle, DEADLINE_S)
        assert listener.capture() == snapshot_of(backbone, middle)
    async with following(backbone, directory=tmp_path) as listener:
        assert listener.capture() == snapshot_of(backbone, middle), "after a restart"
    jump = backbone.append(*workload(draw, 300))
    backbone.snapshot = (jump, snapshot_of(backbone, jump))
    backbone.retained_from = jump + 1
    async with following(backbone, "cold") as listener:
        await listener.wait_applied(jump, DEADLINE_S)
        assert listener.counters["resets"] == 1
        assert listener.capture() == snapshot_of(backbone, jump), "after a jump"
        last = backbone.append(*workload(draw, 20))
        await listener.wait_applied(last, DEADLINE_S)
        captured = listener.capture()
    assert captured == snapshot_of(backbone, last)
    assert same(state_from(decode_snapshot(captured).machine), replayed(backbone)[0])


# --- another network ---------------------------------------------------------------------------


class Tape:
    """A network without one: what was noted down is played again, and the recorded snapshot is
    all that an archive has."""

    def __init__(self, snapshot: bytes | None, notes: Notes) -> None:
        self.data = snapshot
        self.played = deque([*((1, run) for run in map(as_stream, notes.runs)), *notes.tips])
        self.closed: list[str] = []
        self.asked: list[int] = []
        self.reports = 0

    def stream(self, _counters: Counter[str]) -> Tape:
        self._woken = asyncio.Event()
        self._woken.set()
        self.over = asyncio.Event()
        return self

    instance = VOTER_ID_MAX + 1
    helps = ""

    async def help(self, _revoked) -> None:
        pass

    def begin(self, _slot, _chain) -> None:
        pass

    def delivered(self, _run) -> None:
        pass

    def archives(self, _counters: Counter[str], _revoked) -> Tape:
        return self

    async def wait(self, until_s):
        loop = asyncio.get_running_loop()
        timer = None if until_s is None else loop.call_at(until_s, self._woken.set)
        await asyncio.sleep(0)
        await self._woken.wait()
        self._woken.clear()
        if timer is not None:
            timer.cancel()

    def take(self):
        if not self.played:
            self.over.set()
            return None
        return self.played.popleft()

    def wake(self):
        self._woken.set()

    def done(self, slot):
        pass

    def request(self, wanted):
        pass

    def report(self, _report):
        self.reports += 1

    def close(self):
        self.closed.append("stream")

    async def entries(self, voter, first):
        self.asked.append(first)
        if self.data is None:
            raise CatchupError(voter, "nothing was recorded")
        snapshot = decode_snapshot(self.data)
        if first > snapshot.slot:
            tip = SignedTip(0, snapshot.chain, NO_BALLOT, 1, b"")
            return CatchupEntries(first, snapshot.chain, (), tip, tip)
        digest = hashlib.blake2b(self.data, digest_size=32).digest()
        return SnapshotOffer(snapshot.slot, snapshot.chain, len(self.data), digest)

    async def snapshot(self, _offer, _voters):
        return self.data

    async def aclose(self):
        self.closed.append("archives")


def as_stream(run: FixedRun) -> StreamRun:
    return StreamRun(BALLOT, run.first, run.chain_before, run.values, run.last, run.chains[-1])


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "from a snapshot"])
async def test_a_listener_over_a_recording_ends_in_the_same_state(backbone, late, tmp_path):
    draw, notes = random.Random(3), Notes()
    async with following(backbone, observer=notes) as listener:
        first = backbone.append(*workload(draw, 200))
        await listener.wait_applied(first, DEADLINE_S)
        captured = None
        if late:
            captured = listener.capture()
            notes.runs.clear()
        last = backbone.append(*workload(draw, 300))
        await listener.wait_applied(last, DEADLINE_S)
        state, ring = listener.state, list(listener.ring.ranges())
    tape = Tape(captured, notes)
    again = Notes()
    # No socket: the cluster's ports are of nobody now.
    async with following(
        backbone, "replay", network=tape, observer=again, directory=tmp_path
    ) as listener:
        await listener.wait_stored(last, DEADLINE_S)
        with anyio.fail_after(DEADLINE_S):
            await tape.over.wait()
        assert same(listener.state, state)
        assert list(listener.ring.ranges()) == ring
        result = await listener.sql(f"SELECT count(*) FROM config_at({last})")
        assert result.rows == ((len(state.config),),)
    assert again.jumps == ([(0, first)] if late else [])
    assert_seamless(again, 0, last)
    assert again.tips == notes.tips
    assert tape.closed == ["stream", "archives"]
    assert any(asked <= last for asked in tape.asked) == late
