"""The cluster file: what is read from it, and how each mistake in it is named."""

from __future__ import annotations

import pytest

from dashboard.cluster_init import cluster_file
from trex_core.cluster import TEXT_CHARS_MAX, ConfigError, parse_cluster
from trex_core.messages import SNAPSHOT_SLOTS


def text(voters: int = 3) -> str:
    hosts = [f"10.0.0.{n}" for n in range(1, voters + 1)]
    return cluster_file("books", hosts, range(7000, 7000 + 3 * voters + 2))


def test_what_is_written_is_read():
    written = text()
    cluster = parse_cluster(written)
    assert cluster.name == "books" and cluster.voter_ids == (1, 2, 3)
    assert cluster.cluster_id_bytes.hex() == cluster.cluster_id
    assert len(cluster.cluster_id_bytes) == 16
    assert [cluster.voter(n).host for n in cluster.voter_ids] == [
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.3",
    ]
    assert cluster.stream.repair_port == cluster.stream.port + 1 == 7010
    assert cluster.journal.snapshot_slots == SNAPSHOT_SLOTS, "a default"
    assert cluster.timing.election_ticks_min >= 5 * cluster.timing.heartbeat_ticks


def test_a_voter_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"no voter 9 .* names 1, 2, 3"):
        parse_cluster(text()).voter(9)


@pytest.mark.parametrize("voters", range(1, 9))
def test_how_many_voters_there_may_be(voters):
    if voters in (1, 3, 5, 7):
        assert len(parse_cluster(text(voters)).voters) == voters
    else:
        with pytest.raises(ConfigError, match=f"1, 3, 5 or 7 of them, not {voters}"):
            parse_cluster(text(voters))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('cluster_id = "', 'cluster_id = "xx', r"32 hexadecimal digits; `trex init`"),
        ('cluster_id = "', 'cluster_id = "00', r"32 hexadecimal digits; `trex init`"),
        ("id = 3", "id = 2", "each id may be given once only"),
        ("peer_port = 7003", "peer_port = 7000", ""),
        ("# heartbeat_ticks = 4", "heartbeat_ticks = 9", r"need 3 \* heartbeat_ticks <="),
        ("# election_ticks_max = 50", "election_ticks_max = 25", "election_ticks_min < election"),
        ("# tick_ms = 20", "tick_ms = 0", r"timing\.tick_ms"),
        ("# tick_ms = 20", "tock_ms = 20", "tock_ms.*timing"),
        ("[stream]", "[stream", "cluster.toml"),
        ('name = "books"', "", "name"),
    ],
)
def test_each_mistake_is_named(old, new, words):
    written = text()
    assert old in written
    broken = written.replace(old, new, 1)
    if not words:  # the ports are another matter: on one host only
        parse_cluster(broken)
        broken = broken.replace("10.0.0.2", "10.0.0.1")
        words = "two of them share a host and port"
    with pytest.raises(ConfigError, match=words) as caught:
        parse_cluster(broken)
    assert str(caught.value).startswith("cluster.toml: ")


def test_the_file_is_named_as_its_reader_calls_it():
    with pytest.raises(ConfigError, match=r"^over/there\.toml: "):
        parse_cluster("nothing = 1", "over/there.toml")


def test_a_file_that_is_much_too_long_is_refused_before_it_is_read():
    with pytest.raises(ConfigError, match="longer than"):
        parse_cluster("#" * (TEXT_CHARS_MAX + 1))
