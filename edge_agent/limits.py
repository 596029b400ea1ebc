"""What a process that runs a strange model allows itself: little memory, the lowest priority, and only so much time.

The stager and the trial apply these limits to themselves, so that a model that wants the whole machine gets an error,
or ends its process, and the workers go on answering. They stand beside what systemd bounds for the service as a whole.

Memory is bounded by `RLIMIT_DATA`: private writable memory, malloc's and mmap's. `RLIMIT_AS` would count the shared
libraries and the address space that malloc's arenas and OpenBLAS only reserve, a hundred megabytes or two that differ
with the number of cores, and so refuse good models. Python and NumPy turn the failed allocation into a `MemoryError`;
of the runtimes, some allocations abort the process instead, which the supervisor counts as a death. Linux only: macOS
takes the limit and does not enforce it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from protocol.release import MAX_MODEL_BYTES

NICENESS = 10
# What a model may take while it is qualified or tried: four times the longest file, for the runtime copies and plans.
MODEL_MEMORY_BYTES = 4 * MAX_MODEL_BYTES
# The highest there is: when memory runs out, the kernel ends such a process before any other.
OOM_SCORE_ADJ = 1000


def yield_to_others() -> None:
    """Take the processor and the disk when nobody else wants them, and be the first to go when memory runs out.

    Disk priority and the order of going are Linux's; elsewhere only the processor's priority is lowered.
    """
    os.nice(NICENESS)
    if sys.platform == "linux":
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))


def limit_memory(more_bytes: int) -> None:
    """From now on, take at most `more_bytes` beyond what this process has; 0 is no limit.

    The limit is for the rest of the process's life, and can be lowered and not raised. Nothing happens but on Linux.
    """
    if sys.platform == "linux" and more_bytes:
        _, highest = resource.getrlimit(resource.RLIMIT_DATA)
        limit = psutil.Process().memory_info().data + more_bytes
        if highest != resource.RLIM_INFINITY:
            limit = min(limit, highest)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def memory_limit() -> int | None:
    """How many bytes of private memory this process may have, or `None` where there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if limit == resource.RLIM_INFINITY else limit


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM unless the block ends before; for the main thread, one at a time.

    The signal keeps its default action: a runtime's C code may hold the interpreter's lock, and then no handler in
    Python, no thread and no exception would ever have its turn.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
