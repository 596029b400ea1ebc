"""The workers of a slot, with children whose other end is played by the test."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from edge_agent.channel import Channel
from edge_agent.children import (
    Beat,
    Child,
    Disconnected,
    FromWorker,
    Join,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    Records,
    ToWorker,
)
from edge_agent.handover import BEAT_LIMIT_S, LEAVE_LIMIT_S, LOAD_LIMIT_S, Handover, Phase
from protocol.errors import Unavailable
from protocol.features import FeatureSpec


def model(name: str) -> ModelFile:
    return ModelFile(digest=name * 64, version=1, folder="/nowhere", features=FeatureSpec())


OLD, NEW = model("a"), model("b")
BEAT = Beat(answered=1, errors={}, latency_us_histogram={})
LOADED = Loaded(load_ms=1.0, runtime="runtime 1")


@dataclass
class Process:
    """What `Child` needs of a process."""

    pid: int
    returncode: int | None = None
    killed: bool = False

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.killed = True
        if self.returncode is None:
            self.returncode = -9

    def wait(self, _timeout_s: float) -> int:
        assert self.returncode is not None
        return self.returncode


@dataclass
class Played:
    """A worker played by the test."""

    model: ModelFile | None
    process: Process
    child: Child[FromWorker]
    end: Channel[ToWorker]

    def said(self) -> list[type]:
        return [type(message) for message in self.end.receive()]


@dataclass
class Scene:
    """A handover, its clock and its workers."""

    now: float = 100.0
    workers: list[Played] = field(default_factory=list)
    deaths: list[tuple[str | None, str]] = field(default_factory=list)
    records: list[Records] = field(default_factory=list)
    beats: list[Beat] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handover = Handover(
            self._start,
            on_records=self.records.append,
            on_beat=self.beats.append,
            on_death=lambda digest, how, _now: self.deaths.append((digest, how)),
        )

    def _start(self, wanted: ModelFile | None) -> Child[FromWorker]:
        ours, theirs = socket.socketpair()
        process: Any = Process(pid=1000 + len(self.workers))
        child: Child[FromWorker] = Child(process, Channel(ours, FromWorker), "worker")
        self.workers.append(Played(wanted, process, child, Channel(theirs, ToWorker)))
        return child

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.handover.tick(self.now)

    def says(self, worker: Played, *messages: Any) -> None:
        for message in messages:
            assert worker.end.send(message)
        self.handover.receive(worker.child, self.now)

    def ends(self, worker: Played, code: int = 0) -> None:
        worker.process.returncode = code
        worker.end.close()
        self.handover.receive(worker.child, self.now)

    def serving(self, wanted: ModelFile | None) -> Played:
        """Bring a worker all the way to serving."""
        self.handover.want(wanted)
        self.tick()
        worker = self.workers[-1]
        self.says(worker, LOADED)
        self.says(worker, Joined())
        assert worker.said() == [Join]
        return worker


def test_a_worker_is_started_joins_when_loaded_and_serves_when_the_broker_confirms() -> None:
    scene = Scene()
    scene.handover.want(OLD)
    assert not scene.handover.answering
    scene.tick()
    (worker,) = scene.workers
    assert worker.said() == []
    scene.says(worker, LOADED)
    assert worker.said() == [Join]
    assert scene.handover.serving is None
    scene.says(worker, Joined(), BEAT)
    assert scene.handover.serving is not None
    assert scene.handover.answering
    assert not scene.handover.swapping
    assert scene.handover.runtime == "runtime 1"
    assert scene.beats == [BEAT]


def test_a_slot_without_a_model_is_answered_for_too() -> None:
    scene = Scene()
    scene.serving(None)
    assert scene.handover.answering


def test_the_old_worker_is_told_to_leave_only_when_the_new_one_has_joined() -> None:
    scene = Scene()
    old = scene.serving(OLD)
    scene.handover.want(NEW)
    scene.tick()
    new = scene.workers[-1]
    assert new.model == NEW
    scene.says(new, LOADED)
    scene.tick()
    assert old.said() == []
    assert scene.handover.answering
    scene.says(new, Joined())
    assert old.said() == [Leave]
    assert scene.handover.swapping
    scene.says(old, Records([], 3))
    scene.ends(old)
    assert scene.records == [Records([], 3)]
    assert not scene.handover.swapping
    assert scene.deaths == []


def test_going_back_before_the_new_one_has_joined_dismisses_it() -> None:
    scene = Scene()
    old = scene.serving(OLD)
    scene.handover.want(NEW)
    scene.tick()
    new = scene.workers[-1]
    scene.says(new, LOADED)
    scene.handover.want(OLD)
    scene.says(new, Joined())  # its confirmation was already on the way
    scene.tick()
    assert old.said() == []
    assert new.said() == [Join, Leave]
    serving = scene.handover.serving
    assert serving is not None
    assert serving.child is old.child


def test_wanting_a_third_while_the_second_loads_kills_the_second() -> None:
    scene = Scene()
    scene.serving(OLD)
    scene.handover.want(NEW)
    scene.tick()
    second = scene.workers[-1]
    scene.handover.want(model("c"))
    scene.tick()
    assert second.process.killed
    assert scene.workers[-1].model == model("c")
    assert scene.deaths == []


def test_a_worker_that_dies_is_replaced_at_once_and_one_that_dies_again_after_a_pause() -> None:
    scene = Scene()
    worker = scene.serving(OLD)
    scene.ends(worker, -9)
    assert scene.deaths == [(OLD.digest, "killed by SIGKILL")]
    scene.tick(0.0)
    assert len(scene.workers) == 2
    scene.ends(scene.workers[-1], 1)
    scene.tick(0.0)
    assert len(scene.workers) == 2
    assert scene.handover.turns_over(scene.now)
    scene.tick(0.6)
    assert len(scene.workers) == 3
    assert [how for _, how in scene.deaths] == ["killed by SIGKILL", "exit status 1"]


def test_what_a_worker_says_about_its_model_is_how_it_ended() -> None:
    scene = Scene()
    scene.handover.want(NEW)
    scene.tick()
    scene.says(scene.workers[-1], LoadFailed(reason="bad_model", text="mangled"))
    scene.ends(scene.workers[-1], 1)
    assert scene.deaths == [(NEW.digest, "it cannot load its model: mangled")]


def test_a_worker_that_hangs_is_killed_and_replaced() -> None:
    scene = Scene()
    worker = scene.serving(OLD)
    scene.tick(BEAT_LIMIT_S - 0.5)
    scene.says(worker, BEAT)
    scene.tick(BEAT_LIMIT_S - 0.5)
    assert not worker.process.killed
    scene.tick(1.0)
    assert worker.process.killed
    assert len(scene.workers) == 2


@pytest.mark.parametrize(("phase", "limit_s"), [(Phase.LOADING, LOAD_LIMIT_S), (Phase.LEAVING, LEAVE_LIMIT_S)])
def test_no_phase_lasts_for_ever(phase: Phase, limit_s: float) -> None:
    scene = Scene()
    if phase is Phase.LOADING:
        scene.handover.want(OLD)
        scene.tick()
        stuck = scene.workers[0]
    else:
        stuck = scene.serving(OLD)
        scene.serving(NEW)
    for _ in range(int(limit_s)):
        if phase is Phase.LEAVING:
            scene.says(scene.workers[-1], BEAT)
        scene.tick(1.0)
    assert not stuck.process.killed
    scene.tick(1.0)
    assert stuck.process.killed
    assert len(scene.deaths) == (1 if phase is Phase.LOADING else 0)


def test_serving_does_not_turn_over_when_nobody_gives_a_sign() -> None:
    scene = Scene()
    scene.serving(OLD)
    assert scene.handover.turns_over(scene.now)
    assert not scene.handover.turns_over(scene.now + BEAT_LIMIT_S + 1)


def test_a_lost_connection_is_no_death() -> None:
    scene = Scene()
    worker = scene.serving(OLD)
    scene.says(worker, Disconnected())
    assert not scene.handover.answering
    scene.says(worker, Joined())
    assert scene.handover.answering
    assert len(scene.workers) == 1


def test_stopping_asks_everybody_to_leave_and_replaces_nobody() -> None:
    scene = Scene()
    worker = scene.serving(OLD)
    scene.handover.stop(scene.now)
    assert worker.said() == [Leave]
    scene.ends(worker)
    scene.tick(100.0)
    assert scene.handover.members == []
    assert len(scene.workers) == 1
    assert scene.deaths == []


def test_while_a_model_cannot_be_loaded_states_are_answered_with_no_model() -> None:
    scene = Scene()
    scene.handover.want(NEW)
    scene.tick()
    for worker in (scene.workers[0], None):
        failing = worker or scene.workers[-1]
        scene.says(failing, LoadFailed(reason="corrupt_model", text="rotten"))
        scene.ends(failing, 1)
        scene.tick(0.0)
    stand_in = scene.workers[-1]
    assert stand_in.model is None
    scene.says(stand_in, LOADED, Joined())
    assert scene.handover.answering
    assert scene.handover.serving is None
    scene.tick(1.0)
    mended = scene.workers[-1]
    assert mended.model == NEW
    assert scene.handover.answering
    scene.says(mended, LOADED, Joined())
    assert stand_in.said() == [Join, Leave]
    assert scene.handover.serving is not None
    assert [digest for digest, _ in scene.deaths] == [NEW.digest, NEW.digest]


def test_a_worker_that_hangs_before_it_has_found_the_broker_is_not_held_against_its_model() -> None:
    scene = Scene()
    scene.handover.want(NEW)
    scene.tick()
    scene.says(scene.workers[0], LOADED)
    scene.tick(BEAT_LIMIT_S + 1)
    assert scene.workers[0].process.killed
    assert scene.deaths == []
    assert len(scene.workers) == 2


def test_loading_counts_as_turning_over() -> None:
    scene = Scene()
    scene.handover.want(NEW)
    scene.tick()
    scene.now += LOAD_LIMIT_S - 1
    assert scene.handover.turns_over(scene.now)
    assert not scene.handover.loaded
    scene.says(scene.workers[0], LOADED)
    assert scene.handover.loaded


def test_a_system_that_gives_no_process_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    refusals = [Unavailable("no memory"), Unavailable("no memory")]
    give = scene._start

    def start(wanted: ModelFile | None) -> Child[FromWorker]:
        if refusals:
            raise refusals.pop()
        return give(wanted)

    monkeypatch.setattr(scene.handover, "_start", start)
    scene.handover.want(OLD)
    scene.tick()
    scene.tick()
    assert scene.workers == []
    scene.tick(1.0)
    assert len(scene.workers) == 1
