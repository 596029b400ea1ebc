"""From stored transitions to examples that a network can learn from.

Which transitions behaviour cloning learns from
-----------------------------------------------
Cloning copies whoever chose, so it matters who chose:

- `taken`: a human or a script chose the action. That is a demonstration. Its worth lies in the chooser's skill, not
  in the battle's luck, so it counts whether the battle was won or lost; dropping lost battles would drop the hard
  positions, where advice is worth most (Bain & Sammut, "A framework for behavioural cloning", 1995).
- `won`: the model chose by itself, and its actor's battle ended with a reward above zero. No one vouches for the
  single action; the outcome vouches a little for all of them (filtered cloning: Oh et al., "Self-imitation learning",
  2018). What the model chose in battles that it lost, or that were cut off, is passed over: copying it would teach
  the model to stay as it is.

Which of the two kinds are used is a setting of the recipe.

Examples are split by battle, never by row: two rows of one battle are nearly the same position, and with one of them
on each side the validation loss would praise a network for remembering. A battle's side follows from its name and the
seed alone, so it does not change as more battles arrive.

The file
--------
`save` writes, and `load` reads, one row per transition, in an `.npz` archive without pickled objects:

===============================  ======================================================================
`step`, `action`                 int64 (N,)
`reward`, `propensity`, `at`     float64 (N,); a propensity that is unknown is NaN
`taken`, `done`, `truncated`     bool (N,)
`slot`, `battle`, ... `model`    int64 (N,): index into `<column>_names`, unicode (K,)
`features`, `legal`              uint8: the rows' bytes, one row after the other
`features_end`, `legal_end`      int64 (N,): where each row ends in it
===============================  ======================================================================

Everything here is pure but for `save` and `load`.
"""

from __future__ import annotations

import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.errors import Rejected

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Vectors = NDArray[np.float32]

FEATURE_BYTES = 4
_NAMED = ("slot", "battle", "actor", "model")
_BYTES = ("features", "legal")
_TYPES: dict[str, type] = {
    **dict.fromkeys(("step", "action"), np.int64),
    **dict.fromkeys(("reward", "propensity", "at"), np.float64),
    **dict.fromkeys(("taken", "done", "truncated"), np.bool_),
}


class Transitions(NamedTuple):
    """Stored transitions, by column; the same row of each is one transition.

    Attributes:
        slot: Which slot answered.
        battle: The episode; where several devices may use the same name, with the device in front.
        actor: Who acted.
        step: Of the observation that was answered.
        features: float32, little-endian.
        action: What was played.
        taken: Whether a human or a script chose it.
        propensity: With which the policy chose it, or NaN.
        legal: One byte, 0 or 1, per action; empty if all were legal.
        reward: Between this step and the next.
        done: The battle ended with the next step.
        truncated: The battle was cut off here.
        model: SHA-256 of the model that answered.
        at: Seconds since the epoch.
    """

    slot: Sequence[str]
    battle: Sequence[str]
    actor: Sequence[str]
    step: Ints
    features: Sequence[bytes]
    action: Ints
    taken: Bools
    propensity: Floats
    legal: Sequence[bytes]
    reward: Floats
    done: Bools
    truncated: Bools
    model: Sequence[str]
    at: Floats


class Examples(NamedTuple):
    """What a network learns from.

    Attributes:
        features: (N, features).
        actions: (N,) index of the action that was played.
        legal: (N, actions).
        battles: (N,) number of the battle in `names`.
        names: Of the battles.
        taken: (N,) a human or a script chose.
        won: (N,) the actor's battle ended with a reward above zero.
    """

    features: Vectors
    actions: Ints
    legal: Bools
    battles: Ints
    names: list[str]
    taken: Bools
    won: Bools

    def take(self, rows: Bools) -> Examples:
        """The examples where `rows` (N,) is true."""
        return self._replace(
            features=self.features[rows],
            actions=self.actions[rows],
            legal=self.legal[rows],
            battles=self.battles[rows],
            taken=self.taken[rows],
            won=self.won[rows],
        )


class Cleaned(NamedTuple):
    """What is fit for use, and how many transitions were set aside for which reason."""

    examples: Examples
    rejected: dict[str, int]


class Split(NamedTuple):
    """Two sets of examples with no battle in common."""

    train: Examples
    validation: Examples


def clean(transitions: Transitions, *, slot: str, features: int, actions: int) -> Cleaned:
    """Set aside what cannot be learned from.

    A transition counts once, for the first reason that applies: `unknown_slot`, `wrong_length`, `not_finite`,
        `action_out_of_range`,
    `wrong_legal_length`, `action_illegal`, `reward_not_finite`.

    Args:
        transitions: As stored, in any order.
        slot: The slot whose model is trained.
        features: How many numbers its input vector has.
        actions: How many actions it chooses from.
    """
    count = len(transitions.action)
    there = np.fromiter((name == slot for name in transitions.slot), bool, count)
    sized = np.fromiter((len(row) == features * FEATURE_BYTES for row in transitions.features), bool, count)
    masked = np.fromiter((len(row) in (0, actions) for row in transitions.legal), bool, count)
    vectors = _vectors(transitions.features, sized, features)
    legal = _masks(transitions.legal, masked, actions)
    in_range = (transitions.action >= 0) & (transitions.action < actions)
    played = np.where(in_range, transitions.action, 0)
    checks = {
        "unknown_slot": there,
        "wrong_length": sized,
        "not_finite": np.isfinite(vectors).all(axis=1),
        "action_out_of_range": in_range,
        "wrong_legal_length": masked,
        "action_illegal": legal[np.arange(count), played],
        "reward_not_finite": np.isfinite(transitions.reward),
    }
    fit = np.ones(count, bool)
    rejected = {}
    for reason, passed in checks.items():
        failed = int((fit & ~passed).sum())
        if failed:
            rejected[reason] = failed
        fit &= passed
    names, battles = _numbered(transitions.battle)
    examples = Examples(vectors, played, legal, battles, names, transitions.taken, _won(transitions, there))
    return Cleaned(examples.take(fit), rejected)


def selected(examples: Examples, *, taken: bool, won: bool) -> Examples:
    """The examples that cloning copies: what a human or a script chose, what winners chose, or both."""
    return examples.take((examples.taken & taken) | (examples.won & won))


def split(examples: Examples, *, validation_share: float, seed: int) -> Split:
    """Put each battle, whole, on one of two sides.

    Args:
        examples: Of many battles.
        validation_share: How much of the battles, on average, is for validation.
        seed: Draws another split.

    Raises:
        Rejected: With code `too_few_battles` when a side would be empty.
    """
    chosen = np.fromiter((_draw(name, seed) < validation_share for name in examples.names), bool, len(examples.names))
    validating = chosen[examples.battles]
    if not len(validating) or validating.all() or not validating.any():
        battles = len(np.unique(examples.battles))
        text = f"{len(validating)} examples from {battles} battles cannot be split into training and validation"
        raise Rejected("too_few_battles", text)
    return Split(examples.take(~validating), examples.take(validating))


def from_rows(rows: Iterable[Sequence[Any]]) -> Transitions:
    """Transitions from rows of a database, with the fields in their order; an absent propensity becomes NaN."""
    columns = list(zip(*rows, strict=True)) or [()] * len(Transitions._fields)
    return Transitions._make(
        np.array(values, _TYPES[name]) if name in _TYPES else list(values)
        for name, values in zip(Transitions._fields, columns, strict=True)
    )


def save(path: Path, transitions: Transitions) -> None:
    """Write transitions to an `.npz` file."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for column, values in transitions._asdict().items():
        if column in _NAMED:
            names, numbers = _numbered(values)
            arrays[column], arrays[f"{column}_names"] = numbers, np.array(names, np.str_)
        elif column in _BYTES:
            arrays[column] = np.frombuffer(b"".join(values), np.uint8)
            arrays[f"{column}_end"] = np.cumsum(np.fromiter(map(len, values), np.int64, len(values)))
        else:
            arrays[column] = values
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load(path: Path) -> Transitions:
    """Read what `save` wrote.

    Raises:
        Rejected: With code `bad_dataset` when the file is none of ours.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            transitions = Transitions._make(_column(arrays, column) for column in Transitions._fields)
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise Rejected("bad_dataset", f"{path} is no file of transitions: {error}") from error
    lengths = {len(values) for values in transitions}
    if len(lengths) != 1:
        raise Rejected("bad_dataset", f"{path} is no file of transitions: its columns have {sorted(lengths)} rows")
    return transitions


def _column(arrays: np.lib.npyio.NpzFile, column: str) -> Sequence[str] | Sequence[bytes] | NDArray[np.generic]:
    values: NDArray[np.generic] = arrays[column]
    if column in _NAMED:
        names = arrays[f"{column}_names"].tolist()
        return [names[number] for number in values.tolist()]
    if column in _BYTES:
        data, ends = values.tobytes(), [0, *arrays[f"{column}_end"].tolist()]
        return [data[start:end] for start, end in itertools.pairwise(ends)]
    return values


def _vectors(rows: Sequence[bytes], sized: Bools, features: int) -> Vectors:
    """(N, features), zeros where the length is wrong."""
    vectors = np.zeros((len(rows), features), np.float32)
    data = b"".join(row for row, fits in zip(rows, sized, strict=True) if fits)
    vectors[sized] = np.frombuffer(data, "<f4").reshape(-1, features)
    return vectors


def _masks(rows: Sequence[bytes], sized: Bools, actions: int) -> Bools:
    """(N, actions), all legal where there is no mask."""
    data = b"".join(row if row and fits else b"\x01" * actions for row, fits in zip(rows, sized, strict=True))
    masks: Bools = np.frombuffer(data, np.uint8).reshape(-1, actions) != 0
    return masks


def _numbered(names: Sequence[str]) -> tuple[list[str], Ints]:
    """The distinct names, and for each row the number of its own."""
    numbers: dict[str, int] = {}
    rows = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64, len(names))
    return list(numbers), rows


def _won(transitions: Transitions, there: Bools) -> Bools:
    """(N,) whether the row's actor ended its battle with a reward above zero."""
    keys = list(zip(transitions.battle, transitions.actor, strict=True))
    ended = np.flatnonzero(there & transitions.done & ~transitions.truncated & (transitions.reward > 0))
    winners = {keys[row] for row in ended.tolist() if np.isfinite(transitions.reward[row])}
    return np.fromiter((key in winners for key in keys), bool, len(keys))


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the battle's name and the seed, and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
