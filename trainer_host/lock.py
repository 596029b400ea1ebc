"""One daemon on one state folder: a lock that the system gives back whatever ends the process.

Whoever asks whether a daemon is running holds the lock for a moment, so a daemon tries more than once.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import Misconfigured

NAME = "host.lock"
ATTEMPTS = 5
RETRY_S = 0.05


@contextmanager
def only_daemon(state_dir: Path) -> Iterator[None]:
    """Claim the state folder while the block lasts.

    Raises:
        Misconfigured: Another daemon has it, or it cannot be written.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(state_dir / NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Misconfigured(f"cannot write to {state_dir}: {error.strerror}") from error
    try:
        if not _taken_in_time(descriptor):
            raise Misconfigured(f"another trainer-host is running on {state_dir}")
        yield
    finally:
        os.close(descriptor)


def is_running(state_dir: Path) -> bool:
    """Whether a daemon holds the state folder now."""
    try:
        descriptor = os.open(state_dir / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _taken(descriptor)
    finally:
        os.close(descriptor)


def _taken_in_time(descriptor: int) -> bool:
    for _ in range(ATTEMPTS - 1):
        if _taken(descriptor):
            return True
        time.sleep(RETRY_S)
    return _taken(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
