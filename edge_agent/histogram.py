"""Latencies in a few counters: eight buckets to the octave, so a bucket is at most 12.5% wide.

The layout is that of HdrHistogram (G. Tene, 2012): the octave comes from the bit length, the place within it from the
next three bits. No logarithm is taken, and bounds are whole microseconds, the same on every device. A bucket is known
by its upper bound, which belongs to it: the bucket 18 after 16 holds 17 and 18.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_US = 1 << 32
_BITS = 4  # the leading one, and three bits within the octave


def bucket(us: int) -> int:
    """Upper bound of the bucket that holds `us`, between 1 and `MAX_US`."""
    if us <= 1 << _BITS:
        return us if us > 0 else 1
    below = (us if us < MAX_US else MAX_US) - 1
    shift = below.bit_length() - _BITS
    return ((below >> shift) + 1) << shift


class Histogram:
    """Counts by upper bound in µs; buckets that are empty take no room. At most 240 of them exist."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: dict[int, int] = {}
        if counts:
            self.merge(counts)

    def add(self, us: int) -> None:
        """Count one latency in whole µs. Below 1 counts as 1, above `MAX_US` as `MAX_US`."""
        bound = bucket(us)
        self.counts[bound] = self.counts.get(bound, 0) + 1

    def merge(self, counts: Mapping[int, int]) -> None:
        """Add another histogram's counts. Bounds that are not ours are sorted into our buckets."""
        for bound, count in counts.items():
            mine = bucket(bound)
            self.counts[mine] = self.counts.get(mine, 0) + count

    def take(self) -> dict[int, int]:
        """The counts by ascending bound; starts again from nothing."""
        taken = dict(sorted(self.counts.items()))
        self.counts = {}
        return taken

    @property
    def total(self) -> int:
        """How many latencies were counted."""
        return sum(self.counts.values())

    def percentile(self, percent: float) -> float | None:
        """Upper bound of the bucket in which the nearest-rank percentile lies, `None` if nothing was counted.

        It never flatters: the true value is at most 12.5% lower, and not higher.
        """
        rank = percent / 100.0 * self.total
        return next((float(bound) for bound, reached in _running(sorted(self.counts.items())) if reached >= rank), None)


def _running(items: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    reached = 0
    for bound, count in items:
        reached += count
        yield bound, reached
