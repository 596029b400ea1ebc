from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from protocol.errors import Rejected
from trainer_host import parity
from trainer_host.parity import Limits, Parity

MODELS = Path(__file__).parents[2] / "models"
LIMITS = Limits(max_difference=0.1, min_agreement=0.9, tolerance=0.0)
INPUTS = np.random.default_rng(0).random((20, 6), np.float32)


def model(name: str) -> bytes:
    return (MODELS / f"{name}.tflite").read_bytes()


def test_comparison() -> None:
    expected = np.array([[0.9, 0.1], [0.4, 0.6]], np.float32)
    got = np.array([[0.8, 0.2], [0.7, 0.3]], np.float32)
    found = parity.compare(expected, got, "r")
    assert (found.runtime, found.rows, found.argmax_agreement) == ("r", 2, 0.5)
    assert found.max_difference == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("difference", "agreement", "count"),
    [(0.1, 0.9, 0), (0.11, 0.9, 1), (0.1, 0.89, 1), (1.0, 0.0, 2), (float("nan"), 1.0, 1)],
)
def test_shortcomings(difference: float, agreement: float, count: int) -> None:
    found = Parity(runtime="r", rows=1, max_difference=difference, argmax_agreement=agreement)
    assert len(parity.shortcomings(found, LIMITS)) == count


@pytest.mark.parametrize("runtime", parity.installed())
def test_every_installed_runtime_answers(runtime: str) -> None:
    answers = parity.scores(model("echo"), INPUTS, runtime)
    np.testing.assert_allclose(answers, INPUTS[:, :4], atol=1e-6)


def test_parity_is_measured_on_every_installed_runtime() -> None:
    found = parity.measured(model("echo"), INPUTS, INPUTS[:, :4], LIMITS)
    assert [each.runtime for each in found] == parity.installed()
    assert all(each.rows == 20 and each.argmax_agreement == 1 for each in found)


@pytest.mark.parametrize(("name", "expected"), [("echo", INPUTS[:, 3::-1]), ("nan", INPUTS[:, :4])])
def test_a_model_that_answers_otherwise_is_refused(name: str, expected: parity.Vectors) -> None:
    with pytest.raises(Rejected) as refused:
        parity.measured(model(name), INPUTS, expected, LIMITS)
    assert refused.value.code == "parity_failed"


@pytest.mark.parametrize("runtime", parity.installed())
def test_a_file_that_is_no_model_is_refused(runtime: str) -> None:
    with pytest.raises(Rejected) as refused:
        parity.scores(b"nonsense" * 10, INPUTS, runtime)
    assert refused.value.code == "bad_model"


def test_inputs_of_another_length_are_refused() -> None:
    with pytest.raises(Rejected, match="takes 3 features, not 6"):
        parity.scores(model("narrow"), INPUTS)


def test_golden_vectors_show_every_action_and_the_breadth_of_the_data() -> None:
    scores = np.eye(4, dtype=np.float32)[[0] * 17 + [2, 1, 0]]
    golden = parity.golden(INPUTS, scores, 0.5, count=5)
    assert len(golden.inputs) == 5
    assert {int(np.argmax(row)) for row in golden.outputs} == {0, 1, 2}
    assert golden.inputs[0] == tuple(INPUTS[0].tolist())
    assert golden.tolerance == 0.5


def test_golden_vectors_of_less_than_there_is_room_for_are_not_repeated() -> None:
    golden = parity.golden(INPUTS[:2], INPUTS[:2, :4], 0.5)
    assert len(golden.inputs) == len(set(golden.inputs)) == 2
