"""The command ``trex``: its words, its JSON, its exit codes, what it costs to start."""

from __future__ import annotations

# ruff: noqa: ARG001 - asking for a fixture is having a cluster that runs
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib

import anyio
import anyio.from_thread
import msgspec
import pytest
import typer.main
from rich.console import Console
from typer.testing import CliRunner

from dashboard import cli, tables
from dashboard.authority import make_authority
from dashboard.cluster_init import KNOBS
from dashboard.tables import judge, status_rows
from listeners.sql import QueryResult, SqlRefusedError, serve_sql
from tests.credentials import folder
from tests.voters.fake_gateway import Do, FakeCluster
from trex_core.access import REVOKED_KEY, Grant, revoked_serials, revoked_text
from trex_core.cluster import (
    ClusterConfig,
    JournalConfig,
    StreamConfig,
    TimingConfig,
    VoterEntry,
    parse_cluster,
)
from trex_core.credentials import FOLDER
from trex_core.messages import PeerView, RefusalReason, Status
from voters.driver import Unavailable


@pytest.fixture
def portal():
    with anyio.from_thread.start_blocking_portal() as portal:
        yield portal


@pytest.fixture
def fake(portal, tmp_path, monkeypatch):
    """A scripted cluster in a thread of its own, named by TREX_CONFIG."""

    async def made() -> FakeCluster:
        return FakeCluster(5)

    cluster = portal.call(made)
    with portal.wrap_async_context_manager(cluster):
        (tmp_path / "cluster.toml").write_text(cluster.text)
        monkeypatch.setenv("TREX_CONFIG", str(tmp_path / "cluster.toml"))
        monkeypatch.setenv("TREX_CREDENTIALS", str(folder(cluster.config)))
        yield cluster


class Ran:
    """What one run of ``trex`` printed, and its exit code."""

    def __init__(self, *arguments: str) -> None:
        result = CliRunner().invoke(cli.app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code = result.exit_code
        self.out = result.stdout
        self.err = result.stderr

    @property
    def rows(self) -> list[dict]:
        assert self.code == 0, self.err
        return json.loads(self.out)


# --- init -----------------------------------------------------------------------------------


def test_init_writes_a_cluster_file_that_is_understood(tmp_path):
    ran = Ran("init", str(tmp_path / "new"), "--voters", "3", "--format")
    path = tmp_path / "new" / "cluster.toml"
    assert ran.code == 0 and ran.out.strip() == str(path)
    config = parse_cluster(path.read_text())
    assert len(config.voters) == 3 and config.stream.ttl == 0
    for voter in (1, 2, 3):
        assert (tmp_path / "new" / f"voter-{voter}" / "journal").is_dir()
    before = path.read_bytes()
    ran = Ran("init", str(tmp_path / "new"))
    assert ran.code == 1 and "not overwritten" in ran.err and path.read_bytes() == before


def test_init_lists_every_knob_with_its_default(tmp_path):
    Ran("init", str(tmp_path))
    text = (tmp_path / "cluster.toml").read_text()
    for table, struct in (
        ("stream", StreamConfig),
        ("timing", TimingConfig),
        ("journal", JournalConfig),
    ):
        for field in msgspec.structs.fields(struct):
            assert re.search(rf"^(# )?{field.name} = ", text, re.MULTILINE), field.name
            if field.default is not msgspec.NODEFAULT:
                assert KNOBS[table][field.name]
    for field in msgspec.structs.fields(VoterEntry):
        assert field.name in text
    shown = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    assert parse_cluster(shown) == parse_cluster(text), "what is commented out is the default"
    tables = {f.name for f in msgspec.structs.fields(ClusterConfig)}
    assert set(tomllib.loads(text)) <= tables


def test_init_for_other_machines(tmp_path):
    hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    given = [part for host in hosts for part in ("--host", host)]
    assert Ran("init", str(tmp_path), "--voters", "3", *given, "--base-port", "9000").code == 0
    config = parse_cluster((tmp_path / "cluster.toml").read_text())
    assert [voter.host for voter in config.voters] == hosts
    assert config.voters[0].peer_port == 9000 and config.stream.port == 9009
    assert (config.stream.ttl, config.stream.interface) == (1, "0.0.0.0")


@pytest.mark.parametrize(
    "arguments",
    [("--voters", "4"), ("--host", "a", "--host", "b"), ("--base-port", "65530")],
)
def test_init_refuses_what_cannot_be(arguments, tmp_path):
    ran = Ran("init", str(tmp_path / "x"), *arguments)
    assert ran.code == 1 and len(ran.err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


# --- verbs ----------------------------------------------------------------------------------


def test_config_verbs(fake):
    (put,) = Ran("config", "put", "a/b", "1", "--json").rows
    assert put == {"key": "a/b", "value": "1", "slot": put["slot"]}
    assert Ran("config", "get", "a/b", "--json").rows == [put]
    assert Ran("config", "get", "a/b", "--local", "--json").rows == [put]
    (cas,) = Ran("config", "cas", "a/b", "2", "--slot", str(put["slot"]), "--json").rows
    assert cas["slot"] > put["slot"]
    ran = Ran("config", "cas", "a/b", "3", "--slot", str(put["slot"]))
    assert ran.code == 1 and "cas_failed" in ran.err and str(cas["slot"]) in ran.err
    Ran("config", "put", "b", "x")
    assert [row["key"] for row in Ran("config", "list", "a", "--json").rows] == ["a/b"]
    assert Ran("config", "delete", "a/b").code == 0
    ran = Ran("config", "get", "a/b")
    assert (ran.code, ran.out) == (1, "") and "no key" in ran.err
    assert "not_found" in Ran("config", "delete", "a/b").err


def test_member_ring_and_lease_verbs(fake):
    (lease,) = Ran("lease", "grant", "30", "--json").rows
    name = str(lease["lease"])
    Ran("members", "join", "m1", "--zone", "z", "--attribute", "a=b=c", "--attribute", "d=")
    Ran("members", "join", "m2", "--lease", name, "--weight", "2")
    Ran("members", "update", "m1", "--state", "draining", "--address", "h:1")
    m1, m2 = Ran("members", "--json").rows
    assert m1["attributes"] == {"a": "b=c", "d": ""} and m1["tokens"] is None
    assert (m1["zone"], m1["address"], m1["state"], m1["lease"]) == ("z", "h:1", "draining", None)
    assert (m2["weight"], m2["lease"]) == (2, lease["lease"])
    assert Ran("members", "list", "--json").rows == [m1, m2]
    (owner,) = Ran("ring", "owner", "key", "--json").rows
    assert owner["owner"] == "m2" and owner["replicas"] == ["m2"]
    (share,) = Ran("ring", "--json").rows
    assert share["member"] == "m2" and share["share"] == "100.0000%"
    assert Ran("lease", "renew", name, "--json").rows == [{"lease": int(name), "alive": True}]
    fake.alive = lambda _: ()
    assert Ran("lease", "renew", name).code == 1
    Ran("lease", "revoke", name)
    assert Ran("lease", "list", "--json").rows == []
    assert [m["id"] for m in Ran("members", "--json").rows] == ["m1"]
    assert Ran("members", "leave", "m1").code == 0
    assert Ran("members", "join", "m3", "--attribute", "nonsense").code == 2


def test_leader_handover_and_snapshot(fake):
    (row,) = Ran("leader", "--json").rows
    assert row["leader"] == 1
    assert Ran("leader", "handover", "--to", "4", "--json").rows == [{"leader": 4}]
    assert fake.leader == 4
    assert Ran("snapshot", "--json").rows == [{"voter": 4, "slot": 0}]
    assert Ran("leader", "handover", "--to", "9").code == 1


def test_tables_are_for_people(fake):
    Ran("config", "put", "key", "[not] :markup:")
    out = Ran("config", "list").out
    assert "[not] :markup:" in out and out.split()[:3] == ["key", "value", "slot"]
    assert "Voter 1 leads since ballot 0.1.1" in Ran("status").out


# --- certificates and keys ------------------------------------------------------------------


def test_revoking_adds_all_that_a_name_ever_had(fake, tmp_path):
    made = make_authority(tmp_path, fake.config)
    place = tmp_path / FOLDER / "ann"
    serials = {made.issue(Grant("ann", "reader"), place).serial for _ in range(2)}
    before = "7" * 40
    ran = Ran("config", "put", REVOKED_KEY, revoked_text(frozenset({before})))
    assert ran.code == 0, ran.err
    ran = Ran("cert", "revoke", "abba")
    assert ran.code == 1 and ran.out == ""
    assert "no certificate of 'abba'" in ran.err and "32 to 40 hexadecimal digits" in ran.err
    ran = Ran("cert", "revoke", "ann", "--json")
    assert {row["revoked"] for row in ran.rows} == serials and ran.err == ""
    assert Ran("cert", "revoke", min(serials)).err == ""
    mistyped = "7" * 39
    ran = Ran("cert", "revoke", mistyped, "--json")
    assert ran.rows[0]["revoked"] == mistyped
    assert "no certificate with this serial was issued here" in ran.err
    shutil.rmtree(made.folder)
    ran = Ran("cert", "revoke", "admin", "--json")
    assert len(ran.rows) == 1 and "the authority is not here" in ran.err
    (row,) = Ran("config", "get", REVOKED_KEY, "--json").rows
    assert revoked_serials(row["value"]) == {
        before,
        mistyped,
        *serials,
        ran.rows[0]["revoked"],
    }


def test_what_may_not_be_issued_is_told_and_rotation_says_what_it_does_not_know(fake, tmp_path):
    make_authority(tmp_path, fake.config)
    ran = Ran("cert", "issue", "--role", "reader", "voter-2")
    assert ran.code == 1 and ran.err.startswith("trex: 'voter-2' is the name of a voter")
    ran = Ran("keys", "rotate")
    assert ran.code == 0 and "step 1 of 3" in ran.err
    assert "Not those issued with --out elsewhere" in ran.err


# --- exit codes -----------------------------------------------------------------------------


def test_exit_codes(fake, portal, monkeypatch, tmp_path):
    assert Ran("config", "put", "a", "1").code == 0
    assert Ran("config", "put", "a").code == 2
    assert Ran("nonsense").code == 2
    assert Ran("import", "x", "--format", "nonsense").code == 2

    fake.leader = 0
    ran = Ran("config", "put", "a", "2", "--deadline", "0.2")
    assert ran.code == 4 and ran.err.startswith("trex: no quorum: ")
    assert len(ran.err.splitlines()) == 1 and ran.out == ""
    assert Ran("status").code == 4
    fake.leader = 1

    fake.script = lambda _, s: Do.APPLY if s.session == 0 else Do.MUTE
    ran = Ran("config", "put", "a", "3", "--deadline", "0.2")
    assert ran.code == 5 and "outcome unknown" in ran.err and "resolve()" not in ran.err
    fake.script = lambda _, s: Do.APPLY if s.session == 0 else RefusalReason.DISK_FULL
    with monkeypatch.context() as once:
        # Refused, and not asked again: an attempt on its way at the deadline would be unknown.
        once.setattr("voters.driver.PAUSE_S_MIN", 60.0)
        assert Ran("config", "put", "a", "3", "--deadline", "1").code == 4

    for voter in range(1, 6):
        portal.call(fake.stop, voter)
    ran = Ran("config", "get", "a", "--deadline", "0.2")
    assert ran.code == 4 and ran.err.startswith("trex: unavailable: ")

    monkeypatch.setenv("TREX_CONFIG", str(tmp_path / "nowhere.toml"))
    ran = Ran("status")
    assert ran.code == 1 and "trex init" in ran.err
    (tmp_path / "nowhere.toml").write_text(fake.text + "\nunknown_knob = 3\n")
    ran = Ran("status")
    assert ran.code == 1 and "unknown_knob" in ran.err


def test_a_damaged_disk_has_its_code(tmp_path):
    journal = tmp_path / "voter-1" / "journal"
    journal.mkdir(parents=True)
    (journal / "stranger").write_text("x")
    ran = Ran("init", str(tmp_path), "--voters", "1", "--format")
    assert ran.code == 3, ran.err


# --- status ---------------------------------------------------------------------------------


def statuses(fake: FakeCluster, leader: int, fixed: dict[int, int | None]):
    fake.leader = leader
    found: dict[int, Status | Unavailable] = {}
    for voter, slot in fixed.items():
        if slot is None:
            found[voter] = Unavailable(f"voter {voter} is gone")
        else:
            peers = tuple(PeerView(other, 30 * other, 0, 0, 1) for other in fixed if other != voter)
            found[voter] = msgspec.structs.replace(
                fake.status(voter, 1), fixed=slot, applied=slot, peers=peers
            )
    return found


@pytest.mark.parametrize(
    ("leader", "fixed", "healthy", "words", "may_stop"),
    [
        (3, {1: 9, 2: 9, 3: 9, 4: 9, 5: 9}, True, "Any one voter may be stopped", {1, 2, 3, 4, 5}),
        (3, {1: None, 2: None, 3: 9, 4: 9, 5: 9}, True, "Stop none of those that answer", {1, 2}),
        (3, {1: 9, 2: 9, 3: 9000, 4: 9000, 5: 9000}, True, "Behind: 1 by 8991, 2", {1, 2}),
        (3, {1: 9, 2: 9, 3: 9000, 4: 9, 5: 9}, False, "Fewer than a majority", set()),
        (0, {1: None, 2: None, 3: None, 4: 9, 5: 9}, False, "2 of 5 voters answer and 3", set()),
        (0, {1: 9, 2: 9, 3: 9, 4: 9, 5: 9}, False, "an election is under way", set()),
    ],
)
def test_the_verdict_in_words(fake, leader, fixed, healthy, words, may_stop):
    found = statuses(fake, leader, fixed)
    verdict = judge(fake.config, found)
    assert words in verdict.words
    assert (verdict.healthy, verdict.may_stop) == (healthy, frozenset(may_stop))
    for voter, slot in fixed.items():
        if slot is None:
            assert str(voter) in verdict.words.split("Not answering: ")[1]
    rows = status_rows(fake.config, found, verdict)
    assert [row["voter"] for row in rows] == [1, 2, 3, 4, 5]
    assert len({tuple(row) for row in rows}) == 1, "the same columns for all"


def test_status_as_json_and_watched(fake, portal):
    portal.call(fake.stop, 2)
    rows = Ran("status", "--json").rows
    assert [row["voter"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1]["role"] == "silent" and "cannot be reached" in rows[1]["error"]
    assert rows[0]["leads"] is True and rows[0]["promised"] == "0.1.1"
    ran = Ran("status", "--watch", "--json", "--count", "3", "--interval", "0.05")
    assert len(ran.out.splitlines()) == 3
    assert all(len(json.loads(line)) == 5 for line in ran.out.splitlines())
    ran = Ran("status", "--watch", "--count", "2", "--interval", "0.05")
    assert ran.code == 0 and "Voter 1 leads" in ran.out


# --- sql ------------------------------------------------------------------------------------


@pytest.fixture
def listener(portal, fake, tmp_path):
    """Something that answers on the socket of a listener named ``here``."""
    asked = []

    async def answer(request) -> QueryResult:
        asked.append(request)
        if "drop" in request.sql:
            raise SqlRefusedError("only one SELECT\n\nwith more lines")
        return QueryResult(
            ("id", "attributes", "n", "n"),
            ("VARCHAR", "JSON", "BIGINT", "BIGINT"),
            (("m1", '{"a": "b"}', 1, 2),),
            7,
            0,
        )

    folder = tmp_path / "here"
    folder.mkdir(mode=0o700)

    async def serve(*, task_status) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await serve_sql(folder / "sql.sock", answer, task_status=task_status)

    scopes: list[anyio.CancelScope] = []
    future, _ = portal.start_task(serve)
    yield asked
    portal.call(scopes[0].cancel)
    future.result()


def test_sql_prints_rows_and_nests_json(listener, tmp_path):
    (row,) = Ran("sql", "select 1", "--json").rows
    assert row == {"id": "m1", "attributes": {"a": "b"}, "n": 1, "n_2": 2}
    ran = Ran("sql", "select 1", "--listener", "here", "--at-least", "5", "--deadline", "2")
    assert ran.code == 0 and "as of slot 7, 0 behind" in ran.err and "m1" in ran.out
    assert (listener[-1].at_least_slot, listener[-1].deadline_ms) == (5, 2000)
    ran = Ran("sql", "drop table members", "--dir", str(tmp_path / "here"))
    assert (ran.code, ran.out, ran.err) == (1, "", "trex: only one SELECT\n")


def test_sql_without_a_listener_says_what_to_do(fake, tmp_path):
    ran = Ran("sql", "select 1")
    assert ran.code == 1 and "no listener runs in" in ran.err and "--dir" in ran.err
    ran = Ran("sql", "select 1", "--listener", "nobody")
    assert ran.code == 1 and "trex-listener run" in ran.err


# --- import ---------------------------------------------------------------------------------


def test_import_says_what_it_did(fake, listener, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_bytes(b"".join(b"0,%d,0,x,1,1\n" % machine for machine in range(300)))
    ran = Ran("import", "--format", "google-machine-events", str(trace), "--json")
    assert ran.code == 0 and "300 rows are imported" in ran.err and "listener here" in ran.err
    assert listener[-1].at_least_slot and json.loads(ran.out)
    assert len(fake.machine.state.members) == 300
    ran = Ran("import", "--format", "google-machine-events", str(trace))
    assert "0 of them now" in ran.err
    trace.write_bytes(b"0,5,0,x,1,1\nwhat\n")
    ran = Ran("import", "--format", "google-machine-events", str(trace))
    assert ran.code == 1 and "line 2" in ran.err


# --- the whole command ----------------------------------------------------------------------


def options():
    """Every option of every verb: (verb, option)."""
    group = typer.main.get_command(cli.app)

    def walk(command, path):
        for parameter in command.params:
            if parameter.param_type_name == "option":
                yield path, parameter
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name))

    return list(walk(group, ("trex",)))


def test_every_flag_can_come_from_the_environment():
    skipped = {"--help", "--version", "--install-completion", "--show-completion"}
    found = 0
    for path, option in options():
        if not skipped & set(option.opts):
            found += 1
            named = option.envvar
            names = [named] if isinstance(named, str) else list(named or [])
            assert names and all(name.startswith("TREX_") for name in names), (path, option.opts)
    assert found > 40


def test_every_verb_takes_the_cluster_file():
    with_config = {path for path, option in options() if "--config" in option.opts}
    all_verbs = {path for path, _ in options()}
    without = {path for path in all_verbs - with_config if len(path) > 1}
    assert without <= {
        ("trex", "init"), ("trex", "demo"), ("trex", "config"), ("trex", "lease"),
    }  # fmt: skip


def test_starting_costs_no_import_that_is_not_needed():
    code = (
        "import sys, dashboard.cli\n"
        "heavy = 'duckdb textual rich uvloop pygments voters.server listeners'.split()\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_a_closed_pipe_is_no_error(fake):
    command = [sys.executable, "-m", "dashboard.cli", "config", "list", "--json"]
    for number in range(2000):
        fake.machine.apply(number + 1, _put(number))
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, "")


def _put(number: int) -> bytes:
    from trex_core.metadata.commands import ConfigPut, encode_command

    return encode_command(ConfigPut(f"k{number}", "v" * 100))


def test_no_thread_is_left(fake):
    before = threading.active_count()
    Ran("config", "put", "a", "b")
    assert threading.active_count() == before


# --- what a person sees and may get wrong ---------------------------------------------------


@pytest.mark.parametrize("columns", [70, 80, 130])
def test_the_status_fits_its_terminal_and_breaks_no_word(fake, columns):
    found = statuses(fake, 3, dict.fromkeys(range(1, 6), 123_456))
    verdict = judge(fake.config, found)
    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(tables.status_table(status_rows(fake.config, found, verdict), verdict, columns))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= columns
    assert sum("follower" in line for line in lines) == 4
    assert any("promised" in line and "fixed" in line for line in lines)
    assert ("address" in "".join(lines)) == (columns == 130)


def printed(capsys, monkeypatch, rows, columns: int = 80, **given) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    tables.show(rows, as_json=False, **given)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_row_too_wide_for_a_table_is_a_list(capsys, monkeypatch):
    wide = {f"name_{number}": "x" * 15 for number in range(6)}
    lines = printed(capsys, monkeypatch, [wide])
    assert lines == ["── 1 ──", *(f"name {number}  {'x' * 15}" for number in range(6))]
    assert len(printed(capsys, monkeypatch, [wide], 120)) == 3


def test_columns_without_a_value_make_room(capsys, monkeypatch):
    row = {"id": "x" * 20, "address": None, "zone": None, "state": "y" * 20, "attributes": {}}
    lines = printed(capsys, monkeypatch, [row], 44)
    assert lines[0].split() == ["id", "state"] and lines[2].split() == ["x" * 20, "y" * 20]


def test_a_value_cannot_steer_the_terminal(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch, [{"key": "\x1b[2J", "value": b"\x01\xff", "n_n": 1}])
    assert lines[2].split() == [r"\x1b[2J", "01ff", "1"]
    assert printed(capsys, monkeypatch, [{"n_n": 1}], verbatim=True)[0] == "n_n"


@pytest.mark.parametrize(
    "words",
    [
        ("members", "join", "a", "--token", "9" * 30),
        ("lease", "grant", "inf"),
        ("lease", "revoke", "9" * 30),
        ("config", "cas", "a", "b", "--slot", "9" * 30),
        ("config", "put", "a", "\udcff"),
        ("members", "--json", "list"),
        ("members", "--config", "/nowhere", "list"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_a_usage_error(fake, words):
    ran = Ran(*words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (cli.USAGE, "", 1), ran.err


def test_the_format_of_an_import_is_not_the_one_of_init(tmp_path, monkeypatch):
    monkeypatch.setenv("TREX_FORMAT", "google-machine-events")
    assert Ran("init", str(tmp_path / "new")).code == 0


def test_a_host_that_is_none_is_refused(tmp_path):
    ran = Ran("init", str(tmp_path / "new"), "--host", "two words")
    assert ran.code == cli.REFUSED and "'two words'" in ran.err
    assert not (tmp_path / "new").exists()


def test_the_version_is_told():
    assert re.fullmatch(r"trex \d+\.\d+\.\d+\n", Ran("--version").out)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_an_answer_that_cannot_be_written_is_one_line(fake, more):
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        ran = subprocess.run(
            [sys.executable, "-m", "dashboard.cli", "config", "put", "a", "b", *more],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (ran.returncode, ran.stderr.count("\n")) == (cli.BROKEN, 1), ran.stderr
