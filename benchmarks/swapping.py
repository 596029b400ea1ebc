"""The longest silence a game notices while a model is exchanged under load."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures import Figure, median
from benchmarks.fleet import STATE, TOPICS, serving, twin
from benchmarks.yardstick import Load, Phase, progress

IN_FLIGHT = 4
CALM_S = 4.0
AFTER_S = 1.0
MOST_EXTRA_MS = 5.0


def swaps(folder: Path, name: str, model: bytes, *, runs: int) -> list[Figure]:
    """Exchange a model for its twin, several times, and compare the longest gaps between answers."""
    calm: list[float] = []
    preparing: list[float] = []
    handover: list[float] = []
    seen: list[Phase] = []
    with serving(folder, model) as fleet:
        for run in range(1, runs + 1):
            progress(f"swap of the {name} model, run {run} of {runs}")
            load = Load(fleet.broker.port, TOPICS, STATE, in_flight=IN_FLIGHT, seconds=300)
            fleet.pause(CALM_S)
            load.mark()
            fleet.publish(twin(model, run), run)
            fleet.wait(lambda version=run: fleet.committed(version), f"version {run} is committed")  # type: ignore[misc]
            load.mark()
            fleet.wait(lambda version=run: fleet.serves(version), f"version {run} is served")  # type: ignore[misc]
            fleet.pause(AFTER_S)
            phases = load.stop()
            seen += phases
            for gaps, phase in zip((calm, preparing, handover), phases, strict=True):
                gaps.append(phase.longest_gap_ms)
    lost = max(phase.lost for phase in seen) + max(phase.twice for phase in seen) + sum(phase.errors for phase in seen)
    before, between, extra = median(calm), median(preparing), median(handover) - median(calm)
    return [
        Figure(
            name=f"longest gap, handover to a {name} model",
            value=median(handover), unit="ms", yardstick="without a swap", yardstick_value=before,
            ratio=median(handover) / before, target=f"≤ {MOST_EXTRA_MS:g} ms more", met=extra <= MOST_EXTRA_MS,
        ),
        Figure(
            name=f"longest gap, download and trial of a {name} model",
            value=between, unit="ms", yardstick="without a swap", yardstick_value=before, ratio=between / before,
            note="the host, too, works on the same cores here",
        ),
        Figure(
            name=f"lost, doubled or refused answers, {name} model",
            value=lost, unit=f"of {sum(phase.answered for phase in seen):,}", target="none", met=lost == 0,
        ),
    ]  # fmt: skip
