"""The agent as a process: it answers, is updated, judges, rolls back, and comes back from the dead."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from protocol import topics
from protocol.link import Broker, Link, Message
from tests.integration.world import DEVICE, MODELS, SLOT, World, release_of
from trainer_host.repository import identity_of

ECHO = (MODELS / "echo.tflite").read_bytes()
TWIN = (MODELS / "twin.tflite").read_bytes()
SLOW = (MODELS / "slow.tflite").read_bytes()
NARROW = (MODELS / "narrow.tflite").read_bytes()

QUICK = "trial_duty = 0.5\nwatch_interval_s = 0.1\ndeadline_ms = 2000\n"


def observation(step: int, **fields: Any) -> dict[str, Any]:
    return {"battle": "b1", "step": step, "features": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], **fields}


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(slot_settings: str = QUICK, **options: Any) -> World:
        worlds.append(World(tmp_path, slot_settings, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """An agent that serves version 0."""
    world = make_world()
    world.start_agent()
    world.publish(ECHO, 0)
    world.wait(lambda: world.is_serving(0) and len(world.children("worker")) == 1, "version 0 is served by one worker")
    return world


def test_without_a_model_every_state_is_answered_with_no_model_and_readiness_says_so(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.start_agent()
    world.wait(lambda: world.status is not None and world.availability == b"online", "the agent reports")
    answered: list[str] = []

    def asks() -> bool:
        try:
            answer = world.ask(observation(1))
        except AssertionError:
            return False
        answered.append(answer.error.code if answer.error else "")
        return True

    world.wait(asks, "an answer comes")
    assert answered == ["no_model"]
    assert world.status is not None
    assert not world.status.slots[SLOT].ready


def test_faults_are_answered_counted_and_survived(world: World) -> None:
    codes = []
    for payload in (b"{", b'{"battle":"b","step":1,"features":[1]}', b'{"battle":"b","step":1,"v":9}'):
        error = world.ask(payload).error
        assert error is not None
        codes.append(error.code)
    stranger = world.ask(observation(1), topics.state(DEVICE, "nobody")).error
    assert stranger is not None
    assert (stranger.code, stranger.field) == ("unknown_slot", "slot")
    assert codes == ["malformed", "wrong_length", "unknown_version"]
    assert world.ask(observation(2)).action == 3
    expected = {"malformed": 1, "wrong_length": 1, "unknown_version": 1, "unknown_slot": 1}
    world.wait(
        lambda: world.telemetry and world.telemetry[-1].slots[SLOT].errors == expected, "telemetry has counted them"
    )


def test_a_request_is_answered_on_its_response_topic_with_its_correlation_data(world: World) -> None:
    answers: list[Message] = []
    link = Link(Broker(port=world.broker.port), "asker", on_message=answers.append)
    link.subscribe(("answers/for/me", 0))
    while not link.connected:
        link.turn(0.1)
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ResponseTopic = "answers/for/me"
    properties.CorrelationData = b"\x01\x02"
    world.wait(lambda: not link.turn(0.05), "the subscription is sent")
    link._client.publish(
        topics.state(DEVICE, SLOT), b'{"battle":"b","step":1,"features":[1,2,3,4,5,6]}', properties=properties
    )
    world.wait(lambda: link.turn(0.05) or answers, "the answer comes")
    assert answers[0].correlation == b"\x01\x02"
    link.close()


def test_two_slots_have_workers_of_their_own_and_one_front_desk(make_world: Callable[..., World]) -> None:
    world = make_world(slots=("combat", "movement"))
    world.start_agent()
    world.publish(ECHO, 0, "combat")
    world.publish(NARROW, 0, "movement")
    world.wait(lambda: world.is_serving(0) and world.is_serving(0, "movement"), "both serve")
    assert world.ask(observation(1)).action == 3
    moved = world.ask({"battle": "m", "step": 1, "features": [0, 5, 1]}, topics.state(DEVICE, "movement"))
    assert moved.action == 1
    assert len(world.decisions) == 2
    stranger = world.ask(observation(1), topics.state(DEVICE, "nobody"))
    assert stranger.error is not None
    assert len(world.decisions) == 3


def test_a_good_model_is_tried_committed_and_served(world: World) -> None:
    world.publish(TWIN, 1)
    world.wait(lambda: world.is_serving(1), "version 1 is served")
    committed = world.event("committed", after=2)
    assert committed.version == 1
    assert committed.verdict is not None
    assert committed.verdict.outcome == "commit"
    assert committed.verdict.pairs >= 3000
    world.wait(lambda: world.ask(observation(1)).version == 1, "the old worker has left")
    assert [event.kind for event in world.events if event.version == 1][:3] == ["staged", "trial", "committed"]


def test_a_slower_model_is_refused_with_evidence_and_never_tried_again(world: World) -> None:
    world.publish(SLOW, 1)
    refused = world.event("refused")
    assert (refused.version, refused.reason) == (1, "slower")
    assert refused.verdict is not None
    assert refused.verdict.evidence >= 1000
    assert refused.verdict.ratio_median > 1.5
    assert refused.verdict.new_us_p50 > refused.verdict.old_us_p50
    seen = len(world.events)
    world.publish_metadata(world.repository.metadata_set())
    assert world.ask(observation(1)).version == 0
    world.publish(TWIN, 2)
    world.wait(lambda: world.is_serving(2), "the next version is served")
    assert not any(event.version == 1 for event in world.events[seen:])


def test_a_model_of_another_shape_is_refused_by_name_of_the_reason(world: World) -> None:
    release = msgspec.structs.replace(release_of(ECHO, 1), **identity_of(NARROW))
    world.repository.release(release, NARROW, datetime.now(UTC))
    world.publish_metadata(world.repository.metadata_set())
    refused = world.event("refused")
    assert (refused.version, refused.reason) == (1, "wrong_signature")
    assert world.ask(observation(1)).version == 0


def test_a_mangled_model_takes_down_a_stager_at_most(world: World) -> None:
    """tflite-runtime reads beyond the end of a truncated model, and crashes; its successor refuses it."""
    mangled = ECHO[:200]
    release = msgspec.structs.replace(release_of(ECHO, 1), **identity_of(mangled))
    world.repository.release(release, mangled, datetime.now(UTC))
    world.publish_metadata(world.repository.metadata_set())
    refused = world.event("refused")
    assert (refused.version, refused.reason) in {(1, "bad_model"), (1, "died_twice")}
    assert world.ask(observation(1)).version == 0


def test_forged_and_old_metadata_is_refused_by_name_of_the_reason(world: World) -> None:
    old = world.repository.metadata_set()
    world.publish(TWIN, 1)
    world.wait(lambda: world.is_serving(1), "version 1 is served")
    world.publish_metadata(old)
    assert world.event("metadata_refused").reason == "rolled_back"
    seen = len(world.events)
    world.publish_metadata(b"\x00nonsense")
    assert world.event("metadata_refused", after=seen).reason == "malformed"
    world.wait(lambda: world.ask(observation(1)).version == 1, "version 1 answers")


@pytest.mark.parametrize("qos", [0, 1])
def test_a_swap_under_load_loses_nothing_and_answers_nothing_twice(world: World, qos: int) -> None:
    asked: set[int] = set()
    answered: list[tuple[int, int | None]] = []

    def heard(message: Message) -> None:
        answer = msgspec.json.decode(message.payload)
        answered.append((answer["id"], answer.get("version")))

    game = Link(Broker(port=world.broker.port), "load", on_message=heard)
    game.subscribe((topics.action(DEVICE, SLOT), qos))
    while not game.connected:
        game.turn(0.1)

    def play() -> None:
        """Keep 32 states in flight."""
        while len(asked) - len(answered) < 32:
            number = len(asked)
            asked.add(number)
            game.publish(topics.state(DEVICE, SLOT), msgspec.json.encode(observation(number, id=number)), qos=qos)
        game.turn(0.0)

    def playing(until: Callable[[], object], described: str) -> None:
        def turn() -> object:
            play()
            return until()

        world.wait(turn, described)

    playing(lambda: len(answered) > 200, "the game runs")
    world.publish(TWIN, 1)
    playing(lambda: world.is_serving(1), "version 1 is served")
    count = len(answered)
    playing(lambda: len(answered) > count + 500, "the game goes on")
    world.wait(lambda: game.turn(0.0) or len(answered) >= len(asked), "everything is answered")
    world.wait(lambda: game.turn(0.0) or len(world.children("worker")) == 1, "the old worker has left")
    game.close()
    numbers = [number for number, _ in answered]
    assert sorted(numbers) == sorted(asked)
    assert {version for _, version in answered} == {0, 1}


def test_a_worker_killed_with_9_is_replaced(world: World) -> None:
    (worker,) = world.children("worker")
    os.kill(worker, signal.SIGKILL)
    world.wait(lambda: _answers(world), "it answers again")  # how soon is in the benchmark
    assert world.event("worker_died").text.endswith("killed by SIGKILL")
    assert world.children("worker") != [worker]


def _answers(world: World) -> bool:
    before = len(world.decisions)
    world.link.publish(topics.state(DEVICE, SLOT), b'{"battle":"b","step":1,"features":[1,2,3,4,5,6]}')
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline and len(world.decisions) == before:
        world.turn(0.02)
    return len(world.decisions) > before


def test_the_daemon_killed_with_9_serves_again_without_host_or_metadata(world: World) -> None:
    assert world.agent is not None
    world.agent.kill()
    world.agent.wait()
    world.wait(lambda: world.availability == b"offline", "the broker publishes the will")
    world.status = None
    world.start_agent()
    world.wait(lambda: world.is_serving(0), "it serves again")
    assert world.ask(observation(1)).version == 0


def test_transitions_survive_a_host_that_does_not_acknowledge_and_a_daemon_that_dies(world: World) -> None:
    world.acknowledging = False
    for step in range(5):
        world.ask(observation(step, reward=float(step)))
    world.ask(observation(5, done=True, reward=1.0))
    world.wait(lambda: world.telemetry[-1].outbox_rows == 5, "they are on disk")
    assert world.agent is not None
    world.agent.kill()
    world.agent.wait()
    world.acknowledging = True
    world.start_agent()
    world.wait(lambda: len(world.transitions) == 5, "they arrive")
    rows = sorted(world.transitions.values(), key=lambda transition: transition.step)
    assert [row.step for row in rows] == [0, 1, 2, 3, 4]
    assert [row.reward for row in rows] == [1.0, 2.0, 3.0, 4.0, 1.0]
    assert [row.done for row in rows] == [False] * 4 + [True]
    before = len(world.telemetry)
    world.wait(lambda: len(world.telemetry) > before and world.telemetry[-1].outbox_rows == 0, "the outbox is empty")


def test_a_clean_stop_ends_with_0_and_leaves_nothing_behind(world: World) -> None:
    workers = world.children("worker")
    world.ask(observation(1))
    world.ask(observation(2))
    assert world.stop_agent() == 0
    world.wait(lambda: world.availability == b"offline", "it says goodbye")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
