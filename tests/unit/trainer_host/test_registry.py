from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from protocol.release import Lineage
from tests.signing import release
from trainer_host.database import Database
from trainer_host.registry import Model, ModelState, Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    database = Database(f"sqlite:///{tmp_path / 'host.db'}")
    yield Registry(database)
    database.close()


def model(slot: str = "combat", digest: str = "d" * 64) -> Model:
    lineage = Lineage(recipe="combat", transitions=9, metrics={"loss": 0.5}, settings={"a": {"b": 1}})
    return Model(slot=slot, digest=digest, path="f", bytes=7, origin="trained", created_at=1.5, lineage=lineage)


def test_a_model_reads_back_as_it_was_entered(registry: Registry) -> None:
    number = registry.add(model())
    assert registry.models() == [msgspec.structs.replace(model(), id=number)]


def test_a_release_and_a_refusal_are_noted(registry: Registry) -> None:
    first, second = registry.add(model()), registry.add(model(digest="e" * 64))
    registry.released(first, 0, {"passed": True})
    registry.refused(second, "too slow", {"passed": False})
    one, two = registry.models()
    assert (one.state, one.version, one.gate) == (ModelState.RELEASED, 0, {"passed": True})
    assert (two.state, two.version, two.reason, two.gate) == (ModelState.REFUSED, None, "too slow", {"passed": False})


def test_a_release_that_waited_is_noted_when_it_is_signed(registry: Registry) -> None:
    waiting, other, refused = (registry.add(model(digest=digest * 64)) for digest in "def")
    for number in (waiting, other):
        registry.waiting(number, {"passed": True}, "waits for signatures: targets-2.json")
    registry.refused(refused, "too slow")
    signed = (("combat", "d", 3), ("movement", "e", 4), ("combat", "f", 5))
    registry.signed(
        msgspec.structs.replace(release(version, slot), digest=digest * 64) for slot, digest, version in signed
    )
    states = [(each.state, each.version, each.reason) for each in registry.models()]
    assert states == [
        (ModelState.RELEASED, 3, ""),
        (ModelState.WAITING, None, "waits for signatures: targets-2.json"),
        (ModelState.REFUSED, None, "too slow"),
    ]
    assert registry.models()[0].gate == {"passed": True}


def test_the_newest_are_last_and_can_be_chosen_by_slot(registry: Registry) -> None:
    for slot in ("combat", "movement", "combat", "combat"):
        registry.add(model(slot))
    assert [each.id for each in registry.models(2)] == [3, 4]
    assert [each.id for each in registry.models(slot="movement")] == [2]
