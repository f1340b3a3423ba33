"""Certificates, roles, revocation, rotation: real processes, the real commands.

What is told to whom: no secret is told to anybody.  What is written (a key, a value, an id, an
attribute, any other payload) is told to who asks for it and to who sent it, in answers and in
errors to that same party.  It stands in no log, no status, no report and no error of another.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import pytest

import trex_core.credentials
from dashboard.local import LocalCluster
from listeners.credentials import Credentials as ListenerCredentials
from tests.e2e.harness import Ledger, config_of, put, write_for_ever
from trex_core.access import Grant
from trex_core.credentials import KEYS_FILE, parse_keys
from trex_core.messages import COMMAND_BYTES_MAX, Kind, SealTold, Submit
from trex_core.metadata.commands import ConfigPut, MemberJoin, encode_command
from trex_core.seal import PeerOpener, Sealer, Signer, StreamOpener
from trex_core.wire import Channel, FrameError, Identity, frame
from voters.client import connect
from voters.credentials import Credentials
from voters.driver import Rejected, TooLarge, TrexError, Unauthorized, Unavailable, open_driver

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
            with anyio.fail_after(SOON_S):
                while (await driver.find_leader()).voter == leader:
                    with suppress(Rejected):  # on a busy machine none took over in time
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


MARK = "payl0ad-0f-s0mebody"
"""Stands in all that is written and in all garbage that is sent; nobody who did not ask sees it."""


class Marks:
    """Writes what holds the mark, by every path there is, and notes what others were told."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.config = config_of(cluster)
        self.told: list[str] = []

    async def write(self, name: str) -> None:
        """Everything a client may ask, granted and refused, as it should be and malformed."""
        admin = self.cluster.credentials()
        async with connect(self.config, admin, deadline_s=SOON_S) as client:
            entry = await client.put(f"{MARK}/{name}", f"value {MARK}")
            await client.cas(f"{MARK}/{name}", entry.slot, f"second {MARK}")
            with pytest.raises(Rejected):
                await client.cas(f"{MARK}/{name}", entry.slot, f"third {MARK}")
            await client.join(
                f"{MARK}-{name}", address=MARK, zone=MARK, attributes={MARK: f"attribute {MARK}"}
            )
            with pytest.raises(Rejected):
                await client.join(f"{MARK}-{name}")
            await client.delete(f"{MARK}/{name}")
            await client.put(f"{MARK}/kept/{name}", f"value {MARK}")
            self.told.append(str(await client.driver.statuses()))
        async with open_driver(self.config, admin, deadline_s=SOON_S) as driver:
            mark = MARK.encode()
            for command in (mark, b"\xc1\x01" + mark, b"\xc1\x01\x93\x01\xa9" + mark * 3):
                await driver.submit(command)  # rejected in its slot
            with pytest.raises(TrexError):
                await driver.submit(b"\xc1\x7f" + mark)  # of a level nobody knows
            with pytest.raises(TooLarge):
                await driver.submit(mark * (COMMAND_BYTES_MAX // len(mark) + 1))
            await driver.query(mark)
        for role, prefixes in (("reader", ()), ("writer", ("elsewhere/",))):
            place = self.cluster.credentials(f"{role}-{name}")
            self.cluster.authority.issue(Grant(f"{role}-{name}", role, prefixes), place, 1)
            async with connect(self.config, place, deadline_s=SOON_S) as client:
                with pytest.raises(Unauthorized):
                    await client.put(f"{MARK}/denied", f"value {MARK}")

    def throw(self) -> None:
        """Garbage that holds the mark: at every port, as anybody, and as who holds a certificate
        or the key of the stream."""
        cluster_id = self.config.cluster_id_bytes
        who = Identity(cluster_id, 0, 1, 1)
        bodies = [MARK.encode() * 5, b"\xc1" + MARK.encode(), b"\x92\x3c\xb3" + MARK.encode()]
        channels = (Channel.PEER, Channel.CLIENT, Channel.CATCHUP, Channel.STREAM)
        frames = [MARK.encode() * 9]
        frames += [frame(who, channel, body) for channel in channels for body in bodies]
        frames += [data[:-1] + b"?" for data in frames]
        papers = Credentials(self.cluster.credentials(), cluster_id)
        ring = papers.keys.stream
        sealer = Sealer(Channel.STREAM, who, ring.first, b"salt")
        sealed = [datagram for body in bodies for datagram in sealer.datagrams(body)]
        with socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
            stream = self.config.stream
            targets = [(voter.host, voter.peer_port) for voter in self.config.voters]
            targets += [(stream.group, stream.port), (stream.group, stream.repair_port)]
            for target in targets:
                for data in frames + sealed:
                    udp.sendto(data, target)
        voter = self.config.voters[0]
        for port, channel in (
            (voter.peer_port, Channel.PEER),
            (voter.client_port, Channel.CLIENT),
            (voter.archive_port, Channel.CATCHUP),
        ):
            for data in [MARK.encode() * 9, *(frame(who, channel, body) for body in bodies)]:
                self._say(voter.host, port, data, None)
                self._say(voter.host, port, data, papers.client)

    def _say(self, host: str, port: int, data: bytes, context: ssl.SSLContext | None) -> None:
        with (
            suppress(OSError),
            socket.create_connection((host, port), SOON_S) as plain,
            context.wrap_socket(plain) if context else nullcontext(plain) as connection,
        ):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            self.told.append(repr(connection.recv(4096)))

    def ask_sql(self, listener: str) -> None:
        """Queries that hold the mark, or meet it; their answers are for who asks."""
        for sql in (
            f"SELECT '{MARK}' FROM config WHERE key = '{MARK}'",
            f"SELECT {MARK}", "SELECT value::INTEGER FROM config", f"SELECT error('{MARK}')",
            f"DELETE FROM config WHERE key = '{MARK}'", f"FROM read_text('/{MARK}')",
        ):  # fmt: skip
            trex(self.cluster, "sql", "--listener", listener, sql)

    def seen(self) -> dict[str, str]:
        """All that others see, by where."""
        found = {
            str(path.relative_to(self.cluster.directory)): path.read_text(errors="replace")
            for pattern in ("logs/*", "*/status.json")
            for path in self.cluster.directory.glob(pattern)
        }
        for command in (["status", "--json"], ["status"], ["doctor"], ["cert", "show"]):
            done = trex(self.cluster, *command)
            found[" ".join(command)] = done.stdout + done.stderr
        for table in ("listener", "ballots"):
            done = trex(self.cluster, "sql", "--listener", "two", f"FROM {table}", "--json")
            assert done.returncode == 0, done.stderr
            found[table] = done.stdout
        for child in self.cluster.children.values():
            if child.running:
                line = Path(f"/proc/{child.process.pid}/cmdline").read_bytes()
                found[f"command line of {child.name}"] = line.decode()
        found["what was answered"] = "\n".join(self.told)
        return found


async def test_no_payload_is_in_any_log_status_or_error_of_another(tmp_path):
    journal = {"snapshot_slots": 20, "retain_bytes": 0, "segment_bytes": 1 << 16}
    with LocalCluster(tmp_path, 3, timing={"tick_ms": 10}, journal=journal) as cluster:
        cluster.start_voters()
        for voter in cluster.voter_ids:
            cluster.voter(voter).wait_for_line("voter.archive.ready", 30)
        cluster.start_listener("one", drop_percent=30).wait_for_line("listener.ready", 30)
        marks = Marks(cluster)
        await marks.write("first")
        await anyio.to_thread.run_sync(marks.throw)
        # A voter that was away catches up, a new listener begins with a snapshot.
        async with open_driver(marks.config, cluster.credentials(), deadline_s=SOON_S) as driver:
            away = (await driver.find_leader()).voter % 3 + 1
        cluster.voter(away).kill()
        for turn in range(2):
            await marks.write(f"away-{turn}")
        cluster.start_voter(away).wait_for_line("voter.archive.ready", 30)
        cluster.start_listener("two").wait_for_line("listener.ready", 30)
        await marks.write("last")
        await anyio.to_thread.run_sync(marks.ask_sql, "two")
        # A journal that is damaged in the middle of a payload ends its voter in words.
        cluster.voter(away).kill()
        journals = sorted((cluster.directory / f"voter-{away}" / "journal").glob("*.journal"))
        held = [path for path in journals if MARK.encode() in path.read_bytes()]
        assert held, "the marks are on the disk"
        data = bytearray(held[0].read_bytes())
        data[data.index(MARK.encode()) + 2] ^= 1
        held[0].write_bytes(data)
        damaged = cluster.start_voter(away)
        with anyio.fail_after(SOON_S):
            await anyio.to_thread.run_sync(damaged.process.wait)
        found = await anyio.to_thread.run_sync(marks.seen)
        assert "at byte" in found[f"logs/voter-{away}.log"]
        shown = trex(cluster, "config", "list", "--json").stdout
    assert MARK in shown, "who asks is told"
    assert len(found) >= 12
    assert [where for where, text in found.items() if MARK in text] == []


def test_what_holds_a_secret_does_not_show_it(three):
    """Not in a traceback, not in a log of it: by ``repr``, ``str`` and format."""
    cluster_id = config_of(three).cluster_id_bytes
    place = three.credentials("voter-1")
    keys = parse_keys((place / KEYS_FILE).read_text())
    file = msgspec.toml.decode((place / KEYS_FILE).read_text(), type=trex_core.credentials._File)
    who = Identity(cluster_id, 1, 2, 3)
    secrets = [
        keys.signing,
        *(key.secret for ring in (keys.stream, keys.voter) for key in ring.keys),
    ]
    first = keys.voter.first
    opener = PeerOpener(cluster_id, keys.voter)
    opener.told(who, first.epoch, first.secret, 1)
    holders = [
        keys, file, keys.stream, keys.voter, first, SealTold(1, first.secret, 1),
        Signer(keys.signing, cluster_id, 1), Sealer(Channel.PEER, who, first, first.secret), opener,
        opener._told[1][first.epoch], StreamOpener(cluster_id, keys.stream),
        Credentials(place, cluster_id),
        ListenerCredentials(three.credentials("listener"), cluster_id),
        three.authority, ValueError(keys), FrameError("body"),
    ]  # fmt: skip
    for holder in holders:
        for text in (repr(holder), str(holder), f"{holder}", repr([holder]), repr({1: (holder,)})):
            for secret in secrets:
                assert secret.hex() not in text, type(holder)
                assert repr(secret)[2:-1] not in text, type(holder)
    key = (place / "node.key").read_text().splitlines()[1]
    assert key not in repr(holders) + str(holders)


async def test_nobody_speaks_in_the_session_of_another(three):
    """Or a number of it would be used up, and an acknowledged write be none."""
    config = config_of(three)
    for name in ("alice", "mallory"):
        three.authority.issue(Grant(name, "writer"), three.credentials(name), 1)
    async with (
        open_driver(config, three.credentials("alice"), deadline_s=SOON_S) as alice,
        open_driver(config, three.credentials("mallory"), deadline_s=SOON_S) as mallory,
    ):
        session = await alice.open_session()
        assert await alice.next_sequence(session) == 1
        with pytest.raises(Unauthorized, match="opened by somebody else"):
            await mallory.next_sequence(session)
        for kind in (Kind.COMMAND, Kind.SKIP, Kind.CLOSE):
            command = encode_command(ConfigPut("a", "stolen")) if kind == Kind.COMMAND else b""
            with pytest.raises(Unauthorized, match="opened by somebody else"):
                await mallory._ask(
                    lambda n, k=kind, c=command: Submit(n, k, session, 1, 1, c), None
                )
        assert await alice.next_sequence(session) == 1
