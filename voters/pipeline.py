"""Exactly once, in order: which command of a session is sent, sent again or filled up, and when.

This module alone decides what a client may claim about a command: done, surely not proposed, or
unknown. It is values in, values out: no socket, clock or task (those are in ``driver``).

Rules, each tested in tests/voters/test_pipeline.py:

1. A sequence is given when a command is first sent, ascending; one that was never sent uses none.
2. A copy that was *surely not proposed* (refused so, or fixed behind a gap) stops everything from
   its sequence on, and all of that is sent again in order (go-back-N): first one alone, then with
   each answer twice as many at once (slow start), so that a busy leader is not flooded.
3. When a connection ends, each unanswered command is sent again in order under the same
   (session, sequence); a result may come from any copy.
4. A command given up without a copy that could still be applied becomes a SKIP of its sequence,
   so that later ones are not blocked; with such a copy it stays as it is, its outcome unknown.
5. An expired session ends a command whose earlier copy may have been applied as unknown; all
   others move, in order, to a new session.
6. In a *pinned* session (an import's) rule 4 makes no SKIP and rule 5 moves nothing: a sequence
   belongs to its command for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from trex_core.messages import (
    Kind,
    Outcome,
    OutcomeStatus,
    Refusal,
    RefusalReason,
    Submit,
)

SURELY_NOT_PROPOSED: Final = frozenset(
    {
        RefusalReason.NOT_LEADER,
        RefusalReason.BUSY,
        RefusalReason.NO_QUORUM,
        RefusalReason.TOO_LARGE,
        RefusalReason.MALFORMED,
        RefusalReason.UNAUTHORIZED,
        RefusalReason.DISK_FULL,
    }
)
"""Reasons of a refusal after which that copy can never be applied."""
FINAL: Final = frozenset(
    {RefusalReason.TOO_LARGE, RefusalReason.MALFORMED, RefusalReason.UNAUTHORIZED}
)
"""Reasons that would be the same at any voter and at any time."""

COPIES_MAX: Final = 1 << 20
"""No limit to the copies in flight but the number of commands."""


def _nobody(call: Call) -> None:
    """Nobody waits."""


@dataclass(slots=True, eq=False)
class Call:
    """One command on its way. ``end`` is set once, with the reply that settled it; ``copies``
    counts the copies sent without a definite "no": above 0 it may be applied."""

    kind: int
    command: bytes
    on_end: Callable[[Call], None] = _nobody
    session: int = 0
    sequence: int = 0
    id: int = 0
    copies: int = 0
    given_up: bool = False
    end: Outcome | Refusal | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Where it belongs in the order of all commands."""
        return (self.session, self.sequence)


class Pipeline:
    """The commands of one client between being asked for and being answered."""

    def __init__(self, session: int = 0, next_sequence: int = 1) -> None:
        self.session = session
        self.pinned = session != 0
        self._next = next_sequence
        self._open_id = 0
        self._last_id = 0
        self._queue: deque[Call] = deque()
        self._pending: dict[int, Call] = {}
        self._leftover: list[Call] = []
        self._ready: deque[Call] = deque()
        self._flying: dict[int, Call] = {}
        self._limit = COPIES_MAX

    # --- what is asked of it ----------------------------------------------------------------

    def add(self, call: Call) -> None:
        """Take a command; it is sent after all taken before it."""
        self._queue.append(call)

    def give_up(self, call: Call) -> bool:
        """Nobody waits for ``call`` any more. Returns whether it surely was and will never be
        proposed; if not, it goes on, and ``call.end`` may still be set."""
        assert call.end is None, "an answered command is not given up"
        call.given_up = True
        if call.sequence == 0:
            return True  # outgoing() passes over it
        if call.copies or self.pinned:
            return False
        self._fill(call)
        return True

    @property
    def busy(self) -> bool:
        """Whether something waits to be sent or answered."""
        return bool(
            self._ready
            or self._flying
            or self._pending
            or self._leftover
            or any(not call.given_up for call in self._queue)
        )

    @property
    def unsent(self) -> bool:
        """Whether outgoing() may have something to say."""
        return bool(self._ready or self._queue)

    @property
    def in_flight(self) -> int:
        """Copies sent on this connection and not answered yet."""
        return len(self._flying) + (1 if self._open_id else 0)

    def new_id(self) -> int:
        """A request id that no reply on any connection of this client can confuse."""
        self._last_id += 1
        return self._last_id

    # --- what it says -----------------------------------------------------------------------

    def outgoing(self, bytes_max: int) -> list[Submit]:
        """What is to be written now, in this order; about ``bytes_max`` bytes of commands."""
        out: list[Submit] = []
        room = bytes_max
        while self._ready and room > 0 and self.in_flight < self._limit:
            call = self._ready.popleft()
            if call.end is None:
                out.append(self._copy(call))
                room -= len(call.command) + 64
        if self._ready:
            return out
        while self._queue and self._queue[0].given_up:
            self._queue.popleft()
        if self._queue and self.session == 0:
            if self._open_id == 0 and self.in_flight < self._limit:
                self._open_id = self.new_id()
                out.append(Submit(self._open_id, Kind.OPEN, 0, 0, 0, b""))
            return out
        while self._queue and room > 0 and self.in_flight < self._limit:
            call = self._queue.popleft()
            if call.given_up:
                continue
            call.session, call.sequence = self.session, self._next
            self._next += 1
            self._pending[call.sequence] = call
            out.append(self._copy(call))
            room -= len(call.command) + 64
        return out

    # --- what it hears ----------------------------------------------------------------------

    def heard(self, reply: Outcome | Refusal) -> bool:
        """Take a reply. Returns False when a copy bounced: pause before the next outgoing()."""
        if reply.id == self._open_id:
            self._open_id = 0
            if isinstance(reply, Refusal):
                if reply.reason in FINAL:  # no session, so no command: none has a sequence yet
                    for waiting in self._queue:
                        if not waiting.given_up:
                            self._end(waiting, reply)
                    self._queue.clear()
                    return True
                self._limit = 1
                return False
            self.session, self._next = reply.slot, 1
            return True
        call = self._flying.pop(reply.id, None)
        if call is None or call.end is not None:
            return True
        if isinstance(reply, Refusal):
            return self._refused(call, reply)
        match reply.status:
            case OutcomeStatus.GAP:
                call.copies -= 1
                return not self._bounced(call, reply.id)
            case OutcomeStatus.SESSION_EXPIRED:
                call.copies -= 1
                self._expired(call, reply)
            case _:
                self._limit = min(self._limit * 2, COPIES_MAX)
                self._finish(call, reply)
        return True

    def cut(self) -> None:
        """The connection ended: all that is unanswered goes again, in order."""
        self._flying.clear()
        self._open_id = 0
        self._limit = COPIES_MAX
        self._again(self._waiting())

    # --- inside -----------------------------------------------------------------------------

    def _waiting(self) -> list[Call]:
        return [*self._leftover, *self._pending.values()]

    def _unanswered(self, call: Call) -> int:
        if call.session == self.session and self._pending:
            return next(iter(self._pending))
        return min(
            (other.sequence for other in self._leftover if other.session == call.session),
            default=call.sequence,
        )

    def _copy(self, call: Call) -> Submit:
        call.id = self.new_id()
        call.copies += 1
        self._flying[call.id] = call
        unanswered = self._unanswered(call)
        return Submit(call.id, call.kind, call.session, call.sequence, unanswered, call.command)

    def _again(self, calls: Iterable[Call]) -> None:
        everything = {call.place: call for call in (*self._ready, *calls) if call.end is None}
        for call in everything.values():
            call.id = 0
        self._ready = deque(everything[place] for place in sorted(everything))

    def _bounced(self, call: Call, copy_id: int) -> bool:
        """Send ``call`` and all behind it again, if its newest copy was the one that bounced."""
        if call.id != copy_id:
            return False
        self._limit = 1
        self._again(
            other
            for other in self._waiting()
            if other.session == call.session and other.sequence >= call.sequence
        )
        return True

    def _refused(self, call: Call, refusal: Refusal) -> bool:
        if refusal.reason in SURELY_NOT_PROPOSED:
            call.copies -= 1
        if refusal.reason in FINAL and call.copies == 0:
            if call.kind == Kind.SKIP:  # not even that may be said: nothing behind it will be
                self._forget(call)
            elif not self.pinned:
                self._fill(call)
            self._end(call, refusal)
            return True
        return not self._bounced(call, refusal.id)

    def _fill(self, call: Call) -> None:
        """Use up the sequence of ``call``, which will never be sent again (rule 4)."""
        skip = Call(Kind.SKIP, b"", session=call.session, sequence=call.sequence)
        if self._pending.get(call.sequence) is call:
            self._pending[call.sequence] = skip
        else:
            self._leftover = [skip if other is call else other for other in self._leftover]
        self._ready = deque(other for other in self._ready if other is not call)
        self._again(
            other
            for other in self._waiting()
            if other.session == call.session and other.sequence >= call.sequence
        )

    def _expired(self, call: Call, reply: Outcome) -> None:
        if call.session == self.session and not self.pinned:
            self._leftover.extend(self._pending.values())
            self._pending.clear()
            self.session, self._next = 0, 1
        if call.copies or self.pinned:
            self._finish(call, reply)
            return
        # This command was never applied in its session, so none behind it was either.
        moved = [
            other
            for other in self._leftover
            if other.session == call.session and other.sequence >= call.sequence
        ]
        gone = set(map(id, moved))
        self._leftover = [other for other in self._leftover if id(other) not in gone]
        self._ready = deque(other for other in self._ready if id(other) not in gone)
        self._flying = {key: other for key, other in self._flying.items() if id(other) not in gone}
        for other in reversed(moved):
            other.copies = 0
            if other.given_up or other.kind == Kind.SKIP:
                self._end(other, reply)
            else:
                other.session = other.sequence = other.id = 0
                self._queue.appendleft(other)

    def _finish(self, call: Call, reply: Outcome) -> None:
        self._forget(call)
        self._end(call, reply)

    def _forget(self, call: Call) -> None:
        if self._pending.get(call.sequence) is call:
            del self._pending[call.sequence]
        else:
            self._leftover = [other for other in self._leftover if other is not call]

    @staticmethod
    def _end(call: Call, reply: Outcome | Refusal) -> None:
        call.end = reply
        call.on_end(call)
