"""Every model there ever was: where it comes from, what the gate said, what became of it.

It is a record, not a source of truth: what is released is what the signed repository says.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from protocol.release import Lineage, Release
from trainer_host import database as tables
from trainer_host.database import Database


class ModelState(StrEnum):
    """How far a model came."""

    TRAINED = "trained"  # or delivered: it waits for the gate
    REFUSED = "refused"
    WAITING = "waiting"  # for signatures of keys that are elsewhere
    RELEASED = "released"
    FAILED = "failed"  # not by its own fault: it may be tried again, as another entry


class Model(Struct, frozen=True, kw_only=True):
    """One attempt at a model; the same bytes may come twice.

    Attributes:
        slot: Which it is for.
        digest: SHA-256 of the file.
        path: Where the job left the file; released models also lie in the repository.
        bytes: Of the file.
        origin: `trained`, or `delivered` for a file that was made elsewhere.
        created_at: Seconds since the epoch.
        state: How far it came.
        version: That it was released as.
        notes: For people.
        lineage: Where it comes from, metrics included.
        gate: What the gate reported (`trainer_host.gate.GateReport`), or `None` before it did.
        reason: Why it was refused, or came to nothing.
        id: Its number here.
    """

    slot: str
    digest: str
    path: str
    bytes: int
    origin: str
    created_at: float
    state: ModelState = ModelState.TRAINED
    version: int | None = None
    notes: str = ""
    lineage: Lineage = Lineage()
    gate: dict[str, Any] | None = None
    reason: str = ""
    id: int = 0


class Registry:
    """The table of models. Every method raises `Unavailable` when the database fails."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, model: Model) -> int:
        """Enter a model. Returns its number."""
        values: dict[str, Any] = msgspec.to_builtins(model)
        del values["id"]
        with self._database.writing() as connection:
            key = connection.execute(tables.models.insert(), values).inserted_primary_key
        assert key is not None, "one row was inserted"
        number: int = key[0]
        return number

    def released(self, number: int, version: int, gate: dict[str, Any] | None) -> None:
        """Note that a model was released."""
        self._settle(number, state=ModelState.RELEASED, version=version, gate=gate)

    def waiting(self, number: int, gate: dict[str, Any] | None, reason: str) -> None:
        """Note that a model's release waits for signatures."""
        self._settle(number, state=ModelState.WAITING, gate=gate, reason=reason)

    def signed(self, releases: Iterable[Release]) -> None:
        """Note which models that waited for signatures are among these releases; others are as they were."""
        with self._database.writing() as connection:
            for release in releases:
                connection.execute(
                    sa.update(tables.models)
                    .where(
                        tables.models.c.slot == release.slot,
                        tables.models.c.digest == release.digest,
                        tables.models.c.state == ModelState.WAITING,
                    )
                    .values(state=ModelState.RELEASED, version=release.version, reason="")
                )

    def refused(self, number: int, reason: str, gate: dict[str, Any] | None = None) -> None:
        """Note that a model was refused."""
        self._settle(number, state=ModelState.REFUSED, reason=reason, gate=gate)

    def failed(self, number: int, reason: str) -> None:
        """Note that something else kept a model from the gate or from its release."""
        self._settle(number, state=ModelState.FAILED, reason=reason)

    def models(self, limit: int = 100, slot: str | None = None) -> list[Model]:
        """The newest models, the newest last."""
        query = sa.select(tables.models).order_by(tables.models.c.id.desc()).limit(limit)
        if slot is not None:
            query = query.where(tables.models.c.slot == slot)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        names = [str(column.name) for column in tables.models.columns]
        return [msgspec.convert(dict(zip(names, row, strict=True)), Model) for row in reversed(rows)]

    def _settle(self, number: int, **values: Any) -> None:
        with self._database.writing() as connection:
            connection.execute(sa.update(tables.models).where(tables.models.c.id == number).values(**values))
