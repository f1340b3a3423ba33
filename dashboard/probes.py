"""What ``trex doctor`` finds out, and how: this module alone does its input and output.

It asks every voter over TCP, listens to the stream as a listener without a store, and looks at this
machine, all at the same time and each within its bound.  What it means is ``doctor``'s.  It leaves
nothing behind: the file whose syncs are timed has no name, the datagram sent to the group goes to a
port that only we listen to.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import resource
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import msgspec

from dashboard.doctor import Evidence, Here, Place, Reply
from dashboard.view import Clock, Opened, Reported, Tipped, View, reduce
from listeners.catchup import CatchupClient, CatchupError
from listeners.credentials import Credentials
from listeners.source import (
    RECEIVE_BUFFER_BYTES,
    Source,
    drop_from_environment,
)
from listeners.trust import Trust
from trex_core.cluster import ClusterConfig, ConfigError, VoterEntry
from trex_core.messages import ListenerReport, RepairRequest, StreamMessage, StreamRun, StreamTip
from voters.config import voter_paths
from voters.driver import Driver, TrexError

NAME: Final = "doctor"
STATUS_S: Final = 1.5
"""How long a voter may take to tell its status."""
PROBE_S: Final = 2.0
"""How long looking at this machine may take: a disk that hangs is not waited for longer."""
SYNCS: Final = 32
SYNC_BYTES: Final = 512
SYNCING_S: Final = 0.3
"""No sync is begun after that long: a slow disk is not burdened further."""

_TIME_ERROR: Final = 5
_SO_RCVBUFFORCE: Final = 33
_T = TypeVar("_T")


async def gather(
    cluster: ClusterConfig,
    credentials: Path,
    source: str,
    base: Path,
    directory: Path | None,
    listen_s: float,
) -> Evidence:
    """All that ``doctor`` judges, after ``listen_s`` seconds or a little more. Never raises for
    what is wrong with the cluster or this machine: that is what it reports."""
    held = Credentials(credentials, cluster.cluster_id_bytes)
    ear = _Ear(cluster, held)
    replies: dict[int, Reply] = {}
    answered: dict[int, int] = {}
    places: list[Place] = []
    here: list[Here] = []

    async def ask(voter: int) -> None:
        address = await _resolved(cluster.voter(voter))
        if address is None:
            host = cluster.voter(voter).host
            replies[voter] = Reply(voter, None, 0, f"the name {host} is not known here")
            return
        there = _moved(cluster, voter, address)
        driver = Driver(there, credentials)
        began_s = time.monotonic()
        status, why = None, ""
        try:
            status = await driver.status(voter, STATUS_S)
        except TrexError as error:
            why = _reason(error, voter)
        took_s = time.monotonic() - began_s
        if status is not None and status.time_ms:  # told half way, more or less
            answered[voter] = status.time_ms - int((time.time() - took_s / 2) * 1000)
        archive = ""
        if status is not None and await _ask_archive(there, held, voter, status.fixed + 1):
            await anyio.sleep_until(ends_s)  # its process may just be starting: once more
            archive = await _ask_archive(there, held, voter, status.fixed + 1)
        replies[voter] = Reply(voter, status, int(took_s * 1000), why, archive)

    async def look() -> None:
        drops = _udp_drops()
        here.append(await _apart(lambda: _here(cluster), Here(version("trex-paxos"))))
        await anyio.sleep_until(ends_s)
        before, after = drops, _udp_drops()
        if before is not None and after is not None:
            here.append(msgspec.structs.replace(here.pop(), drops=after - before))

    async def measure() -> None:
        directories = _directories(cluster, base, directory)
        await _apart(lambda: _measure(directories, places), None)
        hung = f"the disk did not answer in {PROBE_S:g} s"
        for subject, where in directories[len(places) :]:
            places.append(Place(subject, str(where), trouble=hung))

    ends_s = anyio.current_time() + listen_s
    async with anyio.create_task_group() as group:
        group.start_soon(ear.listen, listen_s)
        for voter in cluster.voter_ids:
            group.start_soon(ask, voter)
        group.start_soon(look)
        group.start_soon(measure)
    return Evidence(
        cluster=cluster,
        source=source,
        view=ear.view(),
        listened_ms=int(listen_s * 1000),
        replies=tuple(replies[voter] for voter in cluster.voter_ids),
        offsets_ms={**ear.offsets_ms, **answered},
        places=tuple(places),
        here=msgspec.structs.replace(here[0], trouble=ear.trouble),
        now_s=int(time.time()),
        certificate_until_s=held.holder.not_after_s,
    )


async def _resolved(entry: VoterEntry) -> str | None:
    """The address of a voter's host; None if its name is not known within PROBE_S. Whoever opens a
    connection by name waits for the name service as long as that pleases."""
    try:
        return str(ipaddress.ip_address(entry.host))
    except ValueError:
        pass

    def look_up() -> str | None:
        try:
            found = socket.getaddrinfo(entry.host, entry.client_port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return None
        return str(found[0][4][0])

    return await _apart(look_up, None)


def _moved(cluster: ClusterConfig, voter: int, address: str) -> ClusterConfig:
    """``cluster`` with ``voter`` at ``address``."""
    voters = tuple(
        msgspec.structs.replace(each, host=address) if each.id == voter else each
        for each in cluster.voters
    )
    return msgspec.structs.replace(cluster, voters=voters)


async def _ask_archive(
    cluster: ClusterConfig, credentials: Credentials, voter: int, first: int
) -> str:
    """Ask a voter's archive for what it cannot have yet; why it did not answer, "" if it did."""
    counters: Counter[str] = Counter()
    trust = Trust(cluster, credentials, counters)
    client = CatchupClient(cluster, credentials, NAME, counters, None, trust)
    try:
        with anyio.fail_after(STATUS_S):
            await client.entries(voter, first)
    except CatchupError as error:
        return error.reason
    except TimeoutError:
        return f"no answer in {STATUS_S:g} s"
    finally:
        with anyio.CancelScope(shield=True):
            await client.aclose()
    return ""


def _reason(error: TrexError, voter: int) -> str:
    """Why a voter did not answer, in a few words."""
    text = str(error).removeprefix(f"voter {voter}").lstrip(": ")
    return text.split(";")[0].split("\n")[0]


async def _apart(work: Callable[[], _T], otherwise: _T) -> _T:
    """``work`` in a thread that nobody waits for longer than PROBE_S: what hangs in the kernel
    cannot be interrupted, and must not keep the process either."""
    done = anyio.Event()
    token = anyio.lowlevel.current_token()
    found: list[_T] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception:  # noqa: BLE001, S110 - what cannot be found out is told as `otherwise`
            pass
        try:
            anyio.from_thread.run_sync(done.set, token=token)
        except RuntimeError:
            pass  # the loop has ended meanwhile

    threading.Thread(target=run, name="probe", daemon=True).start()
    with anyio.move_on_after(PROBE_S):
        await done.wait()
    return found[0] if found else otherwise


# --- listening ----------------------------------------------------------------------------------


class _Ear:
    """Hears the stream and makes a view of it. It follows no slots: a doctor is no listener, asks
    no archive for what is past and reports nothing of itself."""

    def __init__(self, cluster: ClusterConfig, credentials: Credentials) -> None:
        self._cluster = cluster
        self._credentials = credentials
        self._since_ms = int(time.time() * 1000)
        self._since_s = time.monotonic()
        timing = cluster.timing
        election_ms = timing.tick_ms * timing.election_ticks_max
        self._view = reduce(
            View(), Opened(self._since_ms, cluster.name, cluster.voter_ids, election_ms, "live")
        )
        self.offsets_ms: dict[int, int] = {}
        self.trouble = ""

    def _now_ms(self) -> int:
        return self._since_ms + int((time.monotonic() - self._since_s) * 1000)

    async def listen(self, listen_s: float) -> None:
        """Hear what comes for so long."""
        try:
            keep = drop_from_environment(NAME)
            source = Source(self._cluster, self._credentials, Counter(), keep=keep)
        except (OSError, ConfigError) as error:
            self.trouble = getattr(error, "strerror", None) or str(error)
            return
        with closing(source):
            until_s = anyio.current_time() + listen_s
            while anyio.current_time() < until_s:
                await source.wait(until_s)
                while (heard := source.take()) is not None:
                    self._take(*heard)

    def _take(self, voter: int, message: StreamMessage) -> None:
        now_ms = self._now_ms()
        match message:
            case StreamTip():
                self._view = reduce(self._view, Tipped(now_ms, voter, message))
                self._compare(voter, message.digest.time_ms, now_ms)
            case ListenerReport():
                self._view = reduce(self._view, Reported(now_ms, message))
            case StreamRun() | RepairRequest():
                pass  # a heartbeat follows, and says how far it goes

    def _compare(self, voter: int, time_ms: int, now_ms: int) -> None:
        """A heartbeat was sent before it came: the largest difference of the clocks that is seen
        is the nearest to the true one."""
        if time_ms:
            ahead_ms = time_ms - now_ms
            self.offsets_ms[voter] = max(ahead_ms, self.offsets_ms.get(voter, ahead_ms))

    def view(self) -> View:
        """What was heard, as of now."""
        return reduce(self._view, Clock(self._now_ms()))


# --- this machine ---------------------------------------------------------------------------------


def _here(cluster: ClusterConfig) -> Here:
    granted = _buffer_bytes()
    return Here(
        version=version("trex-paxos"),
        looped=_looped(cluster),
        buffer_bytes=granted,
        buffer_wanted=RECEIVE_BUFFER_BYTES,
        synchronised=_synchronised(),
        files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        optimized=sys.flags.optimize > 0,
    )


def _buffer_bytes() -> int:
    """What the kernel grants a listener's socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except OSError:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        return probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2


def _looped(cluster: ClusterConfig) -> bool | None:
    """Whether a datagram sent to the group comes back. It goes to a port of our own, so nobody else
    is bothered; None if the sockets are refused."""
    stream = cluster.stream
    try:
        interface = socket.inet_aton(stream.interface)
        member = struct.pack("4s4s", socket.inet_aton(stream.group), interface)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((stream.group, 0))
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, stream.ttl)
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            probe.settimeout(0.5)
            mark = os.urandom(16)
            for _ in range(3):
                probe.sendto(mark, (stream.group, probe.getsockname()[1]))
                try:
                    if probe.recv(64) == mark:
                        return True
                except TimeoutError:
                    continue
            return False
    except OSError:
        return None


def _synchronised() -> bool | None:
    """Whether the kernel says that something keeps its clock right; None where it cannot say."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def _udp_drops() -> int | None:
    """Datagrams this machine dropped since its start because a receive buffer was full."""
    try:
        lines = Path("/proc/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("Udp:"))
        return int(values[names.index("RcvbufErrors")])
    except (OSError, ValueError, IndexError):
        return None


def _directories(
    cluster: ClusterConfig, base: Path, directory: Path | None
) -> list[tuple[str, Path]]:
    """The directories to look at: the one named, and those of voters that live here."""
    found = [] if directory is None else [("here", directory)]
    for entry in cluster.voters:
        if _is_local(entry.host):
            paths = voter_paths(cluster, entry.id, base)
            if paths.directory.is_dir():
                where = paths.journal if entry.journal_directory else paths.directory
                found.append((f"voter {entry.id}", where))
    return found


def _is_local(host: str) -> bool:
    """Whether an address literal is one of this machine. A name is not looked up: that may hang."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", socket.gethostname())
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
        return True
    except OSError:
        return False


def _measure(directories: list[tuple[str, Path]], places: list[Place]) -> None:
    """Look at each directory in turn, at each disk once."""
    known: dict[int, Place] = {}
    for subject, where in directories:
        try:
            disk = where.stat().st_dev
        except OSError as error:
            places.append(Place(subject, str(where), trouble=error.strerror or str(error)))
            continue
        if disk not in known or known[disk].trouble:
            known[disk] = _place(subject, where)
        places.append(msgspec.structs.replace(known[disk], subject=subject, directory=str(where)))


def _place(subject: str, directory: Path) -> Place:
    """Room and speed of the disk of ``directory``."""
    try:
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        return Place(subject, str(directory), trouble=error.strerror or str(error))
    try:
        took_us = sorted(_sync_times_us(directory))
    except OSError as error:
        why = f"its speed was not measured: {error.strerror or error}"
        return Place(subject, str(directory), free_bytes, trouble=why)
    p50, p99 = took_us[len(took_us) // 2], took_us[-1 - len(took_us) // 100]
    return Place(subject, str(directory), free_bytes, p50, p99)


def _sync_times_us(directory: Path) -> list[int]:
    """How long syncs of SYNC_BYTES take in a preallocated file without a name, in microseconds."""
    took_us: list[int] = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        file.write(bytes(SYNCS * SYNC_BYTES))
        os.fsync(file.fileno())
        began_s = time.monotonic()
        for number in range(SYNCS):
            os.pwrite(file.fileno(), os.urandom(SYNC_BYTES), number * SYNC_BYTES)
            since_ns = time.perf_counter_ns()
            os.fdatasync(file.fileno())
            took_us.append((time.perf_counter_ns() - since_ns) // 1000)
            if time.monotonic() - began_s > SYNCING_S:
                break
    return took_us
