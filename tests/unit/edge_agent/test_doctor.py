from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from msgspec.structs import replace
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


def write_pair(folder: Path, name: str, *, days: int) -> tuple[str, str]:
    """A self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=100))
        .not_valid_after(now + timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    (folder / f"{name}.key").chmod(0o600)
    return str(folder / f"{name}.pem"), str(folder / f"{name}.key")


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


def test_no_broker() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    finding = doctor.check_broker(Broker(port=port), "pi")
    assert finding.health is Health.FAILED
    assert "nothing answers" in finding.detail


def test_something_else_behind_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        finding = doctor.check_broker(Broker(port=server.getsockname()[1]), "pi")
    assert finding.health is Health.FAILED
    assert "does not speak MQTT" in finding.detail


def test_a_broker_that_refuses() -> None:
    connack_not_authorised = bytes([0x20, 3, 0, 0x87, 0])

    def serve(server: socket.socket) -> None:
        for _ in range(2):  # the doctor looks first whether anybody is there
            connection, _ = server.accept()
            with connection:
                if connection.recv(1024):
                    connection.sendall(connack_not_authorised)
                    connection.recv(1024)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        finding = doctor.check_broker(Broker(port=server.getsockname()[1]), "pi")
        thread.join(5)
    assert finding.health is Health.FAILED
    assert "refuses pi: Not authorized" in finding.detail


def test_tls_to_a_broker_without(tmp_path: Path, broker: Broker) -> None:
    authority, _ = write_pair(tmp_path, "ca", days=100)
    finding = doctor.check_broker(Broker(host=broker.host, port=broker.port, ca_file=authority), "pi")
    assert finding.health is Health.FAILED


def test_plain_connections() -> None:
    def health(broker: Broker) -> list[Health]:
        return [finding.health for finding in doctor.check_transport(broker)]

    assert health(Broker(host="localhost")) == [Health.OK]
    assert health(Broker(host="broker.lan", allow_plain=True)) == [Health.WARNING]
    assert health(Broker(host="broker.lan")) == [Health.FAILED]
    assert doctor.check_broker(Broker(host="broker.invalid"), "pi").health is Health.FAILED


@pytest.mark.parametrize(("days", "health"), [(100, Health.OK), (3, Health.WARNING), (-1, Health.FAILED)])
def test_certificates_end(tmp_path: Path, days: int, health: Health) -> None:
    authority, _ = write_pair(tmp_path, "ca", days=100)
    certificate, key = write_pair(tmp_path, "pi", days=days)
    found = doctor.check_transport(Broker(host="b", ca_file=authority, cert_file=certificate, key_file=key))
    assert states(list(found)) == {"tls ca_file": Health.OK, "tls cert_file": health, "tls key_file": Health.OK}


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    authority, _ = write_pair(tmp_path, "ca", days=100)
    certificate, key = write_pair(tmp_path, "pi", days=100)
    _, other = write_pair(tmp_path, "other", days=100)

    def findings(**files: str) -> dict[str, Finding]:
        good = Broker(host="b", ca_file=authority, cert_file=certificate, key_file=key)
        return {finding.name: finding for finding in doctor.check_transport(replace(good, **files))}

    assert "does not fit" in findings(key_file=other)["tls key_file"].detail
    assert "cannot read" in findings(key_file=str(tmp_path / "gone"))["tls key_file"].detail
    assert "cannot read" in findings(cert_file=str(tmp_path / "gone"))["tls cert_file"].detail
    assert "no certificate" in findings(ca_file=key)["tls ca_file"].detail
    Path(key).chmod(0o644)
    assert findings()["tls key_file"].remedy == f"chmod 600 {key}"


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
