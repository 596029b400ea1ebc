"""A host that signs whatever it is told to: a good one, a careless one, or an attacker with some of the keys."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from securesystemslib.signer import CryptoSigner, Signer  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from protocol import wishes
from protocol.features import Feature, FeatureSpec
from protocol.messages import MetadataSet
from protocol.release import Golden, Release, Tensor, to_custom
from protocol.wishes import Pin, Withdrawal

NOW = datetime.now(UTC).replace(microsecond=0)
ROLES = ("root", "targets", "snapshot", "timestamp")

Keys = dict[str, list[Signer]]


def new_keys(roles: Collection[str] = ROLES) -> Keys:
    return {role: [CryptoSigner.generate_ed25519()] for role in roles}


def release(version: int = 1, slot: str = "combat") -> Release:
    """A release of a model that nobody has."""
    return Release(
        slot=slot,
        version=version,
        digest=f"{version:064x}",
        length=1000,
        manifest="f" * 64,
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=(Feature(path="round", scale=0.05),)),
        golden=Golden(inputs=((0.25,),), outputs=((0.1, -1.5),), tolerance=1e-5),
    )


def target_of(released: Release, path: str | None = None) -> TargetFile:
    fields = {"custom": to_custom(released)}
    return TargetFile(released.length, {"sha256": released.digest}, path or released.target, fields)


class Host:
    """Metadata as plain values, to change at will, and to sign.

    Args:
        keys: Of each role; new ones by default.
        published: Go on from this set, which these keys have signed, instead of from nothing.
    """

    def __init__(
        self, keys: Mapping[str, Sequence[Signer]] | None = None, published: MetadataSet | None = None
    ) -> None:
        self.keys: Keys = {role: list(signers) for role, signers in (keys or new_keys()).items()}
        if published is not None:
            self.roots = list(published.roots)
            self.root = Metadata[Root].from_bytes(self.roots[-1]).signed
            self.targets = Metadata[Targets].from_bytes(published.targets).signed
            self.snapshot = Metadata[Snapshot].from_bytes(published.snapshot).signed
            self.timestamp = Metadata[Timestamp].from_bytes(published.timestamp).signed
            return
        expires = NOW + timedelta(days=10)
        self.root = Root(expires=expires, consistent_snapshot=True)
        for role, signers in self.keys.items():
            for signer in signers:
                self.root.add_key(signer.public_key, role)
        self.roots = [self.signed(self.root, self.keys["root"])]
        self.targets = Targets(expires=expires)
        self.snapshot = Snapshot(expires=expires)
        self.timestamp = Timestamp(expires=expires)

    @staticmethod
    def signed(what: Any, signers: Sequence[Signer]) -> bytes:
        envelope: Metadata[Any] = Metadata(copy.deepcopy(what))
        for signer in signers:
            envelope.sign(signer, append=True)
        return bytes(envelope.to_bytes())

    def publish(self, *releases: Release) -> MetadataSet:
        """Count all versions up, release these and no others, and sign everything."""
        self.count_up()
        self.targets.targets = {one.target: target_of(one) for one in releases}
        return self.set()

    def count_up(self, by: int = 1) -> None:
        for part in (self.targets, self.snapshot, self.timestamp):
            part.version += by

    def wish(self, *wished: Pin | Withdrawal) -> None:
        self.targets.unrecognized_fields[wishes.FIELD] = wishes.to_field(wished)

    def set(self, **signers: Sequence[Signer]) -> MetadataSet:
        """Sign everything as it stands, with the right keys unless others are given."""
        keys = {**self.keys, **signers}
        targets = self.signed(self.targets, keys["targets"])
        self.snapshot.meta["targets.json"] = MetaFile.from_data(self.targets.version, targets, ["sha256"])
        snapshot = self.signed(self.snapshot, keys["snapshot"])
        self.timestamp.snapshot_meta = MetaFile.from_data(self.snapshot.version, snapshot, ["sha256"])
        return MetadataSet(
            roots=list(self.roots),
            timestamp=self.signed(self.timestamp, keys["timestamp"]),
            snapshot=snapshot,
            targets=targets,
        )

    def next_root(self, signers: Sequence[Signer], version: int | None = None) -> None:
        self.root.version = version or self.root.version + 1
        self.roots.append(self.signed(self.root, signers))

    def rotate(self, *roles: str) -> Keys:
        """Give roles new keys in a new root, signed as it should be; the old keys."""
        old = {role: self.keys[role] for role in ROLES}
        for role in roles:
            self.replace_keys(role)
        self.next_root([*old["root"], *(self.keys["root"] if "root" in roles else [])])
        return old

    def replace_keys(self, role: str) -> None:
        """Name a new key for a role in the next root."""
        for signer in self.keys[role]:
            self.root.revoke_key(signer.public_key.keyid, role)
        self.keys = {**self.keys, role: new_keys([role])[role]}
        self.root.add_key(self.keys[role][0].public_key, role)

    def need_two(self, role: str) -> None:
        """Give a role a second key and a threshold of two, in the first root: before any device is provisioned."""
        self.keys[role].append(CryptoSigner.generate_ed25519())
        self.root.add_key(self.keys[role][1].public_key, role)
        self.root.roles[role].threshold = 2
        self.roots = [self.signed(self.root, self.keys["root"])]
