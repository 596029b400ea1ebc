"""The inbox: a bundle that is put into this folder is installed as if it had come from the broker, network or none.

    inbox/NAME                 waits there until it has been still for a while, and until it is done with
    inbox/results/NAME.json    what became of it, an `Outcome`; those of the last few bundles
    inbox/refused/NAME         the last file that was no whole bundle, for a person to look at

`edge-agent install` copies a bundle here under a name of its own and waits for the outcome. A person may drop one, too.
The daemon takes one at a time. What could not be done for want of space, or because the disk failed, is tried again a
few times. A file that is done with is removed, as a card is small.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from edge_agent.staging import (
    NO_SPACE,
    UNAVAILABLE,
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Refused,
    Staged,
)
from protocol.bundle import BAD_BUNDLE, Bundle
from protocol.durable import OS_DISK, Disk, disk_errors, remove_leftovers, require_free, write_durably, write_pieces
from protocol.errors import Unavailable
from protocol.release import Release
from protocol.watched_folder import Stamp, WatchedFolder

log = logging.getLogger(__name__)

FOLDER, RESULTS, REFUSED = "inbox", "results", "refused"
SETTLE_S = 2.0
RETRY_S = 600.0
MAX_TRIES = 3
KEPT_RESULTS = 16
ABANDONED_S = 3_600.0
RESERVE_BYTES = 64 * 1024 * 1024
MAX_RESULT_BYTES = 1024 * 1024
_COPY_BYTES = 1024 * 1024
STAGER_DIED, INTERRUPTED = "stager_died", "interrupted"
# What may go better the next time, with the same bundle on the same device.
_PASSING = frozenset({NO_SPACE, "disk", UNAVAILABLE, STAGER_DIED, INTERRUPTED})

Ending = Literal["staged", "refused", "postponed", "unchanged"]


class ReleaseOutcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one release in a bundle.

    Attributes:
        slot: Which slot it is for.
        version: Of the model.
        model: Its digest.
        ending: `staged` is complete and qualified, and on its way to a trial; `unchanged` was not wanted.
        reason: A stable word, where there is a reason.
        text: A sentence for people.
    """

    slot: str
    version: int
    model: str
    ending: Ending
    reason: str = ""
    text: str = ""


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a bundle.

    Attributes:
        file: Its name.
        at: When, seconds since the epoch.
        accepted: Whether its metadata was.
        reason: Why not, in a stable word.
        text: And in a sentence.
        metadata_version: Of its timestamp.
        releases: For the slots of this device.
    """

    file: str
    at: float
    accepted: bool
    reason: str = ""
    text: str = ""
    metadata_version: int = 0
    releases: tuple[ReleaseOutcome, ...] = ()

    def has(self, ending: Ending) -> bool:
        """Whether any release ended so."""
        return any(release.ending == ending for release in self.releases)

    @property
    def passing(self) -> bool:
        """Whether it may go better the next time."""
        reasons = {release.reason for release in self.releases if release.ending == "postponed"}
        return not _PASSING.isdisjoint({self.reason, *reasons})


class Installation:
    """Collects what is said of one bundle while it is installed.

    Args:
        path: Of the bundle.
        slots: The device's.
    """

    def __init__(self, path: Path, slots: Collection[str]) -> None:
        self.path = path
        self._slots = slots
        self._verified: MetadataVerified | None = None
        self._refusal = UNAVAILABLE, "it could not be looked at to the end; the daemon's log says why"
        self._endings: dict[str, tuple[Ending, str, str]] = {}

    def heard(self, message: FromStager, wanted: Collection[str] = ()) -> None:
        """The bundle's stager has said something.

        Args:
            message: What.
            wanted: Digests of the models that slots want staged.
        """
        match message:
            case MetadataVerified():
                self._verified = message
                for digest in wanted:  # until more is said, the stager was ended before it came to that
                    self._endings[digest] = "postponed", INTERRUPTED, "something newer came before it was complete"
            case MetadataRefused():
                self._refusal = message.reason, message.text
            case Staged():
                self._endings[message.digest] = "staged", "", ""
            case Refused():
                self._endings[message.digest] = "refused", message.reason, message.text
            case Postponed():
                self._endings[message.digest] = "postponed", message.reason, message.text

    def stager_died(self, digest: str, how: str) -> None:
        """The stager ended with a model unfinished."""
        self._endings[digest] = "postponed", STAGER_DIED, f"the stager ended: {how}"

    def outcome(self, at: float) -> Outcome:
        """What has become of the bundle.

        Args:
            at: Seconds since the epoch.
        """
        if self._verified is None:
            reason, text = self._refusal
            return Outcome(file=self.path.name, at=at, accepted=False, reason=reason, text=text)
        return Outcome(
            file=self.path.name,
            at=at,
            accepted=True,
            metadata_version=self._verified.version,
            releases=tuple(self._releases(self._verified.releases)),
        )

    def _releases(self, releases: Collection[Release]) -> Iterator[ReleaseOutcome]:
        for slot in self._slots:
            of_slot = sorted((r for r in releases if r.slot == slot), key=lambda release: release.version)
            told = [release for release in of_slot if release.digest in self._endings]
            for release in told or of_slot[-1:]:
                ending, reason, text = self._endings.get(release.digest, ("unchanged", "", "nothing to do"))
                yield ReleaseOutcome(
                    slot=slot, version=release.version, model=release.digest, ending=ending, reason=reason, text=text
                )


class Inbox(WatchedFolder):
    """The daemon's side of the folder: watched from `start` to `close`.

    Args:
        folder: It is made where it is missing.
        settle_s: How long a file must be still before it is taken.
        disk: Which it is on.

    Raises:
        Misconfigured: The folder must not be made. Where the disk fails, it is tried again now and then.
    """

    def __init__(self, folder: Path, *, settle_s: float = SETTLE_S, disk: Disk = OS_DISK) -> None:
        super().__init__(folder, (RESULTS, REFUSED), settle_s, _printable)
        self._disk = disk
        self._current: Path | None = None
        self._tries: dict[str, int] = {}
        self._again_at: dict[str, float] = {}
        try:
            self._remove_abandoned()
        except OSError as error:
            log.warning("cannot clear %s: %s", folder, error)

    def next(self, now: float) -> Path | None:
        """The next bundle to install; none while one is being installed.

        Args:
            now: Monotonic seconds.
        """
        if self._current is None:
            due = (name for name in self.ready(now) if now >= self._again_at.get(name, now))
            self._current = next((self.folder / name for name in due), None)
            return self._current
        return None

    def finished(self, path: Path, outcome: Outcome, now: float) -> None:
        """Tell what became of a bundle, and remove it, or keep it for another try.

        The result is durable before the bundle goes, so a bundle whose daemon dies in between is installed again, which
        changes nothing. Where the disk is full there is room for the result once the bundle is gone.
        """
        self._current = None
        name = path.name
        tries = self._tries.get(name, 0) + 1
        is_last = tries >= MAX_TRIES
        told = self._tell(outcome)
        if not (outcome.passing and not is_last) and self._put_away(path, aside=outcome.reason == BAD_BUNDLE):
            self._tries.pop(name, None)
            self._again_at.pop(name, None)
            if not told:
                self._tell(outcome)
        else:
            self._tries[name] = tries
            self._again_at[name] = math.inf if is_last else now + RETRY_S
        self.look_again()

    def _tell(self, outcome: Outcome) -> bool:
        """Write the result. Whether that was possible."""
        results = self.folder / RESULTS
        try:
            write_durably(result_file(self.folder, outcome.file), msgspec.json.encode(outcome), disk=self._disk)
            _remove_oldest(results, KEPT_RESULTS, self._disk)
        except (Unavailable, OSError) as error:
            log.error("cannot write what became of %s: %s", outcome.file, error)
            return False
        return True

    def _put_away(self, path: Path, *, aside: bool) -> bool:
        """Remove a bundle, or put it aside in the place of the one before. Whether that was possible."""
        refused = self.folder / REFUSED
        try:
            with disk_errors(self.folder, 0, self._disk):
                if aside and self._disk.is_file(path):
                    self._disk.rename(path, refused / _label(path.name))
                    _remove_oldest(refused, 1, self._disk)
                else:
                    self._disk.remove(path)
                self._disk.sync_folder(self.folder)
        except Unavailable as error:
            log.error("cannot remove %s: %s", path, error)
            return False
        return True

    def _remove_abandoned(self) -> None:
        """Remove half-written results, and copies that an `install` left, which was killed long ago."""
        remove_leftovers(self.folder / RESULTS, self._disk)
        for path in self.folder.glob(".*.new"):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                self._disk.remove(path)


def submit(state_dir: Path, source: Path) -> str:
    """Copy a bundle into a device's inbox, where it appears whole. Returns its name there, which no other has.

    Raises:
        Rejected: With code `bad_bundle`; nothing was copied.
        Unavailable: It cannot be read, or the inbox cannot be written, or there is no room for it.
    """
    with Bundle(source):
        pass  # what is none need not travel further
    folder = state_dir / FOLDER
    with disk_errors(folder, 0):
        _make_like(folder, state_dir)
        size = source.stat().st_size
        require_free(folder, size, RESERVE_BYTES)
    # Short enough that the name of the result keeps all of it.
    name = f"{_label(source.stem)[:48]}-{secrets.token_hex(4)}{_label(source.suffix)[:16]}"
    os.umask(0o022)  # the daemon is another user, and must be able to read it
    write_pieces(folder / name, _pieces(source), size)
    return name


def read_result(state_dir: Path, name: str) -> Outcome | None:
    """What the daemon says of a bundle; `None` while it has not said anything.

    Raises:
        Unavailable: It cannot be read.
    """
    path = result_file(state_dir / FOLDER, name)
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_RESULT_BYTES), type=Outcome)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise Unavailable(f"cannot read {path}: {error}") from error


def result_file(folder: Path, name: str) -> Path:
    """Where it is told what became of the bundle of this name."""
    return folder / RESULTS / f"{_label(name)}.json"


def _printable(files: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """Files whose names can be told to people and to other processes."""
    return {name: stamp for name, stamp in files.items() if name.isprintable()}


def _label(name: str) -> str:
    """What is left of a file's name for the name of another."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:96]


def _make_like(folder: Path, parent: Path) -> None:
    """Make the folder, for whom its parent belongs to: root may come here before the daemon."""
    if not folder.is_dir():
        owner = parent.stat()
        OS_DISK.make_folder(folder)
        os.chown(folder, owner.st_uid, owner.st_gid)
        OS_DISK.sync_folder(folder)


def _pieces(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        while piece := file.read(_COPY_BYTES):
            yield piece


def _remove_oldest(folder: Path, kept: int, disk: Disk) -> None:
    """Keep the newest files of a folder."""
    paths = [folder / name for name in disk.names(folder) if not name.startswith(".")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)[:-kept]:
        disk.remove(path)
