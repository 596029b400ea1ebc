"""The MQTT adapter against a real Mosquitto, and against brokers that misbehave."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from protocol import link as link_module
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.errors import Misconfigured, Unavailable
from protocol.link import Broker, Link, Message, Will
from trainer_host.private_broker import PrivateBroker

LIMIT_S = 10.0


class Guarded(PrivateBroker):
    """A broker that asks for a password."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        subprocess.run(["mosquitto_passwd", "-b", "-c", str(folder / "passwords"), "pi7", "right"], check=True)
        (folder / "passwords").chmod(0o600)
        super().__init__(folder)

    def _config(self, port: int) -> str:
        lines = super()._config(port).replace("allow_anonymous true", "allow_anonymous false")
        return lines + f"password_file {self._folder / 'passwords'}\n"


class Generous(PrivateBroker):
    """A broker that takes payloads of any size, as Mosquitto does unless it is told otherwise."""

    def _config(self, port: int) -> str:
        return "\n".join(line for line in super()._config(port).splitlines() if "max_packet_size" not in line) + "\n"


class Party:
    """Links that are turned together."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.links: list[Link] = []

    def join(self, name: str, on_message: Callable[[Message], None] = lambda _message: None, **options: object) -> Link:
        link = Link(Broker(port=self.port), name, on_message=on_message, **options)  # type: ignore[arg-type]
        self.links.append(link)
        self.until(lambda: link.connected)
        return link

    def subscribed(self, name: str, heard: list[Message], *filters: tuple[str, int], **options: object) -> Link:
        """A link whose subscriptions the broker has granted."""
        granted: list[int] = []
        link = self.join(name, heard.append, on_subscribed=granted.append, **options)
        packet = link.subscribe(*filters)
        assert packet > 0
        self.until(lambda: granted == [packet])
        return link

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not what():
            assert time.monotonic() < deadline, "it never came"
            for link in self.links:
                link.turn(0.01)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path / "broker") as broker:
        yield broker


@pytest.fixture
def party(broker: PrivateBroker) -> Iterator[Party]:
    party = Party(broker.port)
    yield party
    for link in party.links:
        link.close()


def socket_of(link: Link) -> socket.socket:
    return socket.socket(fileno=os.dup(link.fileno()))


def kill_connection(link: Link) -> None:
    """As if the process had died: no goodbye."""
    with socket_of(link) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def test_a_message_arrives_with_all_that_belongs_to_it(party: Party) -> None:
    heard: list[Message] = []
    party.subscribed("reader", heard, ("a/+", 1))
    writer = party.join("writer")
    writer.publish("a/b", b"hello", qos=1, correlation=b"\x00\xff")
    party.until(lambda: heard)
    (message,) = heard
    assert (message.topic, message.payload, message.qos, message.retain) == ("a/b", b"hello", 1, False)
    assert (message.response_topic, message.correlation) == (None, b"\x00\xff")


def test_a_requests_response_topic_arrives(party: Party) -> None:
    heard: list[Message] = []
    party.subscribed("reader", heard, ("a", 0))
    writer = party.join("writer")
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ResponseTopic = "answers/here"
    writer._client.publish("a", b"?", properties=properties)
    party.until(lambda: heard)
    assert heard[0].response_topic == "answers/here"


def test_small_packets_are_sent_at_once(party: Party) -> None:
    with socket_of(party.join("one")) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_publication_at_qos_1_is_confirmed_by_its_packet(party: Party) -> None:
    confirmed: list[int] = []
    link = party.join("one", on_published=confirmed.append)
    packet = link.publish("a", b"x", qos=1)
    party.until(lambda: confirmed)
    assert confirmed == [packet]


def test_nothing_can_be_published_without_a_connection(broker: PrivateBroker) -> None:
    link = Link(Broker(port=broker.port), "one", on_message=lambda _message: None)
    with pytest.raises(Unavailable, match=str(broker.port)):
        link.publish("a", b"x")


def test_subscriptions_are_renewed_after_the_broker_was_away_and_removed_ones_are_not(
    party: Party, broker: PrivateBroker
) -> None:
    heard: list[Message] = []
    connections: list[str] = []
    reader = party.subscribed(
        "reader", heard, ("kept", 1), ("given-up", 1), on_connected=lambda: connections.append("again")
    )
    reader.unsubscribe("given-up")
    broker.stop()
    party.until(lambda: not reader.connected)
    with pytest.raises(Unavailable):
        reader.publish("a", b"x")
    assert reader.subscribe(("added", 0)) == 0
    broker.start()
    party.until(lambda: reader.connected)
    assert len(connections) == 2
    writer = party.join("writer")
    for topic in ("given-up", "added", "kept"):
        writer.publish(topic, b"x", qos=1)
    party.until(lambda: any(message.topic == "kept" for message in heard))
    assert sorted(message.topic for message in heard) == ["added", "kept"]


def test_with_manual_acknowledgement_the_broker_waits_for_it(party: Party) -> None:
    window = 64  # of the private broker
    heard: list[Message] = []
    reader = party.subscribed("reader", heard, ("a", 1), manual_ack=True)
    writer = party.join("writer")
    for number in range(window + 2):
        writer.publish("a", bytes([number]), qos=1)
    party.until(lambda: len(heard) == window)
    reader.acknowledge(heard[0])
    reader.acknowledge(heard[1])
    party.until(lambda: len(heard) == window + 2)
    assert [message.payload[0] for message in heard] == list(range(window + 2))


def test_an_acknowledgement_for_a_lost_connection_is_not_sent_on_the_next(party: Party) -> None:
    heard: list[Message] = []
    reader = party.subscribed("reader", heard, ("a", 1), manual_ack=True)
    writer = party.join("writer")
    writer.publish("a", b"before", qos=1)
    party.until(lambda: heard)
    kill_connection(reader)
    party.until(lambda: not reader.connected)
    party.until(lambda: reader.connected)
    writer.publish("a", b"after", qos=1)
    party.until(lambda: heard[-1].payload == b"after")
    before, after = heard[0], heard[-1]
    assert before.packet == after.packet
    assert not reader._client.want_write()
    sent: list[int] = []
    reader._client.on_log = lambda *_arguments: sent.append(1)
    reader.acknowledge(before)
    assert sent == []
    reader.acknowledge(after)
    assert sent != []


def test_the_will_is_published_for_the_dead_and_not_for_those_who_say_goodbye(party: Party) -> None:
    heard: list[Message] = []
    party.subscribed("reader", heard, ("wills/+", 1))
    killed = party.join("killed", will=Will("wills/killed", b"gone", 1, retain=True))
    polite = party.join("polite", will=Will("wills/polite", b"gone", 1, retain=True))
    party.links.remove(killed)
    party.links.remove(polite)
    polite.close()
    kill_connection(killed)
    party.until(lambda: heard)
    assert [message.topic for message in heard] == ["wills/killed"]


def test_what_was_published_before_the_goodbye_arrives(party: Party) -> None:
    heard: list[Message] = []
    party.subscribed("reader", heard, ("a", 1))
    writer = party.join("writer")
    for number in range(100):
        writer.publish("a", bytes([number]) * 1000)
    party.links.remove(writer)
    writer.close()
    party.until(lambda: len(heard) == 100)


def test_a_turn_names_other_things_that_can_be_read_with_and_without_a_connection(party: Party) -> None:
    link = party.join("one")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert link.turn(0.0, also=[ours]) == []
        theirs.send(b"x")
        assert link.turn(5.0, also=[ours]) == [ours]
        alone = Link(Broker(port=1), "nobody", on_message=lambda _message: None)
        assert alone.turn(5.0, also=[ours]) == [ours]
        assert not alone.connected


@pytest.mark.parametrize("retain", [False, True])
def test_the_largest_payload_arrives_and_what_is_larger_stays_at_the_broker(tmp_path: Path, retain: bool) -> None:
    with Generous(tmp_path / "broker") as broker:
        party = Party(broker.port)
        heard: list[Message] = []
        confirmed: list[int] = []
        writer = party.join("writer", on_published=confirmed.append)
        if not retain:
            party.subscribed("reader", heard, ("#", 1))
        for name, size in (("huge", 10_000_000), ("large", 150_000), ("0" * 100, MAX_PAYLOAD_BYTES)):
            writer.publish(name, bytes(size), qos=1, retain=retain)
        party.until(lambda: len(confirmed) == 3)
        if retain:
            party.subscribed("reader", heard, ("#", 1))
        writer.publish("last", b"x", qos=1)
        party.until(lambda: heard and heard[-1].topic == "last")
        assert [len(message.payload) for message in heard] == [MAX_PAYLOAD_BYTES, 1]
        for link in party.links:
            assert link.connected
            link.close()


@pytest.mark.parametrize("host", ["broker.example", "192.0.2.1", "10.0.0.1"])
def test_a_plain_connection_to_another_machine_must_be_allowed_in_words(host: str) -> None:
    with pytest.raises(Misconfigured, match="allow_plain"):
        Link(Broker(host=host), "one", on_message=lambda _message: None)
    Link(Broker(host=host, allow_plain=True), "one", on_message=lambda _message: None)


@pytest.mark.parametrize("name", ["ca_file", "password_file"])
def test_a_file_that_cannot_be_read_is_a_mistake_of_the_configuration(name: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(Misconfigured, match="cannot read"):
        Link(Broker(username="pi7", **{name: missing}), "one", on_message=lambda _message: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\n"])
def test_a_file_without_a_password_is_a_mistake_of_the_configuration(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    if content == b"\n":
        Link(Broker(username="pi7", password_file=str(file)), "one", on_message=lambda _message: None)
        return
    with pytest.raises(Misconfigured, match="first line"):
        Link(Broker(username="pi7", password_file=str(file)), "one", on_message=lambda _message: None)


def test_refused_credentials_are_reported_and_right_ones_let_in(tmp_path: Path) -> None:
    with Guarded(tmp_path / "broker") as broker:
        party = Party(broker.port)
        links = {}
        for word in ("wrong", "right"):
            file = tmp_path / word
            file.write_text(word + "\n")
            settings = Broker(port=broker.port, username="pi7", password_file=str(file))
            links[word] = Link(settings, word, on_message=lambda _message: None)
            party.links.append(links[word])
        party.until(lambda: links["wrong"].refusal is not None and links["right"].connected)
        assert links["wrong"].refusal == "Not authorized"
        assert not links["wrong"].connected
        assert links["right"].refusal is None
        for link in party.links:
            link.close()


def test_a_refused_subscription_is_not_called_granted() -> None:
    granted: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        link = Link(
            Broker(port=server.getsockname()[1]), "one", on_message=lambda _message: None, on_subscribed=granted.append
        )
        party = Party(0)
        party.links.append(link)
        link.turn(0.0)
        played, _ = server.accept()
        with played:
            played.sendall(bytes([0x20, 3, 0, 0, 0]))  # CONNACK
            party.until(lambda: link.connected)
            refused, allowed = link.subscribe(("secret", 1)), link.subscribe(("open", 1))
            for packet, reason in ((refused, 0x87), (allowed, 1)):
                played.sendall(bytes([0x90, 4, *packet.to_bytes(2, "big"), 0, reason]))  # SUBACK
            party.until(lambda: granted)
            assert granted == [allowed]
            link.close()


def test_a_broker_that_accepts_but_never_answers_is_given_up_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        link = Link(Broker(port=server.getsockname()[1]), "one", on_message=lambda _message: None)
        link.turn(0.0)
        silent, _ = server.accept()
        party = Party(0)
        party.links.append(link)
        server.setblocking(False)
        accepted: list[socket.socket] = []

        def tried_again() -> bool:
            try:
                accepted.append(server.accept()[0])
            except BlockingIOError:
                return False
            return True

        party.until(tried_again)
        assert not link.connected
        with silent, accepted[0]:
            link.close()


def test_a_flood_is_read_in_bounded_turns_and_nothing_of_it_is_lost(party: Party, broker: PrivateBroker) -> None:
    heard: list[Message] = []
    reader = party.subscribed("reader", heard, ("flood", 0))
    writer = party.join("writer")
    party.links.remove(reader)
    assert broker.pid is not None
    for number in range(2000):
        writer.publish("flood", str(number).encode())
    party.until(lambda: not writer._client.want_write())
    most = 0
    deadline = time.monotonic() + LIMIT_S
    while len(heard) < 2000 and time.monotonic() < deadline:
        before = len(heard)
        reader.turn(0.1)
        most = max(most, len(heard) - before)
    assert [int(message.payload) for message in heard] == list(range(2000))
    assert most <= link_module.MAX_PACKETS_PER_TURN
    reader.close()


def test_a_broker_that_is_stopped_in_its_tracks_is_noticed_by_the_keepalive(
    broker: PrivateBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(Broker(port=broker.port, keepalive_s=5), "one", on_message=lambda _message: None)
    party = Party(broker.port)
    party.links.append(link)
    party.until(lambda: link.connected)
    link._client._keepalive = 1  # the settings allow no less than 5 s
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        party.until(lambda: not link.connected)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    party.until(lambda: link.connected)
    link.close()
