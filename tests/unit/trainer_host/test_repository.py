from __future__ import annotations

import fcntl
import hashlib
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner, Signature, Signer  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]

from protocol.codec import MAX_PAYLOAD_BYTES, Decoder
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.messages import MetadataSet
from protocol.release import CHUNK_BYTES, Golden, Release, Tensor, chunked, manifest_of
from trainer_host import repository as module
from trainer_host.repository import Lifetimes, Repository, identity_of

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


def test_a_release_without_the_targets_key_is_refused(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    online = Repository(tmp_path / "repository", {role: signers[role] for role in ("snapshot", "timestamp")})
    with pytest.raises(Misconfigured, match="targets was signed by 0/1 keys"):
        online.release(release_of(b"model"), b"model", NOW)
    assert repository.releases() == []


def test_keys_of_another_repository_are_refused(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="cannot sign this repository"):
        Repository(tmp_path / "repository", new_signers()).refresh(NOW)


class _BrokenSigner(Signer):
    """A token that was pulled out."""

    @classmethod
    def from_priv_key_uri(cls, *_: Any) -> Signer:
        raise NotImplementedError

    @property
    def public_key(self) -> Any:
        raise NotImplementedError

    def sign(self, payload: bytes) -> Signature:
        raise OSError(f"token is gone: {len(payload)} bytes are not signed")


def test_a_signer_that_fails_is_tried_again_later(repository: Repository, tmp_path: Path) -> None:
    broken = Repository(tmp_path / "repository", {"timestamp": [_BrokenSigner()]})
    with pytest.raises(Unavailable, match="cannot sign timestamp"):
        broken.refresh(NOW)


def test_the_root_is_renewed_with_other_keys(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    repository.release(release_of(b"model"), b"model", NOW)
    new = new_signers()
    both = {**new, "root": [*signers["root"], *new["root"]]}
    rotated = Repository(tmp_path / "repository", both)
    rotated.renew_root({role: [key.public_key for key in new[role]] for role in ROLES}, NOW + timedelta(days=300))
    metadata = published(rotated)
    assert [signed(root).version for root in metadata.roots] == [1, 2]
    first: Root = signed(metadata.roots[0])
    second: Metadata[Root] = Metadata.from_bytes(metadata.roots[1])
    first.verify_delegate("root", second.signed_bytes, second.signatures)
    second.signed.verify_delegate("root", second.signed_bytes, second.signatures)
    assert_consistent(metadata)
    assert [release.version for release in rotated.releases()] == [1]


def test_a_new_root_needs_the_old_root_key(repository: Repository, tmp_path: Path) -> None:
    new = new_signers()
    keys = {role: [key.public_key for key in new[role]] for role in ROLES}
    with pytest.raises(Misconfigured, match="root was signed by 0/1 keys"):
        Repository(tmp_path / "repository", new).renew_root(keys, NOW)
    assert len(published(repository).roots) == 1


def test_refresh_mends_an_interrupted_change_of_keys(
    repository: Repository, tmp_path: Path, signers: dict[str, list[Signer]]
) -> None:
    folder = tmp_path / "repository"
    before = {name: (folder / name).read_bytes() for name in ("timestamp.json",)}
    new = new_signers()
    rotated = Repository(folder, {**new, "root": [*signers["root"], *new["root"]]})
    rotated.renew_root({role: [key.public_key for key in new[role]] for role in ROLES}, NOW)
    for name, data in before.items():
        (folder / name).write_bytes(data)
    rotated.refresh(NOW)
    assert_consistent(published(rotated))


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
    write = module._write_durably

    def record(path: Path, data: bytes) -> None:
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(module, "_write_durably", record)
    repository.release(release_of(b"model"), b"model", NOW)
    digest = hashlib.sha256(b"model").hexdigest()
    assert written[:2] == [f"{digest}.manifest", digest]
    assert written[-3:] == ["2.targets.json", "2.snapshot.json", "timestamp.json"]


def test_one_process_at_a_time_may_change_it(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
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
