"""A game of many battles at once, without its network: answers in, observations out.

Side A is played by whoever answers; side B by the scripted opponent. Observations go out when it is a side A
character's turn, and once more, with the reward, to each one that acted when its battle is over. Battle number n of a
seed is the same battle whatever the order in which answers arrive. Time is an argument.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from msgspec import Struct

from protocol.messages import Decision, Observation
from trainer_host.arena import observation, rules
from trainer_host.arena.observation import View
from trainer_host.arena.players import Player, RandomPlayer, ScriptedPlayer
from trainer_host.arena.rules import Battles, Rows
from trainer_host.arena.tally import Tally

ANSWER_LIMIT_NS = 2_000_000_000
DRAWN_AT_ONCE = 256
ILLEGAL_ACTION = "illegal_action"
UNNAMED_VERSION = 0
_DECIMALS = 6


class Plan(Struct, frozen=True, kw_only=True):
    """What to play.

    Attributes:
        name: Begins the names of its battles.
        seed: Of the battles and of random choices.
        battles: How many; 0 for no end.
        concurrent: How many at once.
        observe: What observations carry: the game's own `state`, or the `features` vector.
        player: Who chooses for side A and says so in `taken`; `None` plays the answers.
    """

    name: str
    seed: int = 0
    battles: int = 0
    concurrent: int = 64
    observe: Literal["state", "features"] = "state"
    player: Player | None = None


class _Battle:
    """What is remembered of a running battle beside its arrays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.actors: set[int] = set()
        self.versions: set[int] = set()
        self.interrupted = False


class _Awaited:
    """An observation whose answer is not there yet.

    `row` is `None` for a battle's last ones. `fallback` is played where no answer is to be.
    """

    def __init__(self, battle: _Battle, row: int | None, legal: list[bool], fallback: int) -> None:
        self.battle = battle
        self.row = row
        self.legal = {action for action, allowed in enumerate(legal) if allowed}
        self.fallback = fallback
        self.sent_ns: int | None = None


class Session:
    """The battles of one plan.

    Call `start` once, then in any order `sent`, `receive`, `expire`, and `advance` for what to publish next.
    """

    def __init__(self, plan: Plan) -> None:
        self.tally = Tally()
        self._plan = plan
        self._opponent = ScriptedPlayer()
        self._stray = RandomPlayer()
        battles_seed, choices_seed = np.random.SeedSequence(plan.seed).spawn(2)
        self._battles_rng, self._rng = np.random.default_rng(battles_seed), np.random.default_rng(choices_seed)
        self._drawn = rules.draw(self._battles_rng, DRAWN_AT_ONCE)
        self._begun = 0
        self._ids = 0
        self._awaited: dict[int, _Awaited] = {}
        self._chosen: dict[int, int] = {}
        size = min(plan.concurrent, plan.battles) if plan.battles else plan.concurrent
        self._battles = self._drawn.take(np.zeros(size, np.intp))
        self._about: list[_Battle] = [_Battle("")] * size

    @property
    def finished(self) -> bool:
        """Whether every battle is over and every observation is answered or given up."""
        return bool(self._begun) and not self._awaited and not self._chosen

    def start(self) -> list[Observation]:
        """Begin the first battles.

        Returns:
            What to publish, in this order.
        """
        return self._ask(self._begin(np.arange(len(self._about))))

    def sent(self, observation_id: int, now_ns: int) -> None:
        """Note that an observation is being published; its answer is due `ANSWER_LIMIT_NS` later."""
        self._awaited[observation_id].sent_ns = now_ns

    def receive(self, decision: Decision, now_ns: int) -> None:
        """Take an answer. One that nobody awaits (another game's, or late) is passed over."""
        if not isinstance(decision.id, int):
            return
        awaited = self._awaited.get(decision.id)
        if awaited is None or awaited.sent_ns is None or awaited.battle.name != decision.battle:
            return
        del self._awaited[decision.id]
        if decision.error is not None:
            self._give_up(awaited, decision.error.code)
        elif awaited.row is None:
            return
        elif decision.action not in awaited.legal:
            self._give_up(awaited, ILLEGAL_ACTION)
        else:
            version = decision.version or UNNAMED_VERSION
            self.tally.answered(decision.model, version, now_ns - awaited.sent_ns)
            awaited.battle.versions.add(version)
            played = decision.action if self._plan.player is None else None
            self._chosen[awaited.row] = awaited.fallback if played is None else played

    def expire(self, now_ns: int) -> None:
        """Stop waiting for answers that are overdue; observations were sent in the order in which they stand here."""
        overdue = []
        for number, awaited in self._awaited.items():
            if awaited.sent_ns is None or now_ns - awaited.sent_ns < ANSWER_LIMIT_NS:
                break
            overdue.append(number)
        for number in overdue:
            self.tally.timeouts += 1
            self._give_up(self._awaited.pop(number), None)

    def advance(self) -> list[Observation]:
        """Play what was chosen, and go on to the next turns of side A.

        Returns:
            What to publish, in this order.
        """
        if not self._chosen:
            return []
        rows = np.fromiter(self._chosen.keys(), np.intp, len(self._chosen))
        actions = np.fromiter(self._chosen.values(), np.intp, len(self._chosen))
        self._chosen.clear()
        self._battles.put(rows, rules.play(self._battles.take(rows), actions))
        self._play_opponent(rows)
        over = self._battles.over[rows]
        farewells = self._end(rows[over])
        return farewells + self._ask(np.concatenate([rows[~over], self._begin(rows[over])]))

    def _give_up(self, awaited: _Awaited, code: str | None) -> None:
        """Go on without an answer, with the action that was taken or else a random one."""
        if code is not None:
            self.tally.errors[code] += 1
        self.tally.interrupted += not awaited.battle.interrupted
        awaited.battle.interrupted = True
        if awaited.row is not None:
            self._chosen[awaited.row] = awaited.fallback

    def _begin(self, rows: Rows) -> Rows:
        """Put the next battles into these rows, as far as there are more, up to side A's first turn."""
        if self._plan.battles:
            rows = rows[: self._plan.battles - self._begun]
        for row in rows.tolist():
            index = self._begun % DRAWN_AT_ONCE
            if self._begun and index == 0:
                self._drawn = rules.draw(self._battles_rng, DRAWN_AT_ONCE)
            self._battles.put(np.array([row]), self._drawn.take(np.array([index])))
            self._about[row] = _Battle(f"{self._plan.name}-{self._begun}")
            self._begun += 1
        self._play_opponent(rows)
        return rows

    def _play_opponent(self, rows: Rows) -> None:
        while len(rows := rows[~self._battles.over[rows] & (self._battles.actor[rows] >= rules.SIDE_SIZE)]):
            part = self._battles.take(rows)
            self._battles.put(rows, rules.play(part, self._opponent.choose(observation.view(part), self._rng)))

    def _end(self, rows: Rows) -> list[Observation]:
        """Count battles that are over, and tell each character of side A that acted in them."""
        who = [(row, actor) for row in rows.tolist() for actor in sorted(self._about[row].actors)]
        for row, outcome in zip(rows.tolist(), self._battles.outcome[rows].tolist(), strict=True):
            battle = self._about[row]
            self.tally.ended(outcome, set() if battle.interrupted else battle.versions)
        if not who:
            return []
        part = self._battles.take(np.array([row for row, _ in who]))
        actors = np.array([actor for _, actor in who], np.int32)
        contents = self._contents(observation.view(part, actors))
        steps, outcomes = part.turn.tolist(), part.outcome.tolist()
        farewells = []
        for (row, actor), content, step, outcome in zip(who, contents, steps, outcomes, strict=True):
            battle = self._about[row]
            number = self._await(_Awaited(battle, None, [], 0))
            name = observation.NAMES[actor]
            farewells.append(
                Observation(
                    battle=battle.name, step=step, actor=name, id=number, done=True, reward=float(outcome), **content
                )
            )
        return farewells

    def _ask(self, rows: Rows) -> list[Observation]:
        """Observations of the characters of side A whose turn it is."""
        if not len(rows):
            return []
        part = self._battles.take(rows)
        seen = observation.view(part)
        player = self._plan.player
        choices = (player or self._stray).choose(seen, self._rng).tolist()
        legals, contents = seen.legal.tolist(), self._contents(seen)
        asked = []
        for index, (row, actor, step) in enumerate(_listed(rows, part)):
            battle = self._about[row]
            battle.actors.add(actor)
            number = self._await(_Awaited(battle, row, legals[index], choices[index]))
            asked.append(
                Observation(
                    battle=battle.name,
                    step=step,
                    actor=observation.NAMES[actor],
                    id=number,
                    legal=legals[index],
                    taken=None if player is None else choices[index],
                    **contents[index],
                )
            )
        return asked

    def _await(self, awaited: _Awaited) -> int:
        self._ids += 1
        self._awaited[self._ids] = awaited
        return self._ids

    def _contents(self, seen: View) -> list[dict[str, Any]]:
        """What observations of these views carry."""
        if self._plan.observe == "features":
            # Fewer digits make shorter JSON; the sixth decimal means nothing to a float32.
            vectors = observation.encode(seen).astype(np.float64).round(_DECIMALS).tolist()
            return [{"features": vector} for vector in vectors]
        return [{"state": state} for state in observation.states(seen)]


def _listed(rows: Rows, battles: Battles) -> list[tuple[int, int, int]]:
    return list(zip(rows.tolist(), battles.actor.tolist(), battles.turn.tolist(), strict=True))
