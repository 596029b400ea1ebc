"""Bytes to typed messages and back: JSON or MessagePack, told apart by the first byte.

Every payload of ours is an object or an array. In JSON those begin with `{`, `[` or white space; in MessagePack with
0x80-0x9f or 0xdc-0xdf. The two ranges do not meet.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, Generic, TypeVar

import msgspec

from protocol.errors import ErrorCode, Rejected

T = TypeVar("T")

MAX_PAYLOAD_BYTES = 128 * 1024
FIRST_OF_MESSAGEPACK = 0x80
_PATH = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")

_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()


class Decoder(Generic[T]):
    """Decodes one type of message from JSON or MessagePack, and names the field that is wrong.

    Raises (from `decode`):
        Rejected: With code `malformed`. `field` is the path of the offending field where the bytes could be parsed.
    """

    def __init__(self, message_type: type[T] | Any) -> None:
        self._json: msgspec.json.Decoder[T] = msgspec.json.Decoder(message_type)
        self._msgpack: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    def decode(self, payload: bytes) -> T:
        """Decode `payload` into the message type."""
        try:
            if is_json(payload):
                return self._json.decode(payload)
            return self._msgpack.decode(payload)
        except msgspec.ValidationError as error:
            raise _mistyped(error) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Rejected(ErrorCode.MALFORMED, f"neither JSON nor MessagePack: {error}") from error


def convert(value: Any, message_type: type[T]) -> T:
    """Turn a decoded value (lists, dicts, numbers) into a typed message.

    Raises:
        Rejected: With code `malformed`, naming the field.
    """
    try:
        return msgspec.convert(value, message_type)
    except msgspec.ValidationError as error:
        raise _mistyped(error) from error


def is_json(payload: bytes) -> bool:
    """Whether `payload` is to be read as JSON."""
    return not payload or payload[0] < FIRST_OF_MESSAGEPACK


def encode(message: Any, *, as_json: bool) -> bytes:
    """Encode a message as JSON or as MessagePack."""
    return _json.encode(message) if as_json else _msgpack.encode(message)


def compress(message: Any) -> bytes:
    """MessagePack, then zlib at its fastest level."""
    return zlib.compress(_msgpack.encode(message), 1)


def decompress(payload: bytes, limit_bytes: int = 4 * 1024 * 1024) -> bytes:
    """Undo the zlib half of `compress`, never yielding more than `limit_bytes`.

    Raises:
        Rejected: With code `malformed` when `payload` is no whole zlib stream, or would unpack to more.
    """
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(payload, limit_bytes)
    except zlib.error as error:
        raise Rejected(ErrorCode.MALFORMED, f"not a zlib stream: {error}") from error
    if not unpacker.eof:
        raise Rejected(ErrorCode.MALFORMED, f"zlib stream is cut short or unpacks to more than {limit_bytes} bytes")
    return data


def _mistyped(error: msgspec.ValidationError) -> Rejected:
    return Rejected(ErrorCode.MALFORMED, str(error), _field(str(error)))


def _field(text: str) -> str | None:
    """The dotted path of the offending field, taken from a msgspec message."""
    where = _PATH.search(text)
    path = where["path"].lstrip(".") if where else ""
    missing = _MISSING.search(text)
    if missing:
        return f"{path}.{missing['name']}" if path else missing["name"]
    return path or None
