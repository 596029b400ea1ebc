from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ErrorCode, Rejected
from protocol.features import Feature, FeatureSpec, Group, compile_spec

HEALTH = Feature(path="stats.health", divide_by="stats.maxHealth")
SPEC = FeatureSpec(
    groups=(Group(path="characters", maximum=2, features=(HEALTH, Feature(path="stats.attack", scale=1 / 100))),),
    features=(Feature(path="round", scale=1 / 20), Feature(path="characters", scale=1 / 4)),
)


def one(state: dict[str, Any], **feature: Any) -> float:
    [value] = compile_spec(FeatureSpec(features=(Feature(**feature),)))(state)
    return value


def rejection(spec: FeatureSpec, state: dict[str, Any]) -> Rejected:
    with pytest.raises(Rejected) as caught:
        compile_spec(spec)(state)
    return caught.value


def character(health: float = 50, most: float = 100, attack: float = 30) -> dict[str, Any]:
    return {"stats": {"health": health, "maxHealth": most, "attack": attack}}


def test_groups_come_first_padded_with_zeros_then_single_features() -> None:
    assert SPEC.length == 6
    assert compile_spec(SPEC)({"round": 5, "characters": [character()]}) == [0.5, 0.3, 0.0, 0.0, 0.25, 0.25]


def test_entities_beyond_the_maximum_are_ignored() -> None:
    three = [character(10), character(20), character(30)]
    assert compile_spec(SPEC)({"round": 0, "characters": three}) == [0.1, 0.3, 0.2, 0.3, 0.0, 0.75]


def test_a_mapping_of_entities_is_read_in_its_order() -> None:
    named = {"zoe": character(10), "abe": character(20)}
    assert compile_spec(SPEC)({"round": 0, "characters": named})[:4] == [0.1, 0.3, 0.2, 0.3]


@pytest.mark.parametrize("state", [{}, {"team": None}, {"team": []}])
def test_a_group_that_is_not_there_is_all_zeros(state: dict[str, Any]) -> None:
    spec = FeatureSpec(groups=(Group(path="team", maximum=2, features=(HEALTH,)),))
    assert compile_spec(spec)(state) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("raw", "value"), [(3, 3.0), (2.5, 2.5), (True, 1.0), (False, 0.0), ([1, 2], 2.0), ({"a": 1}, 1.0)]
)
def test_what_counts_as_a_number(raw: Any, value: float) -> None:
    assert one({"x": raw}, path="x") == value


def test_offset_comes_before_scale_and_clip_after() -> None:
    assert one({"x": 4}, path="x", offset=1, scale=2) == 10
    assert one({"x": 4}, path="x", offset=1, scale=2, clip=(0, 3)) == 3
    assert one({"x": -4}, path="x", clip=(0, 3)) == 0


def test_division_comes_before_the_offset_and_by_zero_gives_zero() -> None:
    assert one({"x": 4, "y": 8}, path="x", divide_by="y", offset=0.5) == 1.0
    assert one({"x": 4, "y": 0}, path="x", divide_by="y") == 0.0


@pytest.mark.parametrize("state", [{}, {"x": None}, {"x": 3}, {"x": {"y": None}}])
def test_the_default_is_the_result_where_the_path_is_absent(state: dict[str, Any]) -> None:
    assert one(state, path="x.y", scale=100, default=0.25) == 0.25


@pytest.mark.parametrize(
    ("characters", "field"),
    [
        (7, "state.characters"),
        ("two", "state.characters"),
        ([character(), 3], "state.characters[1]"),
        ([character(), {"stats": {}}], "state.characters[1].stats.health"),
        ([{"stats": {"health": 1, "attack": 1}}], "state.characters[0].stats.maxHealth"),
        ([{"stats": {"health": "full", "maxHealth": 1}}], "state.characters[0].stats.health"),
    ],
)
def test_a_malformed_state_is_refused_by_the_name_of_its_field(characters: Any, field: str) -> None:
    error = rejection(SPEC, {"round": 1, "characters": characters})
    assert (error.code, error.field) == (ErrorCode.MALFORMED, field)
    assert field in error.text


@pytest.mark.parametrize("raw", [math.nan, math.inf, -math.inf, 10**400])
def test_a_value_that_is_not_finite_is_refused(raw: float) -> None:
    error = rejection(FeatureSpec(features=(Feature(path="a.b"),)), {"a": {"b": raw}})
    assert (error.code, error.field) == (ErrorCode.NOT_FINITE, "state.a.b")


@pytest.mark.parametrize(("raw", "scale"), [(1e39, 1.0), (-1e39, 1.0), (1e300, 1e300)])
def test_a_result_that_no_float32_holds_is_refused_unless_it_is_clipped(raw: float, scale: float) -> None:
    error = rejection(FeatureSpec(features=(Feature(path="x", scale=scale),)), {"x": raw})
    assert (error.code, error.field) == (ErrorCode.NOT_FINITE, "state.x")
    assert abs(one({"x": raw}, path="x", scale=scale, clip=(-1, 1))) == 1


def test_a_spec_survives_the_wire() -> None:
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(SPEC)), FeatureSpec) == SPEC


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["stats", "health", "round"]), inner),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"characters": JSON, "round": JSON}))
def test_any_json_gives_a_finite_vector_of_the_right_length_or_a_rejection(state: dict[str, Any]) -> None:
    try:
        vector, field = compile_spec(SPEC)(state), None
    except Rejected as error:
        vector, field = [0.0] * SPEC.length, error.field or "no field"
    assert len(vector) == SPEC.length
    assert all(map(math.isfinite, vector))
    assert field is None or field.startswith("state.")
