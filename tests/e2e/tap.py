"""A wire-tap on this machine: every datagram to a cluster's ports, and all of them once more.

It needs what root has (CAP_NET_RAW): a raw socket is given a copy of whatever arrives.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Final, NamedTuple, Self

from tests.e2e.adversary import mouth
from trex_core.cluster import ClusterConfig

_SO_ATTACH_FILTER: Final = 26
TURN_S: Final = 0.005
TURN_DATAGRAMS: Final = 10
"""So slow, 2,000 a second, that whoever is spoken to reads all of it."""


class Datagram(NamedTuple):
    """One of a recording. ``data`` is what a socket would have received."""

    host: str
    port: int
    data: bytes


def can_tap() -> bool:
    """May this process listen in?"""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP).close()
    except PermissionError:
        return False
    return True


class Tap:
    """Records what is sent to the datagram ports of ``config`` while its block runs."""

    def __init__(self, config: ClusterConfig) -> None:
        peers = [voter.peer_port for voter in config.voters]
        self._ports = {*peers, config.stream.port, config.stream.repair_port}
        self.recording: list[Datagram] = []
        self._raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._filter(min(self._ports), max(self._ports))
        self._raw.settimeout(0.1)
        self._ending = False
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _filter(self, lowest: int, highest: int) -> None:
        """Other programs' datagrams are not for us: the kernel keeps them from this socket."""
        code = [
            (0xB1, 0, 0, 0),  # X = length of the IP header
            (0x48, 0, 0, 2),  # A = the port it is for
            (0x35, 0, 2, lowest),  # below: drop
            (0x25, 1, 0, highest),  # above: drop
            (0x06, 0, 0, 0xFFFF),
            (0x06, 0, 0, 0),
        ]
        steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
        program = struct.pack("HL", len(code), ctypes.addressof(steps))
        self._raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def _read(self) -> None:
        while not self._ending:
            try:
                packet = self._raw.recv(65_535)
            except TimeoutError:
                continue
            head = (packet[0] & 15) * 4
            port = int.from_bytes(packet[head + 2 : head + 4], "big")
            if port in self._ports:
                host = socket.inet_ntoa(packet[16:20])
                self.recording.append(Datagram(host, port, packet[head + 8 :]))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending = True
        self._thread.join()
        self._raw.close()


class Replay:
    """Says ``recording`` again, in its order, from a thread; once, or for as long as the block
    runs. ``rounds`` is how often it was said whole."""

    def __init__(self, recording: list[Datagram]) -> None:
        self._recording = recording
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._for_ever, daemon=True)
        self.rounds = 0

    def once(self) -> None:
        """All of it; blocking."""
        with mouth() as sender:
            for at in range(0, len(self._recording), TURN_DATAGRAMS):
                until_s = time.monotonic() + TURN_S
                for each in self._recording[at : at + TURN_DATAGRAMS]:
                    sender.sendto(each.data, (each.host, each.port))
                if self._ended.wait(max(0.0, until_s - time.monotonic())):
                    return
        self.rounds += 1

    def _for_ever(self) -> None:
        while not self._ended.is_set():
            self.once()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
