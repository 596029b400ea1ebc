"""Many seeds, on all cores; and one seed, again."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable

from tests.simulation.device import mutants
from tests.simulation.device.seeds import Outcome, simulate
from tests.simulation.device.wiring import wired

BATCH = 50


def failing(seeds: Iterable[int]) -> list[Outcome]:
    """The seeds among these that fail."""
    with wired():
        return [outcome for seed in seeds if (outcome := simulate(seed)).failure]


def campaign(first: int, count: int, workers: int) -> list[Outcome]:
    """The seeds that fail."""
    batches = [range(start, min(start + BATCH, first + count)) for start in range(first, first + count, BATCH)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return [outcome for found in pool.imap_unordered(failing, batches) for outcome in found]


def shown(outcome: Outcome) -> str:
    """A seed's trace, and what was wrong."""
    lines = [f"seed {outcome.seed}"]
    lines += ["  ".join(str(part) for part in entry) for entry in outcome.trace]
    return "\n".join([*lines, outcome.failure or "all was well"])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.device", description="Simulate one device.")
    parser.add_argument("--seed", type=int, help="one seed, with its trace")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mutants", action="store_true", help="break the code in each way that should be noticed")
    parser.add_argument("--only", default="", help="mutants with this in their name")
    parser.add_argument("--remember", action="store_true", help="keep the seeds that killed them")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is part of what a seed decides
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation.device", *sys.argv[1:]])  # noqa: S606
    if options.mutants:
        return 1 if mutants.kill_all(options.workers, options.only, remember=options.remember) else 0
    if options.seed is not None:
        return _show(options.seed)
    return _run(options.first, options.seeds, options.workers)


def _show(seed: int) -> int:
    with wired():
        outcome = simulate(seed)
    sys.stdout.write(shown(outcome) + "\n")
    return 1 if outcome.failure else 0


def _run(first: int, count: int, workers: int) -> int:
    began = time.monotonic()
    failed = sorted(campaign(first, count, workers))
    took_s = time.monotonic() - began
    for outcome in failed[:1]:
        sys.stdout.write(shown(outcome) + "\n")
    for outcome in failed:
        sys.stdout.write(f"seed {outcome.seed}: {outcome.failure.strip().splitlines()[-1]}\n")
    sys.stdout.write(
        f"{count} seeds in {took_s:.0f} s, {1000 * took_s * workers / count:.1f} ms each on {workers} cores: "
        f"{len(failed)} failed\n"
    )
    return 1 if failed else 0
