from __future__ import annotations

import errno
import logging
import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, MetaFile, Root, TargetFile  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater  # type: ignore[attr-defined]

from edge_agent.staging import BadRelease
from edge_agent.trust import MAX_SHOWN_NAME, SetFetcher, Trust, Versions, decoded_set
from protocol import wishes
from protocol.codec import MAX_PAYLOAD_BYTES, encode
from protocol.errors import Rejected, Unavailable
from protocol.messages import MetadataSet
from protocol.release import to_custom
from protocol.wishes import Pin, Withdrawal
from tests.signing import NOW, ROLES, Host, new_keys, release, target_of
from tests.simulation.device.disk import Killed, Medium, PowerCut, SimulatedDisk


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
    assert verified.versions == Versions(1, 2, 2, 2)
    assert verified.releases == (release(1), release(2), release(7, "movement"))
    assert (verified.wishes, verified.refused) == ((), ())
    assert verified.signed_by == (host.keys["targets"][0].public_key.keyid,)


def test_accepts_the_same_set_again_also_after_a_restart(trust: Trust, host: Host, tmp_path: Path) -> None:
    metadata = host.publish(release())
    first = trust.verify(metadata, NOW)
    assert trust.verify(metadata, NOW) == first
    assert Trust(tmp_path / "trust", host.roots[0]).verify(metadata, NOW) == first


def test_accepts_newer_sets(trust: Trust, host: Host) -> None:
    trust.verify(host.publish(release(1)), NOW)
    verified = trust.verify(host.publish(release(2)), NOW)
    assert (verified.versions, verified.releases) == (Versions(1, 3, 3, 3), (release(2),))


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
    host.need_two("targets")
    trust = Trust(tmp_path / "trust", host.roots[0])
    host.publish(release())
    with pytest.raises(Rejected, match=r"1 valid signatures of the 2 it needs \(from 2 trusted keys\)"):
        trust.verify(host.set(targets=host.keys["targets"][:1]), NOW)
    verified = trust.verify(host.publish(release()), NOW)
    assert verified.releases == (release(),)
    assert verified.signed_by == tuple(sorted(key.public_key.keyid for key in host.keys["targets"]))


def test_who_signed_is_said_of_valid_signatures_by_trusted_keys_only(trust: Trust, host: Host) -> None:
    stranger = CryptoSigner.generate_ed25519()
    host.publish(release())
    metadata = host.set(targets=[*host.keys["targets"], stranger])
    assert trust.verify(metadata, NOW).signed_by == (host.keys["targets"][0].public_key.keyid,)


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


def spoiled(host: Host, path: str, target: TargetFile) -> MetadataSet:
    """A good release, and beside it one that is not."""
    host.count_up()
    host.targets.targets = {release().target: target_of(release()), path: target}
    return host.set()


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "combat/../movement/2.tflite",
        "./combat/2.tflite",
        "combat//2.tflite",
        "combat/02.tflite",
        "combat/2.tflite\x00",
        "movement/2.tflite",
        "combat/3.tflite",
        "",
    ],
)
def test_a_release_under_a_path_that_is_not_its_own_is_left_out_and_named(trust: Trust, host: Host, path: str) -> None:
    verified = trust.verify(spoiled(host, path, target_of(release(2), path)), NOW)
    assert verified.releases == (release(),)
    assert [(one.target, one.reason) for one in verified.refused] == [(path, "bad_release")]


@pytest.mark.parametrize("slot", ["..", "a/b", "", "a b", "+"])
def test_a_release_for_a_slot_that_cannot_be_one_is_left_out_and_named(trust: Trust, host: Host, slot: str) -> None:
    bad = msgspec.structs.replace(release(2), slot=slot)
    verified = trust.verify(spoiled(host, bad.target, target_of(bad)), NOW)
    assert verified.releases == (release(),)
    assert [(one.target, one.reason) for one in verified.refused] == [(bad.target, "bad_name")]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (TargetFile(1000, {"sha512": "0" * 128}, "combat/2.tflite", {"custom": to_custom(release(2))}), "bad_release"),
        (TargetFile(1000, {"sha256": "x"}, "combat/2.tflite", {"custom": to_custom(release(2))}), "bad_digest"),
        (TargetFile(1000, {"sha256": "0" * 64}, "combat/2.tflite", {}), "bad_release"),
        (TargetFile(1000, {"sha256": "0" * 64}, "combat/2.tflite", {"custom": {"release": "{}"}}), "bad_release"),
        (TargetFile(10**12, {"sha256": "0" * 64}, "combat/2.tflite", {"custom": to_custom(release(2))}), "bad_release"),
    ],
)
def test_a_target_that_is_no_release_is_left_out_and_named(
    trust: Trust, host: Host, target: TargetFile, reason: str
) -> None:
    verified = trust.verify(spoiled(host, "combat/2.tflite", target), NOW)
    assert verified.releases == (release(),)
    assert [(one.target, one.reason) for one in verified.refused] == [("combat/2.tflite", reason)]


def test_what_is_said_of_a_bad_target_is_bounded(trust: Trust, host: Host) -> None:
    path = "x" * 50_000
    (fault,) = trust.verify(spoiled(host, path, target_of(release(2), path)), NOW).refused
    assert fault.target == "x" * MAX_SHOWN_NAME + "…"
    assert len(fault.text) == MAX_SHOWN_NAME + 1


def test_wishes_are_taken_from_what_the_targets_key_signed(trust: Trust, host: Host) -> None:
    wished = (Pin(slot="combat", version=1, devices=("pi-2",)), Withdrawal(slot="combat", version=2))
    host.wish(*wished)
    assert trust.verify(host.publish(release()), NOW).wishes == wished


PIN = '{"wish":"pin","slot":"combat","version":1}'


@pytest.mark.parametrize(
    ("field", "kept", "refused"),
    [
        (f'[{PIN},{{"wish":"dance"}}]', 1, [("[1]", "bad_wishes")]),
        (f'[{{"wish":"pin","slot":"../x","version":1}},{PIN}]', 1, [("[0]", "bad_name")]),
        (f"[{PIN},[],7]", 1, [("[1]", "bad_wishes"), ("[2]", "bad_wishes")]),
        (f'[{PIN[:-1]},"note":"{"n" * 20_000}"}},{PIN}]', 1, [("[0]", "bad_wishes")]),
        (
            f'[{PIN},{PIN[:-1]},"at":1e18}},{PIN[:-1]},"devices":["../x"]}}]',
            1,
            [("[1]", "bad_wishes"), ("[2]", "bad_name")],
        ),
        (PIN, 0, [("", "bad_wishes")]),
        ("[", 0, [("", "bad_wishes")]),
        ("[" * 5000, 0, [("", "bad_wishes")]),
        (f"[{','.join([PIN] * (wishes.MAX_WISHES + 1))}]", 0, [("", "bad_wishes")]),
        (7, 0, [("", "bad_wishes")]),
        ([PIN], 0, [("", "bad_wishes")]),
    ],
)
def test_a_wish_that_cannot_be_read_is_named_and_stops_neither_the_others_nor_the_releases(
    trust: Trust, host: Host, field: object, kept: int, refused: list[tuple[str, str]]
) -> None:
    host.targets.unrecognized_fields[wishes.FIELD] = field
    verified = trust.verify(host.publish(release()), NOW)
    assert verified.releases == (release(),)
    assert verified.wishes == (Pin(slot="combat", version=1),) * kept
    assert [(one.target, one.reason) for one in verified.refused] == [
        (f"{wishes.FIELD}{place}", code) for place, code in refused
    ]
    assert all(isinstance(one, BadRelease) and one.text for one in verified.refused)


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


def test_what_was_accepted_is_kept_when_the_source_breaks_off(trust: Trust, host: Host) -> None:
    old = host.publish(release(1))
    trust.verify(old, NOW)
    with pytest.raises(Unavailable, match="cannot fetch snapshot metadata"):
        trust.verify(_Elsewhere(SetFetcher(host.publish(release(2))), broken="snapshot"), NOW)
    assert refusal(trust, old) == ("rolled_back", "timestamp")


class _BreakingOff(FetcherInterface):
    """A connection that is lost in the middle of a document."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        yield b"{"
        raise ConnectionResetError(f"reset while {url} came")


def test_a_connection_that_is_lost_in_a_document_is_not_an_attack(trust: Trust) -> None:
    with pytest.raises(Unavailable, match=r"cannot fetch root metadata: reset while metadata/2\.root\.json came"):
        trust.verify(_BreakingOff(), NOW)


class _Endless(FetcherInterface):
    """Sends one document without end, and counts."""

    def __init__(self, source: SetFetcher, endless: str) -> None:
        self._source = source
        self._endless = endless
        self.sent = 0

    def _fetch(self, url: str) -> Iterator[bytes]:
        if self._endless not in url:
            yield from self._source.fetch(url)
            return
        while True:
            self.sent += 1024
            yield b" " * 1024


@pytest.mark.parametrize("role", ["2.root", "timestamp", "snapshot", "targets"])
def test_an_endless_document_is_given_up_at_its_limit(trust: Trust, host: Host, role: str) -> None:
    host.count_up()
    metadata = host.set()
    host.snapshot.meta["targets.json"] = MetaFile(host.targets.version)
    snapshot = host.signed(host.snapshot, host.keys["snapshot"])
    host.timestamp.snapshot_meta = MetaFile(host.snapshot.version)
    timestamp = host.signed(host.timestamp, host.keys["timestamp"])
    source = _Endless(SetFetcher(changed(metadata, snapshot=snapshot, timestamp=timestamp)), role)
    with pytest.raises(Rejected) as caught:
        trust.verify(source, NOW)
    assert (caught.value.code, caught.value.field) == ("too_long", role.removeprefix("2."))
    assert source.sent <= MAX_PAYLOAD_BYTES + 1024


# What is kept, and how.


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


KEPT = ["root.json", "root_history/1.root.json", "snapshot.json", "targets.json", "timestamp.json"]


def test_accepted_metadata_is_kept_in_plain_files_of_the_standard_names(tmp_path: Path, host: Host) -> None:
    metadata = host.publish(release())
    Trust(tmp_path, host.roots[0]).verify(metadata, NOW)
    assert names_in(tmp_path) == KEPT
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert (tmp_path / "root.json").read_bytes() == host.roots[0]
    assert (tmp_path / "targets.json").read_bytes() == metadata.targets


def test_python_tufs_own_client_goes_on_from_what_is_kept(tmp_path: Path, host: Host) -> None:
    old = host.publish(release(1))
    Trust(tmp_path, host.roots[0]).verify(host.publish(release(2)), NOW)
    Updater(str(tmp_path), "metadata", fetcher=SetFetcher(host.set()), bootstrap=None).refresh()
    with pytest.raises(Exception, match="must be >= 3"):
        Updater(str(tmp_path), "metadata", fetcher=SetFetcher(old), bootstrap=None).refresh()
    assert refusal(Trust(tmp_path, host.roots[0]), old) == ("rolled_back", "timestamp")  # and ours from what it keeps
    host.rotate("timestamp")
    Trust(tmp_path, host.roots[0]).verify(host.publish(release(3)), NOW)
    assert not (tmp_path / "root.json").is_symlink()


def test_a_disk_that_refuses_is_not_an_attack(tmp_path: Path, host: Host) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot read metadata in"):
        Trust(tmp_path / "file" / "trust", host.roots[0]).verify(host.publish(release()), NOW)


def test_a_temporary_folder_that_cannot_be_made_is_not_an_attack(
    trust: Trust, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not-there"))
    with pytest.raises(Unavailable, match="temporary folder"):
        trust.verify(host.publish(release()), NOW)


def test_the_temporary_folder_is_gone_afterwards(
    trust: Trust, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    trust.verify(host.publish(release()), NOW)
    refusal(trust, host.set(timestamp=[]))
    assert list((tmp_path / "temporary").iterdir()) == []


TRUST = Path("/state/trust")


class Device:
    """A device on a simulated disk, where it is interrupted at a chosen step."""

    def __init__(self, host: Host, seed: int = 0) -> None:
        self.medium = Medium(10**7, random.Random(seed))
        self.root = host.roots[0]
        self.disk().make_folder(TRUST.parent)

    def disk(self, at: int | None = None, end: BaseException | None = None) -> SimulatedDisk:
        left = at

        def step(_call: str, _path: str) -> None:
            nonlocal left
            if left is not None and end is not None:
                left -= 1
                if left < 0:
                    raise end

        return SimulatedDisk(self.medium, step)

    def trust(self, disk: SimulatedDisk | None = None) -> Trust:
        return Trust(TRUST, self.root, disk or self.disk())

    def steps_of(self, action: Callable[[SimulatedDisk], object]) -> int:
        count = 0

        def step(_call: str, _path: str) -> None:
            nonlocal count
            count += 1

        action(SimulatedDisk(self.medium, step))
        return count


@pytest.mark.parametrize("end", [Killed, PowerCut])
def test_wherever_it_is_interrupted_the_device_never_goes_back_and_takes_the_set_in_the_end(
    host: Host, end: type[BaseException]
) -> None:
    old = host.publish(release(1))
    host.rotate("root", "timestamp")
    middle = host.publish(release(2))
    host.rotate("root", "snapshot")
    new = host.publish(release(3))

    def update(disk: SimulatedDisk, device: Device) -> None:
        for metadata in (middle, new):
            device.trust(disk).verify(metadata, NOW)
            accepted.append(metadata)

    accepted: list[MetadataSet] = []
    trial = Device(host)
    trial.trust().verify(old, NOW)
    steps = trial.steps_of(lambda disk: update(disk, trial))
    assert steps > 40
    for at in range(steps):
        device = Device(host, seed=at)
        device.trust().verify(old, NOW)
        accepted = [old]
        with pytest.raises(end):
            update(device.disk(at, end()), device)
        if end is PowerCut:
            device.medium.cut()
        for older in (old, middle)[: len(accepted) - 1]:
            with pytest.raises(Rejected):
                device.trust().verify(older, NOW)
        assert device.trust().verify(new, NOW).releases == (release(3),)
        with pytest.raises(Rejected):
            device.trust().verify(middle, NOW)


def test_what_was_acted_on_survives_a_power_cut_right_afterwards(host: Host) -> None:
    first, second = host.publish(release(1)), host.publish(release(2))
    for seed in range(20):
        device = Device(host, seed)
        device.trust().verify(second, NOW)
        device.medium.cut()
        with pytest.raises(Rejected, match="timestamp metadata version 2 is older than version 3"):
            device.trust().verify(first, NOW)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_on_a_disk_that_takes_nothing_new_metadata_waits(host: Host, number: int) -> None:
    device = Device(host)
    old = host.publish(release(1))
    device.trust().verify(old, NOW)
    device.medium.refusal = number
    if number == errno.EROFS:  # on a disk that fails, nobody knows whether it is there
        assert device.trust().verify(old, NOW).releases == (release(1),)
    new = host.publish(release(2))
    with pytest.raises(Unavailable):
        device.trust().verify(new, NOW)
    with pytest.raises(Rejected) as caught:  # the reason is what is wrong with the set, and not the disk
        device.trust().verify(host.set(targets=[]), NOW)
    assert caught.value.code == "unsigned"
    device.medium.refusal = None
    assert device.trust().verify(new, NOW).releases == (release(2),)


def test_an_unchanged_set_costs_no_write(host: Host) -> None:
    device = Device(host)
    metadata = host.publish(release(1))
    device.trust().verify(metadata, NOW)
    calls: list[str] = []
    device.trust(SimulatedDisk(device.medium, lambda call, _path: calls.append(call))).verify(metadata, NOW)
    assert set(calls) <= {"read", "names", "is_folder", "sync_folder"}


def test_what_tuf_accepts_of_a_refused_set_is_on_the_disk(host: Host) -> None:
    device = Device(host)
    old = host.publish(release(1))
    host.rotate("snapshot")
    new = host.publish(release(2))
    assert refusal(device.trust(), changed(new, snapshot=old.snapshot))[0] == "bad_signature"
    device.medium.cut()
    assert device.disk().read(TRUST / "timestamp.json") == new.timestamp
    assert device.disk().read(TRUST / "root.json") == host.roots[1]
    assert refusal(device.trust(), old) == ("rolled_back", "timestamp")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_of_a_set_that_is_expired_by_the_better_clock_only_what_precedes_is_kept(
    tmp_path: Path, host: Host, role: str
) -> None:
    """As python-tuf does with one that is expired by the system's clock."""
    getattr(host, role).expires = NOW + timedelta(days=1)
    assert refusal(Trust(tmp_path, host.roots[0]), host.publish(release()), NOW + timedelta(days=2))[1] == role
    order = ["timestamp", "snapshot", "targets"]
    kept = [f"{name}.json" for name in order[: order.index(role)]]
    assert names_in(tmp_path) == sorted(["root.json", "root_history/1.root.json", *kept])


def test_a_device_that_is_given_another_root_of_trust_starts_anew(tmp_path: Path, host: Host) -> None:
    host.rotate("root")
    Trust(tmp_path, host.roots[0]).verify(host.publish(release(5)), NOW)
    other = Host()
    verified = Trust(tmp_path, other.roots[0]).verify(other.publish(release(1)), NOW)
    assert verified.versions == Versions(1, 2, 2, 2)
    assert names_in(tmp_path) == KEPT
    assert refusal(Trust(tmp_path, other.roots[0]), host.set())[0] == "bad_root"


def test_a_root_of_trust_that_rotted_does_not_erase_what_was_accepted(tmp_path: Path, host: Host) -> None:
    metadata = host.publish(release())
    Trust(tmp_path, host.roots[0]).verify(metadata, NOW)
    rotten = host.roots[0].replace(b'"threshold": 1', b'"threshold": 2').replace(b'"threshold":1', b'"threshold":2')
    assert rotten != host.roots[0]
    assert refusal(Trust(tmp_path, rotten), metadata) == ("bad_root", "root")
    assert names_in(tmp_path) == KEPT


def test_a_newer_root_of_the_same_chain_keeps_what_was_accepted(tmp_path: Path, host: Host) -> None:
    old = host.publish(release(1))
    host.rotate("root")
    Trust(tmp_path, host.roots[0]).verify(host.publish(release(2)), NOW)
    trust = Trust(tmp_path, host.roots[1])
    assert refusal(trust, msgspec.structs.replace(old, roots=host.roots)) == ("rolled_back", "timestamp")
    assert trust.verify(host.publish(release(3)), NOW).versions.root == 2


# Rot.


def rotted(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    return {
        "bit": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
        "zeros": bytes(len(data)),
        "empty": b"",
        "cut": data[:middle],
        "another": b'{"signed": {}, "signatures": []}',
        "signature": data.replace(b'"sig": "', b'"sig": "0').replace(b'"sig":"', b'"sig":"0'),
    }[how]


ROT = ["bit", "zeros", "empty", "cut", "another", "signature"]


@pytest.fixture
def history(host: Host) -> list[MetadataSet]:
    """Sets with three roots, and versions 2 to 4."""
    sets = [host.publish(release(1))]
    host.rotate("root", "targets")
    sets.append(host.publish(release(2)))
    host.rotate("timestamp")
    sets.append(host.publish(release(3)))
    return sets


FILES = [*KEPT, "root_history/2.root.json", "root_history/3.root.json"]


@pytest.mark.parametrize("how", ROT)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_rebuilt_from_the_set(
    tmp_path: Path, host: Host, history: list[MetadataSet], name: str, how: str
) -> None:
    trust = Trust(tmp_path, host.roots[0])
    verified = trust.verify(history[-1], NOW)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(rotted(whole, how))
    assert trust.verify(history[-1], NOW) == verified
    assert (tmp_path / name).read_bytes() == whole
    assert names_in(tmp_path) == sorted(FILES)


@pytest.mark.parametrize("how", ROT)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_does_not_open_the_way_back(
    tmp_path: Path, host: Host, history: list[MetadataSet], name: str, how: str
) -> None:
    trust = Trust(tmp_path, host.roots[0])
    trust.verify(history[-1], NOW)
    whole = (tmp_path / name).read_bytes()
    for older in history[:-1]:
        (tmp_path / name).write_bytes(rotted(whole, how))
        with pytest.raises(Rejected):
            trust.verify(older, NOW)
    assert trust.verify(history[-1], NOW).releases == (release(3),)


@pytest.mark.parametrize("lost", [["timestamp"], ["snapshot"], ["timestamp", "snapshot"], ["timestamp", "targets"]])
def test_lost_documents_do_not_open_the_way_back_in_one_step_or_in_two(
    tmp_path: Path, host: Host, lost: list[str]
) -> None:
    trust = Trust(tmp_path, host.roots[0])
    old, new = host.publish(release(1)), host.publish(release(2))
    trust.verify(new, NOW)
    for role in lost:
        (tmp_path / f"{role}.json").write_bytes(b"rot")
    assert refusal(trust, changed(old, snapshot=new.snapshot))[0] in {"rolled_back", "mixed"}
    assert refusal(trust, changed(old, targets=new.targets))[0] in {"rolled_back", "mixed"}
    assert refusal(trust, old)[0] == "rolled_back"
    assert trust.verify(new, NOW).releases == (release(2),)


def test_a_lost_timestamp_lets_a_re_signed_older_snapshot_of_the_same_targets_in_no_more(
    tmp_path: Path, host: Host
) -> None:
    trust = Trust(tmp_path, host.roots[0])
    old = host.publish(release(1))
    host.snapshot.version += 1
    host.timestamp.version += 1
    trust.verify(host.set(), NOW)
    (tmp_path / "timestamp.json").unlink()
    assert refusal(trust, old) == ("rolled_back", "snapshot")
    assert "timestamp.json" not in names_in(tmp_path)


def test_with_nothing_left_a_set_that_has_not_expired_is_believed(tmp_path: Path, host: Host) -> None:
    trust = Trust(tmp_path, host.roots[0])
    old, new = host.publish(release(1)), host.publish(release(2))
    trust.verify(new, NOW)
    for name in KEPT:
        (tmp_path / name).write_bytes(b"rot")
    assert trust.verify(old, NOW).releases == (release(1),)


def test_a_broken_chain_of_roots_does_not_bring_revoked_keys_back(tmp_path: Path, host: Host) -> None:
    trust = Trust(tmp_path, host.roots[0])
    stolen = dict(host.keys)
    host.rotate(*ROLES)
    good = host.publish(release(1))
    trust.verify(good, NOW)
    thief = Host(stolen)
    thief.roots = host.roots[:1]
    thief.count_up(10)
    (tmp_path / "root_history/2.root.json").write_bytes(b"rot")
    (tmp_path / "timestamp.json").unlink()
    assert refusal(trust, thief.publish(release(9)))[0] == "bad_signature"  # the newest root is in root.json, too
    host.rotate("root")
    trust.verify(host.publish(release(2)), NOW)
    (tmp_path / "root_history/2.root.json").write_bytes(b"rot")
    kept = {name: (tmp_path / name).read_bytes() for name in KEPT}
    assert refusal(trust, thief.publish(release(9))) == ("rolled_back", "root")
    assert {name: (tmp_path / name).read_bytes() for name in KEPT} == kept
    assert trust.verify(host.set(), NOW).releases == (release(2),)


def test_what_rotted_is_logged(
    tmp_path: Path, host: Host, history: list[MetadataSet], caplog: pytest.LogCaptureFixture
) -> None:
    trust = Trust(tmp_path, host.roots[0])
    with caplog.at_level(logging.WARNING):
        trust.verify(history[-1], NOW)
        assert caplog.records == []
        (tmp_path / "timestamp.json").write_bytes(b"rot")
        trust.verify(history[-1], NOW)
    assert "timestamp.json is damaged" in caplog.text
    assert "the timestamp metadata that was accepted is lost" in caplog.text


# Fast-forward attacks, and the way out of them (specification section 5.3.11).


def test_a_timestamp_of_a_thief_can_stop_updates_and_a_new_timestamp_key_ends_that(trust: Trust, host: Host) -> None:
    good = host.publish(release(1))
    host.timestamp.version = 2**31
    assert trust.verify(host.set(), NOW).releases == (release(1),)
    host.timestamp.version = Metadata.from_bytes(good.timestamp).signed.version
    assert refusal(trust, host.publish(release(2))) == ("rolled_back", "timestamp")
    host.rotate("timestamp")
    assert trust.verify(host.publish(release(2)), NOW).releases == (release(2),)


def test_a_snapshot_of_a_thief_is_undone_by_new_keys_for_snapshot_and_timestamp(trust: Trust, host: Host) -> None:
    trust.verify(host.publish(release(1)), NOW)
    honest = [part.version for part in (host.targets, host.snapshot, host.timestamp)]
    host.snapshot.version = host.timestamp.version = host.targets.version = 2**31
    assert refusal(trust, host.set(targets=[]))[0] == "unsigned"
    host.targets.version, host.snapshot.version, host.timestamp.version = honest
    assert refusal(trust, host.publish(release(2)))[0] == "rolled_back"
    host.rotate("timestamp")
    assert refusal(trust, host.publish(release(2)))[0] == "rolled_back"  # the snapshot's key is still the thief's
    host.rotate("snapshot", "timestamp")
    assert trust.verify(host.publish(release(2)), NOW).releases == (release(2),)


def test_rotation_of_the_timestamps_key_is_not_mistaken_for_damage(trust: Trust, host: Host) -> None:
    """What its old key said of the snapshot's version is void; of targets, the snapshot's own key still says it."""
    host.publish(release(1))
    trust.verify(host.publish(release(1)), NOW)
    host.snapshot.version -= 1
    host.timestamp.version -= 1
    assert refusal(trust, host.set())[0] == "rolled_back"
    host.rotate("timestamp")
    assert trust.verify(host.set(), NOW).versions == Versions(2, 2, 2, 3)


def test_a_root_signed_by_the_old_keys_only_or_by_the_new_keys_only_is_refused(trust: Trust, host: Host) -> None:
    old = host.keys["root"]
    host.replace_keys("root")
    version = host.root.version + 1
    for signers in (old, host.keys["root"]):
        host.roots = host.roots[:1]
        host.next_root(signers, version)
        assert refusal(trust, host.set()) == ("bad_root", "root")
    host.roots = host.roots[:1]
    host.next_root([*old, *host.keys["root"]], version)
    assert trust.verify(host.publish(release()), NOW).versions.root == 2


def test_a_device_several_roots_behind_catches_up_from_one_set(tmp_path: Path, host: Host) -> None:
    trust = Trust(tmp_path, host.roots[0])
    trust.verify(host.publish(release(1)), NOW)
    for _ in range(20):
        host.rotate(*ROLES)
    assert trust.verify(host.publish(release(2)), NOW).versions.root == 21
    assert isinstance(Metadata.from_bytes((tmp_path / "root.json").read_bytes()).signed, Root)
    assert len(encode(host.set(), as_json=False)) < MAX_PAYLOAD_BYTES
