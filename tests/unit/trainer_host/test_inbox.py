from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.watched_folder import LOOK_S, Stamp
from trainer_host import inbox as module
from trainer_host.inbox import Description, Inbox, pairs, read_description

A, B = Stamp(10, 1), Stamp(20, 2)


def test_a_model_and_its_description_belong_together() -> None:
    assert pairs({"m.tflite": A, "m.toml": B, "notes.txt": A}) == {"m": (A, B)}


def test_half_a_pair_is_not_waited_for() -> None:
    assert pairs({"m.tflite": A, "n.toml": A, "m": B, ".toml": B}) == {}


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
    assert inbox.ready(LOOK_S - 0.1) == []
    assert inbox.ready(LOOK_S) == ["m"]


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
