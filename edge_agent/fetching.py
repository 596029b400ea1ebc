"""Where the chunks of a model come from: `BrokerSource` asks the host; `edge_agent.sideload` has them in a file.

Nothing that arrives is believed: a chunk is kept only if it has the SHA-256 that the manifest names, and the manifest
only if it has the one that the signed release names.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from edge_agent.model_store import CORRUPT_CHUNK, ModelStore
from edge_agent.staging import NO_ANSWER, NO_BROKER, Postponed, StagerSettings
from edge_agent.transfer import Transfer, bitmap
from protocol import topics
from protocol.codec import encode
from protocol.errors import Rejected
from protocol.link import HasFileno, Link, Message
from protocol.messages import ChunkRequest

log = logging.getLogger(__name__)

TURN_S = 0.25


class ChunkSource(Protocol):
    """Brings the chunks that a transfer misses into the store, for one model."""

    def fetch(self, transfer: Transfer, count: int, on_turn: Callable[[], None]) -> Postponed | None:
        """Drive a transfer to its end: each chunk of `transfer.missing` goes through `keep`.

        Args:
            transfer: What is missing.
            count: How many chunks the model has; 0 to fetch its manifest.
            on_turn: To be called between two chunks and every quarter of a second at least: it reports progress, and
                raises `SystemExit` when the supervisor wants the stager to end.

        Returns:
            Why it did not get there, if so.

        Raises:
            Rejected: With code `chunk_mismatch` or `corrupt_model`.
            Unavailable: The disk failed.
        """

    def close(self) -> None:
        """Let go of connection or file."""


def keep(store: ModelStore, transfer: Transfer, digest: str, data: bytes) -> bool:
    """Put what came under the name of a chunk into the store, if it is that chunk and it is missing.

    Raises:
        Rejected: With code `chunk_mismatch`: wrong data came under that name too often. With code `corrupt_model`: it
            is what the manifest lists, and does not fit into the model.
        Unavailable: The disk failed.
    """
    intact = digest in transfer.missing
    if intact:
        try:
            store.put_chunk(data, digest)
        except Rejected as refusal:
            if refusal.code != CORRUPT_CHUNK:
                raise
            intact = False
    return transfer.received(digest, time.monotonic(), intact=intact)


class BrokerSource:
    """A connection of its own, on which the chunks of one model come.

    A chunk's topic is subscribed to before the chunk is asked for, and only until it is here; a way ahead, so that a
    request seldom has to wait for the broker to grant it. At QoS 0: what is lost is asked for again anyway, and an
    acknowledgement for each chunk would cost as much as the chunk.

    Args:
        settings: Who we are, and where the broker is.
        store: Where chunks go.
        model: Digest of the model.
        channel: What to wait for besides the broker: the supervisor.
    """

    def __init__(self, settings: StagerSettings, store: ModelStore, model: str, channel: HasFileno) -> None:
        self._settings = settings
        self._store = store
        self._model = model
        self._channel = channel
        self._requests: dict[int, bytes] = {}
        self._arrived: deque[Message] = deque(maxlen=2 * (settings.window + settings.ahead))
        self._subscribed: set[str] = set()
        self._granted: set[str] = set()
        self._granting: dict[int, set[str]] = {}
        self._count = 0
        self._link = Link(
            settings.broker,
            f"{settings.device}-stager",
            on_message=self._hear,
            on_connected=self._begin_anew,
            on_subscribed=self._grant,
        )

    def _hear(self, message: Message) -> None:
        """Chunks are never retained: what is was left by somebody else, and would come again with each subscription."""
        if not message.retain:
            self._arrived.append(message)

    def fetch(self, transfer: Transfer, count: int, on_turn: Callable[[], None]) -> Postponed | None:
        """See `ChunkSource`."""
        connected_at = time.monotonic()
        self._count = count
        while not transfer.done:
            now = time.monotonic()
            if self._link.connected:
                connected_at = now
                self._ask(transfer, count, now)
            elif now - connected_at > self._settings.timeout_s * self._settings.attempts:
                return Postponed(self._model, NO_BROKER, f"no connection to {self._settings.broker.url}")
            if transfer.gave_up:
                text = f"the host did not send it though asked {self._settings.attempts} times"
                return Postponed(self._model, NO_ANSWER, text)
            wait_s = TURN_S if transfer.deadline is None else min(max(transfer.deadline - now, 0.0), TURN_S)
            self._link.turn(wait_s, [self._channel])
            while self._arrived:
                message = self._arrived.popleft()
                keep(self._store, transfer, message.topic.rpartition("/")[2], message.payload)
            on_turn()
        self._listen(set())
        if transfer.unasked or transfer.wrong:
            log.info("ignored %d chunks that were not missing, %d wrong", transfer.unasked, transfer.wrong.total())
        return None

    def close(self) -> None:
        """See `ChunkSource`. The host is told, so that it does not slow the others' stream for us."""
        if self._link.connected and self._count:
            self._link.publish(topics.CHUNK_REQUESTS, self._request((), self._count), qos=1)
        self._link.close()

    def _ask(self, transfer: Transfer, count: int, now: float) -> None:
        chosen = transfer.ask(now)
        if not chosen and self._subscribed:
            return
        packet = self._listen(transfer.audible(), set(chosen.values()))
        if not chosen:
            return
        request = self._request(chosen, count, transfer.last)
        if self._granted.issuperset(chosen.values()):
            self._link.publish(topics.CHUNK_REQUESTS, request, qos=1)
        else:
            self._requests[packet] = request

    def _request(self, indices: Collection[int], count: int, last: int | None = None) -> bytes:
        wanted = bitmap(indices, count) if count else b""
        request = ChunkRequest(device=self._settings.device, model=self._model, wanted=wanted, last=last)
        return encode(request, as_json=False)

    def _listen(self, digests: set[str], chosen: Collection[str] = ()) -> int:
        """Subscribe to these chunks and to no others. The broker grants the packet that is returned after all earlier.

        Where none is new and one of the chosen is not granted, all that are not are subscribed to again.
        """
        gone, new = self._subscribed - digests, digests - self._subscribed
        if gone:
            self._link.unsubscribe(*map(topics.chunk, gone))
            self._granted -= gone
        self._subscribed = digests
        if not new and not self._granted.issuperset(chosen):
            new = digests - self._granted
        if not new:
            return 0
        packet = self._link.subscribe(*((topics.chunk(digest), 0) for digest in new))
        self._granting[packet] = new
        return packet

    def _begin_anew(self) -> None:
        """The connection is another: what was granted on the last one is not, and no answer to it will come."""
        self._requests.clear()
        self._granting.clear()
        self._granted.clear()

    def _grant(self, packet: int) -> None:
        """The broker will deliver these chunks, so they may be asked for."""
        self._granted |= self._granting.pop(packet, set()) & self._subscribed
        request = self._requests.pop(packet, None)
        if request is not None:
            self._link.publish(topics.CHUNK_REQUESTS, request, qos=1)
