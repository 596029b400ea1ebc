from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_host.arena import evaluation, observation, rules
from trainer_host.arena.observation import View
from trainer_host.arena.players import ExpertPlayer, ModelPlayer, Player, RandomPlayer, ScriptedPlayer
from trainer_host.arena.rules import Battles, Column

PLAYERS = [RandomPlayer(), ScriptedPlayer(), ExpertPlayer(), ModelPlayer(lambda features: -features[:, :8])]


def seen(rng: np.random.Generator | None = None) -> tuple[Battles, View]:
    battles = rules.draw(rng or np.random.default_rng(1), 32)
    return battles, observation.view(battles)


@pytest.mark.parametrize("player", PLAYERS, ids=lambda player: type(player).__name__)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_every_choice_is_legal_in_whole_battles(player: Player, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ended = evaluation.play_out(rules.draw(rng, 6), (player, RandomPlayer()), np.arange(6, dtype=np.int32) % 2, rng)
    assert ended.over.all()


@pytest.mark.parametrize("player", PLAYERS[1:], ids=lambda player: type(player).__name__)
def test_all_but_the_random_player_choose_by_what_they_see_alone(player: Player) -> None:
    _, view = seen()
    batched = player.choose(view, np.random.default_rng(0))
    alone = [player.choose(view.take(np.array([row])), np.random.default_rng(row))[0] for row in range(32)]
    assert batched.tolist() == alone


def test_the_random_player_takes_each_legal_action_equally_often() -> None:
    _, view = seen()
    rng, player = np.random.default_rng(0), RandomPlayer()
    counts = np.bincount(np.concatenate([player.choose(view, rng) for _ in range(100)]), minlength=8)
    assert view.legal.all()
    assert counts.min() > 330


def test_the_script_goes_down_its_list() -> None:
    _, view = seen()
    player, rng = ScriptedPlayer(), np.random.default_rng(0)
    assert (player.choose(view, rng) == rules.SMASH).all()
    me = view.characters[:, 0]
    me[:, Column.ENERGY] = 2
    me[:, Column.HEALTH] = me[:, Column.MAX_HEALTH] * 45 // 100
    tired = view._replace(legal=rules.legal_actions(me))
    assert (player.choose(tired, rng) == rules.SHIELD).all()
    me[:, Column.HEALTH] = me[:, Column.MAX_HEALTH] * 35 // 100
    assert (player.choose(tired, rng) == rules.MEND).all()
    me[:, Column.ENERGY] = 0
    spent = view._replace(legal=rules.legal_actions(me))
    assert (player.choose(spent, rng) == rules.STRIKE).all()


def test_a_model_never_gets_an_illegal_action_through() -> None:
    battles, view = seen()
    battles.characters[..., Column.ENERGY] = 0
    spent = observation.view(battles)
    wants_smash = ModelPlayer(lambda features: np.eye(8)[[rules.SMASH] * len(features)])
    assert (wants_smash.choose(view, np.random.default_rng(0)) == rules.SMASH).all()
    assert (wants_smash.choose(spent, np.random.default_rng(0)) == rules.STRIKE).all()


def test_a_model_is_shown_the_encoded_view() -> None:
    _, view = seen()
    shown: list[observation.Features] = []

    def score(features: observation.Features) -> observation.Features:
        shown.append(features)
        return features[:, :8]

    ModelPlayer(score).choose(view, np.random.default_rng(0))
    np.testing.assert_array_equal(shown[0], observation.encode(view))


def test_the_expert_ends_a_battle_when_it_can() -> None:
    _, view = seen()
    view = view.take(view.characters[:, 3, Column.MAX_HEALTH] == 0)
    view.characters[:, 2, Column.HEALTH] = 3
    worth = ExpertPlayer().worth(view)
    assert (ExpertPlayer().choose(view, np.random.default_rng(0)) == rules.STRIKE).all()
    assert (worth[:, rules.STRIKE] > 40).all()


def test_the_expert_sees_no_worth_in_what_is_already_there() -> None:
    _, view = seen()
    fresh = ExpertPlayer().worth(view)
    view.characters[:, 0, [Column.SHIELD, Column.HASTE]] = 1
    view.characters[:, 2, [Column.POISON, Column.STUN]] = 1
    stale = ExpertPlayer().worth(view)
    for action in (rules.SHIELD, rules.HASTE, rules.VENOM, rules.STUN):
        assert (stale[:, action] <= fresh[:, action]).all()
        assert (stale[:, action] < fresh[:, action]).any()


@pytest.mark.parametrize(
    ("player", "opponent", "least"),
    [
        (ScriptedPlayer(), RandomPlayer(), 0.90),
        (ExpertPlayer(), ScriptedPlayer(), 0.70),
        (ExpertPlayer(), RandomPlayer(), 0.95),
    ],
)
def test_better_players_win_by_far(player: Player, opponent: Player, least: float) -> None:
    assert evaluation.evaluate(player, opponent, 8192, seed=11).low >= least
