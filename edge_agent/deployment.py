"""What a slot serves, stages, tries and watches: a table of transitions.

    Serving ──► Staging ──► Trial ──► Watch ──► Serving, now of the new model

`step(state, event)` looks up the row for the pair and returns the next state with what is to be done. Everything that
affects a slot's deployment lives here; nothing here reads a clock, a disk or a socket. The caller makes the new state
durable *before* it carries out the actions. Which model is served is no action: it is always `state.active`, and the
caller reconciles.

**Rows.** A row names a state, an event, the states it may go to, what it does and, with `when`, on which condition;
where the condition does not hold, nothing changes. Conditions say that an event is not stale: what the stager says is
about the present candidate, an offer is newer than everything that was dealt with. Every pair is listed, also those
that change nothing; one that is not is our own bug and raises `UnexpectedEvent`.

**Late words.** While a full disk delays the saving of a state, events queue up: an offer that ends a trial, and behind
it the verdict of that trial. So a verdict may meet any state, and means nothing where its trial or watch is over.

**Versions.** `newest` is the highest version that met its end: committed, refused or inconclusive. Only a version above
it is staged, so versions fall only by rollback, and a refused model comes back only under a higher version. A postponed
one did not meet its end: it may be offered again.

**Deaths.** A model that kills what runs it gets one more chance, no third. In a trial and in a watch the daemon's own
unclean end counts as a death, since a model may have caused it.

**The first model** of a slot is committed without a trial: there is nothing to compare it with.
The same holds where the old model is lost in a trial, so that a slot whose active model cannot be loaded is rescued by
the next release. Where it is lost in a watch, the new model stays: it has passed its trial.

**An offer during a watch** ends the watch. The watched model has passed its trial, and the newer one is compared with
it; a host that publishes faster than devices watch gives up the watch's protection, not the trial's.

**An operator's signed wish** goes before all that. What is pinned is served without a trial, also if it is older or was
refused for being slow, but not if it does not work; `newest` then is its version, so that after the pin newer ones are
offered again. A version that is withdrawn is rolled back and refused; where there is nothing to go back to it stays,
since something must be served.

**A model whose bytes are lost** is not to blame for it. The one before is served, or for want of one nothing, and what
was lost may be staged again at its version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from protocol.errors import Misconfigured
from protocol.messages import Event as AuditEvent
from protocol.messages import ModelRef, Verdict

MAX_REFUSALS = 16
MAX_DEATHS = 2
SLOWER, WITHDRAWN = "slower", "withdrawn"
OVERRULED = frozenset({SLOWER, WITHDRAWN})
NO_VERSION = -1


# States.


class Refusal(Struct, frozen=True):
    """A model that is not to be staged again at this version or a lower one, and why."""

    digest: str
    version: int
    reason: str


class Standing(Struct, frozen=True, kw_only=True, tag_field="phase", tag=str.lower):
    """What every state carries.

    Attributes:
        active: What is served; `None` until there was a first model.
        previous: What was served before it.
        refused: The newest `MAX_REFUSALS` refusals, the oldest first.
        newest: The highest version that met its end; -1 before the first.
    """

    active: ModelRef | None = None
    previous: ModelRef | None = None
    refused: tuple[Refusal, ...] = ()
    newest: int = NO_VERSION


class Serving(Standing, frozen=True, kw_only=True):
    """The active model is served, and no change is under way."""


class Staging(Standing, frozen=True, kw_only=True):
    """A candidate is fetched and qualified.

    Attributes:
        candidate: Which one.
        deaths: How often it killed the stager.
        pinned: Whose wish it is that it be served without a trial; empty if nobody's.
    """

    candidate: ModelRef
    deaths: int = 0
    pinned: str = ""


class Trial(Standing, frozen=True, kw_only=True):
    """The candidate runs beside the active model.

    Attributes:
        candidate: Which one.
        deaths: How often the trial or the daemon died of it.
    """

    active: ModelRef
    candidate: ModelRef
    deaths: int = 0


class Watch(Standing, frozen=True, kw_only=True):
    """The new model is served (`active`), the old one (`previous`) still runs beside it now and then.

    Attributes:
        ratio: New to old at commit, at least 1: what the watch compares with.
        deaths: How often a worker, the watch or the daemon died of the new one.
    """

    active: ModelRef
    previous: ModelRef
    ratio: float = 1.0
    deaths: int = 0


State: TypeAlias = Serving | Staging | Trial | Watch


# Events.


class ReleaseOffered(Struct, frozen=True):
    """Verified metadata names a model this slot should have."""

    model: ModelRef


class ModelStaged(Struct, frozen=True):
    """The candidate is in the store, verified and qualified."""

    digest: str


class ModelRefused(Struct, frozen=True):
    """The candidate is bad for ever."""

    digest: str
    reason: str
    text: str = ""


class StagingPostponed(Struct, frozen=True):
    """The world was not ready (broker, disk, host). The candidate is not to blame, and is offered again later."""

    digest: str
    reason: str
    text: str = ""


class StagerDied(Struct, frozen=True):
    """The stager ended while it worked on this model; `how`, in words."""

    digest: str
    how: str = ""


class ReleasePinned(Struct, frozen=True):
    """A signed wish names the model this slot must have; `text` says whose, and is not empty."""

    model: ModelRef
    text: str


class VersionWithdrawn(Struct, frozen=True):
    """A signed wish says that this version must not be served; `text` says whose."""

    version: int
    text: str = ""


class ModelLost(Struct, frozen=True):
    """The bytes of a model that was here are missing, unreadable or rotten."""

    digest: str
    text: str = ""


class TrialPassed(Struct, frozen=True):
    """The judge says commit."""

    verdict: Verdict


class TrialRegressed(Struct, frozen=True):
    """The judge says roll back."""

    verdict: Verdict


class TrialInconclusive(Struct, frozen=True):
    """The trial used up its pairs or its time."""

    verdict: Verdict


class TrialFailed(Struct, frozen=True):
    """The new model raised an error or gave numbers that are not finite, in trial or in watch."""

    reason: str
    text: str = ""


class TrialDied(Struct, frozen=True):
    """The process that runs both models ended by itself, in trial or in watch."""


class BaselineLost(Struct, frozen=True):
    """The old model cannot be loaded or run, in trial or in watch: there is nothing to compare with."""

    reason: str
    text: str = ""


class WorkerDied(Struct, frozen=True):
    """A worker that served this model ended by itself."""

    digest: str


class WatchAlarmed(Struct, frozen=True):
    """The new model has become slower."""

    verdict: Verdict


class WatchQuieted(Struct, frozen=True):
    """The watch's time passed without an alarm."""


class DaemonRestarted(Struct, frozen=True):
    """The daemon has begun anew; `clean` says whether it had ended on purpose."""

    clean: bool


Event: TypeAlias = (
    ReleaseOffered
    | ReleasePinned
    | VersionWithdrawn
    | ModelLost
    | ModelStaged
    | ModelRefused
    | StagingPostponed
    | StagerDied
    | TrialPassed
    | TrialRegressed
    | TrialInconclusive
    | TrialFailed
    | TrialDied
    | BaselineLost
    | WorkerDied
    | WatchAlarmed
    | WatchQuieted
    | DaemonRestarted
)


# Actions.


class Stage(Struct, frozen=True):
    """Fetch and qualify a model; what is there already need not be fetched again."""

    model: ModelRef


class StopStaging(Struct, frozen=True):
    """Stop fetching a model."""

    model: ModelRef


class BeginTrial(Struct, frozen=True):
    """Run both models side by side."""

    active: ModelRef
    candidate: ModelRef


class EndTrial(Struct, frozen=True):
    """Stop the trial without a verdict."""


class BeginWatch(Struct, frozen=True):
    """Run both models side by side now and then; `ratio` is what is normal for them."""

    active: ModelRef
    previous: ModelRef
    ratio: float


class EndWatch(Struct, frozen=True):
    """Stop the watch without a verdict."""


class LookAgain(Struct, frozen=True):
    """Verify the kept metadata again, so that what was lost is offered anew."""


class Report(Struct, frozen=True):
    """Write a line of the audit trail.

    Attributes:
        kind: `staged`, `postponed`, `superseded`, `trial`, `inconclusive`, `refused`, `committed`, `confirmed`,
            `unwatched`, `rolled_back`, `pinned` or `lost`.
        model: Which model it is about.
        reason: A stable word for programs.
        text: For people, where there is more to say.
        verdict: The judge's, where one was given.
    """

    kind: str
    model: ModelRef
    reason: str = ""
    text: str = ""
    verdict: Verdict | None = None


Action: TypeAlias = Stage | StopStaging | BeginTrial | EndTrial | BeginWatch | EndWatch | LookAgain | Report


class Step(NamedTuple):
    """The next state, to be made durable, and then what to do, in this order."""

    state: State
    actions: tuple[Action, ...] = ()


# Conditions.


def newer(state: State, event: ReleaseOffered) -> bool:
    """Whether an offer is above everything that was dealt with or is under way, and is not what is served already."""
    offered = event.model
    under_way = state.candidate.version if isinstance(state, Staging | Trial) else NO_VERSION
    refused_at = [refusal.version for refusal in state.refused if refusal.digest == offered.digest]
    is_active = state.active is not None and state.active.digest == offered.digest
    return not is_active and offered.version > max(state.newest, under_way, *refused_at)


def of_candidate(state: Staging, event: ModelStaged | ModelRefused | StagingPostponed | StagerDied) -> bool:
    """Whether what the stager says is about the present candidate, and not about one that was replaced."""
    return event.digest == state.candidate.digest


def of_active(state: Watch, event: WorkerDied) -> bool:
    """Whether the worker served the new model, and not the old one on its way out."""
    return event.digest == state.active.digest


def works(state: State, event: ReleasePinned) -> bool:
    """Whether what is pinned was not found to be broken. An operator may overrule the judge, not the laws of nature."""
    return not any(
        refusal.digest == event.model.digest and refusal.reason not in OVERRULED for refusal in state.refused
    )


def is_concerned(state: State, event: VersionWithdrawn) -> bool:
    """Whether this version is served and there is one to go back to, or it is under way."""
    is_active = state.active is not None and state.active.version == event.version and state.previous is not None
    return is_active or (isinstance(state, Staging | Trial) and state.candidate.version == event.version)


def is_needed(state: State, event: ModelLost) -> bool:
    """Whether what is lost is served or tried; a candidate that is being staged is fetched anyway."""
    is_active = state.active is not None and state.active.digest == event.digest
    return is_active or (isinstance(state, Trial) and state.candidate.digest == event.digest)


# What the rows do.


def stay(state: State, _event: Event) -> Step:
    """Change nothing."""
    return Step(state)


def stage(state: Serving, event: ReleaseOffered) -> Step:
    """Make what is offered the candidate."""
    return Step(_staging(state, event.model), (Stage(event.model),))


def stage_instead(state: Staging, event: ReleaseOffered) -> Step:
    """Replace the candidate by a newer one."""
    superseded = Report("superseded", state.candidate)
    return Step(_staging(state, event.model), (StopStaging(state.candidate), superseded, Stage(event.model)))


def stage_after_trial(state: Trial, event: ReleaseOffered) -> Step:
    """Give up a trial for a newer candidate."""
    return Step(_staging(state, event.model), (EndTrial(), Report("superseded", state.candidate), Stage(event.model)))


def stage_after_watch(state: Watch, event: ReleaseOffered) -> Step:
    """Give up a watch for a newer candidate."""
    return Step(_staging(state, event.model), (EndWatch(), Stage(event.model)))


def stage_again(state: Staging, _event: DaemonRestarted) -> Step:
    """Resume with what is on disk."""
    return Step(state, (Stage(state.candidate),))


def try_or_commit(state: Staging, _event: ModelStaged) -> Step:
    """Compare the candidate with what is served, or take it if nothing is."""
    staged = Report("staged", state.candidate)
    if state.pinned:
        pinned = Report("pinned", state.candidate, text=state.pinned)
        # The pin may have been lifted meanwhile, and what was offered then was not above `newest` yet.
        return Step(_pinned(state, state.candidate), (staged, pinned, LookAgain()))
    if state.active is None:
        first = Report("committed", state.candidate, "first_model")
        return Step(_serving(state, state.candidate, None, state.candidate.version), (staged, first))
    trial = Trial(
        active=state.active,
        previous=state.previous,
        refused=state.refused,
        newest=state.newest,
        candidate=state.candidate,
    )
    return Step(trial, (staged, Report("trial", state.candidate), BeginTrial(trial.active, trial.candidate)))


def refuse_staged(state: Staging, event: ModelRefused) -> Step:
    """Put the candidate on the refusal list, for the stager's reason."""
    return _refuse(state, Report("refused", state.candidate, event.reason, event.text))


def postpone(state: Staging, event: StagingPostponed) -> Step:
    """Let the candidate go without blame."""
    report = Report("postponed", state.candidate, event.reason, event.text)
    return Step(_serving(state, state.active, state.previous), (report,))


def count_stager_death(state: Staging, event: StagerDied) -> Step:
    """Stage the candidate once more, or refuse it."""
    deaths = state.deaths + 1
    if deaths < MAX_DEATHS:
        return Step(replace(state, deaths=deaths), (Stage(state.candidate),))
    return _refuse(state, Report("refused", state.candidate, "died_twice", f"it killed the stager twice: {event.how}"))


def commit(state: Trial, event: TrialPassed) -> Step:
    """Serve the candidate, and watch it."""
    watch = Watch(
        active=state.candidate,
        previous=state.active,
        refused=state.refused,
        newest=max(state.newest, state.candidate.version),
        # Rolling back to a model that is slower still would help nobody, however much faster the new one once was.
        ratio=max(1.0, event.verdict.ratio_median),
    )
    return Step(watch, (Report("committed", watch.active, "passed", verdict=event.verdict), _begin_watch(watch)))


def refuse_slower(state: Trial, event: TrialRegressed) -> Step:
    """Keep what is served: the candidate is slower."""
    return _refuse(state, Report("refused", state.candidate, SLOWER, verdict=event.verdict))


def refuse_failed(state: Trial, event: TrialFailed) -> Step:
    """Keep what is served: the candidate does not work."""
    return _refuse(state, Report("refused", state.candidate, event.reason, event.text))


def keep_active(state: Trial, event: TrialInconclusive) -> Step:
    """Keep what is served: the candidate was not shown to be as good. It is not refused, but was dealt with."""
    report = Report("inconclusive", state.candidate, "inconclusive", verdict=event.verdict)
    return Step(_serving(state, state.active, state.previous, state.candidate.version), (report,))


def commit_unopposed(state: Trial, event: BaselineLost) -> Step:
    """Serve the candidate, as a first model: what is served cannot be run."""
    report = Report("committed", state.candidate, "nothing_to_compare", event.text)
    return Step(_serving(state, state.candidate, None, state.candidate.version), (report,))


def count_trial_death(state: Trial, _event: TrialDied | DaemonRestarted) -> Step:
    """Try the candidate once more from the beginning, or refuse it."""
    deaths = state.deaths + 1
    if deaths < MAX_DEATHS:
        return Step(replace(state, deaths=deaths), (BeginTrial(state.active, state.candidate),))
    return _refuse(
        state, Report("refused", state.candidate, "died_twice", "its trial died twice, by itself or with the daemon")
    )


def restart_trial(state: Trial, event: DaemonRestarted) -> Step:
    """Begin the trial anew; an unclean end counts as a death."""
    if event.clean:
        return Step(state, (BeginTrial(state.active, state.candidate),))
    return count_trial_death(state, event)


def count_worker_death(state: Watch, _event: WorkerDied) -> Step:
    """Note it, the worker is replaced anyway; or roll back."""
    return _count_watch_death(state, ())


def count_watch_death(state: Watch, _event: TrialDied | DaemonRestarted) -> Step:
    """Begin the watch anew, or roll back."""
    return _count_watch_death(state, (_begin_watch(state),))


def restart_watch(state: Watch, event: DaemonRestarted) -> Step:
    """Begin the watch anew; an unclean end counts as a death."""
    if event.clean:
        return Step(state, (_begin_watch(state),))
    return count_watch_death(state, event)


def roll_back_slower(state: Watch, event: WatchAlarmed) -> Step:
    """Serve the old model again: the new one is slower."""
    return _roll_back(state, Report("rolled_back", state.active, SLOWER, verdict=event.verdict))


def roll_back_failed(state: Watch, event: TrialFailed) -> Step:
    """Serve the old model again: the new one does not work."""
    return _roll_back(state, Report("rolled_back", state.active, event.reason, event.text))


def confirm(state: Watch, _event: WatchQuieted) -> Step:
    """End the watch; the old model is kept."""
    return Step(_serving(state, state.active, state.previous), (Report("confirmed", state.active),))


def end_unwatched(state: Watch, event: BaselineLost) -> Step:
    """End the watch without confirming the new model: the old one cannot be run."""
    return Step(
        _serving(state, state.active, state.previous), (Report("unwatched", state.active, event.reason, event.text),)
    )


def obey_pin(state: State, event: ReleasePinned) -> Step:
    """Serve what is pinned: at once if it is here, else once it is staged."""
    model = event.model
    if isinstance(state, Staging) and state.candidate == model:
        return Step(replace(state, pinned=event.text))
    if state.active == model and isinstance(state, Serving | Watch):
        return Step(state)
    if state.active == model:
        return Step(_serving(state, state.active, state.previous), _abandon(state))
    if model in (state.previous, state.candidate if isinstance(state, Trial) else None):
        abandoned = _abandon(state, but=model)
        return Step(_pinned(state, model), (*abandoned, Report("pinned", model, text=event.text)))
    return Step(replace(_staging(state, model), pinned=event.text), (*_abandon(state), Stage(model)))


def withdraw(state: State, event: VersionWithdrawn) -> Step:
    """Roll back what is served, or give up what is under way."""
    if isinstance(state, Staging | Trial) and state.candidate.version == event.version:
        step = _refuse(state, Report("refused", state.candidate, WITHDRAWN, event.text))
        return Step(step.state, (*_abandon(state, but=state.candidate), *step.actions))
    assert state.active is not None, "the row's condition"
    report = Report("rolled_back", state.active, WITHDRAWN, event.text)
    if isinstance(state, Watch):
        return _roll_back(state, report)
    step = _fall_back(state, report)
    return Step(replace(step.state, refused=_refused(state, report)), (*step.actions, LookAgain()))


def replace_lost(state: State, event: ModelLost) -> Step:
    """Serve the model before, and have what was lost staged again."""
    if isinstance(state, Trial) and state.candidate.digest == event.digest:
        return Step(_staging(state, state.candidate), (EndTrial(), Stage(state.candidate)))
    assert state.active is not None, "the row's condition"
    report = Report("lost", state.active, "corrupt_model", event.text)
    if isinstance(state, Trial) and state.previous is None:
        step = commit_unopposed(state, BaselineLost(report.reason, report.text))
        return Step(step.state, (EndTrial(), report, *step.actions))
    step = _fall_back(state, report)
    offered_again = min(state.newest, state.active.version - 1)
    return Step(replace(step.state, newest=offered_again), (*step.actions, LookAgain()))


def _fall_back(state: State, report: Report) -> Step:
    """The same with the previous model active, which may be none."""
    if isinstance(state, Watch):
        return Step(_serving(state, state.previous, None), (EndWatch(), report))
    if isinstance(state, Trial):
        assert state.previous is not None, "the callers' condition"
        retried = Trial(active=state.previous, refused=state.refused, newest=state.newest, candidate=state.candidate)
        return Step(retried, (report, BeginTrial(retried.active, retried.candidate)))
    return Step(replace(state, active=state.previous, previous=None), (report,))


def _abandon(state: State, but: ModelRef | None = None) -> tuple[Action, ...]:
    """What ends whatever is under way; a candidate other than `but` is superseded."""
    if isinstance(state, Staging):
        superseded = () if state.candidate == but else (Report("superseded", state.candidate),)
        return (StopStaging(state.candidate), *superseded)
    if isinstance(state, Trial):
        superseded = () if state.candidate == but else (Report("superseded", state.candidate),)
        return (EndTrial(), *superseded)
    return (EndWatch(),) if isinstance(state, Watch) else ()


def _pinned(state: State, model: ModelRef) -> Serving:
    return Serving(active=model, previous=state.active, refused=state.refused, newest=model.version)


def _staging(state: State, candidate: ModelRef) -> Staging:
    return Staging(
        active=state.active, previous=state.previous, refused=state.refused, newest=state.newest, candidate=candidate
    )


def _serving(state: State, active: ModelRef | None, previous: ModelRef | None, dealt_with: int = NO_VERSION) -> Serving:
    return Serving(active=active, previous=previous, refused=state.refused, newest=max(state.newest, dealt_with))


def _refuse(state: Staging | Trial, report: Report) -> Step:
    serving = _serving(state, state.active, state.previous, state.candidate.version)
    return Step(replace(serving, refused=_refused(state, report)), (report,))


def _roll_back(state: Watch, report: Report) -> Step:
    serving = _serving(state, state.previous, None)
    # What is served now may have been withdrawn while it was not.
    return Step(replace(serving, refused=_refused(state, report)), (EndWatch(), report, LookAgain()))


def _refused(state: State, report: Report) -> tuple[Refusal, ...]:
    refusal = Refusal(report.model.digest, report.model.version, report.reason)
    return (*state.refused, refusal)[-MAX_REFUSALS:]


def _count_watch_death(state: Watch, retry: tuple[Action, ...]) -> Step:
    deaths = state.deaths + 1
    if deaths < MAX_DEATHS:
        return Step(replace(state, deaths=deaths), retry)
    return _roll_back(
        state, Report("rolled_back", state.active, "died_twice", "its worker, its watch or the daemon died twice")
    )


def _begin_watch(state: Watch) -> BeginWatch:
    return BeginWatch(state.active, state.previous, state.ratio)


# The table.

S = TypeVar("S", bound=State)
E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Row(Generic[S, E]):
    """One line of the table: in `state`, on `event`, if `when` holds, `do`, and go to one of `goes_to`."""

    state: type[S]
    event: type[E]
    goes_to: tuple[type[State], ...]
    do: Callable[[S, E], Step]
    when: Callable[[S, E], bool] | None = None


OF_STAGER = (ModelStaged, ModelRefused, StagingPostponed, StagerDied)
OF_TRIAL = (TrialPassed, TrialRegressed, TrialInconclusive)
OF_WATCH = (WatchAlarmed, WatchQuieted)
OF_EITHER = (TrialFailed, TrialDied, BaselineLost)

# What is late, or does not concern the state.
WITHOUT_EFFECT: tuple[tuple[type[State], tuple[type[Event], ...]], ...] = (
    (Serving, (*OF_STAGER, *OF_TRIAL, *OF_WATCH, *OF_EITHER, WorkerDied, DaemonRestarted)),
    (Staging, (*OF_TRIAL, *OF_WATCH, *OF_EITHER, WorkerDied)),
    (Trial, (*OF_STAGER, *OF_WATCH, WorkerDied)),
    (Watch, (*OF_STAGER, *OF_TRIAL)),
)

ROWS: tuple[Row[Any, Any], ...] = (
    Row(Serving, ReleaseOffered, (Staging,), stage, newer),
    Row(Staging, ReleaseOffered, (Staging,), stage_instead, newer),
    Row(Staging, ModelStaged, (Trial, Serving), try_or_commit, of_candidate),
    Row(Staging, ModelRefused, (Serving,), refuse_staged, of_candidate),
    Row(Staging, StagingPostponed, (Serving,), postpone, of_candidate),
    Row(Staging, StagerDied, (Staging, Serving), count_stager_death, of_candidate),
    Row(Staging, DaemonRestarted, (Staging,), stage_again),
    Row(Trial, TrialPassed, (Watch,), commit),
    Row(Trial, TrialRegressed, (Serving,), refuse_slower),
    Row(Trial, TrialInconclusive, (Serving,), keep_active),
    Row(Trial, TrialFailed, (Serving,), refuse_failed),
    Row(Trial, TrialDied, (Trial, Serving), count_trial_death),
    Row(Trial, BaselineLost, (Serving,), commit_unopposed),
    Row(Trial, DaemonRestarted, (Trial, Serving), restart_trial),
    Row(Trial, ReleaseOffered, (Staging,), stage_after_trial, newer),
    Row(Watch, WatchQuieted, (Serving,), confirm),
    Row(Watch, WatchAlarmed, (Serving,), roll_back_slower),
    Row(Watch, TrialFailed, (Serving,), roll_back_failed),
    Row(Watch, WorkerDied, (Watch, Serving), count_worker_death, of_active),
    Row(Watch, TrialDied, (Watch, Serving), count_watch_death),
    Row(Watch, BaselineLost, (Serving,), end_unwatched),
    Row(Watch, DaemonRestarted, (Watch, Serving), restart_watch),
    Row(Watch, ReleaseOffered, (Staging,), stage_after_watch, newer),
    Row(Serving, ReleasePinned, (Serving, Staging), obey_pin, works),
    Row(Staging, ReleasePinned, (Serving, Staging), obey_pin, works),
    Row(Trial, ReleasePinned, (Serving, Staging), obey_pin, works),
    Row(Watch, ReleasePinned, (Watch, Serving, Staging), obey_pin, works),
    Row(Serving, VersionWithdrawn, (Serving,), withdraw, is_concerned),
    Row(Staging, VersionWithdrawn, (Staging, Serving), withdraw, is_concerned),
    Row(Trial, VersionWithdrawn, (Trial, Serving), withdraw, is_concerned),
    Row(Watch, VersionWithdrawn, (Serving,), withdraw, is_concerned),
    Row(Serving, ModelLost, (Serving,), replace_lost, is_needed),
    Row(Staging, ModelLost, (Staging,), replace_lost, is_needed),
    Row(Trial, ModelLost, (Trial, Staging, Serving), replace_lost, is_needed),
    Row(Watch, ModelLost, (Serving,), replace_lost, is_needed),
    *(Row(state, event, (state,), stay) for state, events in WITHOUT_EFFECT for event in events),
)


class UnexpectedEvent(LookupError):
    """No row lists this event in this state: a bug of ours."""


Table: TypeAlias = dict[tuple[type[State], type[Event]], Row[Any, Any]]


def indexed(rows: tuple[Row[Any, Any], ...]) -> Table:
    """The rows by state and event.

    Raises:
        ValueError: Two rows are for the same pair.
    """
    table: Table = {}
    for row in rows:
        if (row.state, row.event) in table:
            raise ValueError(f"two rows for {row.event.__name__} in {row.state.__name__}")
        table[row.state, row.event] = row
    return table


_TABLE = indexed(ROWS)


def step(state: State, event: Event) -> Step:
    """Take one event.

    Raises:
        UnexpectedEvent: No row lists the pair.
    """
    row = _TABLE.get((type(state), type(event)))
    if row is None:
        raise UnexpectedEvent(f"no row for {type(event).__name__} in {type(state).__name__}")
    if row.when is not None and not row.when(state, event):
        return Step(state)
    taken = row.do(state, event)
    assert isinstance(taken.state, row.goes_to), f"{type(taken.state).__name__} is not where this row goes: {row}"
    return taken


def initial() -> State:
    """A slot that never had a model."""
    return Serving()


def needed(state: State) -> frozenset[ModelRef]:
    """The models that the store must keep."""
    candidate = state.candidate if isinstance(state, Staging | Trial) else None
    return frozenset(model for model in (state.active, state.previous, candidate) if model is not None)


def recovered(events: Iterable[AuditEvent]) -> State:
    """What a slot's audit trail, the oldest first, says about it: for when its state is lost.

    Args:
        events: `protocol.messages.Event`s of one slot. Whoever asks checks that the models are still there.
    """
    state = Serving()
    for event in events:
        if event.version is None:
            continue
        model = ModelRef(digest=event.model, version=event.version)
        report = Report(event.kind, model, event.reason)
        if event.kind in {"committed", "pinned"}:
            newest = model.version if event.kind == "pinned" else max(state.newest, model.version)
            state = Serving(active=model, previous=state.active, refused=state.refused, newest=newest)
        elif event.kind == "rolled_back":
            state = Serving(active=state.previous, refused=_refused(state, report), newest=state.newest)
        elif event.kind == "refused":
            newest = max(state.newest, model.version)
            state = replace(state, refused=_refused(state, report), newest=newest)
        elif event.kind == "inconclusive":
            state = replace(state, newest=max(state.newest, model.version))
        elif event.kind == "lost":
            state = replace(state, active=state.previous, previous=None, newest=min(state.newest, model.version - 1))
    return state


_decoder = msgspec.json.Decoder(State)


def encode(state: State) -> bytes:
    """A state as JSON, to be stored."""
    return msgspec.json.encode(state)


def decode(data: bytes) -> State:
    """A state from `encode`.

    Raises:
        Misconfigured: It is not one; perhaps it was written by a newer version of the agent.
    """
    try:
        state: State = _decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise Misconfigured(f"the stored deployment state cannot be read: {error}") from error
    return state
