"""The dry run, with the real stager: what would be taken, refused or cannot be had, and who is tried at all."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import deployment, rehearsal, trusted_time
from edge_agent.deployer import stager_settings
from edge_agent.deployment import ModelStaged, ReleaseOffered
from edge_agent.rehearsal import rehearse
from edge_agent.settings import Settings, load
from edge_agent.staging import Progress, StagerSettings
from edge_agent.state import StateStore
from edge_agent.trusted_time import TrustedTime
from protocol.bundle import Bundle, bundled
from protocol.errors import Unavailable
from protocol.messages import ModelRef
from protocol.release import Release
from tests.integration.world import MODELS, release_of
from trainer_host import keys
from trainer_host.bundling import make_bundle
from trainer_host.repository import Repository, identity_of
from trainer_host.wishes import Edit, Said, Whom, carry_out, pin, withdraw

ECHO = (MODELS / "echo.tflite").read_bytes()
TWIN = (MODELS / "twin.tflite").read_bytes()
NAN = (MODELS / "nan.tflite").read_bytes()
ENDLESS = (MODELS / "endless.tflite").read_bytes()
SAID = Said(1.0, "ada@desk")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    keys.init(tmp_path / "keys", None)
    made = Repository(tmp_path / "repository", keys.load_signers(tmp_path / "keys"))
    made.create(datetime.now(UTC))
    return made


@pytest.fixture
def settings(tmp_path: Path, repository: Repository) -> Settings:
    (tmp_path / "root.json").write_bytes(repository.root())
    (tmp_path / "state").mkdir()
    (tmp_path / "agent.toml").write_text(
        'device = "pi7"\ngroups = ["kitchen"]\nstate_dir = "state"\n[broker]\nport = 1\n'
        "[slots.combat]\n[slots.movement]\n"
    )
    return load(tmp_path / "agent.toml")


def publish(repository: Repository, model: bytes, version: int, slot: str = "combat") -> Release:
    release = release_of(ECHO, version, slot)
    release = msgspec.structs.replace(release, **identity_of(model))
    repository.release(release, model, datetime.now(UTC))
    return release


def wish(repository: Repository, edit: Edit) -> None:
    carry_out(repository, "combat", edit, datetime.now(UTC))


def bundle_of(repository: Repository, tmp_path: Path) -> Path:
    make_bundle(repository, tmp_path / "x.bundle", (), datetime.now(UTC))
    return tmp_path / "x.bundle"


def endings(settings: Settings, bundle: Path) -> list[tuple[str, int, str, str]]:
    outcome = rehearse(settings, bundle)
    assert outcome.accepted, outcome.text
    return [(each.slot, each.version, each.ending, each.reason) for each in outcome.releases]


def test_each_slot_is_tried_and_progress_is_told(tmp_path: Path, repository: Repository, settings: Settings) -> None:
    publish(repository, ECHO, 1)
    publish(repository, TWIN, 2, "movement")
    publish(repository, ECHO, 3, "elsewhere")
    told: list[Progress] = []
    outcome = rehearse(settings, bundle_of(repository, tmp_path), told.append)
    assert [(each.slot, each.ending) for each in outcome.releases] == [("combat", "staged"), ("movement", "staged")]
    assert {progress.digest for progress in told} == {each.model for each in outcome.releases}
    assert list((tmp_path / "state").iterdir()) == []


def test_what_is_refused_and_what_is_incomplete_is_told_with_the_reason(
    tmp_path: Path, repository: Repository, settings: Settings
) -> None:
    publish(repository, NAN, 1)
    release = publish(repository, TWIN, 2, "movement")
    with Bundle(bundle_of(repository, tmp_path)) as whole:
        nan = next(each for each in repository.releases() if each.slot == "combat")
        pieces = [whole.chunk(digest) for digest in (nan.manifest, nan.digest, release.manifest)]  # of one chunk each
    (tmp_path / "x.bundle").write_bytes(b"".join(bundled(repository.metadata_set(), pieces)))
    assert endings(settings, tmp_path / "x.bundle") == [
        ("combat", 1, "refused", "not_finite"),
        ("movement", 2, "postponed", "incomplete_bundle"),
    ]


def test_a_model_that_ends_the_stager_does_not_keep_the_others_from_being_tried(
    tmp_path: Path, repository: Repository, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(repository, ENDLESS, 1)
    publish(repository, TWIN, 2, "movement")

    def impatient(settings: Settings) -> StagerSettings:
        return msgspec.structs.replace(stager_settings(settings), qualify_seconds=2.0)

    monkeypatch.setattr(rehearsal, "stager_settings", impatient)
    assert endings(settings, bundle_of(repository, tmp_path)) == [
        ("combat", 1, "postponed", "stager_died"),
        ("movement", 2, "staged", ""),
    ]


def test_without_room_on_the_device_nothing_is_tried(
    tmp_path: Path, repository: Repository, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cramped(settings: Settings) -> StagerSettings:
        return msgspec.structs.replace(stager_settings(settings), reserve_bytes=2**60)

    publish(repository, ECHO, 1)
    monkeypatch.setattr(rehearsal, "stager_settings", cramped)
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 1, "postponed", "no_space")]


def test_what_the_slot_would_not_take_is_not_tried(tmp_path: Path, repository: Repository, settings: Settings) -> None:
    release = publish(repository, ECHO, 1)
    model = ModelRef(digest=release.digest, version=1)
    state = deployment.step(deployment.initial(), ReleaseOffered(model)).state
    state = deployment.step(state, ModelStaged(release.digest)).state
    store = StateStore(tmp_path / "state" / "state", settings.slots.keys())
    store.save("combat", deployment.encode(state))
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 1, "unchanged", "")]
    publish(repository, TWIN, 2)
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 2, "staged", "")]


def test_a_pin_and_a_withdrawal_are_heeded(tmp_path: Path, repository: Repository, settings: Settings) -> None:
    publish(repository, ECHO, 1)
    publish(repository, TWIN, 2)
    wish(repository, pin("combat", 1, Whom(groups=("kitchen",)), SAID))
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 1, "staged", "")]
    wish(repository, pin("combat", 2, Whom(("pi7",)), SAID))
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 2, "staged", "")]


def serving(settings: Settings, release: Release) -> None:
    """The device has a model in service."""
    model = ModelRef(digest=release.digest, version=release.version)
    state = deployment.step(deployment.initial(), ReleaseOffered(model)).state
    state = deployment.step(state, ModelStaged(release.digest)).state
    StateStore(Path(settings.state_dir) / "state", settings.slots.keys()).save("combat", deployment.encode(state))


def test_of_several_newer_ones_the_newest_is_tried_as_it_would_be_taken(
    tmp_path: Path, repository: Repository, settings: Settings
) -> None:
    serving(settings, publish(repository, ECHO, 1))
    publish(repository, TWIN, 2)
    publish(repository, NAN, 3)
    wish(repository, pin("combat", 2, Whom(("elsewhere",)), SAID))  # so the bundle holds all three
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 3, "refused", "not_finite")]


def test_a_pin_of_what_is_served_changes_nothing(tmp_path: Path, repository: Repository, settings: Settings) -> None:
    serving(settings, publish(repository, ECHO, 1))
    publish(repository, TWIN, 2)
    wish(repository, pin("combat", 1, Whom(), SAID))
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 2, "unchanged", "")]


def test_where_the_only_model_is_withdrawn_an_older_one_is_tried(
    tmp_path: Path, repository: Repository, settings: Settings
) -> None:
    publish(repository, TWIN, 1)
    serving(settings, publish(repository, ECHO, 2))
    wish(repository, withdraw("combat", 2, Whom(), SAID))
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 1, "staged", "")]


def test_what_is_withdrawn_here_is_not_tried(tmp_path: Path, repository: Repository, settings: Settings) -> None:
    publish(repository, ECHO, 1)
    wish(repository, withdraw("combat", 1, Whom(("pi7",)), SAID))
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 1, "unchanged", "")]


def test_a_model_that_is_not_in_the_bundle_is_not_tried(
    tmp_path: Path, repository: Repository, settings: Settings
) -> None:
    publish(repository, ECHO, 1)
    with Bundle(bundle_of(repository, tmp_path)) as whole:
        metadata = whole.metadata_set()
    (tmp_path / "x.bundle").write_bytes(b"".join(bundled(metadata, [])))
    assert endings(settings, tmp_path / "x.bundle") == [("combat", 1, "unchanged", "")]


def test_refused_metadata_and_a_broken_file_are_told(
    tmp_path: Path, repository: Repository, settings: Settings
) -> None:
    altered = repository.metadata_set().replace(b"targets", b"tARGETS")
    (tmp_path / "x.bundle").write_bytes(b"".join(bundled(altered, [])))
    assert not rehearse(settings, tmp_path / "x.bundle").accepted
    (tmp_path / "x.bundle").write_bytes(b"")
    outcome = rehearse(settings, tmp_path / "x.bundle")
    assert (outcome.accepted, outcome.reason) == (False, "bad_bundle")


def test_the_time_that_the_device_knows_to_have_passed_counts(
    tmp_path: Path, repository: Repository, settings: Settings
) -> None:
    TrustedTime(tmp_path / "state" / trusted_time.FILE).accepted(datetime.now(UTC) + timedelta(days=30))
    outcome = rehearse(settings, bundle_of(repository, tmp_path))
    assert (outcome.accepted, outcome.reason) == (False, "expired")


def test_a_folder_that_cannot_be_copied_is_unavailable(
    tmp_path: Path, repository: Repository, settings: Settings
) -> None:
    (tmp_path / "state" / "trust").mkdir()
    (tmp_path / "state" / "trust" / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Unavailable, match="cannot copy what this device trusts"):
        rehearse(settings, bundle_of(repository, tmp_path))


def test_what_is_half_written_is_not_copied(tmp_path: Path, repository: Repository, settings: Settings) -> None:
    for folder in ("trust", "state"):
        (tmp_path / "state" / folder).mkdir()
        (tmp_path / "state" / folder / ".x.new").symlink_to(tmp_path / "renamed-meanwhile")
    publish(repository, ECHO, 1)
    assert endings(settings, bundle_of(repository, tmp_path)) == [("combat", 1, "staged", "")]


@pytest.mark.parametrize("often", [1, rehearsal.COPY_TRIES])
def test_what_changes_while_it_is_copied_is_copied_again(
    tmp_path: Path, repository: Repository, settings: Settings, monkeypatch: pytest.MonkeyPatch, often: int
) -> None:
    publish(repository, ECHO, 1)
    bundle = bundle_of(repository, tmp_path)
    assert rehearse(settings, bundle).accepted
    live = tmp_path / "state" / "trust" / "timestamp.json"
    live.parent.mkdir()
    live.write_bytes(b"before")
    really = shutil.copytree
    copies: list[bytes] = []

    def copying(source: Path, target: Path, **options: Any) -> None:
        really(source, target, **options)
        if len(copies) < often:  # the daemon goes on meanwhile
            (live.parent / ".new").write_bytes(b"%d" % len(copies))
            (live.parent / ".new").replace(live)
            copies.append(live.read_bytes())

    monkeypatch.setattr(shutil, "copytree", copying)
    monkeypatch.setattr(rehearsal, "COPY_AGAIN_S", 0.0)
    if often < rehearsal.COPY_TRIES:
        (tmp_path / "copy").mkdir()
        rehearsal._copy(tmp_path / "state", tmp_path / "copy")
        assert (tmp_path / "copy" / "trust" / "timestamp.json").read_bytes() == copies[-1]
    else:
        with pytest.raises(Unavailable, match="does not stand still"):
            rehearse(settings, bundle)


def test_a_file_that_is_not_there_is_unavailable(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(Unavailable):
        rehearse(settings, tmp_path / "none")
