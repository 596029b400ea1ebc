"""The supervisor's child processes: how they are started, and what is said to worker and trial.

Every child is `python -m edge_agent.<module> --fd N`, with one end of a socket pair. Its first message is its
assignment. A child whose supervisor has gone sees its channel closed, and ends.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
from typing import Any, Generic, TypeVar

from msgspec import Struct

from edge_agent.battles import Served
from edge_agent.channel import Channel
from edge_agent.open_battles import Mark
from protocol.errors import Unavailable
from protocol.features import FeatureSpec
from protocol.link import Broker

T = TypeVar("T")


class ModelFile(Struct, frozen=True, kw_only=True):
    """A verified model on disk, and what is needed to use it."""

    digest: str
    version: int
    folder: str
    features: FeatureSpec


# To a worker.


class WorkerAssignment(Struct, frozen=True, kw_only=True, tag=True):
    """A worker's first message.

    Attributes:
        device: This device's name.
        slot: Which slot it answers for.
        slots: All slots of the device, so that it knows a stranger's.
        front_desk: Whether this worker also answers, with `unknown_slot`, what is sent to slots that do not exist.
        broker: Where to connect.
        model: What to answer with; none answers `no_model`.
        finishing: What to answer with at first, and, after `Begin`, in battles that began with it.
        threads: For the interpreter.
        deadline_ms: Beyond which a waiting state is refused as `overloaded`.
    """

    device: str
    slot: str
    slots: list[str]
    front_desk: bool
    broker: Broker
    model: ModelFile | None
    finishing: ModelFile | None = None
    threads: int
    deadline_ms: float


class Join(Struct, frozen=True, tag=True):
    """Subscribe, and answer."""


class OldBattles(Struct, frozen=True, tag=True):
    """Battles that began with the model to finish; as many as fit one message."""

    marks: list[Mark]


class Begin(Struct, frozen=True, tag=True):
    """Nobody else answers any more, and all old battles were told: answer the others with the new model."""


class Leave(Struct, frozen=True, tag=True):
    """Unsubscribe, answer what is still here, and end."""


ToWorker = WorkerAssignment | Join | OldBattles | Begin | Leave


# From a worker.


class Loaded(Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded and warm, or there is none. `failure` says why the one to finish is not."""

    load_ms: float
    runtime: str
    failure: str = ""


class LoadFailed(Struct, frozen=True, kw_only=True, tag=True):
    """The model cannot be served; the worker ends."""

    reason: str
    text: str


class Joined(Struct, frozen=True, tag=True):
    """The broker has acknowledged the subscription."""


class Disconnected(Struct, frozen=True, tag=True):
    """The worker has lost the broker; it reconnects by itself."""


class Records(Struct, frozen=True, tag=True):
    """What was served; `lost` records did not fit the channel since the last report."""

    served: list[Served]
    lost: int


class Beat(Struct, frozen=True, kw_only=True, tag=True):
    """About once a second, from the loop that serves: it turns.

    Attributes:
        answered: Observations since the last beat.
        errors: Likewise, by code.
        latency_us_histogram: Likewise.
        finishing: Whether the model to finish is still loaded.
    """

    answered: int
    errors: dict[str, int]
    latency_us_histogram: dict[int, int]
    finishing: bool = False


FromWorker = Loaded | LoadFailed | Joined | Disconnected | Records | Beat


# To a trial.


class TrialAssignment(Struct, frozen=True, kw_only=True, tag=True):
    """A trial's first message.

    Attributes:
        old: The model that is served.
        new: The model that is compared with it.
        threads: For both interpreters.
        seed: Of the coin that decides which goes first.
        duty: Share of one core the trial may use, 0 to 1.
        interval_s: Least time between two pairs.
        memory_bytes: How much memory the new model may take, beside the old one; 0 for as much as there is.
        old_inputs: float32 vectors for the old model,
        new_inputs: and, index by index, the same states for the new one.
    """

    old: ModelFile
    new: ModelFile
    threads: int
    seed: int
    duty: float
    interval_s: float
    old_inputs: list[bytes]
    new_inputs: list[bytes]
    memory_bytes: int = 0


class RecentInputs(Struct, frozen=True, tag=True):
    """Fresh states, as float32 vectors that both models take; they replace the inputs used so far."""

    inputs: list[bytes]


ToTrial = TrialAssignment | RecentInputs


# From a trial.


class TrialReady(Struct, frozen=True, kw_only=True, tag=True):
    """Both models are loaded and warm. Memory is what the second one added, in bytes."""

    memory_bytes: int


class TimedPairs(Struct, frozen=True, tag=True):
    """`(old_ns, new_ns)` of each pair, in the order they were run."""

    pairs: list[tuple[int, int]]


class CandidateFailed(Struct, frozen=True, kw_only=True, tag=True):
    """The new model gave an error, or an output that is not finite, on an input the old one answers."""

    reason: str
    text: str


class BaselineFailed(Struct, frozen=True, kw_only=True, tag=True):
    """The old model cannot be loaded, or gave an error, which is not the new one's fault."""

    reason: str
    text: str


FromTrial = TrialReady | TimedPairs | CandidateFailed | BaselineFailed


class Child(Generic[T]):
    """A running child process and the channel to it."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel[T], name: str) -> None:
        self.process = process
        self.channel = channel
        self.name = name

    def fileno(self) -> int:
        """The channel's descriptor: readable when the child has said something, or has gone."""
        return self.channel.fileno()

    @property
    def pid(self) -> int:
        """Process identifier."""
        return self.process.pid

    def has_ended(self) -> bool:
        """Whether the process is gone (and reap it)."""
        return self.process.poll() is not None

    def how_it_ended(self) -> str:
        """For people: `exit status 1`, `killed by SIGKILL`."""
        code = self.process.returncode
        if code is None:
            return "still running"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def kill(self, timeout_s: float = 2.0) -> None:
        """End the process at once, and reap it; one that waits for a failing disk ends when the kernel lets it."""
        self.channel.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)


def start(module: str, assignment: Any, answers: Any, name: str) -> Child[Any]:
    """Start a child.

    Args:
        module: Module below `edge_agent` with the child's main function.
        assignment: Its first message.
        answers: The union of structs it sends.
        name: For people.

    Raises:
        Unavailable: The system has no process, memory or descriptor to give.
    """
    try:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", f"edge_agent.{module}", "--fd", str(theirs.fileno())]
            try:
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            except OSError:
                ours.close()
                raise
    except OSError as error:
        raise Unavailable(f"cannot start the {name}: {error}") from error
    channel: Channel[Any] = Channel(ours, answers)
    channel.send(assignment)
    return Child(process, channel, name)


def inherited_channel(argv: list[str], messages: Any) -> Channel[Any]:
    """In a child: its end of the channel, from the command line that `start` made."""
    assert argv[0] == "--fd", "children are started by the supervisor only"
    return Channel(socket.socket(fileno=int(argv[1])), messages)


def first_message(channel: Channel[T]) -> T | None:
    """In a child: wait for the assignment; `None` if the supervisor went away before."""
    while not channel.closed:
        select.select([channel], [], [])
        messages = channel.receive()
        if messages:
            assert len(messages) == 1, "nothing follows the assignment before it is answered"
            return messages[0]
    return None
