"""What somebody without a signing key could put on the broker."""

from __future__ import annotations

import hashlib
import json

import msgspec

from protocol.codec import encode
from protocol.messages import MetadataSet


def tampered(metadata: bytes, target: str, model: bytes) -> bytes:
    """The metadata set with another model in the place of `target`'s: every length and hash fits, no signature does.

    Args:
        metadata: The set as the host published it.
        target: Path of the target to change.
        model: The bytes to smuggle in.
    """
    original = msgspec.msgpack.decode(metadata, type=MetadataSet)
    targets = json.loads(original.targets)
    entry = targets["signed"]["targets"][target]
    entry["length"] = len(model)
    entry["hashes"] = {"sha256": hashlib.sha256(model).hexdigest()}
    targets["signed"]["version"] += 1
    targets_bytes = json.dumps(targets).encode()
    snapshot = json.loads(original.snapshot)
    _refer(snapshot, "targets.json", targets["signed"]["version"], targets_bytes)
    snapshot["signed"]["version"] += 1
    snapshot_bytes = json.dumps(snapshot).encode()
    timestamp = json.loads(original.timestamp)
    _refer(timestamp, "snapshot.json", snapshot["signed"]["version"], snapshot_bytes)
    timestamp["signed"]["version"] += 1
    forged = MetadataSet(
        roots=original.roots, timestamp=json.dumps(timestamp).encode(), snapshot=snapshot_bytes, targets=targets_bytes
    )
    return encode(forged, as_json=False)


def _refer(role: dict[str, dict[str, dict[str, dict[str, object]]]], name: str, version: int, data: bytes) -> None:
    """Make a role's metadata point at other bytes."""
    meta = role["signed"]["meta"][name]
    meta["version"] = version
    if "length" in meta:
        meta["length"] = len(data)
    if "hashes" in meta:
        meta["hashes"] = {"sha256": hashlib.sha256(data).hexdigest()}
