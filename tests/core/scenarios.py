"""The notation of ``tests/scenarios/*.json``: one step of one voter, in words.

A case is ``given`` (the voter's state), ``when`` (one event), and the *exact* multiset of what
follows: ``records``, ``sends``, ``fixed``, and the named fields of the state ``then``. Anything
that is not named in ``records``, ``sends`` or ``fixed`` and happens nevertheless fails the case.

Notation: a ballot is "round.voter" (era 0) or "era:round.voter"; a value is a name ("a" is a
command, "noop" a no-op of ballot 6.2, "genesis" slot 1's value); a chain is "@10" (at the given
fixed slot), "@9" (before it) or "@10+a+b" (extended by those values); a message or record is a
list: its class, then its fields in order. Voter 2 of voters 1, 2, 3 takes the step unless the case
says otherwise.
"""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from trex_core import messages, state
from trex_core.invariants import check_step
from trex_core.messages import Ballot, Genesis, Kind, Pairs, Tip, Value, encode_value
from trex_core.paxos import step
from trex_core.state import (
    Ack,
    Candidate,
    Chase,
    Config,
    Flight,
    Follower,
    Leader,
    Part,
    Polling,
    Run,
    State,
    chain_next,
    chain_start,
)

CLUSTER_ID = b"scenario-cluster"
NAMES = ("a", "b", "c", "d")


def ballot(text: str) -> Ballot:
    """ "5.1" or "era:5.1"."""
    era, _, rest = text.rpartition(":")
    round_, voter = rest.split(".")
    return Ballot(int(era or 0), int(round_), int(voter))


def ballot_text(value: Ballot) -> str:
    era = f"{value.era}:" if value.era else ""
    return f"{era}{value.round}.{value.voter}"


class Notation:
    """Names of the values and chains of one case."""

    def __init__(self, voters: tuple[int, ...], fixed: int) -> None:
        self.voters = voters
        genesis = Genesis(voters, tuple(100 + voter for voter in voters))
        self.genesis = genesis
        encoded = msgspec.msgpack.encode(genesis)
        self.values: dict[str, bytes] = {
            name: encode_value(Value(Kind.COMMAND, Ballot(0, 1, 1), command=name.encode()))
            for name in NAMES
        }
        self.values["noop"] = encode_value(Value(Kind.NOOP, ballot("6.2")))
        self.values["genesis"] = encode_value(Value(Kind.GENESIS, ballot("6.2"), command=encoded))
        self.value_names = {value: name for name, value in self.values.items()}
        base = before = chain_start(CLUSTER_ID)
        for slot in range(1, fixed + 1):
            before = base
            base = chain_next(base, slot, self.values["genesis" if slot == 1 else "a"])
        self.base = f"@{fixed}"
        self.chains = {f"@{fixed - 1}": before, self.base: base}
        names = [*NAMES[:3], "noop", *(("genesis",) if fixed == 0 else ())]
        for length in (1, 2, 3):
            for word in itertools.product(names, repeat=length):
                before = self.chains[self.base + "".join(f"+{n}" for n in word[:-1])]
                text = self.base + "".join(f"+{n}" for n in word)
                value = self.values[word[-1]]
                self.chains[text] = chain_next(before, fixed + length, value)
        self.chains["other"] = b"\xff" * 32
        self.chain_names = {chain: name for name, chain in self.chains.items()}

    # --- text -> values ---------------------------------------------------------------------

    def build(self, kind: str, fields: list[Any]) -> Any:
        """An instance of the class called ``kind`` from its fields in order."""
        cls = getattr(messages, kind, None) or getattr(state, kind)
        names = cls.__struct_fields__
        return cls(**{n: self.field(n, v) for n, v in zip(names, fields, strict=False)})

    def field(self, name: str, value: Any) -> Any:
        match name:
            case "ballot" | "promised" | "accepted_at" | "highest" | "leader":
                return ballot(value)
            case "values":
                return tuple(self.values[v] for v in value)
            case "chain" | "chain_before":
                return self.chains[value]
            case "tip":
                return Tip(value[0], self.chains[value[1]], value[2])
            case "accepted" | "wanted":
                return tuple(Pairs(a, b, ballot(c)) for a, b, c in value)
            case "genesis":
                return self.genesis
            case "message":
                return self.build(value[0], value[1:])
            case _:
                return tuple(value) if isinstance(value, list) else value

    def role(self, text: Any) -> state.Role:
        """ "follower", or {"polling" | "candidate" | "leader": its fields}."""
        if text == "follower":
            return Follower()
        ((kind, given),) = text.items()
        if kind == "polling":
            answers = tuple((v, h) for v, h in given["answers"])
            return Polling(given["attempt"], answers, ballot(given.get("highest", "0.0")))
        own = ballot(given["ballot"])
        if kind == "candidate":
            plan = given.get("plan")
            return Candidate(
                ballot=own,
                first=given["first"],
                since_tick=given.get("since_tick", 100),
                parts=tuple(
                    Part(
                        voter,
                        100 + voter,
                        tuple((a, b) for a, b in covered),
                        tuple((a, b, ballot(c)) for a, b, c in runs),
                    )
                    for voter, covered, runs in given.get("parts", [])
                ),
                silent=tuple(given.get("silent", ())),
                plan=None if plan is None else tuple((a, b, ballot(c)) for a, b, c in plan),
                fetched=tuple(
                    Run(first, ballot(at), tuple(self.values[v] for v in values))
                    for first, at, values in given.get("fetched", [])
                ),
                fetch_tick=given.get("fetch_tick", 100),
            )
        assert kind == "leader"
        return Leader(
            ballot=own,
            first=given.get("first", 1),
            next_slot=given["next_slot"],
            counted=given.get("counted", 1),
            flights=tuple(
                Flight(first, last, tuple(votes), given.get("sent_tick", 99), 1)
                for first, last, votes in given.get("flights", [])
            ),
            beat=given.get("beat", 1),
            beat_ticks=tuple((b, t) for b, t in given.get("beat_ticks", [[1, 99]])),
            acks=tuple(
                Ack(v, beat, fixed, last, True, 99)
                for v, beat, fixed, last in given.get("acks", [])
            ),
            beat_acked=given.get("beat_acked", 0),
            quorum_tick=given.get("quorum_tick", 99),
            since_tick=given.get("since_tick", 50),
            announced=given.get("announced", 10),
            handover=None if "handover" not in given else tuple(given["handover"]),
        )

    def state(self, given: dict[str, Any], fixed: int) -> State:
        chase = given.get("chase")
        return State(
            promised=ballot(given.get("promised", "5.1")),
            fixed=fixed,
            chain=self.chains[self.base],
            accepted=tuple(
                Run(first, ballot(at), tuple(self.values[v] for v in values))
                for first, at, values in given.get("accepted", [])
            ),
            genesis=self.genesis if fixed > 0 else None,
            role=self.role(given.get("role", "follower")),
            tick=given.get("tick", 100),
            leader=ballot(given.get("leader", "0.0")),
            heard_tick=given.get("heard_tick", 0),
            deadline=given.get("deadline", 1000),
            attempt=given.get("attempt", 0),
            boots=tuple((v, b) for v, b in given.get("boots", [])),
            chase=None if chase is None else Chase(*chase),
            has_room=given.get("has_room", True),
            chain_marks=tuple((n, self.chains[c]) for n, c in given.get("chain_marks", [])),
            chain_reports=tuple(
                (v, n, self.chains[c]) for v, n, c in given.get("chain_reports", [])
            ),
        )

    def event(self, when: dict[str, Any]) -> state.Event:
        """{"from": 1, "Accept": [...]} is a Receive; else the event's class and fields."""
        when = dict(when)
        sender = when.pop("from", None)
        incarnation, boot = when.pop("incarnation", None), when.pop("boot", 1)
        ((kind, fields),) = when.items()
        built = self.build(kind, fields)
        if sender is None:
            event: state.Event = built
            return event
        return state.Receive(
            sender, 100 + sender if incarnation is None else incarnation, boot, built
        )

    # --- values -> text ---------------------------------------------------------------------

    def text(self, value: Any) -> Any:
        match value:
            case Ballot():
                return ballot_text(value)
            case Tip():
                return [value.fixed, self.text(value.chain), value.counted]
            case Pairs():
                return [value.first, value.last, ballot_text(value.ballot)]
            case Genesis():
                return "genesis"
            case bytes():
                return self.value_names.get(value) or self.chain_names.get(value) or value.hex()
            case tuple():
                return [self.text(item) for item in value]
            case msgspec.Struct():
                fields = [self.text(getattr(value, n)) for n in value.__struct_fields__]
                return [type(value).__name__, *fields]
            case _:
                return value

    def then(self, after: State, names: list[str]) -> dict[str, Any]:
        """The named fields of a state: those of State, of its role ("role.next_slot"), and
        "role" itself, as its class in lower case."""
        out: dict[str, Any] = {}
        for name in names:
            if name == "role":
                out[name] = type(after.role).__name__.lower()
            elif name.startswith("role."):
                out[name] = self.text(getattr(after.role, name[5:]))
            elif name == "halted":
                out[name] = bool(after.halted)
            elif name == "accepted":
                out[name] = [
                    [run.first, ballot_text(run.ballot), self.text(run.values)]
                    for run in after.accepted
                ]
            else:
                out[name] = self.text(getattr(after, name))
        return out


def play(case: dict[str, Any]) -> dict[str, Any]:
    """Take the one step of a case; return what followed, in the notation."""
    given = case.get("given", {})
    voters = tuple(given.get("voters", (1, 2, 3)))
    voter = given.get("voter", 2)
    fixed = given.get("fixed", 10)
    notation = Notation(voters, fixed)
    config = Config(voter, voters, 100 + voter, given.get("own_boot", 1))
    before = notation.state(given, fixed)
    event = notation.event(case["when"])
    after, effects = step(config, before, event)
    check_step(config, before, event, after, effects)
    return {
        "records": [notation.text(record) for record in effects.records],
        "sends": sorted(
            ([send.to, *notation.text(send.message)] for send in effects.sends), key=repr
        ),
        "fixed": [[run.first, notation.text(run.values)] for run in effects.fixed],
        "then": notation.then(after, list(case.get("then", {}))),
    }
