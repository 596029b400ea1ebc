"""What was signed when, by which keys, and what the fleet made of it.

It is read from the repository's `N.targets.json`, which are all kept, so it needs no book-keeping that could be
forgotten or forged: each version is compared with the one before, and each signature is verified with a key that one of
the roots names. What devices did is counted from the events they sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]

from protocol.codec import Decoder
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.messages import MetadataSet
from protocol.wishes import FIELD, Pin, Withdrawal, from_field
from trainer_host import keys
from trainer_host.database import Database
from trainer_host.keys import Index
from trainer_host.repository import Repository
from trainer_host.settings import Settings
from trainer_host.signing import SIGNED_AT
from trainer_host.store import Outcomes, Store
from trainer_host.wishes import sentence

T = TypeVar("T")

_sets: Decoder[MetadataSet] = Decoder(MetadataSet)


class SignedBy(Struct, frozen=True, kw_only=True):
    """A key whose signature is good.

    Attributes:
        keyid: Its TUF key identifier.
        uri: Where `keys.json` says the private key is; empty where it says nothing of it.
        retired: The newest root no longer trusts it for targets.
    """

    keyid: str
    uri: str
    retired: bool


class Released(Struct, frozen=True, kw_only=True):
    """A release that came or went.

    Attributes:
        slot: Of the release.
        version: Of the release.
        digest: SHA-256 of the model.
        devices: How many devices reported what of it: `committed`, `pinned`, `refused`, `rolled_back`.
    """

    slot: str
    version: int
    digest: str
    devices: Mapping[str, int] = {}


class Entry(Struct, frozen=True, kw_only=True):
    """One version of the targets metadata, compared with the one before.

    Attributes:
        version: Of the targets.
        at: When it was made, seconds since the epoch; `None` where it does not say.
        signed_by: The keys that signed it.
        released: What came.
        dropped: What went: too many versions of the slot.
        wished: Pins and withdrawals that came.
        lifted: Those that went.
    """

    version: int
    at: float | None
    signed_by: tuple[SignedBy, ...]
    released: tuple[Released, ...] = ()
    dropped: tuple[Released, ...] = ()
    wished: tuple[Pin | Withdrawal, ...] = ()
    lifted: tuple[Pin | Withdrawal, ...] = ()


def of(settings: Settings, *, slot: str | None, limit: int) -> list[Entry]:
    """The newest entries of this host's repository, the newest last; see `read`.

    Raises:
        Misconfigured: There is no repository or no index of keys, or one of them or the database cannot be used.
        Unavailable: The disk or the database failed.
    """
    repository = Repository(settings.repository_dir)
    current = _sets.decode(repository.metadata_set())
    database = Database(settings.database)
    try:
        outcomes = Store(database).outcomes()
    finally:
        database.close()
    return read(settings.repository_dir, current, keys.roles(Path(settings.keys_dir)), outcomes, slot=slot, limit=limit)


def read(
    folder: Path, current: MetadataSet, index: Index, outcomes: Outcomes, *, slot: str | None, limit: int
) -> list[Entry]:
    """The newest entries, the newest last.

    Args:
        folder: Of the repository.
        current: Its present metadata set: a file that is newer was never published.
        index: Where private keys are.
        outcomes: What devices reported.
        slot: Only what concerns this slot; without, also targets that were only signed again.
        limit: How many entries.

    Raises:
        Misconfigured: A file in the folder is no targets metadata.
        Unavailable: A file cannot be read.
    """
    roots = [Metadata[Root].from_bytes(root).signed for root in current.roots]
    known = {keyid: root.keys[keyid] for root in roots for keyid in root.roles["targets"].keyids}
    uris = {entry.keyid: entry.uri for entry in index.get("targets", ())}
    trusted = roots[-1].roles["targets"].keyids
    entries = (
        _narrowed(
            Entry(
                version=new.signed.version,
                at=_signed_at(new.signed),
                signed_by=tuple(
                    SignedBy(keyid=keyid, uri=uris.get(keyid, ""), retired=keyid not in trusted)
                    for keyid in _signers(new, known)
                ),
                **_compared(old, new.signed, outcomes),
            ),
            slot,
        )
        for new, old in _pairs(folder, Metadata[Targets].from_bytes(current.targets).signed.version)
    )
    return list(islice((entry for entry in entries if slot is None or _says_something(entry)), max(limit, 0)))[::-1]


def rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """A table for people, a row for each thing that came or went."""
    return [
        {
            "when": "" if entry.at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.at)),
            "targets": entry.version,
            "what": what,
            "devices": devices,
            "by": by,
            "signed with": ", ".join(map(_key, entry.signed_by)) or "no key that is known",
        }
        for entry in entries
        for what, devices, by in _told(entry)
    ]


def told(devices: Mapping[str, int]) -> str:
    """Counts of devices by what they reported, in words."""
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(devices.items()))


def _pairs(folder: Path, newest: int) -> Iterator[tuple[Metadata[Targets], Targets | None]]:
    """Each version with the one before it that is there, the newest first."""
    new: Metadata[Targets] | None = None
    for version in range(newest, 0, -1):
        old = _read(folder / f"{version}.targets.json")
        if old is None:
            continue
        if new is not None:
            yield new, old.signed
        new = old
    if new is not None:
        yield new, None


def _read(path: Path) -> Metadata[Targets] | None:
    try:
        return Metadata[Targets].from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error
    except RepositoryError as error:
        raise Misconfigured(f"{path} is no targets metadata: {error}") from error


def _compared(old: Targets | None, new: Targets, outcomes: Outcomes) -> dict[str, Any]:
    """The fields of an `Entry` that are differences."""
    releases, wishes = (_releases(old, outcomes), _wishes(old)) if old else ([], [])
    new_releases, new_wishes = _releases(new, outcomes), _wishes(new)
    return {
        "released": _added(releases, new_releases),
        "dropped": _added(new_releases, releases),
        "wished": _added(wishes, new_wishes),
        "lifted": _added(new_wishes, wishes),
    }


def _added(old: list[T], new: list[T]) -> tuple[T, ...]:
    return tuple(each for each in new if each not in old)


def _releases(targets: Targets, outcomes: Outcomes) -> list[Released]:
    """By path alone: how a release is described may have been different once."""
    found = []
    for path, target in targets.targets.items():
        slot, _, name = path.partition("/")
        version = int(name.removesuffix(".tflite"))
        devices = outcomes.get((slot, version), {})
        found.append(Released(slot=slot, version=version, digest=target.hashes["sha256"], devices=devices))
    return found


def _wishes(targets: Targets) -> list[Pin | Withdrawal]:
    try:
        return list(from_field(targets.unrecognized_fields.get(FIELD)))
    except Rejected as error:
        raise Misconfigured(f"targets version {targets.version}: {error}") from error


def _signed_at(targets: Targets) -> float | None:
    try:
        return datetime.fromisoformat(targets.unrecognized_fields.get(SIGNED_AT, "")).timestamp()
    except (ValueError, TypeError):
        return None


def _signers(metadata: Metadata[Targets], known: Mapping[str, Key]) -> list[str]:
    """Which of the keys have signed."""
    found = []
    for keyid, signature in metadata.signatures.items():
        if keyid in known:
            try:
                known[keyid].verify_signature(signature, metadata.signed_bytes)
            except (UnverifiedSignatureError, VerificationError):
                continue
            found.append(keyid)
    return found


def _narrowed(entry: Entry, slot: str | None) -> Entry:
    if slot is None:
        return entry
    lists = ("released", "dropped", "wished", "lifted")
    return msgspec.structs.replace(
        entry, **{name: tuple(each for each in getattr(entry, name) if each.slot == slot) for name in lists}
    )


def _says_something(entry: Entry) -> bool:
    return bool(entry.released or entry.dropped or entry.wished or entry.lifted)


def _told(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """What came or went, what devices made of it, and who wished it."""
    for release in entry.released:
        yield f"released {release.slot} version {release.version} ({release.digest[:8]})", told(release.devices), ""
    for release in entry.dropped:
        yield f"dropped {release.slot} version {release.version}", told(release.devices), ""
    for wish in entry.wished:
        yield sentence(wish), "", wish.by
    for wish in entry.lifted:
        yield f"lifted: {sentence(wish)}", "", wish.by
    if not _says_something(entry):
        yield "made" if entry.version == 1 else "signed again", "", ""


def _key(key: SignedBy) -> str:
    return key.keyid[:8] + (f" {key.uri}" if key.uri else "") + (" (retired)" if key.retired else "")
