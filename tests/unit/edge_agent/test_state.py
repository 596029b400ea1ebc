from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.state import SLOT_BYTES, StateStore
from protocol.errors import Misconfigured, Unavailable

SLOTS = ("combat", "movement")


def opened(folder: Path) -> StateStore:
    return StateStore(folder, SLOTS)


def copies(folder: Path, slot: str = "combat") -> list[Path]:
    return [folder / f"slot-{slot}.{number}" for number in (0, 1)]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond its first byte: writing over what is there still works on a real full disk, and here."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_slots_state_is_the_last_one_saved(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.load("combat") is None
    store.save("combat", b"one")
    store.save("combat", b"\0two")
    store.save("movement", b"other")
    for again in (store, opened(tmp_path)):
        assert (again.load("combat"), again.load("movement"), again.lost) == (b"\0two", b"other", ())
    for number in range(5):
        store.save("combat", bytes([number]))
        assert opened(tmp_path).load("combat") == bytes([number])


def test_a_saved_state_survives_kill_9(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom edge_agent.state import StateStore\n"
        "store = StateStore(Path(sys.argv[1]), ['combat'])\nstore.mark_running()\nstore.save('combat', b'kept')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    store = opened(tmp_path)
    assert store.load("combat") == b"kept"
    assert store.mark_running() is False


def test_whether_the_last_run_ended_well(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert first.mark_running() is True
    first.mark_stopped()
    assert opened(tmp_path).mark_running() is True
    assert opened(tmp_path).mark_running() is False


def test_a_save_takes_no_room(tmp_path: Path) -> None:
    store = opened(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for number in range(4):
        store.save("combat", b"x" * 1000 * number)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == sizes


def test_a_torn_copy_leaves_the_state_before(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save("combat", b"before")
    store.save("combat", b"after")
    newest = max(copies(tmp_path), key=lambda path: path.read_bytes()[32:40])
    newest.write_bytes(newest.read_bytes()[:46].ljust(SLOT_BYTES, b"\xff"))
    again = opened(tmp_path)
    assert (again.load("combat"), again.lost) == (b"before", ())
    again.save("combat", b"third")
    assert opened(tmp_path).load("combat") == b"third"


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"\xff" * SLOT_BYTES])
def test_a_state_without_a_valid_copy_is_lost_set_aside_and_can_be_saved_again(tmp_path: Path, damage: bytes) -> None:
    opened(tmp_path).save("combat", b"gone")
    for copy in copies(tmp_path):
        copy.write_bytes(b"?" + damage)
    store = opened(tmp_path)
    assert (store.load("combat"), store.lost) == (None, ("combat",))
    assert [copy.with_name(f"{copy.name}.corrupt").read_bytes() for copy in copies(tmp_path)] == [b"?" + damage] * 2
    store.save("combat", b"new")
    again = opened(tmp_path)
    assert (again.load("combat"), again.lost) == (b"new", ())


def test_a_state_that_could_not_be_saved_is_not_loaded(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save("combat", b"before")
    with full_disk(), pytest.raises(Unavailable):
        store.save("combat", b"after")
    assert store.load("combat") == opened(tmp_path).load("combat") == b"before"
    store.save("combat", b"after")
    assert opened(tmp_path).load("combat") == b"after"


def test_a_first_start_on_a_full_disk_is_made_up_for_when_there_is_room(tmp_path: Path) -> None:
    with full_disk():
        store = opened(tmp_path)
        assert store.mark_running() is True
        with pytest.raises(Unavailable):
            store.save("combat", b"state")
    store.save("combat", b"state")
    again = opened(tmp_path)
    assert (again.load("combat"), again.lost) == (b"state", ())


def test_a_state_beyond_its_place_is_our_bug_to_hear_of(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="do not fit"):
        opened(tmp_path).save("combat", bytes(SLOT_BYTES))


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".run.0.new").write_bytes(b"half")
    opened(tmp_path)
    assert not (tmp_path / ".run.0.new").exists()


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        opened(tmp_path / "file" / "state")
