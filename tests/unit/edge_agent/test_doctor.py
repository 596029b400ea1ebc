from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]

from edge_agent import doctor
from edge_agent.doctor import examine
from edge_agent.settings import Settings, SlotSettings
from protocol.command_line import Finding, Health
from protocol.link import Broker
from trainer_host.private_broker import PrivateBroker


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as private:
        yield Broker(host=private.host, port=private.port)


def write_root(path: Path, *, days: int = 365, signed: bool = True) -> None:
    signer = CryptoSigner.generate_ed25519()
    root = Root(expires=datetime.now(UTC).replace(microsecond=0) + timedelta(days=days))
    for role in ("root", "targets", "snapshot", "timestamp"):
        root.add_key(signer.public_key, role)
    metadata = Metadata(root)
    if signed:
        metadata.sign(signer)
    metadata.to_file(str(path))


def states(findings: list[Finding]) -> dict[str, Health]:
    return {finding.name: finding.health for finding in findings}


def test_a_good_set_up(tmp_path: Path, broker: Broker) -> None:
    write_root(tmp_path / "root.json")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpu memory pids\n")
    findings = examine(
        Settings(
            device="pi",
            slots={"combat": SlotSettings()},
            broker=broker,
            state_dir=str(tmp_path / "not" / "yet"),
            root_of_trust=str(tmp_path / "root.json"),
            sys_root=str(tmp_path / "sys"),
        )
    )
    found = states(findings)
    assert set(found) == {
        "broker", "tls", "root of trust", "clock", "disk", "runtime", "sensors", "memory limits"
    }  # fmt: skip
    found.pop("clock")  # whether this machine's is disciplined is not ours to decide
    found.pop("disk")  # nor how much room it has
    assert set(found.values()) == {Health.OK}
    assert all(finding.remedy or finding.health is Health.OK for finding in findings)


def test_the_root_of_trust(tmp_path: Path) -> None:
    path = tmp_path / "root.json"
    assert "no model will be accepted" in doctor.check_trust(path).detail
    path.write_text("{}")
    assert "no root metadata" in doctor.check_trust(path).detail
    write_root(path, signed=False)
    assert "no root metadata" in doctor.check_trust(path).detail
    write_root(path, days=-1)
    assert doctor.check_trust(path).health is Health.WARNING
    write_root(path)
    assert doctor.check_trust(path).health is Health.OK


def test_a_clock_that_was_never_set() -> None:
    finding = doctor.check_clock(0.0)
    assert finding.health is Health.FAILED
    assert "1970-01-01" in finding.detail
    assert doctor.check_clock(time.time()).health in {Health.OK, Health.WARNING}


def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "deep" / "state"
    monkeypatch.setattr(doctor, "SCARCE_BYTES", 0)
    monkeypatch.setattr(doctor, "FULL_BYTES", 0)
    assert doctor.check_disk(state).health is Health.OK
    monkeypatch.setattr(doctor, "SCARCE_BYTES", 1 << 80)
    assert doctor.check_disk(state).health is Health.WARNING
    monkeypatch.setattr(doctor, "FULL_BYTES", 1 << 80)
    assert doctor.check_disk(state).health is Health.FAILED
    assert doctor.check_disk(Path("/proc/1/state")).health is Health.FAILED or sys.platform != "linux"


def test_the_runtime_is_asked_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_runtime().health is Health.OK
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for script, told in (
        ("kill -ILL $$", "crashes on this CPU"),
        ("echo trouble >&2; exit 1", "cannot be loaded: trouble"),
        ("exit 0", "cannot be loaded: nothing"),
        ("echo old 1.0; echo lacks a", "runs none"),
        ("echo old 1.0; echo has a; echo lacks b", "old 1.0; too old for b"),
    ):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        assert told in doctor.check_runtime().detail


def test_a_probe_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_options: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor.subprocess, "run", hang)  # type: ignore[attr-defined]
    assert "takes more than 60 s" in doctor.check_runtime().detail


def test_sensors(tmp_path: Path) -> None:
    assert "no temperature sensor" in doctor.check_sensors(tmp_path, tmp_path).detail
    zone = tmp_path / "class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text("83000\n")
    assert doctor.check_sensors(tmp_path, tmp_path) == Finding("sensors", Health.OK, "cpu-thermal 83 °C")
    bits = tmp_path / "devices/platform/soc/soc:firmware"
    bits.mkdir(parents=True)
    (bits / "get_throttled").write_text("1\n")
    finding = doctor.check_sensors(tmp_path, tmp_path)
    assert finding.health is Health.WARNING
    assert finding.detail == "cpu-thermal 83 °C, under_voltage"


def test_memory_accounting(tmp_path: Path) -> None:
    assert "version 2" in doctor.check_memory_accounting(tmp_path).detail
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "fs/cgroup/cgroup.controllers").write_text("cpuset cpu io pids\n")
    assert "cgroup_enable=memory" in doctor.check_memory_accounting(tmp_path).remedy
