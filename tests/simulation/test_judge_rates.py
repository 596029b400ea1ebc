"""How often the judge is wrong, and how fast it is right, in a world made to fool it.

Each pair has its own conditions: heavy-tailed noise on each call (one in fifty is up to hundreds of times slower), a
device that begins and ends to throttle at random times, also between the two calls of a pair, a slow drift, and a
second place that is warmer, and so quicker, than the first.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator

import pytest

from edge_agent.judge import JudgeSettings, TrialJudge, WatchJudge, coin

COST_NS = 20_000
THROTTLED = 1.7


def noise_pool() -> list[float]:
    source = random.Random(2026)
    return [
        source.lognormvariate(0.0, 0.13) * (1 + source.paretovariate(1.2) if source.random() < 0.02 else 1.0)
        for _ in range(1 << 16)
    ]


NOISE = noise_pool()


def pairs(
    seed: int, slowdown: Callable[[float], float], *, second_place: float = 1.0, fair: bool = True
) -> Iterator[tuple[int, int]]:
    """Old and new times of pair after pair.

    Args:
        seed: Of this world.
        slowdown: By how much the new model is slower in a call, given a random number between 0 and 1.
        second_place: What the second call of a pair costs, relative to the first.
        fair: Toss the coin; otherwise the candidate always goes first.
    """
    world = random.Random(seed)
    uniform, bits = world.random, world.getrandbits
    toss = coin(seed + 1)
    throttled, clock, phase = False, 0, uniform() * 6

    def conditions() -> float:
        nonlocal throttled, clock
        clock += 1
        if uniform() < 0.002:
            throttled = not throttled
        drift = 1 + 0.2 * math.sin(phase + clock / 700)
        return COST_NS * drift * (THROTTLED if throttled else 1.0) * NOISE[bits(16)]

    while True:
        first, second = conditions(), second_place * conditions()
        factor = slowdown(uniform())
        if next(toss) or not fair:
            yield int(second), int(first * factor)
        else:
            yield int(first), int(second * factor)


def constant(factor: float) -> Callable[[float], float]:
    return lambda _: factor


def judged(world: Iterator[tuple[int, int]], settings: JudgeSettings) -> tuple[str, int]:
    """The decision, and after how many pairs."""
    judge = TrialJudge(settings, seed=0)
    for seen, (old_ns, new_ns) in enumerate(world, 1):
        if outcome := judge.observe(old_ns, new_ns):
            return outcome, seen
    raise AssertionError("a world never ends")


def test_equal_models_are_committed() -> None:
    decided = [judged(pairs(seed, constant(1.0), second_place=0.93), JudgeSettings()) for seed in range(400)]
    assert {outcome for outcome, _ in decided} == {"commit"}
    assert max(seen for _, seen in decided) < 3010, "r is hardly ever just 1"


def test_false_rollbacks_are_not_more_than_alpha_allows() -> None:
    # The worst that still counts as not slower, and an alpha large enough for a rate to be seen.
    settings = JudgeSettings(alpha=0.05, max_pairs=500)
    runs = 2500
    decided = [judged(pairs(seed, constant(1.05), second_place=0.93), settings)[0] for seed in range(runs)]
    false, allowed = decided.count("rollback"), settings.alpha * runs
    print(f"false rollbacks: {false} of {runs}, allowed {allowed:.0f}")
    assert 0 < false <= allowed + 3 * math.sqrt(allowed)


@pytest.mark.parametrize(
    ("factor", "runs", "at_most"), [(1.1, 101, 900), (1.25, 201, 70), (1.5, 301, 30), (2.0, 301, 20)]
)
def test_slower_models_are_rolled_back_soon(factor: float, runs: int, at_most: int) -> None:
    decided = [judged(pairs(seed, constant(factor)), JudgeSettings()) for seed in range(runs)]
    assert {outcome for outcome, _ in decided} == {"rollback"}
    median = statistics.median(seen for _, seen in decided)
    print(f"{factor}: median {median} pairs, longest {max(seen for _, seen in decided)}")
    assert 15 <= median <= at_most


def test_a_slow_tail_is_seen() -> None:
    def tail(luck: float) -> float:
        return 10.0 if luck < 0.02 else 1.0

    decided = [judged(pairs(seed, tail), JudgeSettings()) for seed in range(51)]
    rolled_back = [seen for outcome, seen in decided if outcome == "rollback"]
    print(f"tail: {len(rolled_back)} of {len(decided)}, median {statistics.median(rolled_back)} pairs")
    assert len(rolled_back) >= 0.8 * len(decided)
    assert statistics.median(rolled_back) <= 2500


def test_without_the_coin_a_warmer_second_place_condemns_equal_models() -> None:
    settings = JudgeSettings(max_pairs=3000)
    runs = 60

    def rollbacks(*, fair: bool) -> int:
        worlds = (pairs(seed, constant(1.0), second_place=0.93, fair=fair) for seed in range(runs))
        return [judged(world, settings)[0] for world in worlds].count("rollback")

    assert rollbacks(fair=False) >= 0.8 * runs
    assert rollbacks(fair=True) == 0


def test_a_watch_is_quiet_over_a_good_model_and_alarms_over_one_that_became_slow() -> None:
    alarms = []
    for seed in range(40):
        good = pairs(seed, constant(1.1), second_place=0.93)  # the worst that still counts as not slower
        slow = pairs(seed + 1000, constant(1.5), second_place=0.93)
        judge = WatchJudge(JudgeSettings(), ratio_at_commit=1.0, seed=0)
        assert not any(judge.observe(*next(good)) for _ in range(3000))
        alarms.append(next(seen for seen in range(1, 2000) if judge.observe(*next(slow))))
    print(f"watch: median {statistics.median(alarms)} pairs after the change, longest {max(alarms)}")
    assert statistics.median(alarms) <= 100
