"""All about models on this device: what signed metadata wants, what each slot has and does, what the disk keeps.

It has no broker and no clock of its own, and processes are started for it, so the simulation drives this very class.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent import deployment
from edge_agent.children import Child, FromTrial, FromWorker, ModelFile, Records, TrialAssignment, WorkerAssignment
from edge_agent.demand import demanded
from edge_agent.deployment import (
    ModelLost,
    ModelRefused,
    ModelStaged,
    ReleaseOffered,
    ReleasePinned,
    StagerDied,
    StagingPostponed,
    VersionWithdrawn,
)
from edge_agent.inbox import Installation, Outcome
from edge_agent.model_store import ModelStore
from edge_agent.releases import Releases
from edge_agent.settings import Settings
from edge_agent.slots import Slot, Surroundings
from edge_agent.staging import NO_SPACE, FromStager, MetadataVerified, StagerSettings
from edge_agent.state import StateStore
from edge_agent.trusted_time import BUILT_AT
from edge_agent.updates import Updates
from protocol.durable import OS_DISK, Disk
from protocol.errors import Unavailable
from protocol.messages import Event, ModelRef, SlotStatus
from protocol.release import Release
from protocol.wishes import Pin, Withdrawal, desired

log = logging.getLogger(__name__)

COLLECT_AGAIN_S = 60.0
LOOK_AGAIN_S = 60.0
# A pin's words are kept in the slot's state, which has a fixed place on the disk.
MAX_SAID = 400


class Starters(NamedTuple):
    """How processes are started: `worker` with a slot's assignment, `trial` with the slot's name too."""

    worker: Callable[[WorkerAssignment], Child[FromWorker]]
    trial: Callable[[str, TrialAssignment], Child[FromTrial]]
    stager: Callable[[StagerSettings], Child[FromStager]]


class Deployer:
    """Keeps every slot served with what it should have.

    Args:
        settings: Checked settings.
        starters: How processes are started.
        report: Takes a line of the audit trail.
        recall: Gives a slot's audit trail, the oldest first, where its state is lost.
        record: Takes what was served.
        throttled: Whether the device is throttling now.
        wall_clock: Seconds since the epoch.
        rng: For jitter, and for the judge's coins.
        disk: Where the state folder is.

    Raises:
        Misconfigured: A folder or file cannot be used.
        Unavailable: The disk failed before there was anything on it.
    """

    def __init__(
        self,
        settings: Settings,
        starters: Starters,
        *,
        report: Callable[[Event], None],
        recall: Callable[[str], list[Event]],
        record: Callable[[Records], None],
        throttled: Callable[[], bool],
        wall_clock: Callable[[], float],
        rng: random.Random,
        disk: Disk = OS_DISK,
    ) -> None:
        self._settings = settings
        self._starters = starters
        self._report = report
        self._recall = recall
        self._record = record
        self._throttled = throttled
        self._wall_clock = wall_clock
        self._rng = rng
        self._folder = Path(settings.state_dir)
        self._models = ModelStore(self._folder, disk)
        self._releases = Releases(self._folder / "releases", disk)
        self._state = StateStore(self._folder / "state", settings.slots.keys(), disk)
        self._updates = Updates(
            stager_settings(settings),
            self._folder / "metadata.set",
            on_verified=self._verified,
            on_metadata_refused=self._metadata_refused,
            on_staged=lambda digest: self._tell(digest, ModelStaged(digest)),
            on_refused=lambda digest, reason, text: self._tell(digest, ModelRefused(digest, reason, text)),
            on_postponed=self._postponed,
            on_stager_died=self._stager_died,
            start=starters.stager,
            rng=rng,
            disk=disk,
        )
        self._collected: frozenset[tuple[str, ModelRef]] | None = None
        self._collect_at = 0.0
        self._look_at = math.inf
        self._now = 0.0
        self._pins: dict[str, int] = {}
        self._known_faults: set[tuple[str, str]] = set()
        states = {name: self._saved(name) for name in settings.slots}
        clean = self._state.mark_running()  # last: what is misconfigured has not run, and has not crashed
        self.slots = {
            name: Slot(name, slot, self._surroundings(name), states[name], clean=clean)
            for name, slot in settings.slots.items()
        }

    @property
    def metadata_version(self) -> int:
        """Of the timestamp that was accepted last."""
        return self._updates.metadata_version

    def begin(self, now: float) -> None:
        """Take up what was going on when the daemon last ended."""
        self._now = now
        self._updates.look_again()
        for slot in self.slots.values():
            active = slot.state.active
            if active is not None and self._release(slot.name, active) is None:
                slot.feed(ModelLost(active.digest, "what was known of it cannot be read"), now)
            slot.begin(now)

    def metadata_arrived(self, payload: bytes) -> None:
        """A metadata set came from the broker."""
        self._updates.metadata_arrived(payload)

    def install(self, bundle: Path) -> None:
        """Have a bundle installed; `installed` says what became of it."""
        self._updates.install(Installation(bundle, self.slots.keys()))

    def installed(self) -> tuple[Path, Outcome] | None:
        """A bundle and what became of it, once; `None` while it is under way, or there is none."""
        done = self._updates.installed()
        if done is None:
            return None
        outcome = done.outcome(self._wall_clock())
        if outcome.accepted:  # else the refusal has been reported
            text = f"the bundle {outcome.file} is accepted, metadata version {outcome.metadata_version}"
            self._report(Event(at=outcome.at, kind="bundle_accepted", text=text))
        return done.path, outcome

    def children(self) -> list[Child[Any]]:
        """All living children."""
        found: list[Child[Any]] = [child for slot in self.slots.values() for child in slot.children()]
        if self._updates.child is not None:
            found.append(self._updates.child)
        return found

    def receive(self, child: object, now: float) -> None:
        """Listen to a child."""
        self._now = now
        if self._updates.child is not None and child is self._updates.child:
            self._updates.receive(self._updates.child, now)
            return
        for slot in self.slots.values():
            if slot.receive(child, now):
                return

    def tick(self, now: float) -> None:
        """Do what is due."""
        self._now = now
        for slot in self.slots.values():
            slot.tick(now)
        if now >= self._look_at:
            self._look_at = math.inf
            self._updates.look_again()
        self._updates.tick(now)
        if now >= self._collect_at and not self._updates.busy and self._needed() != self._collected:
            self._collect()

    def statuses(self) -> dict[str, SlotStatus]:
        """For the status message."""
        return {name: slot.status(self._updates.progress, self._pins.get(name)) for name, slot in self.slots.items()}

    def stop(self, now: float) -> None:
        """End every child; what is going on goes on at the next start."""
        self._updates.stop()
        for slot in self.slots.values():
            slot.stop(now)

    def stopped(self) -> None:
        """All that was to be written is."""
        self._state.mark_stopped()

    # What the stager says.

    def _verified(self, message: MetadataVerified) -> None:
        """Tell each slot what it should have."""
        self._collected = None  # what is tried now and given up again leaves something behind
        for fault in message.refused:
            self._report_once("release_refused", f"{fault.target} is no release: {fault.text}", fault.reason)
        for name, slot in self.slots.items():
            wanted = desired(message.wishes, name, self._settings.device, self._settings.groups)
            releases = [release for release in message.releases if release.slot == name]
            self._mend(slot, releases)
            self._pins.pop(name, None)
            if wanted.pin is not None:
                self._pins[name] = wanted.pin.version
            concerned = {model.version for model in slot.needed()}
            for version, withdrawal in wanted.withdrawn.items():
                if version not in concerned:
                    continue
                slot.feed(VersionWithdrawn(version, _said(withdrawal, message.signed_by)), self._now)
            chosen, wish = demanded(wanted, releases, slot.state.active)
            if chosen is None and wanted.pin is not None:
                text = f"version {wanted.pin.version} of {name} is pinned, but not released"
                self._report_once("pin_unknown", text, "pin_unknown")
            if chosen is None:
                continue
            if not self._keep(chosen):
                self._look_at = self._now + LOOK_AGAIN_S
                continue
            model = _ref(chosen)
            if wish is not None:
                pinned = ReleasePinned(model, _said(wish, message.signed_by))
                if not deployment.works(slot.state, pinned):
                    text = f"version {model.version} of {name} is pinned, but was found not to work here"
                    self._report_once("pin_refused", text, "pin_refused")
                slot.feed(pinned, self._now)
            else:
                slot.feed(ReleaseOffered(model), self._now)

    def _keep(self, release: Release) -> bool:
        try:
            self._releases.keep(release)
        except Unavailable as error:
            log.error("cannot keep release %s: %s", release.target, error)
            return False
        return True

    def _mend(self, slot: Slot, releases: list[Release]) -> None:
        """Write again what is known of the models that the slot has, where the disk has lost it."""
        needed = slot.needed()
        for release in releases:
            if _ref(release) in needed:
                self._keep(release)

    def _metadata_refused(self, reason: str, text: str) -> None:
        self._report(Event(at=self._wall_clock(), kind="metadata_refused", reason=reason, text=text))

    def _report_once(self, kind: str, text: str, reason: str) -> None:
        """Metadata is verified often; what is wrong with it is said once in a run."""
        if (kind, text) not in self._known_faults:
            self._known_faults.add((kind, text))
            self._report(Event(at=self._wall_clock(), kind=kind, reason=reason, text=text))

    def _postponed(self, digest: str, reason: str, text: str) -> None:
        if reason == NO_SPACE:
            self._collect()
        self._tell(digest, StagingPostponed(digest, reason, text))

    def _stager_died(self, digest: str, how: str) -> None:
        self._report(
            Event(
                at=self._wall_clock(),
                kind="stager_died",
                model=digest,
                reason="stager_died",
                text=f"the stager ended while it qualified the model: {how}",
            )
        )
        self._tell(digest, StagerDied(digest, how))

    def _tell(self, digest: str, event: ModelStaged | ModelRefused | StagingPostponed | StagerDied) -> None:
        """Tell the slot that is staging a model what became of it."""
        for slot in self.slots.values():
            if slot.is_candidate(digest):
                slot.feed(event, self._now)

    # What slots need.

    def _surroundings(self, slot: str) -> Surroundings:
        return Surroundings(
            state=self._state,
            model_file=lambda model: self._model_file(slot, model),
            release=lambda model: self._release(slot, model),
            start_worker=lambda model, finishing=None: self._start_worker(slot, model, finishing),
            start_trial=lambda assignment: self._starters.trial(slot, assignment),
            stage=self._updates.stage,
            cancel=lambda digest: self._cancel(slot, digest),
            look_again=self._updates.look_again,
            report=self._report,
            record=self._record,
            throttled=self._throttled,
            wall_clock=self._wall_clock,
            rng=self._rng,
        )

    def _cancel(self, slot: str, digest: str) -> None:
        """A slot wants a model no more; another may still, and then it stays wanted."""
        if not any(other.is_candidate(digest) for name, other in self.slots.items() if name != slot):
            self._updates.cancel(digest)

    def _release(self, slot: str, model: ModelRef) -> Release | None:
        return self._releases.get(slot, model)

    def _model_file(self, slot: str, model: ModelRef) -> ModelFile | None:
        release = self._release(slot, model)
        if release is None:
            return None
        return ModelFile(
            digest=model.digest, version=model.version, folder=str(self._folder), features=release.features
        )

    def _start_worker(self, slot: str, model: ModelFile | None, finishing: ModelFile | None) -> Child[FromWorker]:
        settings = self._settings.slots[slot]
        names = list(self._settings.slots)
        assignment = WorkerAssignment(
            device=self._settings.device,
            slot=slot,
            slots=names,
            front_desk=slot == names[0],
            broker=self._settings.broker,
            model=model,
            finishing=finishing,
            threads=settings.threads,
            deadline_ms=settings.deadline_ms,
        )
        return self._starters.worker(assignment)

    # The disk.

    def _saved(self, slot: str) -> deployment.State:
        """A slot's state; where it is lost, what the audit trail and the store still show of it.

        Of the two copies of a state, the newer may have rotted; then the older one says what was once so. If by the
        trail another model has been served since, or one was refused, the trail is believed.
        """
        saved = self._state.load(slot)
        state = deployment.decode(saved) if saved is not None else None
        if state is not None and slot not in self._state.doubtful:
            return state
        found = deployment.recovered(self._recall(slot))
        while (active := found.active) is not None and not self._is_here(slot, active):
            found = deployment.step(found, ModelLost(active.digest)).state
        if state is not None and state.active == found.active and set(found.refused) <= set(state.refused):
            return state
        if slot in self._state.lost or slot in self._state.doubtful or found != deployment.initial():
            served = f"it serves version {active.version} again" if active else "nothing that it served is left"
            log.error("the state of %s was lost", slot)
            self._report(
                Event(
                    at=self._wall_clock(),
                    kind="state_recovered",
                    slot=slot,
                    reason="state_lost",
                    text=f"the state of {slot} was lost; by the audit trail, {served}",
                )
            )
        return found

    def _is_here(self, slot: str, model: ModelRef) -> bool:
        return model.digest in self._models and self._release(slot, model) is not None

    def _needed(self) -> frozenset[tuple[str, ModelRef]]:
        return frozenset((name, model) for name, slot in self.slots.items() for model in slot.needed())

    def _collect(self) -> None:
        """Remove models that no slot needs, and chunks of models that none is staging."""
        needed = self._needed()
        manifests = [
            release.manifest
            for name, slot in self.slots.items()
            if isinstance(slot.state, deployment.Staging)
            and (release := self._release(name, slot.state.candidate)) is not None
        ]
        try:
            self._models.collect({model.digest for _, model in needed}, manifests)
            self._releases.collect(needed)
        except Unavailable as error:
            log.warning("cannot remove old models: %s", error)
            self._collect_at = self._now + COLLECT_AGAIN_S
        else:
            self._collected = needed


def stager_settings(settings: Settings) -> StagerSettings:
    """What every stager of this device is told."""
    folder = Path(settings.state_dir)
    return StagerSettings(
        device=settings.device,
        folder=str(folder),
        trust_folder=str(folder / "trust"),
        root_file=str(settings.root_of_trust),
        metadata_file=str(folder / "metadata.set"),
        built_at=BUILT_AT,
        broker=settings.broker,
        max_rate=settings.transfer.max_rate,
    )


def _ref(release: Release) -> ModelRef:
    return ModelRef(digest=release.digest, version=release.version)


def _said(wish: Pin | Withdrawal, signed_by: tuple[str, ...]) -> str:
    """Who wished it, when, and which keys signed it."""
    when = datetime.fromtimestamp(wish.at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    keys = ", ".join(key[:8] for key in signed_by[:3])
    note = f": {wish.note}" if wish.note else ""
    return f"wished by {wish.by or 'the operator'} on {when}, signed by key {keys}{note}"[:MAX_SAID]
