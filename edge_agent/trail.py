"""The audit trail: what happened to the models on this device, in SQLite.

Nothing waits for it: while it cannot be written the device serves, judges and swaps as always. It is read by people
(`edge-agent history`), and where a slot's state was lost, to find out what was served and what was refused.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import msgspec

from edge_agent.database import Database
from protocol.errors import Unavailable
from protocol.messages import Event

log = logging.getLogger(__name__)

MAX_EVENTS = 10_000

_SCHEMA = ("CREATE TABLE events (number INTEGER PRIMARY KEY AUTOINCREMENT, slot TEXT NOT NULL, blob BLOB NOT NULL)",)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Event)


class Trail:
    """The agent's `trail.db`, for the supervisor alone. Others read it with `read_history`.

    Args:
        path: The SQLite file.
        max_events: How many events it keeps.

    Raises:
        Misconfigured: The file cannot be opened for writing, and a person must change that.
    """

    def __init__(self, path: Path, *, max_events: int = MAX_EVENTS) -> None:
        assert max_events > 0, "an audit trail keeps something"
        self._max_events = max_events
        self._database = Database(path, _SCHEMA, synchronous="FULL")

    @property
    def set_aside(self) -> Path | None:
        """Where the last damaged file went, or `None`."""
        return self._database.set_aside

    def add(self, event: Event) -> None:
        """Add an event, durably; beyond the bound the oldest goes.

        Raises:
            Unavailable: The disk is full or failed.
        """
        with self._database.transaction() as connection:
            added = connection.execute(
                "INSERT INTO events (slot, blob) VALUES (?, ?)", (event.slot, _encoder.encode(event))
            ).lastrowid
            assert added is not None, "an insert has a row number"
            connection.execute("DELETE FROM events WHERE number <= ?", (added - self._max_events,))

    def history(self, limit: int, slot: str | None = None) -> list[Event]:
        """The newest `limit` events, of one slot or of all, the oldest of them first.

        Raises:
            Unavailable: The disk failed.
        """
        with self._database.transaction() as connection:
            return _history(connection, limit, slot)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def read_history(path: Path, limit: int, slot: str | None = None) -> list[Event]:
    """As `Trail.history`, from another process while the agent may be running. Writes nothing.

    Raises:
        Unavailable: The file is not there, or cannot be read.
    """
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=2.0)
        try:
            return _history(connection, limit, slot)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise Unavailable(f"cannot read {path}: {error}") from error


def _history(connection: sqlite3.Connection, limit: int, slot: str | None) -> list[Event]:
    query = "SELECT blob FROM events WHERE slot = ? OR ? IS NULL ORDER BY number DESC LIMIT ?"
    found = connection.execute(query, (slot, slot, max(limit, 0)))
    return [event for (blob,) in found if (event := _decoded(blob)) is not None][::-1]


def _decoded(blob: bytes) -> Event | None:
    """An event; `None` for a row that rotted, as SQLite's pages have no checksums, or that a newer version wrote."""
    try:
        return _decoder.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("an event of the audit trail cannot be read: %s", error)
        return None
