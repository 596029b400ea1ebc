"""One slot: its deployment state, its workers, its trial or watch.

The deployment machine decides, this object carries out. A new state is on disk before its actions run, and who serves
follows from the state alone: the workers are told what the state says is active, and make it so.
"""

from __future__ import annotations

import logging
import math
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_agent import deployment
from edge_agent.children import Beat, Child, FromTrial, FromWorker, ModelFile, Records, TrialAssignment
from edge_agent.comparison import Comparison
from edge_agent.deployment import (
    BaselineLost,
    BeginTrial,
    BeginWatch,
    EndTrial,
    EndWatch,
    LookAgain,
    ModelLost,
    Report,
    Stage,
    Staging,
    StopStaging,
    Trial,
    TrialDied,
    TrialFailed,
    TrialInconclusive,
    TrialPassed,
    TrialRegressed,
    Watch,
    WatchAlarmed,
    WatchQuieted,
    WorkerDied,
)
from edge_agent.handover import Death, Handover
from edge_agent.histogram import Histogram
from edge_agent.judge import JudgeSettings, TrialJudge, WatchJudge
from edge_agent.limits import MODEL_MEMORY_BYTES
from edge_agent.model_store import LOST_MODEL
from edge_agent.settings import BATTLE_END, SlotSettings
from edge_agent.staging import Progress
from edge_agent.state import StateStore
from protocol.errors import Unavailable
from protocol.messages import Event, ModelRef, SlotCounters, SlotStatus, Verdict
from protocol.release import Release

log = logging.getLogger(__name__)

RECENT_STATES = 256
RECENT_BYTES = 1024 * 1024
MAX_UNDECIDED = 64
SAVE_AGAIN_S = 1.0
BEGIN_AGAIN_S = 10.0
FLOAT_BYTES = 4

_SAID = {
    "staged": "is here, verified and qualified",
    "postponed": "cannot be had now",
    "superseded": "is superseded by a newer one",
    "trial": "is tried beside the active model",
    "inconclusive": "was not shown to be as fast; the active model stays",
    "refused": "is refused",
    "committed": "is served from now on",
    "confirmed": "has been watched long enough",
    "unwatched": "can no longer be watched",
    "rolled_back": "is rolled back",
    "pinned": "is served by an operator's wish",
    "lost": "cannot be read from this disk any more, and the one before is served",
}


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a slot needs of the rest of the daemon.

    Attributes:
        state: Where its state is kept.
        model_file: Where a verified model lies, and how it is asked; `None` if its release is not known.
        release: The verified release of a model of this slot.
        start_worker: Starts a worker of this slot.
        start_trial: Starts a process that compares two models.
        stage: Has a model staged.
        cancel: Stops that.
        look_again: Has the kept metadata verified again.
        report: Takes a line of the audit trail.
        record: Takes what was served.
        throttled: Whether the device is throttling now.
        wall_clock: Seconds since the epoch.
        rng: For the seeds of the judge's coins.
    """

    state: StateStore
    model_file: Callable[[ModelRef], ModelFile | None]
    release: Callable[[ModelRef], Release | None]
    start_worker: Callable[..., Child[FromWorker]]
    start_trial: Callable[[TrialAssignment], Child[FromTrial]]
    stage: Callable[[str], None]
    cancel: Callable[[str], None]
    look_again: Callable[[], None]
    report: Callable[[Event], None]
    record: Callable[[Records], None]
    throttled: Callable[[], bool]
    wall_clock: Callable[[], float]
    rng: random.Random


class Slot:
    """One slot of this device.

    Args:
        name: Its name.
        settings: Of this slot.
        around: The rest of the daemon.
        state: What it was doing when the daemon last ended.
        clean: Whether that was on purpose.
    """

    def __init__(
        self, name: str, settings: SlotSettings, around: Surroundings, state: deployment.State, *, clean: bool
    ) -> None:
        self.name = name
        self._settings = settings
        self._around = around
        self._clean = clean
        self._comparison: Comparison | None = None
        self._shared_length: int | None = None
        self._unbegun: tuple[float, BeginTrial | BeginWatch] | None = None
        self._undecided: deque[deployment.Event] = deque()
        self._forgot = False
        self._save_at = 0.0
        self._recent: deque[bytes] = deque(maxlen=RECENT_STATES)
        self._answered = 0
        self._errors: Counter[str] = Counter()
        self._latencies = Histogram()
        self._verdict: Verdict | None = None
        self._refusal: str | None = None
        self.workers = Handover(
            around.start_worker, on_records=self._served, on_beat=self._beat, on_death=self._worker_died
        )
        self.state = state
        self._served_version = state.active.version if state.active else deployment.NO_VERSION

    def begin(self, now: float) -> None:
        """Take up what was going on when the daemon last ended."""
        self.feed(deployment.DaemonRestarted(clean=self._clean), now)

    def is_candidate(self, digest: str) -> bool:
        """Whether this model is being staged or tried here."""
        return isinstance(self.state, Staging | Trial) and self.state.candidate.digest == digest

    def children(self) -> list[Child[FromWorker] | Child[FromTrial]]:
        """All living children of this slot."""
        found: list[Child[FromWorker] | Child[FromTrial]] = [member.child for member in self.workers.members]
        if self._comparison is not None and not self._comparison.ended:
            found.append(self._comparison.child)
        return found

    def receive(self, child: object, now: float) -> bool:
        """Listen to a child, if it is one of this slot's."""
        if self._comparison is not None and child is self._comparison.child:
            self._comparison.receive(now)
            return True
        for member in self.workers.members:
            if member.child is child:
                self.workers.receive(member.child, now)
                return True
        return False

    def tick(self, now: float) -> None:
        """Do what is due."""
        if self._undecided and now >= self._save_at:
            self._decide(now)
        self.workers.tick(now)
        if self._unbegun is not None and now >= self._unbegun[0]:
            self._carry_out(self._unbegun[1], now)
        if self._comparison is not None:
            self._comparison.tick(now, self._recent_inputs)
            if self._comparison.ended:
                self._conclude(self._comparison, now)

    def needed(self) -> frozenset[ModelRef]:
        """The models that the store must keep."""
        return deployment.needed(self.state)

    def stop(self, now: float) -> None:
        """End trial and workers; the state stays."""
        self._end_comparison()
        self.workers.stop(now)

    @property
    def ready(self) -> bool:
        """Whether states are answered with the active model."""
        active, serving = self.state.active, self.workers.serving
        return active is not None and serving is not None and serving.digest == active.digest and serving.connected

    def status(self, progress: Mapping[str, Progress], pinned: int | None) -> SlotStatus:
        """For the status message; `pinned` is the version that an operator wishes."""
        state = self.state
        candidate = state.candidate if isinstance(state, Staging | Trial) else None
        transfer = progress.get(candidate.digest) if candidate else None
        return SlotStatus(
            phase=type(state).__name__.lower(),
            ready=self.ready,
            active=state.active,
            previous=state.previous,
            candidate=candidate,
            progress=transfer.bytes / max(transfer.total, 1) if transfer else None,
            transfer=transfer.status() if transfer else None,
            pinned=pinned,
            verdict=self._verdict,
            refusal=self._refusal,
        )

    def counters(self) -> SlotCounters:
        """For telemetry; the latencies start again from nothing."""
        p50, p99 = self._latencies.percentile(50), self._latencies.percentile(99)
        return SlotCounters(
            answered=self._answered,
            errors=dict(self._errors),
            latency_us_histogram=self._latencies.take(),
            latency_us_p50=p50,
            latency_us_p99=p99,
        )

    def feed(self, event: deployment.Event, now: float) -> None:
        """Take something that happened; at once, or when the disk takes the state it leads to."""
        self._serve_active()
        if len(self._undecided) == MAX_UNDECIDED:
            log.error("%s: too much has happened while the disk takes nothing; forgetting %s", self.name, event)
            self._forgot = True
            return
        self._undecided.append(event)
        if now >= self._save_at:
            self._decide(now)

    def _decide(self, now: float) -> None:
        """Take what has happened, in order; what cannot be made durable now, a little later."""
        while self._undecided:
            step = deployment.step(self.state, self._undecided[0])
            if step.state != self.state:
                try:
                    self._around.state.save(self.name, deployment.encode(step.state))
                except Unavailable as error:
                    log.error("%s: cannot go on to %s: %s", self.name, type(step.state).__name__, error)
                    self._save_at = now + SAVE_AGAIN_S
                    return
                self.state = step.state
            self._undecided.popleft()
            self._serve_active()
            for action in step.actions:
                self._carry_out(action, now)
        if self._forgot:
            self._forgot = False
            self._around.look_again()

    def _serve_active(self) -> None:
        """Have the workers serve what the state says; falling back to an older version waits for no battle's end."""
        active = self.state.active
        version = active.version if active else deployment.NO_VERSION
        rises = version >= self._served_version
        self._served_version = version
        self.workers.want(
            self._around.model_file(active) if active else None,
            at_battle_end=rises and self._settings.swap == BATTLE_END,
        )

    def _carry_out(self, action: deployment.Action, now: float) -> None:
        match action:
            case Stage(model=model):
                self._around.stage(model.digest)
            case StopStaging(model=model):
                self._around.cancel(model.digest)
            case BeginTrial():
                self._begin_trial(action, now)
            case BeginWatch():
                self._begin_watch(action, now)
            case EndTrial() | EndWatch():
                self._end_comparison()
            case LookAgain():
                self._around.look_again()
            case Report():
                self._report(action)

    def _report(self, report: Report) -> None:
        if report.verdict is not None:
            self._verdict = report.verdict
        text = _sentence(report)
        if report.kind in {"refused", "rolled_back", "inconclusive"}:
            self._refusal = f"{report.reason}: {text}"
        self._around.report(
            Event(
                at=self._around.wall_clock(),
                kind=report.kind,
                slot=self.name,
                model=report.model.digest,
                version=report.model.version,
                reason=report.reason,
                text=text,
                verdict=report.verdict,
            )
        )

    def _begin_trial(self, trial: BeginTrial, now: float) -> None:
        active, candidate = trial.active, trial.candidate
        for model in (active, candidate):
            if self._around.release(model) is None:
                text = f"what is known of version {model.version} is damaged"
                self.feed(ModelLost(model.digest, text), now)
                return
        seed = self._around.rng.getrandbits(32)
        judge = TrialJudge(JudgeSettings(max_pairs=self._settings.trial_max_pairs), seed)
        child = self._start_trial(active, candidate, seed, interval_s=0.0)
        if child is None:
            self._unbegun = (now + BEGIN_AGAIN_S, trial)
            return
        self._comparison = Comparison(
            child,
            judge,
            old=active.digest,
            new=candidate.digest,
            limit_s=self._settings.trial_seconds,
            throttled=self._around.throttled,
            now=now,
        )

    def _begin_watch(self, watch: BeginWatch, now: float) -> None:
        if self._around.release(watch.previous) is None or self._around.release(watch.active) is None:
            self.feed(BaselineLost("unavailable", "what is known of it is damaged"), now)
            return
        seed = self._around.rng.getrandbits(32)
        judge = WatchJudge(JudgeSettings(), watch.ratio, seed)
        child = self._start_trial(watch.previous, watch.active, seed, interval_s=self._settings.watch_interval_s)
        if child is None:
            self._unbegun = (now + BEGIN_AGAIN_S, watch)
            return
        self._comparison = Comparison(
            child,
            judge,
            old=watch.previous.digest,
            new=watch.active.digest,
            limit_s=self._settings.watch_seconds,
            throttled=self._around.throttled,
            now=now,
        )

    def _start_trial(self, old: ModelRef, new: ModelRef, seed: int, interval_s: float) -> Child[FromTrial] | None:
        """Run two models side by side, whose releases are known; `None` if no process can be started now."""
        self._end_comparison()
        old_release, new_release = self._around.release(old), self._around.release(new)
        old_file, new_file = self._around.model_file(old), self._around.model_file(new)
        assert old_release is not None, "the callers have looked"
        assert new_release is not None, "the callers have looked"
        assert old_file is not None, "its release is known"
        assert new_file is not None, "its release is known"
        same = old_release.inputs == new_release.inputs
        self._shared_length = math.prod(old_release.inputs[0].shape) if same else None
        old_inputs = new_inputs = self._recent_inputs()
        if not old_inputs:
            count = min(len(old_release.golden.inputs), len(new_release.golden.inputs))
            old_inputs = [_packed(vector) for vector in old_release.golden.inputs[:count]]
            new_inputs = [_packed(vector) for vector in new_release.golden.inputs[:count]]
        if not old_inputs:
            old_inputs = [_zeros(old_release)]
            new_inputs = [_zeros(new_release)]
        assignment = TrialAssignment(
            old=old_file,
            new=new_file,
            threads=self._settings.threads,
            seed=seed,
            duty=self._settings.trial_duty,
            interval_s=interval_s,
            memory_bytes=MODEL_MEMORY_BYTES,
            old_inputs=old_inputs,
            new_inputs=new_inputs,
        )
        try:
            return self._around.start_trial(assignment)
        except Unavailable as error:
            log.error("%s", error)
            return None

    def _recent_inputs(self) -> list[bytes]:
        """The newest states that both models of the comparison take, as many as fit one message."""
        if self._shared_length is None:
            return []
        size = FLOAT_BYTES * self._shared_length
        fitting = [features for features in self._recent if len(features) == size]
        return fitting[-max(RECENT_BYTES // size, 1) :]

    def _end_comparison(self) -> None:
        self._unbegun = None
        if self._comparison is not None:
            self._comparison.stop()
            self._comparison = None

    def _conclude(self, comparison: Comparison, now: float) -> None:
        """Tell the machine how a trial or a watch ended."""
        self._comparison = None
        comparison.stop()
        state = self.state
        watching = isinstance(state, Watch)
        if comparison.failure is not None:
            reason, text = comparison.failure
            self.feed(ModelLost(comparison.new, text) if reason in LOST_MODEL else TrialFailed(reason, text), now)
        elif comparison.baseline_failure is not None:
            reason, text = comparison.baseline_failure
            lost = reason in LOST_MODEL and not watching
            self.feed(ModelLost(comparison.old, text) if lost else BaselineLost(reason, text), now)
        elif comparison.died:
            self.feed(TrialDied(), now)
        elif watching:
            self.feed(WatchAlarmed(comparison.verdict()) if comparison.decided else WatchQuieted(), now)
        else:
            self.feed(_trial_ended(comparison.verdict()), now)

    # What the workers say.

    def _served(self, records: Records) -> None:
        self._around.record(records)
        self._recent.extend(served.features for served in records.served if served.features)

    def _beat(self, beat: Beat) -> None:
        self._answered += beat.answered
        self._errors.update(beat.errors)
        self._latencies.merge(beat.latency_us_histogram)

    def _worker_died(self, death: Death, now: float) -> None:
        self._around.report(
            Event(
                at=self._around.wall_clock(),
                kind="worker_died",
                slot=self.name,
                model=death.digest or "",
                reason="worker_died",
                text=f"a worker of {self.name} ended: {death.how}",
            )
        )
        if death.digest is not None:
            lost = death.model_lost
            self.feed(ModelLost(death.digest, death.how) if lost else WorkerDied(death.digest), now)


def _trial_ended(verdict: Verdict) -> deployment.Event:
    if verdict.outcome == "commit":
        return TrialPassed(verdict)
    return TrialRegressed(verdict) if verdict.outcome == "rollback" else TrialInconclusive(verdict)


def _sentence(report: Report) -> str:
    """What happened, with the numbers."""
    parts = [f"version {report.model.version} {_SAID[report.kind]}"]
    if report.text:
        parts.append(report.text)
    verdict = report.verdict
    if verdict is not None:
        parts.append(
            f"{verdict.pairs} pairs, evidence {verdict.evidence:.3g}, median ratio {verdict.ratio_median:.2f}, "
            f"old p50/p99 {verdict.old_us_p50:.0f}/{verdict.old_us_p99:.0f} µs, "
            f"new {verdict.new_us_p50:.0f}/{verdict.new_us_p99:.0f} µs"
        )
    return ": ".join(parts)


def _zeros(release: Release) -> bytes:
    return bytes(FLOAT_BYTES * math.prod(release.inputs[0].shape))


def _packed(vector: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)
