from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from protocol import codec, topics
from protocol.errors import Unavailable
from protocol.link import Broker, Link, Message
from protocol.messages import Ack, ChunkRequest, MetadataSet, Telemetry, Transition, TransitionBatch
from trainer_host.__main__ import app
from trainer_host.daemon import Host
from trainer_host.private_broker import PrivateBroker
from trainer_host.settings import load
from trainer_host.wiring import Parts, assemble

DEADLINE_S = 20.0
DEVICE = "pi-1"


class Running:
    """A host in a thread of this process, and a device beside it."""

    def __init__(self, config: Path, broker: PrivateBroker) -> None:
        self._config = config
        self.acks: list[Ack] = []
        self.metadata: list[bytes] = []
        self.chunks: list[Message] = []
        self.link = Link(Broker(host=broker.host, port=broker.port), DEVICE, on_message=self._heard)
        self.link.subscribe((topics.fleet(DEVICE, "ack"), 1), (topics.METADATA, 1), (topics.chunk("+"), 1))
        self.start()

    def start(self) -> None:
        self._told, stop = Event(), Event()
        self.parts: Parts = assemble(load(self._config), stop)
        host = Host(self.parts, stop)
        self._thread = Thread(target=host.run, args=(self._told.is_set,))
        self._thread.start()

    def stop(self) -> None:
        self._told.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self._thread.is_alive(), "the host has ended"
            assert time.monotonic() < deadline, "the condition did not come about"
            self.link.turn(0.02)

    def say(self, what: str, payload: bytes, *, retain: bool = False) -> None:
        self.link.publish(topics.fleet(DEVICE, what), payload, qos=1, retain=retain)

    def _heard(self, message: Message) -> None:
        if message.topic == topics.METADATA:
            self.metadata.append(message.payload)
        elif message.topic.endswith("/ack"):
            self.acks.append(codec.Decoder(Ack).decode(message.payload))
        else:
            self.chunks.append(message)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def running(tmp_path: Path, broker: PrivateBroker) -> Iterator[Running]:
    config = tmp_path / "host.toml"
    config.write_text(f'state_dir = "host"\n[broker]\nport = {broker.port}\n[auto_publish]\nenabled = false\n')
    assert app(["keys", "init", "--config", str(config)], result_action="return_value") == 0
    host = Running(config, broker)
    try:
        host.until(lambda: host.link.connected and host.metadata)
        yield host
    finally:
        host.stop()
        host.link.close()


def batch(first: int, last: int) -> bytes:
    made = [
        Transition(
            seq=seq, slot="combat", battle="b", actor="a", step=seq, features=bytes(8), action=1, taken=False,
            propensity=0.5, legal=b"\1\1", reward=0.0, next_features=bytes(8), done=False, truncated=False, model="m",
            version=1, at=1.0,
        )
        for seq in range(first, last + 1)
    ]  # fmt: skip
    return codec.compress(TransitionBatch(epoch="e1", acked=0, first=first, last=last, transitions=made))


def test_batches_are_committed_then_acknowledged(running: Running) -> None:
    for first, last in ((5, 8), (1, 4), (1, 4), (9, 9)):
        running.say("transitions", batch(first, last))
    running.until(lambda: running.acks and running.acks[-1].seq == 9)
    assert {ack.epoch for ack in running.acks} == {"e1"}
    assert running.parts.store.total("combat").transitions == 9


def test_a_host_that_comes_back_goes_on(running: Running) -> None:
    running.say("transitions", batch(1, 4))
    running.until(lambda: running.acks)
    running.stop()
    before = running.parts.repository.metadata_set()
    running.start()
    running.until(lambda: running.metadata[-1] == running.parts.repository.metadata_set() != before)
    running.acks.clear()
    running.say("transitions", batch(5, 6))
    running.until(lambda: running.acks)
    assert running.acks[-1].seq == 6
    assert running.parts.store.total("combat").transitions == 6


def test_nonsense_stops_nobody(running: Running) -> None:
    for what in ("transitions", "telemetry", "status", "events", "availability"):
        running.say(what, b"\xc1nonsense")
    running.link.publish(topics.CHUNK_REQUESTS, b"nonsense", qos=1)
    running.link.publish(topics.CHUNK_REQUESTS, codec.encode(ChunkRequest(device=DEVICE, model="x"), as_json=True))
    running.say("transitions", batch(1, 2))
    running.until(lambda: running.acks)
    assert running.acks[-1].seq == 2
    assert running.parts.store.quarantined() == {"malformed": 1}


def test_devices_are_known_by_what_they_say(running: Running) -> None:
    running.say("availability", b"online", retain=True)
    telemetry = Telemetry(at=1.0, uptime_s=2.0, temperatures_c={"cpu": 61.0})
    running.say("telemetry", codec.encode(telemetry, as_json=True))
    running.until(lambda: [device for device in running.parts.store.devices() if device.telemetry and device.online])
    (device,) = running.parts.store.devices()
    assert device.device == DEVICE
    assert device.telemetry == telemetry


def test_a_foreign_metadata_set_is_replaced_by_ours(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_host.metadata_topic.REPAIR_S", 0.2)
    running.until(lambda: running.metadata[-1] == running.parts.repository.metadata_set())
    foreign = codec.encode(MetadataSet(roots=[b"r"], timestamp=b"t", snapshot=b"s", targets=b"x"), as_json=False)
    running.link.publish(topics.METADATA, foreign, qos=1, retain=True)
    running.until(lambda: foreign in running.metadata)
    running.until(lambda: running.metadata[-1] != foreign)
    assert running.metadata[-1] == running.parts.repository.metadata_set()


def test_a_database_that_fails_acknowledges_nothing(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Event()

    def fail(*_: object) -> None:
        tried.set()
        raise Unavailable("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(running.parts.store, "add_batches", fail)
        running.say("transitions", batch(1, 2))
        running.until(tried.is_set)
    running.say("transitions", batch(3, 4))
    running.say("transitions", batch(1, 2))
    running.until(lambda: running.acks and running.acks[-1].seq == 4)
    assert all(ack.seq in (0, 4) for ack in running.acks)
