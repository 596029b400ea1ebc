"""The chunk server: what to publish for the devices that ask for chunks. Pure: time is an argument.

It is fed requests and gives publications; the models come from a source that it is given. Chunks are published on
topics named by their content, so one publication serves every device that waits for it: requests that wait at the same
time are merged. The queue is bounded, and so are the bytes that the broker has not acknowledged. What does not fit is
dropped and counted; its device asks again.

Devices that heard of a model at the same moment are brought into step. A model's stream begins a moment after it was
first asked for. Then it waits for the slowest: each device listens a way ahead of what it asks for and says in each
request what reached it last, so the stream keeps at most that way ahead of it, and what is on its way to it is not sent
again. The stream does not wait for ever: it goes on at `LEAST_RATE` whoever lags behind, and who has not asked for
`ACTIVE_S` is not waited for.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, OrderedDict, deque
from typing import NamedTuple, Protocol

from protocol import topics
from protocol.errors import Rejected, Unavailable
from protocol.messages import ChunkRequest
from protocol.release import manifest_digests

MAX_WAITING = 8192
MAX_IN_FLIGHT_BYTES = 1024 * 1024
MAX_KNOWN_MODELS = 16
MAX_LISTENERS = 4096
GATHER_S = 0.5
MAX_AHEAD = 48
LEAST_RATE = 32.0
ACTIVE_S = 10.0


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
        gather_s: How long to wait for others before a stream begins.

    Attributes:
        ignored: How many requests, by reason: `bad_digest`, `unknown_model`, `bad_bitmap`; and how many chunks that
            did not fit the queue, as `overflow`, or that could not be read when their turn came, as `unreadable`.
        merged: How many chunks were asked for while they were waiting already, or on their way.
        published_chunks: How many were given out.
    """

    def __init__(
        self,
        source: Source,
        *,
        max_waiting: int = MAX_WAITING,
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
        gather_s: float = GATHER_S,
    ) -> None:
        self.ignored: Counter[str] = Counter()
        self.merged = 0
        self.published_chunks = 0
        self._source = source
        self._max_waiting = max_waiting
        self._max_in_flight_bytes = max_in_flight_bytes
        self._gather_s = gather_s
        self._manifests: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._in_flight: deque[int] = deque()
        self._in_flight_bytes = 0

    @property
    def waiting(self) -> int:
        """How many chunks wait to be published."""
        return sum(len(stream.waiting) for stream in self._streams.values())

    @property
    def listeners(self) -> int:
        """How many devices fetch something."""
        return sum(stream.listeners for stream in self._streams.values())

    @property
    def in_flight_bytes(self) -> int:
        """How many bytes are published and not acknowledged."""
        return self._in_flight_bytes

    def requested(self, request: ChunkRequest, now: float) -> None:
        """Queue what a device asks for; a request that makes no sense is counted and ignored.

        Args:
            request: As it came.
            now: Monotonic, in seconds.
        """
        try:
            topics.checked_digest(request.model)
            manifest, *digests = self._digests(request.model)
            indices = wanted_chunks(request.wanted, len(digests))
        except Rejected as refusal:
            self.ignored[refusal.code] += 1
            return
        except Unavailable:
            self.ignored["unreadable"] += 1
            return
        stream = self._streams.setdefault(request.model, _Stream())
        if (indices or not request.wanted) and stream.is_quiet(now):
            stream.begins_at = now + self._gather_s
        if not request.wanted:
            self._queue(stream, manifest, None)
            stream.waiting.move_to_end(manifest, last=False)
            return
        reached = stream.reached(request.device, request.last)
        if indices:
            stream.listens(request.device, now, stream.published if reached is None else reached)
        else:
            stream.leaves(request.device)
        for index in indices:
            if reached is None or stream.numbers.get(index, [0])[-1] <= reached:
                self._queue(stream, digests[index], index)
            else:
                self.merged += 1

    def next(self, now: float) -> Publication | None:
        """The next publication; `None` when nothing is due, or too much is unacknowledged."""
        for model, stream in list(self._streams.items()):
            while self.in_flight_bytes < self._max_in_flight_bytes and stream.is_due(now):
                digest, index = stream.waiting.popitem(last=False)
                try:
                    payload = self._source.manifest(model) if index is None else self._source.chunk(model, index)
                except (Rejected, Unavailable):
                    self.ignored["unreadable"] += 1
                    continue
                self._streams.move_to_end(model)  # models take turns
                if index is not None:
                    stream.published += 1
                    stream.numbers.setdefault(index, []).append(stream.published)
                self._in_flight.append(len(payload))
                self._in_flight_bytes += len(payload)
                self.published_chunks += 1
                return Publication(topics.chunk(digest), payload)
            if stream.is_quiet(now):
                del self._streams[model]
        return None

    def published(self) -> None:
        """The broker has acknowledged a publication (it does so in order: MQTT 5 section 4.6)."""
        if self._in_flight:
            self._in_flight_bytes -= self._in_flight.popleft()

    def disconnected(self) -> None:
        """The connection is lost: no acknowledgement will come. Devices ask again for what they miss."""
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def _queue(self, stream: _Stream, digest: str, index: int | None) -> None:
        if digest in stream.waiting:
            self.merged += 1
        elif index is not None and self.waiting >= self._max_waiting:
            self.ignored["overflow"] += 1
        else:
            stream.waiting[digest] = index

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


class _Listener(NamedTuple):
    """A device that fetches a model: when it asked last, and which publication had reached it by then."""

    at: float
    reached: int


class _Stream:
    """What is asked for of one model, and by whom.

    Attributes:
        waiting: Digest and index of each chunk to publish; the manifest has no index.
        begins_at: Until then, others are waited for.
        published: How many chunks were given out,
        numbers: and the numbers of each one's publications, by index.
    """

    def __init__(self) -> None:
        self.waiting: OrderedDict[str, int | None] = OrderedDict()
        self.begins_at = 0.0
        self.published = 0
        self.numbers: dict[int, list[int]] = {}
        self._listeners: OrderedDict[str, _Listener] = OrderedDict()  # who asked last stands last
        self._allowance = 0.0
        self._allowed_at = 0.0

    @property
    def listeners(self) -> int:
        """How many devices fetch the model."""
        return len(self._listeners)

    def reached(self, device: str, last: int | None) -> int | None:
        """The number of the publication that reached a device last; `None` where that is not known.

        Of several of one chunk, it was the first after what had reached the device before.
        """
        if last is None or last not in self.numbers:
            return None
        numbers = self.numbers[last]
        before = self._listeners[device].reached if device in self._listeners else numbers[-1] - 1
        return numbers[min(bisect_right(numbers, before), len(numbers) - 1)]

    def listens(self, device: str, now: float, reached: int) -> None:
        """A device has asked, and will ask for more."""
        self.leaves(device)
        self._listeners[device] = _Listener(now, reached)
        if len(self._listeners) > MAX_LISTENERS:
            self._listeners.popitem(last=False)

    def leaves(self, device: str) -> None:
        """A device has all it wants."""
        self._listeners.pop(device, None)

    def is_quiet(self, now: float) -> bool:
        """Nothing waits, and nobody will ask for more."""
        self._forget_silent(now)
        return not self.waiting and not self._listeners

    def is_due(self, now: float) -> bool:
        """Whether the next chunk may be published: no device lags too far behind, or it has been waited for enough."""
        if not self.waiting or now < self.begins_at:
            return False
        self._forget_silent(now)
        self._allowance = min(self._allowance + (now - self._allowed_at) * LEAST_RATE, LEAST_RATE / 2)
        self._allowed_at = now
        if self._allowance >= 1:
            self._allowance -= 1
            return True
        slowest = min((listener.reached for listener in self._listeners.values()), default=self.published)
        return self.published - slowest < MAX_AHEAD

    def _forget_silent(self, now: float) -> None:
        while self._listeners and now - next(iter(self._listeners.values())).at > ACTIVE_S:
            self._listeners.popitem(last=False)


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
    indices = []
    while bits:
        lowest = bits & -bits
        indices.append(lowest.bit_length() - 1)
        bits ^= lowest
    return indices
