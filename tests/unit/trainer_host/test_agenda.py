from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest

from protocol.errors import Misconfigured, Rejected, Unavailable
from trainer_host.__main__ import app
from trainer_host.agenda import Agenda, is_due
from trainer_host.publisher import Outcome
from trainer_host.settings import AutoPublishSettings, load
from trainer_host.store import SlotTotal
from trainer_host.wiring import assemble

SETTINGS = AutoPublishSettings(min_new_transitions=10, min_seconds=60.0)


@pytest.mark.parametrize(
    ("new", "idle_s", "due"),
    [(9, None, False), (10, None, True), (10, 59.9, False), (10, 60.0, True), (9, 1e9, False)],
)
def test_when_training_is_due(new: int, idle_s: float | None, due: bool) -> None:
    assert is_due(SETTINGS, SlotTotal("combat", 1000, new), idle_s) is due


def test_training_is_never_due_when_it_is_off() -> None:
    off = msgspec.structs.replace(SETTINGS, enabled=False)
    assert not is_due(off, SlotTotal("combat", 1000, 1000), None)


class Bed:
    """An agenda on real parts, but for what the publisher and the trainer make of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = folder / "host.toml"
        config.write_text('state_dir = "host"\n[inbox]\nsettle_seconds = 0.1\n')
        assert app(["keys", "init", "--config", str(config)], result_action="return_value") == 0
        stop = Event()
        self.parts = assemble(load(config), stop)
        self.inbox = folder / "host" / "inbox"
        self.work: list[str] = []
        self.results: list[Outcome | Exception] = []
        self.total = 0
        monkeypatch.setattr(self.parts.publisher, "deliver", lambda path, _: self._worked(path.name))
        monkeypatch.setattr(self.parts.trainer, "train", lambda recipe, **_: self._worked(recipe.name))
        monkeypatch.setattr(self.parts.store, "total", lambda slot: SlotTotal(slot, self.total, self.total))
        self.agenda = Agenda(self.parts, stop)

    def _worked(self, what: str) -> Outcome:
        self.work.append(what)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def drop(self, name: str) -> None:
        (self.inbox / f"{name}.tflite").write_bytes(b"model")
        (self.inbox / f"{name}.toml").write_text('slot = "combat"\n')

    def do(self, now: float) -> str:
        """Begin what is due at `now` and wait for its end; what it was."""
        for waker in self.agenda.wakers()[1:]:
            self.agenda.woken(waker, now)
        self.agenda.tick(now)
        doing = self.agenda.doing
        if doing:
            workbench = self.agenda.wakers()[0]
            assert select.select([workbench], [], [], 20.0)[0]
            self.agenda.woken(workbench, now)
        return doing


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    made = Bed(tmp_path, monkeypatch)
    assert made.do(0.0) == "signing the timestamp"
    yield made
    made.agenda.close()
    made.parts.database.close()


def outcome(version: int | None) -> Outcome:
    return Outcome(slot="combat", digest="d", version=version, reasons=("because",))


def test_files_come_before_training(bed: Bed) -> None:
    assert bed.do(1.0) == ""
    bed.drop("m")
    assert bed.do(2.0) == ""  # it is still settling
    bed.total = 10**6
    bed.results = [outcome(0), outcome(1)]
    assert [bed.do(now) for now in (10.0, 11.0, 12.0)] == ["examining m", "training combat", ""]


def test_released_and_refused_files_are_put_away(bed: Bed) -> None:
    results: dict[str, Outcome | Exception] = {
        "a": outcome(0),
        "b": outcome(None),
        "c": Rejected("bad_model", "no TFLite"),
    }
    for now, name in ((10.0, "a"), (20.0, "b"), (30.0, "c")):
        bed.drop(name)
        bed.results = [results[name]]
        assert bed.do(now) == ""  # it is still settling
        assert bed.do(now + 5.0) == f"examining {name}"
    assert (bed.inbox / "done" / "a.tflite").exists()
    assert "because" in (bed.inbox / "refused" / "b.reason.txt").read_text()
    assert "no TFLite" in (bed.inbox / "refused" / "c.reason.txt").read_text()
    assert bed.work == ["a.tflite", "b.tflite", "c.tflite"]


@pytest.mark.parametrize("error", [Unavailable("disk full"), Misconfigured("no key")])
def test_a_file_is_not_blamed_for_the_world(bed: Bed, error: Exception) -> None:
    bed.drop("m")
    bed.results = [error, error, outcome(0)]
    bed.do(10.0)
    assert bed.do(20.0) == "examining m"
    assert (bed.inbox / "m.tflite").exists()
    assert bed.do(79.0) == ""
    assert bed.do(80.0) == "examining m"
    assert bed.do(199.0) == ""  # each time it rests for twice as long
    assert bed.do(200.0) == "examining m"
    assert (bed.inbox / "done" / "m.tflite").exists()


def test_a_file_rests_for_an_hour_at_most(bed: Bed) -> None:
    bed.drop("m")
    bed.results = [Unavailable("disk full")] * 9
    bed.do(0.0)
    now = 20.0
    for rest in (60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0):
        assert bed.do(now) == "examining m"
        assert bed.do(now + rest - 1.0) == ""
        now += rest
    assert bed.do(now) == "examining m"


def test_a_file_that_cannot_be_put_away_is_tried_again(bed: Bed) -> None:
    (bed.inbox / "done").rmdir()
    bed.drop("m")
    bed.results = [outcome(0), outcome(0)]
    bed.do(10.0)
    assert bed.do(20.0) == "examining m"
    (bed.inbox / "done").mkdir()
    assert bed.do(21.0) == ""
    assert bed.do(80.0) == "examining m"
    assert (bed.inbox / "done" / "m.tflite").exists()


def test_training_rests_between_two_runs(bed: Bed) -> None:
    bed.total = bed.parts.settings.auto_publish.min_new_transitions
    rest = bed.parts.settings.auto_publish.min_seconds
    bed.results = [outcome(None), Rejected("too_few_battles", "few")]
    assert bed.do(10.0) == "training combat"
    assert bed.do(9.0 + rest) == ""
    assert bed.do(10.0 + rest) == "training combat"
    assert bed.work == ["combat", "combat"]


def test_signatures_are_renewed_and_a_failure_is_tried_again(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    renewal = bed.parts.settings.lifetimes.timestamp_days * 86_400 / 8
    assert bed.do(renewal - 1.0) == ""
    before = bed.parts.repository.metadata_set()
    assert bed.do(renewal) == "signing the timestamp"
    assert bed.parts.repository.metadata_set() != before

    def fail(_: Any) -> None:
        raise Unavailable("locked")

    monkeypatch.setattr(bed.parts.repository, "refresh", fail)
    assert bed.do(2 * renewal) == "signing the timestamp"
    assert bed.do(2 * renewal + 59.0) == ""
    assert bed.do(2 * renewal + 60.0) == "signing the timestamp"


def test_a_bug_comes_out(bed: Bed) -> None:
    bed.drop("m")
    bed.results = [ZeroDivisionError("a bug")]
    bed.do(10.0)
    with pytest.raises(ZeroDivisionError):
        bed.do(20.0)


def test_without_the_targets_key_nothing_is_released(bed: Bed, tmp_path: Path) -> None:
    (tmp_path / "host" / "keys" / "targets.pem").unlink()
    parts = assemble(bed.parts.settings)
    assert not parts.can_release
    agenda = Agenda(parts, Event())
    agenda.tick(0.0)
    assert select.select([agenda.wakers()[0]], [], [], 20.0)[0]
    agenda.woken(agenda.wakers()[0], 0.0)
    bed.total = 10**6
    agenda.tick(1.0)
    assert agenda.doing == ""
    assert len(agenda.wakers()) == 1
    agenda.close()
    parts.database.close()
