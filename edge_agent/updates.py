"""The supervisor's side of an update: from the signed metadata set on the broker to a qualified model in the store.

The set is written to disk as it came, and a stager child is started: it alone verifies, fetches and qualifies. Verified
releases are offered to the slots; those that want theirs staged say so, and the stager goes on. One stager runs at a
time.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

from edge_agent.children import Child, start
from edge_agent.durable import write_durably
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
)
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.errors import Unavailable
from protocol.release import Release

log = logging.getLogger(__name__)

STALL_LIMIT_S = 180.0
FIRST_RETRY_S = 30.0
LAST_RETRY_S = 3600.0


class Updates:
    """Runs stagers.

    Args:
        settings: For each stager.
        metadata_file: Where the newest metadata set is kept; the stager's settings name it too.
        on_verified: Called with the metadata's version and the verified releases.
        on_metadata_refused: Called with the reason and a text.
        on_staged: Called with the digest of a model that is complete and qualified.
        on_refused: Called with digest, reason and text of one that never will be.
        on_postponed: Called with digest, reason and text of one that could not be had now.
        on_stager_died: Called with the digest that was being staged, and how the stager ended.
    """

    def __init__(
        self,
        settings: StagerSettings,
        metadata_file: Path,
        *,
        on_verified: Callable[[int, tuple[Release, ...]], None],
        on_metadata_refused: Callable[[str, str], None],
        on_staged: Callable[[str], None],
        on_refused: Callable[[str, str, str], None],
        on_postponed: Callable[[str, str, str], None],
        on_stager_died: Callable[[str, str], None],
    ) -> None:
        self._settings = settings
        self._metadata_file = metadata_file
        self._on_verified = on_verified
        self._on_metadata_refused = on_metadata_refused
        self._on_staged = on_staged
        self._on_refused = on_refused
        self._on_postponed = on_postponed
        self._on_stager_died = on_stager_died
        self._stager: Child[FromStager] | None = None
        self._verified = False
        self._settled = False
        self._stopped = False
        self._heard_at = 0.0
        self._wanted: list[str] = []
        self._current: str | None = None
        self._seen: bytes | None = None
        self._fresh = False
        self._retry_s = FIRST_RETRY_S
        self._retry_at: float | None = None
        self.progress: dict[str, float] = {}
        self.metadata_version = 0

    @property
    def child(self) -> Child[FromStager] | None:
        """The stager, while there is one."""
        return self._stager

    @property
    def busy(self) -> bool:
        """Whether something is being fetched, or will be again."""
        return self._stager is not None or self._fresh or self._retry_at is not None

    def metadata_arrived(self, payload: bytes) -> None:
        """Keep a metadata set and have it verified, unless it is the one that was looked at last."""
        if payload == self._seen:
            return
        if not 0 < len(payload) <= MAX_PAYLOAD_BYTES:
            text = f"a metadata set of {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} are possible"
            self._on_metadata_refused("malformed" if not payload else "too_long", text)
            self._seen = payload
            return
        try:
            write_durably(self._metadata_file, payload)
        except Unavailable as error:
            log.error("cannot keep the metadata set: %s", error)
            return
        self._seen = payload
        self._fresh = True
        self._retry_s = FIRST_RETRY_S

    def look_again(self) -> None:
        """Verify the kept metadata set, e.g. after a restart."""
        self._fresh = self._metadata_file.exists()

    def stage(self, digest: str) -> None:
        """Have a model staged that a verified release names."""
        if digest not in self._wanted:
            self._wanted.append(digest)
        if self._stager is None:
            self._fresh = True
        self._next()

    def cancel(self, digest: str) -> None:
        """Stop staging a model."""
        self.progress.pop(digest, None)
        if digest in self._wanted:
            self._wanted.remove(digest)
        if digest == self._current and self._stager is not None:
            self._stager.kill()
            self._stager, self._current = None, None
            self._fresh = True

    def tick(self, now: float) -> None:
        """Start a stager when there is something to look at, end one that hangs."""
        if self._stager is not None and now - self._heard_at > STALL_LIMIT_S:
            log.error("the stager gives no sign; killing it")
            self._stager.process.kill()
            self._ended(self._stager, now)
        if self._stopped:
            return
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at, self._fresh = None, True
        if self._fresh and self._stager is None and self._metadata_file.exists():
            self._fresh = self._verified = self._settled = False
            self._heard_at = now
            try:
                self._stager = start("stager", self._settings, FromStager, "stager")
            except Unavailable as error:
                log.error("%s", error)
                self._retry_at = now + FIRST_RETRY_S

    def receive(self, child: Child[FromStager], now: float) -> None:
        """Deal with what the stager said, or with its end."""
        self._heard_at = now
        for message in child.channel.receive():
            self._heard(message, now)
        if child.channel.closed and child is self._stager:
            self._ended(child, now)

    def stop(self) -> None:
        """End the stager and start no other; what it has fetched stays on disk."""
        self._stopped = True
        if self._stager is not None:
            self._stager.kill()
            self._stager = None

    def _heard(self, message: FromStager, now: float) -> None:
        match message:
            case MetadataVerified():
                self._verified = self._settled = True
                self.metadata_version = message.version
                self._on_verified(message.version, message.releases)
            case MetadataRefused():
                self._settled = message.reason != "unavailable"
                self._on_metadata_refused(message.reason, message.text)
            case Progress():
                self.progress[message.digest] = message.bytes / max(message.total, 1)
            case Staged():
                self._done(message.digest)
                self._on_staged(message.digest)
            case Refused():
                self._done(message.digest)
                self._on_refused(message.digest, message.reason, message.text)
            case Postponed():
                self._done(message.digest)
                self._retry_later(now)
                self._on_postponed(message.digest, message.reason, message.text)
        self._next()

    def _done(self, digest: str) -> None:
        self.progress.pop(digest, None)
        self._current = None
        if digest in self._wanted:
            self._wanted.remove(digest)

    def _next(self) -> None:
        """Give the stager its next task, or let it go."""
        if self._stager is None or not self._verified or self._current is not None:
            return
        if self._wanted:
            self._current = self._wanted[0]
            self._stager.channel.send(StageModel(self._current))
        else:
            self._verified = False  # what is wanted from now on is for the next one
            self._stager.channel.send(Quit())

    def _retry_later(self, now: float) -> None:
        self._retry_at = now + self._retry_s * random.uniform(0.75, 1.25)
        self._retry_s = min(self._retry_s * 2, LAST_RETRY_S)

    def _ended(self, child: Child[FromStager], now: float) -> None:
        child.kill()
        self._stager = None
        digest, self._current = self._current, None
        if digest is not None:
            self._wanted.remove(digest)
            self.progress.pop(digest, None)
            self._on_stager_died(digest, child.how_it_ended())
        elif self._wanted or not self._settled:
            log.warning(
                "the metadata set could not be used (stager: %s); looking at it again later", child.how_it_ended()
            )
            self._retry_later(now)
