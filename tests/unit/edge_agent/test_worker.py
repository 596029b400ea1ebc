"""A worker in a thread of the test, with a real broker and a channel whose other end is held by the test."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent import worker as module
from edge_agent.channel import Channel
from edge_agent.children import (
    Beat,
    Begin,
    Child,
    Disconnected,
    FromWorker,
    Join,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    OldBattles,
    Records,
    ToWorker,
    WorkerAssignment,
    start,
)
from edge_agent.model_store import ModelStore
from edge_agent.open_battles import Mark
from edge_agent.worker import Worker, load, load_gently
from protocol import topics
from protocol.errors import Rejected, Unavailable
from protocol.features import FeatureSpec
from protocol.link import Broker, Link, Message
from trainer_host.private_broker import PrivateBroker

MODELS = Path(__file__).parents[2] / "models"
LIMIT_S = 20.0
STATE = topics.state("pi7", "combat")
ACTION = topics.action("pi7", "combat")


def assignment(folder: Path, port: int = 1, name: str | None = "echo", **fields: Any) -> WorkerAssignment:
    model = None if name is None else model_file(folder, name, 3)
    return msgspec.structs.replace(
        WorkerAssignment(
            device="pi7",
            slot="combat",
            slots=["combat", "movement"],
            front_desk=True,
            broker=Broker(port=port),
            model=model,
            threads=1,
            deadline_ms=50.0,
        ),
        **fields,
    )


def model_file(folder: Path, name: str, version: int) -> ModelFile:
    digest = ModelStore(folder).put((MODELS / f"{name}.tflite").read_bytes())
    return ModelFile(digest=digest, version=version, folder=str(folder), features=FeatureSpec())


def observation(number: int, **fields: Any) -> bytes:
    asked = {"battle": "b", "step": number, "id": number, "features": [0, 1, 2, 3, 4, 5]}
    return msgspec.json.encode({**asked, **fields})


class Scene:
    """One worker, the game, and the supervisor."""

    def __init__(self, folder: Path, broker: PrivateBroker, **fields: Any) -> None:
        self.broker = broker
        self.answers: list[Message] = []
        self.told: list[Any] = []
        self.game = Link(Broker(port=broker.port), "game", on_message=self.answers.append)
        granted: list[int] = []
        self.game._on_subscribed = granted.append
        self.game.subscribe(("battle/v1/+/+/action", 1), ("answers/#", 1))
        ours, theirs = socket.socketpair()
        self.channel: Channel[FromWorker] = Channel(ours, FromWorker)
        task = assignment(folder, broker.port, **fields)
        self.worker = Worker(task, load(task).responder, Channel(theirs, ToWorker))
        self.thread = threading.Thread(target=self.worker.run)
        self.thread.start()
        self.until(lambda: granted)

    def joined(self) -> Scene:
        self.channel.send(Join())
        self.until(lambda: Joined() in self.told)
        return self

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not what():
            assert time.monotonic() < deadline, (self.told[-5:], self.answers[-5:])
            self.game.turn(0.01)
            if not self.channel.closed:
                self.told += self.channel.receive()

    def publish(self, payload: bytes, topic: str = STATE, qos: int = 0) -> None:
        self.game.publish(topic, payload, qos=qos)

    def ask(self, payload: bytes, topic: str = STATE, qos: int = 0) -> tuple[Message, Any]:
        count = len(self.answers)
        self.publish(payload, topic, qos)
        self.until(lambda: len(self.answers) > count)
        return self.answers[-1], msgspec.json.decode(self.answers[-1].payload)

    def total(self, what: str) -> int:
        beats = [message for message in self.told if isinstance(message, Beat)]
        return sum(beat.answered if what == "answered" else beat.errors.get(what, 0) for beat in beats)

    def records(self) -> list[int]:
        return [one.step for message in self.told if isinstance(message, Records) for one in message.served]

    def close(self) -> None:
        self.channel.close()
        self.thread.join(LIMIT_S)
        self.game.close()
        assert not self.thread.is_alive()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []
    with PrivateBroker(tmp_path / "broker") as broker:

        def make(**fields: Any) -> Scene:
            scenes.append(Scene(tmp_path, broker, **fields))
            return scenes[-1]

        yield make
        for scene in scenes:
            scene.close()


@pytest.fixture
def scene(make: Callable[..., Scene]) -> Scene:
    return make().joined()


@pytest.mark.parametrize("qos", [0, 1])
def test_an_answer_has_the_quality_of_service_of_its_question_and_is_recorded(scene: Scene, qos: int) -> None:
    message, answer = scene.ask(observation(5), qos=qos)
    assert (message.topic, message.qos) == (ACTION, qos)
    assert (answer["action"], answer["id"], answer["version"]) == (3, 5, 3)
    scene.until(lambda: scene.records() == [5])
    scene.until(lambda: scene.total("answered") == 1)


def test_before_it_has_joined_it_answers_nothing(make: Callable[..., Scene]) -> None:
    scene = make()
    scene.publish(observation(1), qos=1)
    scene.joined()
    _, answer = scene.ask(observation(2), qos=1)
    assert answer["id"] == 2
    assert len(scene.answers) == 1


def test_a_slot_that_does_not_exist_is_refused_and_one_that_does_is_left_to_its_worker(scene: Scene) -> None:
    scene.publish(observation(1), topics.state("pi7", "movement"), qos=1)
    message, answer = scene.ask(observation(2), topics.state("pi7", "nobody"), qos=1)
    assert message.topic == topics.action("pi7", "nobody")
    assert answer["error"]["code"] == "unknown_slot"
    assert "combat, movement" in answer["error"]["text"]
    assert len(scene.answers) == 1


def test_the_front_desk_has_nothing_to_say_to_other_slots_however_many_states_they_get(
    make: Callable[..., Scene],
) -> None:
    scene = make(slots=["combat", "movement"], deadline_ms=1.0).joined()
    for number in range(300):
        scene.game.publish("battle/v1/pi7/movement/state", observation(number))
    scene.game.publish("battle/v1/pi7/combat/state", observation(300))
    scene.until(lambda: scene.answers)
    assert [message.topic for message in scene.answers] == ["battle/v1/pi7/combat/action"]
    assert msgspec.json.decode(scene.answers[0].payload)["id"] == 300


def test_without_the_front_desk_it_hears_its_own_slot_only(make: Callable[..., Scene]) -> None:
    scene = make(front_desk=False).joined()
    scene.publish(observation(1), topics.state("pi7", "nobody"), qos=1)
    assert scene.ask(observation(2))[1]["id"] == 2
    assert len(scene.answers) == 1


@pytest.mark.parametrize(
    ("wanted", "used"),
    [
        ("answers/here", "answers/here"),
        ("answers/+", ACTION),
        ("answers/#", ACTION),
        ("fleet/v1/pi7/availability", ACTION),
        ("$SYS/x", ACTION),
    ],
)
def test_a_response_topic_is_used_where_a_device_may_publish_and_harms_nobody_else(
    make: Callable[..., Scene], wanted: str, used: str
) -> None:
    scene = make().joined()
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ResponseTopic = wanted
    properties.CorrelationData = b"\x07"
    scene.game._client.publish(STATE, observation(1), properties=properties)
    scene.publish(observation(2))
    scene.until(lambda: len(scene.answers) == 2)
    assert [message.topic for message in scene.answers] == [used, ACTION]
    assert scene.answers[0].correlation == b"\x07"


def test_under_a_flood_the_oldest_are_refused_the_newest_answered_and_each_exactly_once(
    make: Callable[..., Scene],
) -> None:
    scene = make(name="slow", deadline_ms=5.0).joined()
    count = 3000
    for number in range(count):
        scene.publish(observation(number))
    scene.until(lambda: len(scene.answers) >= count)
    answers = [msgspec.json.decode(message.payload) for message in scene.answers]
    assert Counter(answer["id"] for answer in answers) == Counter(range(count))
    refused = {answer["id"] for answer in answers if "error" in answer}
    assert {answer["error"]["code"] for answer in answers if "error" in answer} == {"overloaded"}
    assert 0 < len(refused) < count
    assert count - 1 not in refused
    scene.until(lambda: scene.total("answered") + scene.total("overloaded") == count)
    assert scene.total("overloaded") == len(refused)
    scene.until(lambda: len(scene.records()) == count - len(refused))


def test_what_waits_is_bounded_however_slow_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 40)
    task = assignment(tmp_path)
    _, theirs = socket.socketpair()
    worker = Worker(task, load(task).responder, Channel(theirs, ToWorker))
    for number in range(100):
        worker._arrived(Message(STATE, observation(number), 0, False, None, None, 0))
    worker._answer_burst()
    assert len(worker._waiting) == 40
    worker._answer_burst()
    assert len(worker._waiting) == 40 - module.BURST


@pytest.mark.parametrize("reason", ["told", "alone"])
def test_leaving_answers_what_is_here_and_reports_all_of_it(make: Callable[..., Scene], reason: str) -> None:
    scene = make(deadline_ms=10_000.0).joined()
    for number in range(300):
        scene.publish(observation(number), qos=1)
    scene.until(lambda: not scene.game._client.want_write())
    scene.until(lambda: len(scene.answers) > 0)
    if reason == "told":
        scene.channel.send(Leave())
        scene.until(lambda: not scene.thread.is_alive())
        scene.told += scene.channel.receive()
        scene.until(lambda: len(scene.answers) == scene.total("answered"))
        assert scene.total("answered") == len(scene.answers)
        assert sorted(scene.records()) == sorted(msgspec.json.decode(m.payload)["id"] for m in scene.answers)
    else:
        scene.channel.close()
        scene.until(lambda: not scene.thread.is_alive())
    answered = [msgspec.json.decode(message.payload)["id"] for message in scene.answers]
    assert len(answered) == len(set(answered))
    assert answered == list(range(len(answered)))


def test_leaving_without_a_broker_ends_too(make: Callable[..., Scene]) -> None:
    scene = make()
    scene.broker.stop()
    scene.channel.send(Leave())
    scene.thread.join(LIMIT_S)
    assert not scene.thread.is_alive()


def test_a_lost_broker_is_told_and_so_is_its_return(scene: Scene) -> None:
    scene.broker.stop()
    scene.until(lambda: Disconnected() in scene.told)
    scene.told.clear()
    scene.broker.start()
    scene.until(lambda: Joined() in scene.told)
    scene.until(lambda: scene.game.connected)
    assert scene.ask(observation(1))[1]["action"] == 3


def test_large_records_are_reported_in_messages_that_fit(tmp_path: Path) -> None:
    task = assignment(tmp_path)
    ours, theirs = socket.socketpair()
    heard: Channel[FromWorker] = Channel(ours, FromWorker)
    worker = Worker(task, load(task).responder, Channel(theirs, ToWorker))
    _, _, (record,) = worker._responder.answer(observation(1), 0.0)
    many = [msgspec.structs.replace(record, step=step, features=bytes(250_000)) for step in range(25)]
    worker._keep(many)
    worker._report()
    steps: list[int] = []
    sizes: list[int] = []
    deadline = time.monotonic() + LIMIT_S
    while len(steps) < 25 and time.monotonic() < deadline:
        select.select([heard], [], [], 0.05)
        for message in heard.receive():
            assert isinstance(message, Records)
            sizes.append(len(msgspec.msgpack.encode(message)))
            steps += [one.step for one in message.served]
        worker._report()
    assert steps == list(range(25))
    assert max(sizes) <= module.MAX_REPORT_BYTES


def test_records_that_find_no_room_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_RECORDS", 2)
    task = assignment(tmp_path)
    ours, theirs = socket.socketpair()
    heard: Channel[FromWorker] = Channel(ours, FromWorker)
    worker = Worker(task, load(task).responder, Channel(theirs, ToWorker))
    for number in range(5):
        worker._keep(worker._responder.answer(observation(number), 0.0)[2])
    worker._report()
    (message,) = heard.receive()
    assert isinstance(message, Records)
    assert ([one.step for one in message.served], message.lost) == ([0, 1], 3)


def test_loading_says_what_it_took_and_without_a_model_answers_no_model(tmp_path: Path) -> None:
    loaded = load_gently(assignment(tmp_path))
    assert loaded.load_ms > 0
    assert len(loaded.runtime.split()) == 2
    assert loaded.responder.answer(observation(1), 0.0)[1][0].action == 3
    loaded = load_gently(assignment(tmp_path, name=None))
    error = loaded.responder.answer(observation(1), 0.0)[1][0].error
    assert error is not None
    assert error.code == "no_model"


def test_loading_what_is_rotten_or_missing_says_so(tmp_path: Path) -> None:
    task = assignment(tmp_path)
    assert task.model is not None
    path = ModelStore(tmp_path).path(task.model.digest)
    path.write_bytes(b"rotten")
    with pytest.raises(Rejected) as caught:
        load_gently(task)
    assert caught.value.code == "corrupt_model"
    with pytest.raises(Unavailable):
        load_gently(task)


def test_at_the_battles_end_the_old_model_answers_first_then_its_own_battles_and_then_is_gone(
    make: Callable[..., Scene], tmp_path: Path
) -> None:
    scene = make(finishing=model_file(tmp_path, "twin", 2)).joined()

    def version(battle: str, **fields: Any) -> int:
        said: int = scene.ask(observation(1, battle=battle, **fields), qos=1)[1]["version"]
        return said

    assert version("mine") == 2
    scene.channel.send(OldBattles([Mark("theirs", "", 1, False, time.monotonic())]))
    scene.channel.send(Begin())
    scene.until(lambda: version("just begun") == 3)
    assert (version("mine"), version("theirs")) == (2, 2)
    scene.until(lambda: any(isinstance(message, Beat) for message in scene.told))
    assert all(message.finishing for message in scene.told if isinstance(message, Beat))
    assert (version("mine", step=2, done=True), version("theirs", step=2, done=True)) == (2, 2)
    scene.until(lambda: any(isinstance(message, Beat) and not message.finishing for message in scene.told))
    assert version("mine", step=3) == 3


def test_a_battle_that_nobody_was_answered_in_keeps_no_model(tmp_path: Path) -> None:
    """Without a connection nothing is published, so no game has seen the old model there."""
    task = assignment(tmp_path, finishing=model_file(tmp_path, "twin", 2))
    _, theirs = socket.socketpair()
    worker = Worker(task, load(task).responder, Channel(theirs, ToWorker))
    worker._arrived(Message(STATE, observation(1), 0, False, None, None, 0))
    worker._answer_burst()
    worker._responder.begin()
    assert worker._responder.finish(time.monotonic())


def test_an_old_model_that_cannot_be_loaded_is_told_and_done_without(tmp_path: Path) -> None:
    old = model_file(tmp_path, "twin", 2)
    ModelStore(tmp_path).path(old.digest).write_bytes(b"rotten")
    child = start("worker", assignment(tmp_path, finishing=old), FromWorker, "worker")
    assert "digest" in process_says(child, Loaded).failure
    assert not process_says(child, Beat).finishing
    child.channel.close()
    assert child.process.wait(LIMIT_S) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="priorities belong to threads on Linux only")
def test_loading_leaves_the_priority_of_the_thread_that_answers_alone(tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    load_gently(assignment(tmp_path))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def process_says(child: Child[Any], kind: type) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not child.channel.closed and time.monotonic() < deadline:
        select.select([child.channel], [], [], 0.1)
        for message in child.channel.receive():
            if isinstance(message, kind):
                return message
    raise AssertionError(f"it never said {kind.__name__}")


def test_as_a_process_it_loads_says_so_and_ends_when_its_supervisor_has_gone(tmp_path: Path) -> None:
    child = start("worker", assignment(tmp_path), FromWorker, "worker")
    assert process_says(child, Loaded).load_ms > 0
    child.channel.close()
    assert child.process.wait(LIMIT_S) == 0


def test_as_a_process_it_tells_why_it_cannot_load(tmp_path: Path) -> None:
    task = assignment(tmp_path)
    assert task.model is not None
    ModelStore(tmp_path).path(task.model.digest).write_bytes(b"rotten")
    child = start("worker", task, FromWorker, "worker")
    assert process_says(child, LoadFailed).reason == "corrupt_model"
    assert child.process.wait(LIMIT_S) == 1
    child.kill()
