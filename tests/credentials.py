"""Credentials for tests: one authority for each cluster, made when first asked for."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import listeners.credentials
import voters.credentials
from dashboard.authority import Authority, make_authority
from trex_core.access import Grant
from trex_core.cluster import ClusterConfig
from trex_core.credentials import FOLDER
from trex_core.seal import KeyRing, Sealer, StreamOpener
from trex_core.wire import Channel, Identity

_made: dict[tuple[str, tuple[int, ...]], tuple[Path, Authority]] = {}


def _authority(cluster: ClusterConfig) -> tuple[Path, Authority]:
    key = (cluster.cluster_id, cluster.voter_ids)
    if key not in _made:
        base = Path(tempfile.mkdtemp(prefix="trex-test-"))
        atexit.register(shutil.rmtree, base, ignore_errors=True)
        _made[key] = (base, make_authority(base, cluster))
    return _made[key]


def folder(cluster: ClusterConfig, name: str = "admin") -> Path:
    """The credentials of "admin", "listener" or "voter-N" of ``cluster``."""
    return _authority(cluster)[0] / FOLDER / name


def held(cluster: ClusterConfig, name: str = "listener") -> listeners.credentials.Credentials:
    """The same, as a listener reads them."""
    return listeners.credentials.Credentials(folder(cluster, name), cluster.cluster_id_bytes)


def papers(cluster: ClusterConfig, name: str = "admin") -> voters.credentials.Credentials:
    """The same, as a voter or client reads them."""
    return voters.credentials.Credentials(folder(cluster, name), cluster.cluster_id_bytes)


_sealers: dict[tuple[str, Identity], Sealer] = {}


def stream_ring(cluster: ClusterConfig) -> KeyRing:
    """The stream key of ``cluster``."""
    ring = _authority(cluster)[1].keys.stream
    assert ring is not None
    return ring


def on_stream(cluster: ClusterConfig, identity: Identity, body: bytes) -> list[bytes]:
    """``body`` as ``identity`` says it on the stream of ``cluster``."""
    key = (cluster.cluster_id, identity)
    if key not in _sealers:
        _sealers[key] = Sealer(Channel.STREAM, identity, stream_ring(cluster).first, b"salt")
    return _sealers[key].datagrams(body)


def stream_opener(cluster: ClusterConfig) -> StreamOpener:
    """Opens what is said on the stream of ``cluster``."""
    return StreamOpener(cluster.cluster_id_bytes, stream_ring(cluster))


def issue(cluster: ClusterConfig, grant: Grant, days: int = 1) -> Path:
    """Credentials of whoever else there is to be."""
    base, authority = _authority(cluster)
    place = base / FOLDER / grant.name
    authority.issue(grant, place, days)
    return place
