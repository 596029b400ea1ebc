"""The TUF repository on disk: what is released, signed, with the models beside it.

File names follow the TUF specification for consistent snapshots (section 6.2): `N.root.json`, `N.snapshot.json`,
`N.targets.json`, `timestamp.json`. Models lie in `models/<sha256>`, their manifests in `models/<sha256>.manifest`.

What was interrupted has not happened (`trainer_host.repository_files` says why). Older snapshots, targets and models
stay, as the record of what was once released. One lock keeps a command line and a running host apart. Nothing here
reads the calendar: `now` decides what expires when.

A root or targets metadata that the keys here cannot sign waits in `requests/` for those that can, and for `accept`
(`trainer_host.signing`). What is changed while it waits is added to it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta, Struct
from tuf.api.exceptions import UnsignedMetadataError
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
from protocol.topics import checked_name
from protocol.wishes import Pin, Withdrawal
from trainer_host.repository_files import RepositoryFiles, is_signed, put
from trainer_host.signing import SIGNED_AT, SignaturesMissing, Signers, SigningRequest

log = logging.getLogger(__name__)

Days = Annotated[int, Meta(ge=1, le=3650)]

WARNING_SHARE = 1 / 4
EXPIRY_SLACK = timedelta(days=1)


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
        signers: Each role's keys, as far as they are here. Reading needs none. Those that the root in force does not
            name are passed over.
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
        self._files = RepositoryFiles(folder)
        self._signers: Signers = {} if signers is None else signers
        self._lifetimes = lifetimes or Lifetimes()
        self._kept_versions = kept_versions

    @property
    def exists(self) -> bool:
        """Whether there is a repository already."""
        return self._files.exists

    def create(self, now: datetime) -> None:
        """Make an empty repository, trusting the signers' keys. The signers are those of all four roles.

        Args:
            now: Aware of its time zone.

        Raises:
            Misconfigured: There is one already, or a role has no key.
            Unavailable: The disk, the lock or a signer failed.
        """
        self._files.make()
        with self._files.locked():
            if self.exists:
                raise Misconfigured(f"{self._folder} already holds a repository")
            root = Metadata(Root(version=1, expires=self._expiry("root", now), consistent_snapshot=True))
            for role, signers in self._signers.items():
                for signer in signers:
                    root.signed.add_key(signer.public_key, role)
            targets = Metadata(Targets(expires=self._expiry("targets", now)))
            _note_time(targets, now)
            targets_signed = self._sign(targets, root.signed)
            snapshot = Metadata(Snapshot(expires=self._expiry("snapshot", now)))
            snapshot.signed.meta["targets.json"] = _described(targets, targets_signed)
            snapshot_signed = self._sign(snapshot, root.signed)
            timestamp = Metadata(Timestamp(expires=self._expiry("timestamp", now)))
            timestamp.signed.snapshot_meta = _described(snapshot, snapshot_signed)
            self._files.write(
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
            SignaturesMissing: The release waits for keys that are elsewhere.
            Misconfigured: The snapshot or timestamp key is not here.
        """
        checked_name(release.slot, "slot")
        if len(model) > MAX_MODEL_BYTES:
            raise Rejected("too_large", f"a model of {len(model)} bytes is above the limit of {MAX_MODEL_BYTES}")
        if identity_of(model) != ModelIdentity(digest=release.digest, length=release.length, manifest=release.manifest):
            raise Rejected("wrong_model", "the release describes other bytes than these", "digest")

        def add(targets: Targets) -> None:
            newest = _newest(targets, release.slot)
            if release.version <= newest:
                raise Rejected("stale_version", f"{release.slot} already has version {newest}", "version")
            targets.targets[release.target] = _target(release, model)
            _drop_oldest(targets, release.slot, self._kept_versions)

        with self._files.locked():
            current = self._files.load()
            request = self._changed_targets(current, add, now)
            self._files.put_model(release.digest, model, manifest_of(chunked(model)))
            self._finish(current, request, now)

    def amend(self, change: Callable[[Targets], None], now: datetime) -> None:
        """Change what the targets metadata says, and sign it as a release is signed.

        Args:
            change: Is given, under the lock, the targets that are next to be signed, and changes them in place. What
                it raises ends the call, and nothing is written. A change of nothing signs them for another while.
            now: Aware of its time zone.

        Raises:
            Rejected: With code `too_large` when the metadata would be.
            Unavailable: The disk, the lock or a signer failed.
            SignaturesMissing: The change waits for keys that are elsewhere.
            Misconfigured: The snapshot or timestamp key is not here.
        """
        with self._files.locked():
            current = self._files.load()
            self._finish(current, self._changed_targets(current, change, now), now)

    def refresh(self, now: datetime) -> None:
        """Sign the timestamp again, and the snapshot and targets once half their lifetime is over.

        Call it several times within `Lifetimes.timestamp_days`. Where the keys here are not enough for targets, these
        stay as they are, with a warning; so does a root that a person must renew soon.

        Raises:
            Rejected: With code `too_large` when the set does not fit a message.
            Unavailable: The disk, the lock or a signer failed.
            Misconfigured: The snapshot or timestamp key is not here.
        """
        with self._files.locked():
            new = current = self._files.load()
            root = Metadata[Root].from_bytes(current.roots[-1]).signed
            if self._is_due(Metadata[Targets].from_bytes(current.targets), now):
                new = self._targets_renewed(current, now)
            if root.expires - now < self._lifetimes.of("root") * WARNING_SHARE:
                log.warning("the root expires at %s: sign it again with `trainer-host keys renew root`", root.expires)
            sign_snapshot = new is not current or self._is_due(Metadata[Snapshot].from_bytes(current.snapshot), now)
            self._files.write(self._completed(new, now, sign_snapshot=sign_snapshot))
            self._files.remove_requests(new)

    def change_root(self, change: Callable[[Root], None], now: datetime) -> None:
        """Sign the next root, and then all that the present signatures do not hold for any more.

        Args:
            change: Is given, under the lock, the root that is next to be signed, and adds and revokes keys and sets
                thresholds in place. What it raises ends the call, and nothing is written. A change of nothing signs
                the same keys for another while.
            now: Aware of its time zone.

        Raises:
            Rejected: With code `too_large` when the set does not fit a message.
            Unavailable: The disk, the lock or a signer failed.
            SignaturesMissing: The new root, or the targets under it, wait for keys that are elsewhere.
            Misconfigured: A role would have fewer keys than its threshold, or the host would lack those of snapshot
                or timestamp.
        """
        with self._files.locked():
            current = self._files.load()
            trusted: Metadata[Root] = Metadata.from_bytes(current.roots[-1])
            root = self._next_root(current)
            try:
                change(root.signed)
            except ValueError as error:
                raise Misconfigured(f"the root cannot be changed so: {error}") from error
            root.signed.version = trusted.signed.version + 1
            root.signed.expires = self._expiry("root", now)
            root.signatures.clear()
            _check_thresholds(root.signed)
            for role in ("snapshot", "timestamp"):
                self._require_keys(role, root.signed)
            self._finish(current, self._under_new_root(current, SigningRequest(trusted, root), now), now)

    def accept(self, offered: SigningRequest, now: datetime) -> None:
        """Take back a signing request, and publish it if it is signed by enough keys.

        Its signatures are added to those that came back before, in whatever order signers return their copies.

        Args:
            offered: The request, with signatures.
            now: Aware of its time zone.

        Raises:
            Rejected: `stale_request` when another version was published since, `superseded` when the waiting request
                was changed since, `bad_signature` when a signature does not fit, `bad_expiry`, `bad_root` or
                `bad_targets` when the metadata is none that this host would ask for, `no_model` when a model's bytes
                are not here, `too_large` when the set does not fit a message.
            Unavailable: The disk, the lock or a signer failed.
            SignaturesMissing: It still needs more.
            Misconfigured: The snapshot or timestamp key is not here.
        """
        with self._files.locked():
            current = self._files.load()
            request = offered._replace(trusted=Metadata[Root].from_bytes(current.roots[-1]))
            self._check(request, current, now)
            waiting = self._files.waiting("root" if request.root else "targets", current)
            if waiting is not None:
                if not waiting.asks_the_same(request):
                    raise Rejected("superseded", "the request was changed here since this copy was made: sign the new")
                request.merge(waiting)
            request.purge()
            self._finish(current, self._under_new_root(current, request, now), now)

    def can_sign(self, role: str) -> bool:
        """Whether the keys that are here are enough for a role, as the root in force says. Tokens count as here.

        Raises:
            Misconfigured: A key is here and cannot be used.
            Unavailable: The disk failed.
        """
        return self._has_keys(role, Metadata[Root].from_bytes(self._files.load().roots[-1]).signed)

    def waiting(self) -> list[tuple[Path, SigningRequest]]:
        """The signing requests that wait for signatures."""
        current = self._files.load()
        found = []
        for role in ("root", "targets"):
            request = self._files.waiting(role, current)
            if request is not None:
                found.append((self._files.request_path(role, current), request))
        return found

    def releases(self) -> list[Release]:
        """All that is released now, by slot and version."""
        targets = Metadata[Targets].from_bytes(self._files.load().targets).signed.targets
        releases = [
            from_target(path, target.length, target.hashes["sha256"], target.custom) for path, target in targets.items()
        ]
        return sorted(releases, key=lambda release: (release.slot, release.version))

    def next_root(self) -> Root:
        """The root that a change begins with: the one that waits for signatures, else the one in force."""
        return self._next_root(self._files.load()).signed

    def expiries(self) -> dict[str, datetime]:
        """Until when each role's metadata is signed."""
        found = self._files.load()
        documents = (found.roots[-1], found.targets, found.snapshot, found.timestamp)
        signed = [Metadata.from_bytes(document).signed for document in documents]
        return {each.type: each.expires for each in signed}

    def wishes(self) -> tuple[Pin | Withdrawal, ...]:
        """The operator's wishes that are signed now, in the order they were made."""
        targets = Metadata[Targets].from_bytes(self._files.load().targets).signed
        return wishes.from_field(targets.unrecognized_fields.get(wishes.FIELD))

    def next_version(self, slot: str) -> int:
        """The lowest version that the slot's next release may have; a slot's first is 0.

        A release that waits for signatures has taken its version.
        """
        return _newest(self._next_targets(self._files.load()).signed, slot) + 1

    def metadata_set(self) -> bytes:
        """The payload for `fleet/v1/metadata`, as MessagePack."""
        return _fitting(self._files.load())

    def root(self) -> bytes:
        """The newest root metadata: what a device is provisioned with."""
        return self._files.load().roots[-1]

    def copy_root(self, path: Path) -> None:
        """Keep what `root` returns in a file too; one that holds it already is left alone.

        Devices are provisioned from that file, so call this after every change of the root, and wherever a change may
        have been interrupted before this.

        Raises:
            Unavailable: The disk or the lock failed.
        """
        with self._files.locked():
            put(path, self.root())

    def roots(self) -> list[Root]:
        """Every root, from the first to the one in force."""
        return [Metadata[Root].from_bytes(root).signed for root in self._files.load().roots]

    def model(self, digest: str) -> bytes:
        """A released model.

        Raises:
            Rejected: With code `unknown_model`, or `bad_digest`.
        """
        return self._files.read_model(digest)

    def manifest(self, digest: str) -> bytes:
        """A released model's manifest; raises as `model` does."""
        return self._files.read_model(digest, ".manifest")

    def chunk(self, digest: str, index: int) -> bytes:
        """One chunk of a released model; raises as `model` does."""
        return self._files.read_model(digest, "", index * CHUNK_BYTES, CHUNK_BYTES)

    def _next_root(self, current: MetadataSet) -> Metadata[Root]:
        waiting = self._files.waiting("root", current)
        return waiting.root if waiting and waiting.root else Metadata[Root].from_bytes(current.roots[-1])

    def _next_targets(self, current: MetadataSet) -> Metadata[Targets]:
        """The targets that are to be changed: those that wait for signatures, else those in force."""
        targets = Metadata[Targets].from_bytes(current.targets)
        for role in ("targets", "root"):
            waiting = self._files.waiting(role, current)
            if waiting and waiting.targets and waiting.targets.signed.version == targets.signed.version + 1:
                return waiting.targets
        return targets

    def _changed_targets(
        self, current: MetadataSet, change: Callable[[Targets], None], now: datetime
    ) -> SigningRequest:
        """The next targets, as far as they can be signed here."""
        targets = self._next_targets(current)
        change(targets.signed)
        self._make_next(targets, Metadata[Targets].from_bytes(current.targets).signed.version, now)
        request = SigningRequest(Metadata[Root].from_bytes(current.roots[-1]), targets=targets)
        _check_size(current, request)
        return request

    def _targets_renewed(self, current: MetadataSet, now: datetime) -> MetadataSet:
        """The set with its targets signed for another while, or the same set where they cannot be, or are waiting."""
        targets = Metadata[Targets].from_bytes(current.targets)
        expires = targets.signed.expires
        if self._files.waiting("targets", current) is None:
            self._make_next(targets, targets.signed.version, now)
            request = SigningRequest(Metadata[Root].from_bytes(current.roots[-1]), targets=targets)
            try:
                request.sign(self._signers)
            except Misconfigured as error:
                log.warning("%s", error)
            if not request.shortfalls():
                return msgspec.structs.replace(current, targets=_serialized(targets))
        log.warning(
            "the targets key is not here, and targets expire at %s: sign them again with "
            "`trainer-host keys renew targets`, or accept the request that waits",
            expires,
        )
        return current

    def _under_new_root(self, current: MetadataSet, request: SigningRequest, now: datetime) -> SigningRequest:
        """Add the targets to a request for a root under which the present ones would not be signed any more."""
        if request.root is None or request.targets is not None:
            return request
        if is_signed(request.root.signed, Metadata[Targets].from_bytes(current.targets)):
            return request
        targets = self._next_targets(current)
        self._make_next(targets, Metadata[Targets].from_bytes(current.targets).signed.version, now)
        return request._replace(targets=targets)

    def _make_next(self, metadata: Metadata[Any], current_version: int, now: datetime) -> None:
        metadata.signed.version = current_version + 1
        metadata.signed.expires = self._expiry(metadata.signed.type, now)
        _note_time(metadata, now)
        metadata.signatures.clear()

    def _finish(self, current: MetadataSet, request: SigningRequest, now: datetime) -> None:
        """Sign what can be signed here; publish it, or let it wait for the other signatures."""
        _, failures = request.sign(self._signers)
        _check_size(current, request)
        shortfalls = request.shortfalls()
        if shortfalls:
            if request.root is not None and self._has_keys("targets", request.root.signed):
                request = request._replace(targets=None)  # they can be signed here, once the root is
            path = self._files.put_request("root" if request.root else "targets", current, request)
            raise SignaturesMissing(path, shortfalls, failures)
        new = current
        if request.root is not None:
            new = msgspec.structs.replace(new, roots=[*new.roots, _serialized(request.root)])
        if request.targets is not None:
            new = msgspec.structs.replace(new, targets=_serialized(request.targets))
        new = self._completed(new, now, sign_snapshot=True)
        self._files.write(new)
        self._files.remove_requests(new)

    def _check(self, request: SigningRequest, current: MetadataSet, now: datetime) -> None:
        """Look at what came back as if somebody else had written it."""
        trusted = request.trusted.signed
        versions = {"root": trusted.version, "targets": Metadata[Targets].from_bytes(current.targets).signed.version}
        for document in request.documents:
            role, signed = document.signed.type, document.signed
            if signed.version != versions[role] + 1:
                raise Rejected(
                    "stale_request",
                    f"this would be {role} version {signed.version}, and version {versions[role]} is in force here: "
                    "make the request again",
                    role,
                )
            if not now < signed.expires <= now + self._lifetimes.of(role) + EXPIRY_SLACK:
                raise Rejected("bad_expiry", f"{role} would expire at {signed.expires}; it is {now}", role)
        if request.root is not None:
            try:
                _check_thresholds(request.root.signed)
            except Misconfigured as error:
                raise Rejected("bad_root", str(error), "root") from error
            if not request.root.signed.consistent_snapshot:
                raise Rejected("bad_root", "devices expect consistent snapshots", "root")
        if request.targets is not None:
            self._check_targets(request.targets.signed, Metadata[Targets].from_bytes(current.targets).signed)
        for document in request.documents:
            _check_signatures(document, request.judges(document))

    def _check_targets(self, targets: Targets, current: Targets) -> None:
        if targets.delegations is not None:
            raise Rejected("bad_targets", "this host delegates targets to nobody", "targets")
        try:
            wishes.from_field(targets.unrecognized_fields.get(wishes.FIELD))
            for path, target in targets.targets.items():
                release = from_target(path, target.length, target.hashes.get("sha256", ""), target.custom)
                if target != current.targets.get(path) and not self._has_model(release):
                    raise Rejected("no_model", f"the model of {path} is not here: release it again", "targets")
        except Rejected as error:
            if error.code == "no_model":
                raise
            raise Rejected("bad_targets", error.text, "targets") from error

    def _has_model(self, release: Release) -> bool:
        try:
            model, manifest = self.model(release.digest), self.manifest(release.digest)
        except Rejected:
            return False
        identity = ModelIdentity(digest=release.digest, length=release.length, manifest=release.manifest)
        return identity_of(model) == identity and hashlib.sha256(manifest).hexdigest() == release.manifest

    def _has_keys(self, role: str, root: Root) -> bool:
        here = {signer.public_key.keyid for signer in self._signers.get(role, ())}
        return len(here.intersection(root.roles[role].keyids)) >= root.roles[role].threshold

    def _require_keys(self, role: str, root: Root) -> None:
        if not self._has_keys(role, root):
            threshold = root.roles[role].threshold
            raise Misconfigured(f"the host signs {role} by itself: {threshold} of its keys must be here")

    def _completed(self, new: MetadataSet, now: datetime, *, sign_snapshot: bool) -> MetadataSet:
        """The next set: a new timestamp, and a new snapshot where it is asked for."""
        root = Metadata[Root].from_bytes(new.roots[-1]).signed
        timestamp = Metadata[Timestamp].from_bytes(new.timestamp)
        if sign_snapshot:
            snapshot = Metadata[Snapshot].from_bytes(new.snapshot)
            snapshot.signed.meta["targets.json"] = _described(Metadata[Targets].from_bytes(new.targets), new.targets)
            new = msgspec.structs.replace(new, snapshot=self._next(snapshot, root, now))
            timestamp.signed.snapshot_meta = _described(snapshot, new.snapshot)
        new = msgspec.structs.replace(new, timestamp=self._next(timestamp, root, now))
        _fitting(new)
        return new

    def _next(self, metadata: Metadata[Any], root: Root, now: datetime) -> bytes:
        metadata.signed.version += 1
        metadata.signed.expires = self._expiry(metadata.signed.type, now)
        return self._sign(metadata, root)

    def _sign(self, metadata: Metadata[Any], root: Root) -> bytes:
        """Sign with every key of the role that is here, and check that the root is content."""
        role = metadata.signed.type
        metadata.signatures.clear()
        try:
            for signer in self._signers.get(role, ()):
                if signer.public_key.keyid in root.roles[role].keyids:
                    metadata.sign(signer, append=True)
        except UnsignedMetadataError as error:
            raise Unavailable(f"cannot sign {role}: {error}") from error
        try:
            root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError as error:
            raise Misconfigured(f"the keys that are here cannot sign this repository: {error}") from error
        return _serialized(metadata)

    def _expiry(self, role: str, now: datetime) -> datetime:
        return now.astimezone(UTC).replace(microsecond=0) + self._lifetimes.of(role)

    def _is_due(self, metadata: Metadata[Any], now: datetime) -> bool:
        """Whether half its lifetime is over."""
        expires: datetime = metadata.signed.expires
        return expires - now <= self._lifetimes.of(metadata.signed.type) / 2


def _serialized(metadata: Metadata[Any]) -> bytes:
    return metadata.to_bytes(JSONSerializer(compact=True))


def _check_thresholds(root: Root) -> None:
    """Each role can be signed.

    Raises:
        Misconfigured: One cannot.
    """
    for name, role in root.roles.items():
        if not 1 <= role.threshold <= len(role.keyids):
            raise Misconfigured(f"{name} would have {len(role.keyids)} keys and a threshold of {role.threshold}")


def _check_signatures(document: Metadata[Any], judges: Sequence[Root]) -> None:
    """No signature that should count fails to.

    Raises:
        Rejected: With code `bad_signature`: it was made over something else.
    """
    role = document.signed.type
    for root in judges:
        result = root.get_verification_result(role, document.signed_bytes, document.signatures)
        for keyid in result.unsigned:
            if keyid in document.signatures:
                raise Rejected("bad_signature", f"the signature of {role} by the key {keyid[:8]} does not fit it", role)


def _check_size(current: MetadataSet, request: SigningRequest) -> None:
    """The set will fit a message; see `_fitting`."""
    roots = [*current.roots, _serialized(request.root)] if request.root else current.roots
    targets = _serialized(request.targets) if request.targets else current.targets
    _fitting(msgspec.structs.replace(current, roots=roots, targets=targets))


def _target(release: Release, model: bytes) -> TargetFile:
    target = TargetFile.from_data(release.target, model, ["sha256"])
    target.unrecognized_fields["custom"] = to_custom(release)
    return target


def _note_time(metadata: Metadata[Any], now: datetime) -> None:
    """Say in targets when they were made, for `trainer_host.history`: expiry alone does not tell."""
    if isinstance(metadata.signed, Targets):
        metadata.signed.unrecognized_fields[SIGNED_AT] = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _described(metadata: Metadata[Any], signed: bytes) -> MetaFile:
    return MetaFile.from_data(metadata.signed.version, signed, ["sha256"])


def versions(targets: Targets, slot: str) -> list[int]:
    """The slot's released versions, ascending."""
    return sorted(
        int(path.split("/")[1].removesuffix(".tflite")) for path in targets.targets if path.split("/")[0] == slot
    )


def _newest(targets: Targets, slot: str) -> int:
    return max(versions(targets, slot), default=-1)


def _drop_oldest(targets: Targets, slot: str, kept: int) -> None:
    """Drop all but the newest `kept` versions; what is pinned stays, and what is withdrawn takes nobody's place."""
    said = [wish for wish in wishes.from_field(targets.unrecognized_fields.get(wishes.FIELD)) if wish.slot == slot]
    pinned = {wish.version for wish in said if isinstance(wish, Pin)}
    withdrawn = {wish.version for wish in said if isinstance(wish, Withdrawal)} - pinned
    usable = [version for version in versions(targets, slot) if version not in withdrawn]
    for version in versions(targets, slot):
        if version < min(usable[-kept:], default=0) and version not in pinned:
            del targets.targets[target_path(slot, version)]


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
