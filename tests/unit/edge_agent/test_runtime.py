from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from edge_agent import runtime
from protocol.errors import Misconfigured, Rejected

MODELS = Path(__file__).parents[2] / "models"
ECHO = (MODELS / "echo.tflite").read_bytes()


def test_a_model_says_what_it_takes_and_gives() -> None:
    model = runtime.load(ECHO)
    assert (model.input_length, model.output_length) == (6, 4)
    assert (model.inputs[0].shape, model.inputs[0].dtype) == ((1, 6), "float32")
    assert (model.outputs[0].shape, model.outputs[0].dtype) == ((1, 4), "float32")


@pytest.mark.parametrize("threads", [1, 2])
def test_each_inference_has_scores_of_its_own(threads: int) -> None:
    model = runtime.load(ECHO, threads)
    model.warm_up(2)
    first = model.invoke(np.array([1, 2, 3, 4, 5, 6], np.float32))
    second = model.invoke(np.array([6, 5, 4, 3, 2, 1], np.float32))
    assert first.tolist() == [1, 2, 3, 4]
    assert second.tolist() == [6, 5, 4, 3]
    assert second.dtype == np.float32


@pytest.mark.parametrize("length", [0, 1, 5, 7])
def test_features_of_another_length_are_refused_and_never_spread(length: int) -> None:
    with pytest.raises(Rejected) as caught:
        runtime.load(ECHO).invoke(np.ones(length, np.float32))
    assert caught.value.code == "wrong_length"


@pytest.mark.parametrize("data", [b"", b"no model at all"])  # tflite-runtime crashes on a truncated one
def test_what_the_runtime_refuses_is_a_bad_model(data: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        runtime.load(data)
    assert caught.value.code == "bad_model"


def test_an_error_of_the_runtime_is_a_failed_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime.load(ECHO)

    class Failing:
        def set_tensor(self, _index: int, _value: object) -> None:
            raise RuntimeError("node 3 failed")

    monkeypatch.setattr(model, "_interpreter", Failing())
    with pytest.raises(Rejected, match="node 3 failed") as caught:
        model.invoke(np.zeros(6, np.float32))
    assert caught.value.code == "inference_failed"


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 4), np.float32), ((1, 4), np.int8), ((4,), np.float32), ((1, 2, 2), np.float32)]
)
def test_a_model_without_one_float_vector_in_and_one_out_is_bad(
    shape: tuple[int, ...], dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd:
        def __init__(self, **_options: object) -> None: ...

        def allocate_tensors(self) -> None: ...

        def get_input_details(self) -> list[dict[str, object]]:
            return [{"name": "in", "shape": np.array(shape), "dtype": dtype, "index": 0}]

        get_output_details = get_input_details

    monkeypatch.setattr(runtime, "_Interpreter", Odd)
    with pytest.raises(Rejected, match="one float32 vector"):
        runtime.load(b"")


def test_the_runtime_that_is_installed_is_named_with_its_version() -> None:
    assert runtime.name() in {"ai-edge-litert", "tflite-runtime"}
    assert runtime.version() == importlib.metadata.version(runtime.name())


def test_without_any_runtime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_RUNTIMES", (("some-runtime", "no_such_module_anywhere"),))
    with pytest.raises(Misconfigured, match="install some-runtime"):
        runtime._find()
