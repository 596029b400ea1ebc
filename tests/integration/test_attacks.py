"""Attacks on updates, through the real stager and through the whole agent.

Each ends in a refusal that says what is wrong, and changes nothing for the next honest set. What the agent serves
meanwhile is asked of an agent that is attacked again and again.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from tuf.api.metadata import Metadata

from edge_agent.model_store import ModelStore
from edge_agent.staging import MetadataRefused, MetadataVerified, Postponed, Refused, Staged
from edge_agent.trust import Trust, Verified, decoded_set
from protocol import topics
from protocol.codec import MAX_PAYLOAD_BYTES, encode
from protocol.link import Broker
from protocol.messages import MetadataSet
from protocol.release import CHUNK_BYTES, Release, chunked, manifest_of
from protocol.wishes import Pin, Withdrawal, desired
from tests.integration.staging_world import DEVICE, StagingWorld
from tests.integration.world import MODELS, SLOT, World, release_of
from tests.signing import NOW, ROLES, Host, new_keys, release, target_of
from trainer_host import keys
from trainer_host.chunks import ChunkServer
from trainer_host.private_broker import PrivateBroker
from trainer_host.repository import Repository

ECHO = (MODELS / "echo.tflite").read_bytes()
TWIN = (MODELS / "twin.tflite").read_bytes()

TEN_YEARS_S = 10 * 365 * 86400

# An attacker holds all keys, uses those that he needs, and knows the sets that are published.
Attack = Callable[[Host, MetadataSet, MetadataSet], "MetadataSet | bytes"]


def replaced(metadata: MetadataSet, **documents: object) -> MetadataSet:
    return msgspec.structs.replace(metadata, **documents)


def unsigned(role: str) -> Attack:
    return lambda thief, _old, _new: counted(thief).set(**{role: []})


def by_a_stranger(role: str) -> Attack:
    return lambda thief, _old, _new: counted(thief).set(**{role: new_keys()[role]})


def by_too_few(role: str) -> Attack:
    return lambda thief, _old, _new: counted(thief).set(**{role: thief.keys[role][:1]})


def expired(role: str) -> Attack:
    def attack(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
        counted(thief)
        getattr(thief, role).expires = NOW - timedelta(hours=1)
        if role == "root":
            thief.next_root(thief.keys["root"])
        return thief.set()

    return attack


def counted(thief: Host) -> Host:
    thief.count_up()
    return thief


def rolled_back_timestamp(_thief: Host, old: MetadataSet, _new: MetadataSet) -> MetadataSet:
    return old


def rolled_back_snapshot(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
    """With the timestamp's key."""
    thief.timestamp.version += 1
    thief.snapshot.version -= 2
    return thief.set()


def rolled_back_targets(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
    """With the snapshot's key, too."""
    thief.timestamp.version += 1
    thief.snapshot.version += 1
    thief.targets.version -= 2
    return thief.set()


def rolled_back_root(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
    """The first root again in the place of the second."""
    thief.roots.append(thief.roots[0])
    return counted(thief).set()


def mixed(role: str) -> Attack:
    return lambda thief, old, _new: replaced(counted(thief).set(), **{role: getattr(old, role)})


def swapped(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
    """Two slots' models change places, without the targets' key."""
    new = counted(thief).set()
    targets = new.targets.replace(b"combat/", b"COMBAT/").replace(b"movement/", b"combat/")
    return replaced(new, targets=targets.replace(b"COMBAT/", b"movement/"))


def wrong_length(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
    new = counted(thief).set()
    return replaced(new, targets=re.sub(rb'"length": ?\d+', b'"length":9', new.targets))


def with_a_new_root(signers: Callable[[Host, Host], list[object]]) -> Attack:
    def attack(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
        before = Host(thief.keys)
        thief.replace_keys("root")
        thief.next_root(signers(before, thief))  # type: ignore[arg-type]
        return counted(thief).set()

    return attack


def too_long(role: str) -> Attack:
    return lambda thief, _old, _new: replaced(counted(thief).set(), **{role: b" " * (MAX_PAYLOAD_BYTES // 2)})


def another_kind(role: str, other: str) -> Attack:
    return lambda thief, _old, new: replaced(new, **{role: getattr(counted(thief).set(), other)})


def a_release_of_his_own(thief: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
    """With the keys that lie on the host: those of timestamp and snapshot."""
    counted(thief).targets.targets = {release(9).target: target_of(release(9))}
    return thief.set(targets=thief.keys["timestamp"])


ATTACKS: dict[str, tuple[Attack, str, str]] = {
    **{f"unsigned {role}": (unsigned(role), "unsigned", role) for role in ("timestamp", "snapshot", "targets")},
    **{f"{role} by a stranger": (by_a_stranger(role), "bad_signature", role) for role in ROLES[1:]},
    **{f"expired {role}": (expired(role), "expired", role) for role in ROLES if role != "root"},
    "rolled back timestamp": (rolled_back_timestamp, "rolled_back", "timestamp"),
    "rolled back snapshot": (rolled_back_snapshot, "rolled_back", "snapshot"),
    "rolled back targets": (rolled_back_targets, "rolled_back", "targets"),
    "rolled back root": (rolled_back_root, "bad_root", "root"),
    "mixed snapshot": (mixed("snapshot"), "mixed", "snapshot"),
    "mixed targets": (mixed("targets"), "mixed", "targets"),
    "swapped slots": (swapped, "bad_signature", "targets"),
    "wrong length": (wrong_length, "bad_signature", "targets"),
    "root by the old keys only": (with_a_new_root(lambda old, _: [*old.keys["root"]]), "bad_root", "root"),
    "root by the new keys only": (with_a_new_root(lambda _, new: [*new.keys["root"]]), "bad_root", "root"),
    "long timestamp": (too_long("timestamp"), "too_long", "timestamp"),
    "long snapshot": (too_long("snapshot"), "too_long", "snapshot"),
    "long targets": (too_long("targets"), "malformed", "targets"),
    "targets for a timestamp": (another_kind("timestamp", "targets"), "too_long|malformed", "timestamp"),
    "a release with the host's keys": (a_release_of_his_own, "bad_signature", "targets"),
    "a payload above the limit": (lambda *_: b"\x81" * (MAX_PAYLOAD_BYTES + 1), "too_long", "metadata"),
    "a payload that is none": (lambda *_: b"\x00nonsense", "malformed", ""),
    "an empty payload": (lambda *_: b"", "malformed", ""),
}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def make_staging(tmp_path: Path, broker: PrivateBroker) -> Iterator[Callable[[Host], StagingWorld]]:
    made: list[StagingWorld] = []

    def make(host: Host) -> StagingWorld:
        made.append(StagingWorld(tmp_path, host, Broker(port=broker.port)))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def staging(make_staging: Callable[[Host], StagingWorld]) -> StagingWorld:
    return make_staging(Host())


def accepted(staging: StagingWorld, metadata: MetadataSet) -> Verified:
    """As a stager would, without the time that it takes to start one."""
    return Trust(staging.trust_folder, staging.host.roots[0]).verify(metadata, datetime.now(UTC))


def assert_refused(said: object, reason: str, role: str) -> None:
    assert isinstance(said, MetadataRefused)
    assert said.reason in reason.split("|"), said.text
    assert role in said.text


@pytest.mark.parametrize("name", ATTACKS)
def test_a_forged_set_is_refused_by_name_and_the_next_honest_one_is_taken(staging: StagingWorld, name: str) -> None:
    attack, reason, role = ATTACKS[name]
    host = staging.host
    old = host.publish(release(1), release(1, "movement"))
    new = host.publish(release(2), release(2, "movement"))
    accepted(staging, new)
    thief = Host(host.keys, new)
    thief.roots = list(host.roots)
    assert_refused(staging.look_at(attack(thief, old, new)), reason, role)
    host.count_up(10)
    assert accepted(staging, host.publish(release(3))).releases == (release(3),)


@pytest.mark.parametrize("role", ROLES[1:])
def test_one_signature_where_two_are_needed_is_too_few(make_staging: Callable[[Host], StagingWorld], role: str) -> None:
    host = Host()
    host.need_two(role)
    staging = make_staging(host)
    assert_refused(staging.look_at(by_too_few(role)(host, host.set(), host.set())), "bad_signature", role)
    said = staging.look_at(host.publish(release(1)))
    assert isinstance(said, MetadataVerified), said


def test_one_signature_where_two_are_needed_is_too_few_for_a_root(make_staging: Callable[[Host], StagingWorld]) -> None:
    host = Host()
    host.need_two("root")
    staging = make_staging(host)
    host.next_root(host.keys["root"][:1])
    assert_refused(staging.look_at(host.publish(release(1))), "bad_root", "root")
    host.roots[1:] = []
    host.root.version = 1
    host.next_root(host.keys["root"])
    assert isinstance(staging.look_at(host.publish(release(1))), MetadataVerified)


def test_an_expired_root_is_refused_until_a_newer_one_comes(staging: StagingWorld) -> None:
    host = staging.host
    accepted(staging, host.publish(release(1)))
    expires = host.root.expires
    assert_refused(staging.look_at(expired("root")(host, host.set(), host.set())), "expired", "root")
    host.root.expires = expires
    host.next_root(host.keys["root"])
    assert isinstance(staging.look_at(host.publish(release(2))), MetadataVerified)


# What is signed, and is no release for this device.


@pytest.mark.parametrize(
    "path", ["../../x", "/etc/passwd", "combat/../movement/2.tflite", "movement/2.tflite", "combat/3.tflite"]
)
def test_a_signed_release_under_the_wrong_path_is_left_out_and_cannot_be_staged(
    staging: StagingWorld, path: str
) -> None:
    """`movement/2.tflite` describes combat's version 2: two slots swapped by someone with the targets' key."""
    host = staging.host
    host.count_up()
    host.targets.targets = {release(1).target: target_of(release(1)), path: target_of(release(2), path)}
    said = staging.look_at(host.set())
    assert isinstance(said, MetadataVerified)
    assert said.releases == (release(1),)
    assert [(one.target, one.reason) for one in said.refused] == [(path, "bad_release")]
    refused = staging.stage(host.set(), release(2).digest)
    assert isinstance(refused, Refused)
    assert refused.reason == "not_released"
    assert not list(staging.trust_folder.parent.rglob("passwd"))


def test_a_digest_that_no_signed_release_names_is_not_fetched(staging: StagingWorld) -> None:
    """Be it another device's, an older one's, or nobody's."""
    staging.models[release(2).digest] = ECHO
    refused = staging.stage(staging.host.publish(release(1)), release(2).digest)
    assert refused == Refused(release(2).digest, "not_released", "no signed release names it")
    assert staging.requests == []


def test_wishes_for_other_devices_are_not_taken(staging: StagingWorld) -> None:
    others = (
        Pin(slot=SLOT, version=1, devices=("pi-2",)),
        Pin(slot=SLOT, version=1, groups=("arena",)),
        Withdrawal(slot=SLOT, version=2, devices=("pi-2", f"{DEVICE}-x", DEVICE.upper())),
    )
    staging.host.wish(*others)
    said = staging.look_at(staging.host.publish(release(1), release(2)))
    assert isinstance(said, MetadataVerified)
    assert said.wishes == others
    wanted = desired(said.wishes, SLOT, DEVICE, ["lab"])
    assert (wanted.pin, wanted.withdrawn) == (None, {})


def test_wishes_that_somebody_without_the_targets_key_wrote_are_not_taken(staging: StagingWorld) -> None:
    host = staging.host
    accepted(staging, host.publish(release(1)))
    host.count_up()
    host.wish(Withdrawal(slot=SLOT, version=1))
    assert_refused(staging.look_at(host.set(targets=host.keys["snapshot"])), "bad_signature", "targets")


# A thief with the timestamp's key.


def test_a_thief_of_the_timestamps_key_can_freeze_and_not_install_and_a_new_key_ends_it(staging: StagingWorld) -> None:
    host = staging.host
    first = host.publish(release(1))
    accepted(staging, first)
    thief = Host(host.keys, first)
    thief.timestamp.version = 2**31
    thief.timestamp.expires = NOW + timedelta(days=3650)
    frozen = replaced(first, timestamp=thief.signed(thief.timestamp, thief.keys["timestamp"]))
    said = staging.look_at(frozen)
    assert isinstance(said, MetadataVerified)
    assert said.releases == (release(1),)
    assert_refused(staging.look_at(host.publish(release(2))), "rolled_back", "timestamp")
    thief.targets.targets = {release(9).target: target_of(release(9))}
    forged = counted(thief).set(snapshot=host.keys["timestamp"], targets=host.keys["timestamp"])
    assert_refused(staging.look_at(forged), "bad_signature", "snapshot")
    host.rotate("timestamp")
    said = staging.look_at(host.publish(release(2)))
    assert isinstance(said, MetadataVerified), said
    assert said.releases == (release(2),)


# Models and their chunks.


def model_of(size: int) -> tuple[Release, bytes]:
    """A model that the runtime takes; what follows the flatbuffer is not looked at."""
    model = ECHO + bytes(index * 7 % 251 for index in range(size - len(ECHO)))
    return release_of(model, 1), model


def digests_of(model: bytes) -> list[str]:
    return [manifest_of([chunk]).hex() for chunk in chunked(model)]


@pytest.mark.parametrize(
    "wrong",
    [bytes(CHUNK_BYTES), b"", bytes(CHUNK_BYTES + 1), bytes(MAX_PAYLOAD_BYTES)],
    ids=["zeros", "no", "+1", "*2"],
)
def test_wrong_chunks_postpone_the_model_and_it_comes_when_they_are_right(staging: StagingWorld, wrong: bytes) -> None:
    described, model = model_of(5 * CHUNK_BYTES)
    metadata = staging.release(described, model)
    victim = topics.chunk(digests_of(model)[2])
    staging.meddle = lambda topic, payload: [(topic, wrong if topic == victim else payload)]
    said = staging.stage(metadata, described.digest)
    assert isinstance(said, Postponed)
    assert said.reason == "chunk_mismatch"
    assert described.digest not in ModelStore(Path(staging.settings.folder))
    staging.meddle = lambda topic, payload: [(topic, payload)]
    assert staging.stage(metadata, described.digest) == Staged(described.digest)


def test_an_endless_stream_of_wrong_chunks_ends_in_a_postponement(staging: StagingWorld) -> None:
    described, model = model_of(5 * CHUNK_BYTES)
    metadata = staging.release(described, model)
    staging.meddle = lambda topic, _payload: [(topic, bytes([number]) * CHUNK_BYTES) for number in range(200)]
    said = staging.stage(metadata, described.digest)
    assert isinstance(said, Postponed)
    assert said.reason == "chunk_mismatch"


def test_a_wrong_length_that_is_signed_is_noticed_before_the_model_is_loaded(staging: StagingWorld) -> None:
    described, model = model_of(5 * CHUNK_BYTES - 100)
    for length in (len(model) + 50, len(model) - 50, len(model) - 2 * CHUNK_BYTES, len(model) + 2 * CHUNK_BYTES):
        lying = msgspec.structs.replace(described, length=length)
        said = staging.stage(staging.release(lying, model), lying.digest)
        assert isinstance(said, Refused), said
        assert said.reason in {"bad_manifest", "corrupt_model", "wrong_length"}
    assert staging.stage(staging.release(described, model), described.digest) == Staged(described.digest)


def test_a_flood_of_chunks_that_nobody_asked_for_costs_no_memory_and_stops_no_transfer(staging: StagingWorld) -> None:
    """A quarter of a gigabyte: chunks that are here already, some that do not exist, some that are too long."""
    described, model = model_of(40 * CHUNK_BYTES)
    metadata = staging.release(described, model)
    assert isinstance(staging.stage(metadata, "0" * 64), Refused)
    quiet_bytes = staging.memory_bytes
    chunks, names = chunked(model), digests_of(model)
    flooded = 0

    def meddle(topic: str, payload: bytes) -> list[tuple[str, bytes]]:
        nonlocal flooded
        sent = [(topic, payload)]
        if flooded < 256 * 1024 * 1024 and topic != topics.chunk(described.manifest):
            sent += [(topics.chunk(names[0]), chunks[0])] * 60
            sent += [(topics.chunk(f"{number:064x}"), bytes(MAX_PAYLOAD_BYTES)) for number in range(30)]
            flooded += sum(len(payload) for _, payload in sent)
        return sent

    staging.meddle = meddle
    assert staging.stage(metadata, described.digest) == Staged(described.digest)
    assert flooded > 200 * 1024 * 1024
    assert staging.memory_bytes - quiet_bytes < 64 * 1024 * 1024


# Clocks.


@pytest.fixture(scope="session")
def clock_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler to make a wrong clock with")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.fixture
def set_clock(clock_library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the clock of processes that are started from now on be off by so many seconds."""

    def set_clock(offset_s: float) -> None:
        monkeypatch.setenv("LD_PRELOAD", str(clock_library))
        monkeypatch.setenv("CLOCK_OFFSET_S", str(int(offset_s)))

    return set_clock


@pytest.mark.linux
def test_with_the_clock_set_back_to_1970_a_frozen_set_stays_refused(
    staging: StagingWorld, set_clock: Callable[[float], None]
) -> None:
    host = staging.host
    assert isinstance(staging.look_at(host.publish(release(1))), MetadataVerified)
    set_clock(1000.0 - time.time())
    thief = Host(host.keys, host.set())
    assert_refused(staging.look_at(expired("timestamp")(thief, host.set(), host.set())), "expired", "timestamp")
    said = staging.look_at(host.publish(release(2)))
    assert isinstance(said, MetadataVerified), said


@pytest.mark.linux
def test_no_clock_is_believed_that_is_earlier_than_the_software(
    staging: StagingWorld, set_clock: Callable[[float], None]
) -> None:
    """On a device that has never accepted anything."""
    set_clock(1000.0 - time.time())
    thief = Host(staging.host.keys, staging.host.set())
    frozen = expired("timestamp")(thief, staging.host.set(), staging.host.set())
    assert_refused(staging.look_at(frozen, built_at=time.time()), "expired", "timestamp")


@pytest.mark.linux
def test_with_the_clock_ten_years_ahead_everything_is_expired_and_nothing_is_lost(
    staging: StagingWorld, set_clock: Callable[[float], None]
) -> None:
    host = staging.host
    metadata = host.publish(release(1))
    accepted(staging, metadata)
    set_clock(TEN_YEARS_S)
    assert_refused(staging.look_at(metadata), "expired", "")
    newer = host.publish(release(2))
    assert_refused(staging.look_at(newer), "expired", "")
    set_clock(0.0)
    said = staging.look_at(newer)
    assert isinstance(said, MetadataVerified), said


# The whole agent.


class HostileWorld(World):
    """A world in which sets can be forged: whoever does it has all the keys, and uses those that he needs."""

    def forged(self, attack: Attack) -> bytes:
        new = decoded_set(self.repository.metadata_set())
        old = decoded_set(self.first)
        made = attack(Host(keys.load_signers(self.folder / "keys"), new), old, new)
        return made if isinstance(made, bytes) else encode(made, as_json=False)

    def serve_the_first(self) -> None:
        self.first = self.repository.metadata_set()
        self.start_agent()
        self.publish(ECHO, 0)
        self.wait(lambda: self.is_serving(0), "version 0 is served")

    def answers(self) -> None:
        """The agent answers with the model that it had."""
        answer = self.ask({"battle": "b1", "step": 1, "features": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]})
        assert (answer.version, answer.error) == (0, None)

    def accepts(self, metadata: bytes) -> None:
        """The agent reports that it has accepted a set."""
        version = Metadata.from_bytes(decoded_set(metadata).timestamp).signed.version
        self.publish_metadata(metadata)
        self.wait(lambda: self.status is not None and self.status.metadata_version == version, "it is accepted")

    def goes_on(self) -> None:
        """An honest set is accepted; each of its versions is ahead of what the thief may have signed."""
        for _ in range(2):
            self.repository.amend(lambda _targets: None, datetime.now(UTC))
        self.accepts(self.repository.metadata_set())

    def start_agent_again(self) -> None:
        self.stop_agent()
        self.status = None
        self.start_agent()
        self.wait(lambda: self.is_serving(0), "version 0 is served again")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileWorld]:
    world = HostileWorld(tmp_path_factory.mktemp("attacked"))
    try:
        world.serve_the_first()
        yield world
    finally:
        world.close()


FAMILIES = [
    "unsigned timestamp",
    "targets by a stranger",
    "expired timestamp",
    "rolled back timestamp",
    "rolled back snapshot",
    "mixed snapshot",
    "swapped slots",
    "root by the new keys only",
    "long timestamp",
    "a release with the host's keys",
    "a payload above the limit",
    "a payload that is none",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_agent_says_what_is_wrong_with_a_forged_set_and_serves_on(attacked: HostileWorld, name: str) -> None:
    attack, reason, role = ATTACKS[name]
    seen = len(attacked.events)
    attacked.publish_metadata(attacked.forged(attack))
    event = attacked.event("metadata_refused", after=seen)
    assert event.reason == reason
    assert role in event.text
    attacked.answers()
    attacked.goes_on()
    attacked.answers()


def test_the_agent_says_what_is_no_release_and_serves_on(attacked: HostileWorld) -> None:
    def attack(host: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
        counted(host).targets.targets |= {"../../x": target_of(release(5), "../../x")}
        return host.set()

    seen = len(attacked.events)
    attacked.accepts(attacked.forged(attack))
    event = attacked.event("release_refused", after=seen)
    assert event.reason == "bad_release"
    assert "../../x" in event.text
    attacked.answers()
    attacked.goes_on()


def test_the_agent_does_not_obey_what_is_wished_of_others(attacked: HostileWorld) -> None:
    def attack(host: Host, _old: MetadataSet, _new: MetadataSet) -> MetadataSet:
        counted(host).wish(
            Withdrawal(slot=SLOT, version=0, devices=("pi8", "pi77")), Pin(slot=SLOT, version=5, groups=("others",))
        )
        return host.set()

    seen = len(attacked.events)
    attacked.accepts(attacked.forged(attack))
    attacked.answers()
    attacked.goes_on()
    attacked.answers()
    assert attacked.events[seen:] == []


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[HostileWorld]:
    world = HostileWorld(tmp_path)
    try:
        world.serve_the_first()
        yield world
    finally:
        world.close()


class LyingSource:
    """Sends what was not asked for."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def manifest(self, digest: str) -> bytes:
        return self._repository.manifest(digest)

    def chunk(self, digest: str, index: int) -> bytes:
        return self._repository.chunk(digest, index)[::-1]


def test_the_agent_says_that_chunks_are_wrong_serves_on_and_takes_the_right_ones(hostile: HostileWorld) -> None:
    hostile.chunks = ChunkServer(LyingSource(hostile.repository))
    hostile.publish(TWIN, 1)
    assert hostile.event("postponed").reason == "chunk_mismatch"
    hostile.answers()
    hostile.chunks = ChunkServer(hostile.repository)
    hostile.goes_on()
    hostile.wait(lambda: [event for event in hostile.events if event.kind == "staged" and event.version == 1], "staged")


@pytest.mark.linux
@pytest.mark.parametrize("ahead_s", [1000.0 - NOW.timestamp(), TEN_YEARS_S], ids=["1970", "ten years ahead"])
def test_an_agent_with_a_wrong_clock_refuses_what_is_expired_and_serves_on(
    hostile: HostileWorld, set_clock: Callable[[float], None], ahead_s: float
) -> None:
    set_clock(ahead_s)
    hostile.start_agent_again()
    seen = len(hostile.events)
    if ahead_s > 0:
        for _ in range(2):
            hostile.repository.amend(lambda _targets: None, datetime.now(UTC))
        hostile.publish_metadata(hostile.repository.metadata_set())
    else:
        hostile.publish_metadata(hostile.forged(expired("timestamp")))
    assert hostile.event("metadata_refused", after=seen).reason == "expired"
    hostile.answers()
    set_clock(0.0)
    hostile.start_agent_again()
    hostile.goes_on()
