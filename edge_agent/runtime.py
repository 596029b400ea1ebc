"""The only import of a TFLite interpreter.

`ai-edge-litert` is taken where it is installed, else `tflite-runtime`; both offer the same interface. Only processes
that run models import this module: the supervisor never does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import numpy as np
import numpy.typing as npt

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
            and one output
            `(1, m)`.
    """

    def __init__(self, data: bytes, threads: int = 1) -> None:
        try:
            self._interpreter = _Interpreter(model_content=data, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise Rejected("bad_model", f"{NAME} {VERSION} refuses the model: {error}") from error
        self.inputs = tuple(_tensor(detail) for detail in self._interpreter.get_input_details())
        self.outputs = tuple(_tensor(detail) for detail in self._interpreter.get_output_details())
        if not (_is_vector(self.inputs) and _is_vector(self.outputs)):
            raise Rejected(
                "bad_model", f"expected one float32 vector in and one out, not {self.inputs} and {self.outputs}"
            )
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]
        self._batch = np.zeros(self.inputs[0].shape, np.float32)

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
                runtime
                reports an error.
        """
        if len(features) != self.input_length:  # NumPy would spread a single one over all
            raise Rejected("wrong_length", f"{len(features)} features, the model takes {self.input_length}", "features")
        self._batch[0] = features
        try:
            self._interpreter.set_tensor(self._input, self._batch)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise Rejected("inference_failed", str(error)) from error
        scores: Vector = self._interpreter.get_tensor(self._output)[0]
        return scores

    def warm_up(self, calls: int = 20) -> None:
        """Run some inferences on zeros, so that the first real one finds caches and threads as later ones do."""
        zeros = np.zeros(self.input_length, np.float32)
        for _ in range(calls):
            self.invoke(zeros)


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


def _is_vector(tensors: tuple[Tensor, ...]) -> bool:
    return len(tensors) == 1 and tensors[0].dtype == "float32" and [*tensors[0].shape[:-1]] == [1]
