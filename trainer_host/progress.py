"""What the host is doing, as lines of JSON in a bounded file, for whoever watches: `{"at": …, "kind": "epoch", …}`.

Kinds: `training` (a job began), `epoch`, `trained`, `gate`, `released`, `refused`, `failed`. When the file is full it
becomes `<name>.1`, in the place of an older one, and a new one begins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec

log = logging.getLogger(__name__)

MAX_BYTES = 4 * 1024 * 1024

Report = Callable[..., None]


class ProgressFile:
    """Call it with a kind and fields to append a line; from any thread.

    Args:
        path: The file.
        max_bytes: Bound of the file; twice as much is kept.
        clock: Seconds since the epoch.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = Lock()

    def __call__(self, kind: str, **fields: Any) -> None:
        """Append a line. A disk that fails costs the line, and says so in the log."""
        line = msgspec.json.encode({"at": self._clock(), "kind": kind, **fields}) + b"\n"
        with self._lock:
            try:
                if self._path.exists() and self._path.stat().st_size + len(line) > self._max_bytes:
                    self._path.replace(self._path.with_name(f"{self._path.name}.1"))
                with self._path.open("ab") as file:
                    file.write(line)
            except OSError as error:
                log.warning("cannot write %s: %s", self._path, error)
