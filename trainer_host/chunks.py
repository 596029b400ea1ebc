"""The chunk server: what to publish for the devices that ask for chunks.

It is fed requests and gives publications; the models come from a source that it is given. Chunks are published on
topics named by their content, so one publication serves every device that waits for it: requests that wait at the same
time are merged. The queue is bounded, and so are the bytes that the broker has not acknowledged. What does not fit is
dropped and counted; its device asks again.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from typing import NamedTuple, Protocol

from protocol import topics
from protocol.errors import Rejected
from protocol.messages import ChunkRequest
from protocol.release import manifest_digests

MAX_WAITING = 8192
MAX_IN_FLIGHT_BYTES = 1024 * 1024
MAX_KNOWN_MODELS = 16


class Source(Protocol):
    """Where models lie, e.g. a `trainer_host.repository.Repository`. Raises `Rejected` for an unknown model."""

    def manifest(self, digest: str) -> bytes:
        """A model's manifest."""

    def chunk(self, digest: str, index: int) -> bytes:
        """One chunk of a model."""


class Publication(NamedTuple):
    """A message to publish, at QoS 1."""

    topic: str
    payload: bytes


class ChunkServer:
    """Collects requests and gives out what answers them.

    Args:
        source: Where chunks come from.
        max_waiting: How many chunks may wait to be published.
        max_in_flight_bytes: How many bytes may be published and not yet acknowledged.

    Attributes:
        ignored: How many requests, by reason: `bad_digest`, `unknown_model`, `bad_bitmap`; and how many chunks that
            did not fit the queue, as `overflow`, or that could not be read when their turn came, as `unreadable`.
        merged: How many chunks were asked for while they were waiting already.
        published_chunks: How many were given out.
    """

    def __init__(
        self, source: Source, *, max_waiting: int = MAX_WAITING, max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES
    ) -> None:
        self.ignored: Counter[str] = Counter()
        self.merged = 0
        self.published_chunks = 0
        self._source = source
        self._max_waiting = max_waiting
        self._max_in_flight_bytes = max_in_flight_bytes
        self._manifests: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._waiting: OrderedDict[str, tuple[str, int | None]] = OrderedDict()
        self._in_flight: deque[int] = deque()

    @property
    def waiting(self) -> int:
        """How many chunks wait to be published."""
        return len(self._waiting)

    @property
    def in_flight_bytes(self) -> int:
        """How many bytes are published and not acknowledged."""
        return sum(self._in_flight)

    def requested(self, request: ChunkRequest) -> None:
        """Queue what a device asks for; a request that makes no sense is counted and ignored."""
        try:
            topics.checked_digest(request.model)
            manifest, *digests = self._digests(request.model)
            indices = wanted_chunks(request.wanted, len(digests))
        except Rejected as refusal:
            self.ignored[refusal.code] += 1
            return
        if not request.wanted:
            self._queue(manifest, request.model, None)
        for index in indices:
            self._queue(digests[index], request.model, index)

    def next(self) -> Publication | None:
        """The next publication; `None` when nothing waits, or too much is unacknowledged."""
        while self._waiting and self.in_flight_bytes < self._max_in_flight_bytes:
            digest, (model, index) = self._waiting.popitem(last=False)
            try:
                payload = self._source.manifest(model) if index is None else self._source.chunk(model, index)
            except Rejected:
                self.ignored["unreadable"] += 1
                continue
            self._in_flight.append(len(payload))
            self.published_chunks += 1
            return Publication(topics.chunk(digest), payload)
        return None

    def published(self) -> None:
        """The broker has acknowledged a publication (it does so in order: MQTT 5 section 4.6)."""
        if self._in_flight:
            self._in_flight.popleft()

    def disconnected(self) -> None:
        """The connection is lost: no acknowledgement will come. Devices ask again for what they miss."""
        self._in_flight.clear()

    def _queue(self, digest: str, model: str, index: int | None) -> None:
        if digest in self._waiting:
            self.merged += 1
        elif len(self._waiting) >= self._max_waiting:
            self.ignored["overflow"] += 1
        else:
            self._waiting[digest] = (model, index)

    def _digests(self, model: str) -> tuple[str, ...]:
        """The manifest's own digest, then those of the chunks. The models asked for last are remembered."""
        known = self._manifests.get(model)
        if known is None:
            manifest = self._source.manifest(model)
            known = (hashlib.sha256(manifest).hexdigest(), *manifest_digests(manifest))
            self._manifests[model] = known
            if len(self._manifests) > MAX_KNOWN_MODELS:
                self._manifests.popitem(last=False)
        self._manifests.move_to_end(model)
        return known


def wanted_chunks(wanted: bytes, count: int) -> list[int]:
    """The indices of the chunks in a request's bitmap, of a model of `count` chunks.

    Raises:
        Rejected: With code `bad_bitmap` when it is neither empty nor one bit for each chunk, padded with zeros.
    """
    if not wanted:
        return []
    bits = int.from_bytes(wanted, "little")
    if len(wanted) != -(-count // 8) or bits >> count:
        raise Rejected("bad_bitmap", f"a bitmap of {len(wanted)} bytes does not fit {count} chunks", "wanted")
    return [index for index in range(count) if bits >> index & 1]
