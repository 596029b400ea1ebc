"""What the hardware says: load, memory, heat, clocks and the Raspberry Pi's throttle bits.

A sensor that is absent, unreadable or talks nonsense is absent from the reading, and hides no other. Thermal zones
and cpufreq follow the kernel's sysfs ABI (thermal/sysfs-api, cpu-freq); the bits of `get_throttled` follow the
Raspberry Pi documentation of `vcgencmd get_throttled`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import psutil  # type: ignore[import-untyped]

from protocol.messages import Telemetry

T = TypeVar("T")

_CONDITIONS = ("under_voltage", "frequency_capped", "throttled", "soft_temperature_limit")
_OCCURRED_SHIFT = 16
_NOW_MASK = 0xF
# Sensors that are not connected report absolute zero or the register's end.
_PLAUSIBLE_C = range(-100, 200)


def decode_throttled(value: int) -> list[str]:
    """Names of the throttle bits that are set: what holds now (0 to 3), then what occurred since boot (16 to 19)."""
    now = [name for bit, name in enumerate(_CONDITIONS) if value >> bit & 1]
    since = [f"{name}_occurred" for bit, name in enumerate(_CONDITIONS, _OCCURRED_SHIFT) if value >> bit & 1]
    return now + since


class Sensors:
    """The sensors of this computer.

    Args:
        state_folder: Free space is that of its disk.
        sys_root: Where sysfs is.
    """

    def __init__(self, state_folder: Path, sys_root: Path = Path("/sys")) -> None:
        self._state_folder = state_folder
        self._sys = sys_root
        # `soc/soc:firmware` up to the Pi 4, `soc@107c000000/soc@107c000000:firmware` on the Pi 5.
        found = sorted((sys_root / "devices/platform").glob("soc*/soc*:firmware/get_throttled"))
        self._throttled = found[0] if found else None
        # psutil measures CPU use since the call before, so the first call says nothing.
        _unless_broken(psutil.cpu_percent)

    def read(self, at: float, uptime_s: float, processes: Iterable[int] = ()) -> Telemetry:
        """Read everything; the caller adds what concerns slots and outbox.

        Args:
            at: Seconds since the epoch.
            uptime_s: Seconds since the agent started.
            processes: The agent's process ids, for `agent_memory_bytes`. Those that have ended are left out.
        """
        memory = _unless_broken(psutil.virtual_memory)
        throttled = self._throttled_bits()
        return Telemetry(
            at=at,
            uptime_s=uptime_s,
            cpu_percent=_unless_broken(psutil.cpu_percent),
            load_1m=_unless_broken(lambda: os.getloadavg()[0]),
            memory_used_bytes=memory.used if memory else None,
            memory_available_bytes=memory.available if memory else None,
            agent_memory_bytes=_memory_of(processes),
            disk_free_bytes=_unless_broken(lambda: shutil.disk_usage(self._state_folder).free),
            temperatures_c=self.temperatures_c(),
            clocks_mhz=self.clocks_mhz(),
            throttled=None if throttled is None else decode_throttled(throttled),
        )

    def temperatures_c(self) -> dict[str, float]:
        """Degrees Celsius by zone type; zones of a type that was there before are called `<type>_<zone number>`."""
        found: dict[str, float] = {}
        for zone in _numbered(self._sys / "class/thermal", "thermal_zone"):
            celsius = _number(zone / "temp", 1000.0)
            if celsius is None or int(celsius) not in _PLAUSIBLE_C:
                continue
            name = _text(zone / "type") or zone.name
            found[name if name not in found else f"{name}_{zone.name.removeprefix('thermal_zone')}"] = celsius
        return found

    def clocks_mhz(self) -> dict[str, float]:
        """Present clock in MHz by cpufreq policy, or by CPU on kernels that show no policies."""
        cpus = self._sys / "devices/system/cpu"
        folders = _numbered(cpus / "cpufreq", "policy")
        read = {folder.name: _number(folder / "scaling_cur_freq", 1000.0) for folder in folders}
        if not read:
            read = {cpu.name: _number(cpu / "cpufreq/scaling_cur_freq", 1000.0) for cpu in _numbered(cpus, "cpu")}
        return {name: mhz for name, mhz in read.items() if mhz is not None and mhz > 0.0}

    def throttled_now(self) -> bool:
        """Whether the firmware holds the clock back at this moment; `False` where nothing can tell. Reads one file."""
        return bool((self._throttled_bits() or 0) & _NOW_MASK)

    def _throttled_bits(self) -> int | None:
        text = _text(self._throttled) if self._throttled else None
        # The kernel writes bare hexadecimal digits, vcgencmd puts 0x before them.
        return int(text, 16) if text and re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text) else None


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """The entries `<prefix><number>`, by number."""
    found = [
        (int(entry.name.removeprefix(prefix)), entry)
        for entry in folder.glob(f"{prefix}*")
        if entry.name.removeprefix(prefix).isdecimal()
    ]
    return [entry for _, entry in sorted(found)]


def _text(path: Path) -> str | None:
    """A small file's text, `None` where it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            return file.read(256).decode().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path, divisor: float) -> float | None:
    text = _text(path)
    return int(text) / divisor if text and re.fullmatch(r"-?[0-9]{1,12}", text) else None


def _memory_of(processes: Iterable[int]) -> int | None:
    """Proportional set size where the kernel tells it to us, else resident set size, summed."""
    found = [size for process in processes if (size := _unless_broken(lambda: _size(process))) is not None]  # noqa: B023
    return sum(found) if found else None


def _size(process: int) -> int:
    known = psutil.Process(process)
    try:
        return int(known.memory_full_info().pss)
    except (psutil.AccessDenied, AttributeError):
        return int(known.memory_info().rss)


def _unless_broken(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (OSError, ValueError, psutil.Error):
        return None
