"""What is signed, and therefore may be served: verification of metadata sets through python-tuf.

python-tuf's client does the work (TUF specification section 5): it keeps the accepted metadata in a folder, and takes
newer metadata only if the signatures, versions, hashes and expiries of all four roles agree. This module feeds it from
a message instead of a web server, says in a stable word why a set is refused, and checks expiry a second time, against
a clock that a Pi without a battery cannot set back.

    too_long       more bytes than a set or one of its documents may have
    malformed      no metadata of the kind it should be
    unsigned       no signature at all
    bad_signature  too few valid signatures: altered, or signed by other keys
    bad_root       a root that does not follow from the one that is trusted
    rolled_back    older than what was accepted before
    expired        past its date
    mixed          correctly signed documents that do not belong together
    bad_release    signed by the host, but it describes no model that this software understands

`Rejected.field` names the role.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from edge_agent.durable import sync_folder
from protocol.codec import MAX_PAYLOAD_BYTES, Decoder
from protocol.errors import Rejected, Unavailable
from protocol.messages import MetadataSet
from protocol.release import Release, from_target

ROLES = ("root", "timestamp", "snapshot", "targets")
MAX_ROOT_ROTATIONS = 256

# Documents of a set cannot be longer than the set; the timestamp names one file, and the snapshot one more.
_LIMITS = {"root": MAX_PAYLOAD_BYTES, "timestamp": 16 * 1024, "snapshot": 16 * 1024, "targets": MAX_PAYLOAD_BYTES}
_ADDRESS = "metadata"
_sets: Decoder[MetadataSet] = Decoder(MetadataSet)


class Versions(NamedTuple):
    """The version of each role's metadata."""

    root: int
    timestamp: int
    snapshot: int
    targets: int


class Verified(NamedTuple):
    """What an accepted set says."""

    versions: Versions
    releases: tuple[Release, ...]


class SetFetcher(FetcherInterface):
    """Serves the documents of a metadata set, under whatever version they are asked for.

    The verification, not the name of a file, decides whether a document is the right one.
    """

    def __init__(self, metadata_set: MetadataSet) -> None:
        self._roots = metadata_set.roots
        self._documents = {
            "timestamp": metadata_set.timestamp,
            "snapshot": metadata_set.snapshot,
            "targets": metadata_set.targets,
        }

    def _fetch(self, url: str) -> Iterator[bytes]:
        role, version = _role_and_version(url)
        if role == "root" and version is not None and version <= len(self._roots):
            return iter((self._roots[version - 1],))
        if role in self._documents:
            return iter((self._documents[role],))
        raise tuf_errors.DownloadHTTPError(f"there is no {role} {version} in the set", 404)


class Trust:
    """The accepted metadata of one device.

    Args:
        folder: Where accepted metadata is remembered, for this class alone.
        root: The root metadata the device was provisioned with. Later roots must descend from it.
    """

    def __init__(self, folder: Path, root: bytes) -> None:
        self._folder = folder
        self._root = root

    def verify(self, source: FetcherInterface | MetadataSet, now: datetime) -> Verified:
        """Accept a metadata set and say what it releases; a set that was accepted before may come again.

        Args:
            source: The set, or anything that python-tuf can fetch metadata from.
            now: The later of the system clock and the time this software was built, aware of its time zone.

        Raises:
            Rejected: With one of the codes above.
            Unavailable: The folder cannot be written, or the source cannot be read.
        """
        fetcher = _Observed(SetFetcher(source) if isinstance(source, MetadataSet) else source)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            updater = self._updater(fetcher)
            try:
                updater.refresh()
            finally:
                self._make_durable()
        except tuf_errors.DownloadLengthMismatchError as error:
            raise self._too_long(fetcher, error) from error
        except tuf_errors.DownloadError as error:
            raise Unavailable(f"cannot fetch {fetcher.role} metadata: {error}") from error
        except tuf_errors.RepositoryError as error:
            raise self._refusal(fetcher, error, now) from error
        except OSError as error:
            raise Unavailable(f"cannot keep metadata in {self._folder}: {error}") from error
        return self._accepted(now)

    def _updater(self, fetcher: FetcherInterface) -> Updater:
        config = UpdaterConfig(
            max_root_rotations=MAX_ROOT_ROTATIONS,
            root_max_length=_LIMITS["root"],
            timestamp_max_length=_LIMITS["timestamp"],
            snapshot_max_length=_LIMITS["snapshot"],
            targets_max_length=_LIMITS["targets"],
        )
        try:
            return Updater(str(self._folder), _ADDRESS, fetcher=fetcher, config=config, bootstrap=self._root)
        except tuf_errors.RepositoryError as error:
            raise Rejected("bad_root", f"the root of trust on this device is not valid: {error}", "root") from error

    def _accepted(self, now: datetime) -> Verified:
        """Read back what the refresh has just verified."""
        held = {role: self._held(role) for role in ROLES}
        expired = _expired(held, now)
        if expired:
            raise expired
        targets: Targets = held["targets"]
        return Verified(
            Versions(**{role: held[role].version for role in ROLES}),
            tuple(_release(path, target) for path, target in sorted(targets.targets.items())),
        )

    def _refusal(self, fetcher: _Observed, error: tuf_errors.RepositoryError, now: datetime) -> Rejected:
        """Name the reason why python-tuf refused the document it read last, or one that it held before."""
        role = fetcher.role
        if isinstance(error, tuf_errors.ExpiredMetadataError):
            held = {role: _parsed(fetcher.documents.get(role)) or self._held(role) for role in ROLES}
            return _expired(held, now) or Rejected("expired", str(error), role)
        if role == "root" and isinstance(error, tuf_errors.UnsignedMetadataError | tuf_errors.BadVersionNumberError):
            return Rejected("bad_root", f"a new root does not follow from the trusted one: {error}", role)
        offered = _parsed(fetcher.documents[role])
        if offered is None or offered.type != role:
            return Rejected("malformed", f"{role} metadata is not readable: {error}", role)
        if isinstance(error, tuf_errors.UnsignedMetadataError | tuf_errors.LengthOrHashMismatchError):
            return self._signature_fault(fetcher, role) or _mixed(role, error)
        if isinstance(error, tuf_errors.BadVersionNumberError):
            return _rolled_back(self._held(role), offered) or _mixed(role, error)
        return Rejected("malformed", f"{role} metadata is not usable: {error}", role)

    def _too_long(self, fetcher: _Observed, error: tuf_errors.DownloadLengthMismatchError) -> Rejected:
        """A document is too long for us, or only longer than the one that its parent names."""
        role = fetcher.role
        size = len(fetcher.documents[role])
        if size > _LIMITS[role]:
            return Rejected("too_long", f"{role} metadata has more than {_LIMITS[role]} bytes", role)
        if _parsed(fetcher.documents[role]) is None:
            return Rejected("malformed", f"{role} metadata is not readable", role)
        return self._signature_fault(fetcher, role) or _mixed(role, error)

    def _signature_fault(self, fetcher: _Observed, role: str) -> Rejected | None:
        """What is wrong with a document's signatures, if anything is."""
        metadata: Metadata[Any] = Metadata.from_bytes(fetcher.documents[role])
        result = self._held("root").get_verification_result(role, metadata.signed_bytes, metadata.signatures)
        if result:
            return None
        signed = any(signature.signature for signature in metadata.signatures.values())
        return Rejected(
            "bad_signature" if signed else "unsigned",
            f"{role} metadata has {len(result.signed)} valid signatures of the {result.threshold} it needs "
            f"(from {len(result.signed) + len(result.unsigned)} trusted keys)",
            role,
        )

    def _held(self, role: str) -> Any:
        """The signed part of a role's accepted metadata; `None` before there is any."""
        try:
            return _parsed((self._folder / f"{role}.json").read_bytes())
        except FileNotFoundError:
            return None

    def _remove_leftovers(self) -> None:
        """Remove temporary files of a python-tuf that was killed."""
        for path in self._folder.glob("tmp*"):
            path.unlink()

    def _make_durable(self) -> None:
        """Flush what python-tuf wrote: a version that a power loss made us forget could be rolled back."""
        for folder in (self._folder, self._folder / "root_history"):
            for path in folder.glob("*.json"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(folder)


class _Observed(FetcherInterface):
    """Remembers what was fetched, so that a refusal can say of what."""

    def __init__(self, source: FetcherInterface) -> None:
        self._source = source
        self.role = "root"
        self.documents: dict[str, bytes] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.role, _ = _role_and_version(url)
        return self._remembered(self.role, self._source.fetch(url))

    def _remembered(self, role: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
        self.documents[role] = b""
        for piece in pieces:
            self.documents[role] += piece
            yield piece


def decoded_set(payload: bytes) -> MetadataSet:
    """Decode the payload of `fleet/v1/metadata`. Nothing in it is verified yet.

    Raises:
        Rejected: With code `too_long`, before looking at it, or `malformed`.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Rejected("too_long", f"a metadata set of more than {MAX_PAYLOAD_BYTES} bytes")
    return _sets.decode(payload)


def _role_and_version(url: str) -> tuple[str, int | None]:
    """Take `…/3.targets.json` apart; python-tuf makes these names (specification section 5.3 ff.)."""
    version, _, role = url.rpartition("/")[2].removesuffix(".json").rpartition(".")
    return role, int(version) if version else None


def _parsed(data: bytes | None) -> Any:
    """The signed part of a document; `None` where there is none to read."""
    if data is None:
        return None
    try:
        return Metadata.from_bytes(data).signed
    except DeserializationError:
        return None


def _expired(documents: dict[str, Any], now: datetime) -> Rejected | None:
    for role, signed in documents.items():
        if signed is not None and signed.is_expired(now):
            return Rejected("expired", f"{role} metadata expired at {signed.expires}; it is {now}", role)
    return None


def _mixed(role: str, error: Exception) -> Rejected:
    return Rejected("mixed", f"{role} metadata is not the one that the rest of the set names: {error}", role)


def _rolled_back(held: Any, offered: Any) -> Rejected | None:
    """Which version went back, comparing what python-tuf compares (specification sections 5.4.3 and 5.5.5)."""
    compared = []
    if isinstance(held, Timestamp):
        compared.append(("timestamp", held.version, offered.version))
        compared.append(("snapshot", held.snapshot_meta.version, offered.snapshot_meta.version))
    if isinstance(held, Snapshot):
        compared.append(("targets", held.meta["targets.json"].version, offered.meta["targets.json"].version))
    for role, before, after in compared:
        if after < before:
            text = f"{role} metadata version {after} is older than version {before}, which was accepted before"
            return Rejected("rolled_back", text, role)
    return None


def _release(path: str, target: TargetFile) -> Release:
    digest = target.hashes.get("sha256")
    if digest is None:
        raise Rejected("bad_release", f"target {path} has no SHA-256", "targets")
    return from_target(path, target.length, digest, target.custom)
