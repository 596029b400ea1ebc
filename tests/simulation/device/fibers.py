"""Code that can be stopped between any two of its steps, without being written for it: a thread that runs only while it
has the turn.

One side runs at a time. The owner gives the turn with `resume` and has it back when the other side calls `pause` or has
ended. Threads are used again, since a simulation needs thousands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests.simulation.device.disk import Killed


class _Runner:
    """A thread that does one job after the other."""

    def __init__(self) -> None:
        self.go = threading.Lock()
        self.go.acquire()
        self.job: Callable[[], None] = lambda: None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.go.acquire()
            self.job()


_idle: list[_Runner] = []


class Fiber:
    """A body that has the turn now and then.

    Args:
        body: Runs in its own thread; calls `pause` where it may be stopped. What it raises, but `Killed`, is raised by
            the `resume` in which it happened.

    Attributes:
        ended: Whether the body is over.
    """

    def __init__(self, body: Callable[[], None]) -> None:
        self.ended = False
        self._body = body
        self._killed = False
        self._error: BaseException | None = None
        self._runner: _Runner | None = None
        self._ours, self._theirs = threading.Lock(), threading.Lock()
        self._ours.acquire()
        self._theirs.acquire()

    def resume(self) -> None:
        """Give it the turn, until it pauses or ends."""
        if self.ended:
            return
        if self._runner is None:
            self._runner = _idle.pop() if _idle else _Runner()
            self._runner.job = self._run
            self._runner.go.release()
        else:
            self._theirs.release()
        self._ours.acquire()
        if self.ended:
            _idle.append(self._runner)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def kill(self) -> None:
        """End it where it pauses now, or at its next pause."""
        self._killed = True
        if self._runner is None:
            self.ended = True

    def pause(self) -> None:
        """In the body: give the turn back.

        Raises:
            Killed: It is not to go on.
        """
        self._ours.release()
        self._theirs.acquire()
        if self._killed:
            raise Killed

    def _run(self) -> None:
        try:
            self._body()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the owner's thread raises it
            self._error = error
        self.ended = True
        self._ours.release()
