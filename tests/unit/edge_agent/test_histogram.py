from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.histogram import MAX_US, Histogram, bucket

latencies = st.lists(st.integers(1, MAX_US) | st.integers(1, 5000), min_size=1)


@pytest.mark.parametrize(
    ("us", "bound"),
    [
        (-5, 1),
        (0, 1),
        (1, 1),
        (2, 2),
        (15, 15),
        (16, 16),
        (17, 18),
        (18, 18),
        (19, 20),
        (32, 32),
        (33, 36),
        (1000, 1024),
    ],
)
def test_known_buckets(us: int, bound: int) -> None:
    assert bucket(us) == bound


def test_what_is_beyond_the_range_is_counted_at_its_end() -> None:
    assert bucket(MAX_US) == bucket(MAX_US * 1000) == MAX_US


@given(st.integers(1, MAX_US))
def test_a_bucket_holds_its_value_and_is_at_most_an_eighth_wide(us: int) -> None:
    bound = bucket(us)
    assert us <= bound <= us * 9 / 8 + 1e-9 or bound == us
    assert bucket(bound) == bound
    assert bucket(bound + 1) > bound or bound == MAX_US


def test_there_are_few_buckets() -> None:
    bounds = {bucket((1 << shift) + (part << max(shift - 4, 0))) for shift in range(40) for part in range(16)}
    assert len({bucket(us) for us in range(1, 5000)} | bounds) <= 240


def test_counts_merge_and_are_taken_once() -> None:
    one, other = Histogram(), Histogram({17: 2, 1024: 1})
    for us in (1000, 1, 1000):
        one.add(us)
    one.merge(other.counts)
    assert one.total == 6
    assert list(one.take().items()) == [(1, 1), (18, 2), (1024, 3)]
    assert (one.take(), one.total) == ({}, 0)


def test_nothing_has_no_percentile() -> None:
    assert Histogram().percentile(50) is None


@given(latencies, st.integers(0, 100))
def test_a_percentile_is_the_bucket_of_the_nearest_rank(values: list[int], percent: int) -> None:
    histogram = Histogram()
    for us in values:
        histogram.add(us)
    rank = max(math.ceil(percent * len(values) / 100), 1)
    assert histogram.percentile(percent) == bucket(sorted(values)[rank - 1])
