"""Sideloading with the real stager, the real agent and the real commands, and no broker that could be reached."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.children import Child, start
from edge_agent.inbox import FOLDER, RESULTS, Outcome, read_result
from edge_agent.model_store import ModelStore
from edge_agent.staging import (
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
)
from protocol.bundle import Bundle, bundled
from protocol.link import Broker
from protocol.messages import Status
from protocol.release import Release
from tests.integration.world import MODELS, release_of
from trainer_host import keys
from trainer_host.bundling import make_bundle
from trainer_host.repository import Repository, identity_of

ECHO = (MODELS / "echo.tflite").read_bytes()
TWIN = (MODELS / "twin.tflite").read_bytes()
NAN = (MODELS / "nan.tflite").read_bytes()
LARGE = ECHO + os.urandom(300_000)  # what follows the flatbuffer is not looked at
NOBODY = Broker(port=1)  # refuses every connection
DEADLINE_S = 60.0

own_disk = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="a disk of its own is mounted, which needs Linux and root"
)


def new_repository(folder: Path) -> Repository:
    keys.init(folder / "keys", None)
    made = Repository(folder / "repository", keys.load_signers(folder / "keys"))
    made.create(datetime.now(UTC))
    return made


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return new_repository(tmp_path)


def publish(repository: Repository, model: bytes, version: int, slot: str = "combat") -> Release:
    release = release_of(ECHO if model is NAN else model, version, slot)
    release = msgspec.structs.replace(release, **identity_of(model))  # NAN has no reference answers of its own
    repository.release(release, model, datetime.now(UTC))
    return release


def bundle_of(repository: Repository, path: Path) -> Path:
    make_bundle(repository, path, (), datetime.now(UTC))
    return path


# The stager.


class Stagers:
    """Starts stagers on bundles, on one device, and ends those that are left."""

    def __init__(self, folder: Path, root: bytes) -> None:
        (folder / "root.json").write_bytes(root)
        self.folder = folder
        self.children: list[Child[FromStager]] = []

    def start(self, bundle: Path, store: Path | None = None) -> Child[FromStager]:
        settings = StagerSettings(
            device="pi7",
            folder=str(store or self.folder / "store"),
            trust_folder=str(self.folder / "trust"),
            root_file=str(self.folder / "root.json"),
            metadata_file=str(self.folder / "metadata.new"),
            built_at=0.0,
            broker=NOBODY,
            bundle=str(bundle),
            reserve_bytes=0,
        )
        child: Child[FromStager] = start("stager", settings, FromStager, "stager")
        self.children.append(child)
        return child


@pytest.fixture
def stagers(tmp_path: Path, repository: Repository) -> Iterator[Stagers]:
    made = Stagers(tmp_path, repository.root())
    yield made
    for child in made.children:
        child.kill()


def heard(child: Child[FromStager], *until: type) -> Any:
    """The stager's first message of one of these types."""
    deadline = time.monotonic() + DEADLINE_S
    said: list[FromStager] = []
    while time.monotonic() < deadline and not child.channel.closed:
        select.select([child.channel], [], [], 0.1)
        said += child.channel.receive()
        found = [message for message in said if isinstance(message, until)]
        if found:
            return found[0]
    raise AssertionError(f"none of {until}, but {said}")


def test_a_model_is_verified_assembled_and_qualified_from_a_file_alone(
    tmp_path: Path, repository: Repository, stagers: Stagers
) -> None:
    release = publish(repository, LARGE, 1)
    child = stagers.start(bundle_of(repository, tmp_path / "x.bundle"))
    assert heard(child, MetadataVerified, MetadataRefused).releases == (release,)
    child.channel.send(StageModel(release.digest))
    assert heard(child, Staged, Refused, Postponed) == Staged(release.digest)
    assert ModelStore(tmp_path / "store").open(release.digest) == LARGE
    assert (tmp_path / "metadata.new").read_bytes() == repository.metadata_set()


def test_an_older_bundle_is_refused(tmp_path: Path, repository: Repository, stagers: Stagers) -> None:
    publish(repository, ECHO, 1)
    older = bundle_of(repository, tmp_path / "older")
    publish(repository, TWIN, 2)
    heard(stagers.start(bundle_of(repository, tmp_path / "newer")), MetadataVerified)
    stagers.children[0].kill()
    refused = heard(stagers.start(older), MetadataRefused)
    assert refused.reason == "rolled_back"


def test_a_bundle_for_another_root_of_trust_is_refused(tmp_path: Path, stagers: Stagers) -> None:
    (tmp_path / "other").mkdir()
    other = new_repository(tmp_path / "other")
    publish(other, ECHO, 1)
    refused = heard(stagers.start(bundle_of(other, tmp_path / "x.bundle")), MetadataRefused)
    assert refused.reason in ("bad_signature", "bad_root")
    assert not (tmp_path / "metadata.new").exists()


def test_metadata_that_was_altered_in_a_well_made_bundle_is_refused(
    tmp_path: Path, repository: Repository, stagers: Stagers
) -> None:
    publish(repository, ECHO, 1)
    altered = repository.metadata_set().replace(b"action-0", b"action-9")
    (tmp_path / "x.bundle").write_bytes(b"".join(bundled(altered, [])))
    assert heard(stagers.start(tmp_path / "x.bundle"), MetadataRefused).reason in ("bad_signature", "mixed")


def test_a_bundle_that_is_cut_short_is_refused_by_name(
    tmp_path: Path, repository: Repository, stagers: Stagers
) -> None:
    publish(repository, ECHO, 1)
    path = bundle_of(repository, tmp_path / "x.bundle")
    os.truncate(path, path.stat().st_size - 1)
    refused = heard(stagers.start(path), MetadataRefused)
    assert refused.reason == "bad_bundle"
    assert "cut short" in refused.text


def test_a_bundle_without_all_chunks_postpones_the_model(
    tmp_path: Path, repository: Repository, stagers: Stagers
) -> None:
    release = publish(repository, LARGE, 1)
    with Bundle(bundle_of(repository, tmp_path / "whole")) as whole:
        manifest = whole.chunk(release.manifest)
    (tmp_path / "x.bundle").write_bytes(b"".join(bundled(repository.metadata_set(), [manifest])))
    child = stagers.start(tmp_path / "x.bundle")
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    postponed = heard(child, Staged, Refused, Postponed)
    assert isinstance(postponed, Postponed)
    assert (postponed.digest, postponed.reason) == (release.digest, "incomplete_bundle")


def test_a_model_that_does_not_qualify_is_refused(tmp_path: Path, repository: Repository, stagers: Stagers) -> None:
    release = publish(repository, NAN, 1)
    child = stagers.start(bundle_of(repository, tmp_path / "x.bundle"))
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    refused = heard(child, Staged, Refused, Postponed)
    assert isinstance(refused, Refused)
    assert refused.reason == "not_finite"


@own_disk
def test_a_full_disk_postpones_the_model_and_once_there_is_room_it_is_staged(
    tmp_path: Path, repository: Repository, stagers: Stagers
) -> None:
    release = publish(repository, LARGE, 1)
    path = bundle_of(repository, tmp_path / "x.bundle")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], check=True)
    try:
        child = stagers.start(path, small)
        heard(child, MetadataVerified)
        child.channel.send(StageModel(release.digest))
        postponed = heard(child, Staged, Refused, Postponed)
        assert isinstance(postponed, Postponed)
        assert (postponed.digest, postponed.reason) == (release.digest, "no_space")
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        child.channel.send(StageModel(release.digest))
        deadline = time.monotonic() + DEADLINE_S
        while release.digest not in ModelStore(small) and time.monotonic() < deadline:
            select.select([child.channel], [], [], 0.1)
        assert ModelStore(small).open(release.digest) == LARGE
    finally:
        child.kill()
        subprocess.run(["umount", "--lazy", str(small)], check=True)


# The agent and its commands.


class Device:
    """An agent and its commands, with no broker that could be reached."""

    def __init__(self, folder: Path, root: bytes) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.config = folder / "edge-agent.toml"
        self.config.write_text(
            'device = "pi7"\nstate_dir = "state"\n[broker]\nport = 1\n'
            "[slots.combat]\ndeadline_ms = 2000\n[slots.movement]\n"
        )
        (folder / "root.json").write_bytes(root)
        self.agent: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.agent = subprocess.Popen([sys.executable, "-m", "edge_agent", "run", "--config", str(self.config)])
        self.wait(lambda: self.status() is not None, "the daemon has a status")

    def stop(self) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(signal.SIGTERM)
            assert self.agent.wait(DEADLINE_S) == 0

    def install(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edge_agent", "install", *map(str, words), "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    def outcome(self, *words: str | Path) -> Outcome:
        return msgspec.json.decode(self.install(*words, "--json").stdout, type=Outcome)

    def status(self) -> Status | None:
        try:
            return msgspec.json.decode((self.state / "run" / "status.json").read_bytes(), type=Status)
        except FileNotFoundError:
            return None

    def serves(self, version: int, slot: str = "combat") -> bool:
        status = self.status()
        active = status.slots[slot].active if status is not None else None
        return active is not None and active.version == version

    def events(self) -> list[str]:
        command = [sys.executable, "-m", "edge_agent", "history", "--json", "--config", str(self.config)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
        return [event["kind"] for event in json.loads(ended.stdout)]

    def waiting(self) -> list[str]:
        """The bundles in the inbox."""
        return sorted(path.name for path in (self.state / FOLDER).iterdir() if path.is_file())

    def wait(self, what: Callable[[], object], described: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert self.agent is None or self.agent.poll() is None, "the daemon ended"
            assert time.monotonic() < deadline, f"waited in vain until {described}"
            time.sleep(0.05)


@pytest.fixture
def device(tmp_path: Path, repository: Repository) -> Iterator[Device]:
    made = Device(tmp_path, repository.root())
    yield made
    made.stop()


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_any_network_a_first_model_is_installed_and_committed(
    tmp_path: Path, repository: Repository, device: Device
) -> None:
    publish(repository, LARGE, 3)
    publish(repository, TWIN, 4, "movement")
    publish(repository, ECHO, 1, "elsewhere")
    device.start()
    done = device.install(bundle_of(repository, tmp_path / "models.bundle"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "staged" in done.stdout
    device.wait(lambda: device.serves(3) and device.serves(4, "movement"), "both are served")
    assert {"staged", "committed"} <= set(device.events())
    assert device.waiting() == []
    again = device.outcome(tmp_path / "models.bundle")
    assert [(each.slot, each.version, each.ending) for each in again.releases] == [
        ("combat", 3, "unchanged"),
        ("movement", 4, "unchanged"),
    ]
    assert len(list((device.state / FOLDER / RESULTS).iterdir())) == 2


def test_what_was_installed_is_served_after_a_restart_and_an_older_bundle_is_refused_by_name(
    tmp_path: Path, repository: Repository, device: Device
) -> None:
    publish(repository, ECHO, 1)
    older = bundle_of(repository, tmp_path / "older.bundle")
    publish(repository, LARGE, 2)
    device.start()
    assert device.install(bundle_of(repository, tmp_path / "newer.bundle")).returncode == 0
    device.wait(lambda: device.serves(2), "version 2 is served")
    device.stop()
    device.start()
    device.wait(lambda: device.serves(2), "version 2 is served again")
    done = device.install(older)
    assert done.returncode == 1
    assert "rolled_back" in done.stdout
    assert device.waiting() == []
    assert device.serves(2)


def test_a_file_that_a_person_drops_is_taken_once_it_is_whole_and_a_broken_one_is_told_and_set_aside(
    tmp_path: Path, repository: Repository, device: Device
) -> None:
    publish(repository, LARGE, 1)
    data = bundle_of(repository, tmp_path / "models.bundle").read_bytes()
    device.start()
    inbox = device.state / FOLDER
    with (inbox / "slowly.bundle").open("wb", buffering=0) as file:
        for start in range(0, len(data), len(data) // 8):  # a copy that pauses, for less than it takes to be taken
            file.write(data[start : start + len(data) // 8])
            os.fsync(file.fileno())
            assert read_result(device.state, "slowly.bundle") is None
    device.wait(lambda: device.serves(1), "the model is served")
    device.wait(lambda: read_result(device.state, "slowly.bundle") is not None, "it is told")
    (inbox / "broken.bundle").write_bytes(data[:-100])
    device.wait(lambda: read_result(device.state, "broken.bundle") is not None, "it is told")
    outcome = read_result(device.state, "broken.bundle")
    assert outcome is not None
    assert (outcome.accepted, outcome.reason) == (False, "bad_bundle")
    device.wait(lambda: device.waiting() == [], "the inbox is empty")
    assert (inbox / "refused" / "broken.bundle").read_bytes() == data[:-100]


def test_without_a_daemon_the_bundle_waits_for_one(tmp_path: Path, repository: Repository, device: Device) -> None:
    publish(repository, ECHO, 1)
    path = bundle_of(repository, tmp_path / "models.bundle")
    device.state.mkdir()
    done = device.install(path)
    assert done.returncode == 3
    assert "until the daemon runs" in done.stderr
    (name,) = device.waiting()
    device.start()
    device.wait(lambda: device.serves(1), "the model is served")
    device.wait(lambda: read_result(device.state, name) is not None, "it is told")


def test_a_refused_model_is_told_with_its_reason_and_the_others_are_taken(
    tmp_path: Path, repository: Repository, device: Device
) -> None:
    publish(repository, NAN, 1)
    publish(repository, TWIN, 2, "movement")
    device.start()
    outcome = device.outcome(bundle_of(repository, tmp_path / "models.bundle"))
    assert [(each.slot, each.ending, each.reason) for each in outcome.releases] == [
        ("combat", "refused", "not_finite"),
        ("movement", "staged", ""),
    ]
    assert device.install(tmp_path / "models.bundle").returncode == 0  # nothing is refused twice


def test_what_is_no_bundle_is_turned_away_at_the_door(tmp_path: Path, device: Device) -> None:
    (tmp_path / "x").write_bytes(b"no bundle")
    device.state.mkdir()
    done = device.install(tmp_path / "x")
    assert done.returncode == 1
    assert done.stderr.startswith("error: x is not a whole bundle")
    assert not (device.state / FOLDER).exists()
    assert device.install(tmp_path / "none").returncode == 3


# The dry run.


def test_a_check_says_what_would_be_taken_and_changes_nothing(
    tmp_path: Path, repository: Repository, device: Device
) -> None:
    publish(repository, LARGE, 1)
    publish(repository, NAN, 1, "movement")
    path = bundle_of(repository, tmp_path / "models.bundle")
    device.start()
    before = everything_below(device.state / "trust"), device.waiting()
    done = device.install(path, "--check")
    assert done.returncode == 1
    assert "would be taken" in done.stdout
    assert "would be refused" in done.stdout
    assert "not_finite" in done.stdout
    assert (everything_below(device.state / "trust"), device.waiting()) == before
    assert not device.serves(1)


def test_a_check_works_without_a_daemon_and_leaves_no_trace(
    tmp_path: Path, repository: Repository, device: Device
) -> None:
    publish(repository, LARGE, 1)
    path = bundle_of(repository, tmp_path / "models.bundle")
    device.state.mkdir()
    done = device.install(path, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would be taken" in done.stdout
    assert everything_below(device.state) == {}


def test_a_check_knows_what_is_served_and_what_is_older(tmp_path: Path, repository: Repository, device: Device) -> None:
    publish(repository, ECHO, 1)
    older = bundle_of(repository, tmp_path / "older.bundle")
    publish(repository, TWIN, 2)
    newer = bundle_of(repository, tmp_path / "newer.bundle")
    device.start()
    assert device.install(newer).returncode == 0
    device.wait(lambda: device.serves(2), "version 2 is served")
    same = device.outcome(newer, "--check")
    assert [(each.version, each.ending) for each in same.releases] == [(2, "unchanged")]
    refused = device.install(older, "--check")
    assert refused.returncode == 1
    assert "rolled_back" in refused.stdout
    device.stop()
    assert device.install(older, "--check").returncode == 1


def test_a_check_names_a_broken_bundle_and_an_expired_one(
    tmp_path: Path, repository: Repository, device: Device
) -> None:
    device.state.mkdir()
    (tmp_path / "x").write_bytes(b"")
    broken = device.install(tmp_path / "x", "--check")
    assert (broken.returncode, "bad_bundle" in broken.stdout) == (1, True)
    (tmp_path / "long ago").mkdir()
    then = datetime.now(UTC) - timedelta(days=100)
    expired = Repository(tmp_path / "long ago" / "repository", keys.load_signers(tmp_path / "keys"))
    expired.create(then)
    (tmp_path / "root.json").write_bytes(expired.root())
    path = tmp_path / "late.bundle"
    make_bundle(expired, path, (), then)
    refused = device.install(path, "--check")
    assert (refused.returncode, "expired" in refused.stdout) == (1, True)
