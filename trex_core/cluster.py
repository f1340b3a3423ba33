"""The cluster file: what every voter, listener and client of one cluster must agree on.

This module alone knows the fields of ``cluster.toml``, their units, defaults and cross-field
rules. It parses text; whoever calls it reads the file. Unknown keys are refused with their path.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from trex_core.messages import SNAPSHOT_SLOTS
from trex_core.wire import CLUSTER_ID_BYTES

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
VoterId = Annotated[int, msgspec.Meta(ge=1, le=65535)]

VOTER_COUNTS: Final = (1, 3, 5, 7)
TEXT_CHARS_MAX: Final = 1 << 16
"""Longest file of ours that is parsed: a parser of TOML may take time that grows with the square
of what it is given."""
_T = TypeVar("_T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


class VoterEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[voters]]`` table: where voter ``id`` can be reached.

    ``peer_port`` serves other voters (UDP, and TCP for large messages), ``client_port`` clients
    (TCP), ``archive_port`` catch-up (TCP). ``directory`` is its data directory, relative to the
    cluster file; ``journal_directory`` may put the journal on its own disk.
    """

    id: VoterId
    host: str
    peer_port: Port
    client_port: Port
    archive_port: Port
    directory: str
    journal_directory: str = ""


class StreamConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[stream]``: the multicast group of fixed slots and the one of repair requests.

    Both use ``port`` and ``port + 1``; ``interface`` is the address of the interface to use and
    ``ttl`` the multicast TTL (0: never leaves this machine). ``repair_bytes_per_s_max`` caps the
    repairs of one voter, ``burst_datagrams`` paces the stream.
    """

    group: str
    port: Port
    interface: str = "127.0.0.1"
    ttl: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    repair_bytes_per_s_max: Positive = 16 << 20
    burst_datagrams: Positive = 64

    @property
    def repair_port(self) -> int:
        """Port of the repair requests, in the same group."""
        return self.port + 1


class TimingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[timing]``: one tick is ``tick_ms`` milliseconds; the others are in ticks.

    Advice: ``election_ticks_min`` at least 5 heartbeats, and longer than the worst pause of a
    voter (garbage collection, slow disk).
    """

    tick_ms: Positive = 20
    heartbeat_ticks: Positive = 4
    election_ticks_min: Positive = 25
    election_ticks_max: Positive = 50
    lease_drift_ms: Positive = 500


class JournalConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[journal]``: segment size, what is kept, and when the disk counts as full.

    Segments are deleted only when all their slots are at or below the oldest kept snapshot and
    more than ``retain_bytes`` of segments are kept. A voter with less than ``free_bytes_min``
    free stops accepting.
    """

    segment_bytes: Annotated[int, msgspec.Meta(ge=1 << 16)] = 16 << 20
    retain_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30
    snapshot_slots: Positive = SNAPSHOT_SLOTS
    snapshots_kept: Positive = 2
    free_bytes_min: Positive = 64 << 20


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of ``cluster.toml``. ``cluster_id`` is 32 hexadecimal digits."""

    name: str
    cluster_id: str
    voters: tuple[VoterEntry, ...]
    stream: StreamConfig
    timing: TimingConfig = TimingConfig()
    journal: JournalConfig = JournalConfig()

    def __post_init__(self) -> None:
        try:
            good = len(bytes.fromhex(self.cluster_id)) == CLUSTER_ID_BYTES
        except ValueError:
            good = False
        if not good:
            raise ValueError("cluster_id must be 32 hexadecimal digits; `trex init` makes one")
        ids = [voter.id for voter in self.voters]
        if len(ids) not in VOTER_COUNTS:
            raise ValueError(f"voters: there must be 1, 3, 5 or 7 of them, not {len(ids)}")
        if len(set(ids)) != len(ids):
            raise ValueError("voters: each id may be given once only")
        ports = [
            (voter.host, port)
            for voter in self.voters
            for port in (voter.peer_port, voter.client_port, voter.archive_port)
        ]
        if len(set(ports)) != len(ports):
            raise ValueError("voters: two of them share a host and port")
        timing = self.timing
        if not timing.heartbeat_ticks * 3 <= timing.election_ticks_min < timing.election_ticks_max:
            raise ValueError(
                "timing: need 3 * heartbeat_ticks <= election_ticks_min < election_ticks_max"
            )

    @property
    def cluster_id_bytes(self) -> bytes:
        """The cluster id as the 16 bytes of a frame."""
        return bytes.fromhex(self.cluster_id)

    @property
    def voter_ids(self) -> tuple[int, ...]:
        """All voter ids, ascending."""
        return tuple(sorted(voter.id for voter in self.voters))

    def voter(self, voter_id: int) -> VoterEntry:
        """The entry of a voter. Raises :class:`ConfigError` when there is none of that id."""
        for entry in self.voters:
            if entry.id == voter_id:
                return entry
        known = ", ".join(map(str, self.voter_ids))
        raise ConfigError(f"there is no voter {voter_id} in the cluster file; it names {known}")


def decode_toml(text: str, of: type[_T]) -> _T:
    """The value of type ``of`` that a file of ours says. Raises ``ValueError`` or, nested too
    deeply, ``RecursionError``."""
    if len(text) > TEXT_CHARS_MAX:
        raise ValueError(f"it is longer than {TEXT_CHARS_MAX} characters")
    return msgspec.toml.decode(text.encode(), type=of)


def parse_cluster(text: str, source: str = "cluster.toml") -> ClusterConfig:
    """Parse the text of a cluster file. Raises :class:`ConfigError` naming ``source`` and key."""
    try:
        return decode_toml(text, ClusterConfig)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from error
