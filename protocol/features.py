"""From a game's own state to the vector a model eats.

The spec travels, signed, with the model, and trainer and Pi run this same code, so the two cannot drift apart. Pure,
and without NumPy: a spec is compiled once into plain closures and then costs one look-up and one multiply-add per
feature.

A feature is `clip((value + offset) * scale)`. Paths are dotted keys into the state (`round`, `self.statuses.poison`). A
group reads the same features from each entity of a list (or of a mapping, in its order), pads absent entities with
zeros and ignores those beyond its maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from protocol.errors import ErrorCode, Rejected

State = Mapping[str, Any]

# Absent entities are padded, so it is the spec and not the state that says how long the vector becomes.
MAX_ENTITIES = 4096

# The vector goes into float32 tensors.
_MOST = 3.4028234e38


class Feature(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One number.

    Attributes:
        path: Dotted path of the value. Booleans count as 0 and 1, a list or mapping as its length.
        divide_by: Dotted path, beside `path`, of a value to divide by first (health by maxHealth); by 0 gives 0.
        scale: Multiplier, after the offset.
        offset: Added before scaling.
        clip: `(low, high)` bounds of the result, or `None`.
        default: The result where the path is absent or null. Without one, absence is an error.
    """

    path: str
    divide_by: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    clip: tuple[float, float] | None = None
    default: float | None = None


class Group(Struct, frozen=True, kw_only=True):
    """The same features of each of several entities.

    Attributes:
        path: Dotted path of a list or mapping of entities.
        maximum: How many entities have room; absent ones are zeros.
        features: What is read from each, with paths relative to the entity.
    """

    path: str
    maximum: Annotated[int, Meta(ge=0, le=MAX_ENTITIES)]
    features: tuple[Feature, ...]


class FeatureSpec(Struct, frozen=True, kw_only=True):
    """An ordered description of a model's input vector: groups first, then single features."""

    groups: tuple[Group, ...] = ()
    features: tuple[Feature, ...] = ()

    @property
    def length(self) -> int:
        """How many numbers the vector has."""
        return sum(group.maximum * len(group.features) for group in self.groups) + len(self.features)


def compile_spec(spec: FeatureSpec) -> Callable[[State], list[float]]:
    """Turn a spec into a function from a state to its vector, of `spec.length` floats.

    The function raises:
        Rejected: With code `malformed` or `not_finite`, naming the path in the state.
    """
    groups = [(group, _keys(group.path), [_reader(feature) for feature in group.features]) for group in spec.groups]
    singles = [_reader(feature) for feature in spec.features]

    def encode(state: State) -> list[float]:
        vector: list[float] = []
        for group, keys, readers in groups:
            entities = _entities(state, keys, group)
            for index, entity in enumerate(entities):
                where = f"state.{group.path}[{index}]"
                if not isinstance(entity, Mapping):
                    text = f"{where} must be an object, not {type(entity).__name__}"
                    raise Rejected(ErrorCode.MALFORMED, text, where)
                vector.extend([read(entity, where) for read in readers])
            vector.extend([0.0] * ((group.maximum - len(entities)) * len(readers)))
        vector.extend([read(state, "state") for read in singles])
        return vector

    return encode


def _keys(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def _look_up(state: Any, keys: tuple[str, ...]) -> Any:
    """The value at `keys`, or `None` where any of them is absent."""
    for key in keys:
        if not isinstance(state, Mapping):
            return None
        state = state.get(key)
    return state


def _entities(state: State, keys: tuple[str, ...], group: Group) -> Sequence[Any]:
    found = _look_up(state, keys)
    if found is None:
        return ()
    if isinstance(found, Mapping):
        found = list(found.values())
    if not isinstance(found, list):
        field = f"state.{group.path}"
        raise Rejected(ErrorCode.MALFORMED, f"{field} must be a list or an object, not {type(found).__name__}", field)
    return found[: group.maximum]


def _reader(feature: Feature) -> Callable[[Any, str], float]:
    keys = _keys(feature.path)
    divisor_keys = _keys(feature.divide_by) if feature.divide_by else None

    def read(state: Any, where: str) -> float:
        raw = _look_up(state, keys)
        if raw is None:
            if feature.default is None:
                field = f"{where}.{feature.path}"
                raise Rejected(ErrorCode.MALFORMED, f"{field} is absent and has no default", field)
            return feature.default
        value = _number(raw, f"{where}.{feature.path}")
        if divisor_keys is not None:
            divisor = _number(_look_up(state, divisor_keys), f"{where}.{feature.divide_by}")
            value = value / divisor if divisor else 0.0
        value = (value + feature.offset) * feature.scale
        if feature.clip is not None:
            low, high = feature.clip
            value = min(max(value, low), high)
        if not -_MOST <= value <= _MOST:
            field = f"{where}.{feature.path}"
            raise Rejected(ErrorCode.NOT_FINITE, f"{field} becomes {value}, which no float32 can hold", field)
        return value

    return read


def _number(raw: Any, field: str) -> float:
    if isinstance(raw, (list, Mapping)):
        return float(len(raw))
    if not isinstance(raw, (int, float)):
        raise Rejected(ErrorCode.MALFORMED, f"{field} must be a number, not {type(raw).__name__}", field)
    try:
        value = float(raw)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Rejected(ErrorCode.NOT_FINITE, f"{field} is {raw!r:.40}", field)
    return value
