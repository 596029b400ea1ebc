"""What both doctors ask of the broker: is it there, does it let us in, and is the way to it protected?"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from protocol.command_line import Finding, Health
from protocol.errors import Misconfigured
from protocol.link import LOOPBACK_HOSTS, Broker, Link

ANSWER_S = 5.0
SOON = timedelta(days=14)
OK, WARNING, FAILED = Health.OK, Health.WARNING, Health.FAILED


def check_broker(broker: Broker, client: str) -> Finding:
    """Whether the broker is there, and lets this client in."""
    name = "broker"
    try:
        with socket.create_connection((broker.host, broker.port), ANSWER_S) as sock:
            if broker.ca_file:
                _tls(broker).wrap_socket(sock, server_hostname=broker.host).close()
    except ssl.SSLError as error:
        remedy = "compare broker.host with the names in the broker's certificate, and broker.ca_file with its issuer"
        return Finding(name, FAILED, f"TLS with {broker.url} fails: {error}", remedy)
    except OSError as error:
        remedy = "start the broker, check broker.host and broker.port, and the firewall between"
        return Finding(name, FAILED, f"nothing answers at {broker.url}: {error.strerror or error}", remedy)
    return _greeting(broker, client)


def _greeting(broker: Broker, client: str) -> Finding:
    name = "broker"
    try:
        link = Link(broker, f"{client}-doctor", on_message=lambda _message: None)
    except Misconfigured as error:
        return Finding(name, FAILED, str(error), "correct the [broker] table of the configuration")
    started = time.monotonic()
    while not (link.connected or link.refusal) and time.monotonic() - started < ANSWER_S:
        link.turn(0.1)
    connected, refusal, took_ms = link.connected, link.refusal, (time.monotonic() - started) * 1e3
    link.close()
    if connected:
        return Finding(name, OK, f"{broker.url} welcomes {client} after {took_ms:.0f} ms")
    if refusal:
        remedy = "check user name, password or client certificate against the broker's list"
        return Finding(name, FAILED, f"{broker.url} refuses {client}: {refusal}", remedy)
    remedy = "check that an MQTT 5 broker listens on this port, not something else, and whether it expects TLS"
    return Finding(name, FAILED, f"{broker.url} takes the connection but does not speak MQTT", remedy)


def check_transport(broker: Broker) -> Iterator[Finding]:
    """Whether the connection is protected, and the files for that are good."""
    name = "tls"
    if not broker.ca_file:
        if broker.host in LOOPBACK_HOSTS:
            yield Finding(name, OK, "not needed: the broker is on this machine")
        else:
            health = WARNING if broker.allow_plain else FAILED
            remedy = "set broker.ca_file, broker.cert_file and broker.key_file"
            yield Finding(name, health, f"anybody on the way to {broker.host} can read and change what is said", remedy)
        return
    for setting in ("ca_file", "cert_file"):
        path = getattr(broker, setting)
        if path:
            yield _check_certificate(f"tls {setting}", Path(path))
    if broker.key_file:
        yield _check_key(broker, Path(broker.key_file))


def _tls(broker: Broker) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=broker.ca_file)
    if broker.cert_file:
        context.load_cert_chain(broker.cert_file, broker.key_file)
    return context


def _check_certificate(name: str, path: Path) -> Finding:
    from cryptography import x509  # noqa: PLC0415

    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        return Finding(name, FAILED, f"cannot read {path}: {error.strerror}", "copy it there, readable by this service")
    except ValueError as error:
        return Finding(name, FAILED, f"{path} is no certificate in PEM: {error}", "copy the right file there")
    ends = min(certificate.not_valid_after_utc for certificate in certificates)
    return _ending(name, str(path), ends, "have a new certificate issued")


def _ending(name: str, what: str, ends: datetime, remedy: str) -> Finding:
    left = ends - datetime.now(UTC)
    if left < timedelta():
        return Finding(name, FAILED, f"{what} has expired on {ends:%Y-%m-%d}", remedy)
    if left < SOON:
        return Finding(name, WARNING, f"{what} expires on {ends:%Y-%m-%d}", remedy)
    return Finding(name, OK, f"{what} is good until {ends:%Y-%m-%d}")


def _check_key(broker: Broker, path: Path) -> Finding:
    name = "tls key_file"
    try:
        readable_by_all = path.stat().st_mode & 0o044
        _tls(broker)
    except ssl.SSLError as error:
        return Finding(name, FAILED, f"{path} does not fit broker.cert_file: {error}", "install both of one pair")
    except OSError as error:
        return Finding(name, FAILED, f"cannot read {path}: {error.strerror}", "copy it there, readable by this service")
    if readable_by_all:
        return Finding(name, WARNING, f"{path} can be read by others", f"chmod 600 {path}")
    return Finding(name, OK, f"{path} fits the certificate")
