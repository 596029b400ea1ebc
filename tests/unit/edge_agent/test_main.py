"""The command line as a user meets it: a process, its exit code, what it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.trail import Trail
from protocol.lock import is_running, only_daemon
from protocol.messages import Event, ModelRef, SlotStatus, Status

STATUS = Status(
    at=1.0,
    agent_version="1",
    runtime="ai-edge-litert 2",
    slots={"combat": SlotStatus(phase="serving", ready=True, active=ModelRef(digest="a" * 64, version=3))},
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "edge-agent.toml"
    path.write_text('device = "pi7"\nstate_dir = "state"\n[broker]\nport = 1\n[slots.combat]\n')
    return path


def agent(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env=environment,
    )


def say(config: Path, status: Status) -> Path:
    folder = config.parent / "state" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_bytes(msgspec.json.encode(status))
    return folder / "status.json"


def test_the_version_is_printed() -> None:
    done = agent("version")
    assert done.returncode == 0
    assert done.stdout.strip() == agent("--version").stdout.strip() != ""


def test_status_shows_what_each_slot_serves(config: Path) -> None:
    say(config, STATUS)
    done = agent("status", "--config", str(config))
    assert done.returncode == 0
    assert "combat" in done.stdout
    assert "3 (aaaaaaaa)" in done.stdout
    assert "ai-edge-litert 2" in done.stdout


def test_status_as_json_is_the_status(config: Path) -> None:
    say(config, STATUS)
    done = agent("status", "--config", str(config), "--json")
    assert msgspec.json.decode(done.stdout, type=Status) == STATUS


def test_a_slot_that_is_not_ready_is_exit_code_1(config: Path) -> None:
    say(config, msgspec.structs.replace(STATUS, slots={"combat": SlotStatus(phase="serving", ready=False)}))
    done = agent("status", "--config", str(config))
    assert done.returncode == 1
    assert "no" in done.stdout


def test_without_a_status_or_with_an_old_one_the_daemon_is_not_there(config: Path) -> None:
    done = agent("status", "--config", str(config))
    assert done.returncode == 3
    assert "is the daemon running?" in done.stderr
    file = say(config, STATUS)
    then = time.time() - 600
    os.utime(file, (then, then))
    done = agent("status", "--config", str(config))
    assert done.returncode == 3
    assert re.search(r"60\d s old", done.stderr)


def test_history_shows_what_happened_the_newest_last(config: Path) -> None:
    (config.parent / "state").mkdir()
    store = Trail(config.parent / "state" / "trail.db")
    for number, slot in enumerate(("combat", "movement", "combat")):
        store.add(Event(at=float(number), kind="staged", slot=slot, model="b" * 64, version=number, text=f"n{number}"))
    store.close()
    done = agent("history", "--config", str(config))
    assert done.returncode == 0
    assert done.stdout.index("n0") < done.stdout.index("n1") < done.stdout.index("n2")
    events: list[dict[str, Any]] = json.loads(
        agent("history", "--config", str(config), "--slot", "combat", "--limit", "1", "--json").stdout
    )
    assert [event["text"] for event in events] == ["n2"]


def test_history_without_a_state_is_exit_code_3(config: Path) -> None:
    done = agent("history", "--config", str(config))
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "trail.db" in done.stderr


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("device = 'pi7'\n[slots.combat]\nthreads = 0\n", 3, "threads"),
        ("device = 'pi7'\n\n[slots.combat]\ntreads = 1\n", 4, "treads"),
        ("device = 'pi7'\n[slots\n", 2, ""),
    ],
)
def test_a_mistake_in_the_configuration_is_named_with_file_and_line(
    text: str, line: int, named: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(text)
    done = agent("run", "--config", str(bad))
    assert done.returncode == 2
    assert f"{bad}:{line}" in done.stderr or f"{bad}, line {line}" in done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_without_any_configuration_it_says_what_the_least_is(tmp_path: Path) -> None:
    done = agent("run", cwd=tmp_path)
    assert done.returncode == 2
    assert "[slots.combat]" in done.stderr


@pytest.mark.parametrize("words", [("nonsense",), ("status", "--nonsense"), ("history", "--limit", "many")])
def test_a_command_that_is_none_is_exit_code_2(words: tuple[str, ...]) -> None:
    done = agent(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_made_is_told_in_one_line(config: Path) -> None:
    (config.parent / "state").write_text("a file")
    done = agent("run", "--config", str(config))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_second_daemon_on_the_same_state_is_turned_away(config: Path) -> None:
    with only_daemon(config.parent / "state", "edge-agent"):
        done = agent("run", "--config", str(config))
    assert done.returncode == 3
    assert done.stderr == f"error: another edge-agent is running on {config.parent / 'state'}\n"


def test_run_ends_with_0_on_sigterm_even_without_a_broker(config: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "run", "--config", str(config)],
        cwd=config.parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    deadline = time.monotonic() + 30
    status = config.parent / "state" / "run" / "status.json"
    while not status.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    assert is_running(config.parent / "state", "edge-agent")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not status.exists()
