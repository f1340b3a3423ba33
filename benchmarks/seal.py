"""What seals and signatures cost: µs for each datagram, tip and slot, and times the bare cipher.

Run: ``python benchmarks/seal.py``. Prints one JSON line for each figure: the median of processor
time, and its ratio to the floor measured in the same run, on the same bytes and with nothing around
it: the bare cipher, or a signature of OpenSSL (TRex signs with libsodium, which takes about half).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trex_core.messages import NO_BALLOT, StreamRun, StreamTip, VoterDigest
from trex_core.proof import Proof, tip_of
from trex_core.seal import Key, KeyRing, PeerOpener, Sealer, Signer, StreamOpener, Verifier
from trex_core.state import chain_run, chain_start
from trex_core.wire import Channel, Identity, frame, unframe

CLUSTER = bytes(16)
BODY = bytes(520)
"""With its frame a datagram of 600 bytes."""
TIMES = 2_000
ROUNDS = 7


def us_each(prepare: Callable[[], Callable[[], object]], times: int = TIMES) -> float:
    """Median over rounds of the processor time of one call of what ``prepare`` gives, in µs."""
    rounds = []
    for _ in range(ROUNDS):
        run = prepare()
        began = time.process_time()
        for _ in range(times):
            run()
        rounds.append((time.process_time() - began) / times * 1e6)
    return statistics.median(rounds)


def report(what: str, us: float, floor_us: float) -> None:
    """Print one figure."""
    row = {"what": what, "us": round(us, 2), "floor_us": round(floor_us, 2)}
    print(json.dumps({**row, "ratio": round(us / floor_us, 1)}), flush=True)


def opened(make: Callable[[], tuple[Callable[[bytes], object], Sequence[bytes]]]) -> float:
    """µs for opening one datagram, each a new one."""

    def prepare() -> Callable[[], object]:
        opener, datagrams = make()
        following = iter(datagrams)
        return lambda: opener(next(following))

    return us_each(prepare)


def seals() -> None:
    """Datagrams of voters and of the stream."""
    cipher, numbers = AESGCM(bytes(32)), count(1)
    head = bytes(64)
    seal_us = us_each(lambda: lambda: cipher.encrypt(next(numbers).to_bytes(12, "big"), BODY, head))
    sealed = cipher.encrypt(bytes(12), BODY, head)
    open_us = us_each(lambda: lambda: cipher.decrypt(bytes(12), sealed, head))
    who = Identity(CLUSTER, 1, 2, 3)
    ring = KeyRing((Key(1, bytes(32)),))

    def sealer(channel: int) -> Sealer:
        return Sealer(channel, who, ring.first, bytes(32 if channel == Channel.PEER else 4))

    def peers() -> tuple[Callable[[bytes], object], Sequence[bytes]]:
        says, opener = sealer(Channel.PEER), PeerOpener(CLUSTER, ring)
        opener.told(who, 1, bytes(32), 1)
        return opener.open, [says.datagrams(BODY)[0] for _ in range(TIMES)]

    def stream() -> tuple[Callable[[bytes], object], Sequence[bytes]]:
        says = sealer(Channel.STREAM)
        return StreamOpener(CLUSTER, ring).open, [says.datagrams(BODY)[0] for _ in range(TIMES)]

    def plain() -> tuple[Callable[[bytes], object], Sequence[bytes]]:
        data = frame(who, Channel.PEER, BODY)
        return (lambda each: unframe(each, CLUSTER, Channel.PEER)), [data] * TIMES

    says = sealer(Channel.PEER)
    report("frame a datagram, unsealed", us_each(lambda: lambda: frame(who, 1, BODY)), seal_us)
    report("seal a datagram", us_each(lambda: lambda: says.datagrams(BODY)), seal_us)
    report("check a datagram, unsealed", opened(plain), open_us)
    report("open a voter's datagram", opened(peers), open_us)
    report("open a datagram of the stream", opened(stream), open_us)


def signatures() -> None:
    """Tips, and what they prove."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    words = bytes(100)
    signature, public = key.sign(words), key.public_key()
    sign_us = us_each(lambda: lambda: key.sign(words), 500)
    verify_us = us_each(lambda: lambda: public.verify(signature, words), 500)
    signer = Signer(bytes(32), CLUSTER, 1)
    slots = count(1)
    report(
        "sign a tip", us_each(lambda: lambda: signer.tip(NO_BALLOT, next(slots), words[:32]), 500),
        sign_us,
    )  # fmt: skip
    tips = [(n, signer.tip(NO_BALLOT, n, words[:32])) for n in range(500)]

    def verifying() -> Callable[[], object]:
        verifier, following = Verifier({1: signer.public}, CLUSTER), iter(tips)

        def verify() -> None:
            slot, signed = next(following)
            assert verifier.tip(1, NO_BALLOT, slot, words[:32], signed)

        return verify

    report("verify a tip", us_each(verifying, 500), verify_us)
    for per_datagram in (1, 10):
        prove(per_datagram, verify_us)


def prove(per_datagram: int, verify_us: float) -> None:
    """A batch of datagrams that one tip covers: µs for each slot, against one signature."""
    values = tuple(bytes(100) for _ in range(100))
    before = chain_start(CLUSTER)
    chains = (before, *chain_run(before, 1, values))
    signer = Signer(bytes(32), CLUSTER, 1)
    signed = signer.tip(NO_BALLOT, 100, chains[100])
    runs = [
        (
            1,
            StreamRun(
                NO_BALLOT, first + 1, chains[first], values[first : first + per_datagram], 100,
                chains[100], False, 1, signed,
            ),
        )
        for first in range(0, 100, per_datagram)
    ]  # fmt: skip
    digest = VoterDigest("leader", NO_BALLOT, 0, 0, 0, 0, 0, 0, "bench")
    tip = StreamTip(NO_BALLOT, True, 100, chains[100], digest, 1, signed)

    def proving() -> Callable[[], object]:
        def prove_all() -> None:
            proof = Proof(Verifier({1: signer.public}, CLUSTER).tip, lambda _: None)
            assert proof.tip(tip_of(tip))
            believed = proof.proven(runs, [(100, chains[100])])
            assert sum(len(run.values) for _, run in believed) == 100

        return prove_all

    us = us_each(proving, 20) / 100
    report(f"prove a slot, {per_datagram} a datagram, 100 a tip", us, verify_us / 100)


if __name__ == "__main__":
    seals()
    signatures()
