"""Hostile bytes: this module alone makes them, from valid encodings and from types.

:func:`message` draws what a msgspec decoder of a type is fed: valid encodings of it, encodings in
which one part is of another type or out of all bounds, and valid ones whose bytes were changed.
:func:`spoilt` changes bytes of any kind.  All is drawn from the ``Random`` given, so that a case is
found again by its number.
"""

from __future__ import annotations

import functools
from random import Random
from typing import Any, Final

import msgspec
from msgspec import inspect

CASE_BYTES_MAX: Final = 1 << 16
"""Longest case, in bytes: what explodes, explodes on less."""
_ITEMS: Final = (0, 1, 1, 2, 3, 7)
_NUMBERS: Final = (
    0, 1, 2, 3, 41, 127, 128, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 32, (1 << 53) + 1,
    (1 << 63) - 1,
)  # fmt: skip
_WRONG_NUMBERS: Final = (-1, -2, -(1 << 31), -(1 << 63), 1 << 63, (1 << 64) - 1)
_TEXTS: Final = (
    "",
    "a",
    "key",
    "app/billing/rate",
    "\0",
    "\u202e",
    "é" * 40,
    "\U0001f996",
    "a" * 300,
)
_RAW: Final = (
    b"\xc1",  # no MessagePack at all
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\xde\xff\xff",
    b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7),
    b"\xca\x7f\xc0\x00\x00", b"\xcb\x7f\xf8" + bytes(6), b"\xcb\x7f\xf0" + bytes(6),  # NaN, ±inf
    b"\xcb\xff\xf0" + bytes(6),
    b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80",  # no UTF-8; a lone surrogate
    b"\xd6\xff" + bytes(4), b"\xd7\xff" + b"\xff" * 8, b"\xc7\x0c\xff" + b"\xff" * 12,  # times
    b"\xd4\x05\x00", b"\xc7\x00\x07",  # other extension types
    b"\x82\xa1a\x01\xa1a\x02",  # one key twice
    b"\x91" * 3000 + b"\xc0", b"\x81\xa1a" * 1500 + b"\xc0", b"\xc0", b"\xc3",
)  # fmt: skip
"""Parts of MessagePack that a decoder is seldom shown."""


_encoder: Final = msgspec.msgpack.Encoder()


@functools.cache
def _info(of: Any) -> inspect.Type:
    return inspect.type_info(of)


def _drawn(info: inspect.Type, chance: Random, wrong: list[int]) -> Any:
    """A plain value of the type; the part at which ``wrong`` counts down to 0 is another."""
    wrong[0] -= 1
    if wrong[0] == 0:
        return _strange(chance)
    match info:
        case inspect.IntType():
            return chance.choice(_NUMBERS)
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.FloatType():
            return chance.random()
        case inspect.NoneType():
            return None
        case inspect.StrType():
            return chance.choice(_TEXTS)
        case inspect.BytesType():
            return chance.randbytes(chance.choice((0, 1, 2, 16, 32, 64, 200)))
        case inspect.LiteralType(values=values):
            return chance.choice(values)
        case inspect.TupleType(item_types=items):
            return [_drawn(item, chance, wrong) for item in items]
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return [_drawn(item, chance, wrong) for _ in range(chance.choice(_ITEMS))]
        case inspect.DictType(key_type=key, value_type=value):
            return {
                _drawn(key, chance, [0]): _drawn(value, chance, wrong)
                for _ in range(chance.choice(_ITEMS))
            }
        case inspect.AnyType():
            return chance.choice((None, 1, "text", [1, [2]], {"a": None}))
        case inspect.UnionType(types=types):
            return _drawn(chance.choice(types), chance, wrong)
        case inspect.StructType():
            return _struct(info, chance, wrong)
        case _:
            raise AssertionError(f"draw a {info} too")


def _struct(info: inspect.StructType, chance: Random, wrong: list[int]) -> Any:
    values = [_drawn(field.type, chance, wrong) for field in info.fields]
    if info.array_like:
        return ([] if info.tag is None else [info.tag]) + values
    named = {
        field.encode_name: value
        for field, value in zip(info.fields, values, strict=True)
        if field.required or chance.random() < 0.5
    }
    return named if info.tag is None else {info.tag_field: info.tag, **named}


def _strange(chance: Random) -> Any:
    kind = chance.randrange(5)
    if kind == 0:
        return chance.choice(_WRONG_NUMBERS)
    if kind == 1:
        return chance.choice((None, True, 1.5, "text", b"bytes", [], {}, [[]], {"a": 1}))
    if kind == 2:
        return chance.choice(_NUMBERS)
    return msgspec.Raw(chance.choice(_RAW))


def message(of: Any, chance: Random) -> bytes:
    """What a decoder of MessagePack for the type ``of`` is to be fed."""
    kind = chance.random()
    wrong = [chance.randint(1, 30)] if 0.2 < kind < 0.6 else [0]
    data = _encoder.encode(_drawn(_info(of), chance, wrong))
    return spoilt(data, chance, ()) if kind >= 0.6 else data[:CASE_BYTES_MAX]


def good(of: Any, chance: Random) -> bytes:
    """A valid encoding, but for what only a type's own checks would refuse."""
    return _encoder.encode(_drawn(_info(of), chance, [0]))


def spoilt(data: bytes, chance: Random, others: tuple[bytes, ...]) -> bytes:
    """``data`` with one to four changes. ``others`` are valid encodings to be spliced with."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = _changed(data, chance, others)
    return data[:CASE_BYTES_MAX]


def _changed(data: bytes, chance: Random, others: tuple[bytes, ...]) -> bytes:
    at, to = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
    match chance.randrange(10):
        case 0 if data:  # a flipped bit
            at = min(at, len(data) - 1)
            return data[:at] + bytes((data[at] ^ 1 << chance.randrange(8),)) + data[at + 1 :]
        case 1:  # another byte
            return data[:at] + chance.choice((b"\0", b"\xff", chance.randbytes(1))) + data[at + 1 :]
        case 2:  # cut off
            return data[:at]
        case 3:  # extended
            return data + chance.randbytes(chance.choice((1, 4, 80)))
        case 4:  # a piece left out
            return data[:at] + data[min(to, at + 16) :]
        case 5:  # a piece twice
            return data[:to] + data[at:]
        case 6:  # its end is that of another
            return data[:at] + chance.choice(others or (data,))[at:]
        case 7:  # a strange part instead of a byte
            return data[:at] + chance.choice(_RAW) + data[at + 1 :]
        case 8:  # a number of up to eight bytes, at its limits
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice((bytes(size), b"\xff" * size, b"\x7f" + b"\xff" * (size - 1)))
            return data[:at] + number + data[at + size :]
        case _:  # noise
            return data[:at] + chance.randbytes(min(to - at, 40)) + data[to:]
