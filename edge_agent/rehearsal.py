"""What a device would say of a bundle, found out with nothing on the device changed.

The same stager that updates the device verifies, assembles and qualifies, on copies: of the accepted metadata, so that
an older bundle is refused as it would be, and of the slots' states, so that only what would be taken is tried. It has a
store of its own. All that lies in a temporary folder, so its lock is there too, and a running daemon is not disturbed.
"""

from __future__ import annotations

import contextlib
import select
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from edge_agent import deployment, trusted_time
from edge_agent.children import Child, start
from edge_agent.demand import demanded
from edge_agent.deployer import stager_settings
from edge_agent.deployment import ReleaseOffered, ReleasePinned, Staging, VersionWithdrawn
from edge_agent.inbox import Installation, Outcome
from edge_agent.model_store import ModelStore
from edge_agent.settings import Settings
from edge_agent.staging import (
    NO_SPACE,
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Progress,
    Qualifying,
    StageModel,
    StagerSettings,
)
from edge_agent.state import StateStore
from edge_agent.updates import STALL_LIMIT_S
from protocol.bundle import Bundle
from protocol.durable import require_free
from protocol.errors import Rejected, Unavailable
from protocol.messages import ModelRef
from protocol.release import Release
from protocol.wishes import desired

TURN_S = 0.25
COPY_TRIES = 5
COPY_AGAIN_S = 0.2
# What the stager and the slots remember.
REMEMBERED = ("trust", "state", trusted_time.FILE)


def rehearse(settings: Settings, bundle: Path, on_progress: Callable[[Progress], None] = lambda _: None) -> Outcome:
    """Have a bundle verified, and each model in it that this device would take assembled and qualified.

    Args:
        settings: The device's.
        bundle: The file.
        on_progress: Told how far a model has come.

    Returns:
        What would become of it. `staged` is a model that would go on to its trial.

    Raises:
        Unavailable: The device's folders cannot be read, or there is no room for the copies.
    """
    installation = Installation(bundle, settings.slots.keys())
    try:
        with Bundle(bundle):
            pass
    except Rejected as refusal:
        installation.heard(MetadataRefused(refusal.code, refusal.text))
        return installation.outcome(time.time())
    with tempfile.TemporaryDirectory(prefix="edge-agent-check-") as made:
        folder = Path(made)
        _copy(Path(settings.state_dir), folder)
        copied = replace(
            stager_settings(settings),
            folder=str(folder),
            trust_folder=str(folder / "trust"),
            metadata_file=str(folder / "metadata.set"),
            bundle=str(bundle.resolve()),
            reserve_bytes=0,
        )
        _Rehearsal(settings, copied, installation, on_progress).run()
    return installation.outcome(time.time())


class _Rehearsal:
    """Plays the daemon for a stager."""

    def __init__(
        self,
        settings: Settings,
        stager: StagerSettings,
        installation: Installation,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._settings = settings
        self._stager = stager
        self._installation = installation
        self._on_progress = on_progress
        self._state = StateStore(Path(stager.folder) / "state", settings.slots.keys())

    def run(self) -> None:
        """Verify, then try each model. A model that kills the stager does not keep the others from being tried."""
        todo: list[Release] | None = None
        while todo is None or todo:
            with _started(self._stager) as child:
                said = self._listen(child)
                if said is not None:
                    self._installation.heard(said)
                if not isinstance(said, MetadataVerified):
                    return
                todo = self._to_try(said) if todo is None else todo
                while todo and self._try(child, todo.pop(0)):
                    ModelStore(Path(self._stager.folder)).collect(())

    def _try(self, child: Child[FromStager], release: Release) -> bool:
        """Have a model staged. Whether the stager lives on."""
        digest = release.digest
        try:
            require_free(
                Path(self._settings.state_dir), 2 * release.length, stager_settings(self._settings).reserve_bytes
            )
        except Unavailable as error:
            self._installation.heard(Postponed(digest, NO_SPACE, str(error)))
            return True
        child.channel.send(StageModel(digest))
        said = self._listen(child)
        if said is None:
            child.kill()
            self._installation.stager_died(digest, child.how_it_ended())
            return False
        self._installation.heard(said)
        return True

    def _listen(self, child: Child[FromStager]) -> FromStager | None:
        """What the stager says next, progress aside; `None` if it ended, or gives no sign."""
        heard_at = time.monotonic()
        while not child.channel.closed and time.monotonic() - heard_at < STALL_LIMIT_S:
            child.channel.flush()
            select.select([child.channel], [], [], TURN_S)
            for message in child.channel.receive():
                heard_at = time.monotonic()
                if isinstance(message, Progress):
                    self._on_progress(message)
                elif not isinstance(message, Qualifying):
                    return message
        return None

    def _to_try(self, said: MetadataVerified) -> list[Release]:
        """The releases in the bundle that a slot would take."""
        assert self._stager.bundle is not None, "a rehearsal is of a bundle"
        wanted = [self._taken(slot, said) for slot in self._settings.slots]
        with Bundle(Path(self._stager.bundle)) as bundle:
            return [release for release in wanted if release is not None and release.manifest in bundle]

    def _taken(self, slot: str, said: MetadataVerified) -> Release | None:
        """What the slot would have staged, by the very rules by which it would."""
        saved = self._state.load(slot)
        state = deployment.initial() if saved is None else deployment.decode(saved)
        wanted = desired(said.wishes, slot, self._settings.device, self._settings.groups)
        for version in wanted.withdrawn:
            state = deployment.step(state, VersionWithdrawn(version)).state
        releases = [release for release in said.releases if release.slot == slot]
        release, wish = demanded(wanted, releases, state.active)
        if release is None:
            return None
        model = ModelRef(digest=release.digest, version=release.version)
        event = ReleaseOffered(model) if wish is None else ReleasePinned(model, "rehearsed")
        state = deployment.step(state, event).state
        return release if isinstance(state, Staging) and state.candidate == model else None


@contextmanager
def _started(settings: StagerSettings) -> Iterator[Child[FromStager]]:
    child: Child[FromStager] = start("stager", settings, FromStager, "stager")
    try:
        yield child
    finally:
        child.kill()


def _copy(state_dir: Path, folder: Path) -> None:
    """Copy what the stager and the slots remember, where there is anything, at a moment when nothing changes.

    The daemon is not asked to wait: what changes while it is copied is copied again.
    """
    for tries_left in reversed(range(COPY_TRIES)):
        before = _stamps(state_dir)
        try:
            for name in REMEMBERED:
                _copy_one(state_dir / name, folder / name)
        except (OSError, shutil.Error) as error:
            if not tries_left:
                raise Unavailable(f"cannot copy what this device trusts from {state_dir}: {error}") from error
        else:
            if _stamps(state_dir) == before:
                return
        time.sleep(COPY_AGAIN_S)
    raise Unavailable(f"what this device trusts in {state_dir} does not stand still; try again")


def _copy_one(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copy(source, target)
    elif source.is_dir():
        shutil.rmtree(target, ignore_errors=True)  # an earlier try
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))  # half-written ones come and go


def _stamps(state_dir: Path) -> dict[Path, tuple[int, int]]:
    """By what a change of what is copied shows: each file's inode and time of last writing."""
    found = {}
    for name in REMEMBERED:
        for path in ((state_dir / name), *(state_dir / name).rglob("*")):
            if not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    about = path.lstat()
                    found[path] = about.st_ino, about.st_mtime_ns
    return found
