from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent import deployment
from edge_agent.deployment import (
    MAX_REFUSALS,
    ROWS,
    Action,
    BaselineLost,
    BeginTrial,
    BeginWatch,
    DaemonRestarted,
    EndTrial,
    EndWatch,
    Event,
    LookAgain,
    ModelLost,
    ModelRefused,
    ModelStaged,
    Refusal,
    ReleaseOffered,
    ReleasePinned,
    Report,
    Row,
    Serving,
    Stage,
    StagerDied,
    Staging,
    StagingPostponed,
    State,
    Step,
    StopStaging,
    Trial,
    TrialDied,
    TrialFailed,
    TrialInconclusive,
    TrialPassed,
    TrialRegressed,
    UnexpectedEvent,
    VersionWithdrawn,
    Watch,
    WatchAlarmed,
    WatchQuieted,
    WorkerDied,
    decode,
    encode,
    indexed,
    initial,
    needed,
    recovered,
    step,
)
from protocol.errors import Misconfigured
from protocol.messages import Event as AuditEvent
from protocol.messages import ModelRef, Verdict


def model(version: int, digest: str | None = None) -> ModelRef:
    return ModelRef(digest=digest or f"d{version}", version=version)


def verdict(outcome: str = "commit", ratio: float = 1.04) -> Verdict:
    return Verdict(
        outcome=outcome,
        pairs=3000,
        slower=1500,
        passed=2900,
        evidence=0.1,
        acceptance=1e9,
        ratio_median=ratio,
        old_us_p50=10.0,
        old_us_p99=20.0,
        new_us_p50=10.4,
        new_us_p99=20.8,
    )


M1, M2, M3, M4 = (model(version) for version in (1, 2, 3, 4))
SLOWER = verdict("rollback", 2.0)
UNSURE = verdict("inconclusive")
TWICE = "died_twice"


def refusal(of: ModelRef, reason: str) -> Refusal:
    return Refusal(of.digest, of.version, reason)


def refused(reason: str, text: str = "", verdict: Verdict | None = None) -> Report:
    return Report("refused", M3, reason, text, verdict)


# One of each state, with a past: M2 is served, M1 was before it (in Watch: M3 is new, M2 was before it).

SERVING = Serving(active=M2, previous=M1, newest=2)
STAGING = Staging(active=M2, previous=M1, newest=2, candidate=M3)
TRIAL = Trial(active=M2, previous=M1, newest=2, candidate=M3)
WATCH = Watch(active=M3, previous=M2, newest=3, ratio=1.04)
STATES: tuple[State, ...] = (SERVING, STAGING, TRIAL, WATCH)

BEGIN_TRIAL = BeginTrial(M2, M3)
BEGIN_WATCH = BeginWatch(M3, M2, 1.04)
OFFERED = Staging(active=M2, previous=M1, newest=2, candidate=M4)
STAYED = Serving(active=M2, previous=M1, newest=3)
SLOW = Serving(active=M2, previous=M1, newest=3, refused=(refusal(M3, "slower"),))
NAN = Serving(active=M2, previous=M1, newest=3, refused=(refusal(M3, "not_finite"),))


def back(reason: str) -> Serving:
    return Serving(active=M2, previous=None, newest=3, refused=(refusal(M3, reason),))


def rolled_back(reason: str, text: str = "", verdict: Verdict | None = None) -> tuple[Action, ...]:
    return EndWatch(), Report("rolled_back", M3, reason, text, verdict), LookAgain()


KILLED_STAGER = "it killed the stager twice: by SIGKILL"
KILLED_TRIAL = "its trial died twice, by itself or with the daemon"
KILLED_WORKER = "its worker, its watch or the daemon died twice"

EVENTS: tuple[Event, ...] = (
    ReleaseOffered(M4),
    ModelStaged("d3"),
    ModelRefused("d3", "bad_model", "why"),
    StagingPostponed("d3", "no_space", "why"),
    StagerDied("d3", "by SIGKILL"),
    TrialPassed(verdict()),
    TrialRegressed(SLOWER),
    TrialInconclusive(UNSURE),
    TrialFailed("not_finite", "why"),
    TrialDied(),
    BaselineLost("corrupt_model", "why"),
    WorkerDied("d3"),
    WatchAlarmed(SLOWER),
    WatchQuieted(),
    DaemonRestarted(clean=True),
    DaemonRestarted(clean=False),
    ReleasePinned(M4, "by me"),
    VersionWithdrawn(3, "why"),
    ModelLost("d3", "why"),
)


def at(state: State, event: Event) -> tuple[type[State], str]:
    return type(state), repr(event)


# Every pair that changes or does something.
EXPECTED: dict[tuple[type[State], str], Step] = {
    at(SERVING, ReleaseOffered(M4)): Step(OFFERED, (Stage(M4),)),
    at(STAGING, ReleaseOffered(M4)): Step(OFFERED, (StopStaging(M3), Report("superseded", M3), Stage(M4))),
    at(STAGING, ModelStaged("d3")): Step(TRIAL, (Report("staged", M3), Report("trial", M3), BEGIN_TRIAL)),
    at(STAGING, ModelRefused("d3", "bad_model", "why")): Step(
        Serving(active=M2, previous=M1, newest=3, refused=(refusal(M3, "bad_model"),)), (refused("bad_model", "why"),)
    ),
    at(STAGING, StagingPostponed("d3", "no_space", "why")): Step(
        SERVING, (Report("postponed", M3, "no_space", "why"),)
    ),
    at(STAGING, StagerDied("d3", "by SIGKILL")): Step(msgspec.structs.replace(STAGING, deaths=1), (Stage(M3),)),
    at(STAGING, DaemonRestarted(clean=True)): Step(STAGING, (Stage(M3),)),
    at(STAGING, DaemonRestarted(clean=False)): Step(STAGING, (Stage(M3),)),
    at(TRIAL, ReleaseOffered(M4)): Step(OFFERED, (EndTrial(), Report("superseded", M3), Stage(M4))),
    at(TRIAL, TrialPassed(verdict())): Step(WATCH, (Report("committed", M3, "passed", verdict=verdict()), BEGIN_WATCH)),
    at(TRIAL, TrialRegressed(SLOWER)): Step(SLOW, (refused("slower", verdict=SLOWER),)),
    at(TRIAL, TrialInconclusive(UNSURE)): Step(STAYED, (Report("inconclusive", M3, "inconclusive", verdict=UNSURE),)),
    at(TRIAL, TrialFailed("not_finite", "why")): Step(NAN, (refused("not_finite", "why"),)),
    at(TRIAL, TrialDied()): Step(msgspec.structs.replace(TRIAL, deaths=1), (BEGIN_TRIAL,)),
    at(TRIAL, BaselineLost("corrupt_model", "why")): Step(
        Serving(active=M3, previous=None, newest=3), (Report("committed", M3, "nothing_to_compare", "why"),)
    ),
    at(TRIAL, DaemonRestarted(clean=True)): Step(TRIAL, (BEGIN_TRIAL,)),
    at(TRIAL, DaemonRestarted(clean=False)): Step(msgspec.structs.replace(TRIAL, deaths=1), (BEGIN_TRIAL,)),
    at(WATCH, ReleaseOffered(M4)): Step(
        Staging(active=M3, previous=M2, newest=3, candidate=M4), (EndWatch(), Stage(M4))
    ),
    at(WATCH, TrialFailed("not_finite", "why")): Step(back("not_finite"), rolled_back("not_finite", "why")),
    at(WATCH, TrialDied()): Step(msgspec.structs.replace(WATCH, deaths=1), (BEGIN_WATCH,)),
    at(WATCH, WorkerDied("d3")): Step(msgspec.structs.replace(WATCH, deaths=1), ()),
    at(WATCH, WatchAlarmed(SLOWER)): Step(back("slower"), rolled_back("slower", verdict=SLOWER)),
    at(WATCH, WatchQuieted()): Step(Serving(active=M3, previous=M2, newest=3), (Report("confirmed", M3),)),
    at(WATCH, BaselineLost("corrupt_model", "why")): Step(
        Serving(active=M3, previous=M2, newest=3), (Report("unwatched", M3, "corrupt_model", "why"),)
    ),
    at(WATCH, DaemonRestarted(clean=True)): Step(WATCH, (BEGIN_WATCH,)),
    at(WATCH, DaemonRestarted(clean=False)): Step(msgspec.structs.replace(WATCH, deaths=1), (BEGIN_WATCH,)),
}

PINNED = msgspec.structs.replace(OFFERED, pinned="by me")
WITHDRAWN = Serving(active=M2, previous=M1, newest=3, refused=(refusal(M3, "withdrawn"),))
LOST = Report("lost", M3, "corrupt_model", "why")

# What an operator wishes, and what the disk does.
EXPECTED |= {
    at(SERVING, ReleasePinned(M4, "by me")): Step(PINNED, (Stage(M4),)),
    at(STAGING, ReleasePinned(M4, "by me")): Step(PINNED, (StopStaging(M3), Report("superseded", M3), Stage(M4))),
    at(TRIAL, ReleasePinned(M4, "by me")): Step(PINNED, (EndTrial(), Report("superseded", M3), Stage(M4))),
    at(WATCH, ReleasePinned(M4, "by me")): Step(
        Staging(active=M3, previous=M2, newest=3, candidate=M4, pinned="by me"), (EndWatch(), Stage(M4))
    ),
    at(STAGING, VersionWithdrawn(3, "why")): Step(WITHDRAWN, (StopStaging(M3), refused("withdrawn", "why"))),
    at(TRIAL, VersionWithdrawn(3, "why")): Step(WITHDRAWN, (EndTrial(), refused("withdrawn", "why"))),
    at(WATCH, VersionWithdrawn(3, "why")): Step(back("withdrawn"), rolled_back("withdrawn", "why")),
    at(TRIAL, ModelLost("d3", "why")): Step(STAGING, (EndTrial(), Stage(M3))),
    at(WATCH, ModelLost("d3", "why")): Step(Serving(active=M2, newest=2), (EndWatch(), LOST, LookAgain())),
}


def test_the_examples_are_all_states_and_all_events() -> None:
    assert {type(state) for state in STATES} == set(get_args(State))
    assert {type(event) for event in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize("event", EVENTS, ids=repr)
@pytest.mark.parametrize("state", STATES, ids=lambda state: type(state).__name__)
def test_every_state_with_every_event(state: State, event: Event) -> None:
    assert step(state, event) == EXPECTED.get(at(state, event), Step(state))


def test_a_pair_that_no_row_lists_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_TABLE", indexed(ROWS[:1]))
    with pytest.raises(UnexpectedEvent, match="TrialDied in Trial"):
        step(TRIAL, TrialDied())


@pytest.mark.parametrize(
    ("state", "event", "text"),
    [
        (STAGING, StagerDied("d3", "by SIGKILL"), KILLED_STAGER),
        (TRIAL, TrialDied(), KILLED_TRIAL),
        (TRIAL, DaemonRestarted(clean=False), KILLED_TRIAL),
    ],
)
def test_a_second_death_of_one_candidate_is_the_last(state: Staging | Trial, event: Event, text: str) -> None:
    once = msgspec.structs.replace(state, deaths=1)
    gone = Serving(active=M2, previous=M1, newest=3, refused=(refusal(M3, TWICE),))
    assert step(once, event) == Step(gone, (refused(TWICE, text),))


@pytest.mark.parametrize("event", [WorkerDied("d3"), TrialDied(), DaemonRestarted(clean=False)], ids=repr)
def test_a_second_death_in_watch_rolls_back(event: Event) -> None:
    once = msgspec.structs.replace(WATCH, deaths=1)
    assert step(once, event) == Step(back(TWICE), rolled_back(TWICE, KILLED_WORKER))


@pytest.mark.parametrize("state", [STAGING, TRIAL, WATCH], ids=lambda state: type(state).__name__)
def test_a_clean_restart_is_no_death(state: Staging | Trial | Watch) -> None:
    once = msgspec.structs.replace(state, deaths=1)
    assert step(once, DaemonRestarted(clean=True)).state == once


def test_the_first_model_is_committed_without_a_trial() -> None:
    staging = Staging(active=None, candidate=M1)
    assert step(initial(), ReleaseOffered(M1)) == Step(staging, (Stage(M1),))
    assert step(staging, ModelStaged("d1")) == Step(
        Serving(active=M1, newest=1), (Report("staged", M1), Report("committed", M1, "first_model"))
    )


@pytest.mark.parametrize(
    ("state", "offer"),
    [
        (SERVING, M1),
        (SERVING, model(2, "other")),
        (SERVING, model(9, "d2")),
        (Serving(active=M2, refused=(refusal(M4, "slower"),), newest=2), M4),
        (Serving(active=M2, newest=3), M3),
        (STAGING, M3),
        (STAGING, model(3, "other")),
        (TRIAL, M3),
        (TRIAL, model(5, "d2")),
        (WATCH, M2),
        (WATCH, model(9, "d3")),
    ],
)
def test_an_offer_that_is_nothing_new_changes_nothing(state: State, offer: ModelRef) -> None:
    assert step(state, ReleaseOffered(offer)) == Step(state)


def test_a_refused_model_comes_back_under_a_higher_version() -> None:
    state = Serving(active=M2, newest=4, refused=(refusal(model(3, "same"), "slower"), refusal(M4, "slower")))
    again = model(5, "same")
    assert step(state, ReleaseOffered(again)).actions == (Stage(again),)


@pytest.mark.parametrize(
    "late",
    [ModelStaged("d1"), ModelRefused("d1", "bad_model"), StagingPostponed("d1", "no_space"), StagerDied("d1")],
    ids=repr,
)
def test_what_the_stager_says_of_another_model_is_late(late: Event) -> None:
    assert step(STAGING, late) == Step(STAGING)


def test_the_old_models_worker_may_die_in_watch() -> None:
    once = msgspec.structs.replace(WATCH, deaths=1)
    assert step(once, WorkerDied("d2")) == Step(once)


def test_a_watch_never_defends_less_than_the_old_models_speed() -> None:
    watch = step(TRIAL, TrialPassed(verdict(ratio=0.5))).state
    assert isinstance(watch, Watch)
    assert watch.ratio == 1.0


def test_the_refusal_list_keeps_the_newest() -> None:
    full = tuple(Refusal(f"r{number}", number, "slower") for number in range(MAX_REFUSALS))
    state = Staging(active=M2, candidate=model(99), newest=50, refused=full)
    after = step(state, ModelRefused("d99", "bad_model")).state
    assert after.refused == (*full[1:], Refusal("d99", 99, "bad_model"))


def test_what_the_store_must_keep() -> None:
    assert needed(initial()) == set()
    assert needed(SERVING) == {M1, M2}
    assert needed(STAGING) == needed(TRIAL) == {M1, M2, M3}
    assert needed(WATCH) == {M2, M3}


# An operator's wishes.


@pytest.mark.parametrize("state", [SERVING, msgspec.structs.replace(WATCH, active=M2, previous=M1)], ids=repr)
def test_a_pin_of_what_is_served_changes_nothing(state: State) -> None:
    assert step(state, ReleasePinned(M2, "by me")) == Step(state)


@pytest.mark.parametrize(("state", "ends"), [(STAGING, StopStaging(M3)), (TRIAL, EndTrial())], ids=repr)
def test_a_pin_of_what_is_served_ends_what_is_under_way(state: State, ends: Action) -> None:
    assert step(state, ReleasePinned(M2, "by me")) == Step(SERVING, (ends, Report("superseded", M3)))


@pytest.mark.parametrize(
    ("state", "ends"),
    [
        (SERVING, ()),
        (STAGING, (StopStaging(M3), Report("superseded", M3))),
        (TRIAL, (EndTrial(), Report("superseded", M3))),
    ],
    ids=repr,
)
def test_a_pin_of_the_version_before_is_obeyed_at_once(state: State, ends: tuple[Action, ...]) -> None:
    now_old = Serving(active=M1, previous=M2, newest=1)
    assert step(state, ReleasePinned(M1, "by me")) == Step(now_old, (*ends, Report("pinned", M1, text="by me")))


def test_a_pin_of_the_version_before_ends_a_watch() -> None:
    assert step(WATCH, ReleasePinned(M2, "by me")) == Step(
        Serving(active=M2, previous=M3, newest=2), (EndWatch(), Report("pinned", M2, text="by me"))
    )


def test_a_pin_of_what_is_tried_ends_the_trial_with_it() -> None:
    assert step(TRIAL, ReleasePinned(M3, "by me")) == Step(
        Serving(active=M3, previous=M2, newest=3), (EndTrial(), Report("pinned", M3, text="by me"))
    )


def test_what_is_pinned_while_it_is_staged_needs_no_trial() -> None:
    pinned = msgspec.structs.replace(STAGING, pinned="by me")
    assert step(STAGING, ReleasePinned(M3, "by me")) == Step(pinned)
    assert step(pinned, ModelStaged("d3")) == Step(
        Serving(active=M3, previous=M2, newest=3),
        (Report("staged", M3), Report("pinned", M3, text="by me"), LookAgain()),
    )


def test_after_a_pin_newer_versions_are_offered_again() -> None:
    pinned = step(SERVING, ReleasePinned(M1, "by me")).state
    assert step(pinned, ReleaseOffered(M2)).actions == (Stage(M2),)


@pytest.mark.parametrize(("reason", "obeyed"), [("slower", True), ("withdrawn", True), ("bad_model", False)])
def test_a_pin_overrules_the_judge_but_not_a_model_that_does_not_work(reason: str, obeyed: bool) -> None:
    state = Serving(active=M2, newest=3, refused=(refusal(M3, reason),))
    assert (step(state, ReleasePinned(M3, "by me")).actions == (Stage(M3),)) is obeyed


def test_what_is_served_and_withdrawn_gives_way_to_the_one_before() -> None:
    gone = (refusal(M2, "withdrawn"),)
    report = Report("rolled_back", M2, "withdrawn", "why")
    withdrawn = VersionWithdrawn(2, "why")
    serving = Serving(active=M1, newest=2, refused=gone)
    assert step(SERVING, withdrawn) == Step(serving, (report, LookAgain()))
    assert step(serving, VersionWithdrawn(1)) == Step(serving)  # something must be served
    assert step(STAGING, withdrawn) == Step(
        Staging(active=M1, newest=2, candidate=M3, refused=gone), (report, LookAgain())
    )
    assert step(TRIAL, withdrawn) == Step(
        Trial(active=M1, newest=2, candidate=M3, refused=gone), (report, BeginTrial(M1, M3), LookAgain())
    )


# What the disk loses.


def test_an_active_model_that_is_lost_is_replaced_by_the_one_before_and_offered_again() -> None:
    lost = ModelLost("d2", "why")
    report = Report("lost", M2, "corrupt_model", "why")
    after = Serving(active=M1, newest=1)
    assert step(SERVING, lost) == Step(after, (report, LookAgain()))
    assert step(after, ReleaseOffered(M2)).actions == (Stage(M2),)
    assert step(STAGING, lost) == Step(Staging(active=M1, newest=1, candidate=M3), (report, LookAgain()))
    assert step(TRIAL, lost) == Step(
        Trial(active=M1, newest=1, candidate=M3), (report, BeginTrial(M1, M3), LookAgain())
    )


def test_the_only_model_that_is_lost_leaves_nothing_until_it_is_staged_again() -> None:
    only = Serving(active=M2, newest=2)
    after = step(only, ModelLost("d2")).state
    assert after == Serving(newest=1)
    assert step(after, ReleaseOffered(M2)).actions == (Stage(M2),)


def test_a_candidate_is_served_where_the_only_other_model_is_lost() -> None:
    trial = Trial(active=M2, newest=2, candidate=M3)
    assert step(trial, ModelLost("d2", "why")) == Step(
        Serving(active=M3, newest=3),
        (
            EndTrial(),
            Report("lost", M2, "corrupt_model", "why"),
            Report("committed", M3, "nothing_to_compare", "why"),
        ),
    )


def audit(kind: str, model: ModelRef, reason: str = "") -> AuditEvent:
    return AuditEvent(at=0.0, kind=kind, slot="combat", model=model.digest, version=model.version, reason=reason)


def test_a_lost_state_is_recovered_from_the_audit_trail() -> None:
    assert recovered([]) == initial()
    trail = [
        AuditEvent(at=0.0, kind="metadata_refused", reason="expired"),
        audit("staged", M1),
        audit("committed", M1, "first_model"),
        audit("committed", M2, "passed"),
    ]
    assert recovered(trail) == Serving(active=M2, previous=M1, newest=2)
    assert recovered([*trail, audit("inconclusive", M3)]) == Serving(active=M2, previous=M1, newest=3)
    assert recovered([*trail, audit("refused", M3, "slower")]) == SLOW
    assert recovered([*trail, audit("committed", M3), audit("rolled_back", M3, "slower")]) == Serving(
        active=M2, newest=3, refused=(refusal(M3, "slower"),)
    )
    assert recovered([*trail, audit("pinned", M1)]) == Serving(active=M1, previous=M2, newest=1)
    assert recovered([*trail, audit("lost", M2)]) == Serving(active=M1, newest=1)


def test_a_duplicate_row_is_rejected() -> None:
    with pytest.raises(ValueError, match="two rows for TrialPassed in Trial"):
        indexed((*ROWS, Row(Trial, TrialPassed, (Serving,), deployment.stay)))


def test_a_row_that_goes_elsewhere_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    astray: Row[Any, Any] = Row(Serving, DaemonRestarted, (Watch,), deployment.stay)
    monkeypatch.setattr(deployment, "_TABLE", indexed((astray,)))
    with pytest.raises(AssertionError, match="Serving is not where this row goes"):
        step(SERVING, DaemonRestarted(clean=True))


# What is stored.


@pytest.mark.parametrize("state", [initial(), *STATES, SLOW], ids=repr)
def test_a_state_comes_back_as_it_was_stored(state: State) -> None:
    assert decode(encode(state)) == state


def test_the_stored_form() -> None:
    assert msgspec.json.decode(encode(SLOW)) == {
        "phase": "serving",
        "active": {"digest": "d2", "version": 2},
        "previous": {"digest": "d1", "version": 1},
        "refused": [{"digest": "d3", "version": 3, "reason": "slower"}],
        "newest": 3,
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b'{"phase": "dancing"}',
        b'{"phase": "watch", "active": {"digest": "d", "version": 1}}',
        b'{"phase": "trial", "active": null, "candidate": {"digest": "d", "version": 1}}',
    ],
)
def test_what_is_no_state_needs_a_person(data: bytes) -> None:
    with pytest.raises(Misconfigured, match="the stored deployment state cannot be read"):
        decode(data)


# Whole chains: what a device goes through, and what it does.


def run(events: list[Event]) -> tuple[list[str], list[Action], State]:
    """Phases and actions of a chain that begins with nothing; every state goes through the disk."""
    state, phases, done = initial(), [], list[Action]()
    for event in events:
        state, actions = step(state, event)
        state = decode(encode(state))
        phases.append(type(state).__name__)
        done += [action for action in actions if not isinstance(action, Report)]
    return phases, done, state


FIRST: list[Event] = [ReleaseOffered(M1), ModelStaged("d1")]
CLEAN, CRASH = DaemonRestarted(clean=True), DaemonRestarted(clean=False)


def test_chain_of_a_good_update() -> None:
    phases, done, state = run(
        [*FIRST, ReleaseOffered(M2), ModelStaged("d2"), TrialPassed(verdict()), WatchQuieted(), ReleaseOffered(M2)]
    )
    assert phases == ["Staging", "Serving", "Staging", "Trial", "Watch", "Serving", "Serving"]
    assert done == [Stage(M1), Stage(M2), BeginTrial(M1, M2), BeginWatch(M2, M1, 1.04)]
    assert state == Serving(active=M2, previous=M1, newest=2)


def test_chain_of_an_update_through_spontaneous_restarts() -> None:
    phases, done, state = run(
        [
            CRASH,
            ReleaseOffered(M1),
            CRASH,
            CRASH,
            CRASH,
            ModelStaged("d1"),
            CRASH,
            ReleaseOffered(M2),
            ModelStaged("d2"),
            CRASH,
            CLEAN,
            TrialPassed(verdict()),
            CRASH,
            CLEAN,
            WatchQuieted(),
            CRASH,
        ]
    )
    assert (
        phases
        == ["Serving", *["Staging"] * 4, *["Serving"] * 2, "Staging", *["Trial"] * 3, *["Watch"] * 3] + ["Serving"] * 2
    )
    assert done == [
        *[Stage(M1)] * 4,
        Stage(M2),
        *[BeginTrial(M1, M2)] * 3,
        *[BeginWatch(M2, M1, 1.04)] * 3,
    ]
    assert state == Serving(active=M2, previous=M1, newest=2)


def test_chain_of_a_model_that_takes_the_daemon_down() -> None:
    phases, done, state = run([*FIRST, ReleaseOffered(M2), ModelStaged("d2"), CRASH, CRASH, ReleaseOffered(M2), CRASH])
    assert phases == ["Staging", "Serving", "Staging", "Trial", "Trial", "Serving", "Serving", "Serving"]
    assert done == [Stage(M1), Stage(M2), *[BeginTrial(M1, M2)] * 2]
    assert state == Serving(active=M1, newest=2, refused=(refusal(M2, TWICE),))


def test_chain_of_a_rollback_from_watch_and_the_mended_model_after_it() -> None:
    mended = model(3, "d2")
    phases, done, state = run(
        [
            *FIRST,
            ReleaseOffered(M2),
            ModelStaged("d2"),
            TrialPassed(verdict()),
            WorkerDied("d2"),
            CRASH,
            ReleaseOffered(M2),
            ReleaseOffered(mended),
            ModelStaged("d2"),
            TrialDied(),
            TrialPassed(verdict()),
        ]
    )
    assert phases[4:] == ["Watch", "Watch", "Serving", "Serving", "Staging", "Trial", "Trial", "Watch"]
    assert done[3:] == [
        BeginWatch(M2, M1, 1.04),
        EndWatch(),
        LookAgain(),
        Stage(mended),
        *[BeginTrial(M1, mended)] * 2,
        BeginWatch(mended, M1, 1.04),
    ]
    assert state == Watch(active=mended, previous=M1, newest=3, refused=(refusal(M2, TWICE),), ratio=1.04)


def test_chain_of_postponements_and_a_newer_release_in_between() -> None:
    phases, done, state = run(
        [
            *FIRST,
            ReleaseOffered(M2),
            StagingPostponed("d2", "no_space"),
            ReleaseOffered(M2),
            StagerDied("d2"),
            ReleaseOffered(M3),
            StagerDied("d2"),
            StagerDied("d3", "by SIGKILL"),
            ModelStaged("d2"),
            ModelStaged("d3"),
            ReleaseOffered(M4),
            ModelRefused("d4", "bad_model"),
        ]
    )
    assert phases[2:] == ["Staging", "Serving", *["Staging"] * 6, "Trial", "Staging", "Serving"]
    assert done[1:] == [
        Stage(M2),
        Stage(M2),
        Stage(M2),
        StopStaging(M2),
        Stage(M3),
        Stage(M3),
        BeginTrial(M1, M3),
        EndTrial(),
        Stage(M4),
    ]
    assert state == Serving(active=M1, newest=4, refused=(refusal(M4, "bad_model"),))


def test_chain_of_a_slot_whose_active_model_rotted() -> None:
    phases, done, state = run(
        [
            *FIRST,
            ReleaseOffered(M2),
            ModelStaged("d2"),
            BaselineLost("corrupt_model"),
            ReleaseOffered(M2),
            ReleaseOffered(M3),
            ModelStaged("d3"),
            TrialPassed(verdict()),
            BaselineLost("corrupt_model"),
        ]
    )
    assert phases[2:] == ["Staging", "Trial", "Serving", "Serving", "Staging", "Trial", "Watch", "Serving"]
    assert done[1:] == [Stage(M2), BeginTrial(M1, M2), Stage(M3), BeginTrial(M2, M3), BeginWatch(M3, M2, 1.04)]
    assert state == Serving(active=M3, previous=M2, newest=3)


def test_chain_of_verdicts_that_were_overtaken_by_an_offer() -> None:
    phases, done, state = run(
        [
            *FIRST,
            ReleaseOffered(M2),
            ModelStaged("d2"),
            ReleaseOffered(M3),
            TrialRegressed(SLOWER),
            ModelStaged("d3"),
            TrialPassed(verdict()),
            ReleaseOffered(M4),
            WatchAlarmed(SLOWER),
            ModelStaged("d4"),
        ]
    )
    assert phases[3:] == ["Trial", "Staging", "Staging", "Trial", "Watch", "Staging", "Staging", "Trial"]
    assert done[2:] == [
        BeginTrial(M1, M2),
        EndTrial(),
        Stage(M3),
        BeginTrial(M1, M3),
        BeginWatch(M3, M1, 1.04),
        EndWatch(),
        Stage(M4),
        BeginTrial(M3, M4),
    ]
    assert state == Trial(active=M3, previous=M1, newest=3, candidate=M4)


# Anything at all, in any order that a daemon can see.

digests = st.sampled_from(["a", "b", "c", "d", "e"])
models = st.builds(ModelRef, digest=digests, version=st.integers(1, 12))


# After these no trial or watch is left running: it spoke its last, or went with the daemon.
COMPARISON_ENDED = (
    DaemonRestarted,
    TrialPassed,
    TrialRegressed,
    TrialInconclusive,
    TrialFailed,
    TrialDied,
    BaselineLost,
    WatchAlarmed,
    WatchQuieted,
)
VERDICTS = (TrialPassed(verdict()), TrialRegressed(SLOWER), TrialInconclusive(UNSURE))
BREAKS = (TrialDied(), TrialFailed("not_finite"), BaselineLost("corrupt_model"))
WATCH_ENDS = (WatchAlarmed(SLOWER), WatchQuieted())


class Slot(RuleBasedStateMachine):
    """A daemon that does what it is told, in a world where all goes wrong that can."""

    def __init__(self) -> None:
        super().__init__()
        self.state: State = initial()
        self.ever_active = False
        self.refused: dict[str, int] = {}
        self.trial: BeginTrial | None = None
        self.watch: BeginWatch | None = None

    def feed(self, event: Event) -> None:
        before = self.state
        self.state, actions = step(before, event)
        if isinstance(event, COMPARISON_ENDED):
            self.trial = self.watch = None
        for action in actions:
            self.carry_out(action)
        self.compare(before, event)

    def carry_out(self, action: Action) -> None:
        match action:
            case Stage(wanted):
                allowed = wanted.version > self.refused.get(wanted.digest, 0) or self.is_pinned(wanted)
                assert allowed, "a refused model is staged again"
                assert self.trial is None
                assert self.watch is None
            case BeginTrial():
                self.trial = action
            case BeginWatch():
                self.watch = action
            case EndTrial():
                self.trial = None
            case EndWatch():
                self.watch = None
            case Report(kind="refused" | "rolled_back", model=bad):
                self.refused[bad.digest] = bad.version

    def is_pinned(self, model: ModelRef) -> bool:
        return isinstance(self.state, Staging) and self.state.candidate == model and bool(self.state.pinned)

    def compare(self, before: State, event: Event) -> None:
        by_pin = isinstance(event, ReleasePinned) or (isinstance(before, Staging) and before.pinned)
        if by_pin or isinstance(event, ModelLost):
            return
        if before.active is not None:
            assert self.state.active is not None, "nothing is served any more"
            if self.state.active.version < before.active.version:
                by_judge, by_wish = isinstance(before, Watch), isinstance(event, VersionWithdrawn)
                assert by_judge or by_wish, "a version fell without a rollback"
                assert self.state.active == before.previous
                assert before.active.digest in self.refused
        assert self.state.newest >= before.newest

    @rule(offered=models)
    def offer(self, offered: ModelRef) -> None:
        self.feed(ReleaseOffered(offered))

    @rule(wished=models)
    def pin(self, wished: ModelRef) -> None:
        self.feed(ReleasePinned(wished, "by me"))

    @rule(version=st.integers(1, 12))
    def withdraw(self, version: int) -> None:
        self.feed(VersionWithdrawn(version))

    @rule(digest=digests)
    def bytes_are_lost(self, digest: str) -> None:
        before = self.state
        self.feed(ModelLost(digest))
        if before.active is not None and self.state.active is None:
            assert before.previous is None, "there was another model to serve"

    @rule(
        digest=digests,
        said=st.sampled_from(
            [ModelStaged, StagerDied, lambda d: ModelRefused(d, "bad_model"), lambda d: StagingPostponed(d, "no_space")]
        ),
    )
    def stager_says(self, digest: str, said: Any) -> None:
        self.feed(said(digest))

    @precondition(lambda self: isinstance(self.state, Staging))
    @rule()
    def stager_succeeds(self) -> None:
        assert isinstance(self.state, Staging)
        self.feed(ModelStaged(self.state.candidate.digest))

    @precondition(lambda self: isinstance(self.state, Staging))
    @rule()
    def stager_dies(self) -> None:
        assert isinstance(self.state, Staging)
        self.feed(StagerDied(self.state.candidate.digest))

    @rule(digest=digests)
    def worker_dies(self, digest: str) -> None:
        self.feed(WorkerDied(digest))

    @rule(restarted=st.sampled_from([CLEAN, CRASH]))
    def daemon_restarts(self, restarted: Event) -> None:
        self.feed(restarted)

    @precondition(lambda self: self.trial or self.watch)
    @rule(ended=st.sampled_from(BREAKS))
    def comparison_breaks(self, ended: Event) -> None:
        self.feed(ended)

    @precondition(lambda self: self.trial)
    @rule(ended=st.sampled_from(VERDICTS))
    def trial_ends(self, ended: Event) -> None:
        self.feed(ended)

    @precondition(lambda self: self.watch)
    @rule(ended=st.sampled_from(WATCH_ENDS))
    def watch_ends(self, ended: Event) -> None:
        self.feed(ended)

    @precondition(lambda self: not self.trial)
    @rule(late=st.sampled_from(VERDICTS))
    def trial_was_over(self, late: Event) -> None:
        assert step(self.state, late) == Step(self.state)

    @precondition(lambda self: not self.watch)
    @rule(late=st.sampled_from(WATCH_ENDS))
    def watch_was_over(self, late: Event) -> None:
        assert step(self.state, late) == Step(self.state)

    @precondition(lambda self: not self.trial and not self.watch)
    @rule(late=st.sampled_from(BREAKS))
    def comparison_was_over(self, late: Event) -> None:
        assert step(self.state, late) == Step(self.state)

    @invariant()
    def only_what_belongs_to_the_state_runs(self) -> None:
        state = self.state
        assert self.trial == (BeginTrial(state.active, state.candidate) if isinstance(state, Trial) else None)
        expected = BeginWatch(state.active, state.previous, state.ratio) if isinstance(state, Watch) else None
        assert self.watch == expected

    @invariant()
    def it_can_be_stored(self) -> None:
        assert decode(encode(self.state)) == self.state

    @invariant()
    def the_store_keeps_what_is_named(self) -> None:
        named = [self.state.active, self.state.previous, getattr(self.state, "candidate", None)]
        assert needed(self.state) == {each for each in named if each is not None}

    @invariant()
    def the_refusal_list_is_bounded(self) -> None:
        assert len(self.state.refused) <= MAX_REFUSALS

    @invariant()
    def a_candidate_is_newer_than_what_was_dealt_with(self) -> None:
        if isinstance(self.state, Trial) or (isinstance(self.state, Staging) and not self.state.pinned):
            assert self.state.candidate.version > self.state.newest


TestSlot = Slot.TestCase
TestSlot.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
