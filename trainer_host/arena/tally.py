"""What a game counts while it plays: outcomes, answers, errors, and how long answers took."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from trainer_host.arena.evaluation import win_rate

BUCKETS_PER_DOUBLING = 32


class Latencies:
    """A histogram of durations in buckets 2% wide, so that a game that never ends needs no more memory."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()

    def add(self, duration_ns: int) -> None:
        """Count one duration, of at least 1 ns."""
        self._buckets[round(math.log2(max(duration_ns, 1)) * BUCKETS_PER_DOUBLING)] += 1

    def percentile_us(self, share: float) -> float | None:
        """What `share` (0 to 1) of them do not exceed, in µs, to the width of a bucket; `None` without any."""
        wanted = share * self._buckets.total()
        below = 0
        for bucket in sorted(self._buckets):
            below += self._buckets[bucket]
            if below >= wanted:
                return round(2 ** (bucket / BUCKETS_PER_DOUBLING) / 1000, 1)
        return None


class Outcomes:
    """Battles won, drawn and lost."""

    def __init__(self) -> None:
        self.wins = 0
        self.draws = 0
        self.losses = 0

    @property
    def battles(self) -> int:
        """How many there are."""
        return self.wins + self.draws + self.losses

    def add(self, outcome: int) -> None:
        """Count a battle: 1 won, 0 drawn, -1 lost."""
        self.wins += outcome > 0
        self.draws += outcome == 0
        self.losses += outcome < 0

    def report(self) -> dict[str, Any]:
        """The counts, with the 95% interval of the share of wins."""
        result = win_rate(self.wins, self.draws, self.losses)
        return {**result._asdict(), "win_rate": result.rate}


class Tally:
    """Everything a game counts.

    Attributes:
        outcomes: All battles that have ended.
        interrupted: Battles in which an answer was missing or an error.
        timeouts: Observations without an answer in time.
        errors: Error code to answers.
        models: Digest to answers with an action.
        versions: Model version to answers with an action.
        by_version: Model version to the outcomes of the battles that it alone has played.
    """

    def __init__(self) -> None:
        self.outcomes = Outcomes()
        self.interrupted = 0
        self.timeouts = 0
        self.errors: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.versions: Counter[int] = Counter()
        self.by_version: dict[int, Outcomes] = {}
        self._answers = 0
        self._latencies = Latencies()
        self._lap_latencies = Latencies()
        self._lap_battles = 0
        self._lap_answers = 0

    def answered(self, model: str, version: int, duration_ns: int) -> None:
        """Count an answer with an action."""
        self._answers += 1
        self.models[model] += 1
        self.versions[version] += 1
        self._latencies.add(duration_ns)
        self._lap_latencies.add(duration_ns)

    def ended(self, outcome: int, versions: set[int]) -> None:
        """Count a battle that these versions have played."""
        self.outcomes.add(outcome)
        if len(versions) == 1:
            self.by_version.setdefault(next(iter(versions)), Outcomes()).add(outcome)

    def lap(self, seconds: float) -> dict[str, Any]:
        """A report: counts since the start, rates and latencies since the last lap, which took `seconds`."""
        battles, answers = self.outcomes.battles - self._lap_battles, self._answers - self._lap_answers
        report = self._report(seconds, battles, answers, self._lap_latencies)
        self._lap_latencies = Latencies()
        self._lap_battles, self._lap_answers = self.outcomes.battles, self._answers
        return {"final": False, **report}

    def final(self, seconds: float) -> dict[str, Any]:
        """A report on the whole game, which took `seconds`."""
        return {"final": True, **self._report(seconds, self.outcomes.battles, self._answers, self._latencies)}

    def _report(self, seconds: float, battles: int, answers: int, latencies: Latencies) -> dict[str, Any]:
        return {
            **self.outcomes.report(),
            "seconds": round(seconds, 3),
            "battles_per_s": round(battles / seconds, 1) if seconds > 0 else 0.0,
            "answers": self._answers,
            "answers_per_s": round(answers / seconds, 1) if seconds > 0 else 0.0,
            "latency_us_p50": latencies.percentile_us(0.5),
            "latency_us_p99": latencies.percentile_us(0.99),
            "errors": dict(self.errors),
            "timeouts": self.timeouts,
            "interrupted": self.interrupted,
            "models": dict(self.models),
            "versions": {str(version): answers for version, answers in self.versions.items()},
            "by_version": {str(version): outcomes.report() for version, outcomes in self.by_version.items()},
        }
