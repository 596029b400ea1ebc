"""Updates, with stagers whose other end is played by the test."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_agent import updates as module
from edge_agent.channel import Channel
from edge_agent.children import Child
from edge_agent.staging import (
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Progress,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
    ToStager,
)
from edge_agent.updates import FIRST_RETRY_S, LAST_RETRY_S, STALL_LIMIT_S, Updates
from protocol.link import Broker

A, B = "a" * 64, "b" * 64
VERIFIED = MetadataVerified(3, ())


@dataclass
class Process:
    """What `Child` needs of a process."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            self.returncode = -9

    def wait(self, _timeout_s: float) -> int:
        assert self.returncode is not None
        return self.returncode


@dataclass
class Scene:
    """Updates, a clock, the stagers that were started and what was told."""

    folder: Path
    now: float = 100.0
    stagers: list[tuple[Child[FromStager], Channel[ToStager], Process]] = field(default_factory=list)
    told: list[tuple[Any, ...]] = field(default_factory=list)
    wants: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file = self.folder / "metadata.set"
        settings = StagerSettings(
            device="pi7",
            folder="",
            trust_folder="",
            root_file="",
            metadata_file=str(self.file),
            built_at=0.0,
            broker=Broker(),
        )
        self.updates = Updates(
            settings,
            self.file,
            on_verified=self._verified,
            on_metadata_refused=lambda *told: self.told.append(("metadata_refused", *told)),
            on_staged=lambda *told: self.told.append(("staged", *told)),
            on_refused=lambda *told: self.told.append(("refused", *told)),
            on_postponed=lambda *told: self.told.append(("postponed", *told)),
            on_stager_died=lambda *told: self.told.append(("died", *told)),
        )

    def _verified(self, version: int, _releases: object) -> None:
        self.told.append(("verified", version))
        for digest in self.wants:
            self.updates.stage(digest)

    def start(self, module: str, assignment: object, answers: Any, name: str) -> Child[Any]:
        assert (module, assignment) == ("stager", self.updates._settings)
        ours, theirs = socket.socketpair()
        process: Any = Process(pid=len(self.stagers))
        child: Child[FromStager] = Child(process, Channel(ours, answers), name)
        self.stagers.append((child, Channel(theirs, ToStager), process))
        return child

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.updates.tick(self.now)

    def says(self, *messages: FromStager) -> None:
        child, end, _ = self.stagers[-1]
        for message in messages:
            assert end.send(message)
        self.updates.receive(child, self.now)

    def asked(self) -> list[ToStager]:
        return self.stagers[-1][1].receive()

    def ends(self, code: int = 0) -> None:
        child, end, process = self.stagers[-1]
        process.returncode = code
        end.close()
        self.updates.receive(child, self.now)

    def arrived(self, *wants: str) -> None:
        """A metadata set has come, and a stager looks at it."""
        self.wants = list(wants)
        self.updates.metadata_arrived(b"set")
        self.tick()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene(tmp_path)
    monkeypatch.setattr(module, "start", scene.start)
    return scene


def test_a_metadata_set_is_kept_as_it_came_and_verified_by_a_stager_which_then_goes(scene: Scene) -> None:
    scene.tick()
    assert scene.stagers == []
    scene.arrived()
    assert scene.file.read_bytes() == b"set"
    assert scene.updates.child is scene.stagers[0][0]
    scene.says(VERIFIED)
    assert scene.asked() == [Quit()]
    scene.ends()
    assert scene.updates.child is None
    assert scene.updates.metadata_version == 3
    assert scene.told == [("verified", 3)]
    scene.tick(LAST_RETRY_S * 2)
    assert len(scene.stagers) == 1


def test_the_same_set_again_is_not_looked_at_again_a_new_one_is_once_the_stager_has_gone(scene: Scene) -> None:
    scene.arrived()
    scene.updates.metadata_arrived(b"set")
    scene.says(VERIFIED)
    scene.updates.metadata_arrived(b"newer")
    scene.tick()
    assert len(scene.stagers) == 1
    scene.ends()
    scene.tick()
    assert len(scene.stagers) == 2
    assert scene.file.read_bytes() == b"newer"


def test_wanted_models_are_staged_one_after_the_other_by_the_same_stager(scene: Scene) -> None:
    scene.arrived(A, B)
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]
    scene.says(Progress(A, 3, 4))
    assert scene.updates.progress == {A: 0.75}
    scene.says(Staged(A))
    assert scene.updates.progress == {}
    assert scene.asked() == [StageModel(B)]
    scene.says(Refused(B, "wrong_signature", "text"))
    assert scene.asked() == [Quit()]
    assert scene.told[1:] == [("staged", A), ("refused", B, "wrong_signature", "text")]


def test_after_a_restart_what_was_being_staged_goes_on_from_the_kept_set(scene: Scene) -> None:
    scene.file.write_bytes(b"kept")
    scene.updates.look_again()
    scene.updates.stage(A)
    scene.tick()
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]


def test_without_a_kept_set_there_is_nothing_to_look_at(scene: Scene) -> None:
    scene.updates.look_again()
    scene.updates.stage(A)
    scene.tick()
    assert scene.stagers == []


def test_a_postponed_model_is_looked_at_again_after_a_growing_pause_until_a_new_set_comes(scene: Scene) -> None:
    pauses = []
    scene.arrived(A)
    for attempt in range(1, 10):
        scene.says(VERIFIED, Postponed(A, "no_answer", "text"))
        scene.ends()
        began = scene.now
        while len(scene.stagers) == attempt:
            scene.tick(1.0)
        pauses.append(scene.now - began)
    for pause, expected in zip(pauses, [min(FIRST_RETRY_S * 2**n, LAST_RETRY_S) for n in range(9)], strict=True):
        assert 0.75 * expected - 1 <= pause <= 1.25 * expected + 1
    assert scene.told.count(("postponed", A, "no_answer", "text")) == 9
    scene.updates.metadata_arrived(b"newer")
    scene.says(VERIFIED, Postponed(A, "no_answer", "text"))
    scene.ends()
    scene.tick()  # for the newer set
    scene.says(VERIFIED, Postponed(A, "no_answer", "text"))
    scene.ends()
    scene.tick(1.25 * FIRST_RETRY_S * 2 + 1)
    assert len(scene.stagers) == 12


def test_a_stager_that_dies_of_a_model_is_told_with_its_digest(scene: Scene) -> None:
    scene.arrived(A)
    scene.says(VERIFIED, Progress(A, 1, 2))
    scene.ends(-11)
    assert scene.told[-1] == ("died", A, "killed by SIGSEGV")
    assert scene.updates.progress == {}
    scene.updates.stage(A)  # the machine gives it one more chance
    scene.tick()
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]


def test_a_stager_that_gives_no_sign_is_killed(scene: Scene) -> None:
    scene.arrived(A)
    scene.says(VERIFIED)
    scene.tick(STALL_LIMIT_S - 1)
    assert len(scene.told) == 1
    scene.tick(2.0)
    assert scene.told[-1] == ("died", A, "killed by SIGKILL")
    assert scene.updates.child is None


@pytest.mark.parametrize("hangs", [False, True])
def test_a_stager_that_ends_before_it_has_looked_is_tried_again_later_not_at_once(scene: Scene, hangs: bool) -> None:
    scene.arrived()
    if hangs:
        scene.tick(STALL_LIMIT_S + 1)
    else:
        scene.ends(1)
    assert scene.updates.child is None
    scene.tick()
    assert len(scene.stagers) == 1
    scene.tick(1.25 * FIRST_RETRY_S)
    assert len(scene.stagers) == 2
    assert scene.told == []


def test_a_refused_set_is_told_once_and_not_looked_at_again(scene: Scene) -> None:
    scene.arrived()
    scene.says(MetadataRefused("expired", "text"))
    scene.ends()
    scene.tick(LAST_RETRY_S * 2)
    assert scene.told == [("metadata_refused", "expired", "text")]
    assert len(scene.stagers) == 1


def test_a_set_that_could_not_be_verified_for_want_of_disk_is_looked_at_again(scene: Scene) -> None:
    scene.arrived()
    scene.says(MetadataRefused("unavailable", "no space"))
    scene.ends()
    scene.tick(1.25 * FIRST_RETRY_S)
    assert len(scene.stagers) == 2


def test_a_refused_set_while_a_model_is_wanted_does_not_start_stagers_without_pause(scene: Scene) -> None:
    scene.file.write_bytes(b"expired meanwhile")
    scene.updates.stage(A)
    for _ in range(600):
        scene.tick()
        if scene.updates.child is not None:
            scene.says(MetadataRefused("expired", "text"))
            scene.ends()
    assert len(scene.stagers) == 2  # in a minute


def test_cancelling_what_is_being_staged_ends_the_stager_and_the_rest_is_staged_by_another(scene: Scene) -> None:
    scene.arrived(A, B)
    scene.says(VERIFIED, Progress(A, 1, 2))
    scene.updates.cancel(A)
    assert scene.updates.child is None
    assert scene.updates.progress == {}
    assert scene.stagers[0][2].returncode == -9
    scene.wants = [B]
    scene.tick()
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(B)]
    assert scene.told == [("verified", 3), ("verified", 3)]


def test_cancelling_what_only_waits_leaves_the_stager_alone(scene: Scene) -> None:
    scene.arrived(A, B)
    scene.says(VERIFIED)
    scene.updates.cancel(B)
    scene.updates.cancel("c" * 64)
    scene.says(Staged(A))
    assert scene.asked() == [StageModel(A), Quit()]


def test_what_is_wanted_while_a_stager_is_going_is_not_given_to_it(scene: Scene) -> None:
    scene.arrived()
    scene.says(VERIFIED)
    scene.updates.stage(A)
    assert scene.asked() == [Quit()]
    scene.ends()
    assert not any(told[0] == "died" for told in scene.told)
    scene.tick(1.25 * FIRST_RETRY_S)
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]


def test_a_set_that_cannot_be_written_is_taken_when_it_comes_again(scene: Scene) -> None:
    scene.file.mkdir()
    scene.updates.metadata_arrived(b"set")
    scene.file.rmdir()
    scene.tick()
    assert scene.stagers == []
    scene.arrived()
    assert len(scene.stagers) == 1


def test_stopping_ends_the_stager_and_starts_no_other(scene: Scene) -> None:
    scene.updates.stop()
    scene.tick()
    assert scene.stagers == []
    scene.updates._stopped = False
    scene.arrived(A)
    scene.says(VERIFIED)
    scene.updates.stop()
    assert scene.updates.child is None
    assert scene.stagers[0][2].returncode == -9
    scene.updates.metadata_arrived(b"newer")
    scene.tick(LAST_RETRY_S * 2)
    assert len(scene.stagers) == 1
