"""A real Mosquitto of our own on loopback, for the demo, the tests and the benchmarks.

It needs no rights and touches nothing outside its folder. Only this machine can reach it, so it asks nobody who they
are; a broker that devices reach is set up with TLS and access lists instead.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from protocol.errors import Misconfigured, Unavailable

HOST = "127.0.0.1"
MAX_PACKET_BYTES = (128 + 4) * 1024  # the protocol's largest payload, with its topic and properties
START_S = 10.0
STOP_S = 5.0
PORT_ATTEMPTS = 3
# Debian keeps daemons in sbin, which is on no ordinary user's PATH; Homebrew on Apple silicon has its own root.
FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")


class PrivateBroker:
    """Starts Mosquitto in `folder`; use it as a context manager, or call `start` and `stop`.

    It stands in a session of its own: Ctrl-C reaches us first, and we say goodbye before the broker goes.

    Args:
        folder: Holds `mosquitto.conf` and `mosquitto.log`; created if absent.
        port: TCP port, or `None` for a free one.
        persistent: Keep retained messages and sessions in the folder over a restart.
    """

    def __init__(self, folder: Path, port: int | None = None, *, persistent: bool = False) -> None:
        self.host = HOST
        self.port = port or 0
        self.log_path = folder / "mosquitto.log"
        self._folder = folder
        self._chosen = port
        self._persistent = persistent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process, while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> Self:
        """Start it and wait until it accepts connections. A second call changes nothing.

        After `stop`, it comes back on the same port.

        Raises:
            Misconfigured: Mosquitto is not installed, or the port is taken.
            Unavailable: It ended, or accepted no connection in time; the text ends with its log.
        """
        if self._process is not None:
            return self
        program = find_mosquitto()
        self._folder.mkdir(parents=True, exist_ok=True)
        attempts = 1 if self._chosen else PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            port = self._chosen or _free_port()
            _check_free(port)
            try:
                self._launch(program, port)
            except Unavailable:
                if attempt == attempts:  # a free port can be taken before Mosquitto binds it
                    raise
            else:
                self.port = self._chosen = port
                break
        return self

    def stop(self) -> None:
        """End it and wait until it is gone. Without effect when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, program: str, port: int) -> None:
        config = self._folder / "mosquitto.conf"
        config.write_text(self._config(port), "utf-8")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._await_connection(self._process, port)
        except BaseException:
            self.stop()
            raise

    def _await_connection(self, process: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + START_S
        while True:
            accepted = _accepts(port)
            if process.poll() is not None:
                raise Unavailable(f"Mosquitto ended with status {process.returncode}: {self._last_words()}")
            if accepted:
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"Mosquitto took no connection within {START_S:.0f} s: {self._last_words()}")
            time.sleep(0.01)

    def _last_words(self) -> str:
        return " / ".join(self.log_path.read_text("utf-8", "replace").splitlines()[-5:]) or "its log is empty"

    def _config(self, port: int) -> str:
        lines = [
            f"listener {port} {HOST}",
            "allow_anonymous true",
            "set_tcp_nodelay true",
            f"max_packet_size {MAX_PACKET_BYTES}",
            # As many as a link keeps in flight, and room for a device that falls behind while a model is sent.
            "max_inflight_messages 64",
            "max_queued_messages 10000",
            "sys_interval 0",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        ]
        if self._persistent:
            lines += ["persistence true", f"persistence_location {self._folder.resolve()}/", "autosave_interval 5"]
        else:
            lines += ["persistence false"]
        if os.geteuid() == 0:  # else it would turn into the user `mosquitto`, who may not read our folder
            lines += ["user root"]
        return "\n".join(lines) + "\n"


def find_mosquitto() -> str:
    """The path of the program.

    Raises:
        Misconfigured: It is not installed; the text says how to install it here.
    """
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path=os.pathsep.join(FOLDERS))
    if found is None:
        install = "brew install mosquitto" if sys.platform == "darwin" else "sudo apt-get install mosquitto"
        raise Misconfigured(f"Mosquitto, the MQTT broker, is not installed. Install it with: {install}")
    return found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
    return port


def _check_free(port: int) -> None:
    """Without this, whoever holds the port already would pass for our broker."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError as error:
            raise Misconfigured(f"port {port} cannot be used ({error.strerror}); choose another") from error


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True
