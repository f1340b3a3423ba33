"""Snapshots: equal bytes for equal states, and every damaged byte is noticed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trex_core.machine import GuardedMachine
from trex_core.messages import Ballot, Genesis, Kind, Value
from trex_core.metadata.commands import (
    ConfigPut,
    LeaseGrant,
    MemberJoin,
    MemberLeave,
    encode_command,
)
from trex_core.metadata.state import MetadataMachine, state_from
from trex_core.sessions import NO_SESSIONS, Session, deliver, sessions_of
from trex_core.snapshot import (
    BLOCK_BYTES_MAX,
    HEADER_BYTES,
    Snapshot,
    SnapshotError,
    decode_snapshot,
    encode_snapshot,
    read_header,
    snapshot_digest,
)

CHAIN = bytes(range(32))
GENESIS = Genesis((1, 2, 3), (1 << 60, 5, 6))
SESSIONS = sessions_of(
    (name, Session(3, 2, ((name + 1, 0, b"result"),), name + 1, 6)) for name in range(500, 0, -1)
)


def pack(machine, sessions=SESSIONS, slot=77):
    return b"".join(encode_snapshot(slot, CHAIN, GENESIS, sessions, machine))


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES_MAX - 1, BLOCK_BYTES_MAX, BLOCK_BYTES_MAX + 1])
def test_what_goes_in_comes_out(size):
    machine = random.Random(size).randbytes(size)
    data = pack([machine])
    assert decode_snapshot(data) == Snapshot(77, CHAIN, GENESIS, SESSIONS, machine)
    assert read_header(data[:HEADER_BYTES]) == (77, CHAIN)
    assert snapshot_digest(data) == data[-32:]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3 * BLOCK_BYTES_MAX), max_size=6))
def test_how_the_machine_cuts_its_bytes_does_not_matter(cuts):
    machine = random.Random(1).randbytes(3 * BLOCK_BYTES_MAX + 5)
    bounds = [0, *sorted(cuts), len(machine)]
    cut = [machine[a:b] for a, b in itertools.pairwise(bounds)]
    assert pack(cut) == pack([machine])


def test_pieces_are_small():
    pieces = list(encode_snapshot(77, CHAIN, GENESIS, SESSIONS, [bytes(1 << 20)]))
    assert len(pieces) > 20 and max(map(len, pieces)) <= BLOCK_BYTES_MAX + 5


def test_a_chain_of_another_length_is_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        list(encode_snapshot(1, b"short", GENESIS, NO_SESSIONS, []))


SMALL = pack([b"machine"], sessions_of([(1, Session(1, 1, (), 1))]))


def test_every_flipped_byte_is_noticed():
    for at in range(len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[at] ^= 0x10
        with pytest.raises(SnapshotError):
            decode_snapshot(bytes(damaged))


def test_every_cut_and_every_addition_is_noticed():
    for length in range(len(SMALL)):
        with pytest.raises(SnapshotError):
            decode_snapshot(SMALL[:length])
    with pytest.raises(SnapshotError):
        decode_snapshot(SMALL + b"\0")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda d: d[:20], "truncated"),
        (lambda d: b"X" + d[1:], "magic"),
        (lambda d: d[:7] + b"\x02" + d[8:], "version"),
        (lambda d: d[:-40], "truncated"),
        (lambda d: d[:60] + b"?" + d[61:], "digest"),
    ],
)
def test_the_error_names_what_is_wrong(damage, word):
    with pytest.raises(SnapshotError, match=word):
        decode_snapshot(damage(SMALL))


def test_what_is_too_short_has_no_digest():
    least = len(pack([b""], sessions=NO_SESSIONS))
    for length in (0, HEADER_BYTES, HEADER_BYTES + 32):
        assert length < least
        with pytest.raises(SnapshotError, match="truncated: no digest"):
            snapshot_digest(SMALL[:length])


def signed(body):
    return body + b"\0\0\0\0\x20" + hashlib.blake2b(body, digest_size=32).digest()


HEAD = SMALL[:HEADER_BYTES]


@pytest.mark.parametrize(
    ("blocks", "word"),
    [
        (b"", "no genesis"),
        (b"\x03\0\0\0\x01x", "genesis must come first"),
        (b"\x01\0\0\0\x01x", "cannot be decoded"),
        (b"\x01\0\0\0\xffx", "cut off"),
        (b"\x01\0", "cut off"),
        (SMALL[HEADER_BYTES:-37] + b"\x09\0\0\0\0", "kind 9"),
        (SMALL[HEADER_BYTES:-37] + SMALL[HEADER_BYTES:-37], "kind 1"),
        (SMALL[HEADER_BYTES:-37] + b"\x02\0\0\0\x09\x91\x92\x01\x95\x01\x01\x90\x01\0", "order"),
    ],
)
def test_a_right_digest_over_nonsense_is_refused_all_the_same(blocks, word):
    with pytest.raises(SnapshotError, match=word):
        decode_snapshot(signed(HEAD + blocks))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_decode_or_raise_the_one_error(data, with_head):
    for candidate in (data, signed(HEAD + data) if with_head else signed(data)):
        with contextlib.suppress(SnapshotError):
            decode_snapshot(candidate)


# --- the whole replicated state: two replicas, two hash seeds


def replica(seed):
    """The bytes after a history; ``seed`` restarts it from a snapshot at another slot."""
    chance = random.Random(5)
    machine = MetadataMachine()
    sessions = NO_SESSIONS
    restart = 400 + seed
    for slot in range(1, 1500):
        kind = Kind.OPEN if slot % 50 == 1 else Kind.COMMAND
        name = chance.choice(sorted(sessions.open)) if sessions.open else 0
        sequence = sessions.open[name].next if name else 0
        command = encode_command(
            chance.choice(
                [
                    ConfigPut(f"k{chance.randrange(300)}", "v" * chance.randrange(50)),
                    MemberJoin(
                        f"m{chance.randrange(200)}",
                        attributes={f"a{n}": "x" for n in chance.sample(range(20), 5)},
                    ),
                    MemberLeave(f"m{chance.randrange(200)}"),
                    LeaseGrant(1000),
                ]
            )
        )
        value = Value(kind, Ballot(0, 1, 1), 0, name, sequence, sequence, command)
        sessions, _ = deliver(sessions, slot, value, GuardedMachine(machine, total=True).apply)
        if slot == restart:
            data = b"".join(encode_snapshot(slot, CHAIN, GENESIS, sessions, machine.snapshot()))
            restored = decode_snapshot(data)
            machine = MetadataMachine(state_from(restored.machine))
            sessions = restored.sessions
    return b"".join(encode_snapshot(1500, CHAIN, GENESIS, sessions, machine.snapshot()))


def test_equal_bytes_whether_restored_or_not_and_under_any_hash_seed():
    here = snapshot_digest(replica(0))
    assert here == snapshot_digest(replica(123))
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_snapshot as t;"
        "print(t.snapshot_digest(t.replica(7)).hex())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {here.hex()}


def test_a_snapshot_is_of_the_moment_it_was_asked_for():
    machine = MetadataMachine()
    machine.apply(1, encode_command(ConfigPut("a", "1")))
    pieces = machine.snapshot()
    machine.apply(2, encode_command(ConfigPut("a", "2")))
    assert state_from(b"".join(pieces)).config["a"].value == "1"
