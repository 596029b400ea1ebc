"""What devices say of themselves, on its way to the store.

Messages are collected and committed together. When the database fails they are kept for the next attempt, within
bounds: of telemetry the newest of each device, of events the newest `MAX_WAITING`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from protocol import topics
from protocol.codec import Decoder
from protocol.errors import Rejected
from protocol.messages import Event, SlotStatus, Status, Telemetry
from trainer_host.store import DeviceRow, Sighting, Store

log = logging.getLogger(__name__)

TOPICS = tuple((topics.fleet("+", what), 1) for what in ("availability", "telemetry", "status", "events"))
MAX_WAITING = 10_000
MAX_DEVICES = 50_000

_statuses: Decoder[Status] = Decoder(Status)
_telemetries: Decoder[Telemetry] = Decoder(Telemetry)
_events: Decoder[Event] = Decoder(Event)


class Fleet:
    """Collects reports and commits them.

    Args:
        store: Where they go.

    Attributes:
        online: Devices that are there now.
        ignored: How many messages could not be read, by reason.
        dropped: How many had no room to wait for the database.
    """

    def __init__(self, store: Store) -> None:
        self.online: set[str] = set()
        self.ignored: Counter[str] = Counter()
        self.dropped = 0
        self._store = store
        self._sightings: dict[str, Sighting] = {}
        self._telemetry: deque[tuple[str, float, Telemetry]] = deque()
        self._events: deque[tuple[str, float, Event]] = deque()

    def receive(self, topic: str, payload: bytes, now: float) -> None:
        """Take a message on one of `TOPICS`, at `now` seconds since the epoch."""
        device, what = topics.fleet_device(topic)
        try:
            topics.checked_name(device, "device")
            self._take(device, what, payload, now)
        except Rejected as error:
            self.ignored[error.code] += 1
            log.warning("cannot read the %s of %s: %s", what, device, error)

    def commit(self) -> None:
        """Commit what was received.

        Raises:
            Unavailable: The database failed. What was received waits for the next call.
        """
        if not self._sightings:
            return
        self._store.add_reports(self._sightings, self._telemetry, self._events)
        self._sightings.clear()
        self._telemetry.clear()
        self._events.clear()

    def _take(self, device: str, what: str, payload: bytes, now: float) -> None:
        sighting = self._sightings.get(device, Sighting(now))._replace(seen_at=now)
        if what == "availability":
            sighting = sighting._replace(online=self._heard_of(device, payload))
        elif what == "status":
            sighting = sighting._replace(status=_statuses.decode(payload))
        elif what == "telemetry":
            sighting = sighting._replace(telemetry=_telemetries.decode(payload))
            self._wait(self._telemetry, (device, now, sighting.telemetry))
        else:
            self._wait(self._events, (device, now, self._logged(device, _events.decode(payload))))
        if device in self._sightings or len(self._sightings) < MAX_DEVICES:
            self._sightings[device] = sighting
        else:
            self.dropped += 1

    def _heard_of(self, device: str, payload: bytes) -> bool:
        if payload not in (b"online", b"offline"):
            raise Rejected("malformed", f"availability is {payload[:20]!r}, neither online nor offline")
        online = payload == b"online"
        (self.online.add if online else self.online.discard)(device)
        return online

    def _logged(self, device: str, event: Event) -> Event:
        fields = {"SLOT": event.slot, "MODEL": event.model, "VERDICT": event.verdict.outcome if event.verdict else ""}
        extra = {name: value for name, value in fields.items() if value}
        log.info("%s: %s: %s", device, event.kind, event.text or event.reason, extra=extra)
        return event

    def _wait(self, waiting: deque[Any], item: object) -> None:
        if len(waiting) >= MAX_WAITING:
            waiting.popleft()
            self.dropped += 1
        waiting.append(item)


def table(devices: Sequence[DeviceRow], now: float) -> list[dict[str, Any]]:
    """One row for each device and slot, for people; a device without slots has one row.

    Args:
        devices: As stored.
        now: Seconds since the epoch.
    """
    rows = []
    for device in devices:
        slots: dict[str, SlotStatus | None] = dict(device.status.slots) if device.status else {}
        rows += [_table_row(device, name, slot, now) for name, slot in (slots or {"": None}).items()]
    return rows


def serving(devices: Iterable[DeviceRow]) -> Counter[tuple[str, int]]:
    """How many devices serve each version, by slot and version, as they last said."""
    return Counter(
        (name, slot.active.version)
        for device in devices
        if device.status
        for name, slot in device.status.slots.items()
        if slot.active
    )


def details(devices: Sequence[DeviceRow]) -> list[dict[str, Any]]:
    """Everything that is known of each device, for programs."""
    return [msgspec.to_builtins(device._asdict()) for device in devices]


def _table_row(device: DeviceRow, name: str, slot: SlotStatus | None, now: float) -> dict[str, Any]:
    telemetry = device.telemetry
    counters = telemetry.slots.get(name) if telemetry else None
    return {
        "device": device.device,
        "online": {True: "yes", False: "no", None: "?"}[device.online],
        "seen": f"{max(now - device.seen_at, 0.0):.0f} s ago",
        "groups": ", ".join(device.status.groups) if device.status else "",
        "slot": name,
        "phase": slot.phase if slot else "",
        "active": f"{slot.active.version} ({slot.active.digest[:8]})" if slot and slot.active else "",
        "pinned": slot.pinned if slot and slot.pinned is not None else "",
        "candidate": f"{slot.candidate.version}" if slot and slot.candidate else "",
        "last verdict": slot.verdict.outcome if slot and slot.verdict else "",
        "last refusal": (slot.refusal or "").partition(":")[0] if slot else "",
        "p50 / p99 µs": f"{_whole(counters.latency_us_p50)} / {_whole(counters.latency_us_p99)}" if counters else "",
        "°C": f"{max(telemetry.temperatures_c.values()):.0f}" if telemetry and telemetry.temperatures_c else "",
        "throttled": ", ".join(telemetry.throttled or ()) if telemetry else "",
    }


def _whole(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"
