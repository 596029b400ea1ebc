"""Models and their chunks in a folder, each file named by the SHA-256 of its content.

    models/<sha256>.tflite            whole models, durable once they are here
    chunks/<sha256>                   pieces of a model on its way, and manifests
    models/<sha256>.tflite.corrupt-<n>   a model whose content no longer fits its name

A model is verified each time it is opened, not only when it arrives: cards rot. A chunk is not synced to disk,
because each is verified again when it is counted or assembled: a torn one costs a fetch, and an fsync each would cost
minutes. Many processes may read one folder, the stager alone writes; a file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from protocol.durable import OS_DISK, Disk, disk_errors, remove_leftovers, require_free, write_durably, write_pieces
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.release import CHUNK_BYTES, manifest_digests
from protocol.topics import checked_digest

# How a process that loads models names it that the bytes are not to be had; the model itself is not to blame.
LOST_MODEL = frozenset({"corrupt_model", "unavailable"})

MODEL_SUFFIX = ".tflite"


class ModelStore:
    """A folder of verified models.

    Args:
        folder: Made if missing.
        disk: Which it is on.
        reserve_bytes: What `put` and `assemble` leave free there.

    Raises:
        Misconfigured: The folder cannot be made.
    """

    def __init__(self, folder: Path, disk: Disk = OS_DISK, *, reserve_bytes: int = 0) -> None:
        self._disk = disk
        self._models = folder / "models"
        self._chunks = folder / "chunks"
        self._reserve_bytes = reserve_bytes
        self._within: dict[str, tuple[Path, int]] = {}
        self._opened: tuple[Path, bytes] | None = None
        for part in (self._models, self._chunks):
            try:
                if not disk.is_folder(part):
                    disk.make_folder(part)
            except OSError as error:
                raise Misconfigured(f"cannot use the folder {part}: {error.strerror}") from error

    def path(self, digest: str) -> Path:
        """Where the model with this digest is, or would be."""
        return self._models / f"{checked_digest(digest)}{MODEL_SUFFIX}"

    def __contains__(self, digest: str) -> bool:
        with disk_errors(self._models, 0, self._disk):
            return self._disk.is_file(self.path(digest))

    def remove_leftovers(self) -> None:
        """Clean up after a writer that was killed, and make durable what it had just stored. For the next writer.

        Raises:
            Unavailable: The disk failed.
        """
        for folder in (self._models, self._chunks):
            with disk_errors(folder, 0, self._disk):
                self._disk.make_folder(folder)
                remove_leftovers(folder, self._disk)
                self._disk.sync_folder(folder)

    def put(self, data: bytes) -> str:
        """Store a model durably. Returns its digest.

        Raises:
            Unavailable: No room for it, with the bytes needed and free.
        """
        digest = hashlib.sha256(data).hexdigest()
        self.require_free(len(data), self._reserve_bytes)
        write_durably(self.path(digest), data, disk=self._disk)
        return digest

    def open(self, digest: str) -> bytes:
        """A model's bytes, verified.

        Raises:
            Unavailable: It is not here, or cannot be read.
            Rejected: With code `corrupt_model`; the file is set aside.
        """
        path = self.path(digest)
        try:
            data = self._disk.read(path)
        except OSError as error:
            raise Unavailable(f"cannot read {path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            aside = self._put_aside(path)
            raise Rejected("corrupt_model", f"the content of {path} does not have that digest; it is now {aside.name}")
        return data

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
        write_durably(self._chunk_path(digest), data, sync=False, disk=self._disk)
        return digest

    def index_models(self, wanted: Collection[str]) -> None:
        """Find chunks in the models that are here, so that they count as here too until the process ends.

        They are not copied: `chunk` and `assemble` take them from where they are. A fine-tuned model shares the layers
        that were frozen with the one it was made of, at the same places.

        Args:
            wanted: Digests of the chunks to look for, e.g. all of a manifest.
        """
        sought = {digest for digest in wanted if self._chunk(digest) is None}
        with disk_errors(self._models, 0, self._disk):
            models = sorted(self._disk.names(self._models)) if sought else []
        for path in (self._models / name for name in models if name.endswith(MODEL_SUFFIX)):
            data = self._content(path)
            for start in range(0, len(data), CHUNK_BYTES):
                digest = hashlib.sha256(data[start : start + CHUNK_BYTES]).hexdigest()
                if digest in sought:
                    self._within.setdefault(digest, (path, start))
        self._opened = None

    def has_chunk(self, digest: str) -> bool:
        """Whether the chunk is here and whole; a damaged one is removed."""
        return digest in self._within or self._chunk(digest) is not None

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
        try:
            write_pieces(target, self._joined(chunks, digest, length), length, disk=self._disk)
        finally:
            self._opened = None
        return target

    def collect(self, pinned: Collection[str], manifests: Collection[str] = ()) -> int:
        """Remove every model that is not pinned, and every chunk that is neither one of `manifests` nor listed by one.

        Not while a stager writes here.

        Args:
            pinned: Digests of models.
            manifests: Digests of the manifests of models on their way here.

        Returns:
            How many files were removed, leftovers and those set aside among them.

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
            with disk_errors(folder, 0, self._disk):
                surplus = [name for name in self._disk.names(folder) if name not in kept]
                for name in surplus:
                    self._disk.remove(folder / name)
                self._disk.sync_folder(folder)
            removed += len(surplus)
        return removed

    def require_free(self, needed_bytes: int, reserve_bytes: int) -> None:
        """Check that `needed_bytes` fit and leave `reserve_bytes` free.

        Raises:
            Unavailable: They do not; the text has the figures.
        """
        with disk_errors(self._models, needed_bytes, self._disk):
            require_free(self._models, needed_bytes, reserve_bytes, self._disk)

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
            data = self._disk.read(path)
        except OSError:
            return self._chunk_within(digest)
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        with disk_errors(path.parent, 0, self._disk):
            self._disk.remove(path)
        return self._chunk_within(digest)

    def _chunk_within(self, digest: str) -> bytes | None:
        """A chunk of an indexed model, if it still is that chunk."""
        if digest not in self._within:
            return None
        path, start = self._within[digest]
        data = self._content(path)[start : start + CHUNK_BYTES]
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def _content(self, path: Path) -> bytes:
        """A model's bytes, unverified; none where it cannot be read. Those of the last one are kept in memory."""
        if self._opened is None or self._opened[0] != path:
            self._opened = None  # one at a time
            try:
                self._opened = (path, self._disk.read(path))
            except OSError:
                return b""
        return self._opened[1]

    def _put_aside(self, path: Path) -> Path:
        number = 1
        while self._disk.is_file(aside := path.with_name(f"{path.name}.corrupt-{number}")):
            number += 1
        with disk_errors(path.parent, 0, self._disk):
            self._disk.rename(path, aside)
        return aside
