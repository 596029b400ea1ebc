from __future__ import annotations

import json
from pathlib import Path

from trainer_host.progress import ProgressFile


def test_lines_are_appended_with_their_time(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    ProgressFile(path, clock=lambda: 5.0)("training", slot="combat")
    ProgressFile(path, clock=lambda: 6.0)("released", version=0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"at": 5.0, "kind": "training", "slot": "combat"},
        {"at": 6.0, "kind": "released", "version": 0},
    ]


def test_the_file_is_bounded_and_its_lines_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    report = ProgressFile(path, max_bytes=200, clock=lambda: 1.0)
    for number in range(50):
        report("epoch", epoch=number)
    kept = [path.with_name("progress.jsonl.1"), path]
    assert all(file.stat().st_size <= 200 for file in kept)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in kept}
    lines = [json.loads(line)["epoch"] for file in kept for line in file.read_text().splitlines()]
    assert lines == list(range(lines[0], 50))


def test_a_disk_that_fails_costs_the_line_only(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.mkdir()
    ProgressFile(path)("training")
    path.rmdir()
    ProgressFile(path)("epoch")
    assert json.loads(path.read_text())["kind"] == "epoch"
