"""Run seeds: `python -m tests.simulation.device --seed 17` one, with its trace; `--from 0 --seeds 10000` many."""

from __future__ import annotations

import sys

from tests.simulation.device.campaign import main

sys.exit(main())
