"""What verified metadata said about the models on this device: they can be served without verifying it again.

One small file per release, `<slot>-<version>-<digest>.json`: the SHA-256 of the rest, and the release. Cards rot; a
file that no longer fits its checksum says nothing any more, and the next verified metadata writes it again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from pathlib import Path

import msgspec

from protocol.durable import OS_DISK, Disk, disk_errors, open_folder, write_durably
from protocol.messages import ModelRef
from protocol.release import Release
from protocol.topics import checked_digest, checked_name

log = logging.getLogger(__name__)

Named = tuple[str, ModelRef]


class Releases:
    """A folder of verified releases, named by slot and model; for the supervisor alone.

    The digest is part of the name: whoever releases other bytes under a version that was used before must not change
    what is known of the model that is served.

    Args:
        folder: Made if it is not there.
        disk: Which it is on.

    Raises:
        Unavailable: The folder cannot be made.
    """

    def __init__(self, folder: Path, disk: Disk = OS_DISK) -> None:
        self._folder = folder
        self._disk = disk
        self._known: dict[Named, Release] = {}
        self._unsynced: set[Named] = set()
        open_folder(folder, disk)

    def keep(self, release: Release) -> None:
        """Remember a verified release, durably.

        Raises:
            Unavailable: The disk is full, or failed.
        """
        name = (release.slot, ModelRef(digest=release.digest, version=release.version))
        if name in self._unsynced or self.get(*name) != release:
            data = msgspec.json.encode(release)
            checksum = hashlib.sha256(data).hexdigest().encode()
            self._unsynced.add(name)  # a write that fails at its very end has left a file that a power cut may undo
            write_durably(self._path(*name), checksum + b"\n" + data, disk=self._disk)
            self._unsynced.discard(name)
            self._known[name] = release

    def get(self, slot: str, model: ModelRef) -> Release | None:
        """The release of a model for a slot, `None` if it is not known or its file is damaged."""
        name = (slot, model)
        if name not in self._known:
            path = self._path(slot, model)
            try:
                self._known[name] = _checked(self._disk.read(path))
            except FileNotFoundError:
                return None
            except (ValueError, RecursionError, OSError) as error:
                log.error("cannot read %s: %s", path, error)
        return self._known.get(name)

    def collect(self, pinned: Collection[Named]) -> None:
        """Forget all but `pinned`.

        Raises:
            Unavailable: The disk failed.
        """
        kept = {self._path(slot, model).name for slot, model in pinned}
        with disk_errors(self._folder, 0, self._disk):
            for name in self._disk.names(self._folder):
                if name not in kept:
                    self._disk.remove(self._folder / name)
        self._known = {name: release for name, release in self._known.items() if name in pinned}

    def _path(self, slot: str, model: ModelRef) -> Path:
        return self._folder / f"{checked_name(slot, 'slot')}-{model.version}-{checked_digest(model.digest)[:16]}.json"


def _checked(data: bytes) -> Release:
    """Raises `ValueError`, as all of `msgspec`'s errors are, when it is damaged."""
    checksum, _, rest = data.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != checksum:
        raise ValueError("its content does not have its checksum")
    return msgspec.json.decode(rest, type=Release)
