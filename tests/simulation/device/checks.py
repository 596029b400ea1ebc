"""What must always hold on a simulated device, by the harness's own books."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuf.api.metadata import Metadata

from edge_agent import deployment
from edge_agent.children import ModelFile, TrialAssignment, WorkerAssignment
from edge_agent.deployment import Serving, Staging, State, Trial, Watch
from edge_agent.handover import Phase
from edge_agent.model_store import ModelStore
from edge_agent.releases import Releases
from edge_agent.staging import MetadataVerified, StageModel
from edge_agent.state import StateStore
from edge_agent.trust import Trust, decoded_set
from protocol.errors import EdgeswapError, Rejected
from protocol.messages import Event, ModelRef
from protocol.release import Release
from protocol.wishes import desired
from tests.simulation.device.disk import Medium, SimulatedDisk
from tests.simulation.device.history import (
    CRASHES_WORKER,
    DEVICE,
    EATS_MEMORY_IN_WORKER,
    GOOD,
    STOLEN_KEY,
    Published,
    behaviour_of,
)
from tests.simulation.device.processes import Process, digest_of

if TYPE_CHECKING:
    from tests.simulation.device.world import World

STATE_DIR = Path("/state")

ROOM_BYTES = 10**9
METADATA = ("metadata.set", "metadata.new")
DEADLY = (CRASHES_WORKER, EATS_MEMORY_IN_WORKER)

# Models that work, and why they may be refused all the same: processes that ran them were killed, or it was wished.
BLAMELESS = (GOOD, EATS_MEMORY_IN_WORKER)
BAD_LUCK = ("died_twice", "withdrawn")

# What may make the version that is served fall.
MAY_ROLL_BACK = (
    deployment.WatchAlarmed,
    deployment.TrialFailed,
    deployment.TrialDied,
    deployment.WorkerDied,
    deployment.DaemonRestarted,
)
MAY_FALL_BACK = (deployment.ModelLost, deployment.VersionWithdrawn, deployment.ReleasePinned)


class Violation(AssertionError):
    """An invariant does not hold."""


class Checks:
    """The harness's books, and what is checked by them.

    Args:
        world: Which is checked.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._names = {
            (release.slot, release.digest) for published in world.history.published for release in published.releases
        }
        self._published = {published.version: published for published in world.history.published}
        self._may_load: dict[str, set[bytes | None]] = {slot: {None} for slot in world.history.slots}
        self._served: set[str] = set()  # slots that had a model
        self._unsynced: set[str] = set()  # slots whose state could not be synced when it was read
        self.refused: dict[tuple[str, str], int] = {}
        self._overruled: set[tuple[str, str]] = set()
        self._accepted = 0
        self.rotten: set[str] = set()
        self.own_deaths: Counter[str] = Counter()  # of processes that a model killed, by its digest
        self._writers: set[int] = set()

    def fail(self, text: str) -> None:
        """An invariant does not hold."""
        self._world.note("violation", text)
        raise Violation(text)

    # Bytes.

    def loaded(self, process: Process, slot: str, model: ModelFile, data: bytes) -> None:
        """A process is about to run a model."""
        if digest_of(data) != model.digest:
            self.fail(f"a {process.kind} runs bytes that are not those of {model.version}")
        if (slot, model.digest) not in self._names:
            self.fail(f"a {process.kind} of {slot} runs a model that nobody released")

    # Metadata.

    def verified(self, message: MetadataVerified) -> None:
        """The stager says that a set is accepted."""
        published = self._published.get(message.version)
        if published is None or message.releases != published.releases:
            self.fail(f"a set was accepted that the host has not published: {message.version}")
        if message.version < self._accepted:
            self.fail(f"metadata went back from {self._accepted} to {message.version}")
        self._accepted = message.version

    def unreadable(self, path: str) -> None:
        """A file could not be read once: what it is about may be given up, as if it had rotted."""
        for published in self._world.history.published:
            for release in published.releases:
                if release.digest in path or f"/{release.slot}-{release.version}-" in path:
                    self.rotten.add(release.digest)

    @property
    def knows_time(self) -> bool:
        """Whether the device has accepted a set, so that no clock can take it back before that."""
        return self._accepted > 0

    # Processes.

    def wrote(self, process: Process) -> None:
        """A stager changes something on the disk: no other that has done so may still live."""
        if process.pid not in self._writers:
            self._writers = {pid for pid in self._writers if pid in self._world.processes}
            if self._writers:
                self.fail("two stagers write at the same time")
            self._writers.add(process.pid)

    # States.

    def stepped(self, before: State, event: deployment.Event, after: State) -> None:
        """The machine has decided."""
        if before.active is None or before.active == after.active:
            return
        if after.active is not None and after.active.version > before.active.version:
            return
        rolls_back = isinstance(before, Watch) and isinstance(event, MAY_ROLL_BACK)
        by_wish = isinstance(before, Staging) and isinstance(event, deployment.ModelStaged) and before.pinned
        if not (rolls_back or by_wish or isinstance(event, MAY_FALL_BACK)):
            self.fail(f"{type(event).__name__} made version {before.active.version} fall to {after.active}")

    def saving(self, slot: str, state: bytes) -> None:
        """A state is about to be saved."""
        self._may_load[slot].add(state)

    def saved(self, slot: str, state: bytes) -> None:
        """A state is durable, the code says."""
        self._may_load[slot] = {state}
        self._unsynced.discard(slot)
        if deployment.decode(state).active is not None:
            self._served.add(slot)

    def booted(self, states: dict[str, State], *, on_good_disk: bool) -> None:
        """The daemon has started with these states.

        What a daemon that was killed had written and not synced is acted on only once it is; if the disk does not take
        that, the device serves what it has all the same.
        """
        platter, _ = self.on_platter()
        for slot, state in states.items():
            if platter[slot] != state:
                self._unsynced.add(slot)
                if on_good_disk:
                    self.fail(f"{slot} came back as {state}, and on the platter is {platter[slot]}")
            saved = self._may_load[slot]
            allowed = {deployment.initial() if each is None else deployment.decode(each) for each in saved}
            if state not in allowed:
                self.fail(f"{slot} came back as {state}; it had saved {allowed}")
            self._may_load[slot] = {deployment.encode(state), *saved}
            if state.active is not None:
                self._served.add(slot)

    def on_platter(self, rng: random.Random | None = None) -> tuple[dict[str, State], Medium]:
        """The states, and the disk, as a power cut at this moment would leave them; without chance, the least."""
        world = self._world
        medium = Medium(ROOM_BYTES, random.Random(0))
        medium.mount(str(STATE_DIR), world.medium.survivor(rng, str(STATE_DIR)))
        store = StateStore(STATE_DIR / "state", world.history.slots, SimulatedDisk(medium))
        states = {}
        for slot in world.history.slots:
            saved = store.load(slot)
            states[slot] = deployment.initial() if saved is None else deployment.decode(saved)
        return states, medium

    # What is acted on is durable.

    def worker_started(self, assignment: WorkerAssignment) -> None:
        """A worker is started with a model."""
        if assignment.model is None or assignment.slot in self._unsynced:
            return
        state = self.on_platter()[0][assignment.slot]
        if state.active is None or state.active.digest != assignment.model.digest:
            self.fail(f"version {assignment.model.version} is to be served, and on the platter is {state}")

    def trial_started(self, slot: str, assignment: TrialAssignment) -> None:
        """A trial or a watch is started."""
        if slot in self._unsynced:
            return
        state = self.on_platter()[0][slot]
        new = state.candidate if isinstance(state, Trial) else state.active if isinstance(state, Watch) else None
        if new is None or new.digest != assignment.new.digest:
            self.fail(f"version {assignment.new.version} is to be tried, and on the platter is {state}")

    def told(self, message: StageModel) -> None:
        """The stager is told to stage a model."""
        states = self.on_platter()[0]
        slots = {
            slot: state
            for slot, state in states.items()
            if isinstance(state, Staging) and state.candidate.digest == message.digest
        }
        if not slots and not self._unsynced:
            self.fail(f"a model is to be staged, and on the platter is {states}")
        for slot, state in slots.items():
            at = self.refused.get((slot, message.digest), deployment.NO_VERSION)
            if at >= state.candidate.version and not state.pinned:
                self.fail(f"version {state.candidate.version} of {slot} was refused, and is staged again")

    def reported(self, event: Event) -> None:
        """The audit trail has a new line."""
        if event.kind in {"refused", "rolled_back"} and event.version is not None:
            behaviour = self._world.history.behaviour(event.model)
            if behaviour in BLAMELESS and event.reason not in BAD_LUCK:
                self.fail(f"version {event.version} of {event.slot} is {behaviour}, and refused: {event.reason}")
            self.refused[event.slot, event.model] = event.version
            if event.reason in deployment.OVERRULED:
                self._overruled.add((event.slot, event.model))

    # Something can always be served.

    def servable(self, rng: random.Random) -> None:
        """If the power were cut now, the device would serve something after it."""
        states, medium = self.on_platter(rng)
        disk = SimulatedDisk(medium)
        releases, models = Releases(STATE_DIR / "releases", disk), ModelStore(STATE_DIR, disk)
        for slot in self._served:
            state = states[slot]
            active = state.active
            if active is None:
                if not self._excused(state):
                    self.fail(f"{slot} had a model, and has none after a power cut: {state}")
                continue
            trouble = _trouble(slot, active, releases, models)
            if trouble and active.digest in self.rotten and state.previous is not None:
                trouble = _trouble(slot, state.previous, releases, models)
            if trouble and not self._excused(state):
                self.fail(f"{slot} could not serve {active.version} after a power cut: {trouble}")

        if self._accepted and not self._world.ever_had_error and not self._world.clock_error_s:
            self._verifiable(disk)

    def _verifiable(self, disk: SimulatedDisk) -> None:
        """What was accepted can be verified again, without the host.

        Unless TUF has taken a newer timestamp or root from a set that it refused in the end: then only the host helps.
        """
        trusted = STATE_DIR / "trust"
        roots = len(decoded_set(self._published[self._accepted].payload).roots)
        if disk.is_file(trusted / "root_history" / f"{roots + 1}.root.json"):
            return
        if disk.is_file(trusted / "timestamp.json"):
            held: Metadata[Any] = Metadata.from_bytes(disk.read(trusted / "timestamp.json"))
            if held.signed.version > self._accepted:
                return
        files = [STATE_DIR / name for name in METADATA if disk.is_file(STATE_DIR / name)]
        now = datetime.fromtimestamp(self._world.wall_clock(), UTC)
        for file in files:
            try:
                verified = Trust(STATE_DIR / "trust", self._world.history.root, disk).verify(
                    decoded_set(disk.read(file)), now
                )
            except Rejected:
                continue
            if verified.versions.timestamp >= self._accepted:
                return
        self.fail(f"the set of version {self._accepted} was accepted, and cannot be verified again")

    def _excused(self, state: State) -> bool:
        """A second model was lost, or was bad, where the first had rotted: then there is nothing left but the host."""
        known = [model for model in (state.active, state.previous) if model is not None]
        return bool(self.rotten) and all(model.digest in self.rotten for model in known)

    # A bad model, while all else is well.

    def can_go_back(self, slot: str) -> bool:
        """Whether the slot has a model that is not withdrawn and does not kill who runs it."""
        deployer, history = self._world.deployer, self._world.history
        active = deployer.slots[slot].state.active if deployer is not None else None
        if active is None or history.behaviour(active.digest) in DEADLY:
            return False
        wanted = desired(history.published[history.challenge].wishes, slot, DEVICE, ())
        return active.version not in wanted.withdrawn

    def serves_a_model(self) -> None:
        """Nothing is going on: each slot that had a model answers with one."""
        deployer = self._world.deployer
        if deployer is None or not all(self.can_go_back(name) for name in deployer.slots):
            return
        for name, slot in deployer.slots.items():
            if not slot.ready:
                self.fail(f"{name} does not answer with version {slot.state.active}")

    def caught_up(self, published: Published) -> None:
        """Nothing is going on, nor will be by itself: what the accepted set offers was dealt with."""
        deployer, history = self._world.deployer, self._world.history
        robbed = any(what == STOLEN_KEY for what, _ in history.forged)
        if deployer is None or robbed or self._accepted != published.version:
            return
        for name, slot in deployer.slots.items():
            wanted = desired(published.wishes, name, DEVICE, ())
            offered = [one for one in published.releases if one.slot == name and one.version not in wanted.withdrawn]
            if wanted.pin is not None or not offered:
                continue
            newest = max(offered, key=lambda release: release.version)
            if slot.state.newest < newest.version and not self.is_refused(newest):
                self.fail(f"version {newest.version} of {name} is offered, and nobody sees to it")

    def is_refused(self, release: Release) -> bool:
        """Whether the audit trail says that it is refused or was rolled back."""
        return self.refused.get((release.slot, release.digest), deployment.NO_VERSION) >= release.version

    def challenged(self, release: Release) -> None:
        """A bad model has had its time."""
        if not self.is_refused(release):
            self.fail(f"version {release.version} of {release.slot} is bad, and was not refused")
        if self.own_deaths[release.digest] > deployment.MAX_DEATHS:
            self.fail(f"version {release.version} killed {self.own_deaths[release.digest]} times")

    # In the end.

    def served(self) -> None:
        """Somebody answers, unless the model kills whoever runs it and there is no other."""
        world = self._world
        slots = world.deployer.slots.items() if world.deployer is not None else ()
        active = [slot.state.active for _, slot in slots]
        if any(model is not None and world.history.behaviour(model.digest) in DEADLY for model in active):
            return
        for name, slot in slots:
            if not slot.workers.answering:
                self.fail(f"nobody answers for {name}, though nothing goes wrong any more")

    def unsettled(self) -> str:
        """What is still to be done, once nothing goes wrong any more; empty if all is as it should be."""
        world, deployer = self._world, self._world.deployer
        if deployer is None:
            return "there is no daemon"
        kept = set()
        for name, slot in deployer.slots.items():
            expected = world.history.expected(name)
            if not isinstance(slot.state, Serving):
                return f"{name} is {slot.state}"
            active = slot.state.active
            reachable = self._is_reachable(name, expected.digest)
            if reachable and active != ModelRef(digest=expected.digest, version=expected.version):
                return f"{name} serves {active}, not version {expected.version}"
            if active is None:
                if name in self._served:
                    return f"{name} serves nothing"
                continue
            members = slot.workers.members
            if len(members) != 1 or members[0].phase is not Phase.SERVING or members[0].digest != active.digest:
                return f"{name} has workers {[(member.phase, member.digest) for member in members]}"
            kept |= {(name, model) for model in (active, slot.state.previous) if model is not None}
        return self._surplus(kept) or (f"processes {list(world.processes)}" if world.strays() else "")

    def _is_reachable(self, slot: str, digest: str) -> bool:
        """Whether what is wanted in the end was not refused for what was done to it on the way."""
        return (slot, digest) not in self.refused or (slot, digest) in self._overruled

    def _surplus(self, kept: set[tuple[str, ModelRef]]) -> str:
        models = {f"/state/models/{model.digest}.tflite" for _, model in kept}
        assert self._world.deployer is not None, "asked of a daemon that runs"
        path_of = self._world.deployer._releases._path
        releases = {str(path_of(slot, model)) for slot, model in kept}
        files = {path for path, _ in self._world.medium.files()}
        for folder, wanted in (("/state/models/", models), ("/state/releases/", releases), ("/state/chunks/", set())):
            found = {path for path in files if path.startswith(folder)}
            if found != wanted:
                return f"{folder} has too much: {sorted(found - wanted)}, or too little: {sorted(wanted - found)}"
        partial = [path for path in files if path.endswith(".new")]
        return f"partial files are left: {partial}" if partial else ""


def _trouble(slot: str, model: ModelRef, releases: Releases, models: ModelStore) -> str:
    if releases.get(slot, model) is None:
        return "its release is lost"
    try:
        behaviour_of(models.open(model.digest))
    except EdgeswapError as error:
        return str(error)
    return ""
