"""What the agent costs by being there: start-up and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Figure, bounded, compared, median
from benchmarks.fleet import STATE, TOPICS, Fleet, serving
from benchmarks.yardstick import progress
from protocol.errors import Unavailable
from protocol.link import Broker, Link

_BARE = (
    "import sys; from pathlib import Path; import numpy as np; from edge_agent import runtime;"
    "model = runtime.load(Path(sys.argv[1]).read_bytes()); model.invoke(np.zeros(model.input_length, np.float32))"
)


def start_up(fleet: Fleet, model: Path, *, runs: int) -> list[Figure]:
    """From the start of the process to the first answer, with a model that is on the disk already."""
    ours, bare = [], []
    for run in range(runs):
        progress(f"start-up, run {run + 1} of {runs}")
        fleet.stop_agent()
        fleet.pause(0.2)
        ours.append(_until_answer(fleet, fleet.start_agent))
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", _BARE, str(model)], check=True, capture_output=True)
        bare.append(time.monotonic() - began)
    return [
        compared("start-up to first answer", "s", median(ours), ("import runtime, load, invoke", median(bare))),
        bounded("the same, as promised", "s", median(ours), 1.0),
    ]


def replacement(fleet: Fleet, *, runs: int) -> list[Figure]:
    """From the kill -9 of the only worker to the next answer."""
    times = []
    for run in range(runs):
        progress(f"killed worker, run {run + 1} of {runs}")
        fleet.stop_agent()
        fleet.start_agent()  # afresh, since one that dies again and again is replaced after a growing pause
        fleet.wait(lambda: fleet.serves(0) and len(fleet.workers()) == 1, "one worker serves")
        times.append(_until_answer(fleet, lambda: _kill(fleet.workers()[0])))
    return [bounded("killed worker to next answer", "s", median(times), 1.0)]


def _kill(pid: int) -> float:
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def _until_answer(fleet: Fleet, begin: Callable[[], float]) -> float:
    """Seconds from `begin` to the first answer after it."""
    answers: list[float] = []
    link = Link(
        Broker(port=fleet.broker.port), "bench-first", on_message=lambda _message: answers.append(time.monotonic())
    )
    link.subscribe((TOPICS[1], 0))
    while not link.connected:
        link.turn(0.1)
    began = begin()
    state = STATE.replace(b"########", b"10000000")
    while not answers:
        if time.monotonic() - began > 30:
            raise Unavailable("the agent gives no answer within 30 s")
        link.publish(TOPICS[0], state)
        link.turn(0.005)
    link.close()
    fleet.wait(lambda: fleet.serves(0), "the agent reports")
    return answers[0] - began


def memory(folder: Path, model: bytes, environments: dict[str, str]) -> list[Figure]:
    """Supervisor and one worker together, on each runtime there is."""
    figures = []
    for name, python in environments.items():
        progress(f"memory on {name}")
        with serving(folder / name, model, python) as fleet:
            fleet.pause(2.0)
            value = fleet.memory_mb()
        what = f"supervisor + worker, PSS, {name}"
        figures.append(
            bounded(what, "MB", value, 80.0) if name == "tflite-runtime" else Figure(name=what, value=value, unit="MB")
        )
    return figures
