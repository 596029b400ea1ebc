"""The host at a glance, read from its state folder; the daemon need not run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct

from protocol.lock import is_running
from trainer_host import keys
from trainer_host.database import Database
from trainer_host.repository import WARNING_SHARE, Repository
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
        signed_until: Of root and targets, seconds since the epoch; empty without a repository.
        renew: Those of them that a person must sign again soon, or should have.
    """

    running: bool
    state_dir: str
    devices: int
    online: int
    quarantined: dict[str, int]
    totals: list[SlotTotal]
    released: dict[str, int]
    battles: list[Record]
    signed_until: dict[str, float]
    renew: list[str]


def read(settings: Settings, now: datetime) -> Overview:
    """Read it.

    Args:
        settings: Whose state folder it is.
        now: Aware of its time zone.

    Raises:
        Misconfigured: There is no usable database or repository.
        Unavailable: The database does not answer.
    """
    repository = Repository(settings.repository_dir)
    releases = repository.releases() if repository.exists else []
    expiries = repository.expiries() if repository.exists else {}
    expiries = {role: expires for role, expires in expiries.items() if role in keys.OFFLINE_ROLES}
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
            signed_until={role: expires.timestamp() for role, expires in expiries.items()},
            renew=[
                role
                for role, expires in expiries.items()
                if expires - now < settings.lifetimes.of(role) * WARNING_SHARE
            ],
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
        *(
            {"": f"{role} signed until", "is": _signed_until(expires, renew=role in overview.renew, role=role)}
            for role, expires in overview.signed_until.items()
        ),
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


def _signed_until(expires: float, *, renew: bool, role: str) -> str:
    until = f"{datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M} UTC"
    return f"{until}: sign again now, with trainer-host keys renew {role}" if renew else until
