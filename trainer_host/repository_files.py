"""The files of a repository: what the timestamp leads to is read and written here, and nothing is signed.

The timestamp is written last and is the only file that is ever replaced by another version, so the repository always is
what the timestamp leads to: a release that was interrupted leaves files that nothing names, and the next one writes
over them. That holds for a change of keys too: the root in force is the newest whose keys have signed what the
timestamp leads to.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

from protocol import lock
from protocol.durable import disk_errors, write_durably
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.messages import MetadataSet
from protocol.topics import checked_digest
from trainer_host.signing import SigningRequest

TIMESTAMP = "timestamp.json"
MODELS = "models"
REQUESTS = "requests"
LOCK_TIMEOUT_S = 10.0


class RepositoryFiles:
    """A repository's folder.

    Args:
        folder: Where it lies.

    Every method raises `Unavailable` when the disk fails.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def exists(self) -> bool:
        """Whether there is a repository already."""
        return (self._folder / TIMESTAMP).exists()

    def make(self) -> None:
        """Make the folder, where there is none."""
        with disk_errors(self._folder, 0):
            (self._folder / MODELS).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the repository's lock, so that nobody else changes it.

        Raises:
            Unavailable: Somebody else has had it for too long.
        """
        with disk_errors(self._folder, 0):
            descriptor = lock.open_lock(self._folder / "lock")
        try:
            if not lock.take(descriptor, LOCK_TIMEOUT_S):
                raise Unavailable(f"another process has been changing {self._folder} for {LOCK_TIMEOUT_S} s")
            yield
        finally:
            os.close(descriptor)

    def load(self) -> MetadataSet:
        """The set that the timestamp leads to, up to the root whose keys have signed it.

        Raises:
            Misconfigured: There is no repository, or a damaged one.
        """
        try:
            roots = [path.read_bytes() for path in _root_files(self._folder)]
            timestamp = (self._folder / TIMESTAMP).read_bytes()
            snapshot_version = Metadata[Timestamp].from_bytes(timestamp).signed.snapshot_meta.version
            snapshot = (self._folder / f"{snapshot_version}.snapshot.json").read_bytes()
            targets_version = Metadata[Snapshot].from_bytes(snapshot).signed.meta["targets.json"].version
            targets = (self._folder / f"{targets_version}.targets.json").read_bytes()
            documents: list[Metadata[Any]] = [Metadata.from_bytes(data) for data in (timestamp, snapshot, targets)]
            while roots and not all(is_signed(Metadata[Root].from_bytes(roots[-1]).signed, it) for it in documents):
                roots.pop()
        except (FileNotFoundError, NotADirectoryError, RepositoryError) as error:
            raise Misconfigured(f"the repository in {self._folder} is damaged: {error}") from error
        except OSError as error:
            raise Unavailable(f"cannot read the repository in {self._folder}: {error.strerror}") from error
        if not roots:
            raise Misconfigured(f"the repository in {self._folder} is damaged: it is not signed by any root's keys")
        return MetadataSet(roots=roots, timestamp=timestamp, snapshot=snapshot, targets=targets)

    def write(self, new: MetadataSet) -> None:
        """Write what the timestamp will name, then the timestamp."""
        for version, root in enumerate(new.roots, 1):
            put(self._folder / f"{version}.root.json", root)
        targets_version = Metadata[Targets].from_bytes(new.targets).signed.version
        put(self._folder / f"{targets_version}.targets.json", new.targets)
        snapshot_version = Metadata[Snapshot].from_bytes(new.snapshot).signed.version
        put(self._folder / f"{snapshot_version}.snapshot.json", new.snapshot)
        put(self._folder / TIMESTAMP, new.timestamp)

    def put_model(self, digest: str, model: bytes, manifest: bytes) -> None:
        """Keep a model, and the manifest first."""
        put(self._model_path(digest, ".manifest"), manifest)
        put(self._model_path(digest), model)

    def read_model(self, digest: str, suffix: str = "", start: int = 0, size: int = -1) -> bytes:
        """Part of a model, or of what is kept beside it.

        Raises:
            Rejected: With code `unknown_model`, or `bad_digest`.
        """
        path = self._model_path(checked_digest(digest), suffix)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)
        except FileNotFoundError as error:
            raise Rejected("unknown_model", f"{path.name} is not among the released models", "model") from error
        except OSError as error:
            raise Unavailable(f"cannot read {path}: {error.strerror}") from error

    def request_path(self, role: str, current: MetadataSet) -> Path:
        """Where the request for the next version of a role waits."""
        version = Metadata.from_bytes(current.roots[-1] if role == "root" else current.targets).signed.version + 1
        return self._folder / REQUESTS / f"{role}-{version}.json"

    def waiting(self, role: str, current: MetadataSet) -> SigningRequest | None:
        """The request for the next version of a role, if one waits.

        Raises:
            Misconfigured: It cannot be read.
        """
        path = self.request_path(role, current)
        try:
            request = SigningRequest.from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(f"cannot read {path}: {error.strerror}") from error
        except Rejected as error:
            raise Misconfigured(f"{path}: {error.text}. Remove it, and do again what it was for") from error
        return request._replace(trusted=Metadata[Root].from_bytes(current.roots[-1]))

    def put_request(self, role: str, current: MetadataSet, request: SigningRequest) -> Path:
        """Let a request wait. Returns where."""
        path = self.request_path(role, current)
        with disk_errors(path.parent, 0):
            path.parent.mkdir(exist_ok=True)
        put(path, request.to_bytes())
        return path

    def remove_requests(self, current: MetadataSet) -> None:
        """Remove requests that do not follow from what is in force now."""
        kept = {self.request_path(role, current) for role in ("root", "targets")}
        with disk_errors(self._folder, 0):
            for path in (self._folder / REQUESTS).glob("*.json"):
                if path not in kept:
                    path.unlink()

    def _model_path(self, digest: str, suffix: str = "") -> Path:
        return self._folder / MODELS / (digest + suffix)


def put(path: Path, data: bytes) -> None:
    """Put `data` at `path`, wholly or not at all, unless it is there already."""
    with disk_errors(path.parent, len(data)):
        if path.exists() and path.read_bytes() == data:
            return
    write_durably(path, data)


def is_signed(root: Root, metadata: Metadata[Any]) -> bool:
    """Whether enough of a root's keys have signed a document."""
    return bool(root.get_verification_result(metadata.signed.type, metadata.signed_bytes, metadata.signatures))


def _root_files(folder: Path) -> Iterator[Path]:
    """`1.root.json`, `2.root.json` and so on, as far as they go."""
    for version in itertools.count(1):
        path = folder / f"{version}.root.json"
        if not path.exists():
            return
        yield path
