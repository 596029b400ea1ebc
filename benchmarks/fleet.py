"""What is measured: a private broker, one agent as a process, and a host that signs and sends models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import psutil  # type: ignore[import-untyped]

from edge_agent import runtime
from protocol import topics
from protocol.codec import Decoder, decompress
from protocol.errors import Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.link import Broker, Link, Message
from protocol.messages import Ack, ChunkRequest, Event, Status, TransitionBatch
from protocol.release import CHUNK_BYTES, Golden, Release
from trainer_host import keys
from trainer_host.chunks import ChunkServer
from trainer_host.private_broker import PrivateBroker
from trainer_host.repository import Repository, identity_of

FEATURES = 40
ACTIONS = 8
DEVICE = "bench"
SLOT = "combat"
LIMIT_S = 180.0
TOPICS = (topics.state(DEVICE, SLOT), topics.action(DEVICE, SLOT))
STATE = json.dumps(
    {
        "battle": "bench",
        "step": "########",
        "id": "########",
        "features": [round(0.5 + index / 100, 3) for index in range(FEATURES)],
        "legal": [True] * ACTIONS,
    }
).replace('"step": "########"', '"step":########').replace('"id": ', '"id":').encode()  # fmt: skip

_batches: Decoder[TransitionBatch] = Decoder(TransitionBatch)
_requests: Decoder[ChunkRequest] = Decoder(ChunkRequest)


def release_of(model: bytes, version: int) -> Release:
    """A release of one of the measured models."""
    loaded = runtime.load(model)
    vector = np.linspace(0.1, 0.9, FEATURES, dtype=np.float32)
    return Release(
        slot=SLOT,
        version=version,
        **identity_of(model),
        inputs=loaded.inputs,
        outputs=loaded.outputs,
        actions=tuple(f"action-{index}" for index in range(ACTIONS)),
        features=FeatureSpec(features=tuple(Feature(path=f"f{index}") for index in range(FEATURES))),
        golden=Golden(
            inputs=(tuple(vector.tolist()),), outputs=(tuple(loaded.invoke(vector).tolist()),), tolerance=1e-3
        ),
    )


class Fleet:
    """Broker, agent and host.

    Args:
        folder: For everything.
        python: The agent's interpreter, and with it its runtime.
    """

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.broker = PrivateBroker(folder / "broker").start()
        self.events: list[Event] = []
        self._python = python
        self._folder = folder
        self._status: Status | None = None
        self._agent: subprocess.Popen[bytes] | None = None
        keys.init(folder / "keys", None)
        self._repository = Repository(folder / "repository", keys.load_signers(folder / "keys"))
        self._repository.create(datetime.now(UTC))
        (folder / "root.json").write_bytes(self._repository.root())
        self.chunks = ChunkServer(self._repository)
        self._link = Link(
            Broker(port=self.broker.port),
            "bench-host",
            on_message=self._heard,
            on_published=lambda _packet: self.chunks.published(),
        )
        self._link.subscribe((topics.fleet(DEVICE, "+"), 1), (topics.CHUNK_REQUESTS, 1))
        self.wait(lambda: self._link.connected, "the broker answers")
        self._config = folder / "edge-agent.toml"
        self._config.write_text(
            f'device = "{DEVICE}"\nstate_dir = "state"\n[broker]\nport = {self.broker.port}\n'
            f"[slots.{SLOT}]\ntrial_duty = 0.5\nwatch_seconds = 0.0\n"
        )

    def start_agent(self) -> float:
        """Start the agent's process. Returns the monotonic time of that moment."""
        began = time.monotonic()
        with (self._folder / "agent.log").open("ab") as log:
            self._agent = subprocess.Popen(
                [self._python, "-m", "edge_agent", "run", "--config", str(self._config)], stdout=log, stderr=log
            )
        return began

    def stop_agent(self) -> None:
        """End the agent as systemd would."""
        if self._agent is not None:
            self._agent.send_signal(signal.SIGTERM)
            self._agent.wait(30)
            self._agent = None
            self._status = None

    def publish(self, model: bytes, version: int) -> Release:
        """Sign and announce a model."""
        release = release_of(model, version)
        self._repository.release(release, model, datetime.now(UTC))
        self._link.publish(topics.METADATA, self.metadata_set(), qos=1, retain=True)
        return release

    def metadata_set(self) -> bytes:
        """What was announced."""
        return self._repository.metadata_set()

    def publish_chunks(self, release: Release) -> None:
        """Begin to publish every chunk of a model, whoever listens."""
        every = (1 << release.chunk_count) - 1
        for bits in (every, 0):  # without any bit: nobody need be waited for
            wanted = bits.to_bytes(-(-release.chunk_count // 8), "little")
            request = ChunkRequest(device="everybody", model=release.digest, wanted=wanted)
            self.chunks.requested(request, time.monotonic())

    def serves(self, version: int) -> bool:
        """Whether the agent says that it answers with this version."""
        slot = self._status.slots.get(SLOT) if self._status else None
        return slot is not None and slot.ready and slot.active is not None and slot.active.version == version

    def heard(self, kinds: Collection[str], after: int) -> bool:
        """Whether the agent has reported an event of one of these kinds after so many others."""
        return any(event.kind in kinds for event in self.events[after:])

    def committed(self, version: int) -> bool:
        """Whether the agent has said that this version passed its trial."""
        return any(event.kind == "committed" and event.version == version for event in self.events)

    def wait(self, what: Callable[[], object], described: str, limit_s: float = LIMIT_S) -> None:
        """Play the host until something is so."""
        deadline = time.monotonic() + limit_s
        while not what():
            if time.monotonic() > deadline:
                log = (self._folder / "agent.log").read_text("utf-8", "replace")[-2000:]
                raise Unavailable(f"waited {limit_s:.0f} s in vain until {described}\n{log}")
            self.turn(0.02)

    def pause(self, seconds: float) -> None:
        """Play the host for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.turn(0.02)

    def turn(self, seconds: float) -> None:
        """One turn of the host."""
        self._link.turn(seconds)
        while self._link.connected and (publication := self.chunks.next(time.monotonic())) is not None:
            self._link.publish(publication.topic, publication.payload, qos=1)

    def memory_mb(self) -> float:
        """Proportional set size of the agent's processes: what they would free by ending."""
        assert self._agent is not None
        processes = [self._agent.pid, *self.children()]
        return float(sum(psutil.Process(pid).memory_full_info().pss for pid in processes) / 1e6)

    def children(self) -> list[int]:
        """The agent's children that live."""
        assert self._agent is not None
        living = psutil.Process(self._agent.pid).children()
        return [child.pid for child in living if child.status() != psutil.STATUS_ZOMBIE]

    def workers(self) -> list[int]:
        """Those that answer."""
        return [pid for pid in self.children() if "edge_agent.worker" in psutil.Process(pid).cmdline()]

    def close(self) -> None:
        """End everything."""
        self.stop_agent()
        self._link.close()
        self.broker.stop()

    def _heard(self, message: Message) -> None:
        if message.topic == topics.CHUNK_REQUESTS:
            self.chunks.requested(_requests.decode(message.payload), time.monotonic())
            return
        _, what = topics.fleet_device(message.topic)
        if what == "status":
            self._status = msgspec.json.decode(message.payload, type=Status)
        elif what == "events":
            self.events.append(msgspec.json.decode(message.payload, type=Event))
        elif what == "transitions":
            batch = _batches.decode(decompress(message.payload))
            ack = Ack(epoch=batch.epoch, seq=batch.last)
            self._link.publish(topics.fleet(DEVICE, "ack"), msgspec.json.encode(ack), qos=1)


@contextmanager
def serving(folder: Path, model: bytes, python: str = sys.executable) -> Iterator[Fleet]:
    """A fleet whose agent serves `model` as version 0."""
    folder.mkdir(parents=True)
    fleet = Fleet(folder, python)
    try:
        fleet.start_agent()
        fleet.publish(model, 0)
        fleet.wait(lambda: fleet.serves(0), "version 0 is served")
        fleet.wait(lambda: len(fleet.children()) == 1, "only the worker is left")
        yield fleet
    finally:
        fleet.close()


def twin(model: bytes, number: int) -> bytes:
    """The same model with another digest, and with hardly a chunk in common, so that all of it is transferred.

    In each chunk of a large one a bit of the least significant byte of a weight is flipped; TFLite aligns weights to 16
    bytes. A flatbuffer does not mind what follows it.
    """
    other = bytearray(model)
    for start in range(CHUNK_BYTES, len(model) - CHUNK_BYTES, CHUNK_BYTES):
        other[start] ^= number
    return bytes(other) + number.to_bytes(4, "little")
