"""Overload: the oldest are refused, the newest never is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.overload import is_overdue


def test_nothing_is_refused_while_there_is_time() -> None:
    assert not is_overdue(waiting=10, oldest_age_s=0.001, answer_s=0.001, deadline_s=0.05)


def test_more_than_can_be_answered_in_time_is_refused() -> None:
    assert is_overdue(waiting=60, oldest_age_s=0.0, answer_s=0.001, deadline_s=0.05)


def test_what_has_waited_too_long_is_refused() -> None:
    assert is_overdue(waiting=2, oldest_age_s=0.0495, answer_s=0.001, deadline_s=0.05)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.001, 10))
def test_the_last_one_is_always_answered(age_s: float, answer_s: float, deadline_s: float) -> None:
    assert not is_overdue(1, age_s, answer_s, deadline_s)


@given(st.integers(1, 10_000), st.floats(1e-6, 1), st.floats(0.001, 10))
def test_refusing_one_by_one_ends_with_as_many_as_fit(waiting: int, answer_s: float, deadline_s: float) -> None:
    left = waiting
    while is_overdue(left, 0.0, answer_s, deadline_s):
        left -= 1
    assert left == 1 or left * answer_s <= deadline_s
    assert left == waiting or (left + 1) * answer_s > deadline_s
