"""Whether a socket that became readable is likely to hold one datagram: this module alone decides.

After a silence the first datagram is mostly the only one, and to ask for a second in vain costs a
core that slept half of what opening the first one does.  If there is another, a level-triggered
poll says so at once.  But a gap between two reads is no silence by itself: a loop that is busy for
longer reads as rarely, and would fall behind if it took but one datagram each time.

No I/O and no clock: the caller reads the socket, and says what time it is.
"""

from __future__ import annotations

from typing import Final

ALONE_S: Final = 0.001
"""Reads that follow each other faster are of one burst."""
ALONE_MAX: Final = 4
"""So often in a row one datagram is read alone; then it is asked whether there is another, and as
long as there are, nothing is read alone."""


class Silence:
    """What is known of one socket."""

    __slots__ = ("_alone_left", "_read_s", "_room")

    def __init__(self) -> None:
        self._read_s = 0.0
        self._alone_left = ALONE_MAX
        self._room = 0

    def room(self, now_s: float, most: int) -> int:
        """The socket is readable: how many datagrams to read now, ``most`` or one. It is to be read
        until it is empty or so many were taken, and :meth:`taken` to be told."""
        silent = now_s - self._read_s > ALONE_S
        self._read_s = now_s
        if silent and self._alone_left:
            self._alone_left -= 1
            self._room = 0
            return 1
        self._room = most
        return most

    def taken(self, datagrams: int) -> None:
        """So many were read. One that was read alone says nothing of others."""
        if self._room:
            self._alone_left = ALONE_MAX if datagrams <= 1 and datagrams < self._room else 0
