"""What a host does to the devices over weeks, signed with real keys: releases, pins, withdrawals, a change of keys; and
what somebody without the keys makes of it.

A model is a few kilobytes whose first line says how it behaves; the simulated processes act accordingly. Histories are
made from their number alone, keys and all, so the same seed finds the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from protocol import wishes
from protocol.codec import MAX_PAYLOAD_BYTES, encode
from protocol.features import Feature, FeatureSpec
from protocol.messages import MetadataSet
from protocol.release import Golden, Release, Tensor, chunked, manifest_of, to_custom
from protocol.wishes import Pin, Withdrawal

DEVICE = "pi-1"
SLOTS = ("combat", "movement")
ROLES = ("root", "timestamp", "snapshot", "targets")
HISTORIES = 64
KEPT_VERSIONS = 4
STOLEN_KEY = "the timestamp's key alone"
VALID, EXPIRED = datetime(2099, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=UTC)

# How a model behaves, and where that shows.
GOOD = "good"
SLOW = "slow"  # in the trial
TIRING = "tiring"  # in the watch
NAN = "nan"  # when it is qualified
LATE_NAN = "late-nan"  # in the trial
CRASHES_STAGER = "crashes-stager"
HANGS_STAGER = "hangs-stager"
CRASHES_TRIAL = "crashes-trial"
CRASHES_WORKER = "crashes-worker"
EATS_MEMORY_IN_TRIAL = "eats-memory-in-trial"  # and takes the whole daemon with it
CUTS_POWER_IN_TRIAL = "cuts-power-in-trial"  # by the current it takes
EATS_MEMORY_IN_WORKER = "eats-memory-in-worker"
MISLED = "misled"  # its manifest leads to other bytes
BAD = (
    SLOW,
    TIRING,
    NAN,
    LATE_NAN,
    CRASHES_STAGER,
    HANGS_STAGER,
    CRASHES_TRIAL,
    CRASHES_WORKER,
    EATS_MEMORY_IN_TRIAL,
    CUTS_POWER_IN_TRIAL,
    EATS_MEMORY_IN_WORKER,
    MISLED,
)
# What every device refuses, or rolls back, that has a model to go back to.
REFUSED = tuple(behaviour for behaviour in BAD if behaviour != EATS_MEMORY_IN_WORKER)

Signers = dict[str, CryptoSigner]


@dataclass(frozen=True)
class Published:
    """One metadata set of the host.

    Attributes:
        payload: As it is on the broker.
        version: Of its timestamp.
        releases: What it names.
        wishes: What it wishes.
        what: For the trace.
    """

    payload: bytes
    version: int
    releases: tuple[Release, ...]
    wishes: tuple[Pin | Withdrawal, ...]
    what: str


@dataclass
class History:
    """All that one host publishes, in order, and what it can send.

    Attributes:
        root: What the device was provisioned with.
        slots: Which the device has.
        published: The sets.
        forged: What somebody else publishes.
        challenge: Index of the set with which the end begins: the release of a bad model, if there is one.
        challenger: That release.
        answered: Index of the set after it.
        end: Index of the set after that: a last release, which is good.
        models: Each model's bytes, by digest.
        manifests: Each model's manifest, by the model's digest.
    """

    root: bytes = b""
    slots: tuple[str, ...] = ()
    published: list[Published] = field(default_factory=list)
    forged: list[tuple[str, bytes]] = field(default_factory=list)
    challenge: int = 0
    challenger: Release | None = None
    answered: int = 0
    end: int = 0
    models: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)

    def manifest(self, digest: str) -> bytes:
        """As the host's repository."""
        return self.manifests[digest]

    def chunk(self, digest: str, index: int) -> bytes:
        """As the host's repository. A model that is misled has the chunks that its manifest lists."""
        return chunked(self.models[digest])[index]

    def behaviour(self, digest: str) -> str:
        """How a model behaves."""
        return behaviour_of(self.models[digest])

    def expected(self, slot: str) -> Release:
        """What a device serves in the end."""
        last = self.published[-1]
        releases = {release.version: release for release in last.releases if release.slot == slot}
        wanted = wishes.desired(last.wishes, slot, DEVICE, ())
        return releases[wanted.pin.version if wanted.pin else max(releases)]


def behaviour_of(model: bytes) -> str:
    """What a model's first line says."""
    return model.partition(b"\n")[0].decode().split()[1]


@cache
def history(number: int) -> History:
    """The history with this number."""
    return _Host(random.Random(f"history {number}"), f"{number}").history


class _Host:
    """Makes a history."""

    def __init__(self, rng: random.Random, name: str) -> None:
        self._rng = rng
        self._name = name
        self._serial = 0
        self._signers = {role: _signer(f"{name} {role}") for role in ROLES}
        self._first_signers = self._signers
        self._is_robbed = rng.random() < 0.2
        self._strangers = {role: _impostor(f"{name} {role}", signer) for role, signer in self._signers.items()}
        self._releases: dict[str, list[Release]] = {}
        self._versions: dict[str, int] = {}
        self._wishes: list[Pin | Withdrawal] = []
        root = _root(1, self._signers)
        self._roots = [_signed(root, self._signers["root"])]
        self.history = History(root=self._roots[0], slots=SLOTS if rng.random() < 0.25 else SLOTS[:1])
        self._tell()
        self._forge()

    def _tell(self) -> None:
        rng, main = self._rng, SLOTS[0]
        for slot in self.history.slots:
            self._release(slot, GOOD)
        for _ in range(rng.randint(2, 5)):
            self._go_on(main)
        if self._pinned and rng.random() < 0.7:
            self._unpin()
        self.history.challenge = len(self.history.published)
        if self._is_robbed:
            self._change_keys()
        if not self._pinned and rng.random() < 0.6:
            self._release(main, rng.choice(REFUSED))
            self.history.challenger = self._releases[main][-1]
            self.history.answered = len(self.history.published)
            if any(self.history.behaviour(one.digest) == GOOD for one in self._releases[main]):
                self._pin(main, GOOD)  # and when that is over, what was refused is the newest again
                self._unpin()
        self.history.end = len(self.history.published)
        for slot in self.history.slots:
            self._release(slot, GOOD)
        if rng.random() < 0.2 and not self._pinned:
            self._pin(main, GOOD)

    def _go_on(self, slot: str) -> None:
        kind = self._rng.random()
        if kind < 0.55:
            self._release(slot, self._rng.choice(BAD) if self._rng.random() < 0.7 else GOOD)
        elif kind < 0.7 and not self._pinned:
            self._pin(slot, GOOD, SLOW)
        elif kind < 0.8:
            self._wish(Withdrawal(slot=slot, version=self._releases[slot][-1].version))
        elif kind < 0.85:
            self._change_keys()
        elif self._pinned:
            self._unpin()
        else:
            self._publish("refresh")

    def _pin(self, slot: str, *behaviours: str) -> None:
        working = [one for one in self._releases[slot] if self.history.behaviour(one.digest) in behaviours]
        self._wish(Pin(slot=slot, version=self._rng.choice(working).version, at=float(self._serial)))

    def _unpin(self) -> None:
        self._wishes = [wish for wish in self._wishes if not isinstance(wish, Pin)]
        self._publish("unpin")

    @property
    def _pinned(self) -> bool:
        return any(isinstance(wish, Pin) for wish in self._wishes)

    def _wish(self, wish: Pin | Withdrawal) -> None:
        self._wishes = [*self._wishes, wish]
        self._publish(f"{type(wish).__name__.lower()} {wish.slot} {wish.version}")

    def _release(self, slot: str, behaviour: str) -> None:
        version = self._versions.get(slot, -1) + 1
        self._versions[slot] = version
        head = f"EDGESIM {behaviour} {slot} {version} of {self._name}\n".encode()
        # Models share the chunks behind the first: fine-tuned ones have layers in common.
        layers = random.Random(f"{self._name} {slot}").randbytes(4096)
        size = self._rng.choice((300, 1500, 2600, 3400))
        model = (head + layers)[:1024] + layers[: size - 1024] if size > 1024 else (head + layers)[:size]
        release = release_of(slot, version, model)
        self.history.models[release.digest] = model
        self.history.manifests[release.digest] = manifest_of(chunked(model))
        if behaviour == MISLED:
            other = model[:-1] + bytes([model[-1] ^ 1])
            digest = release.digest
            release = release_of(slot, version, other, digest=digest)
            self.history.manifests[digest] = manifest_of(chunked(other))
            self.history.models[digest] = other
        kept = [*self._releases.get(slot, []), release]
        pinned = {wish.version for wish in self._wishes if isinstance(wish, Pin) and wish.slot == slot}
        surplus = [one for one in kept if one.version not in pinned][:-KEPT_VERSIONS]
        self._releases[slot] = [one for one in kept if one not in surplus]
        self._publish(f"release {slot} {version} {behaviour}")

    def _change_keys(self) -> None:
        old = self._signers["root"]
        version = len(self._roots) + 1
        self._signers = {role: _signer(f"{self._name} {role} {version}") for role in ROLES}
        root = Metadata(_root(version, self._signers))
        for signer in (old, self._signers["root"]):
            root.sign(signer, append=True)
        self._roots.append(root.to_bytes(JSONSerializer(compact=True)))
        self._publish("new keys")

    def _publish(self, what: str) -> None:
        self._serial += 1
        known = (release for releases in self._releases.values() for release in releases)
        releases = tuple(sorted(known, key=lambda release: release.target))
        signed = self._set(self._serial, releases, self._signers, VALID)
        payload = encode(signed, as_json=False)
        self.history.published.append(Published(payload, self._serial, releases, tuple(self._wishes), what))

    def _set(self, version: int, releases: tuple[Release, ...], signers: Signers, expires: datetime) -> MetadataSet:
        targets = Targets(
            version=version,
            expires=VALID,
            targets={
                one.target: TargetFile(one.length, {"sha256": one.digest}, one.target, {"custom": to_custom(one)})
                for one in releases
            },
            unrecognized_fields={wishes.FIELD: wishes.to_field(self._wishes)},
        )
        signed_targets = _signed(targets, signers["targets"])
        meta = {"targets.json": MetaFile.from_data(version, signed_targets, ["sha256"])}
        snapshot = _signed(Snapshot(version=version, expires=VALID, meta=meta), signers["snapshot"])
        timestamp = Timestamp(
            version=version, expires=expires, snapshot_meta=MetaFile.from_data(version, snapshot, ["sha256"])
        )
        return MetadataSet(
            roots=list(self._roots),
            timestamp=_signed(timestamp, signers["timestamp"]),
            snapshot=snapshot,
            targets=signed_targets,
        )

    def _forge(self) -> None:
        """What somebody can send who has none of the keys, or one."""
        last = self.history.published[-1]
        poison = random.Random(self._name).randbytes(700)
        bait = release_of(SLOTS[0], 99, poison)
        self.history.models[bait.digest] = poison
        self.history.manifests[bait.digest] = manifest_of(chunked(poison))
        mixed = {**self._strangers, "timestamp": self._first_signers["timestamp"]}
        self._roots = self._roots[:1]
        forged = {
            "strangers' keys": encode(self._set(99, (bait,), self._strangers, VALID), as_json=False),
            "expired": encode(self._set(97, last.releases, self._first_signers, EXPIRED), as_json=False),
            "too long": bytes(MAX_PAYLOAD_BYTES + 1),
            "noise": random.Random(self._name).randbytes(2000),
            "nothing": b"",
        }
        if self._is_robbed:  # it takes new keys to recover from that
            forged[STOLEN_KEY] = encode(self._set(98, (bait,), mixed, VALID), as_json=False)
        self.history.forged = list(forged.items())


def release_of(slot: str, version: int, model: bytes, digest: str | None = None) -> Release:
    """The release of a model; with `digest`, one that promises other bytes than those of its manifest."""
    return Release(
        slot=slot,
        version=version,
        digest=digest or hashlib.sha256(model).hexdigest(),
        length=len(model),
        manifest=hashlib.sha256(manifest_of(chunked(model))).hexdigest(),
        inputs=(Tensor(name="features", shape=(1, 3), dtype="float32"),),
        outputs=(Tensor(name="scores", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=tuple(Feature(path=name) for name in "abc")),
        golden=Golden(inputs=((1.0, 1.0, 1.0),), outputs=((6.5, -0.5),), tolerance=1e-5),
    )


def _signer(name: str) -> CryptoSigner:
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


def _impostor(name: str, signer: CryptoSigner) -> CryptoSigner:
    """Signs with another key, in the name of the real one."""
    impostor = _signer(f"{name} impostor")
    impostor._public_key = signer.public_key
    return impostor


def _root(version: int, signers: Signers) -> Root:
    root = Root(version=version, expires=VALID, consistent_snapshot=True)
    for role, signer in signers.items():
        root.add_key(signer.public_key, role)
    return root


def _signed(document: Any, signer: CryptoSigner) -> bytes:
    metadata = Metadata(document)
    metadata.sign(signer)
    signed: bytes = metadata.to_bytes(JSONSerializer(compact=True))
    return signed


def all_histories() -> Iterator[History]:
    """Every history there is."""
    return map(history, range(HISTORIES))
