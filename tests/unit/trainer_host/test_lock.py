from __future__ import annotations

import fcntl
import time
from pathlib import Path

import pytest

from protocol.errors import Misconfigured
from trainer_host import lock
from trainer_host.lock import is_running, only_daemon


def test_a_folder_has_one_daemon_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert not is_running(folder)
    with only_daemon(folder):
        assert is_running(folder)
        with pytest.raises(Misconfigured, match="another trainer-host is running"), only_daemon(folder):
            pass
        assert is_running(folder)
    assert not is_running(folder)
    with only_daemon(folder):
        assert is_running(folder)


def test_who_only_asks_does_not_keep_a_daemon_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_daemon(tmp_path):
        pass
    with (tmp_path / lock.NAME).open() as asking:
        fcntl.flock(asking, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(asking, fcntl.LOCK_UN))
        with only_daemon(tmp_path):
            assert is_running(tmp_path)


def test_a_folder_that_cannot_be_made_is_misconfigured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match="cannot write"), only_daemon(tmp_path / "file" / "state"):
        pass
