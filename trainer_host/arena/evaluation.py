"""How often one player beats another, and how sure that is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from trainer_host.arena import observation, rules
from trainer_host.arena.players import Player
from trainer_host.arena.rules import Battles, IntArray

Z95 = 1.959964
BATCH = 2048


class WinRate(NamedTuple):
    """The outcome of many battles.

    Attributes:
        low: Lower end of the 95% interval of the share of wins.
        high: Upper end.
    """

    battles: int
    wins: int
    draws: int
    losses: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """The share of battles won; 0 without battles."""
        return self.wins / self.battles if self.battles else 0.0


def win_rate(wins: int, draws: int, losses: int) -> WinRate:
    """Count battles together. A draw is not won."""
    battles = wins + draws + losses
    return WinRate(battles, wins, draws, losses, *wilson(wins, battles))


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a share, by default at 95%; (0, 1) without trials.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if not trials:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def evaluate(player: Player, opponent: Player, battles: int, seed: int) -> WinRate:
    """Let `player` meet `opponent`, on side A in every other battle and on side B in the rest.

    The same players, number and seed give the same result.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros(3, np.int64)
    for start in range(0, battles, BATCH):
        size = min(BATCH, battles - start)
        own = (np.arange(size) % 2).astype(np.int32)
        ended = play_out(rules.draw(rng, size), (player, opponent), own, rng)
        counts += np.bincount(np.where(own == 0, ended.outcome, -ended.outcome) + 1, minlength=3)
    losses, draws, wins = counts.tolist()
    return win_rate(wins, draws, losses)


def play_out(battles: Battles, players: tuple[Player, Player], own: IntArray, rng: np.random.Generator) -> Battles:
    """Play battles to their end.

    Args:
        battles: Where they stand.
        players: Two of them.
        own: (B,) the side, 0 or 1, that the first player plays in each battle.
        rng: For the players' choices.
    """
    ended = battles.take(np.arange(len(own)))
    rows = np.flatnonzero(~ended.over)
    while len(rows):
        running = ended.take(rows)
        running = rules.play(running, _choices(running, players, own[rows], rng))
        ended.put(rows, running)
        rows = rows[~running.over]
    return ended


def _choices(battles: Battles, players: tuple[Player, Player], own: IntArray, rng: np.random.Generator) -> IntArray:
    actions = np.zeros(len(own), np.int32)
    seen = observation.view(battles)
    first = rules.side(battles) == own
    for player, turns in zip(players, (first, ~first), strict=True):
        if turns.any():
            actions[turns] = player.choose(seen.take(turns), rng)
    return actions
