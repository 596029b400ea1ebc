from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.battles import Served
from edge_agent.open_battles import Finishing, Mark, OpenBattles, mark_of

OLD, NEW = 1, 2


def mark(step: int, seen: float, battle: str = "b", actor: str = "a", *, done: bool = False) -> Mark:
    return Mark(battle, actor, step, done, seen)


def heard(*marks: Mark, **options: Any) -> OpenBattles:
    battles = OpenBattles(**options)
    for one in marks:
        battles.hear(one)
    return battles


def test_a_record_says_of_its_battle_what_is_needed() -> None:
    record = Served("combat", "b", "a", 7, b"", None, False, None, b"", 1.0, True, "m", 1, 5.0)
    assert mark_of(record, 3.0) == mark(7, 3.0, done=True)


def test_a_battle_is_open_until_it_is_done_and_a_second_longer() -> None:
    battles = heard(mark(1, 0.0))
    assert "b" in battles
    assert "other" not in battles
    battles.hear(mark(2, 5.0, done=True))
    battles.forget(5.9)
    assert ("b" in battles, len(battles)) == (True, 1)
    battles.forget(6.0)
    assert ("b" in battles, len(battles)) == (False, 0)


def test_a_battle_of_several_ends_with_the_last_of_them() -> None:
    battles = heard(mark(1, 0.0, actor="a"), mark(1, 0.0, actor="z"), mark(9, 1.0, actor="a", done=True))
    battles.forget(200.0)
    assert "b" in battles
    battles.hear(mark(2, 200.0, actor="z", done=True))
    battles.forget(201.0)
    assert "b" not in battles


def test_an_actor_who_comes_late_still_belongs_to_it() -> None:
    battles = heard(mark(9, 0.0, actor="a", done=True))
    battles.hear(mark(1, 0.9, actor="z"))
    battles.forget(100.0)
    assert "b" in battles


def test_a_battle_that_is_idle_counts_as_ended() -> None:
    battles = heard(mark(1, 0.0), mark(2, 100.0), idle_s=300.0)
    battles.forget(399.9)
    assert "b" in battles
    battles.forget(400.0)
    assert "b" not in battles
    assert battles.marks() == []


def test_asking_again_keeps_a_battle_from_being_idle() -> None:
    battles = heard(mark(1, 0.0), mark(1, 200.0))
    battles.forget(499.0)
    assert "b" in battles


def test_a_straggler_does_not_open_a_battle_again_but_a_name_may_be_used_again() -> None:
    battles = heard(mark(9, 0.0, done=True), mark(8, 0.4))
    battles.forget(1.0)
    assert "b" not in battles
    battles.hear(mark(0, 1.0))
    battles.forget(200.0)
    assert "b" in battles


def test_what_ended_long_ago_is_forgotten() -> None:
    battles = heard(mark(9, 0.0, done=True), remember_s=30.0)
    battles.forget(29.9)
    assert battles.marks() == [mark(9, 0.0, done=True)]
    battles.forget(30.0)
    assert battles.marks() == []


def test_all_of_it_is_bounded() -> None:
    battles = OpenBattles(max_open=3, max_ended=2)
    for number in range(10):
        battles.hear(mark(1, number, f"open{number}"))
        battles.hear(mark(1, number, f"done{number}", done=True))
    assert [one.battle for one in battles.marks()] == ["open7", "open8", "open9", "done8", "done9", "done6", "done7"]
    assert len(battles) == 5
    battles.learn(mark(1, number, f"told{number}") for number in range(20))
    assert [one.battle for one in battles.marks()[:3]] == ["told17", "told18", "told19"]
    assert "open9" not in battles


def test_what_is_learned_is_merged_by_what_is_later() -> None:
    mine = heard(mark(3, 10.0, "ended there"), mark(4, 10.0, "ended here", done=True), mark(5, 10.0, "mine"))
    theirs = heard(
        mark(4, 10.1, "ended there", done=True), mark(3, 10.1, "ended here"), mark(9, 10.1, "theirs"), mark(1, 9.0, "b")
    )
    mine.learn(theirs.marks())
    mine.forget(12.0)
    assert [name for name in ("ended there", "ended here", "mine", "theirs", "b") if name in mine] == [
        "mine",
        "theirs",
        "b",
    ]
    mine.forget(309.5)
    assert [name for name in ("mine", "theirs", "b") if name in mine] == ["mine", "theirs"]


def test_an_earlier_battle_of_that_name_that_ended_elsewhere_does_not_end_this_one() -> None:
    mine = heard(mark(0, 10.0))
    mine.learn([mark(50, 9.0, done=True)])
    mine.forget(12.0)
    assert "b" in mine


def test_until_it_begins_all_battles_are_the_old_models() -> None:
    finishing = Finishing(OpenBattles())
    finishing.hear(mark(1, 0.0, "heard"))
    assert finishing.keeps("any")
    assert not finishing.is_over(1000.0)


def test_from_then_on_only_those_that_are_known_and_have_not_ended() -> None:
    finishing = Finishing(OpenBattles())
    finishing.hear(mark(1, 0.0, "heard"))
    finishing.learn([mark(1, 0.0, "told")])
    finishing.begin()
    assert [name for name in ("heard", "told", "new") if finishing.keeps(name)] == ["heard", "told"]
    finishing.hear(mark(2, 1.0, "heard", done=True))
    finishing.hear(mark(2, 1.0, "told", done=True))
    assert not finishing.is_over(1.9)
    assert finishing.is_over(2.0)


def test_with_no_battle_going_on_it_is_over_as_soon_as_it_begins() -> None:
    finishing = Finishing(OpenBattles())
    finishing.begin()
    assert finishing.is_over(0.0)


@dataclass
class Battle:
    """One battle of a name: its actors' steps, and which versions it has seen."""

    steps: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    versions: set[int] = field(default_factory=set)
    began_after: bool = False
    seen: float = 0.0

    @property
    def over(self) -> bool:
        return bool(self.steps) and self.ended == set(self.steps)


class Swap(RuleBasedStateMachine):
    """A swap at the battle's end under a game that plays by the rules.

    The broker gives a state to either worker, their reports come late and cross, actors end one by one, and names are
    used again a second after their battle ended.
    """

    NAMES = ("b1", "b2")
    MOST_LATE_CS = 45

    def __init__(self) -> None:
        super().__init__()
        self.clock_cs = 0
        self.battles: dict[str, Battle] = {}
        self.supervisor = OpenBattles(idle_s=60.0)
        self.new = Finishing(OpenBattles(idle_s=60.0))
        self.reports: dict[int, list[tuple[int, Mark]]] = {OLD: [], NEW: []}
        self.joined = self.begun = False

    @property
    def now(self) -> float:
        return self.clock_cs / 100

    @rule(
        name=st.sampled_from(NAMES),
        actor=st.sampled_from("xy"),
        worker=st.sampled_from((OLD, NEW)),
        gap=st.sampled_from((1, 1, 20)),
        done=st.sampled_from((False, False, True)),
    )
    def state(self, name: str, actor: str, worker: int, gap: int, done: bool) -> None:
        battle = self.battles.get(name)
        pause_s = self.now - battle.seen if battle else 100.0
        if battle is None or (battle.over and pause_s > 1.0) or pause_s >= 60.0:
            # Since the end may be reported late, a name that is used again at once may get the old model once more.
            long_ago = pause_s > (1.5 if battle and battle.over else 60.5)
            battle = self.battles[name] = Battle(began_after=self.begun and long_ago)
        if actor in battle.ended:
            return
        battle.steps[actor] = battle.steps.get(actor, -1) + gap
        battle.seen = self.now
        if done:
            battle.ended.add(actor)
        if self.begun or (self.joined and worker == NEW):
            self.answered_by_new(name, battle, mark(battle.steps[actor], self.now, name, actor, done=done))
        else:
            battle.versions.add(OLD)
            self.reports[OLD].append((self.clock_cs, mark(battle.steps[actor], self.now, name, actor, done=done)))

    def answered_by_new(self, name: str, battle: Battle, said: Mark) -> None:
        version = OLD if self.new.keeps(name) else NEW
        battle.versions.add(version)
        self.reports[NEW].append((self.clock_cs, said))
        if version == OLD:
            self.new.hear(said)

    @rule(worker=st.sampled_from((OLD, NEW)))
    def report(self, worker: int) -> None:
        for _, said in self.reports[worker]:
            self.supervisor.hear(Mark(said.battle, said.actor, said.step, said.done, self.now))
        self.reports[worker].clear()

    @rule(passed_cs=st.sampled_from((5, 20, 40, 60, 110, 160, 7000)))
    def pass_time(self, passed_cs: int) -> None:
        for worker, waiting in self.reports.items():
            if waiting and self.clock_cs + passed_cs - waiting[0][0] > self.MOST_LATE_CS:
                self.report(worker)
        self.clock_cs += passed_cs
        self.supervisor.forget(self.now)
        self.new.is_over(self.now)

    @precondition(lambda self: not self.joined)
    @rule()
    def join(self) -> None:
        self.joined = True

    @precondition(lambda self: self.joined and not self.begun)
    @rule()
    def begin(self) -> None:
        """The old worker has left, so all its reports are there; those of the new one may not be."""
        self.report(OLD)
        self.new.learn(self.supervisor.marks())
        self.new.begin()
        self.new.is_over(self.now)
        self.begun = True

    @invariant()
    def no_battle_sees_two_versions(self) -> None:
        for battle in self.battles.values():
            assert len(battle.versions) <= 1

    @invariant()
    def a_battle_that_began_afterwards_has_the_new_version(self) -> None:
        for battle in self.battles.values():
            if battle.began_after:
                assert battle.versions == {NEW}

    def teardown(self) -> None:
        """Let the battles come to their ends: then the old model is over, and not only for want of news."""
        if not self.joined:
            return
        if not self.begun:
            self.begin()
        for name, battle in self.battles.items():
            for actor in sorted(set(battle.steps) - battle.ended) if self.now - battle.seen < 60.0 else ():
                self.state(name, actor, NEW, 1, True)
        self.no_battle_sees_two_versions()
        assert self.new.is_over(self.now + 1.5)


TestSwap = Swap.TestCase
TestSwap.settings = settings(max_examples=300, stateful_step_count=50)
