from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.battles import BattleBook, Served
from protocol.messages import Transition


def served(step: int, battle: str = "b", actor: str = "a", **fields: Any) -> Served:
    usual: dict[str, Any] = {
        "slot": "combat",
        "battle": battle,
        "actor": actor,
        "step": step,
        "features": struct.pack("<2f", step, len(battle)),
        "action": step % 3,
        "taken": False,
        "propensity": 1.0,
        "legal": b"\1\1\0",
        "reward": step / 8,
        "done": False,
        "model": "m",
        "version": 1,
        "at": 100.0 + step,
    }
    return Served(**{**usual, **fields})


def end(step: int, battle: str = "b", **fields: Any) -> Served:
    return served(step, battle, action=None, propensity=None, done=True, **fields)


def steps(transitions: list[Transition]) -> list[tuple[int, bool, bool]]:
    return [(made.step, made.done, made.truncated) for made in transitions]


def test_two_observations_make_one_transition() -> None:
    book = BattleBook(settle_s=1.0)
    first, second = served(3, taken=True, propensity=None, action=2), served(7)
    book.add(first, 0.0)
    book.add(second, 0.5)
    assert book.collect(1.4) == []
    assert book.collect(1.5) == [
        Transition(
            seq=0,
            slot="combat",
            battle="b",
            actor="a",
            step=3,
            features=first.features,
            action=2,
            taken=True,
            propensity=None,
            legal=b"\1\1\0",
            reward=7 / 8,
            next_features=second.features,
            done=False,
            truncated=False,
            model="m",
            version=1,
            at=103.0,
        )
    ]


def test_the_last_observation_ends_the_battle_and_opens_nothing() -> None:
    book = BattleBook(settle_s=0.0)
    book.add(served(0), 0.0)
    book.add(end(1, reward=-1.0), 0.0)
    (made,) = book.collect(0.0)
    assert (made.done, made.truncated, made.reward) == (True, False, -1.0)
    assert book.open_battles == 0
    assert book.close(0.0) == []
    assert book.truncated == 0


def test_a_record_that_ends_and_names_an_action_still_opens_nothing() -> None:
    book = BattleBook(settle_s=0.0)
    book.add(served(0), 0.0)
    book.add(served(1, done=True), 0.0)
    assert steps(book.close(0.0)) == [(0, True, False)]


def test_an_error_closes_what_was_open_and_opens_nothing() -> None:
    book = BattleBook(settle_s=0.0)
    for record in (served(0), served(1, action=None), served(2), end(3)):
        book.add(record, 0.0)
    assert steps(book.collect(0.0)) == [(0, False, False), (2, True, False)]


def test_a_vector_of_another_length_is_no_next_state() -> None:
    book = BattleBook(settle_s=0.0)
    for record in (served(0), served(1, features=b"\0" * 12), end(2, features=b"", reward=None)):
        book.add(record, 0.0)
    cut, ended = book.collect(0.0)
    assert (cut.truncated, cut.done, cut.reward, cut.next_features) == (True, False, 1 / 8, cut.features)
    assert (ended.truncated, ended.done, ended.reward, ended.next_features) == (False, True, 0.0, ended.features)


def test_battles_actors_and_slots_are_kept_apart() -> None:
    book = BattleBook(settle_s=0.0)
    book.add(served(0, "x"), 0.0)
    book.add(served(1, "y"), 0.0)
    book.add(served(2, "x", actor="other"), 0.0)
    book.add(served(3, "x", slot="movement"), 0.0)
    assert book.collect(0.0) == []
    assert book.open_battles == 4


def test_a_lower_step_that_is_still_fresh_settles_with_a_higher_one_that_is_due() -> None:
    book = BattleBook(settle_s=1.0)
    book.add(served(0), 0.0)
    book.add(served(2), 0.1)
    book.add(served(1), 1.0)
    assert steps(book.collect(1.1)) == [(0, False, False), (1, False, False)]
    assert book.collect(2.0) == []
    assert (book.late, book.duplicate) == (0, 0)


def test_a_step_below_a_settled_one_is_late() -> None:
    book = BattleBook(settle_s=1.0)
    book.add(served(5), 0.0)
    book.collect(1.0)
    book.add(served(4), 1.0)
    book.add(served(6), 1.0)
    assert steps(book.collect(2.0)) == [(5, False, False)]
    assert book.late == 1


def test_a_step_is_taken_once() -> None:
    book = BattleBook(settle_s=1.0)
    book.add(served(5), 0.0)
    book.add(served(5, action=0), 0.1)  # still held
    book.collect(1.0)
    book.add(served(5, action=0), 1.0)  # settled
    assert book.duplicate == 2
    (made,) = book.close(1.0)
    assert made.action == 2


def test_a_straggler_does_not_open_an_ended_battle_again() -> None:
    book = BattleBook(settle_s=1.0)
    book.add(served(1), 0.0)
    book.add(end(2), 0.0)
    book.collect(1.0)
    book.add(served(0), 1.5)
    book.add(end(2), 1.5)
    assert (book.late, book.duplicate, book.open_battles) == (1, 1, 0)


def test_an_ended_battle_is_forgotten_after_a_while() -> None:
    book = BattleBook(settle_s=1.0)
    for start in (0.0, 10.0):
        book.add(served(0), start)  # nobody collected since, the second time
        book.add(end(1), start)
        assert steps(book.collect(start + 1.0)) == [(0, True, False)]
    book.collect(20.0)
    book.add(served(0), 20.0)
    assert (book.late, book.open_battles) == (0, 1)


def test_a_higher_step_after_the_end_begins_anew() -> None:
    book = BattleBook(settle_s=1.0)
    for record in (served(0), end(1), served(2)):
        book.add(record, 0.0)
    book.add(served(3), 0.5)
    assert steps(book.collect(1.0)) == [(0, True, False)]
    assert steps(book.collect(1.5)) == [(2, False, False)]
    book.add(end(4), 1.5)
    book.collect(2.5)
    book.add(served(5), 2.6)
    assert steps(book.close(2.6)) == [(5, False, True)]


def test_an_idle_battle_is_cut_off() -> None:
    book = BattleBook(settle_s=1.0, idle_s=300.0)
    book.add(served(0), 0.0)
    book.add(served(1), 1.0)
    book.add(served(0, "errors", action=None), 1.0)
    book.collect(300.9)
    assert book.truncated == 0
    (made,) = book.collect(301.0)
    assert (made.step, made.truncated, made.done, made.reward) == (1, True, False, 0.0)
    assert made.next_features == made.features
    assert (book.truncated, book.open_battles) == (1, 0)


def test_a_record_keeps_its_battle_from_being_idle() -> None:
    book = BattleBook(settle_s=1.0, idle_s=10.0)
    book.add(served(0, "x"), 0.0)
    book.add(served(0, "y"), 5.0)
    book.add(served(1, "x"), 6.0)
    assert [made.battle for made in book.collect(15.0)] == ["x", "y"]
    assert book.truncated == 1


def test_above_the_bound_the_battle_that_was_idle_longest_is_cut_off() -> None:
    book = BattleBook(settle_s=1.0, max_open=2)
    for moment, battle in enumerate("xyz"):
        book.add(served(0, battle), float(moment))
    assert (book.evicted, book.truncated, book.open_battles) == (1, 1, 2)
    (made,) = book.collect(2.0)
    assert (made.battle, made.truncated) == ("x", True)


def test_ended_battles_are_remembered_up_to_the_bound() -> None:
    book = BattleBook(settle_s=1.0, max_open=1)
    book.add(end(5, "x"), 0.0)
    book.collect(1.0)
    book.add(end(5, "y"), 1.0)
    book.collect(1.9)
    book.collect(2.0)
    book.add(served(0, "y"), 2.0)
    assert (book.late, book.evicted) == (1, 0)


def test_an_ended_battle_pushes_out_the_memory_of_another() -> None:
    book = BattleBook(settle_s=10.0, idle_s=10.0, max_open=1)
    book.add(end(5, "x"), 0.0)
    book.collect(10.0)
    book.add(end(5, "y"), 1.0)
    book.collect(11.0)
    book.add(served(0, "x"), 11.0)
    assert (book.late, book.open_battles) == (0, 1)


def test_records_beyond_what_memory_may_hold_are_refused_and_counted() -> None:
    book = BattleBook(settle_s=1.0, max_held=2)
    for step in range(4):
        book.add(served(step), 0.0)
    assert book.refused == 2
    assert steps(book.collect(1.0)) == [(0, False, False)]
    book.add(served(4), 1.0)
    assert book.refused == 2


def test_closing_settles_what_is_held_and_cuts_off_the_rest() -> None:
    book = BattleBook(settle_s=1.0)
    for record in (served(1), served(0), served(0, "y"), end(1, "y"), served(0, "z", action=None)):
        book.add(record, 0.0)
    assert steps(book.close(0.0)) == [(0, False, False), (1, False, True), (0, True, False)]
    assert (book.open_battles, book.close(9.0)) == (0, [])


def test_a_record_survives_the_socket() -> None:
    record = served(3, reward=None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Served) == record


def in_order(records: list[Served]) -> list[Transition]:
    """The definition: in step order, each record with an action and its successor, or itself where there is none."""
    made = []
    for battle in sorted({record.battle for record in records}):
        mine = sorted((record for record in records if record.battle == battle), key=lambda record: record.step)
        for earlier, later in [*pairwise(mine), (mine[-1], None)]:
            if earlier.done or earlier.action is None:
                continue
            made.append(
                Transition(
                    0,
                    earlier.slot,
                    battle,
                    earlier.actor,
                    earlier.step,
                    earlier.features,
                    earlier.action,
                    earlier.taken,
                    earlier.propensity,
                    earlier.legal,
                    (later.reward or 0.0) if later else 0.0,
                    later.features if later else earlier.features,
                    later.done if later else False,
                    later is None,
                    earlier.model,
                    earlier.version,
                    earlier.at,
                )
            )
    return made


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[float, Served]]:
    """Battles whose records are delayed by less than the settling time, some of them delivered twice."""
    found = []
    for battle in range(draw(st.integers(1, 3))):
        numbers = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=12)))
        ends = draw(st.booleans())
        for index, step in enumerate(numbers):
            answered = draw(st.booleans()) or draw(st.booleans())
            reward = draw(st.sampled_from([None, 0.5]))
            record = (
                end(step, f"b{battle}")
                if ends and index == len(numbers) - 1
                else served(step, f"b{battle}", action=step % 3 if answered else None, reward=reward)
            )
            sent = index * draw(st.sampled_from([0.0, 0.1]))
            copies = draw(st.sampled_from([1, 1, 1, 2]))
            found += [(sent + draw(st.floats(0.0, 0.99)), record) for _ in range(copies)]
    return sorted(found, key=lambda arrival: arrival[0])


@given(arrivals())
def test_any_order_within_the_settling_time_gives_the_transitions_of_the_right_order(
    delivered: list[tuple[float, Served]],
) -> None:
    book = BattleBook(settle_s=2.5, idle_s=10.0)
    made: list[Transition] = []
    for moment, record in delivered:
        book.add(record, moment)
        made += book.collect(moment)
    made += book.collect(5.0)
    made += book.close(5.0)
    unique = {(record.battle, record.step): record for _, record in delivered}
    assert sorted(made, key=lambda each: (each.battle, each.step)) == in_order(list(unique.values()))
    assert (book.late, book.evicted, book.refused) == (0, 0, 0)
    assert book.duplicate == len(delivered) - len(unique)
    assert book.truncated == sum(each.truncated for each in made)
