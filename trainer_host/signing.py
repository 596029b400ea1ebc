"""Signing requests: metadata that waits for the signatures of keys which are not on the host.

A request is one JSON file. It holds what is to be signed (new root metadata, new targets metadata, or both where one
is nothing without the other), the signatures so far, and the root that is in force, which says whose signatures are
needed. It goes to each signer in turn (`trainer-host sign`) and comes back to the host (`trainer-host accept`). It
holds no secret and is trusted by nobody: a signer reads what it says, the host checks all of it.

Models stay on the host; what is signed names them by their SHA-256.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct
from securesystemslib.signer import Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Signed, Targets  # type: ignore[attr-defined]

from protocol import wishes
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.release import from_target
from protocol.wishes import Pin

Signers = Mapping[str, Sequence[Signer]]

SIGNED_AT = "x-edgeswap-signed-at"
_TOLD = {wishes.FIELD, SIGNED_AT}

MAX_BYTES = 4 * 1024 * 1024  # three documents that fit a message of 128 KiB, as indented JSON


class Shortfall(NamedTuple):
    """A document that too few keys have signed.

    Attributes:
        role: Which document.
        version: Its version.
        signed: How many keys of a set have signed it.
        threshold: How many must.
        missing: Ids of the set's other keys.
    """

    role: str
    version: int
    signed: int
    threshold: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        keys = ", ".join(keyid[:8] for keyid in self.missing)
        wanted = self.threshold - self.signed
        return (
            f"{self.role} version {self.version} has {self.signed} of {self.threshold} signatures "
            f"({wanted} more of the keys {keys})"
        )


class SignaturesMissing(Misconfigured):
    """The keys that are here are not enough: what was to be done waits in a file for those that are elsewhere.

    Attributes:
        file: The signing request.
    """

    def __init__(self, file: Path, shortfalls: Sequence[Shortfall], failures: Sequence[str] = ()) -> None:
        notes = "".join(f"\n  {failure}" for failure in failures)
        super().__init__(
            f"this waits for signatures: {'; '.join(map(str, shortfalls))}.{notes}\n"
            f"Copy {file} to where the keys are, `trainer-host sign` it there, "
            f"bring it back, and `trainer-host accept` it."
        )
        self.file = file


class _File(Struct, forbid_unknown_fields=True):
    format: Literal["edgeswap signing request 1"]
    trusted_root: dict[str, Any]
    documents: list[dict[str, Any]]


class SigningRequest(NamedTuple):
    """What is to be signed.

    Attributes:
        trusted: The root in force, signed.
        root: The next root, or `None`.
        targets: The next targets, or `None`.
    """

    trusted: Metadata[Root]
    root: Metadata[Root] | None = None
    targets: Metadata[Targets] | None = None

    @classmethod
    def from_bytes(cls, data: bytes) -> SigningRequest:
        """Read a request. Nothing in it is verified.

        Raises:
            Rejected: With code `bad_request`.
        """
        if len(data) > MAX_BYTES:
            raise Rejected("bad_request", f"a signing request of more than {MAX_BYTES} bytes")
        try:
            file = msgspec.json.decode(data, type=_File)
            trusted: Metadata[Any] = Metadata.from_dict(file.trusted_root)
            documents: dict[str, Metadata[Any]] = {}
            for document in file.documents:
                metadata: Metadata[Any] = Metadata.from_dict(document)
                documents.setdefault(metadata.signed.type, metadata)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Rejected("bad_request", f"no signing request: {error or type(error).__name__}") from error
        if (
            trusted.signed.type != "root"
            or not documents
            or len(documents) != len(file.documents)
            or not documents.keys() <= {"root", "targets"}
        ):
            raise Rejected("bad_request", "a signing request holds root metadata, targets metadata or one of each")
        return cls(trusted, documents.get("root"), documents.get("targets"))

    def to_bytes(self) -> bytes:
        """What the file holds."""
        file = _File(
            format="edgeswap signing request 1",
            trusted_root=self.trusted.to_dict(),
            documents=[document.to_dict() for document in self.documents],
        )
        return msgspec.json.format(msgspec.json.encode(file)) + b"\n"

    @property
    def documents(self) -> list[Metadata[Any]]:
        """What is to be signed."""
        return [document for document in (self.root, self.targets) if document is not None]

    def judges(self, document: Metadata[Any]) -> tuple[Root, ...]:
        """Whose keys must sign a document: a root both roots', targets those of the newer root."""
        if self.root is None:
            return (self.trusted.signed,)
        return (self.trusted.signed, self.root.signed) if document is self.root else (self.root.signed,)

    def sign(self, signers: Signers) -> tuple[list[str], list[str]]:
        """Add the signature of each key that is to sign and has not signed.

        Returns:
            What was signed by which key, and which keys failed and why (a token may be elsewhere); both for people.

        Raises:
            Misconfigured: A key is here and cannot be used.
            Unavailable: The disk failed.
        """
        signed, failed = [], []
        for document in self.documents:
            role = document.signed.type
            wanted = {keyid for root in self.judges(document) for keyid in self._unsigned(root, document)}
            for signer in signers.get(role, ()) if wanted else ():
                keyid = signer.public_key.keyid
                if keyid not in wanted:
                    continue
                try:
                    document.sign(signer, append=True)
                except UnsignedMetadataError as error:
                    failed.append(f"the {role} key {keyid[:8]} did not sign: {error.__cause__ or error}")
                else:
                    signed.append(f"{role} version {document.signed.version} with the key {keyid[:8]}")
        return signed, failed

    def shortfalls(self) -> list[Shortfall]:
        """What is not signed by enough keys yet."""
        found = []
        for document in self.documents:
            for root in self.judges(document):
                role = document.signed.type
                result = root.get_verification_result(role, document.signed_bytes, document.signatures)
                if not result:
                    missing = tuple(self._unsigned(root, document))
                    found.append(
                        Shortfall(role, document.signed.version, len(result.signed), result.threshold, missing)
                    )
        return list(dict.fromkeys(found))

    def purge(self) -> None:
        """Drop signatures that do not count."""
        for document in self.documents:
            counted: set[str] = set()
            for root in self.judges(document):
                result = root.get_verification_result(document.signed.type, document.signed_bytes, document.signatures)
                counted.update(result.signed)
            document.signatures = {
                keyid: signature for keyid, signature in document.signatures.items() if keyid in counted
            }

    def merge(self, other: SigningRequest) -> None:
        """Take over the signatures of a copy of the same request."""
        for document, copy in zip(self.documents, other.documents, strict=True):
            document.signatures = {**copy.signatures, **document.signatures}

    def asks_the_same(self, other: SigningRequest) -> bool:
        """Whether another request is a copy of this one, apart from signatures."""
        return [document.signed_bytes for document in self.documents] == [
            document.signed_bytes for document in other.documents
        ]

    def describe(self, known: Container[str]) -> str:
        """What is to be signed, in plain words, for the person who signs.

        Args:
            known: Ids of keys that this person knows. The root in force is only what the request says it is, so a
                key that is not among these is named, be it new or not.
        """
        lines: list[str] = []
        if self.root is not None:
            lines += _described_root(self.trusted.signed, self.root.signed, known)
        if self.targets is not None:
            lines += _described_targets(self.targets.signed)
        lines += [f"Waits: {shortfall}" for shortfall in self.shortfalls()] or ["Every signature is there."]
        return "\n".join(lines) + "\n"

    @staticmethod
    def _unsigned(root: Root, document: Metadata[Any]) -> list[str]:
        result = root.get_verification_result(document.signed.type, document.signed_bytes, document.signatures)
        return list(result.unsigned)


def read(path: Path) -> SigningRequest:
    """Read a request's file.

    Raises:
        Misconfigured: There is no such file.
        Rejected: With code `bad_request`.
        Unavailable: The disk failed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise Misconfigured(f"cannot read {path}: {error.strerror}") from error
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error
    return SigningRequest.from_bytes(data)


def _described_root(trusted: Root, root: Root, known: Container[str]) -> Iterator[str]:
    yield f"Root version {root.version}, after version {trusted.version}, valid until {root.expires:%Y-%m-%d %H:%M} UTC"
    for name in sorted(root.roles):
        role, before = root.roles[name], trusted.roles[name]
        changed = "" if role.threshold == before.threshold else f" (now {before.threshold})"
        yield f"  {name}: {role.threshold} of {len(role.keyids)} keys must sign{changed}"
        for keyid in role.keyids:
            new = "" if keyid in before.keyids else "  NEW"
            stranger = "" if keyid in known else "  not in your keys.json: ask the host's operator whose it is"
            yield f"    {_plain(keyid)[:16]}{new}{stranger}"
        for keyid in before.keyids:
            if keyid not in role.keyids:
                yield f"    {_plain(keyid)[:16]}  is dropped"
    yield from _described_rest(root)


def _described_targets(targets: Targets) -> Iterator[str]:
    yield f"Targets version {targets.version}, valid until {targets.expires:%Y-%m-%d %H:%M} UTC"
    for path, target in sorted(targets.targets.items()):
        try:
            release = from_target(path, target.length, target.hashes.get("sha256", ""), target.custom)
        except Rejected as error:
            yield f"  UNREADABLE release {_plain(path)}: {_plain(error.text)}"
            continue
        notes = f" {_plain(release.notes)}" if release.notes else ""
        yield f"  release {release.slot} {release.version}: {release.length} bytes, SHA-256 {release.digest}{notes}"
    try:
        signed_wishes = wishes.from_field(targets.unrecognized_fields.get(wishes.FIELD))
    except Rejected as error:
        signed_wishes = ()
        yield f"  UNREADABLE wishes: {_plain(error.text)}"
    for wish in signed_wishes:
        verb = "serve only" if isinstance(wish, Pin) else "do not serve"
        named = [f"device {name}" for name in wish.devices] + [f"group {name}" for name in wish.groups]
        whom = ", ".join(named) or "all devices"
        by = f", by {wish.by}" if wish.by else ""
        yield f"  wish: {_plain(f'{verb} {wish.slot} {wish.version}: {whom}{by} {wish.note}'.rstrip())}"
    if not targets.targets and not signed_wishes:
        yield "  no release and no wish"
    if targets.delegations is not None:
        yield "  DELEGATES to other keys, which the host would not ask for"
    yield from _described_rest(targets)


def _described_rest(signed: Signed) -> Iterator[str]:
    """What is signed and is not told otherwise."""
    for field in sorted(signed.unrecognized_fields.keys() - _TOLD):
        yield f"  UNKNOWN field {_plain(field)}"


def _plain(text: str) -> str:
    """Without what could move a terminal's cursor: the text comes from elsewhere."""
    return "".join(character if character.isprintable() else "?" for character in text)
