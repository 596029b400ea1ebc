"""How long an answer takes: over the broker, and without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import attrgetter

import numpy as np
from msgspec.structs import replace

from benchmarks.figures import Figure, compared, median
from benchmarks.fleet import STATE, TOPICS, Fleet, release_of
from benchmarks.yardstick import Load, Phase, adapter_echo, echo, progress
from edge_agent import runtime
from edge_agent.serving import Policy, Responder
from protocol.errors import Unavailable

ECHO_TOPICS = ("bench/echo/state", "bench/echo/action")
ADAPTER_TOPICS = ("bench/adapter/state", "bench/adapter/action")
CALLS = 200


def round_trips(fleet: Fleet, *, blocks: int, seconds: float) -> list[Figure]:
    """State to action as the game sees it, in blocks that alternate between the echoes and the agent."""
    port = fleet.broker.port
    figures = []
    for in_flight, most_p50, most_p99 in ((1, 2.0, 2.5), (32, None, None)):
        seen: dict[str, list[Phase]] = {"echo": [], "adapter": [], "agent": []}
        with echo(port, *ECHO_TOPICS), adapter_echo(port, *ADAPTER_TOPICS):
            for block in range(blocks):
                progress(f"round trips, {in_flight} in flight, block {block + 1} of {blocks}")
                for who, topics in (("echo", ECHO_TOPICS), ("adapter", ADAPTER_TOPICS), ("agent", TOPICS)):
                    (phase,) = Load(port, topics, STATE, in_flight=in_flight, seconds=seconds).result()
                    if not phase.answered or phase.errors or phase.lost or phase.twice:
                        raise Unavailable(f"the {who} did not answer each state once: {phase}")
                    seen[who].append(phase)
                    fleet.pause(0.2)
        for name, unit, of, most in (
            ("p50", "µs", attrgetter("p50_us"), most_p50),
            ("p99", "µs", attrgetter("p99_us"), most_p99),
            ("rate", "/s", attrgetter("rate"), None),
        ):
            ours, adapter, theirs = (median(map(of, seen[who])) for who in ("agent", "adapter", "echo"))
            what = f"round trip, {in_flight} in flight, {name}"
            figure = compared(what, unit, ours, ("C echo", theirs), most=most, more_is_better=unit == "/s")
            # What an echo in Python costs is what our MQTT adapter costs, and the rest is the agent's own.
            note = f"an echo through the same Python adapter: {adapter:,.0f} {unit}"
            figures.append(replace(figure, note=note))
    return figures


def alone(model: bytes, *, rounds: int) -> Figure:
    """Decode, encode the features, invoke, encode the answer: what the worker does with a message."""
    progress("decode + invoke + encode alone")
    loaded = runtime.load(model)
    release = release_of(model, 1)
    responder = Responder("combat", Policy(loaded, release.features, release.digest, 1))
    payload = STATE.replace(b"########", b"10000000")
    vector = np.linspace(0.1, 0.9, loaded.input_length, dtype=np.float32)
    answering, invoking = [], []
    for _ in range(rounds):
        answering.append(_mean_us(lambda: responder.answer(payload, 0.0)))
        invoking.append(_mean_us(lambda: loaded.invoke(vector)))
    return compared(
        "decode + features + invoke + encode", "µs", median(answering), ("the model's invoke alone", median(invoking))
    )


def _mean_us(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6
