"""One process of a kind on one state folder: a lock that the system gives back whatever ends the process.

Whoever asks whether a daemon is running holds the lock for a moment, so a daemon tries more than once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.durable import unusable
from protocol.errors import Unavailable

WAIT_S = 0.25
RETRY_S = 0.05


@contextmanager
def only_daemon(state_dir: Path, program: str, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Claim the state folder while the block lasts.

    Args:
        state_dir: It is made where it is missing.
        program: Whose daemon claims it.
        wait_s: How long to wait for another that is ending.

    Raises:
        Unavailable: Another daemon of the program has it, or the disk failed.
        Misconfigured: It must not be made or written to.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(lock_file(state_dir, program))
    except OSError as error:
        raise unusable(state_dir, error) from error
    try:
        if not take(descriptor, wait_s):
            raise Unavailable(f"another {program} is running on {state_dir}")
        yield
    finally:
        os.close(descriptor)


def is_running(state_dir: Path, program: str) -> bool:
    """Whether a daemon of the program holds the state folder now."""
    try:
        descriptor = os.open(lock_file(state_dir, program), os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _taken(descriptor)
    finally:
        os.close(descriptor)


def lock_file(state_dir: Path, program: str) -> Path:
    """The file that is locked; it stays when the daemon ends."""
    return state_dir / f"{program}.lock"


def open_lock(path: Path) -> int:
    """A lock's file, made if need be; on a disk that went read-only it is there already, and reading is enough.

    Returns:
        Its descriptor. Closing it gives the lock back.

    Raises:
        OSError: It cannot be opened.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC):
            raise
        return os.open(path, os.O_RDONLY)


def take(descriptor: int, wait_s: float) -> bool:
    """Take a lock that is open, within `wait_s` seconds. Returns whether that was done."""
    deadline = time.monotonic() + wait_s
    while not _taken(descriptor):
        if time.monotonic() >= deadline:
            return False
        time.sleep(RETRY_S)
    return True


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
