from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.durable import disk_errors, remove_leftovers, require_free, sync_folder, write_durably, write_pieces
from protocol.errors import Unavailable


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
        sync_folder(tmp_path)


def test_room_is_asked_for_with_figures(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    require_free(tmp_path, free // 2)
    require_free(tmp_path, free // 4, free // 4)
    for needed, reserve in ((free * 2, 0), (1, free * 2)):
        with pytest.raises(
            Unavailable, match=rf"needs {needed} bytes and a reserve of {reserve}, but \d+ bytes are free"
        ):
            require_free(tmp_path, needed, reserve)


def test_only_files_whose_writer_is_gone_are_leftovers(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    for name in (f".a.{writer.pid}-00ff.tmp", f".a.{os.getpid()}-00ff.tmp", ".a.1-00ff.tmp", ".a.b.tmp", "a.tmp", "a"):
        (tmp_path / name).write_bytes(b"half")
    assert remove_leftovers(tmp_path) == 1
    writer.communicate()
    assert remove_leftovers(tmp_path) == 1
    assert names(tmp_path) == [".a.1-00ff.tmp", ".a.b.tmp", "a", "a.tmp"]


def test_kill_9_while_writing_leaves_a_leftover_and_no_file(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom edge_agent.durable import write_pieces\n"
        "def pieces():\n    yield b'half'\n    os.kill(os.getpid(), 9)\n"
        "write_pieces(Path(sys.argv[1]) / 'model', pieces(), 8)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".model.")
    assert (remove_leftovers(tmp_path), names(tmp_path)) == (1, [])
