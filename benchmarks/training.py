"""What training costs, and how far exported models stray.

    python -m benchmarks.training [--examples 30000] [--seeds 5]

The data is the expert playing the scripted opponent. Each job runs in its child process, as the daemon runs it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from trainer_host import dataset, parity
from trainer_host.arena import observation, rules
from trainer_host.arena.players import ExpertPlayer, ScriptedPlayer
from trainer_host.dataset import Transitions
from trainer_host.jobs import GateRequest, PaddedRequest, Trained, TrainingRequest, UntrainedRequest, run_job
from trainer_host.recipes.table import named

T = TypeVar("T")
BATTLES = 256


def demonstrations(count: int, seed: int) -> Transitions:
    """At least `count` transitions of the expert, in whole battles, each actor's last row with the outcome."""
    rng = np.random.default_rng(seed)
    expert, scripted = ExpertPlayer(), ScriptedPlayer()
    rows: list[tuple[str, str, int, bytes, int, bytes]] = []
    rewards: dict[int, float] = {}
    for first in range(0, count, BATTLES):
        if len(rows) >= count:
            break
        battles, own = rules.draw(rng, BATTLES), np.arange(BATTLES) % 2
        running, last, step = np.arange(BATTLES), dict[tuple[int, str], int](), 0
        while len(running):
            now = battles.take(running)
            seen, mine = observation.view(now), rules.side(now) == own[running]
            actions = np.where(mine, expert.choose(seen, rng), scripted.choose(seen, rng)).astype(np.int32)
            vectors, legal = observation.encode(seen).astype("<f4"), seen.legal.astype(np.uint8)
            for row in np.flatnonzero(mine).tolist():
                battle, actor = int(running[row]), str(int(now.actor[row]))
                last[battle, actor] = len(rows)
                name, action = f"b{first + battle}", int(actions[row])
                rows.append((name, actor, step, vectors[row].tobytes(), action, legal[row].tobytes()))
            after = rules.play(now, actions)
            battles.put(running, after)
            running, step = running[~after.over], step + 1
        outcome = np.where(own == 0, battles.outcome, -battles.outcome)
        rewards |= {row: float(outcome[battle]) for (battle, _), row in last.items()}
    return _columns(rows, rewards)


def _columns(rows: list[tuple[str, str, int, bytes, int, bytes]], rewards: dict[int, float]) -> Transitions:
    battle, actor, step, features, action, legal = zip(*rows, strict=True)
    none = np.zeros(len(rows), bool)
    return Transitions(
        slot=["combat"] * len(rows),
        battle=battle,
        actor=actor,
        step=np.array(step),
        features=features,
        action=np.array(action),
        taken=~none,
        propensity=np.full(len(rows), np.nan),
        legal=legal,
        reward=np.array([rewards.get(row, 0.0) for row in range(len(rows))]),
        done=np.array([row in rewards for row in range(len(rows))]),
        truncated=none,
        model=[""] * len(rows),
        at=np.arange(len(rows), dtype=np.float64),
    )


def timed(label: str, work: Callable[[], T]) -> T:
    """Do the work, and print how long it took."""
    started = time.monotonic()
    result = work()
    print(f"{label:<44}{time.monotonic() - started:8.2f} s")
    return result


def start_up(module: str) -> None:
    """Start Python and import one module."""
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)


def cost(folder: Path, trained: Trained) -> None:
    """Print what each kind of job takes."""
    timed("start-up of a training process", lambda: start_up("trainer_host.training_job"))
    timed("start-up of a checking process", lambda: start_up("trainer_host.checking_job"))
    fresh = timed(
        "untrained model, whole job",
        lambda: run_job(UntrainedRequest(recipe=named("combat"), output=str(folder / "untrained"))),
    )
    slow = timed(
        "padded model, whole job", lambda: run_job(PaddedRequest(network=trained.network, output=str(folder / "slow")))
    )
    request = GateRequest(
        slot="combat", candidate=trained.released.path, current=fresh.released.path, output=str(folder / "gate")
    )
    report = timed("gate, 4,000 battles by each model", lambda: run_job(request)).report
    print(f"gate: {'passed' if report.passed else 'refused'}; {'; '.join(report.reasons)}")
    inputs = np.zeros((2000, named("combat").features.length), np.float32)
    seconds = []
    for file in (trained.released, slow.released):
        score = parity.scorer(Path(file.path).read_bytes())
        score(inputs[:100])
        started = time.perf_counter()
        score(inputs)
        seconds.append((time.perf_counter() - started) / len(inputs))
    print(f"one inference through Python: {seconds[0] * 1e6:.1f} us, padded {seconds[1] * 1e6:.1f} us")


def deviation(folder: Path, data: Path, seeds: range) -> None:
    """Print, by seed, how far dynamic range strays from the network, and the runtimes from each other."""
    columns = [f"{name} difference, agreement" for name in parity.installed()]
    print("dynamic range  ", "   ".join([*columns, "between runtimes: all rows, golden rows"]))
    transitions = dataset.load(data)
    width, actions = named("combat").features.length, len(rules.ACTIONS)
    inputs = dataset.clean(transitions, slot="combat", features=width, actions=actions).examples.features[:6000]
    for seed in seeds:
        output = str(folder / f"seed{seed}")
        trained = run_job(TrainingRequest(recipe=named("combat"), data=str(data), output=output, seed=seed))
        if "dynamic_range" not in trained.files:
            print(f"seed {seed:<10}refused: {trained.refused['dynamic_range']}")
            continue
        file = trained.files["dynamic_range"]
        model, golden = Path(file.path).read_bytes(), np.array(file.golden.inputs, np.float32)
        figures = [f"{each.max_difference:.3f}, {each.argmax_agreement:.4f}" for each in file.parity]
        for rows in (inputs, golden):
            answers = [parity.scores(model, rows, name) for name in parity.installed()]
            figures.append(f"{max(float(np.abs(each - answers[0]).max()) for each in answers):.4f}")
        print(f"seed {seed:<10}", "   ".join(figures))


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--examples", type=int, default=30_000)
    arguments.add_argument("--seeds", type=int, default=5)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data.npz"
        dataset.save(data, demonstrations(given.examples, seed=0))
        request = TrainingRequest(recipe=named("combat"), data=str(data), output=str(folder / "first"), seed=100)
        trained = timed("training, whole job", lambda: run_job(request))
        print(f"examples: {trained.examples}")
        print("  ".join(f"{name} {value:.4g}" for name, value in trained.metrics.items()))
        cost(folder, trained)
        deviation(folder, data, range(101, 101 + given.seeds))


if __name__ == "__main__":
    main()
