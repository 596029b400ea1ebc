"""Options that commands of several modules have, and what they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from trainer_host.settings import Settings

ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="TOML file; fragments beside it in conf.d/*.toml are merged in.")
]


def settings_of(config: Path | None) -> Settings:
    """The settings in a file, or those of this host; see `trainer_host.settings.load`."""
    from trainer_host import settings  # noqa: PLC0415

    return settings.load(config)
