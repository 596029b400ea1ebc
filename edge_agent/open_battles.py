"""Which battles are going on, so that a swap can leave each with the model it began with.

During such a swap two workers answer the same battles, and the supervisor hears from both what they answered. Each of
the three keeps an `OpenBattles`, and what one knows can be told to another: `marks` there, `learn` here. What counts is
the latest mark of each actor, whichever way it came.

A battle goes on until each of its actors that was heard has said `done`, and for `settle_s` longer: an actor that was
not heard before still belongs to it then, as does a straggler. After that its name may be used again, as in the battle
book. One that is not heard of for `idle_s` counts as ended. Which battle has ended is remembered for `remember_s`,
since whoever did not hear the end will otherwise wait for it.

Pure: the caller brings the time, in seconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from msgspec import Struct

from edge_agent.battles import Served

_Key = tuple[str, str]


class Mark(Struct, frozen=True, array_like=True, gc=False):
    """The latest that is known of an actor in a battle.

    Attributes:
        battle: The episode.
        actor: Who acts in it.
        step: Its latest step.
        done: Whether that ended the battle for this actor.
        seen: When it was heard.
    """

    battle: str
    actor: str
    step: int
    done: bool
    seen: float


def mark_of(record: Served, now: float) -> Mark:
    """What an answered observation says about its battle."""
    return Mark(record.battle, record.actor, record.step, record.done, now)


class OpenBattles:
    """The battles of one slot that are going on.

    Args:
        settle_s: How long an ended battle is still the same battle.
        cross_s: Two reports that come within this time may have crossed on their way.
        idle_s: After how long without a word a battle counts as ended.
        remember_s: How long it is known that a battle has ended. Longer than any handover.
        max_open: Bound of open battles (each actor counts); above it the one that was idle longest is forgotten.
        max_ended: Bound of ended ones, of those that settle and of those that have.
    """

    def __init__(
        self,
        *,
        settle_s: float = 1.0,
        cross_s: float = 0.5,
        idle_s: float = 300.0,
        remember_s: float = 30.0,
        max_open: int = 4096,
        max_ended: int = 1024,
    ) -> None:
        self._settle_s = settle_s
        self._cross_s = cross_s
        self._idle_s = idle_s
        self._remember_s = remember_s
        self._max_open = max_open
        self._max_ended = max_ended
        # By the time they were seen, the oldest first. An actor is in one of them, and moves from left to right.
        self._open: OrderedDict[_Key, Mark] = OrderedDict()
        self._settling: OrderedDict[_Key, Mark] = OrderedDict()
        self._ended: OrderedDict[_Key, Mark] = OrderedDict()
        self._actors: Counter[str] = Counter()  # how many of a battle are in the first two

    def __contains__(self, battle: str) -> bool:
        return battle in self._actors

    def __len__(self) -> int:
        return len(self._actors)

    def hear(self, mark: Mark) -> None:
        """Take what was heard now."""
        self._take(mark)
        self._trim()

    def learn(self, marks: Iterable[Mark]) -> None:
        """Take what somebody else has heard, also if it was a while ago."""
        for mark in marks:
            self._take(mark)
        for stage in (self._open, self._settling, self._ended):
            for key, _ in sorted(stage.items(), key=lambda item: item[1].seen):
                stage.move_to_end(key)
        self._trim()

    def marks(self) -> list[Mark]:
        """All that is known, for `learn`."""
        return [*self._open.values(), *self._settling.values(), *self._ended.values()]

    def forget(self, now: float) -> None:
        """Let go of what has been idle, has settled, or ended long ago."""
        while self._open and _oldest(self._open).seen + self._idle_s <= now:
            self._leave(self._open)
        while self._settling and _oldest(self._settling).seen + self._settle_s <= now:
            self._settle()
        while self._ended and _oldest(self._ended).seen + self._remember_s <= now:
            self._ended.popitem(last=False)

    def _take(self, mark: Mark) -> None:
        key = (mark.battle, mark.actor)
        for stage in (self._open, self._settling, self._ended):
            known = stage.get(key)
            if known is not None:
                if not self._supersedes(mark, known):
                    return
                del stage[key]
                if stage is not self._ended:
                    self._count_out(mark.battle)
                break
        (self._settling if mark.done else self._open)[key] = mark
        self._actors[mark.battle] += 1

    def _supersedes(self, mark: Mark, known: Mark) -> bool:
        """Whether a mark is the later one; a lower step is, where it does not only come from a slower reporter."""
        passed_s = mark.seen - known.seen
        return passed_s >= 0 and (mark.step >= known.step or passed_s > self._cross_s)

    def _trim(self) -> None:
        while len(self._open) > self._max_open:
            self._leave(self._open)
        while len(self._settling) > self._max_ended:
            self._settle()
        while len(self._ended) > self._max_ended:
            self._ended.popitem(last=False)

    def _settle(self) -> None:
        key, mark = self._leave(self._settling)
        self._ended[key] = mark

    def _leave(self, stage: OrderedDict[_Key, Mark]) -> tuple[_Key, Mark]:
        key, mark = stage.popitem(last=False)
        self._count_out(mark.battle)
        return key, mark

    def _count_out(self, battle: str) -> None:
        self._actors[battle] -= 1
        if not self._actors[battle]:
            del self._actors[battle]


def _oldest(stage: OrderedDict[_Key, Mark]) -> Mark:
    return next(iter(stage.values()))


class Finishing:
    """What a worker with two models goes by: which battles are still the old one's.

    Until it begins with the new model all are, as with its predecessor: so it does not matter which of the two gets a
    state. From then on those are that its predecessor had, or it had itself, and that have not ended.

    Args:
        battles: Empty.
    """

    def __init__(self, battles: OpenBattles) -> None:
        self._battles = battles
        self._begun = False

    def keeps(self, battle: str) -> bool:
        """Whether the old model answers this battle."""
        return not self._begun or battle in self._battles

    def hear(self, mark: Mark) -> None:
        """Take what the old model has answered."""
        self._battles.hear(mark)

    def learn(self, marks: Iterable[Mark]) -> None:
        """Take what is known elsewhere of battles that the old model answers."""
        self._battles.learn(marks)

    def begin(self) -> None:
        """The predecessor has gone: battles that are not known by now are the new model's."""
        self._begun = True

    def is_over(self, now: float) -> bool:
        """Whether the old model is no longer needed."""
        self._battles.forget(now)
        return self._begun and not self._battles
