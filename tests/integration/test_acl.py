"""The access rules of docs/on-a-pi.md, on a real Mosquitto: a device's credentials are good for its own topics only."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol import topics
from protocol.link import Broker, Link, Message
from trainer_host.private_broker import PrivateBroker, find_mosquitto

DOCUMENT = Path(__file__).parents[2] / "docs" / "on-a-pi.md"
DEADLINE_S = 20.0
CHUNK = topics.chunk("a" * 64)
EVERYBODY = {"trainer-host", "game", "pi7"}
OPEN_TO_ALL = topics.state("pi7", "combat")


class Network:
    """A broker with the rules, and a connection of each of its users, which listens to all that it may read."""

    def __init__(self, folder: Path) -> None:
        (rules,) = re.findall(r"<<'ACL'\n(.*?)^ACL$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        (folder / "acl").write_text(rules)
        (folder / "acl").chmod(0o600)
        with PrivateBroker(folder / "free") as broker:
            port = broker.port
        lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", f"acl_file {folder / 'acl'}"]
        if os.geteuid() == 0:
            lines.append("user root")
        (folder / "conf").write_text("\n".join(lines) + "\n")
        self._broker = subprocess.Popen([find_mosquitto(), "-c", str(folder / "conf")], stderr=subprocess.DEVNULL)
        self._heard: dict[str, list[tuple[str, bytes]]] = {user: [] for user in EVERYBODY}
        self._links = {user: self._link(port, user) for user in EVERYBODY}
        self._until(lambda: all(link.connected for link in self._links.values()))

    def hearers(self, user: str, topic: str) -> set[str]:
        """Who hears what a user publishes. It is known once all have heard what he published after it."""
        first, last = b"first %d" % time.monotonic_ns(), b"last %d" % time.monotonic_ns()
        self._links[user].publish(topic, first, qos=1)
        self._links[user].publish(OPEN_TO_ALL, last, qos=1)
        self._until(lambda: all((OPEN_TO_ALL, last) in heard for heard in self._heard.values()))
        return {name for name, heard in self._heard.items() if (topic, first) in heard}

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._broker.terminate()
        self._broker.wait(DEADLINE_S)

    def _link(self, port: int, user: str) -> Link:
        def hear(message: Message) -> None:
            self._heard[user].append((message.topic, message.payload))

        link = Link(Broker(port=port, username=user), f"{user}-client", on_message=hear)
        link.subscribe(("fleet/v1/#", 1), ("battle/v1/#", 1))
        return link

    def _until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert time.monotonic() < deadline, self._heard
            for link in self._links.values():
                link.turn(0.02)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    made = Network(tmp_path_factory.mktemp("acl"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("user", "topic", "hearers"),
    [
        ("trainer-host", topics.METADATA, {"trainer-host", "pi7"}),
        ("trainer-host", CHUNK, {"trainer-host", "pi7"}),
        ("trainer-host", topics.fleet("pi7", "ack"), {"trainer-host", "pi7"}),
        ("pi7", topics.CHUNK_REQUESTS, {"trainer-host", "pi7"}),
        ("pi7", topics.fleet("pi7", "events"), {"trainer-host", "pi7"}),
        ("pi7", topics.action("pi7", "combat"), EVERYBODY),
        ("game", topics.state("pi8", "combat"), {"trainer-host", "game"}),
        ("pi7", topics.METADATA, set()),
        ("pi7", CHUNK, set()),
        ("pi7", topics.fleet("pi8", "events"), set()),
        ("pi7", topics.fleet("pi8", "ack"), set()),
        ("pi7", topics.action("pi8", "combat"), set()),
        ("game", topics.METADATA, set()),
        ("game", topics.fleet("pi7", "transitions"), set()),
        ("game", topics.CHUNK_REQUESTS, set()),
    ],
)
def test_who_may_say_what_to_whom(network: Network, user: str, topic: str, hearers: set[str]) -> None:
    assert network.hearers(user, topic) == hearers
