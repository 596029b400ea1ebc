"""Transitions on their way to the trainer, on disk until its database has them.

Rows are numbered from 1 within an *epoch*, a random name that is new with each database. They are deleted when the
trainer acknowledges them, not when the broker does. Batches speak for ranges of numbers that join up, so a number
that is not there (dropped when the outbox was full) does not hold up the rest.

The database runs with `synchronous=NORMAL`: an fsync per append would wear out an SD card, and after a crash or kill
-9 nothing is missing. A power loss may undo the last appends. Their numbers might have been sent by then, and a
number must never name two transitions. So numbers are reserved in blocks, durably, before the first of a block is
used, and each opening starts a new block.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_agent.database import Database
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.errors import Rejected
from protocol.messages import Ack, Transition, TransitionBatch

BLOCK = 10_000
ROW_OVERHEAD_BYTES = 64
# A batch must fit one message even where it does not compress; the rest is for the envelope.
MAX_ROW_BYTES = MAX_PAYLOAD_BYTES - 1024

_SCHEMA = (
    "CREATE TABLE transitions (seq INTEGER PRIMARY KEY, slot TEXT NOT NULL, battle TEXT NOT NULL,"
    " bytes INTEGER NOT NULL, blob BLOB NOT NULL)",
    # With the bytes in it, sums need not read the rows.
    "CREATE INDEX by_battle ON transitions (slot, battle, bytes)",
    "CREATE TABLE numbers (epoch TEXT NOT NULL, reserved INTEGER NOT NULL,"
    " acked INTEGER NOT NULL, dropped INTEGER NOT NULL)",
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Transition)


class _Row(NamedTuple):
    seq: int
    slot: str
    battle: str
    size: int
    blob: bytes


class Outbox:
    """A bounded queue on disk with a sending window.

    Args:
        path: The SQLite file.
        max_bytes: Bound of the rows' bytes. Above it the battles with the oldest rows are dropped, each as a whole.
        window: How many batches may be unacknowledged.
        batch_rows: Most transitions in a batch.
        batch_bytes: Most bytes of transitions in a batch, before compression; a single larger row goes alone.

    Attributes:
        epoch: Names this database.
        rows: Transitions on disk.
        bytes: What they take, rows' overhead included.
        acked: Highest number known to be committed by the trainer.
        dropped: Transitions that were given up (for want of room, too large to send, or lost with a damaged file); kept
            across restarts, in the same transaction as the loss.

    Raises:
        Misconfigured: The file cannot be opened for writing, and a person must change that. While the disk is full,
            there is no outbox yet, and its methods raise `Unavailable`.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 256 * 1024 * 1024,
        window: int = 8,
        batch_rows: int = 256,
        batch_bytes: int = 48 * 1024,
    ) -> None:
        assert min(max_bytes, window, batch_rows, batch_bytes) > 0, "every bound must let something through"
        self.epoch = ""
        self.rows = self.bytes = self.acked = self.dropped = 0
        self._max_bytes = max_bytes
        self._window = window
        self._batch_rows = batch_rows
        self._batch_bytes = batch_bytes
        self._next = 1
        self._reserved = 0
        self._cursor = 0  # highest number that a batch of the present window speaks for
        self._sent = 0  # highest number that any batch may have spoken for, of this opening or one before
        self._unacknowledged: deque[int] = deque()
        self._database = Database(path, _SCHEMA, synchronous="NORMAL", fill=self._begin_epoch, opened=self._load)

    @property
    def set_aside(self) -> Path | None:
        """Where the last damaged file went, or `None`."""
        return self._database.set_aside

    @property
    def unacknowledged(self) -> int:
        """How many batches wait for an acknowledgement."""
        return len(self._unacknowledged)

    def append(self, transitions: Sequence[Transition]) -> None:
        """Number and store transitions, all or none.

        Raises:
            Unavailable: The disk is full or failed; nothing was stored, and the caller still has them.
        """
        if not transitions:
            return
        self._reserve(len(transitions))
        rows = [_row(seq, transition) for seq, transition in enumerate(transitions, self._next)]
        fitting = [row for row in rows if len(row.blob) <= MAX_ROW_BYTES]
        too_large, added = len(rows) - len(fitting), sum(row.size for row in fitting)
        excess, lost = self.bytes + added - self._max_bytes, []
        with self._database.transaction() as connection:
            connection.executemany("INSERT INTO transitions VALUES (?, ?, ?, ?, ?)", fitting)
            connection.execute("UPDATE numbers SET dropped = dropped + ?", (too_large,))
            while excess > 0:
                battle = connection.execute("SELECT slot, battle FROM transitions ORDER BY seq LIMIT 1").fetchone()
                lost.append(_give_up(connection, "slot = ? AND battle = ?", battle))
                excess -= lost[-1][1]
        self._next += len(rows)
        self.rows, self.bytes, self.dropped = self.rows + len(fitting), self.bytes + added, self.dropped + too_large
        self._forget(lost)

    def next_batch(self) -> TransitionBatch | None:
        """The next batch to send, or `None` when the window is full or nothing is left to send.

        Raises:
            Unavailable: The disk failed.
        """
        if len(self._unacknowledged) >= self._window:
            return None
        transitions, damaged = [], []
        with self._database.transaction() as connection:
            first, last = self._cursor + 1, self._cursor
            for last, blob in self._following(connection):
                try:
                    transitions.append(_decoder.decode(blob))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    damaged.append(last)
            lost = [_give_up(connection, "seq = ?", (seq,)) for seq in damaged]
        self._forget(lost)
        if last < first:
            return None
        self._cursor = last
        self._sent = max(self._sent, last)
        self._unacknowledged.append(last)
        return TransitionBatch(epoch=self.epoch, acked=self.acked, first=first, last=last, transitions=transitions)

    def acknowledge(self, ack: Ack) -> int:
        """Delete what the trainer has committed. Returns how many rows that were; an old or foreign `ack` deletes none.

        Raises:
            Rejected: With code `bad_ack`: it speaks of numbers that were never sent.
            Unavailable: The disk failed; the rows are still here and will be sent again.
        """
        if ack.epoch != self.epoch or ack.seq <= self.acked:
            return 0
        if ack.seq > self._sent:
            raise Rejected("bad_ack", f"seq {ack.seq} is acknowledged, but at most {self._sent} was sent", "seq")
        with self._database.transaction() as connection:
            deleted, size = _delete(connection, "seq <= ?", (ack.seq,))
            connection.execute("UPDATE numbers SET acked = ?", (ack.seq,))
        self.rows, self.bytes, self.acked = self.rows - deleted, self.bytes - size, ack.seq
        self._cursor = max(self._cursor, ack.seq)
        while self._unacknowledged and self._unacknowledged[0] <= ack.seq:
            self._unacknowledged.popleft()
        return deleted

    def rewind(self) -> None:
        """Send everything that is not acknowledged again: after a reconnect, or when an acknowledgement is overdue."""
        self._cursor = self.acked
        self._unacknowledged.clear()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _begin_epoch(self, connection: sqlite3.Connection) -> None:
        """Fill a new database, at first or after a damaged one, whose rows are then lost."""
        connection.execute("INSERT INTO numbers VALUES (?, 0, 0, ?)", (secrets.token_hex(8), self.dropped + self.rows))

    def _load(self, connection: sqlite3.Connection) -> None:
        self.epoch, self._reserved, self.acked, self.dropped = connection.execute(
            "SELECT epoch, reserved, acked, dropped FROM numbers"
        ).fetchone()
        self.rows, self.bytes = _totals(connection)
        self._next = self._reserved + 1
        self._sent = self._reserved  # a process that was killed may have sent all of it, and the host may have it
        self.rewind()

    def _reserve(self, count: int) -> None:
        if self._next + count - 1 <= self._reserved:
            return
        with self._database.transaction(durable=True) as connection:  # which may only now have read the numbers
            reserved = self._next + max(count, BLOCK) - 1
            connection.execute("UPDATE numbers SET reserved = ?", (reserved,))
        self._reserved = reserved

    def _following(self, connection: sqlite3.Connection) -> list[tuple[int, bytes]]:
        """The rows of the next batch."""
        found: list[tuple[int, bytes]] = []
        size = 0
        query = "SELECT seq, blob FROM transitions WHERE seq > ? ORDER BY seq LIMIT ?"
        for seq, blob in connection.execute(query, (self._cursor, self._batch_rows)):
            size += len(blob)
            if found and size > self._batch_bytes:
                break
            found.append((seq, blob))
        return found

    def _forget(self, lost: list[tuple[int, int]]) -> None:
        """Count rows and bytes that a committed transaction gave up."""
        for rows, size in lost:
            self.rows, self.bytes, self.dropped = self.rows - rows, self.bytes - size, self.dropped + rows


def _row(seq: int, transition: Transition) -> _Row:
    blob = _encoder.encode(msgspec.structs.replace(transition, seq=seq))
    return _Row(seq, transition.slot, transition.battle, len(blob) + ROW_OVERHEAD_BYTES, blob)


def _totals(connection: sqlite3.Connection) -> tuple[int, int]:
    rows, size = connection.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM transitions").fetchone()
    return rows, size


def _delete(connection: sqlite3.Connection, condition: str, values: tuple[int | str, ...]) -> tuple[int, int]:
    """Delete the rows for which `condition` holds. Returns how many, and their bytes."""
    where = f"FROM transitions WHERE {condition}"
    rows, size = connection.execute(f"SELECT count(*), coalesce(sum(bytes), 0) {where}", values).fetchone()
    connection.execute(f"DELETE {where}", values)
    return rows, size


def _give_up(connection: sqlite3.Connection, condition: str, values: tuple[int | str, ...]) -> tuple[int, int]:
    """As `_delete`, and counted as dropped."""
    rows, size = _delete(connection, condition, values)
    connection.execute("UPDATE numbers SET dropped = dropped + ?", (rows,))
    return rows, size
