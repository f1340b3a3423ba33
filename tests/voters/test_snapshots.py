"""Snapshot files: whole under their name or not there, and a damaged one is set aside."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from trex_core.messages import Genesis, SnapshotOffer
from trex_core.sessions import NO_SESSIONS
from trex_core.snapshot import SnapshotError, encode_snapshot
from voters.journal import Disk
from voters.snapshots import Snapshots, snapshot_name, snapshot_slots

GENESIS = Genesis((1, 2, 3), (7, 8, 9))


def pieces(slot: int, size: int = 200_000) -> Iterator[bytes]:
    return encode_snapshot(slot, bytes([slot % 256]) * 32, GENESIS, NO_SESSIONS, [b"m" * size])


def offer_of(slot: int) -> tuple[SnapshotOffer, bytes]:
    data = b"".join(pieces(slot))
    digest = hashlib.blake2b(data, digest_size=32).digest()
    return SnapshotOffer(slot, bytes([slot % 256]) * 32, len(data), digest), data


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_saved_is_found_again(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    assert snapshots.newest() == (None, ())
    assert snapshots.keep(2) == 0
    for slot in (10, 20, 30):
        assert anyio.run(snapshots.save_in_thread, slot, pieces(slot)) > 200_000
    found, damaged = snapshots.newest()
    assert found is not None
    assert (found.slot, found.genesis, len(found.machine)) == (30, GENESIS, 200_000)
    assert damaged == ()
    assert anyio.run(snapshots.keep_in_thread, 2) == 20
    assert snapshots.slots == (20, 30)
    assert names(tmp_path / "snapshots") == [snapshot_name(20), snapshot_name(30)]


def test_a_damaged_one_is_set_aside_and_the_one_before_is_taken(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    for slot in (10, 20, 30):
        snapshots.save(slot, pieces(slot))
    flipped = bytearray((tmp_path / snapshot_name(30)).read_bytes())
    flipped[1000] ^= 4
    (tmp_path / snapshot_name(30)).write_bytes(flipped)
    (tmp_path / snapshot_name(20)).rename(tmp_path / snapshot_name(25))
    found, damaged = snapshots.newest()
    assert found is not None
    assert found.slot == 10
    assert len(damaged) == 2
    assert "digest" in damaged[0]
    assert "holds slot 20" in damaged[1]
    assert snapshots.slots == (10,)
    assert [name for name in names(tmp_path) if name.endswith(".damaged")] == [
        f"{25:016d}.damaged",
        f"{30:016d}.damaged",
    ]


def test_what_a_crash_left_is_cleaned_at_the_start(tmp_path: Path) -> None:
    Snapshots(tmp_path).save(10, pieces(10))
    (tmp_path / f"{20:016d}.writing").write_bytes(b"half")
    (tmp_path / f"{30:016d}.download").write_bytes(b"half")
    assert Snapshots(tmp_path).slots == (10,)
    assert names(tmp_path) == [snapshot_name(10)]


class OrderedDisk(Disk):
    """Notes the order of the calls that make a file durable; can run out of room."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.room_bytes = 1 << 40

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self.room_bytes -= len(data)
        if self.room_bytes < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.calls.append("pwrite")
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self.calls.append("fsync")
        super().fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        self.calls.append("rename")
        super().rename(old, new)

    def sync_directory(self, directory: Path) -> None:
        self.calls.append("sync_directory")
        super().sync_directory(directory)


def test_the_name_comes_after_the_bytes_and_both_are_synced(tmp_path: Path) -> None:
    disk = OrderedDisk()
    Snapshots(tmp_path, disk).save(10, pieces(10))
    assert set(disk.calls[:-3]) == {"pwrite"}
    assert disk.calls[-3:] == ["fsync", "rename", "sync_directory"]


def test_nothing_is_left_of_one_that_did_not_fit(tmp_path: Path) -> None:
    disk = OrderedDisk()
    snapshots = Snapshots(tmp_path, disk)
    snapshots.save(10, pieces(10))
    disk.room_bytes = 100_000
    with pytest.raises(OSError, match="No space left"):
        snapshots.save(20, pieces(20))
    assert names(tmp_path) == [snapshot_name(10)]


def test_download(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    offer, data = offer_of(40)
    download = snapshots.download(offer)
    while download.offset < offer.size_bytes:
        download.add(data[download.offset : download.offset + 70_000])
    assert snapshots.slots == ()
    assert download.finish().slot == 40
    assert names(tmp_path) == [snapshot_name(40)]
    assert (tmp_path / snapshot_name(40)).read_bytes() == data


@pytest.mark.parametrize("fault", ["bytes", "short", "slot", "long", "aborted"])
def test_a_download_that_is_not_what_was_offered_leaves_nothing(tmp_path: Path, fault: str) -> None:
    snapshots = Snapshots(tmp_path)
    offer, data = offer_of(40)
    if fault == "slot":
        offer = SnapshotOffer(41, offer.chain, offer.size_bytes, offer.digest)
    download = snapshots.download(offer)
    if fault == "bytes":
        data = data[:100] + b"?" + data[101:]
    if fault == "aborted":
        download.add(data[:100])
        download.abort()
        download.abort()
    elif fault == "long":
        with pytest.raises(SnapshotError, match="more bytes"):
            download.add(data + b"x")
    else:
        download.add(data[:-1] if fault == "short" else data)
        with pytest.raises(SnapshotError):
            download.finish()
    assert names(tmp_path) == []


def test_a_download_of_another_snapshot_than_was_offered_is_refused(tmp_path: Path) -> None:
    """One that is whole, of the same slot, chain and size, is another all the same: the offer is
    what a voter signed."""
    snapshots = Snapshots(tmp_path)
    offer, data = offer_of(40)
    other = b"".join(encode_snapshot(40, offer.chain, GENESIS, NO_SESSIONS, [b"o" * 200_000]))
    assert len(other) == len(data)
    download = snapshots.download(offer)
    download.add(other)
    with pytest.raises(SnapshotError, match="not those that were offered"):
        download.finish()
    assert names(tmp_path) == []


def test_slots_of_names() -> None:
    assert snapshot_slots([snapshot_name(5), snapshot_name(3), "x.snapshot", "1.writing"]) == [3, 5]
