"""The host at a glance, read from its state folder; the daemon need not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from protocol.lock import is_running
from trainer_host.database import Database
from trainer_host.repository import Repository
from trainer_host.settings import PROGRAM, Settings
from trainer_host.store import Record, SlotTotal, Store


class Overview(Struct, frozen=True, kw_only=True):
    """What `trainer-host status` shows.

    Attributes:
        running: Whether a daemon works on the state folder.
        state_dir: That folder.
        devices: How many were seen.
        online: How many are there now, as far as the daemon heard.
        quarantined: How much is set aside, by reason.
        totals: Transitions by slot.
        released: Newest released version by slot.
        battles: How they ended, by slot and version.
    """

    running: bool
    state_dir: str
    devices: int
    online: int
    quarantined: dict[str, int]
    totals: list[SlotTotal]
    released: dict[str, int]
    battles: list[Record]


def read(settings: Settings) -> Overview:
    """Read it.

    Raises:
        Misconfigured: There is no usable database or repository.
        Unavailable: The database does not answer.
    """
    repository = Repository(settings.repository_dir)
    releases = repository.releases() if repository.exists else []
    database = Database(settings.database)
    try:
        store = Store(database)
        devices = store.devices()
        return Overview(
            running=is_running(Path(settings.state_dir), PROGRAM),
            state_dir=settings.state_dir,
            devices=len(devices),
            online=sum(device.online is True for device in devices),
            quarantined=dict(store.quarantined()),
            totals=store.totals(),
            released={release.slot: release.version for release in releases},
            battles=store.statistics(),
        )
    finally:
        database.close()


def facts(overview: Overview) -> list[dict[str, Any]]:
    """The first table, for people."""
    aside = ", ".join(f"{count} {reason}" for reason, count in overview.quarantined.items()) or "nothing"
    return [
        {"": "daemon", "is": "running" if overview.running else "not running"},
        {"": "state", "is": overview.state_dir},
        {"": "devices", "is": f"{overview.devices}, {overview.online} of them online"},
        {"": "set aside", "is": aside},
    ]


def slot_rows(overview: Overview) -> list[dict[str, Any]]:
    """The second: transitions and releases by slot."""
    totals = {total.slot: total for total in overview.totals}
    return [
        {
            "slot": slot,
            "released": overview.released.get(slot, ""),
            "transitions": totals[slot].transitions if slot in totals else 0,
            "new since training": totals[slot].new if slot in totals else 0,
        }
        for slot in sorted({*totals, *overview.released})
    ]


def battle_rows(overview: Overview) -> list[dict[str, Any]]:
    """The third: how battles ended."""
    return [
        {
            "slot": record.slot,
            "chosen by": "a human or a script" if record.version is None else f"version {record.version}",
            "battles": record.battles,
            "won": f"{record.wins / record.battles:.1%}",
        }
        for record in overview.battles
    ]
