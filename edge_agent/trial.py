"""The process that runs two models side by side and reports how long each took.

Both interpreters live in this one process and thread. A pair is one state, both models, back to back, in an order
decided by a seeded fair coin; every pair is reported. Between pairs the process sleeps, so that it uses no more than
its share of a core.
"""

from __future__ import annotations

import logging
import random
import select
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]

from edge_agent import limits, runtime
from edge_agent.channel import Channel
from edge_agent.children import (
    BaselineFailed,
    CandidateFailed,
    ModelFile,
    RecentInputs,
    TimedPairs,
    ToTrial,
    TrialAssignment,
    TrialReady,
    first_message,
    inherited_channel,
)
from edge_agent.judge import coin
from edge_agent.model_store import ModelStore
from protocol import service
from protocol.errors import EdgeswapError, Rejected, Unavailable

log = logging.getLogger("edge_agent.trial")

BLOCK_S = 0.005
MAX_BLOCK_PAIRS = 128
MIN_REST_S = 0.02
LAST_WORDS_S = 2.0


class CandidateBroken(Rejected):
    """The new model cannot be loaded, or fails where the old one answers."""


class Trial:
    """Runs pairs until the supervisor closes the channel.

    Args:
        assignment: What to compare, on what, and at what cost.
        channel: To the supervisor.

    Raises:
        CandidateBroken: The new model cannot be loaded.
        Rejected: The old one cannot.
    """

    def __init__(self, assignment: TrialAssignment, channel: Channel[ToTrial]) -> None:
        self._assignment = assignment
        self._channel = channel
        self._old = _load(assignment.old, assignment.threads)
        before = psutil.Process().memory_info().rss
        limits.limit_memory(assignment.memory_bytes)
        try:
            self._new = _load(assignment.new, assignment.threads)
        except Rejected as error:
            raise CandidateBroken(error.code, error.text) from error
        except MemoryError as error:
            raise CandidateBroken("out_of_memory", "there is no memory for the new model's file") from error
        except Unavailable as error:
            raise CandidateBroken("unavailable", str(error)) from error
        self._memory_bytes = psutil.Process().memory_info().rss - before
        self._coin = coin(assignment.seed)
        self._pick = random.Random(assignment.seed + 1)
        self._inputs = [
            (_vector(old), _vector(new)) for old, new in zip(assignment.old_inputs, assignment.new_inputs, strict=True)
        ]

    def run(self) -> None:
        """Report pairs in blocks, and rest in between.

        Raises:
            CandidateBroken: The new model failed. What was timed before in the same block is not reported.
        """
        self._channel.send(TrialReady(memory_bytes=max(self._memory_bytes, 0)))
        one_at_a_time = self._assignment.interval_s > 0
        while not self._channel.closed:
            started = time.perf_counter()
            pairs = []
            for _ in range(1 if one_at_a_time else MAX_BLOCK_PAIRS):
                pairs.append(self._pair())
                if time.perf_counter() - started > BLOCK_S:
                    break
            self._channel.send(TimedPairs(pairs))
            busy_s = time.perf_counter() - started
            self._rest(max(busy_s * (1 / self._assignment.duty - 1), self._assignment.interval_s - busy_s, MIN_REST_S))

    def _pair(self) -> tuple[int, int]:
        """One state through both models.

        Raises:
            CandidateBroken: The new one failed.
            Rejected: The old one did, which is not the new one's fault.
        """
        for_old, for_new = self._pick.choice(self._inputs)
        if next(self._coin):
            new_ns, scores = self._timed_new(for_new)
            old_ns, _ = _timed(self._old, for_old)
        else:
            old_ns, _ = _timed(self._old, for_old)
            new_ns, scores = self._timed_new(for_new)
        if not np.isfinite(scores).all():
            raise CandidateBroken("not_finite", "the new model's output is not finite")
        return old_ns, new_ns

    def _timed_new(self, features: runtime.Vector) -> tuple[int, runtime.Vector]:
        try:
            return _timed(self._new, features)
        except Rejected as error:
            raise CandidateBroken(error.code, error.text) from error

    def _rest(self, seconds: float) -> None:
        """Sleep, and take what the supervisor says meanwhile."""
        deadline = time.perf_counter() + seconds
        while not self._channel.closed and (left_s := deadline - time.perf_counter()) > 0:
            if not select.select([self._channel], [], [], left_s)[0]:
                return
            for message in self._channel.receive():
                if isinstance(message, RecentInputs):
                    self._inputs = [(vector, vector) for vector in map(_vector, message.inputs)]


def _timed(model: runtime.Model, features: runtime.Vector) -> tuple[int, runtime.Vector]:
    started = time.perf_counter_ns()
    scores = model.invoke(features)
    return time.perf_counter_ns() - started, scores


def _load(file: ModelFile, threads: int) -> runtime.Model:
    model = runtime.load(ModelStore(Path(file.folder)).open(file.digest), threads)
    model.warm_up()
    return model


def _vector(data: bytes) -> runtime.Vector:
    return np.frombuffer(data, "<f4")


def main() -> int:
    """The trial's process."""
    service.set_up_logging()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits.yield_to_others()
    channel = inherited_channel(sys.argv[1:], ToTrial)
    assignment = first_message(channel)
    if assignment is None:
        return 0
    assert isinstance(assignment, TrialAssignment)
    try:
        Trial(assignment, channel).run()
    except CandidateBroken as error:
        channel.send(CandidateFailed(reason=error.code, text=error.text))
    except EdgeswapError as error:
        reason = error.code if isinstance(error, Rejected) else "unavailable"
        channel.send(BaselineFailed(reason=reason, text=str(error)))
    channel.drain(LAST_WORDS_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
