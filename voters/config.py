"""What a voter needs besides the cluster file: where its files are, and how it says it cannot run.

This module alone turns the paths of ``cluster.toml`` into directories of this machine and names
the two ways a voter ends that are not a clean stop.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from trex_core.cluster import ClusterConfig, ConfigError, parse_cluster
from trex_core.credentials import FOLDER


class StartError(Exception):
    """The voter cannot start as configured; the message says what to do. Exit code 1."""


class VoterFailedError(Exception):
    """The voter stopped itself: disk, invariant, fencing, or too old a version. Exit code 3."""


class VoterPaths(msgspec.Struct, frozen=True):
    """The directories of one voter."""

    directory: Path
    journal: Path
    snapshots: Path


def voter_paths(cluster: ClusterConfig, voter_id: int, base: Path) -> VoterPaths:
    """The directories of ``voter_id``; relative ones count from ``base``, the folder of the
    cluster file. Raises :class:`ConfigError` when there is no such voter."""
    entry = cluster.voter(voter_id)
    directory = base / entry.directory
    journal = base / entry.journal_directory if entry.journal_directory else directory / "journal"
    return VoterPaths(directory, journal, directory / "snapshots")


def read_cluster(path: Path | None) -> tuple[ClusterConfig, Path]:
    """Read the cluster file at ``path``, or else at ``TREX_CONFIG``, or else ``cluster.toml`` in
    the current folder. Returns it with its folder. Raises :class:`ConfigError`."""
    file = path or Path(os.environ.get("TREX_CONFIG") or "cluster.toml")
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(
            f"cannot read the cluster file {file}: {error.strerror}; name it with --config or "
            "TREX_CONFIG, or make one with `trex init`"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8") from error
    return parse_cluster(text, str(file)), file.resolve().parent


ADMIN: Final = "admin"
"""Whose credentials a client has that names no others."""


def credentials_folder(base: Path, given: Path | None, name: str) -> Path:
    """Where credentials are: ``given``, or else in TREX_CREDENTIALS, or else those called ``name``
    beside the cluster file, whose folder is ``base``."""
    return given or Path(os.environ.get("TREX_CREDENTIALS") or base / FOLDER / name)


class Setup(msgspec.Struct, frozen=True):
    """All that the archive process must know, as one command line argument (JSON)."""

    cluster: ClusterConfig
    voter: int
    directory: str
    journal: str
    snapshots: str
    credentials: str

    def encode(self) -> str:
        """As JSON."""
        return msgspec.json.encode(self).decode()

    @property
    def paths(self) -> VoterPaths:
        """The directories."""
        return VoterPaths(Path(self.directory), Path(self.journal), Path(self.snapshots))


def decode_setup(text: str) -> Setup:
    """The inverse of :meth:`Setup.encode`. Raises :class:`ConfigError`."""
    try:
        return msgspec.json.decode(text, type=Setup)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--setup: {error}") from error
