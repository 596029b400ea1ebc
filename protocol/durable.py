"""Files that are either wholly there or not there, across kill -9 and power loss.

Write a temporary file beside the target, fsync it, rename it over the target, fsync the folder. The temporary file of
`name` is `.name.new`: at most one process writes in a folder at a time, and it removes what a dead one left there.

The few calls of the operating system that all this is made of are gathered in `Disk`, so that a simulation can take its
place: one that fails, fills up, and loses at a power cut whatever was not synced.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from protocol.errors import Misconfigured, Unavailable

log = logging.getLogger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What stays so until somebody changes owners, modes or names.
_FOR_A_PERSON = frozenset({errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})


class Disk(Protocol):
    """What storage asks of the operating system. Every method raises `OSError` as the system does."""

    def read(self, path: Path) -> bytes:
        """A file's content."""

    def is_file(self, path: Path) -> bool:
        """Whether there is such a file."""

    def is_folder(self, path: Path) -> bool:
        """Whether there is such a folder."""

    def names(self, folder: Path) -> list[str]:
        """The names in a folder."""

    def free_bytes(self, folder: Path) -> int:
        """Room on the disk that the folder is on."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it, unless they are there; they are on the disk on return."""

    def write(self, path: Path, pieces: Iterable[bytes], *, sync: bool) -> None:
        """Make a file, or empty it, and write it; with `sync`, its content is on the disk on return."""

    def reserve(self, path: Path, size: int) -> None:
        """Make a file of `size` zeros, or make it anew, with the room for what will be written over them."""

    def overwrite(self, path: Path, data: bytes, *, sync: bool, at: int = 0) -> None:
        """Write over bytes of a file that is long enough, from `at` on: this needs no room.

        With `sync`, all of the file's content is on the disk on return.
        """

    def rename(self, path: Path, target: Path) -> None:
        """Give a file another name, in place of what had it."""

    def remove(self, path: Path) -> None:
        """Remove a file if it is there."""

    def sync_folder(self, folder: Path) -> None:
        """Put on the disk what was made, renamed and removed in a folder."""


class OsDisk:
    """The real one."""

    def read(self, path: Path) -> bytes:
        """See `Disk`."""
        return path.read_bytes()

    def is_file(self, path: Path) -> bool:
        """See `Disk`."""
        return path.is_file()

    def is_folder(self, path: Path) -> bool:
        """See `Disk`."""
        return path.is_dir()

    def names(self, folder: Path) -> list[str]:
        """See `Disk`."""
        return [path.name for path in folder.iterdir()]

    def free_bytes(self, folder: Path) -> int:
        """See `Disk`."""
        return shutil.disk_usage(folder).free

    def make_folder(self, folder: Path) -> None:
        """See `Disk`."""
        if not folder.is_dir():
            self.make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(PermissionError):  # where we may not even look, we have made nothing
                self.sync_folder(folder.parent.parent)  # who made the folder above may have been killed before this
            self.sync_folder(folder.parent)

    def write(self, path: Path, pieces: Iterable[bytes], *, sync: bool) -> None:
        """See `Disk`."""
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def reserve(self, path: Path, size: int) -> None:
        """See `Disk`. Where the system cannot reserve, the file takes its room when it is written over."""
        with path.open("wb") as file:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                os.ftruncate(file.fileno(), size)

    def overwrite(self, path: Path, data: bytes, *, sync: bool, at: int = 0) -> None:
        """See `Disk`."""
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def rename(self, path: Path, target: Path) -> None:
        """See `Disk`."""
        path.replace(target)

    def remove(self, path: Path) -> None:
        """See `Disk`."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """See `Disk`."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


OS_DISK = OsDisk()


def write_durably(path: Path, data: bytes, *, sync: bool = True, disk: Disk = OS_DISK) -> None:
    """Put `data` at `path`: after a return it survives a power loss, after an error `path` is as it was.

    Args:
        path: Where. Its folder exists.
        data: The whole content.
        sync: Whether to wait for the disk. Without, the file may be torn after a power loss (never after a crash).
        disk: Where.

    Raises:
        Unavailable: The disk is full, or failed. The text says how many bytes were needed and how many are free.
    """
    write_pieces(path, (data,), len(data), sync=sync, disk=disk)


def write_pieces(path: Path, pieces: Iterable[bytes], size: int, *, sync: bool = True, disk: Disk = OS_DISK) -> None:
    """As `write_durably`, for `size` bytes that come in pieces. An error in `pieces` leaves `path` as it was."""
    temporary = path.with_name(f".{path.name}.new")
    with disk_errors(path.parent, size, disk):
        try:
            disk.write(temporary, pieces, sync=sync)
            disk.rename(temporary, path)
        except Exception:
            disk.remove(temporary)
            raise
        if sync:
            disk.sync_folder(path.parent)


def remove_leftovers(folder: Path, disk: Disk = OS_DISK) -> int:
    """Remove what a writer that was killed left half-written. Returns how many files that were."""
    left = [name for name in disk.names(folder) if name.startswith(".") and name.endswith(".new")]
    for name in left:
        disk.remove(folder / name)
    return len(left)


def open_folder(folder: Path, disk: Disk = OS_DISK) -> None:
    """Make a folder, if it is not there, and clean up after a writer that was killed.

    What such a writer had just renamed is made durable. A folder that is there serves also where it cannot be written.

    Raises:
        Unavailable: It is not there and cannot be made.
    """
    try:
        disk.make_folder(folder)
        remove_leftovers(folder, disk)
        disk.sync_folder(folder)
    except OSError as error:
        if not disk.is_folder(folder):
            raise Unavailable(f"cannot make {folder}: {error.strerror or error}") from error
        log.warning("cannot clean up in %s: %s", folder, error)


def require_free(folder: Path, needed_bytes: int, reserve_bytes: int = 0, disk: Disk = OS_DISK) -> None:
    """Check that `needed_bytes` fit on the disk of `folder` and leave `reserve_bytes` for others.

    Raises:
        Unavailable: They do not.
    """
    free = disk.free_bytes(folder)
    if free < needed_bytes + reserve_bytes:
        raise Unavailable(
            f"{folder} needs {needed_bytes} bytes and a reserve of {reserve_bytes}, but {free} bytes are free"
        )


def is_full(error: Unavailable) -> bool:
    """Whether it was for want of room."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _FULL


def unusable(folder: Path, error: OSError) -> Misconfigured | Unavailable:
    """What to raise where a folder cannot be made or used: only some of it can a person mend, the rest may pass."""
    kind = Misconfigured if error.errno in _FOR_A_PERSON else Unavailable
    return kind(f"cannot use the folder {folder}: {error.strerror or error}")


@contextmanager
def disk_errors(folder: Path, needed_bytes: int, disk: Disk = OS_DISK) -> Iterator[None]:
    """Turn an operating system's refusal into `Unavailable`, with the figures where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = disk.free_bytes(folder)
            raise Unavailable(f"no space in {folder}: {needed_bytes} bytes needed, {free} free") from error
        raise Unavailable(f"cannot write to {folder}: {error.strerror or error}") from error
