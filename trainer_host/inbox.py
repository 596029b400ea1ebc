"""The watched folder: a model file and its description, dropped into it, are released.

`NAME.tflite` waits for `NAME.toml`, and both until they have not changed for a while. What happened is told by where
they are moved: `done/`, or `refused/` with a `NAME.reason.txt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from protocol import configuration
from protocol.configuration import Source
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import FeatureSpec
from protocol.topics import checked_name
from protocol.watched_folder import Stamp, WatchedFolder

MODEL, DESCRIPTION, REASON = ".tflite", ".toml", ".reason.txt"
DONE, REFUSED = "done", "refused"
MAX_DESCRIPTION_BYTES = 64 * 1024
MAX_NAMESAKES = 10_000


class Description(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the TOML file beside a model says.

    Attributes:
        slot: Which slot the model is for.
        notes: For people.
        name: Of the model; by default the file's.
        latency_budget_ms: Absolute bound of one inference.
        actions: Names, in the order of the output; by default those of the slot's current release or recipe.
        features: How a state becomes the input vector; by default likewise.
    """

    slot: str
    notes: Annotated[str, Meta(max_length=2_000)] = ""
    name: Annotated[str, Meta(max_length=128)] = ""
    latency_budget_ms: Annotated[float, Meta(gt=0)] | None = None
    actions: tuple[str, ...] | None = None
    features: FeatureSpec | None = None


def read_description(path: Path) -> Description:
    """Read a model's TOML file.

    Raises:
        Rejected: With code `bad_description`; the text names the line.
    """
    try:
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise Rejected("bad_description", f"{path.name} has more than {MAX_DESCRIPTION_BYTES} bytes")
        text = path.read_text("utf-8")
        description = configuration.parse([Source(path.name, text)], Description)
        checked_name(description.slot, "slot")
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected("bad_description", f"cannot read {path.name}: {error}") from error
    except Misconfigured as error:
        raise Rejected("bad_description", str(error)) from error
    return description


def pairs(files: Mapping[str, Stamp]) -> dict[str, tuple[Stamp, Stamp]]:
    """The models that have a description, by their names without endings, with what shows that either changes."""
    return {
        name: (stamp, files[name + DESCRIPTION])
        for file, stamp in files.items()
        if file.endswith(MODEL) and (name := file.removesuffix(MODEL)) + DESCRIPTION in files
    }


class Inbox(WatchedFolder):
    """The folder, watched from `start` to `close`; `ready` gives the names, without endings, of complete models.

    Args:
        folder: It is made where it is missing.
        settle_s: How long a model's files must be still.

    Raises:
        Misconfigured: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, settle_s: float) -> None:
        super().__init__(folder, (DONE, REFUSED), settle_s, pairs)

    def model(self, name: str) -> Path:
        """The model's file."""
        return self.folder / (name + MODEL)

    def description(self, name: str) -> Path:
        """Its description's file."""
        return self.folder / (name + DESCRIPTION)

    def put_away(self, name: str, refusal: str | None) -> Path:
        """Move a model and its description to where they tell what happened.

        Args:
            name: Of the model.
            refusal: Why it was refused; `None` if it was released.

        Returns:
            Where the model is now.

        Raises:
            Unavailable: The files cannot be moved.
        """
        folder = self.folder / (DONE if refusal is None else REFUSED)
        try:
            final = _free_name(folder, name)
            for ending in (MODEL, DESCRIPTION):
                (self.folder / (name + ending)).rename(folder / (final + ending))
            if refusal is not None:
                (folder / (final + REASON)).write_text(refusal + "\n", "utf-8")
        except OSError as error:
            raise Unavailable(f"cannot move {name} to {folder}: {error.strerror}") from error
        self.look_again()
        return folder / (final + MODEL)


def _free_name(folder: Path, name: str) -> str:
    """`name`, or `name-2` and so on where an earlier model of that name lies."""
    for number in range(1, MAX_NAMESAKES):
        candidate = name if number == 1 else f"{name}-{number}"
        if not (folder / (candidate + MODEL)).exists():
            return candidate
    raise Unavailable(f"{folder} holds {MAX_NAMESAKES} models called {name}; clear it")
