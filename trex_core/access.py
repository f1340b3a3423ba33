"""Who may do what: this module alone knows roles, prefixes, and what a request asks of them.

A certificate of the cluster names its holder, one role, and for a writer, if it is to be limited,
the prefixes of keys and member ids it may change.  All of it stands in one URI of the certificate's
subject alternative names (:func:`uri_of`), which names the cluster too, so that a certificate of
another cluster made by the same authority is none here::

    trex://713aebdd2d7f3b65187def30e59a5205/writer/billing?prefix=app%2Fbilling%2F

=========  =====================================================================================
role       may
=========  =====================================================================================
reader     ask for state and status
writer     that; and submit commands, open and close sessions, renew leases
listener   ask for state and status; hear the stream, fetch what it missed
admin      all that a writer and a listener may; change the cluster's own keys, which begin with
           ``trex/``; hand leadership over, have snapshots written
voter      speak to voters; all that a listener may
=========  =====================================================================================

Values in, values out: who holds a certificate, and until when it is good, is asked elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias, get_args
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import msgspec
from cryptography import x509

from trex_core.cluster import ConfigError
from trex_core.messages import (
    HandOverRequest,
    Kind,
    Query,
    Renew,
    SessionQuery,
    SnapshotNow,
    StatusRequest,
    Submit,
)

Role: TypeAlias = Literal["voter", "listener", "reader", "writer", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
SCHEME: Final = "trex"
PREFIXES_MAX: Final = 32
"""Most prefixes of one certificate."""
PREFIX_CHARS_MAX: Final = 256
NAME_CHARS_MAX: Final = 128

RESERVED_PREFIX: Final = "trex/"
"""Keys that begin so are the cluster's own: only an admin may change them."""
REVOKED_KEY: Final = RESERVED_PREFIX + "revoked"
"""Its value is the JSON array of the serials of all revoked certificates."""

Named: TypeAlias = tuple[Literal["config", "member", "lease", ""], str]
"""What a command would change, by kind and name; ("", "") where nobody can tell."""
Names: TypeAlias = Callable[[bytes], Named]
"""Says of a command what it would change."""


class Grant(msgspec.Struct, frozen=True):
    """Who somebody is and what the cluster's authority lets them do. ``prefixes`` limit what a
    writer may change; none: anything."""

    name: str
    role: Role
    prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= NAME_CHARS_MAX or not self.name.isprintable():
            raise ConfigError(
                f"a name has 1 to {NAME_CHARS_MAX} printable characters, not {self.name!r}"
            )
        if self.prefixes and self.role != "writer":
            raise ConfigError(f"prefixes limit a writer; the role {self.role} knows none")
        if len(self.prefixes) > PREFIXES_MAX:
            raise ConfigError(f"{len(self.prefixes)} prefixes; at most {PREFIXES_MAX} fit")
        for prefix in self.prefixes:
            if not 0 < len(prefix) <= PREFIX_CHARS_MAX:
                raise ConfigError(f"a prefix has 1 to {PREFIX_CHARS_MAX} characters: {prefix!r}")


def uri_of(grant: Grant, cluster_id: bytes) -> str:
    """The URI that stands for ``grant`` in a certificate of the cluster."""
    query = urlencode([("prefix", prefix) for prefix in grant.prefixes], quote_via=quote, safe="")
    uri = f"{SCHEME}://{cluster_id.hex()}/{grant.role}/{quote(grant.name, safe='')}"
    return f"{uri}?{query}" if query else uri


def grant_of(uris: Sequence[str], cluster_id: bytes) -> Grant:
    """What the URIs of a certificate grant in this cluster. Raises :class:`ConfigError` when that
    is nothing, or not exactly one thing."""
    ours = [uri for uri in uris if uri.startswith(f"{SCHEME}://")]
    if len(ours) != 1:
        raise ConfigError("the certificate names no role of a TRex cluster, or more than one")
    try:
        parts = urlsplit(ours[0])
        role, name = parts.path.removeprefix("/").split("/")
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        good = all(key == "prefix" for key, _ in query) and not parts.fragment
        # urlsplit leaves out control characters instead of refusing them.
        good = good and ours[0].isascii() and ours[0].isprintable()
    except ValueError:
        good = False
    if not good:
        raise ConfigError("the role in the certificate cannot be understood")
    if parts.netloc != cluster_id.hex():
        raise ConfigError("the certificate is of another cluster")
    known = next((each for each in ROLES if each == role), None)
    if known is None:
        raise ConfigError("the certificate's role is unknown: it is of a newer TRex, or none")
    return Grant(unquote(name), known, tuple(prefix for _, prefix in query))


class Holder(msgspec.Struct, frozen=True):
    """What a certificate says: ``grant``; from when to when it is good, in seconds since 1970; and
    ``serial``, its number in hexadecimal digits, by which it is revoked."""

    grant: Grant
    serial: str
    not_before_s: int
    not_after_s: int


_NO_CERTIFICATE: Final = (
    ValueError,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""All that reading a certificate raises."""


def holder_of(certificate: bytes, cluster_id: bytes) -> Holder:
    """Read a certificate (PEM, or DER). Who signed it is not asked here: TLS does. Raises
    :class:`ConfigError` when it is none of this cluster."""
    try:
        if certificate.lstrip().startswith(b"-----BEGIN"):
            read = x509.load_pem_x509_certificate(certificate)
        else:
            read = x509.load_der_x509_certificate(certificate)
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        begins, ends = read.not_valid_before_utc, read.not_valid_after_utc
    except _NO_CERTIFICATE as error:
        raise ConfigError("the certificate cannot be read, or names nobody") from error
    return Holder(
        grant_of(uris, cluster_id),
        f"{read.serial_number:x}",
        int(begins.timestamp()),
        int(ends.timestamp()),
    )


def voter_name(voter: int) -> str:
    """What a voter is called in its certificate."""
    return f"voter-{voter}"


def why_not_voter(grant: Grant, voter: int) -> str:
    """Why a certificate with ``grant`` does not prove that its holder is voter ``voter``; "" if it
    does."""
    if grant.role == "voter" and grant.name == voter_name(voter):
        return ""
    return f"its certificate is of {grant.name!r}, a {grant.role}, not of voter {voter}"


def voter_of(grant: Grant) -> int:
    """Which voter holds this; 0: none."""
    number = grant.name.removeprefix("voter-")
    good = grant.role == "voter" and number.isascii() and number.isdigit() and len(number) <= 5
    return int(number) if good else 0


def nothing_named(_command: bytes) -> Named:
    """The names of a state machine whose commands only its author understands."""
    return "", ""


_READERS: Final = frozenset(ROLES)
_WRITERS: Final = frozenset({"writer", "admin"})
_ADMINS: Final = frozenset({"admin"})


def why_denied(grant: Grant, request: object, names: Names) -> str:
    """What ``grant`` lacks for a client's ``request``; "" if it may be done. An unknown kind of
    request is denied."""
    match request:
        case StatusRequest() | Query():
            return _lacks(grant, "ask", _READERS)
        case Submit() if request.kind == Kind.COMMAND and grant.role != "admin":
            return _lacks(grant, "change anything", _WRITERS) or _out_of_reach(
                grant, *names(request.command)
            )
        case Submit() | SessionQuery() | Renew():
            return _lacks(grant, "change anything", _WRITERS)
        case HandOverRequest():
            return _lacks(grant, "hand leadership over", _ADMINS)
        case SnapshotNow():
            return _lacks(grant, "have snapshots written", _ADMINS)
        case _:
            return f"{grant.name!r} may not do what no role is for"


def _lacks(grant: Grant, what: str, roles: frozenset[str]) -> str:
    if grant.role in roles:
        return ""
    needed = " or ".join(role for role in ROLES if role in roles)
    return f"{grant.name!r} is a {grant.role}; to {what} takes a {needed}"


def _out_of_reach(grant: Grant, kind: str, name: str) -> str:
    if kind == "config" and name.startswith(RESERVED_PREFIX) and grant.role != "admin":
        return _lacks(grant, f"change {name!r}", _ADMINS)
    if not grant.prefixes:
        return ""
    reach = ", ".join(map(repr, grant.prefixes))
    if kind in ("config", "member"):
        if name.startswith(grant.prefixes):
            return ""
        return f"{grant.name!r} may change what begins with {reach} only, not {name!r}"
    if kind == "lease":
        if not name:
            return ""  # to be granted one changes nobody's
        return (
            f"{grant.name!r} may change what begins with {reach} only; on lease {name} members of "
            "others may hang: let it run out"
        )
    return f"{grant.name!r} may change what begins with {reach} only; this names nothing"


def revoked_serials(text: str) -> frozenset[str]:
    """What the value of REVOKED_KEY says. Raises :class:`ConfigError` when it says nothing."""
    try:
        return frozenset(msgspec.json.decode(text.encode(), type=list[str]))
    except (ValueError, UnicodeError) as error:
        raise ConfigError(f"{REVOKED_KEY} is not a JSON array of serials") from error


def revoked_text(serials: frozenset[str]) -> str:
    """The inverse of :func:`revoked_serials`."""
    return msgspec.json.encode(sorted(serials)).decode()
