from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from protocol import command_line
from protocol.lock import only_daemon
from tests import signing
from trainer_host.__main__ import app
from trainer_host.custody import open_repository
from trainer_host.database import Database
from trainer_host.keys import ROLES
from trainer_host.registry import Model, ModelState, Registry
from trainer_host.repository import Repository, identity_of
from trainer_host.settings import load
from trainer_host.store import Sighting, Store
from trainer_host.wiring import assemble

HEAVY = ("numpy", "sqlalchemy", "tensorflow", "tuf", "rich.table", "ai_edge_litert")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "host.toml"
    path.write_text('state_dir = "host"\n')
    return path


def call(config: Path, *words: str) -> int:
    return command_line.run(app, [*words, "--config", str(config)])


def test_the_command_line_is_light() -> None:
    code = f"import sys, trainer_host.__main__; print([name for name in {HEAVY!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


def test_the_daemon_imports_no_tensorflow() -> None:
    code = "import sys, trainer_host.daemon; print([name for name in ('tensorflow', 'keras') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


def test_keys_are_made_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = config.parent / "host"
    assert call(config, "keys", "init") == 0
    said = capsys.readouterr().out
    assert str(state / "root.json") in said
    assert "not encrypted" in said
    assert {path.stat().st_mode & 0o777 for path in (state / "keys").glob("*.pem")} == {0o600}
    assert json.loads((state / "root.json").read_bytes())["signed"]["_type"] == "root"
    keys = {role: (state / "keys" / f"{role}.pem").read_bytes() for role in ROLES}
    assert call(config, "keys", "init") == command_line.USAGE
    assert "already holds a repository" in capsys.readouterr().err
    assert keys == {role: (state / "keys" / f"{role}.pem").read_bytes() for role in ROLES}


def test_an_interrupted_init_is_finished(config: Path) -> None:
    assert call(config, "keys", "init") == 0
    state = config.parent / "host"
    index = (state / "keys" / "keys.json").read_bytes()
    for path in (state / "repository").glob("*.json"):
        path.unlink()
    assert call(config, "keys", "init") == 0
    assert (state / "keys" / "keys.json").read_bytes() == index
    assert (state / "repository" / "timestamp.json").exists()


def root_of(config: Path) -> bytes:
    return Repository(load(config).repository_dir).root()


@pytest.mark.parametrize("left", [None, b"", b"an older root"])
def test_an_init_that_was_cut_before_the_root_of_trust_is_finished(
    config: Path, capsys: pytest.CaptureFixture[str], left: bytes | None
) -> None:
    assert call(config, "keys", "init") == 0
    root = config.parent / "host" / "root.json"
    root.unlink()
    if left is not None:
        root.write_bytes(left)
    capsys.readouterr()
    assert call(config, "keys", "verify") == command_line.REFUSED
    assert "keys init" in capsys.readouterr().out
    assert call(config, "keys", "init") == 0
    assert str(root) in capsys.readouterr().out
    assert root.read_bytes() == root_of(config)
    assert call(config, "keys", "verify") == 0
    assert call(config, "keys", "init") == command_line.USAGE


def test_devices_are_provisioned_with_the_newest_root(config: Path) -> None:
    assert call(config, "keys", "init") == 0
    root = config.parent / "host" / "root.json"
    for words in (("rotate", "root"), ("add", "root"), ("threshold", "root", "2"), ("renew", "root")):
        before = root.read_bytes()
        assert call(config, "keys", *words) == 0
        assert root.read_bytes() == root_of(config) != before
    root.unlink()
    assert call(config, "keys", "renew", "targets") == 0
    assert root.read_bytes() == root_of(config)


def test_a_host_that_starts_ends_what_a_killed_command_had_begun(config: Path) -> None:
    """A change of keys that was killed before `root.json`, and an `accept` before the registry."""
    assert call(config, "keys", "init") == 0
    settings = load(config)
    repository = open_repository(settings)
    release = msgspec.structs.replace(signing.release(3), **identity_of(b"model"))
    repository.release(release, b"model", datetime.now(UTC))
    repository.change_root(lambda _: None, datetime.now(UTC))
    assert settings.root_file.read_bytes() != repository.root()
    database = Database(settings.database)
    registry = Registry(database)
    number = registry.add(
        Model(slot="combat", digest=release.digest, path="f", bytes=5, origin="trained", created_at=1.0)
    )
    registry.waiting(number, None, "waits for signatures")
    database.close()
    parts = assemble(settings)
    (model,) = parts.registry.models()
    parts.database.close()
    assert (model.state, model.version, model.reason) == (ModelState.RELEASED, 3, "")
    assert settings.root_file.read_bytes() == repository.root()


def test_a_passphrase_encrypts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text('state_dir = "host"\npassphrase_file = "secret"\n')
    (config.parent / "secret").write_text("open sesame\n")
    assert call(config, "keys", "init") == 0
    assert "ENCRYPTED" in (config.parent / "host" / "keys" / "root.pem").read_text()
    config.write_text('state_dir = "host"\n')
    assert call(config, "run") == command_line.USAGE
    assert "passphrase" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("run",), ("train",), ("publish", "model.tflite", "--slot", "combat")])
def test_without_keys_it_says_what_to_do(
    config: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert call(config, *command) == command_line.USAGE
    assert "trainer-host keys init" in capsys.readouterr().err


def test_signing_needs_a_request_a_folder_and_a_yes(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(config, "keys", "init")
    folder = config.parent / "host" / "keys"
    (folder / "root.pem").rename(config.parent / "root.pem")
    assert call(config, "keys", "renew", "root") == command_line.USAGE
    request = config.parent / "host" / "repository" / "requests" / "root-2.json"
    assert str(request) in capsys.readouterr().err
    sign = ["sign", str(request), "--keys", str(folder)]
    assert command_line.run(app, ["sign", "gone.json", "--keys", str(folder)]) == command_line.USAGE
    assert command_line.run(app, ["sign", str(request), "--keys", "gone"]) == command_line.USAGE
    assert command_line.run(app, [*sign, "--yes"]) == command_line.REFUSED
    assert "no key in" in capsys.readouterr().err
    (config.parent / "root.pem").rename(folder / "root.pem")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert command_line.run(app, sign) == command_line.USAGE
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    assert command_line.run(app, sign) == command_line.REFUSED
    assert "Nothing was signed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert command_line.run(app, sign) == 0
    assert "trainer-host accept root-2.json" in capsys.readouterr().out
    assert command_line.run(app, sign) == 0  # there is nothing left to sign
    assert "Every signature is there" in capsys.readouterr().out
    request.unlink()
    assert call(config, "accept", str(request)) == command_line.USAGE


def test_sign_needs_no_host(tmp_path: Path, config: Path) -> None:
    """Neither its configuration nor what the daemon is made of."""
    call(config, "keys", "init")
    (config.parent / "host" / "keys" / "root.pem").rename(tmp_path / "root.pem")
    (tmp_path / "keys.json").write_bytes((config.parent / "host" / "keys" / "keys.json").read_bytes())
    call(config, "keys", "renew", "root")
    request = (config.parent / "host" / "repository" / "requests" / "root-2.json").rename(tmp_path / "root-2.json")
    code = (
        "import sys; from trainer_host.__main__ import app; from protocol import command_line\n"
        f"code = command_line.run(app, ['sign', {str(request)!r}, '--keys', {str(tmp_path)!r}, '--yes'])\n"
        "heavy = ('numpy', 'sqlalchemy', 'tensorflow', 'ai_edge_litert', 'trainer_host.database')\n"
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/nowhere"},
    )
    assert ended.stdout.splitlines()[-1] == "0 []"


def test_publish_needs_a_slot_and_a_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(config, "keys", "init")
    assert call(config, "publish", "model.tflite") == command_line.USAGE
    assert "--slot" in capsys.readouterr().err
    assert call(config, "publish", "gone.tflite", "--slot", "combat") == command_line.UNAVAILABLE
    (config.parent / "m.toml").write_text("slot = 1\n")
    assert call(config, "publish", str(config.parent / "m.tflite")) == command_line.REFUSED
    assert "m.toml:1" in capsys.readouterr().err


def test_models_and_devices(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = Database(load(config).database)
    registry = Registry(database)
    model = Model(slot="combat", digest="d" * 64, path="f", bytes=7, origin="trained", created_at=1.0)
    for _ in range(2):
        number = registry.add(model)
    registry.released(number, 0, {"candidate": [200, 150, 0, 50, 0.7, 0.8]})
    Store(database).add_reports({"pi": Sighting(1.0, online=True)}, [], [])
    database.close()
    capsys.readouterr()
    assert call(config, "models", "--json") == 0
    waiting, released = json.loads(capsys.readouterr().out)
    assert (waiting["state"], released["state"], released["version"]) == ("trained", "released", 0)
    assert call(config, "models") == 0
    assert "75.0%" in capsys.readouterr().out
    assert call(config, "devices", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["device"] == "pi"
    assert call(config, "devices") == 0
    assert "pi" in capsys.readouterr().out


def test_status_tells_whether_the_daemon_runs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(config, "status", "--json") == command_line.REFUSED
    assert json.loads(capsys.readouterr().out)["running"] is False
    with only_daemon(config.parent / "host", "trainer-host"):
        assert call(config, "status") == 0
        assert "running" in capsys.readouterr().out
        call(config, "keys", "init")
        assert call(config, "run") == command_line.UNAVAILABLE
        assert "another trainer-host" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(app, ["version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2
