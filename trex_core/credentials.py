"""What a node holds beside the cluster file: this module alone knows its files and what they say.

=================  ===============================================================  ============
file               what stands in it                                                secret
=================  ===============================================================  ============
``ca.pem``         the certificate of the cluster's authority                       no
``node.pem``       the node's own certificate: name, role, prefixes (``access``)    no
``node.key``       the private key of that certificate                              yes
``keys.toml``      keys of datagrams, as far as the role has any, and the voters'   yes
                   public keys
=================  ===============================================================  ============

Text in, values out: whoever calls reads the files, and asks :func:`why_exposed` of the secret ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final, TypeAlias

import msgspec

from trex_core.access import Grant, Holder, holder_of
from trex_core.cluster import ConfigError, decode_toml
from trex_core.seal import KEY_BYTES, KEYS_MAX, Key, KeyRing

AUTHORITY_FILE: Final = "ca.pem"
CERTIFICATE_FILE: Final = "node.pem"
PRIVATE_FILE: Final = "node.key"
KEYS_FILE: Final = "keys.toml"
SECRET_FILES: Final = (PRIVATE_FILE, KEYS_FILE)
FOLDER: Final = "credentials"
"""Beside the cluster file: one folder for each node."""

Epoch = Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    epoch: Epoch
    secret: str

    def __repr__(self) -> str:
        return f"key {self.epoch}"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    voters: dict[str, str]
    stream: tuple[_Entry, ...] = ()
    voter: tuple[_Entry, ...] = ()
    signing: str = ""

    def __repr__(self) -> str:
        return f"keys of {len(self.voters)} voters"


class Keys(msgspec.Struct, frozen=True):
    """The content of ``keys.toml``. Who only speaks TLS (readers, writers) has none of the rings;
    listeners and admins have ``stream``, voters all. ``public`` are the KEY_BYTES by which each
    voter's signed tips are known, ``signing`` are the KEY_BYTES with which this voter signs."""

    public: dict[int, bytes]
    stream: KeyRing | None = None
    voter: KeyRing | None = None
    signing: bytes = b""

    def __repr__(self) -> str:
        return "Keys(...)"

    __str__ = __repr__


def _secret(text: str, where: str) -> bytes:
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise ConfigError(f"{where} must be {2 * KEY_BYTES} hexadecimal digits")
    return secret


def _ring(entries: tuple[_Entry, ...], table: str, source: str) -> KeyRing | None:
    if not entries:
        return None
    keys = [
        Key(entry.epoch, _secret(entry.secret, f"{source}: secret of {table} key {entry.epoch}"))
        for entry in entries
    ]
    try:
        return KeyRing(tuple(keys))
    except ValueError as error:
        raise ConfigError(f"{source}: {table}: {error}") from None


def parse_keys(text: str, source: str = KEYS_FILE) -> Keys:
    """Read ``keys.toml``. Raises :class:`ConfigError` naming ``source`` and place, and no secret of
    it."""
    try:
        file = decode_toml(text, _File)
    except (ValueError, RecursionError) as error:
        # A parser quotes what it cannot parse, and here that may be half a key.
        where = str(error) if isinstance(error, msgspec.ValidationError) else "it is not TOML"
        raise ConfigError(f"{source}: {where}") from None
    public = {}
    for voter, key in file.voters.items():
        if not voter.isascii() or not voter.isdigit() or len(voter) > 5:
            raise ConfigError(f"{source}: voters: {voter!r} is not the id of a voter")
        public[int(voter)] = _secret(key, f"{source}: the key of voter {voter}")
    signing = _secret(file.signing, f"{source}: signing") if file.signing else b""
    stream, voter_ring = _ring(file.stream, "stream", source), _ring(file.voter, "voter", source)
    return Keys(public, stream, voter_ring, signing)


def keys_text(keys: Keys) -> str:
    """The text of a ``keys.toml``; the inverse of :func:`parse_keys`."""
    lines = ["# Secret. Of each ring the first key seals, and each opens."]
    if keys.signing:
        lines += ["# with which this voter signs the tips of the stream", ""]
        lines.insert(2, f'signing = "{keys.signing.hex()}"')
    lines += ["# the public keys by which the voters' signatures are known", "[voters]"]
    lines += [f'{voter} = "{key.hex()}"' for voter, key in sorted(keys.public.items())]
    for table, ring in (("stream", keys.stream), ("voter", keys.voter)):
        for key in ring.keys if ring is not None else ():
            lines += ["", f"[[{table}]]", f"epoch = {key.epoch}", f'secret = "{key.secret.hex()}"']
    return "\n".join(lines) + "\n"


def next_epoch(ring: KeyRing) -> int:
    """An epoch that no key of ``ring`` has: the one after the highest. Raises
    :class:`ConfigError` when the ring is full."""
    if len(ring.keys) >= KEYS_MAX:
        raise ConfigError(
            f"the ring holds {KEYS_MAX} keys already: take an old one away first "
            "(`trex keys rotate` says which)"
        )
    return max(key.epoch for key in ring.keys) % 0xFFFF + 1


def why_exposed(mode: int, owner: int, me: int) -> str:
    """Why a secret file of that mode and owner must not be used by user ``me``; "" if it may."""
    if owner not in (me, 0):
        return f"it belongs to user {owner}, not to you ({me})"
    if mode & 0o077:
        return f"others may read or write it (mode {mode & 0o777:04o}); chmod 0600 it"
    return ""


ReadFile: TypeAlias = Callable[[str], tuple[bytes, int, int]]
"""Reads the file of that name: its bytes, its mode, and the user id of its owner. Raises
``OSError``."""


def assembled(folder: str, read: ReadFile, me: int, cluster_id: bytes) -> tuple[Holder, Keys]:
    """What the files in ``folder`` make of user ``me`` in the cluster. Raises
    :class:`ConfigError` saying which file, what is wrong, and what to do."""
    found: dict[str, bytes] = {}
    for name in (AUTHORITY_FILE, CERTIFICATE_FILE, PRIVATE_FILE, KEYS_FILE):
        path = f"{folder}/{name}"
        try:
            found[name], mode, owner = read(name)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}): name the folder of your credentials "
                "with --credentials or TREX_CREDENTIALS; `trex cert issue` makes new ones"
            ) from error
        why = why_exposed(mode, owner, me) if name in SECRET_FILES else ""
        if why:
            raise ConfigError(f"{path} is secret, and {why}")
    try:
        holder = holder_of(found[CERTIFICATE_FILE], cluster_id)
    except ConfigError as error:
        raise ConfigError(f"{folder}/{CERTIFICATE_FILE}: {error}") from error
    text = found[KEYS_FILE].decode(errors="replace")
    return holder, parse_keys(text, f"{folder}/{KEYS_FILE}")


def issue_command(grant: Grant) -> str:
    """The command that makes a certificate for ``grant``, as it is typed in a shell."""
    limits = "".join(f"--prefix {_typed(prefix)} " for prefix in grant.prefixes)
    return f"trex cert issue --role {grant.role} {limits}{_typed(grant.name)}"


def _typed(word: str) -> str:
    if word.isascii() and all(each.isalnum() or each in "/._-" for each in word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


def why_another(held: Grant, new: Grant) -> str:
    """Why a process that runs as ``held`` must not go on as ``new``; "" if it may: a role is what
    it started for, and a voter which one it is."""
    if new.role == held.role and (new.role != "voter" or new.name == held.name):
        return ""
    return (
        f"{CERTIFICATE_FILE} is of {new.name!r}, a {new.role}, now, and this runs as "
        f"{held.name!r}, a {held.role}: bring its own back"
    )


def why_not_good(holder: Holder, now_s: float, date: Callable[[int], str]) -> str:
    """Why ``holder``'s certificate is of no use at ``now_s`` (seconds since 1970); "" if it is.
    ``date`` writes such a time for people."""
    name = f"the certificate of {holder.grant.name!r}"
    if now_s >= holder.not_after_s:
        return (
            f"{name} expired on {date(holder.not_after_s)}: issue a new one with "
            f"`{issue_command(holder.grant)}`"
        )
    if now_s < holder.not_before_s:
        return (
            f"{name} is good from {date(holder.not_before_s)} only: is this machine's clock right?"
        )
    return ""
