"""What time it is at least, for a device whose clock may start in 1970.

No clock that is earlier than when this software was built is right, nor one that is earlier than when a metadata set
was last accepted. So a clock that is set back cannot make a set that has expired fresh again.

Only an acceptance raises the remembered time, and a set is only accepted before it expires. So a clock that once ran
ahead takes the remembered time no further than the end of a set that was valid then; one that is years ahead finds
everything expired, moves nothing, and does no harm once it is right again.

`edge_agent.trust` decides by the `now` that it is given. The process that verifies asks here for it, and reports here
what was accepted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from datetime import UTC, datetime
from pathlib import Path

from protocol.durable import OS_DISK, Disk, write_durably
from protocol.errors import Unavailable

log = logging.getLogger(__name__)

FILE = "trusted-time"
# Before this software was. Not a file's date: that is when it was installed, by a clock that may have been wrong.
BUILT_AT = datetime(2026, 11, 1, tzinfo=UTC).timestamp()


class TrustedTime:
    """The latest time that is known to have passed.

    Args:
        file: Where it is remembered: seconds since the epoch, then the SHA-256 of that line. Beside the folder of
            accepted metadata, not in it. A damaged file counts as none.
        disk: Where the file is.
    """

    def __init__(self, file: Path, disk: Disk = OS_DISK) -> None:
        self._file = file
        self._disk = disk
        with contextlib.suppress(OSError):
            disk.remove(file.with_name(f".{file.name}.new"))  # of a process that was killed

    def now(self, *clocks: float) -> datetime:
        """The latest of some clocks and of the last acceptance.

        Args:
            clocks: Seconds since the epoch: the system's clock, and when this software was built.
        """
        return datetime.fromtimestamp(max(*clocks, self._remembered()), UTC)

    def accepted(self, now: datetime) -> None:
        """Remember durably that a set was accepted. A disk that refuses is logged: the set counts nevertheless."""
        if now.timestamp() <= self._remembered():
            return
        line = f"{int(now.timestamp())}\n".encode()
        try:
            write_durably(self._file, line + _checksum(line), disk=self._disk)
        except Unavailable as error:
            log.error("cannot remember the time: %s", error)

    def _remembered(self) -> float:
        try:
            data = self._disk.read(self._file)
        except FileNotFoundError:
            return 0.0
        except OSError as error:
            log.error("cannot read %s: %s", self._file, error)
            return 0.0
        line, checksum = data[: data.find(b"\n") + 1], data[data.find(b"\n") + 1 :]
        if not line or checksum != _checksum(line):
            log.error("%s is damaged and does not count", self._file)
            return 0.0
        return float(line)


def _checksum(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode()
