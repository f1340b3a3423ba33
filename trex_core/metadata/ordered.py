"""A persistent sorted sequence: every edit makes a new one and shares what it did not touch.

This module alone knows how.  It serves ring tokens, configuration keys and member ids: hundreds of
thousands of items, a few edited at a time, read in order from anywhere.  Items lie in chunks of at
most CHUNK_MAX; an edit copies the chunks it touches and the list of chunks.  Two levels and this
size are what costs least for eight edits among 100,000 items (most of it is counting references).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

CHUNK_MAX: Final = 96
"""Most items in a chunk; one more splits it in two."""
CHUNK_FILL: Final = 64
"""Items in a chunk when all are given at once."""

T = TypeVar("T", bound=Any)


class Ordered(Generic[T]):
    """Distinct items in ascending order. Never changed once made."""

    __slots__ = ("chunks", "size")

    def __init__(self, chunks: Sequence[tuple[T, ...]], size: int) -> None:
        self.chunks: Final = chunks
        """Ascending, none empty."""
        self.size: Final = size

    @classmethod
    def of(cls, ascending: Iterable[T]) -> Ordered[T]:
        """From items that are already ascending and distinct."""
        items = list(ascending)
        starts = range(0, len(items), CHUNK_FILL)
        return cls([tuple(items[at : at + CHUNK_FILL]) for at in starts], len(items))

    def edited(self, remove: Iterable[T], add: Iterable[T]) -> Ordered[T]:
        """Without the items of ``remove``, then with those of ``add``. An item removed must be
        there and one added must not: ``KeyError``."""
        chunks = list(self.chunks)
        size = self.size
        for item in remove:
            at = _chunk_of(chunks, item)
            chunk = chunks[at] if at >= 0 else ()
            index = bisect_left(chunk, item)
            if index == len(chunk) or chunk[index] != item:
                raise KeyError(item)
            size -= 1
            if len(chunk) == 1:
                del chunks[at]
            else:
                chunks[at] = chunk[:index] + chunk[index + 1 :]
        for item in add:
            size += 1
            if not chunks:
                chunks.append((item,))
                continue
            at = max(0, _chunk_of(chunks, item))
            chunk = chunks[at]
            index = bisect_left(chunk, item)
            if index < len(chunk) and chunk[index] == item:
                raise KeyError(item)
            chunk = chunk[:index] + (item,) + chunk[index:]  # noqa: RUF005 - twice as fast
            if len(chunk) > CHUNK_MAX:
                half = len(chunk) // 2
                chunks[at : at + 1] = [chunk[:half], chunk[half:]]
            else:
                chunks[at] = chunk
        return Ordered(chunks, size)

    def find(self, item: T) -> tuple[int, int]:
        """(chunk, index) of the first item not below ``item``; (number of chunks, 0) if none."""
        at = _chunk_of(self.chunks, item)
        if at < 0:
            return 0, 0
        index = bisect_left(self.chunks[at], item)
        return (at, index) if index < len(self.chunks[at]) else (at + 1, 0)

    def since(self, item: T) -> Iterator[T]:
        """The items from the first one not below ``item``, in order."""
        at, index = self.find(item)
        for chunk in self.chunks[at : at + 1]:
            yield from chunk[index:]
        for later in range(at + 1, len(self.chunks)):
            yield from self.chunks[later]

    def __iter__(self) -> Iterator[T]:
        for chunk in self.chunks:
            yield from chunk

    def __len__(self) -> int:
        return self.size


def _chunk_of(chunks: Sequence[tuple[T, ...]], item: T) -> int:
    """The last chunk whose first item is not above ``item``; -1 if none. (Tuples compare by their
    first item first, so this needs no key.)"""
    at = bisect_left(chunks, (item,))
    return at if at < len(chunks) and chunks[at][0] == item else at - 1


NOTHING: Final[Ordered[Any]] = Ordered((), 0)
