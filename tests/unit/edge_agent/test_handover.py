"""The workers of a slot, with children whose other end is played by the test."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from edge_agent.battles import Served
from edge_agent.channel import Channel
from edge_agent.children import (
    Beat,
    Begin,
    Child,
    Disconnected,
    FromWorker,
    Join,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    OldBattles,
    Records,
    ToWorker,
)
from edge_agent.handover import (
    BEAT_LIMIT_S,
    FINISH_LIMIT_S,
    LEAVE_LIMIT_S,
    LOAD_LIMIT_S,
    MARKS_PER_MESSAGE,
    Death,
    Handover,
    Phase,
)
from protocol.errors import Unavailable
from protocol.features import FeatureSpec
from tests.unit.edge_agent.played import Process


def model(name: str) -> ModelFile:
    return ModelFile(digest=name * 64, version=1, folder="/nowhere", features=FeatureSpec())


OLD, NEW = model("a"), model("b")
BEAT = Beat(answered=1, errors={}, latency_us_histogram={})
FINISHING = Beat(answered=1, errors={}, latency_us_histogram={}, finishing=True)
LOADED = Loaded(load_ms=1.0, runtime="runtime 1")


@dataclass
class Played:
    """A worker played by the test."""

    model: ModelFile | None
    finishing: ModelFile | None
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
    deaths: list[Death] = field(default_factory=list)
    records: list[Records] = field(default_factory=list)
    beats: list[Beat] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handover = Handover(
            self._start,
            on_records=self.records.append,
            on_beat=self.beats.append,
            on_death=lambda death, _now: self.deaths.append(death),
        )

    def _start(self, wanted: ModelFile | None, finishing: ModelFile | None) -> Child[FromWorker]:
        ours, theirs = socket.socketpair()
        process: Any = Process(pid=1000 + len(self.workers))
        child: Child[FromWorker] = Child(process, Channel(ours, FromWorker), "worker")
        self.workers.append(Played(wanted, finishing, process, child, Channel(theirs, ToWorker)))
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
    assert scene.deaths == [Death(OLD.digest, "killed by SIGKILL", model_lost=False)]
    scene.tick(0.0)
    assert len(scene.workers) == 2
    scene.ends(scene.workers[-1], 1)
    scene.tick(0.0)
    assert len(scene.workers) == 2
    assert scene.handover.turns_over(scene.now)
    scene.tick(0.6)
    assert len(scene.workers) == 3
    assert [death.how for death in scene.deaths] == ["killed by SIGKILL", "exit status 1"]


@pytest.mark.parametrize(("reason", "lost"), [("bad_model", False), ("corrupt_model", True), ("unavailable", True)])
def test_what_a_worker_says_about_its_model_is_how_it_ended(reason: str, lost: bool) -> None:
    scene = Scene()
    scene.handover.want(NEW)
    scene.tick()
    scene.says(scene.workers[-1], LoadFailed(reason=reason, text="mangled"))
    scene.ends(scene.workers[-1], 1)
    assert scene.deaths == [Death(NEW.digest, "it cannot load its model: mangled", model_lost=lost)]


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
    assert [death.digest for death in scene.deaths] == [NEW.digest, NEW.digest]


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

    def start(wanted: ModelFile | None, finishing: ModelFile | None) -> Child[FromWorker]:
        if refusals:
            raise refusals.pop()
        return give(wanted, finishing)

    monkeypatch.setattr(scene.handover, "_start", start)
    scene.handover.want(OLD)
    scene.tick()
    scene.tick()
    assert scene.workers == []
    scene.tick(1.0)
    assert len(scene.workers) == 1


# At the battle's end.


def served(battle: str, step: int, *, done: bool = False) -> Served:
    return Served("combat", battle, "", step, b"", None, False, None, b"", None, done, "m", 1, 0.0)


def names(told: list[Any]) -> list[str]:
    """Which battles a worker was told of, before it was told to begin."""
    assert told[-1] == Begin()
    return [mark.battle for message in told[:-1] for mark in message.marks if not mark.done]


class Swap(Scene):
    """A slot that serves `OLD`, and gets `NEW` at the battle's end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.old = self.serving(OLD)
        self.says(self.old, Records([served("b", 1), served("over", 1), served("over", 2, done=True)], 0))
        self.want(NEW)
        self.new = self.workers[-1]

    def want(self, wanted: ModelFile, *, at_battle_end: bool = True) -> None:
        self.handover.want(wanted, at_battle_end=at_battle_end)
        self.tick()

    def joins(self) -> None:
        """The new worker joins, and the old one is told to leave."""
        self.says(self.new, LOADED)
        assert self.new.end.receive() == [Join()]
        self.says(self.new, Joined(), FINISHING)
        assert self.old.said() == [Leave]

    def begins(self) -> None:
        """The old worker has left."""
        self.joins()
        self.ends(self.old)
        self.tick()
        assert names(self.new.end.receive()) == ["b"]

    def passes(self, seconds: float, beat: Beat = FINISHING) -> None:
        for _ in range(int(seconds)):
            self.says(self.new, beat)
            self.tick(1.0)


def test_at_the_battles_end_the_new_worker_has_both_models_and_begins_when_the_old_one_has_left() -> None:
    scene = Swap()
    assert (scene.new.model, scene.new.finishing) == (NEW, OLD)
    scene.joins()
    scene.tick()
    assert scene.new.end.receive() == []
    serving = scene.handover.serving
    assert serving is not None
    assert serving.child is scene.new.child
    scene.says(scene.old, Records([served("last words", 1)], 0))
    scene.says(scene.new, Records([served("heard by both", 1)], 0))
    scene.ends(scene.old)
    scene.tick()
    assert names(scene.new.end.receive()) == ["b", "last words", "heard by both"]
    scene.tick()
    assert scene.new.end.receive() == []
    assert len(scene.workers) == 2


def test_a_battle_that_ended_at_the_old_worker_is_told_as_ended() -> None:
    scene = Swap()
    scene.joins()
    scene.ends(scene.old)
    scene.tick()
    told = scene.new.end.receive()
    assert isinstance(told[0], OldBattles)
    assert [mark.battle for mark in told[0].marks if mark.done] == ["over"]


def test_an_old_worker_that_is_killed_is_known_by_its_records() -> None:
    scene = Swap()
    scene.joins()
    scene.ends(scene.old, -9)
    scene.tick()
    assert names(scene.new.end.receive()) == ["b"]
    assert scene.deaths == []


def test_with_the_old_worker_dead_before_the_new_one_has_loaded_it_begins_before_it_hears_anything() -> None:
    scene = Swap()
    scene.ends(scene.old, -9)
    scene.tick()
    assert len(scene.workers) == 2
    scene.says(scene.new, LOADED)
    told = scene.new.end.receive()
    assert told[-1] == Join()
    assert names(told[:-1]) == ["b"]


def test_many_battles_are_told_in_messages_that_fit() -> None:
    scene = Swap()
    count = MARKS_PER_MESSAGE * 2
    for first in range(0, count, 64):
        scene.says(scene.old, Records([served(f"{number:0128}", 1) for number in range(first, first + 64)], 0))
    scene.joins()
    scene.ends(scene.old)
    told: list[Any] = []
    while Begin() not in told:
        scene.tick()
        scene.new.child.channel.flush()
        told += scene.new.end.receive()
    assert len(names(told)) == count + 1
    assert max(len(message.marks) for message in told[:-1]) == MARKS_PER_MESSAGE


def test_a_swap_that_need_not_wait_takes_over_at_once_and_for_all_battles() -> None:
    scene = Scene()
    scene.serving(OLD)
    new = scene.serving(NEW)
    scene.ends(scene.workers[0])
    scene.tick()
    assert new.finishing is None
    assert new.end.receive() == []


def test_the_first_model_has_nothing_to_finish() -> None:
    scene = Scene()
    scene.serving(None)
    scene.handover.want(NEW, at_battle_end=True)
    scene.tick()
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (NEW, None)


def test_how_to_swap_is_decided_when_the_model_changes() -> None:
    scene = Swap()
    scene.want(NEW, at_battle_end=False)
    scene.begins()
    scene.want(NEW, at_battle_end=False)
    assert scene.new.end.receive() == []
    scene.want(model("c"), at_battle_end=False)
    scene.want(model("c"))
    assert scene.workers[-1].finishing is None


def test_a_second_swap_waits_until_the_first_is_through() -> None:
    scene = Swap()
    scene.begins()
    scene.want(model("c"))
    scene.passes(3)
    assert len(scene.workers) == 2
    assert scene.handover.answering
    scene.passes(1, BEAT)
    assert len(scene.workers) == 3
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (model("c"), NEW)


def test_it_does_not_wait_for_ever() -> None:
    scene = Swap()
    scene.begins()
    scene.want(model("c"))
    scene.passes(FINISH_LIMIT_S - 5)
    assert len(scene.workers) == 2
    scene.passes(10)
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (model("c"), NEW)


def test_a_second_swap_before_the_first_has_begun_takes_its_place() -> None:
    scene = Swap()
    scene.joins()
    scene.want(model("c"))
    third = scene.workers[-1]
    assert (third.model, third.finishing) == (model("c"), OLD)
    scene.ends(scene.old)
    scene.tick()
    assert scene.new.end.receive() == []
    scene.says(third, LOADED, Joined(), FINISHING)
    assert scene.new.said() == [Leave]
    scene.ends(scene.new)
    scene.tick()
    told = third.end.receive()
    assert told[0] == Join()
    assert names(told[1:]) == ["b"]


def test_wanting_the_old_model_again_before_the_swap_has_begun_needs_one_model_only() -> None:
    scene = Swap()
    scene.joins()
    scene.ends(scene.old)
    scene.want(OLD)
    back = scene.workers[-1]
    assert (back.model, back.finishing) == (OLD, None)
    assert scene.new.end.receive() == []


def test_wanting_the_old_model_again_while_the_new_one_loads_keeps_the_old_worker() -> None:
    scene = Swap()
    scene.want(OLD)
    assert scene.new.process.killed
    serving = scene.handover.serving
    assert serving is not None
    assert serving.child is scene.old.child
    assert len(scene.workers) == 2


def test_a_rollback_waits_for_no_battle() -> None:
    scene = Swap()
    scene.begins()
    scene.want(OLD, at_battle_end=False)
    back = scene.workers[-1]
    assert (back.model, back.finishing) == (OLD, None)
    scene.says(back, LOADED, Joined())
    assert scene.new.said() == [Leave]


def test_a_worker_that_dies_with_two_models_is_replaced_by_one_with_the_new_model_alone() -> None:
    scene = Swap()
    scene.begins()
    scene.ends(scene.new, -9)
    assert [death.digest for death in scene.deaths] == [NEW.digest]
    scene.tick(0.0)
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (NEW, None)


def test_one_that_dies_while_it_loads_two_is_replaced_so_too() -> None:
    scene = Swap()
    scene.ends(scene.new, -9)
    scene.tick()
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (NEW, None)
    assert scene.handover.answering


def test_a_battle_of_which_nothing_was_heard_for_long_is_not_told() -> None:
    scene = Scene()
    old = scene.serving(OLD)
    scene.says(old, Records([served("long ago", 1)], 0))
    for _ in range(300):
        scene.says(old, BEAT)
        scene.tick(1.0)
    scene.says(old, Records([served("lately", 1)], 0))
    scene.handover.want(NEW, at_battle_end=True)
    scene.tick()
    new = scene.workers[-1]
    scene.says(new, LOADED, Joined(), FINISHING)
    scene.ends(old)
    scene.tick()
    assert names(new.end.receive()[1:]) == ["lately"]


def test_one_that_only_cannot_load_the_new_model_is_followed_by_one_with_both() -> None:
    scene = Swap()
    scene.says(scene.new, LoadFailed(reason="unavailable", text="the card is slow today"))
    scene.ends(scene.new, 1)
    scene.tick()
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (NEW, OLD)


def test_an_old_model_that_cannot_be_loaded_is_done_without() -> None:
    scene = Swap()
    scene.says(scene.new, Loaded(load_ms=1.0, runtime="runtime 1", failure="rotten"), Joined())
    assert scene.new.said() == [Join]
    scene.ends(scene.old)
    scene.tick()
    assert scene.new.end.receive() == []
    scene.want(model("c"))
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (model("c"), NEW)


def test_when_it_is_through_nothing_is_left_of_it() -> None:
    scene = Swap()
    scene.begins()
    assert not scene.handover.swapping
    scene.passes(1, BEAT)
    scene.ends(scene.new, -9)
    scene.tick(0.0)
    scene.says(scene.workers[-1], LOADED, Joined())
    scene.want(model("c"))
    assert (scene.workers[-1].model, scene.workers[-1].finishing) == (model("c"), NEW)
