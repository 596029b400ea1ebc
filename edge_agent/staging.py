"""What supervisor and stager say to each other. Light: the supervisor imports this, and neither TUF nor NumPy."""

from __future__ import annotations

from msgspec import Struct

from edge_agent.limits import MODEL_MEMORY_BYTES
from protocol.link import Broker
from protocol.messages import TransferStatus
from protocol.release import Release
from protocol.wishes import Pin, Withdrawal

NO_SPACE, UNAVAILABLE = "no_space", "unavailable"
NO_BROKER = "no_broker"
NO_ANSWER = "no_answer"
# Reasons that say nothing about this device: it waits.
HOST_AWAY = frozenset({NO_BROKER, NO_ANSWER})

# To a stager.


class StagerSettings(Struct, frozen=True, kw_only=True, tag=True):
    """A stager's first message.

    Attributes:
        device: This device's name.
        folder: Of the model store.
        trust_folder: Where accepted metadata is remembered; losing it loses the protection from older metadata.
        root_file: The root of trust the device was provisioned with.
        metadata_file: The metadata set to verify, as it came from the broker; with a bundle, where to put the one that
            is in it once it is verified.
        built_at: When this software was built, seconds since the epoch: no clock that is earlier is believed.
        broker: Where to fetch chunks.
        bundle: A sideload file: metadata and chunks come from it, and no broker is needed.
        reserve_bytes: Disk space that staging leaves to others.
        max_rate: How many bytes of chunks to ask for in a second; 0 for as many as come.
        memory_bytes: How much more memory than at its start the stager may take.
        qualify_seconds: How long a model may take to qualify.
        window: How many chunks to ask for at a time.
        ahead: How many more to listen to, so as to take what other devices ask for.
        timeout_s: How long to wait for a chunk before it is asked for again.
        attempts: How often in a row to ask in vain before giving up.
        idle_s: How long to wait for a task before ending.
    """

    device: str
    folder: str
    trust_folder: str
    root_file: str
    metadata_file: str
    built_at: float
    broker: Broker
    bundle: str | None = None
    reserve_bytes: int = 64 * 1024 * 1024
    max_rate: int = 0
    memory_bytes: int = MODEL_MEMORY_BYTES
    qualify_seconds: float = 120.0
    window: int = 24
    ahead: int = 48
    timeout_s: float = 5.0
    attempts: int = 5
    idle_s: float = 60.0


class StageModel(Struct, frozen=True, tag=True):
    """Fetch, assemble and qualify the model that a verified release names."""

    digest: str


class Quit(Struct, frozen=True, tag=True):
    """There is nothing more to do; end."""


ToStager = StagerSettings | StageModel | Quit


# From a stager.


class BadRelease(Struct, frozen=True):
    """A signed target that this software understands as no release; the others are not its fault."""

    target: str
    reason: str
    text: str


class MetadataVerified(Struct, frozen=True, tag=True):
    """The metadata set is accepted.

    Attributes:
        version: Of its timestamp.
        releases: All that it names.
        wishes: The operator's.
        signed_by: Identifiers of the keys that validly signed its targets.
        refused: What it names and is no release.
    """

    version: int
    releases: tuple[Release, ...] = ()
    wishes: tuple[Pin | Withdrawal, ...] = ()
    signed_by: tuple[str, ...] = ()
    refused: tuple[BadRelease, ...] = ()


class MetadataRefused(Struct, frozen=True, tag=True):
    """The metadata set is not accepted; the stager ends.

    The reason is one of `edge_agent.trust`, or, where it was not looked at to the end, `no_space` or `unavailable` (the
    disk), or `misconfigured`.
    """

    reason: str
    text: str


class Progress(Struct, frozen=True, tag=True):
    """How much of a model is on disk.

    Attributes:
        digest: Of the model.
        bytes: That are here.
        total: That it has.
        rate: Bytes per second, lately.
        waiting: Why nothing comes at present; empty while something does. The supervisor fills it in.
    """

    digest: str
    bytes: int
    total: int
    rate: float = 0.0
    waiting: str = ""

    def status(self) -> TransferStatus:
        """For the status message."""
        left = self.total - self.bytes
        return TransferStatus(
            bytes=self.bytes,
            total=self.total,
            rate_bytes_s=round(self.rate),
            seconds_left=round(left / self.rate, 1) if self.rate > 0 else None,
            waiting=self.waiting,
        )


class Qualifying(Struct, frozen=True, tag=True):
    """The model is complete, and is loaded now: if the stager dies from here on, it died of the model."""

    digest: str


class Staged(Struct, frozen=True, tag=True):
    """The model is complete, verified and qualified, and in the store."""

    digest: str


class Refused(Struct, frozen=True, tag=True):
    """The model must not be served: asking again would give the same answer."""

    digest: str
    reason: str
    text: str


class Postponed(Struct, frozen=True, tag=True):
    """The model could not be had now. What came stays on disk.

    The reason is `no_broker`, `no_answer` (of the host), `incomplete_bundle`, `bad_bundle`, `chunk_mismatch`,
    `no_space`, `disk` or `misconfigured`.
    """

    digest: str
    reason: str
    text: str


FromStager = MetadataVerified | MetadataRefused | Progress | Qualifying | Staged | Refused | Postponed
