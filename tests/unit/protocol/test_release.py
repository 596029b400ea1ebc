from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.formats import encode_canonical

from protocol.errors import Rejected
from protocol.features import Feature, FeatureSpec, Group
from protocol.release import (
    CHUNK_BYTES,
    MAX_MODEL_BYTES,
    Golden,
    Lineage,
    Release,
    Tensor,
    chunked,
    from_target,
    manifest_digests,
    manifest_of,
    target_path,
    to_custom,
)

RELEASE = Release(
    slot="combat",
    version=3,
    digest="0a" * 32,
    length=CHUNK_BYTES + 1,
    manifest="1b" * 32,
    inputs=(Tensor(name="x", shape=(1, 4), dtype="float32"),),
    outputs=(Tensor(name="y", shape=(1, 2), dtype="float32"),),
    actions=("attack", "défend"),
    features=FeatureSpec(
        groups=(Group(path="characters", maximum=2, features=(Feature(path="health", divide_by="maxHealth"),)),),
        features=(Feature(path="round", scale=0.05, clip=(0.0, 1.0)), Feature(path="mood", default=0.25)),
    ),
    golden=Golden(inputs=((0.1, 0.2, 0.3, 0.4),), outputs=((0.75, 1e-7),), tolerance=1e-4),
    operators={"FULLY_CONNECTED": 9},
    latency_budget_ms=2.5,
    notes='says "more"\n',
    lineage=Lineage(recipe="clone", transitions=12, seed=7, settings={"rate": 1e-3}, metrics={"accuracy": 0.91}),
)


def rebuilt(custom: object, path: str = "combat/3.tflite", **target: Any) -> Release:
    return from_target(path, **{"length": RELEASE.length, "digest": RELEASE.digest, "custom": custom, **target})


def altered(**fields: Any) -> dict[str, Any]:
    found = json.loads(to_custom(RELEASE)["release"])
    return {"release": json.dumps({**found, **fields})}


def test_a_release_comes_back_from_its_target() -> None:
    assert rebuilt(to_custom(RELEASE)) == RELEASE
    assert rebuilt(json.loads(json.dumps(to_custom(RELEASE)))) == RELEASE


def test_a_release_can_be_signed() -> None:
    """TUF signs canonical JSON, in which there are no fractions."""
    custom = to_custom(RELEASE)
    signed = encode_canonical({**custom, "unknown": 1})
    assert signed is not None
    assert "0.75" in signed
    assert rebuilt(json.loads(signed)) == RELEASE


def test_length_and_digest_are_the_signed_targets_own() -> None:
    assert '"digest"' not in to_custom(RELEASE)["release"]
    found = rebuilt(altered(digest="ff" * 32, length=1), digest="2c" * 32, length=77)
    assert (found.digest, found.length) == ("2c" * 32, 77)


def test_what_a_release_says_of_itself() -> None:
    assert RELEASE.target == target_path("combat", 3) == "combat/3.tflite"
    lengths = (1, CHUNK_BYTES, CHUNK_BYTES + 1, MAX_MODEL_BYTES)
    assert [msgspec.structs.replace(RELEASE, length=length).chunk_count for length in lengths] == [1, 1, 2, 2048]


@pytest.mark.parametrize(
    "custom",
    [
        None,
        "text",
        {},
        {"release": None},
        {"release": {"slot": "combat"}},
        {"release": ""},
        {"release": "[]"},
        {"release": "{}"},
        {"release": "{"},
        {"release": '{"lineage":' + '{"settings":' + "[" * 100_000},
        altered(version=0),
        altered(version="3"),
        altered(golden=None),
        altered(inputs=[{"name": "x", "shape": ["1"], "dtype": "float32"}]),
        altered(features={"features": [{}]}),
    ],
)
def test_what_is_no_release_is_refused(custom: object) -> None:
    with pytest.raises(Rejected) as caught:
        rebuilt(custom)
    assert (caught.value.code, caught.value.field) == ("bad_release", "custom")


@pytest.mark.parametrize("path", ["combat/4.tflite", "movement/3.tflite", "combat/03.tflite", "combat/3", ""])
def test_a_release_of_another_slot_or_version_is_refused(path: str) -> None:
    with pytest.raises(Rejected, match="describes") as caught:
        rebuilt(to_custom(RELEASE), path)
    assert caught.value.code == "bad_release"


def test_names_and_digests_are_checked() -> None:
    for custom, digest, code, field in (
        (altered(slot="../x"), RELEASE.digest, "bad_name", "slot"),
        (altered(manifest="1B" * 32), RELEASE.digest, "bad_digest", "manifest"),
        (altered(), "short", "bad_digest", "digest"),
    ):
        with pytest.raises(Rejected) as caught:
            rebuilt(custom, digest=digest)
        assert (caught.value.code, caught.value.field) == (code, field)


def test_a_model_is_no_larger_than_one_manifest_can_list() -> None:
    assert rebuilt(to_custom(RELEASE), length=MAX_MODEL_BYTES).chunk_count * 32 == CHUNK_BYTES
    with pytest.raises(Rejected) as caught:
        rebuilt(to_custom(RELEASE), length=MAX_MODEL_BYTES + 1)
    assert (caught.value.code, caught.value.field) == ("bad_release", "length")
    with pytest.raises(Rejected):
        rebuilt(to_custom(RELEASE), length=0)


@given(st.integers(1, 4), st.integers(-1, 1))
def test_chunks_and_manifest_describe_the_model(count: int, more: int) -> None:
    model = (b"0123456789abcdef" * (CHUNK_BYTES // 16 * count) + b"x")[: CHUNK_BYTES * count + more]
    chunks = chunked(model)
    assert b"".join(chunks) == model
    assert len(chunks) == msgspec.structs.replace(RELEASE, length=len(model)).chunk_count
    assert all(len(chunk) == CHUNK_BYTES for chunk in chunks[:-1])
    assert manifest_digests(manifest_of(chunks)) == [hashlib.sha256(chunk).hexdigest() for chunk in chunks]


@pytest.mark.parametrize("manifest", [b"", b"x" * 31, b"x" * 33])
def test_what_is_no_manifest_is_refused(manifest: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        manifest_digests(manifest)
    assert caught.value.code == "bad_manifest"
