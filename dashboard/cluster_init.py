"""A new cluster file: this module alone writes one, every knob in it with its unit and default.

What the knobs mean is decided in ``trex_core.cluster``; a test compares the two, so that none is
missing here and each default shown is the one used.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from dashboard.authority import AUTHORITY_FOLDER, make_authority
from dashboard.ports import PORTS_A_VOTER, PortBlock
from trex_core.cluster import (
    VOTER_COUNTS,
    ClusterConfig,
    ConfigError,
    JournalConfig,
    StreamConfig,
    TimingConfig,
    parse_cluster,
)
from trex_core.credentials import FOLDER
from voters.config import voter_paths
from voters.journal import format_journal

BASE_PORT: Final = 7400
"""First port of a cluster that is not all on this machine."""
STREAM_PORTS: Final = 2
_HOST: Final = re.compile(r"[A-Za-z0-9._:%-]+")

KNOBS: Final = {
    "stream": {
        "interface": "address of the interface to use; 0.0.0.0 leaves it to the kernel",
        "ttl": "multicast TTL in hops; 0 never leaves this machine, 1 this network",
        "repair_bytes_per_s_max": "most bytes of repairs one voter multicasts in a second",
        "burst_datagrams": "most datagrams multicast back to back",
    },
    "timing": {
        "tick_ms": "length of a tick, in milliseconds; the others are counted in it",
        "heartbeat_ticks": "ticks between two heartbeats of the leader",
        "election_ticks_min": "silence before an election, in ticks; 3 heartbeats at least",
        "election_ticks_max": "the longest such silence, in ticks (it is drawn at random)",
        "lease_drift_ms": "milliseconds by which a lease's holder counts on it less",
    },
    "journal": {
        "segment_bytes": "size of a journal segment, preallocated, in bytes (65536 at least)",
        "retain_bytes": "bytes of segments kept although snapshots cover them",
        "snapshot_slots": "slots between two snapshots",
        "snapshots_kept": "how many snapshots are kept",
        "free_bytes_min": "a voter with fewer bytes free on its disk stops accepting",
    },
}
_TABLES: Final[dict[str, type[msgspec.Struct]]] = {
    "stream": StreamConfig,
    "timing": TimingConfig,
    "journal": JournalConfig,
}


def _knobs(table: str, changed: Mapping[str, object]) -> list[str]:
    """The lines of a table: what is not the default is set, the rest stands in comments."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(_TABLES[table])}
    lines = []
    for knob, meaning in KNOBS[table].items():
        default = defaults[knob]
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        lines.append(f"# {meaning} (default: {shown})")
        if knob in changed:
            value = changed[knob]
            lines.append(f'{knob} = "{value}"' if isinstance(value, str) else f"{knob} = {value}")
        else:
            lines.append(f"# {knob} = {shown}")
    return lines


def cluster_file(
    name: str,
    hosts: Sequence[str],
    ports: Sequence[int],
    *,
    timing: Mapping[str, object] = MappingProxyType({}),
    journal: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """The text of a cluster file with one voter on each of ``hosts``; ``ports`` are three for each
    voter, then two for the stream. ``timing`` and ``journal`` hold what is not to be default."""
    local = all(_is_loopback(host) for host in hosts)
    group = f"239.255.{secrets.randbelow(256)}.{1 + secrets.randbelow(254)}"
    stream: dict[str, object] = {} if local else {"interface": "0.0.0.0", "ttl": 1}
    lines = [
        "# The cluster file: the same for every voter, listener and client. Keep it with them.",
        "# What stands in a comment is the default. An unknown key is refused.",
        "",
        "# what people call this cluster",
        f'name = "{name}"',
        "# never change it: it is in every frame and every journal (32 hexadecimal digits)",
        f'cluster_id = "{secrets.token_hex(16)}"',
        "",
        "# Every fixed slot is multicast here; listeners ask for repairs on the next port.",
        "[stream]",
        f'group = "{group}"',
        f"port = {ports[len(hosts) * PORTS_A_VOTER]}",
        *_knobs("stream", stream),
        "",
        "[timing]",
        *_knobs("timing", timing),
        "",
        "[journal]",
        *_knobs("journal", journal),
        "",
        f"# The {len(hosts)} voters. peer_port: other voters (UDP, TCP); client_port: clients,",
        "# TCP; archive_port: catch-up, TCP. directory: its data, relative to this file;",
        '# journal_directory: its journal, on a disk of its own (default: "", in directory).',
    ]
    for voter, host in enumerate(hosts, 1):
        peer, client, archive = ports[(voter - 1) * PORTS_A_VOTER :][:PORTS_A_VOTER]
        lines += [
            "[[voters]]",
            f"id = {voter}",
            f'host = "{host}"',
            f"peer_port = {peer}",
            f"client_port = {client}",
            f"archive_port = {archive}",
            f'directory = "voter-{voter}"',
            '# journal_directory = ""',
            "",
        ]
    return "\n".join(lines[:-1]) + "\n"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def init_cluster(
    directory: Path, voters: int, hosts: Sequence[str], base_port: int | None, name: str
) -> tuple[Path, ClusterConfig]:
    """Write ``directory/cluster.toml``, and beside it the cluster's authority and everybody's
    credentials. ``hosts`` are none (all voters on 127.0.0.1), one for all,
    or one for each. Raises :class:`ConfigError`; never overwrites."""
    if voters not in VOTER_COUNTS:
        raise ConfigError(f"--voters must be 1, 3, 5 or 7, not {voters}")
    if len(hosts) not in (0, 1, voters):
        raise ConfigError(f"--host is given once, or once for each of the {voters} voters")
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--host {host!r} is neither the name of a machine nor an address")
    places = list(hosts) * (voters if len(hosts) == 1 else 1) or ["127.0.0.1"] * voters
    needed = voters * PORTS_A_VOTER + STREAM_PORTS
    if base_port is None and all(_is_loopback(host) for host in places):
        block = PortBlock()
        ports: Sequence[int] = block.ports[:needed]
        block.close()
    else:
        first = BASE_PORT if base_port is None else base_port
        if first + needed > 1 << 16:
            raise ConfigError(f"--base-port {first}: {needed} ports are needed from there on")
        ports = range(first, first + needed)
    path = directory / "cluster.toml"
    text = cluster_file(name, places, ports)
    config = parse_cluster(text, str(path))
    made = [directory / AUTHORITY_FOLDER, directory / FOLDER, path]
    for each in made:
        if each.exists():
            raise ConfigError(f"{each} exists already; it is not overwritten: take another folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # All or nothing: after a failure the same command may be given again.
        with tempfile.TemporaryDirectory(prefix=".init-", dir=directory) as draft:
            make_authority(Path(draft), config)
            (Path(draft) / path.name).write_text(text)
            for each in made:
                (Path(draft) / each.name).rename(each)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}") from error
    return path, config


def format_voters(path: Path, config: ClusterConfig) -> None:
    """Make the empty journal of every voter, here. Raises ``JournalError``, ``OSError``."""
    for voter in config.voter_ids:
        paths = voter_paths(config, voter, path.parent)
        format_journal(paths.journal, config.cluster_id_bytes, voter)
        paths.snapshots.mkdir(parents=True, exist_ok=True)
