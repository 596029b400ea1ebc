"""The only MQTT adapter: one MQTT 5 connection, driven from its owner's own thread.

There is no background thread and there are no locks. The owner calls `turn` in its loop; that reads, calls back,
writes, keeps the connection alive and, when it is lost, makes a new one after a jittered back-off. Nothing is sent
while there is no connection: `publish` says so by raising, and its caller decides what to keep.
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, cast

from msgspec import Meta, Struct
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.errors import Misconfigured, Unavailable

log = logging.getLogger(__name__)

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
CONNECT_TIMEOUT_S = 2.0
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 15.0
MAX_PACKETS_PER_TURN = 512
# The largest payload, with topic and properties. The broker keeps larger ones to itself (MQTT 5 section 3.1.2.11.4).
MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 4 * 1024
UNLIMITED = 0


class Broker(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach the broker.

    Attributes:
        host: Name or address.
        port: 1883 without TLS, 8883 with it, by convention.
        username: Where the broker asks for one; with client certificates it takes their name.
        password_file: A file whose first line is the password.
        ca_file: Certificates to trust; setting it turns TLS on.
        cert_file: This client's certificate (mutual TLS), with `key_file`.
        key_file: Its private key.
        allow_plain: Permit a connection without TLS to a host that is not this one.
        keepalive_s: Longest silence before the connection is checked.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    allow_plain: bool = False
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30

    @property
    def url(self) -> str:
        """For people: `mqtts://host:port`."""
        return f"{'mqtts' if self.ca_file else 'mqtt'}://{self.host}:{self.port}"


class Message(NamedTuple):
    """A message that arrived.

    Attributes:
        response_topic: MQTT 5 property of a request (specification section 4.10), or `None`.
        correlation: The request's correlation data, or `None`.
        packet: Packet identifier, for `Link.acknowledge`.
        connection: Which connection brought it; packet identifiers mean nothing on another one.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool
    response_topic: str | None
    correlation: bytes | None
    packet: int
    connection: int = 0


class Will(NamedTuple):
    """What the broker publishes when this client vanishes."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


class HasFileno(Protocol):
    """Anything `select` can wait for."""

    def fileno(self) -> int:
        """The file descriptor."""


class Link:
    """One MQTT 5 connection.

    Args:
        broker: Where to connect.
        client_id: Unique on the broker.
        on_message: Called from `turn` with each message.
        on_connected: Called from `turn` after each successful connection, once subscriptions have been renewed.
        on_published: Called from `turn` with the packet identifier of a publication at QoS 1 that the broker
            acknowledged.
        on_subscribed: Called from `turn` with the packet identifier of a subscription that the broker has granted, or
            of
            its removal. A refused one is logged.
        will: Published by the broker if this client vanishes.
        manual_ack: Messages at QoS 1 are acknowledged by `acknowledge`, not on receipt.

    Raises:
        Misconfigured: A plain connection off loopback that the settings do not allow, or unreadable TLS files.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        *,
        on_message: Callable[[Message], None],
        on_connected: Callable[[], None] | None = None,
        on_published: Callable[[int], None] | None = None,
        on_subscribed: Callable[[int], None] | None = None,
        will: Will | None = None,
        manual_ack: bool = False,
    ) -> None:
        self.connected = False
        self.refusal: str | None = None
        self._broker = broker
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_published = on_published
        self._on_subscribed = on_subscribed
        self._subscriptions: dict[str, int] = {}
        self._packets = 0
        self._connection = 0
        self._retry_s = FIRST_RETRY_S
        self._retry_at = 0.0
        self._connecting_since = 0.0
        self._checked_at = 0.0
        self._client = self._configured(client_id, manual_ack=manual_ack, will=will)

    def fileno(self) -> int:
        """The socket's descriptor, or -1 while there is none."""
        sock = self._client.socket()
        return -1 if sock is None else sock.fileno()

    def turn(self, timeout_s: float, also: Sequence[HasFileno] = ()) -> list[HasFileno]:
        """Wait for traffic, at most `timeout_s` seconds, and deal with it.

        Args:
            timeout_s: Longest wait, in seconds; 0 only looks.
            also: Further things to wait for.

        Returns:
            Those of `also` that are readable.
        """
        now = time.monotonic()
        if self._client.socket() is None:
            self._connect_when_due(now)
        sock = self._client.socket()
        if sock is None:
            wait_s = min(timeout_s, max(self._retry_at - now, 0.0))
            return _selected(list(also), [], wait_s)[0]
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            timeout_s = 0.0
        readable, writable = _selected([sock, *also], [sock] if self._client.want_write() else [], timeout_s)
        if sock in readable or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            self._read()
        if writable or self._client.want_write():
            self._client.loop_write()
        if now - self._checked_at >= 1.0:
            self._checked_at = now
            self._check(now)
        return [item for item in readable if item is not sock]

    def subscribe(self, *filters: tuple[str, int]) -> int:
        """Subscribe to `(topic filter, QoS)` pairs, now and after each reconnection.

        Returns:
            The packet identifier, or 0 while there is no connection.
        """
        self._subscriptions.update(filters)
        if not self.connected:
            return 0
        _, packet = self._client.subscribe([(topic, SubscribeOptions(qos=qos)) for topic, qos in filters])
        return packet or 0

    def unsubscribe(self, *filters: str) -> int:
        """End subscriptions.

        Returns:
            The packet identifier, or 0 while there is no connection.
        """
        for topic in filters:
            self._subscriptions.pop(topic, None)
        if not self.connected:
            return 0
        _, packet = self._client.unsubscribe(list(filters))
        return packet or 0

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, correlation: bytes | None = None
    ) -> int:
        """Publish a message.

        Returns:
            The packet identifier that `on_published` will name.

        Raises:
            Unavailable: There is no connection. Nothing was queued.
        """
        if not self.connected:
            raise Unavailable(f"no connection to the broker at {self._broker.url}")
        properties = None
        if correlation is not None:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.CorrelationData = correlation
        return self._client.publish(topic, payload, qos, retain, properties).mid

    def acknowledge(self, message: Message) -> None:
        """Acknowledge a message at QoS 1, with `manual_ack`.

        Without effect once its connection is lost: the broker then sends the message again.
        """
        if message.qos and self.connected and message.connection == self._connection:
            self._client.ack(message.packet, message.qos)

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what is queued, say goodbye, and close; the will is not published."""
        deadline = time.monotonic() + timeout_s
        while self.connected and self._client.want_write() and time.monotonic() < deadline:
            self.turn(0.05)
        self.connected = False
        self._client.disconnect()
        while self._client.socket() is not None and self._client.want_write() and time.monotonic() < deadline:
            self._client.loop_write()

    def _configured(self, client_id: str, *, manual_ack: bool, will: Will | None) -> Client:
        broker = self._broker
        client = Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=manual_ack
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(UNLIMITED)  # each owner bounds what it publishes; a queue here would be silent
        client.on_message = self._message_arrived
        client.on_connect = self._connect_answered
        client.on_disconnect = self._disconnected
        if self._on_published:  # paho builds a reason and a property table for each call, also at QoS 0
            client.on_publish = self._publish_acknowledged
        client.on_subscribe = self._subscription_acknowledged
        client.on_unsubscribe = self._subscription_acknowledged
        if will:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        try:
            _secure(client, broker)
        except OSError as error:
            raise Misconfigured(f"cannot read the broker's TLS or password files: {error}") from error
        limits = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        limits.MaximumPacketSize = MAX_PACKET_BYTES
        client.connect_async(broker.host, broker.port, broker.keepalive_s, clean_start=True, properties=limits)
        return client

    def _connect_when_due(self, now: float) -> None:
        if now < self._retry_at:
            return
        self._retry_at = now + self._retry_s * random.uniform(0.5, 1.5)
        self._retry_s = min(self._retry_s * 2, LAST_RETRY_S)
        self._connecting_since = now
        try:
            self._client.reconnect()
        except OSError as error:
            log.warning("cannot reach the broker at %s: %s", self._broker.url, error)
            return
        sock = self._client.socket()
        if sock is not None:
            cast(socket.socket, sock).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _read(self) -> None:
        """Read packets until the socket is empty, so that their number is known before the first is answered."""
        for _ in range(MAX_PACKETS_PER_TURN):
            before = self._packets
            if self._client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS or self._packets == before:
                return

    def _check(self, now: float) -> None:
        self._client.loop_misc()
        if not self.connected and now - self._connecting_since > 2 * CONNECT_TIMEOUT_S:
            log.warning("the broker at %s accepted the connection but does not answer", self._broker.url)
            self._drop()

    def _drop(self) -> None:
        sock = self._client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):  # the other side may have gone meanwhile
                cast(socket.socket, sock).shutdown(socket.SHUT_RDWR)

    # Callbacks from paho, all within `turn`.

    def _message_arrived(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._packets += 1
        properties = message.properties
        self._on_message(
            Message(
                message.topic,
                bytes(message.payload),
                message.qos,
                message.retain,
                getattr(properties, "ResponseTopic", None),
                getattr(properties, "CorrelationData", None),
                message.mid,
                self._connection,
            )
        )

    def _connect_answered(
        self, _client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        self._packets += 1
        if reason.is_failure:
            self.refusal = str(reason)
            log.error("the broker at %s refused the connection: %s", self._broker.url, reason)
            return
        self.connected = True
        self._connection += 1
        self.refusal = None
        self._retry_s = FIRST_RETRY_S
        if self._subscriptions:
            self.subscribe(*self._subscriptions.items())
        if self._on_connected:
            self._on_connected()

    def _disconnected(self, _client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if self.connected:
            log.warning("lost the broker at %s: %s", self._broker.url, reason)
        self.connected = False

    def _publish_acknowledged(
        self, _client: Client, _userdata: Any, packet: int, _reason: Any, _properties: Any
    ) -> None:
        self._packets += 1
        if self._on_published:
            self._on_published(packet)

    def _subscription_acknowledged(
        self, _client: Client, _userdata: Any, packet: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        self._packets += 1
        refused = [reason for reason in reasons if reason.is_failure]
        for reason in refused:
            log.error("the broker at %s refused a subscription: %s", self._broker.url, reason)
        if self._on_subscribed and not refused:
            self._on_subscribed(packet)


def _secure(client: Client, broker: Broker) -> None:
    if broker.ca_file:
        client.tls_set(broker.ca_file, broker.cert_file, broker.key_file, tls_version=ssl.PROTOCOL_TLS_CLIENT)
    elif broker.host not in LOOPBACK_HOSTS and not broker.allow_plain:
        raise Misconfigured(
            f"broker {broker.host} is not on this machine: set broker.ca_file for TLS, "
            "or broker.allow_plain = true to do without"
        )
    if broker.username:
        client.username_pw_set(broker.username, _password(broker.password_file) if broker.password_file else None)


def _password(file: str) -> str:
    lines = Path(file).read_bytes().decode("utf-8", "surrogateescape").splitlines()
    if not lines or not lines[0].isprintable():
        raise Misconfigured(f"the first line of {file} must be the password, in UTF-8")
    return lines[0]


def _selected(readers: Sequence[Any], writers: Sequence[Any], timeout_s: float) -> tuple[list[Any], list[Any]]:
    readable, writable, _ = select.select(readers, writers, [], timeout_s)
    return readable, writable
