"""Numbers as a person reads them: this module alone turns figures into the words of the screens."""

from __future__ import annotations

import time
from typing import Final

_MINUTE_MS: Final = 60_000
_HOUR_MS: Final = 60 * _MINUTE_MS
_DAY_MS: Final = 24 * _HOUR_MS


def age(ms: int) -> str:
    """A length of time, in at most six characters: "80 ms", "1.2 s", "48 s", "12 min", "3.5 h"."""
    ms = max(0, ms)
    if ms < 1_000:
        return f"{ms} ms"
    if ms < 10_000:
        return f"{ms / 1_000:.1f} s"
    if ms < 2 * _MINUTE_MS:
        return f"{ms // 1_000} s"
    if ms < 2 * _HOUR_MS:
        return f"{ms // _MINUTE_MS} min"
    if ms < 2 * _DAY_MS:
        return f"{ms / _HOUR_MS:.1f} h"
    return f"{ms // _DAY_MS} d"


def micros(us: int) -> str:
    """A time measured in microseconds: "850 µs", "1.65 ms", "37 ms", "1.2 s"; "-" for 0."""
    if us <= 0:
        return "-"
    if us < 1_000:
        return f"{us} µs"
    if us < 10_000:
        return f"{us / 1_000:.2f} ms"
    if us < 1_000_000:
        return f"{us // 1_000} ms"
    return f"{us / 1_000_000:.1f} s"


def count(number: int) -> str:
    """A count with separators: "12,486"."""
    return f"{number:,}"


def size(number: int) -> str:
    """Bytes in binary units: "712 B", "16.0 MiB"."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            return f"{number} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("the loop ends at TiB")


def moment(at_ms: int, *, millis: bool = False) -> str:
    """A time of day here: "15:04:05", or "15:04:05.123"."""
    text = time.strftime("%H:%M:%S", time.localtime(at_ms / 1000))
    return f"{text}.{at_ms % 1000:03d}" if millis else text


def plural(number: int, noun: str, nouns: str = "") -> str:
    """ "1 voter", "2 voters"; ``nouns`` where an s is not enough."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
