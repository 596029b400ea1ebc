"""What verified metadata said about the models on this device: they can be served without verifying it again."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import msgspec

from edge_agent.durable import disk_errors, write_durably
from protocol.release import Release

log = logging.getLogger(__name__)


class Releases:
    """A folder with one small file per release.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._known: dict[str, Release] = {}

    def keep(self, release: Release) -> None:
        """Remember a verified release, durably.

        Raises:
            Unavailable: The disk is full, or failed.
        """
        if self.get(release.digest) != release:
            write_durably(self._path(release.digest), msgspec.json.encode(release))
            self._known[release.digest] = release

    def get(self, digest: str) -> Release | None:
        """The release of a digest, `None` if it is not known or its file is damaged."""
        if digest not in self._known and (path := self._path(digest)).exists():
            try:
                self._known[digest] = msgspec.json.decode(path.read_bytes(), type=Release)
            except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
                log.error("cannot read %s: %s", path, error)
        return self._known.get(digest)

    def collect(self, pinned: Collection[str]) -> None:
        """Forget all but `pinned`.

        Raises:
            Unavailable: The disk failed.
        """
        with disk_errors(self._folder, 0):
            for path in [path for path in self._folder.glob("*.json") if path.stem not in pinned]:
                path.unlink(missing_ok=True)
                self._known.pop(path.stem, None)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.json"
