"""The rules of the reference game: many battles at once, as arrays.

Two sides of one or two characters fight for at most `MAX_ROUNDS` rounds. In each round every living character has one
turn, the fastest first. A turn is one action; its target follows from the rules: attacks hit the weakest living enemy,
a mend goes to the most wounded living member of the actor's own side, everything else to the actor. Actions cost
energy, which comes back slowly, and most have a cooldown, so what is legal changes from turn to turn; `rest` and
`strike` are always legal.

Statuses last for whole rounds: poison hurts at the end of each, a stunned character loses its next turn, a shield
halves damage and keeps poison and stuns away, haste makes faster and brings more energy.

Both sides have the same number of characters, because a battle that is lost by the draw says nothing about play.

Everything is a pure function of its arguments. The luck of a turn is a hash of the battle's seed and the turn's number
(a counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the hash is that of
SplitMix64: Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014). So a battle unfolds the same
alone or in any batch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
Rows = NDArray[np.intp]
Choices = NDArray[np.intp] | IntArray

MAX_ROUNDS = 20
SIDE_SIZE = 2
CHARACTERS = 2 * SIDE_SIZE
MAX_ENERGY = 6
START_ENERGY = 3
POISON_SHARE = 0.08
SHIELD_FACTOR = 0.5
HASTE_FACTOR = 1.5
ROLL_LOW, ROLL_HIGH = 0.85, 1.15


class Column(IntEnum):
    """What is kept of each character. All are whole numbers; an absent character is all zeros."""

    HEALTH = 0
    MAX_HEALTH = 1
    ATTACK = 2
    DEFENSE = 3
    SPEED = 4
    ENERGY = 5
    POISON = 6
    STUN = 7
    SHIELD = 8
    HASTE = 9
    SHIELD_COOLDOWN = 10
    VENOM_COOLDOWN = 11
    STUN_COOLDOWN = 12
    HASTE_COOLDOWN = 13
    MEND_COOLDOWN = 14
    INITIATIVE = 15
    ACTED = 16


class Action(NamedTuple):
    """One row of the action table.

    Attributes:
        name: As players and models call it.
        cost: Energy that it takes.
        power: Share of the attack value that becomes damage, before defence.
        poison: Rounds of poison for the target.
        stun: Turns that the target loses.
        shield: Rounds of shield for the actor, this one included.
        haste: Rounds of haste for the actor, this one included.
        heal: Share of its maximum health that the mended one gets back.
        energy: Energy that it brings.
        cooldown: The column that counts its cooldown, or `None`.
        wait: Rounds until it is legal again, this one included.
    """

    name: str
    cost: int = 0
    power: float = 0.0
    poison: int = 0
    stun: int = 0
    shield: int = 0
    haste: int = 0
    heal: float = 0.0
    energy: int = 0
    cooldown: Column | None = None
    wait: int = 0


TABLE = (
    Action("strike", power=0.5),
    Action("smash", cost=3, power=1.05),
    Action("venom", cost=2, power=0.2, poison=3, cooldown=Column.VENOM_COOLDOWN, wait=2),
    Action("stun", cost=2, power=0.35, stun=1, cooldown=Column.STUN_COOLDOWN, wait=4),
    Action("shield", cost=1, shield=3, cooldown=Column.SHIELD_COOLDOWN, wait=6),
    Action("haste", cost=1, haste=4, cooldown=Column.HASTE_COOLDOWN, wait=5),
    Action("mend", cost=2, heal=0.25, cooldown=Column.MEND_COOLDOWN, wait=4),
    Action("rest", energy=3),
)
ACTIONS: tuple[str, ...] = tuple(action.name for action in TABLE)
STRIKE, SMASH, VENOM, STUN, SHIELD, HASTE, MEND, REST = range(len(TABLE))

COST = np.array([action.cost for action in TABLE], np.int32)
POWER = np.array([action.power for action in TABLE])
HEAL = np.array([action.heal for action in TABLE])
_POISON = np.array([action.poison for action in TABLE], np.int32)
_STUN = np.array([action.stun for action in TABLE], np.int32)
_SHIELD = np.array([action.shield for action in TABLE], np.int32)
_HASTE = np.array([action.haste for action in TABLE], np.int32)
_ENERGY = np.array([action.energy for action in TABLE], np.int32)
_WAIT = np.array([action.wait for action in TABLE], np.int32)
# An action without a cooldown reads and writes one that is always zero: its own wait is zero too.
_COOLDOWN = np.array([action.cooldown or Column.SHIELD_COOLDOWN for action in TABLE], np.int32)
_HAS_COOLDOWN = np.array([action.cooldown is not None for action in TABLE])

_TIMERS = slice(Column.POISON, Column.MEND_COOLDOWN + 1)
_SIDES = np.array([0] * SIDE_SIZE + [1] * SIDE_SIZE)
# The stats a character is drawn from: low and high, both included.
_DRAW = {Column.MAX_HEALTH: (90, 120), Column.ATTACK: (42, 58), Column.DEFENSE: (35, 65), Column.SPEED: (30, 90)}


class Battles(NamedTuple):
    """Any number of battles. Characters 0 and 1 are side A, 2 and 3 side B.

    Attributes:
        characters: (B, 4, columns) int32, see `Column`.
        seed: (B,) uint64, the key of the battle's luck.
        round: (B,) int32, from 1.
        turn: (B,) int32, turns played so far.
        actor: (B,) int32, the character whose turn it is.
        over: (B,) bool. A battle that is over has no turn.
        outcome: (B,) int32, 1 where side A has won, -1 where side B has, else 0.
    """

    characters: IntArray
    seed: NDArray[np.uint64]
    round: IntArray
    turn: IntArray
    actor: IntArray
    over: BoolArray
    outcome: IntArray

    def take(self, rows: Rows | BoolArray) -> Battles:
        """A copy of the battles at these rows (indices or a mask)."""
        return Battles._make(field[rows] for field in self)

    def put(self, rows: Rows | BoolArray, battles: Battles) -> None:
        """Overwrite the battles at these rows, in place."""
        mine: tuple[NDArray[Any], ...] = self
        for field, new in zip(mine, battles, strict=True):
            field[rows] = new


def draw(rng: np.random.Generator, battles: int) -> Battles:
    """Draw new battles, each with one or two characters a side, and find who begins."""
    characters = np.zeros((battles, CHARACTERS, len(Column)), np.int32)
    for column, (low, high) in _DRAW.items():
        characters[..., column] = rng.integers(low, high + 1, (battles, CHARACTERS))
    characters[..., Column.HEALTH] = characters[..., Column.MAX_HEALTH]
    characters[..., Column.ENERGY] = START_ENERGY
    # Breaks ties of speed, so that neither side is always first.
    characters[..., Column.INITIATIVE] = rng.permuted(np.tile(np.arange(CHARACTERS), (battles, 1)), axis=1)
    size = rng.integers(1, SIDE_SIZE + 1, battles)
    characters[np.arange(CHARACTERS) % SIDE_SIZE >= size[:, None]] = 0
    seed = rng.integers(0, 2**64, battles, np.uint64)
    zeros = np.zeros(battles, np.int32)
    drawn = Battles(characters, seed, zeros + 1, zeros.copy(), zeros.copy(), zeros.astype(np.bool_), zeros.copy())
    _find_actor(drawn)
    return drawn


def side(battles: Battles) -> IntArray:
    """(B,) 0 where a character of side A is to act, 1 where one of side B is."""
    return battles.actor // SIDE_SIZE


def legal(battles: Battles) -> BoolArray:
    """(B, actions): what each actor may do now."""
    rows = np.arange(len(battles.actor))
    return legal_actions(battles.characters[rows, battles.actor])


def legal_actions(actors: IntArray) -> BoolArray:
    """(B, actions): what characters (B, columns) may do."""
    ready = ~_HAS_COOLDOWN | (actors[:, _COOLDOWN] == 0)
    allowed: BoolArray = (actors[:, Column.ENERGY, None] >= COST) & ready
    return allowed


def target(characters: IntArray, sides: IntArray) -> Rows:
    """(B,) the weakest living enemy of each side (B,), the first of equals."""
    health = characters[..., Column.HEALTH]
    out_of_reach = (health <= 0) | (sides[:, None] == _SIDES)
    weakest: Rows = np.where(out_of_reach, np.iinfo(np.int32).max, health).argmin(axis=1)
    return weakest


def wounded(characters: IntArray, sides: IntArray) -> Rows:
    """(B,) the living member of each side (B,) with the smallest share of its health left, the first of equals."""
    health = characters[..., Column.HEALTH]
    share = health / np.maximum(characters[..., Column.MAX_HEALTH], 1)
    whom: Rows = np.where((health <= 0) | (sides[:, None] != _SIDES), 2.0, share).argmin(axis=1)
    return whom


def damage(power: NDArray[np.float64] | np.float64, attacker: IntArray, defender: IntArray) -> NDArray[np.float64]:
    """What an attack takes from its target with middling luck, before rounding.

    Args:
        power: Share of the attack value, broadcast against the rest.
        attacker: (..., columns).
        defender: (..., columns).
    """
    softened = power * attacker[..., Column.ATTACK] * 100.0 / (100.0 + defender[..., Column.DEFENSE])
    hurt: NDArray[np.float64] = softened * np.where(defender[..., Column.SHIELD] > 0, SHIELD_FACTOR, 1.0)
    return hurt


def play(battles: Battles, actions: Choices) -> Battles:
    """Play one turn of each battle and find who acts next. All battles must be running, all actions (B,) legal."""
    rows = np.arange(len(actions))
    assert not battles.over.any(), "a battle that is over has no turn"
    assert legal(battles)[rows, actions].all(), "illegal action"
    after = Battles._make(field.copy() for field in battles)
    _attack(after, rows, actions)
    _support(after, rows, actions)
    after.characters[rows, after.actor, Column.ACTED] = 1
    after.turn[:] += 1
    _decide(after)
    _find_actor(after)
    return after


def luck(seed: NDArray[np.uint64], turn: IntArray) -> NDArray[np.float64]:
    """(B,) uniform in [0, 1): the luck of these turns."""
    bits = seed + (turn.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform: NDArray[np.float64] = ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _attack(battles: Battles, rows: Rows, actions: Choices) -> None:
    """Hurt, poison and stun the targets."""
    characters = battles.characters
    who = target(characters, side(battles))
    defender = characters[rows, who]
    power = POWER[actions]
    roll = ROLL_LOW + (ROLL_HIGH - ROLL_LOW) * luck(battles.seed, battles.turn)
    hurt = damage(power, characters[rows, battles.actor], defender) * roll
    hurt = np.where(power > 0, np.maximum(np.rint(hurt), 1), 0).astype(np.int32)
    open_ = defender[:, Column.SHIELD] == 0
    defender[:, Column.HEALTH] = np.maximum(defender[:, Column.HEALTH] - hurt, 0)
    defender[:, Column.POISON] = np.maximum(defender[:, Column.POISON], _POISON[actions] * open_)
    defender[:, Column.STUN] = np.maximum(defender[:, Column.STUN], _STUN[actions] * open_)
    characters[rows, who] = defender


def _support(battles: Battles, rows: Rows, actions: Choices) -> None:
    """Do what an action does to the actor's own side, and pay for it."""
    characters = battles.characters
    who = wounded(characters, side(battles))
    maximum = characters[rows, who, Column.MAX_HEALTH]
    healed = characters[rows, who, Column.HEALTH] + np.rint(HEAL[actions] * maximum).astype(np.int32)
    characters[rows, who, Column.HEALTH] = np.minimum(healed, maximum)
    actor = characters[rows, battles.actor]
    actor[:, Column.SHIELD] = np.maximum(actor[:, Column.SHIELD], _SHIELD[actions])
    actor[:, Column.HASTE] = np.maximum(actor[:, Column.HASTE], _HASTE[actions])
    actor[:, Column.ENERGY] = np.minimum(actor[:, Column.ENERGY] - COST[actions] + _ENERGY[actions], MAX_ENERGY)
    cooldown = _COOLDOWN[actions]
    actor[rows, cooldown] = np.maximum(actor[rows, cooldown], _WAIT[actions])
    characters[rows, battles.actor] = actor


def _decide(battles: Battles) -> None:
    """End the battles in which a side has nobody left."""
    alive = battles.characters[..., Column.HEALTH] > 0
    a, b = alive[:, :SIDE_SIZE].any(axis=1), alive[:, SIDE_SIZE:].any(axis=1)
    battles.over[:] = ~(a & b)
    battles.outcome[:] = a.astype(np.int32) - b.astype(np.int32)


def _find_actor(battles: Battles) -> None:
    """Pass to the next one who can act, through the ends of rounds, where the battle is not over.

    A stun ends when its turn is lost and nobody is stunned in between, so this takes at most two rounds.
    """
    seeking = np.flatnonzero(~battles.over)
    while len(seeking):
        characters = battles.characters[seeking]
        speed = characters[..., Column.SPEED] * np.where(characters[..., Column.HASTE] > 0, HASTE_FACTOR, 1.0)
        waiting = (characters[..., Column.HEALTH] > 0) & (characters[..., Column.ACTED] == 0)
        order = np.where(waiting, speed * CHARACTERS + characters[..., Column.INITIATIVE], -1.0)
        actor = order.argmax(axis=1)
        nobody = ~waiting.any(axis=1)
        battles.actor[seeking] = actor
        stunned = ~nobody & (characters[np.arange(len(actor)), actor, Column.STUN] > 0)
        lost, who = seeking[stunned], actor[stunned]
        battles.characters[lost, who, Column.STUN] = 0
        battles.characters[lost, who, Column.ACTED] = 1
        if nobody.any():
            _end_round(battles, seeking[nobody])
        seeking = seeking[(nobody | stunned) & ~battles.over[seeking]]


def _end_round(battles: Battles, rows: Rows) -> None:
    """Let poison hurt, energy return and timers run down, and begin the next round."""
    part = battles.take(rows)
    characters = part.characters
    poison = np.rint(POISON_SHARE * characters[..., Column.MAX_HEALTH]).astype(np.int32)
    health = characters[..., Column.HEALTH] - np.where(characters[..., Column.POISON] > 0, poison, 0)
    characters[..., Column.HEALTH] = np.maximum(health, 0)
    gained = 1 + (characters[..., Column.HASTE] > 0)
    present = characters[..., Column.MAX_HEALTH] > 0
    characters[..., Column.ENERGY] = np.minimum(characters[..., Column.ENERGY] + gained, MAX_ENERGY) * present
    stun = characters[..., Column.STUN].copy()
    characters[..., _TIMERS] = np.maximum(characters[..., _TIMERS] - 1, 0)
    characters[..., Column.STUN] = stun
    characters[..., Column.ACTED] = 0
    _decide(part)
    part.over[:] |= part.round == MAX_ROUNDS
    part.round[:] = np.minimum(part.round + 1, MAX_ROUNDS)
    battles.put(rows, part)
