"""A swap at the battle's end, under a game's traffic: no battle sees two versions, whoever dies."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol import topics
from protocol.link import Broker, Link, Message
from tests.integration.world import DEVICE, MODELS, SLOT, World

ECHO = (MODELS / "echo.tflite").read_bytes()
TWIN = (MODELS / "twin.tflite").read_bytes()

BATTLE_END = 'swap = "battle-end"\ntrial_duty = 0.5\nwatch_interval_s = 0.1\ndeadline_ms = 5000\n'
ACTORS = ("hero", "ally")
AGAIN_S = 1.0


class Game:
    """Many battles at a time, each of several actors, who act in turn and wait for their answers.

    Args:
        world: Whose agent answers.
        qos: Of states and answers.
        battles: How many at a time.
        asks_again: Whether a state that is not answered is sent again after a second, since somebody is to die.
    """

    def __init__(self, world: World, qos: int, battles: int = 40, *, asks_again: bool = False) -> None:
        self.world = world
        self.qos = qos
        self.rng = random.Random(7)
        self.versions: dict[str, list[int]] = {}
        self.asked: dict[int, tuple[str, str, int, bool]] = {}
        self.answered: dict[int, int] = {}
        self.open: dict[str, int] = {}
        self.resting: set[str] = set()
        self.waiting: dict[str, tuple[int, float]] = {}
        self.asks_again = asks_again
        self.wanted = battles
        self.lengths = (4, 60)
        self.link = Link(Broker(port=world.broker.port), "game", on_message=self._heard)
        self.link.subscribe((topics.action(DEVICE, SLOT), qos))
        world.wait(lambda: self.link.turn(0.0) or self.link.connected, "the game is connected")

    def play(self, until: Callable[[], object], described: str) -> None:
        """Play on until something is so."""

        def turn() -> object:
            self._turn()
            return until()

        self.world.wait(turn, described)

    def finish(self) -> None:
        """Let every battle come to its end."""
        self.wanted = 0
        self.play(lambda: not self.open, "all battles have ended")

    def unanswered(self) -> list[int]:
        """States without exactly one answer."""
        return [number for number in self.asked if self.answered.get(number, 0) != 1]

    def mixed(self) -> dict[str, list[int]]:
        """Battles that have seen more than one version."""
        return {battle: versions for battle, versions in self.versions.items() if len(set(versions)) > 1}

    def begin(self, battle: str, length: int) -> None:
        """Begin a battle."""
        self.versions[battle] = []
        self.open[battle] = length

    def began_with(self, version: int) -> bool:
        """Whether a battle has got this version from its first answer on."""
        return any(versions[:1] == [version] for versions in self.versions.values())

    def _turn(self) -> None:
        while len(self.open) < self.wanted:
            self.begin(f"battle-{len(self.versions)}", self.rng.randint(*self.lengths))
        for battle in self.open:
            if battle in self.waiting:
                number, at = self.waiting[battle]
                if self.asks_again and time.monotonic() - at > AGAIN_S:
                    self._publish(number)
            elif battle not in self.resting:
                self._act(battle)
        self.link.turn(0.0)

    def _act(self, battle: str) -> None:
        """One actor after the other; each says `done` in the end."""
        left = self.open[battle]
        number = len(self.asked)
        self.asked[number] = (battle, ACTORS[left % len(ACTORS)], number, left <= len(ACTORS))
        self._publish(number)

    def _publish(self, number: int) -> None:
        battle, actor, step, done = self.asked[number]
        self.waiting[battle] = (number, time.monotonic())
        state: dict[str, Any] = {"battle": battle, "actor": actor, "step": step, "id": number, "done": done}
        state["features"] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        self.link.publish(topics.state(DEVICE, SLOT), msgspec.json.encode(state), qos=self.qos)

    def _heard(self, message: Message) -> None:
        answer = msgspec.json.decode(message.payload)
        number = answer["id"]
        self.answered[number] = self.answered.get(number, 0) + 1
        assert "error" not in answer, answer
        battle = self.asked[number][0]
        self.versions[battle].append(answer["version"])
        if self.answered[number] == 1:
            del self.waiting[battle]
            self.open[battle] -= 1
            if not self.open[battle]:
                del self.open[battle]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """An agent that serves version 0 and swaps at the battle's end."""
    world = World(tmp_path, BATTLE_END)
    try:
        world.start_agent()
        world.publish(ECHO, 0)
        world.wait(lambda: world.is_serving(0) and len(world.children("worker")) == 1, "version 0 is served by one")
        yield world
    finally:
        world.close()


@pytest.mark.parametrize("qos", [0, 1])
def test_each_battle_keeps_its_model_and_loses_no_answer(world: World, qos: int) -> None:
    game = Game(world, qos)
    game.play(lambda: len(game.answered) > 500, "the game runs")
    world.publish(TWIN, 1)
    game.play(
        lambda: any(event.kind == "committed" and event.version == 1 for event in world.events), "it is committed"
    )
    before = set(game.open)
    game.resting = {battle for battle in before if game.versions[battle] and game.open[battle] > 1}
    game.wanted += len(game.resting)
    game.lengths = (4, 10)
    game.play(lambda: world.is_serving(1), "the worker of version 1 has joined")
    game.play(lambda: len(world.children("worker")) == 1, "the old worker has left")
    game.play(lambda: game.began_with(1), "the new model answers")
    assert game.resting <= set(game.open), "of these the new worker has heard nothing"
    game.resting.clear()
    later = set(game.versions)
    game.play(lambda: not later & set(game.open), "all older battles have ended")
    game.finish()
    assert game.unanswered() == []
    assert game.mixed() == {}
    assert {game.versions[battle][0] for battle in before} == {0}
    assert game.versions[f"battle-{len(game.versions) - 1}"][0] == 1


def test_a_second_swap_comes_when_the_first_is_through(world: World) -> None:
    game = Game(world, 1, battles=10)
    game.play(lambda: len(game.answered) > 100, "the game runs")
    game.begin("long", 10**9)
    game.lengths = (4, 10)
    world.publish(TWIN, 1)
    game.play(lambda: game.began_with(1), "a battle gets version 1")
    world.publish(ECHO + b"\0", 2)
    game.play(lambda: any(e.kind == "committed" and e.version == 2 for e in world.events), "version 2 is committed")
    game.play(lambda: len(game.versions["long"]) > 1000, "the long battle goes on")
    assert not world.is_serving(2)
    assert set(game.versions["long"]) == {0}
    game.open["long"] = len(ACTORS)
    game.play(lambda: world.is_serving(2), "version 2 is served")
    game.play(lambda: game.began_with(2), "a battle gets version 2")
    game.finish()
    assert game.unanswered() == []
    assert game.mixed() == {}


def test_the_old_worker_killed_with_9_leaves_its_battles_to_the_new_one(world: World) -> None:
    game = Game(world, 1, battles=20, asks_again=True)
    game.play(lambda: len(game.answered) > 200, "the game runs")
    (old,) = world.children("worker")
    world.publish(TWIN, 1)
    game.play(lambda: len(world.children("worker")) == 2, "the new worker is loading")
    game.wanted = 0  # no battle begins in the last moments of the old worker, of which the supervisor may not hear
    answered = len(game.answered)
    game.play(lambda: len(game.answered) > answered + 20 or not game.open, "they go on")
    os.kill(old, signal.SIGKILL)
    game.play(lambda: world.is_serving(1), "the new worker serves")
    game.play(lambda: not game.open, "the old battles end")
    assert game.mixed() == {}
    game.wanted = 5
    game.play(lambda: game.began_with(1), "a battle gets version 1")
    game.finish()
    assert game.mixed() == {}


def test_the_new_worker_killed_with_9_is_replaced_and_the_slot_is_served(world: World) -> None:
    game = Game(world, 1, battles=20, asks_again=True)
    game.lengths = (10**9, 10**9)
    game.play(lambda: len(game.answered) > 200, "the game runs")
    (old,) = world.children("worker")
    world.publish(TWIN, 1)
    game.play(lambda: world.is_serving(1) and old not in world.children("worker"), "the old worker has left")
    (new,) = world.children("worker")
    os.kill(new, signal.SIGKILL)
    game.play(lambda: new not in world.children("worker") and len(world.children("worker")) == 1, "it is replaced")
    world.event("worker_died")
    game.play(lambda: world.is_serving(1), "the slot is served")
    count = len(game.answered)
    game.play(lambda: len(game.answered) > count + 200, "the game goes on")
    assert {versions[-1] for versions in game.versions.values()} == {1}
