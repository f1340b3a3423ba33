"""A slice of the flood; all of it is ``python -m tests.adversary --datagrams 1000000``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from msgspec.structs import replace

from tests.adversary.arena import WINDOW_DATAGRAMS, Violation, open_arena
from tests.adversary.hostile import DRAWN, KINDS, OUTSIDE, STREAM, Window
from tests.credentials import on_stream
from tests.voters.here import SOON_S
from trex_core.messages import DATAGRAM_BYTES_MAX, StreamRun
from trex_core.seal import PeerOpener, ReplayWindow
from trex_core.wire import Identity, decode_stream, encode_body

DATAGRAMS = 20_000
EXAMPLES = 300
FORGERIES = 5_000
LOOKED_AT_MIN = 200
"""Of these so many signatures at least are looked at and found wrong."""
LIKELY = 2_000
"""Datagrams of one kind: among them each defect of its kind shows."""

place = some.integers(0, DATAGRAM_BYTES_MAX)
edits = some.lists(
    some.one_of(
        some.tuples(some.just("flip"), place, some.integers(1, 255)),
        some.tuples(some.just("cut"), place),
        some.tuples(some.just("put"), place, some.binary(min_size=1, max_size=40)),
        some.tuples(some.just("insert"), place, some.binary(min_size=1, max_size=40)),
        some.tuples(some.just("splice"), place, some.integers(0, 99)),
    ),
    min_size=1,
    max_size=5,
)


def edited(data: bytes, others: list[bytes], changes: list[tuple]) -> bytes:
    for what, where, *more in changes:
        at = where % (len(data) + 1)
        match what, *more:
            case "flip", int(bits):
                data = data[:at] + bytes(byte ^ bits for byte in data[at : at + 1]) + data[at + 1 :]
            case "cut", *_:
                data = data[:at]
            case "put", bytes(new):
                data = data[:at] + new + data[at + len(new) :]
            case "insert", bytes(new):
                data = data[:at] + new + data[at:]
            case "splice", int(other):
                data = data[:at] + others[other % len(others)][at:]
    return data[: DATAGRAM_BYTES_MAX + 1]


def drawn() -> list[tuple[int, list[tuple]]]:
    """What hypothesis would do to which of many datagrams."""
    made = []

    @settings(max_examples=EXAMPLES, database=None, deadline=None, derandomize=True)
    @given(some.integers(0, DATAGRAMS), edits)
    def draw(index: int, changes: list[tuple]) -> None:
        made.append((index, changes))

    draw()
    return made


async def test_of_a_flood_nothing_is_taken_and_each_datagram_is_counted(tmp_path):
    ideas = drawn()
    async with open_arena(tmp_path, 1) as arena:
        before = len(arena.acknowledged)
        await arena.flood(DATAGRAMS)
        for door, said in arena.recording.kept_back.items():
            real = [each.data for each in (*said, *arena.recording.taken[door])]
            made = [edited(real[index % len(real)], real, changes) for index, changes in ideas]
            made = [data for data in made if data not in real]
            assert len(made) > EXAMPLES / 2
            for at in range(0, len(made), arena.room(door)):
                await arena.feed(Window(DRAWN, door, made[at : at + arena.room(door)]))
        assert len(arena.acknowledged) > before, "commits go on"
    assert arena.sent.keys() == {DRAWN, *KINDS}
    assert {reason for _, _, reason in arena.totals} >= OUTSIDE - {"version"}, "each has its case"
    print(dict(arena.sent), dict(arena.totals))


async def test_who_stole_the_stream_key_has_nothing_believed_and_cannot_stop_who_listens(tmp_path):
    """Many forged tips and runs: signatures are dear, so most are not even looked at."""
    async with open_arena(tmp_path, 1) as arena:
        chance, listener, cluster = arena.adversary.chance, arena.listener, arena.cluster
        said = [decode_stream(each.body) for each in arena.recording.taken[STREAM]]
        who = [Identity(cluster.cluster_id_bytes, voter, 5, 5) for voter in cluster.voter_ids]
        heard = listener.counters["datagrams"]
        for number in range(FORGERIES):
            forged, ahead = chance.choice(said), listener.applied + chance.randint(1, 50)
            changes = {"tip_slot": ahead + 99, "tip_chain": chance.randbytes(32)}
            if isinstance(forged, StreamRun):
                changes |= {"first": ahead, "chain_before": chance.randbytes(32)}
            body = encode_body(replace(forged, **changes))
            arena.send(STREAM, on_stream(cluster, chance.choice(who), body))
            if number % WINDOW_DATAGRAMS == 0:
                slot = max(slot for _, slot in arena.acknowledged.values())
                await listener.wait_applied(slot, SOON_S)
        await arena.until(lambda: listener.counters["datagrams"] >= heard + FORGERIES)
        assert listener.counters["dropped_signature"] > LOOKED_AT_MIN


def replay_allowed(monkeypatch):
    monkeypatch.setattr(ReplayWindow, "fresh", lambda _self, _number: True)


def receiver_ignored(monkeypatch):
    real = PeerOpener.open

    def opened(self, data):
        return replace(real(self, data), receiver=0)

    monkeypatch.setattr(PeerOpener, "open", opened)


@pytest.mark.parametrize(
    ("defect", "kind"), [(replay_allowed, "replayed"), (receiver_ignored, "misdirected")]
)
async def test_a_defect_would_be_seen(tmp_path, monkeypatch, defect, kind):
    async def attack():
        async with open_arena(tmp_path, 1) as arena:
            arena.adversary.kinds = [kind]
            defect(monkeypatch)
            await arena.flood(LIKELY)

    with pytest.raises(Violation, match=f"of kind '{kind}'"):
        await attack()
