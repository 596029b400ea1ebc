"""The supervisor's side of a side-by-side run: a trial child, and the judge that hears its pairs.

Serves both the trial before a commit and the watch after it; they differ in their judge and in how often a pair is run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from edge_agent.children import BaselineFailed, CandidateFailed, Child, FromTrial, RecentInputs, TimedPairs, TrialReady
from protocol.messages import Verdict

log = logging.getLogger(__name__)

REFRESH_S = 2.0
START_LIMIT_S = 120.0


class Judge(Protocol):
    """What a comparison needs of a judge: see `edge_agent.judge`."""

    def observe(self, old_ns: int, new_ns: int, *, throttled: bool = False) -> object:
        """Hear one pair; a truthy answer ends the comparison."""

    def verdict(self) -> Verdict:
        """Everything heard so far, as evidence."""


class Comparison:
    """One trial or watch in progress.

    Args:
        child: The trial process.
        judge: Hears the pairs.
        old: Digest of the model that is served, or was before.
        new: Digest of the one that is compared with it.
        limit_s: After how long it ends without a decision of the judge.
        throttled: Whether the device is throttling now.
        now: When it begins.

    Attributes:
        decided: The judge has decided.
        timed_out: It has run for its whole time without a decision.
        died: The process has ended by itself.
        failure: What the candidate did wrong, as `(reason, text)`.
        baseline_failure: Why the old model cannot be run, as `(reason, text)`: there is nothing to compare with.
    """

    def __init__(
        self,
        child: Child[FromTrial],
        judge: Judge,
        *,
        old: str,
        new: str,
        limit_s: float,
        throttled: Callable[[], bool],
        now: float,
    ) -> None:
        self.child = child
        self.old, self.new = old, new
        self.decided = False
        self.timed_out = False
        self.died = False
        self.failure: tuple[str, str] | None = None
        self.baseline_failure: tuple[str, str] | None = None
        self._judge = judge
        self._throttled = throttled
        self._ends_at = now + limit_s
        self._heard_at = now
        self._refresh_at = math.inf  # not before the child has read its assignment, and says so

    def receive(self, now: float) -> None:
        """Deal with what the trial said, or with its end."""
        self._heard_at = now
        for message in self.child.channel.receive():
            match message:
                case TimedPairs():
                    self._hear(message.pairs)
                case CandidateFailed():
                    self.failure = (message.reason, message.text)
                case BaselineFailed():
                    log.error("trial %d: the old model failed: %s", self.child.pid, message.text)
                    self.baseline_failure = (message.reason, message.text)
                case TrialReady():
                    self._refresh_at = now + REFRESH_S
                    log.info("trial %d: the second model took %.1f MB", self.child.pid, message.memory_bytes / 1e6)
        self.died = self.child.channel.closed and not self.ended

    def tick(self, now: float, recent: Callable[[], Sequence[bytes]]) -> None:
        """Pass on fresh states, and end what has no end."""
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_S
            if inputs := list(recent()):
                self.child.channel.send(RecentInputs(inputs))
        self.child.channel.flush()
        if now - self._heard_at > START_LIMIT_S:
            log.error("trial %d gives no sign; killing it", self.child.pid)
            self.died = True
        self.timed_out = now >= self._ends_at

    @property
    def ended(self) -> bool:
        """Whether there is something to tell."""
        failed = self.failure is not None or self.baseline_failure is not None
        return self.decided or self.timed_out or self.died or failed

    def verdict(self) -> Verdict:
        """The judge's verdict on what was heard."""
        return self._judge.verdict()

    def stop(self) -> None:
        """End the process."""
        self.child.kill()

    def _hear(self, pairs: list[tuple[int, int]]) -> None:
        throttled = self._throttled()
        for old_ns, new_ns in pairs:
            if self.decided:  # the judge has stopped listening
                return
            self.decided = bool(self._judge.observe(old_ns, new_ns, throttled=throttled))
