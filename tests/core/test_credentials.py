"""Credentials: what the files of a node say, and how each thing wrong with them is told."""

from __future__ import annotations

import datetime as dt
import itertools
import shlex
import shutil
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import listeners.credentials
import voters.credentials
from dashboard.cluster_init import cluster_file
from tests.credentials import folder, issue, papers
from trex_core.access import (
    REVOKED_KEY,
    Grant,
    Holder,
    holder_of,
    nothing_named,
    revoked_serials,
    revoked_text,
    uri_of,
    voter_name,
    voter_of,
    why_denied,
    why_not_voter,
)
from trex_core.cluster import ConfigError, parse_cluster
from trex_core.credentials import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEYS_FILE,
    PRIVATE_FILE,
    Keys,
    _File,
    assembled,
    keys_text,
    next_epoch,
    parse_keys,
    why_another,
    why_exposed,
    why_not_good,
)
from trex_core.messages import Kind, Submit
from trex_core.seal import KEYS_MAX, Key, KeyRing

CLUSTER = parse_cluster(cluster_file("papers", ["127.0.0.1"], range(7100, 7105)))
ID = CLUSTER.cluster_id_bytes
ME = 1000
FILES = (AUTHORITY_FILE, CERTIFICATE_FILE, PRIVATE_FILE, KEYS_FILE)
AnyCredentials: TypeAlias = voters.credentials.Credentials | listeners.credentials.Credentials


def certificate(*names: x509.GeneralName) -> bytes:
    """A certificate for ``names``, DER, signed by itself."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(0xABC)
        .not_valid_before(dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(2026, 1, 2, tzinfo=dt.UTC))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, None).public_bytes(serialization.Encoding.DER)


# --- certificates ---------------------------------------------------------------------------


def test_a_certificate_says_who_holds_it_and_until_when():
    grant = Grant("billing", "writer", ("app/billing/",))
    for data in (
        (issue(CLUSTER, grant) / CERTIFICATE_FILE).read_bytes(),
        certificate(x509.UniformResourceIdentifier(uri_of(grant, ID))),
    ):
        holder = holder_of(data, ID)
        assert holder.grant == grant
        assert holder.not_after_s - holder.not_before_s >= 86_400
    assert holder.serial == "abc"
    assert holder.not_before_s == int(dt.datetime(2026, 1, 1, tzinfo=dt.UTC).timestamp())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n",
        b"\x30\x03\x02\x01\x01",
        certificate(),
    ],
)
def test_what_is_no_certificate_is_refused(data):
    with pytest.raises(ConfigError, match="cannot be read, or names nobody"):
        holder_of(data, ID)


def test_a_certificate_without_a_role_is_refused():
    with pytest.raises(ConfigError, match="names no role"):
        holder_of(certificate(x509.DNSName("localhost")), ID)


@pytest.mark.parametrize(
    ("grant", "voter"),
    [
        (Grant(voter_name(3), "voter"), 3),
        (Grant("voter-12345", "voter"), 12345),
        (Grant("voter-123456", "voter"), 0),
        (Grant("voter-x", "voter"), 0),
        (Grant("voter-²", "voter"), 0),
        (Grant(voter_name(3), "admin"), 0),
        (Grant("someone", "reader"), 0),
    ],
)
def test_which_voter_a_certificate_is_of(grant, voter):
    assert voter_of(grant) == voter
    assert (why_not_voter(grant, 3) == "") == (voter == 3)
    if voter != 3:
        assert repr(grant.name) in why_not_voter(grant, 3) and "voter 3" in why_not_voter(grant, 3)


def test_a_command_that_nobody_understands_is_within_no_prefix():
    request = Submit(1, Kind.COMMAND, 0, 1, 1, b"?")
    assert why_denied(Grant("w", "writer"), request, nothing_named) == ""
    limited = Grant("w", "writer", ("app/",))
    assert "this names nothing" in why_denied(limited, request, nothing_named)


def test_the_clusters_own_keys_are_an_admins():
    request = Submit(1, Kind.COMMAND, 0, 1, 1, b"?")

    def own(_command: bytes) -> tuple[str, str]:
        return "config", REVOKED_KEY

    for grant in (Grant("w", "writer"), Grant("w", "writer", ("trex/",))):
        denied = why_denied(grant, request, own)
        assert denied.startswith("'w' is a writer; to change 'trex/revoked' takes")
    assert why_denied(Grant("a", "admin"), request, own) == ""


def test_revoked_serials_are_written_and_read():
    for serials in (frozenset(), frozenset({"1", "abc"})):
        assert revoked_serials(revoked_text(serials)) == serials
    for text in ("", "{}", "[1]", '["a"', "\ud800"):
        with pytest.raises(ConfigError, match="not a JSON array of serials"):
            revoked_serials(text)


# --- keys -----------------------------------------------------------------------------------


def secret(n: int) -> bytes:
    return bytes([n]) * 32


def ring(*epochs: int) -> KeyRing:
    return KeyRing(tuple(Key(epoch, secret(epoch % 251)) for epoch in epochs))


PUBLIC = {1: secret(101), 3: secret(103)}


def test_keys_are_written_and_read():
    for stream, voter, signing in itertools.product(
        (None, ring(1), ring(7, 6)), (None, ring(2)), (b"", secret(9))
    ):
        keys = Keys(PUBLIC, stream, voter, signing)
        again = parse_keys(keys_text(keys))
        assert (again.public, again.signing) == (PUBLIC, signing)
        for one, other in ((again.stream, stream), (again.voter, voter)):
            assert (one.keys if one else None) == (other.keys if other else None)


def test_nothing_prints_a_secret():
    keys = Keys(PUBLIC, ring(1), ring(2), secret(9))
    for text in (repr(keys), str(keys), f"{keys}"):
        assert text == "Keys(...)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[voters]", "[voters"), "it is not TOML"),
        (("[voters]", "[voterz]"), "voter"),
        (('1 = "', 'x = "'), "'x' is not the id of a voter"),
        (('1 = "', '123456 = "'), "'123456' is not the id of a voter"),
        (('1 = "65', '1 = "zz'), "the key of voter 1 must be 64 hexadecimal digits"),
        (('1 = "65', '1 = "'), "the key of voter 1 must be 64 hexadecimal digits"),
        (('signing = "09', 'signing = "'), "signing must be 64 hexadecimal digits"),
        (('secret = "01', 'secret = "'), "secret of stream key 1 must be 64"),
        (("epoch = 1\n", "epoch = 0\n"), "epoch"),
        (("epoch = 2\n", "epoch = 1\n"), "stream: "),
    ],
)
def test_each_mistake_is_named_and_no_secret_with_it(change, words):
    text = keys_text(Keys(PUBLIC, ring(1, 2), ring(3), secret(9)))
    assert change[0] in text
    with pytest.raises(ConfigError, match=words) as caught:
        parse_keys(text.replace(*change, 1), "there/keys.toml")
    said = str(caught.value)
    assert said.startswith("there/keys.toml")
    assert not any(secret(n).hex()[4:20] in said for n in (1, 2, 3, 9))


def test_an_entry_of_a_ring_shows_its_epoch_only():
    from trex_core import credentials

    entry = credentials._Entry(7, secret(7).hex())
    assert repr(entry) == "key 7"


def test_the_next_epoch_is_above_all_and_wraps():
    assert next_epoch(ring(1)) == 2
    assert next_epoch(ring(9, 4)) == 10
    assert next_epoch(ring(0xFFFF)) == 1
    with pytest.raises(ConfigError, match="take an old one away first"):
        next_epoch(ring(*range(1, KEYS_MAX + 1)))


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "owner", "words"),
    [
        (0o100600, ME, ""),
        (0o100400, 0, ""),
        (0o100640, ME, "others may read or write it (mode 0640); chmod 0600 it"),
        (0o100602, ME, "others may read or write it (mode 0602); chmod 0600 it"),
        (0o100600, 77, "it belongs to user 77, not to you (1000)"),
    ],
)
def test_who_else_could_read_a_secret(mode, owner, words):
    assert why_exposed(mode, owner, ME) == words


def reader(
    spoil: Callable[[str, bytes], tuple[bytes, int, int]] = lambda _, data: (data, 0o600, ME),
) -> Callable[[str], tuple[bytes, int, int]]:
    """Reads the files of the admin, spoiled."""
    place = folder(CLUSTER, "admin")
    return lambda name: spoil(name, (place / name).read_bytes())


def test_the_files_make_a_holder_and_keys():
    holder, keys = assembled("papers", reader(), ME, ID)
    assert holder.grant.role == "admin" and keys.stream is not None and keys.signing == b""


def test_a_file_that_is_missing_is_named_and_what_to_do():
    for missing in (AUTHORITY_FILE, CERTIFICATE_FILE, PRIVATE_FILE, KEYS_FILE):

        def spoil(name: str, data: bytes, missing: str = missing) -> tuple[bytes, int, int]:
            if name == missing:
                raise FileNotFoundError(2, "No such file or directory")
            return data, 0o600, ME

        with pytest.raises(ConfigError, match=f"papers/{missing} cannot be read .No such file"):
            assembled("papers", reader(spoil), ME, ID)


def exposed(names: Iterable[str]) -> Callable[[str, bytes], tuple[bytes, int, int]]:
    return lambda name, data: (data, 0o644 if name in names else 0o600, ME)


def test_only_secrets_must_not_be_exposed():
    assembled("papers", reader(exposed((AUTHORITY_FILE, CERTIFICATE_FILE))), ME, ID)
    for name in (PRIVATE_FILE, KEYS_FILE):
        with pytest.raises(ConfigError, match=f"papers/{name} is secret, and others may read"):
            assembled("papers", reader(exposed((name,))), ME, ID)


def test_damaged_files_are_named():
    def nonsense(damaged: str) -> Callable[[str, bytes], tuple[bytes, int, int]]:
        return lambda name, data: (b"\xff\xfe" if name == damaged else data, 0o600, ME)

    with pytest.raises(ConfigError, match=f"^papers/{CERTIFICATE_FILE}: the certificate cannot"):
        assembled("papers", reader(nonsense(CERTIFICATE_FILE)), ME, ID)
    with pytest.raises(ConfigError, match=f"^papers/{KEYS_FILE}: it is not TOML"):
        assembled("papers", reader(nonsense(KEYS_FILE)), ME, ID)
    with pytest.raises(ConfigError, match="of another cluster"):
        assembled("papers", reader(), ME, bytes(16))


def test_a_certificate_is_good_from_its_first_second_to_its_last():
    holder = Holder(Grant("ann", "reader"), "1", 100, 200)

    def why(now_s: float) -> str:
        return why_not_good(holder, now_s, lambda s: f"<{s}>")

    assert why(100) == why(199.9) == ""
    assert "expired on <200>: issue a new one with `trex cert issue --role reader ann`" in why(200)
    assert "good from <100> only: is this machine's clock right?" in why(99.9)


def test_what_is_to_be_typed_for_a_new_certificate_grants_no_more_than_the_old_one():
    grant = Grant("my app", "writer", ("app/", "it's/"))
    why = why_not_good(Holder(grant, "1", 100, 200), 200, lambda s: f"<{s}>")
    assert "issue a new one with `trex cert issue --role writer --prefix app/ " in why
    words = shlex.split(why.split("`")[1])
    assert words[5:] == ["--prefix", "app/", "--prefix", "it's/", "my app"]


# --- a folder that changes under a process that runs -----------------------------------------

BOTH = pytest.mark.parametrize("module", [voters.credentials, listeners.credentials])


def shows(credentials: AnyCredentials, as_server: bool) -> str:
    """Who ``credentials`` are to an admin at the other end of a TLS connection."""
    admin = papers(CLUSTER)
    contexts = (
        (credentials.server, admin.client) if as_server else (admin.server, credentials.client)
    )
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = contexts[0].wrap_bio(there, back, server_side=True)
    client = contexts[1].wrap_bio(back, there)
    for _ in range(3):
        for end in (client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return voters.credentials.other_end(client if as_server else server, ID).grant.name


def copied(place: Path, names: Iterable[str], into: Path) -> None:
    into.mkdir(exist_ok=True)
    for name in names:
        shutil.copy2(place / name, into / name)


@BOTH
@pytest.mark.parametrize("first", [CERTIFICATE_FILE, PRIVATE_FILE])
def test_half_a_new_folder_leaves_all_as_before(module, first, tmp_path):
    ann, bob = (issue(CLUSTER, Grant(name, "reader")) for name in ("ann", "bob"))
    place = tmp_path / "mine"
    copied(ann, FILES, place)
    credentials = module.Credentials(place, ID)
    copied(bob, [first], place)
    with pytest.raises(ConfigError, match=r"node\.key is not the key of node\.pem"):
        credentials.refresh()
    assert credentials.holder.grant.name == "ann"
    assert [shows(credentials, end) for end in (True, False)] == ["ann", "ann"]
    copied(bob, FILES, place)
    assert credentials.refresh()
    assert [shows(credentials, end) for end in (True, False)] == ["bob", "bob"]


@BOTH
@pytest.mark.parametrize("wrong", ["admin", "listener"])
def test_a_folder_of_somebody_else_is_not_taken_up(module, wrong, tmp_path):
    """One folder copied to another's place must not end a voter that runs."""
    place = tmp_path / "mine"
    copied(papers(CLUSTER, "voter-1").folder, FILES, place)
    credentials = module.Credentials(place, ID)
    keys = credentials.keys
    copied(papers(CLUSTER, wrong).folder, FILES, place)
    with pytest.raises(ConfigError, match=f"is of '{wrong}', .*runs as 'voter-1', a voter: bring"):
        credentials.refresh()
    assert (credentials.holder.grant.name, credentials.keys) == ("voter-1", keys)
    assert [shows(credentials, end) for end in (True, False)] == ["voter-1", "voter-1"]
    copied(issue(CLUSTER, Grant("voter-1", "voter")), FILES, place)
    assert credentials.refresh()


def test_one_voter_does_not_go_on_as_another():
    one, two = (Grant(name, "voter") for name in ("voter-1", "voter-2"))
    assert why_another(one, one) == ""
    assert why_another(one, two).startswith("node.pem is of 'voter-2', a voter, now")


@BOTH
def test_what_was_exposed_is_taken_up_once_it_is_not(module, tmp_path):
    place = tmp_path / "mine"
    copied(issue(CLUSTER, Grant("ann", "reader")), FILES, place)
    credentials = module.Credentials(place, ID)
    assert not credentials.refresh()
    (place / KEYS_FILE).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 0600"):
        credentials.refresh()
    assert not credentials.refresh(), "it is said once"
    (place / KEYS_FILE).chmod(0o600)
    assert credentials.refresh()
    assert not credentials.refresh()


def test_the_file_of_keys_tells_none_when_it_is_shown():
    shown = repr(_File({"1": "ab" * 32}, signing="cd" * 32))
    assert shown == "keys of 1 voters"
