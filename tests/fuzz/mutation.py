"""Damage to messages, at two levels: values inside a message that is still well-formed, and its bytes.

Both fuzzers use it. Bytes alone seldom get past a parser; values alone never try the parser itself.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

import msgspec

from protocol.codec import MAX_PAYLOAD_BYTES

DEPTHS = (50, 1000, 20_000)

NUMBERS = (
    0, -1, 1, 255, 2**31, 2**32 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**400,
    0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", "\0", "\ud800", "a\udfffb", "\u202e", "é" * 100, "x" * 70_000, "../../etc/passwd", "+/#", "$share/x", "null",
    "1970-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "0000-00-00T00:00:00Z", "f" * 64, "%s{0}", "-" * 64,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    b"",
    [None] * 5000,
    {str(number): number for number in range(2000)},
)

# Where MessagePack says how long something is, and nothing of it follows; an extension; a time; keys that are no text.
HEADERS = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\xde\xff\xff", b"\xc1", b"\xd4\x05\x00",
    b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x0c\xff" + b"\xff" * 12, b"\x81\x01\x01", b"\x81\x90\x01", b"\x81\x80\x01",
    b"\xcb\x7f\xf8" + bytes(6),
)  # fmt: skip
PIECES = (b"[", b"{", b"]", b"}", b'"', b",", b":", b"NaN", b"1e999", b"-", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"\0")


def mutated(data: bytes, random: Random) -> bytes:
    """`data` with one to four things wrong, cut at the length of the longest message."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = _with_another_value(data, random) if random.random() < 0.6 else _with_other_bytes(data, random)
        data = data[:MAX_PAYLOAD_BYTES]  # what is longer, no broker of ours would pass on
    return data


def _with_another_value(data: bytes, random: Random) -> bytes:
    """Change one value of a message in JSON or MessagePack; other bytes as bytes."""
    for decode, encode in ((json.loads, _json), (msgspec.msgpack.decode, _messagepack)):
        try:
            value = decode(data)
            return encode(_changed(value, random))
        except (ValueError, OverflowError, RecursionError, TypeError):
            continue
    return _with_other_bytes(data, random)


def _changed(value: Any, random: Random) -> Any:
    """A copy with one node changed; text and bytes that hold a message of their own are looked into."""
    if random.random() < 0.85:
        match value:
            case dict() if value:
                return _changed_object(value, random)
            case list() if value:
                index = random.randrange(len(value))
                changed = [*value[:index], _changed(value[index], random), *value[index + 1 :]]
                return changed * random.choice((1, 1, 1, 1, 2, 3))
            case str() if value[:1] in ("{", "["):
                return _with_another_value(value.encode(), random).decode("utf-8", "replace")
            case bytes() if value:
                return mutated(value, random)
    return _nasty(random)


def _changed_object(value: dict[Any, Any], random: Random) -> dict[Any, Any]:
    key = random.choice(list(value))
    what = random.random()
    if what < 0.1:
        return {name: item for name, item in value.items() if name != key}
    if what < 0.15:
        return {**value, random.choice(TEXTS): value[key]}
    return {**value, key: _changed(value[key], random)}


def _nasty(random: Random) -> Any:
    if random.random() < 0.1:
        return _nested(random)
    return random.choice(random.choice((NUMBERS, TEXTS, OTHERS)))


def _nested(random: Random) -> Any:
    value: Any = random.choice(([], {}))
    for _ in range(random.choice((50, 400, 900))):
        value = {"a": value} if random.random() < 0.5 else [value]
    return value


def _json(value: Any) -> bytes:
    return json.dumps(value, default=lambda item: item.decode("latin-1")).encode()


def _messagepack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def _with_other_bytes(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    at = random.randrange(len(changed) + 1)
    match random.randrange(8):
        case 0:
            return bytes(changed[:at])
        case 1:
            return bytes(changed[at:])
        case 2 if at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        case 3 if at < len(changed):
            changed[at] = random.choice((0x00, 0x7F, 0x80, 0xC1, 0xFF, random.randrange(256)))
        case 4:
            changed[at : at + random.choice((0, 4))] = random.choice((0, 1, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
        case 5:
            changed[at:at] = random.choice(HEADERS)
        case 6:
            changed[at:at] = random.choice(PIECES) * random.choice((1, 2, *DEPTHS))
        case _:
            end = random.randrange(at, len(changed) + 1)
            changed[at:at] = changed[at:end] * random.choice((1, 3))
    return bytes(changed)


def raw(random: Random) -> bytes:
    """Bytes that never were a message."""
    match random.randrange(4):
        case 0:
            return random.randbytes(random.choice((0, 1, 2, 7, 64, 1000)))
        case 1:
            return random.choice((b"[", b'{"a":', b"\x91", b"\x81\xa1a")) * random.choice(DEPTHS)
        case 2:
            return random.choice(HEADERS) + random.randbytes(random.randrange(20))
        case _:
            return random.choice((b"\x80", b"\x90", b"[],", b"\xc0", b"1,")) * random.choice((10, 5000, 40_000))
