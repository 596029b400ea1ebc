"""Who plays: at random, by a script, by a careful one, or by a model's scores; all in many battles at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer_host.arena import observation, rules
from trainer_host.arena.observation import View
from trainer_host.arena.rules import BoolArray, Column, IntArray

Actions = NDArray[np.intp]
Scores = NDArray[np.float64] | NDArray[np.float32]


class Player(Protocol):
    """Chooses actions."""

    def choose(self, seen: View, rng: np.random.Generator) -> Actions:
        """(B,) a legal action for each view."""


class RandomPlayer:
    """Any legal action, all equally likely."""

    def choose(self, seen: View, rng: np.random.Generator) -> Actions:
        """(B,) a legal action for each view."""
        return best_legal(rng.random(seen.legal.shape), seen.legal)


class ScriptedPlayer:
    """The "traditional AI": the first line of a short list that applies.

    Smash whenever there is energy for it; mend when somebody of its own is below 40% of its health; shield itself below
    50%; strike.
    """

    def choose(self, seen: View, rng: np.random.Generator) -> Actions:  # noqa: ARG002 (leaves nothing to chance)
        """(B,) a legal action for each view."""
        lines = {
            rules.SMASH: np.ones(len(seen.legal), np.bool_),
            rules.MEND: _share(_most_wounded(seen)) < 0.4,
            rules.SHIELD: _share(seen.characters[:, 0]) < 0.5,
        }
        applies = [seen.legal[:, action] & wanted for action, wanted in lines.items()]
        return np.select(applies, list(lines), rules.STRIKE)


class ExpertPlayer:
    """Weighs what each action is worth in points of health, and takes the best legal one.

    It sees what the script does not: whether a hit kills, whom the enemies will aim at, what poison still has to give,
    what energy could buy. The weights were found by the cross-entropy method against `ScriptedPlayer`.
    """

    KILL = 40.0
    ENERGY = 0.7
    POISON = 1.35
    DENIED_TURN = 0.2
    SHIELD = 1.2
    HASTE = 0.2
    MEND = 0.7
    REST = 2.7
    USUAL_POWER = 0.7

    def choose(self, seen: View, rng: np.random.Generator) -> Actions:  # noqa: ARG002 (leaves nothing to chance)
        """(B,) a legal action for each view."""
        return best_legal(self.worth(seen), seen.legal)

    def worth(self, seen: View) -> NDArray[np.float64]:
        """(B, actions): what each action is worth, in points of health."""
        me, target = seen.characters[:, 0], seen.characters[:, 2]
        health = target[:, Column.HEALTH]
        hits = rules.damage(rules.POWER, me[:, None], target[:, None])
        worth: NDArray[np.float64] = np.minimum(hits, health[:, None]) - self.ENERGY * rules.COST
        worth += self.KILL * (hits >= health[:, None])
        survives = health[:, None] > hits
        open_ = target[:, Column.SHIELD] == 0
        poison = 3 * rules.POISON_SHARE * target[:, Column.MAX_HEALTH]
        bitten = np.clip(health - hits[:, rules.VENOM], 0, poison) * (open_ & (target[:, Column.POISON] == 0))
        worth[:, rules.VENOM] += self.POISON * bitten
        denied = open_ & (target[:, Column.STUN] == 0) & survives[:, rules.STUN]
        worth[:, rules.STUN] += self.DENIED_TURN * self._threat(seen, 2) * denied
        threat = (self._threat(seen, 2) + self._threat(seen, 3)) * (me[:, Column.SHIELD] == 0)
        worth[:, rules.SHIELD] += self.SHIELD * threat * _is_weakest(seen)
        to_fight = health + seen.characters[:, 3, Column.HEALTH]
        worth[:, rules.HASTE] += self.HASTE * to_fight * (me[:, Column.HASTE] == 0)
        worth[:, rules.MEND] += self.MEND * _mendable(_most_wounded(seen))
        worth[:, rules.REST] += self.REST * np.minimum(
            rules.TABLE[rules.REST].energy, rules.MAX_ENERGY - me[:, Column.ENERGY]
        )
        return worth

    def _threat(self, seen: View, enemy: int) -> NDArray[np.float64]:
        """(B,) what the usual attack of that enemy would take from the actor."""
        return rules.damage(np.float64(self.USUAL_POWER), seen.characters[:, enemy], seen.characters[:, 0])


class ModelPlayer:
    """The legal action to which a model gives the highest score.

    Args:
        score: From feature vectors (B, features) float32 to scores (B, actions).
    """

    def __init__(self, score: Callable[[observation.Features], Scores]) -> None:
        self._score = score

    def choose(self, seen: View, rng: np.random.Generator) -> Actions:  # noqa: ARG002 (leaves nothing to chance)
        """(B,) a legal action for each view."""
        return best_legal(self._score(observation.encode(seen)), seen.legal)


def best_legal(scores: Scores, legal: BoolArray) -> Actions:
    """(B,) the index of the highest score among the legal ones, the first of equals."""
    best: Actions = np.where(legal, scores, -np.inf).argmax(axis=1)
    return best


def _share(characters: IntArray) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = characters[..., Column.HEALTH] / np.maximum(characters[..., Column.MAX_HEALTH], 1)
    return shares


def _most_wounded(seen: View) -> IntArray:
    """(B, columns): whom a mend would go to."""
    sides = np.zeros(len(seen.round), np.int32)
    whom: IntArray = seen.characters[np.arange(len(sides)), rules.wounded(seen.characters, sides)]
    return whom


def _mendable(characters: IntArray) -> NDArray[np.float64]:
    """(B,) how much health a mend would bring."""
    max_health = characters[:, Column.MAX_HEALTH].astype(np.float64)
    missing: NDArray[np.float64] = np.minimum(
        max_health - characters[:, Column.HEALTH], max_health * rules.TABLE[rules.MEND].heal
    )
    return missing


def _is_weakest(seen: View) -> BoolArray:
    """(B,) whether the enemies will aim at the actor, and not at its ally."""
    me, ally = seen.characters[:, 0, Column.HEALTH], seen.characters[:, 1, Column.HEALTH]
    weakest: BoolArray = (ally == 0) | (me <= ally)
    return weakest
