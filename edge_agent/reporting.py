"""What the device says of itself: telemetry, status, events, availability."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

import msgspec

from edge_agent.trail import Trail
from protocol import topics
from protocol.codec import encode
from protocol.errors import Unavailable
from protocol.link import Link
from protocol.messages import Event, Status, Telemetry

log = logging.getLogger(__name__)

STATUS_S = 60.0
MAX_UNSENT_EVENTS = 1000
ONLINE = b"online"
OFFLINE = b"offline"


class Reporting:
    """Publishes the device's reports, and keeps the audit trail on disk.

    Args:
        device: This device's name.
        trail: Where events are kept.
        status_file: Where the status is also written, for `edge-agent status` on this machine.
    """

    def __init__(self, device: str, trail: Trail, status_file: Path) -> None:
        self._device = device
        self._trail = trail
        self._status_file = status_file
        self._unsent: deque[Event] = deque(maxlen=MAX_UNSENT_EVENTS)
        self._said: Status | None = None
        self._status_due = 0.0

    def event(self, event: Event) -> None:
        """Log an event, keep it, and publish it as soon as there is a connection."""
        fields = {"SLOT": event.slot, "MODEL": event.model, "VERDICT": event.verdict.outcome if event.verdict else ""}
        extra = {name: value for name, value in fields.items() if value}
        log.info("%s: %s", event.kind, event.text or event.reason, extra=extra)
        try:
            self._trail.add(event)
        except Unavailable as error:
            log.error("the audit trail on this disk misses an event: %s", error)
        self._unsent.append(event)

    def telemetry(self, link: Link, telemetry: Telemetry) -> None:
        """Publish telemetry; without a connection it is not kept, the next one will be fresher."""
        if link.connected:
            link.publish(topics.fleet(self._device, "telemetry"), encode(telemetry, as_json=True))

    def tick(self, link: Link, status: Status, now: float) -> None:
        """Publish events that wait, and the status when it has changed or is old."""
        while link.connected and self._unsent:
            link.publish(topics.fleet(self._device, "events"), encode(self._unsent[0], as_json=True), qos=1)
            self._unsent.popleft()
        if self._said is None or _without_time(status) != _without_time(self._said) or now >= self._status_due:
            self._said = status
            self._status_due = now + STATUS_S
            payload = encode(status, as_json=True)
            self._write(payload)
            if link.connected:
                link.publish(topics.fleet(self._device, "status"), payload, qos=1, retain=True)

    def connected(self, link: Link) -> None:
        """Say that the device is here."""
        link.publish(topics.fleet(self._device, "availability"), ONLINE, qos=1, retain=True)
        self._status_due = 0.0

    def leaving(self, link: Link) -> None:
        """Say that the device goes on purpose."""
        try:
            self._status_file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot remove %s: %s", self._status_file, error)
        if link.connected:
            link.publish(topics.fleet(self._device, "availability"), OFFLINE, qos=1, retain=True)

    def _write(self, payload: bytes) -> None:
        """The runtime folder is memory on a Pi: this wears no card, and needs no fsync."""
        fresh = self._status_file.with_suffix(".new")
        try:
            fresh.write_bytes(payload)
            fresh.replace(self._status_file)
        except OSError as error:
            log.warning("cannot write %s: %s", self._status_file, error)


def _without_time(status: Status) -> Status:
    return msgspec.structs.replace(status, at=0.0)
