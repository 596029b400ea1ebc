from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from edge_agent.releases import Releases
from protocol.errors import Unavailable
from protocol.features import FeatureSpec
from protocol.messages import ModelRef
from protocol.release import Golden, Release, Tensor


def release(version: int, notes: str = "") -> Release:
    return Release(
        slot="combat",
        version=version,
        digest=f"{version:x}" * 64,
        length=1,
        manifest="f" * 64,
        inputs=(Tensor(name="in", shape=(1, 2), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 1), dtype="float32"),),
        actions=("hit",),
        features=FeatureSpec(),
        golden=Golden(inputs=((1.0, 2.0),), outputs=((0.0,),), tolerance=1.0),
        notes=notes,
    )


ONE, TWO = release(1), release(2)
REF_ONE, REF_TWO = (ModelRef(digest=each.digest, version=each.version) for each in (ONE, TWO))


def test_what_was_kept_is_known_after_a_restart(tmp_path: Path) -> None:
    Releases(tmp_path / "releases").keep(ONE)
    again = Releases(tmp_path / "releases")
    assert again.get("combat", REF_ONE) == ONE
    assert again.get("combat", REF_TWO) is None


def test_keeping_what_is_known_writes_nothing_and_a_change_is_written(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    releases.keep(ONE)
    file = tmp_path / f"combat-1-{ONE.digest[:16]}.json"
    before = file.stat().st_ino
    releases.keep(ONE)
    assert file.stat().st_ino == before
    releases.keep(release(1, notes="new"))
    assert Releases(tmp_path).get("combat", REF_ONE) == release(1, notes="new")


NOTHING_IN_IT = hashlib.sha256(b"{}").hexdigest().encode() + b"\n{}"


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"0" * 64 + b"\n{}", NOTHING_IN_IT])
def test_a_damaged_file_is_as_good_as_none_and_is_mended_by_the_next_metadata(content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"combat-1-{ONE.digest[:16]}.json").write_bytes(content)
    releases = Releases(tmp_path)
    assert releases.get("combat", REF_ONE) is None
    releases.keep(ONE)
    assert Releases(tmp_path).get("combat", REF_ONE) == ONE


def test_all_but_what_is_pinned_is_forgotten(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    releases.keep(ONE)
    releases.keep(TWO)
    releases.collect({("combat", REF_TWO)})
    assert releases.get("combat", REF_ONE) is None
    assert releases.get("combat", REF_TWO) == TWO
    assert Releases(tmp_path).get("combat", REF_ONE) is None


def test_what_cannot_be_written_is_not_known(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "releases")
    (tmp_path / "releases").rmdir()
    with pytest.raises(Unavailable):
        releases.keep(ONE)
    assert releases.get("combat", REF_ONE) is None


def test_a_disk_that_does_not_let_go_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / f"combat-1-{ONE.digest[:16]}.json").mkdir()
    with pytest.raises(Unavailable):
        Releases(tmp_path).collect(set())


def test_one_model_released_for_two_slots_is_two_releases(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    other = msgspec.structs.replace(ONE, slot="movement", version=7)
    releases.keep(ONE)
    releases.keep(other)
    assert (releases.get("combat", REF_ONE), releases.get("movement", ModelRef(digest=ONE.digest, version=7))) == (
        ONE,
        other,
    )


def test_a_bit_that_flips_is_noticed(tmp_path: Path) -> None:
    Releases(tmp_path).keep(ONE)
    path = tmp_path / f"combat-1-{ONE.digest[:16]}.json"
    path.write_bytes(path.read_bytes().replace(b"hit", b"hid"))
    assert Releases(tmp_path).get("combat", REF_ONE) is None


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".combat-1-0.json.new").write_bytes(b"half")
    Releases(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_under_a_version_that_was_used_change_nothing_that_is_known(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    other = msgspec.structs.replace(ONE, digest="9" * 64)
    releases.keep(ONE)
    releases.keep(other)
    assert releases.get("combat", REF_ONE) == ONE
    assert Releases(tmp_path).get("combat", ModelRef(digest="9" * 64, version=1)) == other
