"""A trial as the supervisor sees it, with a child that is played by the test and the real judge."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import pytest

from edge_agent.channel import Channel
from edge_agent.children import (
    BaselineFailed,
    CandidateFailed,
    Child,
    FromTrial,
    RecentInputs,
    TimedPairs,
    ToTrial,
    TrialReady,
)
from edge_agent.comparison import REFRESH_S, START_LIMIT_S, Comparison, Judge
from edge_agent.judge import JudgeSettings, TrialJudge, WatchJudge


@dataclass
class Process:
    """What `Child` needs of a process."""

    pid: int = 1
    returncode: int | None = None

    def kill(self) -> None:
        self.returncode = -9

    def wait(self, _timeout_s: float) -> None:
        assert self.returncode is not None


class Scene:
    def __init__(self, judge: Judge | None = None, limit_s: float = 600.0) -> None:
        ours, theirs = socket.socketpair()
        process: Any = Process()
        self.process = process
        self.child: Child[FromTrial] = Child(process, Channel(ours, FromTrial), "trial")
        self.end: Channel[ToTrial] = Channel(theirs, ToTrial)
        self.hot = False
        self.comparison = Comparison(
            self.child,
            judge or TrialJudge(JudgeSettings(), 7),
            old="old",
            new="new",
            limit_s=limit_s,
            throttled=lambda: self.hot,
            now=0.0,
        )

    def says(self, *messages: FromTrial, now: float = 1.0) -> None:
        for message in messages:
            assert self.end.send(message)
        self.comparison.receive(now)

    def ends(self) -> None:
        self.end.close()
        while not self.child.channel.closed:
            self.comparison.receive(1.0)


SLOWER = TimedPairs([(1000, 3000)] * 100)
EQUAL = TimedPairs([(1000, 1000)] * 100)


def test_a_trial_goes_on_until_the_judge_has_decided_and_hears_no_more_then() -> None:
    scene = Scene()
    scene.says(TrialReady(memory_bytes=1), EQUAL)
    assert not scene.comparison.ended
    assert scene.comparison.verdict().outcome == "inconclusive"
    scene.says(SLOWER, SLOWER)
    assert scene.comparison.ended
    assert scene.comparison.decided
    verdict = scene.comparison.verdict()
    assert (verdict.outcome, verdict.seed) == ("rollback", 7)
    assert verdict.slower < 100


def test_a_watch_alarms_through_the_same_door() -> None:
    scene = Scene(WatchJudge(JudgeSettings(), 1.0, 7))
    scene.says(SLOWER)
    assert scene.comparison.decided
    assert scene.comparison.verdict().outcome == "rollback"


def test_throttling_is_asked_about_with_each_report() -> None:
    scene = Scene()
    scene.says(TimedPairs([(1000, 1001)]))
    scene.hot = True
    scene.says(TimedPairs([(1000, 1001)] * 3))
    assert scene.comparison.verdict().throttled_share == 0.75


def test_time_that_is_up_ends_it_without_a_decision() -> None:
    scene = Scene(limit_s=10.0)
    scene.says(EQUAL)
    scene.comparison.tick(9.9, list)
    assert not scene.comparison.ended
    scene.comparison.tick(10.0, list)
    assert scene.comparison.timed_out
    assert not scene.comparison.decided
    assert not scene.comparison.died


def test_a_failed_candidate_is_told_with_reason_and_is_no_death() -> None:
    scene = Scene()
    assert scene.end.send(CandidateFailed(reason="not_finite", text="nan"))
    scene.ends()
    assert scene.comparison.failure == ("not_finite", "nan")
    assert scene.comparison.ended
    assert not scene.comparison.died


def test_a_failed_old_model_is_neither_the_candidates_failure_nor_a_death() -> None:
    scene = Scene()
    assert scene.end.send(BaselineFailed(reason="corrupt_model", text="rotten"))
    scene.ends()
    assert scene.comparison.baseline_failure == ("corrupt_model", "rotten")
    assert scene.comparison.ended
    assert not scene.comparison.died
    assert scene.comparison.failure is None


def test_a_process_that_ends_by_itself_is_a_death_and_what_it_said_before_counts() -> None:
    scene = Scene()
    assert scene.end.send(EQUAL)
    scene.ends()
    assert scene.comparison.died
    assert scene.comparison.verdict().throttled_share == 0
    assert scene.comparison.verdict().old_us_p50 == 1.0


def test_silence_is_a_death() -> None:
    scene = Scene()
    scene.says(EQUAL, now=50.0)
    scene.comparison.tick(50.0 + START_LIMIT_S, list)
    assert not scene.comparison.ended
    scene.comparison.tick(50.1 + START_LIMIT_S, list)
    assert scene.comparison.died


def test_fresh_states_are_passed_on_now_and_then() -> None:
    scene = Scene()
    states = [b"\0\0\0\0", b"\0\0\0\1"]
    scene.comparison.tick(10 * REFRESH_S, lambda: states)
    assert scene.end.receive() == []  # the child has not yet read its assignment
    assert scene.end.send(TrialReady(memory_bytes=0))
    scene.comparison.receive(0.0)
    scene.comparison.tick(REFRESH_S - 0.1, lambda: states)
    assert scene.end.receive() == []
    scene.comparison.tick(REFRESH_S, list)
    assert scene.end.receive() == []
    for now in (2 * REFRESH_S, 2 * REFRESH_S + 0.1, 3 * REFRESH_S):
        scene.comparison.tick(now, lambda: states)
    assert scene.end.receive() == [RecentInputs(states), RecentInputs(states)]


@pytest.mark.parametrize("gone", [False, True])
def test_stopping_ends_the_process(gone: bool) -> None:
    scene = Scene()
    if gone:
        scene.ends()
    scene.comparison.stop()
    assert scene.process.returncode == -9
    assert scene.child.channel.closed
