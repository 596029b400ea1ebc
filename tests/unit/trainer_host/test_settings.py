from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import Misconfigured
from trainer_host import settings as module
from trainer_host.settings import load


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(module, "SYSTEM_CONFIG", tmp_path / "etc" / "trainer-host.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(home: Path, text: str, name: str = "trainer-host.toml") -> Path:
    path = home / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_without_a_file_the_defaults_hold(home: Path) -> None:
    found = load()
    state = home / "data" / "trainer-host"
    assert Path(found.state_dir) == state
    assert found.database == f"sqlite:///{state}/trainer-host.db"
    assert Path(found.keys_dir) == state / "keys"
    assert Path(found.inbox.folder) == state / "inbox"
    assert found.repository_dir == state / "repository"
    assert found.jobs_dir == state / "jobs"
    assert found.progress_file == state / "progress.jsonl"
    assert found.passphrase() is None


def test_without_xdg_state_lies_in_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(home))
    assert Path(load().state_dir) == home / ".local/share/trainer-host"


def test_the_systems_file_comes_first_and_has_its_own_state(home: Path) -> None:
    write(home, 'state_dir = "local"')
    assert Path(load().state_dir) == home / "local"
    write(home, 'client_id = "system"', "etc/trainer-host.toml")
    assert load().client_id == "system"
    assert load().state_dir == "/var/lib/trainer-host"


def test_paths_are_taken_from_the_files_folder(home: Path) -> None:
    (home / "etc").mkdir()
    path = write(
        home,
        'state_dir = "s"\nkeys_dir = "/keys"\npassphrase_file = "p"\n[inbox]\nfolder = "in"\n'
        '[broker]\nca_file = "ca.pem"\n',
        "etc/other.toml",
    )
    found, folder = load(path), home / "etc"
    assert (found.state_dir, found.keys_dir) == (str(folder / "s"), "/keys")
    assert (found.passphrase_file, found.inbox.folder) == (str(folder / "p"), str(folder / "in"))
    assert (found.broker.ca_file, found.broker.cert_file) == (str(folder / "ca.pem"), None)


def test_a_recipe_is_changed_by_the_file(home: Path) -> None:
    write(home, "[recipes.combat.learner]\nepochs = 3\n")
    assert load().recipe("combat").learner.epochs == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[auto_publish]\nmin_seconds = -1\n", "trainer-host.toml:2: auto_publish.min_seconds is -1"),
        ("[recipes.combat.learner]\nepoch = 3\n", r"recipes.combat.learner: .*epoch"),
        ("[recipes.chess]\n", "chess"),
        ('[auto_publish]\nrecipes = ["chess"]\n', "no recipe is called 'chess'; there are: combat"),
        ("[training]\nthread = 2\n", "did you mean threads"),
        ("[gate]\nbattles = 0\n", "trainer-host.toml:2: gate.battles is 0"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(home: Path, text: str, said: str) -> None:
    write(home, text)
    with pytest.raises(Misconfigured, match=said):
        load()


def test_the_passphrase_is_the_first_line(home: Path) -> None:
    write(home, 'passphrase_file = "secret"')
    with pytest.raises(Misconfigured, match="cannot read passphrase_file"):
        load().passphrase()
    (home / "secret").write_text("open\nrest\n")
    assert load().passphrase() == "open"
    (home / "secret").write_text("\n")
    with pytest.raises(Misconfigured, match="is empty"):
        load().passphrase()
    (home / "secret").write_bytes(b"\xff\n")
    with pytest.raises(Misconfigured, match="cannot read"):
        load().passphrase()
