"""Some hundred seeds of the simulated device, each time the tests run; `make simulate` and `simulate-mutants` run more.

Each run is a process of its own, since the simulation puts a simulated world under the code.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SEEDS = 300
ROOT = Path(__file__).resolve().parents[3]


def simulated(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.simulation.device", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_the_invariants_hold() -> None:
    ended = simulated("--seeds", str(SEEDS))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{SEEDS} seeds" in ended.stdout


def test_a_seed_replays_exactly() -> None:
    first, second = simulated("--seed", "7"), simulated("--seed", "7")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.count("\n") > 30, "there is a trace"
