"""Children that are played by a test: real channels, and no process behind them."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from edge_agent.channel import Channel
from edge_agent.children import Child


@dataclass
class Process:
    """What `Child` needs of a process."""

    pid: int
    returncode: int | None = None
    killed: bool = False

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.killed = True
        if self.returncode is None:
            self.returncode = -9

    def wait(self, _timeout_s: float) -> int:
        assert self.returncode is not None
        return self.returncode


@dataclass
class Played:
    """A child played by a test.

    Attributes:
        what: Its first message.
        process: Its process, so to speak.
        child: What its owner has of it.
        end: Its end of the channel.
    """

    what: Any
    process: Any
    child: Child[Any]
    end: Channel[Any]

    def ends(self, code: int) -> None:
        """The process ends; its owner has to look."""
        self.process.returncode = code
        self.end.close()


def play(what: Any, answers: Any, asked: Any, pid: int) -> Played:
    """Start, so to speak, a child that was told `what`, gives `answers` and is `asked`."""
    ours, theirs = socket.socketpair()
    process: Any = Process(pid)
    child: Child[Any] = Child(process, Channel(ours, answers), "child")
    return Played(what, process, child, Channel(theirs, asked))
