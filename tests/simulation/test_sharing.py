"""Fifty devices fetch one model at the same time: how often each of its bytes is published.

Real transfers and the real chunk server, over a simulated broker in simulated time: each device has its own latency and
speed, starts at its own moment, and loses some of what is sent to it. What a device does between the two is what
`edge_agent.fetching.BrokerSource` does: subscribe, then ask once the broker has granted it.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable, Collection
from itertools import count
from typing import NamedTuple

import pytest

from edge_agent.staging import StagerSettings
from edge_agent.transfer import Transfer, bitmap
from protocol.errors import Rejected
from protocol.link import Broker
from protocol.messages import ChunkRequest
from protocol.release import CHUNK_BYTES
from trainer_host.chunks import LEAST_RATE, ChunkServer, Publication

MODEL = hashlib.sha256(b"model").hexdigest()
MODEL_BYTES = 100 * 1024 * 1024
HOST_RATE = 40e6  # bytes per second, to the broker
HOST_TURN_S = 0.25
LIMIT_S = 3600.0
# Mosquitto drops what is queued for a client beyond max_queued_messages.
MAX_QUEUED = 1000
DEFAULTS = StagerSettings(
    device="", folder="", trust_folder="", root_file="", metadata_file="", built_at=0.0, broker=Broker()
)


class Model:
    """One model of so many chunks; what is in them does not matter here."""

    def __init__(self, size: int) -> None:
        self.chunks = [hashlib.sha256(b"chunk %d" % index).hexdigest() for index in range(-(-size // CHUNK_BYTES))]
        self.data = b"".join(map(bytes.fromhex, self.chunks))
        self.name = hashlib.sha256(self.data).hexdigest()
        self._chunk = bytes(CHUNK_BYTES)

    def manifest(self, digest: str) -> bytes:
        if digest != MODEL:
            raise Rejected("unknown_model", digest)
        return self.data

    def chunk(self, digest: str, index: int) -> bytes:
        assert (digest, index < len(self.chunks)) == (MODEL, True)
        return self._chunk


class Conditions(NamedTuple):
    """What the world is like.

    Attributes:
        devices: How many.
        jitter_s: Within which they start.
        rates: Slowest and fastest of their connections, bytes per second.
        loss: Share of the deliveries that are lost.
        vanishing: How many stop for ever, half way.
    """

    devices: int = 50
    jitter_s: float = 2.0
    rates: tuple[float, float] = (2.5e6, 12e6)
    loss: float = 0.001
    vanishing: int = 0


class World:
    """Time, the broker and the host."""

    def __init__(self, seed: int, conditions: Conditions) -> None:
        self.rng = random.Random(seed)
        self.conditions = conditions
        self.now = 0.0
        self.published_bytes = 0
        self.longest_queue = 0
        self._order = count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.model = Model(MODEL_BYTES)
        self._server = ChunkServer(self.model)
        self._host_free_at = 0.0
        self.devices = [Device(self, number) for number in range(conditions.devices)]
        self._host_turns()

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), do))

    def run(self) -> None:
        while not all(device.finished for device in self.devices):
            self.now, _, do = heapq.heappop(self._due)
            assert self.now < LIMIT_S, [device.state for device in self.devices if not device.finished]
            do()

    def ask(self, request: ChunkRequest) -> None:
        """A request reaches the host."""
        self._server.requested(request, self.now)
        self._serve()

    def _host_turns(self) -> None:
        self._serve()
        self.at(self.now + HOST_TURN_S, self._host_turns)

    def _serve(self) -> None:
        while (publication := self._server.next(self.now)) is not None:
            self._host_free_at = max(self._host_free_at, self.now) + len(publication.payload) / HOST_RATE
            self.at(self._host_free_at, lambda sent=publication: self._arrive(sent))  # type: ignore[misc]

    def _arrive(self, publication: Publication) -> None:
        """At the broker, which acknowledges and passes on to those who have subscribed."""
        self._server.published()
        self.published_bytes += len(publication.payload)
        digest = publication.topic.rpartition("/")[2]
        for device in self.devices:
            if digest in device.subscribed:
                self.longest_queue = max(self.longest_queue, device.deliver(digest, len(publication.payload)))
        self._serve()


class Device:
    """A stager's transfer over a connection of its own."""

    def __init__(self, world: World, number: int) -> None:
        rng, conditions = world.rng, world.conditions
        self.name = f"pi{number}"
        self.subscribed: set[str] = set()
        self.finished = False
        self.finished_at = LIMIT_S
        self._world = world
        self._latency_s = rng.uniform(0.002, 0.06)
        slowest, fastest = conditions.rates
        self._rate = slowest * (fastest / slowest) ** rng.random()
        self._vanishes = number < conditions.vanishing
        self._link_free_at = 0.0
        self._queued: deque[float] = deque()
        self._heard: set[str] = set()
        self._transfer = self._of([world.model.name], [len(world.model.data)])
        self._count = 0
        world.at(rng.uniform(0.0, conditions.jitter_s), self._turn)

    @property
    def state(self) -> tuple[str, int, float | None]:
        return self.name, len(self._transfer.missing), self._transfer.deadline

    def deliver(self, digest: str, size: int) -> int:
        """The broker sends a chunk down this device's connection. Returns how many are on their way."""
        world = self._world
        while self._queued and self._queued[0] <= world.now:
            self._queued.popleft()
        if world.rng.random() >= world.conditions.loss and len(self._queued) < MAX_QUEUED:
            self._link_free_at = max(self._link_free_at, world.now) + size / self._rate
            self._queued.append(self._link_free_at)
            world.at(self._link_free_at + self._latency_s, lambda: self._received(digest))
        return len(self._queued)

    def _of(self, digests: list[str], sizes: list[int]) -> Transfer:
        rng = random.Random(self._world.rng.random())
        return Transfer(digests, sizes, (), rng, window=DEFAULTS.window, ahead=DEFAULTS.ahead)

    def _received(self, digest: str) -> None:
        if self.finished:
            return
        self._transfer.received(digest, self._world.now, intact=True)
        if self._vanishes and self._count and 2 * self._transfer.bytes_here > self._transfer.bytes_total:
            self.finished = True
            self.subscribed = set()
            return
        if self._transfer.done:
            self._next_stage()
        else:
            self._ask()

    def _next_stage(self) -> None:
        """The manifest is here, and then the model."""
        self._listen(set())
        if self._count:
            self.finished = True
            self.finished_at = self._world.now
            self._send(self._request(()))
            return
        chunks = self._world.model.chunks
        self._count = len(chunks)
        self._transfer = self._of(chunks, [CHUNK_BYTES] * len(chunks))
        self._ask()

    def _turn(self) -> None:
        if not self.finished:
            self._ask()
            self._world.at(self._world.now + 0.25, self._turn)

    def _ask(self) -> None:
        chosen = self._transfer.ask(self._world.now)
        assert not self._transfer.gave_up
        if chosen or not self._heard:
            self._listen(self._transfer.audible())
        if chosen:
            request = self._request(chosen, self._transfer.last)
            self._world.at(self._world.now + 2 * self._latency_s, lambda: self._send(request))

    def _listen(self, digests: set[str]) -> None:
        self._heard = digests

        def subscribe() -> None:
            self.subscribed = digests

        self._world.at(self._world.now + self._latency_s, subscribe)

    def _request(self, indices: Collection[int], last: int | None = None) -> ChunkRequest:
        wanted = bitmap(indices, self._count) if self._count else b""
        return ChunkRequest(device=self.name, model=MODEL, wanted=wanted, last=last)

    def _send(self, request: ChunkRequest) -> None:
        self._world.at(self._world.now + self._latency_s, lambda: self._world.ask(request))


def fetched(seed: int, conditions: Conditions) -> World:
    world = World(seed, conditions)
    world.run()
    return world


def share(world: World) -> float:
    """Bytes published over the model's bytes."""
    return world.published_bytes / MODEL_BYTES


def most_on_their_way() -> int:
    """What a device listens to, and what it listened to while that was on its way."""
    return 2 * (DEFAULTS.window + DEFAULTS.ahead)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fifty_devices_that_start_together_share_each_publication(seed: int) -> None:
    """Where one chunk in a thousand is lost, some device loses 1 - 0.999^50 = 5% of the chunks."""
    world = fetched(seed, Conditions())
    assert share(world) <= 1.2
    assert world.longest_queue <= most_on_their_way()


def test_where_nothing_is_lost_hardly_a_byte_is_published_twice() -> None:
    assert share(fetched(4, Conditions(loss=0.0))) <= 1.1


def test_one_device_alone_has_each_byte_published_once() -> None:
    assert share(fetched(5, Conditions(devices=1, loss=0.0))) <= 1.01


def test_devices_that_vanish_half_way_hold_up_nobody_for_long() -> None:
    alone = fetched(6, Conditions(devices=1, rates=(2.5e6, 2.5e6)))
    world = fetched(6, Conditions(vanishing=10))
    assert share(world) <= 1.2
    assert world.now <= 2 * alone.now


def test_devices_that_start_within_a_minute_join_the_stream_where_it_is() -> None:
    """A transfer takes about a minute too: hardly two are at the same place by themselves."""
    world = fetched(7, Conditions(jitter_s=60.0))
    assert share(world) <= 4.0
    assert world.longest_queue <= most_on_their_way()


def test_much_slower_devices_queue_no_more_than_they_listen_to_and_hold_up_the_fast_ones_within_bounds() -> None:
    """The stream goes on at its least rate, of which those who lag behind take a part."""
    world = fetched(8, Conditions(devices=20, rates=(0.3e6, 12e6)))
    assert world.longest_queue <= most_on_their_way()
    assert min(device.finished_at for device in world.devices) <= 3 * MODEL_BYTES / (CHUNK_BYTES * LEAST_RATE)
