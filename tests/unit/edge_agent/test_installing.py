"""What `edge-agent install` says and returns; the command itself is tried in tests/integration/test_sideload.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest

from edge_agent import installing
from edge_agent.inbox import FOLDER, RESULTS, Outcome, ReleaseOutcome, result_file
from edge_agent.installing import exit_code, install, rows, tell_status
from edge_agent.settings import Settings, load
from protocol.bundle import bundled
from protocol.durable import write_durably
from protocol.errors import Unavailable
from protocol.lock import only_daemon
from protocol.messages import SlotStatus, Status, TransferStatus

STAGED = ReleaseOutcome(slot="combat", version=3, model="a" * 64, ending="staged")
REFUSED = ReleaseOutcome(
    slot="combat", version=3, model="a" * 64, ending="refused", reason="not_finite", text="it says NaN"
)
POSTPONED = ReleaseOutcome(slot="combat", version=3, model="a" * 64, ending="postponed", reason="no_space", text="full")
UNCHANGED = ReleaseOutcome(slot="combat", version=3, model="a" * 64, ending="unchanged", text="nothing to do")


def accepted(*releases: ReleaseOutcome) -> Outcome:
    return Outcome(file="x", at=1.0, accepted=True, releases=releases)


def turned_away(reason: str) -> Outcome:
    return Outcome(file="x", at=1.0, accepted=False, reason=reason)


@pytest.mark.parametrize(
    ("outcome", "installed", "checked"),
    [
        (accepted(), 0, 0),
        (accepted(STAGED, UNCHANGED), 0, 0),
        (accepted(STAGED, REFUSED), 1, 1),
        (accepted(STAGED, POSTPONED), 3, 1),
        (accepted(POSTPONED, REFUSED), 1, 1),
        (turned_away("rolled_back"), 1, 1),
        (turned_away("unavailable"), 3, 1),
    ],
)
def test_the_exit_code_tells_how_it_went(outcome: Outcome, installed: int, checked: int) -> None:
    assert exit_code(outcome, checked=False) == installed
    assert exit_code(outcome, checked=True) == checked


def test_rows_are_for_people() -> None:
    assert rows(accepted(REFUSED), checked=False) == [
        {"slot": "combat", "model": "3 (aaaaaaaa)", "outcome": "refused", "why": "not_finite: it says NaN"}
    ]
    said = [row["outcome"] for row in rows(accepted(STAGED, REFUSED, POSTPONED, UNCHANGED), checked=True)]
    assert said == ["would be taken", "would be refused", "cannot be had", "unchanged"]
    assert rows(accepted(UNCHANGED), checked=True)[0]["why"] == "nothing to do"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "state").mkdir()
    (tmp_path / "agent.toml").write_text('device = "pi7"\nstate_dir = "state"\n[slots.combat]\n')
    return load(tmp_path / "agent.toml")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "x.bundle"
    path.write_bytes(b"".join(bundled(b"metadata", [])))
    return path


def say(settings: Settings, transfer: TransferStatus | None) -> None:
    Path(settings.runtime_dir).mkdir(exist_ok=True)
    slot = SlotStatus(phase="staging", ready=True, transfer=transfer)
    status = Status(at=1.0, agent_version="1", runtime="x", slots={"combat": slot})
    (Path(settings.runtime_dir) / "status.json").write_bytes(msgspec.json.encode(status))


def submitted(settings: Settings) -> Path:
    """The bundle in the inbox, once it is there."""
    folder = Path(settings.state_dir) / FOLDER
    deadline = time.monotonic() + 30
    while not (found := [path for path in folder.glob("*.bundle") if path.is_file()]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_it_waits_for_what_the_daemon_says(settings: Settings, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()

    def look(path: Path, tell: installing.Tell) -> None:
        tell_status(path, tell)
        looked.set()

    def answer() -> None:
        path = submitted(settings)
        assert looked.wait(30)
        (path.parent / RESULTS).mkdir()
        told = msgspec.structs.replace(accepted(STAGED), file=path.name)
        write_durably(result_file(path.parent, path.name), msgspec.json.encode(told))

    say(settings, TransferStatus(bytes=5, total=10))
    monkeypatch.setattr(installing, "tell_status", look)
    daemon = threading.Thread(target=answer)
    with only_daemon(Path(settings.state_dir), installing.DAEMON):
        daemon.start()
        outcome = install(settings, bundle)
    daemon.join()
    assert outcome.releases == (STAGED,)
    assert outcome.file.startswith("x-")


def test_progress_is_what_the_status_says_of_transfers(settings: Settings, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def tell(name: str, here: int, total: int) -> None:
        told.append((name, here, total))

    file = Path(settings.runtime_dir) / "status.json"
    tell_status(file, tell)
    for transfer in (None, TransferStatus(bytes=0, total=0), TransferStatus(bytes=5, total=10)):
        say(settings, transfer)
        tell_status(file, tell)
    file.write_bytes(b"{")
    tell_status(file, tell)
    assert told == [("combat", 5, 10)]


def test_without_a_daemon_it_says_where_the_bundle_waits(settings: Settings, bundle: Path) -> None:
    with pytest.raises(Unavailable, match="until the daemon runs"):
        install(settings, bundle)
    assert len(list((Path(settings.state_dir) / FOLDER).iterdir())) == 1


def test_a_daemon_that_goes_away_is_waited_for_a_while(
    settings: Settings, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "RESTART_S", 0.5)
    looks: list[Path] = []
    ended = threading.Event()

    def look(path: Path, tell: installing.Tell) -> None:
        looks.append(path)
        ended.set()

    monkeypatch.setattr(installing, "tell_status", look)

    def daemon() -> None:
        with only_daemon(Path(settings.state_dir), installing.DAEMON):
            running.set()
            assert ended.wait(30)

    running = threading.Event()
    thread = threading.Thread(target=daemon)
    thread.start()
    assert running.wait(30)
    with pytest.raises(Unavailable, match="until the daemon runs"):
        install(settings, bundle)
    thread.join()
    assert len(looks) > 1
