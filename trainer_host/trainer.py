"""From the store to a trained candidate to a release."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import numpy as np

from protocol.errors import EdgeswapError, Rejected, Unavailable
from protocol.release import Lineage
from trainer_host import dataset
from trainer_host.dataset import Transitions
from trainer_host.jobs import Progress, Trained, TrainingRequest, run_job
from trainer_host.progress import Report
from trainer_host.publisher import TRAINED, Candidate, Jobs, Outcome, Publisher
from trainer_host.recipes.recipe import Recipe
from trainer_host.settings import TrainingSettings
from trainer_host.store import Store

log = logging.getLogger(__name__)

_INTEGERS, _BOOLEANS, _FLOATS = ("step", "action"), ("taken", "done", "truncated"), ("propensity", "reward", "at")


class Trainer:
    """Trains recipes on what the store holds.

    Args:
        store: Where transitions come from.
        publisher: Where candidates go.
        jobs: Where jobs have their folders.
        settings: How jobs run.
        report: Told what happens.
        stop: Set by another thread to end a running job early.
    """

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        jobs: Jobs,
        settings: TrainingSettings,
        *,
        report: Report,
        stop: Event | None = None,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._jobs = jobs
        self._settings = settings
        self._report = report
        self._stop = stop

    def train(
        self, recipe: Recipe, *, notes: str = "", on_progress: Callable[[Progress], None] | None = None
    ) -> Outcome:
        """Train a recipe on its slot's newest transitions, and publish what comes out.

        However it ends, the slot counts as trained with what it has, unless the job was stopped: a training that fails
        would fail again on the same transitions.

        Args:
            recipe: What to train.
            notes: For people.
            on_progress: Called for each epoch.

        Raises:
            Rejected: Too few transitions, or the job failed.
            Unavailable: The job was stopped or killed.
            Misconfigured: A key or a folder is missing.
        """
        total = self._store.total(recipe.slot)
        self._report("training", slot=recipe.slot, recipe=recipe.name, transitions=total.transitions, new=total.new)
        log.info("training %s for %s: %d transitions are new", recipe.name, recipe.slot, total.new)
        try:
            with self._jobs.begin(f"training-{recipe.slot}") as folder:
                outcome = self._publisher.publish(self._candidate(recipe, notes, folder, on_progress))
        except EdgeswapError as error:
            self._report("failed", slot=recipe.slot, recipe=recipe.name, reason=str(error))
            if self._stop is None or not self._stop.is_set():
                self._store.trained(recipe.slot, total.transitions)
            raise
        self._store.trained(recipe.slot, total.transitions)
        return outcome

    def _candidate(
        self, recipe: Recipe, notes: str, folder: Path, on_progress: Callable[[Progress], None] | None
    ) -> Candidate:
        count = extract(self._store, recipe.slot, self._settings.max_transitions, folder / "transitions.npz")
        request = TrainingRequest(
            recipe=recipe,
            data=str(folder / "transitions.npz"),
            output=str(folder),
            seed=self._settings.seed,
            threads=self._settings.threads,
        )

        def progressed(progress: Progress) -> None:
            self._report("epoch", slot=recipe.slot, recipe=recipe.name, **msgspec.structs.asdict(progress))
            if on_progress:
                on_progress(progress)

        trained = run_job(request, progressed, deadline_s=self._settings.deadline_seconds, stop=self._stop)
        file = trained.released
        self._report(
            "trained",
            slot=recipe.slot,
            recipe=recipe.name,
            model=file.digest,
            bytes=file.length,
            metrics=trained.metrics,
            examples=trained.examples,
            rejected=trained.rejected,
            parity=msgspec.to_builtins(file.parity),
            network=trained.network,
            files={name: made.path for name, made in trained.files.items()},
        )
        parent = self._publisher.current(recipe.slot)
        return Candidate(
            slot=recipe.slot,
            file=file,
            actions=recipe.actions,
            features=recipe.features,
            origin=TRAINED,
            notes=notes,
            lineage=_lineage(recipe, trained, count, self._settings.seed, parent.digest if parent else ""),
        )


def extract(store: Store, slot: str, limit: int, path: Path) -> int:
    """Write a slot's newest transitions to a file for training. Returns how many.

    Raises:
        Rejected: With code `no_transitions`.
        Unavailable: The database or the disk failed.
    """
    rows = store.training_rows(slot, limit)
    if not rows:
        raise Rejected("no_transitions", f"there are no transitions for slot {slot} yet")
    columns: dict[str, Any] = dict(zip(Transitions._fields, zip(*rows, strict=True), strict=True))
    for names, kind in ((_INTEGERS, np.int64), (_BOOLEANS, np.bool_), (_FLOATS, np.float64)):
        for name in names:
            columns[name] = np.array(columns[name], kind)  # None, an unknown propensity, becomes NaN
    try:
        dataset.save(path, Transitions(**columns))
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}") from error
    return len(rows)


def _lineage(recipe: Recipe, trained: Trained, transitions: int, seed: int, parent: str) -> Lineage:
    settings: dict[str, Any] = msgspec.to_builtins(recipe)
    for told_by_the_release in ("name", "slot", "actions", "features"):
        del settings[told_by_the_release]
    return Lineage(
        recipe=recipe.name,
        transitions=transitions,
        data_from=trained.data_from,
        data_to=trained.data_to,
        seed=seed,
        parent=parent,
        settings=settings,
        metrics=trained.metrics,
    )
