"""What goes into a bundle: the published set, and whatever a device of any group should serve."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

from protocol import command_line
from protocol.bundle import Bundle
from protocol.errors import Misconfigured, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.release import CHUNK_BYTES, Golden, Release, Tensor, manifest_digests
from trainer_host.__main__ import app
from trainer_host.bundling import make_bundle
from trainer_host.repository import Repository, identity_of
from trainer_host.wishes import Edit, Said, Whom, carry_out, pin, withdraw

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
ROLES = ("root", "targets", "snapshot", "timestamp")
SHARED = os.urandom(CHUNK_BYTES)
SAID = Said(1.0, "ada@desk")


def model_of(slot: str, version: int) -> bytes:
    return SHARED + f"{slot} {version}".encode()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repository", {role: [CryptoSigner.generate_ed25519()] for role in ROLES})
    made.create(NOW)
    for slot, version in (("combat", 1), ("combat", 2), ("combat", 3), ("movement", 7)):
        release(made, slot, version)
    return made


def release(repository: Repository, slot: str, version: int) -> None:
    model = model_of(slot, version)
    described = Release(
        slot=slot,
        version=version,
        **identity_of(model),
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=(Feature(path="round"),)),
        golden=Golden(inputs=(), outputs=(), tolerance=1e-5),
    )
    repository.release(described, model, NOW)


def wish(repository: Repository, slot: str, edit: Edit) -> None:
    carry_out(repository, slot, edit, NOW)


def bundled(repository: Repository, folder: Path, *slots: str) -> list[tuple[str, int]]:
    contents = make_bundle(repository, folder / "x.bundle", slots, NOW)
    assert contents.bytes == (folder / "x.bundle").stat().st_size
    return [(model.slot, model.version) for model in contents.models]


def test_a_bundle_holds_the_published_set_and_whole_models(repository: Repository, tmp_path: Path) -> None:
    assert bundled(repository, tmp_path) == [("combat", 3), ("movement", 7)]
    with Bundle(tmp_path / "x.bundle") as opened:
        assert opened.metadata_set() == repository.metadata_set()
        for described in repository.releases():
            if (described.slot, described.version) in (("combat", 3), ("movement", 7)):
                digests = manifest_digests(opened.chunk(described.manifest))
                model = b"".join(map(opened.chunk, digests))
                assert model == model_of(described.slot, described.version)
            else:
                assert described.manifest not in opened


def test_the_same_content_gives_the_same_bytes_and_shared_chunks_are_there_once(
    repository: Repository, tmp_path: Path
) -> None:
    bundled(repository, tmp_path)
    first = (tmp_path / "x.bundle").read_bytes()
    bundled(repository, tmp_path)
    assert (tmp_path / "x.bundle").read_bytes() == first
    assert first.count(SHARED) == 1


def test_slots_can_be_chosen(repository: Repository, tmp_path: Path) -> None:
    assert bundled(repository, tmp_path, "movement") == [("movement", 7)]
    with pytest.raises(Misconfigured, match="nothing is released for retreat, run"):
        bundled(repository, tmp_path, "run", "movement", "retreat")


def test_what_is_pinned_comes_too(repository: Repository, tmp_path: Path) -> None:
    wish(repository, "combat", pin("combat", 1, Whom(("pi7",)), SAID))
    assert bundled(repository, tmp_path, "combat") == [("combat", 1), ("combat", 3)]


def test_what_is_withdrawn_gives_way_to_the_one_before(repository: Repository, tmp_path: Path) -> None:
    wish(repository, "combat", withdraw("combat", 3, Whom(groups=("kitchen",)), SAID))
    assert bundled(repository, tmp_path, "combat") == [("combat", 2), ("combat", 3)]
    wish(repository, "combat", withdraw("combat", 3, Whom(), SAID))
    assert bundled(repository, tmp_path, "combat") == [("combat", 2)]


def test_wishes_travel_without_any_release(tmp_path: Path) -> None:
    empty = Repository(tmp_path / "repository", {role: [CryptoSigner.generate_ed25519()] for role in ROLES})
    empty.create(NOW)
    assert bundled(empty, tmp_path) == []


def test_it_says_until_when_devices_accept_it_and_refuses_when_that_is_over(
    repository: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "x.bundle"
    expires = make_bundle(repository, path, (), NOW).expires
    assert expires == NOW + timedelta(days=7)
    path.unlink()
    with pytest.raises(Unavailable, match=r"expired at 2030-01-08 12:00 UTC.*trainer-host run"):
        make_bundle(repository, path, (), expires)
    assert not path.exists()


@pytest.mark.parametrize("ending", ["", ".manifest"])
def test_a_model_that_rotted_is_not_passed_on(ending: str, repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "x.bundle").write_bytes(b"the one before")
    newest = next(each for each in repository.releases() if each.version == 3)
    path = tmp_path / "repository" / "models" / (newest.digest + ending)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Unavailable, match=r"combat/3\.tflite in the repository are damaged"):
        bundled(repository, tmp_path)
    assert (tmp_path / "x.bundle").read_bytes() == b"the one before"
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_not_there_is_unavailable(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot write"):
        make_bundle(repository, tmp_path / "none" / "x.bundle", (), NOW)


def test_the_command_writes_a_bundle_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "host.toml"
    config.write_text('state_dir = "host"\n')
    out = tmp_path / "models.bundle"

    def call(*words: str) -> int:
        return command_line.run(app, [*words, "--config", str(config)])

    assert call("keys", "init") == command_line.DONE
    capsys.readouterr()
    assert call("bundle", str(out)) == command_line.DONE
    assert "Devices accept it until" in capsys.readouterr().out
    assert call("bundle", str(out), "--json") == command_line.DONE
    said = json.loads(capsys.readouterr().out)
    assert said["models"] == []
    assert said["bytes"] == out.stat().st_size
    assert call("bundle", str(out), "--slot", "combat") == command_line.USAGE
