"""The watched folder: a model file and its description, dropped into it, are released.

`NAME.tflite` waits for `NAME.toml`, and both until they have not changed for a while: a copy over a network takes its
time, and pauses. What happened is told by where they are moved: `done/`, or `refused/` with a `NAME.reason.txt`.

`Settling` decides, from looks at the folder. `Inbox` does the looking, when `watchdog` says that something happened,
while something is settling, and now and then all the same, because network folders tell nobody of their changes.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from protocol import configuration
from protocol.configuration import Source
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import FeatureSpec
from protocol.topics import checked_name

log = logging.getLogger(__name__)

MODEL, DESCRIPTION, REASON = ".tflite", ".toml", ".reason.txt"
DONE, REFUSED = "done", "refused"
LOOK_S = 30.0
SETTLING_LOOK_S = 0.5
MAX_FILES = 1_000
MAX_DESCRIPTION_BYTES = 64 * 1024
MAX_NAMESAKES = 10_000


class Description(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the TOML file beside a model says.

    Attributes:
        slot: Which slot the model is for.
        notes: For people.
        name: Of the model; by default the file's.
        latency_budget_ms: Absolute bound of one inference.
        actions: Names, in the order of the output; by default those of the slot's current release or recipe.
        features: How a state becomes the input vector; by default likewise.
    """

    slot: str
    notes: Annotated[str, Meta(max_length=2_000)] = ""
    name: Annotated[str, Meta(max_length=128)] = ""
    latency_budget_ms: Annotated[float, Meta(gt=0)] | None = None
    actions: tuple[str, ...] | None = None
    features: FeatureSpec | None = None


def read_description(path: Path) -> Description:
    """Read a model's TOML file.

    Raises:
        Rejected: With code `bad_description`; the text names the line.
    """
    try:
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise Rejected("bad_description", f"{path.name} has more than {MAX_DESCRIPTION_BYTES} bytes")
        text = path.read_text("utf-8")
        description = configuration.parse([Source(path.name, text)], Description)
        checked_name(description.slot, "slot")
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected("bad_description", f"cannot read {path.name}: {error}") from error
    except Misconfigured as error:
        raise Rejected("bad_description", str(error)) from error
    return description


class Stamp(NamedTuple):
    """By what a file's growth shows."""

    size: int
    modified_ns: int


class Settling:
    """Decides which models are complete. Pure.

    Args:
        settle_s: How long nothing may have changed, in seconds.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._since: dict[str, tuple[tuple[Stamp, Stamp], float]] = {}

    @property
    def waiting(self) -> bool:
        """Whether a model and its description are there and may still be changing."""
        return bool(self._since)

    def look(self, files: Mapping[str, Stamp], now: float) -> list[str]:
        """Compare with the last look.

        Args:
            files: By name, everything in the folder.
            now: Monotonic seconds.

        Returns:
            The names, without their endings, of models that are complete, each for as long as it stays in the folder.
        """
        pairs = {
            name: (stamp, files[name + DESCRIPTION])
            for file, stamp in files.items()
            if file.endswith(MODEL) and (name := file.removesuffix(MODEL)) + DESCRIPTION in files
        }
        before = self._since
        self._since = {
            name: before[name] if name in before and before[name][0] == pair else (pair, now)
            for name, pair in pairs.items()
        }
        return sorted(name for name, (_, since) in self._since.items() if now - since >= self._settle_s)


class Inbox:
    """The folder, watched from `start` to `close`.

    Args:
        folder: It is made where it is missing.
        settle_s: How long a file must be still.

    Raises:
        Misconfigured: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, settle_s: float) -> None:
        self.folder = folder
        self._settling = Settling(settle_s)
        self._look_at = 0.0
        self._changed, self._told = socket.socketpair()
        self._observer = Observer()
        try:
            for part in (folder, folder / DONE, folder / REFUSED):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Misconfigured(f"cannot make the inbox {folder}: {error.strerror}") from error
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
        self._look_at = 0.0

    def ready(self, now: float) -> list[str]:
        """The names of models that are complete, if it is time to look.

        Args:
            now: Monotonic seconds.
        """
        if now < self._look_at:
            return []
        names = self._settling.look(self._files(), now)
        self._look_at = now + (SETTLING_LOOK_S if self._settling.waiting else LOOK_S)
        return names

    def model(self, name: str) -> Path:
        """The model's file."""
        return self.folder / (name + MODEL)

    def description(self, name: str) -> Path:
        """Its description's file."""
        return self.folder / (name + DESCRIPTION)

    def put_away(self, name: str, refusal: str | None) -> Path:
        """Move a model and its description to where they tell what happened.

        Args:
            name: Of the model.
            refusal: Why it was refused; `None` if it was released.

        Returns:
            Where the model is now.

        Raises:
            Unavailable: The files cannot be moved.
        """
        folder = self.folder / (DONE if refusal is None else REFUSED)
        try:
            final = _free_name(folder, name)
            for ending in (MODEL, DESCRIPTION):
                (self.folder / (name + ending)).rename(folder / (final + ending))
            if refusal is not None:
                (folder / (final + REASON)).write_text(refusal + "\n", "utf-8")
        except OSError as error:
            raise Unavailable(f"cannot move {name} to {folder}: {error.strerror}") from error
        self._look_at = 0.0
        return folder / (final + MODEL)

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
    """Wakes the host's loop, from watchdog's thread."""

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


def _free_name(folder: Path, name: str) -> str:
    """`name`, or `name-2` and so on where an earlier model of that name lies."""
    for number in range(1, MAX_NAMESAKES):
        candidate = name if number == 1 else f"{name}-{number}"
        if not (folder / (candidate + MODEL)).exists():
            return candidate
    raise Unavailable(f"{folder} holds {MAX_NAMESAKES} models called {name}; clear it")
