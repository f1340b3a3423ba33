"""The command ``trex``: this module alone knows its verbs, options and exit codes.

=====  ===========================================================================================
exit   meaning
=====  ===========================================================================================
0      done
1      refused: by the cluster, by a listener, or for what was asked
2      usage: no such verb or option
3      disk, journal or invariant
4      no quorum, no voter reached, or the deadline passed; surely not done
5      outcome unknown: it may have been done, or may be later
=====  ===========================================================================================

Data goes to stdout, everything else to stderr. What is slow to import (Rich, the listener, the
demo) is imported by the verb that needs it.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, ParamSpec

import anyio
import msgspec
import typer

from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.credentials import FOLDER
from voters.client import (
    Client,
    Fenced,
    NoQuorum,
    OutcomeUnknown,
    TrexError,
    Unavailable,
    connect,
)
from voters.config import ADMIN, credentials_folder, read_cluster

if TYPE_CHECKING:
    from dashboard import importer
    from trex_core.access import Holder
    from trex_core.credentials import Keys
    from trex_core.metadata.commands import Change, Member
    from voters.driver import Driver

REFUSED: Final = 1
USAGE: Final = 2
BROKEN: Final = 3
NO_QUORUM: Final = 4
UNKNOWN: Final = 5
INTERRUPTED: Final = 130
STATUS_S: Final = 1.0
"""How long a voter may take to answer for its status."""
IMPORT_DEADLINE_S: Final = 30.0
"""Default of how long a row of an import may go unacknowledged: longer than any election."""
SOCKET: Final = "sql.sock"

P = ParamSpec("P")

SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="A strongly consistent metadata backbone: its client, administration and demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)
config_app = typer.Typer(help="Configuration keys.", no_args_is_help=True)
members_app = typer.Typer(help="The members; without a verb, list them.")
ring_app = typer.Typer(help="The ring; without a verb, who owns how much of it.")
lease_app = typer.Typer(help="Leases, on which members may live.", no_args_is_help=True)
leader_app = typer.Typer(help="The leader; without a verb, who it is.")
cert_app = typer.Typer(help="Certificates: who is who, and may do what.", no_args_is_help=True)
keys_app = typer.Typer(help="The keys that datagrams are sealed with.", no_args_is_help=True)
for name, group in (
    ("config", config_app),
    ("members", members_app),
    ("ring", ring_app),
    ("lease", lease_app),
    ("leader", leader_app),
    ("cert", cert_app),
    ("keys", keys_app),
):
    app.add_typer(group, name=name)

Key = Annotated[str, typer.Argument(metavar="KEY")]
MemberId = Annotated[str, typer.Argument(metavar="MEMBER")]
LeaseId = Annotated[int, typer.Argument(metavar="LEASE")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", envvar="TREX_CONFIG", help="The cluster file (default: cluster.toml)."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", envvar="TREX_JSON", help="Print an array of objects.")
]
Deadline = Annotated[
    float,
    typer.Option(
        "--deadline", envvar="TREX_DEADLINE", min=0.001, help="Give up after so many seconds."
    ),
]
Local = Annotated[
    bool,
    typer.Option(
        "--local", envvar="TREX_LOCAL", help="Ask any voter, for what it has applied so far."
    ),
]
Weight = Annotated[int | None, typer.Option("--weight", envvar="TREX_WEIGHT")]
State = Annotated[
    str | None,
    typer.Option("--state", envvar="TREX_STATE", help="joining, up, draining or down."),
]
Address = Annotated[str | None, typer.Option("--address", envvar="TREX_ADDRESS")]
Zone = Annotated[str | None, typer.Option("--zone", envvar="TREX_ZONE")]
Attributes = Annotated[
    list[str] | None,
    typer.Option("--attribute", envvar="TREX_ATTRIBUTE", help="NAME=VALUE; may be repeated."),
]
Tokens = Annotated[
    list[int] | None,
    typer.Option("--token", envvar="TREX_TOKEN", help="A token of the ring; may be repeated."),
]
OnLease = Annotated[
    int | None, typer.Option("--lease", envvar="TREX_LEASE", help="The lease it lives on.")
]
DEADLINE: Final = 5.0


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"trex {version('trex-paxos')}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version."),
    ] = False,
    credentials: Annotated[
        Path | None,
        typer.Option(
            "--credentials",
            envvar="TREX_CREDENTIALS",
            help="Folder of your certificate and keys (default: credentials/admin beside the "
            "cluster file).",
        ),
    ] = None,
) -> None:
    """A strongly consistent metadata backbone: its client, administration and demo."""
    del version
    if credentials is not None:
        os.environ["TREX_CREDENTIALS"] = str(credentials)


# --- how a verb ends ----------------------------------------------------------------------------


def end(code: int, text: str) -> NoReturn:
    """Say one line on stderr and exit with ``code``."""
    typer.echo(f"trex: {text}", err=True)
    raise typer.Exit(code)


def told(verb: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors a verb may end with into one line and an exit code, and each paragraph of its
    help into one line, for the terminal to break."""

    paragraphs = (inspect.getdoc(verb) or "").split("\n\n")
    verb.__doc__ = "\n\n".join(" ".join(each.split()) for each in paragraphs)

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except ConfigError as error:
            end(REFUSED, str(error))
        except OutcomeUnknown as error:
            end(
                UNKNOWN,
                f"outcome unknown: {str(error).split('; resolve()')[0]}. Look at the state before "
                "asking again",
            )
        except (NoQuorum, Unavailable) as error:
            end(NO_QUORUM, f"{_words(error)}: {error}")
        except Fenced as error:
            end(REFUSED, f"lease lost: {error}")
        except TrexError as error:
            end(REFUSED, str(error))
        except OverflowError:
            end(USAGE, "a number given is larger than 64 bits")
        except UnicodeEncodeError:
            end(USAGE, "what is given is not text in UTF-8")
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise typer.Exit(0) from None
            end(BROKEN, f"the machine refused: {error.strerror or error}")

    return run


def _alone(context: typer.Context) -> bool:
    """Whether a group of verbs was named without one of them. With one, options stand behind it:
    those before it would go unheard."""
    if context.invoked_subcommand is None:
        return True
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--json" if name == "as_json" else f"--{name}"
            verb = f"{context.info_name} {context.invoked_subcommand}"
            end(USAGE, f"{option} belongs behind the verb: `trex {verb} ... {option}`")
    return False


def _words(error: NoQuorum | Unavailable) -> str:
    return "no quorum" if isinstance(error, NoQuorum) else "unavailable"


def with_client(
    config: Path | None, deadline_s: float, work: Callable[[Client], Awaitable[None]]
) -> None:
    """Run ``work`` with a client of the cluster."""
    cluster, base = read_cluster(config)
    credentials = credentials_folder(base, None, ADMIN)

    async def run() -> None:
        async with connect(cluster, credentials, deadline_s=deadline_s) as client:
            await work(client)

    anyio.run(run)


def show(rows: list[dict[str, object]], as_json: bool, empty: str = "nothing there") -> None:
    """Print rows, as a table or as JSON."""
    from dashboard import tables

    tables.show(rows, as_json, empty)


# --- making and watching a cluster --------------------------------------------------------------


@app.command()
@told
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    voters: Annotated[
        int, typer.Option("--voters", envvar="TREX_VOTERS", help="1, 3, 5 or 7.")
    ] = 5,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host", envvar="TREX_HOST", help="Of all voters, or repeated for each of them."
        ),
    ] = None,
    base_port: Annotated[
        int | None,
        typer.Option(
            "--base-port", envvar="TREX_BASE_PORT", min=1, max=65535,
            help="First of the ports used (default: free ones here, 7400 elsewhere).",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", envvar="TREX_NAME", help="What people call the cluster.")
    ] = "trex",
    format_: Annotated[
        bool,
        typer.Option(
            "--format", envvar="TREX_INIT_FORMAT", help="Format the voters' journals here."
        ),
    ] = False,
) -> None:  # fmt: skip
    """Write DIR/cluster.toml for a new cluster, with every knob in it, and its certificates and
    keys."""
    from dashboard.authority import AUTHORITY_FOLDER
    from dashboard.cluster_init import format_voters, init_cluster
    from voters.journal import JournalError

    if not name.isprintable() or not name or any(each in name for each in '"\\'):
        end(USAGE, "--name: printable characters, without quotes and backslashes")
    path, config = init_cluster(directory, voters, host or [], base_port, name)
    print(path)
    typer.echo(
        f"certificates and keys: {path.parent / FOLDER}, a folder for each node, to be copied to "
        f"its machine and kept secret; {path.parent / AUTHORITY_FOLDER} makes more: keep it safe, "
        "no node needs it",
        err=True,
    )
    if format_:
        try:
            format_voters(path, config)
        except (JournalError, OSError) as error:
            end(BROKEN, str(error))
    steps = [] if format_ else [f"trex-voter format --config {path} --id N"]
    steps += [f"trex-voter run --config {path} --id N", f"trex status --config {path}"]
    typer.echo("next, with each voter as N:", err=True)
    for step in steps:
        typer.echo(f"  {step}", err=True)


@cert_app.command("issue")
@told
def cert_issue(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose; a voter's is voter-N.")],
    role: Annotated[
        str,
        typer.Option(
            "--role", envvar="TREX_ROLE", help="reader, writer, admin, listener or voter."
        ),
    ],
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            "--prefix",
            envvar="TREX_CERT_PREFIX",
            help="What a writer may change: keys and member ids that begin so (default: all).",
        ),
    ] = None,
    days: Annotated[
        int, typer.Option("--days", envvar="TREX_CERT_DAYS", min=1, help="How long it is good.")
    ] = 365,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", envvar="TREX_CERT_OUT", help="Folder (default: credentials/NAME here)."
        ),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make a certificate, and the keys of its role, where `trex init` made the cluster.

    Again for a name that has one: a new one in its place, of the same role, and with --prefix if
    it had any. The old one stays good until it expires or is revoked. A running process takes the
    new one up within seconds.
    """
    from dashboard.authority import read_authority
    from trex_core.access import ROLES, Grant

    known = next((each for each in ROLES if each == role), None)
    if known is None:
        end(USAGE, f"--role is {', '.join(ROLES)}")
    if "/" in name or name in (".", ".."):
        end(USAGE, "NAME is the name of a folder too: without a slash")
    cluster, base = read_cluster(config)
    folder = out or base / FOLDER / name
    grant = Grant(name, known, tuple(prefix or ()))
    holder = read_authority(base, cluster).issue(grant, folder, days)
    show([_certificate_row(folder, holder)], as_json)


@cert_app.command("show")
@told
def cert_show(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one's.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """The certificates in the credentials folder here: whose, for what, and until when."""
    from dashboard.authority import read_holders

    cluster, base = read_cluster(config)
    rows = [
        _certificate_row(path.parent, holder)
        for path, holder in read_holders(base, cluster.cluster_id_bytes)
        if name in (None, path.parent.name, holder.grant.name)
    ]
    show(rows, as_json, f"no certificates in {base / FOLDER}")


def _certificate_row(folder: Path, holder: Holder) -> dict[str, object]:
    from voters.credentials import date

    return {
        "name": holder.grant.name,
        "role": holder.grant.role,
        "prefixes": ", ".join(holder.grant.prefixes) or None,
        "good until": date(holder.not_after_s),
        "serial": holder.serial,
        "folder": str(folder),
    }


@cert_app.command("revoke")
@told
def cert_revoke(
    who: Annotated[
        str, typer.Argument(metavar="NAME|SERIAL", help="A name in the folder here, or a serial.")
    ],
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Have every voter turn a certificate away from now on, within seconds.

    Of a NAME: all that were ever issued to it, also the newest. To replace one that was stolen,
    revoke first and issue then. None is ever taken off the list again.

    Of a listener's or admin's also rotate the stream key (`trex keys rotate`): its holder has it.
    """
    from dashboard.authority import AUTHORITY_FOLDER, ISSUED_FOLDER, serials_known, serials_of
    from trex_core.access import REVOKED_KEY, revoked_serials, revoked_text

    cluster, base = read_cluster(config)
    serials = serials_of(base, who, cluster.cluster_id_bytes)
    if not serials:
        end(
            REFUSED,
            f"no certificate of {who!r} was issued here or is in {base / FOLDER}, and it is no "
            "serial (32 to 40 hexadecimal digits): `trex cert show` lists both",
        )

    if not (base / AUTHORITY_FOLDER / ISSUED_FOLDER).is_dir():
        typer.echo(
            "the authority is not here: of what was issued under a name, only what is in "
            f"{base / FOLDER} is known",
            err=True,
        )
    elif serials.isdisjoint(serials_known(base, cluster.cluster_id_bytes)):
        typer.echo(
            "no certificate with this serial was issued here: it is put on the list, but if a "
            "digit of it is wrong nobody is turned away",
            err=True,
        )

    async def work(client: Client) -> None:
        held = await client.get(REVOKED_KEY, deadline_s=deadline)
        before = revoked_serials(held.value) if held is not None else frozenset()
        slot = held.slot if held is not None else 0
        text = revoked_text(before | serials)
        done = await client.cas(REVOKED_KEY, slot, text, deadline_s=deadline)
        show([{"revoked": each, "slot": done.slot} for each in sorted(serials)], as_json)

    with_client(config, deadline, work)


@keys_app.command("show")
@told
def keys_show(config: Config = None, as_json: Json = False) -> None:
    """Which keys there are and which one seals, of the voters' and of the stream's. No secrets."""
    from dashboard.authority import read_authority

    cluster, base = read_cluster(config)
    show(_key_rows(read_authority(base, cluster).keys), as_json)


def _key_rows(keys: Keys) -> list[dict[str, object]]:
    return [
        {"ring": name, "epoch": key.epoch, "use": "opens" if place else "seals and opens"}
        for name, ring in (("voter", keys.voter), ("stream", keys.stream))
        if ring is not None
        for place, key in enumerate(ring.keys)
    ]


@keys_app.command("rotate")
@told
def keys_rotate(
    ring: Annotated[
        str, typer.Option("--ring", envvar="TREX_RING", help="voter, stream or both.")
    ] = "both",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Take the next of three steps to new keys; nothing is interrupted.

    1: a new key that everybody can open with. 2: everybody seals with it. 3: the old one is
    forgotten. Each step writes the folders in `credentials` here: bring them to their machines, and
    give the next one once all are there. Running processes read them within seconds. Folders that
    were issued with --out elsewhere are not known here: issue into them again after each step.
    """
    from dashboard.authority import read_authority

    if ring not in ("voter", "stream", "both"):
        end(USAGE, "--ring is voter, stream or both")
    cluster, base = read_cluster(config)
    authority = read_authority(base, cluster)
    step = authority.rotate(base, voter=ring != "stream", stream=ring != "voter")
    show(_key_rows(authority.keys), as_json)
    typer.echo(step, err=True)
    typer.echo(
        f"written: the folders in {base / FOLDER}. Not those issued with --out elsewhere: issue "
        "into them again before the next step",
        err=True,
    )


@app.command()
@told
def status(
    config: Config = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", envvar="TREX_WATCH", help="Go on until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", envvar="TREX_INTERVAL", min=0.05, help="Seconds.")
    ] = 0.5,
    count: Annotated[
        int, typer.Option("--count", envvar="TREX_COUNT", min=0, help="Looks; 0: for ever.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Who leads, since which ballot, who lags, and which voter may be stopped."""
    from dashboard import tables
    from voters.driver import Driver

    cluster, base = read_cluster(config)
    driver = Driver(cluster, credentials_folder(base, None, ADMIN))

    async def look() -> tables.Verdict:
        found = await driver.statuses(STATUS_S)
        verdict = tables.judge(cluster, found)
        if as_json:
            tables.show_json(tables.status_json(found, verdict))
        elif not watch:
            tables.show_status(tables.status_rows(cluster, found, verdict), verdict)
        return verdict

    if watch:
        anyio.run(_watch_status, driver, look, interval, count, as_json)
    elif not anyio.run(look).healthy:
        raise typer.Exit(NO_QUORUM)


async def _watch_status(
    driver: Driver,
    look: Callable[[], Awaitable[object]],
    interval_s: float,
    count: int,
    as_json: bool,
) -> None:
    looks = 0
    if as_json:
        while count == 0 or looks < count:
            looks += 1
            await look()
            sys.stdout.flush()
            if looks != count:
                await anyio.sleep(interval_s)
        return
    from rich.console import Console
    from rich.live import Live

    from dashboard import tables

    console = Console(markup=False, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while count == 0 or looks < count:
            looks += 1
            found = await driver.statuses(STATUS_S)
            verdict = tables.judge(driver.cluster, found)
            rows = tables.status_rows(driver.cluster, found, verdict)
            live.update(tables.status_table(rows, verdict, console.width), refresh=True)
            if looks != count:
                await anyio.sleep(interval_s)


@app.command()
@told
def doctor(
    config: Config = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", envvar="TREX_DIR", help="Look at the disk of this directory too."),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            envvar="TREX_SECONDS",
            min=1.2,
            max=600,
            help="Listen to the stream for so long.",
        ),
    ] = 3.2,
    as_json: Json = False,
) -> None:
    """What is wrong, and what to do: the cluster, its stream and this machine, on one list.

    Exit code 0: all is well (there may be notes); 1: something is wrong; 4: no voter leads.
    """
    from dashboard import doctor as knowledge
    from dashboard.probes import gather

    try:
        cluster, base = read_cluster(config)
    except ConfigError as error:
        diagnosis = knowledge.no_cluster(str(error))
    else:
        source = config or os.environ.get("TREX_CONFIG") or "cluster.toml"
        folder = credentials_folder(base, None, ADMIN)
        try:
            evidence = anyio.run(gather, cluster, folder, str(source), base, directory, seconds)
            diagnosis = knowledge.examine(evidence)
        except ConfigError as error:
            diagnosis = knowledge.no_cluster(str(error))
    if as_json:
        show([msgspec.structs.asdict(each) for each in diagnosis.checks], as_json)
    else:
        from dashboard import tables

        tables.show_lines(functools.partial(knowledge.lines, diagnosis))
    if diagnosis.exit_code:
        raise typer.Exit(diagnosis.exit_code)


@leader_app.callback(invoke_without_command=True)
@told
def leader(
    context: typer.Context,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Who leads, and since which ballot."""
    if not _alone(context):
        return

    async def work(client: Client) -> None:
        found = await client.driver.find_leader()
        row: dict[str, object] = {
            "leader": found.voter,
            "ballot": str(found.ballot),
            "fixed": found.fixed,
        }
        show([row], as_json)

    with_client(config, deadline, work)


@leader_app.command()
@told
def handover(
    to: Annotated[
        int, typer.Option("--to", envvar="TREX_TO", min=0, help="0: the most up to date.")
    ] = 0,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Have the leader hand leadership over. No write fails."""

    async def work(client: Client) -> None:
        show([{"leader": await client.hand_over(to)}], as_json)

    with_client(config, deadline, work)


@app.command()
@told
def snapshot(
    voter: Annotated[
        int, typer.Option("--voter", envvar="TREX_VOTER", min=0, help="0: the leader.")
    ] = 0,
    config: Config = None,
    deadline: Deadline = 30.0,
    as_json: Json = False,
) -> None:
    """Have a voter write a snapshot now."""

    async def work(client: Client) -> None:
        chosen = voter or (await client.driver.find_leader()).voter
        slot = await client.driver.snapshot_now(chosen)
        show([{"voter": chosen, "slot": slot}], as_json)

    with_client(config, deadline, work)


# --- configuration ------------------------------------------------------------------------------


@config_app.command("put")
@told
def config_put(
    key: Key,
    value: Annotated[str, typer.Argument(metavar="VALUE")],
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Write VALUE at KEY."""

    async def work(client: Client) -> None:
        done = await client.put(key, value)
        show([{"key": key, "value": value, "slot": done.slot}], as_json)

    with_client(config, deadline, work)


@config_app.command("get")
@told
def config_get(
    key: Key,
    local: Local = False,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """The value of KEY, as of now, and the slot that wrote it."""

    async def work(client: Client) -> None:
        entry = await client.get(key, linearizable=not local)
        if entry is None:
            end(REFUSED, f"there is no key {key!r}")
        show([msgspec.structs.asdict(entry)], as_json)

    with_client(config, deadline, work)


@config_app.command("delete")
@told
def config_delete(
    key: Key, config: Config = None, deadline: Deadline = DEADLINE, as_json: Json = False
) -> None:
    """Remove KEY."""

    async def work(client: Client) -> None:
        done = await client.delete(key)
        show([{"key": key, "slot": done.slot}], as_json)

    with_client(config, deadline, work)


@config_app.command("cas")
@told
def config_cas(
    key: Key,
    value: Annotated[
        str | None, typer.Argument(metavar="VALUE", help="Without it, the key is removed.")
    ] = None,
    slot: Annotated[
        int,
        typer.Option("--slot", envvar="TREX_SLOT", min=0, help="Expected version; 0: absent."),
    ] = 0,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Write VALUE at KEY only if the slot that wrote it last is --slot."""

    async def work(client: Client) -> None:
        done = await client.cas(key, slot, value)
        show([{"key": key, "value": value, "slot": done.slot}], as_json)

    with_client(config, deadline, work)


@config_app.command("list")
@told
def config_list(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX")] = "",
    local: Local = False,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """The keys that begin with PREFIX."""

    async def work(client: Client) -> None:
        entries = await client.list(prefix, linearizable=not local)
        show([msgspec.structs.asdict(entry) for entry in entries], as_json, "no such keys")

    with_client(config, deadline, work)


# --- members and ring ---------------------------------------------------------------------------


def _member(member: Member) -> dict[str, object]:
    row = msgspec.structs.asdict(member)
    row["tokens"] = None if member.tokens is None else list(member.tokens)
    row["lease"] = member.lease or None
    return row


def _attributes(pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    split = [pair.partition("=") for pair in pairs]
    for key, equals, _ in split:
        if not equals or not key:
            raise typer.BadParameter("an attribute is NAME=VALUE", param_hint="--attribute")
    return {key: value for key, _, value in split}


async def _list_members(client: Client, local: bool, as_json: bool) -> None:
    members = await client.members(linearizable=not local)
    show([_member(member) for member in members], as_json, "no members")


@members_app.callback(invoke_without_command=True)
@told
def members(
    context: typer.Context,
    config: Config = None,
    local: Local = False,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """The members."""
    if _alone(context):
        with_client(config, deadline, lambda client: _list_members(client, local, as_json))


@members_app.command("list")
@told
def members_list(
    config: Config = None,
    local: Local = False,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """All members."""
    with_client(config, deadline, lambda client: _list_members(client, local, as_json))


@members_app.command("join")
@told
def members_join(
    member: MemberId,
    address: Address = None,
    zone: Zone = None,
    weight: Weight = None,
    state: State = None,
    attribute: Attributes = None,
    token: Tokens = None,
    lease: OnLease = None,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """MEMBER joins, state up and weight 1 unless said otherwise; tokens are derived."""
    given = _attributes(attribute)

    async def work(client: Client) -> None:
        done = await client.join(
            member,
            address=address,
            zone=zone,
            weight=1 if weight is None else weight,
            state=state or "up",
            attributes=given,
            tokens=tuple(token) if token else None,
            lease=lease or 0,
        )
        show([{"member": member, "slot": done.slot}], as_json)

    with_client(config, deadline, work)


@members_app.command("update")
@told
def members_update(
    member: MemberId,
    address: Address = None,
    zone: Zone = None,
    weight: Weight = None,
    state: State = None,
    attribute: Attributes = None,
    token: Tokens = None,
    lease: OnLease = None,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Change what is given of MEMBER. --attribute replaces all of them; an empty --address or
    --zone removes it; --lease 0 takes it off its lease."""
    given = _attributes(attribute)

    async def work(client: Client) -> None:
        done = await client.update(
            member,
            address=address,
            zone=zone,
            weight=weight,
            state=state,
            attributes=given,
            tokens=tuple(token) if token else None,
            lease=lease,
        )
        show([{"member": member, "slot": done.slot}], as_json)

    with_client(config, deadline, work)


@members_app.command("leave")
@told
def members_leave(
    member: MemberId, config: Config = None, deadline: Deadline = DEADLINE, as_json: Json = False
) -> None:
    """MEMBER leaves."""

    async def work(client: Client) -> None:
        done = await client.leave(member)
        show([{"member": member, "slot": done.slot}], as_json)

    with_client(config, deadline, work)


@ring_app.callback(invoke_without_command=True)
@told
def ring(
    context: typer.Context,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """How many tokens each member has, and which share of the keys it owns."""
    if not _alone(context):
        return

    async def work(client: Client) -> None:
        from immutables import Map

        from trex_core.metadata.ring import SETTING_PREFIX, Ring, settings_of

        settings = settings_of(
            Map({entry.key: entry for entry in await client.list(SETTING_PREFIX)})
        )
        whole = Ring.of(
            await client.members(),
            settings.replication_factor,
            settings.spread,
            settings.tokens_per_weight,
        )
        owned: dict[str, list[int]] = {}
        for span in whole.ranges():
            if span.replicas:
                sums = owned.setdefault(span.replicas[0], [0, 0])
                sums[0] += 1
                sums[1] += span.end - span.start + 1
        rows: list[dict[str, object]] = [
            {"member": member, "ranges": count, "share": f"{keys / 2**64:.4%}"}
            for member, (count, keys) in sorted(owned.items())
        ]
        show(rows, as_json, "the ring has no member")

    with_client(config, deadline, work)


@ring_app.command("owner")
@told
def ring_owner(
    key: Key,
    local: Local = False,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Who owns KEY, and who else holds it."""

    async def work(client: Client) -> None:
        placed = await client.owner(key, linearizable=not local)
        if not placed.replicas:
            end(REFUSED, "the ring has no member")
        row: dict[str, object] = {
            "key": key,
            "token": placed.token,
            "owner": placed.replicas[0],
            "replicas": list(placed.replicas),
        }
        show([row], as_json)

    with_client(config, deadline, work)


# --- leases -------------------------------------------------------------------------------------


@lease_app.command("grant")
@told
def lease_grant(
    ttl: Annotated[float, typer.Argument(metavar="TTL", min=0.1, help="Seconds.")],
    keep: Annotated[
        bool, typer.Option("--keep", envvar="TREX_KEEP", help="Renew it until Ctrl-C, then revoke.")
    ] = False,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Grant a lease of TTL seconds. Its name is its slot, its fencing token."""
    ttl_ms = round(ttl * 1000)

    async def work(client: Client) -> None:
        if not keep:
            done = await client.grant(ttl_ms)
            show([{"lease": done.slot, "ttl_ms": ttl_ms}], as_json)
            return
        try:
            async with client.lease(ttl_ms) as held:
                show([{"lease": held.id, "ttl_ms": ttl_ms}], as_json)
                sys.stdout.flush()
                await _until_signal(held.lost)
                held.ensure()
        except ValueError as error:
            end(REFUSED, str(error))

    with_client(config, deadline, work)


async def _until_signal(lost: anyio.Event) -> None:
    """Wait for Ctrl-C, SIGTERM or the loss of a lease."""
    async with anyio.create_task_group() as group:

        async def listen() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    break
            group.cancel_scope.cancel()

        group.start_soon(listen)
        await lost.wait()
        group.cancel_scope.cancel()


@lease_app.command("renew")
@told
def lease_renew(
    lease: Annotated[list[int], typer.Argument(metavar="LEASE")],
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:
    """Renew leases once."""

    async def work(client: Client) -> None:
        alive = await client.renew(tuple(lease))
        show([{"lease": each, "alive": each in alive} for each in lease], as_json)
        gone = [each for each in lease if each not in alive]
        if gone:
            end(REFUSED, f"no such lease: {', '.join(map(str, gone))}; grant a new one")

    with_client(config, deadline, work)


@lease_app.command("revoke")
@told
def lease_revoke(
    lease: LeaseId, config: Config = None, deadline: Deadline = DEADLINE, as_json: Json = False
) -> None:
    """End a lease now; its members leave."""

    async def work(client: Client) -> None:
        done = await client.revoke(lease)
        show([{"lease": lease, "slot": done.slot}], as_json)

    with_client(config, deadline, work)


@lease_app.command("list")
@told
def lease_list(config: Config = None, deadline: Deadline = DEADLINE, as_json: Json = False) -> None:
    """All leases."""

    async def work(client: Client) -> None:
        leases = await client.leases()
        rows: list[dict[str, object]] = [
            {"lease": lease.id, "ttl_ms": lease.ttl_ms} for lease in leases
        ]
        show(rows, as_json, "no leases")

    with_client(config, deadline, work)


# --- following and asking -----------------------------------------------------------------------


@app.command()
@told
def watch(
    since: Annotated[
        int | None,
        typer.Option(
            "--since", envvar="TREX_SINCE", min=0,
            help="Changes after this slot; 0: all there is (default: from now on).",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--kind", envvar="TREX_KIND", help="Only config, member or lease."),
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", envvar="TREX_PREFIX", help="Only keys that begin so.")
    ] = "",
    count: Annotated[
        int, typer.Option("--count", envvar="TREX_COUNT", min=0, help="Changes; 0: for ever.")
    ] = 0,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Print each change as it is fixed (--json: one object a line), until Ctrl-C.

    It follows the multicast stream and asks nothing of the voters but what it missed.
    """
    if kind not in (None, "config", "member", "lease"):
        end(USAGE, "--kind is config, member or lease")
    from listeners.changes import CompactedError
    from listeners.listener import DeadlineError
    from listeners.source import SourceError

    cluster, base = read_cluster(config)
    credentials = credentials_folder(base, None, ADMIN)
    try:
        anyio.run(_watch, cluster, credentials, since, kind, prefix, count, deadline, as_json)
    except CompactedError as error:
        end(REFUSED, f"{error.first_slot} is the first slot kept: --since 0 brings the state there")
    except SourceError as error:
        end(REFUSED, str(error))
    except DeadlineError:
        end(
            NO_QUORUM,
            f"nothing heard of the cluster in {deadline:g} s; check that voters run (`trex "
            "status`) and that multicast reaches this machine (`[stream] interface`)",
        )


async def _watch(
    cluster: ClusterConfig,
    credentials: Path,
    since: int | None,
    kind: str | None,
    prefix: str,
    count: int,
    deadline_s: float,
    as_json: bool,
) -> None:
    from listeners.changes import Lagged, Reset, SlotChanges
    from listeners.listener import ListenerOptions, open_listener

    options = ListenerOptions(helps=False)
    name = f"trex-watch-{os.getpid()}"
    async with open_listener(cluster, credentials, name=name, options=options) as listener:
        await listener.wait_ready(deadline_s)
        typer.echo(f"following {cluster.name} from slot {listener.applied}", err=True)
        shown = 0
        async for delivery in listener.changes(since, kind=kind, prefix=prefix):
            match delivery:
                case SlotChanges(slot=slot, changes=changes):
                    pass
                case Reset(to_slot=slot, changes=changes):
                    pass
                case Lagged(from_slot=first, to_slot=last):
                    typer.echo(f"too slow: slots {first} to {last} were passed over", err=True)
                    continue
                case _:
                    continue
            for change in changes:
                print(_change_json(slot, change) if as_json else _change_words(slot, change))
                shown += 1
                if shown == count:
                    return
            sys.stdout.flush()


def _change_json(slot: int, change: Change) -> str:
    old, new = (
        None if row is None else msgspec.structs.asdict(row) for row in (change.old, change.new)
    )
    fields = {"slot": slot, "kind": change.kind, "key": change.key, "old": old, "new": new}
    return msgspec.json.encode(fields).decode()


def _change_words(slot: int, change: Change) -> str:
    from dashboard import tables

    key = tables.visible(change.key).replace("\n", "\\n")
    return f"{slot} {change.kind} {key}: {_row(change.old)} -> {_row(change.new)}"


def _row(row: object) -> str:
    from trex_core.metadata.commands import ConfigEntry, Lease, Member

    match row:
        case ConfigEntry(value=value):
            return repr(value)
        case Member():
            parts = [row.state, f"weight {row.weight}"]
            parts += [f"{key}={value}" for key, value in row.attributes.items()]
            return " ".join(parts)
        case Lease(ttl_ms=ttl_ms):
            return f"{ttl_ms} ms"
        case _:
            return "-"


ListenerName = Annotated[
    str | None,
    typer.Option(
        "--listener", envvar="TREX_LISTENER", help="Its directory, beside the cluster file."
    ),
]
ListenerDirectory = Annotated[
    Path | None,
    typer.Option("--dir", envvar="TREX_LISTENER_DIR", help="The listener's directory."),
]


def _sockets(base: Path) -> list[Path]:
    """The sockets of listeners whose directories are beside the cluster file."""
    return sorted(path for path in base.glob(f"*/{SOCKET}") if path.is_socket())


def _socket(config: Path | None, listener: str | None, directory: Path | None) -> Path:
    if directory is not None:
        return directory / SOCKET
    _, base = read_cluster(config)
    if listener is not None:
        return base / listener / SOCKET
    found = _sockets(base)
    if len(found) != 1:
        names = ", ".join(path.parent.name for path in found)
        what = f"several listeners here: {names}" if found else f"no listener runs in {base}"
        start = "" if found else "start one (`trex-listener run`), or "
        raise ConfigError(f"{what}; {start}name one with --listener NAME or --dir DIR")
    return found[0]


@app.command()
@told
def sql(
    query: Annotated[str, typer.Argument(metavar="SELECT", help="One SELECT.")],
    listener: ListenerName = None,
    directory: ListenerDirectory = None,
    at_least: Annotated[
        int | None,
        typer.Option(
            "--at-least", envvar="TREX_AT_LEAST", min=0,
            help="Wait until this slot is stored: read your own write.",
        ),
    ] = None,
    config: Config = None,
    deadline: Deadline = DEADLINE,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Ask a listener of this machine, in SQL. Tables: members, ring, config, leases, commits,
    history, ballots, listener. As of a slot: members_at(slot), config_at(slot), diff(a, b)."""
    from dashboard import tables
    from listeners.sql import SqlDeadlineError, SqlError, query_socket

    path = _socket(config, listener, directory)
    try:
        result = query_socket(
            path, query, deadline_ms=max(1, round(deadline * 1000)), at_least_slot=at_least
        )
    except SqlDeadlineError as error:
        end(NO_QUORUM, str(error))
    except SqlError as error:
        end(REFUSED, str(error).splitlines()[0])
    columns = _unique(result.columns)
    rows: list[dict[str, object]] = [
        {
            column: _nested(value, kind) if as_json else value
            for column, value, kind in zip(columns, row, result.types, strict=True)
        }
        for row in result.rows
    ]
    tables.show(rows, as_json, f"no rows ({', '.join(columns)})", verbatim=True)
    typer.echo(f"as of slot {result.slot}, {result.lag} behind", err=True)


def _unique(columns: tuple[str, ...]) -> list[str]:
    """The names of columns, told apart where SQL gave two the same."""
    seen: dict[str, int] = {}
    names = []
    for column in columns:
        seen[column] = seen.get(column, 0) + 1
        names.append(column if seen[column] == 1 else f"{column}_{seen[column]}")
    return names


def _nested(value: object, kind: str) -> object:
    if kind == "JSON" and isinstance(value, str):
        try:
            return msgspec.json.decode(value)
        except (ValueError, RecursionError):
            return value  # JSON to DuckDB, such as one nested a thousand times
    return value.hex() if isinstance(value, bytes) else value


# --- importing and showing ----------------------------------------------------------------------


@app.command("import")
@told
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Plain or compressed with gzip.")],
    format_: Annotated[
        str,
        typer.Option("--format", envvar="TREX_FORMAT", help="Of the file: google-machine-events."),
    ],
    in_flight: Annotated[
        int,
        typer.Option(
            "--in-flight", envvar="TREX_IN_FLIGHT", min=1, max=1024, help="Rows under way at once."
        ),
    ] = 256,
    listener: ListenerName = None,
    directory: ListenerDirectory = None,
    config: Config = None,
    deadline: Deadline = IMPORT_DEADLINE_S,
    as_json: Json = False,
) -> None:
    """Replay a recorded cluster as real commands. Interrupted anywhere, the same command goes on
    without repeating or losing a row."""
    from dashboard import importer

    if format_ not in importer.FORMATS:
        end(USAGE, f"--format: known is {', '.join(importer.FORMATS)}")
    cluster, base = read_cluster(config)
    try:
        imported = _import(
            cluster, credentials_folder(base, None, ADMIN), file, in_flight, deadline
        )
    except importer.ImportRefusedError as error:
        end(REFUSED, str(error))
    except importer.ImportStoppedError as error:
        end(NO_QUORUM, str(error))
    except KeyboardInterrupt:
        end(INTERRUPTED, "interrupted; the same command goes on, without repeating or losing a row")
    sent = imported.rows - imported.first_row + 1
    again = f", {sent} of them now" if imported.first_row > 1 else ""
    rows = "1 row is" if imported.rows == 1 else f"{imported.rows} rows are"
    typer.echo(f"{rows} imported{again}", err=True)
    if directory is not None or listener is not None:
        sockets = [_socket(config, listener, directory)]
    else:
        sockets = _sockets(base)
    _import_summary(sockets, imported.last_slot, as_json)


def _import(
    cluster: ClusterConfig, credentials: Path, file: Path, in_flight: int, deadline_s: float
) -> importer.Imported:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from dashboard import importer

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with progress:
        task = progress.add_task("importing", total=None, rate="")
        source = importer.examine(file)
        clock = _Rate()

        def told_rows(done: int, rows: int) -> None:
            if clock.due(done) or done == rows:
                progress.update(task, completed=done, total=rows, rate=clock.text(done))

        async def run() -> importer.Imported:
            return await importer.import_file(
                cluster,
                credentials,
                source,
                in_flight_max=in_flight,
                deadline_s=deadline_s,
                told=told_rows,
            )

        return anyio.run(run)


class _Rate:
    """Rows a second since the first look, looked at no more than ten times a second."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._next_s = 0.0

    def due(self, done: int) -> bool:
        now_s = anyio.current_time()
        if self._began is None:
            self._began = (now_s, done)
        if now_s < self._next_s:
            return False
        self._next_s = now_s + 0.1
        return True

    def text(self, done: int) -> str:
        if self._began is None:
            return ""
        began_s, first = self._began
        took_s = anyio.current_time() - began_s
        return f"{(done - first) / took_s:.0f} rows/s" if took_s > 0.2 else ""


SUMMARY: Final = (
    "SELECT (SELECT count(*) FROM members) AS members, "
    "(SELECT count(*) FROM history WHERE kind = 'member') AS member_changes, "
    "(SELECT max(slot) FROM commits) AS slot"
)


def _import_summary(sockets: list[Path], slot: int, as_json: bool) -> None:
    """What the SQL of the first listener that answers says at the end."""
    from listeners.sql import SqlError, query_socket

    for path in sockets:
        try:
            result = query_socket(path, SUMMARY, deadline_ms=30_000, at_least_slot=slot)
        except SqlError as error:
            typer.echo(f"listener {path.parent.name}: {str(error).splitlines()[0]}", err=True)
            continue
        typer.echo(f"SQL at listener {path.parent.name}, as of slot {result.slot}:", err=True)
        show([dict(zip(result.columns, row, strict=True)) for row in result.rows], as_json)
        return
    typer.echo("no listener here to ask in SQL (`trex-listener run`)", err=True)


@app.command()
@told
def demo(
    voters: Annotated[int, typer.Option("--voters", envvar="TREX_VOTERS")] = 5,
    members: Annotated[int, typer.Option("--members", envvar="TREX_MEMBERS", min=1)] = 3,
    import_file: Annotated[
        Path | None, typer.Option("--import", envvar="TREX_IMPORT", help="Import this trace too.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", envvar="TREX_KEEP", help="Stay until Ctrl-C or SIGTERM.")
    ] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", envvar="TREX_DIR", help="Keep everything here.")
    ] = None,
    dash: Annotated[
        bool, typer.Option("--dash", envvar="TREX_DASH", help="Watch it in the dashboard.")
    ] = False,
) -> None:
    """See it work: five voters, members, a killed leader, a checked answer. Under a minute."""
    from dashboard.demo import demo as tell
    from dashboard.demo import demo_on_screen

    if dash:
        raise typer.Exit(demo_on_screen(voters, members, import_file, directory))
    raise typer.Exit(tell(voters, members, import_file, keep, directory))


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="trex")


if __name__ == "__main__":
    main()
