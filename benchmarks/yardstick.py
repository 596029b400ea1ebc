"""The C programs: echo and drain, which ours are compared with, and the load that both are measured with."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from protocol.errors import Misconfigured, Unavailable

FOLDER = Path(__file__).parent
BUILD = FOLDER / "build"
HOMEBREW = Path("/opt/homebrew")


class Phase(Struct, frozen=True):
    """What the load saw between two marks."""

    answered: int
    errors: int
    lost: int
    twice: int
    seconds: float
    p50_us: float
    p99_us: float
    longest_us: float
    longest_gap_ms: float

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds


def build() -> None:
    """Compile them.

    Raises:
        Misconfigured: There is no compiler, or libmosquitto's header is missing.
    """
    BUILD.mkdir(exist_ok=True)
    places = [f"-I{HOMEBREW}/include", f"-L{HOMEBREW}/lib"] if HOMEBREW.exists() else []
    for name in ("echo", "load", "drain"):
        command = ["cc", "-O2", "-o", str(BUILD / name), str(FOLDER / f"{name}.c"), *places, "-lmosquitto"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise Misconfigured("no C compiler: run scripts/setup.sh bench") from error
        except subprocess.CalledProcessError as error:
            raise Misconfigured(f"cannot compile {name}.c; run scripts/setup.sh bench\n{error.stderr}") from error


def echo(port: int, state: str, action: str) -> AbstractContextManager[None]:
    """The C echo, while it runs."""
    return _echo([str(BUILD / "echo"), str(port), state, action])


def adapter_echo(port: int, state: str, action: str) -> AbstractContextManager[None]:
    """The same in Python through `protocol.link`, while it runs."""
    return _echo([sys.executable, "-m", "benchmarks.adapter_echo", str(port), state, action])


@contextmanager
def _echo(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise Unavailable(f"{command[-4]} cannot reach the broker")
        yield
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class Load:
    """A running load.

    Args:
        port: Of the broker.
        topics: Of states and of actions.
        state: The message, with `########` where its number belongs.
        in_flight: How many states wait for their answers at any time.
        seconds: How long, at most.
        qos: Of states; the answers come at the same.
    """

    def __init__(
        self, port: int, topics: tuple[str, str], state: bytes, *, in_flight: int, seconds: float, qos: int = 0
    ) -> None:
        command = [str(BUILD / "load"), str(port), *topics, str(qos), str(in_flight), str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(state)
        self._process.stdin.close()
        self._process.stdin = None

    def mark(self) -> None:
        """Begin a new phase."""
        self._process.send_signal(signal.SIGUSR1)

    def stop(self) -> list[Phase]:
        """End it early, and see what it saw."""
        self._process.send_signal(signal.SIGTERM)
        return self.result()

    def result(self) -> list[Phase]:
        """Wait until it ends."""
        printed, _ = self._process.communicate(timeout=600)
        if self._process.returncode:
            raise Unavailable(f"the load ended with status {self._process.returncode}")
        return [msgspec.json.decode(line, type=Phase) for line in printed.splitlines()]


def progress(text: str) -> None:
    """Say on stderr what is being measured."""
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()
