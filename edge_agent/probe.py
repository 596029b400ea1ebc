"""Which operators this device's runtime has: loads tiny models, one per generation of operators, and runs them.

Run as a process, `python -m edge_agent.probe`, because a runtime that was built for another CPU ends its process.
Prints the runtime's name and version, then `has <probe>` or `lacks <probe>` for each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from edge_agent import runtime
from protocol.errors import Rejected

FOLDER = Path(__file__).parent / "probes"


def runs(model: bytes) -> bool:
    """Whether the runtime loads the model and gives finite numbers."""
    try:
        loaded = runtime.load(model)
        scores = loaded.invoke(np.ones(loaded.input_length, np.float32))
    except Rejected:
        return False
    return bool(np.isfinite(scores).all())


def main() -> None:
    """Try every probe."""
    sys.stdout.write(f"{runtime.name()} {runtime.version()}\n")
    for path in sorted(FOLDER.glob("*.tflite")):
        sys.stdout.write(f"{'has' if runs(path.read_bytes()) else 'lacks'} {path.stem}\n")


if __name__ == "__main__":
    main()
