from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from protocol.errors import Misconfigured, Unavailable
from protocol.messages import Event, SlotStatus, Status, Telemetry, Transition, TransitionBatch
from trainer_host import database as tables
from trainer_host import store as module
from trainer_host.database import Database, NewRows
from trainer_host.store import Delivery, Record, SetAside, Sighting, SlotTotal, Store, unfit


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'host.db'}")
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


def transition(seq: int, /, **fields: object) -> Transition:
    made = Transition(
        seq=seq, slot="combat", battle=f"b{seq // 4}", actor="a", step=seq, features=bytes(8), action=1, taken=False,
        propensity=None, legal=b"\1\1", reward=0.5, next_features=bytes(8), done=False, truncated=False, model="m",
        version=3, at=100.0 + seq,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def batch(first: int, last: int, *, acked: int = 0, gaps: frozenset[int] = frozenset()) -> TransitionBatch:
    transitions = [transition(seq) for seq in range(first, last + 1) if seq not in gaps]
    return TransitionBatch(epoch="e1", acked=acked, first=first, last=last, transitions=transitions)


def stored(database: Database) -> list[int]:
    with database.reading() as connection:
        return [row[0] for row in connection.exec_driver_sql("SELECT seq FROM transitions ORDER BY device, epoch, seq")]


def test_a_batch_is_acknowledged_up_to_where_ranges_join(store: Store, database: Database) -> None:
    assert store.add_batch("pi", batch(1, 3)) == 3
    assert store.add_batch("pi", batch(7, 9)) == 3
    assert store.add_batch("pi", batch(4, 6, gaps=frozenset({5}))) == 9
    assert stored(database) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert store.totals() == [SlotTotal("combat", 8, 8)]


def test_streams_are_kept_apart(store: Store) -> None:
    store.add_batch("pi", batch(1, 3))
    assert store.add_batch("other", batch(1, 2)) == 2
    assert store.add_batch("pi", msgspec.structs.replace(batch(1, 1), epoch="e2")) == 1
    assert store.total("combat").transitions == 6


def test_a_new_database_goes_on_from_the_devices_floor(store: Store) -> None:
    assert store.add_batch("pi", batch(101, 103, acked=100)) == 103


def test_an_answer_never_falls_back(store: Store) -> None:
    store.add_batch("pi", batch(101, 103, acked=100))
    assert store.add_batch("pi", batch(1, 2)) == 103


def test_rows_below_the_floor_are_stored_all_the_same(store: Store, database: Database) -> None:
    store.add_batch("pi", batch(3, 4, acked=2))
    assert store.add_batch("pi", batch(1, 2)) == 4
    assert stored(database) == [1, 2, 3, 4]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_and_repetition_ends_in_the_same_rows_and_answer(data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(2, 40), max_size=8)))
    gaps = frozenset(data.draw(st.sets(st.integers(1, 40), max_size=12)))
    edges = [1, *cuts, 41]
    batches = [batch(first, end - 1, gaps=gaps) for first, end in itertools.pairwise(edges)]
    more = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=5))
    batches += [batch(min(pair), max(pair), gaps=gaps) for pair in more]
    batches += data.draw(st.lists(st.sampled_from(batches), max_size=5))
    random.Random(data.draw(st.integers(0, 2**32))).shuffle(batches)
    groups = data.draw(st.integers(1, 4))
    database = Database("sqlite://")
    store = Store(database)
    answer = 0
    for start in range(0, len(batches), groups):
        (given_answer,) = store.add_batches([Delivery("pi", each) for each in batches[start : start + groups]], 0.0)
        assert given_answer.ack.seq >= answer
        answer = given_answer.ack.seq
    expected = [seq for seq in range(1, 41) if seq not in gaps]
    assert answer == 40
    assert stored(database) == expected
    assert store.total("combat").transitions == len(expected)
    database.close()


def test_what_is_acknowledged_survives_and_is_never_taken_back(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'host.db'}"
    first = Database(url)
    Store(first).add_batch("pi", batch(1, 4))
    first.close()
    second = Database(url)
    assert Store(second).add_batch("pi", batch(5, 5)) == 5
    assert stored(second) == [1, 2, 3, 4, 5]
    second.close()


def test_a_failing_commit_leaves_nothing(store: Store, database: Database) -> None:
    broken = batch(1, 2)
    broken.transitions.append(transition(2**70))
    with pytest.raises(OverflowError):
        store.add_batches([Delivery("pi", batch(3, 4)), Delivery("pi", broken)], 0.0)
    assert stored(database) == []
    assert store.add_batch("pi", batch(3, 4)) == 0


def test_a_locked_database_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_host.database.BUSY_TIMEOUT_MS", 1)
    database = Database(f"sqlite:///{tmp_path / 'host.db'}")
    with sqlite3.connect(tmp_path / "host.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked"):
            Store(database).add_batch("pi", batch(1, 2))
    assert Store(database).add_batch("pi", batch(1, 2)) == 2
    database.close()


def test_what_is_unfit_is_kept_once_and_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUARANTINED", 2)
    aside = SetAside("pi", "not_finite", "why", b"bytes")
    for _ in range(2):
        store.add_batches([Delivery("pi", batch(1, 2, gaps=frozenset({2})), (aside,))], 0.0)
    assert store.quarantined() == {"not_finite": 1}
    store.set_aside([aside._replace(reason="malformed")] * 2, 0.0)
    assert store.quarantined() == {"malformed": 2}


def test_counting_since_the_last_training(store: Store) -> None:
    assert store.total("combat") == SlotTotal("combat", 0, 0)
    store.add_batch("pi", batch(1, 5))
    store.trained("combat", 5)
    store.add_batch("pi", batch(6, 8))
    assert store.total("combat") == SlotTotal("combat", 8, 3)


def test_training_rows_are_the_newest(store: Store) -> None:
    for number, first in enumerate((1, 5, 9)):
        store.add_batch("pi", batch(first, first + 3), now=float(number))
    rows = store.training_rows("combat", 5)
    assert sorted(row.step for row in rows) == [8, 9, 10, 11, 12]
    assert {row.battle for row in rows} == {"pi/b2", "pi/b3"}
    assert rows[0].propensity is None
    assert rows[0].taken is False
    assert store.training_rows("movement", 5) == []


def test_statistics_count_battles_by_the_version_that_decided(store: Store) -> None:
    ends = [
        transition(1, battle="x", done=True, reward=1.0, version=1),
        transition(2, battle="x", actor="b", done=True, reward=1.0, version=1),
        transition(3, battle="y", done=True, reward=-1.0, version=2),
        transition(4, battle="z", done=True, reward=1.0, taken=True, version=2),
        transition(5, battle="w", done=True, truncated=True, reward=1.0, version=2),
        transition(6, battle="v", done=False, reward=1.0, version=2),
        transition(7, battle="u", done=True, reward=1.0, version=2),
    ]
    store.add_batch("pi", TransitionBatch(epoch="e", acked=0, first=1, last=7, transitions=ends))
    assert store.statistics() == [Record("combat", None, 1, 1), Record("combat", 1, 1, 1), Record("combat", 2, 2, 1)]


def test_devices_keep_what_they_said_last(store: Store) -> None:
    status = Status(at=1.0, agent_version="1", runtime="r", slots={"combat": SlotStatus(phase="serving", ready=True)})
    telemetry = Telemetry(at=2.0, uptime_s=3.0)
    store.add_reports({"pi": Sighting(10.0, status=status)}, [], [])
    store.add_reports({"pi": Sighting(11.0, online=True, telemetry=telemetry)}, [("pi", 11.0, telemetry)], [])
    store.add_reports({"pi": Sighting(12.0, online=False), "b": Sighting(12.0)}, [], [])
    other, pi = store.devices()
    assert tuple(pi) == ("pi", 12.0, False, status, telemetry)
    assert tuple(other) == ("b", 12.0, None, None, None)


def test_histories_are_read_newest_last_and_pruned(store: Store) -> None:
    events = [("pi", float(at), Event(at=float(at), kind=f"k{at}")) for at in range(3)]
    telemetry = [("pi", float(at), Telemetry(at=float(at), uptime_s=0.0)) for at in range(3)]
    store.add_reports({"pi": Sighting(3.0)}, telemetry, [*events, ("other", 9.0, Event(at=9.0, kind="else"))])
    assert [row.event.kind for row in store.events(2)] == ["k2", "else"]
    assert [row.event.kind for row in store.events(2, "pi")] == ["k1", "k2"]
    assert [each.at for each in store.telemetry("pi", 2)] == [1.0, 2.0]
    store.prune(telemetry_before=2.0, events_before=1.0)
    assert [each.at for each in store.telemetry("pi", 9)] == [2.0]
    assert [row.event.kind for row in store.events(9, "pi")] == ["k1", "k2"]


def test_outcomes_count_each_device_once(store: Store) -> None:
    said = [
        ("pi1", "committed", "combat", 1),
        ("pi1", "committed", "combat", 1),
        ("pi2", "committed", "combat", 1),
        ("pi2", "rolled_back", "combat", 1),
        ("pi1", "refused", "combat", 2),
        ("pi1", "pinned", "movement", 1),
        ("pi1", "staged", "combat", 3),
        ("pi1", "refused", "combat", None),
    ]
    events = [
        (device, 1.0, Event(at=1.0, kind=kind, slot=slot, version=version)) for device, kind, slot, version in said
    ]
    store.add_reports({"pi1": Sighting(1.0)}, [], events)
    assert store.outcomes() == {
        ("combat", 1): {"committed": 2, "rolled_back": 1},
        ("combat", 2): {"refused": 1},
        ("movement", 1): {"pinned": 1},
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"seq": 0}, "outside_its_batch"),
        ({"seq": 9}, "outside_its_batch"),
        ({"seq": 2**60}, "number_out_of_range"),
        ({"action": -1}, "number_out_of_range"),
        ({"reward": float("nan")}, "not_finite"),
        ({"at": float("inf")}, "not_finite"),
        ({"propensity": float("nan")}, "not_finite"),
        ({"propensity": 0.5}, None),
        ({"battle": "a\0b"}, "bad_name"),
    ],
)
def test_unfit(fields: dict[str, object], reason: str | None) -> None:
    assert unfit(transition(2, **fields), batch(1, 3)) == reason


def test_a_newer_schema_is_misconfigured(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'host.db'}"
    Database(url).close()
    with sqlite3.connect(tmp_path / "host.db") as connection:
        connection.execute("UPDATE schema_mark SET version = 99")
    with pytest.raises(Misconfigured, match=r"schema 99.*knows 1"):
        Database(url)


@pytest.mark.parametrize("url", ["nonsense", "nobase://x", "sqlite:///{folder}/file/host.db", "sqlite:///{folder}"])
def test_a_wrong_url_is_misconfigured(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured):
        Database(url.format(folder=tmp_path))


def test_a_file_that_is_no_database_is_misconfigured(tmp_path: Path) -> None:
    (tmp_path / "host.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(Misconfigured, match="not a database"):
        Database(f"sqlite:///{tmp_path / 'host.db'}")


def test_another_dialect_gets_its_own_statements() -> None:
    rows = NewRows(postgresql.insert(tables.transitions).on_conflict_do_nothing(), PGDialect_psycopg())  # type: ignore[no-untyped-call]
    taken: list[object] = []

    class Driver:
        def exec_driver_sql(self, text: str, values: object) -> None:
            taken.extend((text, values))

    names = [column.name for column in tables.transitions.columns]
    rows.add(Driver(), [tuple(range(len(names)))])  # type: ignore[arg-type]
    assert "ON CONFLICT DO NOTHING" in str(taken[0])
    assert "%(device)s" in str(taken[0])
    assert taken[1] == [dict(zip(names, range(len(names)), strict=True))]


def test_commits_are_durable_and_readers_do_not_block_writers(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'host.db'}")
    with database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert Store(database).add_batch("pi", batch(1, 2)) == 2
    database.close()
