"""Every observation gets an action or an error that names what is wrong."""

from __future__ import annotations

import gc
import json
import math
import struct
import weakref
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import runtime
from edge_agent.open_battles import Mark
from edge_agent.serving import Policy, Responder
from protocol.features import Feature, FeatureSpec
from protocol.messages import Problem

MODELS = Path(__file__).parents[2] / "models"
SPEC = FeatureSpec(features=tuple(Feature(path=name) for name in "abcdef"))
FEATURES = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def responder(model: str = "echo") -> Responder:
    return Responder("combat", Policy(runtime.load((MODELS / f"{model}.tflite").read_bytes()), SPEC, "d" * 64, 7))


def ask(fields: dict[str, Any], model: str = "echo") -> dict[str, Any]:
    payload, decisions, _ = responder(model).answer(json.dumps({"battle": "b", "step": 1, **fields}).encode(), 0.0)
    assert len(decisions) == 1
    answer: dict[str, Any] = json.loads(payload)
    return answer


def test_the_highest_score_is_chosen_and_everything_that_names_the_question_is_echoed() -> None:
    answer = ask({"actor": "hero", "id": 17, "features": FEATURES})
    assert answer == {
        "battle": "b",
        "step": 1,
        "actor": "hero",
        "id": 17,
        "action": 3,
        "scores": [0.0, 1.0, 2.0, 3.0],
        "model": "d" * 64,
        "version": 7,
    }


def test_only_legal_actions_are_chosen() -> None:
    assert ask({"features": FEATURES, "legal": [True, True, False, False]})["action"] == 1
    assert ask({"features": [9.0] * 6, "legal": [False, False, True, True]})["action"] == 2


def test_a_structured_state_is_encoded_by_the_models_own_spec() -> None:
    assert ask({"state": dict(zip("abcdef", FEATURES, strict=True))})["scores"] == FEATURES[:4]


def test_the_last_observation_is_recorded_and_answered_without_an_action() -> None:
    payload = json.dumps({"battle": "b", "step": 9, "features": FEATURES, "done": True, "reward": -1}).encode()
    _, (decision,), (record,) = responder().answer(payload, 12.5)
    assert decision.action is None
    assert decision.error is None
    assert (record.done, record.reward, record.action, record.at) == (True, -1.0, None, 12.5)


def test_the_record_holds_what_was_played() -> None:
    fields = {"battle": "b", "step": 2, "features": FEATURES, "taken": 2, "legal": [True, True, True, False]}
    _, (decision,), (record,) = responder().answer(json.dumps(fields).encode(), 0.0)
    assert decision.action == 2
    assert (record.action, record.taken, record.propensity) == (2, True, None)
    assert record.features == struct.pack("<6f", *FEATURES)
    assert record.legal == b"\1\1\1\0"
    _, _, (own,) = responder().answer(json.dumps({"battle": "b", "step": 3, "features": FEATURES}).encode(), 0.0)
    assert (own.action, own.taken, own.propensity, own.legal) == (3, False, 1.0, b"")


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({}, "malformed", "features"),
        ({"features": "no"}, "malformed", "features"),
        ({"features": [1.0]}, "wrong_length", "features"),
        ({"features": [1, 2, 3, 4, 5, "x"]}, "malformed", "features[5]"),
        ({"features": [1, 2, 3, 4, 5, 1e300]}, "not_finite", "features[5]"),
        ({"state": {"a": 1}}, "malformed", "state.b"),
        ({"state": dict.fromkeys("abcdef", 1e300)}, "not_finite", "state.a"),
        ({"features": FEATURES, "legal": [True]}, "wrong_length", "legal"),
        ({"features": FEATURES, "legal": [False] * 4}, "no_legal_action", "legal"),
        ({"features": FEATURES, "taken": 4}, "malformed", "taken"),
        ({"features": FEATURES, "v": 2}, "unknown_version", "v"),
        ({"features": FEATURES, "step": -1}, "malformed", "step"),
        ({"features": FEATURES, "battle": 5}, "malformed", "battle"),
    ],
)
def test_each_fault_has_its_code_and_names_its_field(fields: dict[str, Any], code: str, field: str) -> None:
    answer = ask(fields)
    assert answer["error"]["code"] == code
    assert answer["error"]["field"] == field
    assert "action" not in answer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_in_messagepack_too(value: float) -> None:
    asked = {"battle": "b", "step": 1, "features": [0.0, value, 0.0, 0.0, 0.0, 0.0]}
    payload, _, records = responder().answer(msgspec.msgpack.encode(asked), 0.0)
    assert msgspec.msgpack.decode(payload)["error"]["field"] == "features[1]"
    assert records == []
    rewarded = {"battle": "b", "step": 1, "features": FEATURES, "reward": value}
    payload, _, _ = responder().answer(msgspec.msgpack.encode(rewarded), 0.0)
    assert msgspec.msgpack.decode(payload)["error"]["field"] == "reward"


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_of_writers_that_do_not_keep_to_json_is_answered_by_name(written: str) -> None:
    asked = f'{{"battle": "b", "step": 4, "id": "x", "features": [0, {written}, 0, 0, 0, 0]}}'.encode()
    _, (decision,), records = responder().answer(asked, 0.0)
    assert decision.error is not None
    assert (decision.error.code, decision.error.field) == ("not_finite", "features[1]")
    assert (decision.battle, decision.step, decision.id) == ("b", 4, "x")
    assert records == []


def test_bytes_that_are_nothing_at_all_get_an_error() -> None:
    for payload in (b"", b"{", b"\xc1", b"[[[", b'"text"'):
        _, (decision,), records = responder().answer(payload, 0.0)
        assert decision.error is not None
        assert decision.error.code == "malformed"
        assert records == []


def test_one_bad_observation_in_a_list_does_not_silence_the_others() -> None:
    asked = [{"battle": "b", "step": 1, "features": FEATURES}, {"battle": "b", "step": "x", "id": 4}, 5]
    payload, decisions, records = responder().answer(json.dumps(asked).encode(), 0.0)
    assert [decision.error.field if decision.error else None for decision in decisions] == [None, "[1].step", "[2]"]
    assert [answer.get("action") for answer in json.loads(payload)] == [3, None, None]
    assert decisions[1].id == 4
    assert len(records) == 1


def test_a_list_is_answered_with_a_list_and_messagepack_with_messagepack() -> None:
    asked = [{"battle": "b", "step": step, "features": FEATURES} for step in range(3)]
    payload, _, _ = responder().answer(msgspec.msgpack.encode(asked), 0.0)
    assert [answer["step"] for answer in msgspec.msgpack.decode(payload)] == [0, 1, 2]
    assert responder().answer(b"[]", 0.0)[0] == b"[]"


def test_a_model_whose_output_is_not_finite_gives_an_error_and_no_record() -> None:
    payload, (decision,), records = responder("nan").answer(
        json.dumps({"battle": "b", "step": 1, "features": FEATURES}).encode(), 0.0
    )
    assert decision.error is not None
    assert decision.error.code == "inference_failed"
    assert records == []
    assert b"NaN" not in payload


def test_without_a_model_the_answer_says_so() -> None:
    _, (decision,), records = Responder("combat", None).answer(b'{"battle":"b","step":1,"features":[1]}', 0.0)
    assert decision.error is not None
    assert (decision.error.code, decision.battle, decision.step) == ("no_model", "b", 1)
    assert records == []


def test_refusing_answers_every_observation_and_echoes_what_can_be_read() -> None:
    problem = Problem(code="overloaded", text="too much")
    payload, decisions = responder().refuse(b'[{"battle":"b","step":4,"id":"x"},{"step":true}]', problem)
    assert [(d.battle, d.step, d.id) for d in decisions] == [("b", 4, "x"), ("", 0, None)]
    assert all(answer["error"]["code"] == "overloaded" for answer in json.loads(payload))
    assert len(responder().refuse(b"{", problem)[1]) == 1


def policy(model: str, version: int) -> Policy:
    return Policy(runtime.load((MODELS / f"{model}.tflite").read_bytes()), SPEC, str(version) * 64, version)


def version_for(both: Responder, battle: str, now: float, **fields: Any) -> int | None:
    """Which version answers, as a worker asks and remembers it."""
    asked = {"battle": battle, "step": 1, "features": FEATURES, **fields}
    _, (decision,), records = both.answer(json.dumps(asked).encode(), 0.0)
    both.heard(records, now)
    assert [record.version for record in records] == [decision.version]
    return decision.version


def test_two_policies_share_the_battles_until_the_last_of_the_old_one_has_ended() -> None:
    both = Responder("combat", policy("twin", 2), policy("echo", 1))
    assert version_for(both, "mine", 0.0) == 1
    assert not both.finish(0.0)
    both.learn([Mark("theirs", "", 1, False, 0.0)])
    both.begin()
    assert [version_for(both, battle, 1.0) for battle in ("mine", "theirs", "new")] == [1, 1, 2]
    asked = [{"battle": battle, "step": 2, "features": FEATURES} for battle in ("new", "mine", "other")]
    assert [one.version for one in both.answer(json.dumps(asked).encode(), 0.0)[1]] == [2, 1, 2]
    for battle in ("mine", "theirs"):
        assert version_for(both, battle, 2.0, step=3, done=True) == 1
    assert not both.finish(2.5)
    assert both.finishing
    assert both.finish(3.0)
    assert not both.finishing
    assert not both.finish(4.0)
    assert version_for(both, "mine", 4.0) == 2


def test_what_the_new_policy_answers_does_not_keep_the_old_one() -> None:
    both = Responder("combat", policy("twin", 2), policy("echo", 1))
    both.begin()
    assert version_for(both, "new", 0.0) == 2
    assert both.finish(0.0)


def test_an_old_policy_that_is_over_gives_its_memory_back() -> None:
    old = policy("echo", 1)
    gone = weakref.ref(old)
    both = Responder("combat", policy("twin", 2), old)
    del old
    both.begin()
    gc.disable()
    try:
        assert both.finish(0.0)
        assert gone() is None
    finally:
        gc.enable()
