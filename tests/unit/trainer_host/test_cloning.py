from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer_host.dataset import Examples, Split
from trainer_host.recipes.recipe import CloningSettings

pytestmark = pytest.mark.tensorflow
pytest.importorskip("tensorflow")

from trainer_host.backend import keras  # noqa: E402 - only where TensorFlow is
from trainer_host.learners.cloning import Epoch, clone  # noqa: E402
from trainer_host.networks.mlp import mlp  # noqa: E402


def examples(count: int, seed: int, *, random: bool = False) -> Examples:
    """Whoever chose took the greatest of four features; or, at random, whatever."""
    rng = np.random.default_rng(seed)
    features = rng.random((count, 4), np.float32)
    actions = rng.integers(4, size=count) if random else features.argmax(axis=1)
    flags = np.ones(count, bool)
    numbers = np.zeros(count, np.int64)
    return Examples(features, actions.astype(np.int64), np.ones((count, 4), bool), numbers, ["b"], flags, flags)


def train(
    board: Path, data: Split, seed: int = 1, settings: CloningSettings | None = None
) -> tuple[keras.Model, list[Epoch], list[Epoch]]:
    keras.utils.set_random_seed(seed)
    model = mlp(4, 4, (16,))
    seen: list[Epoch] = []
    settings = settings or CloningSettings(learning_rate=0.02, batch=64, epochs=30)
    history = clone(model, data, settings, seed=seed, board=board, on_epoch=seen.append)
    return model, history, seen


def val_loss(model: keras.Model, data: Examples) -> float:
    scores = model(data.features)["scores"].numpy()
    return float(-np.log(scores[np.arange(len(data.actions)), data.actions]).mean())


def test_it_learns_what_was_shown(tmp_path: Path) -> None:
    model, history, seen = train(tmp_path, Split(examples(2000, 0), examples(500, 1)))
    fresh = examples(1000, 2)
    assert (model(fresh.features)["scores"].numpy().argmax(axis=1) == fresh.actions).mean() > 0.9
    assert history[0].val_loss > history[-1].val_loss
    assert seen == history
    assert [epoch.epoch for epoch in history] == list(range(1, len(history) + 1))


def test_it_stops_early_with_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    data = Split(examples(200, 0, random=True), examples(200, 1, random=True))
    settings = CloningSettings(learning_rate=0.05, batch=32, epochs=200, patience=4)
    model, history, _ = train(tmp_path, data, settings=settings)
    losses = [epoch.val_loss for epoch in history]
    assert len(history) == int(np.argmin(losses)) + 1 + 4 < 200
    assert val_loss(model, data.validation) == pytest.approx(min(losses), abs=1e-5)
    assert val_loss(model, data.validation) < losses[-1]


def test_the_reported_figures_are_the_networks(tmp_path: Path) -> None:
    data = Split(examples(100, 0), examples(100, 1))
    settings = CloningSettings(epochs=1, batch=1000)
    model, (epoch,), _ = train(tmp_path, data, settings=settings)
    scores = model(data.validation.features)["scores"].numpy()
    assert epoch.val_loss == pytest.approx(val_loss(model, data.validation), abs=1e-5)
    assert epoch.val_accuracy == pytest.approx((scores.argmax(axis=1) == data.validation.actions).mean())


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    data = Split(examples(300, 0), examples(100, 1))
    settings = CloningSettings(epochs=3, batch=32)
    first, again, other = (train(tmp_path, data, seed, settings)[0].get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_xla_is_a_setting_that_changes_no_result(tmp_path: Path) -> None:
    data = Split(examples(300, 0), examples(100, 1))
    plain, xla = (
        train(tmp_path, data, settings=CloningSettings(epochs=2, batch=32, xla=xla))[1][-1] for xla in (False, True)
    )
    assert xla.val_loss == pytest.approx(plain.val_loss, abs=1e-4)


def test_tensorboard_gets_every_epoch(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, history, _ = train(
        tmp_path, Split(examples(100, 0), examples(100, 1)), settings=CloningSettings(epochs=3, batch=32)
    )
    board = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "seconds"):
        assert [event.step for event in board.Tensors(name)] == [1, 2, 3], name
    assert len(history) == 3
