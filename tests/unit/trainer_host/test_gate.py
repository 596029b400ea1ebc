from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import Rejected
from trainer_host import gate
from trainer_host.arena.evaluation import WinRate, win_rate
from trainer_host.gate import GateSettings, judge_gate
from trainer_host.parity import Parity
from trainer_host.recipes.recipe import override
from trainer_host.recipes.table import named

SETTINGS = GateSettings(min_win_rate=0.0)


def rate(share: float, battles: int = 4000) -> WinRate:
    wins = round(share * battles)
    return win_rate(wins, 0, battles - wins)


def test_an_equal_candidate_passes() -> None:
    report = judge_gate(rate(0.6), rate(0.6), SETTINGS, size_bytes=10)
    assert report.passed
    assert report.difference == 0
    assert report.reasons == ("wins 60.0% against 60.0% of the current model: not worse by 5.0% or more",)


def test_a_clearly_worse_candidate_is_refused() -> None:
    report = judge_gate(rate(0.5), rate(0.6), SETTINGS, size_bytes=10)
    assert not report.passed
    assert "may be worse by 12.2%, and 5.0% are allowed" in report.reasons[0]


def test_few_battles_cannot_show_that_a_model_is_not_worse() -> None:
    assert not judge_gate(rate(0.6, 100), rate(0.6, 100), SETTINGS, size_bytes=10).passed


def test_the_first_model_has_nothing_to_be_compared_with() -> None:
    report = judge_gate(rate(0.6), None, SETTINGS, size_bytes=10)
    assert report.passed
    assert report.difference is None
    assert report.reasons == ("wins 60.0%; there is no current model to compare with",)


def test_a_slot_without_an_arena_passes_and_says_so() -> None:
    report = judge_gate(None, None, GateSettings(), size_bytes=10)
    assert report.passed
    assert report.reasons == ("no validation battles for this slot",)


def test_the_least_win_rate_is_asked_of_a_model_that_replaces_one() -> None:
    settings = GateSettings(min_win_rate=0.7)
    assert judge_gate(rate(0.7), rate(0.6), settings, size_bytes=10).passed
    report = judge_gate(rate(0.69), rate(0.6), settings, size_bytes=10)
    assert report.reasons == ("it wins 69.0% of its battles, less than 70.0%",)
    assert judge_gate(rate(0.02), None, settings, size_bytes=10).passed


def test_size() -> None:
    settings = GateSettings(max_bytes=10)
    assert judge_gate(None, None, settings, size_bytes=10).passed
    assert judge_gate(None, None, settings, size_bytes=11).reasons == ("the file has 11 bytes, more than 10",)


def test_parity_on_every_runtime() -> None:
    good = Parity(runtime="new", rows=9, max_difference=0.01, argmax_agreement=1.0)
    bad = Parity(runtime="old", rows=9, max_difference=0.01, argmax_agreement=0.5)
    assert judge_gate(None, None, SETTINGS, size_bytes=1, parity=[good]).passed
    report = judge_gate(None, None, SETTINGS, size_bytes=1, parity=[good, bad])
    assert report.reasons == ("on old the best action is the same in 50.0% of rows, less than 95.0%",)


def test_all_failures_are_told() -> None:
    report = judge_gate(rate(0.1), rate(0.9), GateSettings(max_bytes=1), size_bytes=2)
    assert len(report.reasons) == 3


def test_newcombes_own_example() -> None:
    # Newcombe (1998), table II, case (a): 56/70 and 48/80 give 0.0524 to 0.3339 by method 10.
    low = gate.difference_low(win_rate(56, 0, 14), win_rate(48, 0, 32))
    assert math.isclose(low, 0.0524, abs_tol=5e-5)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_error_is_what_the_docstring_says(share: float) -> None:
    rng = np.random.default_rng(0)

    def passes(true: float, runs: int = 2000) -> float:
        wins = rng.binomial(4000, [share + true, share], (runs, 2)).tolist()
        reports = [judge_gate(rate(a / 4000), rate(b / 4000), SETTINGS, size_bytes=1) for a, b in wins]
        return float(np.mean([report.passed for report in reports]))

    assert passes(-0.05) < 0.025 + 4 * math.sqrt(0.025 * 0.975 / 2000)
    assert passes(0.0) > 0.985


def test_a_model_that_cannot_play_is_refused() -> None:
    narrow = (Path(__file__).parents[2] / "models" / "narrow.tflite").read_bytes()
    with pytest.raises(Rejected, match="takes 3 features") as refused:
        gate.examined("combat", narrow, None, SETTINGS)
    assert refused.value.code == "bad_model"


@pytest.mark.tensorflow
def test_validation_battles_are_the_same_for_the_same_seed() -> None:
    export = pytest.importorskip("trainer_host.export")
    model = export.untrained(named("combat"), 1)
    settings = GateSettings(battles=60, min_win_rate=0.0, margin=0.9)
    first = gate.examined("combat", model, model, settings)
    assert first.passed
    assert first.candidate == first.current
    assert first.candidate is not None
    assert first.candidate.battles == 60
    fewer = export.untrained(override(named("combat"), {"actions": ["strike", "rest"]}), 1)
    with pytest.raises(Rejected, match="scores 2 actions"):
        gate.examined("combat", fewer, None, settings)


def test_validation_battles_are_played_only_where_there_is_an_arena() -> None:
    report = gate.examined("movement", b"x" * 20, b"current", SETTINGS)
    assert report.passed
    assert report.candidate is None
