from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol import codec, topics
from protocol.link import Broker, Link, Message
from protocol.messages import Ack, ChunkRequest, Transition, TransitionBatch
from protocol.release import manifest_digests
from trainer_host.database import Database
from trainer_host.jobs import UntrainedRequest, run_job
from trainer_host.private_broker import PrivateBroker
from trainer_host.recipes import table
from trainer_host.repository import Repository
from trainer_host.store import Store

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]

DEADLINE_S = 90.0
DEVICE = "pi-1"
CONFIG = """\
state_dir = "host"
[broker]
port = {port}
[gate]
battles = 50
margin = 1.0
[recipes.combat.learner]
epochs = 3
[auto_publish]
min_new_transitions = 2000
[inbox]
settle_seconds = 0.2
"""


class World:
    """Broker, host process, and an observer that is the device at the same time."""

    def __init__(self, folder: Path, broker: PrivateBroker) -> None:
        self.folder = folder
        self.config = folder / "host.toml"
        self.config.write_text(CONFIG.format(port=broker.port))
        self.metadata: list[bytes] = []
        self.acked = 0
        self.chunks: dict[str, bytes] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.link = Link(Broker(host=broker.host, port=broker.port), DEVICE, on_message=self._heard)
        self.link.subscribe((topics.fleet(DEVICE, "ack"), 1), (topics.METADATA, 1), (topics.chunk("+"), 1))
        self.until(lambda: self.link.connected)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "trainer_host", *words, "--config", str(self.config)],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip

    def start(self) -> None:
        with (self.folder / "host.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer_host", "run", "--config", str(self.config)], stderr=log
            )

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process is None or self.process.poll() is None, (self.folder / "host.log").read_text()
            assert time.monotonic() < deadline, f"in vain; progress: {self.progress()}"
            self.link.turn(0.05)

    def progress(self) -> list[dict[str, Any]]:
        path = self.folder / "host" / "progress.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has_acked(self, seq: int) -> bool:
        return self.acked >= seq

    def listens_since(self, before: bytes) -> bool:
        """Whether a host that was started when this set was the newest has signed and published another one."""
        return bool(self.metadata) and self.metadata[-1] == self.repository.metadata_set() != before

    def kinds(self) -> list[str]:
        return [line["kind"] for line in self.progress()]

    @property
    def repository(self) -> Repository:
        return Repository(self.folder / "host" / "repository")

    def _heard(self, message: Message) -> None:
        if message.topic == topics.METADATA:
            self.metadata.append(message.payload)
        elif message.topic.endswith("/ack"):
            self.acked = codec.Decoder(Ack).decode(message.payload).seq
        else:
            self.chunks[message.topic.rpartition("/")[2]] = message.payload


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with PrivateBroker(tmp_path / "broker") as broker:
        made = World(tmp_path, broker)
        try:
            yield made
        finally:
            if made.process is not None and made.process.poll() is None:
                made.process.kill()
                made.process.wait()
            made.link.close()


def demonstrations(first: int, last: int) -> TransitionBatch:
    """Battles of ten steps in which somebody plays by a rule that a network can learn."""
    recipe = table.named("combat")
    rng = np.random.default_rng(first)
    made = []
    for seq in range(first, last + 1):
        features = rng.random(recipe.features.length, np.float32)
        made.append(
            Transition(
                seq=seq, slot="combat", battle=f"b{seq // 10}", actor="a", step=seq % 10, features=features.tobytes(),
                action=int(features[: len(recipe.actions)].argmax()), taken=True, propensity=None, legal=b"",
                reward=0.0, next_features=features.tobytes(), done=seq % 10 == 9, truncated=False, model="", version=0,
                at=float(seq),
            )
        )  # fmt: skip
    return TransitionBatch(epoch="e1", acked=0, first=first, last=last, transitions=made)


def test_from_transitions_to_a_signed_model_on_the_broker(world: World) -> None:
    made = world.command("keys", "init")
    assert made.returncode == 0, made.stderr
    assert "root.pem" in made.stdout
    assert str(world.folder / "host" / "root.json") in made.stdout
    world.start()
    world.until(lambda: world.metadata)
    for first in range(1, 2100, 100):
        world.link.publish(
            topics.fleet(DEVICE, "transitions"), codec.compress(demonstrations(first, first + 99)), qos=1
        )
    world.until(lambda: "released" in world.kinds())
    kinds = world.kinds()
    assert kinds.index("training") < kinds.index("epoch") < kinds.index("trained") < kinds.index("gate")
    assert kinds.count("epoch") == 3
    world.until(lambda: world.acked == 2100)
    (release,) = world.repository.releases()
    assert (release.slot, release.lineage.transitions >= 2000, release.lineage.recipe) == ("combat", True, "combat")
    world.until(lambda: world.metadata[-1] == world.repository.metadata_set())

    asked = ChunkRequest(device=DEVICE, model=release.digest)
    world.link.publish(topics.CHUNK_REQUESTS, codec.encode(asked, as_json=False), qos=1)
    world.until(lambda: release.manifest in world.chunks)
    digests = manifest_digests(world.chunks[release.manifest])
    bits = ((1 << len(digests)) - 1).to_bytes(-(-len(digests) // 8), "little")
    asked = ChunkRequest(device=DEVICE, model=release.digest, wanted=bits)
    world.link.publish(topics.CHUNK_REQUESTS, codec.encode(asked, as_json=False), qos=1)
    world.until(lambda: set(digests) <= set(world.chunks))
    assert hashlib.sha256(b"".join(world.chunks[digest] for digest in digests)).hexdigest() == release.digest

    status = world.command("status", "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["totals"][0] == ["combat", 2100, 2100 - release.lineage.transitions]
    assert json.loads(world.command("models", "--json").stdout)[0]["state"] == "released"
    second = world.command("run")
    assert second.returncode == 3
    assert "another trainer-host is running" in second.stderr
    assert world.stop() == 0


def test_a_dropped_file_is_released_and_a_bad_one_refused(world: World) -> None:
    assert world.command("keys", "init").returncode == 0
    exported = run_job(UntrainedRequest(recipe=table.named("combat"), output=str(world.folder / "job")))
    world.start()
    world.until(lambda: world.metadata)
    inbox = world.folder / "host" / "inbox"
    world.until(inbox.is_dir)
    for name, data in (("good", Path(exported.released.path).read_bytes()), ("bad", b"nothing")):
        (inbox / f"{name}.tflite").write_bytes(data)
        (inbox / f"{name}.toml").write_text('slot = "combat"\nnotes = "by hand"\n')
    world.until((inbox / "done" / "good.tflite").exists)
    world.until((inbox / "refused" / "bad.reason.txt").exists)
    assert "TFLite" in (inbox / "refused" / "bad.reason.txt").read_text()
    (release,) = world.repository.releases()
    assert release.digest == exported.released.digest
    assert release.notes == "by hand"
    world.until(lambda: world.metadata[-1] == world.repository.metadata_set())
    assert world.stop() == 0


def test_publish_speaks_to_the_broker_without_the_daemon(world: World) -> None:
    assert world.command("keys", "init").returncode == 0
    exported = run_job(UntrainedRequest(recipe=table.named("combat"), output=str(world.folder / "job"), seed=7))
    file = shutil.copy(exported.released.path, world.folder / "model.tflite")
    unsaid = world.command("publish", str(file))
    assert unsaid.returncode == 2
    assert "--slot" in unsaid.stderr
    published = world.command("publish", str(file), "--slot", "combat", "--notes", "first", "--json")
    assert published.returncode == 0, published.stderr
    assert json.loads(published.stdout)["digest"] == exported.released.digest
    world.until(lambda: world.metadata and world.metadata[-1] == world.repository.metadata_set())
    missing = world.command("train")
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1] == "error: there are no transitions for slot combat yet"


def test_nothing_acknowledged_is_lost_when_the_host_is_killed(world: World) -> None:
    assert world.command("keys", "init").returncode == 0
    sent = 0
    for enough in (1500, 3000):
        before = world.repository.metadata_set()
        world.start()
        world.until(functools.partial(world.listens_since, before))
        first, goal = world.acked + 1, world.acked + enough // 3
        for start in range(first, first + enough, 100):
            batch = codec.compress(demonstrations(start, start + 99))
            world.link.publish(topics.fleet(DEVICE, "transitions"), batch, qos=1)
            sent = start + 99
            if world.acked >= goal:
                break
            world.link.turn(0.0)
        world.until(functools.partial(world.has_acked, goal))
        assert world.process is not None
        world.process.kill()
        world.process.wait()
        world.process = None
        world.link.turn(0.2)
        database = Database(f"sqlite:///{world.folder / 'host' / 'trainer-host.db'}")
        rows = Store(database).training_rows("combat", 10**6)
        database.close()
        assert set(range(1, world.acked + 1)) <= {int(row.at) for row in rows}
        assert len(rows) == len({row.at for row in rows}) <= sent
