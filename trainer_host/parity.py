"""Whether an exported model answers as the network it was made from, on the runtimes that devices have.

The only import of a TFLite interpreter on the host. `ai-edge-litert` runs in this process. `tflite-runtime`, where it
is installed, runs in a child
process: the two of them and TensorFlow carry different builds of one library, and in one process the older one fails
while it loads a model.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from protocol.errors import Rejected, Unavailable
from protocol.release import Golden

Vectors = NDArray[np.float32]
Scorer = Callable[[Vectors], Vectors]

HERE = "ai-edge-litert"
_MODULES = {HERE: "ai_edge_litert.interpreter", "tflite-runtime": "tflite_runtime.interpreter"}
CHILD_DEADLINE_S = 120.0


class Limits(Struct, frozen=True, kw_only=True):
    """How far an exported model may stray.

    Attributes:
        max_difference: Between any two scores.
        min_agreement: Share of rows on which the best action must be the same.
        tolerance: Of the golden vectors: how far two runtimes may differ when they run the very same file.
    """

    max_difference: float
    min_agreement: float
    tolerance: float


# Scores are probabilities. With dynamic range the agreement is what protects the policy; one score among thousands of
# rows may move far where two actions are nearly equal, and only beyond a half can a choice that was certain turn. The
# two runtimes round activations differently. `docs/training.md` has what was measured, and on what.
LIMITS = {
    "float32": Limits(max_difference=1e-4, min_agreement=0.999, tolerance=1e-4),
    "dynamic_range": Limits(max_difference=0.5, min_agreement=0.95, tolerance=0.25),
}


class Parity(Struct, frozen=True, kw_only=True):
    """How one runtime's answers compare with the network's.

    Attributes:
        runtime: Distribution name of the runtime.
        rows: How many inputs were compared.
        max_difference: Between any two scores.
        argmax_agreement: Share of rows with the same best action.
    """

    runtime: str
    rows: int
    max_difference: float
    argmax_agreement: float


def compare(expected: Vectors, got: Vectors, runtime: str) -> Parity:
    """Compare scores, (rows, actions) each."""
    same = expected.argmax(axis=1) == got.argmax(axis=1)
    difference = float(np.abs(expected - got).max())
    return Parity(runtime=runtime, rows=len(got), max_difference=difference, argmax_agreement=float(same.mean()))


def shortcomings(parity: Parity, limits: Limits) -> list[str]:
    """One sentence for each limit that is not kept. A difference that is not a number keeps none."""
    found = []
    if not parity.max_difference <= limits.max_difference:
        most, allowed = parity.max_difference, limits.max_difference
        found.append(f"on {parity.runtime} scores differ by up to {most:.2g}, more than {allowed:.2g}")
    if parity.argmax_agreement < limits.min_agreement:
        agreement, least = parity.argmax_agreement, limits.min_agreement
        found.append(
            f"on {parity.runtime} the best action is the same in {agreement:.1%} of rows, less than {least:.1%}"
        )
    return found


def measured(model: bytes, inputs: Vectors, expected: Vectors, limits: Limits) -> tuple[Parity, ...]:
    """Compare on every runtime that is installed.

    Args:
        model: A TFLite file.
        inputs: (rows, features).
        expected: (rows, actions) the network's scores.
        limits: That every runtime must keep.

    Raises:
        Rejected: With code `parity_failed` when a runtime strays too far, `bad_model` when it refuses the model.
    """
    parities = tuple(compare(expected, scores(model, inputs, runtime), runtime) for runtime in installed())
    found = [sentence for parity in parities for sentence in shortcomings(parity, limits)]
    if found:
        raise Rejected("parity_failed", "; ".join(found))
    return parities


def golden(inputs: Vectors, scores: Vectors, tolerance: float, count: int = 8) -> Golden:
    """Reference answers for the devices: the first row of each best action, then rows spread evenly, `count` at most.

    Args:
        inputs: (rows, features).
        scores: (rows, actions) what the released file answers.
        tolerance: Absolute.
        count: How many.
    """
    _, firsts = np.unique(scores.argmax(axis=1), return_index=True)
    spread = np.linspace(0, len(inputs) - 1, count).astype(int)
    rows = list(dict.fromkeys([*firsts.tolist(), *spread.tolist()]))[:count]
    return Golden(
        inputs=tuple(tuple(row) for row in inputs[rows].tolist()),
        outputs=tuple(tuple(row) for row in scores[rows].tolist()),
        tolerance=tolerance,
    )


def installed() -> list[str]:
    """The runtimes that are installed here, by distribution name."""
    return [name for name, module in _MODULES.items() if importlib.util.find_spec(module.partition(".")[0])]


def scores(model: bytes, inputs: Vectors, runtime: str = HERE) -> Vectors:
    """(rows, actions): what a runtime answers to (rows, features).

    Raises:
        Rejected: With code `bad_model` when the runtime refuses the model.
        Unavailable: When another process was needed and did not answer in time.
    """
    return scorer(model)(inputs) if runtime == HERE else _scores_elsewhere(model, inputs, runtime)


def scorer(model: bytes, runtime: str = HERE) -> Scorer:
    """Load a model into this process.

    Returns:
        From (rows, features) float32 to (rows, actions), row by row, on one thread.

    Raises:
        Rejected: With code `bad_model` when the runtime refuses it, or it is not from one float32 vector to one.
    """
    try:
        interpreter = importlib.import_module(_MODULES[runtime]).Interpreter(model_content=model, num_threads=1)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise Rejected("bad_model", f"{runtime} refuses the model: {error}") from error
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if not (_is_vector(inputs) and _is_vector(outputs)):
        shapes = [(detail["shape"].tolist(), np.dtype(detail["dtype"]).name) for detail in (*inputs, *outputs)]
        raise Rejected("bad_model", f"expected one float32 vector (1, n) in and one out, not {shapes}")
    source, target = inputs[0]["index"], outputs[0]["index"]
    width, actions = int(inputs[0]["shape"][1]), int(outputs[0]["shape"][1])

    def score(rows: Vectors) -> Vectors:
        if rows.shape[1] != width:
            raise Rejected("bad_model", f"the model takes {width} features, not {rows.shape[1]}")
        answers = np.empty((len(rows), actions), np.float32)
        for number in range(len(rows)):
            interpreter.set_tensor(source, rows[number : number + 1])
            interpreter.invoke()
            answers[number] = interpreter.get_tensor(target)[0]
        return answers

    return score


def main() -> int:
    """In a child: read a model and inputs from standard input, write the scores to standard output."""
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as question:
        model, inputs = question["model"].tobytes(), question["inputs"]
    try:
        answers = scorer(model, sys.argv[1])(inputs)
    except Rejected as error:
        print(error.text, file=sys.stderr)
        return 1
    np.save(sys.stdout.buffer, answers)
    return 0


def _scores_elsewhere(model: bytes, inputs: Vectors, runtime: str) -> Vectors:
    question = io.BytesIO()
    np.savez(question, model=np.frombuffer(model, np.uint8), inputs=inputs)
    command = [sys.executable, "-m", "trainer_host.parity", runtime]
    try:
        child = subprocess.run(
            command, input=question.getvalue(), capture_output=True, timeout=CHILD_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{runtime} gave no answer within {CHILD_DEADLINE_S:.0f} s") from error
    if child.returncode:
        said = child.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit status {child.returncode}"]
        raise Rejected("bad_model", said[-1])
    answers: Vectors = np.load(io.BytesIO(child.stdout))
    return answers


def _is_vector(details: list[dict[str, Any]]) -> bool:
    if len(details) != 1 or details[0]["dtype"] != np.float32:
        return False
    shape = details[0]["shape"].tolist()
    return len(shape) == 2 and shape[0] == 1


if __name__ == "__main__":
    sys.exit(main())
