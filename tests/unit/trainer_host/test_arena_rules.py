from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_host.arena import rules
from trainer_host.arena.rules import Battles, Column


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def duel(*, size: int = 1, **columns: Any) -> Battles:
    """One battle of like characters in which A1 begins; `health=(a1, b1)` and so on set the two first ones."""
    characters = np.zeros((1, rules.CHARACTERS, len(Column)), np.int32)
    there = [0, 2] if size == 1 else [0, 1, 2, 3]
    for column, value in {
        Column.HEALTH: 100,
        Column.MAX_HEALTH: 100,
        Column.ATTACK: 50,
        Column.DEFENSE: 50,
        Column.SPEED: 50,
        Column.ENERGY: 6,
    }.items():
        characters[0, there, column] = value
    characters[0, 0, Column.INITIATIVE] = 3
    for name, (a1, b1) in columns.items():
        characters[0, 0, Column[name.upper()]], characters[0, 2, Column[name.upper()]] = a1, b1
    none = np.zeros(1, np.int32)
    return Battles(characters, np.array([7], np.uint64), none + 1, none.copy(), none.copy(), none == 1, none.copy())


def played(battles: Battles, *actions: int) -> Battles:
    for action in actions:
        battles = rules.play(battles, np.array([action]))
    return battles


def cell(battles: Battles, who: int, column: Column) -> int:
    return int(battles.characters[0, who, column])


def random_turn(battles: Battles, generator: np.random.Generator) -> Battles:
    choices = np.where(rules.legal(battles), generator.random((len(battles.actor), len(rules.ACTIONS))), -1)
    return rules.play(battles, choices.argmax(axis=1))


def random_end(battles: Battles, seed: int) -> Battles:
    generator, battles = rng(seed), battles.take(np.arange(len(battles.actor)))
    while len(rows := np.flatnonzero(~battles.over)):
        battles.put(rows, random_turn(battles.take(rows), generator))
    return battles


def same(left: Battles, right: Battles) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in Battles._fields)


def test_a_draw_is_fair_and_within_its_bounds() -> None:
    battles = rules.draw(rng(), 500)
    there = battles.characters[..., Column.MAX_HEALTH] > 0
    assert (there[:, :2].sum(axis=1) == there[:, 2:].sum(axis=1)).all()
    assert set(there.sum(axis=1).tolist()) == {2, 4}
    living = battles.characters[there]
    assert (living[:, Column.HEALTH] == living[:, Column.MAX_HEALTH]).all()
    assert living[:, Column.SPEED].min() >= 30
    assert living[:, Column.SPEED].max() <= 90
    assert 0.4 < rules.side(battles).mean() < 0.6
    assert (battles.round == 1).all()


def test_a_draw_follows_its_seed() -> None:
    assert same(rules.draw(rng(4), 20), rules.draw(rng(4), 20))
    assert not same(rules.draw(rng(4), 20), rules.draw(rng(5), 20))


@given(st.integers(0, 2**32))
def test_random_play_keeps_every_rule_and_ends(seed: int) -> None:
    generator = rng(seed)
    battles = rules.draw(generator, 8)
    for _ in range(rules.MAX_ROUNDS * rules.CHARACTERS):
        battles = battles.take(~battles.over)
        if not len(battles.actor):
            break
        mask = rules.legal(battles)
        actors = battles.characters[np.arange(len(mask)), battles.actor]
        assert mask[:, [rules.STRIKE, rules.REST]].all()
        assert (actors[:, Column.HEALTH] > 0).all()
        assert (actors[:, [Column.ACTED, Column.STUN]] == 0).all()
        battles = random_turn(battles, generator)
        cells = battles.characters
        assert (cells >= 0).all()
        assert (cells[..., Column.HEALTH] <= cells[..., Column.MAX_HEALTH]).all()
        assert (cells[..., Column.ENERGY] <= rules.MAX_ENERGY).all()
        assert (cells[cells[..., Column.MAX_HEALTH] == 0] == 0).all()
        assert (battles.round <= rules.MAX_ROUNDS).all()
    assert battles.over.all()


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_a_battle_unfolds_the_same_alone_and_in_a_batch(seed: int) -> None:
    generator = rng(seed)
    batch = rules.draw(generator, 4)
    alone = [batch.take(np.array([row])) for row in range(4)]
    while len(rows := np.flatnonzero(~batch.over)):
        part = batch.take(rows)
        choices = np.where(rules.legal(part), generator.random((len(rows), len(rules.ACTIONS))), -1).argmax(axis=1)
        batch.put(rows, rules.play(part, choices))
        for row, choice in zip(rows, choices, strict=True):
            alone[row] = rules.play(alone[row], np.array([choice]))
    assert all(same(batch.take(np.array([row])), alone[row]) for row in range(4))


def test_the_same_seed_gives_the_same_battles_to_the_end() -> None:
    drawn = rules.draw(rng(1), 50)
    assert same(random_end(drawn, 2), random_end(drawn, 2))
    assert set(random_end(drawn, 2).outcome.tolist()) >= {-1, 1}


def test_play_changes_nothing_that_it_was_given() -> None:
    battles = rules.draw(rng(), 10)
    before = battles.take(np.arange(10))
    random_turn(battles, rng())
    assert same(battles, before)


@pytest.mark.parametrize(
    ("speed", "initiative", "first"),
    [((60, 50), (0, 3), 0), ((50, 60), (3, 0), 2), ((50, 50), (3, 0), 0), ((50, 50), (0, 3), 2)],
)
def test_the_fastest_acts_first_and_ties_follow_the_drawn_initiative(
    speed: tuple[int, int], initiative: tuple[int, int], first: int
) -> None:
    battles = duel(speed=speed, initiative=initiative)
    rules._find_actor(battles)
    assert battles.actor[0] == first


def test_haste_overtakes_within_the_round() -> None:
    battles = duel(size=2)
    battles.characters[0, 1, Column.SPEED] = 40
    battles.characters[0, 1, Column.HASTE] = 1
    rules._find_actor(battles)
    assert battles.actor[0] == 1


@pytest.mark.parametrize("action", range(len(rules.ACTIONS)))
def test_an_action_costs_its_energy_and_starts_its_cooldown(action: int) -> None:
    row = rules.TABLE[action]
    after = played(duel(size=2, energy=(3, 3)), action)
    assert cell(after, 0, Column.ENERGY) == 3 - row.cost + row.energy
    if row.cooldown is not None:
        assert cell(after, 0, row.cooldown) == row.wait
        assert not rules.legal_actions(after.characters[:, 0])[0, action]


def test_an_action_is_legal_again_after_its_wait() -> None:
    battles = played(duel(), rules.HASTE)
    for _ in range(rules.TABLE[rules.HASTE].wait - 1):
        battles = played(battles, rules.REST, rules.REST)
        assert not rules.legal_actions(battles.characters[:, 0])[0, rules.HASTE]
    battles = played(battles, rules.REST)
    assert rules.legal_actions(battles.characters[:, 0])[0, rules.HASTE]


def test_without_energy_only_what_is_free_is_legal() -> None:
    legal = rules.legal(duel(energy=(0, 0)))[0]
    assert np.flatnonzero(legal).tolist() == [rules.STRIKE, rules.REST]


def test_a_strike_takes_what_the_formula_says_give_or_take_the_roll() -> None:
    middle = 0.5 * 50 * 100 / 150
    lost = {
        100 - cell(played(duel()._replace(seed=np.array([seed], np.uint64)), rules.STRIKE), 2, Column.HEALTH)
        for seed in range(200)
    }
    assert (min(lost), max(lost)) == (round(middle * rules.ROLL_LOW), round(middle * rules.ROLL_HIGH))


def test_luck_is_even() -> None:
    sample = rules.luck(np.arange(4000, dtype=np.uint64), np.arange(4000, dtype=np.int32))
    assert sample.min() >= 0
    assert sample.max() < 1
    assert np.histogram(sample, 10, (0, 1))[0].min() > 320


def test_a_shield_halves_damage_and_keeps_poison_and_stun_away() -> None:
    bare, shielded = duel(size=2, health=(100, 99)), duel(size=2, health=(100, 99), shield=(0, 2))
    lost = 99 - cell(played(bare, rules.SMASH), 2, Column.HEALTH)
    assert 99 - cell(played(shielded, rules.SMASH), 2, Column.HEALTH) == pytest.approx(lost / 2, abs=0.5)
    for action, column in ((rules.VENOM, Column.POISON), (rules.STUN, Column.STUN)):
        assert cell(played(bare, action), 2, column) > 0
        assert cell(played(shielded, action), 2, column) == 0


def test_stun_costs_exactly_one_turn() -> None:
    battles = played(duel(), rules.STUN)
    assert (battles.actor[0], battles.round[0]) == (0, 2)
    battles = played(battles, rules.REST)
    assert (battles.actor[0], battles.round[0]) == (2, 2)


def test_stun_that_comes_after_the_turn_costs_the_next_one() -> None:
    battles = played(duel(speed=(40, 50))._replace(actor=np.array([2], np.int32)), rules.REST, rules.STUN)
    assert (battles.actor[0], battles.round[0]) == (0, 2)


def test_poison_hurts_at_the_end_of_each_round_and_runs_out() -> None:
    battles = played(duel(health=(100, 100)), rules.VENOM)
    lost = [cell(battles, 2, Column.HEALTH)]
    for _ in range(4):
        battles = played(battles, rules.REST, rules.REST)
        lost.append(cell(battles, 2, Column.HEALTH))
    assert np.diff(lost).tolist() == [-8, -8, -8, 0]


def test_a_mend_goes_to_the_most_wounded_and_not_beyond_the_maximum() -> None:
    battles = duel(size=2)
    battles.characters[0, 1, Column.HEALTH] = 60
    assert cell(played(battles, rules.MEND), 1, Column.HEALTH) == 85
    battles.characters[0, 1, Column.HEALTH] = 90
    assert cell(played(battles, rules.MEND), 1, Column.HEALTH) == 100


def test_energy_returns_each_round_and_faster_with_haste() -> None:
    battles = played(duel(energy=(0, 0), haste=(2, 0)), rules.STRIKE, rules.STRIKE)
    assert (cell(battles, 0, Column.ENERGY), cell(battles, 2, Column.ENERGY)) == (2, 1)


def test_attacks_hit_the_weakest_living_enemy() -> None:
    battles = duel(size=2)
    battles.characters[0, 2, Column.HEALTH] = 0
    battles.characters[0, 3, Column.HEALTH] = 40
    assert cell(played(battles, rules.STRIKE), 3, Column.HEALTH) < 40


@pytest.mark.parametrize(("health", "outcome"), [((100, 1), 1), ((1, 100), -1)])
def test_a_battle_is_over_when_a_side_has_nobody_left(health: tuple[int, int], outcome: int) -> None:
    begins = 0 if outcome == 1 else 2
    battles = duel(health=health)._replace(actor=np.array([begins], np.int32))
    after = played(battles, rules.STRIKE)
    assert (after.over[0], after.outcome[0]) == (True, outcome)


def test_both_sides_can_fall_to_poison_in_the_same_round() -> None:
    after = played(duel(health=(5, 5), poison=(2, 2)), rules.REST, rules.REST)
    assert (after.over[0], after.outcome[0]) == (True, 0)


def test_the_last_round_ends_in_a_draw() -> None:
    battles = duel()._replace(round=np.array([rules.MAX_ROUNDS], np.int32))
    after = played(battles, rules.REST, rules.REST)
    assert (after.over[0], after.outcome[0], after.round[0]) == (True, 0, rules.MAX_ROUNDS)


def test_our_own_mistakes_are_caught() -> None:
    with pytest.raises(AssertionError, match="illegal action"):
        played(duel(energy=(0, 0)), rules.SMASH)
    with pytest.raises(AssertionError, match="no turn"):
        played(played(duel(health=(100, 1)), rules.STRIKE), rules.STRIKE)
