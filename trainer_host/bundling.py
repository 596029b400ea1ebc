"""What goes into a bundle for devices that no network reaches: the published metadata, and the models they may want."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from msgspec import Struct
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

from protocol import wishes
from protocol.bundle import bundled
from protocol.codec import Decoder
from protocol.durable import write_pieces
from protocol.errors import Misconfigured, Unavailable
from protocol.messages import MetadataSet
from protocol.release import Release, from_target, manifest_digests
from protocol.wishes import Pin, Withdrawal
from trainer_host.repository import Repository

_sets: Decoder[MetadataSet] = Decoder(MetadataSet)


class BundledModel(Struct, frozen=True, kw_only=True):
    """A model in a bundle: of which slot and version, its digest, and its bytes."""

    slot: str
    version: int
    digest: str
    bytes: int


class Contents(Struct, frozen=True, kw_only=True):
    """What was put into a bundle.

    Attributes:
        path: The file.
        bytes: Its size.
        expires: Until when devices accept its metadata.
        models: By slot and version.
    """

    path: str
    bytes: int
    expires: datetime
    models: tuple[BundledModel, ...]


def make_bundle(repository: Repository, path: Path, slots: Collection[str], now: datetime) -> Contents:
    """Write a bundle of the metadata set, exactly as it is published, with models and their manifests.

    Of each slot come the newest release, the newest that is withdrawn nowhere, and all that are pinned: whatever a
    device of any group should serve.

    Args:
        repository: Where everything is; it may be in use.
        path: Where to write it, wholly or not at all.
        slots: Of which slots to put models in; none means all.
        now: Aware of its time zone.

    Raises:
        Rejected: With code `too_large`: more chunks than a bundle may hold.
        Misconfigured: One of the slots has no release, or the repository is damaged.
        Unavailable: The metadata has expired, a model cannot be read, or the disk failed.
    """
    payload = repository.metadata_set()
    documents = _sets.decode(payload)
    expires = _expires(documents)
    if expires <= now:
        raise Unavailable(
            f"the signed metadata expired at {expires:%Y-%m-%d %H:%M} UTC, and no device would accept it: "
            "start trainer-host run, which signs it again"
        )
    releases = _chosen(_targets(documents), slots)
    pieces = (piece for release in releases for piece in _model(repository, release))
    size = len(payload) + sum(release.length for release in releases)
    write_pieces(path, bundled(payload, pieces), size)
    return Contents(
        path=str(path),
        bytes=path.stat().st_size,
        expires=expires,
        models=tuple(BundledModel(slot=r.slot, version=r.version, digest=r.digest, bytes=r.length) for r in releases),
    )


def _chosen(targets: Targets, slots: Collection[str]) -> list[Release]:
    """The releases that belong into the bundle, by slot and version."""
    released = [
        from_target(path, target.length, target.hashes["sha256"], target.custom)
        for path, target in targets.targets.items()
    ]
    wished = wishes.from_field(targets.unrecognized_fields.get(wishes.FIELD))
    unknown = sorted(set(slots) - {release.slot for release in released})
    if unknown:
        raise Misconfigured(f"nothing is released for {', '.join(unknown)}")
    chosen: list[Release] = []
    for slot in sorted({release.slot for release in released}):
        if not slots or slot in slots:
            of_slot = sorted((r for r in released if r.slot == slot), key=lambda release: release.version)
            versions = _versions([r.version for r in of_slot], [wish for wish in wished if wish.slot == slot])
            chosen += [release for release in of_slot if release.version in versions]
    return chosen


def _versions(released: Sequence[int], wished: Collection[Pin | Withdrawal]) -> set[int]:
    """Which of a slot's versions, ascending, some device should serve."""
    withdrawals = [wish for wish in wished if isinstance(wish, Withdrawal)]
    for_all = {wish.version for wish in withdrawals if not wish.devices and not wish.groups}
    for_any = {wish.version for wish in withdrawals}
    newest = {
        version
        for withdrawn in (for_all, for_any)
        for version in [version for version in released if version not in withdrawn][-1:]
    }
    return newest | {wish.version for wish in wished if isinstance(wish, Pin)}


def _model(repository: Repository, release: Release) -> Iterator[bytes]:
    """A model's manifest and its chunks; what rotted in the repository is not passed on."""
    manifest = repository.manifest(release.digest)
    yield _checked(manifest, release.manifest, release)
    for index, digest in enumerate(manifest_digests(manifest)):
        yield _checked(repository.chunk(release.digest, index), digest, release)


def _checked(data: bytes, digest: str, release: Release) -> bytes:
    if hashlib.sha256(data).hexdigest() != digest:
        raise Unavailable(f"the files of {release.target} in the repository are damaged; restore {release.digest}")
    return data


def _targets(documents: MetadataSet) -> Targets:
    return Metadata[Targets].from_bytes(documents.targets).signed


def _expires(documents: MetadataSet) -> datetime:
    """When the first of the four roles' metadata expires."""
    newest = (documents.roots[-1], documents.timestamp, documents.snapshot, documents.targets)
    try:
        signed: list[Any] = [Metadata.from_bytes(document).signed for document in newest]
    except RepositoryError as error:
        raise Misconfigured(f"the repository is damaged: {error}") from error
    expiries: list[datetime] = [each.expires for each in signed]
    return min(expiries)
