"""One battle as a Gymnasium environment: the agent plays one side, the opponent is part of the world.

Two characters of the agent's act in turn, each as a step of its own of the same episode. The reward is the outcome, at
the end: 1, 0 or -1. With shaping, each step adds `gamma * phi(next) - phi(now)`, where phi is the difference of the two
sides' shares of health and 0 at the end; that form, and no other, leaves every best policy best (Ng, Harada, Russell,
"Policy invariance under reward transformations", ICML 1999, theorem 1).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from trainer_host.arena import observation, rules
from trainer_host.arena.observation import Features
from trainer_host.arena.players import Player, ScriptedPlayer
from trainer_host.arena.rules import BoolArray, Column

MOST_FEATURE = 2.0


class BattleEnv(gymnasium.Env[Features, np.int64]):
    """One battle.

    An action that is not legal is played as `rest`, and `info["illegal"]` says so; `action_masks` tells which are.

    Args:
        opponent: Plays the other side; `ScriptedPlayer` by default.
        side: 0 or 1, the agent's.
        shaping: Whether to add the potential-based term to the reward.
        gamma: The discount of the learner, for the shaping term.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self, opponent: Player | None = None, *, side: int = 0, shaping: bool = False, gamma: float = 0.99
    ) -> None:
        length = observation.COMBAT_FEATURES.length
        self.observation_space = gymnasium.spaces.Box(0.0, MOST_FEATURE, (length,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(rules.ACTIONS))
        self._opponent = opponent or ScriptedPlayer()
        self._side = side
        self._shaping = shaping
        self._gamma = gamma

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Features, dict[str, Any]]:
        """Draw a battle and let it come to the agent's first turn."""
        super().reset(seed=seed, options=options)
        self._battle = rules.draw(self.np_random, 1)
        self._await_turn()
        return self._seen(), self._info()

    def step(self, action: np.int64) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """Play one character's action and let the battle come to the agent's next turn, or to its end."""
        illegal = not self.action_masks()[action]
        before = self._potential()
        self._battle = rules.play(self._battle, np.array([rules.REST if illegal else action]))
        self._await_turn()
        over = bool(self._battle.over[0])
        reward = float(self._battle.outcome[0]) * (1 if self._side == 0 else -1) if over else 0.0
        if self._shaping:
            reward += self._gamma * self._potential() - before
        return self._seen(), reward, over, False, self._info(illegal=illegal)

    def action_masks(self) -> BoolArray:
        """(actions,) what the character whose turn it is may do."""
        mask: BoolArray = rules.legal(self._battle)[0]
        return mask

    def _await_turn(self) -> None:
        while not self._battle.over[0] and rules.side(self._battle)[0] != self._side:
            action = self._opponent.choose(observation.view(self._battle), self.np_random)
            self._battle = rules.play(self._battle, action)

    def _seen(self) -> Features:
        """What the character to act sees; at the end, what the agent's first one sees."""
        first = np.full(1, self._side * rules.SIDE_SIZE, np.int32)
        actor = first if self._battle.over[0] else self._battle.actor
        features: Features = observation.encode(observation.view(self._battle, actor))[0]
        return features

    def _potential(self) -> float:
        if self._battle.over[0]:
            return 0.0
        characters = self._battle.characters[0]
        health = characters[:, Column.HEALTH].reshape(2, rules.SIDE_SIZE).sum(axis=1)
        share = health / characters[:, Column.MAX_HEALTH].reshape(2, rules.SIDE_SIZE).sum(axis=1)
        return float(share[self._side] - share[1 - self._side])

    def _info(self, *, illegal: bool = False) -> dict[str, Any]:
        actor = observation.NAMES[int(self._battle.actor[0])]
        return {"actor": actor, "round": int(self._battle.round[0]), "illegal": illegal}
