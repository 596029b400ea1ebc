from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from trainer_host import ranges
from trainer_host.ranges import Range, contiguous, covers, joined

Spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda span: (span[0], span[0] + span[1])))


def built(spans: list[Range]) -> list[Range]:
    found: list[Range] = []
    for first, last in spans:
        found = joined(found, first, last)
    return found


@given(Spans)
def test_the_ranges_hold_what_was_spoken_for_and_are_few(spans: list[Range]) -> None:
    found = built(spans)
    numbers = {number for first, last in spans for number in range(first, last + 1)}
    assert {number for number in range(80) if covers(found, number)} == numbers
    assert all(one[1] + 1 < two[0] for one, two in itertools.pairwise(found))


@given(Spans, st.integers(0, 70))
def test_contiguous_counts_up_from_the_floor(spans: list[Range], floor: int) -> None:
    numbers = {number for first, last in spans for number in range(first, last + 1)}
    expected = floor
    while expected + 1 in numbers:
        expected += 1
    assert contiguous(built(spans), floor) == expected


def test_the_highest_of_too_many_ranges_is_forgotten() -> None:
    many = built([(10 * number, 10 * number) for number in range(1, ranges.MAX_RANGES + 1)])
    assert len(many) == ranges.MAX_RANGES
    assert joined(many, 5, 5)[-1] == (10 * (ranges.MAX_RANGES - 1),) * 2
    assert joined(many, 10**6, 10**6) == many
