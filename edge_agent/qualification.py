"""Whether a complete, verified model may be tried at all: it loads, is what its release says, and answers as it must.

    bad_model              the runtime refuses it
    unsupported_operators  this runtime is too old for it
    wrong_signature        its tensors are not those of the release, or do not fit its features and actions
    bad_release            its golden vectors do not fit its tensors
    golden_mismatch        it does not give the reference answers, on this CPU, with this runtime
    not_finite             it answers NaN or infinity
    inference_failed       the runtime reports an error
    out_of_memory          it needs more than this process may take (`edge_agent.limits`)

A model that is refused here would be refused each time, on this device with this runtime. Some models get no answer:
they crash the runtime, or never come to an end. That ends the process, and the supervisor counts the deaths.
"""

from __future__ import annotations

import numpy as np

from edge_agent import runtime
from edge_agent.runtime import Model, Vector
from protocol.errors import Rejected
from protocol.release import Release, Tensor

# What both runtimes say of an operator that is too new for them.
_TOO_NEW = "Didn't find op for builtin opcode"


def qualify(data: bytes, release: Release) -> None:
    """Check a model against its release.

    Args:
        data: The model file's bytes, verified.
        release: What the signed metadata says about it.

    Raises:
        Rejected: With one of the codes above.
    """
    model = _loaded(data, release)
    _check_signature(model, release)
    _check_golden(model, release)


def _loaded(data: bytes, release: Release) -> Model:
    try:
        return runtime.load(data)
    except Rejected as refusal:
        if _TOO_NEW not in refusal.text:
            raise
        needed = ", ".join(f"{name} {version}" for name, version in sorted(release.operators.items()))
        raise Rejected(
            "unsupported_operators",
            f"{runtime.name()} {runtime.version()} lacks operators; the model needs {needed}: {refusal.text}",
            "operators",
        ) from refusal


def _check_signature(model: Model, release: Release) -> None:
    for field, found, expected in (
        ("inputs", model.inputs, release.inputs),
        ("outputs", model.outputs, release.outputs),
    ):
        if found != expected:
            raise Rejected("wrong_signature", f"{field} are {_described(found)}, not {_described(expected)}", field)
    if model.input_length != release.features.length:
        text = f"the model takes {model.input_length} features, its feature spec gives {release.features.length}"
        raise Rejected("wrong_signature", text, "features")
    if model.output_length != len(release.actions):
        text = f"the model gives {model.output_length} scores for {len(release.actions)} actions"
        raise Rejected("wrong_signature", text, "actions")


def _check_golden(model: Model, release: Release) -> None:
    """Replay the golden vectors; where a release has none, one inference on zeros must do."""
    golden = release.golden
    if len(golden.inputs) != len(golden.outputs):
        raise Rejected("bad_release", f"{len(golden.inputs)} golden inputs, {len(golden.outputs)} outputs", "golden")
    if not golden.inputs:
        _answer(model, np.zeros(model.input_length, np.float32), "on zeros")
    for index, (given, expected) in enumerate(zip(golden.inputs, golden.outputs, strict=True)):
        if len(given) != model.input_length or len(expected) != model.output_length:
            raise Rejected("bad_release", f"golden vector {index} does not fit the tensors", "golden")
        scores = _answer(model, np.array(given, np.float32), f"on golden vector {index}")
        difference = float(np.abs(scores - np.array(expected, np.float64)).max())
        if not difference <= golden.tolerance:
            text = f"golden vector {index} differs by {difference:.3g}, more than {golden.tolerance:.3g}"
            raise Rejected("golden_mismatch", text, "golden")


def _answer(model: Model, features: Vector, where: str) -> Vector:
    scores = model.invoke(features)
    if not np.isfinite(scores).all():
        raise Rejected("not_finite", f"the model's output {where} is not finite", "outputs")
    return scores


def _described(tensors: tuple[Tensor, ...]) -> str:
    return "; ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors) or "none"
