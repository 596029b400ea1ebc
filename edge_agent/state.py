"""What the agent must know after a restart: each slot's deployment state, and whether the last run ended well.

Each lies in a pair of small files of fixed size that are written in place, in turn, as U-Boot does with its redundant
environment: a torn write spoils the older copy and leaves the newer, and writing needs no room, so that a device with a
full disk can still roll back. A copy is a sequence number, a length and their SHA-256 with the content; the valid copy
with the higher number counts. What the bytes mean is the deployment machine's business.

    state/slot-<slot>.0, state/slot-<slot>.1    a slot's state
    state/run.0, state/run.1                    1 while the daemon runs
"""

from __future__ import annotations

import errno
import hashlib
import logging
import struct
from collections.abc import Collection
from pathlib import Path

from protocol.durable import OS_DISK, Disk, disk_errors, open_folder, write_durably
from protocol.errors import Misconfigured, Unavailable

log = logging.getLogger(__name__)

SLOT_BYTES = 16 * 1024
RUN_BYTES = 512
COPIES = 2

_NUMBERS = struct.Struct("<QI")
_DIGEST_BYTES = 32
_HEADER_BYTES = _DIGEST_BYTES + _NUMBERS.size
_RUNNING, _STOPPED = b"1", b"0"


class Record:
    """A few bytes that are replaced as a whole, durably, without room.

    Args:
        path: Names both copies: `.0` and `.1` are appended. The folder exists.
        size: Of each copy's file, in bytes.
        disk: Where.

    Attributes:
        content: What was written last; `None` if nothing was, or nothing valid is left.
        damaged: There was content, and it is lost.
        doubtful: There is content, and the other copy is spoilt: a write was cut short, or the newer one rotted.
    """

    def __init__(self, path: Path, size: int, disk: Disk) -> None:
        self._size = size
        self._disk = disk
        self._copies = [path.with_name(f"{path.name}.{number}") for number in range(COPIES)]
        found = [self._read(copy) for copy in self._copies]
        valid = [(sequence, number) for number, (sequence, _, _) in enumerate(found) if sequence]
        self._sequence, newest = max(valid, default=(0, 0))
        self._next = 1 - newest if valid else 0
        self.content = found[newest][1] if valid else None
        self.damaged = not valid and any(used for _, _, used in found)
        self.doubtful = len(valid) == 1 and all(used for _, _, used in found)
        if self.damaged:
            self._set_aside()
        if valid:
            self._settle(self._copies[newest])
        self._prepare()

    def write(self, content: bytes) -> None:
        """Replace the content, durably before this returns.

        Raises:
            Unavailable: The disk failed; what was there before still counts.
            Misconfigured: It is too long.
        """
        if _HEADER_BYTES + len(content) > self._size:
            raise Misconfigured(f"{len(content)} bytes do not fit {self._copies[0]} and its {self._size}")
        numbers = _NUMBERS.pack(self._sequence + 1, len(content))
        block = hashlib.sha256(numbers + content).digest() + numbers + content
        copy = self._copies[self._next]
        with disk_errors(copy.parent, 0, self._disk):
            if not self._written_over(copy, block):
                write_durably(copy, block.ljust(self._size, b"\0"), disk=self._disk)
        self._sequence += 1
        self._next = 1 - self._next
        self.content = content
        self.damaged = False

    def _written_over(self, copy: Path, block: bytes) -> bool:
        """Write a block into its place; `False` if that is not there, or is a spot of the disk that failed."""
        try:
            self._disk.overwrite(copy, block, sync=True)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return True

    def _set_aside(self) -> None:
        """Keep damaged copies for a person to look at."""
        for copy in filter(self._disk.is_file, self._copies):
            try:
                self._disk.rename(copy, copy.with_name(f"{copy.name}.corrupt"))
            except OSError as error:
                log.warning("cannot set %s aside: %s", copy, error)

    def _settle(self, copy: Path) -> None:
        """Sync what was read: who wrote it may have been killed before it did, and what follows must not outlive it."""
        try:
            with disk_errors(copy.parent, 0, self._disk):
                self._disk.overwrite(copy, self._disk.read(copy), sync=True)
        except Unavailable as error:
            log.warning("cannot sync a state that was read: %s", error)

    def _prepare(self) -> None:
        """Take the room that later writes will need. A copy that cannot be read now may be the newer one: it stays."""
        for copy in self._copies:
            try:
                if not self._is_whole(copy):
                    write_durably(copy, bytes(self._size), disk=self._disk)
            except Unavailable as error:
                log.warning("cannot reserve room for a state: %s", error)

    def _is_whole(self, copy: Path) -> bool:
        try:
            return len(self._disk.read(copy)) == self._size
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def _read(self, copy: Path) -> tuple[int, bytes, bool]:
        """Sequence number and content, 0 and nothing if it is not valid; and whether it was ever written."""
        try:
            data = self._disk.read(copy)
        except FileNotFoundError:
            return 0, b"", False
        except OSError as error:
            log.error("cannot read %s: %s", copy, error)
            return 0, b"", True
        digest, rest = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if len(rest) >= _NUMBERS.size:
            sequence, length = _NUMBERS.unpack_from(rest)
            content = rest[_NUMBERS.size : _NUMBERS.size + length]
            if hashlib.sha256(rest[: _NUMBERS.size] + content).digest() == digest and sequence:
                return sequence, content, True
        return 0, b"", any(data)


class StateStore:
    """The agent's states, for the supervisor alone.

    Args:
        folder: Made if missing.
        slots: Names of the slots.
        disk: Where.

    Attributes:
        lost: Slots whose state was there and is damaged.
        doubtful: Slots of whose state one copy is spoilt: it may have been the newer one.

    Raises:
        Unavailable: The folder cannot be made.
    """

    def __init__(self, folder: Path, slots: Collection[str], disk: Disk = OS_DISK) -> None:
        open_folder(folder, disk)
        self._slots = {slot: Record(folder / f"slot-{slot}", SLOT_BYTES, disk) for slot in slots}
        self._run = Record(folder / "run", RUN_BYTES, disk)
        self.lost = tuple(slot for slot, record in self._slots.items() if record.damaged)
        self.doubtful = tuple(slot for slot, record in self._slots.items() if record.doubtful)

    def load(self, slot: str) -> bytes | None:
        """A slot's last saved state, or `None`."""
        return self._slots[slot].content

    def save(self, slot: str, state: bytes) -> None:
        """Replace a slot's state, durably before this returns.

        Raises:
            Unavailable: The disk failed; the state before is still the one that is loaded.
        """
        self._slots[slot].write(state)

    def mark_running(self) -> bool:
        """Note that a run begins. Returns whether the one before ended with `mark_stopped`, or there was none.

        Where it cannot be noted, the run's unclean end will not count against a model.
        """
        was_running = self._run.content == _RUNNING
        self._mark(_RUNNING)
        return not was_running

    def mark_stopped(self) -> None:
        """Note that the run ends as it should."""
        self._mark(_STOPPED)

    def _mark(self, content: bytes) -> None:
        try:
            self._run.write(content)
        except Unavailable as error:
            log.error("cannot note whether the daemon runs: %s", error)
