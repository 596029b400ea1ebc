"""Files that are either wholly there or not there, across kill -9 and power loss.

Write a temporary file beside the target, fsync it, rename it over the target, fsync the folder. The temporary file's
name holds the writer's process id, so whoever opens the folder later can tell a leftover from a file that is being
written.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import Unavailable

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_durably(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Put `data` at `path`: after a return it survives a power loss, after an error `path` is as it was.

    Args:
        path: Where. Its folder exists.
        data: The whole content.
        sync: Whether to wait for the disk. Without, the file may be torn after a power loss (never after a crash).

    Raises:
        Unavailable: The disk is full, or failed. The text says how many bytes were needed and how many are free.
    """
    write_pieces(path, (data,), len(data), sync=sync)


def write_pieces(path: Path, pieces: Iterable[bytes], size: int, *, sync: bool = True) -> None:
    """As `write_durably`, for `size` bytes that come in pieces. An error in `pieces` leaves `path` as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with disk_errors(path.parent, size):
            with temporary.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if sync:
                sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_free(folder: Path, needed_bytes: int, reserve_bytes: int = 0) -> None:
    """Check that `needed_bytes` fit on the disk of `folder` and leave `reserve_bytes` for others.

    Raises:
        Unavailable: They do not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + reserve_bytes:
        raise Unavailable(
            f"{folder} needs {needed_bytes} bytes and a reserve of {reserve_bytes}, but {free} bytes are free"
        )


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files whose writer is gone. Returns how many."""
    removed = 0
    for path in folder.glob(".*.tmp"):
        writer = path.name.removesuffix(".tmp").rpartition(".")[2].partition("-")[0]
        # A file of our own number is an earlier life's: this process writes one file at a time, and not now.
        if writer.isdigit() and (int(writer) == os.getpid() or not _alive(int(writer))):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


@contextmanager
def disk_errors(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn an operating system's refusal to write into `Unavailable`, with the figures where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(folder).free
            raise Unavailable(f"no space in {folder}: {needed_bytes} bytes needed, {free} free") from error
        raise Unavailable(f"cannot write to {folder}: {error}") from error


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
