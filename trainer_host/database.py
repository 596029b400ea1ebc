"""The host's tables, and how its database is opened. SQLite by default; any other difference than here is a mistake.

An acknowledged transition must survive a power loss, so SQLite syncs each commit (`synchronous=FULL`); the ingest pays
for it once per group of batches. Writers begin with `BEGIN IMMEDIATE`: a transaction that reads first and writes later
could otherwise find, at its first write, that another process has written in between, which no waiting mends.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from protocol.errors import Misconfigured, Unavailable

SCHEMA = 1
BUSY_TIMEOUT_MS = 10_000
_HOPELESS = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})

metadata = sa.MetaData()
_Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up whole-number keys of this type only

schema_mark = sa.Table("schema_mark", metadata, sa.Column("version", sa.Integer, nullable=False))

transitions = sa.Table(
    "transitions",
    metadata,
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("epoch", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Text, nullable=False),
    sa.Column("battle", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("features", sa.LargeBinary, nullable=False),
    sa.Column("action", sa.BigInteger, nullable=False),
    sa.Column("taken", sa.Boolean, nullable=False),
    sa.Column("propensity", sa.Double),
    sa.Column("legal", sa.LargeBinary, nullable=False),
    sa.Column("reward", sa.Double, nullable=False),
    sa.Column("next_features", sa.LargeBinary, nullable=False),
    sa.Column("done", sa.Boolean, nullable=False),
    sa.Column("truncated", sa.Boolean, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("received_at", sa.Double, nullable=False),
    sa.Index("transitions_by_age", "slot", "received_at"),
)

# What each outbox has spoken for (trainer_host.ranges).
streams = sa.Table(
    "streams",
    metadata,
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("epoch", sa.Text, primary_key=True),
    sa.Column("floor", sa.BigInteger, nullable=False),
    sa.Column("ranges", sa.JSON, nullable=False),
)

# How many transitions a slot has, and had when it was last trained: counting the rows would read them all.
slots = sa.Table(
    "slots",
    metadata,
    sa.Column("slot", sa.Text, primary_key=True),
    sa.Column("transitions", sa.BigInteger, nullable=False),
    sa.Column("trained_transitions", sa.BigInteger, nullable=False),
)

quarantine = sa.Table(
    "quarantine",
    metadata,
    sa.Column("id", _Number, primary_key=True, autoincrement=True),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("online", sa.Boolean),
    sa.Column("status", sa.LargeBinary),
    sa.Column("telemetry", sa.LargeBinary),
)

telemetry = sa.Table(
    "telemetry",
    metadata,
    sa.Column("id", _Number, primary_key=True, autoincrement=True),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("received_at", sa.Double, nullable=False, index=True),
    sa.Column("telemetry", sa.LargeBinary, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", _Number, primary_key=True, autoincrement=True),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("received_at", sa.Double, nullable=False, index=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("slot", sa.Text, nullable=False),
    sa.Column("event", sa.LargeBinary, nullable=False),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", _Number, primary_key=True, autoincrement=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("slot", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("notes", sa.Text, nullable=False),
    sa.Column("lineage", sa.JSON, nullable=False),
    sa.Column("gate", sa.JSON(none_as_null=True)),
    sa.Column("reason", sa.Text, nullable=False),
)


class NewRows:
    """Inserts many rows, passing over those whose key is there already.

    The text is SQLAlchemy's, compiled once; the values go to the driver as they are, because preparing them one by
    one takes longer than inserting them.
    """

    def __init__(self, statement: sa.Insert, dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self._text = str(compiled)
        self._columns = [column.name for column in statement.table.columns]
        self._positional = compiled.positional
        assert not compiled.positional or compiled.positiontup == self._columns, "rows are in the table's order"

    def add(self, connection: sa.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert rows whose values are in the order of the table's columns."""
        values: Any = rows if self._positional else [dict(zip(self._columns, row, strict=True)) for row in rows]
        connection.exec_driver_sql(self._text, values)


class Database:
    """An open database, for any number of threads.

    Args:
        url: As SQLAlchemy spells it: `sqlite:///file`, `postgresql+psycopg://…`.

    Raises:
        Misconfigured: The URL is wrong, its driver is missing, the file cannot be opened, or a newer version of this
            program made the tables.
        Unavailable: The database does not answer.
    """

    def __init__(self, url: str) -> None:
        parsed = _parsed(url)
        try:
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(parsed)
        except (NoSuchModuleError, ImportError) as error:
            raise Misconfigured(f"cannot use the database URL {url!r}: {error}") from error
        except OSError as error:
            raise Misconfigured(f"cannot make the folder of the database: {error}") from error
        self.name = parsed.render_as_string(hide_password=True)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _set_up_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._writing = self._engine.execution_options(writes=True)
        try:
            self._create()
        except BaseException as error:
            self.close()
            if _is_no_database(error.__cause__):
                raise Misconfigured(f"cannot use the database {self.name}: {error.__cause__.orig}") from error
            raise

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads; raises `Unavailable`."""
        with self._errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: all of its statements, or none after any exception; raises `Unavailable`."""
        with self._errors(), self._writing.begin() as connection:
            yield connection

    def insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that can say what to do on a conflict, which standard SQL cannot."""
        return postgresql.insert(table) if self._engine.dialect.name == "postgresql" else sqlite.insert(table)

    def new_rows(self, table: sa.Table) -> NewRows:
        """For inserting many rows into a table."""
        return NewRows(self.insert(table).on_conflict_do_nothing(), self._engine.dialect)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise Unavailable(f"the database {self.name} failed: {error.orig}") from error

    def _create(self) -> None:
        with self.writing() as connection:
            if not sa.inspect(connection).has_table(schema_mark.name):
                metadata.create_all(connection)
                connection.execute(schema_mark.insert(), {"version": SCHEMA})
            found = connection.execute(sa.select(schema_mark.c.version)).scalar_one()
        if found > SCHEMA:
            raise Misconfigured(
                f"the database {self.name} has schema {found}, this version of edgeswap knows {SCHEMA}; "
                "install the newer version"
            )


def is_new(url: str) -> bool:
    """Whether opening this database would make a new file.

    Raises:
        Misconfigured: The URL is wrong.
    """
    parsed = _parsed(url)
    return parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists()


def _parsed(url: str) -> sa.URL:
    try:
        return sa.make_url(url)
    except ArgumentError as error:
        raise Misconfigured(f"cannot use the database URL {url!r}: {error}") from error


def _is_no_database(error: BaseException | None) -> TypeGuard[DBAPIError]:
    """Whether SQLite can never open this file as it is."""
    if not isinstance(error, DBAPIError) or not isinstance(error.orig, sqlite3.Error):
        return False
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _HOPELESS


def _set_up_sqlite(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
