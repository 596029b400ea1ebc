from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from msgspec.structs import replace

from protocol import broker_check
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


def test_a_broker_that_welcomes(broker: Broker) -> None:
    assert broker_check.check_broker(broker, "pi").health is Health.OK


def test_no_broker() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    finding = broker_check.check_broker(Broker(port=port), "pi")
    assert finding.health is Health.FAILED
    assert "nothing answers" in finding.detail


def test_something_else_behind_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_check, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        finding = broker_check.check_broker(Broker(port=server.getsockname()[1]), "pi")
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
        finding = broker_check.check_broker(Broker(port=server.getsockname()[1]), "pi")
        thread.join(5)
    assert finding.health is Health.FAILED
    assert "refuses pi: Not authorized" in finding.detail


def test_tls_to_a_broker_without(tmp_path: Path, broker: Broker) -> None:
    authority, _ = write_pair(tmp_path, "ca", days=100)
    finding = broker_check.check_broker(Broker(host=broker.host, port=broker.port, ca_file=authority), "pi")
    assert finding.health is Health.FAILED


def test_plain_connections() -> None:
    def health(broker: Broker) -> list[Health]:
        return [finding.health for finding in broker_check.check_transport(broker)]

    assert health(Broker(host="localhost")) == [Health.OK]
    assert health(Broker(host="broker.lan", allow_plain=True)) == [Health.WARNING]
    assert health(Broker(host="broker.lan")) == [Health.FAILED]
    assert broker_check.check_broker(Broker(host="broker.invalid"), "pi").health is Health.FAILED


@pytest.mark.parametrize(("days", "health"), [(100, Health.OK), (3, Health.WARNING), (-1, Health.FAILED)])
def test_certificates_end(tmp_path: Path, days: int, health: Health) -> None:
    authority, _ = write_pair(tmp_path, "ca", days=100)
    certificate, key = write_pair(tmp_path, "pi", days=days)
    found = broker_check.check_transport(Broker(host="b", ca_file=authority, cert_file=certificate, key_file=key))
    assert {finding.name: finding.health for finding in found} == {
        "tls ca_file": Health.OK,
        "tls cert_file": health,
        "tls key_file": Health.OK,
    }


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    authority, _ = write_pair(tmp_path, "ca", days=100)
    certificate, key = write_pair(tmp_path, "pi", days=100)
    _, other = write_pair(tmp_path, "other", days=100)

    def findings(**files: str) -> dict[str, Finding]:
        good = Broker(host="b", ca_file=authority, cert_file=certificate, key_file=key)
        return {finding.name: finding for finding in broker_check.check_transport(replace(good, **files))}

    assert "does not fit" in findings(key_file=other)["tls key_file"].detail
    assert "cannot read" in findings(key_file=str(tmp_path / "gone"))["tls key_file"].detail
    assert "cannot read" in findings(cert_file=str(tmp_path / "gone"))["tls cert_file"].detail
    assert "no certificate" in findings(ca_file=key)["tls ca_file"].detail
    Path(key).chmod(0o644)
    assert findings()["tls key_file"].remedy == f"chmod 600 {key}"
