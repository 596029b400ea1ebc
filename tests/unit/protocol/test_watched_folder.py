from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from protocol import watched_folder
from protocol.errors import Misconfigured
from protocol.watched_folder import LOOK_S, Settling, Stamp, WatchedFolder

A, B = Stamp(10, 1), Stamp(20, 2)


def test_a_thing_is_complete_when_it_has_been_still() -> None:
    settling = Settling(2.0)
    assert settling.look({"a": A}, 0.0) == []
    assert settling.waiting
    assert settling.look({"a": A}, 1.9) == []
    assert settling.look({"a": A, "b": B}, 2.0) == ["a"]
    assert settling.look({"a": A, "b": B}, 9.0) == ["a", "b"]
    assert settling.look({}, 10.0) == []
    assert not settling.waiting


@pytest.mark.parametrize("changed", [Stamp(99, 1), Stamp(10, 9)])
def test_one_that_changes_begins_anew(changed: Stamp) -> None:
    settling = Settling(2.0)
    settling.look({"a": A}, 0.0)
    assert settling.look({"a": changed}, 2.0) == []
    assert settling.look({"a": changed}, 3.9) == []
    assert settling.look({"a": changed}, 4.0) == ["a"]


def test_one_that_went_away_in_between_begins_anew() -> None:
    settling = Settling(1.0)
    settling.look({"a": A}, 0.0)
    settling.look({}, 0.5)
    assert settling.look({"a": A}, 1.5) == []


def each(files: Mapping[str, Stamp]) -> Mapping[str, Stamp]:
    return files


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[WatchedFolder]:
    made = WatchedFolder(tmp_path / "inbox", ("part",), 0.0, each)
    made.start()
    yield made
    made.close()


def test_watchdog_wakes_the_loop(watched: WatchedFolder) -> None:
    assert watched.ready(0.0) == []
    (watched.folder / "a").touch()
    readable, _, _ = select.select([watched], [], [], 10.0)
    assert readable
    assert watched.ready(1.0) == []  # it is not time to look
    watched.changed()
    assert watched.ready(1.0) == ["a"]


def test_without_news_it_looks_now_and_then(watched: WatchedFolder) -> None:
    watched.ready(0.0)
    (watched.folder / "a").touch()
    assert watched.ready(LOOK_S - 0.1) == []
    assert watched.ready(LOOK_S) == ["a"]


def test_where_nothing_can_be_watched_it_looks_all_the_same(tmp_path: Path) -> None:
    watched = WatchedFolder(tmp_path / "inbox", (), 0.0, each)
    watched.folder.rmdir()
    watched.start()
    watched.folder.mkdir()
    (watched.folder / "a").touch()
    assert watched.ready(0.0) == ["a"]
    watched.close()


def test_links_folders_and_hidden_files_are_passed_over(watched: WatchedFolder, tmp_path: Path) -> None:
    (watched.folder / ".hidden").touch()
    (tmp_path / "elsewhere").touch()
    (watched.folder / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(watched.folder / "pipe")
    assert watched.ready(0.0) == []


def test_a_crowd_is_looked_at_in_part(watched: WatchedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_folder, "MAX_FILES", 3)
    for number in range(5):
        (watched.folder / str(number)).touch()
    assert len(watched.ready(0.0)) == 3


def test_a_folder_that_vanishes_is_no_crash(watched: WatchedFolder) -> None:
    (watched.folder / "part").rmdir()
    watched.folder.rmdir()
    assert watched.ready(0.0) == []


def test_an_impossible_folder_is_misconfigured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured):
        WatchedFolder(tmp_path / "file" / "inbox", (), 1.0, each)


def test_a_folder_that_a_full_disk_has_no_room_for_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        watched = WatchedFolder(tmp_path / "inbox", ("part",), 0.0, each)
        watched.start()
        assert watched.ready(0.0) == []
    assert watched.ready(LOOK_S - 1.0) == []
    assert not watched.folder.exists()
    assert watched.ready(LOOK_S) == []
    assert (watched.folder / "part").is_dir()
    (watched.folder / "a").touch()
    assert watched.ready(2 * LOOK_S) == ["a"]
    watched.close()
