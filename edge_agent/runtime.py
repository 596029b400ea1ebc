"""The only import of a TFLite interpreter.

`ai-edge-litert` is taken where it is installed, else `tflite-runtime`; both offer the same interface. Only processes
that run models import this module: the supervisor never does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent import limits
from protocol.errors import Misconfigured, Rejected
from protocol.release import Tensor

Vector = npt.NDArray[np.float32]

_RUNTIMES = (("ai-edge-litert", "ai_edge_litert.interpreter"), ("tflite-runtime", "tflite_runtime.interpreter"))


def _find() -> tuple[str, str, Any]:
    for distribution, module in _RUNTIMES:
        try:
            interpreter = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        return distribution, importlib.metadata.version(distribution), interpreter.Interpreter
    names = " or ".join(distribution for distribution, _ in _RUNTIMES)
    raise Misconfigured(f"no TFLite runtime is installed: install {names}")


NAME, VERSION, _Interpreter = _find()


class Model:
    """A loaded model with one input and one output, for one thread.

    Args:
        data: The model file's bytes, which must be verified: a hostile file can crash the process.
        threads: How many threads the runtime may use for one inference.

    Raises:
        Rejected: With code `bad_model` when the runtime refuses it, or it has not exactly one float32 input `(1, n)`
            and one output `(1, m)`; `out_of_memory` when it needs more than the process may take.
    """

    def __init__(self, data: bytes, threads: int = 1) -> None:
        self._interpreter: Any = None
        try:
            self._interpreter = _Interpreter(model_content=data, num_threads=threads)
            self._interpreter.allocate_tensors()
            inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
            self.inputs = tuple(_tensor(detail) for detail in inputs)
            self.outputs = tuple(_tensor(detail) for detail in outputs)
            if not (_is_vector(self.inputs) and _is_vector(self.outputs)):
                text = f"expected one float32 vector in and one out, not {self.inputs} and {self.outputs}"
                raise Rejected("bad_model", text)
            self._batch = np.zeros(self.inputs[0].shape, np.float32)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise self._failure("bad_model", f"{NAME} {VERSION} refuses the model", error) from error
        self._input = inputs[0]["index"]
        self._output = outputs[0]["index"]

    @property
    def input_length(self) -> int:
        """How many features one inference takes."""
        return self.inputs[0].shape[1]

    @property
    def output_length(self) -> int:
        """How many scores one inference gives."""
        return self.outputs[0].shape[1]

    def invoke(self, features: Vector) -> Vector:
        """Run one inference.

        Args:
            features: Shape `(input_length,)`.

        Returns:
            Scores, shape `(output_length,)`.

        Raises:
            Rejected: With code `wrong_length` when there are more or fewer features, `inference_failed` when the
                runtime reports an error, `out_of_memory` when it needs more than the process may take.
        """
        if len(features) != self.input_length:  # NumPy would spread a single one over all
            raise Rejected("wrong_length", f"{len(features)} features, the model takes {self.input_length}", "features")
        self._batch[0] = features
        try:
            self._interpreter.set_tensor(self._input, self._batch)
            self._interpreter.invoke()
            scores: Vector = self._interpreter.get_tensor(self._output)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise self._failure("inference_failed", f"{NAME} {VERSION} fails", error) from error
        if scores.shape != self.outputs[0].shape:  # a model may give its output another shape while it runs
            raise Rejected("inference_failed", f"the output has shape {scores.shape}, not {self.outputs[0].shape}")
        first: Vector = scores[0]
        return first

    def warm_up(self, calls: int = 20) -> None:
        """Run some inferences on zeros, so that the first real one finds caches and threads as later ones do."""
        zeros = np.zeros(self.input_length, np.float32)
        for _ in range(calls):
            self.invoke(zeros)

    def _failure(self, code: str, what: str, error: Exception) -> Rejected:
        """Name what went wrong. Where memory is short, the one runtime says so, and the other says nothing at all."""
        reason = str(error) or "no reason given"
        limit = limits.memory_limit()
        largest = _largest_tensor(self._interpreter) if limit else 0
        if isinstance(error, MemoryError) or (limit and largest > limit):
            sizes = f"its largest tensor has {largest} bytes, and this process may take {limit}"
            return Rejected("out_of_memory", f"{what}: {reason}; {sizes}")
        return Rejected(code, f"{what}: {reason}")


def load(data: bytes, threads: int = 1) -> Model:
    """Load verified model bytes; see `Model`."""
    return Model(data, threads)


def name() -> str:
    """The runtime's distribution name."""
    return NAME


def version() -> str:
    """The runtime's version."""
    return VERSION


def _tensor(detail: dict[str, Any]) -> Tensor:
    return Tensor(
        name=str(detail["name"]),
        shape=tuple(int(size) for size in detail["shape"]),
        dtype=np.dtype(detail["dtype"]).name,
    )


def _largest_tensor(interpreter: Any) -> int:
    """Bytes of the largest tensor, as far as there is an interpreter that can tell."""
    try:
        details = interpreter.get_tensor_details() if interpreter is not None else []
    except ValueError:  # e.g. a name that is no text
        return 0
    sizes = (math.prod(map(int, detail["shape"])) * np.dtype(detail["dtype"]).itemsize for detail in details)
    return max(sizes, default=0)


def _is_vector(tensors: tuple[Tensor, ...]) -> bool:
    return len(tensors) == 1 and tensors[0].dtype == "float32" and [*tensors[0].shape[:-1]] == [1]
