from __future__ import annotations

import random
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.codec import MAX_PAYLOAD_BYTES, Decoder, compress, convert, decompress, encode, is_json
from protocol.errors import ErrorCode, Rejected
from protocol.messages import Observation

observations: Decoder[Observation | list[Observation]] = Decoder(Observation | list[Observation])
one: Decoder[Observation] = Decoder(Observation)

names = st.text(max_size=128)
numbers = st.integers(0, 2**53)
messages = st.builds(
    Observation,
    battle=names,
    step=numbers,
    actor=names,
    features=st.none() | st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=9),
    state=st.none() | st.dictionaries(st.text(), st.integers(-(2**53), 2**53) | st.text() | st.booleans(), max_size=4),
    legal=st.none() | st.lists(st.booleans(), max_size=9),
    reward=st.none() | st.floats(-1, 1),
    done=st.booleans(),
    taken=st.none() | numbers,
    id=st.none() | st.text() | st.integers(-(2**53), 2**53),
)


class Settings(msgspec.Struct):
    """A message with nested names."""

    limits: dict[int, int] = {}
    names: dict[str, int] = {}
    inner: Observation | None = None


def refused(decoder: Decoder[Any], payload: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        decoder.decode(payload)
    assert caught.value.code == ErrorCode.MALFORMED
    return caught.value


@given(messages | st.lists(messages, max_size=3), st.booleans())
def test_a_message_comes_back_in_both_formats(message: Observation | list[Observation], as_json: bool) -> None:
    payload = encode(message, as_json=as_json)
    assert is_json(payload) is as_json
    assert observations.decode(payload) == message


@pytest.mark.parametrize("payload", [b"", b" {}", b"\n[]", b"\t{}", b"\r\n{}", b"{", b"["])
def test_json_is_told_by_its_first_byte(payload: bytes) -> None:
    assert is_json(payload)


def test_message_pack_is_told_by_its_first_byte() -> None:
    first = {
        encode(value, as_json=False)[0] for value in [{}, [], [0] * 20, {str(n): n for n in range(20)}, [0] * 70_000]
    }
    assert first == {0x80, 0x90, 0xDC, 0xDE, 0xDD}
    assert not any(is_json(bytes([byte])) for byte in first)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"battle": "b"}, "step"),
        ({"battle": 1, "step": 1}, "battle"),
        ({"battle": "b", "step": -1}, "step"),
        ({"battle": "b", "step": 2**53 + 1}, "step"),
        ({"battle": "b", "step": 1, "id": 2**60}, "id"),
        ({"battle": "b" * 129, "step": 1}, "battle"),
        ({"battle": "b", "step": 1, "features": [1.0, "x"]}, "features[1]"),
        ([{"battle": "b", "step": 1}, {"battle": "b"}], "[1].step"),
        ([{"battle": "b", "step": 1, "legal": [True, 2]}], "[0].legal[1]"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_the_wrong_field_is_named(value: Any, field: str, as_json: bool) -> None:
    assert refused(observations, encode(value, as_json=as_json)).field == field


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b'{"limits":{"1":"x"}}', "limits[...]"),
        (b'{"limits":{"x":1}}', "limits"),
        (b'{"inner":{"battle":"b"}}', "inner.step"),
        (b'"text"', None),
        (b"\xa4text", None),
        (b"[1]", None),
    ],
)
def test_fields_within_fields_are_named(payload: bytes, field: str | None) -> None:
    assert refused(Decoder(Settings), payload).field == field


def readable(decoder: Decoder[Any], payload: bytes) -> bool:
    """Whether it decodes. An error of another kind than `Rejected` is a failure of the test."""
    try:
        decoder.decode(payload)
    except Rejected:
        return False
    return True


def test_unknown_fields_are_ignored() -> None:
    assert one.decode(b'{"battle":"b","step":1,"mood":"good"}') == Observation(battle="b", step=1)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b'{"battle":"\xff","step":1}',
        b"\x82\xa6battle\xa1\xff\xa4step\x01",
        b'{"battle":"b","step":1,"features":[1e999]}',
        b'{"battle":"b","step":99999999999999999999999}',
        b'{"battle":"b","step":1,"features":[NaN]}',
        b'{"battle":"b","step":1}}',
        b'{"battle":"b","step":1,"state":{"a":' + b"[" * 100_000,
        b"\x83\xa6battle\xa1b\xa4step\x01\xa5state\x81\xa1a" + b"\x91" * 100_000,
        b"\x83\xa6battle\xa1b\xa4step\x01\xa5state\x81\xa1a\x81\x80\x01",
    ],
)
def test_what_cannot_be_read_is_refused(payload: bytes) -> None:
    assert refused(one, payload).text


@given(st.binary(max_size=200))
@example(
    b"\x83\xa6battle\xa1b\xa4step\x01\xa5state\x81\xa1a\xc7\x0c\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff"
)
def test_any_bytes_are_a_message_or_refused(payload: bytes) -> None:
    readable(observations, payload)  # any error but `Rejected` fails the test


@given(messages, st.booleans(), st.data())
def test_a_damaged_message_is_a_message_or_refused(message: Observation, as_json: bool, data: st.DataObject) -> None:
    payload = bytearray(encode(message, as_json=as_json))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    readable(one, bytes(payload))  # any error but `Rejected` fails the test


def test_a_decoded_value_becomes_a_message() -> None:
    assert convert({"battle": "b", "step": 3}, Observation) == Observation(battle="b", step=3)
    with pytest.raises(Rejected) as caught:
        convert({"battle": "b", "step": "3"}, Observation)
    assert (caught.value.code, caught.value.field) == (ErrorCode.MALFORMED, "step")


@given(messages)
def test_what_was_compressed_comes_back(message: Observation) -> None:
    assert one.decode(decompress(compress(message))) == message


@pytest.mark.parametrize("size", [0, 1, 255, 32_768, 65_536, 100_000])
def test_a_stream_may_unpack_to_the_limit_and_no_further(size: int) -> None:
    for data in (bytes(size), random.Random(size).randbytes(size)):
        packed = zlib.compress(data, 1)
        assert decompress(packed, max(size, 1)) == data
        assert decompress(packed, size + 1) == data
        if size > 1:
            with pytest.raises(Rejected, match=f"more than {size - 1} bytes"):
                decompress(packed, size - 1)


def test_a_small_payload_cannot_fill_the_memory() -> None:
    bomb = zlib.compress(bytes(64 * 1024 * 1024), 9)
    assert len(bomb) < MAX_PAYLOAD_BYTES
    with pytest.raises(Rejected, match="more than"):
        decompress(bomb)


@pytest.mark.parametrize("payload", [b"", b"not zlib", zlib.compress(b"whole")[:-1], zlib.compress(b"x" * 999)[:5]])
def test_what_is_no_whole_stream_is_refused(payload: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        decompress(payload)
    assert caught.value.code == ErrorCode.MALFORMED
