"""Who may do what: every role with every request, prefixes, and what a certificate may say."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from trex_core.access import (
    NAME_CHARS_MAX,
    PREFIX_CHARS_MAX,
    PREFIXES_MAX,
    ROLES,
    Grant,
    grant_of,
    uri_of,
    voter_name,
    why_denied,
    why_not_voter,
)
from trex_core.cluster import ConfigError
from trex_core.messages import (
    ClientRequest,
    HandOverRequest,
    Kind,
    Query,
    Renew,
    SessionQuery,
    SnapshotNow,
    StatusRequest,
    Submit,
)
from trex_core.metadata.commands import (
    ConfigCas,
    ConfigDelete,
    ConfigPut,
    LeaseExpire,
    LeaseGrant,
    LeaseRevoke,
    MemberJoin,
    MemberLeave,
    MemberUpdate,
    encode_command,
    what_changes,
)

CLUSTER, OTHER = b"cluster-cluster!", b"cluster-another!"
PUT = encode_command(ConfigPut("app/a", "1"))


def submit(command, kind=Kind.COMMAND):
    return Submit(1, kind, 2, 3, 3, command)


REQUESTS = {
    StatusRequest(1): {"voter", "listener", "reader", "writer", "admin"},
    Query(1, b"", True): {"voter", "listener", "reader", "writer", "admin"},
    submit(PUT): {"writer", "admin"},
    submit(b"", Kind.OPEN): {"writer", "admin"},
    submit(b"", Kind.CLOSE): {"writer", "admin"},
    SessionQuery(1, 2): {"writer", "admin"},
    Renew(1, (2,)): {"writer", "admin"},
    HandOverRequest(1, 2): {"admin"},
    SnapshotNow(1): {"admin"},
}


def test_every_request_is_in_the_table():
    assert {type(request) for request in REQUESTS} == set(ClientRequest.__args__)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda each: type(each).__name__)
def test_each_role_may_what_it_may(role, request_):
    why = why_denied(Grant("bob", role), request_, what_changes)
    assert (why == "") == (role in REQUESTS[request_])
    if why:
        assert "'bob'" in why
        assert role in why, "it says what one has"
        assert all(each in why for each in REQUESTS[request_]), "and what it takes"


def test_what_is_no_request_is_denied_to_all():
    for role in ROLES:
        assert why_denied(Grant("bob", role), object(), what_changes)


@pytest.mark.parametrize(
    ("command", "good"),
    [
        (ConfigPut("app/a", "1"), True),
        (ConfigDelete("app/"), True),
        (ConfigCas("app/x", 3, None), True),
        (ConfigPut("app", "1"), False),
        (ConfigPut("ring/spread", "any"), False),
        (ConfigDelete("other"), False),
        (ConfigCas("xapp/", 0, "1"), False),
        (MemberJoin("app/1"), True),
        (MemberJoin("web-1"), True),
        (MemberUpdate("web-9", weight=2), True),
        (MemberLeave("db-1"), False),
        (MemberJoin("we"), False),
        (LeaseGrant(1000), True),
        (LeaseRevoke(7), False),
        (LeaseExpire(7), False),
    ],
)
def test_a_limited_writer_changes_what_begins_so_and_nothing_else(command, good):
    bob = Grant("bob", "writer", ("app/", "web-"))
    why = why_denied(bob, submit(encode_command(command)), what_changes)
    assert (why == "") == good
    assert good or ("'app/'" in why and "'web-'" in why)


@pytest.mark.parametrize("command", [b"", b"garbage", PUT[:-1], PUT + b"x"])
def test_a_limited_writer_submits_nothing_that_names_nothing(command):
    assert why_denied(Grant("bob", "writer", ("a",)), submit(command), what_changes)
    assert not why_denied(Grant("bob", "writer"), submit(command), what_changes)


@pytest.mark.parametrize(
    "command", [ConfigPut("trex/revoked", "[]"), ConfigDelete("trex/x"), ConfigCas("trex/", 0, "1")]
)
def test_the_clusters_own_keys_are_an_admins(command):
    """Whatever prefixes a writer has; and what only looks like them is anybody's."""
    asked = submit(encode_command(command))
    assert not why_denied(Grant("root", "admin"), asked, what_changes)
    for bob in (Grant("bob", "writer"), Grant("bob", "writer", ("trex/", "t"))):
        assert "admin" in why_denied(bob, asked, what_changes)
    other = submit(encode_command(ConfigPut("trexes/1", "1")))
    assert not why_denied(Grant("bob", "writer"), other, what_changes)


def test_a_voters_certificate_proves_that_voter_only():
    assert why_not_voter(Grant(voter_name(2), "voter"), 2) == ""
    for grant in (
        Grant(voter_name(3), "voter"),
        Grant("voter-02", "voter"),
        Grant(voter_name(2), "listener"),
        Grant(voter_name(2), "admin"),
    ):
        assert f"'{grant.name}', a {grant.role}, not of voter 2" in why_not_voter(grant, 2)


NAMES = some.text(
    some.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=NAME_CHARS_MAX
)
PREFIXES = some.lists(some.text(min_size=1, max_size=40), max_size=PREFIXES_MAX)


@given(NAMES, some.sampled_from(ROLES), PREFIXES)
@settings(max_examples=300, deadline=None)
def test_a_grant_is_the_same_after_its_certificate(name, role, prefixes):
    with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate cannot be told at all
        grant = Grant(name, role, tuple(prefixes) if role == "writer" else ())
        uri = uri_of(grant, CLUSTER)
        assert uri.isascii()
        assert grant_of(["https://example.org/", uri], CLUSTER) == grant
        with pytest.raises(ConfigError, match="another cluster"):
            grant_of([uri], OTHER)


ID = CLUSTER.hex()


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://example.org/"],
        [f"trex://{ID}/admin/a", f"trex://{ID}/reader/a"],
        [f"trex://{ID}/admin"],
        [f"trex://{ID}/admin/"],
        [f"trex://{ID}/admin/a/b"],
        [f"trex://{ID}/emperor/a"],
        [f"trex://{ID}/Admin/a"],
        [f"trex://{ID}/reader/a?prefix=x"],
        [f"trex://{ID}/writer/a?prefix="],
        [f"trex://{ID}/writer/a?prefix"],
        [f"trex://{ID}/writer/a?prefix=x&other=y"],
        [f"trex://{ID}/writer/a#prefix=x"],
        [f"trex://{ID}/writer/a%00b"],
        [f"trex://{ID}/writer/{'a' * (NAME_CHARS_MAX + 1)}"],
        [f"trex://{ID}/writer/a?prefix={'a' * (PREFIX_CHARS_MAX + 1)}"],
        [f"trex://{ID}/writer/a?" + "&".join(["prefix=a"] * (PREFIXES_MAX + 1))],
        [f"trex://{ID[:-1]}/admin/a"],
        [f"trex://x@{ID}/admin/a"],
        [f"trex://{ID}/ad\nmin/a"],
        [f"trex://{ID}/admin/é"],
        ["trex://[/admin/a"],
        ["trex://"],
    ],
)
def test_what_a_certificate_must_not_say(uris):
    with pytest.raises(ConfigError):
        grant_of(uris, CLUSTER)


@given(some.lists(some.one_of(some.text(), some.text().map(lambda t: f"trex://{ID}/{t}"))))
@settings(max_examples=400, deadline=None)
def test_random_words_raise_nothing_but_config_error(uris):
    with contextlib.suppress(ConfigError):
        grant_of(uris, CLUSTER)
