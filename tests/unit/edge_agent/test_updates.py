"""Updates, with stagers whose other end is played by the test."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_agent.channel import Channel
from edge_agent.children import Child
from edge_agent.inbox import Installation
from edge_agent.staging import (
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Progress,
    Qualifying,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
    ToStager,
)
from edge_agent.updates import (
    FIRST_RESUME_S,
    FIRST_RETRY_S,
    LAST_REFUSAL_PAUSE_S,
    LAST_RETRY_S,
    STALL_LIMIT_S,
    UNDISTURBED_S,
    Updates,
)
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.durable import OsDisk
from protocol.errors import Unavailable
from protocol.link import Broker
from tests.unit.edge_agent.played import Process

A, B = "a" * 64, "b" * 64
VERIFIED = MetadataVerified(3)


class FailingDisk(OsDisk):
    """Full while `full`, and worse while `failing`."""

    full = False
    failing = False

    def write(self, path: Path, pieces: Iterable[bytes], *, sync: bool) -> None:
        if self.failing or self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(path, pieces, sync=sync)

    def rename(self, path: Path, target: Path) -> None:
        if self.failing:
            raise OSError(errno.EIO, "Input/output error")
        super().rename(path, target)

    def remove(self, path: Path) -> None:
        if self.failing:
            raise OSError(errno.EROFS, "Read-only file system")
        super().remove(path)


@dataclass
class Scene:
    """Updates, a clock, the stagers that were started and what was told."""

    folder: Path
    now: float = 100.0
    stagers: list[tuple[Child[FromStager], Channel[ToStager], Process]] = field(default_factory=list)
    told: list[tuple[Any, ...]] = field(default_factory=list)
    wants: list[str] = field(default_factory=list)
    assigned: list[StagerSettings] = field(default_factory=list)
    no_process: bool = False
    disk: FailingDisk = field(default_factory=FailingDisk)

    def __post_init__(self) -> None:
        self.file = self.folder / "metadata.set"
        self.new = self.folder / "metadata.new"
        settings = StagerSettings(
            device="pi7",
            folder="",
            trust_folder="",
            root_file="",
            metadata_file="",
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
            start=self.start,
            rng=random.Random(7),
            disk=self.disk,
        )

    def _verified(self, message: MetadataVerified) -> None:
        self.told.append(("verified", message.version))
        for digest in self.wants:
            self.updates.stage(digest)

    def start(self, settings: StagerSettings) -> Child[FromStager]:
        if self.no_process:
            raise Unavailable("no process to be had")
        self.assigned.append(settings)
        ours, theirs = socket.socketpair()
        process: Any = Process(pid=len(self.stagers))
        child: Child[FromStager] = Child(process, Channel(ours, FromStager), "stager")
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

    def arrived(self, *wants: str, payload: bytes = b"set") -> None:
        """A metadata set has come, and a stager looks at it."""
        self.wants = list(wants)
        self.updates.metadata_arrived(payload)
        self.tick()

    def looked_at(self) -> tuple[str, bytes]:
        """Name and content of the set that the newest stager is to verify."""
        path = Path(self.assigned[-1].metadata_file)
        return path.name, path.read_bytes()

    def passes(self, seconds: float, step: float = 1.0) -> None:
        """Time goes by."""
        for _ in range(round(seconds / step)):
            self.tick(step)

    def retried(self) -> None:
        """The pause is over, and another stager has verified the set."""
        before = len(self.stagers)
        while len(self.stagers) == before:
            self.tick(60.0)
        self.says(VERIFIED)

    def accepted(self, *wants: str) -> None:
        """A set is accepted, a model wanted, and the stager fetches it."""
        self.arrived(*wants)
        self.says(VERIFIED)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_metadata_set_is_kept_as_it_came_and_verified_by_a_stager_which_then_goes(scene: Scene) -> None:
    scene.tick()
    assert scene.stagers == []
    scene.arrived()
    assert scene.looked_at() == ("metadata.new", b"set")
    assert not scene.file.exists()
    assert scene.updates.child is scene.stagers[0][0]
    scene.says(VERIFIED)
    assert scene.file.read_bytes() == b"set"
    assert not scene.new.exists()
    assert scene.asked() == [Quit()]
    scene.ends()
    assert scene.updates.child is None
    assert not scene.updates.busy
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
    assert scene.file.read_bytes() == b"set"
    scene.ends()
    scene.tick()
    assert len(scene.stagers) == 2
    assert scene.looked_at() == ("metadata.new", b"newer")


def test_a_set_that_is_refused_leaves_the_accepted_one_where_it_was(scene: Scene) -> None:
    scene.accepted()
    scene.ends()
    scene.arrived(payload=b"forged")
    assert scene.looked_at() == ("metadata.new", b"forged")
    scene.says(MetadataRefused("bad_signature", "text"))
    scene.ends()
    assert scene.file.read_bytes() == b"set"
    assert not scene.new.exists()
    scene.passes(LAST_RETRY_S)
    assert len(scene.stagers) == 2
    assert not scene.updates.busy


def test_newer_metadata_ends_a_stager_that_has_had_its_time_and_the_next_goes_on_with_the_model(scene: Scene) -> None:
    scene.accepted(A)
    assert scene.asked() == [StageModel(A)]
    scene.updates.metadata_arrived(b"newer")
    scene.tick(UNDISTURBED_S - 1)
    assert scene.asked() == []
    scene.tick(2)
    scene.tick()
    assert scene.asked() == [Quit()]
    scene.ends()
    scene.tick()
    assert scene.looked_at() == ("metadata.new", b"newer")
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]
    assert not any(told[0] == "died" for told in scene.told)


def test_what_a_dismissed_stager_still_says_counts(scene: Scene) -> None:
    scene.accepted(A)
    scene.updates.metadata_arrived(b"newer")
    scene.tick(UNDISTURBED_S)
    scene.says(Staged(A))
    assert scene.told[-1] == ("staged", A)
    assert scene.asked() == [StageModel(A), Quit()]
    scene.ends()
    scene.tick()
    scene.wants = []
    scene.says(VERIFIED)
    assert scene.asked() == [Quit()]


def test_a_forged_set_amid_a_transfer_costs_a_look_and_the_transfer_goes_on_by_the_accepted_one(scene: Scene) -> None:
    scene.accepted(A)
    scene.updates.metadata_arrived(b"forged")
    scene.tick(UNDISTURBED_S)
    scene.ends()
    scene.tick()
    scene.says(MetadataRefused("bad_signature", "text"))
    scene.ends()
    scene.passes(2.0, 0.1)
    assert scene.looked_at() == ("metadata.set", b"set")
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]


def test_a_flood_of_forged_sets_starts_a_stager_now_and_then(scene: Scene) -> None:
    scene.accepted()
    scene.ends()
    for number in range(36_000):
        scene.updates.metadata_arrived(b"forged %d" % number)
        scene.tick(0.1)
        if scene.updates.child is not None:
            scene.says(MetadataRefused("bad_signature", "text"))
            scene.ends()
    assert len(scene.stagers) < 8 + 3600 / (0.75 * LAST_REFUSAL_PAUSE_S)
    assert scene.file.read_bytes() == b"set"


def test_after_a_restart_a_set_that_was_not_looked_at_comes_first_and_the_accepted_one_if_it_is_refused(
    scene: Scene,
) -> None:
    scene.file.write_bytes(b"accepted")
    scene.new.write_bytes(b"pending")
    scene.updates.look_again()
    scene.tick()
    assert scene.looked_at() == ("metadata.new", b"pending")
    scene.says(MetadataRefused("rolled_back", "text"))
    scene.ends()
    scene.passes(2.0, 0.1)
    assert scene.looked_at() == ("metadata.set", b"accepted")
    scene.says(VERIFIED)
    scene.ends()
    assert scene.told == [("metadata_refused", "rolled_back", "text"), ("verified", 3)]
    assert not scene.updates.busy


def test_after_a_restart_the_retained_set_is_not_verified_twice(scene: Scene) -> None:
    scene.file.write_bytes(b"kept")
    scene.updates.look_again()
    scene.tick()
    scene.updates.metadata_arrived(b"kept")
    scene.says(VERIFIED)
    scene.ends()
    scene.passes(LAST_RETRY_S)
    assert len(scene.stagers) == 1


def test_a_bundle_is_looked_at_by_a_stager_of_its_own_and_its_set_is_kept(scene: Scene) -> None:
    bundle = scene.folder / "models.bundle"
    scene.updates.install(Installation(bundle, ["combat"]))
    scene.wants = [A]
    scene.tick()
    assert scene.assigned[-1].bundle == str(bundle)
    Path(scene.assigned[-1].metadata_file).write_bytes(b"from the bundle")  # as the stager does
    scene.says(VERIFIED)
    assert scene.file.read_bytes() == b"from the bundle"
    assert scene.asked() == [StageModel(A)]
    assert scene.updates.installed() is None
    scene.says(Staged(A))
    scene.ends()
    done = scene.updates.installed()
    assert done is not None
    assert (done.path, done.outcome(1.0).accepted, scene.updates.installed()) == (bundle, True, None)
    scene.arrived()
    assert scene.assigned[-1].bundle is None


def test_a_set_that_waits_for_the_disk_is_not_lost_for_a_bundle(scene: Scene) -> None:
    scene.arrived(payload=b"newer")
    scene.says(MetadataRefused("unavailable", "the disk"))
    scene.ends()
    scene.updates.install(Installation(scene.folder / "models.bundle", ["combat"]))
    scene.tick()
    file = Path(scene.assigned[-1].metadata_file)
    file.write_bytes(b"from the bundle")  # as the stager does
    scene.says(VERIFIED)
    scene.ends()
    assert scene.file.read_bytes() == b"from the bundle"
    scene.tick()
    assert scene.looked_at() == ("metadata.new", b"newer")
    scene.says(VERIFIED)
    assert scene.file.read_bytes() == b"newer"
    assert not file.exists()


def test_a_set_that_a_bundle_interrupted_is_looked_at_after_it(scene: Scene) -> None:
    scene.accepted()
    scene.ends()
    scene.arrived(payload=b"newer")
    scene.updates.install(Installation(scene.folder / "models.bundle", ["combat"]))
    scene.tick(UNDISTURBED_S)
    scene.ends()
    scene.tick()
    assert scene.assigned[-1].bundle is not None
    scene.says(MetadataRefused("bad_bundle", "text"))
    scene.ends()
    scene.passes(2.0, 0.1)
    assert scene.looked_at() == ("metadata.new", b"newer")


def test_after_a_restart_the_set_of_a_bundle_that_was_verified_goes_before_the_one_it_replaces(scene: Scene) -> None:
    """The trust store goes by the bundle's set already, so the one before would be rolled back."""
    scene.file.write_bytes(b"before")
    bundled = scene.folder / "metadata.bundle"
    bundled.write_bytes(b"from the bundle")
    scene.updates.look_again()
    scene.tick()
    assert (scene.looked_at(), scene.assigned[-1].bundle) == (("metadata.bundle", b"from the bundle"), None)
    scene.says(MetadataRefused("expired", "the clock is ahead"))
    scene.ends()
    assert bundled.exists()
    scene.passes(1.25 * FIRST_RETRY_S)
    assert len(scene.stagers) == 2
    scene.says(VERIFIED)
    assert scene.file.read_bytes() == b"from the bundle"
    assert not bundled.exists()


def test_a_bundles_set_that_rotted_makes_way_for_the_accepted_one(scene: Scene) -> None:
    scene.file.write_bytes(b"before")
    (scene.folder / "metadata.bundle").write_bytes(b"rotten")
    scene.updates.look_again()
    scene.tick()
    scene.says(MetadataRefused("malformed", "text"))
    scene.ends()
    scene.passes(2.0, 0.1)
    assert scene.looked_at() == ("metadata.set", b"before")
    assert not (scene.folder / "metadata.bundle").exists()


def test_a_bundle_whose_stager_dies_is_done_with_and_says_so(scene: Scene) -> None:
    scene.updates.install(Installation(scene.folder / "models.bundle", ["combat"]))
    scene.wants = [A]
    scene.tick()
    scene.says(VERIFIED)
    scene.ends(-9)
    done = scene.updates.installed()
    assert done is not None
    assert done._endings[A][1] == "stager_died"


def test_a_bundle_that_is_refused_is_looked_at_once(scene: Scene) -> None:
    scene.accepted()
    scene.ends()
    scene.updates.install(Installation(scene.folder / "models.bundle", ["combat"]))
    scene.tick()
    scene.says(MetadataRefused("bad_bundle", "text"))
    scene.ends()
    scene.passes(LAST_RETRY_S)
    assert len(scene.stagers) == 2
    assert scene.told[-1] == ("metadata_refused", "bad_bundle", "text")


def test_wanted_models_are_staged_one_after_the_other_by_the_same_stager(scene: Scene) -> None:
    scene.arrived(A, B)
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]
    scene.says(Progress(A, 3, 4, 2.0))
    assert scene.updates.progress == {A: Progress(A, 3, 4, 2.0)}
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


def test_a_postponed_model_is_tried_again_after_a_growing_pause(scene: Scene) -> None:
    pauses = []
    scene.arrived(A)
    for attempt in range(1, 10):
        scene.says(VERIFIED, Postponed(A, "disk", "text"))
        scene.ends()
        began = scene.now
        while len(scene.stagers) == attempt:
            scene.tick(1.0)
        pauses.append(scene.now - began)
    for pause, expected in zip(pauses, [min(FIRST_RETRY_S * 2**n, LAST_RETRY_S) for n in range(9)], strict=True):
        assert 0.75 * expected - 1 <= pause <= 1.25 * expected + 1
    assert scene.told.count(("postponed", A, "disk", "text")) == 9


def test_new_metadata_has_a_postponed_model_tried_at_once_and_the_pauses_start_anew(scene: Scene) -> None:
    scene.accepted(A)
    for _ in range(5):
        scene.says(Postponed(A, "no_answer", "text"))
        scene.ends()
        scene.retried()
    scene.says(Postponed(A, "no_answer", "text"))
    scene.ends()
    scene.arrived(A, payload=b"newer")
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]
    before = len(scene.stagers)
    scene.says(Postponed(A, "no_answer", "text"))
    scene.ends()
    scene.passes(1.25 * FIRST_RETRY_S + 1)
    assert len(scene.stagers) == before + 1


def test_a_host_that_is_away_for_a_week_is_told_once_and_the_progress_says_what_is_waited_for(scene: Scene) -> None:
    scene.accepted(A)
    attempts = 0
    while scene.now < 7 * 86_400:
        scene.says(Progress(A, 5, 9, 3.0), Postponed(A, "no_answer", "asked in vain"))
        scene.ends()
        attempts += 1
        scene.retried()
    assert 150 < attempts < 240
    assert [told for told in scene.told if told[0] == "postponed"] == [("postponed", A, "no_answer", "asked in vain")]
    assert scene.updates.busy
    scene.says(Postponed(A, "no_answer", "asked in vain"))
    assert scene.updates.progress == {A: Progress(A, 5, 9, 0.0, "no_answer: asked in vain")}
    scene.ends()
    scene.retried()
    scene.says(Postponed(A, "no_broker", "no connection"))
    assert scene.told[-1] == ("postponed", A, "no_broker", "no connection")


def test_what_waits_for_the_host_is_not_asked_for_with_what_is_wanted_meanwhile(scene: Scene) -> None:
    scene.accepted(A)
    for _ in range(2):
        scene.says(Postponed(A, "no_answer", "text"))
        scene.ends()
        scene.retried()
    scene.says(Postponed(A, "no_answer", "text"))
    scene.ends()
    scene.wants = []
    scene.updates.stage(B)
    scene.tick()
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(B)]
    scene.says(Staged(B))
    assert scene.asked() == [Quit()]
    scene.ends()
    assert scene.updates.progress[A].waiting


def test_metadata_that_comes_again_has_a_postponed_model_tried_soon(scene: Scene) -> None:
    scene.accepted(A)
    for _ in range(8):
        scene.says(Postponed(A, "no_answer", "text"))
        scene.ends()
        scene.retried()
    scene.says(Postponed(A, "no_answer", "text"))
    scene.ends()
    before = len(scene.stagers)
    scene.updates.metadata_arrived(b"set")
    scene.tick()
    assert len(scene.stagers) == before
    scene.passes(FIRST_RETRY_S + 1)
    assert len(scene.stagers) == before + 1


def test_a_stager_that_dies_of_a_model_is_told_with_its_digest(scene: Scene) -> None:
    scene.arrived(A)
    scene.says(VERIFIED, Progress(A, 1, 2), Qualifying(A))
    scene.ends(-11)
    assert scene.told[-1] == ("died", A, "killed by SIGSEGV")
    assert scene.updates.progress == {}
    scene.updates.stage(A)  # the machine gives it one more chance
    scene.tick()
    scene.says(VERIFIED)
    assert scene.asked() == [StageModel(A)]


def test_a_model_that_takes_too_long_to_qualify_is_told_as_that(scene: Scene) -> None:
    scene.arrived(A)
    scene.says(VERIFIED, Qualifying(A))
    scene.ends(-14)
    assert scene.told[-1] == ("died", A, "it took longer than 120 s")


def test_a_stager_that_dies_while_it_fetches_goes_on_soon_and_no_model_is_to_blame(scene: Scene) -> None:
    scene.arrived(A)
    for stagers in range(2, 5):
        scene.says(VERIFIED)
        assert scene.asked() == [StageModel(A)]
        scene.ends(-9)
        scene.tick(0.7 * FIRST_RESUME_S * 2 ** (stagers - 2))
        assert len(scene.stagers) == stagers - 1, "each pause is twice as long"
        scene.tick(0.6 * FIRST_RESUME_S * 2 ** (stagers - 2))
        assert len(scene.stagers) == stagers
    assert [told[0] for told in scene.told] == ["verified"] * 3


def test_a_stager_that_gives_no_sign_is_killed(scene: Scene) -> None:
    scene.arrived(A)
    scene.says(VERIFIED, Qualifying(A))
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
    scene.says(MetadataRefused("mixed", "text"))
    scene.ends()
    scene.tick(LAST_RETRY_S * 2)
    assert scene.told == [("metadata_refused", "mixed", "text")]
    assert len(scene.stagers) == 1


@pytest.mark.parametrize("reason", ["expired", "misconfigured"])
def test_a_set_that_is_refused_for_what_may_pass_is_looked_at_again_after_a_growing_pause(
    scene: Scene, reason: str
) -> None:
    """A clock that is ten years ahead until NTP comes: a retained set comes no second time by itself."""
    scene.arrived()
    pauses = []
    for looks in range(1, 10):
        assert scene.looked_at() == ("metadata.new", b"set")
        scene.says(MetadataRefused(reason, "text"))
        scene.ends()
        assert not scene.new.exists()
        assert not scene.updates.busy or scene.updates._has_work
        began = scene.now
        while len(scene.stagers) == looks:
            scene.tick(1.0)
        pauses.append(scene.now - began)
    for pause, expected in zip(pauses, [min(FIRST_RETRY_S * 2**n, LAST_RETRY_S) for n in range(9)], strict=True):
        assert 0.75 * expected - 1 <= pause <= 1.25 * expected + 1
    assert scene.told == [("metadata_refused", reason, "text")]
    scene.says(VERIFIED)
    scene.ends()
    assert scene.file.read_bytes() == b"set"
    scene.passes(2 * LAST_RETRY_S, 60.0)
    assert len(scene.stagers) == 10


def test_a_doubted_set_that_comes_again_is_looked_at_soon(scene: Scene) -> None:
    scene.arrived()
    for looks in range(1, 9):
        scene.says(MetadataRefused("expired", "text"))
        scene.ends()
        while len(scene.stagers) == looks:
            scene.tick(60.0)
    scene.says(MetadataRefused("expired", "text"))
    scene.ends()
    scene.updates.metadata_arrived(b"set")
    scene.passes(1.25 * LAST_REFUSAL_PAUSE_S + 1)
    assert len(scene.stagers) == 10


def test_a_doubted_set_outlives_what_is_refused_and_what_is_accepted_from_before_but_not_a_newer_one(
    scene: Scene,
) -> None:
    scene.file.write_bytes(b"before")
    scene.arrived(payload=b"doubted")
    scene.says(MetadataRefused("expired", "text"))
    scene.ends()
    scene.passes(2.0, 0.1)
    assert scene.looked_at() == ("metadata.set", b"before")
    scene.says(VERIFIED)  # the clock has just been put right
    scene.ends()
    scene.arrived(payload=b"forged")
    scene.says(MetadataRefused("bad_signature", "text"))
    scene.ends()
    scene.passes(1.25 * FIRST_RETRY_S)
    assert scene.looked_at() == ("metadata.new", b"doubted")
    scene.says(MetadataRefused("expired", "text"))
    scene.ends()
    scene.passes(3.0)
    scene.arrived(payload=b"newer")
    scene.says(VERIFIED)
    scene.ends()
    before = len(scene.stagers)
    scene.passes(2 * LAST_RETRY_S, 60.0)
    assert len(scene.stagers) == before
    assert scene.file.read_bytes() == b"newer"


def test_a_doubted_set_that_is_found_to_be_bad_is_told_and_forgotten(scene: Scene) -> None:
    scene.arrived()
    for reason in ("expired", "rolled_back"):
        scene.says(MetadataRefused(reason, "text"))
        scene.ends()
        scene.passes(2 * FIRST_RETRY_S)
    scene.passes(2 * LAST_RETRY_S, 60.0)
    assert len(scene.stagers) == 2
    assert scene.told == [("metadata_refused", "expired", "text"), ("metadata_refused", "rolled_back", "text")]


def test_the_accepted_set_that_looks_expired_at_the_start_is_looked_at_until_it_is_accepted(scene: Scene) -> None:
    scene.file.write_bytes(b"kept")
    scene.updates.look_again()
    scene.tick()
    for _ in range(3):
        scene.says(MetadataRefused("expired", "text"))
        scene.ends()
        assert not scene.updates.busy
        before = len(scene.stagers)
        while len(scene.stagers) == before:
            scene.tick(1.0)
    assert scene.looked_at() == ("metadata.set", b"kept")
    scene.says(VERIFIED)
    scene.ends()
    assert scene.told == [("metadata_refused", "expired", "text"), ("verified", 3)]
    scene.passes(2 * LAST_RETRY_S, 60.0)
    assert len(scene.stagers) == 4


def test_a_set_that_could_not_be_verified_for_want_of_disk_is_looked_at_again(scene: Scene) -> None:
    scene.arrived()
    scene.says(MetadataRefused("unavailable", "no space"))
    scene.ends()
    scene.tick(1.25 * FIRST_RETRY_S)
    assert len(scene.stagers) == 2


def test_an_accepted_set_that_expired_is_told_once_and_starts_no_stagers_without_pause(scene: Scene) -> None:
    scene.file.write_bytes(b"expired meanwhile")
    scene.updates.stage(A)
    for _ in range(600):
        scene.tick()
        if scene.updates.child is not None:
            scene.says(MetadataRefused("expired", "text"))
            scene.ends()
    assert len(scene.stagers) == 2  # in a minute
    assert scene.told == [("metadata_refused", "expired", "text")]


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


def test_a_set_that_cannot_be_written_is_looked_at_once_there_is_room(scene: Scene) -> None:
    scene.disk.failing = True
    scene.arrived()
    scene.passes(20.0, 0.1)
    assert scene.stagers == []
    scene.disk.failing = False
    scene.passes(1.25 * FIRST_RETRY_S)
    assert scene.looked_at() == ("metadata.new", b"set")


def test_while_the_disk_is_full_and_no_stager_runs_there_is_time_to_make_room(scene: Scene) -> None:
    scene.disk.full = True
    scene.arrived()
    assert not scene.updates.busy
    scene.disk.full = False
    scene.passes(1.25 * FIRST_RETRY_S)
    assert scene.updates.busy
    scene.says(MetadataRefused("no_space", "full"))
    scene.ends()
    assert not scene.updates.busy
    scene.passes(2.5 * FIRST_RETRY_S)
    assert scene.updates.busy
    scene.says(MetadataRefused("unavailable", "the disk failed"))
    scene.ends()
    assert scene.updates.busy


def test_a_set_that_cannot_be_put_in_its_place_counts_and_is_verified_anew_later(scene: Scene) -> None:
    scene.arrived()
    scene.disk.failing = True
    scene.says(VERIFIED)
    assert scene.told == [("verified", 3)]
    assert scene.new.read_bytes() == b"set"


def test_a_refused_set_that_cannot_be_removed_is_looked_at_again_only_after_a_restart(scene: Scene) -> None:
    scene.arrived()
    scene.disk.failing = True
    scene.says(MetadataRefused("mixed", "text"))
    scene.ends()
    assert scene.told == [("metadata_refused", "mixed", "text")]


def test_without_a_process_to_be_had_all_stays_to_be_done(scene: Scene) -> None:
    scene.no_process = True
    scene.arrived()
    scene.passes(20.0, 0.1)
    assert scene.updates.busy
    scene.no_process = False
    scene.passes(1.25 * FIRST_RETRY_S)
    assert scene.looked_at() == ("metadata.new", b"set")


@pytest.mark.parametrize(("payload", "reason"), [(b"", "malformed"), (b"x" * (129 * 1024), "too_long")])
def test_a_set_that_cannot_be_one_is_refused_unread(scene: Scene, payload: bytes, reason: str) -> None:
    scene.arrived(payload=payload)
    assert [told[:2] for told in scene.told] == [("metadata_refused", reason)]
    assert scene.stagers == []


def test_a_flood_of_sets_that_cannot_be_ones_is_told_now_and_then_and_keeps_none_waiting(scene: Scene) -> None:
    long = b"x" * (MAX_PAYLOAD_BYTES + 1)
    for number in range(36_000):
        scene.updates.metadata_arrived(b"good %d" % (number // 6_000))
        scene.updates.metadata_arrived(long if number % 2 else b"")
        scene.tick(0.1)
        if scene.updates.child is not None:
            scene.says(MetadataVerified(1 + number // 6_000))
            scene.ends()
    refused = [told for told in scene.told if told[0] == "metadata_refused"]
    assert 10 < len(refused) < 6 * 8 + 3600 / (0.75 * LAST_REFUSAL_PAUSE_S)
    assert scene.file.read_bytes() == b"good 5"
    assert len(scene.stagers) == 6


def test_a_flood_of_forged_sets_between_the_good_one_is_told_now_and_then(scene: Scene) -> None:
    for _ in range(6_000):
        for payload in (b"good", b"forged"):
            scene.updates.metadata_arrived(payload)
            scene.tick(0.1)
            if scene.updates.child is not None:
                is_good = scene.looked_at()[1] == b"good"
                scene.says(VERIFIED if is_good else MetadataRefused("bad_signature", "text"))
                scene.ends()
    assert len([told for told in scene.told if told[0] == "metadata_refused"]) < 8 + 1200 / (
        0.75 * LAST_REFUSAL_PAUSE_S
    )


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
