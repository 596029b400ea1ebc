from __future__ import annotations

import json

import pytest

from trainer_host.arena.evaluation import wilson
from trainer_host.arena.tally import Latencies, Outcomes, Tally


def test_percentiles_are_right_to_the_width_of_a_bucket() -> None:
    latencies = Latencies()
    for microseconds in range(1, 1001):
        latencies.add(microseconds * 1000)
    assert latencies.percentile_us(0.5) == pytest.approx(500, rel=0.022)
    assert latencies.percentile_us(0.99) == pytest.approx(990, rel=0.022)
    assert latencies.percentile_us(1.0) == pytest.approx(1000, rel=0.022)


def test_without_latencies_there_is_no_percentile() -> None:
    assert Latencies().percentile_us(0.5) is None


def test_a_latency_of_nothing_is_counted() -> None:
    latencies = Latencies()
    latencies.add(0)
    assert latencies.percentile_us(0.5) == 0.0


def test_outcomes_are_counted_and_reported_with_their_interval() -> None:
    outcomes = Outcomes()
    for outcome in (1, 1, 0, -1):
        outcomes.add(outcome)
    report = outcomes.report()
    assert (report["battles"], report["wins"], report["draws"], report["losses"]) == (4, 2, 1, 1)
    assert (report["low"], report["high"]) == wilson(2, 4)
    assert report["win_rate"] == 0.5


def test_a_lap_has_counts_since_the_start_and_rates_since_the_lap_before() -> None:
    tally = Tally()
    for _ in range(10):
        tally.answered("abc", 1, 1_000_000)
    tally.ended(1, {1})
    first = tally.lap(2.0)
    for _ in range(4):
        tally.answered("def", 2, 8_000_000)
    tally.ended(-1, {1, 2})
    second = tally.lap(1.0)
    assert (first["answers"], first["answers_per_s"], first["battles_per_s"]) == (10, 5.0, 0.5)
    assert (second["answers"], second["answers_per_s"], second["battles_per_s"]) == (14, 4.0, 1.0)
    assert first["latency_us_p50"] == pytest.approx(1000, rel=0.022)
    assert second["latency_us_p50"] == pytest.approx(8000, rel=0.022)
    assert second["models"] == {"abc": 10, "def": 4}
    assert second["versions"] == {"1": 10, "2": 4}
    assert not second["final"]


def test_the_final_report_is_on_the_whole_game() -> None:
    tally = Tally()
    for _ in range(10):
        tally.answered("abc", 1, 1_000_000)
    tally.lap(1.0)
    final = tally.final(4.0)
    assert final["final"]
    assert final["answers_per_s"] == 2.5
    assert final["latency_us_p99"] == pytest.approx(1000, rel=0.022)


def test_only_battles_of_one_version_count_for_a_version() -> None:
    tally = Tally()
    tally.ended(1, {3})
    tally.ended(-1, {3})
    tally.ended(1, {3, 4})
    tally.ended(1, set())
    assert tally.outcomes.battles == 4
    assert {version: outcomes.battles for version, outcomes in tally.by_version.items()} == {3: 2}


def test_a_report_is_json_even_before_anything_happened() -> None:
    report = json.loads(json.dumps(Tally().lap(0.0)))
    assert report["answers_per_s"] == report["battles_per_s"] == 0.0
    assert report["latency_us_p50"] is None
    assert report["errors"] == report["models"] == {}
