"""What is signed, and therefore may be served: verification of metadata sets through python-tuf.

python-tuf's client does the work (TUF specification section 5): it takes newer metadata only if the signatures,
versions, hashes and expiries of all four roles agree with each other and with what was accepted before. This module
feeds it from a message instead of a web server, keeps what it accepts where no power cut can take it away, says in a
stable word why a set is refused, and checks expiry a second time, against a clock that a Pi without a battery cannot
set back (`edge_agent.trusted_time`).

    too_long       more bytes than a set or one of its documents may have
    malformed      no metadata of the kind it should be
    unsigned       no signature at all
    bad_signature  too few valid signatures: altered, or signed by other keys
    bad_root       a root that does not follow from the one that is trusted
    rolled_back    older than what was accepted before
    expired        past its date
    mixed          correctly signed documents that do not belong together

`Rejected.field` names the role. A target that is no release of ours, or wishes that cannot be read, do not refuse the
set: they are named in `Verified.refused`, each by itself.

**Rot.** A damaged document is dropped and comes again with the next set, and the way back stays shut as far as the
other documents know it. Roots: `root.json` repeats the newest; a set that does not lead up to its version is refused. A
lost timestamp: the snapshot still says how old a snapshot may be. A lost snapshot: the targets say it of targets. What
is lost with a document is the protection against a replay of that document alone, over the same or newer ones below
it, until it expires; with all of them, of any set that has not expired yet.

**Rotation** of the timestamp's or the snapshot's keys ends what the old keys have signed, versions included: so one
recovers from a thief who signed a version of 2^31 (specification section 5.3.11). Damage and rotation are told apart by
whether some earlier root of the chain vouches for the document.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Timestamp  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from edge_agent.staging import BadRelease
from edge_agent.trust_store import ROLES, TrustStore, file_of, is_intact, parsed, root_file
from protocol import wishes
from protocol.codec import MAX_PAYLOAD_BYTES, Decoder
from protocol.durable import OS_DISK, Disk
from protocol.errors import Rejected, Unavailable
from protocol.messages import MetadataSet
from protocol.release import Release, from_target
from protocol.wishes import Pin, Withdrawal

log = logging.getLogger(__name__)

MAX_ROOT_ROTATIONS = 256
MAX_SHOWN_NAME = 128

# Documents of a set cannot be longer than the set; the timestamp names one file, and the snapshot one more.
_LIMITS = {"root": MAX_PAYLOAD_BYTES, "timestamp": 16 * 1024, "snapshot": 16 * 1024, "targets": MAX_PAYLOAD_BYTES}
_ADDRESS = "metadata"
_sets: Decoder[MetadataSet] = Decoder(MetadataSet)

# File name to content: what a device has accepted.
Documents = Mapping[str, bytes]


class Versions(NamedTuple):
    """The version of each role's metadata."""

    root: int
    timestamp: int
    snapshot: int
    targets: int


class Verified(NamedTuple):
    """What an accepted set says.

    Attributes:
        versions: Of its documents.
        releases: By target path.
        wishes: The operator's, in the order they were made.
        signed_by: Identifiers of the keys that validly signed the targets.
        refused: What is signed and is not understood, or plays tricks with its path.
    """

    versions: Versions
    releases: tuple[Release, ...]
    wishes: tuple[Pin | Withdrawal, ...] = ()
    signed_by: tuple[str, ...] = ()
    refused: tuple[BadRelease, ...] = ()


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
    """The accepted metadata of one device. One process at a time may use the folder.

    Args:
        folder: Where accepted metadata is remembered, for this class alone.
        root: The root metadata the device was provisioned with. Later roots must descend from it. With another root
            than before, the folder starts anew.
        disk: Where the folder is.
    """

    def __init__(self, folder: Path, root: bytes, disk: Disk = OS_DISK) -> None:
        self._store = TrustStore(folder, disk)
        self._root = root

    def verify(self, source: FetcherInterface | MetadataSet, now: datetime) -> Verified:
        """Accept a metadata set and say what it releases; a set that was accepted before may come again.

        What is returned is on the disk, and so is what TUF accepts of a set that is refused in the end: a kill or a
        power cut leaves a state that is never older than what was acted on. python-tuf works on a copy in a temporary
        folder, since what it writes is not synced.

        Args:
            source: The set, or anything that python-tuf can fetch metadata from.
            now: From `edge_agent.trusted_time`, aware of its time zone. python-tuf looks at the system clock besides:
                what is expired by either is expired.

        Raises:
            Rejected: With one of the codes above.
            Unavailable: The folder cannot be written, or the source cannot be read.
        """
        before = self._before()
        fetcher = _Observed(SetFetcher(source) if isinstance(source, MetadataSet) else source)
        trouble: Rejected | Unavailable | None = None
        try:
            with TemporaryDirectory(prefix="edge-agent-trust-") as scratch:
                client = _Client(Path(scratch), self._root, before, fetcher)
                try:
                    client.refresh()
                except tuf_errors.RepositoryError as error:
                    trouble = _refusal(client, fetcher, error, now)
                except tuf_errors.DownloadLengthMismatchError as error:
                    trouble = _too_long(client, fetcher, error)
                except tuf_errors.DownloadError as error:
                    trouble = Unavailable(f"cannot fetch {fetcher.role} metadata: {error}")
                after = client.documents()
        except OSError as error:
            raise Unavailable(f"cannot verify metadata in a temporary folder: {error}") from error
        return self._judged(before, after, trouble, now)

    def _judged(
        self, before: Documents, after: Documents, trouble: Rejected | Unavailable | None, now: datetime
    ) -> Verified:
        """Keep what is to be kept, and only then say how it went."""
        if back := _way_back(before, after):
            trouble, after = back, {} if back.field == "root" else _until(after, "timestamp")
        elif trouble is None and (expired := _expired(after, now)):
            trouble, after = expired, _until(after, str(expired.field))  # as python-tuf does by the system clock
        if trouble is None:
            self._store.write(after)
            return _said(after)
        try:
            self._store.write(after)
        except Unavailable as error:  # nothing of it is acted on
            log.error("%s", error)
        raise trouble

    def _before(self) -> dict[str, bytes]:
        """What is kept, unless it belongs to another root of trust. The newest root may be read from either place."""
        held = self._store.read()
        provisioned = parsed(self._root)
        if provisioned is None or not is_intact("root.json", self._root):
            raise Rejected("bad_root", "the root of trust on this device is not valid root metadata", "root")
        former = parsed(held.get(root_file(provisioned.signed.version)))
        if former is not None and former.signed != provisioned.signed:
            log.warning("this device was given another root of trust: what was accepted under the former is forgotten")
            self._store.clear()
            return {}
        newest = parsed(held.get("root.json"))
        if newest is not None:
            held.setdefault(root_file(newest.signed.version), held["root.json"])
        return held


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
        try:
            for piece in pieces:
                self.documents[role] += piece
                yield piece
        except OSError as error:  # a connection that breaks off; not our disk
            raise tuf_errors.DownloadError(str(error)) from error


class _Client:
    """python-tuf's client in a folder of its own that begins as a copy of what is kept."""

    def __init__(self, folder: Path, root: bytes, held: Documents, fetcher: FetcherInterface) -> None:
        self._folder = folder
        (folder / root_file(1)).parent.mkdir()
        for name in held.keys() - {"root.json"}:  # the client makes that itself, and a link
            (folder / name).write_bytes(held[name])
        config = UpdaterConfig(
            max_root_rotations=MAX_ROOT_ROTATIONS,
            root_max_length=_LIMITS["root"],
            timestamp_max_length=_LIMITS["timestamp"],
            snapshot_max_length=_LIMITS["snapshot"],
            targets_max_length=_LIMITS["targets"],
        )
        self._updater = Updater(str(folder), _ADDRESS, fetcher=fetcher, config=config, bootstrap=root)

    def refresh(self) -> None:
        """Run the client's workflow; raises what python-tuf raises."""
        self._updater.refresh()

    def documents(self) -> dict[str, bytes]:
        """What is accepted by now."""
        files = [*(self._folder / root_file(1)).parent.iterdir(), *self._folder.glob("*.json")]
        return {str(file.relative_to(self._folder)): file.read_bytes() for file in files}

    def held(self, role: str) -> Any:
        """The signed part of a role's accepted metadata; `None` before there is any."""
        return _signed(self.documents().get(file_of(role)))


def decoded_set(payload: bytes) -> MetadataSet:
    """Decode the payload of `fleet/v1/metadata`. Nothing in it is verified yet.

    Raises:
        Rejected: With code `too_long`, before looking at it, or `malformed`.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Rejected("too_long", f"a metadata set of more than {MAX_PAYLOAD_BYTES} bytes")
    return _sets.decode(payload)


# Why a set is refused.


def _refusal(client: _Client, fetcher: _Observed, error: tuf_errors.RepositoryError, now: datetime) -> Rejected:
    """Name the reason why python-tuf refused the document it read last, or one that it held before."""
    role = fetcher.role
    if isinstance(error, tuf_errors.ExpiredMetadataError):
        seen = {role: _signed(fetcher.documents.get(role)) or client.held(role) for role in ROLES}
        return _expired_of(seen, now) or Rejected("expired", str(error), role)
    if role == "root" and isinstance(error, tuf_errors.UnsignedMetadataError | tuf_errors.BadVersionNumberError):
        return Rejected("bad_root", f"a new root does not follow from the trusted one: {error}", role)
    offered = _signed(fetcher.documents[role])
    if offered is None or offered.type != role:
        return Rejected("malformed", f"{role} metadata is not readable: {error}", role)
    if isinstance(error, tuf_errors.UnsignedMetadataError | tuf_errors.LengthOrHashMismatchError):
        return _signature_fault(client, fetcher, role) or _mixed(role, error)
    if isinstance(error, tuf_errors.BadVersionNumberError):
        return _rolled_back(client.held(role), offered) or _mixed(role, error)
    return Rejected("malformed", f"{role} metadata is not usable: {error}", role)


def _too_long(client: _Client, fetcher: _Observed, error: tuf_errors.DownloadLengthMismatchError) -> Rejected:
    """A document is too long for us, or only longer than the one that its parent names."""
    role = fetcher.role
    if len(fetcher.documents[role]) > _LIMITS[role]:
        return Rejected("too_long", f"{role} metadata has more than {_LIMITS[role]} bytes", role)
    if parsed(fetcher.documents[role]) is None:
        return Rejected("malformed", f"{role} metadata is not readable", role)
    return _signature_fault(client, fetcher, role) or _mixed(role, error)


def _signature_fault(client: _Client, fetcher: _Observed, role: str) -> Rejected | None:
    """What is wrong with a document's signatures, if anything is."""
    metadata: Metadata[Any] = Metadata.from_bytes(fetcher.documents[role])
    result = client.held("root").get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    if result:
        return None
    signed = any(signature.signature for signature in metadata.signatures.values())
    return Rejected(
        "bad_signature" if signed else "unsigned",
        f"{role} metadata has {len(result.signed)} valid signatures of the {result.threshold} it needs "
        f"(from {len(result.signed) + len(result.unsigned)} trusted keys)",
        role,
    )


def _expired(documents: Documents, now: datetime) -> Rejected | None:
    return _expired_of({role: _signed(documents.get(file_of(role))) for role in ROLES}, now)


def _expired_of(documents: Mapping[str, Any], now: datetime) -> Rejected | None:
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
    return next((_older(*versions) for versions in compared if versions[2] < versions[1]), None)


def _older(role: str, before: int, after: int) -> Rejected:
    text = f"{role} metadata version {after} is older than version {before}, which was accepted before"
    return Rejected("rolled_back", text, role)


# What a damaged folder still knows.


def _way_back(before: Documents, after: Documents) -> Rejected | None:
    """Whether python-tuf was led back because a document that would have forbidden it was lost to damage."""
    held = {role: _signed(before.get(file_of(role))) for role in ROLES}
    root: Root = _signed(after["root.json"])
    if held["root"] is not None and root.version < held["root"].version:
        return _older("root", held["root"].version, root.version)
    chain = [_signed(after[name]) for version in range(1, root.version + 1) if (name := root_file(version)) in after]
    for parent, child in (("timestamp", "snapshot"), ("snapshot", "targets")):
        name = file_of(parent)
        if _vouched(before.get(name), parent, chain) or not _vouched(before.get(file_of(child)), child, [root]):
            continue
        log.warning("the %s metadata that was accepted is lost; going by the %s's version", parent, child)
        named = _named_version(_signed(after.get(name)), child)
        if _vouched(after.get(name), parent, [root]) and named < held[child].version:
            return _older(child, held[child].version, named)
    return None


def _named_version(parent: Any, child: str) -> int:
    """Which version of its child a document names; 0 for none."""
    if isinstance(parent, Timestamp):
        return parent.snapshot_meta.version
    meta = parent.meta.get(file_of(child)) if isinstance(parent, Snapshot) else None
    return 0 if meta is None else meta.version


def _vouched(document: bytes | None, role: str, roots: Sequence[Root]) -> bool:
    """Whether the keys of one of these roots have signed a document."""
    metadata = parsed(document)
    return metadata is not None and any(
        root.get_verification_result(role, metadata.signed_bytes, metadata.signatures) for root in roots
    )


def _until(documents: Documents, role: str) -> Documents:
    """The documents that TUF accepts before it comes to a role."""
    left_out = {file_of(role) for role in ROLES[ROLES.index(role) :]} - {"root.json"}
    return {name: data for name, data in documents.items() if name not in left_out}


# What a set says.


def _said(documents: Documents) -> Verified:
    held: dict[str, Metadata[Any]] = {role: Metadata.from_bytes(documents[file_of(role)]) for role in ROLES}
    targets = held["targets"]
    releases: list[Release] = []
    refused: list[BadRelease] = []
    for path, target in sorted(targets.signed.targets.items()):
        try:
            releases.append(_release(path, target))
        except Rejected as error:
            refused.append(_named(path, error))
    said, not_understood = _wishes(targets.signed.unrecognized_fields.get(wishes.FIELD))
    by = held["root"].signed.get_verification_result("targets", targets.signed_bytes, targets.signatures).signed
    return Verified(
        Versions(**{role: held[role].signed.version for role in ROLES}),
        tuple(releases),
        said,
        tuple(sorted(by)),
        (*refused, *not_understood),
    )


def _release(path: str, target: TargetFile) -> Release:
    digest = target.hashes.get("sha256")
    if digest is None:
        raise Rejected("bad_release", f"target {path} has no SHA-256", "targets")
    return from_target(path, target.length, digest, target.custom)


def _wishes(field: Any) -> tuple[tuple[Pin | Withdrawal, ...], tuple[BadRelease, ...]]:
    """The wishes, and what is wrong with those that cannot be read: one of them must not lift the others."""
    try:
        return wishes.from_field(field), ()
    except Rejected as error:
        whole = _named(wishes.FIELD, error)
    try:
        each = msgspec.json.decode(field, type=list[msgspec.Raw])
    except (ValueError, TypeError, RecursionError):
        return (), (whole,)
    if len(each) > wishes.MAX_WISHES:
        return (), (whole,)
    said: list[Pin | Withdrawal] = []
    refused: list[BadRelease] = []
    for index, one in enumerate(each):
        try:
            said += wishes.from_field(f"[{bytes(one).decode()}]")
        except Rejected as error:
            refused.append(_named(f"{wishes.FIELD}[{index}]", error))
    return tuple(said), tuple(refused)


def _named(target: str, error: Rejected) -> BadRelease:
    return BadRelease(_short(target), error.code, _short(error.text))


def _short(text: str) -> str:
    """For people; whoever holds the targets key must not fill the device's reports."""
    return text if len(text) <= MAX_SHOWN_NAME else f"{text[:MAX_SHOWN_NAME]}…"


def _role_and_version(url: str) -> tuple[str, int | None]:
    """Take `…/3.targets.json` apart; python-tuf makes these names (specification section 5.3 ff.)."""
    version, _, role = url.rpartition("/")[2].removesuffix(".json").rpartition(".")
    return role, int(version) if version else None


def _signed(data: bytes | None) -> Any:
    """The signed part of a document; `None` where there is none to read."""
    document = parsed(data)
    return document and document.signed
