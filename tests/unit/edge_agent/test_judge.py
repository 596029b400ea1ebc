from __future__ import annotations

import itertools
import math
from fractions import Fraction

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.judge import EValue, JudgeSettings, Pair, TrialJudge, WatchJudge, coin, replay
from protocol.messages import Verdict

LAMBDAS = tuple(Fraction(percent, 100) for percent in (5, 10, 20, 35, 50, 70, 90))
TAILS = (2, 4, 8)

# Small enough for short sequences to come to every decision.
QUICK = JudgeSettings(alpha=0.05, commit_pairs=20, commit_evidence=10.0, max_pairs=60, watch_threshold=50.0)


# The formula, straight from the design, exact and slow.


def e(up: int, down: int) -> Fraction:
    return sum(((1 + share) ** up * (1 - share) ** down for share in LAMBDAS), Fraction(0)) / len(LAMBDAS)


def evidence(rs: list[Fraction]) -> Fraction:
    rs = [r for r in rs if r != 1]
    slower = sum(r > 1 for r in rs)
    tails = sum((e(sum(r > m for r in rs), sum(r < Fraction(1, m) for r in rs)) for m in TAILS), Fraction(0))
    return Fraction(2, 5) * e(slower, len(rs) - slower) + Fraction(1, 5) * tails


def reference_trial(pairs: list[tuple[int, int]]) -> tuple[str | None, int]:
    """The decision, and after how many pairs."""
    for seen in range(1, len(pairs) + 1):
        floored = [(max(old, 1), max(new, 1)) for old, new in pairs[:seen]]
        rs = [Fraction(new) / (Fraction(21, 20) * old) for old, new in floored]
        passed = [new <= Fraction(23, 20) * old for (old, new), r in zip(floored, rs, strict=True) if r != 1]
        if evidence(rs) >= 20:
            return "rollback", seen
        if len(passed) >= 20 and e(sum(passed), len(passed) - sum(passed)) >= 10:
            return "commit", seen
        if seen >= 60:
            return "inconclusive", seen
    return None, len(pairs)


def reference_watch(pairs: list[tuple[int, int]], ratio: Fraction) -> int | None:
    """After how many pairs the alarm comes."""
    arms = [Fraction(0)] * len(LAMBDAS)
    for seen, (old, new) in enumerate(pairs, 1):
        r = Fraction(max(new, 1)) / (ratio * Fraction(11, 10) * max(old, 1))
        if r != 1:
            arms = [(a + 1) * (1 + (share if r > 1 else -share)) for a, share in zip(arms, LAMBDAS, strict=True)]
        if sum(arms) / len(arms) >= 50:
            return seen
    return None


def heard(pairs: list[tuple[int, int]], settings: JudgeSettings = QUICK) -> TrialJudge:
    """A judge that heard pairs until it decided."""
    judge = TrialJudge(settings, seed=7)
    for old_ns, new_ns in pairs:
        if judge.observe(old_ns, new_ns):
            break
    return judge


def approaching(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


# Times that are alike, apart, in the tails, nothing, and exactly on the limits (21/20, 23/20, 11/10 and multiples).
times = st.sampled_from([0, 1, 2, 10, 19, 20, 21, 22, 23, 40, 42, 43, 80, 84, 90, 160, 170, 200])
sequences = st.lists(st.tuples(times, times), max_size=80)
slower_sequences = st.lists(st.tuples(st.just(20), st.sampled_from([10, 21, 22, 23, 24, 50, 100])), max_size=80)


@given(sequences | slower_sequences)
@example([(20, 20)] * 60)
@example([(20, 40)] * 60)
@example([(20, 24), (24, 20)] * 40)
@example([(20, 21)] * 60)
@example([(20, 200), (20, 20), (20, 20)] * 20)
def test_a_trial_decides_as_the_formula_does(pairs: list[tuple[int, int]]) -> None:
    judge = heard(pairs)
    assert (judge.outcome, len(judge.pairs)) == reference_trial(pairs)
    floored = [(max(old, 1), max(new, 1)) for old, new in pairs[: len(judge.pairs)]]
    rs = [Fraction(new) / (Fraction(21, 20) * old) for old, new in floored]
    counted = [pair for pair, r in zip(floored, rs, strict=True) if r != 1]
    passed = sum(new <= Fraction(23, 20) * old for old, new in counted)
    verdict = judge.verdict()
    assert verdict.evidence == approaching(float(evidence(rs)))
    assert verdict.acceptance == approaching(float(e(passed, len(counted) - passed)))
    assert (verdict.pairs, verdict.passed, verdict.slower) == (len(counted), passed, sum(r > 1 for r in rs))
    assert verdict.tail_up == {m: sum(r > m for r in rs) for m in TAILS}
    assert verdict.tail_down == {m: sum(r < Fraction(1, m) for r in rs) for m in TAILS}


@given(sequences | slower_sequences, st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(5, 4)]))
@example([(20, 22)] * 30, Fraction(1))
@example([(20, 23)] * 30, Fraction(1))
def test_a_watch_alarms_as_the_formula_does(pairs: list[tuple[int, int]], ratio: Fraction) -> None:
    judge = WatchJudge(QUICK, float(ratio), seed=7)
    alarm = next((seen for seen, (old, new) in enumerate(pairs, 1) if judge.observe(old, new)), None)
    assert alarm == reference_watch(pairs, ratio)
    assert judge.alarmed == (alarm is not None)
    assert judge.verdict().outcome == ("rollback" if alarm else "commit")


@pytest.mark.parametrize(("up", "down"), [(0, 0), (1, 0), (0, 1), (15, 0), (300, 200), (20, 900)])
def test_e_is_the_mean_of_the_bets(up: int, down: int) -> None:
    assert EValue(JudgeSettings().lambdas)(up, down) == approaching(float(e(up, down)))


def test_e_stays_finite() -> None:
    for up, down in ((20_000, 0), (10**9, 0), (0, 10**9), (10**9, 10**9)):
        assert 0.0 <= EValue(JudgeSettings().lambdas)(up, down) < math.inf


# The settings the design names.


def test_the_settings_are_the_designs() -> None:
    settings = JudgeSettings()
    assert settings.lambdas == approaching_all(LAMBDAS)
    assert (settings.delta, settings.alpha, settings.tails) == (0.05, 0.001, TAILS)
    assert (settings.commit_pairs, settings.commit_ratio, settings.commit_evidence) == (3000, 1.15, 100)
    assert (settings.watch_delta, settings.watch_threshold, settings.max_pairs) == (0.10, 1e7, 20_000)
    assert (settings.sign_weight, settings.tail_weight) == (0.4, 0.2)


def approaching_all(values: tuple[Fraction, ...]) -> object:
    return pytest.approx([float(value) for value in values])


def test_more_must_not_be_staked_than_there_is() -> None:
    with pytest.raises(AssertionError, match="staked"):
        JudgeSettings(tail_weight=0.3)
    with pytest.raises(AssertionError, match="share"):
        JudgeSettings(lambdas=(1.0,))


# Decisions, at full size.


def test_a_model_that_is_always_slower_is_rolled_back_at_once() -> None:
    judge = heard([(1000, 1100)] * 30, JudgeSettings())
    assert (judge.outcome, len(judge.pairs)) == ("rollback", 15)
    assert judge.verdict().evidence >= 1000


def test_a_model_that_is_always_far_slower_is_rolled_back_sooner() -> None:
    judge = heard([(1000, 10_000)] * 30, JudgeSettings())
    assert (judge.outcome, len(judge.pairs)) == ("rollback", 14)


def test_a_rare_slow_call_is_seen_in_the_tail() -> None:
    judge = heard([(1000, 1000)] * 49 + [(1000, 10_000)], JudgeSettings())
    for _ in range(60):
        for pair in [(1000, 1000)] * 49 + [(1000, 10_000)]:
            if judge.outcome is None:
                judge.observe(*pair)
    verdict = judge.verdict()
    assert verdict.outcome == "rollback"
    assert verdict.tail_up[8] == verdict.slower < 20
    assert verdict.ratio_median == 1.0


def test_a_commit_takes_3000_pairs() -> None:
    judge = heard([(1000, 1000)] * 4000, JudgeSettings())
    assert (judge.outcome, len(judge.pairs)) == ("commit", 3000)
    assert judge.verdict().acceptance >= 100


def test_a_pair_just_at_the_commit_ratio_passes_and_one_beyond_does_not() -> None:
    judge = heard([(100, 115), (100, 116), (20, 23), (10_000, 11_501)])
    assert judge.verdict().passed == 2


def test_a_model_between_the_bounds_is_inconclusive_at_the_cap() -> None:
    # As often faster as slower by more than 15%: neither bet wins.
    judge = heard([(100, 130), (130, 100)] * 10_001, JudgeSettings())
    assert (judge.outcome, len(judge.pairs)) == ("inconclusive", 20_000)


def test_a_pair_right_on_the_limit_is_kept_but_not_counted() -> None:
    judge = heard([(20, 21)] * 100)
    verdict = judge.verdict()
    assert (judge.outcome, len(judge.pairs)) == ("inconclusive", 60)
    assert (verdict.pairs, verdict.evidence, verdict.acceptance) == (0, approaching(1.0), 1.0)


def test_times_of_nothing_are_taken_as_a_nanosecond() -> None:
    assert heard([(0, 0)] * 8).verdict().slower == 0
    assert heard([(0, 2)] * 2).verdict().slower == 2
    assert heard([(1, 0)] * 2).verdict().tail_down[2] == 0
    assert heard([(3, 0)] * 2).verdict().tail_down[2] == 2
    watch = WatchJudge(QUICK, 1.0, seed=1)
    watch.observe(0, 0)
    assert watch.verdict().slower == 0


def test_after_the_decision_no_more_pairs_are_heard() -> None:
    judge = heard([(10, 100)] * 60)
    with pytest.raises(AssertionError, match="has decided"):
        judge.observe(10, 10)
    watch = WatchJudge(QUICK, 1.0, seed=1)
    while not watch.observe(10, 100):
        pass
    with pytest.raises(AssertionError, match="has decided"):
        watch.observe(10, 10)


# Verdicts.


def test_a_verdict_tells_what_was_measured() -> None:
    judge = TrialJudge(JudgeSettings(), seed=42)
    for number in range(1, 101):
        judge.observe(number * 1000, number * 2000, throttled=number > 75) if number % 10 == 0 else judge.observe(
            number * 1000, number * 1000
        )
    verdict = judge.verdict()
    assert verdict == Verdict(
        outcome="inconclusive",
        pairs=100,
        slower=10,
        passed=90,
        evidence=verdict.evidence,
        acceptance=verdict.acceptance,
        ratio_median=1.0,
        old_us_p50=50.0,
        old_us_p99=99.0,
        new_us_p50=53.0,
        new_us_p99=180.0,
        tail_up={2: 0, 4: 0, 8: 0},
        tail_down={2: 0, 4: 0, 8: 0},
        throttled_share=0.03,
        seed=42,
    )


def test_a_verdict_on_nothing() -> None:
    for judge in (TrialJudge(JudgeSettings(), seed=3), WatchJudge(JudgeSettings(), 1.0, seed=3)):
        verdict = judge.verdict()
        assert (verdict.pairs, verdict.ratio_median, verdict.new_us_p99, verdict.throttled_share) == (0, 0, 0, 0)
        assert verdict.seed == 3


def test_a_verdict_after_the_longest_trial_can_be_sent() -> None:
    judge = heard([(100, 100)] * 20_000, JudgeSettings(commit_evidence=math.inf))
    verdict = judge.verdict()
    assert verdict.acceptance > 1e290
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict) == verdict


def test_a_watch_tells_what_it_saw_and_forgets_the_oldest() -> None:
    judge = WatchJudge(QUICK, ratio_at_commit=1.0, seed=5)
    for _ in range(100):
        judge.observe(1000, 1000)
    for _ in range(20):
        judge.observe(1000, 500, throttled=True)
        judge.observe(2000, 1000)
        judge.observe(4000, 2000)
    verdict = judge.verdict()
    assert (verdict.outcome, verdict.pairs, verdict.slower, verdict.passed) == ("commit", 160, 0, 160)
    assert (verdict.ratio_median, verdict.old_us_p50, verdict.new_us_p99) == (0.5, 2.0, 2.0)
    assert verdict.throttled_share == approaching(1 / 3)
    assert 0 < verdict.evidence < 50
    assert verdict.acceptance == approaching(float(e(160, 0)))


def test_a_watch_at_full_size_sees_a_new_slowness_at_any_time() -> None:
    for quiet in (0, 100, 5000):
        judge = WatchJudge(JudgeSettings(), ratio_at_commit=1.2, seed=1)
        assert not any(judge.observe(1000, 1300) for _ in range(quiet))
        assert next(seen for seen in itertools.count(1) if judge.observe(1000, 1330)) < 40


def test_a_watch_alarms_when_the_threshold_is_just_reached() -> None:
    settings = JudgeSettings(lambdas=(0.5,), watch_threshold=3.75)
    judge = WatchJudge(settings, ratio_at_commit=1.0, seed=1)
    assert [judge.observe(10, 20), judge.observe(10, 20)] == [False, True]


# The coin, and doing it again.


def test_the_coin_is_fair_and_the_same_for_a_seed() -> None:
    heads = list(itertools.islice(coin(1), 10_000))
    assert heads == list(itertools.islice(coin(1), 10_000))
    assert heads != list(itertools.islice(coin(2), 10_000))
    assert abs(sum(heads) - 5000) < 200
    both = sum(a != b for a, b in itertools.pairwise(heads))
    assert abs(both - 5000) < 200


@given(st.lists(st.builds(Pair, old_ns=times, new_ns=times, throttled=st.booleans()), max_size=80))
@example([Pair(20, 50, throttled=True)] * 60)
@example([Pair(20, 20)] * 60)
def test_a_replay_gives_the_same_verdict(pairs: list[Pair]) -> None:
    judge = TrialJudge(QUICK, seed=9)
    for pair in pairs:
        if judge.observe(pair.old_ns, pair.new_ns, throttled=pair.throttled):
            break
    assert replay(judge.pairs, QUICK, 9) == judge.verdict()
    assert replay(pairs, QUICK, 9) == judge.verdict(), "pairs after the decision change nothing"
    assert msgspec.convert(msgspec.to_builtins(judge.pairs), tuple[Pair, ...]) == judge.pairs
