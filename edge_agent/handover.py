"""The workers of one slot: who serves, who is about to, who leaves.

Level-triggered: the owner says what should be served (`want`), and `tick` starts, joins, dismisses and replaces workers
until that is so. A swap is a handover: the new worker loads beside the old one, joins its shared subscription, and only
when the broker has confirmed that is the old one told to leave; it answers what it still has. A worker that dies is
replaced at once, one that dies again and again after a growing pause.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.children import (
    Beat,
    Child,
    Disconnected,
    FromWorker,
    Join,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    Records,
)
from protocol.errors import Unavailable

log = logging.getLogger(__name__)

LOAD_LIMIT_S = 120.0
BEAT_LIMIT_S = 6.0
LEAVE_LIMIT_S = 10.0
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 30.0
FORGET_DEATHS_S = 60.0


class Phase(enum.Enum):
    """Where a worker is in its life."""

    LOADING = "loading"
    JOINING = "joining"
    SERVING = "serving"
    LEAVING = "leaving"


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
        failure: Why it could not load its model.
    """

    child: Child[FromWorker]
    model: ModelFile | None
    phase: Phase
    since: float
    beat_at: float
    connected: bool = False
    failure: str = ""

    @property
    def digest(self) -> str | None:
        """Digest of its model."""
        return self.model.digest if self.model else None

    def enter(self, phase: Phase, now: float) -> None:
        """Go on to a phase of life."""
        self.phase, self.since = phase, now


class Handover:
    """Keeps one slot served.

    Args:
        start: Starts a worker with a model.
        on_records: Called with what was served.
        on_beat: Called with a serving loop's counts.
        on_death: Called with the model's digest, how its worker ended, and the time, for each that ended unasked.
    """

    def __init__(
        self,
        start: Callable[[ModelFile | None], Child[FromWorker]],
        *,
        on_records: Callable[[Records], None],
        on_beat: Callable[[Beat], None],
        on_death: Callable[[str | None, str, float], None],
    ) -> None:
        self._start = start
        self._on_records = on_records
        self._on_beat = on_beat
        self._on_death = on_death
        self._wanted: ModelFile | None = None
        self._stopping = False
        self._deaths = 0
        self._died_at = 0.0
        self._resume_at = 0.0
        self._unloadable = False
        self.members: list[Member] = []
        self.runtime = ""

    def want(self, model: ModelFile | None) -> None:
        """Say what should be served from now on."""
        if _digest(model) != _digest(self._wanted):
            self._deaths, self._resume_at, self._unloadable = 0, 0.0, False
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
        for member in list(self.members):
            self._check(member, now)
        if self._stopping:
            return
        self._dismiss_unwanted(now)
        staying = [member.digest for member in self.members if member.phase is not Phase.LEAVING]
        if _digest(self._wanted) not in staying and now >= self._resume_at:
            self._add(self._wanted, now)
        elif self._unloadable and not staying:
            self._add(None, now)  # it answers `no_model` until the wanted one can be loaded

    def _add(self, model: ModelFile | None, now: float) -> None:
        try:
            child = self._start(model)
        except Unavailable as error:
            log.error("cannot start a worker: %s", error)
            self._pause(now)
            return
        self.members.append(Member(child, model, Phase.LOADING, now, now))

    def _heard(self, member: Member, message: FromWorker, now: float) -> None:
        match message:
            case Records():
                self._on_records(message)
            case Beat():
                member.beat_at = now
                self._on_beat(message)
            case Loaded():
                log.info("worker %d loaded in %.0f ms", member.child.pid, message.load_ms)
                self.runtime = message.runtime
                member.beat_at = now
                if member.phase is Phase.LOADING:
                    member.enter(Phase.JOINING, now)
                    member.child.channel.send(Join())
            case Joined():
                self._joined(member, now)
            case Disconnected():
                member.connected = False
            case LoadFailed():
                member.failure = f"it cannot load its model: {message.text}"

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
        self._unloadable |= bool(member.failure)
        self._pause(now)
        if blame:
            self._on_death(member.digest, member.failure or member.child.how_it_ended(), now)

    def _pause(self, now: float) -> None:
        self._deaths = 1 if now - self._died_at > FORGET_DEATHS_S else self._deaths + 1
        self._died_at = now
        pause_s = 0.0 if self._deaths == 1 else min(FIRST_PAUSE_S * 2 ** (self._deaths - 2), LAST_PAUSE_S)
        self._resume_at = now + pause_s


def _digest(model: ModelFile | None) -> str | None:
    return model.digest if model else None
