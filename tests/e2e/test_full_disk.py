"""Disks that fill up: writes are refused in words, nothing is lost, and all goes on with room."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.e2e.harness import LocalCluster, all_config, config_of, put
from voters.driver import NoQuorum, OutcomeUnknown, open_driver

DISK_BYTES = 96 << 20
MARK_BYTES = 16 << 20
JOURNAL = {"segment_bytes": 1 << 20, "retain_bytes": 1 << 20, "free_bytes_min": MARK_BYTES}


@pytest.fixture
def small_disk(tmp_path):
    """A directory that is a disk of its own, of DISK_BYTES bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", place],
        capture_output=True, text=True,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place, left_bytes):
    """Fill the disk up to ``left_bytes`` free ones; the file that does it."""
    filler = place / "filler"
    with filler.open("wb") as file:
        while (free := shutil.disk_usage(place).free) > left_bytes:
            file.write(bytes(min(free - left_bytes, 1 << 20)))
            file.flush()
    return filler


async def test_full_disks_refuse_writes_in_words_and_go_on_when_there_is_room(small_disk):
    with LocalCluster(small_disk, 3, journal=JOURNAL) as cluster:
        cluster.start_voters()
        async with open_driver(config_of(cluster), cluster.credentials(), deadline_s=30) as driver:
            acknowledged = {"before": await put(driver, "before", "room")}
            filler = fill(small_disk, MARK_BYTES // 2)
            refused = None
            unknown = {}
            for count in range(2000):
                try:
                    acknowledged[f"while/{count}"] = await put(driver, f"while/{count}", "?", 2.0)
                except OutcomeUnknown as error:  # proposed before the leader knew
                    unknown[f"while/{count}"] = error
                except NoQuorum as error:
                    refused = error
                    break
            assert refused is not None, "the leader never saw that the disks are full"
            assert "disk" in str(refused), refused
            statuses = await driver.statuses()
            assert all(status.free_bytes < MARK_BYTES for status in statuses.values())
            assert (await all_config(driver)).keys() == acknowledged.keys()  # reads go on

            filler.unlink()
            acknowledged["after"] = await put(driver, "after", "room again")
            for key, error in unknown.items():
                acknowledged[key] = (await driver.resolve(error, 30)).slot
            found = await all_config(driver)
            assert {key: slot for key, (_, slot) in found.items()} == acknowledged
        assert all(cluster.voter(voter).running for voter in cluster.voter_ids)
