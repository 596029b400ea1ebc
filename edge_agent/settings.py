"""The agent's settings: what its TOML file may say, and what holds where it says nothing."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from protocol import configuration
from protocol.errors import Misconfigured, Rejected
from protocol.link import Broker
from protocol.topics import checked_name

SYSTEM_CONFIG = Path("/etc/edge-agent/edge-agent.toml")
LOCAL_CONFIG = Path("edge-agent.toml")
SYSTEM_STATE = Path("/var/lib/edge-agent")
SYSTEM_RUNTIME = Path("/run/edge-agent")
MIB = 1024 * 1024
BATTLE_END = "battle-end"


class SlotSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[slots.<name>]` table.

    Attributes:
        deadline_ms: A state that has waited longer is answered `overloaded`.
        threads: Of the interpreter.
        trial_duty: Share of one core that a trial may use.
        trial_max_pairs: A trial without a decision after this many pairs keeps the old model.
        trial_seconds: And so does one that takes longer. At a duty of 5%, two hours do for models of up to 60 ms.
        watch_seconds: How long a new model is watched after it was committed.
        watch_interval_s: Seconds between two timed pairs while watching.
        swap: When a newer model answers: at once, or, battle by battle, once the battle that is going on has ended.
    """

    deadline_ms: Annotated[float, Meta(ge=1, le=10_000)] = 50.0
    threads: Annotated[int, Meta(ge=1, le=16)] = 1
    trial_duty: Annotated[float, Meta(gt=0, le=1)] = 0.05
    trial_max_pairs: Annotated[int, Meta(ge=3_000, le=1_000_000)] = 20_000
    trial_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 7_200.0
    watch_seconds: Annotated[float, Meta(ge=0, le=7 * 86_400)] = 3_600.0
    watch_interval_s: Annotated[float, Meta(ge=0.1, le=60)] = 1.0
    swap: Literal["now", "battle-end"] = "now"


class OutboxSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[outbox]` table.

    Attributes:
        max_bytes: Of transitions that wait for the host; beyond it, the oldest whole battles are dropped and counted.
        window: How many unacknowledged batches may be on their way.
    """

    max_bytes: Annotated[int, Meta(ge=MIB, le=1024 * 1024 * MIB)] = 256 * MIB
    window: Annotated[int, Meta(ge=1, le=64)] = 8


class TransferSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[transfer]` table.

    Attributes:
        max_rate: How many bytes per second of a model to ask for; 0 for as many as come.
    """

    max_rate: Annotated[int, Meta(ge=0, le=1024 * MIB)] = 0


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. `load` makes its paths absolute and fills in those that are empty.

    Attributes:
        device: This device's name in topics and certificates; by default the computer's.
        groups: Names under which an operator may mean this device and others: see `trainer-host pin --group`.
        broker: How to reach the broker.
        state_dir: Models, metadata, the outbox: what must survive a restart.
        runtime_dir: What need not: the status file.
        root_of_trust: The TUF root metadata this device was provisioned with; by default `root.json` beside the file.
        sys_root: Where sysfs is.
        telemetry_seconds: Between two telemetry messages.
        slots: By name; the first one also answers for slots that do not exist.
        outbox: Transitions on their way to the host.
        transfer: How models come.
    """

    slots: Annotated[dict[str, SlotSettings], Meta(min_length=1)]
    device: str = field(default_factory=lambda: socket.gethostname().partition(".")[0])
    groups: tuple[str, ...] = ()
    broker: Broker = Broker()
    state_dir: str = ""
    runtime_dir: str = ""
    root_of_trust: str = ""
    sys_root: str = "/sys"
    telemetry_seconds: Annotated[float, Meta(ge=0.1, le=3_600)] = 5.0
    outbox: OutboxSettings = OutboxSettings()
    transfer: TransferSettings = TransferSettings()

    def __post_init__(self) -> None:
        """Names become levels of topics."""
        try:
            checked_name(self.device, "device")
            for slot in self.slots:
                checked_name(slot, "slot name")
            for group in self.groups:
                checked_name(group, "group")
        except Rejected as error:
            raise ValueError(error.text) from error


def load(path: Path | None = None) -> Settings:
    """Read the settings from `path`, or from where they usually are.

    Under the system's own file, state lies in the system's folders, so that `status` finds what the service wrote,
    whoever asks. Under any other file it lies in the user's.

    Raises:
        Misconfigured: There is no such file, or something in it is wrong.
    """
    path = _found() if path is None else path
    settings = configuration.load(path, Settings)
    return _located(settings, path.resolve())


def _found() -> Path:
    for path in (SYSTEM_CONFIG, LOCAL_CONFIG):
        if path.is_file():
            return path
    raise Misconfigured(
        f"there is neither {SYSTEM_CONFIG} nor {LOCAL_CONFIG} here; write one, or name it with --config. "
        "The least it needs is a slot: [slots.combat]"
    )


def _located(settings: Settings, config: Path) -> Settings:
    """Fill in empty paths, and take relative ones from the configuration's folder."""
    folder = config.parent
    system = config == SYSTEM_CONFIG.resolve()
    state_dir = folder / (settings.state_dir or (SYSTEM_STATE if system else _user_state()))
    runtime_dir = folder / (settings.runtime_dir or (SYSTEM_RUNTIME if system else state_dir / "run"))
    broker = settings.broker
    files = {
        name: str(folder / value)
        for name in ("password_file", "ca_file", "cert_file", "key_file")
        if (value := getattr(broker, name)) is not None
    }
    return replace(
        settings,
        state_dir=str(state_dir),
        runtime_dir=str(runtime_dir),
        root_of_trust=str(folder / (settings.root_of_trust or "root.json")),
        broker=replace(broker, **files),
    )


def _user_state() -> Path:
    """Where the XDG base directory specification keeps a user's data."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(data) / "edge-agent"
