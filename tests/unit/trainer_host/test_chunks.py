from __future__ import annotations

import hashlib

import pytest

from protocol.errors import Rejected
from protocol.messages import ChunkRequest
from protocol.release import CHUNK_BYTES, chunked, manifest_of
from trainer_host.chunks import MAX_KNOWN_MODELS, ChunkServer, wanted_chunks


class Models:
    """Models in memory."""

    def __init__(self, *models: bytes) -> None:
        self.models = {hashlib.sha256(model).hexdigest(): chunked(model) for model in models}
        self.manifests_read = 0

    def manifest(self, digest: str) -> bytes:
        self.manifests_read += 1
        return manifest_of(self._chunks(digest))

    def chunk(self, digest: str, index: int) -> bytes:
        return self._chunks(digest)[index]

    def _chunks(self, digest: str) -> list[bytes]:
        if digest not in self.models:
            raise Rejected("unknown_model", digest)
        return self.models[digest]


def model_of(count: int, seed: int = 0) -> bytes:
    return b"".join(bytes([seed, index]) * (CHUNK_BYTES // 2) for index in range(count))


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def request(model: bytes, wanted: bytes = b"", device: str = "pi") -> ChunkRequest:
    return ChunkRequest(device=device, model=digest_of(model), wanted=wanted)


def drained(server: ChunkServer) -> list[str]:
    """All that the server gives out while everything is acknowledged at once, checked against the topics' names."""
    topics = []
    while (publication := server.next()) is not None:
        assert publication.topic == f"fleet/v1/chunks/{digest_of(publication.payload)}"
        topics.append(publication.topic.rpartition("/")[2])
        server.published()
    return topics


def test_gives_the_chunks_that_were_asked_for() -> None:
    model = model_of(10)
    server = ChunkServer(Models(model))
    server.requested(request(model, b"\x05\x02"))
    assert drained(server) == [digest_of(chunked(model)[index]) for index in (0, 2, 9)]
    assert server.published_chunks == 3
    assert not server.ignored


def test_an_empty_bitmap_asks_for_the_manifest() -> None:
    model = model_of(3)
    server = ChunkServer(Models(model))
    server.requested(request(model))
    assert drained(server) == [digest_of(manifest_of(chunked(model)))]


def test_devices_that_wait_at_the_same_time_share_publications() -> None:
    model = model_of(4)
    server = ChunkServer(Models(model))
    for device in range(100):
        server.requested(request(model, b"\x0f", f"pi-{device}"))
        server.requested(request(model, device=f"pi-{device}"))
    assert len(drained(server)) == 5
    assert server.merged == 99 * 5


def test_who_asks_after_a_publication_gets_another() -> None:
    model = model_of(1)
    server = ChunkServer(Models(model))
    server.requested(request(model, b"\x01"))
    assert server.next() is not None
    server.requested(request(model, b"\x01"))
    assert server.next() is not None
    assert server.next() is None


@pytest.mark.parametrize(
    ("digest", "wanted", "reason"),
    [
        ("0" * 64, b"", "unknown_model"),
        ("../../etc/passwd", b"", "bad_digest"),
        (digest_of(model_of(10)), b"\x01", "bad_bitmap"),
        (digest_of(model_of(10)), b"\x01\x00\x00", "bad_bitmap"),
        (digest_of(model_of(10)), b"\x01\x04", "bad_bitmap"),
    ],
)
def test_requests_that_make_no_sense_are_counted(digest: str, wanted: bytes, reason: str) -> None:
    server = ChunkServer(Models(model_of(10)))
    server.requested(ChunkRequest(device="pi", model=digest, wanted=wanted))
    assert server.ignored == {reason: 1}
    assert server.next() is None


def test_the_queue_is_bounded_and_says_what_it_dropped() -> None:
    model = model_of(10)
    server = ChunkServer(Models(model), max_waiting=4)
    server.requested(request(model, b"\xff\x03"))
    assert server.waiting == 4
    assert server.ignored == {"overflow": 6}
    assert len(drained(server)) == 4


def test_publications_wait_for_acknowledgements() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), max_in_flight_bytes=2 * CHUNK_BYTES)
    server.requested(request(model, b"\xff"))
    assert server.next() is not None
    assert server.next() is not None
    assert server.next() is None
    assert server.in_flight_bytes == 2 * CHUNK_BYTES
    server.published()
    assert server.next() is not None
    assert server.next() is None


def test_a_lost_connection_forgets_what_was_in_flight() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), max_in_flight_bytes=CHUNK_BYTES)
    server.requested(request(model, b"\xff"))
    assert server.next() is not None
    assert server.next() is None
    server.disconnected()
    assert server.next() is not None


def test_an_acknowledgement_too_many_does_no_harm() -> None:
    server = ChunkServer(Models())
    server.published()
    assert server.in_flight_bytes == 0


def test_a_model_that_has_gone_is_skipped_and_counted() -> None:
    gone, kept = model_of(2, 1), model_of(1, 2)
    models = Models(gone, kept)
    server = ChunkServer(models)
    server.requested(request(gone, b"\x03"))
    server.requested(request(kept, b"\x01"))
    del models.models[digest_of(gone)]
    assert drained(server) == [digest_of(kept)]
    assert server.ignored == {"unreadable": 2}


def test_manifests_of_recent_models_are_remembered_and_no_more() -> None:
    all_models = [model_of(1, seed) for seed in range(MAX_KNOWN_MODELS + 1)]
    models = Models(*all_models)
    server = ChunkServer(models)
    server.requested(request(all_models[0], b"\x01"))
    server.requested(request(all_models[0], b"\x01"))
    assert models.manifests_read == 1
    for model in all_models[1:]:
        server.requested(request(model, b"\x01"))
    server.requested(request(all_models[0], b"\x01"))
    assert models.manifests_read == len(all_models) + 1


@pytest.mark.parametrize(
    ("wanted", "count", "expected"),
    [(b"", 9, []), (b"\x01", 1, [0]), (b"\x81", 8, [0, 7]), (b"\x00\x01", 9, [8]), (b"\x00", 3, [])],
)
def test_bitmaps_are_read_from_the_lowest_bit(wanted: bytes, count: int, expected: list[int]) -> None:
    assert wanted_chunks(wanted, count) == expected
