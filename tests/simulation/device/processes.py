"""The processes of a simulated device: a stager that is the real one, workers and trials that do what the real ones do
with files and messages, and with models what their first line says.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edge_agent import stager
from edge_agent.children import (
    BaselineFailed,
    Beat,
    CandidateFailed,
    Disconnected,
    Join,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    TimedPairs,
    TrialAssignment,
    TrialReady,
    WorkerAssignment,
)
from edge_agent.model_store import ModelStore
from edge_agent.staging import MetadataRefused, StagerSettings
from protocol.errors import EdgeswapError, Rejected, Unavailable
from tests.simulation.device import history
from tests.simulation.device.disk import Killed, PowerCut, SimulatedDisk
from tests.simulation.device.fibers import Fiber

if TYPE_CHECKING:
    from tests.simulation.device.world import World

KILLED, SEGFAULT, ALARM = -9, -11, -14
PAIRS = 6
OLD_NS = 100_000
ANSWERS_BEFORE_DEATH = 3
MEMORY_GONE = 0.1  # at each answer


class End:
    """One end of a conversation: what a `Channel` is to its owner."""

    def __init__(self, on_send: Callable[[Any], None] | None = None) -> None:
        self.closed = False
        self.peer: End = self
        self._inbox: deque[Any] = deque()
        self._on_send = on_send
        self._hung_up = False

    @property
    def readable(self) -> bool:
        """Whether `receive` has something to say."""
        return bool(self._inbox) or (self._hung_up and not self.closed)

    def send(self, message: Any) -> bool:
        """See `Channel`."""
        if self.closed or self._hung_up:
            self.closed = True
            return False
        if self._on_send is not None:
            self._on_send(message)
        self.peer._inbox.append(message)
        return True

    def receive(self) -> list[Any]:
        """See `Channel`."""
        messages = list(self._inbox)
        self._inbox.clear()
        self.closed |= self._hung_up
        return messages

    def flush(self) -> None:
        """See `Channel`."""

    def close(self) -> None:
        """See `Channel`."""
        self.closed = True
        self.peer._hung_up = True


class Process:
    """One child process: what a `Popen` is to its owner.

    Args:
        world: Where it runs.
        kind: `worker`, `trial` or `stager`.
        channel: Its end of the conversation.
    """

    def __init__(self, world: World, kind: str, channel: End) -> None:
        self.world = world
        self.kind = kind
        self.channel = channel
        self.pid = world.next_pid()
        self.returncode: int | None = None
        self.disk = SimulatedDisk(world.medium, lambda call, path: world.step(self, call, path))
        self.hung_until = 0.0

    def poll(self) -> int | None:
        """See `Popen`."""
        return self.returncode

    def wait(self, _timeout: float | None = None) -> int | None:
        """See `Popen`."""
        return self.returncode

    def kill(self) -> None:
        """See `Popen`."""
        self.end(KILLED)

    def end(self, code: int) -> None:
        """It is no more."""
        if self.returncode is None:
            self.returncode = code
            self.world.note("ended", self.kind, self.pid, code)
            if self.disk.ended is None:
                self.disk.ended = Killed()
            self.channel.close()
            self.world.processes.pop(self.pid, None)

    def run(self) -> None:
        """Let it go on a little."""
        raise NotImplementedError


class ScriptedProcess(Process):
    """A process that is a generator: it can be stopped where it yields, and at each step of the disk."""

    def __init__(self, world: World, kind: str, channel: End, body: Callable[[Process], Generator[None]]) -> None:
        super().__init__(world, kind, channel)
        self._body = body(self)

    def run(self) -> None:
        """See `Process`."""
        try:
            next(self._body)
        except StopIteration:
            self.end(0)
        except Exit as end:
            self.end(end.code)
        except Killed:
            self.end(KILLED)


class Exit(Exception):
    """A process ends by itself, with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def worker(assignment: WorkerAssignment) -> Callable[[Process], Generator[None]]:
    """As `edge_agent.worker`."""

    def run(process: Process) -> Generator[None]:
        world, channel = process.world, process.channel
        behaviour = history.GOOD
        yield
        if assignment.model is not None:
            try:
                behaviour = opened(process, assignment.model, assignment.slot)
            except EdgeswapError as error:
                channel.send(LoadFailed(reason=reason_of(error), text=str(error)))
                raise Exit(1) from error
        channel.send(Loaded(load_ms=1.0, runtime="simulated"))
        joining = joined = False
        answers = 0
        while not channel.closed:
            yield
            for message in channel.receive():
                if isinstance(message, Leave):
                    return
                joining |= isinstance(message, Join)
            if channel.closed:
                return
            if joining and not joined and world.broker_is_up:
                channel.send(Joined())
                joined = True
            elif joined and not world.broker_is_up:
                channel.send(Disconnected())
                joined = False
            if joined:
                answers += 1
                world.answered(assignment)
                if answers == ANSWERS_BEFORE_DEATH and behaviour == history.CRASHES_WORKER:
                    die_of(process, assignment.model)
                if behaviour == history.EATS_MEMORY_IN_WORKER and world.rng.random() < MEMORY_GONE:
                    world.run_out_of_memory()
            channel.send(Beat(answered=int(joined), errors={}, latency_us_histogram={}))

    return run


def trial(assignment: TrialAssignment, slot: str) -> Callable[[Process], Generator[None]]:
    """As `edge_agent.trial`."""

    def run(process: Process) -> Generator[None]:
        world, channel = process.world, process.channel
        watching = assignment.interval_s > 0
        yield
        try:
            opened(process, assignment.old, slot)
        except EdgeswapError as error:
            channel.send(BaselineFailed(reason=reason_of(error), text=str(error)))
            return
        try:
            behaviour = opened(process, assignment.new, slot)
        except EdgeswapError as error:
            channel.send(CandidateFailed(reason=reason_of(error), text=str(error)))
            return
        channel.send(TrialReady(memory_bytes=0))
        while not channel.closed:
            yield
            channel.receive()
            if channel.closed:
                return
            if not watching:
                if behaviour == history.CRASHES_TRIAL:
                    die_of(process, assignment.new)
                if behaviour == history.EATS_MEMORY_IN_TRIAL:
                    world.checks.own_deaths[assignment.new.digest] += 1
                    world.run_out_of_memory()
                if behaviour == history.CUTS_POWER_IN_TRIAL:
                    world.checks.own_deaths[assignment.new.digest] += 1
                    raise PowerCut
                if behaviour == history.LATE_NAN:
                    channel.send(CandidateFailed(reason="not_finite", text="the new model's output is not finite"))
                    return
            slow = behaviour == history.SLOW or (watching and behaviour == history.TIRING)
            new_ns = 3 * OLD_NS if slow else OLD_NS + world.rng.randrange(100)
            channel.send(TimedPairs([(OLD_NS, new_ns)] * PAIRS))

    return run


def die_of(process: Process, model: ModelFile | None) -> NoReturn:
    """The runtime crashes."""
    assert model is not None, "there is no other cause"
    process.world.checks.own_deaths[model.digest] += 1
    raise Exit(SEGFAULT)


def opened(process: Process, model: ModelFile, slot: str) -> str:
    """Load a model as every process that runs one does. Returns how it behaves."""
    data = ModelStore(Path(model.folder), process.disk).open(model.digest)
    process.world.loaded(process, slot, model, data)
    return history.behaviour_of(data)


def reason_of(error: EdgeswapError) -> str:
    """As workers and trials name it."""
    return error.code if isinstance(error, Rejected) else "unavailable"


class StagerProcess(Process):
    """The real stager, in a fiber: it can be stopped at each step of the disk and wherever it waits."""

    def __init__(self, world: World, channel: End, settings: StagerSettings) -> None:
        super().__init__(world, "stager", channel)
        self._settings = settings
        self.fiber = Fiber(self._main)
        self.has_lock = False

    def run(self) -> None:
        """See `Process`."""
        before, self.world.running = self.world.running, self
        try:
            self.fiber.resume()
        except SystemExit:
            self.end(0)
        except Exit as end:
            self.end(end.code)
        finally:
            self.world.running = before
        if self.fiber.ended:
            self.end(0 if self.disk.ended is None else KILLED)

    def end(self, code: int) -> None:
        """See `Process`."""
        super().end(code)
        self.has_lock = False
        self.fiber.kill()

    def unwind(self) -> None:
        """Let the thread of a process that has ended go."""
        if not self.fiber.ended:
            self.fiber.kill()
            with contextlib.suppress(SystemExit, PowerCut, Exit):
                self.fiber.resume()

    def pause(self) -> None:
        """In the fiber: let the world go on."""
        self.fiber.pause()

    def die_of_model(self, digest: str, *, by_hanging: bool) -> None:
        """In the fiber: the runtime crashes, or hangs until the alarm."""
        self.world.checks.own_deaths[digest] += 1
        self.end(ALARM if by_hanging else SEGFAULT)
        raise Killed

    def _main(self) -> None:
        """As the stager's `main`."""
        try:
            SimulatedStager(self).run()
        except EdgeswapError as error:
            self.channel.send(MetadataRefused(stager._reason(error), str(error)))

    @property
    def settings(self) -> StagerSettings:
        """What it was told at first."""
        return self._settings


class SimulatedStager(stager.Stager):
    """The real stager, reading from the simulated disk."""

    def __init__(self, process: StagerProcess) -> None:
        super().__init__(process.settings, process.channel)  # type: ignore[arg-type]
        self._process = process

    def _payload(self) -> bytes:
        path = Path(self._settings.metadata_file)
        try:
            return self._process.disk.read(path)
        except OSError as error:
            raise Unavailable(f"cannot read {path}: {error.strerror}") from error


def digest_of(data: bytes) -> str:
    """The harness's own opinion."""
    return hashlib.sha256(data).hexdigest()
