from __future__ import annotations

import resource
import sqlite3
from pathlib import Path

import pytest

from edge_agent.trail import Trail, read_history
from protocol.errors import Unavailable
from protocol.messages import Event, Verdict


def event(number: int, slot: str = "combat") -> Event:
    return Event(at=float(number), kind="staged", slot=slot, text=f"number {number}")


def test_the_newest_events_the_oldest_of_them_first(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "trail.db")
    assert trail.history(5) == []
    for number in range(6):
        trail.add(event(number, "combat" if number % 2 else "movement"))
    assert [found.at for found in trail.history(3)] == [3.0, 4.0, 5.0]
    assert [found.at for found in trail.history(2, "movement")] == [2.0, 4.0]
    assert trail.history(100)[0] == event(0, "movement")
    assert trail.history(0) == trail.history(-1) == trail.history(9, "skill") == []


def test_an_event_keeps_its_verdict(tmp_path: Path) -> None:
    verdict = Verdict(
        outcome="rollback",
        pairs=41,
        slower=40,
        passed=1,
        evidence=1e4,
        acceptance=0.1,
        ratio_median=1.3,
        old_us_p50=10.0,
        old_us_p99=20.0,
        new_us_p50=13.0,
        new_us_p99=26.0,
        tail_up={2: 3},
    )
    judged = Event(at=1.0, kind="rolled_back", slot="combat", model="ab", version=3, reason="latency", verdict=verdict)
    trail = Trail(tmp_path / "trail.db")
    trail.add(judged)
    assert trail.history(1) == [judged]


def test_the_trail_is_bounded(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "trail.db", max_events=3)
    for number in range(10):
        trail.add(event(number))
    assert [found.at for found in trail.history(100)] == [7.0, 8.0, 9.0]
    trail.close()
    trail = Trail(tmp_path / "trail.db", max_events=3)
    trail.add(event(10))
    assert [found.at for found in trail.history(100)] == [8.0, 9.0, 10.0]


def test_history_is_read_from_outside_while_the_agent_runs(tmp_path: Path) -> None:
    path = tmp_path / "trail.db"
    trail = Trail(path)
    trail.add(event(1))
    assert read_history(path, 5) == [event(1)]
    trail.close()
    assert read_history(path, 5, "combat") == [event(1)]
    assert read_history(path, 5, "movement") == []


def test_history_of_an_agent_that_never_ran_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot read"):
        read_history(tmp_path / "trail.db", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_set_aside_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "trail.db"
    path.write_bytes(b"garbage" * 1000)
    trail = Trail(path)
    assert trail.set_aside == tmp_path / "trail.db.corrupt-1"
    trail.add(event(1))
    assert trail.history(9) == [event(1)]


def test_on_a_full_disk_there_is_none_until_there_is_room(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        trail = Trail(tmp_path / "trail.db")
        with pytest.raises(Unavailable):
            trail.add(event(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trail.add(event(2))
    assert trail.history(9) == [event(2)]


def test_an_event_that_rotted_or_that_a_newer_version_wrote_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trail.db"
    trail = Trail(path)
    for number in range(3):
        trail.add(event(number))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE events SET blob = X'FFFF' WHERE number = 2")
    connection.close()
    assert [found.at for found in trail.history(9)] == [0.0, 2.0]
    assert [found.at for found in read_history(path, 9)] == [0.0, 2.0]
