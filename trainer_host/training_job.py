"""The child process that trains and converts (see `trainer_host.jobs`)."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from protocol.errors import Rejected
from trainer_host import dataset, export, parity
from trainer_host.backend import configure, keras
from trainer_host.checking_job import GOLDEN_INPUTS, described
from trainer_host.dataset import Examples
from trainer_host.jobs import (
    Exported,
    ModelFile,
    PaddedRequest,
    Progress,
    Say,
    Trained,
    TrainingRequest,
    UntrainedRequest,
    answer_job,
)
from trainer_host.learners.cloning import Epoch, clone
from trainer_host.parity import Vectors
from trainer_host.recipes.recipe import Format

NETWORK = "network.keras"
PARITY_ROWS = 2000
NICENESS = 10


def train(request: TrainingRequest, say: Say) -> Trained:
    """Clean, train, export and check.

    Raises:
        Rejected: When the data is not enough, or an exported file does not answer as the network does.
    """
    recipe, output = request.recipe, Path(request.output)
    started = time.monotonic()
    configure(threads=request.threads, seed=request.seed)
    transitions = dataset.load(Path(request.data))
    cleaned = dataset.clean(transitions, slot=recipe.slot, features=recipe.features.length, actions=len(recipe.actions))
    examples = dataset.selected(cleaned.examples, taken=recipe.data.taken, won=recipe.data.won)
    data = dataset.split(examples, validation_share=recipe.data.validation_share, seed=request.seed)
    model = export.network(recipe)
    history = clone(
        model,
        data,
        recipe.learner,
        seed=request.seed,
        board=output / "tensorboard",
        on_epoch=lambda epoch: say(Progress(**epoch._asdict())),
    )
    trained = time.monotonic()
    model.save(output / NETWORK)
    inputs = data.validation.features[:PARITY_ROWS]
    exported = _exported(model, recipe.formats, recipe.release, inputs, output)
    took = {"training_s": trained - started, "export_s": time.monotonic() - trained}
    return Trained(
        files=exported.files,
        release=exported.release,
        refused=exported.refused,
        network=str(output / NETWORK),
        metrics={
            **_best(history),
            **_decisions(model, data.validation),
            **took,
            **_memory(),
        },
        examples={
            "read": len(transitions.action),
            "selected": len(examples.actions),
            "training": len(data.train.actions),
            "validation": len(data.validation.actions),
        },
        rejected=cleaned.rejected,
        data_from=float(np.min(transitions.at)),
        data_to=float(np.max(transitions.at)),
    )


def make_untrained(request: UntrainedRequest) -> Exported:
    """Export a network with fresh weights, as float32."""
    configure(threads=1, seed=request.seed)
    model = export.network(request.recipe)
    return _exported_plain(model, request.seed, Path(request.output))


def make_padded(request: PaddedRequest) -> Exported:
    """Export the same policy, made slower, as float32."""
    configure(threads=1, seed=request.seed)
    network = keras.models.load_model(request.network, compile=False)
    model = export.padded(network, request.width)
    return _exported_plain(model, request.seed, Path(request.output))


def _exported_plain(model: keras.Model, seed: int, output: Path) -> Exported:
    inputs = np.random.default_rng(seed).random((GOLDEN_INPUTS, model.inputs[0].shape[1]), np.float32)
    return _exported(model, ("float32",), "float32", inputs, output)


def work(request: TrainingRequest | UntrainedRequest | PaddedRequest, say: Say) -> Exported:
    """Do what is asked for, at a low priority: the host has messages to answer meanwhile."""
    os.nice(NICENESS)
    if isinstance(request, TrainingRequest):
        return train(request, say)
    return make_untrained(request) if isinstance(request, UntrainedRequest) else make_padded(request)


def _exported(
    model: keras.Model, formats: tuple[Format, ...], release: Format, inputs: Vectors, output: Path
) -> Exported:
    """Convert to each format, and check each against the network. Only a failure of the one to release is fatal."""
    expected = model(inputs)["scores"].numpy()
    files: dict[str, ModelFile] = {}
    refused: dict[str, str] = {}
    for format_ in formats:
        try:
            files[format_] = _file(model, format_, inputs, expected, output)
        except Rejected as error:
            if format_ == release:
                raise
            refused[format_] = error.text
    return Exported(files=files, release=release, refused=refused)


def _file(model: keras.Model, format_: Format, inputs: Vectors, expected: Vectors, output: Path) -> ModelFile:
    data, limits = export.to_tflite(model, format_), parity.LIMITS[format_]
    path = output / f"{format_}.tflite"
    path.write_bytes(data)
    return described(path, inputs, limits.tolerance, parity.measured(data, inputs, expected, limits))


def _best(history: list[Epoch]) -> dict[str, float]:
    best = min(history, key=lambda epoch: epoch.val_loss)
    figures = {name: float(getattr(best, name)) for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
    return {**figures, "best_epoch": best.epoch, "epochs": len(history)}


def _decisions(model: keras.Model, examples: Examples) -> dict[str, float]:
    """The share of examples on which the best *legal* action is the one that was played."""
    scores = model(examples.features)["scores"].numpy()
    decided = np.where(examples.legal, scores, -np.inf).argmax(axis=1)
    return {"decision_accuracy": float((decided == examples.actions).mean())}


def _memory() -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_mb": peak * unit / 1e6}


if __name__ == "__main__":
    sys.exit(answer_job(sys.argv[1:], work))
