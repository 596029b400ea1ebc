"""The process that brings a model here: verify the metadata, fetch the chunks, assemble, qualify.

It is started for one update and gone after it, yields to everybody else, and is the only one that writes in the model
store and in the folder of trusted metadata: it holds a lock on them while it lives, so a second one waits, also when
the first is the orphan of a supervisor that was killed. TUF, cryptography and the qualification of models are imported
here only. Nothing that arrives is believed: metadata by its signatures, a manifest, a chunk and a model each by the
SHA-256 that the level above names.
"""

from __future__ import annotations

import gc
import logging
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_agent import limits, trusted_time
from edge_agent.channel import Channel
from edge_agent.children import first_message, inherited_channel
from edge_agent.fetching import BrokerSource, ChunkSource
from edge_agent.model_store import ModelStore
from edge_agent.qualification import qualify
from edge_agent.sideload import BundleSource
from edge_agent.staging import (
    NO_SPACE,
    UNAVAILABLE,
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
    ToStager,
)
from edge_agent.transfer import CHUNK_MISMATCH, Bucket, Meter, Transfer
from edge_agent.trust import Trust, Verified, decoded_set
from edge_agent.trusted_time import TrustedTime
from protocol.bundle import Bundle
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.durable import is_full, write_durably
from protocol.errors import EdgeswapError, Misconfigured, Rejected, Unavailable
from protocol.lock import only_daemon
from protocol.release import CHUNK_BYTES, DIGEST_BYTES, Release, manifest_digests

log = logging.getLogger("edge_agent.stager")

TURN_S = 0.25
PROGRESS_S = 0.5
# How long a predecessor may take to notice that its supervisor has gone.
PREDECESSOR_S = 10.0


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
            EdgeswapError: The metadata set is not accepted, or another stager does not go away.
        """
        with only_daemon(Path(self._settings.folder), "stager", wait_s=PREDECESSOR_S):
            self._store.remove_leftovers()
            verified = self._verified()
            self._say(
                MetadataVerified(
                    verified.versions.timestamp,
                    verified.releases,
                    verified.wishes,
                    verified.signed_by,
                    verified.refused,
                )
            )
            releases = {release.digest: release for release in verified.releases}
            while (task := self._next_task()) is not None:
                release = releases.get(task.digest)
                if release is None:
                    self._say(Refused(task.digest, "not_released", "no signed release names it"))
                else:
                    self._say(self._staged(release))

    def _verified(self) -> Verified:
        settings = self._settings
        payload = self._payload()
        try:
            root = Path(settings.root_file).read_bytes()
        except OSError as error:
            raise Unavailable(f"cannot read {error.filename}: {error.strerror}") from error
        clock = TrustedTime(Path(settings.trust_folder).with_name(trusted_time.FILE))
        now = clock.now(time.time(), settings.built_at)
        verified = Trust(Path(settings.trust_folder), root).verify(decoded_set(payload), now)
        clock.accepted(now)
        if settings.bundle is not None:  # without it, nothing could be verified anew after a restart
            write_durably(Path(settings.metadata_file), payload)
        return verified

    def _payload(self) -> bytes:
        if self._settings.bundle is not None:
            with Bundle(Path(self._settings.bundle)) as bundle:
                return bundle.metadata_set()
        try:
            with Path(self._settings.metadata_file).open("rb") as file:
                return file.read(MAX_PAYLOAD_BYTES + 1)
        except OSError as error:
            raise Unavailable(f"cannot read {error.filename}: {error.strerror}") from error

    def _staged(self, release: Release) -> FromStager:
        """Stage one model, and say how that went."""
        digest = release.digest
        try:
            if digest not in self._store:
                trouble = self._fetched(release)
                if trouble is not None:
                    return trouble
            data = self._opened(digest)
            self._say(Qualifying(digest))
            with limits.deadline(self._settings.qualify_seconds):
                qualify(data, release)
        except Rejected as refusal:
            if refusal.code == CHUNK_MISMATCH:  # who sends wrong chunks must not get a signed model refused
                return Postponed(digest, refusal.code, refusal.text)
            return Refused(digest, refusal.code, refusal.text)
        except Unavailable as error:
            return Postponed(digest, NO_SPACE if is_full(error) else "disk", str(error))
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
        count = release.chunk_count
        try:
            self._store.require_room(release.manifest, release.length)
        except Unavailable as error:
            return Postponed(release.digest, NO_SPACE, str(error))
        source = self._source(release.digest)
        try:
            manifest = self._transfer(release, [release.manifest], [count * DIGEST_BYTES])
            trouble = source.fetch(manifest, 0, self._heed)
            if trouble is not None:
                return trouble
            digests = _checked_manifest(self._store.chunk(release.manifest), release)
            self._store.begin(release.manifest, digests, release.length)
            sizes = [CHUNK_BYTES] * (count - 1) + [release.length - CHUNK_BYTES * (count - 1)]
            transfer = self._transfer(release, digests, sizes)
            trouble = source.fetch(transfer, count, self._reporting(release.digest, transfer))
        finally:
            source.close()
        if trouble is None:
            self._store.assemble(release.digest)
        return trouble

    def _source(self, digest: str) -> ChunkSource:
        if self._settings.bundle is not None:
            try:
                return BundleSource(Bundle(Path(self._settings.bundle)), self._store, digest)
            except Rejected as refusal:  # it has changed since its metadata was read; the model is not to blame
                raise Unavailable(refusal.text) from refusal
        return BrokerSource(self._settings, self._store, digest, self._channel)

    def _transfer(self, release: Release, digests: Sequence[str], sizes: Sequence[int]) -> Transfer:
        settings = self._settings
        here = {digest for digest in set(digests) if self._store.has_chunk(digest)}
        return Transfer(
            digests,
            sizes,
            here,
            random.Random(f"{settings.device} {release.digest}"),
            window=settings.window,
            ahead=settings.ahead,
            timeout_s=settings.timeout_s,
            attempts=settings.attempts,
            bucket=Bucket(settings.max_rate) if settings.max_rate else None,
        )

    def _reporting(self, digest: str, transfer: Transfer) -> Callable[[], None]:
        """A source's `on_turn` that also tells how far the transfer has come, now and then."""
        meter = Meter()
        due = 0.0

        def turn() -> None:
            nonlocal due
            self._heed()
            now = time.monotonic()
            if transfer.done or now >= due:
                due = now + PROGRESS_S
                here = transfer.bytes_here
                self._say(Progress(digest, here, transfer.bytes_total, meter.rate(here, now)))

        return turn

    def _heed(self) -> None:
        """End when the supervisor says so, or has gone."""
        self._channel.flush()
        told = self._channel.receive()
        assert all(isinstance(message, Quit) for message in told), "one task at a time"
        if told or self._channel.closed:
            raise SystemExit(0)

    def _next_task(self) -> StageModel | None:
        """Wait for a task; `None` if there is none to come."""
        deadline = time.monotonic() + self._settings.idle_s
        while not self._channel.closed and time.monotonic() < deadline:
            select.select([self._channel], [], [], TURN_S)
            self._channel.flush()
            told = self._channel.receive()
            if any(isinstance(message, Quit) for message in told):  # perhaps behind a task
                return None
            for message in told:
                assert isinstance(message, StageModel), "the settings came first"
                return message
        return None

    def _say(self, message: FromStager) -> None:
        self._channel.send(message)


def _checked_manifest(manifest: bytes, release: Release) -> list[str]:
    digests = manifest_digests(manifest)
    if len(digests) != release.chunk_count:
        text = f"the manifest lists {len(digests)} chunks for a model of {release.chunk_count}"
        raise Rejected("bad_manifest", text, "manifest")
    return digests


def _reason(error: EdgeswapError) -> str:
    if isinstance(error, Rejected):
        return error.code
    if isinstance(error, Misconfigured):
        return "misconfigured"
    return NO_SPACE if isinstance(error, Unavailable) and is_full(error) else UNAVAILABLE


def main() -> int:
    """The stager's process."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's business
    limits.yield_to_others()
    gc.freeze()  # what was imported stays: a transfer's collections need not look at it
    channel: Channel[ToStager] = inherited_channel(sys.argv[1:], ToStager)
    settings = first_message(channel)
    if settings is None:
        return 0
    assert isinstance(settings, StagerSettings)
    limits.limit_memory(settings.memory_bytes)
    try:
        Stager(settings, channel).run()
    except EdgeswapError as error:
        channel.send(MetadataRefused(_reason(error), str(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
