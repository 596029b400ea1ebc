"""Everything that runs during the demonstration: broker, host, agent, games, and an observer of what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from protocol import topics
from protocol.codec import Decoder
from protocol.link import Broker, Link, Message
from protocol.messages import Event, Status, Telemetry
from trainer_host.private_broker import PrivateBroker

T = TypeVar("T")

DEVICE = "demo-pi"
SLOT = "combat"
END_LIMIT_S = 12.0

_statuses: Decoder[Status] = Decoder(Status)
_events: Decoder[Event] = Decoder(Event)
_telemetries: Decoder[Telemetry] = Decoder(Telemetry)


class StepFailed(Exception):
    """A step of the demonstration did not hold."""


class Stage:
    """The processes, their folder, and what was heard from them.

    Args:
        folder: Where everything lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status: Status | None = None
        self.telemetry: Telemetry | None = None
        self.metadata: bytes | None = None
        self.events: list[Event] = []
        self.progress: list[dict[str, Any]] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._progress_read = 0
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.broker = PrivateBroker(folder / "broker")
        self.broker.start()
        self.link = Link(Broker(port=self.broker.port), "demo-observer", on_message=self._heard)
        self.link.subscribe((topics.fleet(DEVICE, "+"), 1), (topics.METADATA, 1))
        self.wait(lambda: self.link.connected or None, 5.0, "the broker accepts a connection")

    def start(self, name: str, *command: str) -> None:
        """Start a daemon; its output goes to a log file."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, name: str, *command: str, limit_s: float = 120.0) -> str:
        """Run a command to its end, observing meanwhile.

        Raises:
            StepFailed: It did not end in time, or not well.
        """
        path = self.logs / f"{name}.log"
        self.start(name, *command)
        process = self._processes[name]
        self.wait(lambda: process.poll() is not None or None, limit_s, f"`{' '.join(command[:3])}` ends")
        del self._processes[name]
        output = path.read_text("utf-8", "replace")
        if process.returncode:
            raise StepFailed(f"`{' '.join(command)}` ended with status {process.returncode}: {output[-600:].strip()}")
        return output

    def wait(
        self, what: Callable[[], T | None], limit_s: float, described: str, meanwhile: Callable[[], None] | None = None
    ) -> T:
        """Observe until `what` gives something.

        Raises:
            StepFailed: It did not within `limit_s` seconds, or a daemon has ended.
        """
        deadline = time.monotonic() + limit_s
        while True:
            self.observe(0.05)
            if (found := what()) is not None:
                return found
            if meanwhile:
                meanwhile()
            for name in ("host", "agent"):
                if name in self._processes and (code := self._processes[name].poll()) is not None:
                    raise StepFailed(f"the {name} has ended with status {code}; see {self.logs / name}.log")
            if time.monotonic() > deadline:
                raise StepFailed(f"waited {limit_s:.0f} s in vain until {described}")

    def observe(self, seconds: float) -> None:
        """Hear what is said on the broker, and read what the host has written."""
        self.link.turn(seconds)
        path = self.folder / "host" / "progress.jsonl"
        if path.exists():
            with path.open(encoding="utf-8") as file:
                file.seek(self._progress_read)
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    self.progress.append(json.loads(line))
                    self._progress_read += len(line.encode())

    def stored(self) -> int:
        """How many transitions the host's database holds."""
        path = self.folder / "host" / "trainer-host.db"
        if not path.exists():
            return 0
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            (count,) = database.execute("SELECT count(*) FROM transitions").fetchone()
        return int(count)

    @contextlib.contextmanager
    def game(self, name: str, **options: object) -> Iterator[Game]:
        """A game that is played while the block lasts."""
        flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        self.start(
            name, "trainer_host.arena.game", "--port", str(self.broker.port), "--device", DEVICE, "--slot", SLOT,
            "--name", name, *flags,
        )  # fmt: skip
        game = Game(self.logs / f"{name}.log", self._processes[name])
        try:
            yield game
        finally:
            game.end()
            del self._processes[name]

    def close(self) -> None:
        """End every process that was started here."""
        for process in reversed(list(self._processes.values())):
            _end(process)
        self._processes.clear()
        self.link.close()
        self.broker.stop()

    def _heard(self, message: Message) -> None:
        if message.topic == topics.METADATA:
            self.metadata = message.payload
            return
        _, what = topics.fleet_device(message.topic)
        if what == "status":
            self.status = _statuses.decode(message.payload)
        elif what == "telemetry":
            self.telemetry = _telemetries.decode(message.payload)
        elif what == "events":
            self.events.append(_events.decode(message.payload))


class Game:
    """A game process, and what it reports."""

    def __init__(self, log: Path, process: subprocess.Popen[bytes]) -> None:
        self._log = log
        self._process = process

    @property
    def report(self) -> dict[str, Any]:
        """The newest line; empty before the first."""
        lines = [line for line in self._log.read_text("utf-8").splitlines() if line[:1] == "{" and line[-1:] == "}"]
        report: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return report

    @property
    def final(self) -> dict[str, Any] | None:
        """The closing line, once there is one."""
        report = self.report
        return report if report.get("final") else None

    def end(self) -> dict[str, Any]:
        """Stop playing; the closing line."""
        _end(self._process)
        return self.report


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and insist."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
