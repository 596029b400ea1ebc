from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]
from tuf.api.serialization.json import JSONSerializer

from protocol.errors import Misconfigured, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.messages import Event
from protocol.release import Golden, Release, Tensor
from protocol.wishes import FIELD, Pin, Withdrawal
from trainer_host import history, keys
from trainer_host.database import Database
from trainer_host.history import Entry, rows, told
from trainer_host.repository import Repository, identity_of
from trainer_host.settings import Settings, load
from trainer_host.signing import SIGNED_AT
from trainer_host.store import Sighting, Store
from trainer_host.wishes import Said, carry_out, pin, unpin, whom, withdraw

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SAID = Said(NOW.timestamp(), "ada@desk")


def release_of(version: int, slot: str = "combat") -> tuple[Release, bytes]:
    model = f"{slot} {version}".encode()
    release = Release(
        slot=slot,
        version=version,
        **identity_of(model),
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=(Feature(path="round"),)),
        golden=Golden(inputs=((0.25,),), outputs=((0.1, -1.5),), tolerance=1e-5),
    )
    return release, model


class Bed:
    """A host's state folder with keys and a repository; an hour goes by with each change."""

    def __init__(self, folder: Path) -> None:
        (folder / "host.toml").write_text('state_dir = "host"\nkept_versions = 2\n')
        self.settings: Settings = load(folder / "host.toml")
        self.folder = self.settings.repository_dir
        self.keys = Path(self.settings.keys_dir)
        keys.init(self.keys, None)
        self.repository = Repository(self.folder, keys.Keyring(self.keys), kept_versions=2)
        self.now = NOW
        self.repository.create(NOW)

    def later(self) -> datetime:
        self.now += timedelta(hours=1)
        return self.now

    def release(self, version: int, slot: str = "combat") -> None:
        self.repository.release(*release_of(version, slot), self.later())

    def wish(self, edit: Any, slot: str = "combat") -> None:
        carry_out(self.repository, slot, edit, self.later())

    def read(self, slot: str | None = None, limit: int = 20) -> list[Entry]:
        return history.of(self.settings, slot=slot, limit=limit)

    def rewrite(self, version: int, field: str, value: Any) -> None:
        """Change a field of a version of the targets, and sign it again."""
        path = self.folder / f"{version}.targets.json"
        targets: Metadata[Targets] = Metadata.from_bytes(path.read_bytes())
        targets.signed.unrecognized_fields[field] = value
        targets.sign(keys.load_signer(self.keys, "targets"))
        path.write_bytes(targets.to_bytes(JSONSerializer(compact=True)))


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def said(entry: Entry) -> list[str]:
    return [row["what"].partition(" (")[0] for row in rows([entry])]


def test_each_version_tells_what_came_and_what_went(bed: Bed) -> None:
    for version in (0, 1, 2):
        bed.release(version)
    bed.wish(pin("combat", 1, whom(["pi1"]), SAID._replace(note="draws badly")))
    bed.wish(withdraw("combat", None, whom(), SAID))
    bed.wish(unpin("combat", whom(["pi1"])))
    bed.repository.refresh(bed.now + timedelta(days=80))
    found = bed.read()
    assert [said(entry) for entry in found] == [
        ["made"],
        ["released combat version 0"],
        ["released combat version 1"],
        ["released combat version 2", "dropped combat version 0"],
        ["combat pinned to version 1 for device pi1"],
        ["combat version 2 withdrawn for all devices"],
        ["lifted: combat pinned to version 1 for device pi1"],
        ["signed again"],
    ]
    assert [entry.version for entry in found] == list(range(1, 9))
    assert [entry.at for entry in found[:-1]] == [(NOW + timedelta(hours=hour)).timestamp() for hour in range(7)]
    assert found[4].wished == (
        Pin(slot="combat", version=1, devices=("pi1",), at=NOW.timestamp(), by="ada@desk", note="draws badly"),
    )
    assert found[6].lifted == found[4].wished
    assert isinstance(found[5].wished[0], Withdrawal)


def test_the_newest_entries_of_one_slot(bed: Bed) -> None:
    bed.release(0)
    bed.release(0, "movement")
    bed.release(1)
    bed.wish(pin("movement", 0, whom(), SAID), "movement")
    assert [entry.version for entry in bed.read(limit=2)] == [4, 5]
    assert [said(entry) for entry in bed.read("movement")] == [
        ["released movement version 0"],
        ["movement pinned to version 0 for all devices"],
    ]
    assert [said(entry) for entry in bed.read("combat", limit=1)] == [["released combat version 1"]]
    assert bed.read("skill") == []


def test_who_signed_is_told_also_of_keys_that_were_replaced(bed: Bed) -> None:
    bed.release(0)
    (old,) = keys.roles(bed.keys)["targets"]
    new = keys.generate(bed.keys, "targets", None)

    def rotate(root: Root) -> None:
        root.revoke_key(old.keyid, "targets")
        root.add_key(new.public_key, "targets")

    bed.repository.change_root(rotate, bed.later())
    keys.settle(bed.keys, bed.repository.roots())
    bed.release(1)
    found = bed.read()
    by_version = {entry.version: [(key.keyid, key.uri, key.retired) for key in entry.signed_by] for entry in found}
    assert by_version[2] == [(old.keyid, "", True)]
    assert by_version[found[-1].version] == [(new.keyid, new.uri, False)]
    assert [row["signed with"] for row in rows(found[1:2] + found[-1:])] == [
        f"{old.keyid[:8]} (retired)",
        f"{new.keyid[:8]} {new.uri}",
    ]


def test_two_keys_that_sign_are_both_named(bed: Bed) -> None:
    second = keys.generate(bed.keys, "targets", None)

    def add(root: Root) -> None:
        root.add_key(second.public_key, "targets")
        root.roles["targets"].threshold = 2

    bed.repository.change_root(add, bed.later())
    bed.release(0)
    entry = bed.read()[-1]
    assert {key.keyid for key in entry.signed_by} == {key.keyid for key in keys.roles(bed.keys)["targets"]}
    assert len(entry.signed_by) == 2


@pytest.mark.parametrize("whose", ["a stranger's", "for other bytes"])
def test_a_signature_that_is_not_good_names_nobody(bed: Bed, whose: str) -> None:
    bed.release(0)
    path = bed.folder / "1.targets.json"
    if whose == "a stranger's":
        targets: Metadata[Targets] = Metadata.from_bytes(path.read_bytes())
        targets.sign(keys.load_signer(bed.keys, "root"))
        path.write_bytes(targets.to_bytes(JSONSerializer(compact=True)))
    else:
        text = path.read_text()
        assert '"version":1' in text
        path.write_text(text.replace('"spec_version":"1.0', '"x-altered":"1","spec_version":"1.0'))
    assert [bool(entry.signed_by) for entry in bed.read()] == [False, True]
    assert rows(bed.read())[0]["signed with"] == "no key that is known"


def test_what_devices_made_of_a_release_stands_beside_it(bed: Bed) -> None:
    bed.release(0)
    bed.release(1)
    database = Database(bed.settings.database)
    reports = [("pi1", "committed", 0), ("pi2", "committed", 0), ("pi1", "refused", 1), ("pi2", "rolled_back", 1)]
    events = [
        (device, 1.0, Event(at=1.0, kind=kind, slot="combat", version=version)) for device, kind, version in reports
    ]
    Store(database).add_reports({"pi1": Sighting(1.0)}, [], events)
    database.close()
    _, first, second = bed.read()
    assert first.released[0].devices == {"committed": 2}
    assert rows([second])[0]["devices"] == told({"refused": 1, "rolled_back": 1}) == "1 refused, 1 rolled back"


def test_a_file_that_was_never_published_is_no_history(bed: Bed) -> None:
    before = {path.name: path.read_bytes() for path in bed.folder.glob("*.json")}
    bed.release(0)
    for name, data in before.items():
        (bed.folder / name).write_bytes(data)
    assert (bed.folder / "2.targets.json").exists()
    assert [entry.version for entry in bed.read()] == [1]


def test_a_missing_version_is_passed_over(bed: Bed) -> None:
    bed.release(0)
    bed.release(1)
    (bed.folder / "2.targets.json").unlink()
    assert [said(entry) for entry in bed.read()] == [
        ["made"],
        ["released combat version 0", "released combat version 1"],
    ]
    (bed.folder / "1.targets.json").unlink()
    assert [entry.version for entry in bed.read()] == [3]


@pytest.mark.parametrize("value", ["yesterday", 7])
def test_a_time_that_is_none_is_unknown(bed: Bed, value: Any) -> None:
    bed.release(0)
    bed.rewrite(1, SIGNED_AT, value)
    assert [entry.at is None for entry in bed.read()] == [True, False]
    assert rows(bed.read())[0]["when"] == ""


def test_what_cannot_be_read_is_named(bed: Bed) -> None:
    bed.release(0)
    bed.rewrite(1, FIELD, "nonsense")
    with pytest.raises(Misconfigured, match="targets version 1"):
        bed.read()
    (bed.folder / "1.targets.json").write_text("nonsense")
    with pytest.raises(Misconfigured, match=r"1\.targets\.json"):
        bed.read()
    (bed.folder / "1.targets.json").unlink()
    (bed.folder / "1.targets.json").mkdir()
    with pytest.raises(Unavailable, match=r"1\.targets\.json"):
        bed.read()
