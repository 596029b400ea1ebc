"""What a recipe says: every setting that decides what a trained model becomes.

Recipes are values: one can be read from TOML, sent to the training process, and kept in a model's lineage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.codec import convert
from protocol.features import FeatureSpec

Format = Literal["float32", "dynamic_range"]
Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(gt=0, lt=1)]


class DataSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which examples are learned from (`trainer_host.dataset` says why).

    Attributes:
        taken: What a human or a script chose.
        won: What the model chose in battles that it won.
        validation_share: Of the battles.
    """

    taken: bool = True
    won: bool = True
    validation_share: Share = 0.2


class CloningSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Behaviour cloning.

    Attributes:
        learning_rate: Of Adam.
        batch: Examples per step.
        epochs: At most.
        patience: Epochs without a better validation loss before training stops.
        xla: Compile the step with XLA; worth its one to two seconds only for large networks.
    """

    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    batch: Count = 256
    epochs: Count = 60
    patience: Count = 6
    xla: bool = False


class MlpSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A multilayer perceptron: the width of each hidden layer."""

    hidden: tuple[Count, ...] = (64, 32)


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one kind of model is made.

    Attributes:
        name: Of the recipe.
        slot: Which the model is for.
        actions: Names, in the order of the output.
        features: How a state becomes the input vector.
        data: Which examples.
        learner: How it learns.
        network: What learns.
        formats: Which TFLite files are made.
        release: Which of them is released.
    """

    name: str
    slot: str
    actions: tuple[str, ...]
    features: FeatureSpec
    data: DataSettings = DataSettings()
    learner: CloningSettings = CloningSettings()
    network: MlpSettings = MlpSettings()
    formats: tuple[Format, ...] = ("float32", "dynamic_range")
    release: Format = "float32"

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.release not in self.formats:
            raise ValueError(f"release is {self.release}, which is not among the formats {', '.join(self.formats)}")


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Replace some settings, e.g. `{"learner": {"epochs": 10}}` from TOML.

    Raises:
        Rejected: With code `malformed`, naming the field that does not exist or has a wrong value.
    """
    return convert(_merged(msgspec.to_builtins(recipe), settings), Recipe)


def _merged(whole: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(whole)
    for key, value in part.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
