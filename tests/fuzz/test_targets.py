"""Each target of `tests.fuzz.targets` with some spoilt messages: no error but ours gets out, and memory stays bounded.

`make fuzz` looks further, for as long as one likes.
"""

from __future__ import annotations

import logging
import resource
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import MAX_PAYLOAD_BYTES
from tests.fuzz.mutation import mutated, raw
from tests.fuzz.targets import DIGEST, TARGETS, Attempt, Target

# The longest message, as the costliest thing to decode (an empty object for each byte), takes a tenth of this.
MEMORY_BYTES = 256 * 1024 * 1024
EXAMPLES = 100


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """The kernel refuses this process more, and a `MemoryError` is none of ours. On macOS it does not, and nothing is
    shown about memory."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


def outcome(target: Target, attempt: Attempt, data: bytes) -> str:
    """How one attempt ends, if as it may."""
    try:
        attempt(data)
    except target.raises:
        return "refused"
    return "taken"


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_messages(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    attempt = target.prepare(tmp_path)
    seeds = list(target.seeds())

    @settings(max_examples=EXAMPLES)
    @given(st.sampled_from(seeds), st.integers(0, 2**64 - 1))
    def spoil(seed: bytes, choice: int) -> None:
        outcome(target, attempt, mutated(seed, Random(choice)))

    spoil()


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_that_never_were_a_message(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    attempt = target.prepare(tmp_path)

    @settings(max_examples=EXAMPLES // 3)
    @given(st.one_of(st.binary(max_size=500), st.integers(0, 2**64 - 1).map(lambda choice: raw(Random(choice)))))
    def throw(data: bytes) -> None:
        outcome(target, attempt, data[:MAX_PAYLOAD_BYTES])

    throw()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_spoilt_was_good(name: str, tmp_path: Path) -> None:
    """Otherwise nothing would get further than the first check. What the target's own keys must have signed is not."""
    target = TARGETS[name]
    attempt = target.prepare(tmp_path)
    unsigned = name in ("trust.set", "trust.signed_root", "keys") or name.startswith("trust.altered")
    assert {outcome(target, attempt, seed) for seed in target.seeds()} == {"refused" if unsigned else "taken"}


# What was found, so that it is not lost again.

MANY = 43_000
FINDINGS: dict[str, tuple[str, bytes]] = {
    "a number of entities that fills the memory with zeros": (
        "features",
        b'{"spec": {"groups": [{"path": "u", "maximum": 4503599627370496, "features": [{"path": "h", "default": 0}]}]},'
        b' "state": {}}',
    ),
    "half a surrogate pair in a release": ("release.from_target", b'{"slot": "\xff"}'),
    "a release with a number beyond 64 bits": (
        "release.from_target",
        TARGETS["release.from_target"].seeds()[0].replace(b"[64]", b"[" + b"9" * 30 + b"]"),
    ),
    "half a surrogate pair in a wish": ("wishes.from_field", b'[{"wish": "pin", "slot": "\xff"}]'),
    "a wish for a version beyond 64 bits": (
        "wishes.from_field",
        b'[{"wish": "pin", "slot": "combat", "version": 99999999999999999999999}]',
    ),
    "half a surrogate pair from a game": (
        "serving",
        b'[{"battle": "\\ud800", "step": 1, "features": [NaN]}, {"\\ud800": 1}]',
    ),
    "a step beyond 64 bits, to be echoed": ("serving", b'{"battle": "b", "step": ' + b"9" * 30 + b"}"),
    "an id beyond 64 bits, to be echoed": ("serving", b'{"battle": "b", "step": 1, "id": ' + b"9" * 30 + b"}"),
    "a list whose answer is forty times as long": ("serving", b"[" + b"{}," * MANY + b"{}]"),
    "a deployment state that is no text": ("state", b'{"phase": "serving", "active": "\xff"}'),
    "an index of keys that is no text": ("keys", b'{"root": [{"uri": "\xff", "keyid": "k", "public": {}}]}'),
    "a release that is nested deeply": ("releases", b'{"a":' * 20_000),
    "a negative step, to be echoed": ("serving", b'{"battle": "b", "step": -1}'),
    "telemetry with a number beyond 64 bits": (
        "fleet.telemetry",
        b'{"at": 0, "uptime_s": 0, "memory_used_bytes": ' + b"9" * 30 + b"}",
    ),
    "an event with a version beyond 64 bits": (
        "fleet.events",
        b'{"at": 0, "kind": "x", "version": ' + b"9" * 30 + b"}",
    ),
    "a few kilobytes that unpack to millions of transitions": (
        "ingest",
        zlib.compress(
            b"\x85\xa5epoch\xa2e1\xa5acked\x00\xa5first\x01\xa4last\x02\xabtransitions\xdd\x00\x3f\x00\x00"
            + b"\x80" * 0x3F0000
        ),
    ),
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_findings(finding: str, tmp_path: Path) -> None:
    name, data = FINDINGS[finding]
    target = TARGETS[name]
    assert len(data) <= MAX_PAYLOAD_BYTES
    outcome(target, target.prepare(tmp_path), data)


def test_a_target_that_raises_something_else_would_be_noticed(tmp_path: Path) -> None:
    def broken(_data: bytes) -> None:
        raise KeyError(DIGEST)

    target = Target(lambda _folder: broken, lambda: [b"{}"], (ValueError,))
    with pytest.raises(KeyError):
        outcome(target, target.prepare(tmp_path), b"{}")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce a limit of memory")
def test_a_target_that_takes_too_much_memory_would_be_noticed(tmp_path: Path) -> None:
    target = Target(lambda _folder: lambda _data: bytearray(2 * MEMORY_BYTES), lambda: [b"{}"])
    with pytest.raises(MemoryError):
        outcome(target, target.prepare(tmp_path), b"{}")
