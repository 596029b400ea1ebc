from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.database import KEPT_ASIDE, QUICK_CHECK_BYTES, Database
from protocol.errors import Misconfigured, Unavailable

SCHEMA = ("CREATE TABLE notes (text TEXT NOT NULL)",)


def opened(path: Path) -> Database:
    return Database(path, SCHEMA, synchronous="NORMAL")


def note(database: Database, text: str, *, durable: bool = False) -> None:
    with database.transaction(durable=durable) as connection:
        connection.execute("INSERT INTO notes VALUES (?)", (text,))


def notes(database: Database) -> list[str]:
    with database.transaction() as connection:
        return [text for (text,) in connection.execute("SELECT text FROM notes")]


def synchronous(database: Database) -> int:
    with database.transaction() as connection:
        (level,) = connection.execute("PRAGMA synchronous").fetchone()
        return int(level)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the kernel refuses the write as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def scribble(path: Path, offset: int) -> None:
    """Overwrite 4 KiB of a closed file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * 4096)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.db"
    database = opened(path)
    note(database, "one")
    note(database, "two", durable=True)
    assert synchronous(database) == 1
    database.close()
    again = opened(path)
    assert notes(again) == ["one", "two"]
    assert again.set_aside is None


def test_a_durable_transaction_waits_for_the_disk(tmp_path: Path) -> None:
    database = opened(tmp_path / "a.db")
    with database.transaction(durable=True) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert synchronous(database) == 1


def test_a_failed_block_leaves_nothing_behind(tmp_path: Path) -> None:
    database = opened(tmp_path / "a.db")

    def half() -> None:
        with database.transaction(durable=True) as connection:
            connection.execute("INSERT INTO notes VALUES ('half')")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert notes(database) == []
    assert synchronous(database) == 1


def test_a_failed_statement_says_which_file(tmp_path: Path) -> None:
    database = opened(tmp_path / "a.db")
    with pytest.raises(Unavailable, match=r"a\.db.*NOT NULL"), database.transaction() as connection:
        connection.execute("INSERT INTO notes VALUES (NULL)")
    note(database, "goes on")
    assert notes(database) == ["goes on"]


def test_a_full_disk_is_unavailable_and_writes_nothing(tmp_path: Path) -> None:
    database = opened(tmp_path / "a.db")
    note(database, "before")
    with full_disk((tmp_path / "a.db-wal").stat().st_size + 8192), pytest.raises(Unavailable):
        note(database, "x" * 100_000, durable=True)
    assert notes(database) == ["before"]
    note(database, "after")
    assert notes(database) == ["before", "after"]


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look like one" * 99, b"\0" * 8192])
def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(content)
    database = opened(path)
    note(database, "new")
    assert database.set_aside == tmp_path / "a.db.corrupt-1"
    assert database.set_aside.read_bytes() == content
    assert notes(database) == ["new"]


def test_a_damaged_page_is_found_at_the_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = opened(path)
    note(database, "x" * 50_000)
    database.close()
    scribble(path, 4096)
    assert opened(path).set_aside == tmp_path / "a.db.corrupt-1"


def test_damage_that_shows_later_is_replaced_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = opened(path)
    for part in range(QUICK_CHECK_BYTES // 1_000_000 + 2):
        note(database, chr(65 + part) * 1_000_000)
    database.close()
    scribble(path, 4096)
    database = opened(path)
    assert database.set_aside is None
    with pytest.raises(Unavailable, match="damaged"):
        notes(database)
    assert database.set_aside == tmp_path / "a.db.corrupt-1"
    note(database, "new")
    assert notes(database) == ["new"]


def test_a_database_that_could_not_be_replaced_is_replaced_at_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = opened(path)
    for _ in range(QUICK_CHECK_BYTES // 1_000_000 + 2):
        note(database, "x" * 1_000_000)
    database.close()
    scribble(path, 4096)
    database = opened(path)
    with full_disk(100), pytest.raises(Unavailable):
        notes(database)
    database.close()
    note(database, "new")
    assert notes(database) == ["new"]


def test_a_replacement_that_needs_a_person_does_not_stop_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = opened(path)
    for _ in range(QUICK_CHECK_BYTES // 1_000_000 + 2):
        note(database, "x" * 1_000_000)
    database.close()
    scribble(path, 4096)
    database = opened(path)
    with full_disk(100), pytest.raises(Unavailable):
        notes(database)
    path.unlink(missing_ok=True)
    path.mkdir()
    for _ in range(2):
        with pytest.raises(Unavailable, match="permissions"):
            notes(database)
    path.rmdir()
    note(database, "new")
    assert notes(database) == ["new"]


def test_a_replacement_that_fails_in_the_middle_does_not_stop_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    failing = False

    def fill(connection: sqlite3.Connection) -> None:
        if failing:
            raise Misconfigured("what belongs in here needs a person")

    database = Database(path, SCHEMA, synchronous="NORMAL", fill=fill)
    note(database, "lost")
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.write(b"\xa5" * path.stat().st_size)
    failing = True
    with pytest.raises(Unavailable, match="needs a person"):
        notes(database)
    failing = False
    note(database, "new")
    assert notes(database) == ["new"]


def test_a_block_that_fails_on_a_damaged_file_says_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = opened(path)
    note(database, "lost")
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def half() -> None:
        with database.transaction(durable=True) as connection:
            connection.execute("INSERT INTO notes VALUES ('half')")
            with path.open("r+b") as file:
                file.write(b"\xa5" * path.stat().st_size)
            raise KeyError

    with pytest.raises(KeyError):
        half()
    with pytest.raises(Unavailable, match="damaged"):
        notes(database)
    note(database, "new")
    assert notes(database) == ["new"]


@pytest.mark.parametrize(("statement", "error"), [("INSERT INTO notes VALUES (NULL)", Unavailable), ("", KeyError)])
def test_where_a_rollback_fails_too_the_file_is_opened_anew(
    tmp_path: Path, statement: str, error: type[Exception]
) -> None:
    database = opened(tmp_path / "a.db")

    def no_rollback(action: int, what: str | None, *_: str | None) -> int:
        refused = action == sqlite3.SQLITE_TRANSACTION and what == "ROLLBACK"
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    def half() -> None:
        with database.transaction() as connection:
            connection.execute("INSERT INTO notes VALUES ('half')")
            connection.set_authorizer(no_rollback)
            connection.execute(statement)
            raise KeyError

    with pytest.raises(error):
        half()
    note(database, "whole")
    assert notes(database) == ["whole"]


def test_a_log_that_the_replacement_finds_is_set_aside_too(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = opened(path)
    for _ in range(QUICK_CHECK_BYTES // 1_000_000 + 2):
        note(database, "x" * 1_000_000)
    database.close()
    scribble(path, 4096)
    reader = sqlite3.connect(path)
    database = opened(path)
    reader.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    with pytest.raises(Unavailable):
        notes(database)
    reader.close()
    assert sorted(entry.name for entry in tmp_path.glob("*.corrupt-*")) == ["a.db.corrupt-1", "a.db.corrupt-1-wal"]
    note(database, "new")
    assert notes(database) == ["new"]


def test_damage_that_cannot_be_set_aside_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"garbage" * 1000)
    (tmp_path / "a.db.corrupt-1").mkdir()
    (tmp_path / "a.db.corrupt-2").mkdir()
    (tmp_path / "a.db.corrupt-3").mkdir()
    database = opened(tmp_path / "a.db")
    with pytest.raises(Unavailable, match="aside"):
        notes(database)


def test_few_damaged_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    (tmp_path / "a.db.corrupt-notes").write_text("somebody's own")
    for number in range(12):
        path.write_bytes(b"garbage %d" % number * 1000)
        opened(path).close()
    kept = sorted(int(entry.name.rpartition("-")[2]) for entry in tmp_path.glob("*.corrupt-*[0-9]"))
    assert kept == [10, 11, 12]
    assert len(kept) == KEPT_ASIDE
    assert (tmp_path / "a.db.corrupt-notes").exists()


def test_the_first_rows_come_with_the_tables(tmp_path: Path) -> None:
    def fill(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO notes VALUES ('first')")

    for _ in range(2):
        database = Database(tmp_path / "a.db", SCHEMA, synchronous="FULL", fill=fill)
        assert notes(database) == ["first"]
        assert synchronous(database) == 2
        database.close()


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    opened(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=2")
    with pytest.raises(Misconfigured, match="format 2"):
        opened(path)
    assert list(tmp_path.glob("*.corrupt-*")) == []


def test_a_path_that_cannot_be_a_file_needs_a_person(tmp_path: Path) -> None:
    (tmp_path / "a.db").mkdir()
    with pytest.raises(Misconfigured, match="permissions"):
        opened(tmp_path / "a.db")
    (tmp_path / "file").write_text("")
    with pytest.raises(Misconfigured, match="folder"):
        opened(tmp_path / "file" / "a.db")


def test_a_file_that_another_process_holds_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = opened(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        note(database, "now")
    holder.execute("ROLLBACK")
    note(database, "then")
    assert notes(database) == ["then"]


def test_a_full_disk_at_the_opening_stops_nothing_but_this_file(tmp_path: Path) -> None:
    with full_disk(100):
        database = opened(tmp_path / "a.db")
        with pytest.raises(Unavailable):
            notes(database)
    assert notes(database) == []


def test_each_connection_is_shown_to_the_owner_with_its_tables(tmp_path: Path) -> None:
    seen: list[int] = []

    def show(connection: sqlite3.Connection) -> None:
        seen.append(connection.execute("SELECT count(*) FROM notes").fetchone()[0])

    with full_disk(100):
        database = Database(tmp_path / "a.db", SCHEMA, synchronous="FULL", opened=show)
        assert seen == []
    with database.transaction() as connection:
        assert seen == [0]
        connection.execute("INSERT INTO notes VALUES ('a')")
    Database(tmp_path / "a.db", SCHEMA, synchronous="FULL", opened=show).close()
    assert seen == [0, 1]
