"""What the agent must know after a restart: each slot's state, the audit trail, and whether the last run ended well.

The database runs with `synchronous=FULL`: the deployment machine acts only after its new state is durable. States are
bytes here; what they mean is the deployment machine's business. They are few and small, so all are kept in memory
too, and a database that turns out damaged while the agent runs is filled again.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from edge_agent.database import Database
from protocol.errors import Unavailable
from protocol.messages import Event

MAX_EVENTS = 10_000

_SCHEMA = (
    "CREATE TABLE slots (slot TEXT PRIMARY KEY, state BLOB NOT NULL)",
    "CREATE TABLE events (number INTEGER PRIMARY KEY AUTOINCREMENT, slot TEXT NOT NULL, blob BLOB NOT NULL)",
    "CREATE TABLE run (running INTEGER NOT NULL)",
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Event)


class StateStore:
    """The agent's `state.db`, for the supervisor alone. Others read it with `read_history`.

    Args:
        path: The SQLite file.
        max_events: How many events the trail keeps.

    Raises:
        Misconfigured: The file cannot be opened for writing.
        Unavailable: The disk is full.
    """

    def __init__(self, path: Path, *, max_events: int = MAX_EVENTS) -> None:
        assert max_events > 0, "an audit trail keeps something"
        self._max_events = max_events
        self._running = False
        self._states: dict[str, bytes] = {}
        self._database = Database(path, _SCHEMA, synchronous="FULL", fill=self._fill)
        with self._database.transaction() as connection:
            self._states = dict(connection.execute("SELECT slot, state FROM slots"))

    @property
    def set_aside(self) -> Path | None:
        """Where the last damaged file went, or `None`."""
        return self._database.set_aside

    def load(self, slot: str) -> bytes | None:
        """A slot's last saved state, or `None`."""
        return self._states.get(slot)

    def save(self, slot: str, state: bytes) -> None:
        """Replace a slot's state, durably before this returns.

        Raises:
            Unavailable: The disk is full or failed; the state before is still the one that is loaded.
        """
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO slots VALUES (?, ?)", (slot, state))
        self._states[slot] = state

    def add_event(self, event: Event) -> None:
        """Add to the audit trail, durably; beyond its bound the oldest event goes.

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

    def mark_running(self) -> bool:
        """Note that a run begins. Returns whether the one before ended with `mark_stopped`, or there was none.

        Raises:
            Unavailable: The disk is full or failed.
        """
        with self._database.transaction() as connection:
            (was_running,) = connection.execute("SELECT running FROM run").fetchone()
            connection.execute("UPDATE run SET running = 1")
        self._running = True
        return not was_running

    def mark_stopped(self) -> None:
        """Note that the run ends as it should.

        Raises:
            Unavailable: The disk is full or failed.
        """
        with self._database.transaction() as connection:
            connection.execute("UPDATE run SET running = 0")
        self._running = False

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _fill(self, connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO run VALUES (?)", (self._running,))
        connection.executemany("INSERT INTO slots VALUES (?, ?)", self._states.items())


def read_history(path: Path, limit: int, slot: str | None = None) -> list[Event]:
    """As `StateStore.history`, from another process while the agent may be running. Writes nothing.

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
    return [_decoder.decode(blob) for (blob,) in found][::-1]
