from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.durable import (
    OS_DISK,
    disk_errors,
    open_folder,
    remove_leftovers,
    require_free,
    unusable,
    write_durably,
    write_pieces,
)
from protocol.errors import Misconfigured, Unavailable


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_written_and_replaced(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "model"
    write_durably(path, b"one", sync=sync)
    write_durably(path, b"", sync=sync)
    assert path.read_bytes() == b""
    write_pieces(path, (part for part in (b"two", b"", b" three")), 9, sync=sync)
    assert path.read_bytes() == b"two three"
    assert names(tmp_path) == ["model"]


def test_on_a_full_disk_the_file_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_durably(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(Unavailable, match=r"100000 bytes needed, \d+ free"):
            write_durably(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model"]


def test_an_error_in_the_pieces_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the other half")

    path = tmp_path / "model"
    write_durably(path, b"old")
    with pytest.raises(KeyError):
        write_pieces(path, pieces(), 8)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model"]


def test_a_folder_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot write"):
        write_durably(tmp_path / "gone" / "model", b"x")
    with disk_errors(tmp_path, 0):
        OS_DISK.sync_folder(tmp_path)


def test_room_is_asked_for_with_figures(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    require_free(tmp_path, free // 2)
    require_free(tmp_path, free // 4, free // 4)
    for needed, reserve in ((free * 2, 0), (1, free * 2)):
        with pytest.raises(
            Unavailable, match=rf"needs {needed} bytes and a reserve of {reserve}, but \d+ bytes are free"
        ):
            require_free(tmp_path, needed, reserve)


def test_only_half_written_files_are_leftovers(tmp_path: Path) -> None:
    for name in (".a.new", ".b.c.new", "a.new", ".a", "a"):
        (tmp_path / name).write_bytes(b"half")
    assert remove_leftovers(tmp_path) == 2
    assert names(tmp_path) == [".a", "a", "a.new"]


def test_a_folder_is_opened_clean_and_one_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".a.new").write_bytes(b"half")
    open_folder(tmp_path / "there")
    open_folder(tmp_path / "new")
    assert (names(tmp_path), names(tmp_path / "there")) == (["new", "there"], [])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="cannot make"):
        open_folder(tmp_path / "file" / "below")


def test_a_folder_is_made_with_those_above_it_once(tmp_path: Path) -> None:
    for _ in range(2):
        OS_DISK.make_folder(tmp_path / "a" / "b" / "c")
    assert OS_DISK.is_folder(tmp_path / "a" / "b" / "c")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="exists"):
        OS_DISK.make_folder(tmp_path / "file")


def test_writing_over_a_file_leaves_what_lies_behind(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"0123456789")
    OS_DISK.overwrite(path, b"abc", sync=True)
    assert path.read_bytes() == b"abc3456789"
    with pytest.raises(FileNotFoundError):
        OS_DISK.overwrite(tmp_path / "none", b"abc", sync=False)


def test_room_is_reserved_and_written_over_where_one_wants(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"older")
    OS_DISK.reserve(path, 10_000)
    assert path.read_bytes() == bytes(10_000)
    if sys.platform == "linux":
        assert path.stat().st_blocks * 512 >= 10_000
    OS_DISK.overwrite(path, b"abc", sync=False, at=5_000)
    assert path.read_bytes() == bytes(5_000) + b"abc" + bytes(4_997)


def test_kill_9_while_writing_leaves_a_leftover_and_no_file(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom protocol.durable import write_pieces\n"
        "def pieces():\n    yield b'half'\n    os.kill(os.getpid(), 9)\n"
        "write_pieces(Path(sys.argv[1]) / 'model', pieces(), 8)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    assert names(tmp_path) == [".model.new"]
    assert (remove_leftovers(tmp_path), names(tmp_path)) == (1, [])


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, Misconfigured),
        (errno.EPERM, Misconfigured),
        (errno.ENOTDIR, Misconfigured),
        (errno.EEXIST, Misconfigured),
        (errno.EIO, Unavailable),
        (errno.EDQUOT, Unavailable),
        (errno.EMFILE, Unavailable),
        (errno.EROFS, Unavailable),
        (errno.ENOSPC, Unavailable),
    ],
)
def test_only_what_a_person_can_mend_is_misconfigured(number: int, kind: type[Exception]) -> None:
    refusal = unusable(Path("folder"), OSError(number, os.strerror(number)))
    assert type(refusal) is kind
    assert os.strerror(number) in str(refusal)
