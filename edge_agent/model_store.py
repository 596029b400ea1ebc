"""Models in a folder, each file named by the SHA-256 of its content, and the one that is on its way.

    models/<sha256>.tflite               whole models, durable once they are here
    models/<manifest's sha256>.part      a model on its way: a file of its full length, each chunk where it belongs
    models/<sha256>.tflite.corrupt-<n>   a model whose content no longer fits its name
    chunks/<sha256>                      manifests

A model is verified each time it is opened, not only when it arrives: cards rot. A chunk is not synced to disk, because
each is verified again when another process finds it: a torn one costs a fetch, and an fsync each would cost minutes. A
model whose chunks are all in their places is synced and renamed, so nothing is written twice, and it needs its own room
and no more. Many processes may read one folder, the stager alone writes; a model appears whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from protocol.durable import OS_DISK, Disk, disk_errors, remove_leftovers, require_free, unusable, write_durably
from protocol.errors import Rejected, Unavailable
from protocol.release import CHUNK_BYTES, manifest_digests
from protocol.topics import checked_digest

# How a process that loads models names it that the bytes are not to be had; the model itself is not to blame.
LOST_MODEL = frozenset({"corrupt_model", "unavailable"})

CORRUPT_CHUNK = "corrupt_chunk"
MODEL_SUFFIX, PART_SUFFIX = ".tflite", ".part"


class ModelStore:
    """A folder of verified models.

    Args:
        folder: Made if missing.
        disk: Which it is on.
        reserve_bytes: What models leave free there.

    Raises:
        Misconfigured: The folder must not be made.
        Unavailable: The disk failed.
    """

    def __init__(self, folder: Path, disk: Disk = OS_DISK, *, reserve_bytes: int = 0) -> None:
        self._disk = disk
        self._models = folder / "models"
        self._chunks = folder / "chunks"
        self._reserve_bytes = reserve_bytes
        self._part: _Part | None = None
        for part in (self._models, self._chunks):
            try:
                if not disk.is_folder(part):
                    disk.make_folder(part)
            except OSError as error:
                raise unusable(part, error) from error

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
        self._require_free(len(data))
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

    def require_room(self, manifest: str, length: int) -> None:
        """Check that there is room for a model on its way; what was begun has its room already.

        Args:
            manifest: Digest of the model's manifest.
            length: The model's, in bytes.

        Raises:
            Unavailable: There is not; the text has the figures.
        """
        with disk_errors(self._models, length, self._disk):
            begun = self._disk.is_file(self._part_path(manifest))
        if not begun:
            self._require_free(length)

    def begin(self, manifest: str, chunks: Sequence[str], length: int) -> None:
        """Make ready for a model on its way: from now on, `put_chunk` puts its chunks where they belong.

        What an earlier try left is found again. Chunks of other models are copied: a fine-tuned model shares the layers
        that were frozen with the one it was made of.

        Args:
            manifest: Digest of its manifest.
            chunks: The manifest's digests, in order.
            length: The model's, in bytes.

        Raises:
            Unavailable: No room for it, or the disk failed.
            Rejected: With code `corrupt_model`: the manifest does not lead to a model of that length.
        """
        if len(chunks) != -(-length // CHUNK_BYTES):
            raise Rejected("corrupt_model", f"{len(chunks)} chunks are no model of {length} bytes", "manifest")
        path = self._part_path(manifest)
        with disk_errors(self._models, length, self._disk):
            left = self._content(path)
            if len(left) != length:
                self._reserve(path, length)
            part = self._part = _Part(path, chunks, length, self._disk)
            # Written over with itself: a sync that failed before would not be repeated for what is clean.
            part.take(left)
            del left
            suffixes = (MODEL_SUFFIX, PART_SUFFIX)
            models = [name for name in sorted(self._disk.names(self._models)) if name.endswith(suffixes)]
            loose = [name for name in self._disk.names(self._chunks) if name in part.missing]
            for other in (*(self._chunks / name for name in loose), *(self._models / name for name in models)):
                if part.missing and other != path:
                    part.take(self._content(other))

    def put_chunk(self, data: bytes, expected: str | None = None) -> str:
        """Keep a chunk: one of the model that was begun in its place, any other in a file of its own.

        Returns:
            Its digest.

        Raises:
            Rejected: With code `corrupt_chunk`: it is longer than a chunk, or does not have the digest `expected`. With
                code `corrupt_model`: it does not fit into the model, so the manifest lists what it must not.
            Unavailable: No room for it, or the disk failed.
        """
        if len(data) > CHUNK_BYTES:
            raise Rejected(CORRUPT_CHUNK, f"a chunk of {len(data)} bytes, more than {CHUNK_BYTES}")
        digest = hashlib.sha256(data).hexdigest()
        if expected is not None and digest != expected:
            raise Rejected(CORRUPT_CHUNK, f"a chunk has the digest {digest}, not {expected}")
        if self._part is not None and digest in self._part:
            with disk_errors(self._models, len(data), self._disk):
                self._part.put(digest, data)
        else:
            write_durably(self._chunk_path(digest), data, sync=False, disk=self._disk)
        return digest

    def has_chunk(self, digest: str) -> bool:
        """Whether the chunk is here and whole; a damaged one is removed."""
        if self._part is not None and digest in self._part:
            return digest not in self._part.missing
        return self._chunk(digest) is not None

    def chunk(self, digest: str) -> bytes:
        """The bytes of a chunk in a file of its own, verified.

        Raises:
            Unavailable: It is not here; fetch it.
        """
        data = self._chunk(digest)
        if data is None:
            raise Unavailable(f"chunk {digest} is not here")
        return data

    def assemble(self, digest: str) -> Path:
        """Make the model that was begun, and whose chunks are all here, a model, durably. Returns its place.

        Args:
            digest: SHA-256 that the model must have.

        Raises:
            Unavailable: A chunk is missing or was damaged (begin again, and fetch it), or the disk failed.
            Rejected: With code `corrupt_model`: the manifest does not lead to that model. Nothing is stored.
        """
        part, self._part = self._part, None
        assert part is not None, "begin it first"
        if part.missing:
            raise Unavailable(f"{len(part.missing)} chunks are not here, e.g. {min(part.missing)}")
        target = self.path(digest)
        with disk_errors(self._models, 0, self._disk):
            data = self._disk.read(part.path)
            if hashlib.sha256(data).hexdigest() != digest:
                if part.is_whole(data):
                    self._disk.remove(part.path)
                    raise Rejected("corrupt_model", f"the chunks are not those of {digest}", "manifest")
                raise Unavailable(f"a chunk of {digest} was damaged on the disk")
            self._disk.overwrite(part.path, b"", sync=True)
            self._disk.rename(part.path, target)
            self._disk.sync_folder(self._models)
        return target

    def collect(self, pinned: Collection[str], manifests: Collection[str] = ()) -> int:
        """Remove every model that is neither pinned nor on its way, and every chunk that is not needed for one that is.

        Not while a stager writes here.

        Args:
            pinned: Digests of models.
            manifests: Digests of the manifests of models on their way here.

        Returns:
            How many files were removed, leftovers and those set aside among them.

        Raises:
            Unavailable: The disk failed.
        """
        models = {*(self.path(digest).name for digest in pinned), *(self._part_path(each).name for each in manifests)}
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

    def _require_free(self, needed_bytes: int) -> None:
        with disk_errors(self._models, needed_bytes, self._disk):
            require_free(self._models, needed_bytes, self._reserve_bytes, self._disk)

    def _reserve(self, path: Path, length: int) -> None:
        try:
            self._disk.reserve(path, length)
        except Exception:
            self._disk.remove(path)
            raise

    def _part_path(self, manifest: str) -> Path:
        return self._models / f"{checked_digest(manifest)}{PART_SUFFIX}"

    def _chunk_path(self, digest: str) -> Path:
        return self._chunks / checked_digest(digest)

    def _chunk(self, digest: str) -> bytes | None:
        path = self._chunk_path(digest)
        try:
            data = self._disk.read(path)
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        with disk_errors(path.parent, 0, self._disk):
            self._disk.remove(path)
        return None

    def _content(self, path: Path) -> bytes:
        """A file's bytes, unverified; none where it cannot be read."""
        try:
            return self._disk.read(path)
        except OSError:
            return b""

    def _put_aside(self, path: Path) -> Path:
        number = 1
        while self._disk.is_file(aside := path.with_name(f"{path.name}.corrupt-{number}")):
            number += 1
        with disk_errors(path.parent, 0, self._disk):
            self._disk.rename(path, aside)
        return aside


class _Part:
    """A model on its way.

    Args:
        path: Of its file, which has the model's length.
        chunks: Digests, in order.
        length: Bytes of the model.
        disk: Which it is on.

    Attributes:
        path: Likewise.
        missing: Digests of the chunks that are not in their places.

    Methods raise `Rejected` with code `corrupt_model` where a chunk has not the length of its place, and `OSError`.
    """

    def __init__(self, path: Path, chunks: Sequence[str], length: int, disk: Disk) -> None:
        self.path = path
        self._places: dict[str, list[int]] = {}  # where in the file; a model may contain the same chunk twice
        for index, digest in enumerate(chunks):
            self._places.setdefault(digest, []).append(index * CHUNK_BYTES)
        self.missing = set(self._places)
        self._length = length
        self._disk = disk

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def put(self, digest: str, data: bytes) -> None:
        """Put a chunk where it belongs."""
        for start in self._places[digest]:
            if len(data) != min(CHUNK_BYTES, self._length - start):
                text = f"the manifest has a chunk of {len(data)} bytes at {start}, in a model of {self._length}"
                raise Rejected("corrupt_model", text, "manifest")
        for start in self._places[digest]:
            self._disk.overwrite(self.path, data, at=start, sync=False)
        self.missing.discard(digest)

    def take(self, content: bytes) -> None:
        """Take the chunks that are missing from another file, or from this one."""
        for _, digest, chunk in _chunks(content):
            if digest in self.missing:
                self.put(digest, chunk)

    def is_whole(self, content: bytes) -> bool:
        """Whether each chunk is in its place."""
        return all(at in self._places.get(digest, ()) for at, digest, _ in _chunks(content))


def _chunks(content: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Place, digest and bytes of each chunk in a file."""
    for start in range(0, len(content), CHUNK_BYTES):
        chunk = content[start : start + CHUNK_BYTES]
        yield start, hashlib.sha256(chunk).hexdigest(), chunk
