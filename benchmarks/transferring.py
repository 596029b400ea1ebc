"""What an update costs: how fast a model comes, and what the game notices of it."""

from __future__ import annotations

import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Figure, compared, median
from benchmarks.fleet import STATE, TOPICS, Fleet, serving, twin
from benchmarks.yardstick import BUILD, Load, Phase, progress
from edge_agent import children
from edge_agent.children import Child
from edge_agent.limits import NICENESS
from edge_agent.staging import FromStager, MetadataVerified, Progress, Staged, StageModel, StagerSettings
from protocol import topics
from protocol.errors import Unavailable
from protocol.link import Broker
from protocol.release import Release

CALM_S = 3.0
LIMIT_S = 120.0
ENDINGS = frozenset({"committed", "refused", "inconclusive", "postponed"})
MOST_FELT = 1.2
MOST_SLOWER = 1 / 0.8


def rates(folder: Path, model: bytes, *, runs: int) -> Figure:
    """How fast a stager has a model's chunks on its disk, from the first that is published to the last.

    The drain runs at the stager's priority.
    """
    folder.mkdir(parents=True)
    fleet = Fleet(folder)
    ours, drained = [], []
    try:
        for run in range(1, runs + 1):
            progress(f"transfer of 100 MB, run {run} of {runs}")
            release = fleet.publish(twin(model, run), run)
            drained.append(release.length / _drained_in(fleet, release))
            ours.append(release.length / _fetched_in(fleet, release, folder / f"stager-{run}"))
    finally:
        fleet.close()
    return compared(
        "transfer of a 100 MB model", "MB/s", median(ours) / 1e6, ("drained by libmosquitto", median(drained) / 1e6),
        most=MOST_SLOWER, more_is_better=True,
    )  # fmt: skip


def felt(folder: Path, small: bytes, large: bytes, *, runs: int) -> list[Figure]:
    """The game's answers while 100 MB are transferred and qualified beside it, and just before."""
    calm: list[Phase] = []
    busy: list[Phase] = []
    with serving(folder, small) as fleet:
        for run in range(1, runs + 1):
            progress(f"serving beside a transfer, run {run} of {runs}")
            load = Load(fleet.broker.port, TOPICS, STATE, in_flight=1, seconds=300)
            fleet.pause(CALM_S)
            before = len(fleet.events)
            load.mark()
            fleet.publish(twin(large, run), run)
            fleet.wait(lambda before=before: fleet.heard({"staged"}, before), "the model is staged")  # type: ignore[misc]
            without, during, *_ = load.stop()
            calm.append(without)
            busy.append(during)
            fleet.wait(lambda before=before: fleet.heard(ENDINGS, before), "its trial has ended")  # type: ignore[misc]
    figures = []
    for name, most in (("p50", None), ("p99", MOST_FELT)):
        with_it, without_it = (median(getattr(phase, f"{name}_us") for phase in phases) for phases in (busy, calm))
        what = f"round trip, {name}, while 100 MB come and are qualified"
        figures.append(compared(what, "µs", with_it, ("just before", without_it), most=most))
    return figures


def _drained_in(fleet: Fleet, release: Release) -> float:
    command = [
        "nice",
        "-n",
        str(NICENESS),
        str(BUILD / "drain"),
        str(fleet.broker.port),
        topics.chunk("+"),
        str(release.length),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise Unavailable("the drain cannot reach the broker")
        fleet.publish_chunks(release)
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            fleet.turn(0.02)
        return float(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _fetched_in(fleet: Fleet, release: Release, folder: Path) -> float:
    folder.mkdir()
    (folder / "metadata").write_bytes(fleet.metadata_set())
    settings = StagerSettings(
        device="bench-stager",
        folder=str(folder),
        trust_folder=str(folder / "trust"),
        root_file=str(folder.parent / "root.json"),
        metadata_file=str(folder / "metadata"),
        built_at=0.0,
        broker=Broker(port=fleet.broker.port),
    )
    stager = _Stager(fleet, children.start("stager", settings, FromStager, "stager"))
    try:
        stager.says(lambda said: isinstance(said, MetadataVerified))
        before = fleet.chunks.published_chunks
        stager.child.channel.send(StageModel(release.digest))
        fleet.wait(lambda: fleet.chunks.published_chunks > before + 1, "the first chunk is published")
        began = time.monotonic()
        stager.says(lambda said: isinstance(said, Progress) and said.bytes == said.total)
        seconds = time.monotonic() - began
        stager.says(lambda said: isinstance(said, Staged))
        return seconds
    finally:
        stager.child.kill()


class _Stager:
    """A stager, and what it has said and nobody has looked at."""

    def __init__(self, fleet: Fleet, child: Child[FromStager]) -> None:
        self.child = child
        self._fleet = fleet
        self._said: deque[FromStager] = deque()

    def says(self, awaited: Callable[[FromStager], bool]) -> None:
        """Play the host until the stager says something awaited; what it says before is passed over."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and not self.child.channel.closed:
            self._said += self.child.channel.receive()
            while self._said:
                if awaited(self._said.popleft()):
                    return
            self._fleet.turn(0.02)
        raise Unavailable(f"the stager does not get there: {self.child.how_it_ended()}")
