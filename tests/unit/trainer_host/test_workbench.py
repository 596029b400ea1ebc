from __future__ import annotations

import select
from collections.abc import Iterator
from threading import Event

import pytest

from trainer_host.workbench import Workbench


@pytest.fixture
def bench() -> Iterator[Workbench[int]]:
    made: Workbench[int] = Workbench()
    yield made
    made.close()


def done(bench: Workbench[int], timeout_s: float) -> bool:
    return bool(select.select([bench], [], [], timeout_s)[0])


def test_it_says_when_a_task_is_done_and_takes_the_next(bench: Workbench[int]) -> None:
    for number in (1, 2):
        go = Event()

        def work(go: Event = go, number: int = number) -> int:
            go.wait(10.0)
            return number

        bench.start(work)
        assert not done(bench, 0.0)
        go.set()
        assert done(bench, 10.0)
        assert bench.result() == number
        assert not done(bench, 0.0)


def test_an_exception_comes_out_where_the_result_is_taken(bench: Workbench[int]) -> None:
    bench.start(lambda: 1 // 0)
    assert done(bench, 10.0)
    with pytest.raises(ZeroDivisionError):
        bench.result()
    bench.start(lambda: 3)
    assert done(bench, 10.0)
    assert bench.result() == 3
