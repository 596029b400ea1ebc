"""The accepted metadata on disk, under the file names of python-tuf's client.

    root_history/N.root.json   each root since the one the device was provisioned with
    root.json                  the newest of them once more; a plain file
    timestamp.json, snapshot.json, targets.json

Documents are replaced one by one in the order in which TUF accepts them, each wholly or not at all. So whatever is on
the disk after a crash is a state that the client goes through anyway, and never older than what was acted on.

A document that rotted is dropped, and comes again with the next set. Since each document also says what versions those
below it have, one that is lost does not open the way back; see `edge_agent.trust`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]

from protocol.durable import OS_DISK, Disk, remove_leftovers, write_durably
from protocol.errors import Unavailable

log = logging.getLogger(__name__)

ROLES = ("root", "timestamp", "snapshot", "targets")
HISTORY = "root_history"

_ROOT_FILE = re.compile(r"([1-9][0-9]{0,8})\.root\.json")


class TrustStore:
    """A folder of accepted metadata.

    Args:
        folder: For this class alone.
        disk: Where the folder is.
    """

    def __init__(self, folder: Path, disk: Disk = OS_DISK) -> None:
        self._folder = folder
        self._disk = disk

    def read(self) -> dict[str, bytes]:
        """What is kept, by file name. Leftovers of a process that was killed are removed, and damaged files too.

        Raises:
            Unavailable: The folder cannot be read.
        """
        try:
            return {name: data for name in self._names() if (data := self._intact(name)) is not None}
        except OSError as error:
            raise Unavailable(f"cannot read metadata in {self._folder}: {error.strerror or error}") from error

    def write(self, documents: Mapping[str, bytes]) -> None:
        """Keep documents, on the disk when this returns. Those that are there already are not written again.

        Their names are synced nevertheless: a process that was killed may not have come to that.

        Raises:
            Unavailable: The disk is full, or failed. Some of them may be kept, in an order that does no harm.
        """
        try:
            self._disk.make_folder(self._folder / HISTORY)
            for folder in (self._folder.parent, self._folder, self._folder / HISTORY):
                self._disk.sync_folder(folder)
        except OSError as error:
            raise Unavailable(f"cannot keep metadata in {self._folder}: {error.strerror or error}") from error
        for name in _in_order(documents):
            if self._read(name) != documents[name]:
                write_durably(self._folder / name, documents[name], disk=self._disk)

    def clear(self) -> None:
        """Forget everything, the oldest root last: it says whose folder this is.

        Raises:
            Unavailable: The disk failed.
        """
        try:
            for name in reversed(self._names()):
                self._disk.remove(self._folder / name)
                self._disk.sync_folder((self._folder / name).parent)
        except OSError as error:
            raise Unavailable(f"cannot forget metadata in {self._folder}: {error.strerror or error}") from error

    def _names(self) -> list[str]:
        """The files that belong here and are here."""
        names = set(self._listing(self._folder))
        history = [f"{HISTORY}/{name}" for name in self._listing(self._folder / HISTORY) if _ROOT_FILE.fullmatch(name)]
        return _in_order([*history, *(file_of(role) for role in ROLES if file_of(role) in names)])

    def _listing(self, folder: Path) -> list[str]:
        try:
            remove_leftovers(folder, self._disk)
            return self._disk.names(folder)
        except FileNotFoundError:
            return []

    def _intact(self, name: str) -> bytes | None:
        data = self._read(name)
        if data is None:
            return None
        if is_intact(name, data):
            return data
        log.error("%s is damaged: it is dropped, and rebuilt from the next metadata set", self._folder / name)
        self._disk.remove(self._folder / name)
        return None

    def _read(self, name: str) -> bytes | None:
        """A file's content; `None` if there is none, or none to be had: an unreadable sector must not end updates."""
        try:
            return self._disk.read(self._folder / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.error("cannot read %s: %s; going on without it", self._folder / name, error)
            return None


def file_of(role: str) -> str:
    """The name of a role's newest document."""
    return f"{role}.json"


def root_file(version: int) -> str:
    """The name of a root in the history."""
    return f"{HISTORY}/{version}.root.json"


def parsed(data: bytes | None) -> Metadata[Any] | None:
    """A document with its signatures; `None` where there is none to read. Nothing is verified."""
    if data is None:
        return None
    try:
        return Metadata.from_bytes(data)
    except RepositoryError:
        return None


def is_intact(name: str, data: bytes) -> bool:
    """Whether it is a document of the role that the name says; for a root, one that is signed by its own keys.

    Only roots can be judged alone. The others are verified by the newest root when they are used.
    """
    document = parsed(data)
    version = _version_of(name)
    if document is None or document.signed.type != ("root" if version else name.removesuffix(".json")):
        return False
    if not isinstance(document.signed, Root):
        return True
    itself = document.signed.get_verification_result("root", document.signed_bytes, document.signatures)
    return bool(itself) and version in {0, document.signed.version}


def _in_order(names: Mapping[str, bytes] | list[str]) -> list[str]:
    """In the order in which TUF accepts them: roots ascending, then timestamp, snapshot and targets."""
    return sorted(names, key=lambda name: _version_of(name) or 10**9 + ROLES.index(name.removesuffix(".json")))


def _version_of(name: str) -> int:
    """The version in the name of a root in the history; 0 for all else."""
    found = _ROOT_FILE.fullmatch(name.rpartition("/")[2])
    return int(found[1]) if found else 0
