"""All about a device's models, on a real disk; its workers, trials and stagers are played by the test."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import deployment
from edge_agent.children import (
    Child,
    FromTrial,
    FromWorker,
    Joined,
    Leave,
    Loaded,
    ToTrial,
    ToWorker,
    TrialAssignment,
    WorkerAssignment,
)
from edge_agent.deployer import Deployer, Starters
from edge_agent.model_store import ModelStore
from edge_agent.settings import Settings, SlotSettings
from edge_agent.staging import (
    BadRelease,
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
    ToStager,
)
from protocol.durable import OS_DISK, OsDisk
from protocol.features import FeatureSpec
from protocol.messages import Event, ModelRef
from protocol.release import Golden, Release, Tensor, chunked, manifest_of
from protocol.wishes import Pin, Withdrawal
from tests.unit.edge_agent.played import Played, play
from trainer_host.repository import identity_of


def model(version: int) -> bytes:
    return f"model {version}".encode()


def release(version: int, slot: str = "combat", notes: str = "") -> Release:
    return Release(
        slot=slot,
        version=version,
        **identity_of(model(version)),
        inputs=(Tensor(name="in", shape=(1, 2), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(),
        golden=Golden(inputs=(), outputs=(), tolerance=1.0),
        notes=notes,
    )


ONE, TWO, THREE = (release(version) for version in (1, 2, 3))


def file_of(each: Release) -> str:
    return f"{each.slot}-{each.version}-{each.digest[:16]}.json"


class CrowdedDisk(OsDisk):
    """Full while there are chunks."""

    def write(self, path: Path, pieces: Iterable[bytes], *, sync: bool) -> None:
        if any((path.parent / "chunks").glob("*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, pieces, sync=sync)


class Scene:
    """A deployer, its clock and its world."""

    def __init__(
        self,
        folder: Path,
        slots: tuple[str, ...] = ("combat",),
        groups: tuple[str, ...] = (),
        disk: OsDisk = OS_DISK,
    ) -> None:
        self.folder = folder
        self.disk = disk
        self.settings = Settings(
            device="pi7",
            groups=groups,
            slots={slot: SlotSettings() for slot in slots},
            state_dir=str(folder / "state"),
            root_of_trust=str(folder / "root.json"),
        )
        self.now = 100.0
        self.events: list[Event] = []
        self.workers: list[Played] = []
        self.trials: list[Played] = []
        self.stagers: list[Played] = []
        self.start()

    def start(self) -> None:
        """Start the daemon, again if there was one."""
        self.workers.clear()
        self.trials.clear()
        self.stagers.clear()
        self.deployer = Deployer(
            self.settings,
            Starters(self._worker, self._trial, self._stager),
            report=self.events.append,
            recall=lambda slot: [event for event in self.events if event.slot == slot],
            record=lambda _: None,
            throttled=lambda: False,
            wall_clock=lambda: 5.0,
            rng=random.Random(1),
            disk=self.disk,
        )
        self.deployer.begin(self.now)

    def _worker(self, assignment: WorkerAssignment) -> Child[FromWorker]:
        self.workers.append(play(assignment, FromWorker, ToWorker, 1))
        return self.workers[-1].child

    def _trial(self, _slot: str, assignment: TrialAssignment) -> Child[FromTrial]:
        self.trials.append(play(assignment, FromTrial, ToTrial, 2))
        return self.trials[-1].child

    def _stager(self, settings: StagerSettings) -> Child[FromStager]:
        self.stagers.append(play(settings, FromStager, ToStager, 3))
        return self.stagers[-1].child

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.deployer.tick(self.now)

    def says(self, played: Played, *messages: Any) -> None:
        for message in messages:
            assert played.end.send(message)
        self.deployer.receive(played.child, self.now)

    def verifies(self, *releases: Release, wishes: tuple[Pin | Withdrawal, ...] = (), **fields: Any) -> Played:
        """New metadata comes, and a stager accepts it."""
        self.deployer.metadata_arrived(b"a set" + str(len(self.stagers) + self.now).encode())
        while not (self.stagers and not self.stagers[-1].child.channel.closed):
            self.tick()
        stager = self.stagers[-1]
        self.says(stager, MetadataVerified(7, releases, wishes, ("c0ffee00c0ffee",), **fields))
        return stager

    def stages(self, stager: Played, version: int) -> None:
        """It brings a model."""
        digest = ModelStore(self.folder / "state").put(model(version))
        assert StageModel(digest) in stager.end.receive()
        self.says(stager, Staged(digest))

    def leaves(self, stager: Played) -> None:
        """It has nothing more to do."""
        assert Quit() in stager.end.receive()
        stager.ends(0)
        self.deployer.receive(stager.child, self.now)

    def serves(self) -> int | None:
        """The newest worker comes to serve, those before it leave; the version it was given."""
        self.tick()
        worker = self.workers[-1]
        if worker.child.channel.closed or worker.process.returncode is not None:
            self.tick()
            worker = self.workers[-1]
        self.says(worker, Loaded(load_ms=1.0, runtime="runtime"), Joined())
        for other in self.workers[:-1]:
            if not other.child.channel.closed and Leave() in other.end.receive():
                other.ends(0)
                self.deployer.receive(other.child, self.now)
        return worker.what.model.version if worker.what.model else None

    def commits(self, *versions: int) -> None:
        """Versions come to be served, the later ones by a pin, which needs no trial."""
        for version in versions:
            pin = () if version == versions[0] else (pinned(version),)
            stager = self.verifies(*(release(each) for each in versions[: versions.index(version) + 1]), wishes=pin)
            self.stages(stager, version)
            self.leaves(stager)
            assert self.serves() == version

    @property
    def state(self) -> deployment.State:
        return self.deployer.slots["combat"].state

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def files(self, part: str) -> set[str]:
        return {path.name for path in (self.folder / "state" / part).iterdir()}


def pinned(version: int, **fields: Any) -> Pin:
    return Pin(slot="combat", version=version, by="alice", **fields)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_the_newest_release_of_a_slot_is_staged_and_served(scene: Scene) -> None:
    stager = scene.verifies(ONE, TWO, release(9, "movement"))
    assert stager.what.device == "pi7"
    scene.stages(stager, 2)
    scene.leaves(stager)
    assert scene.serves() == 2
    status = scene.deployer.statuses()["combat"]
    assert (status.active, status.ready, scene.deployer.metadata_version) == (
        ModelRef(digest=TWO.digest, version=2),
        True,
        7,
    )


def test_a_pinned_version_is_served_instead_of_the_newest_and_the_event_says_whose_wish_it_is(scene: Scene) -> None:
    scene.commits(1, 2)
    assert scene.deployer.statuses()["combat"].pinned == 2
    scene.verifies(ONE, TWO, THREE, wishes=(pinned(1, at=86_400.0, note="too clever"),))
    assert scene.serves() == 1
    event = scene.events[-1]
    assert (event.kind, event.version) == ("pinned", 1)
    assert "wished by alice on 1970-01-02 00:00 UTC, signed by key c0ffee00: too clever" in event.text
    assert scene.deployer.statuses()["combat"].pinned == 1
    stager = scene.verifies(ONE, TWO, THREE)
    assert isinstance(scene.state, deployment.Staging)
    assert scene.state.candidate.version == 3
    assert scene.deployer.statuses()["combat"].pinned is None
    assert stager.process.returncode is None


@pytest.mark.parametrize(
    ("wish", "obeyed"),
    [
        (pinned(1, devices=("pi7",)), True),
        (pinned(1, devices=("pi8",)), False),
        (pinned(1, groups=("attic",)), True),
        (pinned(1, groups=("cellar",)), False),
    ],
    ids=repr,
)
def test_a_wish_for_others_is_not_obeyed(tmp_path: Path, wish: Pin, obeyed: bool) -> None:
    scene = Scene(tmp_path, groups=("attic", "upstairs"))
    scene.commits(1, 2)
    scene.verifies(ONE, TWO, wishes=(wish,))
    assert scene.serves() == (1 if obeyed else 2)


def test_a_withdrawn_version_gives_way_and_is_not_taken_again(scene: Scene) -> None:
    scene.commits(1, 2)
    withdrawal = Withdrawal(slot="combat", version=2, by="alice")
    for _ in range(2):
        scene.verifies(ONE, TWO, wishes=(withdrawal,))
        scene.leaves(scene.stagers[-1])
        assert scene.serves() == 1
    assert scene.kinds().count("rolled_back") == 1
    scene.verifies(ONE, TWO, THREE, wishes=(withdrawal, Withdrawal(slot="combat", version=3)))
    assert isinstance(scene.state, deployment.Serving)


def test_a_withdrawn_version_with_none_before_it_gives_way_to_another_release(scene: Scene) -> None:
    scene.commits(2)
    stager = scene.verifies(ONE, TWO, wishes=(Withdrawal(slot="combat", version=2, by="alice"),))
    assert scene.serves() == 2, "something must be served meanwhile"
    scene.stages(stager, 1)
    assert scene.serves() == 1
    assert (scene.events[-1].kind, scene.events[-1].version) == ("pinned", 1)


def test_a_pin_of_what_is_not_released_and_a_target_that_is_no_release_are_said_once(scene: Scene) -> None:
    bad = BadRelease("../../etc/passwd", "bad_release", "its path is not that of a release")
    for _ in range(3):
        scene.verifies(ONE, wishes=(pinned(4),), refused=(bad,))
        scene.leaves(scene.stagers[-1])
    assert [(event.kind, event.reason) for event in scene.events] == [
        ("release_refused", "bad_release"),
        ("pin_unknown", "pin_unknown"),
    ]
    assert isinstance(scene.state, deployment.Serving)


def test_refused_metadata_is_an_event_and_nothing_changes(scene: Scene) -> None:
    scene.commits(1)
    before = scene.state
    scene.deployer.metadata_arrived(b"forged")
    while scene.stagers[-1].child.channel.closed:
        scene.tick()
    scene.says(scene.stagers[-1], MetadataRefused("bad_signature", "forged"))
    assert (scene.events[-1].kind, scene.events[-1].reason) == ("metadata_refused", "bad_signature")
    assert scene.state == before


def test_what_no_slot_needs_is_removed_once_nothing_is_under_way(scene: Scene) -> None:
    scene.commits(1, 2)
    ModelStore(scene.folder / "state").put_chunk(b"chunk")
    scene.verifies(ONE, TWO, THREE, wishes=(pinned(3),))
    scene.stages(scene.stagers[-1], 3)
    scene.leaves(scene.stagers[-1])
    scene.serves()
    scene.tick()
    while not scene.stagers[-1].child.channel.closed:
        scene.says(scene.stagers[-1], MetadataVerified(7, (ONE, TWO, THREE), (pinned(3),)))
        scene.leaves(scene.stagers[-1])
        scene.tick()
    assert scene.files("models") == {f"{each.digest}.tflite" for each in (TWO, THREE)}
    assert scene.files("releases") == {file_of(TWO), file_of(THREE)}
    assert scene.files("chunks") == set()


def test_where_room_is_short_only_what_is_under_way_and_needed_stays(scene: Scene) -> None:
    scene.commits(1)
    store = ModelStore(scene.folder / "state")
    stranger = store.put_chunk(b"chunk of something given up")
    kept = store.put_chunk(manifest_of(chunked(model(2))))
    stager = scene.verifies(ONE, TWO)
    assert StageModel(TWO.digest) in stager.end.receive()
    scene.says(stager, Postponed(TWO.digest, "no_space", "full"))
    assert scene.files("chunks") == {kept}
    assert stranger != kept
    assert scene.files("models") == {f"{ONE.digest}.tflite"}
    assert scene.kinds()[-1] == "postponed"


def test_after_a_restart_the_active_model_is_served_before_any_metadata(scene: Scene) -> None:
    scene.commits(1)
    scene.deployer.stop(scene.now)
    scene.deployer.stopped()
    scene.start()
    assert scene.serves() == 1


def test_what_is_known_of_a_model_and_was_lost_is_written_again(scene: Scene) -> None:
    scene.commits(1, 2)
    (scene.folder / "state/releases" / file_of(ONE)).write_bytes(b"rotten")
    scene.start()
    assert scene.serves() == 2
    scene.verifies(ONE, TWO, wishes=(pinned(2),))
    assert ONE.digest.encode() in (scene.folder / "state/releases" / file_of(ONE)).read_bytes()


def test_an_active_model_of_which_nothing_is_known_any_more_gives_way_and_is_staged_again(scene: Scene) -> None:
    scene.commits(1, 2)
    (scene.folder / "state/releases" / file_of(TWO)).write_bytes(b"rotten")
    scene.start()
    assert scene.serves() == 1
    assert (scene.events[-1].kind, scene.events[-1].version) == ("lost", 2)
    scene.verifies(ONE, TWO)
    assert isinstance(scene.state, deployment.Staging)


@pytest.mark.parametrize("rotten", [(), (2,), (1, 2)])
def test_a_lost_state_is_found_again_in_the_audit_trail_as_far_as_the_store_bears_it_out(
    scene: Scene, rotten: tuple[int, ...]
) -> None:
    scene.commits(1, 2)
    for path in (scene.folder / "state" / "state").glob("slot-combat.*"):
        path.write_bytes(b"rotten")
    for version in rotten:
        (scene.folder / "state/releases" / file_of(release(version))).unlink()
    scene.start()
    assert scene.serves() == {(): 2, (2,): 1, (1, 2): None}[rotten]
    assert [event.kind for event in scene.events[-2:]].count("state_recovered") == 1


def test_a_model_that_one_slot_gives_up_stays_wanted_by_the_other(tmp_path: Path) -> None:
    scene = Scene(tmp_path, slots=("combat", "movement"))
    same = msgspec.structs.replace(ONE, slot="movement")
    first = scene.verifies(ONE, same)
    first.ends(0)
    scene.deployer.receive(first.child, scene.now)
    stager = scene.verifies(ONE, same, wishes=(Withdrawal(slot="combat", version=1),))
    scene.stages(stager, 1)
    assert scene.deployer.slots["movement"].state.active == ModelRef(digest=ONE.digest, version=1)
    assert scene.state.active is None


def test_a_full_disk_that_metadata_does_not_fit_on_is_cleared_of_what_nobody_needs(tmp_path: Path) -> None:
    scene = Scene(tmp_path, disk=CrowdedDisk())
    scene.commits(1)
    stager = scene.verifies(ONE, TWO)
    scene.says(stager, Postponed(TWO.digest, "disk", "it failed"))
    scene.leaves(stager)
    (tmp_path / "state" / "chunks" / ("c" * 64)).write_bytes(b"superseded")
    before = len(scene.stagers)
    scene.deployer.metadata_arrived(b"newer")
    while len(scene.stagers) == before:
        scene.tick(10.0)
        assert scene.now < 3600.0, "it waits for ever"
    assert scene.files("chunks") == set()


def test_two_slots_may_have_the_same_model_described_in_two_ways(tmp_path: Path) -> None:
    scene = Scene(tmp_path, slots=("combat", "movement"))
    same = msgspec.structs.replace(ONE, slot="movement", version=5, notes="the same")
    stager = scene.verifies(ONE, same)
    scene.stages(stager, 1)
    scene.tick()
    served = {played.what.slot: played.what.model for played in scene.workers if played.what.model}
    assert {slot: file.version for slot, file in served.items()} == {"combat": 1, "movement": 5}


def test_a_state_that_went_back_because_its_newer_copy_rotted_is_not_believed_against_the_trail(scene: Scene) -> None:
    scene.commits(1, 2)
    scene.verifies(ONE, TWO, wishes=(Withdrawal(slot="combat", version=2),))
    assert scene.serves() == 1
    copies = sorted((scene.folder / "state" / "state").glob("slot-combat.*"), key=lambda path: path.read_bytes()[32:40])
    copies[-1].write_bytes(b"?" * len(copies[-1].read_bytes()))
    scene.start()
    assert scene.serves() == 1, "version 2 was withdrawn"
    assert scene.events[-1].kind == "state_recovered"


def test_a_state_whose_last_write_was_cut_short_is_believed_where_the_trail_says_nothing_else(scene: Scene) -> None:
    scene.commits(1, 2)
    copies = sorted((scene.folder / "state" / "state").glob("slot-combat.*"), key=lambda path: path.read_bytes()[32:40])
    copies[0].write_bytes(b"?" * len(copies[0].read_bytes()))
    before = len(scene.events)
    scene.start()
    assert scene.serves() == 2
    assert scene.events[before:] == []


def test_other_bytes_under_the_active_version_do_not_stop_it(scene: Scene) -> None:
    scene.commits(1)
    other = msgspec.structs.replace(ONE, digest="9" * 64)
    scene.verifies(other)
    scene.tick()
    assert scene.workers[-1].what.model.digest == ONE.digest
    scene.start()
    assert scene.serves() == 1


def test_a_pin_of_a_model_that_was_found_not_to_work_is_said_once(scene: Scene) -> None:
    scene.commits(1)
    stager = scene.verifies(ONE, TWO)
    scene.says(stager, Refused(TWO.digest, "wrong_signature", "shapes differ"))
    for _ in range(2):
        scene.leaves(scene.stagers[-1])
        scene.verifies(ONE, TWO, wishes=(pinned(2),))
    assert [event.kind for event in scene.events].count("pin_refused") == 1
    assert scene.serves() == 1


def test_a_long_note_fits_the_state(scene: Scene) -> None:
    scene.commits(1)
    scene.verifies(ONE, TWO, wishes=(pinned(2, note="é" * 256),))
    assert isinstance(scene.state, deployment.Staging)
    scene.start()
    assert isinstance(scene.state, deployment.Staging)
