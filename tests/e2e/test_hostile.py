"""Garbage, half-open and slow connections at every port: counted, and harmless."""

from __future__ import annotations

import random
import socket
import time
from contextlib import ExitStack
from statistics import median

from tests.e2e.harness import LocalCluster, config_of, put
from trex_core.messages import DATAGRAM_BYTES_MAX
from trex_core.wire import HEADER_BYTES, Channel, Identity, frame
from voters.driver import Status, open_driver

HALF_OPEN_EACH = 40
GARBAGE_EACH = 200


def garbage(cluster_id: bytes, chance: random.Random) -> list[bytes]:
    """Noise; a stranger's frame; a frame of ours cut, flipped, of the wrong channel, or whose body
    is no message; a header that promises more than anybody should buffer."""
    ours = frame(Identity(cluster_id, 1, 1, 1), Channel.PEER, b"\x93\x01\x00\x00")
    flipped = bytearray(ours)
    flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    vast = bytearray(ours[:HEADER_BYTES])
    vast[56:60] = b"\xff\xff\xff\xff"
    return [
        chance.randbytes(chance.randrange(1, DATAGRAM_BYTES_MAX)),
        b"",
        frame(Identity(bytes(16), 1, 1, 1), Channel.PEER, b"\x93\x01\x00\x00"),
        ours[: chance.randrange(1, len(ours))],
        bytes(flipped),
        frame(Identity(cluster_id, 2, 1, 1), Channel.JOURNAL, b"\x93\x01\x00\x00"),
        frame(Identity(cluster_id, 2, 1, 1), Channel.PEER, chance.randbytes(40)),
        frame(Identity(cluster_id, 0, 0, 0), Channel.CLIENT, chance.randbytes(40)),
        frame(Identity(cluster_id, 0, 0, 0), Channel.CATCHUP, b"\x92\x3c\x01"),
        frame(Identity(cluster_id, 3, 1, 1), Channel.STREAM, b"\xc1" * 60),
        bytes(vast),
    ]


async def put_times(driver, name, count):
    """Seconds of each of ``count`` writes, one after another."""
    times = []
    for number in range(count):
        began = time.monotonic()
        await put(driver, f"{name}/{number}", "value")
        times.append(time.monotonic() - began)
    return times


async def dropped(driver) -> dict[int, int]:
    """How many things each voter has counted so far."""
    statuses = await driver.statuses()
    assert all(isinstance(status, Status) for status in statuses.values())
    return {voter: sum(status.counters.values()) for voter, status in statuses.items()}


async def test_garbage_and_half_open_connections_at_every_port_are_harmless(tmp_path):
    chance = random.Random(7)
    with LocalCluster(tmp_path, 3) as cluster, ExitStack() as held:
        cluster.start_voters()
        listener = cluster.start_listener("one")
        listener.wait_for_line("listener.started", 30)
        for voter in cluster.voter_ids:
            cluster.voter(voter).wait_for_line("voter.archive.ready", 30)
        config = config_of(cluster)
        udp = held.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
        async with open_driver(config, cluster.credentials(), deadline_s=30) as driver:
            await put(driver, "ready", "yes")
            quiet = await put_times(driver, "quiet", 60)
            before = await dropped(driver)

            for voter in config.voters:
                for port in (voter.peer_port, voter.client_port, voter.archive_port):
                    for data in garbage(config.cluster_id_bytes, chance):
                        connection = held.enter_context(
                            socket.create_connection((voter.host, port))
                        )
                        connection.sendall(data)
                    for _ in range(HALF_OPEN_EACH):
                        connection = held.enter_context(
                            socket.create_connection((voter.host, port))
                        )
                        whole = frame(Identity(config.cluster_id_bytes), Channel.CLIENT, b"\x00")
                        connection.sendall(whole[: HEADER_BYTES // 2])
            group = config.stream.group
            targets = [(voter.host, voter.peer_port) for voter in config.voters]
            targets += [(group, config.stream.port), (group, config.stream.repair_port)]
            for target in targets:
                for _ in range(GARBAGE_EACH // 10):
                    for data in garbage(config.cluster_id_bytes, chance):
                        udp.sendto(data, target)

            noisy = await put_times(driver, "noisy", 60)
            after = await dropped(driver)
        assert all(cluster.voter(voter).running for voter in cluster.voter_ids)
        assert listener.running
        print(f"median write: {median(quiet) * 1000:.1f} ms before, {median(noisy) * 1000:.1f} ms")
        for voter in cluster.voter_ids:
            assert after[voter] > before[voter] + GARBAGE_EACH, f"voter {voter} counted too little"
