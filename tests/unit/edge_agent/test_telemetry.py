from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.telemetry import Sensors, decode_throttled
from protocol.messages import Telemetry

THROTTLED = "devices/platform/soc/soc:firmware/get_throttled"


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def pi(root: Path, throttled: str = "e0008\n", path: str = THROTTLED) -> Path:
    """A sysfs as on a Raspberry Pi 4 that is at its soft temperature limit."""
    write(
        root,
        **{
            "class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "class/thermal/thermal_zone0/temp": "81816\n",
            "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1400000\n",
            "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1400000\n",
            path: throttled,
        },
    )
    return root


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (0x0, []),
        (0x1, ["under_voltage"]),
        (0x2, ["frequency_capped"]),
        (0x4, ["throttled"]),
        (0x8, ["soft_temperature_limit"]),
        (0x10000, ["under_voltage_occurred"]),
        (0x20000, ["frequency_capped_occurred"]),
        (0x40000, ["throttled_occurred"]),
        (0x80000, ["soft_temperature_limit_occurred"]),
        (0x50005, ["under_voltage", "throttled", "under_voltage_occurred", "throttled_occurred"]),
        (0xFFF0FFF0, []),
    ],
)
def test_throttle_bits_have_names(value: int, names: list[str]) -> None:
    assert decode_throttled(value) == names


def test_a_hot_pi(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path, pi(tmp_path))
    read = sensors.read(at=5.0, uptime_s=2.0, processes=[os.getpid()])
    assert (read.at, read.uptime_s) == (5.0, 2.0)
    assert read.temperatures_c == {"cpu-thermal": 81.816}
    assert read.clocks_mhz == {"policy0": 1400.0}
    assert read.throttled == [
        "soft_temperature_limit",
        "frequency_capped_occurred",
        "throttled_occurred",
        "soft_temperature_limit_occurred",
    ]
    assert sensors.throttled_now() is True


def test_the_firmware_of_a_pi_5_is_found(tmp_path: Path) -> None:
    root = pi(tmp_path, "0x50000", "devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled")
    sensors = Sensors(tmp_path, root)
    assert sensors.read(0.0, 0.0).throttled == ["under_voltage_occurred", "throttled_occurred"]
    assert sensors.throttled_now() is False


def test_the_bits_are_read_anew_each_time(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path, pi(tmp_path, "0"))
    assert (sensors.throttled_now(), sensors.read(0.0, 0.0).throttled) == (False, [])
    write(tmp_path, **{THROTTLED: "4\n"})
    assert sensors.throttled_now() is True


def test_sensors_that_are_not_there_are_absent(tmp_path: Path) -> None:
    read = Sensors(tmp_path, tmp_path).read(1.0, 1.0)
    assert (read.temperatures_c, read.clocks_mhz, read.throttled, read.agent_memory_bytes) == ({}, {}, None, None)
    assert Sensors(tmp_path, tmp_path).throttled_now() is False


def test_one_broken_sensor_does_not_hide_the_others(tmp_path: Path) -> None:
    root = pi(tmp_path, "warm, thank you")
    write(
        root,
        **{
            "class/thermal/thermal_zone1/temp": "-273200",
            "class/thermal/thermal_zone2/temp": "N/A",
            "class/thermal/thermal_zone3/temp": "",
            "class/thermal/thermal_zone10/temp": "40500",
            "class/thermal/thermal_zone11/temp": "50000",
            "class/thermal/thermal_zone11/type": "cpu-thermal",
            "class/thermal/thermal_zone12/type": "no temp",
            "class/thermal/thermal_zoneX/temp": "1000",
            "devices/system/cpu/cpufreq/policy2/scaling_cur_freq": "0",
            "devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "<unknown>",
            "devices/system/cpu/cpufreq/policy10/scaling_cur_freq": "2400000",
        },
    )
    (root / "class/thermal/thermal_zone4/temp").mkdir(parents=True)
    (root / "class/thermal/thermal_zone5").mkdir()
    (root / "class/thermal/thermal_zone5/temp").write_bytes(b"\xff\xfe")
    sensors = Sensors(tmp_path, root)
    read = sensors.read(1.0, 1.0)
    assert read.temperatures_c == {"cpu-thermal": 81.816, "thermal_zone10": 40.5, "cpu-thermal_11": 50.0}
    assert read.clocks_mhz == {"policy0": 1400.0, "policy10": 2400.0}
    assert (read.throttled, sensors.throttled_now()) == (None, False)


def test_clocks_by_cpu_where_the_kernel_shows_no_policies(tmp_path: Path) -> None:
    write(tmp_path, **{f"devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq": f"{600 + n}000" for n in (0, 1, 10)})
    write(tmp_path, **{"devices/system/cpu/cpuidle/current_driver": "none"})
    assert list(Sensors(tmp_path, tmp_path).clocks_mhz().items()) == [
        ("cpu0", 600.0),
        ("cpu1", 601.0),
        ("cpu10", 610.0),
    ]


def test_the_computer_itself(tmp_path: Path) -> None:
    read = Sensors(tmp_path).read(1.0, 1.0)
    assert read.cpu_percent is not None
    assert 0.0 <= read.cpu_percent <= 100.0
    assert read.load_1m is not None
    assert read.load_1m >= 0.0
    for size in (read.memory_used_bytes, read.memory_available_bytes, read.disk_free_bytes):
        assert size is not None
        assert size > 1_000_000


def test_memory_of_the_agents_processes_is_summed(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"], stdin=-1, stdout=-1
    )
    assert child.stdout is not None
    child.stdout.readline()
    sensors = Sensors(tmp_path, tmp_path)

    def memory(*processes: int) -> int:
        found = sensors.read(1.0, 1.0, processes).agent_memory_bytes
        assert found is not None
        return found

    try:
        ours, childs, both = memory(os.getpid()), memory(child.pid), memory(os.getpid(), child.pid)
        assert 1_000_000 < childs < ours
        assert both == pytest.approx(ours + childs, rel=0.2)
    finally:
        child.communicate()
    assert memory(os.getpid(), child.pid) < both
    assert sensors.read(1.0, 1.0, [child.pid]).agent_memory_bytes is None


def test_a_state_folder_that_is_gone_is_absent(tmp_path: Path) -> None:
    read = Sensors(tmp_path / "gone", tmp_path).read(1.0, 1.0)
    assert isinstance(read, Telemetry)
    assert read.disk_free_bytes is None
    assert read.load_1m is not None
