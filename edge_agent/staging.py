"""What supervisor and stager say to each other. Light: the supervisor imports this, and neither TUF nor NumPy."""

from __future__ import annotations

from msgspec import Struct

from protocol.link import Broker
from protocol.release import Release

# To a stager.


class StagerSettings(Struct, frozen=True, kw_only=True, tag=True):
    """A stager's first message.

    Attributes:
        device: This device's name.
        folder: Of the model store.
        trust_folder: Where accepted metadata is remembered; losing it loses the protection from older metadata.
        root_file: The root of trust the device was provisioned with.
        metadata_file: The metadata set to verify, as it came from the broker.
        built_at: When this software was built, seconds since the epoch: no clock that is earlier is believed.
        broker: Where to fetch chunks.
        reserve_bytes: Disk space that staging leaves to others.
        window: How many chunks are on their way at a time.
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
    reserve_bytes: int = 64 * 1024 * 1024
    window: int = 16
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


class MetadataVerified(Struct, frozen=True, tag=True):
    """The metadata set is accepted. `version` is its timestamp's, `releases` are all it names."""

    version: int
    releases: tuple[Release, ...]


class MetadataRefused(Struct, frozen=True, tag=True):
    """The metadata set is not accepted; the stager ends.

    The reason is one of `edge_agent.trust`, or `unavailable` (the disk) or `misconfigured`.
    """

    reason: str
    text: str


class Progress(Struct, frozen=True, tag=True):
    """How much of a model is on disk, in bytes."""

    digest: str
    bytes: int
    total: int


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

    The reason is `no_broker`, `no_answer` (of the host), `chunk_mismatch`, `no_space`, `disk` or `misconfigured`.
    """

    digest: str
    reason: str
    text: str


FromStager = MetadataVerified | MetadataRefused | Progress | Staged | Refused | Postponed
