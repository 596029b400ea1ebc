"""The battle book: from single answers to transitions.

Two successive observations of the same actor in the same battle of a slot make one transition: features and action of
the earlier, reward and end of the later (Sutton and Barto, Reinforcement Learning, section 3.1). Nothing else tells
the agent what an action led to.

Records of one battle may arrive out of order, since two workers answer during a handover. So a record settles
`settle_s` after its arrival, together with all lower steps that are here by then, and records that have settled are
paired in the order of their steps. A lower step that arrives later still is counted, and left out.

A battle's name is used once. (A second later it may be used again.) Pure: the caller brings the time, which must not
fall.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from msgspec import Struct

from protocol.messages import Transition

_Key = tuple[str, str, str]


class Served(Struct, frozen=True, array_like=True, gc=False):
    """One answered observation, as a worker reports it.

    Attributes:
        slot: Which slot answered.
        battle: The episode.
        actor: Who is to act.
        step: Counts up within the battle; gaps are fine.
        features: float32 little-endian vector; may be empty where there is no action.
        action: The action that is played, `None` after an error and at the end.
        taken: Whether a human or a script chose it.
        propensity: The probability with which the policy chose it; `None` if it did not.
        legal: One byte, 0 or 1, per action; empty if all are legal.
        reward: For this actor's previous action.
        done: The battle has ended.
        model: SHA-256 of the model that answered.
        version: Its version.
        at: When it answered, in seconds since the epoch.
    """

    slot: str
    battle: str
    actor: str
    step: int
    features: bytes
    action: int | None
    taken: bool
    propensity: float | None
    legal: bytes
    reward: float | None
    done: bool
    model: str
    version: int
    at: float


class _Thread:
    """One actor's way through one battle.

    Attributes:
        held: Records that have not settled, by step.
        tail: The last settled record if it opened a transition.
        settled: The last settled step.
        ended: Whether that step ended the battle.
        seen: When the last record arrived.
    """

    __slots__ = ("ended", "held", "key", "seen", "settled", "tail")

    def __init__(self, key: _Key) -> None:
        self.key = key
        self.held: dict[int, Served] = {}
        self.tail: Served | None = None
        self.settled = -1
        self.ended = False
        self.seen = 0.0

    def settle(self, step: int) -> list[Transition]:
        """Pair all held records up to `step`, in order."""
        made = []
        for ready in sorted(held for held in self.held if held <= step):
            record = self.held.pop(ready)
            if self.tail is not None:
                made.append(_pair(self.tail, record))
            self.tail = None if record.done or record.action is None else record
            self.settled = ready
            self.ended = record.done
        return made


class BattleBook:
    """Keeps the open battles and pairs their records.

    Args:
        settle_s: How long after its arrival a record waits for lower steps.
        idle_s: After how long without a record a battle counts as cut off. At least `settle_s`.
        max_open: Bound of open battles (each actor counts); above it the one that was idle longest is cut off.
        max_held: Bound of records and transitions that wait in memory; above it records are refused.

    Attributes:
        late: Records below a step that had already settled.
        duplicate: Records of a step that is already here.
        truncated: Transitions of battles that were cut off, for whatever reason.
        evicted: Battles cut off because there were more than `max_open`.
        refused: Records refused because of `max_held`.
    """

    def __init__(
        self, *, settle_s: float = 1.0, idle_s: float = 300.0, max_open: int = 4096, max_held: int = 65_536
    ) -> None:
        assert 0.0 <= settle_s <= idle_s, "a battle must settle before it counts as idle"
        assert max_open > 0, "a book with room for no battle is of no use"
        self.late = self.duplicate = self.truncated = self.evicted = self.refused = 0
        self._settle_s = settle_s
        self._idle_s = idle_s
        self._max_open = max_open
        self._max_held = max_held
        self._open: OrderedDict[_Key, _Thread] = OrderedDict()  # by last arrival, the oldest first
        self._arrivals: deque[tuple[float, _Thread, int]] = deque()
        self._ended: OrderedDict[_Key, tuple[float, int]] = OrderedDict()  # when, and the last step
        self._ready: list[Transition] = []

    @property
    def open_battles(self) -> int:
        """How many battles are open, each actor counted."""
        return len(self._open)

    def add(self, record: Served, now: float) -> None:
        """Take a record that arrived at `now`, in seconds of a monotonic clock."""
        key = (record.slot, record.battle, record.actor)
        thread = self._open.get(key)
        if self._is_stale(record, thread, key, now):
            return
        if len(self._arrivals) + len(self._ready) >= self._max_held:
            self.refused += 1
            return
        if thread is None:
            thread = self._open[key] = _Thread(key)
        thread.held[record.step] = record
        thread.seen = now
        self._open.move_to_end(key)
        self._arrivals.append((now, thread, record.step))
        if len(self._open) > self._max_open:
            self.evicted += 1
            self._cut_off(next(iter(self._open.values())))

    def collect(self, now: float) -> list[Transition]:
        """The transitions that became certain by `now`, each with `seq` 0, which the outbox replaces."""
        while self._arrivals and self._arrivals[0][0] + self._settle_s <= now:
            _, thread, step = self._arrivals.popleft()
            self._ready += thread.settle(step)
            if thread.ended and not thread.held and self._open.get(thread.key) is thread:
                del self._open[thread.key]
                self._remember(thread, now)
        while self._open and (oldest := next(iter(self._open.values()))).seen + self._idle_s <= now:
            self._cut_off(oldest)
        while self._ended and next(iter(self._ended.values()))[0] + self._settle_s <= now:
            self._ended.popitem(last=False)
        made, self._ready = self._ready, []
        return made

    def close(self, now: float) -> list[Transition]:
        """Settle everything, cut off what is still open, and return the last transitions. The book is then empty."""
        for thread in list(self._open.values()):
            self._cut_off(thread)
        self._arrivals.clear()
        self._ended.clear()
        return self.collect(now)

    def _is_stale(self, record: Served, thread: _Thread | None, key: _Key, now: float) -> bool:
        """Count a record that comes too late or twice."""
        if thread is not None:
            settled = thread.settled
        else:
            ended_at, settled = self._ended.get(key, (now, -1))
            if ended_at + self._settle_s <= now:
                settled = -1
        if record.step == settled or (thread is not None and record.step in thread.held):
            self.duplicate += 1
            return True
        if record.step < settled:
            self.late += 1
            return True
        return False

    def _cut_off(self, thread: _Thread) -> None:
        del self._open[thread.key]
        self._ready += thread.settle(max(thread.held, default=-1))
        if thread.tail is not None:
            self.truncated += 1
            self._ready.append(_transition(thread.tail, 0.0, thread.tail.features, done=False, truncated=True))

    def _remember(self, thread: _Thread, now: float) -> None:
        """Know a battle's last step for a while, so that a straggler does not open it again."""
        self._ended[thread.key] = (now, thread.settled)
        self._ended.move_to_end(thread.key)
        if len(self._ended) > self._max_open:
            self._ended.popitem(last=False)


def _pair(earlier: Served, later: Served) -> Transition:
    """One step. A later vector that does not fit (another feature spec, or none) is no next state to learn from."""
    reward = later.reward or 0.0
    if len(later.features) == len(earlier.features):
        return _transition(earlier, reward, later.features, done=later.done, truncated=False)
    return _transition(earlier, reward, earlier.features, done=later.done, truncated=not later.done)


def _transition(record: Served, reward: float, next_features: bytes, *, done: bool, truncated: bool) -> Transition:
    assert record.action is not None, "only a record with an action opens a transition"
    return Transition(
        seq=0,
        slot=record.slot,
        battle=record.battle,
        actor=record.actor,
        step=record.step,
        features=record.features,
        action=record.action,
        taken=record.taken,
        propensity=record.propensity,
        legal=record.legal,
        reward=reward,
        next_features=next_features,
        done=done,
        truncated=truncated,
        model=record.model,
        version=record.version,
        at=record.at,
    )
