"""Which sequence numbers have been spoken for: closed ranges of whole numbers, sorted, apart, and as few as possible.

Batches arrive in any order and more than once. Each speaks for a range (`protocol.messages.TransitionBatch`); what may
be acknowledged is the end of what joins up from the floor, below which the device needs no answer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Range = tuple[int, int]

MAX_RANGES = 256


def joined(ranges: Sequence[Range], first: int, last: int) -> list[Range]:
    """`ranges` with `first` to `last` added; what overlaps or touches becomes one.

    More than `MAX_RANGES` are not remembered: the highest are forgotten, never acknowledged, and so sent again.
    """
    start = bisect_left(ranges, first - 1, key=lambda known: known[1])
    end = bisect_right(ranges, last + 1, key=lambda known: known[0])
    touched = ranges[start:end]
    if touched:
        first, last = min(first, touched[0][0]), max(last, touched[-1][1])
    return [*ranges[:start], (first, last), *ranges[end:]][:MAX_RANGES]


def contiguous(ranges: Sequence[Range], floor: int) -> int:
    """The highest number up to which everything above `floor` is in a range; `floor` where nothing is."""
    place = bisect_right(ranges, floor + 1, key=lambda known: known[0])
    return max(floor, ranges[place - 1][1]) if place else floor


def covers(ranges: Sequence[Range], number: int) -> bool:
    """Whether a range holds `number`."""
    place = bisect_right(ranges, number, key=lambda known: known[0])
    return bool(place) and number <= ranges[place - 1][1]
