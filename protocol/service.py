"""What a daemon tells systemd: that it is ready, what it does, that it lives, and its journal entries.

The notification protocol of sd_notify(3) is a datagram of `KEY=value` lines to the socket that `NOTIFY_SOCKET` names;
its manual page calls it stable and invites implementations of one's own. It is spoken directly here, because a unit of
`Type=notify` must work in any virtual environment, and libsystemd's Python binding is only where it was compiled.
Without systemd everything here does nothing, except that the log goes to stderr.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping

# What a log call may attach as `extra=`: fields of the journal's entry, which `journalctl SLOT=combat` finds again.
FIELDS = ("SLOT", "MODEL", "VERDICT")
WATCHDOG_TURNS = 3

log = logging.getLogger(__name__)


class ServiceManager:
    """Keeps systemd informed, saying only what is news and only when it is due.

    Args:
        environment: As this process got it, where it is not `os.environ`.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment
        self._interval_s = watchdog_interval_s(self._environment, os.getpid())
        self._alive_due = 0.0
        self._status: str | None = None

    def tell(self, now: float, *, status: str, alive: bool) -> None:
        """Pass on the status where it has changed, and feed the watchdog where that is due and deserved.

        Args:
            now: Monotonic seconds.
            status: One line for `systemctl status`.
            alive: Whether the work gets done. If not for a whole interval, systemd restarts the daemon.
        """
        if status != self._status:
            self._status = status
            notify(self._environment, STATUS=status)
        if alive and self._interval_s is not None and now >= self._alive_due:
            self._alive_due = now + self._interval_s / WATCHDOG_TURNS
            notify(self._environment, WATCHDOG="1")


def notify(environment: Mapping[str, str] | None = None, /, **fields: str) -> bool:
    """Send fields such as `READY="1"` or `STOPPING="1"` to the service manager.

    Returns:
        Whether there is one, and it took them.
    """
    address = _address((os.environ if environment is None else environment).get("NOTIFY_SOCKET", ""))
    if address is None:
        return False
    message = "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)  # a full queue must not hold up the loop; the next turn comes soon
        try:
            sock.sendto(message.encode(), address)
        except OSError as error:
            log.warning("the service manager does not take a notification: %s", error)
            return False
    return True


def watchdog_interval_s(environment: Mapping[str, str], pid: int) -> float | None:
    """The longest silence systemd permits, in seconds, or `None` where this process has no watchdog.

    The variables pass on to children, who are not meant; see sd_watchdog_enabled(3).
    """
    usec = environment.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or int(usec) == 0 or environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(usec) / 1e6


def set_up_logging(level: int = logging.INFO) -> None:
    """Send this process's log to the journal where it has one, else to stderr."""
    logging.basicConfig(level=level, handlers=[journal_handler(os.environ)], force=True)


def journal_handler(environment: Mapping[str, str]) -> logging.Handler:
    """A handler for the journal with structured fields, or for stderr with the fields at the end of the line.

    The journal is taken when systemd has connected stderr to it (`JOURNAL_STREAM`, systemd.exec(5)) and systemd-python
    is installed. That turns every attribute of a record with a name in capitals into a field of the entry.
    """
    if _stderr_is_journal(environment.get("JOURNAL_STREAM", "")):
        try:
            from systemd.journal import JournalHandler  # type: ignore[import-not-found, unused-ignore] # noqa: PLC0415
        except ImportError:
            pass
        else:
            journal: logging.Handler = JournalHandler()
            journal.setFormatter(logging.Formatter("%(name)s: %(message)s"))
            return journal
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithFields("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _address(notify_socket: str) -> str | None:
    """The socket's address: a path, or a name in Linux's abstract namespace, which is written with `@` first."""
    if notify_socket.startswith("@"):
        return "\0" + notify_socket[1:]
    return notify_socket if notify_socket.startswith("/") else None


def _stderr_is_journal(stream: str) -> bool:
    device, _, inode = stream.partition(":")
    if not (device.isdecimal() and inode.isdecimal()):
        return False
    found = os.fstat(2)
    return (found.st_dev, found.st_ino) == (int(device), int(inode))


class _WithFields(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={record.__dict__[name]}" for name in FIELDS if name in record.__dict__)
        return super().format(record) + fields
