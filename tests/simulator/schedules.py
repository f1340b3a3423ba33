"""Named schedules of several voters: M1 to M8 of the ancestors' inventory, and a few of our own.

Each takes a ``core`` (the real ``paxos`` or a mutant of it), plays one history around a table and
raises :class:`Violation` if a promise of the system is broken. Slot 1 is the genesis that the
first election needs every voter for, so a history starts at slot 2.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import ModuleType
from typing import Final

from tests.simulator.observer import Violation
from tests.simulator.table import Letter, Table, of
from trex_core import paxos
from trex_core.messages import (
    Accept,
    Accepted,
    Ballot,
    CatchUp,
    ChainReport,
    Fetch,
    HandOver,
    Heartbeat,
    Prepare,
    Promise,
    Refused,
)
from trex_core.state import Candidate, Leader, Receive, StartHandOver


def begin(
    voters: int = 3, leader: int = 1, *, core: ModuleType = paxos, check_steps: bool = True
) -> Table:
    """A cluster with ``leader`` leading and slot 1 fixed at all."""
    table = Table(voters, core=core, check_steps=check_steps)
    table.elect(leader)
    table.settle(ticks=4)
    table.expect_converged()
    expect(table.leaders == [leader], f"{leader} alone leads: {table.describe()}")
    return table


def expect(holds: bool, what: str) -> None:
    """A schedule's claim."""
    if not holds:
        raise Violation(what)


def m1_no_ballot_is_raised_without_phase_one(core: ModuleType, check_steps: bool = True) -> None:
    """D1: L fixed slot 2 with B; C, promised by B, recovers it and gets w accepted by B in slot 3
    with the answers delayed; L hears of C's ballot and goes on; then the answers arrive."""
    table = begin(core=core, check_steps=check_steps)
    table.propose(1, "x")
    table.deliver(of(Accept, target=2))
    table.deliver(of(Accepted, target=1))
    expect(table.seats[1].fixed == 2, "L fixes slot 2 with B")
    table.drop()
    table.elect(3, among=(2, 3))
    table.drop()
    table.propose(3, "w")
    table.deliver(of(Accept, source=3, target=2))
    table.deliver(of(Accepted, source=3, target=3))
    late = [x for x in table.letters if isinstance(x.message, Accepted) and x.target == 3]
    expect(bool(late), "B's answers to C are under way")
    table.drop()
    expect(table.leads(1), "L does not know yet")
    table.tick(1)
    table.deliver(of(Heartbeat, source=1, target=3))
    table.deliver(of(Refused, target=1))
    for letter in late:
        table.hand_over(letter)
    expect("w" in table.names(), "C fixes w")
    for _ in range(4):
        if table.leads(1):
            table.propose(1, "v")
        table.run(among=(1, 2))
        table.tick(1)
    table.run(among=(1, 2))
    table.settle(ticks=40)
    table.expect_converged()


def m2_isolated_leader_rejoins(core: ModuleType, check_steps: bool = True) -> None:
    """A leader cut off with unfixed accepts comes back to a cluster that went on."""
    table = begin(core=core, check_steps=check_steps)
    table.propose(1, "a", "b")
    table.drop(lambda x: 1 in (x.source, x.target) and x.source != x.target)
    table.run(among=(1,))
    expect(table.seats[1].state.last_accepted == 3, "the cut-off leader holds two accepts")
    table.elect(2, among=(2, 3))
    table.propose(2, "x")
    table.settle(among=(2, 3), ticks=3)
    expect(table.names() == ["x"], f"the others go on: {table.names()}")
    table.settle(ticks=40)
    table.expect_converged()
    expect(len(table.leaders) == 1, f"one leads: {table.describe()}")
    table.propose(table.leaders[0], "y")
    table.settle(ticks=6)
    table.expect_converged()
    commands = [name for name in table.names() if name != "-"]
    expect(commands == ["x", "y"], f"nothing of the deposed leader: {commands}")


def m3_isolated_voter_does_not_disturb(core: ModuleType, check_steps: bool = True) -> None:
    """A voter cut off for long polls and polls; back again it changes no leader and no ballot."""
    table = begin(core=core, check_steps=check_steps)
    ballot = table.seats[1].state.promised
    for n in range(120):
        table.tick(3)
        table.drop(of(source=3))
        if n % 3 == 0:
            table.settle(among=(1, 2), ticks=1)
    table.propose(1, "a")
    table.settle(among=(1, 2), ticks=3)
    for _ in range(25):  # it is heard before it hears anybody
        table.tick(3)
        table.run()
    table.settle(ticks=20)
    table.expect_converged()
    expect(table.leaders == [1], f"the leader stays: {table.describe()}")
    expect(table.seats[1].state.promised == ballot, "and its ballot")


def m3_high_ballot_rejoins(core: ModuleType, check_steps: bool = True) -> None:
    """A voter whose promise rose far above all others comes back to a busy cluster: it goes on
    under a new ballot, within a bounded time, and nothing is lost."""
    table = begin(core=core, check_steps=check_steps)
    for n in range(40):
        _ask_to_lead(table, 3)
        table.tick(3, times=42)
        table.drop(of(source=3))
        if n % 10 == 0:
            table.propose(1, f"n{n}")
        table.settle(among=(1, 2), ticks=1)
    expect(table.seats[3].state.promised.round >= 20, "its ballot is high")
    table.settle(ticks=40)
    table.expect_converged()
    expect(len(table.leaders) == 1, f"one leads: {table.describe()}")
    table.propose(table.leaders[0], "z")
    table.settle(ticks=4)
    table.expect_converged()
    commands = [name for name in table.names() if name != "-"]
    expect(commands == ["n0", "n10", "n20", "n30", "z"], f"all are there: {commands}")


def m4_two_candidates_choose_equal_values(core: ModuleType, check_steps: bool = True) -> None:
    """Two candidates recover the same slots, their letters shuffled in many ways; some slots are
    held at different ballots by different voters."""
    for seed in range(60):
        rng = Random(seed)
        voters = 3 if seed % 2 else 5
        table = begin(voters, core=core, check_steps=check_steps)
        for n in range(3):  # a value here, a value there
            table.propose(1, f"a{n}")
            for voter in table.ids:
                if rng.random() < 0.5:
                    table.deliver(of(Accept, target=voter))
        table.run(among=(1,))
        survivors = table.ids[-(voters // 2 + 1) :]
        table.elect(survivors[0], among=survivors)
        table.propose(survivors[0], "b")
        for voter in table.ids:
            if rng.random() < 0.5:
                table.deliver(of(Accept, target=voter))
        table.drop(lambda _, rng=rng: rng.random() < 0.5)
        for _ in range(150):
            for voter in table.ids[1:]:
                if rng.random() < 0.3:
                    table.tick(voter)
            rng.shuffle(table.letters)
            for letter in table.letters[: rng.randrange(4)]:
                table.letters.remove(letter)
                (table.hand_over if rng.random() < 0.8 else table.lose)(letter)
        table.settle(ticks=60)
        table.expect_converged()


def m5_full_recovery(core: ModuleType, check_steps: bool = True) -> None:
    """The dead leader left an empty slot and, above it, a carried value."""
    for voters in (3, 5):
        table = begin(voters, core=core, check_steps=check_steps)
        table.propose(1, "lost")
        table.drop(of(Accept))
        table.propose(1, "carried")
        table.deliver(of(Accept))
        table.crash(1)
        table.drop()
        alive = table.ids[1:]
        table.elect(2, among=alive)
        table.settle(among=alive, ticks=6)
        table.expect_converged(alive)
        expect(table.names() == ["-", "carried"], f"no-op, then the value: {table.names()}")


def m6_value_reached_one_peer(core: ModuleType, check_steps: bool = True) -> None:
    """The leader dies after its value reached one peer: whoever recovers with that peer carries
    it; whoever does not may choose freely; both agree in the end."""
    for voters, holder, leader, among in (
        (3, 2, 2, (2, 3)),
        (3, 2, 3, (2, 3)),
        (5, 2, 3, (2, 3, 4)),
        (5, 2, 3, (3, 4, 5)),
    ):
        table = begin(voters, core=core, check_steps=check_steps)
        table.propose(1, "v")
        table.deliver(of(Accept, target=holder))
        table.crash(1)
        table.drop()
        table.elect(leader, among=among)
        table.propose(leader, "w")
        table.settle(among=among, ticks=4)
        expected = ["v", "w"] if holder in among else ["w"]
        expect(table.names() == expected, f"{expected}, not {table.names()}")
        table.start(1)
        table.settle(ticks=40)
        table.expect_converged()
        commands = [name for name in table.names() if name != "-"]
        expect(commands == expected, f"{expected} for ever, not {commands}")


def m7_restart_at_every_boundary(core: ModuleType, check_steps: bool = True) -> None:
    """Every voter crashes when its k-th record is durable, before its votes leave, and restarts
    from its journal; for each voter and each k of a history with two leaders."""
    for voters in (1, 3):
        for victim in range(1, voters + 1):
            for k in range(1, 13):
                table = Table(voters, core=core, check_steps=check_steps)
                table.seats[victim].crash_after = k
                down = 0
                for round_ in range(90):
                    table.tick(*table.ids)
                    table.run()
                    if not table.seats[victim].up:
                        down += 1
                        if down == 3:
                            table.start(victim)
                    if round_ % 12 == 8:
                        for leader in table.leaders:
                            table.propose(leader, f"c{round_}")
                    if round_ == 50 and voters > 1:
                        for leader in table.leaders:
                            table.restart(leader)
                table.settle(ticks=30)
                table.expect_converged()
                expect(len(table.names()) >= 3, f"it goes on: {table.names()}")


def m8_leader_dies_leaving_unfixed_slots(core: ModuleType, check_steps: bool = True) -> None:
    """The leader dies leaving 0, 1, 2, 3 or 10 unfixed slots at the survivors, of whom there are
    no more than a quorum: a leader within few attempts, and all slots fixed (D3, D4, D5)."""
    for voters, alive in ((3, (2, 3)), (5, (3, 4, 5))):
        for unfixed in (0, 1, 2, 3, 10):
            table = begin(voters, core=core, check_steps=check_steps)
            names = [f"u{n}" for n in range(min(unfixed, core.FLIGHTS_MAX))]
            for name in names:
                table.propose(1, name)
            table.deliver(of(Accept))
            table.drop()
            for voter in set(table.ids) - set(alive):
                table.crash(voter)
            for _ in range(80):
                table.settle(among=alive, ticks=1)
                if any(table.leads(v) for v in alive):
                    break
            leaders = [v for v in alive if table.leads(v)]
            expect(len(leaders) == 1, f"{unfixed} unfixed slots, no leader: {table.describe()}")
            table.settle(among=alive, ticks=4)
            table.propose(leaders[0], "next")
            table.settle(among=alive, ticks=4)
            table.expect_converged(alive)
            expect(table.names() == [*names, "next"], f"all fixed: {table.names()}")


def stale_promise_is_not_counted(core: ModuleType, check_steps: bool = True) -> None:
    """D2: voter 2 promises C's first attempt, the answer is slow; then voters 1 and 2 fix x under a
    higher ballot; C stands again, above that, and now the old answer arrives."""
    table = begin(core=core, check_steps=check_steps)
    early = _stand(table, 3)
    old = _promise_of(table, 2, early)
    table.drop()
    table.elect(1, among=(1, 2))
    table.propose(1, "x")
    table.run(among=(1, 2))
    expect(table.names() == ["x"], "x is fixed by voters 1 and 2")
    table.drop()
    late = _stand(table, 3)
    expect(late.message.ballot > table.seats[2].state.promised, "C stands above all")
    table.deliver(of(Prepare, source=3, target=3))
    table.deliver(of(Promise, source=3, target=3))
    table.hand_over(old)
    if table.leads(3):
        table.propose(3, "y")
        table.run(among=(2, 3))
        raise Violation("voter 3 leads, voter 2 never promised its ballot")
    table.settle(ticks=40)
    table.expect_converged()


def _stand(table: Table, voter: int) -> Letter:
    """``voter`` stands at once; returns its Prepare to voter 2, still under way, as from there."""
    seat = table.seats[voter]
    table.tick(voter, times=12)
    _ask_to_lead(table, voter)
    expect(isinstance(seat.state.role, Candidate), "asked to lead, it stands")
    (prepare,) = [
        x
        for x in table.letters
        if isinstance(x.message, Prepare)
        and x.target == 2
        and x.message.ballot == seat.state.promised
    ][:1]
    return prepare


def _ask_to_lead(table: Table, voter: int) -> None:
    """Voter 1, as if it led under a ballot above what ``voter`` promised, hands over to it."""
    sender = table.seats[1]
    told = HandOver(Ballot(0, table.seats[voter].state.promised.round + 1, 1))
    table.step(voter, Receive(1, sender.incarnation, sender.boot, told))


def _promise_of(table: Table, voter: int, prepare: Letter) -> Letter:
    table.hand_over(prepare)
    found = [x for x in table.letters if isinstance(x.message, Promise) and x.source == voter]
    expect(bool(found), f"voter {voter} promises")
    for letter in found:
        table.letters.remove(letter)
    return found[-1]


def leader_yields_with_a_promise(core: ModuleType, check_steps: bool = True) -> None:
    """D4: a leader told of a higher ballot by its Prepare follows, and its promise goes out."""
    table = begin(core=core, check_steps=check_steps)
    table.tick(2, times=40)
    table.drop()
    _ask_to_lead(table, 2)
    table.deliver(of(Prepare, target=1))
    expect(not table.leads(1), "the leader yields")
    answers = [x for x in table.letters if isinstance(x.message, Promise) and x.source == 1]
    expect(len(answers) == 1, "and promises, in the same step")


def lost_prepares_are_asked_again(core: ModuleType, check_steps: bool = True) -> None:
    """D5: the first Prepares of every attempt are lost; asking again must lead to a leader."""
    table = begin(core=core, check_steps=check_steps)
    table.propose(1, "x")
    table.deliver(of(Accept))
    table.crash(1)
    table.drop()
    seen: set[tuple[Ballot, int]] = set()

    def first_of_attempt(letter: Letter) -> bool:
        message = letter.message
        if not isinstance(message, Prepare) or letter.source == letter.target:
            return False
        key = (message.ballot, letter.target)
        if key in seen:
            return False
        seen.add(key)
        return True

    for _ in range(120):
        table.tick(2, 3)
        for _ in range(10):
            table.drop(first_of_attempt)
            table.drop(of(target=1))
            table.deliver()
        if table.leads(2) or table.leads(3):
            break
    expect(table.leads(2) or table.leads(3), f"nobody leads: {table.describe()}")
    table.settle(among=(2, 3), ticks=6)
    table.expect_converged((2, 3))
    expect(table.names() == ["x"], f"x is carried: {table.names()}")


def silent_fetch_finds_another_quorum(core: ModuleType, check_steps: bool = True) -> None:
    """The one voter that named a value does not answer the fetch: its promise is dropped, another
    quorum elects; the value, accepted by it alone, may go."""
    table = begin(5, core=core, check_steps=check_steps)
    table.propose(1, "v")
    table.deliver(of(Accept, target=2))
    table.crash(1)
    table.drop()
    alive = (2, 3, 4, 5)
    for _ in range(120):
        table.tick(3)
        for _ in range(10):
            table.drop(of(Fetch))
            table.drop(of(target=1))
            table.deliver()
        if table.leads(3):
            break
        for voter in (2, 4, 5):
            if table.seats[voter].state.tick < table.seats[3].state.tick:
                table.tick(voter)
            table.drop(lambda x, v=voter: x.source == v and not isinstance(x.message, Promise))
    expect(table.leads(3), f"voter 3 leads without voter 2's value: {table.describe()}")
    table.propose(3, "w")
    table.settle(among=alive, ticks=20)
    table.expect_converged(alive)
    commands = [name for name in table.names() if name != "-"]
    expect(commands == ["w"], f"w alone: {commands}")


def highest_ballot_wins(core: ModuleType, check_steps: bool = True) -> None:
    """Slot 2 is held at two ballots, the higher is fixed: a third leader must choose that one."""
    table = begin(core=core, check_steps=check_steps)
    table.propose(1, "a")
    table.run(among=(1,))
    table.elect(2, among=(2, 3))
    table.propose(2, "b")
    table.deliver(of(Accept, target=3))
    table.deliver(of(Accepted, target=2))
    expect(table.names() == ["b"], "b is fixed by voters 2 and 3")
    table.crash(2)
    table.restart(1)
    table.drop()
    table.elect(3, among=(1, 3))
    table.settle(among=(1, 3), ticks=6)
    table.expect_converged((1, 3))
    expect(table.names() == ["b"], f"b for ever: {table.names()}")


def announcement_needs_the_very_ballot(core: ModuleType, check_steps: bool = True) -> None:
    """Voter 5 holds other values at an older ballot in the slots that a leader announces: it must
    learn none of its own, neither when it holds all of the slots nor when it holds some."""
    table = begin(5, core=core, check_steps=check_steps)
    table.propose(1, "old2", "old3")
    table.deliver(of(Accept, target=5))
    table.crash(1)
    table.drop()
    table.elect(2, among=(2, 3, 4))
    for names in (("new2", "new3"), ("new4",)):
        table.propose(2, *names)
        table.run(among=(2, 3, 4))
        table.tick(2)
        heartbeats = [
            x for x in table.letters if isinstance(x.message, Heartbeat) and x.target == 5
        ]
        table.run(among=(2, 3, 4))
        expect(bool(heartbeats), "the leader announces")
        for letter in heartbeats:
            table.hand_over(letter)
        expect(table.seats[5].fixed == 1, "voter 5 learns nothing from its own old accepts")
        table.drop()
    table.settle(among=(2, 3, 4, 5), ticks=20)
    table.expect_converged((2, 3, 4, 5))
    expect(table.names() == ["new2", "new3", "new4"], f"the new values: {table.names()}")


def failed_catch_up_is_tried_elsewhere(core: ModuleType, check_steps: bool = True) -> None:
    """A voter is behind, and its first connections fail: it asks again, and is soon level."""
    table = begin(core=core, check_steps=check_steps)
    for name in ("x", "y"):
        table.propose(1, name)
        table.settle(among=(1, 2), ticks=2)
    for _ in range(6):
        table.tick(*table.ids)
        for _ in range(4):
            table.drop(of(CatchUp))
            table.deliver()
    expect(table.seats[3].fixed == 1, "all its connections failed")
    table.settle(ticks=50)
    table.expect_converged()


def one_promise_is_no_quorum(core: ModuleType, check_steps: bool = True) -> None:
    """A candidate that only itself promised does not lead."""
    table = begin(core=core, check_steps=check_steps)
    _ask_to_lead(table, 3)
    table.run(among=(3,))
    expect(not table.leads(3), "one of three is no quorum")


def promise_in_parts(core: ModuleType, check_steps: bool = True) -> None:
    """Voter 3 holds every other slot, too many runs for one part (with small limits); the first
    part of its promise is lost again and again: what it names must not be taken for free."""
    table = begin(core=core, check_steps=check_steps)
    for slot in range(2, 8):
        table.propose(1, f"a{slot}")
        if slot % 2 == 0:
            table.deliver(of(Accept, target=3))
        table.drop(of(Accept))
    table.run(among=(1, 3))
    expect(table.names() == ["a2"], "slot 2 is fixed by voters 1 and 3")
    table.crash(1)
    table.drop()
    lost = 0
    table.tick(3, times=6)
    table.drop()
    for _ in range(120):
        table.tick(2)
        for _ in range(10):
            table.drop(of(target=1))
            if lost < 3:
                lost += table.drop(lambda x: isinstance(x.message, Promise) and x.message.last > 0)
            table.deliver()
        if table.leads(2):
            break
    expect(lost == 3 or core.PROMISE_PAIRS_MAX > 3, "parts were lost")
    table.settle(among=(2, 3), ticks=6)
    table.expect_converged((2, 3))
    expect(table.names() == ["a2", "-", "a4", "-", "a6"], f"all are carried: {table.names()}")


def window_is_bounded(core: ModuleType, check_steps: bool = True) -> None:
    """A leader that hears no vote proposes no more than its window, and goes on when votes come."""
    table = begin(core=core, check_steps=check_steps)
    table.propose(1, *(["too many"] * (core.WINDOW_SLOTS_MAX + 1)))
    expect(table.seats[1].state.last_accepted == 1, "more than the window is not proposed")
    for n in range(100):
        table.propose(1, *(f"{n}.{i}" for i in range(4)))
        table.drop(of(Accept))
    role = table.seats[1].state.role
    assert isinstance(role, Leader)
    waiting = role.next_slot - 1 - table.seats[1].fixed
    expect(0 < waiting <= core.WINDOW_SLOTS_MAX, f"{waiting} slots wait")
    expect(len(role.flights) <= core.FLIGHTS_MAX + 4, f"{len(role.flights)} runs are in flight")
    table.settle(ticks=60)
    table.expect_converged()
    fixed = len(table.observer.log)
    table.propose(1, "next")
    table.settle(ticks=4)
    expect(len(table.observer.log) == fixed + 1, "the window opens again")


def different_chain_stops(core: ModuleType, check_steps: bool = True) -> None:
    """A voter whose chain differs from one other's goes on; from a majority's: it stops."""
    table = begin(core=core, check_steps=check_steps)
    every = core.CHAIN_CHECK_SLOTS
    while table.seats[3].fixed < every:
        table.propose(1, *("c" for _ in range(min(16, every))))
        table.settle(ticks=1)
    report = ChainReport(every, b"x" * 32)
    for voter, up in ((1, True), (2, False)):
        seat = table.seats[voter]
        table.step(3, Receive(voter, seat.incarnation, seat.boot, report))
        expect(table.seats[3].up == up, f"after the report of voter {voter}")
    expect("chain" in table.seats[3].state.halted, "it says why")


def chained_links_do_not_duel(core: ModuleType, check_steps: bool = True) -> None:
    """Voters 1 and 2 do not hear each other, both hear 3: the leader stays, and the other one is
    kept up to date all the same."""
    table = begin(core=core, check_steps=check_steps)
    ballot = table.seats[1].state.promised
    cut = {(1, 2), (2, 1)}
    for n in range(20):
        table.propose(1, f"c{n}")
        _live(table, cut, 6)
        expect(table.leaders == [1], f"voter 1 leads on: {table.describe()}")
    _live(table, cut, 60)
    table.expect_converged()
    expect(all(s.state.promised == ballot for s in table.seats.values()), "no ballot was raised")


def one_way_links_do_not_disturb(core: ModuleType, check_steps: bool = True) -> None:
    """A follower that only hears, or only speaks to, its leader does not depose it."""
    for cut in ({(1, 2)}, {(2, 1)}, {(1, 2), (2, 3)}, {(2, 1), (3, 2)}):
        table = begin(core=core, check_steps=check_steps)
        for n in range(10):
            table.propose(1, f"c{n}")
            _live(table, cut, 8)
            expect(table.leaders == [1], f"{cut}: voter 1 leads on: {table.describe()}")
        _live(table, set(), 40)
        table.expect_converged()


def hub_is_elected(core: ModuleType, check_steps: bool = True) -> None:
    """Of five voters only one hears all others, and it does not lead: it soon does."""
    table = begin(5, core=core, check_steps=check_steps)
    cut = {(a, b) for a in table.ids for b in table.ids if 3 not in (a, b) and a != b}
    _live(table, cut, 100)
    expect(table.leaders == [3], f"the hub leads: {table.describe()}")
    ballot = table.seats[3].state.promised
    for n in range(5):
        table.propose(3, f"c{n}")
        _live(table, cut, 10)
    expect(table.seats[3].state.promised == ballot, "and stays")
    table.expect_converged()


def _live(table: Table, cut: set[tuple[int, int]], ticks: int) -> None:
    """Time passes for all; letters on the links in ``cut`` are lost."""
    for _ in range(ticks):
        table.tick(*table.ids)
        for _ in range(40):
            table.drop(lambda x: (x.source, x.target) in cut)
            if not table.deliver():
                break


def handover_fails_no_write(core: ModuleType, check_steps: bool = True) -> None:
    """Asked to, the leader drains and hands over; what was proposed is fixed, the heir leads soon
    and under a higher ballot."""
    table = begin(core=core, check_steps=check_steps)
    table.propose(1, "a", "b")
    table.step(1, StartHandOver(3))
    table.settle(ticks=3)
    expect(table.leaders == [3], f"voter 3 leads: {table.describe()}")
    table.propose(3, "c")
    table.settle(ticks=3)
    table.expect_converged()
    expect(table.names() == ["a", "b", "c"], f"nothing is lost: {table.names()}")


def handover_to_a_dead_voter_is_given_up(core: ModuleType, check_steps: bool = True) -> None:
    """The heir is down: after an election timeout the old leader goes on under its ballot."""
    table = begin(core=core, check_steps=check_steps)
    ballot = table.seats[1].state.promised
    table.crash(3)
    table.step(1, StartHandOver(3))
    table.settle(among=(1, 2), ticks=table.seats[1].config.election_ticks_max + 2)
    expect(table.leaders == [1], f"voter 1 leads on: {table.describe()}")
    table.propose(1, "a")
    table.settle(among=(1, 2), ticks=3)
    expect(table.names() == ["a"], "and proposes again")
    expect(table.seats[1].state.promised == ballot, "under the same ballot")


def cut_off_leader_steps_down(core: ModuleType, check_steps: bool = True) -> None:
    """R9: a leader that hears no quorum for an election timeout stops leading."""
    table = begin(core=core, check_steps=check_steps)
    for _ in range(table.seats[1].config.election_ticks_min + 2):
        table.tick(1)
        table.drop()
    expect(not table.leads(1), "a leader without a quorum steps down")


def amnesia_is_fenced(core: ModuleType, check_steps: bool = True) -> None:
    """A voter that accepted is formatted anew: its new self must not help to choose otherwise."""
    table = begin(core=core, check_steps=check_steps)
    table.propose(1, "x")
    table.run(among=(1, 2))
    expect(table.names() == ["x"], "x is fixed by voters 1 and 2")
    table.drop()
    table.crash(1)
    table.wipe(2)
    for _ in range(60):
        table.tick(3)
        table.run(among=(2, 3))
        for leader in table.leaders:
            table.propose(leader, "y")
    expect(not table.leaders, f"nobody can lead: {table.describe()}")
    expect(not table.seats[2].up, "the new voter stops")
    expect("formatted" in table.seats[2].state.halted, "and says why")
    table.start(1)
    table.settle(among=(1, 3), ticks=40)
    table.expect_converged((1, 3))
    expect(len(table.leaders) == 1, "with voter 1 back they go on")


def amnesia_before_genesis(core: ModuleType, check_steps: bool = True) -> None:
    """Before slot 1 is fixed everywhere a majority must not start without the third: it could be
    the one that knows what was fixed."""
    table = Table(core=core, check_steps=check_steps)
    for _ in range(60):
        table.tick(1, 2)
        table.run(among=(1, 2))
    expect(not table.leaders, f"the first election needs every voter: {table.describe()}")
    table.settle(ticks=60)
    expect(len(table.leaders) == 1, f"with all it happens: {table.describe()}")


def rolled_back_disk_is_fenced(core: ModuleType, check_steps: bool = True) -> None:
    """An old copy of a voter's disk is put back: peers know a higher boot number."""
    table = begin(core=core, check_steps=check_steps)
    copy = list(table.seats[2].disk)
    table.restart(2)
    table.restart(2)
    table.settle(ticks=20)
    leader = table.leaders[0]
    table.propose(leader, "x")
    table.settle(ticks=4)
    seat = table.seats[2]
    seat.disk, seat.boot = copy, 0
    table.observer.forget(2)
    table.restart(2)
    table.settle(ticks=20)
    expect(not seat.up, f"the rolled-back voter stops: {table.describe()}")
    expect("rolled back" in seat.state.halted, "and says why")


SCHEDULES: Final[dict[str, Callable[..., None]]] = {
    schedule.__name__: schedule
    for schedule in (
        m1_no_ballot_is_raised_without_phase_one,
        m2_isolated_leader_rejoins,
        m3_isolated_voter_does_not_disturb,
        m3_high_ballot_rejoins,
        m4_two_candidates_choose_equal_values,
        m5_full_recovery,
        m6_value_reached_one_peer,
        m7_restart_at_every_boundary,
        m8_leader_dies_leaving_unfixed_slots,
        stale_promise_is_not_counted,
        leader_yields_with_a_promise,
        lost_prepares_are_asked_again,
        silent_fetch_finds_another_quorum,
        highest_ballot_wins,
        announcement_needs_the_very_ballot,
        failed_catch_up_is_tried_elsewhere,
        one_promise_is_no_quorum,
        promise_in_parts,
        window_is_bounded,
        different_chain_stops,
        chained_links_do_not_duel,
        one_way_links_do_not_disturb,
        hub_is_elected,
        handover_fails_no_write,
        handover_to_a_dead_voter_is_given_up,
        cut_off_leader_steps_down,
        amnesia_is_fenced,
        amnesia_before_genesis,
        rolled_back_disk_is_fenced,
    )
}
