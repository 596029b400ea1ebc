"""Kill -9 at random, again and again, while models change under game traffic; and then look at what is left.

    python -m tests.campaign.kills --kills 1000 --seed 7

Real processes: Mosquitto, the agent with its workers, trials and stagers, and the host's repository and chunk server. A
supervisor that is killed is started again, as systemd would; so is the broker. New versions come all the time, some of
them broken. The order of kills follows from the seed; when they strike does not, since processes have a time of their
own.

What must hold: every answer is that of a model that was released and works, or an error that the protocol knows; a
model that works is refused only because it was killed twice; and in the end the newest model is served, nothing
half-written is left on the disk, no process is left over, and the host has every transition that the device had stored.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from edge_agent.outbox import BLOCK
from protocol import codec, topics
from protocol.codec import Decoder
from protocol.messages import Decision, TransitionBatch
from tests.integration.world import DEVICE, MODELS, SLOT, World

ECHO = (MODELS / "echo.tflite").read_bytes()
NAN = (MODELS / "nan.tflite").read_bytes()
TARGETS = ("supervisor", "worker", "trial", "stager", "broker")
SETTINGS = "trial_duty = 1.0\nwatch_seconds = 2.0\nwatch_interval_s = 0.1\ndeadline_ms = 2000\n"
MARK = "EDGESWAP_CAMPAIGN"
ASK_S = 0.02
PAD_BYTES = 400_000
ALLOWED_ERRORS = {"no_model", "overloaded"}
END_S = 120.0

_batches: Decoder[TransitionBatch] = Decoder(TransitionBatch)


class Campaign(World):
    """A world in which everything is killed.

    Args:
        folder: For everything.
        seed: What is killed, what is released.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.works: dict[str, int] = {}
        self.broken: dict[str, int] = {}
        self.answered: Counter[str] = Counter()
        self.version = -1
        self.step = 0
        self._metadata = b""
        self._ask_at = 0.0
        self._looked_at = 0
        self._is_playing = False
        os.environ[MARK] = str(os.getpid())
        super().__init__(folder, SETTINGS)

    def release(self, *, working: bool) -> None:
        """Release a version that nobody has yet: a few hundred kilobytes that the runtime does not look at differ."""
        self.version += 1
        model = (ECHO if working else NAN) + self.rng.randbytes(PAD_BYTES)
        release = self.release_model(model, self.version, like=ECHO)
        (self.works if working else self.broken)[release.digest] = self.version
        self._metadata = self.repository.metadata_set()
        self.publish_metadata(self._metadata)

    def begin(self) -> None:
        """Serve a first version, and begin to play."""
        self.start_agent()
        self.release(working=True)
        self.wait(lambda: self.is_serving(0), "version 0 is served")
        self._is_playing = True

    def strike(self) -> None:
        """Kill one process."""
        living = [target for target in TARGETS if self._pids(target)]
        target = self.rng.choice(living)
        victim = self.rng.choice(self._pids(target))
        try:
            psutil.Process(victim).kill()
        except psutil.Error:  # it has just ended by itself
            return
        self.killed[target] += 1
        if target == "broker":
            self.broker.stop()
            self.broker.start()
            self.wait(lambda: self.link.connected, "the broker is back")
            self.publish_metadata(self._metadata)
        elif target == "supervisor":
            assert self.agent is not None
            self.agent.wait()
            self.start_agent()

    def turn(self, seconds: float) -> None:
        """Play the host, and the game."""
        super().turn(seconds)
        now = time.monotonic()
        if self._is_playing and now >= self._ask_at and self.link.connected:
            self._ask_at = now + ASK_S
            self._ask()
        for decision in self.decisions[self._looked_at :]:
            self._check(decision)
        self._looked_at = len(self.decisions)

    def check_end(self) -> None:
        """Once nothing is killed any more: does it all come right, and is nothing left?"""
        self.release(working=True)
        self.wait(lambda: self.is_serving(self.version), f"version {self.version} is served", END_S)
        self.wait(self._is_settled, "nothing is under way", END_S)
        self.wait(lambda: self.telemetry[-1].outbox_rows == 0, "the host has every transition", END_S)
        assert self.telemetry[-1].dropped_transitions == 0
        self._check_refusals()
        self._check_transitions()
        self.stop_agent()
        self._check_disk()
        assert not self._left_over(), "processes are left over"

    def _ask(self) -> None:
        self.step += 1
        features = [0.0] * 6
        features[self.step % 4] = 1.0
        observation = {"battle": f"b{self.step // 50}", "step": self.step, "features": features, "reward": 1.0}
        self.link.publish(topics.state(DEVICE, SLOT), codec.encode(observation, as_json=True), qos=self.step % 2)

    def _check(self, decision: Decision) -> None:
        if decision.error is not None:
            assert decision.error.code in ALLOWED_ERRORS, decision
            self.answered[decision.error.code] += 1
            return
        assert decision.action == decision.step % 4, f"a wrong answer: {decision}"
        assert self.works.get(decision.model) == decision.version, f"an answer of no released model: {decision}"
        self.answered["action"] += 1

    def _store(self, payload: bytes) -> None:
        batch = _batches.decode(codec.decompress(payload))
        for transition in batch.transitions:
            known = self.transitions.get((batch.epoch, transition.seq), transition)
            assert known == transition, f"one number for two transitions: {known} and {transition}"
        super()._store(payload)

    def _is_settled(self) -> bool:
        assert self.status is not None
        return self.status.slots[SLOT].phase == "serving" and len(self.children("worker")) == 1

    def _check_refusals(self) -> None:
        for event in self.events:
            if event.kind in {"refused", "rolled_back"} and event.model in self.works:
                assert event.reason == "died_twice", event
            if event.kind == "committed":
                assert event.model in self.works, event

    def _check_transitions(self) -> None:
        """Numbers go up by one; only a supervisor that was killed leaves the rest of its block unused."""
        epochs: dict[str, list[int]] = {}
        for epoch, number in self.transitions:
            epochs.setdefault(epoch, []).append(number)
        assert len(epochs) == 1, "the outbox was lost"
        for numbers in epochs.values():
            numbers.sort()
            for before, after in pairwise(numbers):
                assert after == before + 1 or after % BLOCK == 1, f"between {before} and {after} something is missing"

    def _check_disk(self) -> None:
        state = self.folder / "state"
        half = [path for path in state.rglob("*") if path.name.endswith((".new", ".tmp"))]
        assert not half, half
        assert not list((state / "chunks").iterdir())
        models = {path.stem for path in (state / "models").iterdir()}
        assert models <= self.works.keys(), models
        assert len(models) <= 2, models

    def _pids(self, target: str) -> list[int]:
        assert self.agent is not None
        if target == "supervisor":
            return [self.agent.pid]
        if target == "broker":
            return [child.pid for child in psutil.Process().children() if child.name() == "mosquitto"]
        return self.children(target)

    def _left_over(self) -> list[str]:
        def is_ours(process: Any) -> bool:
            try:
                return bool(process.environ().get(MARK) == str(os.getpid())) and process.pid != os.getpid()
            except psutil.Error:
                return False

        found = [process for process in psutil.process_iter() if is_ours(process)]
        agents = [process for process in found if "edge_agent" in " ".join(process.cmdline())]
        _, alive = psutil.wait_procs(agents, timeout=20)
        return [" ".join(process.cmdline()) for process in alive]


def run(kills: int, seed: int, folder: Path) -> Campaign:
    """Run a campaign to its end. Raises `AssertionError` where something does not hold."""
    campaign = Campaign(folder, seed)
    try:
        campaign.begin()
        next_release = time.monotonic()
        while campaign.killed.total() < kills:
            pause = campaign.rng.uniform(0.05, 1.5)
            until = time.monotonic() + pause
            while time.monotonic() < until:
                campaign.turn(0.02)
            if time.monotonic() >= next_release:
                next_release = time.monotonic() + campaign.rng.uniform(2.0, 8.0)
                campaign.release(working=campaign.rng.random() < 0.8)
            campaign.strike()
        campaign.check_end()
    finally:
        campaign.close()
    return campaign


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many")
    parser.add_argument(
        "--seed", type=int, default=None, help="of what is killed and released; by default another each time"
    )
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        done = run(arguments.kills, seed, Path(folder))
    outcomes = Counter(f"{event.kind} {event.reason}".strip() for event in done.events)
    sys.stdout.write(
        f"killed {dict(done.killed)} in {done.version + 1} releases; {done.step} states\n"
        f"answers {dict(done.answered)}\n"
        f"events {dict(outcomes)}\nall held\n"
    )


if __name__ == "__main__":
    main()
