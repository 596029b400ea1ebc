"""Work that is done in a child process: what is asked for, what is answered, and how the child is run.

TensorFlow takes seconds and hundreds of megabytes and never gives them back, and a model file can crash the
interpreter; so the daemon and the command line do neither themselves. A job's request is a JSON file in its output
folder. The child answers with JSON lines on standard output: any number of `Progress`, then one result or one
`Failed`. What it says on standard error goes to `job.log` beside the request.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Annotated, TypeVar, cast, overload

import msgspec
from msgspec import Meta, Struct

from protocol.errors import EdgeswapError, Misconfigured, Rejected, Unavailable
from protocol.release import Golden, Tensor
from trainer_host.gate import GateReport, GateSettings
from trainer_host.parity import Parity
from trainer_host.recipes.recipe import Recipe

LOG = "job.log"
REQUEST = "request.json"
POLL_S = 0.2
MAX_LINE_BYTES = 16 * 1024 * 1024


# What is asked for.


class TrainingRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Train a recipe's network, and export it.

    Attributes:
        recipe: With every setting as it is to be used.
        data: An `.npz` file as `trainer_host.dataset.save` writes it.
        output: Folder for everything the job makes; it is created.
        seed: Of weights, order and split.
        threads: That TensorFlow may use. Small networks gain nothing from a second one.
    """

    recipe: Recipe
    data: str
    output: str
    seed: int = 0
    threads: Annotated[int, Meta(ge=1, le=256)] = 1


class UntrainedRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Export a recipe's network with fresh weights: a first model to start from."""

    recipe: Recipe
    output: str
    seed: int = 0


class PaddedRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Make the same policy slower (`trainer_host.export.padded`).

    Attributes:
        network: The `.keras` file of a job that trained.
        output: Folder for everything the job makes; it is created.
        width: Of the extra layers.
        seed: Of their weights.
    """

    network: str
    output: str
    width: Annotated[int, Meta(ge=1, le=4096)] = 512
    seed: int = 0


class InspectionRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Describe a TFLite file that was made elsewhere.

    Attributes:
        model: The file.
        output: Folder for everything the job makes; it is created.
        seed: Of the inputs of its golden vectors, which are uniform between 0 and 1.
    """

    model: str
    output: str
    seed: int = 0


class GateRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Decide whether a model may be released (`trainer_host.gate`).

    Attributes:
        slot: Which it is for.
        candidate: Its TFLite file.
        current: The TFLite file of the model it would replace.
        settings: What it must show.
        parity: As the job that exported it measured it.
        output: Folder for everything the job makes; it is created.
    """

    slot: str
    candidate: str
    current: str | None = None
    settings: GateSettings = GateSettings()
    parity: tuple[Parity, ...] = ()
    output: str


ExportRequest = UntrainedRequest | PaddedRequest | InspectionRequest
Request = TrainingRequest | ExportRequest | GateRequest


# What is answered.


class Progress(Struct, frozen=True, kw_only=True, tag=True):
    """One epoch is done (`trainer_host.learners.cloning.Epoch`)."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class ModelFile(Struct, frozen=True, kw_only=True):
    """One TFLite file.

    Attributes:
        path: Where it is.
        digest: Its SHA-256.
        length: Its bytes.
        inputs: Tensor signature.
        outputs: Tensor signature.
        operators: Built-in operator name to the version it needs.
        parity: With the network, by runtime; none for a file that was made elsewhere.
        golden: Reference answers.
    """

    path: str
    digest: str
    length: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: dict[str, int]
    parity: tuple[Parity, ...]
    golden: Golden


class Exported(Struct, frozen=True, kw_only=True, tag=True):
    """A model was exported or inspected.

    Attributes:
        files: By format.
        release: The format to release.
        refused: Why a format that was asked for, other than the one to release, is not among the files.
    """

    files: dict[str, ModelFile]
    release: str
    refused: dict[str, str] = {}

    @property
    def released(self) -> ModelFile:
        """The file to release."""
        return self.files[self.release]


class Trained(Exported, frozen=True, kw_only=True, tag=True):
    """A model was trained and exported.

    Attributes:
        network: The `.keras` file.
        metrics: Of the best epoch, and what training took. `decision_accuracy` is the validation accuracy with the
            legal mask applied.
        examples: How many were `read`, `selected`, for `training`, for `validation`.
        rejected: How many transitions were set aside, by reason.
        data_from: Time of the oldest transition that was read.
        data_to: Time of the newest.
    """

    network: str
    metrics: dict[str, float]
    examples: dict[str, int]
    rejected: dict[str, int]
    data_from: float
    data_to: float


class Gated(Struct, frozen=True, kw_only=True, tag=True):
    """The gate has decided."""

    report: GateReport


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """The job came to nothing: a word for programs, and a sentence for people."""

    reason: str
    text: str


Result = Trained | Exported | Gated
Answer = Progress | Trained | Exported | Gated | Failed
Say = Callable[[Progress], None]

_MODULES: dict[type, str] = {
    TrainingRequest: "training_job",
    UntrainedRequest: "training_job",
    PaddedRequest: "training_job",
    InspectionRequest: "checking_job",
    GateRequest: "checking_job",
}
_encoder = msgspec.json.Encoder()
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
R = TypeVar("R", bound=Request)


def _ignore(_: Progress) -> None:
    return


@overload
def run_job(
    request: TrainingRequest, on_progress: Say = ..., *, deadline_s: float = ..., stop: Event | None = ...
) -> Trained: ...
@overload
def run_job(
    request: ExportRequest, on_progress: Say = ..., *, deadline_s: float = ..., stop: Event | None = ...
) -> Exported: ...
@overload
def run_job(
    request: GateRequest, on_progress: Say = ..., *, deadline_s: float = ..., stop: Event | None = ...
) -> Gated: ...
def run_job(
    request: Request, on_progress: Say = _ignore, *, deadline_s: float = 1800.0, stop: Event | None = None
) -> Result:
    """Do a job in a child process, and wait for it.

    Args:
        request: What to do.
        on_progress: Called, in this thread, for each epoch.
        deadline_s: The child is killed when it takes longer.
        stop: Set by another thread to end the job early.

    Raises:
        Rejected: The job failed; with its reason as code.
        Unavailable: The child was killed, took too long, or was stopped.
        Misconfigured: The output folder cannot be written.
    """
    with _started(request) as child:
        try:
            for answer in _read(child, time.monotonic() + deadline_s, stop):
                if isinstance(answer, Progress):
                    on_progress(answer)
                elif isinstance(answer, Failed):
                    raise Rejected(answer.reason, answer.text)
                else:
                    return answer
        finally:
            if child.poll() is None:
                child.kill()
    raise Unavailable(f"the job ended without a result ({_how_it_ended(child)}); see {Path(request.output, LOG)}")


def answer_job(argv: list[str], work: Callable[[R, Say], Result]) -> int:
    """In a child: do the work of the request named on the command line, and answer on standard output.

    Standard output is kept for answers: whatever libraries print goes to standard error.

    Returns:
        The exit status: 0, or 1 when the job failed.
    """
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)

        def say(answer: Answer) -> None:
            answers.write(_encoder.encode(answer) + b"\n")

        try:
            say(work(cast("R", _requests.decode(Path(argv[0]).read_bytes())), say))
        except Rejected as error:
            traceback.print_exc()
            say(Failed(reason=error.code, text=error.text))
        except EdgeswapError as error:
            traceback.print_exc()
            say(Failed(reason="unavailable", text=str(error)))
        except Exception as error:  # noqa: BLE001 - the top of this process: reported, logged, and it ends
            traceback.print_exc()
            say(Failed(reason="internal", text=f"{type(error).__name__}: {error}"))
        else:
            return 0
    return 1


def _started(request: Request) -> subprocess.Popen[bytes]:
    folder = Path(request.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REQUEST).write_bytes(_encoder.encode(request))
        log = (folder / LOG).open("wb")
    except OSError as error:
        raise Misconfigured(f"cannot write to {folder}: {error.strerror}") from error
    with log:
        return subprocess.Popen(
            _command(request, folder / REQUEST),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )


def _command(request: Request, path: Path) -> list[str]:
    return [sys.executable, "-m", f"trainer_host.{_MODULES[type(request)]}", str(path)]


def _read(child: subprocess.Popen[bytes], deadline: float, stop: Event | None) -> Iterator[Answer]:
    """The child's answers as they come, until it closes its output."""
    assert child.stdout is not None, "it was started with a pipe"
    descriptor, buffered = child.stdout.fileno(), b""
    while True:
        if stop is not None and stop.is_set():
            raise Unavailable("the job was stopped")
        if time.monotonic() > deadline:
            raise Unavailable("the job took longer than its deadline, and was ended")
        if not select.select([descriptor], [], [], POLL_S)[0]:
            continue
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        *lines, buffered = (buffered + data).split(b"\n")
        assert len(buffered) <= MAX_LINE_BYTES, "the child is ours"
        yield from map(_answers.decode, lines)


def _how_it_ended(child: subprocess.Popen[bytes]) -> str:
    code = child.wait()
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
