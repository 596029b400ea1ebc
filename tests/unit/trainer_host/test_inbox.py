from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import Misconfigured, Rejected, Unavailable
from trainer_host import inbox as module
from trainer_host.inbox import Description, Inbox, Settling, Stamp, read_description

A, B = Stamp(10, 1), Stamp(20, 2)


def test_a_model_is_complete_when_both_files_have_been_still() -> None:
    settling = Settling(2.0)
    files = {"m.tflite": A, "m.toml": B, "notes.txt": A}
    assert settling.look(files, 0.0) == []
    assert settling.waiting
    assert settling.look(files, 1.9) == []
    assert settling.look(files, 2.0) == ["m"]
    assert settling.look(files, 9.0) == ["m"]


@pytest.mark.parametrize("changed", ["m.tflite", "m.toml"])
def test_a_file_that_changes_begins_anew(changed: str) -> None:
    settling = Settling(2.0)
    files = {"m.tflite": A, "m.toml": B}
    settling.look(files, 0.0)
    grown = {**files, changed: Stamp(99, 9)}
    assert settling.look(grown, 2.0) == []
    assert settling.look(grown, 3.9) == []
    assert settling.look(grown, 4.0) == ["m"]


def test_a_touch_without_growth_counts_as_a_change() -> None:
    settling = Settling(1.0)
    settling.look({"m.tflite": A, "m.toml": B}, 0.0)
    assert settling.look({"m.tflite": A._replace(modified_ns=5), "m.toml": B}, 1.0) == []


def test_half_a_pair_is_not_waited_for() -> None:
    settling = Settling(1.0)
    assert settling.look({"m.tflite": A}, 0.0) == settling.look({"n.toml": A}, 5.0) == []
    assert not settling.waiting
    both = {"m.tflite": A, "m.toml": B}
    assert settling.look(both, 6.0) == []
    assert settling.look(both, 7.0) == ["m"]


def test_the_time_a_file_waited_alone_does_not_count() -> None:
    settling = Settling(1.0)
    settling.look({"m.tflite": A, "m.toml": B}, 0.0)
    settling.look({"m.tflite": A}, 0.5)
    assert settling.look({"m.tflite": A, "m.toml": B}, 1.5) == []


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    made = Inbox(tmp_path / "inbox", 0.0)
    made.start()
    yield made
    made.close()


def drop(inbox: Inbox, name: str) -> None:
    inbox.model(name).write_bytes(b"model")
    inbox.description(name).write_text('slot = "combat"\n')


def test_watchdog_wakes_the_loop(inbox: Inbox) -> None:
    assert inbox.ready(0.0) == []
    drop(inbox, "m")
    readable, _, _ = select.select([inbox], [], [], 10.0)
    assert readable
    assert inbox.ready(1.0) == []  # it is not time to look
    inbox.changed()
    assert inbox.ready(1.0) == ["m"]


def test_without_news_it_looks_now_and_then(inbox: Inbox) -> None:
    inbox.ready(0.0)
    drop(inbox, "m")
    assert inbox.ready(module.LOOK_S - 0.1) == []
    assert inbox.ready(module.LOOK_S) == ["m"]


def test_links_folders_and_hidden_files_are_passed_over(inbox: Inbox, tmp_path: Path) -> None:
    drop(inbox, ".hidden")
    (tmp_path / "elsewhere").write_bytes(b"x")
    inbox.model("link").symlink_to(tmp_path / "elsewhere")
    inbox.description("link").touch()
    inbox.model("folder").mkdir()
    inbox.description("folder").touch()
    os.mkfifo(inbox.model("pipe"))
    inbox.description("pipe").touch()
    assert inbox.ready(0.0) == []


def test_what_was_dealt_with_is_moved(inbox: Inbox) -> None:
    for number, (refusal, folder, name) in enumerate(
        ((None, "done", "m"), ("too big", "refused", "m"), ("again", "refused", "m-2"))
    ):
        drop(inbox, "m")
        assert inbox.ready(float(number)) == ["m"]
        path = inbox.put_away("m", refusal)
        assert path == inbox.folder / folder / f"{name}.tflite"
        assert path.read_bytes() == b"model"
        assert path.with_suffix(".toml").exists()
        reason = path.with_suffix(".reason.txt")
        assert (reason.read_text() if reason.exists() else None) == (f"{refusal}\n" if refusal else None)
    assert inbox.ready(9.0) == []


def test_a_file_that_is_gone_cannot_be_moved(inbox: Inbox) -> None:
    with pytest.raises(Unavailable):
        inbox.put_away("m", None)


def test_an_impossible_folder_is_misconfigured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured):
        Inbox(tmp_path / "file" / "inbox", 1.0)


def test_a_folder_that_vanishes_is_no_crash(inbox: Inbox) -> None:
    (inbox.folder / "done").rmdir()
    (inbox.folder / "refused").rmdir()
    inbox.folder.rmdir()
    assert inbox.ready(0.0) == []


def test_a_description_says_what_the_model_is(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('slot = "combat"\nnotes = "x"\nlatency_budget_ms = 2.5\nname = "n"\n')
    assert read_description(path) == Description(slot="combat", notes="x", latency_budget_ms=2.5, name="n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('notes = "x"\n', "slot is missing"),
        ('slot = "combat"\nbudget = 1\n', "m.toml:2: unknown key budget"),
        ('slot = "combat"\nlatency_budget_ms = 0\n', "m.toml:2"),
        ("slot = ", "not TOML"),
        ('slot = "a b"\n', "slot 'a b' must be"),
        ("x" * (module.MAX_DESCRIPTION_BYTES + 1), "more than"),
    ],
)
def test_a_wrong_description_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(Rejected, match=said):
        read_description(path)


def test_a_missing_or_binary_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    with pytest.raises(Rejected, match="cannot read"):
        read_description(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Rejected, match="cannot read"):
        read_description(path)
