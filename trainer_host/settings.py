"""The host's settings: what its TOML file may say, and what holds where it says nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import replace

from protocol import configuration
from protocol.errors import Misconfigured, Rejected
from protocol.link import Broker
from trainer_host.gate import GateSettings
from trainer_host.keys import read_secret
from trainer_host.recipes import table
from trainer_host.recipes.recipe import Recipe, override
from trainer_host.repository import Lifetimes

PROGRAM = "trainer-host"
SYSTEM_CONFIG = Path("/etc/trainer-host/trainer-host.toml")
LOCAL_CONFIG = Path("trainer-host.toml")
SYSTEM_STATE = Path("/var/lib/trainer-host")

Seconds = Annotated[float, Meta(ge=0, le=30 * 86_400)]
Days = Annotated[float, Meta(gt=0, le=3_650)]


class TrainingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[training]` table.

    Attributes:
        seed: Of weights, order and split.
        threads: That TensorFlow may use.
        max_transitions: Train on the newest ones, at most this many.
        deadline_seconds: A job that takes longer is ended.
        kept_jobs: How many jobs' folders stay, with their logs, files and TensorBoard records.
    """

    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0
    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    max_transitions: Annotated[int, Meta(ge=100, le=100_000_000)] = 200_000
    deadline_seconds: Annotated[float, Meta(ge=10, le=7 * 86_400)] = 3_600.0
    kept_jobs: Annotated[int, Meta(ge=4, le=10_000)] = 20


class AutoPublishSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[auto_publish]` table: when the running host trains and releases by itself.

    Attributes:
        enabled: Whether it does.
        recipes: Which recipes it trains.
        min_new_transitions: So many must have arrived for the recipe's slot since it was last trained.
        min_seconds: Shortest time between two trainings of a recipe.
    """

    enabled: bool = True
    recipes: tuple[str, ...] = ("combat",)
    min_new_transitions: Annotated[int, Meta(ge=1, le=10**9)] = 20_000
    min_seconds: Seconds = 600.0


class InboxSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[inbox]` table: the folder in which model files are released.

    Attributes:
        enabled: Whether it is watched.
        folder: By default `inbox` in the state folder.
        settle_seconds: A file counts as complete when it has not changed for so long.
    """

    enabled: bool = True
    folder: str = ""
    settle_seconds: Annotated[float, Meta(ge=0.1, le=3_600)] = 2.0


class HistorySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[history]` table: for how long the database keeps what is no transition.

    Attributes:
        telemetry_days: Of telemetry.
        events_days: Of devices' events.
    """

    telemetry_days: Days = 7.0
    events_days: Days = 365.0


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. `load` makes its paths absolute and fills in those that are empty.

    Attributes:
        broker: How to reach the broker.
        client_id: This host's name on the broker.
        state_dir: Database, repository, keys, jobs: all that must survive.
        database: SQLAlchemy URL; by default an SQLite file in the state folder.
        keys_dir: By default `keys` in the state folder.
        passphrase_file: A file whose first line opens the keys.
        lifetimes: How long signatures last.
        kept_versions: How many versions of a slot stay released.
        recipes: By recipe, the settings to replace in it, such as `[recipes.combat.learner]`.
        training: How jobs run.
        gate: What a model must show before it is released.
        auto_publish: When the host trains by itself.
        inbox: The watched folder.
        history: How long things are kept.
    """

    broker: Broker = Broker()
    client_id: Annotated[str, Meta(min_length=1, max_length=64)] = "trainer-host"
    state_dir: str = ""
    database: str = ""
    keys_dir: str = ""
    passphrase_file: str = ""
    lifetimes: Lifetimes = Lifetimes()
    kept_versions: Annotated[int, Meta(ge=1, le=100)] = 3
    recipes: dict[str, dict[str, Any]] = {}
    training: TrainingSettings = TrainingSettings()
    gate: GateSettings = GateSettings()
    auto_publish: AutoPublishSettings = AutoPublishSettings()
    inbox: InboxSettings = InboxSettings()
    history: HistorySettings = HistorySettings()

    def __post_init__(self) -> None:
        """Check what types cannot say: that the recipes exist, and that what is replaced in them does."""
        for name in (*self.recipes, *self.auto_publish.recipes):
            try:
                self.recipe(name)
            except Rejected as error:
                where = f"recipes.{name}" + (f".{error.field}" if error.field else "")
                raise ValueError(f"{where}: {error.text.partition(' - at ')[0]}") from error
            except Misconfigured as error:
                raise ValueError(str(error)) from error

    def recipe(self, name: str) -> Recipe:
        """The recipe of that name, as these settings change it.

        Raises:
            Misconfigured: There is none of that name.
            Rejected: A setting to replace does not exist, or has a wrong value.
        """
        return override(table.named(name), self.recipes.get(name, {}))

    @property
    def repository_dir(self) -> Path:
        """Where the signed metadata and the released models lie."""
        return Path(self.state_dir, "repository")

    @property
    def root_file(self) -> Path:
        """The newest root metadata: what devices are provisioned with."""
        return Path(self.state_dir, "root.json")

    @property
    def jobs_dir(self) -> Path:
        """Where jobs have their folders."""
        return Path(self.state_dir, "jobs")

    @property
    def progress_file(self) -> Path:
        """Where the host says what it does, one JSON object a line."""
        return Path(self.state_dir, "progress.jsonl")

    def passphrase(self) -> str | None:
        """What opens the keys, or `None`.

        Raises:
            Misconfigured: The file cannot be read, or is empty.
        """
        if not self.passphrase_file:
            return None
        return read_secret(Path(self.passphrase_file))


def load(path: Path | None = None) -> Settings:
    """Read the settings from `path`, or from where they usually are, or take the defaults where there is no file.

    Under the system's own file, state lies in the system's folder; under any other, and without one, in the user's.

    Raises:
        Misconfigured: There is no such file, or something in it is wrong.
    """
    path = _found() if path is None else path
    if path is None:
        return _located(Settings(), Path.cwd() / LOCAL_CONFIG)
    return _located(configuration.load(path, Settings), path.resolve())


def _found() -> Path | None:
    return next((path for path in (SYSTEM_CONFIG, LOCAL_CONFIG) if path.is_file()), None)


def _located(settings: Settings, config: Path) -> Settings:
    """Fill in empty paths, and take relative ones from the configuration's folder."""
    folder = config.parent
    system = config == SYSTEM_CONFIG.resolve()
    state_dir = folder / (settings.state_dir or (SYSTEM_STATE if system else _user_state()))
    broker = settings.broker
    files = {
        name: str(folder / value)
        for name in ("password_file", "ca_file", "cert_file", "key_file")
        if (value := getattr(broker, name)) is not None
    }
    return replace(
        settings,
        state_dir=str(state_dir),
        database=settings.database or f"sqlite:///{state_dir / 'trainer-host.db'}",
        keys_dir=str(folder / (settings.keys_dir or state_dir / "keys")),
        passphrase_file=str(folder / settings.passphrase_file) if settings.passphrase_file else "",
        inbox=replace(settings.inbox, folder=str(folder / (settings.inbox.folder or state_dir / "inbox"))),
        broker=replace(broker, **files),
    )


def _user_state() -> Path:
    """Where the XDG base directory specification keeps a user's data."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(data) / "trainer-host"
