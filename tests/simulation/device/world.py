"""One device and its world, from a seed: everything happens in one order that the seed decides, at simulated times.

The deployer, the stager, the stores and the host's chunk server are the real ones. The world lets them take turns, and
while it is bad it kills them, cuts the power, fills and spoils the disk, loses and forges messages, moves the clock and
lets the operator change his mind. Then it is good, and the device must come to serve what it should.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any, cast

import msgspec

from edge_agent.children import Child, FromTrial, FromWorker, TrialAssignment, WorkerAssignment
from edge_agent.deployer import Deployer, Starters
from edge_agent.deployment import Serving
from edge_agent.settings import Settings, SlotSettings
from edge_agent.staging import FromStager, MetadataVerified, StageModel, StagerSettings
from protocol.codec import Decoder
from protocol.errors import EdgeswapError, Unavailable
from protocol.messages import ChunkRequest, Event
from tests.simulation.device import history, processes
from tests.simulation.device.checks import STATE_DIR, Checks
from tests.simulation.device.disk import Killed, Medium, PowerCut, SimulatedDisk
from tests.simulation.device.processes import End, Process, ScriptedProcess, StagerProcess
from tests.simulation.device.wiring import StagerLink
from trainer_host.chunks import ChunkServer

CAPACITY_BYTES = 10**9
PUBLISH_IDLE, PUBLISH_BUSY = 0.2, 0.015
WALL_S = 1_800_000_000.0
BAD_TURNS = (50, 140)
GOOD_TURNS = 600
SETTLED_TURNS = 3
CALM_IN_A_ROW = 12
CALM_TURNS = 150
CHALLENGE_TURNS = 300
IDLE_JUMP_S = 700.0
WRITES = frozenset({"create", "write", "overwrite", "rename", "remove"})
FAILING = frozenset({"read", "create", "write", "sync", "overwrite", "rename", "remove", "sync_folder"})
SERVING_TURNS = 60

_requests: Decoder[ChunkRequest] = Decoder(ChunkRequest)


class Daemon:
    """The supervisor's process."""

    def __init__(self, world: World) -> None:
        self.kind = "supervisor"
        self.pid = world.next_pid()
        self.disk = SimulatedDisk(world.medium, lambda call, path: world.step(self, call, path))


class World:
    """The world of one seed.

    Args:
        seed: Decides everything.
        root_file: A file with the root of trust of the seed's history.

    Attributes:
        trace: What happened, in order: time, kind, details.
    """

    def __init__(self, seed: int, root_file: str) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.history = history.history(self.rng.randrange(history.HISTORIES))
        self.medium = Medium(CAPACITY_BYTES, random.Random(self.rng.random()))
        self.now = 1000.0
        self.clock_error_s = 0.0
        self.trace: list[tuple[Any, ...]] = []
        self.steps = 0
        self.processes: dict[int, Process] = {}
        self.links: list[StagerLink] = []
        self.running: StagerProcess | None = None
        self.deployer: Deployer | None = None
        self.daemon: Daemon | None = None
        self.broker_is_up = self.host_is_up = True
        self.is_bad = True
        self.had_error = False  # of the disk, since the daemon was last started
        self.ever_had_error = False
        self.checks = Checks(self)
        self._pids = 0
        self._stagers: list[StagerProcess] = []
        self._supervising = False
        self._restart_at = self.now
        self._stopping = False
        self._stable_turns = 0
        self._trail: list[Event] = []
        self._published = -1
        self._inbox: list[bytes] = []
        self._server = ChunkServer(self.history)
        self._late: list[tuple[str, bytes]] = []
        self._disk_mended_at = 0.0
        self._faults = Faults(self.rng)
        self._settings = Settings(
            slots={slot: SlotSettings(trial_seconds=300.0, watch_seconds=100.0) for slot in self.history.slots},
            device=history.DEVICE,
            state_dir=str(STATE_DIR),
            root_of_trust=root_file,
        )

    # Time.

    def run(self) -> None:
        """Live through it.

        Raises:
            Violation: An invariant does not hold.
        """
        try:
            self._suffer()
            self._recover()
        finally:
            self.close()

    def _suffer(self) -> None:
        last = self.history.challenge - 1
        for turn in range(self.rng.randint(*BAD_TURNS)):
            if self._published < last and self.rng.random() < (PUBLISH_IDLE if self._is_calm() else PUBLISH_BUSY):
                self.publish()
            self.turn()
            if turn % 12 == 0:
                self.checks.servable(self.rng)

    def _recover(self) -> None:
        """Nothing goes wrong any more, and the host publishes what is wanted in the end."""
        self.is_bad = False
        self.broker_is_up = self.host_is_up = True
        self.medium.refusal = None
        self.medium.capacity_bytes = CAPACITY_BYTES
        self.clock_error_s = 0.0
        self._late.clear()
        for process in self.processes.values():
            process.hung_until = 0.0
        self.note("good from now on")
        self._face_challenge()
        self._publish_before(len(self.history.published))
        settled = 0
        for turn in range(GOOD_TURNS):
            self.turn()
            unsettled = self.checks.unsettled()
            settled = 0 if unsettled else settled + 1
            if settled == SETTLED_TURNS:
                self.checks.servable(self.rng)
                return
            if turn == SERVING_TURNS:
                self.checks.served()
        self.checks.fail(f"it does not come to rest: {unsettled}")

    def _face_challenge(self) -> None:
        """Nothing is bad but the model that the host publishes: it is refused, and has killed twice at most."""
        self._publish_before(self.history.challenge)
        is_calm = self._comes_to_calm()
        if is_calm:
            self.checks.serves_a_model()
            self.checks.caught_up(self.history.published[self._published])
        challenger = self.history.challenger
        if challenger is None:
            return
        may_judge = is_calm and self.checks.can_go_back(challenger.slot) and not self.checks.rotten
        self.checks.own_deaths.clear()
        self._publish_before(self.history.answered)
        for _ in range(CHALLENGE_TURNS):
            self.turn()
            if self.checks.is_refused(challenger):
                break
        if may_judge:
            self.checks.challenged(challenger)
        while self._published + 1 < self.history.end:
            self.publish()
            self._comes_to_calm()

    def _publish_before(self, end: int) -> None:
        while self._published + 1 < end:
            self.publish()

    def _comes_to_calm(self) -> bool:
        calm = 0
        for _ in range(CALM_TURNS):
            self.turn()
            busy = self.deployer is None or self.deployer._updates.busy
            calm = calm + 1 if self._is_calm() and not busy else 0
            if calm == CALM_IN_A_ROW:
                return True
        return False

    def _is_calm(self) -> bool:
        """Whether the device has done what it was told."""
        return self.deployer is not None and all(
            isinstance(slot.state, Serving) for slot in self.deployer.slots.values()
        )

    def turn(self) -> None:
        """Let everybody go on a little."""
        self._advance()
        if self.is_bad:
            self._faults.happen(self)
        try:
            self._serve_chunks()
            for process in list(self.processes.values()):
                if process.returncode is None and self.now >= process.hung_until:
                    process.run()
            self._supervise()
        except PowerCut:
            self.cut_power()
        self._bury()

    def _advance(self) -> None:
        kind = self.rng.random()
        if not self.is_bad and self._is_idle():
            self.now += self.rng.choice((1.0, 1.0, 20.0, IDLE_JUMP_S))
        elif kind < 0.75:
            self.now += self.rng.uniform(0.05, 1.5)
        elif kind < 0.95:
            self.now += self.rng.uniform(2.0, 15.0)
        else:
            self.now += self.rng.uniform(15.0, 100.0 if self.is_bad else 20.0)

    def _is_idle(self) -> bool:
        return (
            self.deployer is not None
            and not self._stagers
            and not any(process.kind == "trial" for process in self.processes.values())
        )

    def wall_clock(self) -> float:
        """What the system's clock says."""
        return WALL_S + self.now + self.clock_error_s

    def note(self, *what: Any) -> None:
        """Add to the trace."""
        self.trace.append((round(self.now, 2), *what))

    # Processes.

    def next_pid(self) -> int:
        """A new one."""
        self._pids += 1
        return self._pids

    def step(self, process: Process | Daemon, call: str, path: str) -> None:
        """A process is about to use the disk."""
        self.steps += 1
        if call in WRITES and isinstance(process, StagerProcess):
            self.checks.wrote(process)
        if self.is_bad:
            self._faults.strike(self, process, call, path)

    def stager_with_lock(self) -> StagerProcess | None:
        """Which stager holds the lock, if one does."""
        return next((stager for stager in self._stagers if stager.has_lock and stager.returncode is None), None)

    def strays(self) -> bool:
        """Whether processes run that the daemon does not know."""
        assert self.deployer is not None
        return {child.pid for child in self.deployer.children()} != set(self.processes)

    def run_out_of_memory(self) -> None:
        """The system kills the daemon with all its children; called by one of them."""
        self.note("out of memory")
        self.end_daemon(with_children=True)
        raise Killed

    def end_daemon(self, *, with_children: bool) -> None:
        """The supervisor is killed, or has ended."""
        self.note("daemon ended", with_children)
        if self.daemon is not None:
            self.daemon.disk.ended = self.daemon.disk.ended or Killed()
        self.deployer = self.daemon = None
        self._stopping = False
        self._restart_at = self.now + self.rng.choice((0.1, 1.0, 5.0))
        for process in list(self.processes.values()):
            if with_children:
                process.end(processes.KILLED)
            else:
                process.channel.peer.close()

    def cut_power(self) -> None:
        """Everything ends, and what was not synced may be lost."""
        self.note("power cut")
        self.medium.dark = True
        self.end_daemon(with_children=True)
        self._bury()
        self.medium.cut()
        self.checks.servable(self.rng)

    def _bury(self) -> None:
        for stager in [stager for stager in self._stagers if stager.returncode is not None]:
            self._stagers.remove(stager)
            stager.unwind()

    def close(self) -> None:
        """Let go of all threads."""
        for process in list(self.processes.values()):
            process.end(processes.KILLED)
        self._bury()

    def _supervise(self) -> None:
        self._supervising = True
        try:
            if self.deployer is None:
                self._boot()
            else:
                self._turn_of(self.deployer)
        except Killed:
            if self.daemon is not None:
                self.end_daemon(with_children=self.rng.random() < 0.7)
        finally:
            self._supervising = False

    def _turn_of(self, deployer: Deployer) -> None:
        if self.broker_is_up and not self._stopping:
            inbox, self._inbox = self._inbox, []
            for payload in inbox:
                deployer.metadata_arrived(payload)
        for child in deployer.children():
            if cast(End, child.channel).readable:
                deployer.receive(child, self.now)
        deployer.tick(self.now)
        if self._stopping and not deployer.children():
            deployer.stopped()
            self.end_daemon(with_children=True)

    def stop_daemon(self) -> None:
        """The system tells the daemon to end, e.g. before a reboot."""
        if self.deployer is not None and not self._stopping:
            self.note("stop")
            self._stopping = True
            self.deployer.stop(self.now)

    def _boot(self) -> None:
        if self.now < self._restart_at:
            return
        for process in list(self.processes.values()):
            if process.kind != "stager":
                process.end(processes.KILLED)
        self.note("boot")
        self.daemon = Daemon(self)
        self.had_error = self.medium.refusal is not None
        try:
            deployer = Deployer(
                self._settings,
                Starters(self._start_worker, self._start_trial, self._start_stager),
                report=self._report,
                recall=lambda slot: [event for event in self._trail if event.slot == slot],
                record=lambda _: None,
                throttled=lambda: False,
                wall_clock=self.wall_clock,
                rng=random.Random(self.rng.random()),
                disk=self.daemon.disk,
            )
        except EdgeswapError as error:
            if not self.is_bad:
                raise
            self.note("no boot", type(error).__name__, str(error))
            self.end_daemon(with_children=True)
            return
        self.checks.booted({name: slot.state for name, slot in deployer.slots.items()}, on_good_disk=not self.had_error)
        self.deployer = deployer
        deployer.begin(self.now)
        if self._published >= 0:
            self._inbox.append(self.history.published[self._published].payload)  # the broker keeps the newest

    def _child(self, process: Process, end: End, name: str) -> Child[Any]:
        self.processes[process.pid] = process
        self.note("start", process.kind, process.pid, name)
        return Child(cast(Any, process), cast(Any, end), name)

    def _ends(
        self, said: Callable[[Any], None] | None = None, told: Callable[[Any], None] | None = None
    ) -> tuple[End, End]:
        """The supervisor's end and the child's."""
        ours, theirs = End(told), End(said)
        ours.peer, theirs.peer = theirs, ours
        return ours, theirs

    def _start_worker(self, assignment: WorkerAssignment) -> Child[FromWorker]:
        self._faults.start(self)
        self.checks.worker_started(assignment)
        ours, theirs = self._ends()
        process = ScriptedProcess(self, "worker", theirs, processes.worker(assignment))
        return self._child(process, ours, f"{assignment.slot} {assignment.model.version if assignment.model else None}")

    def _start_trial(self, slot: str, assignment: TrialAssignment) -> Child[FromTrial]:
        self._faults.start(self)
        self.checks.trial_started(slot, assignment)
        ours, theirs = self._ends()
        process = ScriptedProcess(self, "trial", theirs, processes.trial(assignment, slot))
        return self._child(process, ours, f"{slot} {assignment.old.version} {assignment.new.version}")

    def _start_stager(self, settings: StagerSettings) -> Child[FromStager]:
        self._faults.start(self)
        ours, theirs = self._ends(self._stager_said, self._stager_told)
        process = StagerProcess(self, theirs, msgspec.structs.replace(settings, built_at=0.0))
        self._stagers.append(process)
        return self._child(process, ours, settings.metadata_file)

    def _stager_said(self, message: Any) -> None:
        if isinstance(message, MetadataVerified):
            self.note("verified", message.version)
            self.checks.verified(message)
        else:
            self.note("stager says", type(message).__name__, *(getattr(message, "reason", ""),))

    def _stager_told(self, message: Any) -> None:
        self.note("stager told", type(message).__name__)
        if isinstance(message, StageModel):
            self.checks.told(message)

    def _report(self, event: Event) -> None:
        self.note(event.kind, event.slot, event.version, event.reason, event.text)
        if self.medium.refusal is None and self.medium.used_bytes < self.medium.capacity_bytes:
            self._trail.append(event)
        self.checks.reported(event)

    # What processes do.

    def loaded(self, process: Process, slot: str, model: Any, data: bytes) -> None:
        """A process runs a model."""
        self.checks.loaded(process, slot, model, data)

    def answered(self, assignment: WorkerAssignment) -> None:
        """A worker has answered a state."""

    # Host, operator, broker.

    def publish(self) -> None:
        """The host publishes its next set."""
        if self._published + 1 < len(self.history.published):
            self._published += 1
            published = self.history.published[self._published]
            self.note("published", published.version, published.what)
            self._inbox.append(published.payload)

    def deliver(self, what: str, payload: bytes) -> None:
        """Something comes on the metadata topic."""
        self.note("delivered", what)
        self._inbox.append(payload)

    def connect_broker(self, *, up: bool) -> None:
        """The broker goes away or comes back; then it sends what it kept."""
        if up != self.broker_is_up:
            self.note("broker", up)
            self.broker_is_up = up
            if up and self._published >= 0:
                self._inbox.append(self.history.published[self._published].payload)

    def published_before(self) -> list[bytes]:
        """What the host has published so far."""
        return [published.payload for published in self.history.published[: self._published + 1]]

    def requested(self, payload: bytes) -> None:
        """A request for chunks comes to the host, if it is there."""
        if self.host_is_up and not (self.is_bad and self._faults.loses(self)):
            self._server.requested(_requests.decode(payload), self.now)

    def _serve_chunks(self) -> None:
        if not (self.host_is_up and self.broker_is_up):
            self._server.disconnected()
            return
        sent, self._late = self._late, []
        while (publication := self._server.next(self.now)) is not None:
            self._server.published()
            sent.append((publication.topic, publication.payload))
        if self.is_bad:
            sent, self._late = self._faults.meddled(self, sent)
        for topic, payload in sent:
            for link in self.links:
                if link.connected and topic in link.topics:
                    link.inbox.append((topic, payload))


class Faults:
    """How bad a world is, and in which ways.

    Args:
        rng: Decides.
    """

    def __init__(self, rng: random.Random) -> None:
        def chance(most: float) -> float:
            return rng.choice((0.0, 0.0, 0.3, 1.0)) * most

        self._kill, self._hang = chance(0.04), chance(0.01)
        self._end_daemon, self._stop, self._cut = chance(0.03), chance(0.02), chance(0.03)
        self._disk, self._rot = chance(0.03), chance(0.02)
        self._broker, self._host = chance(0.05), chance(0.05)
        self._clock, self._forge, self._repeat = chance(0.02), chance(0.08), chance(0.05)
        self._lose, self._double, self._delay, self._spoil = chance(0.3), chance(0.3), chance(0.3), chance(0.1)
        self._no_process = chance(0.03)
        self._interleave = chance(0.2)
        # At steps of the disk: anywhere, and more often at one kind of step.
        self._strike = chance(0.004)
        self._focus = (
            rng.choice(("supervisor", "stager", "worker", "trial")),
            rng.choice(("sync", "write", "overwrite", "rename", "sync_folder", "create", "remove", "read")),
        )
        self._focused = chance(0.15)
        self._strikes = rng.choice((("kill",), ("cut",), ("kill", "cut"), ("kill", "cut", "error"), ("error",)))

    def happen(self, world: World) -> None:
        """What goes wrong between turns."""
        rng = world.rng
        if world.processes and rng.random() < self._kill:
            process = rng.choice(list(world.processes.values()))
            world.note("kill", process.kind, process.pid)
            process.end(processes.KILLED)
        if world.processes and rng.random() < self._hang:
            process = rng.choice(list(world.processes.values()))
            world.note("hang", process.kind, process.pid)
            process.hung_until = world.now + rng.choice((3.0, 30.0, 400.0))
        if world.daemon is not None and rng.random() < self._end_daemon:
            world.end_daemon(with_children=rng.random() < 0.7)
        if rng.random() < self._stop:
            try:
                world.stop_daemon()
            except Killed:
                world.end_daemon(with_children=True)
        if rng.random() < self._cut:
            world.cut_power()
        self._disk_happens(world, rng)
        self._surroundings_happen(world, rng)

    def _surroundings_happen(self, world: World, rng: random.Random) -> None:
        if rng.random() < self._broker:
            world.connect_broker(up=not world.broker_is_up)
        if rng.random() < self._host:
            world.host_is_up = not world.host_is_up
            world.note("host", world.host_is_up)
        if rng.random() < self._clock:
            back = -WALL_S if world.checks.knows_time and not self._disk else 0.0
            world.clock_error_s = rng.choice((0.0, 0.0, back, 10 * 365 * 86400.0, 100 * 365 * 86400.0))
            world.note("clock", world.clock_error_s)
        if rng.random() < self._forge:
            world.deliver(*rng.choice(world.history.forged))
        if rng.random() < self._repeat and (before := world.published_before()):
            if rng.random() < 0.5:
                world.deliver("what was published before", rng.choice(before))
            else:
                world.deliver("altered", before[-1].replace(b".tflite", b".tflitf", 1))

    def _disk_happens(self, world: World, rng: random.Random) -> None:
        medium = world.medium
        troubled = medium.refusal is not None or medium.capacity_bytes != CAPACITY_BYTES
        if troubled and rng.random() < 0.2:
            medium.refusal, medium.capacity_bytes = None, CAPACITY_BYTES
            world.note("disk", "healthy")
        elif rng.random() < self._disk:
            kind = rng.choice(("full", errno.EROFS, errno.EIO))
            world.note("disk", kind)
            world.had_error = world.ever_had_error = True
            if kind == "full":
                medium.capacity_bytes = medium.used_bytes + rng.choice((0, 100, 2000, 20_000))
            else:
                medium.refusal = cast(int, kind)
        if rng.random() < self._rot:
            self._let_rot(world, rng)

    def _let_rot(self, world: World, rng: random.Random) -> None:
        """An active model rots where there is one before it that is whole."""
        states, _ = world.checks.on_platter()
        for state in states.values():
            active, previous = state.active, state.previous
            if active is None or previous is None or {active.digest, previous.digest} & world.checks.rotten:
                continue
            path = f"/state/models/{active.digest}.tflite"
            if world.medium.find(path) is not None:
                world.note("rot", active.version)
                world.medium.damage(path, rng)
                world.checks.rotten.add(active.digest)

    def start(self, world: World) -> None:
        """The system may have no process to give."""
        if world.is_bad and world.rng.random() < self._no_process:
            raise Unavailable("no process to be had")

    def strike(self, world: World, process: Process | Daemon, call: str, path: str) -> None:
        """What goes wrong at a step of the disk."""
        rng = world.rng
        kind = rng.random()
        if (kind < self._strike) or ((process.kind, call) == self._focus and rng.random() < self._focused):
            what = rng.choice(self._strikes)
            if what == "error" and (call not in FAILING or "/state/state/" in path or "trusted-time" in path):
                return
            world.note("strike", what, process.kind, call, path.removeprefix("/state/")[:24])
            if what == "error":
                world.had_error = world.ever_had_error = True
                if call == "read":
                    world.checks.unreadable(path)
                raise OSError(errno.EIO, "Input/output error", path)
            raise Killed if what == "kill" else PowerCut
        if kind > 1 - self._interleave:
            if isinstance(process, StagerProcess):
                if world.running is process:
                    process.pause()
            elif isinstance(process, Daemon) and world.processes:
                other = rng.choice(list(world.processes.values()))
                if world.now >= other.hung_until:
                    other.run()

    def loses(self, world: World) -> bool:
        """Whether a message to the host is lost."""
        return world.rng.random() < self._lose

    def meddled(
        self, world: World, sent: list[tuple[str, bytes]]
    ) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
        """What comes of chunks on their way: now, and later."""
        rng = world.rng
        now: list[tuple[str, bytes]] = []
        late: list[tuple[str, bytes]] = []
        for topic, payload in sent:
            if rng.random() < self._lose:
                continue
            content = payload
            if rng.random() < self._spoil:
                content = rng.choice((b"", payload[:-1], payload + b"!", rng.randbytes(len(payload))))
                world.note("spoilt chunk")
            (late if rng.random() < self._delay else now).append((topic, content))
            if rng.random() < self._double:
                now.append((topic, payload))
        rng.shuffle(now)
        return now, late
