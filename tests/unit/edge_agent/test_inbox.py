"""The inbox: what is taken, and when; what is told, removed, kept for another try and set aside."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent import inbox as module
from edge_agent.inbox import (
    FOLDER,
    KEPT_RESULTS,
    MAX_TRIES,
    REFUSED,
    RESULTS,
    RETRY_S,
    Inbox,
    Installation,
    Outcome,
    ReleaseOutcome,
    read_result,
    result_file,
    submit,
)
from edge_agent.staging import MetadataRefused, MetadataVerified, Postponed, Refused, Staged
from protocol.bundle import bundled
from protocol.durable import OsDisk
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.release import Golden, Release, Tensor

WHOLE = b"".join(bundled(b"metadata", [b"chunk"]))


class MoodyDisk(OsDisk):
    """A disk that can be full, or not let anything be removed."""

    def __init__(self) -> None:
        self.full = False
        self.read_only = False

    def write(self, path: Path, pieces: Iterable[bytes], *, sync: bool) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, pieces, sync=sync)

    def remove(self, path: Path) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        super().remove(path)
        self.full = False


@pytest.fixture
def disk() -> MoodyDisk:
    return MoodyDisk()


@pytest.fixture
def inbox(tmp_path: Path, disk: MoodyDisk) -> Iterator[Inbox]:
    made = Inbox(tmp_path / FOLDER, settle_s=2.0, disk=disk)
    yield made
    made.close()


def dropped(inbox: Inbox, name: str, data: bytes = WHOLE) -> Path:
    path = inbox.folder / name
    path.write_bytes(data)
    inbox.look_again()
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def taken(inbox: Inbox, now: float) -> str | None:
    """What is taken after it has been still from `now` on."""
    inbox.look_again()
    assert inbox.next(now) is None
    inbox.look_again()
    path = inbox.next(now + 2.0)
    return path.name if path is not None else None


def outcome_of(name: str, reason: str = "", *, ending: module.Ending = "staged", at: float = 1.0) -> Outcome:
    release = ReleaseOutcome(slot="combat", version=1, model="a" * 64, ending=ending, reason=reason)
    return Outcome(file=name, at=at, accepted=True, releases=(release,))


def refusal_of(name: str, reason: str) -> Outcome:
    return Outcome(file=name, at=1.0, accepted=False, reason=reason, text="because")


def test_a_file_is_taken_once_it_is_still(inbox: Inbox) -> None:
    path = dropped(inbox, "x.bundle", WHOLE[:50])
    assert inbox.next(0.0) is None
    path.write_bytes(WHOLE)  # it is still being copied
    inbox.look_again()
    assert inbox.next(1.9) is None
    inbox.look_again()
    assert inbox.next(3.8) is None
    inbox.look_again()
    assert inbox.next(3.9) == path


def test_one_is_taken_at_a_time_by_name(inbox: Inbox, tmp_path: Path) -> None:
    for name in ("b", "a"):
        dropped(inbox, name)
    assert taken(inbox, 0.0) == "a"
    inbox.look_again()
    assert inbox.next(9.0) is None
    inbox.finished(inbox.folder / "a", outcome_of("a"), 9.0)
    assert inbox.next(9.0) == inbox.folder / "b"


def test_watchdog_wakes_the_daemon(inbox: Inbox) -> None:
    inbox.start()
    assert inbox.next(0.0) is None
    (inbox.folder / "x").write_bytes(WHOLE)
    assert select.select([inbox], [], [], 10.0)[0]
    inbox.changed()
    assert inbox.next(0.0) is None
    inbox.look_again()
    assert inbox.next(2.0) is not None


def test_hidden_files_links_and_names_nobody_can_read_stay(inbox: Inbox, tmp_path: Path) -> None:
    dropped(inbox, ".x.bundle.new")
    dropped(inbox, "a\nb")
    (tmp_path / "elsewhere").write_bytes(WHOLE)
    (inbox.folder / "link").symlink_to(tmp_path / "elsewhere")
    Path(os.fsdecode(bytes(inbox.folder) + b"/\xff")).write_bytes(WHOLE)
    assert taken(inbox, 0.0) is None


def test_the_result_is_told_and_the_bundle_goes(inbox: Inbox, tmp_path: Path) -> None:
    path = dropped(inbox, "x.bundle")
    taken(inbox, 0.0)
    assert read_result(tmp_path, "x.bundle") is None
    inbox.finished(path, outcome_of("x.bundle"), 3.0)
    assert read_result(tmp_path, "x.bundle") == outcome_of("x.bundle")
    assert not path.exists()
    assert inbox.next(3.0) is None


def test_the_results_of_the_last_few_are_kept(inbox: Inbox) -> None:
    for number in range(KEPT_RESULTS + 3):
        name = f"{number:02}"
        path = dropped(inbox, name)
        inbox.finished(path, outcome_of(name), 0.0)
        os.utime(result_file(inbox.folder, name), (number, number))
    kept = names_in(inbox.folder / RESULTS)
    assert len(kept) == KEPT_RESULTS
    assert kept[-1] == f"{KEPT_RESULTS + 2:02}.json"


def test_what_is_no_whole_bundle_is_set_aside_and_only_the_last_is_kept(inbox: Inbox, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        path = dropped(inbox, name, WHOLE[:-5])
        os.utime(path, (number, number))
        inbox.finished(path, refusal_of(name, "bad_bundle"), 0.0)
    assert names_in(inbox.folder / REFUSED) == ["two"]
    assert (inbox.folder / REFUSED / "two").read_bytes() == WHOLE[:-5]
    result = read_result(tmp_path, "two")
    assert result is not None
    assert (result.accepted, result.reason) == (False, "bad_bundle")
    assert not (inbox.folder / "two").exists()


def test_one_that_is_refused_for_what_it_says_is_removed(inbox: Inbox) -> None:
    path = dropped(inbox, "old")
    inbox.finished(path, refusal_of("old", "rolled_back"), 0.0)
    assert not path.exists()
    assert names_in(inbox.folder / REFUSED) == []


@pytest.mark.parametrize("reason", ["no_space", "disk", "stager_died", "interrupted"])
def test_what_may_go_better_is_tried_again_a_few_times(reason: str, inbox: Inbox, tmp_path: Path) -> None:
    path = dropped(inbox, "x")
    assert taken(inbox, 0.0) == "x"
    now = 2.0
    for _ in range(MAX_TRIES - 1):
        inbox.finished(path, outcome_of("x", reason, ending="postponed"), now)
        assert read_result(tmp_path, "x") == outcome_of("x", reason, ending="postponed")
        assert inbox.next(now + RETRY_S - 1.0) is None
        now += RETRY_S
        inbox.look_again()
        assert inbox.next(now) == path
    inbox.finished(path, outcome_of("x", reason, ending="postponed"), now)
    assert not path.exists()


def test_a_bundle_that_cannot_be_read_now_is_tried_again(inbox: Inbox) -> None:
    path = dropped(inbox, "x")
    taken(inbox, 0.0)
    inbox.finished(path, refusal_of("x", "unavailable"), 2.0)
    assert path.exists()


def test_what_the_same_bundle_will_never_have_is_not_waited_for(inbox: Inbox) -> None:
    path = dropped(inbox, "x")
    taken(inbox, 0.0)
    inbox.finished(path, outcome_of("x", "incomplete_bundle", ending="postponed"), 2.0)
    assert not path.exists()


def test_on_a_full_disk_the_result_is_told_in_the_room_of_the_bundle(
    inbox: Inbox, disk: MoodyDisk, tmp_path: Path
) -> None:
    path = dropped(inbox, "x")
    disk.full = True
    inbox.finished(path, outcome_of("x"), 0.0)
    assert read_result(tmp_path, "x") == outcome_of("x")


def test_on_a_read_only_disk_a_bundle_is_not_installed_over_and_over(inbox: Inbox, disk: MoodyDisk) -> None:
    path = dropped(inbox, "x")
    taken(inbox, 0.0)
    disk.read_only = True
    now = 2.0
    for _ in range(MAX_TRIES):
        inbox.finished(path, outcome_of("x"), now)
        assert inbox.next(now) is None
        now += RETRY_S
        inbox.look_again()
        found = inbox.next(now)
    assert found is None


def test_what_killed_writers_left_is_removed(inbox: Inbox, tmp_path: Path) -> None:
    old, fresh = inbox.folder / ".old.new", inbox.folder / ".fresh.new"
    result = inbox.folder / RESULTS / ".x.json.new"
    for path in (old, fresh, result):
        path.touch()
    os.utime(old, (1, 1))
    Inbox(inbox.folder).close()
    assert [path.exists() for path in (old, fresh, result)] == [False, True, False]


def test_a_folder_that_cannot_be_cleared_is_used_all_the_same(tmp_path: Path, disk: MoodyDisk) -> None:
    (tmp_path / FOLDER / RESULTS).mkdir(parents=True)
    (tmp_path / FOLDER / RESULTS / ".x.json.new").touch()
    disk.read_only = True
    inbox = Inbox(tmp_path / FOLDER, disk=disk)
    dropped(inbox, "x")
    assert taken(inbox, 0.0) == "x"
    inbox.close()


def test_an_impossible_folder_is_misconfigured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured):
        Inbox(tmp_path / "file")


# The command's side.


def test_a_submitted_bundle_appears_whole_and_readable_under_a_name_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "my models (1).bundle"
    source.write_bytes(WHOLE)
    names = {submit(tmp_path, source) for _ in range(2)}
    assert len(names) == 2
    assert {name[:14] for name in names} == {"my_models__1_-"}
    assert names_in(tmp_path / FOLDER) == sorted(names)
    for name in names:
        assert (tmp_path / FOLDER / name).read_bytes() == WHOLE
        assert (tmp_path / FOLDER / name).stat().st_mode & 0o777 == 0o644
    assert (tmp_path / FOLDER).stat().st_uid == tmp_path.stat().st_uid


def test_two_with_the_same_long_name_have_a_result_each(tmp_path: Path) -> None:
    source = tmp_path / f"{'r' * 120}.{'b' * 100}"
    source.write_bytes(WHOLE)
    names = {submit(tmp_path, source) for _ in range(2)}
    assert len({result_file(tmp_path, name) for name in names}) == 2


def test_the_inbox_that_a_command_makes_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(WHOLE)
    synced = []
    really = os.fsync

    def listening(descriptor: int) -> None:
        really(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", listening)
    submit(tmp_path, tmp_path / "x")
    assert tmp_path.stat().st_ino in synced
    assert (tmp_path / FOLDER).stat().st_ino in synced


def test_what_is_no_bundle_is_not_submitted(tmp_path: Path) -> None:
    source = tmp_path / "x"
    source.write_bytes(WHOLE[:-1])
    with pytest.raises(Rejected) as refused:
        submit(tmp_path, source)
    assert refused.value.code == "bad_bundle"
    assert not (tmp_path / FOLDER).exists()


def test_a_bundle_that_does_not_fit_is_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "x"
    source.write_bytes(WHOLE)
    monkeypatch.setattr(module, "RESERVE_BYTES", 2**60)
    with pytest.raises(Unavailable, match="bytes are free"):
        submit(tmp_path, source)
    assert names_in(tmp_path / FOLDER) == []


def test_without_a_state_folder_nothing_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(WHOLE)
    with pytest.raises(Unavailable, match="cannot write"):
        submit(tmp_path / "none", tmp_path / "x")


def test_a_damaged_result_is_unavailable(inbox: Inbox, tmp_path: Path) -> None:
    result_file(inbox.folder, "x").write_bytes(b"{")
    with pytest.raises(Unavailable):
        read_result(tmp_path, "x")


# What is collected.


def release_of(slot: str, version: int, digest: str) -> Release:
    return Release(
        slot=slot,
        version=version,
        digest=digest * 64,
        length=1,
        manifest="0" * 64,
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=(Feature(path="round"),)),
        golden=Golden(inputs=(), outputs=(), tolerance=1e-5),
    )


RELEASES = (
    release_of("combat", 2, "b"),
    release_of("combat", 1, "a"),
    release_of("movement", 7, "c"),
    release_of("elsewhere", 1, "d"),
)


@pytest.fixture
def installation() -> Installation:
    return Installation(Path("inbox/x.bundle"), ["combat", "movement", "empty"])


def endings(installation: Installation) -> list[tuple[str, int, str, str]]:
    outcome = installation.outcome(5.0)
    assert (outcome.file, outcome.at, outcome.accepted, outcome.metadata_version) == ("x.bundle", 5.0, True, 9)
    assert msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome) == outcome
    return [(each.slot, each.version, each.ending, each.reason) for each in outcome.releases]


def test_each_slot_has_its_ending(installation: Installation) -> None:
    installation.heard(MetadataVerified(9, RELEASES), ["b" * 64, "c" * 64])
    installation.heard(Staged("b" * 64))
    installation.heard(Refused("c" * 64, "not_finite", "NaN"))
    assert endings(installation) == [("combat", 2, "staged", ""), ("movement", 7, "refused", "not_finite")]
    outcome = installation.outcome(5.0)
    assert not outcome.passing
    assert [outcome.has(ending) for ending in ("staged", "refused", "postponed")] == [True, True, False]


def test_a_slot_that_wants_nothing_is_unchanged(installation: Installation) -> None:
    installation.heard(MetadataVerified(9, RELEASES))
    assert endings(installation) == [("combat", 2, "unchanged", ""), ("movement", 7, "unchanged", "")]


def test_what_did_not_come_to_an_end_is_told_so(installation: Installation) -> None:
    installation.heard(MetadataVerified(9, RELEASES), ["a" * 64, "b" * 64])
    installation.stager_died("b" * 64, "killed by SIGKILL")
    installation.heard(Postponed("c" * 64, "incomplete_bundle", "no"))
    assert endings(installation) == [
        ("combat", 1, "postponed", "interrupted"),
        ("combat", 2, "postponed", "stager_died"),
        ("movement", 7, "postponed", "incomplete_bundle"),
    ]
    assert installation.outcome(5.0).passing


def test_refused_metadata_is_the_whole_outcome(installation: Installation) -> None:
    installation.heard(MetadataRefused("expired", "it is too late"))
    assert installation.outcome(5.0) == Outcome(
        file="x.bundle", at=5.0, accepted=False, reason="expired", text="it is too late"
    )


def test_a_stager_that_dies_before_it_says_anything_may_do_better_the_next_time(installation: Installation) -> None:
    outcome = installation.outcome(5.0)
    assert (outcome.accepted, outcome.reason, outcome.passing) == (False, "unavailable", True)
