from __future__ import annotations

import numpy as np
import pytest

from trainer_host.arena import evaluation, rules
from trainer_host.arena.evaluation import evaluate, wilson, win_rate
from trainer_host.arena.players import RandomPlayer, ScriptedPlayer


# Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I,
# method 3; the last row is the closed form n / (n + z^2).
@pytest.mark.parametrize(
    ("wins", "battles", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_the_interval_is_the_published_one(wins: int, battles: int, low: float, high: float) -> None:
    assert wilson(wins, battles) == pytest.approx((low, high), abs=5e-5)


def test_without_battles_nothing_is_known() -> None:
    nothing = win_rate(0, 0, 0)
    assert (nothing.low, nothing.high, nothing.rate) == (0.0, 1.0, 0.0)


def test_a_draw_is_not_won() -> None:
    result = win_rate(5, 3, 2)
    assert (result.battles, result.rate) == (10, 0.5)


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    player, opponent = ScriptedPlayer(), RandomPlayer()
    first = evaluate(player, opponent, 3000, seed=5)
    assert first.battles == 3000
    assert evaluate(player, opponent, 3000, seed=5) == first
    assert evaluate(player, opponent, 3000, seed=6) != first


def test_the_wins_are_the_players_and_not_its_opponents() -> None:
    assert evaluate(ScriptedPlayer(), RandomPlayer(), 1000, seed=1).low > 0.8
    assert evaluate(RandomPlayer(), ScriptedPlayer(), 1000, seed=1).high < 0.2


def test_the_player_is_favoured_on_neither_side() -> None:
    result = evaluate(ScriptedPlayer(), ScriptedPlayer(), 4096, seed=1)
    assert result.low < result.losses / result.battles < result.high


@pytest.mark.parametrize("side", [0, 1])
def test_a_battle_is_played_out_by_whom_it_says(side: int) -> None:
    rng = np.random.default_rng(0)
    ended = evaluation.play_out(
        rules.draw(rng, 200), (ScriptedPlayer(), RandomPlayer()), np.full(200, side, np.int32), rng
    )
    assert ended.over.all()
    won = (ended.outcome == (1 if side == 0 else -1)).mean()
    assert won > 0.8
