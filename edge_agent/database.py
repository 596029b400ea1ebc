"""SQLite files of the agent: opened, checked, and replaced when they are damaged.

A damaged file must not stop the daemon. It is renamed to `<name>.corrupt-<n>` (the newest three are kept), a new
database is created in its place, and `set_aside` says so. Damage that shows only later does the same in the middle of
a transaction, which then raises `Unavailable`: the next attempt meets the new database. Nor must a disk that is full or
read-only: then each transaction raises `Unavailable` until one can open the file.

WAL mode: a writer never waits for a reader, and a torn write at a power loss ends in the last whole transaction.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from protocol.errors import Misconfigured, Unavailable

log = logging.getLogger(__name__)

KEPT_ASIDE = 3
QUICK_CHECK_BYTES = 16 * 1024 * 1024
_WAL_LIMIT_BYTES = 4 * 1024 * 1024
_SCHEMA = 1

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_DAMAGED_READS = frozenset({sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS})
_FORBIDDEN = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})


class Database:
    """One SQLite file with one connection, for one thread.

    Args:
        path: The file. Missing folders are made.
        schema: Statements that create the tables.
        synchronous: `FULL` makes each transaction durable before it returns. `NORMAL` keeps the file whole, but a
            power loss (not a crash) may undo the last transactions.
        fill: Called within the transaction that creates the tables, to put in the first rows.
        opened: Called with each connection, once the tables are there.

    Attributes:
        path: The file.
        set_aside: Where the last damaged file went, or `None`.

    Raises:
        Misconfigured: The file cannot be opened for writing on a disk that can be written, or a newer version of this
            program wrote it.
    """

    def __init__(
        self,
        path: Path,
        schema: tuple[str, ...],
        *,
        synchronous: Literal["NORMAL", "FULL"],
        fill: Callable[[sqlite3.Connection], None] = lambda _: None,
        opened: Callable[[sqlite3.Connection], None] = lambda _: None,
    ) -> None:
        self.path = path
        self.set_aside: Path | None = None
        self._schema = schema
        self._synchronous = synchronous
        self._fill = fill
        self._opened = opened
        self._connection: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Misconfigured(f"cannot make the folder {path.parent}: {error.strerror}") from error
        try:
            self._connection = self._open_or_replace()
        except Unavailable as error:
            log.error("cannot open a database, trying again when it is needed: %s", error)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """Run the statements of the `with` block as one transaction: all of them, or none after any exception.

        Args:
            durable: Survives a power loss, whatever `synchronous` is.

        Raises:
            Unavailable: The disk is full or failed, the file is locked, or it turned out damaged and was replaced, or
                could not be.
        """
        # There is none where a damaged file could not be replaced (the disk was full, say): try again now.
        connection = self._connection or self._reopen(self._open_or_replace)
        try:
            # Set before, not restored after: a statement after COMMIT could fail though all is written.
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else self._synchronous}")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if not is_damage(error):
                self._roll_back(connection)
                raise Unavailable(f"{self.path}: {error}") from error
            self._drop(connection)
            self._reopen(self._replace)
            raise Unavailable(f"{self.path} was damaged ({error}); it is now {self.set_aside}") from error
        except BaseException:
            self._roll_back(connection)
            raise

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        # SQLite has rolled back by itself after some errors, a full disk among them.
        if not connection.in_transaction:
            return
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._drop(connection)  # what was not committed goes with the connection

    def _drop(self, connection: sqlite3.Connection) -> None:
        self._connection = None
        connection.close()

    def _reopen(self, opening: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        """Open the file in the middle of a run, which goes on also where that needs a person."""
        try:
            self._connection = opening()
        except Misconfigured as error:
            raise Unavailable(str(error)) from error
        return self._connection

    def _open_or_replace(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite3.Error as error:
            if is_damage(error):
                return self._replace()
            raise _at_open(self.path, error) from error

    def _open(self) -> sqlite3.Connection:
        size = 0
        with suppress(OSError):  # it is not there, or SQLite says below why it cannot be had
            size = self.path.stat().st_size
        connection = sqlite3.connect(self.path, timeout=2.0, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA journal_size_limit={_WAL_LIMIT_BYTES}")
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            # A large file takes a slow card seconds to read through; its damage shows when the page is used.
            if size <= QUICK_CHECK_BYTES:
                _check(connection)
            self._create(connection)
            self._opened(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found > _SCHEMA:
            raise Misconfigured(f"{self.path} has format {found}, this version knows {_SCHEMA}; install the newer one")
        if found == _SCHEMA:
            return
        connection.execute("BEGIN IMMEDIATE")
        for statement in self._schema:
            connection.execute(statement)
        self._fill(connection)
        connection.execute(f"PRAGMA user_version={_SCHEMA}")
        connection.execute("COMMIT")

    def _replace(self) -> sqlite3.Connection:
        try:
            self.set_aside = _put_aside(self.path)
            return self._open()
        except sqlite3.Error as error:
            raise _at_open(self.path, error) from error
        except OSError as error:
            raise Unavailable(f"cannot set {self.path} aside: {error.strerror}") from error


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the error says that the file itself is broken."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in _DAMAGED or code in _DAMAGED_READS


def _check(connection: sqlite3.Connection) -> None:
    (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        error = sqlite3.DatabaseError(result)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _at_open(path: Path, error: sqlite3.Error) -> Misconfigured | Unavailable:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _FORBIDDEN and _has_room(path.parent):
        return Misconfigured(f"cannot open {path} for writing: {error}; check its owner and its permissions")
    return Unavailable(f"{path}: {error}")


def _has_room(folder: Path) -> bool:
    """Whether files can be made here, permissions aside: the disk is neither read-only nor full."""
    found = os.statvfs(folder)
    return not found.f_flag & os.ST_RDONLY and found.f_bavail > 0


def _put_aside(path: Path) -> Path:
    """Rename the database with its log, and remove what was put aside longest ago."""
    pattern = re.compile(re.escape(path.name) + r"\.corrupt-(\d+)")
    found = sorted(int(match[1]) for entry in path.parent.iterdir() if (match := pattern.fullmatch(entry.name)))
    for number in found[: max(0, len(found) - KEPT_ASIDE + 1)]:
        path.with_name(f"{path.name}.corrupt-{number}").unlink()
        path.with_name(f"{path.name}.corrupt-{number}-wal").unlink(missing_ok=True)
    target = path.with_name(f"{path.name}.corrupt-{found[-1] + 1 if found else 1}")
    path.replace(target)
    log = path.with_name(path.name + "-wal")
    if log.exists():
        log.replace(target.with_name(target.name + "-wal"))
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    return target
