"""The applied side of a voter: sessions and machine at one slot, whatever it was before."""

from __future__ import annotations

from trex_core.messages import Ballot, Genesis, Kind, OutcomeStatus, Value, encode_value
from trex_core.metadata.commands import ConfigPut, encode_command
from trex_core.metadata.state import MetadataMachine
from trex_core.snapshot import decode_snapshot
from trex_core.state import FixedRun, chain_run, chain_start
from voters.replica import Replica

CLUSTER = bytes(range(1, 17))
BALLOT = Ballot(0, 1, 1)
GENESIS = Genesis((1, 2, 3), (7, 8, 9))
OPEN = Value(Kind.OPEN, BALLOT)


def put(session: int, sequence: int, text: str) -> Value:
    command = encode_command(ConfigPut("k", text))
    return Value(Kind.COMMAND, BALLOT, 0, session, sequence, 1, command)


def applied(replica: Replica, *values: Value) -> list[object]:
    """What is told of each slot, when these are fixed next."""
    encoded = tuple(map(encode_value, values))
    first = replica.applied + 1
    run = FixedRun(first, replica.chain, encoded, chain_run(replica.chain, first, encoded))
    return [told for _, _, told in replica.apply(run)]


def new() -> Replica:
    return Replica(MetadataMachine(), chain_start(CLUSTER))


def test_a_replica_put_back_to_a_snapshot_is_at_its_slot_with_all_sessions() -> None:
    one, other = new(), new()
    first = applied(one, OPEN, put(1, 1, "a"), put(1, 2, "b"))[1]
    applied(other, OPEN, OPEN)
    data = b"".join(one.capture(GENESIS).encode())
    other.restore(decode_snapshot(data))
    assert (other.applied, other.chain) == (one.applied, one.chain)
    assert b"".join(other.capture(GENESIS).encode()) == data
    for replica in (one, other):
        again, third, strange = applied(replica, put(1, 1, "x"), put(1, 3, "c"), put(2, 1, "y"))
        assert again == first, "the first result, and not applied"
        assert third is not None and third.status == OutcomeStatus.APPLIED
        assert strange is not None and strange.status == OutcomeStatus.SESSION_EXPIRED
    assert b"".join(one.capture(GENESIS).encode()) == b"".join(other.capture(GENESIS).encode())
