from __future__ import annotations

import io
import logging
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.service import ServiceManager, journal_handler, notify, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """What systemd would be: NOTIFY_SOCKET's value, and the socket behind it."""
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract socket names are Linux's")
    name = str(tmp_path / "notify") if request.param == "path" else f"@{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(5)
        yield name, sock


def waiting(sock: socket.socket) -> list[str]:
    """Everything that has been sent."""
    sock.setblocking(False)
    found = []
    while True:
        try:
            found.append(sock.recv(4096).decode())
        except BlockingIOError:
            return found


def test_notify(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    assert notify({"NOTIFY_SOCKET": name}, READY="1", STATUS="serving\nREADY=0")
    assert waiting(sock) == ["READY=1\nSTATUS=serving READY=0"]


def test_nobody_is_told_where_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not notify({}, READY="1")
    assert not notify({"NOTIFY_SOCKET": "vsock:2:1"}, READY="1")
    assert not caplog.records
    assert not notify({"NOTIFY_SOCKET": str(tmp_path / "gone")}, READY="1")
    assert "does not take a notification" in caplog.text


def test_the_status_is_told_when_it_changes(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    service = ServiceManager({"NOTIFY_SOCKET": name})
    for turn, status in enumerate(["a", "a", "b", "b", "a"]):
        service.tell(turn, status=status, alive=True)
    assert waiting(sock) == ["STATUS=a", "STATUS=b", "STATUS=a"]


def test_the_watchdog_is_fed_in_time_and_only_when_alive(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    service = ServiceManager({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "9000000"})
    fed = []
    for at in range(100, 130):
        service.tell(at, status="s", alive=not 110 <= at < 115)
        fed += [at for message in waiting(sock) if message == "WATCHDOG=1"]
    assert fed == [100, 103, 106, 109, 115, 118, 121, 124, 127]


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    assert watchdog_interval_s({"WATCHDOG_USEC": "10000000"}, 7) == 10.0
    assert watchdog_interval_s({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "7"}, 7) == 10.0
    assert watchdog_interval_s({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "8"}, 7) is None
    for silent in ({}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}):
        assert watchdog_interval_s(silent, 7) is None


def logged(extra: dict[str, object]) -> str:
    handler = journal_handler({})
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(io.StringIO())
    logger = logging.Logger("edge_agent.slots")
    logger.addHandler(handler)
    logger.warning("rolled back %s", "it", extra=extra)
    text: str = handler.stream.getvalue()
    return text


def test_without_a_journal_the_fields_end_the_line() -> None:
    line = logged({"SLOT": "combat", "VERDICT": "rollback", "OTHER": 1})
    assert line.endswith(" WARNING edge_agent.slots: rolled back it SLOT=combat VERDICT=rollback\n")
    assert logged({}).endswith("rolled back it\n")


def test_the_journal_is_taken_where_stderr_leads_to_it() -> None:
    journal = pytest.importorskip("systemd.journal", reason="systemd-python is not installed")
    stderr = os.fstat(2)
    stream = f"{stderr.st_dev}:{stderr.st_ino}"
    assert isinstance(journal_handler({"JOURNAL_STREAM": stream}), journal.JournalHandler)
    assert not isinstance(journal_handler({"JOURNAL_STREAM": "1:1"}), journal.JournalHandler)


def test_a_journal_without_the_binding_is_stderr() -> None:
    code = (
        "import os, sys\n"
        "sys.modules['systemd'] = None\n"
        "from protocol.service import set_up_logging\n"
        "import logging\n"
        "found = os.fstat(2)\n"
        "os.environ['JOURNAL_STREAM'] = f'{found.st_dev}:{found.st_ino}'\n"
        "set_up_logging()\n"
        "logging.getLogger('x').info('hello', extra={'SLOT': 'combat'})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stderr.endswith(" INFO x: hello SLOT=combat\n")
