"""Models and their chunks in a folder, each file named by the SHA-256 of its content.

    models/<sha256>.tflite            whole models, durable once they are here
    chunks/<sha256>                   pieces of a model on its way, and manifests
    models/<sha256>.tflite.corrupt-<n>   a model whose content no longer fits its name

A model is verified each time it is opened, not only when it arrives: cards rot. A chunk is not synced to disk,
because each is verified again when it is counted or assembled: a torn one costs a fetch, and an fsync each would cost
minutes. Several processes may use one folder; a file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from edge_agent.durable import disk_errors, remove_leftovers, require_free, sync_folder, write_durably, write_pieces
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.release import CHUNK_BYTES, manifest_digests
from protocol.topics import checked_digest


class ModelStore:
    """A folder of verified models.

    Args:
        folder: Made if missing. Temporary files that a dead process left in it are removed.
        reserve_bytes: What `put`, `adopt` and `assemble` leave free on the disk.

    Raises:
        Misconfigured: The folder cannot be made.
    """

    def __init__(self, folder: Path, *, reserve_bytes: int = 0) -> None:
        self._models = folder / "models"
        self._chunks = folder / "chunks"
        self._reserve_bytes = reserve_bytes
        for part in (self._models, self._chunks):
            try:
                part.mkdir(parents=True, exist_ok=True)
                remove_leftovers(part)
            except OSError as error:
                raise Misconfigured(f"cannot use the folder {part}: {error.strerror}") from error

    def path(self, digest: str) -> Path:
        """Where the model with this digest is, or would be."""
        return self._models / f"{checked_digest(digest)}.tflite"

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def put(self, data: bytes) -> str:
        """Store a model durably. Returns its digest.

        Raises:
            Unavailable: No room for it, with the bytes needed and free.
        """
        digest = hashlib.sha256(data).hexdigest()
        self.require_free(len(data), self._reserve_bytes)
        write_durably(self.path(digest), data)
        return digest

    def open(self, digest: str) -> bytes:
        """A model's bytes, verified.

        Raises:
            Unavailable: It is not here, or cannot be read.
            Rejected: With code `corrupt_model`; the file is set aside.
        """
        path = self.path(digest)
        data = _read(path)
        if hashlib.sha256(data).hexdigest() != digest:
            aside = _put_aside(path)
            raise Rejected("corrupt_model", f"the content of {path} does not have that digest; it is now {aside.name}")
        return data

    def adopt(self, temporary: Path, digest: str) -> Path:
        """Move a file of this disk into the store, durably, once it is verified. Returns its place.

        Raises:
            Rejected: With code `corrupt_model`; the file stays where it is.
            Unavailable: It cannot be read or moved.
        """
        target = self.path(digest)
        with disk_errors(self._models, 0), temporary.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise Rejected("corrupt_model", f"{temporary} has the digest {found}, not {digest}")
            os.fsync(file.fileno())
            temporary.replace(target)
            sync_folder(self._models)
        return target

    def put_chunk(self, data: bytes, expected: str | None = None) -> str:
        """Keep a chunk. Returns its digest.

        Raises:
            Rejected: With code `corrupt_chunk`: it is longer than a chunk, or does not have the digest `expected`.
            Unavailable: No room for it.
        """
        if len(data) > CHUNK_BYTES:
            raise Rejected("corrupt_chunk", f"a chunk of {len(data)} bytes, more than {CHUNK_BYTES}")
        digest = hashlib.sha256(data).hexdigest()
        if expected is not None and digest != expected:
            raise Rejected("corrupt_chunk", f"a chunk has the digest {digest}, not {expected}")
        write_durably(self._chunk_path(digest), data, sync=False)
        return digest

    def has_chunk(self, digest: str) -> bool:
        """Whether the chunk is here and whole; a damaged one is removed."""
        return self._chunk(digest) is not None

    def chunk(self, digest: str) -> bytes:
        """A chunk's bytes, verified.

        Raises:
            Unavailable: It is not here; fetch it.
        """
        data = self._chunk(digest)
        if data is None:
            raise Unavailable(f"chunk {digest} is not here")
        return data

    def assemble(self, chunks: Sequence[str], digest: str, length: int) -> Path:
        """Join chunks to a model, durably. Returns its place. The chunks stay until `collect`.

        Args:
            chunks: The manifest's digests, in order.
            digest: SHA-256 that the model must have.
            length: Bytes that it must have.

        Raises:
            Unavailable: A chunk is missing or was damaged (it is then removed: fetch it), or there is no room.
            Rejected: With code `corrupt_model`: the manifest does not lead to that model. Nothing is stored.
        """
        target = self.path(digest)
        self.require_free(length, self._reserve_bytes)
        write_pieces(target, self._joined(chunks, digest, length), length)
        return target

    def collect(self, pinned: Collection[str], manifests: Collection[str] = ()) -> int:
        """Remove every model that is not pinned, and every chunk that is neither one of `manifests` nor listed by one.

        Args:
            pinned: Digests of models.
            manifests: Digests of the manifests of models on their way here.

        Returns:
            How many files were removed, those set aside among them.

        Raises:
            Unavailable: The disk failed.
        """
        models = {self.path(digest).name for digest in pinned}
        chunks = set(manifests)
        for manifest in manifests:
            listed = self._chunk(manifest)
            chunks.update(manifest_digests(listed) if listed else ())
        removed = 0
        for folder, kept in ((self._models, models), (self._chunks, chunks)):
            with disk_errors(folder, 0):
                remove_leftovers(folder)
                # A name that begins with a dot is being written by another process.
                for path in [path for path in folder.iterdir() if path.name not in kept and path.name[0] != "."]:
                    path.unlink(missing_ok=True)
                    removed += 1
                sync_folder(folder)
        return removed

    def require_free(self, needed_bytes: int, reserve_bytes: int) -> None:
        """Check that `needed_bytes` fit and leave `reserve_bytes` free.

        Raises:
            Unavailable: They do not; the text has the figures.
        """
        require_free(self._models, needed_bytes, reserve_bytes)

    def _joined(self, chunks: Sequence[str], digest: str, length: int) -> Iterator[bytes]:
        found = hashlib.sha256()
        size = 0
        for name in chunks:
            data = self.chunk(name)
            size += len(data)
            if size > length:
                raise Rejected("corrupt_model", f"the chunks of {digest} have more than its {length} bytes", "manifest")
            found.update(data)
            yield data
        if size != length or found.hexdigest() != digest:
            text = f"the chunks of {digest} have {size} bytes and the digest {found.hexdigest()}, not {length} and that"
            raise Rejected("corrupt_model", text, "manifest")

    def _chunk_path(self, digest: str) -> Path:
        return self._chunks / checked_digest(digest)

    def _chunk(self, digest: str) -> bytes | None:
        path = self._chunk_path(digest)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        path.unlink(missing_ok=True)
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error


def _put_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    with disk_errors(path.parent, 0):
        path.replace(aside)
    return aside
