from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner, Signature, Signer  # type: ignore[attr-defined]
from tuf.api.metadata import Delegations, Metadata, Root  # type: ignore[attr-defined]

from protocol.codec import MAX_PAYLOAD_BYTES, Decoder
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.messages import MetadataSet
from protocol.release import CHUNK_BYTES, Golden, Release, Tensor, chunked, manifest_of
from trainer_host import repository as module
from trainer_host import repository_files
from trainer_host.repository import Lifetimes, Repository, identity_of
from trainer_host.signing import SignaturesMissing, SigningRequest

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
ROLES = ("root", "targets", "snapshot", "timestamp")


def new_signers() -> dict[str, list[Signer]]:
    return {role: [CryptoSigner.generate_ed25519()] for role in ROLES}


def release_of(model: bytes, version: int = 1, slot: str = "combat", notes: str = "") -> Release:
    return Release(
        slot=slot,
        version=version,
        **identity_of(model),
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=(Feature(path="round", scale=0.05),)),
        golden=Golden(inputs=((0.25,),), outputs=((0.1, -1.5),), tolerance=1e-5),
        notes=notes,
    )


@pytest.fixture
def signers() -> dict[str, list[Signer]]:
    return new_signers()


@pytest.fixture
def repository(tmp_path: Path, signers: dict[str, list[Signer]]) -> Repository:
    made = Repository(tmp_path / "repository", signers)
    made.create(NOW)
    return made


def published(repository: Repository) -> MetadataSet:
    return Decoder(MetadataSet).decode(repository.metadata_set())


def signed(document: bytes) -> Any:
    return Metadata.from_bytes(document).signed


def assert_consistent(metadata: MetadataSet) -> None:
    """What a client verifies, apart from expiry (TUF specification section 5)."""
    root: Root = signed(metadata.roots[-1])
    documents = {"timestamp": metadata.timestamp, "snapshot": metadata.snapshot, "targets": metadata.targets}
    for role, document in documents.items():
        envelope: Metadata[Any] = Metadata.from_bytes(document)
        root.verify_delegate(role, envelope.signed_bytes, envelope.signatures)
    assert signed(metadata.timestamp).snapshot_meta.version == signed(metadata.snapshot).version
    signed(metadata.timestamp).snapshot_meta.verify_length_and_hashes(metadata.snapshot)
    assert signed(metadata.snapshot).meta["targets.json"].version == signed(metadata.targets).version
    signed(metadata.snapshot).meta["targets.json"].verify_length_and_hashes(metadata.targets)


def test_a_new_repository_is_consistent_and_empty(repository: Repository, tmp_path: Path) -> None:
    metadata = published(repository)
    assert_consistent(metadata)
    assert metadata.roots == [repository.root()]
    root: Root = signed(repository.root())
    assert root.consistent_snapshot is True
    assert repository.releases() == []
    assert {path.name for path in (tmp_path / "repository").iterdir()} == {
        "1.root.json",
        "1.targets.json",
        "1.snapshot.json",
        "timestamp.json",
        "models",
        "lock",
    }


def test_a_release_comes_back_with_all_its_fractions(repository: Repository) -> None:
    model = os.urandom(CHUNK_BYTES + 5)
    release = release_of(model)
    repository.release(release, model, NOW)
    assert repository.releases() == [release]
    assert_consistent(published(repository))
    target = signed(published(repository).targets).targets["combat/1.tflite"]
    assert (target.length, target.hashes) == (len(model), {"sha256": hashlib.sha256(model).hexdigest()})


def test_models_manifests_and_chunks_are_found_by_content(repository: Repository) -> None:
    model = os.urandom(2 * CHUNK_BYTES + 5)
    release = release_of(model)
    repository.release(release, model, NOW)
    assert repository.model(release.digest) == model
    assert repository.manifest(release.digest) == manifest_of(chunked(model))
    assert hashlib.sha256(repository.manifest(release.digest)).hexdigest() == release.manifest
    assert [repository.chunk(release.digest, index) for index in range(3)] == chunked(model)


@pytest.mark.parametrize(
    ("digest", "code"), [("0" * 64, "unknown_model"), ("../timestamp.json", "bad_digest"), ("", "bad_digest")]
)
def test_only_models_are_given_out(repository: Repository, digest: str, code: str) -> None:
    for read in (repository.model, repository.manifest, lambda name: repository.chunk(name, 0)):
        with pytest.raises(Rejected) as caught:
            read(digest)
        assert caught.value.code == code


def test_versions_count_up_by_slot_and_only_the_newest_stay(repository: Repository) -> None:
    for version in (1, 2, 3, 7):
        repository.release(release_of(b"combat", version), b"combat", NOW)
    repository.release(release_of(b"movement", 1, "movement"), b"movement", NOW)
    assert [(release.slot, release.version) for release in repository.releases()] == [
        ("combat", 2),
        ("combat", 3),
        ("combat", 7),
        ("movement", 1),
    ]
    assert (repository.next_version("combat"), repository.next_version("movement")) == (8, 2)
    assert repository.next_version("skill") == 0


def test_a_slot_may_begin_with_version_0(repository: Repository) -> None:
    repository.release(release_of(b"untrained", 0), b"untrained", NOW)
    assert [release.version for release in repository.releases()] == [0]
    assert repository.next_version("combat") == 1
    assert _refused(repository, release_of(b"other", 0), b"other") == "stale_version"


def _refused(repository: Repository, release: Release, model: bytes) -> str:
    before = repository.metadata_set()
    with pytest.raises(Rejected) as caught:
        repository.release(release, model, NOW)
    assert repository.metadata_set() == before
    return caught.value.code


def test_a_version_is_never_used_again(repository: Repository) -> None:
    repository.release(release_of(b"model", 2), b"model", NOW)
    assert _refused(repository, release_of(b"other", 2), b"other") == "stale_version"
    assert _refused(repository, release_of(b"other", 1), b"other") == "stale_version"


def test_a_release_of_other_bytes_is_refused(repository: Repository) -> None:
    assert _refused(repository, release_of(b"model"), b"Model") == "wrong_model"


def test_a_slot_that_is_no_name_is_refused(repository: Repository) -> None:
    assert _refused(repository, release_of(b"model", slot="../up"), b"model") == "bad_name"


def test_too_much_metadata_is_refused_before_anything_is_written(repository: Repository, tmp_path: Path) -> None:
    release = release_of(b"model", notes="x" * MAX_PAYLOAD_BYTES)
    assert _refused(repository, release, b"model") == "too_large"
    assert list((tmp_path / "repository" / "models").iterdir()) == []


def test_too_large_a_model_is_refused(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MODEL_BYTES", 4)
    assert _refused(repository, release_of(b"model"), b"model") == "too_large"


def test_expiry_follows_the_settings(tmp_path: Path, signers: dict[str, list[Signer]]) -> None:
    lifetimes = Lifetimes(root_days=4, targets_days=3, snapshot_days=2, timestamp_days=1)
    repository = Repository(tmp_path, signers, lifetimes=lifetimes)
    repository.create(NOW)
    metadata = published(repository)
    documents = [metadata.timestamp, metadata.snapshot, metadata.targets, *metadata.roots]
    assert [(signed(document).expires - NOW).days for document in documents] == [1, 2, 3, 4]


def _versions(repository: Repository) -> tuple[int, ...]:
    metadata = published(repository)
    return tuple(signed(document).version for document in (metadata.timestamp, metadata.snapshot, metadata.targets))


def test_refresh_signs_again_what_is_half_way_to_its_end(repository: Repository) -> None:
    repository.refresh(NOW + timedelta(days=14))
    assert _versions(repository) == (2, 1, 1)
    repository.refresh(NOW + timedelta(days=15))
    assert _versions(repository) == (3, 2, 1)
    repository.refresh(NOW + timedelta(days=45))
    assert _versions(repository) == (4, 3, 2)
    assert_consistent(published(repository))
    assert signed(published(repository).timestamp).expires == NOW + timedelta(days=45 + 7)


def test_refresh_does_without_the_targets_key(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]], caplog: pytest.LogCaptureFixture
) -> None:
    online = Repository(tmp_path / "repository", {role: signers[role] for role in ("snapshot", "timestamp")})
    online.refresh(NOW + timedelta(days=60))
    assert _versions(repository) == (2, 2, 1)
    assert_consistent(published(repository))
    assert "targets key" in caplog.text


def test_a_release_without_the_targets_key_waits_for_it(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    online = Repository(tmp_path / "repository", {role: signers[role] for role in ("snapshot", "timestamp")})
    with pytest.raises(SignaturesMissing, match="targets version 2 has 0 of 1 signatures"):
        online.release(release_of(b"model"), b"model", NOW)
    assert repository.releases() == []


def test_keys_of_another_repository_are_refused(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="cannot sign this repository"):
        Repository(tmp_path / "repository", new_signers()).refresh(NOW)


class _BrokenSigner(Signer):
    """A token that was pulled out."""

    def __init__(self, key: Any) -> None:
        self._key = key

    @classmethod
    def from_priv_key_uri(cls, *_: Any) -> Signer:
        raise NotImplementedError

    @property
    def public_key(self) -> Any:
        return self._key

    def sign(self, payload: bytes) -> Signature:
        raise OSError(f"token is gone: {len(payload)} bytes are not signed")


def test_a_signer_that_fails_is_tried_again_later(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    pulled_out = _BrokenSigner(signers["timestamp"][0].public_key)
    broken = Repository(tmp_path / "repository", {"timestamp": [pulled_out]})
    with pytest.raises(Unavailable, match="cannot sign timestamp"):
        broken.refresh(NOW)


def both(old: dict[str, list[Signer]], new: dict[str, list[Signer]]) -> dict[str, list[Signer]]:
    """A keyring during a change of keys."""
    return {role: [*old[role], *new[role]] for role in ROLES}


def replaced_by(new: dict[str, list[Signer]]) -> Callable[[Root], None]:
    """A change of every role's keys."""

    def change(root: Root) -> None:
        for role in ROLES:
            for keyid in list(root.roles[role].keyids):
                root.revoke_key(keyid, role)
            for signer in new[role]:
                root.add_key(signer.public_key, role)

    return change


def test_every_role_gets_other_keys(repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]) -> None:
    repository.release(release_of(b"model"), b"model", NOW)
    new = new_signers()
    rotated = Repository(tmp_path / "repository", both(signers, new))
    rotated.change_root(replaced_by(new), NOW + timedelta(days=300))
    metadata = published(rotated)
    assert [signed(root).version for root in metadata.roots] == [1, 2]
    first: Root = signed(metadata.roots[0])
    second: Metadata[Root] = Metadata.from_bytes(metadata.roots[1])
    first.verify_delegate("root", second.signed_bytes, second.signatures)
    second.signed.verify_delegate("root", second.signed_bytes, second.signatures)
    assert_consistent(metadata)
    assert [release.version for release in rotated.releases()] == [1]
    old_keys = {signer.public_key.keyid for signer in signers["timestamp"]}
    rotated.refresh(NOW + timedelta(days=301))
    assert not old_keys & Metadata.from_bytes(published(rotated).timestamp).signatures.keys()


def test_a_new_root_waits_for_the_old_root_key(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    new = new_signers()
    without = {**both(signers, new), "root": new["root"]}
    with pytest.raises(SignaturesMissing, match="root version 2 has 0 of 1 signatures") as caught:
        Repository(tmp_path / "repository", without).change_root(replaced_by(new), NOW)
    assert len(published(repository).roots) == 1
    assert caught.value.file == tmp_path / "repository" / "requests" / "root-2.json"


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_change_of_keys_has_not_happened(
    repository: Repository,
    tmp_path: Path,
    signers: dict[str, list[Signer]],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    """Whatever was written before the timestamp, the old root is in force, and the change can be made again."""
    before = repository.metadata_set()
    new = new_signers()
    rotated = Repository(tmp_path / "repository", both(signers, new))
    put, left = repository_files.put, iter(range(after))

    def fail_later(path: Path, data: bytes) -> None:
        if (not path.exists() and next(left, None) is None) or path.name == "timestamp.json":
            raise Unavailable("power cut")
        put(path, data)

    monkeypatch.setattr(repository_files, "put", fail_later)
    with pytest.raises(Unavailable, match="power cut"):
        rotated.change_root(replaced_by(new), NOW)
    monkeypatch.undo()
    assert (tmp_path / "repository" / "2.root.json").exists() == (after > 0)
    assert repository.metadata_set() == before
    rotated.refresh(NOW)
    assert len(published(rotated).roots) == 1
    assert_consistent(published(rotated))
    newer = new_signers()
    again = Repository(tmp_path / "repository", both(signers, newer))
    again.change_root(replaced_by(newer), NOW)
    assert_consistent(published(again))
    assert len(published(again).roots) == 2


def test_an_interrupted_release_changes_nothing_and_the_next_one_takes_its_place(
    repository: Repository, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    before, timestamp = repository.metadata_set(), (folder / "timestamp.json").read_bytes()
    repository.release(release_of(b"lost"), b"lost", NOW)
    (folder / "timestamp.json").write_bytes(timestamp)
    assert repository.metadata_set() == before
    repository.release(release_of(b"kept"), b"kept", NOW)
    assert [release.digest for release in repository.releases()] == [hashlib.sha256(b"kept").hexdigest()]
    assert_consistent(published(repository))


def test_the_timestamp_is_written_last(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = repository_files.put

    def record(path: Path, data: bytes) -> None:
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(repository_files, "put", record)
    repository.release(release_of(b"model"), b"model", NOW)
    digest = hashlib.sha256(b"model").hexdigest()
    assert written[:2] == [f"{digest}.manifest", digest]
    assert written[-3:] == ["2.targets.json", "2.snapshot.json", "timestamp.json"]


def test_one_process_at_a_time_may_change_it(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository_files, "LOCK_TIMEOUT_S", 0.1)
    with (tmp_path / "repository" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="another process"):
            repository.refresh(NOW)
    repository.refresh(NOW)
    assert _versions(repository)[0] == 2


def test_is_made_once_and_missed_when_absent(repository: Repository, tmp_path: Path) -> None:
    assert repository.exists
    with pytest.raises(Misconfigured, match="already"):
        repository.create(NOW)
    absent = Repository(tmp_path / "nowhere")
    assert not absent.exists
    with pytest.raises(Misconfigured, match="nowhere"):
        absent.metadata_set()


def test_making_one_needs_all_four_keys(tmp_path: Path, signers: dict[str, list[Signer]]) -> None:
    del signers["snapshot"]
    with pytest.raises(Misconfigured, match="snapshot was signed by 0/1 keys"):
        Repository(tmp_path, signers).create(NOW)
    assert not Repository(tmp_path).exists


@pytest.mark.parametrize("name", ["1.targets.json", "1.snapshot.json"])
def test_damage_is_said(repository: Repository, tmp_path: Path, name: str) -> None:
    (tmp_path / "repository" / name).unlink()
    with pytest.raises(Misconfigured, match="damaged"):
        repository.metadata_set()


def test_damaged_json_is_said(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "repository" / "timestamp.json").write_text("{")
    with pytest.raises(Misconfigured, match="damaged"):
        repository.releases()


def test_a_disk_that_refuses_is_said(tmp_path: Path, signers: dict[str, list[Signer]]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot write"):
        Repository(tmp_path / "file", signers).create(NOW)


# Keys that are elsewhere.


def without(signers: dict[str, list[Signer]], *roles: str) -> dict[str, list[Signer]]:
    return {role: found for role, found in signers.items() if role not in roles}


def at_home(repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]], *away: str) -> Repository:
    assert repository.exists
    return Repository(tmp_path / "repository", without(signers, *away))


def waiting_for(call: Callable[[], None]) -> Path:
    """The request that an operation ends in."""
    with pytest.raises(SignaturesMissing) as caught:
        call()
    return caught.value.file


def signed_elsewhere(file: Path, signers: dict[str, list[Signer]]) -> SigningRequest:
    request = SigningRequest.from_bytes(file.read_bytes())
    signed, failed = request.sign(signers)
    assert signed
    assert not failed
    return SigningRequest.from_bytes(request.to_bytes())


def test_an_offline_release_waits_and_is_accepted(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    home = at_home(repository, tmp_path, signers, "targets", "root")
    before = home.metadata_set()
    file = waiting_for(lambda: home.release(release_of(b"model"), b"model", NOW))
    assert file == tmp_path / "repository" / "requests" / "targets-2.json"
    assert home.metadata_set() == before
    assert [path for path, _ in home.waiting()] == [file]
    home.accept(signed_elsewhere(file, signers), NOW + timedelta(hours=1))
    assert [release.version for release in home.releases()] == [1]
    assert home.model(home.releases()[0].digest) == b"model"
    assert_consistent(published(home))
    assert not file.exists()
    assert home.waiting() == []


def test_what_is_changed_while_a_request_waits_is_added_to_it(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    home = at_home(repository, tmp_path, signers, "targets")
    first = waiting_for(lambda: home.release(release_of(b"one", 1), b"one", NOW))
    copy = signed_elsewhere(first, signers)
    assert home.next_version("combat") == 2
    second = waiting_for(lambda: home.release(release_of(b"two", 2), b"two", NOW))
    assert first == second
    with pytest.raises(Rejected) as caught:
        home.accept(copy, NOW)
    assert caught.value.code == "superseded"
    home.accept(signed_elsewhere(second, signers), NOW)
    assert [release.version for release in home.releases()] == [1, 2]
    with pytest.raises(Rejected) as caught:
        home.accept(copy, NOW)
    assert caught.value.code == "stale_request"


def test_the_host_goes_on_while_a_request_waits(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]], caplog: pytest.LogCaptureFixture
) -> None:
    file = waiting_for(
        lambda: at_home(repository, tmp_path, signers, "targets").release(release_of(b"model"), b"model", NOW)
    )
    repository.refresh(NOW + timedelta(days=46))  # its own targets key is back
    assert signed(published(repository).targets).version == 1
    assert file.exists()
    assert "accept the request that waits" in caplog.text


def two_of_two(repository: Repository, signers: dict[str, list[Signer]], role: str) -> dict[str, list[Signer]]:
    """Give a role a second key and a threshold of both."""
    second = CryptoSigner.generate_ed25519()
    keyring = {**signers, role: [*signers[role], second]}
    grown = Repository(repository._folder, keyring)

    def change(root: Root) -> None:
        root.add_key(second.public_key, role)
        root.roles[role].threshold = 2

    grown.change_root(change, NOW)
    assert_consistent(published(grown))
    return keyring


@pytest.mark.parametrize("role", ["targets", "root"])
def test_signatures_of_several_people_add_up(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]], role: str
) -> None:
    keyring = two_of_two(repository, signers, role)
    home = Repository(tmp_path / "repository", without(keyring, role))
    operation = (
        (lambda: home.release(release_of(b"model"), b"model", NOW))
        if role == "targets"
        else (lambda: home.change_root(lambda _: None, NOW))
    )
    file = waiting_for(operation)
    alice, bob = ({role: [signer]} for signer in keyring[role])
    by_alice, by_bob = signed_elsewhere(file, alice), signed_elsewhere(file, bob)
    with pytest.raises(SignaturesMissing, match="1 of 2 signatures"):
        home.accept(by_alice, NOW)
    before = home.metadata_set()
    home.accept(by_bob, NOW)  # its own copy, with its own signature only
    assert home.metadata_set() != before
    assert_consistent(published(home))


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_the_running_host_signs_with_as_many_keys_as_must(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]], role: str
) -> None:
    keyring = two_of_two(repository, signers, role)
    Repository(tmp_path / "repository", keyring).refresh(NOW + timedelta(days=60))
    metadata = published(repository)
    assert_consistent(metadata)
    assert len(Metadata.from_bytes(getattr(metadata, role)).signatures) == 2
    assert signed(getattr(metadata, role)).expires > NOW + timedelta(days=60)
    one_left = Repository(tmp_path / "repository", {**keyring, role: keyring[role][:1]})
    if role == "targets":
        one_left.refresh(NOW + timedelta(days=120))
        assert published(repository).targets == metadata.targets
    else:
        with pytest.raises(Misconfigured, match=f"{role} was signed by 1/2 keys"):
            one_left.refresh(NOW + timedelta(days=120))


def test_one_of_two_targets_signatures_is_not_enough(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    keyring = two_of_two(repository, signers, "targets")
    home = Repository(tmp_path / "repository", {**keyring, "targets": keyring["targets"][:1]})
    assert not home.can_sign("targets")
    assert Repository(tmp_path / "repository", keyring).can_sign("targets")
    waiting_for(lambda: home.release(release_of(b"model"), b"model", NOW))
    (_, request) = home.waiting()[0]
    assert [(it.signed, it.threshold) for it in request.shortfalls()] == [(1, 2)]


def test_other_keys_of_every_role_wait_for_the_root(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    """The targets are signed here by the new key once the root comes back: releases go on meanwhile."""
    new = new_signers()
    keyring = {**both(signers, new), "root": []}
    home = Repository(tmp_path / "repository", keyring)
    file = waiting_for(lambda: home.change_root(replaced_by(new), NOW))
    home.release(release_of(b"meanwhile"), b"meanwhile", NOW)
    request = signed_elsewhere(file, {"root": [*signers["root"], *new["root"]]})
    assert request.targets is None
    home.accept(request, NOW)
    assert_consistent(published(home))
    assert [release.version for release in home.releases()] == [1]
    old = {signer.public_key.keyid for role in ROLES for signer in signers[role]}
    assert not old & set(signed(home.root()).keys)


def test_a_root_that_leaves_targets_unsigned_asks_for_both(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    """Nobody ever sees a set whose targets the root does not know."""
    new = CryptoSigner.generate_ed25519()
    home = at_home(repository, tmp_path, signers, "root", "targets")

    def change(root: Root) -> None:
        root.revoke_key(signers["targets"][0].public_key.keyid, "targets")
        root.add_key(new.public_key, "targets")

    before = home.metadata_set()
    file = waiting_for(lambda: home.change_root(change, NOW))
    half = signed_elsewhere(file, {"root": signers["root"]})
    assert half.targets is not None
    with pytest.raises(SignaturesMissing, match="targets version 2 has 0 of 1"):
        home.accept(half, NOW)
    assert home.metadata_set() == before
    home.accept(signed_elsewhere(file, {"targets": [new]}), NOW)
    assert_consistent(published(home))
    assert signed(home.root()).version == 2


def test_a_second_change_of_keys_joins_the_first(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    home = at_home(repository, tmp_path, signers, "root")
    extra = {role: CryptoSigner.generate_ed25519() for role in ("targets", "root")}
    for role, signer in extra.items():
        file = waiting_for(lambda: home.change_root(lambda root: root.add_key(signer.public_key, role), NOW))  # noqa: B023
    home.accept(signed_elsewhere(file, signers), NOW)
    assert [len(signed(home.root()).roles[role].keyids) for role in ("targets", "root")] == [2, 2]
    assert len(published(home).roots) == 2


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_the_host_is_not_left_without_its_own_keys(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]], role: str
) -> None:
    def change(root: Root) -> None:
        root.add_key(CryptoSigner.generate_ed25519().public_key, role)
        root.roles[role].threshold = 2

    with pytest.raises(Misconfigured, match=f"signs {role} by itself"):
        repository.change_root(change, NOW)
    assert len(published(repository).roots) == 1


def test_a_threshold_that_nobody_could_reach_is_refused(repository: Repository) -> None:
    for threshold in (0, 2):
        with pytest.raises(Misconfigured, match=f"root would have 1 keys and a threshold of {threshold}"):
            repository.change_root(lambda root: setattr(root.roles["root"], "threshold", threshold), NOW)  # noqa: B023
    with pytest.raises(Misconfigured, match="cannot be changed so"):
        repository.change_root(lambda root: root.revoke_key("0" * 64, "root"), NOW)
    assert len(published(repository).roots) == 1


def forged(file: Path, change: Callable[[SigningRequest], None], signers: dict[str, list[Signer]]) -> SigningRequest:
    """A request that was altered on its way, and signed so."""
    request = SigningRequest.from_bytes(file.read_bytes())
    change(request)
    file.unlink()
    request.sign(signers)
    return request


def _targets(request: SigningRequest) -> Any:
    assert request.targets is not None
    return request.targets.signed


def _unknown_model(request: SigningRequest) -> None:
    targets = _targets(request)
    (path,) = targets.targets
    targets.targets[path].hashes["sha256"] = "0" * 64


def _unreadable(request: SigningRequest) -> None:
    targets = _targets(request)
    targets.targets["combat/7.tflite"] = targets.targets["combat/1.tflite"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda request: setattr(_targets(request), "version", 3), "stale_request"),
        (lambda request: setattr(_targets(request), "version", 1), "stale_request"),
        (lambda request: setattr(_targets(request), "expires", NOW), "bad_expiry"),
        (lambda request: setattr(_targets(request), "expires", NOW + timedelta(days=1000)), "bad_expiry"),
        (_unknown_model, "no_model"),
        (_unreadable, "bad_targets"),
        (lambda request: _targets(request).unrecognized_fields.update({"x-edgeswap-wishes": "?"}), "bad_targets"),
        (lambda request: setattr(_targets(request), "delegations", Delegations({}, {})), "bad_targets"),
    ],
)
def test_targets_that_the_host_would_not_ask_for_are_refused(
    repository: Repository,
    tmp_path: Path,
    signers: dict[str, list[Signer]],
    change: Callable[[SigningRequest], None],
    code: str,
) -> None:
    home = at_home(repository, tmp_path, signers, "targets")
    before = home.metadata_set()
    file = waiting_for(lambda: home.release(release_of(b"model"), b"model", NOW))
    with pytest.raises(Rejected) as caught:
        home.accept(forged(file, change, signers), NOW)
    assert caught.value.code == code
    assert home.metadata_set() == before


def _root_of(request: SigningRequest) -> Root:
    assert request.root is not None
    return request.root.signed


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda request: setattr(_root_of(request), "version", 3), "stale_request"),
        (lambda request: setattr(_root_of(request), "expires", NOW), "bad_expiry"),
        (lambda request: setattr(_root_of(request).roles["targets"], "threshold", 2), "bad_root"),
        (lambda request: setattr(_root_of(request), "consistent_snapshot", False), "bad_root"),
    ],
)
def test_a_root_that_the_host_would_not_ask_for_is_refused(
    repository: Repository,
    tmp_path: Path,
    signers: dict[str, list[Signer]],
    change: Callable[[SigningRequest], None],
    code: str,
) -> None:
    home = at_home(repository, tmp_path, signers, "root")
    file = waiting_for(lambda: home.change_root(lambda _: None, NOW))
    with pytest.raises(Rejected) as caught:
        home.accept(forged(file, change, signers), NOW)
    assert caught.value.code == code
    assert len(published(home).roots) == 1


def test_a_model_that_rotted_while_it_waited_is_missed(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    home = at_home(repository, tmp_path, signers, "targets")
    file = waiting_for(lambda: home.release(release_of(b"model"), b"model", NOW))
    (tmp_path / "repository" / "models" / hashlib.sha256(b"model").hexdigest()).write_bytes(b"Model")
    with pytest.raises(Rejected) as caught:
        home.accept(signed_elsewhere(file, signers), NOW)
    assert caught.value.code == "no_model"


def test_a_signature_over_something_else_is_named(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    home = at_home(repository, tmp_path, signers, "targets")
    file = waiting_for(lambda: home.release(release_of(b"model"), b"model", NOW))
    request = signed_elsewhere(file, signers)
    _targets(request).expires -= timedelta(days=1)
    file.unlink()
    with pytest.raises(Rejected) as caught:
        home.accept(request, NOW)
    assert caught.value.code == "bad_signature"


def test_a_root_signed_by_the_new_keys_only_waits_for_the_old(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    new = new_signers()
    home = Repository(tmp_path / "repository", without(both(signers, new), "root"))
    file = waiting_for(lambda: home.change_root(replaced_by(new), NOW))
    for half in (new, signers):
        copy = SigningRequest.from_bytes(file.read_bytes())
        for document in copy.documents:
            document.signatures.clear()
        copy.sign({"root": half["root"]})
        assert len(copy.shortfalls()) == 1
    assert len(published(home).roots) == 1


def test_keys_that_the_root_does_not_name_sign_nothing(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    stranger = CryptoSigner.generate_ed25519()
    mixed = Repository(tmp_path / "repository", {role: [stranger, *found] for role, found in signers.items()})
    mixed.release(release_of(b"model"), b"model", NOW)
    metadata = published(mixed)
    for document in (metadata.timestamp, metadata.snapshot, metadata.targets):
        assert stranger.public_key.keyid not in Metadata.from_bytes(document).signatures


def test_a_token_that_is_elsewhere_lets_targets_wait(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    pulled_out = _BrokenSigner(signers["targets"][0].public_key)
    home = Repository(tmp_path / "repository", {**signers, "targets": [pulled_out]})
    with pytest.raises(SignaturesMissing, match="token is gone"):
        home.release(release_of(b"model"), b"model", NOW)


def test_a_root_that_runs_out_is_said_in_time(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    repository.refresh(NOW + timedelta(days=273))
    assert "keys renew root" not in caplog.text
    repository.refresh(NOW + timedelta(days=275))
    assert "keys renew root" in caplog.text
    repository.change_root(lambda _: None, NOW + timedelta(days=275))
    caplog.clear()
    repository.refresh(NOW + timedelta(days=276))
    assert "keys renew root" not in caplog.text
    assert repository.expiries()["root"] == NOW + timedelta(days=275 + 365)


def test_a_broken_request_is_said(repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]) -> None:
    home = at_home(repository, tmp_path, signers, "targets")
    file = waiting_for(lambda: home.release(release_of(b"model"), b"model", NOW))
    file.write_text("{")
    with pytest.raises(Misconfigured, match=r"targets-2\.json.*Remove it"):
        home.release(release_of(b"model"), b"model", NOW)


@pytest.mark.parametrize("what", ["model", "metadata", "request"])
def test_a_disk_that_cannot_be_read_is_not_a_missing_file(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    repository.release(release_of(b"model"), b"model", NOW)
    digest = repository.releases()[0].digest

    def fail(path: Path, *_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    calls: dict[str, Callable[[], object]] = {
        "model": lambda: repository.model(digest),
        "metadata": repository.metadata_set,
        "request": repository.waiting,
    }
    if what == "request":
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: fail(path) if "requests" in path.parts else read(path))
    else:
        monkeypatch.setattr(Path, "open" if what == "model" else "read_bytes", fail)
    with pytest.raises(Unavailable, match="Input/output error"):
        calls[what]()
