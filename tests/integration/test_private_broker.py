"""The broker that demo, tests and benchmarks stand on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import Misconfigured, Unavailable
from trainer_host import private_broker
from trainer_host.private_broker import PrivateBroker


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def test_it_runs_within_the_context_and_no_longer(tmp_path: Path) -> None:
    with PrivateBroker(tmp_path / "with a space") as broker:
        assert accepts(broker.port)
        assert broker.pid is not None
        assert broker.start() is broker
        port = broker.port
    assert not accepts(port)
    assert broker.pid is None
    broker.stop()
    assert f"on port {port}" in broker.log_path.read_text()


def test_it_comes_back_on_its_port(tmp_path: Path) -> None:
    broker = PrivateBroker(tmp_path)
    port = broker.start().port
    broker.stop()
    assert broker.start().port == port
    assert accepts(port)
    broker.stop()


def test_two_do_not_disturb_each_other(tmp_path: Path) -> None:
    with PrivateBroker(tmp_path / "a") as one, PrivateBroker(tmp_path / "b") as other:
        assert one.port != other.port


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with PrivateBroker(tmp_path / "a") as broker, pytest.raises(Misconfigured, match=f"port {broker.port} "):
        PrivateBroker(tmp_path / "b", broker.port).start()


def test_a_missing_mosquitto_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(private_broker, "FOLDERS", ())
    with pytest.raises(Misconfigured, match=r"not installed\. Install it with: "):
        PrivateBroker(tmp_path).start()


def test_one_that_ends_at_once_has_its_last_words_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mosquitto"
    program.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Unavailable, match=r"status 3: .*out of luck"):
        PrivateBroker(tmp_path / "run").start()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_can_run_it(tmp_path: Path) -> None:
    home = Path("/var/tmp") / f"edgeswap-test-{os.getpid()}"  # noqa: S108  # a user cannot enter root's own folders
    home.mkdir(mode=0o755)
    try:
        root = Path(private_broker.__file__).parents[1]
        for part in ("protocol/__init__.py", "protocol/errors.py", "trainer_host/__init__.py"):
            (home / part).parent.mkdir(exist_ok=True)
            shutil.copy(root / part, home / part)
        shutil.copy(private_broker.__file__, home / "trainer_host")
        (home / "run").mkdir()
        os.chown(home / "run", 65534, 65534)
        code = (
            # All modules first: nobody may read the library of a Python that lies in root's home.
            "import encodings.idna, os; from pathlib import Path\n"
            "from trainer_host.private_broker import PrivateBroker\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "with PrivateBroker(Path('run')) as broker: print('runs as', os.getuid())"
        )
        ended = subprocess.run(
            [sys.executable, "-B", "-c", code], cwd=home, capture_output=True, text=True, timeout=30, check=False
        )
        assert ended.stdout == "runs as 65534\n", ended.stderr
    finally:
        shutil.rmtree(home)
