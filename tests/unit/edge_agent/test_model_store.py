from __future__ import annotations

import hashlib
import random
import resource
from pathlib import Path

import pytest

from edge_agent.model_store import ModelStore
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.release import CHUNK_BYTES, chunked, manifest_digests, manifest_of

MODEL = random.Random(7).randbytes(CHUNK_BYTES * 2 + 1000)
OTHER = random.Random(8).randbytes(5000)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def staged(store: ModelStore, model: bytes = MODEL) -> list[str]:
    return [store.put_chunk(chunk) for chunk in chunked(model)]


def test_a_model_comes_back_by_its_digest(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    digest = store.put(MODEL)
    assert digest == sha(MODEL)
    assert digest in store
    assert sha(OTHER) not in store
    assert ModelStore(tmp_path).open(digest) == MODEL
    assert store.path(digest).read_bytes() == MODEL
    assert store.put(MODEL) == digest
    assert len(files(tmp_path)) == 1


def test_a_model_that_is_not_here_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot read"):
        ModelStore(tmp_path).open(sha(MODEL))


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63])
def test_a_digest_is_never_a_path(tmp_path: Path, digest: str) -> None:
    store = ModelStore(tmp_path)
    for use in (store.path, store.open, store.has_chunk, store.chunk):
        with pytest.raises(Rejected) as caught:
            use(digest)
        assert caught.value.code == "bad_digest"


def test_a_rotten_model_is_refused_and_set_aside(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    digest = store.put(MODEL)
    for number in (1, 2):
        store.path(digest).write_bytes(MODEL[:-1] + b"?")
        with pytest.raises(Rejected) as caught:
            store.open(digest)
        assert caught.value.code == "corrupt_model"
        assert digest not in store
        assert f"models/{digest}.tflite.corrupt-{number}" in files(tmp_path)
    store.put(MODEL)
    assert store.open(digest) == MODEL


def test_chunks_become_the_model(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    chunks = staged(store)
    assert [store.has_chunk(digest) for digest in chunks] == [True] * 3
    assert store.chunk(chunks[2]) == MODEL[2 * CHUNK_BYTES :]
    path = store.assemble(chunks, sha(MODEL), len(MODEL))
    assert path == store.path(sha(MODEL))
    assert store.open(sha(MODEL)) == MODEL
    assert store.has_chunk(chunks[0])


def test_a_chunk_is_verified_when_it_arrives(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    assert store.put_chunk(b"right", sha(b"right")) == sha(b"right")
    for data, expected in ((b"wrong", sha(b"right")), (b"x" * (CHUNK_BYTES + 1), None)):
        with pytest.raises(Rejected) as caught:
            store.put_chunk(data, expected)
        assert caught.value.code == "corrupt_chunk"
    assert len(files(tmp_path)) == 1


def test_a_torn_chunk_is_as_good_as_none(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    chunks = staged(store)
    (tmp_path / "chunks" / chunks[1]).write_bytes(b"")
    with pytest.raises(Unavailable, match=chunks[1]):
        store.assemble(chunks, sha(MODEL), len(MODEL))
    assert [store.has_chunk(digest) for digest in chunks] == [True, False, True]
    assert f"chunks/{chunks[1]}" not in files(tmp_path)
    staged(store)
    store.assemble(chunks, sha(MODEL), len(MODEL))


def test_a_manifest_that_leads_elsewhere_stores_nothing(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    chunks = staged(store)
    for listed, digest, length in (
        (chunks[::-1], sha(MODEL), len(MODEL)),
        (chunks, sha(OTHER), len(MODEL)),
        (chunks, sha(MODEL), len(MODEL) - 1),
        (chunks, sha(MODEL), len(MODEL) + 1),
        (chunks[:2], sha(MODEL), len(MODEL)),
        (chunks + chunks, sha(MODEL), len(MODEL)),
        ([], sha(MODEL), len(MODEL)),
    ):
        with pytest.raises(Rejected) as caught:
            store.assemble(listed, digest, length)
        assert (caught.value.code, caught.value.field) == ("corrupt_model", "manifest")
    assert files(tmp_path) == sorted(f"chunks/{digest}" for digest in chunks)


def test_no_more_is_written_than_the_model_may_have(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    chunks = staged(store)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(MODEL), before[1]))
    try:
        with pytest.raises(Rejected, match="more than"):
            store.assemble(chunks * 100, sha(MODEL), len(MODEL))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_chunks_of_a_model_that_is_here_count_as_here_and_are_taken_from_it(tmp_path: Path) -> None:
    tuned = MODEL[:CHUNK_BYTES] + OTHER + MODEL[CHUNK_BYTES + len(OTHER) :]
    manifest = manifest_digests(manifest_of(chunked(tuned)))
    older = ModelStore(tmp_path)
    older.put(OTHER)
    older.put(MODEL)
    store = ModelStore(tmp_path)
    assert [store.has_chunk(digest) for digest in manifest] == [False, False, False]
    store.index_models(manifest)
    assert [store.has_chunk(digest) for digest in manifest] == [True, False, True]
    assert store.chunk(manifest[0]) == MODEL[:CHUNK_BYTES]
    store.put_chunk(chunked(tuned)[1])
    store.assemble(manifest, sha(tuned), len(tuned))
    assert store.open(sha(tuned)) == tuned
    assert len([name for name in files(tmp_path) if name.startswith("chunks/")]) == 1


def test_an_indexed_model_that_rots_or_goes_before_it_is_used_only_costs_a_fetch(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    digest = store.put(MODEL)
    manifest = manifest_digests(manifest_of(chunked(MODEL)))
    store.index_models(manifest)
    store.path(digest).write_bytes(b"?" + MODEL[1:])
    with pytest.raises(Unavailable, match="not here"):
        store.chunk(manifest[0])
    assert store.chunk(manifest[1]) == chunked(MODEL)[1]
    again = ModelStore(tmp_path)
    again.index_models(manifest)
    assert [again.has_chunk(digest) for digest in manifest] == [False, True, True]
    again.path(digest).unlink()
    with pytest.raises(Unavailable, match="not here"):
        again.assemble(manifest, digest, len(MODEL))


def test_only_what_is_pinned_stays(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    kept, gone = store.put(MODEL), store.put(OTHER)
    manifest = manifest_of(chunked(MODEL))
    pinned = store.put_chunk(manifest)
    chunks = staged(store)
    stray = store.put_chunk(b"of another model")
    store.path(sha(b"rotten")).write_bytes(b"?")
    with pytest.raises(Rejected):
        store.open(sha(b"rotten"))
    assert store.collect({kept, sha(b"not here")}, {pinned, sha(b"not here either")}) == 3
    assert (kept in store, gone in store) == (True, False)
    assert [store.has_chunk(digest) for digest in [pinned, *chunks]] == [True] * 4
    assert not store.has_chunk(stray)
    assert manifest_digests(store.chunk(pinned)) == chunks
    assert store.collect({kept}) == 4
    assert files(tmp_path) == [f"models/{kept}.tflite"]


def test_only_the_one_who_writes_removes_leftovers(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    for path in (tmp_path / "models/.a.new", tmp_path / "chunks/.b.new"):
        path.write_bytes(b"half")
    ModelStore(tmp_path)
    assert files(tmp_path) == ["chunks/.b.new", "models/.a.new"]
    store.remove_leftovers()
    assert files(tmp_path) == []


def test_no_room_is_said_with_figures(tmp_path: Path) -> None:
    chunks = staged(ModelStore(tmp_path))
    store = ModelStore(tmp_path, reserve_bytes=1 << 60)
    with pytest.raises(Unavailable, match=f"{len(MODEL)} bytes and a reserve of {1 << 60}"):
        store.assemble(chunks, sha(MODEL), len(MODEL))
    with pytest.raises(Unavailable, match="bytes are free"):
        store.put(OTHER)
    with pytest.raises(Unavailable, match="bytes are free"):
        store.require_free(1 << 60, 0)
    assert sha(MODEL) not in store


def test_a_disk_that_fills_up_while_a_model_is_assembled(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    chunks = staged(store)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES, before[1]))
    try:
        with pytest.raises(Unavailable, match=f"{len(MODEL)} bytes needed"):
            store.assemble(chunks, sha(MODEL), len(MODEL))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == sorted(f"chunks/{digest}" for digest in chunks)


def test_a_place_that_is_no_folder_needs_a_person(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(Misconfigured, match="models"):
        ModelStore(tmp_path)
