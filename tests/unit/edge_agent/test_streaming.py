"""Streaming with a real outbox; the link is one that keeps what was published."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import streaming as module
from edge_agent.battles import BattleBook, Served
from edge_agent.children import Records
from edge_agent.outbox import Outbox
from edge_agent.streaming import ACK_LIMIT_S, STORE_AGAIN_S, Streaming
from protocol import codec
from protocol.errors import Unavailable
from protocol.messages import Ack, Transition, TransitionBatch

STATE = b"\0\0\x80?"


class Line:
    """As much of a link as streaming needs."""

    def __init__(self) -> None:
        self.connected = True
        self.sent: list[tuple[str, int, TransitionBatch]] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> int:
        assert self.connected
        assert not retain
        self.sent.append((topic, qos, msgspec.msgpack.decode(codec.decompress(payload), type=TransitionBatch)))
        return len(self.sent)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(batch.first, batch.last) for _, _, batch in self.sent]


class FullDisk(Outbox):
    full = False

    def append(self, transitions: Any) -> None:
        if self.full:
            raise Unavailable("no space")
        super().append(transitions)

    def acknowledge(self, ack: Ack) -> int:
        if self.full:
            raise Unavailable("no space")
        return super().acknowledge(ack)


class Scene:
    def __init__(self, folder: Path, **options: Any) -> None:
        self.now = 100.0
        self.outbox = FullDisk(folder / "outbox.db", **options)
        self.streaming = Streaming("pi7", BattleBook(), self.outbox)
        self.line: Any = Line()
        self.step = 0

    def play(self, count: int, battle: str = "b") -> None:
        """That many transitions."""
        served = [
            Served("combat", battle, "", step, STATE, 1, False, 1.0, b"", 0.5, False, "a" * 64, 1, 5.0)
            for step in range(self.step, self.step + count + 1)
        ]
        self.step += count
        self.streaming.record(Records(served, 0), self.now)

    def tick(self, seconds: float = 5.0) -> None:
        self.now += seconds
        self.streaming.tick(self.line, self.now)

    def ack(self, seq: int, epoch: str | None = None) -> None:
        self.streaming.acknowledged(msgspec.json.encode(Ack(epoch=epoch or self.outbox.epoch, seq=seq)))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, batch_rows=2, window=2)


def test_records_become_transitions_on_disk_and_then_batches_at_qos_1(scene: Scene) -> None:
    scene.play(2)
    scene.tick()
    ((topic, qos, batch),) = scene.line.sent
    assert (topic, qos) == ("fleet/v1/pi7/transitions", 1)
    assert [(one.step, one.reward, one.features) for one in batch.transitions] == [(0, 0.5, STATE), (1, 0.5, STATE)]
    assert scene.outbox.rows == 2
    scene.ack(2)
    assert scene.outbox.rows == 0


def test_no_more_than_the_window_is_under_way(scene: Scene) -> None:
    scene.play(7)
    scene.tick()
    assert scene.line.ranges == [(1, 2), (3, 4)]
    scene.ack(2)
    scene.tick(1.0)
    assert scene.line.ranges == [(1, 2), (3, 4), (5, 6)]


def test_without_a_connection_everything_stays_on_disk_and_is_sent_after(scene: Scene) -> None:
    scene.line.connected = False
    scene.play(3)
    scene.tick()
    assert scene.outbox.rows == 3
    scene.line.connected = True
    scene.streaming.reconnected()
    scene.tick(1.0)
    assert scene.line.ranges == [(1, 2), (3, 3)]


def test_what_was_under_way_is_sent_again_after_a_reconnection(scene: Scene) -> None:
    scene.play(3)
    scene.tick()
    scene.ack(2)
    scene.streaming.reconnected()
    scene.tick(1.0)
    assert scene.line.ranges == [(1, 2), (3, 3), (3, 3)]


@pytest.mark.parametrize("acked", [0, 2])
def test_a_host_that_stays_silent_is_sent_everything_again(scene: Scene, acked: int) -> None:
    scene.play(3)
    scene.tick()
    scene.ack(acked)
    for _ in range(int(ACK_LIMIT_S)):
        scene.tick(1.0)
    assert scene.line.ranges == [(1, 2), (3, 3)]
    for _ in range(3):
        scene.tick(1.0)
    assert scene.line.ranges[2:] == ([(1, 2), (3, 3)] if acked == 0 else [(3, 3)])


def test_an_acknowledgement_of_another_epoch_is_no_answer(scene: Scene) -> None:
    scene.play(2)
    scene.tick()
    for _ in range(25):
        scene.ack(2, epoch="another")
        scene.tick(1.0)
    assert scene.line.ranges == [(1, 2), (1, 2)]
    assert scene.outbox.rows == 2


def test_when_all_is_acknowledged_nothing_is_sent_again(scene: Scene) -> None:
    scene.play(2)
    scene.tick()
    scene.ack(2)
    for _ in range(30):
        scene.tick(1.0)
    assert scene.line.ranges == [(1, 2)]


@pytest.mark.parametrize("payload", [b"nonsense", b"{}", b'{"epoch":1,"seq":1}', b'{"epoch":"x","seq":-1}'])
def test_an_acknowledgement_that_is_none_changes_nothing(scene: Scene, payload: bytes) -> None:
    scene.play(2)
    scene.tick()
    scene.streaming.acknowledged(payload)
    scene.ack(99)
    assert scene.outbox.rows == 2


def test_a_full_disk_holds_transitions_in_memory_until_there_is_room(scene: Scene) -> None:
    scene.outbox.full = True
    scene.play(2)
    scene.tick()
    assert scene.line.sent == []
    scene.outbox.full = False
    scene.tick(STORE_AGAIN_S)
    assert scene.line.ranges == [(1, 2)]
    scene.outbox.full = True
    scene.ack(2)
    assert scene.outbox.rows == 2
    scene.outbox.full = False
    scene.ack(2)
    assert scene.outbox.rows == 0


def test_what_memory_does_not_hold_is_counted_as_lost(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD", 3)
    scene.outbox.full = True
    scene.play(5)
    scene.tick()
    assert scene.streaming.lost_records == 2
    scene.outbox.full = False
    scene.tick(STORE_AGAIN_S)
    assert [one.step for _, _, batch in scene.line.sent for one in batch.transitions] == [2, 3, 4]


def test_what_the_worker_lost_is_counted(scene: Scene) -> None:
    scene.streaming.record(Records([], 7), scene.now)
    assert scene.streaming.lost_records == 7


def test_a_disk_that_cannot_be_read_is_no_end(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.play(2)

    def failing() -> None:
        raise Unavailable("the disk failed")

    with monkeypatch.context() as patched:
        patched.setattr(scene.outbox, "next_batch", failing)
        scene.tick()
    scene.tick(5.0)
    assert scene.line.ranges == [(1, 2)]


def test_closing_puts_open_battles_on_disk_as_truncated(scene: Scene, tmp_path: Path) -> None:
    scene.play(1)
    scene.streaming.close(scene.now)
    with sqlite3.connect(tmp_path / "outbox.db") as connection:
        rows = connection.execute("SELECT blob FROM transitions ORDER BY seq").fetchall()
    transitions = [msgspec.msgpack.decode(blob, type=Transition) for (blob,) in rows]
    assert [(one.step, one.truncated) for one in transitions] == [(0, False), (1, True)]
