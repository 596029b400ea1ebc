"""The workers of one slot: who serves, who is about to, who leaves.

Level-triggered: the owner says what should be served (`want`), and `tick` starts, joins, dismisses and replaces workers
until that is so. A swap is a handover: the new worker loads beside the old one, joins its shared subscription, and only
when the broker has confirmed that is the old one told to leave; it answers what it still has. A worker that dies is
replaced at once, one that dies again and again after a growing pause.

In a swap **at the battle's end** the new worker has the old model too, and answers with that, as its predecessor does.
When the predecessor has left, or was killed, it is told which battles are going on: those it finishes with the old
model, all others get the new one. The supervisor knows them from the records, and so needs no last words of anybody.
A further swap at the battle's end waits until this one is through; what must not wait, a rollback, does not. A worker
that dies with two models is replaced by one with the new model alone: it may have been one too many.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.children import (
    Beat,
    Begin,
    Child,
    Disconnected,
    FromWorker,
    Join,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    OldBattles,
    Records,
)
from edge_agent.model_store import LOST_MODEL
from edge_agent.open_battles import OpenBattles, mark_of
from protocol.errors import Unavailable

log = logging.getLogger(__name__)

LOAD_LIMIT_S = 120.0
BEAT_LIMIT_S = 6.0
LEAVE_LIMIT_S = 10.0
FINISH_LIMIT_S = 3600.0
MARKS_PER_MESSAGE = 1024
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 30.0
FORGET_DEATHS_S = 60.0


class Phase(enum.Enum):
    """Where a worker is in its life."""

    LOADING = "loading"
    JOINING = "joining"
    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(frozen=True)
class Death:
    """A worker that ended unasked.

    Attributes:
        digest: Of its model, if it had one.
        how: It ended, for people.
        model_lost: Whether it could not load the model because the file is missing, unreadable or rotten.
    """

    digest: str | None
    how: str
    model_lost: bool


@dataclass
class Member:
    """One worker.

    Attributes:
        child: The process.
        model: What it serves; `None` answers `no_model`.
        phase: Where it is in its life.
        since: When it came into this phase.
        beat_at: When its serving loop last gave a sign.
        connected: Whether the broker has confirmed its subscription since it last lost the connection.
        finishing: The model before, as long as it has that too.
        begun: Whether it was told to answer with its own.
        failure: Why it could not load its model.
    """

    child: Child[FromWorker]
    model: ModelFile | None
    phase: Phase
    since: float
    beat_at: float
    connected: bool = False
    finishing: ModelFile | None = None
    begun: bool = False
    failure: LoadFailed | None = None

    @property
    def digest(self) -> str | None:
        """Digest of its model."""
        return self.model.digest if self.model else None

    @property
    def answers_with(self) -> ModelFile | None:
        """What a battle that begins now gets from it."""
        return self.finishing if self.finishing is not None and not self.begun else self.model

    def enter(self, phase: Phase, now: float) -> None:
        """Go on to a phase of life."""
        self.phase, self.since = phase, now


class Handover:
    """Keeps one slot served.

    Args:
        start: Starts a worker with a model, and with the model before if battles are to be finished with that.
        on_records: Called with what was served.
        on_beat: Called with a serving loop's counts.
        on_death: Called for each worker that ended unasked, with the time.
    """

    def __init__(
        self,
        start: Callable[[ModelFile | None, ModelFile | None], Child[FromWorker]],
        *,
        on_records: Callable[[Records], None],
        on_beat: Callable[[Beat], None],
        on_death: Callable[[Death, float], None],
    ) -> None:
        self._start = start
        self._on_records = on_records
        self._on_beat = on_beat
        self._on_death = on_death
        self._wanted: ModelFile | None = None
        self._at_battle_end = False
        self._battles = OpenBattles()
        self._stopping = False
        self._deaths = 0
        self._died_at = 0.0
        self._resume_at = 0.0
        self._unloadable = False
        self.members: list[Member] = []
        self.runtime = ""

    def want(self, model: ModelFile | None, *, at_battle_end: bool = False) -> None:
        """Say what should be served from now on.

        Args:
            model: If it is the same as before, nothing changes.
            at_battle_end: Whether battles that are going on keep the model they have; else all get this one at once.
        """
        if _digest(model) != _digest(self._wanted):
            self._deaths, self._resume_at, self._unloadable = 0, 0.0, False
            self._at_battle_end = at_battle_end
        self._wanted = model

    def stop(self, now: float) -> None:
        """Tell every worker to leave."""
        self._stopping = True
        for member in list(self.members):
            self._dismiss(member, now)

    @property
    def serving(self) -> Member | None:
        """The worker that answers with what is wanted, if there is one."""
        return next((m for m in self.members if m.phase is Phase.SERVING and m.digest == _digest(self._wanted)), None)

    @property
    def answering(self) -> bool:
        """Whether anybody answers, be it with a model or with `no_model`."""
        return any(member.phase is Phase.SERVING and member.connected for member in self.members)

    @property
    def loaded(self) -> bool:
        """Whether somebody would answer as soon as there is a broker."""
        return any(member.phase in (Phase.JOINING, Phase.SERVING) for member in self.members)

    @property
    def swapping(self) -> bool:
        """Whether a handover is under way."""
        return self.serving is None or len(self.members) > 1

    def turns_over(self, now: float) -> bool:
        """Whether serving makes progress: a worker has given a sign lately, or a replacement loads or is about to."""
        return now < self._resume_at or any(
            member.phase is Phase.LOADING or now - member.beat_at < BEAT_LIMIT_S for member in self.members
        )

    def receive(self, child: Child[FromWorker], now: float) -> None:
        """Deal with what a worker said, or with its end."""
        member = next(member for member in self.members if member.child is child)
        for message in child.channel.receive():
            self._heard(member, message, now)
        if child.channel.closed:
            self._ended(member, now)

    def tick(self, now: float) -> None:
        """Do what is needed to come closer to what is wanted."""
        self._battles.forget(now)
        for member in list(self.members):
            self._check(member, now)
        if self._stopping:
            return
        self._dismiss_unwanted(now)
        self._begin_if_alone()
        staying = [member.digest for member in self.members if member.phase is not Phase.LEAVING]
        if _digest(self._wanted) not in staying and now >= self._resume_at and not self._must_wait(now):
            self._add(self._wanted, now)
        elif self._unloadable and not staying:
            self._add(None, now)  # it answers `no_model` until the wanted one can be loaded

    def _must_wait(self, now: float) -> bool:
        """Whether battles with two models go on: a third would be too many. Not for ever: a battle may never end."""
        return self._at_battle_end and any(
            member.phase is Phase.SERVING
            and member.finishing is not None
            and member.begun
            and now - member.since < FINISH_LIMIT_S
            for member in self.members
        )

    def _add(self, model: ModelFile | None, now: float) -> None:
        before = next((member.answers_with for member in self.members if member.phase is Phase.SERVING), None)
        finishing = before if self._at_battle_end and _digest(before) != _digest(model) else None
        try:
            child = self._start(model, finishing)
        except Unavailable as error:
            log.error("cannot start a worker: %s", error)
            self._pause(now)
            return
        self.members.append(Member(child, model, Phase.LOADING, now, now, finishing=finishing))

    def _begin_if_alone(self) -> None:
        """Once nobody else answers, and all records of who did are here, tell the new worker which battles are old."""
        if len(self.members) != 1:
            return
        (member,) = self.members
        waits = member.finishing is not None and not member.begun and member.digest == _digest(self._wanted)
        if waits and member.phase in (Phase.JOINING, Phase.SERVING):
            marks, send = self._battles.marks(), member.child.channel.send
            parts = [marks[first : first + MARKS_PER_MESSAGE] for first in range(0, len(marks), MARKS_PER_MESSAGE)]
            member.begun = all(send(OldBattles(part)) for part in parts) and send(Begin())

    def _heard(self, member: Member, message: FromWorker, now: float) -> None:
        match message:
            case Records():
                for record in message.served:
                    self._battles.hear(mark_of(record, now))
                self._on_records(message)
            case Beat():
                member.beat_at = now
                if not message.finishing:
                    member.finishing = None
                self._on_beat(message)
            case Loaded():
                self._loaded(member, message, now)
            case Joined():
                self._joined(member, now)
            case Disconnected():
                member.connected = False
            case LoadFailed():
                member.failure = message

    def _loaded(self, member: Member, message: Loaded, now: float) -> None:
        log.info("worker %d loaded in %.0f ms", member.child.pid, message.load_ms)
        self.runtime = message.runtime
        member.beat_at = now
        if message.failure:
            log.warning("battles are not finished with the model they began with: %s", message.failure)
            member.finishing = None
        if member.phase is Phase.LOADING:
            member.enter(Phase.JOINING, now)
            self._begin_if_alone()  # before it hears the first state
            member.child.channel.send(Join())

    def _joined(self, member: Member, now: float) -> None:
        member.connected = True
        if member.phase is not Phase.JOINING:
            return
        if member.digest != _digest(self._wanted):
            if member.model is None and self._unloadable:
                member.enter(Phase.SERVING, now)
            return
        self._unloadable = False
        member.enter(Phase.SERVING, now)
        for other in list(self.members):
            if other is not member:
                self._dismiss(other, now)

    def _dismiss(self, member: Member, now: float) -> None:
        if member.phase is Phase.LEAVING:
            return
        if member.phase is Phase.LOADING:
            member.child.kill()
            self.members.remove(member)
            return
        member.enter(Phase.LEAVING, now)
        member.child.channel.send(Leave())

    def _dismiss_unwanted(self, now: float) -> None:
        """Whoever is on the way with a model that is no longer wanted need not come."""
        for member in list(self.members):
            stands_in = self._unloadable and member.model is None
            incoming = member.phase in (Phase.LOADING, Phase.JOINING)
            if incoming and member.digest != _digest(self._wanted) and not stands_in:
                self._dismiss(member, now)

    def _check(self, member: Member, now: float) -> None:
        limits = {Phase.LOADING: LOAD_LIMIT_S, Phase.LEAVING: LEAVE_LIMIT_S}
        stuck = member.phase in limits and now - member.since > limits[member.phase]
        hung = member.phase in (Phase.JOINING, Phase.SERVING) and now - member.beat_at > BEAT_LIMIT_S
        if stuck or hung:
            log.error("worker %d gives no sign while %s; killing it", member.child.pid, member.phase.value)
            member.child.process.kill()
            self._ended(member, now, blame=member.connected or stuck)
        elif member.child.channel.closed:
            self._ended(member, now)

    def _ended(self, member: Member, now: float, *, blame: bool = True) -> None:
        """Replace a worker; one that only hangs in finding the broker says nothing about its model."""
        member.child.kill()
        self.members.remove(member)
        if member.phase is Phase.LEAVING or self._stopping:
            return
        failure = member.failure
        self._unloadable |= failure is not None
        self._at_battle_end &= failure is not None or member.finishing is None
        self._pause(now)
        if blame:
            how = f"it cannot load its model: {failure.text}" if failure else member.child.how_it_ended()
            self._on_death(Death(member.digest, how, failure is not None and failure.reason in LOST_MODEL), now)

    def _pause(self, now: float) -> None:
        self._deaths = 1 if now - self._died_at > FORGET_DEATHS_S else self._deaths + 1
        self._died_at = now
        pause_s = 0.0 if self._deaths == 1 else min(FIRST_PAUSE_S * 2 ** (self._deaths - 2), LAST_PAUSE_S)
        self._resume_at = now + pause_s


def _digest(model: ModelFile | None) -> str | None:
    return model.digest if model else None
