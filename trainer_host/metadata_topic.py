"""The retained metadata set on the broker, kept as the repository has it."""

from __future__ import annotations

import logging
import os
import time
from typing import Protocol

from protocol import topics
from protocol.errors import Misconfigured, Unavailable
from protocol.link import Broker, Link

log = logging.getLogger(__name__)

LOOK_S = 5.0
REPAIR_S = 10.0


class Source(Protocol):
    """Where the set comes from: a `trainer_host.repository.Repository`."""

    def metadata_set(self) -> bytes:
        """The payload.

        Raises:
            Misconfigured: It is damaged, or not there.
            Unavailable: It cannot be read now.
        """


class MetadataTopic:
    """Publishes the signed metadata set, and again when the broker holds another one.

    Args:
        source: What it is to hold; read again every few seconds, since other processes release models too.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._current = b""  # nothing was read yet; an empty retained message would delete the broker's
        self._trouble = ""
        self._held: bytes | None = None
        self._look_at = 0.0
        self._published_at = -REPAIR_S
        self._unpublished = True

    def changed(self) -> None:
        """There may be something new, or nobody knows what the broker has: look and publish at the next tick."""
        self._look_at = 0.0
        self._unpublished = True

    def heard(self, payload: bytes) -> None:
        """The broker has this set: ours, an older one of ours, or somebody else's."""
        self._held = payload
        if payload != self._current:  # a command of ours may have signed it since the last look
            self._look_at = 0.0

    def tick(self, link: Link, now: float) -> None:
        """Look into the repository, and publish what is new or was replaced."""
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look()
        foreign = self._held is not None and self._held != self._current
        repair = foreign and now - self._published_at >= REPAIR_S
        if self._current and link.connected and (self._unpublished or repair):
            if repair and not self._unpublished:
                log.warning("the broker held a metadata set that is not this host's; publishing ours again")
            link.publish(topics.METADATA, self._current, qos=1, retain=True)
            self._published_at = now
            self._unpublished, self._held = False, None

    def _look(self) -> None:
        """Read the set; what cannot be read now is told once, and looked at again."""
        try:
            payload = self._source.metadata_set()
        except (Misconfigured, Unavailable) as error:
            if str(error) != self._trouble:
                log.warning("cannot read the metadata set, looking again: %s", error)
            self._trouble = str(error)
            return
        self._trouble = ""
        self._unpublished |= payload != self._current
        self._current = payload


def publish_once(broker: Broker, client_id: str, payload: bytes, timeout_s: float = 10.0) -> None:
    """Put a metadata set on the broker over a connection of its own, and wait until the broker has it.

    Raises:
        Unavailable: The broker did not take it within `timeout_s` seconds.
        Misconfigured: As `Link`.
    """
    taken: list[int] = []
    link = Link(broker, f"{client_id}-{os.getpid()}", on_message=lambda _: None, on_published=taken.append)
    deadline = time.monotonic() + timeout_s
    sent = False
    try:
        while not taken:
            if time.monotonic() > deadline:
                reason = f": {link.refusal}" if link.refusal else ""
                raise Unavailable(f"the broker at {broker.url} did not take the metadata{reason}")
            link.turn(0.1)
            if link.connected and not sent:
                link.publish(topics.METADATA, payload, qos=1, retain=True)
                sent = True
    finally:
        link.close()
