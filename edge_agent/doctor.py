"""`edge-agent doctor`: looks at everything the agent needs, and says what to do about what is wrong.

Each check is a function of its own that returns one finding and changes nothing. What can crash (the runtime on a CPU
it was not built for) is tried in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.settings import Settings
from edge_agent.telemetry import Sensors
from protocol.broker_check import check_broker, check_transport
from protocol.command_line import Finding, Health

PROBE_S = 60.0
SCARCE_BYTES = 500 * 1024 * 1024
FULL_BYTES = 50 * 1024 * 1024
TIME_ERROR = 5  # what adjtimex(2) returns while nothing disciplines the clock
OK, WARNING, FAILED = Health.OK, Health.WARNING, Health.FAILED


def examine(settings: Settings) -> list[Finding]:
    """Run every check."""
    return [
        check_broker(settings.broker, settings.device),
        *check_transport(settings.broker),
        check_trust(Path(settings.root_of_trust)),
        check_clock(time.time()),
        check_disk(Path(settings.state_dir)),
        check_runtime(),
        check_sensors(Path(settings.state_dir), Path(settings.sys_root)),
        check_memory_accounting(Path(settings.sys_root)),
    ]


def check_trust(path: Path) -> Finding:
    """Whether this device knows whose signatures to believe."""
    from tuf.api.exceptions import RepositoryError  # noqa: PLC0415
    from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined] # noqa: PLC0415

    name = "root of trust"
    remedy = "copy root.json from the host, where `trainer-host keys init` wrote it, over a channel you trust"
    try:
        root = Metadata[Root].from_bytes(path.read_bytes())
        root.verify_delegate("root", root)
    except OSError as error:
        return Finding(name, FAILED, f"cannot read {path}: {error.strerror}; no model will be accepted", remedy)
    except (RepositoryError, ValueError) as error:
        return Finding(name, FAILED, f"{path} is no root metadata: {error}", remedy)
    threshold = root.signed.roles["targets"].threshold
    what = f"{path} (version {root.signed.version}, {threshold} signature(s) for a release)"
    ends = root.signed.expires
    if datetime.now(UTC) > ends.replace(tzinfo=UTC):  # a newer root may have come with the metadata since
        return Finding(name, WARNING, f"{what} has expired on {ends:%Y-%m-%d}", remedy)
    return Finding(name, OK, what)


def check_clock(now: float) -> Finding:
    """Whether the clock can be believed: certificates and metadata have dates."""
    name = "clock"
    built = Path(__file__).stat().st_mtime
    if now < built:
        shown = datetime.fromtimestamp(now, UTC)
        return Finding(
            name, FAILED, f"it is not {shown:%Y-%m-%d}: this software is younger", "timedatectl set-ntp true"
        )
    if _clock_is_free():
        return Finding(name, WARNING, "nothing keeps it right", "timedatectl set-ntp true")
    return Finding(name, OK, f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC")


def _clock_is_free() -> bool:
    """Whether the kernel says that nothing disciplines its clock: adjtimex(2) without changing anything."""
    if sys.platform != "linux":
        return False
    timex = ctypes.create_string_buffer(512)  # struct timex, with room to spare; its first word asks for no change
    return bool(ctypes.CDLL(None).adjtimex(timex) == TIME_ERROR)


def check_disk(state_dir: Path) -> Finding:
    """Whether models and transitions find room."""
    name = "disk"
    folder = next(parent for parent in (state_dir, *state_dir.parents) if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        remedy = f"run as the service's user, or set state_dir to a folder of yours instead of {state_dir}"
        return Finding(name, FAILED, f"cannot write to {folder}", remedy)
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free for {state_dir}"
    remedy = "free some space, or set state_dir to a larger disk"
    if free < FULL_BYTES:
        return Finding(name, FAILED, detail, remedy)
    return Finding(name, WARNING, detail, remedy) if free < SCARCE_BYTES else Finding(name, OK, detail)


def check_runtime() -> Finding:
    """Whether a TFLite runtime is here, works on this CPU, and how new its operators are."""
    name = "runtime"
    try:
        probe = subprocess.run(
            [sys.executable, "-m", "edge_agent.probe"], capture_output=True, text=True, timeout=PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, FAILED, f"loading tiny models takes more than {PROBE_S:.0f} s", "reinstall the runtime")
    if probe.returncode < 0:
        remedy = "install the other runtime: ai-edge-litert or tflite-runtime"
        return Finding(name, FAILED, f"it crashes on this CPU (signal {-probe.returncode})", remedy)
    lines = probe.stdout.splitlines()
    if probe.returncode or not lines:
        said = (probe.stderr.strip().splitlines() or ["nothing"])[-1]
        return Finding(name, FAILED, f"it cannot be loaded: {said}", "pip install 'edgeswap[edge]'")
    missing = [line.removeprefix("lacks ") for line in lines[1:] if line.startswith("lacks ")]
    if len(missing) == len(lines) - 1:
        return Finding(name, FAILED, f"{lines[0]} runs none of the probes", "reinstall the runtime")
    if missing:
        # The host sees what a device's runtime lacks and offers no such model: nothing is to be done.
        return Finding(name, OK, f"{lines[0]}; too old for {', '.join(missing)}")
    return Finding(name, OK, f"{lines[0]}, with all operators that were tried")


def check_sensors(state_dir: Path, sys_root: Path) -> Finding:
    """What this hardware tells of its heat, and whether it suffers."""
    name = "sensors"
    folder = next(parent for parent in (state_dir, *state_dir.parents) if parent.exists())
    reading = Sensors(folder, sys_root).read(time.time(), 0.0)
    told = [f"{sensor} {celsius:.0f} °C" for sensor, celsius in reading.temperatures_c.items()]
    if reading.throttled:
        remedy = "use the official power supply, and cool the board"
        return Finding(name, WARNING, ", ".join([*told, *reading.throttled]), remedy)
    return Finding(name, OK, ", ".join(told) or "no temperature sensor; telemetry leaves it out")


def check_memory_accounting(sys_root: Path) -> Finding:
    """Whether the kernel can limit a service's memory; Raspberry Pi OS turns that off."""
    name = "memory limits"
    controllers = sys_root / "fs/cgroup/cgroup.controllers"
    try:
        found = controllers.read_text("utf-8").split()
    except OSError:
        return Finding(name, OK, "no control groups of version 2 here; the unit's memory limits have no effect")
    if "memory" in found:
        return Finding(name, OK, "the unit's memory limits hold")
    remedy = "append cgroup_enable=memory to the line in /boot/firmware/cmdline.txt, and reboot"
    return Finding(name, WARNING, "the kernel does not account memory: the unit's limits have no effect", remedy)
