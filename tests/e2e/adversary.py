"""Somebody who stole a listener's folder: a program that says on the cluster's ports whatever the
stream key allows, at a bounded rate, until SIGTERM.

``python -m tests.e2e.adversary CLUSTER_FILE FOLDER DATAGRAMS_PER_S SEED``. It prints
``adversary.begun PORT`` (the port it sends from) once it has heard each voter and a run, and at
the end ``adversary.ended`` with how many of each kind it sent. It hears what a listener hears, and
takes from it what makes a forgery good: each voter's incarnation, boot, salt and next number, so
that its datagrams are under the very sub-key and nonce of a genuine one; chains, signatures, names.
"""

from __future__ import annotations

import json
import random
import select
import signal
import socket
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from trex_core.cluster import ClusterConfig, parse_cluster
from trex_core.credentials import KEYS_FILE, parse_keys
from trex_core.messages import (
    CHAIN_BYTES,
    DATAGRAM_BYTES_MAX,
    PEER_DATAGRAMS_MAX,
    WORDS_BYTES,
    Ballot,
    Heartbeat,
    Kind,
    ListenerReport,
    Prepare,
    RepairRequest,
    StreamMessage,
    StreamRun,
    StreamTip,
    Tip,
    Value,
    encode_value,
)
from trex_core.metadata.commands import ConfigPut, encode_command
from trex_core.seal import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    STREAM_SALT_BYTES,
    Sealer,
    Signer,
    StreamOpener,
    Verifier,
)
from trex_core.state import chain_run
from trex_core.wire import Channel, Frame, FrameError, Identity, decode_stream, encode_body

TURN_S: Final = 0.01
FORGED_KEY: Final = "forged"
HEARD_MAX: Final = 64
NAMES: Final = 4_000
FAR: Final = 1 << 40


def group_socket(config: ClusterConfig, port: int) -> socket.socket:
    """A socket that hears the cluster's group at ``port``."""
    heard = socket.socket(type=socket.SOCK_DGRAM)
    heard.setblocking(False)
    heard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    heard.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    heard.bind((config.stream.group, port))
    member = socket.inet_aton(config.stream.group) + socket.inet_aton("127.0.0.1")
    heard.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
    return heard


def mouth() -> socket.socket:
    """A socket that multicasts on this machine only."""
    sender = socket.socket(type=socket.SOCK_DGRAM)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
    sender.bind(("127.0.0.1", 0))
    return sender


class Adversary:
    """What it knows, and all it can say."""

    def __init__(self, config: ClusterConfig, folder: Path, seed: int) -> None:
        self.config = config
        self.draw = random.Random(seed)
        self.keys = parse_keys((folder / KEYS_FILE).read_text())
        assert self.keys.stream is not None and self.keys.voter is None and not self.keys.signing
        self.key = self.keys.stream.first
        self.id = config.cluster_id_bytes
        self.opener = StreamOpener(self.id, self.keys.stream)
        self.verifier = Verifier(self.keys.public, self.id)
        self.own = Sealer(
            Channel.STREAM, Identity(self.id), self.key, self.draw.randbytes(STREAM_SALT_BYTES)
        )
        self.heads: dict[int, Frame] = {}
        self.runs: deque[StreamRun] = deque(maxlen=HEARD_MAX)
        self.tips: deque[tuple[int, StreamTip]] = deque(maxlen=HEARD_MAX)
        self.reports: dict[str, ListenerReport] = {}
        self.signers = [
            Signer(self.draw.randbytes(KEY_BYTES), self.id, voter) for voter in config.voter_ids
        ]
        self.said: Counter[str] = Counter()
        self.sender = mouth()
        self.port = self.sender.getsockname()[1]
        self.ears = [
            group_socket(config, port) for port in (config.stream.port, config.stream.repair_port)
        ]

    # --- what it hears ----------------------------------------------------------------------

    def listen(self, until_s: float) -> None:
        while (left_s := until_s - time.monotonic()) > 0:
            ready, _, _ = select.select(self.ears, [], [], left_s)
            for ear in ready:
                self._hear(ear)

    def _hear(self, ear: socket.socket) -> None:
        for _ in range(1024):
            try:
                data, (_, port) = ear.recvfrom(DATAGRAM_BYTES_MAX + 1)
            except BlockingIOError:
                return
            if port == self.port:
                continue
            try:
                whole = self.opener.open(data)
                message = decode_stream(whole.body)
            except FrameError:
                continue
            if whole.sender:
                self.heads[whole.sender] = whole
            match message:
                case StreamRun():
                    self.runs.append(message)
                case StreamTip():
                    self.tips.append((whole.sender, message))
                case ListenerReport():
                    self.reports[message.name] = message

    @property
    def knows_enough(self) -> bool:
        return len(self.heads) == len(self.config.voters) and bool(self.runs and self.tips)

    # --- what it says -----------------------------------------------------------------------

    def as_voter(self, voter: int) -> Sealer:
        """Seals under the sub-key of a voter's run; its next number is that of the voter's next."""
        head = self.heads[voter]
        identity = Identity(self.id, voter, head.incarnation, head.boot)
        sealer = Sealer(Channel.STREAM, identity, self.key, head.salt.to_bytes(4, "big"))
        sealer.counter = head.counter + 1
        return sealer

    def somebody(self) -> int:
        return self.draw.choice(self.config.voter_ids)

    def stream(self, message: StreamMessage, voter: int | None = None) -> None:
        """On the stream's port, as a voter."""
        sealer = self.as_voter(voter or self.somebody())
        (data,) = sealer.datagrams(encode_body(message))
        self.sender.sendto(data, (self.config.stream.group, self.config.stream.port))

    def ask(self, message: StreamMessage) -> None:
        """On the repair port, as a listener."""
        (data,) = self.own.datagrams(encode_body(message))
        self.sender.sendto(data, (self.config.stream.group, self.config.stream.repair_port))

    def value(self) -> bytes:
        command = encode_command(ConfigPut(f"{FORGED_KEY}/{self.draw.randrange(100)}", "evil"))
        ballot = self.runs[-1].ballot
        return encode_value(Value(Kind.COMMAND, ballot, 1_700_000_000_000, 2, 1 << 30, 1, command))

    def signer(self) -> Signer:
        """Its own, with which it says it is a voter."""
        return self.draw.choice(self.signers)

    def run_signed_by_itself(self) -> None:
        """Continues the genuine chain where nothing is fixed yet, in all but the key."""
        last = self.runs[-1]
        values = tuple(self.value() for _ in range(self.draw.randrange(1, 4)))
        first = last.tip_slot + 1
        chain = chain_run(last.tip_chain, first, values)[-1]
        tip = first + len(values) - 1
        voter = self.somebody()
        self.stream(
            StreamRun(
                last.ballot, first, last.tip_chain, values, tip, chain,
                self.draw.random() < 0.5, voter, self.signer().tip(last.ballot, tip, chain),
            ),
            voter,
        )  # fmt: skip

    def run_elsewhere(self) -> None:
        """Slots far ahead or long ago, on a chain of its own: they wait for a proof."""
        last = self.runs[-1]
        first = max(1, last.tip_slot + self.draw.randrange(-50, 5_000))
        values = (self.value(),)
        self.stream(
            StreamRun(
                last.ballot, first, self.draw.randbytes(CHAIN_BYTES), values, first + FAR,
                self.draw.randbytes(CHAIN_BYTES), self.draw.random() < 0.5, self.somebody(),
                self.draw.randbytes(SIGNATURE_BYTES),
            )
        )  # fmt: skip

    def run_under_a_copied_signature(self) -> None:
        """The tip and its signature are genuine, what is said to lead there is not."""
        genuine = self.draw.choice(self.runs)
        values = tuple(self.value() for _ in genuine.values)
        before = self.draw.choice([genuine.chain_before, self.draw.randbytes(CHAIN_BYTES)])
        repair = self.draw.random() < 0.5
        self.stream(replace(genuine, values=values, chain_before=before, repair=repair))

    def run_with_one_more(self) -> None:
        """A genuine run that goes on with a value of its own, the tip raised or not."""
        genuine = self.runs[-1]
        values = (*genuine.values[:2], self.value())
        tip = max(genuine.tip_slot, genuine.first + 2) + self.draw.choice([0, 1, FAR])
        self.stream(replace(genuine, values=values, tip_slot=tip))

    def run_by_another(self) -> None:
        """Genuine values once more, said by another voter under another ballot."""
        genuine = self.draw.choice(self.runs)
        voter = self.somebody()
        ballot = Ballot(0, genuine.ballot.round + 7, voter)
        self.stream(replace(genuine, ballot=ballot, repair=False, signer=voter), voter)

    def tip_forged(self) -> None:
        """Heartbeats that say too much, signed by nobody or by the wrong key."""
        voter, genuine = self.draw.choice(self.tips)
        digest = genuine.digest
        kinds = (
            {"tip_slot": genuine.tip_slot + FAR},
            {"tip_slot": genuine.tip_slot, "tip_chain": self.draw.randbytes(CHAIN_BYTES)},
            {"leading": not genuine.leading},
            {"ballot": Ballot(0, genuine.ballot.round + 99, self.somebody())},
            {"digest": replace(digest, boot=digest.boot + 1, uptime_s=FAR, role="leader")},
            {"signer": self.somebody(), "digest": replace(digest, uptime_s=FAR)},
        )
        tip = replace(genuine, **self.draw.choice(kinds))
        if self.draw.random() < 0.5:
            signer = self.signer()
            signed = signer.tip(tip.ballot, tip.tip_slot, tip.tip_chain)
            tip = replace(tip, signature=signed, words=bytes(SIGNATURE_BYTES))
            tip = replace(tip, words=signer.words(encode_body(tip)[:-WORDS_BYTES]))
        self.stream(tip, self.draw.choice([voter, self.somebody()]))

    def tip_replayed(self) -> None:
        """A genuine heartbeat once more."""
        voter, genuine = self.draw.choice(self.tips)
        self.stream(genuine, voter)

    def request(self) -> None:
        """For repairs: everything, a little, or nonsense, of every voter."""
        tip = self.runs[-1].tip_slot
        first = self.draw.choice([1, max(1, tip - 1000), self.draw.randrange(1, tip + 2)])
        last = self.draw.choice([first, first + self.draw.randrange(300), tip, FAR])
        self.ask(RepairRequest(f"n{self.draw.randrange(NAMES)}", self.somebody(), first, last))

    def report(self) -> None:
        """Of listeners that are not there, and leaving words of those that are."""
        if self.reports and self.draw.random() < 0.01:
            told = self.draw.choice(list(self.reports.values()))
            self.ask(replace(told, leaving=True))
            return
        number = self.draw.randrange(NAMES)
        self.ask(
            ListenerReport(
                f"nobody-{number}", number, 0, 0, FAR, 1 << 30, False, 9, 9, 9, 9, 9, "evil"
            )
        )

    def part_of_nothing(self) -> None:
        """The first part of a message of several, the rest of which never comes."""
        sealer = self.as_voter(self.somebody())
        sealer.counter = self.draw.randrange(1 << 40)
        port = self.draw.choice([self.config.stream.port, self.config.stream.repair_port])
        parts = self.draw.randrange(2, PEER_DATAGRAMS_MAX + 1)
        for data in sealer.datagrams(bytes(1320 * parts - 8))[:1]:
            self.sender.sendto(data, (self.config.stream.group, port))

    def peer(self) -> None:
        """To a voter, as another one: what would unseat a leader, if it opened."""
        entry = self.draw.choice(self.config.voters)
        voter = self.draw.choice([each for each in self.config.voter_ids if each != entry.id])
        head, last = self.heads[voter], self.runs[-1]
        identity = Identity(self.id, voter, head.incarnation, head.boot)
        high = Ballot(0, last.ballot.round + 1_000, voter)
        message = self.draw.choice(
            [
                Prepare(high, last.tip_slot + 1),
                Heartbeat(high, 1, Tip(last.tip_slot, last.tip_chain, 1), 0),
            ]
        )
        channel = self.draw.choice([Channel.PEER, Channel.PEER, Channel.STREAM])
        salt = self.draw.randbytes(KEY_BYTES if channel == Channel.PEER else 4)
        sealer = Sealer(channel, identity, self.key, salt)
        sealer.counter = self.draw.randrange(1 << 40, 1 << 41)  # a window that moved would show
        for data in sealer.datagrams(encode_body(message)):
            self.sender.sendto(data, (entry.host, entry.peer_port))

    def attack(self, count: int) -> None:
        """Say ``count`` things."""
        for _ in range(count):
            what = self.draw.choice(ATTACKS)
            what(self)
            self.said[what.__name__] += 1


ATTACKS: Final = (
    Adversary.run_signed_by_itself,
    Adversary.run_elsewhere,
    Adversary.run_under_a_copied_signature,
    Adversary.run_with_one_more,
    Adversary.run_by_another,
    Adversary.tip_forged,
    Adversary.tip_replayed,
    Adversary.request,
    Adversary.report,
    Adversary.part_of_nothing,
    Adversary.peer,
)


def main() -> None:
    config_path, folder, per_s, seed = sys.argv[1:]
    one = Adversary(parse_cluster(Path(config_path).read_text()), Path(folder), int(seed))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    deadline_s = time.monotonic() + 30
    while not one.knows_enough:
        assert time.monotonic() < deadline_s, "it did not hear each voter and a run"
        one.listen(time.monotonic() + TURN_S)
    print(f"adversary.begun {one.port}", flush=True)
    began_s = time.monotonic()
    sent, at_most = 0, int(int(per_s) * TURN_S) * 4
    try:
        while True:
            due = int((time.monotonic() - began_s) * int(per_s))
            count = min(due - sent, at_most)
            one.attack(count)
            sent = due
            one.listen(time.monotonic() + TURN_S)
    finally:
        seconds = time.monotonic() - began_s
        print(f"adversary.ended {seconds:.3f} {json.dumps(one.said)}", flush=True)


if __name__ == "__main__":
    main()
