from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import Rejected
from trainer_host import dataset
from trainer_host.dataset import Transitions

FEATURES, ACTIONS = 3, 2


def row(**changes: Any) -> dict[str, Any]:
    good = {
        "slot": "combat",
        "battle": "b0",
        "actor": "a",
        "step": 0,
        "features": np.array([1, 2, 3], "<f4").tobytes(),
        "action": 1,
        "taken": True,
        "propensity": float("nan"),
        "legal": b"\x01\x01",
        "reward": 0.0,
        "done": False,
        "truncated": False,
        "model": "m",
        "at": 5.0,
    }
    return {**good, **changes}


def table(rows: Sequence[dict[str, Any]]) -> Transitions:
    return dataset.from_rows([tuple(each[name] for name in Transitions._fields) for each in rows])


def clean(rows: Sequence[dict[str, Any]]) -> dataset.Cleaned:
    return dataset.clean(table(rows), slot="combat", features=FEATURES, actions=ACTIONS)


def test_good_rows_become_arrays() -> None:
    examples, rejected = clean([row(), row(battle="b1", action=0, legal=b"\x01\x00"), row(legal=b"")])
    assert rejected == {}
    assert examples.features.tolist() == [[1, 2, 3]] * 3
    assert examples.features.dtype == np.float32
    assert examples.actions.tolist() == [1, 0, 1]
    assert examples.legal.tolist() == [[True, True], [True, False], [True, True]]
    assert [examples.names[number] for number in examples.battles] == ["b0", "b1", "b0"]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("unknown_slot", {"slot": "movement"}),
        ("wrong_length", {"features": b"\x00" * 8}),
        ("wrong_length", {"features": b"\x00" * 13}),
        ("not_finite", {"features": np.array([1, np.nan, 3], "<f4").tobytes()}),
        ("not_finite", {"features": np.array([1, np.inf, 3], "<f4").tobytes()}),
        ("action_out_of_range", {"action": ACTIONS}),
        ("action_out_of_range", {"action": -1}),
        ("wrong_legal_length", {"legal": b"\x01"}),
        ("action_illegal", {"legal": b"\x01\x00"}),
        ("reward_not_finite", {"reward": float("inf")}),
        ("reward_not_finite", {"reward": float("nan")}),
    ],
)
def test_a_bad_row_is_set_aside_and_counted(reason: str, change: dict[str, Any]) -> None:
    examples, rejected = clean([row(), row(**change), row(action=0)])
    assert rejected == {reason: 1}
    assert examples.actions.tolist() == [1, 0]


def test_a_row_with_two_faults_counts_once() -> None:
    assert clean([row(slot="x", action=9, reward=float("nan"))]).rejected == {"unknown_slot": 1}


def test_nothing_in_nothing_out() -> None:
    examples, rejected = clean([])
    assert rejected == {}
    assert examples.features.shape == (0, FEATURES)


def test_who_won_is_known_by_battle_and_actor() -> None:
    rows = [
        row(battle="won"),
        row(battle="won", done=True, reward=1.0),
        row(battle="won", actor="other"),
        row(battle="won", actor="other", done=True, reward=-1.0),
        row(battle="drawn", done=True, reward=0.0),
        row(battle="shaped", reward=0.5),
        row(battle="cut off", done=True, truncated=True, reward=1.0),
        row(battle="endless", done=True, reward=float("inf")),
        row(battle="elsewhere", slot="movement", done=True, reward=1.0),
        row(battle="elsewhere"),
    ]
    examples, _ = clean(rows)
    assert examples.won.tolist() == [True, True, False, False, False, False, False, False]


def test_an_outcome_counts_even_where_its_own_row_is_unfit() -> None:
    examples, rejected = clean([row(), row(features=b"", done=True, reward=1.0)])
    assert rejected == {"wrong_length": 1}
    assert examples.won.tolist() == [True]


@pytest.mark.parametrize(
    ("taken", "won", "expected"),
    [(True, True, [0, 1, 2]), (True, False, [0, 1]), (False, True, [0, 2]), (False, False, [])],
)
def test_selection(taken: bool, won: bool, expected: list[int]) -> None:
    rows = [
        row(battle="w", step=0, features=np.full(3, 0, "<f4").tobytes()),
        row(battle="l", features=np.full(3, 1, "<f4").tobytes()),
        row(battle="w", taken=False, done=True, reward=1.0, features=np.full(3, 2, "<f4").tobytes()),
        row(battle="l", taken=False, done=True, reward=-1.0, features=np.full(3, 3, "<f4").tobytes()),
    ]
    chosen = dataset.selected(clean(rows).examples, taken=taken, won=won)
    assert chosen.features[:, 0].astype(int).tolist() == expected


def many(battles: int) -> dataset.Examples:
    return clean([row(battle=f"b{number}", step=step) for number in range(battles) for step in range(3)]).examples


def test_a_split_keeps_battles_whole() -> None:
    train, validation = dataset.split(many(400), validation_share=0.25, seed=3)
    assert not set(train.battles) & set(validation.battles)
    assert len(train.battles) + len(validation.battles) == 1200
    # 400 draws with p = 1/4: four standard deviations are 35 battles.
    assert abs(len(set(validation.battles)) - 100) < 35


def test_a_split_follows_from_seed_and_name_alone() -> None:
    def validating(examples: dataset.Examples, seed: int) -> set[str]:
        rows = dataset.split(examples, validation_share=0.25, seed=seed).validation.battles
        return {examples.names[number] for number in rows}

    few, more = many(50), many(100)
    assert validating(few, 3) == validating(more, 3) & set(few.names)
    assert validating(few, 3) != validating(few, 4)


@pytest.mark.parametrize(("battles", "share"), [(0, 0.5), (1, 0.5), (20, 1e-9), (20, 1 - 1e-9)])
def test_a_split_with_an_empty_side_is_refused(battles: int, share: float) -> None:
    with pytest.raises(Rejected) as refused:
        dataset.split(many(battles), validation_share=share, seed=0)
    assert refused.value.code == "too_few_battles"


def test_a_battle_of_which_nothing_is_left_counts_for_no_side() -> None:
    examples = many(40).take(np.arange(120) < 3)
    with pytest.raises(Rejected, match="3 examples from 1 battles"):
        dataset.split(examples, validation_share=0.5, seed=0)


def test_rows_of_a_database_become_columns() -> None:
    transitions = table([row(propensity=None, step=4), row(propensity=0.25, taken=False)])
    np.testing.assert_array_equal(transitions.propensity, [np.nan, 0.25])
    assert transitions.taken.tolist() == [True, False]
    assert transitions.step.tolist() == [4, 0]
    assert transitions.battle == ["b0", "b0"]


def test_rows_without_a_field_are_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="shorter"):
        dataset.from_rows([("combat", "b0")])


@pytest.mark.parametrize("rows", [[], [row(), row(slot="é", features=b"", legal=b"", battle="b1", propensity=0.5)]])
def test_what_is_saved_is_loaded(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    before = table(rows)
    dataset.save(tmp_path / "data.npz", before)
    after = dataset.load(tmp_path / "data.npz")
    for name, values in before._asdict().items():
        np.testing.assert_array_equal(getattr(after, name), values, err_msg=name)
        assert type(getattr(after, name)) is type(values), name


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"nonsense"])
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(Rejected) as refused:
        dataset.load(path)
    assert refused.value.code == "bad_dataset"


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    dataset.save(tmp_path / "data.npz", table([row()])._replace(at=np.zeros(2)))
    with pytest.raises(Rejected, match=r"\[1, 2\] rows"):
        dataset.load(tmp_path / "data.npz")


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    dataset.save(path, table([row()] * 50))
    data = bytearray(path.read_bytes())
    for index in range(len(data) // 4, 3 * len(data) // 4):
        data[index] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(Rejected) as refused:
        dataset.load(path)
    assert refused.value.code == "bad_dataset"


def test_a_file_without_a_column_or_without_itself_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", step=np.zeros(1))
    for name in ("data.npz", "absent.npz"):
        with pytest.raises(Rejected) as refused:
            dataset.load(tmp_path / name)
        assert refused.value.code == "bad_dataset"
