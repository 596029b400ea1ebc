"""The whole agent goes back: from a model that kills what runs it, with nobody's help, and by an operator's wish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from tuf.api.metadata import Targets  # type: ignore[attr-defined]

from protocol.wishes import FIELD, Pin, Withdrawal, to_field
from tests.integration.world import MODELS, World

ECHO = (MODELS / "echo.tflite").read_bytes()
TWIN = (MODELS / "twin.tflite").read_bytes()
WATCHED = "trial_duty = 1.0\nwatch_seconds = 600\nwatch_interval_s = 0.1\ndeadline_ms = 2000\n"
TRIED_FOR_LONG = "trial_duty = 0.001\ndeadline_ms = 2000\n"


@contextmanager
def serving(folder: Path, settings: str) -> Iterator[World]:
    world = World(folder, settings)
    try:
        world.start_agent()
        world.publish(ECHO, 0)
        world.wait(lambda: world.is_serving(0) and len(world.children("worker")) == 1, "version 0 is served")
        yield world
    finally:
        world.close()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[World]:
    """Version 1 is served and watched, version 0 is the one before."""
    with serving(tmp_path, WATCHED) as world:
        world.publish(TWIN, 1)
        world.wait(lambda: world.is_serving(1) and len(world.children("worker")) == 1, "version 1 is served")
        yield world


@pytest.fixture
def tried(tmp_path: Path) -> Iterator[World]:
    """Version 1 is tried, and will be for as long as the test takes."""
    with serving(tmp_path, TRIED_FOR_LONG) as world:
        world.publish(TWIN, 1)
        world.event("trial")
        world.wait(lambda: world.children("trial"), "the trial runs")
        yield world


def kill(world: World, kind: str) -> None:
    (victim,) = world.children(kind)
    if kind == "worker":
        world.status = None  # what was said before the death says nothing about after it
    psutil.Process(victim).kill()
    world.wait(lambda: world.children(kind) not in ([victim], []) or rolled_back(world), f"another {kind} runs")


def rolled_back(world: World) -> bool:
    return any(event.reason == "died_twice" for event in world.events)


def restart(world: World) -> None:
    """Kill -9 the daemon, as the system does when memory runs out, and start it again, as systemd does."""
    assert world.agent is not None
    world.agent.kill()
    world.agent.wait()
    world.status = None
    world.start_agent()
    world.wait(lambda: world.status is not None and world.status.slots["combat"].ready, "it serves again")


def answer(world: World) -> int | None:
    return world.ask({"battle": "b", "step": 1, "features": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]}).version


def test_a_new_model_that_kills_its_worker_twice_is_rolled_back(watched: World) -> None:
    kill(watched, "worker")
    watched.wait(lambda: watched.is_serving(1), "version 1 has a second chance")
    assert answer(watched) == 1
    kill(watched, "worker")
    watched.wait(lambda: watched.is_serving(0), "version 0 is served again")
    assert answer(watched) == 0
    event = watched.event("rolled_back")
    assert (event.version, event.reason) == (1, "died_twice")
    watched.publish_metadata(watched.repository.metadata_set())
    assert watched.is_serving(0)


def test_a_new_model_that_kills_its_watch_twice_is_rolled_back(watched: World) -> None:
    kill(watched, "trial")
    kill(watched, "trial")
    watched.wait(lambda: watched.is_serving(0), "version 0 is served again")
    assert watched.event("rolled_back").reason == "died_twice"


def test_a_new_model_that_takes_the_daemon_down_twice_is_rolled_back(watched: World) -> None:
    restart(watched)
    assert watched.is_serving(1)
    restart(watched)
    watched.wait(lambda: watched.is_serving(0), "version 0 is served again")
    assert watched.event("rolled_back").reason == "died_twice"


def test_a_candidate_that_kills_its_trial_twice_is_refused_and_the_old_model_never_stops(tried: World) -> None:
    workers = tried.children("worker")
    kill(tried, "trial")
    kill(tried, "trial")
    event = tried.event("refused")
    assert (event.version, event.reason) == (1, "died_twice")
    assert tried.children("worker") == workers
    assert answer(tried) == 0


def test_a_candidate_that_takes_the_daemon_down_twice_is_refused(tried: World) -> None:
    restart(tried)
    tried.wait(lambda: tried.children("trial"), "it is tried once more")
    restart(tried)
    event = tried.event("refused")
    assert (event.version, event.reason) == (1, "died_twice")
    deadline = time.monotonic() + 2.0
    tried.wait(lambda: time.monotonic() > deadline or tried.children("stager"), "it is not staged again")
    assert tried.is_serving(0)


def wish(world: World, *wishes: Pin | Withdrawal) -> None:
    """Sign these wishes, and no others."""

    def change(targets: Targets) -> None:
        targets.unrecognized_fields[FIELD] = to_field(wishes)

    world.repository.amend(change, datetime.now(UTC))
    world.publish_metadata(world.repository.metadata_set())


def test_a_withdrawn_version_is_rolled_back_in_the_middle_of_its_watch(watched: World) -> None:
    wish(watched, Withdrawal(slot="combat", version=1, by="alice"))
    watched.wait(lambda: watched.is_serving(0), "version 0 is served again")
    event = watched.event("rolled_back")
    assert (event.version, event.reason) == (1, "withdrawn")
    assert "wished by alice" in event.text
    assert answer(watched) == 0


def test_a_pin_goes_back_and_forth_and_when_it_is_lifted_the_newest_is_tried_again(watched: World) -> None:
    wish(watched, Pin(slot="combat", version=0, devices=("pi7",), by="alice"))
    watched.wait(lambda: watched.is_serving(0), "version 0 is served")
    assert watched.event("pinned").version == 0
    watched.publish(ECHO + b"newer", 2)
    wish(watched, Pin(slot="combat", version=1))
    watched.wait(lambda: watched.is_serving(1), "version 1 is served")
    assert answer(watched) == 1
    assert watched.status is not None
    assert watched.status.slots["combat"].pinned == 1
    wish(watched)
    watched.wait(lambda: watched.is_serving(2), "version 2 was tried, and is served")
