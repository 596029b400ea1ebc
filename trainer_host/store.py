"""What devices sent, kept: transitions, telemetry, status, events.

Transitions are committed in groups, and acknowledged after the commit. The insert is idempotent twice over: numbers
that an earlier batch has spoken for are left out, and the primary key ignores those that are there nonetheless.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from protocol.messages import Ack, Event, Status, Telemetry, Transition, TransitionBatch
from trainer_host import database as tables
from trainer_host.database import Database
from trainer_host.ranges import Range, contiguous, covers, joined

MAX_QUARANTINED = 1_000
OUTCOMES = ("committed", "pinned", "refused", "rolled_back")


class _Versioned(Struct):
    """What `Store.outcomes` needs of an event."""

    version: int | None = None


_encoder = msgspec.msgpack.Encoder()
_versioned = msgspec.msgpack.Decoder(_Versioned)
# Of the table's columns, all but device and epoch before them and received_at after them.
_values = attrgetter(*(column.name for column in list(tables.transitions.columns)[2:-1]))


class SetAside(NamedTuple):
    """Something that could not be stored as what it claims to be.

    Attributes:
        device: Who sent it.
        reason: A word for programs.
        text: A sentence for people.
        payload: The bytes.
    """

    device: str
    reason: str
    text: str
    payload: bytes


class Delivery(NamedTuple):
    """A batch, and those of its transitions that are unfit and stand in for their numbers only."""

    device: str
    batch: TransitionBatch
    unfit: tuple[SetAside, ...] = ()


class Answer(NamedTuple):
    """What to acknowledge to whom."""

    device: str
    ack: Ack


class DeviceRow(NamedTuple):
    """What is known of a device.

    Attributes:
        device: Its name.
        seen_at: When it last said anything, by the host's clock.
        online: As it said itself, or the broker for it; `None` before either.
        status: Its last status.
        telemetry: Its last telemetry.
    """

    device: str
    seen_at: float
    online: bool | None
    status: Status | None
    telemetry: Telemetry | None


class EventRow(NamedTuple):
    """An event, and who sent it."""

    device: str
    event: Event


Outcomes: TypeAlias = Mapping[tuple[str, int], Mapping[str, int]]
"""By slot and version, and by kind of event (`OUTCOMES`): how many devices reported it, each counted once."""


class Sighting(NamedTuple):
    """What a device has said lately; `None` leaves what is stored.

    Attributes:
        seen_at: By the host's clock.
    """

    seen_at: float
    online: bool | None = None
    status: Status | None = None
    telemetry: Telemetry | None = None


class Record(NamedTuple):
    """How battles ended that one version decided.

    Attributes:
        slot: Which slot.
        version: Of the model that answered last; `None` for battles in which a human or a script chose.
        battles: How many ended.
        wins: How many of them with a last reward above zero.
    """

    slot: str
    version: int | None
    battles: int
    wins: int


class SlotTotal(NamedTuple):
    """How many transitions a slot has, and how many of them arrived since it was last trained."""

    slot: str
    transitions: int
    new: int


class Store:
    """The store.

    Args:
        database: Where it is kept. Every method raises `Unavailable` when it fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._new_transitions = database.new_rows(tables.transitions)

    def add_batch(self, device: str, batch: TransitionBatch, now: float = 0.0) -> int:
        """Commit one batch. Returns the number to acknowledge."""
        (answer,) = self.add_batches([Delivery(device, batch)], now)
        return answer.ack.seq

    def add_batches(self, deliveries: Sequence[Delivery], now: float) -> list[Answer]:
        """Commit batches, all or none.

        Args:
            deliveries: As they came; each speaks for at least one number.
            now: Seconds since the epoch.

        Returns:
            For each outbox among them, up to which number everything is committed.
        """
        by_stream: dict[tuple[str, str], list[Delivery]] = {}
        for delivery in deliveries:
            by_stream.setdefault((delivery.device, delivery.batch.epoch), []).append(delivery)
        rows: list[tuple[Any, ...]] = []
        new: Counter[str] = Counter()
        unfit: list[SetAside] = []
        answers = []
        with self._database.writing() as connection:
            for (device, epoch), group in by_stream.items():
                known = self._stream(connection, device, epoch)
                floor, ranges = known
                for _, batch, set_aside in group:
                    if not _knows(ranges, batch.first, batch.last):
                        fresh = [each for each in batch.transitions if not covers(ranges, each.seq)]
                        rows += [(device, epoch, *_values(each), now) for each in fresh]
                        new.update(each.slot for each in fresh)
                        unfit += set_aside
                    floor = max(floor, batch.acked)
                    ranges = joined(ranges, batch.first, batch.last)
                if (floor, ranges) != known:
                    self._remember(connection, device, epoch, floor, ranges)
                answers.append(Answer(device, Ack(epoch=epoch, seq=contiguous(ranges, floor))))
            if rows:
                self._new_transitions.add(connection, rows)
                self._count(connection, new)
            self._set_aside(connection, unfit, now)
        return answers

    def set_aside(self, items: Sequence[SetAside], now: float) -> None:
        """Keep what could not be read, the newest `MAX_QUARANTINED` of it."""
        with self._database.writing() as connection:
            self._set_aside(connection, items, now)

    def quarantined(self) -> Mapping[str, int]:
        """How much is set aside, by reason."""
        reason = tables.quarantine.c.reason
        with self._database.reading() as connection:
            found = connection.execute(sa.select(reason, sa.func.count()).group_by(reason))
            return {row[0]: row[1] for row in found}

    # Slots.

    def totals(self) -> list[SlotTotal]:
        """Of every slot that has transitions."""
        columns = tables.slots.c
        query = sa.select(
            columns.slot, columns.transitions, columns.transitions - columns.trained_transitions
        ).order_by(columns.slot)
        with self._database.reading() as connection:
            return [SlotTotal(*row) for row in connection.execute(query)]

    def total(self, slot: str) -> SlotTotal:
        """Of one slot."""
        return next((total for total in self.totals() if total.slot == slot), SlotTotal(slot, 0, 0))

    def trained(self, slot: str, transitions: int) -> None:
        """Note that a slot was trained when it had so many transitions."""
        change = sa.update(tables.slots).where(tables.slots.c.slot == slot).values(trained_transitions=transitions)
        with self._database.writing() as connection:
            connection.execute(change)

    def training_rows(self, slot: str, limit: int) -> list[sa.Row[Any]]:
        """The slot's newest transitions, in the order of the fields of `trainer_host.dataset.Transitions`."""
        columns = tables.transitions.c
        query = (
            sa.select(
                columns.slot,
                (columns.device + "/" + columns.battle).label("battle"),
                columns.actor,
                columns.step,
                columns.features,
                columns.action,
                columns.taken,
                columns.propensity,
                columns.legal,
                columns.reward,
                columns.done,
                columns.truncated,
                columns.model,
                columns.at,
            )
            .where(columns.slot == slot)
            .order_by(columns.received_at.desc(), columns.device, columns.epoch, columns.seq.desc())
            .limit(limit)
        )
        with self._database.reading() as connection:
            return list(connection.execute(query))

    def statistics(self) -> list[Record]:
        """How battles ended, by slot and version. Reads every battle's last transitions."""
        columns = tables.transitions.c
        human = sa.func.max(sa.cast(columns.taken, sa.Integer)) == 1
        battles = (
            sa.select(
                columns.slot,
                sa.case((human, sa.null()), else_=sa.func.max(columns.version)).label("version"),
                sa.case((sa.func.max(columns.reward) > 0, 1), else_=0).label("won"),
            )
            .where(columns.done, sa.not_(columns.truncated))
            .group_by(columns.slot, columns.device, columns.epoch, columns.battle)
            .subquery()
        )
        query = sa.select(battles.c.slot, battles.c.version, sa.func.count(), sa.func.sum(battles.c.won)).group_by(
            battles.c.slot, battles.c.version
        )
        with self._database.reading() as connection:
            found = [
                Record(slot, version, count, int(wins)) for slot, version, count, wins in connection.execute(query)
            ]
        return sorted(found, key=lambda record: (record.slot, -1 if record.version is None else record.version))

    # Devices.

    def add_reports(
        self,
        sightings: Mapping[str, Sighting],
        telemetry: Sequence[tuple[str, float, Telemetry]],
        events: Sequence[tuple[str, float, Event]],
    ) -> None:
        """Commit what devices said of themselves: how each stands, and histories as (device, received at, message)."""
        with self._database.writing() as connection:
            for device, sighting in sightings.items():
                self._see(connection, device, sighting)
            if telemetry:
                connection.execute(
                    tables.telemetry.insert(),
                    [
                        {"device": device, "received_at": at, "telemetry": _encoder.encode(said)}
                        for device, at, said in telemetry
                    ],
                )
            if events:
                connection.execute(tables.events.insert(), [_event_row(*event) for event in events])

    def devices(self) -> list[DeviceRow]:
        """Every device that was ever seen."""
        with self._database.reading() as connection:
            found = connection.execute(sa.select(tables.devices).order_by(tables.devices.c.device))
            return [
                DeviceRow(
                    row.device,
                    row.seen_at,
                    row.online,
                    msgspec.msgpack.decode(row.status, type=Status) if row.status else None,
                    msgspec.msgpack.decode(row.telemetry, type=Telemetry) if row.telemetry else None,
                )
                for row in found
            ]

    def events(self, limit: int, device: str | None = None) -> list[EventRow]:
        """The newest events, the newest last."""
        query = sa.select(tables.events).order_by(tables.events.c.id.desc()).limit(limit)
        if device is not None:
            query = query.where(tables.events.c.device == device)
        with self._database.reading() as connection:
            found = list(connection.execute(query))
        return [EventRow(row.device, msgspec.msgpack.decode(row.event, type=Event)) for row in reversed(found)]

    def outcomes(self) -> Outcomes:
        """What devices did with each version, as far as events are kept. Reads every such event."""
        columns = tables.events.c
        query = sa.select(columns.device, columns.kind, columns.slot, columns.event).where(columns.kind.in_(OUTCOMES))
        devices: dict[tuple[str, int], dict[str, set[str]]] = {}
        with self._database.reading() as connection:
            for row in connection.execute(query):
                version = _versioned.decode(row.event).version
                if version is not None:
                    devices.setdefault((row.slot, version), {}).setdefault(row.kind, set()).add(row.device)
        return {
            version: {kind: len(kinds[kind]) for kind in OUTCOMES if kind in kinds}
            for version, kinds in devices.items()
        }

    def telemetry(self, device: str, limit: int) -> list[Telemetry]:
        """A device's newest telemetry, the newest last."""
        columns = tables.telemetry.c
        query = sa.select(columns.telemetry).where(columns.device == device).order_by(columns.id.desc()).limit(limit)
        with self._database.reading() as connection:
            found = list(connection.scalars(query))
        return [msgspec.msgpack.decode(said, type=Telemetry) for said in reversed(found)]

    def prune(self, *, telemetry_before: float, events_before: float) -> None:
        """Delete histories that were received earlier than that, in seconds since the epoch."""
        with self._database.writing() as connection:
            for table, before in ((tables.telemetry, telemetry_before), (tables.events, events_before)):
                connection.execute(sa.delete(table).where(table.c.received_at < before))

    def _stream(self, connection: sa.Connection, device: str, epoch: str) -> tuple[int, list[Range]]:
        columns = tables.streams.c
        query = sa.select(columns.floor, columns.ranges).where(columns.device == device, columns.epoch == epoch)
        found = connection.execute(query.with_for_update()).one_or_none()
        return (found.floor, [(first, last) for first, last in found.ranges]) if found else (0, [])

    def _remember(self, connection: sa.Connection, device: str, epoch: str, floor: int, ranges: list[Range]) -> None:
        insert = self._database.insert(tables.streams).values(device=device, epoch=epoch, floor=floor, ranges=ranges)
        connection.execute(
            insert.on_conflict_do_update(index_elements=["device", "epoch"], set_={"floor": floor, "ranges": ranges})
        )

    def _count(self, connection: sa.Connection, new: Counter[str]) -> None:
        insert = self._database.insert(tables.slots)
        counted = insert.on_conflict_do_update(
            index_elements=["slot"],
            set_={"transitions": tables.slots.c.transitions + insert.excluded.transitions},
        )
        connection.execute(
            counted, [{"slot": slot, "transitions": count, "trained_transitions": 0} for slot, count in new.items()]
        )

    def _set_aside(self, connection: sa.Connection, items: Sequence[SetAside], now: float) -> None:
        if not items:
            return
        connection.execute(tables.quarantine.insert(), [{**item._asdict(), "at": now} for item in items])
        number = tables.quarantine.c.id
        newest = connection.execute(sa.select(sa.func.max(number))).scalar_one()
        connection.execute(sa.delete(tables.quarantine).where(number <= newest - MAX_QUARANTINED))

    def _see(self, connection: sa.Connection, device: str, sighting: Sighting) -> None:
        said: dict[str, Any] = {"seen_at": sighting.seen_at}
        if sighting.online is not None:
            said["online"] = sighting.online
        if sighting.status is not None:
            said["status"] = _encoder.encode(sighting.status)
        if sighting.telemetry is not None:
            said["telemetry"] = _encoder.encode(sighting.telemetry)
        insert = self._database.insert(tables.devices).values(device=device, **said)
        connection.execute(insert.on_conflict_do_update(index_elements=["device"], set_=said))


def unfit(transition: Transition, batch: TransitionBatch) -> str | None:
    """Why a transition cannot be stored, as a word for programs, or `None`.

    Whether it is fit to learn from is another matter (`trainer_host.dataset.clean`).
    """
    numbers = (transition.seq, transition.step, transition.action, transition.version)
    if not all(0 <= number <= 2**53 for number in numbers):
        return "number_out_of_range"
    if not batch.first <= transition.seq <= batch.last:
        return "outside_its_batch"
    propensity = 0.0 if transition.propensity is None else transition.propensity
    if not all(map(math.isfinite, (transition.reward, transition.at, propensity))):
        return "not_finite"
    if any("\0" in text for text in (transition.slot, transition.battle, transition.actor, transition.model)):
        return "bad_name"  # PostgreSQL keeps no NUL in a text
    return None


def _knows(ranges: Sequence[Range], first: int, last: int) -> bool:
    return any(known[0] <= first and last <= known[1] for known in ranges)


def _event_row(device: str, received_at: float, event: Event) -> dict[str, Any]:
    return {
        "device": device,
        "received_at": received_at,
        "kind": event.kind,
        "slot": event.slot,
        "event": _encoder.encode(event),
    }
