"""One thread for what takes long: training, gating, signing. The host's loop goes on meanwhile.

One task at a time; there is no queue, since whoever decides what to do next decides it when there is time for it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Workbench(Generic[T]):
    """Where one task at a time is worked on. `fileno` is readable when it is done."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "workbench")
        self._task: Future[T] | None = None
        self._waiting, self._ringing = socket.socketpair()

    def fileno(self) -> int:
        """For `select`."""
        return self._waiting.fileno()

    def start(self, work: Callable[[], T]) -> None:
        """Begin a task; nothing may be on the bench."""
        assert self._task is None, "one task at a time"
        self._task = self._pool.submit(work)
        self._task.add_done_callback(lambda _: self._ringing.send(b"\1"))

    def result(self) -> T:
        """The finished task's result, or the exception that ended it. Waits for the end of the task."""
        assert self._task is not None, "there is a task"
        task, self._task = self._task, None
        try:
            return task.result()
        finally:
            self._waiting.recv(1)

    def close(self) -> None:
        """Wait for the task that is under way, and end the thread."""
        self._pool.shutdown()
        self._waiting.close()
        self._ringing.close()
