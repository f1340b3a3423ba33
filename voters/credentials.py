"""Who this process is to the others: this module alone reads a voter's or client's credentials.

It reads the folder that ``trex init`` or ``trex cert issue`` wrote (``trex_core.credentials`` says
what is in it), makes TLS of it, and notices when it was written anew: a renewed certificate and
rotated keys are taken up by a running process.
"""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path
from typing import Final

from trex_core.access import Grant, Holder, holder_of
from trex_core.cluster import ConfigError
from trex_core.credentials import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEYS_FILE,
    PRIVATE_FILE,
    Keys,
    assembled,
    why_another,
    why_not_good,
)

_FILES: Final = (AUTHORITY_FILE, CERTIFICATE_FILE, PRIVATE_FILE, KEYS_FILE)


def date(seconds: int) -> str:
    """A time in seconds since 1970 as a day and minute, for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


class Credentials:
    """The credentials in ``folder``, of a node of the cluster ``cluster_id``. Raises
    :class:`ConfigError` when they are missing, exposed, damaged, of another cluster, or expired."""

    def __init__(self, folder: Path, cluster_id: bytes) -> None:
        self.folder: Final = folder.absolute()
        self._cluster_id = cluster_id
        self._stamp = self._written()
        self.holder, self.keys = self._read()
        why = why_not_good(self.holder, time.time(), date)
        if why:
            raise ConfigError(f"{folder}: {why}")
        self.server: Final = self._context(ssl.PROTOCOL_TLS_SERVER)
        self.client: Final = self._context(ssl.PROTOCOL_TLS_CLIENT)

    @property
    def grant(self) -> Grant:
        """Name and role."""
        return self.holder.grant

    def refresh(self) -> bool:
        """Read the folder again if it was written anew; whether it was. Contexts stay the same
        objects. Raises :class:`ConfigError`, and then all is as before."""
        stamp = self._written()
        if stamp == self._stamp:
            return False
        self._stamp = stamp  # what is wrong with it is said once
        holder, keys = self._read()
        if why := why_another(self.grant, holder.grant):
            raise ConfigError(f"{self.folder}: {why}")
        # A context takes a certificate that is not its key's, and drops its key: what is loaded
        # into those in use was good in one thrown away.
        self._context(ssl.PROTOCOL_TLS_CLIENT)
        for context in (self.server, self.client):
            self._load(context)
        self.holder, self.keys = holder, keys
        return True

    def _written(self) -> tuple[tuple[int, ...], ...]:
        found: list[tuple[int, ...]] = []
        for name in _FILES:
            try:
                stat = (self.folder / name).stat()
                when = (stat.st_mtime_ns, stat.st_ctime_ns)
                found.append((stat.st_ino, stat.st_size, stat.st_mode, stat.st_uid, *when))
            except OSError:
                found.append(())
        return tuple(found)

    def _read(self) -> tuple[Holder, Keys]:
        def read(name: str) -> tuple[bytes, int, int]:
            with (self.folder / name).open("rb") as file:
                stat = os.fstat(file.fileno())
                return file.read(), stat.st_mode, stat.st_uid

        return assembled(str(self.folder), read, os.getuid(), self._cluster_id)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # voters move; names are in the certificates' URIs
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # connections are long; each shows its certificate anew
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_verify_locations(self.folder / AUTHORITY_FILE)
            context.load_cert_chain(self.folder / CERTIFICATE_FILE, self.folder / PRIVATE_FILE)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{self.folder}: {PRIVATE_FILE} is not the key of {CERTIFICATE_FILE}, or one of "
                "them is damaged: `trex cert issue` makes new ones"
            ) from error


def other_end(session: ssl.SSLObject | ssl.SSLSocket | None, cluster_id: bytes) -> Holder:
    """Who is at the other end of a TLS connection; its authority was checked by TLS. Raises
    :class:`ConfigError` when its certificate is none of this cluster."""
    certificate = session.getpeercert(binary_form=True) if session is not None else None
    if not certificate:
        raise ConfigError("no certificate was shown")
    return holder_of(certificate, cluster_id)


def tls_trouble(error: BaseException) -> str:
    """What went wrong with a TLS connection, for people; "" if it was not about TLS."""
    if not isinstance(error, ssl.SSLError):
        return ""
    text = f"{error.reason or error}".replace("_", " ").lower()
    if "expired" in text:
        return "a certificate expired: issue a new one with `trex cert issue`"
    if "unknown ca" in text or "verify failed" in text:
        return "the certificates are of different authorities: are the credentials of this cluster?"
    if "wrong version number" in text or "record layer failure" in text:
        return "it does not speak TLS: is it a voter of this cluster?"
    return f"TLS: {text}"
