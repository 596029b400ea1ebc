"""Two models side by side: real interpreters, a channel whose other end is held by the test."""

from __future__ import annotations

import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent import runtime, trial
from edge_agent.channel import Channel
from edge_agent.children import (
    BaselineFailed,
    CandidateFailed,
    Child,
    FromTrial,
    ModelFile,
    RecentInputs,
    TimedPairs,
    ToTrial,
    TrialAssignment,
    TrialReady,
    start,
)
from edge_agent.judge import coin
from edge_agent.model_store import ModelStore
from edge_agent.trial import CandidateBroken, Trial
from protocol.errors import Rejected
from protocol.features import FeatureSpec

MODELS = Path(__file__).parents[2] / "models"
LIMIT_S = 20.0
STATE = np.arange(6, dtype=np.float32).tobytes()


def model_file(folder: Path, name: str) -> ModelFile:
    digest = ModelStore(folder).put((MODELS / f"{name}.tflite").read_bytes())
    return ModelFile(digest=digest, version=1, folder=str(folder), features=FeatureSpec())


def assignment(folder: Path, old: str = "echo", new: str = "twin", **fields: Any) -> TrialAssignment:
    return msgspec.structs.replace(
        TrialAssignment(
            old=model_file(folder, old),
            new=model_file(folder, new),
            threads=1,
            seed=7,
            duty=0.5,
            interval_s=0.0,
            old_inputs=[STATE],
            new_inputs=[STATE],
        ),
        **fields,
    )


@contextmanager
def running(task: TrialAssignment) -> Iterator[tuple[Channel[FromTrial], list[BaseException]]]:
    """A trial in a thread, and how it ended."""
    ours, theirs = socket.socketpair()
    channel: Channel[FromTrial] = Channel(ours, FromTrial)
    ended: list[BaseException] = []
    job = Trial(task, Channel(theirs, ToTrial))

    def run() -> None:
        try:
            job.run()
        except Rejected as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield channel, ended
    channel.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "a trial ends when its supervisor has gone"


def heard(channel: Channel[FromTrial], until: Callable[[list[Any]], object]) -> list[Any]:
    """Everything a trial says until a condition holds or it ends."""
    messages: list[Any] = []
    deadline = time.monotonic() + LIMIT_S
    while not until(messages) and not channel.closed:
        assert time.monotonic() < deadline, messages
        select.select([channel], [], [], 0.1)
        messages += channel.receive()
    return messages


def test_after_a_word_that_it_is_ready_a_trial_reports_timed_pairs(tmp_path: Path) -> None:
    with running(assignment(tmp_path)) as (channel, ended):
        ready, first, *_ = heard(channel, lambda messages: len(messages) > 3)
    assert isinstance(ready, TrialReady)
    assert ready.memory_bytes >= 0
    assert isinstance(first, TimedPairs)
    assert 0 < len(first.pairs) <= trial.MAX_BLOCK_PAIRS
    assert all(old_ns > 0 and new_ns > 0 for old_ns, new_ns in first.pairs)
    assert ended == []


def test_a_slower_model_takes_longer_on_its_own_side_of_the_pair(tmp_path: Path) -> None:
    with running(assignment(tmp_path, "echo", "slow")) as (channel, _):
        messages = heard(channel, lambda messages: len(messages) > 5)
    pairs = [pair for message in messages if isinstance(message, TimedPairs) for pair in message.pairs]
    assert sum(new_ns > old_ns for old_ns, new_ns in pairs) > 0.9 * len(pairs)


def test_which_model_goes_first_follows_the_coin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = assignment(tmp_path)
    order: list[int] = []
    invoke = runtime.Model.invoke

    def noted(model: runtime.Model, features: runtime.Vector) -> runtime.Vector:
        order.append(id(model))
        return invoke(model, features)

    with monkeypatch.context() as patched:
        patched.setattr(runtime.Model, "invoke", noted)
        with running(task) as (channel, _):
            loaded_old, loaded_new = list(dict.fromkeys(order))
            heard(channel, lambda messages: len(messages) > 2)
    order = order[40:]  # 20 inferences each to warm up
    flips = coin(task.seed)
    count = len(order) // 2
    assert count >= 100
    expected = [loaded_new if next(flips) else loaded_old for _ in range(count)]
    assert order[: 2 * count : 2] == expected
    assert all(first != second for first, second in zip(order[: 2 * count : 2], order[1::2], strict=False))


def test_one_pair_at_a_time_no_more_often_than_its_interval(tmp_path: Path) -> None:
    started = time.monotonic()
    with running(assignment(tmp_path, interval_s=0.1)) as (channel, _):
        messages = heard(channel, lambda messages: len(messages) == 5)
    assert time.monotonic() - started >= 0.3
    assert [len(message.pairs) for message in messages[1:]] == [1, 1, 1, 1]


def test_recent_states_replace_those_it_began_with(tmp_path: Path) -> None:
    seen: set[bytes] = set()

    class Noting(Trial):
        def _timed_new(self, features: runtime.Vector) -> tuple[int, runtime.Vector]:
            seen.add(features.tobytes())
            return super()._timed_new(features)

    ours, theirs = socket.socketpair()
    channel: Channel[FromTrial] = Channel(ours, FromTrial)
    job = Noting(assignment(tmp_path), Channel(theirs, ToTrial))
    thread = threading.Thread(target=job.run)
    thread.start()
    fresh = [(np.ones(6, np.float32) * number).tobytes() for number in (1, 2)]
    heard(channel, lambda messages: len(messages) > 1)
    assert seen == {STATE}
    channel.send(RecentInputs(fresh))
    heard(channel, lambda _messages: seen >= set(fresh))
    seen.clear()
    heard(channel, lambda messages: len(messages) > 3)
    channel.close()
    thread.join(LIMIT_S)
    assert seen == set(fresh)


def test_output_that_is_not_finite_is_the_candidates_fault(tmp_path: Path) -> None:
    with running(assignment(tmp_path, new="nan")) as (channel, ended):
        deadline = time.monotonic() + LIMIT_S
        while not ended and time.monotonic() < deadline:
            channel.receive()
    assert isinstance(ended[0], CandidateBroken)
    assert ended[0].code == "not_finite"


@pytest.mark.parametrize("length", [0, 1, 3, 7])
def test_an_input_of_another_length_is_the_fault_of_whose_it_is(length: int, tmp_path: Path) -> None:
    other = np.zeros(length, np.float32).tobytes()
    for task, fault in (
        (assignment(tmp_path, new_inputs=[other]), CandidateBroken),
        (assignment(tmp_path, old_inputs=[other]), Rejected),
    ):
        with running(task) as (channel, ended):
            deadline = time.monotonic() + LIMIT_S
            while not ended and time.monotonic() < deadline:
                channel.receive()
        assert type(ended[0]) is fault


def test_a_candidate_of_another_shape_is_compared_on_its_own_inputs(tmp_path: Path) -> None:
    task = assignment(tmp_path, new="narrow", new_inputs=[np.zeros(3, np.float32).tobytes()])
    with running(task) as (channel, ended):
        heard(channel, lambda messages: len(messages) > 2)
    assert ended == []


def child_says(task: TrialAssignment) -> tuple[list[Any], Child[FromTrial]]:
    """A trial's process, until it ends."""
    child: Child[FromTrial] = start("trial", task, FromTrial, "trial")
    try:
        return heard(child.channel, lambda _messages: False), child
    finally:
        child.process.wait(LIMIT_S)


def test_a_candidate_whose_file_is_corrupt_is_told_of_and_the_process_ends_well(tmp_path: Path) -> None:
    task = assignment(tmp_path)
    ModelStore(tmp_path).path(task.new.digest).write_bytes(b"rotten")
    (failed,), child = child_says(task)
    assert isinstance(failed, CandidateFailed)
    assert failed.reason == "corrupt_model"
    assert child.how_it_ended() == "exit status 0"


def test_an_old_model_that_fails_is_not_blamed_on_the_candidate(tmp_path: Path) -> None:
    task = assignment(tmp_path)
    ModelStore(tmp_path).path(task.old.digest).write_bytes(b"rotten")
    (failed,), child = child_says(task)
    assert isinstance(failed, BaselineFailed)
    assert failed.reason == "corrupt_model"
    assert child.how_it_ended() == "exit status 0"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_trial_takes_no_more_than_its_share_of_a_core_and_ends_with_its_supervisor(tmp_path: Path) -> None:
    child: Child[FromTrial] = start("trial", assignment(tmp_path, "slow", "slow", duty=0.1), FromTrial, "trial")
    heard(child.channel, lambda messages: len(messages) > 1)
    started, used_s = time.monotonic(), cpu_s(child.pid)
    heard(child.channel, lambda _messages: time.monotonic() - started > 2.0)
    share = (cpu_s(child.pid) - used_s) / (time.monotonic() - started)
    child.channel.close()
    child.process.wait(LIMIT_S)
    assert 0 < share < 0.25
    assert child.how_it_ended() == "exit status 0"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_trial_without_an_assignment_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["trial", "--fd", str(theirs.detach())])
    monkeypatch.setattr("edge_agent.limits.yield_to_others", lambda: None)  # it could not be undone for other tests
    try:
        assert trial.main() == 0
    finally:
        signal.signal(signal.SIGINT, before)
