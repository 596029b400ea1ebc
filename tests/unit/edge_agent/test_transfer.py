from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.transfer import LONGEST_WAIT_S, Transfer, bitmap
from protocol.errors import Rejected


def transfer_of(count: int, here: set[str] | None = None, **options: float) -> Transfer:
    names = [f"c{index}" for index in range(count)]
    return Transfer(names, [10] * count, here or set(), random.Random(1), **options)  # type: ignore[arg-type]


def test_asks_for_a_window_and_tops_it_up_when_half_has_come() -> None:
    transfer = transfer_of(10, window=4)
    assert transfer.ask(0.0) == {0: "c0", 1: "c1", 2: "c2", 3: "c3"}
    assert transfer.ask(0.1) == {}
    assert transfer.received("c2", 0.2, intact=True)
    assert transfer.ask(0.2) == {}
    assert transfer.received("c0", 0.3, intact=True)
    assert transfer.ask(0.3) == {4: "c4", 5: "c5"}
    assert transfer.bytes_here == 20
    assert transfer.bytes_total == 100
    assert not transfer.done


def test_only_what_is_missing_is_asked_for() -> None:
    transfer = transfer_of(4, {"c0", "c2", "other"})
    assert transfer.bytes_here == 20
    assert transfer.ask(0.0) == {1: "c1", 3: "c3"}


def test_nothing_is_asked_for_when_all_is_here() -> None:
    transfer = transfer_of(2, {"c0", "c1"})
    assert transfer.done
    assert transfer.ask(0.0) == {}
    assert transfer.deadline is None


def test_a_chunk_that_occurs_twice_is_fetched_once() -> None:
    transfer = Transfer(["zero", "one", "zero"], [10, 10, 5], set(), random.Random(1))
    assert transfer.ask(0.0) == {0: "zero", 1: "one"}
    assert transfer.received("zero", 0.1, intact=True)
    assert transfer.bytes_here == 15


def test_what_does_not_come_is_asked_for_again_with_a_growing_jittered_wait() -> None:
    transfer = transfer_of(3, window=3, timeout_s=2.0, attempts=4)
    transfer.ask(0.0)
    transfer.received("c1", 0.0, intact=True)
    waits, now = [], 0.0
    for _ in range(3):
        assert transfer.deadline is not None
        waits.append(transfer.deadline - now)
        now = transfer.deadline
        assert transfer.ask(now - 0.001) == {}
        assert transfer.ask(now) == {0: "c0", 2: "c2"}
    assert [low <= wait <= 1.5 * low for wait, low in zip(waits, (2.0, 4.0, 8.0), strict=True)] == [True] * 3
    assert len({wait / low for wait, low in zip(waits, (2.0, 4.0, 8.0), strict=True)}) == 3


def test_gives_up_after_its_attempts() -> None:
    transfer = transfer_of(1, timeout_s=1.0, attempts=3)
    asked = 0
    for moment in range(0, 1000, 10):
        asked += len(transfer.ask(float(moment)))
    assert asked == 3
    assert transfer.gave_up
    assert not transfer.done


def test_no_wait_is_longer_than_the_longest() -> None:
    transfer = transfer_of(1, timeout_s=5.0, attempts=20)
    now = 0.0
    for _ in range(12):
        transfer.ask(now)
        assert transfer.deadline is not None
        assert transfer.deadline - now <= 1.5 * LONGEST_WAIT_S
        now = transfer.deadline


def test_an_arrival_starts_the_count_of_attempts_anew() -> None:
    transfer = transfer_of(2, timeout_s=1.0, attempts=2)
    transfer.ask(0.0)
    transfer.ask(10.0)
    transfer.received("c0", 10.1, intact=True)
    assert transfer.ask(20.0) == {1: "c1"}
    assert not transfer.gave_up
    transfer.ask(30.0)
    assert transfer.gave_up


def test_the_last_arrival_ends_the_waiting() -> None:
    transfer = transfer_of(1)
    transfer.ask(0.0)
    transfer.received("c0", 0.1, intact=True)
    assert transfer.done
    assert transfer.deadline is None
    assert transfer.ask(1e9) == {}
    assert not transfer.gave_up


def test_a_flood_of_chunks_that_nobody_asked_for_is_ignored_and_counted() -> None:
    transfer = transfer_of(40, window=4)
    assert not transfer.received("c0", 0.0, intact=True)
    transfer.ask(0.0)
    for index in range(4, 40):
        assert not transfer.received(f"c{index}", 0.1, intact=True)
    assert not transfer.received("stranger", 0.1, intact=False)
    assert transfer.unasked == 38
    assert transfer.bytes_here == 0
    assert transfer.received("c0", 0.2, intact=True)
    assert not transfer.received("c0", 0.3, intact=True)
    assert transfer.bytes_here == 10


def test_wrong_data_is_asked_for_again_and_refused_the_second_time() -> None:
    transfer = transfer_of(1)
    transfer.ask(0.0)
    assert not transfer.received("c0", 0.1, intact=False)
    assert transfer.ask(0.1) == {0: "c0"}
    with pytest.raises(Rejected) as caught:
        transfer.received("c0", 0.2, intact=False)
    assert caught.value.code == "chunk_mismatch"
    assert transfer.wrong == {"c0": 2}


def test_wrong_data_is_followed_by_the_right_data() -> None:
    transfer = transfer_of(2)
    transfer.ask(0.0)
    transfer.received("c0", 0.1, intact=False)
    transfer.received("c1", 0.1, intact=True)
    assert transfer.ask(0.2) == {0: "c0"}
    transfer.received("c0", 0.3, intact=True)
    assert transfer.done


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.floats(0.0, 0.4))
def test_every_transfer_ends_whatever_is_lost(seed: int, count: int, loss: float) -> None:
    """A host that answers each request, over a link that loses some chunks: done or given up, in bounded time."""
    rng = random.Random(seed)
    names = [f"c{rng.randrange(count)}" for _ in range(count)]
    transfer = Transfer(names, [1] * count, set(), rng, window=8, timeout_s=1.0, attempts=30)
    now = 0.0
    for _ in range(20 * count + 200):
        if transfer.done or transfer.gave_up:
            break
        for index, digest in transfer.ask(now).items():
            assert names[index] == digest
            if rng.random() >= loss:
                transfer.received(digest, now, intact=True)
        if transfer.deadline is not None and not transfer.ask(now):
            now = transfer.deadline
    assert transfer.done
    assert transfer.bytes_here == transfer.bytes_total == count


@pytest.mark.parametrize(
    ("indices", "count", "expected"),
    [
        ([0], 1, b"\x01"),
        ([0, 7], 8, b"\x81"),
        ([8], 9, b"\x00\x01"),
        ([], 0, b""),
        (range(16), 16, b"\xff\xff"),
    ],
)
def test_bitmap(indices: list[int], count: int, expected: bytes) -> None:
    assert bitmap(indices, count) == expected
