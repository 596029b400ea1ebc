from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol import topics
from protocol.codec import encode
from protocol.errors import Unavailable
from protocol.messages import Event, ModelRef, SlotCounters, SlotStatus, Status, Telemetry, Verdict
from trainer_host import fleet as module
from trainer_host.database import Database
from trainer_host.fleet import Fleet, details, serving, table
from trainer_host.store import DeviceRow, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    database = Database(f"sqlite:///{tmp_path / 'host.db'}")
    yield Store(database)
    database.close()


VERDICT = Verdict(
    outcome="rollback", pairs=9, slower=9, passed=0, evidence=1e3, acceptance=0.0, ratio_median=2.0, old_us_p50=1.0,
    old_us_p99=2.0, new_us_p50=2.0, new_us_p99=4.0,
)  # fmt: skip
STATUS = Status(
    groups=("attic", "upstairs"),
    at=1.0,
    agent_version="1",
    runtime="r",
    slots={
        "combat": SlotStatus(
            phase="trial",
            ready=True,
            active=ModelRef(digest="a" * 64, version=0),
            candidate=ModelRef(digest="b" * 64, version=2),
            verdict=VERDICT,
            pinned=0,
            refusal="slower: the candidate is slower",
        ),
        "movement": SlotStatus(phase="serving", ready=False),
    },
)
TELEMETRY = Telemetry(
    at=1.0,
    uptime_s=2.0,
    temperatures_c={"cpu": 61.4, "gpu": 50.0},
    throttled=["throttled"],
    slots={"combat": SlotCounters(latency_us_p50=90.0)},
)


def say(fleet: Fleet, what: str, message: Any, now: float = 1.0, device: str = "pi") -> None:
    payload = message if isinstance(message, bytes) else encode(message, as_json=True)
    fleet.receive(topics.fleet(device, what), payload, now)


def test_everything_a_device_says_reaches_the_store(store: Store) -> None:
    fleet = Fleet(store)
    say(fleet, "availability", b"online", 1.0)
    say(fleet, "status", STATUS, 2.0)
    say(fleet, "telemetry", TELEMETRY, 3.0)
    say(fleet, "events", Event(at=1.0, kind="rolled_back", slot="combat", verdict=VERDICT), 4.0)
    fleet.commit()
    assert store.devices() == [DeviceRow("pi", 4.0, True, STATUS, TELEMETRY)]
    assert store.telemetry("pi", 9) == [TELEMETRY]
    assert [row.event.kind for row in store.events(9)] == ["rolled_back"]
    assert fleet.online == {"pi"}
    say(fleet, "availability", b"offline", 5.0)
    fleet.commit()
    assert fleet.online == set()
    assert store.devices() == [DeviceRow("pi", 5.0, False, STATUS, TELEMETRY)]
    assert len(store.events(9)) == len(store.telemetry("pi", 9)) == 1


@pytest.mark.parametrize("what", ["availability", "status", "telemetry", "events"])
def test_nonsense_is_counted(store: Store, what: str) -> None:
    fleet = Fleet(store)
    say(fleet, what, b"nonsense")
    say(fleet, what, b"online", device="p+")
    fleet.commit()
    assert fleet.ignored == {"malformed": 1, "bad_name": 1}
    assert store.devices() == []


def test_a_failed_commit_is_made_up_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(store)
    say(fleet, "events", Event(at=1.0, kind="staged"))

    def fail(*_: object) -> None:
        raise Unavailable("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(store, "add_reports", fail)
        with pytest.raises(Unavailable):
            fleet.commit()
    fleet.commit()
    assert [row.event.kind for row in store.events(9)] == ["staged"]


def test_what_waits_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    monkeypatch.setattr(module, "MAX_DEVICES", 1)
    fleet = Fleet(store)
    for at in range(3):
        say(fleet, "events", Event(at=float(at), kind=f"k{at}"))
    say(fleet, "availability", b"online", device="second")
    fleet.commit()
    assert fleet.dropped == 2
    assert [row.event.kind for row in store.events(9)] == ["k1", "k2"]
    assert [device.device for device in store.devices()] == ["pi"]


def test_the_table_has_a_row_for_each_slot() -> None:
    combat, movement, unknown = table(
        [DeviceRow("pi", 5.0, True, STATUS, TELEMETRY), DeviceRow("new", 9.0, None, None, None)], 12.0
    )
    assert list(combat.values()) == [
        "pi", "yes", "7 s ago", "attic, upstairs", "combat", "trial", "0 (aaaaaaaa)", 0, "2", "rollback", "slower",
        "90 / ?", "61", "throttled",
    ]  # fmt: skip
    assert movement["slot"] == "movement"
    assert movement["active"] == movement["pinned"] == movement["last refusal"] == movement["p50 / p99 µs"] == ""
    assert (unknown["device"], unknown["online"], unknown["slot"], unknown["°C"]) == ("new", "?", "", "")


def test_serving_counts_devices_by_what_they_said() -> None:
    rows = [DeviceRow(name, 5.0, True, STATUS, None) for name in ("pi1", "pi2")]
    assert serving([*rows, DeviceRow("new", 9.0, None, None, None)]) == {("combat", 0): 2}


def test_details_are_plain_values() -> None:
    (found,) = details([DeviceRow("pi", 5.0, False, STATUS, None)])
    assert found["device"] == "pi"
    assert found["status"]["slots"]["combat"]["candidate"]["version"] == 2
