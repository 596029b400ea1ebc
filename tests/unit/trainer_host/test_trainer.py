from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
import pytest

from protocol.errors import Rejected, Unavailable
from protocol.messages import Transition, TransitionBatch
from protocol.release import Golden, Release
from trainer_host import dataset
from trainer_host import trainer as module
from trainer_host.database import Database
from trainer_host.jobs import ModelFile, Progress, Trained, TrainingRequest
from trainer_host.publisher import Candidate, Jobs, Outcome, Publisher
from trainer_host.recipes import table
from trainer_host.settings import TrainingSettings
from trainer_host.store import SlotTotal, Store
from trainer_host.trainer import Trainer, extract

EPOCH = Progress(epoch=1, epochs=3, loss=1.0, accuracy=0.5, val_loss=1.0, val_accuracy=0.5, seconds=0.1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    database = Database(f"sqlite:///{tmp_path / 'host.db'}")
    made = Store(database)
    transitions = [
        Transition(
            seq=seq, slot="combat", battle="b", actor="a", step=seq, features=struct.pack("<2f", seq, 2), action=1,
            taken=bool(seq % 2), propensity=None if seq % 2 else 0.5, legal=b"\1\0", reward=0.25, next_features=b"",
            done=seq == 3, truncated=False, model="m", version=3, at=10.0 + seq,
        )
        for seq in (1, 2, 3)
    ]  # fmt: skip
    made.add_batch("pi", TransitionBatch(epoch="e", acked=0, first=1, last=3, transitions=transitions))
    yield made
    database.close()


class Bed:
    """A trainer whose job and publisher are replaced by what the test wants of them."""

    def __init__(self, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.stop = store, Event()
        self.kinds: list[str] = []
        self.requests: list[TrainingRequest] = []
        self.candidates: list[Candidate] = []
        self.error: Exception | None = None
        self.parent: Release | None = None
        monkeypatch.setattr(module, "run_job", self._job)
        self.trainer = Trainer(
            store,
            cast("Publisher", cast("Any", self)),
            Jobs(folder / "jobs", 5),
            TrainingSettings(seed=4, max_transitions=100),
            report=lambda kind, **_: self.kinds.append(kind),
            stop=self.stop,
        )

    def _job(
        self, request: TrainingRequest, on_progress: Callable[[Progress], None], *, deadline_s: float, stop: Event
    ) -> Trained:
        assert (deadline_s, stop) == (3600.0, self.stop)
        self.requests.append(request)
        on_progress(EPOCH)
        if self.error:
            raise self.error
        file = ModelFile(
            path="f", digest="d", length=1, inputs=(), outputs=(), operators={}, parity=(),
            golden=Golden(inputs=(), outputs=(), tolerance=0.1),
        )  # fmt: skip
        return Trained(
            files={"float32": file}, release="float32", network="n", metrics={"loss": 0.5}, examples={}, rejected={},
            data_from=11.0, data_to=13.0,
        )  # fmt: skip

    def current(self, _: str) -> Release | None:
        return self.parent

    def publish(self, candidate: Candidate) -> Outcome:
        self.candidates.append(candidate)
        return Outcome(slot=candidate.slot, digest="d", version=1, reasons=())


@pytest.fixture
def bed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bed:
    return Bed(store, tmp_path, monkeypatch)


def test_the_file_for_training_holds_what_is_stored(store: Store, tmp_path: Path) -> None:
    assert extract(store, "combat", 100, tmp_path / "t.npz") == 3
    found = dataset.load(tmp_path / "t.npz")
    order = np.argsort(found.step)
    assert found.step[order].tolist() == [1, 2, 3]
    assert found.taken[order].tolist() == [True, False, True]
    assert np.isnan(found.propensity[order]).tolist() == [True, False, True]
    assert found.reward.tolist() == [0.25] * 3
    assert found.done[order].tolist() == [False, False, True]
    assert set(found.battle) == {"pi/b"}
    assert [np.frombuffer(found.features[row], "<f4").tolist() for row in order] == [[1, 2], [2, 2], [3, 2]]


def test_there_must_be_transitions_and_a_disk(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="no transitions for slot movement"):
        extract(store, "movement", 100, tmp_path / "t.npz")
    with pytest.raises(Unavailable, match="cannot write"):
        extract(store, "combat", 100, tmp_path / "none" / "t.npz")


def test_a_candidate_knows_where_it_comes_from(bed: Bed) -> None:
    epochs: list[Progress] = []
    recipe = table.named("combat")
    assert bed.trainer.train(recipe, notes="why", on_progress=epochs.append).released
    (candidate,), (request,) = bed.candidates, bed.requests
    assert epochs == [EPOCH]
    assert (request.seed, request.recipe) == (4, recipe)
    assert (candidate.slot, candidate.notes, candidate.origin) == ("combat", "why", "trained")
    assert (candidate.actions, candidate.features) == (recipe.actions, recipe.features)
    lineage = candidate.lineage
    assert (lineage.recipe, lineage.transitions, lineage.seed, lineage.parent) == ("combat", 3, 4, "")
    assert (lineage.data_from, lineage.data_to, lineage.metrics) == (11.0, 13.0, {"loss": 0.5})
    assert lineage.settings["learner"]["epochs"] == recipe.learner.epochs
    assert "features" not in lineage.settings
    assert bed.kinds == ["training", "epoch", "trained"]
    assert bed.store.total("combat") == SlotTotal("combat", 3, 0)


def test_a_failure_counts_as_trained(bed: Bed) -> None:
    bed.error = Rejected("too_few_battles", "few")
    with pytest.raises(Rejected):
        bed.trainer.train(table.named("combat"))
    assert bed.kinds == ["training", "epoch", "failed"]
    assert bed.store.total("combat").new == 0


def test_a_training_that_was_stopped_is_made_up_for(bed: Bed) -> None:
    bed.error = Unavailable("stopped")
    bed.stop.set()
    with pytest.raises(Unavailable):
        bed.trainer.train(table.named("combat"))
    assert bed.store.total("combat").new == 3
