"""For all tests: how Hypothesis looks for examples.

Time limits of single examples say more about the machine than about the code, so there are none. In CI the same
examples are tried each time: a run that fails there fails here too.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "shared-machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("shared-machine")
