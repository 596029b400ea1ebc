"""A folder into which people drop files; each is taken once it has not changed for a while.

A copy over a network takes its time, and pauses. `Settling` decides, from looks at the folder. `WatchedFolder` does the
looking, when `watchdog` says that something happened, while something is settling, and now and then all the same,
because network folders tell nobody of their changes.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import NamedTuple

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from protocol.durable import unusable
from protocol.errors import Misconfigured

log = logging.getLogger(__name__)

LOOK_S = 30.0
SETTLING_LOOK_S = 0.5
MAX_FILES = 1_000


class Stamp(NamedTuple):
    """By what a file's growth shows."""

    size: int
    modified_ns: int


class Settling:
    """Decides what is complete. Pure.

    Args:
        settle_s: How long nothing may have changed, in seconds.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._since: dict[str, tuple[Hashable, float]] = {}

    @property
    def waiting(self) -> bool:
        """Whether something is there that may still be changing."""
        return bool(self._since)

    def look(self, things: Mapping[str, Hashable], now: float) -> list[str]:
        """Compare with the last look.

        Args:
            things: What is there, by name: a file's stamp, or those of several that belong together.
            now: Monotonic seconds.

        Returns:
            The names of those that are complete, each for as long as it is there.
        """
        before = self._since
        self._since = {
            name: before[name] if name in before and before[name][0] == thing else (thing, now)
            for name, thing in things.items()
        }
        return sorted(name for name, (_, since) in self._since.items() if now - since >= self._settle_s)


class WatchedFolder:
    """The folder, watched from `start` to `close`.

    Args:
        folder: It is made where it is missing, with
        parts: folders in it.
        settle_s: How long a thing must be still.
        things: Makes of the files that are there, by name, the things to wait for.

    Raises:
        Misconfigured: The folder must not be made. Where the disk fails, it is tried again now and then.
    """

    def __init__(
        self,
        folder: Path,
        parts: tuple[str, ...],
        settle_s: float,
        things: Callable[[Mapping[str, Stamp]], Mapping[str, Hashable]],
    ) -> None:
        self.folder = folder
        self._parts = parts
        self._settling = Settling(settle_s)
        self._things = things
        self._is_made = self._made()
        self._look_at = 0.0
        self._changed, self._told = socket.socketpair()
        self._observer = Observer()
        for end in (self._changed, self._told):
            end.setblocking(False)

    def start(self) -> None:
        """Begin to watch; where the system cannot, look now and then."""
        self._observer.schedule(_Bell(self._told), str(self.folder))
        try:
            self._observer.start()
        except OSError as error:  # no more inotify watches, say
            log.warning("cannot watch %s, looking every %.0f s instead: %s", self.folder, LOOK_S, error)

    def close(self) -> None:
        """Watch no longer."""
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()
        self._changed.close()
        self._told.close()

    def fileno(self) -> int:
        """Readable when something happened in the folder."""
        return self._changed.fileno()

    def changed(self) -> None:
        """Something happened: look at the next `ready`."""
        try:
            while self._changed.recv(4096):
                pass
        except BlockingIOError:
            pass
        self.look_again()

    def look_again(self) -> None:
        """Look at the next `ready`, whatever was heard."""
        self._look_at = 0.0

    def ready(self, now: float) -> list[str]:
        """The names of what is complete, if it is time to look.

        Args:
            now: Monotonic seconds.
        """
        if now < self._look_at:
            return []
        if not self._is_made:
            self._is_made = self._made()
        names = self._settling.look(self._things(self._files()), now)
        self._look_at = now + (SETTLING_LOOK_S if self._settling.waiting else LOOK_S)
        return names

    def _made(self) -> bool:
        """Make the folder and its parts. Whether the disk let that be done."""
        try:
            for folder in (self.folder, *(self.folder / part for part in self._parts)):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refusal = unusable(self.folder, error)
            if isinstance(refusal, Misconfigured):
                raise refusal from error
            log.error("%s; trying again in %.0f s", refusal, LOOK_S)
            return False
        return True

    def _files(self) -> dict[str, Stamp]:
        """The regular files in the folder, at most `MAX_FILES`."""
        found: dict[str, Stamp] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if len(found) == MAX_FILES:
                        break
                    about = _regular(entry)
                    if about is not None:
                        found[entry.name] = Stamp(about.st_size, about.st_mtime_ns)
        except OSError as error:
            log.warning("cannot look into %s: %s", self.folder, error)
        return found


class _Bell(FileSystemEventHandler):
    """Wakes the daemon's loop, from watchdog's thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in ("opened", "closed_no_write"):
            return  # our own looks
        try:
            self._end.send(b"\1")
        except OSError:
            return  # it has been rung often enough, or nobody listens any more


def _regular(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What the system says about a regular file; `None` for hidden ones, for anything else, and for what is gone."""
    try:
        about = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return about if stat.S_ISREG(about.st_mode) and not entry.name.startswith(".") else None
