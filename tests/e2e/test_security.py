"""Certificates, roles, revocation, rotation: real processes, the real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import anyio
import pytest

from dashboard.local import LocalCluster
from tests.e2e.harness import Ledger, config_of, put, write_for_ever
from trex_core.access import Grant
from trex_core.metadata.commands import ConfigPut, MemberJoin, encode_command
from voters.client import connect
from voters.driver import Unauthorized, Unavailable, open_driver

pytestmark = pytest.mark.anyio
SOON_S = 20.0


def trex(
    cluster: LocalCluster, *arguments: str, name: str = "admin"
) -> subprocess.CompletedProcess:
    """Run ``trex`` with the credentials of ``name``."""
    environment = {**os.environ, **cluster.environment}
    environment["TREX_CREDENTIALS"] = str(cluster.credentials(name))
    return subprocess.run(
        [sys.executable, "-m", "dashboard.cli", *arguments],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


async def in_thread(*arguments, **options) -> subprocess.CompletedProcess:
    return await anyio.to_thread.run_sync(lambda: trex(*arguments, **options))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three voters that run, and nobody else."""
    with LocalCluster(tmp_path_factory.mktemp("cluster"), 3, timing={"tick_ms": 10}) as cluster:
        cluster.start_voters()
        yield cluster


async def test_each_role_may_do_what_it_is_for_and_is_told_what_it_lacks(three):
    config = config_of(three)
    for grant in (
        Grant("eyes", "reader"),
        Grant("hands", "writer"),
        Grant("billing", "writer", ("app/billing/",)),
    ):
        three.authority.issue(grant, three.credentials(grant.name), 1)
    async with connect(config, three.credentials("eyes"), deadline_s=SOON_S) as client:
        assert await client.get("nothing") is None
        with pytest.raises(Unauthorized, match="'eyes' is a reader; to change anything takes"):
            await client.put("colour", "green")
    async with connect(config, three.credentials("listener"), deadline_s=SOON_S) as client:
        with pytest.raises(Unauthorized, match="is a listener"):
            await client.put("colour", "green")
    async with connect(config, three.credentials("hands"), deadline_s=SOON_S) as client:
        await client.put("colour", "green")
        with pytest.raises(Unauthorized, match="to hand leadership over takes a admin"):
            await client.hand_over()
        with pytest.raises(Unauthorized, match="'trex/revoked' takes a admin"):
            await client.put("trex/revoked", "[]")
    async with connect(config, three.credentials("billing"), deadline_s=SOON_S) as client:
        await client.put("app/billing/rate", "3")
        await client.join("app/billing/node-1")
        for refused in (
            client.put("app/bill", "3"),
            client.join("node-1"),
            client.leave("node-1"),
            client.cas("colour", 1, "red"),
        ):
            with pytest.raises(Unauthorized, match="what begins with 'app/billing/' only"):
                await refused
    async with open_driver(config, three.credentials("billing"), deadline_s=SOON_S) as driver:
        commands = [ConfigPut("a", "b"), MemberJoin("node-1", "", "", 1, "up", {}, (), 0)]
        for command in commands:
            with pytest.raises(Unauthorized):
                await driver.submit(encode_command(command))
        await driver.submit(encode_command(ConfigPut("app/billing/x", "y")))


def test_the_command_says_what_is_missing_and_exits_1(three):
    three.authority.issue(Grant("looker", "reader"), three.credentials("looker"), 1)
    done = trex(three, "config", "put", "a", "b", "--deadline", "20", name="looker")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'looker' is a reader; to change anything takes a writer or admin" in done.stderr


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda place: (place / "node.key").chmod(0o644), "chmod 0600"),
        (lambda place: (place / "keys.toml").chmod(0o660), "chmod 0600"),
        (lambda place: (place / "node.key").unlink(), "cannot be read"),
        (lambda place: (place / "node.pem").write_text("junk"), "cannot be read, or names nobody"),
        (lambda place: (place / "node.key").write_text("junk"), "is not the key of"),
        (lambda place: (place / "keys.toml").write_text("signing = 'ab"), "keys.toml: it is not"),
        (lambda place: (place / "keys.toml").write_text("[voters]\n1 = 'ab'\n"), "hexadecimal"),
    ],
)
def test_credentials_that_cannot_be_used_are_one_clear_line(three, harm, says):
    place = three.credentials("broken")
    three.authority.issue(Grant("broken", "admin"), place, 1)
    secret = (place / "keys.toml").read_text().split('secret = "')[1][:64]
    harm(place)
    done = trex(three, "status", name="broken")
    assert done.returncode == 1, done
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert secret not in done.stdout + done.stderr
    shutil.rmtree(place)


def test_an_expired_certificate_is_a_clear_error(three, monkeypatch):
    import datetime as dt

    from dashboard import authority

    place = three.credentials("late")

    with monkeypatch.context() as patch:
        patch.setattr(authority, "CLOCK_SLACK", dt.timedelta(days=3))
        patch.setattr(authority, "DAY", dt.timedelta(days=-2))
        three.authority.issue(Grant("late", "admin"), place, 1)
    done = trex(three, "status", name="late")
    assert done.returncode == 1
    assert "expired on" in done.stderr and "trex cert issue --role admin late" in done.stderr


async def test_credentials_of_another_cluster_are_refused_on_both_sides(three, tmp_path):
    with LocalCluster(tmp_path, 3) as other:
        pass
    foreign = other.credentials()
    with pytest.raises(ValueError, match="is of another cluster"):
        async with open_driver(config_of(three), foreign, deadline_s=1):
            pass
    # The same cluster id under another authority: TLS itself refuses.
    twin = tmp_path / "twin"
    with LocalCluster(twin, 3) as third:
        text = third.config_path.read_text()
        text = text.replace(config_of(third).cluster_id, config_of(three).cluster_id)
        third.config_path.write_text(text)
        third.authority._cluster_id = config_of(three).cluster_id_bytes
        third.authority.issue(Grant("admin", "admin"), third.credentials())
    async with open_driver(config_of(three), third.credentials(), deadline_s=1.5) as driver:
        with pytest.raises(Unavailable, match="different authorities"):
            await driver.submit(b"x")


async def test_a_revoked_certificate_is_turned_away_within_seconds(three):
    three.authority.issue(Grant("thief", "writer"), three.credentials("thief"), 1)
    config = config_of(three)
    async with connect(config, three.credentials("thief"), deadline_s=SOON_S) as client:
        await client.put("stolen", "1")
        done = await in_thread(three, "cert", "revoke", "thief", "--deadline", "20", "--json")
        assert done.returncode == 0, done.stderr
        began = time.monotonic()
        told = ""
        with anyio.fail_after(10):
            while not told:
                try:
                    await client.put("stolen", "2", deadline_s=3)
                except (Unauthorized, Unavailable) as error:
                    told = str(error)
        assert "was revoked" in told
        assert time.monotonic() - began < 5
    (row,) = json.loads(done.stdout)
    shown = json.loads(trex(three, "cert", "show", "thief", "--json").stdout)
    assert shown[0]["serial"] == row["revoked"]
    async with connect(config, three.credentials(), deadline_s=SOON_S) as client:
        await client.put("others", "go on")


async def test_keys_rotate_under_load_and_nothing_stops(tmp_path):
    with LocalCluster(tmp_path, 3, timing={"tick_ms": 10}) as cluster:
        cluster.start_voters()
        listener = cluster.start_listener("one")
        listener.wait_for_line("listener.ready", 30)
        config = config_of(cluster)
        ledger = Ledger()
        async with (
            open_driver(config, cluster.credentials(), deadline_s=30) as driver,
            anyio.create_task_group() as group,
        ):
            await put(driver, "first", "value")
            group.start_soon(write_for_ever, driver, ledger, "w")
            await ledger.more(50)
            for step in (1, 2, 3):
                seen = {v: cluster.voter(v).line_count for v in cluster.voter_ids}
                heard = listener.line_count
                done = await in_thread(cluster, "keys", "rotate")
                assert done.returncode == 0, done.stderr
                assert f"step {step} of 3" in done.stderr
                for voter, since in seen.items():
                    cluster.voter(voter).wait_for_line("voter.credentials.read", 10, since)
                listener.wait_for_line("listener.credentials.read", 10, heard)
                await ledger.more(300)
            rows = json.loads((await in_thread(cluster, "keys", "show", "--json")).stdout)
            assert {(row["ring"], row["epoch"]) for row in rows} == {("voter", 2), ("stream", 2)}
            leader = (await driver.find_leader()).voter
            await driver.hand_over(leader % 3 + 1)  # votes go by datagram
            await ledger.more(100)
            group.cancel_scope.cancel()
        gaps = [b - a for a, b in zip(ledger.times, ledger.times[1:], strict=False)]
        print(f"{len(gaps)} writes, longest pause {max(gaps) * 1000:.0f} ms")
        status = trex(cluster, "sql", "--listener", "one", "SELECT stored FROM listener", "--json")
        assert status.returncode == 0, status.stderr


def test_no_secret_is_in_any_log_or_listing(three):
    secrets = set()
    for path in three.credentials().parent.glob("*/keys.toml"):
        for line in path.read_text().splitlines():
            if line.startswith(("secret", "signing")):
                secrets.add(line.split('"')[1])
    assert len(secrets) >= 2 + 3
    logs = "".join(path.read_text() for path in (three.directory / "logs").iterdir())
    shown = trex(three, "keys", "show").stdout + trex(three, "status", "--json").stdout
    for secret in secrets:
        assert secret not in logs + shown
