from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from trainer_host import keys
from trainer_host.overview import Overview, battle_rows, facts, read, slot_rows
from trainer_host.repository import Repository
from trainer_host.settings import Settings, load
from trainer_host.store import Record, SlotTotal

OVERVIEW = Overview(
    running=True,
    state_dir="s",
    devices=3,
    online=2,
    quarantined={"not_finite": 4},
    totals=[SlotTotal("combat", 10, 5), SlotTotal("skill", 1, 1)],
    released={"combat": 0, "movement": 2},
    battles=[Record("combat", None, 4, 1), Record("combat", 0, 2, 2)],
    signed_until={"root": 0.0, "targets": 86_400.0},
    renew=["root"],
)


def test_the_tables() -> None:
    assert [row["is"] for row in facts(OVERVIEW)] == [
        "running",
        "s",
        "3, 2 of them online",
        "4 not_finite",
        "1970-01-01 00:00 UTC: sign again now, with trainer-host keys renew root",
        "1970-01-02 00:00 UTC",
    ]
    assert [row[""] for row in facts(OVERVIEW)][-2:] == ["root signed until", "targets signed until"]
    assert [tuple(row.values()) for row in slot_rows(OVERVIEW)] == [
        ("combat", 0, 10, 5),
        ("movement", 2, 0, 0),
        ("skill", "", 1, 1),
    ]
    assert [tuple(row.values()) for row in battle_rows(OVERVIEW)] == [
        ("combat", "a human or a script", 4, "25.0%"),
        ("combat", "version 0", 2, "100.0%"),
    ]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "host.toml").write_text('state_dir = "state"\n')
    (tmp_path / "state").mkdir()
    return load(tmp_path / "host.toml")


def test_without_a_repository_nothing_is_signed(settings: Settings) -> None:
    assert (found := read(settings, datetime.now(UTC))).signed_until == {}
    assert found.renew == []


@pytest.mark.parametrize(
    ("days", "renew"), [(67, []), (68, ["targets"]), (273, ["targets"]), (274, ["root", "targets"])]
)
def test_what_a_person_must_sign_again_is_told_in_time(settings: Settings, days: int, renew: list[str]) -> None:
    """A quarter of the 90 and of the 365 days before."""
    keys.init(Path(settings.keys_dir), None)
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    Repository(settings.repository_dir, keys.load_signers(Path(settings.keys_dir))).create(begun)
    found = read(settings, begun + timedelta(days=days))
    assert found.renew == renew
    assert found.signed_until["root"] == (begun + timedelta(days=365)).timestamp()
    assert found.signed_until.keys() == {"root", "targets"}
