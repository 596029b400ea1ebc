"""From an observation's bytes to the answer's: everything a worker decides, without a clock or a connection.

The order of checks is fixed, so one fault gives one answer: payload, schema version, features (present, encodable,
length, finite), legal mask, inference. A battle's last observation (`done`) is recorded and answered without an action.

Behaviour is greedy: the legal action with the highest score, so its propensity is 1.

During a swap at the battle's end there are two policies, and each battle has one of them (`edge_agent.open_battles`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from edge_agent.battles import Served
from edge_agent.open_battles import Finishing, Mark, OpenBattles, mark_of
from edge_agent.runtime import Model, Vector
from protocol.codec import Decoder, convert, encode, is_json
from protocol.errors import ErrorCode, Rejected
from protocol.features import FeatureSpec, compile_spec
from protocol.messages import SCHEMA_VERSION, Decision, Observation, Problem

T = TypeVar("T")

MAX_OBSERVATIONS = 1024
MAX_NUMBER = 2**53

_observations: Decoder[Observation | list[Observation]] = Decoder(Observation | list[Observation])
_anything: Decoder[Any] = Decoder(Any)


class Policy:
    """A model with all that is needed to ask it about a battle.

    Args:
        model: The loaded interpreter.
        spec: How a structured state becomes its input.
        digest: SHA-256 of the model.
        version: Its version.
    """

    def __init__(self, model: Model, spec: FeatureSpec, digest: str, version: int) -> None:
        self.digest = digest
        self.version = version
        self.actions = model.output_length
        self._model = model
        self._encode = compile_spec(spec)

    def features(self, observation: Observation) -> Vector:
        """The input vector, shape `(input_length,)`.

        Raises:
            Rejected: It is absent, of another length, or not finite.
        """
        if observation.features is not None:
            values, field = observation.features, "features"
        elif observation.state is not None:
            values, field = self._encode(observation.state), "state"
        else:
            raise Rejected(ErrorCode.MALFORMED, "an observation needs features or state", "features")
        expected = self._model.input_length
        if len(values) != expected:
            text = f"{field} has {len(values)} numbers, the model takes {expected}"
            raise Rejected(ErrorCode.WRONG_LENGTH, text, field)
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
            vector = np.array(values, np.float32)
        if not math.isfinite(vector.sum()):
            for index in np.flatnonzero(~np.isfinite(vector)):
                raise Rejected(
                    ErrorCode.NOT_FINITE,
                    f"{field}[{index}] is {values[index]!r:.40}, no finite float32",
                    f"{field}[{index}]",
                )
        return vector

    def scores(self, vector: Vector) -> list[float]:
        """One score per action.

        Raises:
            Rejected: With code `inference_failed`.
        """
        scores: list[float] = self._model.invoke(vector).tolist()
        if not math.isfinite(sum(scores)):
            raise Rejected(ErrorCode.INFERENCE_FAILED, "the model's output is not finite")
        return scores

    def check_legal(self, legal: Sequence[bool]) -> None:
        """Refuse a mask that does not fit, or allows nothing.

        Raises:
            Rejected: With code `wrong_length` or `no_legal_action`.
        """
        if len(legal) != self.actions:
            raise Rejected(
                ErrorCode.WRONG_LENGTH, f"legal has {len(legal)} flags, the model has {self.actions} actions", "legal"
            )
        if not any(legal):
            raise Rejected(ErrorCode.NO_LEGAL_ACTION, "legal allows no action", "legal")


class Responder:
    """Answers payloads for one slot with one policy, or with `no_model` while there is none.

    Args:
        slot: Its name.
        policy: For all battles but those of
        old: the policy that is finished. Until `begin`, that one answers everything.
    """

    def __init__(self, slot: str, policy: Policy | None, old: Policy | None = None) -> None:
        self._slot = slot
        self._policy = policy
        self._old = old
        self._finishing = Finishing(OpenBattles())

    @property
    def finishing(self) -> bool:
        """Whether the old policy is still needed."""
        return self._old is not None

    def heard(self, records: Iterable[Served], now: float) -> None:
        """Remember which battles the old policy has answered, if there is one; `now` is of the monotonic clock."""
        if self._old is not None:
            for record in records:
                if record.model == self._old.digest:
                    self._finishing.hear(mark_of(record, now))

    def learn(self, marks: Iterable[Mark]) -> None:
        """Take what is known elsewhere about battles of the old policy."""
        self._finishing.learn(marks)

    def begin(self) -> None:
        """From now on, answer battles that are not known to be the old policy's with the new one."""
        self._finishing.begin()

    def finish(self, now: float) -> bool:
        """Let go of the old policy once its last battle has ended. Returns whether that was now."""
        if self._old is None or not self._finishing.is_over(now):
            return False
        self._old = None
        return True

    def answer(self, payload: bytes, at: float) -> tuple[bytes, list[Decision], list[Served]]:
        """Answer one payload, which holds one observation or a list of them.

        Args:
            payload: As it arrived. The answer has the same encoding and shape.
            at: Seconds since the epoch, for the records.

        Returns:
            The encoded answer, its decisions, and a record of each observation that was good.
        """
        records: list[Served] = []
        try:
            asked = _few(_observations.decode(payload))
        except Rejected as error:
            decisions, several = self._salvage(payload, error, at, records)
        else:
            several = isinstance(asked, list)
            decisions = [self._decide(one, at, records) for one in (asked if isinstance(asked, list) else [asked])]
        answer: Decision | list[Decision] = decisions if several else decisions[0]
        return encode(answer, as_json=is_json(payload)), decisions, records

    def refuse(self, payload: bytes, problem: Problem) -> tuple[bytes, list[Decision]]:
        """Answer every observation of a payload with the same problem, without looking further into it."""
        try:
            asked = _few(_readable(payload))
        except Rejected:
            asked = None
        several = isinstance(asked, list)
        items = asked if isinstance(asked, list) else [asked]
        decisions = [_refusal(item, problem) for item in items]
        return encode(decisions if several else decisions[0], as_json=is_json(payload)), decisions

    def _decide(self, asked: Observation, at: float, records: list[Served]) -> Decision:
        try:
            return self._decision(asked, at, records)
        except Rejected as error:
            return Decision(battle=asked.battle, step=asked.step, actor=asked.actor, id=asked.id, error=_problem(error))

    def _decision(self, asked: Observation, at: float, records: list[Served]) -> Decision:
        if asked.v != SCHEMA_VERSION:
            raise Rejected(ErrorCode.UNKNOWN_VERSION, f"v is {asked.v}, this agent speaks {SCHEMA_VERSION}", "v")
        policy = self._policy_for(asked.battle)
        if policy is None:
            raise Rejected(ErrorCode.NO_MODEL, f"slot {self._slot} has no model yet")
        over = asked.done and asked.features is None and asked.state is None
        vector = np.zeros(0, np.float32) if over else policy.features(asked)
        if asked.reward is not None and not math.isfinite(asked.reward):
            raise Rejected(ErrorCode.NOT_FINITE, f"reward is {asked.reward}", "reward")
        if asked.taken is not None and asked.taken >= policy.actions:
            text = f"taken is {asked.taken}, the model has {policy.actions} actions"
            raise Rejected(ErrorCode.MALFORMED, text, "taken")
        action, scores = (None, []) if asked.done else self._choose(policy, vector, asked.legal)
        played = asked.taken if asked.taken is not None and not asked.done else action
        records.append(
            Served(
                slot=self._slot,
                battle=asked.battle,
                actor=asked.actor,
                step=asked.step,
                features=vector.tobytes(),
                action=played,
                taken=asked.taken is not None,
                propensity=1.0 if asked.taken is None and action is not None else None,
                legal=bytes(asked.legal) if asked.legal else b"",
                reward=asked.reward,
                done=asked.done,
                model=policy.digest,
                version=policy.version,
                at=at,
            )
        )
        return Decision(
            battle=asked.battle,
            step=asked.step,
            actor=asked.actor,
            action=action,
            scores=scores,
            model=policy.digest,
            version=policy.version,
            id=asked.id,
        )

    def _policy_for(self, battle: str) -> Policy | None:
        return self._old if self._old is not None and self._finishing.keeps(battle) else self._policy

    def _choose(self, policy: Policy, vector: Vector, legal: list[bool] | None) -> tuple[int, list[float]]:
        if legal is not None:
            policy.check_legal(legal)
        scores = policy.scores(vector)
        if legal is None:
            return scores.index(max(scores)), scores
        best = max(score for score, allowed in zip(scores, legal, strict=True) if allowed)
        return next(i for i, score in enumerate(scores) if score == best and legal[i]), scores

    def _salvage(
        self, payload: bytes, error: Rejected, at: float, records: list[Served]
    ) -> tuple[list[Decision], bool]:
        """Answer what can be answered: in a list, one bad observation does not silence the others."""
        try:
            asked = _few(_readable(payload))
        except Rejected:
            return [_refusal(None, _problem(error))], False
        if not isinstance(asked, list):
            return [self._decide_loosely(asked, "", at, records)], False
        return [self._decide_loosely(item, f"[{index}]", at, records) for index, item in enumerate(asked)], True

    def _decide_loosely(self, item: Any, place: str, at: float, records: list[Served]) -> Decision:
        """Answer one observation of a payload that is not good as a whole."""
        try:
            return self._decide(convert(item, Observation), at, records)
        except Rejected as bad:
            field = ".".join(part for part in (place, bad.field) if part) or None
            return _refusal(item, Problem(code=bad.code, text=bad.text, field=field))


def _readable(payload: bytes) -> Any:
    """A payload as plain values, also where it holds the NaN and Infinity that many JSON writers put there.

    Raises:
        Rejected: It cannot be read at all.
    """
    try:
        return _anything.decode(payload)
    except Rejected:
        if not is_json(payload):
            raise
        try:
            value = json.loads(payload)
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and cannot be echoed
        except (ValueError, RecursionError) as error:
            raise Rejected(ErrorCode.MALFORMED, f"neither JSON nor MessagePack: {error}") from error
        return value


def _few(asked: T) -> T:
    """Refuse a list whose answer would be many times as long as the list.

    Raises:
        Rejected: With code `malformed`.
    """
    if isinstance(asked, list) and len(asked) > MAX_OBSERVATIONS:
        text = f"a list of {len(asked)} observations; at most {MAX_OBSERVATIONS} are answered"
        raise Rejected(ErrorCode.MALFORMED, text)
    return asked


def _problem(error: Rejected) -> Problem:
    return Problem(code=error.code, text=error.text, field=error.field)


def _refusal(item: Any, problem: Problem) -> Decision:
    """An error answer that echoes whatever names the observation, as far as it can be read."""
    if not isinstance(item, dict):
        return Decision(battle="", step=0, error=problem)

    def read(key: str, kinds: type | tuple[type, ...], default: Any) -> Any:
        value = item.get(key)
        fits = not isinstance(value, int) or (type(value) is int and abs(value) <= MAX_NUMBER)
        return value if isinstance(value, kinds) and fits else default

    return Decision(
        battle=read("battle", str, ""),
        step=read("step", int, 0),
        actor=read("actor", str, ""),
        id=read("id", (str, int), None),
        error=problem,
    )
