from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol import codec, topics
from protocol.link import Broker, Link, Message
from protocol.messages import Decision, Observation
from trainer_host.arena import rules
from trainer_host.private_broker import PrivateBroker

DEADLINE_S = 60.0
_OBSERVATION: codec.Decoder[Observation] = codec.Decoder(Observation)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path / "broker") as running:
        yield running


class Agent:
    """Smashes when it can and strikes else; `garble` makes it answer its first observation with nonsense."""

    def __init__(self, broker: PrivateBroker, *, garble: bool = False) -> None:
        self.seen: list[Observation] = []
        self.qos: set[int] = set()
        self.was_json: set[bool] = set()
        self._garble = garble
        self.link = Link(Broker(host=broker.host, port=broker.port), "agent", on_message=self._answer)
        self.link.subscribe((topics.state("pi1", "combat"), 1))

    def _answer(self, message: Message) -> None:
        asked = _OBSERVATION.decode(message.payload)
        self.seen.append(asked)
        self.qos.add(message.qos)
        self.was_json.add(codec.is_json(message.payload))
        legal = asked.legal or []
        action = None if asked.done else rules.SMASH if legal[rules.SMASH] else rules.STRIKE
        answer = Decision(
            battle=asked.battle, step=asked.step, actor=asked.actor, id=asked.id, action=action, model="abc", version=3
        )
        payload = codec.encode(answer, as_json=codec.is_json(message.payload))
        if self._garble and len(self.seen) == 1:
            payload = b'{"battle": 7}'
        self.link.publish(topics.action("pi1", "combat"), payload, qos=message.qos)


def ready(broker: PrivateBroker, **settings: bool) -> Agent:
    """An agent that is subscribed: it was connected, and the broker has answered once more since."""
    agent = Agent(broker, **settings)
    confirmed: list[Message] = []
    deadline = time.monotonic() + DEADLINE_S
    probe = Link(Broker(host=broker.host, port=broker.port), "probe", on_message=confirmed.append)
    while not (agent.link.connected and probe.connected):
        assert time.monotonic() < deadline, "no connection to the broker"
        agent.link.turn(0.01)
        probe.turn(0.01)
    # Packets of one connection are dealt with in order, so an answered one says that the subscription stands.
    probe.subscribe((topics.action("pi1", "combat"), 0))
    probe.publish(topics.action("pi1", "combat"), b"{}")
    while not confirmed:
        assert time.monotonic() < deadline, "the broker does not answer"
        agent.link.turn(0.01)
        probe.turn(0.01)
    probe.close()
    return agent


def play(
    broker: PrivateBroker,
    agent: Agent,
    folder: Path,
    *arguments: str,
    meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run a game against the agent and return what it printed. `meanwhile` is called between the agent's turns."""
    command = [
        sys.executable,
        "-m",
        "trainer_host.arena.game",
        "--device",
        "pi1",
        "--port",
        str(broker.port),
        *arguments,
    ]
    deadline = time.monotonic() + DEADLINE_S
    with (folder / "game.jsonl").open("wb") as output, subprocess.Popen(command, stdout=output) as game:
        try:
            while game.poll() is None:
                assert time.monotonic() < deadline, "the game does not end"
                agent.link.turn(0.02)
                meanwhile(game)
        finally:
            game.kill()
    agent.link.close()
    assert game.returncode == 0
    return [json.loads(line) for line in (folder / "game.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("encoding", "observe", "qos"), [("json", "state", 0), ("msgpack", "features", 1), ("msgpack", "state", 0)]
)
def test_a_game_plays_its_battles_over_a_real_broker(
    broker: PrivateBroker, tmp_path: Path, encoding: str, observe: str, qos: int
) -> None:
    agent = ready(broker)
    how = ["--encoding", encoding, "--observe", observe, "--qos", str(qos)]
    reports = play(broker, agent, tmp_path, "--battles", "120", "--report-seconds", "0.1", *how)
    final = reports[-1]
    assert [report["final"] for report in reports] == [False] * (len(reports) - 1) + [True]
    assert len(reports) > 1
    assert final["battles"] == final["wins"] + final["draws"] + final["losses"] == 120
    assert (final["errors"], final["timeouts"], final["interrupted"]) == ({}, 0, 0)
    assert (
        final["answers"] == final["models"]["abc"] == final["versions"]["3"] == sum(not one.done for one in agent.seen)
    )
    assert final["latency_us_p99"] >= final["latency_us_p50"] > 0
    assert (agent.qos, agent.was_json) == ({qos}, {encoding == "json"})
    assert all((one.state is None) == (observe == "features") for one in agent.seen)


@pytest.mark.parametrize("player", ["expert", "random"])
def test_a_players_choices_are_sent_as_taken(broker: PrivateBroker, tmp_path: Path, player: str) -> None:
    agent = ready(broker)
    final = play(broker, agent, tmp_path, "--battles", "60", "--player", player)[-1]
    assert all((one.taken is None) == one.done for one in agent.seen)
    assert (final["win_rate"] > 0.5) == (player == "expert")


def test_two_runs_never_name_a_battle_alike(broker: PrivateBroker, tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        agent = ready(broker)
        play(broker, agent, tmp_path, "--battles", "3")
        names.append({one.battle for one in agent.seen})
    assert len(names[0]) == len(names[1]) == 3
    assert not names[0] & names[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_game_with_its_final_report(broker: PrivateBroker, tmp_path: Path, number: int) -> None:
    agent = ready(broker)

    told: list[int] = []

    def stop_after_some_battles(game: subprocess.Popen[bytes]) -> None:
        if not told and sum(one.done for one in agent.seen) > 50:
            game.send_signal(number)
            told.append(number)

    final = play(broker, agent, tmp_path, "--report-seconds", "0.1", meanwhile=stop_after_some_battles)[-1]
    assert final["final"]
    assert final["battles"] > 20


def test_nonsense_in_answer_is_counted_and_its_battle_goes_on(broker: PrivateBroker, tmp_path: Path) -> None:
    agent = ready(broker, garble=True)
    final = play(broker, agent, tmp_path, "--battles", "10", "--concurrent", "5")[-1]
    assert final["errors"] == {"malformed_answer": 1}
    assert (final["timeouts"], final["interrupted"], final["battles"]) == (1, 1, 10)


def test_a_game_outlives_its_broker(broker: PrivateBroker, tmp_path: Path) -> None:
    agent = ready(broker)
    restarted: list[int] = []

    def restart_once(_: subprocess.Popen[bytes]) -> None:
        if not restarted and sum(one.done for one in agent.seen) > 50:
            broker.stop()
            broker.start()
            restarted.append(len(agent.seen))

    final = play(broker, agent, tmp_path, "--battles", "400", meanwhile=restart_once)[-1]
    assert restarted
    assert len(agent.seen) > restarted[0]
    assert final["battles"] == 400


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--device", "pi1", "--host", "broker.example"], "broker.ca_file"), (["--device", "p/1"], "device 'p/1'")],
)
def test_wrong_settings_are_said_in_a_sentence(arguments: list[str], text: str) -> None:
    command = [sys.executable, "-m", "trainer_host.arena.game", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert ended.returncode == 2
    assert text in ended.stderr
    assert "Traceback" not in ended.stderr
