"""Every byte of a journal and of a snapshot, hurt: the durable prefix, or a refusal in words.

What is done to journals, and the oracle, are in tests/adversary/journal.py; all of it runs with
``python -m tests.adversary.journal``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import voters.__main__
import voters.journal
from dashboard.local import LocalCluster
from tests.adversary.journal import (
    SEGMENT_BYTES,
    Image,
    Tally,
    WrongError,
    byte_cases,
    foreigners,
    images,
    judge,
    owed,
    recovered,
    run,
    sector_cases,
)
from tests.voters.test_journal import CLUSTER, VOTER, Writer
from tests.voters.test_snapshots import GENESIS
from trex_core.cluster import parse_cluster
from trex_core.sessions import NO_SESSIONS
from trex_core.snapshot import SnapshotError, decode_snapshot, encode_snapshot
from trex_core.state import State, first_state
from voters.journal import SECTOR_BYTES, Journal, JournalError, recover, segment_name, verify
from voters.snapshots import Snapshots, snapshot_name


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Image], list[Image]]:
    scratch = tmp_path_factory.mktemp("journals")
    return images(scratch), foreigners(scratch)


def test_every_byte_of_a_journal_hurt_is_the_durable_prefix_or_refused(
    journals: tuple[list[Image], list[Image]], capsys: pytest.CaptureFixture[str]
) -> None:
    tally = run(*journals, bits=1, thorough=False)
    with capsys.disabled():
        print()
        print("\n".join(tally.lines()))
    kinds = tally.by_kind
    assert {kind for kind in kinds if kind.startswith("not told apart")} == {
        "not told apart: damage, looks torn",
        "not told apart: synced, looks unwritten",
        "not told apart: newest segment gone",
        "not told apart: a whole journal of another incarnation",
    }
    for kind in ("durable: refused", "not torn: refused", "shortened: refused"):
        assert kinds[kind] > 1000, kind
    assert kinds["last write torn: cut"] > 100
    # A journal that was stopped in order loses nothing to a byte that changed, nor to a cut.
    ways = {name for (name, kind) in tally.counts if kind.endswith("synced, looks unwritten")}
    assert ways <= {"zeros from here", "sectors zeroed", "sectors swapped", "sector astray"}


def test_the_oracle_is_not_content_with_anything(journals: tuple[list[Image], list[Image]]) -> None:
    """It owes a refusal for a durable byte, all for a byte of the room behind, a prefix for a torn
    sector."""
    killed = next(image for image in journals[0] if image.name == "killed")
    data, frames = killed.files[killed.last], killed.of(killed.last)
    flipped = bytearray(data)
    flipped[frames[1].start + 90] ^= 1
    due = owed(killed, killed.last, bytes(flipped))
    assert due is not None
    assert (due.records, due.refused_at) == (None, (frames[1].start,))
    torn = data[: frames[-1].start + 300].ljust(len(data), b"\0")
    due = owed(killed, killed.last, torn)
    assert due is not None
    assert due.records == recovered(killed.frames[:-1])
    assert len(due.records) < len(killed.whole)
    assert owed(killed, killed.last, data) is None


@pytest.mark.parametrize(
    ("rule", "without"),
    [
        ("_proof_of_sync", lambda *_: None),
        ("_check_size", lambda *_: None),
        ("_is_torn", lambda *_: True),
        ("_is_torn", lambda *_: False),
    ],
    ids=["no proof of sync", "any size", "all is torn", "nothing is torn"],
)
def test_a_rule_taken_away_is_noticed(
    journals: tuple[list[Image], list[Image]],
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    without: Callable[..., object],
) -> None:
    stopped = journals[0][0]
    number, data = stopped.last, stopped.files[stopped.last]
    cases = [*sector_cases(data, number, []), *byte_cases(data, number, range(0, 2800, 20), 1)]
    assert all(judge(stopped, case) or case[2] == data for case in cases)
    monkeypatch.setattr(voters.journal, rule, without)
    with pytest.raises(WrongError, match="stopped: "):
        assert [judge(stopped, case) for case in cases]


def test_a_restart_from_files_has_the_state_of_the_prefix(
    journals: tuple[list[Image], list[Image]], tmp_path: Path
) -> None:
    """Records alike are states alike: promise, fixed slot, chain, genesis and accepted values."""
    killed = next(image for image in journals[0] if image.name == "killed")
    last = killed.frames[-1]
    assert last.number == killed.last
    states = []
    for torn in (False, True):
        directory = tmp_path / str(torn)
        directory.mkdir()
        for number, data in killed.files.items():
            keep = len(data)
            if torn and number == last.number:
                keep = (last.start // SECTOR_BYTES + 1) * SECTOR_BYTES
            (directory / segment_name(number)).write_bytes(data[:keep].ljust(len(data), b"\0"))
        journal = Journal.open(directory, CLUSTER, VOTER, segment_bytes=SEGMENT_BYTES)
        install = next(r for f in killed.frames for r in f.records if hasattr(r, "genesis"))
        base = first_state(CLUSTER)
        state = State(base.promised, install.slot, install.chain, (), install.genesis)
        for after, _ in journal.replay(state):
            state = after
        states.append(state)
        journal.start(state)
        journal.close()
        again = verify(directory, CLUSTER, VOTER)
        assert again.cut is None
        assert again.last.header.fixed == state.fixed
    whole, prefix = states
    assert whole.fixed == prefix.fixed + 2
    assert whole.promised == prefix.promised > first_state(CLUSTER).promised
    assert whole.genesis == prefix.genesis is not None
    assert whole.chain != prefix.chain


# --- the commands ---------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "c", voters=1) as local:
        yield local


def test_verify_and_inspect_say_what_recovery_does(cluster: LocalCluster) -> None:
    """The commands that people use before they decide: code 3 and one line with file and offset
    where the voter would be refused, and otherwise each cut is told."""
    config = parse_cluster(cluster.config_path.read_text())
    directory = cluster.directory / "voter-1" / "journal"
    journal = Journal.open(directory, config.cluster_id_bytes, 1, segment_bytes=SEGMENT_BYTES)
    writer = Writer(journal)
    writer.fix(2, 300)
    writer.fix(2, 600)
    journal.abandon()
    for path in directory.iterdir():
        if not path.read_bytes().strip(b"\0"):
            path.unlink()
    (first, last) = sorted(directory.iterdir())
    whole = last.read_bytes()
    end = len(whole.rstrip(b"\0"))
    cases = list(byte_cases(whole, 2, range(0, end, 41), 1))
    said = Tally()
    for name, _, data in cases:
        last.write_bytes(data)
        held = [(1, first.read_bytes()), (2, data)]
        refused: JournalError | None = None
        try:
            found, _ = recover(held, config.cluster_id_bytes, 1)
        except JournalError as error:
            refused = error
        for verb in ("verify", "inspect"):
            told = CliRunner().invoke(
                voters.__main__.app, [verb, "--id", "1", "--config", str(cluster.config_path)]
            )
            if refused is not None:
                assert told.exit_code == 3, (verb, name, told.output)
                place = f"{directory / refused.path.name} at byte {refused.offset}: "
                assert told.stderr.startswith(f"trex-voter: {place}"), told.stderr
                assert told.stderr.count("\n") == 1
                said.note(verb, "refused")
            else:
                assert told.exit_code == 0, (verb, name, told.output)
                assert ("a torn write of" in told.stdout) == (found.cut is not None)
                if found.cut is not None:
                    assert f"at byte {found.cut.offset}: a torn write" in told.stdout
                said.note(verb, "sound" if found.cut is None else "cut")
    for verb in ("verify", "inspect"):
        assert said.counts[verb, "refused"] > 50
        assert said.counts[verb, "cut"] > 2


# --- snapshots ------------------------------------------------------------------------------


def test_every_byte_of_a_snapshot_hurt_is_refused(tmp_path: Path) -> None:
    """A snapshot has a digest over all of it: no cut and no change is taken, whichever bit."""
    pieces = list(encode_snapshot(20, bytes(range(32)), GENESIS, NO_SESSIONS, [b"machine " * 90]))
    whole = b"".join(pieces)
    assert decode_snapshot(whole).slot == 20
    refused = 0
    for _, _, data in byte_cases(whole, 1, range(len(whole)), 8):
        with pytest.raises(SnapshotError):
            decode_snapshot(data)
        refused += 1
    assert refused > 9 * len(whole)
    with pytest.raises(SnapshotError):
        decode_snapshot(whole + b"\0")

    snapshots = Snapshots(tmp_path)
    newest = tmp_path / snapshot_name(20)
    for at in range(0, len(whole), 29):
        for hurt in (whole[:at], whole[:at] + bytes((whole[at] ^ 8,)) + whole[at + 1 :]):
            snapshots.save(10, encode_snapshot(10, bytes(32), GENESIS, NO_SESSIONS, [b"m"]))
            newest.write_bytes(hurt)
            found, damaged = snapshots.newest()
            assert found is not None
            assert found.slot == 10
            assert len(damaged) == 1
            assert damaged[0].startswith(f"{newest}: ")
            assert newest.with_suffix(".damaged").read_bytes() == hurt, "kept, to be looked at"
