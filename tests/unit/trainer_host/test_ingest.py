from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol import codec
from protocol.errors import Rejected, Unavailable
from protocol.messages import Ack, Transition
from trainer_host import ingest as module
from trainer_host.database import Database
from trainer_host.ingest import Ingest, read
from trainer_host.store import Answer, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    database = Database(f"sqlite:///{tmp_path / 'host.db'}")
    yield Store(database)
    database.close()


def transition(seq: int, **fields: Any) -> Transition:
    made = Transition(
        seq=seq, slot="combat", battle="b", actor="a", step=seq, features=bytes(8), action=1, taken=False,
        propensity=None, legal=b"", reward=0.5, next_features=bytes(8), done=False, truncated=False, model="m",
        version=3, at=1.0,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def payload(first: int, last: int, transitions: list[Any] | None = None, epoch: str = "e1") -> bytes:
    made = [transition(seq) for seq in range(first, last + 1)] if transitions is None else transitions
    return codec.compress({"epoch": epoch, "acked": 0, "first": first, "last": last, "transitions": made})


def test_batches_of_a_turn_are_committed_together(store: Store) -> None:
    ingest = Ingest(store)
    for first, last in ((1, 2), (3, 5)):
        ingest.receive("pi", payload(first, last))
    ingest.receive("other", payload(1, 1))
    assert ingest.pending == 3
    assert ingest.commit(1.0) == [Answer("pi", Ack(epoch="e1", seq=5)), Answer("other", Ack(epoch="e1", seq=1))]
    assert (ingest.pending, ingest.batches, ingest.stored) == (0, 3, 6)
    assert ingest.commit(2.0) == []


@pytest.mark.parametrize(
    ("device", "data", "code"),
    [
        ("pi", b"no zlib", "malformed"),
        ("pi", codec.compress({"epoch": "e"}), "malformed"),
        ("pi", codec.compress([1, 2]), "malformed"),
        ("pi", payload(3, 2, []), "malformed"),
        ("pi", payload(1, 1, epoch="a/b"), "bad_name"),
        ("p#i", payload(1, 1), "bad_name"),
    ],
)
def test_an_unreadable_envelope_is_set_aside_and_not_acknowledged(
    store: Store, device: str, data: bytes, code: str
) -> None:
    ingest = Ingest(store)
    ingest.receive(device, data)
    assert ingest.commit(1.0) == []
    assert ingest.set_aside == {code: 1}
    assert store.quarantined() == {code: 1}


def test_unfit_transitions_do_not_hold_up_the_others(store: Store) -> None:
    ingest = Ingest(store)
    mistyped = list(msgspec.structs.astuple(transition(2)))
    mistyped[3] = 7
    ingest.receive("pi", payload(1, 4, [transition(1), mistyped, transition(3, reward=float("inf")), transition(4)]))
    assert ingest.commit(1.0) == [Answer("pi", Ack(epoch="e1", seq=4))]
    assert store.total("combat").transitions == 2
    assert store.quarantined() == {"malformed": 1, "not_finite": 1}
    assert ingest.set_aside == store.quarantined()


def test_a_failed_commit_acknowledges_nothing_and_the_next_one_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise Unavailable("disk full")

    ingest = Ingest(store)
    with monkeypatch.context() as patched:
        patched.setattr(store, "add_batches", fail)
        ingest.receive("pi", payload(1, 2))
        with pytest.raises(Unavailable):
            ingest.commit(1.0)
    assert (ingest.pending, ingest.stored) == (0, 0)
    ingest.receive("pi", payload(1, 2))
    assert ingest.commit(2.0)[0].ack.seq == 2


def test_what_waits_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    ingest = Ingest(store)
    for first in (1, 2, 3):
        ingest.receive("pi", payload(first, first))
    assert ingest.overflow == 1
    assert ingest.commit(1.0)[0].ack.seq == 2


def test_a_bomb_is_refused() -> None:
    with pytest.raises(Rejected, match="unpacks to more"):
        read("pi", codec.compress(b"\0" * (8 * 1024 * 1024)))
