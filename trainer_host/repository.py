"""The TUF repository on disk: what is released, signed, with the models beside it.

File names follow the TUF specification for consistent snapshots (section 6.2): `N.root.json`, `N.snapshot.json`,
`N.targets.json`, `timestamp.json`. Models lie in `models/<sha256>`, their manifests in `models/<sha256>.manifest`.

The timestamp is written last and is the only file that is ever replaced by another version, so the repository always is
what the timestamp leads to: a release that was interrupted leaves files that nothing names, and the next one writes
over them. Older snapshots, targets and models stay, as the record of what was once released. One lock keeps a command
line and a running host apart. Nothing here reads the calendar: `now` decides what expires when.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta, Struct
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
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

from protocol.codec import MAX_PAYLOAD_BYTES, encode
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.messages import MetadataSet
from protocol.release import (
    CHUNK_BYTES,
    MAX_MODEL_BYTES,
    Release,
    chunked,
    from_target,
    manifest_of,
    target_path,
    to_custom,
)
from protocol.topics import checked_digest, checked_name

log = logging.getLogger(__name__)

Signers = Mapping[str, Sequence[Signer]]
Days = Annotated[int, Meta(ge=1, le=3650)]

TIMESTAMP = "timestamp.json"
LOCK_TIMEOUT_S = 10.0
LOCK_RETRY_S = 0.05


class Lifetimes(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long signed metadata is valid, in days.

    The timestamp's is how long a device can be cut off from newer releases and not notice. A new one costs a signature.

    Attributes:
        root_days: Of root metadata. A person must sign again before it ends.
        targets_days: Of the list of releases.
        snapshot_days: Of the snapshot.
        timestamp_days: Of the timestamp: longer than a weekend without the host.
    """

    root_days: Days = 365
    targets_days: Days = 90
    snapshot_days: Days = 30
    timestamp_days: Days = 7

    def of(self, role: str) -> timedelta:
        """A role's lifetime."""
        days: int = getattr(self, f"{role}_days")
        return timedelta(days=days)


class ModelIdentity(TypedDict):
    """What a release says about its model's bytes."""

    digest: str
    length: int
    manifest: str


def identity_of(model: bytes) -> ModelIdentity:
    """The fields of a `Release` that follow from the model's bytes: `Release(slot=..., **identity_of(model))`."""
    return ModelIdentity(
        digest=hashlib.sha256(model).hexdigest(),
        length=len(model),
        manifest=hashlib.sha256(manifest_of(chunked(model))).hexdigest(),
    )


class Repository:
    """A repository in a folder.

    Args:
        folder: Where it lies.
        signers: Each role's keys. Reading needs none; a release needs those of targets, snapshot and timestamp,
            refreshing those of the last two.
        lifetimes: How long signatures last.
        kept_versions: How many versions of each slot stay released.

    Every method but `create` raises `Misconfigured` when there is no repository, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        signers: Signers | None = None,
        *,
        lifetimes: Lifetimes | None = None,
        kept_versions: int = 3,
    ) -> None:
        self._folder = folder
        self._signers = signers or {}
        self._lifetimes = lifetimes or Lifetimes()
        self._kept_versions = kept_versions

    @property
    def exists(self) -> bool:
        """Whether there is a repository already."""
        return (self._folder / TIMESTAMP).exists()

    def create(self, now: datetime) -> None:
        """Make an empty repository, trusting the signers' keys. The signers are those of all four roles.

        Args:
            now: Aware of its time zone.

        Raises:
            Misconfigured: There is one already, or a role has no key.
            Unavailable: The disk, the lock or a signer failed.
        """
        with _disk_errors(self._folder):
            (self._folder / "models").mkdir(parents=True, exist_ok=True)
        with _locked(self._folder):
            if self.exists:
                raise Misconfigured(f"{self._folder} already holds a repository")
            keys = {role: [signer.public_key for signer in signers] for role, signers in self._signers.items()}
            root = Metadata(_root(keys, 1, self._expiry("root", now)))
            targets = Metadata(Targets(expires=self._expiry("targets", now)))
            targets_signed = self._sign(targets, root.signed)
            snapshot = Metadata(Snapshot(expires=self._expiry("snapshot", now)))
            snapshot.signed.meta["targets.json"] = _described(targets, targets_signed)
            snapshot_signed = self._sign(snapshot, root.signed)
            timestamp = Metadata(Timestamp(expires=self._expiry("timestamp", now)))
            timestamp.signed.snapshot_meta = _described(snapshot, snapshot_signed)
            self._write(
                MetadataSet(
                    roots=[self._sign(root, root.signed)],
                    timestamp=self._sign(timestamp, root.signed),
                    snapshot=snapshot_signed,
                    targets=targets_signed,
                )
            )

    def release(self, release: Release, model: bytes, now: datetime) -> None:
        """Add a model, and sign metadata that names it.

        Args:
            release: What to say about it, `**identity_of(model)` included.
            model: The file's bytes.
            now: Aware of its time zone.

        Raises:
            Rejected: `wrong_model` when the bytes are not those that the release names, `too_large` when the model or
                the metadata would be, `stale_version` when the version is not above the slot's newest, `bad_name` for
                the slot.
            Unavailable: The disk, the lock or a signer failed.
            Misconfigured: A key that is needed is not here.
        """
        checked_name(release.slot, "slot")
        if len(model) > MAX_MODEL_BYTES:
            raise Rejected("too_large", f"a model of {len(model)} bytes is above the limit of {MAX_MODEL_BYTES}")
        if identity_of(model) != ModelIdentity(digest=release.digest, length=release.length, manifest=release.manifest):
            raise Rejected("wrong_model", "the release describes other bytes than these", "digest")
        with _locked(self._folder):
            current = self._load()
            targets = Metadata[Targets].from_bytes(current.targets)
            newest = _newest(targets.signed, release.slot)
            if release.version <= newest:
                raise Rejected("stale_version", f"{release.slot} already has version {newest}", "version")
            targets.signed.targets[release.target] = _target(release, model)
            _drop_oldest(targets.signed, release.slot, self._kept_versions)
            new = self._signed(current, now, targets=targets)
            _write_durably(self._folder / "models" / f"{release.digest}.manifest", manifest_of(chunked(model)))
            _write_durably(self._folder / "models" / release.digest, model)
            self._write(new)

    def refresh(self, now: datetime) -> None:
        """Sign the timestamp again, and the snapshot and targets once half their lifetime is over.

        Call it several times within `Lifetimes.timestamp_days`. Where the targets key is offline, targets stay as they
        are, with a warning.

        Raises:
            Rejected: With code `too_large` when the set does not fit a message.
            Unavailable: The disk, the lock or a signer failed.
            Misconfigured: The snapshot or timestamp key is not here.
        """
        with _locked(self._folder):
            current = self._load()
            root = Metadata[Root].from_bytes(current.roots[-1]).signed
            targets = Metadata[Targets].from_bytes(current.targets)
            snapshot = Metadata[Snapshot].from_bytes(current.snapshot)
            sign_targets = self._is_due(root, targets, now)
            if sign_targets and not self._signers.get("targets"):
                log.warning("the targets key is not here, and targets expire at %s", targets.signed.expires)
                sign_targets = False
            sign_snapshot = sign_targets or self._is_due(root, snapshot, now)
            self._write(
                self._signed(
                    current,
                    now,
                    targets=targets if sign_targets else None,
                    snapshot=snapshot if sign_snapshot else None,
                )
            )

    def renew_root(self, keys: Mapping[str, Sequence[Key]], now: datetime) -> None:
        """Sign the next root: the same keys for another year, or others; and then all the rest.

        Args:
            keys: Public keys of each role from now on. The signers hold the old and the new root keys.
            now: Aware of its time zone.

        Raises:
            Rejected: With code `too_large` when the set does not fit a message.
            Unavailable: The disk, the lock or a signer failed.
            Misconfigured: The signers do not reach the threshold of the old and of the new root.
        """
        with _locked(self._folder):
            current = self._load()
            old = Metadata[Root].from_bytes(current.roots[-1]).signed
            root = Metadata(_root(keys, old.version + 1, self._expiry("root", now)))
            signed = self._sign(root, old, root.signed)
            self._write(
                self._signed(
                    msgspec.structs.replace(current, roots=[*current.roots, signed]),
                    now,
                    targets=Metadata[Targets].from_bytes(current.targets),
                )
            )

    def releases(self) -> list[Release]:
        """All that is released now, by slot and version."""
        targets = Metadata[Targets].from_bytes(self._load().targets).signed.targets
        releases = [
            from_target(path, target.length, target.hashes["sha256"], target.custom) for path, target in targets.items()
        ]
        return sorted(releases, key=lambda release: (release.slot, release.version))

    def next_version(self, slot: str) -> int:
        """The lowest version that the slot's next release may have; a slot's first is 0."""
        return _newest(Metadata[Targets].from_bytes(self._load().targets).signed, slot) + 1

    def metadata_set(self) -> bytes:
        """The payload for `fleet/v1/metadata`, as MessagePack."""
        return _fitting(self._load())

    def root(self) -> bytes:
        """The newest root metadata: what a device is provisioned with."""
        return self._load().roots[-1]

    def model(self, digest: str) -> bytes:
        """A released model.

        Raises:
            Rejected: With code `unknown_model`, or `bad_digest`.
        """
        return self._read_model(digest, "", 0, -1)

    def manifest(self, digest: str) -> bytes:
        """A released model's manifest; raises as `model` does."""
        return self._read_model(digest, ".manifest", 0, -1)

    def chunk(self, digest: str, index: int) -> bytes:
        """One chunk of a released model; raises as `model` does."""
        return self._read_model(digest, "", index * CHUNK_BYTES, CHUNK_BYTES)

    def _read_model(self, digest: str, suffix: str, start: int, size: int) -> bytes:
        path = self._folder / "models" / (checked_digest(digest) + suffix)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise Rejected("unknown_model", f"{path.name} cannot be read: {error.strerror}", "model") from error

    def _load(self) -> MetadataSet:
        """The set that the timestamp leads to."""
        try:
            roots = [path.read_bytes() for path in _root_files(self._folder)]
            timestamp = (self._folder / TIMESTAMP).read_bytes()
            snapshot_version = Metadata[Timestamp].from_bytes(timestamp).signed.snapshot_meta.version
            snapshot = (self._folder / f"{snapshot_version}.snapshot.json").read_bytes()
            targets_version = Metadata[Snapshot].from_bytes(snapshot).signed.meta["targets.json"].version
            targets = (self._folder / f"{targets_version}.targets.json").read_bytes()
        except (OSError, RepositoryError) as error:
            raise Misconfigured(f"the repository in {self._folder} is damaged: {error}") from error
        return MetadataSet(roots=roots, timestamp=timestamp, snapshot=snapshot, targets=targets)

    def _signed(
        self,
        current: MetadataSet,
        now: datetime,
        *,
        targets: Metadata[Targets] | None = None,
        snapshot: Metadata[Snapshot] | None = None,
    ) -> MetadataSet:
        """The next set: a new timestamp over `snapshot`, where given, and that over `targets`, where given."""
        root = Metadata[Root].from_bytes(current.roots[-1]).signed
        new = current
        if targets is not None:
            new = msgspec.structs.replace(new, targets=self._next(targets, root, now))
            snapshot = snapshot or Metadata[Snapshot].from_bytes(current.snapshot)
            snapshot.signed.meta["targets.json"] = _described(targets, new.targets)
        timestamp = Metadata[Timestamp].from_bytes(current.timestamp)
        if snapshot is not None:
            new = msgspec.structs.replace(new, snapshot=self._next(snapshot, root, now))
            timestamp.signed.snapshot_meta = _described(snapshot, new.snapshot)
        new = msgspec.structs.replace(new, timestamp=self._next(timestamp, root, now))
        _fitting(new)
        return new

    def _next(self, metadata: Metadata[Any], root: Root, now: datetime) -> bytes:
        metadata.signed.version += 1
        metadata.signed.expires = self._expiry(metadata.signed.type, now)
        return self._sign(metadata, root)

    def _sign(self, metadata: Metadata[Any], *roots: Root) -> bytes:
        """Sign with every key of the role, and check that each of `roots` is content."""
        role = metadata.signed.type
        metadata.signatures.clear()
        try:
            for signer in self._signers.get(role, ()):
                metadata.sign(signer, append=True)
        except UnsignedMetadataError as error:
            raise Unavailable(f"cannot sign {role}: {error}") from error
        try:
            for root in roots:
                root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError as error:
            raise Misconfigured(f"the keys that are here cannot sign this repository: {error}") from error
        return metadata.to_bytes(JSONSerializer(compact=True))

    def _expiry(self, role: str, now: datetime) -> datetime:
        return now.astimezone(UTC).replace(microsecond=0) + self._lifetimes.of(role)

    def _is_due(self, root: Root, metadata: Metadata[Any], now: datetime) -> bool:
        """Whether half its lifetime is over, or a new root does not know its keys."""
        role = metadata.signed.type
        expires: datetime = metadata.signed.expires
        if expires - now <= self._lifetimes.of(role) / 2:
            return True
        return not root.get_verification_result(role, metadata.signed_bytes, metadata.signatures)

    def _write(self, new: MetadataSet) -> None:
        """Write what the timestamp will name, then the timestamp."""
        for version, root in enumerate(new.roots, 1):
            _write_durably(self._folder / f"{version}.root.json", root)
        targets_version = Metadata[Targets].from_bytes(new.targets).signed.version
        _write_durably(self._folder / f"{targets_version}.targets.json", new.targets)
        snapshot_version = Metadata[Snapshot].from_bytes(new.snapshot).signed.version
        _write_durably(self._folder / f"{snapshot_version}.snapshot.json", new.snapshot)
        _write_durably(self._folder / TIMESTAMP, new.timestamp)


def _root(keys: Mapping[str, Sequence[Key]], version: int, expires: datetime) -> Root:
    """Root metadata that names these keys; one signature of each role is enough."""
    root = Root(version=version, expires=expires, consistent_snapshot=True)
    for role, role_keys in keys.items():
        for key in role_keys:
            root.add_key(key, role)
    return root


def _target(release: Release, model: bytes) -> TargetFile:
    target = TargetFile.from_data(release.target, model, ["sha256"])
    target.unrecognized_fields["custom"] = to_custom(release)
    return target


def _described(metadata: Metadata[Any], signed: bytes) -> MetaFile:
    return MetaFile.from_data(metadata.signed.version, signed, ["sha256"])


def _versions(targets: Targets, slot: str) -> list[int]:
    """The slot's released versions, ascending."""
    return sorted(
        int(path.split("/")[1].removesuffix(".tflite")) for path in targets.targets if path.split("/")[0] == slot
    )


def _newest(targets: Targets, slot: str) -> int:
    return max(_versions(targets, slot), default=-1)


def _drop_oldest(targets: Targets, slot: str, kept: int) -> None:
    for version in _versions(targets, slot)[:-kept]:
        del targets.targets[target_path(slot, version)]


def _root_files(folder: Path) -> Iterator[Path]:
    """`1.root.json`, `2.root.json` and so on, as far as they go."""
    for version in itertools.count(1):
        path = folder / f"{version}.root.json"
        if not path.exists():
            return
        yield path


def _fitting(metadata_set: MetadataSet) -> bytes:
    """Encode a set.

    Raises:
        Rejected: With code `too_large` when it does not fit a message.
    """
    payload = encode(metadata_set, as_json=False)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Rejected(
            "too_large",
            f"the signed metadata would have {len(payload)} bytes, more than the {MAX_PAYLOAD_BYTES} of a message: "
            "keep fewer versions, or shorten golden vectors, notes and lineage",
        )
    return payload


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the repository's lock, so that nobody else changes it."""
    with _disk_errors(folder):
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not _has_lock(descriptor):
            if time.monotonic() > deadline:
                raise Unavailable(f"another process has been changing {folder} for {LOCK_TIMEOUT_S} s")
            time.sleep(LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _has_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"cannot write to {folder}: {error.strerror}") from error


def _write_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path`, wholly or not at all, unless it is there already."""
    with _disk_errors(path.parent):
        if path.exists() and path.read_bytes() == data:
            return
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
