"""Reports with a real state store; the link is one that keeps what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.reporting import MAX_UNSENT_EVENTS, STATUS_S, Reporting
from edge_agent.trail import Trail
from protocol.errors import Unavailable
from protocol.messages import Event, SlotStatus, Status, Telemetry


class Line:
    """As much of a link as reporting needs."""

    def __init__(self) -> None:
        self.connected = True
        self.sent: list[tuple[str, bytes, int, bool]] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> int:
        assert self.connected
        self.sent.append((topic.removeprefix("fleet/v1/pi7/"), payload, qos, retain))
        return len(self.sent)

    def of(self, what: str) -> list[Any]:
        return [msgspec.json.decode(payload) for topic, payload, _, _ in self.sent if topic == what]


class Disk(Trail):
    full = False

    def add(self, event: Event) -> None:
        if self.full:
            raise Unavailable("no space")
        super().add(event)


class Scene:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "status.json"
        self.disk = Disk(folder / "trail.db")
        self.reporting = Reporting("pi7", self.disk, self.file)
        self.line: Any = Line()
        self.now = 100.0

    def tick(self, status: Status, seconds: float = 0.1) -> None:
        self.now += seconds
        self.reporting.tick(self.line, status, self.now)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def status(phase: str = "serving", at: float = 1.0) -> Status:
    return Status(at=at, agent_version="1", runtime="r 1", slots={"combat": SlotStatus(phase=phase, ready=True)})


def event(number: int) -> Event:
    return Event(at=float(number), kind="staged", slot="combat", text=str(number))


def test_the_status_is_said_when_it_changes_or_is_old_and_stays_with_broker_and_disk(scene: Scene) -> None:
    scene.tick(status(at=1.0))
    scene.tick(status(at=2.0))
    assert len(scene.line.sent) == 1
    scene.tick(status("trial", at=3.0))
    scene.tick(status("trial", at=4.0), STATUS_S + 0.1)
    assert [(said["at"], said["slots"]["combat"]["phase"]) for said in scene.line.of("status")] == [
        (1.0, "serving"),
        (3.0, "trial"),
        (4.0, "trial"),
    ]
    assert all(qos == 1 and retain for _, _, qos, retain in scene.line.sent)
    assert msgspec.json.decode(scene.file.read_bytes(), type=Status).at == 4.0


def test_without_a_connection_the_status_is_written_and_said_after_it_returns(scene: Scene) -> None:
    scene.line.connected = False
    scene.tick(status())
    assert scene.line.sent == []
    assert scene.file.exists()
    scene.line.connected = True
    scene.reporting.connected(scene.line)
    scene.tick(status())
    assert scene.line.sent[0] == ("availability", b"online", 1, True)
    assert len(scene.line.of("status")) == 1


def test_events_wait_for_a_connection_in_their_order_and_are_said_once(scene: Scene) -> None:
    scene.line.connected = False
    for number in range(3):
        scene.reporting.event(event(number))
    scene.tick(status())
    scene.line.connected = True
    scene.tick(status())
    scene.tick(status())
    assert [said["text"] for said in scene.line.of("events")] == ["0", "1", "2"]
    assert {(qos, retain) for topic, _, qos, retain in scene.line.sent if topic == "events"} == {(1, False)}
    assert scene.disk.history(10) == [event(0), event(1), event(2)]


def test_a_connection_lost_between_two_events_loses_none(scene: Scene) -> None:
    for number in range(3):
        scene.reporting.event(event(number))
    publish = scene.line.publish

    def breaking(*arguments: Any, **options: Any) -> int:
        scene.line.connected = False
        return int(publish_anyway(*arguments, **options))

    def publish_anyway(*arguments: Any, **options: Any) -> int:
        scene.line.connected = True
        packet = int(publish(*arguments, **options))
        scene.line.connected = False
        return packet

    scene.line.publish = breaking
    scene.tick(status())
    scene.line.publish = publish
    scene.line.connected = True
    scene.tick(status())
    assert [said["text"] for said in scene.line.of("events")] == ["0", "1", "2"]


def test_events_that_wait_are_bounded_and_all_of_them_on_disk(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Event] = []
    monkeypatch.setattr(scene.disk, "add", kept.append)  # a thousand durable writes would take long
    scene.line.connected = False
    for number in range(MAX_UNSENT_EVENTS + 5):
        scene.reporting.event(event(number))
    scene.line.connected = True
    scene.tick(status())
    assert scene.line.of("events")[0]["text"] == "5"
    assert len(kept) == MAX_UNSENT_EVENTS + 5


def test_an_event_that_the_disk_does_not_take_is_published_all_the_same(scene: Scene) -> None:
    scene.disk.full = True
    scene.reporting.event(event(1))
    scene.tick(status())
    assert [said["text"] for said in scene.line.of("events")] == ["1"]


def test_telemetry_is_sent_while_connected_and_not_kept(scene: Scene) -> None:
    scene.line.connected = False
    scene.reporting.telemetry(scene.line, Telemetry(at=1.0, uptime_s=1.0))
    scene.line.connected = True
    scene.reporting.telemetry(scene.line, Telemetry(at=2.0, uptime_s=2.0))
    assert [said["at"] for said in scene.line.of("telemetry")] == [2.0]


def test_a_folder_that_is_gone_does_not_keep_the_status_from_the_broker(scene: Scene) -> None:
    scene.file.mkdir()
    scene.tick(status())
    assert len(scene.line.of("status")) == 1


def test_leaving_says_so_and_takes_the_status_away(scene: Scene) -> None:
    scene.tick(status())
    scene.reporting.leaving(scene.line)
    assert scene.line.sent[-1] == ("availability", b"offline", 1, True)
    assert not scene.file.exists()
    scene.line.connected = False
    scene.reporting.leaving(scene.line)
