"""`python -m benchmarks`: measures everything, and prints one table.

Exit codes: 0 measured (whether or not every target was met), 2 something is missing, 3 something did not answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from benchmarks import answering, living, storing, swapping, transferring, yardstick
from benchmarks.figures import Figure, show
from benchmarks.fleet import serving
from edge_agent import runtime
from protocol import command_line
from protocol.command_line import JsonFlag

MODELS = yardstick.BUILD / "models"
TFLITE_ENVIRONMENT = Path(".venv-tflite/bin/python")

app = App(name="benchmarks", help="What the system does, in figures, each beside a yardstick of the same run.")


@app.default
def bench(
    *, quick: Annotated[bool, Parameter(negative="", help="Fewer and shorter runs.")] = False, json: JsonFlag = False
) -> int:
    """Measure everything."""
    runs = 3 if quick else 7
    yardstick.build()
    small, large = (_model(name) for name in ("small", "large"))
    environments = {runtime.name(): sys.executable}
    if TFLITE_ENVIRONMENT.exists():
        environments["tflite-runtime"] = str(TFLITE_ENVIRONMENT)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="edgeswap-bench-") as name:
        folder = Path(name)
        with serving(folder / "answering", small.read_bytes()) as fleet:
            figures += answering.round_trips(fleet, blocks=runs, seconds=1.0 if quick else 3.0)
            figures.append(answering.alone(small.read_bytes(), rounds=runs * 5))
            figures += living.start_up(fleet, small, runs=runs)
            figures += living.replacement(fleet, runs=runs)
        if sys.platform == "linux":
            figures += living.memory(folder / "memory", small.read_bytes(), environments)
        figures += swapping.swaps(folder / "small", "small", small.read_bytes(), runs=3 if quick else 5)
        figures += swapping.swaps(folder / "large", "100 MB", large.read_bytes(), runs=1 if quick else 3)
        figures.append(transferring.rates(folder / "rates", large.read_bytes(), runs=2 if quick else 5))
        figures += transferring.felt(folder / "felt", small.read_bytes(), large.read_bytes(), runs=2 if quick else 5)
        figures.append(storing.ingest(folder / "ingest", runs=runs, count=8_000 if quick else 40_000))
    show(figures, as_json=json)
    return 0


def _model(name: str) -> Path:
    path = MODELS / f"{name}.tflite"
    if not path.exists():
        yardstick.progress("making the models to measure, once")
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-m", "benchmarks.models", str(MODELS)], check=True, env=quiet)
    return path


if __name__ == "__main__":
    sys.exit(command_line.run(app))
