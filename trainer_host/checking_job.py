"""The child process that runs model files, to inspect or to gate them; without TensorFlow (see `trainer_host.jobs`)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protocol.errors import Rejected
from trainer_host import flatbuffer, gate, parity
from trainer_host.jobs import Exported, Gated, GateRequest, InspectionRequest, ModelFile, Say, answer_job

GOLDEN_INPUTS = 64


def described(
    path: Path, inputs: parity.Vectors, tolerance: float, parities: Sequence[parity.Parity] = ()
) -> ModelFile:
    """Describe a TFLite file.

    Args:
        path: The file.
        inputs: (rows, features) from which the golden vectors are taken.
        tolerance: Of the golden vectors.
        parities: As measured.

    Raises:
        Rejected: When it is none, or does not run here.
    """
    model = path.read_bytes()
    contents = flatbuffer.read(model)
    return ModelFile(
        path=str(path),
        digest=hashlib.sha256(model).hexdigest(),
        length=len(model),
        inputs=contents.inputs,
        outputs=contents.outputs,
        operators=contents.operators,
        parity=tuple(parities),
        golden=parity.golden(inputs, parity.scores(model, inputs), tolerance),
    )


def inspect(request: InspectionRequest) -> Exported:
    """Describe a file that was made elsewhere, from its answers to random inputs.

    Raises:
        Rejected: With code `bad_model` or `custom_operator`.
    """
    path = Path(request.model)
    shape = flatbuffer.read(path.read_bytes()).inputs[0].shape
    if len(shape) != 2:
        raise Rejected("bad_model", f"expected an input of shape (1, n), not {shape}")
    inputs = np.random.default_rng(request.seed).random((GOLDEN_INPUTS, shape[1]), np.float32)
    file = described(path, inputs, parity.LIMITS["dynamic_range"].tolerance)
    if not np.isfinite(file.golden.outputs).all():
        raise Rejected("not_finite", "the model's scores are not finite")
    return Exported(files={"delivered": file}, release="delivered")


def work(request: InspectionRequest | GateRequest, _say: Say) -> Exported | Gated:
    """Do what is asked for."""
    if isinstance(request, InspectionRequest):
        return inspect(request)
    current = Path(request.current).read_bytes() if request.current else None
    candidate = Path(request.candidate).read_bytes()
    return Gated(report=gate.examined(request.slot, candidate, current, request.settings, request.parity))


if __name__ == "__main__":
    sys.exit(answer_job(sys.argv[1:], work))
