from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protocol.features import compile_spec
from trainer_host.arena import observation, rules
from trainer_host.arena.rules import Battles, Column


def some_battles(seed: int, turns: int) -> Battles:
    """Battles after some random turns, ended ones among them."""
    rng = np.random.default_rng(seed)
    battles = rules.draw(rng, 16)
    for _ in range(turns):
        rows = np.flatnonzero(~battles.over)
        part = battles.take(rows)
        choices = np.where(rules.legal(part), rng.random((len(rows), len(rules.ACTIONS))), -1)
        battles.put(rows, rules.play(part, choices.argmax(axis=1)))
    return battles


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, rules.CHARACTERS - 1))
def test_the_vector_is_what_the_signed_spec_makes_of_the_state(seed: int, turns: int, actor: int) -> None:
    battles = some_battles(seed, turns)
    battles = battles.take(battles.characters[:, actor, Column.MAX_HEALTH] > 0)
    seen = observation.view(battles, np.full(len(battles.actor), actor, np.int32))
    encode = compile_spec(observation.COMBAT_FEATURES)
    expected = [encode(json.loads(json.dumps(state))) for state in observation.states(seen)]
    vectors = observation.encode(seen)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(battles.actor), observation.COMBAT_FEATURES.length)
    np.testing.assert_allclose(vectors, np.array(expected).reshape(vectors.shape), rtol=0, atol=1e-6)


def test_the_vector_has_the_documented_length() -> None:
    assert observation.COMBAT_FEATURES.length == 47


def test_a_view_begins_with_the_actor_and_the_enemy_that_an_attack_would_hit() -> None:
    battles = some_battles(3, 12)
    for actor in range(rules.CHARACTERS):
        actors = np.full(16, actor, np.int32)
        seats = observation.view(battles, actors).seats
        assert (seats[:, 0] == actor).all()
        assert (seats[:, 1] == actor ^ 1).all()
        assert (seats[:, 2] == rules.target(battles.characters, actors // rules.SIDE_SIZE)).all()
        assert (np.sort(seats, axis=1) == np.arange(4)).all()


def test_a_view_is_of_the_actor_to_act_unless_told_otherwise() -> None:
    battles = some_battles(3, 4)
    seen = observation.view(battles)
    assert (seen.seats[:, 0] == battles.actor).all()
    assert (seen.legal == rules.legal(battles)).all()
    part = seen.take(np.array([2, 5]))
    assert (part.characters == seen.characters[[2, 5]]).all()


def test_the_fallen_are_left_out_but_the_actor_is_always_there() -> None:
    battles = some_battles(0, 0)
    full = battles.characters[:, 1, Column.MAX_HEALTH] > 0
    battles = battles.take(full)
    battles.characters[:, [0, 3], Column.HEALTH] = 0
    survivor = observation.view(battles, np.full(len(battles.actor), 1, np.int32))
    [state, *_] = observation.states(survivor)
    assert [one["name"] for one in state["team"]] == ["A2"]
    assert [one["name"] for one in state["enemies"]] == ["B1"]
    assert state["characters"] == 2
    fallen = observation.view(battles, np.zeros(len(battles.actor), np.int32))
    [state, *_] = observation.states(fallen)
    assert [one["name"] for one in state["team"]] == ["A1", "A2"]
    assert state["team"][0]["stats"]["health"] == 0


def test_a_state_reads_like_a_game() -> None:
    battles = rules.draw(np.random.default_rng(2), 1)
    battles.characters[:, :, Column.POISON] = 2
    battles.characters[:, :, Column.MEND_COOLDOWN] = 3
    [state] = observation.states(observation.view(battles, np.zeros(1, np.int32)))
    me = battles.characters[0, 0]
    assert state["round"] == 1
    assert state["cooldowns"] == {"mend": 3}
    assert state["team"][0] == {
        "name": "A1",
        "stats": {
            "health": me[Column.HEALTH],
            "maxHealth": me[Column.MAX_HEALTH],
            "attack": me[Column.ATTACK],
            "defense": me[Column.DEFENSE],
            "speed": me[Column.SPEED],
        },
        "energy": 3,
        "statuses": {"poison": 2},
    }
