"""The simulated disk is as bad as it says, no worse, and without faults as good as the real one."""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.durable import OS_DISK, Disk, write_durably
from protocol.errors import Unavailable
from tests.simulation.device.disk import SECTOR_BYTES, Killed, Medium, PowerCut, SimulatedDisk

FOLDER = Path("/state")
FILE = FOLDER / "file"
OLD, NEW = b"o" * (3 * SECTOR_BYTES), b"n" * (3 * SECTOR_BYTES)


def made(seed: int = 0, capacity_bytes: int = 10**6) -> tuple[Medium, SimulatedDisk]:
    """A medium with an empty folder that is durable, and a healthy process."""
    medium = Medium(capacity_bytes, random.Random(seed))
    disk = SimulatedDisk(medium)
    disk.make_folder(FOLDER)
    disk.sync_folder(Path("/"))
    return medium, disk


def after_cuts(write: Callable[[SimulatedDisk], object], *, before: bytes | None = None) -> set[bytes | None]:
    """What a file may hold after a power cut that comes when `write` is done."""
    found: set[bytes | None] = set()
    for seed in range(200):
        medium, disk = made(seed)
        if before is not None:
            disk.write(FILE, [before], sync=True)
            disk.sync_folder(FOLDER)
        write(disk)
        medium.cut()
        disk = SimulatedDisk(medium)
        found.add(disk.read(FILE) if disk.is_file(FILE) else None)
    return found


def test_what_is_synced_with_its_name_survives() -> None:
    def write(disk: SimulatedDisk) -> None:
        disk.write(FILE, [NEW], sync=True)
        disk.sync_folder(FOLDER)

    assert after_cuts(write) == {NEW}


def test_a_name_that_was_not_synced_may_be_lost_with_its_content() -> None:
    assert after_cuts(lambda disk: disk.write(FILE, [NEW], sync=True)) == {None, NEW}


def test_content_that_was_not_synced_may_be_lost_old_short_or_have_holes() -> None:
    def write(disk: SimulatedDisk) -> None:
        disk.write(FILE, [NEW], sync=False)
        disk.sync_folder(FOLDER)

    found = after_cuts(write)
    assert {b"", NEW} < found
    assert any(content and NEW.startswith(content) and content != NEW for content in found)
    assert any(content and len(content) == len(NEW) and b"\0" in content and b"n" in content for content in found)
    assert OLD in after_cuts(write, before=OLD)


def test_a_file_that_was_renamed_into_place_may_lack_its_content() -> None:
    def write(disk: SimulatedDisk) -> None:
        disk.write(FOLDER / "new", [NEW], sync=False)
        disk.rename(FOLDER / "new", FILE)
        disk.sync_folder(FOLDER)

    found = after_cuts(write, before=OLD)
    assert {b"", NEW} < found
    assert OLD not in found


def test_an_overwritten_file_tears_by_sector_and_never_has_holes() -> None:
    found = after_cuts(lambda disk: disk.overwrite(FILE, NEW, sync=False), before=OLD)
    assert {OLD, NEW} < found
    assert found <= {a + b + c for a in sectors(b"on") for b in sectors(b"on") for c in sectors(b"on")}, (
        "each sector is old or new"
    )
    assert after_cuts(lambda disk: disk.overwrite(FILE, NEW, sync=True), before=OLD) == {NEW}


def sectors(letters: bytes) -> Iterator[bytes]:
    for letter in letters:
        yield bytes([letter]) * SECTOR_BYTES


def test_an_overwritten_file_may_hold_what_was_there_in_between() -> None:
    def write(disk: SimulatedDisk) -> None:
        disk.overwrite(FILE, b"i" * len(OLD), sync=False)
        disk.overwrite(FILE, NEW, sync=False)

    letters = {letter for content in after_cuts(write, before=OLD) for letter in content or b""}
    assert letters == set(b"oin")


def test_the_changes_in_a_folder_survive_in_their_order() -> None:
    found = set()
    for seed in range(100):
        medium, disk = made(seed)
        for name in "abc":
            disk.write(FOLDER / name, [b""], sync=True)
        disk.remove(FOLDER / "a")
        medium.cut()
        found.add("".join(sorted(SimulatedDisk(medium).names(FOLDER))))
    assert found == {"", "a", "ab", "abc", "bc"}


def test_a_file_that_moves_between_folders_is_never_lost() -> None:
    found = set()
    for seed in range(100):
        medium, disk = made(seed)
        disk.make_folder(FOLDER / "other")
        disk.write(FILE, [NEW], sync=True)
        disk.sync_folder(FOLDER)
        disk.rename(FILE, FOLDER / "other" / "file")
        medium.cut()
        disk = SimulatedDisk(medium)
        found.add((disk.is_file(FILE), disk.is_file(FOLDER / "other" / "file")))
    assert found == {(True, False), (True, True), (False, True)}


def test_a_folder_that_was_not_synced_into_its_parent_may_be_lost_with_all_in_it() -> None:
    inner = FOLDER / "inner"
    found = set()
    for seed in range(50):
        medium, disk = made(seed)
        with pytest.raises(Killed):
            SimulatedDisk(medium, fail_at("sync_folder", Killed())).make_folder(inner)
        write_durably(inner / "file", NEW, disk=disk)
        medium.cut()
        found.add(SimulatedDisk(medium).is_file(inner / "file"))
    assert found == {True, False}


def test_a_sync_that_failed_is_not_made_good_by_the_next() -> None:
    def write(disk: SimulatedDisk) -> None:
        failing = SimulatedDisk(disk._medium, fail_at("sync", OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            failing.overwrite(FILE, NEW, sync=True)
        disk.write(FOLDER / "another", [], sync=True)
        assert disk.read(FILE) == NEW

    assert OLD in after_cuts(write, before=OLD)


def fail_at(call: str, error: BaseException) -> Callable[[str, str], None]:
    def step(found: str, _path: str) -> None:
        if found == call:
            raise error

    return step


def test_a_killed_process_leaves_what_it_wrote_and_does_nothing_more() -> None:
    medium, _ = made()
    killed = SimulatedDisk(medium, fail_at("sync", Killed()))
    with pytest.raises(Killed):
        killed.write(FILE, [NEW], sync=True)
    with pytest.raises(Killed):
        killed.remove(FILE)
    assert SimulatedDisk(medium).read(FILE) == NEW


def test_a_write_that_is_cut_short_has_written_some_sectors() -> None:
    lengths = set()
    for seed in range(50):
        medium, _ = made(seed)
        with pytest.raises(Killed):
            SimulatedDisk(medium, fail_at("write", Killed())).write(FILE, [NEW], sync=True)
        lengths.add(len(SimulatedDisk(medium).read(FILE)))
    assert lengths == {0, SECTOR_BYTES, 2 * SECTOR_BYTES, 3 * SECTOR_BYTES}


def test_a_power_cut_ends_every_process() -> None:
    medium, other = made()
    with pytest.raises(PowerCut):
        SimulatedDisk(medium, fail_at("create", PowerCut())).write(FILE, [NEW], sync=True)
    with pytest.raises(PowerCut):
        other.read(FILE)
    medium.cut()
    with pytest.raises(PowerCut):
        other.read(FILE)
    assert SimulatedDisk(medium).names(FOLDER) == []


def test_a_full_disk_refuses_what_is_too_much_and_takes_what_is_written_in_place() -> None:
    medium, disk = made(capacity_bytes=len(OLD) + 100)
    disk.write(FILE, [OLD], sync=True)
    assert disk.free_bytes(FOLDER) == 100
    with pytest.raises(Unavailable, match=f"{len(NEW)} bytes needed, 100 free"):
        write_durably(FOLDER / "more", NEW, disk=disk)
    assert disk.names(FOLDER) == ["file"], "and its temporary file is gone"
    disk.overwrite(FILE, NEW, sync=True)
    disk.remove(FILE)
    assert disk.free_bytes(FOLDER) == len(OLD) + 100
    medium.refusal = errno.EROFS
    with pytest.raises(Unavailable, match="Read-only"):
        write_durably(FILE, NEW, disk=disk)


def test_what_write_durably_wrote_survives_wherever_the_power_is_cut() -> None:
    """The first user of this disk: its promise holds at each of its steps, and not before its last."""
    ends = set()
    for seed in range(300):
        medium, disk = made(seed)
        write_durably(FILE, OLD, disk=disk)
        left = random.Random(seed).randint(0, 5)

        def step(call: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise PowerCut

        try:
            write_durably(FILE, NEW, disk=SimulatedDisk(medium, step))
        except PowerCut:
            ended = "cut"
        else:
            ended = "done"
        medium.cut()
        content = SimulatedDisk(medium).read(FILE)
        assert content in ({OLD, NEW} if ended == "cut" else {NEW})
        ends.add((ended, content))
    assert ends == {("cut", OLD), ("cut", NEW), ("done", NEW)}


PATHS = st.sampled_from(["a", "b", "in/a", "in/b", "in/deep/a", "in", "a/b"])
FOLDERS = st.sampled_from(["", "in", "in/deep", "a", "other/deeper"])
CONTENT = st.binary(max_size=40)


class Agreement(RuleBasedStateMachine):
    """The real disk and the simulated one, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.real_folder = Path(tempfile.mkdtemp())
        self.medium, self.simulated = made()

    def both(self, what: Callable[[Disk, Path], object]) -> None:
        results: list[tuple[int | None, object]] = []
        sides: list[tuple[Disk, Path]] = [(OS_DISK, self.real_folder), (self.simulated, FOLDER)]
        for disk, folder in sides:
            try:
                results.append((None, what(disk, folder)))
            except OSError as error:
                results.append((error.errno, None))
        assert results[0] == results[1]

    @rule(path=PATHS, pieces=st.lists(CONTENT, max_size=3), sync=st.booleans())
    def write(self, path: str, pieces: list[bytes], sync: bool) -> None:
        self.both(lambda disk, folder: disk.write(folder / path, pieces, sync=sync))

    @rule(path=PATHS, data=CONTENT, sync=st.booleans(), at=st.integers(0, 50))
    def overwrite(self, path: str, data: bytes, sync: bool, at: int) -> None:
        self.both(lambda disk, folder: disk.overwrite(folder / path, data, sync=sync, at=at))

    @rule(path=PATHS, size=st.integers(1, 50))
    def reserve(self, path: str, size: int) -> None:
        self.both(lambda disk, folder: disk.reserve(folder / path, size))

    @rule(path=PATHS, goal=PATHS)
    def rename(self, path: str, goal: str) -> None:
        if not any((self.real_folder / each).is_dir() for each in (path, goal)):  # a disk renames files, to files
            self.both(lambda disk, folder: disk.rename(folder / path, folder / goal))

    @rule(path=PATHS)
    def remove(self, path: str) -> None:
        self.both(lambda disk, folder: disk.remove(folder / path))

    @rule(path=PATHS)
    def read(self, path: str) -> None:
        self.both(lambda disk, folder: disk.read(folder / path))

    @rule(path=FOLDERS)
    def make_folder(self, path: str) -> None:
        self.both(lambda disk, folder: disk.make_folder(folder / path))

    @rule(path=FOLDERS)
    def sync_folder(self, path: str) -> None:
        self.both(lambda disk, folder: disk.sync_folder(folder / path))

    @rule(path=FOLDERS)
    def names(self, path: str) -> None:
        self.both(lambda disk, folder: sorted(disk.names(folder / path)))

    @rule(path=PATHS)
    def is_file(self, path: str) -> None:
        self.both(lambda disk, folder: disk.is_file(folder / path))

    @rule(path=PATHS)
    def is_folder(self, path: str) -> None:
        self.both(lambda disk, folder: disk.is_folder(folder / path))

    @invariant()
    def used_bytes_are_those_of_the_files(self) -> None:
        assert self.medium.used_bytes == sum(len(file.cached) for _, file in self.medium.files())

    def teardown(self) -> None:
        shutil.rmtree(self.real_folder)


TestAgreement = Agreement.TestCase
