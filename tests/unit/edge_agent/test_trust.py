from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner, Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.ngclient import FetcherInterface  # type: ignore[attr-defined]

from edge_agent.trust import SetFetcher, Trust, Verified, Versions, decoded_set
from protocol.codec import MAX_PAYLOAD_BYTES, encode
from protocol.errors import Rejected, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.messages import MetadataSet
from protocol.release import Golden, Release, Tensor, to_custom

NOW = datetime.now(UTC).replace(microsecond=0)
ROLES = ("root", "targets", "snapshot", "timestamp")


def new_keys() -> dict[str, list[Signer]]:
    return {role: [CryptoSigner.generate_ed25519()] for role in ROLES}


def release(version: int = 1, slot: str = "combat") -> Release:
    return Release(
        slot=slot,
        version=version,
        digest=f"{version:064x}",
        length=1000,
        manifest="f" * 64,
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=(Feature(path="round", scale=0.05),)),
        golden=Golden(inputs=((0.25,),), outputs=((0.1, -1.5),), tolerance=1e-5),
    )


def target_of(released: Release) -> TargetFile:
    fields = {"custom": to_custom(released)}
    return TargetFile(released.length, {"sha256": released.digest}, released.target, fields)


class Host:
    """Signs whatever it is told to: a good host, a careless one, or an attacker with some of the keys."""

    def __init__(self) -> None:
        self.keys = new_keys()
        expires = NOW + timedelta(days=10)
        self.root = Root(expires=expires, consistent_snapshot=True)
        for role, signers in self.keys.items():
            for signer in signers:
                self.root.add_key(signer.public_key, role)
        self.roots = [self.signed(self.root, self.keys["root"])]
        self.targets = Targets(expires=expires)
        self.snapshot = Snapshot(expires=expires)
        self.timestamp = Timestamp(expires=expires)

    @staticmethod
    def signed(what: Any, signers: list[Signer]) -> bytes:
        envelope: Metadata[Any] = Metadata(copy.deepcopy(what))
        for signer in signers:
            envelope.sign(signer, append=True)
        return bytes(envelope.to_bytes())

    def publish(self, *releases: Release) -> MetadataSet:
        """Count all versions up and sign everything."""
        for part in (self.targets, self.snapshot, self.timestamp):
            part.version += 1
        self.targets.targets = {one.target: target_of(one) for one in releases}
        return self.set()

    def set(self, **signers: list[Signer]) -> MetadataSet:
        """Sign everything as it stands, with the right keys unless others are given."""
        keys = {**self.keys, **signers}
        targets = self.signed(self.targets, keys["targets"])
        self.snapshot.meta["targets.json"] = MetaFile.from_data(self.targets.version, targets, ["sha256"])
        snapshot = self.signed(self.snapshot, keys["snapshot"])
        self.timestamp.snapshot_meta = MetaFile.from_data(self.snapshot.version, snapshot, ["sha256"])
        return MetadataSet(
            roots=list(self.roots),
            timestamp=self.signed(self.timestamp, keys["timestamp"]),
            snapshot=snapshot,
            targets=targets,
        )

    def next_root(self, signers: list[Signer], version: int | None = None) -> None:
        self.root.version = version or self.root.version + 1
        self.roots.append(self.signed(self.root, signers))


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def trust(tmp_path: Path, host: Host) -> Trust:
    return Trust(tmp_path / "trust", host.roots[0])


def refusal(trust: Trust, metadata: MetadataSet, now: datetime = NOW) -> tuple[str, str | None]:
    with pytest.raises(Rejected) as caught:
        trust.verify(metadata, now)
    return caught.value.code, caught.value.field


def changed(metadata: MetadataSet, **documents: bytes) -> MetadataSet:
    return msgspec.structs.replace(metadata, **documents)


def test_accepts_a_signed_set_and_lists_its_releases(trust: Trust, host: Host) -> None:
    verified = trust.verify(host.publish(release(2), release(1), release(7, "movement")), NOW)
    assert verified == Verified(Versions(1, 2, 2, 2), (release(1), release(2), release(7, "movement")))


def test_accepts_the_same_set_again_also_after_a_restart(trust: Trust, host: Host, tmp_path: Path) -> None:
    metadata = host.publish(release())
    first = trust.verify(metadata, NOW)
    assert trust.verify(metadata, NOW) == first
    assert Trust(tmp_path / "trust", host.roots[0]).verify(metadata, NOW) == first


def test_accepts_newer_sets(trust: Trust, host: Host) -> None:
    trust.verify(host.publish(release(1)), NOW)
    assert trust.verify(host.publish(release(2)), NOW) == Verified(Versions(1, 3, 3, 3), (release(2),))


def test_accepts_a_new_timestamp_over_the_same_releases(trust: Trust, host: Host) -> None:
    trust.verify(host.publish(release(1)), NOW)
    host.timestamp.version += 1
    assert trust.verify(host.set(), NOW).versions == Versions(1, 3, 2, 2)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_unsigned(trust: Trust, host: Host, role: str) -> None:
    assert refusal(trust, host.set(**{role: []})) == ("unsigned", role)


def test_a_place_for_a_signature_is_none(trust: Trust, host: Host) -> None:
    envelope = msgspec.json.decode(host.publish(release()).timestamp)
    envelope["signatures"][0]["sig"] = ""
    assert refusal(trust, changed(host.set(), timestamp=msgspec.json.encode(envelope))) == ("unsigned", "timestamp")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_signed_by_a_stranger(trust: Trust, host: Host, role: str) -> None:
    assert refusal(trust, host.set(**{role: new_keys()[role]})) == ("bad_signature", role)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_signed_by_the_key_of_another_role(trust: Trust, host: Host, role: str) -> None:
    other = {"timestamp": "snapshot", "snapshot": "timestamp", "targets": "timestamp"}[role]
    assert refusal(trust, host.set(**{role: host.keys[other]})) == ("bad_signature", role)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_altered_after_signing(trust: Trust, host: Host, role: str) -> None:
    metadata = host.publish(release())
    document = getattr(metadata, role).replace(b'"version":2}', b'"version":3}')
    assert document != getattr(metadata, role)
    assert refusal(trust, changed(metadata, **{role: document})) == ("bad_signature", role)


def test_one_signature_where_two_are_needed_is_counted(host: Host, tmp_path: Path) -> None:
    second = CryptoSigner.generate_ed25519()
    host.root.add_key(second.public_key, "targets")
    host.root.roles["targets"].threshold = 2
    trust = Trust(tmp_path / "trust", host.signed(host.root, host.keys["root"]))
    with pytest.raises(Rejected, match=r"1 valid signatures of the 2 it needs \(from 2 trusted keys\)"):
        trust.verify(host.publish(release()), NOW)
    host.keys["targets"].append(second)
    assert trust.verify(host.publish(release()), NOW).releases == (release(),)


def test_swapped_digest_in_targets_is_noticed(trust: Trust, host: Host) -> None:
    metadata = host.publish(release(1))
    tampered = metadata.targets.replace(release(1).digest.encode(), release(2).digest.encode())
    assert refusal(trust, changed(metadata, targets=tampered)) == ("bad_signature", "targets")


def test_a_replayed_older_set(trust: Trust, host: Host) -> None:
    old = host.publish(release(1))
    trust.verify(host.publish(release(2)), NOW)
    with pytest.raises(Rejected, match="timestamp metadata version 2 is older than version 3") as caught:
        trust.verify(old, NOW)
    assert (caught.value.code, caught.value.field) == ("rolled_back", "timestamp")


def test_a_replayed_older_set_after_a_restart(host: Host, tmp_path: Path) -> None:
    old = host.publish(release(1))
    Trust(tmp_path, host.roots[0]).verify(host.publish(release(2)), NOW)
    assert refusal(Trust(tmp_path, host.roots[0]), old) == ("rolled_back", "timestamp")


def test_a_thief_of_the_timestamp_key_cannot_roll_the_snapshot_back(trust: Trust, host: Host) -> None:
    trust.verify(host.publish(release(1)), NOW)
    host.timestamp.version += 1
    host.snapshot.version -= 1
    assert refusal(trust, host.set()) == ("rolled_back", "snapshot")


def test_a_thief_of_the_snapshot_key_too_cannot_roll_targets_back(trust: Trust, host: Host) -> None:
    trust.verify(host.publish(release(1)), NOW)
    host.timestamp.version += 1
    host.snapshot.version += 1
    host.targets.version -= 1
    assert refusal(trust, host.set()) == ("rolled_back", "targets")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_expired(trust: Trust, host: Host, role: str) -> None:
    getattr(host, role).expires = NOW - timedelta(seconds=1)
    with pytest.raises(Rejected, match=f"{role} metadata expired at ") as caught:
        trust.verify(host.set(), NOW)
    assert (caught.value.code, caught.value.field) == ("expired", role)


def test_an_expired_root(host: Host, tmp_path: Path) -> None:
    host.root.expires = NOW - timedelta(seconds=1)
    trust = Trust(tmp_path, host.signed(host.root, host.keys["root"]))
    assert refusal(trust, host.set()) == ("expired", "root")


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_expired_by_a_clock_that_is_better_than_the_system_clock(host: Host, tmp_path: Path, role: str) -> None:
    getattr(host, role).expires = NOW + timedelta(days=3)
    trust = Trust(tmp_path, host.signed(host.root, host.keys["root"]))
    metadata = host.set()
    assert refusal(trust, metadata, NOW + timedelta(days=4)) == ("expired", role)
    assert trust.verify(metadata, NOW + timedelta(days=2)).versions.targets == 1


def test_what_was_accepted_expires_even_if_the_host_is_silenced(trust: Trust, host: Host) -> None:
    metadata = host.publish(release())
    trust.verify(metadata, NOW)
    assert refusal(trust, metadata, NOW + timedelta(days=11)) == ("expired", "root")


def test_an_expired_document_with_no_witness_but_the_system_clock(trust: Trust, host: Host) -> None:
    host.targets.expires = NOW - timedelta(days=1)
    assert refusal(trust, host.set(), NOW - timedelta(days=2)) == ("expired", "targets")


def test_mixed_snapshot(trust: Trust, host: Host) -> None:
    old = host.publish(release(1))
    assert refusal(trust, changed(host.publish(release(2)), snapshot=old.snapshot)) == ("mixed", "snapshot")


def test_mixed_targets(trust: Trust, host: Host) -> None:
    old = host.publish(release(1))
    assert refusal(trust, changed(host.publish(release(2)), targets=old.targets)) == ("mixed", "targets")


def test_mixed_with_something_longer_than_was_named(trust: Trust, host: Host) -> None:
    short = host.publish(release(1))
    long = host.publish(release(1), release(2))
    assert refusal(trust, changed(short, targets=long.targets)) == ("mixed", "targets")


def test_altered_to_something_longer(trust: Trust, host: Host) -> None:
    metadata = host.publish(release(1))
    tampered = metadata.targets.replace(b"combat/1.tflite", b"combat/1000.tflite")
    assert refusal(trust, changed(metadata, targets=tampered)) == ("bad_signature", "targets")
    assert refusal(trust, changed(metadata, targets=b"x" * 5000)) == ("malformed", "targets")


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_mixed_versions_under_hashless_metadata(trust: Trust, host: Host, role: str) -> None:
    """The specification allows metadata without lengths and hashes; then versions alone tie the set together."""
    old = host.publish(release(1))
    new = host.publish(release(2))
    host.snapshot.meta["targets.json"] = MetaFile(3)
    snapshot = host.signed(host.snapshot, host.keys["snapshot"])
    host.timestamp.snapshot_meta = MetaFile(3)
    timestamp = host.signed(host.timestamp, host.keys["timestamp"])
    metadata = changed(new, timestamp=timestamp, snapshot=snapshot)
    assert refusal(trust, changed(metadata, **{role: getattr(old, role)})) == ("mixed", role)


def test_a_refused_set_does_not_disturb_what_was_accepted(trust: Trust, host: Host) -> None:
    good = host.publish(release(1))
    trust.verify(good, NOW)
    refusal(trust, host.set(timestamp=[]))
    assert trust.verify(good, NOW).releases == (release(1),)


def test_an_attacker_who_mixes_sets_cannot_block_the_right_one(trust: Trust, host: Host) -> None:
    old, new = host.publish(release(1)), host.publish(release(2))
    assert refusal(trust, changed(new, snapshot=old.snapshot))[0] == "mixed"
    assert trust.verify(new, NOW).releases == (release(2),)


def test_the_trusted_root_changes_hands_step_by_step(trust: Trust, host: Host, tmp_path: Path) -> None:
    trust.verify(host.publish(release(1)), NOW)
    old = dict(host.keys)
    for _ in range(2):
        previous, host.keys = host.keys, new_keys()
        for role in ROLES:
            host.root.revoke_key(previous[role][0].public_key.keyid, role)
            host.root.add_key(host.keys[role][0].public_key, role)
        host.next_root([*previous["root"], *host.keys["root"]])
    assert trust.verify(host.publish(release(2)), NOW).versions == Versions(3, 3, 3, 3)
    host.timestamp.version += 1
    assert refusal(trust, host.set(timestamp=old["timestamp"])) == ("bad_signature", "timestamp")
    late = Trust(tmp_path / "late", host.roots[0])
    assert late.verify(host.publish(release(3)), NOW).versions.root == 3


def test_a_new_root_that_the_old_one_did_not_sign(trust: Trust, host: Host) -> None:
    stranger = new_keys()
    host.root.revoke_key(host.keys["root"][0].public_key.keyid, "root")
    host.root.add_key(stranger["root"][0].public_key, "root")
    host.next_root(stranger["root"])
    assert refusal(trust, host.set()) == ("bad_root", "root")


def test_a_root_out_of_turn(trust: Trust, host: Host) -> None:
    host.next_root(host.keys["root"], version=5)
    assert refusal(trust, host.set()) == ("bad_root", "root")


def test_a_root_that_is_none(trust: Trust, host: Host) -> None:
    host.roots.append(b"{}")
    assert refusal(trust, host.set()) == ("malformed", "root")


@pytest.mark.parametrize("root", [b"", b"{}", b'{"signed":'])
def test_a_device_without_a_valid_root_of_trust(tmp_path: Path, host: Host, root: bytes) -> None:
    assert refusal(Trust(tmp_path, root), host.set()) == ("bad_root", "root")


@pytest.mark.parametrize("junk", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 10_000, b'{"signed":{},"signatures":[]}'])
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_malformed(trust: Trust, host: Host, role: str, junk: bytes) -> None:
    assert refusal(trust, changed(host.publish(release()), **{role: junk})) == ("malformed", role)


def test_one_kind_of_metadata_in_the_place_of_another(trust: Trust, host: Host) -> None:
    metadata = host.publish(release())
    assert refusal(trust, changed(metadata, timestamp=metadata.targets)) == ("malformed", "timestamp")
    assert refusal(trust, changed(metadata, targets=metadata.timestamp)) == ("malformed", "targets")


def test_a_snapshot_that_forgets_the_targets(trust: Trust, host: Host) -> None:
    metadata = host.publish(release())
    trust.verify(metadata, NOW)
    host.snapshot.version += 1
    host.timestamp.version += 1
    host.snapshot.meta = {"other.json": MetaFile(1)}
    snapshot = host.signed(host.snapshot, host.keys["snapshot"])
    host.timestamp.snapshot_meta = MetaFile.from_data(host.snapshot.version, snapshot, ["sha256"])
    timestamp = host.signed(host.timestamp, host.keys["timestamp"])
    assert refusal(trust, changed(metadata, snapshot=snapshot, timestamp=timestamp)) == ("malformed", "snapshot")


def test_a_document_that_is_too_long(trust: Trust, host: Host) -> None:
    metadata = host.publish(release())
    padded = metadata.timestamp + b" " * 20_000
    assert refusal(trust, changed(metadata, timestamp=padded)) == ("too_long", "timestamp")


def test_a_set_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(Rejected) as caught:
        decoded_set(b"\x81" * (MAX_PAYLOAD_BYTES + 1))
    assert caught.value.code == "too_long"


def test_a_set_comes_as_json_or_messagepack(host: Host) -> None:
    metadata = host.publish(release())
    assert decoded_set(encode(metadata, as_json=False)) == metadata
    assert decoded_set(encode(metadata, as_json=True)) == metadata
    with pytest.raises(Rejected) as caught:
        decoded_set(b'{"roots": []}')
    assert caught.value.code == "malformed"


def test_swapped_slots(trust: Trust, host: Host) -> None:
    host.publish(release(1, "combat"))
    host.targets.targets = {"movement/1.tflite": target_of(release(1, "combat"))}
    assert refusal(trust, host.set()) == ("bad_release", "custom")


def test_a_target_without_the_right_hash(trust: Trust, host: Host) -> None:
    target = target_of(release())
    target.hashes = {"sha512": "0" * 128}
    host.targets.targets = {"combat/1.tflite": target}
    assert refusal(trust, host.set()) == ("bad_release", "targets")


class _Elsewhere(FetcherInterface):
    """Some other place that has metadata, in small pieces."""

    def __init__(self, source: SetFetcher, broken: str = "") -> None:
        self._source = source
        self._broken = broken

    def _fetch(self, url: str) -> Iterator[bytes]:
        if self._broken and self._broken in url:
            raise DownloadHTTPError("internal server error", 500)
        data = b"".join(self._source.fetch(url))
        return (data[start : start + 7] for start in range(0, len(data), 7))


def test_takes_metadata_from_any_fetcher(trust: Trust, host: Host) -> None:
    source = SetFetcher(host.publish(release()))
    assert trust.verify(_Elsewhere(source), NOW).releases == (release(),)


def test_a_source_that_is_down_is_not_an_attack(trust: Trust, host: Host) -> None:
    with pytest.raises(Unavailable, match="snapshot"):
        trust.verify(_Elsewhere(SetFetcher(host.publish(release())), broken="snapshot"), NOW)


def test_a_disk_that_refuses_is_not_an_attack(tmp_path: Path, host: Host) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot keep metadata"):
        Trust(tmp_path / "file" / "trust", host.roots[0]).verify(host.publish(release()), NOW)


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path: Path, host: Host) -> None:
    (tmp_path / "tmpab12cd").write_text("torn")
    Trust(tmp_path, host.roots[0]).verify(host.publish(release()), NOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "root.json",
        "root_history",
        "snapshot.json",
        "targets.json",
        "timestamp.json",
    ]


def test_what_was_accepted_is_on_the_disk_also_when_the_rest_of_the_set_is_refused(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    trust = Trust(tmp_path, host.roots[0])
    old, new = host.publish(release(1)), host.publish(release(2))
    assert refusal(trust, changed(new, snapshot=old.snapshot))[0] == "mixed"
    kept = [tmp_path, tmp_path / "timestamp.json", tmp_path / "root_history", tmp_path / "root_history/1.root.json"]
    assert {path.stat().st_ino for path in kept} <= synced
