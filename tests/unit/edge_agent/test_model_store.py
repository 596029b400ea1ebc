from __future__ import annotations

import hashlib
import random
import resource
from pathlib import Path

import pytest

from edge_agent.model_store import ModelStore
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.release import CHUNK_BYTES, chunked, manifest_digests, manifest_of
from tests.simulation.device.disk import File, Killed, Medium, SimulatedDisk

MODEL = random.Random(7).randbytes(CHUNK_BYTES * 2 + 1000)
OTHER = random.Random(8).randbytes(5000)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


FOLDER = Path("/store")
MANIFEST = sha(manifest_of(chunked(MODEL)))
DIGESTS = manifest_digests(manifest_of(chunked(MODEL)))


def begun(store: ModelStore) -> ModelStore:
    store.begin(MANIFEST, DIGESTS, len(MODEL))
    return store


def staged(store: ModelStore) -> ModelStore:
    return staged_as(store, DIGESTS, len(MODEL))


def staged_as(store: ModelStore, listed: list[str], length: int) -> ModelStore:
    store.begin(MANIFEST, listed, length)
    for chunk in chunked(MODEL):
        store.put_chunk(chunk)
    return store


def here(store: ModelStore) -> list[bool]:
    return [store.has_chunk(digest) for digest in DIGESTS]


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


def test_chunks_become_the_model_in_whatever_order_they_come(tmp_path: Path) -> None:
    store = begun(ModelStore(tmp_path))
    assert here(store) == [False] * 3
    for index in (2, 0, 1):
        store.put_chunk(chunked(MODEL)[index], DIGESTS[index])
    assert here(store) == [True] * 3
    assert files(tmp_path) == [f"models/{MANIFEST}.part"]
    assert sha(MODEL) not in store
    assert store.assemble(sha(MODEL)) == store.path(sha(MODEL))
    assert store.open(sha(MODEL)) == MODEL
    assert files(tmp_path) == [f"models/{sha(MODEL)}.tflite"]


def test_a_chunk_that_comes_twice_in_a_model_is_put_in_both_places(tmp_path: Path) -> None:
    model = MODEL[:CHUNK_BYTES] * 2 + b"end"
    store = ModelStore(tmp_path)
    store.begin(sha(b"manifest"), manifest_digests(manifest_of(chunked(model))), len(model))
    for chunk in {model[:CHUNK_BYTES], b"end"}:
        store.put_chunk(chunk)
    store.assemble(sha(model))
    assert store.open(sha(model)) == model


def test_the_next_writer_finds_what_has_come(tmp_path: Path) -> None:
    begun(ModelStore(tmp_path)).put_chunk(chunked(MODEL)[1])
    store = begun(ModelStore(tmp_path))
    assert here(store) == [False, True, False]
    staged(store).assemble(sha(MODEL))
    assert store.open(sha(MODEL)) == MODEL


def test_what_a_killed_writer_left_too_short_is_begun_anew(tmp_path: Path) -> None:
    staged(ModelStore(tmp_path))
    (tmp_path / "models" / f"{MANIFEST}.part").write_bytes(MODEL[:-1])
    store = begun(ModelStore(tmp_path))
    assert here(store) == [True, True, False]
    staged(store).assemble(sha(MODEL))
    assert store.open(sha(MODEL)) == MODEL


@pytest.mark.parametrize("failed_before", [False, True])
def test_a_model_survives_a_power_cut_though_an_earlier_sync_failed(failed_before: bool) -> None:
    medium = Medium(1 << 30, random.Random(2))
    disk = SimulatedDisk(medium)
    store = staged(ModelStore(FOLDER, disk))
    store.remove_leftovers()
    if failed_before:
        part = medium.file(f"{FOLDER}/models/{MANIFEST}.part")
        medium.fail_sync(part)
        assert part.durable != MODEL
        store = begun(ModelStore(FOLDER, disk))
        assert here(store) == [True] * 3
    store.assemble(sha(MODEL))
    models = medium.survivor(None, f"{FOLDER}/models")  # the least that a power cut leaves
    survivor = models.cached[f"{sha(MODEL)}.tflite"]
    assert isinstance(survivor, File)
    assert survivor.cached == MODEL


def test_a_writer_that_is_killed_while_it_begins_loses_nothing_that_was_here() -> None:
    def step(call: str, _path: str) -> None:
        if call == "overwrite" and killing:
            raise Killed

    medium = Medium(1 << 30, random.Random(1))
    killing = False
    staged(ModelStore(FOLDER, SimulatedDisk(medium, step)))
    killing = True
    with pytest.raises(Killed):
        begun(ModelStore(FOLDER, SimulatedDisk(medium, step)))
    killing = False
    assert here(begun(ModelStore(FOLDER, SimulatedDisk(medium, step)))) == [True] * 3


def test_a_chunk_is_verified_when_it_arrives(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    assert store.put_chunk(b"right", sha(b"right")) == sha(b"right")
    for data, expected in ((b"wrong", sha(b"right")), (b"x" * (CHUNK_BYTES + 1), None)):
        with pytest.raises(Rejected) as caught:
            store.put_chunk(data, expected)
        assert caught.value.code == "corrupt_chunk"
    assert len(files(tmp_path)) == 1


def test_a_torn_chunk_is_as_good_as_none(tmp_path: Path) -> None:
    store = staged(ModelStore(tmp_path))
    with store.path(sha(MODEL)).with_name(f"{MANIFEST}.part").open("r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(bytes(512))
    with pytest.raises(Unavailable, match="damaged"):
        store.assemble(sha(MODEL))
    assert here(begun(store)) == [True, False, True]
    staged(store).assemble(sha(MODEL))
    assert store.open(sha(MODEL)) == MODEL


def test_a_chunk_in_a_file_of_its_own_is_as_good_unless_it_is_torn(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    for chunk in chunked(MODEL):
        store.put_chunk(chunk)
    assert here(store) == [True] * 3
    (tmp_path / "chunks" / DIGESTS[1]).write_bytes(b"")
    assert here(begun(store)) == [True, False, True]
    assert ModelStore(tmp_path).has_chunk(DIGESTS[1]) is False
    assert f"chunks/{DIGESTS[1]}" not in files(tmp_path)


def test_a_model_of_which_a_chunk_is_missing_is_not_assembled(tmp_path: Path) -> None:
    store = begun(ModelStore(tmp_path))
    store.put_chunk(chunked(MODEL)[0])
    with pytest.raises(Unavailable, match="2 chunks are not here"):
        store.assemble(sha(MODEL))
    assert here(begun(store)) == [True, False, False]


def test_a_manifest_that_leads_elsewhere_stores_nothing(tmp_path: Path) -> None:
    for listed, digest, length in (
        (DIGESTS[::-1], sha(MODEL), len(MODEL)),
        (DIGESTS, sha(OTHER), len(MODEL)),
        (DIGESTS, sha(MODEL), len(MODEL) - 1),
        (DIGESTS, sha(MODEL), len(MODEL) + 1),
        (DIGESTS[:2], sha(MODEL), len(MODEL)),
        (DIGESTS + DIGESTS, sha(MODEL), len(MODEL)),
        ([], sha(MODEL), len(MODEL)),
    ):
        with pytest.raises(Rejected) as caught:
            staged_as(ModelStore(tmp_path), listed, length).assemble(digest)
        assert (caught.value.code, caught.value.field) == ("corrupt_model", "manifest")
        assert [name for name in files(tmp_path) if not name.endswith(".part")] == []


def test_chunks_of_models_that_are_here_or_were_given_up_are_taken_from_them(tmp_path: Path) -> None:
    tuned = MODEL[:CHUNK_BYTES] + OTHER + MODEL[CHUNK_BYTES + len(OTHER) :]
    manifest = manifest_of(chunked(tuned))
    digests = manifest_digests(manifest)
    older = ModelStore(tmp_path)
    older.put(OTHER)
    staged(older)
    for _ in range(2):
        store = ModelStore(tmp_path)
        assert [store.has_chunk(digest) for digest in digests] == [False] * 3
        store.begin(sha(manifest), digests, len(tuned))
        assert [store.has_chunk(digest) for digest in digests] == [True, False, True]
        store.collect(())
        staged(older).assemble(sha(MODEL))
    store.begin(sha(manifest), digests, len(tuned))
    store.put_chunk(chunked(tuned)[1])
    store.assemble(sha(tuned))
    assert store.open(sha(tuned)) == tuned


def test_chunks_of_a_model_that_rotted_are_not_taken(tmp_path: Path) -> None:
    tuned = MODEL[:-1] + b"?"
    store = ModelStore(tmp_path)
    store.path(store.put(MODEL)).write_bytes(b"?" + MODEL[1:])
    digests = manifest_digests(manifest_of(chunked(tuned)))
    store.begin(MANIFEST, digests, len(tuned))
    assert [store.has_chunk(digest) for digest in digests] == [False, True, False]


def test_only_what_is_pinned_stays(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    kept, gone = store.put(MODEL), store.put(OTHER)
    manifest = manifest_of(chunked(MODEL))
    pinned = store.put_chunk(manifest)
    staged(store)
    stray = store.put_chunk(b"of another model")
    store.begin(sha(b"given up"), [sha(b"?")], 1)
    begun(store)
    store.path(sha(b"rotten")).write_bytes(b"?")
    with pytest.raises(Rejected):
        store.open(sha(b"rotten"))
    assert store.collect({kept, sha(b"not here")}, {pinned, sha(b"not here either")}) == 4
    assert (kept in store, gone in store) == (True, False)
    assert here(begun(store)) == [True] * 3
    assert not store.has_chunk(stray)
    assert manifest_digests(store.chunk(pinned)) == DIGESTS
    assert store.collect({kept}) == 2
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
    store = ModelStore(tmp_path, reserve_bytes=1 << 60)
    with pytest.raises(Unavailable, match=f"{len(MODEL)} bytes and a reserve of {1 << 60}"):
        store.require_room(MANIFEST, len(MODEL))
    with pytest.raises(Unavailable, match="bytes are free"):
        store.put(OTHER)
    begun(store).require_room(MANIFEST, len(MODEL))  # it has its room already


def test_a_disk_on_which_a_model_does_not_fit(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES, before[1]))
    try:
        with pytest.raises(Unavailable, match=f"{len(MODEL)} bytes needed"):
            begun(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == []


def test_a_place_that_is_no_folder_needs_a_person(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(Misconfigured, match="models"):
        ModelStore(tmp_path)
