"""One seed: what came of it."""

from __future__ import annotations

import traceback
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

from tests.simulation.device.checks import Violation
from tests.simulation.device.wiring import MEMORY_FOLDER, inhabited
from tests.simulation.device.world import World


class Outcome(NamedTuple):
    """What came of one seed.

    Attributes:
        seed: Which.
        failure: What was wrong; empty if nothing was.
        trace: What happened.
        steps: How often the disk was used.
        is_violation: Whether an invariant was violated, and it is no error of another kind.
    """

    seed: int
    failure: str
    trace: list[tuple[Any, ...]]
    steps: int
    is_violation: bool


def simulate(seed: int) -> Outcome:
    """One seed, in a wired process."""
    with NamedTemporaryFile(dir=MEMORY_FOLDER) as root_file:
        world = World(seed, root_file.name)
        Path(root_file.name).write_bytes(world.history.root)
        failure, is_violation = "", False
        with inhabited(world):
            try:
                world.run()
            except Exception as error:  # noqa: BLE001 - no exception may escape: each is a failure of the seed
                failure = "".join(traceback.format_exception(error))
                is_violation = isinstance(error, Violation)
    return Outcome(seed, failure, world.trace, world.steps, is_violation)
