"""The recipes there are."""

from __future__ import annotations

from protocol.errors import Misconfigured
from trainer_host.arena.observation import COMBAT_FEATURES
from trainer_host.arena.rules import ACTIONS
from trainer_host.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (Recipe(name="combat", slot="combat", actions=ACTIONS, features=COMBAT_FEATURES),)
}


def named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        Misconfigured: There is none; the text names those there are.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise Misconfigured(f"no recipe is called {name!r}; there are: {', '.join(RECIPES)}") from None
