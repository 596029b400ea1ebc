from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable

import msgspec
import pytest

from protocol.features import compile_spec
from protocol.messages import Decision, Observation, Problem
from trainer_host.arena import observation, rules
from trainer_host.arena.players import ExpertPlayer, RandomPlayer
from trainer_host.arena.session import ANSWER_LIMIT_NS, DRAWN_AT_ONCE, ILLEGAL_ACTION, Plan, Session
from trainer_host.arena.tally import Tally

Answerer = Callable[[Observation], Decision | None]


def plan(**settings: object) -> Plan:
    return msgspec.structs.replace(Plan(name="test", battles=12, concurrent=4), **settings)


def decision(asked: Observation, action: int | None, *, version: int = 1) -> Decision:
    action = None if asked.done else action
    return Decision(
        battle=asked.battle,
        step=asked.step,
        actor=asked.actor,
        id=asked.id,
        action=action,
        model="abc",
        version=version,
    )


def first_legal(asked: Observation) -> Decision:
    preferred = (rules.SMASH, rules.STRIKE)
    return decision(asked, None if asked.legal is None else next(one for one in preferred if asked.legal[one]))


def played(session: Session, answer: Answerer = first_legal, *, at_once: int = 1000) -> list[Observation]:
    """Play to the end, `at_once` answers between two advances; where the answerer says nothing, time passes."""
    published: list[Observation] = []
    waiting = deque(session.start())
    now_ns = 1
    while not session.finished:
        assert waiting, "nothing to answer and not finished"
        batch = [waiting.popleft() for _ in range(min(at_once, len(waiting)))]
        for asked in batch:
            assert isinstance(asked.id, int)
            session.sent(asked.id, now_ns)
        published.extend(batch)
        answers = [answer(asked) for asked in batch]
        now_ns += 1000 if all(answers) else ANSWER_LIMIT_NS
        for answered in filter(None, answers):
            session.receive(answered, now_ns)
        session.expire(now_ns)
        waiting.extend(session.advance())
    return published


def by_battle(published: Iterable[Observation]) -> dict[str, list[Observation]]:
    battles: dict[str, list[Observation]] = defaultdict(list)
    for one in published:
        battles[one.battle].append(one)
    return battles


def outcomes(tally: Tally) -> tuple[int, int, int]:
    return tally.outcomes.wins, tally.outcomes.draws, tally.outcomes.losses


def test_it_plays_as_many_battles_as_planned() -> None:
    session = Session(plan())
    published = played(session)
    assert session.tally.outcomes.battles == len(by_battle(published)) == 12
    assert session.finished
    assert session.advance() == []
    assert session.tally.interrupted == session.tally.timeouts == session.tally.errors.total() == 0


def test_fewer_battles_than_places_need_fewer_places() -> None:
    session = Session(plan(battles=2, concurrent=64))
    assert len(by_battle(played(session))) == 2


def test_a_battle_is_told_from_first_turn_to_farewell() -> None:
    session = Session(plan())
    rewards = Counter[float]()
    for told in by_battle(played(session)).values():
        steps = [one.step for one in told]
        assert steps == sorted(steps)
        asked = [one for one in told if not one.done]
        farewells = [one for one in told if one.done]
        assert told == asked + farewells
        assert sorted(one.actor for one in farewells) == sorted({one.actor for one in asked})
        assert all(one.reward is None and one.legal is not None and one.taken is None for one in asked)
        assert len({one.reward for one in farewells}) == 1
        rewards[farewells[0].reward or 0.0] += 1
    assert (rewards[1.0], rewards[0.0], rewards[-1.0]) == outcomes(session.tally)


def test_ids_are_never_used_twice_and_battles_bear_the_name_of_the_plan() -> None:
    published = played(Session(plan()))
    assert len({one.id for one in published}) == len(published)
    assert {one.battle for one in published} == {f"test-{number}" for number in range(12)}


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_order_of_answers_changes_no_battle(at_once: int) -> None:
    def told(published: list[Observation]) -> dict[str, list[Observation]]:
        return by_battle(msgspec.structs.replace(one, id=None) for one in published)

    assert told(played(Session(plan()), at_once=at_once)) == told(played(Session(plan())))


def test_the_seed_decides_the_battles() -> None:
    first, again, other = (played(Session(plan(seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert first[0].state != other[0].state


def test_it_draws_more_battles_when_those_it_drew_are_played() -> None:
    session = Session(plan(battles=DRAWN_AT_ONCE + 20, concurrent=100))
    published = played(session)
    begun = {one.battle: repr(one.state) for one in reversed(published)}
    assert len(set(begun.values())) == DRAWN_AT_ONCE + 20
    assert session.tally.outcomes.battles == DRAWN_AT_ONCE + 20


def test_without_a_number_of_battles_there_is_no_end() -> None:
    session = Session(plan(battles=0))
    waiting = session.start()
    for now_ns in range(1, 200):
        for asked in waiting:
            assert isinstance(asked.id, int)
            session.sent(asked.id, now_ns)
            session.receive(first_legal(asked), now_ns + 1)
        waiting = session.advance()
    assert session.tally.outcomes.battles > 20
    assert not session.finished


def test_state_and_features_say_the_same() -> None:
    encode = compile_spec(observation.COMBAT_FEATURES)
    as_state, as_features = (played(Session(plan(observe=observe))) for observe in ("state", "features"))
    for one, other in zip(as_state, as_features, strict=True):
        assert one.features is None
        assert other.state is None
        assert one.state is not None
        assert other.features == pytest.approx(encode(one.state), abs=1e-6)


def test_answers_are_played() -> None:
    def rest(asked: Observation) -> Decision:
        return decision(asked, rules.REST)

    resting, fighting = Session(plan(battles=100)), Session(plan(battles=100))
    played(resting, rest)
    played(fighting)
    assert resting.tally.outcomes.wins == 0
    assert fighting.tally.outcomes.wins > 20


@pytest.mark.parametrize("player", [ExpertPlayer(), RandomPlayer()])
def test_what_a_player_takes_is_said_and_played_whatever_the_answer(player: ExpertPlayer | RandomPlayer) -> None:
    def rest(asked: Observation) -> Decision:
        return decision(asked, rules.REST)

    answered, unanswered = Session(plan(player=player)), Session(plan(player=player))
    published = played(answered, rest)
    played(unanswered, lambda _: None)
    asked = [one for one in published if not one.done]
    assert all(one.taken is not None and one.legal is not None and one.legal[one.taken] for one in asked)
    assert len({one.taken for one in asked}) > 3
    assert outcomes(answered.tally) == outcomes(unanswered.tally)


def test_an_error_is_counted_by_its_code_and_the_battle_goes_on() -> None:
    failed: list[Observation] = []

    def broken(asked: Observation) -> Decision:
        if asked.battle == "test-3" and not asked.done and len(failed) < 2:
            failed.append(asked)
            return msgspec.structs.replace(decision(asked, None), error=Problem(code="overloaded", text="too much"))
        return first_legal(asked)

    session = Session(plan())
    assert len(by_battle(played(session, broken))["test-3"]) > 3
    assert session.tally.errors == {"overloaded": 2}
    assert session.tally.interrupted == 1
    assert session.tally.outcomes.battles == 12
    assert session.tally.by_version[1].battles == 11


def test_an_error_in_answer_to_a_farewell_is_counted_too() -> None:
    def broken(asked: Observation) -> Decision:
        failed = msgspec.structs.replace(decision(asked, None), error=Problem(code="no_model", text="none"))
        return failed if asked.done else first_legal(asked)

    session = Session(plan())
    farewells = sum(one.done for one in played(session, broken))
    assert session.tally.errors == {"no_model": farewells}
    assert session.tally.interrupted == 12


@pytest.mark.parametrize("action", [None, -1, rules.SMASH, len(rules.ACTIONS), 10**6])
def test_an_answer_that_is_no_legal_action_is_an_error(action: int | None) -> None:
    session = Session(plan(battles=40))
    played(session, lambda asked: decision(asked, action))
    assert session.tally.errors[ILLEGAL_ACTION] >= 40
    assert session.tally.interrupted == 40
    assert session.tally.outcomes.battles == 40


def test_without_an_answer_in_time_a_random_legal_action_is_played() -> None:
    session = Session(plan())
    published = played(session, lambda _: None)
    assert session.tally.timeouts == len(published)
    assert session.tally.interrupted == session.tally.outcomes.battles == 12
    assert session.tally.versions == {}


def test_time_runs_from_sending_and_an_answer_may_come_until_its_end() -> None:
    session = Session(plan(battles=1, concurrent=1))
    [asked] = session.start()
    assert isinstance(asked.id, int)
    session.expire(10 * ANSWER_LIMIT_NS)
    assert session.tally.timeouts == 0
    session.sent(asked.id, 50)
    session.expire(50 + ANSWER_LIMIT_NS - 1)
    assert session.tally.timeouts == 0
    session.expire(50 + ANSWER_LIMIT_NS)
    assert session.tally.timeouts == 1


def test_answers_that_nobody_awaits_are_passed_over() -> None:
    session = Session(plan(battles=1, concurrent=1))
    [asked] = session.start()
    assert isinstance(asked.id, int)
    right = first_legal(asked)
    session.receive(right, 5)
    session.sent(asked.id, 10)
    for wrong in ({"id": "1"}, {"id": None}, {"id": 999}, {"battle": "another game's-0"}):
        session.receive(msgspec.structs.replace(right, **wrong), 20)
    assert session.advance() == []
    session.receive(right, 20)
    session.receive(right, 30)
    assert session.tally.final(1.0)["answers"] == 1
    assert len(session.advance()) == 1


def test_the_tally_knows_who_answered_and_how_fast() -> None:
    def alternating(asked: Observation) -> Decision:
        return msgspec.structs.replace(first_legal(asked), version=1 + int(asked.battle.split("-")[1]) % 2)

    session = Session(plan())
    asked = sum(not one.done for one in played(session, alternating))
    report = session.tally.final(1.0)
    assert report["answers"] == report["models"]["abc"] == sum(report["versions"].values()) == asked
    assert {version: one["battles"] for version, one in report["by_version"].items()} == {"1": 6, "2": 6}
    assert report["latency_us_p50"] == pytest.approx(1.0, rel=0.022)


def test_a_model_without_a_version_counts_as_version_0() -> None:
    session = Session(plan())
    played(session, lambda asked: msgspec.structs.replace(first_legal(asked), version=None))
    assert set(session.tally.versions) == set(session.tally.by_version) == {0}


def test_the_session_plays_by_the_rules_of_the_arena() -> None:
    session = Session(plan(battles=600, concurrent=200, player=ExpertPlayer()))
    played(session)
    assert session.tally.outcomes.report()["low"] > 0.65
