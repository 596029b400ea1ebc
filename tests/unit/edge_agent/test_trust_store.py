from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from edge_agent.trust_store import TrustStore, is_intact, parsed, root_file
from protocol.errors import Unavailable
from tests.signing import Host, release
from tests.simulation.device.disk import Killed, Medium, SimulatedDisk

FOLDER = Path("/state/trust")


@pytest.fixture
def documents() -> dict[str, bytes]:
    host = Host()
    for _ in range(10):
        host.rotate("root")
    published = host.publish(release())
    return {
        "targets.json": published.targets,
        "snapshot.json": published.snapshot,
        "timestamp.json": published.timestamp,
        "root.json": published.roots[-1],
        **{root_file(version): root for version, root in enumerate(published.roots, 1)},
    }


def made(seed: int = 0) -> tuple[Medium, SimulatedDisk]:
    medium = Medium(10**7, random.Random(seed))
    disk = SimulatedDisk(medium)
    disk.make_folder(FOLDER.parent)
    return medium, disk


def test_what_is_written_is_read(documents: dict[str, bytes]) -> None:
    _, disk = made()
    assert TrustStore(FOLDER, disk).read() == {}
    TrustStore(FOLDER, disk).write(documents)
    assert TrustStore(FOLDER, disk).read() == documents


def test_documents_are_written_in_the_order_in_which_tuf_accepts_them(documents: dict[str, bytes]) -> None:
    medium, _ = made()
    renamed: list[str] = []

    def step(call: str, path: str) -> None:
        if call == "rename":
            renamed.append(Path(path).name.removeprefix(".").removesuffix(".new"))

    TrustStore(FOLDER, SimulatedDisk(medium, step)).write(documents)
    roots = [f"{version}.root.json" for version in range(1, 12)]
    assert renamed == [*roots, "root.json", "timestamp.json", "snapshot.json", "targets.json"]


def test_only_what_changed_is_written(documents: dict[str, bytes]) -> None:
    medium, disk = made()
    TrustStore(FOLDER, disk).write(documents)
    renamed: list[str] = []

    def step(call: str, path: str) -> None:
        if call == "rename":
            renamed.append(path)

    other = Host().publish().timestamp
    TrustStore(FOLDER, SimulatedDisk(medium, step)).write({**documents, "timestamp.json": other})
    assert renamed == [f"{FOLDER}/.timestamp.json.new"]


def test_one_that_is_killed_is_followed_by_one_whose_writing_survives_a_power_cut(documents: dict[str, bytes]) -> None:
    few = {name: documents[name] for name in (root_file(1), "timestamp.json")}
    for at in range(40):
        medium, _ = made(seed=at)
        left = at

        def step(_call: str, _path: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            TrustStore(FOLDER, SimulatedDisk(medium, step)).write(few)
        except Killed:
            TrustStore(FOLDER, SimulatedDisk(medium)).write(few)
        medium.cut()
        assert TrustStore(FOLDER, SimulatedDisk(medium)).read() == few
    assert left > 0  # the last one was not killed


def test_leftovers_of_one_that_was_killed_are_removed(documents: dict[str, bytes]) -> None:
    _, disk = made()
    TrustStore(FOLDER, disk).write(documents)
    for name in (".timestamp.json.new", "root_history/.12.root.json.new"):
        disk.write(FOLDER / name, [b"torn"], sync=True)
    assert TrustStore(FOLDER, disk).read() == documents
    assert not any(name.endswith(".new") for folder in ("", "root_history") for name in disk.names(FOLDER / folder))


def test_what_was_renamed_by_one_that_was_killed_is_not_called_kept_before_it_is(documents: dict[str, bytes]) -> None:
    for seed in range(20):
        medium, disk = made(seed)
        TrustStore(FOLDER, disk).write(documents)
        newer = {"root_history/12.root.json": documents["root.json"]}
        disk.write(FOLDER / "root_history/new", [documents["root.json"]], sync=True)
        disk.rename(FOLDER / "root_history/new", FOLDER / "root_history/12.root.json")
        TrustStore(FOLDER, disk).write(newer)
        medium.cut()
        assert SimulatedDisk(medium).is_file(FOLDER / "root_history/12.root.json")


def test_what_is_not_ours_is_left_alone(documents: dict[str, bytes]) -> None:
    _, disk = made()
    TrustStore(FOLDER, disk).write(documents)
    disk.write(FOLDER / "notes.txt", [b"mine"], sync=True)
    assert TrustStore(FOLDER, disk).read() == documents
    assert disk.read(FOLDER / "notes.txt") == b"mine"


@pytest.mark.parametrize("name", ["root.json", "timestamp.json", "root_history/2.root.json"])
def test_a_damaged_file_is_removed_and_the_others_are_read(documents: dict[str, bytes], name: str) -> None:
    _, disk = made()
    TrustStore(FOLDER, disk).write(documents)
    disk.write(FOLDER / name, [b"rot"], sync=True)
    assert TrustStore(FOLDER, disk).read() == {key: data for key, data in documents.items() if key != name}
    assert not disk.is_file(FOLDER / name)


class BadSector(SimulatedDisk):
    """One file of it cannot be read."""

    bad = FOLDER / "timestamp.json"

    def read(self, path: Path) -> bytes:
        if path == self.bad:
            raise OSError(errno.EIO, "bad sector")
        return super().read(path)


def test_a_file_that_cannot_be_read_is_not_removed_and_is_written_anew(documents: dict[str, bytes]) -> None:
    medium, disk = made()
    TrustStore(FOLDER, disk).write(documents)
    store = TrustStore(FOLDER, BadSector(medium))
    assert store.read() == {name: data for name, data in documents.items() if name != "timestamp.json"}
    assert TrustStore(FOLDER, disk).read() == documents
    other = {**documents, "timestamp.json": Host().publish().timestamp}
    store.write(other)
    assert TrustStore(FOLDER, disk).read() == other


def test_clearing_forgets_all_and_whose_it_was_last(documents: dict[str, bytes]) -> None:
    medium, disk = made()
    TrustStore(FOLDER, disk).write(documents)
    removed: list[str] = []

    def step(call: str, path: str) -> None:
        if call == "remove":
            removed.append(path.removeprefix(f"{FOLDER}/"))

    store = TrustStore(FOLDER, SimulatedDisk(medium, step))
    store.clear()
    assert removed[:4] == ["targets.json", "snapshot.json", "timestamp.json", "root.json"]
    assert removed[-1] == root_file(1)
    medium.cut()
    assert TrustStore(FOLDER, SimulatedDisk(medium)).read() == {}


def test_a_disk_that_refuses_is_unavailable(documents: dict[str, bytes], tmp_path: Path) -> None:
    medium, disk = made()
    medium.refusal = errno.EROFS
    with pytest.raises(Unavailable, match="cannot keep metadata in"):
        TrustStore(FOLDER, disk).write(documents)
    medium.refusal = None
    TrustStore(FOLDER, disk).write(documents)
    medium.refusal = errno.EROFS
    with pytest.raises(Unavailable, match="cannot forget metadata in"):
        TrustStore(FOLDER, disk).clear()
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot read metadata in"):
        TrustStore(tmp_path / "file").read()


def test_a_full_disk_keeps_what_was_there(documents: dict[str, bytes]) -> None:
    medium, disk = made()
    TrustStore(FOLDER, disk).write(documents)
    medium.capacity_bytes = medium.used_bytes
    with pytest.raises(Unavailable, match="no space"):
        TrustStore(FOLDER, disk).write({"timestamp.json": Host().publish().timestamp})
    assert TrustStore(FOLDER, disk).read() == documents


def test_only_a_root_can_be_judged_by_itself() -> None:
    host = Host()
    stranger = Host()
    published = host.set(timestamp=stranger.keys["timestamp"])
    assert is_intact("timestamp.json", published.timestamp)  # verified by the newest root, when it is used
    assert not is_intact("snapshot.json", published.timestamp)
    assert is_intact("root.json", host.roots[0])
    assert is_intact(root_file(1), host.roots[0])
    assert not is_intact(root_file(2), host.roots[0])
    assert not is_intact("root.json", host.signed(host.root, stranger.keys["root"]))
    assert not is_intact(root_file(1), published.targets)
    assert parsed(None) is None
    assert parsed(b"{}") is None
