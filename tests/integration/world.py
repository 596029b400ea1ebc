"""A small fleet of one: a real Mosquitto, a real agent process, and a host made of its real parts.

The host's side needs no TensorFlow, so the agent is tested here with whichever runtime its environment has.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from edge_agent import runtime
from protocol import codec, topics
from protocol.codec import Decoder
from protocol.features import Feature, FeatureSpec
from protocol.link import Broker, Link, Message
from protocol.messages import Ack, ChunkRequest, Decision, Event, Status, Telemetry, Transition, TransitionBatch
from protocol.release import Golden, Release
from trainer_host import keys
from trainer_host.chunks import ChunkServer
from trainer_host.private_broker import PrivateBroker
from trainer_host.repository import Repository, identity_of

T = TypeVar("T")

DEVICE = "pi7"
SLOT = "combat"
MODELS = Path(__file__).parents[1] / "models"
LIMIT_S = 30.0

_batches: Decoder[TransitionBatch] = Decoder(TransitionBatch)
_requests: Decoder[ChunkRequest] = Decoder(ChunkRequest)


def release_of(model: bytes, version: int, slot: str = SLOT) -> Release:
    """A release whose golden vectors the model itself has computed."""
    loaded = runtime.load(model)
    vectors = np.random.default_rng(version).uniform(-1, 1, (3, loaded.input_length)).astype(np.float32)
    outputs = [loaded.invoke(vector) for vector in vectors]
    return Release(
        slot=slot,
        version=version,
        **identity_of(model),
        inputs=loaded.inputs,
        outputs=loaded.outputs,
        actions=tuple(f"action-{index}" for index in range(loaded.output_length)),
        features=FeatureSpec(features=tuple(Feature(path=f"f{index}") for index in range(loaded.input_length))),
        golden=Golden(
            inputs=tuple(tuple(vector.tolist()) for vector in vectors),
            outputs=tuple(tuple(output.tolist()) for output in outputs),
            tolerance=1e-4,
        ),
    )


class World:
    """Broker, agent and host.

    Args:
        folder: For everything.
        slot_settings: TOML lines for the slot.
        slots: The device's slots.
    """

    def __init__(self, folder: Path, slot_settings: str = "", slots: tuple[str, ...] = (SLOT,)) -> None:
        self.folder = folder
        self.broker = PrivateBroker(folder / "broker")
        self.broker.start()
        keys.init(folder / "keys", None)
        self.repository = Repository(folder / "repository", keys.load_signers(folder / "keys"))
        self.repository.create(datetime.now(UTC))
        (folder / "root.json").write_bytes(self.repository.root())
        self.status: Status | None = None
        self.telemetry: list[Telemetry] = []
        self.events: list[Event] = []
        self.decisions: list[Decision] = []
        self.transitions: dict[tuple[str, int], Transition] = {}
        self.acknowledging = True
        self.availability = b""
        self.chunks = ChunkServer(self.repository, gather_s=0.0)
        self.link = Link(
            Broker(port=self.broker.port),
            "test-host",
            on_message=self._heard,
            on_published=lambda _packet: self.chunks.published(),
        )
        self.link.subscribe((topics.fleet(DEVICE, "+"), 1), (topics.CHUNK_REQUESTS, 1), ("battle/v1/+/+/action", 1))
        self.wait(lambda: self.link.connected, "the broker answers")
        tables = "\n".join(f"[slots.{slot}]\n{slot_settings}" for slot in slots)
        self.config = folder / "edge-agent.toml"
        self.config.write_text(
            f'device = "{DEVICE}"\nstate_dir = "state"\ntelemetry_seconds = 0.5\n'
            f"[broker]\nport = {self.broker.port}\n{tables}\n"
        )
        self.agent: subprocess.Popen[bytes] | None = None

    def start_agent(self) -> None:
        """Start `edge-agent run`."""
        self.agent = subprocess.Popen([sys.executable, "-m", "edge_agent", "run", "--config", str(self.config)])

    def stop_agent(self) -> int:
        """End it as systemd would; its exit status."""
        assert self.agent is not None
        self.agent.send_signal(signal.SIGTERM)
        self.wait(lambda: self.agent is not None and self.agent.poll() is not None, "the agent ends")
        return self.agent.returncode

    def release_model(self, model: bytes, version: int, slot: str = SLOT, *, like: bytes | None = None) -> Release:
        """Release a model, with the golden vectors of one that it is said to be like."""
        described = release_of(like or model, version, slot)
        release = msgspec.structs.replace(described, **identity_of(model))
        self.repository.release(release, model, datetime.now(UTC))
        return release

    def publish(self, model: bytes, version: int, slot: str = SLOT) -> Release:
        """Release a model, and publish the metadata set."""
        release = self.release_model(model, version, slot)
        self.publish_metadata(self.repository.metadata_set())
        return release

    def publish_metadata(self, metadata: bytes) -> None:
        """Publish any metadata set."""
        self.link.publish(topics.METADATA, metadata, qos=1, retain=True)

    def ask(self, payload: bytes | dict[str, Any], topic: str | None = None, qos: int = 0) -> Decision:
        """Publish an observation, and wait for its answer."""
        before = len(self.decisions)
        data = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        self.link.publish(topic or topics.state(DEVICE, SLOT), data, qos=qos)
        self.wait(lambda: len(self.decisions) > before, "an answer comes", 5.0)
        return self.decisions[before]

    def is_serving(self, version: int, slot: str = SLOT) -> bool:
        """Whether the device says that it serves this version."""
        if self.status is None or slot not in self.status.slots:
            return False
        said = self.status.slots[slot]
        return said.ready and said.active is not None and said.active.version == version

    def event(self, kind: str, after: int = 0) -> Event:
        """Wait for an event of a kind."""
        self.wait(lambda: any(event.kind == kind for event in self.events[after:]), f"event {kind}")
        return next(event for event in self.events[after:] if event.kind == kind)

    def wait(self, what: Callable[[], object], described: str, limit_s: float = LIMIT_S) -> None:
        """Play the host until something is so."""
        deadline = time.monotonic() + limit_s
        while not what():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {limit_s:.0f} s in vain until {described}; events: {self.events}")
            self.turn(0.02)

    def turn(self, seconds: float) -> None:
        """One turn of the host."""
        self.link.turn(seconds)
        while self.link.connected and (publication := self.chunks.next(time.monotonic())) is not None:
            self.link.publish(publication.topic, publication.payload, qos=1)

    def children(self, module: str) -> list[int]:
        """Process ids of the agent's children of a kind."""
        import psutil  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415

        assert self.agent is not None
        found = []
        for child in psutil.Process(self.agent.pid).children():
            try:
                if child.status() != psutil.STATUS_ZOMBIE and f"edge_agent.{module}" in child.cmdline():
                    found.append(child.pid)
            except psutil.Error:  # it has just ended
                continue
        return found

    def close(self) -> None:
        """End everything."""
        if self.agent is not None and self.agent.poll() is None:
            self.stop_agent()
        self.link.close()
        self.broker.stop()

    def _heard(self, message: Message) -> None:
        if message.topic == topics.CHUNK_REQUESTS:
            self.chunks.requested(_requests.decode(message.payload), time.monotonic())
        elif message.topic.startswith("battle/"):
            self.decisions.append(msgspec.json.decode(message.payload, type=Decision))
        else:
            _, what = topics.fleet_device(message.topic)
            if what == "status":
                self.status = msgspec.json.decode(message.payload, type=Status)
            elif what == "events":
                self.events.append(msgspec.json.decode(message.payload, type=Event))
            elif what == "telemetry":
                self.telemetry.append(msgspec.json.decode(message.payload, type=Telemetry))
            elif what == "availability":
                self.availability = message.payload
            elif what == "transitions":
                self._store(message.payload)

    def _store(self, payload: bytes) -> None:
        batch = _batches.decode(codec.decompress(payload))
        if not self.acknowledging:
            return
        self.transitions |= {(batch.epoch, transition.seq): transition for transition in batch.transitions}
        ack = Ack(epoch=batch.epoch, seq=batch.last)
        self.link.publish(topics.fleet(DEVICE, "ack"), msgspec.json.encode(ack), qos=1)
