"""What takes long, and what of it comes next: fresh signatures, then files from the inbox, then training.

One thing at a time, on a workbench, so the host's loop never waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import NamedTuple

from protocol.errors import EdgeswapError, Rejected, Unavailable
from protocol.link import HasFileno
from trainer_host.inbox import Inbox, read_description
from trainer_host.publisher import Outcome
from trainer_host.recipes.recipe import Recipe
from trainer_host.settings import AutoPublishSettings
from trainer_host.store import SlotTotal
from trainer_host.wiring import Parts
from trainer_host.workbench import Workbench

log = logging.getLogger(__name__)

REFRESHES_PER_LIFETIME = 8
RETRY_S = 60.0
MAX_RETRY_S = 3600.0
RECIPES_LOOK_S = 1.0
DAY_S = 86_400.0

Work = Callable[[], Outcome | None]


class Task(NamedTuple):
    """One item.

    Attributes:
        doing: For people.
        work: Returns what became of a model, where it is about one.
        delivery: The inbox's name of the model, where it came from there.
    """

    doing: str
    work: Work
    delivery: str | None = None


def is_due(settings: AutoPublishSettings, total: SlotTotal, idle_s: float | None) -> bool:
    """Whether a recipe is to be trained. Pure.

    Args:
        settings: When it is.
        total: What its slot has.
        idle_s: Seconds since it was last trained; `None` if it was not since the host started.
    """
    rested = idle_s is None or idle_s >= settings.min_seconds
    return settings.enabled and rested and total.new >= settings.min_new_transitions


class Delay(NamedTuple):
    """How long a file of the inbox is left alone, after something else than the file failed."""

    until: float
    length_s: float


class Agenda:
    """Decides what is worked on, and sees to its end.

    Args:
        parts: What it works with.
        stop: The event that the parts' running job heeds.
    """

    def __init__(self, parts: Parts, stop: Event) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._stop = stop
        self._workbench: Workbench[Outcome | None] = Workbench()
        self._task: Task | None = None
        self._delays: dict[str, Delay] = {}
        self._trained_at: dict[str, float] = {}
        self._refresh_at = self._recipes_at = 0.0
        self._inbox: Inbox | None = None
        if parts.can_release and self._settings.inbox.enabled:
            self._inbox = Inbox(Path(self._settings.inbox.folder), self._settings.inbox.settle_seconds)
            self._inbox.start()

    @property
    def doing(self) -> str:
        """What is being worked on, for people; empty if nothing is."""
        return self._task.doing if self._task else ""

    def wakers(self) -> list[HasFileno]:
        """What becomes readable when there is something to do: give it to `woken`."""
        return [self._workbench] if self._inbox is None else [self._workbench, self._inbox]

    def woken(self, waker: HasFileno, now: float) -> bool:
        """Deal with a readable waker. An exception that is not one of ours passes through.

        Returns:
            Whether there may be new metadata.
        """
        if waker is self._workbench:
            return self._ended(now)
        assert self._inbox is not None, "there are two wakers at most"
        self._inbox.changed()
        return False

    def tick(self, now: float) -> None:
        """Begin the next task, if there is one and nothing else is being worked on."""
        if self._task is None and (task := self._next(now)) is not None:
            self._task = task
            self._workbench.start(task.work)

    def close(self) -> None:
        """End what is being worked on."""
        self._stop.set()
        self._workbench.close()
        if self._inbox is not None:
            self._inbox.close()

    def _next(self, now: float) -> Task | None:
        if now >= self._refresh_at:
            self._refresh_at = now + self._settings.lifetimes.timestamp_days * DAY_S / REFRESHES_PER_LIFETIME
            return Task("signing the timestamp", self._refresh)
        if not self._parts.can_release:
            return None
        return self._next_delivery(now) or self._next_training(now)

    def _next_delivery(self, now: float) -> Task | None:
        if self._inbox is None:
            return None
        waiting = [
            name for name in self._inbox.ready(now) if name not in self._delays or now >= self._delays[name].until
        ]
        return self._examination(self._inbox, waiting[0]) if waiting else None

    def _examination(self, inbox: Inbox, name: str) -> Task:
        def work() -> Outcome:
            return self._parts.publisher.deliver(inbox.model(name), read_description(inbox.description(name)))

        return Task(f"examining {name}", work, delivery=name)

    def _next_training(self, now: float) -> Task | None:
        if now < self._recipes_at:
            return None
        self._recipes_at = now + RECIPES_LOOK_S
        for name in self._settings.auto_publish.recipes:
            recipe = self._settings.recipe(name)
            try:
                total = self._parts.store.total(recipe.slot)
            except Unavailable as error:
                log.warning("cannot count transitions: %s", error)
                return None
            last = self._trained_at.get(name)
            if is_due(self._settings.auto_publish, total, None if last is None else now - last):
                self._trained_at[name] = now
                return self._training(recipe)
        return None

    def _training(self, recipe: Recipe) -> Task:
        def work() -> Outcome:
            return self._parts.trainer.train(recipe, notes="trained by the running host")

        return Task(f"training {recipe.name}", work)

    def _refresh(self) -> None:
        self._parts.repository.refresh(datetime.now(UTC))

    def _ended(self, now: float) -> bool:
        task, self._task = self._task, None
        assert task is not None, "the workbench had something to do"
        refusal = None
        try:
            outcome = self._workbench.result()
        except EdgeswapError as error:
            log.warning("%s came to nothing: %s", task.doing, error)
            if task.work == self._refresh:
                self._refresh_at = now + RETRY_S
            if task.delivery is not None and not isinstance(error, Rejected):
                self._delay(task.delivery, now)
                return False
            refusal = str(error)
        else:
            if outcome is not None and not outcome.released:
                refusal = outcome.text
        if task.delivery is not None and self._inbox is not None:
            self._put_away(self._inbox, task.delivery, refusal, now)
        return True

    def _delay(self, name: str, now: float) -> None:
        """Leave a file in the inbox for a while, each time for twice as long."""
        length_s = min(2 * self._delays[name].length_s, MAX_RETRY_S) if name in self._delays else RETRY_S
        if self._inbox is not None:  # who takes a file away need not tell
            self._delays = {other: kept for other, kept in self._delays.items() if self._inbox.model(other).exists()}
        self._delays[name] = Delay(now + length_s, length_s)
        log.warning("%s stays in the inbox and is tried again in %.0f s", name, length_s)

    def _put_away(self, inbox: Inbox, name: str, refusal: str | None, now: float) -> None:
        try:
            path = inbox.put_away(name, refusal)
        except Unavailable as error:
            log.warning("%s", error)
            self._delay(name, now)
            return
        self._delays.pop(name, None)
        log.info("%s is now %s%s", name, path, f": {refusal}" if refusal else "")
