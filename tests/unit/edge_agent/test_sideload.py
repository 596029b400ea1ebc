"""Chunks out of a bundle: kept if they are what the manifest names; what is missing or damaged is nobody's refusal."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from edge_agent.model_store import ModelStore
from edge_agent.sideload import INCOMPLETE_BUNDLE, BundleSource
from edge_agent.staging import Postponed
from edge_agent.transfer import Transfer
from protocol.bundle import Bundle, bundled

CHUNKS = (b"first", b"second", b"third")
DIGESTS = [hashlib.sha256(chunk).hexdigest() for chunk in CHUNKS]
MODEL = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def source(tmp_path: Path, store: ModelStore, data: bytes) -> BundleSource:
    (tmp_path / "x.bundle").write_bytes(data)
    return BundleSource(Bundle(tmp_path / "x.bundle"), store, MODEL)


def transfer(here: set[str]) -> Transfer:
    return Transfer(DIGESTS, [len(chunk) for chunk in CHUNKS], here, random.Random(1))


def whole() -> bytes:
    return b"".join(bundled(b"metadata", CHUNKS))


def test_all_that_is_missing_comes_and_each_is_told(tmp_path: Path, store: ModelStore) -> None:
    wanted = transfer(set())
    told: list[int] = []
    fetching = source(tmp_path, store, whole())
    assert fetching.fetch(wanted, 3, lambda: told.append(wanted.bytes_here)) is None
    fetching.close()
    assert wanted.done
    assert told == [5, 11, 16]
    assert [store.chunk(digest) for digest in DIGESTS] == list(CHUNKS)


def test_what_is_here_is_not_read_again(tmp_path: Path, store: ModelStore) -> None:
    wanted = transfer({DIGESTS[1]})
    fetching = source(tmp_path, store, b"".join(bundled(b"metadata", [CHUNKS[0], CHUNKS[2]])))
    assert fetching.fetch(wanted, 3, lambda: None) is None
    assert wanted.done
    assert not store.has_chunk(DIGESTS[1])


def test_a_chunk_that_is_not_in_the_bundle_postpones_the_model_and_what_came_stays(
    tmp_path: Path, store: ModelStore
) -> None:
    fetching = source(tmp_path, store, b"".join(bundled(b"metadata", CHUNKS[:2])))
    trouble = fetching.fetch(transfer(set()), 3, lambda: None)
    assert isinstance(trouble, Postponed)
    assert (trouble.digest, trouble.reason) == (MODEL, INCOMPLETE_BUNDLE)
    assert DIGESTS[2] in trouble.text
    assert store.has_chunk(DIGESTS[1])


def test_a_damaged_chunk_postpones_the_model_and_is_not_kept(tmp_path: Path, store: ModelStore) -> None:
    fetching = source(tmp_path, store, whole().replace(b"second", b"seconD"))
    trouble = fetching.fetch(transfer(set()), 3, lambda: None)
    assert isinstance(trouble, Postponed)
    assert trouble.reason == "bad_bundle"
    assert not store.has_chunk(DIGESTS[1])


def test_a_turn_may_end_it(tmp_path: Path, store: ModelStore) -> None:
    def leave() -> None:
        raise SystemExit(0)

    fetching = source(tmp_path, store, whole())
    with pytest.raises(SystemExit):
        fetching.fetch(transfer(set()), 3, leave)
    assert store.has_chunk(DIGESTS[0])
    assert not store.has_chunk(DIGESTS[1])


def test_close_lets_go_of_the_file(tmp_path: Path, store: ModelStore) -> None:
    fetching = source(tmp_path, store, whole())
    fetching.close()
    with pytest.raises(ValueError, match="closed file"):
        fetching.fetch(transfer(set()), 3, lambda: None)
