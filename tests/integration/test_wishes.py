"""`trainer-host pin`, `unpin`, `rollback`, `restore`, `wishes` and `history`, and a device that obeys them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

from protocol import command_line, topics
from protocol.codec import Decoder
from protocol.features import Feature, FeatureSpec
from protocol.link import Broker, Link, Message
from protocol.messages import Event, MetadataSet, ModelRef, SlotStatus, Status
from protocol.release import Golden, Release, Tensor
from protocol.wishes import FIELD, Pin, Withdrawal, from_field
from tests.integration.world import DEVICE, MODELS, SLOT, World
from trainer_host.__main__ import app
from trainer_host.custody import open_repository
from trainer_host.database import Database
from trainer_host.private_broker import PrivateBroker
from trainer_host.registry import Model, Registry
from trainer_host.repository import identity_of
from trainer_host.settings import Settings, load
from trainer_host.store import Sighting, Store
from trainer_host.wishes import Edit, Said, pin, unpin, whom, withdraw
from trainer_host.wishes import carry_out as wished

DEADLINE_S = 30.0

_sets: Decoder[MetadataSet] = Decoder(MetadataSet)


class Desk:
    """An operator's desk: a host's state folder with three releases of `combat`, and a device that listens."""

    def __init__(self, folder: Path, broker: PrivateBroker, capsys: pytest.CaptureFixture[str]) -> None:
        self.broker = broker
        self.config = folder / "host.toml"
        self.config.write_text(f'state_dir = "host"\n[broker]\nport = {broker.port}\n')
        self.settings: Settings = load(self.config)
        self.heard: list[bytes] = []
        self._capsys = capsys
        assert self.run("keys", "init")[0] == command_line.DONE
        repository = open_repository(self.settings)
        for version in range(3):
            model = b"combat %d" % version
            release = Release(
                slot="combat",
                version=version,
                **identity_of(model),
                inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
                outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
                actions=("hit", "run"),
                features=FeatureSpec(features=(Feature(path="round"),)),
                golden=Golden(inputs=((0.25,),), outputs=((0.1, -1.5),), tolerance=1e-5),
            )
            repository.release(release, model, datetime.now(UTC))
        self.link = Link(Broker(host=broker.host, port=broker.port), "device", on_message=self._hear)
        self.link.subscribe((topics.METADATA, 1))

    def run(self, *words: str) -> tuple[int, str]:
        """Exit code and all that was said."""
        self._capsys.readouterr()
        code = command_line.run(app, [*words, "--config", str(self.config)])
        said = self._capsys.readouterr()
        return code, said.out + said.err

    def told(self, count: int) -> tuple[Pin | Withdrawal, ...]:
        """The wishes in the `count`th set that the device has heard."""
        deadline = time.monotonic() + DEADLINE_S
        while len(self.heard) < count:
            assert time.monotonic() < deadline, f"heard {len(self.heard)} sets"
            self.link.turn(0.05)
        targets: Metadata[Targets] = Metadata.from_bytes(_sets.decode(self.heard[count - 1]).targets)
        return from_field(targets.signed.unrecognized_fields.get(FIELD))

    def _hear(self, message: Message) -> None:
        self.heard.append(message.payload)


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    with PrivateBroker(tmp_path / "broker") as broker:
        made = Desk(tmp_path, broker, capsys)
        yield made
        made.link.close()


def test_a_wish_goes_from_the_command_line_to_the_device(desk: Desk) -> None:
    words = ("pin", "combat", "1", "--device", "pi1", "--device", "pi2", "--group", "kitchen", "--note", "draws badly")
    code, said = desk.run(*words)
    assert (code, said) == (0, "combat is pinned to version 1 for devices pi1, pi2 and group kitchen.\n")
    (wish,) = desk.told(1)
    assert isinstance(wish, Pin)
    assert (wish.version, wish.devices, wish.groups, wish.note) == (1, ("pi1", "pi2"), ("kitchen",), "draws badly")
    assert "@" in wish.by
    assert time.time() - wish.at < 3_600
    assert desk.run("rollback", "combat")[0] == 0
    assert [(type(wish), wish.version) for wish in desk.told(2)] == [(Pin, 1), (Withdrawal, 2)]
    assert desk.run("unpin", "combat", "--device", "pi1")[0] == 0
    assert [wish.devices for wish in desk.told(3)] == [("pi2",), ()]
    assert desk.run("restore", "combat", "2")[0] == 0
    assert [(type(wish), wish.version) for wish in desk.told(4)] == [(Pin, 1)]
    assert desk.run("rollback", "combat", "--version", "0", "--group", "attic")[0] == 0
    assert [wish.version for wish in desk.told(5)] == [1, 0]


def test_saying_it_again_publishes_what_is_signed_already(desk: Desk) -> None:
    desk.run("pin", "combat", "1")
    desk.told(1)
    code, said = desk.run("pin", "combat", "1")
    assert (code, said) == (0, "combat is pinned to version 1 for all devices already.\n")
    desk.told(2)
    assert desk.heard[0] == desk.heard[1]


def test_without_a_broker_it_is_signed_and_said_again_later(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer_host import metadata_topic  # noqa: PLC0415

    monkeypatch.setattr(metadata_topic.publish_once, "__defaults__", (0.5,))
    desk.broker.stop()
    code, said = desk.run("pin", "combat", "1")
    assert code == command_line.UNAVAILABLE
    assert "did not take the metadata" in said
    desk.broker.start()
    monkeypatch.undo()
    assert desk.run("pin", "combat", "1")[0] == 0
    assert [wish.version for wish in desk.told(1)] == [1]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("pin", "combat", "9"), command_line.REFUSED, "released are 0, 1, 2"),
        (("rollback", "movement"), command_line.REFUSED, "nothing is"),
        (("pin", "combat", "1", "--device", "a/b"), command_line.REFUSED, "device 'a/b'"),
        (("rollback", "combat", "--note", "n" * 257), command_line.REFUSED, "a note of 257 characters"),
        (
            ("pin", "combat", "1", *(f"--group=g{i}" for i in range(65))),
            command_line.REFUSED,
            "65 groups, more than",
        ),
        (("unpin", "../combat"), command_line.REFUSED, "slot '../combat'"),
        (("pin", "combat"), command_line.USAGE, "version"),
    ],
)
def test_what_cannot_be_wished_publishes_nothing(desk: Desk, words: tuple[str, ...], code: int, text: str) -> None:
    before = open_repository(desk.settings).metadata_set()
    found = desk.run(*words)
    assert found[0] == code
    assert text in found[1]
    assert open_repository(desk.settings).metadata_set() == before


def test_where_the_targets_key_is_elsewhere_it_says_what_to_do(desk: Desk, tmp_path: Path) -> None:
    key = Path(desk.settings.keys_dir, "targets.pem")
    offline = tmp_path / "stick"
    offline.mkdir()
    for path in (key, key.with_name("keys.json")):
        (offline / path.name).write_bytes(path.read_bytes())
    key.unlink()
    code, said = desk.run("rollback", "combat")
    assert code == command_line.USAGE
    (file,) = [word for word in said.split() if word.endswith(".json")]
    assert command_line.run(app, ["sign", file, "--keys", str(offline), "--yes"]) == 0
    assert desk.run("accept", file)[0] == 0
    assert [(type(wish), wish.version) for wish in desk.told(1)] == [(Withdrawal, 2)]
    code, said = desk.run("rollback", "combat")
    assert (code, said) == (0, "combat version 2 is withdrawn for all devices already.\n")
    desk.told(2)
    assert desk.heard[0] == desk.heard[1]


def test_without_a_broker_a_request_is_accepted_all_the_same(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer_host import metadata_topic  # noqa: PLC0415

    monkeypatch.setattr(metadata_topic.publish_once, "__defaults__", (0.5,))
    folder = Path(desk.settings.keys_dir)
    key = (folder / "root.pem").rename(tmp_path / "root.pem")
    file = desk.settings.repository_dir / "requests" / "root-2.json"
    assert desk.run("keys", "renew", "root")[0] == command_line.USAGE
    key.rename(folder / "root.pem")
    assert command_line.run(app, ["sign", str(file), "--keys", str(folder), "--yes"]) == 0
    desk.broker.stop()
    code, said = desk.run("accept", str(file))
    assert code == command_line.UNAVAILABLE
    assert "Accepted root version 2." in said
    assert "did not take the metadata" in said
    assert "It is accepted all the same: a host that runs publishes it" in said
    assert not file.exists()
    assert desk.settings.root_file.read_bytes() == open_repository(desk.settings).root()


def test_what_is_wished_and_what_became_of_it_is_shown(desk: Desk) -> None:
    desk.run("pin", "combat", "1", "--device", "pi1", "--note", "draws badly")
    desk.run("rollback", "combat")
    database = Database(desk.settings.database)
    status = Status(
        at=1.0,
        agent_version="1",
        runtime="r",
        slots={
            "combat": SlotStatus(
                phase="serving",
                ready=True,
                pinned=1,
                active=ModelRef(digest="d" * 64, version=1),
                refusal="slower: it is",
            )
        },
    )
    refused = Event(at=1.0, kind="refused", slot="combat", version=2)
    Store(database).add_reports({"pi1": Sighting(1.0, status=status)}, [], [("pi1", 1.0, refused)])
    registry = Registry(database)
    for version in (1, 2):
        model = Model(slot="combat", digest="d" * 64, path="f", bytes=7, origin="trained", created_at=1.0)
        registry.released(registry.add(model), version, None)
    database.close()

    pinned, withdrawn = json.loads(desk.run("wishes", "--json")[1])
    assert (pinned["wish"], pinned["version"], pinned["devices"]) == ("pin", 1, ["pi1"])
    assert (withdrawn["wish"], withdrawn["version"]) == ("withdrawal", 2)
    assert "draws badly" in desk.run("wishes")[1]
    entries = json.loads(desk.run("history", "--slot", "combat", "--limit", "3", "--json")[1])
    assert [entry["version"] for entry in entries] == [4, 5, 6]
    assert entries[0]["released"][0]["devices"] == {"refused": 1}
    assert entries[2]["wished"][0]["by"] == withdrawn["by"]
    assert entries[0]["signed_by"][0]["uri"] == "file2:targets.pem"
    assert "1 refused" in desk.run("history")[1]
    (row,) = [line for line in desk.run("devices")[1].splitlines() if "pi1" in line]
    assert "slower" in row
    served, missed = [line.split() for line in desk.run("models")[1].splitlines() if "combat" in line]
    assert (served[-1], missed[-1]) == ("1", "1")
    assert "served by" in desk.run("models")[1]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.config.write_text(f'groups = ["kitchen"]\n{made.config.read_text()}')
    yield made
    made.close()


def test_a_device_obeys_within_one_metadata_message(world: World) -> None:
    said = Said(time.time(), "ada@desk", "draws badly")

    def wish(*edits: Edit) -> None:
        for edit in edits:
            wished(world.repository, SLOT, edit, datetime.now(UTC))
        world.publish_metadata(world.repository.metadata_set())

    world.start_agent()
    world.publish((MODELS / "echo.tflite").read_bytes(), 0)
    world.wait(lambda: world.is_serving(0), "version 0 is served")
    world.release_model((MODELS / "twin.tflite").read_bytes(), 1)
    wish(pin(SLOT, 1, whom(groups=["kitchen"]), said))
    world.wait(lambda: world.is_serving(1), "the pinned version is served")
    assert "ada@desk" in world.event("pinned").text
    assert not any(event.kind in ("trial", "committed") and event.version == 1 for event in world.events)
    assert world.status is not None
    assert world.status.slots[SLOT].pinned == 1
    wish(unpin(SLOT, whom(groups=["kitchen"])), withdraw(SLOT, None, whom(), said))
    world.wait(lambda: world.is_serving(0), "the model before is served again")
    assert (event := world.event("rolled_back")).reason == "withdrawn"
    assert "ada@desk" in event.text
    wish(pin(SLOT, 1, whom([DEVICE]), said))
    world.wait(lambda: world.is_serving(1), "a pin overrules the withdrawal")
    assert world.stop_agent() == 0
