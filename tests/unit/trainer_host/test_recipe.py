from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.errors import Misconfigured, Rejected
from protocol.features import Feature, FeatureSpec
from trainer_host.recipes.recipe import Recipe, override
from trainer_host.recipes.table import RECIPES, named

RECIPE = Recipe(
    name="r", slot="s", actions=("a", "b"), features=FeatureSpec(features=(Feature(path="x"), Feature(path="y")))
)


def test_settings_are_replaced_where_they_are_given() -> None:
    changed = override(RECIPE, {"learner": {"epochs": 3}, "network": {"hidden": [8]}, "release": "dynamic_range"})
    assert (changed.learner.epochs, changed.learner.batch) == (3, RECIPE.learner.batch)
    assert changed.network.hidden == (8,)
    assert changed.release == "dynamic_range"
    assert changed.features == RECIPE.features
    assert override(RECIPE, {}) == RECIPE


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"learner": {"epochs": 0}}, "learner.epochs"),
        ({"learner": {"learning_rate": "fast"}}, "learner.learning_rate"),
        ({"data": {"validation_share": 1.0}}, "data.validation_share"),
        ({"learner": 3}, "learner"),
    ],
)
def test_a_wrong_value_is_named(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(Rejected) as refused:
        override(RECIPE, settings)
    assert refused.value.field == where


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(Rejected, match="epoch"):
        override(RECIPE, {"learner": {"epoch": 3}})


def test_what_is_released_must_be_made() -> None:
    with pytest.raises(Rejected, match="not among the formats float32"):
        override(RECIPE, {"formats": ["float32"], "release": "dynamic_range"})


def test_a_recipe_survives_the_way_to_the_training_process() -> None:
    assert msgspec.json.decode(msgspec.json.encode(named("combat")), type=Recipe) == named("combat")


def test_the_table() -> None:
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    with pytest.raises(Misconfigured, match="there are: combat"):
        named("chess")
