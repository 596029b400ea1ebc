"""A release: what signed metadata says about one model for one slot.

It is the `custom` field of a TUF target named `<slot>/<version>.tflite`; length and SHA-256 of the model stand in the
target itself (TUF specification section 4.5). The model travels in chunks. The list of their digests, the *manifest*,
is content-addressed and fetched like a chunk, so a release stays small however large its model is.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from protocol.errors import Rejected
from protocol.features import FeatureSpec
from protocol.topics import checked_digest, checked_name

CHUNK_BYTES = 64 * 1024
DIGEST_BYTES = 32
MAX_MODEL_BYTES = CHUNK_BYTES * (CHUNK_BYTES // DIGEST_BYTES)

Positive = Annotated[int, Meta(gt=0)]


class Tensor(Struct, frozen=True, kw_only=True):
    """One input or output of a model: its name, shape and NumPy type name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Golden(Struct, frozen=True, kw_only=True):
    """Inputs with the outputs they must give, within an absolute tolerance, on whatever CPU."""

    inputs: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]
    tolerance: float


class Lineage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a model comes from: enough to train it again, and to say how good it was."""

    recipe: str = ""
    transitions: int = 0
    data_from: float = 0.0
    data_to: float = 0.0
    seed: int = 0
    parent: str = ""
    settings: dict[str, Any] = {}
    metrics: dict[str, float] = {}


class Release(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version of one slot's model.

    Attributes:
        slot: Which slot it is for.
        version: Counts up by slot; a device never goes back by itself except by rollback.
        digest: SHA-256 of the model file, from the signed target.
        length: Bytes of the model file, from the signed target.
        manifest: SHA-256 of the manifest.
        inputs: Tensor signature.
        outputs: Tensor signature.
        actions: Name of each action, in the order of the output.
        features: How a structured state becomes the input vector.
        golden: Reference answers.
        operators: Built-in operator name to the version it needs.
        latency_budget_ms: Absolute bound of one inference, or `None`.
        notes: For people.
        lineage: Where it comes from.
    """

    slot: str
    version: Annotated[int, Meta(ge=0)]
    digest: str
    length: Positive
    manifest: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    actions: tuple[str, ...]
    features: FeatureSpec
    golden: Golden
    operators: dict[str, int] = {}
    latency_budget_ms: float | None = None
    notes: str = ""
    lineage: Lineage = Lineage()

    @property
    def target(self) -> str:
        """The TUF target path."""
        return target_path(self.slot, self.version)

    @property
    def chunk_count(self) -> int:
        """How many chunks the model has."""
        return -(-self.length // CHUNK_BYTES)


def target_path(slot: str, version: int) -> str:
    """The TUF target path of a slot's version."""
    return f"{slot}/{version}.tflite"


def to_custom(release: Release) -> dict[str, Any]:
    """What goes into the target's `custom` field: all that the target does not say itself.

    It is one JSON text, because TUF signs canonical JSON, which has no fractions.
    """
    fields: dict[str, Any] = msgspec.to_builtins(release)
    del fields["digest"], fields["length"]
    return {"release": msgspec.json.encode(fields).decode()}


def from_target(path: str, length: int, digest: str, custom: object) -> Release:
    """Rebuild a release from a *verified* target.

    Raises:
        Rejected: With code `bad_release` when the fields are not a release, or name another slot or version than the
            path does; with `bad_name` or `bad_digest` when a name or a digest in it is not one.
    """
    text = custom.get("release") if isinstance(custom, dict) else None
    if not isinstance(text, str):
        raise Rejected("bad_release", f"target {path} says nothing about its model", "custom")
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
        release = msgspec.convert({**fields, "digest": digest, "length": length}, Release)
        msgspec.msgpack.encode(release)  # it is to be passed on, and whole numbers end at 64 bits there
    except (ValueError, OverflowError, RecursionError) as error:  # a ValueError also for text that is none
        raise Rejected("bad_release", f"target {path}: {error}", "custom") from error
    checked_name(release.slot, "slot")
    checked_digest(release.digest)
    checked_digest(release.manifest, "manifest")
    if release.target != path:
        raise Rejected("bad_release", f"target {path} describes {release.target}", "custom")
    if release.length > MAX_MODEL_BYTES:
        raise Rejected(
            "bad_release", f"target {path} has {release.length} bytes, more than {MAX_MODEL_BYTES}", "length"
        )
    return release


def chunked(model: bytes) -> list[bytes]:
    """Cut a model into its chunks."""
    return [model[start : start + CHUNK_BYTES] for start in range(0, len(model), CHUNK_BYTES)]


def manifest_of(chunks: list[bytes]) -> bytes:
    """The manifest: the chunks' SHA-256 digests, 32 bytes each, in order."""
    return b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)


def manifest_digests(manifest: bytes) -> list[str]:
    """The chunks' digests in hexadecimal, in order.

    Raises:
        Rejected: With code `bad_manifest` when it is no sequence of digests.
    """
    if not manifest or len(manifest) % DIGEST_BYTES:
        raise Rejected(
            "bad_manifest", f"a manifest of {len(manifest)} bytes is no sequence of {DIGEST_BYTES}-byte digests"
        )
    return [manifest[start : start + DIGEST_BYTES].hex() for start in range(0, len(manifest), DIGEST_BYTES)]
