"""The cluster's own authority: this module alone makes certificates and keys, and writes them down.

``trex init`` makes one for each cluster, in the folder ``authority`` beside the cluster file: its
certificate, its private key, and all keys of datagrams.  Whoever holds that folder may let anybody
in; a running cluster does not need it.  What a node needs is issued from it into a folder of the
node's own (``trex_core.credentials``), to be copied to its machine.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec.structs import replace

from trex_core.access import Grant, Holder, holder_of, uri_of, voter_name, voter_of
from trex_core.cluster import ClusterConfig, ConfigError
from trex_core.credentials import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    FOLDER,
    KEYS_FILE,
    PRIVATE_FILE,
    Keys,
    keys_text,
    next_epoch,
    parse_keys,
    why_exposed,
)
from trex_core.seal import EPOCH_MAX, KEY_BYTES, Key, KeyRing, Signer

AUTHORITY_FOLDER: Final = "authority"
AUTHORITY_KEY_FILE: Final = "ca.key"
AUTHORITY_DAYS: Final = 3650
"""How long an authority's certificate is good, in days."""
DAYS: Final = 365
"""How long a node's is, unless said otherwise."""
DAY: Final = dt.timedelta(days=1)
CLOCK_SLACK: Final = dt.timedelta(minutes=10)
"""A certificate is good from a little before it was made: clocks differ."""
FIRST_EPOCH: Final = 1
ISSUED_FOLDER: Final = "issued"
"""In the authority's folder: a copy of every certificate it ever made, SERIAL.pem."""
_SERIAL: Final = re.compile(r"[0-9a-f]{32,40}")
"""159 random bits without leading zeros: one in 2^31 is shorter."""


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file that only its owner may read, whole or not at all, replacing what was there.
    Raises ``OSError``."""
    data = text.encode() if isinstance(text, str) else text
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """The authority in ``folder``. Made by :func:`make_authority`, read by
    :func:`read_authority`."""

    def __init__(
        self,
        folder: Path,
        cluster_id: bytes,
        certificate: x509.Certificate,
        key: Ed25519PrivateKey,
        keys: Keys,
    ) -> None:
        self.folder = folder
        self.keys = keys
        self._cluster_id = cluster_id
        self._certificate = certificate
        self._key = key

    def issue(self, grant: Grant, folder: Path, days: int = DAYS) -> Holder:
        """Write all that ``grant``'s holder needs into ``folder``: a new certificate and private
        key, and the keys of datagrams of its role. A voter keeps the key it signs with, a folder
        its role, and a writer that is limited does not become one that is not. Raises
        :class:`ConfigError`, ``OSError``."""
        if not 0 < days <= AUTHORITY_DAYS:
            raise ConfigError(f"a certificate is good for 1 to {AUTHORITY_DAYS} days, not {days}")
        why = _why_reserved(grant) or self._why_taken(grant, folder)
        if why:
            raise ConfigError(why)
        key = Ed25519PrivateKey.generate()
        now = dt.datetime.now(dt.UTC)
        ends = min(now + days * DAY, self._certificate.not_valid_after_utc)
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        uri = x509.UniformResourceIdentifier(uri_of(grant, self._cluster_id))
        made = (
            x509.CertificateBuilder()
            .subject_name(_name(grant.name))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer.value),
                critical=False,
            )
            .sign(self._key, None)
        )
        keys = self._keys_of(grant, folder, self.keys)
        certificate = made.public_bytes(Encoding.PEM)
        holder = holder_of(certificate, self._cluster_id)
        issued = self.folder / ISSUED_FOLDER
        _folder(issued)
        write_whole(issued / f"{holder.serial}.pem", certificate)  # known before it is of use
        _folder(folder)
        write_whole(folder / AUTHORITY_FILE, self._certificate.public_bytes(Encoding.PEM))
        write_whole(folder / KEYS_FILE, keys_text(keys))
        write_whole(folder / PRIVATE_FILE, _pem(key))
        write_whole(folder / CERTIFICATE_FILE, certificate)
        return holder

    def _why_taken(self, grant: Grant, folder: Path) -> str:
        """Why ``folder`` must not be written for ``grant``; "" if it may."""
        instead = "issue under another name, into another folder (--out), or move this one away"
        try:
            held = holder_of((folder / CERTIFICATE_FILE).read_bytes(), self._cluster_id).grant
        except (OSError, ConfigError):
            held = grant  # nobody's that can be read: it may be repaired
        if held.role != grant.role:
            return f"{folder} holds the credentials of {held.name!r}, a {held.role}: {instead}"
        if held.prefixes and not grant.prefixes:
            return (
                f"{folder} holds the credentials of {held.name!r}, limited to "
                f"{', '.join(map(repr, held.prefixes))}: give its --prefix again, or {instead}"
            )
        if grant.role != "voter" and _signs(folder):
            return f"{folder} holds the key a voter signs with, which is nowhere else: {instead}"
        return ""

    def _keys_of(self, grant: Grant, folder: Path, keys: Keys) -> Keys:
        if grant.role == "voter":
            voter = voter_of(grant)
            signing = _signing_of(folder)
            if voter not in keys.public:
                known = ", ".join(map(voter_name, sorted(keys.public)))
                raise ConfigError(f"the voters are called {known}, not {grant.name!r}")
            if not signing or Signer(signing, self._cluster_id, voter).public != keys.public[voter]:
                raise ConfigError(
                    f"{folder / KEYS_FILE} does not hold the key voter {voter} signs with, which "
                    "was made by `trex init` and is nowhere else: issue into the voter's own folder"
                )
            return replace(keys, signing=signing)
        if grant.role in ("listener", "admin"):
            return replace(keys, voter=None)
        return Keys(keys.public)

    def rotate(self, base: Path, *, voter: bool, stream: bool) -> str:
        """Take the next step to new keys, here and in every folder of credentials in ``base``;
        returns what was done. If a folder is not as the authority has it, it is written again and
        no step taken. Raises :class:`ConfigError`, ``OSError``, and then the same may be given
        again."""
        holders = read_holders(base, self._cluster_id)
        if self._write_keys(holders, self.keys):
            return (
                "a folder of credentials was not as the authority has it (a step was cut off, or "
                "an old copy put there): written again, and no step taken. Bring the folders to "
                "their machines, then give this again"
            )
        keys = self.keys
        steps: list[str] = []
        if voter and keys.voter is not None:
            ring, step = _next_step(keys.voter)
            keys, steps = replace(keys, voter=ring), [*steps, f"voter key: {step}"]
        if stream and keys.stream is not None:
            ring, step = _next_step(keys.stream)
            keys, steps = replace(keys, stream=ring), [*steps, f"stream key: {step}"]
        self._write_keys(holders, keys)
        self.save_keys(keys)
        return "; ".join(steps)

    def _write_keys(self, holders: Sequence[tuple[Path, Holder]], keys: Keys) -> bool:
        """Give each of ``holders`` its part of ``keys``; whether one of them did not have it. What
        can be refused is refused before anything is written."""
        due = {}
        for path, holder in holders:
            place = path.parent / KEYS_FILE
            text = keys_text(self._keys_of(holder.grant, path.parent, keys))
            if not place.exists() or place.read_bytes() != text.encode():
                due[place] = text
        for place, text in due.items():
            write_whole(place, text)
        return bool(due)

    def save_keys(self, keys: Keys) -> None:
        """Keep ``keys``: those issued from now on. Raises ``OSError``."""
        write_whole(self.folder / KEYS_FILE, keys_text(keys))
        self.keys = keys


def _why_reserved(grant: Grant) -> str:
    """Why nobody of that role may be called so; "" if they may. Processes find their credentials by
    these names."""
    named = re.fullmatch(r"(voter)-\d+|listener|admin", grant.name)
    role = named and (named[1] or named[0])
    if role in (None, grant.role):
        return ""
    return f"{grant.name!r} is the name of a {role}, not of a {grant.role}: choose another"


def _signs(folder: Path) -> bool:
    """Whether a key to sign with is in ``folder``, perhaps in a file that is damaged."""
    try:
        return b"signing" in (folder / KEYS_FILE).read_bytes()
    except FileNotFoundError:
        return False


def _signing_of(folder: Path) -> bytes:
    try:
        return parse_keys((folder / KEYS_FILE).read_text(), str(folder / KEYS_FILE)).signing
    except FileNotFoundError:
        return b""


def make_authority(base: Path, cluster: ClusterConfig) -> Authority:
    """A new authority for ``cluster``, beside its file in ``base``, with the credentials of each
    voter, of ``listener`` and of ``admin``. Raises :class:`ConfigError` if there is one, and
    ``OSError``."""
    folder = base / AUTHORITY_FOLDER
    if (folder / AUTHORITY_KEY_FILE).exists():
        raise ConfigError(f"{folder} exists already; it is not overwritten")
    key = Ed25519PrivateKey.generate()
    now = dt.datetime.now(dt.UTC)
    name = _name(f"trex {cluster.name}")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + dt.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, None)
    )
    cluster_id = cluster.cluster_id_bytes
    signing = {voter: secrets.token_bytes(KEY_BYTES) for voter in cluster.voter_ids}
    public = {voter: Signer(own, cluster_id, voter).public for voter, own in signing.items()}
    keys = Keys(public, _new_ring(), _new_ring())
    _folder(folder)
    write_whole(folder / AUTHORITY_FILE, certificate.public_bytes(Encoding.PEM))
    write_whole(folder / AUTHORITY_KEY_FILE, _pem(key))
    made = Authority(folder, cluster_id, certificate, key, keys)
    made.save_keys(keys)
    for voter, own in signing.items():
        place = base / FOLDER / voter_name(voter)
        _folder(place.parent)
        _folder(place)
        write_whole(place / KEYS_FILE, keys_text(replace(keys, signing=own)))
        made.issue(Grant(voter_name(voter), "voter"), place)
    made.issue(Grant("listener", "listener"), base / FOLDER / "listener")
    made.issue(Grant("admin", "admin"), base / FOLDER / "admin")
    return made


def _next_step(ring: KeyRing) -> tuple[KeyRing, str]:
    """The ring after the next step of a rotation, and what that was."""
    newest = ring.keys[-1]
    if len(ring.keys) == 1:
        new = Key(next_epoch(ring), secrets.token_bytes(KEY_BYTES))
        words = f"step 1 of 3: {new.epoch} opens, {newest.epoch} still seals"
        return KeyRing((newest, new)), words
    if ring.keys[0].epoch != (ring.keys[1].epoch % EPOCH_MAX) + 1:
        words = f"step 2 of 3: {newest.epoch} seals, {ring.first.epoch} still opens"
        return KeyRing((newest, *ring.keys[:-1])), words
    return KeyRing((ring.first,)), f"step 3 of 3: only {ring.first.epoch} is left"


def _new_ring() -> KeyRing:
    return KeyRing((Key(FIRST_EPOCH, secrets.token_bytes(KEY_BYTES)),))


def read_authority(base: Path, cluster: ClusterConfig) -> Authority:
    """The authority beside the cluster file in ``base``. Raises :class:`ConfigError`."""
    folder = base / AUTHORITY_FOLDER
    try:
        for name in (AUTHORITY_KEY_FILE, KEYS_FILE):
            found = (folder / name).stat()
            why = why_exposed(found.st_mode, found.st_uid, os.getuid())
            if why:
                raise ConfigError(f"{folder / name}: {why}")
        certificate = x509.load_pem_x509_certificate((folder / AUTHORITY_FILE).read_bytes())
        key = load_pem_private_key((folder / AUTHORITY_KEY_FILE).read_bytes(), None)
        keys = parse_keys((folder / KEYS_FILE).read_text(), str(folder / KEYS_FILE))
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be read ({error.strerror}): run this where `trex init` made the "
            "cluster, or copy its authority there"
        ) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder}: a certificate or key in it cannot be read") from None
    if not isinstance(key, Ed25519PrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{folder}: {AUTHORITY_KEY_FILE} is not the key of {AUTHORITY_FILE}")
    return Authority(folder, cluster.cluster_id_bytes, certificate, key, keys)


def read_holders(base: Path, cluster_id: bytes) -> Sequence[tuple[Path, Holder]]:
    """Every certificate in the credentials folder of ``base``, by folder name. Raises
    :class:`ConfigError`."""
    return _holders((base / FOLDER).glob(f"*/{CERTIFICATE_FILE}"), cluster_id)


def serials_of(base: Path, who: str, cluster_id: bytes) -> set[str]:
    """The serials of all certificates that were ever issued to ``who`` by the authority in
    ``base``, of the one in the folder of that name, and of ``who`` if that is a serial. Raises
    :class:`ConfigError`."""
    found = {holder.serial for holder in _issued(base, cluster_id) if holder.grant.name == who}
    for path, holder in read_holders(base, cluster_id):
        if who in (path.parent.name, holder.grant.name):
            found.add(holder.serial)
    serial = who.lower().lstrip("0")
    if not found and _SERIAL.fullmatch(serial):
        found.add(serial)
    return found


def serials_known(base: Path, cluster_id: bytes) -> set[str]:
    """The serials of all certificates that the authority in ``base`` issued, or that are in a
    folder there. Raises :class:`ConfigError`."""
    here = [holder for _, holder in read_holders(base, cluster_id)]
    return {holder.serial for holder in (*_issued(base, cluster_id), *here)}


def _issued(base: Path, cluster_id: bytes) -> Sequence[Holder]:
    found = _holders((base / AUTHORITY_FOLDER / ISSUED_FOLDER).glob("*.pem"), cluster_id)
    return [holder for _, holder in found]


def _holders(paths: Iterable[Path], cluster_id: bytes) -> Sequence[tuple[Path, Holder]]:
    found = []
    for path in sorted(paths):
        try:
            found.append((path, holder_of(path.read_bytes(), cluster_id)))
        except (OSError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}; move it away, or issue it again") from error
    return found
