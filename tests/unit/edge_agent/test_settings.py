from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent import settings as module
from edge_agent.settings import Settings, SlotSettings, load
from protocol.errors import Misconfigured


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file of one slot, in a folder that is also the user's home."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(module, "SYSTEM_CONFIG", tmp_path / "etc" / "edge-agent.toml")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "edge-agent.toml"
    path.write_text("[slots.combat]\n")
    return path


def test_the_least_configuration(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "pi-7.local")
    found = load(config)
    assert found.device == "pi-7"
    assert found.slots == {"combat": SlotSettings()}
    assert found.broker.host == "127.0.0.1"
    assert Path(found.state_dir) == config.parent / "data" / "edge-agent"
    assert Path(found.runtime_dir) == config.parent / "data" / "edge-agent" / "run"
    assert Path(found.root_of_trust) == config.parent / "root.json"


def test_without_xdg_data_lies_in_the_home_folder(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(config.parent))
    assert Path(load(config).state_dir) == config.parent / ".local/share/edge-agent"


def test_under_the_systems_file_state_lies_in_the_systems_folders(config: Path) -> None:
    system = module.SYSTEM_CONFIG
    system.parent.mkdir()
    system.write_text("[slots.combat]\n[slots.movement]\n")
    for found in (load(), load(system)):
        assert list(found.slots) == ["combat", "movement"]
        assert found.state_dir == "/var/lib/edge-agent"
        assert found.runtime_dir == "/run/edge-agent"
        assert Path(found.root_of_trust) == system.parent / "root.json"


def test_the_file_here_is_taken_where_the_system_has_none(config: Path) -> None:
    assert list(load().slots) == ["combat"]
    config.unlink()
    with pytest.raises(Misconfigured, match=r"there is neither .* nor edge-agent\.toml here"):
        load()


def test_paths_are_taken_from_the_folder_of_the_file(config: Path) -> None:
    config.write_text(
        "state_dir = 'state'\nruntime_dir = '/run/x'\nroot_of_trust = 'trust/root.json'\n"
        "broker.ca_file = 'ca.pem'\nbroker.key_file = '/etc/key.pem'\n[slots.combat]\n"
    )
    found = load(Path("edge-agent.toml"))
    assert Path(found.state_dir) == config.parent / "state"
    assert found.runtime_dir == "/run/x"
    assert Path(found.root_of_trust) == config.parent / "trust/root.json"
    assert found.broker.ca_file == str(config.parent / "ca.pem")
    assert found.broker.key_file == "/etc/key.pem"
    assert found.broker.cert_file is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "slots is missing"),
        ("[slots]", "slots is a table; allowed: a table of at least 1"),
        ("device = 'a/b'\n[slots.combat]", "device 'a/b' must be"),
        ("[slots.'a b']", "slot name 'a b' must be"),
        ("[slots.combat]\ndeadline_ms = 0", "toml:2: slots.combat.deadline_ms is 0; allowed: a number from 1"),
        ("[slots.combat]\ntrial_duty = 2.0", "toml:2: slots.combat.trial_duty is 2.0; allowed: a number, more than 0"),
        ("outbox.max_bytes = 5\n[slots.combat]", "toml:1: outbox.max_bytes is 5; allowed: a whole number from 1048576"),
        ("broker.hots = 'x'\n[slots.combat]", "toml:1: unknown key broker.hots; did you mean host?"),
    ],
)
def test_wrong_settings_are_refused(config: Path, text: str, complaint: str) -> None:
    config.write_text(text)
    with pytest.raises(Misconfigured) as caught:
        load(config)
    assert complaint in str(caught.value)


def test_settings_are_frozen() -> None:
    found = Settings(slots={"combat": SlotSettings()})
    with pytest.raises(AttributeError):
        found.device = "other"  # type: ignore[misc]
