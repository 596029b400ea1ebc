from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from protocol import topics
from protocol.errors import Misconfigured, Unavailable
from protocol.link import Broker, Link, Message
from trainer_host import metadata_topic as module
from trainer_host.metadata_topic import MetadataTopic, publish_once
from trainer_host.private_broker import PrivateBroker


class Source:
    payload = b"one"
    error: Exception | None = None

    def metadata_set(self) -> bytes:
        if self.error:
            raise self.error
        return self.payload


class Wire:
    """A link that remembers what is published."""

    def __init__(self) -> None:
        self.connected = True
        self.published: list[bytes] = []

    def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool) -> int:
        assert (topic, qos, retain) == (topics.METADATA, 1, True)
        self.published.append(payload)
        return 1


class Bed:
    def __init__(self) -> None:
        self.source, self.wire = Source(), Wire()
        self.topic = MetadataTopic(self.source)

    def tick(self, now: float) -> int:
        self.topic.tick(cast("Link", cast("Any", self.wire)), now)
        return len(self.wire.published)


def test_it_publishes_at_the_start_and_what_is_new() -> None:
    bed = Bed()
    assert bed.tick(0.0) == 1
    assert bed.tick(1.0) == 1
    bed.source.payload = b"two"
    assert bed.tick(2.0) == 1
    assert bed.tick(module.LOOK_S) == 2
    bed.source.payload = b"three"
    bed.topic.changed()
    assert bed.tick(module.LOOK_S + 0.1) == 3
    assert bed.wire.published == [b"one", b"two", b"three"]


def test_it_waits_for_the_broker() -> None:
    bed = Bed()
    bed.wire.connected = False
    assert bed.tick(0.0) == 0
    bed.wire.connected = True
    assert bed.tick(0.1) == 1


def test_a_foreign_set_is_replaced_but_not_in_a_frenzy() -> None:
    bed = Bed()
    bed.tick(0.0)
    bed.topic.heard(b"foreign")
    assert bed.tick(module.REPAIR_S - 0.1) == 1
    assert bed.tick(module.REPAIR_S) == 2
    assert bed.tick(3 * module.REPAIR_S) == 2
    bed.topic.heard(b"foreign")
    assert bed.tick(3 * module.REPAIR_S) == 3


def test_our_own_echo_clears_a_suspicion() -> None:
    bed = Bed()
    bed.tick(0.0)
    bed.topic.heard(b"older")
    bed.topic.heard(b"one")
    assert bed.tick(10 * module.REPAIR_S) == 1


def test_what_cannot_be_read_now_is_looked_at_again(caplog: pytest.LogCaptureFixture) -> None:
    bed = Bed()
    bed.source.error = Misconfigured("damaged")
    assert bed.tick(0.0) == 0  # an empty set would delete the broker's
    bed.topic.heard(b"of yesterday")
    assert bed.tick(module.REPAIR_S) == 0
    assert [record.getMessage() for record in caplog.records].count(
        "cannot read the metadata set, looking again: damaged"
    ) == 1
    bed.source.error = None
    assert bed.tick(module.REPAIR_S + module.LOOK_S) == 1
    bed.source.error = Misconfigured("damaged")
    bed.topic.changed()
    assert bed.tick(module.REPAIR_S + module.LOOK_S + 1.0) == 2  # what it knows, when the broker may know nothing
    assert bed.wire.published == [b"one", b"one"]
    assert len(caplog.records) == 2


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path) as running:
        yield running


def test_publishing_once_leaves_it_on_the_broker(broker: PrivateBroker) -> None:
    settings = Broker(host=broker.host, port=broker.port)
    publish_once(settings, "cli", b"set")
    heard: list[Message] = []
    link = Link(settings, "reader", on_message=heard.append)
    link.subscribe((topics.METADATA, 1))
    for _ in range(200):
        if not heard:
            link.turn(0.05)
    link.close()
    assert [(message.payload, message.retain) for message in heard] == [(b"set", True)]


def test_without_a_broker_it_is_unavailable(broker: PrivateBroker) -> None:
    broker.stop()
    with pytest.raises(Unavailable, match="did not take the metadata"):
        publish_once(Broker(host=broker.host, port=broker.port), "cli", b"set", timeout_s=0.2)
