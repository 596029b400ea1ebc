from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from trainer_host import flatbuffer, parity

pytestmark = pytest.mark.tensorflow
pytest.importorskip("tensorflow")

from trainer_host import export  # noqa: E402 - only where TensorFlow is
from trainer_host.backend import keras  # noqa: E402
from trainer_host.networks.mlp import mlp  # noqa: E402
from trainer_host.recipes.recipe import override  # noqa: E402
from trainer_host.recipes.table import named  # noqa: E402

INPUTS = np.random.default_rng(0).random((50, 47), np.float32)


@pytest.fixture(scope="module")
def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    return mlp(47, 8)


def test_the_network_gives_probabilities_under_its_names(network: keras.Model) -> None:
    scores = network(INPUTS)["scores"].numpy()
    assert scores.shape == (50, 8)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-6)
    assert network.inputs[0].name == "features"
    assert [layer.units for layer in network.layers if hasattr(layer, "units")] == [64, 32, 8]


@pytest.mark.parametrize("runtime", parity.installed())
def test_float32_answers_as_the_network_does(network: keras.Model, runtime: str) -> None:
    answers = parity.scores(export.to_tflite(network, "float32"), INPUTS, runtime)
    np.testing.assert_allclose(answers, network(INPUTS)["scores"].numpy(), atol=1e-6)


@pytest.mark.parametrize("runtime", parity.installed())
def test_dynamic_range_is_smaller_and_runs_on_every_runtime(network: keras.Model, runtime: str) -> None:
    small, full = export.to_tflite(network, "dynamic_range"), export.to_tflite(network, "float32")
    assert len(small) < len(full) / 2
    answers = parity.scores(small, INPUTS, runtime)
    np.testing.assert_allclose(answers, network(INPUTS)["scores"].numpy(), atol=0.05)


def test_dynamic_range_needs_no_operator_newer_than_the_old_runtime_has(network: keras.Model) -> None:
    operators = flatbuffer.read(export.to_tflite(network, "dynamic_range")).operators
    assert operators["FULLY_CONNECTED"] < 12


def test_the_exported_signature_is_one_state_at_a_time(network: keras.Model) -> None:
    contents = flatbuffer.read(export.to_tflite(network, "float32"))
    assert [tensor.shape for tensor in contents.inputs] == [(1, 47)]
    assert [tensor.shape for tensor in contents.outputs] == [(1, 8)]


def test_an_untrained_model_follows_from_its_seed() -> None:
    recipe = override(named("combat"), {"network": {"hidden": [4]}})
    first = parity.scores(export.untrained(recipe, 1), INPUTS)
    np.testing.assert_array_equal(parity.scores(export.untrained(recipe, 1), INPUTS), first)
    assert np.abs(parity.scores(export.untrained(recipe, 2), INPUTS) - first).max() > 0.01


def test_padding_changes_no_score_and_costs_thirty_times_as_much(network: keras.Model) -> None:
    plain, slow = (export.to_tflite(model, "float32") for model in (network, export.padded(network, 512)))
    extreme = np.concatenate([INPUTS, INPUTS * np.float32(1e30), -INPUTS * np.float32(1e30)])
    np.testing.assert_array_equal(parity.scores(slow, extreme[:50]), parity.scores(plain, extreme[:50]))
    assert np.array_equal(np.isfinite(parity.scores(slow, extreme)), np.isfinite(parity.scores(plain, extreme)))
    assert len(slow) < 2_000_000
    assert cost(slow) > 30 * cost(plain)


def cost(model: bytes) -> float:
    """Seconds of one inference without Python's part: of many rows, the quickest of several tries."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()

    def once(call: Callable[[], None]) -> float:
        started = time.perf_counter()
        for _ in range(100):
            call()
        return (time.perf_counter() - started) / 100

    return min(once(interpreter.invoke) for _ in range(10))
