from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.transfer import LISTEN_S, LONGEST_WAIT_S, POST_EVERY, Bucket, Meter, Transfer, bitmap
from protocol.errors import Rejected


def transfer_of(count: int, here: set[str] | None = None, **options: Any) -> Transfer:
    names = [f"c{index}" for index in range(count)]
    return Transfer(names, [10] * count, here or set(), random.Random(1), **options)


def test_asks_for_a_window_and_tops_it_up_when_half_has_come() -> None:
    transfer = transfer_of(10, window=4)
    assert transfer.ask(0.0) == {0: "c0", 1: "c1", 2: "c2", 3: "c3"}
    assert transfer.ask(0.1) == {}
    assert transfer.received("c2", 0.2, intact=True)
    assert transfer.ask(0.2) == {}
    assert transfer.received("c0", 0.3, intact=True)
    assert transfer.ask(0.3) == {1: "c1", 3: "c3", 4: "c4", 5: "c5"}
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


def test_what_is_not_missing_is_ignored_and_counted() -> None:
    transfer = transfer_of(40, {"c39"}, window=4)
    transfer.ask(0.0)
    assert not transfer.received("c39", 0.1, intact=True)
    assert not transfer.received("stranger", 0.1, intact=False)
    assert not transfer.received("c5", 0.1, intact=False)  # nobody asked for it: who sends it is not to be believed
    assert transfer.unasked == 3
    assert transfer.wrong == {}
    assert transfer.received("c0", 0.2, intact=True)
    assert not transfer.received("c0", 0.3, intact=True)
    assert transfer.bytes_here == 20


def test_what_others_asked_for_is_taken() -> None:
    transfer = transfer_of(10, window=4, ahead=2)
    transfer.ask(0.0)
    transfer.ask(5.0)
    assert transfer.received("c5", 5.1, intact=True)
    assert transfer.ask(5.2) == {}
    assert transfer.missing.keys() == {f"c{index}" for index in range(10)} - {"c5"}
    for index in range(4):
        transfer.received(f"c{index}", 5.3, intact=True)
    assert transfer.ask(5.3) == {index: f"c{index}" for index in (4, 6, 7, 8)}


def test_listens_to_what_is_asked_for_and_a_bounded_way_ahead() -> None:
    transfer = transfer_of(6, window=4, ahead=2)
    transfer.ask(0.0)
    assert transfer.audible() == {f"c{index}" for index in range(6)}
    transfer = transfer_of(1000, {"c4"}, window=4, ahead=2)
    listened_until(transfer, 2.0)
    assert transfer.ask(2.0) == {index: f"c{index}" for index in range(4)}
    assert transfer.audible() == {"c0", "c1", "c2", "c3", "c5", "c6"}


def test_half_a_window_of_what_others_asked_for_is_reported_though_nothing_asked_for_came() -> None:
    transfer = transfer_of(12, window=4, ahead=8)
    transfer.ask(0.0)
    assert transfer.last is None
    for index in (4, 5):
        transfer.received(f"c{index}", 0.1, intact=True)
        assert transfer.ask(0.1) == {}
    transfer.received("c6", 0.2, intact=True)
    assert transfer.ask(0.2) == {0: "c0", 1: "c1", 2: "c2", 3: "c3"}
    assert transfer.last == 6


def test_after_waiting_in_vain_nothing_counts_as_on_its_way() -> None:
    transfer = transfer_of(8, window=4, timeout_s=1.0)
    transfer.ask(0.0)
    transfer.received("c0", 0.1, intact=True)
    assert transfer.last == 0
    assert transfer.ask(10.0) == {1: "c1", 2: "c2", 3: "c3"}
    assert transfer.last is None


def listened_until(transfer: Transfer, now: float) -> None:
    """Let the time pass in which a large transfer only listens."""
    assert transfer.ask(0.0) == {}
    assert transfer.deadline is not None
    assert LISTEN_S / 2 <= transfer.deadline <= LISTEN_S
    assert transfer.ask(transfer.deadline - 0.001) == {}
    assert transfer.deadline <= now


def test_before_it_asks_a_large_transfer_listens_to_chunks_from_all_over_the_model() -> None:
    transfer = transfer_of(1000, window=4, ahead=2)
    assert transfer.ask(0.0) == {}
    assert transfer.audible() == {f"c{index}" for index in range(0, 1000, POST_EVERY)}


def test_who_hears_a_stream_joins_it_and_fetches_the_beginning_last() -> None:
    transfer = transfer_of(100, window=4, ahead=2)
    transfer.ask(0.0)
    assert transfer.received("c64", 0.1, intact=True)
    assert transfer.last is None  # what came right after it was not listened to
    assert transfer.ask(0.1) == {index: f"c{index}" for index in (67, 68, 69, 70)}
    assert transfer.audible() == {f"c{index}" for index in range(67, 73)}
    for index in range(67, 100):
        transfer.received(f"c{index}", 0.2, intact=True)
    assert transfer.ask(0.3) == {index: f"c{index}" for index in range(4)}


def test_a_rate_limited_transfer_asks_for_what_the_limit_lets_pass_and_listens_to_no_more() -> None:
    bucket = Bucket(20.0)
    transfer = transfer_of(1000, window=4, ahead=2, bucket=bucket)
    assert transfer.ask(0.0) == {0: "c0", 1: "c1"}
    assert transfer.audible() == {f"c{index}" for index in range(4)}
    transfer.received("c0", 0.1, intact=True)
    transfer.received("c1", 0.1, intact=True)
    assert transfer.ask(0.2) == {}
    assert transfer.deadline is None
    assert transfer.ask(0.5) == {2: "c2"}
    assert transfer.ask(0.6) == {}
    assert transfer.ask(1.0) == {2: "c2", 3: "c3"}


@pytest.mark.parametrize(("rate", "size"), [(100.0, 10), (100.0, 100), (10.0, 64)])
def test_a_bucket_lets_pass_its_rate_on_average_and_a_seconds_worth_at_once(rate: float, size: int) -> None:
    bucket = Bucket(rate)
    passed = sum(size for tick in range(10_000) if bucket.take(size, tick / 100.0))
    assert 99 * rate - size <= passed <= 101 * rate + size


def test_a_meter_tells_the_rate_of_the_last_seconds() -> None:
    meter = Meter()
    assert meter.rate(1000, 10.0) == 0.0
    assert meter.rate(1500, 10.5) == 1000.0
    for second in range(11, 40):
        rate = meter.rate(1500 + 100 * (second - 10), float(second))
    assert rate == 100.0


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
