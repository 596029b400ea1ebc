"""The process that brings a model here: verify the metadata, fetch the chunks, assemble, qualify.

It is started for one update and gone after it, and lowers its own priority. TUF, cryptography and the qualification of
models are imported here only. Nothing that arrives is believed: metadata by its signatures, a manifest, a chunk and a
model each by the SHA-256 that the level above names.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import select
import signal
import sys
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.channel import Channel
from edge_agent.children import first_message, inherited_channel
from edge_agent.model_store import ModelStore
from edge_agent.qualification import qualify
from edge_agent.staging import (
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Progress,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
    ToStager,
)
from edge_agent.transfer import CHUNK_MISMATCH, Transfer, bitmap
from edge_agent.trust import Trust, Verified, decoded_set
from protocol import topics
from protocol.codec import MAX_PAYLOAD_BYTES, encode
from protocol.errors import EdgeswapError, Misconfigured, Rejected, Unavailable
from protocol.link import Link, Message
from protocol.messages import ChunkRequest
from protocol.release import CHUNK_BYTES, DIGEST_BYTES, Release, manifest_digests

log = logging.getLogger("edge_agent.stager")

TURN_S = 0.25
PROGRESS_S = 0.5


class Stager:
    """Does what the supervisor says until it says `Quit`, goes away, or has nothing to say.

    Args:
        settings: Where everything is.
        channel: To the supervisor.
    """

    def __init__(self, settings: StagerSettings, channel: Channel[ToStager]) -> None:
        self._settings = settings
        self._channel = channel
        self._store = ModelStore(Path(settings.folder), reserve_bytes=settings.reserve_bytes)

    def run(self) -> None:
        """Verify the metadata set, then stage models.

        Raises:
            EdgeswapError: The metadata set is not accepted.
        """
        verified = self._verified()
        self._say(MetadataVerified(verified.versions.timestamp, verified.releases))
        releases = {release.digest: release for release in verified.releases}
        while (task := self._next_task()) is not None:
            release = releases.get(task.digest)
            if release is None:
                self._say(Refused(task.digest, "not_released", "no signed release names it"))
            else:
                self._say(self._staged(release))

    def _verified(self) -> Verified:
        settings = self._settings
        try:
            with Path(settings.metadata_file).open("rb") as file:
                payload = file.read(MAX_PAYLOAD_BYTES + 1)
            root = Path(settings.root_file).read_bytes()
        except OSError as error:
            raise Unavailable(f"cannot read {error.filename}: {error.strerror}") from error
        now = datetime.fromtimestamp(max(time.time(), settings.built_at), UTC)
        return Trust(Path(settings.trust_folder), root).verify(decoded_set(payload), now)

    def _staged(self, release: Release) -> FromStager:
        """Stage one model, and say how that went."""
        digest = release.digest
        try:
            if digest not in self._store:
                trouble = self._fetched(release)
                if trouble is not None:
                    return trouble
            qualify(self._opened(digest), release)
        except Rejected as refusal:
            if refusal.code == CHUNK_MISMATCH:  # who sends wrong chunks must not get a signed model refused
                return Postponed(digest, refusal.code, refusal.text)
            return Refused(digest, refusal.code, refusal.text)
        except Unavailable as error:
            return Postponed(digest, "disk", str(error))
        except Misconfigured as error:
            return Postponed(digest, "misconfigured", str(error))
        return Staged(digest)

    def _opened(self, digest: str) -> bytes:
        """A model's bytes. A file that is not what was stored rotted; the signed model is not to blame."""
        try:
            return self._store.open(digest)
        except Rejected as refusal:  # the file is set aside: the next attempt fetches the model again
            raise Unavailable(refusal.text) from refusal

    def _fetched(self, release: Release) -> Postponed | None:
        """Fetch what is missing of a model, and join it."""
        fetching = Fetching(self._settings, self._channel, self._store, release.digest)
        try:
            count = release.chunk_count
            trouble = fetching.fetch(self._transfer(release, [release.manifest], [count * DIGEST_BYTES]), 0)
            if trouble is not None:
                return trouble
            digests = _checked_manifest(self._store.chunk(release.manifest), release)
            sizes = [CHUNK_BYTES] * (count - 1) + [release.length - CHUNK_BYTES * (count - 1)]
            transfer = self._transfer(release, digests, sizes)
            missing_bytes = transfer.bytes_total - transfer.bytes_here
            try:
                self._store.require_free(missing_bytes + release.length, self._settings.reserve_bytes)
            except Unavailable as error:
                return Postponed(release.digest, "no_space", str(error))
            trouble = fetching.fetch(transfer, count)
        finally:
            fetching.close()
        if trouble is None:
            self._store.assemble(digests, release.digest, release.length)
        return trouble

    def _transfer(self, release: Release, digests: list[str], sizes: list[int]) -> Transfer:
        settings = self._settings
        here = {digest for digest in set(digests) if self._store.has_chunk(digest)}
        return Transfer(
            digests,
            sizes,
            here,
            random.Random(f"{settings.device} {release.digest}"),
            window=settings.window,
            timeout_s=settings.timeout_s,
            attempts=settings.attempts,
        )

    def _next_task(self) -> StageModel | None:
        """Wait for a task; `None` if there is none to come."""
        deadline = time.monotonic() + self._settings.idle_s
        while not self._channel.closed and time.monotonic() < deadline:
            select.select([self._channel], [], [], TURN_S)
            self._channel.flush()
            for message in self._channel.receive():
                return message if isinstance(message, StageModel) else None
        return None

    def _say(self, message: FromStager) -> None:
        self._channel.send(message)


class Fetching:
    """A connection of its own, on which the chunks of one model come.

    A chunk's topic is subscribed to before the chunk is asked for, and only until it is here.

    Args:
        settings: Who we are, and where the broker is.
        channel: To the supervisor, for progress; when the supervisor goes away, so do we.
        store: Where chunks go.
        model: Digest of the model.
    """

    def __init__(self, settings: StagerSettings, channel: Channel[ToStager], store: ModelStore, model: str) -> None:
        self._settings = settings
        self._channel = channel
        self._store = store
        self._model = model
        self._requests: dict[int, bytes] = {}
        self._arrived: deque[Message] = deque(maxlen=2 * settings.window)
        self._finished: list[str] = []
        self._told_at = 0.0
        self._link = Link(
            settings.broker,
            f"{settings.device}-stager",
            on_message=self._arrived.append,
            on_connected=self._requests.clear,
            on_subscribed=self._subscribed,
        )

    def fetch(self, transfer: Transfer, count: int) -> Postponed | None:
        """Drive a transfer to its end.

        Args:
            transfer: What is missing.
            count: How many chunks the model has; 0 to fetch its manifest.

        Returns:
            Why it did not get there, if so.

        Raises:
            Rejected: With code `chunk_mismatch`.
            Unavailable: The disk failed.
        """
        connected_at = time.monotonic()
        while not transfer.done:
            now = time.monotonic()
            if self._link.connected:
                connected_at = now
                self._ask(transfer, count, now)
            elif now - connected_at > self._settings.timeout_s * self._settings.attempts:
                return Postponed(self._model, "no_broker", f"no connection to {self._settings.broker.url}")
            if transfer.gave_up:
                text = f"the host did not send it though asked {self._settings.attempts} times"
                return Postponed(self._model, "no_answer", text)
            self._turn(transfer, now)
            while self._arrived:
                self._take(self._arrived.popleft(), transfer)
            if count:
                self._tell(transfer)
        self._unsubscribe()
        if transfer.unasked or transfer.wrong:
            log.warning("ignored %d chunks nobody asked for, %d wrong", transfer.unasked, transfer.wrong.total())
        return None

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def _ask(self, transfer: Transfer, count: int, now: float) -> None:
        chosen = transfer.ask(now)
        if not chosen:
            return
        self._unsubscribe()
        packet = self._link.subscribe(*((topics.chunk(digest), 1) for digest in chosen.values()))
        wanted = bitmap(chosen, count) if count else b""
        request = ChunkRequest(device=self._settings.device, model=self._model, wanted=wanted)
        self._requests[packet] = encode(request, as_json=False)

    def _subscribed(self, packet: int) -> None:
        """The broker will deliver these chunks, so they may be asked for."""
        request = self._requests.pop(packet, None)
        if request is not None:
            self._link.publish(topics.CHUNK_REQUESTS, request, qos=1)

    def _turn(self, transfer: Transfer, now: float) -> None:
        wait_s = TURN_S if transfer.deadline is None else min(max(transfer.deadline - now, 0.0), TURN_S)
        if self._link.turn(wait_s, [self._channel]):
            told = self._channel.receive()
            assert all(isinstance(message, Quit) for message in told), "one task at a time"
            if told or self._channel.closed:
                raise SystemExit(0)
        self._channel.flush()

    def _take(self, message: Message, transfer: Transfer) -> None:
        digest = message.topic.rpartition("/")[2]
        intact = len(message.payload) <= CHUNK_BYTES and hashlib.sha256(message.payload).hexdigest() == digest
        if transfer.received(digest, time.monotonic(), intact=intact):
            self._store.put_chunk(message.payload)
            self._finished.append(message.topic)

    def _unsubscribe(self) -> None:
        if self._finished:
            self._link.unsubscribe(*self._finished)
            self._finished.clear()

    def _tell(self, transfer: Transfer) -> None:
        now = time.monotonic()
        if transfer.done or now - self._told_at >= PROGRESS_S:
            self._told_at = now
            self._channel.send(Progress(self._model, transfer.bytes_here, transfer.bytes_total))


def _checked_manifest(manifest: bytes, release: Release) -> list[str]:
    digests = manifest_digests(manifest)
    if len(digests) != release.chunk_count:
        text = f"the manifest lists {len(digests)} chunks for a model of {release.chunk_count}"
        raise Rejected("bad_manifest", text, "manifest")
    return digests


def _reason(error: EdgeswapError) -> str:
    if isinstance(error, Rejected):
        return error.code
    return "misconfigured" if isinstance(error, Misconfigured) else "unavailable"


def main() -> int:
    """The stager's process."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's business
    os.nice(10)
    channel: Channel[ToStager] = inherited_channel(sys.argv[1:], ToStager)
    settings = first_message(channel)
    if settings is None:
        return 0
    assert isinstance(settings, StagerSettings)
    try:
        Stager(settings, channel).run()
    except EdgeswapError as error:
        channel.send(MetadataRefused(_reason(error), str(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
