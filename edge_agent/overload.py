"""When to refuse a state, so that the younger ones are answered in time. Pure."""

from __future__ import annotations


def is_overdue(waiting: int, oldest_age_s: float, answer_s: float, deadline_s: float) -> bool:
    """Whether the oldest waiting state is to be refused, so that the younger ones are answered in time.

    Args:
        waiting: How many states wait.
        oldest_age_s: How long the oldest has waited already.
        answer_s: What one answer costs.
        deadline_s: The slot's deadline.

    Returns:
        Never true for the last one: however slow the model is, the newest is answered.
    """
    return waiting > 1 and (oldest_age_s + answer_s > deadline_s or waiting * answer_s > deadline_s)
