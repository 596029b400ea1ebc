from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]

from protocol.command_line import Finding, Health
from protocol.errors import Misconfigured, Unavailable
from trainer_host import keys, repository_files
from trainer_host.custody import Custody
from trainer_host.keys import Keyring
from trainer_host.repository import Lifetimes, Repository
from trainer_host.signing import SignaturesMissing, SigningRequest

NOW = datetime.now(UTC).replace(microsecond=0)  # the client in `examine` goes by the system's clock


class Bed:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = folder / "keys"
        self.first = keys.init(self.keys, None)
        self.repository = Repository(folder / "repository", Keyring(self.keys))
        self.repository.create(NOW)
        self.said: list[str] = []
        self.root_file = folder / "root.json"
        self.custody = Custody(self.keys, self.repository, self.root_file, None, self.said.append)
        self.custody.settle()

    def take_away(self, role: str) -> Path:
        """Move a role's private keys, and a copy of the index, to a safe."""
        safe = self.folder / "safe"
        safe.mkdir(exist_ok=True)
        for entry in keys.roles(self.keys)[role]:
            path = keys.file_of(self.keys, entry)
            assert path is not None
            path.rename(safe / path.name)
        (safe / "keys.json").write_bytes((self.keys / "keys.json").read_bytes())
        return safe

    def named(self, role: str) -> list[str]:
        root: Root = Metadata[Root].from_bytes(self.repository.root()).signed
        return root.roles[role].keyids

    def listed(self, role: str) -> list[str]:
        return [entry.keyid for entry in keys.roles(self.keys)[role]]

    def examine(self, now: datetime = NOW) -> list[Finding]:
        return list(self.custody.examine(now, Lifetimes()))

    def worse(self, now: datetime = NOW) -> dict[str, Finding]:
        return {finding.name: finding for finding in self.examine(now) if finding.health is not Health.OK}

    def sign(self, file: Path, folder: Path) -> SigningRequest:
        request = SigningRequest.from_bytes(file.read_bytes())
        assert request.sign(Keyring(folder))[0]
        return request


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def test_new_keys_are_in_order(bed: Bed) -> None:
    findings = bed.examine()
    assert {finding.health for finding in findings} == {Health.OK}
    names = [finding.name for finding in findings]
    assert [name.split()[0] for name in names] == [
        *["key"] * 4, "index", *["threshold"] * 4, *["expiry"] * 4, "root.json", "client"
    ]  # fmt: skip


@pytest.mark.parametrize("role", keys.ROLES)
def test_a_rotation_replaces_the_role_s_keys_and_keeps_the_old_files(bed: Bed, role: str) -> None:
    old = bed.first[role][0]
    data = (bed.keys / f"{role}.pem").read_bytes()
    bed.custody.rotate(role, None, NOW)
    assert bed.named(role) == bed.listed(role) != [old.keyid]
    assert (bed.keys / "retired" / f"{role}-{old.keyid}.pem").read_bytes() == data
    assert not (bed.keys / f"{role}.pem").exists()
    assert bed.worse() == {}
    assert any("root is now version 2" in text for text in bed.said)
    bed.repository.refresh(NOW + timedelta(days=1))


def test_keys_are_added_replaced_and_removed_one_by_one(bed: Bed) -> None:
    bed.custody.add("root", None, NOW)
    first, second = bed.named("root")
    bed.custody.set_threshold("root", 2, NOW)
    with pytest.raises(Misconfigured, match="root would have 1 keys and a threshold of 2"):
        bed.custody.remove("root", first, NOW)
    bed.custody.rotate("root", second[:12], NOW)
    kept, third = bed.named("root")
    assert kept == first
    assert third not in {first, second}
    bed.custody.set_threshold("root", 1, NOW)
    bed.custody.remove("root", first[:12], NOW)
    assert bed.named("root") == bed.listed("root") == [third]
    assert bed.worse() == {}
    assert len(bed.repository.roots()) == 6


def test_several_keys_of_a_role_are_replaced_together(bed: Bed) -> None:
    bed.custody.add("targets", None, NOW)
    bed.custody.set_threshold("targets", 2, NOW)
    old = set(bed.named("targets"))
    bed.custody.rotate("targets", None, NOW)
    assert len(bed.named("targets")) == 2
    assert not old & set(bed.named("targets"))
    assert bed.repository.can_sign("targets")
    assert bed.worse() == {}


def test_a_revoked_key_does_not_come_back(bed: Bed) -> None:
    bed.custody.rotate("targets", None, NOW)
    old = bed.first["targets"][0]
    with pytest.raises(Misconfigured, match="was dropped"):
        bed.custody.add("targets", f"file2:retired/targets-{old.keyid}.pem", NOW)
    assert bed.worse() == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda custody: custody.rotate("mirror", None, NOW),
        lambda custody: custody.add("mirror", None, NOW),
        lambda custody: custody.remove("mirror", "ab", NOW),
        lambda custody: custody.set_threshold("mirror", 1, NOW),
        lambda custody: custody.renew("snapshot", NOW),
        lambda custody: custody.rotate("root", "no key", NOW),
        lambda custody: custody.remove("root", "no key", NOW),
        lambda custody: custody.remove("root", "", NOW),
        lambda custody: custody.set_threshold("root", 2, NOW),
        lambda custody: custody.set_threshold("root", 0, NOW),
    ],
)
def test_what_cannot_be_done_changes_nothing(bed: Bed, call: Any) -> None:
    before = bed.repository.metadata_set(), keys.roles(bed.keys)
    with pytest.raises(Misconfigured):
        call(bed.custody)
    assert (bed.repository.metadata_set(), keys.roles(bed.keys)) == before


@pytest.mark.parametrize("role", ["timestamp", "root"])
def test_with_a_wrong_passphrase_no_key_is_made(tmp_path: Path, role: str) -> None:
    folder = tmp_path / "keys"
    before = keys.init(folder, "right")
    repository = Repository(tmp_path / "repository", Keyring(folder, "right"))
    repository.create(NOW)
    repository = Repository(tmp_path / "repository", Keyring(folder, "wrong"))
    said: list[str] = []
    custody = Custody(folder, repository, tmp_path / "root.json", "wrong", said.append)
    for change in (custody.rotate, custody.add):
        with pytest.raises(Misconfigured):
            change(role, None, NOW)
    assert keys.roles(folder) == before
    assert said == []


def test_renewal_signs_the_same_for_longer(bed: Bed) -> None:
    later = NOW + timedelta(days=80)
    bed.custody.renew("root", later)
    bed.custody.renew("targets", later)
    assert bed.repository.expiries()["root"] == later + timedelta(days=365)
    assert bed.repository.expiries()["targets"] == later + timedelta(days=90)
    assert {role: bed.named(role) for role in keys.ROLES} == {
        role: [entries[0].keyid] for role, entries in bed.first.items()
    }


def test_a_rotation_with_the_root_key_elsewhere(bed: Bed) -> None:
    safe = bed.take_away("root")
    with pytest.raises(SignaturesMissing) as caught:
        bed.custody.rotate("timestamp", None, NOW)
    assert bed.named("timestamp") == [bed.first["timestamp"][0].keyid]
    assert len(bed.listed("timestamp")) == 2
    bed.repository.refresh(NOW)  # goes on with the old key
    assert list(bed.worse()) == ["request root-2.json"]
    bed.custody.accept(bed.sign(caught.value.file, safe), NOW)
    assert bed.named("timestamp") == bed.listed("timestamp") != [bed.first["timestamp"][0].keyid]
    assert bed.worse() == {}
    bed.repository.refresh(NOW)


def test_a_rotation_of_the_root_key_that_is_elsewhere(bed: Bed) -> None:
    """The new key is made here, and signs here; the old one signs where it is."""
    safe = bed.take_away("root")
    with pytest.raises(SignaturesMissing, match="1 more of the keys"):
        bed.custody.rotate("root", None, NOW)
    ((file, request),) = bed.repository.waiting()
    assert [it.missing for it in request.shortfalls()] == [(bed.first["root"][0].keyid,)]
    bed.custody.accept(bed.sign(file, safe), NOW)
    assert bed.worse() == {}
    assert "its private key is not in a file here" in bed.said[-1]


@pytest.mark.parametrize("role", keys.ROLES)
@pytest.mark.parametrize("step", ["listed", "root", "timestamp", "published"])
def test_index_and_repository_agree_wherever_a_change_is_cut(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, role: str, step: str
) -> None:
    """Cut before or after the root is in force, everything can be signed, and doing it again ends well."""

    def cut(*_: Any) -> None:
        raise Unavailable("power cut")

    put = repository_files.put

    def cut_at(path: Path, data: bytes) -> None:
        if (step == "root" and path.name == "2.root.json") or (step == "timestamp" and path.name == "timestamp.json"):
            raise Unavailable("power cut")
        put(path, data)

    with monkeypatch.context() as patch:
        if step == "listed":
            patch.setattr(Repository, "change_root", cut)
        elif step == "published":
            patch.setattr(keys, "retire", cut)
        else:
            patch.setattr(repository_files, "put", cut_at)
        with pytest.raises(Unavailable, match="power cut"):
            bed.custody.rotate(role, None, NOW)
    assert set(bed.named(role)) <= set(bed.listed(role))
    assert len(bed.listed(role)) == 2
    done = step == "published" or (step, role) == ("timestamp", "root")  # the rest is signed under both roots
    assert (bed.named(role) == [bed.first[role][0].keyid]) is not done
    bed.repository.refresh(NOW)
    bed.repository.amend(lambda _: None, NOW)
    (left,) = set(bed.listed(role)) - set(bed.named(role))
    worse = bed.worse()
    assert ("root.json" in worse) is ((step, role) == ("timestamp", "root"))
    worse.pop("root.json", None)
    (finding,) = worse.values()
    assert finding.name == f"key {role} {left[:16]}"
    assert ("dropped" if done else "no root names it") in finding.detail
    bed.custody.rotate(role, None, NOW)
    if not done:
        bed.custody.remove(role, left[:16], NOW)  # as the finding says
    assert bed.worse() == {}
    assert len(list((bed.keys / "retired").iterdir())) == 2


def test_what_is_wrong_is_named(bed: Bed) -> None:
    (bed.keys / "targets.pem").write_bytes((bed.keys / "snapshot.pem").read_bytes())
    (bed.keys / "timestamp.pem").unlink()
    worse = bed.worse()
    assert set(worse) == {f"key targets {bed.first['targets'][0].keyid[:16]}", "threshold timestamp"}
    assert "does not match public key" in next(iter(worse.values())).detail
    assert worse["threshold timestamp"].health is Health.FAILED


def test_a_key_that_the_index_does_not_list_is_named(bed: Bed) -> None:
    made = keys.generate(bed.keys, "root", None)
    keys.retire(bed.keys, "root", bed.first["root"][0].keyid)
    worse = bed.worse()
    named = worse[f"key root {bed.first['root'][0].keyid[:16]}"]
    assert named.health is Health.FAILED
    assert f"keys rotate root --key {bed.first['root'][0].keyid[:16]}" in named.remedy
    assert worse["threshold root"].health is Health.FAILED
    assert f"key root {made.keyid[:16]}" in worse
    rows = [row for row in bed.custody.rows() if row["role"] == "root"]
    assert [(row["here"], row["signs"]) for row in rows] == [("no", "yes"), ("yes", "no")]
    assert rows[0]["private key"] == "not in keys.json"


def test_keys_that_are_elsewhere_are_in_order(bed: Bed) -> None:
    bed.take_away("root")
    bed.take_away("targets")
    assert bed.worse() == {}
    here = {row["role"]: row["here"] for row in bed.custody.rows()}
    assert here == {"root": "no", "targets": "no", "snapshot": "yes", "timestamp": "yes"}


def test_the_list_says_thresholds_and_expiry(bed: Bed) -> None:
    bed.custody.add("targets", None, NOW)
    rows = [row for row in bed.custody.rows() if row["role"] == "targets"]
    assert [row["threshold"] for row in rows] == ["1 of 2", "1 of 2"]
    assert rows[0]["signed until"] == f"{NOW + timedelta(days=90):%Y-%m-%d %H:%M}"
    assert [row["key"] for row in rows] == [keyid[:16] for keyid in bed.named("targets")]


@pytest.mark.parametrize(
    ("days", "worse"),
    [
        (5, {"timestamp": Health.OK}),
        (6, {"timestamp": Health.WARNING}),
        (7, {"timestamp": Health.FAILED, "targets": Health.OK}),
        (70, {"targets": Health.WARNING, "root": Health.OK}),
        (300, {"targets": Health.FAILED, "root": Health.WARNING}),
        (365, {"root": Health.FAILED}),
    ],
)
def test_what_runs_out_is_named(bed: Bed, days: int, worse: dict[str, Health]) -> None:
    found = {finding.name: finding for finding in bed.examine(NOW + timedelta(days=days))}
    for role, health in worse.items():
        assert found[f"expiry {role}"].health is health
    assert "keys renew root" in found["expiry root"].remedy or found["expiry root"].health is Health.OK


def test_a_root_that_new_devices_should_not_be_given_is_named(bed: Bed) -> None:
    old = bed.root_file.read_bytes()
    bed.custody.rotate("root", None, NOW)
    assert bed.root_file.read_bytes() == bed.repository.root() != old
    bed.root_file.write_bytes(old)
    (finding,) = bed.worse().values()
    assert (finding.name, finding.health) == ("root.json", Health.FAILED)
    assert "is not root version 2, the newest" in finding.detail
    bed.root_file.unlink()
    (finding,) = bed.worse().values()
    assert "cannot read" in finding.detail
    bed.custody.settle()
    assert bed.worse() == {}


def test_a_root_that_is_signed_elsewhere_reaches_new_devices_when_it_is_accepted(bed: Bed) -> None:
    safe = bed.take_away("root")
    old = bed.root_file.read_bytes()
    with pytest.raises(SignaturesMissing) as missing:
        bed.custody.rotate("timestamp", None, NOW)
    assert bed.root_file.read_bytes() == old
    bed.custody.accept(bed.sign(missing.value.file, safe), NOW)
    assert bed.root_file.read_bytes() == bed.repository.root() != old


def test_a_set_that_devices_would_refuse_is_named(bed: Bed) -> None:
    """Root 2 is in force, and is not signed by the key of root 1: who knows root 1 does not follow."""
    path = bed.folder / "repository" / "2.root.json"
    bed.custody.renew("root", NOW)
    root = Metadata[Root].from_bytes(path.read_bytes())
    root.signed.version = 2
    root.signatures.clear()
    path.write_bytes(root.to_bytes())
    assert bed.worse()["client"].health is Health.FAILED


def test_a_set_that_has_expired_is_refused_as_devices_do(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    keys.init(folder, None)
    repository = Repository(tmp_path / "repository", Keyring(folder))
    repository.create(NOW - timedelta(days=8))
    repository.copy_root(tmp_path / "root.json")
    found = Custody(folder, repository, tmp_path / "root.json", None, print).examine(NOW, Lifetimes())
    assert {finding.name for finding in found if finding.health is Health.FAILED} == {"expiry timestamp", "client"}
