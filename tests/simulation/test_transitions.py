"""Transitions from a device to the host, from a seed: nothing that was stored is lost, nothing arrives twice.

The outbox, the streaming, the ingest and the host's store are the real ones, on SQLite files. The device is killed
between any two statements of SQL: what it leaves is a copy of its files at that moment, and what it would have sent
after it is not sent. The host is killed between commit and acknowledgement. Messages are lost, doubled and reordered.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from edge_agent.battles import BattleBook, Served
from edge_agent.children import Records
from edge_agent.outbox import Outbox
from edge_agent.streaming import Streaming
from protocol.codec import encode
from protocol.messages import Transition
from trainer_host import database as tables
from trainer_host.database import Database
from trainer_host.ingest import Ingest
from trainer_host.store import Store

SEEDS = 40
STEPS = 250
HEALING_STEPS = 300
DEVICE = "pi-1"
FEATURES = b"\0\0\x80?"

Name = tuple[str, int]


class Noted(Outbox):
    """The real one, of which we know what it has stored."""

    stored: set[Name]

    def append(self, transitions: Sequence[Transition]) -> None:
        super().append(transitions)
        self.stored |= {(each.battle, each.step) for each in transitions}


class World:
    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.now = 100.0
        self.lives = 0
        self.stored: set[Name] = set()
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        self.connected = True
        self.is_bad = True
        self.battle = 0
        self.dies_after: int | None = None
        self.path = folder / "0" / "outbox.db"
        self.start_device()
        self.start_host()

    # The device.

    def start_device(self) -> None:
        self.outbox = Noted(self.path, window=self.rng.choice((1, 3, 8)), batch_rows=self.rng.choice((2, 5, 256)))
        self.outbox.stored = self.stored
        assert self.outbox._database._connection is not None
        self.outbox._database._connection.set_trace_callback(lambda _: self.statement())
        self.streaming = Streaming(DEVICE, BattleBook(), self.outbox)
        self.image: Path | None = None

    def statement(self) -> None:
        """SQLite is about to run a statement; the device may be dead from here on."""
        if self.dies_after is not None and self.image is None:
            self.dies_after -= 1
            if self.dies_after < 0:
                self.lives += 1
                self.image = self.folder / f"{self.lives}"
                shutil.copytree(self.path.parent, self.image)
                self.stored_before = set(self.stored)

    def publish(self, _topic: str, payload: bytes, *, qos: int) -> int:
        assert qos == 1
        if self.image is None:
            self.up.append(payload)
        return 1

    def bury_device(self) -> None:
        """What was done after the moment of death was not."""
        assert self.image is not None
        self.outbox.close()
        self.stored = self.stored_before
        self.path = self.image / "outbox.db"
        self.dies_after = None
        self.start_device()

    def play(self) -> None:
        self.battle += 1
        count = self.rng.randint(1, 12)
        served = [
            Served("combat", f"b{self.battle}", "", step, FEATURES, 1, False, 1.0, b"", 0.5, step == count, "m", 1, 5.0)
            for step in range(count + 1)
        ]
        self.streaming.record(Records(served, 0), self.now)

    # The host.

    def start_host(self) -> None:
        self.database = Database(f"sqlite:///{self.folder / 'host.db'}")
        self.ingest = Ingest(Store(self.database))

    def host_turn(self) -> None:
        for payload in self.arriving(self.up):
            self.ingest.receive(DEVICE, payload)
        answers = self.ingest.commit(self.now)
        if self.is_bad and self.rng.random() < 0.1:
            self.database.close()
            self.start_host()
            return  # killed after the commit: nothing is acknowledged
        self.down += [encode(answer.ack, as_json=True) for answer in answers]

    def arriving(self, queue: list[bytes]) -> list[bytes]:
        """What arrives of a queue now: some of it late, lost, or twice."""
        arriving, queue[:] = list(queue), []
        if not self.is_bad:
            return arriving
        found: list[bytes] = []
        for payload in arriving:
            luck = self.rng.random()
            if luck < 0.2:
                continue
            (queue if luck < 0.4 else found).append(payload)
            if luck > 0.8:
                queue.append(payload)
        self.rng.shuffle(found)
        return found

    def in_store(self) -> Counter[Name]:
        columns = tables.transitions.c
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(columns.battle, columns.step))
            return Counter((row.battle, row.step) for row in rows)

    def in_outbox(self) -> set[Name]:
        with self.outbox._database.transaction() as connection:
            from_blob: Any = [blob for (blob,) in connection.execute("SELECT blob FROM transitions")]
        return {(each.battle, each.step) for each in map(_decoded, from_blob)}

    # Time.

    def turn(self) -> None:
        self.now += self.rng.choice((0.3, 2.0, 25.0))
        if self.is_bad and self.rng.random() < 0.1:
            self.dies_after = self.rng.randrange(12)
        if self.is_bad and self.rng.random() < 0.3:
            self.play()
        if self.rng.random() < 0.1:
            self.connected = not self.connected or not self.is_bad
            self.streaming.reconnected()
        for payload in self.arriving(self.down):
            self.streaming.acknowledged(payload)
        self.streaming.tick(self, self.now)  # type: ignore[arg-type]
        if self.image is not None:
            self.bury_device()
        self.dies_after = None
        self.host_turn()

    def check(self) -> None:
        store = self.in_store()
        assert max(store.values(), default=1) == 1, "something is there twice"
        lost = self.stored - set(store) - self.in_outbox()
        assert not lost, f"neither on the device nor in the store: {sorted(lost)[:5]}"


def _decoded(blob: bytes) -> Transition:
    return msgspec.msgpack.decode(blob, type=Transition)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_stored_arrives_once(seed: int, tmp_path: Path) -> None:
    world = World(seed, tmp_path)
    for turn in range(STEPS):
        world.turn()
        if turn % 10 == 0:
            world.check()
    world.is_bad, world.connected = False, True
    for _ in range(HEALING_STEPS):
        world.turn()
        if not world.outbox.rows and not world.up:
            break
    world.check()
    assert world.outbox.rows == 0
    assert world.stored <= set(world.in_store())
    assert len(world.stored) > 50
    world.outbox.close()
    world.database.close()
