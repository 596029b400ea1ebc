"""One slot: its deployment state, its workers, its trial or watch.

The deployment machine decides, this object carries out. A new state is on disk before its actions run, and who serves
follows from the state alone: the workers are told what the state says is active, and make it so.
"""

from __future__ import annotations

import logging
import math
import secrets
import struct
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_agent import children, deployment
from edge_agent.children import Beat, Child, FromTrial, FromWorker, ModelFile, Records, TrialAssignment
from edge_agent.comparison import Comparison
from edge_agent.deployment import (
    BaselineLost,
    BeginTrial,
    BeginWatch,
    EndTrial,
    EndWatch,
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
from edge_agent.handover import Handover
from edge_agent.histogram import Histogram
from edge_agent.judge import JudgeSettings, TrialJudge, WatchJudge
from edge_agent.settings import SlotSettings
from edge_agent.state import StateStore
from protocol.errors import Unavailable
from protocol.messages import Event, ModelRef, SlotCounters, SlotStatus, Verdict
from protocol.release import Release

log = logging.getLogger(__name__)

RECENT_STATES = 256
RECENT_BYTES = 1024 * 1024
MAX_UNDECIDED = 64
SAVE_AGAIN_S = 1.0
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
}


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a slot needs of the rest of the daemon.

    Attributes:
        state: Where its state is kept.
        model_file: Where a verified model lies, and how it is asked; `None` if its release is not known.
        release: The verified release of a digest.
        start_worker: Starts a worker of this slot.
        stage: Has a model staged.
        cancel: Stops that.
        report: Takes a line of the audit trail.
        record: Takes what was served.
        throttled: Whether the device is throttling now.
        wall_clock: Seconds since the epoch.
    """

    state: StateStore
    model_file: Callable[[str], ModelFile | None]
    release: Callable[[str], Release | None]
    start_worker: Callable[[ModelFile | None], Child[FromWorker]]
    stage: Callable[[str], None]
    cancel: Callable[[str], None]
    report: Callable[[Event], None]
    record: Callable[[Records], None]
    throttled: Callable[[], bool]
    wall_clock: Callable[[], float]


class Slot:
    """One slot of this device.

    Args:
        name: Its name.
        settings: Of this slot.
        around: The rest of the daemon.
        clean: Whether the daemon's last run ended on purpose.
    """

    def __init__(self, name: str, settings: SlotSettings, around: Surroundings, *, clean: bool) -> None:
        self.name = name
        self._settings = settings
        self._around = around
        self._clean = clean
        self._comparison: Comparison | None = None
        self._shared_length: int | None = None
        self._undecided: deque[deployment.Event] = deque()
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
        saved = around.state.load(name)
        self.state: deployment.State = deployment.initial() if saved is None else deployment.decode(saved)

    def begin(self, now: float) -> None:
        """Take up what was going on when the daemon last ended."""
        self.feed(deployment.DaemonRestarted(clean=self._clean), now)

    def offer(self, model: ModelRef, now: float) -> None:
        """A verified release names a model this slot should have."""
        self.feed(deployment.ReleaseOffered(model), now)

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
        if self._comparison is not None:
            self._comparison.tick(now, self._recent_inputs)
            if self._comparison.ended:
                self._conclude(self._comparison, now)

    def pinned(self) -> set[str]:
        """Digests of the models the store must keep."""
        return set(deployment.pinned(self.state))

    def stop(self, now: float) -> None:
        """End trial and workers; the state stays."""
        self._end_comparison()
        self.workers.stop(now)

    @property
    def ready(self) -> bool:
        """Whether states are answered with the active model."""
        active, serving = self.state.active, self.workers.serving
        return active is not None and serving is not None and serving.digest == active.digest and serving.connected

    def status(self, progress: Mapping[str, float]) -> SlotStatus:
        """For the status message."""
        state = self.state
        candidate = state.candidate if isinstance(state, Staging | Trial) else None
        return SlotStatus(
            phase=type(state).__name__.lower(),
            ready=self.ready,
            active=state.active,
            previous=state.previous,
            candidate=candidate,
            progress=progress.get(candidate.digest) if candidate else None,
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

    def _serve_active(self) -> None:
        active = self.state.active
        self.workers.want(self._around.model_file(active.digest) if active else None)

    def _carry_out(self, action: deployment.Action, now: float) -> None:
        match action:
            case Stage(model=model):
                self._around.stage(model.digest)
            case StopStaging(model=model):
                self._around.cancel(model.digest)
            case BeginTrial(active=active, candidate=candidate):
                self._begin_trial(active, candidate, now)
            case BeginWatch():
                self._begin_watch(action, now)
            case EndTrial() | EndWatch():
                self._end_comparison()
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

    def _begin_trial(self, active: ModelRef, candidate: ModelRef, now: float) -> None:
        if self._around.release(active.digest) is None:
            self.feed(BaselineLost("unavailable", f"the release of version {active.version} is damaged"), now)
            return
        seed = secrets.randbits(32)
        judge = TrialJudge(JudgeSettings(max_pairs=self._settings.trial_max_pairs), seed)
        child = self._start_trial(active, candidate, seed, interval_s=0.0)
        if child is None:
            self.feed(TrialInconclusive(judge.verdict()), now)
            return
        self._comparison = Comparison(
            child, judge, limit_s=self._settings.trial_seconds, throttled=self._around.throttled, now=now
        )

    def _begin_watch(self, watch: BeginWatch, now: float) -> None:
        seed = secrets.randbits(32)
        judge = WatchJudge(JudgeSettings(), watch.ratio, seed)
        child = self._start_trial(watch.previous, watch.active, seed, interval_s=self._settings.watch_interval_s)
        if child is None:
            self.feed(BaselineLost("unavailable", "what is known of it is lost, or no process can be started"), now)
            return
        self._comparison = Comparison(
            child, judge, limit_s=self._settings.watch_seconds, throttled=self._around.throttled, now=now
        )

    def _start_trial(self, old: ModelRef, new: ModelRef, seed: int, interval_s: float) -> Child[FromTrial] | None:
        """Run two models side by side; `None` if what was known of one is lost, or no process can be started."""
        self._end_comparison()
        old_release, new_release = self._around.release(old.digest), self._around.release(new.digest)
        old_file, new_file = self._around.model_file(old.digest), self._around.model_file(new.digest)
        if old_release is None or new_release is None or old_file is None or new_file is None:
            log.error(
                "%s: the release of version %d or %d is damaged: no comparison", self.name, old.version, new.version
            )
            return None
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
            old_inputs=old_inputs,
            new_inputs=new_inputs,
        )
        try:
            return children.start("trial", assignment, FromTrial, f"trial of {self.name}")
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
            self.feed(TrialFailed(*comparison.failure), now)
        elif comparison.baseline_failure is not None:
            self.feed(BaselineLost(*comparison.baseline_failure), now)
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

    def _worker_died(self, digest: str | None, how: str, now: float) -> None:
        self._around.report(
            Event(
                at=self._around.wall_clock(),
                kind="worker_died",
                slot=self.name,
                model=digest or "",
                reason="worker_died",
                text=f"a worker of {self.name} ended: {how}",
            )
        )
        if digest is not None:
            self.feed(WorkerDied(digest), now)


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
