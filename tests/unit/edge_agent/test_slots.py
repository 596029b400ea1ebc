"""One slot: real state on disk, real deployment machine and judges; workers and trials are played by the test."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import deployment
from edge_agent.battles import Served
from edge_agent.children import (
    BaselineFailed,
    Beat,
    CandidateFailed,
    Child,
    FromTrial,
    FromWorker,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    RecentInputs,
    Records,
    TimedPairs,
    ToTrial,
    ToWorker,
    TrialAssignment,
    TrialReady,
)
from edge_agent.deployment import ModelRefused, ModelStaged, ReleaseOffered, StagerDied, StagingPostponed
from edge_agent.settings import SlotSettings
from edge_agent.slots import BEGIN_AGAIN_S, RECENT_BYTES, RECENT_STATES, SAVE_AGAIN_S, Slot, Surroundings
from edge_agent.staging import Progress
from edge_agent.state import StateStore
from protocol.errors import Unavailable
from protocol.features import FeatureSpec
from protocol.messages import Event, ModelRef, TransferStatus
from protocol.release import Golden, Release, Tensor
from tests.unit.edge_agent.played import Played, play

GOOD = TimedPairs([(1000, 990)] * 3100)
SLOWER = TimedPairs([(1000, 2000)] * 60)


def release(version: int, length: int = 2, golden: int = 3) -> Release:
    """Version n has the digest n n n …"""
    return Release(
        slot="combat",
        version=version,
        digest=f"{version:x}" * 64,
        length=1,
        manifest="f" * 64,
        inputs=(Tensor(name="in", shape=(1, length), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(),
        golden=Golden(
            inputs=tuple((float(version),) * length for _ in range(golden)),
            outputs=((0.0, 0.0),) * golden,
            tolerance=1.0,
        ),
    )


def ref(version: int) -> ModelRef:
    return ModelRef(digest=f"{version:x}" * 64, version=version)


def served(features: bytes) -> Served:
    return Served("combat", "b", "", 1, features, 0, False, 1.0, b"", None, False, "1" * 64, 1, 0.0)


class Disk(StateStore):
    """A state store whose disk can be full."""

    full = False

    def save(self, slot: str, state: bytes) -> None:
        if self.full:
            raise Unavailable("no space")
        super().save(slot, state)


@dataclass
class Scene:
    """A slot, its clock, and the rest of the daemon as far as it is needed."""

    folder: Path
    settings: SlotSettings = field(default_factory=SlotSettings)
    clean: bool = True
    now: float = 100.0
    releases: dict[ModelRef, Release] = field(default_factory=dict)
    workers: list[Played] = field(default_factory=list)
    finishing: list[ModelFile | None] = field(default_factory=list)
    trials: list[Played] = field(default_factory=list)
    staged: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    looks: int = 0
    no_process: bool = False
    events: list[Event] = field(default_factory=list)
    records: list[Records] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk = Disk(self.folder / "state", ["combat"])
        around = Surroundings(
            state=self.disk,
            model_file=self._model_file,
            release=self.releases.get,
            start_worker=self._start_worker,
            start_trial=self._start_trial,
            stage=self.staged.append,
            cancel=self.cancelled.append,
            look_again=self._look_again,
            report=self.events.append,
            record=self.records.append,
            throttled=lambda: False,
            wall_clock=lambda: 5.0,
            rng=random.Random(1),
        )
        saved = self.disk.load("combat")
        state = deployment.initial() if saved is None else deployment.decode(saved)
        self.slot = Slot("combat", self.settings, around, state, clean=self.clean)

    def _model_file(self, model: ModelRef) -> ModelFile | None:
        if model not in self.releases:
            return None
        return ModelFile(digest=model.digest, version=model.version, folder="", features=FeatureSpec())

    def _look_again(self) -> None:
        self.looks += 1

    def _child(self, what: Any, answers: Any, asked: Any, played: list[Played]) -> Child[Any]:
        played.append(play(what, answers, asked, len(played)))
        return played[-1].child

    def _start_worker(self, model: ModelFile | None, finishing: ModelFile | None = None) -> Child[FromWorker]:
        self.finishing.append(finishing)
        return self._child(model, FromWorker, ToWorker, self.workers)

    def _start_trial(self, assignment: TrialAssignment) -> Child[Any]:
        if self.no_process:
            raise Unavailable("no process to be had")
        return self._child(assignment, FromTrial, ToTrial, self.trials)

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.slot.tick(self.now)

    def says(self, played: Played, *messages: Any) -> None:
        for message in messages:
            assert played.end.send(message)
        assert self.slot.receive(played.child, self.now)

    def ends(self, played: Played, code: int = 1) -> None:
        played.ends(code)
        while not played.child.channel.closed:
            assert self.slot.receive(played.child, self.now)

    def joins(self) -> Played:
        """The newest worker comes to serve, those before it leave."""
        self.tick()
        worker = self.workers[-1]
        self.says(worker, Loaded(load_ms=1.0, runtime="runtime"), Joined(), Joined())
        for other in self.workers[:-1]:
            if not other.child.channel.closed:
                assert Leave() in other.end.receive()
                self.ends(other, 0)
        self.tick()
        return worker

    def offer(self, version: int, **fields: Any) -> None:
        self.releases[ref(version)] = release(version, **fields)
        self.slot.feed(ReleaseOffered(ref(version)), self.now)

    def stage(self, version: int, **fields: Any) -> None:
        self.offer(version, **fields)
        self.slot.feed(ModelStaged(ref(version).digest), self.now)

    def serving(self, version: int, **fields: Any) -> Played:
        self.slot.begin(self.now)
        self.stage(version, **fields)
        return self.joins()

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def phase(self) -> str:
        return self.slot.status({}, None).phase


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(**options: Any) -> Scene:
        return Scene(tmp_path, **options)

    return make


@pytest.fixture
def scene(make: Any) -> Scene:
    made: Scene = make()
    return made


def test_a_new_slot_answers_without_a_model_and_is_not_ready(scene: Scene) -> None:
    scene.slot.begin(scene.now)
    scene.tick()
    assert scene.workers[0].what is None
    scene.joins()
    status = scene.slot.status({}, None)
    assert (status.phase, status.ready, status.active) == ("serving", False, None)


def test_the_first_model_is_staged_and_served_at_once(scene: Scene) -> None:
    scene.slot.begin(scene.now)
    scene.offer(1)
    digest = ref(1).digest
    assert scene.staged == [digest]
    assert scene.slot.is_candidate(digest)
    assert scene.slot.needed() == {ref(1)}
    status = scene.slot.status({digest: Progress(digest, 5, 10, 2.0)}, 1)
    assert (status.phase, status.candidate, status.progress, status.pinned) == ("staging", ref(1), 0.5, 1)
    assert status.transfer == TransferStatus(bytes=5, total=10, rate_bytes_s=2, seconds_left=2.5)
    scene.slot.feed(ModelStaged(digest), scene.now)
    scene.joins()
    status = scene.slot.status({}, None)
    assert (status.phase, status.ready, status.active, status.candidate) == ("serving", True, ref(1), None)
    assert scene.kinds() == ["staged", "committed"]
    assert scene.events[-1] == Event(
        at=5.0,
        kind="committed",
        slot="combat",
        model=digest,
        version=1,
        reason="first_model",
        text="version 1 is served from now on",
    )


def test_a_good_model_is_tried_committed_watched_and_confirmed(make: Any) -> None:
    scene = make(settings=SlotSettings(watch_seconds=60.0))
    scene.serving(1)
    scene.stage(2)
    (trial,) = scene.trials
    assert scene.phase() == "trial"
    assert (trial.what.old.version, trial.what.new.version, trial.what.interval_s) == (1, 2, 0.0)
    assert scene.slot.status({}, None).active == ref(1)
    scene.says(trial, GOOD)
    scene.tick()
    assert trial.process.returncode == -9
    assert scene.phase() == "watch"
    watch = scene.trials[-1]
    assert (watch.what.old.version, watch.what.new.version, watch.what.interval_s) == (1, 2, 1.0)
    worker = scene.joins()
    status = scene.slot.status({}, None)
    assert (status.ready, status.active, status.previous) == (True, ref(2), ref(1))
    assert status.verdict is not None
    assert status.verdict.outcome == "commit"
    assert scene.slot.needed() == {ref(1), ref(2)}
    scene.says(watch, TimedPairs([(1000, 990)]))
    for _ in range(29):
        scene.says(worker, Beat(answered=0, errors={}, latency_us_histogram={}))
        scene.tick(2.0)
    assert scene.phase() == "watch"
    scene.tick(2.0)
    assert scene.phase() == "serving"
    assert scene.kinds() == ["staged", "committed", "staged", "trial", "committed", "confirmed"]
    assert "3000 pairs" in scene.events[4].text


def test_a_slower_model_is_refused_and_the_old_one_never_stopped(scene: Scene) -> None:
    worker = scene.serving(1)
    scene.stage(2)
    scene.says(scene.trials[0], SLOWER)
    scene.tick()
    status = scene.slot.status({}, None)
    assert (status.phase, status.active, status.ready) == ("serving", ref(1), True)
    assert status.refusal is not None
    assert status.refusal.startswith("slower: version 2 is refused")
    assert scene.events[-1].verdict is not None
    assert scene.events[-1].verdict.outcome == "rollback"
    assert worker.process.returncode is None
    assert len(scene.workers) == 1
    scene.offer(2)
    assert scene.phase() == "serving"


def test_a_trial_that_runs_out_of_time_is_inconclusive_and_keeps_the_old_model(make: Any) -> None:
    scene = make(settings=SlotSettings(trial_seconds=10.0))
    scene.serving(1)
    scene.stage(2)
    scene.says(scene.trials[0], TimedPairs([(1000, 1000)] * 5))
    scene.tick(9.0)
    assert scene.phase() == "trial"
    scene.tick(2.0)
    status = scene.slot.status({}, None)
    assert (status.phase, status.active) == ("serving", ref(1))
    assert scene.kinds()[-1] == "inconclusive"
    assert status.verdict is not None
    assert status.verdict.outcome == "inconclusive"


def watched(scene: Scene) -> Played:
    """Version 2 is served and watched, version 1 is the one before."""
    scene.serving(1)
    scene.stage(2)
    scene.says(scene.trials[0], GOOD)
    scene.tick()
    scene.joins()
    return scene.trials[-1]


def test_a_watch_that_alarms_rolls_back(scene: Scene) -> None:
    watch = watched(scene)
    scene.says(watch, SLOWER)
    scene.tick()
    scene.joins()
    status = scene.slot.status({}, None)
    assert (status.phase, status.active, status.ready) == ("serving", ref(1), True)
    assert (scene.events[-1].kind, scene.events[-1].reason) == ("rolled_back", "slower")
    assert watch.process.returncode == -9


def test_a_failure_in_the_watch_rolls_back_even_if_the_process_is_gone_by_then(scene: Scene) -> None:
    watch = watched(scene)
    assert watch.end.send(CandidateFailed(reason="not_finite", text="nan"))
    scene.ends(watch, 0)
    scene.tick()
    assert (scene.events[-1].kind, scene.events[-1].reason) == ("rolled_back", "not_finite")
    assert scene.slot.state.active == ref(1)


def test_an_old_model_that_fails_in_the_watch_is_not_what_is_gone_back_to(scene: Scene) -> None:
    watch = watched(scene)
    assert watch.end.send(BaselineFailed(reason="corrupt_model", text="rotten"))
    scene.ends(watch, 0)
    scene.tick()
    assert scene.slot.state.active == ref(2)
    assert scene.phase() == "serving"


def test_a_candidate_is_committed_where_the_old_model_is_lost(scene: Scene) -> None:
    scene.serving(1)
    scene.stage(2)
    scene.says(scene.trials[0], BaselineFailed(reason="corrupt_model", text="rotten"))
    scene.tick()
    assert (scene.events[-1].kind, scene.events[-1].reason) == ("committed", "nothing_to_compare")
    assert scene.slot.state.refused == ()


def test_a_trial_that_dies_is_run_once_more_and_then_the_candidate_is_refused(scene: Scene) -> None:
    scene.serving(1)
    scene.stage(2)
    scene.ends(scene.trials[0], -11)
    scene.tick()
    assert len(scene.trials) == 2
    assert scene.phase() == "trial"
    scene.ends(scene.trials[1], -11)
    scene.tick()
    assert (scene.events[-1].kind, scene.events[-1].reason) == ("refused", "died_twice")


def test_a_new_model_whose_workers_die_twice_is_rolled_back(scene: Scene) -> None:
    watched(scene)
    for _ in range(2):
        scene.ends(scene.workers[-1], -11)
        scene.tick()
    assert scene.slot.state.active == ref(1)
    assert scene.kinds()[-3:] == ["worker_died", "worker_died", "rolled_back"]
    assert scene.events[-2].text == "a worker of combat ended: killed by SIGSEGV"
    scene.joins()
    assert scene.slot.status({}, None).ready


def test_a_restart_in_staging_goes_on_staging(make: Any) -> None:
    scene = make()
    scene.serving(1)
    scene.offer(2)
    again = make(releases=scene.releases, clean=False)
    again.slot.begin(again.now)
    assert again.staged == [ref(2).digest]
    again.joins()
    assert again.slot.status({}, None).active == ref(1)


@pytest.mark.parametrize("clean", [True, False])
def test_a_restart_in_a_trial_begins_it_anew_and_counts_only_an_unclean_end(make: Any, clean: bool) -> None:
    scene = make()
    scene.serving(1)
    scene.stage(2)
    for _ in range(2):
        scene = make(releases=scene.releases, clean=clean)
        scene.slot.begin(scene.now)
    scene.joins()
    assert scene.phase() == ("trial" if clean else "serving")
    assert len(scene.trials) == (1 if clean else 0)
    assert scene.slot.status({}, None).active == ref(1)
    assert scene.slot.status({}, None).ready


def test_a_restart_in_a_watch_serves_the_new_model_and_watches_on(make: Any) -> None:
    scene = make()
    watched(scene)
    again = make(releases=scene.releases)
    again.slot.begin(again.now)
    again.joins()
    assert (again.phase(), again.slot.status({}, None).active) == ("watch", ref(2))
    assert len(again.trials) == 1


def test_a_restart_whose_old_release_is_damaged_serves_on_without_a_watch(make: Any) -> None:
    scene = make()
    watched(scene)
    del scene.releases[ref(1)]
    again = make(releases=scene.releases)
    again.slot.begin(again.now)
    again.joins()
    assert (again.phase(), again.slot.status({}, None).active) == ("serving", ref(2))
    assert again.trials == []


def test_a_candidate_whose_release_is_damaged_is_staged_again(make: Any) -> None:
    scene = make()
    scene.serving(1)
    scene.stage(2)
    del scene.releases[ref(2)]
    again = make(releases=scene.releases)
    again.slot.begin(again.now)
    assert again.phase() == "staging"
    assert again.staged == [ref(2).digest]


def test_what_the_stager_says_about_the_candidate_is_dealt_with(scene: Scene) -> None:
    scene.serving(1)
    scene.offer(2)
    scene.slot.feed(ModelRefused(ref(2).digest, "wrong_signature", "shapes differ"), scene.now)
    assert scene.slot.status({}, None).refusal == "wrong_signature: version 2 is refused: shapes differ"
    scene.offer(3)
    scene.slot.feed(StagingPostponed(ref(3).digest, "no_space"), scene.now)
    assert scene.kinds()[-1] == "postponed"
    scene.offer(3)
    scene.slot.feed(StagerDied(ref(3).digest), scene.now)
    assert scene.staged[-2:] == [ref(3).digest, ref(3).digest]
    scene.offer(4)
    assert scene.cancelled == [ref(3).digest]
    assert scene.slot.is_candidate(ref(4).digest)
    assert not scene.slot.is_candidate(ref(3).digest)


def test_a_trial_or_watch_that_cannot_be_started_now_is_started_later(make: Any) -> None:
    scene = make()
    scene.serving(1)
    scene.no_process = True
    scene.stage(2)
    scene.tick()
    assert (scene.phase(), scene.trials) == ("trial", [])
    scene.no_process = False
    scene.tick(BEGIN_AGAIN_S)
    scene.no_process = True
    scene.says(scene.trials[0], GOOD)
    scene.tick()
    assert scene.phase() == "watch"
    scene.no_process = False
    scene.joins()
    scene.tick(BEGIN_AGAIN_S)
    assert [trial.what.interval_s for trial in scene.trials] == [0.0, 1.0]


def test_what_was_forgotten_while_the_disk_took_nothing_is_asked_for_again(scene: Scene) -> None:
    scene.serving(1)
    scene.disk.full = True
    for version in range(2, 200):
        scene.offer(version)
    scene.disk.full = False
    assert scene.looks == 0
    scene.tick(SAVE_AGAIN_S)
    assert scene.looks == 1


def test_a_newer_offer_ends_a_trial(scene: Scene) -> None:
    scene.serving(1)
    scene.stage(2)
    scene.offer(3)
    assert scene.trials[0].process.returncode == -9
    assert scene.phase() == "staging"
    assert not scene.slot.receive(scene.trials[0].child, scene.now)


def test_recent_states_are_what_is_compared_on(scene: Scene) -> None:
    worker = scene.serving(1)
    states = [bytes([number % 256] * 8) for number in range(RECENT_STATES + 10)]
    scene.says(worker, Records([served(features) for features in states], 0))
    assert scene.records[0].served[0].features == states[0]
    scene.stage(2)
    trial = scene.trials[0]
    assert trial.what.old_inputs == trial.what.new_inputs == states[-RECENT_STATES:]
    fresh = b"\xff" * 8
    scene.says(worker, Records([served(fresh)], 0))
    scene.says(trial, TrialReady(memory_bytes=0))
    scene.tick(3.0)
    (message,) = trial.end.receive()
    assert isinstance(message, RecentInputs)
    assert message.inputs == [*states[-RECENT_STATES + 1 :], fresh]


def test_the_empty_state_that_ends_a_battle_is_not_compared_on(scene: Scene) -> None:
    worker = scene.serving(1)
    scene.says(worker, Records([served(b"\1" * 8), *[served(b"")] * RECENT_STATES], 0))
    scene.stage(2)
    assert scene.trials[0].what.new_inputs == [b"\1" * 8]


def test_models_of_different_inputs_are_compared_on_golden_vectors_and_never_on_recent_states(scene: Scene) -> None:
    worker = scene.serving(1)
    scene.says(worker, Records([served(b"\1" * 8)], 0))
    scene.stage(2, length=3, golden=2)
    trial = scene.trials[0]
    assert [len(vector) for vector in trial.what.old_inputs] == [8, 8]
    assert [len(vector) for vector in trial.what.new_inputs] == [12, 12]
    scene.tick(3.0)
    assert trial.end.receive() == []


def test_states_from_before_a_change_of_inputs_are_left_out(scene: Scene) -> None:
    worker = scene.serving(1)
    scene.says(worker, Records([served(b"\1" * 8)], 0))
    scene.stage(2, length=3)
    scene.says(scene.trials[0], GOOD)
    scene.tick()
    worker = scene.joins()
    scene.says(worker, Records([served(b"\2" * 12)], 0))
    scene.stage(3, length=3)
    assert scene.trials[-1].what.new_inputs == [b"\2" * 12]


def test_a_release_without_golden_vectors_is_compared_on_zeros(scene: Scene) -> None:
    scene.serving(1)
    scene.stage(2, golden=0)
    assert scene.trials[0].what.old_inputs == scene.trials[0].what.new_inputs == [bytes(8)]


def test_an_assignment_with_large_states_still_fits_a_message(scene: Scene) -> None:
    length = 16_384
    worker = scene.serving(1, length=length, golden=0)
    for _ in range(RECENT_STATES):
        scene.says(worker, Records([served(bytes(4 * length))], 0))
    scene.stage(2, length=length, golden=0)
    assignment = scene.trials[0].what
    assert len(assignment.new_inputs) == RECENT_BYTES // (4 * length)
    assert len(msgspec.msgpack.encode(assignment)) < 4 * 1024 * 1024


def test_a_full_disk_stops_progress_and_not_service_and_nothing_that_happened_is_forgotten(scene: Scene) -> None:
    worker = scene.serving(1)
    scene.stage(2)
    scene.disk.full = True
    scene.says(scene.trials[0], GOOD)
    scene.tick()
    assert scene.phase() == "trial"
    scene.offer(3)
    scene.tick(SAVE_AGAIN_S)
    assert (scene.slot.state.active, scene.slot.status({}, None).ready) == (ref(1), True)
    assert worker.process.returncode is None
    before = scene.kinds()
    scene.disk.full = False
    scene.tick(SAVE_AGAIN_S)
    assert scene.kinds()[len(before) :] == ["committed"]
    assert scene.slot.state.active == ref(2)
    assert scene.slot.is_candidate(ref(3).digest)


def test_a_restart_with_a_full_disk_serves(make: Any) -> None:
    scene = make()
    scene.serving(1)
    scene.stage(2)
    again = make(releases=scene.releases, clean=False)
    again.disk.full = True
    again.slot.begin(again.now)
    again.joins()
    assert again.slot.status({}, None).ready
    for _ in range(100):
        again.slot.feed(StagerDied(ref(3).digest), again.now)  # however much happens
    assert len(again.slot._undecided) < 100


def test_counters_count_from_the_start_and_latencies_from_the_last_report(scene: Scene) -> None:
    worker = scene.serving(1)
    for _ in range(2):
        scene.says(worker, Beat(answered=3, errors={"malformed": 1}, latency_us_histogram={100: 3}))
    counters = scene.slot.counters()
    assert (counters.answered, counters.errors) == (6, {"malformed": 2})
    assert sum(counters.latency_us_histogram.values()) == 6
    assert counters.latency_us_p50 is not None
    counters = scene.slot.counters()
    assert (counters.answered, counters.latency_us_histogram, counters.latency_us_p50) == (6, {}, None)


def test_all_living_children_are_named_and_strangers_are_nobodys(scene: Scene) -> None:
    worker = scene.serving(1)
    scene.stage(2)
    assert scene.slot.children() == [worker.child, scene.trials[0].child]
    assert not scene.slot.receive(object(), scene.now)
    scene.says(scene.trials[0], SLOWER)
    assert scene.slot.children() == [worker.child]


def test_stopping_ends_the_trial_asks_the_workers_to_leave_and_keeps_the_state(scene: Scene) -> None:
    worker = scene.serving(1)
    scene.stage(2)
    scene.slot.stop(scene.now)
    assert scene.trials[0].process.returncode == -9
    assert Leave() in worker.end.receive()
    saved = scene.disk.load("combat")
    assert saved is not None
    assert isinstance(deployment.decode(saved), deployment.Trial)


def test_an_active_model_that_rotted_gives_way_to_the_one_before_and_is_fetched_again(make: Any) -> None:
    scene = make(settings=SlotSettings(watch_seconds=0.0))
    watched(scene)
    scene.tick()
    assert scene.phase() == "serving"
    scene.ends(scene.workers[-1], -9)
    scene.tick()
    rotten = scene.workers[-1]
    assert rotten.end.send(LoadFailed(reason="corrupt_model", text="its content does not have that digest"))
    scene.ends(rotten)
    scene.joins()
    status = scene.slot.status({}, None)
    assert (status.active, status.ready) == (ref(1), True)
    assert scene.kinds()[-3:] == ["worker_died", "worker_died", "lost"]
    assert scene.looks == 1
    scene.offer(2)
    assert scene.staged[-1] == ref(2).digest


def test_a_candidate_that_rotted_before_its_trial_is_staged_again_and_not_blamed(scene: Scene) -> None:
    scene.serving(1)
    scene.stage(2)
    assert scene.trials[0].end.send(CandidateFailed(reason="corrupt_model", text="rotten"))
    scene.ends(scene.trials[0], 0)
    scene.tick()
    assert scene.phase() == "staging"
    assert scene.staged == [ref(1).digest, ref(2).digest, ref(2).digest]
    assert scene.slot.state.refused == ()


@pytest.mark.parametrize(("swap", "finishing"), [("now", None), ("battle-end", 1)])
def test_a_new_model_waits_for_the_battles_end_where_that_is_wished(make: Any, swap: Any, finishing: Any) -> None:
    scene = make(settings=SlotSettings(swap=swap))
    watched(scene)
    assert [model.version if model else None for model in scene.finishing] == [None, finishing]
    scene.says(scene.trials[-1], SLOWER)
    scene.tick()
    scene.tick()
    assert (len(scene.finishing), scene.finishing[-1]) == (3, None), "going back waits for nothing"
