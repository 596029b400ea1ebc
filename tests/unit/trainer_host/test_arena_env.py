from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from trainer_host.arena import rules
from trainer_host.arena.env import BattleEnv
from trainer_host.arena.players import RandomPlayer

Step = tuple[Any, float, bool, bool, dict[str, Any]]


def episode(env: BattleEnv, seed: int) -> list[Step]:
    """Play random legal actions to the end."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    steps: list[Step] = []
    while not steps or not steps[-1][2]:
        steps.append(env.step(rng.choice(np.flatnonzero(env.action_masks()))))
    return steps


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shaping", [0, 1])
def test_gymnasium_finds_nothing_wrong(side: int, shaping: int) -> None:
    check_env(BattleEnv(side=side, shaping=bool(shaping)), skip_render_check=True)


@pytest.mark.parametrize("side", [0, 1])
def test_an_episode_ends_with_its_outcome_and_pays_nothing_before(side: int) -> None:
    rewards = []
    for seed in range(40):
        steps = episode(BattleEnv(side=side), seed)
        assert all(reward == 0 for _, reward, _, _, _ in steps[:-1])
        rewards.append(steps[-1][1])
    assert set(rewards) <= {-1.0, 0.0, 1.0}
    assert np.mean(rewards) < -0.5


def test_the_side_decides_whose_outcome_is_paid() -> None:
    env = BattleEnv(RandomPlayer(), side=1)
    won = 0.0
    for seed in range(40):
        env.reset(seed=seed)
        over, reward = False, 0.0
        while not over:
            legal = env.action_masks()
            action = next(one for one in (rules.SMASH, rules.STRIKE) if legal[one])
            _, reward, over, _, info = env.step(np.int64(action))
            assert over or info["actor"] in {"B1", "B2"}
        won += reward
    assert won > 20


def test_an_episode_follows_its_seed() -> None:
    first, again, other = episode(BattleEnv(), 3), episode(BattleEnv(), 3), episode(BattleEnv(), 4)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0][0], other[0][0])


def test_both_characters_act_as_steps_of_one_episode() -> None:
    actors = {step[4]["actor"] for seed in range(5) for step in episode(BattleEnv(), seed)[:-1]}
    assert actors == {"A1", "A2"}


def test_shaping_adds_up_to_the_potential_it_began_with() -> None:
    for seed in range(10):
        plain, shaped = (episode(BattleEnv(shaping=shaping, gamma=1.0), seed) for shaping in (False, True))
        assert len(plain) == len(shaped)
        env = BattleEnv(gamma=1.0)
        env.reset(seed=seed)
        assert sum(step[1] for step in shaped) == pytest.approx(sum(step[1] for step in plain) - env._potential())
        assert any(step[1] for step in shaped[:-1])


def test_an_illegal_action_is_played_as_rest_and_told() -> None:
    wrong, right = BattleEnv(), BattleEnv()
    wrong.reset(seed=8)
    right.reset(seed=8)
    while wrong.action_masks()[rules.SMASH]:
        wrong.step(np.int64(rules.SMASH))
        right.step(np.int64(rules.SMASH))
    told = wrong.step(np.int64(rules.SMASH))
    rested = right.step(np.int64(rules.REST))
    assert told[4]["illegal"]
    assert not rested[4]["illegal"]
    np.testing.assert_array_equal(told[0], rested[0])
