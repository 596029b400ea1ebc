from __future__ import annotations

from trainer_host.overview import Overview, battle_rows, facts, slot_rows
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
)


def test_the_tables() -> None:
    assert [row["is"] for row in facts(OVERVIEW)] == ["running", "s", "3, 2 of them online", "4 not_finite"]
    assert [tuple(row.values()) for row in slot_rows(OVERVIEW)] == [
        ("combat", 0, 10, 5),
        ("movement", 2, 0, 0),
        ("skill", "", 1, 1),
    ]
    assert [tuple(row.values()) for row in battle_rows(OVERVIEW)] == [
        ("combat", "a human or a script", 4, "25.0%"),
        ("combat", "version 0", 2, "100.0%"),
    ]
