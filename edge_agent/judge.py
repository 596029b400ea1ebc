"""Is the new model slower than the old one? A judge that may be asked after every pair.

**Pairs.** Both models run on the same state, back to back, and a fair coin decides which goes first. With δ = 0.05
and, for each pair, r = new / ((1+δ)·old):

    S += r > 1;  n += 1                      # r == 1 is skipped
    U[m] += r > m;  D[m] += r < 1/m          # m in 2, 4, 8: the tail arms
    e(up, down) = mean over λ of (1+λ)^up · (1-λ)^down
    E = 0.4·e(S, n-S) + 0.2·Σ_m e(U[m], D[m])

    ROLL BACK   as soon as E ≥ 1/alpha
    COMMIT      when n ≥ 3000 and e(P, n-P) ≥ 100, where P counts pairs with new ≤ 1.15·old
    otherwise   at the cap of pairs: inconclusive, the old model stays

**Why the coin is enough.** Let the two places of a pair (first, second) have whatever conditions they have: heat, a
busy core, a warm cache. Let a model cost old(i) or new(i) in place i, and let new(i) ≤ (1+δ)·old(i) in both: the
candidate is not slower. The coin's two faces give r' = new(1) / ((1+δ)·old(2)) and r'' = new(2) / ((1+δ)·old(1)), and
r'·r'' ≤ 1. So r > 1 on at most one face, and whenever r > m on one, r < 1/m on the other: given the conditions and
all pairs before, P(r > 1 | r ≠ 1) ≤ ½ and P(r > m | r > m or r < 1/m) ≤ ½. No word of how noise is distributed, how
it drifts, or whether pairs are alike. It breaks without the coin, and if pairs are left out because of how they came
out.

**Why one may look after every pair.** A bet of the share λ on "r > 1" multiplies by 1+λ or 1-λ, so it gains nothing
in the mean if P ≤ ½. E is a mean of such products, a non-negative supermartingale that begins at 1, and by Ville's
inequality P(E ever reaches 1/alpha) ≤ alpha. (Ville 1939, Étude critique de la notion de collectif; Howard, Ramdas,
McAuliffe, Sekhon 2021, Time-uniform, nonparametric, nonasymptotic confidence sequences; Ramdas, Grünwald, Vovk,
Shafer 2023, Game-theoretic statistics and safe anytime-valid inference.) Several λ share the stake since the best one
is not known; the tail arms see a model that is only now and then much slower, which the sign alone hardly shows. In
the same way e(P, n-P) is evidence against "more than 15% slower in at least half of the pairs". It is looked at only
after 3000 pairs, so that rare slow calls have had time to show. Pairs with r = 1 are left out of it too: they all are
in P, so it only gets harder.

**The watch** looks for a change that may come at any time, so its evidence must not be used up by a long good past.
On r = new / (r0·1.10·old), with r0 the ratio at commit, each λ has A ← (A + 1)·(1 ± λ), and the alarm is a mean A ≥ c
= 1e7 (Shiryaev-Roberts: Pollak 1985, Optimal detection of a change in distribution; with betting e-values in place of
likelihood ratios: Shin, Ramdas, Rinaldo 2024, E-detectors). While the new model keeps to its bound, A grows by at
most 1 per pair in the mean, so a false alarm comes after c pairs or more in the mean, and within k pairs with
probability k/c or less. Ratios carry over from trial to watch only as far as the conditions of a pair are alike;
hence 10% more.

**Times of nothing.** A clock too coarse for a fast model may give 0 ns. Both times are raised to 1 ns at least: no
pair is left out, and new ≤ (1+δ)·old still holds afterwards if it held before. A clock's tick should be far below the
models' times.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

from msgspec import Struct

from protocol.messages import Verdict

Outcome: TypeAlias = Literal["commit", "rollback", "inconclusive"]

# Stakes grow beyond what a float holds; e**690 does not, nor does a sum of a few of it.
_MAX_LOG = 690.0


class JudgeSettings(Struct, frozen=True, kw_only=True):
    """What the judge asks for; the module says what each is for.

    Attributes:
        delta: δ, how much slower still counts as not slower.
        alpha: The chance of ever rolling back a model that is not slower, at most.
        sign_weight: Stake of the arm that sees r > 1.
        tail_weight: Stake of each tail arm. All stakes together are at most 1.
        tails: m of the tail arms.
        lambdas: λ, the shares that are bet.
        commit_pairs: How many pairs a commit takes at least.
        commit_ratio: A new model this much slower must not be committed.
        commit_evidence: How much evidence against that a commit takes.
        max_pairs: At how many pairs a trial ends without a decision; also how many a judge remembers.
        watch_delta: How much slower than at commit still counts as not slower.
        watch_threshold: c, the mean number of pairs to a false alarm, at least.
    """

    delta: float = 0.05
    alpha: float = 0.001
    sign_weight: float = 0.4
    tail_weight: float = 0.2
    tails: tuple[int, ...] = (2, 4, 8)
    lambdas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
    commit_pairs: int = 3000
    commit_ratio: float = 1.15
    commit_evidence: float = 100.0
    max_pairs: int = 20_000
    watch_delta: float = 0.10
    watch_threshold: float = 1e7

    def __post_init__(self) -> None:
        assert self.sign_weight + self.tail_weight * len(self.tails) <= 1 + 1e-9, "more is staked than there is"
        assert all(0 < share < 1 for share in self.lambdas), "a bet is a share of what there is"


class Pair(Struct, frozen=True, gc=False):
    """One state, both models.

    Attributes:
        old_ns: How long the old model took.
        new_ns: How long the new one took.
        throttled: Whether the device throttled.
    """

    old_ns: int
    new_ns: int
    throttled: bool = False


def coin(seed: int) -> Iterator[bool]:
    """A fair coin: whether the candidate goes first in the next pair. Never ends."""
    source = random.Random(seed)
    while True:
        yield source.getrandbits(1) == 1


class EValue:
    """e(up, down) for given λ.

    Args:
        lambdas: The shares that are bet.
    """

    def __init__(self, lambdas: Sequence[float]) -> None:
        self._logs = [(math.log1p(share), math.log1p(-share)) for share in lambdas]

    def __call__(self, up: int, down: int) -> float:
        """The mean of (1+λ)^up · (1-λ)^down, held below infinity."""
        total = 0.0
        for gain, loss in self._logs:
            total += math.exp(min(up * gain + down * loss, _MAX_LOG))
        return total / len(self._logs)


class Record:
    """What a judge has heard: the pairs, and n, S and P.

    Args:
        settings: The judge's.
        limit: new / old up to here is not slower.
        seed: Of the coin.

    Attributes:
        pairs: The newest `max_pairs`, the oldest first.
        counted: n.
        slower: S.
        passed: P.
    """

    def __init__(self, settings: JudgeSettings, limit: float, seed: int) -> None:
        self.pairs: deque[Pair] = deque(maxlen=settings.max_pairs)
        self.counted = self.slower = self.passed = 0
        self._commit_ratio = settings.commit_ratio
        self._limit = limit
        self._seed = seed

    def add(self, pair: Pair) -> float:
        """Count a pair. Returns r; a pair with r == 1 is kept but not counted."""
        self.pairs.append(pair)
        ratio = _ratio(pair)
        r = ratio / self._limit
        if r != 1.0:
            self.counted += 1
            self.slower += r > 1.0
            self.passed += ratio <= self._commit_ratio
        return r

    def verdict(
        self,
        outcome: Outcome,
        *,
        evidence: float,
        acceptance: float,
        tail_up: dict[int, int],
        tail_down: dict[int, int],
    ) -> Verdict:
        """A verdict with all evidence. Without pairs the times are 0."""
        old_us = sorted(pair.old_ns / 1e3 for pair in self.pairs)
        new_us = sorted(pair.new_ns / 1e3 for pair in self.pairs)
        ratios = sorted(map(_ratio, self.pairs))
        return Verdict(
            outcome=outcome,
            pairs=self.counted,
            slower=self.slower,
            passed=self.passed,
            evidence=evidence,
            acceptance=acceptance,
            ratio_median=_percentile(ratios, 50),
            old_us_p50=_percentile(old_us, 50),
            old_us_p99=_percentile(old_us, 99),
            new_us_p50=_percentile(new_us, 50),
            new_us_p99=_percentile(new_us, 99),
            tail_up=tail_up,
            tail_down=tail_down,
            throttled_share=sum(pair.throttled for pair in self.pairs) / max(len(self.pairs), 1),
            seed=self._seed,
        )


class TrialJudge:
    """Decides whether a candidate is committed.

    Args:
        settings: What it asks for.
        seed: Of the coin; goes into the verdict.

    Attributes:
        outcome: The decision, once it has fallen.
    """

    def __init__(self, settings: JudgeSettings, seed: int) -> None:
        self.outcome: Outcome | None = None
        self._settings = settings
        self._record = Record(settings, 1 + settings.delta, seed)
        self._e = EValue(settings.lambdas)
        self._up = dict.fromkeys(settings.tails, 0)
        self._down = dict.fromkeys(settings.tails, 0)
        self._tail_evidence = dict.fromkeys(settings.tails, 1.0)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Everything heard, for `replay`."""
        return tuple(self._record.pairs)

    def observe(self, old_ns: int, new_ns: int, *, throttled: bool = False) -> Outcome | None:
        """Hear a pair, in the order in which they were run. Returns the decision when it falls.

        After the decision a judge hears no more pairs.
        """
        assert self.outcome is None, "the judge has decided"
        r = self._record.add(Pair(old_ns, new_ns, throttled))
        for m in self._settings.tails:
            if r > m or r < 1 / m:
                arm = self._up if r > m else self._down
                arm[m] += 1
                self._tail_evidence[m] = self._e(self._up[m], self._down[m])
        self.outcome = self._decide()
        return self.outcome

    def verdict(self) -> Verdict:
        """The decision with its evidence; `inconclusive` if none has fallen."""
        return self._record.verdict(
            self.outcome or "inconclusive",
            evidence=self._evidence(),
            acceptance=self._acceptance(),
            tail_up=dict(self._up),
            tail_down=dict(self._down),
        )

    def _decide(self) -> Outcome | None:
        settings = self._settings
        if self._evidence() >= 1 / settings.alpha:
            return "rollback"
        if self._record.counted >= settings.commit_pairs and self._acceptance() >= settings.commit_evidence:
            return "commit"
        return "inconclusive" if len(self._record.pairs) >= settings.max_pairs else None

    def _evidence(self) -> float:
        record, settings = self._record, self._settings
        sign = self._e(record.slower, record.counted - record.slower)
        return settings.sign_weight * sign + settings.tail_weight * sum(self._tail_evidence.values())

    def _acceptance(self) -> float:
        return self._e(self._record.passed, self._record.counted - self._record.passed)


class WatchJudge:
    """Raises an alarm when a committed model has become slower.

    Its verdict's `evidence` is the mean A, and its outcome `rollback` after an alarm, else `commit`: the commit stands.

    Args:
        settings: What it asks for.
        ratio_at_commit: r0, new to old.
        seed: Of the coin; goes into the verdict.

    Attributes:
        alarmed: Whether there was an alarm.
    """

    def __init__(self, settings: JudgeSettings, ratio_at_commit: float, seed: int) -> None:
        assert ratio_at_commit > 0, "a ratio of times"
        self.alarmed = False
        self._settings = settings
        self._record = Record(settings, ratio_at_commit * (1 + settings.watch_delta), seed)
        self._arms = [0.0] * len(settings.lambdas)

    def observe(self, old_ns: int, new_ns: int, *, throttled: bool = False) -> bool:
        """Hear a pair. Returns whether this is the alarm; after it the judge hears no more."""
        assert not self.alarmed, "the judge has decided"
        r = self._record.add(Pair(old_ns, new_ns, throttled))
        if r != 1.0:
            sign = 1 if r > 1.0 else -1
            self._arms = [
                (arm + 1) * (1 + sign * share) for arm, share in zip(self._arms, self._settings.lambdas, strict=True)
            ]
            self.alarmed = self._mean() >= self._settings.watch_threshold
        return self.alarmed

    def verdict(self) -> Verdict:
        """What was heard, as evidence."""
        record = self._record
        return record.verdict(
            "rollback" if self.alarmed else "commit",
            evidence=self._mean(),
            acceptance=EValue(self._settings.lambdas)(record.passed, record.counted - record.passed),
            tail_up={},
            tail_down={},
        )

    def _mean(self) -> float:
        return sum(self._arms) / len(self._arms)


def replay(pairs: Iterable[Pair], settings: JudgeSettings, seed: int) -> Verdict:
    """The verdict on recorded pairs, as it was when they were run. Pairs after the decision change nothing."""
    judge = TrialJudge(settings, seed)
    for pair in pairs:
        if judge.observe(pair.old_ns, pair.new_ns, throttled=pair.throttled) is not None:
            break
    return judge.verdict()


def _ratio(pair: Pair) -> float:
    return max(pair.new_ns, 1) / max(pair.old_ns, 1)


def _percentile(ascending: Sequence[float], percent: int) -> float:
    """By nearest rank; 0 of nothing."""
    return ascending[math.ceil(percent * len(ascending) / 100) - 1] if ascending else 0.0
