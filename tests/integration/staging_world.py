"""A device's stager as its supervisor starts it, a real Mosquitto, and a host that signs and sends whatever it is told.

Everything turns in the test's own thread.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import psutil  # type: ignore[import-untyped, unused-ignore]
from msgspec.structs import replace

from edge_agent.children import Child, start
from edge_agent.staging import (
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Progress,
    Qualifying,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
)
from protocol import topics
from protocol.codec import Decoder, encode
from protocol.link import Broker, Link, Message
from protocol.messages import ChunkRequest, MetadataSet
from protocol.release import Release, chunked, manifest_of
from tests.signing import Host
from trainer_host.chunks import wanted_chunks

T = TypeVar("T", bound=FromStager)

DEVICE = "pi-1"
DEADLINE_S = 30.0

# Topic and payload of what a host sends for one chunk; none, or more than one, if it is up to something.
Publications = Iterable[tuple[str, bytes]]

_requests: Decoder[ChunkRequest] = Decoder(ChunkRequest)


class StagingWorld:
    """One device, provisioned with the root of `host`.

    Args:
        folder: For everything.
        host: Signs.
        broker: Where it runs.

    Attributes:
        models: What chunk requests are answered from, by digest.
        meddle: May drop, alter or multiply what is sent.
        requests: That came.
        memory_bytes: The most that the stager was seen to use.
    """

    def __init__(self, folder: Path, host: Host, broker: Broker) -> None:
        self.host = host
        self.trust_folder = folder / "trust"
        self.models: dict[str, bytes] = {}
        self.meddle: Callable[[str, bytes], Publications] = lambda topic, payload: [(topic, payload)]
        self.requests: list[ChunkRequest] = []
        self.memory_bytes = 0
        self._broker = broker
        self._children: list[Child[FromStager]] = []
        self._link: Link | None = None
        (folder / "root.json").write_bytes(host.roots[0])
        self.settings = StagerSettings(
            device=DEVICE,
            folder=str(folder / "store"),
            trust_folder=str(self.trust_folder),
            root_file=str(folder / "root.json"),
            metadata_file=str(folder / "metadata"),
            built_at=0.0,
            broker=broker,
            reserve_bytes=0,
            window=4,
            timeout_s=0.5,
            attempts=6,
        )

    def look_at(self, metadata: MetadataSet | bytes, **settings: object) -> MetadataVerified | MetadataRefused:
        """What a stager says of a metadata set; it has ended when this returns."""
        child = self._start(metadata, **settings)
        said = self._heard(child, MetadataVerified | MetadataRefused)
        child.channel.send(Quit())
        self._wait(child, child.has_ended)
        assert child.how_it_ended() == "exit status 0"
        assert isinstance(said, MetadataVerified | MetadataRefused)
        return said

    def stage(self, metadata: MetadataSet, digest: str) -> Staged | Refused | Postponed:
        """What becomes of a model of a set that is accepted."""
        self._listen()
        child = self._start(metadata)
        assert isinstance(self._heard(child, MetadataVerified | MetadataRefused), MetadataVerified)
        child.channel.send(StageModel(digest))
        said = self._heard(child, Staged | Refused | Postponed)
        child.channel.send(Quit())
        self._wait(child, child.has_ended)
        assert isinstance(said, Staged | Refused | Postponed)
        return said

    def release(self, release: Release, model: bytes) -> MetadataSet:
        """Publish a model, and have its chunks ready."""
        self.models[release.digest] = model
        return self.host.publish(release)

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish anything, at QoS 0."""
        assert self._link is not None
        self._link.publish(topic, payload)

    def close(self) -> None:
        """End everything."""
        for child in self._children:
            child.kill()
        if self._link is not None:
            self._link.close()

    def _start(self, metadata: MetadataSet | bytes, **settings: object) -> Child[FromStager]:
        payload = metadata if isinstance(metadata, bytes) else encode(metadata, as_json=False)
        Path(self.settings.metadata_file).write_bytes(payload)
        child: Child[FromStager] = start("stager", replace(self.settings, **settings), FromStager, "stager")
        self._children.append(child)
        return child

    def _heard(self, child: Child[FromStager], kinds: object) -> FromStager:
        found: list[FromStager] = []

        def heard() -> bool:
            for message in child.channel.receive():
                if isinstance(message, kinds):  # type: ignore[arg-type]
                    found.append(message)
                else:
                    assert isinstance(message, Progress | Qualifying), message
            return bool(found)

        self._wait(child, heard)
        return found[0]

    def _wait(self, child: Child[FromStager], what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert time.monotonic() < deadline, f"the stager was silent: {child.process.poll()}"
            living = [] if child.channel.closed else [child.channel]
            if self._link is None:
                select.select(living, [], [], 0.02)
            else:
                self._link.turn(0.02, living)
                self._watch(child)

    def _watch(self, child: Child[FromStager]) -> None:
        if child.process.poll() is None:
            self.memory_bytes = max(self.memory_bytes, psutil.Process(child.pid).memory_info().rss)

    def _listen(self) -> None:
        if self._link is not None:
            return
        granted: list[int] = []
        self._link = Link(self._broker, "test-host", on_message=self._requested, on_subscribed=granted.append)
        self._link.subscribe((topics.CHUNK_REQUESTS, 1))
        deadline = time.monotonic() + DEADLINE_S
        while not granted:
            assert time.monotonic() < deadline, "the broker is silent"
            self._link.turn(0.05)

    def _requested(self, message: Message) -> None:
        request = _requests.decode(message.payload)
        self.requests.append(request)
        chunks = chunked(self.models[request.model])
        manifest = manifest_of(chunks)
        if not request.wanted:
            chunks, wanted = [manifest], [0]
        else:
            wanted = wanted_chunks(request.wanted, len(chunks))
        for index in wanted:
            for topic, payload in self.meddle(topics.chunk(manifest_of([chunks[index]]).hex()), chunks[index]):
                self.publish(topic, payload)
