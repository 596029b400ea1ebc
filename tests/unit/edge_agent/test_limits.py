from __future__ import annotations

import resource
import subprocess
import sys
import textwrap

import pytest

from edge_agent import limits

LIMIT_S = 30.0
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part of it is Linux's")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: none of this can be undone in the tests' own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def test_who_yields_has_a_lower_priority() -> None:
    ended = run(
        "import os; before = os.nice(0); from edge_agent import limits; limits.yield_to_others()\n"
        "print(os.nice(0) - before)"
    )
    assert ended.stdout == "10\n", ended.stderr


@linux_only
def test_who_yields_is_idle_at_the_disk_and_the_first_to_go() -> None:
    ended = run("""
        import psutil
        from pathlib import Path
        from edge_agent import limits
        limits.yield_to_others()
        print(psutil.Process().ionice().ioclass == psutil.IOPRIO_CLASS_IDLE)
        print(Path("/proc/self/oom_score_adj").read_text().strip())
    """)
    assert ended.stdout.split() == ["True", "1000"], ended.stderr


@linux_only
@pytest.mark.parametrize(("megabytes", "said"), [(32, "had"), (96, "out of memory")])
def test_what_is_beyond_the_limit_is_a_memory_error(megabytes: int, said: str) -> None:
    ended = run(f"""
        from edge_agent import limits
        before = bytearray(100_000_000)
        limits.limit_memory(64 * 1024 * 1024)
        try:
            more = bytearray({megabytes} * 1024 * 1024)
            print("had")
        except MemoryError:
            print("out of memory")
    """)
    assert ended.stdout == f"{said}\n", ended.stderr


@linux_only
def test_numpy_gets_a_memory_error_too_and_goes_on() -> None:
    ended = run("""
        import numpy as np
        from edge_agent import limits
        limits.limit_memory(64 * 1024 * 1024)
        try:
            np.ones((4096, 4096), np.float64)
        except MemoryError:
            print(float(np.ones(4).sum()))
    """)
    assert ended.stdout == "4.0\n", ended.stderr


@linux_only
def test_a_limit_can_be_lowered_and_not_raised() -> None:
    ended = run("""
        from edge_agent import limits
        limits.limit_memory(64 * 1024 * 1024)
        first = limits.memory_limit()
        limits.limit_memory(512 * 1024 * 1024)
        second = limits.memory_limit()
        limits.limit_memory(1024 * 1024)
        print(second - first, limits.memory_limit() < first)
    """)
    assert ended.stdout == "0 True\n", ended.stderr


def test_without_a_limit_there_is_none() -> None:
    if resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY:
        pytest.skip("these tests run under a limit themselves")
    assert limits.memory_limit() is None


def test_none_of_it_is_no_limit() -> None:
    ended = run("from edge_agent import limits; limits.limit_memory(0); print(limits.memory_limit())")
    assert ended.stdout == "None\n", ended.stderr


def test_elsewhere_than_on_linux_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    before = limits.memory_limit()
    monkeypatch.setattr(sys, "platform", "darwin")
    limits.limit_memory(1)
    assert limits.memory_limit() == before


def test_a_process_past_its_deadline_is_ended_even_inside_c_code() -> None:
    ended = run("""
        from edge_agent import limits
        with limits.deadline(0.2):
            9 ** 9 ** 9 ** 9  # hours, and no byte code in between
    """)
    assert ended.returncode == -14, ended.stderr


def test_a_deadline_ends_with_its_block() -> None:
    ended = run("""
        import signal
        from edge_agent import limits
        try:
            with limits.deadline(60.0):
                print(signal.getitimer(signal.ITIMER_REAL)[0] > 50.0)
                raise ValueError
        except ValueError:
            print(signal.getitimer(signal.ITIMER_REAL)[0])
    """)
    assert ended.stdout.split() == ["True", "0.0"], ended.stderr


def test_a_deadline_counts_where_the_parent_ignores_the_signal() -> None:
    ended = run("""
        import signal, time
        from edge_agent import limits
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        with limits.deadline(0.1):
            while True:
                time.sleep(60)
    """)
    assert ended.returncode == -14, ended.stderr
