"""The stager as the supervisor starts it, with a real Mosquitto and the real chunk server over a signed repository."""

from __future__ import annotations

import base64
import os
import resource
import select
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from edge_agent.children import Child, start
from edge_agent.model_store import ModelStore
from edge_agent.staging import (
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Progress,
    Qualifying,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
)
from protocol import topics
from protocol.codec import Decoder
from protocol.features import Feature, FeatureSpec
from protocol.link import Broker, Link, Message
from protocol.messages import ChunkRequest
from protocol.release import CHUNK_BYTES, Golden, Release, Tensor, chunked, manifest_of
from trainer_host import keys
from trainer_host.chunks import ChunkServer, Publication
from trainer_host.private_broker import PrivateBroker
from trainer_host.repository import Repository, identity_of

# One FULLY_CONNECTED operator: scores = [[1, 2, 3], [-1, 0, 1]] features + [0.5, -0.5].
MODEL = zlib.decompress(
    base64.b85decode(
        "c-mc3!AiqG5FL}!rWk64AVoa%;K750w&KN$LO~QNi1cC))<9AX#8ld}c<j*+@F;$T-U_{zet=&f2;#vnFuvK0p=9Y}cHh34*?EmY"
        "MD63&-urJHTiEATh%8{L5$QM=fN$Ufm;%qh6A-Z$xQgSL<26vGWEoTfazMguD>kpVyyWpRsX`VMCKwavw@Rn|dD)qBUrltZZ`h5x"
        "T_ajZFRod)_nAu94&MJI_eMe;0<&!2in^Nc-4TAkWJbaTsBsUh;dItIy{I<(;n*8Qo@)~<Axr5>>8rVJN%$@Czy)rl*PY{soUxp1"
        "srQ?-D!JmBVaomo{aLRI{_{17x<ry5bKn6uS^7U%QkHtmRrwzLI^wxAi2TU!ho0MXg5aRGRGZ^VCSRBM2%h(j>!#X8Mytu3ui*K+"
        "fqlcMTUWf6&a<KXBXKZU1+dAemek-LyXyTpHNz$_^af);yy?1L&lv?#x92(0Xy6Tbh^#+l^?k9=iBs%vG3inK1K%QMGX"
    )
)

DEADLINE_S = 30.0


def large_model() -> bytes:
    """A megabyte that the runtime takes: what follows the flatbuffer is not looked at."""
    return MODEL + os.urandom(1_000_000)


def release_of(model: bytes, version: int = 1) -> Release:
    return Release(
        slot="combat",
        version=version,
        **identity_of(model),
        inputs=(Tensor(name="serving_default_features:0", shape=(1, 3), dtype="float32"),),
        outputs=(Tensor(name="PartitionedCall:0", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=tuple(Feature(path=name) for name in "abc")),
        golden=Golden(inputs=((1.0, 1.0, 1.0),), outputs=((6.5, -0.5),), tolerance=1e-5),
    )


class Host:
    """The chunk server on a connection of its own, in a thread; `meddle` may drop or alter what it sends."""

    def __init__(self, broker: Broker, repository: Repository) -> None:
        self.server = ChunkServer(repository, gather_s=0.0)
        self.meddle: Callable[[Publication], Publication | None] = lambda publication: publication
        self.requests: list[ChunkRequest] = []
        self.deaf_to: set[str] = set()
        self._decoder: Decoder[ChunkRequest] = Decoder(ChunkRequest)
        self._link = Link(
            broker,
            "trainer-host",
            on_message=self._requested,
            on_published=lambda _: self.server.published(),
            on_subscribed=lambda _: self._listening.set(),
        )
        self._link.subscribe((topics.CHUNK_REQUESTS, 1))
        self._listening = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._listening.wait(DEADLINE_S)

    def heard_from(self, device: str) -> bool:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and not any(request.device == device for request in self.requests):
            time.sleep(0.01)
        return any(request.device == device for request in self.requests)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _requested(self, message: Message) -> None:
        request = self._decoder.decode(message.payload)
        self.requests.append(request)
        if request.device in self.deaf_to:
            return
        self.server.requested(request, time.monotonic())

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._link.turn(0.02)
            while self._link.connected and (publication := self.server.next(time.monotonic())) is not None:
                sent = self.meddle(publication)
                if sent is None:
                    self.server.published()
                else:
                    self._link.publish(sent.topic, sent.payload, qos=1)
        self._link.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    keys.init(tmp_path / "keys", None)
    made = Repository(tmp_path / "repository", keys.load_signers(tmp_path / "keys"))
    made.create(datetime.now(UTC))
    return made


@pytest.fixture
def host(broker: PrivateBroker, repository: Repository) -> Iterator[Host]:
    running = Host(Broker(port=broker.port), repository)
    yield running
    running.stop()


def settings_of(tmp_path: Path, broker: PrivateBroker, repository: Repository) -> StagerSettings:
    (tmp_path / "root.json").write_bytes(repository.root())
    (tmp_path / "metadata").write_bytes(repository.metadata_set())
    return StagerSettings(
        device="pi-1",
        folder=str(tmp_path / "store"),
        trust_folder=str(tmp_path / "trust"),
        root_file=str(tmp_path / "root.json"),
        metadata_file=str(tmp_path / "metadata"),
        built_at=0.0,
        broker=Broker(port=broker.port),
        reserve_bytes=0,
        window=4,
        timeout_s=0.5,
        attempts=6,
    )


class Stagers:
    """Starts stagers, and ends those that are left."""

    def __init__(self) -> None:
        self.children: list[Child[FromStager]] = []

    def start(self, settings: StagerSettings) -> Child[FromStager]:
        child: Child[FromStager] = start("stager", settings, FromStager, "stager")
        self.children.append(child)
        return child


@pytest.fixture
def stagers() -> Iterator[Stagers]:
    made = Stagers()
    yield made
    for child in made.children:
        child.kill()


def heard(child: Child[FromStager], until: type) -> list[FromStager]:
    """All that the stager says up to the first message of a type."""
    said: list[FromStager] = []
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and not child.channel.closed:
        select.select([child.channel], [], [], 0.1)
        said += child.channel.receive()
        if any(isinstance(message, until) for message in said):
            return said
    raise AssertionError(f"no {until.__name__}, but {said}")


def has_ended(child: Child[FromStager]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and not child.has_ended():
        time.sleep(0.01)
    return child.has_ended()


def test_a_model_arrives_though_one_chunk_is_dropped_and_one_altered(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    faults = {topics.chunk(digest): kind for digest, kind in zip(_digests(model)[3:5], ("drop", "alter"), strict=True)}

    def meddle(publication: Publication) -> Publication | None:
        fault = faults.pop(publication.topic, None)
        if fault == "drop":
            return None
        if fault == "alter":
            return Publication(publication.topic, publication.payload[:-1] + b"!")
        return publication

    host.meddle = meddle
    child = stagers.start(settings_of(tmp_path, broker, repository))
    (verified,) = heard(child, MetadataVerified)
    assert isinstance(verified, MetadataVerified)
    assert (verified.version, verified.releases) == (2, (release,))
    child.channel.send(StageModel(release.digest))
    said = heard(child, Staged)
    assert faults == {}
    assert said[-1] == Staged(release.digest)
    progress = [message for message in said if isinstance(message, Progress)]
    assert said[-2:] == [Qualifying(release.digest), Staged(release.digest)]
    assert len(progress) == len(said) - 2
    assert (progress[-1].digest, progress[-1].bytes, progress[-1].total) == (release.digest, len(model), len(model))
    assert [message.bytes for message in progress] == sorted(message.bytes for message in progress)
    assert ModelStore(tmp_path / "store").open(release.digest) == model
    assert host.server.published_chunks == release.chunk_count + 1 + 2
    assert {request.device for request in host.requests} == {"pi-1"}
    child.channel.send(Quit())
    assert has_ended(child)
    assert child.how_it_ended() == "exit status 0"


def test_what_is_on_disk_is_not_fetched_again(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    settings = settings_of(tmp_path, broker, repository)
    store = ModelStore(tmp_path / "store")
    for chunk in chunked(model)[2:]:
        store.put_chunk(chunk)
    child = stagers.start(settings)
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    heard(child, Staged)
    assert host.server.published_chunks == 2 + 1


def test_a_stager_that_is_killed_half_way_is_followed_by_one_that_resumes(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    settings = settings_of(tmp_path, broker, repository)
    withheld = set(map(topics.chunk, _digests(model)[8:]))
    begin = model[: 8 * CHUNK_BYTES]
    host.meddle = lambda publication: None if publication.topic in withheld else publication
    first = stagers.start(settings)
    heard(first, MetadataVerified)
    first.channel.send(StageModel(release.digest))
    part = tmp_path / "store" / "models" / f"{release.manifest}.part"
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and (not part.exists() or part.read_bytes()[: len(begin)] != begin):
        time.sleep(0.01)
    first.kill()
    withheld.clear()
    before = host.server.published_chunks
    second = stagers.start(settings)
    heard(second, MetadataVerified)
    second.channel.send(StageModel(release.digest))
    heard(second, Staged)
    # What the first had asked for may still have been on its way; the rest is what was withheld.
    assert host.server.published_chunks - before <= release.chunk_count - 8 + settings.window
    assert ModelStore(tmp_path / "store").open(release.digest) == model


def test_a_fine_tuned_model_costs_the_chunks_that_differ_from_the_one_that_is_here(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    older = large_model()
    newer = older[: 12 * CHUNK_BYTES + 100] + os.urandom(len(older) - 12 * CHUNK_BYTES - 100)
    release = release_of(newer)
    repository.release(release, newer, datetime.now(UTC))
    store = ModelStore(tmp_path / "store")
    store.put(older)
    child = stagers.start(settings_of(tmp_path, broker, repository))
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    heard(child, Staged)
    assert host.server.published_chunks == 1 + release.chunk_count - 12
    assert [path.name for path in (tmp_path / "store" / "chunks").iterdir()] == [release.manifest]
    assert store.open(release.digest) == newer


@pytest.mark.linux
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
def test_a_disk_that_is_full_postpones_the_model_and_room_is_all_it_takes(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    child = stagers.start(settings_of(tmp_path, broker, repository))
    heard(child, MetadataVerified)
    unlimited = resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (len(model) // 2, resource.RLIM_INFINITY))
    child.channel.send(StageModel(release.digest))
    postponed = heard(child, Postponed)[-1]
    assert isinstance(postponed, Postponed)
    assert (postponed.digest, postponed.reason) == (release.digest, "no_space")
    assert list((tmp_path / "store" / "models").iterdir()) == []
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, unlimited)
    child.channel.send(StageModel(release.digest))
    assert heard(child, Staged)[-1] == Staged(release.digest)
    assert host.server.published_chunks == 1 + release.chunk_count


def test_a_second_stager_waits_for_one_that_is_ending(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    """The first one's supervisor was killed, say: it goes on for a moment, and then sees that it is alone."""
    settings = settings_of(tmp_path, broker, repository)
    first = stagers.start(settings)
    heard(first, MetadataVerified)
    second = stagers.start(settings)
    select.select([second.channel], [], [], 2.0)
    assert second.channel.receive() == []
    first.channel.close()
    assert [type(message) for message in heard(second, MetadataVerified)] == [MetadataVerified]
    assert has_ended(first)


def test_a_rate_limit_is_kept(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    """A megabyte at 400 kB/s, of which the first second's come at once: 1.5 s at least."""
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    child = stagers.start(msgspec.structs.replace(settings_of(tmp_path, broker, repository), max_rate=400_000))
    heard(child, MetadataVerified)
    began = time.monotonic()
    child.channel.send(StageModel(release.digest))
    heard(child, Staged)
    assert time.monotonic() - began >= (len(model) - 400_000 - CHUNK_BYTES) / 400_000


def test_what_another_device_asks_for_is_taken(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    """Two devices, one of which may ask for nothing: it gets all the same what it listens to."""
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    host.deaf_to.add("pi-2")
    here = settings_of(tmp_path, broker, repository)
    asking = msgspec.structs.replace(here, window=8, ahead=0)
    listening = msgspec.structs.replace(
        here,
        device="pi-2",
        folder=str(tmp_path / "other"),
        trust_folder=str(tmp_path / "other-trust"),
        window=4,
        ahead=12,
        attempts=60,
    )
    both = [stagers.start(listening), stagers.start(asking)]
    for child in both:
        heard(child, MetadataVerified)
    ModelStore(tmp_path / "other").put_chunk(manifest_of(chunked(model)))
    both[0].channel.send(StageModel(release.digest))
    assert host.heard_from("pi-2")
    both[1].channel.send(StageModel(release.digest))
    for child in both:
        assert heard(child, Staged)[-1] == Staged(release.digest)
    assert host.server.published_chunks == 1 + release.chunk_count


def test_a_chunk_that_is_wrong_each_time_postpones_the_model(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    wrong = topics.chunk(_digests(model)[5])
    host.meddle = lambda publication: (
        Publication(wrong, bytes(CHUNK_BYTES)) if publication.topic == wrong else publication
    )
    child = stagers.start(settings_of(tmp_path, broker, repository))
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    postponed = heard(child, Postponed)[-1]
    assert isinstance(postponed, Postponed)
    assert (postponed.digest, postponed.reason) == (release.digest, "chunk_mismatch")
    assert release.digest not in ModelStore(tmp_path / "store")


def test_a_host_that_does_not_answer_postpones_the_model_and_the_next_one_is_staged(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    host.meddle = lambda _: None
    settings = msgspec.structs.replace(settings_of(tmp_path, broker, repository), timeout_s=0.1, attempts=2)
    child = stagers.start(settings)
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    postponed = heard(child, Postponed)[-1]
    assert isinstance(postponed, Postponed)
    assert (postponed.digest, postponed.reason) == (release.digest, "no_answer")
    host.meddle = lambda publication: publication
    child.channel.send(StageModel(release.digest))
    assert heard(child, Staged)[-1] == Staged(release.digest)


def test_a_model_that_is_not_what_it_says_is_refused_after_its_transfer(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = os.urandom(3 * CHUNK_BYTES)
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    child = stagers.start(settings_of(tmp_path, broker, repository))
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    refused = heard(child, Refused)[-1]
    assert isinstance(refused, Refused)
    assert (refused.digest, refused.reason) == (release.digest, "bad_model")


def test_a_replayed_older_set_is_refused_by_name(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, stagers: Stagers
) -> None:
    settings = settings_of(tmp_path, broker, repository)
    older = repository.metadata_set()
    repository.release(release_of(MODEL), MODEL, datetime.now(UTC))
    Path(settings.metadata_file).write_bytes(repository.metadata_set())
    first = stagers.start(settings)
    heard(first, MetadataVerified)
    first.channel.send(Quit())
    assert has_ended(first)
    Path(settings.metadata_file).write_bytes(older)
    second = stagers.start(settings)
    refused = heard(second, MetadataRefused)[-1]
    assert isinstance(refused, MetadataRefused)
    assert refused.reason == "rolled_back"
    assert has_ended(second)


def test_a_stager_whose_supervisor_goes_away_in_the_middle_ends(
    tmp_path: Path, broker: PrivateBroker, repository: Repository, host: Host, stagers: Stagers
) -> None:
    model = large_model()
    release = release_of(model)
    repository.release(release, model, datetime.now(UTC))
    asked = threading.Event()

    def withhold(publication: Publication) -> None:
        asked.set()

    host.meddle = withhold
    settings = msgspec.structs.replace(settings_of(tmp_path, broker, repository), timeout_s=60.0)
    child = stagers.start(settings)
    heard(child, MetadataVerified)
    child.channel.send(StageModel(release.digest))
    assert asked.wait(DEADLINE_S)
    child.channel.close()
    assert has_ended(child)
    assert child.how_it_ended() == "exit status 0"


def _digests(model: bytes) -> list[str]:
    manifest = manifest_of(chunked(model))
    return [manifest[start : start + 32].hex() for start in range(0, len(manifest), 32)]
