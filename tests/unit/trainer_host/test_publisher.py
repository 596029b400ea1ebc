from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.release import MAX_MODEL_BYTES
from trainer_host import keys
from trainer_host.database import Database
from trainer_host.gate import GateSettings
from trainer_host.inbox import Description
from trainer_host.progress import Report
from trainer_host.publisher import Jobs, Publisher
from trainer_host.recipes.recipe import Recipe
from trainer_host.registry import ModelState, Registry
from trainer_host.repository import Repository
from trainer_host.signing import SignaturesMissing

MODELS = Path(__file__).parents[2] / "models"
NOW = datetime(2026, 11, 1, tzinfo=UTC)
FEATURES = FeatureSpec(features=tuple(Feature(path=f"x{number}") for number in range(6)))


class Bed:
    """A publisher on a repository and a database of its own, for slots without an arena."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop = Event()
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.database = Database(f"sqlite:///{folder / 'host.db'}")
        self.registry = Registry(self.database)
        keys.init(folder / "keys", None)
        self.repository = Repository(folder / "repository", keys.load_signers(folder / "keys"))
        self.repository.create(NOW)
        self.actions = _outputs()

    def publisher(self, *, gate: GateSettings | None = None, recipes: dict[str, Recipe] | None = None) -> Publisher:
        report: Report = lambda kind, **fields: self.said.append((kind, fields))  # noqa: E731
        return Publisher(
            self.repository,
            self.registry,
            gate or GateSettings(),
            Jobs(self.folder / "jobs", 20),
            recipes or {},
            report=report,
            clock=NOW.timestamp,
            stop=self.stop,
        )

    def describe(self, **fields: Any) -> Description:
        return Description(**{"slot": "echo", "actions": self.actions, "features": FEATURES, **fields})


def _outputs() -> tuple[str, ...]:
    from trainer_host import flatbuffer  # noqa: PLC0415

    (output,) = flatbuffer.read((MODELS / "echo.tflite").read_bytes()).outputs
    return tuple(f"action{number}" for number in range(output.shape[1]))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    yield made
    made.database.close()


def test_a_delivered_file_becomes_a_release(bed: Bed) -> None:
    path = MODELS / "echo.tflite"
    outcome = bed.publisher().deliver(path, bed.describe(notes="by hand", latency_budget_ms=2.0))
    assert outcome.released
    (release,) = bed.repository.releases()
    assert release.version == outcome.version
    assert release.digest == hashlib.sha256(path.read_bytes()).hexdigest() == outcome.digest
    assert (release.slot, release.notes, release.latency_budget_ms) == ("echo", "by hand", 2.0)
    assert release.features == FEATURES
    assert release.lineage.settings == {"file": "echo"}
    assert len(release.golden.inputs) > 0
    assert bed.repository.model(release.digest) == path.read_bytes()
    (model,) = bed.registry.models()
    assert (model.state, model.version, model.origin) == (ModelState.RELEASED, release.version, "delivered")
    assert model.gate is not None
    assert [kind for kind, _ in bed.said] == ["gate", "released"]
    assert "is released" in outcome.text


def test_a_release_waits_for_a_key_that_is_elsewhere(bed: Bed) -> None:
    signers = keys.load_signers(bed.folder / "keys", ("snapshot", "timestamp"))
    bed.repository = Repository(bed.folder / "repository", signers)
    with pytest.raises(SignaturesMissing) as caught:
        bed.publisher().deliver(MODELS / "echo.tflite", bed.describe())
    assert caught.value.file.is_file()
    assert bed.repository.releases() == []
    (model,) = bed.registry.models()
    assert (model.state, model.version) == (ModelState.WAITING, None)
    assert model.gate is not None
    assert "targets-2.json" in model.reason
    assert [kind for kind, _ in bed.said] == ["gate", "waiting"]


def test_a_later_one_takes_its_meaning_from_the_current_release(bed: Bed) -> None:
    publisher = bed.publisher()
    first = publisher.deliver(MODELS / "echo.tflite", bed.describe())
    second = publisher.deliver(MODELS / "twin.tflite", Description(slot="echo"))
    assert first.version is not None
    assert second.version == first.version + 1
    assert bed.repository.releases()[-1].actions == bed.actions
    again = publisher.deliver(MODELS / "twin.tflite", Description(slot="echo"))
    assert (again.version, again.reasons) == (second.version, ("it is the current model already",))
    assert len(bed.repository.releases()) == 2


def test_a_recipe_gives_the_first_one_its_meaning(bed: Bed) -> None:
    recipe = Recipe(name="echo", slot="echo", actions=bed.actions, features=FEATURES)
    outcome = bed.publisher(recipes={"echo": recipe}).deliver(MODELS / "echo.tflite", Description(slot="echo"))
    assert outcome.released


def test_the_gate_refuses_and_says_why(bed: Bed) -> None:
    outcome = bed.publisher(gate=GateSettings(max_bytes=100)).deliver(MODELS / "echo.tflite", bed.describe())
    assert not outcome.released
    assert "more than 100" in outcome.text
    assert bed.repository.releases() == []
    (model,) = bed.registry.models()
    assert model.state is ModelState.REFUSED
    assert "more than 100" in model.reason
    assert [kind for kind, _ in bed.said] == ["gate", "refused"]


@pytest.mark.parametrize(
    ("name", "fields", "code"),
    [
        ("narrow.tflite", {}, "wrong_shape"),
        ("echo.tflite", {"actions": ("one",)}, "wrong_shape"),
        ("nan.tflite", {}, "not_finite"),
        ("make.py", {}, "bad_model"),
        ("echo.tflite", {"features": None}, "unknown_slot"),
    ],
)
def test_what_does_not_fit_is_rejected(bed: Bed, name: str, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(Rejected) as refusal:
        bed.publisher().deliver(MODELS / name, bed.describe(**fields))
    assert refusal.value.code == code
    assert bed.repository.releases() == []
    if code == "wrong_shape":
        (model,) = bed.registry.models()
        assert (model.state, model.reason) == (ModelState.REFUSED, refusal.value.text)
        assert bed.said[-1][0] == "refused"


def test_a_file_that_is_too_large_or_gone(bed: Bed, tmp_path: Path) -> None:
    large = tmp_path / "large.tflite"
    with large.open("wb") as file:
        file.truncate(MAX_MODEL_BYTES + 1)
    with pytest.raises(Rejected, match="more than"):
        bed.publisher().deliver(large, bed.describe())
    with pytest.raises(Unavailable, match="cannot copy"):
        bed.publisher().deliver(tmp_path / "gone.tflite", bed.describe())


def test_a_stop_ends_the_job(bed: Bed) -> None:
    bed.stop.set()
    with pytest.raises(Unavailable, match="stopped"):
        bed.publisher().deliver(MODELS / "echo.tflite", bed.describe())
    assert bed.registry.models() == []


@pytest.mark.parametrize("error", [Unavailable("the disk is full"), Misconfigured("no key")])
def test_what_came_to_nothing_is_closed_in_the_registry(
    bed: Bed, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(bed.repository, "release", fail)
    with pytest.raises(type(error)):
        bed.publisher().deliver(MODELS / "echo.tflite", bed.describe())
    (model,) = bed.registry.models()
    assert (model.state, model.version, model.reason) == (ModelState.FAILED, None, str(error))


def test_a_version_that_another_process_took_is_not_used(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = bed.publisher()
    first = publisher.deliver(MODELS / "echo.tflite", bed.describe())
    honest, stale = bed.repository.next_version, [first.version]
    monkeypatch.setattr(bed.repository, "next_version", lambda slot: stale.pop() if stale else honest(slot))
    second = publisher.deliver(MODELS / "twin.tflite", bed.describe())
    assert first.version is not None
    assert second.version == first.version + 1
    monkeypatch.setattr(bed.repository, "next_version", lambda _: first.version)
    with pytest.raises(Rejected, match="already has version"):
        publisher.deliver(MODELS / "slow.tflite", bed.describe())


def test_old_jobs_folders_go(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs", 2)
    made = [folder_of(jobs) for _ in range(4)]
    assert sorted((tmp_path / "jobs").iterdir()) == made[1:]
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured), Jobs(tmp_path / "file", 2).begin("gate"):
        pass


def folder_of(jobs: Jobs) -> Path:
    """The folder of a job that is over."""
    with jobs.begin("gate") as folder:
        return folder


@pytest.mark.parametrize("restored", [False, True], ids=["only-its-name", "its-stamp-too"])
def test_a_folder_made_when_the_clock_was_ahead_is_not_the_newest(tmp_path: Path, restored: bool) -> None:
    year = 365 * 86_400 * 10**9
    ahead = folder_of(Jobs(tmp_path, 2, clock=lambda: time.time_ns() + year))
    stamp = time.time_ns() + (year if restored else -year)
    os.utime(ahead, ns=(stamp, stamp))
    made = [folder_of(Jobs(tmp_path, 2)) for _ in range(3)]
    assert sorted(tmp_path.iterdir()) == made


def test_what_the_folders_stamps_say_counts_not_their_names(tmp_path: Path) -> None:
    made = [folder_of(Jobs(tmp_path, 4)) for _ in range(4)]
    for age, folder in enumerate(made):
        stamp = time.time_ns() - (age + 1) * 10**9
        os.utime(folder, ns=(stamp, stamp))
    latest = folder_of(Jobs(tmp_path, 1))
    assert sorted(tmp_path.iterdir()) == [made[0], latest]


def test_a_folder_in_use_is_not_removed(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, 1)
    with jobs.begin("training") as training:
        os.utime(training, (0, 0))
        made = [folder_of(jobs) for _ in range(3)]
        assert sorted(tmp_path.iterdir()) == [training, *made[1:]]
    folder_of(jobs)
    assert not training.exists()
