from __future__ import annotations

import hashlib

import pytest

from protocol.errors import Rejected, Unavailable
from protocol.messages import ChunkRequest
from protocol.release import CHUNK_BYTES, chunked, manifest_of
from trainer_host.chunks import (
    ACTIVE_S,
    GATHER_S,
    LEAST_RATE,
    MAX_AHEAD,
    MAX_KNOWN_MODELS,
    MAX_LISTENERS,
    ChunkServer,
    wanted_chunks,
)


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


def drained(server: ChunkServer, now: float = 0.0) -> list[str]:
    """All that the server gives out while everything is acknowledged at once, checked against the topics' names."""
    topics = []
    while (publication := server.next(now)) is not None:
        assert publication.topic == f"fleet/v1/chunks/{digest_of(publication.payload)}"
        topics.append(publication.topic.rpartition("/")[2])
        server.published()
    return topics


def test_gives_the_chunks_that_were_asked_for() -> None:
    model = model_of(10)
    server = ChunkServer(Models(model), gather_s=0.0)
    server.requested(request(model, b"\x05\x02"), 0.0)
    assert drained(server) == [digest_of(chunked(model)[index]) for index in (0, 2, 9)]
    assert server.published_chunks == 3
    assert not server.ignored


def test_an_empty_bitmap_asks_for_the_manifest() -> None:
    model = model_of(3)
    server = ChunkServer(Models(model), gather_s=0.0)
    server.requested(request(model), 0.0)
    assert drained(server) == [digest_of(manifest_of(chunked(model)))]


def test_devices_that_wait_at_the_same_time_share_publications() -> None:
    model = model_of(4)
    server = ChunkServer(Models(model), gather_s=0.0)
    for device in range(100):
        server.requested(request(model, b"\x0f", f"pi-{device}"), 0.0)
        server.requested(request(model, device=f"pi-{device}"), 0.0)
    assert len(drained(server)) == 5
    assert server.merged == 99 * 5


def test_who_asks_after_a_publication_gets_another() -> None:
    model = model_of(1)
    server = ChunkServer(Models(model), gather_s=0.0)
    server.requested(request(model, b"\x01"), 0.0)
    assert server.next(0.0) is not None
    server.requested(request(model, b"\x01"), 0.0)
    assert server.next(0.0) is not None
    assert server.next(0.0) is None


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
    server = ChunkServer(Models(model_of(10)), gather_s=0.0)
    server.requested(ChunkRequest(device="pi", model=digest, wanted=wanted), 0.0)
    assert server.ignored == {reason: 1}
    assert server.next(0.0) is None


def test_the_queue_is_bounded_and_says_what_it_dropped() -> None:
    model = model_of(10)
    server = ChunkServer(Models(model), max_waiting=4, gather_s=0.0)
    server.requested(request(model, b"\xff\x03"), 0.0)
    assert server.waiting == 4
    assert server.ignored == {"overflow": 6}
    assert len(drained(server)) == 4


def test_publications_wait_for_acknowledgements() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), max_in_flight_bytes=2 * CHUNK_BYTES, gather_s=0.0)
    server.requested(request(model, b"\xff"), 0.0)
    assert server.next(0.0) is not None
    assert server.next(0.0) is not None
    assert server.next(0.0) is None
    assert server.in_flight_bytes == 2 * CHUNK_BYTES
    server.published()
    assert server.next(0.0) is not None
    assert server.next(0.0) is None


def test_a_lost_connection_forgets_what_was_in_flight() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), max_in_flight_bytes=CHUNK_BYTES, gather_s=0.0)
    server.requested(request(model, b"\xff"), 0.0)
    assert server.next(0.0) is not None
    assert server.next(0.0) is None
    server.disconnected()
    assert server.next(0.0) is not None


def test_an_acknowledgement_too_many_does_no_harm() -> None:
    server = ChunkServer(Models(), gather_s=0.0)
    server.published()
    assert server.in_flight_bytes == 0


def test_a_model_that_has_gone_is_skipped_and_counted() -> None:
    gone, kept = model_of(2, 1), model_of(1, 2)
    models = Models(gone, kept)
    server = ChunkServer(models, gather_s=0.0)
    server.requested(request(gone, b"\x03"), 0.0)
    server.requested(request(kept, b"\x01"), 0.0)
    del models.models[digest_of(gone)]
    assert drained(server) == [digest_of(kept)]
    assert server.ignored == {"unreadable": 2}


def test_a_model_whose_manifest_cannot_be_read_now_is_counted() -> None:
    class Failing(Models):
        def manifest(self, digest: str) -> bytes:
            raise Unavailable(f"input/output error at {digest}")

    model = model_of(1)
    server = ChunkServer(Failing(model), gather_s=0.0)
    server.requested(request(model, b"\x01"), 0.0)
    assert server.ignored == {"unreadable": 1}
    assert drained(server) == []


def test_manifests_of_recent_models_are_remembered_and_no_more() -> None:
    all_models = [model_of(1, seed) for seed in range(MAX_KNOWN_MODELS + 1)]
    models = Models(*all_models)
    server = ChunkServer(models, gather_s=0.0)
    server.requested(request(all_models[0], b"\x01"), 0.0)
    server.requested(request(all_models[0], b"\x01"), 0.0)
    assert models.manifests_read == 1
    for model in all_models[1:]:
        server.requested(request(model, b"\x01"), 0.0)
    server.requested(request(all_models[0], b"\x01"), 0.0)
    assert models.manifests_read == len(all_models) + 1


def bits(*indices: int, count: int) -> bytes:
    return sum(1 << index for index in indices).to_bytes(-(-count // 8), "little")


def numbers(model: bytes, digests: list[str]) -> list[int]:
    """Indices of the chunks that were given out."""
    known = [digest_of(chunk) for chunk in chunked(model)]
    return [known.index(digest) for digest in digests]


def test_a_stream_begins_a_moment_after_it_was_first_asked_for_so_that_others_can_join() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model))
    server.requested(request(model, bits(0, count=8), "a"), 10.0)
    assert drained(server, 10.0 + GATHER_S / 2) == []
    server.requested(request(model, bits(0, 1, count=8), "b"), 10.0 + GATHER_S / 2)
    assert numbers(model, drained(server, 10.0 + GATHER_S)) == [0, 1]
    server.requested(request(model, bits(2, count=8), "a"), 11.0)
    assert numbers(model, drained(server, 11.0)) == [2]


def test_who_comes_to_a_running_stream_gets_the_manifest_at_once_and_first() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), gather_s=0.0)
    server.requested(request(model, b"\x03", "a"), 0.0)
    server.requested(request(model, device="b"), 0.0)
    assert drained(server)[0] == digest_of(manifest_of(chunked(model)))


def test_models_take_turns() -> None:
    first, second = model_of(3, 1), model_of(3, 2)
    server = ChunkServer(Models(first, second), gather_s=0.0)
    server.requested(request(first, b"\x07"), 0.0)
    server.requested(request(second, b"\x07"), 0.0)
    both = [digest_of(chunk) for pair in zip(chunked(first), chunked(second), strict=True) for chunk in pair]
    assert drained(server) == both


COUNT = 4 * MAX_AHEAD


def running(*devices: str) -> tuple[bytes, ChunkServer, float]:
    """A stream whose allowance is used up, that every device has asked for, and the time."""
    model = model_of(COUNT)
    server = ChunkServer(Models(model), gather_s=0.0)
    for device in devices:
        server.requested(request(model, bits(*range(COUNT), count=COUNT), device), 100.0)
    return model, server, 100.0


def test_a_stream_keeps_within_reach_of_the_slowest_and_goes_on_when_that_one_has_moved() -> None:
    model, server, now = running("fast", "slow")
    first = numbers(model, drained(server, now))
    burst = int(LEAST_RATE / 2)
    assert len(first) == max(MAX_AHEAD, burst)
    asked = bits(*range(8, 24), count=COUNT)
    server.requested(ChunkRequest(device="fast", model=digest_of(model), wanted=asked, last=first[-1]), now)
    assert drained(server, now) == []
    server.requested(ChunkRequest(device="slow", model=digest_of(model), wanted=asked, last=7), now)
    assert numbers(model, drained(server, now)) == list(range(len(first), MAX_AHEAD + 8))


def test_a_stream_waits_for_nobody_for_ever() -> None:
    _, server, now = running("fast", "slow")
    drained(server, now)
    assert drained(server, now + 1 / LEAST_RATE / 2) == []
    assert len(drained(server, now + 1 / LEAST_RATE + 1e-6)) == 1
    passed = [len(drained(server, now + 0.25 * turn)) for turn in range(1, 9)]
    assert abs(sum(passed) - (2 * LEAST_RATE - 1)) <= 1


def test_who_has_not_asked_for_a_while_and_who_has_all_is_not_waited_for() -> None:
    for leaves in (True, False):
        model, server, now = running("fast", "slow")
        drained(server, now)
        if leaves:
            server.requested(request(model, bytes(COUNT // 8), "slow"), now)
        else:
            now += ACTIVE_S + 0.1
        everything = bits(*range(COUNT), count=COUNT)
        server.requested(ChunkRequest(device="fast", model=digest_of(model), wanted=everything, last=47), now)
        assert len(drained(server, now)) >= MAX_AHEAD


def test_what_is_on_its_way_to_a_device_is_not_sent_again_and_what_it_lost_is() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), gather_s=0.0)
    server.requested(request(model, b"\xff"), 0.0)
    assert numbers(model, drained(server)) == list(range(8))

    def asks(*indices: int, last: int | None) -> list[int]:
        wanted = bits(*indices, count=8)
        server.requested(ChunkRequest(device="pi", model=digest_of(model), wanted=wanted, last=last), 0.0)
        return numbers(model, drained(server))

    assert asks(2, 4, 5, last=3) == [2]  # it was passed by what came
    assert asks(2, 5, last=4) == []
    assert asks(2, 5, last=None) == [2, 5]  # it has waited in vain
    assert asks(7, last=5) == [7]


def test_of_two_publications_of_a_chunk_a_device_is_taken_to_have_the_earlier_one_that_was_new_to_it() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), gather_s=0.0)
    server.requested(request(model, b"\x0f", "slow"), 0.0)
    drained(server)
    server.requested(request(model, b"\x01", "other"), 0.0)  # chunk 0 once more, as the fifth publication
    drained(server)
    server.requested(ChunkRequest(device="slow", model=digest_of(model), wanted=b"\x0e", last=0), 0.0)
    assert drained(server) == []


def test_a_host_that_has_forgotten_what_it_published_sends_what_is_asked_for() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), gather_s=0.0)
    server.requested(ChunkRequest(device="pi", model=digest_of(model), wanted=b"\x03", last=5), 0.0)
    assert numbers(model, drained(server)) == [0, 1]
    server.requested(ChunkRequest(device="pi", model=digest_of(model), wanted=b"\x04", last=-7), 0.0)
    assert numbers(model, drained(server)) == [2]


def test_no_more_devices_are_remembered_than_there_is_room_for() -> None:
    model = model_of(8)
    server = ChunkServer(Models(model), gather_s=0.0)
    for number in range(MAX_LISTENERS + 10):
        server.requested(request(model, b"\x01", f"pi-{number}"), 0.0)
    assert server.listeners == MAX_LISTENERS


@pytest.mark.parametrize(
    ("wanted", "count", "expected"),
    [(b"", 9, []), (b"\x01", 1, [0]), (b"\x81", 8, [0, 7]), (b"\x00\x01", 9, [8]), (b"\x00", 3, [])],
)
def test_bitmaps_are_read_from_the_lowest_bit(wanted: bytes, count: int, expected: list[int]) -> None:
    assert wanted_chunks(wanted, count) == expected
