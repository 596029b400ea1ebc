from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from protocol.command_line import Finding, Health
from trainer_host import doctor
from trainer_host.__main__ import app
from trainer_host.database import Database
from trainer_host.private_broker import PrivateBroker
from trainer_host.settings import Settings, load

NOW = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    config = tmp_path / "host.toml"
    config.write_text('state_dir = "host"\n')
    assert app(["keys", "init", "--config", str(config)], result_action="return_value") == 0
    return load(config)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path / "broker") as running:
        yield running


def health(findings: list[Finding]) -> dict[str, Health]:
    assert all(finding.remedy for finding in findings if finding.health is not Health.OK)
    return {finding.name: finding.health for finding in findings}


def test_a_clock_behind_our_own_files_is_wrong(settings: Settings) -> None:
    written = (settings.repository_dir / "timestamp.json").stat().st_mtime
    assert doctor.clock(settings, written + 1.0).health is Health.OK
    assert doctor.clock(settings, written - 86_400.0).health is Health.FAILED


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((10, Health.OK), (1, Health.WARNING), (0.1, Health.FAILED)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: _Usage(free))
        assert doctor.disk(tmp_path / "not" / "yet").health is expected


class _Usage:
    def __init__(self, free_gib: float) -> None:
        self.free = int(free_gib * doctor.GIB)


def test_keys(settings: Settings) -> None:
    folder = Path(settings.keys_dir)
    found = health(list(doctor.key_files(folder, settings)))
    assert found == {
        "key root": Health.WARNING,
        "key targets": Health.OK,
        "key snapshot": Health.OK,
        "key timestamp": Health.OK,
    }
    for role in ("root", "targets", "snapshot"):
        (folder / f"{role}.pem").unlink()
    (folder / "timestamp.pem").chmod(0o640)
    found = health(list(doctor.key_files(folder, settings)))
    assert found == {
        "key root": Health.OK,
        "key targets": Health.WARNING,
        "key snapshot": Health.FAILED,
        "key timestamp": Health.OK,
        "key timestamp file": Health.WARNING,
    }
    assert health(list(doctor.key_files(folder / "none", settings))) == {"keys": Health.FAILED}


def test_keys_that_are_here_and_do_not_open(tmp_path: Path) -> None:
    (tmp_path / "right").write_text("open sesame\n")
    (tmp_path / "wrong").write_text("open barley\n")
    config = tmp_path / "host.toml"
    config.write_text('state_dir = "host"\npassphrase_file = "right"\n')
    assert app(["keys", "init", "--config", str(config)], result_action="return_value") == 0
    config.write_text('state_dir = "host"\npassphrase_file = "wrong"\n')
    settings = load(config)
    found = list(doctor.key_files(Path(settings.keys_dir), settings))
    assert set(health(found)) == {"key root", "key targets", "key snapshot", "key timestamp"}
    assert set(health(found).values()) == {Health.FAILED}
    assert all("does not open" in finding.detail for finding in found)


def test_metadata_runs_out(settings: Settings) -> None:
    now = datetime.now(UTC)
    assert set(health(list(doctor.metadata(settings, now))).values()) == {Health.OK}
    later = health(list(doctor.metadata(settings, now + timedelta(days=6))))
    assert later["metadata timestamp"] is Health.WARNING
    later = health(list(doctor.metadata(settings, now + timedelta(days=60))))
    assert [later[f"metadata {role}"] for role in ("root", "targets", "snapshot", "timestamp")] == [
        Health.OK,
        Health.OK,
        Health.FAILED,
        Health.FAILED,
    ]
    for file in settings.repository_dir.glob("*.json"):
        file.unlink()
    assert health(list(doctor.metadata(settings, now))) == {"metadata": Health.FAILED}


def test_the_database(settings: Settings, tmp_path: Path) -> None:
    path = Path(settings.state_dir) / "trainer-host.db"
    assert doctor.database(settings.database).health is Health.OK
    assert not path.exists()
    Database(settings.database).close()
    assert "0 transitions" in doctor.database(settings.database).detail
    assert doctor.database("nonsense").health is Health.FAILED
    assert doctor.database(f"sqlite:///{tmp_path}").health is Health.FAILED


def test_tensorflow_is_tried_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert doctor.tensorflow().health is Health.FAILED
    assert doctor.runtime().health is Health.FAILED
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert doctor.runtime().health is Health.OK
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert doctor.tensorflow().health is Health.FAILED
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    assert doctor.tensorflow().health is Health.OK
