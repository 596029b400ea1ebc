"""What one character knows: as arrays, as the game's own JSON, and as the vector that a model eats.

A view is arranged around its character: itself first, its ally, then the enemy that an attack would hit, then the other
enemy. So the same network plays every character of either side. Fallen allies and enemies are left out; the character
itself is always there, even when it looks at the end of a battle that it did not live to see.

`encode` gives for many views at once what `protocol.features` with `COMBAT_FEATURES` gives for the JSON of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.features import Feature, FeatureSpec, Group
from trainer_host.arena import rules
from trainer_host.arena.rules import Battles, BoolArray, Column, IntArray

Features = NDArray[np.float32]

NAMES = ("A1", "A2", "B1", "B2")
_STATS = {
    "health": Column.HEALTH,
    "maxHealth": Column.MAX_HEALTH,
    "attack": Column.ATTACK,
    "defense": Column.DEFENSE,
    "speed": Column.SPEED,
}
_STATUSES = {"poison": Column.POISON, "stun": Column.STUN, "shield": Column.SHIELD, "haste": Column.HASTE}
_COOLDOWNS = {
    "shield": Column.SHIELD_COOLDOWN,
    "venom": Column.VENOM_COOLDOWN,
    "stun": Column.STUN_COOLDOWN,
    "haste": Column.HASTE_COOLDOWN,
    "mend": Column.MEND_COOLDOWN,
}

_CHARACTER = (
    Feature(path="stats.health", divide_by="stats.maxHealth"),
    Feature(path="stats.health", scale=1 / 100),
    Feature(path="stats.attack", scale=1 / 100),
    Feature(path="stats.defense", scale=1 / 100),
    Feature(path="stats.speed", scale=1 / 100),
    Feature(path="energy", scale=1 / rules.MAX_ENERGY),
    Feature(path="statuses.poison", scale=1 / 3, default=0.0),
    Feature(path="statuses.stun", default=0.0),
    Feature(path="statuses.shield", scale=1 / 2, default=0.0),
    Feature(path="statuses.haste", scale=1 / 4, default=0.0),
)
COMBAT_FEATURES = FeatureSpec(
    groups=(
        Group(path="team", maximum=rules.SIDE_SIZE, features=_CHARACTER),
        Group(path="enemies", maximum=rules.SIDE_SIZE, features=_CHARACTER),
    ),
    features=(
        *(Feature(path=f"cooldowns.{name}", scale=1 / 5, default=0.0) for name in _COOLDOWNS),
        Feature(path="round", scale=1 / rules.MAX_ROUNDS),
        Feature(path="characters", scale=1 / rules.CHARACTERS),
    ),
)

_ENCODED = [
    Column.HEALTH,
    Column.HEALTH,
    Column.ATTACK,
    Column.DEFENSE,
    Column.SPEED,
    Column.ENERGY,
    *_STATUSES.values(),
]
_SCALES = np.array([feature.scale for feature in _CHARACTER], np.float32)
_COOLDOWN_COLUMNS = list(_COOLDOWNS.values())
# By character: itself, its ally, and the enemies as they are numbered.
_SEATS = np.array([[0, 1, 2, 3], [1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 0, 1]])
_OTHERS_FIRST = np.array([0, 1, 3, 2])


class View(NamedTuple):
    """What the characters whose turn it is know, one of each battle.

    Attributes:
        characters: (B, 4, columns): itself, its ally, the enemy an attack would hit, the other enemy; zeros for whoever
            is not there.
        seats: (B, 4): the number in the battle of each of these.
        round: (B,).
        legal: (B, actions).
    """

    characters: IntArray
    seats: NDArray[np.intp]
    round: IntArray
    legal: BoolArray

    def take(self, rows: NDArray[np.intp] | BoolArray) -> View:
        """The views at these rows (indices or a mask)."""
        return View._make(field[rows] for field in self)


def view(battles: Battles, actor: IntArray | None = None) -> View:
    """Look at each battle with the eyes of `actor` (B,), by default of the character whose turn it is."""
    actor = battles.actor if actor is None else actor
    rows = np.arange(len(actor))[:, None]
    weakest = rules.target(battles.characters, actor // rules.SIDE_SIZE)
    seats = _SEATS[actor]
    seats = np.where((seats[:, 2] == weakest)[:, None], seats, seats[:, _OTHERS_FIRST])
    characters = battles.characters[rows, seats]
    fallen = characters[..., Column.HEALTH] == 0
    fallen[:, 0] = False
    characters[fallen] = 0
    return View(characters, seats, battles.round, rules.legal_actions(characters[:, 0]))


def encode(seen: View) -> Features:
    """(B, `COMBAT_FEATURES.length`) float32: the vectors of these views."""
    battles = len(seen.round)
    each = seen.characters[..., _ENCODED] * _SCALES
    each[..., 0] = seen.characters[..., Column.HEALTH] / np.maximum(seen.characters[..., Column.MAX_HEALTH], 1)
    vector = np.empty((battles, COMBAT_FEATURES.length), np.float32)
    size = rules.CHARACTERS * len(_CHARACTER)
    vector[:, :size] = each.reshape(battles, size)
    vector[:, size:-2] = seen.characters[:, 0, _COOLDOWN_COLUMNS] / 5
    vector[:, -2] = seen.round / rules.MAX_ROUNDS
    vector[:, -1] = (seen.characters[..., Column.HEALTH] > 0).sum(axis=1) / rules.CHARACTERS
    return vector


def states(seen: View) -> list[dict[str, Any]]:
    """The game's own JSON of each view."""
    rows = zip(seen.characters.tolist(), seen.seats.tolist(), seen.round.tolist(), strict=True)
    return [_state(characters, seats, round_) for characters, seats, round_ in rows]


def _state(characters: list[list[int]], seats: list[int], round_: int) -> dict[str, Any]:
    there = [
        _character(cells, NAMES[seat]) if cells[Column.MAX_HEALTH] else None
        for cells, seat in zip(characters, seats, strict=True)
    ]
    return {
        "round": round_,
        "characters": sum(cells[Column.HEALTH] > 0 for cells in characters),
        "team": [character for character in there[: rules.SIDE_SIZE] if character],
        "enemies": [character for character in there[rules.SIDE_SIZE :] if character],
        "cooldowns": _running(characters[0], _COOLDOWNS),
    }


def _character(cells: list[int], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "stats": {stat: cells[column] for stat, column in _STATS.items()},
        "energy": cells[Column.ENERGY],
        "statuses": _running(cells, _STATUSES),
    }


def _running(cells: list[int], timers: dict[str, Column]) -> dict[str, int]:
    return {name: cells[column] for name, column in timers.items() if cells[column]}
