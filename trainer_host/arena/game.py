"""The reference game as a process: plays many battles at once through an agent, and reports what it sees.

    python -m trainer_host.arena.game --device pi1 --slot combat --battles 1000

It prints a JSON object per line: one each `--report-seconds`, and one with `"final": true` when the battles are played
or a SIGTERM or SIGINT ends it. Rates and latencies are those since the line before, in the final line those of the
whole game. Exit status 0; 2 for wrong settings.
"""

from __future__ import annotations

import json
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from protocol import codec, topics
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.link import Broker, Link, Message
from protocol.messages import Decision, Observation
from trainer_host.arena.players import ExpertPlayer, Player, RandomPlayer
from trainer_host.arena.session import Plan, Session

WAIT_S = 0.05
MALFORMED_ANSWER = "malformed_answer"
_DECODER: codec.Decoder[Decision | list[Decision]] = codec.Decoder(Decision | list[Decision])
_PLAYERS: dict[str, type[ExpertPlayer] | type[RandomPlayer]] = {"expert": ExpertPlayer, "random": RandomPlayer}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    device: str
    """The device whose agent answers."""
    slot: str = "combat"
    """The slot of it."""
    host: str = "127.0.0.1"
    """The broker."""
    port: int = 1883
    """Its port."""
    battles: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    """How many to play; 0 plays until a signal ends it."""
    concurrent: Annotated[int, Parameter(validator=Number(gte=1, lte=4096))] = 64
    """How many at once."""
    player: Literal["agent", "expert", "random"] = "agent"
    """Who chooses for side A: the agent, or a player whose choice is sent as `taken` while the agent still answers."""
    seed: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    """Of the battles."""
    qos: Literal[0, 1] = 0
    """MQTT quality of service, both ways."""
    report_seconds: Annotated[float, Parameter(validator=Number(gt=0))] = 0.5
    """Time between two lines."""
    encoding: Literal["json", "msgpack"] = "json"
    """Of the observations."""
    observe: Literal["state", "features"] = "state"
    """Send the game's own state, or the encoded vector."""
    name: str = "game1"
    """Begins the battles' names, and this client's on the broker."""


class Game:
    """A session on a link.

    Args:
        settings: What to play and where.

    Raises:
        Misconfigured: The broker cannot be used as the settings say.
        Rejected: A name cannot be part of a topic.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        for what in ("device", "slot", "name"):
            topics.checked_name(getattr(settings, what), what)
        self._state_topic = topics.state(settings.device, settings.slot)
        # Unlike its battles, the name of a run is new each time: the agent must never join two runs' battles.
        run = f"{settings.name}-{secrets.token_hex(4)}"
        self._session = Session(_plan(settings, run))
        self._unsent: deque[Observation] = deque()
        self._stopping = False
        broker = Broker(host=settings.host, port=settings.port)
        self._link = Link(broker, run, on_message=self._answered)
        self._link.subscribe((topics.action(settings.device, settings.slot), settings.qos))

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """End `play` at its next turn. A signal handler."""
        self._stopping = True

    def play(self) -> Iterable[dict[str, Any]]:
        """Play, and yield a report now and then; the last one is final."""
        session = self._session
        while not (self._link.connected or self._stopping):
            self._link.turn(WAIT_S)
        began = reported = time.monotonic()
        self._unsent.extend(session.start())
        while not (session.finished or self._stopping):
            self._publish()
            now = time.monotonic()
            due = reported + self._settings.report_seconds
            if now >= due:
                yield session.tally.lap(now - reported)
                reported = now
            self._link.turn(max(min(WAIT_S, due - now), 0.0))
            session.expire(time.monotonic_ns())
            self._unsent.extend(session.advance())
        yield session.tally.final(time.monotonic() - began)
        self._link.close()

    def _publish(self) -> None:
        """Publish what there is; what the link cannot take now waits for the next turn."""
        as_json = self._settings.encoding == "json"
        while self._unsent and self._link.connected:
            observation = self._unsent[0]
            payload = codec.encode(observation, as_json=as_json)
            now_ns = time.monotonic_ns()
            try:
                self._link.publish(self._state_topic, payload, qos=self._settings.qos)
            except Unavailable:
                return
            self._unsent.popleft()
            assert isinstance(observation.id, int)
            self._session.sent(observation.id, now_ns)

    def _answered(self, message: Message) -> None:
        now_ns = time.monotonic_ns()
        try:
            decisions = _DECODER.decode(message.payload)
        except Rejected:
            self._session.tally.errors[MALFORMED_ANSWER] += 1
            return
        for decision in decisions if isinstance(decisions, list) else [decisions]:
            self._session.receive(decision, now_ns)


def _plan(settings: Settings, run: str) -> Plan:
    player: Player | None = None if settings.player == "agent" else _PLAYERS[settings.player]()
    return Plan(
        name=run,
        seed=settings.seed,
        battles=settings.battles,
        concurrent=settings.concurrent,
        observe=settings.observe,
        player=player,
    )


app = App(name="game", help="Play battles through an agent on the broker.", version_flags=[])


@app.default
def main(settings: Settings) -> int:
    """Play battles through an agent on the broker."""
    try:
        game = Game(settings)
    except (Misconfigured, Rejected) as error:
        print(error, file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, game.stop)
    for report in game.play():
        print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    app()
