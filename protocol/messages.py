"""Every message on the broker, as a frozen struct.

Fields that are absent take their default, unknown fields are ignored, mistyped ones are named in the error
(`protocol.codec`). Times are seconds since the epoch; vectors in transitions are float32, little-endian, as bytes.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

SCHEMA_VERSION = 1

# Every JSON parser reads whole numbers up to 2**53 exactly; MessagePack and SQLite end at 64 bits.
Count = Annotated[int, Meta(ge=0, le=2**53)]
Number = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Name = Annotated[str, Meta(max_length=128)]


# On the game's topics.


class Observation(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a game saw: `battle/v1/<device>/<slot>/state`, alone or in a list.

    Attributes:
        battle: Names the battle (the episode).
        step: Counts up within the battle; gaps are fine.
        actor: Who is to act; one battle may have several.
        features: The input vector itself, or
        state: the game's own state, encoded by the model's signed feature spec.
        legal: One flag per action. Absent: all are legal.
        reward: For this actor's previous action in this battle.
        done: The battle has ended; the answer carries no action, and features may be left out.
        taken: Index of the action that is really played here, where a human or a script chose it.
        id: Echoed in the answer.
        v: Version of this schema.
    """

    battle: Name
    step: Count
    actor: Name = ""
    features: list[float] | None = None
    state: dict[str, Any] | None = None
    legal: list[bool] | None = None
    reward: float | None = None
    done: bool = False
    taken: Count | None = None
    id: str | Number | None = None
    v: int = SCHEMA_VERSION


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Why there is no action: a code (`protocol.errors.ErrorCode`), a sentence, and the field to blame."""

    code: str
    text: str
    field: str | None = None


class Decision(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The answer to one observation: `battle/v1/<device>/<slot>/action`.

    Attributes:
        battle: As in the observation, and so `step`, `actor` and `id`; empty and 0 where they could not be read.
        action: Index of the chosen action, `None` for an error and at the end of a battle.
        scores: The model's output, one number per action.
        model: SHA-256 of the model that answered.
        version: Its version.
        error: Set instead of an action.
    """

    battle: str
    step: Number
    actor: str = ""
    action: Count | None = None
    scores: list[float] = []
    model: str = ""
    version: Count | None = None
    id: str | Number | None = None
    error: Problem | None = None


# Streaming.


class Transition(Struct, frozen=True, array_like=True, gc=False):
    """One step of one actor. `(device, epoch, seq)` is its identity; device and epoch stand in the batch.

    Attributes:
        seq: Counts up by one in the device's outbox.
        slot: Which slot answered.
        battle: The episode.
        actor: Who acted.
        step: Step of the observation the action answered.
        features: float32 vector at that step.
        action: The action that was played.
        taken: Whether a human or a script chose it, and not the model.
        propensity: The probability with which the policy chose it; `None` if it was taken.
        legal: One byte, 0 or 1, per action; empty if all were legal.
        reward: Received between this step and the next.
        next_features: float32 vector at the next step.
        done: The battle ended with the next step.
        truncated: The battle was cut off: no next step came; `next_features` repeats `features`.
        model: SHA-256 of the model that answered.
        version: Its version.
        at: When the device answered.
    """

    seq: Count
    slot: str
    battle: str
    actor: str
    step: Count
    features: bytes
    action: Count
    taken: bool
    propensity: float | None
    legal: bytes
    reward: float
    next_features: bytes
    done: bool
    truncated: bool
    model: str
    version: Count
    at: float


class TransitionBatch(Struct, frozen=True, kw_only=True):
    """`fleet/v1/<device>/transitions`, compressed (`protocol.codec.compress`).

    The device says: of all numbers from `first` to `last` in this epoch, these are the transitions there are. A number
    without one was dropped by a full outbox. So ranges join up, and the host can acknowledge across gaps.

    Attributes:
        epoch: Names the outbox; a new one starts again at 1.
        acked: Highest number the device knows to be committed.
        first: Lowest number this batch speaks for.
        last: Highest number this batch speaks for.
        transitions: Ascending by `seq`.
    """

    epoch: str
    acked: Count
    first: Count
    last: Count
    transitions: list[Transition]


class Ack(Struct, frozen=True, kw_only=True):
    """`fleet/v1/<device>/ack`: everything up to `seq` of this epoch is committed."""

    epoch: str
    seq: Count


class SlotCounters(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one slot did since the daemon started, and its latencies since the last telemetry.

    Attributes:
        answered: Decisions with an action, since start.
        errors: Error code to count, since start.
        latency_us_histogram: Upper bound in µs of each bucket that is not empty, to its count, from reading a state to
            publishing its action.
        latency_us_p50: Median, to the bucket's width.
        latency_us_p99: 99th percentile, to the bucket's width.
    """

    answered: Count = 0
    errors: dict[str, Count] = {}
    latency_us_histogram: dict[Count, Count] = {}
    latency_us_p50: float | None = None
    latency_us_p99: float | None = None


class Telemetry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`fleet/v1/<device>/telemetry`. A sensor that is not there is absent, not zero."""

    at: float
    uptime_s: float
    cpu_percent: float | None = None
    load_1m: float | None = None
    memory_used_bytes: Count | None = None
    memory_available_bytes: Count | None = None
    agent_memory_bytes: Count | None = None
    disk_free_bytes: Count | None = None
    temperatures_c: dict[str, float] = {}
    clocks_mhz: dict[str, float] = {}
    throttled: list[str] | None = None
    slots: dict[str, SlotCounters] = {}
    outbox_rows: Count = 0
    outbox_bytes: Count = 0
    dropped_transitions: Count = 0
    late_records: Count = 0
    lost_records: Count = 0


# Deployment.


class Verdict(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the judge decided, with its evidence (see the judge's module).

    Attributes:
        outcome: `commit`, `rollback` or `inconclusive`.
        pairs: n, the pairs seen.
        slower: S, pairs with new > (1+delta) old.
        evidence: E, which bounds the chance that a model that is not slower looks like this by 1/E.
        acceptance: The e-value for "not more than 15% slower".
        ratio_median: Median of new/old.
        old_us_p50: Percentiles of both, in µs.
        tail_up: U by factor, tail_down: D by factor.
        throttled_share: Share of pairs taken while the device throttled.
        seed: Of the coin.
    """

    outcome: str
    pairs: Count
    slower: Count
    passed: Count
    evidence: float
    acceptance: float
    ratio_median: float
    old_us_p50: float
    old_us_p99: float
    new_us_p50: float
    new_us_p99: float
    tail_up: dict[Count, Count] = {}
    tail_down: dict[Count, Count] = {}
    throttled_share: float = 0.0
    seed: Count = 0


class ModelRef(Struct, frozen=True, kw_only=True):
    """A model by digest and version."""

    digest: str
    version: Count


class TransferStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far the transfer of a slot's candidate has come.

    Attributes:
        bytes: That are here.
        total: That the model has; 0 before its transfer has begun.
        rate_bytes_s: Bytes per second, lately.
        seconds_left: At that rate; `None` while nothing comes.
        waiting: Why nothing comes, and what it waits for; empty while something does.
    """

    bytes: Count
    total: Count
    rate_bytes_s: Count = 0
    seconds_left: float | None = None
    waiting: str = ""


class SlotStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One slot in `fleet/v1/<device>/status`.

    Attributes:
        phase: `serving`, `staging`, `trial` or `watch`.
        ready: A worker is joined and answers with the active model.
        active: What it serves.
        previous: What it would roll back to.
        candidate: What it is staging or trying.
        progress: Share of the candidate's bytes that are here, 0 to 1.
        transfer: More of its transfer.
        pinned: The version that an operator's signed wish demands.
        verdict: The last one.
        refusal: Why the last refused candidate was refused.
    """

    phase: str
    ready: bool
    active: ModelRef | None = None
    previous: ModelRef | None = None
    candidate: ModelRef | None = None
    progress: float | None = None
    transfer: TransferStatus | None = None
    pinned: Count | None = None
    verdict: Verdict | None = None
    refusal: str | None = None


class Status(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`fleet/v1/<device>/status`, retained; `groups` are those under which an operator may mean the device."""

    at: float
    agent_version: str
    runtime: str
    slots: dict[str, SlotStatus] = {}
    metadata_version: Count = 0
    groups: tuple[str, ...] = ()


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`fleet/v1/<device>/events`: one line of the audit trail.

    Attributes:
        at: When.
        kind: `staged`, `refused`, `trial`, `committed`, `rolled_back`, `metadata_refused`, `worker_died`, …
        slot: Which slot, where it is about one.
        model: Digest, where it is about one.
        version: Its version.
        reason: A stable word for programs.
        text: A sentence for people.
        verdict: The judge's, where one was given.
    """

    at: float
    kind: str
    slot: str = ""
    model: str = ""
    version: Count | None = None
    reason: str = ""
    text: str = ""
    verdict: Verdict | None = None


class MetadataSet(Struct, frozen=True, kw_only=True):
    """`fleet/v1/metadata`, retained: a whole TUF metadata set, each file as its signed JSON bytes.

    Attributes:
        roots: Every root version, ascending from 1, so that a device however far behind catches up.
        timestamp: timestamp.json
        snapshot: The snapshot it names.
        targets: The targets that names.
    """

    roots: list[bytes]
    timestamp: bytes
    snapshot: bytes
    targets: bytes


class ChunkRequest(Struct, frozen=True, kw_only=True):
    """`fleet/v1/chunks/request`: which chunks of a model to publish on their topics.

    Attributes:
        device: Who asks.
        model: SHA-256 of the model.
        wanted: A bitmap, chunk 0 in the lowest bit of byte 0. Empty asks for the manifest. Without any bit set it
            says that the device wants nothing more of the model, so nobody need wait for it.
        last: Index of the chunk that arrived last: what was published after it is on its way to the device, and need
            not be sent again. `None` where that is not so: at the beginning, and after waiting in vain.
    """

    device: str
    model: str
    wanted: bytes = b""
    last: Count | None = None
