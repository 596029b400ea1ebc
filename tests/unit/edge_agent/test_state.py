from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.state import StateStore, read_history
from protocol.errors import Unavailable
from protocol.messages import Event, Verdict


def event(number: int, slot: str = "combat") -> Event:
    return Event(at=float(number), kind="staged", slot=slot, text=f"number {number}")


def test_a_slots_state_is_the_last_one_saved(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = StateStore(path)
    assert store.load("combat") is None
    store.save("combat", b"one")
    store.save("combat", b"\0two")
    store.save("movement", b"other")
    for opened in (store, StateStore(path)):
        assert (opened.load("combat"), opened.load("movement"), opened.load("skill")) == (b"\0two", b"other", None)


def test_a_saved_state_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom edge_agent.state import StateStore\n"
        "store = StateStore(Path(sys.argv[1]))\nstore.mark_running()\nstore.save('combat', b'kept')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -9
    store = StateStore(path)
    assert store.load("combat") == b"kept"
    assert store.mark_running() is False


def test_whether_the_last_run_ended_well(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first = StateStore(path)
    assert first.mark_running() is True
    first.mark_stopped()
    first.close()
    second = StateStore(path)
    assert second.mark_running() is True
    second.close()
    assert StateStore(path).mark_running() is False


def test_the_newest_events_the_oldest_of_them_first(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state.db")
    assert store.history(5) == []
    for number in range(6):
        store.add_event(event(number, "combat" if number % 2 else "movement"))
    assert [found.at for found in store.history(3)] == [3.0, 4.0, 5.0]
    assert [found.at for found in store.history(2, "movement")] == [2.0, 4.0]
    assert store.history(100)[0] == event(0, "movement")
    assert store.history(0) == store.history(-1) == store.history(9, "skill") == []


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
    store = StateStore(tmp_path / "state.db")
    store.add_event(judged)
    assert store.history(1) == [judged]


def test_the_trail_is_bounded(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state.db", max_events=3)
    for number in range(10):
        store.add_event(event(number))
    assert [found.at for found in store.history(100)] == [7.0, 8.0, 9.0]
    store.close()
    store = StateStore(tmp_path / "state.db", max_events=3)
    store.add_event(event(10))
    assert [found.at for found in store.history(100)] == [8.0, 9.0, 10.0]


def test_a_damaged_file_is_set_aside_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"garbage" * 1000)
    store = StateStore(path)
    assert store.set_aside == tmp_path / "state.db.corrupt-1"
    assert store.load("combat") is None
    assert store.mark_running() is True
    store.save("combat", b"new")
    assert StateStore(path).load("combat") == b"new"


def test_states_survive_a_file_that_is_damaged_while_the_agent_runs(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = StateStore(path)
    store.mark_running()
    store.save("combat", b"kept")
    with sqlite3.connect(path) as other:  # everything into the main file, so that the log cannot mend it
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.write(b"\xa5" * path.stat().st_size)
    with pytest.raises(Unavailable, match="damaged"):
        store.save("movement", b"lost")
    assert store.set_aside is not None
    store.save("movement", b"saved")
    again = StateStore(path)
    assert (again.load("combat"), again.load("movement")) == (b"kept", b"saved")
    assert again.mark_running() is False


def test_a_state_that_could_not_be_saved_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = StateStore(path)
    store.save("combat", b"old")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable):
        store.save("combat", b"new")
    holder.close()
    assert store.load("combat") == b"old"


def test_history_is_read_from_outside_while_the_agent_runs(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = StateStore(path)
    store.add_event(event(1))
    assert read_history(path, 5) == [event(1)]
    store.close()
    assert read_history(path, 5, "combat") == [event(1)]
    assert read_history(path, 5, "movement") == []


def test_history_of_an_agent_that_never_ran_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot read"):
        read_history(tmp_path / "state.db", 5)
    assert list(tmp_path.iterdir()) == []
