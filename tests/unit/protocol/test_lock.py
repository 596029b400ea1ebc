from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from protocol.errors import Misconfigured, Unavailable
from protocol.lock import is_running, lock_file, only_daemon

PROGRAM = "some-daemon"


def test_a_folder_has_one_daemon_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert not is_running(folder, PROGRAM)
    with only_daemon(folder, PROGRAM):
        assert is_running(folder, PROGRAM)
        with pytest.raises(Unavailable, match="another some-daemon is running"), only_daemon(folder, PROGRAM):
            pass
        assert is_running(folder, PROGRAM)
    assert not is_running(folder, PROGRAM)
    with only_daemon(folder, PROGRAM):
        assert is_running(folder, PROGRAM)


def test_who_only_asks_does_not_keep_a_daemon_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_daemon(tmp_path, PROGRAM):
        pass
    with lock_file(tmp_path, PROGRAM).open() as asking:
        fcntl.flock(asking, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(asking, fcntl.LOCK_UN))
        with only_daemon(tmp_path, PROGRAM):
            assert is_running(tmp_path, PROGRAM)


def test_a_folder_that_cannot_be_made_is_misconfigured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match="cannot use"), only_daemon(tmp_path / "file" / "state", PROGRAM):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EMFILE])
def test_what_a_disk_or_a_crowd_refuses_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refusing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(Unavailable, match=os.strerror(number)), only_daemon(tmp_path, PROGRAM):
        pass
