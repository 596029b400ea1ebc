"""The scenes of the demonstration, in order; each says what it saw, and whether that is what should be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from demo.attack import tampered
from demo.screen import Screen
from demo.stage import DEVICE, SLOT, Game, Stage, StepFailed
from protocol import topics
from protocol.errors import EdgeswapError
from protocol.messages import Event, SlotStatus
from trainer_host.jobs import Exported, PaddedRequest, UntrainedRequest, run_job
from trainer_host.recipes import table

COUNTED_BATTLES = 600
LEARNED_BATTLES = 2600
NEW_TRANSITIONS = 35_000
SLOW_WIDTH = 512

HOST_CONFIG = """\
state_dir = "host"
[broker]
port = {port}
[training]
seed = {seed}
[auto_publish]
min_new_transitions = {new}
min_seconds = 0
"""

AGENT_CONFIG = """\
device = "{device}"
state_dir = "agent"
telemetry_seconds = 1.0
[broker]
port = {port}
[slots.{slot}]
deadline_ms = 1000  # the game is turn-based, and this computer plays every part at once
"""


class Demo:
    """Plays all scenes on a stage.

    Args:
        stage: Where the processes run.
        screen: Where it is shown.
        seed: Of battles, weights and training.
    """

    def __init__(self, stage: Stage, screen: Screen, seed: int) -> None:
        self._stage = stage
        self._screen = screen
        self._seed = seed
        self._host = ("trainer_host",)
        self._rows: list[tuple[str, str, str]] = []
        self._win_rates: dict[int, dict[str, Any]] = {}
        self._first_metadata = b""
        self._network = ""

    def play(self) -> bool:
        """Play every scene; whether every step held."""
        scenes: tuple[tuple[str, Callable[[], str]], ...] = (
            ("Keys, a signed untrained version 0, a device", self._set_up),
            ("Version 0 plays the scripted opponent", lambda: self._count(0)),
            ("A stronger player plays, the trainer learns", self._learn),
            ("Version 1 is staged, tried, committed in play", self._swap),
            ("Version 1 plays the scripted opponent", lambda: self._count(1)),
            ("A signed but much slower version 2", self._publish_slow),
            ("A tampered model", self._tamper),
            ("An older metadata set, replayed", self._replay),
        )
        for title, scene in scenes:
            self._screen.scene(title)
            try:
                seen = scene()
            except (StepFailed, EdgeswapError) as error:
                self._screen.fact(str(error), good=False)
                self._rows.append((title, "no", str(error)))
                break
            self._screen.fact(seen, good=True)
            self._rows.append((title, "yes", seen))
        self._screen.table("What happened", self._rows)
        held = len(self._rows) == len(scenes) and all(held == "yes" for _, held, _ in self._rows)
        self._screen.console.print(f"Everything lies in {self._stage.folder}; logs are in logs/.")
        return held

    def say_what_next(self, *, keep: bool) -> None:
        """Three commands to try, on what lies there or on what goes on running."""
        folder = self._stage.folder
        commands = [
            f".venv/bin/edge-agent history --config {folder / 'agent.toml'}",
            f".venv/bin/trainer-host models --config {folder / 'host.toml'}",
        ]
        if keep:
            self._screen.console.print("Broker, agent and host go on until Ctrl-C. Next, in another terminal:")
            commands.append(f"mosquitto_sub -p {self._stage.broker.port} -t 'fleet/v1/{DEVICE}/#' -v")
        else:
            self._screen.console.print("Next:")
            commands.append('make demo DEMO_FLAGS="--keep"')
        for command in commands:
            self._screen.console.print(f"  {command}", soft_wrap=True)

    # The scenes. Each returns what was seen, or raises `StepFailed`.

    def _set_up(self) -> str:
        stage = self._stage
        (stage.folder / "host.toml").write_text(
            HOST_CONFIG.format(port=stage.broker.port, seed=self._seed, new=NEW_TRANSITIONS)
        )
        (stage.folder / "agent.toml").write_text(AGENT_CONFIG.format(device=DEVICE, port=stage.broker.port, slot=SLOT))
        self._trainer_host("keys", "init")
        (stage.folder / "root.json").write_bytes((stage.folder / "host" / "root.json").read_bytes())
        self._screen.fact("four Ed25519 keys made; the device is given the root of trust")
        stage.start("host", *self._host, "run", "--config", str(stage.folder / "host.toml"))
        stage.start("agent", "edge_agent", "run", "--config", str(stage.folder / "agent.toml"))
        request = UntrainedRequest(recipe=table.named(SLOT), output=str(stage.folder / "untrained"), seed=self._seed)
        self._publish(self._made(request), "untrained")
        with self._screen.moving() as moving:
            moving.show("the agent fetches version 0")
            stage.wait(lambda: self._serves(0), 60.0, "the agent serves version 0")
        self._first_metadata = self._retained()
        return f"{DEVICE} serves version 0, an untrained network"

    def _count(self, version: int) -> str:
        """Play enough battles to say how good a version is."""
        options = {"player": "agent", "battles": COUNTED_BATTLES, "seed": self._seed + version, "concurrent": 16}
        with self._stage.game(f"count-{version}", **options) as game:
            report = self._watch(game, 120.0)
        if report["interrupted"]:
            raise StepFailed(f"{report['interrupted']} battles were interrupted: {report['errors']}")
        if set(report["versions"]) != {str(version)}:
            raise StepFailed(f"versions {sorted(report['versions'])} answered, not {version} alone")
        self._win_rates[version] = report
        self._screen.fact(
            f"{report['battles_per_s']:.0f} battles/s; an answer takes {_latency(report)} as the game measures it"
        )
        self._screen.fact(self._telemetry())
        seen = _win_rate(report)
        if version == 0:
            return seen
        before = self._win_rates[0]
        if report["low"] <= before["high"]:
            raise StepFailed(f"{seen}: not clearly better than {_win_rate(before)}")
        return f"{seen}, up from {before['win_rate']:.1%}"

    def _learn(self) -> str:
        options = {"player": "expert", "battles": LEARNED_BATTLES, "seed": self._seed + 1000, "concurrent": 64}
        with self._stage.game("teacher", **options) as game:
            taught = self._watch(game, 120.0)
        self._screen.fact(f"the stronger player {_win_rate(taught)}; its actions went out as `taken`")
        self._stage.wait(lambda: self._said("training"), 60.0, "training begins")
        with self._screen.progress() as progress:
            bar = progress.add_task("", total=None)

            def draw() -> None:
                if (epoch := self._said("epoch")) is not None:
                    progress.update(
                        bar,
                        completed=epoch["epoch"],
                        total=epoch["epochs"],
                        description=f"validation accuracy {epoch['val_accuracy']:.3f}, loss {epoch['val_loss']:.3f}",
                    )

            trained = self._stage.wait(lambda: self._said("trained"), 120.0, "the model is trained", draw)
        self._network = trained["network"]
        examples, rejected = trained["examples"], sum(trained["rejected"].values())
        self._screen.fact(
            f"learned from {examples['selected']} of {examples['read']} transitions, {rejected} set aside; "
            f"decisions agree on {trained['metrics']['decision_accuracy']:.1%} of the validation battles' states"
        )
        for parity in trained["parity"]:
            self._screen.fact(
                f"parity with {parity['runtime']}: largest difference {parity['max_difference']:.2g}, "
                f"same action on {parity['argmax_agreement']:.2%}"
            )
        return self._gated_and_released(1)

    def _swap(self) -> str:
        version = 1
        with self._stage.game("during", player="agent", battles=0, seed=self._seed + 2000, concurrent=8) as game:
            self._await_commit(game, version)
            self._stage.wait(
                lambda: game.report.get("versions", {}).get(str(version)) or None, 20.0, "version 1 answers"
            )
            report = game.end()
        before, after = (report["versions"].get(key, 0) for key in ("0", "1"))
        if report["interrupted"] or report["timeouts"] or not (before and after):
            raise StepFailed(f"battles were interrupted: {report}")
        verdict = self._event("committed", version).verdict
        assert verdict is not None
        self._screen.fact(
            f"trial: {verdict.pairs} pairs, median ratio {verdict.ratio_median:.2f}, "
            f"evidence against it {verdict.evidence:.2g} (1000 refuses it), "
            f"for it {_up_to_a_million(verdict.acceptance)} (100 commits it)"
        )
        return (
            f"committed; of {report['battles']} battles meanwhile none was interrupted "
            f"({before} answers by version 0, {after} by version 1)"
        )

    def _await_commit(self, game: Game, version: int) -> None:
        with self._screen.moving() as moving:

            def tell() -> None:
                moving.show(f"{self._phase()}   {_rates(game.report)}")

            self._stage.wait(lambda: self._serves(version), 90.0, f"version {version} is committed", tell)

    def _publish_slow(self) -> str:
        version = 2
        request = PaddedRequest(
            network=self._network, output=str(self._stage.folder / "slow"), width=SLOW_WIDTH, seed=self._seed
        )
        self._publish(self._made(request), "the same policy behind much more work")
        self._screen.fact(self._gated_and_released(version))
        with self._screen.moving() as moving:
            event = self._stage.wait(
                lambda: self._found("refused", version),
                120.0,
                "the agent refuses it",
                lambda: moving.show(self._phase()),
            )
        verdict = event.verdict
        if event.reason != "slower" or verdict is None or not self._serves(1):
            raise StepFailed(f"refused as {event.reason}: {event.text}")
        return (
            f"refused as slower: {verdict.pairs} pairs, evidence {verdict.evidence:.0f} (1000 is needed), median ratio "
            f"{verdict.ratio_median:.0f}, p50/p99 {verdict.new_us_p50:.0f}/{verdict.new_us_p99:.0f} µs against "
            f"{verdict.old_us_p50:.0f}/{verdict.old_us_p99:.0f} µs; version 1 stays"
        )

    def _tamper(self) -> str:
        current = self._retained()
        serving = self._slot().active
        assert serving is not None
        forged = tampered(current, f"{SLOT}/{serving.version}.tflite", b"not the model that was signed")
        return self._refused_metadata(forged, {"bad_signature", "unsigned"})

    def _replay(self) -> str:
        return self._refused_metadata(self._first_metadata, {"rolled_back"})

    # What they are made of.

    def _refused_metadata(self, metadata: bytes, reasons: set[str]) -> str:
        """Put a metadata set on the broker, and see it refused; the host then puts its own there again."""
        stage = self._stage
        genuine, seen = self._retained(), len(stage.events)
        stage.link.publish(topics.METADATA, metadata, qos=1, retain=True)
        event = stage.wait(
            lambda: next((e for e in stage.events[seen:] if e.kind == "metadata_refused"), None), 30.0, "it is refused"
        )
        if event.reason not in reasons or not self._serves(1):
            raise StepFailed(f"refused as {event.reason}: {event.text}")
        with self._screen.moving() as moving:
            moving.show(f"refused as {event.reason}; waiting until the host puts its own set back")
            stage.wait(lambda: stage.metadata == genuine or None, 30.0, "the host puts its own set back")
        self._screen.fact(event.text)
        return f"refused as {event.reason}; version 1 stays, and the host put its own set back"

    def _gated_and_released(self, version: int) -> str:
        stage = self._stage
        with self._screen.moving() as moving:
            moving.show("the gate plays validation battles")
            ended = stage.wait(
                lambda: self._said("released", version=version) or self._said("refused"), 60.0, "the gate decides"
            )
        if ended["kind"] == "refused":
            raise StepFailed(f"the gate refused it: {ended['reasons']}")
        gate = self._said("gate") or {}
        self._screen.fact(f"gate passed: {'; '.join(gate.get('reasons', []))}")
        return f"signed and published as version {version}"

    def _publish(self, made: Exported, notes: str) -> None:
        self._trainer_host("publish", made.released.path, "--slot", SLOT, "--notes", notes)

    def _made(self, request: UntrainedRequest | PaddedRequest) -> Exported:
        with self._screen.moving() as moving:
            moving.show("a process with TensorFlow makes the model")
            return run_job(request)

    def _trainer_host(self, *command: str) -> str:
        config = str(self._stage.folder / "host.toml")
        with self._screen.moving() as moving:
            moving.show(f"trainer-host {command[0]}")
            return self._stage.run(f"trainer-host-{command[0]}", *self._host, *command, "--config", config)

    def _watch(self, game: Game, limit_s: float) -> dict[str, Any]:
        """Show a game while it is played; its closing report."""
        with self._screen.moving() as moving:

            def tell() -> None:
                moving.show(f"{_rates(game.report)}   {self._telemetry()}")

            return self._stage.wait(lambda: game.final, limit_s, "the battles are played", tell)

    def _telemetry(self) -> str:
        telemetry = self._stage.telemetry
        if telemetry is None:
            return ""
        hottest = max(telemetry.temperatures_c.values(), default=None)
        heat = "no sensor" if hottest is None else f"{hottest:.0f} °C"
        return f"{self._stage.stored()} transitions stored   temperature: {heat}"

    def _slot(self) -> SlotStatus:
        status = self._stage.status
        if status is None or SLOT not in status.slots:
            raise StepFailed("the agent has not reported")
        return status.slots[SLOT]

    def _serves(self, version: int) -> bool | None:
        status = self._stage.status
        slot = status.slots.get(SLOT) if status else None
        return True if slot and slot.ready and slot.active and slot.active.version == version else None

    def _phase(self) -> str:
        slot = self._slot()
        progress = "" if slot.progress is None else f" {slot.progress:.0%}"
        return f"the agent is in {slot.phase}{progress}"

    def _retained(self) -> bytes:
        return self._stage.wait(lambda: self._stage.metadata, 10.0, "the metadata set is on the broker")

    def _said(self, kind: str, **fields: object) -> dict[str, Any] | None:
        """The newest line of the host's progress of a kind."""
        matching = (
            line
            for line in reversed(self._stage.progress)
            if line["kind"] == kind and all(line.get(name) == value for name, value in fields.items())
        )
        return next(matching, None)

    def _found(self, kind: str, version: int) -> Event | None:
        return next((e for e in self._stage.events if e.kind == kind and e.version == version), None)

    def _event(self, kind: str, version: int) -> Event:
        return self._stage.wait(lambda: self._found(kind, version), 10.0, f"the agent reports {kind}")


def _up_to_a_million(value: float) -> str:
    return f"{value:.3g}" if value < 1e6 else "over a million"


def _win_rate(report: dict[str, Any]) -> str:
    interval = f"{report['low']:.1%} to {report['high']:.1%}"
    return f"wins {report['win_rate']:.1%} of {report['battles']} battles (95%: {interval})"


def _latency(report: dict[str, Any]) -> str:
    return f"p50 {(report['latency_us_p50'] or 0) / 1e3:.1f} ms, p99 {(report['latency_us_p99'] or 0) / 1e3:.1f} ms"


def _rates(report: dict[str, Any]) -> str:
    if not report:
        return "the game begins"
    return f"{report['battles']} battles, {report['battles_per_s']:.0f}/s   {_latency(report)}"
