"""Hosts on one machine: this module alone makes network namespaces and breaks the network in them.

Each host is a namespace with one port on a bridge; a second bridge is the other side of a
partition. The namespaces have no names: they live as long as this process, or one in them, holds
them open, so nothing is ever left behind. Linux and its administrator only; :func:`why_not` says
what is missing.

There is neither netem nor a packet filter in every kernel, so faults are made of what there is: a
port moved to the other bridge (a partition), a neighbour's address that nobody has (one direction
between two hosts is lost, silently), a port that multicast is not flooded to. The client's host has
a foot on both sides.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_NEWNET = 0x4000_0000
_NOBODY = "02:00:00:00:00:fe"
_CLIENT_ADDRESS = "02:00:00:00:01:64"
CLIENT = "client"
_libc = ctypes.CDLL(None, use_errno=True)


class NetworkTroubleError(OSError):
    """Namespaces or links cannot be made here; the message says which step failed."""


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise NetworkTroubleError(number, f"{what}: {os.strerror(number)}")


def _here() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _entered(namespace: int) -> Iterator[None]:
    home = _here()
    try:
        _check(_libc.setns(namespace, _NEWNET), "entering a network namespace")
        try:
            yield
        finally:
            _check(_libc.setns(home, _NEWNET), "leaving a network namespace")
    finally:
        os.close(home)


def _made() -> int:
    home = _here()
    try:
        _check(_libc.unshare(_NEWNET), "making a network namespace")
        try:
            return _here()
        finally:
            _check(_libc.setns(home, _NEWNET), "leaving a network namespace")
    finally:
        os.close(home)


def _run(program: str, lines: Iterable[str]) -> None:
    text = "\n".join(lines) + "\n"
    try:
        done = subprocess.run([program, "-batch", "-"], input=text, capture_output=True, text=True)
    except OSError as error:
        raise NetworkTroubleError(error.errno, f"{program}: {error.strerror}") from error
    if done.returncode != 0:
        raise NetworkTroubleError(done.returncode, f"{program}: {done.stderr.strip()} in:\n{text}")


class Hosts:
    """Hosts 10.77.0.1 .. by name, and the client's. A context manager that ends them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = [*names, CLIENT]
        self.address = {name: f"10.77.0.{n}" for n, name in enumerate(self.names, 1)}
        self._spaces: dict[str, int] = {}
        self._hub = -1
        self._poisoned: set[tuple[str, str]] = set()
        self._deaf: set[str] = set()
        self._right: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self._hub = _made()
            with _entered(self._hub):
                _run(
                    "ip",
                    [
                        "link set lo up",
                        *(f"link add {side} type bridge mcast_snooping 0" for side in "LR"),
                        *(f"link set {side} up" for side in "LR"),
                    ],
                )
            for number, name in enumerate(self.names, 1):
                self._spaces[name] = _made()
                self._plug(name, f"h{number}", "eth0", "L")
                with self.inside(name):
                    _run(
                        "ip",
                        [
                            "link set lo up",
                            f"addr add {self.address[name]}/24 dev eth0",
                            "route add 239.0.0.0/8 dev eth0",
                        ],
                    )
            self._plug(CLIENT, "hr", "eth1", "R")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the namespaces; with the last process in one it is gone."""
        for held in (self._hub, *self._spaces.values()):
            if held >= 0:
                os.close(held)
        self._hub, self._spaces = -1, {}

    def _plug(self, name: str, port: str, interface: str, side: str) -> None:
        space = f"/proc/{os.getpid()}/fd/{self._spaces[name]}"
        with _entered(self._hub):
            _run(
                "ip",
                [
                    f"link add {port} type veth peer name {interface} netns {space}",
                    f"link set {port} master {side} up",
                ],
            )
        with self.inside(name):
            own = [f"link set {interface} address {_CLIENT_ADDRESS}"] if name == CLIENT else []
            _run("ip", [*own, f"link set {interface} up"])
            for which in ("all", interface):
                Path(f"/proc/sys/net/ipv4/conf/{which}/rp_filter").write_text("0")

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Sockets opened, and processes started, by this thread in the block are on that host."""
        with _entered(self._spaces[name]):
            yield

    def _port(self, name: str) -> str:
        return f"h{self.names.index(name) + 1}"

    # --- faults -----------------------------------------------------------------------------

    def split(self, right: Iterable[str]) -> None:
        """A partition: ``right`` on one side, all others on the other, the client's TCP on both;
        it hears the multicast of the left."""
        right = set(right)
        moved = dict.fromkeys(right - self._right, "R")
        moved |= dict.fromkeys(self._right - right, "L")
        with _entered(self._hub):
            _run("ip", [f"link set {self._port(name)} master {to}" for name, to in moved.items()])
        routes = []
        for name, to in moved.items():
            host = self.address[name]
            verb = f"add {host}/32 dev eth1 src {self.address[CLIENT]}" if to == "R" else "del"
            routes.append(f"route {verb}" + ("" if to == "R" else f" {host}/32 dev eth1"))
        if routes:
            with self.inside(CLIENT):
                _run("ip", routes)
        self._right = right

    def lose(self, sender: str, receiver: str) -> None:
        """Nothing that ``sender`` says to ``receiver`` alone arrives; multicast does."""
        with self.inside(sender):
            to = self.address[receiver]
            _run("ip", [f"neigh replace {to} lladdr {_NOBODY} dev eth0 nud permanent"])
        self._poisoned.add((sender, receiver))

    def deafen(self, names: Iterable[str]) -> None:
        """No multicast arrives at exactly these hosts."""
        names = set(names)
        with _entered(self._hub):
            lines = [
                f"link set dev {self._port(name)} mcast_flood {'off' if name in names else 'on'}"
                for name in names ^ self._deaf
            ]
            if lines:
                _run("bridge", lines)
        self._deaf = names

    def heal(self) -> None:
        """Undo all of it."""
        self.split(())
        self.deafen(())
        for sender, receiver in sorted(self._poisoned):
            with self.inside(sender):
                _run("ip", [f"neigh del {self.address[receiver]} dev eth0"])
        self._poisoned.clear()


def why_not() -> str:
    """Why there can be no hosts here; "" when there can."""
    try:
        with Hosts(["one", "two"]) as hosts:
            hosts.split(["one"])
            hosts.lose("one", "two")
            hosts.deafen(["two"])
            hosts.heal()
    except OSError as error:
        return f"network namespaces are not permitted here: {error.strerror or error}"
    return ""
