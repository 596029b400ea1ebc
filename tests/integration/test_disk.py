"""The whole agent on a disk that is full, read-only or rotten: it serves, and mends itself once it can."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from tests.integration.world import MODELS, World

ECHO = (MODELS / "echo.tflite").read_bytes()
TWIN = (MODELS / "twin.tflite").read_bytes()
QUICK = "trial_duty = 1.0\nwatch_seconds = 1.0\nwatch_interval_s = 0.1\ndeadline_ms = 2000\n"
DISK_MIB = 160

own_disk = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="a disk of its own is mounted, which needs Linux and root"
)


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[[], World]]:
    worlds: list[World] = []

    def make() -> World:
        worlds.append(World(tmp_path, QUICK))
        worlds[-1].start_agent()
        worlds[-1].publish(ECHO, 0)
        worlds[-1].wait(lambda: worlds[-1].is_serving(0), "version 0 is served")
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk for the agent's state."""
    folder = tmp_path / "state"
    folder.mkdir()
    mount(folder, f"size={DISK_MIB}m")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take every byte there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def restart(world: World, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Kill -9, and start again as systemd does."""
    assert world.agent is not None
    children = psutil.Process(world.agent.pid).children()
    world.agent.kill()
    world.agent.wait()
    psutil.wait_procs(children, timeout=20)
    meanwhile()
    world.status = None
    world.start_agent()


def answers(world: World) -> bool:
    features = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    return world.ask({"battle": "b", "step": 1, "features": features}).action == 2


@own_disk
def test_a_device_starts_serves_and_is_updated_around_a_full_disk(disk: Path, make_world: Any) -> None:
    world = make_world()
    filler = fill(disk)
    restart(world)
    world.wait(lambda: world.is_serving(0), "version 0 is served from a full disk")
    assert answers(world)
    world.publish(TWIN, 1)
    assert world.event("metadata_refused").reason == "no_space"
    assert answers(world)
    filler.unlink()
    world.wait(lambda: world.is_serving(1), "version 1 is served, once there is room", 90.0)
    assert not [event for event in world.events if event.kind == "refused"]


@own_disk
def test_a_device_starts_and_serves_from_a_read_only_disk(disk: Path, make_world: Any) -> None:
    world = make_world()
    restart(world, lambda: mount(disk, "remount,ro"))
    world.wait(lambda: world.is_serving(0), "version 0 is served from a read-only disk")
    assert answers(world)
    mount(disk, "remount,rw")
    world.publish(TWIN, 1)
    world.wait(lambda: world.is_serving(1), "version 1 is served, once the disk can be written", 90.0)


def test_an_active_model_that_rots_gives_way_to_the_one_before_and_comes_back(make_world: Any) -> None:
    world = make_world()
    release = world.publish(TWIN, 1)
    world.wait(lambda: world.is_serving(1) and world.status.slots["combat"].phase == "serving", "version 1 is served")
    file = world.folder / "state" / "models" / f"{release.digest}.tflite"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    seen = len(world.events)
    restart(world)
    lost = world.event("lost", seen)
    assert (lost.version, lost.reason) == (1, "corrupt_model")
    world.wait(lambda: world.is_serving(0) or world.is_serving(1), "a model is served")
    assert answers(world)
    world.wait(lambda: world.is_serving(1), "version 1 was fetched again, tried, and is served", 60.0)
    assert file.read_bytes() == TWIN


def test_a_slots_state_that_rots_is_found_again(make_world: Any) -> None:
    world = make_world()
    for copy in (world.folder / "state" / "state").glob("slot-combat.*"):
        copy.write_bytes(os.urandom(1000))
    seen = len(world.events)
    restart(world)
    recovered = world.event("state_recovered", seen)
    assert "serves version 0 again" in recovered.text
    world.wait(lambda: world.is_serving(0), "version 0 is served")
    assert answers(world)


def test_an_audit_trail_that_rots_is_set_aside_and_begun_anew(make_world: Any) -> None:
    world = make_world()
    trail = world.folder / "state" / "trail.db"
    seen = len(world.events)

    def rot() -> None:
        trail.write_bytes(b"rotten" * 1000)
        trail.with_name("trail.db-wal").unlink()

    restart(world, rot)
    assert "trail.db.corrupt-1" in world.event("set_aside", seen).text
    world.wait(lambda: world.is_serving(0), "version 0 is served")
