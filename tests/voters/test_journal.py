"""The journal: what was synced is there after a crash, or the voter is refused with the place."""

from __future__ import annotations

import errno
import os
import select
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from trex_core.messages import NO_BALLOT, Ballot, Genesis, Kind, Value, encode_value
from trex_core.state import (
    AcceptRecord,
    FixedRecord,
    InstallRecord,
    LearnedRecord,
    PromiseRecord,
    Record,
    State,
    chain_run,
    first_state,
    replay,
)
from trex_core.wire import HEADER_BYTES, Identity
from voters.journal import (
    SECTOR_BYTES,
    Batch,
    Disk,
    Journal,
    JournalError,
    JournalFailedError,
    Stop,
    encode_batch,
    encode_entry,
    entries,
    format_journal,
    highest_slot,
    open_segment,
    place,
    recover,
    segment_name,
    verify,
)

CLUSTER = bytes(range(1, 17))
OTHER_CLUSTER = bytes(range(2, 18))
VOTER = 3
BALLOT = Ballot(0, 1, VOTER)
SEGMENT_BYTES = 1 << 16


def value(number: int, size: int = 20) -> bytes:
    command = (b"%d " % number) * (size // 2)
    return encode_value(Value(Kind.COMMAND, BALLOT, 0, 1, number, number, command[:size]))


def fold(state: State, records: tuple[Record, ...] | list[Record]) -> State:
    for record in records:
        state, _ = replay(state, record)
    return state


class Writer:
    """A voter that accepts and fixes one slot after the other in a real journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        state = first_state(CLUSTER)
        for after, _ in journal.replay(state):
            state = after
        self.state = self.recovered = state
        self.identity = journal.start(state)

    def records(self, slots: int, size: int = 20) -> tuple[Record, ...]:
        first = self.state.fixed + 1
        values = tuple(value(slot, size) for slot in range(first, first + slots))
        chain = chain_run(self.state.chain, first, values)[-1]
        return AcceptRecord(BALLOT, first, values), FixedRecord(first + slots - 1, chain)

    def submit(self, *records: Record) -> int:
        self.state = fold(self.state, records)
        self.journal.append(records)
        return self.journal.submit(self.state)

    def commit(self, *records: Record) -> None:
        """Submit and wait for the sync."""
        await_batch(self.journal, self.submit(*records))

    def fix(self, slots: int = 1, size: int = 20) -> None:
        self.commit(*self.records(slots, size))


def await_batch(journal: Journal, batch: int) -> None:
    while journal.completed() < batch:
        ready, _, _ = select.select([journal.wakeup_fd], [], [], 20)
        assert ready, f"batch {batch} was never reported"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    format_journal(tmp_path / "journal", CLUSTER, VOTER)
    return tmp_path / "journal"


def opened(directory: Path, disk: Disk | None = None, retain_bytes: int = 1 << 30) -> Journal:
    return Journal.open(
        directory, CLUSTER, VOTER, segment_bytes=SEGMENT_BYTES, retain_bytes=retain_bytes, disk=disk
    )


@pytest.fixture
def writer(directory: Path) -> Iterator[Writer]:
    writer = Writer(opened(directory))
    yield writer
    writer.journal.close()


def crash(journal: Journal) -> None:
    """End as a killed process would: no stop record."""
    journal.abandon()


# --- life -----------------------------------------------------------------------------------


def test_what_was_completed_is_recovered(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.commit(PromiseRecord(BALLOT))
    writer.fix(3)
    writer.commit(AcceptRecord(BALLOT, 4, (value(4), value(5))))
    crash(writer.journal)
    again = Writer(opened(directory))
    assert again.recovered == writer.state
    assert again.recovered.last_accepted == 5
    again.journal.close()


def test_each_boot_raises_the_boot_number_and_opens_a_segment(directory: Path) -> None:
    identities = []
    for _ in range(3):
        writer = Writer(opened(directory))
        writer.fix()
        identities.append(writer.identity)
        writer.journal.close()
    assert [identity.boot for identity in identities] == [1, 2, 3]
    assert len({identity.incarnation for identity in identities}) == 1
    found = verify(directory, CLUSTER, VOTER)
    assert [segment.number for segment in found.segments] == [1, 2, 3, 4]
    assert all(segment.stopped for segment in found.segments)


def test_submit_while_a_sync_is_under_way_joins_the_next_batch(directory: Path) -> None:
    disk = GatedDisk()
    writer = Writer(opened(directory, disk))
    disk.gate_closed = True
    journal = writer.journal
    first = writer.submit(PromiseRecord(BALLOT))
    second = writer.submit(*writer.records(1))
    third = writer.submit(*writer.records(1))
    assert second == third == first + 1, "appended during one sync: one batch"
    assert journal.completed() == 0
    assert (first, journal.is_idle) == (1, False)
    disk.release()
    await_batch(journal, third)
    assert (journal.completed(), journal.is_idle) == (2, True)
    assert writer.journal.syncs == 2
    p50, p99 = writer.journal.sync_percentiles_us()
    assert 0 < p50 <= p99
    assert writer.journal.last_sync_us > 0
    writer.journal.close()


def test_one_write_and_one_sync_per_batch(directory: Path) -> None:
    disk = CountingDisk()
    writer = Writer(opened(directory, disk))
    writer.fix()
    disk.calls.clear()
    writer.fix(200)
    journal_calls = [call for call in disk.calls if call[1] == "journal-sync"]
    assert [name for name, _ in journal_calls] == ["pwrite", "fdatasync"]
    writer.journal.close()


def test_an_empty_submit_costs_no_batch(writer: Writer) -> None:
    assert writer.journal.submit(writer.state) == 0
    writer.fix()
    assert writer.journal.submit(writer.state) == 1
    assert writer.journal.syncs == 1


def test_a_batch_under_way_is_finished_by_close(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.submit(*writer.records(1))
    writer.submit(*writer.records(1))
    writer.journal.close()
    assert Writer(opened(directory)).recovered == writer.state


# --- refusals before anything is read -------------------------------------------------------


def test_format_refuses_what_is_there(directory: Path) -> None:
    with pytest.raises(JournalError, match="formatted once in its life"):
        format_journal(directory, CLUSTER, VOTER)


def test_format_draws_incarnations_at_random(tmp_path: Path) -> None:
    drawn = {format_journal(tmp_path / str(n), CLUSTER, VOTER) for n in range(5)}
    assert len(drawn) == 5


def test_format_after_a_crash_in_format(tmp_path: Path) -> None:
    (tmp_path / "format.tmp").write_bytes(b"half")
    format_journal(tmp_path, CLUSTER, VOTER)
    assert verify(tmp_path, CLUSTER, VOTER).identity.boot == 0


def test_missing_journal(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"there is no journal here.*trex-voter format"):
        Journal.open(tmp_path / "nowhere", CLUSTER, VOTER)
    with pytest.raises(JournalError, match=r"there is no journal here.*do not format"):
        Journal.open(tmp_path, CLUSTER, VOTER)


def test_second_process_is_locked_out(directory: Path) -> None:
    journal = opened(directory)
    with pytest.raises(JournalError, match="another process uses this journal"):
        opened(directory)
    journal.close()
    opened(directory).close()


def test_foreign_cluster_and_voter(directory: Path) -> None:
    with pytest.raises(JournalError, match=f"belongs to cluster {CLUSTER.hex()}"):
        Journal.open(directory, OTHER_CLUSTER, VOTER)
    with pytest.raises(JournalError, match="belongs to voter 3, not to voter 4"):
        Journal.open(directory, CLUSTER, 4)


def test_missing_segment_in_the_middle(directory: Path) -> None:
    for _ in range(2):
        Writer(opened(directory)).journal.close()
    (directory / segment_name(2)).unlink()
    with pytest.raises(JournalError, match=r"0000000002.journal: this segment is missing"):
        opened(directory)


def test_another_format_version_is_named(directory: Path) -> None:
    path = directory / segment_name(1)
    data = bytearray(path.read_bytes())
    data[2] = 2
    end = HEADER_BYTES + int.from_bytes(data[56:60], "big")
    data[60:64] = zlib.crc32(data[64:end], zlib.crc32(bytes(4), zlib.crc32(data[:60]))).to_bytes(
        4, "big"
    )
    path.write_bytes(data)
    with pytest.raises(JournalError, match="another version of TRex"):
        opened(directory)


# --- crashes and damage ---------------------------------------------------------------------


def test_torn_write_is_cut_and_reported(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix(2)
    durable = writer.state
    writer.fix(100, 60)
    crash(writer.journal)
    path = directory / segment_name(2)
    data = bytearray(path.read_bytes())
    at = [offset for offset, *_ in entries(2, bytes(data), CLUSTER, True)][-1]
    sector = at // SECTOR_BYTES * SECTOR_BYTES + 3 * SECTOR_BYTES
    data[sector : sector + SECTOR_BYTES] = bytes(SECTOR_BYTES)
    path.write_bytes(data)
    journal = opened(directory)
    assert journal.survey.cut is not None
    assert (journal.survey.cut.number, journal.survey.cut.offset) == (2, at)
    again = Writer(journal)
    assert again.recovered == durable
    again.fix()
    again.journal.close()
    assert path.stat().st_size == at
    assert Writer(opened(directory)).recovered == again.state


def test_a_batch_beyond_the_segment_may_be_cut_off_by_the_end_of_the_file(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix(2)
    durable = writer.state
    writer.fix(2, SEGMENT_BYTES)
    crash(writer.journal)
    path = directory / segment_name(3)
    assert path.stat().st_size > SEGMENT_BYTES
    path.write_bytes(path.read_bytes()[:-7])
    again = Writer(opened(directory))
    assert again.journal.survey.cut is not None
    assert again.recovered == durable
    again.journal.close()


@pytest.mark.parametrize("left_bytes", [0, 10, 100, 600, 1900, SEGMENT_BYTES - 1])
def test_a_running_segment_that_was_shortened_is_refused(directory: Path, left_bytes: int) -> None:
    writer = Writer(opened(directory))
    writer.fix(2)
    writer.fix(40)
    wait_for_spare(writer.journal)
    crash(writer.journal)
    path = directory / segment_name(2)
    path.write_bytes(path.read_bytes()[:left_bytes])
    with pytest.raises(JournalError, match=r"was filled up to|header is lost|not a torn") as caught:
        opened(directory)
    assert caught.value.path == path
    assert caught.value.offset in (0, left_bytes)
    assert "Do not repair" in str(caught.value)


def test_the_segment_in_use_is_missed_when_only_the_prepared_one_is_left(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix()
    wait_for_spare(writer.journal)
    crash(writer.journal)
    (directory / segment_name(2)).unlink()
    with pytest.raises(JournalError, match=r"0000000002.journal: this segment is missing"):
        opened(directory)


def test_a_voter_that_lost_all_but_what_formatting_made_is_not_taken_for_new(
    directory: Path,
) -> None:
    writer = Writer(opened(directory))
    writer.commit(PromiseRecord(BALLOT))
    writer.journal.close()
    for number in (2, 3):
        (directory / segment_name(number)).unlink(missing_ok=True)
    with pytest.raises(JournalError, match=r"the segment that came after it, is lost") as caught:
        opened(directory)
    assert caught.value.path == directory / segment_name(1)
    assert caught.value.offset == caught.value.path.stat().st_size


def test_a_start_that_died_before_its_header_was_durable_is_no_damage(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix()
    crash(writer.journal)
    for _ in range(2):
        dying = opened(directory, FullDisk(room=0))
        with pytest.raises(OSError, match="No space left") as caught:
            dying.start(writer.state)
        assert str(directory) in str(caught.value)
        dying.close()
    assert Writer(opened(directory)).recovered == writer.state


def test_a_lost_header_is_never_a_reason_to_format_again(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix()
    wait_for_spare(writer.journal)
    crash(writer.journal)
    held = {path: path.read_bytes() for path in sorted(directory.iterdir())}
    first, used, spare = held
    for gone, hit in (((), used), ((first,), used), ((first,), spare), ((used, spare), first)):
        for path, data in held.items():
            path.write_bytes(data)
        for path in gone:
            path.unlink()
        hit.write_bytes(bytes(len(held[hit])))
        if hit == spare:
            used.unlink()
        with pytest.raises(JournalError, match=r"the header is lost.*Do not repair") as caught:
            opened(directory)
        assert (caught.value.path, caught.value.offset) == (hit, 0)


def test_a_file_that_cannot_be_read_is_named(directory: Path) -> None:
    class Unreadable(Disk):
        def read(self, path: Path) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with pytest.raises(JournalError, match=r"0000000001.journal: cannot be read \(Input"):
        opened(directory, Unreadable())


def test_crash_between_creating_a_segment_and_its_header(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix()
    crash(writer.journal)
    for content in (b"", bytes(700), bytes(512) + b"Tx, but of the second sector only"):
        (directory / segment_name(3)).write_bytes(content)
        found = verify(directory, CLUSTER, VOTER)
        assert found.last.number == 2
    again = Writer(opened(directory))
    assert again.recovered == writer.state
    again.journal.close()


def small_journal(
    last_size: int = 40,
) -> tuple[list[tuple[int, bytes]], list[tuple[Record, ...]], list[int]]:
    """Two segments in memory, batches of records, and where each batch of the last one ends. The
    value in the last batch has about ``last_size`` bytes."""
    identity = Identity(CLUSTER, VOTER, 77, 1)
    state = first_state(CLUSTER)
    files: dict[int, bytearray] = {}
    write, tail = open_segment(identity, 1, state, 0, 0)
    files[1] = bytearray(write.data)
    batches: list[tuple[Record, ...]] = []
    ends = []
    for slot in range(1, 9):
        values = (value(slot, 40 if slot < 8 else last_size),)
        chain = chain_run(state.chain, slot, values)[-1]
        batch = (
            PromiseRecord(BALLOT),
            AcceptRecord(BALLOT, slot, values),
            FixedRecord(slot, chain),
        )
        write, tail = place(identity, tail, batch, state, 1100 if slot < 8 else 4096)
        held = files.setdefault(write.number, bytearray())
        assert len(held) == write.offset
        held += write.data
        state = fold(state, batch)
        batches.append(batch)
        if write.number == 2:
            ends.append(tail.offset)
    assert sorted(files) == [1, 2], "the example must rotate once"
    return (
        [
            (n, bytes(d).ljust(2048 if last_size == 40 else 4096, b"\0"))
            for n, d in sorted(files.items())
        ],
        batches,
        ends,
    )


def recovered_slots(records: tuple[Record, ...]) -> list[int]:
    return [record.first for record in records if isinstance(record, AcceptRecord)]


def test_pure_recovery() -> None:
    segments, batches, _ = small_journal()
    found, records = recover(segments, CLUSTER, VOTER)
    assert found.cut is None
    assert [r for r in records if isinstance(r, AcceptRecord)] == [b[1] for b in batches]
    assert fold(first_state(CLUSTER), records).fixed == len(batches)


@pytest.mark.parametrize("part", range(8))
def test_a_bit_flip_is_an_exact_prefix_or_refused_with_file_and_offset(part: int) -> None:
    segments, batches, ends = small_journal()
    held = dict(segments)
    refused = 0
    for number, used in ((1, 1100), (2, ends[-1] + 600)):
        for at in range(part, used, 8):
            flipped = bytearray(held[number])
            flipped[at] ^= 1 << (at // 8 % 8)
            outcome = recovered_or_error({**held, number: bytes(flipped)})
            if isinstance(outcome, JournalError):
                assert outcome.path.name == segment_name(number), f"byte {at}: {outcome}"
                assert outcome.offset is not None, f"byte {at}: {outcome}"
                assert outcome.offset <= at, f"byte {at}: {outcome}"
                assert "Do not repair" in str(outcome)
                refused += 1
            else:
                # Only zeros behind the last entry may be hit without loss.
                assert number == 2, f"byte {at} of a segment that was left"
                assert at >= ends[-1], f"byte {at} was synced data"
                assert recovered_slots(outcome) == list(range(1, len(batches) + 1))
    assert refused > 100


def recovered_or_error(held: dict[int, bytes]) -> tuple[Record, ...] | JournalError:
    try:
        return recover(sorted(held.items()), CLUSTER, VOTER)[1]
    except JournalError as error:
        return error


def test_lost_end_of_an_earlier_segment_is_refused() -> None:
    segments, *_ = small_journal()
    number, data = segments[0]
    last = [offset for offset, *_ in entries(number, data, CLUSTER, True)][-1]
    held = [(number, data[:last].ljust(len(data), b"\0")), segments[1]]
    with pytest.raises(JournalError, match="the next segment says it was synced up to byte"):
        recover(held, CLUSTER, VOTER)


def test_a_bit_flip_in_the_header_of_a_segment_just_opened_is_refused() -> None:
    segments, *_ = small_journal()
    (_, first), (number, last) = segments
    *_, end = [end for *_, end in entries(number, last, CLUSTER, True)]
    header, tail = open_segment(Identity(CLUSTER, VOTER, 77, 2), 3, first_state(CLUSTER), 8, end)
    opened_only = header.data.ljust(4096, b"\0")
    held = {1: first, 2: last, 3: opened_only}
    assert not isinstance(recovered_or_error(held), JournalError)
    for at in range(tail.offset):
        flipped = bytearray(opened_only)
        flipped[at] ^= 1 << (at % 8)
        outcome = recovered_or_error({**held, 3: bytes(flipped)})
        assert isinstance(outcome, JournalError), f"byte {at}"
        assert (outcome.path.name, outcome.offset) == (segment_name(3), 0), f"byte {at}"


def test_lost_promise_at_the_end_of_an_earlier_segment_is_refused() -> None:
    identity = Identity(CLUSTER, VOTER, 77, 1)
    state = first_state(CLUSTER)
    header, tail = open_segment(identity, 1, state, 0, 0)
    promise, after = place(identity, tail, (PromiseRecord(BALLOT),), state, 4096)
    following, _ = open_segment(identity, 2, state, 0, after.offset)
    whole = header.data + promise.data
    assert recover([(1, whole), (2, following.data)], CLUSTER, VOTER)[1][1:3]
    held = [(1, header.data.ljust(len(whole), b"\0")), (2, following.data)]
    with pytest.raises(JournalError, match="the next segment says it was synced up to byte"):
        recover(held, CLUSTER, VOTER)


def test_every_way_to_tear_the_last_write_gives_the_prefix_or_the_whole() -> None:
    segments, batches, ends = small_journal(last_size=2000)
    (_, first), (_, last) = segments
    start, end = ends[-2], ends[-1]
    slots = list(range(1, len(batches) + 1))
    sectors = range(start // SECTOR_BYTES, (end - 1) // SECTOR_BYTES + 1)
    assert len(sectors) >= 5, "with one sector there is only all or nothing"
    for missing in range(1, 1 << len(sectors)):
        torn = bytearray(last)
        for index, sector in enumerate(sectors):
            if missing >> index & 1:
                from_ = max(start, sector * SECTOR_BYTES)
                to = min(end, (sector + 1) * SECTOR_BYTES)
                torn[from_:to] = bytes(to - from_)
        found, records = recover([(1, first), (2, bytes(torn))], CLUSTER, VOTER)
        assert recovered_slots(records) == slots[:-1]
        assert found.last.end == start


def test_damage_below_a_stop_record_and_data_behind_it_are_refused(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix(30)
    writer.journal.close()
    path = directory / segment_name(2)
    good = path.read_bytes()
    offsets = [offset for offset, *_ in entries(2, good, CLUSTER, True)]
    torn = bytearray(good)
    zeroed = offsets[1] // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES
    torn[zeroed : zeroed + SECTOR_BYTES] = bytes(SECTOR_BYTES)
    path.write_bytes(torn)
    with pytest.raises(JournalError, match="proves it was synced") as caught:
        opened(directory)
    assert caught.value.offset == offsets[1]
    behind = bytearray(good)
    behind[len(good.rstrip(b"\0")) + 5000] = 1
    path.write_bytes(behind)
    with pytest.raises(JournalError, match="behind the record of an orderly stop"):
        opened(directory)


def test_lost_header_of_the_running_segment_is_refused_when_later_batches_prove_it() -> None:
    segments, _, ends = small_journal()
    assert len(ends) >= 2
    (_, first), (_, last) = segments
    lost = bytes(SECTOR_BYTES) + last[SECTOR_BYTES:]
    with pytest.raises(JournalError, match="proves it was synced") as caught:
        recover([(1, first), (2, lost)], CLUSTER, VOTER)
    assert caught.value.offset == 0


# --- rotation and deletion ------------------------------------------------------------------


def test_rotation_carries_what_holds(directory: Path) -> None:
    writer = Writer(opened(directory))
    while writer.journal.segments < 5:
        writer.fix(20, 400)
    writer.commit(AcceptRecord(Ballot(0, 9, 1), writer.state.fixed + 1, (value(0),)))
    crash(writer.journal)
    found = verify(directory, CLUSTER, VOTER)
    fixed = [segment.header.fixed for segment in found.segments]
    assert fixed == sorted(fixed)
    assert fixed[-1] > 0
    assert found.last.header.promised == BALLOT
    again = Writer(opened(directory))
    assert again.recovered == writer.state
    again.journal.close()


def test_a_batch_larger_than_a_segment(directory: Path) -> None:
    writer = Writer(opened(directory))
    writer.fix(1)
    writer.fix(3, SEGMENT_BYTES)
    writer.fix(1)
    for _ in range(12):
        records = writer.records(1, 1 << 20)
        writer.state = fold(writer.state, records)
        writer.journal.append(records)
    await_batch(writer.journal, writer.journal.submit(writer.state))
    assert writer.journal.syncs == 4
    writer.fix(1)
    assert writer.journal.size_bytes > 12 << 20
    crash(writer.journal)
    again = Writer(opened(directory))
    assert again.recovered == writer.state
    again.journal.close()


def test_a_batch_beyond_one_frame_is_split() -> None:
    records: tuple[Record, ...] = tuple(
        AcceptRecord(BALLOT, slot, (value(slot, 1 << 20),)) for slot in range(1, 20)
    )
    identity = Identity(CLUSTER, VOTER, 7, 1)
    header, tail = open_segment(identity, 1, first_state(CLUSTER), 0, 0)
    write, after = place(identity, tail, records, first_state(CLUSTER), SEGMENT_BYTES)
    assert after.offset == write.offset + len(write.data)
    data = header.data + write.data
    held = [entry for _, entry, *_ in entries(1, data, CLUSTER, True)]
    batches = [entry for entry in held if isinstance(entry, Batch)]
    assert len(batches) > 1
    assert {batch.synced for batch in batches} == {tail.offset}
    assert tuple(r for batch in batches for r in batch.records) == records
    with pytest.raises(ValueError, match="exceeds the limit"):
        encode_batch(identity, 1, 0, 0, (AcceptRecord(BALLOT, 1, (bytes(9 << 20),)),))


def test_deletion_and_restart_from_a_snapshot(directory: Path) -> None:
    writer = Writer(opened(directory, retain_bytes=0))
    states: dict[int, State] = {}
    while writer.journal.segments < 6:
        writer.fix(20, 400)
        states[writer.state.fixed] = writer.state
    middle = sorted(states)[len(states) // 2]
    writer.journal.delete_below(middle)
    writer.journal.close()
    numbers = [segment.number for segment in verify(directory, CLUSTER, VOTER).segments]
    assert numbers[0] > 1
    assert numbers == list(range(numbers[0], numbers[-1] + 1))

    # At, one below and far above the snapshot: from it, all that is above comes back.
    base = states[middle]
    journal = opened(directory)
    snapshot = State(NO_BALLOT, base.fixed, base.chain, (), base.genesis)
    state = snapshot
    slots: list[int] = []
    for state, runs in journal.replay(snapshot):  # noqa: B007
        slots.extend(slot for run in runs for slot in range(run.first, run.last + 1))
    assert state == writer.state
    assert slots == list(range(middle + 1, writer.state.fixed + 1))
    with pytest.raises(JournalError, match="Put the newer snapshot back"):
        list(journal.replay(first_state(CLUSTER)))
    journal.close()


def test_a_promise_outlives_the_segment_it_was_made_in(directory: Path) -> None:
    """Only headers tell of it by then, and it is above the ballot of every accept behind them."""
    writer = Writer(opened(directory, retain_bytes=0))
    promised = Ballot(0, 99, 1)
    writer.commit(PromiseRecord(promised))
    while writer.journal.segments < 5:
        writer.fix(20, 400)
    base = writer.state
    writer.fix(5)
    writer.journal.delete_below(base.fixed)
    writer.journal.close()
    assert verify(directory, CLUSTER, VOTER).segments[0].number > 2
    journal = opened(directory)
    snapshot = State(NO_BALLOT, base.fixed, base.chain, (), base.genesis)
    states = [state for state, _ in journal.replay(snapshot)]
    assert states[-1].promised == promised
    assert states[-1] == writer.state
    journal.close()


def test_nothing_is_deleted_above_the_snapshot_or_below_the_limit(directory: Path) -> None:
    writer = Writer(opened(directory, retain_bytes=3 * SEGMENT_BYTES))
    # Accepted, never fixed: slots above the snapshot that stand in the oldest segments.
    writer.commit(AcceptRecord(BALLOT, 1, tuple(value(n) for n in range(1, 50))))
    while writer.journal.segments < 8:
        writer.commit(*(PromiseRecord(Ballot(0, n, 1)) for n in range(1000)))
    writer.journal.delete_below(48)
    writer.journal.close()
    assert verify(directory, CLUSTER, VOTER).segments[0].number == 2, "slot 49 is in segment 2"
    again = Writer(opened(directory, retain_bytes=3 * SEGMENT_BYTES))
    assert again.recovered == writer.state
    again.journal.delete_below(49)
    again.journal.close()
    kept = verify(directory, CLUSTER, VOTER).segments
    assert kept[0].number > 2
    size = sum(segment.size_bytes for segment in kept)
    assert 2 * SEGMENT_BYTES < size <= 3 * SEGMENT_BYTES + SEGMENT_BYTES


def test_installed_snapshot_and_foreign_genesis(directory: Path) -> None:
    genesis = Genesis((1, 2, 3), (10, 20, 30))
    chain = bytes(32)
    writer = Writer(opened(directory))
    installed = State(NO_BALLOT, 100, chain, (), genesis)
    writer.journal.append((InstallRecord(100, chain, genesis),))
    await_batch(writer.journal, writer.journal.submit(installed))
    crash(writer.journal)
    journal = opened(directory)
    with pytest.raises(JournalError, match="at slot 100 that the journal names is missing"):
        list(journal.replay(first_state(CLUSTER)))
    for state, _ in journal.replay(State(NO_BALLOT, 100, chain, (), genesis)):
        assert state.fixed == 100
    journal.start(state)
    journal.close()
    journal = opened(directory)
    with pytest.raises(JournalError, match="different first slots"):
        list(journal.replay(State(NO_BALLOT, 100, chain, (), Genesis((1,), (5,)))))
    journal.close()


# --- failing disks --------------------------------------------------------------------------


class FaultyDisk(Disk):
    """Fails the named call of the sync thread from the moment it is armed."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.armed = False
        self.tries = 0

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self.armed and self.fault == "short":
            self.tries += 1
            return super().pwrite(fd, data[: len(data) // 2], offset)
        if self.armed and self.fault == "write":
            self.tries += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        if self.armed and self.fault == "sync":
            self.tries += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fdatasync(fd)


class GatedDisk(Disk):
    """Holds the sync thread in its sync until released."""

    def __init__(self) -> None:
        self.gate_closed = False
        self._read, self._write = os.pipe()

    def release(self) -> None:
        self.gate_closed = False
        os.write(self._write, b"x")

    def fdatasync(self, fd: int) -> None:
        if self.gate_closed and threading.current_thread().name == "journal-sync":
            os.read(self._read, 1)
        super().fdatasync(fd)


class CountingDisk(Disk):
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def _note(self, name: str) -> None:
        self.calls.append((name, threading.current_thread().name))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._note("pwrite")
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self._note("fdatasync")
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self._note("fsync")
        super().fsync(fd)


class NamingDisk(Disk):
    """Notes, for each thread, what makes files and names durable, in order."""

    def __init__(self) -> None:
        self.calls: dict[str, list[str]] = {}
        self._names: dict[int, str] = {}

    def _note(self, what: str, name: str) -> None:
        thread = threading.current_thread().name
        self.calls.setdefault(thread, []).append(f"{what} {name}")

    def create(self, path: Path) -> int:
        self._note("create", path.name)
        fd = super().create(path)
        self._names[fd] = path.name
        return fd

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if data.strip(b"\0"):
            self._note("write", self._names[fd])
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._note("sync", self._names[fd])
        super().fsync(fd)

    def overwrite(self, path: Path, data: bytes, offset: int) -> None:
        self._note("overwrite and sync", path.name)
        Disk().overwrite(path, data, offset)

    def truncate(self, path: Path, size_bytes: int) -> None:
        self._note("cut and sync", path.name)
        super().truncate(path, size_bytes)

    def rename(self, old: Path, new: Path) -> None:
        self._note("rename to", new.name)
        super().rename(old, new)

    def sync_directory(self, directory: Path) -> None:
        self._note("sync", f"{directory.name}/")
        super().sync_directory(directory)


def test_names_are_on_the_disk_before_what_they_name_counts(tmp_path: Path) -> None:
    """A file whose name is not synced is gone after a power failure, with all that was synced in
    it; and what a restart acts on must be durable, though a crash may have left it unsynced."""
    directory = tmp_path / "journal"
    disk = NamingDisk()
    format_journal(directory, CLUSTER, VOTER, disk=disk)
    one, two, three = map(segment_name, (1, 2, 3))
    assert disk.calls["MainThread"] == [
        "create format.tmp", "write format.tmp", "sync format.tmp",
        f"rename to {one}", "sync journal/", f"sync {tmp_path.name}/",
    ]  # fmt: skip
    disk.calls.clear()
    journal = opened(directory, disk)
    for state, _ in journal.replay(first_state(CLUSTER)):  # noqa: B007
        pass
    journal.start(state)
    assert disk.calls["MainThread"] == [
        f"overwrite and sync {one}", "sync journal/",
        f"create {two}", f"sync {two}", "sync journal/",
        f"write {two}", f"sync {two}", f"cut and sync {one}",
    ]  # fmt: skip
    wait_for_spare(journal)
    assert disk.calls["journal-keeper"] == [f"create {three}", f"sync {three}", "sync journal/"]
    journal.close()


@pytest.mark.parametrize("fault", ["short", "write", "sync"])
def test_a_failed_write_or_sync_ends_the_journal_for_good(directory: Path, fault: str) -> None:
    disk = FaultyDisk(fault)
    writer = Writer(opened(directory, disk))
    writer.fix(5)
    durable = writer.state
    wait_for_spare(writer.journal)
    disk.armed = True
    with pytest.raises(JournalFailedError, match=r"short write|Input/output error"):
        writer.fix(50)
    assert disk.tries == 1
    disk.armed = False
    for _ in range(2):
        with pytest.raises(JournalFailedError):
            writer.journal.completed()
        with pytest.raises(JournalFailedError):
            writer.journal.submit(writer.state)
    with pytest.raises(JournalFailedError):
        writer.journal.close()
    assert disk.tries == 1, "never tried again"
    again = Writer(opened(directory))
    assert again.recovered.fixed >= durable.fixed
    again.journal.close()


def wait_for_spare(journal: Journal) -> None:
    """Wait for the keeper thread to have prepared the next segment."""
    with journal._changed:
        assert journal._changed.wait_for(lambda: journal._next_fd >= 0, 20)


class FullDisk(Disk):
    """A disk on which only ``room`` more segments can be prepared."""

    def __init__(self, room: int) -> None:
        self.room = room

    def reserve(self, fd: int, size_bytes: int) -> None:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= 1
        super().reserve(fd, size_bytes)


def test_full_disk_is_told_before_it_hurts_and_heals(directory: Path) -> None:
    disk = FullDisk(room=2)
    writer = Writer(opened(directory, disk))
    wait_for_spare(writer.journal)
    assert writer.journal.free_bytes() > 0
    while writer.journal.segments < 3:
        writer.fix(20, 400)
    with writer.journal._changed:
        journal = writer.journal
        assert journal._changed.wait_for(lambda: journal._next_error is not None, 20)
    names = {path.name for path in directory.iterdir()}
    assert names == {segment_name(1), segment_name(2), segment_name(3)}, "no half segment is left"
    writer.commit(PromiseRecord(Ballot(0, 99, 1)))  # there is still room for promises
    disk.room = 1
    assert writer.journal.free_bytes() == 0, "full until the next segment is there"
    wait_for_spare(writer.journal)
    assert writer.journal.free_bytes() > 0
    writer.journal.close()


def test_full_disk_without_any_room_ends_the_voter(directory: Path) -> None:
    disk = FullDisk(room=1)
    writer = Writer(opened(directory, disk))
    with pytest.raises(JournalFailedError, match="No space left"):
        fix_until(writer, segments=9)
    with pytest.raises(JournalFailedError):
        writer.journal.close()
    assert Writer(opened(directory)).recovered.fixed >= writer.state.fixed - 20


def fix_until(writer: Writer, segments: int) -> None:
    while writer.journal.segments < segments:
        writer.fix(20, 400)


# --- small parts ----------------------------------------------------------------------------


def test_highest_slot() -> None:
    assert highest_slot(()) == 0
    assert highest_slot((PromiseRecord(BALLOT),)) == 0
    accept = AcceptRecord(BALLOT, 5, (b"", b""))
    assert highest_slot((accept, FixedRecord(3, b""))) == 6
    assert highest_slot((accept, LearnedRecord(7, (b"",), b""))) == 7
    assert highest_slot((InstallRecord(9, b"", Genesis((), ())), accept)) == 9


def test_an_entry_that_cannot_stand_there_is_refused() -> None:
    identity = Identity(CLUSTER, VOTER, 7, 1)
    header, tail = open_segment(identity, 1, first_state(CLUSTER), 0, 0)
    for entry in (Batch(tail.offset + 1, ()), Stop(tail.offset + 1)):
        data = header.data + encode_entry(identity, 1, tail.offset, entry)
        with pytest.raises(JournalError, match="cannot stand here"):
            recover([(1, data)], CLUSTER, VOTER)


def test_a_start_that_fails_leaves_the_journal_usable(directory: Path) -> None:
    journal = opened(directory, FullDisk(room=0))
    with pytest.raises(OSError, match="No space left"):
        journal.start(first_state(CLUSTER))
    journal.close()
    assert Writer(opened(directory)).identity.boot == 1
