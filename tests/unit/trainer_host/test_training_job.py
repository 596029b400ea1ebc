from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import Rejected
from protocol.features import Feature, FeatureSpec
from trainer_host import dataset, parity
from trainer_host.dataset import Transitions
from trainer_host.jobs import PaddedRequest, Progress, Trained, TrainingRequest, UntrainedRequest, run_job
from trainer_host.recipes.recipe import CloningSettings, MlpSettings, Recipe

pytestmark = pytest.mark.tensorflow
pytest.importorskip("tensorflow")

RECIPE = Recipe(
    name="greatest",
    slot="combat",
    actions=("a", "b", "c"),
    features=FeatureSpec(features=tuple(Feature(path=name) for name in "abc")),
    learner=CloningSettings(learning_rate=0.02, batch=64, epochs=8),
    network=MlpSettings(hidden=(16,)),
)


def shown(count: int, bad: int = 0) -> Transitions:
    """Somebody takes the greatest of three features; the first `bad` rows are not finite."""
    features = np.random.default_rng(0).random((count, 3), np.float32)
    actions = features.argmax(axis=1)
    features[:bad, 0] = np.nan
    no = np.zeros(count, bool)
    return Transitions(
        slot=["combat"] * count,
        battle=[f"b{number // 10}" for number in range(count)],
        actor=[""] * count,
        step=np.arange(count),
        features=[row.astype("<f4").tobytes() for row in features],
        action=actions.astype(np.int64),
        taken=~no,
        propensity=np.full(count, np.nan),
        legal=[b""] * count,
        reward=np.zeros(count),
        done=no,
        truncated=no,
        model=["m"] * count,
        at=np.arange(count, dtype=np.float64) + 100.0,
    )


def train(folder: Path, transitions: Transitions, name: str = "out") -> tuple[Trained, list[Progress]]:
    dataset.save(folder / "data.npz", transitions)
    seen: list[Progress] = []
    request = TrainingRequest(recipe=RECIPE, data=str(folder / "data.npz"), output=str(folder / name), seed=1)
    return run_job(request, seen.append, deadline_s=100), seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> tuple[Trained, list[Progress]]:
    return train(folder, shown(2000, bad=7))


def test_it_reports_what_it_did(outcome: tuple[Trained, list[Progress]]) -> None:
    trained, seen = outcome
    assert [each.epoch for each in seen] == list(range(1, len(seen) + 1))
    assert trained.rejected == {"not_finite": 7}
    counts = trained.examples
    assert (counts["read"], counts["selected"]) == (2000, 1993)
    assert counts["training"] + counts["validation"] == 1993
    assert (trained.data_from, trained.data_to) == (100, 2099)
    assert trained.metrics["decision_accuracy"] > 0.85
    assert trained.metrics["val_loss"] == min(each.val_loss for each in seen)
    assert 50 < trained.metrics["peak_memory_mb"] < 4000


def test_every_format_is_there_and_was_checked(outcome: tuple[Trained, list[Progress]]) -> None:
    trained, _ = outcome
    assert list(trained.files) == ["float32", "dynamic_range"]
    assert trained.refused == {}
    for file in trained.files.values():
        data = Path(file.path).read_bytes()
        assert file.digest == hashlib.sha256(data).hexdigest()
        assert [each.runtime for each in file.parity] == parity.installed()
        answers = parity.scores(data, np.array(file.golden.inputs, np.float32))
        np.testing.assert_allclose(answers, file.golden.outputs, atol=file.golden.tolerance)
    assert trained.released == trained.files["float32"]


def test_the_same_request_gives_the_same_model(folder: Path, outcome: tuple[Trained, list[Progress]]) -> None:
    again, _ = train(folder, shown(2000, bad=7), "again")
    scores = [
        parity.scores(Path(each.released.path).read_bytes(), np.eye(3, dtype=np.float32))
        for each in (again, outcome[0])
    ]
    np.testing.assert_array_equal(scores[0], scores[1])


def test_the_padded_model_keeps_the_policy(folder: Path, outcome: tuple[Trained, list[Progress]]) -> None:
    trained, _ = outcome
    slow = run_job(PaddedRequest(network=trained.network, output=str(folder / "padded"), width=64)).released
    assert slow.digest != trained.released.digest
    inputs = np.random.default_rng(1).random((30, 3), np.float32)
    scores = [parity.scores(Path(file.path).read_bytes(), inputs) for file in (slow, trained.released)]
    np.testing.assert_array_equal(scores[0], scores[1])


def test_an_untrained_model_is_exported(folder: Path) -> None:
    exported = run_job(UntrainedRequest(recipe=RECIPE, output=str(folder / "untrained")))
    assert list(exported.files) == ["float32"]
    assert len(exported.released.golden.inputs) == 8


def test_too_little_data_is_a_refusal(folder: Path) -> None:
    with pytest.raises(Rejected) as refused:
        train(folder, shown(3), "few")
    assert refused.value.code == "too_few_battles"
